"""The engine: binding, start and stop, poll, timers, threads, interrupts, contexts, forks, and the module that stands for it."""

import contextlib
import contextvars
import gc
import inspect
import logging
import math
import signal
import socket as stdlib_socket
import textwrap
import threading
import time
import weakref
from itertools import pairwise
from time import monotonic

import gevent
import gevent.socket
import pytest
from children import Child, keyboard_interrupts
from gevent import monkey
from gevent.event import Event
from greenlet import getcurrent
from peers import PlainSocket, in_new_thread, in_thread, plain_lock, start_thread

import pants_green
from pants_green import Connection, Engine, Server, Stream, engine
from pants_green.errors import ChannelStateError, WrongThreadError

get_ident = monkey.get_original("_thread", "get_ident")
sleep_for_real = monkey.get_original("time", "sleep")

PATCHED = monkey.is_module_patched("threading")

#: Seconds between two runs of a loop function in an idle engine.
LOOP_INTERVAL = 0.02

LOOPBACK = ("127.0.0.1", 0)

variable = contextvars.ContextVar("variable", default="default")


class Echo(Stream):
    __slots__ = ()

    def on_read(self, data):
        self.write(data)


class OwnEngine(Engine):
    """Remembers what would go on for ever."""

    def __init__(self):
        super().__init__()
        self.handles = []

    def cycle(self, *args, **kwargs):
        self.handles.append(super().cycle(*args, **kwargs))
        return self.handles[-1]

    def loop(self, *args, **kwargs):
        self.handles.append(super().loop(*args, **kwargs))
        return self.handles[-1]


@pytest.fixture
def own():
    """Return an engine of the test's own; what a failed test has left in it does not go on."""
    made = OwnEngine()
    yield made
    for handle in made.handles:
        handle.cancel()


def run(source, *arguments):
    """Run a program in a process of its own; return its exit code, its output and what it wrote to stderr."""
    with Child("-c", textwrap.dedent(source), *arguments) as child:
        return child.end(), child.output, child.error_output()


def plain_connection(server):
    """Return a plain socket that waits in the backlog of `server`: nothing has switched."""
    sock = PlainSocket(stdlib_socket.AF_INET, stdlib_socket.SOCK_STREAM)
    sock.settimeout(10)
    sock.connect(server.local_address)
    return sock


# ---- binding


def test_import_and_constructors_make_no_hub_greenlet_thread_or_descriptor():
    code, output, errors = run("""
        import gc, os, threading
        import gevent, greenlet
        from gevent._hub_local import get_hub_if_exists

        before = len(os.listdir("/dev/fd"))
        from pants_green import Engine, Server, Stream, engine

        made = [Engine(), Engine.instance(), Server(), Stream(), Server(engine=engine), Stream(engine=Engine())]
        print(*made, Engine.instance().channels, sep="; ")
        print(get_hub_if_exists(), threading.active_count(), len(os.listdir("/dev/fd")) - before)
        print([one for one in gc.get_objects() if isinstance(one, greenlet.greenlet) and one is not greenlet.getcurrent()])
    """)
    assert (code, errors) == (0, "")
    assert output.splitlines()[1:] == ["None 1 0", "[]"]


def test_engine_instance_is_the_same_in_one_thread_and_another_in_another():
    here = Engine.instance()
    assert Engine.instance() is here
    assert Engine() is not here
    assert gevent.spawn(Engine.instance).get() is here
    there, again = in_new_thread(lambda: (Engine.instance(), Engine.instance()))
    assert there is again
    assert there is not here
    assert isinstance(there, Engine)


def test_engine_made_in_one_thread_belongs_to_the_thread_that_first_uses_it(own, recorder):
    made = in_new_thread(Engine)
    made.callback(recorder, "ran")
    recorder.wait_for("ran")
    with pytest.raises(WrongThreadError):
        in_new_thread(made.callback, recorder, "never")


def test_engine_repr_tells_whether_it_runs(own):
    said = [repr(own)]
    own.callback(lambda: (said.append(repr(own)), own.stop()))
    said.append(repr(own))
    own.start()
    assert said[0] == "<Engine, not used yet>"
    assert "not running" in said[1]
    assert "running" in said[2]
    assert "not running" not in said[2]


# ---- start and stop


def test_start_runs_until_stop(own, recorder):
    own.callback(recorder, "first")
    own.defer(0.01, lambda: (recorder("second"), own.stop()))
    own.start()
    assert recorder == ["first", "second"]


def test_start_while_it_runs_returns_at_once(own, recorder):
    def nested():
        own.start()
        recorder("in a callback")
        gevent.spawn(own.start).join()
        recorder("in another greenlet")
        own.stop()

    own.callback(nested)
    own.start()
    assert recorder == ["in a callback", "in another greenlet"]


def test_start_after_stop_runs_again(own, recorder):
    for number in range(3):
        own.callback(lambda number=number: (recorder(number), own.stop(), own.stop()))
        own.start()
    assert recorder == [0, 1, 2]


def test_start_in_a_greenlet_that_is_not_the_main_one_returns_at_stop(own, recorder):
    runner = gevent.spawn(own.start)
    own.callback(recorder, "ran")
    recorder.wait_for("ran")
    assert not runner.ready()
    own.stop()
    runner.join()
    assert runner.successful()


def test_start_called_in_the_hub_is_refused(own, recorder):
    def in_the_hub():
        try:
            own.start()
        except ChannelStateError as error:
            recorder(str(error))

    gevent.get_hub().loop.run_callback(in_the_hub)
    recorder.wait_for(1)
    assert "hub" in recorder[0]


def test_stop_before_the_end_of_a_turn_lets_the_others_of_the_turn_run(own, recorder):
    own.callback(own.stop)
    own.callback(recorder, "also ran")
    own.start()
    gevent.sleep(0)
    assert recorder == ["also ran"]


def test_stop_while_it_does_not_run_has_no_effect(own, recorder):
    own.stop()
    own.stop()
    gevent.sleep(0)
    own.defer(0.02, lambda: (recorder("late"), own.stop()))
    own.start()
    assert recorder == ["late"]


def test_start_is_not_ended_by_switches_of_others(own, recorder):
    main = getcurrent()
    for _ in range(3):
        own.defer(0.001, lambda: gevent.get_hub().loop.run_callback(main.switch))
    own.defer(0.03, lambda: (recorder("stopped"), own.stop()))
    own.start()
    assert recorder == ["stopped"]


def test_stop_leaves_channels_as_they_are(server_of, peer):
    server = server_of(Echo)
    one = peer(server)
    Engine.instance().callback(Engine.instance().stop)
    Engine.instance().start()
    assert server.listening
    one.send(b"still there")
    assert one.recv_exactly(11) == b"still there"


def test_never_started_engine_serves_as_soon_as_the_hub_runs(server_of, peer):
    assert "not running" in repr(Engine.instance())
    one = peer(server_of(Echo))
    one.send(b"hello")
    assert one.recv_exactly(5) == b"hello"


@pytest.mark.parametrize("what", ["nothing", "server"])
def test_s3_10_start_with_nothing_to_do_blocks_and_uses_no_cpu(what):
    code, output, errors = run(
        """
        import sys, threading, time
        from pants_green import Engine, Server

        engine = Engine.instance()
        server = Server()
        if sys.argv[1] == "server":
            server.listen(("127.0.0.1", 0))

        def measure():
            global began, used
            began, used = time.monotonic(), time.process_time()

        def later():
            while began is None:
                time.sleep(0.01)
            time.sleep(0.3)
            engine.call_from_thread(engine.stop)

        began = None
        engine.callback(measure)
        thread = threading.Thread(target=later)
        thread.start()
        engine.start()
        print(time.process_time() - used, time.monotonic() - began)
        """,
        what,
    )
    assert (code, errors) == (0, "")
    used, passed = map(float, output.split())
    assert passed >= 0.3
    assert used < 0.12


def test_s3_11_without_start_the_program_ends_and_nobody_is_served():
    code, output, errors = run("""
        import socket
        from pants_green import Server, Stream

        class Echo(Stream):
            def on_connect(self):
                print("served")

        server = Server(ConnectionClass=Echo)
        server.listen(("127.0.0.1", 0))
        peer = socket.create_connection(server.local_address)
        print("end")
    """)
    assert (code, output, errors) == (0, "end\n", "")


def test_latest_poll_time_is_wall_clock_and_goes_on():
    one = Engine.instance()
    gevent.sleep(0)
    before = one.latest_poll_time
    assert abs(before - time.time()) < 60
    sleep_for_real(0.02)
    assert one.latest_poll_time == before  # the hub has not looked
    gevent.sleep(0.001)
    assert one.latest_poll_time > before


def test_s1_3_s3_1_one_engine_knows_and_runs_all_channels_and_timers(server_of, peer, recorder):
    servers = [server_of(Echo) for _ in range(4)]
    peers = [peer(server) for server in servers for _ in range(3)]
    beats = engine.cycle(0.001, recorder, "beat")
    for number, one in enumerate(peers):
        one.send(b"%d" % number)
    for number, one in enumerate(peers):
        assert one.recv_exactly(len(str(number))) == b"%d" % number
    streams = [stream for server in servers for stream in server.channels.values()]
    assert len(streams) == 12
    assert set(Engine.instance().channels) == {*servers, *streams}
    assert all(channel.engine is Engine.instance() for channel in Engine.instance().channels)
    recorder.wait_for(3)
    beats.cancel()


def test_s1_11_cooperative_blocking_does_not_stop_the_others(server_of, peer, recorder):
    release = Event()

    def on_read(self, data):
        if data == b"wait":
            recorder("waiting")
            release.wait()
        self.write(data)

    server = server_of(Stream, on_read=on_read)
    blocked, other = peer(server), peer(server)
    engine.callback(release.wait)
    blocked.send(b"wait")
    recorder.wait_for("waiting")
    engine.defer(0.001, recorder, "timer")
    recorder.wait_for("timer")
    other.send(b"hello")
    assert other.recv_exactly(5) == b"hello"
    release.set()
    assert blocked.recv_exactly(4) == b"wait"


def test_s3_2_s3_3_start_dispatches_events_and_timers_side_by_side(server_of, recorder):
    server = server_of(recorder.of(Echo))
    one = Engine.instance()
    beats = one.cycle(0.001, recorder, "beat")
    with plain_connection(server) as sock:
        sock.sendall(b"hello")
        sock.shutdown(stdlib_socket.SHUT_WR)
        done = gevent.spawn(lambda: (recorder.wait_for("on_close"), recorder.wait_for("beat"), one.stop()))
        one.start()
        done.get()
        beats.cancel()
        assert sock.recv(100) == b"hello"
    assert [event for event in recorder.names() if event != "beat"] == ["on_connect", "on_read", "on_end", "on_close"]


# ---- poll


def test_poll_with_nothing_done_returns_false_at_the_timeout(server_of):
    server_of(Echo)
    while engine.poll(0):
        pass  # what the test before has left to do
    began = monotonic()
    assert engine.poll(0.05) is False
    assert monotonic() - began > 0.04


@pytest.mark.parametrize("kind", ["callback", "defer 0", "defer", "cycle", "loop", "call_from_thread"])
def test_poll_returns_true_when_a_timer_ran(kind, own, recorder):
    handle = {
        "callback": lambda: own.callback(recorder, kind),
        "defer 0": lambda: own.defer(0, recorder, kind),
        "defer": lambda: own.defer(0.01, recorder, kind),
        "cycle": lambda: own.cycle(0.01, recorder, kind),
        "loop": lambda: own.loop(recorder, kind),
        "call_from_thread": lambda: own.call_from_thread(recorder, kind),
    }[kind]()
    assert own.poll(10) is True
    assert recorder[:1] == [kind]
    handle.cancel()
    own.poll(0)


def test_poll_without_limit_waits_for_a_timer(own, recorder):
    own.defer(0.02, recorder, "ran")
    assert own.poll(None) is True
    assert recorder == ["ran"]


def test_poll_of_a_cancelled_timer_returns_false(own, recorder):
    own.defer(0.01, recorder, "never").cancel()
    own.callback(recorder, "never").cancel()
    assert own.poll(0.05) is False
    assert recorder == []


def test_poll_three_times_runs_a_callback_once(own, recorder):
    own.callback(recorder, "ran")
    assert [own.poll(0.01) for _ in range(3)] == [True, False, False]
    assert recorder == ["ran"]


def test_poll_returns_true_for_every_event_of_a_channel(server_of, recorder):
    server = server_of(recorder.of(Stream), read_delimiter=b"\n")
    one = Engine.instance()
    with plain_connection(server) as sock:
        assert one.poll(3) is True
        assert recorder == [("on_connect",)]
        for count in (2, 3):
            sock.sendall(b"line\n")
            assert one.poll(3) is True
            assert len(recorder) == count
        sock.shutdown(stdlib_socket.SHUT_WR)
        assert one.poll(3) is True
        recorder.wait_for("on_close")


def test_poll_returns_true_when_a_dial_succeeds_or_fails(server_of, listening_peer, recorder):
    listener = listening_peer()
    good = recorder.of(Stream, "on_connect", "on_connect_error")().connect(listener.address)
    while "on_connect" not in recorder.names():
        assert engine.poll(3) is True
    listener.close()
    good.abort()
    engine.poll(0)
    recorder.of(Stream, "on_connect", "on_connect_error")().connect(listener.address)
    while "on_connect_error" not in recorder.names():
        assert engine.poll(3) is True


def test_poll_is_not_ended_by_greenlets_that_are_none_of_ours(own):
    turns = []

    def foreign():
        for _ in range(50):
            gevent.sleep(0)
            turns.append(1)
        with gevent.Timeout(0.001, False):
            Event().wait()

    greenlets = [gevent.spawn(foreign) for _ in range(3)]
    assert own.poll(0.1) is False
    gevent.joinall(greenlets)
    assert len(turns) == 150


def test_poll_in_two_greenlets_wakes_both(own, recorder):
    polls = [gevent.spawn(own.poll, 10) for _ in range(2)]
    own.defer(0.01, recorder, "ran")
    assert [one.get() for one in polls] == [True, True]


# ---- timers


def test_callback_runs_in_the_next_turn_with_its_arguments_and_in_order(own, recorder):
    def note(*args, **kwargs):
        recorder(args, kwargs)

    own.callback(note, 1, two=2)
    own.callback(note)
    own.defer(0, note, "defer 0")
    own.call_from_thread(note, "from here", key="word")
    assert recorder == []
    recorder.wait_for(4)
    assert recorder == [((1,), {"two": 2}), ((), {}), (("defer 0",), {}), (("from here",), {"key": "word"})]


def test_defer_and_cycle_and_loop_pass_their_arguments(own, recorder):
    def note(*args, **kwargs):
        recorder(args, tuple(kwargs))

    own.defer(0.001, note, "defer", one=1, two=2)
    cycle = own.cycle(0.001, note, "cycle", one=1)
    loop = own.loop(note, "loop", one=1)
    recorder.wait_for(lambda seen: {one[0][0] for one in seen} == {"defer", "cycle", "loop"})
    cycle.cancel()
    loop.cancel()
    assert set(recorder) == {(("defer",), ("one", "two")), (("cycle",), ("one",)), (("loop",), ("one",))}


@pytest.mark.parametrize("kind", ["callback", "defer", "cycle", "loop"])
def test_timer_that_blocks_does_not_hold_up_the_others(kind, own, recorder):
    release = Event()

    def blocks():
        recorder("began")
        gevent.sleep(0)
        release.wait()
        recorder("ended")

    add = {"callback": own.callback, "defer": own.defer, "cycle": own.cycle, "loop": own.loop}[kind]
    delay = () if kind in ("callback", "loop") else (0.001,)
    handles = [add(*delay, blocks), own.cycle(0.001, recorder, "beat"), own.loop(recorder, "turn")]
    recorder.wait_for("began")
    own.callback(recorder, "callback")
    recorder.wait_for(lambda seen: min(map(seen.count, ("beat", "turn"))) > 3 and "callback" in seen)
    assert recorder.count("began") == 1
    for handle in handles:
        handle.cancel()
    assert "ended" not in recorder
    release.set()
    recorder.wait_for("ended")


@pytest.mark.parametrize("cancel", [lambda handle: handle(), lambda handle: handle.cancel()], ids=["call", "cancel"])
@pytest.mark.parametrize("kind", ["callback", "defer 0", "defer", "cycle", "loop", "call_from_thread"])
def test_d18_cancelled_timer_does_not_run_and_may_be_cancelled_again(kind, cancel, own, recorder):
    handle = {
        "callback": lambda: own.callback(recorder, "never"),
        "defer 0": lambda: own.defer(0, recorder, "never"),
        "defer": lambda: own.defer(0.005, recorder, "never"),
        "cycle": lambda: own.cycle(0.005, recorder, "never"),
        "loop": lambda: own.loop(recorder, "never"),
        "call_from_thread": lambda: own.call_from_thread(recorder, "never"),
    }[kind]()
    assert not handle.cancelled
    assert cancel(handle) is None
    assert cancel(handle) is None
    assert handle.cancelled
    own.defer(0.02, recorder, "later")
    recorder.wait_for("later")
    assert recorder == ["later"]
    cancel(handle)


def test_d18_cancel_after_the_run_is_harmless(own, recorder):
    handles = [own.callback(recorder, 1), own.defer(0.001, recorder, 2)]
    recorder.wait_for(2)
    for handle in handles:
        assert handle.cancelled
        handle.cancel()
        handle()
    own.defer(0.001, recorder, 3)
    recorder.wait_for(3)
    assert recorder == [1, 2, 3]


@pytest.mark.parametrize("kind", ["cycle", "loop"])
def test_e1_5_cycle_and_loop_cancel_themselves_from_inside(kind, own, recorder):
    def thrice():
        recorder(kind)
        if len(recorder) == 3:
            handle()
            gevent.sleep(0)  # also when the run goes on for a while

    handle = own.cycle(0.002, thrice) if kind == "cycle" else own.loop(thrice)
    recorder.wait_for(3)
    own.defer(0.05, recorder, "later")
    recorder.wait_for("later")
    assert recorder == [kind, kind, kind, "later"]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_e1_5_cancelling_one_of_several_with_the_same_due_time_cancels_that_one(victim, own, recorder):
    now = monotonic()
    own._clock = lambda: now
    handles = [own.defer(0.01, recorder, "same function, same due time", number) for number in range(3)]
    assert handles[0].when == handles[1].when == handles[2].when
    own._clock = monotonic
    handles[victim].cancel()
    own.defer(0.03, recorder, "later")
    recorder.wait_for("later")
    assert [one[1] for one in recorder[:-1]] == [number for number in range(3) if number != victim]


@pytest.mark.parametrize("kind", ["callback", "defer", "loop"])
def test_timer_cancelled_by_an_earlier_one_in_the_same_turn_does_not_run(kind, own, recorder):
    victims = []
    now = monotonic()
    own._clock = lambda: now

    def first():
        recorder("first")
        for victim in victims:
            victim.cancel()

    add = {"callback": own.callback, "defer": lambda *what: own.defer(0.01, *what), "loop": own.loop}[kind]
    handle = add(first)
    victims += [add(recorder, "never"), add(recorder, "never")]
    own._clock = monotonic
    recorder.wait_for("first")
    handle.cancel()
    own.defer(0.03, recorder, "later")
    recorder.wait_for("later")
    assert "never" not in recorder


def test_defer_runs_by_due_time_and_in_the_order_of_the_calls_when_equal(own, recorder):
    now = monotonic()
    own._clock = lambda: now
    for delay, name in ((0.03, "e"), (0.01, "b"), (0.02, "d"), (0.01, "c"), (0, "a")):
        own.defer(delay, recorder, name)
    own._clock = monotonic
    recorder.wait_for(5)
    assert "".join(recorder) == "abcde"


def test_defer_that_is_due_before_all_others_does_not_wait_for_them(own, recorder):
    handles = [own.defer(delay, recorder, "never") for delay in (3600, 1e9, 1e300)]
    own.defer(0.01, recorder, "soon")
    recorder.wait_for("soon")
    for handle in handles:
        handle.cancel()
    assert recorder == ["soon"]


def test_defer_zero_runs_in_the_next_turn_not_in_the_call_nor_in_this_turn(own, recorder):
    def first():
        own.defer(0, recorder, "second")
        recorder("first")

    own.defer(0, first)
    assert recorder == []
    recorder.wait_for(2)
    assert recorder == ["first", "second"]


def test_e1_5_delay_counts_from_the_call_and_not_from_a_stale_clock(own, recorder):
    def blocks_for_real():
        sleep_for_real(0.2)
        asked = monotonic()
        own.defer(0.1, lambda: recorder("defer", monotonic() - asked))
        cycle = own.cycle(0.1, lambda: (recorder("cycle", monotonic() - asked), cycle.cancel()))

    own.callback(blocks_for_real)
    recorder.wait_for(2)
    assert sorted(recorder.names()) == ["cycle", "defer"]
    assert min(passed for _, passed in recorder) >= 0.1


@pytest.mark.parametrize("add", ["defer", "cycle"])
def test_d17_delay_and_function_may_change_places(add, own, recorder):
    handle = getattr(own, add)(recorder, 0.001, "argument")
    recorder.wait_for(1)
    handle.cancel()
    assert recorder[0] == "argument"


@pytest.mark.parametrize("delay", [-1, -0.001, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("add", ["defer", "cycle"])
def test_delay_that_is_no_time_is_a_value_error(add, delay, own, recorder):
    with pytest.raises(ValueError, match="seconds"):
        getattr(own, add)(delay, recorder)
    with pytest.raises(ValueError, match="seconds"):
        getattr(own, add)(recorder, delay)


def test_cycle_of_zero_seconds_is_a_value_error(own, recorder):
    with pytest.raises(ValueError, match="loop"):
        own.cycle(0, recorder)


@pytest.mark.parametrize("delay", [None, "1", b"1", 1j, [1], True])
@pytest.mark.parametrize("add", ["defer", "cycle"])
def test_delay_of_another_type_is_a_type_error(add, delay, own, recorder):
    with pytest.raises(TypeError, match="seconds"):
        getattr(own, add)(delay, recorder)


@pytest.mark.parametrize("what", [None, "print", 5])
def test_function_that_cannot_be_called_is_a_type_error(what, own):
    for add in (own.callback, own.loop, own.call_from_thread, own.run_in_thread):
        with pytest.raises(TypeError, match="called"):
            add(what)
    for add in (own.defer, own.cycle):
        with pytest.raises(TypeError, match="called"):
            add(1, what)


@pytest.mark.parametrize("how", ["run", "cancel"])
def test_timer_lets_go_of_function_and_arguments_once_run_or_cancelled(how, own, recorder):
    class Thing:
        def method(self, *args, **kwargs):
            recorder("ran")

    thing, argument, keyword = Thing(), Thing(), Thing()
    left = [weakref.ref(thing), weakref.ref(argument), weakref.ref(keyword)]
    handles = [own.callback(thing.method, argument, key=keyword), own.defer(0.001, thing.method, argument, key=keyword)]
    del thing, argument, keyword
    gc.collect()
    assert all(ref() is not None for ref in left)
    if how == "cancel":
        for handle in handles:
            handle.cancel()
    else:
        recorder.wait_for(2)
    own.defer(0.001, recorder, "later")
    recorder.wait_for("later")
    gc.collect()
    assert [ref() for ref in left] == [None, None, None]


def test_cycle_does_not_drift_and_is_never_early(own):
    interval = 0.01
    beats, early = [], []
    done = Event()
    before = own._clock()

    def beat():
        beats.append(handle.when)
        early.append(handle.when - own._clock())
        if len(beats) == 8:
            handle.cancel()
            done.set()
        sleep_for_real(0.003)

    handle = own.cycle(interval, beat)
    after = own._clock()
    done.wait()
    assert before + interval <= beats[0] <= after + interval
    assert max(early) <= 0
    numbers = [(when - beats[0]) / interval for when in beats]
    assert all(abs(number - round(number)) < 1e-3 for number in numbers)
    assert all(later - earlier > 0.5 for earlier, later in pairwise(numbers))


def test_cycle_that_takes_longer_than_its_interval_leaves_beats_out_and_keeps_its_beat(own, recorder):
    interval = 0.02

    def beat():
        recorder(handle.when, own._clock())
        if len(recorder) == 1:
            sleep_for_real(2.5 * interval)
        if len(recorder) == 3:
            handle.cancel()

    handle = own.cycle(interval, beat)
    recorder.wait_for(3)
    (first, began), (second, _), _ = recorder
    number = (second - first) / interval
    assert number > 2.5
    assert abs(number - round(number)) < 1e-3
    assert second > began + 2.5 * interval


def test_cycle_that_is_blocked_does_not_overlap_itself(own, recorder):
    running = []

    def blocks():
        running.append(1)
        recorder("began", len(running))
        gevent.sleep(0.01)
        recorder("ended", len(running))
        running.pop()
        if len(recorder) >= 6:
            handle.cancel()

    handle = own.cycle(0.002, blocks)
    recorder.wait_for(6)
    assert recorder == [("began", 1), ("ended", 1)] * 3


class Odd(BaseException):
    """Neither an Exception nor a reason to end the program."""


@pytest.mark.parametrize("kind", ["callback", "defer", "call_from_thread"])
@pytest.mark.parametrize("error", [ValueError("oops"), Odd("oops")], ids=["Exception", "BaseException"])
def test_exception_in_a_timer_is_logged_with_its_traceback_and_harms_nobody(kind, error, own, recorder, caplog):
    def fails():
        raise error

    add = {"callback": own.callback, "defer": lambda what: own.defer(0.001, what), "call_from_thread": own.call_from_thread}[kind]
    add(fails)
    own.defer(0.01, recorder, "later")
    recorder.wait_for("later")
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.name == "pants_green.engine"
    assert "fails" in record.getMessage()
    assert "oops" in record.getMessage()
    assert record.exc_info[1] is error


@pytest.mark.parametrize("kind", ["cycle", "loop"])
def test_exception_in_a_cycle_or_loop_is_logged_and_it_goes_on(kind, own, recorder, caplog):
    def fails():
        recorder("ran")
        raise ValueError("oops")

    handle = own.cycle(0.001, fails) if kind == "cycle" else own.loop(fails)
    recorder.wait_for(3)
    handle.cancel()
    assert [record.levelname for record in caplog.records[:3]] == ["ERROR"] * 3


@pytest.mark.parametrize("error", [gevent.Timeout, gevent.GreenletExit], ids=["Timeout", "GreenletExit"])
def test_timeout_and_kill_in_a_timer_are_harmless(error, own, recorder):
    def fails():
        recorder("ran")
        raise error

    def waits():
        recorder("ran")
        gevent.kill(gevent.getcurrent(), error)
        Event().wait()

    handles = [own.cycle(0.001, fails), own.cycle(0.001, waits), own.loop(fails), own.loop(waits)]
    own.callback(waits)
    own.defer(0.001, fails)
    recorder.wait_for(20)
    for handle in handles:
        handle.cancel()
    own.callback(recorder, "later")
    recorder.wait_for("later")


# ---- loop


@contextlib.contextmanager
def counted_turns():
    """Count the turns of the hub with a watcher of gevent's own."""
    turns = []
    watcher = gevent.get_hub().loop.prepare()
    watcher.start(turns.append, 1)
    try:
        yield turns
    finally:
        watcher.stop()
        watcher.close()


def test_loop_runs_once_in_every_turn_of_the_hub(own):
    runs = []
    handle = own.loop(runs.append, 1)
    with counted_turns() as turns:
        for _ in range(30):
            gevent.sleep(0.0001)
        before = len(runs), len(turns)
    handle.cancel()
    assert before[1] >= 30
    assert abs(before[0] - before[1]) <= 1


def test_loop_in_an_idle_engine_runs_every_20_ms_at_most(own):
    runs = []
    began = monotonic()
    handle = own.loop(runs.append, 1)
    gevent.sleep(0.3)
    handle.cancel()
    assert 2 <= len(runs) <= (monotonic() - began) / LOOP_INTERVAL + 5


def test_loop_function_that_writes_does_not_spin_the_hub(server_of, recorder):
    server = server_of(recorder.of(Stream, "on_connect"))
    with plain_connection(server) as sock:
        recorder.wait_for("on_connect")
        (stream,) = server.channels.values()
        runs = []
        began = monotonic()
        handle = engine.loop(lambda: (runs.append(1), stream.write(b"x")))
        gevent.sleep(0.3)
        handle.cancel()
        count = len(runs)
        assert 2 <= count <= (monotonic() - began) / LOOP_INTERVAL + 5
        # All of it was sent, without anybody's help.
        sock.settimeout(0)
        assert sock.recv(10000) == b"x" * count


def test_loop_that_blocks_is_waited_for_and_does_not_overlap_itself(own, recorder):
    release = Event()

    def blocks():
        recorder("began")
        release.wait()
        recorder("ended")

    handle = own.loop(blocks)
    other = own.loop(recorder, "other")
    recorder.wait_for(lambda seen: seen.count("other") > 5)
    assert recorder.count("began") == 1
    release.set()
    recorder.wait_for(lambda seen: seen.count("ended") == 3)
    handle.cancel()
    other.cancel()
    blocking = [event for event in recorder if event != "other"]
    assert blocking[:6] == ["began", "ended"] * 3


def test_loop_added_and_cancelled_by_another_loop_function(own, recorder):
    handles = []

    def adds():
        if recorder.count("added") >= 3:
            for handle in handles:
                handle()
        elif len(handles) == 1:
            handles.append(own.loop(recorder, "added"))

    handles.append(own.loop(adds))
    recorder.wait_for(3)
    own.defer(0.05, recorder, "later")
    recorder.wait_for("later")
    assert recorder.count("added") <= 4


def test_loop_cancelled_leaves_the_hub_at_rest(own):
    handle = own.loop(int)
    gevent.sleep(0.001)
    handle.cancel()
    gevent.sleep(0.03)
    with counted_turns() as turns:
        gevent.sleep(0.2)
    assert len(turns) < 8


# ---- threads


def test_call_from_thread_runs_in_the_engine_s_thread_in_a_greenlet_that_may_block(own, recorder):
    own.callback(int)

    def called(*args, **kwargs):
        gevent.sleep(0)
        recorder(args, kwargs, get_ident() == here, gevent.getcurrent() is not main)

    here, main = get_ident(), getcurrent()
    assert in_new_thread(get_ident) != here
    in_new_thread(lambda: own.call_from_thread(called, 1, key="word"))
    recorder.wait_for(1)
    assert recorder == [((1,), {"key": "word"}, True, True)]


def test_call_from_thread_keeps_the_order_of_one_thread(own, recorder):
    own.callback(int)

    def calls():
        for number in range(1000):
            own.call_from_thread(recorder, number)

    in_new_thread(calls)
    recorder.wait_for(1000)
    assert recorder == list(range(1000))


def test_call_from_thread_of_an_engine_that_is_not_bound_yet_runs_once_it_is(own, recorder):
    in_new_thread(own.call_from_thread, recorder, "early")
    gevent.sleep(0)
    assert recorder == []
    own.callback(recorder, "first use")
    recorder.wait_for(2)
    assert set(recorder) == {"early", "first use"}


def test_call_from_thread_wakes_an_engine_that_waits_in_start(own):
    done = plain_lock()
    done.acquire()

    def later():
        sleep_for_real(0.05)
        own.call_from_thread(own.stop)
        done.release()

    own.callback(start_thread, later, ())
    own.start()
    assert in_thread(done.acquire, True, 10)


def test_call_from_thread_cancelled_does_not_run(own, recorder):
    own.callback(int)

    def calls():
        # Both at once: nothing runs in between, for the engine's thread waits for this one.
        own.call_from_thread(recorder, "never").cancel()
        own.call_from_thread(recorder, "second")

    in_new_thread(calls)
    recorder.wait_for("second")
    assert recorder == ["second"]


def test_call_from_thread_as_function_of_the_module_reaches_the_first_engine():
    code, output, errors = run("""
        import threading
        from pants_green import Engine, engine

        main = Engine.instance()
        main.callback(int)

        def report():
            print(threading.current_thread() is threading.main_thread())
            engine.stop()

        threading.Thread(target=engine.call_from_thread, args=(report,)).start()
        engine.start()

        # And from a thread with an engine of its own it is that one.
        def with_its_own():
            engine.callback(int)
            engine.call_from_thread(lambda: (print(threading.current_thread().name), engine.stop()))
            engine.start()

        second = threading.Thread(target=with_its_own, name="second")
        second.start()
        second.join()
    """)
    assert (code, output, errors) == (0, "True\nsecond\n", "")


@pytest.mark.parametrize("before", ["nothing", "an engine that is gone"])
def test_call_from_thread_before_there_is_an_engine_is_for_the_one_that_comes(before):
    code, output, errors = run(f"""
        import sys, threading
        from pants_green import Client, engine

        def in_thread(function, *args):
            one = threading.Thread(target=function, args=args)
            one.start()
            one.join()

        def use_one_and_leave():
            engine.callback(int)

        if {before == "nothing"!r}:
            in_thread(engine.call_from_thread, print, "early")
        else:
            in_thread(use_one_and_leave)
            in_thread(engine.call_from_thread, print, "early")
        engine.defer(0.02, in_thread, engine.call_from_thread, lambda: (print("late"), engine.stop()))
        engine.start()
    """)
    assert (code, output, errors) == (0, "early\nlate\n", "")


def test_run_in_thread_returns_the_result_and_the_others_go_on(own, recorder):
    def blocks(*args, **kwargs):
        assert waits.acquire(True, 20)
        return get_ident(), args, kwargs

    waits = plain_lock()
    waits.acquire()
    asks = gevent.spawn(own.run_in_thread, blocks, 1, key="word")
    beats = own.cycle(0.001, recorder, "beat")
    recorder.wait_for(5)
    assert not asks.ready()
    waits.release()
    ident, args, kwargs = asks.get()
    beats.cancel()
    assert ident != get_ident()
    assert (args, kwargs) == ((1,), {"key": "word"})


def test_run_in_thread_raises_once_and_prints_nothing(own, capfd):
    error = ValueError("for the caller alone")

    def fails():
        raise error

    with pytest.raises(ValueError, match="for the caller alone") as caught:
        own.run_in_thread(fails)
    assert caught.value is error
    gevent.sleep(0.01)
    assert capfd.readouterr() == ("", "")


def test_run_in_thread_sees_the_caller_s_context_and_does_not_change_it(own):
    def reads():
        seen = variable.get()
        variable.set("changed in the thread")
        return seen

    def here():
        variable.set("caller")
        return own.run_in_thread(reads), variable.get()

    assert contextvars.copy_context().run(here) == ("caller", "caller")


def test_run_in_thread_in_a_callback_suspends_that_connection_only(server_of, peer):
    waits = plain_lock()
    waits.acquire()

    def on_read(self, data):
        if data == b"block":
            data = b"%d" % self.engine.run_in_thread(waits.acquire, True, 20)
        self.write(data)

    server = server_of(Stream, on_read=on_read)
    blocked, other = peer(server), peer(server)
    blocked.send(b"block")
    other.send(b"hello")
    assert other.recv_exactly(5) == b"hello"
    waits.release()
    assert blocked.recv_exactly(1) == b"1"


WRONG_THREAD = {
    "listen": lambda stream: Server(engine=stream.engine).listen(LOOPBACK),
    "connect": lambda stream: Stream(engine=stream.engine).connect(stream.server.local_address),
    "write": lambda stream: stream.write(b"never"),
    "write with flush": lambda stream: stream.write(b"never", flush=True),
    "send": lambda stream: stream.send(b"never"),
    "flush": lambda stream: stream.flush(),
    "write_eof": lambda stream: stream.write_eof(),
    "end": lambda stream: stream.end(),
    "close": lambda stream: stream.close(),
    "close with flush": lambda stream: stream.close(flush=True),
    "abort": lambda stream: stream.abort(),
    "server close": lambda stream: stream.server.close(),
    "start": lambda stream: stream.engine.start(),
    "stop": lambda stream: stream.engine.stop(),
    "poll": lambda stream: stream.engine.poll(0),
    "callback": lambda stream: stream.engine.callback(int),
    "loop": lambda stream: stream.engine.loop(int),
    "defer": lambda stream: stream.engine.defer(1, int),
    "defer 0": lambda stream: stream.engine.defer(0, int),
    "cycle": lambda stream: stream.engine.cycle(1, int),
    "run_in_thread": lambda stream: stream.engine.run_in_thread(int),
    "latest_poll_time": lambda stream: stream.engine.latest_poll_time,
}


@pytest.mark.parametrize("name", WRONG_THREAD)
def test_use_in_another_thread_is_refused_and_names_both_threads(name, server_of, peer, recorder):
    server = server_of(recorder.of(Echo, "on_connect"))
    one = peer(server)
    recorder.wait_for("on_connect")
    (stream,) = server.channels.values()

    def use():
        if not PATCHED:
            threading.current_thread().name = "the other one"
        there.append(get_ident())
        WRONG_THREAD[name](stream)

    there = []
    with pytest.raises(WrongThreadError) as caught:
        in_new_thread(use)
    said = str(caught.value)
    assert "MainThread" in said or (PATCHED and str(get_ident()) in said)
    assert "the other one" in said or (PATCHED and str(there[0]) in said)
    assert "call_from_thread" in said
    # Nothing came of it.
    assert server.listening
    one.send(b"hello")
    assert one.recv_exactly(5) == b"hello"
    assert set(Engine.instance().channels) == {server, stream}


def test_taking_over_a_socket_in_another_thread_is_refused():
    one = Engine.instance()
    one.callback(int)
    left, right = gevent.socket.socketpair()
    with left, right:
        with pytest.raises(WrongThreadError):
            in_new_thread(lambda: Stream(socket=left, engine=one))
        assert one.channels == []


def test_engine_of_another_thread_serves_and_dials_there(server_of, peer):
    def life():
        one = Engine.instance()
        received, threads = [], {get_ident()}

        class Asks(Stream):
            def on_connect(self):
                self.write(b"hello\n")

            def on_read(self, data):
                received.append(data)
                threads.add(get_ident())
                gevent.sleep(0.001)
                self.write(b"hello\n") if len(received) < 3 else self.end()

            def on_close(self):
                server.close()
                one.stop()

        server = Server(type("Lines", (Echo,), {"on_close": lambda self: threads.add(get_ident())}))
        server.listen(LOOPBACK)
        assert server.engine is one
        dialled = Asks(engine=engine).connect(server.local_address)
        assert dialled.engine is one
        one.start()
        while one.channels or one._lingering:
            gevent.sleep(0.001)
        gevent.get_hub().destroy(destroy_loop=True)
        return b"".join(received), len(threads)

    meanwhile = peer(server_of(Echo))
    assert in_new_thread(life) == (b"hello\n" * 3, 1)
    meanwhile.send(b"hello")
    assert meanwhile.recv_exactly(5) == b"hello"


# ---- interrupts

INTERRUPTS = pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
IN_MAIN = pytest.mark.parametrize("in_main", [True, False], ids=["in the main greenlet", "in another greenlet"])


def leaves_start(error, in_main):
    """Run the engine of this thread in this greenlet or in another, until `error` leaves its ``start()``."""
    if in_main:
        with pytest.raises(error):
            engine.start()
        return
    left = []

    def runs():
        try:
            engine.start()
        except error as caught:
            left.append(caught)

    gevent.spawn(runs).join()
    assert [type(one) for one in left] == [error]


@INTERRUPTS
@IN_MAIN
@pytest.mark.parametrize("callback", ["on_connect", "on_read", "on_write", "on_end", "on_overflow_error", "on_close"])
def test_interrupt_in_a_callback_closes_its_connection_and_leaves_start(callback, in_main, error, server_of, peer, recorder):
    def raises(self, *args):
        recorder("raised")
        raise error

    attributes = {"on_connect": lambda self: self.write(b"welcome"), "read_delimiter": b"\n", callback: raises}
    server = server_of(recorder.of(type("Raises", (Stream,), attributes), "on_close"), buffer_size=4)
    other = peer(server_of(Echo))
    with plain_connection(server) as sock:
        sock.sendall(b"line\n" + b"too long" * (callback == "on_overflow_error"))
        sock.shutdown(stdlib_socket.SHUT_WR)
        leaves_start(error, in_main)
        recorder.wait_for(("on_close",))
        assert recorder.count("raised") == 1
        assert recorder.count(("on_close",)) == 1
        assert server.channels == {}
        with contextlib.suppress(ConnectionResetError):  # what it had not read
            while sock.recv(100):
                pass
    # The engine is none the worse for it.
    engine.callback(engine.stop)
    engine.start()
    other.send(b"hello")
    assert other.recv_exactly(5) == b"hello"
    assert server.listening


@INTERRUPTS
@IN_MAIN
def test_interrupt_in_a_constructor_costs_that_socket_and_leaves_start(in_main, error, server_of, recorder):
    class Raises(Stream):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            if not recorder:
                recorder("raised")
                raise error

    server = server_of(Raises, on_read=Echo.on_read)
    with plain_connection(server) as sock:
        leaves_start(error, in_main)
        assert sock.recv(100) == b""
    assert server.channels == {}
    with plain_connection(server) as sock:
        sock.sendall(b"hello")
        sock.shutdown(stdlib_socket.SHUT_WR)
        assert in_thread(sock.recv, 100) == b"hello"


@INTERRUPTS
@IN_MAIN
@pytest.mark.parametrize("kind", ["callback", "defer", "cycle", "loop", "call_from_thread"])
def test_interrupt_in_a_timer_leaves_start(kind, in_main, error, recorder):
    def raises():
        if not recorder:
            recorder("raised")
            raise error

    handle = {
        "callback": lambda: engine.callback(raises),
        "defer": lambda: engine.defer(0.001, raises),
        "cycle": lambda: engine.cycle(0.001, raises),
        "loop": lambda: engine.loop(raises),
        "call_from_thread": lambda: engine.call_from_thread(raises),
    }[kind]()
    leaves_start(error, in_main)
    handle.cancel()
    engine.callback(lambda: (recorder("again"), engine.stop()))
    engine.start()
    assert recorder == ["raised", "again"]


@pytest.mark.parametrize(
    ("raised_in", "waits_in"), [("timer", "gevent.sleep(20)"), ("stream", "gevent.event.Event().wait()"), ("stream", "engine.poll(20)")]
)
@INTERRUPTS
def test_interrupt_with_nobody_in_start_reaches_the_main_greenlet(error, raised_in, waits_in):
    code, output, errors = run(
        """
        import socket, sys
        import gevent, gevent.event
        from pants_green import Server, Stream, engine

        error = {"KeyboardInterrupt": KeyboardInterrupt, "SystemExit": SystemExit}[sys.argv[1]]

        def fails(*args):
            raise error

        class Fails(Stream):
            on_connect = fails

            def on_close(self):
                print("on_close", self.closed)

        if sys.argv[2] == "timer":
            engine.callback(fails)
        else:
            server = Server(Fails).listen(("127.0.0.1", 0))
            peer = socket.create_connection(server.local_address)
        try:
            while True:
                WAIT
        except BaseException as caught:
            print(type(caught).__name__)
        gevent.sleep(0)
        """.replace("WAIT", waits_in),
        error.__name__,
        raised_in,
    )
    assert code == 0, errors
    expected = [error.__name__] + ["on_close True"] * (raised_in == "stream")
    assert sorted(output.splitlines()) == expected


@pytest.mark.parametrize("patched", [False, True], ids=["raw", "patched"])
@pytest.mark.parametrize("start", ["engine.start()", "gevent.spawn(engine.start).join()"], ids=["main", "greenlet"])
def test_sigint_to_an_idle_engine_is_a_keyboard_interrupt(start, patched):
    source = f"""
        {"import gevent.monkey; gevent.monkey.patch_all()" if patched else ""}
        import gevent
        from pants_green import Server, engine

        Server().listen(("127.0.0.1", 0))
        engine.callback(print, "ready")
        try:
            {start}
        finally:
            print("left")
    """
    with keyboard_interrupts(), Child("-c", textwrap.dedent(source)) as child:
        child.expect("ready")
        child.process.send_signal(signal.SIGINT)
        assert child.end() == -signal.SIGINT
        assert child.output == "ready\nleft\n"
        assert child.error_output().rstrip().endswith("KeyboardInterrupt")


# ---- the module


def test_s1_6_d6_the_module_runs_the_global_engine():
    code, output, errors = run("""
        from pants_green import Connection, engine, Server
        import pants_green.engine

        print(engine is pants_green.engine, Server().engine is pants_green.engine.Engine.instance())
        server = Server(Connection).listen(("127.0.0.1", 0))
        engine.callback(lambda: (print(engine.channels == [server]), engine.stop()))
        engine.start()
    """)
    assert (code, output, errors) == (0, "True True\nTrue\n", "")


def test_d6_the_module_has_a_real_function_for_every_method():
    methods = {name: member for name, member in vars(Engine).items() if not name.startswith("_") and name != "instance"}
    assert {"start", "stop", "poll", "callback", "loop", "defer", "cycle", "call_from_thread", "run_in_thread"} < set(methods)
    for name, member in methods.items():
        assert hasattr(engine, name)
        if not inspect.isfunction(member):
            continue
        function = vars(engine)[name]
        assert inspect.isfunction(function)
        assert function.__doc__
        expected = inspect.signature(member)
        expected = expected.replace(parameters=list(expected.parameters.values())[1:])
        assert inspect.signature(function) == expected
        assert name in engine.__all__


def test_d6_the_functions_of_the_module_do_what_the_methods_do(recorder):
    engine.callback(recorder, "callback", 1)
    engine.defer(0.001, recorder, "defer", 2)
    engine.defer(recorder, 0.001, "defer", 3)
    cycle = engine.cycle(0.001, recorder, "cycle")
    loop = engine.loop(recorder, "loop")
    engine.call_from_thread(recorder, "call_from_thread")
    assert engine.poll(3) is True
    wanted = {("callback", 1), ("defer", 2), ("defer", 3), "cycle", "loop", "call_from_thread"}
    recorder.wait_for(lambda seen: set(seen) == wanted)
    loop.cancel()
    cycle()
    assert engine.run_in_thread(max, 1, 2) == 2
    engine.stop()
    engine.defer(0.001, engine.stop)
    engine.start()
    assert engine.poll(0) is False
    assert engine.latest_poll_time == Engine.instance().latest_poll_time
    with pytest.raises(AttributeError, match="nonsense"):
        engine.nonsense  # noqa: B018


def test_d6_the_module_is_accepted_as_engine(server_of, recorder):
    assert Server(engine=engine).engine is Engine.instance()
    assert Stream(engine=engine).engine is Engine.instance()
    assert Server(engine=None).engine is Engine.instance()
    assert Connection().engine is Engine.instance()
    mine = Engine()
    assert Server(engine=mine).engine is mine
    assert Stream(engine=mine).engine is mine


@pytest.mark.parametrize("wrong", [5, "engine", Engine, gevent, pants_green, object()], ids=lambda wrong: repr(wrong)[:12])
def test_wrong_engine_is_a_type_error(wrong):
    for made in (Server, Stream):
        with pytest.raises(TypeError, match="engine="):
            made(engine=wrong)


# ---- contexts


@pytest.fixture
def one_greenlet(own):
    """Return an engine that keeps one idle greenlet, so that the next connection gets that of the last."""
    own._enter()
    own._pool.limit = 1
    return own


@pytest.mark.parametrize("context", ["with values", "empty"])
def test_context_of_an_accepted_connection_is_a_copy_of_listen_s_and_its_own(context, one_greenlet, peer, recorder):
    class Sets(Stream):
        def on_connect(self):
            recorder("begins with", variable.get())
            variable.set(f"set by {self.remote_address[1]}")
            gevent.sleep(0)

        def on_read(self, data):
            recorder("keeps", variable.get() == f"set by {self.remote_address[1]}")

        def on_close(self):
            recorder("closes with", variable.get() == f"set by {self.remote_address[1]}")

    listener = contextvars.Context()
    expected = "default"
    if context == "with values":
        listener.run(variable.set, "listener")
        expected = "listener"
    server = Server(Sets, engine=one_greenlet)
    listener.run(server.listen, LOOPBACK)
    made = one_greenlet._pool.made
    for number in range(1, 4):
        with peer(server) as one:
            one.send(b"x")
            recorder.wait_for(3 * number - 1)
        recorder.wait_for(3 * number)
    server.close()
    assert recorder == [("begins with", expected), ("keeps", True), ("closes with", True)] * 3
    assert one_greenlet._pool.made <= made + 1  # or the test would prove little
    assert listener.run(variable.get) == expected


def test_context_of_two_connections_at_once_is_each_its_own(server_of, peer, recorder):
    def on_read(self, data):
        recorder(self.remote_address[1], variable.get())
        variable.set(data)

    server = server_of(Stream, on_read=on_read)
    one, two = peer(server), peer(server)
    for count, (who, data) in enumerate([(one, b"1"), (two, b"2"), (one, b"3"), (two, b"4")], 1):
        who.send(data)
        recorder.wait_for(count)
    first, second = one.address[1], two.address[1]
    assert recorder == [(first, "default"), (second, "default"), (first, b"1"), (second, b"2")]


def test_context_of_a_dialled_connection_is_a_copy_of_connect_s(one_greenlet, listening_peer, recorder):
    class Sets(Stream):
        def on_connect(self):
            recorder(variable.get())
            variable.set("connection")
            self.close()

    listener = listening_peer()
    for number, value in enumerate(["first", "second", None], 1):
        context = contextvars.Context()
        if value:
            context.run(variable.set, value)
        context.run(Sets(engine=one_greenlet).connect, listener.address)
        context.run(variable.set, "changed after connect()")
        listener.accept().close()
        recorder.wait_for(number)
        assert context.run(variable.get) == "changed after connect()"
    assert recorder == ["first", "second", "default"]


@pytest.mark.parametrize("kind", ["callback", "defer", "cycle", "loop", "call_from_thread"])
def test_context_of_a_timer_is_a_copy_of_the_caller_s(kind, one_greenlet, recorder):
    def runs():
        recorder(variable.get())
        variable.set("changed inside")

    add = {
        "callback": one_greenlet.callback,
        "defer": lambda what: one_greenlet.defer(0.001, what),
        "cycle": lambda what: one_greenlet.cycle(0.001, what),
        "loop": one_greenlet.loop,
        "call_from_thread": one_greenlet.call_from_thread,
    }[kind]
    caller = contextvars.Context()
    caller.run(variable.set, "caller")
    handles = [caller.run(add, runs)]
    caller.run(variable.set, "changed after the call")
    recorder.wait_for(1)
    handles.append(contextvars.Context().run(add, runs))
    recorder.wait_for(lambda seen: "default" in seen)
    for handle in handles:
        handle.cancel()
    assert set(recorder) == {"caller", "default"}
    assert recorder[0] == "caller"
    assert caller.run(variable.get) == "changed after the call"


# ---- fork

#: Bytes that no kernel takes at once from a peer that does not read.
BIG = 10_000_000


def read_exactly(sock, size):
    """Return the next `size` bytes, fewer only at the end, from a plain socket."""
    data = bytearray()
    while len(data) < size and (more := sock.recv(min(1 << 18, size - len(data)))):
        data += more
    return data


FORKING = """
    import os, signal, sys
    if sys.argv[1] == "patched":
        import gevent.monkey
        gevent.monkey.patch_all()
    import gevent
    from gevent.event import Event
    from pants_green import Engine, Server, Stream

    def say(*words):
        signal.alarm(20)  # whatever happens this process ends
        os.write(1, (" ".join(map(str, words)) + "\\n").encode())

    class Talk(Stream):
        read_delimiter = b"\\n"

        def on_read(self, line):
            if line == b"who":
                self.write(f"{os.getpid()}\\n")
            elif line == b"big":
                self.write(b"0123456789" * int(sys.argv[2]))
                self.write(b"\\n")
            elif line == b"fork":
                fork.set()
            elif line == b"stop listening":
                server.close(connections=False)
                self.write(b"done\\n")
            elif line == b"end":
                Engine.instance().stop()
            else:
                self.write(line + b"\\n")

        def on_close(self):
            say("on_close", os.getpid(), self.remote_address[1])

    fork = Event()
    server = Server(Talk).listen(("127.0.0.1", 0))
    client = Stream().connect(server.local_address)
    beats = []
    Engine.instance().cycle(0.001, beats.append, 1)
    say("port", server.local_address[1])
    fork.wait()
    inherited = [*server.channels.values(), client]
    for stream in inherited:
        stream.write(b"written before the fork\\n")
    child = os.fork()
    if child:
        Engine.instance().start()
        say("connected", client.connected, len(server.channels))
        say("parent ends", os.waitpid(child, 0)[1])
        sys.exit()

    say("child", os.getpid())
    for stream in inherited:
        say("inherited", stream.closed, stream.connected, stream.fileno, stream.close_reason)
    say("channels", Engine.instance().channels == [server], server.listening, len(server.channels))
    done = Event()
    Engine.instance().defer(0.01, done.set)
    done.wait()
    say("timer of the child")
    gevent.sleep(0.01)
    beats.clear()
    while len(beats) < 3:
        gevent.sleep(0.001)
    say("ready")
    Engine.instance().start()
    say("child ends")
    os._exit(0)
"""


@pytest.mark.parametrize("how", ["raw", "patched"])
def test_fork_connections_stay_with_the_parent_and_listeners_are_shared(how, peer):
    with Child("-c", textwrap.dedent(FORKING), how, BIG // 10) as program:
        address = "127.0.0.1", program.port()
        parent = program.process.pid
        one, full = peer(address), peer(address, rcvbuf=4096)
        one.send(b"who\n")
        assert one.recv_until(b"\n") == b"%d\n" % parent
        full.send(b"big\n")
        assert in_thread(read_exactly, full.socket, 10) == b"0123456789"
        one.send(b"fork\n")
        child = int(program.expect(r"^child (\d+)$")[1])
        assert child != parent
        program.expect("^ready$")

        # What was written before was sent once, by the parent, and the child's closing was nobody's business.
        for message in (b"hello\n", b"again\n"):
            one.send(message)
        assert one.recv_exactly(36) == b"written before the fork\nhello\nagain\n"
        assert in_thread(read_exactly, full.socket, BIG - 10 + 1 + 24) == b"0123456789" * (BIG // 10 - 1) + b"\nwritten before the fork\n"

        # Both accept, and after the parent has stopped the child does alone.
        pids = []
        for _ in range(6):
            with peer(address) as visitor:
                visitor.send(b"who\n")
                pids.append(int(visitor.recv_until(b"\n")))
        assert set(pids) <= {parent, child}
        one.send(b"stop listening\n")
        assert one.recv_until(b"\n") == b"done\n"
        visitors = [peer(address) for _ in range(3)]
        for visitor in visitors:
            visitor.send(b"who\n")
            assert visitor.recv_until(b"\n") == b"%d\n" % child
        visitors[0].send(b"end\n")
        program.expect("^child ends$")
        assert all(visitor.at_eof() for visitor in visitors)

        # The parent is none the worse for it.
        one.send(b"who\nend\n")
        assert one.recv_until(b"\n") == b"%d\n" % parent
        assert program.end() == 0
        lines = program.output.splitlines()
        assert program.error_output() == ""
        inherited = [line for line in lines if line.startswith("inherited")]
        assert [line.split()[1:4] for line in inherited] == [["True", "False", "None"]] * 4
        assert all("parent" in line for line in inherited)
        assert "channels True True 0" in lines
        assert "timer of the child" in lines
        assert "connected True 3" in lines
        assert "parent ends 0" in lines
        for stays in (one, full):
            assert f"on_close {child} {stays.address[1]}" not in lines


@pytest.mark.parametrize("how", ["raw", "patched"])
def test_fork_inside_a_callback_leaves_the_connection_with_the_parent(how, peer):
    source = """
        import os, signal, sys
        if sys.argv[1] == "patched":
            import gevent.monkey
            gevent.monkey.patch_all()
        from pants_green import Engine, Server, Stream
        from pants_green.errors import ChannelClosed

        class Forks(Stream):
            read_delimiter = b"\\n"

            def on_read(self, line):
                self.write(line + b"\\n")
                if line == b"end":
                    Engine.instance().stop()
                elif line == b"fork":
                    child = os.fork()
                    if not child:
                        self.reports()
                        if sys.argv[2] == "goes on":
                            # Leave the callback: main, below, ends this process.
                            Engine.instance().callback(Engine.instance().stop)
                            return
                        os._exit(0)
                    status = os.waitpid(child, 0)[1]
                    self.write(f"{status} {self.connected}\\n")

            def reports(self):
                signal.alarm(20)  # whatever happens this process ends
                try:
                    self.write(b"never")
                except ChannelClosed:
                    os.write(1, f"refused {self.closed} {self.close_reason}\\n".encode())

            def on_close(self):
                os.write(1, f"on_close {os.getpid() == parent}\\n".encode())

        parent = os.getpid()
        server = Server(Forks).listen(("127.0.0.1", 0))
        print("port", server.local_address[1])
        Engine.instance().start()
        if os.getpid() != parent:
            os._exit(0)
        os.write(1, b"parent ends\\n")
    """
    for after in ("ends", "goes on"):
        with Child("-c", textwrap.dedent(source), how, after) as program:
            one = peer(("127.0.0.1", program.port()))
            one.send(b"before\nfork\nafter\n")
            assert one.recv_exactly(25) == b"before\nfork\n0 True\nafter\n"
            one.send(b"end\n")
            assert one.recv_until(b"\n") == b"end\n"
            assert program.end() == 0
            assert program.output.splitlines()[1:] == ["refused True the connection belongs to the parent process", "parent ends"]
            assert program.error_output() == ""
        one.close()


def test_fork_handler_is_registered_once_and_with_the_first_engine_that_is_used():
    code, output, errors = run("""
        import os

        registered = []
        original = os.register_at_fork

        def register_at_fork(**hooks):
            registered.extend(hook for hook in hooks.values() if hook.__module__.startswith("pants_green"))
            original(**hooks)

        os.register_at_fork = register_at_fork
        from pants_green import Engine, Server, Stream

        Engine(), Engine.instance(), Server(), Stream()
        before = len(registered)
        for used in (Engine.instance(), Engine(), Engine()):
            used.callback(int)
            used.poll(1)
        print(before, len(registered))
    """)
    assert (code, output, errors) == (0, "0 1\n", "")
