"""The other side of a connection: plain blocking sockets of the standard library, never gevent's.

A peer's calls run in real threads of gevent's pool, so the greenlet that makes one waits cooperatively while the hub
serves. That holds in a monkey-patched process too: the socket class is the original one.
"""

import socket as stdlib_socket
import struct
from collections.abc import Callable
from typing import Any

import gevent
from gevent import monkey

__all__ = ["ListeningPeer", "Peer", "in_new_thread", "in_thread"]

PlainSocket: Any = monkey.get_original("socket", "socket")
plain_lock: Any = monkey.get_original("_thread", "allocate_lock")
start_thread: Any = monkey.get_original("_thread", "start_new_thread")

#: Seconds for which one call of a peer may block.
TIMEOUT = 10.0


def _outcome(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, BaseException | None]:
    # The pool prints the traceback of what a function raises; the caller is to get it, and nobody else.
    try:
        return function(*args), None
    except BaseException as error:
        return None, error


def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Run `function` in a real thread and return what it returns, or raise what it raises; only this greenlet waits."""
    result, error = gevent.get_hub().threadpool.apply(_outcome, (function, args))
    if error is not None:
        raise error
    return result


def in_new_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Do the same in a thread of its own, which ends with it: that of an engine, say."""
    outcome: list[Any] = []
    done = plain_lock()
    done.acquire()

    def life() -> None:
        outcome.append(_outcome(function, args))
        done.release()

    start_thread(life, ())
    assert in_thread(done.acquire, True, 20)
    result, error = outcome.pop()
    if error is not None:
        raise error
    return result


def family_of(address: Any) -> int:
    """Return the address family that `address` belongs to."""
    if isinstance(address, (str, bytes)):
        return int(stdlib_socket.AF_UNIX)
    return int(stdlib_socket.AF_INET6 if len(address) == 4 or ":" in address[0] else stdlib_socket.AF_INET)


class Peer:
    """A connected plain socket whose calls block for 10 seconds at most, in a thread.

    Args:
        address: ``(host, port)``, an IPv6 4-tuple, the path of a Unix socket; or a listening server.
        rcvbuf: bytes of SO_RCVBUF, set before connecting (the kernel doubles it); None leaves the kernel's default.
        family: the address family, if `address` does not tell.

    Attributes:
        socket: the plain socket.
    """

    def __init__(self, address: Any, rcvbuf: int | None = None, family: int | None = None) -> None:
        address = getattr(address, "local_address", address)
        self._begin(PlainSocket(family_of(address) if family is None else family, stdlib_socket.SOCK_STREAM))
        try:
            if rcvbuf is not None:
                self.socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_RCVBUF, rcvbuf)
            self._run(self.socket.connect, address)
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(cls, sock: Any) -> "Peer":
        """Return a peer that stands on a connected plain socket."""
        peer = cls.__new__(cls)
        peer._begin(sock)
        return peer

    def _begin(self, sock: Any) -> None:
        sock.settimeout(TIMEOUT)
        if sock.family != stdlib_socket.AF_UNIX and sock.type == stdlib_socket.SOCK_STREAM:
            # Else each small segment waits for the acknowledgement of the one before, 40 ms.
            sock.setsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY, 1)
        self.socket = sock
        self._pending = b""
        self._calls = 0

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        self._calls += 1
        try:
            return in_thread(function, *args)
        finally:
            self._calls -= 1

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def address(self) -> Any:
        """This end's own address: what the server calls remote_address."""
        return self.socket.getsockname()

    def send(self, data: bytes) -> None:
        """Send all of `data`."""
        self._run(self.socket.sendall, data)

    def recv(self, size: int = 65536) -> bytes:
        """Return 1 to `size` bytes, as soon as there are any; b"" at the end."""
        if self._pending:
            data, self._pending = self._pending[:size], self._pending[size:]
            return data
        return bytes(self._run(self.socket.recv, size))

    def recv_exactly(self, size: int) -> bytes:
        """Return the next `size` bytes; AssertionError if the other side ends before."""
        while len(self._pending) < size:
            self._more(f"{size} bytes")
        data, self._pending = self._pending[:size], self._pending[size:]
        return data

    def recv_until(self, delimiter: bytes) -> bytes:
        """Return the bytes up to and with the next `delimiter`; AssertionError if the other side ends before."""
        while delimiter not in self._pending:
            self._more(repr(delimiter))
        end = self._pending.index(delimiter) + len(delimiter)
        data, self._pending = self._pending[:end], self._pending[end:]
        return data

    def recv_all(self) -> bytes:
        """Return everything up to the end."""
        data, self._pending = self._pending, b""
        return data + bytes(self._run(self._read_to_end))

    def at_eof(self) -> bool:
        """Tell whether the next thing that comes is the end (a FIN); anything else is kept for the next ``recv``."""
        if not self._pending:
            self._pending = bytes(self._run(self.socket.recv, 65536))
        return not self._pending

    def raises_reset(self) -> bool:
        """Tell whether the connection ends in a reset and not in a FIN; what comes before is thrown away."""
        self._pending = b""
        try:
            self._run(self._read_to_end)
        except ConnectionResetError:
            return True
        return False

    def shutdown_output(self) -> None:
        """Send a FIN; reading goes on."""
        self.socket.shutdown(stdlib_socket.SHUT_WR)

    def reset(self) -> None:
        """Close with a reset (RST)."""
        self.socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        """Close; repeated calls do nothing."""
        if self._calls and self.socket.fileno() >= 0:
            # A thread is blocked in a call, and would not notice that its descriptor is closed.
            try:
                self.socket.shutdown(stdlib_socket.SHUT_RDWR)
            except OSError:
                pass
        self.socket.close()

    def _more(self, wanted: str) -> None:
        data = self._run(self.socket.recv, 65536)
        if not data:
            raise AssertionError(f"the connection ended while the peer waited for {wanted}; before that came {self._pending!r}")
        self._pending += data

    def _read_to_end(self) -> bytes:
        pieces = []
        while data := self.socket.recv(1 << 18):
            pieces.append(data)
        return b"".join(pieces)


class ListeningPeer:
    """A listening plain socket, for tests of clients.

    Args:
        address: what to bind to; port 0 by default.
        backlog: how many connections may wait.
        rcvbuf: bytes of SO_RCVBUF that accepted sockets inherit; None leaves the kernel's default.

    Attributes:
        address: what it is bound to.
    """

    def __init__(self, address: Any = ("127.0.0.1", 0), backlog: int = 16, rcvbuf: int | None = None) -> None:
        self.socket = PlainSocket(family_of(address), stdlib_socket.SOCK_STREAM)
        try:
            self.socket.settimeout(TIMEOUT)
            if rcvbuf is not None:
                self.socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_RCVBUF, rcvbuf)
            self.socket.bind(address)
            self.socket.listen(backlog)
        except BaseException:
            self.socket.close()
            raise
        self.address = self.socket.getsockname()

    def __enter__(self) -> "ListeningPeer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def accept(self) -> Peer:
        """Wait for the next connection and return its peer."""
        # Not accept(): in a patched process that would make a gevent socket.
        descriptor, _ = in_thread(self.socket._accept)
        return Peer.of(PlainSocket(fileno=descriptor))

    def close(self) -> None:
        """Stop listening."""
        self.socket.close()
