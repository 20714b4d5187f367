"""What every channel is: an engine, a socket, a lifecycle, callbacks, and what happens when one of these raises.

What a stream or a server does with them is in ``stream`` and ``server``.
"""

import logging
from collections.abc import Iterable
from typing import Any, ClassVar, NoReturn

from greenlet import getcurrent

from pants_green._address import format_address
from pants_green._lifecycle import CLOSED, NEW, CloseReason, Event
from pants_green._settings import SettingsType
from pants_green.engine import Engine, engine_for
from pants_green.errors import ChannelClosed, ChannelStateError

__all__ = ["Channel"]

#: Reasons of closing that are not the callbacks' doing: a write() that comes too late for them is nobody's mistake.
DONE_TO_US = frozenset(
    {
        CloseReason.PEER_ENDED,
        CloseReason.PEER_LEFT,
        CloseReason.IO_ERROR,
        CloseReason.BAD_INPUT,
        CloseReason.OVERFLOW,
        CloseReason.TIMED_OUT,
        CloseReason.TLS_FAILED,
        CloseReason.STOPPED,
    }
)

#: Where everything about TLS is logged.
TLS_LOGGER = logging.getLogger("pants_green.tls")

#: What a greenlet is that has been asked for but does not run yet.
STARTING: Any = object()


class Channel(metaclass=SettingsType):
    """The base of streams and servers. Not made by itself.

    All callbacks of one channel run one at a time: a stream's in the greenlet of its connection, a server's in a
    greenlet of their own. Any of them may block; the others' go on.
    """

    __slots__ = (
        "__dict__",
        "__weakref__",
        "_close_error",
        "_close_reason",
        "_context",
        "_engine",
        "_failing",
        "_greenlet",
        "_local",
        "_posted",
        "_socket",
        "_state",
        "_waiting",
        "_wakeup",
    )

    def __init__(self, engine: Any = None) -> None:
        self._engine: Engine = engine if type(engine) is Engine else engine_for(engine)
        self._state = NEW
        self._socket: Any = None
        self._local: Any = None
        self._context: Any = None
        self._greenlet: Any = None
        self._waiting = False
        self._wakeup: Any = None
        self._posted: list[tuple[str, tuple[Any, ...]]] | None = None
        self._failing: str | None = None
        self._close_reason: CloseReason | None = None
        self._close_error: BaseException | None = None

    # ---- what it is

    @property
    def engine(self) -> Engine:
        """The engine that this channel is on."""
        return self._engine

    @property
    def socket(self) -> Any:
        """The gevent socket; None before there is one and after it was closed. What it sends goes out in clear, also under TLS."""
        return self._socket

    @property
    def fileno(self) -> int | None:
        """The descriptor of the socket; None before there is one and after it was closed."""
        return None if self._socket is None else int(self._socket.fileno())

    @property
    def closed(self) -> bool:
        """Whether the channel is closed. It never opens again."""
        return self._state is CLOSED

    @property
    def close_reason(self) -> CloseReason | None:
        """Why the channel closes or closed; its text is fit for a log line. None while it does not."""
        return self._close_reason

    @property
    def close_error(self) -> BaseException | None:
        """The exception behind `close_reason`, where there is one; without its traceback once ``on_close`` has run."""
        return self._close_error

    @property
    def local_address(self) -> Any:
        """This end's address, ``(host, port)`` or with four elements for IPv6; None before there is one.

        Kept after closing, if it was known before.
        """
        return self._local

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._describe()}>"

    def _describe(self) -> str:
        local = self._local
        return self._state.value if local is None else f"{self._state.value} {format_address(local)}"

    # ---- callbacks

    def on_close(self) -> None:
        """The channel has closed.

        *When*: last of all, exactly once, however the channel came to its end.
        *Runs in*: the greenlet of the channel's callbacks, after the callback that was running.
        *Socket*: closed; the addresses can still be read. Calling ``close()`` here does nothing.
        """
        self.handle_close()

    def on_error(self, exception: BaseException) -> None:
        """A callback raised; by default it is logged and the channel closed.

        *When*: right after the callback that raised.
        *Runs in*: the same greenlet.
        *Socket*: as the callback left it.

        An override may keep the channel open, but not after a ``gevent.Timeout`` or ``GreenletExit``: these always close it.
        """
        self._log(logging.ERROR, "%s raised %r", self._failing or "a callback", exception, event="callback_error", exc_info=exception)
        self._shut(CloseReason.CALLBACK_ERROR, exception)

    def handle_close(self) -> None:
        """The oldest name of ``on_close``."""

    # ---- calling user code

    def _call(self, name: str, *args: Any) -> None:
        """Call one of the user's callbacks; whatever it raises ends at most this channel."""
        try:
            getattr(self, name)(*args)
        except BaseException as error:
            self._failed(name, error)

    def _failed(self, name: str, error: BaseException) -> None:
        """The callback `name` raised `error`."""
        if self._close_reason is CloseReason.FORKED:
            return  # the parent's connection; this process has nothing to say about it
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            self._shut(CloseReason.CALLBACK_ERROR, error)
            self._engine._interrupt(error)
        elif isinstance(error, ChannelClosed) and error.channel is self and self._close_reason in DONE_TO_US:
            self._log(logging.DEBUG, "%s wrote too late: %s", name, self._close_reason, event="late_write")
        elif name in ("on_error", "on_close"):
            self._log(logging.ERROR, "%s raised %r", name, error, event="callback_error", exc_info=error)
            self._shut(CloseReason.CALLBACK_ERROR, error)
        else:
            self._failing = name
            self._call("on_error", error)
            self._failing = None
            if not isinstance(error, Exception):
                self._shut(CloseReason.CALLBACK_ERROR, error)

    def _overrides(self, name: str, owner: type) -> bool:
        """Tell whether a callback is the user's, set in a subclass or on the instance, and not that of `owner`."""
        return getattr(getattr(self, name), "__func__", None) is not getattr(owner, name)

    # ---- the mailbox: what arises elsewhere, for the greenlet of the callbacks

    def _post(self, name: str, *args: Any) -> None:
        """Have the callback `name` called in the channel's own greenlet, after what it does now."""
        self._keep_posted(name, *args)
        self._alert()

    def _keep_posted(self, name: str, *args: Any) -> None:
        if self._posted is None:
            self._posted = []
        self._posted.append((name, args))

    def _alert(self) -> None:
        """Make the channel's greenlet look at what was posted; start one if there is none."""
        if self._greenlet is None:
            self._greenlet = STARTING
            self._engine._run_soon(self._live, None, self._context)
        elif self._waiting and self._wakeup is None:
            # In one of our own waits. A greenlet in user code is never woken.
            self._wakeup = self._engine._loop.run_callback(self._wake)

    def _wake(self) -> None:
        """Hub: end the wait for which this was asked; a wait that ends before takes the request back."""
        self._wakeup = None
        self._greenlet.switch()

    def _wait(self, watcher: Any = None) -> None:
        """Wait in the channel's own greenlet until `watcher` fires or something is posted."""
        self._waiting = True
        try:
            if watcher is not None:
                watcher.start(self._greenlet.switch)
            self._engine._pool.to_hub()
        finally:
            if watcher is not None:
                watcher.stop()
            self._waiting = False
            if self._wakeup is not None:
                self._forget_wakeup()

    def _forget_wakeup(self) -> None:
        """Take back a wake-up that was asked for: it must not end a later wait."""
        self._wakeup.stop()
        self._wakeup = None

    def _run_posted(self) -> None:
        """Call the posted callbacks, in order, in the channel's own greenlet."""
        while self._posted:
            posted, self._posted = self._posted, None
            for name, args in posted:
                self._call(name, *args)
            if self._engine._pollers:
                self._engine._acted()
            if self._posted and self._state is not CLOSED:
                # Posted by what was just called, and so may the next be: the others get their turn.
                self._wakeup = self._engine._loop.run_callback(self._wake)
                self._wait()

    def _live(self, argument: Any) -> None:
        """The greenlet of the callbacks: by default it ends when nothing is posted any more."""
        self._greenlet = getcurrent()
        try:
            self._run_posted()
        finally:
            self._greenlet = None

    # ---- moving through the lifecycle

    def _move(self, event: Event) -> None:
        """Go to the next state; the only place that changes it."""
        raise NotImplementedError

    def _refuse_move(self, event: Event) -> NoReturn:
        raise ChannelStateError(f"{event.value} makes no sense on {self!r}") from None

    def _shut(self, reason: CloseReason, error: BaseException | None = None) -> None:
        """Close now, for `reason`; does nothing on a closed channel."""
        raise NotImplementedError

    #: Whether it ends before the others do when everything ends gracefully.
    _ends_first: ClassVar[bool] = False

    def _end_gracefully(self, deadline: float) -> None:
        """Hub: come to an end until `deadline`, by the engine's clock, after what is owed."""
        raise NotImplementedError

    def _is_over(self) -> bool:
        """Tell whether nothing is left of it, not even a callback that runs."""
        return self._state is CLOSED and self._greenlet is None

    def _cut_off(self) -> None:
        """Hub: close without waiting for anything: the time is up."""
        self._shut(CloseReason.STOPPED)

    def _repair(self) -> None:
        """Set going again what an interrupt in the hub may have left undone."""
        if self._wakeup is not None:
            self._wakeup.stop()
            self._wakeup = self._engine._loop.run_callback(self._wake)

    def _abandon(self) -> None:
        """In a child forked by a thread that is not ours: close the descriptor and touch nothing else."""

    def _after_fork(self) -> None:
        """In a forked child: let go of what belongs to the parent."""

    def _children(self) -> Iterable["Channel"]:
        """Channels that are known to the engine through this one."""
        return ()

    # ---- logging

    def _log(self, level: int, message: str, *args: Any, event: str, exc_info: Any = None, logger: Any = None) -> None:
        logger = logger or self._logger
        if not logger.isEnabledFor(level):
            return
        if getcurrent() is self._engine._hub:
            # A log handler may wait for a lock or a socket, which nobody may in the hub.
            self._engine._run_soon(self._write_log, (logger, level, message, args, event, exc_info))
        else:
            self._write_log((logger, level, message, args, event, exc_info))

    def _write_log(self, entry: tuple[logging.Logger, int, str, tuple[Any, ...], str, Any]) -> None:
        logger, level, message, args, event, exc_info = entry
        extra = {"channel": self, "peer": getattr(self, "remote_address", None), "event": event}
        logger.log(level, "%r: " + message, self, *args, exc_info=exc_info, extra=extra)

    _logger: ClassVar[logging.Logger] = logging.getLogger("pants_green")
