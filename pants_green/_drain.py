"""The graceful end of an engine on a signal: every channel is asked to come to its end, and the engine stops when none is left.

What each channel does about it is its own business; see ``Channel._end_gracefully``.
"""

import logging
import signal
from typing import TYPE_CHECKING, Any

from pants_green.errors import ChannelStateError

if TYPE_CHECKING:
    from pants_green.channel import Channel
    from pants_green.engine import Engine

__all__ = ["Drain"]

log = logging.getLogger("pants_green.engine")

SIGNALS = (signal.SIGTERM, signal.SIGINT)

#: Seconds between two looks at what is left.
LOOK = 0.02

#: Seconds after which a signal that the hub has not seen will not be seen: a callback calculates, or blocks the whole thread.
STUCK = 1.0


class Drain:
    """Listens for signals, and ends an engine gracefully at the first.

    Servers come first: the callbacks of their connections may need the clients and the datagrams to the last.

    Args:
        engine: the engine; it runs.
        timeout: seconds that the channels have.

    Raises:
        ChannelStateError: this is not the main thread.
    """

    __slots__ = ("_all_asked", "_asked", "_before", "_deadline", "_engine", "_hurried", "_over", "_timeout", "_timer", "_unseen")

    def __init__(self, engine: "Engine", timeout: float) -> None:
        self._engine = engine
        self._timeout = timeout
        self._deadline: float | None = None
        self._timer: Any = None
        #: Channels that were asked, of which something may be left; whether they are all.
        self._asked: list[Channel] = []
        self._all_asked = False
        #: Whether the peers that linger know that nothing else is left.
        self._hurried = False
        self._over = False
        #: When the first signal came that the hub has not seen yet.
        self._unseen: float | None = None
        self._before: dict[int, Any] = {}
        try:
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._signalled)
        except ValueError:
            hint = "call start() there, or without it"
            raise ChannelStateError(f"graceful_timeout: signals come to the main thread of the process only; {hint}") from None

    def end(self) -> None:
        """Leave the signals to whom they belonged before."""
        self._over = True
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._signalled:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._timer is not None:
            self._timer.cancel()

    def _signalled(self, number: int, frame: object) -> None:
        """Called by Python wherever it is, so all the rest is done in the hub, unless that does not come by."""
        now = self._engine._clock()
        if self._unseen is None:
            self._unseen = now
        elif now - self._unseen >= STUCK:
            raise SystemExit(128 + number)
        self._engine._loop.run_callback(self._begin, number)

    def _begin(self, number: int) -> None:
        """Hub: a signal came."""
        self._unseen = None
        if self._over:
            return
        name = signal.Signals(number).name
        engine = self._engine
        if self._deadline is not None:
            self._say(logging.WARNING, "%s once more: stopping at once, with %d channels left", name, len(engine.channels))
            engine.stop()
            return
        self._say(logging.INFO, "%s: ending gracefully, within %g seconds", name, self._timeout)
        self._deadline = engine._clock() + self._timeout
        self._ask([root for root in engine._roots if root._ends_first])
        self._look()

    def _ask(self, channels: "list[Channel]") -> None:
        """Hub: ask channels to come to their end."""
        assert self._deadline is not None
        self._asked = channels
        for channel in channels:
            channel._end_gracefully(self._deadline)

    def _look(self) -> None:
        """Hub: see whether anything is left."""
        engine = self._engine
        assert self._deadline is not None
        if not self._all_asked and not self._any_left():
            self._all_asked = True
            self._ask(list(engine._roots))
        left = self._deadline - engine._clock()
        over = self._all_asked and not self._any_left() and not engine._roots
        if over and not self._hurried:
            self._hurried = True
            for linger in list(engine._lingering):
                linger.hurry()
        if over and not engine._lingering:
            engine.stop()
        elif left <= 0:
            self._cut_off()
            engine.stop()
        else:
            self._timer = engine._in_hub_after(min(LOOK, left), self._look)

    def _any_left(self) -> bool:
        """Tell whether anything is left of those that were asked."""
        asked = self._asked
        while asked and asked[-1]._is_over():
            asked.pop()
        return bool(asked)

    def _cut_off(self) -> None:
        """Hub: the time is up."""
        channels = self._engine.channels
        if channels:
            self._say(logging.WARNING, "the time is up; %d channels are aborted", len(channels))
        for channel in channels:
            channel._cut_off()

    def _say(self, level: int, message: str, *args: Any) -> None:
        # Not in the hub: a log handler may wait.
        self._engine._run_soon(lambda _: log.log(level, message, *args, extra={"event": "graceful_end"}))
