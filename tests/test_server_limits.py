"""Limits of a server: how many connections, from where, how fast, for how long, and how much output all of them may owe."""

import contextlib
import errno
import logging
import random
import socket as stdlib_socket
import time

import gevent
import gevent.socket
import pytest
from certificates import server_context
from forks import in_child
from gevent.event import Event
from needs import needs_ipv6
from peers import PlainSocket, in_thread
from tls_peers import TLSPeer, tls_peer  # noqa: F401
from waiting import nothing_is_kept, settle, turns, unsent, until  # noqa: F401

from pants_green import CloseReason, Connection, Engine, Server, Stream, StreamBufferOverflow, StreamServer, _sockets, _stream_limits

KIB = 1024
MIB = 1024 * KIB
ROOM = 32 * KIB
LOCAL = ("127.0.0.1", 0)
TLS_OPTIONS = {"context": server_context()}


class Echo(Connection):
    def on_read(self, data):
        self.write(data)


class Slow(Connection):
    """With little room in the kernel."""

    def on_connect(self):
        self.socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_SNDBUF, ROOM)


@pytest.fixture
def server_with(open_server):
    """Return a function that makes a listening server with these attributes: ``server_with(ConnectionClass, address, **limits)``."""

    def make(stream_class=Echo, address=LOCAL, *, server_class=Server, ssl_options=None, **limits):
        server = server_class(stream_class, ssl_options=ssl_options)
        for name, value in limits.items():
            setattr(server, name, value)
        return open_server(server).listen(address)

    return make


def answers(one, data=b"hello"):
    """Tell whether this peer is echoed."""
    one.send(data)
    return one.recv_exactly(len(data)) == data


def waits(one):
    """Tell whether a peer is not served, though it speaks and the hub runs."""
    with contextlib.suppress(OSError):
        one.socket.sendall(b"anybody there?")
    turns(5)
    one.socket.setblocking(False)
    try:
        one.socket.recv(1)
    except BlockingIOError:
        return True
    finally:
        one.socket.settimeout(10)
    return False


def is_closed(one):
    """Tell whether a peer's connection has been closed."""
    try:
        return one.recv(1) == b""
    except OSError:
        return True


def records_of(caplog, event="limit"):
    """Return the records of limits that were hit."""
    return [record for record in caplog.records if getattr(record, "event", None) == event]


def messages_of(caplog, event="limit"):
    return [record.getMessage() for record in records_of(caplog, event)]


# ---- How they are set

SETTINGS = {
    "max_connections": (5, [0, -1], ["5", 5.0, True]),
    "max_connections_per_ip": (5, [0, -1], ["5", 5.0, True]),
    "accept_rate": (2.5, [0, -1, float("nan"), float("inf")], ["fast", True]),
    "max_connection_age": (60, [0, -1, float("nan"), float("inf")], ["60", True]),
    "write_budget": (MIB, [0, -1], ["1M", 1.5, True]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_limit_has_a_value_on_the_class_a_subclass_and_an_instance(name):
    value, wrong_values, wrong_types = SETTINGS[name]
    base = type("Base", (Server,), {name: value})
    off = type("Off", (base,), {name: None})
    assert getattr(Server, name) is None
    assert getattr(base, name) == getattr(base(), name) == value
    assert getattr(off(), name) is None
    one = base()
    setattr(one, name, value + 1)
    assert getattr(one, name) == value + 1
    assert getattr(base(), name) == value
    setattr(one, name, None)
    assert getattr(one, name) is None
    for kind, wrong in [*((ValueError, one) for one in wrong_values), *((TypeError, one) for one in wrong_types)]:
        with pytest.raises(kind, match=rf"^Sub\.{name} is .* None for no limit"):
            type("Sub", (Server,), {name: wrong})
        with pytest.raises(kind, match=rf"^Base\.{name} is .* None for no limit"):
            setattr(one, name, wrong)
    assert getattr(one, name) is None


@pytest.mark.parametrize("name", ["allow", "deny"])
def test_networks_have_a_value_on_the_class_and_an_instance(name):
    base = type("Base", (Server,), {name: ["10.0.0.0/8", "unix"]})
    assert getattr(Server, name) is getattr(Server(), name) is None
    assert list(getattr(base(), name)) == ["10.0.0.0/8", "unix"]
    one = base()
    setattr(one, name, [*getattr(one, name), "::1"])
    assert list(getattr(one, name)) == ["10.0.0.0/8", "::1/128", "unix"]
    setattr(one, name, None)
    assert getattr(one, name) is None
    with pytest.raises(TypeError, match=rf"^Base\.{name} is a list of networks"):
        setattr(one, name, "10.0.0.0/8")
    with pytest.raises(ValueError, match=rf"^Sub\.{name}: 'nowhere'"):
        type("Sub", (Server,), {name: ["nowhere"]})


# ---- max_connections


@pytest.mark.parametrize("ssl_options", [None, TLS_OPTIONS], ids=["tcp", "tls"])
def test_max_connections_surplus_waits_in_the_backlog_and_is_served_when_others_end(server_with, peer, tls_peer, caplog, ssl_options):  # noqa: F811
    server = server_with(ssl_options=ssl_options, max_connections=2)
    make = tls_peer if ssl_options else peer
    first, second = make(server), make(server)
    assert answers(first)
    assert answers(second)
    turns()
    assert records_of(caplog) == []  # nobody waits yet
    third, fourth = peer(server), peer(server)
    assert waits(third) if not ssl_options else True
    until(lambda: records_of(caplog))
    assert len(server.channels) == 2
    first.close()
    if ssl_options:
        third = TLSPeer.over(third)
    else:
        third.recv_exactly(14)
    assert answers(third)
    second.close()
    assert answers(TLSPeer.over(fourth) if ssl_options else fourth)
    (record,) = records_of(caplog)
    assert record.levelno == logging.WARNING
    assert record.channel is server
    assert "max_connections, 2: further connections wait" in record.getMessage()


def test_max_connections_of_a_class_holds(server_with, peer):
    class One(Server):
        max_connections = 1

    server = server_with(server_class=One)
    one = peer(server)
    assert answers(one)
    other = peer(server)
    assert waits(other)
    One.max_connections = 2
    one.close()
    assert other.recv_exactly(14)
    assert answers(peer(server))


@pytest.mark.parametrize("raised", [2, None])
def test_max_connections_raised_at_run_time_resumes_at_once(server_with, peer, raised):
    server = server_with(max_connections=1)
    assert answers(peer(server))
    second = peer(server)
    assert waits(second)
    server.max_connections = raised
    assert second.recv_exactly(14) == b"anybody there?"


def test_max_connections_lowered_at_run_time_closes_nobody(server_with, peer):
    server = server_with()
    first, second = peer(server), peer(server)
    assert answers(first)
    assert answers(second)
    server.max_connections = 1
    third = peer(server)
    assert waits(third)
    first.close()
    assert waits(third)
    assert answers(second)
    second.close()
    assert third.recv_exactly(14)


@pytest.mark.parametrize("what", ["handshaking", "proxied", "draining", "on_accept", "constructor"])
def test_max_connections_counts_connections_that_are_not_in_channels(server_with, peer, what):
    gate = Event()

    class Waiting(Server):
        def on_accept(self, sock, addr):
            if what == "on_accept" and not gate.is_set():
                gate.wait()
            super().on_accept(sock, addr)

    class Made(Slow):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            if what == "constructor" and not gate.is_set():
                gate.wait()

        def on_connect(self):
            super().on_connect()
            if what == "draining" and not gate.is_set():
                gate.set()
                self.write(bytes(4 * MIB))
                self.end()
            else:
                self.write(b"welcome")

    limits = {"max_connections": 1, "proxy_protocol": "v1" if what == "proxied" else None}
    ssl_options = TLS_OPTIONS if what == "handshaking" else None
    server = server_with(Made, server_class=Waiting, ssl_options=ssl_options, **limits)
    first = peer(server, rcvbuf=ROOM)
    until(lambda: server._active == 1)
    second = peer(server)
    assert waits(second)
    assert server._active == 1
    gate.set()
    first.close()
    if what == "handshaking":
        until(lambda: server._active == 1)
        assert is_closed(second)  # which has not spoken TLS
    elif what == "proxied":
        assert is_closed(second)  # nor sent a header
    else:
        assert second.recv_exactly(7) == b"welcome"


def test_max_connections_resumes_after_whatever_ends_a_connection(server_with, peer, caplog):
    class Picky(Server):
        def on_accept(self, sock, addr):
            if len(seen) % 3 == 0:
                seen.append("raises")
                raise RuntimeError("not this one")
            if len(seen) % 3 == 1:
                seen.append("keeps nothing")
                sock.close()
            else:
                seen.append("takes")
                super().on_accept(sock, addr)

    seen = []
    server = server_with(server_class=Picky, max_connections=1)
    for _ in range(3):
        assert is_closed(peer(server))
        assert is_closed(peer(server))
        one = peer(server)
        assert answers(one)
        one.reset()
    assert len(seen) == 9


def test_max_connections_resumes_after_failed_handshakes(server_with, peer, tls_peer, caplog):  # noqa: F811
    server = server_with(ssl_options=TLS_OPTIONS, max_connections=1, handshake_timeout=0.05)
    silent, rude = peer(server), peer(server)
    rude.send(b"GET / HTTP/1.0\r\n\r\n")
    assert is_closed(silent)
    rude.recv_all()
    assert answers(tls_peer(server))


@needs_ipv6
def test_max_connections_is_for_all_listeners_together(server_with, peer):
    server = server_with(address=0, max_connections=1)
    port = server.local_address[1]
    first, second = peer(("127.0.0.1", port)), peer(("::1", port))
    assert answers(first)
    assert waits(second)
    first.close()
    assert second.recv_exactly(14)
    third = peer(("127.0.0.1", port))
    assert waits(third)
    second.close()
    assert third.recv_exactly(14)


def test_max_connections_and_descriptors_that_run_out(server_with, peer, monkeypatch):
    codes = [errno.EMFILE] * 2
    accept = _sockets.Listener.accept

    def failing(listener):
        if codes:
            raise OSError(codes.pop(), "made up")
        return accept(listener)

    server = server_with(max_connections=1)
    monkeypatch.setattr(_sockets.Listener, "accept", failing)
    first = peer(server)
    assert answers(first)
    second = peer(server)
    assert waits(second)
    codes.append(errno.EMFILE)
    first.close()
    until(lambda: not codes)
    server.max_connections = 5
    assert second.recv_exactly(14)
    assert answers(peer(server))


def test_max_connections_and_suspend_do_not_get_into_each_others_way(server_with, peer):
    server = server_with(max_connections=1)
    first = peer(server)
    assert answers(first)
    second = peer(server)
    assert waits(second)
    server.suspend()
    first.close()
    turns()
    assert waits(second)
    assert not server.channels
    server.resume()
    assert second.recv_exactly(28)
    third = peer(server)
    assert waits(third)
    server.suspend()
    server.resume()
    assert waits(third)
    second.close()
    assert third.recv_exactly(28)


def test_max_connections_server_closed_while_others_wait(server_with, peer, recorder):
    timers = len(Engine.instance()._scheduler)
    server = server_with(max_connections=1)
    first = peer(server)
    assert answers(first)
    second = peer(server)
    assert waits(second)
    server.close()
    assert first.recv_all() == b""
    assert is_closed(second)
    first.close()
    until(lambda: not server._active)
    until(lambda: not Engine.instance()._lingering)
    assert len(Engine.instance()._scheduler) == timers


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_child_of_a_server_that_is_full_accepts(server_with, peer):
    answered = []

    class Noting(Connection):
        def on_read(self, data):
            self.write(data, flush=True)
            answered.append(self.remote_address[1])

    server = server_with(Noting, max_connections=1, max_connections_per_ip=1)
    first = peer(server)
    assert answers(first)
    second = peer(server)
    assert waits(second)

    def child():
        until(lambda: len(answered) == 2)
        return f"{answered[1]}"

    assert in_child(child) == str(second.address[1])
    assert second.recv_exactly(14)
    assert answers(first)


# ---- max_connections_per_ip


def test_max_connections_per_ip_one_more_is_closed_and_told(server_with, peer, caplog):
    server = server_with(max_connections_per_ip=2)
    first, second = peer(server), peer(server)
    assert answers(first)
    assert answers(second)
    third = peer(server)
    assert is_closed(third)
    assert answers(first)
    (record,) = records_of(caplog)
    assert record.levelno == logging.WARNING
    assert "max_connections_per_ip, 2: one more connection of 127.0.0.1:" in record.getMessage()
    first.close()
    until(lambda: len(server.channels) == 1)
    turns(2)
    assert answers(peer(server))


ENDINGS = ["close", "end", "abort", "peer's FIN", "peer's reset", "raises", "on_accept raises", "constructor raises", "on_accept closes"]


@pytest.mark.parametrize("how", [*ENDINGS, "handshake fails", "header fails"])
def test_max_connections_per_ip_goes_down_however_a_connection_ends(server_with, peer, caplog, how):
    class Picky(Server):
        def on_accept(self, sock, addr):
            if how == "on_accept raises":
                raise RuntimeError(how)
            if how == "on_accept closes":
                sock.close()
            else:
                super().on_accept(sock, addr)

    class Ending(Connection):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            if how == "constructor raises":
                raise RuntimeError(how)

        def on_connect(self):
            if how in ("close", "end", "abort"):
                getattr(self, how)()
            elif how == "raises":
                raise RuntimeError(how)

    server = server_with(
        Ending,
        server_class=Picky,
        ssl_options=TLS_OPTIONS if how == "handshake fails" else None,
        proxy_protocol="v1" if how == "header fails" else None,
        max_connections_per_ip=1,
    )
    for _ in range(3):
        try:
            one = peer(server)
        except ConnectionResetError:
            assert how == "abort"
            continue
        if how == "peer's FIN":
            one.shutdown_output()
        elif how == "peer's reset":
            until(lambda: server.channels)
            one.reset()
        elif how.endswith("fails"):
            one.send(b"nonsense, and no line end for a long time" * 5)
        if how != "peer's reset":
            with contextlib.suppress(OSError):
                one.recv_all()
        until(lambda: not server._active)
        one.close()
    assert not server._by_client
    assert server._at_work == {}
    assert not any("max_connections_per_ip" in message for message in messages_of(caplog))


def test_max_connections_per_ip_set_at_run_time_counts_those_that_are_there(server_with, peer):
    server = server_with()
    first, second = peer(server), peer(server)
    assert answers(first)
    assert answers(second)
    server.max_connections_per_ip = 2
    assert is_closed(peer(server))
    server.max_connections_per_ip = None
    assert answers(peer(server))
    server.max_connections_per_ip = 3
    assert is_closed(peer(server))
    first.close()
    until(lambda: len(server.channels) == 2)
    turns(2)
    assert answers(peer(server))


def test_max_connections_per_ip_counts_each_address_by_itself(server_with, peer):
    server = server_with(address=("0.0.0.0", 0), max_connections_per_ip=1)
    port = server.local_address[1]

    def from_host(host):
        sock = PlainSocket()
        sock.settimeout(5)
        sock.bind((host, 0))
        sock.connect(("127.0.0.1", port))
        return sock

    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(in_thread(from_host, host)) for host in ("127.0.0.1", "127.0.0.2", "127.0.0.1", "127.0.0.3")]
        until(lambda: len(server.channels) == 3)
        assert {one.remote_address[0] for one in server.channels.values()} == {"127.0.0.1", "127.0.0.2", "127.0.0.3"}
        assert in_thread(socks[2].recv, 1) == b""


@needs_ipv6
def test_max_connections_per_ip_of_ipv6_and_of_ipv4_in_its_clothes(open_server, peer):
    sock = gevent.socket.socket(stdlib_socket.AF_INET6)
    sock.setsockopt(stdlib_socket.IPPROTO_IPV6, stdlib_socket.IPV6_V6ONLY, 0)
    sock.bind(("::", 0))
    server = Server(Echo, socket=sock)
    server.max_connections_per_ip = 1
    server.deny = ["127.0.0.8/29"]
    open_server(server).listen()
    port = server.local_address[1]
    first, other = peer(("127.0.0.1", port)), peer(("::1", port))
    assert answers(first)
    assert answers(other)
    assert is_closed(peer(("127.0.0.1", port)))
    assert is_closed(peer(("::1", port)))
    first.close()
    until(lambda: len(server.channels) == 1)
    turns(2)
    assert answers(peer(("127.0.0.1", port)))


def test_max_connections_per_ip_of_unix_sockets_counts_all_of_them(server_with, peer, tmp_path):
    server = server_with(address=str(tmp_path / "socket"), max_connections_per_ip=2)
    first, second = peer(server), peer(server)
    assert answers(first)
    assert answers(second)
    assert is_closed(peer(server))


# ---- allow and deny


@pytest.mark.parametrize(
    ("limits", "served"),
    [
        ({"allow": ["127.0.0.0/8"]}, True),
        ({"allow": ["10.0.0.0/8", "127.0.0.1"]}, True),
        ({"allow": ["10.0.0.0/8"]}, False),
        ({"allow": []}, False),
        ({"allow": ["::/0", "unix"]}, False),
        ({"deny": ["127.0.0.0/8"]}, False),
        ({"deny": ["10.0.0.0/8", "unix"]}, True),
        ({"deny": []}, True),
        ({"allow": ["127.0.0.0/8"], "deny": ["127.0.0.1"]}, False),
    ],
    ids=str,
)
def test_networks_say_who_is_served(server_with, peer, recorder, caplog, limits, served):
    class Noting(Server):
        def on_accept(self, sock, addr):
            recorder("on_accept")
            super().on_accept(sock, addr)

    server = server_with(server_class=Noting, **limits)
    one = peer(server)
    if served:
        assert answers(one)
        assert records_of(caplog) == []
    else:
        assert is_closed(one)
        assert recorder == []
        (record,) = records_of(caplog)
        name = "deny" if "deny" in limits else "allow"
        networks = list(getattr(server, name))
        assert record.getMessage().endswith(f"{name}, {networks}: the connection of 127.0.0.1:{one.address[1]} was closed")
        assert record.levelno == logging.WARNING


def test_networks_are_asked_before_the_handshake(server_with, peer, tls_peer):  # noqa: F811
    server = server_with(ssl_options=TLS_OPTIONS, deny=["127.0.0.0/8"])
    assert peer(server).at_eof()
    server.deny = None
    assert answers(tls_peer(server))


@pytest.mark.parametrize(("deny", "served"), [(["unix"], False), (["0.0.0.0/0", "::/0"], True)])
def test_networks_unix_is_one_of_them(server_with, peer, tmp_path, deny, served):
    one = peer(server_with(address=str(tmp_path / "socket"), deny=deny))
    assert answers(one) if served else is_closed(one)


def test_networks_changed_at_run_time_hold_for_the_next_connection(server_with, peer):
    server = server_with()
    first = peer(server)
    assert answers(first)
    server.deny = ["127.0.0.1"]
    assert is_closed(peer(server))
    assert answers(first)
    server.deny = None
    assert answers(peer(server))


def test_networks_and_counts_changed_on_the_class_hold_for_the_next_connection(server_with, peer):
    kind = type("Picky", (Server,), {})
    server = server_with(server_class=kind)
    first = peer(server)
    assert answers(first)
    kind.deny = ["127.0.0.1"]
    assert is_closed(peer(server))
    del kind.deny
    kind.max_connections_per_ip = 1
    assert is_closed(peer(server))
    kind.max_connections_per_ip = None
    second = peer(server)
    assert answers(second)
    kind.max_connections_per_ip = 2
    assert is_closed(peer(server))
    first.close()
    second.close()
    until(lambda: not server._active)
    assert answers(peer(server))


def test_networks_and_counts_hold_for_a_stream_server_too(open_server, peer):
    class Keeping(StreamServer):
        max_connections = 2
        max_connections_per_ip = 1

        def on_accept(self, sock, addr):
            Echo(socket=sock)

    server = open_server(Keeping()).listen(LOCAL)
    first = peer(server)
    assert answers(first)
    assert is_closed(peer(server))
    first.close()
    until(lambda: not server._active)
    assert answers(peer(server))


# ---- accept_rate


def test_accept_rate_as_many_at_once_as_in_a_second_and_then_the_rate(server_with, peer, recorder, caplog):
    times = []
    server = server_with(type("Noting", (Echo,), {"on_connect": lambda self: times.append(time.monotonic())}), accept_rate=30)
    server.suspend()
    peers = [peer(server) for _ in range(33)]
    began = time.monotonic()
    server.resume()
    assert all(answers(one) for one in peers)
    assert len(times) == 33
    assert times[29] - began < 0.5
    assert all((number - 29) / 30 - 0.01 < times[number] - began < (number - 29) / 30 + 1 for number in (30, 31, 32))
    (record,) = records_of(caplog)
    assert "accept_rate, 30: further connections wait" in record.getMessage()


@pytest.mark.parametrize("how", ["off", "faster", "close", "suspend"])
def test_accept_rate_changed_while_connections_wait(server_with, peer, how):
    timers = len(Engine.instance()._scheduler)
    server = server_with(accept_rate=1)
    first = peer(server)
    assert answers(first)
    second = peer(server)
    assert waits(second)
    if how == "off":
        server.accept_rate = None
    elif how == "faster":
        server.accept_rate = 1000
    elif how == "suspend":
        server.suspend()
        server.accept_rate = None
        assert waits(second)
        server.resume()
        second.recv_exactly(14)
    else:
        server.close()
        assert is_closed(second)
        assert first.at_eof()
        first.close()
        until(lambda: not Engine.instance()._lingering)
        assert len(Engine.instance()._scheduler) == timers
        return
    assert second.recv_exactly(14)


# ---- write_budget


def slow_ones(server, peer, *sizes):
    """Return the streams of peers that read nothing, each with so many bytes that wait to be sent."""
    streams = []
    for size in sizes:
        one = peer(server, rcvbuf=ROOM)
        until(lambda: any(found.remote_address == one.address for found in server.channels.values()))  # noqa: B023
        (found,) = (found for found in server.channels.values() if found.remote_address == one.address)
        found.write(bytes(size))
        streams.append(found)
    return streams


@pytest.mark.parametrize("ssl_options", [None, TLS_OPTIONS], ids=["tcp", "tls"])
def test_write_budget_closes_the_slowest_first_and_the_others_live(server_with, peer, tls_peer, recorder, caplog, ssl_options):  # noqa: F811
    kind = recorder.of(Slow, "on_overflow_error", "on_close")
    server = server_with(kind, ssl_options=ssl_options, write_budget=5 * MIB)
    small, large, middle = slow_ones(server, tls_peer if ssl_options else peer, MIB, 4 * MIB, 2 * MIB)
    recorder.wait_for("on_close")
    turns()
    assert recorder.names() == ["on_overflow_error", "on_close"]
    assert (small.connected, large.closed, middle.connected) == (True, True, True)
    assert large.close_reason is CloseReason.OVERFLOW
    error = recorder[0][1]
    assert isinstance(error, StreamBufferOverflow)
    assert (error.limit, error.setting) == (5 * MIB, "write_budget")
    assert error.size > 5 * MIB
    (record,) = records_of(caplog, "overflow")
    assert record.channel is large
    assert record.peer == large.remote_address
    assert "write_budget is 5242880" in record.getMessage()


def test_write_budget_goes_on_until_it_is_no_longer_too_much(server_with, peer, recorder):
    server = server_with(recorder.of(Slow, "on_close"), write_budget=64 * MIB)
    streams = slow_ones(server, peer, *[2 * MIB] * 4)
    server.write_budget = 3 * MIB
    recorder.wait_for(3)
    turns()
    assert len(recorder) == 3
    assert sum(one.connected for one in streams) == 1


def test_write_budget_files_do_not_count(server_with, peer, recorder, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * MIB))
    server = server_with(recorder.of(Slow, "on_close"), write_budget=MIB)
    (stream,) = slow_ones(server, peer, 1)
    with path.open("rb") as file:
        stream.write_file(file)
    gevent.sleep(0.15)
    assert recorder == []
    assert unsent(stream) > MIB
    stream.write(bytes(2 * MIB))
    recorder.wait_for("on_close")


def test_write_budget_set_at_run_time_sees_those_that_are_slow_already(server_with, peer, recorder):
    server = server_with(recorder.of(Slow, "on_close"))
    small, large = slow_ones(server, peer, MIB, 2 * MIB)
    settle(large)
    assert recorder == []
    server.write_budget = 3 * MIB // 2
    recorder.wait_for("on_close")
    assert large.closed
    assert small.connected


def test_write_budget_set_on_the_class_holds_for_servers_that_listen(server_with, peer, recorder):
    kind = type("Bounded", (Server,), {})
    server = server_with(recorder.of(Slow, "on_close"), server_class=kind)
    kind.write_budget = MIB
    slow_ones(server, peer, 2 * MIB)
    recorder.wait_for("on_close")


def test_write_budget_none_switches_it_off(server_with, peer, recorder):
    server = server_with(recorder.of(Slow, "on_close"), write_budget=2 * MIB)
    (stream,) = slow_ones(server, peer, MIB)
    turns()
    server.write_budget = None
    stream.write(bytes(4 * MIB))
    gevent.sleep(0.15)
    assert recorder == []


def test_write_budget_readers_that_keep_up_are_nobodys_business(server_with, peer, recorder):
    server = server_with(recorder.of(Echo, "on_close"), write_budget=512 * KIB)
    one = peer(server)
    for _ in range(20):
        assert answers(one, bytes(256 * KIB))
    assert recorder == []


# ---- max_connection_age


def test_max_connection_age_asks_each_connection_to_end_give_or_take_a_tenth(server_with, peer, recorder, monkeypatch):
    def uniform(least, most):
        recorder("jitter", least, most)
        return least if len(recorder) % 2 else most

    monkeypatch.setattr(random, "uniform", uniform)
    asked = []

    def on_stopping(stream, deadline):
        asked.append((time.monotonic(), deadline, stream.stopping))
        Connection.on_stopping(stream, deadline)

    server = server_with(type("Noting", (Echo,), {"on_stopping": on_stopping}), max_connection_age=0.2)
    began = time.monotonic()
    peers = [peer(server) for _ in range(2)]
    assert all(answers(one) for one in peers)
    assert [one.recv_all() for one in peers] == [b"", b""]
    assert recorder == [("jitter", 0.9, 1.1)] * 2
    (first, deadline, stopping), (second, _, _) = asked
    assert 0.17 < deadline - _stream_limits.GRACE - began <= first - began < 2
    assert 0.21 < second - began < 2
    assert stopping


def test_max_connection_age_what_is_owed_is_sent(server_with, peer):
    server = server_with(type("Big", (Slow,), {"on_connect": lambda self: self.write(bytes(4 * MIB))}), max_connection_age=0.05)
    one = peer(server, rcvbuf=ROOM)
    gevent.sleep(0.1)
    assert one.recv_all() == bytes(4 * MIB)


def test_max_connection_age_override_that_lingers_is_aborted_at_the_deadline(server_with, peer, recorder, caplog, monkeypatch):
    monkeypatch.setattr(_stream_limits, "GRACE", 0.1)
    kind = recorder.of(Echo, "on_stopping", "on_close", on_stopping=lambda stream, deadline: stream.write(b"in a minute"))
    server = server_with(kind, max_connection_age=0.05)
    one = peer(server)
    assert one.recv_exactly(11) == b"in a minute"
    began = time.monotonic()
    assert one.raises_reset()
    assert 0.08 < time.monotonic() - began < 0.5
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_stopping", "on_close"]
    (record,) = records_of(caplog)
    assert "max_connection_age" in record.getMessage()
    assert record.channel.close_reason is CloseReason.STOPPED


def test_max_connection_age_callback_that_is_busy_finishes(server_with, peer, recorder):
    def on_read(stream, data):
        gevent.sleep(0.15)
        stream.write(b"done")

    server = server_with(recorder.of(Connection, "on_stopping", "on_close", on_read=on_read), max_connection_age=0.05)
    one = peer(server)
    one.send(b"x")
    assert one.recv_all() == b"done"
    assert recorder.names()[0] == "on_stopping"


@pytest.mark.parametrize("grace", [10, 0.01], ids=["in time", "too late"])
def test_max_connection_age_stream_that_ends_anyway_is_not_asked_but_aborted_in_time(server_with, peer, recorder, monkeypatch, grace):
    monkeypatch.setattr(_stream_limits, "GRACE", grace)

    def on_connect(stream):
        Slow.on_connect(stream)
        stream.write(bytes(4 * MIB))
        stream.end()

    server = server_with(recorder.of(Slow, "on_stopping", "on_close", on_connect=on_connect), max_connection_age=0.03)
    one = peer(server, rcvbuf=ROOM)
    if grace == 10:
        gevent.sleep(0.1)
        assert one.recv_all() == bytes(4 * MIB)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_close"]


def test_max_connection_age_reached_while_the_server_stops_does_not_shorten_the_deadline(server_with, peer, recorder, monkeypatch):
    monkeypatch.setattr(_stream_limits, "GRACE", 0.01)
    kind = recorder.of(Echo, "on_stopping", "on_close", on_stopping=lambda stream, deadline: None)
    server = server_with(kind, max_connection_age=0.1)
    one = peer(server)
    assert answers(one)
    stopping = gevent.spawn(server.stop, None)
    recorder.wait_for("on_stopping")
    gevent.sleep(0.15)
    assert recorder.names() == ["on_stopping"]
    assert answers(one)
    one.shutdown_output()
    stopping.get()


def test_max_connection_age_changed_at_run_time_holds_for_the_next_connection(server_with, peer, recorder):
    server = server_with(recorder.of(Echo, "on_close"))
    first = peer(server)
    assert answers(first)
    server.max_connection_age = 0.05
    second = peer(server)
    assert second.recv_all() == b""
    assert answers(first)
    server.max_connection_age = None
    third = peer(server)
    gevent.sleep(0.1)
    assert answers(third)


# ---- Reports


def test_reports_under_attack_there_are_ten_lines_and_a_sum(server_with, peer, caplog, monkeypatch):
    monkeypatch.setattr("pants_green._reports.WITHIN", 0.3)
    server = server_with(deny=["127.0.0.0/8"])

    def attack(count):
        for _ in range(count):
            with contextlib.suppress(OSError), PlainSocket() as sock:
                sock.connect(server.local_address)

    in_thread(attack, 200)
    until(lambda: not server._active)
    until(lambda: len(records_of(caplog)) == 11)
    messages = messages_of(caplog)
    assert all("deny, ['127.0.0.0/8']: the connection of 127.0.0.1:" in message for message in messages[:10])
    assert messages[10].endswith("deny, ['127.0.0.0/8']: 190 more within 0.3 seconds, of which nothing was said")
    in_thread(attack, 1)
    until(lambda: len(records_of(caplog)) == 12)


def test_reports_of_connections_carry_each_its_own_channel_and_peer(server_with, peer, caplog):
    server = server_with(type("Idle", (Echo,), {"idle_timeout": 0.05}))
    peers = [peer(server) for _ in range(15)]
    addresses = [one.address for one in peers]
    assert all(one.at_eof() for one in peers)
    records = records_of(caplog, "timeout")
    assert len(records) == 10
    assert len({record.peer for record in records}) == 10
    assert {record.peer for record in records} <= set(addresses)
    assert all(record.channel.remote_address == record.peer for record in records)
    assert all("idle_timeout, 0.05 seconds" in record.getMessage() for record in records)
    server.close()
    until(lambda: records_of(caplog))
    assert messages_of(caplog) == [f"{server!r}: idle_timeout, 0.05: 5 more within 10 seconds, of which nothing was said"]


def test_reports_of_callbacks_that_took_too_long_are_as_those_of_other_limits(server_with, peer, caplog):
    server = server_with(type("Slow", (Connection,), {"callback_timeout": 0.05, "on_read": lambda stream, data: gevent.sleep(10)}))
    peers = [peer(server) for _ in range(15)]
    for one in peers:
        one.send(b"x")
    assert all(one.at_eof() for one in peers)
    records = records_of(caplog, "timeout")
    assert len(records) == 10
    assert {record.levelno for record in records} == {logging.WARNING}
    assert {record.peer for record in records} <= {one.address for one in peers}
    assert all("callback_timeout, 0.05 seconds" in record.getMessage() and record.exc_info for record in records)
    server.close()
    until(lambda: records_of(caplog))
    assert messages_of(caplog)[0].endswith("callback_timeout, 0.05: 5 more within 10 seconds, of which nothing was said")


def test_reports_of_a_connection_that_has_a_length_name_it(server_with, peer, caplog):
    kind = type("Empty", (Echo,), {"idle_timeout": 0.05, "__len__": lambda stream: 0})
    one = peer(server_with(kind))
    assert one.at_eof()
    (record,) = records_of(caplog, "timeout")
    assert record.peer == one.address


def test_reports_what_an_override_takes_into_its_own_hands_is_not_said(server_with, peer, caplog, recorder):
    kind = type("Quiet", (Echo,), {"idle_timeout": 0.05, "on_timeout": lambda stream, which: stream.close()})
    assert peer(server_with(kind)).at_eof()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_reports_of_a_stream_without_a_server_are_said_each_time(server_with, recorder, caplog):
    server = server_with(Connection)
    clients = [recorder.of(Stream, "on_close", idle_timeout=0.02)().connect(server.local_address) for _ in range(12)]
    recorder.wait_for(12)
    assert len(records_of(caplog, "timeout")) == 12
    assert all(client.closed for client in clients)


# ---- Hostile peers


def test_hostile_handshakes_that_stall_hold_nobody_up_and_fill_no_log(server_with, peer, tls_peer, caplog):  # noqa: F811
    """Rows 15, 16 and 24 of the list of old vulnerabilities: slow-loris at the handshake, and what it leaves behind."""
    server = server_with(ssl_options={**TLS_OPTIONS, "handshake_timeout": 0.3})

    def stall(count):
        socks = []
        for number in range(count):
            sock = PlainSocket()
            sock.connect(server.local_address)
            if number % 2:
                sock.sendall(b"\x16\x03\x01\x02")  # the beginning of a record
            socks.append(sock)
        return socks

    socks = in_thread(stall, 100)
    try:
        delays = []
        for _ in range(3):  # the machine may be busy at one time, not at each
            began = time.monotonic()
            assert answers(tls_peer(server))
            delays.append(time.monotonic() - began)
        assert min(delays) < 0.2
        until(lambda: server._active == 3)
        records = records_of(caplog, "handshake_error")
        assert len(records) == 10
        assert all("handshake_timeout, 0.3 seconds" in record.getMessage() for record in records)
        server.close()
        until(lambda: records_of(caplog))
        assert "handshake_timeout, 0.3: 90 more" in messages_of(caplog)[0]
    finally:
        for sock in socks:
            sock.close()


def test_hostile_connections_whose_callbacks_never_end_are_ended(server_with, peer, recorder):
    """Row 17: the peers are gone, and a callback that waits for ever must not keep their sockets in CLOSE_WAIT."""
    names = "on_error", "on_close"
    server = server_with(recorder.of(Connection, *names, callback_timeout=0.05, on_read=lambda stream, data: Event().wait()))
    peers = [peer(server) for _ in range(10)]
    for one in peers:
        one.send(b"x")
        one.close()
    recorder.wait_for(20)
    assert sorted(recorder.names()) == ["on_close"] * 10 + ["on_error"] * 10
    assert server._active == 0
    assert server.channels == {}


def test_hostile_lines_that_dribble_hold_nobody_up_and_are_cut(server_with, peer, recorder):
    """Row 24 at the level of lines: a byte now and then keeps idle_timeout happy, and not read_timeout."""
    kind = recorder.of(Echo, "on_timeout", "on_close", read_delimiter=b"\n", read_timeout=0.1, idle_timeout=0.1)
    server = server_with(kind)
    peers = [peer(server) for _ in range(20)]
    until(lambda: len(server.channels) == 20)
    while server.channels:
        for one in peers:
            with contextlib.suppress(OSError):
                one.socket.send(b"x")
        gevent.sleep(0.02)
    until(lambda: recorder.names().count("on_close") == 20)
    assert {event for event in recorder if event[0] == "on_timeout"} == {("on_timeout", "read")}
