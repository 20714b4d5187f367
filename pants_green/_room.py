"""Room in an outbox: who waits for it, and what becomes of a write for which there is none.

Runs in the greenlet that writes. Who sends, and tells that there is room again, is the business of ``stream``.
"""

import logging
from typing import TYPE_CHECKING, Any

from gevent.event import Event
from greenlet import getcurrent

from pants_green._lifecycle import READ_ONLY
from pants_green._pool import Worker
from pants_green.errors import StreamBufferOverflow

if TYPE_CHECKING:
    from pants_green.stream import Stream

__all__ = ["next_mark", "overflow_of", "tell", "wait_for_room", "wait_for_room_to_write"]


def wait_for_room(stream: "Stream[...]", mark: int, alarm: Any = None) -> None:
    """Wait until no more than `mark` bytes are pending, or the stream is closed. In any greenlet but the hub.

    Nothing else is done meanwhile, not even what was posted to the stream.

    Args:
        alarm: something whose `rang` ends the wait, too; it has to alert the stream.
    """
    if getcurrent() is stream._greenlet:
        while stream._pending > mark and stream._socket is not None and not (alarm and alarm.rang):
            stream._own_mark = mark
            stream._room_at = max(stream._room_at, mark)
            try:
                stream._wait()
            finally:
                stream._own_mark = -1
                stream._room_at = next_mark(stream)
        return
    while stream._pending > mark and stream._socket is not None:
        waiter = (mark, Event())
        stream._drainers = (*stream._drainers, waiter)
        stream._room_at = max(stream._room_at, mark)
        try:
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


def wait_for_room_to_write(stream: "Stream[...]", size: int) -> bool:
    """A write of `size` bytes would begin above `write_limit`: wait for room, or do what `overflow` says.

    Returns:
        whether to look again; False if the write is dropped.
    """
    stream._flush_all()
    if stream._pending < stream._write_limit:
        return True
    current = getcurrent()
    engine = stream._engine
    foreign = isinstance(current, Worker) and current is not stream._greenlet
    if current is engine._hub or (foreign and stream._overflow != "wait"):
        if stream._overflow == "drop":
            stream.writes_dropped += 1
            stream._log(logging.DEBUG, "a write of %d bytes was dropped", size, event="write_dropped")
        elif stream._socket is not None:
            stream._overfull()
        return False
    wait_for_room(stream, min(stream._high_water, stream._write_limit - 1))
    return True


def overflow_of(stream: "Stream[...]") -> StreamBufferOverflow:
    """Return the error for an outbox that is full."""
    size, limit = stream._pending, stream._write_limit
    message = f"{size} bytes wait to be sent on {stream!r}, whose peer does not take them; write_limit is {limit}"
    return StreamBufferOverflow(message, size, limit)

