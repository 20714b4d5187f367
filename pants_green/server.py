"""Servers: listening, accepting, and the connections that come of it.

What a connection does with its bytes is in ``stream``.
"""

import contextvars
import logging
import math
import random
import socket as stdlib_socket
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from greenlet import getcurrent

from pants_green import _sockets
from pants_green import stream as stream_module
from pants_green._address import NOT_GIVEN, Address, ListenCall, format_address, parse_listen
from pants_green._adopting import adopt, is_bound, is_listening
from pants_green._budget import Budget
from pants_green._callbacks import Chunk
from pants_green._lifecycle import CLOSE, CLOSED, LISTEN, LISTENING, OPEN, SERVER_MOVES, STOPPING, CloseReason, Event, State
from pants_green._networks import client_of
from pants_green._server_limits import NOBODY
from pants_green._server_tls import silence
from pants_green._settings import Setting, positive_count, seconds
from pants_green._socket_file import Permissions
from pants_green._stopping import ServerStopping
from pants_green.channel import Channel
from pants_green.errors import ChannelStateError, InvalidAddressFormatError
from pants_green.proxy_protocol import ProxyHeader
from pants_green.stream import Stream

__all__ = ["Channels", "Connection", "Server", "StreamServer"]

#: Connections taken in one go when the listener wakes up. Measured against 1: connect-echo-close 1.4 times faster.
ACCEPT_AT_ONCE = 100

#: Seconds to wait when no descriptor or memory is left for another connection: doubled each time, up to the second.
BACK_OFF_LEAST = 0.05
BACK_OFF_MOST = 1.0

#: Callbacks that are about one connection: what they raise does not close the server.
FOR_ONE_CONNECTION = ("on_accept", "on_ssl_wrap_error")

#: Seconds since the latest shortage of descriptors after which another one is worth a line of its own in the log.
EPISODE = 1.0


class StreamServer(ServerStopping):
    """Listens, and hands every accepted socket to ``on_accept``; keeps no connections. `Server` is what you usually want.

    Args:
        socket: a socket of gevent or of the standard library to take over for good: one that listens is accepted from at once;
            one that does not, bound or not, by ``listen()``. An SSLSocket gives its context, too. None: one is made.
        engine: the Engine, or the module ``pants_green.engine``; by default this thread's.
        ssl_options: what ``startSSL()`` is called with; None: without TLS.
        proxy_protocol, trusted: the attributes of these names.

    Raises:
        TypeError: `socket` is no stream socket, is closed, or connected.
        TypeError, ValueError, OSError: as ``startSSL()``.
    """

    __slots__ = (
        "_accept_at_once",
        "_back_off",
        "_ending",
        "_exhausted_at",
        "_exhaustion_told",
        "_given",
        "_paused",
    )

    #: Whether `_children` knows the streams that stand on this server; else the engine does.
    _keeps_streams: ClassVar[bool] = False

    _logger = logging.getLogger("pants_green.server")

    def __init__(
        self,
        *,
        socket: Any = None,
        engine: Any = None,
        ssl_options: Any = None,
        proxy_protocol: str | None = None,
        trusted: Iterable[Any] | None = None,
    ) -> None:
        super().__init__(engine, proxy_protocol, trusted)
        self._given: Any = None
        self._accept_at_once = ACCEPT_AT_ONCE
        self._back_off = 0.0
        self._exhausted_at = -math.inf
        self._exhaustion_told = False
        self._paused: Any = None
        self._ending = True
        if ssl_options is not None:
            self.startSSL(ssl_options)
        if socket is not None:
            self._adopt(socket)

    # ---- opening

    def _adopt(self, socket: Any) -> None:
        """Take a socket of the user's over; accept from it if it listens, else keep it for ``listen()``."""
        owner = type(self).__name__
        remote = _sockets.remote_sockaddr(socket) if hasattr(socket, "getpeername") else None
        if remote is not None:
            raise TypeError(f"{owner}(socket=) takes a socket that listens, or is to; {socket!r} is connected: give it to a Stream")
        if self._tls_options is not None and hasattr(socket, "do_handshake"):
            raise ChannelStateError(f"{owner}(ssl_options=): {socket!r} has a context of its own")
        self._engine._enter()
        listening = is_listening(socket)
        socket, options = adopt(socket, stdlib_socket.SOCK_STREAM, owner)
        try:
            if options is not None:
                self.startSSL(options["context"])
            if listening:
                self._check_certificate(f"{owner}(socket=)", self._tls_options)
                self._open([_sockets.Listener(socket)])
        except BaseException:
            socket.close()
            raise
        self._given = socket
        if listening:
            self._post("on_listen")
            self._resume_accepting()

    def listen(
        self,
        address: Any = NOT_GIVEN,
        *legacy: Any,
        backlog: int | None = None,
        slave: bool | None = None,
        reuse_port: bool = False,
        host: Any = None,
        port: int | None = None,
    ) -> Any:
        """Bind, listen and accept. ``on_listen`` is called before this returns.

        Args:
            address: a port, 8080 by default; ``(host, port)``; ``(host, port, flowinfo, scope_id)`` for IPv6; the path of a Unix
                socket. Port 0 takes a free one. A name is listened on at all its addresses.
            *legacy: ``listen(address, backlog, slave)``, or the oldest ``listen(port, host, backlog)``.
            backlog: connections that may wait to be accepted, 1024 by default.
            slave: whether an "any" address serves IPv4 and IPv6 both, as it does by default.
            reuse_port: whether other processes may listen on the same port (SO_REUSEPORT).
            host, port: the address as two keywords.

        Returns:
            the server itself.

        Raises:
            ChannelStateError: (RuntimeError) it listens already, or is closed.
            InvalidAddressFormatError: (ValueError) nobody can parse the address.
            OSError: the address is in use or cannot be bound. The server stays as it was and may try another.
        """
        if self._given is not None and address is NOT_GIVEN and port is None and not legacy:
            return self._listen_on_given(backlog)
        call = parse_listen(address, legacy, backlog=backlog, slave=slave, host=host, port=port)
        return self._listen(call, reuse_port=reuse_port)

    def _listen(self, call: ListenCall, *, reuse_port: bool = False, permissions: Permissions | None = None) -> Any:
        """Do what ``listen()`` says, when its arguments have been understood."""
        self._check_may_listen()
        self._check_certificate("listen()", self._tls_options)
        self._engine._enter()
        addresses = self._addresses(call.address, call.slave)
        self._check_may_listen()  # looking a name up takes time, in which others may have done something
        self._open(_sockets.listen_all(addresses, call.backlog, reuse_port=reuse_port, permissions=permissions, given=self._given))
        self._begin_to_accept()
        return self

    def _listen_on_given(self, backlog: int | None) -> Any:
        """Do so on the socket that was given, and without an address: on that which it has."""
        if self._state is LISTENING:
            return self  # it was listening when it was given
        call = parse_listen(backlog=backlog)
        if not is_bound(self._given):
            return self._listen(call)
        self._check_may_listen()
        self._check_certificate("listen()", self._tls_options)
        self._engine._enter()
        self._given.listen(call.backlog)
        self._open([_sockets.Listener(self._given)])
        self._begin_to_accept()
        return self

    def _begin_to_accept(self) -> None:
        """Call on_listen, in the greenlet of the caller, and then accept."""
        self._greenlet = getcurrent()  # meanwhile no other callback of the server runs elsewhere
        self._call("on_listen")
        self._greenlet = None
        if self._posted:
            self._alert()
        self._resume_accepting()

    def _open(self, listeners: list[_sockets.Listener]) -> None:
        """Stand on sockets that listen."""
        self._listeners = listeners
        self._socket = listeners[0].socket
        self._local = listeners[0].sockaddr
        self._context = contextvars.copy_context()
        self._move(LISTEN)
        self._engine._roots.add(self)
        self._log(logging.INFO, "listening", event="listen")

    def _check_may_listen(self) -> None:
        if self._state is LISTENING:
            raise ChannelStateError(f"listen() on {self!r}: it listens already; make another server for another address")
        if self._state is STOPPING or self._state is CLOSED:
            raise ChannelStateError(f"listen() on {self!r}: a server that was stopped or closed cannot be opened again; make a new one")

    def _addresses(self, address: Address, slave: bool) -> list[Address]:
        """Return every address to bind to: both families of "any", all addresses of a name."""
        if self._given is not None:
            return self._address_for_given(address)
        if address.is_any and slave and _sockets.ipv6_works():
            port = address.sockaddr[1]
            return [
                Address(stdlib_socket.AF_INET, ("", port), False),  # type: ignore[arg-type]
                Address(stdlib_socket.AF_INET6, ("::", port, 0, 0), False),  # type: ignore[arg-type]
            ]
        found = _sockets.resolve(address)
        if address.needs_lookup and not _sockets.ipv6_works():
            found = [one for one in found if one.family != stdlib_socket.AF_INET6] or found
        return found

    def _address_for_given(self, address: Address) -> list[Address]:
        """Return the one address to which the socket that was given is to be bound."""
        call = f"listen() on {self!r}"
        if is_bound(self._given):
            raise ChannelStateError(f"{call}: its socket is bound to {format_address(self._given.getsockname())} already; call it without")
        family = self._given.family
        found = [one for one in _sockets.resolve(address) if one.family == family]
        if address.is_any and address.family != family and family == stdlib_socket.AF_INET6:
            found = [Address(family, ("::", address.sockaddr[1], 0, 0), False)]  # type: ignore[arg-type]
        if not found:
            raise InvalidAddressFormatError(f"{call}: {format_address(address.sockaddr)} does not fit the given socket, {self._given!r}")
        return found[:1]

    # ---- accepting

    def _start_accepting(self) -> None:
        for listener in self._listeners:
            listener.start(self._accept_ready)

    def _stop_accepting(self) -> None:
        for listener in self._listeners:
            listener.stop()

    def _accept_ready(self, listener: _sockets.Listener) -> None:
        """Hub: connections wait. Take them, and run each in a greenlet of its own until it first waits."""
        try:
            self._accept_all(listener)
        except BaseException:
            # A signal, say. The hub stops a watcher whose callback raises; this one has to go on.
            self._engine._loop.run_callback(self._resume_accepting)
            raise

    def _accept_all(self, listener: _sockets.Listener) -> None:
        for number in range(self._accept_at_once):
            limited = self._limited
            if limited and not self._may_accept():
                if not number:  # else it wakes up once more if there is another
                    self._hold()
                return
            try:
                accepted = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _sockets.ACCEPT_AGAIN:
                    continue
                self._accept_failed(error)
                return
            if self._back_off:
                self._accepted_again()
            if limited:
                self._count_accepted()
            self._engine._run(self._welcome, accepted, self._context)
            if self._state is not LISTENING or self._suspended:
                return

    def _accept_failed(self, error: OSError) -> None:
        """Hub: no connection could be taken. Come back later if the machine is exhausted, else give up."""
        if error.errno not in _sockets.EXHAUSTED:
            self._post("on_error", error)
            self._stop_accepting()
            return
        now = self._engine._clock()
        if not self._back_off and now - self._exhausted_at > EPISODE:
            self._exhaustion_told = True
            self._log(logging.WARNING, "cannot accept: %s; connections wait until descriptors are free", error, event="accept_paused")
        self._exhausted_at = now
        self._back_off = min(max(self._back_off * 2, BACK_OFF_LEAST), BACK_OFF_MOST)
        self._stop_accepting()
        self._paused = self._engine._in_hub_after(self._back_off, self._resume_accepting)

    def _accepted_again(self) -> None:
        """Hub: a connection could be taken after some could not."""
        self._back_off = 0.0
        if self._exhaustion_told:
            self._exhaustion_told = False
            self._log(logging.INFO, "accepting again", event="accept_resumed")

    def _resume_accepting(self) -> None:
        if self._may_resume():
            self._start_accepting()

    def _welcome(self, accepted: tuple[Any, ...] | None) -> None:
        """The greenlet of an accepted connection: what comes before on_accept, that, and the life of the stream that came of it."""
        worker: Any = getcurrent()
        forks = self._engine._forks
        self._at_work[worker] = NOBODY
        try:
            if self._proxy_protocol is not None and accepted is not None:
                accepted = self._read_header(worker, accepted)
            if accepted is None:
                return
            if (self._limited or self._by_client is not None) and not self._admit(accepted[0], accepted[1]):
                return
            self._at_work[worker] = accepted[1]
            if self._tls_options is not None:
                accepted = self._greet(worker, accepted)
                if accepted is None:
                    return
            stream = self._accepted(worker, accepted, forks)
            del worker, accepted
            if stream is not None:
                if self._ended:
                    stream._end(CloseReason.ENDED_HERE)  # the others were ended while on_accept took its time
                elif self._stopping is not None and not self._keeps_streams:
                    self._engine._loop.run_callback(stream._ask_to_stop, self._stopping.deadline)
                stream._live(None)
        finally:
            self._at_rest(forks)

    def _accompany(self, argument: tuple[Any, Address | None]) -> None:
        """The greenlet of a stream that was made for this server by hand; it counts as the others do."""
        stream, address = argument
        forks = self._engine._forks
        self._at_work[getcurrent()] = NOBODY
        try:
            stream._live(address)
        finally:
            self._at_rest(forks)

    def _at_rest(self, forks: int) -> None:
        """The greenlet of a connection has done its work; if the process has forked since this is the child, and none of its business."""
        worker: Any = getcurrent()
        worker.header = None
        if forks != self._engine._forks:
            return
        remote = self._at_work.pop(worker)
        if self._by_client is not None and remote is not NOBODY:
            self._let_out(self._by_client, client_of(remote))
        if self._held or self._state is STOPPING:
            self._one_less()

    def _accepted(self, worker: Any, accepted: tuple[Any, ...], forks: int) -> Any:
        """Call on_accept; return the stream that has taken the socket over, if one has."""
        worker.offered = accepted
        sock, remote, _, _ = accepted
        try:
            self.on_accept(sock, remote)
            if worker.offered is not None:
                self._not_taken_over()
        except BaseException as error:
            if forks != self._engine._forks:
                silence(sock)
            self._turned_away(sock, error, worker.claimed)
            worker.claimed = None
        finally:
            worker.offered = worker.tls = None
        stream, worker.claimed = worker.claimed, None
        if forks != self._engine._forks:
            self._leave_to_parent(sock, stream)
            return None
        return stream

    def _leave_to_parent(self, sock: Any, stream: Any) -> None:
        """on_accept waited while the process forked, and this is the child: the connection is the parent's."""
        if stream is not None:
            stream._disown(CloseReason.FORKED)
        silence(sock)
        sock.close()

    def _accept_is_overridden(self) -> bool:
        return self._overrides("on_accept", Server)

    def _not_taken_over(self) -> None:
        """on_accept made no stream of the socket: it keeps it, or has closed it."""

    def _turned_away(self, sock: Any, error: BaseException, stream: Any) -> None:
        """on_accept, or the constructor of the connection, raised: it costs that socket and nothing else."""
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            self._engine._interrupt(error)
        elif self._overrides("on_error", StreamServer):
            self._post("_tell_turned_away", error)
        else:
            self._log(logging.ERROR, "on_accept raised %r", error, event="callback_error", exc_info=error)
        if stream is not None:
            stream._disown(CloseReason.CALLBACK_ERROR)
        sock.close()

    def _tell_turned_away(self, error: BaseException) -> None:
        """Posted: tell an overridden on_error what on_accept raised."""
        self._failing = "on_accept"
        self._call("on_error", error)
        self._failing = None

    def _place(self, stream: Any, state: State) -> None:
        """A stream that stands on this server has moved to `state`."""

    # ---- callbacks

    def on_listen(self) -> None:
        """The server listens.

        *When*: once, before ``listen()`` returns.
        *Runs in*: the greenlet that called ``listen()``.
        *Socket*: listening.
        """

    def on_error(self, exception: BaseException) -> None:
        """A callback raised, or the listener broke; by default it is logged and the server closed.

        *When*: after the callback that raised. What ``on_accept``, ``on_ssl_wrap_error`` or the constructor of a connection
        raises costs that connection only, and the server stays; the first and the last come here only if this is overridden.
        *Runs in*: a greenlet of the server's own; for ``on_listen`` in that of ``listen()``.
        *Socket*: listening.
        """
        self._log(logging.ERROR, "%s raised %r", self._failing or "accepting", exception, event="callback_error", exc_info=exception)
        if self._failing not in FOR_ONE_CONNECTION:
            self._shut(CloseReason.CALLBACK_ERROR, exception)

    def on_accept(self, sock: Any, addr: Any) -> None:
        """A connection was accepted; by default it is closed, for nobody wants it.

        *When*: for each connection; after the handshake, if the server speaks TLS.
        *Runs in*: the greenlet of that connection; it may block, and the others go on.
        *Socket*: `sock` is open and yours: keep it, wrap it in a Stream (``Stream(socket=sock)``), or close it.

        Args:
            sock: a gevent socket; with TLS a `TLSSocket`, which is one, too.
            addr: the peer's address, ``(host, port)`` or with four elements for IPv6.
        """
        self.handle_accept(sock, addr)

    def handle_accept(self, sock: Any, addr: Any) -> None:
        """The oldest name of ``on_accept``."""
        sock.close()

    # ---- closing

    def close(self) -> None:
        """Stop listening, at once. Repeated calls do nothing. ``on_close`` follows in a greenlet of its own."""
        self._shut(CloseReason.CLOSED_HERE)

    def _shut(self, reason: CloseReason, error: BaseException | None = None) -> None:
        if self._state is CLOSED:
            return
        self._engine._enter()
        self._close_reason = reason
        self._close_error = error
        self._move(CLOSE)
        self._close_listeners()
        self._end_greetings()
        self._forget_if_done()
        self._log(logging.INFO, "closed", event="close")
        self._reports.close()
        self._post("on_close")
        if self._stopping is not None:
            self._stopping.cancel()
            self._post("_tell_stopped")

    def _close_listeners(self) -> None:
        if self._paused is not None:
            self._paused.cancel()
        self._hold_no_more()
        self._stop_accepting()
        for listener in self._listeners:
            listener.close()
        self._listeners = []
        if self._given is not None:
            self._given.close()
            self._given = None
        self._socket = None

    def _move(self, event: Event) -> None:
        try:
            self._state = SERVER_MOVES[self._state, event]
        except KeyError:
            self._refuse_move(event)

    def _streams(self) -> list[Any]:
        return [root for root in self._engine._roots if isinstance(root, Stream) and root._greenlet in self._at_work]

    def _forget_if_done(self) -> None:
        """Let the engine forget a closed server; but it knows the connections that are left through it."""
        if self._state is CLOSED and not self._children():
            self._engine._roots.discard(self)

    def _repair(self) -> None:
        super()._repair()
        if self._state is LISTENING and not self._back_off:
            self._stop_accepting()
            self._resume_accepting()
        elif self._state is STOPPING:
            self._engine._loop.run_callback(self._take_the_rest)

    def _after_fork(self) -> None:
        # Several processes take turns on one listener now: one connection at a time spreads them best.
        self._accept_at_once = 1
        super()._after_fork()
        if self._state is STOPPING and self._stopping is not None:
            self._stopping.drop_rest()
            self._engine._loop.run_callback(self._one_less)  # the connections for which it waited are the parent's

    # ---- what it is

    @property
    def listening(self) -> bool:
        """Whether it listens."""
        return self._state is LISTENING

    @property
    def remote_address(self) -> None:
        """None: a server has no peer."""
        return None

    def _describe(self) -> str:
        where = ", ".join(format_address(listener.sockaddr) for listener in self._listeners)
        if not where and self._local is not None:
            where = format_address(self._local)
        return f"{self._state.value} on {where}" if where else self._state.value


class Channels(dict[int, Stream]):
    """A server's connected streams by descriptor. What it returns is a snapshot: safe while connections come and go."""

    __slots__ = ()

    def __iter__(self) -> Iterator[int]:
        return iter(list(super().keys()))

    def keys(self) -> Any:
        """Return the descriptors."""
        return list(super().keys())

    def values(self) -> Any:
        """Return the streams."""
        return list(super().values())

    def items(self) -> Any:
        """Return pairs of descriptor and stream."""
        return list(super().items())

    def iterkeys(self) -> Iterator[int]:
        """Iterate over a snapshot of the descriptors, as in Python 2."""
        return iter(self.keys())

    def itervalues(self) -> Iterator[Stream]:
        """Iterate over a snapshot of the streams, as in Python 2."""
        return iter(self.values())

    def iteritems(self) -> Iterator[tuple[int, Stream]]:
        """Iterate over a snapshot of the pairs, as in Python 2."""
        return iter(self.items())


class Connection(Stream[Chunk]):
    """The server's end of a connection: a Stream whose ``server`` accepted it."""

    __slots__ = ()

    @property
    def proxy_header(self) -> ProxyHeader | None:
        """What the proxy in front of the server has said of this connection; None without one. See ``Server.proxy_protocol``."""
        header: ProxyHeader | None = self._proxy_header
        return header


class BudgetSetting(Setting[int | None]):
    """Bytes of all connections together."""

    def __set__(self, instance: Any, value: Any) -> None:
        super().__set__(instance, value)
        instance._budget_changed()


class Server(StreamServer):
    """Listens, and makes a stream of the connection class for every connection.

    Args:
        ConnectionClass: the class of the connections, called as ``ConnectionClass(socket=..., server=...)``; by default
            the attribute of the same name.
        socket: a socket to take over: see `StreamServer`.
        engine: the Engine, or the module ``pants_green.engine``; by default this thread's.
        ssl_options: what ``startSSL()`` is called with; None: without TLS.
        proxy_protocol, trusted: the attributes of these names.

    Attributes:
        channels: the connected streams, by descriptor.

    Raises:
        TypeError: the connection class is not one.
        TypeError, ValueError, OSError: as ``startSSL()``.
    """

    __slots__ = ("_settling", "channels")

    #: Seconds after which a connection is asked to end (``on_stopping``), give or take a tenth, so that those that came together
    #: do not go together; 30 seconds later it is aborted. None: never. What it is when a connection comes to stand holds for that.
    max_connection_age: Setting[float | None] = Setting(None, seconds)

    #: Bytes that may wait to be sent on all connections together, not counting files; None: no limit but that of each. If it is
    #: more, the connection with most of it is closed (``on_overflow_error``), and so on; they are looked at every 0.1 seconds.
    write_budget: Setting[int | None] = BudgetSetting(None, positive_count)

    _max_connection_age: ClassVar[float | None]
    _write_budget: int | None
    _budget: Budget | None = None

    @classmethod
    def _settled(cls) -> None:
        super()._settled()
        cls._max_connection_age = cls.max_connection_age
        cls._write_budget = cls.write_budget

    _keeps_streams = True

    #: What every connection is wrapped in, unless the constructor is given something else.
    ConnectionClass: Any = Connection

    def __init__(
        self,
        ConnectionClass: Any = None,
        *,
        socket: Any = None,
        engine: Any = None,
        ssl_options: Any = None,
        proxy_protocol: str | None = None,
        trusted: Iterable[Any] | None = None,
    ) -> None:
        if ConnectionClass is not None:
            self.ConnectionClass = ConnectionClass
        wanted = self.ConnectionClass
        if not callable(wanted) or (isinstance(wanted, type) and not issubclass(wanted, Stream)):
            raise TypeError(f"{type(self).__name__}.ConnectionClass is a subclass of Stream (or Connection), not {wanted!r}")
        self.channels = Channels()
        self._settling: set[Stream] = set()
        # Last, for a socket that listens is accepted from.
        super().__init__(socket=socket, engine=engine, ssl_options=ssl_options, proxy_protocol=proxy_protocol, trusted=trusted)

    def _budget_changed(self) -> None:
        if self._write_budget is not None:
            self._watch_output(stream for stream in self._streams() if stream._sending)

    def _watch_output(self, streams: Iterable[Stream]) -> None:
        """These have not taken everything that was written to them; what waits is to stay within the budget."""
        if self._budget is None:
            self._budget = Budget(self)
        self._budget.watch(streams)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.on_accept is Server.on_accept and cls.handle_accept is not StreamServer.handle_accept:
            cls.on_accept = StreamServer.on_accept  # type: ignore[method-assign]

    def on_accept(self, sock: Any, addr: Any) -> None:
        """A connection was accepted: wrap it in an instance of ``ConnectionClass``, which joins ``channels``.

        *When*: for each connection.
        *Runs in*: the greenlet of that connection; it may block, and the others go on.
        *Socket*: open. A subclass that does not call this does with it what it likes.

        Args:
            sock: a gevent socket; with TLS, in a subclass that overrides this, a `TLSSocket`.
            addr: the peer's address, ``(host, port)`` or with four elements for IPv6.
        """
        self.ConnectionClass(socket=sock, server=self)

    def _not_taken_over(self) -> None:
        if not self._overrides("on_accept", Server):
            raise TypeError(
                f"{type(self).__name__}.ConnectionClass, {self.ConnectionClass!r}, made no stream of the socket; "
                "its __init__ has to call super().__init__(socket, server)"
            )

    def _place(self, stream: Any, state: State) -> None:
        """Keep a stream of ours where it belongs: among the connected, among those that end, or nowhere."""
        if state is OPEN:
            if stream._key is None:  # it was not accepted, but has dialled
                stream._key = stream._socket.fileno()
            self.channels[stream._key] = stream
            if self._state is not LISTENING:
                self._late(stream)
            if self._max_connection_age is not None:
                stream._limit("age", self._max_connection_age * random.uniform(0.9, 1.1))
        elif not state.connected:
            if stream._key is not None:
                self.channels.pop(stream._key, None)
                stream._key = None
                if state is not CLOSED:
                    self._settling.add(stream)
            elif state is CLOSED:
                self._settling.discard(stream)
            if self._state is CLOSED:
                self._forget_if_done()
            elif self._state is STOPPING and state is CLOSED:
                self._one_less()

    def _late(self, stream: Any) -> None:
        """A connection stands although the server accepts no more."""
        if self._state is CLOSED:
            self._engine._roots.add(self)  # through which alone the engine knows it
            if self._ended:
                self._engine._loop.run_callback(stream._end, CloseReason.ENDED_HERE)
        elif self._stopping is not None:
            # In the next turn: what has come already is read before.
            self._engine._loop.run_callback(stream._ask_to_stop, self._stopping.deadline)

    def _children(self) -> Iterable[Channel]:
        return self._streams()

    def _streams(self) -> list[Any]:
        return [*self.channels.values(), *self._settling]

    def close(self, connections: bool = True) -> None:
        """Stop listening, at once. Repeated calls do nothing.

        ``on_close`` follows in a greenlet of its own; by default it ends the connections, each after what it has to send.

        Args:
            connections: False keeps them as they are.
        """
        self._ending = connections
        super().close()

    def on_close(self) -> None:
        """The server has stopped listening; by default every connection is ended, after what it has to send.

        *When*: once, after ``close()``.
        *Runs in*: a greenlet of the server's own.
        *Socket*: closed. A subclass that does not call this keeps its connections.
        """
        super().on_close()
        if self._ending:
            self._ended = True
            for stream in self._children():
                stream._end(CloseReason.ENDED_HERE)  # type: ignore[attr-defined]


# Where the old documents have it; that module cannot import what stands on it.
stream_module.__dict__["StreamServer"] = StreamServer
