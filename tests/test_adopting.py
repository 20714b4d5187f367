"""Adopting: sockets that somebody else has made, given to a Stream or a Server, in every state that a socket can be in."""

import gc
import os
import socket as patchable_socket
import ssl as patchable_ssl
import weakref

import gevent.socket
import gevent.ssl
import pytest
from certificates import authority, server_context
from echoes import Echo
from gevent import monkey
from needs import needs_ipv6
from peers import ListeningPeer, in_new_thread
from waiting import nothing_is_kept, turns, until  # noqa: F401

from pants_green import (
    ChannelStateError,
    Client,
    CloseReason,
    Datagram,
    Engine,
    InvalidAddressFormatError,
    Server,
    Stream,
    StreamServer,
    UnixClient,
    UnixConnection,
    UnixServer,
)
from pants_green._sockets import remote_sockaddr

AF_INET, AF_INET6, AF_UNIX = patchable_socket.AF_INET, patchable_socket.AF_INET6, patchable_socket.AF_UNIX
SOCK_DGRAM, SOL_SOCKET, TCP_NODELAY = patchable_socket.SOCK_DGRAM, patchable_socket.SOL_SOCKET, patchable_socket.TCP_NODELAY

MAKERS = {"gevent": gevent.socket.socket, "stdlib": monkey.get_original("socket", "socket")}
CONTEXTS = {"gevent": gevent.ssl.SSLContext, "stdlib": monkey.get_original("ssl", "SSLContext")}
if monkey.is_module_patched("ssl"):
    del CONTEXTS["stdlib"]  # which itself cannot wrap a socket any more
OWNERS = {"Stream": Stream, "Client": Client, "Server": Server, "StreamServer": StreamServer}

both_makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
both_contexts = pytest.mark.parametrize("kind", CONTEXTS)
all_owners = pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)


class Asking(Client):
    """Sends a line, keeps the answer, and ends."""

    answer = b""

    def on_connect(self):
        self.write(b"hello\n")

    def on_read(self, data):
        self.answer += data
        self.end()


@pytest.fixture
def echo(server_of):
    return server_of(Echo)


@pytest.fixture
def secure(server_of):
    return server_of(Echo).startSSL(server_context())


def bound(sock, address=("127.0.0.1", 0)):
    sock.bind(address)
    return sock


def connected(sock, server):
    sock.settimeout(5.0)  # that the connection stands is the kernel's doing, so nobody waits here for real
    sock.connect(server.address if isinstance(server, ListeningPeer) else server.local_address)
    return sock


def client_context_of(kind):
    context = CONTEXTS[kind](patchable_ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority().file)
    return context


def server_context_of(kind):
    context = CONTEXTS[kind](patchable_ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(**authority().localhost)
    return context


def answered(stream):
    """Tell whether a client got its line back."""
    until(lambda: stream.closed)
    return stream.answer == b"hello\n" and stream.close_reason is CloseReason.ENDED_HERE


def serves(server, **options):
    """Tell whether a server answers; close it."""
    address = ("localhost", server.local_address[1]) if options else server.local_address
    right = answered(Asking(**options).connect(address))
    server.close()
    return right


# ---- streams


@both_makers
def test_s2_13_stream_lives_on_a_connected_socket(make, echo):
    sock = connected(make(), echo)
    local = sock.getsockname()
    stream = Asking(socket=sock)
    assert (stream.local_address, stream.remote_address) == (local, echo.local_address)
    assert answered(stream)


@both_makers
def test_stream_dials_with_a_socket_that_was_never_used(make, echo):
    sock = make()
    number = sock.fileno()
    stream = Asking(socket=sock)
    assert (stream.fileno, stream.connected, stream.closed) == (number, False, False)
    assert answered(stream.connect(echo.local_address))


@both_makers
def test_stream_dials_from_where_its_socket_is_bound(make, echo):
    sock = bound(make())
    where = sock.getsockname()
    stream = Asking(socket=sock)
    assert stream.local_address == where
    assert answered(stream.connect(echo.local_address))
    assert stream.local_address == where


def test_stream_dials_the_first_address_of_a_name_that_fits_its_socket(echo):
    stream = Asking(socket=gevent.socket.socket(AF_INET)).connect("localhost", echo.local_address[1])
    assert answered(stream)


@both_makers
def test_stdlib_socket_is_taken_over_for_good(make, echo):
    sock = connected(make(), echo)
    stream = Asking(socket=sock)
    if not isinstance(sock, gevent.socket.socket):
        assert sock.fileno() == -1
        sock.close()  # harms nobody
    assert answered(stream)


def test_adopted_socket_has_no_delay_and_is_kept_alive(echo):
    stream = Asking(socket=connected(MAKERS["stdlib"](), echo))
    assert stream.socket.getsockopt(patchable_socket.IPPROTO_TCP, TCP_NODELAY) != 0
    assert stream.socket.getsockopt(SOL_SOCKET, patchable_socket.SO_KEEPALIVE) != 0
    assert answered(stream)


def test_source_address_and_a_socket_that_is_bound_already_do_not_go_together(echo, recorder):
    recorder.of(Stream)(socket=bound(gevent.socket.socket())).connect(echo.local_address, source_address=("127.0.0.1", 0))
    assert recorder.wait_for("on_close").names() == ["on_connect_error", "on_close"]
    assert "the given socket is bound already" in str(recorder[0][1])


def test_stream_that_never_dials_closes_its_socket(recorder):
    sock = MAKERS["stdlib"]()
    number = sock.fileno()
    stream = recorder.of(Stream)(socket=sock)
    stream.close()
    assert recorder.wait_for("on_close").names() == ["on_close"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


@needs_ipv6
def test_address_of_another_family_than_the_socket_is_on_connect_error(echo, recorder):
    stream = recorder.of(Stream)(socket=gevent.socket.socket(AF_INET6)).connect(echo.local_address)
    assert recorder.wait_for("on_close").names() == ["on_connect_error", "on_close"]
    assert "family" in str(recorder[0][1])
    assert stream.fileno is None


def test_refused_dial_closes_the_given_socket(recorder):
    nobody = bound(gevent.socket.socket())
    stream = recorder.of(Stream)(socket=MAKERS["stdlib"]()).connect(nobody.getsockname())
    assert recorder.wait_for("on_close").names() == ["on_connect_error", "on_close"]
    assert recorder[0][1].errno == 111 or "refused" in str(recorder[0][1])
    assert stream.fileno is None
    nobody.close()


@both_makers
@pytest.mark.parametrize("said", [b"last words", b""], ids=["data", "nothing"])
def test_socket_whose_peer_has_reset_it_meanwhile_is_a_connection_that_ends(make, said, recorder):
    with ListeningPeer() as listening:
        sock = connected(make(), listening)
        peer = listening.accept()
    peer.send(said)
    peer.reset()
    until(lambda: remote_sockaddr(sock) is None)
    stream = recorder.of(Stream)(socket=sock)
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), *([("on_read", said)] if said else []), ("on_close",)]
    assert stream.close_reason is CloseReason.PEER_LEFT


def test_stream_on_a_connected_socket_cannot_dial(echo):
    stream = Asking(socket=connected(gevent.socket.socket(), echo))
    with pytest.raises(ChannelStateError, match="used before"):
        stream.connect(echo.local_address)
    assert answered(stream)


def test_both_ends_of_a_socket_pair(recorder):
    one, other = patchable_socket.socketpair()
    echo = Echo(socket=one)
    asking = Asking(socket=other)
    assert answered(asking)
    until(lambda: echo.closed)


@both_makers
def test_socket_that_listens_is_no_streams(make):
    sock = bound(make())
    sock.listen()
    with pytest.raises(TypeError, match=r"listens: give it to a Server"):
        Stream(socket=sock)
    assert sock.fileno() >= 0  # it is still its owner's
    sock.close()


# ---- servers


@both_makers
def test_s2_13_server_accepts_from_a_socket_that_listens(make, recorder):
    class Listening(Server):
        def on_listen(self):
            recorder("on_listen")

    sock = bound(make())
    sock.listen()
    server = Listening(Echo, socket=sock)
    assert server.listening
    assert recorder == []  # its subclass may not be made yet
    assert server.listen() is server
    with pytest.raises(RuntimeError, match="listens already"):
        server.listen(("127.0.0.1", 0))
    assert serves(server)
    assert recorder == ["on_listen"]


@both_makers
def test_server_listens_where_its_socket_is_bound(make):
    sock = bound(make())
    where = sock.getsockname()
    server = Server(Echo, socket=sock)
    assert not server.listening
    server.listen()
    assert server.local_address == where
    assert serves(server)


@both_makers
def test_server_binds_a_socket_that_was_never_used(make):
    sock = make()
    number = sock.fileno()
    server = Server(Echo, socket=sock).listen(("localhost", 0))
    assert server.fileno == number
    assert serves(server)


@both_makers
def test_what_a_given_listener_accepts_has_no_delay(make, recorder):
    class Looking(Echo):
        def on_connect(self):
            recorder(self.socket.getsockopt(patchable_socket.IPPROTO_TCP, TCP_NODELAY) != 0)

    sock = bound(make())
    sock.listen()
    assert serves(Server(Looking, socket=sock))
    assert recorder == [True]


def test_given_socket_that_is_bound_takes_no_other_address():
    server = Server(Echo, socket=bound(gevent.socket.socket()))
    with pytest.raises(ChannelStateError, match=r"bound to 127.0.0.1:.* already"):
        server.listen(("127.0.0.1", 0))
    assert serves(server.listen())


@needs_ipv6
def test_s2_26_address_that_does_not_fit_the_given_socket_is_an_error_at_the_call():
    for family, wrong in ((AF_UNIX, ("127.0.0.1", 0)), (AF_INET6, ("127.0.0.1", 0)), (AF_INET, ("::1", 0)), (AF_INET, "/tmp/never")):
        server = Server(Echo, socket=gevent.socket.socket(family))
        with pytest.raises(InvalidAddressFormatError, match="does not fit the given socket"):
            server.listen(wrong)
        server.close()
    until(lambda: server.closed)


@needs_ipv6
def test_every_interface_is_that_of_the_given_sockets_family():
    server = Server(Echo, socket=gevent.socket.socket(AF_INET6)).listen(0)
    assert server.local_address[0] == "::"
    assert answered(Asking().connect(("::1", server.local_address[1])))
    server.close()


def test_server_that_never_listens_closes_its_socket():
    sock = MAKERS["stdlib"]()
    number = sock.fileno()
    Server(Echo, socket=sock).close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_address_in_use_leaves_the_given_socket_for_another(echo):
    server = Server(Echo, socket=gevent.socket.socket())
    with pytest.raises(OSError, match="another socket listens there"):
        server.listen(echo.local_address)
    assert serves(server.listen(("127.0.0.1", 0)))


def test_given_unix_listener_leaves_its_file_to_its_owner(tmp_path):
    path = str(tmp_path / "socket")
    sock = bound(MAKERS["stdlib"](AF_UNIX), path)
    sock.listen()
    assert serves(Server(Echo, socket=sock))
    assert os.path.exists(path)


def test_given_unix_socket_that_the_server_binds_has_its_file_removed(tmp_path):
    path = str(tmp_path / "socket")
    assert serves(Server(Echo, socket=gevent.socket.socket(AF_UNIX)).listen(path))
    assert not os.path.exists(path)


@both_makers
def test_connected_socket_is_no_servers(make, echo):
    sock = connected(make(), echo)
    with pytest.raises(TypeError, match=r"connected: give it to a Stream"):
        Server(Echo, socket=sock)
    assert sock.fileno() >= 0
    sock.close()


def test_server_of_a_wrong_class_takes_no_socket():
    sock = bound(MAKERS["stdlib"]())
    sock.listen()
    with pytest.raises(TypeError, match="subclass of Stream"):
        Server(int, socket=sock)
    assert sock.fileno() >= 0
    sock.close()


def test_gevent_sockets_of_another_thread_are_served_in_this_one():
    one, other = (gevent.socket.socket(fileno=sock.detach()) for sock in patchable_socket.socketpair())
    packets = bound(gevent.socket.socket(type=SOCK_DGRAM))
    listening = bound(gevent.socket.socket())
    listening.listen()
    heard = []

    class Hearing(Datagram):
        def on_read(self, data):
            heard.append(data)
            self.close()

    def life():
        channels = [Echo(socket=one), Asking(socket=other), Hearing(socket=packets), server := Server(Echo, socket=listening)]
        Datagram().write(b"packet", channels[2].local_address)
        channels.append(Asking().connect(server.local_address))
        until(lambda: all(channel.closed for channel in channels if channel is not server) and heard)
        for channel in Engine.instance().channels:
            channel.close()
        turns()  # in which they have their on_close
        gevent.get_hub().destroy(destroy_loop=True)
        return [channels[1].answer, channels[4].answer, *heard]

    assert in_new_thread(life) == [b"hello\n", b"hello\n", b"packet"]
    assert [sock.fileno() for sock in (one, other, packets, listening)] == [-1] * 4


# ---- with TLS


@both_contexts
@pytest.mark.parametrize("when", ["before dialling", "after dialling"])
def test_s2_13_ssl_socket_before_its_handshake_gives_its_context(kind, when, secure):
    sock = MAKERS[kind]()
    if when == "after dialling":
        connected(sock, secure)
    wrapped = client_context_of(kind).wrap_socket(sock, server_hostname="localhost", do_handshake_on_connect=False)
    stream = Asking(socket=wrapped)
    assert stream.ssl_enabled
    if when == "before dialling":
        stream.connect(secure.local_address)
    assert answered(stream)
    assert stream.tls_version == "TLSv1.3"
    assert wrapped.fileno() == -1


@both_contexts
def test_ssl_socket_asks_for_the_name_that_it_was_made_for(kind, secure, recorder):
    sock = connected(MAKERS[kind](), secure)
    wrapped = client_context_of(kind).wrap_socket(sock, server_hostname="elsewhere.test", do_handshake_on_connect=False)
    stream = recorder.of(Stream, "on_ssl_handshake_error", "on_close")(socket=wrapped)
    assert recorder.wait_for("on_close").names() == ["on_ssl_handshake_error", "on_close"]
    assert "elsewhere.test" in str(recorder[0][1])
    assert stream.close_reason is CloseReason.TLS_FAILED


def test_ssl_socket_after_its_handshake_is_a_clear_error(secure):
    sock = connected(gevent.socket.socket(), secure)
    wrapped = client_context_of("gevent").wrap_socket(sock, server_hostname="localhost")
    with pytest.raises(ChannelStateError, match=r"handshake of .* is done"):
        Stream(socket=wrapped)
    wrapped.sendall(b"still its owner's\n")
    assert wrapped.recv(100) == b"still its owner's\n"
    wrapped.close()


@both_contexts
@pytest.mark.parametrize("state", ["fresh", "bound", "listening"])
def test_s2_13_s2_14_server_of_an_ssl_socket_speaks_tls(kind, state):
    sock = MAKERS[kind]()
    if state != "fresh":
        bound(sock)
    if state == "listening":
        sock.listen()
    server = Server(Echo, socket=server_context_of(kind).wrap_socket(sock, server_side=True))
    if state == "fresh":
        server.listen(("127.0.0.1", 0))
    else:
        server.listen()
    assert server.ssl_enabled
    assert serves(server, ssl_options={"ca_certs": authority().file})


def test_s2_14_ssl_options_and_a_socket_that_listens():
    sock = bound(MAKERS["stdlib"]())
    sock.listen()
    assert serves(Server(Echo, socket=sock, ssl_options=authority().localhost), ssl_options={"ca_certs": authority().file})


def test_options_beside_a_context_of_the_socket_are_an_error():
    for owner, options in ((Stream, {}), (Server, authority().localhost)):
        wrapped = server_context_of("gevent").wrap_socket(MAKERS["gevent"](), server_side=True)
        with pytest.raises(ChannelStateError, match="has a context of its own"):
            owner(socket=wrapped, ssl_options=options)
        wrapped.close()


# ---- what is no socket, or of no use


@all_owners
@pytest.mark.parametrize("wrong", ["a str", 5, object()], ids=str)
def test_what_is_no_socket_is_a_type_error(owner, wrong):
    with pytest.raises(TypeError, match=rf"{owner.__name__}\(socket=\) takes a socket of gevent or of the standard library"):
        owner(socket=wrong)


@all_owners
@both_makers
def test_closed_socket_is_a_type_error(owner, make):
    sock = make()
    sock.close()
    with pytest.raises(TypeError, match="takes an open socket"):
        owner(socket=sock)


@all_owners
@both_makers
def test_datagram_socket_is_a_type_error_and_stays_its_owners(owner, make):
    sock = make(AF_INET, SOCK_DGRAM)
    with pytest.raises(TypeError, match="takes a stream socket"):
        owner(socket=sock)
    assert sock.fileno() >= 0
    sock.close()


@pytest.mark.parametrize("owner", [UnixServer, UnixConnection, UnixClient])
def test_tcp_socket_for_a_unix_channel_is_a_type_error_and_stays_its_owners(owner):
    sock = gevent.socket.socket()
    with pytest.raises(TypeError, match=rf"{owner.__name__}\(socket=\) takes a Unix socket"):
        owner(socket=sock)
    assert sock.fileno() >= 0
    sock.close()


def test_streams_of_adopted_sockets_leave_no_circles(echo):
    gc.collect()
    gc.disable()
    try:
        for stream in (Asking(socket=connected(MAKERS["stdlib"](), echo)), Asking(socket=MAKERS["gevent"]()).connect(echo.local_address)):
            assert answered(stream)
        gone = weakref.ref(stream)
        del stream
        until(lambda: gone() is None)
    finally:
        gc.enable()
