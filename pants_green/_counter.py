"""Callbacks that are counted: how long each takes, and how many there are in a second.

Streams without such limits are not slowed down by them: these cut their input chunk by chunk, and come by here for each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pants_green._buckets import TokenBucket
from pants_green._stream_state import INTERRUPTED

if TYPE_CHECKING:
    from pants_green.stream import Stream

__all__ = ["Counter"]


class Counter:
    """Sees every callback of a stream begin and end.

    Args:
        stream: the stream.

    Attributes:
        running: the name of the callback that runs; None between them.
    """

    __slots__ = ("_bucket", "_stream", "_timer", "running")

    def __init__(self, stream: "Stream[...]") -> None:
        self._stream = stream
        self._bucket: TokenBucket | None = None
        self._timer: Any = None
        self.running: str | None = None
        self.settle()

    def settle(self) -> None:
        """See what `chunk_rate` is."""
        rate = self._stream._chunk_rate
        if rate is None:
            self._bucket = None
        elif self._bucket is None or self._bucket.rate != rate:
            self._bucket = TokenBucket(rate, self._stream._engine._clock())

    @contextmanager
    def callback(self, name: str) -> Iterator[None]:
        """Run a callback inside of this."""
        stream = self._stream
        before = self.running
        self.running = name
        if stream._callback_timeout is not None and before is None:
            stream._limit("callback", stream._callback_timeout)
        try:
            yield
        finally:
            self.running = before
            if before is None and stream._limits is not None:
                stream._limits.end("callback")
            if name == "on_read" and self._bucket is not None:
                self._bucket.take(1, stream._engine._clock())
                stream._attention = INTERRUPTED  # see to `pause`

    def pause(self) -> bool:
        """Wait in the stream's own greenlet, for once, if there have been too many chunks; tell whether it did."""
        if self._bucket is None:
            return False
        stream = self._stream
        delay = self._bucket.delay(stream._engine._clock())
        if not delay:
            return False
        timer = stream._engine._in_hub_after(delay, stream._alert)
        try:
            stream._wait()
        finally:
            timer.cancel()
        return True
