"""Time limits of a channel, all on one timer, which is armed again only when it fires; no timer is started or stopped per receive.

What is limited, and what happens then, is the business of ``_stream_limits`` and ``_datagram_output``.
"""

from collections.abc import Callable
from typing import Any

from pants_green._settings import Setting
from pants_green._timers import Timer
from pants_green.engine import Engine

__all__ = ["Limits", "TimeLimit"]


class TimeLimit(Setting[float | None]):
    """Seconds; what runs already runs anew, for which its owner has ``_limit_changed(which)``."""

    def __set__(self, instance: Any, value: Any) -> None:
        super().__set__(instance, value)
        instance._limit_changed(self.name.removesuffix("_timeout"))


class Limits:
    """The limits that run for one channel.

    Args:
        engine: the engine of the channel.
        on_hit: ``on_hit(which)``, called in the hub when the time of a limit is up.
    """

    __slots__ = ("_armed_for", "_deadlines", "_engine", "_on_hit", "_timer")

    def __init__(self, engine: Engine, on_hit: Callable[[str], None]) -> None:
        self._engine = engine
        self._on_hit = on_hit
        self._deadlines: dict[str, float] = {}
        self._timer: Timer | None = None
        self._armed_for = 0.0

    def begin(self, which: str, seconds: float) -> None:
        """Start a limit, or start it anew."""
        deadline = self._deadlines[which] = self._engine._clock() + seconds
        if self._timer is None or deadline < self._armed_for:
            self._arm(deadline)

    def end(self, which: str) -> None:
        """Stop a limit; no effect if it does not run."""
        self._deadlines.pop(which, None)

    def hold(self, which: str) -> float | None:
        """Stop a limit and return the seconds that it has left; None if it does not run."""
        deadline = self._deadlines.pop(which, None)
        return None if deadline is None else max(0.0, deadline - self._engine._clock())

    def runs(self, which: str) -> bool:
        """Tell whether a limit has been started and has not ended."""
        return which in self._deadlines

    def end_all_but(self, which: str) -> None:
        """Stop all of them but one."""
        self._deadlines = {name: deadline for name, deadline in self._deadlines.items() if name == which}

    def cancel(self) -> None:
        """Stop all of them."""
        self._deadlines.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed_for = deadline
        self._timer = self._engine._in_hub_after(max(0.0, deadline - self._engine._clock()), self._due)

    def _due(self) -> None:
        """Hub: the earliest deadline of a while ago has come; it may have been put off since."""
        self._timer = None
        now = self._engine._clock()
        for which, deadline in list(self._deadlines.items()):
            if deadline <= now and self._deadlines.pop(which, None) is not None:
                self._on_hit(which)
        if self._deadlines and self._timer is None:
            self._arm(min(self._deadlines.values()))
