"""Flow control under load: much data between two ends of ours, a proxy, a broadcast, and a peer that reads nothing; in bounded memory."""

import hashlib
import select
import time

import gevent
import pytest
from echoes import Echo, EchoLines
from gevent import monkey
from needs import needs_proc
from peers import in_thread
from test_load import Program
from waiting import nothing_is_kept, unsent, until  # noqa: F401

from pants_green import Client, CloseReason, Connection, Engine

Poll = monkey.get_original("select", "poll")

MIB = 1 << 20

#: Seconds that any of these may take; an idle machine needs a tenth.
PATIENCE = 10.0

# gevent's subprocess forks, and what becomes of it here is exec at once.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")



def take(one, size):
    """Have a peer read `size` bytes and return them; its own recv_exactly is for little."""

    def run():
        data = bytearray()
        while len(data) < size and (more := one.socket.recv(min(size - len(data), MIB))):
            data += more
        return bytes(data)

    return in_thread(run)


def blob_of(size):
    """Return bytes of which no MiB looks like another."""
    return b"".join(hashlib.sha256(b"%d" % number).digest() * (MIB // 32) for number in range(size // MIB))


@pytest.fixture
def program():
    """Return a function that starts one of ``flow_servers.py``, and returns it and its port; ended at the end."""
    programs = []

    def start(*arguments):
        one = Program("flow_servers.py", *arguments, patched=monkey.is_module_patched("socket"))
        programs.append(one)
        return one, one.line()["port"]

    yield start
    for one in programs:
        one.close()


class Drained(Connection):
    def on_read(self, data):
        self.write(data)
        self.drain()


# ---- two ends of ours


class Collector(Client):
    """Sends what it is given, in single writes, and takes a digest of what comes back."""

    blobs = ()
    when = "on_connect"

    def on_connect(self):
        self.digest = hashlib.sha256()
        self.received = 0
        for blob in self.blobs:
            self.write(blob)

    def on_read(self, data):
        self.received += len(data)
        self.digest.update(data)


@pytest.mark.parametrize("kind", [Echo, Drained])
@pytest.mark.parametrize("sizes", [(15,), (64,), (15, 64)], ids=str)
def test_client_that_queues_a_lot_at_once_gets_everything_back_from_an_echo_server(server_of, kind, sizes):
    server = server_of(kind)
    blobs = [blob_of(size * MIB) for size in sizes]
    client = Collector()
    client.blobs = blobs
    client.connect(server.local_address)
    total = sum(map(len, blobs))
    try:
        until(lambda: getattr(client, "received", 0) == total, timeout=PATIENCE)
        assert client.digest.digest() == hashlib.sha256(b"".join(blobs)).digest()
        assert client.connected
    finally:
        client.abort()


@pytest.mark.parametrize("sizes", [(15,), (64,), (64, 64)], ids=str)
def test_client_that_queues_a_lot_from_outside_gets_everything_back(server_of, sizes):
    server = server_of(Echo)
    blobs = [blob_of(size * MIB) for size in sizes]
    blob = b"".join(blobs)
    client = Collector().connect(server.local_address)
    until(lambda: client.connected)
    for one in blobs:
        client.write(one)
    try:
        until(lambda: client.received == len(blob), timeout=PATIENCE)
        assert client.digest.digest() == hashlib.sha256(blob).digest()
    finally:
        client.abort()


def test_client_that_queues_a_lot_while_its_on_read_waits_gets_everything_back(server_of):
    server = server_of(Echo)
    blob = blob_of(64 * MIB)

    class Slow(Collector):
        def on_read(self, data):
            super().on_read(data)
            if self.received == 1:
                gevent.sleep(0.05)

    client = Slow()
    client.blobs = [b"!"]
    client.connect(server.local_address)
    until(lambda: getattr(client, "received", 0) == 1)
    client.write(blob)
    try:
        until(lambda: client.received == 1 + len(blob), timeout=3)
    finally:
        client.abort()


def test_client_that_queues_lines_without_reading_first_gets_everything_back(server_of):
    server = server_of(EchoLines)
    line = b"x" * 99 + b"\n"
    count = 200_000
    client = Collector().connect(server.local_address)
    until(lambda: client.connected)
    # A plain greenlet: it waits for room, and the client goes on reading meanwhile.
    for _ in range(count):
        client.write(line)
    try:
        until(lambda: client.received == count * len(line), timeout=PATIENCE)
    finally:
        client.abort()


def test_client_that_ends_after_a_lot_still_owes_nothing(server_of):
    received = []
    server = server_of(Connection, on_read=lambda connection, data: received.append(len(data)))
    client = Client().connect(server.local_address)
    until(lambda: client.connected)
    client.write(bytes(64 * MIB))
    client.end()
    until(lambda: sum(received) == 64 * MIB, timeout=PATIENCE)
    until(lambda: client.closed)
    assert client.close_reason is CloseReason.ENDED_HERE


# ---- a proxy


@needs_proc
@pytest.mark.parametrize("direction", ["to", "from"])
def test_proxy_with_a_slow_far_end_stays_bounded_and_loses_nothing(program, listening_peer, peer, direction):
    listener = listening_peer()
    proxy, port = program("proxy", listener.address[1])
    near = peer(("127.0.0.1", port))
    far = listener.accept()
    source, drain = (near, far) if direction == "to" else (far, near)
    blob = blob_of(64 * MIB)
    writer = gevent.spawn(source.send, blob)
    # What is read while the proxy cannot go on would have grown it. A little at first, slowly; then all.
    pieces = [drain.recv(16 * 1024) for _ in range(50)]
    while not pieces or sum(map(len, pieces)) < 8 * MIB:
        pieces.append(drain.recv(256 * 1024))
    stalled = proxy.go_on()
    assert not writer.ready()
    rest = take(drain, len(blob) - sum(map(len, pieces)))
    writer.get(timeout=PATIENCE)
    assert hashlib.sha256(b"".join(pieces) + rest).digest() == hashlib.sha256(blob).digest()
    state = proxy.go_on()
    print(f"proxy: {stalled} {state}")
    # Above high_water by one receive at most, of 256 KiB.
    assert state["pending"] <= 512 * 1024
    assert state["peak"] < 8 * MIB
    near.close()
    assert far.recv_all() == b""


@needs_proc
def test_proxy_both_directions_at_once_with_both_ends_reading_late(program, listening_peer, peer):
    listener = listening_peer()
    proxy, port = program("proxy", listener.address[1])
    near = peer(("127.0.0.1", port))
    far = listener.accept()
    blob = blob_of(16 * MIB)
    writers = [gevent.spawn(end.send, blob) for end in (near, far)]
    gevent.sleep(0.1)
    readers = [gevent.spawn(take, end, len(blob)) for end in (far, near)]
    for greenlet in (*readers, *writers):
        greenlet.get(timeout=PATIENCE)
    assert all(hashlib.sha256(reader.value).digest() == hashlib.sha256(blob).digest() for reader in readers)
    assert proxy.go_on()["peak"] < 12 * MIB


# ---- a broadcast


@pytest.mark.parametrize("place", ["timer", "channel"])
@pytest.mark.parametrize("overflow", ["close", "drop"])
def test_broadcast_to_twenty_peers_never_waits_for_one_that_does_not_read(server_of, peer, recorder, place, overflow):
    count = 300
    message = bytes(range(256)) * 256

    def broadcast(server, start, stop):
        for number in range(start, stop):
            for connection in server.channels.values():
                connection.write(b"%08d" % number + message)

    class Chat(Connection):
        write_limit = 4 * MIB

        def on_close(self):
            recorder("closed", self.remote_address, self.close_reason)

    Chat.overflow = overflow
    server = server_of(Chat)
    stuck = peer(server)
    readers = [peer(server) for _ in range(19)]
    until(lambda: len(server.channels) == 20)
    lazy = next(one for one in server.channels.values() if one.remote_address == stuck.address)
    size = (len(message) + 8) * count
    received = {reader.socket.fileno(): 0 for reader in readers}
    digests = {reader.socket.fileno(): hashlib.sha256() for reader in readers}

    def read_all():
        poll = Poll()
        by_number = {reader.socket.fileno(): reader.socket for reader in readers}
        for number in by_number:
            poll.register(number, select.POLLIN)
        deadline = time.monotonic() + PATIENCE
        while min(received.values()) < size and time.monotonic() < deadline:
            for number, _ in poll.poll(1000):
                data = by_number[number].recv(MIB)
                received[number] += len(data)
                digests[number].update(data)

    reading = gevent.spawn(in_thread, read_all)
    # A batch at a time, each no more than the others have room for; none of them may wait.
    longest = 0.0
    step = 10
    for start in range(0, count, step):
        until(lambda: all(unsent(one) < MIB for one in server.channels.values() if one is not lazy))
        done = gevent.event.Event()

        def send(*_, start=start, done=done):
            nonlocal longest
            began = time.monotonic()
            broadcast(server, start, start + step)
            longest = max(longest, time.monotonic() - began)
            done.set()

        if place == "timer":
            Engine.instance().defer(0, send)
        else:
            other = server_of(Connection, on_connect=send)
            peer(other).close()
        assert done.wait(5)
    reading.get(timeout=PATIENCE)
    assert set(received.values()) == {size}
    expected = hashlib.sha256(b"".join(b"%08d" % number + message for number in range(count))).digest()
    assert {digest.digest() for digest in digests.values()} == {expected}
    assert longest < 2.0
    if overflow == "close":
        recorder.wait_for(1)
        assert recorder == [("closed", stuck.address, CloseReason.OVERFLOW)]
        assert len(server.channels) == 19
    else:
        assert recorder == []
        assert 0 < lazy.writes_dropped < count
        assert unsent(lazy) < 5 * MIB
        taken = (count - lazy.writes_dropped) * (len(message) + 8)
        whole = take(stuck, taken)
        assert unsent(lazy) == 0
        numbers = [int(whole[start : start + 8]) for start in range(0, taken, len(message) + 8)]
        assert numbers == sorted(set(numbers))


# ---- a peer that reads nothing


@needs_proc
@pytest.mark.parametrize("kind", ["echo", "lines"])
def test_peer_that_sends_400_mib_and_reads_nothing_costs_no_more_than_32_mib(program, peer, kind):
    server, port = program(kind)
    one = peer(("127.0.0.1", port))
    piece = (b"x" * 1023 + b"\n") * 1024
    sent = 0

    def send():
        nonlocal sent
        one.socket.settimeout(0.4)
        try:
            while sent < 400 * MIB:
                sent += one.socket.send(piece)
        except TimeoutError:
            pass

    in_thread(send)
    state = server.go_on()
    print(f"{kind}: sent {sent / MIB:.1f} MiB, {state}")
    assert sent < 400 * MIB
    assert state["peak"] <= 32 * MIB
    # It is served as before once it reads.
    one.socket.settimeout(10.0)
    assert len(take(one, 8 * MIB)) == 8 * MIB
    # Others were never held up.
    other = peer(("127.0.0.1", port))
    other.send(b"hello\n")
    answer = b"hello\n" if kind == "echo" else b"hello" * 8
    assert other.recv_exactly(len(answer))[: len(answer)] == answer
