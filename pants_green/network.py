"""The old path of ``Server``, ``Connection`` and ``Client``; nothing lives here."""

from pants_green.client import Client
from pants_green.server import Connection, Server

__all__ = ["Client", "Connection", "Server"]
