"""TLS under load and with peers that misbehave: in bounded time and memory, nobody waits for somebody else, and nothing is left.

Where memory and descriptors count the server is a process (``tls_load_servers.py``), patched by gevent.monkey if this one is, and
so are its peers (``tls_load_peers.py``). No test asserts a speed.
"""

import contextlib
import gc
import hmac
import os
import signal
import socket
import ssl
import textwrap
import time
import weakref

import gevent
import pytest
import tls_peers
from certificates import authority, client_context, server_context
from children import Child
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from echoes import Echo, EchoLines
from gevent import monkey
from needs import needs_proc
from peers import Peer, in_thread
from test_load import Program, ServerProcess
from test_tls_server import exchange
from tls_peers import TLSPeer
from waiting import lingering, nothing_is_kept, turns, unsent, until  # noqa: F401

from pants_green import CloseReason, Connection, Engine, Server
from pants_green.errors import WriteTimeout

tls_peer = tls_peers.tls_peer

KIB, MIB = 1 << 10, 1 << 20

VERSIONS = ["1.2", "1.3"]

ALL = ("on_ssl_handshake", "on_connect", "on_read", "on_end", "on_ssl_handshake_error", "on_ssl_error", "on_error", "on_close")

# gevent's subprocess forks, and what becomes of it here is exec at once.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class SecureServerProcess(ServerProcess):
    """The servers of ``tls_load_servers.py``."""

    #: What it has when nobody but the control connection is there: four servers and that.
    CHANNELS = 5

    def __init__(self):
        certificate = authority().localhost
        patched = monkey.is_module_patched("socket")
        Program.__init__(self, "tls_load_servers.py", certificate["certfile"], certificate["keyfile"], patched=patched)
        self.ports = self.line()
        self.control = Peer(("127.0.0.1", self.ports["control"]))

    def left(self):
        """Return what is left of connections once nothing of them moves any more: the same answer twice, or patience is over."""
        deadline = time.monotonic() + 5.0
        before = None
        while True:
            now = {**self.ask("left"), "greeted": sum(self.ask("greeted").values())}
            if (now == before and now["channels"] == self.CHANNELS and not now["greeted"]) or time.monotonic() > deadline:
                return now
            before = now
            gevent.sleep(0.02)


@pytest.fixture
def serving():
    """Return a SecureServerProcess; ended at the end."""
    server = SecureServerProcess()
    yield server
    server.close()


@pytest.fixture
def peers():
    """Return a function that starts a program of ``tls_load_peers.py``; ended at the end."""
    programs = []

    def start(name, where, *arguments):
        port = where if isinstance(where, int) else where.local_address[1]
        program = Program("tls_load_peers.py", name, authority().file, port, *arguments)
        programs.append(program)
        return program

    yield start
    for program in programs:
        program.close()


@pytest.fixture
def secure(server_of):
    """Return a function that makes a listening server that speaks TLS: as ``server_of``."""
    return lambda *args, **kwargs: server_of(*args, **kwargs).startSSL(server_context())


def only(server):
    """Return the one connection that a server has."""
    (stream,) = server.channels.values()
    return stream


def answers(one, data=b"hello\n"):
    """Tell whether this peer is echoed."""
    one.send(data)
    return one.recv_exactly(len(data)) == data


class InTwo:
    """Has a stream receive what a TLS peer sends in two pieces, and never in one."""

    def __init__(self, one, stream):
        self.one = one
        self.received = self.sent = 0
        self._receive = stream._tls._raw_recv
        stream._tls._raw_recv = self._counting

    def _counting(self, size):
        data = self._receive(size)
        self.received += len(data)
        return data

    def send(self, records, cut):
        """Send some records: the first `cut` bytes, and the rest when these have been received."""
        for piece in (records[:cut], records[cut:]):
            self.one.send_raw(piece)
            self.sent += len(piece)
            until(lambda: self.received == self.sent)


def raw_end(one):
    """Return what comes to a TLS peer up to the FIN, as it went over the wire."""

    def run():
        data = b""
        while more := one.socket.recv(65536):
            data += more
        return data

    return in_thread(run)


# ---- peers that do not get through the handshake


@needs_proc
@pytest.mark.parametrize("kind", ["nothing", "half", "hello"])
def test_hundred_stalled_handshakes_do_not_delay_a_good_one(serving, peers, kind):
    before = serving.left()
    stalled = peers("hold", serving.ports["lines"], 100, kind)
    assert stalled.line() == {"holding": 100}
    for _ in range(5):
        with TLSPeer(("127.0.0.1", serving.ports["lines"])) as one:
            assert answers(one, b"good 1\n")
            assert serving.ask("greeted")["lines"] == 100  # all the while
    assert serving.ask("happened")["on_connect"] == 5
    stalled.close()
    after = serving.left()
    assert after["greeted"] == 0
    assert {**after, "made": 0, "greenlets": 0} == {**before, "made": 0, "greenlets": 0}
    assert after["greenlets"] <= before["greenlets"]


@needs_proc
def test_two_hundred_good_and_four_hundred_broken_peers_leave_nothing(serving, peers):
    # In the first round pools, caches and the allocator fill.
    assert peers("mixed", serving.ports["lines"], 100, 200).line() == {"good": 100, "bad": 200}
    before = serving.left()
    memory = serving.ask("memory")
    serving.ask("forget")
    assert peers("mixed", serving.ports["lines"], 200, 400).line() == {"good": 200, "bad": 400}
    after = serving.left()
    assert {**after, "made": 0} == {**before, "made": 0}
    assert after["lingering"] == 0
    happened = serving.ask("happened")
    assert happened["strange"] == []
    assert happened["on_connect"] == happened["on_read"] == happened["on_close"] == 200
    assert 350 <= happened["on_ssl_wrap_error"] <= 400  # the server may not have met those that reset at once
    now = serving.ask("memory")
    assert now["rss"] - memory["rss"] < 2 * MIB
    assert now["peak"] - memory["peak"] < 4 * MIB


@needs_proc
def test_handshake_messages_of_16_mib_cost_no_memory_that_was_not_sent(serving, peers):
    before = serving.ask("memory")
    stalled = peers("hold", serving.ports["lines"], 100, "announced")
    assert stalled.line() == {"holding": 100}
    with TLSPeer(("127.0.0.1", serving.ports["lines"])) as one:
        assert answers(one, b"good 1\n")
    # 100 peers have sent 24 KB each, and OpenSSL keeps buffers for each; what they have announced is 1.6 GB.
    assert serving.ask("memory")["peak"] - before["rss"] < 40 * MIB
    stalled.close()
    assert serving.left()["greeted"] == 0
    assert serving.ask("happened")["strange"] == []


@needs_proc
@pytest.mark.parametrize("kind", ["nothing", "hello"])
def test_stalled_handshakes_cost_bounded_memory_each(serving, peers, kind):
    before = serving.ask("memory")["rss"]
    stalled = peers("hold", serving.ports["lines"], 400, kind)
    assert stalled.line() == {"holding": 400}
    deadline = time.monotonic() + 5.0
    while serving.ask("greeted")["lines"] < 400:
        assert time.monotonic() < deadline
    assert serving.ask("memory")["rss"] - before < 400 * 150 * KIB
    stalled.close()
    assert serving.left()["greeted"] == 0


# ---- coming and going


@needs_proc
def test_connections_that_come_and_go_leave_no_reference_cycles(serving, peers):
    assert peers("churn", serving.ports["lines"], 42, 7, 7).line()["wrong"] == 0
    assert peers("mixed", serving.ports["lines"], 10, 40).line() == {"good": 10, "bad": 40}
    serving.left()
    serving.ask("garbage_begin")
    assert peers("churn", serving.ports["lines"], 42, 7, 7).line()["wrong"] == 0
    assert peers("mixed", serving.ports["lines"], 10, 40).line() == {"good": 10, "bad": 40}
    serving.left()
    assert serving.ask("garbage_end") == {}


@needs_proc
def test_five_hundred_connections_that_come_and_go_leave_nothing_and_no_memory(serving, peers):
    assert peers("churn", serving.ports["lines"], 140, 14, 7).line() == {"cycles": 140, "wrong": 0}
    left = serving.left()
    memory = serving.ask("memory")["rss"]
    assert peers("churn", serving.ports["lines"], 504, 14, 7).line() == {"cycles": 504, "wrong": 0}
    after = serving.left()
    assert {**after, "made": 0} == {**left, "made": 0}
    assert after["made"] - left["made"] <= 14
    assert serving.ask("memory")["rss"] - memory < 2 * MIB
    assert serving.ask("happened")["strange"] == []


LEAVES = {
    "goodbye": lambda one, stream: one.shutdown_output(),
    "truncated": lambda one, stream: one.truncate_output(),
    "reset": lambda one, stream: one.reset(),
    "nonsense": lambda one, stream: one.send_raw(b"this is no record of TLS at all" * 10),
    "close": lambda one, stream: stream.close(),
    "abort": lambda one, stream: stream.abort(),
    "end": lambda one, stream: (stream.end(), one.at_eof(), one.shutdown_output()),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("how", LEAVES)
def test_stream_and_ssl_object_die_without_the_collector(secure, tls_peer, how, version):
    gone = []

    class Watched(EchoLines):
        __slots__ = ()

        def on_connect(self):
            gone.append(weakref.ref(self, lambda ref: gone.append("stream")))
            gone.append(weakref.ref(self.ssl_object, lambda ref: gone.append("object")))

        def on_ssl_error(self, exception):
            pass

    server = secure(Watched)
    one = tls_peer(server, context=client_context(version))
    assert answers(one)
    gc.collect()
    gc.disable()
    try:
        LEAVES[how](one, only(server))
        until(lambda: not server._children() and lingering() == 0)
        until(lambda: {"stream", "object"} <= {mark for mark in gone if isinstance(mark, str)})
    finally:
        gc.enable()


def test_failed_handshake_dies_without_the_collector(secure, peer, tls_peer):
    seen = []

    class Looking(Server):
        __slots__ = ()

        def on_ssl_wrap_error(self, sock, addr, exception):
            seen.append(weakref.ref(sock))

    def garbage():
        with peer(server) as one:
            one.send(b"nonsense" * 10)
            one.recv_all()

    server = secure(Echo, server_class=Looking)
    garbage()
    gc.collect()
    gc.disable()
    try:
        seen.clear()
        garbage()
        until(lambda: len(seen) == 1)
        until(lambda: seen[0]() is None)
    finally:
        gc.enable()


# ---- how a connection ends


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("unfinished", [b"", b"half a li"])
def test_truncation_after_data_is_on_ssl_error_and_no_end(secure, tls_peer, recorder, version, unfinished):
    server = secure(recorder.of(EchoLines, *ALL[:-1], on_close=lambda stream: recorder(stream.close_reason)))
    one = tls_peer(server, context=client_context(version))
    one.send(b"one\ntwo\n" + unfinished)
    one.truncate_output()
    recorder.wait_for(CloseReason.TLS_FAILED)
    assert recorder.names() == ["on_ssl_handshake", "on_connect", "on_read", "on_read", "on_ssl_error", CloseReason.TLS_FAILED]
    assert [event[1] for event in recorder[2:4]] == [b"one", b"two"]
    assert isinstance(recorder[4][1], ssl.SSLEOFError)


@pytest.mark.parametrize("version", VERSIONS)
def test_truncation_in_the_middle_of_a_record_is_on_ssl_error(secure, tls_peer, recorder, version):
    server = secure(recorder.of(EchoLines, *ALL))
    one = tls_peer(server, context=client_context(version))
    one.send(b"one\n")
    one.send_raw(one.encrypt(b"this line does not come whole\n")[:-1])
    one.truncate_output()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_ssl_handshake", "on_connect", "on_read", "on_ssl_error", "on_close"]
    assert isinstance(recorder[3][1], ssl.SSLEOFError)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("spoilt", ["first", "last"])
def test_record_that_was_changed_on_the_way_is_on_ssl_error(secure, tls_peer, recorder, version, spoilt):
    server = secure(recorder.of(EchoLines, *ALL))
    one = tls_peer(server, context=client_context(version))
    records = [bytearray(one.encrypt(b"line %d\n" % number)) for number in range(3)]
    records[0 if spoilt == "first" else -1][-1] ^= 1
    one.send_raw(b"".join(records))
    recorder.wait_for("on_close")
    lines = [event[1] for event in recorder if event[0] == "on_read"]
    assert lines == ([] if spoilt == "first" else [b"line 0", b"line 1"])
    assert recorder.names()[-2:] == ["on_ssl_error", "on_close"]
    assert "on_end" not in recorder.names()


def test_plain_text_after_the_handshake_is_on_ssl_error_and_never_read(secure, tls_peer, recorder):
    server = secure(recorder.of(EchoLines, *ALL))
    one = tls_peer(server)
    assert answers(one, b"hello\n")
    one.send_raw(b"this was said without TLS\n" * 10)
    recorder.wait_for("on_close")
    assert [event for event in recorder if event[0] == "on_read"] == [("on_read", b"hello")]
    assert recorder.names()[-2:] == ["on_ssl_error", "on_close"]


@pytest.mark.parametrize("version", VERSIONS)
def test_reset_is_no_trouble_of_tls(secure, tls_peer, recorder, version):
    server = secure(recorder.of(EchoLines, *ALL[:-1], on_close=lambda stream: recorder(stream.close_reason)))
    one = tls_peer(server, context=client_context(version))
    assert answers(one)
    one.reset()
    recorder.wait_for(CloseReason.PEER_LEFT)
    assert recorder.names() == ["on_ssl_handshake", "on_connect", "on_read", CloseReason.PEER_LEFT]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("owed", [b"", b"an answer" * 1000])
def test_goodbye_then_silence_without_a_fin_ends_the_connection(secure, tls_peer, recorder, version, owed):
    server = secure(recorder.of(EchoLines, *ALL, on_end=lambda stream, rest: stream.write(owed)))
    one = tls_peer(server, context=client_context(version))
    one.send(b"half a li")
    one.say_goodbye()
    recorder.wait_for("on_close", timeout=2.0)
    assert recorder.names() == ["on_ssl_handshake", "on_connect", "on_end", "on_close"]
    assert recorder[2] == ("on_end", b"half a li")
    until(lambda: lingering() == 0, timeout=2.0)
    assert one.recv_all() == owed  # and the goodbye
    assert raw_end(one) == b""


@pytest.mark.parametrize("version", VERSIONS)
def test_goodbye_then_more_is_not_read(secure, tls_peer, recorder, version):
    server = secure(recorder.of(EchoLines, *ALL))
    one = tls_peer(server, context=client_context(version))
    one.send(b"hello\n")
    with contextlib.suppress(ssl.SSLError):
        one.object.unwrap()
    one.send_raw(one._outgoing.read() + b"this was said without TLS\n" * 10)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_ssl_handshake", "on_connect", "on_read", "on_end", "on_close"]
    assert recorder[3] == ("on_end", b"")


@pytest.mark.parametrize("version", VERSIONS)
def test_peer_that_never_answers_our_goodbye_is_let_go_of(secure, tls_peer, recorder, version, monkeypatch):
    monkeypatch.setattr("pants_green._linger.IDLE_LIMIT", 0.05)
    server = secure(recorder.of(EchoLines, *ALL))
    one = tls_peer(server, context=client_context(version))
    recorder.wait_for("on_connect")
    stream = only(server)
    descriptor = stream.fileno
    stream.write(b"that was all\n")
    stream.end()
    recorder.wait_for("on_close")  # which does not wait for the lingering
    assert lingering() == 1
    until(lambda: lingering() == 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert one.recv_all() == b"that was all\n"


@pytest.mark.parametrize("version", VERSIONS)
def test_peer_that_goes_on_sending_after_our_goodbye_gets_all_and_no_reset(secure, tls_peer, recorder, version):
    blob = os.urandom(MIB)
    server = secure(recorder.of(EchoLines, *ALL))
    one = tls_peer(server, context=client_context(version))
    recorder.wait_for("on_connect")
    stream = only(server)
    stream.write(blob)
    stream.end()
    one.send(b"is anybody listening?\n" * 1000)
    assert one.recv_all() == blob
    one.shutdown_output()
    recorder.wait_for("on_close")
    until(lambda: lingering() == 0)
    assert recorder.names() == ["on_ssl_handshake", "on_connect", "on_close"]


@pytest.mark.parametrize("version", VERSIONS)
def test_half_open_goes_on_writing_after_the_peer_s_goodbye(secure, tls_peer, recorder, version):
    server = secure(recorder.of(EchoLines, *ALL, allow_half_open=True))
    one = tls_peer(server, context=client_context(version))
    one.send(b"hello\n")
    one.shutdown_output()
    recorder.wait_for("on_end")
    stream = only(server)
    stream.write(b"still here\n")
    assert one.recv_until(b"still here\n") == b"hello\nstill here\n"
    stream.end()
    assert one.at_eof()
    recorder.wait_for("on_close")


@pytest.mark.parametrize("version", VERSIONS)
def test_write_eof_says_goodbye_and_goes_on_reading(secure, tls_peer, recorder, version):
    def on_read(stream, line):
        if line == b"first":
            stream.write(b"that was all\n")
            stream.write_eof()

    server = secure(recorder.of(EchoLines, *ALL, on_read=on_read))
    one = tls_peer(server, context=client_context(version))
    one.send(b"first\n")
    assert one.recv_all() == b"that was all\n"
    assert raw_end(one) == b""
    one.send(b"second\nthird\n")
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert [event[1] for event in recorder if event[0] == "on_read"] == [b"first", b"second", b"third"]
    assert recorder.names()[-2:] == ["on_end", "on_close"]


# ---- records of every size


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("at_once", [True, False])
def test_records_of_one_byte(secure, tls_peer, recorder, version, at_once):
    server = secure(recorder.of(EchoLines, "on_read", "on_close"))
    one = tls_peer(server, context=client_context(version))
    text = b"".join(b"a line of single bytes, number %d\n" % number for number in range(60))
    records = [one.encrypt(text[place : place + 1]) for place in range(len(text))]
    if at_once:
        one.send_raw(b"".join(records))
    else:
        in_thread(lambda: [one.socket.sendall(record) for record in records])
    assert one.recv_exactly(len(text)) == text
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert [event[1] for event in recorder[:-1]] == text.splitlines()


@pytest.mark.parametrize("version", VERSIONS)
def test_records_of_every_size_around_the_largest(secure, tls_peer, version):
    server = secure(Echo)
    one = tls_peer(server, context=client_context(version))
    for size in (1, 2, 255, 16383, 16384, 16385, 32768, 65535, 65536, 65537, 262144, 262145):
        blob = os.urandom(size)
        one.send(blob)
        assert one.recv_exactly(size) == blob


@pytest.mark.parametrize("version", VERSIONS)
def test_records_cut_at_every_position(secure, tls_peer, recorder, version):
    server = secure(recorder.of(Connection, "on_read", "on_close"))
    one = tls_peer(server, context=client_context(version))
    length = len(one.encrypt(b"hello"))
    one.close()
    recorder.wait_for("on_close")
    recorder.clear()
    one = tls_peer(server, context=client_context(version))
    one.send(b"hello")
    recorder.wait_for(1)
    recorder.clear()
    pieces = InTwo(one, only(server))
    for cut in range(1, length):
        record = one.encrypt(b"hello")
        assert len(record) == length
        pieces.send(record, cut)
        recorder.wait_for(cut)
    assert recorder == [("on_read", b"hello")] * (length - 1)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("size", "last"), [(2, 1), (100, 1), (100, 60), (4000, 1), (4000, 1000), (16384, 1), (16384, 10_000)])
def test_record_whose_end_comes_later_is_read_whole(secure, tls_peer, recorder, version, size, last):
    received = b""

    def on_read(stream, data):
        nonlocal received
        received += data
        recorder("on_read")

    server = secure(Connection, on_read=on_read)
    one = tls_peer(server, context=client_context(version))
    one.send(b".")
    recorder.wait_for(1)
    blob = os.urandom(size)
    records = one.encrypt(blob)
    InTwo(one, only(server)).send(records, -last)
    until(lambda: len(received) > size)
    assert received == b"." + blob


@pytest.mark.parametrize("version", VERSIONS)
def test_two_records_cut_at_every_position(secure, tls_peer, recorder, version):
    """The piece that ends one record begins the next."""
    server = secure(recorder.of(EchoLines, "on_read"))
    one = tls_peer(server, context=client_context(version))
    length = len(one.encrypt(b"one\n"))
    one.close()
    until(lambda: not server.channels)
    one = tls_peer(server, context=client_context(version))
    assert answers(one)
    recorder.clear()
    pieces = InTwo(one, only(server))
    for cut in range(1, 2 * length):
        records = one.encrypt(b"one\n") + one.encrypt(b"two\n")
        pieces.send(records, cut)
        assert one.recv_exactly(8) == b"one\ntwo\n"
    assert recorder == [("on_read", b"one"), ("on_read", b"two")] * (2 * length - 1)


class Dribbling(TLSPeer):
    """Sends everything, the handshake too, byte by byte."""

    def _send_all(self):
        for byte in self._outgoing.read():
            self.socket.sendall(bytes([byte]))


@pytest.mark.parametrize("version", VERSIONS)
def test_everything_byte_by_byte(secure, recorder, version):
    server = secure(recorder.of(EchoLines, *ALL))
    with Dribbling(server, context=client_context(version)) as one:
        for number in range(5):
            assert answers(one, b"line %d\n" % number)
        one.shutdown_output()
        assert one.at_eof()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_ssl_handshake", "on_connect", *["on_read"] * 5, "on_end", "on_close"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("delimiter", [b"\n", 8, None])
def test_megabytes_both_ways_at_once_keep_their_order(secure, tls_peer, version, delimiter):
    def on_read(stream, data):
        stream.write(data + b"\n" if delimiter == b"\n" else data)

    server = secure(Connection, on_read=on_read, read_delimiter=delimiter)
    one = tls_peer(server, context=client_context(version), rcvbuf=16384)
    blob = b"".join(b"%07d\n" % number for number in range(2 * MIB // 8 if delimiter is None else MIB // 8))
    assert exchange(one, blob, len(blob)) == blob


# ---- a peer that stops reading


@pytest.mark.parametrize("version", VERSIONS)
def test_peer_that_stops_reading_is_owed_no_more_than_the_limit_and_then_closed(secure, tls_peer, recorder, version):
    most = 0
    piece = bytes(100_000)

    def on_connect(stream):
        nonlocal most
        while True:
            stream.write(piece)  # waits when the limit is reached
            most = max(most, unsent(stream))

    kind = recorder.of(
        Connection, "on_timeout", "on_error", "on_ssl_error", "on_close", write_limit=MIB, write_timeout=0.1, on_connect=on_connect
    )
    server = secure(kind)
    one = tls_peer(server, context=client_context(version), rcvbuf=4096)
    recorder.wait_for("on_close")
    assert recorder == [("on_timeout", "write"), ("on_close",)]
    assert MIB <= most < MIB + len(piece) + 1
    assert server.listening
    one.reset()


@pytest.mark.parametrize("version", VERSIONS)
def test_peer_that_stops_reading_for_a_while_gets_everything_later(secure, tls_peer, recorder, version):
    blob = os.urandom(MIB) * 8
    server = secure(recorder.of(Connection, "on_connect", "on_close"), write_limit=MIB)
    one = tls_peer(server, context=client_context(version), rcvbuf=4096)
    recorder.wait_for("on_connect")
    stream = only(server)
    stream.write(blob)
    turns()
    assert unsent(stream) > MIB
    stream.end()

    def read():
        data = bytearray()
        while more := one._receive(MIB):
            data += more
        return bytes(data)

    assert in_thread(read) == blob
    one.shutdown_output()
    recorder.wait_for("on_close")
    until(lambda: lingering() == 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_write_timeout_says_how_much_waits(secure, tls_peer, recorder, version):
    server = secure(recorder.of(Connection, "on_connect", "on_timeout", "on_close"), write_timeout=0.1)
    tls_peer(server, context=client_context(version), rcvbuf=4096)
    recorder.wait_for("on_connect")
    stream = only(server)
    stream.write(bytes(8 * MIB))
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("on_timeout", "write"), ("on_close",)]
    assert stream.close_reason == CloseReason.TIMED_OUT
    assert isinstance(stream.close_error, WriteTimeout)


@needs_proc
@pytest.mark.parametrize("kind", ["echo", "plain_lines"])
def test_client_that_never_reads_costs_bounded_memory_and_gets_everything_later(serving, peers, kind):
    before = serving.ask("memory")["rss"]
    pushing = peers("push", serving.ports[kind], 200 * MIB, 4 * MIB)
    pushed = pushing.line()["sent"]
    assert MIB // 4 < pushed < 200 * MIB
    assert serving.ask("memory")["peak"] - before < 16 * MIB
    # Everybody else is served.
    with TLSPeer(("127.0.0.1", serving.ports["lines"])) as one:
        assert answers(one, b"good 1\n")
    outcome = pushing.go_on()
    assert outcome["same"]
    assert outcome["received"] == outcome["sent"] >= pushed + 4 * MIB
    assert serving.ask("memory")["peak"] - before < 16 * MIB
    assert serving.left()["channels"] == serving.CHANNELS


# ---- key updates, of which the standard library's client sends none


class KeyUpdates:
    """Makes the records of a TLS 1.3 client by hand, from what it has written to its key log.

    *Source*: RFC 8446, sections 4.6.3, 5.2 and 7.
    """

    def __init__(self, one, keylog):
        assert one.object.cipher()[0] == "TLS_AES_256_GCM_SHA384"
        (secret,) = [line.split()[2] for line in keylog.read_text().splitlines() if line.startswith("CLIENT_TRAFFIC_SECRET_0 ")]
        self._use(bytes.fromhex(secret))

    def _use(self, secret):
        self._secret = secret
        self._cipher = AESGCM(self._expand(b"key", 32))
        self._mask = int.from_bytes(self._expand(b"iv", 12))
        self._number = 0

    def _expand(self, label, size):
        label = b"tls13 " + label
        info = size.to_bytes(2) + bytes([len(label)]) + label + bytes([0, 1])
        return hmac.digest(self._secret, info, "sha384")[:size]

    def record(self, content, kind=23):
        """Return the record that says `content`."""
        header = b"\x17\x03\x03" + (len(content) + 17).to_bytes(2)
        nonce = (self._mask ^ self._number).to_bytes(12)
        self._number += 1
        return header + self._cipher.encrypt(nonce, content + bytes([kind]), header)

    def update(self):
        """Return the record that asks the other side for new keys and tells of our own."""
        made = self.record(b"\x18\x00\x00\x01\x01", 22)
        self._use(self._expand(b"traffic upd", 48))
        return made


@pytest.fixture
def updating(secure, tls_peer, tmp_path, recorder):
    """Return a TLS peer with small buffers on both sides, its KeyUpdates, and the stream that echoes it."""

    def on_connect(stream):
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    server = secure(recorder.of(Echo, "on_connect", "on_read", "on_ssl_error", "on_close", on_connect=on_connect))
    context = client_context("1.3")
    context.keylog_filename = str(tmp_path / "keys")
    one = tls_peer(server, context=context, rcvbuf=4096)
    context.keylog_filename = None
    recorder.wait_for("on_connect")
    return one, KeyUpdates(one, tmp_path / "keys"), only(server)


def test_key_updates_that_are_asked_for_keep_the_order_of_what_is_said(updating, recorder):
    one, updates, stream = updating
    said = []
    for number in range(200):
        word = b"word %d\n" % number
        said.append(word)
        one.send_raw(updates.record(word) + updates.update())
        assert one.recv_exactly(len(word)) == word
    # The buffers of the kernels are full and something waits to be sent: each answer takes its place in the midst of that.
    blob = os.urandom(MIB)
    wire = b"".join(updates.record(blob[start : start + 16384]) + updates.update() for start in range(0, len(blob), 16384))
    sending = gevent.spawn(one.send_raw, wire + updates.record(b"at last"))
    until(lambda: unsent(stream) > 0)
    assert one.recv_exactly(len(blob)) == blob
    assert one.recv_exactly(7) == b"at last"
    sending.get()
    assert b"".join(event[1] for event in recorder if event[0] == "on_read") == b"".join(said) + blob + b"at last"


def test_key_updates_of_a_peer_that_does_not_read_are_bounded(updating):
    one, updates, stream = updating
    flood = b"".join(updates.update() for _ in range(60_000))
    most = 0

    def send():
        with contextlib.suppress(OSError):  # it may be closed meanwhile, or held up
            one.send_raw(flood)

    pieces = InTwo(one, stream)
    sending = gevent.spawn(send)
    deadline = time.monotonic() + 1.5
    while pieces.received < len(flood) and not stream.closed and time.monotonic() < deadline:
        gevent.sleep(0.001)
        most = max(most, stream._tls._outgoing.pending + len(stream._tls._left))
    one.reset()
    sending.get()
    assert most < 256 * KIB


# ---- fork


FORKING = """
    import os, signal, sys
    if sys.argv[1] == "patched":
        import gevent.monkey
        gevent.monkey.patch_all()
    import gevent
    from gevent.event import Event
    from pants_green import Engine, Server, Stream

    def say(*words):
        signal.alarm(20)  # whatever happens this process ends
        os.write(1, (" ".join(map(str, words)) + "\\n").encode())

    class Talk(Stream):
        read_delimiter = b"\\n"

        def on_read(self, line):
            if line == b"who":
                self.write(f"{os.getpid()}\\n")
            elif line == b"greeted":
                self.write(f"{len(server._greetings)}\\n")
            elif line == b"fork":
                fork.set()
            elif line == b"stop listening":
                server.close(connections=False)
                self.write(b"done\\n")
            elif line == b"end":
                Engine.instance().stop()
            else:
                self.write(line + b"\\n")

        def on_ssl_error(self, exception):
            say("on_ssl_error", os.getpid(), exception)

        def on_close(self):
            say("on_close", os.getpid())

    class Telling(Server):
        def on_ssl_wrap_error(self, sock, addr, exception):
            say("on_ssl_wrap_error", os.getpid(), exception)

    fork = Event()
    server = Telling(Talk, ssl_options={"certfile": sys.argv[2], "keyfile": sys.argv[3]}).listen(("127.0.0.1", 0))
    say("port", server.local_address[1])
    fork.wait()
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    child = os.fork()
    if child:
        Engine.instance().start()
        say("parent ends", os.waitpid(child, 0)[1])
        sys.exit()

    say("child", os.getpid())
    gevent.sleep(0.01)
    after = len(os.listdir("/proc/self/fd")) if before else 0
    say("gone", before - after, len(server._greetings), len(server.channels))
    Engine.instance().start()
    say("child ends")
    os._exit(0)
"""


@needs_proc
@pytest.mark.parametrize("how", ["raw", "patched"])
@pytest.mark.parametrize("version", VERSIONS)
def test_fork_while_handshakes_go_on_leaves_them_with_the_parent(how, version, peer, tls_peer):
    certificate = authority().localhost
    with Child("-c", textwrap.dedent(FORKING), how, certificate["certfile"], certificate["keyfile"]) as program:
        address = "127.0.0.1", program.port()
        parent = program.process.pid
        context = client_context(version)
        one = tls_peer(address, context=context)
        one.send(b"who\n")
        assert one.recv_until(b"\n") == b"%d\n" % parent

        # One has said nothing yet, the other has got an answer and not gone on.
        silent = tls_peer(address, context=context, shake=False)
        halfway = tls_peer(address, context=context, shake=False)
        with contextlib.suppress(ssl.SSLWantReadError):
            halfway.object.do_handshake()
        halfway.send_raw(halfway._outgoing.read())
        halfway._incoming.write(in_thread(halfway.socket.recv, 65536))
        deadline = time.monotonic() + 5.0
        while True:
            one.send(b"greeted\n")
            if one.recv_until(b"\n") == b"2\n":
                break
            assert time.monotonic() < deadline
        one.send(b"fork\n")
        child = int(program.expect(r"^child (\d+)$")[1])
        # The three connections are closed there, without a word; the hub's own descriptors may have become others.
        gone = program.expect(r"^gone (-?\d+) (\d+) (\d+)$")
        assert gone[2] == gone[3] == "0"

        for late in (silent, halfway):
            late.shake_hands()
            late.send(b"who\n")
            assert late.recv_until(b"\n") == b"%d\n" % parent
        one.send(b"who\n")
        assert one.recv_until(b"\n") == b"%d\n" % parent

        # The child serves, too, with TLS, and alone after the parent has stopped listening.
        one.send(b"stop listening\n")
        assert one.recv_until(b"\n") == b"done\n"
        visitor = tls_peer(address, context=context)
        visitor.send(b"who\n")
        assert visitor.recv_until(b"\n") == b"%d\n" % child
        visitor.send(b"end\n")
        program.expect("^child ends$")
        one.send(b"who\nend\n")
        assert one.recv_until(b"\n") == b"%d\n" % parent
        assert program.end() == 0
        assert program.error_output() == ""
        assert "parent ends 0" in program.output
        assert "on_ssl" not in program.output
        assert f"on_close {child}" not in program.output


# ---- the engine


def test_two_floods_over_tls_starve_neither_a_small_echo_nor_timers(secure, tls_peer, recorder):
    server = secure(Echo)
    blob = os.urandom(4 * MIB)
    floods = [gevent.spawn(exchange, tls_peer(server), blob, len(blob)) for _ in range(2)]
    beats = Engine.instance().cycle(0.001, recorder, "beat")
    small = tls_peer(server)
    for number in range(20):
        assert answers(small, b"%d\n" % number)
    recorder.wait_for(5)
    beats.cancel()
    assert all(flood.get() == blob for flood in floods)


def test_signals_are_still_heard_while_handshakes_go_on(secure, peer, recorder):
    server = secure(Echo)
    stalled = [peer(server) for _ in range(3)]
    until(lambda: len(server._greetings) == 3)
    before = signal.signal(signal.SIGUSR1, lambda *args: recorder("signal"))
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        recorder.wait_for("signal")
    finally:
        signal.signal(signal.SIGUSR1, before)
    for one in stalled:
        assert answers(TLSPeer.over(one))


# ---- goodbyes for which the kernel has room before it says so


@pytest.fixture
def brimful(secure, tls_peer, recorder):
    """Return a function that makes a peer and its stream, whose kernel buffers are full to the last byte: of nonsense, past TLS."""

    def make(**attributes):
        server = secure(recorder.of(Connection, "on_connect", "on_timeout", "on_close"), **attributes)
        one = tls_peer(server, rcvbuf=4096)
        recorder.wait_for("on_connect")
        stream = only(server)
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * KIB)
        stream.socket.settimeout(0)
        for size in (4096, 64, 1):
            with contextlib.suppress(BlockingIOError):
                while True:
                    stream.socket.send(bytes(size))
        return one, stream

    return make


def test_goodbye_that_the_peer_s_own_words_make_room_for_leaves_no_watcher(brimful, recorder, capfd):
    one, stream = brimful()
    stream.end()
    turns()
    for _ in range(100):
        if stream.closed:
            break
        in_thread(one.socket.recv, 1000)
        one.send_raw(one.encrypt(b"hi"))  # by which the stream wakes, too
        turns(4)
    recorder.wait_for("on_close")
    assert stream.close_reason == CloseReason.ENDED_HERE
    one.close()
    until(lambda: lingering() == 0)
    assert capfd.readouterr().err == ""


def test_goodbye_is_tried_once_more_before_write_timeout_strikes(brimful, recorder):
    one, stream = brimful(write_timeout=0.4)
    stream.end()
    turns()
    for _ in range(5):
        in_thread(one.socket.recv, 1000)  # less than makes the kernel tell of room
        turns(4)
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("on_close",)]
    assert stream.close_reason == CloseReason.ENDED_HERE
    one.close()
    until(lambda: lingering() == 0)
