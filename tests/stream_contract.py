"""What a user may expect of any stream, whatever it stands on: the tests that every transport passes.

A class of tests gets them by inheriting `StreamContract` and having a fixture `transport`; see ``transports`` and ``test_contract``.
"""

import contextlib
import functools
import logging
import random
import re
import socket
import ssl
import time
from struct import Struct

import gevent
import pytest
from gevent.event import AsyncResult, Event
from peers import in_thread
from transports import exchange, rounds
from waiting import settle, unread, unsent, until

from pants_green import ChannelClosed, ChannelStateError, CloseReason, Engine, ReadTimeout, Stream, StreamBufferOverflow
from pants_green.framing import LengthPrefix, Netstring, Varint

__all__ = ["StreamContract"]

KIB = 1024
MIB = 1024 * KIB

#: What the kernels on a narrow connection, and TLS in between, take by far before the peer has read anything.
FULL = 1 * MIB

LIMIT = 128 * KIB
HIGH = 64 * KIB
LOW = 16 * KIB

#: The time limit of most tests of one, in seconds.
SHORT = 0.05

#: What a peer is told with TLS if there is no goodbye, and nobody any more to answer to.
CUT_OFF = (ssl.SSLEOFError, BrokenPipeError)

#: What a user can do to end a stream, and the reason that it then has.
ENDERS = {"close": CloseReason.CLOSED_HERE, "end": CloseReason.ENDED_HERE, "abort": CloseReason.ABORTED_HERE}

#: Options of a stream, bytes, the chunks that they are, and what is left.
CUTS = {
    "bytes": ({"read_delimiter": b"\r\n"}, b"one\r\n\r\ntwo\r\nre", [b"one", b"", b"two"], b"re"),
    "str": ({"read_delimiter": "\N{EURO SIGN}"}, "1€2€".encode() + b"\xe2\x82", [b"1", b"2"], b"\xe2\x82"),
    "str, decoded": ({"read_delimiter": "é", "encoding": "latin-1"}, b"a\xe9b\xfc\xe9c", ["a", "bü"], b"c"),
    "int": ({"read_delimiter": 4}, b"abcd\n\0\r\n12", [b"abcd", b"\n\0\r\n"], b"12"),
    "regex": ({"read_delimiter": re.compile(rb"\r?\n")}, b"one\r\ntwo\n\nrest", [b"one", b"two", b""], b"rest"),
    "regex, matched": (
        {"read_delimiter": re.compile(rb"(\w+)=(\d+);"), "regex_search": False},
        b"a=1;bc=23;c=",
        [(b"a", b"1"), (b"bc", b"23")],
        b"c=",
    ),
    "Struct": ({"read_delimiter": Struct("!HB")}, b"\0\1\2\3\4\5\6", [(1, 2), (772, 5)], b"\6"),
    "LengthPrefix": ({"read_delimiter": LengthPrefix("!H")}, b"\0\3abc\0\0\0\1d\0", [b"abc", b"", b"d"], b"\0"),
    "Netstring": ({"read_delimiter": Netstring()}, b"5:hello,0:,2:a,,3:x", [b"hello", b"", b"a,"], b"3:x"),
    "Varint": ({"read_delimiter": Varint()}, b"\3abc\0\x81\0d\2e", [b"abc", b"", b"d"], b"\2e"),
}


@functools.lru_cache(16)
def data_of(size, seed=0):
    """Return letters and digits of which no part looks like another."""
    return random.Random(seed).randbytes(size // 2 + 1).hex().encode()[:size]


def chunks_of(recorder, name="on_read"):
    """Return what on_read, or whatever else was recorded under that name, got."""
    return [event[1] if len(event) == 2 else event[1:] for event in recorder if event[0] == name]


def text_of(recorder):
    """Return everything that on_read got, joined."""
    return b"".join(chunks_of(recorder))


def said(recorder, size):
    """Wait until on_read has got so many bytes in all, and return them."""
    return text_of(recorder.wait_for(lambda events: sum(map(len, chunks_of(events))) >= size))


def in_timer(function):
    """Run a function in a timer, and return the AsyncResult of what becomes of it."""
    outcome = AsyncResult()

    def call():
        try:
            outcome.set(function())
        except BaseException as error:
            outcome.set_exception(error.with_traceback(None))

    Engine.instance().defer(0, call)
    return outcome


def warnings_of(caplog):
    """Return what the library has logged that somebody should look at."""
    return [one.getMessage() for one in caplog.records if one.levelno > logging.INFO and one.name.startswith("pants_green")]


class Echo(Stream):
    def on_read(self, data):
        self.write(data)


class EchoLines(Stream):
    read_delimiter = b"\n"

    def on_read(self, line):
        self.write(line + b"\n")


class Narrow(Stream):
    """With limits that are soon reached."""

    write_limit = LIMIT
    high_water = HIGH
    low_water = LOW


class Base:
    """The fixtures."""

    @pytest.fixture
    def transport(self):
        raise NotImplementedError("the class that inherits these tests says what they run on")

    @pytest.fixture
    def stuck(self, transport, recorder):
        """Return a function that makes a stream with FULL bytes written, so that it is above its limit, its peer, and these bytes."""

        def make(*names, **attributes):
            names = names or ("on_overflow_error", "on_timeout", "on_error", "on_close")
            stream, one = transport.connect(recorder.of(Narrow, *names, **attributes), narrow=True)
            data = data_of(FULL)
            stream.write(data)
            until(lambda: unsent(stream) < FULL)
            settle(stream, 8)
            assert unsent(stream) > LIMIT
            return stream, one, data

        return make


class Opening(Base):
    """How a stream begins, and what it knows of itself."""

    def test_life_every_callback_comes_in_order_and_once(self, transport, recorder):
        stream, one = transport.connect(recorder.of(Stream))
        one.send(b"a")
        recorder.wait_for(("on_read", b"a"))
        one.send(b"b")
        recorder.wait_for(("on_read", b"b"))
        one.shutdown_output()
        recorder.wait_for("on_close")
        rounds()
        assert recorder == [("on_connect",), ("on_read", b"a"), ("on_read", b"b"), ("on_end", b""), ("on_close",)]
        assert (stream.connected, stream.closed, stream.close_reason) == (False, True, CloseReason.PEER_ENDED)
        assert one.recv_all() == b""

    def test_opened_stream_knows_what_it_is(self, transport, recorder):
        stream, one = transport.connect(recorder.of(Stream))
        recorder.wait_for("on_connect")
        assert (stream.connected, stream.connecting, stream.closed, stream.close_reason) == (True, False, False, None)
        assert stream.ssl_enabled is transport.tls
        assert stream.fileno == stream.socket.fileno()
        assert stream.remote_address == one.address
        assert stream.local_address == one.socket.getpeername()
        if transport.tls:
            assert stream.cipher[1] == stream.ssl_object.version() == f"TLSv{transport.version}"

    def test_addresses_are_still_known_in_on_close(self, transport, recorder):
        def on_close(stream):
            recorder("addresses", stream.remote_address, stream.local_address, stream.socket, stream.fileno)

        _stream, one = transport.connect(recorder.of(Stream, on_close=on_close))
        both = (one.address, one.socket.getpeername())
        one.reset()
        recorder.wait_for("addresses")
        assert recorder[-1] == ("addresses", *both, None, None)

    def test_remote_address_can_be_replaced_and_restored(self, transport):
        stream, one = transport.connect(Stream)
        stream.remote_address = ("192.0.2.1", 5)
        assert stream.remote_address == ("192.0.2.1", 5)
        del stream.remote_address
        assert stream.remote_address == one.address

    def test_handshake_callback_comes_just_before_on_connect_and_only_with_tls(self, transport, recorder):
        _stream, one = transport.connect(recorder.of(Stream, "on_ssl_handshake", "on_connect", "on_read", "on_close"), first=b"x")
        recorder.wait_for("on_read")
        one.shutdown_output()
        recorder.wait_for("on_close")
        wanted = ["on_ssl_handshake"] if transport.tls else []
        assert recorder.names() == [*wanted, "on_connect", "on_read", "on_close"]

    def test_data_with_the_last_message_of_the_handshake_is_delivered_after_on_connect(self, transport, recorder):
        _stream, one = transport.connect(recorder.of(EchoLines), first=b"one\ntwo\nthr")
        assert one.recv_exactly(8) == b"one\ntwo\n"
        assert recorder == [("on_connect",), ("on_read", b"one"), ("on_read", b"two")]
        one.send(b"ee\n")
        assert one.recv_exactly(6) == b"three\n"

    def test_data_and_end_with_the_last_message_of_the_handshake_are_a_whole_life(self, transport, recorder):
        stream, one = transport.connect(recorder.of(EchoLines), first=b"one\ntwo\nrest", end=True)
        assert one.recv_all() == b"one\ntwo\n"
        recorder.wait_for("on_close")
        assert recorder == [("on_connect",), ("on_read", b"one"), ("on_read", b"two"), ("on_end", b"rest"), ("on_close",)]
        assert stream.close_reason is CloseReason.PEER_ENDED

    @pytest.mark.parametrize("size", [1, 16 * KIB, 16 * KIB + 1, 100 * KIB])
    def test_much_data_and_end_with_the_last_message_of_the_handshake_come_back_whole(self, transport, size):
        data = data_of(size)
        _stream, one = transport.connect(Echo, first=data, end=True)
        assert one.recv_all() == data

    def test_half_a_message_with_the_last_message_of_the_handshake_waits_for_the_rest(self, transport, recorder):
        _stream, one = transport.connect(recorder.of(EchoLines), first=b"one\ntwo\n", hold=7)
        rounds()
        assert ("on_read", b"two") not in recorder
        transport.release(one)
        assert one.recv_exactly(8) == b"one\ntwo\n"
        assert recorder == [("on_connect",), ("on_read", b"one"), ("on_read", b"two")]

    def test_end_in_on_connect_with_data_and_end_there_already_delivers_what_it_wrote(self, transport, recorder):
        def on_connect(stream):
            stream.write(b"no service")
            stream.end()

        stream, one = transport.connect(recorder.of(Stream, on_connect=on_connect), first=data_of(16 * KIB), end=True)
        assert one.recv_all() == b"no service"
        recorder.wait_for("on_close")
        assert recorder.names() == ["on_connect", "on_close"]
        assert stream.close_reason is CloseReason.ENDED_HERE

    def test_end_alone_with_the_last_message_of_the_handshake_is_on_end(self, transport, recorder):
        _stream, one = transport.connect(recorder.of(Stream), end=True)
        recorder.wait_for("on_close")
        assert recorder == [("on_connect",), ("on_end", b""), ("on_close",)]
        assert one.recv_all() == b""

    def test_data_that_comes_while_on_connect_blocks_waits_for_it(self, transport, recorder):
        gate = Event()

        def on_connect(stream):
            gate.wait()
            recorder("connected")

        _stream, one = transport.connect(recorder.of(Stream, on_connect=on_connect), first=b"a")
        one.send(b"b")
        rounds()
        assert recorder == [("on_connect",)]
        gate.set()
        assert said(recorder, 2) == b"ab"
        assert recorder.names()[:3] == ["on_connect", "connected", "on_read"]

    def test_data_and_end_that_come_while_on_connect_blocks_are_delivered_in_order(self, transport, recorder):
        gate = Event()
        _stream, one = transport.connect(recorder.of(EchoLines, on_connect=lambda stream: gate.wait()))
        transport.end_with(one, b"one\ntwo\nrest")
        rounds()
        assert recorder == [("on_connect",)]
        gate.set()
        assert one.recv_all() == b"one\ntwo\n"
        recorder.wait_for("on_close")
        assert recorder == [("on_connect",), ("on_read", b"one"), ("on_read", b"two"), ("on_end", b"rest"), ("on_close",)]

    def test_greeting_of_on_connect_reaches_the_peer_before_it_says_anything(self, transport):
        _stream, one = transport.connect(type("Greeting", (Stream,), {"on_connect": lambda stream: stream.write(b"220 ready\r\n")}))
        assert one.recv_exactly(11) == b"220 ready\r\n"

    def test_two_streams_get_each_its_own_answers(self, transport):
        _first, one = transport.connect(Echo)
        _second, two = transport.connect(Echo)
        one.send(b"first")
        two.send(b"second")
        assert two.recv_exactly(6) == b"second"
        assert one.recv_exactly(5) == b"first"

    def test_callback_that_blocks_does_not_hold_up_others(self, transport, recorder):
        gate = Event()

        class Slow(Stream):
            def on_read(self, data):
                if data == b"wait":
                    recorder("waiting")
                    gate.wait()
                self.write(data)

        _first, slow = transport.connect(Slow)
        _second, quick = transport.connect(Slow)
        slow.send(b"wait")
        recorder.wait_for("waiting")
        quick.send(b"quick")
        assert quick.recv_exactly(5) == b"quick"
        gate.set()
        assert slow.recv_exactly(4) == b"wait"

    def test_callbacks_of_one_stream_never_overlap(self, transport, recorder):
        running = []

        class Slow(Stream):
            read_delimiter = b"\n"

            def on_read(self, line):
                recorder("overlaps", *running)
                running.append(line)
                gevent.sleep(0)
                self.write(line + b"\n", flush=True)
                gevent.sleep(0)
                running.remove(line)

            def on_write(self):
                recorder("overlaps", *running)

        _stream, one = transport.connect(Slow)
        one.send(b"a\nb\nc\n")
        assert one.recv_exactly(6) == b"a\nb\nc\n"
        recorder.wait_for(4)
        assert set(recorder) == {("overlaps")}


class Writing(Base):
    """What is written arrives: whole, in order, and together."""

    @pytest.mark.parametrize("size", [1, 1000, 16 * KIB - 1, 16 * KIB, 16 * KIB + 1, 70 * KIB], ids=str)
    def test_echo_of_all_sizes_comes_back(self, transport, size):
        _stream, one = transport.connect(Echo)
        data = data_of(size)
        for _ in range(3):
            one.send(data)
            assert one.recv_exactly(size) == data

    def test_echo_of_several_mib_comes_back_while_it_is_written(self, transport):
        _stream, one = transport.connect(Echo)
        data = data_of(4 * MIB)
        assert exchange(one, data, len(data)) == data

    def test_echo_of_many_small_messages_comes_back_one_by_one(self, transport):
        _stream, one = transport.connect(EchoLines)
        for number in range(100):
            one.send(b"%d\n" % number)
            assert one.recv_until(b"\n") == b"%d\n" % number

    def test_echo_of_a_message_in_single_bytes_comes_back(self, transport):
        _stream, one = transport.connect(EchoLines)
        for number in range(50):
            one.send(b"%c" % (65 + number % 26))
        one.send(b"\n")
        assert len(one.recv_until(b"\n")) == 51

    def test_writes_of_one_turn_arrive_together(self, transport):
        stream, one = transport.connect(Stream)
        for number in range(100):
            stream.write(b"%09d;" % number)
        assert one.recv() == b"".join(b"%09d;" % number for number in range(100))

    def test_writes_of_many_turns_keep_their_order(self, transport):
        stream, one = transport.connect(Stream)
        for number in range(100):
            stream.write(b"%09d;" % number)
            gevent.sleep(0)
        stream.end()
        assert one.recv_all() == b"".join(b"%09d;" % number for number in range(100))

    def test_writes_of_all_sizes_keep_their_order(self, transport):
        stream, one = transport.connect(Stream)
        pieces = [data_of(size, number) for number, size in enumerate((1, 100_000, 0, 3, 16 * KIB, 300_000, 1, 0, 2 * MIB, 5))]
        for piece in pieces:
            stream.write(piece)
        stream.end()
        assert one.recv_all() == b"".join(pieces)

    def test_empty_writes_are_harmless(self, transport):
        stream, one = transport.connect(Echo)
        stream.write(b"")
        stream.write("", flush=True)
        one.send(b"x")
        assert one.recv_exactly(1) == b"x"
        stream.write(b"")
        stream.write(b"y")
        stream.write(b"")
        assert one.recv_exactly(1) == b"y"
        stream.end()
        assert one.recv_all() == b""

    def test_write_takes_text_and_copies_what_can_change(self, transport):
        stream, one = transport.connect(Stream)
        changing = bytearray(b"before")
        stream.write("é")
        stream.write(changing)
        stream.write(memoryview(b"view"))
        changing[:] = b"behind"
        stream.end()
        assert one.recv_all() == "é".encode() + b"beforeview"

    def test_write_of_something_else_is_a_type_error_and_nothing_is_lost(self, transport):
        stream, one = transport.connect(Stream)
        stream.write(b"a")
        with pytest.raises(TypeError, match=r"write\(\)"):
            stream.write(5)
        stream.write(b"b")
        stream.end()
        assert one.recv_all() == b"ab"

    def test_write_packed_of_a_struct_is_read_back(self, transport, recorder):
        def on_read(stream, kind, size):
            recorder(kind, size)
            stream.write_packed(kind + 1, size + 1)

        _stream, one = transport.connect(type("Packed", (Stream,), {"read_delimiter": Struct("!BH"), "on_read": on_read}))
        one.send(b"\x01\x00\x02")
        assert one.recv_exactly(3) == b"\x02\x00\x03"
        assert recorder == [(1, 2)]

    def test_on_write_comes_once_when_everything_is_written(self, transport, recorder):
        stream, one = transport.connect(recorder.of(Stream, "on_connect", "on_write", "on_close"))
        recorder.wait_for("on_connect")
        for _ in range(10):
            stream.write(b"x" * 1000)
        assert recorder.names() == ["on_connect"]
        assert len(one.recv_exactly(10_000)) == 10_000
        recorder.wait_for("on_write")
        rounds()
        assert recorder.names() == ["on_connect", "on_write"]

    def test_on_write_waits_until_a_slow_peer_has_taken_everything(self, transport, recorder):
        stream, one = transport.connect(recorder.of(Stream, "on_write"), narrow=True)
        stream.write(bytes(FULL))
        settle(stream, 8)
        assert recorder == []
        assert len(one.recv_exactly(FULL)) == FULL
        recorder.wait_for("on_write")
        assert unsent(stream) == 0

    def test_what_was_written_goes_out_while_the_callback_blocks(self, transport):
        gate = Event()

        class Prompt(Stream):
            def on_read(self, data):
                self.write(b"password: ")
                gate.wait()

        _stream, one = transport.connect(Prompt)
        one.send(b"x")
        assert one.recv_exactly(10) == b"password: "
        gate.set()

    def test_flush_sends_before_the_turn_is_over(self, transport):
        stream, one = transport.connect(Stream)
        rounds()
        stream.write(b"now", flush=True)
        assert unsent(stream) == 0
        stream.write(b"!")
        assert unsent(stream) == 1
        stream.flush()
        assert unsent(stream) == 0
        assert one.recv_exactly(4) == b"now!"

    def test_large_write_reaches_a_peer_that_reads_little_by_little(self, transport):
        stream, one = transport.connect(Stream, narrow=True)
        data = data_of(FULL)
        stream.write(data)
        received = bytearray()
        while len(received) < FULL:
            received += one.recv(50_000)
        assert received == data

    def test_write_from_a_greenlet_and_from_a_timer_arrive(self, transport):
        stream, one = transport.connect(Stream)
        gevent.spawn(stream.write, b"greenlet").get(timeout=5)
        assert one.recv_exactly(8) == b"greenlet"
        in_timer(lambda: stream.write(b"timer")).get(timeout=5)
        assert one.recv_exactly(5) == b"timer"

    def test_greenlets_that_write_at_once_lose_and_tear_nothing(self, transport):
        stream, one = transport.connect(Stream)

        def send(number):
            for turn in range(50):
                stream.write(b"%d:%03d;" % (number, turn) * 100)
                if turn % 7 == number:
                    gevent.sleep(0)

        gevent.joinall([gevent.spawn(send, number) for number in range(4)], raise_error=True)
        stream.end()
        received = one.recv_all()
        assert len(received) == 4 * 50 * 600
        messages = [received[start : start + 600] for start in range(0, len(received), 600)]
        assert all(message == message[:6] * 100 for message in messages)
        for number in range(4):
            heads = [message[:6] for message in messages if message[:1] == b"%d" % number]
            assert heads == [b"%d:%03d;" % (number, turn) for turn in range(50)]

    def test_broadcast_reaches_everybody_in_order(self, transport):
        streams = []

        class Chat(Stream):
            read_delimiter = b"\n"

            def on_read(self, line):
                for other in streams:
                    other.write(line + b"\n")

        made = [transport.connect(Chat) for _ in range(3)]
        streams.extend(stream for stream, _ in made)
        peers = [one for _, one in made]
        peers[0].send(b"a\nb\n")
        assert [one.recv_exactly(4) for one in peers] == [b"a\nb\n"] * 3
        peers[1].send(b"c\n")
        assert [one.recv_exactly(2) for one in peers] == [b"c\n"] * 3


class Cutting(Base):
    """Chunks: every delimiter, whatever the network does to the bytes."""

    @pytest.mark.parametrize("one_by_one", [False, True], ids=["at once", "byte by byte"])
    @pytest.mark.parametrize("kind", CUTS)
    def test_chunks_of_every_delimiter_are_the_same_however_they_come(self, transport, recorder, kind, one_by_one):
        options, data, chunks, rest = CUTS[kind]

        class Cut(Stream):
            def on_read(self, *chunk):
                recorder("chunk", chunk[0].groups() if isinstance(chunk[0], re.Match) else chunk if len(chunk) > 1 else chunk[0])

            def on_end(self, rest):
                recorder("rest", rest)

        _stream, one = transport.connect(type("Cut", (Cut,), options))
        if one_by_one:
            for number in range(len(data)):
                one.send(data[number : number + 1])
            one.shutdown_output()
        else:
            transport.end_with(one, data)
        recorder.wait_for("rest")
        assert chunks_of(recorder, "chunk") == chunks
        assert recorder[-1] == ("rest", rest)

    def test_bytes_on_the_wire_that_come_one_by_one_make_the_same_chunks_and_end(self, transport, recorder):
        _stream, one = transport.connect(recorder.of(EchoLines))
        transport.dribble(one, b"one\ntwo\nrest")
        assert one.recv_all() == b"one\ntwo\n"
        recorder.wait_for("on_close")
        assert recorder == [("on_connect",), ("on_read", b"one"), ("on_read", b"two"), ("on_end", b"rest"), ("on_close",)]

    @pytest.mark.parametrize("size", [1, 30, 3000, 16 * KIB, 40_000], ids=str)
    def test_message_cut_in_two_on_the_wire_arrives_whole_though_nothing_follows(self, transport, size):
        data = data_of(size)
        _stream, one = transport.connect(Echo)
        for cut in sorted({1, 4, 5, 6, size // 2, size - 100, size - 1, size, size + 20} | set(range(size + 21, size + 40, 5))):
            if cut > 0:
                transport.send_cut(one, data, cut)
                assert one.recv_exactly(size) == data

    def test_message_whose_bytes_come_one_by_one_on_the_wire_arrives_whole_though_nothing_follows(self, transport, recorder):
        _stream, one = transport.connect(EchoLines)
        for line in (b"a\n", b"a line of some length\n"):
            transport.dribble(one, line, end=False)
            assert one.recv_exactly(len(line)) == line

    def test_many_small_pieces_in_one_segment_are_all_delivered(self, transport, recorder):
        pieces = [b"%d\n" % number for number in range(500)]
        _stream, one = transport.connect(recorder.of(EchoLines))
        transport.send_pieces(one, pieces)
        assert one.recv_exactly(len(b"".join(pieces))) == b"".join(pieces)
        assert chunks_of(recorder) == [piece[:-1] for piece in pieces]

    def test_none_delivers_at_once_what_arrives(self, transport, recorder):
        _stream, one = transport.connect(recorder.of(Stream))
        for data in (b"a", b"bc", b"d\r\n"):
            one.send(data)
            recorder.wait_for(("on_read", data))
        assert chunks_of(recorder) == [b"a", b"bc", b"d\r\n"]

    def test_none_with_an_encoding_never_splits_a_letter(self, transport, recorder):
        text = "aé€𝄞b" * 3
        _stream, one = transport.connect(recorder.of(Stream, encoding="utf-8"))
        for byte in text.encode():
            one.send(bytes([byte]))
        recorder.wait_for(lambda events: "".join(chunks_of(events)) == text)
        assert "" not in chunks_of(recorder)

    def test_incomplete_chunk_waits_for_its_delimiter(self, transport, recorder):
        stream, one = transport.connect(recorder.of(Stream, read_delimiter=b"\r\n"))
        one.send(b"ab")
        until(lambda: unread(stream) == 2)
        one.send(b"c\r")
        until(lambda: unread(stream) == 4)
        assert chunks_of(recorder) == []
        one.send(b"\n")
        recorder.wait_for(("on_read", b"abc"))

    def test_undecodable_chunk_is_a_read_error_and_closes(self, transport, recorder, caplog):
        stream, one = transport.connect(recorder.of(Stream, "on_read", "on_read_error", "on_close", read_delimiter=b"\n", encoding="utf-8"))
        one.send(b"fine\n\xff\nnever\n")
        recorder.wait_for("on_close")
        assert recorder.names() == ["on_read", "on_read_error", "on_close"]
        assert recorder[0] == ("on_read", "fine")
        assert isinstance(recorder[1][1], UnicodeDecodeError)
        assert stream.close_reason is CloseReason.BAD_INPUT

    @pytest.mark.parametrize("delimiter", [b"\r\n", 200_000, LengthPrefix("!I", max_size=MIB)], ids=["bytes", "int", "LengthPrefix"])
    def test_chunk_that_is_longer_than_many_receives_arrives_whole(self, transport, recorder, delimiter):
        body = data_of(200_000)
        data = delimiter.pack(body) if isinstance(delimiter, LengthPrefix) else body + (delimiter if isinstance(delimiter, bytes) else b"")
        _stream, one = transport.connect(recorder.of(Stream, read_delimiter=delimiter, buffer_size=MIB))
        for _ in range(3):
            one.send(data)
        one.shutdown_output()
        recorder.wait_for("on_close")
        assert chunks_of(recorder) == [body] * 3
        assert ("on_end", b"") in recorder

    def test_many_chunks_in_one_go_are_all_delivered(self, transport, recorder):
        lines = [b"%d" % number for number in range(5000)]
        _stream, one = transport.connect(recorder.of(Stream, read_delimiter=b"\n"))
        one.send(b"".join(line + b"\n" for line in lines))
        one.shutdown_output()
        recorder.wait_for("on_close")
        assert chunks_of(recorder) == lines

    def test_delimiter_changed_inside_a_batch_holds_from_the_next_chunk_on(self, transport, recorder):
        delimiters = {b"four": 4, b"2233": Struct("!H"), b"rest": None}

        def on_read(stream, chunk):
            if chunk in delimiters:
                stream.read_delimiter = delimiters[chunk]
            elif chunk == 0x6162:
                stream.read_delimiter = b"\n"

        _stream, one = transport.connect(recorder.of(Stream, read_delimiter=b"\n", on_read=on_read))
        one.send(b"line\nfour\n\n\n\n\n2233abcd\nrest\nall\nthat")
        recorder.wait_for(("on_read", b"all\nthat"))
        assert chunks_of(recorder) == [b"line", b"four", b"\n\n\n\n", b"2233", 0x6162, b"cd", b"rest", b"all\nthat"]

    def test_delimiter_changed_for_each_chunk_makes_a_packet_protocol(self, transport, recorder):
        def on_read(stream, chunk):
            step = stream.step = getattr(stream, "step", 0) + 1
            stream.read_delimiter = (4, int.from_bytes(chunk, "big"), b"\n")[step % 3]

        body = data_of(50_000)
        _stream, one = transport.connect(recorder.of(Stream, read_delimiter=4, on_read=on_read))
        one.send((len(body).to_bytes(4, "big") + body + b"line\n") * 5)
        one.shutdown_output()
        recorder.wait_for("on_close")
        assert chunks_of(recorder) == [len(body).to_bytes(4, "big"), body, b"line"] * 5

    def test_delimiter_set_in_on_connect_holds_for_what_has_come_already(self, transport, recorder):
        def on_connect(stream):
            stream.read_delimiter = 3

        transport.connect(recorder.of(Stream, read_delimiter=b"\n", on_connect=on_connect), first=b"a\nbc\nde")
        recorder.wait_for(("on_read", b"c\nd"))
        assert chunks_of(recorder) == [b"a\nb", b"c\nd"]

    @pytest.mark.parametrize(("delimiter", "chunk"), [(b";", b"abc"), (2, b"ab"), (None, b"abc;def")], ids=repr)
    def test_delimiter_changed_from_elsewhere_reaches_what_waits(self, transport, recorder, delimiter, chunk):
        stream, one = transport.connect(recorder.of(Stream, read_delimiter=b"\n"))
        one.send(b"abc;def")
        until(lambda: unread(stream) == 7)
        stream.read_delimiter = delimiter
        recorder.wait_for("on_read")
        assert chunks_of(recorder)[0] == chunk

    def test_on_read_replaced_inside_a_batch_gets_the_next_chunk(self, transport, recorder):
        class Header(Stream):
            read_delimiter = b"\n"

            def on_read(self, line):
                recorder("header", line)
                self.on_read = self.on_body

            def on_body(self, line):
                recorder("body", line)

        _stream, one = transport.connect(Header)
        one.send(b"1\n2\n3\n")
        recorder.wait_for(3)
        assert recorder == [("header", b"1"), ("body", b"2"), ("body", b"3")]

    def test_overflow_of_the_buffer_is_told_once_and_closes(self, transport, recorder, caplog):
        stream, one = transport.connect(recorder.of(Stream, read_delimiter=b"\n", buffer_size=64))
        one.send(b"fine\n" + b"x" * 65)
        recorder.wait_for("on_close")
        assert recorder.names() == ["on_connect", "on_read", "on_overflow_error", "on_close"]
        error = recorder[2][1]
        assert (type(error), error.size, error.limit) == (StreamBufferOverflow, 65, 64)
        assert stream.close_reason is CloseReason.OVERFLOW
        assert len(warnings_of(caplog)) == 1

    def test_buffer_that_is_exactly_full_is_no_overflow(self, transport, recorder):
        stream, one = transport.connect(recorder.of(Stream, read_delimiter=b"\n", buffer_size=64))
        one.send(b"x" * 64)
        until(lambda: unread(stream) == 64)
        one.send(b"\n")
        recorder.wait_for("on_read")
        assert recorder == [("on_connect",), ("on_read", b"x" * 64)]

    def test_complete_chunks_never_count_for_an_overflow(self, transport, recorder):
        _stream, one = transport.connect(recorder.of(Stream, read_delimiter=b"\n", buffer_size=64))
        one.send((b"y" * 60 + b"\n") * 500)
        recorder.wait_for(lambda events: len(chunks_of(events)) == 500)
        assert recorder.names() == ["on_connect", *["on_read"] * 500]

    def test_overflow_handler_that_takes_another_delimiter_goes_on(self, transport, recorder):
        def on_overflow_error(stream, error):
            stream.read_delimiter = None

        _stream, one = transport.connect(recorder.of(Stream, read_delimiter=b"\n", buffer_size=64, on_overflow_error=on_overflow_error))
        one.send(b"x" * 100)
        assert said(recorder, 100) == b"x" * 100
        one.send(b"more")
        recorder.wait_for(("on_read", b"more"))
        assert recorder.names().count("on_overflow_error") == 1


class StraightReading(Base):
    """``read()`` in callbacks."""

    def test_read_of_several_kinds_in_one_callback_take_their_turns_with_on_read(self, transport, recorder):
        def on_read(stream, line):
            if line == b"?":
                recorder("read", stream.read(3))
                recorder("read", stream.read(Struct("!HB")))
                recorder("read", stream.read(LengthPrefix("!B")))
                recorder("read", stream.read(Netstring()))
                recorder("read", stream.read(re.compile(rb"[|!]")))
                recorder("read", stream.read())

        _stream, one = transport.connect(recorder.of(Stream, read_delimiter=b"\n", on_read=on_read))
        question = b"?\na\nb\0\1\2\3xyz4:\n,\n,,re!last\n"
        for number in range(len(question)):
            one.send(question[number : number + 1])
        one.send(b"between\n" + question + b"end\nrest")
        one.shutdown_output()
        recorder.wait_for("on_close")
        read = [("read", chunk) for chunk in (b"a\nb", (1, 2), b"xyz", b"\n,\n,", b"re", b"last")]
        asked = [("on_read", b"?"), *read]
        assert recorder[1:] == [*asked, ("on_read", b"between"), *asked, ("on_read", b"end"), ("on_end", b"rest"), ("on_close",)]

    def test_read_in_on_connect_gets_what_came_with_the_handshake_and_on_read_the_rest(self, transport, recorder):
        def on_connect(stream):
            recorder("read", stream.read(b"\n"), stream.read(2))

        _stream, one = transport.connect(recorder.of(Stream, on_connect=on_connect), first=b"name\nabrest")
        recorder.wait_for(("on_read", b"rest"))
        one.shutdown_output()
        recorder.wait_for("on_close")
        assert recorder == [("on_connect",), ("read", b"name", b"ab"), ("on_read", b"rest"), ("on_end", b""), ("on_close",)]

    def test_read_in_on_connect_of_data_and_end_with_the_handshake_gets_all_and_then_channel_closed(self, transport, recorder):
        def on_connect(stream):
            recorder("read", stream.read(b"\n"))
            recorder("read", stream.read(b"\n"))
            with pytest.raises(ChannelClosed):
                stream.read(b"\n")
            recorder("refused")

        _stream, _one = transport.connect(recorder.of(Stream, on_connect=on_connect), first=b"1\n2\nrest", end=True)
        recorder.wait_for("on_close")
        read = [("read", b"1"), ("read", b"2"), "refused", ("on_read", b"rest")]
        assert recorder == [("on_connect",), *read, ("on_end", b""), ("on_close",)]

    def test_read_makes_a_dialogue(self, transport):
        class Login(Stream):
            read_delimiter = b"\n"

            def on_connect(self):
                self.write(b"name: ")
                name = self.read(timeout=5)
                self.write(b"password: ")
                password = self.read(timeout=5)
                self.write(b"hello " + name + b"/" + password + b"\n")

            def on_read(self, line):
                self.write(line + b"!\n")

        _stream, one = transport.connect(Login)
        assert one.recv_exactly(6) == b"name: "
        one.send(b"Ann\n")
        assert one.recv_exactly(10) == b"password: "
        one.send(b"secret\nafter\n")
        assert one.recv_until(b"!\n") == b"hello Ann/secret\nafter!\n"

    def test_read_of_a_large_block_returns_it_whole(self, transport, recorder):
        data = data_of(2 * MIB)

        def on_read(stream, line):
            if line == b"block":
                recorder("read", stream.read(len(data)) == data)

        _stream, one = transport.connect(recorder.of(Stream, read_delimiter=b"\n", on_read=on_read))
        one.send(b"block\n" + data + b"after\n")
        recorder.wait_for(("on_read", b"after"))
        assert recorder == [("on_connect",), ("on_read", b"block"), ("read", True), ("on_read", b"after")]

    @pytest.mark.parametrize("timeout", [0, 0.05])
    def test_read_that_times_out_loses_nothing(self, transport, recorder, timeout):
        def on_read(stream, line):
            try:
                recorder("read", stream.read(b";", timeout=timeout))
            except ReadTimeout:
                recorder("timed out")

        _stream, one = transport.connect(recorder.of(Stream, read_delimiter=b"\n", on_read=on_read))
        one.send(b"first\nhalf")
        recorder.wait_for("timed out")
        one.send(b" a line\nwhole;")
        recorder.wait_for(("on_read", b"half a line"))
        recorder.wait_for(("read", b"whole"))
        assert recorder[1:] == [("on_read", b"first"), "timed out", ("on_read", b"half a line"), ("read", b"whole")]

    def test_read_that_times_out_in_the_middle_of_what_is_on_the_wire_loses_nothing(self, transport, recorder):
        def on_connect(stream):
            with pytest.raises(ReadTimeout):
                stream.read(b"\n", timeout=0.02)
            recorder("timed out")
            recorder("read", stream.read(b"\n"))

        _stream, one = transport.connect(recorder.of(Stream, "on_read", on_connect=on_connect), first=b"a line\nrest", hold=8)
        recorder.wait_for("timed out")
        transport.release(one)
        recorder.wait_for(("on_read", b"rest"))
        assert recorder == ["timed out", ("read", b"a line"), ("on_read", b"rest")]

    def test_read_goes_on_while_the_stream_is_paused(self, transport, recorder):
        def on_read(stream, line):
            if line == b"first":
                stream.pause()
                recorder("read", stream.read())

        stream, one = transport.connect(recorder.of(Stream, "on_read", read_delimiter=b"\n", on_read=on_read))
        one.send(b"first\n")
        until(lambda: stream._in_read)
        one.send(b"second\nthird\n")
        recorder.wait_for("read")
        rounds()
        assert recorder == [("on_read", b"first"), ("read", b"second")]
        stream.resume()
        recorder.wait_for(("on_read", b"third"))

    def test_read_after_the_peers_end_returns_what_waits_and_then_channel_closed_which_is_no_error(self, transport, recorder, caplog):
        def on_read(stream, line):
            while True:
                recorder("read", stream.read())

        stream, one = transport.connect(recorder.of(Stream, read_delimiter=b"\n", on_read=on_read))
        transport.end_with(one, b"1\n2\n3\nrest")
        recorder.wait_for("on_close")
        assert recorder == [("on_connect",), ("on_read", b"1"), ("read", b"2"), ("read", b"3"), ("on_end", b"rest"), ("on_close",)]
        assert stream.close_reason is CloseReason.PEER_ENDED
        assert warnings_of(caplog) == []

    @pytest.mark.parametrize("call", ENDERS)
    def test_read_ends_when_the_stream_is_closed_from_elsewhere(self, transport, recorder, call):
        def on_read(stream, data):
            try:
                stream.read(b"\n")
            except ChannelClosed:
                recorder("refused")

        stream, one = transport.connect(recorder.of(Stream, "on_error", "on_close", on_read=on_read))
        one.send(b"x")
        until(lambda: stream._in_read)
        getattr(stream, call)()
        recorder.wait_for("on_close")
        assert recorder == ["refused", ("on_close",)]
        assert stream.close_reason is ENDERS[call]

    def test_read_outside_of_its_callbacks_is_an_error(self, transport):
        stream, _one = transport.connect(Stream)
        rounds()
        with pytest.raises(ChannelStateError, match=r"read\(\)"):
            stream.read(1)


class Ending(Base):
    """Every way to end, from everywhere."""

    @pytest.mark.parametrize("call", ENDERS)
    @pytest.mark.parametrize("callback", ["on_connect", "on_read", "on_write", "on_end"])
    def test_ended_in_a_callback_nothing_comes_but_on_close(self, transport, recorder, callback, call):
        gate = Event()

        class Held(EchoLines):
            def on_connect(self):
                gate.wait()

        def end_it(stream, *args):
            getattr(Held, callback)(stream, *args)
            getattr(stream, call)()
            recorder("connected", stream.connected)

        kind = recorder.of(Held, "on_connect", "on_read", "on_write", "on_end", "on_close", **{callback: end_it})
        stream, one = transport.connect(kind)
        one.send(b"a\nb\n")
        gate.set()
        if callback == "on_end":
            assert one.recv_exactly(4) == b"a\nb\n"
            transport.end_with(one, b"")
        recorder.wait_for("on_close")
        rounds()
        recorder.remove(("connected", False))
        wanted = {
            "on_connect": ["on_connect", "on_close"],
            "on_read": ["on_connect", "on_read", *["on_write"] * (call == "end"), "on_close"],
            "on_write": ["on_connect", "on_read", "on_read", "on_write", "on_close"],
            "on_end": ["on_connect", "on_read", "on_read", "on_write", "on_end", "on_close"],
        }
        assert recorder.names() == wanted[callback]
        assert stream.closed
        if callback != "on_end":
            assert stream.close_reason is ENDERS[call]

    @pytest.mark.parametrize("call", ENDERS)
    def test_ended_in_on_close_does_nothing(self, transport, recorder, call):
        def again(stream):
            getattr(stream, call)()
            getattr(stream, call)()

        stream, one = transport.connect(recorder.of(Stream, on_close=again))
        one.shutdown_output()
        recorder.wait_for("on_close")
        rounds()
        assert recorder.names() == ["on_connect", "on_end", "on_close"]
        assert stream.close_reason is CloseReason.PEER_ENDED

    @pytest.mark.parametrize("call", ENDERS)
    def test_ended_while_it_waits_for_input_is_told_later_and_once(self, transport, recorder, call):
        stream, one = transport.connect(recorder.of(EchoLines))
        one.send(b"a\n")
        assert one.recv_exactly(2) == b"a\n"
        getattr(stream, call)()
        assert not stream.connected
        assert "on_close" not in recorder.names()  # never inside the call
        recorder.wait_for("on_close")
        rounds()
        assert recorder.names() == ["on_connect", "on_read", "on_close"]
        assert stream.close_reason is ENDERS[call]

    @pytest.mark.parametrize("call", ENDERS)
    def test_ended_while_a_callback_blocks_is_told_after_it(self, transport, recorder, call):
        gate = Event()

        def on_read(stream, data):
            gate.wait()
            recorder("done")

        stream, one = transport.connect(recorder.of(Stream, on_read=on_read))
        one.send(b"x")
        recorder.wait_for("on_read")
        getattr(stream, call)()
        rounds()
        assert recorder.names() == ["on_connect", "on_read"]
        gate.set()
        recorder.wait_for("on_close")
        assert recorder.names() == ["on_connect", "on_read", "done", "on_close"]

    @pytest.mark.parametrize("first", [*ENDERS, "write_eof"])
    @pytest.mark.parametrize("second", ENDERS)
    def test_ended_twice_closes_once(self, transport, recorder, first, second):
        stream, _one = transport.connect(recorder.of(Stream))
        recorder.wait_for("on_connect")
        getattr(stream, first)()
        getattr(stream, second)()
        getattr(stream, second)()
        recorder.wait_for("on_close")
        rounds()
        assert recorder.names() == ["on_connect", "on_close"]
        assert stream.closed

    def test_ended_in_the_middle_of_a_batch_drops_the_chunks_behind(self, transport, recorder):
        def on_read(stream, line):
            if line == b"quit":
                stream.close()

        _stream, one = transport.connect(recorder.of(Stream, read_delimiter=b"\n", on_read=on_read))
        one.send(b"1\nquit\n2\n3\n4")
        recorder.wait_for("on_close")
        assert recorder == [("on_connect",), ("on_read", b"1"), ("on_read", b"quit"), ("on_close",)]

    @pytest.mark.parametrize("call", ["close", "end"])
    def test_close_and_end_send_what_was_written_and_a_proper_end(self, transport, recorder, call):
        stream, one = transport.connect(recorder.of(Stream))
        recorder.wait_for("on_connect")
        stream.write(b"goodbye")
        getattr(stream, call)()
        assert one.recv_exactly(7) == b"goodbye"
        assert one.at_eof()
        recorder.wait_for("on_close")

    @pytest.mark.parametrize("call", ["close", "end"])
    def test_close_and_end_right_after_the_answer_in_on_read_arrive_in_order(self, transport, call):
        def on_read(stream, line):
            stream.write(b"answer to " + line)
            getattr(stream, call)()

        _stream, one = transport.connect(type("Once", (Stream,), {"read_delimiter": b"\n", "on_read": on_read}))
        one.send(b"question\n")
        assert one.recv_all() == b"answer to question"

    def test_write_in_on_close_is_channel_closed(self, transport, recorder):
        def on_close(stream):
            with pytest.raises(ChannelClosed):
                stream.write(b"too late")
            recorder("refused")

        _stream, one = transport.connect(recorder.of(Stream, "on_error", on_close=on_close))
        one.shutdown_output()
        recorder.wait_for("refused")
        assert one.recv_all() == b""

    def test_close_drops_what_the_kernel_does_not_take_and_the_peer_can_tell(self, transport, stuck, recorder, caplog):
        caplog.set_level(logging.DEBUG, "pants_green")
        stream, one, data = stuck()
        stream.close()
        assert unsent(stream) == 0
        recorder.wait_for("on_close")
        assert stream.close_reason is CloseReason.CLOSED_HERE
        assert [record for record in caplog.records if record.event == "dropped"]
        received = b""
        with pytest.raises(CUT_OFF) if transport.tls else contextlib.nullcontext():
            while piece := one.recv():
                received += piece
        assert 0 < len(received) < FULL
        assert received == data[: len(received)]

    def test_end_delivers_everything_to_a_peer_that_is_slow_and_still_writing(self, transport, recorder):
        stream, one = transport.connect(recorder.of(Stream), narrow=True)
        recorder.wait_for("on_connect")
        data = data_of(FULL)
        stream.write(data)
        settle(stream, 8)
        stream.end()
        one.send(bytes(4 * MIB))  # which is read and thrown away, or neither side would get on
        received = bytearray()
        while len(received) < FULL:
            received += one.recv(30_000)
        assert received == data
        assert one.at_eof()
        recorder.wait_for("on_close")
        assert recorder.names() == ["on_connect", "on_close"]
        assert stream.close_reason is CloseReason.ENDED_HERE

    @pytest.mark.parametrize("call", ["end", "write_eof"])
    def test_end_and_write_eof_that_find_the_kernel_full_reach_the_peer_behind_everything(self, transport, recorder, call):
        stream, one = transport.connect(recorder.of(Stream), narrow=True)
        recorder.wait_for("on_connect")
        data = data_of(100 * KIB)
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MIB)
        stream.write(data, flush=True)
        assert unsent(stream) == 0
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # so that it holds more than it may now
        getattr(stream, call)()
        rounds()
        assert one.recv_all() == data
        assert in_thread(one.socket.recv, 1) == b""
        if call == "write_eof":
            one.send(b"still here")
            recorder.wait_for(("on_read", b"still here"))
            one.shutdown_output()
        recorder.wait_for("on_close")
        assert stream.close_reason is (CloseReason.ENDED_HERE if call == "end" else CloseReason.PEER_ENDED)

    def test_end_gives_no_reset_to_a_peer_that_writes_afterwards(self, transport, recorder):
        stream, one = transport.connect(recorder.of(Stream, "on_connect", "on_close"))
        recorder.wait_for("on_connect")
        stream.write(b"answer")
        stream.end()
        recorder.wait_for("on_close")
        for _ in range(20):
            one.send(bytes(16 * KIB))
            rounds()
        assert one.recv_all() == b"answer"

    def test_abort_leaves_the_peer_without_a_proper_end(self, transport, recorder):
        stream, one = transport.connect(recorder.of(Stream))
        recorder.wait_for("on_connect")
        stream.write(b"never sent")
        stream.abort()
        recorder.wait_for("on_close")
        assert stream.close_reason is CloseReason.ABORTED_HERE
        if transport.resets:
            assert one.raises_reset()
        elif transport.tls:
            with pytest.raises(CUT_OFF):
                one.recv_all()
        else:
            assert one.recv_all() == b""

    @pytest.mark.parametrize("call", ENDERS)
    def test_write_and_its_kin_after_the_end_are_channel_closed(self, transport, recorder, call):
        stream, _one = transport.connect(recorder.of(Stream))
        recorder.wait_for("on_connect")
        getattr(stream, call)()
        for refused in (lambda: stream.write(b"late"), lambda: stream.write("", flush=True), stream.write_eof):
            with pytest.raises(ChannelClosed) as caught:
                refused()
            assert caught.value.channel is stream
        recorder.wait_for("on_close")
        for refused in (lambda: stream.write(b"late"), stream.flush, stream.drain, stream.write_eof):
            with pytest.raises(ChannelClosed):
                refused()

    def test_write_eof_sends_everything_and_reading_goes_on(self, transport, recorder):
        stream, one = transport.connect(recorder.of(Stream), narrow=True)
        recorder.wait_for("on_connect")
        data = data_of(FULL)
        stream.write(data)
        stream.write_eof()
        with pytest.raises(ChannelClosed, match="write"):
            stream.write(b"late")
        assert one.recv_all() == data
        assert stream.connected
        one.send(b"still here")
        recorder.wait_for(("on_read", b"still here"))
        one.shutdown_output()
        recorder.wait_for("on_close")
        assert recorder == [("on_connect",), ("on_read", b"still here"), ("on_end", b""), ("on_close",)]

    def test_write_eof_and_then_much_data_of_the_peer_loses_nothing(self, transport, recorder):
        stream, one = transport.connect(recorder.of(Stream))
        recorder.wait_for("on_connect")
        stream.write(b"request")
        stream.write_eof()
        assert one.recv_all() == b"request"
        data = data_of(MIB)
        one.send(data)
        one.shutdown_output()
        recorder.wait_for("on_close")
        assert text_of(recorder) == data
        assert stream.close_reason is CloseReason.PEER_ENDED

    def test_write_eof_in_the_midst_of_the_peers_data_loses_nothing(self, transport, recorder):
        def on_read(stream, data):
            if not stream.over:
                stream.over = True
                stream.write(b"enough for me")
                stream.write_eof()

        _stream, one = transport.connect(recorder.of(Stream, over=False, on_read=on_read))
        recorder.wait_for("on_connect")
        data = data_of(4 * MIB)
        one.send(data)
        transport.end_with(one, b"last")
        assert one.recv_all() == b"enough for me"
        recorder.wait_for("on_close")
        assert text_of(recorder) == data + b"last"
        assert recorder[-2:] == [("on_end", b""), ("on_close",)]

    def test_write_eof_with_nothing_written_is_the_end_at_once(self, transport, recorder):
        stream, one = transport.connect(recorder.of(Stream))
        recorder.wait_for("on_connect")
        stream.write_eof()
        assert one.at_eof()
        one.send(b"x")
        recorder.wait_for(("on_read", b"x"))

    @pytest.mark.parametrize("callback", ["on_connect", "on_read", "on_write", "on_end"])
    def test_write_eof_in_a_callback_sends_what_is_owed_and_the_life_goes_on(self, transport, recorder, callback):
        gate = Event()

        class Held(Stream):
            read_delimiter = b"\n"
            over = False

            def on_connect(self):
                gate.wait()

            def on_read(self, line):
                if not self.over:
                    self.write(line + b"\n")

        def end_output(stream, *args):
            getattr(Held, callback)(stream, *args)
            if not stream.over:
                stream.over = True
                stream.write_eof()

        kind = recorder.of(Held, "on_connect", "on_read", "on_end", "on_close", **{callback: end_output})
        _stream, one = transport.connect(kind, first=b"a\n")
        gate.set()
        if callback == "on_end":
            one.shutdown_output()
        assert one.recv_all() == (b"" if callback == "on_connect" else b"a\n")
        if callback != "on_end":
            one.send(b"b\n")
            recorder.wait_for(("on_read", b"b"))
            one.shutdown_output()
        recorder.wait_for("on_close")
        assert recorder[-2:] == [("on_end", b""), ("on_close",)]

    def test_answer_reaches_a_peer_that_has_ended_its_side(self, transport, recorder):
        answer = data_of(FULL)
        stream, one = transport.connect(recorder.of(Stream, read_delimiter=b"\n", on_read=lambda stream, line: stream.write(answer)))
        transport.end_with(one, b"question\n")
        assert one.recv_all() == answer
        recorder.wait_for("on_close")
        assert recorder == [("on_connect",), ("on_read", b"question"), ("on_end", b""), ("on_close",)]
        assert stream.close_reason is CloseReason.PEER_ENDED

    def test_answer_of_a_callback_that_blocks_reaches_a_peer_that_has_ended_its_side(self, transport, recorder):
        gate = Event()

        def on_read(stream, line):
            gate.wait()
            stream.write(line * 2)

        _stream, one = transport.connect(recorder.of(Stream, on_read=on_read))
        one.send(b"twice")
        recorder.wait_for("on_read")
        one.shutdown_output()
        rounds()
        gate.set()
        assert one.recv_all() == b"twicetwice"

    @pytest.mark.parametrize("kind", [b"\n", 8, None], ids=repr)
    def test_on_end_gets_what_no_delimiter_completed_and_may_answer(self, transport, recorder, kind):
        def on_end(stream, rest):
            recorder("rest", rest, stream.connected)
            stream.write(b"bye " + rest)

        _stream, one = transport.connect(recorder.of(Stream, read_delimiter=kind, on_end=on_end))
        transport.end_with(one, b"1234567\nrest")
        rest = b"" if kind is None else b"rest"
        assert one.recv_all() == b"bye " + rest
        assert ("rest", rest, False) in recorder

    def test_half_open_stream_writes_on_after_the_peers_end(self, transport, recorder):
        stream, one = transport.connect(recorder.of(EchoLines, allow_half_open=True))
        transport.end_with(one, b"a\nrest")
        recorder.wait_for(("on_end", b"rest"))
        assert one.recv_exactly(2) == b"a\n"
        rounds()
        assert stream.connected
        data = data_of(FULL)
        stream.write(data)
        assert one.recv_exactly(FULL) == data
        assert "on_close" not in recorder.names()
        stream.write(b"over")
        stream.end()
        assert one.recv_all() == b"over"
        recorder.wait_for("on_close")
        assert recorder.names() == ["on_connect", "on_read", "on_end", "on_close"]

    @pytest.mark.parametrize("call", [*ENDERS, "write_eof"])
    def test_half_open_stream_ends_by_every_call(self, transport, recorder, call):
        stream, one = transport.connect(recorder.of(Stream, allow_half_open=True))
        one.shutdown_output()
        recorder.wait_for("on_end")
        getattr(stream, call)()
        recorder.wait_for("on_close")
        assert recorder.names() == ["on_connect", "on_end", "on_close"]

    def test_both_sides_half_closed_one_after_the_other_end_the_stream(self, transport, recorder):
        stream, one = transport.connect(recorder.of(Stream, allow_half_open=True))
        recorder.wait_for("on_connect")
        stream.write(b"ours")
        stream.write_eof()
        assert one.recv_all() == b"ours"
        transport.end_with(one, b"theirs")
        recorder.wait_for("on_close")
        assert recorder == [("on_connect",), ("on_read", b"theirs"), ("on_end", b""), ("on_close",)]


class Flow(Base):
    """Pausing, room, and limits."""

    def test_pause_in_the_middle_of_a_batch_delivers_nothing_more_until_resume(self, transport, recorder):
        def on_read(stream, line):
            if line == b"pause":
                stream.pause()

        stream, one = transport.connect(recorder.of(Stream, read_delimiter=b"\n", on_read=on_read))
        one.send(b"1\npause\n2\n3")
        recorder.wait_for(("on_read", b"pause"))
        one.send(b"\n4\n")
        rounds()
        assert chunks_of(recorder) == [b"1", b"pause"]
        assert stream.paused
        stream.resume()
        recorder.wait_for(("on_read", b"4"))
        assert chunks_of(recorder) == [b"1", b"pause", b"2", b"3", b"4"]

    def test_pause_in_on_connect_keeps_what_came_with_the_handshake(self, transport, recorder):
        stream, one = transport.connect(recorder.of(EchoLines, on_connect=lambda stream: stream.pause()), first=b"a\n")
        recorder.wait_for("on_connect")
        one.send(b"b\n")
        rounds()
        assert recorder == [("on_connect",)]
        stream.resume()
        assert one.recv_exactly(4) == b"a\nb\n"

    def test_pause_from_elsewhere_holds_back_data_and_end(self, transport, recorder):
        stream, one = transport.connect(recorder.of(EchoLines))
        one.send(b"a\n")
        assert one.recv_exactly(2) == b"a\n"
        stream.pause()
        transport.end_with(one, b"b\nrest")
        rounds()
        assert recorder.names() == ["on_connect", "on_read"]
        stream.resume()
        assert one.recv_all() == b"b\n"
        recorder.wait_for("on_close")
        assert recorder == [("on_connect",), ("on_read", b"a"), ("on_read", b"b"), ("on_end", b"rest"), ("on_close",)]

    def test_pause_holds_the_peer_up(self, transport, recorder):
        stream, one = transport.connect(recorder.of(Stream), narrow=True)
        recorder.wait_for("on_connect")
        stream.pause()
        data = data_of(16 * MIB)
        writer = gevent.spawn(one.send, data)
        rounds()
        assert not writer.ready()
        stream.resume()
        writer.get(timeout=10)
        assert said(recorder, len(data)) == data

    def test_pause_does_not_stop_output(self, transport, recorder):
        stream, one = transport.connect(recorder.of(Stream), narrow=True)
        recorder.wait_for("on_connect")
        stream.pause()
        data = data_of(FULL)
        stream.write(data)
        assert one.recv_exactly(FULL) == data

    @pytest.mark.parametrize("call", ENDERS)
    def test_pause_then_an_end_takes_effect_and_delivers_nothing_more(self, transport, recorder, call):
        stream, one = transport.connect(recorder.of(EchoLines))
        recorder.wait_for("on_connect")
        stream.pause()
        one.send(b"a\n")
        rounds()
        getattr(stream, call)()
        recorder.wait_for("on_close")
        assert recorder.names() == ["on_connect", "on_close"]
        assert stream.close_reason is ENDERS[call]

    def test_reading_stops_when_answers_are_not_read_and_everything_comes_all_the_same(self, transport, recorder):
        answer = data_of(HIGH)
        kind = recorder.of(Narrow, "on_read", write_limit=16 * MIB, read_delimiter=1, on_read=lambda stream, data: stream.write(answer))
        stream, one = transport.connect(kind, narrow=True)
        for _ in range(40):
            one.send(b"x")
            gevent.sleep(0.001)
        until(lambda: unsent(stream) > HIGH)
        rounds()
        assert len(recorder) < 20
        assert unsent(stream) <= HIGH + len(answer)
        assert one.recv_exactly(40 * HIGH) == answer * 40
        recorder.wait_for(40)

    def test_data_and_end_that_come_while_reading_stops_are_delivered_when_the_answer_is_read(self, transport, recorder):
        answer = data_of(FULL)

        def on_read(stream, data):
            stream.write(answer)

        stream, one = transport.connect(recorder.of(Narrow, "on_read", "on_end", "on_close", on_read=on_read), narrow=True)
        one.send(b"first")
        until(lambda: stream._own_mark >= 0)
        transport.end_with(one, b"second")
        rounds()
        assert recorder == [("on_read", b"first")]
        assert one.recv_all() == answer * 2
        recorder.wait_for("on_close")
        assert recorder == [("on_read", b"first"), ("on_read", b"second"), ("on_end", b""), ("on_close",)]

    def test_peer_that_floods_does_not_hold_up_another(self, transport, recorder):
        def on_read(stream, data):
            recorder(len(data))

        _first, flooding = transport.connect(type("Sink", (Stream,), {"on_read": on_read}))
        _second, modest = transport.connect(Echo)
        flood = True

        def send():
            while flood:
                flooding.send(data_of(MIB))

        writer = gevent.spawn(send)
        recorder.wait_for(1)
        for _ in range(5):
            before = sum(recorder)
            modest.send(b"me too")
            assert modest.recv_exactly(6) == b"me too"
            recorder.wait_for(lambda sizes, before=before: sum(sizes) > before)
        flood = False
        writer.get(timeout=5)

    def test_streams_that_wait_use_no_cpu(self, transport, recorder):
        transport.connect(EchoLines, first=b"half")
        paused, _ = transport.connect(Stream, first=b"a")
        paused.pause()
        _half_open, one = transport.connect(recorder.of(Stream, "on_end", allow_half_open=True), first=b"a", end=True)
        recorder.wait_for("on_end")
        stalled, _ = transport.connect(Narrow, narrow=True)
        stalled.write(data_of(FULL))
        settle(stalled, 8)
        held, other = transport.connect(type("Held", (Narrow,), {"on_read": lambda stream, data: stream.write(data_of(FULL))}), narrow=True)
        other.send(b"a")
        until(lambda: held._own_mark >= 0)
        other.send(b"b")
        settle(held)
        began = time.process_time()
        gevent.sleep(0.1)
        assert time.process_time() - began < 0.05
        one.close()

    def test_output_of_others_never_stops_reading(self, transport, recorder):
        stream, one = transport.connect(recorder.of(Narrow, "on_read"), narrow=True)
        data = data_of(FULL)
        stream.write(data)
        settle(stream, 8)
        for number in range(5):
            one.send(b"%d" % number)
            recorder.wait_for(("on_read", b"%d" % number))
        assert unsent(stream) > LIMIT
        assert one.recv_exactly(FULL) == data

    def test_output_of_a_flood_of_echoes_is_bounded(self, transport, recorder):
        def on_read(stream, data):
            stream.write(data)
            recorder(unsent(stream))

        stream, one = transport.connect(type("Bounded", (Narrow,), {"on_read": on_read}), narrow=True)
        data = data_of(8 * MIB)
        writer = gevent.spawn(one.send, data)
        until(lambda: unsent(stream) > HIGH)
        rounds()
        assert not writer.ready()
        assert max(recorder) <= HIGH + 300 * KIB
        stream.abort()
        with pytest.raises(OSError):  # noqa: PT011
            writer.get(timeout=5)

    @pytest.mark.parametrize("place", ["own", "greenlet"])
    def test_drain_waits_until_the_peer_has_taken_enough(self, stuck, recorder, place):
        def drain(stream):
            stream.drain()
            recorder("drained", unsent(stream) <= LOW)

        stream, one, data = stuck("on_error", "on_close", on_read=lambda stream, _: drain(stream))
        if place == "own":
            one.send(b"x")
            until(lambda: stream._own_mark >= 0)
        else:
            waiting = gevent.spawn(drain, stream)
            until(lambda: len(stream._waiters) == 1)
        rounds()
        assert recorder == []
        assert one.recv_exactly(FULL) == data
        recorder.wait_for(1)
        assert recorder == [("drained", True)]
        if place == "greenlet":
            waiting.get(timeout=5)

    @pytest.mark.parametrize("how", ["close", "abort", "reset"])
    def test_drain_is_channel_closed_when_the_stream_closes_meanwhile(self, stuck, recorder, how):
        stream, one, _ = stuck()
        waiting = gevent.spawn(stream.drain)
        until(lambda: len(stream._waiters) == 1)
        getattr(one if how == "reset" else stream, how)()
        with pytest.raises(ChannelClosed, match=r"drain\(\)"):
            waiting.get(timeout=5)
        recorder.wait_for("on_close")

    def test_drain_returns_when_end_has_sent_everything(self, stuck, recorder):
        stream, one, data = stuck()
        waiting = gevent.spawn(stream.drain)
        until(lambda: len(stream._waiters) == 1)
        stream.end()
        assert one.recv_all() == data
        waiting.get(timeout=5)
        recorder.wait_for("on_close")

    def test_write_above_the_limit_in_the_own_callback_waits_and_loses_nothing(self, transport, recorder):
        first, second = data_of(FULL, 1), data_of(FULL, 2)

        def on_read(stream, data):
            stream.write(first)
            recorder("first")
            stream.write(second)
            recorder("second")
            stream.write(b"!")

        _stream, one = transport.connect(type("Flooding", (Narrow,), {"on_read": on_read}), narrow=True)
        one.send(b"x")
        recorder.wait_for("first")
        rounds()
        assert recorder == ["first"]
        assert one.recv_exactly(2 * FULL + 1) == first + second + b"!"
        assert recorder == ["first", "second"]

    def test_write_above_the_limit_in_a_plain_greenlet_waits_and_keeps_its_place(self, stuck):
        stream, one, data = stuck()

        def write():
            stream.write(b"one")
            stream.write(b"two")

        waiting = gevent.spawn(write)
        until(lambda: len(stream._waiters) == 1)
        rounds()
        assert not waiting.ready()
        assert one.recv_exactly(FULL + 6) == data + b"onetwo"
        waiting.get(timeout=5)

    def test_write_above_the_limit_that_waits_is_channel_closed_when_the_peer_vanishes(self, stuck, recorder):
        stream, one, _ = stuck()
        waiting = gevent.spawn(stream.write, b"never")
        until(lambda: len(stream._waiters) == 1)
        one.reset()
        with pytest.raises(ChannelClosed, match=r"write\(\)"):
            waiting.get(timeout=5)
        recorder.wait_for("on_close")

    def test_write_above_the_limit_by_a_timer_closes_by_default(self, stuck, recorder, caplog):
        stream, _one, _ = stuck()
        in_timer(lambda: stream.write(b"too much")).get(timeout=5)
        assert (stream.connected, stream.close_reason) == (False, CloseReason.OVERFLOW)
        recorder.wait_for("on_close")
        assert recorder.names() == ["on_overflow_error", "on_close"]
        assert isinstance(stream.close_error, StreamBufferOverflow)
        assert len(warnings_of(caplog)) == 1

    def test_write_above_the_limit_by_a_timer_is_dropped_whole_and_counted_if_so_asked(self, stuck, recorder):
        stream, one, data = stuck(overflow="drop")
        in_timer(lambda: [stream.write(b"dropped") for _ in range(5)]).get(timeout=5)
        assert stream.writes_dropped == 5
        assert one.recv_exactly(FULL) == data
        in_timer(lambda: stream.write(b"there is room")).get(timeout=5)
        stream.end()
        assert one.recv_all() == b"there is room"
        assert stream.writes_dropped == 5

    def test_write_above_the_limit_by_a_timer_waits_if_so_asked(self, stuck):
        stream, one, data = stuck(overflow="wait")
        waiting = in_timer(lambda: stream.write(b"later"))
        until(lambda: len(stream._waiters) == 1)
        assert not waiting.ready()
        assert one.recv_exactly(FULL + 5) == data + b"later"
        waiting.get(timeout=5)

    def test_write_timeout_closes_when_the_peer_takes_nothing(self, stuck, recorder, caplog):
        stream, _one, _ = stuck()
        stream.write_timeout = SHORT
        recorder.wait_for("on_close")
        assert recorder == [("on_timeout", "write"), ("on_close",)]
        assert stream.close_reason is CloseReason.TIMED_OUT
        assert len(warnings_of(caplog)) == 1

    def test_write_timeout_does_not_hit_a_peer_that_takes_something_now_and_then(self, transport, recorder):
        stream, one = transport.connect(recorder.of(Narrow, "on_timeout", "on_close", write_timeout=0.25), narrow=True)
        data = data_of(FULL)
        stream.write(data)
        received = bytearray()
        for _ in range(4):
            gevent.sleep(0.07)  # in all more than the limit
            received += one.recv_exactly(FULL // 8)
        received += one.recv_exactly(FULL - len(received))
        assert received == data
        assert recorder == []

    def test_write_timeout_after_end_closes_too(self, stuck, recorder):
        stream, _one, _ = stuck()
        stream.write_timeout = SHORT
        stream.end()
        recorder.wait_for("on_close")
        assert recorder == [("on_timeout", "write"), ("on_close",)]
        assert stream.close_reason is CloseReason.TIMED_OUT

    def test_read_timeout_closes_when_a_chunk_does_not_come_whole(self, transport, recorder, caplog):
        kind = recorder.of(Stream, "on_read", "on_timeout", "on_end", "on_close", read_delimiter=b"\n", read_timeout=SHORT)
        stream, one = transport.connect(kind)
        one.send(b"whole\n")
        recorder.wait_for("on_read")
        gevent.sleep(2 * SHORT)  # nothing has begun, so nothing is late
        assert recorder == [("on_read", b"whole")]
        one.send(b"half")
        recorder.wait_for("on_close")
        assert recorder == [("on_read", b"whole"), ("on_timeout", "read"), ("on_close",)]
        assert isinstance(stream.close_error, ReadTimeout)
        assert len(warnings_of(caplog)) == 1
        if transport.tls:
            with pytest.raises(CUT_OFF):  # no goodbye: the peer had better know that it was cut off
                one.at_eof()
        else:
            assert one.at_eof()

    def test_read_timeout_whose_callback_does_not_close_begins_anew(self, transport, recorder):
        kind = recorder.of(
            Stream, "on_read", "on_timeout", read_delimiter=b"\n", read_timeout=0.05, on_timeout=lambda stream, which: stream.write(b"?")
        )
        _stream, one = transport.connect(kind)
        one.send(b"half")
        assert one.recv_exactly(2) == b"??"
        one.send(b" a line\n")
        recorder.wait_for(("on_read", b"half a line"))


class Trouble(Base):
    """Exceptions in callbacks, and peers that vanish."""

    @pytest.mark.parametrize("callback", ["on_connect", "on_read", "on_write", "on_end"])
    def test_callback_that_raises_is_told_on_error_and_closes_and_costs_no_other(self, transport, recorder, caplog, callback):
        def raising(stream, *args):
            getattr(EchoLines, callback)(stream, *args)
            raise ZeroDivisionError(callback)

        _other, bystander = transport.connect(EchoLines)
        stream, one = transport.connect(recorder.of(EchoLines, "on_error", "on_close", **{callback: raising}))
        if callback != "on_connect":
            one.send(b"a\nb\n")
        if callback == "on_end":
            assert one.recv_exactly(4) == b"a\nb\n"
            one.shutdown_output()
        recorder.wait_for("on_close")
        assert recorder.names() == ["on_error", "on_close"]
        assert isinstance(recorder[0][1], ZeroDivisionError)
        assert stream.close_reason is CloseReason.CALLBACK_ERROR
        (message,) = warnings_of(caplog)
        assert callback in message
        bystander.send(b"fine\n")
        assert bystander.recv_exactly(5) == b"fine\n"

    def test_on_error_may_keep_the_stream_open_and_the_batch_goes_on(self, transport, recorder):
        def on_read(stream, line):
            stream.write(b"%d;" % (10 // int(line)))

        def on_error(stream, error):
            stream.write(b"no;")

        kind = recorder.of(Stream, "on_error", "on_close", read_delimiter=b"\n", on_read=on_read, on_error=on_error)
        _stream, one = transport.connect(kind)
        one.send(b"5\n0\n2\n")
        assert one.recv_exactly(7) == b"2;no;5;"
        assert recorder.names() == ["on_error"]

    def test_on_close_that_raises_is_logged_and_the_stream_is_closed_all_the_same(self, transport, recorder, caplog):
        def on_close(stream):
            raise ZeroDivisionError("on_close")

        stream, one = transport.connect(recorder.of(Stream, "on_close", on_close=on_close))
        one.shutdown_output()
        recorder.wait_for("on_close")
        until(lambda: warnings_of(caplog))
        assert stream.closed
        assert one.recv_all() == b""

    def test_timeout_of_the_users_in_a_callback_interrupts_only_that(self, transport):
        class Patient(Stream):
            def on_read(self, data):
                with gevent.Timeout(0.02, False):
                    Event().wait()
                self.write(b"gave up")

        _stream, one = transport.connect(Patient)
        for _ in range(2):
            one.send(b"x")
            assert one.recv_exactly(7) == b"gave up"

    def test_peer_that_resets_while_the_stream_waits_for_input_is_no_error(self, transport, recorder, caplog):
        stream, one = transport.connect(recorder.of(EchoLines, "on_connect", "on_read", "on_error", "on_close"))
        one.send(b"a\n")
        assert one.recv_exactly(2) == b"a\n"
        one.reset()
        recorder.wait_for("on_close")
        assert recorder.names() == ["on_connect", "on_read", "on_close"]
        assert stream.close_reason is transport.left
        assert warnings_of(caplog) == []

    def test_peer_that_resets_while_a_callback_blocks_is_noticed_after_it(self, transport, recorder):
        gate = Event()

        def on_read(stream, data):
            gate.wait()
            recorder("done")

        stream, one = transport.connect(recorder.of(Stream, "on_read", "on_error", "on_close", on_read=on_read))
        one.send(b"x")
        recorder.wait_for("on_read")
        one.reset()
        rounds()
        assert recorder.names() == ["on_read"]
        gate.set()
        recorder.wait_for("on_close")
        assert recorder.names() == ["on_read", "done", "on_close"]
        assert stream.close_reason is transport.left

    def test_peer_that_resets_while_output_waits_for_it_ends_the_stream(self, stuck, recorder, caplog):
        stream, one, _ = stuck()
        one.reset()
        recorder.wait_for("on_close")
        assert recorder.names() == ["on_close"]
        assert stream.close_reason in (CloseReason.PEER_LEFT, CloseReason.PEER_ENDED)
        assert unsent(stream) == 0
        assert warnings_of(caplog) == []

    def test_peer_that_resets_while_the_stream_writes_without_end_stops_it(self, transport, recorder):
        def on_read(stream, data):
            while stream.connected:
                stream.write(bytes(16 * KIB))
                gevent.sleep(0)

        stream, one = transport.connect(recorder.of(Narrow, "on_error", "on_close", on_read=on_read), narrow=True)
        one.send(b"x")
        one.recv_exactly(100 * KIB)
        one.reset()
        recorder.wait_for("on_close")
        assert recorder.names() == ["on_close"]
        assert stream.close_reason is CloseReason.PEER_LEFT

    def test_peer_that_resets_while_a_read_waits_is_channel_closed_and_no_error(self, transport, recorder, caplog):
        def on_read(stream, data):
            try:
                stream.read(b"\n")
            finally:
                recorder("left")

        stream, one = transport.connect(recorder.of(Stream, "on_read", "on_error", "on_close", on_read=on_read))
        one.send(b"x")
        until(lambda: stream._in_read)
        one.reset()
        recorder.wait_for("on_close")
        assert recorder.names() == ["on_read", "left", "on_close"]
        assert warnings_of(caplog) == []

    def test_peer_that_ends_while_output_waits_for_it_still_gets_all(self, stuck, recorder):
        stream, one, data = stuck()
        one.shutdown_output()
        assert one.recv_all() == data
        recorder.wait_for("on_close")
        assert recorder.names() == ["on_close"]
        assert stream.close_reason is CloseReason.PEER_ENDED

    def test_peer_that_ends_without_a_goodbye_is_cut_off_with_tls_and_an_end_without(self, transport, recorder):
        kind = recorder.of(Stream, "on_read", "on_ssl_error", "on_end", "on_close", read_delimiter=b"\n")
        stream, one = transport.connect(kind)
        one.send(b"whole\nhalf")
        recorder.wait_for("on_read")
        one.socket.shutdown(socket.SHUT_WR)
        recorder.wait_for("on_close")
        if transport.tls:
            assert recorder.names() == ["on_read", "on_ssl_error", "on_close"]
            assert isinstance(recorder[1][1], ssl.SSLEOFError)
            assert stream.close_reason is CloseReason.TLS_FAILED
        else:
            assert recorder == [("on_read", b"whole"), ("on_end", b"half"), ("on_close",)]
            assert stream.close_reason is CloseReason.PEER_ENDED

    @pytest.mark.parametrize("goodbye", [True, False], ids=["with a goodbye", "without one"])
    def test_peer_that_ends_behind_much_data_is_heard_to_the_last_byte(self, transport, recorder, goodbye):
        gate = Event()
        _stream, one = transport.connect(recorder.of(Stream, on_connect=lambda stream: gate.wait()))
        data = data_of(20 * KIB)
        one.send(data)
        if goodbye:
            transport.end_with(one, b"")
        else:
            one.socket.shutdown(socket.SHUT_WR)
        gate.set()
        recorder.wait_for("on_close")
        assert text_of(recorder) == data
        assert ("on_end" in recorder.names()) is (goodbye or not transport.tls)

    def test_peer_that_resets_during_end_does_not_keep_the_stream(self, stuck, recorder):
        stream, one, _ = stuck()
        stream.end()
        rounds()
        one.reset()
        recorder.wait_for("on_close")
        assert recorder.names() == ["on_close"]
        assert stream.closed


class Together(Base):
    """Two streams of ours at the two ends, and one between two peers."""

    def test_two_streams_play_ping_pong(self, transport, recorder):
        class Ball(Stream):
            read_delimiter = b"\n"

            def on_read(self, line):
                number = int(line) + 1
                if number <= 200:
                    self.write(b"%d\n" % number)
                if number >= 200:
                    recorder(number)

        first, _second = transport.pair(Ball, Ball)
        first.write(b"0\n")
        recorder.wait_for(2)
        assert recorder == [200, 201]

    def test_two_streams_say_much_at_the_same_time_and_hear_all(self, transport, recorder):
        here, there = data_of(4 * MIB, 1), data_of(4 * MIB, 2)
        heard = type("Heard", (Stream,), {"on_read": lambda stream, data: stream.parts.append(data)})
        parts = {"here": [], "there": []}
        first, second = transport.pair(
            type("Here", (heard,), {"parts": parts["here"], "on_end": lambda stream, rest: recorder("here")}),
            type("There", (heard,), {"parts": parts["there"], "on_end": lambda stream, rest: recorder("there")}),
        )
        first.write(here)
        second.write(there)
        first.write_eof()
        second.write_eof()
        recorder.wait_for(2, timeout=10)
        assert b"".join(parts["here"]) == there
        assert b"".join(parts["there"]) == here
        until(lambda: first.closed and second.closed)

    @pytest.mark.parametrize("call", ["close", "end", "write_eof"])
    def test_two_streams_when_one_ends_the_other_ends_too(self, transport, recorder, call):
        kind = recorder.of(Stream, "on_read", "on_end", "on_error")
        first, second = transport.pair(Stream, kind)
        rounds()
        first.write(b"last words")
        getattr(first, call)()
        until(lambda: first.closed and second.closed)
        assert recorder == [("on_read", b"last words"), ("on_end", b"")]
        assert second.close_reason is CloseReason.PEER_ENDED
        assert first.close_reason is {**ENDERS, "write_eof": CloseReason.PEER_ENDED}[call]

    def test_two_streams_when_one_aborts_the_other_sees_that_its_peer_left(self, transport, recorder, caplog):
        first, second = transport.pair(Stream, recorder.of(Stream, "on_error", "on_close"))
        rounds()
        first.abort()
        recorder.wait_for("on_close")
        assert recorder == [("on_close",)]
        assert second.close_reason is transport.left
        assert warnings_of(caplog) == []

    def test_two_streams_that_end_at_the_same_time_both_close(self, transport, caplog):
        first, second = transport.pair(Stream, Stream)
        rounds()
        first.write(b"a")
        second.write(b"b")
        first.end()
        second.end()
        until(lambda: first.closed and second.closed)
        assert first.close_reason is second.close_reason is CloseReason.ENDED_HERE
        assert warnings_of(caplog) == []

    def test_two_streams_that_both_end_with_much_to_send_do_not_lock_each_other(self, transport):
        first, second = transport.pair(Stream, Stream)
        rounds()
        first.write(bytes(8 * MIB))
        second.write(bytes(8 * MIB))
        first.end()
        second.end()
        until(lambda: first.closed and second.closed)
        assert first.close_reason is second.close_reason is CloseReason.ENDED_HERE

    def test_two_streams_when_one_ends_its_output_the_other_still_says_everything(self, transport, recorder):
        data = data_of(4 * MIB)
        parts = []

        def answer(stream, request):
            for start in range(0, len(data), 100_000):
                stream.write(data[start : start + 100_000])
                if start % 300_000 == 0:
                    gevent.sleep(0)
            stream.end()

        def take(stream, data):
            parts.append(data)

        asking = recorder.of(Stream, "on_close", on_read=take)
        first, second = transport.pair(asking, type("Answering", (Stream,), {"on_read": answer, "allow_half_open": True}))
        first.write(b"everything, please")
        first.write_eof()
        recorder.wait_for("on_close", timeout=10)
        assert b"".join(parts) == data
        until(lambda: second.closed)

    def test_two_streams_that_read_straight_take_turns(self, transport, recorder):
        def ask(stream):
            for number in range(20):
                stream.write_packed(number, format="!I")
                recorder(stream.read(Struct("!I"), timeout=5)[0])
            stream.end()

        def answer(stream):
            while True:
                stream.write_packed(stream.read(Struct("!I"))[0] * 2, format="!I")

        first, second = transport.pair(type("Asking", (Stream,), {"on_connect": ask}), type("Answering", (Stream,), {"on_connect": answer}))
        until(lambda: first.closed and second.closed)
        assert recorder == [2 * number for number in range(20)]

    def test_proxy_passes_much_data_in_bounded_memory_and_the_end_behind_it(self, transport, recorder):
        peak = [0]

        class Passing(Narrow):
            write_limit = 16 * MIB
            other = None

            def on_read(self, data):
                self.other.write(data)
                peak[0] = max(peak[0], unsent(self.other))
                self.other.drain()

            def on_close(self):
                recorder("closed")
                self.other.end()

        near, one = transport.connect(Passing, narrow=True)
        far, two = transport.connect(Passing, narrow=True)
        near.other, far.other = far, near
        data = data_of(8 * MIB)

        def send():
            one.send(data)
            one.shutdown_output()

        writer = gevent.spawn(send)
        until(lambda: unsent(far) > HIGH)
        rounds()
        assert not writer.ready()  # the slow one has held up the quick one
        assert two.recv_exactly(len(data)) == data
        writer.get(timeout=5)
        assert two.at_eof()
        assert peak[0] <= HIGH + 300 * KIB
        two.shutdown_output()
        recorder.wait_for(2)

    def test_proxy_passes_both_directions_at_once(self, transport):
        class Passing(Stream):
            other = None

            def on_read(self, data):
                self.other.write(data)
                self.other.drain()

        near, one = transport.connect(Passing)
        far, two = transport.connect(Passing)
        near.other, far.other = far, near
        there, back = data_of(2 * MIB, 1), data_of(2 * MIB, 2)
        asking = gevent.spawn(exchange, one, there, len(back))
        answering = gevent.spawn(exchange, two, back, len(there))
        assert asking.get(timeout=10) == back
        assert answering.get(timeout=10) == there


class StreamContract(Opening, Writing, Cutting, StraightReading, Ending, Flow, Trouble, Together):
    """All of them."""
