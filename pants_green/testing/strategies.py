"""Hypothesis strategies; needs the package ``hypothesis``."""

from itertools import pairwise

from hypothesis import strategies
from hypothesis.strategies import SearchStrategy

__all__ = ["fragments"]

#: Places between two bytes up to which each is cut or not by a choice of its own; of more places so many are drawn at most.
FEW = 64


@strategies.composite
def _fragments(draw: strategies.DrawFn, data: bytes | SearchStrategy[bytes]) -> list[bytes]:
    whole = data if isinstance(data, bytes) else draw(data)
    if len(whole) < 2:
        return [whole] if whole else []
    places = len(whole) - 1
    if places <= FEW:
        flags = draw(strategies.lists(strategies.booleans(), min_size=places, max_size=places))
        cuts = [place for place, cut in enumerate(flags, 1) if cut]
    else:
        cuts = sorted(draw(strategies.sets(strategies.integers(1, places), max_size=FEW)))
    edges = [0, *cuts, len(whole)]
    return [whole[begin:end] for begin, end in pairwise(edges)]


def fragments(data: bytes | SearchStrategy[bytes]) -> SearchStrategy[list[bytes]]:
    """Return a strategy of lists of non-empty pieces, as a network may cut `data`; it shrinks towards one piece.

    Args:
        data: the bytes to cut, or a strategy of them; join the pieces to have them back.
    """
    return _fragments(data)
