"""STARTTLS: TLS that begins on a connection that stands, on either side; and what nobody may smuggle in before it."""

import errno
import re
import ssl
import time
from collections.abc import Callable
from struct import Struct
from typing import Any, NamedTuple

import gevent
import pytest
from certificates import authority, client_context, server_context
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers import in_thread
from tls_peers import TLSPeer, tls_peer  # noqa: F401
from waiting import nothing_is_kept, turns, unsent, until  # noqa: F401

from pants_green import ChannelClosed, Client, CloseReason, Connection, Engine, ReadTimeout, Server, Stream, StreamBufferOverflow
from pants_green.errors import HandshakeTimeout
from pants_green.framing import Framer, LengthPrefix, Netstring
from pants_green.testing import memory_pair
from pants_green.testing.strategies import fragments

KIB = 1024
MIB = 1024 * KIB

#: The callbacks that are recorded; ``on_read`` does so itself.
NAMES = (
    "on_connect",
    "on_ssl_handshake",
    "on_ssl_handshake_error",
    "on_ssl_error",
    "on_end",
    "on_overflow_error",
    "on_timeout",
    "on_error",
    "on_close",
)

# Words of eight bytes, so that every kind of delimiter can cut them.
STARTTLS = b"STARTTLS"
BEFORE = [b"before_1", b"before_2"]
AFTER = [b"after__1", b"after__2"]
INJECTED = b"MAIL_bad"

#: The answer to STARTTLS, in clear.
GO = b"+go\n"


class Slip(Framer[bytes]):
    """SLIP packets: a framer such as a user would write."""

    def find(self, data, start, searched):
        end = data.find(b"\xc0", start + searched)
        return None if end < 0 else (bytes(data[start:end]), end + 1)


def same(word: bytes) -> bytes:
    return word


class Cut(NamedTuple):
    """A way to cut the input: attributes of a stream, how a word is sent, and how it is read off the arguments of on_read."""

    attributes: dict[str, Any]
    wrap: Callable[[bytes], bytes]
    word: Callable[..., bytes] = same


LINE = Cut({"read_delimiter": b"\n"}, lambda word: word + b"\n")
CHUNKS = {
    "bytes": LINE,
    "str": Cut({"read_delimiter": "\r\n"}, lambda word: word + b"\r\n"),
    "int": Cut({"read_delimiter": 8}, same),
    "struct": Cut({"read_delimiter": Struct("!8s")}, same),
    "struct of three": Cut({"read_delimiter": Struct("!4s2s2s")}, same, lambda *fields: b"".join(fields)),
    "regex": Cut({"read_delimiter": re.compile(rb"\r?\n")}, lambda word: word + b"\r\n"),
    "match": Cut({"read_delimiter": re.compile(rb"(\w+);"), "regex_search": False}, lambda word: word + b";", lambda match: match[1]),
    "text": Cut({"read_delimiter": "\n", "encoding": "utf-8"}, lambda word: word + b"\n", str.encode),
    "netstring": Cut({"read_delimiter": Netstring()}, lambda word: b"8:" + word + b","),
    "length": Cut({"read_delimiter": LengthPrefix("!H")}, lambda word: b"\0\x08" + word),
    "framer": Cut({"read_delimiter": Slip()}, lambda word: word + b"\xc0"),
}
WHOLE = {
    "none": Cut({"read_delimiter": None}, same),
    "none, text": Cut({"read_delimiter": None, "encoding": "utf-8"}, same, str.encode),
}
ALL_CUTS = {**CHUNKS, **WHOLE}


def cases(table):
    return [pytest.param(value, id=name) for name, value in table.items()]


class Side:
    """One of our streams, as a server's connection or as a client, and the plain peer that it speaks to."""

    def __init__(self, name, server_of, peer, listening_peer):
        self.is_server = name == "server"
        self.base = Connection if self.is_server else Client
        self._server_of = server_of
        self._peer = peer
        self._listening_peer = listening_peer
        self._accepted = []
        self.stream = None

    def options(self, **more):
        """Return options for startSSL on our side."""
        own = authority().localhost if self.is_server else {"ca_certs": authority().file, "server_hostname": "localhost"}
        return {**own, **more}

    def open(self, kind, **options):
        """Connect a stream of the class `kind`; return the plain peer."""
        if self.is_server:

            def __init__(stream, *args, **kwargs):
                self.stream = stream
                kind.__init__(stream, *args, **kwargs)

            server = self._server_of(type(kind.__name__, (kind,), {"__init__": __init__, "__slots__": ()}))
            peer = self._peer(server, **options)
            until(lambda: self.stream is not None)
        else:
            listener = self._listening_peer(**options)
            self.stream = kind().connect(listener.address)
            peer = listener.accept()
            self._accepted.append(peer)
        return peer

    def over(self, plain, version=None, shake=True):
        """Go on with a peer's socket in TLS; what it has received and not read is the beginning of that."""
        context = client_context(version) if self.is_server else server_context(version)
        tls = TLSPeer.over(plain, context, server_side=not self.is_server, shake=False)
        return shaken(tls, plain) if shake else tls

    def close(self):
        for one in self._accepted:
            one.close()
        if self.stream is not None:
            self.stream.abort()


def shaken(tls, plain):
    tls._incoming.write(plain._pending)
    plain._pending = b""
    tls.shake_hands()
    return tls


def hello_of(tls):
    """Return the first bytes of a client's handshake."""
    with pytest.raises(ssl.SSLWantReadError):
        tls.object.do_handshake()
    return tls._outgoing.read()


@pytest.fixture(params=["server", "client"])
def side(request, server_of, peer, listening_peer):
    made = Side(request.param, server_of, peer, listening_peer)
    yield made
    made.close()


@pytest.fixture
def server_side(server_of, peer, listening_peer):
    made = Side("server", server_of, peer, listening_peer)
    yield made
    made.close()


class MemoryTLS:
    """A client's TLS over a MemoryEnd."""

    def __init__(self, end, version=None):
        self._end = end
        self._seen = 0
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.object = client_context(version).wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")

    def hello(self):
        with pytest.raises(ssl.SSLWantReadError):
            self.object.do_handshake()
        return self._outgoing.read()

    def skip(self, size):
        self._end.wait_for(self._seen + size)
        self._seen += size

    def shake_hands(self):
        while True:
            try:
                self.object.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._end.send(self._outgoing.read())
                received = self._end.wait_for(self._seen + 1)
                self._incoming.write(received[self._seen :])
                self._seen = len(received)
        self._end.send(self._outgoing.read())

    def encrypt(self, data):
        self.object.write(data)
        return self._outgoing.read()

    def goodbye(self):
        """Return ours, which answers that of the stream."""
        self.object.unwrap()
        return self._outgoing.read()

    def receive(self):
        """Take in what has come; return the data, and whether a goodbye was behind it."""
        received = self._end.received()
        self._incoming.write(received[self._seen :])
        self._seen = len(received)
        pieces = []
        while True:
            try:
                data = self.object.read(1 << 16)
            except ssl.SSLWantReadError:
                return b"".join(pieces), False
            if not data:
                return b"".join(pieces), True
            pieces.append(data)


@pytest.fixture
def in_memory():
    """Return the server's side of a stream that stands on no server."""
    made = Side("server", None, None, None)
    made.base = Stream
    options = made.options
    made.options = lambda: options(server_side=True)
    return made


def upgrading(side, recorder, cut=LINE, then=None, **attributes):
    """Return a class that upgrades at STARTTLS, after which it does `then(stream)`; protected words come back as they are."""

    def on_read(self, *chunk):
        word = cut.word(*chunk)
        recorder("read", word)
        if word == STARTTLS:
            self.write(GO)
            self.startSSL(side.options())
            if then is not None:
                then(self)
        elif self.cipher:
            self.write(word)

    return recorder.of(side.base, *NAMES, on_read=on_read, **cut.attributes, **attributes)


# ---- From where it is called

@pytest.mark.parametrize("cut", cases(ALL_CUTS))
def test_starttls_in_on_read_protects_what_comes_behind_that_chunk(side, recorder, cut):
    plain = side.open(upgrading(side, recorder, cut))
    plain.send(cut.wrap(STARTTLS))
    assert plain.recv_until(GO) == GO
    goes_on_protected(side.over(plain), recorder, cut, [STARTTLS])


@pytest.mark.parametrize("cut", cases(CHUNKS))
def test_starttls_in_the_last_chunk_of_a_batch_protects_what_comes_behind_it(side, recorder, cut):
    plain = side.open(upgrading(side, recorder, cut))
    words = [*BEFORE, STARTTLS]
    plain.send(b"".join(map(cut.wrap, words)))
    assert plain.recv_until(GO) == GO
    goes_on_protected(side.over(plain), recorder, cut, words)


@pytest.mark.parametrize("before", [[], BEFORE], ids=["first", "middle"])
@pytest.mark.parametrize("cut", cases(CHUNKS))
def test_starttls_with_the_client_s_hello_in_the_same_segment_works(server_side, recorder, cut, before):
    plain = server_side.open(upgrading(server_side, recorder, cut))
    words = [*before, STARTTLS]
    tls = server_side.over(plain, shake=False)
    # With every delimiter there is, so that a part of the hello is taken for chunks, which have to be put back as they were.
    tls.object.context.set_alpn_protocols(["\n\r\n;12;\r\n\n8:12345678,", "x"])
    plain.send(b"".join(map(cut.wrap, words)) + hello_of(tls))
    assert plain.recv_until(GO) == GO
    goes_on_protected(shaken(tls, plain), recorder, cut, words)


def goes_on_protected(tls, recorder, cut, words):
    """Exchange words over TLS, end, and assert that the stream got `words` in clear, and these behind the handshake."""
    for word in AFTER:
        tls.send(cut.wrap(word))
        assert tls.recv_exactly(8) == word
    tls.shutdown_output()
    assert tls.at_eof()
    recorder.wait_for("on_close")
    before = [("read", word) for word in words]
    after = [("read", word) for word in AFTER]
    assert recorder == [("on_connect",), *before, ("on_ssl_handshake",), *after, ("on_end", b""), ("on_close",)]


def test_starttls_in_on_write_begins_when_the_answer_is_sent(side, recorder):
    def on_read(self, word):
        recorder("read", word)
        self.write(GO if word == STARTTLS else word)

    def on_write(self):
        if not self.ssl_enabled:
            self.startSSL(side.options())

    plain = side.open(recorder.of(side.base, *NAMES, on_read=on_read, on_write=on_write, read_delimiter=b"\n"))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    goes_on_protected(side.over(plain), recorder, LINE, [STARTTLS])


def test_starttls_in_on_connect_protects_everything_but_what_was_written_before(side, recorder):
    def on_connect(self):
        self.write(GO)
        self.startSSL(side.options())
        self.write(b"protected\n")

    def on_read(self, word):
        recorder("read", word)

    plain = side.open(recorder.of(side.base, *NAMES, on_connect=on_connect, on_read=on_read, read_delimiter=b"\n"))
    assert plain.recv_until(GO) == GO
    tls = side.over(plain)
    assert tls.recv_until(b"\n") == b"protected\n"
    tls.send(b"one\ntwo\n")
    recorder.wait_for(("read", b"two"))
    assert recorder == [("on_connect",), ("on_ssl_handshake",), ("read", b"one"), ("read", b"two")]


CALLERS = {
    "greenlet": lambda call: gevent.spawn(call).get(),
    "timer": lambda call: Engine.instance().defer(0.001, call),
    "next turn": lambda call: Engine.instance().callback(call),
    "test": lambda call: call(),
    "thread": lambda call: in_thread(Engine.instance().call_from_thread, call),
}


@pytest.mark.parametrize("caller", cases(CALLERS))
def test_starttls_from_outside_while_the_stream_waits_takes_effect_at_once(side, recorder, caller):
    def on_read(self, word):
        recorder("read", word)
        self.write(word + b"\n")

    plain = side.open(recorder.of(side.base, *NAMES, on_read=on_read, read_delimiter=b"\n"))
    plain.send(b"clear\n")
    assert plain.recv_until(b"\n") == b"clear\n"
    caller(lambda: side.stream.startSSL(side.options()))
    until(lambda: side.stream.ssl_enabled)
    tls = side.over(plain)
    tls.send(b"protected\n")
    assert tls.recv_until(b"\n") == b"protected\n"
    assert recorder == [("on_connect",), ("read", b"clear"), ("on_ssl_handshake",), ("read", b"protected")]


@pytest.mark.parametrize("cut", cases(ALL_CUTS))
def test_read_behind_starttls_does_the_handshake_and_returns_protected_data(side, recorder, cut):
    def then(self):
        got = self.read()
        recorder("answer", cut.word(*got) if isinstance(got, tuple) else cut.word(got))
        recorder("version", self.ssl_object.version())
        self.write(b"+ok\n")

    plain = side.open(upgrading(side, recorder, cut, then))
    plain.send(cut.wrap(STARTTLS))
    assert plain.recv_until(GO) == GO
    tls = side.over(plain, "1.3")
    tls.send(cut.wrap(AFTER[0]))
    assert tls.recv_exactly(4) == b"+ok\n"
    tls.send(cut.wrap(AFTER[1]))
    assert tls.recv_exactly(8) == AFTER[1]
    assert recorder == [
        ("on_connect",),
        ("read", STARTTLS),
        ("answer", AFTER[0]),
        ("version", "TLSv1.3"),
        ("on_ssl_handshake",),
        ("read", AFTER[1]),
    ]


def test_starttls_in_a_loop_of_reads_in_on_connect(side, recorder):
    def on_connect(self):
        while (line := self.read()) != STARTTLS:
            recorder("read", line)
        self.write(GO)
        self.startSSL(side.options())
        while (line := self.read()) != b"QUIT":
            recorder("read", line)
        self.end()

    plain = side.open(recorder.of(side.base, *NAMES, on_connect=on_connect, read_delimiter=b"\n"))
    plain.send(b"one\ntwo\nSTARTTLS\n")
    assert plain.recv_until(GO) == GO
    tls = side.over(plain)
    tls.send(b"three\nfo")
    tls.send(b"ur\nQUIT\nfive\n")
    assert tls.recv_all() == b""
    recorder.wait_for("on_close")
    reads = [("read", word) for word in (b"one", b"two", b"three", b"four")]
    assert recorder == [("on_connect",), *reads, ("on_ssl_handshake",), ("on_close",)]


def test_starttls_from_another_greenlet_while_a_callback_is_in_read(side, recorder):
    def on_connect(self):
        recorder("reading")
        recorder("got", self.read())

    plain = side.open(recorder.of(side.base, "on_ssl_handshake", "on_close", on_connect=on_connect, read_delimiter=b"\n"))
    recorder.wait_for("reading")
    turns()
    side.stream.startSSL(side.options())
    tls = side.over(plain)
    tls.send(b"protected\n")
    recorder.wait_for("on_ssl_handshake")
    assert recorder == ["reading", ("got", b"protected"), ("on_ssl_handshake",)]


def test_starttls_from_another_greenlet_while_a_callback_drains(side, recorder):
    clear = b"c" * 8 * MIB

    def on_connect(self):
        self.write(clear)
        recorder("draining")
        self.drain()
        recorder("drained")

    plain = side.open(recorder.of(side.base, "on_ssl_handshake", "on_close", on_connect=on_connect), rcvbuf=32 * KIB)
    recorder.wait_for("draining")
    turns()
    side.stream.startSSL(side.options())
    side.stream.write(b"protected\n")
    assert plain.recv_exactly(len(clear)) == clear
    tls = side.over(plain)
    assert tls.recv_until(b"\n") == b"protected\n"
    recorder.wait_for("on_ssl_handshake")
    assert recorder == ["draining", "drained", ("on_ssl_handshake",)]


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_starttls_in_the_constructor_of_a_connection_begins_with_the_handshake(server_of, peer, recorder, version):
    def __init__(self, *args, **kwargs):
        Connection.__init__(self, *args, **kwargs)
        self.startSSL(authority().localhost)

    def on_read(self, data):
        recorder("read", data)
        self.write(data)

    server = server_of(recorder.of(Connection, *NAMES, __init__=__init__, on_read=on_read))
    tls = TLSPeer.over(peer(server), client_context(version))
    tls.send(b"hello")
    assert tls.recv_exactly(5) == b"hello"
    tls.shutdown_output()
    assert tls.at_eof()
    recorder.wait_for("on_close")
    assert recorder == [("on_ssl_handshake",), ("on_connect",), ("read", b"hello"), ("on_end", b""), ("on_close",)]


def test_failed_handshake_of_starttls_in_the_constructor_ends_without_on_connect(server_of, peer, recorder):
    def __init__(self, *args, **kwargs):
        Connection.__init__(self, *args, **kwargs)
        self.startSSL(authority().localhost)

    server = server_of(recorder.of(Connection, *NAMES, __init__=__init__))
    plain = peer(server)
    plain.send(b"GET / HTTP/1.0\r\n\r\n")
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_ssl_handshake_error", "on_close"]
    assert isinstance(recorder[0][1], ssl.SSLError)


# ---- What goes out, and how


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_large_output_before_goes_out_in_clear_and_behind_it_encrypted(side, recorder, version):
    clear = bytes(range(256)) * 4 * KIB * 5
    hidden = clear[::-1]

    def on_connect(self):
        self.write(clear)
        self.startSSL(side.options())
        self.write(hidden)

    plain = side.open(recorder.of(side.base, *NAMES, on_connect=on_connect), rcvbuf=32 * KIB)
    until(lambda: side.stream.ssl_enabled and unsent(side.stream) < len(clear) + len(hidden))
    turns(20)  # the kernel is full, and nobody reads
    assert unsent(side.stream) > len(hidden)
    assert plain.recv_exactly(len(clear)) == clear
    assert plain._pending[:2] in (b"", b"\x16\x03")  # the beginning of a handshake
    tls = side.over(plain, version)
    assert tls.recv_exactly(len(hidden)) == hidden
    side.stream.end()
    assert tls.recv_all() == b""
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("on_ssl_handshake",), ("on_close",)]


def test_many_writes_around_starttls_are_parted_where_it_was_called(side, recorder):
    def on_connect(self):
        for number in range(500):
            self.write(b"clear %d\n" % number)
        self.startSSL(side.options())
        for number in range(500):
            self.write(b"hidden %d\n" % number)

    plain = side.open(recorder.of(side.base, *NAMES, on_connect=on_connect))
    clear = b"".join(b"clear %d\n" % number for number in range(500))
    assert plain.recv_exactly(len(clear)) == clear
    hidden = b"".join(b"hidden %d\n" % number for number in range(500))
    assert side.over(plain).recv_exactly(len(hidden)) == hidden


def test_flush_behind_starttls_sends_nothing_in_clear(side, recorder):
    def then(self):
        self.write(b"secret", flush=True)
        self.flush()
        self.close()

    plain = side.open(upgrading(side, recorder, then=then))
    plain.send(b"STARTTLS\n")
    assert plain.recv_all() == GO
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("read", STARTTLS), ("on_close",)]


def test_drain_behind_starttls_does_the_handshake(side, recorder):
    hidden = b"h" * MIB

    def then(self):
        self.write(hidden)
        self.drain()
        recorder("drained", unsent(self) <= self.low_water)

    plain = side.open(upgrading(side, recorder, then=then))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    tls = side.over(plain)
    assert tls.recv_exactly(len(hidden)) == hidden
    recorder.wait_for("on_ssl_handshake")
    assert recorder == [("on_connect",), ("read", STARTTLS), ("drained", True), ("on_ssl_handshake",)]


def test_write_over_write_limit_behind_starttls_does_the_handshake_and_waits(side, recorder):
    def then(self):
        for _ in range(8):
            self.write(b"h" * 48 * KIB)
        recorder("written")

    plain = side.open(upgrading(side, recorder, then=then, write_limit=64 * KIB))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    turns()
    assert "written" not in recorder
    tls = side.over(plain)
    assert tls.recv_exactly(8 * 48 * KIB) == b"h" * 8 * 48 * KIB
    recorder.wait_for("on_ssl_handshake")
    assert recorder == [("on_connect",), ("read", STARTTLS), "written", ("on_ssl_handshake",)]


def test_write_over_write_limit_by_a_greenlet_waits_for_the_handshake(side, recorder):
    plain = side.open(upgrading(side, recorder, write_limit=64 * KIB))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO

    def write():
        for _ in range(8):
            side.stream.write(b"h" * 48 * KIB)

    writer = gevent.spawn(write)
    turns()
    assert not writer.dead
    tls = side.over(plain)
    assert tls.recv_exactly(8 * 48 * KIB) == b"h" * 8 * 48 * KIB
    writer.get()


def test_write_over_write_limit_by_a_timer_during_the_handshake_overflows(side, recorder):
    plain = side.open(upgrading(side, recorder, write_limit=64 * KIB))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    Engine.instance().defer(0, lambda: [side.stream.write(b"h" * 48 * KIB) for _ in range(3)])
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "read", "on_overflow_error", "on_close"]
    assert isinstance(recorder[2][1], StreamBufferOverflow)


def test_on_write_follows_when_clear_and_protected_output_are_gone(side, recorder):
    def on_write(self):
        recorder("on_write", unsent(self), self.cipher is not None)

    plain = side.open(upgrading(side, recorder, on_write=on_write, then=lambda self: self.write(b"hidden\n")))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    assert side.over(plain).recv_until(b"\n") == b"hidden\n"
    recorder.wait_for("on_write")
    assert recorder[-1] == ("on_write", 0, True)
    assert recorder.names().count("on_write") == 1


# ---- Ending it in the same callback, or while the handshake goes on


def hide_and(name):
    def then(self):
        self.write(b"hidden")
        getattr(self, name)()

    return then


def test_end_behind_starttls_still_sends_everything_and_says_goodbye(side, recorder):
    plain = side.open(upgrading(side, recorder, then=hide_and("end")))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    tls = side.over(plain)
    tls.send(b"too late\n")
    assert tls.recv_all() == b"hidden"
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("read", STARTTLS), ("on_ssl_handshake",), ("on_close",)]
    assert side.stream.close_reason is CloseReason.ENDED_HERE


def test_write_eof_behind_starttls_says_goodbye_and_reads_on(side, recorder):
    plain = side.open(upgrading(side, recorder, then=hide_and("write_eof")))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    tls = side.over(plain)
    assert tls.recv_all() == b"hidden"
    assert tls.socket.recv(1) == b""  # a FIN, too
    tls._incoming.write_eof()
    side.stream.on_read = lambda word: recorder("read", word)
    tls.send(b"one\ntwo\n")
    tls.shutdown_output()
    recorder.wait_for("on_close")
    reads = [("read", b"one"), ("read", b"two")]
    assert recorder == [("on_connect",), ("read", STARTTLS), ("on_ssl_handshake",), *reads, ("on_end", b""), ("on_close",)]


def test_write_eof_behind_starttls_with_nothing_written_waits_for_the_handshake(side, recorder):
    def on_connect(self):
        self.startSSL(side.options())
        self.write_eof()

    plain = side.open(recorder.of(side.base, *NAMES, on_connect=on_connect))
    tls = side.over(plain)
    assert tls.recv_all() == b""
    tls.shutdown_output()
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("on_ssl_handshake",), ("on_end", b""), ("on_close",)]


def test_close_behind_starttls_sends_only_what_is_clear(side, recorder):
    plain = side.open(upgrading(side, recorder, then=hide_and("close")))
    plain.send(b"STARTTLS\n")
    assert plain.recv_all() == GO
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("read", STARTTLS), ("on_close",)]
    assert side.stream.close_reason is CloseReason.CLOSED_HERE


def test_abort_behind_starttls_resets(side, recorder):
    plain = side.open(upgrading(side, recorder, then=hide_and("abort")))
    plain.send(b"STARTTLS\n")
    assert plain.raises_reset()
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("read", STARTTLS), ("on_close",)]


def test_exception_behind_starttls_closes_without_a_handshake(side, recorder):
    def then(self):
        raise ValueError("a mistake")

    plain = side.open(upgrading(side, recorder, then=then))
    plain.send(b"STARTTLS\n")
    assert plain.recv_all() == GO
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "read", "on_error", "on_close"]


def test_pause_before_starttls_does_not_hold_up_the_handshake_but_what_comes_behind_it(side, recorder):
    def on_read(self, word):
        recorder("read", word)
        if word == STARTTLS:
            self.write(GO)
            self.pause()
            self.startSSL(side.options())
        else:
            self.write(word)

    plain = side.open(recorder.of(side.base, *NAMES, on_read=on_read, read_delimiter=b"\n"))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    tls = side.over(plain)
    tls.send(b"after__1\n")
    recorder.wait_for("on_ssl_handshake")
    turns()
    assert recorder == [("on_connect",), ("read", STARTTLS), ("on_ssl_handshake",)]
    side.stream.resume()
    assert tls.recv_exactly(8) == AFTER[0]
    assert recorder[-1] == ("read", AFTER[0])


@pytest.mark.parametrize(("ending", "reason"), [("close", CloseReason.CLOSED_HERE), ("abort", CloseReason.ABORTED_HERE)])
def test_closing_from_another_greenlet_during_the_handshake_ends_it_at_once(side, recorder, ending, reason):
    plain = side.open(upgrading(side, recorder))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    turns()
    began = time.monotonic()
    gevent.spawn(getattr(side.stream, ending)).get()
    recorder.wait_for("on_close")
    assert time.monotonic() - began < 2
    assert recorder == [("on_connect",), ("read", STARTTLS), ("on_close",)]
    assert side.stream.close_reason is reason


@pytest.mark.parametrize("ending", ["end", "write_eof"])
def test_ending_from_another_greenlet_during_the_handshake_waits_for_it(side, recorder, ending):
    plain = side.open(upgrading(side, recorder))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    side.stream.write(b"hidden")
    getattr(side.stream, ending)()
    turns()
    tls = side.over(plain)
    assert tls.recv_all() == b"hidden"
    tls.shutdown_output()
    recorder.wait_for("on_close")
    ends = [("on_end", b"")] if ending == "write_eof" else []
    assert recorder == [("on_connect",), ("read", STARTTLS), ("on_ssl_handshake",), *ends, ("on_close",)]


def in_small_memory(in_memory, recorder, version, capacity, **attributes):
    """Return a stream that has shaken hands and of which no more than `capacity` bytes can be on their way, its peer and its TLS."""

    def on_connect(self):
        self.startSSL(in_memory.options())

    stream, end = memory_pair(recorder.of(Stream, *NAMES, on_connect=on_connect, **attributes), capacity=capacity)
    tls = MemoryTLS(end, version)
    end.send(tls.hello())
    tls.shake_hands()
    recorder.wait_for("on_ssl_handshake")
    turns()
    assert tls.receive() == (b"", False)  # the tickets of TLS 1.3
    return stream, end, tls


#: The data that is sent below, as a record, and the goodbye behind it.
RECORDS = {"1.2": (1000 + 29, 31), "1.3": (1000 + 22, 24)}


@pytest.mark.parametrize("limit", [10, None])
@pytest.mark.parametrize("ending", ["end", "write_eof"])
@pytest.mark.parametrize("room", [-1, 0, 1, 10, 23, 40])
@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_goodbye_for_which_there_is_no_room_follows_when_there_is(in_memory, recorder, version, ending, limit, room):
    limits = {"write_timeout": limit, "handshake_timeout": limit}
    stream, end, tls = in_small_memory(in_memory, recorder, version, RECORDS[version][0] + room, **limits)
    try:
        stream.write(b"x" * 1000)
        getattr(stream, ending)()
        turns()
        got, ended = tls.receive()
        assert ended is (room >= RECORDS[version][1])
        while not ended:
            until(lambda: end._incoming.size)
            more, ended = tls.receive()
            got += more
        assert got == b"x" * 1000
        end.wait_for(timeout=2)  # a FIN, too
        if ending == "write_eof":
            end.send(tls.goodbye())
        end.shutdown_output()
        recorder.wait_for("on_close")
    finally:
        stream.abort()
    assert recorder.names() == ["on_connect", "on_ssl_handshake", *(["on_end"] if ending == "write_eof" else []), "on_close"]


@pytest.mark.parametrize("ending", ["end", "write_eof"])
@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_goodbye_that_nobody_takes_ends_with_write_timeout(in_memory, recorder, version, ending):
    stream, _end, _tls = in_small_memory(in_memory, recorder, version, RECORDS[version][0] + 10, write_timeout=0.05)
    stream.write(b"x" * 1000)
    getattr(stream, ending)()
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("on_ssl_handshake",), ("on_timeout", "write"), ("on_close",)]


def test_server_that_closes_during_the_handshake_lets_it_come_to_its_end(server_side, recorder):
    plain = server_side.open(upgrading(server_side, recorder, then=lambda self: self.write(b"hidden")))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    server_side.stream.server.close()
    assert server_side.over(plain).recv_all() == b"hidden"
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("read", STARTTLS), ("on_ssl_handshake",), ("on_close",)]


# ---- A handshake that fails

TROUBLE = {
    "ends": lambda plain: plain.shutdown_output(),
    "closes": lambda plain: plain.close(),
    "resets": lambda plain: plain.reset(),
    "sends garbage": lambda plain: plain.send(b"GARBAGE garbage\r\n"),
    "sends an alert": lambda plain: plain.send(b"\x15\x03\x03\x00\x02\x02\x28"),
    "sends half a record and ends": lambda plain: (plain.send(b"\x16\x03\x01\x02\x00\x01"), plain.shutdown_output()),
    "announces a huge record": lambda plain: plain.send(b"\x16\x03\x03\xff\xff" + b"\x01" * 64),
}


@pytest.mark.parametrize("style", ["on_read", "read", "drain"])
@pytest.mark.parametrize("trouble", cases(TROUBLE))
def test_peer_that_makes_trouble_during_the_handshake_is_told_once_and_closed(side, recorder, trouble, style):
    def then(self):
        if style == "read":
            recorder("got", self.read())
        elif style == "drain":
            self.write(b"h" * MIB)
            self.drain()
            recorder("got")

    plain = side.open(upgrading(side, recorder, then=then))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    turns()
    trouble(plain)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "read", "on_ssl_handshake_error", "on_close"]
    assert isinstance(recorder[2][1], OSError)
    assert side.stream.close_reason is CloseReason.TLS_FAILED


def test_reset_during_the_handshake_is_reported_as_the_socket_says_it(side, recorder):
    plain = side.open(upgrading(side, recorder))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    plain.reset()
    recorder.wait_for("on_close")
    assert recorder[2][0] == "on_ssl_handshake_error"
    assert recorder[2][1].errno in (errno.ECONNRESET, errno.EPIPE)


LIMITS = {
    "class": ({"handshake_timeout": 0.05}, None, {}),
    "instance": ({}, 0.05, {}),
    "option": ({"handshake_timeout": 20}, None, {"handshake_timeout": 0.05}),
}


@pytest.mark.parametrize(
    ("limit", "style"),
    [("class", "on_read"), ("class", "read"), ("class", "drain"), ("class", "end"), ("instance", "on_read"), ("option", "on_read")],
)
def test_handshake_that_takes_longer_than_handshake_timeout_is_given_up(side, recorder, limit, style):
    attributes, own, options = LIMITS[limit]

    def on_read(self, word):
        recorder("read", word)
        if own is not None:
            self.handshake_timeout = own
        self.startSSL(side.options(**options))
        if style == "read":
            recorder("got", self.read())
        elif style == "drain":
            self.write(b"h" * MIB)
            self.drain()
        elif style == "end":
            self.end()

    plain = side.open(recorder.of(side.base, *NAMES, on_read=on_read, read_delimiter=b"\n", **attributes))
    began = time.monotonic()
    plain.send(b"STARTTLS\n")
    recorder.wait_for("on_close", timeout=5)
    assert 0.04 < time.monotonic() - began < 3
    assert recorder.names() == ["on_connect", "read", "on_ssl_handshake_error", "on_close"]
    assert isinstance(recorder[2][1], HandshakeTimeout)
    assert "0.05 seconds" in str(recorder[2][1])
    assert side.stream.close_reason is CloseReason.TLS_FAILED


def test_peer_that_drips_its_hello_is_cut_off_by_handshake_timeout(server_side, recorder):
    plain = server_side.open(upgrading(server_side, recorder, handshake_timeout=0.1))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    hello = hello_of(server_side.over(plain, shake=False))
    for byte in hello:
        if "on_close" in recorder.names():
            break
        try:
            plain.send(bytes([byte]))
        except OSError:
            break
        gevent.sleep(0.005)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "read", "on_ssl_handshake_error", "on_close"]
    assert isinstance(recorder[2][1], HandshakeTimeout)


def test_timeout_of_a_read_behind_starttls_counts_during_the_handshake(side, recorder):
    def then(self):
        with pytest.raises(ReadTimeout):
            self.read(timeout=0.05)
        recorder("given up")

    plain = side.open(upgrading(side, recorder, then=then))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    recorder.wait_for("given up", timeout=3)
    tls = side.over(plain)
    tls.send(b"after__1\n")
    assert tls.recv_exactly(8) == AFTER[0]


def test_read_timeout_that_ran_before_starttls_does_not_count_during_the_handshake(side, recorder):
    plain = side.open(upgrading(side, recorder, read_timeout=0.05))
    plain.send(b"be")
    until(lambda: len(side.stream._inbox) == 2)
    side.stream.startSSL(side.options())
    gevent.sleep(0.1)  # not to wait for something: for nothing to happen
    assert recorder.names() == ["on_connect"]
    side.stream.abort()
    recorder.wait_for("on_close")


def test_certificate_that_the_client_does_not_trust_ends_the_upgrade(listening_peer, recorder):
    def on_read(self, word):
        recorder("read", word)
        self.startSSL({"server_hostname": "localhost"})

    listener = listening_peer()
    client = recorder.of(Client, *NAMES, on_read=on_read, read_delimiter=b"\n")().connect(listener.address)
    with listener.accept() as plain:
        plain.send(GO)
        with pytest.raises(ssl.SSLError):
            tls = TLSPeer.over(plain, server_context("1.2"), server_side=True)
            tls.recv()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "read", "on_ssl_handshake_error", "on_close"]
    assert isinstance(recorder[2][1], ssl.SSLCertVerificationError)
    assert client.close_reason is CloseReason.TLS_FAILED


# ---- Behind the handshake

SPLITTING = ["bytes", "int", "struct", "struct of three", "regex"]


@pytest.mark.parametrize("name", SPLITTING)
@pytest.mark.parametrize("style", ["on_read", "read"])
def test_whole_batches_are_cut_again_behind_the_handshake(side, recorder, name, style):
    cut = CHUNKS[name]

    def on_connect(self):
        if style == "read":
            self.read()  # from here on one chunk after the other

    plain = side.open(upgrading(side, recorder, cut, on_connect=on_connect))
    if style == "read":
        plain.send(cut.wrap(BEFORE[0]))
    plain.send(cut.wrap(BEFORE[1]) + cut.wrap(STARTTLS))
    assert plain.recv_until(GO) == GO
    tls = side.over(plain)
    tls.send(cut.wrap(AFTER[0]) * 100)
    assert tls.recv_exactly(800) == AFTER[0] * 100
    assert side.stream._inbox.one_by_one is False
    assert recorder.names() == ["on_connect", "read", "read", "on_ssl_handshake", *["read"] * 100]


@pytest.mark.parametrize("when", ["before startSSL", "behind startSSL", "on_ssl_handshake", "first protected chunk"])
def test_delimiter_may_change_around_the_upgrade(side, recorder, when):
    def on_read(self, word):
        recorder("read", word)
        if word == STARTTLS:
            self.write(GO)
            if when == "before startSSL":
                self.read_delimiter = 4
            self.startSSL(side.options())
            if when == "behind startSSL":
                self.read_delimiter = 4
        elif word == b"one":
            self.read_delimiter = 4

    def on_ssl_handshake(self):
        if when == "on_ssl_handshake":
            self.read_delimiter = 4

    kind = recorder.of(side.base, *NAMES, on_read=on_read, on_ssl_handshake=on_ssl_handshake, read_delimiter=b"\n")
    plain = side.open(kind)
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    tls = side.over(plain)
    tls.send((b"one\n" if when == "first protected chunk" else b"") + b"abcd\n\n\n\nxyz")
    recorder.wait_for(("read", b"\n\n\n\n"))
    tls.shutdown_output()
    recorder.wait_for("on_close")
    first = [("read", b"one")] if when == "first protected chunk" else []
    protected = [*first, ("read", b"abcd"), ("read", b"\n\n\n\n"), ("on_end", b"xyz")]
    assert recorder == [("on_connect",), ("read", STARTTLS), ("on_ssl_handshake",), *protected, ("on_close",)]


def test_on_ssl_handshake_may_write_and_read(side, recorder):
    def on_ssl_handshake(self):
        self.write(b"who are you?\n")
        recorder("told", self.read(timeout=5))

    plain = side.open(upgrading(side, recorder, on_ssl_handshake=on_ssl_handshake))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    tls = side.over(plain)
    assert tls.recv_until(b"\n") == b"who are you?\n"
    tls.send(b"nobody\nafter__1\n")
    assert tls.recv_exactly(8) == AFTER[0]
    assert recorder == [("on_connect",), ("read", STARTTLS), ("on_ssl_handshake",), ("told", b"nobody"), ("read", AFTER[0])]


def test_on_ssl_handshake_that_closes_is_followed_by_on_close_alone(side, recorder):
    plain = side.open(upgrading(side, recorder, on_ssl_handshake=lambda self: self.close()))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    tls = side.over(plain)
    assert tls.at_eof()
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("read", STARTTLS), ("on_ssl_handshake",), ("on_close",)]


def test_truncation_behind_the_upgrade_is_an_error_and_no_end(side, recorder):
    plain = side.open(upgrading(side, recorder))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    tls = side.over(plain)
    tls.send(b"after__1\nafter_")
    assert tls.recv_exactly(8) == AFTER[0]
    tls.truncate_output()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "read", "on_ssl_handshake", "read", "on_ssl_error", "on_close"]
    assert isinstance(recorder[4][1], ssl.SSLEOFError)


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_both_ends_of_ours_upgrade_and_exchange_much(server_of, recorder, version):
    much = bytes(range(256)) * 4 * KIB

    class Secretive(Connection):
        read_delimiter = b"\n"

        def on_read(self, line):
            if line == b"STARTTLS":
                self.write(GO)
                self.startSSL(server_context(version))
                self.read_delimiter = None
            else:
                self.write(line)

    def on_connect(self):
        self.write(b"STARTTLS\n")
        recorder("answer", self.read(b"\n"))
        self.startSSL({"ca_certs": authority().file})
        self.write(much)
        recorder("echo", self.read(len(much)) == much)
        recorder("version", self.ssl_object.version())
        self.end()

    recorder.of(Client, *NAMES, on_connect=on_connect)().connect(server_of(Secretive).local_address)
    recorder.wait_for("on_close", timeout=10)
    assert recorder == [
        ("on_connect",),
        ("answer", b"+go"),
        ("echo", True),
        ("version", f"TLSv{version}"),
        ("on_ssl_handshake",),
        ("on_close",),
    ]


def test_many_connections_upgrade_at_once(server_of, recorder):
    class Secretive(Connection):
        read_delimiter = b"\n"

        def on_read(self, line):
            if line == b"STARTTLS":
                self.write(GO)
                self.startSSL(authority().localhost)
            else:
                self.write(line + b"\n")

    class Asker(Client):
        read_delimiter = b"\n"

        def on_connect(self):
            self.write(b"STARTTLS\n")

        def on_read(self, line):
            if line == b"+go":
                self.startSSL({"ca_certs": authority().file})
                self.write(b"question\n")
            else:
                recorder("answer", line)
                self.end()

    server = server_of(Secretive)
    for _ in range(40):
        Asker().connect(server.local_address)
    recorder.wait_for(40, timeout=15)
    assert recorder == [("answer", b"question")] * 40


# ---- Where it makes no sense


def test_starttls_twice_is_refused_before_during_and_after_the_handshake(side, recorder):
    def refused(self):
        with pytest.raises(RuntimeError, match="speaks TLS already"):
            self.startSSL(side.options())
        recorder("refused")

    def on_ssl_handshake(self):
        refused(self)

    plain = side.open(upgrading(side, recorder, then=refused, on_ssl_handshake=on_ssl_handshake))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    turns()
    refused(side.stream)
    tls = side.over(plain)
    tls.send(b"after__1\n")
    assert tls.recv_exactly(8) == AFTER[0]
    assert recorder.count("refused") == 3


def test_starttls_on_a_connection_of_a_tls_server_is_refused(server_of, tls_peer, recorder):  # noqa: F811
    def on_read(self, data):
        with pytest.raises(RuntimeError, match="speaks TLS already"):
            self.startSSL(authority().localhost)
        self.write(data)

    server = server_of(recorder.of(Connection, *NAMES, on_read=on_read))
    server.startSSL(authority().localhost)
    tls = tls_peer(server)
    tls.send(b"hello")
    assert tls.recv_exactly(5) == b"hello"


def test_starttls_on_a_closed_stream_is_refused(side, recorder):
    def on_close(self):
        with pytest.raises(RuntimeError, match="both directions"):
            self.startSSL(side.options())
        recorder("refused")

    plain = side.open(recorder.of(side.base, "on_connect", on_close=on_close))
    plain.close()
    recorder.wait_for("refused")
    with pytest.raises(RuntimeError, match="both directions"):
        side.stream.startSSL(side.options())


@pytest.mark.parametrize("half", ["write_eof", "on_end", "half-open", "end"])
def test_starttls_on_a_stream_with_one_direction_is_refused(side, recorder, half):
    def refused(self):
        with pytest.raises(RuntimeError, match="both directions"):
            self.startSSL(side.options())
        recorder("refused")

    def on_connect(self):
        if half in ("write_eof", "end"):
            getattr(self, half)()
            refused(self)

    def on_end(self, rest):
        if half in ("on_end", "half-open"):
            refused(self)
            self.write(b"clear")
            self.end()

    kind = recorder.of(side.base, "on_close", on_connect=on_connect, on_end=on_end, allow_half_open=half == "half-open")
    plain = side.open(kind)
    plain.shutdown_output()
    assert plain.recv_all() == (b"" if half in ("write_eof", "end") else b"clear")
    recorder.wait_for("on_close")
    assert recorder == ["refused", ("on_close",)]


BAD_OPTIONS = {
    "unknown": ({"nonsense": 1}, TypeError, "'nonsense'"),
    "no dict": (42, TypeError, "dict of options"),
    "certificate file": ({"certfile": "/nonexistent/certificate.pem"}, FileNotFoundError, "/nonexistent/certificate.pem"),
    "authority file": ({"ca_certs": "/nonexistent/ca.pem"}, FileNotFoundError, "/nonexistent/ca.pem"),
    "ciphers": ({"ciphers": "NO-SUCH-CIPHER"}, ValueError, "NO-SUCH-CIPHER"),
    "blocking handshake": ({"do_handshake_on_connect": True}, ValueError, "do_handshake_on_connect"),
    "timeout": ({"handshake_timeout": -1}, ValueError, "handshake_timeout"),
    "version": ({"ssl_version": ssl.TLSVersion.TLSv1}, ValueError, "ssl_version"),
}


@pytest.mark.parametrize(("options", "error", "told"), [pytest.param(*v, id=k) for k, v in BAD_OPTIONS.items()])
def test_bad_options_are_refused_at_the_call_and_change_nothing(side, recorder, options, error, told):
    def on_read(self, word):
        recorder("read", word)
        if word == b"BAD":
            with pytest.raises(error, match=re.escape(told)) as info:
                self.startSSL({**side.options(), **options} if isinstance(options, dict) else options)
            recorder("refused", type(self).__name__ in str(info.value))
            recorder("enabled", self.ssl_enabled)
            info = None
        elif word == STARTTLS:
            self.write(GO)
            self.startSSL(side.options())
        else:
            self.write(word)

    plain = side.open(recorder.of(side.base, *NAMES, on_read=on_read, read_delimiter=b"\n"))
    plain.send(b"BAD\nbefore_1\n")
    assert plain.recv_exactly(8) == BEFORE[0]
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    tls = side.over(plain)
    tls.send(b"after__1\n")
    assert tls.recv_exactly(8) == AFTER[0]
    words = [("read", BEFORE[0]), ("read", STARTTLS), ("on_ssl_handshake",), ("read", AFTER[0])]
    assert recorder == [("on_connect",), ("read", b"BAD"), ("refused", True), ("enabled", False), *words]


def test_server_side_without_a_certificate_is_refused_at_the_call(server_side, recorder):
    def on_read(self, data):
        with pytest.raises(ValueError, match="certfile"):
            self.startSSL()
        self.write(data)

    plain = server_side.open(recorder.of(Connection, *NAMES, on_read=on_read))
    plain.send(b"clear")
    assert plain.recv_exactly(5) == b"clear"


# ---- What is smuggled in before the handshake

SHAPES = {
    "line": lambda cut: (cut.wrap(INJECTED), b""),
    "many lines": lambda cut: (cut.wrap(INJECTED) * 50, b""),
    "half": lambda cut: (cut.wrap(INJECTED)[:2], b""),
    "line and half": lambda cut: (cut.wrap(INJECTED) + cut.wrap(INJECTED)[:2], b""),
    "second segment": lambda cut: (b"", cut.wrap(INJECTED)),
    "half in a second segment": lambda cut: (b"", cut.wrap(INJECTED)[:2]),
    "one line in two segments": lambda cut: (cut.wrap(INJECTED)[:3], cut.wrap(INJECTED)[3:]),
}
STYLES = ("on_read", "read", "on_connect", "paused", "greenlet")

#: Those that do not come in the segment of the command: without a delimiter that is one chunk.
SEPARATE = ("second segment", "half in a second segment")

INJECTIONS = [
    pytest.param(cut, shape, style, id=f"{name}-{shape}-{style}")
    for name, cut in ALL_CUTS.items()
    for shape in (SHAPES if name == "bytes" else ("line", "half", *SEPARATE) if name in CHUNKS else SEPARATE)
    for style in (STYLES if name == "bytes" else STYLES[:2])
]


def reading(side, recorder, cut, style, **attributes):
    """Return a class that upgrades at STARTTLS and records whatever it gets, in one style or another."""

    def word_of(chunk):
        return cut.word(*chunk) if isinstance(chunk, tuple) else cut.word(chunk)

    def upgrade(self):
        self.write(GO)
        self.startSSL(side.options())

    def on_connect(self):
        while style == "on_connect":
            word = word_of(self.read())
            recorder("read", word)
            if word == STARTTLS:
                upgrade(self)

    def on_read(self, *chunk):
        word = cut.word(*chunk)
        recorder("read", word)
        if word != STARTTLS:
            return
        if style == "paused":
            self.pause()
            gevent.spawn(lambda: (upgrade(self), self.resume()))
            return
        if style == "greenlet":
            gevent.spawn(upgrade, self).get()
            return
        upgrade(self)
        while style == "read":
            recorder("read", word_of(self.read()))

    return recorder.of(side.base, *NAMES, "on_read_error", on_connect=on_connect, on_read=on_read, **cut.attributes, **attributes)


def is_nothing_but_refused(recorder, words=(STARTTLS,)):
    """Assert that the words were delivered, and then the handshake failed, once, and nothing else happened."""
    reads = [("read", word) for word in words]
    assert recorder[:-2] == [("on_connect",), *reads]
    assert recorder.names()[-2:] == ["on_ssl_handshake_error", "on_close"]


@pytest.mark.parametrize(("cut", "shape", "style"), INJECTIONS)
def test_what_is_injected_behind_starttls_is_never_delivered(side, recorder, cut, shape, style):
    # The peer sees an alert, a reset, or an end, whatever comes first.
    same_segment, second = SHAPES[shape](cut)
    plain = side.open(reading(side, recorder, cut, style))
    plain.send(cut.wrap(STARTTLS) + same_segment)
    try:
        plain.recv_until(GO)
        if second:
            plain.send(second)
        with pytest.raises(OSError):  # noqa: PT011
            tls = side.over(plain)
            tls.send(cut.wrap(AFTER[0]))
            tls.recv_exactly(8)
    except AssertionError:
        assert "on_ssl_handshake_error" in recorder.names()  # so soon that the answer, or the peer's side of it, is cut off
    recorder.wait_for("on_close")
    is_nothing_but_refused(recorder)
    assert isinstance(recorder[-2][1], ssl.SSLError)
    assert side.stream.close_reason is CloseReason.TLS_FAILED


@pytest.mark.parametrize(
    ("cut", "style"),
    [("bytes", style) for style in STYLES] + [(name, "on_read") for name in ("int", "struct", "regex", "match", "text", "netstring")],
)
def test_half_a_line_behind_starttls_and_then_silence_ends_with_handshake_timeout(side, recorder, cut, style):
    cut = CHUNKS[cut]
    plain = side.open(reading(side, recorder, cut, style, handshake_timeout=0.05))
    plain.send(cut.wrap(STARTTLS) + cut.wrap(INJECTED)[:2])
    began = time.monotonic()
    recorder.wait_for("on_close", timeout=5)
    assert time.monotonic() - began < 3
    is_nothing_but_refused(recorder)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", ["line", "half", "line and half"])
def test_peer_that_injects_and_leaves_has_nothing_delivered(side, recorder, shape, style):
    plain = side.open(reading(side, recorder, LINE, style))
    plain.send(b"STARTTLS\n" + SHAPES[shape](LINE)[0])
    plain.shutdown_output()
    recorder.wait_for("on_close")
    is_nothing_but_refused(recorder)


@pytest.mark.parametrize("style", STYLES)
def test_injected_line_behind_a_whole_hello_is_not_delivered_either(server_side, recorder, style):
    plain = server_side.open(reading(server_side, recorder, LINE, style))
    tls = server_side.over(plain, shake=False)
    plain.send(b"STARTTLS\n" + hello_of(tls) + b"MAIL_bad\n")
    plain.recv_until(GO)
    with pytest.raises(OSError):  # noqa: PT011
        shaken(tls, plain)
        tls.send(b"after__1\n")
        tls.recv_exactly(8)
    recorder.wait_for("on_close")
    is_nothing_but_refused(recorder)


def test_waiting_half_line_is_not_glued_to_protected_data_by_starttls_from_outside(side, recorder):
    plain = side.open(reading(side, recorder, LINE, "on_read", handshake_timeout=0.1))
    plain.send(b"MAIL")
    until(lambda: len(side.stream._inbox) == 4)
    side.stream.startSSL(side.options())
    with pytest.raises(OSError):  # noqa: PT011
        tls = side.over(plain)
        tls.send(b"_bad\n")
        tls.recv()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_ssl_handshake_error", "on_close"]


def test_injected_data_and_instant_end_is_not_read_as_protected_by_a_constructor_that_speaks_tls(server_of, peer, recorder):
    # CVE-2023-40217: data, then an end, before the handshake.
    def __init__(self, *args, **kwargs):
        Connection.__init__(self, *args, **kwargs)
        self.startSSL(authority().localhost)

    server = server_of(recorder.of(Connection, *NAMES, "on_read", __init__=__init__))
    plain = peer(server)
    plain.send(b"MAIL_bad\n")
    plain.close()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_ssl_handshake_error", "on_close"]


@st.composite
def scripts(draw):
    """Draw: how to cut; the words before STARTTLS; the plain bytes behind it; all of it in segments; the style of reading."""
    cut = draw(st.sampled_from(list(CHUNKS.values())))
    before = draw(st.lists(st.sampled_from([*BEFORE, b"EHLO_abc"]), max_size=5))
    injected = cut.wrap(INJECTED) * draw(st.integers(0, 3))
    if draw(st.booleans()):
        injected += cut.wrap(INJECTED)[: draw(st.integers(1, 4))]
    script = b"".join(map(cut.wrap, [*before, STARTTLS])) + injected
    return cut, before, injected, draw(fragments(script)), draw(st.sampled_from(STYLES))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scripts())
def test_lines_before_starttls_are_delivered_and_nothing_plain_behind_it_ever_is(in_memory, recorder, script):
    cut, before, injected, segments, style = script
    recorder.clear()
    handshake_timeout = 0.02 if 0 < len(injected) < 5 else 10
    stream, end = memory_pair(reading(in_memory, recorder, cut, style, handshake_timeout=handshake_timeout))
    try:
        for segment in segments:
            end.send(segment)
        words = [*before, STARTTLS]
        if injected:
            recorder.wait_for("on_close")
            is_nothing_but_refused(recorder, words)
            return
        tls = MemoryTLS(end)
        tls.skip(len(GO))
        end.send(tls.hello())
        tls.shake_hands()
        end.send(tls.encrypt(cut.wrap(AFTER[0])))
        recorder.wait_for(("read", AFTER[0]))
        reads = [event for event in recorder if event[0] == "read"]
        assert reads == [("read", word) for word in (*words, AFTER[0])]
    finally:
        stream.abort()
    recorder.wait_for("on_close")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_handshake_behind_starttls_may_be_cut_in_any_way(in_memory, recorder, data):
    recorder.clear()
    cut = data.draw(st.sampled_from(list(CHUNKS.values())))
    style = data.draw(st.sampled_from(STYLES))
    words = [*BEFORE, STARTTLS]
    stream, end = memory_pair(reading(in_memory, recorder, cut, style))
    try:
        tls = MemoryTLS(end)
        for segment in data.draw(fragments(b"".join(map(cut.wrap, words)) + tls.hello())):
            end.send(segment)
        tls.skip(len(GO))
        tls.shake_hands()
        end.send(tls.encrypt(cut.wrap(AFTER[0])))
        recorder.wait_for(("read", AFTER[0]))
        assert [event for event in recorder if event[0] == "read"] == [("read", word) for word in (*words, AFTER[0])]
    finally:
        stream.abort()
    recorder.wait_for("on_close")
    assert "on_ssl_handshake_error" not in recorder.names()


# ---- Time limits of output


def test_clear_output_that_the_peer_does_not_take_ends_with_write_timeout(side, recorder):
    def on_connect(self):
        self.write(b"c" * 12 * MIB)
        self.startSSL(side.options())

    side.open(recorder.of(side.base, *NAMES, on_connect=on_connect, write_timeout=0.1), rcvbuf=32 * KIB)
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("on_timeout", "write"), ("on_close",)]


def test_write_timeout_does_not_count_while_output_waits_for_the_handshake(side, recorder):
    plain = side.open(upgrading(side, recorder, write_timeout=0.05, then=lambda self: self.write(b"hidden\n")))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    gevent.sleep(0.15)  # not to wait for something: for nothing to happen
    tls = side.over(plain)
    assert tls.recv_until(b"\n") == b"hidden\n"


# ---- Nothing stays behind


def test_handshakes_that_fail_leave_nothing(server_of, peer, recorder):
    class Secretive(Connection):
        read_delimiter = b"\n"
        handshake_timeout = 0.2

        def on_read(self, line):
            self.startSSL(authority().localhost)

        def on_ssl_handshake_error(self, exception):
            recorder("failed")

    server = server_of(Secretive)
    for number in range(60):
        plain = peer(server)
        plain.send(b"STARTTLS\n")
        if number % 3 == 0:
            plain.send(b"garbage, garbage, garbage")
        elif number % 3 == 1:
            plain.reset()
    recorder.wait_for(60, timeout=15)
    until(lambda: not list(server._children()))


def test_line_behind_the_server_s_answer_is_not_delivered_to_a_client_of_ours(server_of, recorder):

    def to_server(self, line):
        recorder("server", line)
        if line == b"STARTTLS":
            self.write(b"+go\n* injected\n")  # as if somebody on the way had put the second line there
            self.startSSL(authority().localhost)

    def to_client(self, line):
        recorder("client", line)
        if line == b"+go":
            self.startSSL({"ca_certs": authority().file})

    def fails(name):
        return lambda self, error: recorder(name)

    server = server_of(Connection, read_delimiter=b"\n", on_read=to_server, on_ssl_handshake_error=fails("server failed"))
    kind = type("Asking", (Client,), {"on_read": to_client, "on_ssl_handshake_error": fails("client failed"), "read_delimiter": b"\n"})
    client = kind().connect(server.local_address)
    until(lambda: client.connected)
    client.write(b"STARTTLS\n")
    recorder.wait_for("client failed")
    recorder.wait_for("server failed")
    assert recorder[:2] == [("server", b"STARTTLS"), ("client", b"+go")]
    assert sorted(recorder[2:]) == ["client failed", "server failed"]


def test_write_on_a_stream_whose_handshake_failed_is_refused(side, recorder):
    plain = side.open(upgrading(side, recorder))
    plain.send(b"STARTTLS\n")
    assert plain.recv_until(GO) == GO
    plain.shutdown_output()
    recorder.wait_for("on_close")
    with pytest.raises(ChannelClosed):
        side.stream.write(b"too late")


def test_server_of_plain_connections_may_upgrade_some_of_them(server_of, peer):
    class Mixed(Connection):
        read_delimiter = b"\n"

        def on_read(self, line):
            if line == b"STARTTLS":
                self.write(GO)
                self.startSSL(authority().localhost)
            else:
                self.write(b"protected\n" if self.ssl_enabled else b"clear\n")

    server: Server = server_of(Mixed)
    plain, upgraded = peer(server), peer(server)
    upgraded.send(b"STARTTLS\n")
    upgraded.recv_until(GO)
    tls = TLSPeer.over(upgraded)
    for _ in range(3):
        plain.send(b"?\n")
        tls.send(b"?\n")
        assert plain.recv_until(b"\n") == b"clear\n"
        assert tls.recv_until(b"\n") == b"protected\n"
    assert server.ssl_enabled is False


def test_repr_tells_that_the_handshake_goes_on(side, recorder):
    def then(self):
        recorder(repr(self))

    plain = side.open(upgrading(side, recorder, then=then))
    plain.send(b"STARTTLS\n")
    recorder.wait_for(lambda events: any("handshaking to" in str(event) for event in events))
    assert plain.recv_until(GO) == GO
    with side.over(plain):
        recorder.wait_for(("on_ssl_handshake",))
        assert repr(side.stream).split(" to ")[0].endswith(" open")
