"""Streams that are joined in memory: the seam under a Stream, without a socket or a descriptor.

A stream touches the world through ``recv``, ``send``, two watchers, and a few calls of its socket. Here these speak to a
``_Flow``, one direction of a connection.
"""

import errno
import os
import socket as stdlib_socket
import struct
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any, overload

import gevent
from gevent.event import Event

from pants_green._lifecycle import NEW
from pants_green.errors import ChannelStateError
from pants_green.stream import Stream

__all__ = ["MemoryEnd", "memory_pair"]

#: Bytes that may be on their way in one direction.
CAPACITY = 64 * 1024

_numbers = count(1)


@overload
def memory_pair(left: Any, right: None = None, *, capacity: int = CAPACITY) -> "tuple[Any, MemoryEnd]": ...
@overload
def memory_pair(left: Any, right: Any, *, capacity: int = CAPACITY) -> tuple[Any, Any]: ...
def memory_pair(left: Any, right: Any = None, *, capacity: int = CAPACITY) -> tuple[Any, Any]:
    """Connect two streams, or a stream and the test, without an operating system's socket.

    All callbacks run as with real sockets, in the streams' own greenlets, as soon as the hub runs. A receive returns what
    one send took, or part of it, and never joins two: so a test decides how the bytes are cut.

    Args:
        left, right: Streams that were never connected, or classes of them, which are called without arguments. Without
            `right`, that end is a MemoryEnd, which the test moves by hand.
        capacity: bytes that may be on their way in each direction; a send takes no more, and none blocks.

    Returns:
        both streams; or the stream and the MemoryEnd.

    Raises:
        ChannelStateError: (RuntimeError) a stream has been used already.
        TypeError, ValueError: an argument makes no sense.
    """
    if isinstance(capacity, bool) or not isinstance(capacity, int):
        raise TypeError(f"capacity is a number of bytes, an int, not {capacity!r}")
    if capacity < 1:
        raise ValueError(f"capacity is a number of bytes and at least 1, not {capacity}")
    streams = [_fresh_stream(one) for one in (left, right) if one is not None]
    to_right, to_left = _Flow(capacity), _Flow(capacity)
    names = ("memory", next(_numbers)), ("memory", next(_numbers))
    _join(streams[0], _Socket(to_left, to_right, *names))
    if right is None:
        return streams[0], MemoryEnd(to_right, to_left)
    _join(streams[1], _Socket(to_right, to_left, *reversed(names)))
    return streams[0], streams[1]


class MemoryEnd:
    """The end of a memory pair that a test moves by hand. Nothing here waits but ``wait_for``."""

    def __init__(self, incoming: "_Flow", outgoing: "_Flow") -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._received: list[bytes] = []
        self._changed = Event()
        incoming.on_change = self._changed.set
        outgoing.on_change = self._changed.set

    def send(self, data: bytes) -> None:
        """Put `data` on its way to the stream, all of it, whatever the capacity. It arrives in one receive if that is large enough.

        Raises:
            BrokenPipeError: the stream has closed its socket, or this end has ended its output.
            ConnectionResetError: the stream has aborted.
        """
        self._outgoing.check_writable()
        if data:
            self._outgoing.put(bytes(data))

    def received(self) -> bytes:
        """Take in what the stream has sent, which makes room for more; return all that it has sent so far."""
        while self._incoming.pieces:
            self._received.append(self._incoming.take(self._incoming.size))
        return b"".join(self._received)

    @property
    def at_eof(self) -> bool:
        """Whether the stream has ended its output (a FIN) and everything before it has been taken in."""
        return self._incoming.ended and not self._incoming.pieces

    @property
    def was_reset(self) -> bool:
        """Whether the stream has aborted."""
        return self._incoming.broken

    @property
    def all_taken(self) -> bool:
        """Whether the stream has received everything that was sent to it."""
        return not self._outgoing.pieces

    def wait_for(self, condition: Any = None, timeout: float = 5.0) -> bytes:
        """Wait, cooperatively, until `condition` holds; looked at whenever bytes, a FIN or a reset moved in either direction.

        Args:
            condition: an int, how many bytes `received` is to have at least; or a function without arguments. None waits for
                the end, by FIN or reset.
            timeout: seconds until AssertionError.

        Returns:
            what `received` returns then.
        """
        if condition is None:
            met: Callable[[], Any] = lambda: self.at_eof or self.was_reset  # noqa: E731
        elif callable(condition):
            met = condition
        else:
            met = lambda: sum(map(len, self._received)) >= condition  # noqa: E731
        with gevent.Timeout(timeout, False):
            while True:
                self._changed.clear()
                received = self.received()
                if met():
                    return received
                self._changed.wait()
        raise AssertionError(f"waited {timeout:g} seconds in vain; received so far: {self.received()!r}")

    def shutdown_output(self) -> None:
        """End this end's output, as a FIN does."""
        self._outgoing.end()

    def close(self) -> None:
        """Close this end: the stream reads the end, and what it sends from now on fails with EPIPE."""
        self._outgoing.end()
        self._incoming.abandon()

    def reset(self) -> None:
        """Break the connection off, as a reset does."""
        self._outgoing.break_off()
        self._incoming.break_off()


class _Flow:
    """One direction: the bytes on their way, and how it ended."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.pieces: deque[bytes] = deque()
        self.size = 0
        self.ended = False  # a FIN follows the pieces
        self.broken = False  # a reset follows the pieces
        self.abandoned = False  # nobody reads any more
        self.reader: _Watcher | None = None
        self.writer: _Watcher | None = None
        self.on_change: Callable[[], object] = bool

    def readable(self) -> bool:
        return bool(self.pieces) or self.ended or self.broken

    def writable(self) -> bool:
        return self.size < self.capacity or self.broken or self.abandoned

    def check_writable(self) -> None:
        if self.broken:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        if self.abandoned or self.ended:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def put(self, data: bytes) -> None:
        self.pieces.append(data)
        self.size += len(data)
        self._changed()

    def take(self, size: int) -> bytes:
        piece = self.pieces.popleft()
        if len(piece) > size:
            self.pieces.appendleft(piece[size:])
            piece = piece[:size]
        self.size -= len(piece)
        self._changed()
        return piece

    def end(self) -> None:
        self.ended = True
        self._changed()

    def break_off(self) -> None:
        self.broken = True
        self._changed()

    def abandon(self) -> None:
        self.abandoned = True
        self.pieces.clear()
        self.size = 0
        self._changed()

    def _changed(self) -> None:
        for watcher in (self.reader, self.writer):
            if watcher is not None:
                watcher.look()
        self.on_change()


class _Watcher:
    """Calls back in the hub, once per turn, while it is started and its side is ready; as gevent's io watchers do."""

    def __init__(self, ready: Callable[[], bool]) -> None:
        self._loop = gevent.get_hub().loop
        self._ready = ready
        self._callback: Callable[..., object] | None = None
        self._args: tuple[Any, ...] = ()
        self._pending: Any = None

    @property
    def active(self) -> bool:
        return self._callback is not None

    def start(self, callback: Callable[..., object], *args: Any) -> None:
        self._callback = callback
        self._args = args
        self.look()

    def stop(self) -> None:
        self._callback = None
        self._args = ()
        if self._pending is not None:
            self._pending.stop()
            self._pending = None

    close = stop

    def look(self) -> None:
        if self._callback is not None and self._pending is None and self._ready():
            self._pending = self._loop.run_callback(self._fire)

    def _fire(self) -> None:
        self._pending = None
        callback = self._callback
        if callback is None or not self._ready():
            return
        try:
            callback(*self._args)
        finally:
            self.look()


class _Socket:
    """What a Stream asks of a socket."""

    family = stdlib_socket.AF_INET
    type = stdlib_socket.SOCK_STREAM
    proto = 0

    def __init__(self, incoming: _Flow, outgoing: _Flow, own_name: Any, other_name: Any) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._own_name = own_name
        self._other_name = other_name
        self._closed = False
        self._resets = False
        self.reader = incoming.reader = _Watcher(incoming.readable)
        self.writer = outgoing.writer = _Watcher(outgoing.writable)

    def recv(self, size: int) -> bytes:
        self._check_open()
        flow = self._incoming
        if flow.pieces:
            return flow.take(size)
        if flow.broken:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        if flow.ended:
            return b""
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def send(self, data: Any) -> int:
        self._check_open()
        flow = self._outgoing
        flow.check_writable()
        room = flow.capacity - flow.size
        if room <= 0:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        taken = bytes(memoryview(data)[:room])
        if taken:
            flow.put(taken)
        return len(taken)

    def shutdown(self, how: int) -> None:
        self._check_open()
        if how in (stdlib_socket.SHUT_WR, stdlib_socket.SHUT_RDWR):
            self._outgoing.end()
        if how in (stdlib_socket.SHUT_RD, stdlib_socket.SHUT_RDWR):
            self._incoming.end()

    def setsockopt(self, level: int, option: int, value: Any) -> None:
        self._check_open()
        if (level, option) == (stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER):
            self._resets = struct.unpack("ii", value) == (1, 0)

    def getsockname(self) -> Any:
        self._check_open()
        return self._own_name

    def getpeername(self) -> Any:
        self._check_open()
        return self._other_name

    def fileno(self) -> int:
        """There is no descriptor; but no other memory socket has this number."""
        return -1 - int(self._own_name[1])

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.reader.stop()
        self.writer.stop()
        if self._resets:
            self._outgoing.break_off()
            self._incoming.break_off()
        else:
            self._outgoing.end()
        self._incoming.abandon()

    def _check_open(self) -> None:
        if self._closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def _fresh_stream(given: Any) -> Stream:
    stream = given() if isinstance(given, type) else given
    if not isinstance(stream, Stream):
        raise TypeError(f"memory_pair() joins Streams, or classes of them, not {given!r}")
    if stream._state is not NEW or stream._socket is not None:
        raise ChannelStateError(f"memory_pair() on {stream!r}: it has been used already; give a new {type(stream).__name__}")
    return stream


def _join(stream: Stream, sock: _Socket) -> None:
    """Put a stream on a memory socket: what ``Stream(socket=...)`` does for one that was made elsewhere."""
    stream._remote = sock.getpeername()
    stream._local = sock.getsockname()
    stream._start(sock)
    stream._use(sock, (sock.recv, sock.send, sock.reader, sock.writer))
