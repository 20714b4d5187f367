"""The bytes that wait for their delimiter; pure. How they are cut is in ``framing`` and ``_delimiters``."""

from collections.abc import Iterable
from typing import Any

from pants_green.framing import Framer

__all__ = ["NOTHING", "Inbox"]

#: What ``Inbox.next`` returns when no chunk is complete.
NOTHING: Any = type("Nothing", (), {"__slots__": (), "__repr__": lambda self: "<nothing>"})()

#: Bytes of one unfinished chunk from which on it is collected in a bytearray and searched only where it is new. Below
#: it, putting the rest in front of the next receive is cheaper.
LONG = 8 * 1024


class Inbox:
    """The bytes that wait for their delimiter.

    Usually one receive is split at once and its chunks are handed out from an iterator (``feed``). A delimiter that is
    changed while chunks of a batch are still to be delivered, and a ``read()``, send the rest back (``put_back``); from then on
    this inbox finds one chunk after the other (``next``): for a stream that does so once will do so again. So it does from the
    start if the framer cannot split.

    Attributes:
        data: bytes received and not handed out, from ``start`` on.
        start: where in ``data`` the next chunk begins.
        searched: bytes behind ``start`` in which no end of a chunk was found.
        wanted: bytes from ``start`` on that the next chunk needs at least; 0 if that is not known.
        batch: what the latest split returned, of which not all chunks may have been handed out yet; or None.
        one_by_one: whether chunks are found one after the other.
        plain: whether they are not, and each chunk is one argument of on_read: what the hot path looks at.
    """

    __slots__ = ("batch", "data", "one_by_one", "plain", "searched", "start", "wanted")

    def __init__(self, one_by_one: bool = False, plain: bool = True) -> None:
        self.data: bytes | bytearray = b""
        self.start = 0
        self.searched = 0
        self.wanted = 0
        self.batch: Iterable[Any] | None = None
        self.one_by_one = one_by_one
        self.plain = plain

    def __len__(self) -> int:
        """Bytes that wait; those of a batch do not count."""
        return len(self.data) - self.start

    def feed(self, data: bytes, framer: Any) -> Iterable[Any]:
        """Take in one receive and return all chunks that are complete now, to be iterated over once.

        Args:
            data: what was received.
            framer: a Splitter, how to cut it; stays in force until all were handed out or ``put_back`` is called.
        """
        if self.data:
            self.append(data)
            waiting = self.data
            size = len(waiting) - self.start
            if size < self.wanted:
                return ()
            if waiting.__class__ is bytearray:
                found = framer.find(waiting, self.start, self.searched)
                if found.__class__ is not tuple:
                    self.searched = size
                    self.wanted = found or 0
                    return ()
                del found
            del waiting  # these may be long, and each is not to be there once more: new memory costs more than copying
            data = self.take_all()
        self.batch, self.data = framer.split(data)
        return self.batch

    def append(self, data: bytes) -> None:
        """Take in one receive without looking at it; a long unfinished chunk is collected in a bytearray."""
        waiting = self.data
        if not waiting:
            self.data = data
        elif isinstance(waiting, bytearray):
            waiting += data
        elif len(waiting) - self.start > LONG:
            self.data = bytearray(memoryview(waiting)[self.start :])
            self.data += data
            self.start = 0
        else:
            self.data = waiting[self.start :] + data
            self.start = 0

    def next(self, framer: Framer[Any] | None) -> Any:
        """Hand out one chunk, or NOTHING if none is complete. No framer: all there is."""
        data = self.data
        size = len(data)
        start = self.start
        searched = self.searched
        if not size or (searched and size - start < self.wanted):
            return NOTHING
        if framer is None:
            return self.take_all()
        found = framer.find(data, start, searched)
        if type(found) is not tuple and not isinstance(found, tuple):
            if found is not None and not isinstance(found, int):
                hint = "it returns (chunk, end), the number of bytes it needs at least, or None"
                raise TypeError(f"{framer!r}.find() returned {found!r}; {hint}")
            self.searched = size - start
            self.wanted = found or 0
            self._compact()
            return NOTHING
        chunk, end = found
        if type(end) is not int:
            raise TypeError(f"{framer!r}.find() returned {end!r} as the end of a chunk; give a position in the data, an int")
        if not start < end <= size:
            raise ValueError(f"{framer!r}.find() returned {end} as the end of a chunk that begins at {start}, of {size} bytes")
        if searched:
            self.searched = self.wanted = 0
        if end == size:
            self.data = b""
            end = 0
        self.start = end
        return chunk

    def put_back(self, framer: Any) -> None:
        """Put the chunks of the batch, if there is one, that were not handed out back in front of the waiting bytes.

        Args:
            framer: the Splitter that made the batch.
        """
        batch = self.batch
        self.batch = None
        if batch is not None:
            self.data = framer.unsplit(batch, bytes(self.data))
            self.start = 0
            self.forget_search()
        self.one_by_one = True
        self.plain = False

    def use(self, framer: Framer[Any] | None) -> None:
        """Get ready for another framer; there is no batch."""
        self.searched = self.wanted = 0
        if framer is not None and not framer.splits:
            self.one_by_one = True
        self.plain = not (self.one_by_one or (framer is not None and framer.spread))

    def begin_again(self, framer: Framer[Any] | None, one_by_one: bool = False) -> None:
        """Cut whole receives again, if the framer can: nothing waits, and what made it one chunk after the other is over.

        Args:
            one_by_one: whether something else does so still.
        """
        self.one_by_one = one_by_one
        self.use(framer)

    def forget_search(self) -> None:
        """Search from the start again: the delimiter has changed."""
        self.searched = self.wanted = 0

    def take_all(self) -> bytes:
        """Hand out everything that waits, whatever its delimiter."""
        data = self.data
        rest = bytes(memoryview(data)[self.start :]) if self.start else bytes(data)
        self.data = b""
        self.start = self.searched = self.wanted = 0
        return rest

    def _compact(self) -> None:
        # Bytes handed out are dropped when nothing more is found, once per receive and not once per chunk.
        if self.start:
            if isinstance(self.data, bytearray):
                del self.data[: self.start]
            else:
                self.data = self.data[self.start :]
            self.start = 0
