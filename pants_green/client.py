"""Clients: the end of a connection that dials."""

from pants_green._callbacks import Chunk
from pants_green.stream import Stream

__all__ = ["Client"]


class Client(Stream[Chunk]):
    """A Stream that is meant to ``connect()``."""

    __slots__ = ()
