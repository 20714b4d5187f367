"""What stands between a stream and its socket where somebody counts: when something last came or went, and how fast it comes.

Streams without such limits have nothing of the kind in between.
"""

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pants_green._buckets import TokenBucket
from pants_green._sockets import Ports

if TYPE_CHECKING:
    from pants_green.stream import Stream

__all__ = ["Meter"]


class Meter:
    """Leads to the ports of a socket, and is the read watcher among those that it offers instead.

    As that it knows when the stream waits for input, and makes it wait until there may be some: first for the time, then for the
    socket.

    Args:
        stream: the stream.
        raw: the ports of its socket.

    Attributes:
        raw: as above.
        active: when something was last sent, or waiting for input last began, by the engine's clock.
        listening: whether something that comes would be noticed at once.
    """

    __slots__ = (
        "_bucket",
        "_clock",
        "_engine",
        "_left",
        "_reader",
        "_recv",
        "_send",
        "_stream",
        "_timer",
        "_told",
        "active",
        "listening",
        "raw",
    )

    def __init__(self, stream: "Stream[...]", raw: Ports) -> None:
        self._stream = weakref.ref(stream)  # which has this
        self._engine = stream._engine
        self._clock = stream._engine._clock
        self.raw = raw
        self._recv, self._send, self._reader, _ = raw
        self._bucket: TokenBucket | None = None
        self._timer: Any = None
        #: While the peer is held up: seconds that its chunk has left, if that has a limit.
        self._left: float | None = None
        self.active = self._clock()
        self.listening = False
        self._told = False
        self.settle(stream._read_rate)

    def ports(self) -> Ports:
        """Return what the stream, or its TLS, is to use instead; not kept here, which would be a circle."""
        return self._receive, self._transmit, self, self.raw[3]

    def settle(self, rate: float | None) -> None:
        """Let so many bytes through per second from now on; None: all that come."""
        if rate is None:
            self._bucket = None
        elif self._bucket is None or self._bucket.rate != rate:
            self._bucket = TokenBucket(rate, self._clock())

    def touch(self) -> None:
        """Something is done, or was."""
        self.active = self._clock()

    def _receive(self, size: int) -> bytes:
        bucket = self._bucket
        if bucket is None:
            return self._recv(size)
        now = self._clock()
        if bucket.delay(now):
            raise BlockingIOError
        data = self._recv(min(size, bucket.available(now)))
        bucket.take(len(data), now)
        return data

    def _transmit(self, data: bytes | memoryview) -> int:
        sent = self._send(data)
        self.active = self._clock()
        return sent

    # ---- the read watcher

    def start(self, callback: Callable[..., Any], *args: Any) -> None:
        """Call `callback` when there is something that may be received."""
        delay = 0.0 if self._bucket is None else self._bucket.delay(self._clock())
        if delay:
            self._timer = self._engine._in_hub_after(delay, self._listen_late, callback, *args)
            self._hold_up()
        else:
            self._listen(callback, *args)

    def _hold_up(self) -> None:
        """The peer is held up: the time of its chunk stands still. Have that said, once, but not here, for a log handler may wait."""
        stream = self._stream()
        if stream is None:
            return
        if stream._limits is not None:
            self._left = stream._limits.hold("read")
        if not self._told:
            self._told = True
            stream._post("_tell_held_up", "read_rate", "bytes")

    def _listen_late(self, callback: Callable[..., Any], *args: Any) -> None:
        """Hub: the peer is held up no more."""
        self._listen(callback, *args)
        self._hold_up_no_more()

    def _hold_up_no_more(self) -> None:
        """The time of the chunk goes on, unless it has begun anew meanwhile."""
        left, self._left = self._left, None
        stream = self._stream()
        if left is None or stream is None or stream._limits is None or not stream._state.connected:
            return
        if stream._read_timeout is not None and not stream._limits.runs("read"):
            stream._limit("read", left)

    def _listen(self, callback: Callable[..., Any], *args: Any) -> None:
        self._timer = None
        self.active = self._clock()
        self.listening = True
        self._reader.start(callback, *args)

    def stop(self) -> None:
        """Do so no more."""
        self.listening = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._hold_up_no_more()
        self._reader.stop()
