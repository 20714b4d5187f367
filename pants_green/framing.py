"""Bytes in, chunks out: how a stream is cut into what ``on_read`` gets; pure.

A ``Framer`` knows one kind of delimiter. An ``Inbox`` holds the bytes that wait for theirs. Neither knows a socket, a
callback or a greenlet; who receives and who is called is the business of ``stream``.
"""

from collections.abc import Iterator
from functools import lru_cache
from operator import itemgetter
from struct import Struct
from typing import Any, Protocol

from pants_green.errors import ReadDelimiterTypeError, ReadDelimiterValueError

__all__ = ["NOTHING", "Delimited", "Fixed", "Framer", "Inbox", "framer_for"]

#: Takes the only field out of what ``Struct.iter_unpack`` yields, at the speed of C.
first = itemgetter(0)

#: What ``Inbox.next`` returns when no chunk is complete.
NOTHING: Any = type("Nothing", (), {"__slots__": (), "__repr__": lambda self: "<nothing>"})()

#: Bytes of one unfinished chunk from which on it is collected in a bytearray and searched only where it is new. Below
#: it, putting the rest in front of the next receive is cheaper.
LONG = 8 * 1024


class Framer(Protocol):
    """One way of cutting a stream into chunks.

    Attributes:
        least: bytes that a chunk needs before it can be complete; ``buffer_size`` is raised to it.
    """

    least: int

    def split(self, data: bytes) -> tuple[Iterator[Any], bytes]:
        """Cut `data` into all its complete chunks at once.

        Returns:
            an iterator over the chunks, and the bytes behind the last of them.
        """

    def unsplit(self, chunks: Iterator[Any], rest: bytes) -> bytes:
        """Put what is left of a ``split`` together again, as it was received."""

    def find(self, data: bytes | bytearray, start: int, searched: int) -> tuple[Any, int] | None:
        """Look for one complete chunk in ``data[start:]``.

        Args:
            data: what has been received.
            start: where the chunk begins.
            searched: how many bytes behind `start` an earlier call has seen in vain; 0 if none.

        Returns:
            the chunk and where the next one begins, or None if it is not complete.
        """


class Delimited:
    """Chunks that end in a fixed byte string, which is dropped."""

    __slots__ = ("delimiter", "least")

    def __init__(self, delimiter: bytes) -> None:
        self.delimiter = delimiter
        self.least = len(delimiter)

    def split(self, data: bytes) -> tuple[Iterator[bytes], bytes]:
        chunks = data.split(self.delimiter)
        rest = chunks.pop()
        return iter(chunks), rest

    def unsplit(self, chunks: Iterator[bytes], rest: bytes) -> bytes:
        pieces = list(chunks)
        pieces.append(rest)
        return self.delimiter.join(pieces)

    def find(self, data: bytes | bytearray, start: int, searched: int) -> tuple[bytes, int] | None:
        # The delimiter may have begun in the last bytes that were searched before.
        end = data.find(self.delimiter, start + max(0, searched - self.least + 1))
        if end < 0:
            return None
        return bytes(memoryview(data)[start:end]), end + self.least


class Fixed:
    """Chunks of one size."""

    __slots__ = ("_unpack", "least")

    def __init__(self, size: int) -> None:
        self.least = size
        # iter_unpack is 1.4 times slicing in a loop; a size that Struct cannot hold falls back to slices.
        self._unpack = Struct(f"{size}s").iter_unpack if size <= LONG else None

    def split(self, data: bytes) -> tuple[Iterator[bytes], bytes]:
        size = self.least
        whole = len(data) - len(data) % size
        if not whole:
            return iter(()), data
        rest = data[whole:]
        if self._unpack is None:
            return (data[start : start + size] for start in range(0, whole, size)), rest
        return map(first, self._unpack(data if whole == len(data) else data[:whole])), rest

    def unsplit(self, chunks: Iterator[bytes], rest: bytes) -> bytes:
        pieces = list(chunks)
        pieces.append(rest)
        return b"".join(pieces)

    def find(self, data: bytes | bytearray, start: int, searched: int) -> tuple[bytes, int] | None:
        end = start + self.least
        if len(data) < end:
            return None
        return bytes(memoryview(data)[start:end]), end


class Inbox:
    """The bytes that wait for their delimiter.

    Usually one receive is split at once and its chunks are handed out from an iterator (``feed``). A delimiter that is
    changed while chunks of a batch are still to be delivered sends the rest back (``put_back``), and from then on this
    inbox finds one chunk after the other (``next``): for a stream that does so once will do so again.

    Attributes:
        data: bytes received and not handed out, from ``start`` on.
        start: where in ``data`` the next chunk begins.
        searched: bytes behind ``start`` in which no end of a chunk was found.
        batch: the chunks of the latest split that are not handed out yet, or None.
        one_by_one: whether chunks are found one after the other.
    """

    __slots__ = ("batch", "data", "one_by_one", "searched", "start")

    def __init__(self) -> None:
        self.data: bytes | bytearray = b""
        self.start = 0
        self.searched = 0
        self.batch: Iterator[Any] | None = None
        self.one_by_one = False

    def __len__(self) -> int:
        """Bytes that wait; those of a batch do not count."""
        return len(self.data) - self.start

    def feed(self, data: bytes, framer: Framer) -> Iterator[Any]:
        """Take in one receive and return an iterator over all chunks that are complete now.

        Args:
            data: what was received.
            framer: how to cut it; stays in force until the iterator is used up or ``put_back`` is called.
        """
        if self.data:
            self.append(data)
            if isinstance(self.data, bytearray) and framer.find(self.data, self.start, self.searched) is None:
                self.searched = len(self.data) - self.start
                return iter(())
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

    def next(self, framer: Framer | None) -> Any:
        """Hand out one chunk, or NOTHING if none is complete. No framer: all there is."""
        if framer is None:
            return self.take_all() if self else NOTHING
        found = framer.find(self.data, self.start, self.searched)
        if found is None:
            self.searched = len(self.data) - self.start
            self._compact()
            return NOTHING
        chunk, self.start = found
        self.searched = 0
        if self.start == len(self.data):
            self.data = b""
            self.start = 0
        return chunk

    def put_back(self, framer: Framer) -> None:
        """Put the chunks of the batch that were not handed out back in front of the waiting bytes."""
        batch = self.batch
        self.batch = None
        if batch is not None:
            self.data = framer.unsplit(batch, bytes(self.data))
            self.start = self.searched = 0
        self.one_by_one = True

    def forget_search(self) -> None:
        """Search from the start again: the delimiter has changed."""
        self.searched = 0

    def take_all(self) -> bytes:
        """Hand out everything that waits, whatever its delimiter."""
        data = self.data
        rest = bytes(memoryview(data)[self.start :]) if self.start else bytes(data)
        self.data = b""
        self.start = self.searched = 0
        return rest

    def _compact(self) -> None:
        # Bytes handed out are dropped when nothing more is found, once per receive and not once per chunk.
        if self.start:
            if isinstance(self.data, bytearray):
                del self.data[: self.start]
            else:
                self.data = self.data[self.start :]
            self.start = 0


def framer_for(delimiter: Any) -> Framer | None:
    """Return the framer of a read delimiter; None for None, which delivers whatever arrives.

    Framers hold no state, so equal delimiters share one.

    Args:
        delimiter: None; bytes or str (UTF-8) that end a chunk; an int, the size of every chunk in bytes.

    Raises:
        ReadDelimiterValueError: it could never end a chunk: empty, zero, negative.
        ReadDelimiterTypeError: no kind of delimiter has this type.
    """
    try:
        return _framer_for(delimiter)
    except ReadDelimiterTypeError:
        raise
    except TypeError:
        raise _no_such_kind(delimiter) from None  # unhashable


@lru_cache(maxsize=256, typed=True)
def _framer_for(delimiter: Any) -> Framer | None:
    if delimiter is None:
        return None
    if isinstance(delimiter, str):
        delimiter = delimiter.encode()
    if isinstance(delimiter, bytes):
        if not delimiter:
            raise ReadDelimiterValueError("an empty read_delimiter would match everywhere; None delivers whatever arrives")
        return Delimited(bytes(delimiter))
    if isinstance(delimiter, int) and not isinstance(delimiter, bool):
        if delimiter < 1:
            raise ReadDelimiterValueError(f"read_delimiter is {delimiter}; as a size of chunks in bytes it is at least 1")
        return Fixed(int(delimiter))
    raise _no_such_kind(delimiter)


def _no_such_kind(delimiter: Any) -> ReadDelimiterTypeError:
    kind = type(delimiter).__name__
    return ReadDelimiterTypeError(f"read_delimiter is {delimiter!r}, of type {kind}; give None, bytes, str, or a number of bytes as int")
