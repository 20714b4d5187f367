"""The ways in which a stream can be connected, all with the same face, for the suite that every stream has to pass.

What is asked of a stream is in ``stream_contract``.
"""

import _socket
import functools
import socket as stdlib_socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import gevent.socket
import pytest
from certificates import client_context, server_context
from gevent import monkey
from peers import TIMEOUT, ListeningPeer, Peer, PlainSocket, in_thread
from tls_peers import TLSPeer
from waiting import until

from pants_green import CloseReason, Server, Stream

__all__ = [
    "TCPClient",
    "TCPServer",
    "TLS12Server",
    "TLS12UnixPair",
    "TLS13Client",
    "TLS13Server",
    "Transport",
    "UnixPair",
    "contexts",
    "exchange",
    "fixture_of",
    "rounds",
]

#: Bytes of the buffers of a narrow connection; the kernel doubles them.
NARROW = 16 * 1024

#: Bytes that any connection takes before anybody reads, so that they can be sent without letting the hub run.
AT_ONCE = 16 * 1024

select: Any = monkey.get_original("select", "select")


@functools.cache
def contexts(version: str) -> tuple[Any, Any]:
    """Return the server's and the client's SSLContext for one version of TLS, made at the first call."""
    return server_context(version), client_context(version)


class Transport:
    """One way to connect a stream of ours to a plain peer; a context manager that closes everything.

    Attributes:
        tls: whether it speaks TLS.
        resets: whether an end can be told from a reset.
        left: the `close_reason` after a peer's reset.
        version: of TLS.
    """

    tls = False
    resets = True
    left = CloseReason.PEER_LEFT
    version = ""

    def __init__(self) -> None:
        self._servers: list[Server] = []
        self._listeners: list[ListeningPeer] = []
        self._streams: list[Any] = []
        self._peers: list[Peer] = []
        self._held: dict[Peer, bytes] = {}

    def __enter__(self) -> "Transport":
        return self

    def __exit__(self, *error: object) -> None:
        for server in self._servers:
            server.close(connections=False)
        for listener in self._listeners:
            listener.close()
        for stream in self._streams:
            stream.abort()
        for peer in self._peers:
            peer.close()

    def connect(
        self, stream_class: type[Stream], *, narrow: bool = False, first: bytes = b"", end: bool = False, hold: int = 0
    ) -> tuple[Any, Any]:
        """Return a stream of that class, and the peer that it is connected to.

        The connection stands; ``on_connect`` has begun, or will in the next turn of the hub.

        Args:
            stream_class: a subclass of Stream.
            narrow: whether there is to be little room in both kernels.
            first: what the peer says as soon as it can: with its last message of the handshake, if there is one.
            end: whether the peer ends its side with that, in the same segment if that can be.
            hold: how many bytes of that, as they are on the wire, are held back until ``release()``.
        """
        raise NotImplementedError

    def pair(self, first: type[Stream], second: type[Stream]) -> tuple[Any, Any]:
        """Return a stream of each of these classes, connected to one another."""
        raise NotImplementedError

    def end_with(self, peer: Any, data: bytes) -> None:
        """Have a peer send a little and its end so that they arrive at once, before anybody can read the first."""
        _say(peer, data, True)

    def release(self, peer: Any) -> None:
        """Have a peer send what was held back."""
        in_thread(peer.socket.sendall, self._held.pop(peer))

    def dribble(self, peer: Any, data: bytes, end: bool = True) -> None:
        """Have a peer send data, and its end, each byte on the wire in a segment of its own."""
        if isinstance(peer, TLSPeer):
            _write(peer, data, end)
            data = peer._outgoing.read()
        for number in range(len(data)):
            in_thread(peer.socket.sendall, data[number : number + 1])
        if end:
            peer.socket.shutdown(stdlib_socket.SHUT_WR)

    def send_cut(self, peer: Any, data: bytes, place: int) -> None:
        """Have a peer send data in two segments: so many bytes on the wire, and the rest when these have been received."""
        if isinstance(peer, TLSPeer):
            data = peer.encrypt(data)
        peer.socket.sendall(data[:place])
        rounds()
        peer.socket.sendall(data[place:])

    def send_pieces(self, peer: Any, pieces: list[bytes]) -> None:
        """Have a peer send these in one go, but each in a record of its own."""
        if isinstance(peer, TLSPeer):
            pieces = [peer.encrypt(piece) for piece in pieces]
        in_thread(peer.socket.sendall, b"".join(pieces))

    def _listen(self, stream_class: type[Stream]) -> tuple[Any, list[Any]]:
        """Return the address of a server of this class, and a list that gets its streams as they are made."""
        made: list[Any] = []

        class Made(stream_class):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                made.append(self)

        Made.__name__ = stream_class.__name__
        server = Server(Made)
        self._servers.append(server)
        if self.tls:
            server.startSSL(contexts(self.version)[0])
        server.listen(("127.0.0.1", 0))
        return server.local_address, made

    def _dial(self, stream_class: type[Stream], address: Any) -> Any:
        stream = stream_class()
        self._streams.append(stream)
        if self.tls:
            stream.startSSL(contexts(self.version)[1])
        return stream.connect(address)

    def _known(self, made: list[Any]) -> Any:
        """Return the stream that a server has made, as soon as its connection stands."""
        until(lambda: made)
        self._streams.append(made[0])
        return self._standing(made[0])

    def _standing(self, stream: Any) -> Any:
        until(lambda: stream.connected or stream.close_reason is not None)
        return stream

    def _with_tls(self, peer: Peer, first: bytes, end: bool, hold: int, *, server_side: bool) -> Peer:
        """Do a peer's handshake; what it says first leaves with its last message."""
        context = contexts(self.version)[0 if server_side else 1]
        secured = TLSPeer.over(peer, context, server_side=server_side, shake=False)
        self._peers.append(secured)

        def shake_hands() -> None:
            secured.object.do_handshake()
            _write(secured, first, end)
            if hold:
                wire = secured._outgoing.read()
                self._held[secured] = wire[-hold:]
                secured.socket.sendall(wire[:-hold])

        def in_a_thread() -> None:
            secured._pump(shake_hands)
            if end:
                secured.socket.shutdown(stdlib_socket.SHUT_WR)

        in_thread(in_a_thread)
        return secured

    def _plain(self, peer: Peer, first: bytes, end: bool, hold: int) -> Peer:
        if hold:
            self._held[peer] = first[-hold:]
            first = first[:-hold]
        if len(first) <= AT_ONCE:
            _say(peer, first, end)
        else:
            in_thread(_say, peer, first, end)
        return peer

    def _pair_over_loopback(self, accepted: type[Stream], dialled: type[Stream]) -> tuple[Any, Any]:
        address, made = self._listen(accepted)
        stream = self._dial(dialled, address)
        return self._known(made), self._standing(stream)


class TCPServer(Transport):
    """A connection that a server has accepted."""

    def connect(
        self, stream_class: type[Stream], *, narrow: bool = False, first: bytes = b"", end: bool = False, hold: int = 0
    ) -> tuple[Any, Any]:
        address, made = self._listen(stream_class)
        socket = PlainSocket(stdlib_socket.AF_INET, stdlib_socket.SOCK_STREAM)
        peer = Peer.of(socket)
        self._peers.append(peer)
        if narrow:
            socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_RCVBUF, NARROW)
        # In this greenlet, so that nobody has accepted it yet when it speaks.
        socket.connect(address)
        peer = self._with_tls(peer, first, end, hold, server_side=False) if self.tls else self._plain(peer, first, end, hold)
        stream = self._known(made)
        if narrow:
            _narrow(stream.socket)
        return stream, peer

    def pair(self, first: type[Stream], second: type[Stream]) -> tuple[Any, Any]:
        return self._pair_over_loopback(first, second)


class TCPClient(Transport):
    """A connection that we have dialled."""

    def connect(
        self, stream_class: type[Stream], *, narrow: bool = False, first: bytes = b"", end: bool = False, hold: int = 0
    ) -> tuple[Any, Any]:
        listener = ListeningPeer(rcvbuf=NARROW if narrow else None)
        self._listeners.append(listener)
        stream = self._dial(stream_class, listener.address)
        peer = listener.accept()
        self._peers.append(peer)
        peer = self._with_tls(peer, first, end, hold, server_side=True) if self.tls else self._plain(peer, first, end, hold)
        self._standing(stream)
        if narrow:
            _narrow(stream.socket)
        return stream, peer

    def pair(self, first: type[Stream], second: type[Stream]) -> tuple[Any, Any]:
        accepted, dialled = self._pair_over_loopback(second, first)
        return dialled, accepted


class UnixPair(Transport):
    """One end of a pair of Unix sockets, taken over by a stream."""

    resets = False
    left = CloseReason.PEER_ENDED

    def connect(
        self, stream_class: type[Stream], *, narrow: bool = False, first: bytes = b"", end: bool = False, hold: int = 0
    ) -> tuple[Any, Any]:
        here, there = _socket.socketpair(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_STREAM)
        peer = Peer.of(PlainSocket(fileno=there.detach()))
        self._peers.append(peer)
        socket = gevent.socket.socket(fileno=here.detach())
        if narrow:
            _narrow(socket)
        if self.tls:
            stream = self._take_over(stream_class, socket)
            peer = self._with_tls(peer, first, end, hold, server_side=True)
        elif len(first) <= AT_ONCE:
            self._plain(peer, first, end, hold)
            stream = self._take_over(stream_class, socket)
        else:
            stream = self._take_over(stream_class, socket)
            self._plain(peer, first, end, hold)
        return self._standing(stream), peer

    def _take_over(self, stream_class: type[Stream], socket: Any, server_side: bool = False) -> Any:
        options = None
        if self.tls:
            context = contexts(self.version)[0 if server_side else 1]
            options = {"context": context, "server_side": True} if server_side else {"context": context, "server_hostname": "localhost"}
        stream = stream_class(socket=socket, ssl_options=options)
        self._streams.append(stream)
        return stream

    def pair(self, first: type[Stream], second: type[Stream]) -> tuple[Any, Any]:
        here, there = _socket.socketpair(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_STREAM)
        one = self._take_over(first, gevent.socket.socket(fileno=here.detach()))
        two = self._take_over(second, gevent.socket.socket(fileno=there.detach()), server_side=True)
        return self._standing(one), self._standing(two)


class TLS12Server(TCPServer):
    """A connection that a server has accepted, with TLS 1.2."""

    tls = True
    version = "1.2"


class TLS13Server(TCPServer):
    """A connection that a server has accepted, with TLS 1.3."""

    tls = True
    version = "1.3"


class TLS12UnixPair(UnixPair):
    """One end of a pair of Unix sockets, as a client with TLS 1.2."""

    left = CloseReason.TLS_FAILED  # an end without a goodbye
    tls = True
    version = "1.2"


class TLS13Client(TCPClient):
    """A connection that we have dialled, with TLS 1.3."""

    tls = True
    version = "1.3"


def fixture_of(kind: type[Transport]) -> Any:
    """Return a fixture, for a class of tests, that gives them a transport of that kind."""

    @pytest.fixture
    def transport(self: Any) -> Iterator[Transport]:
        with kind() as made:
            yield made

    return transport


def _narrow(socket: Any) -> None:
    socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_SNDBUF, NARROW)


def _write(peer: TLSPeer, data: bytes, end: bool) -> None:
    """Put data, and the goodbye, into a peer's outgoing bytes."""
    if data:
        peer.object.write(data)
    if end:
        try:
            # What has come must be read before: unwrap() also looks at what the other side sends, and would throw it away.
            while peer._incoming.pending and (piece := peer.object.read(65536)):
                peer._pending += piece
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass
        try:
            peer.object.unwrap()
        except ssl.SSLError:
            pass  # the other side has not said its own yet


def _say(peer: Any, data: bytes, end: bool) -> None:
    if isinstance(peer, TLSPeer):
        _write(peer, data, end)
        data = peer._outgoing.read()
    if data:
        peer.socket.sendall(data)
    if end:
        peer.socket.shutdown(stdlib_socket.SHUT_WR)


def rounds(count: int = 3) -> None:
    """Let the hub look at its sockets some times, so that what should not happen could; ``sleep(0)`` does not make it do so."""
    for _ in range(count):
        gevent.sleep(0.0005)


def exchange(peer: Any, data: bytes, size: int) -> bytes:
    """Have a peer send `data` and receive `size` bytes at the same time, and return these.

    All in one thread, for two may not use one TLS connection.
    """
    received: bytes = in_thread(_exchange, peer, data, size)
    return received


def _exchange(peer: Any, data: bytes, size: int) -> bytes:
    encode, decode = (_encoder(peer), _decoder(peer)) if isinstance(peer, TLSPeer) else (bytes, bytes)
    sock = peer.socket
    pieces = [peer._pending, decode(b"")]
    peer._pending = b""
    got = sum(map(len, pieces))
    unsent, out = memoryview(data), b""
    sock.setblocking(False)
    try:
        while got < size or out or unsent:
            if not out and unsent:
                out, unsent = encode(unsent[:65536]), unsent[65536:]
            readable, writable, _ = select([sock], [sock] if out else [], [], TIMEOUT)
            assert readable or writable, f"nothing came, and nothing was taken, for {TIMEOUT:g} seconds; {got} bytes had come"
            if writable:
                out = out[sock.send(out) :]
            if readable:
                raw = sock.recv(1 << 18)
                assert raw, f"the connection ended when {got} bytes of {size} had come"
                pieces.append(decode(raw))
                got += len(pieces[-1])
    finally:
        sock.settimeout(TIMEOUT)
    whole = b"".join(pieces)
    peer._pending = whole[size:]
    return whole[:size]


def _encoder(peer: TLSPeer) -> Callable[[Any], bytes]:
    def encode(data: Any) -> bytes:
        peer.object.write(data)
        return peer._outgoing.read()

    return encode


def _decoder(peer: TLSPeer) -> Callable[[bytes], bytes]:
    def decode(raw: bytes) -> bytes:
        peer._incoming.write(raw)
        pieces = []
        try:
            while piece := peer.object.read(65536):
                pieces.append(piece)
        except ssl.SSLWantReadError:
            pass
        return b"".join(pieces)

    return decode
