"""What the hot path promises, counted and not timed: sends, receives, callbacks, greenlets, lookups.

Calls are counted at the seam: a stream's ``_recv``, ``_send`` and ``_reader`` are replaced in ``on_connect``, before the read
loop begins.
"""

import gc
import json
import os
import re
import shutil
import socket as stdlib_socket
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import gevent
import gevent.socket
import gevent.subprocess
import pytest
from echoes import Echo, EchoLines
from gevent.event import Event
from greenlet import getcurrent, greenlet
from peers import PlainSocket, in_thread

from pants_green import Connection, Engine, Stream, _sockets
from pants_green.errors import StreamConnectError
from pants_green.testing import memory_pair

KIB = 1024


class Ledger:
    """Every call at the seam of the streams that it counts: ``(stream, what, detail, outcome, greenlet's name)``."""

    def __init__(self):
        self.calls = []
        self._changed = Event()

    def of(self, base, **attributes):
        """Return a subclass of `base` whose instances are counted from their ``on_connect`` on, which then runs."""
        opened = attributes.pop("on_connect", base.on_connect)

        def on_connect(stream):
            self.count(stream)
            opened(stream)

        return type(f"Counted{base.__name__}", (base,), {**attributes, "on_connect": on_connect})

    def count(self, stream):
        stream._recv = self._counting(stream, "recv", stream._recv)
        stream._send = self._counting(stream, "send", stream._send)
        stream._reader = CountedWatcher(self, stream, stream._reader)

    def _counting(self, stream, what, call):
        def counting(argument):
            detail = argument if what == "recv" else len(argument)
            try:
                result = call(argument)
            except BaseException as error:
                self.note(stream, what, detail, type(error))
                raise
            self.note(stream, what, detail, len(result) if what == "recv" else result)
            return result

        return counting

    def note(self, stream, what, detail, outcome):
        # Not the greenlet itself: that reference would keep it from being used again.
        current = getcurrent()
        where = "hub" if current is gevent.get_hub() else "own" if current is stream._greenlet else "other"
        self.calls.append((stream, what, detail, outcome, where))
        self._changed.set()

    def wait_for(self, stream, reading):
        """Wait until `reading` has this stream's receives and waits in it, one after the other, and nothing else."""
        with gevent.Timeout(5.0, False):
            while self.reading(stream) != reading:
                self._changed.clear()
                self._changed.wait()
            return
        raise AssertionError(f"waited for {reading}; there was {self.reading(stream)}")

    def sends(self, *streams):
        """Return (length, sent, where) of every send of these streams, of all by default."""
        return [call[2:] for call in self.calls if call[1] == "send" and (not streams or call[0] in streams)]

    def receives(self, stream):
        """Return (size, received, where) of every receive."""
        return [call[2:] for call in self.calls if call[1] == "recv" and call[0] is stream]

    def reading(self, stream):
        """Return "wait" for each wait for input, and what each receive returned, in order."""
        return ["wait" if call[1] == "wait" else call[3] for call in self.calls if call[1] in ("recv", "wait") and call[0] is stream]

    def clear(self):
        self.calls.clear()


class CountedWatcher:
    """A watcher whose starts are noted as "wait"."""

    def __init__(self, ledger, stream, watcher):
        self._ledger = ledger
        self._stream = stream
        self._watcher = watcher

    def start(self, *args):
        self._ledger.note(self._stream, "wait", None, None)
        self._watcher.start(*args)

    def __getattr__(self, name):
        return getattr(self._watcher, name)


@pytest.fixture
def ledger():
    """Return an empty Ledger."""
    counted = Ledger()
    yield counted
    counted.clear()


class Relay(Connection):
    """What one says all others hear."""

    read_delimiter = b"\n"

    def on_read(self, line):
        for other in self.server.channels.values():
            if other is not self:
                other.write(line + b"\n")


def lines_of(count):
    return b"".join(b"line %03d\n" % number for number in range(count))


def crowd_of(count, server, peer, recorder):
    """Connect `count` peers and wait until the server has them all."""
    found = [peer(server) for _ in range(count)]
    recorder.wait_for(lambda events: len(server.channels) == count)
    return found


# ---- sends


def test_send_hundred_lines_relayed_to_fifty_speakersare_one_send_each(server_of, peer, recorder, ledger):
    server = server_of(recorder.of(ledger.of(Relay), "on_connect"))
    speaker, *listeners = crowd_of(51, server, peer, recorder)
    said = lines_of(100)
    speaker.send(said)
    assert [one.recv_exactly(len(said)) for one in listeners] == [said] * 50
    assert [(length, sent) for length, sent, _ in ledger.sends()] == [(len(said), len(said))] * 50
    assert len({call[0] for call in ledger.calls if call[1] == "send"}) == 50


def test_send_hundred_replies_to_one_batch_are_one_send(server_of, peer, recorder, ledger):
    server = server_of(ledger.of(EchoLines))
    one = peer(server)
    asked = lines_of(100)
    one.send(asked)
    assert one.recv_exactly(len(asked)) == asked
    one.send(asked)
    assert one.recv_exactly(len(asked)) == asked
    assert [(length, sent) for length, sent, _ in ledger.sends()] == [(len(asked), len(asked))] * 2


def test_send_writes_of_a_timer_to_twenty_channels_are_one_send_each(server_of, peer, recorder, ledger):
    server = server_of(recorder.of(ledger.of(Connection), "on_connect"))
    listeners = crowd_of(20, server, peer, recorder)

    def tell_all():
        for turn in range(5):
            for channel in server.channels.values():
                channel.write(b"turn %d\n" % turn)

    server.engine.defer(0, tell_all)
    said = b"".join(b"turn %d\n" % turn for turn in range(5))
    assert [one.recv_exactly(len(said)) for one in listeners] == [said] * 20
    assert [(length, sent) for length, sent, _ in ledger.sends()] == [(len(said), len(said))] * 20


def test_send_writes_before_a_callback_blocks_go_out_while_it_blocks(server_of, peer, ledger):
    released = Event()

    def on_read(stream, data):
        stream.write(b"before, ")
        stream.write(b"in two writes")
        released.wait()
        stream.write(b"after")

    server = server_of(ledger.of(Connection, on_read=on_read))
    one = peer(server)
    one.send(b"go")
    assert one.recv_exactly(21) == b"before, in two writes"
    assert not released.is_set()
    assert ledger.sends() == [(21, 21, "hub")]
    released.set()
    assert one.recv_exactly(5) == b"after"
    assert len(ledger.sends()) == 2


def test_send_writes_of_a_short_batch_to_few_channels_leave_at_the_end_of_the_turn(server_of, peer, recorder, ledger):
    server = server_of(recorder.of(ledger.of(Relay), "on_connect"))
    speaker, *listeners = crowd_of(16, server, peer, recorder)
    speaker.send(b"hello\n")
    assert [one.recv_exactly(6) for one in listeners] == [b"hello\n"] * 15
    assert ledger.sends() == [(6, 6, "hub")] * 15


def test_send_writes_of_one_batch_to_many_channels_are_flushed_by_the_read_loop(server_of, peer, recorder, ledger):
    server = server_of(recorder.of(ledger.of(Relay), "on_connect"))
    speaker, *listeners = crowd_of(41, server, peer, recorder)
    engine = server.engine
    [talker] = [stream for stream in server.channels.values() if stream.remote_address == speaker.address]
    waits = []
    start = talker._reader.start

    def watched(*args):
        waits.append(len(engine._dirty))
        start(*args)

    talker._reader.start = watched
    speaker.send(lines_of(10))
    for one in listeners:
        one.recv_exactly(90)
    # Not by the hub but in the greenlet of the one that was read, all of them before it waits for input again.
    sends = ledger.sends()
    assert [(length, sent) for length, sent, _ in sends] == [(90, 90)] * 40
    assert [where for *_, where in sends] == ["other"] * 40
    assert waits == [0]


def test_send_dirty_channels_stay_few_in_a_flood_of_full_receives(server_of, peer, recorder, ledger):
    dirty = []

    def on_connect(stream):
        receive = stream._recv

        def watched(size):
            dirty.append(len(stream.engine._dirty))
            return receive(size)

        stream._recv = watched

    server = server_of(recorder.of(ledger.of(Relay, on_connect=on_connect), "on_connect"))
    speaker, *listeners = crowd_of(41, server, peer, recorder)
    [talker] = [stream for stream in server.channels.values() if stream.remote_address == speaker.address]
    said = lines_of(9000)
    speaker.send(said)
    for one in listeners:
        assert one.recv_exactly(len(said)) == said
    # Some receives follow each other without a return to the hub, which would flush anyway.
    reading = ledger.reading(talker)
    assert any("wait" not in pair and BlockingIOError not in pair for pair in pairwise(reading))
    assert max(dirty) < 16


def test_send_large_receive_flushes_its_own_outbox_at_once(ledger):
    stream, end = memory_pair(ledger.of(Echo), capacity=256 * KIB)
    payload = bytes(range(256)) * 64  # 16 KiB
    ledger.wait_for(stream, [BlockingIOError, "wait"])
    ledger.clear()
    end.send(payload[:4096])  # a full receive: the next may be larger
    end.wait_for(4096)
    end.send(payload)
    end.wait_for(4096 + len(payload))
    assert ledger.sends() == [(4096, 4096, "hub"), (len(payload), len(payload), "own")]
    end.close()


def test_send_flush_true_sends_now_and_not_again(server_of, peer, ledger):
    def on_read(stream, data):
        stream.write(b"one ")
        stream.write(b"two", flush=True)

    server = server_of(ledger.of(Connection, on_read=on_read))
    one = peer(server)
    one.send(b"go")
    assert one.recv_exactly(7) == b"one two"
    one.send(b"go")
    assert one.recv_exactly(7) == b"one two"
    assert ledger.sends() == [(7, 7, "own")] * 2


# ---- receives


def test_recv_ping_pong_of_two_hundred_meets_eagain_at_most_once(server_of, peer, recorder, ledger):
    server = server_of(recorder.of(ledger.of(Echo), "on_connect", "on_close"))
    one = peer(server)
    recorder.wait_for("on_connect")
    [stream] = server.channels.values()
    for number in range(200):
        one.send(b"%03d" % number)
        assert one.recv_exactly(3) == b"%03d" % number
    outcomes = [received for _, received, _ in ledger.receives(stream)]
    assert outcomes.count(3) == 200
    assert outcomes.count(BlockingIOError) <= 1
    assert len(outcomes) <= 201
    assert len(ledger.sends()) == 200
    one.close()
    recorder.wait_for("on_close")
    assert [received for _, received, _ in ledger.receives(stream)][len(outcomes) :] == [0]


def test_recv_full_receive_is_followed_by_another_and_short_one_by_a_wait(ledger):
    stream, end = memory_pair(ledger.of(Stream))
    ledger.wait_for(stream, [BlockingIOError, "wait"])
    ledger.clear()
    end.send(bytes(5000))
    ledger.wait_for(stream, [4096, 904, "wait"])
    ledger.clear()
    end.send(bytes(4096))
    ledger.wait_for(stream, [4096, BlockingIOError, "wait"])
    end.close()


def test_recv_size_grows_with_full_receives_and_falls_back_after_a_small_one(ledger):
    stream, end = memory_pair(ledger.of(Stream))
    ledger.wait_for(stream, [BlockingIOError, "wait"])
    end.send(bytes(600 * KIB))
    end.wait_for(lambda: end.all_taken)
    receives = [(size // KIB, received) for size, received, _ in ledger.receives(stream) if received is not BlockingIOError]
    assert receives == [(size, size * KIB) for size in (4, 16, 64, 256, 256)] + [(256, 4 * KIB)]
    ledger.clear()
    for _ in range(2):
        end.send(b"small")
        end.wait_for(lambda: end.all_taken)
        gevent.sleep(0)
    assert [size // KIB for size, *_ in ledger.receives(stream)] == [256, 4]
    end.close()


def test_recv_is_not_called_while_a_callback_blocks(ledger):
    released = Event()
    stream, end = memory_pair(ledger.of(Stream, on_read=lambda stream, data: released.wait()))
    ledger.wait_for(stream, [BlockingIOError, "wait"])
    end.send(b"first")
    ledger.wait_for(stream, [BlockingIOError, "wait", 5])
    end.send(b"second")
    for _ in range(5):
        gevent.sleep(0)
    assert ledger.reading(stream) == [BlockingIOError, "wait", 5]
    released.set()
    ledger.wait_for(stream, [BlockingIOError, "wait", 5, "wait", 6, "wait"])
    end.close()


class AlwaysReadable:
    """A watcher whose descriptor is readable in every turn of the hub."""

    def __init__(self):
        self._asked = None

    def start(self, callback):
        self._asked = gevent.get_hub().loop.run_callback(callback)

    def stop(self):
        if self._asked is not None:
            self._asked.stop()


def test_recv_input_without_end_lets_others_run(recorder):
    stop_at = 0.0
    received = 0

    def receive(size):
        nonlocal received
        if time.monotonic() > stop_at:
            raise BlockingIOError
        received += size
        return bytes(size)

    def on_connect(stream):
        nonlocal stop_at
        stop_at = time.monotonic() + 1.0
        stream._recv, stream._reader = receive, AlwaysReadable()
        stream.engine.defer(0.03, lambda: recorder("timer", received))

    stream, _ = memory_pair(type("Flooded", (Stream,), {"on_connect": on_connect}))
    recorder.wait_for("timer")
    # The flood had begun when the timer ran, and was not over.
    [(_, before)] = recorder
    assert before > 0
    assert time.monotonic() < stop_at
    stream.abort()


@pytest.mark.parametrize("size", [100, 16 * KIB])
def test_poll_returns_after_a_receive_of_any_size(ledger, size):
    stream, end = memory_pair(ledger.of(Stream))
    ledger.wait_for(stream, [BlockingIOError, "wait"])
    end.send(bytes(4096))
    ledger.wait_for(stream, [BlockingIOError, "wait", 4096, BlockingIOError, "wait"])
    end.send(bytes(size))
    assert stream.engine.poll(2.0)
    assert ledger.receives(stream)[3][1] == size
    end.close()


# ---- callbacks


def test_on_write_hundred_writes_are_one_call_for_each_emptied_outbox(server_of, peer, recorder):
    def on_read(stream, data):
        for _ in range(100):
            stream.write(data)
        recorder("read")

    server = server_of(recorder.of(Connection, "on_write", "on_close", on_read=on_read))
    one = peer(server)
    for _ in range(3):
        one.send(b"x")
        one.recv_exactly(100)
    one.close()
    recorder.wait_for("on_close")
    assert recorder.names() == ["read", "on_write"] * 3 + ["on_close"]


def test_on_write_large_output_in_many_sends_is_one_call_at_the_end(recorder, ledger):
    def on_connect(stream):
        for _ in range(64):
            stream.write(bytes(64 * KIB))

    _, end = memory_pair(recorder.of(ledger.of(Stream, on_connect=on_connect), "on_write"))
    # The peer reads nothing at first, then piece by piece.
    gevent.sleep(0)
    gevent.sleep(0)
    assert recorder == []
    end.wait_for(64 * 64 * KIB)
    recorder.wait_for(1)
    gevent.sleep(0)
    assert recorder == [("on_write",)]
    assert len(ledger.sends()) > 4
    end.close()


# ---- greenlets


def busy_greenlets():
    """Count the greenlets that exist and are not waiting for a job."""
    idle = {id(one) for one in Engine.instance()._pool._free}
    return sum(isinstance(one, greenlet) and not one.dead and id(one) not in idle for one in gc.get_objects())


def test_greenlets_under_load_are_at_most_one_for_each_connection(server_of, peer, recorder):
    count = 30
    server = server_of(recorder.of(Echo, "on_connect"), on_read=lambda stream, data: stream.write(bytes(512 * KIB)))
    gc.collect()
    before = busy_greenlets()
    speakers = crowd_of(count, server, peer, recorder)
    assert busy_greenlets() - before <= count
    # Until all of them are owed more than the kernel takes: some wait for that, some for input.
    while sum(stream._pending > 0 for stream in server.channels.values()) < count:
        for one in speakers:
            one.socket.send(b"more")
        gevent.sleep(0.01)
    assert busy_greenlets() - before <= count


@pytest.mark.parametrize("at_once", [1, 8])
def test_greenlets_of_connections_that_come_and_go_are_used_again(server_of, recorder, at_once):
    server = server_of(recorder.of(EchoLines, "on_close"))
    pool = server.engine._pool

    def come_and_go():
        socks = [PlainSocket() for _ in range(at_once)]
        for sock in socks:
            sock.settimeout(10.0)
            sock.connect(server.local_address)
            sock.sendall(b"hello\n")
        answers = [sock.recv(100) for sock in socks]
        for sock in socks:
            sock.close()
        return answers

    made = pool.made
    for turn in range(1, 21):
        assert in_thread(come_and_go) == [b"hello\n"] * at_once
        recorder.wait_for(turn * at_once)
    assert pool.made - made <= at_once


def test_greenlets_of_timers_are_used_again(recorder):
    engine = Engine.instance()
    for turn in range(1, 51):
        engine.callback(recorder, turn)
        recorder.wait_for(turn)
        if turn == 2:
            made = engine._pool.made
    assert engine._pool.made == made


# ---- lookups and socket options


@pytest.fixture
def no_lookups(monkeypatch):
    """Make every lookup of a name fail the test; return the names that were asked for."""
    asked = []

    def getaddrinfo(*args, **kwargs):
        asked.append(args[0])
        raise stdlib_socket.gaierror(stdlib_socket.EAI_NONAME, "nobody looks anything up here")

    monkeypatch.setattr(gevent.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(stdlib_socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(_sockets, "_plain_getaddrinfo", getaddrinfo)
    return asked


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "", "0.0.0.0"])
def test_lookup_numeric_addresses_need_none(server_of, recorder, no_lookups, host):
    if host == "::1" and not _sockets.ipv6_works():
        pytest.skip("no IPv6 here")
    server = server_of(EchoLines, (host, 0))
    client = recorder.of(Stream, "on_connect", "on_read", "on_connect_error")()
    client.connect((host if host in ("127.0.0.1", "::1") else "127.0.0.1", server.local_address[1]))
    recorder.wait_for(1)
    client.write(b"hello\n")
    recorder.wait_for(2)
    assert recorder == [("on_connect",), ("on_read", b"hello\n")]
    assert no_lookups == []
    client.close()


def test_lookup_names_need_one(recorder, no_lookups):
    recorder.of(Stream, "on_connect_error", "on_close")().connect(("localhost", 1))
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect_error", "on_close"]
    assert isinstance(recorder[0][1], StreamConnectError)
    assert no_lookups == ["localhost"]


def options_of(sock):
    nodelay = sock.getsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY)
    return bool(nodelay), bool(sock.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_KEEPALIVE))


def test_options_accepted_sockets_inherit_nodelay_and_keepalive(server_of, peer, recorder, monkeypatch):
    server = server_of(recorder.of(Connection, "on_connect"))

    def never(*args):
        raise AssertionError("a socket option was set on an accepted socket")

    # Whatever sets an option on a gevent socket from now on fails.
    monkeypatch.setattr(_sockets, "set_tcp_defaults", never)
    monkeypatch.setattr(_sockets.GeventSocket, "setsockopt", never, raising=False)
    peer(server)
    recorder.wait_for("on_connect")
    [stream] = server.channels.values()
    assert options_of(stream.socket) == (True, True)
    monkeypatch.undo()


def test_options_dialled_sockets_have_nodelay_and_keepalive(server_of, recorder):
    server = server_of(Connection)
    client = recorder.of(Stream, "on_connect")().connect(server.local_address)
    recorder.wait_for("on_connect")
    assert options_of(client.socket) == (True, True)
    client.close()


# ---- system calls

#: An echo server that says its port, and ends with its first connection.
TRACED = """
import sys
from pants_green import Connection, Engine, Server

class Echo(Connection):
    read_delimiter = b"\\n"

    def on_read(self, line):
        self.write(line + b"\\n")

    def on_close(self):
        self.engine.stop()

engine = Engine.instance()
print(Server(Echo).listen(("127.0.0.1", 0)).local_address[1], flush=True)
engine.defer(20, sys.exit, "nobody came")
engine.start()
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_system_calls_of_ping_pong_are_one_receive_one_send_and_one_wait(tmp_path):
    count, log = 200, tmp_path / "trace"
    program = tmp_path / "traced.py"
    program.write_text(TRACED)
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(filter(None, [str(here.parent), os.environ.get("PYTHONPATH")]))
    server = gevent.subprocess.Popen(
        ["strace", "-o", str(log), sys.executable, str(program)],
        stdout=gevent.subprocess.PIPE,
        stderr=gevent.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        port = server.stdout.readline().decode().strip()
        if not port and server.wait(10.0) and b"ptrace" in server.stderr.read():
            pytest.skip("nobody may trace here")
        peer = [sys.executable, str(here / "load_peers.py"), "trips", port, str(count)]
        trips = gevent.subprocess.run(peer, stdout=gevent.subprocess.PIPE)
        assert len(json.loads(trips.stdout)["seconds"]) == count
        server.wait(10.0)
    finally:
        if server.poll() is None:
            server.terminate()
            server.wait()
        server.stdout.close()
        server.stderr.close()
    # From the connection on. Before that Python is busy with itself.
    calls = log.read_text()
    calls = calls[re.search(r"^accept4\(.*\) = \d+$", calls, re.MULTILINE).start() :]
    counted = Counter(re.findall(r"^(\w+)\(", calls, re.MULTILINE))
    assert counted["sendto"] == count
    assert count <= counted["recvfrom"] <= count + 2
    assert calls.count("EAGAIN") <= 2  # the first receive and the second accept
    assert counted["epoll_wait"] + counted["epoll_pwait"] + counted["epoll_pwait2"] <= 1.2 * count + 10
    # Everything else comes once for the connection and not for each message: watchers, options, memory. But libev asks for
    # its process number before it waits.
    for name in ("accept4", "sendto", "recvfrom", "epoll_wait", "epoll_pwait", "epoll_pwait2", "getpid"):
        del counted[name]
    assert counted["epoll_ctl"] <= 4
    assert counted["setsockopt"] == 0
    assert counted.total() <= 60
