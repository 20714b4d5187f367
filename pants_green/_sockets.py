"""The door to gevent's sockets: making, binding, dialling, accepting, looking up, and what their errors mean.

The private parts of a gevent socket that the hot path needs are touched here and nowhere else: the C socket under it
(``_sock``) and its two watchers (``_read_event``, ``_write_event``). Nothing here waits, but for ``resolve``.
"""

import errno
import os
import socket as stdlib_socket
import stat
import struct
from collections.abc import Callable
from typing import Any

import gevent.exceptions
import gevent.socket
from gevent import monkey

from pants_green._address import AF_UNIX, Address, Sockaddr, format_address

__all__ = [
    "ACCEPT_AGAIN",
    "EXHAUSTED",
    "PEER_LEFT",
    "ConcurrentUse",
    "GeventSocket",
    "Listener",
    "Ports",
    "abandon",
    "close",
    "dial",
    "dial_result",
    "has_files",
    "in_progress",
    "ipv6_works",
    "listen",
    "listen_all",
    "local_sockaddr",
    "ports_of",
    "remote_sockaddr",
    "resolve",
    "shutdown_output",
    "wait_readable",
    "wait_writable",
]

#: The peer, or the path to it, is gone: the usual ways in which a connection ends without a FIN.
PEER_LEFT = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ETIMEDOUT, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH})

#: The process or the machine has no descriptor or memory left for one more connection.
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

#: One waiting connection is lost, the listener is well. Linux hands errors of the new socket on to accept().
#: Source: accept(2), "Error handling".
ACCEPT_AGAIN = frozenset(
    getattr(errno, name)
    for name in (
        "ECONNABORTED",
        "ECONNRESET",
        "EPROTO",
        "EPERM",
        "EINTR",
        "ENETDOWN",
        "ENOPROTOOPT",
        "EHOSTDOWN",
        "ENONET",
        "EHOSTUNREACH",
        "EOPNOTSUPP",
        "ENETUNREACH",
    )
    if hasattr(errno, name)
)

IN_PROGRESS = frozenset({errno.EINPROGRESS, errno.EALREADY})

#: How often a free port is looked for that several listeners can share.
SHARED_PORT_TRIES = 20

#: gevent's socket class, for isinstance.
GeventSocket = gevent.socket.socket

#: What gevent raises if two greenlets wait for the same thing.
ConcurrentUse: type[Exception] = gevent.exceptions.ConcurrentObjectUseError

#: The C-level class under it.
BareSocket: Any = GeventSocket._gevent_sock_class

STREAM = stdlib_socket.SOCK_STREAM

#: Whether a gevent socket is made of what it was made of in gevent 24.10 to 26.9; else `_stand_on` leaves it to gevent.
FIELDS_ARE_KNOWN = {name for kind in GeventSocket.__mro__ for name in getattr(kind, "__slots__", ())} == {
    "__weakref__",
    "_closed",
    "_io_refs",
    "_read_event",
    "_sock",
    "_write_event",
    "hub",
    "timeout",
}

# The lookup that stays in this greenlet, also in a monkey-patched process; used for numeric hosts only.
_plain_getaddrinfo: Callable[..., Any] = monkey.get_original("socket", "getaddrinfo")
_plain_socket: Callable[..., Any] = monkey.get_original("socket", "socket")


#: What a stream needs of its socket between receives and sends: ``recv(size) -> bytes`` and ``send(data) -> int``, which
#: raise BlockingIOError if there is nothing to do, and two watchers with ``start(callback, *args)`` and ``stop()``.
Ports = tuple[Callable[[int], bytes], Callable[[bytes | memoryview], int], Any, Any]


def ports_of(sock: Any) -> Ports:
    """Return the C-level methods and the watchers of a gevent socket."""
    # Measured against the socket's own recv and send: work per CPU second 1.16 in ping-pong, 1.6 in bulk.
    bare = sock._sock
    return bare.recv, bare.send, sock._read_event, sock._write_event


def _stand_on(descriptor: int, family: int, proto: int, hub: Any) -> Any:
    """Make a gevent socket of an accepted descriptor: what its constructor does, in a third of the instructions."""
    if not FIELDS_ARE_KNOWN:
        return GeventSocket(family, STREAM, proto, descriptor)
    sock = GeventSocket.__new__(GeventSocket)
    sock._sock = bare = BareSocket(family, STREAM, proto, descriptor)
    bare.setblocking(False)
    sock._closed = False
    sock._io_refs = 0
    sock.timeout = stdlib_socket.getdefaulttimeout()
    sock.hub = hub
    watch = hub.loop.io
    sock._read_event = watch(descriptor, 1)
    sock._write_event = watch(descriptor, 2)
    return sock


class Listener:
    """A listening socket and what accepting needs of it.

    Attributes:
        socket: the gevent socket.
        sockaddr: the address it is bound to.
        local: the same if every connection has it as its own address, else None ("any" addresses, Unix sockets).
    """

    __slots__ = ("_accept", "_proto", "family", "local", "sockaddr", "socket")

    def __init__(self, sock: Any) -> None:
        self.socket = sock
        self.family = sock.family
        self.sockaddr = sock.getsockname()
        self.local = None if self.family == AF_UNIX or self.sockaddr[0] in ("0.0.0.0", "::") else self.sockaddr
        self._accept = sock._sock._accept
        self._proto = sock.proto

    def start(self, callback: Callable[["Listener"], None]) -> None:
        """Have `callback` called in the hub while connections wait."""
        self.socket._read_event.start(callback, self)

    def stop(self) -> None:
        """Stop calling back."""
        self.socket._read_event.stop()

    def accept(self) -> tuple[Any, Any, Any, int]:
        """Take one connection off the queue.

        Returns:
            the connection's gevent socket, the peer's address, its own address (None: ask when wanted), its descriptor.

        Raises:
            BlockingIOError: the queue is empty.
            OSError: see EXHAUSTED and ACCEPT_AGAIN.
        """
        descriptor, address = self._accept()
        try:
            sock = _stand_on(descriptor, self.family, self._proto, self.socket.hub)
        except BaseException:
            os.close(descriptor)
            raise
        return sock, address, self.local, descriptor

    def close(self) -> None:
        """Stop listening; the file of a Unix socket is removed."""
        self.socket.close()
        if self.family == AF_UNIX and self.sockaddr and not _is_abstract(self.sockaddr):
            try:
                os.unlink(self.sockaddr)
            except OSError:
                pass


def listen(address: Address, backlog: int, *, reuse_port: bool = False) -> Listener:
    """Bind to one address and listen.

    Accepted sockets inherit TCP_NODELAY and keepalive from it, which saves two calls for each.

    Raises:
        OSError: with the errno of the call that failed and the address in its text.
    """
    family, sockaddr = address.family, address.sockaddr
    try:
        sock = gevent.socket.socket(family, stdlib_socket.SOCK_STREAM)
        try:
            if family == AF_UNIX:
                _remove_stale(sockaddr)
            else:
                sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEADDR, 1)
                if reuse_port:
                    sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEPORT, 1)
                if family == stdlib_socket.AF_INET6:
                    sock.setsockopt(stdlib_socket.IPPROTO_IPV6, stdlib_socket.IPV6_V6ONLY, 1)
                set_tcp_defaults(sock)
            sock.bind(sockaddr)
            sock.listen(backlog)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise _explained(error, address) from error
    return Listener(sock)


def listen_all(addresses: list[Address], backlog: int, *, reuse_port: bool = False) -> list[Listener]:
    """Listen on every address, all on one port, also if that port is 0.

    Raises:
        OSError: as `listen`; none of the sockets is left open.
    """
    for attempt in range(SHARED_PORT_TRIES):
        made: list[Listener] = []
        try:
            for address in addresses:
                if made and address.sockaddr[1] == 0:
                    address = address._replace(sockaddr=_with_port(address.sockaddr, made[0].sockaddr[1]))
                made.append(listen(address, backlog, reuse_port=reuse_port))
            return made
        except OSError as error:
            for listener in made:
                listener.close()
            # A port that the kernel chose for the first address may be taken on the second.
            if error.errno == errno.EADDRINUSE and made and addresses[0].sockaddr[1] == 0 and attempt < SHARED_PORT_TRIES - 1:
                continue
            raise
    raise AssertionError("unreachable")


def set_tcp_defaults(sock: Any) -> None:
    """Switch Nagle's algorithm off and keepalive on."""
    sock.setsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY, 1)
    sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_KEEPALIVE, 1)


def dial(address: Address) -> tuple[Any, int]:
    """Make a socket and begin to connect it.

    Returns:
        the gevent socket, and 0 if it is connected already, else the errno; see `dial_result`.

    Raises:
        OSError: no socket could be made.
    """
    sock = gevent.socket.socket(address.family, stdlib_socket.SOCK_STREAM)
    try:
        if address.family != AF_UNIX:
            set_tcp_defaults(sock)
        # The C method: gevent's own connect_ex would wait.
        code = sock._sock.connect_ex(address.sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock, 0 if code == errno.EISCONN else code


def in_progress(code: int) -> bool:
    """Tell whether the errno of `dial` means: wait until the socket is writable."""
    return code in IN_PROGRESS


def dial_result(sock: Any) -> int:
    """Return how a dial ended: 0 or an errno."""
    code = int(sock.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_ERROR))
    if code == 0 and sock.family != AF_UNIX and local_sockaddr(sock) == remote_sockaddr(sock):
        # Dialling a local port that nobody listens on can meet itself when the kernel picks that very port as source.
        return errno.ECONNREFUSED
    return code


def resolve(address: Address) -> list[Address]:
    """Look the host of an address up; only the calling greenlet waits, and not for numeric hosts.

    Returns:
        every address of the host, in the order of the resolver, without doubles.

    Raises:
        OSError: (socket.gaierror) there is no such host.
    """
    if not address.needs_lookup:
        return [address]
    host, port = address.sockaddr[0], address.sockaddr[1]
    lookup, flags = gevent.socket.getaddrinfo, 0
    if isinstance(host, str) and "%" in host:
        lookup, flags = _plain_getaddrinfo, stdlib_socket.AI_NUMERICHOST
    found: list[Address] = []
    for family, _type, _proto, _name, sockaddr in lookup(host, port, address.family, stdlib_socket.SOCK_STREAM, 0, flags):
        one = Address(family, sockaddr, False)
        if family in (stdlib_socket.AF_INET, stdlib_socket.AF_INET6) and one not in found:
            found.append(one)
    if not found:
        raise stdlib_socket.gaierror(stdlib_socket.EAI_NONAME, f"no address is known for {host!r}")
    return found


def ipv6_works() -> bool:
    """Tell whether this machine lets us bind to IPv6."""
    if not stdlib_socket.has_ipv6:
        return False
    try:
        with _plain_socket(stdlib_socket.AF_INET6, stdlib_socket.SOCK_STREAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def shutdown_output(sock: Any) -> None:
    """Send a FIN; a peer that is gone already is no error."""
    try:
        sock.shutdown(stdlib_socket.SHUT_WR)
    except OSError:
        pass


def close(sock: Any, reader: Any, writer: Any, *, reset: bool = False) -> None:
    """Close a socket and its watchers: these first, for a descriptor must not be closed under one.

    Args:
        reset: send a reset instead of a FIN: what the kernel still holds is not sent.
    """
    if reset:
        try:
            sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass
    if type(sock) is not GeventSocket or sock._io_refs or sock._read_event is not reader:
        reader.stop()
        writer.stop()
        sock.close()
        return
    # What gevent's close() does; but it has to look for waiters, of whom there are none: connect-echo-close 1.05 times faster.
    reader.close()
    writer.close()
    sock._closed = True
    sock._read_event = sock._write_event = None
    sock._sock.close()


def wait_readable(sock: Any) -> None:
    """Wait, within the timeout of a gevent socket, until it is readable."""
    sock._wait(sock._read_event)


def wait_writable(sock: Any) -> None:
    """Wait, within the timeout of a gevent socket, until it is writable."""
    sock._wait(sock._write_event)


def has_files(sock: Any) -> bool:
    """Tell whether files made of a gevent socket by ``makefile()`` are open, until when it cannot be closed."""
    return bool(sock._io_refs > 0)


def abandon(sock: Any) -> None:
    """Close the descriptor of a socket whose hub will never run again, in a forked child; its watchers are left alone."""
    os.close(sock._sock.detach())


def local_sockaddr(sock: Any) -> Any:
    """Return the socket's own address, None if it has none (any more)."""
    try:
        return sock.getsockname()
    except OSError:
        return None


def remote_sockaddr(sock: Any) -> Any:
    """Return the peer's address, None if there is none (any more)."""
    try:
        return sock.getpeername()
    except OSError:
        return None


def _is_abstract(path: str | bytes) -> bool:
    return path[:1] in ("\0", b"\0")


def _remove_stale(path: Any) -> None:
    """Remove the socket file that a process left behind; one that somebody listens on is left alone."""
    try:
        if _is_abstract(path) or not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with _plain_socket(AF_UNIX, stdlib_socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        if probe.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)


def _with_port(sockaddr: Sockaddr, port: int) -> Any:
    return (sockaddr[0], port, *sockaddr[2:])


def _explained(error: OSError, address: Address) -> OSError:
    """Return the same kind of error with the address, and what to do, in its text."""
    hint = ""
    if error.errno == errno.EADDRINUSE:
        hint = "; another socket listens there: stop that program, choose another port, or let both share it with reuse_port=True"
        if address.family == AF_UNIX:
            hint = "; somebody listens there: stop that program or choose another path"
    elif error.errno == errno.EACCES and address.family != AF_UNIX:
        hint = "; ports below 1024 may need privileges"
    elif error.errno == errno.EADDRNOTAVAIL:
        hint = "; no interface of this machine has that address"
    reason = error.strerror or str(error)
    return OSError(error.errno, f"cannot listen on {format_address(address.sockaddr)}: {reason}{hint}")
