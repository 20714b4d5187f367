"""Callbacks that are counted: how long each takes, and how many there are in a second.

Streams without such limits are not slowed down by them: those with one cut their input chunk by chunk, and come by here for each.
"""

from typing import TYPE_CHECKING

from pants_green._buckets import TokenBucket
from pants_green._lifecycle import CLOSED
from pants_green._stream_state import INTERRUPTED

if TYPE_CHECKING:
    from pants_green.stream import Stream

__all__ = ["Counter"]


class Counter:
    """Sees every callback of a stream begin and end. It does not keep the stream, which keeps it.

    Attributes:
        running: the name of the callback that runs; None between them.
    """

    __slots__ = ("_bucket", "_told", "running")

    def __init__(self, stream: "Stream[...]") -> None:
        self._bucket: TokenBucket | None = None
        self._told = False
        self.running: str | None = None
        self.settle(stream)

    def settle(self, stream: "Stream[...]") -> None:
        """See what `chunk_rate` is, and `callback_timeout`, also for the callback that runs."""
        rate = stream._chunk_rate
        if rate is None:
            self._bucket = None
        elif self._bucket is None or self._bucket.rate != rate:
            self._bucket = TokenBucket(rate, stream._engine._clock())
        self.restart(stream)

    def begin(self, stream: "Stream[...]", name: str) -> None:
        """A callback begins."""
        self.running = name
        self.restart(stream)

    def restart(self, stream: "Stream[...]") -> None:
        """Give the callback that runs, if one does, its whole time from now on: it has just begun, or waited in something of ours."""
        if self.running is not None and stream._callback_timeout is not None:
            stream._limit("callback", stream._callback_timeout)
        elif stream._limits is not None:
            stream._limits.end("callback")

    def end(self, stream: "Stream[...]") -> None:
        """It has come to its end."""
        name, self.running = self.running, None
        limits = stream._limits
        if limits is not None:
            limits.end("callback")
            if stream._state is CLOSED:
                limits.cancel()
                stream._limits = None  # it holds the stream
        if self._bucket is not None and name == "on_read":
            self._bucket.take(1, stream._engine._clock())
            stream._attention = INTERRUPTED  # see to `pause`

    def pause(self, stream: "Stream[...]") -> bool:
        """Wait in the stream's own greenlet, for once, if there have been too many chunks; tell whether it did."""
        if self._bucket is None:
            return False
        delay = self._bucket.delay(stream._engine._clock())
        if not delay:
            return False
        if not self._told:
            self._told = True
            stream._tell_held_up("chunk_rate", "chunks")
        if stream._limits is not None:
            stream._limits.end("read")  # the delay is ours; if no whole chunk is left it begins anew
        timer = stream._engine._in_hub_after(delay, stream._alert)
        try:
            stream._wait()
        finally:
            timer.cancel()
        return True
