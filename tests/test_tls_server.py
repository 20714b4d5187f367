"""TLS on the server's side: startSSL and its options, the handshake, certificates by name, their reloading, and on_accept's socket."""

import contextlib
import datetime
import logging
import os
import re
import select
import shutil
import socket
import ssl
import sys
import time
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import gevent
import gevent.socket
import gevent.ssl
import pytest
import tls_peers
from certificates import authority, client_context, other_authority, server_context
from echoes import Echo, EchoLines
from gevent import monkey
from gevent.event import AsyncResult, Event
from gevent.exceptions import ConcurrentObjectUseError
from needs import needs_ipv6
from peers import in_thread
from tls_peers import TLSPeer
from waiting import lingering, nothing_is_kept, turns, until  # noqa: F401

from pants_green import Client, CloseReason, Connection, Engine, Server, Stream, StreamServer
from pants_green._sockets import ipv6_works, remote_sockaddr
from pants_green.errors import HandshakeTimeout

tls_peer = tls_peers.tls_peer

Poll = monkey.get_original("select", "poll")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

LOCAL = ("127.0.0.1", 0)

MIB = 1 << 20

VERSIONS = ["1.2", "1.3"]

#: The callbacks of a stream that tell how TLS went.
ALL = ("on_ssl_handshake", "on_connect", "on_read", "on_end", "on_ssl_handshake_error", "on_ssl_error", "on_error", "on_close")

#: The classes of which a user's context may be: the module's, gevent's, and the standard library's own in a patched process, too.
CONTEXTS = {"ssl": ssl.SSLContext, "gevent": gevent.ssl.SSLContext, "stdlib": monkey.get_original("ssl", "SSLContext")}



@pytest.fixture
def secure(server_of):
    """Return a function that makes a listening server that speaks TLS: as ``server_of``, with the options first."""

    def make(options=None, *args, **kwargs):
        return server_of(*args, **kwargs).startSSL(server_context() if options is None else options)

    return make


def local_options(**more):
    """Return startSSL's options with the certificate of this machine."""
    return {**authority().localhost, **more}


def context_of(kind, certificate=None):
    """Return a server's context of one of the classes of CONTEXTS."""
    context = CONTEXTS[kind](ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(**(certificate or authority().localhost))
    return context


def answers(one, data=b"hello"):
    """Tell whether this peer is echoed."""
    one.send(data)
    return one.recv_exactly(len(data)) == data


def refused(server, **options):
    """Return the error with which the handshake of a peer fails; in TLS 1.3 it may come with the first read."""
    with pytest.raises((ssl.SSLError, ConnectionError)) as caught:
        with TLSPeer(server, **options) as one:
            if one.recv() == b"":
                raise ConnectionAbortedError
    return caught.value


def any_name(version=None):
    """Return a client's context that trusts the authority and takes a certificate of any name."""
    context = client_context(version)
    context.check_hostname = False
    return context


def certificate_for(server, name="localhost", context=None):
    """Return the certificate that a client is shown that asks for `name`, as getpeercert does."""
    with TLSPeer(server, context=context or any_name(), server_hostname=name) as one:
        return one.object.getpeercert()


def names_for(server, name="localhost", context=None):
    """Return the names in the certificate that a client is shown that asks for `name`."""
    return {value for kind, value in certificate_for(server, name, context)["subjectAltName"]}


def common_name_of(certificate):
    return dict(pair for group in certificate["subject"] for pair in group).get("commonName")


def shown(server):
    """Return the common name in the certificate that a client of localhost is shown."""
    return common_name_of(certificate_for(server, context=client_context()))


def exchange(one, data, size):
    """Have a TLS peer send `data` and receive `size` bytes, both at the same time, and return these."""

    def run():
        sock, poll = one.socket, Poll()
        sock.setblocking(False)
        got, wire, done = bytearray(), b"", 0
        while len(got) < size or done < len(data) or wire:
            if not wire and done < len(data):
                one.object.write(data[done : done + 65536])
                done += 65536
            wire += one._outgoing.read()
            poll.register(sock, select.POLLIN | (select.POLLOUT if wire else 0))
            ready = poll.poll(10_000)
            assert ready, f"nothing moves after {len(got)} bytes received, {done} sent"
            if ready[0][1] & select.POLLOUT:
                wire = wire[sock.send(wire) :]
            if ready[0][1] & ~select.POLLOUT:
                received = sock.recv(1 << 18)
                assert received, f"the end after {len(got)} bytes received, {done} sent"
                one._incoming.write(received)
                with contextlib.suppress(ssl.SSLWantReadError):
                    while True:
                        got += one.object.read(1 << 18)
        sock.settimeout(10.0)
        return bytes(got)

    return in_thread(run)


def greeted(server):
    """Return how many handshakes a server has on its hands."""
    return len(server._greetings)


def certificate_of_client(**context):
    """Return a client's context with a certificate for "somebody"."""
    made = client_context(**context)
    made.load_cert_chain(**authority().issue("somebody", common_name="Somebody"))
    return made


# ---- startSSL


def test_s2_9_start_ssl_before_listen_gives_a_server_that_speaks_tls(open_server, tls_peer):
    server = open_server(Server(Echo))
    assert not server.ssl_enabled
    assert server.startSSL(local_options()) is server
    assert server.ssl_enabled
    server.listen(LOCAL)
    assert answers(tls_peer(server))


@pytest.mark.parametrize("kind", ["dict", "context"])
def test_s2_9_ssl_options_in_the_constructor_do_the_same(open_server, tls_peer, kind):
    options = local_options() if kind == "dict" else server_context()
    server = open_server(Server(Echo, ssl_options=options))
    assert server.ssl_enabled
    assert answers(tls_peer(server.listen(LOCAL)))


def test_s2_10_example_serves_every_address_with_tls(open_server, tls_peer):
    class Example(Server):
        ConnectionClass = Echo

    server = Example()
    server.startSSL({"certfile": authority().localhost["certfile"], "keyfile": authority().localhost["keyfile"]})
    open_server(server).listen(("", 0))
    hosts = ["127.0.0.1", "::1"] if ipv6_works() else ["127.0.0.1"]
    for host in hosts:
        assert answers(tls_peer((host, server.local_address[1])))


def test_s2_11_python_s_defaults_hold_unless_something_is_said(secure, tls_peer, recorder):
    server = secure(local_options(), recorder.of(Echo, "on_connect"))
    tls_peer(server)
    recorder.wait_for("on_connect")
    (stream,) = server.channels.values()
    ours, default = stream.ssl_object.context, ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    assert ours.get_ciphers() == default.get_ciphers()
    assert ours.verify_mode == default.verify_mode == ssl.CERT_NONE
    assert ours.check_hostname == default.check_hostname
    assert ours.options & default.options == default.options
    assert ours.minimum_version >= default.minimum_version
    assert ours.maximum_version == default.maximum_version


def test_s2_34_failed_handshake_is_logged_and_costs_that_connection_only(secure, tls_peer, peer, caplog):
    server = secure(None, Echo)
    good = tls_peer(server)
    bad = peer(server)
    bad.send(b"GET / HTTP/1.1\r\n\r\n")
    bad.recv_all()
    (record,) = [record for record in caplog.records if record.name == "pants_green.tls" and record.levelno >= logging.WARNING]
    assert record.levelno == logging.WARNING
    assert "TLS handshake" in record.getMessage()
    assert f"127.0.0.1:{bad.address[1]}" in record.getMessage()
    assert server.listening
    assert answers(good)
    assert answers(tls_peer(server))


def test_s2_35_on_accept_gets_sockets_that_are_wrapped_already(open_server, tls_peer):
    got = AsyncResult()

    class Accepting(Server):
        def on_accept(self, sock, addr):
            sock.sendall(b"welcome")
            got.set((sock.cipher(), sock.recv(5), addr))
            sock.close()

    server = open_server(Accepting()).startSSL(local_options()).listen(LOCAL)
    one = tls_peer(server)
    assert one.recv_exactly(7) == b"welcome"
    one.send(b"hello")
    assert one.at_eof()
    assert got.get() == (one.object.cipher(), b"hello", one.address)


def test_s2_36_connections_made_before_a_late_start_ssl_stay_plain(server_of, peer, tls_peer):
    server = server_of(Echo)
    early = peer(server)
    assert answers(early)
    (stream,) = server.channels.values()
    server.startSSL(local_options())
    assert answers(early, b"still plain")
    assert not stream.ssl_enabled
    late = tls_peer(server)
    assert answers(late)
    assert sorted(one.ssl_enabled for one in server.channels.values()) == [False, True]
    assert answers(early, b"plain all the same")


def test_s2_37_options_reach_the_handshake(secure, tls_peer, recorder):
    options = local_options(
        ca_certs=authority().file,
        cert_reqs=ssl.CERT_REQUIRED,
        ciphers="ECDHE-ECDSA-AES256-GCM-SHA384",
        ssl_version=ssl.PROTOCOL_TLSv1_2,
    )
    server = secure(options, recorder.of(Echo, "on_connect"))
    one = tls_peer(server, context=certificate_of_client())
    assert one.object.cipher()[:2] == ("ECDHE-ECDSA-AES256-GCM-SHA384", "TLSv1.2")
    recorder.wait_for("on_connect")
    (stream,) = server.channels.values()
    assert common_name_of(stream.peer_certificate) == "Somebody"


NOT_ALLOWED = [
    *({"do_handshake_on_connect": value} for value in (True, 0, 1, None, "x")),
    *({"server_side": value} for value in (False, 0, 1, None, "x")),
]


@pytest.mark.parametrize("where", ["startSSL", "constructor"])
@pytest.mark.parametrize("wrong", NOT_ALLOWED, ids=repr)
def test_s2_38_do_handshake_on_connect_and_client_side_are_value_errors(wrong, where):
    server = Server(Echo)
    options = local_options(**wrong)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        server.startSSL(options) if where == "startSSL" else Server(Echo, ssl_options=options)
    assert not server.ssl_enabled


def test_s2_38_the_values_that_the_old_documents_allow_are_allowed(open_server, tls_peer):
    server = open_server(Server(Echo))
    server.startSSL(local_options(do_handshake_on_connect=False, server_side=True, suppress_ragged_eofs=True))
    assert answers(tls_peer(server.listen(LOCAL)))


def test_s2_39_start_ssl_twice_or_when_closed_is_a_runtime_error(secure, tls_peer):
    server = secure(None, Echo)
    with pytest.raises(RuntimeError, match="speaks TLS already"):
        server.startSSL(local_options())
    assert answers(tls_peer(server))
    server.close()
    with pytest.raises(RuntimeError, match="closed"):
        server.startSSL(local_options())
    plain = Server(Echo)
    plain.close()
    with pytest.raises(RuntimeError, match="closed"):
        plain.startSSL(local_options())


def test_s2_40_start_ssl_returns_the_channel_and_its_argument_is_optional(open_server, peer):
    server = open_server(Server(Echo))
    assert server.startSSL() is server
    with pytest.raises(ValueError, match="certificate"):
        server.listen(LOCAL)
    assert not server.listening
    plain = open_server(Server(Echo)).listen(LOCAL)
    with pytest.raises(ValueError, match="certificate"):
        plain.startSSL()
    assert not plain.ssl_enabled
    assert answers(peer(plain))


def test_s3_25_chat_of_the_tutorial_is_secured_with_start_ssl(open_server, tls_peer):
    source = (EXAMPLES / "tutorial3.py").read_text()
    source, listens, _ = source.partition("EchoLineToAllServer().listen(4040)")
    assert listens
    names = {}
    exec(source, names)
    server = open_server(names["EchoLineToAllServer"]()).startSSL(local_options()).listen(LOCAL)
    joined, left = b"Connected: 127.0.0.1\r\n", b"Disconnected: 127.0.0.1\r\n"
    stays = tls_peer(server)
    assert stays.recv_until(b"\r\n") == joined
    leaves = tls_peer(server)
    assert leaves.recv_until(b"\r\n") == joined
    assert stays.recv_until(b"\r\n") == joined
    leaves.send(b"one\r\ntwo\r\nthr")
    for one in (leaves, stays):
        assert one.recv_until(b"\r\n") == b"127.0.0.1: one\r\n"
        assert one.recv_until(b"\r\n") == b"127.0.0.1: two\r\n"
    leaves.shutdown_output()
    assert leaves.at_eof()
    assert stays.recv_until(b"\r\n") == left


@pytest.mark.parametrize("version", VERSIONS)
def test_both_versions_of_tls_echo_a_megabyte(secure, tls_peer, recorder, version):
    server = secure(local_options(), recorder.of(Echo, "on_connect", "on_end", "on_ssl_error", "on_close"))
    one = tls_peer(server, context=client_context(version))
    assert one.object.version() == f"TLSv{version}"
    blob = os.urandom(MIB)
    assert exchange(one, blob, MIB) == blob
    one.shutdown_output()
    assert one.at_eof()
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("on_end", b""), ("on_close",)]


def test_ssl_version_of_tls_1_3_refuses_an_older_one(secure, tls_peer):
    server = secure(local_options(ssl_version=ssl.TLSVersion.TLSv1_3), Echo)
    assert isinstance(refused(server, context=client_context("1.2")), ssl.SSLError)
    assert answers(tls_peer(server))


@pytest.mark.parametrize("name", ["PROTOCOL_TLS", "PROTOCOL_SSLv23", "PROTOCOL_TLS_SERVER"])
@pytest.mark.parametrize("version", VERSIONS)
def test_ssl_version_of_wrap_socket_s_default_is_the_best_that_both_know(secure, tls_peer, name, version):
    server = secure(local_options(ssl_version=getattr(ssl, name)), Echo)
    assert answers(tls_peer(server, context=client_context(version)))


def test_certificate_and_key_in_one_file_need_no_keyfile(secure, tls_peer, tmp_path):
    both = tmp_path / "both.pem"
    both.write_bytes(b"".join(Path(path).read_bytes() for path in authority().localhost.values()))
    for path in (str(both), both):
        assert answers(tls_peer(secure({"certfile": path}, Echo)))


def test_password_of_the_key_is_used(secure, tls_peer, tmp_path):
    from cryptography.hazmat.primitives import serialization

    certificate = authority().localhost
    key = serialization.load_pem_private_key(Path(certificate["keyfile"]).read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"open sesame")
        )
    )
    options = {"certfile": certificate["certfile"], "keyfile": str(locked)}
    assert answers(tls_peer(secure({**options, "password": "open sesame"}, Echo)))
    with pytest.raises(ssl.SSLError, match=r"locked\.key"):
        Server(Echo).startSSL({**options, "password": "open barley"})


# ---- options that make no sense

NOWHERE = "/nowhere/at/all.pem"


def wrong_options():
    """Return, by name, options that are refused, the error, and what its text names."""
    here = authority().localhost
    other = authority().issue("elsewhere")
    context = server_context()
    entry = {"www.example.org": authority().issue("www.example.org")}
    asking = server_context()
    asking.verify_mode = ssl.CERT_OPTIONAL
    return {
        "unknown": ({**here, "certfiel": "x"}, TypeError, "'certfiel'"),
        "number": (5, TypeError, "5"),
        "path": (here["certfile"], TypeError, "dict of options or an ssl.SSLContext"),
        "certfile missing": ({"certfile": NOWHERE}, FileNotFoundError, NOWHERE),
        "keyfile missing": ({"certfile": here["certfile"], "keyfile": NOWHERE}, FileNotFoundError, NOWHERE),
        "ca_certs missing": ({**here, "ca_certs": NOWHERE}, FileNotFoundError, NOWHERE),
        "certfile without key": ({"certfile": here["certfile"]}, ssl.SSLError, here["certfile"]),
        "certfile is no certificate": ({"certfile": __file__}, ssl.SSLError, __file__),
        "ca_certs is no certificate": ({**here, "ca_certs": __file__}, ssl.SSLError, __file__),
        "key of another": ({**here, "keyfile": other["keyfile"]}, ssl.SSLError, other["keyfile"]),
        "key without certificate": ({"keyfile": here["keyfile"]}, ValueError, "certfile"),
        "context and certfile": ({"context": context, **here}, ValueError, "certfile"),
        "context and ciphers": ({"context": context, "ciphers": "ALL"}, ValueError, "ciphers"),
        "context of a client": (client_context(), ValueError, "context"),
        "context of a client in a dict": ({"context": client_context()}, ValueError, "context"),
        "sni to the context of a client": ({**here, "sni": {"a.example": {"context": client_context()}}}, ValueError, "a.example"),
        "no context": ({"context": 5}, TypeError, "context"),
        "server_hostname": ({**here, "server_hostname": "localhost"}, ValueError, "server_hostname"),
        "check_hostname": ({**here, "check_hostname": True}, ValueError, "check_hostname"),
        "server_side": ({**here, "server_side": "yes"}, ValueError, "server_side"),
        "cert_reqs without ca_certs": ({**here, "cert_reqs": ssl.CERT_REQUIRED}, ValueError, "ca_certs"),
        "cert_reqs": ({**here, "cert_reqs": 17}, ValueError, "17"),
        "ciphers": ({**here, "ciphers": "ROT13"}, ValueError, "ROT13"),
        "alpn_protocols a str": ({**here, "alpn_protocols": "h2"}, TypeError, "'h2'"),
        "alpn_protocols of bytes": ({**here, "alpn_protocols": [b"h2"]}, TypeError, "alpn_protocols"),
        "ssl_version": ({**here, "ssl_version": ssl.TLSVersion.TLSv1}, ValueError, "TLS 1.2"),
        "handshake_timeout": ({**here, "handshake_timeout": "soon"}, TypeError, "handshake_timeout"),
        "handshake_timeout below zero": ({**here, "handshake_timeout": -1}, ValueError, "handshake_timeout"),
        "sni a list": ({**here, "sni": [entry]}, TypeError, "sni"),
        "sni of a number": ({**here, "sni": {5: here}}, TypeError, "5"),
        "sni of no name": ({**here, "sni": {"": here}}, TypeError, "sni"),
        "sni of an impossible name": ({**here, "sni": {"a..b": here}}, ValueError, "a..b"),
        "sni to a number": ({**here, "sni": {"a.example": 5}}, TypeError, "a.example"),
        "sni without certificate": ({**here, "sni": {"a.example": {"ciphers": "ALL"}}}, ValueError, "a.example"),
        "sni with an unknown option": ({**here, "sni": {"a.example": {**here, "certfiel": "x"}}}, TypeError, "certfiel"),
        "sni with cert_reqs": ({**here, "sni": {"a.example": {**here, "cert_reqs": 0}}}, TypeError, "cert_reqs"),
        "sni with a missing file": ({**here, "sni": {"a.example": {"certfile": NOWHERE}}}, FileNotFoundError, NOWHERE),
        "sni with context and certfile": ({**here, "sni": {"a.example": {"context": context, **here}}}, ValueError, "a.example"),
        "sni with another verify_mode": ({**here, "sni": {"a.example": asking}}, ValueError, "a.example"),
        "sni and context": ({"context": context, "sni": entry}, ValueError, "sni"),
    }


@pytest.mark.parametrize("where", ["startSSL", "constructor"])
@pytest.mark.parametrize("case", wrong_options())
def test_wrong_options_are_an_error_at_the_call_that_names_them(open_server, tls_peer, case, where):
    options, error, named = wrong_options()[case]
    server = open_server(Server(Echo))
    with pytest.raises(error) as caught:
        server.startSSL(options) if where == "startSSL" else Server(Echo, ssl_options=options)
    assert named in str(caught.value)
    assert "startSSL()" in str(caught.value)
    # It is as it was.
    assert not server.ssl_enabled
    assert answers(tls_peer(server.startSSL(local_options()).listen(LOCAL)))


@pytest.mark.parametrize("protocols", [[""], ["x" * 256]])
def test_alpn_protocols_of_an_impossible_length_are_a_value_error_at_the_call(protocols):
    with pytest.raises(ValueError, match="alpn_protocols"):
        Server(Echo).startSSL(local_options(alpn_protocols=protocols))


def test_wrong_options_leave_a_listening_server_plain(server_of, peer, tls_peer):
    server = server_of(Echo)
    with pytest.raises(FileNotFoundError):
        server.startSSL({"certfile": NOWHERE})
    assert answers(peer(server))
    assert answers(tls_peer(server.startSSL(local_options())))


def test_options_are_not_modified_and_may_be_shared(open_server, tls_peer):
    given = local_options(alpn_protocols=["echo"], sni={"other.example": authority().issue("other.example")})
    before = {name: value.copy() if isinstance(value, (list, dict)) else value for name, value in given.items()}
    servers = [open_server(Server(Echo, ssl_options=given)), open_server(Server(Echo)).startSSL(given)]
    for server in servers:
        assert answers(tls_peer(server.listen(LOCAL)))
    assert given == before
    assert server.reload_certificates() is None
    assert given == before
    frozen = open_server(Server(Echo)).startSSL(MappingProxyType(given))
    assert answers(tls_peer(frozen.listen(LOCAL)))


def test_options_may_be_shared_by_a_server_and_a_client(server_of, recorder):
    """In the library of old the server's part stuck to the dict."""
    given = local_options(ca_certs=authority().file)
    before = dict(given)
    server = server_of(Echo).startSSL(given)
    kind = recorder.of(Client, on_connect=lambda client: client.write(b"hello"), on_read=lambda client, data: client.end())
    client = kind(ssl_options=given)
    client.connect(("localhost", server.local_address[1]))
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("on_read", b"hello"), ("on_close",)]
    assert given == before


def test_options_changed_afterwards_have_no_effect(secure, tls_peer):
    given = local_options()
    server = secure(given, Echo)
    given.update(certfile=NOWHERE, keyfile=NOWHERE)
    server.reload_certificates()
    assert answers(tls_peer(server))


@pytest.mark.parametrize("kind", CONTEXTS)
def test_context_is_not_modified(secure, tls_peer, kind):
    context = context_of(kind)

    def state():
        return context.options, context.verify_mode, context.minimum_version, context.get_ciphers(), context.sni_callback, type(context)

    before = state()
    server = secure({"context": context, "handshake_timeout": 5}, Echo)
    assert answers(tls_peer(server))
    assert state() == before
    (stream,) = server.channels.values()
    assert stream.ssl_object.context is context


@pytest.mark.parametrize("kind", CONTEXTS)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("when", ["constructor", "before", "after"])
def test_context_of_every_kind_serves(open_server, tls_peer, kind, version, when):
    context = context_of(kind)
    if when == "constructor":
        server = open_server(Server(Echo, ssl_options=context)).listen(LOCAL)
    elif when == "before":
        server = open_server(Server(Echo)).startSSL(context).listen(LOCAL)
    else:
        server = open_server(Server(Echo)).listen(LOCAL).startSSL(context)
    assert answers(tls_peer(server, context=client_context(version)), b"x" * 50_000)


def test_context_without_a_certificate_costs_only_the_connections(secure, peer, caplog):
    # Nobody can tell that of a context; it shows with the first client.
    server = secure(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), Echo)
    refused(server)
    assert server.listening
    assert any("TLS handshake" in record.getMessage() for record in caplog.records)


# ---- the callbacks of a connection


@pytest.mark.parametrize("version", VERSIONS)
def test_on_ssl_handshake_comes_before_on_connect_and_the_stream_is_in_channels(secure, tls_peer, recorder, version):
    def look(stream, *args):
        recorder((stream.fileno in stream.server.channels, stream.connected, stream.cipher[1], stream.remote_address))

    server = secure(None, recorder.of(Echo, "on_ssl_handshake", "on_connect", on_ssl_handshake=look, on_connect=look))
    one = tls_peer(server, context=client_context(version))
    recorder.wait_for(4)
    seen = True, True, f"TLSv{version}", one.address
    assert recorder == [("on_ssl_handshake",), seen, ("on_connect",), seen]


def test_a_connection_in_its_handshake_is_nowhere_to_be_seen(secure, peer, recorder):
    server = secure(None, recorder.of(Echo, *ALL))
    one = peer(server)
    until(lambda: greeted(server) == 1)
    assert not server.channels
    one.reset()
    until(lambda: greeted(server) == 0)
    assert recorder == []


@pytest.mark.parametrize("how", ["close", "end", "abort"])
def test_on_ssl_handshake_that_closes_keeps_on_connect_from_being_called(secure, tls_peer, recorder, how):
    server = secure(None, recorder.of(Echo, *ALL, on_ssl_handshake=lambda stream: getattr(stream, how)()))
    one = tls_peer(server)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_ssl_handshake", "on_close"]
    if how == "abort":
        with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
            one.recv()
    else:
        assert one.at_eof()
        one.close()


def test_on_ssl_handshake_that_raises_costs_that_connection(secure, tls_peer, recorder):
    def fail(stream):
        raise RuntimeError("as it was asked to")

    server = secure(None, recorder.of(Echo, *ALL, on_ssl_handshake=fail))
    tls_peer(server)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_ssl_handshake", "on_error", "on_close"]
    assert server.listening


def test_what_is_known_of_the_peer_is_known_from_the_handshake_to_on_close(secure, tls_peer, recorder):
    def look(stream, *args):
        certificate = stream.peer_certificate
        recorder((common_name_of(certificate), stream.cipher, stream.alpn_protocol, stream.ssl_object.version(), stream.ssl_enabled))

    options = local_options(ca_certs=authority().file, cert_reqs=ssl.CERT_REQUIRED, alpn_protocols=["b", "a"])
    server = secure(options, recorder.of(Echo, "on_read", on_ssl_handshake=look, on_connect=look, on_read=look, on_close=look))
    context = certificate_of_client()
    context.set_alpn_protocols(["a", "b"])
    one = tls_peer(server, context=context)
    one.send(b"hello")
    recorder.wait_for(4)
    known = "Somebody", one.object.cipher(), "b", one.object.version(), True
    assert one.object.selected_alpn_protocol() == "b"
    one.shutdown_output()
    recorder.wait_for(5)
    assert recorder == [known, known, ("on_read", b"hello"), known, known]


def test_alpn_protocol_is_none_if_nothing_was_chosen(secure, tls_peer, recorder):
    server = secure(local_options(alpn_protocols=["a"]), recorder.of(Echo, "on_connect"))
    context = client_context()
    context.set_alpn_protocols(["something else"])
    one = tls_peer(server, context=context)
    recorder.wait_for("on_connect")
    (stream,) = server.channels.values()
    assert stream.alpn_protocol is None
    assert one.object.selected_alpn_protocol() is None


@pytest.mark.parametrize("version", VERSIONS)
def test_data_right_behind_the_handshake_reaches_on_read(secure, tls_peer, recorder, version):
    server = secure(None, recorder.of(EchoLines, *ALL))
    one = tls_peer(server, context=client_context(version), shake=False)

    def run():
        while True:
            try:
                one.object.do_handshake()
                break
            except ssl.SSLWantReadError:
                one._send_all()
                one._incoming.write(one.socket.recv(65536))
        # In TLS 1.3 the client's last message has not been sent yet.
        one.object.write(b"one\ntwo\nthr")
        one.object.write(b"ee\n")
        try:
            one.object.unwrap()
        except ssl.SSLError:
            pass
        one._send_all()

    in_thread(run)
    assert one.recv_all() == b"one\ntwo\nthree\n"
    recorder.wait_for("on_close")
    assert [event[0] if event[0] != "on_read" else event for event in recorder] == [
        "on_ssl_handshake",
        "on_connect",
        ("on_read", b"one"),
        ("on_read", b"two"),
        ("on_read", b"three"),
        "on_end",
        "on_close",
    ]


def test_what_on_connect_writes_goes_out_encrypted_and_first(secure, tls_peer):
    server = secure(None, Echo, on_connect=lambda stream: stream.write(b"welcome\n"))
    one = tls_peer(server)
    one.send(b"hello\n")
    assert one.recv_until(b"\n") == b"welcome\n"
    assert one.recv_until(b"\n") == b"hello\n"


def test_start_ssl_on_a_stream_that_speaks_tls_already_is_a_runtime_error(secure, tls_peer, recorder):
    server = secure(None, recorder.of(Echo, "on_connect"))
    one = tls_peer(server)
    recorder.wait_for("on_connect")
    (stream,) = server.channels.values()
    with pytest.raises(RuntimeError, match="speaks TLS already"):
        stream.startSSL(local_options())
    assert answers(one)


# ---- certificates of clients


@pytest.mark.parametrize("version", VERSIONS)
def test_client_certificate_required_of_one_who_has_none_fails_the_handshake(secure, tls_peer, recorder, version):
    class Telling(Server):
        def on_ssl_wrap_error(self, sock, addr, exception):
            recorder("on_ssl_wrap_error", exception.reason)

    options = local_options(ca_certs=authority().file, cert_reqs=ssl.CERT_REQUIRED)
    server = secure(options, recorder.of(Echo, *ALL), server_class=Telling)
    assert isinstance(refused(server, context=client_context(version)), ssl.SSLError)
    recorder.wait_for(1)
    assert recorder == [("on_ssl_wrap_error", "PEER_DID_NOT_RETURN_A_CERTIFICATE")]
    assert answers(tls_peer(server, context=certificate_of_client(version=version)))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("needed", [ssl.CERT_REQUIRED, ssl.CERT_OPTIONAL])
def test_client_certificate_that_another_authority_signed_fails_the_handshake(secure, recorder, version, needed):
    class Telling(Server):
        def on_ssl_wrap_error(self, sock, addr, exception):
            recorder("on_ssl_wrap_error", type(exception))

    options = local_options(ca_certs=authority().file, cert_reqs=needed)
    server = secure(options, recorder.of(Echo, *ALL), server_class=Telling)
    context = client_context(version)
    context.load_cert_chain(**other_authority().issue("somebody"))
    assert isinstance(refused(server, context=context), (ssl.SSLError, ConnectionError))
    recorder.wait_for(1)
    assert recorder == [("on_ssl_wrap_error", ssl.SSLCertVerificationError)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("has_one", [False, True])
def test_client_certificate_optional_is_looked_at_if_there_is_one(secure, tls_peer, recorder, version, has_one):
    def tell(stream):
        certificate = stream.peer_certificate
        recorder(certificate and common_name_of(certificate))

    options = local_options(ca_certs=authority().file, cert_reqs=ssl.CERT_OPTIONAL)
    server = secure(options, Echo, on_connect=tell)
    assert answers(tls_peer(server, context=certificate_of_client(version=version) if has_one else client_context(version)))
    assert recorder == ["Somebody" if has_one else None]


@pytest.mark.parametrize("options", [{}, {"ca_certs": authority().file}, {"cert_reqs": ssl.CERT_NONE}], ids=["nothing", "ca_certs", "none"])
def test_client_certificate_is_not_asked_for_unless_somebody_says_so(secure, tls_peer, recorder, options):
    server = secure(local_options(**options), Echo, on_connect=lambda stream: recorder(stream.peer_certificate))
    assert answers(tls_peer(server, context=certificate_of_client()))
    assert recorder == [None]


# ---- what is refused


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("options", [None, "dict"])
def test_tls_1_1_is_refused(secure, recorder, options):
    class Telling(Server):
        def on_ssl_wrap_error(self, sock, addr, exception):
            recorder(exception.reason)

    server = secure(local_options() if options else None, Echo, server_class=Telling)
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(authority().file)
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    assert isinstance(refused(server, context=old), ssl.SSLError)
    recorder.wait_for(1)
    assert recorder == ["UNSUPPORTED_PROTOCOL"]


def test_plain_text_is_refused_and_none_of_it_reaches_on_read(secure, peer, recorder):
    class Telling(Server):
        def on_ssl_wrap_error(self, sock, addr, exception):
            recorder("on_ssl_wrap_error", exception.reason)

    server = secure(None, recorder.of(Echo, *ALL), server_class=Telling)
    peer(server).send(b"GET / HTTP/1.1\r\n\r\n")
    recorder.wait_for(1)
    turns()
    assert recorder == [("on_ssl_wrap_error", "HTTP_REQUEST")]


def test_client_that_does_not_trust_the_server_costs_only_its_connection(secure, tls_peer, recorder):
    class Telling(Server):
        def on_ssl_wrap_error(self, sock, addr, exception):
            recorder("on_ssl_wrap_error", exception.reason)

    server = secure(None, recorder.of(Echo, *ALL), server_class=Telling)
    with pytest.raises(ssl.SSLCertVerificationError):
        tls_peer(server, context=ssl.create_default_context(cafile=other_authority().file))
    recorder.wait_for(1)
    assert recorder == [("on_ssl_wrap_error", "TLSV1_ALERT_UNKNOWN_CA")]


# ---- the time that a handshake may take


@pytest.mark.parametrize("where", ["class", "instance", "option", "option of a context"])
def test_handshake_timeout_strikes_a_silent_peer(server_of, peer, tls_peer, recorder, where):
    class Strict(Server):
        if where == "class":
            handshake_timeout = 0.05

        def on_ssl_wrap_error(self, sock, addr, exception):
            recorder((type(exception), addr, str(exception)))

    server = server_of(Echo, server_class=Strict)
    if where == "instance":
        server.handshake_timeout = 0.05
    options = {
        "option": local_options(handshake_timeout=0.05),
        "option of a context": {"context": server_context(), "handshake_timeout": 0.05},
    }
    server.startSSL(options.get(where) or server_context())
    one = peer(server)
    recorder.wait_for(1)
    assert recorder == [(HandshakeTimeout, one.address, "the TLS handshake was not done within handshake_timeout, 0.05 seconds")]
    assert one.recv_all() == b""
    assert server.listening


def test_handshake_timeout_is_for_the_handshake_only(secure, tls_peer, peer, recorder):
    class Telling(Server):
        handshake_timeout = 0.2

        def on_ssl_wrap_error(self, sock, addr, exception):
            recorder(type(exception))

    server = secure(None, Echo, server_class=Telling)
    one = tls_peer(server)
    peer(server)  # its time is up later
    recorder.wait_for(1)
    assert recorder == [HandshakeTimeout]
    assert answers(one)


def test_handshake_timeout_of_none_is_no_limit(secure, peer, recorder):
    class Telling(Server):
        handshake_timeout = 0.02

        def on_ssl_wrap_error(self, sock, addr, exception):
            recorder("on_ssl_wrap_error")

    patient = secure(local_options(handshake_timeout=None), Echo, server_class=Telling)
    strict = secure(local_options(), Echo, server_class=Telling)
    slow, also_slow = peer(patient), peer(strict)
    until(lambda: greeted(patient) == 1)
    recorder.wait_for(1)  # the strict one's, whose peer came later
    assert also_slow.recv_all() == b""
    assert answers(TLSPeer.over(slow))
    assert recorder == ["on_ssl_wrap_error"]


@pytest.mark.parametrize("wrong", ["soon", -1, float("nan"), True], ids=repr)
def test_handshake_timeout_that_is_no_number_of_seconds_is_an_error(wrong):
    with pytest.raises((TypeError, ValueError), match="handshake_timeout"):
        Server(Echo).handshake_timeout = wrong


# ---- on_ssl_wrap_error


def test_on_ssl_wrap_error_gets_an_open_socket_which_is_closed_afterwards(secure, peer):
    got = AsyncResult()

    class Telling(Server):
        def on_ssl_wrap_error(self, sock, addr, exception):
            sock.sendall(b"HTTP/1.1 400 this is TLS here\r\n\r\n")
            got.set((sock, addr, exception))

    server = secure(None, Echo, server_class=Telling)
    one = peer(server)
    one.send(b"GET / HTTP/1.1\r\n\r\n")
    assert one.recv_all().endswith(b"HTTP/1.1 400 this is TLS here\r\n\r\n")
    sock, addr, exception = got.get()
    assert isinstance(sock, gevent.socket.socket)
    assert addr == one.address
    assert isinstance(exception, ssl.SSLError)
    until(lambda: sock.fileno() == -1)


def test_on_ssl_wrap_error_may_be_set_on_the_instance_and_may_close(secure, peer, recorder):
    server = secure(None, Echo)
    server.on_ssl_wrap_error = lambda sock, addr, exception: (sock.close(), recorder(addr))
    one = peer(server)
    one.send(b"nonsense" * 10)
    one.recv_all()
    recorder.wait_for(1)
    assert recorder == [one.address]


def test_on_ssl_wrap_error_that_waits_holds_up_no_connection(secure, peer, tls_peer, recorder):
    class Waiting(Server):
        def on_ssl_wrap_error(self, sock, addr, exception):
            recorder("begins")
            done.get()
            recorder("ends")

    done = AsyncResult()
    server = secure(None, Echo, server_class=Waiting)
    one = peer(server)
    one.send(b"nonsense" * 10)
    recorder.wait_for(1)
    assert answers(tls_peer(server))
    done.set()
    recorder.wait_for(2)


def test_on_ssl_wrap_error_that_raises_does_not_hurt_the_server(secure, peer, tls_peer, recorder, caplog):
    class Raising(Server):
        def on_ssl_wrap_error(self, sock, addr, exception):
            recorder(sock)
            raise RuntimeError("as it was asked to")

    server = secure(None, Echo, server_class=Raising)
    good = tls_peer(server)
    for count in (1, 2):
        with peer(server) as one:
            one.send(b"nonsense" * 10)
            one.recv_all()
        recorder.wait_for(count)
    until(lambda: all(sock.fileno() == -1 for sock in recorder))
    assert server.listening
    assert answers(good)
    assert answers(tls_peer(server))
    assert any("as it was asked to" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("leaves", ["reset", "close"])
@pytest.mark.parametrize("when", ["before a byte", "after the client's first message"])
def test_peer_that_leaves_in_mid_handshake_is_told_at_debug_only(secure, peer, tls_peer, caplog, when, leaves):
    caplog.set_level(logging.DEBUG, "pants_green")
    server = secure(None, Echo)
    one = peer(server)
    until(lambda: greeted(server) == 1)
    if when != "before a byte":
        hello = TLSPeer.over(one, shake=False)
        with contextlib.suppress(ssl.SSLWantReadError):
            hello.object.do_handshake()
        hello.send_raw(hello._outgoing.read())
        assert not one.at_eof()  # the server has answered
    getattr(one, leaves)()
    until(lambda: greeted(server) == 0)
    (record,) = [record for record in caplog.records if "handshake" in record.getMessage()]
    assert record.levelno == logging.DEBUG
    assert answers(tls_peer(server))


# ---- closing in mid-handshake


@pytest.mark.parametrize("when", ["before a byte", "after the client's first message"])
def test_close_ends_handshakes_that_are_going_on(secure, peer, recorder, when):
    class Telling(Server):
        def on_ssl_wrap_error(self, sock, addr, exception):
            recorder("on_ssl_wrap_error")

        def on_close(self):
            super().on_close()
            recorder("on_close")

    server = secure(local_options(handshake_timeout=None), recorder.of(Echo, *ALL), server_class=Telling)
    peers = [peer(server) for _ in range(3)]
    until(lambda: greeted(server) == 3)
    if when != "before a byte":
        for one in peers:
            hello = TLSPeer.over(one, shake=False)
            with contextlib.suppress(ssl.SSLWantReadError):
                hello.object.do_handshake()
            hello.send_raw(hello._outgoing.read())
            assert not one.at_eof()
    server.close()
    for one in peers:
        with contextlib.suppress(ConnectionResetError):
            one.recv_all()
    recorder.wait_for("on_close")
    assert greeted(server) == 0
    assert recorder == ["on_close"]


def test_close_while_a_handshake_goes_on_leaves_nothing(secure, tls_peer, recorder):
    server = secure(None, recorder.of(Echo, *ALL))
    one = tls_peer(server, shake=False)
    shaking = gevent.spawn(one.shake_hands)
    until(lambda: greeted(server) == 1)
    server.close()
    with contextlib.suppress(OSError):
        shaking.get()
        one.recv_all()
    until(lambda: not server.channels and not greeted(server) and not server._children())
    assert recorder.names() in ([], ["on_ssl_handshake", "on_connect", "on_close"])


def test_close_ends_tls_connections_with_a_goodbye_after_what_they_owe(secure, tls_peer, recorder):
    server = secure(None, recorder.of(Echo, *ALL, on_connect=lambda stream: stream.write(bytes(MIB))))
    one = tls_peer(server)
    recorder.wait_for("on_connect")
    server.close()
    assert len(one.recv_all()) == MIB  # SSLEOFError if there were no goodbye
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_ssl_handshake", "on_connect", "on_close"]


def test_close_ends_fifty_handshakes_at_once(secure, peer):
    server = secure(local_options(handshake_timeout=None), Echo)
    peers = [peer(server) for _ in range(50)]
    until(lambda: greeted(server) == 50)
    server.close()
    assert [one.recv_all() for one in peers] == [b""] * 50


# ---- the socket that on_accept gets


class Accepting(StreamServer):
    """Hands the sockets that it gets to whoever waits for them."""

    __slots__ = ("accepted",)

    def __init__(self, **options):
        super().__init__(**options)
        self.accepted = AsyncResult()

    def on_accept(self, sock, addr):
        self.accepted.set(sock)


@pytest.fixture
def accepted(open_server, tls_peer):
    """Return a function that has a TLS peer accepted, and returns it and the socket that on_accept got; closed at the end.

    ``accepted(options, **options of the peer)``.
    """
    socks = []

    def make(options=None, **peer_options):
        server = open_server(Accepting(ssl_options=options or server_context())).listen(LOCAL)
        one = tls_peer(server, **peer_options)
        sock = server.accepted.get()
        socks.append(sock)
        return one, sock

    yield make
    for sock in socks:
        sock.close()


def raw(one):
    """Return what has come to a TLS peer, as it went over the wire."""
    return in_thread(one.socket.recv, 65536)


def is_encrypted(wire, said):
    """Tell whether these are records of application data in which one cannot read what was said."""
    return wire.startswith(b"\x17\x03\x03") and said not in wire


@pytest.mark.parametrize("version", VERSIONS)
def test_accepted_socket_is_a_gevent_socket_that_receives_what_was_sent(accepted, version):
    one, sock = accepted(context=client_context(version))
    assert isinstance(sock, gevent.socket.socket)
    assert sock.getpeername() == one.address
    one.send(b"hello world")
    assert sock.recv(5) == b"hello"
    assert sock.recv(1000) == b" world"
    one.send(b"goodbye")
    assert sock.recv(7) == b"goodbye"
    one.shutdown_output()
    assert sock.recv(10) == b""
    assert sock.recv(10) == b""


def test_accepted_socket_waits_in_recv_for_that_greenlet_only(accepted):
    one, sock = accepted()
    receiving = gevent.spawn(sock.recv, 100)
    turns()
    assert not receiving.ready()
    one.send(b"at last")
    assert receiving.get() == b"at last"


def test_accepted_socket_tells_of_an_end_without_goodbye(accepted):
    one, sock = accepted()
    one.send(b"half a sente")
    one.truncate_output()
    assert sock.recv(100) == b"half a sente"
    with pytest.raises(ssl.SSLEOFError):
        sock.recv(100)


def test_accepted_socket_recv_into_fills_a_buffer(accepted):
    one, sock = accepted()
    one.send(b"0123456789")
    buffer = bytearray(b"." * 8)
    assert sock.recv_into(buffer, 4) == 4
    assert buffer == b"0123...."
    assert sock.recv_into(memoryview(buffer)[4:]) == 4
    assert buffer == b"01234567"
    assert sock.recv_into(buffer) == 2
    assert buffer == b"89234567"


@pytest.mark.parametrize("size", [1, 1000, 3 * MIB])
@pytest.mark.parametrize("version", VERSIONS)
def test_accepted_socket_sendall_sends_all_to_a_slow_reader_and_encrypted(accepted, size, version):
    one, sock = accepted(context=client_context(version), rcvbuf=4096)
    blob = os.urandom(64) * (size // 64 + 1)
    sending = gevent.spawn(sock.sendall, memoryview(blob))
    assert one.recv_exactly(len(blob)) == blob
    sending.get()
    sock.sendall(b"a second one in clear words")
    assert is_encrypted(raw(one), b"clear words")


def test_accepted_socket_second_writer_is_refused_and_spoils_nothing(accepted):
    one, sock = accepted(rcvbuf=4096)
    first, second = os.urandom(3 * MIB), os.urandom(MIB)
    sending = gevent.spawn(sock.sendall, first)
    turns()
    assert not sending.ready()
    with pytest.raises(ConcurrentObjectUseError, match="another greenlet is writing"):
        sock.sendall(second)
    assert one.recv_exactly(len(first)) == first
    sending.get()
    sock.sendall(b"now")
    assert one.recv_exactly(3) == b"now"


@pytest.mark.parametrize("interrupted_by", ["its timeout", "gevent.Timeout"])
def test_accepted_socket_that_goes_on_after_an_interruption_repeats_nothing(accepted, interrupted_by):
    one, sock = accepted(rcvbuf=4096)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
    blob = os.urandom(250_000)
    if interrupted_by == "its timeout":
        sock.settimeout(0.05)
    with pytest.raises((TimeoutError, gevent.Timeout)):
        if interrupted_by == "its timeout":
            sock.send(blob)
        else:
            with gevent.Timeout(0.05):
                sock.send(blob)
    sock.settimeout(None)
    sending = gevent.spawn(sock.sendall, blob)
    assert one.recv_exactly(len(blob)) == blob
    sending.get()
    sock.sendall(b"the end")
    assert one.recv_exactly(7) == b"the end"


def test_stream_on_a_socket_that_sent_a_part_sends_all_of_its_own(accepted, recorder):
    one, sock = accepted(rcvbuf=4096)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
    sock.settimeout(0)
    blob = os.urandom(250_000)
    assert 0 < sock.send(blob) < len(blob)

    def on_connect(self):
        self.write(b"x" * 10_000)
        self.end()

    made = type("Made", (Stream,), {"on_connect": on_connect, "on_close": lambda self: recorder("on_close")})
    made(socket=sock)
    # What was encrypted goes out whole, and then what is the stream's.
    assert one.recv_all() == blob + b"x" * 10_000
    recorder.wait_for("on_close")
    one.close()
    until(lambda: lingering() == 0)


def test_stream_on_a_socket_that_is_being_written_to_is_refused(accepted):
    one, sock = accepted(rcvbuf=4096)
    blob = os.urandom(3 * MIB)
    sending = gevent.spawn(sock.sendall, blob)
    turns()
    with pytest.raises(ConcurrentObjectUseError):
        Stream(socket=sock)
    assert one.recv_exactly(len(blob)) == blob
    sending.get()


@pytest.mark.parametrize("secure", [True, False])
def test_stream_on_an_accepted_socket_that_was_closed_is_refused_and_forgotten(open_server, tls_peer, peer, recorder, secure):
    class Closing(StreamServer):
        def on_accept(self, sock, addr):
            sock.close()
            try:
                Stream(socket=sock)
            except TypeError as error:
                recorder(str(error))

    server = open_server(Closing(ssl_options=server_context() if secure else None)).listen(LOCAL)
    one = (tls_peer if secure else peer)(server)
    recorder.wait_for(lambda events: any("takes an open socket" in str(event) for event in events))
    assert one.at_eof()
    assert list(Engine.instance().channels) == [server]


def test_on_ssl_wrap_error_is_not_called_once_the_server_is_closed(secure, peer, recorder):
    go_on = Event()

    class Waiting(Server):
        def on_ssl_wrap_error(self, sock, addr, exception):
            recorder("on_ssl_wrap_error")
            go_on.wait()

        def on_close(self):
            recorder("on_close")

    server = secure(None, Echo, server_class=Waiting)
    peers = [peer(server) for _ in range(3)]
    for one in peers:
        one.send(b"nonsense" * 10)
    recorder.wait_for("on_ssl_wrap_error")
    until(lambda: greeted(server) == 0)
    server.close()
    go_on.set()
    recorder.wait_for("on_close")
    assert recorder == ["on_ssl_wrap_error", "on_close"]
    for one in peers:
        one.recv_all()


@pytest.mark.parametrize("size", [-1, 9])
def test_accepted_socket_recv_into_refuses_what_does_not_fit(accepted, size):
    _, sock = accepted()
    with pytest.raises(ValueError, match="the buffer has 8"):
        sock.recv_into(bytearray(8), size)


def test_accepted_socket_reads_nothing_if_nothing_is_asked_for(accepted):
    _, sock = accepted()
    assert sock.recv(0) == b""
    assert sock.recv_into(bytearray()) == 0


def test_accepted_socket_send_tells_how_much_it_has_sent(accepted):
    one, sock = accepted()
    assert sock.send(b"hello") == 5
    assert sock.send(b"") == 0
    assert one.recv_exactly(5) == b"hello"


def test_accepted_socket_reads_and_writes_in_two_greenlets_at_once(accepted):
    one, sock = accepted()
    blob = os.urandom(MIB)

    def receive():
        data = b""
        while len(data) < len(blob):
            data += sock.recv(65536)
        return data

    receiving, sending = gevent.spawn(receive), gevent.spawn(sock.sendall, blob)
    one.send(blob[:1000])
    assert one.recv_exactly(len(blob)) == blob
    one.send(blob[1000:])
    assert receiving.get() == blob
    sending.get()


def test_accepted_socket_makefile_reads_lines_and_writes(accepted):
    one, sock = accepted()
    one.send(b"one\ntwo\nthr")
    with sock.makefile("rwb") as file:
        assert file.readline() == b"one\n"
        assert file.readline() == b"two\n"
        file.write(b"an answer in clear words")
        file.flush()
        assert one.recv_exactly(24) == b"an answer in clear words"
        one.send(b"ee\n")
        assert file.readline() == b"three\n"
        file.write(b"more in clear words")
        file.flush()
        assert is_encrypted(raw(one), b"clear words")


def test_accepted_socket_makefile_reads_to_the_end_and_is_at_the_end_for_good(accepted):
    one, sock = accepted()
    one.send(b"one\ntwo")
    one.shutdown_output()
    with sock.makefile("rb") as file:
        assert list(file) == [b"one\n", b"two"]
        assert file.read() == b""
        assert file.readline() == b""
    assert sock.recv(10) == b""


def test_accepted_socket_stays_open_as_long_as_its_files(accepted):
    one, sock = accepted()
    file = sock.makefile("rwb")
    sock.close()
    file.write(b"not yet")
    file.flush()
    assert one.recv_exactly(7) == b"not yet"
    one.send(b"hello\n")
    assert file.readline() == b"hello\n"
    file.close()
    assert one.at_eof()


@pytest.mark.parametrize(("offset", "count"), [(0, None), (5, None), (5, 300_000), (0, 10)])
def test_accepted_socket_sendfile_sends_a_file_encrypted(accepted, tmp_path, offset, count):
    one, sock = accepted()
    blob = os.urandom(MIB)
    path = tmp_path / "file"
    path.write_bytes(blob)
    wanted = blob[offset:] if count is None else blob[offset : offset + count]
    with path.open("rb") as file:
        sending = gevent.spawn(sock.sendfile, file, offset, count)
        assert one.recv_exactly(len(wanted)) == wanted
        assert sending.get() == len(wanted)
    path.write_bytes(b"in clear words")
    with path.open("rb") as file:
        assert sock.sendfile(file) == 14
    assert is_encrypted(raw(one), b"clear words")


def test_accepted_socket_knows_the_peer(accepted):
    context = certificate_of_client()
    context.set_alpn_protocols(["talk"])
    options = local_options(ca_certs=authority().file, cert_reqs=ssl.CERT_REQUIRED, alpn_protocols=["talk"])
    one, sock = accepted(options, context=context)
    assert common_name_of(sock.getpeercert()) == "Somebody"
    assert ssl.DER_cert_to_PEM_cert(sock.getpeercert(binary_form=True)).strip() == (
        Path(authority().issue("somebody", common_name="Somebody")["certfile"]).read_text().strip()
    )
    assert sock.cipher() == one.object.cipher()
    assert sock.version() == one.object.version()
    assert sock.selected_alpn_protocol() == "talk"
    assert sock.ssl_object.server_side


def test_accepted_socket_timeouts_are_kept(accepted):
    one, sock = accepted(rcvbuf=4096)
    sock.settimeout(0.02)
    with pytest.raises(TimeoutError):
        sock.recv(10)
    with pytest.raises(TimeoutError):
        while True:
            sock.sendall(bytes(MIB))
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        sock.recv(10)
    one.send(b"hello")
    sock.settimeout(5)
    assert sock.recv(10) == b"hello"


def test_accepted_socket_that_must_not_wait_sends_what_it_can(accepted):
    one, sock = accepted(rcvbuf=4096)
    sock.setblocking(False)
    blob = os.urandom(MIB) * 16
    sent = 0
    with pytest.raises(BlockingIOError):
        while sent < len(blob):
            sent += sock.send(blob[sent:])
    assert 0 < sent < len(blob)
    sock.setblocking(True)
    sending = gevent.spawn(sock.sendall, blob[sent:])

    def read():
        digest = bytearray()
        while len(digest) < len(blob):
            digest += one._receive(MIB)
        return bytes(digest)

    assert in_thread(read) == blob
    sending.get()


def test_accepted_socket_shutdown_says_goodbye_and_goes_on_reading(accepted):
    one, sock = accepted()
    sock.sendall(b"that was all")
    sock.shutdown(socket.SHUT_WR)
    assert one.recv_all() == b"that was all"
    assert raw(one) == b""
    one.send(b"not for me")
    assert sock.recv(100) == b"not for me"


@pytest.mark.parametrize("how", ["close", "with"])
def test_accepted_socket_close_says_goodbye(accepted, how):
    one, sock = accepted()
    sock.sendall(b"that was all")
    if how == "close":
        sock.close()
    else:
        with sock:
            pass
    assert one.recv_all() == b"that was all"
    assert sock.fileno() == -1
    with pytest.raises((OSError, ValueError)):
        sock.recv(1)
    with pytest.raises((OSError, ValueError)):
        sock.sendall(b"into the void")
    sock.close()


BY_TLS = {
    "sendto": lambda sock: sock.sendto(b"plain words", sock.getpeername()),
    "sendmsg": lambda sock: sock.sendmsg([b"plain words"]),
    "recvfrom": lambda sock: sock.recvfrom(10),
    "recvfrom_into": lambda sock: sock.recvfrom_into(bytearray(10)),
    "recvmsg": lambda sock: sock.recvmsg(10),
    "recvmsg_into": lambda sock: sock.recvmsg_into([bytearray(10)]),
    "detach": lambda sock: sock.detach(),
    "dup": lambda sock: sock.dup(),
    "peek": lambda sock: sock.recv(10, socket.MSG_PEEK),
    "peek into": lambda sock: sock.recv_into(bytearray(10), 0, socket.MSG_PEEK),
    "urgent": lambda sock: sock.send(b"plain words", socket.MSG_OOB),
    "urgent all": lambda sock: sock.sendall(b"plain words", socket.MSG_OOB),
}


@pytest.mark.parametrize("what", BY_TLS)
def test_accepted_socket_refuses_what_would_go_by_tls(accepted, what):
    one, sock = accepted()
    one.send(b"secret")
    with pytest.raises(ValueError, match="TLS"):
        BY_TLS[what](sock)
    assert sock.recv(100) == b"secret"
    sock.sendall(b"still well")
    assert is_encrypted(raw(one), b"still well")


def test_accepted_socket_recv_of_less_than_nothing_is_a_value_error(accepted):
    _, sock = accepted()
    with pytest.raises(ValueError, match="negative"):
        sock.recv(-1)


def test_accepted_socket_that_is_closed_wakes_who_waits_for_it(accepted):
    _, sock = accepted()
    receiving = gevent.spawn(sock.recv, 100)
    turns()
    sock.close()
    with pytest.raises(OSError, match="closed"):
        receiving.get()


def test_stream_server_that_overrides_nothing_closes_with_a_goodbye(open_server, tls_peer, recorder):
    server = open_server(StreamServer(ssl_options=server_context())).listen(LOCAL)
    one = tls_peer(server)
    assert one.at_eof()


def test_handle_accept_the_oldest_name_gets_a_socket_that_speaks_tls(open_server, tls_peer):
    class Old(Server):
        def handle_accept(self, sock, addr):
            sock.sendall(b"hello")
            sock.close()

    one = tls_peer(open_server(Old(ssl_options=server_context())).listen(LOCAL))
    assert one.recv_all() == b"hello"


def test_on_accept_that_raises_costs_that_connection_only(open_server, tls_peer, caplog):
    class Raising(Server):
        def on_accept(self, sock, addr):
            if self.channels:
                raise RuntimeError("one is enough")
            super().on_accept(sock, addr)

    server = open_server(Raising(Echo, ssl_options=server_context())).listen(LOCAL)
    first = tls_peer(server)
    assert answers(first)
    second = tls_peer(server)
    with contextlib.suppress(ssl.SSLEOFError, ConnectionError):
        second.recv_all()
    assert answers(first)
    assert server.listening
    assert any("one is enough" in record.getMessage() for record in caplog.records)


# ---- a Stream that takes such a socket over


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("server_class", [Server, StreamServer])
def test_stream_takes_an_accepted_socket_over(open_server, tls_peer, recorder, version, read_before, server_class):
    kind = recorder.of(EchoLines, *ALL)

    class Taking(server_class):
        def on_accept(self, sock, addr):
            if read_before:
                assert sock.recv(6) == b"PROXY\n"
                sock.sendall(b"well\n")
            kind(socket=sock, server=self)

    server = open_server(Taking(ssl_options=server_context())).listen(LOCAL)
    one = tls_peer(server, context=client_context(version))
    one.send(b"PROXY\none\nhalf" if read_before else b"one\nhalf")
    if read_before:
        assert one.recv_until(b"\n") == b"well\n"
    assert one.recv_until(b"\n") == b"one\n"
    one.send(b" a line\n")
    assert one.recv_until(b"\n") == b"half a line\n"
    one.shutdown_output()
    assert one.at_eof()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_ssl_handshake", "on_connect", "on_read", "on_read", "on_end", "on_close"]


def test_stream_takes_over_a_socket_from_which_everything_and_the_end_was_received(open_server, tls_peer, recorder):
    """Only the first bytes are read; what came with them, and the goodbye, is the stream's."""
    kind = recorder.of(EchoLines, *ALL)

    class Taking(StreamServer):
        def on_accept(self, sock, addr):
            begin.get()
            assert sock.recv(1) == b"1"
            kind(socket=sock)

    begin = AsyncResult()
    server = open_server(Taking(ssl_options=server_context())).listen(LOCAL)
    one = tls_peer(server)
    one.send(b"1st\n2nd\nre")
    one.send(b"st")
    one.shutdown_output()
    begin.set()
    assert one.recv_all() == b"st\n2nd\n"
    recorder.wait_for("on_close")
    assert recorder[2:5] == [("on_read", b"st"), ("on_read", b"2nd"), ("on_end", b"rest")]


@pytest.mark.parametrize("read_before", [False, True])
def test_stream_takes_an_accepted_socket_over_later_in_another_greenlet(accepted, recorder, read_before):
    one, sock = accepted()
    one.send(b"header one\n")
    if read_before:
        assert sock.recv(7) == b"header "
    stream = recorder.of(EchoLines, *ALL)(socket=sock)
    assert one.recv_until(b"\n") == (b"one\n" if read_before else b"header one\n")
    assert stream.ssl_enabled
    assert stream.cipher == one.object.cipher()
    assert stream.remote_address == one.address
    for forbidden in (lambda: sock.recv(1), lambda: sock.sendall(b"x"), lambda: sock.ssl_object):
        with pytest.raises(ValueError, match="stream"):
            forbidden()
    stream.end()
    assert one.at_eof()
    one.shutdown_output()
    recorder.wait_for("on_close")
    until(lambda: lingering() == 0)
    assert recorder.names() == ["on_ssl_handshake", "on_connect", "on_read", "on_close"]


def test_stream_on_an_accepted_socket_that_was_reset_meanwhile_is_told_of_it(accepted, recorder):
    one, sock = accepted()
    one.send(b"last words\n")
    one.reset()
    until(lambda: remote_sockaddr(sock) is None)
    stream = recorder.of(Stream, *ALL)(socket=sock)
    recorder.wait_for("on_close")
    assert recorder == [("on_ssl_handshake",), ("on_connect",), ("on_read", b"last words\n"), ("on_close",)]
    assert stream.close_reason is CloseReason.PEER_LEFT


def test_stream_takes_over_in_on_accept_s_spawned_greenlet(open_server, tls_peer, recorder):
    class Spawning(StreamServer):
        def on_accept(self, sock, addr):
            greenlets.append(gevent.spawn(self.serve, sock))

        def serve(self, sock):
            assert sock.recv(2) == b"go"
            recorder.of(EchoLines, "on_connect", "on_close")(socket=sock)

    greenlets = []
    one = tls_peer(open_server(Spawning(ssl_options=server_context())).listen(LOCAL))
    one.send(b"gohello\n")
    assert one.recv_until(b"\n") == b"hello\n"
    gevent.joinall(greenlets, raise_error=True)
    one.shutdown_output()
    recorder.wait_for("on_close")


def test_stream_of_a_closed_accepted_socket_is_refused(accepted):
    _, sock = accepted()
    sock.close()
    with pytest.raises((TypeError, ValueError, OSError)):
        Stream(socket=sock)


def test_stream_of_a_socket_that_another_stream_has_is_refused(accepted, recorder):
    one, sock = accepted()
    stream = recorder.of(EchoLines, "on_connect")(socket=sock)
    with pytest.raises((TypeError, ValueError)):
        Stream(socket=sock)
    assert answers(one, b"the first one is well\n")
    stream.abort()


# ---- certificates by name


@pytest.fixture
def several():
    """Return the options of a server of several names."""
    issue = authority().issue
    return local_options(
        sni={
            "one.example": issue("one.example"),
            "Two.Example": issue("two.example"),
            "*.wild.example": issue("*.wild.example"),
            "special.wild.example": issue("special.wild.example"),
            "bücher.example": issue("bücher.example"),
        }
    )


DEFAULT = {"localhost", "127.0.0.1", "::1"}

BY_NAME = {
    "one.example": {"one.example"},
    "ONE.example": {"one.example"},
    "two.example": {"two.example"},
    "a.wild.example": {"*.wild.example"},
    "A.WILD.example": {"*.wild.example"},
    "special.wild.example": {"special.wild.example"},
    "bücher.example": {"xn--bcher-kva.example"},
    "wild.example": None,
    "a.b.wild.example": None,
    "unknown.example": None,
    "localhost": None,
    None: None,
}


def without_addresses(names):
    return {name for name in names if name[0] not in "1:0"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", BY_NAME, ids=str)
def test_sni_each_name_gets_its_certificate_and_others_the_default(secure, several, name, version):
    expected = BY_NAME[name] or DEFAULT
    assert without_addresses(names_for(secure(several, Echo), name, any_name(version))) == without_addresses(expected)


def test_sni_client_checks_the_name_it_asked_for(secure, several, tls_peer):
    server = secure(several, Echo)
    for name in ("one.example", "a.wild.example", "localhost"):
        assert answers(tls_peer(server, server_hostname=name))
    with pytest.raises(ssl.SSLCertVerificationError):
        tls_peer(server, server_hostname="unknown.example")


def test_sni_without_a_default_certificate_serves_the_names(open_server, tls_peer, several):
    server = open_server(Server(Echo)).startSSL({"sni": several["sni"]}).listen(LOCAL)
    assert answers(tls_peer(server, server_hostname="one.example"))
    assert isinstance(refused(server, context=any_name(), server_hostname="unknown.example"), (ssl.SSLError, ConnectionError))
    assert answers(tls_peer(server, server_hostname="two.example"))


@pytest.mark.parametrize("kind", CONTEXTS)
@pytest.mark.parametrize("bare", [False, True])
def test_sni_entry_may_be_a_context(secure, tls_peer, kind, bare):
    context = context_of(kind, authority().issue("one.example"))
    server = secure(local_options(sni={"one.example": context if bare else {"context": context}}), Echo)
    assert answers(tls_peer(server, server_hostname="one.example"))
    assert answers(tls_peer(server))


@pytest.mark.parametrize("version", VERSIONS)
def test_sni_entry_may_have_its_own_protocols_and_inherits_those_of_the_server(secure, tls_peer, version):
    entries = {
        "own.example": {**authority().issue("own.example"), "alpn_protocols": ["special"]},
        "inherits.example": authority().issue("inherits.example"),
    }
    server = secure(local_options(alpn_protocols=["general"], sni=entries), Echo)
    context = client_context(version)
    context.set_alpn_protocols(["special", "general"])

    def chosen(name):
        return tls_peer(server, context=context, server_hostname=name).object.selected_alpn_protocol()

    assert [chosen(name) for name in ("localhost", "inherits.example", "own.example")] == ["general", "general", "special"]


@pytest.mark.parametrize("version", VERSIONS)
def test_sni_does_not_change_which_clients_are_let_in(secure, tls_peer, version, recorder):
    options = local_options(ca_certs=authority().file, cert_reqs=ssl.CERT_REQUIRED, sni={"one.example": authority().issue("one.example")})
    server = secure(options, Echo, on_connect=lambda stream: recorder(common_name_of(stream.peer_certificate)))
    for name in ("localhost", "one.example"):
        refused(server, context=client_context(version), server_hostname=name)
        stranger = client_context(version)
        stranger.load_cert_chain(**other_authority().issue("somebody"))
        refused(server, context=stranger, server_hostname=name)
        assert answers(tls_peer(server, context=certificate_of_client(version=version), server_hostname=name))
    assert recorder == ["Somebody", "Somebody"]


@pytest.mark.parametrize("kind", CONTEXTS)
@pytest.mark.parametrize("when", ["before", "after", "after the first connection"])
@pytest.mark.parametrize("setter", ["sni_callback", "set_servername_callback"])
def test_sni_callback_of_the_user_s_context_is_called(secure, tls_peer, recorder, kind, when, setter):
    context, other = context_of(kind), context_of(kind, authority().issue("one.example"))

    def choose(connection, name, current):
        recorder((name, current is context))
        if name == "one.example":
            connection.context = other

    def install():
        if setter == "sni_callback":
            context.sni_callback = choose
        else:
            context.set_servername_callback(choose)

    if when == "before":
        install()
    server = secure(context, Echo)
    if when == "after the first connection":
        assert answers(tls_peer(server))
    if when != "before":
        install()
    assert names_for(server, "one.example", any_name()) == {"one.example"}
    assert "localhost" in names_for(server, "localhost", any_name())
    assert "localhost" in names_for(server, None, any_name())
    assert recorder == [("one.example", True), ("localhost", True), (None, True)]


@pytest.mark.parametrize("kind", CONTEXTS)
def test_sni_callback_stays_the_user_s_own(secure, tls_peer, kind):
    context = context_of(kind)

    def choose(connection, name, current):
        pass

    context.sni_callback = choose
    assert answers(tls_peer(secure(context, Echo)))
    assert context.sni_callback is choose
    context.sni_callback = None
    assert answers(tls_peer(secure(context, Echo)))


def test_sni_callback_still_works_for_sockets_of_gevent(secure, tls_peer):
    """The same context may be in use elsewhere in the process, with gevent's own SSLSocket."""
    context, names = context_of("gevent"), []
    context.sni_callback = lambda connection, name, current: names.append((name, type(connection).__name__))
    server = secure(context, Echo)
    assert answers(tls_peer(server))
    assert names == [("localhost", "SSLObject")]
    with contextlib.closing(gevent.socket.socket()) as listener:
        listener.bind(LOCAL)
        listener.listen()
        waiting = gevent.spawn(lambda: context.wrap_socket(listener.accept()[0], server_side=True).close())
        tls_peer(listener.getsockname())
        waiting.get()
    assert names[1:] == [("localhost", "SSLSocket")]


@pytest.mark.parametrize("kind", CONTEXTS)
@pytest.mark.parametrize("how", ["alert", "raises"])
def test_sni_callback_that_refuses_or_raises_costs_that_connection(secure, tls_peer, kind, how, capfd):
    context = context_of(kind)

    def choose(connection, name, current):
        if name != "localhost":
            if how == "raises":
                raise RuntimeError("as it was asked to")
            return ssl.AlertDescription.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
        return None

    context.sni_callback = choose
    server = secure(context, Echo)
    hook, sys.unraisablehook = sys.unraisablehook, lambda args: None
    try:
        assert isinstance(refused(server, context=any_name(), server_hostname="one.example"), ssl.SSLError)
    finally:
        sys.unraisablehook = hook
    assert answers(tls_peer(server))


# ---- loading certificates once more


def replace(where, certificate, *parts):
    """Put a certificate where ``here`` has put one, as a whole or in part, as programs that renew them do it."""
    for part in parts or ("certfile", "keyfile"):
        fresh = Path(where[part]).with_suffix(".new")
        shutil.copyfile(certificate[part], fresh)
        os.replace(fresh, where[part])


@pytest.fixture
def here(tmp_path):
    """Return the options of files that can be replaced: a certificate of localhost with the common name "first"."""
    where = {"certfile": str(tmp_path / "certificate.pem"), "keyfile": str(tmp_path / "key.pem")}
    replace(where, named("first"))
    return where


def named(name, **options):
    """Return a certificate for localhost with a common name."""
    return authority().issue("localhost", "127.0.0.1", common_name=name, **options)


def errors(caplog, event):
    return [record for record in caplog.records if getattr(record, "event", None) == event]


def test_reload_certificates_new_connections_get_the_new_one_and_old_ones_go_on(secure, tls_peer, here):
    server = secure(here, Echo)
    old = tls_peer(server)
    assert shown(server) == "first"
    replace(here, named("second"))
    assert shown(server) == "first"
    server.reload_certificates()
    assert shown(server) == "second"
    assert answers(old)
    assert answers(tls_peer(server))


def test_reload_certificates_that_a_handshake_has_begun_with_finish_it(secure, peer, here):
    server = secure(here, Echo)
    one = peer(server)
    until(lambda: greeted(server) == 1)
    replace(here, named("second"))
    server.reload_certificates()
    late = TLSPeer.over(one)
    assert common_name_of(late.object.getpeercert()) == "first"
    assert answers(late)


BROKEN = {
    "missing": (lambda here: os.unlink(here["certfile"]), FileNotFoundError),
    "half written": (lambda here: Path(here["certfile"]).write_text("-----BEGIN CERTIFICATE-----\nMII"), ssl.SSLError),
    "key of another": (lambda here: replace(here, named("second"), "keyfile"), ssl.SSLError),
    "empty key": (lambda here: Path(here["keyfile"]).write_text(""), ssl.SSLError),
}


@pytest.mark.parametrize("case", BROKEN)
def test_reload_certificates_broken_files_leave_the_old_in_force_and_raise(secure, here, case):
    server = secure(here, Echo)
    spoil, error = BROKEN[case]
    spoil(here)
    with pytest.raises(error) as caught:
        server.reload_certificates()
    assert here["certfile"] in str(caught.value)
    assert f"reload_certificates() on {server!r}" in str(caught.value)
    assert shown(server) == "first"
    replace(here, named("second"))
    server.reload_certificates()
    assert shown(server) == "second"


def test_reload_certificates_reads_those_of_other_names_and_authorities(secure, tls_peer, tmp_path):
    by_name = {"certfile": str(tmp_path / "name.pem"), "keyfile": str(tmp_path / "name.key")}
    replace(by_name, authority().issue("one.example", common_name="first"))
    trusted = tmp_path / "authority.pem"
    shutil.copyfile(authority().file, trusted)
    options = local_options(sni={"one.example": by_name}, ca_certs=str(trusted), cert_reqs=ssl.CERT_REQUIRED)
    server = secure(options, Echo)
    ours, theirs = certificate_of_client(), client_context()
    theirs.load_cert_chain(**other_authority().issue("somebody"))
    assert common_name_of(certificate_for(server, "one.example", ours)) == "first"
    refused(server, context=theirs)
    replace(by_name, authority().issue("one.example", common_name="second"))
    shutil.copyfile(other_authority().file, trusted)
    server.reload_certificates()
    assert common_name_of(certificate_for(server, "one.example", theirs)) == "second"
    refused(server, context=ours)


@pytest.mark.parametrize("what", ["plain", "context", "context in a dict"])
def test_reload_and_watch_certificates_without_files_are_a_runtime_error(server_of, what):
    server = server_of(Echo)
    if what != "plain":
        context = server_context()
        server.startSSL(context if what == "context" else {"context": context})
    for call in (server.reload_certificates, lambda: server.watch_certificates(1)):
        with pytest.raises(RuntimeError, match=r"context|startSSL"):
            call()


def test_context_of_the_user_s_own_is_reloaded_by_the_user(secure, here):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(**here)
    server = secure(context, Echo)
    assert shown(server) == "first"
    context.load_cert_chain(**named("second"))
    assert shown(server) == "second"


def test_watch_certificates_loads_what_has_changed(secure, tls_peer, here, caplog):
    caplog.set_level(logging.INFO, "pants_green")
    server = secure(here, Echo)
    old = tls_peer(server)
    watch = server.watch_certificates(0.01)
    assert watch.active
    replace(here, named("second"))
    until(lambda: shown(server) == "second")
    replace(here, named("third"))
    until(lambda: shown(server) == "third")
    assert answers(old)
    assert errors(caplog, "certificates_loaded")


def test_watch_certificates_sees_what_changed_before_it_was_called(secure, here):
    server = secure(here, Echo)
    replace(here, named("second"))
    server.watch_certificates(0.01)
    until(lambda: shown(server) == "second")


def test_watch_certificates_loads_nothing_while_nothing_changes(secure, here, caplog, recorder):
    caplog.set_level(logging.INFO, "pants_green")
    server = secure(here, Echo)
    server.watch_certificates(0.005)
    beats = server.engine.cycle(0.005, recorder, "beat")
    recorder.wait_for(5)
    beats.cancel()
    assert errors(caplog, "certificates_loaded") == []


@pytest.mark.parametrize("first", ["certfile", "keyfile"])
def test_watch_certificates_half_changed_ones_are_refused_and_loaded_when_complete(secure, here, caplog, recorder, first):
    server = secure(here, Echo)
    server.watch_certificates(0.01)
    replace(here, named("second"), first)
    until(lambda: errors(caplog, "certificates_refused"))
    (record,) = errors(caplog, "certificates_refused")
    assert record.levelno == logging.ERROR
    assert "stay in force" in record.getMessage()
    assert here["certfile"] in record.getMessage()
    assert shown(server) == "first"
    beats = server.engine.cycle(0.01, recorder, "beat")
    recorder.wait_for(4)
    beats.cancel()
    assert len(errors(caplog, "certificates_refused")) == 1
    replace(here, named("second"), "keyfile" if first == "certfile" else "certfile")
    until(lambda: shown(server) == "second")
    assert len(errors(caplog, "certificates_refused")) == 1


def test_watch_certificates_a_file_that_is_gone_for_a_while_is_refused_and_loaded_when_it_is_back(secure, here, caplog):
    server = secure(here, Echo)
    server.watch_certificates(0.01)
    os.unlink(here["certfile"])
    until(lambda: errors(caplog, "certificates_refused"))
    assert shown(server) == "first"
    replace(here, named("second"))
    until(lambda: shown(server) == "second")


def test_watch_certificates_watches_those_of_other_names(secure, tmp_path, here):
    by_name = {"certfile": str(tmp_path / "name.pem"), "keyfile": str(tmp_path / "name.key")}
    replace(by_name, authority().issue("one.example", common_name="first"))
    server = secure({**here, "sni": {"one.example": by_name}}, Echo)
    server.watch_certificates(0.01)
    replace(by_name, authority().issue("one.example", common_name="second"))
    until(lambda: common_name_of(certificate_for(server, "one.example", client_context())) == "second")
    assert shown(server) == "first"


def test_watch_certificates_watches_the_authorities_too(secure, tmp_path, here):
    """Whom to trust is in a file, too; somebody who is struck off it must not go on for ever."""
    trusted = tmp_path / "authority.pem"
    shutil.copyfile(authority().file, trusted)
    server = secure({**here, "ca_certs": str(trusted), "cert_reqs": ssl.CERT_REQUIRED}, Echo)
    server.watch_certificates(0.01)
    theirs = client_context()
    theirs.load_cert_chain(**other_authority().issue("somebody"))
    refused(server, context=theirs)
    fresh = tmp_path / "fresh.pem"
    shutil.copyfile(other_authority().file, fresh)
    os.replace(fresh, trusted)

    def let_in():
        gevent.sleep(0.02)
        try:
            with TLSPeer(server, context=theirs) as one:
                return answers(one)
        except (OSError, AssertionError):
            return False

    until(let_in, timeout=2.0)


def test_watch_certificates_before_listen(open_server, here):
    server = open_server(Server(Echo, ssl_options=here))
    server.watch_certificates(0.01)
    server.listen(LOCAL)
    replace(here, named("second"))
    until(lambda: shown(server) == "second")


def day(number):
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=number)


@pytest.mark.parametrize(
    ("certificate", "options", "event", "says"),
    [
        ({"not_after": day(3)}, {}, "certificate_expires", r"expires in 3\.0 days"),
        ({"not_before": day(-9), "not_after": day(-2)}, {}, "certificate_expired", "has expired on"),
        ({"not_after": day(20)}, {"expiry_warning": 21 * 86400}, "certificate_expires", r"expires in 20\.0 days"),
        ({"not_after": day(20)}, {}, None, None),
        ({"not_after": day(3)}, {"expiry_warning": 2 * 86400}, None, None),
    ],
    ids=["soon", "over", "late but asked for", "late", "soon but not asked for"],
)
def test_watch_certificates_warns_once_of_one_that_expires(secure, caplog, recorder, certificate, options, event, says):
    issued = named("ends", **certificate)
    server = secure(issued, Echo)
    server.watch_certificates(0.005, **options)
    beats = server.engine.cycle(0.005, recorder, "beat")
    recorder.wait_for(5)
    beats.cancel()
    records = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [(record.event, record.levelno) for record in records] == ([(event, logging.WARNING)] if event else [])
    if event:
        assert re.search(says, records[0].getMessage())
        assert issued["certfile"] in records[0].getMessage()


def test_watch_certificates_warns_again_on_the_next_day(secure, caplog, monkeypatch):
    now = time.time()
    clock = SimpleNamespace(time=lambda: now, strftime=time.strftime, gmtime=time.gmtime)
    monkeypatch.setattr("pants_green._certificates.time", clock)
    server = secure(named("ends", not_after=day(5)), Echo)
    server.watch_certificates(0.005)
    assert len(errors(caplog, "certificate_expires")) == 1
    now += 86400 + 60
    until(lambda: len(errors(caplog, "certificate_expires")) == 2)
    now += 86400 + 60
    until(lambda: len(errors(caplog, "certificate_expires")) == 3)
    now += 3 * 86400
    until(lambda: errors(caplog, "certificate_expired"))


def test_watch_certificates_a_new_certificate_ends_the_warnings(secure, here, caplog):
    replace(here, named("ends", not_after=day(3)))
    server = secure(here, Echo)
    server.watch_certificates(0.005)
    assert len(errors(caplog, "certificate_expires")) == 1
    replace(here, named("ends soon", not_after=day(4)))
    until(lambda: len(errors(caplog, "certificate_expires")) == 2)
    replace(here, named("second"))
    until(lambda: shown(server) == "second")
    assert len(errors(caplog, "certificate_expires")) == 2


def test_watch_certificates_cancel_ends_it_and_a_new_one_may_begin(secure, here, recorder):
    server = secure(here, Echo)
    watch = server.watch_certificates(0.005)
    with pytest.raises(RuntimeError, match="watching already"):
        server.watch_certificates(1)
    watch.cancel()
    watch.cancel()
    assert not watch.active
    replace(here, named("second"))
    beats = server.engine.cycle(0.005, recorder, "beat")
    recorder.wait_for(4)
    beats.cancel()
    assert shown(server) == "first"
    server.watch_certificates(0.005)
    replace(here, named("third"))
    until(lambda: shown(server) == "third")


def test_watch_certificates_ends_with_the_server(secure, here, recorder, caplog):
    server = secure(here, Echo)
    watch = server.watch_certificates(0.005)
    server.close()
    assert not watch.active
    os.unlink(here["certfile"])
    beats = server.engine.cycle(0.005, recorder, "beat")
    recorder.wait_for(4)
    beats.cancel()
    assert caplog.records == []
    with pytest.raises(RuntimeError, match="open"):
        server.watch_certificates(1)


@pytest.mark.parametrize("wrong", [0, -1, None, "often", float("nan")], ids=repr)
def test_watch_certificates_of_no_number_of_seconds_is_an_error(secure, here, wrong):
    server = secure(here, Echo)
    with pytest.raises((TypeError, ValueError), match=r"seconds|interval|delay"):
        server.watch_certificates(wrong)
    server.watch_certificates(10)  # nothing of it has stayed


@pytest.mark.parametrize("wrong", [-1, None, "often"], ids=repr)
def test_watch_certificates_of_no_expiry_warning_is_an_error(secure, here, wrong):
    with pytest.raises((TypeError, ValueError), match="expiry_warning"):
        secure(here, Echo).watch_certificates(1, expiry_warning=wrong)


# ---- other transports and other places


def test_unix_server_speaks_tls(secure, tls_peer, tmp_path):
    server = secure(None, Echo, str(tmp_path / "socket"))
    assert answers(tls_peer(server, server_hostname="localhost"))


@needs_ipv6
def test_ipv6_server_speaks_tls(secure, tls_peer):
    assert answers(tls_peer(secure(None, Echo, ("::1", 0))))


@needs_ipv6
@pytest.mark.parametrize("when", ["before listen", "after listen"])
def test_e1_6_every_interface_speaks_tls_in_both_families_and_nothing_else(open_server, peer, tls_peer, recorder, when):
    server = open_server(Server(recorder.of(Echo, "on_read")))
    if when == "before listen":
        server.startSSL(local_options())
    server.listen(0)
    if when == "after listen":
        server.startSSL(local_options())
    port = server.local_address[1]
    for host in ("127.0.0.1", "::1"):
        assert answers(tls_peer((host, port)))
        heard = len(recorder)
        plain = peer((host, port))
        plain.send(b"in clear\n")
        assert b"in clear" not in plain.recv_all()
        assert len(recorder) == heard


def test_two_servers_with_the_same_context(secure, tls_peer):
    context = server_context()
    for server in (secure(context, Echo), secure(context, Echo)):
        assert answers(tls_peer(server))


def test_session_is_resumed(secure, tls_peer):
    server = secure(local_options(), Echo)
    context = client_context("1.2")
    first = tls_peer(server, context=context)
    assert answers(first)
    session = first.object.session
    second = tls_peer(server, context=context, shake=False)
    second.object.session = session
    second.shake_hands()
    assert answers(second)
    assert second.object.session_reused


def test_connection_class_that_raises_costs_that_connection(secure, tls_peer, caplog):
    class Raising(Connection):
        def __init__(self, socket, server):
            super().__init__(socket, server)
            raise RuntimeError("as it was asked to")

    server = secure(None, Raising)
    one = tls_peer(server)
    with contextlib.suppress(ssl.SSLEOFError, ConnectionError):
        one.recv_all()
    assert server.listening
    assert not server.channels
    assert any("as it was asked to" in record.getMessage() for record in caplog.records)


def test_close_reason_of_a_tls_connection_that_the_peer_has_ended(secure, tls_peer, recorder):
    server = secure(None, Echo, on_close=lambda stream: recorder((stream.close_reason, stream.close_error)))
    one = tls_peer(server)
    assert answers(one)
    one.shutdown_output()
    recorder.wait_for(1)
    assert recorder == [(CloseReason.PEER_ENDED, None)]


# ---- an SNI callback that waits, and names that are none


@pytest.fixture
def waiting_context():
    """Return a server's context whose SNI callback waits, in a gevent way, and what it waits for and tells."""
    context = server_context()
    told, go_on = AsyncResult(), AsyncResult()

    def choose(connection, name, current):
        if name == "slow.example":
            told.set(name)
            go_on.get()

    context.sni_callback = choose
    return context, told, go_on


def test_sni_callback_that_waits_holds_up_no_other_connection(secure, tls_peer, waiting_context):
    context, told, go_on = waiting_context
    server = secure(context, Echo)
    slow = tls_peer(server, context=any_name(), server_hostname="slow.example", shake=False)
    shaking = gevent.spawn(slow.shake_hands)
    told.get()
    for _ in range(3):
        assert answers(tls_peer(server))
    go_on.set()
    shaking.get()
    assert answers(slow)


def test_sni_callback_that_waits_too_long_does_not_switch_the_limit_off(secure, peer, recorder, waiting_context):
    class Telling(Server):
        handshake_timeout = 0.05

        def on_ssl_wrap_error(self, sock, addr, exception):
            recorder(type(exception))

    context, told, go_on = waiting_context
    server = secure(context, Echo, server_class=Telling)
    slow = TLSPeer.over(peer(server), any_name(), server_hostname="slow.example", shake=False)
    with contextlib.suppress(ssl.SSLWantReadError):
        slow.object.do_handshake()
    slow.send_raw(slow._outgoing.read())
    told.get()
    peer(server)  # whose time is up after that of the first
    recorder.wait_for(1)
    go_on.set()
    # The first says nothing more; its time is up, too.
    recorder.wait_for(2)
    assert recorder == [HandshakeTimeout, HandshakeTimeout]


def test_close_while_an_sni_callback_waits_ends_that_handshake(secure, peer, recorder, waiting_context):
    context, told, go_on = waiting_context
    server = secure(context, recorder.of(Echo, *ALL))
    slow = TLSPeer.over(peer(server), any_name(), server_hostname="slow.example", shake=False)
    with contextlib.suppress(ssl.SSLWantReadError):
        slow.object.do_handshake()
    slow.send_raw(slow._outgoing.read())
    told.get()
    server.close()
    go_on.set()
    # It says nothing more, and yet it does not stay.
    until(lambda: greeted(server) == 0)
    with contextlib.suppress(ConnectionError):
        while raw(slow):
            pass
    assert recorder == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", [b"\xff\xfe\xfd\xfc.example", b"..........x.", b"*.wild.examp", b"a b\r\nc.exam;", b"%s%n{0}.exam"])
@pytest.mark.parametrize("version", VERSIONS)
def test_sni_names_that_are_none_cost_at_most_that_connection(secure, several, peer, tls_peer, name, version):
    asked = b"abcd.example"
    assert len(name) == len(asked)
    server = secure(several, Echo)
    odd = TLSPeer.over(peer(server), any_name(version), server_hostname=asked.decode(), shake=False)
    with contextlib.suppress(ssl.SSLWantReadError):
        odd.object.do_handshake()
    message = odd._outgoing.read()
    assert asked in message
    odd.send_raw(message.replace(asked, name))
    assert raw(odd)  # an alert, or the server's part of a handshake
    odd.close()
    until(lambda: greeted(server) == 0)
    assert answers(tls_peer(server, server_hostname="one.example"))
