"""What a stream is, apart from what it does: its fields, settings, properties and state.

What it does with them is in ``stream``.
"""

import logging
from typing import TYPE_CHECKING, Any, ClassVar

from pants_green import _sockets
from pants_green._address import Address, format_address
from pants_green._callbacks import Chunk, StreamCallbacks
from pants_green._cutting import Encoding, ReadDelimiter, RegexSearch, framer_of, unchecked
from pants_green._delimiters import Incremental, check_encoding
from pants_green._inbox import Inbox
from pants_green._lifecycle import CONNECTING, STREAM_MOVES, Event
from pants_green._limits import Limits, TimeLimit
from pants_green._meter import Meter
from pants_green._outbox import Outbox
from pants_green._settings import Setting, byte_count, one_of, per_second, seconds, truth
from pants_green._tls import Filter
from pants_green._tls_options import TLSOptions
from pants_green.channel import Channel
from pants_green.framing import Framer

if TYPE_CHECKING:
    from pants_green.server import Server

__all__ = ["INTERRUPTED", "KIB", "RECEIVE_LEAST", "REFUSED", "TURN", "StreamState"]

KIB = 1024
MIB = 1024 * KIB

#: Bytes of the smallest receive, with which a stream begins.
RECEIVE_LEAST = 4 * KIB

#: What the greenlet's attention is on, if there is more to look at than the next chunk: another delimiter, something that was
#: posted, the end of reading. Else it is None, so that the hot loop has one check per chunk.
INTERRUPTED: Any = type("Interrupted", (), {"__slots__": (), "__repr__": lambda self: "<interrupted>"})()

#: Seconds for which a stream that fills every receive goes on before the others get their turn. Shorter turns are fairer
#: and slower, for each stream finds its data gone from the cache: bulk 1.49 of raw gevent without any limit, 1.41 with
#: this one, 0.83 with 1 ms.
TURN = 0.01

#: What stands in the place of the outbox's list while nothing may be written.
REFUSED: Any = ()


class Mark(Setting[int]):
    """Bytes in the outbox above which something happens."""

    def __set__(self, instance: Any, value: Any) -> None:
        super().__set__(instance, value)
        instance._mark = min(instance._high_water, instance._write_limit)


class Measured(Setting[float | None]):
    """A limit for which somebody has to look at what comes and goes."""

    def __set__(self, instance: Any, value: Any) -> None:
        super().__set__(instance, value)
        instance._measure()


class CountedSetting(Setting[float | None]):
    """A limit for which somebody has to look at every callback."""

    def __set__(self, instance: Any, value: Any) -> None:
        super().__set__(instance, value)
        instance._count()


class Whole(Framer[bytes]):
    """Chunks as they come, one by one: what no delimiter makes of the input, for those who count."""

    __slots__ = ()

    def find(self, data: bytes | bytearray, start: int, searched: int) -> tuple[bytes, int]:
        return bytes(memoryview(data)[start:]), len(data)


WHOLE = Whole()


class StreamState(StreamCallbacks[Chunk]):
    """The fields of a stream. Settings have theirs under their own names, with an underscore.

    Attributes:
        _attention: INTERRUPTED if the greenlet has to look up from its chunks, else None.
        _framer: cuts the input; None delivers whatever arrives.
        _inbox: what waits to be cut. _receive_size: bytes of the next receive at most.
        _outbox, _pending: what waits to be sent, and its bytes. _out: the outbox's list while it may be added to, else REFUSED.
        _mark: bytes pending above which a write() looks closer. _own_output: how many of the own callbacks' writes, since the
            latest receive, left more than that.
        _sending: whether the write watcher waits for the kernel to take more.
        _room_at: bytes pending at which somebody is to be told that there is room; -1 if nobody waits for it. _own_mark: the
            same for the stream's own greenlet; _waiters: for others, as pairs of mark and Event.
        _paused, _peer_ended: whether pause() holds, and whether the peer's FIN was seen. _told: whether on_close has been called
            or is not to be.
        _write_heard, _end_heard: whether on_write and on_end are overridden, without which they are not called.
        _recv, _send, _reader, _writer: the world; see `_sockets.Ports`. None while there is no socket.
        _key: the descriptor, under which the server's `channels` has it; None when it is not there.
        _remote, _remote_override: the peer's address, and the one that was assigned.
        _limits: its time limits, if one runs or has run. _limited: whether there is, or was, a limit for which somebody looks at what
            comes and goes, or at every callback.
        _server: that which accepted it.
        _secure: whether it speaks TLS, or is to.
    """

    __slots__ = (
        "_attention",
        "_buffer_size",
        "_end_heard",
        "_framer",
        "_high_water",
        "_inbox",
        "_key",
        "_limited",
        "_limits",
        "_low_water",
        "_mark",
        "_out",
        "_outbox",
        "_own_output",
        "_paused",
        "_peer_ended",
        "_pending",
        "_read_delimiter",
        "_read_timeout",
        "_reader",
        "_receive_size",
        "_recv",
        "_remote",
        "_remote_override",
        "_room_at",
        "_secure",
        "_send",
        "_sending",
        "_server",
        "_told",
        "_write_heard",
        "_write_limit",
        "_writer",
    )

    _logger = logging.getLogger("pants_green.stream")

    #: What ends a chunk. None: whatever arrives is delivered at once. bytes or str: everything before it, without it. int: so
    #: many bytes. A compiled pattern: see `regex_search`. A ``struct.Struct``, or a NetStruct: its fields are the arguments of
    #: ``on_read``. A Framer of ``pants_green.framing``. On the class or on an instance; in a callback it holds from the next
    #: chunk on.
    read_delimiter = ReadDelimiter(None, unchecked)

    #: Whether a pattern is searched for, and ``on_read`` gets what is before it; else it has to match from the start of the
    #: chunk on, and ``on_read`` gets the match object. A match is taken as soon as there is one: let a pattern end in something
    #: that cannot go on (``\\r?\\n``, not ``\\n+``), for what comes next may not have arrived. One without a longest match, one
    #: that looks at what is beside it, and one that has to match from the start on, is tried again on all that waits whenever
    #: something comes: keep `buffer_size` small with these.
    regex_search = RegexSearch(True, truth)

    #: The encoding of the text that ``on_read`` gets instead of bytes, such as ``"utf-8"``; None: bytes. Each chunk is cut as
    #: bytes and then decoded whole; a str delimiter, and what ``write()`` gets as str, are encoded, each by itself: "utf-16" would
    #: put a byte order mark in front of every write, "utf-16-le" does not. In double-byte encodings (shift_jis, gbk, big5) only
    #: control characters, such as "\\n", are safe as delimiters: others are parts of characters, too.
    encoding = Encoding(None, check_encoding)

    #: Bytes that may wait for their delimiter; more are an overflow. A delimiter that tells how large its chunks may be raises
    #: it to that.
    buffer_size: Setting[int] = Setting(64 * KIB, byte_count)

    #: Seconds that a chunk may take from its first byte to its last; None: no limit. See ``on_timeout``.
    read_timeout: Setting[float | None] = TimeLimit(None, seconds)

    #: Bytes in the outbox above which a stream whose callbacks answer input by output stops reading, and ``drain()`` waits;
    #: and those down to which it has to come for it to read on.
    high_water: Setting[int] = Mark(256 * KIB, byte_count)
    low_water: Setting[int] = Setting(64 * KIB, byte_count)

    #: Bytes in the outbox from which on nothing is added to it, but for a single write that begins below.
    write_limit: Setting[int] = Mark(16 * MIB, byte_count)

    #: What becomes of a ``write()`` above `write_limit`. One made by the stream's own callbacks, or by a greenlet of yours,
    #: waits for room in any case. For callbacks of other channels and timers, "close": the stream is closed, see
    #: ``on_overflow_error``; "drop": the write is dropped, and counted in `writes_dropped`; "wait": the caller waits, too, but in
    #: the hub, where nobody can, that is "close". What ``call_from_thread`` runs counts as a timer.
    overflow: Setting[str] = Setting("close", one_of("close", "drop", "wait"))

    #: Seconds for which the peer may take none of the pending output, TLS' goodbye among it; None: no limit. See ``on_timeout``.
    write_timeout: Setting[float | None] = TimeLimit(60.0, seconds)

    #: Seconds that ``connect()`` may take, from the call on: looking the name up, and all attempts; None: no limit.
    connect_timeout: Setting[float | None] = TimeLimit(30.0, seconds)

    #: Seconds without a byte in either direction; None: no limit. See ``on_timeout``. They begin anew after a callback, also one
    #: that waits in ``read()``, after ``pause()``, and when what was written has been sent.
    idle_timeout: Setting[float | None] = Measured(None, seconds)

    #: Bytes that are received per second, and as many at once; None: no limit. Nothing is lost: the peer is held up.
    read_rate: Setting[float | None] = Measured(None, per_second)

    #: Chunks that ``on_read`` gets per second, and as many at once; None: no limit. Nothing is lost: the peer is held up.
    chunk_rate: Setting[float | None] = CountedSetting(None, per_second)

    #: Seconds that a callback may take, but for ``on_close``; None: no limit. After that CallbackTimeout is raised in it, where it
    #: waits, and again after as long if it goes on; one that only calculates is not interrupted. While it waits in the stream's own
    #: ``read()``, ``drain()`` or ``write()`` that does not count, and they begin anew.
    callback_timeout: Setting[float | None] = CountedSetting(None, seconds)

    #: Seconds for which the descriptor is kept at most after ``end()``, for a peer that is still sending; after 5 without a byte it
    #: is closed in any case.
    linger_timeout: Setting[float | None] = Setting(30.0, seconds)

    #: Seconds that a TLS handshake may take; None: no limit. For that with which a server's connection begins see the server's own.
    handshake_timeout: Setting[float | None] = Setting(10.0, seconds)

    #: Whether the stream stays open, for writing, when the peer has ended its side.
    allow_half_open: bool = False

    _watched = frozenset({"on_write", "handle_write", "on_end"})

    #: The values of the settings above that a new instance begins with.
    _initial: ClassVar[tuple[Any, ...]]

    _regex_search: bool
    _encoding: str | None
    _overflow: str
    _write_timeout: float | None
    _connect_timeout: float | None
    _handshake_timeout: float | None
    _idle_timeout: float | None
    _read_rate: float | None
    _chunk_rate: float | None
    _callback_timeout: float | None
    _linger_timeout: float | None
    #: Whether somebody has to look at what comes and goes, or at every callback; and who does, while it is needed.
    _metered: bool
    _counted: bool
    _meter: Meter | None = None
    _counter: Any = None

    # What few streams need; it has no slot either, which every stream would have to fill.
    _own_mark = -1
    #: Of `_own_output`, what the latest ``read()`` of this callback has seen; -1 if there was none.
    _own_seen = -1
    #: Whether a callback is in ``read()``.
    _in_read = False
    _writes_dropped = 0
    #: Of `_pending`, those that are in files: they take no memory.
    _in_files = 0
    #: When it is aborted if it does not come to its end, as it was asked to.
    _stop_by: float | None = None
    #: What a proxy has said of it, or what a client is to send; and that, while it is still to be sent.
    _proxy_header: Any = None
    _preface: Any = None
    #: Bytes that were dropped when the stream was closed.
    _unsent = 0
    _decoder: Incremental | None = None
    _waiters: tuple[tuple[int, Any], ...] = ()
    #: What startSSL() was given; whether the handshake is still to be done; the filter.
    _tls_options: TLSOptions | None = None
    _shaking = False
    _tls: Filter | None = None
    #: The name that was dialled, if it had to be looked up; where from, if that was said; the attempts, while there are several.
    _host: str | None = None
    _source: Address | None = None
    _race: Any = None

    @classmethod
    def _settled(cls) -> None:
        """Work out once for the class what every instance would have to look up."""
        delimiter = cls.read_delimiter
        framer = framer_of(cls, delimiter, cls.encoding, cls.regex_search)
        counted = cls.chunk_rate is not None or cls.callback_timeout is not None
        if counted and framer is None:
            framer = WHOLE
        own = isinstance(framer, Incremental)
        one_by_one = counted or (framer is not None and not framer.splits)
        plain = not (one_by_one or (framer is not None and framer.spread))
        write_heard = cls.on_write is not StreamCallbacks.on_write or cls.handle_write is not StreamCallbacks.handle_write
        end_heard = cls.on_end is not StreamCallbacks.on_end
        sizes = (cls.buffer_size, cls.high_water, cls.low_water, cls.write_limit, min(cls.high_water, cls.write_limit))
        metered = cls.idle_timeout is not None or cls.read_rate is not None
        limited = counted or metered
        cls._initial = (delimiter, framer, *sizes, cls.read_timeout, write_heard, end_heard, limited, one_by_one, plain, own)
        # What few streams set has no slot: it is looked up on the class.
        cls._regex_search = cls.regex_search
        cls._encoding = cls.encoding
        cls._overflow = cls.overflow
        cls._write_timeout = cls.write_timeout
        cls._connect_timeout = cls.connect_timeout
        cls._handshake_timeout = cls.handshake_timeout
        cls._idle_timeout = cls.idle_timeout
        cls._read_rate = cls.read_rate
        cls._chunk_rate = cls.chunk_rate
        cls._callback_timeout = cls.callback_timeout
        cls._linger_timeout = cls.linger_timeout
        cls._metered = metered
        cls._counted = counted

    def __init__(self, server: "Server | None", engine: Any) -> None:
        try:
            Channel.__init__(self, server._engine if engine is None and server is not None else engine)
        except AttributeError:
            raise TypeError(f"server= takes the server that accepted the socket, not {server!r}") from None
        (
            self._read_delimiter,
            self._framer,
            self._buffer_size,
            self._high_water,
            self._low_water,
            self._write_limit,
            self._mark,
            self._read_timeout,
            self._write_heard,
            self._end_heard,
            self._limited,
            one_by_one,
            plain,
            own,
        ) = self._initial
        if own:
            self._framer = self._framer.fresh()
        self._server = server
        self._key: int | None = None
        self._remote: Any = None
        self._remote_override: Any = None
        self._inbox = Inbox(one_by_one, plain)
        self._receive_size = RECEIVE_LEAST
        self._peer_ended = False
        self._outbox = Outbox()
        self._pending = 0
        self._own_output = 0
        self._attention: Any = None
        self._out: Any = REFUSED
        self._sending = False
        self._room_at = -1
        self._limits: Limits | None = None
        self._paused = False
        self._secure = False
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
    def stopping(self) -> bool:
        """Whether the connection has been asked to come to its end: see ``on_stopping``."""
        return self._stop_by is not None

    @property
    def proxy_header(self) -> Any:  # what a Client has under this name is of other types, too
        """The ProxyHeader that the proxy in front of the server has sent; None without one. See ``Server.proxy_protocol``."""
        return self._proxy_header

    @property
    def connecting(self) -> bool:
        """Whether ``connect()`` is at work."""
        return self._state is CONNECTING

    @property
    def ssl_enabled(self) -> bool:
        """Whether the stream speaks TLS, or will: from ``startSSL()`` on."""
        return self._secure

    @property
    def ssl_object(self) -> Any:
        """The ``ssl.SSLObject``, to ask for what the properties here do not tell; None without TLS. Also in ``on_close``.

        Reading, writing and ``unwrap()`` are the stream's own business; its context may be that of other streams, too.
        """
        return None if self._tls is None else self._tls.object

    @property
    def peer_certificate(self) -> dict[str, Any] | None:
        """The peer's certificate, as ``ssl.SSLSocket.getpeercert()`` has it; empty if it was not verified, None if there is none."""
        return self._tls.object.getpeercert() if self._tls is not None and self._tls.established else None

    @property
    def cipher(self) -> tuple[str, str, int] | None:
        """The name of the cipher, the version of TLS that brought it, and its bits; None before the handshake, or without TLS."""
        return self._tls.object.cipher() if self._tls is not None and self._tls.established else None

    @property
    def tls_version(self) -> str | None:
        """The version that both sides speak, such as "TLSv1.3"; None before the handshake, or without TLS."""
        return self._tls.object.version() if self._tls is not None and self._tls.established else None

    @property
    def alpn_protocol(self) -> str | None:
        """What both sides have chosen of their `alpn_protocols`; None if nothing was."""
        return self._tls.object.selected_alpn_protocol() if self._tls is not None and self._tls.established else None

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
        state = "handshaking" if self._secure and self._shaking and self._socket is not None else self._state.value
        return state if remote is None else f"{state} to {format_address(remote)}"

    @property
    def writes_dropped(self) -> int:
        """How many writes were dropped, for `overflow` is "drop"."""
        return self._writes_dropped

    # ---- what moves it

    def _move(self, event: Event) -> None:
        try:
            state = self._state = STREAM_MOVES[self._state, event]
        except KeyError:
            self._refuse_move(event)
        self._out = self._outbox.items if state.writable else REFUSED
        if self._server is not None:
            self._server._place(self, state)

    def _cut_by(self, delimiter: Any, encoding: str | None, regex_search: bool) -> None:
        """Cut the input in another way, from the next chunk on."""
        framer = framer_of(type(self), delimiter, encoding, regex_search)
        if framer is None and self._counted:
            framer = WHOLE
        inbox = self._inbox
        if not inbox.one_by_one:  # else the delimiter is looked up for each chunk anyway
            self._attention = INTERRUPTED
        if inbox.batch is not None:
            inbox.put_back(self._framer)
        inbox.use(framer)
        self._framer = framer
        if inbox and self._waiting:
            # It waits for more, but by the new delimiter it may have a chunk already.
            self._interrupt()

    def _ask_to_stop(self, deadline: float) -> None:
        """Have ``on_stopping`` called, once."""
        if self._stop_by is None and self._state.connected:
            self._stop_by = deadline
            self._post("_tell_stopping")

    def _tell_stopping(self) -> None:
        """Posted: call on_stopping, unless the connection has begun to end by itself meanwhile."""
        if self._state.connected:
            self._call("on_stopping", self._stop_by)

    def _tell_held_up(self, limit: str, what: str) -> None:
        """Posted: log that the peer has sent as much as it may, and has to wait."""
        rate = getattr(self, limit)
        if rate is not None:
            self._report(limit, f"{limit}, {rate:g} {what} per second, is reached; the peer is held up", "rate")

    def _report(self, limit: str, error: BaseException | str, event: str, exc_info: BaseException | None = None) -> None:
        """Log that a limit was hit: with the server's other reports, of which there are not too many, if there is a server."""
        if self._server is None:
            self._log(logging.WARNING, "%s", error, event=event, exc_info=exc_info)
        else:
            value = getattr(error, "limit", 0) or getattr(self, limit, None)
            self._server._reports.tell(limit, value, "%s", error, channel=self, event=event, exc_info=exc_info)

    def _in_chunk(self) -> bool:
        return len(self._inbox) > 0

    def _interrupt(self) -> None:
        """Make the greenlet look up from its reading, wherever it is."""
        if not self._told:
            self._attention = INTERRUPTED
            if self._waiting or self._greenlet is None:
                self._alert()

    def _post(self, name: str, *args: Any) -> None:
        if not self._told:
            self._attention = INTERRUPTED
            super()._post(name, *args)

    # ---- one connection after the other

    def _chosen(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what has been set on a stream that was not connected yet, for `_begin_anew`: in slots, and without."""
        slots = {setting.slot for setting in type(self)._settings.values() if setting.slot in OF_ONE_CONNECTION}
        names = (*slots, "_framer", "_limited", "_mark", "_paused", "_secure")
        cold = self.__dict__.keys() & COLD - {"_meter", "_counter"}
        return {name: getattr(self, name) for name in names}, {name: self.__dict__[name] for name in cold}

    def _begin_anew(self, chosen: tuple[dict[str, Any], dict[str, Any]]) -> None:
        """Be as the constructor has left it, with what was set then; whatever else the user has put on the stream stays."""
        slots, cold = chosen
        blank = object.__new__(type(self))
        StreamState.__init__(blank, None, self._engine)
        for name in OF_ONE_CONNECTION:
            setattr(self, name, getattr(blank, name))
        for name in self.__dict__.keys() & COLD:
            del self.__dict__[name]
        self.__dict__.update(cold)
        for name, value in slots.items():
            setattr(self, name, value)
        if isinstance(self._framer, Incremental):
            self._framer = self._framer.fresh()
        self._inbox.begin_again(self._framer, self._counted)


#: The slots that are about the connection at hand.
OF_ONE_CONNECTION = {*Channel.__slots__, *StreamState.__slots__} - {"__dict__", "__weakref__", "_engine", "_end_heard", "_write_heard"}

#: What has no slot, and stands among an instance's attributes if it is not as in the class.
COLD = vars(StreamState).keys()
