"""Room in an outbox: who waits for it, and what becomes of a write for which there is none.

Waits run in the greenlet that writes or drains; the rest wherever the flush runs. Who sends is the business of ``stream``.
"""

import logging
from typing import TYPE_CHECKING, Any

from gevent.event import Event
from greenlet import getcurrent

from pants_green._lifecycle import DRAINING, READ_ONLY, CloseReason
from pants_green._pool import Worker
from pants_green.errors import ChannelClosed, StreamBufferOverflow

if TYPE_CHECKING:
    from pants_green.stream import Stream

__all__ = ["made", "own_wait", "stalled", "wait_for_room", "wake_waiters", "wrote_much"]


# ---- waiting


def wait_for_room(stream: "Stream[...]", mark: int, alarm: Any = None) -> None:
    """Wait until no more than `mark` bytes are pending, or the stream is closed. In any greenlet but the hub.

    Nothing else is done meanwhile, not even what was posted to the stream.

    Args:
        alarm: something whose `rang` ends the wait, too; it has to alert the stream.
    """
    if getcurrent() is stream._greenlet:
        while stream._pending > mark and _own_may_wait(stream) and not (alarm and alarm.rang):
            own_wait(stream, mark, alarm=alarm)
    else:
        _wait_in_line(stream, mark, mark)


def _own_may_wait(stream: "Stream[...]") -> bool:
    # Not after end(): then this greenlet has to read and discard, or a peer that is still writing would lock both.
    return stream._socket is not None and (stream._state is not DRAINING or stream._peer_ended)


def own_wait(stream: "Stream[...]", mark: int, watcher: Any = None, alarm: Any = None) -> None:
    """Wait in the stream's own greenlet until the outbox has come down to `mark`, something is posted, or `watcher` fires."""
    if stream._secure and stream._shaking:
        stream._shake_hands(alarm)  # without which nothing is sent
        return
    stream._own_mark = mark
    stream._room_at = max(stream._room_at, mark)
    try:
        stream._wait(watcher)
    finally:
        stream._own_mark = -1
        stream._room_at = _next_mark(stream)
        if stream._counter is not None:
            stream._counter.restart(stream)


def _wait_in_line(stream: "Stream[...]", mark: int, enough: int) -> None:
    """Wait in another greenlet until the outbox has come down to `mark`; who finds it full again keeps its place.

    Args:
        enough: bytes that may be pending when its turn has come.
    """
    waiter = (mark, Event())
    stream._waiters = (*stream._waiters, waiter)
    try:
        while stream._pending > enough and stream._socket is not None:
            stream._room_at = max(stream._room_at, mark)
            waiter[1].clear()
            waiter[1].wait()
    finally:
        stream._waiters = tuple(one for one in stream._waiters if one is not waiter)
        stream._room_at = _next_mark(stream)


def _next_mark(stream: "Stream[...]") -> int:
    """Return the highest mark for which anybody waits; -1 if nobody does."""
    mark = stream._own_mark
    for other, _ in stream._waiters:
        mark = max(mark, other)
    if mark < 0 and stream._outbox.items and (stream._state is READ_ONLY or stream._sending):
        return 0  # the FIN waits for it, or the time limit
    return mark


# ---- when something was sent, or was not


def stalled(stream: "Stream[...]", sent: int) -> None:
    """The kernel has not taken everything: from now on `write_timeout` runs, anew whenever it takes something."""
    if stream._write_timeout is not None and (sent or stream._limits is None or not stream._limits.runs("write")):
        stream._limit("write", stream._write_timeout)
    stream._room_at = max(stream._room_at, 0)  # when all is sent, the limit ends
    if stream._server is not None and stream._server._write_budget is not None:
        stream._server._watch_output((stream,))


def made(stream: "Stream[...]") -> None:
    """The outbox has come down to a mark for which somebody waits."""
    if not stream._outbox.items:
        if stream._limits is not None:
            stream._limits.end("write")
        if stream._state is READ_ONLY:
            stream._finish_output()
    wake_waiters(stream)
    stream._room_at = _next_mark(stream)


def wake_waiters(stream: "Stream[...]") -> None:
    """Wake those for whose mark the outbox has come down far enough; all of them if the stream is closed."""
    size = stream._pending if stream._socket is not None else 0
    if size <= stream._own_mark:
        stream._alert()
    for mark, event in stream._waiters:
        if size <= mark:
            event.set()


# ---- when too much was written


def wrote_much(stream: "Stream[...]", data: bytes) -> bool:
    """More is pending than `high_water`, or `write_limit`, after `data` was added: see who did it, and whether it may stay.

    Returns:
        whether it has to be written once more, now that there is room.

    Raises:
        ChannelClosed: the stream was closed while this waited for room.
    """
    current = getcurrent()
    own = current is stream._greenlet
    limit = stream._write_limit
    if stream._pending - stream._in_files - len(data) < limit:  # one write may always exceed it
        if own:
            stream._own_output += 1
        return False
    # It is the last item, for nobody else has run since. Out with it again.
    stream._outbox.items.pop()
    stream._pending -= len(data)
    stream._flush_all()
    if stream._pending - stream._in_files < limit:
        return True
    foreign = isinstance(current, Worker) and not own
    if current is stream._engine._hub or (foreign and stream._overflow != "wait"):
        _turn_away(stream, data)
        return False
    mark = min(stream._high_water, limit - 1)
    if own:
        while stream._pending >= limit and _own_may_wait(stream):
            own_wait(stream, mark)
    else:
        _wait_in_line(stream, mark, limit - 1)
    if not stream._state.writable:
        why = stream._close_reason or "write_eof() was called"
        closed = ChannelClosed(f"write() on {stream!r}: its output ended while this waited for room ({why})", stream)
        closed._no_mistake = own
        try:
            raise closed
        finally:
            del closed  # else its traceback holds this frame, and this frame it, with the stream and its greenlet
    return True


def _turn_away(stream: "Stream[...]", data: bytes) -> None:
    """Do with a write for which there is no room what `overflow` says."""
    if stream._overflow == "drop":
        stream._writes_dropped += 1
        stream._log(logging.DEBUG, "a write of %d bytes was dropped", len(data), event="write_dropped")
    elif stream._socket is not None:
        size, limit = stream._pending, stream._write_limit
        message = f"{size} bytes wait to be sent on {stream!r}, whose peer does not take them; write_limit is {limit}"
        error = StreamBufferOverflow(message, size, limit, "write_limit")
        stream._keep_posted("on_overflow_error", error)
        stream._shut(CloseReason.OVERFLOW, error)
