"""Streams: one byte after the other, in both directions.

    socket -> read loop -> (TLS) -> splitter -> on_read -> write() -> outbox -> (TLS) -> socket

This file reads in that order: Opening, Reading, Writing, Closing. What a stream is made of is in ``_stream_state``, what its
user may override in ``_callbacks``, what may follow what in ``_lifecycle``. On the byte's way: ``_dialling`` makes the
connection, ``_client_proxy`` says whose it is; ``_inbox`` holds what waits to be cut, by ``_delimiters`` and ``framing``;
``_straight`` is ``read()``; ``_outbox`` holds what waits to be sent, ``_files`` sends files, ``_room`` has those who wait; ``_tls``
is the filter in between, and ``_stream_tls`` puts it there; ``_stream_limits`` sees to its limits; ``_linger`` sees the peer off.
Accepting is in ``server``.
"""

import contextvars
import functools
import logging
import socket as stdlib_socket
from collections.abc import Iterable
from struct import Struct
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar, overload

from greenlet import getcurrent

from pants_green import _sockets
from pants_green._address import NOT_GIVEN, Address, format_address, parse_connect
from pants_green._adopting import adopt, is_listening
from pants_green._callbacks import Chunk, StreamCallbacks
from pants_green._client_proxy import send_header
from pants_green._counter import Counter
from pants_green._dialling import dial, parse_source
from pants_green._files import BURST, FileSender, item_of
from pants_green._inbox import NOTHING
from pants_green._lifecycle import (
    CLOSE,
    CLOSED,
    CONNECT,
    CONNECTING,
    DRAINING,
    END,
    ENDING,
    ESTABLISH,
    FINISH_OUTPUT,
    INPUT_ENDED,
    INPUT_ENDED_HALF_OPEN,
    NEW,
    OPEN,
    READ_ONLY,
    WRITE_ONLY,
    CloseReason,
)
from pants_green._limits import Limits
from pants_green._linger import Linger
from pants_green._meter import Meter
from pants_green._pool import Worker
from pants_green._room import made, own_wait, stalled, wait_for_room, wake_waiters, wrote_much
from pants_green._straight import read
from pants_green._stream_limits import changed, count, error_of, hit, measure, tell
from pants_green._stream_state import INTERRUPTED, KIB, RECEIVE_LEAST, REFUSED, TURN, StreamState
from pants_green._stream_tls import begin, shake_hands, stand_on
from pants_green._tls import TLSError
from pants_green._tls_socket import TLSSocket
from pants_green.channel import STARTING
from pants_green.errors import ChannelClosed, ChannelStateError, IdleTimeout, StreamBufferOverflow
from pants_green.framing import Framer

if TYPE_CHECKING:
    from pants_green.server import Server, StreamServer  # `server` puts StreamServer in here, where the old documents have it

__all__ = ["Stream", "StreamServer"]

#: Bytes of the largest receive. Receives grow fourfold after each one that was filled, and fall back to the smallest
#: after one of less than a KiB. Measured against a fixed 64 KiB: bulk 1.37, the rest within 2 %.
RECEIVE_MOST = 256 * KIB

#: A receive of so many bytes flushes its own stream at once: bulk gains nothing by waiting and leaves the cache.
FLUSH_OWN = 16 * KIB

# As plain names, for the same reason as the states.
PEER_ENDED = CloseReason.PEER_ENDED
FORKED = CloseReason.FORKED

#: Reasons for which nothing more is sent, not even what the kernel would take.
WITHOUT_A_WORD = frozenset(
    {CloseReason.ABORTED_HERE, FORKED, CloseReason.CONNECT_FAILED, CloseReason.PEER_LEFT, CloseReason.IO_ERROR, CloseReason.TLS_FAILED}
)

#: Reasons for which TLS says goodbye, if all has been sent. For others the peer had better know that something is missing.
WITH_GOODBYE = frozenset({CloseReason.CLOSED_HERE, CloseReason.ENDED_HERE, PEER_ENDED})


T = TypeVar("T")


class Stream(StreamState[Chunk]):
    """A connection over which bytes flow in order: dialled with ``connect()`` or accepted by a server.

    Every stream that is open has one greenlet; all its callbacks run there, one at a time: ``on_connect`` first,
    ``on_close`` last, each exactly once. While one of them blocks nothing is read from the peer, and what was written
    goes out.

    Args:
        socket: a socket of gevent or of the standard library to take over for good: connected; or not yet, to dial with; an
            SSLSocket before its handshake gives its context, too. None for a stream that makes its own.
        server: the server that accepted it.
        engine: the Engine, or the module ``pants_green.engine``; by default the server's, else this thread's.
        ssl_options: what ``startSSL()`` is called with; None: without TLS.

    Raises:
        TypeError: `socket` is no stream socket, is closed, or listens; or `engine` is no engine.
        ChannelStateError: (RuntimeError) the TLS handshake of `socket` is done.
        TypeError, ValueError, OSError: as ``startSSL()``.
    """

    __slots__ = ()

    # ---- Opening

    def __init__(self, socket: Any = None, server: "Server | None" = None, *, engine: Any = None, ssl_options: Any = None) -> None:
        StreamState.__init__(self, server, engine)  # super() costs 1 % of connect-echo-close
        if ssl_options is not None:
            self.startSSL(ssl_options)  # before anything lives that would go on in clear if this raised
        if socket is not None:
            self._take_over(socket)

    def _take_over(self, socket: Any) -> None:
        """Stand on a connected socket; live in the greenlet that accepted it, else in a new one."""
        if self._secure and isinstance(socket, TLSSocket):
            raise ChannelStateError(f"{type(self).__name__}(ssl_options=): {socket!r} speaks TLS already")
        worker = getcurrent()
        if type(worker) is Worker and worker.offered is not None and worker.offered[0] is socket:
            if self._secure and worker.tls is not None:
                raise ChannelStateError(f"{type(self).__name__}(ssl_options=): its server speaks TLS already")
            _, self._remote, self._local, self._key = worker.offered
            ports = _sockets.ports_of(socket)
            if ports[2] is None:
                raise TypeError(f"{type(self).__name__}(socket=) takes an open socket; {socket!r} is closed")
            tls = worker.tls if not isinstance(socket, TLSSocket) else socket._hand_over()
            if worker.header is not None:
                self._proxy_header = worker.header
            worker.offered = None
            worker.claimed = self
            self._greenlet = worker
            self._become_known()
            if tls is None:
                self._use(socket, ports)
            else:
                self._socket = socket
                stand_on(self, tls)
        else:
            self._adopt(socket)

    def _adopt(self, socket: Any) -> None:
        """Stand on a socket of the user's: live on one that is connected, keep another for ``connect()``."""
        owner = type(self).__name__
        if isinstance(socket, TLSSocket):
            if socket.fileno() < 0:
                raise TypeError(f"{owner}(socket=) takes an open socket; {socket!r} is closed")
            self._remote = _sockets.remote_sockaddr(socket)
            self._engine._enter()  # before the socket is of no use any more
            tls = socket._hand_over()
            self._socket = socket
            stand_on(self, tls)
            self._start(socket)
            return
        if is_listening(socket):
            raise TypeError(f"{owner}(socket=) takes a socket for one connection, and {socket!r} listens: give it to a Server")
        if self._secure and hasattr(socket, "do_handshake"):
            raise ChannelStateError(f"{owner}(ssl_options=): {socket!r} has a context of its own")
        self._engine._enter()
        socket, options = adopt(socket, stdlib_socket.SOCK_STREAM, owner)
        try:
            if options is not None:
                self.startSSL(options)
        except BaseException:
            socket.close()
            raise
        self._use(socket, _sockets.ports_of(socket))
        self._remote = _sockets.remote_sockaddr(socket)
        if self._remote is not None or _sockets.was_connected(socket):
            self._start(socket)

    def _start(self, socket: Any) -> None:
        """Live, in a new greenlet, on a socket that was not accepted in this one."""
        self._engine._enter()
        self._key = socket.fileno()
        self._become_known()
        self._context = contextvars.copy_context()
        self._begin_to_live(None)

    def _begin_to_live(self, address: Address | None) -> None:
        """Live in a new greenlet, of which the server knows, if there is one."""
        self._greenlet = STARTING
        if self._server is None:
            self._engine._run_soon(self._live, address, self._context)
        else:
            self._engine._run_soon(self._server._accompany, (self, address), self._context)

    def _use(self, socket: Any, ports: _sockets.Ports) -> None:
        """Bind the world to which reading and flushing speak."""
        if self._limited and self._metered:
            self._meter = Meter(self, ports)
            ports = self._meter.ports()
        self._socket = socket
        self._recv, self._send, self._reader, self._writer = ports

    def _measure(self) -> None:
        measure(self)

    def _count(self) -> None:
        count(self)

    def _call(self, name: str, *args: Any) -> None:
        counter = self._counter
        try:
            if counter is None or name[0] == "_":  # of ours, which calls one of the user's in its turn
                getattr(self, name)(*args)
                return
            counter.begin(self, name)
            try:
                getattr(self, name)(*args)
            finally:
                counter.end(self)
        except BaseException as error:
            self._failed(name, error)

    def _become_known(self) -> None:
        """Have the engine know this stream, unless it does so through its server."""
        if self._server is None or not self._server._keeps_streams:
            self._engine._roots.add(self)

    def connect(self, address: Any, port: int | None = None, *, source_address: tuple[str, int] | None = None) -> Self:
        """Dial; returns at once. ``on_connect`` or ``on_connect_error`` follows, never inside this call.

        A name is looked up without blocking anybody. If it has several addresses they race: IPv6 and IPv4 by turns, each begins
        250 ms after the one before, or as soon as one has failed; the first that answers is taken. See `connect_timeout`.

        Args:
            address: ``(host, port)``, a port on this machine, ``(host, port, flowinfo, scope_id)``, or the path of a Unix
                socket; or the host, with `port` as the second argument.
            port: 1 to 65535.
            source_address: ``(host, port)`` of this machine to dial from: an IP address, of which kind only addresses are
                dialled, or ``""`` for any; a port, or 0 for any that is free.

        Returns:
            the stream itself.

        Raises:
            ChannelStateError: (RuntimeError) it is connecting, connected or closed.
            InvalidAddressFormatError: (ValueError) nobody can parse the address, or dial it from `source_address`.
        """
        parsed = parse_connect(address, port)
        source = None if source_address is None else parse_source(source_address, parsed)
        if self._state is not NEW or self._key is not None:
            raise ChannelStateError(f"connect() on {self!r}: it has been used before; make a new {type(self).__name__} for each connection")
        self._engine._enter()
        self._set_out(parsed, source, contextvars.copy_context())
        return self

    def _set_out(self, address: Address, source: Address | None, context: contextvars.Context) -> None:
        """Begin to dial."""
        if not self._limited and (self._metered or self._counted):  # the class has been given limits since this was made
            measure(self)
            count(self)
        self._move(CONNECT)
        self._remote = address.sockaddr
        if source is not None:
            self._source = source
        self._context = context
        self._become_known()
        if self._connect_timeout is not None:
            self._limit("connect", self._connect_timeout)
        self._begin_to_live(address)

    def startSSL(self, ssl_options: Any = None) -> Self:
        """Speak TLS: until the connection stands, from the first byte on; on one that stands, from here on (STARTTLS).

        Returns at once; ``on_ssl_handshake`` or ``on_ssl_handshake_error`` follows. On a connection that stands the handshake
        begins after the callback that is running, or in its next ``read()``. What was written before goes out as it is, what is
        written from now on goes out encrypted; what the peer has sent behind the chunk at hand, without waiting for the
        handshake, is taken for a part of that, and fails it.

        Args:
            ssl_options: an ssl.SSLContext, or a dict, which is not changed: ``certfile``, ``keyfile``, ``password`` of the own
                certificate; ``ca_certs`` (a file), ``cert_reqs`` (``ssl.CERT_NONE``, ...), ``check_hostname`` (bool);
                ``server_hostname`` (by default the host that was dialled); ``ciphers`` (str, as openssl's), ``ssl_version``
                (``ssl.TLSVersion.TLSv1_3``, say, for that only), ``alpn_protocols`` (a list of str); ``handshake_timeout``
                (seconds; by default the attribute); ``server_side`` (by default True on a stream that a server accepted);
                ``suppress_ragged_eofs`` (True takes an end without TLS' goodbye for one); or ``context``, an SSLContext, in the
                place of most of these. Without any a client checks the server's certificate and name, as
                ``ssl.create_default_context()`` does, and both sides speak TLS 1.2 or newer.

        Returns:
            the stream itself.

        Raises:
            ChannelStateError: (RuntimeError) it speaks TLS already, or one of its directions has ended.
            TypeError, ValueError: an option is unknown, or makes no sense.
            OSError: a file cannot be read; an ssl.SSLError if it does not hold what it should.
        """
        self._enter_bound()
        begin(self, ssl_options)
        return self

    def _shake_hands(self, alarm: Any) -> None:
        shake_hands(self, alarm)

    def _open_securely(self) -> None:
        """Do the handshake, unless the server has done it."""
        if self._shaking and self._socket is not None:
            shake_hands(self)
        if self._socket is not None:
            self._move(ESTABLISH)
            self._call("on_ssl_handshake")

    def _live(self, address: Address | None) -> None:
        """The life of a stream, in its own greenlet: open, read, drain, close."""
        self._greenlet = getcurrent()
        if self._limited and self._counted and self._counter is None:
            self._counter = Counter(self)
        try:
            failure = None
            if address is not None and self._state is CONNECTING:
                failure = dial(self, address)
                if self._engine._pollers:
                    self._engine._acted()
            # What was accepted has no context of its own, and no header to send: one look-up less per connection.
            if self._context is not None and self._preface is not None and self._socket is not None:
                failure = send_header(self)
            if failure is not None:
                self._shut(CloseReason.CONNECT_FAILED, failure)
                self._call("on_connect_error", failure)
            if self._secure:
                self._open_securely()
            elif self._socket is not None:
                self._move(ESTABLISH)
            if self._state is OPEN or self._state is READ_ONLY:  # on_ssl_handshake may have ended the output
                if self._limited:
                    changed(self, "idle")
                    self._call("on_connect")
                else:
                    try:
                        self.on_connect()
                    except BaseException as error:
                        self._failed("on_connect", error)
                self._read_loop()
            if self._state is not CLOSED:
                self._serve_output()
        except BaseException as error:
            # Thrown into a wait of ours: what user code raises has been dealt with where it was called.
            self._struck(error)
        try:
            if self._posted:
                self._run_posted()
            self._told = True
            if self._close_reason is not FORKED:
                try:
                    self.on_close()
                except BaseException as error:
                    self._failed("on_close", error)
        finally:
            if self._engine._pollers:
                self._engine._acted()
            if self._close_error is not None:
                # The frames of its traceback hold the stream, and the greenlet too: a circle that only the garbage collector
                # would find, and a greenlet that could not be used again.
                self._close_error.__traceback__ = None
            self._greenlet = None
            self._context = None
            if self._inbox.data:
                self._inbox.take_all()

    # ---- Reading

    def _read_loop(self) -> None:
        """Receive, cut, deliver, until the input or the stream ends.

        Between two receives everything that lasts is on the stream: what this frame holds can be fetched again, so another
        greenlet could take over at any wait.
        """
        engine = self._engine
        dirty = engine._dirty
        to_hub = engine._pool.to_hub
        clock = engine._clock
        switch = self._greenlet.switch
        size = self._receive_size
        turn_began = 0.0
        self._own_output = 0  # what on_connect has written does not stop reading
        if self._attention is not None and self._stop_by is not None:
            self._read_before_stopping()
        while True:
            if self._attention is not None:
                if not self._attend():
                    return
                self._deliver_waiting(len(self._inbox) > 0)
                continue
            framer = self._framer
            try:
                data = self._recv(size)  # not kept in this frame, for TLS may begin
            except BlockingIOError:
                pass
            except OSError as error:
                self._broken("on_read_error", error)
                return
            else:
                if not data:
                    self._input_ended()
                    return
                self._own_output = 0
                if framer is None:
                    try:
                        self.on_read(data)  # type: ignore[call-arg]
                    except BaseException as error:
                        self._failed("on_read", error)
                else:
                    self._deliver(data, framer)
                received = len(data)
                if received >= FLUSH_OWN:
                    self._flush()
                if len(dirty) >= engine._flush_at:
                    engine._batch_done()
                if self._own_output and self._pending > self._high_water:
                    self._hold_reading(min(self._low_water, self._high_water))
                if received >= size:
                    if size < RECEIVE_MOST:
                        size = self._receive_size = size * 4
                    now = clock()
                    if not turn_began:
                        turn_began = now
                    if now - turn_began < TURN:
                        continue
                elif size != RECEIVE_LEAST and received < KIB:
                    size = self._receive_size = RECEIVE_LEAST
                # Nothing is received again after a short receive: it would only meet EAGAIN (0.82 in ping-pong).
                del data
            while self._attention is not None:
                if not self._attend():
                    return
                self._deliver_waiting(len(self._inbox) > 0)
            # What _wait does. Start and stop of a watcher cost no system call.
            reader = self._reader
            self._waiting = True
            try:
                reader.start(switch)
                to_hub()
            finally:
                reader.stop()
                self._waiting = False
                if self._wakeup is not None:
                    self._forget_wakeup()
            turn_began = 0.0

    def _read_before_stopping(self) -> None:
        """Asked to end before anything was received, while on_connect took its time: answer what has come by now first."""
        if self._state is not OPEN or self._paused or self._shaking:
            return
        asked, self._posted = self._posted, None
        try:
            self._inbox.append(self._recv(RECEIVE_MOST))
        except BlockingIOError:
            pass
        except OSError as error:
            self._broken("on_read_error", error)
        else:
            self._deliver_waiting()
        self._posted = [*(asked or ()), *(self._posted or ())]
        self._attention = INTERRUPTED

    def _deliver(self, data: bytes, framer: Any) -> None:
        """Hand one receive to on_read, chunk by chunk."""
        inbox = self._inbox
        if not inbox.plain:
            if inbox.one_by_one:
                begun = len(inbox) > 0
                inbox.append(data)
                self._deliver_waiting(begun)
            else:
                self._deliver_fields(data, framer)
            return
        begun = False
        chunk = NOTHING
        try:
            if inbox.data:
                begun = True
                batch = inbox.feed(data, framer)
            else:  # what feed does if nothing waits, without the call: 1 % of a line
                batch, inbox.data = framer.split(data)
                inbox.batch = batch
            for chunk in batch:
                try:
                    self.on_read(chunk)  # type: ignore[call-arg]
                except BaseException as error:
                    self._failed("on_read", error)
                # The one check per chunk: the delimiter was changed, something was posted or read(), or the stream closes.
                if self._attention is not None and not self._same_batch(framer):
                    return
        except Exception as error:  # from the framer: what on_read raises has been dealt with
            self._input_senseless(error)
            return
        inbox.batch = None
        if inbox.data:
            self._unfinished(begun and chunk is NOTHING)

    def _deliver_fields(self, data: bytes, framer: Any) -> None:
        """Do the same for chunks whose elements are arguments. To ask which they are for each chunk costs 2 % of all lines."""
        inbox = self._inbox
        count = framer.count
        begun = len(inbox) > 0
        chunk = NOTHING
        try:
            for chunk in inbox.feed(data, framer):
                try:
                    if count == 2:  # a call with a star costs a third of such a chunk
                        one, two = chunk
                        self.on_read(one, two)  # type: ignore[call-arg]
                    elif count == 1:
                        (one,) = chunk
                        self.on_read(one)  # type: ignore[call-arg]
                    elif count == 3:
                        one, two, three = chunk
                        self.on_read(one, two, three)  # type: ignore[call-arg]
                    else:
                        self.on_read(*chunk)  # type: ignore[call-arg]
                except BaseException as error:
                    self._failed("on_read", error)
                if self._attention is not None and not self._same_batch(framer):
                    return
        except Exception as error:
            self._input_senseless(error)
            return
        inbox.batch = None
        if inbox.data:
            self._unfinished(begun and chunk is NOTHING)

    def _same_batch(self, framer: Any) -> bool:
        """See to what has come up between two chunks, and tell whether the batch goes on; else the rest has been delivered."""
        inbox = self._inbox
        self._hold_batch()
        if self._attend() and self._framer is framer and not inbox.one_by_one:
            return True
        inbox.put_back(framer)
        self._deliver_waiting()
        return False

    def _deliver_waiting(self, begun: bool = False, overflowed: bool = False) -> None:
        """Hand what waits to on_read, chunk by chunk, each by the delimiter that holds when its turn comes.

        Args:
            begun: whether the first bytes of the first chunk had come before.
            overflowed: whether on_overflow_error has had its chance.
        """
        inbox = self._inbox
        next_chunk = inbox.next
        counter = self._counter
        while True:
            if self._attention is not None:
                if not self._attend():
                    return
                counter = self._counter
            framer = self._framer
            try:
                chunk = next_chunk(framer)
            except Exception as error:
                self._input_senseless(error)
                return
            if chunk is NOTHING:
                break
            begun = False
            if counter is not None:
                self._call("on_read", *(chunk if isinstance(chunk, tuple) and framer.spread else (chunk,)))
            else:
                try:
                    if isinstance(chunk, tuple) and framer.spread:
                        self.on_read(*chunk)  # type: ignore[call-arg]
                    else:
                        self.on_read(chunk)  # type: ignore[call-arg]
                except BaseException as error:
                    self._failed("on_read", error)
            if self._attention is not None:
                self._hold_batch()
        if inbox.data:
            self._unfinished(begun, overflowed)

    def _unfinished(self, begun: bool, overflowed: bool = False) -> None:
        """No chunk is complete: see how long the rest may take, and whether too much waits.

        Args:
            begun: whether it is the chunk that was unfinished before.
            overflowed: whether on_overflow_error has had its chance.
        """
        if self._read_timeout is not None and not (begun and self._limits is not None and self._limits.runs("read")):
            self._limit("read", self._read_timeout)
        inbox = self._inbox
        waiting = len(inbox.data) - inbox.start  # not by its own len(): a long chunk comes by here at each receive
        if waiting < inbox.wanted:
            waiting = inbox.wanted
        if waiting <= self._buffer_size or waiting <= self._allowed():
            return
        if overflowed:
            self._shut(CloseReason.OVERFLOW, self._overflow_of_input(waiting))
            return
        self._call("on_overflow_error", self._overflow_of_input(waiting))
        # It may have taken another delimiter, or allowed more.
        self._deliver_waiting(overflowed=True)

    def _allowed(self) -> int:
        limit: int = self._buffer_size
        return limit if self._framer is None else max(limit, self._framer.room)

    def _overflow_of_input(self, waiting: int) -> StreamBufferOverflow:
        allowed = self._allowed()
        message = f"{waiting} bytes wait for the read_delimiter {self._read_delimiter!r} on {self!r}; buffer_size allows {allowed}"
        return StreamBufferOverflow(message, waiting, allowed)

    def _input_senseless(self, error: Exception) -> None:
        """What came cannot be cut or decoded: nothing behind it can be, either."""
        self._inbox.batch = None  # what it still holds is of no use to anybody
        if self._state is CLOSED:
            return
        too_long = isinstance(error, StreamBufferOverflow)
        self._keep_posted("on_overflow_error" if too_long else "on_read_error", error.with_traceback(None))
        self._shut(CloseReason.OVERFLOW if too_long else CloseReason.BAD_INPUT, error)

    def _attend(self) -> bool:
        """Run what was posted, in the stream's own greenlet, and tell whether reading goes on; while paused, wait."""
        while True:
            if self._posted:
                self._run_posted()
            if self._state is not OPEN and self._state is not READ_ONLY:
                return False
            if self._shaking:
                shake_hands(self)
                continue
            if self._paused:
                self._wait()
                continue
            if self._counter is not None and self._counter.pause(self):
                continue
            self._attention = None
            if self._own_seen < 0:
                return True
            # The callback has used read(), and so received without coming by where the read loop looks after its output.
            self._own_seen = -1
            if self._own_output and self._pending > self._high_water:
                self._hold_reading(min(self._low_water, self._high_water))
            self._own_output = 0

    @overload
    def read(self, delimiter: Struct, timeout: float | None = None) -> tuple[Any, ...]: ...
    @overload
    def read(self, delimiter: Framer[T], timeout: float | None = None) -> T: ...
    @overload
    def read(self: "Stream[bytes]", delimiter: bytes | str | int | None, timeout: float | None = None) -> bytes: ...
    @overload
    def read(self: "Stream[str]", delimiter: bytes | str | int | None, timeout: float | None = None) -> str: ...
    @overload
    def read(self, delimiter: Any = ..., timeout: float | None = None) -> Any: ...
    def read(self, delimiter: Any = NOT_GIVEN, timeout: float | None = None) -> Any:
        """Wait for one chunk and return it; in a callback of this very stream, but for ``on_end`` and ``on_close``.

        It is what ``on_read`` would have got next; ``on_read`` gets what comes behind it. No other callback of the stream runs
        meanwhile, and its `read_timeout` does not count.

        Args:
            delimiter: what ends this chunk, as `read_delimiter`, which is meant if none is given.
            timeout: seconds to wait; None: without limit; 0: not at all.

        Returns:
            bytes, or str if there is an `encoding`; a tuple for a Struct; a match object; what a Framer makes of it.

        Raises:
            ValueError, TypeError: `timeout` is not a number of seconds, 0 or more.
            ReadTimeout: (TimeoutError) no whole chunk came in time. Nothing is lost: what has come is read next.
            ChannelClosed: (RuntimeError) the peer has ended its side and no whole chunk is left, or the stream was closed
                meanwhile. If the callback lets it pass that is no error; ``on_end`` and ``on_close`` follow.
            StreamBufferOverflow: more than `buffer_size` came without the delimiter. If the callback lets it pass it becomes
                ``on_overflow_error``, and the stream is closed.
            ChannelStateError: (RuntimeError) it was called in another greenlet, or in ``on_end`` or ``on_close``.
            InvalidReadDelimiterError: (TypeError or ValueError) nothing can be cut by that delimiter.
        """
        return read(self, delimiter, timeout)

    def pause(self) -> None:
        """Stop reading, from any greenlet: ``on_read`` gets nothing more until ``resume()``, and the peer is held up.

        The end of the peer's input waits, too. ``close()`` and ``end()`` take effect all the same, and so does ``read()``.
        """
        self._enter_bound()
        self._paused = True
        self._attention = INTERRUPTED
        if self._waiting:
            self._alert()

    def resume(self) -> None:
        """Go on after ``pause()``; no effect if it was not called."""
        self._enter_bound()
        if self._paused:
            self._paused = False
            changed(self, "read")
            if self._waiting:
                self._alert()

    @property
    def paused(self) -> bool:
        """Whether ``pause()`` was called and ``resume()`` was not."""
        return self._paused

    def _failed(self, name: str, error: BaseException) -> None:
        """A callback raised; what a ``read()``, or a ``write()`` that waited, raised in it, and nobody caught, is no mistake."""
        if not getattr(error, "_no_mistake", False) or getattr(error, "channel", self) is not self:
            super()._failed(name, error)
        elif isinstance(error, StreamBufferOverflow):
            self._call("on_overflow_error", error)
            self._shut(CloseReason.OVERFLOW, error)
        else:
            self._log(logging.DEBUG, "%s was left: %s", name, error, event="callback_left")
            if getattr(error, "_at_end", False) and self._state in (OPEN, READ_ONLY):
                # In the middle of what it wanted to read: the rest is no chunk, whatever the read_delimiter would make of it.
                self._input_ended()

    def _input_ended(self) -> None:
        """The peer's FIN: every complete chunk has been delivered."""
        self._peer_ended = True
        if not (self._end_heard or self._outbox.items or self.allow_half_open) and (not self._secure or self._goodbye_said()):
            self._shut(PEER_ENDED)  # nobody listens and nothing is owed
            return
        rest = self._inbox.take_all() if self._inbox.data else b""
        self._attention = INTERRUPTED
        self._move(INPUT_ENDED_HALF_OPEN if self.allow_half_open else INPUT_ENDED)
        if not self._state.connected:
            self._close_reason = PEER_ENDED
        self._call("on_end", rest)
        if self._engine._pollers:
            self._engine._acted()
        if self._state is ENDING:
            if self._outbox.items or (self._secure and not self._goodbye_said()):
                self._move(END)
            else:
                self._shut(PEER_ENDED)

    def _struck(self, error: BaseException) -> None:
        """Something was thrown into a wait of ours: a Timeout of the user's that fired late, or a kill."""
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            self._failed("a wait", error)
        elif self._state is not CLOSED:
            self._failed("a wait for the peer", error)
            self._shut(CloseReason.CALLBACK_ERROR, error)

    # ---- Writing

    def write(self, data: Any, flush: bool = False) -> None:
        """Queue data to be sent; returns at once. What is written in one turn of the hub goes out together.

        If `write_limit` bytes or more are pending already, it waits for room, or does what `overflow` says. A callback that
        waits does not read: what is more than `write_limit` is better written by a greenlet of its own if the peer, too, stops
        reading while nobody takes its answers.

        Args:
            data: bytes-like, or str (in the `encoding`, UTF-8 if there is none). What can change is copied.
            flush: try to send now.

        Raises:
            ChannelClosed: (RuntimeError) the stream is not connected, or its output has ended.
            TypeError: `data` is neither bytes-like nor str.
        """
        if data.__class__ is not bytes:
            data = self._as_bytes(data)
        out = self._out
        if not out:
            if out is REFUSED:
                self._refuse("write()")
            if not data:
                return
            # The first item puts the stream on the list of those to be flushed.
            engine = self._engine
            if not engine._flush_asked:
                engine._ask_flush()
            engine._dirty.append(self)
        out.append(data)
        self._pending = pending = self._pending + len(data)
        if pending > self._mark and wrote_much(self, data):
            Stream.write(self, data)
        if flush and self._out is not REFUSED:
            self._flush_all()

    def send(self, data: Any) -> None:
        """The oldest name of ``write``."""
        self.write(data)

    def write_packed(self, *data: Any, format: Any = None, flush: bool = False) -> None:  # noqa: A002
        """Pack values and queue the bytes; see ``write``.

        Args:
            *data: the values.
            format: what packs them: a ``struct.Struct``, a NetStruct, a Framer with a ``pack()``, or a str as in ``struct``; if
                none is given, the `read_delimiter`.
            flush: try to send now.

        Raises:
            ValueError: there is no format, and the `read_delimiter` cannot pack.
            struct.error: the values do not fit the format.
            ChannelClosed, TypeError: as for ``write``.
        """
        packer = self._read_delimiter if format is None else Struct(format) if isinstance(format, (str, bytes)) else format
        if not callable(getattr(packer, "pack", None)):
            raise ValueError(
                f"write_packed() on {self!r} takes a format, as in struct, or a read_delimiter that can pack, such as a Struct; "
                f"{packer!r} cannot"
            )
        self.write(packer.pack(*data), flush)

    def write_file(self, file: Any, nbytes: int = 0, offset: int = 0, flush: bool = False) -> None:
        """Queue a file, or a part of it, to be sent in its turn; returns at once. What is more than 64 KiB takes no memory meanwhile.

        The file may be closed after this call, but should stay as it is until all is sent: what has been cut off meanwhile is left
        out, with a warning in the log. The kernel sends from regular files by itself, but for TLS, where they are read piece by
        piece. What has no descriptor (``io.BytesIO``, a GzipFile, a response of ``urlopen``) is read to its end within this call.

        Args:
            file: a file open for reading; its position does not matter, and stays.
            nbytes: bytes to send; 0: all there are; more than there are: those there are.
            offset: bytes to leave out at the start.
            flush: try to send now.

        Raises:
            ChannelClosed: (RuntimeError) the stream is not connected, or its output has ended.
            TypeError, ValueError: `file` cannot be read, or reads as text; a number makes no sense.
            OSError: no descriptor is left for it, or reading failed.
        """
        if self._out is REFUSED:
            self._refuse("write_file()")
        self._engine._enter()
        item = item_of(file, nbytes, offset, f"write_file() on {self!r}")
        if self._out is REFUSED:  # reading may have taken time
            if not isinstance(item, bytes):
                item.close()
            self._refuse("write_file()")
        if isinstance(item, bytes):
            Stream.write(self, item, flush)
            return
        if not self._outbox.items:
            if not self._engine._flush_asked:
                self._engine._ask_flush()
            self._engine._dirty.append(self)
        self._outbox.items.append(item)
        self._outbox.files += 1
        self._pending += len(item)
        self._in_files += len(item)
        self._send_by(self._send)
        if self._pending > self._mark and getcurrent() is self._greenlet:
            self._own_output += 1
            self._attention = INTERRUPTED  # see _hold_batch
        if flush:
            self._flush_all()

    def _send_by(self, send: Any) -> None:
        """Send with this from now on."""
        if self._outbox.files and send.__class__ is not FileSender:
            send = FileSender(self, send)
        self._send = send

    def _refuse(self, call: str) -> NoReturn:
        state = self._state
        if state is NEW or state is CONNECTING:
            hint = "it is not connected yet; do it in on_connect or later"
        elif state is READ_ONLY:
            hint = "write_eof() has ended its output"
        else:
            hint = f"its output has ended ({self._close_reason}); check connected before writing to another channel"
        raise ChannelClosed(f"{call} on {self!r}: {hint}", self)

    def _as_bytes(self, data: Any) -> bytes:
        if isinstance(data, str):
            try:
                return data.encode(self._encoding or "utf-8")
            except UnicodeEncodeError as error:
                error.reason += f"; write() on {self!r} takes what its encoding, {self._encoding or 'utf-8'}, can say"
                raise
        try:
            view = memoryview(data)
        except TypeError:
            raise TypeError(f"write() on {self!r} takes bytes or str, not {type(data).__name__}: {data!r:.100}") from None
        return view.tobytes()

    def flush(self) -> None:
        """Try to send what is queued now, instead of at the end of this hub turn. Never waits.

        Raises:
            ChannelClosed: (RuntimeError) the stream is not connected.
        """
        if self._out is REFUSED and self._state is not READ_ONLY and self._state is not DRAINING:
            self._refuse("flush()")
        self._engine._enter()
        self._flush_all()

    def drain(self) -> None:
        """Wait, if more than `high_water` bytes are pending, until no more than `low_water` are. In any greenlet; only it waits.

        What a stream writes that passes on what it reads, or makes more than its peer may take, should be drained now and then.
        After ``end()`` it returns at once in the stream's own callbacks: what is left is sent in any case.

        Raises:
            ChannelClosed: (RuntimeError) the stream is not connected, or was closed before its output was sent.
            ChannelStateError: (RuntimeError) it was called in the hub, where nobody may wait.
        """
        self._engine._enter()
        if self._socket is None or self._state is CONNECTING:
            self._refuse("drain()")
        if self._pending <= self._high_water:
            return
        self._flush_all()
        if self._pending <= self._high_water:
            return
        if getcurrent() is self._engine._hub:
            raise ChannelStateError(f"drain() on {self!r} was called in the hub, which must not wait; call it in a greenlet")
        wait_for_room(self, min(self._low_water, self._high_water))
        if self._socket is None and self._unsent:
            closed = ChannelClosed(f"drain() on {self!r}: it was closed before everything was sent ({self._close_reason})", self)
            closed._no_mistake = getcurrent() is self._greenlet
            try:
                raise closed
            finally:
                del closed

    def _flush_all(self) -> None:
        """Send until the kernel takes no more, also if the write watcher waits already."""
        items = self._outbox.items
        in_files = self._in_files
        while items:
            if self._sending:
                self._sending = False
                self._writer.stop()
            owed = self._pending
            self._flush()
            if self._pending == owed or in_files - self._in_files >= BURST:  # a file may be longer than others can wait for
                return

    def _flush(self) -> None:
        """Send what the kernel takes. Runs in the hub or in any greenlet; waits for nothing, calls no user code."""
        self._flush_each((self,))

    @staticmethod
    def _flush_each(streams: "Iterable[Stream[...]]") -> None:
        """Do so for every one of these: one send each, and no call between them, which is 4 % of a round trip's instructions."""
        for stream in streams:
            outbox = stream._outbox
            items = outbox.items
            if stream._sending or not items:
                continue  # the write watcher goes on, or an earlier flush has done it
            try:
                sent = stream._send(items[0] if len(items) == 1 else outbox.head(stream._pending))
            except BlockingIOError:
                sent = 0
            except OSError as error:
                stream._broken("on_write_error", error)
                continue
            if sent == stream._pending:
                items.clear()
                stream._pending = 0
                if stream._write_heard:
                    stream._post("_written")
                if stream._room_at >= 0:
                    made(stream)
            else:
                outbox.sent(sent)
                stream._pending -= sent
                stream._sending = True
                stream._writer.start(stream._writable)
                stalled(stream, sent)
                if stream._pending <= stream._room_at:
                    made(stream)

    def _written(self) -> None:
        """Posted: everything was sent. Not worth telling if the stream was closed meanwhile."""
        if self._state is not CLOSED:
            self._call("on_write")

    def _limit(self, which: str, seconds: float) -> None:
        """Start a time limit, or start it anew."""
        if self._limits is None:
            self._limits = Limits(self._engine, self._limit_hit)
        self._limits.begin(which, seconds)

    def _limit_hit(self, which: str) -> None:
        hit(self, which)

    def _limit_changed(self, which: str) -> None:
        changed(self, which)

    def _limit_error(self, which: str) -> TimeoutError:
        return error_of(self, which)

    def _overdue(self, which: str) -> None:
        tell(self, which)

    def _writable(self) -> None:
        """Hub: the kernel has room again."""
        self._sending = False
        self._writer.stop()
        self._flush()

    def _hold_reading(self, mark: int) -> None:
        """Read nothing until no more than `mark` bytes are pending; what is posted is run."""
        self._flush()
        while self._pending > mark and self._state.connected:
            own_wait(self, mark)
            self._run_posted()

    def _hold_batch(self) -> None:
        """Deliver no more of a batch until the files that its callbacks send are gone: each of them holds a descriptor."""
        if self._own_output and self._outbox.files and self._pending > self._high_water:
            self._hold_reading(min(self._low_water, self._high_water))
            self._own_output = 0

    # ---- Closing

    def write_eof(self) -> None:
        """End the output: what is queued is sent, then TLS' goodbye, if it speaks TLS, and a FIN. Reading goes on. Never waits.

        Raises:
            ChannelClosed: (RuntimeError) the stream is not connected, or its output has ended before.
        """
        self._engine._enter()
        if not self._state.writable:
            self._refuse("write_eof()")
        self._move(FINISH_OUTPUT)
        if self._state is DRAINING:  # the peer's side has ended before
            self._close_reason = self._close_reason or CloseReason.ENDED_HERE
            self._interrupt()
        elif not self._outbox.items:
            self._finish_output()
        elif self._room_at < 0:
            self._room_at = 0  # the FIN follows when all is sent

    def _finish_output(self) -> None:
        """Everything is sent: tell the peer that nothing more comes. Unless the handshake is still to come; then it follows that."""
        if not self._shaking and self._goodbye_said():
            _sockets.shutdown_output(self._socket)

    def _goodbye_said(self) -> bool:
        """Have TLS say goodbye, and tell whether the kernel has taken that; if not, it is tried again when there is room."""
        if self._tls is None:
            return True
        if self._tls.goodbye():
            if self._sending:  # there was no room before, and now there is, which nobody else has told
                self._sending = False
                self._writer.stop()
            return True
        if not self._sending:
            self._sending = True
            self._writer.start(self._room_for_goodbye)
            stalled(self, 0)
        return False

    def _room_for_goodbye(self) -> None:
        """Hub: the kernel has room again."""
        self._sending = False
        self._writer.stop()
        if self._goodbye_said():
            if self._limits is not None:
                self._limits.end("write")
            if self._state is READ_ONLY:
                self._finish_output()
            else:
                self._alert()

    def end(self) -> None:
        """Send everything that is queued, then TLS' goodbye, if it speaks TLS, and a FIN, and close. Never waits.

        No more chunks are delivered. What the peer still sends is read and thrown away, also for a while after
        ``on_close``, so that no reset destroys what it has not read yet. Repeated calls do nothing.
        """
        self._end(CloseReason.ENDED_HERE)

    def close(self, flush: bool = False) -> None:
        """Close now. What the kernel takes at once is sent, the rest is dropped. Repeated calls do nothing.

        TLS says goodbye only if nothing had to be dropped.

        ``on_close`` follows in the stream's own greenlet, never inside this call.

        Args:
            flush: ``close(flush=True)`` is ``end()``.
        """
        if flush:
            self._end(CloseReason.ENDED_HERE)
            return
        self._enter_bound()
        self._shut(CloseReason.CLOSED_HERE)

    def abort(self) -> None:
        """Close with a reset: nothing more is sent, not even what the kernel still holds. Repeated calls do nothing."""
        self._enter_bound()
        self._shut(CloseReason.ABORTED_HERE, reset=True)

    def _enter_bound(self) -> None:
        if self._state is not CLOSED:
            self._engine._enter()

    def _end(self, reason: CloseReason) -> None:
        self._enter_bound()
        if self._state is DRAINING or self._state is CLOSED:
            return
        if self._state is NEW or self._state is CONNECTING:
            self._shut(reason)  # not connected yet: nothing is owed
            return
        self._close_reason = self._close_reason or reason
        self._move(END)
        self._interrupt()

    def _serve_output(self) -> None:
        """The input is over. Send what is owed, then say so to the peer and close."""
        while self._state is WRITE_ONLY:
            self._run_posted()
            if self._state is WRITE_ONLY:
                if self._meter is not None:
                    self._meter.touch()
                self._wait()
        if self._meter is not None:
            self._meter.settle(None)  # what is thrown away may come as fast as it likes
        while self._state is DRAINING:
            self._run_posted()
            self._flush()
            if not self._outbox.items and not self._shaking and self._goodbye_said():
                break
            own_wait(self, 0, None if self._peer_ended else self._reader)
            self._discard_input()
        if self._state is DRAINING:
            self._run_posted()
        if self._state is DRAINING:
            self._depart()

    def _discard_input(self) -> None:
        """Read and throw away: a peer that is still writing would otherwise never come to read."""
        if self._peer_ended or self._state is not DRAINING:
            return
        try:
            self._peer_ended = not self._recv(RECEIVE_MOST)
        except BlockingIOError:
            pass
        except TLSError:
            self._peer_ended = True  # without a goodbye, or with nonsense: it is thrown away anyway
        except OSError as error:
            self._broken("on_read_error", error)

    def _depart(self) -> None:
        """Everything is sent: FIN, and close; the descriptor lingers until the peer has sent its own."""
        if not self._peer_ended:
            socket = self._socket
            _sockets.shutdown_output(socket)
            recv, _, reader, writer = self._raw_ports()
            overdue = None
            if self._server is not None:
                text = "the connection of %s, which the peer has not ended, was closed"
                told = ("linger_timeout", self._linger_timeout, text, format_address(self._remote))
                overdue = functools.partial(self._server._reports.tell, *told)  # it does not keep the stream
            linger = Linger(self._engine, socket, recv, reader, writer, self._linger_timeout, overdue)
            self._let_go()
            linger.start()
        self._shut(self._close_reason or CloseReason.ENDED_HERE)

    def _broken(self, callback: str, error: OSError) -> None:
        """The connection is of no use any more: close, and tell `callback` unless this is how peers usually leave."""
        error = error.with_traceback(None)  # whose frames hold the stream
        if isinstance(error, TLSError):
            self._keep_posted("on_ssl_error", error)
            self._shut(CloseReason.TLS_FAILED, error)
            return
        left = error.errno in _sockets.PEER_LEFT
        if left:
            self._log(logging.DEBUG, "the peer left: %s", error, event="peer_left")
        if not left or self._overrides(callback, StreamCallbacks):
            self._keep_posted(callback, error)
        self._shut(CloseReason.PEER_LEFT if left else CloseReason.IO_ERROR, error)

    def _shut(self, reason: CloseReason, error: BaseException | None = None, *, reset: bool = False) -> None:
        """Close now, for `reason`; does nothing on a closed stream. Switches nowhere, runs no callback.

        What the kernel takes at once is sent, unless `reason` tells that there is nobody to send it to.
        """
        if self._state is CLOSED:
            return
        if self._outbox.items and reason not in WITHOUT_A_WORD:
            self._flush_all()
            if self._state is CLOSED:
                return
        if self._secure and self._tls is not None and not self._outbox.items and (reason in WITH_GOODBYE or type(error) is IdleTimeout):
            self._tls.goodbye()
        self._close_reason = reason
        self._close_error = error
        self._move(CLOSE)
        if self._outbox.items:
            self._outbox.clear()
            self._unsent, self._pending = self._pending, 0
            self._log(logging.DEBUG, "%d bytes were not sent (%s)", self._unsent, reason, event="dropped")
        if self._limits is not None:
            if self._limited and self._counter is not None and self._counter.running is not None and reason is not FORKED:
                self._limits.end_all_but("callback")  # which is interrupted all the same
            else:
                self._limits.cancel()
                self._limits = None  # it holds the stream
        if self._socket is not None:
            self._drop_socket(reset)
        elif self._race is not None:
            self._race.close()
        if self._room_at >= 0 and self._waiters:
            wake_waiters(self)
        self._engine._roots.discard(self)
        self._interrupt()

    def _raw_ports(self) -> _sockets.Ports:
        """The ports of the socket itself, also under TLS."""
        if self._meter is not None:
            return self._meter.raw
        if self._tls is not None:
            ports: _sockets.Ports = self._tls.raw
            return ports
        return self._recv, self._send, self._reader, self._writer

    def _drop_socket(self, reset: bool = False) -> None:
        socket, reader, writer = self._socket, self._reader, self._writer
        if self._secure or self._limited:
            _, _, reader, writer = self._raw_ports()
        self._let_go()
        _sockets.close(socket, reader, writer, reset=reset)

    def _let_go(self) -> None:
        """Part from the socket without closing it."""
        if self._local is None:
            self._local = _sockets.local_sockaddr(self._socket)
        self._sending = False
        if self._secure and self._tls is not None:
            self._tls.owner = None
        if self._limited and self._meter is not None:
            self._meter.stop()
            self._meter = None
        self._socket = self._recv = self._send = self._reader = self._writer = None

    def _disown(self, reason: CloseReason) -> None:
        """Close without a word to the user: no callback has run yet, or none may run here."""
        self._attention = INTERRUPTED
        self._told = True
        self._shut(reason)

    def _end_gracefully(self, deadline: float) -> None:
        if self._state.connected:
            self._ask_to_stop(deadline)
        else:
            self._end(CloseReason.STOPPED)

    def _cut_off(self) -> None:
        self._shut(CloseReason.STOPPED, reset=True)

    def _repair(self) -> None:
        super()._repair()
        if self._outbox.items and self._socket is not None:
            self._sending = False
            self._writer.stop()
            self._engine._dirty.append(self)

    def _abandon(self) -> None:
        self._outbox.clear()
        if self._socket is not None:
            _sockets.abandon(self._socket)
        elif self._race is not None:
            self._race.abandon()

    def _after_fork(self) -> None:
        self._engine._forsaken.append(self._greenlet)
        if self._wakeup is not None:
            self._forget_wakeup()
        self._waiting = False  # nobody may wake it any more, such as the alarm of a read()
        if self._secure and self._reader is not None:
            self._reader.stop()
        self._disown(CloseReason.FORKED)
