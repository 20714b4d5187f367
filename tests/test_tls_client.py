"""Clients that speak TLS from the first byte on: whom they trust, how the handshake fails, and how the connection ends."""

import gc
import re
import socket
import ssl
import time

import gevent
import gevent.ssl
import pytest
from certificates import authority, client_context, other_authority, server_context
from gevent import socket as gevent_socket
from needs import needs_ipv6
from tls_peers import TLSPeer
from waiting import nothing_is_kept, turns, unsent, until  # noqa: F401

from pants_green import ChannelClosed, Client, CloseReason, Connection, Server, Stream
from pants_green._address import Address
from pants_green.errors import HandshakeTimeout

KIB = 1024
MIB = 1024 * KIB

VERSIONS = ["1.2", "1.3"]
both_versions = pytest.mark.parametrize("version", VERSIONS)

#: The callbacks that are recorded.
NAMES = (
    "on_connect",
    "on_connect_error",
    "on_read",
    "on_ssl_handshake",
    "on_ssl_handshake_error",
    "on_ssl_error",
    "on_end",
    "on_timeout",
    "on_error",
    "on_close",
)


def trust(**more):
    """Return the options of a client that trusts the tests' authority."""
    return {"ca_certs": authority().file, **more}


def context_of(*names, version=None, **options):
    """Return a server's context with a certificate for `names`."""
    context = server_context(version)
    context.load_cert_chain(**authority().issue(*names, **options))
    return context


class Listener:
    """A plain listener whose connections may be secured, as the server's side."""

    def __init__(self, peer):
        self._peer = peer
        self.address = peer.address
        self.accepted = []

    def accept(self):
        peer = self._peer.accept()
        self.accepted.append(peer)
        return peer

    def secure(self, version=None, context=None, shake=True):
        """Accept a connection and do the handshake."""
        made = TLSPeer.over(self.accept(), context or server_context(version), server_side=True, shake=shake)
        self.accepted.append(made)
        return made


@pytest.fixture
def listener(listening_peer):
    """Return a listener at 127.0.0.1."""
    made = Listener(listening_peer())
    yield made
    for one in made.accepted:
        one.close()


@pytest.fixture
def slow_listener(listening_peer):
    """Return a listener whose connections take little at a time."""
    made = Listener(listening_peer(rcvbuf=32 * KIB))
    yield made
    for one in made.accepted:
        one.close()


@pytest.fixture
def client_of(recorder):
    """Return a function that makes a recording client and has it dial: ``client_of(address, ssl_options, **attributes)``."""
    made = []

    def make(address, ssl_options, kind=Client, **attributes):
        client = recorder.of(kind, *NAMES, **attributes)(ssl_options=ssl_options).connect(address)
        made.append(client)
        return client

    yield make
    for one in made:
        one.abort()


def shake_and(tls, *operations):
    """Do the handshake and then some operations, and send what comes of all that, from the server's last flight on, at once."""

    def operation():
        tls.object.do_handshake()
        for one, *args in operations:
            try:
                one(*args)
            except ssl.SSLWantReadError:
                pass  # unwrap: the other side has not said goodbye

    def pump():
        # As _pump, but what the operations leave is sent in one piece.
        while True:
            try:
                operation()
            except ssl.SSLWantReadError:
                tls._send_all()
                tls._incoming.write(tls.socket.recv(65536))
            else:
                return tls._send_all()

    tls._run(pump)


# ---- Beginning


def start_before(client, address):
    assert client.startSSL(trust()) is client
    client.connect(address)


def start_between(client, address):
    client.connect(address)
    client.startSSL(trust())


BEGINNINGS = {"before connect": start_before, "behind connect": start_between}


@both_versions
@pytest.mark.parametrize("kind", [Client, Stream])
@pytest.mark.parametrize("begin", [*BEGINNINGS, "constructor"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_client_speaks_tls_from_the_first_byte_on(listener, recorder, begin, kind, version, host):
    made = recorder.of(kind, *NAMES, on_connect=lambda self: self.write(b"hello"))
    address = (host, listener.address[1])
    if begin == "constructor":
        client = made(ssl_options=trust()).connect(address)
    else:
        client = made()
        assert not client.ssl_enabled
        BEGINNINGS[begin](client, address)
    assert client.ssl_enabled
    assert recorder == []
    with listener.secure(version) as tls:
        assert tls.recv_exactly(5) == b"hello"
        tls.send(b"answer")
        recorder.wait_for(("on_read", b"answer"))
        tls.shutdown_output()
        assert tls.at_eof()
    recorder.wait_for("on_close")
    assert recorder == [("on_ssl_handshake",), ("on_connect",), ("on_read", b"answer"), ("on_end", b""), ("on_close",)]


@both_versions
def test_much_goes_both_ways_and_arrives_whole(listener, client_of, recorder, version):
    data = bytes(range(256)) * 4 * KIB * 4

    def on_connect(self):
        self.write(data)
        recorder("got", self.read(len(data)) == data)

    client_of(listener.address, trust(), on_connect=on_connect, on_read=Client.on_read)
    tls = listener.secure(version)
    assert tls.recv_exactly(len(data)) == data
    tls.send(data)
    recorder.wait_for(("got", True))


@both_versions
def test_records_that_arrive_byte_by_byte_are_read(listener, client_of, recorder, version):
    client_of(listener.address, trust(), read_delimiter=b"\n")
    tls = listener.secure(version)
    for byte in tls.encrypt(b"one\ntw") + tls.encrypt(b"o\n"):
        tls.send_raw(bytes([byte]))
    recorder.wait_for(("on_read", b"two"))
    assert recorder == [("on_ssl_handshake",), ("on_connect",), ("on_read", b"one"), ("on_read", b"two")]


def test_refused_connection_is_on_connect_error_alone(client_of, recorder):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        client_of(bound.getsockname(), trust())
        recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect_error", "on_close"]


def test_on_ssl_handshake_that_closes_is_not_followed_by_on_connect(listener, client_of, recorder):
    client_of(listener.address, trust(), on_ssl_handshake=lambda self: self.close())
    tls = listener.secure()
    assert tls.at_eof()
    recorder.wait_for("on_close")
    assert recorder == [("on_ssl_handshake",), ("on_close",)]


def test_on_ssl_handshake_that_ends_the_output_is_followed_by_on_connect_and_reading(listener, client_of, recorder):
    client = client_of(listener.address, trust(), on_ssl_handshake=lambda self: self.write_eof())
    tls = listener.secure()
    assert tls.at_eof()
    tls.send(b"answer")
    recorder.wait_for(("on_read", b"answer"))
    assert client.connected
    tls.shutdown_output()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_ssl_handshake", "on_connect", "on_read", "on_end", "on_close"]


def test_startSSL_twice_is_refused(recorder):
    client = Client(ssl_options=trust())
    with pytest.raises(RuntimeError, match="speaks TLS already"):
        client.startSSL(trust())


def test_write_before_the_handshake_is_refused(listener, client_of, recorder):
    client = client_of(listener.address, trust())
    plain = listener.accept()
    plain.recv(5)  # the client is in the handshake
    with pytest.raises(ChannelClosed, match="not connected yet"):
        client.write(b"too early")
    assert (client.connecting, client.connected) == (True, False)


# ---- Whom it trusts


def is_refused(recorder, error=ssl.SSLCertVerificationError):
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_ssl_handshake_error", "on_close"]
    assert isinstance(recorder[0][1], error)


def secure_in_vain(listener, *args, **options):
    """Do a handshake that ends in the client's alert, or in its end."""
    with pytest.raises(OSError):  # noqa: PT011
        listener.secure(*args, **options).recv()


DEFAULTS = [None, {}, {"server_hostname": "localhost"}, {"check_hostname": False}, {"cert_reqs": ssl.CERT_REQUIRED}]


@both_versions
@pytest.mark.parametrize("options", DEFAULTS)
def test_e1_17_certificate_of_an_unknown_authority_is_refused_by_default(listener, client_of, recorder, options, version):
    client = recorder.of(Client, *NAMES)().startSSL(options).connect(listener.address)
    secure_in_vain(listener, version)
    is_refused(recorder)
    assert "self-signed" in str(recorder[0][1]) or "local issuer" in str(recorder[0][1])
    assert client.close_reason is CloseReason.TLS_FAILED


def test_certificate_of_another_authority_than_the_given_one_is_refused(listener, client_of, recorder):
    client_of(listener.address, {"ca_certs": other_authority().file})
    secure_in_vain(listener)
    is_refused(recorder)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_certificate_of_another_host_is_refused(listener, client_of, recorder, host):
    client_of((host, listener.address[1]), trust())
    secure_in_vain(listener, context=context_of("other.example"))
    is_refused(recorder)
    assert "mismatch" in str(recorder[0][1])


def test_certificate_of_another_than_the_given_name_is_refused(listener, client_of, recorder):
    client_of(listener.address, trust(server_hostname="wrong.example"))
    secure_in_vain(listener)
    is_refused(recorder)
    assert "wrong.example" in str(recorder[0][1])


def test_certificate_of_the_name_does_for_no_address(listener, client_of, recorder):
    client_of(listener.address, trust())
    secure_in_vain(listener, context=context_of("localhost"))
    is_refused(recorder)


def test_expired_certificate_is_refused(listener, client_of, recorder):
    import datetime

    client_of(listener.address, trust())
    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    secure_in_vain(listener, context=context_of("127.0.0.1", not_after=past))
    is_refused(recorder)
    assert "expired" in str(recorder[0][1])


@pytest.fixture
def names(monkeypatch):
    """Have every name looked up as this machine's."""

    def resolve(address):
        return [Address(socket.AF_INET, ("127.0.0.1", address.sockaddr[1]), False)] if address.needs_lookup else [address]

    monkeypatch.setattr("pants_green._sockets.resolve", resolve)


DIALLED = [
    ("127.0.0.1", "127.0.0.1"),
    pytest.param("::1", "::1", marks=needs_ipv6),
    ("service.example", "service.example"),
    ("service.example.", "service.example"),
    ("Service.Example", "service.example"),
]


@pytest.mark.parametrize(("host", "name"), DIALLED)
def test_host_that_was_dialled_is_looked_for_in_the_certificate(listening_peer, client_of, recorder, names, host, name):
    listener = Listener(listening_peer(("::1" if host == "::1" else "127.0.0.1", 0)))
    client_of((host, listener.address[1]), trust())
    with listener.secure(context=context_of(name)):
        recorder.wait_for("on_connect")


@pytest.mark.parametrize("name", ["service.example", "SERVICE.example", "service.example.", "a.wild.example"])
def test_server_hostname_stands_for_the_host_that_was_dialled(listener, client_of, recorder, name):
    client_of(listener.address, trust(server_hostname=name))
    with listener.secure(context=context_of("service.example", "*.wild.example")):
        recorder.wait_for("on_connect")


def test_server_hostname_may_be_international(listener, client_of, recorder):
    client_of(listener.address, trust(server_hostname="bücher.example"))
    with listener.secure(context=context_of("xn--bcher-kva.example")):
        recorder.wait_for("on_connect")


@both_versions
def test_cert_none_takes_any_certificate(listener, client_of, recorder, version):
    client = client_of(listener.address, {"cert_reqs": ssl.CERT_NONE, "server_hostname": "wrong.example"})
    with listener.secure(version):
        recorder.wait_for("on_connect")
        assert client.peer_certificate == {}


def test_without_check_hostname_any_name_of_the_authority_does(listener, client_of, recorder):
    client = client_of(listener.address, trust(check_hostname=False))
    with listener.secure(context=context_of("other.example")):
        recorder.wait_for("on_connect")
        assert client.peer_certificate["subjectAltName"] == (("DNS", "other.example"),)


# ---- Without a host: Unix sockets, and connections made elsewhere


@pytest.fixture
def unix_listener(listening_peer, tmp_path):
    made = Listener(listening_peer(str(tmp_path / "socket")))
    yield made
    for one in made.accepted:
        one.close()


def test_unix_socket_without_server_hostname_is_an_error_at_the_dial(unix_listener, client_of, recorder):
    client = client_of(unix_listener.address, trust())
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_ssl_error", "on_close"]
    assert isinstance(recorder[0][1], ValueError)
    assert "server_hostname" in str(recorder[0][1])
    assert client.close_reason is CloseReason.TLS_FAILED


@pytest.mark.parametrize("more", [{"server_hostname": "localhost"}, {"check_hostname": False}])
def test_unix_socket_with_what_it_takes_speaks_tls(unix_listener, client_of, recorder, more):
    client_of(unix_listener.address, trust(**more))
    with unix_listener.secure() as tls:
        tls.send(b"hello")
        recorder.wait_for(("on_read", b"hello"))


def test_adopted_socket_without_server_hostname_is_refused_at_the_call(listener, recorder):
    def on_connect(self):
        with pytest.raises(ValueError, match="server_hostname"):
            self.startSSL(trust())
        recorder("enabled", self.ssl_enabled)
        self.write(b"clear")

    stream = recorder.of(Stream, "on_close", on_connect=on_connect)(socket=gevent_socket.create_connection(listener.address))
    assert listener.accept().recv_exactly(5) == b"clear"
    assert recorder == [("enabled", False)]
    stream.abort()
    recorder.wait_for("on_close")


def test_adopted_socket_with_server_hostname_speaks_tls(listener, recorder):
    sock = gevent_socket.create_connection(listener.address)
    stream = recorder.of(Stream, *NAMES)(socket=sock, ssl_options=trust(server_hostname="localhost"))
    with listener.secure() as tls:
        tls.send(b"hello")
        recorder.wait_for(("on_read", b"hello"))
        stream.end()
        assert tls.recv_all() == b""
    recorder.wait_for("on_close")
    assert recorder == [("on_ssl_handshake",), ("on_connect",), ("on_read", b"hello"), ("on_close",)]


def test_adopted_socket_whose_name_nobody_knows_never_connects(listener, recorder):
    sock = gevent_socket.create_connection(listener.address)
    try:
        recorder.of(Stream, *NAMES)(socket=sock, ssl_options=trust())
    except ValueError as error:
        sock.close()
        recorder("refused", str(error))
    else:
        recorder.wait_for("on_close")
        recorder("refused", str(recorder[0][1]))
        assert recorder.names()[:2] == ["on_ssl_error", "on_close"]
    assert "server_hostname" in recorder[-1][1]
    assert listener.accept().recv_all() == b""


# ---- The name that is asked for


@pytest.fixture
def named_server(server_of, recorder):
    """Return a server that records the names that clients ask for, and echoes."""

    class Echo(Connection):
        def on_read(self, data):
            self.write(data)

    context = context_of("localhost", "127.0.0.1", "::1", "service.example", "xn--bcher-kva.example")
    context.sni_callback = lambda connection, name, current: recorder("sni", name)
    server = server_of(Echo, 0)
    server.startSSL(context)
    return server


ASKED = [
    pytest.param("127.0.0.1", {}, None, id="IPv4"),
    pytest.param("::1", {}, None, id="IPv6", marks=needs_ipv6),
    pytest.param("localhost", {}, "localhost", id="name"),
    pytest.param("localhost.", {}, "localhost", id="trailing dot"),
    pytest.param("service.example", {}, "service.example", id="another name"),
    pytest.param("127.0.0.1", {"server_hostname": "service.example"}, "service.example", id="given"),
    pytest.param("localhost", {"server_hostname": "service.example"}, "service.example", id="given, not the one dialled"),
    pytest.param("127.0.0.1", {"server_hostname": "service.example."}, "service.example", id="given with a trailing dot"),
    pytest.param("localhost", {"server_hostname": "127.0.0.1"}, None, id="given address"),
    pytest.param("localhost", {"server_hostname": "bücher.example"}, "xn--bcher-kva.example", id="international"),
    pytest.param("localhost", {"check_hostname": False}, "localhost", id="not checked"),
    pytest.param("localhost", {"cert_reqs": ssl.CERT_NONE, "ca_certs": None}, "localhost", id="nothing checked"),
]


@pytest.mark.parametrize(("host", "options", "name"), ASKED)
def test_name_is_asked_for_unless_it_is_an_address(named_server, client_of, recorder, names, host, options, name):
    client = client_of((host, named_server.local_address[1]), trust(**options))
    recorder.wait_for("on_connect")
    assert recorder[0] == ("sni", name)
    client.end()
    recorder.wait_for("on_close")


# ---- What both sides agree on


@pytest.mark.parametrize(
    ("offered", "known", "chosen"),
    [
        (["http/1.1"], ["h2", "http/1.1"], "http/1.1"),
        (["h2", "http/1.1"], ["h2", "http/1.1"], "h2"),
        (["gopher"], ["h2"], None),
        (None, ["h2"], None),
        (["h2"], None, None),
    ],
)
def test_alpn_protocol_is_what_both_sides_know(listener, client_of, recorder, offered, known, chosen):
    context = server_context()
    if known is not None:
        context.set_alpn_protocols(known)
    client = client_of(listener.address, trust() if offered is None else trust(alpn_protocols=offered))
    with listener.secure(context=context) as tls:
        recorder.wait_for("on_connect")
        assert client.alpn_protocol == chosen
        assert tls.object.selected_alpn_protocol() == chosen


def asking(version):
    """Return a server's context that asks for a certificate."""
    context = server_context(version)
    context.load_verify_locations(authority().file)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@both_versions
def test_certificate_of_the_client_is_shown(listener, client_of, recorder, version):
    client_of(listener.address, trust(**authority().issue("client.example")))
    with listener.secure(context=asking(version)) as tls:
        recorder.wait_for("on_connect")
        assert tls.object.getpeercert()["subjectAltName"] == (("DNS", "client.example"),)


@both_versions
def test_client_without_the_certificate_that_is_wanted_is_told(listener, client_of, recorder, version):
    client_of(listener.address, trust())
    secure_in_vain(listener, context=asking(version))
    recorder.wait_for("on_close")
    if version == "1.2":
        assert recorder.names() == ["on_ssl_handshake_error", "on_close"]
    else:  # the client's handshake is done before the server has looked
        assert recorder.names() == ["on_ssl_handshake", "on_connect", "on_ssl_error", "on_close"]
    assert isinstance(recorder[-2][1], ssl.SSLError)


def test_versions_that_have_nothing_in_common_fail(listener, client_of, recorder):
    client_of(listener.address, trust(ssl_version=ssl.PROTOCOL_TLSv1_2))
    secure_in_vain(listener, "1.3")
    is_refused(recorder, ssl.SSLError)


PROPERTIES = ("ssl_enabled", "ssl_object", "peer_certificate", "cipher", "alpn_protocol")


def properties(stream):
    return tuple(getattr(stream, name) for name in PROPERTIES)


@both_versions
def test_properties_tell_of_tls_before_during_after_and_in_on_close(listener, recorder, version):
    def noting(name):
        return lambda self, *args: recorder(name, *properties(self))

    kind = type("Noting", (Client,), {name: noting(name) for name in ("on_ssl_handshake", "on_connect", "on_close")})
    client = kind()
    assert properties(client) == (False, None, None, None, None)
    client.startSSL(trust(alpn_protocols=["x"]))
    assert properties(client) == (True, None, None, None, None)
    client.connect(listener.address)
    plain = listener.accept()
    hello = plain.recv()
    assert client.ssl_enabled
    assert isinstance(client.ssl_object, ssl.SSLObject)
    assert properties(client)[2:] == (None, None, None)
    context = server_context(version)
    context.set_alpn_protocols(["x"])
    tls = TLSPeer.over(plain, context, server_side=True, shake=False)
    tls._incoming.write(hello)
    tls.shake_hands()
    recorder.wait_for("on_connect")
    tls.shutdown_output()
    recorder.wait_for("on_close")
    for _, enabled, ssl_object, certificate, cipher, protocol in recorder:
        assert enabled is True
        assert ssl_object is client.ssl_object
        assert ("DNS", "localhost") in certificate["subjectAltName"]
        assert cipher == tls.object.cipher()
        assert ssl_object.version() == f"TLSv{version}"
        assert protocol == "x"
    assert recorder.names() == ["on_ssl_handshake", "on_connect", "on_close"]


def test_properties_after_a_failed_handshake_tell_nothing(listener, client_of, recorder):
    def on_close(self):
        recorder("closed", *properties(self)[2:])

    client_of(listener.address, {}, on_close=on_close)
    secure_in_vain(listener)
    recorder.wait_for("closed")
    assert recorder[-1] == ("closed", None, None, None)


# ---- A handshake that does not come to its end

LIMITS = {
    "class": ({"handshake_timeout": 0.05}, {}),
    "instance": ({}, {}),
    "option": ({"handshake_timeout": 20}, {"handshake_timeout": 0.05}),
}


@pytest.mark.parametrize("where", LIMITS)
def test_silent_server_is_given_up_after_handshake_timeout(listener, recorder, where):
    attributes, options = LIMITS[where]
    client = recorder.of(Client, *NAMES, **attributes)(ssl_options=trust(**options))
    if where == "instance":
        client.handshake_timeout = 0.05
    began = time.monotonic()
    client.connect(listener.address)
    is_refused(recorder, HandshakeTimeout)
    assert 0.04 < time.monotonic() - began < 3
    assert isinstance(recorder[0][1], TimeoutError)
    assert client.close_reason is CloseReason.TLS_FAILED


@pytest.mark.parametrize("where", ["class", "option"])
def test_no_handshake_timeout_is_no_limit(listener, client_of, recorder, where):
    unlimited = {"handshake_timeout": None}
    attributes, options = (unlimited, {}) if where == "class" else ({"handshake_timeout": 0.02}, unlimited)
    client_of(listener.address, trust(**options), **attributes)
    tls = listener.secure(shake=False)
    gevent.sleep(0.05)  # not to wait for something: for nothing to happen
    assert recorder == []
    tls.shake_hands()
    recorder.wait_for("on_connect")


@pytest.mark.parametrize(
    ("ending", "reason"),
    [("close", CloseReason.CLOSED_HERE), ("abort", CloseReason.ABORTED_HERE), ("end", CloseReason.ENDED_HERE)],
)
def test_closing_during_the_handshake_ends_it_without_an_error(listener, client_of, recorder, ending, reason):
    client = client_of(listener.address, trust())
    plain = listener.accept()
    header = plain.recv_exactly(5)
    getattr(client, ending)()
    assert client.closed
    assert recorder == []
    recorder.wait_for("on_close")
    assert recorder == [("on_close",)]
    assert client.close_reason is reason
    if ending == "abort":
        assert plain.raises_reset()
    else:
        assert len(plain.recv_all()) == int.from_bytes(header[3:])  # the rest of its hello, and nothing else


SERVERS = {
    "speaks plain text": lambda plain: plain.send(b"220 mail.example ESMTP\r\n"),
    "speaks HTTP": lambda plain: plain.send(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "closes at once": lambda plain: plain.close(),
    "ends at once": lambda plain: plain.shutdown_output(),
    "resets": lambda plain: plain.reset(),
    "ends in mid-record": lambda plain: (plain.send(b"\x16\x03\x03\x02\x00\x02"), plain.shutdown_output()),
    "sends an alert": lambda plain: plain.send(b"\x15\x03\x03\x00\x02\x02\x28"),
}


@pytest.mark.parametrize("behaviour", SERVERS)
def test_server_that_cannot_shake_hands_is_an_error_before_any_on_connect(listener, client_of, recorder, behaviour):
    client = client_of(listener.address, trust())
    plain = listener.accept()
    plain.recv_exactly(5)
    SERVERS[behaviour](plain)
    is_refused(recorder, OSError)
    assert client.close_reason is CloseReason.TLS_FAILED


def test_300_clients_whose_handshake_fails_leave_nothing(server_of, recorder):
    def on_connect(self):
        self.write(b"220 mail.example ESMTP\r\n")
        self.end()

    class Failing(Client):
        def on_ssl_handshake_error(self, exception):
            recorder("failed")

        def on_close(self):
            recorder("closed")

    server = server_of(Connection, on_connect=on_connect)
    gc.collect()
    before = sum(isinstance(thing, ssl.SSLObject) for thing in gc.get_objects())
    options = trust()
    for number in range(1, 7):
        for _ in range(50):
            Failing(ssl_options=options).connect(server.local_address)
        recorder.wait_for(number * 100, timeout=15)
    assert (recorder.count("failed"), recorder.count("closed")) == (300, 300)
    turns()
    # What failed is not held by a circle that only the garbage collector would find.
    assert sum(isinstance(thing, ssl.SSLObject) for thing in gc.get_objects()) - before < 5


# ---- What comes with the last bytes of the handshake


def reading_in_on_connect(recorder, size):
    def on_connect(self):
        recorder("got", self.read(size))

    return on_connect


@both_versions
@pytest.mark.parametrize("style", ["read", "on_read"])
@pytest.mark.parametrize("size", [5, 40 * KIB])
def test_data_right_behind_the_handshake_is_delivered(listener, client_of, recorder, version, style, size):
    data = b"x" * size
    attributes = {"on_connect": reading_in_on_connect(recorder, size)} if style == "read" else {}
    client_of(listener.address, trust(), read_delimiter=size, **attributes)
    shake_and(tls := listener.secure(version, shake=False), (tls.object.write, data))
    first = ("got" if style == "read" else "on_read", data)
    recorder.wait_for(first)
    tls.send(b"y" * size)
    recorder.wait_for(("on_read", b"y" * size))
    assert recorder == [("on_ssl_handshake",), ("on_connect",), first, ("on_read", b"y" * size)]


@both_versions
def test_data_right_behind_the_handshake_waits_while_the_client_is_paused(listener, client_of, recorder, version):
    client = client_of(listener.address, trust(), on_connect=lambda self: self.pause())
    tls = listener.secure(version, shake=False)
    shake_and(tls, (tls.object.write, b"early"))
    recorder.wait_for("on_connect")
    turns()
    assert recorder == [("on_ssl_handshake",), ("on_connect",)]
    client.resume()
    recorder.wait_for(("on_read", b"early"))
    tls.send(b"later")
    recorder.wait_for(("on_read", b"later"))


def test_data_right_behind_the_handshake_is_there_for_a_read_that_does_not_wait(listener, client_of, recorder):
    def on_connect(self):
        gevent.sleep(0.01)  # TLS 1.2: all has come, in one segment with the end of the handshake
        recorder("got", self.read(5, timeout=0))

    client_of(listener.address, trust(), on_connect=on_connect)
    tls = listener.secure("1.2", shake=False)
    shake_and(tls, (tls.object.write, b"early"))
    recorder.wait_for("got")
    assert recorder == [("on_ssl_handshake",), ("on_connect",), ("got", b"early")]


@both_versions
@pytest.mark.parametrize("style", ["read", "on_read"])
def test_data_goodbye_and_fin_right_behind_the_handshake_are_all_seen(listener, client_of, recorder, version, style):
    attributes = {"on_connect": reading_in_on_connect(recorder, 5)} if style == "read" else {"read_delimiter": 5}
    client = client_of(listener.address, trust(), **attributes)
    tls = listener.secure(version, shake=False)
    shake_and(tls, (tls.object.write, b"hellorest"), (tls.object.unwrap,))
    tls.truncate_output()
    recorder.wait_for("on_close")
    got = ("got" if style == "read" else "on_read", b"hello")
    if style == "read":
        # What is left is a chunk of its own, for there is no delimiter.
        assert recorder == [("on_ssl_handshake",), ("on_connect",), got, ("on_read", b"rest"), ("on_end", b""), ("on_close",)]
    else:
        assert recorder == [("on_ssl_handshake",), ("on_connect",), got, ("on_end", b"rest"), ("on_close",)]
    assert client.close_reason is CloseReason.PEER_ENDED


@both_versions
def test_data_goodbye_and_fin_in_one_segment_are_all_seen(listener, client_of, recorder, version):
    client_of(listener.address, trust(), read_delimiter=b"\n")
    tls = listener.secure(version)
    recorder.wait_for("on_connect")
    records = tls.encrypt(b"one\ntwo\nre") + tls.encrypt(b"st")
    with pytest.raises(ssl.SSLWantReadError):
        tls.object.unwrap()
    tls.send_raw(records + tls._outgoing.read())
    tls.truncate_output()
    recorder.wait_for("on_close")
    chunks = [("on_read", b"one"), ("on_read", b"two")]
    assert recorder == [("on_ssl_handshake",), ("on_connect",), *chunks, ("on_end", b"rest"), ("on_close",)]


# ---- How it ends


@both_versions
def test_goodbye_without_fin_ends_the_client_promptly(listener, client_of, recorder, version):
    client_of(listener.address, trust())
    tls = listener.secure(version)
    recorder.wait_for("on_connect")
    began = time.monotonic()
    tls.say_goodbye()
    recorder.wait_for("on_close")
    assert time.monotonic() - began < 2
    assert recorder == [("on_ssl_handshake",), ("on_connect",), ("on_end", b""), ("on_close",)]
    assert tls.at_eof()
    assert tls.socket.recv(1) == b""


@both_versions
@pytest.mark.parametrize("style", ["on_read", "read"])
def test_truncation_is_an_error_and_no_end(listener, client_of, recorder, version, style):
    def on_connect(self):
        while style == "read":
            recorder("on_read", self.read())

    client = client_of(listener.address, trust(), on_connect=on_connect, read_delimiter=b"\n")
    tls = listener.secure(version)
    tls.send(b"one\ntw")
    recorder.wait_for(("on_read", b"one"))
    tls.truncate_output()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_ssl_handshake", "on_connect", "on_read", "on_ssl_error", "on_close"]
    assert isinstance(recorder[3][1], ssl.SSLEOFError)
    assert client.close_reason is CloseReason.TLS_FAILED


@both_versions
def test_truncation_in_mid_record_is_an_error_behind_whole_records(listener, client_of, recorder, version):
    client_of(listener.address, trust(), read_delimiter=b"\n")
    tls = listener.secure(version)
    recorder.wait_for("on_connect")
    tls.send_raw(tls.encrypt(b"one\n") + tls.encrypt(b"two\n")[:-1])
    tls.truncate_output()
    recorder.wait_for("on_close")
    assert recorder.names()[2:] == ["on_read", "on_ssl_error", "on_close"]
    assert recorder[2] == ("on_read", b"one")


@both_versions
def test_bytes_that_are_no_record_are_an_error_behind_whole_records(listener, client_of, recorder, version):
    client_of(listener.address, trust(), read_delimiter=b"\n")
    tls = listener.secure(version)
    recorder.wait_for("on_connect")
    tls.send_raw(tls.encrypt(b"one\n") + b"MAIL FROM: somebody on the way\r\n")
    recorder.wait_for("on_close")
    assert recorder.names()[2:] == ["on_read", "on_ssl_error", "on_close"]
    assert recorder[2] == ("on_read", b"one")
    assert isinstance(recorder[3][1], ssl.SSLError)


def test_reset_is_the_usual_way_of_a_peer_that_leaves(listener, client_of, recorder):
    client = client_of(listener.address, trust())
    tls = listener.secure()
    recorder.wait_for("on_connect")
    tls.reset()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_ssl_handshake", "on_connect", "on_close"]
    assert client.close_reason is CloseReason.PEER_LEFT


@both_versions
def test_write_eof_says_goodbye_and_the_client_reads_on(listener, client_of, recorder, version):
    def on_connect(self):
        self.write(b"question")
        self.write_eof()

    client_of(listener.address, trust(), on_connect=on_connect, read_delimiter=b"\n")
    tls = listener.secure(version)
    assert tls.recv_all() == b"question"
    assert tls.socket.recv(1) == b""  # a FIN, too
    answer = b"answer\n" * 100 * KIB
    tls.send(answer)
    tls.shutdown_output()
    recorder.wait_for("on_close")
    chunks = [("on_read", b"answer")] * 100 * KIB
    assert recorder == [("on_ssl_handshake",), ("on_connect",), *chunks, ("on_end", b""), ("on_close",)]


@both_versions
@pytest.mark.parametrize("fin", [True, False])
def test_half_open_client_writes_on_behind_the_server_s_goodbye(listener, client_of, recorder, version, fin):
    answer = b"answer" * 200 * KIB

    def on_end(self, rest):
        self.write(answer)
        gevent.spawn_later(0.01, self.end)

    client = client_of(listener.address, trust(), on_end=on_end, allow_half_open=True)
    tls = listener.secure(version)
    tls.send(b"question")
    if fin:
        tls.shutdown_output()
    else:
        tls.say_goodbye()
    assert tls.recv_all() == answer
    recorder.wait_for("on_close")
    assert recorder == [("on_ssl_handshake",), ("on_connect",), ("on_read", b"question"), ("on_end", b""), ("on_close",)]
    assert client.close_reason is CloseReason.ENDED_HERE


@both_versions
def test_answer_in_on_end_is_sent_before_the_goodbye(listener, client_of, recorder, version):
    answer = b"answer" * 100 * KIB
    client_of(listener.address, trust(), on_end=lambda self, rest: self.write(answer))
    tls = listener.secure(version)
    tls.shutdown_output()
    assert tls.recv_all() == answer
    recorder.wait_for("on_close")


@both_versions
def test_end_with_much_queued_to_a_slow_reader_sends_it_whole_with_a_goodbye(slow_listener, client_of, recorder, version):
    data = bytes(range(256)) * 20 * KIB

    def on_connect(self):
        self.write(data)
        self.end()

    client = client_of(slow_listener.address, trust(), on_connect=on_connect)
    tls = slow_listener.secure(version)
    recorder.wait_for("on_connect")
    turns(20)
    assert unsent(client) > 0
    assert tls.recv_all() == data
    recorder.wait_for("on_close")
    assert client.close_reason is CloseReason.ENDED_HERE


@both_versions
def test_end_reads_and_discards_while_the_server_is_still_writing(slow_listener, client_of, recorder, version):
    data = b"x" * 2 * MIB

    def on_connect(self):
        self.write(data)
        self.end()

    client_of(slow_listener.address, trust(), on_connect=on_connect)
    tls = slow_listener.secure(version)
    tls.send(data)  # reads nothing before all is sent
    assert tls.recv_all() == data
    recorder.wait_for("on_close")


def is_truncated(tls):
    with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
        tls.recv_all()


@both_versions
def test_close_with_output_that_cannot_be_sent_says_no_goodbye(slow_listener, client_of, recorder, version):
    client = client_of(slow_listener.address, trust(), on_connect=lambda self: self.write(b"x" * 12 * MIB))
    tls = slow_listener.secure(version)
    recorder.wait_for("on_connect")
    turns()
    client.close()
    recorder.wait_for("on_close")
    is_truncated(tls)


@both_versions
def test_e1_24_close_sends_what_is_written_and_says_goodbye(listener, client_of, recorder, version):
    def on_connect(self):
        self.write(b"bye")
        self.close()

    client_of(listener.address, trust(), on_connect=on_connect)
    assert listener.secure(version).recv_all() == b"bye"
    recorder.wait_for("on_close")
    assert recorder == [("on_ssl_handshake",), ("on_connect",), ("on_close",)]


def test_abort_resets(listener, client_of, recorder):
    client = client_of(listener.address, trust())
    tls = listener.secure()
    recorder.wait_for("on_connect")
    client.abort()
    assert tls.raises_reset()
    recorder.wait_for("on_close")


@both_versions
def test_exception_in_a_callback_says_no_goodbye(listener, client_of, recorder, version):
    def on_read(self, data):
        self.write(b"half of an ans")
        raise ValueError("a mistake")

    client_of(listener.address, trust(), on_read=on_read)
    tls = listener.secure(version)
    tls.send(b"question")
    is_truncated(tls)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_ssl_handshake", "on_connect", "on_read", "on_error", "on_close"]


def test_read_timeout_says_no_goodbye(listener, client_of, recorder):
    client_of(listener.address, trust(), read_delimiter=b"\n", read_timeout=0.02)
    tls = listener.secure()
    tls.send(b"half")
    is_truncated(tls)
    recorder.wait_for("on_close")
    assert recorder.names()[2:] == ["on_timeout", "on_close"]


# ---- What startSSL is given


def snapshot(context):
    names = ("verify_mode", "check_hostname", "options", "minimum_version", "maximum_version", "verify_flags", "sni_callback")
    return {name: getattr(context, name) for name in names}


CONTEXTS = {"ssl": ssl.SSLContext, "gevent": gevent.ssl.SSLContext}


@both_versions
@pytest.mark.parametrize("form", ["alone", "in a dict"])
@pytest.mark.parametrize("maker", CONTEXTS)
def test_context_of_the_caller_is_used_and_not_changed(listener, client_of, recorder, maker, form, version):
    context = CONTEXTS[maker](ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority().file)
    before = snapshot(context)
    client = client_of(listener.address, context if form == "alone" else {"context": context})
    with listener.secure(version) as tls:
        tls.send(b"hello")
        recorder.wait_for(("on_read", b"hello"))
        assert snapshot(context) == before
        assert client.ssl_object.context is context


@pytest.mark.parametrize("maker", CONTEXTS)
def test_context_that_trusts_nobody_refuses(listener, client_of, recorder, maker):
    client_of(listener.address, CONTEXTS[maker](ssl.PROTOCOL_TLS_CLIENT))
    secure_in_vain(listener)
    is_refused(recorder)


def test_options_are_never_modified_and_do_for_many_streams(listener, client_of, recorder):
    options = trust(server_hostname="localhost", alpn_protocols=["x"], handshake_timeout=5, **authority().issue("client.example"))
    before = {**options, "alpn_protocols": ["x"]}
    for number in range(2):
        client_of(listener.address, options)
        with listener.secure():
            recorder.wait_for(lambda events, number=number: events.names().count("on_connect") > number)
    assert options == before


def test_options_that_are_changed_behind_the_call_change_nothing(listener, client_of, recorder):
    options = trust()
    client = recorder.of(Client, *NAMES)(ssl_options=options)
    options.clear()
    client.connect(listener.address)
    with listener.secure():
        recorder.wait_for("on_connect")


class Speaking(Client):
    """For error messages, which name it."""


REFUSED = {
    "unknown": ({"cafile": "x"}, TypeError, "'cafile'"),
    "no options": ("x", TypeError, "'x'"),
    "no context": ({"context": "x"}, TypeError, "context"),
    "context and more": ({"context": client_context(), "ca_certs": "x"}, ValueError, "ca_certs"),
    "missing authority": ({"ca_certs": "/nonexistent/ca.pem"}, FileNotFoundError, "/nonexistent/ca.pem"),
    "missing certificate": ({"certfile": "/nonexistent/cert.pem"}, FileNotFoundError, "/nonexistent/cert.pem"),
    "missing key": ({"certfile": authority().localhost["certfile"], "keyfile": "/nonexistent/key.pem"}, FileNotFoundError, "key.pem"),
    "no PEM": ({"ca_certs": __file__}, ssl.SSLError, "test_tls_client.py"),
    "no PEM certificate": ({"certfile": __file__}, ssl.SSLError, "test_tls_client.py"),
    "key alone": ({"keyfile": authority().localhost["keyfile"]}, ValueError, "keyfile"),
    "key of another": (
        {"certfile": authority().localhost["certfile"], "keyfile": authority().issue("client.example")["keyfile"]},
        ssl.SSLError,
        authority().localhost["certfile"],
    ),
    "bad ciphers": ({"ciphers": "NO-SUCH"}, ValueError, "NO-SUCH"),
    "bad cert_reqs": ({"cert_reqs": 7}, ValueError, "cert_reqs"),
    "bad timeout": ({"handshake_timeout": 0}, ValueError, "handshake_timeout"),
    "timeout of no number": ({"handshake_timeout": "soon"}, TypeError, "handshake_timeout"),
    "protocols in one str": ({"alpn_protocols": "h2"}, TypeError, "alpn_protocols"),
    "blocking handshake": ({"do_handshake_on_connect": True}, ValueError, "do_handshake_on_connect"),
    "old version": ({"ssl_version": ssl.TLSVersion.TLSv1_1}, ValueError, "ssl_version"),
    "sni": ({"sni": {"x": authority().localhost}}, ValueError, "sni"),
    "empty name": ({"server_hostname": ""}, ValueError, "server_hostname"),
    "impossible name": ({"server_hostname": "a..b"}, ValueError, "server_hostname"),
    "name with a label that is too long": ({"server_hostname": "x" * 64 + ".example"}, ValueError, "server_hostname"),
    "no name": ({"server_hostname": 5}, TypeError, "server_hostname"),
    "contradiction": ({"cert_reqs": ssl.CERT_NONE, "check_hostname": True}, ValueError, "check_hostname"),
}


@pytest.mark.parametrize("at", ["startSSL", "constructor"])
@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_are_refused_at_the_call_with_the_name_of_what_is_wrong(case, at):
    options, error, told = REFUSED[case]
    with pytest.raises(error, match=re.escape(told)) as info:
        Speaking(ssl_options=options) if at == "constructor" else Speaking().startSSL(options)
    assert "startSSL() on <Speaking new>" in str(info.value)


def test_bad_options_leave_a_client_as_it_was(listener, recorder):
    client = recorder.of(Client, *NAMES)()
    with pytest.raises(TypeError):
        client.startSSL({"nonsense": 1})
    assert not client.ssl_enabled
    client.startSSL(trust()).connect(listener.address)
    with listener.secure():
        recorder.wait_for("on_connect")
    recorder.wait_for("on_close")


OLD = {
    "nothing checked": {"cert_reqs": ssl.CERT_NONE},
    "nothing checked, as a number": {"cert_reqs": 0},
    "checked": {"ca_certs": True, "cert_reqs": ssl.CERT_REQUIRED},
    "certificate": {"ca_certs": True, "certfile": True, "keyfile": True},
    "ciphers": {"ca_certs": True, "ciphers": "ECDHE+AESGCM"},
    "TLS": {"ca_certs": True, "ssl_version": ssl.PROTOCOL_TLS},
    "TLS client": {"ca_certs": True, "ssl_version": ssl.PROTOCOL_TLS_CLIENT},
    "TLS 1.2": {"ca_certs": True, "ssl_version": ssl.PROTOCOL_TLSv1_2},
    "ragged ends": {"ca_certs": True, "suppress_ragged_eofs": True},
    "no ragged ends": {"ca_certs": True, "suppress_ragged_eofs": False},
    "handshake later": {"ca_certs": True, "do_handshake_on_connect": False},
    "part": {"ca_certs": True, "server_side": False},
    "unset": dict.fromkeys(("certfile", "keyfile", "ciphers", "ssl_version", "cert_reqs", "server_hostname"), None) | {"ca_certs": True},
}


@pytest.mark.parametrize("case", OLD)
def test_options_of_ssl_wrap_socket_are_understood(listener, client_of, recorder, case):
    files = {"ca_certs": authority().file, **authority().issue("client.example")}
    options = {name: files[name] if value is True and name in files else value for name, value in OLD[case].items()}
    client = client_of(listener.address, options)
    with listener.secure() as tls:
        tls.send(b"hello")
        recorder.wait_for(("on_read", b"hello"))
        assert client.ssl_object.version() == ("TLSv1.2" if case == "TLS 1.2" else "TLSv1.3")
        tls.truncate_output()
        recorder.wait_for("on_close")
    # A truncated stream is not taken for a complete one, unless somebody has asked for that.
    assert recorder.names()[-2:] == ["on_end" if case == "ragged ends" else "on_ssl_error", "on_close"]


def test_server_and_client_of_ours_understand_each_other(server_of, recorder):
    class Echo(Connection):
        read_delimiter = b"\n"

        def on_read(self, line):
            self.write(line + b"\n")

    server: Server = server_of(Echo)
    server.startSSL(authority().localhost)

    def on_connect(self):
        for number in range(100):
            self.write(b"%d\n" % number)
        recorder("echo", [self.read(b"\n") for _ in range(100)] == [b"%d" % number for number in range(100)])
        self.end()

    recorder.of(Client, *NAMES, on_connect=on_connect)(ssl_options=trust()).connect("localhost", server.local_address[1])
    recorder.wait_for("on_close")
    assert recorder == [("on_ssl_handshake",), ("on_connect",), ("echo", True), ("on_close",)]
