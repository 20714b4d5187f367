"""One budget for the output of all connections of a server: who takes the least is closed first."""

from typing import TYPE_CHECKING, Any

from pants_green._lifecycle import CloseReason
from pants_green.errors import StreamBufferOverflow

if TYPE_CHECKING:
    from pants_green.server import Server
    from pants_green.stream import Stream

__all__ = ["Budget"]

#: Seconds between two looks at the connections that do not take everything at once.
LOOK = 0.1


class Budget:
    """Sees to it that no more than so many bytes wait to be sent.

    Args:
        server: whose connections they are.
        size: bytes.
    """

    __slots__ = ("_looking", "_server", "_slow", "size")

    def __init__(self, server: "Server", size: int) -> None:
        self._server = server
        self.size = size
        self._slow: set[Stream[...]] = set()
        self._looking: Any = None

    def watch(self, stream: "Stream[...]") -> None:
        """A connection has not taken everything that was written to it: look at it as long as that is so."""
        self._slow.add(stream)
        if self._looking is None:
            self._looking = self._server._engine._loop.run_callback(self._look)

    def _look(self) -> None:
        """Hub: add up what waits, and close the slowest until it is no longer too much."""
        self._looking = None
        self._slow = {stream for stream in self._slow if stream._socket is not None and stream._pending}
        waiting = sum(stream._pending - stream._in_files for stream in self._slow)
        while waiting > self.size and self._slow:
            slowest = max(self._slow, key=lambda stream: stream._pending - stream._in_files)
            self._slow.discard(slowest)
            size = slowest._pending - slowest._in_files
            text = f"{waiting} bytes wait to be sent on {self._server!r}, {size} of them on {slowest!r}; write_budget is {self.size}"
            error = StreamBufferOverflow(text, waiting, self.size)
            slowest._keep_posted("on_overflow_error", error)
            slowest._shut(CloseReason.OVERFLOW, error)
            waiting -= size
        if self._slow:
            self._looking = self._server._engine._in_hub_after(LOOK, self._look)
