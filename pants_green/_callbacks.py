"""The callbacks of a stream: when each is called, where, with what, and what it does unless it is overridden.

Who calls them is in ``stream``.
"""

import logging
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from pants_green._lifecycle import CloseReason
from pants_green._tls import TLSTruncated
from pants_green.channel import TLS_LOGGER, Channel
from pants_green.errors import CallbackTimeout, StreamBufferOverflow, StreamConnectError

if TYPE_CHECKING:
    from typing_extensions import ParamSpec  # which type checkers know without its being installed

    Chunk = ParamSpec("Chunk", default=[bytes])
else:
    from typing import ParamSpec

    #: What ``on_read`` gets, for type checkers: ``Stream`` is ``Stream[bytes]``; one with an encoding is a ``Stream[str]``, one
    #: whose delimiter is a Struct of two numbers a ``Stream[int, int]``.
    Chunk = ParamSpec("Chunk")

__all__ = ["Chunk", "StreamCallbacks", "optional"]

F = TypeVar("F", bound=Callable[..., Any])


class OptionalCallback:
    """A method that is called only if somebody has overridden it, for calling it costs something.

    A subclass that overrides it is seen when the class is made; that an instance is given its own has to be noticed when it
    happens, which is what this is for. To look at each flush costs 5 % of the instructions of a round trip.

    Args:
        function: what it does if nobody has.
        heard: the attribute of the instance that is to be true once somebody has.
    """

    def __init__(self, function: Callable[..., Any], heard: str) -> None:
        self.function = function
        # Not the callback's own name: that is where a subclass's instance keeps one, whose super() has to find ours.
        self.key = f"_{function.__name__}_of_instance"
        self.heard = heard
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self.function
        own = instance.__dict__.get(self.key)
        return MethodType(self.function, instance) if own is None else own

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.key] = value
        setattr(instance, self.heard, True)

    def __delete__(self, instance: Any) -> None:
        del instance.__dict__[self.key]


def optional(heard: str) -> Callable[[F], F]:
    """Make an `OptionalCallback` of a method."""

    def make(method: F) -> F:
        return cast(F, OptionalCallback(method, heard))

    return make


class StreamCallbacks(Channel, Generic[Chunk]):
    """What a subclass of Stream may override, besides ``on_close`` and ``on_error`` of every channel."""

    __slots__ = ()

    # ---- reading

    def on_connect(self) -> None:
        """The connection stands.

        *When*: first of all callbacks, but for ``on_ssl_handshake``; exactly once.
        *Runs in*: the stream's own greenlet; it may block, and nothing is read meanwhile.
        *Socket*: open.
        """
        self.handle_connect()

    def on_connect_error(self, exception: StreamConnectError) -> None:
        """The connection could not be made; by default this is logged.

        *When*: instead of ``on_connect``; ``on_close`` follows.
        *Runs in*: the stream's own greenlet.
        *Socket*: closed. To try again make a new stream, or use a `ReconnectingClient`.
        """
        self._log(logging.WARNING, "%s", exception.strerror or exception, event="connect_error")

    def on_read(self, *data: Chunk.args, **none: Chunk.kwargs) -> None:
        """A chunk has arrived, as `read_delimiter` cuts it: override it as ``on_read(self, data)``.

        `data` is bytes; str if there is an `encoding`; the match object of a pattern that is not searched for; what a Framer
        makes of it. The fields of a Struct are arguments of their own: ``on_read(self, kind, size)``.

        *When*: for each chunk, in order.
        *Runs in*: the stream's own greenlet; it may block, and nothing more is read meanwhile.
        *Socket*: open.
        """
        self.handle_read(*data, **none)

    @optional("_end_heard")
    def on_end(self, rest: bytes) -> None:
        """The peer has ended its side (a FIN, or TLS' goodbye); by default nothing is done about `rest`.

        *When*: after the last complete chunk; once; not after a reset, an end without TLS' goodbye, or a close from here.
        *Runs in*: the stream's own greenlet.
        *Socket*: open for writing. Afterwards what is owed is sent and the stream closes, unless `allow_half_open`.

        Args:
            rest: the bytes that no delimiter completed.
        """

    def on_read_error(self, exception: Exception) -> None:
        """Receiving failed, or what came cannot be cut or decoded; by default this is logged.

        *When*: once, after all complete chunks; ``on_close`` follows. The usual ways in which a peer leaves (reset, time-out)
        come here only if this is overridden; they are `close_reason`.
        *Runs in*: the stream's own greenlet.
        *Socket*: closed.

        Args:
            exception: an OSError, the UnicodeDecodeError of an `encoding`, or what a Framer raised, a ValueError as a rule.
        """
        self._log(logging.WARNING, "reading failed: %s", exception, event="read_error")

    def on_overflow_error(self, exception: StreamBufferOverflow) -> None:
        """More bytes than `buffer_size` wait for their delimiter, or more than `write_limit` to be sent; this is logged by default.

        Or those of all connections of the server are more than its `write_budget`; ``exception.setting`` tells which it was.

        *When*: after all complete chunks were delivered. If the delimiter that this leaves, or a larger `buffer_size`, does
        not help, the stream is closed all the same. For output, when `overflow` is "close".
        *Runs in*: the stream's own greenlet.
        *Socket*: open when too much waits for its delimiter; closed for output, and when a Framer has refused a size that was
        announced.
        """
        self._report(exception.setting, exception, "overflow")
        self._shut(CloseReason.OVERFLOW, exception)

    def on_stopping(self, deadline: float) -> None:
        """The connection is asked to come to its end; by default ``end()``: what was written is sent, nothing more is read.

        An override may finish what it is about, and say goodbye; `stopping` is true from now on.

        *When*: when the server stops (``Server.stop()``, or a signal with ``engine.start(graceful_timeout=...)``), or the connection
        has reached ``max_connection_age``; once; not if it has begun to end by itself.
        *Runs in*: the stream's own greenlet, after the callback that is running, and before the next chunk. A callback that waits
        in ``read()`` is not interrupted.
        *Socket*: open.

        Args:
            deadline: when it is aborted, by ``time.monotonic()``; infinite if never.
        """
        self._end(CloseReason.ENDED_HERE)

    def _end(self, reason: CloseReason) -> None:
        """Close as soon as everything is sent, for `reason`."""
        raise NotImplementedError

    def handle_connect(self) -> None:
        """The oldest name of ``on_connect``."""

    def on_timeout(self, which: str) -> None:
        """A time limit was hit; by default this is logged and the stream closed.

        *When*: "read": a chunk has not come whole within `read_timeout`. "idle": nothing came or went for `idle_timeout`. If an
        override does not close the stream then, the limit starts anew. "write": the peer took nothing for `write_timeout`;
        ``on_close`` follows.
        *Runs in*: the stream's own greenlet.
        *Socket*: closed for "write", else open.
        """
        error = self._limit_error(which) if self._close_error is None else self._close_error
        self._report(f"{which}_timeout", error, "timeout")
        self._shut(CloseReason.TIMED_OUT, error)

    def _limit_error(self, which: str) -> TimeoutError:
        raise NotImplementedError

    def on_error(self, exception: BaseException) -> None:
        """A callback raised; by default it is logged and the stream closed. One that took too long is a limit that was hit.

        *When*: right after the callback that raised.
        *Runs in*: the same greenlet.
        *Socket*: as the callback left it.

        An override may keep the stream open, but not after a ``gevent.Timeout`` or ``GreenletExit``: these always close it.
        """
        if isinstance(exception, CallbackTimeout):
            self._report("callback_timeout", exception, "timeout", exc_info=exception)
            self._shut(CloseReason.CALLBACK_ERROR, exception)
        else:
            super().on_error(exception)

    def _report(self, limit: str, error: BaseException | str, event: str, exc_info: BaseException | None = None) -> None:
        """Log that a limit was hit."""
        raise NotImplementedError

    def handle_read(self, *data: Chunk.args, **none: Chunk.kwargs) -> None:
        """The oldest name of ``on_read``."""

    # ---- TLS

    def on_ssl_handshake(self) -> None:
        """The TLS handshake is done: `peer_certificate`, `cipher` and `alpn_protocol` are known.

        *When*: just before ``on_connect``; after ``startSSL()`` on a connection that stood already, before anything else.
        *Runs in*: the stream's own greenlet.
        *Socket*: open. If this closes the stream, ``on_connect`` is not called.
        """

    def on_ssl_handshake_error(self, exception: OSError) -> None:
        """The TLS handshake failed; by default this is logged.

        *When*: once; instead of ``on_connect`` if that has not been called; ``on_close`` follows.
        *Runs in*: the stream's own greenlet.
        *Socket*: closed.

        Args:
            exception: an ssl.SSLError, such as SSLCertVerificationError; HandshakeTimeout; or what the socket said.
        """
        self._log(logging.WARNING, "the TLS handshake failed: %s", exception, event="handshake_error", logger=TLS_LOGGER)

    def on_ssl_error(self, exception: Exception) -> None:
        """TLS could not begin, or failed after the handshake; by default this is logged.

        The most frequent one is an ssl.SSLEOFError: the peer ended the connection without TLS' goodbye, as many do, so nobody can
        say whether it, or somebody else, did so. Then ``on_end`` is not called; it is logged as INFO if no chunk was unfinished.

        *When*: once, after all complete chunks; ``on_close`` follows.
        *Runs in*: the stream's own greenlet.
        *Socket*: closed.

        Args:
            exception: an ssl.SSLError; or a ValueError, if no name is known that the server's certificate should have.
        """
        harmless = isinstance(exception, TLSTruncated) and not self._in_chunk()
        self._log(logging.INFO if harmless else logging.WARNING, "TLS failed: %s", exception, event="ssl_error", logger=TLS_LOGGER)

    def _in_chunk(self) -> bool:
        """Tell whether the beginning of a chunk has come."""
        raise NotImplementedError

    # ---- writing

    @optional("_write_heard")
    def on_write(self) -> None:
        """Everything that was written has been handed to the kernel.

        *When*: after each time the outbox got empty, never inside ``write()``.
        *Runs in*: the stream's own greenlet, after the callback that is running.
        *Socket*: open.
        """
        self.handle_write()

    def on_write_error(self, exception: OSError) -> None:
        """Sending failed; by default this is logged.

        *When*: once; ``on_close`` follows. The usual ways in which a peer leaves (broken pipe, reset, time-out) come here only
        if this is overridden; they are `close_reason`.
        *Runs in*: the stream's own greenlet.
        *Socket*: closed.
        """
        self._log(logging.WARNING, "writing failed: %s", exception, event="write_error")

    @optional("_write_heard")
    def handle_write(self) -> None:
        """The oldest name of ``on_write``."""
