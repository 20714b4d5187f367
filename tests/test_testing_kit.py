"""The test kit, tested: what leaks is named, bytes are cut in every way, memory pairs behave as sockets do."""

import gc
import os
import socket as stdlib_socket
import subprocess
import sys
import textwrap

import gevent
import gevent.socket
import pytest
from gevent.event import Event
from greenlet import getcurrent, greenlet
from hypothesis import find, given
from hypothesis import strategies as st
from peers import Peer, PlainSocket

from pants_green import CloseReason, Engine, Server, Stream
from pants_green.errors import ChannelStateError
from pants_green.testing import LeakCheck, MemoryEnd, fragmentations, leak_check, memory_pair
from pants_green.testing.strategies import fragments


class Echo(Stream):
    def on_read(self, data):
        self.write(data)


# ---- leak_check


def wait_in_vain(event):
    event.wait()


def test_leak_check_nothing_left_says_nothing():
    with leak_check() as check:
        server = Server(Echo).listen(("127.0.0.1", 0))
        with Peer(server) as peer:
            peer.send(b"hello")
            assert peer.recv_exactly(5) == b"hello"
        server.close()
    assert isinstance(check, LeakCheck)
    assert check.leftovers() == []


def test_leak_check_greenlet_is_named_with_the_place_where_it_waits():
    event = Event()
    with pytest.raises(AssertionError, match=r"1 left over:\n  greenlet .*wait_in_vain.*test_testing_kit\.py:\d+"):
        with leak_check(patience=0.02):
            gevent.spawn(wait_in_vain, event)
    event.set()


def test_leak_check_raw_greenlet_is_named():
    hub = gevent.get_hub()
    with pytest.raises(AssertionError, match=r"1 left over:\n  greenlet .*in_a_raw_one"):
        with leak_check(patience=0.02):

            def in_a_raw_one():
                hub.switch()

            raw = greenlet(in_a_raw_one, hub)
            hub.loop.run_callback(raw.switch)
    hub.loop.run_callback(raw.throw)
    gevent.sleep(0)
    assert raw.dead


def test_leak_check_greenlet_that_never_began_is_named():
    with leak_check(patience=0.02) as check:
        waiting = gevent.spawn_later(60, len, ())
        assert any("greenlet" in line for line in check.leftovers())
        waiting.kill()


def test_leak_check_stream_in_a_callback_is_named_as_greenlet_and_as_channel():
    event = Event()

    class Blocked(Stream):
        def on_connect(self):
            wait_in_vain(event)

    with pytest.raises(AssertionError, match=r"(?s)2 left over:.*greenlet .*wait_in_vain.*channel <Blocked open"):
        with leak_check(patience=0.02):
            stream, _ = memory_pair(Blocked)
    event.set()
    stream.close()


def test_leak_check_server_is_named_as_channel_and_as_descriptor():
    server = Server(Echo)
    with pytest.raises(AssertionError) as caught:
        with leak_check(patience=0.02):
            server.listen(("127.0.0.1", 0))
    host, port = server.local_address
    server.close()
    channel, descriptor = str(caught.value).splitlines()[1:]
    assert f"channel <Server listening on {host}:{port}>" in channel
    assert "descriptor " in descriptor
    assert f"from {host}:{port} to ?" in descriptor


def test_leak_check_lingering_socket_is_named(server_of, peer, recorder):
    class Farewell(Stream):
        def on_connect(self):
            self.end()

    server = server_of(recorder.of(Farewell))
    with pytest.raises(AssertionError, match=r"lingering socket from 127\.0\.0\.1:\d+ to 127\.0\.0\.1:\d+") as caught:
        with leak_check(patience=0.02):
            client = peer(server)
            recorder.wait_for("on_close")
    assert "channel <" not in str(caught.value)
    client.close()


def test_leak_check_file_is_named(tmp_path):
    path = tmp_path / "forgotten"
    path.touch()
    with pytest.raises(AssertionError, match=r"1 left over:\n  descriptor \d+, .*/forgotten$"):
        with leak_check(patience=0.02):
            descriptor = os.open(path, os.O_RDONLY)
    os.close(descriptor)


def test_leak_check_socket_is_named_with_both_addresses():
    with PlainSocket(stdlib_socket.AF_INET, stdlib_socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        host, port = listener.getsockname()
        with pytest.raises(AssertionError, match=rf"descriptor \d+, socket:\[\d+\] from {host}:\d+ to {host}:{port}"):
            with leak_check(patience=0.02):
                client = PlainSocket(stdlib_socket.AF_INET, stdlib_socket.SOCK_STREAM)
                client.connect((host, port))
        # Looking at it has not closed it.
        assert client.getpeername() == (host, port)
        client.close()


def test_leak_check_descriptor_reused_for_something_else_is_seen(tmp_path):
    (tmp_path / "before").touch()
    (tmp_path / "after").touch()
    descriptor = os.open(tmp_path / "before", os.O_RDONLY)
    with pytest.raises(AssertionError, match=rf"1 left over:\n  descriptor {descriptor}, .*/after$"):
        with leak_check(patience=0.02):
            os.close(descriptor)
            assert os.open(tmp_path / "after", os.O_RDONLY) == descriptor
    os.close(descriptor)


def test_leak_check_all_leftovers_are_named_at_once(tmp_path):
    event = Event()
    with pytest.raises(AssertionError, match="3 left over") as caught:
        with leak_check(patience=0.02):
            gevent.spawn(wait_in_vain, event)
            gevent.spawn(wait_in_vain, event)
            descriptor = os.open(tmp_path, os.O_RDONLY)
    assert str(caught.value).count("waiting in wait_in_vain") == 2
    event.set()
    os.close(descriptor)


def test_leak_check_what_was_there_before_is_nobodys_leak(server_of, peer):
    event = Event()
    old = gevent.spawn(wait_in_vain, event)
    client = peer(server_of(Echo))
    client.send(b"x")
    assert client.recv() == b"x"
    with leak_check() as check:
        client.send(b"y")
        assert client.recv() == b"y"
        assert check.leftovers() == []
    event.set()
    old.join()


def test_leak_check_what_is_on_its_way_out_is_waited_for():
    event = Event()
    with leak_check():
        leaving = gevent.spawn(wait_in_vain, event)
        gevent.spawn_later(0.05, event.set)
    assert leaving.dead


def test_leak_check_waits_no_longer_than_necessary():
    event = Event()
    leaving = []
    with leak_check(patience=20):
        leaving.append(gevent.spawn(wait_in_vain, event))
        gevent.get_hub().loop.run_callback(event.set)
    assert leaving[0].dead


def test_leak_check_idle_greenlets_of_the_engine_do_not_count():
    engine = Engine.instance()
    running = []
    with leak_check() as check:
        for _ in range(20):
            engine.callback(lambda: running.append(getcurrent()) or gevent.sleep(0.001))
        gevent.sleep(0)
        while len(running) < 20:
            gevent.sleep(0.001)
        assert len(check.leftovers()) == 20
    assert len(engine._pool) >= 20
    assert len(set(map(id, running))) == 20


def test_leak_check_greenlet_that_its_pool_has_dropped_is_named():
    """It waits for a job that will never come, and nothing ends it."""
    engine = Engine.instance()
    kept = engine._pool.clear()
    try:
        with pytest.raises(AssertionError, match=r"1 left over:\n  greenlet <Worker .* which its pool has dropped"):
            with leak_check(patience=0.02):
                done = Event()
                engine.callback(done.set)
                done.wait()
                gevent.sleep(0)
                (dropped,) = engine._pool.clear()
    finally:
        engine._pool._free.extend(kept)
    with leak_check() as check:
        assert check.leftovers() == []  # not the leak of those who come later
    gevent.get_hub().loop.run_callback(dropped.throw)
    gevent.sleep(0)
    assert dropped.dead


def test_leak_check_body_raises_its_exception_goes_on():
    event = Event()
    with pytest.raises(ZeroDivisionError):
        with leak_check(patience=0.02):
            gevent.spawn(wait_in_vain, event)
            _ = 1 / 0
    event.set()


def test_leak_check_nothing_left_collects_no_garbage(monkeypatch):
    """It runs after every test, and a collection takes longer than most of them."""
    collected = []
    monkeypatch.setattr(gc, "collect", lambda *args: collected.append(args))
    with leak_check():
        _, end = memory_pair(Echo)
        end.send(b"x")
        assert end.wait_for(1) == b"x"
        end.close()
        end.wait_for()
    assert collected == []


def test_leak_check_greenlet_in_a_garbage_cycle_is_no_leak():
    with leak_check():
        holder = []
        never_begun = greenlet(holder.append, gevent.get_hub())
        holder.append(never_begun)
        holder.append(holder)
        del holder, never_begun


LEAKY_TEST = """
    import gevent
    from gevent.event import Event

    pytest_plugins = ["pants_green.testing.pytest_plugin"]

    def forgotten():
        Event().wait()

    def test_leaky(no_leaks):
        no_leaks.patience = 0.02
        gevent.spawn(forgotten)

    def test_clean(no_leaks):
        gevent.sleep(0)

    def test_without():
        gevent.spawn(forgotten)
"""


def test_fixture_no_leaks_fails_the_test_that_leaks_and_no_other(tmp_path):
    (tmp_path / "test_leaky.py").write_text(textwrap.dedent(LEAKY_TEST))
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = run_pytest(tmp_path, root)
    assert "3 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert "ERROR at teardown of test_leaky" in done.stdout
    assert "in forgotten (test_leaky.py" in done.stdout


def run_pytest(folder, root):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=25,
        check=False,
    )


# ---- fragmentations


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 8, 17, 256])
def test_fragmentations_of_short_data_are_complete(size):
    data = bytes(number % 256 for number in range(size))
    every = [tuple(pieces) for pieces in fragmentations(data)]
    assert all(b"".join(pieces) == data for pieces in every)
    assert all(all(pieces) for pieces in every)
    assert len(set(every)) == len(every)
    wanted = [tuple(bytes([byte]) for byte in data)]
    wanted += [(data[:cut], data[cut:]) for cut in range(1, size)]
    wanted += [tuple(data[start : start + width] for start in range(0, size, width)) for width in (2, 3, 5, 7)]
    wanted += [(data,)] if data else [()]
    assert set(wanted) <= set(every)


@pytest.mark.parametrize("size", [2, 3])
def test_fragmentations_of_very_short_data_are_all_there_are(size):
    every = {tuple(pieces) for pieces in fragmentations(b"abc"[:size])}
    assert len(every) == 2 ** (size - 1)


@pytest.mark.parametrize("size", [257, 10_000, 65_537, 1_000_000])
def test_fragmentations_of_long_data_are_not_too_many(size):
    data = bytes(size)
    ways = [len(pieces) for pieces in fragmentations(data)]
    assert 20 < len(ways) < 150
    assert sum(ways) < 20 * size
    assert (size in ways) is (size <= 65536)
    assert all(sum(map(len, pieces)) == size for pieces in fragmentations(data))
    assert {1, 2} <= set(ways)


def test_fragmentations_cut_next_to_both_ends_of_long_data():
    cuts = {len(pieces[0]) for pieces in fragmentations(bytes(5000)) if len(pieces) == 2}
    assert {1, 2, 3, 4998, 4999, 2500, 4096} <= cuts


def test_fragmentations_of_a_bytearray_are_bytes():
    assert {type(piece) for pieces in fragmentations(bytearray(b"abc")) for piece in pieces} == {bytes}


@given(data=st.binary(max_size=80), draw=st.data())
def test_fragments_join_to_what_was_cut(data, draw):
    pieces = draw.draw(fragments(data))
    assert b"".join(pieces) == data
    assert all(pieces)


@given(pieces=fragments(st.just(b"abc")))
def test_fragments_of_a_strategy_are_fragments_of_what_it_gives(pieces):
    assert b"".join(pieces) == b"abc"


def test_fragments_shrink_to_one_piece_and_reach_single_bytes():
    assert find(fragments(b"abcdef"), lambda pieces: True) == [b"abcdef"]
    assert find(fragments(b"abcdef"), lambda pieces: len(pieces) == 6) == [b"a", b"b", b"c", b"d", b"e", b"f"]
    assert find(fragments(b"abcdef"), lambda pieces: b"d" in pieces) == [b"abc", b"d", b"ef"]


# ---- memory_pair


def test_memory_pair_of_two_classes_is_connected(recorder):
    class Asking(Stream):
        def on_connect(self):
            recorder("connected", self.connected)
            self.write(b"hello")

        def on_read(self, data):
            recorder("answer", data)
            self.end()

        def on_close(self):
            recorder("closed", self.close_reason)

    left, right = memory_pair(Asking, Echo)
    assert (type(left), type(right)) == (Asking, Echo)
    assert not left.connected  # callbacks run in the hub, never in this call
    recorder.wait_for(3)
    assert recorder == [("connected", True), ("answer", b"hello"), ("closed", CloseReason.ENDED_HERE)]


def test_memory_pair_of_instances_keeps_what_was_set_on_them(recorder):
    left, right = recorder.of(Stream)(), Stream()
    left.read_delimiter = b"\n"
    assert memory_pair(left, right) == (left, right)
    recorder.wait_for("on_connect")
    right.write(b"one\ntwo\nthr")
    right.end()
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("on_read", b"one"), ("on_read", b"two"), ("on_end", b"thr"), ("on_close",)]


def test_memory_pair_addresses_are_those_of_each_other():
    left, right = memory_pair(Stream, Stream)
    gevent.sleep(0)
    assert left.local_address == right.remote_address != right.local_address == left.remote_address
    assert left.remote_address[0] == "memory"
    left.abort()
    right.abort()
    assert left.remote_address[0] == "memory"


def test_memory_pair_opens_no_descriptor():
    before = os.listdir("/proc/self/fd")
    left, right = memory_pair(Echo, Stream)
    gevent.sleep(0)
    assert os.listdir("/proc/self/fd") == before
    assert left.fileno < 0
    left.abort()
    right.abort()


def test_memory_pair_streams_are_channels_of_their_engine():
    left, right = memory_pair(Stream, Stream)
    gevent.sleep(0)
    assert {left, right} <= set(Engine.instance().channels)
    left.abort()
    right.abort()
    assert not {left, right} & set(Engine.instance().channels)


def test_memory_pair_each_send_is_a_receive(recorder):
    _, end = memory_pair(recorder.of(Stream, "on_read", "on_end"))
    pieces = [b"a", b"bc", b"d" * 3000]
    for piece in pieces:
        end.send(piece)
    end.close()
    recorder.wait_for("on_end")
    assert recorder == [("on_read", piece) for piece in pieces] + [("on_end", b"")]


def test_memory_pair_long_send_is_received_in_parts(recorder):
    _, end = memory_pair(recorder.of(Stream, "on_read", "on_end"))
    end.send(b"x" * 100_000)
    end.close()
    recorder.wait_for("on_end")
    parts = [event[1] for event in recorder if event[0] == "on_read"]
    assert len(parts) > 1
    assert b"".join(parts) == b"x" * 100_000


def test_memory_pair_backpressure_a_send_takes_no_more_than_the_other_side_has_room_for(recorder):
    go = Event()

    class Slow(Stream):
        def on_read(self, data):
            recorder(len(data))
            go.wait()

    left, right = memory_pair(Stream, Slow, capacity=1000)
    gevent.sleep(0)
    left.write(b"x" * 10_000)
    recorder.wait_for(1)
    for _ in range(5):
        gevent.sleep(0)
    # 1000 bytes are with the slow reader, 1000 more are on their way, and the rest waits for room.
    assert recorder == [1000]
    assert left._pending == 8000
    go.set()
    recorder.wait_for(lambda sizes: sum(sizes) == 10_000)
    assert max(recorder) <= 1000
    assert left._pending == 0
    left.close()
    right.close()


def test_memory_pair_backpressure_the_test_makes_room_by_receiving():
    stream, end = memory_pair(Stream, capacity=1000)
    gevent.sleep(0)
    stream.write(b"x" * 2500, flush=True)
    gevent.sleep(0)
    assert stream._pending == 1500
    assert end.received() == b"x" * 1000
    gevent.sleep(0.001)
    assert end.received() == b"x" * 2000
    assert end.wait_for(2500) == b"x" * 2500
    end.close()


def test_memory_pair_half_close_the_answer_still_comes(recorder):
    class Answering(Stream):
        def on_end(self, rest):
            self.write(b"you said " + b"".join(event[1] for event in recorder))

        def on_read(self, data):
            recorder("on_read", data)

    stream, end = memory_pair(Answering)
    end.send(b"this")
    end.send(b" and that")
    end.shutdown_output()
    assert end.wait_for() == b"you said this and that"
    assert end.at_eof
    assert not end.was_reset
    assert stream.close_reason is CloseReason.PEER_ENDED


def test_memory_pair_write_eof_ends_one_direction(recorder):
    stream, end = memory_pair(recorder.of(Stream))
    recorder.wait_for("on_connect")
    stream.write(b"last words")
    stream.write_eof()
    assert end.wait_for() == b"last words"
    assert stream.connected
    end.send(b"answer")
    recorder.wait_for(("on_read", b"answer"))
    end.close()
    recorder.wait_for("on_close")


def test_memory_pair_abort_is_a_reset_to_the_other_side(recorder):
    left, right = memory_pair(Stream, recorder.of(Stream, "on_end", "on_read_error", "on_close"))
    gevent.sleep(0)
    left.abort()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_read_error", "on_close"]
    assert isinstance(recorder[0][1], ConnectionResetError)
    assert right.close_reason is CloseReason.PEER_LEFT


def test_memory_pair_abort_is_seen_by_the_hand_driven_end():
    stream, end = memory_pair(Stream)
    gevent.sleep(0)
    stream.write(b"said", flush=True)
    stream.abort()
    assert end.wait_for() == b"said"
    assert end.was_reset
    with pytest.raises(ConnectionResetError):
        end.send(b"x")


def test_memory_pair_reset_by_hand_closes_the_stream(recorder):
    stream, end = memory_pair(recorder.of(Stream))
    recorder.wait_for("on_connect")
    end.reset()
    recorder.wait_for("on_close")
    assert stream.close_reason is CloseReason.PEER_LEFT
    assert isinstance(stream.close_error, ConnectionResetError)


def test_memory_pair_bytes_before_a_reset_are_still_received(recorder):
    _, end = memory_pair(recorder.of(Stream))
    end.send(b"last")
    end.reset()
    recorder.wait_for("on_close")
    assert ("on_read", b"last") in recorder
    assert "on_end" not in recorder.names()


def test_memory_pair_writing_to_a_closed_end_is_a_broken_pipe(recorder):
    class Talking(Stream):
        allow_half_open = True

        def on_end(self, rest):
            self.write(b"is anybody there?", flush=True)

    stream, end = memory_pair(recorder.of(Talking, "on_close"))
    end.close()
    recorder.wait_for("on_close")
    assert stream.close_reason is CloseReason.PEER_LEFT
    assert isinstance(stream.close_error, BrokenPipeError)


def test_memory_pair_close_sends_what_there_is_room_for():
    stream, end = memory_pair(Stream)
    gevent.sleep(0)
    stream.write(b"bye")
    stream.close()
    assert end.wait_for() == b"bye"
    with pytest.raises(BrokenPipeError):
        end.send(b"too late")


def test_memory_pair_end_lingers_until_the_other_side_is_done(recorder):
    stream, end = memory_pair(recorder.of(Stream))
    recorder.wait_for("on_connect")
    stream.write(b"answer")
    stream.end()
    assert end.wait_for() == b"answer"
    recorder.wait_for("on_close")
    assert len(Engine.instance()._lingering) == 1
    end.send(b"still talking")  # which is read and thrown away, and destroys nothing
    end.wait_for(lambda: end.all_taken)
    end.close()
    while Engine.instance()._lingering:
        gevent.sleep(0)
    assert "on_read" not in recorder.names()


def test_memory_pair_many_bytes_both_ways_arrive(recorder):
    left, right = memory_pair(recorder.of(Stream, "on_read"), Echo, capacity=777)
    gevent.sleep(0)
    data = bytes(range(256)) * 400
    left.write(data)
    recorder.wait_for(lambda events: sum(len(event[1]) for event in events) >= len(data))
    assert b"".join(event[1] for event in recorder) == data
    left.close()
    right.close()


def test_memory_pair_other_streams_get_their_turn(recorder):
    """A stream that always has something to read does not hold up the hub."""

    class PingPong(Stream):
        def on_read(self, data):
            recorder(data)
            self.write(data)

    left, right = memory_pair(PingPong, PingPong)
    gevent.sleep(0)
    left.write(b"ball")
    with gevent.Timeout(5):
        while len(recorder) < 200:
            gevent.sleep(0)
    left.abort()
    right.abort()


def test_memory_end_wait_for_in_vain_is_an_assertion_error():
    stream, end = memory_pair(Echo)
    end.send(b"abc")
    with pytest.raises(AssertionError, match=r"waited 0\.02 seconds in vain; received so far: b'abc'"):
        end.wait_for(4, timeout=0.02)
    assert isinstance(end, MemoryEnd)
    stream.abort()


def test_memory_end_wait_for_a_condition_of_its_own():
    stream, end = memory_pair(Echo)
    end.send(b"a")
    end.send(b"b")
    assert end.wait_for(lambda: end.received() == b"ab") == b"ab"
    assert end.all_taken
    stream.abort()


def test_memory_pair_used_stream_is_refused():
    stream, end = memory_pair(Stream)
    with pytest.raises(ChannelStateError, match="used already"):
        memory_pair(stream)
    gevent.sleep(0)
    end.close()
    end.wait_for()
    with pytest.raises(ChannelStateError, match="used already"):
        memory_pair(Stream(), stream)


@pytest.mark.parametrize(
    ("arguments", "keywords", "kind"),
    [
        ((object(),), {}, TypeError),
        ((Server,), {}, TypeError),
        ((Stream, 5), {}, TypeError),
        ((Stream,), {"capacity": 0}, ValueError),
        ((Stream,), {"capacity": -1}, ValueError),
        ((Stream,), {"capacity": 1.5}, TypeError),
        ((Stream,), {"capacity": True}, TypeError),
    ],
)
def test_memory_pair_wrong_arguments_are_refused(arguments, keywords, kind):
    with pytest.raises(kind, match=r"memory_pair|capacity"):
        memory_pair(*arguments, **keywords)


# ---- the peers of this suite


def test_peer_is_a_plain_socket_whose_waiting_lets_the_hub_run(server_of, peer):
    client = peer(server_of(Echo))
    assert type(client.socket) is PlainSocket
    assert not issubclass(PlainSocket, gevent.socket.socket)
    assert client.socket.gettimeout() == 10
    client.send(b"over the wire")
    assert client.recv_until(b"the ") == b"over the "
    assert client.recv_exactly(4) == b"wire"


def test_peer_tells_a_fin_from_a_reset(server_of, peer):
    class Parting(Stream):
        def on_read(self, data):
            if data == b"close":
                self.close()
            elif data == b"abort":
                self.abort()

    server = server_of(Parting)
    for word, reset in ((b"close", False), (b"abort", True)):
        client = peer(server)
        client.send(word)
        assert client.raises_reset() is reset


def test_peer_at_eof_keeps_what_it_has_read(server_of, peer):
    class Greeting(Stream):
        def on_connect(self):
            self.write(b"hi")
            self.end()

    client = peer(server_of(Greeting))
    assert not client.at_eof()
    assert client.recv_all() == b"hi"
    assert client.at_eof()


def test_listening_peer_accepts_plain_sockets(listening_peer, recorder):
    listener = listening_peer()
    stream = recorder.of(Stream)()
    stream.connect(listener.address)
    with listener.accept() as client:
        assert type(client.socket) is PlainSocket
        client.send(b"hello")
        recorder.wait_for(("on_read", b"hello"))
        client.reset()
        recorder.wait_for("on_close")
    assert stream.close_reason is CloseReason.PEER_LEFT


def test_recorder_wait_for_in_vain_says_what_was_recorded(recorder):
    recorder("something")
    with pytest.raises(AssertionError, match=r"0\.01 seconds for 'other'; recorded: \['something'\]"):
        recorder.wait_for("other", timeout=0.01)
