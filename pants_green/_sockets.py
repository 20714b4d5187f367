"""The door to gevent's sockets: making, binding, dialling, accepting, looking up, and what their errors mean.

The private parts of a gevent socket that the hot path needs are touched here and nowhere else: the C socket under it
(``_sock``) and its two watchers (``_read_event``, ``_write_event``). Nothing here waits, but for what looks names up, and for
``wait_readable`` and ``wait_writable``.
"""

import errno
import os
import select
import socket as stdlib_socket
import struct
import sys
from collections.abc import Callable
from typing import Any

import gevent
import gevent.exceptions
import gevent.socket
from gevent import monkey

from pants_green._address import AF_UNIX, Address, Sockaddr, format_address
from pants_green._socket_file import Permissions, SocketFile, bind_file

__all__ = [
    "ACCEPT_AGAIN",
    "EXHAUSTED",
    "PEER_LEFT",
    "ConcurrentUse",
    "GeventSocket",
    "Listener",
    "PlainSocket",
    "Ports",
    "abandon",
    "close",
    "connect_at_once",
    "descriptor_of",
    "dial",
    "dial_result",
    "explained",
    "has_files",
    "in_progress",
    "ipv6_works",
    "is_of_this_thread",
    "listen",
    "listen_all",
    "local_sockaddr",
    "look_up",
    "most_descriptors",
    "packet_ports_of",
    "peer_credentials",
    "ports_of",
    "remote_sockaddr",
    "resolve",
    "set_tcp_defaults",
    "shutdown_output",
    "take_over",
    "wait_readable",
    "wait_writable",
    "was_connected",
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

#: How to ask for a Unix socket's peer, which is Linux' own way, and the uid of one that is not connected.
SO_PEERCRED: int | None = getattr(stdlib_socket, "SO_PEERCRED", None)
NOBODY_KNOWN = 0xFFFFFFFF

#: How to have no source port chosen before it is known who is dialled, which is Linux' own way.
IP_BIND_ADDRESS_NO_PORT: int | None = getattr(stdlib_socket, "IP_BIND_ADDRESS_NO_PORT", None)

#: How often a free port is looked for that several listeners can share.
SHARED_PORT_TRIES = 20

#: gevent's socket class, for isinstance.
GeventSocket = gevent.socket.socket

#: What gevent raises if two greenlets wait for the same thing.
ConcurrentUse: type[Exception] = gevent.exceptions.ConcurrentObjectUseError

#: The C-level class under it.
BareSocket: Any = GeventSocket._gevent_sock_class

#: The base of that, and of the standard library's own.
PlainSocket: Any = BareSocket.__base__

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
_plain_poll: Any = monkey.get_original("select", "poll") if hasattr(select, "poll") else None  # gevent's waits for the hub


#: What a stream needs of its socket between receives and sends: ``recv(size) -> bytes`` and ``send(data) -> int``, which
#: raise BlockingIOError if there is nothing to do, and two watchers with ``start(callback, *args)`` and ``stop()``.
Ports = tuple[Callable[[int], bytes], Callable[[bytes | memoryview], int], Any, Any]


def ports_of(sock: Any) -> Ports:
    """Return the C-level methods and the watchers of a gevent socket."""
    # Measured against the socket's own recv and send: work per CPU second 1.16 in ping-pong, 1.6 in bulk.
    bare = sock._sock
    return bare.recv, bare.send, sock._read_event, sock._write_event


def is_of_this_thread(sock: Any) -> bool:
    """Tell whether it is a gevent socket whose watchers belong to this thread's hub: those of another would never fire here."""
    return isinstance(sock, GeventSocket) and sock.hub is gevent.get_hub()


def take_over(sock: Any) -> Any:
    """Return a gevent socket of this thread on the descriptor of another socket, which is of no use any more."""
    family, kind, proto = sock.family, sock.type, sock.proto
    foreign = isinstance(sock, GeventSocket) and not is_of_this_thread(sock)
    # What gevent's own detach() does about the watchers is for the thread of their hub to do.
    return GeventSocket(family, kind, proto, sock._sock.detach() if foreign else sock.detach())


def descriptor_of(sock: Any) -> int | None:
    """Return the descriptor of a gevent socket; None for what stands for one in tests."""
    return int(sock.fileno()) if isinstance(sock, GeventSocket) else None


def packet_ports_of(sock: Any) -> tuple[Callable[..., Any], Callable[..., Any], Any, Any]:
    """Return the C-level recvfrom and sendto, and the watchers, of a gevent socket."""
    bare = sock._sock
    receive = _receive_whole(bare) if sock.family == AF_UNIX and sys.platform == "linux" else bare.recvfrom
    return receive, bare.sendto, sock._read_event, sock._write_event


def _receive_whole(bare: Any) -> Callable[[int], tuple[bytes, Any]]:
    """Return a ``recvfrom()`` for packets of any size: the kernel is asked for that of the next one.

    *Source*: recv(2), MSG_TRUNC, which tells the size of a packet whatever the size of the buffer.
    """
    peek, recvfrom = bare.recv_into, bare.recvfrom
    nowhere, flags = bytearray(1), stdlib_socket.MSG_PEEK | stdlib_socket.MSG_TRUNC
    return lambda _: recvfrom(peek(nowhere, 1, flags) or 1)


def connect_at_once(sock: Any, sockaddr: Sockaddr) -> int:
    """Begin to connect; never waits, as gevent's own would. Return 0 if that is done, else the errno."""
    code: int = sock._sock.connect_ex(sockaddr)
    return 0 if code == errno.EISCONN else code


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

    Args:
        sock: the gevent socket; it listens.
        file: that of a Unix socket, if it is to be removed when this is closed.
    """

    __slots__ = ("_accept", "_file", "_proto", "family", "local", "sockaddr", "socket")

    def __init__(self, sock: Any, file: SocketFile | None = None) -> None:
        self.socket = sock
        self._file = file
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
        """Stop listening; the file of a Unix socket is removed, by the process that made it."""
        try:
            if self._file is not None:
                self._file.remove()
        finally:
            self.socket.close()


def listen(
    address: Address, backlog: int, *, reuse_port: bool = False, permissions: Permissions | None = None, given: Any = None
) -> Listener:
    """Bind to one address and listen.

    Accepted sockets inherit TCP_NODELAY and keepalive from it, which saves two calls for each.

    Args:
        permissions: of the file of a Unix socket.
        given: a socket to take instead of a new one; it stays open if this raises.

    Raises:
        OSError: with the errno of the call that failed and the address in its text.
    """
    family, sockaddr = address.family, address.sockaddr
    file = None
    try:
        sock = gevent.socket.socket(family, stdlib_socket.SOCK_STREAM) if given is None else given
        try:
            if family == AF_UNIX:
                file = bind_file(sock, sockaddr, permissions)
            else:
                sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEADDR, 1)
                if reuse_port:
                    sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEPORT, 1)
                if family == stdlib_socket.AF_INET6:
                    sock.setsockopt(stdlib_socket.IPPROTO_IPV6, stdlib_socket.IPV6_V6ONLY, 1)
                set_tcp_defaults(sock)
                sock.bind(sockaddr)
            sock.listen(backlog)
            return Listener(sock, file)
        except BaseException:
            if file is not None:
                file.remove()
            if given is None:
                sock.close()
            raise
    except OSError as error:
        raise explained(error, address) from error


def listen_all(
    addresses: list[Address],
    backlog: int,
    *,
    reuse_port: bool = False,
    permissions: Permissions | None = None,
    given: Any = None,
) -> list[Listener]:
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
                made.append(listen(address, backlog, reuse_port=reuse_port, permissions=permissions, given=given))
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


def dial(address: Address, source: Address | None = None, given: Any = None) -> tuple[Any, int]:
    """Make a socket and begin to connect it.

    Args:
        source: what to bind to before.
        given: a socket to take instead of a new one; it stays open if this raises.

    Returns:
        the gevent socket, and 0 if it is connected already, else the errno; see `dial_result`.

    Raises:
        OSError: no socket could be made, or not be bound to `source`.
    """
    sock = gevent.socket.socket(address.family, stdlib_socket.SOCK_STREAM) if given is None else given
    try:
        if address.family != AF_UNIX:
            set_tcp_defaults(sock)
            if source is not None:
                _bind_source(sock, source)
        return sock, connect_at_once(sock, address.sockaddr)
    except BaseException as error:
        if given is None:
            sock.close()
        if isinstance(error, OSError) and error.errno is None:  # Python itself looks how long a path is
            raise OSError(errno.ENAMETOOLONG, str(error)) from error
        raise


def in_progress(code: int) -> bool:
    """Tell whether the errno of `dial`, or of `dial_result`, means: wait until the socket is writable."""
    return code in IN_PROGRESS


def _bind_source(sock: Any, source: Address) -> None:
    """Choose where a dial comes from."""
    host, port = source.sockaddr[0], source.sockaddr[1]
    if port:
        # Else nobody could be dialled from there for a minute after it was closed here, nor a second one meanwhile.
        sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEADDR, 1)
    elif not host:
        return
    elif IP_BIND_ADDRESS_NO_PORT is not None:
        # The kernel would choose a port that it uses for nobody else: 28,000 connections, and there are none left. This way
        # there are as many for each address that is dialled. Source: ip(7).
        try:
            sock.setsockopt(stdlib_socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        except OSError:
            pass  # an older kernel
    try:
        sock.bind(source.sockaddr)
    except OSError as error:
        hints = {errno.EADDRNOTAVAIL: ", which is no address of this machine", errno.EINVAL: "; the given socket is bound already"}
        hint = hints.get(error.errno or 0, "")
        raise OSError(error.errno, f"{error.strerror}: source_address {format_address(source.sockaddr)}{hint}") from error


def dial_result(sock: Any) -> tuple[int, Any]:
    """Return how a dial ended: 0 or an errno, see `in_progress`; and, if it is 0, the socket's own address."""
    peer = remote_sockaddr(sock)
    if peer is None:
        return sock.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_ERROR) or errno.EINPROGRESS, None
    local = local_sockaddr(sock)
    if peer == local and sock.family != AF_UNIX:
        # Dialling a local port that nobody listens on can meet itself when the kernel picks that very port as source.
        return errno.ECONNREFUSED, None
    return 0, local


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


def look_up(function: str, *args: Any) -> Any:
    """Call ``gethostbyname``, ``gethostbyname_ex``, ``gethostbyaddr`` or ``getaddrinfo`` of ``gevent.socket``.

    Only the calling greenlet waits.

    Raises:
        OSError: (socket.gaierror, socket.herror) nothing was found.
    """
    return getattr(gevent.socket, function)(*args)


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


def most_descriptors() -> int:
    """Return how many descriptors this process may have; 0 or less if nobody can tell."""
    return os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else 0


def peer_credentials(sock: Any) -> tuple[int, int, int] | None:
    """Return pid, uid and gid of a Unix socket's peer, None if the kernel does not know them.

    *Source*: unix(7), SO_PEERCRED.
    """
    if SO_PEERCRED is None or not isinstance(sock, GeventSocket):
        return None  # what stands for a socket in tests has no peer
    try:
        pid, uid, gid = struct.unpack("iII", sock.getsockopt(stdlib_socket.SOL_SOCKET, SO_PEERCRED, 12))
    except OSError:
        return None
    return None if uid == NOBODY_KNOWN else (pid, uid, gid)


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


def was_connected(sock: Any) -> bool:
    """Tell whether a stream socket that has no peer had one: it was reset, and there is that, and what came before, to be read."""
    if _plain_poll is None:
        return False
    poll = _plain_poll()
    poll.register(sock.fileno(), select.POLLIN)
    # One that was never connected hangs up, too, but has nothing to be read, not even an end.
    return any(events & select.POLLIN for _, events in poll.poll(0))


def _with_port(sockaddr: Sockaddr, port: int) -> Any:
    return (sockaddr[0], port, *sockaddr[2:])


def explained(error: OSError, address: Address) -> OSError:
    """Return the same kind of error with the address, and what to do, in its text."""
    hint = ""
    if address.family == AF_UNIX:
        pass  # `bind_file` says it
    elif error.errno == errno.EADDRINUSE:
        hint = "; another socket listens there: stop that program, choose another port, or let both share it with reuse_port=True"
    elif error.errno == errno.EACCES:
        hint = "; ports below 1024 may need privileges"
    elif error.errno == errno.EADDRNOTAVAIL:
        hint = "; no interface of this machine has that address"
    reason = error.strerror or str(error)
    return OSError(error.errno, f"cannot listen on {format_address(address.sockaddr)}: {reason}{hint}")
