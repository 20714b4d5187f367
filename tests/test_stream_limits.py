"""Limits of a stream: of silence (idle_timeout), speed (read_rate, chunk_rate), callbacks (callback_timeout) and lingering."""

import gc
import logging
import os
import socket as stdlib_socket
import struct
import time
from itertools import pairwise

import gevent
import pytest
from certificates import client_context, server_context
from forks import in_child
from gevent import monkey
from gevent.event import Event
from gevent.lock import BoundedSemaphore
from peers import PlainSocket
from tls_peers import TLSPeer, tls_peer  # noqa: F401
from waiting import lingering, nothing_is_kept, turns, unsent, until  # noqa: F401

from pants_green import (
    CallbackTimeout,
    ChannelClosed,
    Client,
    CloseReason,
    Connection,
    Engine,
    IdleTimeout,
    ReadTimeout,
    ReconnectingClient,
    Server,
    Stream,
    _linger,
)
from pants_green.framing import LengthPrefix
from pants_green.testing import memory_pair

#: For real threads, also in a patched process.
sleep_in_thread = monkey.get_original("time", "sleep")

KIB = 1024
MIB = 1024 * KIB

#: More than the little room in both kernels.
FULL = 1 * MIB
ROOM = 32 * KIB

#: The time limit of most tests, and by how much what it does may be late, in seconds. Early it may not be.
SHORT = 0.05
LATE = 0.5
EARLY = 0.005


class Echo(Connection):
    def on_read(self, data):
        self.write(data)


class Lines(Connection):
    read_delimiter = b"\n"


def only(server):
    """Return the stream of a server once there is one."""
    until(lambda: len(server.channels) == 1)
    return server.channels.values()[0]


def tls_server(stream_class):
    return Server(stream_class, ssl_options=server_context())


@pytest.fixture(params=["tcp", "tls"])
def joined(request, server_of, peer, tls_peer, recorder):  # noqa: F811
    """Return a function that makes a stream of a class, recorded, and its peer; by each transport."""

    def make(base, *names, rcvbuf=None, **attributes):
        kind = recorder.of(base, *(names or ("on_timeout", "on_error", "on_end", "on_close")), **attributes)
        if request.param == "tls":
            server = server_of(kind, server_class=tls_server)
            return_peer = tls_peer
        else:
            server = server_of(kind)
            return_peer = peer
        one = return_peer(server, rcvbuf=rcvbuf)
        return only(server), one

    make.kind = request.param
    return make


@pytest.fixture
def connected(server_of, peer, recorder):
    """Return a function that makes a stream of a class, recorded, and its peer, over TCP."""

    def make(base, *names, rcvbuf=None, **attributes):
        names = names or ("on_timeout", "on_error", "on_end", "on_close")
        server = server_of(recorder.of(base, *names, **attributes))
        one = peer(server, rcvbuf=rcvbuf)
        return only(server), one

    return make


def warnings_of(caplog):
    """Return the messages of all records above INFO."""
    return [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]


def took(recorder, event, began, timeout=5.0):
    """Wait for an event and return how long it has taken since `began`."""
    recorder.wait_for(event, timeout)
    return time.monotonic() - began


def in_time(seconds, limit):
    """Tell whether something took as long as a limit, and not much longer."""
    return limit - EARLY <= seconds < limit + LATE


# ---- How they are set

SETTINGS = {
    "idle_timeout": (5, [0, -1, float("nan"), float("inf"), 10**400], ["5", True, b"", [1]]),
    "callback_timeout": (5, [0, -1, float("nan"), float("inf")], ["5", False]),
    "linger_timeout": (5, [0, -1, float("nan"), float("inf")], ["5", True]),
    "read_rate": (1000, [0, -1, float("nan"), float("inf"), 10**400], ["fast", True]),
    "chunk_rate": (2.5, [0, -1, float("nan"), float("inf"), 10**400], ["fast", True]),
}

each_setting = pytest.mark.parametrize("name", SETTINGS)


@each_setting
def test_limit_has_a_value_on_the_class_a_subclass_and_an_instance(name):
    value = SETTINGS[name][0]
    base = type("Base", (Stream,), {name: value})
    off = type("Off", (base,), {name: None})
    assert getattr(Stream, name) == (30.0 if name == "linger_timeout" else None)
    assert getattr(base, name) == getattr(base(), name) == value
    assert getattr(off, name) is getattr(off(), name) is None
    one = base()
    setattr(one, name, value + 1)
    assert getattr(one, name) == value + 1
    assert getattr(base(), name) == value
    setattr(base, name, value + 2)
    assert getattr(base, name) == getattr(base(), name) == value + 2


@each_setting
def test_limit_that_makes_no_sense_is_an_error_that_names_it_and_what_would_do(name):
    _, wrong_values, wrong_types = SETTINGS[name]
    for kind, wrong in [*((ValueError, one) for one in wrong_values), *((TypeError, one) for one in wrong_types)]:
        with pytest.raises(kind, match=rf"^Sub\.{name} is a .*number.* None for no limit"):
            type("Sub", (Stream,), {name: wrong})
        sub = type("Sub", (Stream,), {})
        with pytest.raises(kind, match=rf"^Sub\.{name} is a "):
            setattr(sub(), name, wrong)
        with pytest.raises(kind, match=rf"^Sub\.{name} is a "):
            setattr(sub, name, wrong)
        assert getattr(sub, name) == getattr(Stream, name)


def test_no_limit_nothing_stands_between_a_stream_and_its_socket(connected):
    stream, _ = connected(Echo)
    assert stream._recv == stream.socket._sock.recv
    assert stream._meter is stream._counter is stream._limits is None


# ---- idle_timeout


def test_idle_over_a_unix_socket_is_the_same(server_of, peer, recorder, tmp_path):
    server = server_of(recorder.of(Echo, "on_timeout", "on_close", idle_timeout=SHORT), str(tmp_path / "socket"))
    one = peer(server)
    one.send(b"x")
    assert one.recv_exactly(1) == b"x"
    assert in_time(took(recorder, "on_close", time.monotonic()) + 0.02, SHORT)
    assert one.at_eof()


def test_idle_silent_peer_is_closed_in_time_with_one_warning(joined, recorder, caplog):
    stream, one = joined(Echo, idle_timeout=SHORT)
    began = time.monotonic()
    assert in_time(took(recorder, "on_close", began) + 0.02, SHORT)  # which has begun a little earlier
    assert recorder == [("on_timeout", "idle"), ("on_close",)]
    assert stream.close_reason is CloseReason.TIMED_OUT
    assert isinstance(stream.close_error, IdleTimeout)
    (record,) = [record for record in caplog.records if record.levelno > logging.INFO]
    assert record.levelno == logging.WARNING
    assert "idle_timeout, 0.05 seconds" in record.getMessage()
    assert record.channel is stream
    assert record.peer == stream.remote_address
    assert one.recv_all() == b""  # a FIN, and over TLS the goodbye: nothing is missing


def test_idle_a_byte_in_either_direction_starts_it_anew(joined, recorder):
    stream, one = joined(Connection, idle_timeout=SHORT)
    for number in range(4):
        gevent.sleep(SHORT * 0.5)
        assert recorder == []
        began = time.monotonic()
        if number % 2:
            one.send(b"x")
        else:
            stream.write(b"x")
    assert in_time(took(recorder, "on_close", began), SHORT)


def test_idle_files_count_as_they_go(connected, recorder, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * MIB))

    def on_connect(stream):
        stream.socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_SNDBUF, ROOM)

    stream, one = connected(Connection, idle_timeout=SHORT, on_connect=on_connect, rcvbuf=ROOM)
    with path.open("rb") as file:
        stream.write_file(file)
    while unsent(stream):
        one.recv_exactly(256 * KIB)
        gevent.sleep(0.01)
    began = time.monotonic()
    assert recorder == []
    assert in_time(took(recorder, "on_close", began) + 0.02, SHORT)


def test_idle_does_not_run_while_a_callback_is_at_work_and_begins_behind_it(connected, recorder):
    def on_read(stream, data):
        gevent.sleep(SHORT * 2.5)
        recorder("done", time.monotonic())

    _, one = connected(Connection, idle_timeout=SHORT, on_read=on_read)
    one.send(b"x")
    recorder.wait_for("done")
    assert recorder.names() == ["done"]
    assert in_time(took(recorder, "on_close", recorder[0][1]), SHORT)


@pytest.mark.parametrize("callback", ["on_connect", "on_ssl_handshake"])
def test_idle_first_callback_does_not_count_either(server_of, recorder, peer, tls_peer, callback):  # noqa: F811
    def first(stream):
        gevent.sleep(SHORT * 1.5)
        recorder("done", time.monotonic())

    kind = recorder.of(Connection, "on_timeout", "on_close", idle_timeout=SHORT, **{callback: first})
    if callback == "on_connect":
        peer(server_of(kind))
    else:
        tls_peer(server_of(kind, server_class=tls_server))
    recorder.wait_for("done")
    assert in_time(took(recorder, "on_close", recorder[0][1]), SHORT)


def test_idle_callback_that_waits_in_read_has_only_the_time_of_that(connected, recorder):
    def on_connect(stream):
        with pytest.raises(ReadTimeout):
            stream.read(timeout=SHORT * 2)
        recorder("read", time.monotonic())

    _, one = connected(Lines, idle_timeout=SHORT, on_connect=on_connect)
    recorder.wait_for("read")
    assert recorder.names() == ["read"]
    assert in_time(took(recorder, "on_timeout", recorder[0][1]), SHORT)
    assert one.at_eof()


def test_idle_does_not_run_while_output_is_pending(connected, recorder):
    stream, one = connected(Connection, idle_timeout=SHORT, rcvbuf=ROOM)
    stream.write(bytes(8 * MIB))
    gevent.sleep(SHORT * 1.5)
    assert recorder == []
    one.recv_exactly(8 * MIB)
    began = time.monotonic()
    assert in_time(took(recorder, "on_close", began) + 0.05, SHORT)  # the kernel had taken the rest a little earlier


def test_idle_does_not_run_while_paused_and_begins_with_resume(connected, recorder):
    stream, _ = connected(Connection, idle_timeout=SHORT)
    stream.pause()
    gevent.sleep(SHORT * 1.7)
    assert recorder == []
    stream.resume()
    assert in_time(took(recorder, "on_close", time.monotonic()), SHORT)


def test_idle_override_may_keep_the_connection_and_then_it_begins_anew(connected, recorder):
    times = []
    names = "on_timeout", "on_read", "on_close"
    stream, one = connected(Lines, *names, idle_timeout=SHORT, on_timeout=lambda *args: times.append(time.monotonic()))
    recorder.wait_for(3)
    assert recorder == [("on_timeout", "idle")] * 3
    assert all(in_time(after - before, SHORT) for before, after in pairwise(times))
    one.send(b"still here\n")
    recorder.wait_for(("on_read", b"still here"))
    assert stream.connected


def test_idle_override_may_say_goodbye(connected):
    def on_timeout(stream, which):
        stream.write(b"421 " + which.encode())
        stream.end()

    _, one = connected(Lines, idle_timeout=SHORT, on_timeout=on_timeout)
    assert one.recv_all() == b"421 idle"


@pytest.mark.parametrize("when", ["constructor", "on_connect", "later"])
def test_idle_set_on_the_instance_holds_at_once(connected, recorder, when):
    class Timed(Connection):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            if when == "constructor":
                self.idle_timeout = SHORT

        def on_connect(self):
            if when == "on_connect":
                self.idle_timeout = SHORT

    stream, _ = connected(Timed)
    if when == "later":
        turns()
        stream.idle_timeout = SHORT
    assert in_time(took(recorder, "on_close", time.monotonic()) + 0.02, SHORT)
    assert ("on_timeout", "idle") in recorder


def test_idle_none_switches_it_off_and_a_longer_one_is_longer(connected, recorder):
    stream, _ = connected(Connection, idle_timeout=SHORT)
    stream.idle_timeout = None
    gevent.sleep(SHORT * 1.5)
    stream.idle_timeout = SHORT * 2
    began = time.monotonic()
    assert recorder == []
    assert in_time(took(recorder, "on_close", began), SHORT * 2)


@pytest.mark.parametrize("ssl_options", [None, client_context()], ids=["tcp", "tls"])
@pytest.mark.parametrize("when", ["before", "given", "after"])
def test_idle_of_a_client_set_before_and_after_it_dials(server_of, recorder, ssl_options, when):
    server = server_of(Connection, server_class=tls_server if ssl_options else Server)
    given = PlainSocket() if when == "given" else None
    client = recorder.of(Client, "on_connect", "on_timeout", "on_close")(given, ssl_options=ssl_options)
    if when != "after":
        client.idle_timeout = SHORT
    client.connect("localhost", server.local_address[1])
    if when == "after":
        client.idle_timeout = SHORT
    recorder.wait_for("on_connect")
    assert in_time(took(recorder, "on_close", time.monotonic()) + 0.02, SHORT)
    assert recorder == [("on_connect",), ("on_timeout", "idle"), ("on_close",)]


@pytest.mark.parametrize("when", ["before", "between"])
def test_idle_over_starttls_counts_before_and_after_and_not_in_the_handshake(server_of, peer, recorder, when):
    class Upgrading(Lines):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            if when == "before":
                self.idle_timeout = SHORT

        def on_read(self, line):
            if line == b"STARTTLS":
                self.write(b"go\n")
                self.startSSL(server_context())
                if when == "between":
                    self.idle_timeout = SHORT
            else:
                self.write(line + b"\n")

    server = server_of(recorder.of(Upgrading, "on_timeout", "on_close"))
    clear = peer(server)
    clear.send(b"STARTTLS\n")
    assert clear.recv_until(b"\n") == b"go\n"
    gevent.sleep(SHORT * 1.5)  # in which the peer has not begun
    assert recorder == []
    with TLSPeer.over(clear) as one:
        for _ in range(3):
            gevent.sleep(SHORT * 0.5)
            one.send(b"hello\n")
            assert one.recv_until(b"\n") == b"hello\n"
        assert recorder == []
        assert in_time(took(recorder, "on_close", time.monotonic()) + 0.02, SHORT)


def test_idle_half_open_stream_that_has_no_more_to_say_is_closed(connected, recorder):
    def on_end(stream, rest):
        gevent.sleep(SHORT * 1.5)
        recorder("done", time.monotonic())

    stream, one = connected(Connection, "on_timeout", "on_close", idle_timeout=SHORT, allow_half_open=True, on_end=on_end)
    one.shutdown_output()
    recorder.wait_for("done")
    assert in_time(took(recorder, "on_close", recorder[0][1]), SHORT)
    assert stream.close_reason is CloseReason.TIMED_OUT


def test_idle_of_a_reconnecting_client_holds_for_each_connection(server_of, recorder):
    server = server_of(Connection)
    client = recorder.of(ReconnectingClient, "on_connect", "on_timeout", initial_delay=0.01, max_delay=0.01)()
    client.idle_timeout = SHORT / 2
    client.connect(server.local_address)
    recorder.wait_for(5)
    assert recorder[:5] == [("on_connect",), ("on_timeout", "idle")] * 2 + [("on_connect",)]
    client.stop()
    until(lambda: client.closed)


def test_idle_limits_of_streams_in_memory_work_too(recorder):
    _stream, end = memory_pair(recorder.of(Echo, "on_timeout", "on_close", idle_timeout=SHORT))
    end.send(b"x")
    assert end.wait_for(1) == b"x"
    recorder.wait_for("on_close")
    assert recorder == [("on_timeout", "idle"), ("on_close",)]
    end.close()


# ---- read_rate


def test_read_rate_nothing_is_lost_and_the_peer_is_held_up(joined, recorder):
    """One second's worth comes at once, the rest by and by."""
    got = bytearray()
    rate = 512 * KIB
    stream, one = joined(Connection, read_rate=rate, on_read=lambda stream, data: got.extend(data))
    data = os.urandom(rate + rate // 8)
    began = time.monotonic()
    sending = gevent.spawn(one.send, data)
    until(lambda: len(got) > rate * 0.95)
    assert time.monotonic() - began < 0.5
    until(lambda: len(got) == len(data))
    assert 0.1 < time.monotonic() - began < 2
    assert got == data
    sending.get()
    assert stream.connected


def test_read_rate_reads_in_pieces_of_a_hundredth_of_a_second(connected):
    sizes = []
    rate = 64 * KIB
    _, one = connected(Connection, read_rate=rate, on_read=lambda stream, data: sizes.append(len(data)))
    one.send(bytes(rate + rate // 10))
    until(lambda: sum(sizes) == rate + rate // 10)
    assert len(sizes) < 40


@pytest.mark.parametrize("how", ["close", "abort", "end", "pause", "post", "off", "faster"])
def test_read_rate_a_stream_that_is_held_up_still_hears_everything_else(joined, recorder, how):
    got = bytearray()
    rate, size = 100 * KIB, 400 * KIB
    stream, one = joined(Connection, "on_close", read_rate=rate, on_read=lambda stream, data: got.extend(data))
    sending = gevent.spawn(one.send, bytes(size))
    until(lambda: len(got) >= rate * 0.8)  # over TLS a record may not be whole yet
    turns()
    before = len(got)
    assert before < rate * 1.5
    began = time.monotonic()
    if how == "pause":
        stream.pause()
        gevent.sleep(0.1)
        assert len(got) == before
        stream.resume()
        until(lambda: len(got) > before)
    elif how == "post":
        stream.on_write = lambda: recorder("on_write")
        stream.write(b"x")
        recorder.wait_for("on_write")
        assert one.recv_exactly(1) == b"x"
    elif how in ("off", "faster"):
        stream.read_rate = None if how == "off" else 10 * MIB
        until(lambda: len(got) == size)
    elif how == "end":
        stream.write(b"bye")
        stream.end()
        assert one.recv_until(b"bye") == b"bye"
        recorder.wait_for("on_close")
    else:
        getattr(stream, how)()
        recorder.wait_for("on_close")
    assert time.monotonic() - began < 0.5
    stream.abort()
    if how == "end":
        sending.get()  # all of it, for what is thrown away may come as fast as it likes
        one.shutdown_output()
        until(lambda: not lingering())
    sending.join()
    assert time.monotonic() - began < 1.0


def test_read_rate_holds_for_read_in_callbacks(connected, recorder):
    def on_connect(stream):
        stream.read_rate = 20 * KIB
        began = time.monotonic()
        assert stream.read(20 * KIB) == bytes(20 * KIB)
        recorder(time.monotonic() - began)
        assert stream.read(4 * KIB) == bytes(4 * KIB)
        recorder(time.monotonic() - began)
        with pytest.raises(ReadTimeout):
            stream.read(8 * KIB, timeout=0)
        with pytest.raises(ReadTimeout):
            stream.read(8 * KIB, timeout=0.02)

    _, one = connected(Connection, "on_error", on_connect=on_connect)
    one.send(bytes(32 * KIB))
    recorder.wait_for(2)
    turns()
    assert recorder[0] < 0.15
    assert 0.18 < recorder[1] < 0.6
    assert len(recorder) == 2


def test_read_rate_a_stream_that_is_held_up_is_not_idle(connected, recorder):
    got = bytearray()
    stream, one = connected(Connection, read_rate=16, idle_timeout=SHORT, on_read=lambda stream, data: got.extend(data))
    one.send(b"123456789abcdefgh")
    recorder.wait_for("on_close")
    assert got == b"123456789abcdefgh"
    assert stream.close_reason is CloseReason.TIMED_OUT


def test_read_rate_a_chunk_that_is_held_up_is_not_overdue(connected, recorder):
    _, one = connected(Lines, "on_read", "on_timeout", "on_close", read_rate=400, read_timeout=0.03)
    one.send(b"x" * 450 + b"\n")
    recorder.wait_for("on_read")
    assert recorder == [("on_read", b"x" * 450)]
    one.send(b"yyyyyyyy")  # held up, too, and then nothing more comes
    recorder.wait_for("on_close")
    assert recorder[1] == ("on_timeout", "read")


@pytest.mark.parametrize("rate", [None, 10000])
def test_read_rate_switched_off_while_a_chunk_is_held_up_leaves_it_the_time_that_it_had(connected, recorder, rate):
    stream, one = connected(Lines, "on_timeout", "on_close", read_rate=4, read_timeout=SHORT)
    one.send(b"y" * 4)
    until(lambda: stream._waiting and stream._in_chunk())
    gevent.sleep(SHORT * 1.5)
    assert recorder == []
    stream.read_rate = rate
    recorder.wait_for("on_close")
    assert recorder[0] == ("on_timeout", "read")


def test_read_rate_peer_that_has_itself_held_up_again_and_again_gets_no_more_time_for_its_chunk(connected, recorder):
    stream, one = connected(Lines, "on_timeout", "on_close", read_rate=100, read_timeout=0.1)
    until(lambda: stream._waiting)
    one.send(b"y" * 100)
    began = time.monotonic()
    while time.monotonic() - began < 2.0 and not recorder:
        gevent.sleep(0.06)  # in which there is room for six
        one.send(b"y" * 6)
    assert recorder
    assert time.monotonic() - began < 0.9


@pytest.mark.parametrize("secure", [False, True], ids=["tcp", "tls"])
@pytest.mark.parametrize("limits", [{"idle_timeout": SHORT}, {"callback_timeout": SHORT}, {"chunk_rate": 10}], ids=str)
def test_limits_that_the_class_gets_hold_for_what_has_not_dialled_yet(server_of, recorder, secure, limits):
    """That is, as other settings do, and for each connection of a client that dials again."""
    server = server_of(Echo, server_class=tls_server if secure else Server)
    times = []

    def on_connect(client):
        if "callback_timeout" in limits:
            gevent.sleep(10)
        client.write(b"x")

    def on_read(client, data):
        times.append(time.monotonic())
        if "chunk_rate" in limits:
            client.write(b"x")

    base = recorder.of(ReconnectingClient, "on_close", initial_delay=0.01, max_delay=0.01, on_connect=on_connect, on_read=on_read)
    client = base(ssl_options=client_context() if secure else None)
    for name, value in limits.items():
        setattr(base, name, value)
    client.connect("localhost", server.local_address[1])
    if "chunk_rate" in limits:
        until(lambda: len(times) >= 12)
        assert times[11] - times[0] > 0.1
    else:
        recorder.wait_for(2)
    client.stop()
    until(lambda: client.closed)


def test_read_rate_that_the_class_gets_before_starttls_leaves_nothing_behind(server_of, peer, recorder):
    class Upgrading(Lines):
        def on_read(self, line):
            type(self).read_rate = 10
            self.write(b"go\n")
            self.startSSL(server_context())
            recorder("begun", self)

    timers = len(Engine.instance()._scheduler)
    clear = peer(server_of(recorder.of(Upgrading, "on_close")))
    clear.send(b"STARTTLS\n")
    recorder.wait_for("begun")
    assert clear.recv_until(b"\n") == b"go\n"
    with TLSPeer.over(clear) as one:
        one.send(b"x" * 100)
        turns()
        stream = recorder[0][1]
        stream.abort()
    recorder.wait_for("on_close")
    assert stream._meter is None
    assert len(Engine.instance()._scheduler) == timers


def test_chunk_rate_chunks_that_are_held_up_are_not_overdue(connected, recorder):
    stream, one = connected(Lines, "on_read", "on_timeout", "on_close", chunk_rate=20, read_timeout=0.03)
    one.send(b"a")
    until(lambda: stream._in_chunk())
    one.send(b"\n" * 22 + b"b")
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_read"] * 22 + ["on_timeout", "on_close"]


@pytest.mark.parametrize(("name", "what"), [("read_rate", "bytes"), ("chunk_rate", "chunks")])
def test_rate_peer_that_is_held_up_is_told_once(connected, caplog, name, what):
    got = bytearray()
    limits = {name: 20, "read_delimiter": 1}
    stream, one = connected(Connection, on_read=lambda stream, data: got.extend(data), **limits)
    one.send(b"x" * 20)
    until(lambda: len(got) == 20)
    assert stream.connected
    one.send(b"y" * 4)
    until(lambda: len(got) == 24)
    (record,) = [record for record in caplog.records if record.levelno > logging.INFO]
    assert record.levelno == logging.WARNING
    assert f"{name}, 20 {what} per second, is reached" in record.getMessage()
    assert (record.channel, record.peer) == (stream, one.address)


def test_read_rate_closing_while_held_up_leaves_no_timer_behind(connected, recorder):
    timers = len(Engine.instance()._scheduler)
    stream, one = connected(Connection, read_rate=1, write_timeout=None)
    one.send(b"abcdef")
    turns()
    stream.close()
    recorder.wait_for("on_close")
    assert len(Engine.instance()._scheduler) == timers


# ---- chunk_rate


@pytest.mark.parametrize("delimiter", [b"\n", 2, struct.Struct("!BB"), LengthPrefix("!B")], ids=str)
def test_chunk_rate_so_many_at_once_and_the_rest_by_and_by(connected, delimiter):
    times = []
    _, one = connected(Connection, chunk_rate=40, read_delimiter=delimiter, on_read=lambda *args: times.append(time.monotonic()))
    began = time.monotonic()
    one.send(b"\1\n" * 42)
    until(lambda: len(times) == 42)
    turns()
    assert times[39] - began < 0.5
    assert 0.04 < times[41] - began < 2


def test_chunk_rate_without_a_delimiter_counts_what_arrives(connected):
    got = []
    stream, one = connected(Connection, chunk_rate=8, on_read=lambda stream, data: got.append(data))
    began = time.monotonic()
    while len(got) < 9:
        one.send(b"x")
        until(lambda: len(got) > 7 or stream._waiting)
        turns(2)
    assert 0.1 < time.monotonic() - began < 2


@pytest.mark.parametrize("how", ["close", "end", "pause", "post", "off", "delimiter"])
def test_chunk_rate_a_stream_that_is_held_up_still_hears_everything_else(connected, recorder, how):
    stream, one = connected(Lines, "on_read", "on_close", chunk_rate=2)
    one.send(b"a\nb\nc\ndef\n")
    recorder.wait_for(2)
    turns()
    assert len(recorder) == 2
    began = time.monotonic()
    if how == "pause":
        stream.chunk_rate = 20
        stream.pause()
        gevent.sleep(0.1)
        assert len(recorder) == 2
        stream.resume()
        recorder.wait_for(("on_read", b"c"))
        return
    if how == "post":
        stream.on_write = lambda: recorder("on_write")
        stream.write(b"x")
        recorder.wait_for("on_write")
    elif how == "off":
        stream.chunk_rate = None
        recorder.wait_for(("on_read", b"def"))
    elif how == "delimiter":
        stream.read_delimiter = 3
        stream.chunk_rate = 100
        recorder.wait_for(("on_read", b"c\nd"))
    else:
        getattr(stream, how)()
        recorder.wait_for("on_close")
        assert recorder == [("on_read", b"a"), ("on_read", b"b"), ("on_close",)]
    assert time.monotonic() - began < 0.4


def test_chunk_rate_set_while_a_batch_is_delivered_holds_for_the_rest_of_it(connected, recorder):
    def on_read(stream, line):
        if line == b"0":
            stream.chunk_rate = 5

    _, one = connected(Lines, "on_read", on_read=on_read)
    one.send(b"".join(b"%d\n" % number for number in range(8)))
    recorder.wait_for(6)
    turns()
    assert len(recorder) == 6  # the first did not count yet
    recorder.wait_for(7)


def test_chunk_rate_a_stream_that_is_held_up_is_not_idle(connected, recorder):
    _, one = connected(Lines, "on_read", "on_timeout", "on_close", chunk_rate=16, idle_timeout=SHORT)
    one.send(b"1\n" * 17)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_read"] * 17 + ["on_timeout", "on_close"]


def test_chunk_rate_of_a_reconnecting_client_holds_for_each_connection(server_of, recorder):
    class Speaker(Connection):
        def on_connect(self):
            self.write(b"1\n" * 11)
            self.end()

    limited = {"read_delimiter": b"\n", "chunk_rate": 10, "initial_delay": 0.01, "max_delay": 0.01}
    client = recorder.of(ReconnectingClient, "on_read", "on_close", **limited)()
    client.connect(server_of(Speaker).local_address)
    recorder.wait_for(22)
    turns()
    assert recorder.names() == [*["on_read"] * 11, "on_close", *["on_read"] * 10]
    client.stop()
    until(lambda: client.closed)


# ---- callback_timeout


def blocks_in(how, stream, other=None):
    """Block in one of the ways in which a callback may."""
    if how == "sleep":
        gevent.sleep(10)
    elif how == "Event":
        Event().wait()
    elif how == "lock":
        lock = BoundedSemaphore(1)
        lock.acquire()
        lock.acquire()
    elif how == "socket":
        left, right = gevent.socket.socketpair()
        with left, right:
            left.recv(1)
    elif how == "drain":
        other.drain()
    elif how == "write":
        other.write(b"x")
    else:
        assert how == "thread"
        stream.engine.run_in_thread(sleep_in_thread, 0.1)


@pytest.mark.parametrize("how", ["sleep", "Event", "lock", "socket", "thread", "drain", "write"])
def test_callback_timeout_is_raised_where_the_callback_waits(connected, server_of, peer, recorder, caplog, how):
    other = None
    if how in ("drain", "write"):
        slow = server_of(Connection, write_limit=64 * KIB, high_water=32 * KIB, overflow="wait")
        peer(slow, rcvbuf=ROOM)
        other = only(slow)
        other.write(bytes(8 * MIB))

    def on_read(stream, data):
        try:
            blocks_in(how, stream, other)
        except CallbackTimeout as error:
            recorder("raised", str(error))
            raise

    stream, one = connected(Connection, callback_timeout=SHORT, on_read=on_read)
    one.send(b"x")
    assert in_time(took(recorder, "on_close", time.monotonic()) + 0.02, SHORT)
    assert recorder.names() == ["raised", "on_error", "on_close"]
    message = recorder[0][1]
    assert "on_read of <" in message
    assert str(stream.remote_address[1]) in message
    assert "callback_timeout, 0.05 seconds" in message
    assert stream.close_reason is CloseReason.CALLBACK_ERROR
    assert isinstance(stream.close_error, CallbackTimeout)
    assert len(warnings_of(caplog)) == 1
    if other is not None:
        assert other.connected
        assert other._waiters == ()


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("on_connect", "class"),
        ("on_connect", "instance"),
        ("on_ssl_handshake", "class"),
        ("on_end", "class"),
        ("on_write", "instance"),
        ("on_timeout", "class"),
        ("on_stopping", "class"),
        ("on_error", "class"),
    ],
)
def test_callback_timeout_holds_for_every_callback(server_of, peer, tls_peer, recorder, name, where):  # noqa: F811
    def blocks(stream, *args):
        recorder(name)
        if recorder.count(name) == 1:
            gevent.sleep(10)

    class Timed(Lines):
        idle_timeout = SHORT if name == "on_timeout" else None

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            if where == "instance":
                self.callback_timeout = SHORT

        def on_read(self, line):
            if name == "on_error":
                raise RuntimeError("as it was asked to")
            self.write(line)

    if where == "class":
        Timed.callback_timeout = SHORT
    setattr(Timed, name, blocks)
    kind = recorder.of(Timed, "on_close", *(["on_error"] if name != "on_error" else []))
    tls = name == "on_ssl_handshake"
    server = server_of(kind, server_class=tls_server if tls else Server)
    one = (tls_peer if tls else peer)(server)
    if name in ("on_write", "on_error"):
        one.send(b"hello\n")
    elif name == "on_end":
        one.shutdown_output()
    elif name == "on_stopping":
        until(lambda: len(server.channels) == 1)
        gevent.spawn(server.stop)
    recorder.wait_for("on_close", timeout=2.0)
    assert recorder.names() == [name, *["on_error"] * (name != "on_error"), "on_close"]  # for that there is nobody to be told


def test_callback_timeout_is_not_for_on_close(connected, recorder):
    def on_close(stream):
        gevent.sleep(SHORT * 2)
        recorder("done")

    stream, _ = connected(Connection, "on_error", callback_timeout=SHORT, on_close=on_close)
    stream.close()
    recorder.wait_for("done")
    assert recorder == ["done"]


@pytest.mark.parametrize("how", ["read", "drain", "write"])
def test_callback_timeout_does_not_count_what_waits_in_the_streams_own(connected, recorder, how):
    """Before and after it the callback has its whole time."""

    def on_read(stream, data):
        gevent.sleep(SHORT * 0.5)
        if how == "read":
            assert stream.read() == b"second"
        else:
            stream.write(bytes(FULL))
            getattr(stream, how)(*[b"more"] * (how == "write"))
        gevent.sleep(SHORT * 0.6)
        recorder("done")

    stream, one = connected(
        Lines, "on_error", "on_close", rcvbuf=ROOM, callback_timeout=SHORT, on_read=on_read, write_limit=64 * KIB, high_water=32 * KIB
    )
    stream.socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_SNDBUF, ROOM)
    one.send(b"first\n")
    gevent.sleep(SHORT * 2)
    assert recorder == []
    if how == "read":
        one.send(b"second\n")
    else:
        one.recv_exactly(FULL)
    recorder.wait_for("done")
    assert recorder == ["done"]


def test_callback_timeout_after_a_read_is_raised_all_the_same(connected, recorder):
    def on_read(stream, data):
        stream.read()
        gevent.sleep(10)

    _, one = connected(Lines, callback_timeout=SHORT, on_read=on_read)
    one.send(b"first\nsecond\n")
    assert in_time(took(recorder, "on_close", time.monotonic()) + 0.02, SHORT)


@pytest.mark.parametrize("delimiter", [b"\n", struct.Struct("!BB"), LengthPrefix("!B")], ids=str)
def test_callback_timeout_each_chunk_of_a_batch_has_its_own(connected, recorder, delimiter):
    def on_read(stream, *args):
        gevent.sleep(SHORT * 0.4)
        recorder(*args)

    stream, one = connected(Connection, "on_error", callback_timeout=SHORT, read_delimiter=delimiter, on_read=on_read)
    one.send(b"\1\n" * 3)
    recorder.wait_for(3)
    turns()
    assert "on_error" not in recorder.names()
    assert stream.connected


def test_callback_timeout_callback_that_returns_in_time_hears_nothing(connected, recorder):
    def on_read(stream, line):
        gevent.sleep(SHORT * 0.5)
        stream.write(line + b"\n")

    stream, one = connected(Lines, callback_timeout=SHORT, on_read=on_read)
    for _ in range(3):
        one.send(b"hello\n")
        assert one.recv_until(b"\n") == b"hello\n"
    gevent.sleep(SHORT * 1.5)
    assert recorder == []
    assert stream.connected


def test_callback_timeout_callback_that_calculates_too_long_is_not_interrupted(connected, recorder):
    def on_read(stream, data):
        end = time.monotonic() + SHORT * 1.5
        while time.monotonic() < end:
            pass
        recorder("done")

    stream, one = connected(Connection, callback_timeout=SHORT, on_read=on_read)
    one.send(b"x")
    recorder.wait_for("done")
    turns()
    assert recorder == ["done"]
    assert stream.connected


def test_callback_timeout_callback_that_catches_it_goes_on_and_has_its_time_once_more(connected, recorder):
    def on_read(stream, data):
        for _ in range(2):
            with pytest.raises(CallbackTimeout):
                gevent.sleep(10)
            recorder(time.monotonic())
        stream.write(b"after all")

    stream, one = connected(Connection, callback_timeout=SHORT, on_read=on_read)
    began = time.monotonic()
    one.send(b"x")
    assert one.recv_exactly(9) == b"after all"
    assert in_time(recorder[0] - began, SHORT)
    assert in_time(recorder[1] - recorder[0], SHORT)
    gevent.sleep(SHORT * 1.5)
    assert len(recorder) == 2
    assert stream.connected


@pytest.mark.parametrize("how", ["close", "reset"])
def test_callback_timeout_callback_on_a_closed_stream_is_interrupted_all_the_same(connected, recorder, how):
    def on_read(stream, data):
        if how == "close":
            stream.close()
        else:
            stream.write(bytes(FULL))
        gevent.sleep(10)

    stream, one = connected(Connection, callback_timeout=10, on_read=on_read)
    one.send(b"x")
    until(lambda: stream.closed or unsent(stream))
    stream.callback_timeout = SHORT
    if how == "reset":
        one.reset()
    recorder.wait_for("on_close", timeout=2.0)
    assert recorder.names() == ["on_error", "on_close"]
    assert stream._limits is None


def test_callback_timeout_callbacks_that_come_after_the_close_have_it_too(connected, recorder):
    def on_timeout(stream, which):
        recorder(which)
        gevent.sleep(10)

    stream, _ = connected(
        Connection, "on_error", "on_close", rcvbuf=ROOM, callback_timeout=SHORT, write_timeout=SHORT, on_timeout=on_timeout
    )
    stream.write(bytes(8 * MIB))
    recorder.wait_for("on_close")
    assert recorder.names() == ["write", "on_error", "on_close"]
    assert stream._limits is None


def test_callback_timeout_set_while_a_callback_blocks_holds_for_it(connected, recorder):
    gate = Event()

    def on_read(stream, data):
        recorder("begun")
        gate.wait()

    stream, one = connected(Lines, callback_timeout=10, on_read=on_read)
    one.send(b"x\n")
    recorder.wait_for("begun")
    stream.callback_timeout = SHORT
    assert in_time(took(recorder, "on_close", time.monotonic()), SHORT)


def test_callback_timeout_none_switches_it_off_also_for_the_callback_that_runs(connected, recorder):
    def on_read(stream, data):
        stream.callback_timeout = None
        gevent.sleep(SHORT * 2)
        recorder("done")

    stream, one = connected(Connection, callback_timeout=SHORT * 3, on_read=on_read)
    for _ in range(2):
        one.send(b"x")
        recorder.wait_for("done")
    assert set(recorder) == {"done"}
    assert stream.connected


@pytest.fixture
def one_greenlet():
    """Have the engine keep a single free greenlet."""
    pool = Engine.instance()._pool
    before, pool.limit = pool.limit, 1
    pool.clear()
    yield pool
    pool.limit = before


def test_callback_timeout_spoils_no_greenlet_and_reaches_nobody_else(connected, recorder, one_greenlet):
    greenlets = []

    def on_read(stream, data):
        greenlets.append(id(gevent.getcurrent()))
        gevent.sleep(SHORT * (2 if data == b"long" else 0.1))

    for data in (b"long", b"short", b"long"):
        stream, one = connected(Connection, "on_error", "on_close", callback_timeout=SHORT, on_read=on_read)
        one.send(data)
        until(lambda: greenlets)
        if data == b"short":
            gevent.sleep(SHORT * 0.3)
            stream.close()
        recorder.wait_for("on_close")
        assert ("on_error" in recorder.names()) == (data == b"long")
        recorder.clear()
        stream.server.close()
        turns()
    assert len(one_greenlet) == 1
    gevent.sleep(SHORT)
    assert one_greenlet.take() is not None


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_callback_timeout_after_a_fork_is_the_parents(connected, recorder):
    def on_read(stream, data):
        recorder("begun")
        gevent.sleep(SHORT * 3)

    _, one = connected(Connection, callback_timeout=SHORT, on_read=on_read)
    one.send(b"x")
    recorder.wait_for("begun")

    def child():
        gevent.sleep(SHORT * 2)
        return repr(list(recorder))

    assert in_child(child) == "['begun']"
    recorder.wait_for("on_close")


def test_callback_timeout_own_write_that_ends_with_the_stream_is_no_mistake(connected, recorder, caplog):
    def on_read(stream, data):
        stream.write(bytes(8 * MIB))
        stream.write(b"waits")

    _, one = connected(Connection, rcvbuf=ROOM, callback_timeout=SHORT, on_read=on_read, write_limit=64 * KIB)
    one.send(b"x")
    gevent.sleep(SHORT * 2)
    one.reset()
    recorder.wait_for("on_close")
    assert recorder == [("on_close",)]
    assert warnings_of(caplog) == []


# ---- linger_timeout


def test_linger_timeout_peer_that_never_ends_is_let_go(connected, recorder):
    stream, one = connected(Connection, linger_timeout=SHORT)
    stream.end()
    recorder.wait_for("on_close")
    began = time.monotonic()
    until(lambda: lingering() == 1)
    with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
        while time.monotonic() - began < 2.0:
            one.send(b"still talking")
            gevent.sleep(0.005)
    assert in_time(time.monotonic() - began + 0.02, SHORT)
    assert lingering() == 0


def test_linger_timeout_none_leaves_only_the_limit_of_silence(connected, recorder, monkeypatch):
    monkeypatch.setattr("pants_green._linger.IDLE_LIMIT", SHORT)
    stream, one = connected(Connection, linger_timeout=None)
    stream.end()
    recorder.wait_for("on_close")
    for _ in range(8):
        one.send(b"still talking")
        gevent.sleep(SHORT / 3)
    assert lingering() == 1
    began = time.monotonic()
    until(lambda: not lingering())
    assert time.monotonic() - began < SHORT + LATE


def test_linger_of_a_stream_with_a_read_rate_is_not_held_up_by_it(joined, recorder):
    stream, one = joined(Connection, "on_close", read_rate=10)
    stream.end()
    recorder.wait_for("on_close")
    one.send(bytes(64 * KIB))
    one.shutdown_output()
    began = time.monotonic()
    until(lambda: not lingering())
    assert time.monotonic() - began < LATE


def test_linger_timeout_is_reported_when_it_is_hit(connected, caplog):
    stream, one = connected(Connection, linger_timeout=SHORT)
    stream.end()
    assert one.at_eof()
    until(lambda: warnings_of(caplog))
    (message,) = warnings_of(caplog)
    ending = f"linger_timeout, {SHORT}: the connection of 127.0.0.1:{one.address[1]}, which the peer has not ended, was closed"
    assert message.endswith(ending)


def test_linger_many_peers_take_no_more_than_a_part_of_all_descriptors(server_of, peer, monkeypatch):
    monkeypatch.setattr(_linger, "most_descriptors", lambda: 40)
    server = server_of(type("Brief", (Connection,), {"on_connect": lambda stream: stream.end()}))
    peers = [peer(server) for _ in range(15)]
    assert all(one.at_eof() for one in peers)
    until(lambda: not server._active)
    assert lingering() == 10
    for one in peers[5:]:
        one.send(b"still here")
    for one in peers:
        one.close()
    until(lambda: not lingering())


# ---- Nothing is kept


@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_limits_leave_no_reference_cycles(server_of, peer, tls_peer, recorder, kind):  # noqa: F811
    class Limited(Lines):
        idle_timeout = 10
        read_rate = 10 * MIB
        chunk_rate = 1000
        callback_timeout = 10

        def on_read(self, line):
            self.write(line + b"\n")

    server = server_of(recorder.of(Limited, "on_close"), server_class=tls_server if kind == "tls" else Server)
    make = tls_peer if kind == "tls" else peer
    for collect in (False, True):
        if collect:
            gc.collect()
            gc.disable()
            gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            one = make(server)
            one.send(b"hello\n")
            assert one.recv_until(b"\n") == b"hello\n"
            one.shutdown_output()
            recorder.wait_for("on_close")
            one.close()
            recorder.clear()
            turns()
            if collect:
                gc.collect()
                ours = [found for found in gc.garbage if type(found).__module__.startswith("pants_green")]
                assert ours == []
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()


def test_closed_stream_refuses_to_write_whatever_limits_it_had(connected, recorder):
    stream, _ = connected(Connection, idle_timeout=10, read_rate=10, chunk_rate=10, callback_timeout=10)
    stream.close()
    recorder.wait_for("on_close")
    with pytest.raises(ChannelClosed):
        stream.write(b"x")
    for name in ("idle_timeout", "read_rate", "chunk_rate", "callback_timeout", "linger_timeout"):
        setattr(stream, name, 5)
        setattr(stream, name, None)
    turns()
    assert stream._limits is None
