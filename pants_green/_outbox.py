"""Pending output, in order; pure: who sends it, and when, is not known here."""

from typing import Any

__all__ = ["FileItem", "Outbox"]

#: Bytes that are joined for one send. Joining more copies what the kernel will not take at once anyway.
JOIN_LIMIT = 256 * 1024


class FileItem:
    """A part of a file, in the place of its bytes.

    Args:
        file: the open file, which is this item's own; it has ``fileno()`` and ``close()``.
        offset: where the part begins.
        size: its bytes.

    Attributes:
        offset, size: of what is left to be sent.
        ahead: bytes at `offset` that have been read already, where the kernel cannot send them itself.
        to_be_read: whether it cannot.
    """

    __slots__ = ("_file", "ahead", "offset", "size", "to_be_read")

    def __init__(self, file: Any, offset: int, size: int) -> None:
        self._file = file
        self.offset = offset
        self.size = size
        self.ahead: bytes | memoryview = b""
        self.to_be_read = False

    def __len__(self) -> int:
        return self.size

    def fileno(self) -> int:
        """Return the descriptor."""
        return int(self._file.fileno())

    def advance(self, count: int) -> None:
        """Drop the first `count` bytes: the kernel has them."""
        self.offset += count
        self.size -= count

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Outbox:
    """What a stream still has to send.

    The hot path appends to ``items`` in place, and counts the bytes itself; everybody else calls the methods.

    Attributes:
        items: the pieces, oldest first; the first may be a memoryview of what the kernel left of it.
        files: how many of them are parts of files.
    """

    __slots__ = ("files", "items")

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.files = 0

    def head(self, size: int) -> Any:
        """Return what should be sent next: small pieces joined, a large one, and a part of a file, as it is.

        Args:
            size: bytes of all pieces together.

        Returns:
            bytes-like, at most JOIN_LIMIT bytes unless a single piece is longer; empty if nothing is pending; or a FileItem.
        """
        items = self.items
        while items and not items[0]:
            del items[0]
        if len(items) < 2:
            return items[0] if items else b""
        if size <= JOIN_LIMIT and not self.files:
            joined = b"".join(items)
            items[:] = [joined]
            return joined
        total = 0
        for count, item in enumerate(items):
            total += len(item)
            if total > JOIN_LIMIT or item.__class__ is FileItem:
                break
        if count < 2:
            return items[0]
        joined = b"".join(items[:count])
        items[:count] = [joined]
        return joined

    def sent(self, count: int) -> None:
        """Drop the first `count` bytes: the kernel has them. `count` is at most the length of the head."""
        items = self.items
        if not count:
            return
        first = items[0]
        if count == len(first):
            del items[0]
        elif first.__class__ is FileItem:
            first.advance(count)
        else:
            items[0] = memoryview(first)[count:]

    def clear(self) -> None:
        """Drop everything."""
        if self.files:
            for item in self.items:
                if item.__class__ is FileItem:
                    item.close()
            self.files = 0
        self.items.clear()
