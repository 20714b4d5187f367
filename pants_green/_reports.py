"""Reports of limits that were hit: one line each, but not one for each of thousands of peers that come at once."""

import logging
import weakref
from typing import Any

__all__ = ["Reports"]

#: Lines about one limit, and the seconds in which there are no more of them, but for a last one that sums the others up.
MOST = 10
WITHIN = 10.0


class Reports:
    """What a server says about its limits, and those of its connections.

    Args:
        server: the channel whose log it is.
    """

    __slots__ = ("_engine", "_server_ref", "_windows")

    def __init__(self, server: Any) -> None:
        self._server_ref = weakref.ref(server)  # which has this: a circle would keep both until the garbage collector comes by
        self._engine = server._engine
        self._windows: dict[str, _Window] = {}

    def tell(
        self,
        limit: str,
        value: Any,
        message: str,
        *args: Any,
        level: int = logging.WARNING,
        channel: Any = None,
        event: str = "limit",
        logger: logging.Logger | None = None,
        exc_info: BaseException | None = None,
    ) -> None:
        """Say that a limit was hit.

        Args:
            limit: the name of its setting. value: what that is set to.
            message, args: what happened, and to whom; of the server's own limits, the limit and its value are put before it.
            level: of the record; what is less than a warning is said each time.
            channel: whose limit it is, if not the server's: the record's ``channel``, which also tells its ``peer``.
            event, logger, exc_info: as of other records.
        """
        teller: Any = self._server_ref() if channel is None else channel  # which may have a length, and that be 0
        if teller is not None and (level < logging.WARNING or self._may_say(limit, value)):  # a peer that lingers may outlive it
            if channel is None and logger is None:
                message, args = "%s, %s: " + message, (limit, value, *args)
            teller._log(level, message, *args, event=event, logger=logger, exc_info=exc_info)

    def tell_once(self, limit: str, value: Any, message: str) -> None:
        """Say that a limit holds things up, unless that was said lately: it does so again and again."""
        if self._window_of(limit, value).said == 0:
            self.tell(limit, value, message)

    def _window_of(self, limit: str, value: Any) -> "_Window":
        now = self._engine._clock()
        window = self._windows.get(limit)
        if window is None or now - window.begun >= WITHIN:
            if window is not None:
                self._sum_up(limit)
            window = self._windows[limit] = _Window(value, now)
        return window

    def _may_say(self, limit: str, value: Any) -> bool:
        window = self._window_of(limit, value)
        if window.said < MOST:
            window.said += 1
            return True
        if not window.left_out:
            left = window.begun + WITHIN - self._engine._clock()
            window.timer = self._engine._in_hub_after(max(left, 0.0), self._sum_up, limit)
        window.left_out += 1
        return False

    def _sum_up(self, limit: str) -> None:
        """Say how often there was nothing said about a limit."""
        window = self._windows.pop(limit)
        server = self._server_ref()
        if window.timer is not None:
            window.timer.cancel()
        if window.timer is not None and server is not None:
            message = "%s, %s: %d more within %g seconds, of which nothing was said"
            server._log(logging.WARNING, message, limit, window.value, window.left_out, WITHIN, event="limit")

    def close(self) -> None:
        """Say what is left to be said."""
        for limit in list(self._windows):
            self._sum_up(limit)

    def forget(self) -> None:
        """In a forked child: leave that to the parent."""
        for window in self._windows.values():
            if window.timer is not None:
                window.timer.cancel()
        self._windows.clear()


class _Window:
    """Some seconds in which a limit is hit again and again."""

    __slots__ = ("begun", "left_out", "said", "timer", "value")

    def __init__(self, value: Any, begun: float) -> None:
        self.value = value
        self.begun = begun
        self.said = 0
        self.left_out = 0
        self.timer: Any = None
