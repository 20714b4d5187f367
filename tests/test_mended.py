"""Defects that a review found, and that are not to come back."""

import array
import contextvars
import dataclasses
import gc
import logging
import os
import signal
import traceback
import weakref
from struct import Struct
from unittest import mock

import gevent
import gevent.socket
import pytest
from children import Child, free_port
from children import Peer as BlockingPeer
from gevent.event import Event
from peers import PlainSocket, family_of, in_thread
from waiting import nothing_is_kept, turns, unsent, until  # noqa: F401

from pants_green import ChannelClosed, ChannelStateError, Client, Connection, Engine, Server, Stream, StreamServer, _sockets
from pants_green._scheduler import Scheduler
from pants_green.framing import LengthPrefix, Netstring, Varint
from pants_green.testing import memory_pair

KIB = 1024


class Echo(Connection):
    def on_read(self, data):
        self.write(data)


def connected_pair(stream, **options):
    """Return a connected stream and the memory end that is its peer."""
    stream, end = memory_pair(stream, **options)
    until(lambda: stream.connected)
    return stream, end


def answers(one, data=b"hello"):
    """Tell whether this peer is echoed."""
    one.send(data)
    return one.recv_exactly(len(data)) == data


# ---- The hub is interrupted, or wants to log

#: Nobody can be accepted for want of descriptors, of which the hub tells a log handler that is busy and waits.
BUSY_LOG = """
import logging, os, resource
import gevent
from gevent.event import Event
from pants_green import Connection, Server

told = Event()

class Slow(logging.Handler):
    def emit(self, record):
        if record.name == "pants_green.server" and record.event == "accept_paused":
            told.set()
        gevent.sleep(0.02)

slow = Slow()
for name in ("app", "pants_green"):
    logging.getLogger(name).addHandler(slow)

def log_on_and_on():
    while True:
        logging.getLogger("app").warning("this takes its time")
        gevent.sleep(0.01)

class Echo(Connection):
    def on_read(self, data):
        self.write(data)

server = Server(Echo)
server.listen(("127.0.0.1", 0))
gevent.spawn(log_on_and_on)
lowest_free = os.dup(0)
os.close(lowest_free)
before = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
print("port", server.local_address[1])
print("told", told.wait(5))
resource.setrlimit(resource.RLIMIT_NOFILE, before)
gevent.sleep(60)
"""


def test_log_handler_that_waits_while_the_hub_logs_does_not_stop_the_listener(tmp_path):
    script = tmp_path / "busy_log.py"
    script.write_text(BUSY_LOG)
    with Child("-m", "gevent.monkey", script) as child, BlockingPeer(child.port()) as one:
        one.socket.settimeout(5)
        child.expect("told True")
        one.send(b"hello")
        assert one.read(5) == b"hello"
        assert "Traceback" not in child.error_output()


def interrupt_once(monkeypatch, owner, name):
    """Raise KeyboardInterrupt where the method is entered next, as Ctrl-C may; afterwards it is as before."""
    method = getattr(owner, name)
    left = [KeyboardInterrupt]

    def interrupted(*args):
        if left:
            raise left.pop()
        return method(*args)

    monkeypatch.setattr(owner, name, interrupted)


def while_engine_runs(function, *args):
    """Run `function` in a greenlet while the engine runs, and return what it returns."""
    engine = Engine.instance()
    job = gevent.spawn(function, *args)
    job.link(lambda _: engine.stop())
    engine.start()
    return job.get()


def test_timers_go_on_after_an_interrupt_at_the_alarm(monkeypatch, recorder):
    engine = Engine.instance()
    interrupt_once(monkeypatch, Scheduler, "_alarmed")
    engine.defer(0.01, recorder, "set before")
    with pytest.raises(KeyboardInterrupt):
        engine.start()
    engine.defer(0.02, recorder, "set after")
    while_engine_runs(recorder.wait_for, 2)
    assert recorder == ["set before", "set after"]


def test_output_goes_on_after_an_interrupt_at_the_flush(monkeypatch, server_of, peer):
    server = server_of(Echo)
    first, second = peer(server), peer(server)
    until(lambda: len(server.channels) == 2)
    interrupt_once(monkeypatch, Engine, "_flush_asked_for")
    Engine.instance().callback(server.channels.values()[0].write, b"written before")
    with pytest.raises(KeyboardInterrupt):
        Engine.instance().start()
    assert while_engine_runs(first.recv_exactly, 14) == b"written before"
    assert while_engine_runs(answers, second)
    assert while_engine_runs(answers, first)


def test_ending_goes_on_after_an_interrupt_at_the_wake_up(monkeypatch, server_of, peer, recorder):
    server = server_of(recorder.of(Connection))
    peer(server)
    until(lambda: server.channels)
    interrupt_once(monkeypatch, Stream, "_wake")
    Engine.instance().callback(server.channels.values()[0].end)
    with pytest.raises(KeyboardInterrupt):
        Engine.instance().start()
    while_engine_runs(recorder.wait_for, "on_close")


def test_wake_up_for_a_wait_that_is_over_does_not_end_the_next_one():
    stream, end = connected_pair(Echo)
    waits = []
    stream._alert()
    stream.on_read = lambda data: waits.append(stream._wakeup)
    end.send(b"x")  # ends the wait in the very turn in which the wake-up is due
    turns()
    assert waits == [None]
    assert stream._wakeup is None
    assert stream._waiting
    stream.abort()


@pytest.mark.parametrize("entered", ["_accept_ready", "_accept_all"])
def test_accepting_goes_on_after_an_interrupt_at_the_listener(monkeypatch, server_of, peer, entered):
    interrupt_once(monkeypatch, StreamServer, entered)
    server = server_of(Echo)
    waiting = PlainSocket()
    waiting.connect(server.local_address)  # blocks for real, so that the hub does not run before start()
    with waiting:
        with pytest.raises(KeyboardInterrupt):
            Engine.instance().start()
        while_engine_runs(until, lambda: len(server.channels) == 1)
        assert while_engine_runs(lambda: answers(peer(server)))


# ---- close() and flush() send until the kernel takes no more


def test_close_sends_many_small_items_as_far_as_the_kernel_takes_them():
    stream, end = connected_pair(Stream, capacity=KIB * KIB)
    for _ in range(600):
        stream.write(b"x" * KIB)
    stream.close()
    assert len(end.wait_for()) == 600 * KIB


def test_flush_sends_many_small_items_as_far_as_the_kernel_takes_them():
    stream, end = connected_pair(Stream, capacity=KIB * KIB)
    for _ in range(600):
        stream.write(b"x" * KIB)
    stream.flush()
    assert unsent(stream) == 0
    assert len(end.received()) == 600 * KIB
    stream.close()


@pytest.mark.parametrize("how", ["close", "flush"])
def test_close_and_flush_send_also_while_the_stream_waits_to_be_writable(how):
    stream, end = connected_pair(Stream, capacity=KIB)
    stream.write(b"x" * 2 * KIB)
    until(lambda: unsent(stream) == KIB)
    turns()
    end.received()  # makes room, of which the stream is told in the next turn of the hub
    getattr(stream, how)()
    assert len(end.received()) == 2 * KIB
    stream.close()


# ---- Callbacks


def test_super_of_a_callback_that_an_instance_attribute_calls_does_not_recurse(recorder):
    class Careful(Stream):
        def on_write(self):
            recorder("on_write")
            super().on_write()

        def on_end(self, rest):
            recorder("on_end")
            super().on_end(rest)

    stream = Careful()
    stream.on_write, stream.on_end = (lambda call=stream.on_write: call()), (lambda rest, call=stream.on_end: call(rest))
    stream, end = connected_pair(stream)
    stream.write(b"x")
    end.wait_for(1)
    recorder.wait_for("on_write")
    end.shutdown_output()
    until(lambda: stream.closed)
    assert recorder == ["on_write", "on_end"]


def test_overridden_on_error_that_calls_super_keeps_the_server_when_a_constructor_raises(server_of, peer, recorder, caplog):
    class Fragile(Echo):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if not recorder:
                raise ValueError("one bad connection")

    class Telling(Server):
        def on_error(self, exception):
            recorder(str(exception), exception.__traceback__ is not None)
            super().on_error(exception)

    server = server_of(Fragile, server_class=Telling)
    peer(server)
    recorder.wait_for(("one bad connection", True))
    turns()
    assert server.listening
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert answers(peer(server))


@pytest.mark.parametrize("callback", ["on_connect", "on_read"])
def test_exception_given_to_on_error_and_on_close_still_has_its_traceback(recorder, callback):
    def fails(stream, *args):
        raise ValueError(callback)

    class Failing(Stream):
        def on_error(self, exception):
            recorder("before super()", exception.__traceback__ is not None)
            super().on_error(exception)
            recorder("after super()", exception.__traceback__ is not None)

        def on_close(self):
            recorder("on_close", "fails" in "".join(traceback.format_exception(self.close_error)))

    setattr(Failing, callback, fails)
    _, end = memory_pair(Failing)
    end.send(b"x")
    recorder.wait_for("on_close")
    assert recorder == [("before super()", True), ("after super()", True), ("on_close", True)]


# ---- Listening and dialling


def test_close_while_listen_looks_a_name_up_leaves_no_port_open(monkeypatch):
    resolve = _sockets.resolve

    def slow_resolve(address):
        found = resolve(address)
        gevent.spawn(server.close).join()
        return found

    monkeypatch.setattr(_sockets, "resolve", slow_resolve)
    server, port = Server(), free_port()
    with pytest.raises(ChannelStateError):
        server.listen(("127.0.0.1", port))
    assert server.closed
    with PlainSocket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_on_listen_is_done_before_anybody_is_accepted(server_of, peer, recorder):
    class Preparing(Server):
        def on_listen(self):
            peer(self)
            turns()
            recorder("prepared")

        def on_accept(self, sock, addr):
            recorder("accepted")
            super().on_accept(sock, addr)

    server_of(server_class=Preparing)
    recorder.wait_for(2)
    assert recorder == ["prepared", "accepted"]


def test_unix_dial_to_a_full_backlog_is_a_connect_error(tmp_path, listening_peer, recorder):
    path = str(tmp_path / "full")
    listening_peer(path, backlog=0)
    waiting = []
    try:
        while True:
            waiting.append(PlainSocket(family_of(path)))
            waiting[-1].setblocking(False)
            if waiting[-1].connect_ex(path):
                break
        client = recorder.of(Client)().connect(path)
        recorder.wait_for("on_close")
        assert recorder.names() == ["on_connect_error", "on_close"]
        assert client.closed
    finally:
        for one in waiting:
            one.close()


# ---- Who is known


def test_memory_stream_of_a_server_joins_its_channels_and_leaves_them():
    server = Server(Echo)
    stream, end = memory_pair(Echo(server=server))
    end.send(b"hello")
    assert end.wait_for(5) == b"hello"
    assert server.channels.values() == [stream]
    end.close()
    until(lambda: stream.closed)
    assert not server.channels


def test_connection_that_opens_after_its_server_closed_is_known_to_the_engine(server_of, peer):
    accepting, go_on = Event(), Event()

    class Slow(Server):
        def on_accept(self, sock, addr):
            accepting.set()
            go_on.wait()
            super().on_accept(sock, addr)

    server = server_of(Echo, server_class=Slow)
    one = peer(server)
    assert accepting.wait(5)
    server.close(connections=False)
    turns()
    go_on.set()
    assert answers(one)
    assert Engine.instance().channels == server.channels.values()
    one.close()
    until(lambda: not Engine.instance().channels)


def test_connection_made_in_another_greenlet_is_listed_once(server_of, peer):
    class Delegating(Server):
        def on_accept(self, sock, addr):
            gevent.spawn(super().on_accept, sock, addr).join()

    server = server_of(Echo, server_class=Delegating)
    assert answers(peer(server))
    assert Engine.instance().channels == [server, *server.channels.values()]
    assert len(server.channels) == 1


def test_dataclass_works_as_a_connection(server_of, peer, recorder):
    @dataclasses.dataclass(init=False)
    class Player(Echo):
        name: str = "nobody"

    server = server_of(recorder.of(Player, "on_close"))
    one = peer(server)
    assert answers(one)
    assert len(server.channels) == 1
    one.close()
    recorder.wait_for("on_close")
    assert not server.channels
    client = Player().connect(server.local_address)
    until(lambda: client.connected and len(server.channels) == 1)
    client.close()


def test_idle_greenlet_keeps_no_context_of_its_last_connection(server_of, peer, recorder):
    class Precious:
        pass

    variable = contextvars.ContextVar("variable")

    def on_connect(stream):
        precious = Precious()
        variable.set(precious)
        recorder(weakref.ref(precious))

    server = server_of(on_connect=on_connect)
    one = peer(server)
    recorder.wait_for(1)
    assert recorder[0]() is not None
    one.close()
    until(lambda: not server.channels)
    turns()
    assert recorder[0]() is None


# ---- Settings, arguments and chunks


@pytest.mark.parametrize("own", [{"buffer_size": 1000}, {}], ids=["own", "inherited"])
def test_setting_that_mock_patches_on_a_class_is_undone(own):
    patched = type("Patched", (Stream,), own)
    before = patched().buffer_size
    with mock.patch.object(patched, "buffer_size", 10):
        assert patched().buffer_size == 10
    assert patched.buffer_size == patched().buffer_size == before


def test_message_after_smaller_ones_arrives_in_one_chunk(recorder):
    class Raw(Stream):
        read_delimiter = None

        def on_read(self, data):
            recorder(len(data))

    stream, end = memory_pair(Raw)
    sizes = [64, 600] * 4
    for count, size in enumerate(sizes, 1):
        end.send(b"x" * size)
        recorder.wait_for(count)
    turns()
    assert recorder == sizes
    stream.close()


def test_high_water_below_low_water_pauses_reading(recorder):
    class Talkative(Stream):
        high_water = 1000

        def on_read(self, data):
            recorder(data)
            self.write(b"x" * 2000)

    stream, end = memory_pair(Talkative, capacity=100)
    assert stream.high_water < stream.low_water
    for _ in range(10):
        end.send(b"a")
        turns(2)
    assert len(recorder) == 1
    assert len(end.wait_for(20_000)) == 20_000
    assert len(recorder) == 10
    stream.close()


def test_server_of_the_wrong_kind_is_a_type_error():
    with pytest.raises(TypeError, match="server="):
        Stream(server=object())


def test_connection_class_with_an_equality_of_its_own_works(server_of, peer, recorder):
    class Equal(Stream):
        def __eq__(self, other):
            return self is other

    server = server_of(recorder.of(Equal))
    one = peer(server)
    recorder.wait_for("on_connect")
    assert len(server.channels) == 1
    one.close()
    recorder.wait_for("on_close")


def test_two_memory_streams_of_one_server_are_both_in_its_channels():
    server = Server()
    (first, first_end), (second, second_end) = (memory_pair(Stream(server=server)) for _ in range(2))
    until(lambda: len(server.channels) == 2)
    first_end.close()
    until(lambda: first.closed)
    assert server.channels.values() == [second]
    second_end.close()
    until(lambda: second.closed)


def test_interrupt_in_a_callback_leaves_start_with_its_traceback(server_of, peer):
    def deep(stream, data):
        raise SystemExit(3)

    server = server_of(type("Exits", (Stream,), {"on_read": deep}))
    one = peer(server)
    Engine.instance().callback(one.send, b"x")
    with pytest.raises(SystemExit) as caught:
        Engine.instance().start()
    assert "deep" in [frame.name for frame in caught.traceback]


# ---- What a subclass defines under a public name is its own


def test_write_of_a_subclass_is_not_called_again_for_a_write_that_has_waited(server_of, peer):
    class Ended(Connection):
        write_limit = 1

        def write(self, data, flush=False):
            super().write(data + b"|", flush)

    server = server_of(Ended)
    one = peer(server, rcvbuf=4096)
    until(lambda: server.channels)
    stream = server.channels.values()[0]
    many = 8 * KIB * KIB
    stream.write(b"x" * many)
    waiting = gevent.spawn(stream.write, b"two")
    until(lambda: stream._waiters)
    assert one.recv_exactly(many + 5)[-5:] == b"|two|"
    waiting.get(timeout=5)


def test_flush_of_a_subclass_is_not_called_by_write():
    class Flushed(Stream):
        def flush(self):
            raise AssertionError

    stream, end = connected_pair(Flushed)
    stream.write(b"x", flush=True)
    assert end.wait_for(1) == b"x"
    stream.abort()


# ---- What read(), and a write() that waits, leave behind


@pytest.mark.parametrize("where", ["on_connect", "on_read"])
@pytest.mark.parametrize("caught", [False, True])
def test_greenlet_is_used_again_after_a_read_that_the_peers_end_cut_short(server_of, peer, recorder, where, caught):
    def reads(stream, *data):
        try:
            stream.read(b"never", timeout=30)
        except ChannelClosed:
            if not caught:
                raise

    kind = recorder.of(Connection, "on_close", **{where: reads})
    server = server_of(kind)
    pool = Engine.instance()._pool
    gc.disable()
    try:
        for number in range(1, 11):
            one = peer(server)
            one.send(b"x")
            until(lambda: server.channels)
            one.close()
            recorder.wait_for(lambda events, number=number: len(events) == number)
            turns(2)
            if number == 2:
                made = pool.made
        assert pool.made == made
        assert not [one for one in gc.get_objects() if type(one) is kind]
    finally:
        gc.enable()


def test_stream_whose_output_stalled_is_freed_when_it_is_closed():
    stream, end = connected_pair(Stream, capacity=10)
    stream.write(b"x" * 100)
    turns()
    assert stream._limits is not None
    stream.abort()
    turns()
    alive = weakref.ref(stream)
    gc.disable()
    try:
        del stream, end
        turns()
        assert alive() is None
    finally:
        gc.enable()


def test_answers_to_bodies_that_were_read_hold_up_reading(server_of, peer):
    """A header by on_read, its body by read(), an answer: the peer who takes no answers is read no more."""

    class Bodies(Connection):
        read_delimiter = Struct("!I")

        def on_read(self, size):
            self.write(self.read(size))

    server = server_of(Bodies)
    one = peer(server, rcvbuf=4096)
    one.socket.setblocking(False)
    frame = (100_000).to_bytes(4, "big") + bytes(100_000)
    data, still = memoryview(frame * 400), 0
    most = 0
    while still < 30 and data:
        try:
            data = data[one.socket.send(data) :]
            still = 0
        except BlockingIOError:
            still += 1
        gevent.sleep(0.001)
        most = max(most, *(unsent(stream) for stream in server.channels.values() or [Stream()]))
    assert data, "everything was taken"
    assert most < 1_000_000


def test_read_timeout_does_not_begin_while_a_callback_reads(recorder):
    def on_connect(stream):
        stream.pause()
        stream.engine.defer(0.05, stream.resume)
        recorder(stream.read(b"\n"))
        stream.read_timeout = 30.0
        recorder("done")

    stream, end = memory_pair(recorder.of(Stream, "on_timeout", on_connect=on_connect, read_timeout=0.1))
    end.send(b"par")
    gevent.sleep(0.3)  # three times the limit: time must pass here
    end.send(b"tial\n")
    recorder.wait_for("done")
    assert recorder == [b"partial", "done"]
    assert stream.connected
    stream.abort()


def test_drain_in_its_own_callback_that_a_close_ends_is_no_error(server_of, peer, recorder, caplog):
    def on_read(stream, data):
        stream.write(bytes(8 * KIB * KIB))
        stream.engine.defer(0.01, stream.close)
        stream.drain()

    one = peer(server_of(recorder.of(Connection, "on_error", "on_close", on_read=on_read)), rcvbuf=4096)
    one.send(b"x")
    recorder.wait_for("on_close")
    assert recorder == [("on_close",)]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("packer", [LengthPrefix("!H"), Netstring(), Varint()], ids=repr)
def test_pack_counts_bytes_and_refuses_text(packer):
    numbers = array.array("I", [1, 2])
    assert packer.pack(numbers) == packer.pack(numbers.tobytes())
    with pytest.raises(TypeError, match=r"pack\(\) takes bytes, not str; encode it first"):
        packer.pack("text")


def test_read_tells_that_its_own_argument_is_wrong(recorder):
    def on_connect(stream):
        for delimiter, timeout in ((0, None), (b"x", -1)):
            with pytest.raises(ValueError, match=r"^read\(\) on <") as refused:
                stream.read(delimiter, timeout)
            recorder("delimiter" in str(refused.value), "timeout" in str(refused.value))

    stream, _ = memory_pair(recorder.of(Stream, "on_close", on_connect=on_connect))
    recorder.wait_for(2)
    assert recorder == [(True, False), (False, True)]
    stream.abort()


# ---- A signal that comes when the hub is about to wait


def test_signals_wake_the_hub_while_the_engine_runs_and_only_then():
    engine, seen = Engine.instance(), []

    def look():
        seen.append(signal.set_wakeup_fd(-1))
        signal.set_wakeup_fd(seen[0])
        seen.append(os.write(seen[0], b"\2"))  # what Python does when a signal comes
        gevent.sleep(0.01)
        engine.stop()

    engine.callback(look)
    engine.start()
    assert seen[0] >= 0
    assert seen[1] == 1
    assert signal.set_wakeup_fd(-1) == -1


def test_wake_up_descriptor_of_somebody_else_is_left_alone():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    try:
        Engine.instance().defer(0.01, Engine.instance().stop)
        Engine.instance().start()
        assert signal.set_wakeup_fd(-1) == writer
    finally:
        signal.set_wakeup_fd(-1)
        os.close(reader)
        os.close(writer)


def test_engine_of_another_thread_starts_without_signals():
    def run():
        engine = Engine.instance()
        engine.defer(0.01, engine.stop)
        engine.start()
        gevent.get_hub().destroy()
        return "done"

    assert in_thread(run) == "done"


def test_batch_that_cannot_be_decoded_to_its_end_is_not_kept(recorder):
    kind = recorder.of(Stream, "on_read", "on_read_error", "on_close", read_delimiter=b"\n", encoding="utf-8")
    stream, end = memory_pair(kind)
    end.send(b"fine\n\xff\nlost\n")
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_read", "on_read_error", "on_close"]
    assert stream._inbox.batch is None
