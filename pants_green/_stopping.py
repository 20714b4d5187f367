"""Stopping a server: waiting for its connections, up to a deadline, and for those who wait for that.

What stopping means is in ``server``.
"""

from collections.abc import Callable

from gevent.event import Event

from pants_green.engine import Engine

__all__ = ["Stopping"]


class Stopping:
    """The end of a server, from ``stop()`` on.

    Args:
        engine: the server's.
        timeout: seconds that the connections have; None: as long as it takes.
        on_deadline: called in the hub when these are over.

    Attributes:
        deadline: when that is, by ``time.monotonic()``; infinite if it never is.
    """

    __slots__ = ("_done", "_timer", "deadline")

    def __init__(self, engine: Engine, timeout: float | None, on_deadline: Callable[[], None]) -> None:
        self._done = Event()
        self.deadline = float("inf") if timeout is None else engine._clock() + timeout
        self._timer = None if timeout is None else engine._in_hub_after(timeout, on_deadline)

    def done(self) -> None:
        """Wake those who wait."""
        self._done.set()

    def wait(self) -> None:
        """Wait until it is done, in a greenlet of the user's."""
        self._done.wait()

    def cancel(self) -> None:
        """Forget the deadline."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
