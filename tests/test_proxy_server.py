"""The PROXY protocol of servers and clients: who is believed, what is made of a header and of what is none, and a real haproxy."""

import contextlib
import gc
import hashlib
import ipaddress
import logging
import os
import shutil
import socket
import ssl
import textwrap
import time
import tracemalloc
from pathlib import Path

import gevent
import gevent.socket
import gevent.subprocess
import pytest
import tls_peers
from certificates import authority, client_context, server_context
from children import Child
from gevent.event import Event
from needs import needs_ipv6
from peers import PlainSocket, in_thread
from tls_peers import TLSPeer
from waiting import nothing_is_kept, turns, until  # noqa: F401

from pants_green import (
    ChannelStateError,
    Client,
    CloseReason,
    Connection,
    Engine,
    ReconnectingClient,
    Server,
    Stream,
    StreamConnectError,
    StreamServer,
    UnixClient,
    UnixServer,
)
from pants_green.proxy_protocol import ProxyHeader, build
from pants_green.testing import memory_pair

tls_peer = tls_peers.tls_peer

# gevent's subprocess forks, and what becomes of it here is exec at once.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

LOCAL = ("127.0.0.1", 0)

#: Who is behind the proxy, and whom it has dialled.
CLIENT, DIALLED = ("192.0.2.7", 56324), ("198.51.100.1", 443)
CLIENT6, DIALLED6 = ("2001:db8::7", 56324, 0, 0), ("2001:db8::1", 443, 0, 0)

V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n"
V2 = build(2, CLIENT, DIALLED)
RICH = build(2, CLIENT, DIALLED, alpn=b"h2", authority="www.example.org", unique_id=b"7-1", tlvs=[(0xE0, b"own")], crc32c=True)

SIGNATURE = V2[:12]

#: Headers, and the client of whom they tell.
HEADERS = {
    "v1": (V1, CLIENT),
    "v1-ipv6": (b"PROXY TCP6 2001:db8::7 2001:db8::1 56324 443\r\n", CLIENT6),
    "v2": (V2, CLIENT),
    "v2-ipv6": (build(2, CLIENT6, DIALLED6), CLIENT6),
    "v2-unix": (build(2, "/run/client", "/run/server"), "/run/client"),
    "v2-tlvs": (RICH, CLIENT),
}

#: Headers that do not tell of any.
WITHOUT_A_CLIENT = {
    "unknown": b"PROXY UNKNOWN\r\n",
    "unknown-with-addresses": b"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n",
    "local": build(2, None, None),
    "local-with-addresses": SIGNATURE + b"\x20\x11\0\x0c" + bytes(12),
    "unspecified": SIGNATURE + b"\x21\0\0\0",
}

HELLO = bytes.fromhex("16030100f5010000f10303") + bytes(240)  # a TLS ClientHello begins like this

GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
    "tls": HELLO,
    "zeros": bytes(300),
    "only-lf": b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\nhello",
    "no-address": b"PROXY TCP4 192.0.2.300 198.51.100.1 56324 443\r\n",
    "no-end": b"PROXY UNKNOWN " + b"x" * 200,
    "no-command": SIGNATURE + b"\x22\x11\0\x0c" + bytes(12),
    "no-family": SIGNATURE + b"\x21\x41\0\x0c" + bytes(12),
    "short-addresses": SIGNATURE + b"\x21\x11\0\x04" + bytes(4),
    "wrong-checksum": RICH[:-1] + bytes([RICH[-1] ^ 1]),
    "huge": SIGNATURE + b"\x21\x11\xff\xff" + bytes(300),
}


@pytest.fixture
def behind(server_of, recorder):
    """Return a function that makes a listening server behind a proxy: ``behind(version, address, server_class=, base=, **settings)``.

    Its connections are echoes, and recorded: as ("connect", remote_address, proxy_header), ("read", data), ("close", reason).
    """

    def make(version="auto", address=LOCAL, *, server_class=Server, base=Connection, ssl_options=None, **settings):
        class Known(base):
            def on_connect(self):
                recorder("connect", self.remote_address, self.proxy_header)

            def on_read(self, data):
                recorder("read", data)
                self.write(data)

            def on_close(self):
                recorder("close", self.close_reason)

        server = server_of(Known, address, server_class=server_class)
        if ssl_options is not None:
            server.startSSL(ssl_options)
        server.proxy_protocol = version
        for name, value in settings.items():
            setattr(server, name, value)
        return server

    return make


@pytest.fixture
def said(caplog):
    """Return a function that returns what was logged, from a level on: WARNING by default."""
    caplog.set_level(logging.DEBUG, "pants_green")
    return lambda level=logging.WARNING: [record.getMessage() for record in caplog.records if record.levelno >= level]


def is_closed(one):
    """Wait for the end of a connection and tell whether nothing came before; a reset is an end, too."""
    try:
        return one.at_eof()
    except ConnectionResetError:
        return True


def answers(one, data=b"hello"):
    """Tell whether this peer is echoed."""
    one.send(data)
    return one.recv_exactly(len(data)) == data


def awaited(server):
    """Return how many connections are in their header or their handshake."""
    return len(server._greetings)


def reads_of(recorder):
    return b"".join(event[1] for event in recorder if event[0] == "read")


# ---- what can be set


WRONG = {
    "proxy_protocol": [(wrong, ValueError, "'v1', 'v2', 'auto'") for wrong in ("v3", "", "V1", "1", 2, True, b"v1", ["v1"], {})],
    "trusted": (
        ("10.0.0.0/8", TypeError, "is a list of networks"),
        (b"10.0.0.0/8", TypeError, "is a list of networks"),
        (5, TypeError, "is a list of networks"),
        (["10.0.0.0/33"], ValueError, "10.0.0.0/33"),
        (["10.0.0.1/8"], ValueError, "host bits"),
        (["127.0.0.1", "example.org"], ValueError, "example.org"),
        (["127.0.0.1:80"], ValueError, "127.0.0.1:80"),
        ([7], TypeError, "7 is no network"),
        ([("127.0.0.1", 8)], TypeError, "is no network"),
    ),
    "proxy_timeout": ((0, ValueError, "more than 0"), (-1, ValueError, "more than 0"), ("5", TypeError, "number of seconds")),
    "proxy_header_size": ((0, ValueError, "at least 1"), (1.5, TypeError, "an int"), (True, TypeError, "an int")),
}


@pytest.mark.parametrize("name", WRONG)
def test_setting_that_makes_no_sense_is_an_error_at_the_call_that_names_it(name):
    server = Server()
    before = getattr(server, name)
    for wrong, error, text in WRONG[name]:
        with pytest.raises(error, match=text) as caught:
            setattr(server, name, wrong)
        assert f"Server.{name}" in str(caught.value)
        with pytest.raises(error, match=text):
            type("Mine", (Server,), {name: wrong})
        if name in ("proxy_protocol", "trusted"):
            for server_class in (Server, StreamServer, UnixServer):
                with pytest.raises(error, match=text):
                    server_class(**{name: wrong})
    assert getattr(server, name) is before


def test_settings_on_a_class_in_the_constructor_and_on_an_instance_hold(recorder, peer, open_server):
    class Mine(Server):
        proxy_protocol = "v2"
        trusted = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_address("::1"))
        proxy_timeout = 7
        proxy_header_size = 100

    server = Mine(recorder.of(Connection))
    assert (server.proxy_protocol, server.proxy_timeout, server.proxy_header_size) == ("v2", 7, 100)
    assert list(server.trusted) == ["127.0.0.0/8", "::1/128"]
    assert (Server.proxy_protocol, Server.proxy_timeout, Server.proxy_header_size) == (None, 5.0, 4096)
    assert list(Server.trusted) == ["127.0.0.0/8", "::1/128", "unix"]
    server = open_server(Mine(recorder.of(Connection), proxy_protocol="v1", trusted=["127.0.0.1"]))
    assert (server.proxy_protocol, list(server.trusted)) == ("v1", ["127.0.0.1/32"])
    assert Mine.proxy_protocol == "v2"
    server.listen(LOCAL)
    peer(server).send(V1)
    recorder.wait_for("on_connect")


def test_settings_changed_while_it_listens_hold_for_connections_that_come(behind, recorder, peer):
    server = behind("v1")
    first = peer(server)
    first.send(V1)
    recorder.wait_for("connect")
    server.proxy_protocol = None
    second = peer(server)
    assert answers(second, V1)
    server.proxy_protocol = "v2"
    third = peer(server)
    third.send(V2)
    recorder.wait_for(lambda events: events.names().count("connect") == 3)
    assert [event[1] for event in recorder if event[0] == "connect"] == [CLIENT, second.address, CLIENT]
    assert answers(first)
    assert answers(second)
    assert answers(third)


def test_server_that_listens_already_when_it_is_given_one_reads_headers_from_the_first_connection_on(recorder, peer, open_server):
    listening = socket.create_server(LOCAL)
    one = peer(listening.getsockname())
    one.send(V2 + b"hello")
    server = open_server(Server(recorder.of(Connection, "on_read"), socket=listening, proxy_protocol="v2"))
    recorder.wait_for([("on_read", b"hello")].__eq__)
    (stream,) = server.channels.values()
    assert stream.remote_address == CLIENT


# ---- headers, and what is behind them


@pytest.mark.parametrize("name", HEADERS)
def test_header_tells_of_the_client_and_data_behind_it_is_delivered(behind, recorder, peer, name):
    header, client = HEADERS[name]
    server = behind(name[:2])
    apart, together = peer(server), peer(server)
    apart.send(header)
    recorder.wait_for("connect")
    together.send(header + b"at once")
    recorder.wait_for(("read", b"at once"))
    apart.send(b"later")
    recorder.wait_for(("read", b"later"))
    told = [event[1:] for event in recorder if event[0] == "connect"]
    assert [one for one, _ in told] == [client, client]
    assert told[0][1] == told[1][1]
    assert told[0][1].source == client
    assert not told[0][1].local
    assert apart.recv_exactly(5) == b"later"
    assert together.recv_exactly(7) == b"at once"


@pytest.mark.parametrize("name", ["v1", "v2", "v2-tlvs"])
def test_header_that_dribbles_byte_by_byte_is_read(behind, recorder, peer, name):
    header, client = HEADERS[name]
    one = peer(behind())
    for byte in header:
        assert recorder == []
        one.socket.send(bytes([byte]))
        turns(1)
    one.send(b"data")
    recorder.wait_for(lambda events: reads_of(events) == b"data")
    assert recorder[0][1] == client


@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
def test_header_and_data_cut_anywhere_lose_and_double_nothing(behind, recorder, peer, header):
    server = behind()
    stream = header + b"PROXY data\r\n"  # which is no header any more
    for cut in range(1, len(stream)):
        with peer(server) as one:
            one.socket.send(stream[:cut])
            turns(1)
            one.socket.send(stream[cut:])
            assert one.recv_exactly(12) == b"PROXY data\r\n"
    assert reads_of(recorder) == b"PROXY data\r\n" * (len(stream) - 1)
    assert {event[1] for event in recorder if event[0] == "connect"} == {CLIENT}


def test_two_headers_in_a_row_are_one_and_data(behind, recorder, peer):
    peer(behind()).send(V2 + V1)
    recorder.wait_for(("read", V1))


@pytest.mark.parametrize("header", [V1, RICH], ids=["v1", "v2"])
def test_megabytes_behind_a_header_arrive_whole(behind, peer, header):
    one = peer(behind())
    data = os.urandom(1 << 20) * 2
    sender = gevent.spawn(one.send, header + data)
    assert hashlib.sha256(one.recv_exactly(len(data))).digest() == hashlib.sha256(data).digest()
    sender.get()


def test_header_alone_and_the_end_is_a_connection_that_said_nothing(behind, recorder, peer):
    one = peer(behind())
    one.send(V1)
    one.shutdown_output()
    recorder.wait_for(("close", CloseReason.PEER_ENDED))
    assert recorder.names() == ["connect", "close"]


@pytest.mark.parametrize("name", WITHOUT_A_CLIENT)
def test_local_and_unknown_keep_the_address_of_the_real_peer(behind, recorder, peer, name):
    one = peer(behind())
    one.send(WITHOUT_A_CLIENT[name] + b"hello")
    recorder.wait_for(("read", b"hello"))
    _, remote, header = recorder[0]
    assert remote == one.address
    assert header.local
    assert header.source is header.destination is None


def test_tlvs_are_on_the_connection(behind, recorder, peer):
    peer(behind()).send(RICH)
    _, _, header = recorder.wait_for("connect")[0]
    assert (header.version, header.source, header.destination) == (2, CLIENT, DIALLED)
    assert (header.alpn, header.authority, header.unique_id) == (b"h2", "www.example.org", b"7-1")
    assert header.crc32c == int.from_bytes(RICH[-4:], "big")
    assert (0xE0, b"own") in header.tlvs
    assert header.ssl is None


def test_header_is_known_from_the_constructor_to_on_close(open_server, recorder, peer):
    class Asked(Connection):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.tell("constructor")

        def tell(self, when):
            recorder(when, self.remote_address, self.proxy_header.source, self.local_address)

        def on_connect(self):
            self.tell("on_connect")
            assert self in self.server.channels.values()
            assert "192.0.2.7:56324" in repr(self)

        def on_read(self, data):
            self.remote_address = "somebody"
            assert self.remote_address == "somebody"
            assert self.proxy_header.source == CLIENT
            del self.remote_address
            self.end()

        def on_close(self):
            self.tell("on_close")

    server = open_server(Server(Asked, proxy_protocol="auto").listen(LOCAL))
    peer(server).send(V1 + b"x")
    recorder.wait_for("on_close")
    # Whom the client has dialled is in the header; this end is still this end.
    expected = (CLIENT, CLIENT, server.local_address)
    assert recorder == [("constructor", *expected), ("on_connect", *expected), ("on_close", *expected)]


def test_without_proxy_protocol_a_header_is_data_and_there_is_none(behind, recorder, peer):
    one = peer(behind(None))
    one.send(V1)
    recorder.wait_for(("read", V1))
    assert recorder[0] == ("connect", one.address, None)
    assert Stream().proxy_header is None


def test_server_that_speaks_first_says_nothing_before_the_header(open_server, peer, recorder):
    class Talkative(Connection):
        def on_connect(self):
            recorder("greeted")
            self.write(b"220 welcome\r\n")

    server = open_server(Server(Talkative, proxy_protocol="v1").listen(LOCAL))
    one = peer(server)
    for piece in (b"PROX", b"Y TCP4 192.0.2.7 198.51.100.1 ", b"56324 443\r"):
        one.send(piece)
        until(lambda: awaited(server) == 1)
        turns(3)
        assert recorder == []
        assert not server.channels
    one.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        one.socket.recv(1)
    one.socket.settimeout(5)
    one.send(b"\n")
    assert one.recv_exactly(13) == b"220 welcome\r\n"


def test_unix_server_reads_headers_of_clients_elsewhere(behind, recorder, peer, tmp_path):
    path = str(tmp_path / "socket")
    server = behind("v2", path, server_class=UnixServer)
    peer(path).send(V2)
    peer(path).send(build(2, b"\0abstract", "/run/server"))
    peer(path).send(build(2, "", "/run/server"))
    recorder.wait_for(3)
    assert sorted(map(str, (event[1] for event in recorder))) == sorted(map(str, (CLIENT, b"\0abstract", "")))
    assert len(server.channels) == 3


@needs_ipv6
def test_proxy_that_dials_by_ipv6_is_believed_too(behind, recorder, peer):
    peer(behind("v1", ("::1", 0))).send(V1)
    assert recorder.wait_for("connect")[0][1] == CLIENT


# ---- what is no header


@pytest.mark.parametrize(("version", "header"), [("v1", V2), ("v2", V1), ("v1", RICH), ("v2", WITHOUT_A_CLIENT["unknown"])])
def test_header_of_another_version_is_refused(behind, recorder, peer, said, version, header):
    one = peer(behind(version))
    one.send(header + b"hello")
    assert is_closed(one)
    (line,) = said()
    assert f"proxy_protocol, {version}: no header from 127.0.0.1:{one.address[1]}" in line
    assert "expected" in line
    assert "version" in line
    assert recorder == []


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_costs_that_connection_only(behind, recorder, peer, said, name):
    server = behind()
    good, bad = peer(server), peer(server)
    good.send(V1)
    recorder.wait_for("connect")
    bad.send(GARBAGE[name])
    assert is_closed(bad)
    (line,) = said()
    assert f"no header from 127.0.0.1:{bad.address[1]}, whose connection was closed: no PROXY header: expected " in line
    assert len(line) < 500
    assert answers(good)
    assert recorder.names() == ["connect", "read"]
    assert len(server.channels) == 1
    late = peer(server)
    late.send(V2)
    assert answers(late)


@pytest.mark.parametrize("sent", [b"P", V1[:20], V1[:-1], SIGNATURE, V2[:-1]], ids=len)
def test_header_cut_by_the_peer_s_end_is_told(behind, recorder, peer, said, sent):
    server = behind()
    one = peer(server)
    one.send(sent)
    one.shutdown_output()
    assert is_closed(one)
    (line,) = said()
    assert f"the connection ended in the PROXY header, after {len(sent)} bytes" in line
    assert recorder == []
    assert awaited(server) == 0


@pytest.mark.parametrize("sent", [b"", V1[:20], V2[:-1]], ids=len)
@pytest.mark.parametrize("how", ["end", "reset"])
def test_peer_that_leaves_without_a_word_or_in_a_hurry_is_no_warning(behind, recorder, peer, said, sent, how):
    server = behind()
    one = peer(server)
    one.send(sent)
    until(lambda: awaited(server) == 1)
    turns(2)
    if how == "end" and not sent:
        one.shutdown_output()
        assert is_closed(one)
    else:
        one.reset()
        until(lambda: awaited(server) == 0)
    assert said() == []
    assert len([line for line in said(logging.DEBUG) if "no header from" in line]) == 1
    assert recorder == []


def test_peers_that_say_nothing_do_not_keep_a_warning_from_being_logged(behind, peer, said):
    server = behind()
    for _ in range(25):
        with peer(server) as one:
            one.shutdown_output()
            assert is_closed(one)
    assert said() == []
    bad = peer(server)
    bad.send(b"GET / HTTP/1.0\r\n")
    assert is_closed(bad)
    assert len(said()) == 1


def test_warnings_are_few_however_many_come(behind, peer, said):
    server = behind()
    for number in range(60):
        with peer(server) as one:
            one.send(b"GET / HTTP/1.0\r\n" if number % 2 else V1[:-1] + b"x")
            assert is_closed(one)
    assert 5 <= len(said()) <= 12


def test_header_of_more_bytes_than_proxy_header_size_is_refused_and_less_is_not(behind, recorder, peer, said):
    server = behind(proxy_header_size=500)
    long = build(2, CLIENT, DIALLED, tlvs=[(0xE0, b"x" * 500)])
    one = peer(server)
    one.send(long[:16])  # nobody waits for the rest
    assert is_closed(one)
    assert "a length of no more than 500 bytes" in said()[0]
    server.proxy_header_size = len(long) - 16
    one = peer(server)
    one.send(long + b"hello")
    recorder.wait_for(("read", b"hello"))
    assert recorder[0][2].tlvs == ((0xE0, b"x" * 500),)


# ---- time


@pytest.mark.parametrize("sent", [b"", b"PROXY TCP4 192.0.2.7", SIGNATURE], ids=["nothing", "v1", "v2"])
def test_proxy_timeout_strikes_who_sends_no_header_in_time(behind, recorder, peer, said, sent):
    server = behind(proxy_timeout=0.03)
    one = peer(server)
    one.send(sent)
    assert is_closed(one)
    (line,) = said()
    assert "no PROXY header came within proxy_timeout, 0.03 seconds" in line
    assert recorder == []
    assert awaited(server) == 0


def test_proxy_timeout_is_for_the_whole_header_however_it_dribbles(behind, recorder, peer):
    server = behind(proxy_timeout=0.05)
    one = peer(server)
    until(lambda: awaited(server) == 1)
    began = time.monotonic()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        for byte in V1[:-1] * 9:
            one.socket.send(bytes([byte]))
            gevent.sleep(0.005)
    assert 0.04 < time.monotonic() - began < 1.5  # it would have taken two seconds
    assert recorder == []


def test_proxy_timeout_is_for_the_header_only_and_none_is_no_limit(behind, recorder, peer):
    server = behind(proxy_timeout=0.15)
    one = peer(server)
    one.send(V1)
    recorder.wait_for("connect")
    server.proxy_timeout = None
    late = peer(server)
    late.send(V2[:20])
    gevent.sleep(0.2)
    late.send(V2[20:])
    assert answers(late)
    assert answers(one)


# ---- who is believed


@pytest.mark.parametrize("sent", [b"", V1 + b"hello", GARBAGE["http"]], ids=["nothing", "header", "garbage"])
def test_peer_that_is_not_trusted_is_closed_without_reading(behind, recorder, peer, said, sent):
    server = behind(trusted=["10.0.0.0/8", "::/0", "127.0.0.0/32", "unix"])
    one = peer(server)
    with contextlib.suppress(ConnectionError):
        one.send(sent)
    assert is_closed(one)
    (line,) = said()
    assert f"trusted, ['10.0.0.0/8', '::/0', '127.0.0.0/32', 'unix']: 127.0.0.1:{one.address[1]} is no proxy" in line
    assert recorder == []
    assert not server.channels
    server.trusted = ["127.0.0.1"]
    one = peer(server)
    one.send(V1)
    assert answers(one)


def test_nobody_is_trusted_if_the_list_is_empty(behind, peer, said):
    server = behind(trusted=[])
    for _ in range(40):
        with peer(server) as one:
            assert is_closed(one)
    assert 1 <= len(said()) <= 12


def test_unix_sockets_are_trusted_if_the_list_says_so(behind, recorder, peer, tmp_path):
    path = str(tmp_path / "socket")
    server = behind("v2", path, trusted=["0.0.0.0/0", "::/0"])
    assert is_closed(peer(path))
    server.trusted = ["unix"]
    peer(path).send(V2)
    recorder.wait_for("connect")


# ---- limits see the client


def test_deny_and_allow_are_about_the_client_and_not_about_the_proxy(behind, recorder, peer):
    server = behind(deny=["192.0.2.0/24"])
    denied, allowed = peer(server), peer(server)
    denied.send(V1 + b"hello")
    assert is_closed(denied)
    allowed.send(build(1, ("192.0.3.1", 5), DIALLED))
    assert answers(allowed)
    server.deny, server.allow = None, ["192.0.2.0/24"]
    denied, allowed, real = peer(server), peer(server), peer(server)
    denied.send(build(2, ("192.0.3.1", 5), DIALLED))
    assert is_closed(denied)
    real.send(b"PROXY UNKNOWN\r\n")
    assert is_closed(real)
    # It came by IPv6, and is the same network all the same.
    allowed.send(b"PROXY TCP6 ::ffff:192.0.2.9 ::ffff:198.51.100.1 5 6\r\n")
    assert answers(allowed)
    assert [event[1][0] for event in recorder if event[0] == "connect"] == ["192.0.3.1", "::ffff:192.0.2.9"]


def test_max_connections_per_ip_counts_clients(behind, recorder, peer):
    server = behind(max_connections_per_ip=1)
    first, same, other = peer(server), peer(server), peer(server)
    first.send(V1)
    assert answers(first)
    same.send(build(1, (CLIENT[0], 7), DIALLED))
    assert is_closed(same)
    other.send(build(2, ("192.0.2.8", 7), DIALLED))
    assert answers(other)
    first.shutdown_output()
    recorder.wait_for("close")
    turns(2)
    again = peer(server)
    again.send(V2)
    assert answers(again)


def test_max_connections_counts_those_whose_header_is_awaited(behind, recorder, peer):
    server = behind(max_connections=1)
    stalled, waiting = peer(server), peer(server)
    stalled.send(V1[:5])
    waiting.send(V1)
    until(lambda: awaited(server) == 1)
    turns(5)
    assert recorder == []
    stalled.reset()
    assert answers(waiting)


@pytest.mark.parametrize("why", ["denied", "failed handshake", "on_accept raises"])
def test_header_of_one_connection_does_not_reach_the_next_one_of_its_greenlet(behind, server_of, recorder, peer, monkeypatch, why):
    class Raising(Server):
        def on_accept(self, sock, addr):
            raise RuntimeError(why)

    pool = Engine.instance()._pool
    pool.clear()
    monkeypatch.setattr(pool, "limit", 1)
    if why == "denied":
        server = behind(deny=["192.0.2.0/24"])
    elif why == "failed handshake":
        server = behind(ssl_options=server_context())
    else:
        server = behind(server_class=Raising)
    plain = server_of(recorder.of(Connection, "on_connect"))
    made = pool.made
    with peer(server) as one:
        one.send(V1 + b"no handshake")
        assert is_closed(one)
    until(lambda: len(pool) == 1)
    with peer(plain) as one:
        recorder.wait_for("on_connect")
        (stream,) = plain.channels.values()
        assert stream.proxy_header is None
        assert stream.remote_address == one.address
    assert pool.made <= made + 2


# ---- many


def test_many_stalled_headers_do_not_delay_a_good_one_and_take_little(behind, recorder, peer):
    server = behind()
    long = build(2, CLIENT, DIALLED, tlvs=[(0xE0, b"x" * 4000)])
    stalled = []
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(200):
            made = PlainSocket()
            stalled.append(made)
            made.connect(server.local_address)
            made.send((b"", V1[:20], long[:-1], SIGNATURE)[number % 4])
            if number % 50 == 49:
                turns(2)
        until(lambda: awaited(server) == 200)
        turns(5)
        took = (tracemalloc.get_traced_memory()[0] - before) / 200
    finally:
        tracemalloc.stop()
    assert took < 8192
    began = time.monotonic()
    one = peer(server)
    one.send(V2)
    assert answers(one)
    assert time.monotonic() - began < 1.0
    assert len(server.channels) == 1
    for made in stalled:
        made.close()
    until(lambda: awaited(server) == 0)


def test_nothing_behind_a_header_is_received_before_the_stream_reads(open_server, recorder, peer):
    class Busy(Connection):
        def on_connect(self):
            recorder("connected")
            go.wait()

        def on_read(self, data):
            recorder("read", data)

    go = Event()
    server = open_server(Server(Busy, proxy_protocol="auto").listen(LOCAL))
    one = peer(server)
    one.send(V1 + b"hello")
    recorder.wait_for("connected")
    (stream,) = server.channels.values()
    assert in_thread(stream.socket._sock.recv, 100, socket.MSG_PEEK) == b"hello"
    go.set()
    recorder.wait_for(("read", b"hello"))


# ---- the end of the server


def test_close_ends_the_connections_whose_header_is_awaited(behind, recorder, peer, said):
    server = behind()
    good = peer(server)
    good.send(V1)
    recorder.wait_for("connect")
    stalled = [peer(server) for _ in range(20)]
    for one in stalled:
        one.send(V1[:9])
    until(lambda: awaited(server) == 20)
    server.close()
    for one in stalled:
        assert is_closed(one)
    assert good.at_eof()
    good.shutdown_output()
    recorder.wait_for("close")
    until(lambda: awaited(server) == 0)
    assert said() == []


def test_stop_lets_a_header_come_and_gives_up_at_its_deadline(behind, recorder, peer, said):
    server = behind()
    in_time, never = peer(server), peer(server)
    in_time.send(V1[:9])
    never.send(V1[:9])
    until(lambda: awaited(server) == 2)
    stopping = gevent.spawn(server.stop, 0.4)
    until(lambda: not server.listening)
    in_time.send(V1[9:])
    recorder.wait_for("close")
    assert recorder.names() == ["connect", "close"]
    in_time.close()
    assert is_closed(never)
    stopping.get()
    assert server.closed
    assert not server._children()
    assert awaited(server) == 0
    assert not [line for line in said() if "header" in line]


def test_stop_takes_connections_from_the_queue_with_their_headers(behind, recorder, peer):
    server = behind()
    server.suspend()
    peers = [peer(server) for _ in range(5)]
    for one in peers:
        one.send(V2 + b"hello")
    stopping = gevent.spawn(server.stop, 5)
    for one in peers:
        assert one.recv_exactly(5) == b"hello"
        one.shutdown_output()
    stopping.get()
    assert [event for event in recorder if event[0] == "read"] == [("read", b"hello")] * 5


def test_close_in_on_accept_of_another_connection_is_no_trouble(recorder, peer, open_server):
    class Closing(Server):
        def on_accept(self, sock, addr):
            self.close()
            super().on_accept(sock, addr)

    server = open_server(Closing(recorder.of(Connection, "on_close"), proxy_protocol="auto").listen(LOCAL))
    stalled, last = peer(server), peer(server)
    stalled.send(V1[:9])
    until(lambda: awaited(server) == 2)
    last.send(V1)
    assert is_closed(stalled)
    assert is_closed(last)
    last.close()
    recorder.wait_for("on_close")


FORKING = """
    import os, signal
    import gevent
    from gevent.event import Event
    from pants_green import Connection, Engine, Server

    class Talk(Connection):
        def on_connect(self):
            self.write(f"{os.getpid()} {self.remote_address[0]}\\n")

    signal.alarm(20)  # whatever happens this process ends
    server = Server(Talk, proxy_protocol="auto").listen(("127.0.0.1", 0))
    print("port", server.local_address[1])
    while len(server._greetings) < 2:
        gevent.sleep(0.001)
    gevent.sleep(0.01)
    child = os.fork()
    if not child:
        signal.alarm(20)
        assert not server._greetings
        gevent.sleep(0.05)
        server.close()
        gevent.sleep(0.05)
        os._exit(0)
    print("forked", os.waitpid(child, 0)[1])
    Engine.instance().start()
"""


def test_fork_leaves_the_connections_whose_header_is_awaited_to_the_parent(peer):
    with Child("-c", textwrap.dedent(FORKING)) as program:
        address = "127.0.0.1", program.port()
        nothing, half = peer(address), peer(address)
        half.send(V1[:20])
        assert program.expect(r"^forked (\d+)$")[1] == "0"
        half.send(V1[20:])
        nothing.send(V2)
        line = b"%d 192.0.2.7\n" % program.process.pid
        assert half.recv_exactly(len(line)) == line
        assert nothing.recv_exactly(len(line)) == line


# ---- on_accept


@pytest.mark.parametrize("server_class", [Server, StreamServer])
def test_on_accept_gets_the_address_of_the_client_and_a_socket_behind_the_header(open_server, recorder, peer, server_class):
    class Accepting(server_class):
        def on_accept(self, sock, addr):
            recorder("accepted", addr, sock.recv(100))
            sock.sendall(b"good day")
            sock.close()

    server = open_server(Accepting(proxy_protocol="auto").listen(LOCAL))
    with peer(server) as one:
        one.send(V1[:30])
        until(lambda: awaited(server) == 1)
        one.send(V1[30:] + b"hello")
        assert one.recv_all() == b"good day"
    with peer(server) as one:
        one.send(b"PROXY UNKNOWN\r\nhello")
        assert one.recv_all() == b"good day"
        assert recorder == [("accepted", CLIENT, b"hello"), ("accepted", one.address, b"hello")]


@pytest.mark.parametrize("server_class", [Server, StreamServer])
def test_stream_made_in_on_accept_knows_the_header(open_server, recorder, peer, server_class):
    class Accepting(server_class):
        def on_accept(self, sock, addr):
            stream = recorder.of(Stream, "on_read")(socket=sock)
            recorder("made", addr, stream.remote_address, stream.proxy_header)

    server = open_server(Accepting(proxy_protocol="auto").listen(LOCAL))
    one = peer(server)
    one.send(RICH + b"hello")
    recorder.wait_for(("on_read", b"hello"))
    _, addr, remote, header = recorder[0]
    assert addr == remote == header.source == CLIENT
    assert header.authority == "www.example.org"
    one.close()
    until(lambda: not server._active)


def test_handle_accept_the_oldest_name_gets_the_client_too(open_server, recorder, peer):
    class Old(Server):
        def handle_accept(self, sock, addr):
            recorder(addr)
            sock.close()

    one = peer(open_server(Old(proxy_protocol="v1").listen(LOCAL)))
    one.send(V1)
    assert is_closed(one)
    assert recorder == [CLIENT]


def test_on_accept_that_raises_says_so_and_the_server_stays(open_server, peer, said):
    class Raising(Server):
        def on_accept(self, sock, addr):
            raise RuntimeError(f"I do not like {addr[0]}")

    server = open_server(Raising(proxy_protocol="v1").listen(LOCAL))
    one = peer(server)
    one.send(V1)
    assert is_closed(one)
    assert "I do not like 192.0.2.7" in said()[0]
    assert server.listening


# ---- TLS comes behind the header


@pytest.mark.parametrize("header", [V1, RICH, WITHOUT_A_CLIENT["local"]], ids=["v1", "v2", "local"])
@pytest.mark.parametrize("how", ["apart", "with the hello", "byte by byte"])
def test_header_comes_before_the_tls_handshake(behind, recorder, peer, header, how):
    one = peer(behind(ssl_options=server_context()))
    expected = one.address if header == WITHOUT_A_CLIENT["local"] else CLIENT
    if how == "with the hello":
        secured = TLSPeer.over(one, shake=False)
        with pytest.raises(ssl.SSLWantReadError):
            secured.object.do_handshake()
        one.send(header + secured._outgoing.read())
        secured.shake_hands()
    else:
        for piece in [header] if how == "apart" else [header[at : at + 1] for at in range(len(header))]:
            one.socket.send(piece)
            turns(1)
        assert recorder == []
        secured = TLSPeer.over(one)
    assert answers(secured)
    assert recorder[0][1] == expected
    assert recorder[0][2].local is (expected is not CLIENT)
    assert recorder[1] == ("read", b"hello")


def test_tls_behind_a_header_chooses_the_certificate_by_name_and_asks_for_the_client_s(behind, recorder, peer):
    options = {
        **authority().localhost,
        "sni": {"www.example.org": authority().issue("www.example.org")},
        "cert_reqs": ssl.CERT_REQUIRED,
        "ca_certs": authority().file,
        "alpn_protocols": ["pants"],
    }

    class Asked(Connection):
        def on_ssl_handshake(self):
            subject = dict(field for fields in self.peer_certificate["subject"] for field in fields)
            recorder("handshake", self.remote_address, self.proxy_header.source, subject["commonName"], self.alpn_protocol)

    server = behind("v2", base=Asked, ssl_options=options)
    for name in ("localhost", "www.example.org"):
        context = client_context()
        context.load_cert_chain(**authority().issue("ann@example.org", common_name="Ann"))
        context.set_alpn_protocols(["pants"])
        one = peer(server)
        one.send(V2)
        secured = TLSPeer.over(one, context, server_hostname=name)
        assert ("DNS", name) in secured.object.getpeercert()["subjectAltName"]
        assert answers(secured)
    assert [event for event in recorder if event[0] == "handshake"] == [("handshake", CLIENT, CLIENT, "Ann", "pants")] * 2


def test_tls_hello_without_a_header_is_refused(behind, recorder, peer, said):
    server = behind(ssl_options=server_context())
    with pytest.raises((ssl.SSLError, ConnectionError)):
        TLSPeer(server)
    assert "no PROXY header: expected" in said()[0]
    assert recorder == []


def test_header_inside_of_tls_is_data(behind, recorder, peer):
    server = behind(ssl_options=server_context())
    one = peer(server)
    one.send(V1)
    assert answers(TLSPeer.over(one), V2)
    assert reads_of(recorder) == V2


def test_failed_handshake_behind_a_header_is_told_with_the_client_s_address(open_server, recorder, peer, said):
    class Told(Server):
        def on_ssl_wrap_error(self, sock, addr, exception):
            recorder("failed", addr)

    server = open_server(Told(proxy_protocol="auto", ssl_options=server_context()).listen(LOCAL))
    one = peer(server)
    one.send(V1 + b"no handshake")
    assert recorder.wait_for(1) == [("failed", CLIENT)]
    server = open_server(Server(proxy_protocol="auto", ssl_options=server_context()).listen(LOCAL))
    one = peer(server)
    one.send(V1 + b"no handshake")
    until(said)
    assert "192.0.2.7:56324" in said()[0]


def test_header_and_handshake_have_a_time_limit_each(behind, recorder, peer, said):
    server = behind(ssl_options={**authority().localhost, "handshake_timeout": 0.25}, proxy_timeout=None)
    late, silent = peer(server), peer(server)
    late.send(V1[:9])
    silent.send(V1)
    assert is_closed(silent)  # and the other has waited for longer than its handshake may take
    assert "handshake_timeout" in said()[0]
    late.send(V1[9:])
    assert answers(TLSPeer.over(late))
    late = peer(behind(ssl_options=server_context(), proxy_timeout=0.15))
    late.send(V1)
    gevent.sleep(0.2)
    assert answers(TLSPeer.over(late))


def test_close_ends_a_handshake_behind_a_header(behind, recorder, peer):
    server = behind(ssl_options=server_context())
    one = peer(server)
    one.send(V1 + HELLO[:5])
    until(lambda: awaited(server) == 1)
    turns(3)
    server.close()
    assert is_closed(one)
    assert recorder == []
    assert awaited(server) == 0


def test_on_accept_of_a_server_with_tls_gets_the_client_and_what_was_encrypted(open_server, recorder, peer):
    class Accepting(StreamServer):
        def on_accept(self, sock, addr):
            recorder(addr, sock.recv(100))
            stream = recorder.of(Stream, "on_read")(socket=sock)
            recorder(stream.proxy_header.authority)

    server = open_server(Accepting(proxy_protocol="v2", ssl_options=server_context()).listen(LOCAL))
    one = peer(server)
    one.send(RICH)
    secured = TLSPeer.over(one)
    secured.send(b"hello")
    recorder.wait_for(2)
    secured.send(b"again")
    assert recorder.wait_for(3) == [(CLIENT, b"hello"), "www.example.org", ("on_read", b"again")]
    secured.close()
    until(lambda: not server._active)


# ---- clients


@pytest.fixture
def dialled(recorder, listening_peer):
    """Return a function that dials a plain peer: ``client, far = dialled(base, listener, proxy_header=..., ...)``; aborted at the end."""
    made = []

    def make(base=Client, listener=None, connect_to=None, **options):
        listener = listener or listening_peer()
        client = recorder.of(base, "on_connect", "on_read", "on_connect_error", "on_close")(**options)
        made.append(client)
        client.connect(connect_to or listener.address)
        return client, listener.accept()

    yield make
    for one in made:
        one.abort()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_client_begins_with_its_own_addresses(dialled, listening_peer, recorder, version, host):
    client, far = dialled(listener=listening_peer((host, 0)), proxy_header=f"v{version}")
    recorder.wait_for("on_connect")
    client.write(b"hello")
    expected = build(version, client.local_address, client.remote_address)
    assert far.recv_exactly(len(expected) + 5) == expected + b"hello"
    assert far.socket.getpeername()[:2] == client.local_address[:2]
    assert client.proxy_header == f"v{version}"
    far.send(b"good day")
    recorder.wait_for(("on_read", b"good day"))
    assert recorder.names() == ["on_connect", "on_read"]


def test_client_header_comes_before_what_on_connect_writes_and_at_once_if_it_waits(dialled, recorder):
    class Waiting(Client):
        def on_connect(self):
            go.wait()
            self.write(b"hello")

    go = Event()
    _, far = dialled(Waiting, proxy_header=V1)
    assert far.recv_exactly(len(V1)) == V1
    go.set()
    assert far.recv_exactly(5) == b"hello"


SENT_AS_IT_IS = {
    "bytes-v1": (V1, V1),
    "bytes-v2": (RICH, RICH),
    "bytearray": (bytearray(V2), V2),
    "memoryview": (memoryview(V2), V2),
    "long": (build(2, CLIENT, DIALLED, tlvs=[(0xE0, b"x" * 60000)]),) * 2,
    "header-v1": (ProxyHeader(1, False, socket.AF_INET, CLIENT, DIALLED), V1),
    "header-v2": (ProxyHeader(2, False, socket.AF_INET, CLIENT, DIALLED), V2),
    "unknown": (ProxyHeader(1, True, socket.AF_UNSPEC, None, None), b"PROXY UNKNOWN\r\n"),
    "local": (ProxyHeader(2, True, socket.AF_UNSPEC, None, None), build(2, None, None)),
    "unix": (ProxyHeader(2, False, socket.AF_UNIX, "", "/run/server"), build(2, "", "/run/server")),
}


@pytest.mark.parametrize("name", SENT_AS_IT_IS)
def test_client_sends_a_header_that_it_was_given_as_it_is(dialled, recorder, name):
    given, expected = SENT_AS_IT_IS[name]
    client, far = dialled(proxy_header=given)
    assert far.recv_exactly(len(expected)) == expected
    assert client.proxy_header == given
    client.abort()


def test_client_hands_on_what_its_own_proxy_has_said(behind, open_server, recorder, peer):
    class Relay(Connection):
        def on_connect(self):
            self.onward = Client(proxy_header=self.proxy_header).connect(server.local_address)

        def on_close(self):
            self.onward.abort()

    server = behind("v2")
    relay = open_server(Server(Relay, proxy_protocol="auto").listen(LOCAL))
    with peer(relay) as one:
        one.send(RICH)
        _, remote, header = recorder.wait_for("connect")[0]
        assert remote == CLIENT
        assert header.authority == "www.example.org"
        assert header.crc32c is not None
        assert set(header.tlvs) - {(3, header.crc32c.to_bytes(4, "big"))} == {
            (1, b"h2"),
            (2, b"www.example.org"),
            (5, b"7-1"),
            (0xE0, b"own"),
        }
    recorder.wait_for("close")


@pytest.mark.parametrize("base", [Client, UnixClient])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_client_over_a_unix_socket_begins_with_one_too(behind, recorder, tmp_path, base, version):
    path = str(tmp_path / "socket")
    server = behind("auto", path)
    client = base(proxy_header=version).connect(path)
    _, remote, header = recorder.wait_for("connect")[0]
    assert remote == ""
    assert (header.version, header.source, header.destination) == ((2, "", path) if version == "v2" else (1, None, None))
    client.abort()
    recorder.wait_for("close")
    server.close()


def test_client_header_goes_in_clear_in_front_of_the_tls_handshake(dialled, recorder):
    client, far = dialled(ssl_options={"ca_certs": authority().file, "server_hostname": "localhost"}, proxy_header="v2")
    expected = build(2, far.socket.getpeername(), far.socket.getsockname())
    assert far.recv_exactly(len(expected) + 1) == expected + b"\x16"
    far._pending = b"\x16" + far._pending
    hello = far._pending
    secured = TLSPeer.over(far, server_context(), server_side=True, shake=False)
    secured._incoming.write(hello)
    secured.shake_hands()
    recorder.wait_for("on_connect")
    client.write(b"hello")
    assert secured.recv_exactly(5) == b"hello"


@pytest.mark.parametrize("header", ["v1", "v2", RICH], ids=["v1", "v2", "bytes"])
def test_client_and_server_speak_tls_behind_it(behind, recorder, header):
    server = behind(ssl_options=server_context())
    client = recorder.of(Client, "on_connect", "on_read")(ssl_options=client_context(), proxy_header=header)
    client.connect("localhost", server.local_address[1])
    recorder.wait_for("on_connect")
    client.write(b"hello")
    recorder.wait_for(("on_read", b"hello"))
    (told,) = [event for event in recorder if event[0] == "connect"]
    assert told[1] == (CLIENT if header is RICH else client.local_address)
    client.abort()
    recorder.wait_for("close")


def test_client_dials_names_and_only_the_one_that_wins_sends_its_header(dialled, listening_peer, recorder):
    client, far = dialled(listener=(one := listening_peer()), connect_to=("localhost", one.address[1]), proxy_header="v1")
    recorder.wait_for("on_connect")
    expected = build(1, client.local_address, client.remote_address)
    assert far.recv_exactly(len(expected)) == expected


@pytest.mark.parametrize("version", [1, 2])
def test_client_leaves_the_zone_of_a_link_local_address_out(dialled, monkeypatch, version):
    monkeypatch.setattr("pants_green._sockets.local_sockaddr", lambda sock: ("fe80::1%eth0", 50000, 0, 2))
    monkeypatch.setattr("pants_green._sockets.remote_sockaddr", lambda sock: ("fe80::2%eth0", 80, 0, 2))
    _, far = dialled(proxy_header=f"v{version}")
    expected = build(version, ("fe80::1", 50000), ("fe80::2", 80))
    assert far.recv_exactly(len(expected)) == expected


def test_client_header_can_be_set_on_the_class_and_on_an_instance(dialled, recorder):
    class Mine(Client):
        proxy_header = V1

    assert Client.proxy_header is None
    assert Client().proxy_header is None
    assert Mine().proxy_header == V1
    _, far = dialled(Mine)
    assert far.recv_exactly(len(V1)) == V1
    _, far = dialled(Mine, proxy_header=V2)
    assert far.recv_exactly(len(V2)) == V2
    Mine.proxy_header = RICH
    _, far = dialled(Mine)
    assert far.recv_exactly(len(RICH)) == RICH

    class Fresh(Mine):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.proxy_header = None
            self.proxy_header = "v1"

    client, far = dialled(Fresh)
    expected = build(1, far.socket.getpeername(), far.socket.getsockname())
    assert far.recv_exactly(len(expected)) == expected
    with pytest.raises(ChannelStateError, match="set it before connect"):
        client.proxy_header = "v2"
    assert client.proxy_header == "v1"


WRONG_HEADERS = [
    ("v3", ValueError, "'v1' or 'v2'"),
    ("auto", ValueError, "'v1' or 'v2'"),
    ("PROXY UNKNOWN\r\n", ValueError, "'v1' or 'v2'"),
    (b"", ValueError, "lacks 15 bytes"),
    (b"v1", ValueError, "no PROXY header"),
    (V1[:-1], ValueError, "lacks 1 bytes"),
    (V1 + b"hello", ValueError, "write b'hello' in on_connect"),
    (V2[:20], ValueError, "lacks 8 bytes"),
    (GARBAGE["wrong-checksum"], ValueError, "CRC32C"),
    (1, TypeError, "'v1', 'v2', a ProxyHeader"),
    (True, TypeError, "'v1', 'v2', a ProxyHeader"),
    ((CLIENT, DIALLED), TypeError, "'v1', 'v2', a ProxyHeader"),
    (ProxyHeader(3, False, socket.AF_INET, CLIENT, DIALLED), ValueError, "versions 1 and 2"),
    (ProxyHeader(1, False, socket.AF_INET, ("example.org", 80), DIALLED), ValueError, "numbers of an IP address"),
    (ProxyHeader(1, False, socket.AF_UNIX, "/run/client", "/run/server"), ValueError, "no Unix addresses"),
    (ProxyHeader(2, False, socket.AF_INET, CLIENT, None), ValueError, "give both"),
    (ProxyHeader(1, False, socket.AF_INET, CLIENT, DIALLED, ((5, b"x"),)), ValueError, "no TLVs"),
    (ProxyHeader(2, False, socket.AF_INET, CLIENT, DIALLED, ((0xE0, "x"),)), TypeError, "is bytes"),
]


@pytest.mark.parametrize(("wrong", "error", "text"), WRONG_HEADERS, ids=range(len(WRONG_HEADERS)))
def test_client_header_that_is_none_is_an_error_at_the_call(wrong, error, text):
    client = Client()
    with pytest.raises(error, match=text) as caught:
        client.proxy_header = wrong
    assert "Client.proxy_header" in str(caught.value)
    assert client.proxy_header is None
    for base in (Client, ReconnectingClient, UnixClient):
        with pytest.raises(error, match=text) as caught:
            base(proxy_header=wrong)
        assert f"{base.__name__}(proxy_header=)" in str(caught.value)
    with pytest.raises(error, match=text):
        type("Mine", (Client,), {"proxy_header": wrong})


def test_client_that_is_made_for_a_server_sends_one_too(dialled, server_of):
    server = server_of(Connection)
    client, far = dialled(server=server, proxy_header=V1)
    assert far.recv_exactly(len(V1)) == V1
    until(lambda: client.connected)
    assert server.channels == {client.fileno: client}
    client.close()
    assert not server.channels


def test_reconnecting_client_sends_one_with_every_connection(dialled, listening_peer, monkeypatch, recorder):
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)

    class Feed(ReconnectingClient):
        proxy_header = "v2"

        def on_reconnect(self, delay):
            recorder("again")
            if again:
                self.proxy_header = again.pop()

    again = []
    listener = listening_peer()
    client, far = dialled(Feed, listener)
    for _ in range(3):
        expected = build(2, far.socket.getpeername(), far.socket.getsockname())
        assert far.recv_exactly(len(expected)) == expected
        far.close()
        far = listener.accept()
    again.append(V1)
    far.close()
    far = listener.accept()
    # That to which this was said had begun already, or this is the one.
    if far.recv_exactly(5) == V2[:5]:
        far.close()
        far = listener.accept()
        assert far.recv_exactly(5) == V1[:5]
    assert far.recv_exactly(len(V1) - 5) == V1[5:]
    client.stop()
    far.close()
    until(lambda: client.closed)


def test_client_on_a_connected_socket_begins_with_one_too(recorder, listening_peer):
    listener = listening_peer()
    sock = gevent.socket.create_connection(listener.address)
    own = sock.getsockname()
    client = recorder.of(Client, "on_connect")(socket=sock, proxy_header="v1")
    with pytest.raises(ChannelStateError, match="set it before connect"):
        client.proxy_header = "v2"
    far = listener.accept()
    expected = build(1, own, listener.address)
    assert far.recv_exactly(len(expected)) == expected
    recorder.wait_for("on_connect")
    client.abort()


def test_client_on_an_sslsocket_before_its_handshake_sends_it_in_front_of_that(behind, recorder):
    server = behind(ssl_options=server_context())
    sock = ssl.SSLContext.wrap_socket(
        client_context(), socket.create_connection(server.local_address), server_hostname="localhost", do_handshake_on_connect=False
    )
    client = recorder.of(Client, "on_connect")(socket=sock, proxy_header=V1)
    recorder.wait_for("connect")
    assert next(event for event in recorder if event[0] == "connect")[1] == CLIENT
    client.abort()
    recorder.wait_for("close")


def test_client_on_a_socket_that_speaks_tls_already_refuses(open_server, tls_peer, recorder):
    class Accepting(StreamServer):
        def on_accept(self, sock, addr):
            def adopt():
                with pytest.raises(ChannelStateError, match="goes out before the TLS handshake"):
                    Client(socket=sock, proxy_header="v1")
                recorder("refused")
                sock.sendall(b"still usable")
                sock.close()

            gevent.spawn(adopt).join()

    server = open_server(Accepting(ssl_options=server_context()).listen(LOCAL))
    assert tls_peer(server).recv_exactly(12) == b"still usable"
    assert recorder == ["refused"]


def test_client_that_a_server_accepts_sends_none(behind, recorder, peer):
    class Odd(Client):
        proxy_header = V1

    server = behind("auto", base=Odd)
    one = peer(server)
    one.send(V2)
    assert answers(one)
    assert recorder[0][2].version == 2


def test_memory_pair_carries_it_like_everything_else(recorder):
    class Mine(Client):
        proxy_header = "v2"

        def on_connect(self):
            self.write(b"hello")

    client, end = memory_pair(Mine)
    # Its addresses are none of the kinds that there are.
    expected = build(2, None, None) + b"hello"
    assert end.wait_for(len(expected)) == expected
    end.close()
    until(lambda: client.closed)


def full_socket(listening_peer):
    """Return a connected gevent socket that takes nothing more, what is in it, and its plain peer."""
    listener = listening_peer(rcvbuf=4096)
    sock = gevent.socket.create_connection(listener.address)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sock.setblocking(False)
    filled = 0
    deadline = time.monotonic() + 5
    quiet = 0
    while quiet < 5:
        assert time.monotonic() < deadline
        try:
            filled += sock._sock.send(bytes(4096))
            quiet = 0
        except BlockingIOError:
            quiet += 1
            gevent.sleep(0.002)
    return sock, filled, listener.accept()


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_client_header_that_the_kernel_does_not_take_at_once_goes_out_whole(listening_peer, recorder, secure):
    sock, filled, far = full_socket(listening_peer)
    header = build(2, CLIENT, DIALLED, tlvs=[(0xE0, bytes(range(256)) * 200)])
    options = {"context": client_context(), "server_hostname": "localhost"} if secure else None
    client = recorder.of(Client, "on_connect")(socket=sock, proxy_header=header, ssl_options=options)
    turns(5)
    assert recorder == []
    assert far.recv_exactly(filled + len(header)) == bytes(filled) + header
    if secure:
        assert far.recv_exactly(1) == b"\x16"
    else:
        recorder.wait_for("on_connect")
        client.write(b"hello")
        assert far.recv_exactly(5) == b"hello"
    client.abort()
    until(lambda: client.closed and client._greenlet is None)


@pytest.fixture
def stuck(listening_peer, recorder):
    """Return a function that makes a client whose header waits, for its peer takes nothing: ``client, far = stuck(**attributes)``."""
    made = []

    def make(**attributes):
        sock, _, far = full_socket(listening_peer)
        client = recorder.of(Client, "on_connect", "on_connect_error", "on_close", **attributes)(socket=sock, proxy_header="v1")
        made.append(client)
        turns(3)
        return client, far

    yield make
    for one in made:
        one.abort()


def test_client_header_that_waits_is_given_up_after_connect_timeout(stuck, recorder):
    client, _ = stuck(connect_timeout=0.05)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect_error", "on_close"]
    assert "within connect_timeout, 0.05 seconds" in str(recorder[0][1])
    assert client.close_reason is CloseReason.CONNECT_FAILED


@pytest.mark.parametrize("how", ["close", "end", "abort"])
def test_client_can_be_closed_while_its_header_waits(stuck, recorder, how):
    client, _ = stuck()
    getattr(client, how)()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_close"]


def test_client_whose_peer_leaves_before_the_header_could_not_connect(stuck, recorder):
    client, far = stuck()
    far.reset()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect_error", "on_close"]
    error = recorder[0][1]
    assert isinstance(error, StreamConnectError)
    assert error.errno is not None
    assert "cannot send the PROXY header to" in str(error)
    assert client.close_reason is CloseReason.CONNECT_FAILED
    assert client.close_error is error


# ---- a real haproxy


HAPROXY = shutil.which("haproxy", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin")))

needs_haproxy = pytest.mark.skipif(HAPROXY is None, reason="this machine has no haproxy")

CONFIGURATION = """
global
    nbthread 1
    stats timeout 5s
defaults
    mode tcp
    timeout connect 5s
    timeout client 5s
    timeout server 5s
"""


class HAProxy:
    """A haproxy at work; a context manager that ends it.

    It accepts from sockets that were bound here, so that nobody has to look for free ports, or to wait until it listens.

    Args:
        folder: where its files are to be.
        routes: by a name each, the options of ``bind`` and those of ``server``, its address first; and further lines, if any.

    Attributes:
        addresses: where it listens, by the same names.
    """

    def __init__(self, folder, routes):
        self._sockets = {name: PlainSocket() for name in routes}
        text = [CONFIGURATION]
        for name, (bind, server, *more) in routes.items():
            self._sockets[name].bind(LOCAL)
            self._sockets[name].listen()
            text.append(f"listen {name}\n    bind fd@{self._sockets[name].fileno()} {bind}\n    server s {server}\n")
            text.extend(f"    {line}\n" for line in more)
        self.addresses = {name: one.getsockname() for name, one in self._sockets.items()}
        path = folder / "haproxy.cfg"
        path.write_text("".join(text))
        self._log = (folder / "haproxy.log").open("w+b")
        self.process = gevent.subprocess.Popen(
            [HAPROXY, "-db", "-f", str(path)],
            pass_fds=[one.fileno() for one in self._sockets.values()],
            stdin=gevent.subprocess.DEVNULL,
            stdout=self._log,
            stderr=gevent.subprocess.STDOUT,
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for one in self._sockets.values():
            one.close()
        if kind is not None:
            self._log.seek(0)
            print("haproxy said:", self._log.read().decode(errors="replace"))
        self._log.close()


def at(server):
    return "{}:{}".format(*server.local_address)


def pem_of(tmp_path, name, options):
    """Return the path of a file with a certificate and its key, as haproxy wants them."""
    path = tmp_path / name
    path.write_bytes(b"".join(Path(options[kind]).read_bytes() for kind in ("certfile", "keyfile")))
    return path


@needs_haproxy
def test_haproxy_tells_of_its_clients(behind, recorder, peer, tmp_path):
    plain, secure, v1 = behind(), behind(ssl_options=server_context()), behind("v1")
    unix = behind("v2", str(tmp_path / "socket"))
    trusting = f"ssl verify required ca-file {authority().file} sni str(localhost) verifyhost localhost"
    routes = {
        "v1": ("", f"{at(v1)} send-proxy"),
        "v2": ("", f"{at(plain)} send-proxy-v2"),
        "checksum": ("", f"{at(plain)} send-proxy-v2 proxy-v2-options crc32c,unique-id", "unique-id-format pants-%pid"),
        "tls-v1": ("", f"{at(secure)} send-proxy ssl verify none"),
        "tls-v2": ("", f"{at(secure)} send-proxy-v2 {trusting}"),
        "unix": ("", f"unix@{unix.local_address} send-proxy-v2"),
    }
    data = os.urandom(100_000)
    with HAProxy(tmp_path, routes) as proxy:
        for name, address in proxy.addresses.items():
            recorder.clear()
            with peer(address) as one:
                sender = gevent.spawn(one.send, data)
                assert one.recv_exactly(len(data)) == data
                sender.get()
                _, remote, header = recorder[0]
                assert (remote, header.source, header.destination) == (one.address, one.address, address)
                assert header.version == 1 + ("v1" not in name)
                assert (header.crc32c is not None, header.unique_id) == ((True, header.unique_id) if name == "checksum" else (False, None))
                if name == "checksum":
                    assert header.unique_id.startswith(b"pants-")
                one.shutdown_output()
                assert one.at_eof()
            recorder.wait_for("close")
            assert reads_of(recorder) == data


@needs_haproxy
def test_haproxy_ends_tls_and_tells_of_it(behind, recorder, tls_peer, tmp_path):
    server = behind("v2")
    certificate = pem_of(tmp_path, "localhost.pem", authority().localhost)
    bind = f"ssl crt {certificate} alpn h2,pants ca-file {authority().file} verify optional"
    routes = {
        "cn": (bind, f"{at(server)} send-proxy-v2-ssl-cn"),
        "all": (bind, f"{at(server)} send-proxy-v2 proxy-v2-options ssl,cert-cn,ssl-cipher,cert-sig,cert-key,authority,crc32c"),
    }
    context = client_context("1.2")
    context.load_cert_chain(**authority().issue("ann@example.org", common_name="Ann"))
    context.set_alpn_protocols(["pants"])
    with HAProxy(tmp_path, routes) as proxy:
        for name, address in proxy.addresses.items():
            recorder.clear()
            one = tls_peer(address, context=context)
            assert answers(one)
            _, remote, header = recorder[0]
            assert remote == one.address
            assert header.alpn == b"pants"
            told = header.ssl
            assert told.tls
            assert told.verified
            assert told.certificate_on_connection
            assert (told.version, told.cn) == ("TLSv1.2", "Ann")
            if name == "all":
                assert header.authority == "localhost"
                assert header.crc32c is not None
                assert told.cipher == one.object.cipher()[0]
                assert told.sig_alg
                assert told.key_alg
        recorder.clear()
        one = tls_peer(proxy.addresses["all"])  # without a certificate, and without ALPN
        assert answers(one)
        header = recorder[0][2]
        assert header.alpn is None
        assert header.ssl.tls
        assert not header.ssl.verified
        assert header.ssl.cn is None


@needs_haproxy
def test_haproxy_checks_health_and_nobody_is_alarmed(behind, recorder, peer, said, tmp_path):
    v1, v2, bare = behind("v1"), behind("v2"), behind("v2")
    routes = {
        "v1": ("", f"{at(v1)} send-proxy check inter 10ms"),
        "v2": ("", f"{at(v2)} send-proxy-v2 check inter 10ms"),
        # Without a header: it looks at the port only, and on Linux resets the connection before that has come to stand.
        "bare": ("", f"{at(bare)} send-proxy-v2 check inter 10ms port {bare.local_address[1]}"),
    }
    with HAProxy(tmp_path, routes) as proxy:
        recorder.wait_for(lambda events: {event[2].version for event in events if event[0] == "connect"} == {1, 2})
        clients = set()
        for name, address in proxy.addresses.items():
            one = peer(address)
            clients.add(one.address[1])
            assert answers(one, name.encode())
    told = [event[1:] for event in recorder if event[0] == "connect"]
    assert all(header.local for remote, header in told if header.version == 2 and remote[1] not in clients)
    assert {remote[0] for remote, _ in told} == {"127.0.0.1"}
    assert said() == []


@needs_haproxy
def test_haproxy_believes_our_client(behind, recorder, tmp_path):
    server = behind("v2")
    certificate = pem_of(tmp_path, "localhost.pem", authority().localhost)
    routes = {
        "plain": ("accept-proxy", f"{at(server)} send-proxy-v2 proxy-v2-options authority"),
        "tls": (f"accept-proxy ssl crt {certificate}", f"{at(server)} send-proxy-v2 proxy-v2-options authority"),
    }
    with HAProxy(tmp_path, routes) as proxy:
        for name, address in proxy.addresses.items():
            options = {"context": client_context(), "server_hostname": "localhost"} if name == "tls" else None
            for header, told in (("v1", None), ("v2", None), *(HEADERS[one] for one in HEADERS if one != "v2-unix")):
                recorder.clear()
                client = recorder.of(Client, "on_connect", "on_read")(ssl_options=options, proxy_header=header)
                client.connect(address)
                recorder.wait_for("on_connect")
                client.write(b"hello")
                recorder.wait_for(("on_read", b"hello"))
                (remote,) = [event[1] for event in recorder if event[0] == "connect"]
                assert remote == (told or client.local_address)
                client.abort()
                recorder.wait_for("close")
