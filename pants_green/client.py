"""Clients: the end of a connection that dials."""

from pants_green.stream import Stream

__all__ = ["Client"]


class Client(Stream):
    """A Stream that is meant to ``connect()``."""

    __slots__ = ()
