"""Greenlets that are used again: nothing of one connection reaches the next, and a stream can change its greenlet.

Where a connection spoils its greenlet the engine keeps one idle greenlet and there are two connections, so that the second
one gets the first one's greenlet unless something keeps it from that.
"""

import contextvars
import gc
import logging
import re
import socket as stdlib_socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import gevent
import gevent.local
import gevent.lock
import pytest
from children import ROOT
from gevent import monkey
from gevent.event import Event
from greenlet import getcurrent, greenlet
from peers import PlainSocket, in_thread

from pants_green import Engine, Server, Stream
from pants_green._pool import Worker
from pants_green.testing import memory_pair

PATCHED = monkey.is_module_patched("threading")

in_a_patched_process = pytest.mark.skipif(not PATCHED, reason="needs gevent.monkey; test_patched_cases runs it in a process of its own")

variable = contextvars.ContextVar("variable", default="default")

log = logging.getLogger(__name__)


def count(kind):
    """Return how many greenlets of a class there are."""
    gc.collect()
    return sum(isinstance(thing, kind) and not thing.dead for thing in gc.get_objects())


class TwoConnections:
    """A server on an engine that keeps one idle greenlet."""

    def __init__(self, recorder):
        self._workers_before = count(Worker)
        self.engine = Engine()
        self.engine._enter()
        self.pool = self.engine._pool
        self.pool.limit = 1
        self.recorder = recorder
        self.server = None
        self.sockets = []

    def serve(self, first, second):
        """Listen; the first connection runs `first` in its on_connect, the others `second`. Each gets the Stream."""
        recorder = self.recorder
        turns = iter([first])

        class Runs(Stream):
            def on_connect(self):
                next(turns, second)(self)

            def on_read(self, data):
                self.write(data)

            def on_error(self, exception):
                recorder("error", exception)
                self.close()

            def on_close(self):
                recorder("closed")

        self.server = Server(Runs, engine=self.engine).listen(("127.0.0.1", 0))
        return self

    def dial(self):
        """Put a plain socket in the backlog; nothing switches."""
        sock = PlainSocket(stdlib_socket.AF_INET, stdlib_socket.SOCK_STREAM)
        self.sockets.append(sock)
        sock.settimeout(10)
        sock.connect(self.server.local_address)
        return sock

    def go_through(self, together):
        """Let both connections happen, in one turn of the hub or one after the other; the second echoes at its end."""
        recorder = self.recorder
        if together:
            self.dial()
            second = self.dial()
            recorder.wait_for("closed")
        else:
            self.dial()
            recorder.wait_for("closed")
            second = self.dial()
        second.sendall(b"hello")
        second.shutdown(stdlib_socket.SHUT_WR)
        assert in_thread(second.recv, 100) == b"hello"
        recorder.wait_for(lambda seen: seen.count("closed") == 2)

    def greenlets(self):
        """Return how many greenlets the engine has made that are not gone."""
        return count(Worker) - self._workers_before

    def close(self):
        if self.server is not None:
            self.server.close()
            self.server = None
        for sock in self.sockets:
            sock.close()


@pytest.fixture
def two(recorder):
    made = TwoConnections(recorder)
    yield made
    made.close()


TOGETHER = pytest.mark.parametrize("together", [True, False], ids=["in one turn", "one after the other"])


# ---- what clings to a greenlet


@TOGETHER
def test_clean_greenlet_is_used_again(together, two, recorder):
    greenlets = []

    def notes(stream):
        greenlets.append(id(getcurrent()))
        if len(greenlets) == 1:
            stream.close()

    two.serve(notes, notes).go_through(together)
    assert two.pool.made == 1
    assert greenlets[0] == greenlets[1]
    assert recorder == ["closed", "closed"]


@TOGETHER
@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_left_over_timeout_does_not_reach_the_next_connection(seconds, together, two, recorder, capfd):
    def leaves_it(stream):
        gevent.Timeout.start_new(seconds)
        stream.close()

    def waits(stream):
        gevent.sleep(seconds + 0.05)  # the hub's timers go off in order, so the other one has
        recorder("waited")

    two.serve(leaves_it, waits).go_through(together)
    assert recorder == ["closed", "waited", "closed"]
    assert capfd.readouterr().err == ""


def test_left_over_timeout_that_strikes_the_idle_greenlet_ends_it_alone(two, recorder, capfd):
    def leaves_it(stream):
        gevent.Timeout.start_new(0.01)
        stream.close()

    two.serve(leaves_it, lambda stream: recorder("second"))
    two.dial()
    recorder.wait_for("closed")
    gevent.sleep(0.03)
    two.dial()
    recorder.wait_for("second")
    assert two.pool.made == 2
    assert capfd.readouterr().err == ""


@TOGETHER
@pytest.mark.parametrize("error", [gevent.GreenletExit, gevent.Timeout, ValueError])
def test_pending_kill_does_not_reach_the_next_connection(error, together, two, recorder, capfd):
    def kills_itself(stream):
        gevent.kill(gevent.getcurrent(), error)
        stream.close()

    def waits(stream):
        gevent.sleep(0.02)
        recorder("waited")

    two.serve(kills_itself, waits).go_through(together)
    assert recorder == ["closed", "waited", "closed"]
    assert two.pool.made == 2
    assert capfd.readouterr().err == ""


@TOGETHER
def test_held_lock_is_not_the_next_connection_s(together, two, recorder):
    lock = gevent.lock.RLock()

    def takes_it(stream):
        assert lock.acquire()
        stream.close()

    two.serve(takes_it, lambda stream: recorder("got it", lock.acquire(blocking=False))).go_through(together)
    assert ("got it", False) in recorder
    assert two.pool.made == 2


@TOGETHER
def test_gevent_local_starts_empty_for_the_next_connection(together, two, recorder):
    local = gevent.local.local()

    def sets(stream):
        local.value = "secret"
        gevent.sleep(0)
        assert local.value == "secret"
        stream.close()

    two.serve(sets, lambda stream: recorder("sees", getattr(local, "value", None))).go_through(together)
    assert ("sees", None) in recorder
    assert recorder.count("closed") == 2


@TOGETHER
def test_attribute_of_the_greenlet_is_not_seen_by_the_next_connection(together, two, recorder):
    def sets(stream):
        getcurrent().tag = "secret"
        gevent.sleep(0)
        assert getcurrent().tag == "secret"
        stream.close()

    def looks(stream):
        recorder("sees", dict(vars(getcurrent())))
        recorder("sees", getattr(getcurrent(), "tag", None))

    two.serve(sets, looks).go_through(together)
    assert ("sees", {}) in recorder
    assert ("sees", None) in recorder


@TOGETHER
def test_attribute_of_the_greenlet_that_refers_to_it_does_no_harm(together, two, recorder):
    def sets(stream):
        getcurrent().itself = getcurrent()
        stream.close()

    two.serve(sets, lambda stream: recorder("sees", dict(vars(getcurrent())))).go_through(together)
    assert ("sees", {}) in recorder


@pytest.mark.parametrize("arguments", [(), (1,), (bool, "x"), (1, 2, 3)], ids=len)
@pytest.mark.parametrize("when", ["idle", "in the next connection"])
def test_kept_switch_called_later_does_not_reach_the_next_connection(when, arguments, two, recorder, capfd):
    kept = []
    run_callback = gevent.get_hub().loop.run_callback

    def keeps(stream):
        kept.append(getcurrent().switch)
        stream.close()

    def waits(stream):
        if kept:
            run_callback(kept.pop(), *arguments)
        done = Event()
        gevent.get_hub().loop.run_callback(done.set)
        recorder("waited", done.wait())

    two.serve(keeps, waits)
    two.dial()
    recorder.wait_for("closed")
    if when == "idle":
        run_callback(kept.pop(), *arguments)
        gevent.sleep(0)
    second = two.dial()
    recorder.wait_for(("waited", True))
    second.sendall(b"hello")
    assert in_thread(second.recv, 100) == b"hello"
    third = two.dial()
    third.sendall(b"third")
    assert in_thread(third.recv, 100) == b"third"
    assert "error" not in recorder.names()
    assert capfd.readouterr().err == ""


@TOGETHER
def test_wake_up_asked_for_does_not_reach_the_next_connection(together, two, recorder, capfd):
    event = Event()

    def asks(stream):
        event.rawlink(getcurrent().switch)
        gevent.get_hub().loop.run_callback(getcurrent().switch)
        stream.close()

    def waits(stream):
        event.set()
        recorder("waited", gevent.event.AsyncResult().wait(0.02))

    two.serve(asks, waits).go_through(together)
    assert recorder == ["closed", ("waited", None), "closed"]
    assert capfd.readouterr().err == ""


@TOGETHER
@pytest.mark.parametrize("listener", [contextvars.Context(), contextvars.copy_context()], ids=["empty", "full"])
def test_context_variable_is_not_seen_by_the_next_connection(listener, together, two, recorder):
    def sets(stream):
        variable.set("secret")
        gevent.sleep(0)
        assert variable.get() == "secret"
        stream.close()

    listener.run(two.serve, sets, lambda stream: recorder("sees", variable.get())).go_through(together)
    assert ("sees", "default") in recorder


@TOGETHER
@pytest.mark.parametrize("what", ["sleep", "event", "thread", "spawn", "waiter"])
def test_waiting_in_a_callback_leaves_no_trace(what, together, two, recorder):
    child = []

    def waits(stream):
        if what == "sleep":
            gevent.sleep(0.001)
        elif what == "event":
            Event().wait(0.001)
        elif what == "thread":
            gevent.get_hub().threadpool.apply(int)
        elif what == "spawn":
            child.append(gevent.spawn(gevent.sleep, 0.05))
        else:
            with gevent.Timeout(0.001, False):
                Event().wait()
        stream.close()

    two.serve(waits, lambda stream: recorder("second")).go_through(together)
    gevent.joinall(child)
    assert recorder.count("closed") == 2
    assert "error" not in recorder.names()


@pytest.mark.parametrize("kind", ["callback", "defer", "cycle", "loop"])
def test_timer_s_left_overs_do_not_reach_what_runs_next(kind, two, recorder, capfd):
    local = gevent.local.local()

    def spoils():
        if not recorder:
            recorder("spoilt")
            gevent.Timeout.start_new(0.05)
            local.value = getcurrent().tag = "secret"
            variable.set("secret")

    add = {
        "callback": two.engine.callback,
        "defer": lambda what: two.engine.defer(0.001, what),
        "cycle": lambda what: two.engine.cycle(0.001, what),
        "loop": two.engine.loop,
    }[kind]
    handle = add(spoils)
    recorder.wait_for("spoilt")

    def looks(stream):
        recorder("sees", dict(vars(getcurrent())), getattr(local, "value", None), variable.get())
        gevent.sleep(0.1)
        recorder("waited")

    two.serve(looks, looks)
    two.dial()
    recorder.wait_for("waited")
    handle.cancel()
    assert recorder == ["spoilt", ("sees", {}, None, "default"), "waited"]
    assert capfd.readouterr().err == ""


# ---- the same in a patched process


def test_patched_cases():
    """Run what needs a patched process in one of its own, if this is none."""
    if PATCHED:
        return
    command = [sys.executable, "-m", "gevent.monkey", "--module", "pytest", str(Path(__file__)), "-k", "patched_process"]
    options = ["-p", "no:cacheprovider", "-q", "-rs"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= 8
    assert "skipped" not in done.stdout


@in_a_patched_process
@TOGETHER
def test_patched_process_threading_local_starts_empty_for_the_next_connection(together, two, recorder):
    local = threading.local()

    def sets(stream):
        local.value = "secret"
        stream.close()

    two.serve(sets, lambda stream: recorder("sees", getattr(local, "value", None))).go_through(together)
    assert ("sees", None) in recorder


@in_a_patched_process
@TOGETHER
def test_patched_process_current_thread_is_not_the_next_connection_s(together, two, recorder):
    threads = []

    def notes(stream):
        thread = threading.current_thread()
        threads.append(thread)
        if len(threads) == 1:
            thread.value = "secret"
            thread.name = "the first"
            stream.close()
        else:
            recorder("sees", getattr(thread, "value", None), thread.name)

    two.serve(notes, notes).go_through(together)
    assert threads[0] is not threads[1]
    (sees,) = [event for event in recorder if event[0] == "sees"]
    assert sees[1] is None
    assert sees[2] != "the first"


@in_a_patched_process
@pytest.mark.parametrize(
    "does", [lambda: None, lambda: log.warning("x"), threading.current_thread], ids=["nothing", "logs", "asks for its thread"]
)
def test_patched_process_ten_connections_one_after_the_other_use_one_greenlet(does, two, recorder):
    ten_connections(does, two, recorder)
    assert two.pool.made == 1


@in_a_patched_process
def test_patched_process_forgets_the_dummy_threads_of_connections(two, recorder):
    gevent.sleep(0)
    before = set(threading._active)
    ten_connections(threading.current_thread, two, recorder)
    assert len(set(threading._active) - before) <= 1


# ---- how many there are


def ten_connections(does, two, recorder):
    """Let ten connections come and go, each of which calls `does` in three of its callbacks."""

    class Runs(Stream):
        def on_connect(self):
            does()

        def on_read(self, data):
            gevent.sleep(0)
            does()
            self.write(data)

        def on_close(self):
            does()
            recorder("closed")

    two.server = Server(Runs, engine=two.engine).listen(("127.0.0.1", 0))
    for number in range(1, 11):
        sock = two.dial()
        sock.sendall(b"hello")
        assert in_thread(sock.recv, 100) == b"hello"
        sock.close()
        recorder.wait_for(number)


def test_ten_connections_one_after_the_other_use_one_greenlet(two, recorder):
    ten_connections(int, two, recorder)
    assert two.pool.made == 1


def test_spoilt_greenlets_are_freed(two, recorder):
    local = gevent.local.local()
    ten_connections(lambda: setattr(local, "value", 1), two, recorder)
    assert two.pool.made == 10
    assert two.greenlets() == 1


def test_greenlet_that_something_clung_to_is_freed_once_it_lets_go(two, recorder):
    locks = []

    def takes_one(stream):
        locks.append(gevent.lock.RLock())
        locks[-1].acquire()
        stream.close()

    two.serve(takes_one, takes_one)
    for number in range(1, 6):
        two.dial()
        recorder.wait_for(number)
    assert two.greenlets() == 5
    locks.clear()
    assert two.greenlets() == 1


@pytest.mark.parametrize("kind", ["accepted", "dialled", "timer"])
def test_idle_greenlet_holds_on_to_nothing_of_what_it_ran(kind, two, recorder):
    class Thing:
        pass

    left = []

    def note(*things):
        left.extend(map(weakref.ref, things))
        for stream in things[:1]:
            recorder("ran")

    def closes(stream):
        note(stream, stream.socket)
        stream.close()

    accepts = closes if kind == "accepted" else bool
    two.serve(accepts, accepts)
    for number in range(1, 3):
        if kind == "accepted":
            two.dial()
        elif kind == "dialled":
            made = type("Dials", (Stream,), {"on_connect": closes, "on_close": lambda stream: recorder("closed")})
            made(engine=two.engine).connect(two.server.local_address)
        else:
            two.engine.callback(note, Thing())
        recorder.wait_for(lambda seen, number=number: seen.count("ran") >= number)
    while not len(two.pool):
        gevent.sleep(0)
    assert len(left) >= 2
    gc.collect()
    assert [ref() for ref in left if ref() is not None] == []


def test_greenlets_beyond_the_limit_of_idle_ones_end(two, recorder):
    release = Event()

    def waits():
        recorder("began")
        release.wait()
        recorder("ended")

    for _ in range(20):
        two.engine.callback(waits)
    recorder.wait_for(20)
    assert two.greenlets() == 20
    release.set()
    recorder.wait_for(40)
    gevent.sleep(0)
    assert two.pool.made == 20
    assert two.greenlets() == len(two.pool) == 1


def test_idle_connections_have_one_greenlet_each_at_most(two, recorder):
    two.serve(lambda stream: recorder("connected"), lambda stream: recorder("connected"))
    for _ in range(2):
        gevent.sleep(0)
    before = count(greenlet)
    for number in range(1, 101):
        two.dial().sendall(b"x")
        recorder.wait_for(number)
    for sock in two.sockets:
        assert in_thread(sock.recv, 10) == b"x"
    assert len(two.server.channels) == 100
    assert count(greenlet) - before <= 100


# ---- a stream that waits for input holds nothing on its stack


def change_greenlet(stream, kept):
    """Let a new greenlet go on with the read loop of a stream that waits for input; the old one is put aside in `kept`."""
    assert stream._waiting, "the stream does not wait"
    stream._reader.stop()
    stream._waiting = False  # as the end of the wait would have done
    kept.append(stream._greenlet)

    def goes_on():
        stream._greenlet = getcurrent()
        stream._read_loop()
        stream._greenlet = None

    new = greenlet(goes_on, parent=gevent.get_hub())
    stream._greenlet = new
    gevent.get_hub().loop.run_callback(new.switch)
    gevent.sleep(0)
    assert stream._waiting, "the new greenlet does not wait"


def dispose(stream, kept):
    """End the greenlets that were put aside; each of them will say that this is the end of the stream."""
    assert stream.closed
    stream.on_close = lambda: None
    for old in kept:
        gevent.get_hub().loop.run_callback(old.throw, gevent.GreenletExit)
    gevent.sleep(0)


def let_it_wait(stream, end):
    """Return once the stream has taken everything that was sent to it and waits for more."""
    while not (end.all_taken and stream._waiting):
        gevent.sleep(0)


#: Bytes of a stream's first receive at most, which grow fourfold after one that was filled.
RECEIVE = 4096

#: Delimiters, and pieces each of which is sent alone; more than the stream receives at once takes it several receives.
INPUTS = {
    "bytes": (b"\n", [b"one\ntw", b"o\nthr", b"ee\n", b"\nfour", b" and more", b"\nrest"]),
    "bytes of two": (b"\r\n", [b"one\r", b"\ntwo\r\nth", b"ree\r", b"x\r\n", b"\r", b"\n", b"rest\r"]),
    "long line": (b"\n", [b"a" * RECEIVE, b"b" * 4 * RECEIVE, b"c\nd" + b"d" * RECEIVE, b"e" * 20_000, b"e\n", b"f\nrest"]),
    "int": (10, [b"0123456", b"789012", b"3456789" * 3, b"x" * 12]),
    "large int": (20_000, [b"a" * RECEIVE, b"b" * 4 * RECEIVE, b"c" * 15_000, b"d" * 5_000, b"e" * 7]),
    "none": (None, [b"one", b"a" * RECEIVE, b"b" * 4 * RECEIVE, b"two"]),
}


def chunks_of(stream_class, pieces, recorder, change_after=()):
    """Feed `pieces` to a stream, let it change its greenlet after some of them, and return what its callbacks got."""
    del recorder[:]
    kept = []
    stream, end = memory_pair(recorder.of(stream_class, "on_read", "on_end", "on_overflow_error", "on_close"))
    for number, piece in enumerate(pieces):
        end.send(piece)
        let_it_wait(stream, end)
        if number in change_after:
            change_greenlet(stream, kept)
    end.shutdown_output()
    recorder.wait_for("on_end")
    while not stream.closed:
        gevent.sleep(0)
    dispose(stream, kept)
    return [event for event in recorder if event != ("on_close",)]


@pytest.mark.parametrize("name", INPUTS)
def test_stream_that_changes_its_greenlet_while_it_waits_reads_the_same_chunks(name, recorder):
    delimiter, pieces = INPUTS[name]
    stream_class = type("Reads", (Stream,), {"read_delimiter": delimiter, "on_read": lambda self, *chunk: None})
    undisturbed = chunks_of(stream_class, pieces, recorder)
    assert len(undisturbed) > 2
    for number in range(len(pieces)):
        assert chunks_of(stream_class, pieces, recorder, {number}) == undisturbed
    assert chunks_of(stream_class, pieces, recorder, range(len(pieces))) == undisturbed


def test_stream_that_changes_its_greenlet_keeps_the_size_of_its_receives(recorder):
    sizes = []
    stream, end = memory_pair(recorder.of(type("Lines", (Stream,), {"read_delimiter": b"\n"})))
    recorder.wait_for("on_connect")
    end.send(b"a" * RECEIVE)
    let_it_wait(stream, end)
    assert stream._receive_size == 4 * RECEIVE
    receive = stream._recv

    def noted(size):
        sizes.append(size)
        return receive(size)

    stream._recv = noted
    kept = []
    change_greenlet(stream, kept)
    end.send(b"b" * 5000 + b"\nrest")
    recorder.wait_for("on_read")
    end.shutdown_output()
    recorder.wait_for("on_end")
    while not stream.closed:
        gevent.sleep(0)
    dispose(stream, kept)
    assert set(sizes[:2]) == {4 * RECEIVE}
    assert recorder[1:3] == [("on_read", b"a" * RECEIVE + b"b" * 5000), ("on_end", b"rest")]


@pytest.mark.parametrize("when", ["in mid-batch", "between batches"])
def test_stream_that_changes_its_greenlet_in_one_by_one_mode_reads_the_same_chunks(when, recorder):
    class Packets(Stream):
        """Packets of a line with a length and then the body."""

        read_delimiter = b"\n"

        def on_read(self, data):
            if self.read_delimiter == b"\n":
                self.read_delimiter = int(data)
            else:
                self.read_delimiter = b"\n"

    pieces = {
        "in mid-batch": [b"3\nabc4\nab", b"cd", b"5", b"\nab", b"cde1", b"0\n0123456789", b"2", b"\na", b"b", b"7"],
        "between batches": [b"3\n", b"abc", b"4\n", b"abc", b"d", b"5\n", b"abcde2\nx", b"y7"],
    }[when]
    undisturbed = chunks_of(Packets, pieces, recorder)
    assert len(undisturbed) >= 7
    for number in range(len(pieces)):
        assert chunks_of(Packets, pieces, recorder, {number}) == undisturbed
    assert chunks_of(Packets, pieces, recorder, range(len(pieces))) == undisturbed


def test_stream_that_changes_its_greenlet_still_writes_and_hears_what_is_posted(recorder):
    class Echo(Stream):
        read_delimiter = b"\n"

        def on_read(self, data):
            self.write(data + b"\n")

        def on_write(self):
            recorder("on_write", getcurrent() is self._greenlet)

    stream, end = memory_pair(recorder.of(Echo, "on_read", "on_close"))
    kept = []
    end.send(b"one\ntw")
    recorder.wait_for(("on_write", True))
    let_it_wait(stream, end)
    change_greenlet(stream, kept)
    end.send(b"o\nrest")
    assert end.wait_for(8) == b"one\ntwo\n"
    recorder.wait_for(lambda seen: seen.count(("on_write", True)) == 2)
    change_greenlet(stream, kept)
    stream.close()
    gevent.sleep(0)
    assert stream._greenlet is None  # the close() was heard: the loop has returned
    dispose(stream, kept)
    assert [event for event in recorder if event[0] == "on_read"] == [("on_read", b"one"), ("on_read", b"two")]
