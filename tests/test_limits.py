"""Time limits over real sockets: write_timeout, for a peer that takes nothing, and read_timeout, for a chunk that does not come whole."""

import logging
import re
import socket as stdlib_socket
import struct
import time
from itertools import pairwise

import gevent
import pytest
from gevent import monkey
from gevent.event import Event
from peers import in_thread
from waiting import nothing_is_kept, turns, unread, unsent, until  # noqa: F401

from pants_green import ChannelClosed, CloseReason, Connection, Engine
from pants_green.errors import WriteTimeout
from pants_green.framing import Netstring

#: For real threads, also in a patched process.
sleep_in_thread = monkey.get_original("time", "sleep")

KIB = 1024
MIB = 1024 * 1024

#: More than the little room in both kernels.
FULL = 1 * MIB
ROOM = 32 * KIB

#: The time limit of most tests, in seconds, and that of those in which something has to come within it.
SHORT = 0.1
AMPLE = 0.2


def only(server):
    """Return the stream of a server once there is one."""
    until(lambda: len(server.channels) == 1)
    return server.channels.values()[0]


class Narrow(Connection):
    """With little room in the kernel, and a short time limit of writing."""

    write_timeout = SHORT

    def on_connect(self):
        self.socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_SNDBUF, ROOM)


class Lines(Connection):
    """Lines, each to be whole in a short time."""

    read_delimiter = b"\n"
    read_timeout = SHORT


@pytest.fixture
def connected(server_of, peer, recorder):
    """Return a function that makes a stream of a class, recorded, and its peer."""

    def make(base, *names, **attributes):
        names = names or ("on_read", "on_timeout", "on_error", "on_end", "on_close")
        server = server_of(recorder.of(base, *names, **attributes))
        one = peer(server, rcvbuf=ROOM if issubclass(base, Narrow) else None)
        return only(server), one

    return make


def warnings_of(caplog):
    """Return the messages of all records above INFO; the rest does not matter here."""
    return [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]


def seconds_until(recorder, event, timeout=5.0):
    """Wait for an event and return how long that took."""
    began = time.monotonic()
    recorder.wait_for(event, timeout)
    return time.monotonic() - began


# ---- write_timeout


def test_write_timeout_peer_that_takes_nothing_closes_with_one_warning(connected, recorder, caplog):
    stream, _one = connected(Narrow)
    stream.write(bytes(FULL))
    took = seconds_until(recorder, "on_close")
    assert SHORT * 0.9 < took < SHORT + 1
    assert recorder == [("on_timeout", "write"), ("on_close",)]
    assert stream.close_reason is CloseReason.TIMED_OUT
    assert isinstance(stream.close_error, WriteTimeout)
    (message,) = warnings_of(caplog)
    assert "write_timeout" in message
    assert f"{SHORT:g} seconds" in message
    waited = int(re.search(r"(\d+) bytes", message)[1])
    assert FULL - 4 * ROOM < waited < FULL
    assert "neither side" not in message
    assert stream.server.channels.values() == []


def test_write_timeout_override_is_told_in_its_own_greenlet_of_a_closed_stream(connected, recorder, caplog):
    def on_timeout(stream, which):
        recorder(which, stream.closed, stream.close_reason, gevent.getcurrent() is stream._greenlet, stream.remote_address)
        with pytest.raises(ChannelClosed):
            stream.write(b"no")

    stream, one = connected(Narrow, "on_error", "on_close", on_timeout=on_timeout)
    stream.write(bytes(FULL))
    recorder.wait_for("on_close")
    assert recorder == [("write", True, CloseReason.TIMED_OUT, True, one.address), ("on_close",)]
    assert warnings_of(caplog) == []


def test_write_timeout_does_not_run_while_nothing_is_pending(connected, recorder):
    stream, one = connected(Narrow, write_timeout=0.05)
    stream.write(bytes(FULL))
    assert len(one.recv_exactly(FULL)) == FULL
    # Time must pass here: that nothing happens in it is what is tested.
    gevent.sleep(0.2)
    assert recorder == []
    stream.write(b"fine")
    assert one.recv_exactly(4) == b"fine"


def test_write_timeout_of_the_next_stall_is_not_that_of_the_one_before(connected, recorder):
    stream, one = connected(Narrow, write_timeout=0.3)
    stream.write(bytes(FULL))
    gevent.sleep(0.2)
    one.recv_exactly(FULL)
    stream.write(bytes(FULL))
    # Longer than what the first limit had left.
    gevent.sleep(0.2)
    assert recorder == []
    assert stream.connected
    recorder.wait_for("on_close")


@pytest.mark.parametrize(("rcvbuf", "limit", "turns_"), [(ROOM, AMPLE, 10), (128 * KIB, AMPLE, 10), (None, 0.5, 15)], ids=str)
def test_write_timeout_never_cuts_a_slow_but_steady_reader(server_of, peer, recorder, rcvbuf, limit, turns_):
    # The kernel says that it has room again when a third of its buffer is free, more than a MiB here: that must not count as nothing.
    # (With its default buffer the peer's own kernel tells of what was read in steps of a third of a MiB.)
    server = server_of(recorder.of(Connection, "on_timeout", "on_close"), write_timeout=limit)
    one = peer(server, rcvbuf=rcvbuf)
    stream = only(server)
    stream.write(bytes(16 * MIB))

    def read_slowly():
        for _ in range(turns_):
            if not one.socket.recv(64 * KIB):
                return
            sleep_in_thread(0.05)

    in_thread(read_slowly)
    assert recorder == []
    assert unsent(stream) > FULL


def test_write_timeout_runs_while_draining_after_end(connected, recorder, caplog):
    stream, _one = connected(Narrow)
    stream.write(bytes(FULL))
    stream.end()
    recorder.wait_for("on_close")
    assert recorder == [("on_timeout", "write"), ("on_close",)]
    assert stream.close_reason is CloseReason.TIMED_OUT
    assert len(warnings_of(caplog)) == 1


def test_write_timeout_runs_while_draining_after_the_peers_fin(connected, recorder):
    stream, one = connected(Narrow, "on_end", "on_timeout", "on_close")
    stream.write(bytes(FULL))
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert recorder == [("on_end", b""), ("on_timeout", "write"), ("on_close",)]
    assert stream.close_reason is CloseReason.TIMED_OUT


@pytest.mark.parametrize("reads", [False, True])
def test_write_timeout_runs_after_write_eof(connected, recorder, reads):
    stream, one = connected(Narrow)
    stream.write(bytes(FULL))
    stream.write_eof()
    one.send(b"still read")
    recorder.wait_for("on_read")
    if reads:
        assert len(one.recv_all()) == FULL
        gevent.sleep(SHORT * 1.5)
        assert recorder == [("on_read", b"still read")]
        assert stream.connected
    else:
        recorder.wait_for("on_close")
        assert recorder == [("on_read", b"still read"), ("on_timeout", "write"), ("on_close",)]
        assert stream.close_reason is CloseReason.TIMED_OUT


def test_write_timeout_runs_while_paused(connected, recorder):
    stream, _ = connected(Narrow)
    stream.pause()
    stream.write(bytes(FULL))
    recorder.wait_for("on_close")
    assert recorder == [("on_timeout", "write"), ("on_close",)]


def test_write_timeout_says_so_if_neither_side_is_reading(connected, recorder, caplog):
    stream, one = connected(Narrow, on_read=lambda stream, data: stream.write(bytes(FULL)))
    one.send(b"x")
    recorder.wait_for("on_close")
    assert recorder == [("on_read", b"x"), ("on_timeout", "write"), ("on_close",)]
    (message,) = warnings_of(caplog)
    assert "neither side is reading" in message
    assert "neither side is reading" in str(stream.close_error)


@pytest.mark.parametrize("call", ["write", "drain", "read"])
def test_write_timeout_own_callback_that_waits_gets_channel_closed_and_that_is_no_error(connected, recorder, caplog, call):
    def on_read(stream, data):
        stream.write(bytes(FULL))
        if call == "write":
            stream.write(b"waits")
        elif call == "drain":
            stream.drain()
        else:
            stream.read()

    stream, one = connected(Narrow, on_read=on_read, write_limit=64 * KIB, high_water=32 * KIB)
    one.send(b"x")
    recorder.wait_for("on_close")
    assert recorder == [("on_read", b"x"), ("on_timeout", "write"), ("on_close",)]
    assert stream.close_reason is CloseReason.TIMED_OUT
    (message,) = warnings_of(caplog)
    assert ("neither side is reading" in message) == (call != "read")


def test_write_timeout_while_a_plain_greenlet_waits_gives_it_channel_closed(connected, recorder, caplog):
    stream, _ = connected(Narrow, write_limit=64 * KIB)
    stream.write(bytes(FULL))
    with pytest.raises(ChannelClosed, match="a time limit was hit"):
        stream.write(b"waits")
    recorder.wait_for("on_close")
    assert recorder == [("on_timeout", "write"), ("on_close",)]
    (message,) = warnings_of(caplog)
    assert "neither side" not in message


def test_write_timeout_while_the_own_callback_blocks_elsewhere_waits_for_it(connected, recorder):
    gate = Event()

    def on_read(stream, data):
        stream.write(bytes(FULL))
        gate.wait()
        recorder("back", stream.closed)

    stream, one = connected(Narrow, "on_timeout", "on_close", on_read=on_read)
    one.send(b"x")
    until(lambda: stream.closed)
    turns()
    assert recorder == []
    gate.set()
    recorder.wait_for("on_close")
    assert recorder == [("back", True), ("on_timeout", "write"), ("on_close",)]


def test_write_timeout_none_switches_it_off(connected, recorder):
    stream, _one = connected(Narrow, write_timeout=None)
    stream.write(bytes(FULL))
    gevent.sleep(SHORT * 1.5)
    assert recorder == []
    assert stream.connected


def test_write_timeout_set_to_none_while_it_runs_switches_it_off(connected, recorder, capfd):
    stream, one = connected(Narrow, write_timeout=AMPLE)
    stream.write(bytes(FULL))
    gevent.sleep(AMPLE / 2)
    stream.write_timeout = None
    gevent.sleep(AMPLE * 1.5)
    assert recorder == []
    assert stream.connected
    assert "Traceback" not in capfd.readouterr().err
    assert one.recv_exactly(FULL) == bytes(FULL)


def test_write_timeout_lengthened_while_it_runs_holds(connected, recorder):
    stream, _one = connected(Narrow, write_timeout=AMPLE)
    stream.write(bytes(FULL))
    gevent.sleep(AMPLE / 2)
    stream.write_timeout = 30
    gevent.sleep(AMPLE * 1.5)
    assert recorder == []
    assert stream.connected


def test_write_timeout_set_on_the_instance_before_it_is_needed(connected, recorder):
    stream, _one = connected(Narrow, write_timeout=30)
    stream.write_timeout = 0.05
    stream.write(bytes(FULL))
    assert seconds_until(recorder, "on_close") < 2
    assert "0.05 seconds" in str(stream.close_error)


def test_write_timeout_close_and_abort_leave_no_timer_behind(connected, recorder):
    timers = len(Engine.instance()._scheduler)
    for how in ("close", "abort", "reset"):
        stream, one = connected(Narrow, "on_timeout", "on_close", write_timeout=30)
        stream.write(bytes(FULL))
        until(lambda: unsent(stream) < FULL)  # noqa: B023
        getattr(one if how == "reset" else stream, how)()
        until(lambda: stream.closed)  # noqa: B023
        until(lambda: len(stream.server.channels) == 0)  # noqa: B023
        stream.server.close()
        assert len(Engine.instance()._scheduler) == timers


# ---- read_timeout


def test_read_timeout_chunk_that_does_not_come_whole_closes_with_one_warning(connected, recorder, caplog):
    stream, one = connected(Lines)
    one.send(b"whole\nhalf")
    took = seconds_until(recorder, "on_close")
    assert SHORT * 0.9 < took < SHORT + 1
    assert recorder == [("on_read", b"whole"), ("on_timeout", "read"), ("on_close",)]
    assert stream.close_reason is CloseReason.TIMED_OUT
    (message,) = warnings_of(caplog)
    assert "read_timeout" in message
    assert f"{SHORT:g} seconds" in message
    assert "4 bytes" in message


@pytest.mark.parametrize(
    ("delimiter", "half"),
    [
        (b"\r\n", b"half\r"),
        ("\n", b"half"),
        (5, b"1234"),
        (re.compile(b"\n"), b"half"),
        (struct.Struct("!I"), b"123"),
        (Netstring(), b"5:1234"),
    ],
    ids=str,
)
def test_read_timeout_of_every_kind_of_delimiter(connected, recorder, delimiter, half):
    _stream, one = connected(Lines, "on_timeout", "on_close", read_delimiter=delimiter)
    one.send(half)
    recorder.wait_for("on_close")
    assert recorder == [("on_timeout", "read"), ("on_close",)]


def test_read_timeout_stream_is_open_in_the_callback_and_may_answer(connected, recorder):
    def on_timeout(stream, which):
        assert stream.connected
        stream.write(b"408 too slow\n")
        stream.end()

    stream, one = connected(Lines, on_timeout=on_timeout)
    one.send(b"half")
    assert one.recv_all() == b"408 too slow\n"
    recorder.wait_for("on_close")
    assert recorder == [("on_timeout", "read"), ("on_close",)]
    assert stream.close_reason is CloseReason.ENDED_HERE


def test_read_timeout_override_that_does_not_close_starts_the_limit_anew(connected, recorder):
    times = []
    _stream, one = connected(Lines, on_timeout=lambda stream, which: times.append(time.monotonic()))
    one.send(b"half")
    recorder.wait_for(3)
    assert all(SHORT * 0.9 < later - earlier < SHORT + 0.5 for earlier, later in pairwise(times))
    one.send(b" and half\n")
    recorder.wait_for(("on_read", b"half and half"))
    count = len(recorder)
    gevent.sleep(SHORT * 1.5)
    assert len(recorder) == count


def test_read_timeout_one_byte_at_a_time_does_not_extend_it(connected, recorder):
    stream, one = connected(Lines)
    began = time.monotonic()
    while stream.connected and time.monotonic() - began < 2:
        try:
            one.send(b"x")
        except OSError:
            break
        gevent.sleep(SHORT / 10)
    recorder.wait_for("on_close")
    assert recorder == [("on_timeout", "read"), ("on_close",)]
    assert time.monotonic() - began < SHORT + 1


@pytest.mark.parametrize("delimiter", [b"\n", Netstring()], ids=["bytes", "framer"])
@pytest.mark.parametrize("what", ["on_write", "write", "settings"])
def test_read_timeout_is_not_extended_by_what_else_happens(connected, recorder, what, delimiter):
    names = ("on_timeout", "on_close", *(["on_write"] if what == "on_write" else []))
    stream, one = connected(Lines, *names, read_delimiter=delimiter)
    one.send(b"9")
    until(lambda: unread(stream) == 1)
    began = time.monotonic()
    while stream.connected and time.monotonic() - began < 1.3:
        if what == "settings":
            stream.buffer_size = 1000
        else:
            stream.write(b"a broadcast\n")
        gevent.sleep(SHORT / 10)
    assert time.monotonic() - began < SHORT + 1
    recorder.wait_for("on_close")
    assert ("on_timeout", "read") in recorder


def test_read_timeout_idle_between_chunks_does_not_count(connected, recorder):
    _stream, one = connected(Lines)
    gevent.sleep(SHORT * 1.5)
    one.send(b"a\n")
    gevent.sleep(SHORT * 1.5)
    one.send(b"b\n")
    recorder.wait_for(2)
    assert recorder == [("on_read", b"a"), ("on_read", b"b")]


def test_read_timeout_every_chunk_has_a_limit_of_its_own(connected, recorder):
    # Never idle, always with a chunk begun, and each whole in half the time.
    _stream, one = connected(Lines, read_timeout=AMPLE)
    one.send(b"0")
    for _ in range(4):
        gevent.sleep(AMPLE / 2)
        one.send(b"1\n0")
    recorder.wait_for(4)
    assert [name for name in recorder.names() if name != "on_read"] == []
    recorder.wait_for("on_close")
    assert recorder.names()[4:] == ["on_timeout", "on_close"]


def test_read_timeout_next_chunk_does_not_inherit_what_the_last_had_left(connected, recorder):
    _stream, one = connected(Lines, read_timeout=0.3)
    one.send(b"a")
    gevent.sleep(0.2)
    one.send(b"\n")
    recorder.wait_for(1)
    one.send(b"b")
    gevent.sleep(0.2)
    one.send(b"\n")
    recorder.wait_for(2)
    assert recorder == [("on_read", b"a"), ("on_read", b"b")]


def test_read_timeout_does_not_run_while_paused_and_has_its_full_time_afterwards(connected, recorder):
    stream, one = connected(Lines, read_timeout=AMPLE)
    one.send(b"ha")
    until(lambda: unread(stream) == 2)
    stream.pause()
    gevent.sleep(AMPLE * 1.5)
    assert recorder == []
    stream.resume()
    gevent.sleep(AMPLE / 2)
    one.send(b"lf\n")
    recorder.wait_for(1)
    assert recorder == [("on_read", b"half")]
    one.send(b"x")
    recorder.wait_for("on_close")


def test_read_timeout_paused_across_its_end_by_a_whole_chunk_in_the_kernel_is_no_timeout(connected, recorder):
    stream, one = connected(Lines, read_timeout=0.1)
    one.send(b"ha")
    until(lambda: unread(stream) == 2)
    stream.pause()
    one.send(b"lf\n")
    gevent.sleep(0.25)
    stream.resume()
    recorder.wait_for(1)
    assert recorder == [("on_read", b"half")]


def test_read_timeout_while_on_read_blocks_does_not_count(connected, recorder):
    _stream, one = connected(Lines, read_timeout=0.1, on_read=lambda stream, line: gevent.sleep(0.25) if line == b"a" else None)
    one.send(b"a\nb")
    recorder.wait_for(1)
    one.send(b"c\n")
    recorder.wait_for(2)
    assert recorder == [("on_read", b"a"), ("on_read", b"bc")]


def test_read_timeout_while_it_waits_for_room_does_not_count(connected, recorder):
    class Both(Narrow):
        read_delimiter = b"\n"
        read_timeout = 0.1
        write_timeout = 30

    stream, one = connected(Both, on_read=lambda stream, line: stream.write(bytes(FULL)))
    one.send(b"a\nb")
    until(lambda: stream._own_mark >= 0)
    gevent.sleep(0.25)
    assert recorder == [("on_read", b"a")]
    one.send(b"c\n")
    assert len(one.recv_exactly(2 * FULL)) == 2 * FULL
    assert recorder == [("on_read", b"a"), ("on_read", b"bc")]


def test_read_timeout_does_not_count_in_a_read_of_the_users(connected, recorder):
    def on_read(stream, line):
        recorder("got", line, stream.read())

    stream, one = connected(Lines, "on_timeout", "on_close", read_timeout=0.1, on_read=on_read)
    # The limit of the first chunk runs when read() begins, and a chunk is begun all the time that read() waits.
    one.send(b"a")
    until(lambda: unread(stream) == 1)
    one.send(b"\nb")
    gevent.sleep(0.25)
    one.send(b"\n")
    recorder.wait_for(1)
    turns()
    assert recorder == [("got", b"a", b"b")]
    assert stream.connected


def test_read_timeout_after_a_read_of_the_users_counts_again(connected, recorder):
    _stream, one = connected(Lines, "on_timeout", "on_close", on_read=lambda stream, line: recorder("got", line, stream.read()))
    one.send(b"a\nb\nc")
    recorder.wait_for("on_close")
    assert recorder == [("got", b"a", b"b"), ("on_timeout", "read"), ("on_close",)]


def test_read_timeout_without_a_delimiter_never_runs(connected, recorder):
    _stream, one = connected(Connection, read_timeout=0.05)
    one.send(b"half")
    gevent.sleep(0.15)
    assert recorder == [("on_read", b"half")]


def test_read_timeout_delimiter_set_to_none_ends_it(connected, recorder):
    stream, one = connected(Lines, read_timeout=0.1)
    one.send(b"half")
    until(lambda: unread(stream) == 4)
    stream.read_delimiter = None
    gevent.sleep(0.2)
    assert recorder == [("on_read", b"half")]


def test_read_timeout_none_switches_it_off_also_while_it_runs(connected, recorder, capfd):
    stream, one = connected(Lines)
    one.send(b"half")
    until(lambda: unread(stream) == 4)
    stream.read_timeout = None
    gevent.sleep(SHORT * 1.5)
    assert recorder == []
    assert "Traceback" not in capfd.readouterr().err


def test_read_timeout_set_while_connected_holds_for_the_next_chunk(connected, recorder):
    stream, one = connected(Lines, read_timeout=None)
    one.send(b"a")
    until(lambda: unread(stream) == 1)
    stream.read_timeout = 0.1
    one.send(b"\nb")
    recorder.wait_for("on_close")
    assert recorder == [("on_read", b"a"), ("on_timeout", "read"), ("on_close",)]


def test_read_timeout_set_while_a_chunk_has_begun_holds_for_it(connected, recorder):
    stream, one = connected(Lines, read_timeout=None)
    one.send(b"a")
    until(lambda: unread(stream) == 1)
    stream.read_timeout = 0.1
    recorder.wait_for("on_close", timeout=1)
    assert recorder == [("on_timeout", "read"), ("on_close",)]


def test_read_timeout_set_by_on_timeout_itself_is_taken(connected, recorder):
    def on_timeout(stream, which):
        stream.read_timeout = None

    _stream, one = connected(Lines, read_timeout=0.05, on_timeout=on_timeout)
    one.send(b"a")
    recorder.wait_for(1)
    gevent.sleep(0.2)
    assert recorder == [("on_timeout", "read")]
    one.send(b"\n")
    recorder.wait_for(2)


def test_read_timeout_runs_after_write_eof_and_not_after_end(connected, recorder):
    stream, one = connected(Lines)
    stream.write_eof()
    one.send(b"half")
    recorder.wait_for("on_close")
    assert recorder == [("on_timeout", "read"), ("on_close",)]
    recorder.clear()

    class Slow(Narrow):
        read_delimiter = b"\n"
        read_timeout = 0.1
        write_timeout = 30

    stream, one = connected(Slow)
    one.send(b"half")
    until(lambda: unread(stream) == 4)
    stream.write(bytes(FULL))
    stream.end()
    gevent.sleep(0.2)
    assert recorder == []
    assert len(one.recv_all()) == FULL
    recorder.wait_for("on_close")
    assert recorder == [("on_close",)]


def test_read_timeout_peers_fin_in_mid_chunk_is_its_end_and_no_timeout(connected, recorder):
    stream, one = connected(Lines)
    one.send(b"half")
    until(lambda: unread(stream) == 4)
    one.shutdown_output()
    recorder.wait_for("on_close")
    gevent.sleep(SHORT * 1.5)
    assert recorder == [("on_end", b"half"), ("on_close",)]


def test_read_timeout_half_open_no_timeout_after_the_peers_fin(connected, recorder):
    stream, one = connected(Lines, allow_half_open=True)
    one.send(b"half")
    until(lambda: unread(stream) == 4)
    one.shutdown_output()
    recorder.wait_for("on_end")
    gevent.sleep(SHORT * 1.5)
    assert recorder == [("on_end", b"half")]
    stream.close()
    recorder.wait_for("on_close")


def test_both_limits_run_at_once_and_each_hits_by_itself(connected, recorder):
    class Both(Narrow):
        read_delimiter = b"\n"
        read_timeout = 0.1
        write_timeout = 0.25

    def on_timeout(stream, which):
        recorder(which)

    stream, one = connected(Both, "on_close", on_timeout=on_timeout)
    one.send(b"half")
    stream.write(bytes(FULL))
    recorder.wait_for("on_close")
    assert recorder == ["read", "read", "write", ("on_close",)]


def test_timeout_override_that_raises_closes(connected, recorder):
    def on_timeout(stream, which):
        raise RuntimeError(which)

    stream, one = connected(Lines, on_timeout=on_timeout)
    one.send(b"half")
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_timeout", "on_error", "on_close"]
    assert stream.close_reason is CloseReason.CALLBACK_ERROR
