"""Streams while they live: opening, reading, writing. How they end is in test_stream_endings.py."""

import array
import functools
import logging
import re
import socket
import struct
import time

import gevent
import pytest
from gevent.event import Event
from peers import in_thread
from waiting import nothing_is_kept, turns, unread, unsent, until  # noqa: F401

from pants_green import (
    ChannelClosed,
    Client,
    CloseReason,
    Connection,
    Engine,
    InvalidReadDelimiterError,
    Stream,
    StreamBufferOverflow,
    WrongThreadError,
)
from pants_green.testing import fragmentations, memory_pair

KIB = 1024
MIB = 1024 * 1024

#: More than the buffers of both kernels hold.
BIG = 16 * MIB


class Echo(Connection):
    def on_read(self, data):
        self.write(data)


class Lines(Connection):
    read_delimiter = b"\r\n"


def chunks_of(recorder):
    """Return what on_read got."""
    return [event[1] for event in recorder if event[0] == "on_read"]


def only(server, count=1):
    """Return the stream, or the list of streams, of a server once there are `count`."""
    until(lambda: len(server.channels) == count)
    streams = server.channels.values()
    return streams[0] if count == 1 else streams


@functools.cache
def payload(size):
    """Return `size` bytes in which every misplaced piece shows."""
    return b"".join(b"%015d\n" % number for number in range(size // 16 + 1))[:size]


# ---- Opening


def test_s1_5_s1_7_s1_9_s3_5_s3_7_echo_answers(server_of, peer):
    one = peer(server_of(Echo))
    one.send(b"hello")
    assert one.recv_exactly(5) == b"hello"


@pytest.mark.parametrize("together", [False, True], ids=["one after the other", "at the same time"])
def test_s1_4_echo_answers_several_each_its_own(server_of, peer, together):
    server = server_of(Echo)
    first = peer(server)
    if not together:
        first.send(b"first")
        assert first.recv_exactly(5) == b"first"
        first.close()
    second = peer(server)
    if together:
        first.send(b"first")
        second.send(b"second")
        assert first.recv_exactly(5) == b"first"
    else:
        second.send(b"second")
    assert second.recv_exactly(6) == b"second"


def test_s3_13_on_connect_comes_before_any_on_read(server_of, peer, recorder):
    server = server_of(recorder.of(Stream))
    # The data is there before the connection is accepted.
    one = peer(server)
    one.send(b"early")
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_end", "on_close"]


def test_s1_8_every_connection_is_a_new_object(server_of, peer):
    server = server_of(Echo)
    peer(server)
    peer(server)
    first, second = only(server, 2)
    assert type(first) is type(second) is Echo
    assert first is not second


def test_s2_5_the_event_handlers_of_the_connection_class_can_be_overridden(server_of, peer, recorder):
    class Proud(Connection):
        def on_connect(self):
            recorder("connected", self.connected, self.server.channels.values() == [self])

    peer(server_of(Proud))
    recorder.wait_for(("connected", True, True))


def test_stream_knows_both_addresses(server_of, peer):
    server = server_of(Echo)
    one = peer(server)
    stream = only(server)
    assert stream.remote_address == one.address
    assert stream.local_address == server.local_address
    assert stream.fileno == stream.socket.fileno()
    assert (stream.connected, stream.connecting, stream.closed) == (True, False, False)
    assert stream.close_reason is None


def test_e1_23_nodelay_and_keepalive_are_on_at_both_ends(server_of, recorder):
    server = server_of(Stream)
    client = recorder.of(Client)().connect(server.local_address)
    recorder.wait_for("on_connect")
    for stream in (client, only(server)):
        assert stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    client.close()
    recorder.wait_for("on_close")


def test_stream_callbacks_may_block_and_others_go_on(server_of, peer):
    gate = Event()

    class Slow(Connection):
        def on_read(self, data):
            if data == b"wait":
                gate.wait()
            self.write(data)

    server = server_of(Slow)
    slow, quick = peer(server), peer(server)
    slow.send(b"wait")
    quick.send(b"quick")
    assert quick.recv_exactly(5) == b"quick"
    gate.set()
    assert slow.recv_exactly(4) == b"wait"


# ---- Reading: delimiters

LINES = b"one\r\ntwo\r\n\r\n\r three \n\r\n"


@pytest.mark.parametrize(
    ("delimiter", "data", "chunks", "rest"),
    [
        pytest.param(b"\r\n", LINES + b"part", [b"one", b"two", b"", b"\r three \n"], b"part", id="bytes"),
        pytest.param("\r\n", LINES, [b"one", b"two", b"", b"\r three \n"], b"", id="str"),
        pytest.param("\N{EURO SIGN}", "1\N{EURO SIGN}2\N{EURO SIGN}".encode() + b"\xe2\x82", [b"1", b"2"], b"\xe2\x82", id="str not ASCII"),
        pytest.param(b"aab", b"aaabaabxaaab", [b"a", b"", b"xa"], b"", id="begins like itself"),
        pytest.param(b"\0", b"\0\0x\0", [b"", b"", b"x"], b"", id="one byte"),
        pytest.param(4, b"abcdefgh12", [b"abcd", b"efgh"], b"12", id="int"),
        pytest.param(1, b"abc", [b"a", b"b", b"c"], b"", id="int 1"),
    ],
)
def test_s3_15_s4_12_s4_15_delimiter_gives_the_same_chunks_however_the_bytes_are_cut(recorder, delimiter, data, chunks, rest):
    for pieces in fragmentations(data):
        recorder.clear()
        _stream, end = memory_pair(recorder.of(Stream, read_delimiter=delimiter))
        for piece in pieces:
            end.send(piece)
        end.shutdown_output()
        recorder.wait_for("on_close")
        assert recorder == [("on_connect",), *(("on_read", chunk) for chunk in chunks), ("on_end", rest), ("on_close",)]


@pytest.mark.parametrize("delimiter", [b"\r\n", 20000], ids=["bytes", "int"])
def test_long_chunks_arrive_whole_over_a_socket(server_of, peer, recorder, delimiter):
    server = server_of(recorder.of(Stream, read_delimiter=delimiter))
    one = peer(server)
    body = payload(20000 if delimiter == 20000 else 50000)
    ending = b"" if delimiter == 20000 else delimiter
    for _ in range(3):
        for piece in (body[:9000], body[9000:] + ending[:1], ending[1:]):
            one.send(piece)
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert chunks_of(recorder) == [body] * 3
    assert ("on_end", b"") in recorder


def test_s3_17_s4_13_none_passes_on_at_once_what_arrives(server_of, peer, recorder):
    one = peer(server_of(recorder.of(Stream)))
    for number, data in enumerate((b"a", b"bc", b"d\r\n"), 1):
        one.send(data)
        recorder.wait_for(lambda events, number=number: len(chunks_of(events)) == number)
    assert chunks_of(recorder) == [b"a", b"bc", b"d\r\n"]


def test_s4_14_text_is_buffered_until_the_delimiter_is_met(server_of, peer, recorder):
    server = server_of(recorder.of(Lines))
    one = peer(server)
    one.send(b"ab")
    until(lambda: unread(only(server)) == 2)
    one.send(b"c\r")
    until(lambda: unread(only(server)) == 4)
    assert chunks_of(recorder) == []
    one.send(b"\n")
    recorder.wait_for(("on_read", b"abc"))


def test_s3_14_bytes_short_of_eight_stay_buffered(server_of, peer, recorder):
    server = server_of(recorder.of(Stream, read_delimiter=8))
    one = peer(server)
    one.send(b"1234567")
    until(lambda: unread(only(server)) == 7)
    assert chunks_of(recorder) == []
    one.send(b"8ABCDEFGHx")
    recorder.wait_for(("on_read", b"ABCDEFGH"))
    assert chunks_of(recorder) == [b"12345678", b"ABCDEFGH"]
    assert unread(only(server)) == 1


def test_s3_12_delimiter_8_set_in_on_connect_gives_blocks(server_of, peer):
    class BlockEcho(Stream):
        def on_connect(self):
            self.read_delimiter = 8

        def on_read(self, block):
            self.write(block + b"\r\n")

    one = peer(server_of(BlockEcho))
    one.send(b"0123456789abcdefX")
    assert one.recv_exactly(20) == b"01234567\r\n89abcdef\r\n"


def test_two_lines_in_one_packet_are_two_chunks(server_of, peer):
    class Double(Lines):
        def on_read(self, line):
            self.write(line * 2)

    one = peer(server_of(Double))
    one.send(b"line1\r\nline2\r\n")
    assert one.recv_exactly(20) == b"line1line1line2line2"


@pytest.mark.parametrize("where", ["class", "instance", "mixin", "mixin of a mixin", "inherited"])
def test_delimiter_may_be_set_wherever_attributes_are_set(server_of, peer, recorder, where):
    class Mixin:
        read_delimiter = ";"

    class Named(Connection):
        read_delimiter = ";"

    def itself(stream):
        stream.read_delimiter = ";"

    kinds = {
        "class": lambda: recorder.of(Connection, read_delimiter=";"),
        "instance": lambda: recorder.of(Connection, on_connect=itself),
        "mixin": lambda: type("Mixed", (Mixin, recorder.of(Connection)), {}),
        "mixin of a mixin": lambda: type("Mixed", (type("Deep", (Mixin,), {}), recorder.of(Connection)), {}),
        "inherited": lambda: recorder.of(Named),
    }
    one = peer(server_of(kinds[where]()))
    one.send(b"a;b;c")
    recorder.wait_for(("on_read", b"b"))
    assert chunks_of(recorder) == [b"a", b"b"]


def test_settings_may_be_changed_on_the_class_after_it_was_made(server_of, peer, recorder):
    """As programs do that configure the classes of others; what an instance says comes first all the same."""

    def change(stream, line):
        stream.read_delimiter = 2

    kind = recorder.of(Stream, on_read=change)
    kind.read_delimiter = b"\n"
    kind.buffer_size = 4
    server = server_of(kind)
    one = peer(server)
    one.send(b"a\nbcd\n")
    recorder.wait_for(lambda events: len(chunks_of(events)) == 3)
    assert chunks_of(recorder) == [b"a", b"bc", b"d\n"]
    assert only(server).buffer_size == 4


class Packets(Connection):
    """A length in 4 bytes, a body of that length, a line."""

    read_delimiter = 4
    step = 0

    def on_read(self, chunk):
        if self.step == 0:
            self.read_delimiter = struct.unpack("!I", chunk)[0]
        elif self.step == 1:
            self.read_delimiter = b"\n"
        else:
            self.read_delimiter = 4
        self.step = (self.step + 1) % 3


def test_s3_23_packet_protocol_by_changing_the_delimiter(recorder):
    def packet(body, line):
        return struct.pack("!I", len(body)) + body + line + b"\n"

    data = packet(b"\n\0\0\0\5", b"") + packet(b"x", b"abcd") + packet(b"same", b"4")
    wanted = [b"\0\0\0\5", b"\n\0\0\0\5", b"", b"\0\0\0\1", b"x", b"abcd", b"\0\0\0\4", b"same", b"4"]
    for pieces in fragmentations(data):
        recorder.clear()
        _stream, end = memory_pair(recorder.of(Packets))
        for piece in pieces:
            end.send(piece)
        end.shutdown_output()
        recorder.wait_for("on_close")
        assert chunks_of(recorder) == wanted, pieces


def test_s3_23_packet_protocol_over_a_socket(server_of, peer, recorder):
    one = peer(server_of(recorder.of(Packets)))
    body = payload(100_000)
    one.send((struct.pack("!I", len(body)) + body + b"line\n") * 5)
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert chunks_of(recorder) == [struct.pack("!I", len(body)), body, b"line"] * 5


def test_delimiter_changed_to_none_in_mid_batch_delivers_the_rest_at_once(server_of, peer, recorder):
    def headers_then_body(stream, line):
        if not line:
            stream.read_delimiter = None

    one = peer(server_of(recorder.of(Lines, on_read=headers_then_body)))
    one.send(b"a: 1\r\n\r\nbody\r\nbody")
    recorder.wait_for(("on_read", b"body\r\nbody"))
    assert chunks_of(recorder) == [b"a: 1", b"", b"body\r\nbody"]


@pytest.mark.parametrize(
    ("delimiter", "chunk", "left"), [(b"\n", b"abc;def", 0), (";", b"abc", 4), (3, b"abc", 2), (None, b"abc;def\n", 0)], ids=repr
)
def test_delimiter_changed_from_another_greenlet_reaches_what_waits(server_of, peer, recorder, delimiter, chunk, left):
    server = server_of(recorder.of(Stream, read_delimiter=b"\n\n"))
    one = peer(server)
    one.send(b"abc;def\n")
    stream = only(server)
    until(lambda: unread(stream) == 8)
    stream.read_delimiter = delimiter
    recorder.wait_for("on_read")
    assert chunks_of(recorder)[0] == chunk
    assert unread(stream) == left


def test_delimiter_changed_reaches_the_beginning_of_a_long_chunk_that_was_searched_in_vain(recorder):
    stream, end = memory_pair(recorder.of(Lines))
    for _ in range(5):
        end.send(b"abc;" + bytes(4000))
    until(lambda: unread(stream) == 5 * 4004)
    stream.read_delimiter = ";"
    recorder.wait_for(lambda events: len(chunks_of(events)) == 5)
    assert chunks_of(recorder) == [b"abc", *[bytes(4000) + b"abc"] * 4]
    stream.close()


def test_delimiter_changed_twice_in_a_turn_does_not_disturb_the_callback_that_follows(server_of, peer, recorder):
    """Each change asks for a wake-up of the stream; the second comes when a callback waits for something else."""
    gate = Event()

    def block(stream, data):
        gate.wait()
        recorder("done", gate.is_set())

    server = server_of(recorder.of(Stream, read_delimiter=b"\n", on_read=block))
    one = peer(server)
    one.send(b"ab")
    stream = only(server)
    until(lambda: unread(stream) == 2)
    stream.read_delimiter = 1
    stream.read_delimiter = 2
    turns()
    assert recorder.names() == ["on_connect", "on_read"]
    gate.set()
    recorder.wait_for("done")
    assert recorder == [("on_connect",), ("on_read", b"ab"), ("done", True)]


def test_delimiter_changed_from_another_greenlet_while_a_callback_blocks(server_of, peer, recorder):
    gate = Event()

    def block_on_the_first(stream, line):
        if line == b"1":
            gate.wait()

    server = server_of(recorder.of(Lines, on_read=block_on_the_first))
    one = peer(server)
    one.send(b"1\r\n2\r\n3;4;")
    recorder.wait_for(("on_read", b"1"))
    only(server).read_delimiter = ";"
    gate.set()
    recorder.wait_for(("on_read", b"4"))
    assert chunks_of(recorder) == [b"1", b"2\r\n3", b"4"]


@pytest.mark.parametrize("same", [b"\r\n", bytes(bytearray(b"\r\n")), "\r\n"], ids=["same object", "equal", "as str"])
def test_delimiter_set_to_the_same_value_changes_nothing(recorder, same):
    def again(stream, line):
        stream.read_delimiter = same

    for pieces in fragmentations(LINES + b"part"):
        recorder.clear()
        _stream, end = memory_pair(recorder.of(Lines, on_read=again))
        for piece in pieces:
            end.send(piece)
        end.shutdown_output()
        recorder.wait_for("on_close")
        assert chunks_of(recorder) == [b"one", b"two", b"", b"\r three \n"]
        assert recorder[-2] == ("on_end", b"part")


def test_delimiter_reads_back_as_it_was_set():
    stream = Stream()
    assert stream.read_delimiter is None
    for value in (b"\n", "\n", 5, None):
        stream.read_delimiter = value
        assert stream.read_delimiter == value
        assert type(stream.read_delimiter) is type(value)


DEGENERATE = [0, -1, b"", ""]
NO_DELIMITERS = [1.5, [], (), {}, bytearray(b"x"), True, False, print, object()]


@pytest.mark.parametrize("value", DEGENERATE, ids=repr)
def test_e1_4_degenerate_delimiter_is_a_value_error_at_the_assignment(value):
    stream = Stream()
    stream.read_delimiter = b"\n"
    with pytest.raises(ValueError, match="read_delimiter") as caught:
        stream.read_delimiter = value
    assert isinstance(caught.value, InvalidReadDelimiterError)
    assert stream.read_delimiter == b"\n"


@pytest.mark.parametrize("value", NO_DELIMITERS, ids=lambda value: type(value).__name__)
def test_delimiter_of_unknown_type_is_a_type_error_at_the_assignment(value):
    stream = Stream()
    with pytest.raises(TypeError, match="read_delimiter") as caught:
        stream.read_delimiter = value
    assert isinstance(caught.value, InvalidReadDelimiterError)


@pytest.mark.parametrize("value", [0, b"", [], 1.5], ids=repr)
def test_wrong_delimiter_on_the_class_is_an_error_where_the_class_is_made(value):
    with pytest.raises((ValueError, TypeError), match="read_delimiter"):
        type("Wrong", (Stream,), {"read_delimiter": value})


def test_degenerate_delimiter_set_in_a_callback_ends_that_connection_only(server_of, peer, recorder, caplog):
    def zero(stream, data):
        stream.read_delimiter = 0

    server = server_of(recorder.of(Stream, on_read=zero))
    other, one = peer(server), peer(server)
    one.send(b"abc")
    assert one.at_eof()
    recorder.wait_for("on_close")
    assert "read_delimiter is 0" in caplog.text
    assert len(server.channels) == 1
    assert other.socket.fileno() >= 0


def test_on_read_may_be_replaced_on_the_instance_in_mid_batch(server_of, peer, recorder):
    class Switching(Lines):
        def on_read(self, line):
            recorder("first", line)
            self.on_read = self.then

        def then(self, line):
            recorder("then", line)
            if line == b"3":
                del self.on_read

    one = peer(server_of(Switching))
    one.send(b"1\r\n2\r\n3\r\n4\r\n")
    recorder.wait_for(4)
    assert recorder == [("first", b"1"), ("then", b"2"), ("then", b"3"), ("first", b"4")]


def test_on_read_of_the_class_may_be_a_plain_function(server_of, peer):
    one = peer(server_of(Stream, on_read=lambda stream, data: stream.write(data.upper())))
    one.send(b"abc")
    assert one.recv_exactly(3) == b"ABC"


# ---- Reading: limits


def test_buffer_size_exactly_reached_is_no_overflow(recorder):
    stream, end = memory_pair(recorder.of(Lines, buffer_size=10))
    end.send(b"0123456789")
    until(lambda: unread(stream) == 10)
    end.send(b"\r\n")
    until(lambda: "on_overflow_error" in recorder.names() or "on_read" in recorder.names())
    assert chunks_of(recorder) == [b"0123456789"]
    stream.close()


def test_overflow_is_told_once_and_closes(server_of, peer, recorder, caplog):
    server = server_of(recorder.of(Lines, buffer_size=100))
    one = peer(server)
    one.send(b"ok\r\n" + b"x" * 101)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_overflow_error", "on_close"]
    error = recorder[2][1]
    assert isinstance(error, StreamBufferOverflow)
    assert (error.size, error.limit) == (101, 100)
    assert re.search("101 bytes.*buffer_size", str(error))
    assert [record.levelno for record in caplog.records if "buffer_size" in record.getMessage()] == [logging.WARNING]


def test_close_reason_of_an_overflow(server_of, peer, recorder):
    server = server_of(recorder.of(Lines, buffer_size=100))
    one = peer(server)
    stream = only(server)
    one.send(b"x" * 200)
    recorder.wait_for("on_close")
    assert stream.close_reason is CloseReason.OVERFLOW
    assert isinstance(stream.close_error, StreamBufferOverflow)


def test_complete_chunks_never_count_for_the_overflow(server_of, peer, recorder):
    server = server_of(recorder.of(Lines, buffer_size=10))
    one = peer(server)
    one.send(b"0123456\r\n" * 5000 + b"0123456789")
    recorder.wait_for(lambda events: len(chunks_of(events)) == 5000)
    until(lambda: unread(only(server)) == 10)
    assert "on_overflow_error" not in recorder.names()


def test_delimiter_none_never_overflows(server_of, peer, recorder):
    server = server_of(recorder.of(Stream, buffer_size=1))
    one = peer(server)
    one.send(payload(300_000))
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert b"".join(chunks_of(recorder)) == payload(300_000)
    assert "on_overflow_error" not in recorder.names()


def test_int_delimiter_raises_the_limit_to_itself(server_of, peer, recorder):
    server = server_of(recorder.of(Stream, buffer_size=10, read_delimiter=200_000))
    one = peer(server)
    one.send(payload(399_999))
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert chunks_of(recorder) == [payload(200_000)]
    assert recorder[-2] == ("on_end", payload(400_000)[200_000:399_999])


def test_e1_22_overflow_handler_that_does_nothing_cannot_grow_the_buffer(server_of, peer, recorder):
    server = server_of(recorder.of(Lines, buffer_size=100, on_overflow_error=lambda stream, error: None))
    one = peer(server)
    stream = only(server)
    one.send(b"x" * 150)
    recorder.wait_for("on_close")
    assert recorder.names().count("on_overflow_error") == 1
    assert stream.closed
    assert unread(stream) == 0


@pytest.mark.parametrize("way", ["larger buffer_size", "another delimiter", "no delimiter"])
def test_overflow_handler_may_make_room(server_of, peer, recorder, way):
    def make_room(stream, error):
        if way == "larger buffer_size":
            stream.buffer_size = 1000
        else:
            stream.read_delimiter = 50 if way == "another delimiter" else None

    server = server_of(recorder.of(Lines, buffer_size=100, on_overflow_error=make_room))
    one = peer(server)
    one.send(b"x" * 150)
    recorder.wait_for("on_overflow_error")
    one.send(b"\r\n")
    recorder.wait_for("on_read")
    chunks = {"larger buffer_size": [b"x" * 150], "another delimiter": [b"x" * 50] * 3, "no delimiter": [b"x" * 150]}
    assert chunks_of(recorder)[: len(chunks[way])] == chunks[way]
    assert only(server).connected


def test_overflow_handler_that_raises_closes(server_of, peer, recorder, caplog):
    def fail(stream, error):
        raise ZeroDivisionError

    server = server_of(recorder.of(Lines, buffer_size=100, on_overflow_error=fail))
    one = peer(server)
    one.send(b"x" * 150)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_overflow_error", "on_error", "on_close"]


def sized_class(name, value):
    type("Sized", (Stream,), {name: value})


def sized_instance(name, value):
    setattr(type("Sized", (Stream,), {})(), name, value)


NO_SIZES = [(0, ValueError), (-5, ValueError), ("1", TypeError), (1.5, TypeError), (None, TypeError), (True, TypeError)]


@pytest.mark.parametrize("sized", [sized_class, sized_instance])
@pytest.mark.parametrize("name", ["buffer_size", "high_water", "low_water"])
@pytest.mark.parametrize(("value", "error"), NO_SIZES, ids=repr)
def test_sizes_that_make_no_sense_are_errors_that_name_class_and_attribute(sized, name, value, error):
    with pytest.raises(error, match=rf"Sized\.{name}"):
        sized(name, value)


def test_buffer_size_of_the_instance_counts(server_of, peer, recorder):
    def small(stream):
        stream.buffer_size = 5

    server = server_of(recorder.of(Lines, on_connect=small))
    peer(server).send(b"123456")
    recorder.wait_for("on_overflow_error")
    recorder.wait_for("on_close")


def test_e1_14_fast_sender_does_not_hold_up_others(server_of, peer):
    class Burner(Connection):
        streak = longest = 0

        def on_read(self, data):
            Burner.streak += 1
            Burner.longest = max(Burner.longest, Burner.streak)
            until_when = time.perf_counter() + 0.001
            while time.perf_counter() < until_when:
                pass

    def turn():
        Burner.streak = 0

    one = peer(server_of(Burner))
    every_turn = Engine.instance().loop(turn)
    one.send(payload(16 * MIB))
    one.shutdown_output()
    assert one.at_eof()
    every_turn.cancel()
    # A turn is 10 ms, and on_read takes 1 ms at least.
    assert 0 < Burner.longest <= 12


# ---- Writing


def test_s4_20_write_takes_text(server_of, peer):
    class Greeter(Connection):
        def on_connect(self):
            self.write("f\N{LATIN SMALL LETTER O WITH STROKE}\N{LATIN SMALL LETTER O WITH STROKE}")

    assert peer(server_of(Greeter)).recv_exactly(5) == b"f\xc3\xb8\xc3\xb8"


@pytest.mark.parametrize(
    "data",
    [b"abcd", bytearray(b"abcd"), memoryview(b"abcd"), memoryview(b"aXbXcXdX")[::2], array.array("B", b"abcd"), "abcd"],
    ids=["bytes", "bytearray", "memoryview", "strided memoryview", "array", "str"],
)
def test_write_takes_whatever_is_bytes_like_or_str(server_of, peer, data):
    one = peer(server_of(Stream, on_connect=lambda stream: stream.write(data)))
    assert one.recv_exactly(4) == b"abcd"


def test_write_counts_the_bytes_of_wide_items(server_of, peer):
    class Wide(Connection):
        def on_connect(self):
            self.write(array.array("I", [1, 2, 3]))
            self.end()

    assert len(peer(server_of(Wide)).recv_all()) == 3 * array.array("I").itemsize


@pytest.mark.parametrize("kind", [bytearray, lambda data: memoryview(bytearray(data)), lambda data: array.array("B", data)])
def test_write_copies_what_can_change(server_of, peer, kind):
    class Reusing(Connection):
        def on_connect(self):
            buffer = kind(b"before")
            self.write(buffer)
            buffer[0] = ord("X")

    assert peer(server_of(Reusing)).recv_exactly(6) == b"before"


@pytest.mark.parametrize("wrong", [5, None, 1.5, ["a"], object(), True], ids=repr)
def test_e1_16_write_of_something_else_is_a_type_error_at_the_call_and_nothing_is_lost(server_of, peer, wrong):
    class Careless(Connection):
        def on_connect(self):
            self.write(b"a")
            with pytest.raises(TypeError, match="write"):
                self.write(wrong)
            self.write(b"b")
            self.end()

    assert peer(server_of(Careless)).recv_all() == b"ab"


def test_write_keeps_the_order_of_pieces_of_all_sizes(server_of, peer):
    pieces = [payload(size) for size in (1, 0, 300_000, 0, 5, 70_000, 262_144, 262_145, 1, 0, 0, 400_000, 3)]

    class Pieces(Connection):
        def on_connect(self):
            for piece in pieces:
                self.write(piece)
            self.end()

    assert peer(server_of(Pieces)).recv_all() == b"".join(pieces)


def test_empty_write_before_a_large_one_does_not_stop_the_output(server_of, peer):
    class EmptyFirst(Connection):
        def on_connect(self):
            self.write(b"")
            self.write(payload(300_000))
            self.end()

    assert peer(server_of(EmptyFirst)).recv_all() == payload(300_000)


def test_empty_writes_alone_are_harmless(server_of, peer):
    class Nothing(Connection):
        def on_connect(self):
            self.write(b"")
            self.write("", flush=True)

        def on_read(self, data):
            self.write(b"")
            self.write(data)
            self.end()

    one = peer(server_of(Nothing))
    one.send(b"x")
    assert one.recv_all() == b"x"


def test_large_write_reaches_a_slow_peer_whole(server_of, peer):
    server = server_of(Stream)
    one = peer(server, rcvbuf=4096)
    stream = only(server)
    stream.write(payload(BIG))
    until(lambda: 0 < unsent(stream) < BIG)
    turns(50)
    assert unsent(stream) > 0
    stream.end()
    assert one.recv_all() == payload(BIG)


def test_write_never_sends_and_never_calls_back_inside(server_of, peer, recorder):
    class Watchful(Connection):
        def on_connect(self):
            self.write(b"a")
            recorder("written")
            self.write(b"b", flush=True)
            recorder("flushed")

        def on_write(self):
            recorder("on_write")

    one = peer(server_of(Watchful))
    assert one.recv_exactly(2) == b"ab"
    recorder.wait_for("on_write")
    turns()
    assert recorder == ["written", "flushed", "on_write"]


def test_flush_sends_before_the_callback_is_over(server_of, peer):
    reached = []

    class Blocking(Connection):
        def on_connect(self):
            self.write(b"a", flush=True)
            self.write(b"b")
            self.flush()
            # Nothing else can run here: what arrives was sent by the flush.
            sock = self.socket
            reached.append(unsent(self))
            del sock

    assert peer(server_of(Blocking)).recv_exactly(2) == b"ab"
    assert reached == [0]


@pytest.mark.parametrize("call", ["write", "flush", "write_eof"])
@pytest.mark.parametrize("when", ["new", "closed"])
def test_output_on_a_stream_without_connection_is_channel_closed(call, when, recorder):
    stream = recorder.of(Stream)()
    if when == "closed":
        stream.close()
        recorder.wait_for("on_close")
    with pytest.raises(ChannelClosed, match=rf"{'write' if call == 'flush' else call}\(\)|{call}\(\)") as caught:
        getattr(stream, call)(*[b"x"][: call == "write"])
    assert isinstance(caught.value, RuntimeError)
    assert caught.value.channel is stream


def test_write_before_the_connection_stands_is_channel_closed(server_of, recorder):
    class Hasty(Client):
        pass

    client = recorder.of(Hasty)().connect(server_of(Stream).local_address)
    with pytest.raises(ChannelClosed, match="not connected yet"):
        client.write(b"x")
    client.close()
    recorder.wait_for("on_close")


@pytest.mark.parametrize("call", ["close", "end", "abort", "write_eof"])
def test_write_after_the_output_ended_is_channel_closed(server_of, peer, recorder, call):
    class Ender(Connection):
        def on_read(self, data):
            getattr(self, call)()
            try:
                self.write(b"late")
            except ChannelClosed as error:
                recorder("refused", error.channel is self)

    peer(server_of(Ender)).send(b"now")
    recorder.wait_for(("refused", True))


def test_write_from_a_timer(server_of, peer):
    server = server_of(Stream)
    one = peer(server)
    Engine.instance().defer(0, only(server).write, b"tick")
    assert one.recv_exactly(4) == b"tick"


def test_write_from_the_greenlet_of_a_user(server_of, peer):
    server = server_of(Stream)
    one = peer(server)
    gevent.spawn(only(server).write, b"spawned").join()
    assert one.recv_exactly(7) == b"spawned"


def test_s3_18_write_from_another_connection_reaches_everybody_in_order(server_of, peer):
    class Chat(Lines):
        def on_read(self, line):
            for channel in self.server.channels.values():
                channel.write(line + b"\r\n")

    server = server_of(Chat)
    everybody = [peer(server) for _ in range(20)]
    only(server, 20)
    for number, one in enumerate(everybody):
        one.send(b"a%02d\r\nb%02d\r\n" % (number, number))
        for other in everybody:
            assert other.recv_exactly(10) == b"a%02d\r\nb%02d\r\n" % (number, number)


def test_write_in_a_foreign_thread_is_refused_and_nothing_is_lost(server_of, peer):
    server = server_of(Stream)
    one = peer(server)
    stream = only(server)
    with pytest.raises(WrongThreadError):
        in_thread(stream.write, b"foreign")
    stream.write(b"own")
    stream.end()
    assert one.recv_all() == b"own"


# ---- Writing: on_write


def on_write_of_the_class(recorder):
    return type("OfTheClass", (Connection,), {"on_write": lambda stream: recorder("on_write")})


def on_write_of_the_instance(recorder):
    def on_connect(stream):
        stream.on_write = lambda: recorder("on_write")

    return type("OfTheInstance", (Connection,), {"on_connect": on_connect})


def on_write_of_a_mixin(recorder):
    mixin = type("Mixin", (), {"on_write": lambda stream: recorder("on_write")})
    return type("OfAMixin", (mixin, Connection), {})


def handle_write_of_the_class(recorder):
    return type("OldName", (Connection,), {"handle_write": lambda stream: recorder("on_write")})


@pytest.mark.parametrize("kind", [on_write_of_the_class, on_write_of_the_instance, on_write_of_a_mixin, handle_write_of_the_class])
def test_s4_4_on_write_comes_once_when_everything_is_written(server_of, peer, recorder, kind):
    server = server_of(kind(recorder))
    one = peer(server)
    stream = only(server)
    turns()
    assert recorder == []
    for number in (1, 2):
        for _ in range(5):
            stream.write(b"x")
        assert one.recv_exactly(5) == b"xxxxx"
        recorder.wait_for(number)
        turns()
        assert recorder == ["on_write"] * number


@pytest.mark.parametrize("flush", [False, True], ids=["queued", "flushed"])
def test_e1_8_write_in_on_write_gives_another_on_write_and_no_recursion(server_of, peer, flush):
    class Counting(Connection):
        count = depth = deepest = 0

        def on_connect(self):
            self.write(b"x")

        def on_write(self):
            Counting.depth += 1
            Counting.deepest = max(Counting.deepest, Counting.depth)
            self.count += 1
            if self.count < 3000:
                self.write(b"x", flush=flush)
            else:
                self.end()
            Counting.depth -= 1

    assert peer(server_of(Counting)).recv_all() == b"x" * 3000
    assert Counting.deepest == 1


def test_on_write_comes_after_the_callback_that_wrote(server_of, peer, recorder):
    class Writer(Connection):
        read_delimiter = b"\n"

        def on_read(self, line):
            self.write(line, flush=True)
            gevent.sleep(0)
            recorder("read", line)

        def on_write(self):
            recorder("on_write")

    peer(server_of(Writer)).send(b"1\n2\n")
    recorder.wait_for(4)
    assert recorder == [("read", b"1"), "on_write", ("read", b"2"), "on_write"]


# ---- Writing: output is bounded where input makes it


def send_until_it_stalls(one, piece):
    """Send without reading until the other side takes no more for 0.3 seconds; return how many bytes went."""

    def send():
        sent = 0
        one.socket.settimeout(0.3)
        try:
            while sent < 256 * MIB:
                sent += one.socket.send(piece)
        except TimeoutError:
            pass
        one.socket.settimeout(10)
        return sent

    return in_thread(send)


def test_echo_stops_reading_from_a_peer_that_does_not_read(server_of, peer):
    server = server_of(Echo, high_water=64 * KIB, low_water=16 * KIB)
    one = peer(server)
    stream = only(server)
    sent = send_until_it_stalls(one, bytes(64 * KIB))
    # One receive, of 256 KiB at most, may still be answered when the mark is passed.
    assert 64 * KIB < unsent(stream) <= (64 + 256) * KIB
    assert one.recv_exactly(sent) == bytes(sent)
    one.send(b"again")
    assert one.recv_exactly(5) == b"again"


def test_answer_over_the_high_water_mark_stops_reading_at_once(server_of, peer, recorder):
    def answer(stream, line):
        stream.write(bytes(BIG))

    server = server_of(recorder.of(Lines, on_read=answer, high_water=64 * KIB))
    one = peer(server, rcvbuf=4096)
    one.send(b"1\r\n")
    until(lambda: unsent(only(server)) > 0)
    one.send(b"2\r\n")
    turns(50)
    assert chunks_of(recorder) == [b"1"]
    one.shutdown_output()
    assert one.recv_all() == bytes(2 * BIG)
    assert chunks_of(recorder) == [b"1", b"2"]


def test_output_queued_earlier_never_stops_reading(server_of, recorder):
    client = recorder.of(Client, on_connect=lambda stream: stream.write(payload(16 * MIB)))()
    client.connect(server_of(Echo).local_address)
    recorder.wait_for(lambda events: sum(map(len, chunks_of(events))) == 16 * MIB, timeout=20)
    assert b"".join(chunks_of(recorder)) == payload(16 * MIB)
    client.close()
    recorder.wait_for("on_close")


def test_output_made_by_others_never_stops_reading(server_of, peer, recorder):
    server = server_of(recorder.of(Lines, high_water=1000, low_water=500))
    one = peer(server, rcvbuf=4096)
    stream = only(server)
    stream.write(bytes(BIG))
    until(lambda: 0 < unsent(stream) < BIG)
    one.send(b"still\r\n")
    recorder.wait_for(("on_read", b"still"))
    one.send(b"here\r\n")
    recorder.wait_for(("on_read", b"here"))
    assert unsent(stream) > 1000


def test_everything_comes_back_from_an_echo_that_is_read_while_it_is_written(server_of, peer, recorder):
    one = peer(server_of(recorder.of(Echo, "on_end", "on_close", high_water=64 * KIB)), rcvbuf=65536)
    data = payload(BIG)
    sender = gevent.spawn(lambda: (one.send(data), one.shutdown_output()))
    assert one.recv_all() == data
    sender.join()
    recorder.wait_for("on_close")
    assert recorder == [("on_end", b""), ("on_close",)]


# ---- Half-close


def test_e1_3_reply_to_a_half_closing_peer_arrives(server_of, peer):
    class Answer(Connection):
        def on_read(self, data):
            self.write(payload(BIG))

    one = peer(server_of(Answer))
    one.send(b"request")
    one.shutdown_output()
    assert one.recv_all() == payload(BIG)


def test_e1_3_reply_of_a_callback_that_blocks_arrives_at_a_half_closing_peer(server_of, peer, recorder):
    def answer(stream, data):
        gevent.sleep(0.05)
        stream.write(b"late answer")

    one = peer(server_of(recorder.of(Stream, on_read=answer)))
    one.send(b"request")
    one.shutdown_output()
    assert one.recv_all() == b"late answer"
    recorder.wait_for("on_close")


@pytest.mark.parametrize(
    ("delimiter", "rest"), [(None, b""), (b"\n", b"tail"), (4, b"l"), (b"d", b"\ntail")], ids=["None", "bytes", "int", "other bytes"]
)
def test_e1_21_on_end_gets_what_no_delimiter_completed(server_of, peer, recorder, delimiter, rest):
    one = peer(server_of(recorder.of(Stream, read_delimiter=delimiter)))
    one.send(b"lead\ntail" if delimiter != 4 else b"leadtail" + b"l")
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert recorder[-2:] == [("on_end", rest), ("on_close",)]


def test_on_end_may_still_write(server_of, peer):
    class Last(Lines):
        def on_end(self, rest):
            self.write(b"rest: " + rest)
            self.write(bytes(BIG))

    one = peer(server_of(Last))
    one.send(b"line\r\npart")
    one.shutdown_output()
    assert one.recv_all() == b"rest: part" + bytes(BIG)


def test_on_end_sees_a_stream_that_is_not_connected_any_more(server_of, peer, recorder):
    class Ending(Connection):
        def on_end(self, rest):
            recorder("on_end", self.connected, self.closed, self.server.channels.values())

    peer(server_of(Ending)).shutdown_output()
    recorder.wait_for("on_end")
    assert recorder == [("on_end", False, False, [])]


def test_allow_half_open_leaves_the_closing_to_the_user(server_of, peer, recorder):
    server = server_of(recorder.of(Stream, allow_half_open=True))
    one = peer(server)
    one.send(b"question")
    one.shutdown_output()
    recorder.wait_for("on_end")
    turns()
    stream = only(server)
    assert stream.connected
    stream.write(b"first")
    assert one.recv_exactly(5) == b"first"
    stream.write(payload(BIG))
    stream.end()
    assert one.recv_all() == payload(BIG)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_end", "on_close"]


@pytest.mark.parametrize("way", ["close", "end", "abort", "write_eof"])
def test_allow_half_open_ends_by_every_call(server_of, peer, recorder, way):
    server = server_of(recorder.of(Stream, allow_half_open=True))
    peer(server).shutdown_output()
    recorder.wait_for("on_end")
    stream = only(server)
    getattr(stream, way)()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_end", "on_close"]
    assert server.channels.values() == []


# ---- Old names


def test_s0_6_handle_read_and_send_echo(server_of, peer):
    class OldEcho(Connection):
        def handle_read(self, data):
            self.send(data)

    one = peer(server_of(OldEcho))
    one.send(b"as in 2009")
    assert one.recv_exactly(10) == b"as in 2009"


def test_handle_names_are_called_as_their_successors_are(server_of, peer, recorder):
    class Oldest(Connection):
        def handle_connect(self):
            recorder("connect")
            self.send("hello")

        def handle_read(self, data):
            recorder("read", data)

        def handle_write(self):
            recorder("write")

        def handle_close(self):
            recorder("close")

    one = peer(server_of(Oldest))
    assert one.recv_exactly(5) == b"hello"
    recorder.wait_for("write")
    one.send(b"x")
    one.shutdown_output()
    recorder.wait_for("close")
    assert recorder == ["connect", "write", ("read", b"x"), "close"]


def test_send_of_a_subclass_does_not_disturb_the_library(server_of, peer):
    class Telnet(Connection):
        name = rooms = state = None

        def send(self, text, end="\r\n"):
            self.write(text + end)

        def on_read(self, data):
            self.send(data.decode().upper())

    one = peer(server_of(Telnet))
    one.send(b"abc")
    assert one.recv_exactly(5) == b"ABC\r\n"


# ---- Without a socket


def test_memory_echo(recorder):
    _stream, end = memory_pair(recorder.of(Echo))
    end.send(b"abc")
    assert end.wait_for(3) == b"abc"
    end.close()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_end", "on_close"]


def test_memory_two_streams_talk(recorder):
    asker = recorder.of(Stream, on_connect=lambda stream: stream.write(payload(MIB)))
    left, _ = memory_pair(asker, Echo)
    recorder.wait_for(lambda events: sum(map(len, chunks_of(events))) == MIB)
    assert b"".join(chunks_of(recorder)) == payload(MIB)
    left.end()
    recorder.wait_for("on_close")


def test_memory_one_send_per_turn_for_all_that_was_written():
    class Chatty(Stream):
        def on_connect(self):
            for number in range(100):
                self.write(b"%02d" % number)

    stream, end = memory_pair(Chatty)
    pieces = end._incoming.pieces
    until(lambda: bool(pieces))
    assert [len(piece) for piece in pieces] == [200]
    stream.close()


def test_memory_overflow(recorder):
    _stream, end = memory_pair(recorder.of(Lines, buffer_size=10))
    for byte in b"01234567890":
        end.send(bytes([byte]))
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_overflow_error", "on_close"]
    assert end.wait_for() == b""
