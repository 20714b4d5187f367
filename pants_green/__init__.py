"""Callback networking on gevent: engines, channels, timers; every connection in a greenlet of its own."""

import logging

from pants_green import engine
from pants_green._lifecycle import CloseReason
from pants_green._tls_socket import TLSSocket
from pants_green.client import Client, ReconnectingClient
from pants_green.datagram import Datagram
from pants_green.engine import Engine
from pants_green.errors import (
    CallbackTimeout,
    ChannelClosed,
    ChannelStateError,
    DatagramTooLong,
    HandshakeTimeout,
    IdleTimeout,
    InvalidAddressFormatError,
    InvalidReadDelimiterError,
    PantsError,
    ProxyHeaderError,
    ReadTimeout,
    StreamBufferOverflow,
    StreamConnectError,
    WriteTimeout,
    WrongThreadError,
)
from pants_green.server import Connection, Server, StreamServer
from pants_green.stream import Stream
from pants_green.unix import UnixClient, UnixConnection, UnixServer

__all__ = [
    "CallbackTimeout",
    "ChannelClosed",
    "ChannelStateError",
    "Client",
    "CloseReason",
    "Connection",
    "Datagram",
    "DatagramTooLong",
    "Engine",
    "HandshakeTimeout",
    "IdleTimeout",
    "InvalidAddressFormatError",
    "InvalidReadDelimiterError",
    "PantsError",
    "ProxyHeaderError",
    "ReadTimeout",
    "ReconnectingClient",
    "Server",
    "Stream",
    "StreamBufferOverflow",
    "StreamConnectError",
    "StreamServer",
    "TLSSocket",
    "UnixClient",
    "UnixConnection",
    "UnixServer",
    "WriteTimeout",
    "WrongThreadError",
    "engine",
]

__version__ = "0.1.0"

logging.getLogger("pants_green").addHandler(logging.NullHandler())
