"""Reports of limits that were hit: one line each, but not one for each of thousands of peers that come at once."""

import logging
from typing import Any

__all__ = ["Reports"]

#: Lines about one limit, and the seconds in which there are no more of them.
MOST = 10
WITHIN = 10.0


class Reports:
    """What a server says about its limits.

    Args:
        channel: whose log it is.
    """

    __slots__ = ("_begun", "_channel", "_left_out", "_said")

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._begun: dict[str, float] = {}
        self._said: dict[str, int] = {}
        self._left_out: dict[str, int] = {}

    def tell(self, limit: str, value: Any, message: str, *args: Any, level: int = logging.WARNING) -> None:
        """Say that a limit was hit.

        Args:
            limit: the name of its setting. value: what that is set to.
            message, args: what happened, and to whom.
        """
        now = self._channel._engine._clock()
        if now - self._begun.get(limit, -WITHIN) >= WITHIN:
            self._begun[limit] = now
            self._said[limit] = 0
            left_out = self._left_out.pop(limit, 0)
            if left_out:
                self._log(level, limit, value, "and %d more since then", left_out)
        if self._said[limit] < MOST:
            self._said[limit] += 1
            self._log(level, limit, value, message, *args)
        else:
            self._left_out[limit] = self._left_out.get(limit, 0) + 1

    def tell_once(self, limit: str, value: Any, message: str) -> None:
        """Say that a limit holds things up, unless that was said lately: it does so again and again."""
        now = self._channel._engine._clock()
        if now - self._begun.get(limit, -WITHIN) >= WITHIN:
            self._begun[limit] = now
            self._log(logging.WARNING, limit, value, message)

    def _log(self, level: int, limit: str, value: Any, message: str, *args: Any) -> None:
        self._channel._log(level, "%s, %s: " + message, limit, value, *args, event="limit")
