"""What a stream is, apart from what it does: its fields, settings, properties and state.

What it does with them is in ``stream``.
"""

import logging
from typing import TYPE_CHECKING, Any, ClassVar

from pants_green import _sockets
from pants_green._address import format_address
from pants_green._callbacks import StreamCallbacks
from pants_green._lifecycle import CONNECTING, STREAM_MOVES, Event
from pants_green._outbox import Outbox
from pants_green._settings import Setting, byte_count
from pants_green.channel import Channel
from pants_green.framing import Inbox, framer_for

if TYPE_CHECKING:
    from pants_green.server import Server

__all__ = ["INTERRUPTED", "KIB", "RECEIVE_LEAST", "REFUSED", "StreamState"]

KIB = 1024

#: Bytes of the smallest receive, with which a stream begins.
RECEIVE_LEAST = 4 * KIB

#: What stands in the place of the delimiter when there is more to look at than the next chunk: something was posted, or the
#: stream is not read any more. So the hot loop has one identity check per chunk.
INTERRUPTED: Any = type("Interrupted", (), {"__slots__": (), "__repr__": lambda self: "<interrupted>"})()

#: What stands in the place of the outbox's list while nothing may be written.
REFUSED: Any = ()


def _delimiter(name: str, value: Any) -> Any:
    framer_for(value)
    return value


class ReadDelimiter(Setting[Any]):
    """What ends a chunk; setting it takes effect with the very next chunk."""

    def __set__(self, instance: Any, value: Any) -> None:
        current = instance._read_delimiter
        if value is current or (type(value) is type(current) and value == current):
            return
        framer = framer_for(value)
        instance._read_delimiter = value
        instance._framer = framer
        if instance._active is not INTERRUPTED:
            instance._active = framer
        inbox = instance._inbox
        inbox.forget_search()
        if inbox and instance._waiting:
            # It waits for more, but by the new delimiter it may have a chunk already.
            instance._interrupt()


class StreamState(StreamCallbacks):
    """The fields of a stream."""

    __slots__ = (
        "_active",
        "_buffer_size",
        "_end_heard",
        "_framer",
        "_high_water",
        "_inbox",
        "_key",
        "_low_water",
        "_out",
        "_outbox",
        "_peer_ended",
        "_read_delimiter",
        "_reader",
        "_receive_size",
        "_recv",
        "_remote",
        "_remote_override",
        "_room_at",
        "_send",
        "_sending",
        "_server",
        "_told",
        "_write_heard",
        "_writer",
    )

    _logger = logging.getLogger("pants_green.stream")

    #: What ends a chunk. None: whatever arrives is delivered at once. bytes or str (UTF-8): everything before it, without
    #: it. int: so many bytes. On the class or on an instance; in a callback it holds from the next chunk on.
    read_delimiter = ReadDelimiter(None, _delimiter)

    #: Bytes that may wait for their delimiter; more are an overflow. A size given as delimiter raises it to itself.
    buffer_size: Setting[int] = Setting(64 * KIB, byte_count)

    #: Bytes in the outbox above which a stream whose callbacks answer input by output stops reading, and below which it
    #: reads on.
    high_water: Setting[int] = Setting(256 * KIB, byte_count)
    low_water: Setting[int] = Setting(64 * KIB, byte_count)

    #: Whether the stream stays open, for writing, when the peer has ended its side.
    allow_half_open: bool = False

    _watched = frozenset({"on_write", "handle_write", "on_end"})

    #: The values of the settings above that a new instance begins with.
    _initial: ClassVar[tuple[Any, ...]]

    @classmethod
    def _settled(cls) -> None:
        """Work out once for the class what every instance would have to look up."""
        delimiter = cls.read_delimiter
        framer = framer_for(delimiter)
        write_heard = cls.on_write is not StreamCallbacks.on_write or cls.handle_write is not StreamCallbacks.handle_write
        end_heard = cls.on_end is not StreamCallbacks.on_end
        cls._initial = (delimiter, framer, framer, cls.buffer_size, cls.high_water, cls.low_water, write_heard, end_heard)

    def __init__(self, server: "Server | None", engine: Any) -> None:
        try:
            Channel.__init__(self, server._engine if engine is None and server is not None else engine)
        except AttributeError:
            raise TypeError(f"server= takes the server that accepted the socket, not {server!r}") from None
        (
            self._read_delimiter,
            self._framer,
            self._active,
            self._buffer_size,
            self._high_water,
            self._low_water,
            self._write_heard,
            self._end_heard,
        ) = self._initial
        self._server = server
        self._key: int | None = None
        self._remote: Any = None
        self._remote_override: Any = None
        self._inbox = Inbox()
        self._receive_size = RECEIVE_LEAST
        self._peer_ended = False
        self._outbox = Outbox()
        self._out: Any = REFUSED
        self._sending = False
        self._room_at = -1
        self._told = False
        self._recv: Any = None
        self._send: Any = None
        self._reader: Any = None
        self._writer: Any = None

    # ---- what it is

    @property
    def server(self) -> Any:
        """The server that accepted this stream; None for one that dialled."""
        return self._server

    @property
    def connected(self) -> bool:
        """Whether the connection stands: from just before ``on_connect`` until its end begins."""
        return self._state.connected

    @property
    def connecting(self) -> bool:
        """Whether ``connect()`` is at work."""
        return self._state is CONNECTING

    @property
    def local_address(self) -> Any:
        """This end's address, ``(host, port)`` or with four elements for IPv6; still known in ``on_close``."""
        if self._local is None and self._socket is not None and self._state is not CONNECTING:
            self._local = _sockets.local_sockaddr(self._socket)
        return self._local

    @property
    def remote_address(self) -> Any:
        """The peer's address, ``(host, port)`` or with four elements for IPv6; still known in ``on_close``.

        Assign another to it, and ``del`` it to have the real one back.
        """
        return self._remote if self._remote_override is None else self._remote_override

    @remote_address.setter
    def remote_address(self, address: Any) -> None:
        self._remote_override = address

    @remote_address.deleter
    def remote_address(self) -> None:
        self._remote_override = None

    def _describe(self) -> str:
        remote = self.remote_address
        return self._state.value if remote is None else f"{self._state.value} to {format_address(remote)}"

    # ---- what moves it

    def _move(self, event: Event) -> None:
        try:
            state = self._state = STREAM_MOVES[self._state, event]
        except KeyError:
            self._refuse_move(event)
        self._out = self._outbox.items if state.writable else REFUSED
        if self._server is not None:
            self._server._place(self, state)

    def _interrupt(self) -> None:
        """Make the greenlet look up from its reading, wherever it is."""
        if not self._told:
            self._active = INTERRUPTED
            if self._waiting or self._greenlet is None:
                self._alert()

    def _post(self, name: str, *args: Any) -> None:
        if not self._told:
            self._active = INTERRUPTED
            super()._post(name, *args)
