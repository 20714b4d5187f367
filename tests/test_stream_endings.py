"""How streams end: every way, from everywhere, in order; and what exceptions cost."""

import gc
import logging

import gevent
import pytest
from gevent.event import Event
from gevent.local import local
from peers import in_thread
from waiting import lingering, nothing_is_kept, turns, unsent, until  # noqa: F401

from pants_green import ChannelClosed, Client, CloseReason, Connection, Engine, Stream
from pants_green._pool import Worker
from pants_green.testing import memory_pair

KIB = 1024
MIB = 1024 * 1024

#: More than the buffers of both kernels hold.
BIG = 16 * MIB

EVERY_CALLBACK = ("on_connect", "on_read", "on_write", "on_end", "on_close")

#: What a user can do to end a stream, and the reason that it then has.
ENDERS = {"close": CloseReason.CLOSED_HERE, "end": CloseReason.ENDED_HERE, "abort": CloseReason.ABORTED_HERE}


def only(server):
    """Return the stream of a server once there is one."""
    until(lambda: len(server.channels) == 1)
    return server.channels.values()[0]


def assert_a_life(names):
    """Fail unless these are the callbacks of one whole life: each of on_connect, on_end, on_close once, and in their places."""
    assert names[0] == "on_connect"
    assert names[-1] == "on_close"
    for once in ("on_connect", "on_end", "on_close"):
        assert names.count(once) <= 1
    if "on_end" in names:
        assert "on_read" not in names[names.index("on_end") :]


class Held(Connection):
    """Echoes lines; its on_connect begins when the test says ``go``, so that the peer's connect() is over."""

    read_delimiter = b"\n"
    go = None

    def on_connect(self):
        if self.go is not None:
            self.go.wait()

    def on_read(self, line):
        self.write(line + b"\n")


def doing(name, action, at="every"):
    """Return a callback that does as that of Held and then performs `action` on the stream."""

    def callback(stream, *args):
        getattr(Held, name)(stream, *args)
        action(stream)

    return callback


# ---- The peer ends it


@pytest.mark.parametrize(
    ("leave", "reason", "ends"),
    [("close", CloseReason.PEER_ENDED, 1), ("shutdown_output", CloseReason.PEER_ENDED, 1), ("reset", CloseReason.PEER_LEFT, 0)],
)
def test_peer_leaves_while_the_stream_waits_for_input(server_of, peer, recorder, leave, reason, ends):
    server = server_of(recorder.of(Held))
    one = peer(server)
    stream = only(server)
    one.send(b"a\nb\n")
    assert one.recv_exactly(4) == b"a\nb\n"
    getattr(one, leave)()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_read", *["on_end"] * ends, "on_close"]
    assert stream.close_reason is reason
    assert stream.closed
    assert not stream.connected
    assert server.channels.values() == []


@pytest.mark.parametrize(("leave", "reason"), [("close", CloseReason.PEER_ENDED), ("reset", CloseReason.PEER_LEFT)])
def test_peer_leaves_while_a_callback_blocks(server_of, peer, recorder, leave, reason):
    gate = Event()
    server = server_of(recorder.of(Stream, on_read=lambda stream, data: gate.wait()))
    one = peer(server)
    stream = only(server)
    one.send(b"x")
    recorder.wait_for("on_read")
    getattr(one, leave)()
    turns()
    assert recorder.names() == ["on_connect", "on_read"]
    gate.set()
    recorder.wait_for("on_close")
    assert_a_life(recorder.names())
    assert stream.close_reason is reason


@pytest.mark.parametrize("leave", ["close", "reset"])
def test_peer_leaves_without_reading_what_waits_for_room(server_of, peer, recorder, leave):
    server = server_of(recorder.of(Stream, on_read=lambda stream, data: stream.write(bytes(BIG))))
    one = peer(server, rcvbuf=4096)
    stream = only(server)
    one.send(b"x")
    until(lambda: 0 < unsent(stream) < BIG)
    getattr(one, leave)()
    recorder.wait_for("on_close")
    assert_a_life(recorder.names())
    assert stream.close_reason in (CloseReason.PEER_LEFT, CloseReason.PEER_ENDED)
    assert unsent(stream) == 0


def test_how_peers_leave_is_debug_and_no_error_callback(server_of, peer, recorder, caplog):
    caplog.set_level(logging.DEBUG, "pants_green")
    server = server_of(recorder.of(Stream))
    one = peer(server)
    stream = only(server)
    one.reset()
    recorder.wait_for("on_close")
    assert {record.levelno for record in caplog.records if record.name == "pants_green.stream"} == {logging.DEBUG}
    assert isinstance(stream.close_error, ConnectionResetError)


def test_on_read_error_is_told_of_a_reset_if_it_is_overridden(server_of, peer, recorder):
    server = server_of(recorder.of(Stream, on_read_error=lambda stream, error: recorder("on_read_error", type(error), stream.closed)))
    one = peer(server)
    only(server)
    one.reset()
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("on_read_error", ConnectionResetError, True), ("on_close",)]


def test_on_write_error_is_told_of_a_peer_that_is_gone_if_it_is_overridden(server_of, peer, recorder):
    gate = Event()

    class Talker(Connection):
        def on_connect(self):
            gate.wait()
            for _ in range(3):
                if self.connected:
                    self.write(b"x", flush=True)
                    gevent.sleep(0.01)

        def on_write_error(self, error):
            recorder("on_write_error", type(error) in (BrokenPipeError, ConnectionResetError), self.closed)

        def on_close(self):
            recorder("on_close")

    one = peer(server_of(Talker))
    one.close()
    gate.set()
    recorder.wait_for("on_close")
    assert recorder == [("on_write_error", True, True), "on_close"]


def test_write_after_the_peer_has_left_is_debug_and_no_error(server_of, peer, recorder, caplog):
    gate = Event()

    def answer(stream, data):
        gate.wait()
        for _ in range(20):
            gevent.sleep(0.005)
            stream.write(b"too late")

    server = server_of(recorder.of(Stream, on_read=answer))
    one = peer(server)
    one.send(b"x")
    recorder.wait_for("on_read")
    one.reset()
    gate.set()
    recorder.wait_for("on_close")
    assert "on_error" not in recorder.names()
    assert caplog.records == []


def test_s3_20_addresses_are_known_in_on_close_after_a_reset(server_of, peer, recorder):
    class Goodbye(Connection):
        def on_close(self):
            recorder(self.remote_address, self.local_address, self.socket, self.fileno)

    server = server_of(Goodbye)
    one = peer(server)
    address = one.address
    only(server)
    one.reset()
    recorder.wait_for(1)
    assert recorder == [(address, server.local_address, None, None)]


# ---- From inside a callback

INSIDE = {
    "on_connect": ["on_connect", "on_close"],
    "on_read": ["on_connect", "on_read", "on_close"],
    "on_write": ["on_connect", "on_read", "on_read", "on_write", "on_close"],
    "on_end": ["on_connect", "on_read", "on_read", "on_write", "on_end", "on_close"],
}


@pytest.mark.parametrize("call", ENDERS)
@pytest.mark.parametrize("callback", INSIDE)
def test_ended_in_a_callback_nothing_comes_but_on_close(server_of, peer, recorder, call, callback):
    go = Event()

    def end_it(stream):
        getattr(stream, call)()
        recorder("connected", stream.connected, list(server.channels.values()))

    kind = recorder.of(Held, *EVERY_CALLBACK, go=go, **{callback: doing(callback, end_it)})
    server = server_of(kind)
    one = peer(server)
    stream = only(server)
    one.send(b"a\nb\n")
    go.set()
    if callback == "on_end":
        assert one.recv_exactly(4) == b"a\nb\n"
        one.shutdown_output()
    recorder.wait_for("on_close")
    turns()
    assert ("connected", False, []) in recorder
    recorder.remove(("connected", False, []))
    wanted = INSIDE[callback]
    if (callback, call) == ("on_read", "end"):
        # What was written before is still sent, and that is told.
        wanted = ["on_connect", "on_read", "on_write", "on_close"]
    assert recorder.names() == wanted
    if callback != "on_end":
        assert stream.close_reason is ENDERS[call]
    assert stream.closed


@pytest.mark.parametrize("callback", INSIDE)
def test_write_eof_in_a_callback_reading_goes_on(server_of, peer, recorder, callback):
    go = Event()

    def end_it(stream):
        if stream._state.writable:
            stream.write_eof()

    class Quiet(Held):
        def on_read(self, line):
            if self._state.writable:
                self.write(line + b"\n")

    def callback_of(name):
        def run(stream, *args):
            getattr(Quiet, name)(stream, *args)
            end_it(stream)

        return run

    server = server_of(recorder.of(Quiet, "on_connect", "on_read", "on_end", "on_close", go=go, **{callback: callback_of(callback)}))
    one = peer(server)
    one.send(b"a\n")
    go.set()
    if callback == "on_end":
        one.shutdown_output()
    assert one.recv_all() == (b"" if callback == "on_connect" else b"a\n")
    if callback != "on_end":
        one.send(b"b\n")
        recorder.wait_for(("on_read", b"b"))
        assert only(server).connected
        one.shutdown_output()
    recorder.wait_for("on_close")
    assert_a_life(recorder.names())
    assert recorder[-2:] == [("on_end", b""), ("on_close",)]


@pytest.mark.parametrize("call", ENDERS)
def test_e1_8_ending_in_on_close_does_nothing_and_does_not_recurse(server_of, peer, recorder, call):
    def again(stream):
        getattr(stream, call)()
        getattr(stream, call)()

    server = server_of(recorder.of(Stream, on_close=again))
    one = peer(server)
    stream = only(server)
    one.close()
    recorder.wait_for("on_close")
    turns()
    assert recorder.names() == ["on_connect", "on_end", "on_close"]
    assert stream.close_reason is CloseReason.PEER_ENDED


def test_s4_9_on_close_comes_after_the_callback_that_closed(server_of, peer, recorder):
    def close_and_go_on(stream, data):
        stream.close()
        gevent.sleep(0.01)
        recorder("still in on_read")

    peer(server_of(recorder.of(Stream, on_read=close_and_go_on))).send(b"x")
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "still in on_read", "on_close"]


def test_closing_in_mid_batch_drops_the_remaining_chunks(server_of, peer, recorder):
    def until_quit(stream, line):
        if line == b"quit":
            stream.close()

    peer(server_of(recorder.of(Stream, read_delimiter=b"\n", on_read=until_quit))).send(b"1\nquit\n2\n3\n4")
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("on_read", b"1"), ("on_read", b"quit"), ("on_close",)]


# ---- From another greenlet


def waiting_for_input(server, one, gate):
    one.send(b"a\n")
    assert one.recv_exactly(2) == b"a\n"


def blocked_in_a_callback(server, one, gate):
    only(server).gate = gate
    one.send(b"a\n")
    until(lambda: only(server).blocked)


def waiting_for_room(server, one, gate):
    one.send(b"big\n")
    stream = only(server)
    until(lambda: unsent(stream) > stream.high_water)
    # It is not read any more.
    one.send(b"more\n")
    turns()


class Busy(Connection):
    """Echoes lines; blocks in on_read at its ``gate``; answers "big" with more than a peer takes that does not read."""

    read_delimiter = b"\n"
    high_water = 64 * KIB
    low_water = 1 * KIB
    gate = None
    blocked = False

    def on_read(self, line):
        if line == b"big":
            self.write(bytes(BIG), flush=True)
        else:
            self.write(line + b"\n")
        if self.gate is not None:
            self.blocked = True
            self.gate.wait()
            self.blocked = False


SITUATIONS = [waiting_for_input, blocked_in_a_callback, waiting_for_room]


@pytest.mark.parametrize("call", ENDERS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_ended_from_another_greenlet(server_of, peer, recorder, situation, call):
    gate = Event()
    server = server_of(recorder.of(Busy))
    one = peer(server, rcvbuf=4096)
    stream = only(server)
    situation(server, one, gate)
    getattr(stream, call)()
    assert not stream.connected
    assert server.channels.values() == []
    assert "on_close" not in recorder.names()  # never inside the call
    if situation is blocked_in_a_callback:
        turns()
        assert "on_close" not in recorder.names()
        gate.set()
    if situation is waiting_for_room and call == "end":
        assert one.recv_all() == bytes(BIG)
    recorder.wait_for("on_close")
    turns()
    assert recorder.names() == ["on_connect", "on_read", "on_close"]
    assert stream.close_reason is ENDERS[call]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_write_eof_from_another_greenlet(server_of, peer, recorder, situation):
    gate = Event()
    server = server_of(recorder.of(Busy, "on_connect", "on_end", "on_close"))
    one = peer(server, rcvbuf=4096)
    stream = only(server)
    situation(server, one, gate)
    stream.write_eof()
    with pytest.raises(ChannelClosed, match="write_eof"):
        stream.write(b"late")
    gate.set()
    wanted = {waiting_for_input: b"", blocked_in_a_callback: b"a\n", waiting_for_room: bytes(BIG)}
    assert one.recv_all() == wanted[situation]
    if situation is not waiting_for_room:
        assert stream.connected
    one.close()
    recorder.wait_for("on_close")
    assert_a_life(recorder.names())


@pytest.mark.parametrize("situation", SITUATIONS)
def test_killed_from_another_greenlet_by_its_peer(server_of, peer, recorder, situation):
    gate = Event()
    server = server_of(recorder.of(Busy))
    one = peer(server, rcvbuf=4096)
    situation(server, one, gate)
    one.reset()
    gate.set()
    recorder.wait_for("on_close")
    assert_a_life(recorder.names())


def test_e1_1_one_channel_may_close_another_that_has_input_in_the_same_turn(server_of, peer, recorder):
    """Both have an event in the same turn of the hub, and either closes the other; the engine goes on."""

    class Rival(Connection):
        def on_read(self, data):
            recorder("read", self)
            for other in self.server.channels.values():
                if other is not self:
                    other.close()

        def on_close(self):
            recorder("close", self)

    server = server_of(Rival)
    first, second = peer(server), peer(server)
    until(lambda: len(server.channels) == 2)

    def both():
        first.socket.sendall(b"x")
        second.socket.sendall(b"x")

    both()  # in this greenlet, so that the hub sees both at once
    recorder.wait_for("close")
    turns()
    readers = [event[1] for event in recorder if event[0] == "read"]
    losers = [event[1] for event in recorder if event[0] == "close"]
    assert len(readers) == len(losers) == 1
    assert readers != losers
    assert server.channels.values() == readers
    third = peer(server)
    third.send(b"x")
    recorder.wait_for(lambda events: events.names().count("read") == 2)


@pytest.mark.parametrize("call", ENDERS)
def test_every_channel_may_end_all_others_from_on_read(server_of, peer, recorder, call):
    def end_the_others(stream, data):
        for other in stream.server.channels.values():
            if other is not stream:
                getattr(other, call)()

    server = server_of(recorder.of(Stream, "on_close", on_read=end_the_others))
    everybody = [peer(server) for _ in range(10)]
    until(lambda: len(server.channels) == 10)
    for one in everybody:
        one.socket.sendall(b"x")
    recorder.wait_for(9)
    turns()
    assert len(server.channels) == 1
    assert recorder.names() == ["on_close"] * 9


def test_server_closed_from_a_callback_of_a_connection(server_of, peer, recorder):
    def close_the_server(stream, data):
        stream.write(b"the end")
        stream.server.close()

    server = server_of(recorder.of(Stream, on_read=close_the_server))
    one, other = peer(server), peer(server)
    until(lambda: len(server.channels) == 2)
    one.send(b"x")
    assert one.recv_all() == b"the end"
    assert other.recv_all() == b""
    recorder.wait_for(lambda events: events.names().count("on_close") == 2)
    assert server.closed
    assert server.channels.values() == []


@pytest.mark.parametrize("situation", SITUATIONS)
def test_server_closed_while_its_connection_is_busy(server_of, peer, recorder, situation):
    gate = Event()
    server = server_of(recorder.of(Busy))
    one = peer(server, rcvbuf=4096)
    situation(server, one, gate)
    server.close()
    gate.set()
    wanted = {waiting_for_input: b"", blocked_in_a_callback: b"a\n", waiting_for_room: bytes(BIG)}
    assert one.recv_all() == wanted[situation]
    recorder.wait_for("on_close")
    assert_a_life(recorder.names())


# ---- close(): a last attempt


def test_close_sends_what_the_kernel_takes_at_once(server_of, peer):
    def answer_and_close(stream, data):
        stream.write(b"small ")
        stream.write(b"answer")
        stream.close()

    one = peer(server_of(Stream, on_read=answer_and_close))
    one.send(b"x")
    assert one.recv_all() == b"small answer"


def test_s4_23_close_drops_what_the_kernel_does_not_take_and_says_how_much(server_of, peer, recorder, caplog):
    caplog.set_level(logging.DEBUG, "pants_green")
    server = server_of(recorder.of(Stream))
    one = peer(server, rcvbuf=4096)
    stream = only(server)
    stream.write(bytes(16 * MIB))
    stream.close()
    recorder.wait_for("on_close")  # without the peer's reading anything
    arrived = one.recv_all()
    (dropped,) = [record for record in caplog.records if getattr(record, "event", None) == "dropped"]
    assert dropped.levelno == logging.DEBUG
    assert dropped.channel is stream
    assert f"{16 * MIB - len(arrived)} bytes" in dropped.getMessage()


def test_close_is_no_reason_for_on_write(server_of, peer, recorder):
    """on_write is promised an open socket."""

    def answer_and_close(stream, data):
        stream.write(b"answer")
        stream.close()

    def on_write(stream):
        recorder("on_write", stream.closed)

    one = peer(server_of(recorder.of(Stream, "on_close", on_read=answer_and_close, on_write=on_write)))
    one.send(b"x")
    assert one.recv_all() == b"answer"
    recorder.wait_for("on_close")
    assert recorder == [("on_close",)]


# ---- end(): everything arrives


@pytest.mark.parametrize("call", ["end", "close with flush"])
def test_s4_22_end_sends_everything_to_a_peer_that_sleeps_first(server_of, peer, recorder, call):
    server = server_of(recorder.of(Stream))
    one = peer(server, rcvbuf=4096)
    stream = only(server)
    stream.write(bytes(BIG))
    if call == "end":
        stream.end()
    else:
        stream.close(flush=True)
    until(lambda: 0 < unsent(stream) < BIG)
    turns(50)
    assert recorder.names() == ["on_connect"]
    assert (stream.connected, stream.closed) == (False, False)
    assert one.recv_all() == bytes(BIG)
    recorder.wait_for("on_close")
    assert stream.close_reason is CloseReason.ENDED_HERE


def test_end_tells_on_write_before_on_close(server_of, peer, recorder):
    server = server_of(recorder.of(Stream, "on_write", "on_close"))
    one = peer(server, rcvbuf=4096)
    stream = only(server)
    stream.write(bytes(MIB))
    stream.end()
    assert one.recv_all() == bytes(MIB)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_write", "on_close"]


def test_end_delivers_nothing_more(server_of, peer, recorder):
    server = server_of(recorder.of(Stream, read_delimiter=b"\n"))
    one = peer(server, rcvbuf=4096)
    stream = only(server)
    stream.write(bytes(BIG))
    stream.end()
    until(lambda: unsent(stream) > 0)
    one.send(b"x\n")
    turns()
    assert one.recv_all() == bytes(BIG)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_close"]


def test_end_and_a_peer_that_is_still_writing_do_not_lock_each_other(server_of, peer):
    def answer(stream, data):
        stream.write(bytes(BIG))
        stream.end()

    one = peer(server_of(Stream, on_read=answer), rcvbuf=4096)
    # More than all buffers hold: somebody has to read it while the answer is stuck.
    one.send(bytes(32 * MIB))
    assert one.recv_all() == bytes(BIG)


def test_end_gives_no_reset_to_a_peer_that_writes_after_our_fin(server_of, peer, recorder):
    def answer(stream, data):
        stream.write(b"answer")
        stream.end()

    one = peer(server_of(recorder.of(Stream, on_read=answer)))
    one.send(b"question")
    recorder.wait_for("on_close")  # it does not wait for the lingering
    assert lingering() == 1
    for _ in range(20):
        one.send(bytes(64 * KIB))
    assert one.recv_all() == b"answer"
    assert lingering() == 1
    one.close()
    until(lambda: lingering() == 0)


def test_end_does_not_linger_if_the_peer_has_ended_too(server_of, peer, recorder):
    def answer(stream, rest):
        stream.write(b"answer")
        stream.end()

    one = peer(server_of(recorder.of(Stream, on_end=answer)))
    one.shutdown_output()
    assert one.recv_all() == b"answer"
    recorder.wait_for("on_close")
    assert lingering() == 0


def test_lingering_survives_a_reset_by_the_peer(server_of, peer, recorder):
    server = server_of(recorder.of(Stream))
    one = peer(server)
    only(server).end()
    recorder.wait_for("on_close")
    assert lingering() == 1
    one.reset()
    until(lambda: lingering() == 0)


def test_lingering_ends_after_its_idle_limit(server_of, peer, recorder, monkeypatch):
    monkeypatch.setattr("pants_green._linger.IDLE_LIMIT", 0.05)
    server = server_of(recorder.of(Stream))
    one = peer(server)
    only(server).end()
    recorder.wait_for("on_close")
    assert lingering() == 1
    until(lambda: lingering() == 0)
    assert one.at_eof()


def test_lingering_ends_after_its_total_limit(server_of, peer, recorder, monkeypatch):
    monkeypatch.setattr("pants_green._linger.IDLE_LIMIT", 0.05)
    server = server_of(recorder.of(Stream, linger_timeout=0.2))
    one = peer(server)
    only(server).end()
    recorder.wait_for("on_close")

    def pester():
        try:
            while True:
                one.socket.sendall(bytes(1000))
                gevent.sleep(0.01)
        except OSError:
            return True

    assert pester()
    assert lingering() == 0


def test_a_lingering_socket_keeps_no_stream_busy(server_of, peer, recorder):
    server = server_of(recorder.of(Stream))
    peer(server)
    stream = only(server)
    stream.end()
    recorder.wait_for("on_close")
    assert stream.closed
    assert stream.socket is None
    assert stream not in Engine.instance().channels


# ---- write_eof(), abort()


def test_write_eof_sends_everything_then_a_fin_and_reading_goes_on(server_of, peer, recorder):
    server = server_of(recorder.of(Stream))
    one = peer(server, rcvbuf=4096)
    stream = only(server)
    stream.write(bytes(BIG))
    stream.write_eof()
    assert one.recv_all() == bytes(BIG)
    one.send(b"heard")
    recorder.wait_for(("on_read", b"heard"))
    assert stream.connected
    with pytest.raises(ChannelClosed):
        stream.write(b"more")
    with pytest.raises(ChannelClosed):
        stream.write_eof()
    one.close()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_end", "on_close"]
    assert stream.close_reason is CloseReason.PEER_ENDED


def test_write_eof_after_the_peers_end_closes(server_of, peer, recorder):
    server = server_of(recorder.of(Stream, on_end=lambda stream, rest: stream.write_eof()))
    one = peer(server)
    one.shutdown_output()
    assert one.recv_all() == b""
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_end", "on_close"]


def test_abort_resets(server_of, peer, recorder):
    server = server_of(recorder.of(Stream))
    one = peer(server)
    stream = only(server)
    stream.write(bytes(MIB))
    stream.abort()
    assert one.raises_reset()
    recorder.wait_for("on_close")
    assert stream.close_reason is CloseReason.ABORTED_HERE


@pytest.mark.parametrize("call", ["close", "end"])
def test_close_and_end_do_not_reset(server_of, peer, call):
    server = server_of(Stream)
    one = peer(server)
    getattr(only(server), call)()
    assert not one.raises_reset()


# ---- channels


def test_channels_holds_a_stream_exactly_while_it_is_connected(server_of, peer, recorder):
    def state(stream, *args):
        recorder(stream.connected, stream in stream.server.channels.values())

    kind = type("Watched", (Connection,), dict.fromkeys(EVERY_CALLBACK, state))
    server = server_of(kind)
    one = peer(server)
    one.send(b"x")
    recorder.wait_for(2)
    stream = only(server)
    stream.write(b"y")
    recorder.wait_for(3)
    one.shutdown_output()
    recorder.wait_for(5)
    assert recorder == [(True, True)] * 3 + [(False, False)] * 2


def test_broadcast_is_safe_while_connections_come_and_go(server_of, peer):
    class Chat(Connection):
        def on_connect(self):
            self.everybody(b"+")

        def on_close(self):
            self.everybody(b"-")

        def everybody(self, data):
            for channel in self.server.channels.values():
                channel.write(data)

    server = server_of(Chat)
    stays = peer(server)
    assert stays.recv_exactly(1) == b"+"
    for way in ("close", "reset"):
        leaves = peer(server)
        assert leaves.recv_exactly(1) == b"+"
        getattr(leaves, way)()
        assert stays.recv_exactly(2) == b"+-"


# ---- In the constructor


@pytest.mark.parametrize("call", ENDERS)
def test_ended_in_the_constructor_of_a_connection(server_of, peer, recorder, call):
    class Refusing(Connection):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            recorder("init", self.server is not None, self.connected)
            getattr(self, call)()

    server = server_of(recorder.of(Refusing))
    try:
        peer(server)
    except ConnectionError:
        assert call == "abort"
    recorder.wait_for("on_close")
    turns()
    assert recorder == [("init", True, False), ("on_close",)]
    assert server.channels.values() == []


def test_write_in_the_constructor_is_channel_closed(server_of, peer, recorder):
    class Hasty(Connection):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            with pytest.raises(ChannelClosed):
                self.write(b"x")
            recorder("refused")

    one = peer(server_of(Hasty))
    recorder.wait_for("refused")
    one.close()


# ---- Exceptions

RAISED = {
    "an error": lambda: ZeroDivisionError("raised"),
    "a Timeout": lambda: gevent.Timeout(1),
    "GreenletExit": lambda: gevent.GreenletExit("raised"),
}


def raising(make):
    def callback(*args):
        raise make()

    return callback


@pytest.mark.parametrize("what", RAISED)
@pytest.mark.parametrize("callback", EVERY_CALLBACK)
def test_callback_that_raises_ends_its_connection_and_no_other(server_of, peer, recorder, caplog, callback, what):
    class Sometimes(Connection):
        def on_read(self, data):
            self.write(data)

    def sometimes(stream, *args):
        if stream is victim[0]:
            raise RAISED[what]()
        getattr(Sometimes, callback)(stream, *args)

    victim = []

    class Counted(Sometimes):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            victim.append(self)

    server = server_of(recorder.of(Counted, "on_connect", "on_end", "on_close", **{callback: sometimes}))
    one = peer(server)
    one.send(b"x")
    if callback in ("on_end", "on_close"):
        assert one.recv_exactly(1) == b"x"
        one.shutdown_output()
    assert b"x".startswith(one.recv_all())
    recorder.wait_for("on_close")
    assert recorder.names().count("on_close") == 1
    assert victim[0].closed

    (logged,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert logged.levelno == logging.ERROR
    assert logged.channel is victim[0]
    assert logged.exc_info[0] is type(RAISED[what]())
    assert callback in logged.getMessage()
    if callback != "on_close":
        assert victim[0].close_reason is CloseReason.CALLBACK_ERROR
        assert type(victim[0].close_error) is type(RAISED[what]())

    victim[0] = None  # its close_error keeps a greenlet alive
    other = peer(server)
    other.send(b"still served")
    assert other.recv_exactly(12) == b"still served"


@pytest.mark.parametrize("what", RAISED)
def test_on_error_that_raises_is_logged_and_closes(server_of, peer, recorder, caplog, what):
    server = server_of(recorder.of(Stream, on_read=raising(RAISED["an error"]), on_error=raising(RAISED[what])))
    one = peer(server)
    stream = only(server)
    one.send(b"x")
    assert one.at_eof()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_error", "on_close"]
    assert [record.channel for record in caplog.records if record.levelno == logging.ERROR] == [stream]
    assert "on_error raised" in caplog.text
    assert stream.closed


@pytest.mark.parametrize("what", RAISED)
def test_on_read_error_that_raises_is_logged_and_on_close_follows(server_of, peer, recorder, caplog, what):
    server = server_of(recorder.of(Stream, on_read_error=raising(RAISED[what])))
    one = peer(server)
    only(server)
    one.reset()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_error", "on_close"]
    assert "on_read_error raised" in caplog.text


def test_s2_32_on_error_gets_what_a_callback_raised_and_may_keep_the_channel_open(server_of, peer, recorder):
    def picky(stream, line):
        if line == b"bad":
            raise KeyError(line)
        stream.write(line + b"\n")

    def keep(stream, error):
        stream.write(b"error: " + type(error).__name__.encode() + b"\n")

    server = server_of(recorder.of(Stream, read_delimiter=b"\n", on_read=picky, on_error=keep))
    one = peer(server)
    one.send(b"1\nbad\n2\n")
    assert one.recv_exactly(20) == b"1\nerror: KeyError\n2\n"
    assert only(server).connected
    one.close()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_read", "on_error", "on_read", "on_end", "on_close"]


@pytest.mark.parametrize("what", ["a Timeout", "GreenletExit"])
def test_on_error_cannot_keep_the_channel_open_after_a_timeout_or_a_kill(server_of, peer, recorder, what):
    server = server_of(recorder.of(Stream, on_read=raising(RAISED[what]), on_error=lambda stream, error: None))
    one = peer(server)
    one.send(b"x")
    assert one.at_eof()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_error", "on_close"]


def test_what_was_written_before_the_exception_is_not_owed_but_nothing_locks(server_of, peer, recorder):
    def write_and_fail(stream, data):
        stream.write(bytes(16 * MIB))
        raise ZeroDivisionError

    server = server_of(recorder.of(Stream, on_read=write_and_fail))
    one = peer(server, rcvbuf=4096)
    one.send(b"x")
    recorder.wait_for("on_close")  # though the peer reads nothing


@pytest.mark.parametrize("situation", [waiting_for_input, waiting_for_room])
def test_timeout_of_its_own_that_fires_in_a_wait_ends_that_connection(server_of, peer, recorder, caplog, situation):
    class Impatient(Busy):
        def on_read(self, line):
            super().on_read(line)
            if self is patient[0]:
                gevent.Timeout.start_new(0.05)

    patient = []

    def remember(stream):
        patient.append(stream)

    server = server_of(recorder.of(Impatient, "on_error", "on_close", on_connect=remember))
    one = peer(server, rcvbuf=4096)
    stream = only(server)
    other = peer(server)
    other.send(b"b\n")
    assert other.recv_exactly(2) == b"b\n"
    one.send(b"a\n" if situation is waiting_for_input else b"big\n")
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_error", "on_close"]
    assert isinstance(recorder[0][1], gevent.Timeout)
    assert stream.close_reason is CloseReason.CALLBACK_ERROR
    assert [record.channel for record in caplog.records] == [stream]
    other.send(b"c\n")
    assert other.recv_exactly(2) == b"c\n"
    patient.clear()


@pytest.mark.parametrize("situation", SITUATIONS)
def test_kill_of_the_greenlet_ends_that_connection(server_of, peer, recorder, caplog, situation):
    greenlets = []

    class Killable(Busy):
        def on_read(self, line):
            greenlets[:] = [gevent.getcurrent()]
            super().on_read(line)

    gate = Event()
    server = server_of(recorder.of(Killable, "on_close"))
    one = peer(server, rcvbuf=4096)
    stream = only(server)
    situation(server, one, gate)
    gevent.kill(greenlets.pop())
    recorder.wait_for("on_close")
    assert stream.close_reason is CloseReason.CALLBACK_ERROR
    assert isinstance(stream.close_error, gevent.GreenletExit)
    assert [record.channel for record in caplog.records] == [stream]


def test_timeout_left_behind_by_one_connection_does_not_hit_another(server_of, peer, recorder):
    def leave_one_behind(stream, data):
        if data == b"timeout":
            gevent.Timeout.start_new(0.05)
            stream.close()
        else:
            stream.write(data)

    server = server_of(recorder.of(Stream, on_read=leave_one_behind))
    for _ in range(5):
        peer(server).send(b"timeout")
    recorder.wait_for(lambda events: events.names().count("on_close") == 5)
    recorder.clear()
    others = [peer(server) for _ in range(10)]
    gevent.sleep(0.1)  # until they have fired
    for other in others:
        other.send(b"x")
        assert other.recv_exactly(1) == b"x"
    assert "on_error" not in recorder.names()


def test_callback_that_raises_costs_no_greenlet(server_of, peer, caplog):
    caplog.set_level(logging.CRITICAL, "pants_green")  # for a record would keep it alive
    server = server_of(Stream, on_read=raising(RAISED["an error"]))

    def workers():
        gc.collect()
        return sum(isinstance(one, Worker) for one in gc.get_objects())

    def fail():
        with peer(server) as one:
            one.send(b"x")
            assert one.at_eof()

    fail()
    before = workers()
    for _ in range(20):
        fail()
    assert workers() <= before + 2


def test_gevent_local_of_a_connection_goes_with_it(server_of, peer):
    """In a monkey-patched process that is threading.local, in which half of all libraries keep something."""

    class Kept:
        pass

    def use(stream, data):
        storage.kept = Kept()
        stream.close()

    storage = local()
    server = server_of(Stream, on_read=use)
    for _ in range(20):
        with peer(server) as one:
            one.send(b"x")
            assert one.at_eof()
    gc.collect()
    assert sum(isinstance(one, Kept) for one in gc.get_objects()) <= 2


@pytest.mark.parametrize("what", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("callback", ["on_connect", "on_read", "on_write", "on_end", "on_close"])
def test_keyboard_interrupt_and_system_exit_leave_start_after_on_close(server_of, peer, recorder, callback, what):
    def stop_everything(stream, *args):
        raise what("stop")

    class Answering(Connection):
        def on_read(self, data):
            self.write(data)

    server = server_of(recorder.of(Answering, "on_close", **{callback: stop_everything}))

    def visit():
        one = peer(server)
        one.send(b"x")
        one.shutdown_output()

    visitor = gevent.spawn(visit)
    with pytest.raises(what, match="stop"):
        Engine.instance().start()
    visitor.join()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_close"]
    assert server.listening


# ---- A stream that never was anything


@pytest.mark.parametrize("call", ENDERS)
def test_closed_before_it_was_connected(recorder, call):
    stream = recorder.of(Client)()
    getattr(stream, call)()
    assert stream.closed
    assert recorder == []
    recorder.wait_for("on_close")
    turns()
    assert recorder.names() == ["on_close"]
    with pytest.raises(RuntimeError):
        stream.connect(("127.0.0.1", 9))


def test_stream_is_forgotten_when_it_is_closed(server_of, peer, recorder):
    server = server_of(recorder.of(Stream))
    one = peer(server)
    stream = only(server)
    assert stream in Engine.instance().channels
    one.close()
    recorder.wait_for("on_close")
    assert stream not in Engine.instance().channels


# ---- In a foreign thread


@pytest.mark.parametrize("call", ["close", "end", "abort", "write_eof"])
def test_ending_in_a_foreign_thread_is_refused(server_of, peer, call):
    server = server_of(Stream)
    peer(server)
    stream = only(server)
    with pytest.raises(RuntimeError, match="thread"):
        in_thread(getattr(stream, call))
    assert stream.connected


# ---- Without a socket


@pytest.mark.parametrize(("call", "at_eof", "was_reset"), [("close", True, False), ("end", True, False), ("abort", False, True)])
def test_memory_ended_here(recorder, call, at_eof, was_reset):
    stream, end = memory_pair(recorder.of(Stream))
    recorder.wait_for("on_connect")
    stream.write(b"last")
    getattr(stream, call)()
    assert end.wait_for() == (b"" if call == "abort" else b"last")
    end.close()
    recorder.wait_for("on_close")
    assert (end.at_eof, end.was_reset) == (at_eof, was_reset)
    assert recorder.names() == ["on_connect", "on_close"]
    assert stream.close_reason is ENDERS[call]


@pytest.mark.parametrize(("leave", "names"), [("close", ["on_connect", "on_end", "on_close"]), ("reset", ["on_connect", "on_close"])])
def test_memory_ended_there(recorder, leave, names):
    stream, end = memory_pair(recorder.of(Stream))
    recorder.wait_for("on_connect")
    getattr(end, leave)()
    recorder.wait_for("on_close")
    assert recorder.names() == names
    assert stream.closed


def test_memory_end_waits_for_a_peer_that_takes_a_byte_at_a_time(recorder):
    stream, end = memory_pair(recorder.of(Stream), capacity=1)
    recorder.wait_for("on_connect")
    stream.write(b"0123456789" * 10)
    stream.end()
    assert end.wait_for() == b"0123456789" * 10
    end.close()
    recorder.wait_for("on_close")
    assert stream.close_reason is CloseReason.ENDED_HERE
