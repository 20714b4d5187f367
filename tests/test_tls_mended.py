"""Defects of TLS that a review found, and that are not to come back.

Nobody's turn is measured in time: what counts is how much is received in one go.
"""

import gc
import os
import resource
import shutil
import socket
import ssl
import textwrap
import weakref

import gevent
import gevent.socket
import pytest
import tls_peers
from certificates import authority, client_context, server_context
from children import Child
from echoes import Echo, EchoLines
from gevent.event import AsyncResult, Event
from peers import PlainSocket
from test_starttls import RECORDS, MemoryTLS
from test_tls_filter import CLIENT, SERVER, End, Plain, Wire, both_versions
from test_tls_load import KeyUpdates
from tls_peers import TLSPeer
from waiting import lingering, nothing_is_kept, turns, unsent, until  # noqa: F401

from pants_green import ChannelStateError, Client, CloseReason, Connection, Engine, ReadTimeout, Server, Stream
from pants_green.testing import memory_pair

tls_peer = tls_peers.tls_peer

KIB, MIB = 1 << 10, 1 << 20

#: The callbacks of a stream that tell how TLS went.
ALL = ("on_ssl_handshake", "on_connect", "on_read", "on_end", "on_ssl_handshake_error", "on_ssl_error", "on_error", "on_close")

#: Options for the server's side of a stream that stands on no server.
SERVER_SIDE = {**authority().localhost, "server_side": True}

#: Bytes that may be received before others get their turn, when they are for TLS alone.
TURN = 128 * KIB

#: A whole record that cannot be decrypted.
NONSENSE = b"\x17\x03\x03\x00\x20" + b"g" * 32

# gevent's subprocess forks, and what becomes of it here is exec at once.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def secure(server_of):
    """Return a function that makes a listening server that speaks TLS: as ``server_of``, with options for startSSL."""

    def make(*args, options=None, **kwargs):
        return server_of(*args, **kwargs).startSSL(server_context() if options is None else options)

    return make


@pytest.fixture
def accepted(secure, tls_peer):
    """Return a function that has a TLS peer accepted, and returns it and the socket that on_accept got; closed at the end."""
    socks = []

    class Accepting(Server):
        __slots__ = ()

        def on_accept(self, sock, addr):
            socks.append(sock)
            came.set(sock)

    came = AsyncResult()

    def make(**options):
        one = tls_peer(secure(server_class=Accepting), **options)
        return one, came.get(timeout=5)

    yield make
    for sock in socks:
        sock.close()


def answers(one, data=b"hello"):
    """Tell whether this peer is echoed."""
    one.send(data)
    return one.recv_exactly(len(data)) == data


def only(server):
    """Return the one connection that a server has."""
    (stream,) = server.channels.values()
    return stream


def over_memory(recorder, version, *names, keylog=None, capacity=MIB):
    """Return a stream that has been the server of a handshake over memory, the end that is its peer, and the TLS of that."""
    kind = recorder.of(Stream, "on_ssl_handshake", *names, on_connect=lambda self: self.startSSL(SERVER_SIDE))
    stream, end = memory_pair(kind, capacity=capacity)
    tls = MemoryTLS(end, version)
    if keylog is not None:
        tls.object.context.keylog_filename = str(keylog)
    end.send(tls.hello())
    tls.shake_hands()
    tls.object.context.keylog_filename = None
    recorder.wait_for("on_ssl_handshake")
    turns()
    assert tls.receive() == (b"", False)  # the tickets of TLS 1.3
    return stream, end, tls


# ---- Options that are wrong


@pytest.mark.parametrize(
    ("options", "error"),
    [({"ca_certs": "/no/such/file", "server_hostname": "localhost"}, OSError), ({"certfiel": "x"}, TypeError), (17, TypeError)],
    ids=["no such file", "no such option", "no options"],
)
def test_stream_whose_ssl_options_are_wrong_does_not_live_on_in_clear(recorder, options, error):
    def on_connect(self):
        self.write(b"in clear")

    ours, theirs = gevent.socket.socketpair()
    with theirs:
        with pytest.raises((error, ValueError)):
            recorder.of(Stream, *ALL, on_connect=on_connect)(socket=ours, ssl_options=options)
        turns()
        assert recorder == []
        assert Engine.instance().channels == []
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(100)
        # The socket is the caller's still.
        ours.sendall(b"open")
        ours.close()
        assert theirs.recv(100) == b"open"
        assert theirs.recv(100) == b""


@pytest.mark.parametrize("where", ["constructor of the connection", "on_accept", "another greenlet"])
def test_ssl_options_for_a_connection_of_a_tls_server_cost_that_connection(secure, tls_peer, recorder, caplog, where):
    class Wrong(Echo):
        def __init__(self, socket, server):
            super().__init__(socket, server, ssl_options=authority().localhost if first.pop() else None)

    class Wrapping(Server):
        def on_accept(self, sock, addr):
            if where == "on_accept":
                self.wrap(sock)
            else:
                gevent.spawn(self.wrap, sock).join()

        def wrap(self, sock):
            try:
                recorder.of(Echo, *ALL)(socket=sock, ssl_options=authority().localhost if first.pop() else None)
            except ChannelStateError as error:
                recorder("refused", str(error))
                sock.close()

    first = [False, True]
    server = secure(recorder.of(Wrong, *ALL), server_class=Server if where == "constructor of the connection" else Wrapping)
    one = tls_peer(server, shake=False)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        one.shake_hands()  # in TLS 1.3 that is done before the server has anything to say against it
        if not one.recv():
            raise ConnectionAbortedError
    assert [event for event in recorder.names() if event != "refused"] == []
    assert Engine.instance().channels == [server]
    if where == "constructor of the connection":
        assert "speaks TLS already" in caplog.text
    else:
        assert "speaks TLS already" in recorder[0][1]
    other = tls_peer(server)
    assert answers(other)
    other.shutdown_output()
    recorder.wait_for("on_close")


@pytest.mark.parametrize("name", ["minimum_version", "maximum_version"])
@pytest.mark.parametrize("bare", [True, False], ids=["bare", "in options"])
def test_sni_context_of_other_versions_is_refused(name, bare):
    context = server_context()
    setattr(context, name, ssl.TLSVersion.TLSv1_3 if name == "minimum_version" else ssl.TLSVersion.TLSv1_2)
    options = {**authority().localhost, "sni": {"www.example.org": context if bare else {"context": context}}}
    with pytest.raises(ValueError, match=rf"{name} of sni\['www\.example\.org'\]"):
        Server().startSSL(options)


@both_versions
@pytest.mark.parametrize("suppress", [True, False])
@pytest.mark.parametrize("side", ["server", "client"])
def test_end_without_a_goodbye_is_one_only_if_suppress_ragged_eofs_says_so(
    secure, tls_peer, listening_peer, recorder, side, suppress, version
):
    kind = recorder.of(Connection if side == "server" else Client, "on_read", "on_end", "on_ssl_error", "on_close", read_delimiter=b"\n")
    if side == "server":
        server = secure(kind, options={**authority().localhost, "suppress_ragged_eofs": suppress})
        one = tls_peer(server, context=client_context(version))
    else:
        listener = listening_peer()
        options = {"ca_certs": authority().file, "server_hostname": "localhost", "suppress_ragged_eofs": suppress}
        client = kind(ssl_options=options).connect(listener.address)
        one = TLSPeer.over(listener.accept(), server_context(version), server_side=True)
    one.send(b"line\nrest")
    recorder.wait_for("on_read")
    one.truncate_output()
    recorder.wait_for("on_close")
    told = ("on_end", b"rest") if suppress else "on_ssl_error"
    assert [event if isinstance(told, tuple) else event[0] for event in recorder[1:-1]] == [told]
    one.close()
    until(lambda: lingering() == 0)
    if side == "client":
        assert client.close_reason == (CloseReason.PEER_ENDED if suppress else CloseReason.TLS_FAILED)


# ---- Peers that want the hub for themselves


class Counting(Wire):
    """A direction that counts what is received: the bytes of each receive."""

    def __init__(self):
        super().__init__()
        self.receives = []

    def recv(self, size):
        self.receives.append(0)
        assert len(self.receives) < 1000, "this does not come to an end"
        data = super().recv(size)
        self.receives[-1] = len(data)
        return data


#: A record full of messages that a client skips when it waits for others (HelloRequest of TLS 1.2).
SKIPPED = b"\x16\x03\x03" + (16 * KIB).to_bytes(2) + bytes(16 * KIB)


@both_versions
def test_handshake_gives_others_their_turn_while_the_peer_floods(version):
    down, up = Counting(), Wire()
    client = End(down, up, CLIENT[version], False)
    assert client.tls.shake_hands() is client.reader
    down.data += SKIPPED * 100
    for _ in range(10):
        down.receives.clear()
        left = len(down.data)
        assert client.tls.shake_hands() is client.reader
        assert 0 < len(down.receives) <= 8
        assert left > len(down.data) > 0


def turn_by_turn(end):
    """Return how many bytes were taken of what a memory end has sent, in every turn of the hub until all was."""
    taken = []
    while not end.all_taken:
        before = end._outgoing.size
        gevent.sleep(0)
        taken.append(before - end._outgoing.size)
    return taken


def test_stream_in_its_handshake_that_the_peer_floods_gives_others_their_turn(recorder):
    def on_connect(self):
        self.startSSL({"ca_certs": authority().file, "server_hostname": "localhost"})

    stream, end = memory_pair(recorder.of(Stream, *ALL, on_connect=on_connect))
    end.wait_for(100)  # its hello
    end.send(SKIPPED * 100)
    taken = turn_by_turn(end)
    assert sum(taken) == 100 * len(SKIPPED)
    assert max(taken) <= TURN
    assert not stream.closed
    stream.abort()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_close"]


class Updating:
    """A server's filter over counted ports, and a client of TLS 1.3 that asks it for new keys.

    Attributes:
        end: the server's End.
        plain: the client; it speaks for itself, but `updates` for it.
        updates: the KeyUpdates.
    """

    def __init__(self, keylog):
        context = client_context("1.3")
        context.keylog_filename = str(keylog)
        self.end = End(Counting(), Wire(), SERVER["1.3"], True)
        self.plain = Plain("1.3", False, context)
        self.end.incoming.data += self.plain.shake_hands(self.end)
        assert self.end.tls.shake_hands() is None
        context.keylog_filename = None
        self.updates = KeyUpdates(self.plain, keylog)
        self.read()
        self.end.incoming.receives.clear()

    def read(self):
        """Read everything that the filter has sent, which gives it room; return it."""
        return self.plain.read(self.end)[0]


@pytest.fixture
def updating(tmp_path):
    return Updating(tmp_path / "keys")


@pytest.mark.parametrize("size", [4096, 256 * KIB])
def test_receive_gives_others_their_turn_while_the_peer_floods_with_new_keys(updating, size):
    end = updating.end
    flood = b"".join(updating.updates.update() for _ in range(8_000))
    end.incoming.data += flood
    if size > TURN:  # by the first receive it is known who this is
        with pytest.raises(BlockingIOError):
            end.tls.recv(size)
        assert len(end.incoming.receives) == 1
    while end.incoming.data:
        end.incoming.receives.clear()
        with pytest.raises(BlockingIOError):
            end.tls.recv(size)
        assert sum(end.incoming.receives) <= TURN
        updating.read()
    end.incoming.data += updating.updates.record(b"hello")
    assert end.tls.recv(size) == b"hello"


@both_versions
def test_receive_gives_others_their_turn_while_the_peer_floods_with_tiny_records(version):
    down, up = Counting(), Wire()
    client = End(down, up, CLIENT[version], False)
    plain = Plain(version)
    down.data += plain.shake_hands(client)
    assert client.tls.shake_hands() is None
    assert client.read_all() == (b"", None)
    down.data += b"".join(plain.encrypt(b"x") for _ in range(20_000))
    got = len(client.tls.recv(64 * KIB))
    assert 0 < got < 10_000
    while down.data:
        down.receives.clear()
        data = client.tls.recv(64 * KIB)
        got += len(data)
        assert sum(down.receives) <= 16 * KIB
    while got < 20_000:
        got += len(client.tls.recv(64 * KIB))
    down.data += plain.encrypt(bytes(200 * KIB))
    assert client.read_all(64 * KIB) == (bytes(200 * KIB), None)


def test_stream_that_the_peer_floods_with_new_keys_gives_others_their_turn(recorder, tmp_path):
    stream, end, tls = over_memory(recorder, "1.3", "on_read", keylog=tmp_path / "keys")
    updates = KeyUpdates(tls, tmp_path / "keys")
    # So that its receives are long ones.
    end.send(b"".join(updates.record(bytes(16 * KIB)) for _ in range(40)))
    recorder.wait_for(lambda events: sum(len(event[1]) for event in events if event[0] == "on_read") == 640 * KIB)
    # Behind so many bytes for one, the first receive of these is as long as any; those after it are short.
    end.send(b"".join(updates.update() for _ in range(30_000)) + updates.record(b"at last"))
    taken = turn_by_turn(end)
    assert max(taken[1:]) <= TURN
    assert max(taken) < sum(taken) / 2
    recorder.wait_for(("on_read", b"at last"))
    stream.abort()


def test_answers_to_key_updates_count_only_while_they_wait(updating):
    """The peer is slow, and there is always something that it has not read yet; but it reads, the answers too."""
    end = updating.end
    output = bytes(16 * MIB)
    sent = got = 0
    for _ in range(2000):
        end.outgoing.room = 6000
        sent += end.tls.send(memoryview(output)[sent:])
        got += len(updating.read())
        assert end.tls._left
        end.outgoing.room = 0
        end.incoming.data += updating.updates.update()
        with pytest.raises(BlockingIOError):  # and not an ssl.SSLError
            end.tls.recv(4096)
        end.incoming.receives.clear()
    assert 10 * MIB < got < len(output)
    end.outgoing.room = None
    while sent < len(output):
        sent += end.tls.send(memoryview(output)[sent:])
    assert got + len(updating.read()) == len(output)


# ---- fork

FORKING = """
    import os, sys
    import gevent
    from gevent.event import Event
    from pants_green import Connection, Server

    situation = sys.argv[1]
    options = {"certfile": sys.argv[2], "keyfile": sys.argv[3]}
    parent = os.getpid()
    ready, go_on, told = Event(), Event(), Event()

    def say(*words):
        os.write(1, (" ".join(["parent" if os.getpid() == parent else "child", *map(str, words)]) + "\\n").encode())

    class Reading(Connection):
        def on_connect(self):
            ready.set()
            try:
                self.read(b"\\n", timeout=0.2)
            except BaseException as error:
                say("read:", type(error).__name__)
                told.set()

    class Handshakes(Server):
        handshake_timeout = 0.2

        def on_ssl_wrap_error(self, sock, addr, exception):
            say("on_ssl_wrap_error:", type(exception).__name__)
            told.set()

    class Waiting(Server):
        def on_accept(self, sock, addr):
            ready.set()
            go_on.wait()
            if os.getpid() == parent:
                sock.sendall(b"hello")
                sock.close()
                told.set()
            elif situation == "accept raises":
                raise ValueError

    if situation == "read":
        server = Server(Reading)
    elif situation == "handshake":
        server = Handshakes(Connection, ssl_options=options)
    else:
        server = Waiting(Connection, ssl_options=options)
    server.listen(("127.0.0.1", 0))
    say("port", server.local_address[1])
    if situation == "handshake":
        while not server._greetings:
            gevent.sleep(0.001)
    else:
        ready.wait()
    child = os.fork()
    if child == 0:
        go_on.set()
        gevent.sleep(0.4)  # twice as long as the limits are: time must pass here
        say("done")
        os._exit(0)
    if "accept" in situation:
        os.waitpid(child, 0)  # the child comes first
    go_on.set()
    if not told.wait(10):
        say("was told nothing")
    if "accept" not in situation:
        os.waitpid(child, 0)
    say("done")
    os._exit(0)
"""


def forking(situation):
    certificate = authority().localhost
    return Child("-c", textwrap.dedent(FORKING), situation, certificate["certfile"], certificate["keyfile"])


@pytest.mark.parametrize(
    ("situation", "told"),
    [("handshake", "parent on_ssl_wrap_error: HandshakeTimeout\n"), ("read", "parent read: ReadTimeout\n")],
    ids=["handshake", "read"],
)
def test_time_limit_that_runs_while_the_process_forks_is_the_parents_alone(peer, situation, told):
    with forking(situation) as program:
        peer(("127.0.0.1", program.port()))
        assert program.end() == 0
        assert program.error_output() == ""
        assert told in program.output
        assert program.output.count("child") == 1
        assert "child done\n" in program.output


@pytest.mark.parametrize("situation", ["accept returns", "accept raises"])
def test_forked_child_in_which_on_accept_ends_says_no_goodbye_for_the_parent(tls_peer, situation):
    with forking(situation) as program:
        one = tls_peer(("127.0.0.1", program.port()))
        assert one.recv_all() == b"hello"
        assert program.end() == 0
        assert "child done\n" in program.output


# ---- What waits for room


def test_read_timeout_while_the_last_flight_of_the_handshake_is_partly_sent(recorder):
    def on_connect(self):
        self.startSSL(SERVER_SIDE)
        try:
            self.read(b"\n", timeout=0.05)
        except ReadTimeout:
            recorder("given up")
        recorder(self.read(b"\n", timeout=5))

    stream, end = memory_pair(recorder.of(Stream, *ALL, on_connect=on_connect, read_delimiter=b"\n"), capacity=10)
    tls = MemoryTLS(end, "1.2")  # in which the server has the last word
    end.send(tls.hello())
    while True:
        received = end.wait_for(tls._seen + 1)
        tls._incoming.write(received[tls._seen :])
        tls._seen = len(received)
        with pytest.raises(ssl.SSLWantReadError):
            tls.object.do_handshake()
        if tls._outgoing.pending:
            break
    end.send(tls._outgoing.read())
    recorder.wait_for("given up")
    assert end._incoming.size == 10  # the rest of the flight waits for room
    tls.shake_hands()
    end.send(tls.encrypt(b"line\n"))
    recorder.wait_for(b"line")
    assert recorder[:3] == [("on_connect",), "given up", b"line"]
    stream.abort()
    recorder.wait_for("on_close")
    assert "on_ssl_handshake_error" not in recorder.names()


@both_versions
@pytest.mark.parametrize("room", [0, 10])
@pytest.mark.parametrize("heard", [True, False], ids=["on_end", "no on_end"])
def test_goodbye_that_answers_the_peers_follows_when_there_is_room(recorder, version, room, heard):
    """Everything was written and the outbox is empty when the peer ends its side; then it reads."""
    names = ["on_end", "on_close"] if heard else ["on_close"]
    stream, end, tls = over_memory(recorder, version, *names, capacity=RECORDS[version][0] + room)
    stream.write(b"x" * 1000)
    until(lambda: end._incoming.size)
    assert unsent(stream) == 0
    end.send(goodbye_of(tls))
    end.shutdown_output()
    turns()
    tls._incoming.write(end.wait_for()[tls._seen :])  # up to the FIN
    assert tls.object.read(2000) == b"x" * 1000
    with pytest.raises(ssl.SSLZeroReturnError):  # the goodbye
        tls.object.read(2000)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_ssl_handshake", *names]
    assert stream.close_reason == CloseReason.PEER_ENDED


@both_versions
def test_goodbye_that_answers_the_peers_over_a_full_unix_socket(secure, recorder, tmp_path, version):
    def on_read(self, data):
        written = 0
        while written != fits and not unsent(self):
            self.write(b"y" * 30_000, flush=True)
            written += 1
        recorder(written - bool(unsent(self)))

    fits = None
    server = secure(recorder.of(Connection, "on_close", on_read=on_read), str(tmp_path / "socket"))
    context = client_context(version)
    with TLSPeer(server, context=context) as one:
        one.send(b"how much fits?")
        recorder.wait_for(1)
    recorder.wait_for("on_close")
    fits = recorder[0]
    recorder.clear()
    with TLSPeer(server, context=context) as one:
        one.send(b"write that much")
        recorder.wait_for(1)
        one.send_raw(goodbye_of(one))
        turns()
        assert recorder == [fits]  # it is not through with the goodbye yet
        assert one.recv_all() == b"y" * 30_000 * fits  # an end without goodbye would be an ssl.SSLEOFError
        recorder.wait_for("on_close")


def goodbye_of(one):
    """Return a TLS peer's goodbye, which is not an answer to ours."""
    with pytest.raises(ssl.SSLWantReadError):
        one.object.unwrap()
    return one._outgoing.read()


@both_versions
def test_shutdown_of_an_accepted_socket_waits_for_room_for_the_goodbye(accepted, version):
    one, sock = accepted(context=client_context(version), rcvbuf=4096)
    sock.settimeout(0.0)
    written = 0
    try:
        while True:
            written += 30_000
            if sock.send(b"y" * 30_000) < 30_000:
                break  # what is encrypted and not sent goes out in front of the goodbye
    except BlockingIOError:
        pass
    sock.settimeout(5.0)
    ending = gevent.spawn(sock.shutdown, socket.SHUT_WR)
    turns()
    assert not ending.ready()
    assert one.recv_all() == b"y" * written  # an end without goodbye would be an ssl.SSLEOFError
    ending.get(timeout=5)


# ---- Circles


#: What a peer does that the other side's TLS does not take.
WRONGS = {"nonsense": lambda one: one.send_raw(NONSENSE), "truncation": lambda one: one.truncate_output()}


def reads(stream, *data):
    stream.read(1000)


def ends(stream, *data):
    stream.write(bytes(4 * MIB))
    stream.end()


@pytest.fixture
def without_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@both_versions
@pytest.mark.parametrize("wrong", WRONGS)
@pytest.mark.parametrize("meanwhile", [reads, ends])
def test_trouble_of_tls_in_a_read_or_while_draining_leaves_no_circle(secure, tls_peer, without_collector, meanwhile, wrong, version):
    alive = []

    def on_connect(stream):
        alive.extend((weakref.ref(stream), weakref.ref(stream.ssl_object)))
        meanwhile(stream)

    server = secure(on_connect=on_connect, on_ssl_error=lambda stream, error: None)
    for number in (1, 2):
        one = tls_peer(server, context=client_context(version), rcvbuf=4096)
        until(lambda number=number: len(alive) == 2 * number)
        turns()
        WRONGS[wrong](one)
        turns()
        one.reset()
        until(lambda: not server._children() and lingering() == 0)
    turns()
    assert [ref() for ref in alive] == [None] * 4


@both_versions
@pytest.mark.parametrize("wrong", WRONGS)
def test_trouble_of_tls_told_twice_by_an_accepted_socket_leaves_no_circle(secure, tls_peer, recorder, without_collector, wrong, version):
    class Receiving(Server):
        __slots__ = ()

        def on_accept(self, sock, addr):
            recorder(weakref.ref(sock), weakref.ref(sock.ssl_object))
            for _ in range(2):
                try:
                    sock.recv(100)
                except ssl.SSLError:
                    recorder("told")
            sock.close()

    one = tls_peer(secure(server_class=Receiving), context=client_context(version))
    recorder.wait_for(1)
    WRONGS[wrong](one)
    recorder.wait_for(3)
    turns()
    assert [ref() for ref in recorder[0]] == [None, None]
    assert recorder[1:] == ["told", "told"]


# ---- Certificates


def test_watch_certificates_tries_again_after_a_passing_trouble_and_tells_it_once(secure, tmp_path, recorder, caplog):
    def put(certificate):
        for part, path in files.items():
            shutil.copyfile(certificate[part], tmp_path / "new")
            os.replace(tmp_path / "new", path)

    def told(event):
        return [record.message for record in caplog.records if getattr(record, "event", None) == event]

    class Loading(Server):
        __slots__ = ()

        def reload_certificates(self):
            recorder("tried")
            super().reload_certificates()

    caplog.set_level("INFO")
    files = {part: str(tmp_path / part) for part in ("certfile", "keyfile")}
    put(authority().issue("localhost", common_name="first"))
    server = secure(server_class=Loading, options=files)
    watch = server.watch_certificates(0.005)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    put(authority().issue("localhost", common_name="second"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    try:
        recorder.wait_for(3)  # each of them in vain, for a file cannot be opened
        assert len(told("certificates_refused")) == 1
        assert told("certificates_loaded") == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    until(lambda: told("certificates_loaded"))
    assert len(told("certificates_refused")) == 1
    with TLSPeer(server) as one:
        assert (("commonName", "second"),) in one.object.getpeercert()["subject"]
    tries = len(recorder)
    turns(30)
    assert len(recorder) == tries  # nothing has changed since
    watch.cancel()


# ---- Handshakes that fail


def test_failed_handshakes_of_which_on_ssl_wrap_error_is_not_told_yet_are_few(secure, tls_peer, recorder, caplog):
    class Slow(Server):
        __slots__ = ()

        def on_ssl_wrap_error(self, sock, addr, exception):
            recorder("told")
            go_on.wait()

    def closed(sock):
        try:
            while sock.recv(1000):
                pass
        except BlockingIOError:
            return False
        except ConnectionError:
            pass
        return True

    go_on = Event()
    server = secure(Echo, server_class=Slow)
    ones = []
    try:
        for _ in range(130):
            ones.append(PlainSocket())
            ones[-1].connect(server.local_address)
            ones[-1].sendall(b"GET / HTTP/1.0\r\n\r\n")
            ones[-1].setblocking(False)
            gevent.sleep(0)
        until(lambda: sum(map(closed, ones)) >= 29)
        assert sum(map(closed, ones)) <= 30
        assert answers(tls_peer(server))
        assert recorder == ["told"]
        go_on.set()
        until(lambda: all(map(closed, ones)))
        assert 100 <= len(recorder) <= 101
        # The others were logged, not all of them one by one.
        assert len([record for record in caplog.records if getattr(record, "event", None) == "handshake_error"]) == 10
        server._reports.close()
        assert f"{130 - len(recorder) - 10} more" in caplog.records[-1].getMessage()
        # Now there is time for another one again.
        tries = len(recorder)
        ones.append(PlainSocket())
        ones[-1].connect(server.local_address)
        ones[-1].sendall(b"GET / HTTP/1.0\r\n\r\n")
        recorder.wait_for(tries + 1)
    finally:
        go_on.set()
        for sock in ones:
            sock.close()


@pytest.mark.parametrize("on_accept", ["overridden", "not overridden"])
def test_socket_of_on_ssl_wrap_error_is_a_usable_gevent_socket(secure, peer, recorder, on_accept):
    class Talking(Server):
        def on_ssl_wrap_error(self, sock, addr, exception):
            recorder(isinstance(sock, gevent.socket.socket), sock.getpeername() == addr)
            sock.sendall(b"speak TLS\r\n")
            sock.settimeout(5)
            recorder(sock.recv(100))

    class Accepting(Talking):
        def on_accept(self, sock, addr):
            Connection(sock, self)

    one = peer(secure(server_class=Accepting if on_accept == "overridden" else Talking))
    one.send(b"GET / HTTP/1.0\r\n\r\n")
    one.recv_until(b"speak TLS\r\n")
    one.send(b"sorry")
    one.recv_all()
    assert recorder == [(True, True), b"sorry"]


def test_handshake_timeout_that_is_lifted_during_the_handshake_does_not_strike(listening_peer, recorder, caplog, capfd):
    listener = listening_peer()
    client = recorder.of(Client, *ALL)(ssl_options={"ca_certs": authority().file, "server_hostname": "localhost"})
    client.handshake_timeout = 0.1
    client.connect(listener.address)
    one = listener.accept()
    until(lambda: client._limits is not None)
    client.handshake_timeout = None
    gevent.sleep(0.2)  # twice the limit: time must pass here
    assert recorder == []
    one = TLSPeer.over(one, server_context(), server_side=True)
    recorder.wait_for("on_connect")
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_ssl_handshake", "on_connect", "on_end", "on_close"]
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert "Traceback" not in capfd.readouterr().err  # where the hub tells what was raised in it
    one.close()
    until(lambda: lingering() == 0)


def test_timeout_of_a_read_that_waits_for_room_counts_while_starttls_waits_for_the_peer(server_of, peer, recorder):
    """Reading is held up by output, another greenlet asks for TLS, the peer takes the output and says nothing of a handshake."""

    def on_connect(stream):
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    def on_read(stream, line):
        stream.read(b"\n")
        stream.write(bytes(2 * MIB))
        recorder("reads")
        try:
            stream.read(b"\n", timeout=0.3)
        except ReadTimeout:
            recorder("given up", stream.closed)
        stream.abort()

    kind = recorder.of(Connection, "on_ssl_handshake_error", "on_close", read_delimiter=b"\n", high_water=1000, low_water=100)
    kind.on_connect, kind.on_read = on_connect, on_read
    server = server_of(kind)
    one = peer(server, rcvbuf=4096)
    one.send(b"one\ntwo\n")
    recorder.wait_for("reads")
    turns()
    only(server).startSSL({**authority().localhost, "handshake_timeout": 20})
    one.recv_exactly(2 * MIB)
    recorder.wait_for("on_close")
    assert recorder == ["reads", ("given up", False), ("on_close",)]


# ---- What came in clear, and what comes by TLS


#: An encoding, what is said in clear and leaves its decoder with something to remember, and what is said by TLS.
ENCODED = {
    "iso2022_jp": (b"STARTTLS\x1b$B", b"hello!"),
    "utf-16": (b"\xfe\xff" + "STARTTLS".encode("utf-16-be"), b"\xff\xfe" + "hello!".encode("utf-16-le")),
}


@pytest.mark.parametrize("how", ["on_read", "read() behind it", "read() alone"])
@pytest.mark.parametrize("encoding", ENCODED)
def test_what_came_in_clear_does_not_change_how_protected_text_is_decoded(recorder, encoding, how):
    def on_connect(self):
        if how == "read() alone":
            self.on_read(self.read(None))

    def on_read(self, text):
        recorder(text)
        if text == "STARTTLS":
            self.startSSL(SERVER_SIDE)
            if how != "on_read":
                recorder(self.read(None))

    clear, protected = ENCODED[encoding]
    attributes = {"encoding": encoding, "read_delimiter": 1000 if how == "read() alone" else None}
    stream, end = memory_pair(type("Upgrading", (Stream,), {"on_connect": on_connect, "on_read": on_read, **attributes}))
    end.send(clear)
    recorder.wait_for("STARTTLS")
    tls = MemoryTLS(end)
    end.send(tls.hello())
    tls.shake_hands()
    end.send(tls.encrypt(protected))
    recorder.wait_for(2)
    assert recorder == ["STARTTLS", "hello!"]
    stream.abort()


# ---- Sockets that were handed over


@pytest.mark.parametrize("where", ["on_accept", "another greenlet"])
def test_accepted_socket_that_a_stream_has_makes_no_second_one(secure, tls_peer, recorder, where):
    class Twice(Server):
        def on_accept(self, sock, addr):
            EchoLines(socket=sock)
            if where == "on_accept":
                self.again(sock)
            else:
                gevent.spawn(self.again, sock).join()

        def again(self, sock):
            try:
                recorder.of(EchoLines, *ALL)(socket=sock)
            except ValueError as error:
                recorder("refused", "stream" in str(error))

    server = secure(server_class=Twice)
    one = tls_peer(server)
    recorder.wait_for(1)
    assert answers(one, b"the first one is well\n")
    turns()
    assert recorder == [("refused", True)]
    assert len(Engine.instance().channels) == 2  # the server and the first one
    one.shutdown_output()
    assert one.at_eof()
    until(lambda: Engine.instance().channels == [server])
