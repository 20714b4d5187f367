"""Datagrams: packets, each whole and by itself, to and from many peers.

    socket -> read loop -> splitter -> on_read -> write() -> socket, or outbox -> socket

This file reads in that order: Opening, Reading, Writing, Closing. What a channel is made of, and what its user may override, is in
``_datagram_state``; what waits to be sent in ``_datagram_output``; the socket itself in ``_packets``.
"""

import contextvars
import logging
from socket import AF_INET6, AF_UNSPEC
from typing import Any, Self

from greenlet import getcurrent

from pants_green import _packets, _sockets
from pants_green._address import AF_UNIX, Address, format_address, parse_address, parse_connect
from pants_green._adopting import adopt, is_bound
from pants_green._callbacks import Chunk
from pants_green._datagram_output import DatagramOutput
from pants_green._datagram_state import SocketOption
from pants_green._delimiters import Incremental, last_chunk
from pants_green._inbox import NOTHING
from pants_green._lifecycle import CLOSE, CLOSED, DRAINING, END, LISTEN, LISTENING, NEW, CloseReason
from pants_green.errors import ChannelClosed, ChannelStateError, InvalidAddressFormatError

__all__ = ["Datagram"]

#: Seconds for which packets are received one after the other before the other channels get their turn.
TURN = 0.01

#: Addresses of ``write()`` that are kept as the system wants them: to parse one costs as much as to send it.
KNOWN = 1024

#: Where what goes to the peer of ``connect()`` goes.
THE_PEER: Any = ()


class Datagram(DatagramOutput[Chunk]):
    """A channel of packets (UDP, or a Unix socket's) that speaks to one peer or to many.

    Every packet is one ``on_read``: never merged with another, never cut. All callbacks run in the one greenlet of the channel,
    one at a time; while one of them blocks packets wait in the kernel, which drops what it has no room for.

    What a packet brings about harms the packet and not the channel: an exception in ``on_read``, an address that cannot be
    reached, is told and logged, and the channel stays open.

    Args:
        socket: a datagram socket of gevent or of the standard library to take over, bound, connected, or neither.
        family: ``socket.AF_INET``, ``AF_INET6`` or ``AF_UNIX``: the addresses that the channel has to do with, of a name, and
            of every interface (``listen(port)``), too; None: its first address decides, of ``localhost`` that of IPv4.
        engine: the Engine, or the module ``pants_green.engine``; by default this thread's.

    Raises:
        TypeError: `socket` is no datagram socket, or `engine` no engine.
        ValueError: no such family, or `socket` is of another.
    """

    __slots__ = ()

    # ---- Opening

    def __init__(self, socket: Any = None, *, family: int | None = None, engine: Any = None) -> None:
        super().__init__(family, engine)
        if socket is not None:
            self._take_over(socket)

    def _take_over(self, socket: Any) -> None:
        """Stand on a socket of the user's, in whatever state it is."""
        self._engine._enter()
        if self._family not in (None, getattr(socket, "family", self._family)):
            raise ValueError(f"{type(self).__name__}(socket=, family=): {socket!r} is not {_packets.family_name(self._family or 0)}")
        taken, _ = adopt(socket, _packets.DGRAM, type(self).__name__)
        try:
            self._set_options(taken)
        except BaseException:
            taken.close()
            raise
        self._use(taken)
        connected = _sockets.remote_sockaddr(taken) is not None
        if connected:
            self._tie()
        if connected or is_bound(taken):
            self._begin()
            self._post("on_listen")

    def listen(self, address: Any, *, reuse_port: bool = False, reuse_address: bool = False) -> Self:
        """Bind to an address and receive packets. ``on_listen`` is called before this returns.

        Args:
            address: a port or ``("", port)``: every IPv4 interface; ``(host, port)``; ``("::", port)``: every IPv6 interface;
                ``(host, port, flowinfo, scope_id)`` for IPv6; the path of a Unix socket. Port 0 takes a free one. A name is
                looked up, in which only the calling greenlet waits, and its first address taken.
            reuse_port: whether other sockets may share the port, each packet going to one of them (SO_REUSEPORT).
            reuse_address: whether several programs of this machine may listen to one multicast group and port (SO_REUSEADDR).
                Not for anything else: Linux would let others take over the port unnoticed.

        Returns:
            the channel itself.

        Raises:
            ChannelStateError: (RuntimeError) it listens already, by ``listen()``, ``connect()`` or its first ``write()``, or is closed.
            InvalidAddressFormatError: (ValueError) nobody can parse the address, or it does not fit the given socket.
            OSError: the address is in use or cannot be bound. The channel stays as it was and may try another.
        """
        parsed = parse_address(address)
        if self._family == AF_INET6 and parsed.sockaddr[0] == "":
            parsed = Address(AF_INET6, ("::", int(parsed.sockaddr[1]), 0, 0), False)
        self._check_new("listen()")
        self._engine._enter()
        parsed = self._resolved(parsed, "listen()")
        self._check_new("listen()")  # looking a name up takes time, in which others may have done something
        self._with_socket(parsed.family, lambda socket: self._bind(socket, parsed, reuse_port, reuse_address))
        self._begin()
        self._log(logging.INFO, "listening", event="listen")
        held = self._greenlet is None
        if held:
            self._greenlet = getcurrent()  # while on_listen runs here no other callback does elsewhere
        self._call("on_listen")
        if held:
            self._greenlet = None
        self._alert()
        return self

    def connect(self, address: Any, port: int | None = None) -> Self:
        """Tie the channel to one peer: only its packets come in, ``write()`` needs no address, and the network's errors are told.

        Nothing is sent. Whether anybody is there shows when something is: see ``on_read_error``.

        Args:
            address, port: as for ``Stream.connect``. A name is looked up, in which only the calling greenlet waits.

        Returns:
            the channel itself.

        Raises:
            ChannelStateError: (RuntimeError) it is connected already, or closed.
            InvalidAddressFormatError: (ValueError) nobody can parse the address, or it does not fit the socket.
            OSError: there is no such name, or no way to that address.
        """
        given = parse_connect(address, port)
        self._check_may_connect()
        self._engine._enter()
        parsed = self._resolved(given, "connect()")
        self._check_may_connect()
        begun = self._state is LISTENING
        self._with_socket(parsed.family, lambda socket: _packets.connect(socket, parsed))
        self._tie()
        self._known[given.sockaddr] = THE_PEER
        if begun:
            # What others have sent before is in the kernel's queue still.
            self._local = _sockets.local_sockaddr(self._socket)
            self._recvfrom = _packets.only_from(self._peer, self._recvfrom)
            self._post("_tied")
        else:
            self._begin()
            self._post("on_listen")
        return self

    def _tie(self) -> None:
        """The socket is connected: speak to its peer alone."""
        self._peer = peer = _sockets.remote_sockaddr(self._socket)
        self._known.clear()
        send, sendto = _sockets.ports_of(self._socket)[1], self._sendto
        if self._outbox or self._names:
            # What was written before goes where it was to go.
            self._sendto = lambda data, to: send(data) if to in (THE_PEER, peer) else sendto(data, to)
        else:
            self._sendto = lambda data, _: send(data)

    def _tied(self) -> None:
        """Posted: connect() was called. The read loop looks again with what it receives."""

    def _check_new(self, call: str) -> None:
        if self._state is LISTENING:
            raise ChannelStateError(f"{call} on {self!r}: it receives already; make another Datagram for another address")
        if self._state is not NEW:
            raise ChannelStateError(f"{call} on {self!r}: a closed channel cannot be opened again; make a new one")

    def _check_may_connect(self) -> None:
        if self._peer is not None:
            raise ChannelStateError(f"connect() on {self!r}: it is connected already; make another Datagram for another peer")
        if self._state is not NEW and self._state is not LISTENING:
            self._check_new("connect()")

    def _resolved(self, address: Address, call: str) -> Address:
        """Return an address of the right family; waits for a name."""
        family = self._family
        if not address.needs_lookup:
            if family is not None and address.family != family:
                raise self._misfit(call, address)
            return address
        found = _sockets.resolve(address)
        fits = _packets.fitting(found, family)
        if fits is None:
            raise self._misfit(call, found[0])
        return fits

    def _misfit(self, call: str, address: Address) -> InvalidAddressFormatError:
        own = f"the {'channel' if self._socket is None else 'socket'} is {_packets.family_name(self._family or 0)}"
        other = f"{format_address(address.sockaddr)} is {_packets.family_name(address.family)}"
        return InvalidAddressFormatError(f"{call} on {self!r}: {other}, and {own}; make another Datagram for it")

    def _with_socket(self, family: int, do: Any) -> None:
        """Do something with the socket; make one of `family` first if there is none."""
        if self._socket is not None:
            do(self._socket)
            return
        socket = _packets.make(family)
        try:
            self._set_options(socket)
            do(socket)
        except BaseException:
            socket.close()
            raise
        self._use(socket)

    def _set_options(self, socket: Any) -> None:
        for name in _packets.OPTIONS:
            value = getattr(self, "_" + name)
            if value != SocketOption.system_defaults[name]:
                _packets.set_option(socket, name, value)

    def _bind(self, socket: Any, address: Address, reuse_port: bool, reuse_address: bool) -> None:
        self._file = _packets.bind(socket, address, reuse_port=reuse_port, reuse_address=reuse_address)

    def _use(self, socket: Any) -> None:
        """Bind the world to which reading and writing speak."""
        self._socket = socket
        self._family = socket.family
        self._recvfrom, self._sendto, self._reader, self._writer = _sockets.packet_ports_of(socket)

    def _begin(self) -> None:
        """Receive from now on."""
        self._local = _sockets.local_sockaddr(self._socket)
        self._context = contextvars.copy_context()
        self._move(LISTEN)
        self._engine._roots.add(self)

    def _live(self, argument: Any) -> None:
        """The life of the channel, in its own greenlet: read, drain, close."""
        self._greenlet = getcurrent()
        try:
            self._run_posted()
            while self._state is LISTENING:
                self._read_loop()
            self._sender = None
            if self._state is DRAINING:
                self._serve_output()
        except BaseException as error:
            # Thrown into a wait of ours: what user code raises has been dealt with where it was called.
            self._struck(error)
        try:
            self._run_posted()
            if self._state is CLOSED and not self._told:
                self._told = True
                self._call("on_close")
        finally:
            if self._engine._pollers:
                self._engine._acted()
            if self._close_error is not None:
                self._close_error.__traceback__ = None  # its frames hold the channel and the greenlet
            self._greenlet = None
            if self._state is CLOSED:
                self._context = None

    # ---- Reading

    def _read_loop(self) -> None:
        """Receive and deliver, packet by packet, until the kernel has no more; then wait."""
        engine = self._engine
        recvfrom = self._recvfrom
        size = _packets.receive_size(self._socket.family)
        clock = engine._clock
        turn_ends = clock() + TURN
        count = 0
        while self._state is LISTENING:
            if self._posted:
                self._sender = None
                self._run_posted()
                recvfrom = self._recvfrom
                continue
            try:
                data, sender = recvfrom(size)
            except BlockingIOError:
                pass
            except OSError as error:
                self._receive_failed(error.with_traceback(None))
                if clock() < turn_ends:
                    continue
            else:
                self._sender = sender or self._peer
                if self._plain:
                    try:
                        self.on_read(data)  # type: ignore[call-arg]
                    except BaseException as error:
                        self._failed("on_read", error)
                else:
                    self._deliver(data)
                count += 1
                if count & 15 or clock() < turn_ends:
                    continue
            if engine._pollers:
                engine._acted()
            self._sender = None
            if self._posted:
                self._run_posted()
                recvfrom = self._recvfrom
            if self._state is LISTENING:
                self._wait(self._reader)
            turn_ends = clock() + TURN

    def _receive_failed(self, error: OSError) -> None:
        """Tell what the network says about packets that were sent; what else goes wrong is the end."""
        if error.errno in _packets.ICMP:
            self._sender = None
            self._call("on_read_error", self._from_network(error))
        else:
            self._keep_posted("on_read_error", error)
            self._shut(CloseReason.IO_ERROR, error)

    def _deliver(self, data: bytes) -> None:
        """Hand one packet to on_read, chunk by chunk, each by the delimiter that holds when its turn comes."""
        inbox = self._inbox
        inbox.append(data)
        try:
            while self._state is LISTENING:
                framer = self._framer
                if framer is None or isinstance(framer, Incremental):
                    chunk: Any = inbox.take_all()
                    if self._encoding is not None:
                        chunk = chunk.decode(self._encoding)
                else:
                    chunk = inbox.next(framer)
                    if chunk is NOTHING:
                        rest = inbox.take_all()
                        if not rest:
                            return
                        chunk = last_chunk(framer, rest, self.read_delimiter)
                try:
                    if isinstance(chunk, tuple) and framer is not None and framer.spread:
                        self.on_read(*chunk)  # type: ignore[call-arg]
                    else:
                        self.on_read(chunk)  # type: ignore[call-arg]
                except BaseException as error:
                    self._failed("on_read", error)
                if not inbox.data:
                    return
        except Exception as error:  # from the framer: what on_read raises has been dealt with
            self._call("on_read_error", error.with_traceback(None))
        finally:
            inbox.take_all()

    # ---- Writing

    def write(self, data: Any, addr: Any = None, flush: bool = False) -> None:
        """Send a packet; returns at once. Where the kernel has no room for it, it waits in the outbox, if there is room in that.

        The first one makes the channel listen for answers, on a port that the system chooses. To an address with a name it goes
        when the name has been looked up, which is done anew for every burst: give an IP address if you have one.

        Args:
            data: bytes-like, or str (in the `encoding`, UTF-8 if there is none); may be empty.
            addr: where to, as for ``Stream.connect``; None: to the sender of the packet that ``on_read`` is handling, or to the
                peer of ``connect()``.
            flush: has no effect: packets are sent at once.

        Raises:
            DatagramTooLong: (OSError and ValueError) no packet can be as long as that.
            ChannelClosed: (RuntimeError) the channel is closed, or about to be.
            ChannelStateError: (RuntimeError) there is no `addr`, and neither a sender nor a peer.
            InvalidAddressFormatError: (ValueError) nobody can parse `addr`, or it is not of the socket's family.
            PermissionError: `addr` is a broadcast address, and `broadcast` is not set.
            TypeError: `data` is neither bytes-like nor str.
        """
        if data.__class__ is not bytes:
            data = self._as_bytes(data)
        sender = self._sender
        if sender is not None and (addr is None or addr is sender) and getcurrent() is self._greenlet and self._state is LISTENING:
            to = sender
        else:
            self._engine._enter()
            to = self._destination(addr)
            if to.__class__ is Address:
                self._queue_for_name(data, to)
                return
        if self._outbox and (self._family != AF_UNIX or to in self._stuck):
            self._queue(data, to)
            return
        try:
            self._sendto(data, to)
        except BlockingIOError:
            self._queue(data, to)
        except OSError as error:
            self._send_again(data, to, error)
        else:
            if self._write_heard and not self._write_told and not self._outbox:
                self._tell_written()

    def _destination(self, addr: Any) -> Any:
        """Return what the system calls an address; an Address if its name has to be looked up first. Opens a new channel."""
        if self._state is not LISTENING and self._state is not NEW:
            hint = f"it is closed ({self._close_reason})" if self._state is CLOSED else "end() was called"
            raise ChannelClosed(f"write() on {self!r}: {hint}; make a new one", self)
        if addr is None:
            if self._peer is None:
                hint = "outside on_read, and for a sender without an address, give addr=; or connect() to one peer"
                raise ChannelStateError(f"write() on {self!r}: where to? {hint}")
            return THE_PEER
        try:
            known = self._known.get(addr)
        except TypeError:
            known = None  # what cannot be hashed is no address, either
        if known is not None:
            return known
        parsed = parse_connect(addr)
        if self._peer is not None:
            if parsed.sockaddr == self._peer or parsed.sockaddr in self._known:
                return THE_PEER
            raise ChannelStateError(f"write() on {self!r}: it is connected, and sends to nobody else; make another Datagram for {addr!r}")
        family = self._family
        if parsed.needs_lookup and family != AF_UNIX and (family is None or parsed.family in (AF_UNSPEC, family)):
            return parsed
        if family is not None and parsed.family != family:
            raise self._misfit("write()", parsed)
        self._open(parsed.family)
        if len(self._known) >= KNOWN:
            self._known.clear()
        self._known[addr] = parsed.sockaddr
        return parsed.sockaddr

    def _open(self, family: int) -> None:
        """Make or bind a socket for the first packet, and receive from now on, unless end() was called."""
        if self._state is NEW:
            self._with_socket(family, _packets.bind_anywhere)
            self._begin()
            self._post("on_listen")
        elif self._socket is None:
            self._with_socket(family, _packets.bind_anywhere)  # only to send what is left

    def _as_bytes(self, data: Any) -> bytes:
        if isinstance(data, str):
            return data.encode(self._encoding or "utf-8")
        try:
            return memoryview(data).tobytes()
        except TypeError:
            raise TypeError(f"write() on {self!r} takes bytes or str, not {type(data).__name__}: {data!r:.100}") from None

    def _send_again(self, data: bytes, to: Any, error: OSError) -> None:
        """A send at the call has failed with `error`: the packet may be well all the same."""
        if not self._is_of_earlier(error):
            self._refused(data, to, error, at_call=True)
            return
        try:
            self._sendto(data, to)
        except BlockingIOError:
            self._queue(data, to)
        except OSError as again:
            self._refused(data, to, again, at_call=True)
        else:
            if self._write_heard and not self._write_told and not self._outbox:
                self._tell_written()

    def flush(self) -> None:
        """Try to send what waits, now. Never waits."""
        self._engine._enter()
        self._flush_all()

    # ---- multicast

    def join(self, group: str, interface: Any = None) -> None:
        """Receive what is sent to a multicast group, too, until ``leave()`` or the end of the channel.

        Args:
            group: its IP address, of the socket's family.
            interface: where to listen: the name or number of an interface, for IPv4 also its address; None: the system chooses.

        Raises:
            ChannelStateError: (RuntimeError) the channel does not listen.
            ValueError, TypeError: that is no multicast group, or no interface.
            OSError: it is a member already, or no interface leads there.
        """
        self._check_member("join()")
        _packets.membership(self._socket, group, interface, join=True)

    def leave(self, group: str, interface: Any = None) -> None:
        """Leave a multicast group; with the same arguments as ``join()``, which see.

        Raises:
            OSError: it is no member.
        """
        self._check_member("leave()")
        _packets.membership(self._socket, group, interface, join=False)

    def _check_member(self, call: str) -> None:
        if self._state is not LISTENING:
            raise ChannelStateError(f"{call} on {self!r}: it does not listen; call listen(('', port)), with the group's port, first")
        self._engine._enter()

    # ---- Closing

    def end(self) -> None:
        """Close as soon as everything that waits has been sent, also what waits for a name. No more packets are delivered. Never waits.

        ``on_close`` follows in the channel's own greenlet. Repeated calls do nothing.
        """
        self._end()

    def _end(self) -> None:
        if self._state is CLOSED or self._state is DRAINING:
            return
        self._engine._enter()
        if not self._outbox and not self._names:
            self._shut(CloseReason.ENDED_HERE)
            return
        self._close_reason = CloseReason.ENDED_HERE
        self._move(END)
        self._interrupt()

    def close(self, flush: bool = False) -> None:
        """Close now. What waits is dropped. Repeated calls do nothing.

        ``on_close`` follows in the channel's own greenlet, never inside this call.

        Args:
            flush: ``close(flush=True)`` is ``end()``.
        """
        if flush:
            self._end()
        elif self._state is not CLOSED:
            self._engine._enter()
            self._shut(CloseReason.CLOSED_HERE)

    def _serve_output(self) -> None:
        """Nothing is read any more. Wait until what is owed is sent, then close."""
        while self._state is DRAINING and (self._outbox or self._names):
            self._run_posted()
            if self._state is DRAINING and (self._outbox or self._names):
                self._wait()
        self._run_posted()
        self._shut(self._close_reason or CloseReason.ENDED_HERE)

    def _shut(self, reason: CloseReason, error: BaseException | None = None) -> None:
        if self._state is CLOSED:
            return
        self._close_reason = reason
        self._close_error = error
        if self._outbox and reason is CloseReason.CLOSED_HERE:
            self._flush()
        self._move(CLOSE)
        dropped = self._drop_output()
        if dropped:
            self._log(logging.DEBUG, "%d packets were not sent (%s)", dropped, reason, event="dropped")
        if self._socket is not None:
            self._drop_socket()
        self._engine._roots.discard(self)
        self._interrupt()

    def _drop_socket(self) -> None:
        socket, reader, writer = self._socket, self._reader, self._writer
        self._socket = self._recvfrom = self._sendto = self._reader = self._writer = None
        if self._file is not None:
            self._file.remove()
        _sockets.close(socket, reader, writer)

    def _struck(self, error: BaseException) -> None:
        """Something was thrown into a wait of ours: a Timeout of the user's that fired late, or a kill."""
        self._failed("a wait for packets", error)
        self._shut(CloseReason.CALLBACK_ERROR, error)

    # ---- forks, repairs

    def _end_gracefully(self, deadline: float) -> None:
        Datagram.end(self)

    def _repair(self) -> None:
        super()._repair()
        if self._outbox and self._socket is not None:
            self._stop_waiting()
            self._wait_for_room()

    def _abandon(self) -> None:
        if self._socket is not None:
            _sockets.abandon(self._socket)

    def _after_fork(self) -> None:
        self._engine._forsaken.append(self._greenlet)
        if self._wakeup is not None:
            self._forget_wakeup()
        self._waiting = False
        if self._reader is not None:
            self._reader.stop()
        self._told = True
        self._posted = None
        self._shut(CloseReason.FORKED)
