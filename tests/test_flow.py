"""Flow control over real sockets: when reading pauses, when a write waits, what becomes of one that may not, drain() and pause()."""

import logging
import math
import socket as stdlib_socket
import time

import gevent
import pytest
from gevent.event import AsyncResult, Event
from peers import in_thread
from waiting import nothing_is_kept, settle, turns, unsent, until  # noqa: F401

from pants_green import ChannelClosed, Client, CloseReason, Connection, Engine, Stream, StreamBufferOverflow
from pants_green.errors import ChannelStateError, WrongThreadError

KIB = 1024
MIB = 1024 * 1024

#: What the kernels between two ends take before either has read anything, about, and never more than FULL.
ROOM = 64 * KIB
FULL = 1 * MIB

LIMIT = 128 * KIB
HIGH = 64 * KIB
LOW = 16 * KIB

#: Where code may run that is not a callback of the channel it writes to, and is not asked to wait by default.
FOREIGN = ["channel", "timer", "cycle"]


def only(server):
    """Return the stream of a server once there is one."""
    until(lambda: len(server.channels) == 1)
    return server.channels.values()[0]


def data_of(size, seed=0):
    """Return bytes of which no part looks like another."""
    return b"".join(b"%d:%06d" % (seed, number) for number in range(size // 8 + 1))[:size]


def little_room(stream):
    """Let the kernel take little of what this stream sends."""
    stream.socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_SNDBUF, ROOM // 2)


class Narrow(Connection):
    """With little room anywhere."""

    write_limit = LIMIT
    high_water = HIGH
    low_water = LOW

    def on_connect(self):
        little_room(self)


@pytest.fixture
def narrow(server_of, peer, recorder):
    """Return a function that makes a stream of a class like Narrow, recorded, and its peer, which reads nothing by itself."""

    def make(*names, base=Narrow, **attributes):
        server = server_of(recorder.of(base, *names, **attributes))
        one = peer(server, rcvbuf=ROOM // 2)
        return only(server), one

    return make


@pytest.fixture
def stuck(narrow):
    """Return a function that makes a stream with FULL bytes written, so that it is above its limit, its peer, and these bytes."""

    def make(*names, **attributes):
        stream, one = narrow(*names or ("on_overflow_error", "on_error", "on_close"), **attributes)
        data = data_of(FULL)
        stream.write(data)
        until(lambda: unsent(stream) < FULL)
        settle(stream)
        assert unsent(stream) > LIMIT
        return stream, one, data

    return make


@pytest.fixture
def run_in(server_of, peer):
    """Return a function that runs another one in a given place, and returns the AsyncResult of what becomes of it."""
    watchers = []
    spawned = []

    def run(place, function):
        outcome = AsyncResult()

        def call(*args):
            try:
                outcome.set(function())
            except BaseException as error:
                outcome.set_exception(error.with_traceback(None))

        if place == "channel":
            peer(server_of(Connection, on_connect=call))
        elif place == "timer":
            Engine.instance().defer(0, call)
        elif place == "cycle":

            def once():
                handle.cancel()
                call()

            handle = Engine.instance().cycle(0.001, once)
        elif place == "hub":
            watcher = gevent.get_hub().loop.timer(0)
            watchers.append(watcher)
            watcher.start(call)
        elif place == "greenlet":
            spawned.append(gevent.spawn(call))
        else:
            raise AssertionError(place)
        return outcome

    yield run
    for watcher in watchers:
        watcher.stop()
        watcher.close()
    gevent.killall(spawned)


def read_on(one, size):
    """Have a peer read `size` bytes in a greenlet; what that returns is its ``get()``."""
    return gevent.spawn(one.recv_exactly, size)


# ---- Reading pauses only where input makes output


def test_reading_pauses_when_answers_are_not_read_and_goes_on_below_low_water(narrow, recorder):
    answer = data_of(HIGH)

    def on_read(stream, data):
        assert len(data) == 1
        stream.write(answer)

    stream, one = narrow("on_read", on_read=on_read, read_delimiter=1, write_limit=16 * MIB)
    for _ in range(40):
        one.send(b"x")
        gevent.sleep(0.001)
    until(lambda: unsent(stream) > HIGH)
    turns(20)
    count = len(recorder)
    assert count < 20
    assert unsent(stream) <= HIGH + len(answer)
    assert one.recv_exactly(40 * HIGH) == answer * 40
    recorder.wait_for(40)


@pytest.mark.parametrize("place", ["main", *FOREIGN, "greenlet", "hub"])
def test_output_queued_by_others_never_stops_reading(narrow, recorder, run_in, place):
    stream, one = narrow("on_read")
    data = data_of(FULL)
    if place == "main":
        stream.write(data)
    else:
        run_in(place, lambda: stream.write(data)).get(timeout=5)
    until(lambda: unsent(stream) < FULL)
    for number in range(5):
        one.send(b"%d" % number)
        recorder.wait_for(("on_read", b"%d" % number))
    assert unsent(stream) > LIMIT
    assert one.recv_exactly(FULL) == data


def test_output_queued_in_on_connect_never_stops_reading(narrow, recorder):
    def on_connect(stream):
        little_room(stream)
        stream.write(data_of(FULL))

    stream, one = narrow("on_read", on_connect=on_connect)
    for number in range(5):
        one.send(b"%d" % number)
        recorder.wait_for(("on_read", b"%d" % number))
    assert unsent(stream) > LIMIT


def test_output_queued_by_others_while_on_read_waits_does_not_stop_reading(narrow, recorder):
    gate = Event()

    def on_read(stream, data):
        if data == b"0":
            gate.wait()

    stream, one = narrow("on_read", on_read=on_read)
    one.send(b"0")
    recorder.wait_for(1)
    stream.write(bytes(FULL))
    gate.set()
    for number in range(1, 4):
        one.send(b"%d" % number)
        recorder.wait_for(("on_read", b"%d" % number), timeout=1)
    assert unsent(stream) > LIMIT


def test_output_queued_while_paused_in_a_batch_does_not_stop_reading(narrow, recorder):
    def on_read(stream, line):
        if line == b"pause":
            stream.pause()

    stream, one = narrow("on_read", on_read=on_read, read_delimiter=b"\n")
    one.send(b"pause\nnext\n")
    recorder.wait_for(1)
    stream.write(bytes(FULL))
    turns()
    stream.resume()
    recorder.wait_for(2)
    one.send(b"after\n")
    recorder.wait_for(("on_read", b"after"), timeout=1)


def test_close_while_reading_pauses_for_room_takes_effect(narrow, recorder):
    stream, one = narrow("on_read", "on_end", "on_close", on_read=lambda stream, data: stream.write(bytes(FULL)), write_limit=2 * FULL)
    one.send(b"x")
    until(lambda: 0 < unsent(stream) < FULL)
    turns()
    stream.close()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_read", "on_close"]
    assert stream.close_reason is CloseReason.CLOSED_HERE


def test_end_while_reading_pauses_for_room_sends_all_to_a_peer_that_writes_first(narrow, recorder):
    stream, one = narrow("on_read", "on_close", on_read=lambda stream, data: stream.write(data_of(FULL)), write_limit=2 * FULL)
    one.send(b"x")
    until(lambda: 0 < unsent(stream) < FULL)
    writer = gevent.spawn(one.send, bytes(8 * MIB))
    turns()
    stream.end()
    writer.get(timeout=5)
    assert one.recv_all() == data_of(FULL)
    recorder.wait_for("on_close")
    assert stream.close_reason is CloseReason.ENDED_HERE


def test_settings_of_water_marks_low_above_high_still_reads_on(narrow, recorder):
    _stream, one = narrow(
        "on_read",
        high_water=1,
        low_water=10 * MIB,
        read_delimiter=1,
        on_read=lambda stream, data: stream.write(b"y" * FULL),
        write_limit=MIB,
    )
    one.send(b"xx")
    assert one.recv_exactly(2 * FULL) == b"y" * (2 * FULL)
    recorder.wait_for(2)


# ---- Above write_limit: who waits


def test_write_limit_is_16_mib_by_default_and_settable_on_class_and_instance():
    assert Stream.write_limit == 16 * MIB
    assert Stream.high_water == 256 * KIB
    assert Stream.low_water == 64 * KIB
    assert Stream.overflow == "close"
    assert Stream.write_timeout == 60.0
    assert Stream.read_timeout is None

    class Less(Connection):
        write_limit = 5

    class Lesser(Less):
        pass

    Less.write_limit = 6
    stream = Lesser()
    assert (Less.write_limit, Lesser.write_limit, stream.write_limit) == (6, 6, 6)
    stream.write_limit = 7
    assert (Lesser.write_limit, stream.write_limit) == (6, 7)
    stream.overflow = "drop"
    assert (Lesser.overflow, stream.overflow, Lesser().overflow) == ("close", "drop", "close")
    assert stream.writes_dropped == 0


BAD = {
    "write_limit": [0, -1, True, "5", None, 1.5, math.nan, b"5"],
    "high_water": [0, -1, False, "5", None, 2.0],
    "low_water": [0, -1, True, "5", None, 2.0],
    "overflow": ["", "Close", None, True, 5, b"drop", ["drop"]],
    "write_timeout": [0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf, True, False, "5", b"5", [1]],
    "read_timeout": [0, 0.0, -1, -0.5, math.nan, math.inf, True, False, "5", float("-inf")],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_settings_bad_value_is_refused_on_class_and_instance_and_changes_nothing(name, value):
    class Mine(Connection):
        pass

    stream = Mine()
    before = getattr(Mine, name)
    with pytest.raises((TypeError, ValueError), match=f"Mine.{name}"):
        setattr(stream, name, value)
    with pytest.raises((TypeError, ValueError), match=f"Mine.{name}"):
        setattr(Mine, name, value)
    with pytest.raises((TypeError, ValueError), match=f"Other.{name}"):
        type("Other", (Mine,), {name: value})
    assert getattr(stream, name) == getattr(Mine, name) == getattr(Mine(), name) == before


def test_one_write_may_exceed_the_limit_if_the_outbox_is_under_it(stuck, recorder, run_in):
    stream, one = stuck()[:2]
    received = read_on(one, FULL)
    assert received.get() == data_of(FULL)
    big = data_of(2 * MIB)
    run_in("timer", lambda: stream.write(big)).get(timeout=5)
    assert one.recv_exactly(len(big)) == big
    assert stream.connected
    assert recorder == []


def test_write_at_one_byte_under_the_limit_is_taken_and_at_the_limit_is_not(stuck, run_in):
    stream, one, _ = stuck(overflow="drop")
    pending = unsent(stream)
    stream.write_limit = pending + 1
    run_in("timer", lambda: stream.write(b"ab")).get(timeout=5)
    assert unsent(stream) == pending + 2
    stream.write_limit = pending + 2
    run_in("timer", lambda: stream.write(b"c")).get(timeout=5)
    assert unsent(stream) == pending + 2
    assert stream.writes_dropped == 1
    assert one.recv_exactly(FULL + 2)[FULL:] == b"ab"


@pytest.mark.parametrize("callback", ["on_connect", "on_write", "on_end", "on_timeout"])
def test_other_own_callbacks_wait_for_room_inside_write(narrow, recorder, callback):
    def flood(stream, *args):
        if not getattr(stream, "flooded", False):
            stream.flooded = True
            for _ in range(4):
                stream.write(bytes(FULL))
            recorder("done")

    def on_connect(stream):
        little_room(stream)
        if callback == "on_connect":
            flood(stream)
        elif callback == "on_write":
            stream.write(b"!")

    attributes = {callback: flood, "on_connect": on_connect, "read_delimiter": b"\n", "read_timeout": 0.02}
    stream, one = narrow("on_error", **attributes)
    if callback == "on_end":
        one.shutdown_output()
    elif callback == "on_timeout":
        one.send(b"half a line")
    until(lambda: unsent(stream) > LIMIT)
    turns(10)
    assert recorder == []
    assert len(one.recv_exactly(4 * FULL)) == 4 * FULL
    recorder.wait_for("done")


@pytest.mark.parametrize("how", ["close", "abort"])
def test_own_callback_that_waits_gets_channel_closed_when_it_is_closed_meanwhile(stuck, recorder, how):
    def on_read(stream, data):
        with pytest.raises(ChannelClosed) as caught:
            stream.write(b"never")
        recorder("refused", caught.value.channel is stream)

    stream, one, _ = stuck("on_error", "on_close", on_read=on_read)
    one.send(b"x")
    until(lambda: stream._own_mark >= 0)
    getattr(stream, how)()
    recorder.wait_for("on_close")
    assert recorder == [("refused", True), ("on_close",)]


def test_own_callback_that_waits_is_let_go_when_the_peer_resets_and_that_is_no_error(stuck, recorder, caplog):
    stream, one, _ = stuck("on_error", "on_close", on_read=lambda stream, data: stream.write(b"never"))
    one.send(b"x")
    until(lambda: stream._own_mark >= 0)
    one.reset()
    recorder.wait_for("on_close")
    assert recorder == [("on_close",)]
    assert stream.close_reason is CloseReason.PEER_LEFT
    assert caplog.records == []


def test_own_callback_that_waits_does_not_hold_up_end_for_a_peer_that_writes_first(stuck, recorder):
    def on_read(stream, data):
        try:
            stream.write(b"too late")
        except ChannelClosed:
            recorder("refused")

    stream, one, data = stuck("on_error", "on_close", on_read=on_read)
    one.send(b"x")
    until(lambda: stream._own_mark >= 0)
    writer = gevent.spawn(one.send, bytes(8 * MIB))
    turns()
    stream.end()
    # end() promises to throw away what comes, so that a peer that is still writing cannot lock both.
    writer.get(timeout=3)
    assert one.recv_all() == data
    recorder.wait_for("on_close")
    assert recorder == ["refused", ("on_close",)]


def test_plain_greenlet_waits_for_room_and_order_is_kept(stuck, recorder, run_in):
    stream, one, data = stuck()
    outcome = run_in("greenlet", lambda: (stream.write(b"one"), stream.write(b"two")))
    turns(20)
    assert not outcome.ready()
    assert one.recv_exactly(FULL + 6) == data + b"onetwo"
    outcome.get(timeout=5)
    assert stream._waiters == ()


def test_main_greenlet_waits_for_room(stuck):
    stream, one, data = stuck()
    before = unsent(stream)
    received = read_on(one, FULL + 3)
    stream.write(b"end")
    assert unsent(stream) <= HIGH + 3 < before
    assert received.get() == data + b"end"


@pytest.mark.parametrize("how", ["close", "abort", "reset"])
def test_plain_greenlets_that_wait_get_channel_closed_when_it_is_closed_meanwhile(stuck, recorder, run_in, how):
    stream, one, _ = stuck()
    outcomes = [run_in("greenlet", lambda: stream.write(b"never")) for _ in range(3)]
    until(lambda: len(stream._waiters) == 3)
    getattr(one if how == "reset" else stream, how)()
    for outcome in outcomes:
        with pytest.raises(ChannelClosed, match=r"write\(\)"):
            outcome.get(timeout=5)
    recorder.wait_for("on_close")
    assert stream._waiters == ()


def test_plain_greenlet_that_waits_gets_channel_closed_after_end(stuck, recorder, run_in):
    stream, one, data = stuck()
    outcome = run_in("greenlet", lambda: stream.write(b"never"))
    until(lambda: len(stream._waiters) == 1)
    stream.end()
    assert one.recv_all() == data
    with pytest.raises(ChannelClosed):
        outcome.get(timeout=5)


def test_several_greenlets_wait_at_once_and_nothing_is_lost(stuck, recorder):
    stream, one, data = stuck()
    size = 3000

    def send(number):
        for turn in range(40):
            stream.write(b"%02d/%04d;" % (number, turn) + bytes([65 + number]) * (size - 8))

    writers = [gevent.spawn(send, number) for number in range(8)]
    until(lambda: len(stream._waiters) == 8)
    total = FULL + 8 * 40 * size
    received = one.recv_exactly(total)
    gevent.joinall(writers, raise_error=True)
    assert received[:FULL] == data
    turn = dict.fromkeys(range(8), 0)
    for start in range(FULL, total, size):
        number = int(received[start : start + 2])
        assert int(received[start + 3 : start + 7]) == turn[number]
        assert received[start + 8 : start + size] == bytes([65 + number]) * (size - 8)
        turn[number] += 1
    assert set(turn.values()) == {40}
    assert stream._waiters == ()
    assert unsent(stream) == 0


@pytest.mark.parametrize("other", ["greenlet", "channel"])
def test_waiting_writer_gets_its_turn_beside_one_that_writes_without_end(stuck, run_in, other):
    stream, one, _ = stuck(overflow="wait")
    going = True
    rounds = 0

    def without_end():
        nonlocal rounds
        while going:
            stream.write(bytes(LIMIT))
            rounds += 1

    greedy = gevent.spawn(without_end)
    until(lambda: len(stream._waiters) == 1)
    outcome = run_in(other, lambda: stream.write(b"!"))
    until(lambda: len(stream._waiters) == 2)

    def take():
        while one.socket.recv(256 * KIB):
            pass

    reader = gevent.spawn(in_thread, take)
    try:
        until(lambda: outcome.ready() or rounds > 100)
        fair = outcome.ready()
        going = False
        greedy.join()
        outcome.wait(timeout=5)
    finally:
        going = False
        stream.end()
        greedy.join()
        reader.join()
    outcome.get(timeout=5)
    assert fair, "the other one wrote 100 times above the limit meanwhile"


@pytest.mark.parametrize("how", ["kill", "timeout"])
def test_waiter_that_is_ended_leaves_nothing_behind_and_disturbs_nobody(stuck, recorder, how):
    stream, one, data = stuck()

    def write(piece, patience):
        with gevent.Timeout(patience, False):
            stream.write(piece)
            return True

    waiters = [gevent.spawn(write, b"%d" % number, 0.05 if number == 1 and how == "timeout" else None) for number in range(3)]
    until(lambda: len(stream._waiters) == 3)
    if how == "kill":
        waiters[1].kill()
    else:
        assert waiters[1].get(timeout=5) is None
    assert len(stream._waiters) == 2
    assert one.recv_exactly(FULL + 2) == data + b"02"
    assert [waiter.get(timeout=5) for waiter in (waiters[0], waiters[2])] == [True, True]
    assert stream._waiters == ()
    stream.write(b"fine")
    assert one.recv_exactly(4) == b"fine"


def test_only_waiter_that_is_ended_leaves_the_write_timeout_and_the_fin_at_work(stuck, recorder):
    stream, one, data = stuck("on_timeout", "on_close")
    waiter = gevent.spawn(stream.drain)
    until(lambda: len(stream._waiters) == 1)
    stream.write_eof()
    waiter.kill()
    assert one.recv_all() == data
    stream.close()


def test_own_callback_that_waits_is_ended_by_its_timeout_and_goes_on(stuck, recorder):
    def on_read(stream, data):
        with gevent.Timeout(0.05, False):
            stream.write(b"never")
        recorder(data)

    stream, one, data = stuck("on_error", "on_close", on_read=on_read)
    one.send(b"a")
    recorder.wait_for(b"a")
    one.send(b"b")
    recorder.wait_for(b"b")
    assert one.recv_exactly(FULL) == data
    stream.write(b"fine")
    assert one.recv_exactly(4) == b"fine"
    assert recorder == [b"a", b"b"]


# ---- Above write_limit: who never waits


@pytest.mark.parametrize("place", [*FOREIGN, "hub"])
def test_overflow_close_ends_the_channel_and_the_writer_goes_on(stuck, recorder, run_in, caplog, place):
    seen = []

    def on_overflow_error(stream, error):
        recorder("overflowed", type(error), error.limit, error.size >= LIMIT, stream.closed, gevent.getcurrent() is stream._greenlet)

    stream, _, _ = stuck("on_error", "on_close", on_overflow_error=on_overflow_error)
    server = stream.server

    def write():
        assert stream.write(b"too much") is None
        seen.append((stream.connected, stream.closed, server.channels.values(), list(recorder), stream.close_reason))
        with pytest.raises(ChannelClosed):
            stream.write(b"later")

    run_in(place, write).get(timeout=5)
    assert seen == [(False, True, [], [], CloseReason.OVERFLOW)]
    recorder.wait_for("on_close")
    assert recorder == [("overflowed", StreamBufferOverflow, LIMIT, True, True, True), ("on_close",)]
    assert isinstance(stream.close_error, StreamBufferOverflow)
    assert stream.writes_dropped == 0
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


def test_overflow_close_is_one_warning_by_default(stuck, recorder, run_in, caplog):
    stream, _, _ = stuck()
    run_in("timer", lambda: stream.write(b"too much")).get(timeout=5)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_overflow_error", "on_close"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"write_limit is {LIMIT}" in caplog.text


def test_overflow_close_while_the_own_callback_runs_waits_for_it(stuck, recorder, run_in):
    gate = Event()

    def on_read(stream, data):
        recorder("reading")
        gate.wait()
        recorder("read", stream.connected)

    stream, one, _ = stuck("on_overflow_error", "on_close", on_read=on_read)
    one.send(b"x")
    recorder.wait_for("reading")
    run_in("timer", lambda: stream.write(b"too much")).get(timeout=5)
    turns()
    assert recorder == ["reading"]
    gate.set()
    recorder.wait_for("on_close")
    assert recorder.names() == ["reading", "read", "on_overflow_error", "on_close"]
    assert ("read", False) in recorder


def test_overflow_close_while_the_own_callback_waits_for_room_lets_it_go(stuck, recorder, run_in):
    def on_read(stream, data):
        with pytest.raises(ChannelClosed):
            stream.write(b"never")
        recorder("refused")

    stream, one, _ = stuck("on_error", "on_overflow_error", "on_close", on_read=on_read)
    one.send(b"x")
    until(lambda: stream._own_mark >= 0)
    waiting = run_in("greenlet", lambda: stream.write(b"never"))
    until(lambda: len(stream._waiters) == 1)
    run_in("timer", lambda: stream.write(b"too much")).get(timeout=5)
    with pytest.raises(ChannelClosed):
        waiting.get(timeout=5)
    recorder.wait_for("on_close")
    assert recorder.names() == ["refused", "on_overflow_error", "on_close"]


def test_overflow_close_callback_sees_both_addresses_and_cannot_write(stuck, recorder, run_in):
    def on_overflow_error(stream, error):
        with pytest.raises(ChannelClosed):
            stream.write(b"no")
        recorder("overflowed", stream.remote_address, stream.local_address)

    stream, one, _ = stuck("on_error", "on_close", on_overflow_error=on_overflow_error)
    run_in("channel", lambda: stream.write(b"too much")).get(timeout=5)
    recorder.wait_for("on_close")
    assert recorder == [("overflowed", one.address, one.socket.getpeername()), ("on_close",)]


@pytest.mark.parametrize("place", [*FOREIGN, "hub"])
def test_overflow_drop_drops_whole_writes_and_counts_them(stuck, recorder, run_in, place):
    stream, one, data = stuck(overflow="drop")

    def write():
        for number in range(5):
            stream.write(b"dropped %d" % number, flush=number == 2)

    run_in(place, write).get(timeout=5)
    assert stream.writes_dropped == 5
    assert stream.connected
    assert one.recv_exactly(FULL) == data
    run_in(place, lambda: stream.write(b"there is room")).get(timeout=5)
    stream.end()
    assert one.recv_all() == b"there is room"
    assert stream.writes_dropped == 5
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_close"]


def test_overflow_drop_a_slow_peer_gets_whole_messages_in_order_only(narrow, recorder):
    stream, one = narrow("on_close", overflow="drop")
    size = 10_000
    written = 0

    def tell():
        nonlocal written
        stream.write(b"%06d" % written + b"." * (size - 7) + b"\n")
        written += 1

    handles = [Engine.instance().loop(tell), Engine.instance().cycle(0.001, tell)]
    received = b""
    while stream.writes_dropped < 50 or len(received) < 2 * MIB:
        received += one.recv(4096 if stream.writes_dropped < 50 else 65536)
    for handle in handles:
        handle.cancel()
    stream.end()
    received += one.recv_all()
    messages = received.splitlines(keepends=True)
    assert {len(message) for message in messages} == {size}
    numbers = [int(message[:6]) for message in messages]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == written - stream.writes_dropped


def test_overflow_drop_does_not_concern_the_own_callback_and_plain_greenlets(stuck, recorder, run_in):
    def on_read(stream, data):
        stream.write(b"own")
        recorder("written")

    stream, one, data = stuck("on_close", on_read=on_read, overflow="drop")
    one.send(b"x")
    until(lambda: stream._own_mark >= 0)
    outcome = run_in("greenlet", lambda: stream.write(b"pgr"))
    assert one.recv_exactly(FULL + 6)[FULL:] in (b"ownpgr", b"pgrown")
    outcome.get(timeout=5)
    recorder.wait_for("written")
    assert stream.writes_dropped == 0
    assert data


@pytest.mark.parametrize("place", FOREIGN)
def test_overflow_wait_makes_others_wait_and_loses_nothing(stuck, recorder, run_in, place):
    stream, one, data = stuck(overflow="wait")
    outcome = run_in(place, lambda: (stream.write(b"one"), stream.write(b"two")))
    until(lambda: len(stream._waiters) == 1)
    turns(20)
    assert not outcome.ready()
    assert one.recv_exactly(FULL + 6) == data + b"onetwo"
    outcome.get(timeout=5)
    assert stream.writes_dropped == 0
    assert recorder == []


def test_overflow_wait_in_the_hub_does_not_wait_but_closes(stuck, recorder, run_in):
    stream, _, _ = stuck(overflow="wait")
    run_in("hub", lambda: stream.write(b"too much")).get(timeout=5)
    recorder.wait_for("on_close")
    assert stream.close_reason is CloseReason.OVERFLOW
    assert recorder.names() == ["on_overflow_error", "on_close"]


def test_overflow_wait_channel_that_waits_for_another_is_let_go_when_that_closes(stuck, recorder, run_in):
    stream, _, _ = stuck(overflow="wait")
    outcome = run_in("channel", lambda: stream.write(b"never"))
    until(lambda: len(stream._waiters) == 1)
    stream.abort()
    with pytest.raises(ChannelClosed):
        outcome.get(timeout=5)


def test_overflow_changed_on_the_instance_while_it_is_full_takes_effect(stuck, recorder, run_in):
    stream, one, data = stuck()
    stream.overflow = "drop"
    run_in("timer", lambda: stream.write(b"no")).get(timeout=5)
    stream.write_limit = 2 * FULL
    run_in("timer", lambda: stream.write(b"yes")).get(timeout=5)
    assert stream.writes_dropped == 1
    assert one.recv_exactly(FULL + 3) == data + b"yes"


def test_write_tries_the_kernel_before_it_gives_up(stuck, recorder, run_in):
    stream, one, data = stuck()
    received = in_thread(one.socket.recv, 1)

    def take_all_but_let_nobody_run():
        # In this thread, so that the hub cannot send meanwhile.
        count = 1
        one.socket.settimeout(0.05)
        while count < FULL:
            stream.flush()
            try:
                count += len(one.socket.recv(MIB))
            except TimeoutError:
                continue
        stream.write(b"just in time")
        return count

    assert run_in("timer", take_all_but_let_nobody_run).get(timeout=10) == FULL
    assert received == data[:1]
    assert stream.connected
    one.socket.settimeout(5)
    assert one.recv_exactly(12) == b"just in time"


# ---- drain()


@pytest.mark.parametrize("place", ["own", "channel", "timer", "greenlet"])
def test_drain_waits_until_low_water(stuck, recorder, run_in, place):
    def on_read(stream, data):
        stream.drain()
        recorder("drained", unsent(stream) <= LOW)

    stream, one, data = stuck("on_error", "on_close", on_read=on_read)
    if place == "own":
        one.send(b"x")
        until(lambda: stream._own_mark >= 0)
    else:
        run_in(place, lambda: on_read(stream, b""))
        until(lambda: len(stream._waiters) == 1)
    turns(10)
    assert recorder == []
    assert one.recv_exactly(FULL) == data
    recorder.wait_for(1)
    assert recorder == [("drained", True)]


@pytest.mark.parametrize("place", ["channel", "timer", "greenlet", "hub"])
def test_drain_at_high_water_or_less_returns_at_once(stuck, run_in, place):
    stream, _, _ = stuck()
    stream.high_water = unsent(stream)
    turn = []

    def drain():
        stream.drain()
        turn.append(unsent(stream))

    run_in(place, drain).get(timeout=5)
    assert turn == [stream.high_water]


def test_drain_of_an_empty_outbox_returns_at_once(narrow):
    stream, _ = narrow()
    stream.drain()


def test_drain_flushes_first(narrow):
    stream, _ = narrow()
    stream.write(b"x" * (HIGH // 4))
    stream.high_water = 10
    stream.drain()
    assert unsent(stream) == 0


def test_drain_in_the_hub_is_an_error(stuck, run_in):
    stream, _, _ = stuck()
    with pytest.raises(ChannelStateError, match=r"drain\(\).*hub") as caught:
        run_in("hub", stream.drain).get(timeout=5)
    assert not isinstance(caught.value, ChannelClosed)
    assert stream.connected


def test_drain_never_connected_or_closed_raises_channel_closed(narrow, recorder, listening_peer):
    stream = Client()
    with pytest.raises(ChannelClosed, match=r"drain\(\)"):
        stream.drain()
    stream.connect(listening_peer().address)
    with pytest.raises(ChannelClosed, match=r"drain\(\)"):
        stream.drain()
    until(lambda: stream.connected)
    stream.drain()
    stream.close()
    with pytest.raises(ChannelClosed, match=r"drain\(\)"):
        stream.drain()


@pytest.mark.parametrize("place", ["own", "greenlet", "timer"])
@pytest.mark.parametrize("how", ["close", "abort", "reset"])
def test_drain_raises_channel_closed_when_it_is_closed_meanwhile(stuck, recorder, run_in, place, how):
    def on_read(stream, data):
        with pytest.raises(ChannelClosed, match=r"drain\(\)"):
            stream.drain()
        recorder("refused")

    stream, one, _ = stuck("on_error", "on_close", on_read=on_read)
    if place == "own":
        one.send(b"x")
        until(lambda: stream._own_mark >= 0)
    else:
        run_in(place, lambda: on_read(stream, b""))
        until(lambda: len(stream._waiters) == 1)
    getattr(one if how == "reset" else stream, how)()
    recorder.wait_for("on_close")
    recorder.wait_for("refused")
    assert sorted(recorder.names()) == ["on_close", "refused"]


@pytest.mark.parametrize("place", ["own", "greenlet", "channel"])
def test_end_while_somebody_drains_sends_all_and_drain_returns(stuck, recorder, run_in, place):
    def on_read(stream, data):
        stream.drain()
        recorder("drained")

    stream, one, data = stuck("on_error", "on_close", on_read=on_read)
    if place == "own":
        one.send(b"x")
        until(lambda: stream._own_mark >= 0)
    else:
        run_in(place, lambda: on_read(stream, b""))
        until(lambda: len(stream._waiters) == 1)
    stream.end()
    assert one.recv_all() == data
    recorder.wait_for("on_close")
    recorder.wait_for("drained")
    assert sorted(recorder.names()) == ["drained", "on_close"]


def test_drain_returns_when_the_peer_has_ended_and_read_everything(narrow, recorder, run_in):
    # All of the rest goes to the kernel at once, and the stream closes in the same turn.
    stream, one = narrow("on_close")
    stream.write(data_of(FULL))
    until(lambda: unsent(stream) < FULL)
    settle(stream)
    stream.high_water, stream.low_water = 2, 1
    outcome = run_in("greenlet", stream.drain)
    until(lambda: len(stream._waiters) == 1)
    one.shutdown_output()
    until(lambda: not stream.connected)
    assert one.recv_all() == data_of(FULL)
    recorder.wait_for("on_close")
    outcome.get(timeout=5)


def test_drain_after_end_and_after_write_eof_waits_too(stuck, recorder, run_in):
    stream, one, data = stuck()
    stream.write_eof()
    first = run_in("greenlet", stream.drain)
    until(lambda: len(stream._waiters) == 1)
    stream.end()
    second = run_in("greenlet", stream.drain)
    until(lambda: len(stream._waiters) == 2)
    assert one.recv_all() == data
    first.get(timeout=5)
    second.get(timeout=5)


def test_drain_of_several_greenlets_with_different_marks(stuck, run_in):
    stream, one, data = stuck()
    stream.low_water = 8 * KIB
    first = run_in("greenlet", stream.drain)
    until(lambda: len(stream._waiters) == 1)
    stream.low_water = 60 * KIB
    second = run_in("greenlet", stream.drain)
    until(lambda: len(stream._waiters) == 2)
    assert stream._room_at == 60 * KIB
    assert one.recv_exactly(FULL) == data
    first.get(timeout=5)
    second.get(timeout=5)
    assert stream._waiters == ()


def test_drain_from_another_thread_is_refused(narrow):
    stream, _ = narrow()
    for call in (stream.drain, stream.flush, stream.pause, stream.resume):
        with pytest.raises(WrongThreadError):
            in_thread(call)


def test_on_write_and_other_posted_callbacks_wait_while_the_own_callback_drains(stuck, recorder):
    def on_read(stream, data):
        stream.drain()
        recorder("drained")
        turns()
        recorder("read")

    stream, one, data = stuck("on_write", "on_close", on_read=on_read)
    one.send(b"x")
    until(lambda: stream._own_mark >= 0)
    assert one.recv_exactly(FULL) == data
    recorder.wait_for("on_write")
    assert recorder == ["drained", "read", ("on_write",)]


# ---- pause() and resume()


class Lines(Connection):
    read_delimiter = b"\n"


@pytest.mark.parametrize("delimiter", [b"\n", 2, None])
def test_pause_in_the_middle_of_a_batch_delivers_nothing_more_until_resume(server_of, peer, recorder, delimiter):
    def on_read(stream, data):
        if data[:1] in (b"b", b"d"):
            stream.pause()

    server = server_of(recorder.of(Connection, "on_read", "on_write", "on_close", on_read=on_read), read_delimiter=delimiter)
    one = peer(server)
    stream = only(server)
    one.send(b"a\nb\nc\nd\ne\n" if delimiter else b"b")
    recorder.wait_for(2 if delimiter else 1)
    one.send(b"f\n")
    turns(20)
    assert stream.paused
    assert len(recorder) == (2 if delimiter else 1)
    stream.resume()
    assert not stream.paused
    recorder.wait_for(4 if delimiter else 2)
    turns(20)
    assert len(recorder) == (4 if delimiter else 2)
    stream.resume()
    if delimiter:
        recorder.wait_for(6)
    assert b"".join(data[:1] for _, data in recorder) == (b"abcdef" if delimiter else b"bf")


def test_pause_and_resume_in_the_same_callback_change_nothing(server_of, peer, recorder):
    def on_read(stream, line):
        stream.pause()
        stream.pause()
        stream.resume()

    one = peer(server_of(recorder.of(Lines, "on_read", on_read=on_read)))
    one.send(b"a\nb\nc\n")
    recorder.wait_for(3)
    one.send(b"d\n")
    recorder.wait_for(4)
    assert [line for _, line in recorder] == [b"a", b"b", b"c", b"d"]


def test_pause_from_elsewhere_while_it_waits_for_input(server_of, peer, recorder):
    server = server_of(recorder.of(Lines, "on_read", "on_end", "on_close"))
    one = peer(server)
    stream = only(server)
    turns()
    stream.pause()
    stream.pause()
    one.send(b"a\nb")
    turns(20)
    assert recorder == []
    stream.resume()
    stream.resume()
    recorder.wait_for(1)
    one.send(b"\n")
    recorder.wait_for(2)
    assert recorder == [("on_read", b"a"), ("on_read", b"b")]


@pytest.mark.parametrize("place", ["timer", "channel", "hub", "greenlet"])
def test_pause_and_resume_from_anywhere(server_of, peer, recorder, run_in, place):
    server = server_of(recorder.of(Lines, "on_read"))
    one = peer(server)
    stream = only(server)
    run_in(place, stream.pause).get(timeout=5)
    one.send(b"a\n")
    turns(20)
    assert recorder == []
    run_in(place, stream.resume).get(timeout=5)
    recorder.wait_for(1)


def test_pause_before_connect_holds_from_the_first_byte_on(listening_peer, recorder):
    listener = listening_peer()
    stream = recorder.of(Client, "on_connect", "on_read", "on_end", "on_close")()
    stream.resume()
    assert not stream.paused
    stream.pause()
    turns(5)
    assert recorder == []
    stream.connect(listener.address)
    one = listener.accept()
    one.send(b"early")
    recorder.wait_for("on_connect")
    turns(20)
    assert recorder == [("on_connect",)]
    stream.resume()
    recorder.wait_for(2)
    assert recorder == [("on_connect",), ("on_read", b"early")]
    one.close()
    recorder.wait_for("on_close")


@pytest.mark.parametrize("when", ["init", "on_connect"])
def test_pause_in_the_constructor_and_in_on_connect(server_of, peer, recorder, when):
    class Held(Lines):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if when == "init":
                self.pause()

        def on_connect(self):
            if when == "on_connect":
                self.pause()

    server = server_of(recorder.of(Held, "on_connect", "on_read"))
    one = peer(server)
    one.send(b"a\n")
    recorder.wait_for("on_connect")
    turns(20)
    assert len(recorder) == 1
    only(server).resume()
    recorder.wait_for(2)


@pytest.mark.parametrize(
    ("how", "reason"),
    [("end", CloseReason.ENDED_HERE), ("close", CloseReason.CLOSED_HERE), ("abort", CloseReason.ABORTED_HERE)],
)
@pytest.mark.parametrize("inside", [True, False])
def test_pause_then_closing_takes_effect_and_delivers_nothing_more(server_of, peer, recorder, how, reason, inside):
    def on_read(stream, line):
        stream.pause()
        if inside:
            getattr(stream, how)()

    server = server_of(recorder.of(Lines, on_read=on_read))
    one = peer(server)
    stream = only(server)
    one.send(b"a\nb\n")
    recorder.wait_for("on_read")
    if not inside:
        turns()
        getattr(stream, how)()
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("on_read", b"a"), ("on_close",)]
    assert stream.close_reason is reason
    if how == "end":
        assert one.recv_all() == b""
    stream.resume()
    stream.pause()
    turns()
    assert recorder.names().count("on_close") == 1


def test_pause_then_end_sends_what_is_owed_to_a_peer_that_writes_first(stuck, recorder):
    stream, one, data = stuck()
    stream.pause()
    writer = gevent.spawn(one.send, bytes(8 * MIB))
    turns(20)
    assert not writer.ready()
    stream.end()
    writer.get(timeout=5)
    assert one.recv_all() == data
    recorder.wait_for("on_close")


def test_pause_the_peers_fin_is_noticed_after_resume(server_of, peer, recorder):
    server = server_of(recorder.of(Lines))
    one = peer(server)
    stream = only(server)
    stream.pause()
    one.send(b"a\nrest")
    one.shutdown_output()
    turns(20)
    assert recorder == [("on_connect",)]
    assert stream.connected
    stream.write(b"still here")
    assert one.recv_exactly(10) == b"still here"
    stream.resume()
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("on_read", b"a"), ("on_end", b"rest"), ("on_close",)]
    assert stream.close_reason is CloseReason.PEER_ENDED


def test_pause_in_the_last_chunk_before_the_fin_holds_on_end_back(server_of, peer, recorder):
    server = server_of(recorder.of(Lines, on_read=lambda stream, line: stream.pause()))
    one = peer(server)
    stream = only(server)
    one.send(b"a\n")
    one.close()
    recorder.wait_for("on_read")
    turns(20)
    assert recorder == [("on_connect",), ("on_read", b"a")]
    stream.resume()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_end", "on_close"]


def test_pause_posted_callbacks_run_all_the_same(stuck, recorder):
    stream, one, data = stuck("on_read", "on_write", "on_timeout", "on_close")
    stream.pause()
    one.send(b"held back")
    assert one.recv_exactly(FULL) == data
    recorder.wait_for("on_write")
    stream.write(b"more")
    recorder.wait_for(2)
    assert recorder == [("on_write",), ("on_write",)]
    stream.on_write = stream.resume
    stream.write(b"!")
    recorder.wait_for("on_read")
    assert recorder[2] == ("on_read", b"held back")


def test_pause_read_in_a_callback_goes_on_all_the_same(server_of, peer, recorder):
    def on_read(stream, line):
        stream.pause()
        recorder(line, stream.read(), stream.paused)

    server = server_of(Lines, on_read=on_read)
    one = peer(server)
    stream = only(server)
    one.send(b"a\nb\nc\nd\n")
    recorder.wait_for(1)
    turns(20)
    assert recorder == [(b"a", b"b", True)]
    stream.resume()
    recorder.wait_for(2)
    assert recorder[1] == (b"c", b"d", True)


def test_pause_while_it_waits_for_room_holds_afterwards(stuck, recorder):
    stream, one, data = stuck("on_read", on_read=lambda stream, data: stream.write(b"answer"), write_limit=4 * FULL)
    one.send(b"x")
    recorder.wait_for(1)
    until(lambda: stream._own_mark >= 0)
    stream.pause()
    assert one.recv_exactly(FULL + 6) == data + b"answer"
    one.send(b"y")
    turns(20)
    assert len(recorder) == 1
    stream.resume()
    recorder.wait_for(2)


def test_pause_half_open_write_only_is_not_disturbed(server_of, peer, recorder):
    server = server_of(recorder.of(Lines, "on_end", "on_close", allow_half_open=True))
    one = peer(server)
    stream = only(server)
    one.shutdown_output()
    recorder.wait_for("on_end")
    stream.pause()
    stream.write(b"still")
    turns()
    stream.resume()
    stream.end()
    assert one.recv_all() == b"still"
    recorder.wait_for("on_close")


def test_pause_and_stall_use_no_cpu(stuck, recorder):
    stream, one, _ = stuck()
    stream.pause()
    one.send(b"waits in the kernel")
    gevent.spawn(stream.drain)
    until(lambda: len(stream._waiters) == 1)
    turns()
    before = time.process_time()
    # Time must pass here: that nothing happens in it is what is tested.
    gevent.sleep(0.5)
    assert time.process_time() - before < 0.1
    stream.close()
    turns()


# ---- E.1 of the old library's defects


def test_e1_13_output_is_bounded_and_pushes_back(server_of, peer, recorder):
    """A peer that asks and does not listen: what waits for it, and what is taken from it, have a limit."""
    most = []

    def on_read(stream, data):
        stream.write(data * 8)
        most.append(stream._pending)

    one = peer(server_of(recorder.of(Connection, "on_close", on_read=on_read)))
    one.socket.setblocking(False)
    taken, still = 0, 0
    while still < 20:
        try:
            taken += one.socket.send(b"x" * 65536)
            still = 0
        except BlockingIOError:
            still += 1
        gevent.sleep(0.001)
    assert max(most) < 4 * 1024 * 1024
    assert taken < 32 * 1024 * 1024
