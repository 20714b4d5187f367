"""The end of servers and engines: suspending, stopping, on_stopping, and the signals that end a process gracefully."""

import contextlib
import errno
import gc
import json
import logging
import math
import os
import resource
import signal
import socket
import time
import weakref
from pathlib import Path

import gevent
import pytest
from certificates import authority, server_context
from children import Child
from children import Peer as BlockingPeer
from gevent.event import Event
from needs import needs_ipv6
from peers import PlainSocket, in_thread
from tls_peers import TLSPeer, tls_peer  # noqa: F401
from waiting import lingering, nothing_is_kept, turns, unsent, until  # noqa: F401

from pants_green import (
    ChannelStateError,
    Client,
    CloseReason,
    Connection,
    Datagram,
    Engine,
    ReconnectingClient,
    Server,
    Stream,
    StreamServer,
    UnixServer,
    _drain,
    _greeting,
    _stopping,
    engine,
)

LOCAL = ("127.0.0.1", 0)

#: More than the buffers of both kernels hold.
BIG = 16 * 1024 * 1024


class Lines(Connection):
    read_delimiter = b"\n"

    def on_read(self, line):
        self.write(line + b"\n")


def only(server):
    """Return the one connection of a server, once it is there."""
    until(lambda: len(server.channels) == 1)
    return server.channels.values()[0]


def refuses(address):
    """Tell whether nobody listens at an address."""
    with PlainSocket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as probe:
        return probe.connect_ex(address) in (errno.ECONNREFUSED, errno.ENOENT)


def queued(address, data=b""):
    """Return a peer's socket that has connected, and sent `data`, before the hub has had a turn."""
    sock = PlainSocket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    sock.settimeout(10.0)
    sock.connect(address)
    if data:
        sock.sendall(data)
    return sock


def everything_from(sock):
    """Return all that comes up to the end, and close."""
    with sock:
        return in_thread(lambda: b"".join(iter(lambda: sock.recv(1 << 16), b"")))


class Stopper:
    """Stops a server in a greenlet of its own."""

    def __init__(self, server, *args):
        self.greenlet = gevent.spawn(server.stop, *args)
        until(lambda: not server.listening)

    def is_back(self):
        """Tell whether stop() has returned."""
        return self.greenlet.ready()

    def wait(self):
        """Wait until stop() has returned, and let what it has raised come out."""
        self.greenlet.get()


# ---- suspend and resume


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_suspend_connections_wait_in_the_backlog_and_are_served_later(server_of, peer, tls_peer, secure):  # noqa: F811
    server = server_of(Lines)
    server.suspend()
    assert server.suspended
    assert server.listening
    if secure:
        server.startSSL(server_context())
    one = peer(server)
    one.socket.setblocking(False)
    turns()
    assert not server.channels
    server.resume()
    assert not server.suspended
    one.socket.settimeout(10.0)
    if secure:
        one = TLSPeer.over(one)
    one.send(b"hello\n")
    assert one.recv_exactly(6) == b"hello\n"


def test_suspend_connections_that_are_there_go_on(server_of, peer):
    server = server_of(Lines)
    one = peer(server)
    only(server)
    server.suspend()
    one.send(b"hello\n")
    assert one.recv_exactly(6) == b"hello\n"


def test_suspend_and_resume_may_be_called_twice_and_for_nothing(server_of, peer):
    server = server_of(Lines)
    server.resume()
    server.suspend()
    server.suspend()
    server.resume()
    server.resume()
    one = peer(server)
    one.send(b"hello\n")
    assert one.recv_exactly(6) == b"hello\n"


def test_suspend_in_on_connect_holds_those_that_wait_already(server_of):
    server = server_of(Connection, on_connect=lambda connection: connection.server.suspend())
    waiting = [queued(server.local_address) for _ in range(3)]
    for count in (1, 2, 3):
        until(lambda count=count: len(server.channels) == count)
        turns()
        assert len(server.channels) == count
        server.resume()
    for sock in waiting:
        sock.close()


@pytest.mark.parametrize("call", ["suspend", "resume"])
def test_suspend_of_a_server_that_does_not_listen_is_an_error(server_of, call):
    not_yet = Server(Lines)
    closed = server_of(Lines)
    closed.close()
    go_on = Event()
    stopping = server_of(Lines, on_connect=lambda connection: go_on.wait())
    waiting = queued(stopping.local_address)
    only(stopping)
    stopper = Stopper(stopping)
    for server in (not_yet, closed, stopping):
        with pytest.raises(ChannelStateError, match=rf"{call}\(\) on .*: it does not listen"):
            getattr(server, call)()
    waiting.close()
    go_on.set()
    stopper.wait()


# ---- who may call stop()


def told(recorder, base=Server):
    """Return a class of servers that record their on_close."""
    return type("Told", (base,), {"__slots__": (), "on_close": lambda server: (recorder("server closed"), base.on_close(server))[0]})


@pytest.mark.parametrize("caller", ["the main greenlet", "a greenlet", "a timer", "a callback of another server"])
def test_stop_waits_until_it_is_over(server_of, peer, recorder, caller):
    server = server_of(recorder.of(Lines, "on_close"), server_class=told(recorder))

    def stop(*_):
        server.stop(5)
        recorder("returned")

    one = peer(server)
    only(server)
    if caller == "the main greenlet":
        stop()
    elif caller == "a greenlet":
        gevent.spawn(stop)
    elif caller == "a timer":
        engine.callback(stop)
    else:
        peer(server_of(Connection, on_connect=stop))
    assert recorder.wait_for("returned") == [("on_close",), "server closed", "returned"]
    assert one.at_eof()
    assert server.closed
    assert server.close_reason is CloseReason.STOPPED
    assert not server.channels
    assert server not in Engine.instance().channels


@pytest.mark.parametrize("callback", ["on_connect", "on_read", "on_end", "on_write", "on_stopping", "on_close", "on_error", "__init__"])
def test_stop_in_a_callback_of_a_connection_returns_at_once(server_of, peer, recorder, callback):
    def stop(connection, *args, **kwargs):
        getattr(Connection, callback)(connection, *args, **kwargs)
        connection.server.stop(20)
        recorder("returned", connection.server.closed)

    def on_read(connection, line):
        if callback == "on_error":
            raise ZeroDivisionError
        connection.write(line)

    server = server_of(Lines, server_class=told(recorder), **{"on_read": on_read, callback: stop})
    one = peer(server)
    one.send(b"hello\n")
    if callback == "on_stopping":
        only(server)
        Stopper(server)
    elif callback != "on_error":
        one.shutdown_output()
    assert recorder.wait_for("server closed") == [("returned", False), "server closed"]


@pytest.mark.parametrize("callback", ["on_accept", "on_listen", "on_ssl_wrap_error"])
def test_stop_in_a_callback_of_the_server_returns_at_once(open_server, recorder, callback):
    class Own(told(recorder)):
        pass

    def stop(server, *args):
        getattr(Server, callback)(server, *args)
        server.stop(20)
        recorder("returned", server.closed)

    setattr(Own, callback, stop)
    server = open_server(Own())
    if callback == "on_ssl_wrap_error":
        server.startSSL(server_context())
    server.listen(LOCAL)
    if callback != "on_listen":
        queued(server.local_address, b"no hello of TLS\r\n").close()
    assert recorder.wait_for("server closed") == [("returned", False), "server closed"]


def test_stop_in_on_listen_of_a_socket_that_listened_already_returns_at_once(open_server, recorder):
    class Own(told(recorder)):
        def on_listen(self):
            self.stop(20)
            recorder("returned")

    open_server(Own(socket=socket.create_server(LOCAL)))
    assert recorder.wait_for("server closed") == ["returned", "server closed"]


def test_stop_in_on_close_of_the_server_returns_at_once(server_of, recorder):
    class Own(Server):
        def on_close(self):
            self.stop(20)
            recorder("returned")

    server_of(Lines, server_class=Own).stop()
    assert recorder == ["returned"]


def test_stop_in_the_hub_returns_at_once(server_of, peer, recorder):
    server = server_of(Lines, server_class=told(recorder))
    one = peer(server)
    only(server)
    gevent.get_hub().loop.run_callback(server.stop)
    recorder.wait_for("server closed")
    assert one.at_eof()


def test_stop_in_a_callback_of_a_stream_made_by_hand_returns_at_once(open_server, recorder):
    server = open_server(told(recorder)(Lines)).listen(LOCAL)
    ours, theirs = socket.socketpair()

    class Own(recorder.of(Lines, "on_close")):
        def on_read(self, line):
            server.stop(20)
            recorder("returned", server.closed)

    with theirs:
        Own(socket=ours, server=server)
        theirs.sendall(b"stop\n")
        assert recorder.wait_for("server closed") == [("returned", False), ("on_close",), "server closed"]


def test_stop_waits_for_on_close_of_a_stream_made_by_hand(open_server, recorder):
    server = open_server(told(recorder)(Lines)).listen(LOCAL)
    ours, theirs = socket.socketpair()
    go_on = Event()

    class Own(Lines):
        def on_close(self):
            recorder("closing")
            go_on.wait()
            recorder("closed")

    with theirs:
        Own(socket=ours, server=server)
        stopper = Stopper(server)
        recorder.wait_for("closing")
        turns()
        assert not stopper.is_back()
        go_on.set()
        stopper.wait()
    assert recorder == ["closing", "closed", "server closed"]


def test_stop_twice_at_the_same_time_both_wait_and_the_first_timeout_holds(server_of, peer, recorder):
    leave = Event()

    class Own(Server):
        def on_close(self):
            recorder("closing")
            leave.wait()
            recorder("closed")

    server = server_of(Lines, server_class=Own, on_stopping=lambda connection, deadline: recorder("deadline", deadline))
    peer(server)
    connection = only(server)
    first, second = Stopper(server, 20), Stopper(server, 0)
    until(lambda: recorder)
    assert recorder == [("deadline", pytest.approx(time.monotonic() + 20, abs=2))]
    turns()
    assert not first.is_back()
    assert not second.is_back()
    connection.close()
    recorder.wait_for("closing")
    third = Stopper(server)
    turns()
    assert not any(stopper.is_back() for stopper in (first, second, third))
    leave.set()
    for stopper in (first, second, third):
        stopper.wait()
    assert recorder[1:] == ["closing", "closed"]
    server.stop()


def test_stop_before_listen_closes(recorder):
    server = told(recorder)(Lines)
    server.stop()
    assert server.closed
    recorder.wait_for("server closed")
    with pytest.raises(ChannelStateError):
        server.listen(LOCAL)


def test_stop_after_close_does_nothing(server_of, recorder):
    server = server_of(Lines, server_class=told(recorder))
    server.close()
    server.stop()
    server.stop(0)
    recorder.wait_for("server closed")
    turns()
    assert recorder == ["server closed"]
    assert server.close_reason is CloseReason.CLOSED_HERE


@pytest.mark.parametrize("connections", [True, False])
def test_close_while_stopping_ends_that_at_once(server_of, peer, recorder, connections):
    server = server_of(Lines, server_class=told(recorder), on_stopping=lambda connection, deadline: recorder("asked"))
    one = peer(server)
    only(server)
    stopper = Stopper(server, 20)
    recorder.wait_for("asked")
    server.close(connections=connections)
    stopper.wait()
    assert recorder == ["asked", "server closed"]
    if connections:
        assert one.at_eof()
    else:
        one.send(b"hello\n")
        assert one.recv_exactly(6) == b"hello\n"


@pytest.mark.parametrize("wrong", [-1, -0.1, math.nan, math.inf, 10**400])
def test_stop_timeout_that_is_no_number_of_seconds_is_a_value_error(server_of, wrong):
    server = server_of(Lines)
    with pytest.raises(ValueError, match=r"stop\(\) on .*timeout .* 0 or more, or None for no limit"):
        server.stop(wrong)
    assert server.listening


@pytest.mark.parametrize("wrong", [True, False, "5", b"5", [5], 5j, 0j])
def test_stop_timeout_that_is_no_number_is_a_type_error(server_of, wrong):
    server = server_of(Lines)
    with pytest.raises(TypeError, match=r"stop\(\) on .*timeout"):
        server.stop(wrong)
    assert server.listening


# ---- on_stopping


def test_on_stopping_gets_the_deadline_by_time_monotonic(server_of, peer, recorder):
    def on_stopping(connection, deadline):
        recorder(connection.stopping, deadline)
        connection.end()

    for timeout, expected in [(7, pytest.approx(time.monotonic() + 7, abs=2)), (None, math.inf)]:
        server = server_of(Lines, on_stopping=on_stopping)
        peer(server)
        assert not only(server).stopping
        server.stop(timeout)
        assert recorder.pop() == (True, expected)


def test_on_stopping_says_goodbye_in_answer_to_nothing(server_of, peer):
    def on_stopping(connection, deadline):
        connection.write("goodbye\n")
        connection.end()

    server = server_of(Lines, on_stopping=on_stopping)
    one, other = peer(server), peer(server)
    other.send(b"half a li")
    until(lambda: len(server.channels) == 2)
    server.stop()
    assert one.recv_all() == other.recv_all() == b"goodbye\n"


def test_on_stopping_may_wait_and_read_on(server_of, peer, recorder):
    def on_stopping(connection, deadline):
        connection.write("last words?\n")
        recorder(connection.read())
        connection.end()

    server = server_of(Lines, on_stopping=on_stopping)
    one = peer(server)
    only(server)
    stopper = Stopper(server)
    assert one.recv_exactly(12) == b"last words?\n"
    one.send(b"none\n")
    stopper.wait()
    assert recorder == [b"none"]


def test_on_stopping_that_does_not_end_is_aborted_at_the_deadline(server_of, peer, recorder, caplog):
    server = server_of(recorder.of(Lines, "on_stopping", "on_read", "on_close", on_stopping=lambda connection, deadline: None))
    one = peer(server)
    connection = only(server)
    stopper = Stopper(server, 0.2)
    recorder.wait_for("on_stopping")
    one.send(b"still there?\n")
    assert one.recv_exactly(13) == b"still there?\n"
    assert not stopper.is_back()
    stopper.wait()
    assert time.monotonic() >= recorder[0][1]
    assert one.raises_reset()
    assert recorder.names() == ["on_stopping", "on_read", "on_close"]
    assert connection.close_reason is server.close_reason is CloseReason.STOPPED
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "1 connections had not come to their end in time" in warning


@pytest.mark.parametrize("stopping", ["raises", "closes", "aborts", "writes too late"])
def test_on_stopping_that_goes_its_own_way_costs_that_connection_only(server_of, peer, recorder, caplog, stopping):
    def on_stopping(connection, deadline):
        if stopping == "raises":
            raise ZeroDivisionError
        if stopping == "closes":
            connection.close()
        elif stopping == "aborts":
            connection.abort()
        else:
            connection.end()
            connection.write("too late")

    server = server_of(recorder.of(Lines, "on_close", "on_error", on_stopping=on_stopping))
    one = peer(server)
    only(server)
    server.stop()
    assert one.raises_reset() == (stopping == "aborts")
    troubled = stopping in ("raises", "writes too late")
    assert recorder.names() == [*["on_error"] * troubled, "on_close"]
    assert [record.levelno for record in caplog.records if record.levelno > logging.INFO] == [logging.ERROR] * troubled


def test_on_stopping_on_an_instance(server_of, peer, recorder):
    server = server_of(Lines)
    peer(server)
    connection = only(server)
    connection.on_stopping = lambda deadline: (recorder("asked"), connection.end())
    server.stop()
    assert recorder == ["asked"]


@pytest.mark.parametrize("how", ["closes", "ends", "is left"])
def test_on_stopping_is_not_called_on_a_connection_that_ends_by_itself_meanwhile(server_of, peer, recorder, how):
    go_on = Event()

    def on_read(connection, line):
        recorder("reading")
        go_on.wait()
        if how != "is left":
            connection.close(flush=how == "ends")
        else:
            with contextlib.suppress(RuntimeError):
                while True:
                    connection.write(b"x" * 65536, flush=True)
                    gevent.sleep(0)
        recorder(connection.stopping)

    server = server_of(recorder.of(Lines, "on_stopping", "on_close", on_read=on_read))
    one = peer(server)
    one.send(b"hello\n")
    recorder.wait_for("reading")
    stopper = Stopper(server)
    turns()
    if how == "is left":
        one.reset()
    go_on.set()
    stopper.wait()
    assert recorder == ["reading", True, ("on_close",)]


def test_on_stopping_comes_before_the_next_chunk_of_the_batch(server_of, peer, recorder):
    go_on = Event()

    def on_read(connection, line):
        recorder(line, connection.stopping)
        if line == b"one":
            go_on.wait()
            connection.write(b"x" * 100_000 + b"\n")

    server = server_of(recorder.of(Lines, "on_stopping", on_read=on_read, on_stopping=lambda connection, deadline: None))
    one = peer(server)
    one.send(b"one\ntwo\n")
    recorder.wait_for(1)
    stopper = Stopper(server)
    turns()
    go_on.set()
    recorder.wait_for(3)
    assert recorder.names() == [b"one", "on_stopping", b"two"]
    assert recorder[2] == (b"two", True)
    assert one.recv_exactly(100_001) == b"x" * 100_000 + b"\n"
    one.shutdown_output()
    stopper.wait()


# ---- in which state a connection is


def test_stop_idle_connections_end_with_a_fin_and_without_a_word(server_of, peer, recorder, caplog):
    caplog.set_level(logging.INFO, "pants_green.server")
    server = server_of(recorder.of(Lines, "on_stopping", "on_close"), server_class=told(recorder))
    peers = [peer(server) for _ in range(3)]
    until(lambda: len(server.channels) == 3)
    server.stop()
    assert [one.at_eof() for one in peers] == [True] * 3
    assert sorted(recorder.names()[:-1]) == ["on_close"] * 3 + ["on_stopping"] * 3
    assert recorder[-1] == "server closed"
    assert [record.event for record in caplog.records] == ["listen", "stop", "close"]
    assert all(record.channel is server for record in caplog.records)


def test_stop_output_that_is_queued_to_a_slow_reader_arrives_whole(server_of, peer):
    server = server_of(Connection, on_connect=lambda connection: connection.write(bytes(BIG)))
    one = peer(server, rcvbuf=4096)
    until(lambda: server.channels and unsent(only(server)))
    stopper = Stopper(server)
    turns()
    assert not stopper.is_back()
    assert one.recv_all() == bytes(BIG)
    stopper.wait()


@pytest.mark.parametrize("callback", ["on_connect", "on_read", "on_write"])
def test_stop_callback_that_blocks_finishes_and_its_answer_arrives_whole(server_of, peer, recorder, callback):
    go_on = Event()

    def answer(connection, *args):
        if not connection.stopping:
            recorder("begun")
            go_on.wait()
            recorder(connection.stopping)
            connection.write(bytes(100_000))

    server = server_of(recorder.of(Lines, "on_stopping", "on_close", **{callback: answer}))
    one = peer(server)
    if callback == "on_write":
        only(server).write("x")
        assert one.recv_exactly(1) == b"x"
    elif callback == "on_read":
        one.send(b"question\nanother\n")
    recorder.wait_for("begun")
    stopper = Stopper(server)
    turns()
    assert not stopper.is_back()
    go_on.set()
    assert one.recv_all() == bytes(100_000)
    stopper.wait()
    assert recorder.names() == ["begun", True, "on_stopping", "on_close"]


def test_stop_callback_that_waits_in_read_gets_its_chunk(server_of, peer, recorder):
    def on_connect(connection):
        recorder("reading")
        line = connection.read()
        connection.write(b"%s %d\n" % (line, connection.stopping))

    server = server_of(recorder.of(Lines, "on_stopping", on_connect=on_connect))
    one = peer(server)
    recorder.wait_for("reading")
    stopper = Stopper(server)
    turns()
    assert recorder == ["reading"]
    one.send(b"hello\n")
    assert one.recv_all() == b"hello 1\n"
    stopper.wait()
    assert recorder.names() == ["reading", "on_stopping"]


def test_stop_callback_that_waits_in_drain_goes_on(server_of, peer, recorder):
    def on_connect(connection):
        connection.write(bytes(BIG))
        connection.drain()
        connection.write("that was all")

    server = server_of(recorder.of(Lines, "on_stopping", on_connect=on_connect))
    one = peer(server, rcvbuf=4096)
    until(lambda: server.channels and unsent(only(server)))
    stopper = Stopper(server)
    turns()
    assert recorder == []
    assert one.recv_all() == bytes(BIG) + b"that was all"
    stopper.wait()


def test_stop_connection_that_is_paused_is_asked_all_the_same(server_of, peer, recorder):
    server = server_of(recorder.of(Lines, "on_stopping", on_connect=lambda connection: connection.pause()))
    one = peer(server)
    one.send(b"hello\n")
    only(server)
    server.stop()
    assert one.at_eof()
    assert recorder.names() == ["on_stopping"]


@pytest.mark.parametrize("side", ["the peer's", "ours"])
def test_stop_connection_of_which_one_side_has_ended_is_asked_all_the_same(server_of, peer, recorder, side):
    def on_stopping(connection, deadline):
        if side == "the peer's":
            connection.write("goodbye")
        connection.end()

    attributes = {"on_connect": Stream.write_eof} if side == "ours" else {"allow_half_open": True}
    server = server_of(recorder.of(Connection, "on_stopping", "on_end", on_stopping=on_stopping, **attributes))
    one = peer(server)
    connection = only(server)
    if side == "ours":
        assert one.at_eof()
    else:
        one.shutdown_output()
        recorder.wait_for("on_end")
    assert connection.connected
    server.stop()
    assert one.recv_all() == (b"goodbye" if side == "the peer's" else b"")
    assert recorder.names()[-1] == "on_stopping"


def test_stop_connection_that_is_ending_is_waited_for_and_not_asked(server_of, peer, recorder):
    def on_connect(connection):
        connection.write(bytes(BIG))
        connection.end()

    server = server_of(recorder.of(Connection, "on_stopping", "on_close", on_connect=on_connect), server_class=told(recorder))
    one = peer(server, rcvbuf=4096)
    until(lambda: server._settling)
    stopper = Stopper(server)
    turns()
    assert recorder == []
    assert one.recv_all() == bytes(BIG)
    stopper.wait()
    assert recorder == [("on_close",), "server closed"]


def test_stop_connection_that_is_ending_and_is_not_read_is_aborted_at_the_deadline(server_of, peer):
    def on_connect(connection):
        connection.write(bytes(BIG))
        connection.end()

    server = server_of(Connection, on_connect=on_connect)
    one = peer(server, rcvbuf=4096)
    until(lambda: server._settling)
    server.stop(0.05)
    assert one.raises_reset()


def test_stop_does_not_wait_for_sockets_that_linger(server_of, peer):
    server = server_of(Lines)
    one = peer(server)
    only(server)
    server.stop()
    assert lingering() == 1
    one.close()


def test_stop_at_once_aborts_what_has_not_ended(server_of, peer, recorder):
    server = server_of(recorder.of(Lines, "on_close", on_stopping=lambda connection, deadline: None), server_class=told(recorder))
    one = peer(server)
    only(server)
    server.stop(0)
    assert recorder == [("on_close",), "server closed"]
    assert one.raises_reset()


def test_stop_at_once_asks_all_the_same_and_loses_nothing_of_what_is_said_then(server_of, peer, recorder):
    def on_stopping(connection, deadline):
        connection.write("goodbye")
        connection.end()

    server = server_of(recorder.of(Lines, "on_close", on_stopping=on_stopping), server_class=told(recorder))
    one = peer(server)
    only(server)
    server.stop(0)
    assert one.recv_all() == b"goodbye"
    assert recorder == [("on_close",), "server closed"]


def test_stop_callback_that_blocks_past_the_deadline_loses_its_socket_and_nothing_else(server_of, peer, recorder, caplog):
    go_on = Event()

    def on_read(connection, line):
        recorder("reading")
        go_on.wait()
        connection.write("too late")

    caplog.set_level(logging.DEBUG, "pants_green.stream")
    server = server_of(recorder.of(Lines, "on_close", "on_error", on_read=on_read), server_class=told(recorder))
    one = peer(server)
    one.send(b"hello\n")
    recorder.wait_for("reading")
    server.stop(0.05)
    assert recorder == ["reading", "server closed"]
    assert one.raises_reset()
    go_on.set()
    recorder.wait_for("on_close")
    assert recorder.names() == ["reading", "server closed", "on_close"]
    assert [record.event for record in caplog.records if record.levelno > logging.INFO] == ["stop_timeout"]


# ---- connections that come to stand meanwhile


def test_stop_tls_handshake_that_is_done_later_is_asked_then(server_of, tls_peer, recorder):  # noqa: F811
    def on_stopping(connection, deadline):
        connection.write("goodbye")
        connection.end()

    server = server_of(recorder.of(Lines, "on_connect", "on_stopping", on_stopping=on_stopping))
    server.startSSL(server_context())
    one = tls_peer(server, shake=False)
    until(lambda: server._greetings)
    stopper = Stopper(server)
    turns()
    assert not stopper.is_back()
    one.shake_hands()
    assert one.recv_all() == b"goodbye"  # and TLS' own
    stopper.wait()
    assert recorder.names() == ["on_connect", "on_stopping"]


@pytest.mark.parametrize("waits_for", ["the handshake", "the header"])
def test_stop_connection_whose_peer_never_begins_is_cut_at_the_deadline(server_of, peer, recorder, waits_for):
    server = server_of(recorder.of(Lines, "on_connect", "on_close"), server_class=told(recorder))
    if waits_for == "the handshake":
        server.startSSL(server_context())
    else:
        server.proxy_protocol = "auto"
    one = peer(server)
    until(lambda: server._greetings)
    server.stop(0.05)
    assert one.at_eof()
    assert recorder == ["server closed"]


@pytest.mark.parametrize("when", ["before", "in the queue"])
@pytest.mark.parametrize("waits_for", ["the handshake", "the header"])
def test_stop_peer_that_says_nothing_is_not_waited_for_long(server_of, peer, recorder, monkeypatch, waits_for, when):
    monkeypatch.setattr(_greeting, "SILENCE_AT_THE_END", 0.05)
    server = server_of(Lines)
    if waits_for == "the handshake":
        server.startSSL(server_context())
    else:
        server.proxy_protocol = "v1"
    if when == "in the queue":
        server.suspend()
    silent, begins = peer(server), peer(server)
    if when == "before":
        until(lambda: len(server._greetings) == 2)
        begins.send(b"\x16" if waits_for == "the handshake" else b"P")
        until(lambda: any(greeting._heard for greeting in server._greetings))
    stopper = Stopper(server, None)
    assert silent.at_eof()
    if when == "before":
        gevent.sleep(0.1)
        assert not stopper.is_back()
    begins.close()
    stopper.wait()


def test_stop_header_that_comes_later_is_taken_and_the_connection_asked(server_of, peer, recorder):
    server = server_of(recorder.of(Lines, "on_stopping"))
    server.proxy_protocol = "v1"
    one = peer(server)
    until(lambda: server._greetings)
    stopper = Stopper(server)
    turns()
    one.send(b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 2000\r\nhello\n")
    assert one.recv_all() == b"hello\n"
    stopper.wait()
    assert recorder.names() == ["on_stopping"]


def test_stop_tls_of_the_connection_s_own_that_is_done_later_is_asked_then(server_of, tls_peer, recorder):  # noqa: F811
    def secured(socket, server):
        return recorder.of(Lines, "on_connect", "on_stopping")(socket, server).startSSL(server_context())

    server = server_of(secured)
    one = tls_peer(server, shake=False)
    until(lambda: server._active)
    stopper = Stopper(server)
    turns()
    one.shake_hands()
    assert one.recv_all() == b""
    stopper.wait()
    assert recorder.names() == ["on_connect", "on_stopping"]


@pytest.mark.parametrize("where", ["on_accept", "the constructor"])
@pytest.mark.parametrize("in_time", [True, False])
def test_stop_connection_that_is_not_made_yet_is_asked_then_or_ended_if_it_is_too_late(server_of, peer, recorder, where, in_time):
    go_on = Event()

    class Slow(recorder.of(Lines, "on_connect", "on_stopping", "on_close")):
        def __init__(self, *args, **kwargs):
            if where == "the constructor":
                recorder("begun")
                go_on.wait()
            super().__init__(*args, **kwargs)

    class Own(told(recorder)):
        def on_accept(self, sock, addr):
            if where == "on_accept":
                recorder("begun")
                go_on.wait()
            super().on_accept(sock, addr)

    server = server_of(Slow, server_class=Own)
    one = peer(server)
    recorder.wait_for("begun")
    stopper = Stopper(server, 20 if in_time else 0.05)
    if in_time:
        turns()
        assert not stopper.is_back()
        go_on.set()
        stopper.wait()
        assert recorder.names() == ["begun", "on_connect", "on_stopping", "on_close", "server closed"]
    else:
        stopper.wait()
        go_on.set()
        recorder.wait_for("on_close")
        assert recorder.names() == ["begun", "server closed", "on_close"]
    assert one.at_eof()
    assert not server.channels


# ---- the accept queue


@pytest.mark.parametrize("kind", ["tcp", "reuse_port", "unix", "suspended"])
def test_stop_what_is_in_the_accept_queue_is_served_what_it_had_asked_for(open_server, tmp_path, kind):
    server = open_server(Server(Lines))
    server.listen(str(tmp_path / "socket") if kind == "unix" else LOCAL, reuse_port=kind == "reuse_port")
    if kind == "suspended":
        server.suspend()
    waiting = [queued(server.local_address, b"request %d\n" % number) for number in range(150)]  # more than are accepted at once
    server.stop()
    assert [everything_from(sock) for sock in waiting] == [b"request %d\n" % number for number in range(150)]
    assert refuses(server.local_address)
    assert not os.path.exists(tmp_path / "socket")


def test_stop_what_is_in_the_accept_queue_is_read_also_if_on_connect_takes_its_time(server_of, recorder):
    server = server_of(recorder.of(Lines, "on_stopping", on_connect=lambda connection: gevent.sleep(0.02)))
    quick, silent = queued(server.local_address, b"one\ntwo\n"), queued(server.local_address)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Lines, "on_read", lambda connection, line: (recorder("on_read"), connection.write(line))[0])
        server.stop()
    assert everything_from(quick) == b"onetwo"
    assert everything_from(silent) == b""
    assert sorted(recorder.names()) == ["on_read"] * 2 + ["on_stopping"] * 2


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_stop_what_has_come_on_connections_that_stand_is_answered_first(open_server, peer, tls_peer, secure):  # noqa: F811
    server = open_server(Server(Lines, ssl_options=server_context() if secure else None)).listen(LOCAL)
    peers = [(tls_peer if secure else peer)(server) for _ in range(10)]
    until(lambda: len(server.channels) == 10)
    turns(3)  # all of them wait for input
    for one in peers:
        one.socket.sendall(one.encrypt(b"hello\n") if secure else b"hello\n")  # here, while the hub has no turn
    server.stop()
    assert [one.recv_all() for one in peers] == [b"hello\n"] * 10


@pytest.mark.parametrize("when", ["at once", "later"])
def test_listen_while_stopping_is_an_error_and_changes_nothing(server_of, peer, when):
    server = server_of(Lines, on_stopping=lambda connection, deadline: None)
    one = peer(server)
    only(server)
    address = server.local_address
    stopper = Stopper(server, None)
    if when == "later":
        until(lambda: refuses(address))
    with pytest.raises(ChannelStateError, match="cannot be opened again"):
        server.listen(LOCAL)
    one.close()
    stopper.wait()
    assert refuses(address)
    assert server.local_address == address


def test_stop_serves_the_accept_queue_as_max_connections_allows(server_of):
    most = []

    class Slow(Lines):
        def on_read(self, line):
            gevent.sleep(0.01)
            most.append(len(self.server.channels))
            super().on_read(line)

    server = server_of(Slow)
    server.max_connections = 2
    waiting = [queued(server.local_address, b"hello\n") for _ in range(7)]
    server.stop()
    assert [everything_from(sock) for sock in waiting] == [b"hello\n"] * 7
    assert max(most) <= 2


def test_stop_what_waits_for_max_connections_is_closed_at_the_deadline(server_of, caplog):
    go_on = Event()
    server = server_of(Lines, on_connect=lambda connection: go_on.wait())
    server.max_connections = 2
    waiting = [queued(server.local_address, b"hello\n") for _ in range(5)]
    server.stop(0.05)
    assert server.closed
    for sock in waiting:
        with sock, pytest.raises(ConnectionResetError):
            in_thread(sock.recv, 1)
    assert "5 connections had not come to their end in time" in caplog.text
    go_on.set()


def test_stop_takes_a_bounded_number_from_the_accept_queue(server_of, monkeypatch):
    # Peers that come back as fast as they are taken would keep the hub busy for ever.
    monkeypatch.setattr(_stopping, "REST_MOST", 50)
    again = []

    class Own(Server):
        def on_accept(self, sock, addr):
            super().on_accept(sock, addr)
            again.append(queued(self.local_address))

    server = server_of(Lines, server_class=Own)
    again.append(queued(server.local_address))
    server.stop()
    assert len(again) in (50, 51)  # one more if the listener woke up before
    for sock in again:
        sock.close()


@needs_ipv6
def test_stop_closes_each_listener_before_it_serves_what_waits_at_the_next(open_server):
    # Else what comes to the first meanwhile is reset in the end; another process on the same port would have served it.
    class Own(Lines):
        def on_connect(self):
            if self.local_address[0] == "::1":
                self.write(repr(refuses(("127.0.0.1", self.local_address[1]))))

    server = open_server(Server(Own)).listen(0)
    port = server.local_address[1]
    waiting = [queued(("127.0.0.1", port), b"hello\n"), queued(("::1", port))]
    server.stop()
    assert [everything_from(sock) for sock in waiting] == [b"hello\n", b"True"]


def test_stop_with_reuse_port_leaves_the_port_to_the_others(open_server, peer):
    first = open_server(Server(Lines)).listen(LOCAL, reuse_port=True)
    second = open_server(Server(Lines)).listen(first.local_address, reuse_port=True)
    waiting = [queued(first.local_address, b"hello\n") for _ in range(20)]
    first.stop()
    one = peer(second)
    one.send(b"hello\n")
    assert one.recv_exactly(6) == b"hello\n"
    second.stop()
    assert [everything_from(sock) for sock in waiting] == [b"hello\n"] * 20
    assert refuses(first.local_address)


def test_stop_of_a_unix_server_removes_its_file_at_once(open_server, tmp_path):
    path = str(tmp_path / "socket")
    server = open_server(UnixServer(Lines)).listen(path)
    server.ConnectionClass = type("Own", (Lines,), {"on_stopping": lambda connection, deadline: None})
    one = queued(path)
    only(server)
    stopper = Stopper(server)
    until(lambda: not os.path.exists(path))
    assert not stopper.is_back()
    assert refuses(path)
    one.close()
    stopper.wait()


# ---- other servers


@pytest.mark.parametrize("keeps", [False, True])
def test_stop_of_a_stream_server_waits_for_on_accept_and_its_streams(open_server, recorder, keeps):
    go_on = Event()

    class Own(told(recorder, StreamServer)):
        def on_accept(self, sock, addr):
            recorder("accepted")
            go_on.wait()
            if keeps:
                recorder.of(Connection, "on_close", on_connect=lambda stream: (stream.write("answer"), stream.end()))(sock)
            else:
                sock.sendall(b"answer")
                sock.close()

    server = open_server(Own()).listen(LOCAL)
    one = queued(server.local_address)
    stopper = Stopper(server)
    recorder.wait_for("accepted")
    turns()
    assert not stopper.is_back()
    go_on.set()
    stopper.wait()
    assert everything_from(one) == b"answer"
    assert recorder.names() == ["accepted", *["on_close"] * keeps, "server closed"]


def test_stop_two_servers_at_once(server_of, peer):
    servers = [server_of(Lines) for _ in range(2)]
    peers = [peer(server) for server in servers]
    for server in servers:
        only(server)
    stoppers = [Stopper(server) for server in servers]
    for stopper in stoppers:
        stopper.wait()
    assert [one.at_eof() for one in peers] == [True] * 2


@pytest.mark.parametrize("in_time", [True, False])
@pytest.mark.parametrize("what", ["connection", "server"])
def test_stop_leaves_nothing_that_only_the_collector_would_find(peer, caplog, what, in_time):
    def on_stopping(connection, deadline):
        if in_time:
            connection.end()

    caplog.set_level(logging.CRITICAL, "pants_green")  # records have the channel that they are about
    server = Server(type("Own", (Lines,), {"on_stopping": on_stopping})).listen(LOCAL)
    one = peer(server)
    connection = only(server)
    gc.collect()
    gc.disable()
    try:
        server.stop(20 if in_time else 0.05)
        gone = weakref.ref(server if what == "server" else connection)
        del server, connection
        one.close()
        until(lambda: gone() is None, 0.5)
    finally:
        gc.enable()


# ---- the graceful end of an engine

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def handlers(recorder):
    """Record signals that come to what was there before: it has to be there again in the end, and keeps this process alive."""

    def heard(number, frame):
        recorder("to the handler of before")

    before = {number: signal.signal(number, heard) for number in SIGNALS}
    yield heard
    found = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert found == dict.fromkeys(SIGNALS, heard)
    assert "to the handler of before" not in recorder


def kill(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def start(timeout=20.0):
    """Run the engine, and return how many seconds it took to come to its end."""
    began = time.monotonic()
    Engine.instance().start(graceful_timeout=timeout)
    return time.monotonic() - began


def ends_with(one):
    """Return a greenlet that reads a peer to its end, and closes it."""

    def read():
        try:
            return one.recv_all()
        finally:
            one.close()

    return gevent.spawn(read)


@pytest.mark.parametrize("number", SIGNALS, ids=["SIGTERM", "SIGINT"])
def test_graceful_end_with_nothing_open_is_at_once(handlers, caplog, number):
    caplog.set_level(logging.INFO, "pants_green.engine")
    engine.callback(kill, number)
    assert start() < 5
    turns(2)
    assert [record.getMessage() for record in caplog.records] == [f"{number.name}: ending gracefully, within 20 seconds"]


def test_graceful_end_stops_servers_as_stop_does(handlers, server_of, peer, recorder):
    def on_stopping(connection, deadline):
        recorder("asked", deadline - time.monotonic() == pytest.approx(20, abs=2))
        connection.write("goodbye")
        connection.end()

    server = server_of(Lines, server_class=told(recorder), on_stopping=on_stopping)
    one = peer(server)
    only(server)
    heard = ends_with(one), gevent.spawn(everything_from, queued(server.local_address, b"hello\n"))
    engine.callback(kill)
    assert start() < 5
    assert [one.get() for one in heard] == [b"goodbye", b"hello\ngoodbye"]
    assert recorder == [("asked", True)] * 2 + ["server closed"]
    assert Engine.instance().channels == []


def test_graceful_end_is_content_with_less_silence_of_peers_that_linger(handlers, server_of, peer, monkeypatch):
    monkeypatch.setattr("pants_green._linger.IDLE_LIMIT_AT_THE_END", 0.05)
    one = peer(server_of(Lines))
    engine.callback(kill)
    assert start() < 4  # not 5
    assert lingering() == 0
    assert one.at_eof()


def test_graceful_end_waits_until_no_socket_lingers(handlers, server_of, peer, recorder):
    server = server_of(Lines, server_class=told(recorder))
    one = peer(server)
    only(server)
    engine.callback(kill)
    engine.defer(0.15, lambda: (recorder(lingering()), one.close()))
    start()
    assert recorder == ["server closed", 1]
    assert lingering() == 0


def test_graceful_end_second_signal_ends_it_at_once(handlers, server_of, peer, caplog):
    server = server_of(Lines, on_stopping=lambda connection, deadline: connection.engine.callback(kill, signal.SIGINT))
    one = peer(server)
    connection = only(server)
    engine.callback(kill)
    assert start() < 5
    turns(2)
    assert connection.connected
    assert [record.getMessage() for record in caplog.records] == ["SIGINT once more: stopping at once, with 2 channels left"]
    one.send(b"hello\n")
    assert one.recv_exactly(6) == b"hello\n"


def test_graceful_end_second_signal_ends_also_what_never_lets_the_hub_come_by(handlers, server_of, recorder, monkeypatch):
    def on_read(connection, line):
        kill(signal.SIGINT)
        kill(signal.SIGINT)  # too soon: it may still be seen
        monkeypatch.setattr(_drain, "STUCK", 0.0)
        kill(signal.SIGINT)
        recorder("nobody has ended this")

    server = server_of(recorder.of(Lines, "on_close", on_read=on_read))
    with queued(server.local_address, b"hello\n"), pytest.raises(SystemExit) as caught:
        start()
    assert caught.value.code == 128 + signal.SIGINT
    recorder.wait_for("on_close")
    assert "nobody has ended this" not in recorder


def test_graceful_end_aborts_what_is_left_at_the_deadline(handlers, server_of, peer, recorder, listening_peer):
    class Stays(recorder.of(Client, "on_connect", "on_stopping", "on_close")):
        def on_stopping(self, deadline):
            pass

    server = server_of(Lines, server_class=told(recorder), on_stopping=lambda connection, deadline: None)
    one = peer(server)
    only(server)
    listener = listening_peer()
    client = Stays().connect(listener.address)
    with listener.accept() as far:
        recorder.wait_for("on_connect")
        engine.callback(kill)
        assert 0.1 <= start(0.1) < 5
        assert one.raises_reset()
        assert far.raises_reset()
    assert client.close_reason is CloseReason.STOPPED
    assert sorted(recorder[1:], key=str) == [("on_close",), "server closed"]


def test_graceful_end_clients_are_asked_once_the_servers_have_stopped(handlers, server_of, peer, recorder, listening_peer):
    listener = listening_peer()

    class Backend(recorder.of(Client, "on_close")):
        def on_stopping(self, deadline):
            self.write("goodbye\n")
            self.end()

    def on_read(connection, line):
        kill()
        gevent.sleep(0.1)
        backend.write(line + b"\n")
        connection.write("asked the other\n")

    backend = Backend().connect(listener.address)
    with listener.accept() as far:
        server = server_of(Lines, server_class=told(recorder), on_read=on_read)
        one = peer(server)
        gevent.spawn(one.send, b"question\n")
        answer, forwarded = ends_with(one), ends_with(far)
        assert start() < 5
        assert answer.get() == b"asked the other\n"
        assert forwarded.get() == b"question\ngoodbye\n"
    assert recorder.names() == ["server closed", "on_close"]


@pytest.mark.parametrize("state", ["connected", "dialling", "between two connections"])
@pytest.mark.parametrize("kind", [Client, ReconnectingClient])
def test_graceful_end_of_a_client_is_for_good(handlers, recorder, listening_peer, kind, state):
    class Own(recorder.of(kind, "on_connect", "on_connect_error", "on_stopping", "on_close")):
        initial_delay = 50.0

    listener = listening_peer()
    client = Own()
    if state == "between two connections":
        listener.close()
        client.connect(listener.address)
        recorder.wait_for("on_close")
        turns()
    elif state == "dialling":
        client.connect(("192.0.2.1", 1))  # nobody has it
    else:
        client.connect(listener.address)
        recorder.wait_for("on_connect")
        ends_with(listener.accept())
    engine.callback(kill)
    assert start() < 5
    expected = {"connected": ["on_connect", "on_stopping", "on_close"], "dialling": ["on_close"]}
    names = recorder.names()
    if state == "dialling" and "on_connect_error" in names:
        names.remove("on_connect_error")  # where there is no network at all
    assert names == expected.get(state, ["on_connect_error", "on_close"])
    assert client.closed
    turns()
    assert Engine.instance().channels == []


def test_graceful_end_packets_that_wait_are_sent_before(handlers, tmp_path):
    address = str(tmp_path / "far")
    with PlainSocket(socket.AF_UNIX, socket.SOCK_DGRAM) as far:
        far.settimeout(10.0)
        far.bind(address)
        channel = Datagram().listen(str(tmp_path / "near"))
        count = 0
        while not unsent(channel):
            channel.write(b"%d" % count, address)
            count += 1
        engine.callback(kill)
        engine.defer(0.1, lambda: received.extend(in_thread(lambda: [far.recv(100) for _ in range(count)])))
        received = []
        start()
        until(lambda: received)
        assert received == [b"%d" % number for number in range(count)]
    assert channel.closed


def test_graceful_end_timers_go_on_meanwhile_and_are_not_waited_for(handlers, server_of, peer, recorder):
    go_on = Event()

    def on_read(connection, line):
        kill()
        recorder("asked")
        go_on.wait()

    def beat():
        if "asked" in recorder:
            recorder("beat")
        if recorder.count("beat") == 3:
            go_on.set()

    server = server_of(Lines, on_read=on_read)
    one = peer(server)
    gevent.spawn(one.send, b"hello\n")
    ends_with(one)
    timers = [engine.cycle(0.01, beat), engine.defer(50, recorder, "never")]
    assert start() < 5
    assert recorder.count("beat") >= 3
    for timer in timers:
        timer.cancel()


@pytest.mark.parametrize("of", ["a server", "a client"])
def test_graceful_end_waits_for_on_close(handlers, server_of, recorder, listening_peer, of):
    def on_close(channel):
        recorder("closing")
        gevent.sleep(0.1)
        recorder("closed")

    if of == "a server":
        server_of(Lines, server_class=type("Own", (Server,), {"on_close": on_close}))
    else:
        listener = listening_peer()
        client = type("Own", (Client,), {"on_close": on_close})().connect(listener.address)
        ends_with(listener.accept())
        until(lambda: client.connected)
    engine.callback(kill)
    start()
    assert recorder == ["closing", "closed"]


def test_graceful_end_asks_the_connections_of_a_server_that_was_closed_without_them(handlers, server_of, peer, recorder):
    server = server_of(recorder.of(Lines, "on_stopping", "on_close"))
    one = peer(server)
    only(server)
    server.close(connections=False)
    ends_with(one)
    engine.callback(kill)
    assert start() < 5
    assert recorder.names() == ["on_stopping", "on_close"]


def test_graceful_end_asks_the_streams_that_a_stream_server_makes(handlers, open_server, recorder):
    class Own(StreamServer):
        def on_accept(self, sock, addr):
            recorder("accepted")
            gevent.sleep(0.05)
            recorder.of(Connection, "on_connect", "on_stopping", "on_close")(sock)

    server = open_server(Own()).listen(LOCAL)
    sock = queued(server.local_address)
    recorder.wait_for("accepted")
    gevent.spawn(everything_from, sock)
    engine.callback(kill)
    assert start() < 5
    assert recorder.names() == ["accepted", "on_connect", "on_stopping", "on_close"]


def test_graceful_end_goes_on_with_a_stop_that_is_under_way(handlers, server_of, peer, recorder):
    server = server_of(Lines, server_class=told(recorder), on_stopping=lambda connection, deadline: None)
    one = peer(server)
    only(server)
    stopper = Stopper(server, None)
    engine.callback(kill)
    assert 0.05 <= start(0.05) < 5
    assert one.raises_reset()
    assert recorder == ["server closed"]
    stopper.wait()


def test_graceful_end_callback_that_blocks_past_the_deadline_is_left_behind(handlers, server_of, peer, recorder):
    go_on = Event()

    def on_read(connection, line):
        kill()
        go_on.wait()
        recorder("went on")

    server = server_of(Lines, server_class=told(recorder), on_read=on_read)
    one = peer(server)
    gevent.spawn(one.send, b"hello\n")
    assert 0.05 <= start(0.05) < 5
    assert recorder == ["server closed"]
    go_on.set()
    recorder.wait_for("went on")


def test_stop_of_the_engine_during_its_graceful_end_ends_it_now(handlers, server_of, peer):
    server = server_of(Lines, on_stopping=lambda connection, deadline: connection.engine.stop())
    peer(server)
    connection = only(server)
    engine.callback(kill)
    assert start() < 5
    assert connection.connected


def test_start_again_after_a_graceful_end(handlers, server_of, peer):
    for _ in range(2):
        server = server_of(Lines)
        one = peer(server)
        one.send(b"hello\n")
        heard = ends_with(one)
        engine.defer(0.05, kill)
        assert start() < 5
        assert heard.get() == b"hello\n"


def test_start_without_graceful_timeout_leaves_the_signals_alone(recorder, handlers):
    found = []
    engine.callback(lambda: (found.extend(map(signal.getsignal, SIGNALS)), engine.stop()))
    engine.start()
    assert found == [handlers] * 2


def test_graceful_end_handler_that_was_set_meanwhile_stays(handlers):
    def own(number, frame):
        raise AssertionError

    engine.callback(lambda: (signal.signal(signal.SIGINT, own), engine.stop()))
    start()
    assert signal.signal(signal.SIGINT, handlers) is own


@pytest.mark.parametrize("wrong", [0, -1, math.nan, math.inf])
def test_graceful_timeout_that_is_no_number_of_seconds_is_a_value_error(wrong):
    with pytest.raises(ValueError, match=r"start\(\): graceful_timeout"):
        engine.start(graceful_timeout=wrong)


@pytest.mark.parametrize("wrong", [True, "5", [5]])
def test_graceful_timeout_that_is_no_number_is_a_type_error(wrong):
    with pytest.raises(TypeError, match=r"start\(\): graceful_timeout"):
        engine.start(graceful_timeout=wrong)


def test_graceful_timeout_outside_of_the_main_thread_is_an_error(handlers):
    def elsewhere():
        try:
            own = Engine()
            with pytest.raises(ChannelStateError, match="main thread"):
                own.start(graceful_timeout=5)
            own.defer(0.001, own.stop)
            own.start()
        finally:
            gevent.get_hub().destroy(destroy_loop=True)

    in_thread(elsewhere)


# ---- processes

HERE = Path(__file__).resolve().parent


def process(*arguments, patched=False):
    """Return a program of ``stopping_servers.py`` at work."""
    return Child(*["-m", "gevent.monkey"] * patched, HERE / "stopping_servers.py", *arguments)


def said(child, key):
    """Wait until a program says something of `key`, and return all that it says then."""
    return json.loads(child.expect(rf'^\{{.*"{key}": .*\}}$')[0])


@pytest.mark.parametrize("patched", [False, True], ids=["raw", "patched"])
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_sigterm_under_500_busy_connections_every_answer_arrives_whole(secure, patched):
    certificate = authority().localhost if secure else {}
    count = min(500, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 100)
    with process("serve", "busy", 20, *certificate.values(), patched=patched) as server:
        with process("crowd", said(server, "port")["port"], count, *[authority().file] * secure) as crowd:
            said(crowd, "busy")
            server.process.send_signal(signal.SIGTERM)
            arrived = said(crowd, "whole")
            answered = said(server, "answered")["answered"]
            assert server.end() == crowd.end() == 0
        assert server.error_output() == ""
    assert arrived == {"whole": answered, "wrong": []}
    assert answered >= count


@pytest.mark.parametrize("patched", [False, True], ids=["raw", "patched"])
@pytest.mark.parametrize("number", SIGNALS, ids=["SIGTERM", "SIGINT"])
def test_graceful_end_of_a_process_is_exit_code_0(number, patched):
    with process("serve", "busy", 20, patched=patched) as server:
        with BlockingPeer(said(server, "port")["port"]) as one:
            one.send(b"hello\n")
            assert len(one.read(10_000)) == 10_000
            server.process.send_signal(number)
            assert one.read(1) == b""
        assert server.end() == 0
        assert server.error_output() == ""


def test_graceful_end_of_a_process_whose_callback_blocks_is_exit_code_0_at_the_deadline():
    with process("serve", "stuck", 0.1) as server, BlockingPeer(said(server, "port")["port"]) as one:
        one.send(b"hello\n")
        assert one.read(11) == b"one moment\n"
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        with pytest.raises(ConnectionResetError):
            one.read(1)
        assert "1 connections had not come to their end in time" in server.error_output()


def test_graceful_end_of_a_process_second_signal_ends_it_now():
    with process("serve", "stays", 20) as server, BlockingPeer(said(server, "port")["port"]) as one:
        one.send(b"hello\n")
        assert len(one.read(10_000)) == 10_000
        server.process.send_signal(signal.SIGTERM)
        assert one.read(3) == b"no\n"
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        assert "SIGTERM once more" in server.error_output()


def test_fork_while_stopping_leaves_the_connections_to_the_parent():
    with process("serve", "forks", 20) as server:
        with BlockingPeer(said(server, "port")["port"]) as one:
            one.send(b"hello\n")
            assert len(one.read(10_000)) == 10_000
            server.process.send_signal(signal.SIGTERM)
            assert one.read(1000) == b"written before the fork\ngoodbye\n"
        assert said(server, "connected") == {"connected": False, "channels": 0, "reason": "the server has stopped"}
        assert server.end() == 0
        assert server.error_output() == ""
