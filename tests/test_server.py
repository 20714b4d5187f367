"""Servers: listening, accepting, closing, and what a connection class may look like."""

import contextlib
import errno
import logging
import os
import socket
import struct
import time

import gevent
import pytest
from children import Child
from children import Peer as BlockingPeer
from gevent.event import Event
from needs import needs_ipv6
from peers import PlainSocket, in_thread
from waiting import nothing_is_kept, turns, unsent, until  # noqa: F401

from pants_green import Client, CloseReason, Connection, Engine, InvalidAddressFormatError, Server, Stream, StreamServer, _sockets, engine
from pants_green.channel import Channel

MIB = 1024 * 1024

#: More than the buffers of both kernels hold.
BIG = 16 * MIB
LOCAL = ("127.0.0.1", 0)



class Echo(Connection):
    def on_read(self, data):
        self.write(data)


def channels_of(server, count):
    """Return the connections of a server once there are `count`."""
    until(lambda: len(server.channels) == count)
    return server.channels.values()


def answers(one, data=b"hello"):
    """Tell whether this peer is echoed."""
    one.send(data)
    return one.recv_exactly(len(data)) == data


def refuses(address):
    """Tell whether nobody listens at an address."""
    with PlainSocket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET) as probe:
        return probe.connect_ex(address) == errno.ECONNREFUSED


def free_port():
    """Return a port on which nobody listens now."""
    with PlainSocket() as probe:
        probe.bind(LOCAL)
        return probe.getsockname()[1]


# ---- Making


def test_s0_2_s1_8_s2_3_server_wraps_each_connection_in_an_instance_of_its_class(server_of, peer):
    server = server_of(Echo)
    first, second = peer(server), peer(server)
    assert {type(channel) for channel in channels_of(server, 2)} == {Echo}
    assert answers(first, b"first")
    assert answers(second, b"second")


class EchoServer(Server):
    ConnectionClass = Echo


@pytest.mark.parametrize("make", [lambda: Server(Echo), lambda: Server(ConnectionClass=Echo), EchoServer])
def test_s0_7_s0_8_s2_4_s3_5_connection_class_by_position_by_keyword_and_on_the_class(open_server, peer, make):
    assert answers(peer(open_server(make()).listen(LOCAL)))


def test_s3_9_server_without_a_connection_class_accepts_and_ignores(open_server, peer, caplog):
    server = open_server(Server()).listen(LOCAL)
    one = peer(server)
    one.send(b"anybody there?")
    (channel,) = channels_of(server, 1)
    turns()
    assert type(channel) is Connection
    assert channel.connected
    one.shutdown_output()
    assert one.recv_all() == b""
    assert caplog.records == []


@pytest.mark.parametrize("wrong", [5, "Echo", dict, object, Server, Channel, object()], ids=repr)
@pytest.mark.parametrize("where", ["argument", "attribute"])
def test_connection_class_that_is_none_is_a_type_error(wrong, where):
    make = type("Sub", (Server,), {"ConnectionClass": wrong}) if where == "attribute" else lambda: Server(wrong)
    with pytest.raises(TypeError, match="ConnectionClass"):
        make()


def test_connection_class_may_be_a_factory(server_of, peer):
    def make(socket, server):
        return Echo(socket=socket, server=server)

    server = server_of(make)
    assert answers(peer(server))
    assert type(channels_of(server, 1)[0]) is Echo


class KeywordShape(Echo):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = self.server


class PositionalShape(Echo):
    def __init__(self, socket, server):
        super().__init__(socket, server)
        self.seen = self.server


class ForwardingShape(Echo):
    def __init__(self, *args, extra=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = self.server


@pytest.mark.parametrize("shape", [KeywordShape, PositionalShape, ForwardingShape])
def test_s0_9_constructors_of_both_shapes_work_and_know_the_server(server_of, peer, shape):
    server = server_of(shape)
    assert answers(peer(server))
    (channel,) = channels_of(server, 1)
    assert channel.seen is channel.server is server


@pytest.mark.parametrize("given", [engine, Engine.instance(), None], ids=["module", "Engine", "None"])
def test_s2_12_engine_is_the_global_one_or_the_one_that_is_given(open_server, peer, given):
    server = open_server(Server(Echo, engine=given)).listen(LOCAL)
    peer(server)
    assert server.engine is Engine.instance()
    assert channels_of(server, 1)[0].engine is Engine.instance()
    assert server in Engine.instance().channels


def test_wrong_engine_is_a_type_error():
    with pytest.raises(TypeError, match="engine="):
        Server(engine="main")


# ---- Listening


def test_s2_28_listen_returns_the_server(open_server):
    server = open_server(Server())
    assert server.listen(LOCAL) is server
    assert server.listening


def test_s2_20_s2_33_s4_7_on_listen_is_called_before_listen_returns(open_server, recorder):
    class Proud(Server):
        def on_listen(self):
            recorder("on_listen", self.listening, self.local_address)

    server = open_server(Proud()).listen(LOCAL)
    assert recorder == [("on_listen", True, server.local_address)]


def test_on_listen_may_close(recorder):
    class Shy(Server):
        def on_listen(self):
            self.close()

        def on_close(self):
            recorder("on_close")

    server = Shy().listen(LOCAL)
    assert server.closed
    recorder.wait_for("on_close")


def test_on_listen_that_raises_is_logged_and_closes(caplog):
    class Broken(Server):
        def on_listen(self):
            raise ZeroDivisionError

    server = Broken().listen(LOCAL)
    assert server.closed
    assert server.close_reason is CloseReason.CALLBACK_ERROR
    assert [record.channel for record in caplog.records if record.levelno == logging.ERROR] == [server]


def test_s2_6_clients_may_connect_before_the_hub_runs(open_server, recorder):
    server = open_server(Server(recorder.of(Echo))).listen(LOCAL)
    waiting = []
    for _ in range(150):  # more than are accepted at once
        one = PlainSocket()
        one.setblocking(False)
        assert one.connect_ex(server.local_address) in (0, errno.EINPROGRESS)
        waiting.append(one)
    assert recorder == []
    recorder.wait_for(150)
    assert recorder.names() == ["on_connect"] * 150
    assert len(server.channels) == 150
    for one in waiting:
        one.close()
    recorder.wait_for(lambda events: events.names().count("on_close") == 150)


LISTEN_FORMS = [
    pytest.param(lambda server, port: server.listen(("127.0.0.1", port)), id="s2_23 pair"),
    pytest.param(lambda server, port: server.listen(("", port)), id="s4_24 any"),
    pytest.param(lambda server, port: server.listen(port), id="s0_4 s2_22 port"),
    pytest.param(lambda server, port: server.listen(port, ""), id="s0_5 port, host"),
    pytest.param(lambda server, port: server.listen(port, "127.0.0.1"), id="port, numeric host"),
    pytest.param(lambda server, port: server.listen(port, "127.0.0.1", 5), id="port, host, backlog"),
    pytest.param(lambda server, port: server.listen(("127.0.0.1", port), 5), id="s2_19 address, backlog"),
    pytest.param(lambda server, port: server.listen(("127.0.0.1", port), 5, False), id="s2_19 address, backlog, slave"),
    pytest.param(lambda server, port: server.listen(("127.0.0.1", port), backlog=5, slave=True), id="s2_19 keywords"),
    pytest.param(lambda server, port: server.listen(host="127.0.0.1", port=port), id="host=, port="),
    pytest.param(lambda server, port: server.listen(("localhost", port)), id="name"),
]


@pytest.mark.parametrize("listen", LISTEN_FORMS)
def test_listen_understands_every_form(open_server, peer, listen):
    port = free_port()
    server = open_server(Server(Echo))
    assert listen(server, port) is server
    assert server.local_address[1] == port
    assert answers(peer(("127.0.0.1", port)))


def test_s0_3_listen_without_arguments_is_port_8080(open_server, peer):
    server = open_server(Server(Echo))
    try:
        server.listen()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        pytest.skip("somebody listens on port 8080")
    assert server.local_address[1] == 8080
    assert answers(peer(("127.0.0.1", 8080)))


OUT_OF_RANGE = [70000, -1, ("127.0.0.1", 65536), ("127.0.0.1", -1)]
WRONG_ADDRESSES = [*OUT_OF_RANGE, ("127.0.0.1", "80"), ("127.0.0.1",), (1, 2, 3), None, 1.5, [], "127.0.0.1:80", ("a b", 80)]


@pytest.mark.parametrize("address", WRONG_ADDRESSES, ids=repr)
def test_s2_26_wrong_address_is_an_error_at_the_call_and_the_server_may_try_another(open_server, peer, address):
    server = open_server(Server(Echo))
    with pytest.raises(InvalidAddressFormatError):
        server.listen(address)
    assert not server.listening
    assert not server.closed
    assert answers(peer(server.listen(LOCAL)))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [({"backlog": 0}, ValueError), ({"backlog": "5"}, TypeError), ({"backlog": 1.5}, TypeError), ({"bcklog": 5}, TypeError)],
    ids=str,
)
def test_wrong_arguments_of_listen_are_errors_at_the_call(open_server, wrong, error):
    with pytest.raises(error, match=r"backlog|bcklog"):
        open_server(Server()).listen(LOCAL, **wrong)


def test_address_that_is_not_ours_is_an_error_at_the_call(open_server):
    server = open_server(Server())
    with pytest.raises(OSError, match=r"192\.0\.2\.1:80") as caught:
        server.listen(("192.0.2.1", 8099))
    assert caught.value.errno == errno.EADDRNOTAVAIL
    assert not server.listening


def test_e1_7_second_listener_on_a_port_fails_clearly_and_may_try_another(open_server, peer):
    first = open_server(Server(Echo)).listen(LOCAL)
    port = first.local_address[1]
    second = open_server(Server(Echo))
    with pytest.raises(OSError, match=rf"127\.0\.0\.1:{port}.*in use") as caught:
        second.listen(("127.0.0.1", port))
    assert caught.value.errno == errno.EADDRINUSE
    assert (second.listening, second.closed, second.local_address) == (False, False, None)
    assert answers(peer(second.listen(LOCAL)))
    assert answers(peer(first))


@needs_ipv6
def test_port_in_use_on_the_other_family_is_an_error_and_leaves_nothing_open(open_server):
    blocker = open_server(Server()).listen(("::1", 0))
    port = blocker.local_address[1]
    with pytest.raises(OSError, match="in use") as caught:
        open_server(Server()).listen(port)
    assert caught.value.errno == errno.EADDRINUSE
    # The listener on the family that was free is closed again: the leak check looks.


def test_e1_7_port_is_shared_only_if_both_say_so(open_server, peer):
    first = open_server(Server(Echo)).listen(LOCAL, reuse_port=True)
    second = open_server(Server(Echo)).listen(first.local_address, reuse_port=True)
    assert second.local_address == first.local_address
    with pytest.raises(OSError, match="in use"):
        open_server(Server(Echo)).listen(first.local_address)
    for _ in range(20):
        assert answers(peer(first))


def test_port_can_be_taken_again_right_after_closing(open_server, peer):
    server = open_server(Server(Echo)).listen(LOCAL)
    one = peer(server)
    assert answers(one)
    server.close()
    assert one.recv_all() == b""
    again = open_server(Server(Echo)).listen(server.local_address)
    assert answers(peer(again))


def test_s2_27_listening_twice_is_a_runtime_error(open_server):
    server = open_server(Server()).listen(LOCAL)
    before = server.local_address
    with pytest.raises(RuntimeError, match="listens already"):
        server.listen(LOCAL)
    assert server.listening
    assert server.local_address == before


@pytest.mark.parametrize("listened", [False, True])
def test_s2_16_s2_27_listening_after_close_is_a_runtime_error(recorder, listened):
    class Server2(Server):
        def on_close(self):
            recorder("on_close")

    server = Server2()
    if listened:
        server.listen(LOCAL)
    server.close()
    with pytest.raises(RuntimeError, match="closed"):
        server.listen(LOCAL)
    recorder.wait_for("on_close")


# ---- Both families


@needs_ipv6
@pytest.mark.parametrize(
    ("address", "slave", "v4", "v6"),
    [
        (0, True, True, True),
        (("", 0), True, True, True),
        (("0.0.0.0", 0), True, True, True),
        (("", 0, 0, 0), True, True, True),
        (("::", 0), True, True, True),
        (0, False, True, False),
        (("", 0, 0, 0), False, False, True),
        (("127.0.0.1", 0), True, True, False),
        (("::1", 0), True, False, True),
        (("::1", 0, 0, 0), True, False, True),
    ],
    ids=repr,
)
def test_s2_2_s2_24_s2_25_s2_29_families_that_are_served(open_server, peer, address, slave, v4, v6):
    server = open_server(Server(Echo)).listen(address, slave=slave)
    port = server.local_address[1]
    for host, served in (("127.0.0.1", v4), ("::1", v6)):
        if served:
            assert answers(peer((host, port)))
        else:
            # Not "is refused": somebody else may have that port on the other family.
            with contextlib.suppress(ConnectionRefusedError):
                peer((host, port))
    turns()
    assert len(server.channels) == v4 + v6
    assert {channel.server for channel in server.channels.values()} == {server}


@needs_ipv6
def test_s2_18_both_families_are_closed_together(open_server):
    server = open_server(Server()).listen(0)
    port = server.local_address[1]
    server.close()
    assert refuses(("127.0.0.1", port))
    assert refuses(("::1", port))


@needs_ipv6
def test_addresses_of_an_ipv6_connection_have_four_elements(server_of, peer):
    server = server_of(Echo, ("::1", 0))
    one = peer(server)
    (channel,) = channels_of(server, 1)
    assert channel.remote_address == one.address
    assert channel.local_address == server.local_address
    assert len(channel.remote_address) == len(server.local_address) == 4


def test_s2_20_name_is_listened_on_at_all_its_addresses(open_server, peer, monkeypatch):
    from pants_green._address import Address

    hosts = ["127.0.0.1", "127.0.0.2"]

    def resolve(address):
        if not address.needs_lookup:
            return [address]
        return [Address(socket.AF_INET, (host, address.sockaddr[1]), False) for host in hosts]

    monkeypatch.setattr(_sockets, "resolve", resolve)
    server = open_server(Server(Echo)).listen(("two.test", 0))
    for host in hosts:
        assert answers(peer((host, server.local_address[1])))


def test_name_that_nobody_knows_is_an_error_at_the_call(open_server, monkeypatch):
    def resolve(address):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("pants_green._sockets.resolve", resolve)
    server = open_server(Server())
    with pytest.raises(OSError, match="not known"):
        server.listen(("nobody.invalid", 80))
    assert not server.listening


# ---- What a server is


@pytest.mark.parametrize("kind", [Server, StreamServer])
def test_e1_15_addresses_are_none_and_never_raise(kind, recorder):
    class Kind(kind):
        def on_close(self):
            recorder("on_close")

    server = Kind()
    assert (server.local_address, server.remote_address, server.fileno, server.socket) == (None, None, None, None)
    server.listen(LOCAL)
    assert server.local_address[0] == "127.0.0.1"
    assert server.local_address[1] > 0
    assert server.remote_address is None
    assert server.fileno == server.socket.fileno()
    server.close()
    assert (server.remote_address, server.fileno, server.socket) == (None, None, None)
    recorder.wait_for("on_close")


def test_s0_10_s0_13_channels_is_a_mapping_of_the_connections(server_of, peer):
    server = server_of(Echo)
    assert dict(server.channels) == {}
    first, second = peer(server), peer(server)
    one, other = sorted(channels_of(server, 2), key=lambda channel: channel.remote_address != first.address)
    assert dict(server.channels) == {one.fileno: one, other.fileno: other}
    assert server.channels[one.fileno] is one
    assert sorted(server.channels) == sorted(server.channels.keys()) == sorted(server.channels.iterkeys())
    assert set(server.channels.values()) == set(server.channels.itervalues()) == {one, other}
    assert set(server.channels.items()) == set(server.channels.iteritems())
    first.close()
    until(lambda: len(server.channels) == 1)
    assert server.channels.values() == [other]
    assert answers(second)


@pytest.mark.parametrize("view", ["values", "itervalues", "keys", "iterkeys", "items", "iteritems", "__iter__"])
def test_channels_may_change_while_somebody_walks_them(server_of, peer, view):
    server = server_of(Echo)
    for _ in range(3):
        peer(server)
    channels_of(server, 3)
    walked = 0
    for _ in getattr(server.channels, view)():
        walked += 1
        for channel in server.channels.values():
            channel.close()
    assert walked == 3
    assert len(server.channels) == 0


def test_descriptor_that_is_used_again_is_the_new_connections_key(server_of, peer):
    server = server_of(Echo)
    for _ in range(5):
        with peer(server) as one:
            (channel,) = channels_of(server, 1)
            assert dict(server.channels) == {channel.fileno: channel}
            assert answers(one)
        until(lambda: not server.channels)


# ---- Accepting


def test_s4_8_s4_25_stream_server_hands_out_the_raw_socket(open_server, peer, recorder):
    class Raw(StreamServer):
        def on_accept(self, sock, addr):
            recorder(addr)
            sock.sendall(sock.recv(100).upper())
            sock.close()

    server = open_server(Raw()).listen(LOCAL)
    one = peer(server)
    one.send(b"raw")
    assert one.recv_all() == b"RAW"
    assert recorder == [one.address]


def test_s4_26_stream_server_closes(open_server, recorder):
    class Noting(StreamServer):
        def on_close(self):
            recorder("on_close")

    server = open_server(Noting()).listen(LOCAL)
    server.close()
    server.close()
    assert refuses(server.local_address)
    recorder.wait_for("on_close")
    turns()
    assert recorder == ["on_close"]


def test_stream_server_closes_what_nobody_wants(open_server, peer):
    assert peer(open_server(StreamServer()).listen(LOCAL)).at_eof()


@pytest.mark.parametrize("base", [StreamServer, Server])
def test_handle_accept_is_the_oldest_name_of_on_accept(open_server, peer, base):
    class Oldest(base):
        def handle_accept(self, sock, addr):
            sock.sendall(b"from the past")
            sock.close()

    assert peer(open_server(Oldest()).listen(LOCAL)).recv_all() == b"from the past"


def test_stream_server_may_wrap_the_socket_in_a_stream(open_server, peer, recorder):
    class Wrapping(StreamServer):
        def on_accept(self, sock, addr):
            kind(socket=sock)

    kind = recorder.of(Echo)
    server = open_server(Wrapping()).listen(LOCAL)
    one = peer(server)
    assert answers(one)
    one.close()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_end", "on_close"]


def test_s2_30_server_may_wrap_some_connections_and_turn_others_away(open_server, peer):
    class Choosy(Server):
        ConnectionClass = Echo
        count = 0

        def on_accept(self, sock, addr):
            self.count += 1
            if self.count % 2:
                super().on_accept(sock, addr)
            else:
                sock.sendall(b"no")
                sock.close()

    server = open_server(Choosy()).listen(LOCAL)
    for _ in range(3):
        assert answers(peer(server))
        assert peer(server).recv_all() == b"no"
    assert len(server.channels) == 3


def test_on_accept_may_choose_the_class(open_server, peer):
    class Upper(Connection):
        def on_read(self, data):
            self.write(data.upper())

    class Mixed(Server):
        def on_accept(self, sock, addr):
            kind = Upper if len(self.channels) % 2 else Echo
            kind(socket=sock, server=self)

    server = open_server(Mixed()).listen(LOCAL)
    first, second = peer(server), peer(server)
    assert answers(first, b"abc")
    second.send(b"abc")
    assert second.recv_exactly(3) == b"ABC"


def slow_on_accept(gate):
    class Slow(Server):
        ConnectionClass = Echo
        count = 0

        def on_accept(self, sock, addr):
            self.count += 1
            if self.count == 1:
                gate.wait()
            super().on_accept(sock, addr)

    return Slow()


def slow_constructor(gate):
    class Slow(Echo):
        count = 0

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            Slow.count += 1
            if Slow.count == 1:
                gate.wait()

    return Server(Slow)


@pytest.mark.parametrize("slow", [slow_on_accept, slow_constructor])
def test_blocking_while_accepting_holds_up_nobody(open_server, peer, slow):
    gate = Event()
    server = open_server(slow(gate)).listen(LOCAL)
    first = peer(server)
    first.send(b"waiting")
    second = peer(server)
    assert answers(second)
    assert len(server.channels) == 1
    gate.set()
    assert first.recv_exactly(7) == b"waiting"
    assert len(channels_of(server, 2)) == 2


@pytest.mark.parametrize("slow", [slow_on_accept, slow_constructor])
def test_peer_that_leaves_while_it_is_accepted_does_no_harm(open_server, peer, slow):
    gate = Event()
    server = open_server(slow(gate)).listen(LOCAL)
    peer(server).reset()
    assert answers(peer(server))
    gate.set()
    turns()
    assert answers(peer(server))


@pytest.mark.parametrize("slow", [slow_on_accept, slow_constructor])
def test_server_closed_while_a_connection_is_accepted_ends_that_too(open_server, peer, slow):
    gate = Event()
    server = open_server(slow(gate)).listen(LOCAL)
    one = peer(server)
    turns()
    server.close()
    turns()
    gate.set()
    until(lambda: not server._children(), timeout=1)
    assert one.recv_all() == b""


def test_server_closed_in_on_accept_ends_that_connection_too(open_server, peer):
    class OneIsEnough(Server):
        def on_accept(self, sock, addr):
            self.close()
            gevent.sleep(0)
            super().on_accept(sock, addr)

    server = open_server(OneIsEnough()).listen(LOCAL)
    assert peer(server).recv_all() == b""
    assert server.closed
    until(lambda: not server._children(), timeout=1)


RAISED = {
    "an error": lambda: ZeroDivisionError("raised"),
    "a Timeout": lambda: gevent.Timeout(1),
    "GreenletExit": lambda: gevent.GreenletExit("raised"),
}


def broken_before_super(make, culprit):
    class Broken(Echo):
        def __init__(self, **kwargs):
            if culprit():
                raise make()
            super().__init__(**kwargs)

    return Server(Broken)


def broken_after_super(make, culprit):
    class Broken(Echo):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            if culprit():
                raise make()

        def on_close(self):
            assert not culprit.again

    return Server(Broken)


def broken_on_accept(make, culprit):
    class Broken(Server):
        ConnectionClass = Echo

        def on_accept(self, sock, addr):
            if culprit():
                raise make()
            super().on_accept(sock, addr)

    return Broken()


def broken_after_wrapping(make, culprit):
    class Broken(Server):
        ConnectionClass = Echo

        def on_accept(self, sock, addr):
            super().on_accept(sock, addr)
            if culprit():
                raise make()

    return Broken()


class OnlyTheFirst:
    """Says yes once."""

    again = False

    def __call__(self):
        said, self.again = self.again, True
        return not said


BROKEN = [broken_before_super, broken_after_super, broken_on_accept, broken_after_wrapping]


@pytest.mark.parametrize("what", RAISED)
@pytest.mark.parametrize("broken", BROKEN)
def test_exception_while_accepting_costs_that_socket_only(open_server, peer, caplog, broken, what):
    server = open_server(broken(RAISED[what], OnlyTheFirst())).listen(LOCAL)
    assert peer(server).at_eof()
    (logged,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert logged.channel is server
    assert logged.exc_info[0] is type(RAISED[what]())
    assert server.listening
    assert server.channels.values() == []
    assert answers(peer(server))


@pytest.mark.parametrize("what", RAISED)
@pytest.mark.parametrize("broken", BROKEN)
def test_exception_while_accepting_goes_to_on_error_if_the_server_has_one(open_server, peer, recorder, caplog, broken, what):
    server = open_server(broken(RAISED[what], OnlyTheFirst()))
    server.on_error = lambda error: recorder("on_error", type(error))
    server.listen(LOCAL)
    assert peer(server).at_eof()
    recorder.wait_for(("on_error", type(RAISED[what]())))
    assert server.listening
    assert caplog.records == []
    assert answers(peer(server))


def test_on_error_of_a_server_that_raises_is_logged_and_closes(open_server, peer, caplog):
    def worse(error):
        raise KeyError("worse")

    server = open_server(broken_on_accept(RAISED["an error"], OnlyTheFirst()))
    server.on_error = worse
    server.listen(LOCAL)
    assert peer(server).at_eof()
    until(lambda: "worse" in caplog.text)


@pytest.mark.parametrize("what", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("broken", BROKEN)
def test_keyboard_interrupt_and_system_exit_while_accepting_leave_start(open_server, peer, broken, what):
    server = open_server(broken(lambda: what("stop"), OnlyTheFirst())).listen(LOCAL)
    visitor = gevent.spawn(lambda: peer(server).at_eof())
    with pytest.raises(what, match="stop"):
        Engine.instance().start()
    assert visitor.get() is True
    assert server.listening
    assert answers(peer(server))


def test_connection_that_dies_in_the_queue_is_no_trouble(open_server, peer, caplog):
    server = open_server(Server(Echo)).listen(LOCAL)
    with PlainSocket() as gone:
        gone.connect(server.local_address)  # the hub does not run meanwhile
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert answers(peer(server))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


# ---- No descriptor left

EXHAUSTED = """
import logging, os, resource, sys, time
from pants_green import Connection, Engine, Server, server

server.EPISODE = 0.0  # the second shortage of the test follows at once
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(levelname)s %(message)s")

class Status(Connection):
    read_delimiter = b"\\n"

    def on_read(self, line):
        self.write(b"%d %f\\n" % (len(self.server.channels), time.process_time()))

server = Server(Status).listen(("127.0.0.1", 0))

def lower_the_limit():
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 5, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    print("port", server.local_address[1])

Engine.instance().callback(lower_the_limit)
Engine.instance().start()
"""


def status(one):
    """Return how many connections the child has, and the CPU seconds that it used."""
    one.send(b"?\n")
    answer = b""
    while not answer.endswith(b"\n"):
        answer += one.read(1)
    count, seconds = answer.split()
    return int(count), float(seconds)


def test_without_descriptors_connections_wait_and_are_served_later():
    """Twice: logged once each time, at rest meanwhile, recovered by itself."""
    with Child("-c", EXHAUSTED) as child:
        port = child.port()
        peers = [BlockingPeer(port)]
        status(peers[0])
        for episode in (1, 2):
            peers += [BlockingPeer(port) for _ in range(12)]
            child.expect("WARNING.*cannot accept")
            count, before = status(peers[0])
            assert 1 <= count < len(peers)
            time.sleep(0.3)
            still, after = status(peers[0])
            assert still == count
            assert after - before < 0.12
            assert child.output.count("cannot accept") == episode
            accepted, peers = peers[:count], peers[count:]
            # Not more wait than there is room for, or the episode would go on.
            for one in accepted + peers[count:]:
                one.socket.close()
            peers = peers[:count]
            for one in peers:
                status(one)
            child.expect("INFO.*accepting again")
        for one in peers:
            one.socket.close()


@pytest.fixture
def failing_accept(monkeypatch):
    """Return a list of errnos: each is what one call of accept fails with; then it works again."""
    codes = []
    accept = _sockets.Listener.accept

    def failing(listener):
        if codes:
            code = codes.pop(0)
            raise OSError(code, "made up")
        return accept(listener)

    monkeypatch.setattr(_sockets.Listener, "accept", failing)
    return codes


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_machine_that_is_exhausted_for_a_while_is_told_once(server_of, peer, caplog, failing_accept, code):
    caplog.set_level(logging.INFO, "pants_green")
    server = server_of(Echo)
    failing_accept.extend([code] * 3)
    assert answers(peer(server))
    assert [(record.levelno, record.event) for record in caplog.records[1:]] == [
        (logging.WARNING, "accept_paused"),
        (logging.INFO, "accept_resumed"),
    ]
    assert server.listening


def test_machine_at_its_limit_does_not_fill_the_log(server_of, peer, caplog, failing_accept):
    """A descriptor becomes free, a connection takes it, none is left: again and again."""
    caplog.set_level(logging.INFO, "pants_green")
    server = server_of(Echo)
    for _ in range(3):
        failing_accept.append(errno.EMFILE)
        assert answers(peer(server))
    assert [record.event for record in caplog.records[1:]] == ["accept_paused", "accept_resumed"]


def test_server_closed_while_it_waits_for_descriptors(open_server, peer, recorder, failing_accept):
    class Noting(Server):
        def on_close(self):
            recorder("on_close")

    server = open_server(Noting()).listen(LOCAL)
    failing_accept.extend([errno.EMFILE] * 1000)
    one = peer(server)
    until(lambda: len(failing_accept) < 1000)
    server.close()
    recorder.wait_for("on_close")
    assert one.raises_reset() or one.at_eof()
    turns()
    assert len(failing_accept) > 990


@pytest.mark.parametrize("code", [errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN, errno.EINTR])
def test_connection_that_is_lost_before_it_is_accepted_is_no_trouble(server_of, peer, caplog, failing_accept, code):
    server = server_of(Echo)
    failing_accept.append(code)
    assert answers(peer(server))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_listener_that_is_broken_is_an_error_of_the_server(open_server, peer, recorder, failing_accept):
    class Noting(Server):
        def on_error(self, error):
            recorder("on_error", error.errno)
            super().on_error(error)

        def on_close(self):
            recorder("on_close")

    server = open_server(Noting()).listen(LOCAL)
    failing_accept.append(errno.EINVAL)
    with contextlib.suppress(ConnectionError):
        peer(server)
    recorder.wait_for("on_close")
    assert recorder == [("on_error", errno.EINVAL), "on_close"]
    assert server.closed


# ---- Closing


def test_s2_7_s2_15_close_stops_listening_at_once(open_server):
    server = open_server(Server()).listen(LOCAL)
    server.close()
    assert (server.listening, server.closed) == (False, True)
    assert refuses(server.local_address)
    assert server.close_reason is CloseReason.CLOSED_HERE


@pytest.mark.parametrize("listened", [False, True])
def test_close_calls_on_close_once_and_not_inside(recorder, listened):
    class Noting(Server):
        def on_close(self):
            recorder("on_close")
            super().on_close()

        def handle_close(self):
            recorder("handle_close")

    server = Noting()
    if listened:
        server.listen(LOCAL)
    server.close()
    server.close()
    assert recorder == []
    recorder.wait_for("handle_close")
    turns()
    assert recorder == ["on_close", "handle_close"]


def test_close_in_on_close_does_nothing(recorder):
    class Again(Server):
        def on_close(self):
            recorder("on_close")
            self.close()

    Again().listen(LOCAL).close()
    recorder.wait_for("on_close")
    turns()
    assert recorder == ["on_close"]


def test_s2_8_s2_31_close_ends_the_connections_after_what_they_have_to_send(server_of, peer, recorder):
    server = server_of(recorder.of(Stream))
    peers = [peer(server, rcvbuf=4096) for _ in range(3)]
    for channel in channels_of(server, 3):
        channel.write(bytes(BIG))
    server.close()
    for one in peers:
        assert one.recv_all() == bytes(BIG)
    recorder.wait_for(lambda events: events.names().count("on_close") == 3)
    assert server.channels.values() == []
    until(lambda: server not in Engine.instance().channels)


def test_s2_17_close_may_keep_the_connections(server_of, peer, recorder):
    server = server_of(recorder.of(Echo))
    one = peer(server)
    (channel,) = channels_of(server, 1)
    server.close(connections=False)
    turns()
    assert refuses(server.local_address)
    assert answers(one)
    assert server.channels.values() == [channel]
    assert channel in Engine.instance().channels
    one.close()
    recorder.wait_for("on_close")
    assert server.channels.values() == []
    assert channel not in Engine.instance().channels


def test_s2_31_on_close_of_a_subclass_that_does_not_call_the_base_keeps_the_connections(open_server, peer, recorder):
    class Keeping(Server):
        ConnectionClass = Echo

        def on_close(self):
            recorder("on_close", len(self.channels))

    server = open_server(Keeping()).listen(LOCAL)
    one = peer(server)
    channels_of(server, 1)
    server.close()
    recorder.wait_for(("on_close", 1))
    assert answers(one)


def test_on_close_of_a_subclass_may_say_goodbye_first(open_server, peer):
    class Polite(Server):
        def on_close(self):
            for channel in self.channels.values():
                channel.write(b"goodbye")
            gevent.sleep(0)
            super().on_close()

    server = open_server(Polite(Connection)).listen(LOCAL)
    one = peer(server)
    channels_of(server, 1)
    server.close()
    assert one.recv_all() == b"goodbye"


def test_close_reaches_connections_that_are_ending_already_and_those_that_block(server_of, peer, recorder):
    gate = Event()
    server = server_of(recorder.of(Stream, on_read=lambda stream, data: gate.wait()))
    ending, blocked = peer(server, rcvbuf=4096), peer(server)
    channels_of(server, 2)
    (channel,) = [channel for channel in server.channels.values() if channel.remote_address == ending.address]
    channel.write(bytes(BIG))
    channel.end()
    until(lambda: unsent(channel) > 0)
    blocked.send(b"x")
    recorder.wait_for("on_read")
    server.close()
    turns()
    assert "on_close" not in recorder.names()
    gate.set()
    assert ending.recv_all() == bytes(BIG)
    assert blocked.recv_all() == b""
    recorder.wait_for(lambda events: events.names().count("on_close") == 2)


@pytest.mark.parametrize("what", RAISED)
def test_on_close_of_a_server_that_raises_is_logged(caplog, what):
    class Broken(Server):
        def on_close(self):
            raise RAISED[what]()

    server = Broken().listen(LOCAL)
    server.close()
    until(lambda: caplog.records)
    (logged,) = caplog.records
    assert logged.levelno == logging.ERROR
    assert logged.channel is server
    assert "on_close" in logged.getMessage()


def test_close_in_a_foreign_thread_is_refused(open_server):
    server = open_server(Server()).listen(LOCAL)
    with pytest.raises(RuntimeError, match="thread"):
        in_thread(server.close)
    assert server.listening


def test_server_logs_that_it_listens_and_that_it_closed_and_nothing_else(open_server, peer, caplog):
    caplog.set_level(logging.INFO, "pants_green")
    server = open_server(Server(Echo)).listen(LOCAL)
    assert answers(peer(server))
    server.close()
    assert [(record.levelno, record.event) for record in caplog.records] == [(logging.INFO, "listen"), (logging.INFO, "close")]


# ---- Classes


def test_s1_2_s4_18_classes_stand_where_the_documents_say():
    import pants_green
    from pants_green import channel, network, server, stream

    assert network.Server is server.Server is pants_green.Server
    assert network.Connection is pants_green.Connection
    assert network.Client is pants_green.Client
    assert stream.Stream is pants_green.Stream
    for one in (Server, Connection, Client):
        assert issubclass(one, channel.Channel)
    assert issubclass(Connection, Stream)
    assert issubclass(Client, Stream)
    assert issubclass(Server, StreamServer)
    assert not issubclass(StreamServer, Stream)


def test_s4_3_s4_10_every_kind_of_channel_has_its_callbacks_and_no_others():
    of_streams = ("on_connect", "on_connect_error", "on_read", "on_write")
    of_servers = ("on_listen", "on_accept")
    for name in (*of_streams, "on_close"):
        assert callable(getattr(Stream, name))
    for name in (*of_servers, "on_close"):
        assert callable(getattr(Server, name))
        assert callable(getattr(StreamServer, name))
    for name in of_streams:
        assert not hasattr(Server, name)
    assert not hasattr(Stream, "on_accept")


# ---- gevent's sockets, of which a private part or two is used


@pytest.mark.parametrize("known", [True, False])
def test_accepted_socket_is_what_gevents_constructor_makes(monkeypatch, server_of, peer, known):
    assert _sockets.FIELDS_ARE_KNOWN, "gevent's sockets have other fields now; see to _sockets._stand_on"
    monkeypatch.setattr(_sockets, "FIELDS_ARE_KNOWN", known)
    server = server_of(Echo)
    one = peer(server)
    one.send(b"x")
    assert one.recv_exactly(1) == b"x"
    accepted = server.channels.values()[0].socket
    made = gevent.socket.socket(accepted.family, accepted.type, accepted.proto, os.dup(accepted.fileno()))
    with made:
        assert type(accepted) is type(made)
        fields = {name for kind in type(made).__mro__ for name in getattr(kind, "__slots__", ())} - {"__weakref__"}
        for name in fields:
            mine, theirs = getattr(accepted, name), getattr(made, name)
            assert type(mine) is type(theirs), name
            assert name in ("_sock", "_read_event", "_write_event") or mine == theirs, name
        assert (accepted._read_event.events & 3, accepted._write_event.events & 3) == (1, 2)
        assert accepted._read_event.fd == accepted._write_event.fd == accepted.fileno()
        assert accepted._sock.gettimeout() == made._sock.gettimeout() == 0.0
