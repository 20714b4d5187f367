"""The timer heap; pure: the caller passes in "now" and runs what is due."""

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Any

__all__ = ["Timer", "TimerHeap", "next_beat"]

#: Cancelled timers are swept out once there are more than this many, and more than live ones.
SWEEP_AT = 64


class Timer:
    """The handle of something to be run later: call it, or its ``cancel()``, and it will not run again.

    Attributes:
        function: what is run; None once cancelled or done.
        args, kwargs: what it is run with.
        when: seconds on the engine's clock at which it is due.
        interval: seconds between two runs of a cycle, None for a single run.
    """

    __slots__ = ("args", "context", "function", "heap", "interval", "kwargs", "when")

    def __init__(
        self,
        function: Callable[..., object],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        when: float = 0.0,
        interval: float | None = None,
        context: Any = None,
    ) -> None:
        self.function: Callable[..., object] | None = function
        self.args = args
        self.kwargs = kwargs or {}
        self.when = when
        self.interval = interval
        self.context = context
        self.heap: TimerHeap | None = None

    @property
    def cancelled(self) -> bool:
        """Whether it will never run (again)."""
        return self.function is None

    def cancel(self) -> None:
        """Make sure that it does not run (again); harmless if it has run or was cancelled before."""
        if self.function is not None:
            self.function = None
            self.args = ()
            self.kwargs = {}
            self.context = None
            if self.heap is not None:
                self.heap.forget(self)

    __call__ = cancel

    def __repr__(self) -> str:
        if self.function is None:
            return f"<{type(self).__name__} cancelled>"
        name = getattr(self.function, "__qualname__", None) or repr(self.function)
        return f"<{type(self).__name__} {name}>"


class TimerHeap:
    """Timers by due time; those due at the same moment come out in the order in which they went in."""

    __slots__ = ("_cancelled", "_count", "_heap")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._count = 0
        self._cancelled = 0

    def __len__(self) -> int:
        return len(self._heap) - self._cancelled

    def push(self, timer: Timer) -> None:
        """Add a timer that is due at ``timer.when``."""
        self._count += 1
        timer.heap = self
        heappush(self._heap, (timer.when, self._count, timer))

    def forget(self, timer: Timer) -> None:
        """Take note that `timer`, which is in the heap, was cancelled."""
        timer.heap = None
        self._cancelled += 1
        if self._cancelled > SWEEP_AT and self._cancelled * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[2].cancelled]
            heapify(self._heap)
            self._cancelled = 0

    def next_due(self) -> float | None:
        """Return when the earliest live timer is due, None if there is none."""
        heap = self._heap
        while heap and heap[0][2].cancelled:
            heappop(heap)
            self._cancelled -= 1
        return heap[0][0] if heap else None

    def pop_due(self, now: float) -> Timer | None:
        """Take out and return the earliest live timer that is due at `now`, None if there is none."""
        due = self.next_due()
        if due is None or due > now:
            return None
        timer = heappop(self._heap)[2]
        timer.heap = None
        return timer


def next_beat(due: float, interval: float, now: float) -> float:
    """Return when a cycle that was due at `due` is due next: on its own beat, after `now`, missed beats left out."""
    following = due + interval
    if following > now:
        return following
    missed = int((now - due) / interval)
    following = due + (missed + 1) * interval
    return following if following > now else following + interval
