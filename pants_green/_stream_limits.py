"""The limits of a stream: who looks at what they are about, and what happens when the time of one is up.

The time is counted by ``_limits``; ``_meter`` and ``_counter`` are those who look. Nothing here waits.
"""

from typing import TYPE_CHECKING

from pants_green._counter import Counter
from pants_green._dialling import give_up
from pants_green._lifecycle import CLOSED, CONNECTING, DRAINING, WRITE_ONLY, CloseReason
from pants_green._pool import Worker
from pants_green._stream_state import INTERRUPTED
from pants_green._stream_tls import overdue, put_meter
from pants_green.errors import CallbackTimeout, IdleTimeout, ReadTimeout, WriteTimeout

if TYPE_CHECKING:
    from pants_green.stream import Stream

__all__ = ["changed", "count", "error_of", "hit", "measure", "tell"]

#: Seconds that a connection has to come to its end once it has reached the server's `max_connection_age`.
GRACE = 30.0

#: Seconds, or less, that a timer may come early.
NO_TIME = 0.001


# ---- a limit is set


def measure(stream: "Stream[...]") -> None:
    """See whether somebody has to look at what comes and goes, and have that done from now on."""
    stream._metered = stream._idle_timeout is not None or stream._read_rate is not None
    stream._limited = stream._limited or stream._metered
    if stream._meter is not None:
        stream._meter.settle(stream._read_rate)
    elif stream._metered and stream._recv is not None:
        put_meter(stream)
    if stream._state.connected:
        changed(stream, "idle")
        if stream._waiting:
            stream._alert()  # to wait anew


def count(stream: "Stream[...]") -> None:
    """See whether somebody has to look at every callback, and have that done from now on."""
    stream._counted = stream._chunk_rate is not None or stream._callback_timeout is not None
    stream._limited = stream._limited or stream._counted
    if stream._counter is not None:
        stream._counter.settle(stream)
    if not stream._counted:
        stream._counter = None
    else:
        stream._counter = stream._counter or Counter(stream)
        if stream._framer is None:
            stream._cut_by(None, None, stream._regex_search)
        stream._inbox.put_back(stream._framer)
    stream._attention = INTERRUPTED
    if stream._waiting:
        stream._alert()  # to wait anew


def changed(stream: "Stream[...]", which: str) -> None:
    """A limit has to run anew, or from now on, or no more."""
    if which == "connect":
        seconds, running = stream._connect_timeout, stream._state is CONNECTING
    elif which == "idle":
        seconds, running = stream._idle_timeout, stream._state.connected
    elif which == "write":
        seconds, running = stream._write_timeout, stream._sending
    else:
        seconds = stream._read_timeout
        running = bool(stream._inbox.data) and not stream._in_read and (stream._waiting or stream._paused)
    if seconds is not None and running:
        stream._limit(which, seconds)
    elif stream._limits is not None:
        stream._limits.end(which)


# ---- its time is up


def hit(stream: "Stream[...]", which: str) -> None:
    """Hub: the time of a limit is up."""
    if which == "connect":
        give_up(stream)
    elif which == "handshake":
        overdue(stream)
    elif which == "read":
        _see_chunk(stream)
    elif which == "write":
        _see_output(stream)
    elif which == "idle":
        _see_idle(stream)
    elif which == "callback":
        _interrupt_callback(stream)
    elif which == "age":
        if stream._stop_by is None:  # else the deadline of a server that stops holds
            stream._ask_to_stop(stream._engine._clock() + GRACE)
            stream._limit("grace", GRACE)
    else:
        _cut_off_for_age(stream)


def _see_chunk(stream: "Stream[...]") -> None:
    """Tell that a chunk has not come whole, unless the delay is ours."""
    if stream._inbox.data and stream._read_timeout is not None and not stream._in_read:
        stream._limit("read", stream._read_timeout)
        if stream._waiting and stream._own_mark < 0 and not stream._paused:
            stream._post("_overdue", "read")


def _see_output(stream: "Stream[...]") -> None:
    """Close the connection if the peer has taken nothing of what was offered to it."""
    if stream._shaking and not (stream._tls and stream._tls.clear):
        return  # nothing was offered: it waits for the handshake
    if stream._sending and not stream._outbox.items:
        stream._room_for_goodbye()
        if not stream._sending:
            return
    owed = stream._pending
    stream._flush_all()  # the kernel tells of room only when a third of its buffer is free
    if stream._pending < owed:
        changed(stream, "write")
    elif stream._state is not CLOSED and stream._write_timeout is not None:
        stream._keep_posted("on_timeout", "write")
        stream._shut(CloseReason.TIMED_OUT, error_of(stream, "write"))


def _see_idle(stream: "Stream[...]") -> None:
    """Tell that nothing came or went, unless something did since, or the delay is ours."""
    meter, limit = stream._meter, stream._idle_timeout
    if meter is None or limit is None or not stream._state.connected:
        return
    left = meter.active + limit - stream._engine._clock()
    listening = meter.listening or (stream._state is WRITE_ONLY and stream._waiting)
    if stream._pending or stream._in_read or stream._shaking or not listening:
        stream._limit("idle", limit)  # at the earliest; what is at work now touches the meter in the end
    elif left > NO_TIME:
        stream._limit("idle", left)
    else:
        stream._post("_overdue", "idle")


def _interrupt_callback(stream: "Stream[...]") -> None:
    """A callback takes too long. While it waits in something of ours it is not the one to blame."""
    counter, limit, greenlet = stream._counter, stream._callback_timeout, stream._greenlet
    if counter is None or counter.running is None or limit is None or stream._waiting or type(greenlet) is not Worker:
        return
    text = f"{counter.running} of {stream!r} has not returned within callback_timeout, {limit:g} seconds"
    stream._limit("callback", limit)  # for one that catches it
    greenlet.throw(CallbackTimeout(text))


def _cut_off_for_age(stream: "Stream[...]") -> None:
    """It was asked to end for its age, and has not."""
    if stream._server is not None:
        text = "aborted %g seconds after it had reached the server's max_connection_age, for it had not come to its end"
        stream._server._reports.tell("max_connection_age", stream._server.max_connection_age, text, GRACE, channel=stream)
    stream._cut_off()


# ---- and is told


def tell(stream: "Stream[...]", which: str) -> None:
    """Posted: call on_timeout, unless what it would tell of has come to pass meanwhile."""
    if which == "read":
        if stream._inbox.data:
            stream._call("on_timeout", "read")
        return
    meter, limit = stream._meter, stream._idle_timeout
    if meter is None or limit is None or not stream._state.connected:
        return
    if meter.active + limit - stream._engine._clock() <= NO_TIME:
        stream._call("on_timeout", "idle")
    changed(stream, "idle")


def error_of(stream: "Stream[...]", which: str) -> TimeoutError:
    """Return the error that says which limit was hit, and how."""
    if which == "read":
        waiting = len(stream._inbox)
        return ReadTimeout(f"a chunk has not come whole within read_timeout, {stream._read_timeout:g} seconds; {waiting} bytes have")
    if which == "idle":
        return IdleTimeout(f"nothing came or went for idle_timeout, {stream._idle_timeout:g} seconds")
    text = f"the peer has taken nothing for write_timeout, {stream._write_timeout:g} seconds; {stream._pending} bytes wait"
    if stream._own_mark >= 0 and stream._state is not DRAINING:
        text += "; neither side is reading, for this one waits for room"
    return WriteTimeout(text)
