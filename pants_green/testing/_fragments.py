"""The ways in which a network can cut bytes; pure."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

__all__ = ["fragmentations"]

#: Bytes up to which every cut into two, and the cut into single bytes, is worth its while.
SHORT = 256

#: Sizes of equal pieces that meet the usual delimiters and buffers at every offset.
SIZES = (2, 3, 5, 7, 11, 13, 64, 1460, 4096, 65536)


def fragmentations(data: bytes) -> Iterator[list[bytes]]:
    """Yield the ways in which a network may cut `data`.

    As a whole; one byte at a time; every cut into two; pieces of equal size; each byte on either side of the middle and of
    both ends as a piece of its own. No way comes twice. Of data longer than 256 bytes only some cuts into two are made,
    near both ends, the middle and powers of two; and a single byte at a time only up to 64 KiB.

    Args:
        data: bytes of any length; empty data has one fragmentation, no piece at all.

    Yields:
        lists of pieces, none of them empty, that make `data` when joined.
    """
    data = bytes(data)
    seen: set[tuple[int, ...]] = set()
    for cuts in _ways(len(data)):
        kept = tuple(sorted({cut for cut in cuts if 0 < cut < len(data)}))
        if kept not in seen:
            seen.add(kept)
            yield _cut(data, kept)


def _ways(size: int) -> Iterator[Iterable[int]]:
    """Yield sets of cutting positions, doubles and positions outside included."""
    yield ()
    if size <= 65536:
        yield range(1, size)
    places = range(1, size) if size <= SHORT else _likely_places(size)
    for place in places:
        yield (place,)
    for width in SIZES:
        if width < size and size // width <= 65536:
            yield range(width, size, width)
    for place in (1, size // 2, size - 1):
        # Two cuts next to each other: one byte alone, and what a reader that handles one receive at a time sees around it.
        yield (place, place + 1)
        yield (place - 1, place, place + 1)


def _likely_places(size: int) -> list[int]:
    places = {*range(1, 9), *range(size - 8, size), *range(size // 2 - 2, size // 2 + 3)}
    power = 16
    while power < size:
        places.update((power - 1, power, power + 1))
        power *= 2
    return sorted(places)


def _cut(data: bytes, places: tuple[int, ...]) -> list[bytes]:
    if not data:
        return []
    edges = (0, *places, len(data))
    return [data[begin:end] for begin, end in pairwise(edges)]
