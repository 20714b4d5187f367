"""The end of a server: accepting nothing more, for a while or for good; waiting for its connections up to a deadline.

Listening and accepting are in ``server``. What a connection does about it is its own business: see ``on_stopping``.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from gevent.event import Event
from greenlet import getcurrent

from pants_green import _sockets
from pants_green._lifecycle import CLOSED, LISTENING, NEW, STOP, STOPPING, CloseReason
from pants_green._server_limits import ServerLimits
from pants_green._settings import patience
from pants_green.engine import Engine
from pants_green.errors import ChannelStateError

__all__ = ["ServerStopping", "Stopping"]

#: Connections that are taken at most from an accept queue that is to be closed; as many as Linux lets wait by default. Peers that
#: come faster than they are taken would never let it become empty.
REST_MOST = 4096


class Stopping:
    """The end of a server, from ``stop()`` on.

    Args:
        engine: the server's.
        deadline: when its connections have to be done, by the engine's clock; infinite if never.
        on_deadline: called in the hub then.

    Attributes:
        asked: whether the connections have been asked to end.
        deadline: as above.
        rest: accepted connections that wait until others have ended, for there are `max_connections` already.
    """

    __slots__ = ("_done", "_timer", "asked", "deadline", "rest")

    def __init__(self, engine: Engine, deadline: float, on_deadline: Callable[[], None]) -> None:
        self._done = Event()
        self.asked = False
        self.deadline = deadline
        self.rest: deque[tuple[Any, ...]] = deque()
        self._timer: Any = None
        if deadline < math.inf:
            self._timer = engine._in_hub_after(max(0.0, deadline - engine._clock()), on_deadline)

    def done(self) -> None:
        """Wake those who wait."""
        self._done.set()

    def wait(self) -> None:
        """Wait until it is done, in a greenlet of the user's."""
        self._done.wait()

    def cancel(self) -> None:
        """Forget the deadline, and those that still wait."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.drop_rest()

    def drop_rest(self) -> None:
        """Close the connections that wait."""
        while self.rest:
            self.rest.popleft()[0].close()


class ServerStopping(ServerLimits):
    """The part of a server that has to do with its end. Not made by itself."""

    __slots__ = ("_ended", "_listeners", "_stopping")

    #: Before the others, which the callbacks of its connections may need to the last.
    _ends_first: ClassVar[bool] = True

    def __init__(self, engine: Any, proxy_protocol: str | None, trusted: Iterable[Any] | None) -> None:
        self._listeners: list[_sockets.Listener] = []
        self._stopping: Stopping | None = None
        #: Whether a connection that comes to stand now has to go again.
        self._ended = False
        super().__init__(engine, proxy_protocol, trusted)

    # ---- for a while

    def suspend(self) -> None:
        """Accept nothing more until ``resume()``; connections that are made meanwhile wait in the backlog. Repeated calls do nothing.

        Raises:
            ChannelStateError: (RuntimeError) the server does not listen.
        """
        self._check_listening("suspend()")
        self._suspended = True
        self._stop_accepting()

    def resume(self) -> None:
        """Go on after ``suspend()``; no effect if it was not called.

        Raises:
            ChannelStateError: (RuntimeError) the server does not listen.
        """
        self._check_listening("resume()")
        self._suspended = False
        self._resume_accepting()

    @property
    def suspended(self) -> bool:
        """Whether ``suspend()`` holds."""
        return self._suspended

    def _check_listening(self, call: str) -> None:
        if self._state is not LISTENING:
            raise ChannelStateError(f"{call} on {self!r}: it does not listen")
        self._engine._enter()

    # ---- for good

    def stop(self, timeout: float | None = 30.0) -> None:
        """Stop gracefully: accept no more, let the connections come to their end, and abort those that have not by then.

        What is in the accept queue of the kernel is still taken (beyond `max_connections` one by one, as others end), and what its
        peers have sent already is read. Each connection gets ``on_stopping(deadline)``, which by default ends it after what it has
        to send; a callback that is running runs on. ``on_close`` of the server comes last.

        This waits until it is over; but called in a callback of the server, or of one of its connections, or in the hub, it
        returns at once. Repeated calls wait, too, and change nothing. ``close()`` ends it at once.

        Args:
            timeout: seconds, 0 or more, until the connections that are left are aborted; None: as long as it takes.

        Raises:
            TypeError, ValueError: `timeout` is no such number.
        """
        timeout = patience(f"stop() on {self!r}: timeout", timeout)
        if self._state is not CLOSED or self._stopping is not None:
            self._engine._enter()
        self._begin_to_stop(math.inf if timeout is None else self._engine._clock() + timeout)
        if self._stopping is not None and not self._called_from_within():
            self._stopping.wait()

    def _begin_to_stop(self, deadline: float) -> None:
        if self._state is NEW:
            self._shut(CloseReason.CLOSED_HERE)
        elif self._state is LISTENING:
            self._stopping = Stopping(self._engine, deadline, self._time_is_up)
            self._move(STOP)
            self._log(logging.INFO, "stopping", event="stop")
            self._engine._loop.run_callback(self._take_the_rest)

    def _end_gracefully(self, deadline: float) -> None:
        if self._state is not CLOSED:
            self._begin_to_stop(deadline)
            return
        for stream in self._children():  # it was closed without them
            stream._end_gracefully(deadline)

    def _is_over(self) -> bool:
        return super()._is_over() and not self._active and not self._children()

    def _called_from_within(self) -> bool:
        """Tell whether the calling greenlet is one for which a stopping server waits, or the hub."""
        current = getcurrent()
        if current is self._engine._hub or current is self._greenlet:
            return True
        return current in self._at_work

    def _take_the_rest(self) -> None:
        """Hub: take what is left in the accept queue, close it, and have every connection asked to end."""
        if self._state is not STOPPING or self._stopping is None:
            return
        for listener in self._listeners[:]:
            self._accept_rest(listener)
            # Before the next, which may take its time: what comes meanwhile has to go elsewhere, and would be reset here.
            if listener in self._listeners:
                self._listeners.remove(listener)
                listener.stop()
                listener.close()
        self._close_listeners()
        # When the hub has looked at their sockets once more, and was at its timers then: what has come already is answered.
        loop = self._engine._loop
        self._engine._in_hub_after(0.0, loop.run_callback, self._ask_all)
        self._one_less()

    def _ask_all(self) -> None:
        """Hub: ask every connection to end."""
        if self._state is STOPPING and self._stopping is not None:
            self._stopping.asked = True
            for stream in self._streams():
                stream._ask_to_stop(self._stopping.deadline)
            for greeting in self._greetings:
                greeting.hurry()

    def _accept_rest(self, listener: _sockets.Listener) -> None:
        for _ in range(REST_MOST):
            if self._state is not STOPPING or self._stopping is None:
                return
            try:
                accepted = listener.accept()
            except OSError as error:
                if error.errno in _sockets.ACCEPT_AGAIN:
                    continue
                return
            self._stopping.rest.append(accepted)
            self._welcome_rest()

    def _welcome_rest(self) -> None:
        """Hub: let those in that were taken from the accept queue, as far as `max_connections` allows."""
        while self._state is STOPPING and self._stopping is not None and self._stopping.rest:
            if self._max_connections is not None and self._active >= self._max_connections:
                return
            self._engine._run(self._welcome, self._stopping.rest.popleft(), self._context)

    def _one_less(self) -> None:
        super()._one_less()
        if self._state is not STOPPING or self._stopping is None:
            return
        if self._stopping.rest:
            self._engine._loop.run_callback(self._welcome_rest)
        elif not self._listeners and not self._active and not self._children():
            self._shut(CloseReason.STOPPED)

    def _time_is_up(self) -> None:
        """Hub: the deadline of ``stop()`` has come."""
        if self._state is not STOPPING or self._stopping is None:
            return
        if self._stopping.asked:
            self._cut_off()
        else:  # they have their turn before they are aborted, be it as soon as it may
            self._ask_all()
            self._engine._loop.run_callback(self._time_is_up)

    def _cut_off(self) -> None:
        left = self._streams()
        if left or self._active:
            count = max(self._active, len(left)) + len(self._stopping.rest if self._stopping is not None else ())
            self._log(logging.WARNING, "%d connections had not come to their end in time, and were aborted", count, event="stop_timeout")
        for stream in left:
            stream._cut_off()
        self._ended = True
        self._shut(CloseReason.STOPPED)

    def _tell_stopped(self) -> None:
        """Posted, behind on_close: those who wait in ``stop()`` go on."""
        if self._stopping is not None:
            self._stopping.done()

    # ---- what a server does besides

    def _streams(self) -> list[Any]:
        """Return the streams for which it waits when it stops."""
        raise NotImplementedError

    def _stop_accepting(self) -> None:
        raise NotImplementedError

    def _close_listeners(self) -> None:
        raise NotImplementedError

    def _welcome(self, accepted: tuple[Any, ...] | None) -> None:
        raise NotImplementedError
