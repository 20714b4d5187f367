"""Running timers: what the heap says is due is started, each in a greenlet.

The heap itself is in ``_timers`` and knows no clock; here are the hub's alarm and the loop functions.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

from pants_green._timers import Timer, TimerHeap, next_beat

__all__ = ["HubTimer", "Scheduler"]

log = logging.getLogger("pants_green.engine")

#: Seconds between two runs of a loop function while nothing else happens.
LOOP_INTERVAL = 0.02


class HubTimer(Timer):
    """A timer of the library's own: runs in the hub, waits for nothing, calls no user code."""

    __slots__ = ()


class Scheduler:
    """The timers of one engine.

    Args:
        engine: whose they are: its clock, its greenlets, its turn.
        loop: the event loop of its hub.
    """

    __slots__ = ("_alarm", "_alarm_at", "_engine", "_heap", "_loop", "_loop_count", "_loop_functions", "_loop_watchers")

    def __init__(self, engine: Any, loop: Any) -> None:
        self._engine = engine
        self._loop = loop
        self._heap = TimerHeap()
        self._alarm: Any = None
        self._alarm_at = math.inf
        self._loop_functions: list[Timer] = []
        self._loop_count = 0
        self._loop_watchers: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self._heap) + self._loop_count

    # ---- once, and again and again

    def soon(self, timer: Timer) -> None:
        """Start a timer in the next hub turn."""
        self._loop.run_callback(self.start, timer)

    def after(self, delay: float, timer: Timer) -> None:
        """Start a timer `delay` seconds from now."""
        timer.when = self._engine._clock() + delay
        self._push(timer)

    def start(self, timer: Timer) -> None:
        """Hub: run a timer in a greenlet, unless it was cancelled."""
        if timer.function is not None:
            self._engine._run(self._run_timer, timer, timer.context)

    def _push(self, timer: Timer) -> None:
        self._heap.push(timer)
        if timer.when < self._alarm_at:
            self._arm(timer.when)

    def _arm(self, when: float) -> None:
        """Have the hub call _alarmed at `when`, or a little earlier: the heap is asked again then."""
        if self._alarm is not None:
            self._alarm.stop()
            self._alarm.close()
        self._alarm_at = when
        self._alarm = self._loop.timer(max(when - self._engine._clock(), 0.0))
        # update: the hub's own notion of now is as old as the current turn.
        self._alarm.start(self._alarmed, update=True)

    def rearm(self) -> None:
        """Set the alarm anew, whatever became of the one that was set."""
        due = self._heap.next_due()
        if due is not None:
            self._arm(due)

    def _alarmed(self) -> None:
        """Hub: something is due."""
        self._alarm_at = math.inf
        try:
            now = self._engine._clock()
            while (timer := self._heap.pop_due(now)) is not None:
                if isinstance(timer, HubTimer):
                    self._run_in_hub(timer)
                else:
                    self.start(timer)
        finally:
            due = self._heap.next_due()
            if due is not None and due < self._alarm_at:
                self._arm(due)

    def _run_in_hub(self, timer: Timer) -> None:
        function, args = timer.function, timer.args
        timer.cancel()
        if function is not None:
            function(*args)

    def _run_timer(self, timer: Timer) -> None:
        """Run a timer, in its greenlet; a cycle goes back into the heap afterwards."""
        function, args, kwargs = timer.function, timer.args, timer.kwargs
        if function is None:
            return
        if timer.interval is None:
            timer.cancel()  # it has had its run, and keeps nothing alive any more
        self._call(function, args, kwargs)
        if timer.interval is not None and timer.function is not None:
            timer.when = next_beat(timer.when, timer.interval, self._engine._clock())
            self._push(timer)

    # ---- in every turn

    def each_turn(self, timer: Timer) -> None:
        """Run a timer once per hub turn from now on."""
        self._loop_functions.append(timer)
        self._loop_count += 1
        if not self._loop_watchers:
            turn = self._loop.prepare()
            beat = self._loop.timer(LOOP_INTERVAL, LOOP_INTERVAL)
            self._loop_watchers = (turn, beat)
            turn.start(self._engine._turn)
            beat.start(_nothing)

    def run_loops(self) -> None:
        """Hub: run every loop function that is not running still."""
        ready, self._loop_functions = self._loop_functions, []
        for timer in ready:
            self._engine._run(self._run_loop, timer, timer.context)
        if not self._loop_count:
            for watcher in self._loop_watchers:
                watcher.stop()
                watcher.close()
            self._loop_watchers = ()

    def _run_loop(self, timer: Timer) -> None:
        """Run a loop function once, in its greenlet; it comes back when it has returned."""
        function = timer.function
        if function is not None:
            self._call(function, timer.args, timer.kwargs)
        if timer.function is not None:
            self._loop_functions.append(timer)
        else:
            self._loop_count -= 1

    # ---- calling user code

    def _call(self, function: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            function(*args, **kwargs)
        except (KeyboardInterrupt, SystemExit) as error:
            self._engine._interrupt(error)
        except BaseException as error:
            name = getattr(function, "__qualname__", repr(function))
            log.error("%s, run by a timer, raised %r", name, error, exc_info=error, extra={"event": "timer_error"})


def _nothing() -> None:
    pass
