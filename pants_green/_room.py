"""Room in an outbox: who waits for it, and what becomes of a write for which there is none.

Runs in the greenlet that writes. Who sends, and tells that there is room again, is the business of ``stream``.
"""

import logging
from typing import TYPE_CHECKING, Any

from gevent.event import Event
from greenlet import getcurrent

from pants_green._lifecycle import DRAINING, READ_ONLY
from pants_green._pool import Worker
from pants_green.errors import ChannelClosed, StreamBufferOverflow

if TYPE_CHECKING:
    from pants_green.stream import Stream

__all__ = ["next_mark", "overflow_of", "tell", "wait_for_room", "wrote_much"]


def wait_for_room(stream: "Stream[...]", mark: int, alarm: Any = None) -> None:
    """Wait until no more than `mark` bytes are pending, or the stream is closed. In any greenlet but the hub.

    Nothing else is done meanwhile, not even what was posted to the stream.

    Args:
        alarm: something whose `rang` ends the wait, too; it has to alert the stream.
    """
    if getcurrent() is stream._greenlet:
        while stream._pending > mark and _own_may_wait(stream) and not (alarm and alarm.rang):
            _own_wait(stream, mark)
    else:
        _wait_in_line(stream, mark, mark)


def _own_may_wait(stream: "Stream[...]") -> bool:
    # Not after end(): then this greenlet has to read and discard, or a peer that is still writing would lock both.
    return stream._socket is not None and (stream._state is not DRAINING or stream._peer_ended)


def _own_wait(stream: "Stream[...]", mark: int) -> None:
    """Wait in the stream's own greenlet until the outbox has come down to `mark`, or something is posted."""
    stream._own_mark = mark
    stream._room_at = max(stream._room_at, mark)
    try:
        stream._wait()
    finally:
        stream._own_mark = -1
        stream._room_at = next_mark(stream)


def _wait_in_line(stream: "Stream[...]", mark: int, enough: int) -> None:
    """Wait in another greenlet until the outbox has come down to `mark`, and if others were quicker, on in the same place.

    Args:
        enough: so many bytes may be pending when this one's turn comes.
    """
    waiter = (mark, Event())
    stream._drainers = (*stream._drainers, waiter)
    try:
        while stream._pending > enough and stream._socket is not None:
            stream._room_at = max(stream._room_at, mark)
            waiter[1].clear()
            waiter[1].wait()
    finally:
        stream._drainers = tuple(one for one in stream._drainers if one is not waiter)
        stream._room_at = next_mark(stream)


def next_mark(stream: "Stream[...]") -> int:
    """Return the highest mark for which anybody waits; -1 if nobody does."""
    mark = stream._own_mark
    for other, _ in stream._drainers:
        mark = max(mark, other)
    if mark < 0 and stream._outbox.items and (stream._state is READ_ONLY or stream._sending):
        return 0  # the FIN waits for it, or the time limit
    return mark


def tell(stream: "Stream[...]") -> None:
    """Wake those for whose mark the outbox has come down far enough; all of them if the stream is closed."""
    size = stream._pending if stream._socket is not None else 0
    if size <= stream._own_mark:
        stream._alert()
    for mark, event in stream._drainers:
        if size <= mark:
            event.set()


def wrote_much(stream: "Stream[...]", data: bytes) -> None:
    """More is pending than `high_water`, or `write_limit`, after `data` was added: see who did it, and whether it may stay.

    Raises:
        ChannelClosed: the stream was closed while this waited for room.
    """
    current = getcurrent()
    own = current is stream._greenlet
    limit = stream._write_limit
    if stream._pending - len(data) < limit:  # one write may always exceed it
        if own:
            stream._own_output += 1
        return
    # Taken out again, which is last in the outbox, before anybody else can run.
    items = stream._outbox.items
    items.pop()
    stream._pending -= len(data)
    stream._flush_all()
    if stream._pending >= limit:
        foreign = isinstance(current, Worker) and not own
        if current is stream._engine._hub or (foreign and stream._overflow != "wait"):
            _refuse(stream, data)
            return
        mark = min(stream._high_water, limit - 1)
        if own:
            while stream._pending >= limit and _own_may_wait(stream):
                _own_wait(stream, mark)
        else:
            _wait_in_line(stream, mark, limit - 1)
        if not stream._state.writable:
            closed = ChannelClosed(f"write() on {stream!r}: it ended while this waited for room ({stream._close_reason})", stream)
            closed._raised_by_read = own
            raise closed
    if not stream._state.writable:
        stream._refuse("write()")
    stream.write(data)


def _refuse(stream: "Stream[...]", data: bytes) -> None:
    """Do with a write for which there is no room what `overflow` says."""
    if stream._overflow == "drop":
        stream.writes_dropped += 1
        stream._log(logging.DEBUG, "a write of %d bytes was dropped", len(data), event="write_dropped")
    elif stream._socket is not None:
        stream._overfull()


def overflow_of(stream: "Stream[...]") -> StreamBufferOverflow:
    """Return the error for an outbox that is full."""
    size, limit = stream._pending, stream._write_limit
    message = f"{size} bytes wait to be sent on {stream!r}, whose peer does not take them; write_limit is {limit}"
    return StreamBufferOverflow(message, size, limit)

