"""Straight-line reads: one chunk for a callback that asks for it, from the same bytes that ``on_read`` would get.

Runs in the stream's own greenlet, inside a callback of the user's, and waits only in the stream's own waits.
"""

from typing import TYPE_CHECKING, Any, NoReturn

from greenlet import getcurrent

from pants_green._address import NOT_GIVEN
from pants_green._delimiters import framer_for
from pants_green._inbox import NOTHING
from pants_green._lifecycle import CLOSED, DRAINING, OPEN, READ_ONLY
from pants_green._room import wait_for_room
from pants_green._settings import seconds
from pants_green._stream_state import INTERRUPTED, KIB, RECEIVE_LEAST
from pants_green.errors import ChannelClosed, ChannelStateError, ReadTimeout, StreamBufferOverflow
from pants_green.framing import Framer

if TYPE_CHECKING:
    from pants_green.stream import Stream

__all__ = ["read"]

#: Bytes that a receive of ours takes at most; more than one chunk is rarely wanted at a time.
RECEIVE_MOST = 64 * KIB


def read(stream: "Stream[...]", delimiter: Any, timeout: Any) -> Any:
    """Return one chunk; see `Stream.read`."""
    framer = _framer(stream, delimiter)
    if timeout != 0 or isinstance(timeout, bool):
        timeout = seconds("timeout", timeout)
    _check_place(stream)
    inbox = stream._inbox
    # What the batch still holds comes first. From now on chunks are found one by one, so that the outer loop and this one can
    # take turns.
    inbox.put_back(stream._framer)
    inbox.forget_search()
    stream._attention = INTERRUPTED  # the outer loop has to notice
    try:
        return _next(stream, framer, timeout)
    finally:
        inbox.forget_search()


def _framer(stream: "Stream[...]", delimiter: Any) -> Framer[Any] | None:
    if delimiter is NOT_GIVEN or (delimiter is None and stream._read_delimiter is None):
        framer: Framer[Any] | None = stream._framer
        return framer
    return framer_for(delimiter, stream._encoding, stream._regex_search)


def _check_place(stream: "Stream[...]") -> None:
    if getcurrent() is not stream._greenlet:
        raise ChannelStateError(
            f"read() on {stream!r} outside of its callbacks; call it in on_connect or on_read of this very stream, or keep what "
            "on_read gets where you need it"
        )
    if stream._told or stream._state not in (OPEN, READ_ONLY, DRAINING, CLOSED):
        raise ChannelStateError(f"read() on {stream!r}, of which nothing more is read; on_end gets what no delimiter completed")


def _next(stream: "Stream[...]", framer: Framer[Any] | None, timeout: float | None) -> Any:
    inbox = stream._inbox
    with _Alarm(stream, timeout) as alarm:
        # Mostly the last receive was a short one, after which a receive would only meet EAGAIN: wait first.
        may_receive = timeout == 0
        while True:
            if stream._state is not OPEN and stream._state is not READ_ONLY:
                _leave(stream, "it was closed")
            try:
                chunk = inbox.next(framer)
            except Exception as error:
                stream._input_senseless(error)
                _leave(stream, "its input made no sense", error)
            if chunk is not NOTHING:
                return chunk
            _check_overflow(stream, framer)
            if alarm.rang and not may_receive:
                raise ReadTimeout(f"read() on {stream!r}: no whole chunk came within {timeout:g} seconds")
            if stream._pending > stream._high_water and stream._pending > stream._read_owed and not alarm.rang:
                # What was written since the last receive is too much: as in the read loop, nothing is received meanwhile.
                wait_for_room(stream, min(stream._low_water, stream._high_water), alarm)
                stream._read_owed = stream._pending
            elif may_receive:
                may_receive = _receive(stream)
            else:
                stream._wait(stream._reader)
                may_receive = True


def _receive(stream: "Stream[...]") -> bool:
    """Receive once; return whether there may be more."""
    size = stream._receive_size
    try:
        data = stream._recv(size)
    except BlockingIOError:
        return False
    except OSError as error:
        stream._input_failed(error)
        _leave(stream, "the connection broke", error)
    if not data:
        _leave(stream, "the peer has ended its side")
    stream._read_owed = stream._pending
    stream._inbox.append(data)
    full = len(data) == size
    if full and size < RECEIVE_MOST:
        stream._receive_size = size * 4
    elif len(data) < KIB:
        stream._receive_size = RECEIVE_LEAST
    return full


def _check_overflow(stream: "Stream[...]", framer: Framer[Any] | None) -> None:
    waiting = max(len(stream._inbox), stream._inbox.wanted)
    allowed = stream._buffer_size if framer is None else max(stream._buffer_size, framer.room)
    if waiting > allowed:
        message = f"read() on {stream!r}: {waiting} bytes wait for their delimiter; buffer_size allows {allowed}"
        overflow = StreamBufferOverflow(message, waiting, allowed)
        overflow._raised_by_read_of = stream
        raise overflow


def _leave(stream: "Stream[...]", why: str, cause: BaseException | None = None) -> NoReturn:
    closed = ChannelClosed(f"read() on {stream!r}: {why}", stream)
    closed._raised_by_read_of = stream
    raise closed from cause


class _Alarm:
    """Wakes a stream from its waits when the time of a ``read()`` is up.

    Attributes:
        rang: whether it is up.
    """

    __slots__ = ("_stream", "_timeout", "_timer", "rang")

    def __init__(self, stream: "Stream[...]", timeout: float | None) -> None:
        self._stream = stream
        self._timeout = timeout
        self._timer: Any = None
        self.rang = timeout == 0

    def __enter__(self) -> "_Alarm":
        if self._timeout:
            self._timer = self._stream._engine._in_hub_after(self._timeout, self._ring)
        return self

    def __exit__(self, *error: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _ring(self) -> None:
        self.rang = True
        self._stream._alert()
