"""Pending output, in order; pure: who sends it, and when, is not known here."""

__all__ = ["Outbox"]

#: Bytes that are joined for one send. Joining more copies what the kernel will not take at once anyway.
JOIN_LIMIT = 256 * 1024


class Outbox:
    """What a stream still has to send.

    The hot path appends to ``items`` in place, and counts the bytes itself; everybody else calls the methods.

    Attributes:
        items: the pieces, oldest first; the first may be a memoryview of what the kernel left of it.
    """

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[bytes | memoryview] = []

    def head(self, size: int) -> bytes | memoryview:
        """Return what should be sent next: small pieces joined, a large one as it is.

        Args:
            size: bytes of all pieces together.

        Returns:
            bytes-like, at most JOIN_LIMIT bytes unless a single piece is longer; empty if nothing is pending.
        """
        items = self.items
        while items and not items[0]:
            del items[0]
        if len(items) < 2:
            return items[0] if items else b""
        if size <= JOIN_LIMIT:
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
        first = items[0]
        if count == len(first):
            del items[0]
        else:
            items[0] = memoryview(first)[count:]
