"""Pending output, in order, and its byte count; pure: who sends it, and when, is not known here."""

__all__ = ["Outbox"]

#: Bytes that are joined for one send. Joining more copies what the kernel will not take at once anyway.
JOIN_LIMIT = 256 * 1024


class Outbox:
    """What a stream still has to send.

    The hot path appends to ``items`` and adds to ``size`` in place; everybody else calls the methods.

    Attributes:
        items: the pieces, oldest first; the first may be a memoryview of what the kernel left of it.
        size: bytes in all pieces together.
    """

    __slots__ = ("items", "size")

    def __init__(self) -> None:
        self.items: list[bytes | memoryview] = []
        self.size = 0

    def put(self, data: bytes) -> None:
        """Append one piece."""
        self.items.append(data)
        self.size += len(data)

    def head(self) -> bytes | memoryview:
        """Return what should be sent next: small pieces joined, a large one as it is.

        Returns:
            bytes-like, at most JOIN_LIMIT bytes unless a single piece is longer; empty if nothing is pending.
        """
        items = self.items
        while items and not items[0]:
            del items[0]
        if len(items) < 2:
            return items[0] if items else b""
        if self.size <= JOIN_LIMIT:
            joined = b"".join(items)
            items[:] = [joined]
            return joined
        total = 0
        for count, item in enumerate(items):
            total += len(item)
            if total > JOIN_LIMIT:
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
        self.size -= count
        first = items[0]
        if count == len(first):
            del items[0]
        else:
            items[0] = memoryview(first)[count:]

    def clear(self) -> int:
        """Forget everything and return how many bytes that was."""
        dropped = self.size
        self.items.clear()
        self.size = 0
        return dropped
