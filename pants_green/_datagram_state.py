"""What a datagram channel is, apart from what it does: its settings, fields, callbacks and properties.

What it does with them is in ``datagram``.
"""

import logging
from collections import deque
from typing import Any, ClassVar, Generic

from pants_green import _packets
from pants_green._address import Address, format_address
from pants_green._callbacks import Chunk, optional
from pants_green._cutting import Encoding, ReadDelimiter, RegexSearch, framer_of, unchecked
from pants_green._delimiters import check_encoding
from pants_green._inbox import Inbox
from pants_green._lifecycle import DATAGRAM_MOVES, LISTENING, Event
from pants_green._limits import Limits, TimeLimit
from pants_green._settings import Setting, byte_count, seconds, truth
from pants_green.channel import Channel
from pants_green.errors import WriteTimeout

__all__ = ["DatagramState", "SocketOption"]


class SocketOption(Setting[Any]):
    """A setting that is one of the socket, too."""

    #: What a new socket has by itself.
    system_defaults: ClassVar[dict[str, Any]] = {
        "broadcast": False,
        "multicast_ttl": 1,
        "multicast_loop": True,
        "multicast_interface": None,
    }

    def __set__(self, instance: Any, value: Any) -> None:
        value = self.check(f"{type(instance).__name__}.{self.name}", value)
        if instance._socket is not None:
            _packets.set_option(instance._socket, self.name, value)
        setattr(instance, self.slot, value)


def _hops(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a number of routers, an int, not {value!r}")
    if not 0 <= value <= 255:
        raise ValueError(f"{name} is between 0 (this machine) and 255, not {value}")
    return value


def _interface(name: str, value: Any) -> Any:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, str))):
        raise TypeError(f"{name} is the name or number of an interface, for IPv4 also its address, or None, not {value!r}")
    if isinstance(value, int) and not 0 < value < 2**31:
        raise ValueError(f"{name} as a number is at least 1, not {value!r}")
    return value


class PacketCallbacks(Channel, Generic[Chunk]):
    """What a subclass of Datagram may override, besides ``on_close``."""

    __slots__ = ()

    _timeout_error: WriteTimeout | None = None

    def on_listen(self) -> None:
        """The channel receives packets from now on.

        *When*: once; before ``listen()`` returns; after ``connect()`` and the first ``write()``, before any packet.
        *Runs in*: the greenlet that called ``listen()``; else the channel's own.
        *Socket*: bound; `local_address` is known.
        """

    def on_read(self, *data: Chunk.args, **none: Chunk.kwargs) -> None:
        """A packet has arrived, or a chunk of one: override it as ``on_read(self, data)``.

        `data` is bytes, or what `read_delimiter` and `encoding` make of them, as for a stream.

        *When*: for each packet, also an empty one; with a `read_delimiter` for each chunk in it.
        *Runs in*: the channel's own greenlet; it may block, and nothing more is received meanwhile.
        *Socket*: open; `remote_address` is the sender's.
        """
        self.handle_read(*data, **none)

    def handle_read(self, *data: Chunk.args, **none: Chunk.kwargs) -> None:
        """The oldest name of ``on_read``."""

    def on_read_error(self, exception: Exception) -> None:
        """A packet could not be cut or decoded, or the network tells of one that was sent; by default this is logged.

        The latter only after ``connect()``: a ConnectionRefusedError says that nobody listens there (yet).

        *When*: after the chunks that could be cut; for the network's errors when they come.
        *Runs in*: the channel's own greenlet.
        *Socket*: open, unless `closed`.

        Args:
            exception: a ValueError as a rule, or an OSError.
        """
        level = logging.DEBUG if isinstance(exception, OSError) else logging.WARNING
        self._log(level, "reading failed: %s", exception, event="read_error")

    @optional("_write_heard")
    def on_write(self) -> None:
        """Everything that was written has been handed to the kernel, but for what waits for a name.

        *When*: once after one or several writes, never inside ``write()``.
        *Runs in*: the channel's own greenlet, after the callback that is running.
        *Socket*: open.
        """
        self.handle_write()

    @optional("_write_heard")
    def handle_write(self) -> None:
        """The oldest name of ``on_write``."""

    def on_write_error(self, exception: OSError) -> None:
        """A packet could not be sent: its name is not known, or there is no way to its address; by default this is logged.

        *When*: soon after the ``write()``.
        *Runs in*: the channel's own greenlet.
        *Socket*: open, unless `closed`.
        """
        self._log(logging.WARNING, "%s", exception, event="write_error")

    def on_timeout(self, which: str) -> None:
        """Nothing could be sent for `write_timeout` seconds, and what waited was dropped; by default this is logged.

        *When*: when that has happened; `which` is "write".
        *Runs in*: the channel's own greenlet.
        *Socket*: open, unless the channel was ending.
        """
        self._log(logging.WARNING, "%s", self._timeout_error, event="timeout")

    def on_error(self, exception: BaseException) -> None:
        """A callback raised; by default it is logged, and the channel stays open, for it is not one peer's.

        *When*: right after the callback that raised.
        *Runs in*: the same greenlet.
        *Socket*: as the callback left it. After a ``gevent.Timeout`` or ``GreenletExit`` the channel is closed.
        """
        self._log(logging.ERROR, "%s raised %r", self._failing or "a callback", exception, event="callback_error", exc_info=exception)


class DatagramState(PacketCallbacks[Chunk]):
    """The fields of a datagram channel. Settings have theirs under their own names, with an underscore.

    Attributes:
        _framer: cuts packets; None does not. _plain: whether they are delivered as they are. _inbox: what is left of the packet at hand.
        _outbox: what waits to be sent, as pairs of data and receiver; _names: what waits for a name; _pending: what both count.
        _stuck: for a Unix socket, the receivers of what is in the outbox: each has room, or none, of its own.
        _sending: whether the write watcher, or a timer, waits for the kernel to take more. _retry: seconds of that timer, 0.0
            while the watcher can be relied on.
        _known: addresses as ``write()`` was given them, and as the system wants them.
        _sender: who sent the packet at hand. _peer: who alone is spoken to, after ``connect()``.
        _told: whether on_close has been called or is not to be. _write_told: whether on_write is due.
        _write_heard: whether on_write is overridden, without which it is not called.
        _recvfrom, _sendto, _reader, _writer: the world. None while there is no socket.
        _file: the file that a Unix socket is bound to.
    """

    __slots__ = (
        "_family",
        "_file",
        "_inbox",
        "_known",
        "_limits",
        "_names",
        "_outbox",
        "_peer",
        "_pending",
        "_plain",
        "_reader",
        "_recvfrom",
        "_retry",
        "_sender",
        "_sending",
        "_sendto",
        "_stuck",
        "_told",
        "_write_heard",
        "_write_told",
        "_writer",
    )

    _logger = logging.getLogger("pants_green.datagram")

    #: What cuts a packet into chunks, each of them one ``on_read``; None: the packet as it is. The same kinds as a stream's. The
    #: end of the packet ends its last chunk, too, where chunks end in a delimiter or a match; elsewhere bytes that are left over
    #: are an error, see ``on_read_error``. Nothing of a packet is kept for the next.
    read_delimiter = ReadDelimiter(None, unchecked)

    #: Whether a pattern is searched for, and ``on_read`` gets what is before it; else it gets the match object.
    regex_search = RegexSearch(True, truth)

    #: The encoding of the text that ``on_read`` gets instead of bytes, and in which a str is sent; None: bytes, and UTF-8.
    encoding = Encoding(None, check_encoding)

    #: Bytes that may wait to be sent, each packet counting 64 more; a ``write()`` for which there is no room is dropped, as
    #: networks do, and counted in `writes_dropped`.
    write_limit: Setting[int] = Setting(1024 * 1024, byte_count)

    #: Seconds after which what waits is dropped if nothing of it could be sent; None: no limit. See ``on_timeout``.
    write_timeout: Setting[float | None] = TimeLimit(60.0, seconds)

    #: Whether packets may go to a broadcast address, such as ``("<broadcast>", port)``.
    broadcast: Setting[bool] = SocketOption(False, truth)

    #: Routers that a multicast packet passes at most: 0 this machine, 1 this network.
    multicast_ttl: Setting[int] = SocketOption(1, _hops)

    #: Whether multicast packets come to members on this very machine, too.
    multicast_loop: Setting[bool] = SocketOption(True, truth)

    #: The interface by which multicast packets leave: its name, its number, for IPv4 also its address; None: the system chooses.
    multicast_interface: Setting[Any] = SocketOption(None, _interface)

    _watched = frozenset({"on_write", "handle_write"})

    _framer: ClassVar[Any]
    _write_expected: ClassVar[bool]
    _encoding: str | None
    _write_limit: int
    _write_timeout: float | None
    _broadcast: bool
    _writes_dropped = 0
    _retry_timer: Any = None

    @classmethod
    def _settled(cls) -> None:
        cls._read_delimiter = cls.read_delimiter
        cls._regex_search = cls.regex_search
        cls._encoding = cls.encoding
        cls._framer = framer_of(cls, cls.read_delimiter, cls.encoding, cls.regex_search)
        for name in ("write_limit", "write_timeout", "broadcast", "multicast_ttl", "multicast_loop", "multicast_interface"):
            setattr(cls, "_" + name, getattr(cls, name))
        cls._write_expected = cls.on_write is not PacketCallbacks.on_write or cls.handle_write is not PacketCallbacks.handle_write

    def __init__(self, family: int | None, engine: Any) -> None:
        super().__init__(engine)
        if family is not None and family not in _packets.FAMILIES:
            raise ValueError(f"{type(self).__name__}(family=) takes socket.AF_INET, AF_INET6 or AF_UNIX, not {family!r}")
        self._family = family
        self._inbox = Inbox(one_by_one=True, plain=False)
        self._outbox: deque[tuple[bytes, Any]] = deque()
        self._stuck: set[Any] = set()
        self._pending = 0
        self._known: dict[Any, Any] = {}
        self._names: dict[Address, list[bytes]] = {}
        self._peer: Any = None
        self._plain = self._framer is None and self._encoding is None
        self._sender: Any = None
        self._sending = False
        self._retry = 0.0
        self._limits: Limits | None = None
        self._file: Any = None
        self._told = False
        self._write_told = False
        self._write_heard = self._write_expected
        self._recvfrom: Any = None
        self._sendto: Any = None
        self._reader: Any = None
        self._writer: Any = None

    # ---- what it is

    @property
    def listening(self) -> bool:
        """Whether packets come in: from ``listen()``, ``connect()`` or the first ``write()`` on."""
        return self._state is LISTENING

    @property
    def connected(self) -> bool:
        """Whether ``connect()`` has tied the channel to one peer, and it is open."""
        return self._peer is not None and self._state is LISTENING

    @property
    def remote_address(self) -> Any:
        """In ``on_read`` the sender's address, ``(host, port)`` or with four elements for IPv6; else that of ``connect()``, or None."""
        return self._peer if self._sender is None else self._sender

    @property
    def writes_dropped(self) -> int:
        """How many packets were dropped: they had waited too long, or there was no room for them, or for the error that tells of them."""
        return self._writes_dropped

    def _describe(self) -> str:
        text = super()._describe()
        return text if self._peer is None else f"{text} to {format_address(self._peer)}"

    # ---- what moves it

    def _move(self, event: Event) -> None:
        try:
            self._state = DATAGRAM_MOVES[self._state, event]
        except KeyError:
            self._refuse_move(event)

    def _interrupt(self) -> None:
        """Make the greenlet look up from its wait."""
        if not self._told and (self._waiting or self._greenlet is None):
            self._alert()

    def _post(self, name: str, *args: Any) -> None:
        if not self._told:
            super()._post(name, *args)

    def _cut_by(self, delimiter: Any, encoding: str | None, regex_search: bool) -> None:
        """Cut packets in another way, from the next chunk on."""
        self._framer = framer_of(type(self), delimiter, encoding, regex_search)  # type: ignore[misc]
        self._plain = delimiter is None and encoding is None
        self._inbox.forget_search()
