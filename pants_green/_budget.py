"""One budget for the output of all connections of a server: who has left most of it waiting is closed first."""

import weakref
from collections.abc import Iterable
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
    """

    __slots__ = ("_looking", "_server_ref", "_slow")

    def __init__(self, server: "Server") -> None:
        self._server_ref = weakref.ref(server)  # which has this
        self._slow: set[Stream[...]] = set()
        self._looking: Any = None

    def watch(self, streams: "Iterable[Stream[...]]") -> None:
        """These have not taken everything that was written to them: look at each as long as that is so."""
        self._slow.update(streams)
        server = self._server_ref()
        if self._looking is None and self._slow and server is not None:
            self._looking = server._engine._loop.run_callback(self._look)

    def _look(self) -> None:
        """Hub: add up what waits, and close the one with most of it until it is no longer too much."""
        self._looking = None
        server = self._server_ref()
        size = None if server is None else server._write_budget
        if server is None or size is None:
            self._slow.clear()
            return
        waiting = {stream: _in_memory(stream) for stream in self._slow if stream._socket is not None and stream._pending}
        self._slow = set(waiting)
        total = sum(waiting.values())
        if total > size:
            for stream in sorted(waiting, key=waiting.__getitem__, reverse=True):
                self._close(stream, waiting[stream], total, size)
                total -= waiting[stream]
                if total <= size:
                    break
        if self._slow:
            self._looking = server._engine._in_hub_after(LOOK, self._look)

    def _close(self, stream: "Stream[...]", own: int, total: int, size: int) -> None:
        self._slow.discard(stream)
        text = f"{total} bytes wait to be sent on {self._server_ref()!r}, {own} of them on {stream!r}; write_budget is {size}"
        error = StreamBufferOverflow(text, total, size, "write_budget")
        stream._keep_posted("on_overflow_error", error)
        stream._shut(CloseReason.OVERFLOW, error)


def _in_memory(stream: "Stream[...]") -> int:
    """Return the bytes that wait to be sent, without those that are in files."""
    return stream._pending - stream._in_files
