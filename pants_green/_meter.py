"""What stands between a stream and its socket where somebody counts: when something last came or went, and how fast it comes.

Streams without such limits have nothing of the kind in between.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pants_green._buckets import TokenBucket
from pants_green._sockets import Ports

if TYPE_CHECKING:
    from pants_green.stream import Stream

__all__ = ["Meter"]


class Meter:
    """Ports of a stream that lead to those of its socket.

    Args:
        stream: the stream.
        ports: those of its socket.

    Attributes:
        ports: what the stream, or its TLS, is to use instead.
        active: when something was last received or sent, by the engine's clock.
    """

    __slots__ = ("_clock", "_recv", "_send", "_stream", "active", "bucket", "ports")

    def __init__(self, stream: "Stream[...]", ports: Ports) -> None:
        self._stream = stream
        self._clock = stream._engine._clock
        self.active = self._clock()
        self._recv, self._send, reader, writer = ports
        self.bucket: TokenBucket | None = None
        self.ports: Ports = (self._receive, self._transmit, PacedReader(self, stream._engine, reader), writer)
        self.settle()

    def settle(self) -> None:
        """See what `read_rate` is."""
        rate = self._stream._read_rate
        if rate is None:
            self.bucket = None
        elif self.bucket is None or self.bucket.rate != rate:
            self.bucket = TokenBucket(rate, self._clock())

    def delay(self) -> float:
        """Return the seconds until something may be received."""
        return 0.0 if self.bucket is None else self.bucket.delay(self._clock())

    def _receive(self, size: int) -> bytes:
        now = self._clock()
        bucket = self.bucket
        if bucket is not None:
            if bucket.delay(now):
                raise BlockingIOError
            size = min(size, bucket.available(now))
        data = self._recv(size)
        self.active = now
        if bucket is not None:
            bucket.take(len(data), now)
        return data

    def _transmit(self, data: bytes | memoryview) -> int:
        sent = self._send(data)
        self.active = self._clock()
        return sent


class PacedReader:
    """Stands in the place of a read watcher, and waits for the time when something may be received before it waits for the socket."""

    __slots__ = ("_engine", "_meter", "_raw", "_timer")

    def __init__(self, meter: Meter, engine: Any, raw: Any) -> None:
        self._meter = meter
        self._engine = engine
        self._raw = raw
        self._timer: Any = None

    def start(self, callback: Callable[..., Any], *args: Any) -> None:
        """Call `callback` when there is something that may be received."""
        delay = self._meter.delay()
        if delay:
            self._timer = self._engine._in_hub_after(delay, self._start_raw, callback, *args)
        else:
            self._raw.start(callback, *args)

    def _start_raw(self, callback: Callable[..., Any], *args: Any) -> None:
        self._timer = None
        self._raw.start(callback, *args)

    def stop(self) -> None:
        """Do so no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._raw.stop()
