"""Clients: connecting by every form of address, by name, and failing to."""

import errno
import logging
import os
import socket

import gevent
import pytest
from gevent.event import Event
from needs import needs_ipv6
from waiting import nothing_is_kept, turns, until  # noqa: F401

from pants_green import ChannelStateError, Client, CloseReason, Connection, Engine, InvalidAddressFormatError, Stream, StreamConnectError
from pants_green._address import Address

ENDERS = {"close": CloseReason.CLOSED_HERE, "end": CloseReason.ENDED_HERE, "abort": CloseReason.ABORTED_HERE}


class Echo(Connection):
    def on_read(self, data):
        self.write(data)


class Asker(Client):
    """Asks, and closes when it has the answer."""

    def on_connect(self):
        self.write(b"question")

    def on_read(self, data):
        self.close()


@pytest.fixture
def names(monkeypatch):
    """Return a dictionary of names and the hosts that they have; a value may be an exception, or a function that returns either."""
    known = {}

    def resolve(address):
        if not address.needs_lookup:
            return [address]
        found = known[address.sockaddr[0]]
        if callable(found):
            found = found()
        if isinstance(found, BaseException):
            raise found
        families = [(socket.AF_INET6 if ":" in host else socket.AF_INET, host) for host in found]
        return [Address(family, (host, address.sockaddr[1]), False) for family, host in families]

    monkeypatch.setattr("pants_green._sockets.resolve", resolve)
    return known


@pytest.fixture
def nobody():
    """Return an address at which nobody listens, and nobody will during the test."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()


@pytest.fixture
def full(listening_peer):
    """Return an address that neither accepts nor refuses: the queue of its listener is full."""
    listener = listening_peer(backlog=0)
    waiting = []
    for _ in range(3):
        one = socket.socket()
        one.setblocking(False)
        one.connect_ex(listener.address)
        waiting.append(one)
    yield listener.address
    for one in waiting:
        one.close()


def port_of(server):
    return server.local_address[1]


# ---- Connecting

CONNECT_FORMS = [
    pytest.param(lambda client, port: client.connect("127.0.0.1", port), id="s4_1 host, port"),
    pytest.param(lambda client, port: client.connect(("127.0.0.1", port)), id="s4_19 pair"),
    pytest.param(lambda client, port: client.connect("localhost", port), id="s4_1 name, port"),
    pytest.param(lambda client, port: client.connect(("localhost", port)), id="s4_19 pair with a name"),
    pytest.param(lambda client, port: client.connect(port), id="port"),
    pytest.param(lambda client, port: client.connect(("", port)), id="this machine"),
]


@pytest.mark.parametrize("kind", [Client, Stream])
@pytest.mark.parametrize("connect", CONNECT_FORMS)
def test_s3_24_s4_1_s4_19_connect_understands_every_form(server_of, recorder, connect, kind):
    server = server_of(Echo, 0)
    client = recorder.of(kind, on_connect=Asker.on_connect, on_read=Asker.on_read)()
    assert connect(client, port_of(server)) is client
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("on_read", b"question"), ("on_close",)]


@needs_ipv6
@pytest.mark.parametrize("address", [("::1",), ("::1", 0, 0), ("[::1]",)])
def test_connect_understands_ipv6(server_of, recorder, address):
    server = server_of(Echo, ("::1", 0))
    client = recorder.of(Asker)().connect((address[0], port_of(server), *address[1:]))
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_close"]
    assert len(client.remote_address) == 4


def test_s4_5_connect_returns_first_and_on_connect_comes_later(server_of, recorder):
    client = recorder.of(Asker)().connect(server_of(Echo).local_address)
    assert recorder == []
    assert (client.connecting, client.connected, client.closed) == (True, False, False)
    recorder.wait_for("on_connect")
    assert (client.connecting, client.connected, client.closed) == (False, True, False)
    recorder.wait_for("on_close")


def test_client_knows_both_addresses_also_in_on_close(server_of, recorder):
    class Noting(Client):
        def on_connect(self):
            recorder("open", self.local_address, self.remote_address)
            self.close()

        def on_close(self):
            recorder("closed", self.local_address, self.remote_address)

    server = server_of(Echo)
    Noting().connect("127.0.0.1", port_of(server))
    recorder.wait_for("closed")
    assert recorder[0][1:] == recorder[1][1:]
    assert recorder[0][2] == server.local_address
    assert recorder[0][1][0] == "127.0.0.1"


def test_name_is_replaced_by_the_address_that_it_has(server_of, recorder, names):
    names["server.test"] = ["127.0.0.1"]
    server = server_of(Echo)
    client = recorder.of(Asker)().connect("server.test", port_of(server))
    recorder.wait_for("on_close")
    assert client.remote_address == server.local_address


def test_connect_in_the_constructor(server_of, recorder):
    class Eager(Asker):
        def __init__(self, address):
            super().__init__()
            self.connect(address)

    recorder.of(Eager)(server_of(Echo).local_address)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_close"]


def test_connect_from_a_callback_of_another_channel(server_of, peer, recorder):
    backend = server_of(Echo)

    class Back(Client):
        front = None

        def on_connect(self):
            self.front.write(b"ready")

        def on_read(self, data):
            self.front.write(data)

        def on_close(self):
            recorder("back closed")
            self.front.end()

    class Front(Connection):
        def on_connect(self):
            self.back = Back()
            self.back.front = self
            self.back.connect(backend.local_address)

        def on_read(self, data):
            self.back.write(data)

        def on_close(self):
            recorder("front closed")
            self.back.end()

    one = peer(server_of(Front))
    assert one.recv_exactly(5) == b"ready"
    one.send(b"through and back")
    assert one.recv_exactly(16) == b"through and back"
    one.close()
    recorder.wait_for(2)


def test_many_clients_connect_at_once(server_of, recorder):
    server = server_of(Echo)
    for _ in range(100):
        recorder.of(Asker)().connect(server.local_address)
    recorder.wait_for(lambda events: events.names().count("on_close") == 100)
    assert recorder.names().count("on_connect") == recorder.names().count("on_read") == 100


# ---- Wrong calls

NO_NAMES = [("a..b", 80), ("x" * 64 + ".invalid", 80), ("a b", 80), ("127.0.0.1:80", 80)]
NO_PORTS = [("127.0.0.1", "80"), ("127.0.0.1", 65536), ("127.0.0.1", 0), 70000, 0]
WRONG_ADDRESSES = [None, 1.5, [], ("127.0.0.1",), (1, 2, 3), "127.0.0.1:80", *NO_NAMES, *NO_PORTS]


@pytest.mark.parametrize("address", WRONG_ADDRESSES, ids=repr)
def test_e1_19_wrong_address_raises_and_the_stream_is_as_before(server_of, recorder, address):
    client = recorder.of(Asker)()
    with pytest.raises(InvalidAddressFormatError):
        client.connect(address)
    assert (client.connecting, client.connected, client.closed) == (False, False, False)
    client.connect(server_of(Echo).local_address)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_close"]


@pytest.mark.parametrize("when", ["connecting", "connected", "closed"])
def test_connecting_twice_is_a_runtime_error_and_changes_nothing(server_of, recorder, when):
    server = server_of(Echo)
    client = recorder.of(Client)().connect(server.local_address)
    if when != "connecting":
        recorder.wait_for("on_connect")
    if when == "closed":
        client.close()
    with pytest.raises(ChannelStateError, match=r"connect\(\).*used") as caught:
        client.connect(server.local_address)
    assert isinstance(caught.value, RuntimeError)
    client.end()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_close"] if when != "connecting" else ["on_close"]


def test_accepted_stream_cannot_connect(server_of, peer):
    server = server_of(Echo)
    one = peer(server)
    until(lambda: len(server.channels) == 1)
    (channel,) = server.channels.values()
    with pytest.raises(RuntimeError, match=r"connect\(\).*used"):
        channel.connect(server.local_address)
    one.send(b"x")
    assert one.recv_exactly(1) == b"x"


# ---- Failing


def test_e1_2_s4_6_refused_is_on_connect_error_then_on_close(nobody, recorder, caplog):
    client = recorder.of(Client, "on_connect", "on_connect_error", "on_read_error", "on_error", "on_close")()
    client.connect(nobody)
    assert recorder == []  # never inside connect()
    recorder.wait_for("on_close")
    turns()
    assert recorder.names() == ["on_connect_error", "on_close"]
    error = recorder[0][1]
    assert isinstance(error, StreamConnectError)
    assert isinstance(error, OSError)
    assert error.errno == errno.ECONNREFUSED
    assert f"127.0.0.1:{nobody[1]}" in str(error)
    assert isinstance(error.__cause__, ConnectionRefusedError)
    assert client.close_reason is CloseReason.CONNECT_FAILED
    assert client.close_error is error
    assert (client.connecting, client.connected, client.closed) == (False, False, True)
    assert client not in Engine.instance().channels
    assert [(record.levelno, record.channel) for record in caplog.records] == [(logging.WARNING, client)]


@needs_ipv6
def test_refused_on_ipv6(recorder):
    with socket.socket(socket.AF_INET6) as bound:
        bound.bind(("::1", 0))
        recorder.of(Client)().connect(bound.getsockname())
        recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect_error", "on_close"]
    assert recorder[0][1].errno == errno.ECONNREFUSED


def test_network_that_cannot_be_reached(recorder, monkeypatch):
    def dial(address):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr("pants_green._sockets.dial", dial)
    recorder.of(Client)().connect("192.0.2.1", 80)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect_error", "on_close"]
    assert recorder[0][1].errno == errno.ENETUNREACH


def test_name_that_nobody_knows(recorder, names):
    names["nobody.invalid"] = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    recorder.of(Client)().connect("nobody.invalid", 80)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect_error", "on_close"]
    error = recorder[0][1]
    assert isinstance(error, StreamConnectError)
    assert error.errno == socket.EAI_NONAME
    assert "nobody.invalid:80" in str(error)


def test_name_without_addresses(recorder, names):
    names["empty.invalid"] = []
    recorder.of(Client)().connect("empty.invalid", 80)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect_error", "on_close"]


def test_on_connect_error_may_dial_again_with_a_new_stream(server_of, nobody, recorder):
    server = server_of(Echo)

    def retry(client, error):
        recorder("closed", client.closed)
        recorder.of(Asker)().connect(server.local_address)

    recorder.of(Client, on_connect_error=retry)().connect(nobody)
    recorder.wait_for(lambda events: events.names().count("on_close") == 2)
    assert recorder.names() == ["on_connect_error", "closed", "on_close", "on_connect", "on_read", "on_close"]
    assert ("closed", True) in recorder


@pytest.mark.parametrize("make", [lambda: ZeroDivisionError(), lambda: gevent.Timeout(1), lambda: gevent.GreenletExit()])
def test_on_connect_error_that_raises_is_logged_and_on_close_follows(nobody, recorder, caplog, make):
    def fail(client, error):
        raise make()

    client = recorder.of(Client, on_connect_error=fail)().connect(nobody)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect_error", "on_error", "on_close"]
    assert [(record.levelno, record.channel) for record in caplog.records] == [(logging.ERROR, client)]
    assert client.close_reason is CloseReason.CONNECT_FAILED


# ---- Several addresses


@needs_ipv6
@pytest.mark.parametrize("home", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("order", [["::1", "127.0.0.1"], ["127.0.0.1", "::1"]], ids=["IPv6 first", "IPv4 first"])
def test_s1_10_e1_11_localhost_works_whichever_address_the_server_has(server_of, recorder, names, order, home):
    names["localhost"] = order
    server = server_of(Echo, (home, 0))
    client = recorder.of(Asker)().connect("localhost", port_of(server))
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_close"]
    assert client.remote_address[0] == home
    assert client.local_address[0] == home


def test_e1_11_every_address_is_tried_in_order(server_of, recorder, names, monkeypatch):
    from pants_green import _sockets

    tried = []
    dial = _sockets.dial

    def noting(address):
        tried.append(address.sockaddr[0])
        return dial(address)

    monkeypatch.setattr(_sockets, "dial", noting)
    names["many.test"] = ["127.0.0.2", "127.0.0.3", "127.0.0.1", "127.0.0.4"]
    recorder.of(Asker)().connect("many.test", port_of(server_of(Echo)))
    recorder.wait_for("on_close")
    assert tried == ["127.0.0.2", "127.0.0.3", "127.0.0.1"]
    assert recorder.names() == ["on_connect", "on_read", "on_close"]


def test_when_no_address_answers_it_is_one_error(recorder, names, nobody):
    names["many.test"] = ["127.0.0.2", "127.0.0.3", "127.0.0.1"]
    recorder.of(Client)().connect("many.test", nobody[1])
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect_error", "on_close"]
    assert recorder[0][1].errno == errno.ECONNREFUSED
    assert "many.test" in str(recorder[0][1])


# ---- Looking up


def test_e1_11_lookup_holds_up_nobody(server_of, peer, recorder, names):
    known = Event()

    def slow():
        known.wait()
        return ["127.0.0.1"]

    names["slow.test"] = slow
    server = server_of(Echo)
    client = recorder.of(Asker)().connect("slow.test", port_of(server))
    one = peer(server)
    one.send(b"meanwhile")
    assert one.recv_exactly(9) == b"meanwhile"
    assert recorder == []
    assert client.connecting
    known.set()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_close"]


def test_e1_11_lookup_that_blocks_for_real_holds_up_nobody(server_of, peer, recorder, monkeypatch):
    """gevent's resolver runs getaddrinfo in a thread."""
    known, tell = os.pipe()  # a wait that is no other's in a patched process either
    done = []

    def slow(*args):
        os.read(known, 1)
        done.append(args[0])
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", args[1]))]

    def getaddrinfo(*args):
        return gevent.get_hub().threadpool.apply(slow, args)

    monkeypatch.setattr("gevent.socket.getaddrinfo", getaddrinfo)
    server = server_of(Echo)
    recorder.of(Asker)().connect("slow.test", port_of(server))
    one = peer(server)
    one.send(b"meanwhile")
    assert one.recv_exactly(9) == b"meanwhile"
    assert done == []
    os.write(tell, b"x")
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_close"]
    os.close(known)
    os.close(tell)


@pytest.mark.parametrize("call", ENDERS)
@pytest.mark.parametrize("outcome", ["found", "not found"])
def test_e1_11_closed_during_the_lookup_on_close_comes_at_once(server_of, recorder, names, call, outcome):
    known = Event()
    looking = Event()

    def slow():
        looking.set()
        known.wait()
        return ["127.0.0.1"] if outcome == "found" else socket.gaierror(socket.EAI_NONAME, "unknown")

    names["slow.test"] = slow
    server = server_of(Echo)
    client = recorder.of(Client)().connect("slow.test", port_of(server))
    looking.wait()
    getattr(client, call)()
    assert client.closed
    recorder.wait_for("on_close")
    assert not known.is_set()
    known.set()
    turns()
    assert recorder.names() == ["on_close"]
    assert client.close_reason is ENDERS[call]
    assert len(server.channels) == 0


# ---- Closed early


@pytest.mark.parametrize("call", ENDERS)
@pytest.mark.parametrize("address", ["numeric", "name"])
def test_closed_in_the_same_turn_as_connect(server_of, recorder, call, address):
    server = server_of(Echo)
    client = recorder.of(Client)().connect("127.0.0.1" if address == "numeric" else "localhost", port_of(server))
    getattr(client, call)()
    assert recorder == []
    recorder.wait_for("on_close")
    turns()
    assert recorder.names() == ["on_close"]
    assert client.close_reason is ENDERS[call]
    assert client not in Engine.instance().channels


@pytest.mark.parametrize("call", ENDERS)
def test_closed_while_dialling(full, recorder, call):
    client = recorder.of(Client)().connect(full)
    turns()
    assert client.connecting
    getattr(client, call)()
    assert (client.connecting, client.closed) == (False, True)
    recorder.wait_for("on_close")
    turns()
    assert recorder.names() == ["on_close"]
    assert client.close_reason is ENDERS[call]


def test_closed_while_dialling_one_of_several_addresses(full, recorder, names):
    names["many.test"] = ["127.0.0.1", "127.0.0.2"]
    client = recorder.of(Client)().connect("many.test", full[1])
    turns()
    client.close()
    recorder.wait_for("on_close")
    turns()
    assert recorder.names() == ["on_close"]


def test_close_twice_and_in_the_constructor(recorder):
    class Undecided(Client):
        def __init__(self):
            super().__init__()
            self.close()
            self.close()

    client = recorder.of(Undecided)()
    client.close()
    recorder.wait_for("on_close")
    turns()
    assert recorder.names() == ["on_close"]


# ---- Ending, from this side of the connection


@pytest.mark.parametrize("call", ENDERS)
@pytest.mark.parametrize("callback", ["on_connect", "on_read"])
def test_client_that_ends_in_a_callback(listening_peer, recorder, call, callback):
    def end_it(client, *args):
        getattr(client, call)()

    listener = listening_peer()
    client = recorder.of(Client, **{callback: end_it})().connect(listener.address)
    one = listener.accept()
    if callback == "on_read":
        one.send(b"x")
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", *["on_read"] * (callback == "on_read"), "on_close"]
    assert client.close_reason is ENDERS[call]
    assert one.raises_reset() == (call == "abort")
    one.close()


@pytest.mark.parametrize(("leave", "reason"), [("close", CloseReason.PEER_ENDED), ("reset", CloseReason.PEER_LEFT)])
def test_client_whose_server_leaves(listening_peer, recorder, leave, reason):
    listener = listening_peer()
    client = recorder.of(Client)().connect(listener.address)
    one = listener.accept()
    recorder.wait_for("on_connect")
    getattr(one, leave)()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", *["on_end"] * (leave == "close"), "on_close"]
    assert client.close_reason is reason


def test_client_speaks_first_and_half_closes(listening_peer, recorder):
    def ask(client):
        client.write(b"question")
        client.write_eof()

    listener = listening_peer()
    recorder.of(Client, on_connect=ask)().connect(listener.address)
    one = listener.accept()
    assert one.recv_all() == b"question"
    one.send(b"answer")
    recorder.wait_for(("on_read", b"answer"))
    one.close()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_end", "on_close"]


def test_delimiter_of_a_client_may_be_set_before_it_connects(listening_peer, recorder):
    listener = listening_peer()
    client = recorder.of(Client)()
    client.read_delimiter = b"\n"
    client.connect(listener.address)
    one = listener.accept()
    one.send(b"1\n2\n")
    recorder.wait_for(("on_read", b"2"))
    assert ("on_read", b"1") in recorder
    one.close()
    recorder.wait_for("on_close")


def test_s4_2_close_removes_the_client_from_the_engine(server_of, recorder):
    client = recorder.of(Client)().connect(server_of(Echo).local_address)
    assert client in Engine.instance().channels
    recorder.wait_for("on_connect")
    client.close()
    assert client not in Engine.instance().channels
    recorder.wait_for("on_close")
