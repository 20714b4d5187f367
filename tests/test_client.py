"""Clients: connecting by every form of address, by name, from where, within what time, and failing to."""

import contextlib
import errno
import gc
import logging
import os
import random
import socket
import time
import weakref

import gevent
import pytest
from certificates import client_context
from gevent import monkey
from gevent.event import Event
from needs import needs_ipv6
from waiting import nothing_is_kept, turns, until  # noqa: F401

from pants_green import (
    ChannelStateError,
    Client,
    CloseReason,
    Connection,
    Engine,
    InvalidAddressFormatError,
    Stream,
    StreamConnectError,
    _dialling,
    _sockets,
)

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
def nobody():
    """Return an address at which nobody listens, and nobody will during the test."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()


@pytest.fixture
def fill(listening_peer):
    """Return a function that makes an address that neither accepts nor refuses: the queue of its listener is full."""
    waiting = []

    def make(host="127.0.0.1", port=0):
        listener = listening_peer((host, port), backlog=0)
        for _ in range(3):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(listener.address)
            waiting.append(one)
        return listener.address

    yield make
    for one in waiting:
        one.close()


@pytest.fixture
def full(fill):
    """Return one such address."""
    return fill()


@pytest.fixture
def dialled(monkeypatch):
    """Return a list to which every socket that dials is added, with its host and the time."""
    made = []
    dial = _sockets.dial

    def noting(address, *args):
        sock, code = dial(address, *args)
        made.append((address.sockaddr[0], sock, time.monotonic()))
        return sock, code

    monkeypatch.setattr(_sockets, "dial", noting)
    return made


@pytest.fixture
def hurried(monkeypatch):
    """Have the next address dialled after 10 ms and not 250."""
    monkeypatch.setattr(_dialling, "CONNECTION_ATTEMPT_DELAY", 0.01)


def hosts(dialled):
    return [host for host, _, _ in dialled]


def still_open(dialled):
    return [host for host, sock, _ in dialled if sock.fileno() >= 0]


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
    def dial(address, *args):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr("pants_green._sockets.dial", dial)
    recorder.of(Client)().connect("192.0.2.1", 80)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect_error", "on_close"]
    assert recorder[0][1].errno == errno.ENETUNREACH


def test_path_that_no_socket_can_have(recorder):
    recorder.of(Client)().connect("/tmp/" + "x" * 120)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect_error", "on_close"]
    assert recorder[0][1].errno == errno.ENAMETOOLONG
    assert "path too long" in str(recorder[0][1])


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


def test_e1_11_every_address_is_tried_in_order_until_one_answers(server_of, recorder, names, dialled, monkeypatch):
    monkeypatch.setattr(_dialling, "CONNECTION_ATTEMPT_DELAY", 60)  # after a failure nobody waits
    names["many.test"] = ["127.0.0.2", "127.0.0.3", "127.0.0.1", "127.0.0.4"]
    recorder.of(Asker)().connect("many.test", port_of(server_of(Echo)))
    recorder.wait_for("on_close")
    assert hosts(dialled) == ["127.0.0.2", "127.0.0.3", "127.0.0.1"]
    assert recorder.names() == ["on_connect", "on_read", "on_close"]


def test_when_no_address_answers_it_is_one_error(recorder, names, nobody):
    names["many.test"] = ["127.0.0.2", "127.0.0.3", "127.0.0.1"]
    recorder.of(Client)().connect("many.test", nobody[1])
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect_error", "on_close"]
    assert recorder[0][1].errno == errno.ECONNREFUSED
    assert "many.test" in str(recorder[0][1])
    assert str(recorder[0][1]).count("refused") == 1


V4, V6 = ["127.0.0.2", "127.0.0.3", "127.0.0.4"], ["::2", "::3"]

ORDERS = [
    (V4 + V6, ["127.0.0.2", "::2", "127.0.0.3", "::3", "127.0.0.4"]),
    (V6 + V4, ["::2", "127.0.0.2", "::3", "127.0.0.3", "127.0.0.4"]),
    (["::2", "::3", "127.0.0.2", "::4"], ["::2", "127.0.0.2", "::3", "::4"]),
    (V4, V4),
]


@pytest.mark.parametrize(("resolved", "order"), ORDERS, ids=["IPv4 first", "IPv6 first", "mixed", "one family"])
def test_race_families_take_turns_the_first_one_first(recorder, names, monkeypatch, resolved, order):
    tried = []

    def dial(address, *args):
        tried.append(address.sockaddr[0])
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(_sockets, "dial", dial)
    names["many.test"] = resolved
    recorder.of(Client)().connect("many.test", 80)
    recorder.wait_for("on_close")
    assert tried == order


def test_race_next_address_begins_a_quarter_of_a_second_later(server_of, fill, recorder, names, dialled):
    server = server_of(Echo, ("127.0.0.1", 0))
    fill("127.0.0.2", port_of(server))
    names["many.test"] = ["127.0.0.2", "127.0.0.1"]
    client = recorder.of(Asker)().connect("many.test", port_of(server))
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_close"]
    assert client.remote_address == server.local_address
    (_, _, first), (_, _, second) = dialled
    assert 0.24 < second - first < 1


def test_race_winner_takes_all_and_the_others_are_closed(server_of, fill, recorder, names, dialled, hurried):
    server = server_of(Echo)
    for host in ("127.0.0.2", "127.0.0.3"):
        fill(host, port_of(server))
    names["many.test"] = ["127.0.0.2", "127.0.0.3", "127.0.0.1", "127.0.0.4"]
    timers = len(Engine.instance()._scheduler)
    client = recorder.of(Client, connect_timeout=None)().connect("many.test", port_of(server))
    recorder.wait_for("on_connect")
    assert hosts(dialled) == ["127.0.0.2", "127.0.0.3", "127.0.0.1"]
    assert still_open(dialled) == ["127.0.0.1"]
    assert client.socket is dialled[2][1]
    assert client.remote_address == server.local_address
    assert client.local_address == client.socket.getsockname()
    assert len(Engine.instance()._scheduler) == timers
    client.close()
    recorder.wait_for("on_close")


def test_race_failure_of_one_begins_the_next_at_once(server_of, fill, recorder, names, dialled, monkeypatch):
    server = server_of(Echo)
    fill("127.0.0.2", port_of(server))
    names["many.test"] = ["127.0.0.2", "127.0.0.3", "127.0.0.1"]
    delays = iter([0.01, 60])
    in_hub_after = Engine._in_hub_after
    monkeypatch.setattr(Engine, "_in_hub_after", lambda self, _, *args: in_hub_after(self, next(delays), *args))
    recorder.of(Asker, connect_timeout=None)().connect("many.test", port_of(server))
    recorder.wait_for("on_close")
    assert hosts(dialled) == ["127.0.0.2", "127.0.0.3", "127.0.0.1"]
    assert recorder.names() == ["on_connect", "on_read", "on_close"]


def test_race_is_not_held_for_a_single_address(server_of, recorder, names, monkeypatch):
    monkeypatch.setattr(_dialling, "Race", None)
    names["one.test"] = ["127.0.0.1"]
    server = server_of(Echo)
    for host in ("127.0.0.1", "one.test"):
        recorder.of(Asker)().connect(host, port_of(server))
    recorder.wait_for(6)
    assert sorted(recorder.names()) == ["on_close"] * 2 + ["on_connect"] * 2 + ["on_read"] * 2


def test_race_different_reasons_are_all_told_and_the_most_telling_is_the_errno(recorder, names, nobody, monkeypatch):
    dial = _sockets.dial

    def some(address, *args):
        if address.sockaddr[0] == "::1":
            raise OSError(errno.ENETUNREACH, "Network is unreachable")
        return dial(address, *args)

    monkeypatch.setattr(_sockets, "dial", some)
    names["many.test"] = ["::1", "127.0.0.1", "127.0.0.2"]
    recorder.of(Client)().connect("many.test", nobody[1])
    recorder.wait_for("on_close")
    error, port = recorder[0][1], nobody[1]
    assert recorder.names() == ["on_connect_error", "on_close"]
    assert error.errno == error.__cause__.errno == errno.ECONNREFUSED
    reasons = f"Network is unreachable ([::1]:{port}), Connection refused (127.0.0.1:{port}, 127.0.0.2:{port})"
    assert error.strerror == f"cannot connect to many.test:{port}: {reasons}"


def test_race_of_equally_telling_reasons_the_first_is_the_errno(recorder, names, monkeypatch):
    codes = {"127.0.0.1": errno.EHOSTUNREACH, "127.0.0.2": errno.ECONNREFUSED}

    def dial(address, *args):
        code = codes[address.sockaddr[0]]
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(_sockets, "dial", dial)
    names["many.test"] = list(codes)
    recorder.of(Client)().connect("many.test", 80)
    recorder.wait_for("on_close")
    assert recorder[0][1].errno == errno.EHOSTUNREACH


@pytest.mark.parametrize("call", ENDERS)
def test_race_closed_meanwhile_every_descriptor_is_closed_at_once(fill, recorder, names, dialled, hurried, call):
    _, port = fill("127.0.0.1")
    fill("127.0.0.2", port)
    names["many.test"] = ["127.0.0.1", "127.0.0.2"]
    client = recorder.of(Client)().connect("many.test", port)
    until(lambda: len(dialled) == 2)
    assert still_open(dialled) == ["127.0.0.1", "127.0.0.2"]
    getattr(client, call)()
    assert still_open(dialled) == []
    recorder.wait_for("on_close")
    turns()
    assert recorder.names() == ["on_close"]
    assert client.close_reason is ENDERS[call]


@pytest.fixture
def dialling(fill, recorder, names, dialled, hurried):
    """Return a function that makes a recorded client which waits for so many addresses, none of which answers."""

    def make(count):
        _, port = fill("127.0.0.1")
        names["some.test"] = [f"127.0.0.{number}" for number in range(1, count + 1)]
        for host in names["some.test"][1:]:
            fill(host, port)
        client = recorder.of(Client)().connect("some.test", port)
        until(lambda: len(dialled) == count)
        return client

    return make


@pytest.mark.parametrize("several", [True, False])
def test_exception_thrown_into_the_wait_leaves_nothing(dialling, recorder, dialled, several):
    client = dialling(1 + several)
    gevent.get_hub().loop.run_callback(client._greenlet.throw, gevent.Timeout(1))
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_error", "on_close"]
    assert isinstance(recorder[0][1], gevent.Timeout)
    assert still_open(dialled) == []
    assert len(Engine.instance()._scheduler) == 0


def test_race_leaves_nothing_for_the_garbage_collector(server_of, fill, recorder, names, hurried):
    server = server_of(Echo)
    fill("127.0.0.2", port_of(server))
    names["many.test"] = ["127.0.0.2", "127.0.0.3", "127.0.0.1"]
    names["none.test"] = ["127.0.0.3", "127.0.0.4"]

    class Quiet(Asker):
        def on_connect_error(self, exception):
            pass  # a log record would keep it alive

    gc.disable()
    try:
        for name in ("many.test", "none.test"):
            client = Quiet().connect(name, port_of(server))
            alive = weakref.ref(client)
            del client
            until(lambda alive=alive: alive() is None or alive().closed)
            turns()
            assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("several", [True, False])
def test_wakeup_while_dialling_is_taken_for_no_connection(dialling, recorder, several):
    client = dialling(1 + several)
    client.pause()
    turns()
    assert client.connecting
    client.close()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_close"]


def test_e1_2_many_refused_at_once_are_told_each_and_leave_nothing(nobody):
    class Counting(Client):
        def __init__(self):
            super().__init__()
            self.told = []

        def on_connect_error(self, exception):
            self.told.append(exception.errno)

        def on_close(self):
            self.told.append("on_close")

    clients = [Counting().connect(nobody) for _ in range(900)]
    until(lambda: all(len(client.told) == 2 for client in clients))
    assert all(client.told == [errno.ECONNREFUSED, "on_close"] for client in clients)
    assert Engine.instance().channels == []
    assert len(Engine.instance()._scheduler) == 0
    # Descriptors and greenlets are the leak check's business.


# ---- connect_timeout


SHORT = 0.05

sleep_in_thread = monkey.get_original("time", "sleep")


def test_e1_12_connect_timeout_ends_a_dial_that_nobody_answers(full, recorder, dialled, caplog):
    client = recorder.of(Client, connect_timeout=SHORT)()
    began = time.monotonic()
    client.connect(full)
    recorder.wait_for("on_close")
    assert SHORT * 0.9 < time.monotonic() - began < SHORT + 1
    assert recorder.names() == ["on_connect_error", "on_close"]
    error = recorder[0][1]
    assert isinstance(error, StreamConnectError)
    assert error.errno == errno.ETIMEDOUT
    assert error.strerror == f"cannot connect to 127.0.0.1:{full[1]} within connect_timeout, 0.05 seconds"
    assert client.close_reason is CloseReason.CONNECT_FAILED
    assert client.close_error is error
    assert still_open(dialled) == []
    assert [(record.levelno, record.channel) for record in caplog.records] == [(logging.WARNING, client)]


def test_e1_12_connect_timeout_counts_over_all_attempts_and_tells_of_them(fill, recorder, names, dialled, hurried):
    _, port = fill("127.0.0.1")
    fill("127.0.0.2", port)
    names["many.test"] = ["127.0.0.1", "127.0.0.3", "127.0.0.2"]
    recorder.of(Client, connect_timeout=SHORT)().connect("many.test", port)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect_error", "on_close"]
    assert recorder[0][1].errno == errno.ETIMEDOUT
    assert recorder[0][1].strerror.endswith("connect_timeout, 0.05 seconds; before that: Connection refused")
    assert hosts(dialled) == ["127.0.0.1", "127.0.0.3", "127.0.0.2"]
    assert still_open(dialled) == []


def test_e1_12_connect_timeout_ends_a_lookup_that_hangs(recorder, names):
    known = Event()

    def slow():
        known.wait()
        return ["127.0.0.1"]

    names["slow.test"] = slow
    client = recorder.of(Client, connect_timeout=SHORT)().connect("slow.test", 80)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect_error", "on_close"]
    assert recorder[0][1].errno == errno.ETIMEDOUT
    assert "slow.test:80 within connect_timeout" in str(recorder[0][1])
    known.set()
    turns()
    assert len(recorder) == 2
    assert client.closed


def test_e1_12_connect_timeout_is_over_once_the_connection_stands(listening_peer, recorder):
    listener = listening_peer()
    plain = recorder.of(Client, connect_timeout=SHORT)().connect(listener.address)
    secure = recorder.of(Client, connect_timeout=SHORT)(ssl_options=client_context()).connect(listener.address)
    one, other = listener.accept(), listener.accept()
    recorder.wait_for("on_connect")
    gevent.sleep(SHORT * 2)  # time must pass here
    assert plain.connected
    assert secure.socket is not None  # its handshake has a limit of its own
    assert len(recorder) == 1
    for stream in (plain, secure):
        stream.abort()
    recorder.wait_for(3)
    one.close()
    other.close()


def test_e1_12_connect_timeout_is_30_seconds_or_none_and_may_be_changed_meanwhile(full, recorder):
    assert Client.connect_timeout == 30.0
    client = recorder.of(Client)()
    client.connect_timeout = None
    client.connect(full)
    turns()
    assert client._limits is None
    client.connect_timeout = 60
    client.connect_timeout = SHORT
    recorder.wait_for("on_close")
    assert "connect_timeout, 0.05 seconds" in str(recorder[0][1])
    other = Client().connect(full)
    other.connect_timeout = None
    assert not other._limits.runs("connect")
    other.close()


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (float("nan"), ValueError), ("1", TypeError)], ids=repr)
def test_e1_12_connect_timeout_that_makes_no_sense_is_refused_where_it_is_set(value, error):
    client = Client()
    with pytest.raises(error, match=r"Client\.connect_timeout is a .*number of seconds"):
        client.connect_timeout = value
    assert client.connect_timeout == 30.0
    with pytest.raises(error, match=r"Hasty\.connect_timeout"):
        type("Hasty", (Client,), {"connect_timeout": value})


# ---- From where


def test_source_address_is_where_the_server_sees_the_client(listening_peer, recorder):
    listener = listening_peer()
    client = recorder.of(Client)().connect(listener.address, source_address=("127.0.0.5", 0))
    one = listener.accept()
    recorder.wait_for("on_connect")
    assert one.socket.getpeername() == client.local_address
    assert client.local_address[0] == "127.0.0.5"
    if hasattr(socket, "IP_BIND_ADDRESS_NO_PORT"):
        assert client.socket.getsockopt(socket.IPPROTO_IP, socket.IP_BIND_ADDRESS_NO_PORT) == 1
    client.close()
    recorder.wait_for("on_close")


def spare_port():
    """Return a port that nobody uses, of those that the kernel gives to nobody."""
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as bound, contextlib.suppress(OSError):
            bound.bind(("", port))
            return port


@pytest.mark.parametrize("host", ["127.0.0.1", "", "127.0.0.5"])
def test_source_address_with_a_port_that_may_dial_several_servers(listening_peer, recorder, host):
    port = spare_port()
    listeners = [listening_peer(), listening_peer()]
    clients = [recorder.of(Client)().connect(one.address, source_address=(host, port)) for one in listeners]
    recorder.wait_for(2)
    assert recorder.names() == ["on_connect"] * 2
    for client in clients:
        assert client.local_address == (host or "127.0.0.1", port)
        client.abort()
    recorder.wait_for(4)


def test_source_address_that_says_nothing_is_none(server_of, recorder):
    recorder.of(Asker)().connect(server_of(Echo).local_address, source_address=("", 0))
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_close"]


@needs_ipv6
def test_source_address_in_ipv6(server_of, recorder):
    server = server_of(Echo, ("::1", 0))
    client = recorder.of(Asker)().connect("::1", port_of(server), source_address=("::1", 0))
    other = recorder.of(Asker)().connect("::1", port_of(server), source_address=("", 0))
    recorder.wait_for(6)
    assert client.local_address[0] == other.local_address[0] == "::1"
    assert sorted(recorder.names()) == ["on_close"] * 2 + ["on_connect"] * 2 + ["on_read"] * 2


def test_source_address_leaves_the_addresses_of_the_other_family_out(server_of, recorder, names, dialled):
    names["both.test"] = ["::1", "127.0.0.2", "127.0.0.1"]
    recorder.of(Asker)().connect("both.test", port_of(server_of(Echo)), source_address=("127.0.0.1", 0))
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_close"]
    assert hosts(dialled) == ["127.0.0.2", "127.0.0.1"]


@pytest.mark.parametrize("host", ["both.test", "127.0.0.1"])
def test_source_address_with_no_address_of_its_family_left(recorder, names, host):
    names["both.test"] = ["127.0.0.1", "127.0.0.2"]
    recorder.of(Client)().connect(host, 80, source_address=("::1", 0))
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect_error", "on_close"]
    assert recorder[0][1].errno == errno.EAFNOSUPPORT
    assert str(recorder[0][1]).endswith(f"cannot connect to {host}:80: it has no IPv6 address, which source_address [::1]:0 asks for")


@pytest.mark.parametrize("port", [0, 4040])
def test_source_address_that_is_another_machines(recorder, nobody, port):
    recorder.of(Client)().connect(nobody, source_address=("192.0.2.1", port))
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect_error", "on_close"]
    assert recorder[0][1].errno == errno.EADDRNOTAVAIL
    assert f"source_address 192.0.2.1:{port}, which is no address of this machine" in str(recorder[0][1])


WRONG_SOURCES = [
    *("127.0.0.1", 4040, ["127.0.0.1", 0], ("127.0.0.1",), ("::1", 0, 0, 0), ("localhost", 0)),
    *(("127.0.0.1", "0"), ("127.0.0.1", 65536), ("127.0.0.1", True), (1, 0), ("fe80::1%nowhere", 0)),
]


@pytest.mark.parametrize("source", WRONG_SOURCES, ids=repr)
def test_source_address_that_is_none_raises_and_the_stream_is_as_before(server_of, recorder, source):
    server = server_of(Echo)
    client = recorder.of(Asker)()
    with pytest.raises(InvalidAddressFormatError):
        client.connect(server.local_address, source_address=source)
    assert (client.connecting, client.connected, client.closed) == (False, False, False)
    client.connect(server.local_address)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_close"]


def test_source_address_and_the_path_of_a_unix_socket_do_not_go_together(tmp_path):
    with pytest.raises(InvalidAddressFormatError, match="source_address is for TCP"):
        Client().connect(str(tmp_path / "socket"), source_address=("127.0.0.1", 0))


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


def test_e1_11_slow_resolver_holds_up_no_other_client(server_of, recorder, monkeypatch):
    def getaddrinfo(*args):
        gevent.get_hub().threadpool.apply(sleep_in_thread, (0.1,))
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", args[1]))]

    monkeypatch.setattr("gevent.socket.getaddrinfo", getaddrinfo)
    server = server_of(Echo)
    slow = recorder.of(Asker)().connect("slow.test", port_of(server))
    for number in range(1, 6):
        recorder.of(Asker)().connect(server.local_address)
        recorder.wait_for(lambda events, number=number: events.names().count("on_close") == number)
    assert slow.connecting
    recorder.wait_for(lambda events: events.names().count("on_close") == 6)


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
