"""Clients: the end of a connection that dials, once or again and again. How it dials is in ``_dialling``."""

import contextvars
import logging
import random
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self

from greenlet import getcurrent

from pants_green._address import Address, format_address
from pants_green._callbacks import Chunk
from pants_green._client_proxy import HeaderSetting, HeaderToSend, header_to_send
from pants_green._lifecycle import CLOSE, CONNECTING, ESTABLISH, NEW, CloseReason, Event
from pants_green._settings import Setting, duration
from pants_green._timers import Timer
from pants_green._tls_socket import TLSSocket
from pants_green.errors import ChannelClosed, ChannelStateError
from pants_green.stream import Stream

if TYPE_CHECKING:
    from pants_green.server import Server

__all__ = ["Client", "ReconnectingClient"]

#: Doublings of a delay after which nobody counts any more.
MANY = 100


class Client(Stream[Chunk]):
    """A Stream that is meant to ``connect()``.

    Args:
        socket, server, engine, ssl_options: as for Stream.
        proxy_header: the attribute of this name.

    Raises:
        TypeError, ValueError: `proxy_header` is no such header.
        ChannelStateError: (RuntimeError) there is one, and `socket` speaks TLS already, in front of which it would have to be.
        TypeError, ValueError, OSError, ChannelStateError: as for Stream.
    """

    __slots__ = ()

    #: The header of the PROXY protocol with which every connection begins, in clear and before the TLS handshake: "v1" or "v2" for
    #: one with the addresses of that very connection; a ProxyHeader, or the bytes that ``proxy_protocol.build()`` returns, for
    #: others, such as those of the client for whom a proxy dials; None: without one. To be set before ``connect()``.
    proxy_header: Setting[HeaderToSend] = HeaderSetting(None, header_to_send)

    @classmethod
    def _settled(cls) -> None:
        super()._settled()
        # A class that is a Connection, too, has the other meaning of that name: what came, and not what is sent.
        cls._proxy_header = None if isinstance(cls.proxy_header, property) else cls.proxy_header

    def __init__(
        self,
        socket: Any = None,
        server: "Server | None" = None,
        *,
        engine: Any = None,
        ssl_options: Any = None,
        proxy_header: HeaderToSend = None,
    ) -> None:
        if proxy_header is not None:
            self._proxy_header = header_to_send(f"{type(self).__name__}(proxy_header=)", proxy_header)
        super().__init__(socket, server, engine=engine, ssl_options=ssl_options)

    def _adopt(self, socket: Any) -> None:
        if self._proxy_header is not None and isinstance(socket, TLSSocket):
            name = type(self).__name__
            raise ChannelStateError(f"{name}(proxy_header=) goes out before the TLS handshake, and that of {socket!r} is done")
        super()._adopt(socket)

    def _start(self, socket: Any) -> None:
        if self._proxy_header is not None:
            self._preface = self._proxy_header
        super()._start(socket)

    def _set_out(self, address: Address, source: Address | None, context: contextvars.Context) -> None:
        if self._proxy_header is not None:
            self._preface = self._proxy_header
        super()._set_out(address, source, context)


class _Plan(NamedTuple):
    """How to dial again: the arguments of ``connect()``, its context variables, and what had been set before."""

    address: Address
    source: Address | None
    context: contextvars.Context
    chosen: tuple[dict[str, Any], dict[str, Any]]


class ReconnectingClient(Client[Chunk]):
    """A Client that dials again whenever its connection could not be made or has ended, until ``stop()``.

    ``connect()`` is called once. Each connection has an ``on_connect``, or an ``on_connect_error`` in its place, and an ``on_close``
    of its own; ``on_reconnect`` follows. It begins with the settings, and the TLS, that had been set when ``connect()`` was called,
    whatever became of them meanwhile; your own attributes stay. ``close()``, ``end()`` and ``abort()`` end the connection at hand,
    and not the client: it dials again.

    The delay before an attempt is random, from 0 up to `initial_delay` at first, up to twice as much each time, and up to `max_delay`
    at most: so clients that have lost their server together do not come back together.

    In the time between two connections, from ``on_close`` on, `connected`, `connecting` and `closed` are all false, and
    `close_reason` and `close_error` tell how the last one ended. A KeyboardInterrupt or SystemExit in a callback ends the client, too.

    Args:
        engine, ssl_options, proxy_header: as for Client. ``startSSL()`` holds for all connections, too, if none stands when it is called.
    """

    __slots__ = ()

    #: Seconds up to which the delay before the first new attempt may be.
    initial_delay: Setting[float] = Setting(1.0, duration)

    #: Seconds up to which any delay may be.
    max_delay: Setting[float] = Setting(60.0, duration)

    #: Seconds that a connection has to have stood for the delays to begin anew.
    stable_time: Setting[float] = Setting(10.0, duration)

    _initial_delay: float
    _max_delay: float
    _stable_time: float

    #: None before ``connect()``, and once there is to be no further attempt.
    _plan: _Plan | None = None
    _stopped = False
    #: What dials next, while that is to be waited for, and when that is to be.
    _next: Timer | None = None
    _due = 0.0
    #: Attempts that were made, or are to be, since a connection last stood for long enough.
    _attempts = 0
    #: When the connection at hand was made.
    _stands_since: float | None = None
    #: What was logged since then. It would come again with each attempt.
    _logged: frozenset[tuple[str, Any, type]] = frozenset()

    @classmethod
    def _settled(cls) -> None:
        super()._settled()
        cls._initial_delay = cls.initial_delay
        cls._max_delay = cls.max_delay
        cls._stable_time = cls.stable_time

    def __init__(self, *, engine: Any = None, ssl_options: Any = None, proxy_header: HeaderToSend = None) -> None:
        super().__init__(engine=engine, ssl_options=ssl_options, proxy_header=proxy_header)

    def connect(self, address: Any, port: int | None = None, *, source_address: tuple[str, int] | None = None) -> Self:
        """Dial, from now on until ``stop()``; returns at once. See ``Stream.connect``.

        Raises:
            ChannelStateError: (RuntimeError) it was called before, or ``stop()`` was.
            InvalidAddressFormatError: (ValueError) nobody can parse the address, or dial it from `source_address`.
        """
        if self._stopped:
            raise ChannelStateError(f"connect() on {self!r}: it was stopped for good; make a new {type(self).__name__}")
        if self._plan is not None:
            hint = f"make a new {type(self).__name__} for another address"
            raise ChannelStateError(f"connect() on {self!r}: it has been called, and dials again by itself; {hint}")
        return super().connect(address, port, source_address=source_address)

    def startSSL(self, ssl_options: Any = None) -> Self:
        """Speak TLS: if no connection stands, with every one from now on; else with this one, from here on. See ``Stream.startSSL``."""
        for_all = self._state is NEW or self._state is CONNECTING
        super().startSSL(ssl_options)
        if for_all and self._plan is not None:
            slots, cold = self._plan.chosen
            slots["_secure"] = cold["_shaking"] = True
            cold["_tls_options"] = self._tls_options
        return self

    def stop(self) -> None:
        """Dial no more. What is queued is sent, then the connection ends, as by ``end()``; one that is being made is given up.

        Never waits. Repeated calls do nothing. Afterwards the client is closed for good.
        """
        if self._stopped:
            return
        self._enter_bound()
        self._stopped = True
        if not self._between():
            self._end(CloseReason.ENDED_HERE)
        elif self._next is not None:
            self._retire()

    @property
    def closed(self) -> bool:
        """Whether the client is closed for good: after ``stop()``, once its last connection is."""
        return super().closed and (self._stopped or self._plan is None)

    # ---- callbacks

    def on_reconnect(self, delay: float) -> None:
        """There will be another attempt; by default this is logged.

        *When*: after each ``on_close`` but the last.
        *Runs in*: the client's own greenlet. It may block, and call ``stop()``; the next attempt is not made before it returns.
        *Socket*: closed, and `close_reason` tells why. What is set here, such as the `read_delimiter`, holds for the next
        connection.

        Args:
            delay: seconds from now to the attempt.
        """
        self._log(logging.INFO, "%s; the next attempt comes in %.1f seconds", self._close_reason, delay, event="reconnect")

    # ---- between two connections

    def _between(self) -> bool:
        """Tell whether a connection has ended and the next one is not being made yet."""
        return self._plan is not None and self._state is NEW

    def _live(self, address: Address | None) -> None:
        super()._live(address)
        if self._stopped:
            self._plan = None
        elif self._plan is not None:
            self._wait_for_next(self._plan)

    def _wait_for_next(self, plan: _Plan) -> None:
        """Get ready for the next attempt, and have it made when its time has come; no greenlet waits for that."""
        ended = self._close_reason, self._close_error
        self._begin_anew(plan.chosen)
        self._close_reason, self._close_error = ended
        self._told = True  # nothing that arises may start a greenlet
        self._remote = plan.address.sockaddr
        self._become_known()
        delay = random.uniform(0, min(self._max_delay, self._initial_delay * 2.0**self._attempts))
        self._attempts = min(self._attempts + 1, MANY)
        self._due = self._engine._clock() + delay
        self._greenlet = getcurrent()
        self._call("on_reconnect", delay)
        self._greenlet = None
        if self._engine._pollers:
            self._engine._acted()
        if self._stopped:
            self._retire()
        elif self._plan is not None:
            self._next = self._engine._in_hub_after(max(0.0, self._due - self._engine._clock()), self._dial_again, plan)

    def _dial_again(self, plan: _Plan) -> None:
        """Hub: the time has come."""
        self._next = None
        self._close_reason = self._close_error = None
        self._told = False
        self._set_out(plan.address, plan.source, plan.context)

    def _set_out(self, address: Address, source: Address | None, context: contextvars.Context) -> None:
        if self._plan is None:
            self._plan = _Plan(address, source, context, self._chosen())
        super()._set_out(address, source, context)

    def _forget_plan(self) -> None:
        """Make no further attempt."""
        self._plan = None
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _retire(self) -> None:
        """Be closed for good; there is no connection."""
        self._forget_plan()
        self._shut(CloseReason.ENDED_HERE)

    def _shut(self, reason: CloseReason, error: BaseException | None = None, *, reset: bool = False) -> None:
        if not self._between():
            super()._shut(reason, error, reset=reset)

    def _end_gracefully(self, deadline: float) -> None:
        self._stopped = True
        if self._between():
            self._retire()
        else:
            super()._end_gracefully(deadline)

    def _after_fork(self) -> None:
        self._forget_plan()
        super()._after_fork()

    def _describe(self) -> str:
        if not self._between():
            return super()._describe()
        left = max(0.0, self._due - self._engine._clock())
        return f"waiting {left:.1f} s to dial {format_address(self._remote)} again"

    def _refuse(self, call: str) -> NoReturn:
        if self._between():
            raise ChannelClosed(f"{call} on {self!r}: there is no connection now; do it while connected is true", self)
        super()._refuse(call)

    # ---- what each connection tells about the next

    def _move(self, event: Event) -> None:
        super()._move(event)
        if event is ESTABLISH:
            self._stands_since = self._engine._clock()
            if self._attempts:
                self._log(logging.INFO, "connected, at attempt %d", self._attempts + 1, event="reconnected")
        elif event is CLOSE:
            self._see_how_long()
            self._stands_since = None

    def _see_how_long(self) -> None:
        """Begin counting anew if the connection has stood for long enough."""
        if self._stands_since is not None and self._engine._clock() - self._stands_since >= self._stable_time:
            self._attempts = 0
            self._logged = frozenset()

    def _failed(self, name: str, error: BaseException) -> None:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            self._stopped = True
        super()._failed(name, error)

    def _log(self, level: int, message: str, *args: Any, event: str, exc_info: Any = None, logger: Any = None) -> None:
        """Log, but what each attempt would say again as DEBUG."""
        if logging.DEBUG < level < logging.ERROR:
            self._see_how_long()
            entry = event, getattr(self._close_error, "errno", None), type(exc_info)  # a callback's timeout is not that of a peer
            if entry in self._logged:
                level = logging.DEBUG
            self._logged |= {entry}
        super()._log(level, message, *args, event=event, exc_info=exc_info, logger=logger)
