"""Straight-line reads: one chunk for a callback that asks for it, from the same bytes that ``on_read`` would get.

Runs in the stream's own greenlet, inside a callback of the user's, and waits only in the stream's own waits.
"""

from typing import TYPE_CHECKING, Any, NoReturn

from greenlet import getcurrent

from pants_green._address import NOT_GIVEN
from pants_green._delimiters import Incremental, framer_for
from pants_green._inbox import NOTHING
from pants_green._lifecycle import CONNECTING, NEW, OPEN, READ_ONLY
from pants_green._room import wait_for_room
from pants_green._settings import seconds
from pants_green._stream_state import INTERRUPTED, KIB, RECEIVE_LEAST, TURN
from pants_green.errors import ChannelClosed, ChannelStateError, InvalidReadDelimiterError, ReadTimeout, StreamBufferOverflow
from pants_green.framing import Framer

if TYPE_CHECKING:
    from pants_green.stream import Stream

__all__ = ["read"]

#: Bytes up to which a read() lets the receives of its stream grow; more than one chunk is rarely wanted at a time.
GROW_TO = 64 * KIB

#: The states in which anything is received.
READABLE = (OPEN, READ_ONLY)


def read(stream: "Stream[...]", delimiter: Any, timeout: Any) -> Any:
    """Return one chunk; see `Stream.read`."""
    framer = _framer(stream, delimiter)
    if timeout != 0 or isinstance(timeout, bool):
        timeout = seconds(f"read() on {stream!r}: timeout (which may be 0, too)", timeout)
    _check_place(stream)
    inbox = stream._inbox
    # What the batch still holds comes first. From now on chunks are found one by one, so that the outer loop and this one can
    # take turns.
    if stream._limits is not None:
        stream._limits.end("read")
    inbox.put_back(stream._framer)
    inbox.forget_search()
    stream._attention = INTERRUPTED  # the outer loop has to notice
    stream._in_read = True
    try:
        return _next(stream, framer, timeout)
    finally:
        stream._in_read = False
        inbox.forget_search()
        if stream._counter is not None:
            stream._counter.restart(stream)


def _framer(stream: "Stream[...]", delimiter: Any) -> Framer[Any] | None:
    framer: Framer[Any] | None
    if delimiter is NOT_GIVEN or (delimiter is None and stream._read_delimiter is None):
        framer = stream._framer
    elif delimiter is None and stream._decoder is not None and stream._decoder.encoding == stream._encoding:
        framer = stream._decoder
    else:
        try:
            framer = framer_for(delimiter, stream._encoding, stream._regex_search)
        except InvalidReadDelimiterError as error:
            raise type(error)(f"read() on {stream!r}, its delimiter: {error}") from None
        if isinstance(framer, Incremental):
            stream._decoder = framer  # it knows what the text so far has told of the encoding
    return framer


def _check_place(stream: "Stream[...]") -> None:
    if stream._state is NEW or stream._state is CONNECTING:
        raise ChannelStateError(f"read() on {stream!r}: it is not connected yet; call it in on_connect or on_read")
    if getcurrent() is not stream._greenlet:
        raise ChannelStateError(
            f"read() on {stream!r} outside of its callbacks; call it in on_connect or on_read of this very stream, or keep what "
            "on_read gets where you need it"
        )
    if stream._told or stream._peer_ended:
        raise ChannelStateError(f"read() on {stream!r}, of which nothing more is read; on_end gets what no delimiter completed")


def _next(stream: "Stream[...]", framer: Framer[Any] | None, timeout: float | None) -> Any:
    with _Alarm(stream, timeout) as alarm:
        # As in the read loop nothing is received while what was written since the last receive is too much.
        too_much = 0 <= stream._own_seen < stream._own_output and stream._pending > stream._high_water
        # Mostly the last receive was a short one, after which a receive would only meet EAGAIN: wait first.
        may_receive = timeout == 0
        turn_began = 0.0
        while True:
            if stream._secure and stream._shaking:
                _shake_hands(stream, alarm, timeout)
            # Not even what has come already is answered by more files: each of them holds a descriptor.
            chunk = NOTHING if too_much and stream._outbox.files else _find(stream, framer)
            if chunk is not NOTHING:
                stream._own_seen = stream._own_output
                return chunk
            if too_much:
                too_much = False
                wait_for_room(stream, min(stream._low_water, stream._high_water), alarm)
                continue
            received = _receive(stream) if may_receive else 0
            while not received and stream._state in READABLE:
                if alarm.rang:
                    raise _timed_out(stream, timeout)
                stream._wait(stream._reader)
                if stream._secure and stream._shaking:  # startSSL() in another greenlet
                    break
                turn_began = 0.0
                received = _receive(stream)
            may_receive = False
            if received >= stream._receive_size:
                if received < GROW_TO:
                    stream._receive_size = received * 4
                now = stream._engine._clock()
                turn_began = turn_began or now
                may_receive = now - turn_began < TURN
            elif received < KIB:
                stream._receive_size = RECEIVE_LEAST


def _shake_hands(stream: "Stream[...]", alarm: "_Alarm", timeout: float | None) -> None:
    """Do the TLS handshake that is due, as far as there is time."""
    stream._shake_hands(alarm)
    if stream._shaking and alarm.rang and stream._state in READABLE:
        raise _timed_out(stream, timeout)
    stream._inbox.put_back(stream._framer)  # chunks one by one, as `read` has said


def _timed_out(stream: "Stream[...]", timeout: float | None) -> ReadTimeout:
    return ReadTimeout(f"read() on {stream!r}: no whole chunk came within {timeout:g} seconds")


def _find(stream: "Stream[...]", framer: Framer[Any] | None) -> Any:
    """Take a chunk that is complete, or return NOTHING."""
    if stream._state not in READABLE:
        _leave(stream, "it was closed")
    inbox = stream._inbox
    try:
        chunk = inbox.next(framer)
    except StreamBufferOverflow as error:
        error._no_mistake = True
        raise
    except Exception as error:
        stream._input_senseless(error)
        _leave(stream, "its input made no sense", error)
    if chunk is NOTHING:
        waiting = max(len(inbox), inbox.wanted)
        allowed = stream._buffer_size if framer is None else max(stream._buffer_size, framer.room)
        if waiting > allowed:
            message = f"read() on {stream!r}: {waiting} bytes wait for their delimiter; buffer_size allows {allowed}"
            overflow = StreamBufferOverflow(message, waiting, allowed)
            overflow._no_mistake = True
            try:
                raise overflow
            finally:
                del overflow
    return chunk


def _receive(stream: "Stream[...]") -> int:
    """Receive once, if there is anything; return how many bytes that was."""
    if stream._state not in READABLE:
        return 0
    try:
        data = stream._recv(stream._receive_size)
    except BlockingIOError:
        return 0
    except OSError as error:
        stream._broken("on_read_error", error)
        _leave(stream, "the connection broke", error)
    if not data:
        _leave(stream, "the peer has ended its side", at_end=True)
    stream._inbox.append(data)
    return len(data)


def _leave(stream: "Stream[...]", why: str, cause: BaseException | None = None, *, at_end: bool = False) -> NoReturn:
    closed = ChannelClosed(f"read() on {stream!r}: {why}", stream)
    closed._no_mistake = True
    closed._at_end = at_end
    try:
        raise closed from cause
    finally:
        del closed, cause  # else its traceback holds this frame, and this frame it, with the stream and its greenlet


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
