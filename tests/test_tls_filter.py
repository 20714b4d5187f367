"""The TLS filter by itself, over ports that are lists of bytes: no sockets, no hub."""

import errno
import os
import ssl

import gevent.ssl
import pytest
from certificates import client_context, server_context
from hypothesis import given, settings
from hypothesis import strategies as st

from pants_green._outbox import Outbox
from pants_green._tls import BURST, DORMANT, PIECE, RECORD, Filter, TLSError
from pants_green.testing.strategies import fragments

KIB = 1024
MIB = 1024 * KIB

VERSIONS = ["1.2", "1.3"]
both_versions = pytest.mark.parametrize("version", VERSIONS)

#: Few versions, many ways to cut.
versions = st.sampled_from(VERSIONS)

#: Bytes that the kernel takes, or gives, at once; 0: none now.
amounts = st.one_of(st.integers(0, 40), st.sampled_from([0, 100, 1000, 4096, 17 * KIB, 300 * KIB]))
at_least_one = amounts.filter(bool)

SERVER, CLIENT = {version: server_context(version) for version in VERSIONS}, {version: client_context(version) for version in VERSIONS}


class Watcher:
    """Remembers what it was started with."""

    def __init__(self):
        self.started = None

    def start(self, callback, *args):
        self.started = (callback, *args)

    def stop(self):
        self.started = None


class Wire:
    """One direction of a connection.

    Attributes:
        data: the bytes on their way.
        taken: how many bytes it has taken in all.
        room: bytes that the next sends take; None: everything.
        gives: bytes that a receive gives at most; None: all that was asked for.
        end: what a receive meets behind the bytes: None: nothing yet; b"": a FIN; or an exception.
        refuses: an exception that a send raises.
    """

    def __init__(self):
        self.data = bytearray()
        self.taken = 0
        self.room = self.gives = self.end = self.refuses = None

    def send(self, data):
        if self.refuses is not None:
            raise self.refuses
        room = len(data) if self.room is None else min(self.room, len(data))
        if not room:
            raise BlockingIOError(errno.EAGAIN, "full")
        if self.room is not None:
            self.room -= room
        self.data += memoryview(data)[:room]
        self.taken += room
        return room

    def recv(self, size):
        if self.data:
            size = size if self.gives is None else max(1, min(size, self.gives))
            data = bytes(self.data[:size])
            del self.data[:size]
            return data
        if self.end is None:
            raise BlockingIOError(errno.EAGAIN, "empty")
        if isinstance(self.end, Exception):
            raise self.end
        return self.end


class Soon:
    """What is to be called in the next turn."""

    def __init__(self):
        self.calls = []

    def __call__(self, callback, *args):
        call = Call(self, callback, args)
        self.calls.append(call)
        return call

    def turn(self):
        calls, self.calls = self.calls, []
        for call in calls:
            call.callback(*call.args)


class Call:
    def __init__(self, soon, callback, args):
        self.soon, self.callback, self.args = soon, callback, args

    def stop(self):
        if self in self.soon.calls:
            self.soon.calls.remove(self)


class End:
    """A filter and the two directions that it stands on."""

    def __init__(self, incoming, outgoing, context, server_side, **options):
        self.incoming, self.outgoing = incoming, outgoing
        self.reader, self.writer = Watcher(), Watcher()
        self.soon = Soon()
        raw = (incoming.recv, outgoing.send, self.reader, self.writer)
        name = None if server_side else "localhost"
        self.tls = Filter(context, raw, self.soon, server_side=server_side, server_hostname=name, **options)

    @property
    def fires(self):
        """Whether the read watcher fires at once, whatever the socket says."""
        self.tls.reader.start(bool)
        try:
            return bool(self.soon.calls)
        finally:
            self.tls.reader.stop()

    def read_all(self, size=4096):
        """Receive until there is nothing; return what came, and how it ended: None, b"" or an exception."""
        pieces = []
        while True:
            try:
                data = self.tls.recv(size)
            except BlockingIOError:
                # As a stream does: it waits for its watcher, which fires if something is left in the filter.
                if self.fires or self.incoming.data:
                    continue
                return b"".join(pieces), None
            except OSError as error:
                return b"".join(pieces), error
            if not data:
                return b"".join(pieces), data
            pieces.append(data)

    def send_all(self, data):
        """Send all, as a stream does."""
        outbox = Outbox()
        outbox.items.append(data)
        pending = len(data)
        while pending:
            sent = self.tls.send(outbox.head(pending))
            pending -= sent
            outbox.sent(sent)


def pair(version="1.3", shake=True, client=None, server=None):
    """Return the client's and the server's end of a connection."""
    up, down = Wire(), Wire()
    one = End(down, up, client or CLIENT[version], False)
    two = End(up, down, server or SERVER[version], True)
    if shake:
        shake_hands(one, two)
    return one, two


def shake_hands(one, two):
    for _ in range(100_000):
        if one.tls.shake_hands() is None and two.tls.shake_hands() is None:
            assert one.tls.established
            assert two.tls.established
            return
        two.tls.shake_hands()
    raise AssertionError("the handshake comes to no end")


def standing(version):
    """Return both ends, with the tickets of TLS 1.3 out of the way."""
    one, two = pair(version)
    assert one.read_all() == (b"", None)
    return one, two


class Plain:
    """The other side as OpenSSL alone plays it: encrypts, record by record, without a filter."""

    def __init__(self, version, server_side=True, context=None):
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = context or (SERVER if server_side else CLIENT)[version]
        name = None if server_side else "localhost"
        self.object = context.wrap_bio(self.incoming, self.outgoing, server_side=server_side, server_hostname=name)

    def shake_hands(self, end):
        """Do the handshake with an End, up to and without the last bytes of this side, which are returned."""
        for _ in range(20):
            end.tls.shake_hands()
            self.incoming.write(bytes(end.outgoing.data))
            end.outgoing.data.clear()
            try:
                self.object.do_handshake()
            except ssl.SSLWantReadError:
                end.incoming.data += self.outgoing.read()
            else:
                return self.outgoing.read()
        raise AssertionError("the handshake comes to no end")

    def encrypt(self, data):
        self.object.write(data)
        return self.outgoing.read()

    def goodbye(self):
        with pytest.raises(ssl.SSLWantReadError):
            self.object.unwrap()
        return self.outgoing.read()

    def read(self, end):
        """Return everything that an End has sent, and whether it has said goodbye."""
        self.incoming.write(bytes(end.outgoing.data))
        end.outgoing.data.clear()
        pieces = []
        while True:
            try:
                data = self.object.read(1 << 16)
            except ssl.SSLWantReadError:
                return b"".join(pieces), False
            except ssl.SSLZeroReturnError:
                data = b""
            if not data:
                return b"".join(pieces), True
            pieces.append(data)


def with_plain(version, context=None):
    """Return the client's End, established, and the Plain server that it speaks to."""
    down, up = Wire(), Wire()
    end = End(down, up, context or CLIENT[version], False)
    plain = Plain(version)
    down.data += plain.shake_hands(end)
    assert end.tls.shake_hands() is None
    assert end.read_all() == (b"", None)
    return end, plain


# ---- The handshake


@both_versions
def test_handshake_tells_what_to_wait_for_and_then_that_it_is_done(version):
    one, two = pair(version, shake=False)
    assert two.tls.shake_hands() is two.reader
    assert one.tls.shake_hands() is one.reader
    assert not one.tls.established
    shake_hands(one, two)
    assert one.tls.object.version() == two.tls.object.version() == f"TLSv{version}"
    assert one.tls.shake_hands() is None


def test_handshake_for_which_the_kernel_has_no_room_waits_for_it():
    one, _ = pair(shake=False)
    one.outgoing.room = 10
    assert one.tls.shake_hands() is one.writer
    assert one.outgoing.taken == 10
    assert one.tls.shake_hands() is one.writer
    one.outgoing.room = None
    assert one.tls.shake_hands() is one.reader
    assert one.outgoing.data[:2] == b"\x16\x03"


@settings(max_examples=60, deadline=None)
@given(versions, st.lists(amounts, min_size=1, max_size=30), st.integers(1, 2000))
def test_handshake_may_be_cut_in_any_way(version, rooms, gives):
    one, two = pair(version, shake=False)
    one.incoming.gives = two.incoming.gives = gives
    waiting = {one: "?", two: "?"}
    rooms = iter(rooms)
    for _ in range(10_000):
        for end in (one, two):
            end.outgoing.room = next(rooms, None)
            waiting[end] = end.tls.shake_hands()
            assert waiting[end] in (None, end.reader, end.writer)
        if waiting == {one: None, two: None}:
            break
    one.outgoing.room = two.outgoing.room = None
    one.send_all(b"hello")
    assert two.read_all() == (b"hello", None)


@both_versions
@pytest.mark.parametrize("data", [b"220 mail.example ESMTP\r\n", b"\x15\x03\x03\x00\x02\x02\x28", b"\x16\x03\x03\xff\xff" + b"x" * 40])
def test_handshake_with_nonsense_fails(version, data):
    one, _ = pair(version, shake=False)
    one.incoming.data += data
    with pytest.raises(ssl.SSLError):
        for _ in range(3):
            one.tls.shake_hands()
    assert not one.tls.established


def test_failed_handshake_tells_the_peer_why():
    down, up = Wire(), Wire()
    one = End(down, up, ssl.create_default_context(), False)  # which does not know the authority
    two = End(up, down, SERVER["1.2"], True)
    one.tls.shake_hands()
    two.tls.shake_hands()
    with pytest.raises(ssl.SSLCertVerificationError):
        one.tls.shake_hands()
    with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
        two.tls.shake_hands()


@pytest.mark.parametrize("part", [0, 1, 50])
def test_end_during_the_handshake_is_an_error(part):
    one, two = pair(shake=False)
    one.tls.shake_hands()
    del up_to(two, part)[:]
    two.incoming.end = b""
    with pytest.raises(ssl.SSLEOFError):
        two.tls.shake_hands()


def up_to(end, part):
    """Leave so many bytes for an end to receive; return what was cut off."""
    rest = end.incoming.data[part:]
    del end.incoming.data[part:]
    return rest


def test_reset_during_the_handshake_is_what_the_socket_says():
    one, _ = pair(shake=False)
    one.incoming.end = ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    with pytest.raises(ConnectionResetError):
        one.tls.shake_hands()


@pytest.mark.parametrize("part", [1, 5, 100, 100_000])
def test_bytes_that_were_received_before_are_fed_to_the_handshake(part):
    one, two = pair(shake=False)
    one.tls.shake_hands()
    fed = bytes(two.incoming.data[:part])
    del two.incoming.data[:part]
    two.tls.feed(fed)
    shake_hands(one, two)
    two.send_all(b"hello")
    assert one.read_all() == (b"hello", None)


def test_plain_text_that_is_fed_fails_the_handshake():
    one, two = pair(shake=False)
    one.tls.shake_hands()
    two.tls.feed(b"MAIL FROM: somebody\r\n")
    with pytest.raises(ssl.SSLError):
        two.tls.shake_hands()


def test_nothing_but_what_is_clear_passes_before_the_handshake():
    up = Wire()
    end = End(Wire(), up, CLIENT["1.3"], False, clear=5)
    up.room = 3
    assert end.tls.send_clear(b"clear, and not more") == 3
    with pytest.raises(BlockingIOError):
        end.tls.send_clear(b"ar, and not more")
    up.room = None
    assert end.tls.send_clear(b"ar, and not more") == 2
    assert end.tls.clear == 0
    with pytest.raises(BlockingIOError):
        end.tls.send_clear(b", and not more")
    assert up.data == b"clear"
    end.incoming.data += b"plain"
    with pytest.raises(BlockingIOError):
        end.tls.recv_nothing(100)


def test_bad_name_of_a_server_is_a_ValueError():
    with pytest.raises(ValueError, match=r"idna|hostname"):
        Filter(CLIENT["1.3"], (None, None, Watcher(), Watcher()), Soon(), server_side=False, server_hostname=".x")


@pytest.mark.parametrize("maker", [ssl.SSLContext, gevent.ssl.SSLContext])
def test_contexts_of_either_kind_hear_the_name_that_is_asked_for(maker):
    from certificates import authority

    context = maker(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(**authority().localhost)
    names = []
    context.sni_callback = lambda connection, name, current: names.append((name, current is context, connection.server_side))
    pair(server=context)
    pair(server=context)
    assert names == [("localhost", True, True)] * 2


# ---- Both directions, in any pieces


class Sender:
    """What a stream does with its outbox, over an End; keeps account."""

    def __init__(self, end):
        self.end = end
        self.outbox = Outbox()
        self.pending = 0
        self.written = bytearray()
        self.reported = 0
        self.base = end.outgoing.taken

    def write(self, data):
        self.outbox.items.append(data)
        self.pending += len(data)
        self.written += data

    def flush(self):
        if not self.outbox.items:
            return
        head = self.outbox.head(self.pending)
        sent = self.end.tls.send(head)
        assert 0 <= sent <= len(head)
        self.reported += sent
        # What is encrypted is longer than what it says: so the kernel has had at least as much as is reported.
        assert self.reported <= self.end.outgoing.taken - self.base
        if sent == self.pending:
            self.outbox.items.clear()
        else:
            self.outbox.sent(sent)
        self.pending -= sent
        if sent and not self.pending:
            assert not self.end.tls._left  # the last byte counts only when all is gone
        assert self.reported + self.pending == len(self.written)


few = st.tuples(st.just("write"), st.integers(1, 4), st.one_of(st.integers(1, 60), st.sampled_from([4096, RECORD, RECORD + 1])))
actions = st.one_of(
    few,
    st.tuples(st.just("write"), st.just(1), st.sampled_from([70_000, PIECE + 5000])),
    st.tuples(st.just("flush"), amounts),
    st.tuples(st.just("receive"), at_least_one, at_least_one),
)


@settings(max_examples=80, deadline=None)
@given(versions, st.booleans(), st.lists(actions, max_size=25))
def test_any_writes_partial_sends_and_receives_give_the_same_bytes(version, from_server, script):
    one, two = standing(version)
    from_end, to_end = (two, one) if from_server else (one, two)
    sender = Sender(from_end)
    received = bytearray()
    filler = iter(range(1 << 30))
    for kind, *args in script:
        if kind == "write":
            for _ in range(args[0]):
                sender.write(bytes([next(filler) % 251]) * args[1])
        elif kind == "flush":
            from_end.outgoing.room = args[0]
            sender.flush()
        else:
            to_end.incoming.gives = args[0]
            try:
                data = to_end.tls.recv(args[1])
            except BlockingIOError:
                continue
            assert data
            received += data
            assert sender.written.startswith(received)
    from_end.outgoing.room = to_end.incoming.gives = None
    while sender.pending:
        sender.flush()
    rest, end = to_end.read_all()
    assert received + rest == sender.written
    assert end is None
    assert not to_end.fires


@settings(max_examples=60, deadline=None)
@given(versions, st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 3000), amounts, at_least_one), max_size=40))
def test_both_directions_at_once_do_not_disturb_each_other(version, script):
    one, two = standing(version)
    senders = {"a": Sender(one), "b": Sender(two)}
    ends = {"a": one, "b": two}
    got = {"a": bytearray(), "b": bytearray()}
    for who, size, room, gives in script:
        other = "b" if who == "a" else "a"
        senders[who].write(os.urandom(size))
        ends[who].outgoing.room = room
        senders[who].flush()
        ends[other].incoming.gives = gives
        try:
            got[other] += ends[other].tls.recv(4096)
        except BlockingIOError:
            pass
    for who, other in ("ab", "ba"):
        ends[who].outgoing.room = None
        while senders[who].pending:
            senders[who].flush()
        got[other] += ends[other].read_all()[0]
        assert got[other] == senders[who].written


@settings(max_examples=120, deadline=None)
@given(
    versions,
    st.lists(st.one_of(st.integers(1, 50), st.sampled_from([100, 3000, 4095, 4096, 5000, RECORD - 1, RECORD])), min_size=1, max_size=12),
    st.lists(st.tuples(at_least_one, at_least_one), min_size=1, max_size=60),
)
def test_nothing_that_can_be_decrypted_is_left_unless_the_reader_fires(version, sizes, steps):
    end, plain = with_plain(version)
    wire = bytearray()
    boundaries = []  # how many encrypted bytes bring how many plain ones
    total = 0
    for number, size in enumerate(sizes):
        wire += plain.encrypt(bytes([number % 251]) * size)
        total += size
        boundaries.append((len(wire), total))
    fed = got = 0
    for arrives, size in [*steps, (len(wire), 4096)]:
        end.incoming.data += wire[fed : fed + arrives]
        fed = min(len(wire), fed + arrives)
        # A stream receives until it gets less than it asked for, or nothing, and then waits for the watcher.
        while end.incoming.data or end.fires:
            try:
                data = end.tls.recv(size)
            except BlockingIOError:
                continue
            got += len(data)
        complete = max((plainly for encrypted, plainly in boundaries if encrypted <= fed), default=0)
        assert got == complete
    assert got == total


@settings(max_examples=100, deadline=None)
@given(versions, st.data())
def test_records_cut_anywhere_come_out_whole(version, data):
    end, plain = with_plain(version)
    texts = data.draw(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=6))
    got = bytearray()
    for piece in data.draw(fragments(b"".join(plain.encrypt(text) for text in texts))):
        end.incoming.data += piece
        got += end.read_all()[0]
    assert got == b"".join(texts)


@both_versions
@pytest.mark.parametrize("size", [1, 3000, RECORD])
@pytest.mark.parametrize("held_back", [1, 4, 20])
def test_record_whose_end_comes_later_is_read_whole(version, size, held_back):
    end, plain = with_plain(version)
    for _ in range(3):
        wire = plain.encrypt(b"x" * size)
        end.incoming.data += wire[:-held_back]
        assert end.read_all() == (b"", None)
        end.incoming.data += wire[-held_back:]
        assert end.read_all(256) == (b"x" * size, None)
        assert not end.fires


@both_versions
@pytest.mark.parametrize("size", [256, 4096, 65536, 256 * KIB])
def test_receive_gives_what_was_asked_for_while_there_is_more(version, size):
    end, plain = with_plain(version)
    data = bytes(range(256)) * 8 * KIB
    wire = b"".join(plain.encrypt(data[start : start + RECORD]) for start in range(0, len(data), RECORD))
    end.incoming.data += wire
    got = bytearray()
    while len(got) < len(data) - 2 * size - 2 * RECORD:
        piece = end.tls.recv(size)
        assert len(piece) >= min(size, RECORD - 1) or not got
        assert len(piece) <= 2 * size + 2 * RECORD
        got += piece
    assert got + end.read_all(size)[0] == data


# ---- Sending


@both_versions
def test_send_encrypts_no_more_than_a_piece_ahead_of_the_kernel(version):
    one, _ = standing(version)
    one.outgoing.room = 64 * KIB
    sent = one.tls.send(b"x" * 12 * MIB)
    assert 0 < sent <= 64 * KIB
    assert len(one.tls._left) <= PIECE + PIECE // 8


@both_versions
def test_send_lets_others_have_their_turn_in_between(version):
    one, two = standing(version)
    data = b"x" * 12 * MIB
    assert one.tls.send(data) == BURST
    assert one.outgoing.taken >= BURST
    one.send_all(data[BURST:])
    assert two.read_all(256 * KIB)[0] == data


@both_versions
@pytest.mark.parametrize("room", [0, 1, 7, 100])
def test_send_without_enough_room_loses_and_repeats_nothing_when_more_is_written(version, room):
    one, two = standing(version)
    sender = Sender(one)
    for number in range(50):
        sender.write(b"%d," % number * 20)
        one.outgoing.room = room
        sender.flush()
    one.outgoing.room = None
    while sender.pending:
        sender.flush()
    assert two.read_all()[0] == sender.written


@both_versions
def test_send_that_takes_nothing_reports_nothing(version):
    one, two = standing(version)
    one.outgoing.room = 0
    assert one.tls.send(b"hello") == 0
    assert one.tls.send(b"hello") == 0
    one.outgoing.room = None
    assert one.tls.send(b"hello, world") == 12
    assert two.read_all()[0] == b"hello, world"


def test_send_accepts_memoryviews():
    one, two = standing("1.3")
    assert one.tls.send(memoryview(b"hello, world")[7:]) == 5
    assert two.read_all()[0] == b"world"


@pytest.mark.parametrize("room", [None, 10])
def test_send_error_of_the_socket_is_raised(room):
    one, _ = standing("1.3")
    if room:
        one.outgoing.room = room
        one.tls.send(b"hello")
    one.outgoing.refuses = BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    with pytest.raises(BrokenPipeError):
        one.tls.send(b"hello")


# ---- The end


@both_versions
@pytest.mark.parametrize("size", [1, 5000, 40_000])
@pytest.mark.parametrize("gives", [None, 1, 1000])
def test_goodbye_behind_data_is_reported_next(version, size, gives):
    end, plain = with_plain(version)
    wire = b"".join(plain.encrypt(b"x" * min(RECORD, size - start)) for start in range(0, size, RECORD)) + plain.goodbye()
    end.incoming.data += wire
    end.incoming.gives = gives
    got, how = end.read_all()
    assert (len(got), how) == (size, b"")


@both_versions
def test_data_and_goodbye_in_one_receive_fire_the_reader(version):
    end, plain = with_plain(version)
    end.incoming.data += plain.encrypt(b"one") + plain.encrypt(b"two") + plain.goodbye()
    assert end.tls.recv(4096) == b"onetwo"
    assert not end.incoming.data
    assert end.fires  # the kernel will not tell
    assert end.tls.recv(4096) == b""
    assert end.tls.recv(4096) == b""  # also if it is asked again


@both_versions
def test_goodbye_and_fin_are_one_end(version):
    end, plain = with_plain(version)
    end.incoming.data += plain.goodbye()
    end.incoming.end = b""
    assert end.tls.recv(4096) == b""
    assert end.tls.recv(4096) == b""


@both_versions
@pytest.mark.parametrize("gives", [None, 1, 1000])
def test_end_without_goodbye_is_truncation_behind_the_data(version, gives):
    end, plain = with_plain(version)
    end.incoming.data += plain.encrypt(b"x" * 5000)
    end.incoming.end = b""
    end.incoming.gives = gives
    got, how = end.read_all()
    assert got == b"x" * 5000
    assert isinstance(how, ssl.SSLEOFError)
    assert isinstance(how, TLSError)


@both_versions
def test_end_in_mid_record_is_truncation_behind_the_data(version):
    end, plain = with_plain(version)
    end.incoming.data += plain.encrypt(b"whole") + plain.encrypt(b"half")[:-1]
    end.incoming.end = b""
    got, how = end.read_all()
    assert got == b"whole"
    assert isinstance(how, ssl.SSLEOFError)


NONSENSE = {
    "plain text": b"220 mail.example ESMTP\r\n",
    "forged record": b"\x17\x03\x03\x00\x20" + b"x" * 32,
    "huge record": b"\x17\x03\x03\xff\xff" + b"x" * 50,
}


@both_versions
@pytest.mark.parametrize("nonsense", [pytest.param(value, id=name) for name, value in NONSENSE.items()])
@pytest.mark.parametrize("gives", [None, 1, 100])
def test_nonsense_behind_data_is_reported_behind_it(version, nonsense, gives):
    end, plain = with_plain(version)
    end.incoming.data += plain.encrypt(b"one") + plain.encrypt(b"two") + nonsense
    end.incoming.gives = gives
    got, how = end.read_all()
    assert got == b"onetwo"
    assert isinstance(how, ssl.SSLError)
    assert not isinstance(how, ssl.SSLEOFError)
    with pytest.raises(ssl.SSLError):  # also if it is asked again
        end.tls.recv(4096)


@both_versions
@pytest.mark.parametrize("behind", ["reset", "time-out"])
@pytest.mark.parametrize("size", [64, 4096])
def test_error_of_the_socket_behind_data_is_reported_behind_it(version, size, behind):
    end, plain = with_plain(version)
    code = errno.ECONNRESET if behind == "reset" else errno.ETIMEDOUT
    complete = []

    def recv(wanted):
        # Fill one receive, by records of a byte each, so that the filter receives once more to have as much as was asked for.
        if complete:
            raise OSError(code, os.strerror(code))
        wire = b""
        while len(wire) < wanted:
            wire += plain.encrypt(b"x")
            if len(wire) <= wanted:
                complete.append(b"x")
        return wire[:wanted]

    end.tls._raw_recv = recv
    got, how = end.read_all(size)
    assert got == b"".join(complete)
    assert how.errno == code


@both_versions
@pytest.mark.parametrize("flow", ["goodbye", "data and goodbye", "data"])
def test_what_came_with_the_handshake_is_read_although_the_kernel_is_silent(version, flow):
    down, up = Wire(), Wire()
    end = End(down, up, CLIENT[version], False)
    plain = Plain(version)
    last = plain.shake_hands(end)
    if "data" in flow:
        last += plain.encrypt(b"early") + plain.encrypt(b" bird")
    if "goodbye" in flow:
        last += plain.goodbye()
    down.data += last
    while end.tls.shake_hands() is not None:
        pass
    assert end.fires or down.data
    got, how = end.read_all()
    assert got == (b"early bird" if "data" in flow else b"")
    assert how == (b"" if "goodbye" in flow else None)
    if "goodbye" not in flow:
        assert not end.fires
        down.data += plain.encrypt(b"later")
        assert end.read_all() == (b"later", None)


@both_versions
def test_goodbye_of_ours_before_early_data_is_read_does_not_destroy_it(version):
    down, up = Wire(), Wire()
    end = End(down, up, CLIENT[version], False)
    plain = Plain(version)
    down.data += plain.shake_hands(end) + plain.encrypt(b"early")
    while end.tls.shake_hands() is not None:
        pass
    assert end.tls.goodbye()
    down.data += plain.encrypt(b" and late") + plain.goodbye()
    got, how = end.read_all()
    assert (got, how) == (b"early and late", b"")
    assert plain.read(end) == (b"", True)


@both_versions
@pytest.mark.parametrize("kept", [False, True])
def test_goodbye_is_said_once_and_reading_goes_on(version, kept):
    end, plain = with_plain(version)
    end.send_all(b"last words")
    if kept:
        # The end of the peer is known, and not yet told, when ours is said.
        end.incoming.data += plain.encrypt(b"theirs") + plain.goodbye()
        assert end.tls.recv(4096) == b"theirs"
    taken = end.outgoing.taken
    assert end.tls.goodbye()
    said = end.outgoing.taken - taken
    assert 0 < said < 50
    assert end.tls.goodbye()
    assert end.outgoing.taken == taken + said
    assert plain.read(end) == (b"last words", True)
    if kept:
        assert end.read_all() == (b"", b"")
    else:
        end.incoming.data += plain.encrypt(b"one") + plain.encrypt(b"two")
        assert end.read_all() == (b"onetwo", None)


@both_versions
@pytest.mark.parametrize("room", [0, 1, 10])
def test_goodbye_for_which_there_is_no_room_is_said_when_there_is(version, room):
    end, plain = with_plain(version)
    end.outgoing.room = room
    calls = 0
    while not end.tls.goodbye():
        calls += 1
        assert calls < 100
        end.outgoing.room = max(room, 1)
    assert calls > 0
    assert plain.read(end) == (b"", True)
    assert end.tls.goodbye()
    assert not end.outgoing.data


@both_versions
def test_goodbye_answers_that_of_the_peer_and_output_goes_on_before(version):
    end, plain = with_plain(version)
    end.incoming.data += plain.goodbye()
    assert end.read_all() == (b"", b"")
    end.send_all(b"answer" * 1000)
    assert end.tls.goodbye()
    assert plain.read(end) == (b"answer" * 1000, True)


def test_goodbye_before_the_handshake_sends_nothing():
    one, _ = pair(shake=False)
    assert one.tls.goodbye()
    assert not one.outgoing.data


def test_goodbye_to_nobody_is_done():
    one, _ = standing("1.3")
    one.outgoing.refuses = BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    assert one.tls.goodbye()


@both_versions
@pytest.mark.parametrize("room", [0, 1, 1000, 3020, 3040, None])
def test_alert_goes_behind_what_is_half_sent_and_not_into_it(version, room):
    end, plain = with_plain(version)
    sender = Sender(end)
    sender.write(b"x" * 5000)
    end.outgoing.room = 2000
    sender.flush()
    end.incoming.data += b"220 mail.example ESMTP\r\n"
    end.outgoing.room = room
    assert isinstance(end.read_all()[1], ssl.SSLError)
    end.outgoing.room = None
    while sender.pending:
        sender.flush()
    plain.incoming.write(bytes(end.outgoing.data))
    got = b""
    with pytest.raises(ssl.SSLError, match=r"(?i)alert|wrong version|record"):
        while True:
            got += plain.object.read(1 << 16)
    assert got == sender.written


def test_what_was_read_last_can_be_put_back():
    end, plain = with_plain("1.3")
    end.incoming.data += plain.encrypt(b"hello")
    data = end.tls.recv(4096)
    end.tls.unread(data[1:])
    assert end.fires
    end.incoming.data += plain.encrypt(b" world")
    assert end.read_all() == (b"ello world", None)
    assert not end.fires


# ---- The watchers


def test_reader_is_that_of_the_socket_unless_something_is_kept():
    end, _ = with_plain("1.3")
    end.tls.reader.start(print, 1)
    assert end.reader.started == (print, 1)
    assert not end.soon.calls
    end.tls.reader.stop()
    assert end.reader.started is None


def test_reader_that_fires_calls_in_the_next_turn_until_it_is_stopped():
    end, _ = with_plain("1.3")
    end.tls.unread(b"kept")
    called = []
    end.tls.reader.start(called.append, 1)
    assert called == []
    assert end.reader.started is None
    end.soon.turn()
    assert called == [1]
    end.tls.reader.stop()
    end.tls.reader.start(called.append, 2)
    end.tls.reader.stop()
    end.soon.turn()
    assert called == [1]


def test_dormant_watcher_waits_for_nothing():
    DORMANT.start(print, 1)
    DORMANT.stop()
    DORMANT.stop()
