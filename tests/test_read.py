"""Straight-line reads: `Stream.read` in every callback, with every delimiter, whatever happens meanwhile."""

import gc
import logging
import re
import time
import weakref
from struct import Struct

import gevent
import pytest
from gevent import monkey
from gevent.event import Event
from gevent.lock import Semaphore
from greenlet import GreenletExit, getcurrent
from test_counted import Ledger
from waiting import nothing_is_kept, turns, unread, unsent, until  # noqa: F401

from pants_green import (
    ChannelClosed,
    ChannelStateError,
    Client,
    CloseReason,
    Connection,
    Engine,
    InvalidReadDelimiterError,
    ReadTimeout,
    Stream,
    StreamBufferOverflow,
)
from pants_green.framing import Framer, LengthPrefix, Netstring
from pants_green.testing import fragmentations, memory_pair

KIB = 1024
MIB = 1024 * KIB

really_sleep = monkey.get_original("time", "sleep")


class TwoDigits(Framer):
    """Two ASCII digits, as a number."""

    def find(self, data, start, searched):
        if len(data) < start + 2:
            return 2
        return int(bytes(data[start : start + 2])), start + 2


#: A delimiter, bytes that are one chunk by it, and that chunk. None is not among them: its chunks depend on how the bytes come.
KINDS = [
    pytest.param(b"\r\n", b"b\r\n", b"b", id="bytes"),
    pytest.param(";", b"s;", b"s", id="str"),
    pytest.param(3, b"i\n;", b"i\n;", id="int"),
    pytest.param(re.compile(rb"[|!]"), b"re!", b"re", id="regex"),
    pytest.param(re.compile(rb"(?<!x)%"), b"x%r%", b"x%r", id="regex that looks around"),
    pytest.param(Struct("!HB"), b"\1\2\3", (258, 3), id="Struct"),
    pytest.param(LengthPrefix("!H"), b"\0\2lp", b"lp", id="LengthPrefix"),
    pytest.param(Netstring(), b"3:net,", b"net", id="Netstring"),
    pytest.param(TwoDigits(), b"42", 42, id="Framer"),
]


@pytest.fixture
def ledger():
    """Return an empty Ledger."""
    counted = Ledger()
    yield counted
    counted.clear()


@pytest.fixture(autouse=True)
def debug_logged(caplog):
    """Log everything that the library has to say."""
    caplog.set_level(logging.DEBUG, "pants_green")


def trouble(caplog):
    """Return what the library has logged that somebody should look at."""
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING and one.name.startswith("pants_green")]


def chunks_of(recorder, name="on_read"):
    """Return what on_read, or whatever else was recorded under that name, got."""
    return [event[1] if len(event) == 2 else event[1:] for event in recorder if event[0] == name]


def as_event(chunk):
    """Return what a Recorder notes of on_read for this chunk."""
    return ("on_read", *chunk) if isinstance(chunk, tuple) else ("on_read", chunk)


def only(server):
    """Return the stream of a server once it has one."""
    until(lambda: len(server.channels) == 1)
    return server.channels.values()[0]


def in_own_wait(stream):
    """Tell whether the stream waits in a wait of the library's: here always that of a read() or of the read loop."""
    return stream._waiting


# ---- Where


def test_read_in_on_connect_waits_for_what_comes_and_on_read_gets_the_rest(server_of, peer, recorder):
    def on_connect(stream):
        stream.write(b"name: ")
        recorder("read", stream.read(b"\r\n"))

    one = peer(server_of(recorder.of(Stream, on_connect=on_connect)))
    assert one.recv_exactly(6) == b"name: "
    one.send(b"Ann\r\nand ")
    recorder.wait_for(("on_read", b"and "))
    one.send(b"more")
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("read", b"Ann"), ("on_read", b"and "), ("on_read", b"more"), ("on_end", b""), ("on_close",)]


def test_read_in_on_connect_of_a_client(listening_peer, recorder):
    def on_connect(stream):
        recorder("read", stream.read(b"\n"), stream.read(2))

    listening = listening_peer()
    Client.connect(recorder.of(Client, on_connect=on_connect)(), listening.address)
    one = listening.accept()
    one.send(b"220 ready\nabrest")
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert recorder[1:] == [("read", b"220 ready", b"ab"), ("on_read", b"rest"), ("on_end", b""), ("on_close",)]


@pytest.mark.parametrize(("delimiter", "data", "chunk"), KINDS)
@pytest.mark.parametrize(("current", "current_data", "current_chunk"), KINDS)
def test_read_in_mid_batch_takes_turns_with_on_read(recorder, current, current_data, current_chunk, delimiter, data, chunk):
    def on_read(stream, *_):
        stream.count = getattr(stream, "count", 0) + 1
        if stream.count in (2, 3):
            recorder("read", stream.read(delimiter))

    whole = current_data * 2 + data + current_data + data + current_data * 2 + current_data[:-1]
    got, read = as_event(current_chunk), ("read", chunk)
    wanted = [("on_connect",), got, got, read, got, read, got, got, ("on_end", current_data[:-1]), ("on_close",)]
    for pieces in fragmentations(whole):
        recorder.clear()
        _stream, end = memory_pair(recorder.of(Stream, on_read=on_read, read_delimiter=current))
        for piece in pieces:
            end.send(piece)
        end.shutdown_output()
        recorder.wait_for("on_close")
        assert recorder == wanted, pieces


@pytest.mark.parametrize(("delimiter", "data", "chunk"), KINDS)
@pytest.mark.parametrize("one_by_one", [False, True], ids=["together", "byte by byte"])
def test_read_over_a_socket_with_every_other_delimiter(server_of, peer, recorder, delimiter, data, chunk, one_by_one):
    def on_read(stream, line):
        if line == b"?":
            recorder("read", stream.read(delimiter))

    one = peer(server_of(recorder.of(Stream, on_read=on_read, read_delimiter=b"\0\n")))
    sent = b"one\0\n?\0\n" + data + b"two\0\n?\0\n" + data + b"?\0\n" + data + b"rest"
    if one_by_one:
        for number in range(len(sent)):
            one.send(sent[number : number + 1])
    else:
        one.send(sent)
    one.shutdown_output()
    recorder.wait_for("on_close")
    asked, read = ("on_read", b"?"), ("read", chunk)
    wanted = [("on_read", b"one"), asked, read, ("on_read", b"two"), asked, read, asked, read, ("on_end", b"rest"), ("on_close",)]
    assert recorder[1:] == wanted


def test_read_none_takes_everything_that_has_come(server_of, peer, recorder):
    def on_read(stream, line):
        recorder("read", stream.read(None))

    one = peer(server_of(recorder.of(Stream, on_read=on_read, read_delimiter=b"\n")))
    one.send(b"line\nall\nthat has come\n")
    recorder.wait_for("read")
    one.send(b"next\n")
    recorder.wait_for(("on_read", b"next"))
    one.send(b"waited for")
    one.shutdown_output()
    recorder.wait_for("on_close")
    read = ("read", b"all\nthat has come\n")
    assert recorder[1:] == [("on_read", b"line"), read, ("on_read", b"next"), ("read", b"waited for"), ("on_end", b""), ("on_close",)]


@pytest.mark.parametrize("delimiter", [None, "given as None"])
def test_read_none_where_the_delimiter_is_none_gets_the_next_arrival(server_of, peer, recorder, delimiter):
    def on_read(stream, data):
        recorder("read", stream.read() if delimiter is None else stream.read(None))

    one = peer(server_of(recorder.of(Stream, on_read=on_read)))
    for data in (b"1\n", b"2\n", b"3\n", b"4\n"):
        seen = len(recorder)
        one.send(data)
        recorder.wait_for(max(seen, 1) + 1)
    assert recorder == [("on_connect",), ("on_read", b"1\n"), ("read", b"2\n"), ("on_read", b"3\n"), ("read", b"4\n")]


def test_read_where_the_delimiter_is_none_leaves_the_rest_to_on_read_at_once(server_of, peer, recorder):
    def on_read(stream, data):
        if data == b"?":
            recorder("read", stream.read(b"\n"))

    one = peer(server_of(recorder.of(Stream, on_read=on_read)))
    one.send(b"?")
    recorder.wait_for("on_read")
    one.send(b"line\nrest")
    recorder.wait_for(("on_read", b"rest"))
    one.send(b"more")
    recorder.wait_for(("on_read", b"more"))
    assert recorder[1:] == [("on_read", b"?"), ("read", b"line"), ("on_read", b"rest"), ("on_read", b"more")]


def test_read_of_a_match_object_where_patterns_are_matched(recorder):
    def on_read(stream, match):
        recorder("read", stream.read(re.compile(rb"(\d+);"))[1])
        recorder("read", stream.read(b"\n"))

    for pieces in fragmentations(b"get 17;line\nget 4;l\n"):
        recorder.clear()
        kind = recorder.of(Stream, on_read=on_read, read_delimiter=re.compile(rb"(\w+) "), regex_search=False)
        _stream, end = memory_pair(kind)
        for piece in pieces:
            end.send(piece)
        end.shutdown_output()
        recorder.wait_for("on_close")
        assert [event[1] for event in recorder if event[0] == "read"] == [b"17", b"line", b"4", b"l"], pieces
        assert [event[1][1] for event in recorder if event[0] == "on_read"] == [b"get", b"get"]


def test_read_by_a_netstruct_is_a_tuple(recorder):
    netstruct = pytest.importorskip("netstruct")

    def on_read(stream, line):
        recorder("read", stream.read(netstruct.NetStruct(b"!BH$")))

    for pieces in fragmentations(b"a\n\7\0\2xyb\n\x08\0\0c"):
        recorder.clear()
        _stream, end = memory_pair(recorder.of(Stream, on_read=on_read, read_delimiter=b"\n"))
        for piece in pieces:
            end.send(piece)
        end.shutdown_output()
        recorder.wait_for("on_close")
        assert chunks_of(recorder, "read") == [(7, b"xy"), (8, b"")], pieces
        assert ("on_end", b"c") in recorder


def test_read_without_delimiter_takes_the_next_chunks_of_the_batch(server_of, peer, recorder):
    def on_read(stream, line):
        recorder("read", stream.read(), stream.read())

    one = peer(server_of(recorder.of(Stream, on_read=on_read, read_delimiter=b"\n")))
    one.send(b"1\n2\n3\n4\n5\n6")
    recorder.wait_for(("on_read", b"4"))
    one.send(b"\n7\n")
    recorder.wait_for(("on_read", b"7"))
    assert recorder[1:] == [("on_read", b"1"), ("read", b"2", b"3"), ("on_read", b"4"), ("read", b"5", b"6"), ("on_read", b"7")]


def test_read_without_delimiter_of_a_struct_is_a_tuple_while_on_read_gets_arguments(server_of, peer, recorder):
    def on_read(stream, kind, size):
        recorder("read", stream.read())

    one = peer(server_of(recorder.of(Stream, on_read=on_read, read_delimiter=Struct("!BB"))))
    one.send(bytes(range(1, 9)))
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert recorder[1:-2] == [("on_read", 1, 2), ("read", (3, 4)), ("on_read", 5, 6), ("read", (7, 8))]


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_s3_23_packet_protocol_by_changing_the_delimiter_and_reading(server_of, peer, recorder, when):
    def on_read(stream, data):
        if data != b"?":
            return
        if when == "before":
            stream.read_delimiter = 2
        size = stream.read(Struct("!H"))[0]
        if when == "between":
            stream.read_delimiter = 2
        recorder("read", stream.read(size))
        if when == "after":
            stream.read_delimiter = 2

    one = peer(server_of(recorder.of(Stream, on_read=on_read, read_delimiter=b"\n")))
    one.send(b"line\n?\n\0\4\n\n?\nabcde")
    one.shutdown_output()
    recorder.wait_for("on_close")
    wanted = [("on_read", b"line"), ("on_read", b"?"), ("read", b"\n\n?\n"), ("on_read", b"ab"), ("on_read", b"cd")]
    assert recorder[1:] == [*wanted, ("on_end", b"e"), ("on_close",)]


def test_read_without_delimiter_uses_the_one_that_was_set_just_before(server_of, peer, recorder):
    def on_read(stream, line):
        stream.read_delimiter = 3
        recorder("read", stream.read())
        stream.read_delimiter = ";"
        recorder("read", stream.read())

    one = peer(server_of(recorder.of(Stream, on_read=on_read, read_delimiter=b"\n")))
    one.send(b"line\nabcde;f\n;")
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert recorder[1:] == [("on_read", b"line"), ("read", b"abc"), ("read", b"de"), ("on_read", b"f\n"), ("on_end", b""), ("on_close",)]


def test_read_in_on_write(server_of, peer, recorder):
    def on_connect(stream):
        stream.write(b"?")

    def on_write(stream):
        recorder("read", stream.read(3))

    one = peer(server_of(recorder.of(Stream, on_connect=on_connect, on_write=on_write, read_delimiter=b"\n")))
    assert one.recv_exactly(1) == b"?"
    one.send(b"abcline\nline")
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert recorder[1:] == [("read", b"abc"), ("on_read", b"line"), ("on_end", b"line"), ("on_close",)]


@pytest.mark.parametrize("delimiter", [b"\n", 2, Struct("!BB"), re.compile(rb"\n")], ids=["bytes", "int", "Struct", "regex"])
def test_read_in_a_callback_that_was_posted_in_mid_batch(recorder, delimiter):
    def on_read(stream, *_):
        if not hasattr(stream, "asked"):
            stream.asked = True
            stream.write(b"?", flush=True)

    def on_write(stream):
        recorder("read", stream.read(b"!"))

    for pieces in fragmentations(b"1\n2!3\n4\n5"):
        recorder.clear()
        _stream, end = memory_pair(recorder.of(Stream, on_read=on_read, on_write=on_write, read_delimiter=delimiter))
        for piece in pieces:
            end.send(piece)
        end.shutdown_output()
        recorder.wait_for("on_close")
        fields = [(49, 10), (51, 10), (52, 10)] if isinstance(delimiter, Struct) else None
        texts = [b"1\n", b"3\n", b"4\n"] if delimiter == 2 else [b"1", b"3", b"4"]
        first, *others = [as_event(chunk) for chunk in fields or texts]
        assert recorder[1:] == [first, ("read", b"2"), *others, ("on_end", b"5"), ("on_close",)], pieces


def test_read_in_on_error_and_the_batch_goes_on(server_of, peer, recorder, caplog):
    def on_read(stream, line):
        if line == b"bad":
            raise ValueError(line)

    def on_error(stream, exception):
        stream.write(b"really?\n")
        recorder("read", stream.read(b"!"))

    one = peer(server_of(recorder.of(Stream, on_read=on_read, on_error=on_error, read_delimiter=b"\n")))
    one.send(b"good\nbad\n")
    assert one.recv_until(b"\n") == b"really?\n"
    one.send(b"yes!good\nbad\nno!good\n")
    recorder.wait_for(lambda events: chunks_of(events).count(b"good") == 3)
    assert chunks_of(recorder) == [b"good", b"bad", b"good", b"bad", b"good"]
    assert chunks_of(recorder, "read") == [b"yes", b"no"]
    assert trouble(caplog) == []


def test_read_in_on_overflow_error_makes_room_and_the_stream_goes_on(server_of, peer, recorder, caplog):
    def on_overflow_error(stream, exception):
        recorder("read", stream.read(40))

    one = peer(server_of(recorder.of(Stream, on_overflow_error=on_overflow_error, read_delimiter=b"\n", buffer_size=20)))
    one.send(b"x" * 30)
    recorder.wait_for("on_overflow_error")
    one.send(b"x" * 10 + b"line\n")
    recorder.wait_for(("on_read", b"line"))
    assert chunks_of(recorder, "read") == [b"x" * 40]
    assert trouble(caplog) == []


def test_read_in_on_timeout_takes_the_unfinished_chunk(server_of, peer, recorder):
    def on_timeout(stream, which):
        recorder("read", which, stream.read(None))

    one = peer(server_of(recorder.of(Stream, on_timeout=on_timeout, read_delimiter=b"\n", read_timeout=0.05)))
    one.send(b"unfinished")
    recorder.wait_for("read")
    one.send(b"line\n")
    recorder.wait_for(("on_read", b"line"))
    assert chunks_of(recorder, "read") == [("read", b"unfinished")]


@pytest.mark.parametrize("kind", ["server", "client", "memory"])
def test_read_dialogue_of_two_streams(server_of, recorder, kind):
    class Asker(Connection):
        def on_connect(self):
            self.write(b"name? ")
            name = self.read(b"\n")
            self.write(b"age? ")
            recorder("told", name, int(self.read("\n")))
            self.end()

    class Teller(Client):
        def on_connect(self):
            assert self.read(b" ") == b"name?"
            self.write("Bob\n")
            assert self.read(5) == b"age? "
            self.write(b"42\n")

        def on_close(self):
            recorder("closed")

    class DialledAsker(Asker, Client):
        pass

    class AcceptedTeller(Teller, Connection):
        pass

    if kind == "memory":
        streams = memory_pair(Asker, Teller)
    elif kind == "server":
        streams = Teller().connect(server_of(Asker).local_address)
    else:
        streams = DialledAsker().connect(server_of(AcceptedTeller).local_address)
    recorder.wait_for("closed")
    assert recorder[0] == ("told", b"Bob", 42)
    del streams


def test_login_dialogue_of_fifty_clients_at_once(server_of, recorder):
    here = Event()

    class Login(Connection):
        read_delimiter = b"\r\n"

        def on_connect(self):
            self.write("login: ")
            self.user = self.read()
            self.write("password: ")
            password = self.read(timeout=5)
            if password != self.user[::-1]:
                self.write("no\r\n")
                self.end()
            else:
                self.write("welcome\r\n")

        def on_read(self, line):
            self.write(self.user + b" said " + line + b"\r\n")

    class User(Client):
        def __init__(self, number):
            super().__init__()
            self.number = number

        def on_connect(self):
            assert self.read(b" ") == b"login:"
            name = f"user{self.number}"
            self.write(name[:2])
            recorder("connected")
            here.wait()  # everybody is in the middle of the name
            self.write(name[2:] + "\r\n")
            assert self.read(b" ") == b"password:"
            right = self.number % 5
            self.write((name[::-1] if right else name) + "\r\nhello\r\n")
            assert self.read(b"\r\n") == (b"welcome" if right else b"no")
            recorder("answer", self.number, self.read("\r\n") if right else b"")
            self.end()

        def on_close(self):
            recorder("closed")

    server = server_of(Login)
    for number in range(50):
        User(number).connect(server.local_address)
    recorder.wait_for(lambda events: events.count("connected") == 50)
    here.set()
    recorder.wait_for(lambda events: events.count("closed") == 50)
    assert dict(chunks_of([one for one in recorder if one[0] == "answer"], "answer")) == {
        number: b"user%d said hello" % number if number % 5 else b"" for number in range(50)
    }
    until(lambda: not server.channels)


# ---- The peer's end


def test_read_returns_what_is_buffered_after_the_end_of_the_peer(recorder, caplog):
    def on_connect(stream):
        while True:
            recorder("read", stream.read(b"\n"))

    for pieces in fragmentations(b"one\ntwo\nrest"):
        recorder.clear()
        _stream, end = memory_pair(recorder.of(Stream, on_connect=on_connect, read_delimiter=b"\r"))
        for piece in pieces:
            end.send(piece)
        end.shutdown_output()
        recorder.wait_for("on_close")
        assert recorder == [("on_connect",), ("read", b"one"), ("read", b"two"), ("on_end", b"rest"), ("on_close",)], pieces
    assert trouble(caplog) == []


def test_read_after_the_end_of_the_peer_is_debug_only_and_the_stream_ends(server_of, peer, recorder, caplog):
    def on_connect(stream):
        recorder("stream", stream)
        recorder("read", stream.read(b"\n"))
        stream.read(b"\n")
        recorder("not reached")

    kind = recorder.of(Stream, "on_end", "on_close", "on_error", "on_read", on_connect=on_connect)
    one = peer(server_of(kind, read_delimiter=b"\0"))
    one.send(b"line\nrest")
    one.shutdown_output()
    recorder.wait_for("on_close")
    stream = recorder.pop(0)[1]
    assert recorder == [("read", b"line"), ("on_end", b"rest"), ("on_close",)]
    assert stream.close_reason is CloseReason.PEER_ENDED
    assert trouble(caplog) == []
    assert any("on_connect" in record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG)


def test_read_that_the_end_of_the_peer_cuts_short_leaves_all_it_did_not_take_to_on_end(server_of, peer, recorder, caplog):
    def on_read(stream, line):
        if line == b"?":
            recorder("read", stream.read(b"!"))

    one = peer(server_of(recorder.of(Stream, on_read=on_read, read_delimiter=b"\n")))
    one.send(b"?\nyes!?\none\ntwo\nrest")
    one.shutdown_output()
    recorder.wait_for("on_close")
    asked = ("on_read", b"?")
    # In the middle of what it wanted to read: what came is no chunk, whatever the read_delimiter would make of it.
    assert recorder[1:] == [asked, ("read", b"yes"), asked, ("on_end", b"one\ntwo\nrest"), ("on_close",)]
    assert trouble(caplog) == []


def test_read_without_on_end_ends_quietly(server_of, peer, recorder, caplog):
    class Plain(Connection):
        def on_read(self, data):
            self.read(b"\n")

        def on_close(self):
            recorder("closed", self.close_reason)

    one = peer(server_of(Plain))
    one.send(b"x")
    one.shutdown_output()
    recorder.wait_for(("closed", CloseReason.PEER_ENDED))
    assert one.at_eof()
    assert trouble(caplog) == []


@pytest.mark.parametrize("size", [5, 4 * MIB])
def test_read_that_catches_the_end_of_the_peer_may_answer(server_of, peer, recorder, caplog, size):
    def on_connect(stream):
        lines = []
        try:
            while True:
                lines.append(stream.read(b"\n"))
        except ChannelClosed as error:
            recorder("end", error.channel is stream, stream.connected)
        stream.write(b"%d lines\n" % len(lines) + bytes(size))

    one = peer(server_of(recorder.of(Stream, on_connect=on_connect)))
    one.send(b"a\nb\nc\nrest")
    one.shutdown_output()
    assert one.recv_until(b"\n") == b"3 lines\n"
    assert one.recv_all() == bytes(size)
    recorder.wait_for("on_close")
    # None as delimiter: what no line was is a chunk for on_read.
    assert recorder[1:] == [("end", True, True), ("on_read", b"rest"), ("on_end", b""), ("on_close",)]
    assert trouble(caplog) == []


def test_read_after_the_end_of_the_peer_still_gets_what_another_delimiter_completes(server_of, peer, recorder):
    def on_connect(stream):
        for _ in range(3):
            with pytest.raises(ChannelClosed, match="peer"):
                stream.read(b"\n")
        recorder("read", stream.read(2), stream.read(None))
        with pytest.raises(ChannelClosed):
            stream.read(None)

    one = peer(server_of(recorder.of(Stream, on_connect=on_connect)))
    one.send(b"abcde")
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert recorder[1:] == [("read", b"ab", b"cde"), ("on_end", b""), ("on_close",)]


def test_read_after_the_end_of_the_peer_with_half_open_leaves_the_closing_to_the_user(server_of, peer, recorder, caplog):
    def on_connect(stream):
        stream.read(b"\n")

    def on_end(stream, rest):
        gevent.spawn(stream.write, b"later")

    server = server_of(recorder.of(Stream, on_connect=on_connect, on_end=on_end, read_delimiter=b"\0", allow_half_open=True))
    one = peer(server)
    one.send(b"rest")
    one.shutdown_output()
    recorder.wait_for(("on_end", b"rest"))
    assert one.recv_exactly(5) == b"later"
    only(server).end()
    recorder.wait_for("on_close")
    assert trouble(caplog) == []


# ---- What others do meanwhile


@pytest.mark.parametrize("caught", [False, True], ids=["uncaught", "caught"])
@pytest.mark.parametrize(
    ("call", "reason"),
    [("close", CloseReason.CLOSED_HERE), ("end", CloseReason.ENDED_HERE), ("abort", CloseReason.ABORTED_HERE)],
)
def test_read_is_left_when_another_greenlet_closes(server_of, peer, recorder, caplog, call, reason, caught):
    def on_connect(stream):
        stream.write(b"hello")
        try:
            recorder("read", stream.read(b"\n"))
        except ChannelClosed as error:
            recorder("left", error.channel is stream)
            if not caught:
                raise

    server = server_of(recorder.of(Stream, on_connect=on_connect))
    one = peer(server)
    stream = only(server)
    assert one.recv_exactly(5) == b"hello"
    one.send(b"unfinished")
    until(lambda: unread(stream) == 10)
    getattr(stream, call)()
    assert recorder == [("on_connect",)]  # nothing is called inside
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("left", True), ("on_close",)]
    assert stream.close_reason is reason
    assert one.raises_reset() if call == "abort" else True
    assert trouble(caplog) == []


@pytest.mark.parametrize("call", ["close", "end", "abort"])
def test_read_after_the_callback_closed_itself_is_channel_closed(server_of, peer, recorder, caplog, call):
    def on_read(stream, line):
        getattr(stream, call)()
        stream.read(b"\n")

    one = peer(server_of(recorder.of(Stream, on_read=on_read, read_delimiter=b"\n")))
    one.send(b"1\n2\n3\n")
    recorder.wait_for("on_close")
    assert recorder[1:] == [("on_read", b"1"), ("on_close",)]
    assert trouble(caplog) == []


def test_read_goes_on_when_another_greenlet_ends_the_output(server_of, peer, recorder):
    def on_connect(stream):
        recorder("read", stream.read(b"\n"), stream.read(b"\n"))

    server = server_of(recorder.of(Stream, on_connect=on_connect))
    one = peer(server)
    until(lambda: in_own_wait(only(server)))
    only(server).write(b"last words")
    only(server).write_eof()
    assert one.recv_all() == b"last words"
    one.send(b"a\nb\n")
    recorder.wait_for(("read", b"a", b"b"))
    one.shutdown_output()
    recorder.wait_for("on_close")


def test_read_goes_on_whoever_pauses_and_on_read_waits_for_resume(server_of, peer, recorder):
    def on_connect(stream):
        recorder("read", stream.read(b"\n"), stream.read(b"\n"))

    server = server_of(recorder.of(Stream, on_connect=on_connect, read_delimiter=b"\n"))
    one = peer(server)
    stream = only(server)
    until(lambda: in_own_wait(stream))
    stream.pause()
    turns()
    one.send(b"a\nb\nc\nd")
    recorder.wait_for(("read", b"a", b"b"))
    turns()
    assert recorder[-1] == ("read", b"a", b"b")
    stream.resume()
    recorder.wait_for(("on_read", b"c"))
    one.send(b"\n")
    recorder.wait_for(("on_read", b"d"))


def test_read_is_not_disturbed_by_pause_and_resume_again_and_again(server_of, peer, recorder):
    def on_connect(stream):
        recorder("read", stream.read(6))

    server = server_of(recorder.of(Stream, on_connect=on_connect))
    one = peer(server)
    stream = only(server)
    for number in range(6):
        stream.pause()
        turns(2)
        stream.resume()
        turns(2)
        one.send(b"%d" % number)
        if number < 5:
            until(lambda number=number: unread(stream) == number + 1)
    recorder.wait_for(("read", b"012345"))


@pytest.mark.parametrize("partial", [b"", b"ab"], ids=["nothing waits", "something waits"])
def test_read_keeps_its_delimiter_when_another_greenlet_changes_that_of_the_stream(server_of, peer, recorder, partial):
    def on_connect(stream):
        recorder("read", stream.read(b";"))

    server = server_of(recorder.of(Stream, on_connect=on_connect, read_delimiter=b"\n"))
    one = peer(server)
    stream = only(server)
    one.send(partial)
    until(lambda: in_own_wait(stream) and unread(stream) == len(partial))
    stream.read_delimiter = 1
    turns()
    assert recorder == [("on_connect",)]
    one.send(b"cd;ef")
    recorder.wait_for(("on_read", b"f"))
    assert recorder[1:] == [("read", partial + b"cd"), ("on_read", b"e"), ("on_read", b"f")]


def test_read_lets_others_write_and_what_they_write_arrives(server_of, peer, recorder):
    def on_connect(stream):
        recorder("read", stream.read(b"\n"))

    server = server_of(recorder.of(Stream, on_connect=on_connect))
    one = peer(server)
    stream = only(server)
    until(lambda: in_own_wait(stream))
    for number in range(20):
        stream.write(b"%02d" % number)
        assert one.recv_exactly(2) == b"%02d" % number
    one.send(b"done\n")
    recorder.wait_for(("read", b"done"))


@pytest.mark.parametrize("overridden", [False, True], ids=["nobody listens", "on_read_error"])
def test_read_is_left_when_the_peer_resets(server_of, peer, recorder, caplog, overridden):
    def on_connect(stream):
        recorder("stream", stream)
        try:
            stream.read(b"\n")
        except ChannelClosed as error:
            recorder("cause", type(error.__cause__))
            raise

    more = {"on_read_error": lambda stream, exception: recorder("on_read_error", type(exception))} if overridden else {}
    server = server_of(recorder.of(Stream, "on_end", "on_close", "on_error", on_connect=on_connect, **more))
    one = peer(server)
    one.send(b"unfinished")
    until(lambda: unread(only(server)) == 10)
    one.reset()
    recorder.wait_for("on_close")
    stream = recorder.pop(0)[1]
    told = [("on_read_error", ConnectionResetError)] if overridden else []
    assert recorder == [("cause", ConnectionResetError), *told, ("on_close",)]
    assert stream.close_reason is CloseReason.PEER_LEFT
    assert trouble(caplog) == []


def test_read_lets_no_other_callback_of_the_stream_run(server_of, peer, recorder):
    def on_connect(stream):
        stream.write(b"?")
        recorder("read", stream.read(b"\n"))
        stream.write(b"?")
        recorder("read", stream.read(b"\n"))
        recorder("done")

    def on_write(stream):
        recorder("on_write")

    one = peer(server_of(recorder.of(Stream, on_connect=on_connect, on_write=on_write)))
    assert one.recv_exactly(1) == b"?"
    turns()
    one.send(b"1\n")
    assert one.recv_exactly(1) == b"?"
    one.send(b"2\nrest")
    recorder.wait_for(("on_read", b"rest"))
    assert recorder[:4] == [("on_connect",), ("read", b"1"), ("read", b"2"), "done"]
    assert set(recorder[4:-1]) == {"on_write"}


def test_read_does_not_count_for_read_timeout(server_of, peer, recorder):
    def on_write(stream):
        recorder("read", stream.read(b"!"))

    def on_timeout(stream, which):
        recorder("on_timeout")

    server = server_of(recorder.of(Stream, on_write=on_write, on_timeout=on_timeout, read_delimiter=b"\n", read_timeout=0.1))
    one = peer(server)
    one.send(b"unfinished")
    stream = only(server)
    until(lambda: unread(stream) == 10)
    stream.write(b"?")
    assert one.recv_exactly(1) == b"?"
    gevent.sleep(0.25)
    one.send(b"!line\n")
    recorder.wait_for(("on_read", b"line"))
    assert recorder == [("on_connect",), ("read", b"unfinished"), ("on_read", b"line")]


def test_read_timeout_of_the_stream_counts_again_after_a_read(server_of, peer, recorder):
    def on_read(stream, line):
        recorder("read", stream.read(b"!"))

    def on_timeout(stream, which):
        recorder("on_timeout", which)
        stream.close()

    one = peer(server_of(recorder.of(Stream, on_read=on_read, on_timeout=on_timeout, read_delimiter=b"\n", read_timeout=0.05)))
    one.send(b"line\nread!unfinished")
    recorder.wait_for("on_close")
    assert recorder[1:] == [("on_read", b"line"), ("read", b"read"), ("on_timeout", "read"), ("on_close",)]


def test_read_lets_other_connections_go_on(server_of, peer):
    class Mixed(Connection):
        def on_read(self, data):
            if data == b"wait":
                self.write(self.read(b"\n"))
            else:
                self.write(data)

    server = server_of(Mixed)
    waiting, other = peer(server), peer(server)
    waiting.send(b"wait")
    for _ in range(10):
        other.send(b"echo")
        assert other.recv_exactly(4) == b"echo"
    waiting.send(b"done\n")
    assert waiting.recv_exactly(4) == b"done"


def test_read_in_a_callback_that_also_blocks_elsewhere(server_of, peer, recorder):
    lock = Semaphore()

    def on_read(stream, line):
        with lock:
            first = stream.read(b"\n")
            gevent.sleep(0.001)
            recorder("read", line, first, stream.read(b"\n"))

    server = server_of(recorder.of(Stream, "on_error", on_read=on_read, read_delimiter=b"\n"))
    peers = [peer(server) for _ in range(5)]
    for number, one in enumerate(peers):
        one.send(b"%d\nb\nc\nignored" % number)
    recorder.wait_for(5)
    assert sorted(recorder) == [("read", b"%d" % number, b"b", b"c") for number in range(5)]


# ---- Time


def test_read_timeout_consumes_nothing(server_of, peer, recorder):
    def on_connect(stream):
        try:
            stream.read(b"\n", timeout=0.03)
        except TimeoutError as error:
            recorder("timeout", type(error), unread(stream))
        stream.write(b"go on")
        recorder("read", stream.read(b"\n"))

    server = server_of(recorder.of(Stream, on_connect=on_connect, read_delimiter=b"\n"))
    one = peer(server)
    one.send(b"be")
    assert one.recv_exactly(5) == b"go on"
    one.send(b"gin\nline\n")
    recorder.wait_for(("on_read", b"line"))
    assert recorder[1:] == [("timeout", ReadTimeout, 2), ("read", b"begin"), ("on_read", b"line")]


@pytest.mark.parametrize("current", [None, 2, b"\n"], ids=repr)
def test_read_timeout_leaves_what_came_to_on_read(server_of, peer, recorder, current):
    def on_connect(stream):
        with pytest.raises(ReadTimeout):
            stream.read(b";", 0.05)
        recorder("timeout")

    one = peer(server_of(recorder.of(Stream, on_connect=on_connect, read_delimiter=current)))
    one.send(b"a\nb\nc")
    recorder.wait_for("timeout")
    one.shutdown_output()
    recorder.wait_for("on_close")
    chunks = {None: [b"a\nb\nc"], 2: [b"a\n", b"b\n"], b"\n": [b"a", b"b"]}[current]
    assert chunks_of(recorder) == chunks
    assert ("on_end", b"" if current is None else b"c") in recorder


def test_read_timeout_that_nobody_catches_goes_to_on_error(server_of, peer, recorder, caplog):
    def on_connect(stream):
        stream.read(b"\n", timeout=0.02)

    def on_error(stream, exception):
        recorder("error", type(exception), str(exception))
        stream.write(b"still here")

    one = peer(server_of(recorder.of(Stream, on_connect=on_connect, on_error=on_error)))
    assert one.recv_exactly(10) == b"still here"
    one.send(b"data")
    recorder.wait_for(("on_read", b"data"))
    kind, text = next(event[1:] for event in recorder if event[0] == "error")
    assert kind is ReadTimeout
    assert "0.02 seconds" in text
    assert "127.0.0.1" in text


def test_read_timeout_by_default_is_logged_and_closes(server_of, peer, recorder, caplog):
    def on_connect(stream):
        stream.read(b"\n", timeout=0.02)

    one = peer(server_of(recorder.of(Stream, on_connect=on_connect)))
    recorder.wait_for("on_close")
    assert one.at_eof()
    assert "ReadTimeout" in caplog.text
    assert [record.levelno for record in caplog.records if record.levelno >= logging.WARNING] == [logging.ERROR]


def test_read_with_timeout_0_takes_what_is_there_and_waits_for_nothing(server_of, peer, recorder):
    def on_read(stream, line):
        for _ in range(3):
            try:
                recorder("read", stream.read(b"\n", timeout=0))
            except ReadTimeout:
                recorder("nothing")

    server = server_of(recorder.of(Stream, on_read=on_read, read_delimiter=b"\n"))
    one = peer(server)
    one.send(b"1\n2\npart")
    recorder.wait_for(lambda events: events.count("nothing") == 2)
    assert unread(only(server)) == 4
    one.send(b"ly\n")
    recorder.wait_for(("on_read", b"partly"))
    assert recorder[1:5] == [("on_read", b"1"), ("read", b"2"), "nothing", "nothing"]


def test_read_with_timeout_0_looks_into_the_socket(server_of, peer, recorder):
    gate = Event()

    def on_connect(stream):
        recorder("waits")
        gate.wait()
        recorder("read", stream.read(10_000, timeout=0)[:3])

    one = peer(server_of(recorder.of(Stream, on_connect=on_connect)))
    recorder.wait_for("waits")
    one.send(b"abc" + bytes(9_997))  # more than the first receive
    gate.set()
    recorder.wait_for(("read", b"abc"))


def test_read_with_timeout_0_does_not_let_anybody_else_run(recorder):
    def on_connect(stream):
        gevent.spawn(recorder, "other")
        for _ in range(10):
            with pytest.raises(ReadTimeout):
                stream.read(b"\n", timeout=0)
        recorder("done")

    _stream, end = memory_pair(recorder.of(Stream, on_connect=on_connect))
    recorder.wait_for("other")
    assert recorder[:3] == [("on_connect",), "done", "other"]
    end.close()
    recorder.wait_for("on_close")


def test_read_within_its_timeout_leaves_no_timer_that_strikes_later(server_of, peer, recorder):
    def on_connect(stream):
        for _ in range(3):
            recorder("read", stream.read(b"\n", timeout=0.1))
        gevent.sleep(0.15)
        recorder("read", stream.read(b"\n"))

    one = peer(server_of(recorder.of(Stream, on_connect=on_connect)))
    for number in range(3):
        one.send(b"%d\n" % number)
        recorder.wait_for(("read", b"%d" % number))
    gevent.sleep(0.2)
    one.send(b"3\n")
    recorder.wait_for(("read", b"3"))


@pytest.mark.parametrize("timeout", [1e9, 10**12, 5], ids=repr)
def test_read_timeout_may_be_long(server_of, peer, recorder, timeout):
    def on_connect(stream):
        recorder("read", stream.read(b"\n", timeout=timeout))

    one = peer(server_of(recorder.of(Stream, on_connect=on_connect)))
    one.send(b"x\n")
    recorder.wait_for(("read", b"x"))


def test_read_timeout_is_for_the_whole_chunk_however_often_bytes_come(recorder):
    def on_connect(stream):
        began = time.monotonic()
        with pytest.raises(ReadTimeout):
            stream.read(b"\n", timeout=0.1)
        recorder("timeout", time.monotonic() - began)

    stream, end = memory_pair(recorder.of(Stream, on_connect=on_connect))
    while "timeout" not in recorder.names() and len(recorder) < 1000:
        end.send(b"x")
        gevent.sleep(0.01)
        assert unread(stream) < 100
    assert 0.09 < next(event[1] for event in recorder if event[0] == "timeout") < 1
    end.shutdown_output()
    recorder.wait_for("on_close")


@pytest.mark.parametrize(
    ("timeout", "error"),
    [
        (-1, ValueError),
        (-0.001, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        ("1", TypeError),
        (b"", TypeError),
        (True, TypeError),
        (False, TypeError),
        ([], TypeError),
    ],
    ids=repr,
)
def test_read_with_a_timeout_that_makes_no_sense_is_an_error_and_takes_nothing(server_of, peer, recorder, timeout, error):
    def on_read(stream, line):
        if line == b"1":
            with pytest.raises(error, match="timeout"):
                stream.read(b"\n", timeout=timeout)

    one = peer(server_of(recorder.of(Stream, on_read=on_read, read_delimiter=b"\n")))
    one.send(b"1\n2\n")
    recorder.wait_for(("on_read", b"2"))
    assert "on_error" not in recorder.names()


@pytest.mark.parametrize("timeout", [0, 0.0, 0.001, 1])
def test_read_takes_a_chunk_that_is_there_whatever_the_timeout(server_of, peer, recorder, timeout):
    def on_read(stream, line):
        recorder("read", stream.read(timeout=timeout))

    one = peer(server_of(recorder.of(Stream, on_read=on_read, read_delimiter=b"\n")))
    one.send(b"1\n2\n3\n4\n")
    recorder.wait_for(("read", b"4"))
    assert recorder[1:] == [("on_read", b"1"), ("read", b"2"), ("on_read", b"3"), ("read", b"4")]


def test_gevent_timeout_around_read_loses_nothing(server_of, peer, recorder):
    def on_connect(stream):
        for _ in range(3):
            with gevent.Timeout(0.02, False):
                stream.read(b"\n")
                recorder("not reached")
        stream.write(b"go on")
        recorder("read", stream.read(b"\n"))

    one = peer(server_of(recorder.of(Stream, on_connect=on_connect, read_delimiter=b"\n")))
    one.send(b"be")
    assert one.recv_exactly(5) == b"go on"
    one.send(b"gin\nline\n")
    recorder.wait_for(("on_read", b"line"))
    assert recorder[1:] == [("read", b"begin"), ("on_read", b"line")]


def test_gevent_timeout_in_read_that_nobody_catches_closes(server_of, peer, recorder, caplog):
    def on_connect(stream):
        with gevent.Timeout(0.02):
            stream.read(b"\n")

    def on_error(stream, exception):
        recorder("on_error", type(exception))

    one = peer(server_of(recorder.of(Stream, "on_close", "on_end", on_connect=on_connect, on_error=on_error)))
    recorder.wait_for("on_close")
    assert recorder == [("on_error", gevent.Timeout), ("on_close",)]
    assert one.at_eof()


@pytest.mark.parametrize("exception", [GreenletExit, gevent.Timeout, KeyError], ids=lambda kind: kind.__name__)
def test_exception_thrown_into_read_comes_out_of_it(server_of, peer, recorder, caplog, exception):
    def on_connect(stream):
        recorder("greenlet", getcurrent())
        try:
            stream.read(b"\n", timeout=10)
        except BaseException as error:
            recorder("left", type(error))
            raise

    def on_error(stream, error):
        recorder("on_error", type(error))

    server = server_of(recorder.of(Stream, "on_close", on_connect=on_connect, on_error=on_error))
    one = peer(server)
    one.send(b"unfinished")
    until(lambda: unread(only(server)) == 10)
    gevent.get_hub().loop.run_callback(recorder.pop(0)[1].throw, exception())
    recorder.wait_for("on_error")
    if exception is KeyError:  # an ordinary one: on_error may keep the stream
        only(server).close()
    recorder.wait_for("on_close")
    assert recorder == [("left", exception), ("on_error", exception), ("on_close",)]
    del one


# ---- Overflow


def test_overflow_in_read_is_raised_with_its_sizes_and_consumes_nothing(server_of, peer, recorder, caplog):
    def on_connect(stream):
        try:
            stream.read(b"\n")
        except StreamBufferOverflow as error:
            recorder("overflow", error.limit, error.size, str(error))
        recorder("read", stream.read(30))

    one = peer(server_of(recorder.of(Stream, on_connect=on_connect, buffer_size=20)))
    one.send(b"x" * 30)
    recorder.wait_for("read")
    assert recorder[-1] == ("read", b"x" * 30)
    _, limit, size, text = recorder[1]
    assert (limit, size) == (20, 30)
    assert "127.0.0.1" in text
    assert "buffer_size" in text
    one.send(b"more")
    recorder.wait_for(("on_read", b"more"))
    assert trouble(caplog) == []


def test_overflow_in_read_that_nobody_catches_goes_to_on_overflow_error_and_closes(server_of, peer, recorder, caplog):
    def on_connect(stream):
        recorder("stream", stream)
        stream.read(b"\n")

    def on_overflow_error(stream, exception):
        recorder("on_overflow_error", type(exception), stream.connected)

    kind = recorder.of(Stream, "on_error", "on_end", "on_close", on_connect=on_connect, on_overflow_error=on_overflow_error, buffer_size=20)
    one = peer(server_of(kind))
    one.send(b"x" * 30)
    recorder.wait_for("on_close")
    stream = recorder.pop(0)[1]
    assert recorder == [("on_overflow_error", StreamBufferOverflow, True), ("on_close",)]
    assert stream.close_reason is CloseReason.OVERFLOW


def test_overflow_in_read_by_default_is_one_warning(server_of, peer, recorder, caplog):
    def on_connect(stream):
        stream.read(b"\n")

    one = peer(server_of(recorder.of(Stream, on_connect=on_connect, buffer_size=20)))
    one.send(b"x" * 30)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_overflow_error", "on_close"]
    assert [record.levelname for record in caplog.records if record.levelno >= logging.WARNING] == ["WARNING"]


@pytest.mark.parametrize(
    ("delimiter", "data"),
    [(LengthPrefix("!I"), b"\0\1\0\0"), (LengthPrefix("!H", max_size=10), b"\0\x0b"), (Netstring(max_size=10), b"11:")],
    ids=["beyond buffer_size", "LengthPrefix beyond max_size", "Netstring beyond max_size"],
)
def test_overflow_in_read_by_an_announced_length_is_raised_at_once(server_of, peer, recorder, delimiter, data):
    def on_connect(stream):
        try:
            stream.read(delimiter)
        except StreamBufferOverflow as error:
            recorder("overflow", error.size >= 11)

    one = peer(server_of(recorder.of(Stream, "on_error", on_connect=on_connect, buffer_size=1000)))
    one.send(data)
    recorder.wait_for(("overflow", True), timeout=1)


@pytest.mark.parametrize(
    "delimiter", [100_000, Struct("100000s"), LengthPrefix("!I", max_size=99_996)], ids=["int", "Struct", "LengthPrefix"]
)
def test_read_of_a_delimiter_that_tells_its_size_may_exceed_buffer_size(server_of, peer, recorder, delimiter):
    def on_connect(stream):
        chunk = stream.read(delimiter)
        recorder("read", len(chunk[0] if isinstance(chunk, tuple) else chunk))

    one = peer(server_of(recorder.of(Stream, "on_error", on_connect=on_connect, buffer_size=1000)))
    one.send((99_996).to_bytes(4, "big") + bytes(99_996))
    recorder.wait_for(("read", 99_996 if isinstance(delimiter, LengthPrefix) else 100_000))


def test_read_of_complete_chunks_never_overflows(server_of, peer, recorder):
    def on_connect(stream):
        while len(recorder) < 1001:
            recorder("read", stream.read(b"\n"))

    one = peer(server_of(recorder.of(Stream, on_connect=on_connect, buffer_size=20)))
    one.send(b"twelve bytes\n" * 1000)
    recorder.wait_for(1001)
    assert set(recorder[1:]) == {("read", b"twelve bytes")}


@pytest.mark.parametrize("way", ["on_read", "read"])
def test_overflow_leaves_no_circle_of_references(server_of, peer, recorder, caplog, way):
    caplog.set_level(logging.CRITICAL, "pants_green")  # a log record would keep the stream
    left = []

    class Small(Connection):
        buffer_size = 20
        read_delimiter = b"\n"

        def on_connect(self):
            left.append(weakref.ref(self))
            if way == "read":
                self.read(b"\n")

        def on_close(self):
            recorder("closed")

    server = server_of(Small)
    one = peer(server)
    gc.disable()
    try:
        one.send(b"x" * 30)
        recorder.wait_for("closed")
        until(lambda: left[0]() is None, timeout=1)
    finally:
        gc.enable()


# ---- Mistakes


@pytest.mark.parametrize(
    "delimiter", [0, -1, b"", "", 1.5, [], True, object, re.compile(rb"x*"), re.compile("x"), Struct(""), LengthPrefix], ids=repr
)
def test_read_with_a_wrong_delimiter_is_an_error_and_takes_nothing(server_of, peer, recorder, delimiter):
    def on_read(stream, line):
        if line == b"1":
            with pytest.raises(InvalidReadDelimiterError):
                stream.read(delimiter)

    one = peer(server_of(recorder.of(Stream, on_read=on_read, read_delimiter=b"\n")))
    one.send(b"1\n2\n3")
    recorder.wait_for(("on_read", b"2"))
    one.send(b"\n")
    recorder.wait_for(("on_read", b"3"))
    assert "on_error" not in recorder.names()


def check_refused(recorder, stream, fix="on_connect or on_read"):
    """Call read() where it is not allowed, and record what comes of it."""
    with pytest.raises(ChannelStateError) as refused:
        stream.read(b"\n", timeout=0.1)
    told = str(refused.value)
    # Not a ChannelClosed: that nobody hears of if the callback lets it pass.
    right = refused.type is ChannelStateError and repr(stream) in told and fix in told
    recorder("refused" if right else refused.value)


@pytest.mark.parametrize("where", ["greenlet", "main", "hub", "timer", "another connection"])
def test_read_elsewhere_is_an_error_and_disturbs_nothing(server_of, peer, recorder, where):
    class Target(Connection):
        read_delimiter = b"\n"

        def on_read(self, line):
            recorder("target", line)

    class Other(Connection):
        def on_read(self, data):
            check_refused(recorder, stream)

    target_server = server_of(Target)
    one = peer(target_server)
    stream = only(target_server)
    one.send(b"un")
    until(lambda: unread(stream) == 2)
    if where == "greenlet":
        gevent.spawn(check_refused, recorder, stream).join()
    elif where == "main":
        check_refused(recorder, stream)
    elif where == "hub":
        gevent.get_hub().loop.run_callback(check_refused, recorder, stream)
    elif where == "timer":
        Engine.instance().defer(0, check_refused, recorder, stream)
    else:
        peer(server_of(Other)).send(b"x")
    recorder.wait_for(1)
    assert recorder == ["refused"]
    one.send(b"touched\n")
    recorder.wait_for(("target", b"untouched"))


def test_read_in_a_greenlet_that_the_callback_waits_for_is_an_error(server_of, peer, recorder):
    def on_read(stream, data):
        gevent.spawn(check_refused, recorder, stream).join()

    one = peer(server_of(recorder.of(Stream, on_read=on_read)))
    one.send(b"x")
    recorder.wait_for("refused")


@pytest.mark.parametrize("closed", [False, True])
def test_read_on_a_stream_that_was_never_connected_is_an_error(recorder, closed):
    stream = Stream()
    if closed:
        stream.close()
        turns()
    check_refused(recorder, stream, "")
    assert recorder == ["refused"]


def test_read_while_it_is_connecting_is_an_error(listening_peer, recorder):
    stream = recorder.of(Client, "on_close")().connect(listening_peer().address)
    check_refused(recorder, stream, "")
    assert recorder == ["refused"]
    stream.close()
    recorder.wait_for("on_close")


def test_read_in_the_constructor_is_an_error_that_tells_where_it_would_do(server_of, peer, recorder):
    class Early(Connection):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            check_refused(recorder, self)

    peer(server_of(Early))
    recorder.wait_for(1)
    assert recorder == ["refused"]


@pytest.mark.parametrize("before", [None, "write_eof"])
@pytest.mark.parametrize("half_open", [False, True], ids=["", "half-open"])
def test_read_in_on_end_is_an_error(server_of, peer, recorder, before, half_open):
    class Late(Connection):
        allow_half_open = half_open

        def on_end(self, rest):
            if before is not None:
                getattr(self, before)()
            check_refused(recorder, self, "on_end")
            self.close()

        def on_close(self):
            recorder("closed")

    one = peer(server_of(Late, read_delimiter=b"\0"))
    one.send(b"rest\n")
    one.shutdown_output()
    recorder.wait_for("closed")
    assert recorder == ["refused", "closed"]


def test_read_in_on_end_after_write_eof_is_an_error(server_of, peer, recorder):
    class Late(Connection):
        def on_connect(self):
            self.write_eof()

        def on_end(self, rest):
            check_refused(recorder, self, "on_end")

        def on_close(self):
            recorder("closed")

    one = peer(server_of(Late))
    one.shutdown_output()
    recorder.wait_for("closed")
    assert recorder == ["refused", "closed"]


@pytest.mark.parametrize("before", ["end", "close", "abort"])
def test_read_in_on_end_that_has_closed_is_an_error(server_of, peer, recorder, before):
    class Late(Connection):
        def on_end(self, rest):
            getattr(self, before)()
            with pytest.raises(ChannelStateError, match="127"):
                self.read(b"\n")
            recorder("refused")

    one = peer(server_of(Late))
    one.shutdown_output()
    recorder.wait_for("refused")


@pytest.mark.parametrize("way", ["peer", "close", "reset"])
def test_read_in_on_close_is_an_error(server_of, peer, recorder, way):
    class Late(Connection):
        def on_close(self):
            check_refused(recorder, self, "")

    server = server_of(Late)
    one = peer(server)
    stream = only(server)
    if way == "close":
        stream.close()
    elif way == "peer":
        one.shutdown_output()
    else:
        one.reset()
    recorder.wait_for(1)
    assert recorder == ["refused"]


def test_read_in_a_callback_for_a_closed_stream_is_channel_closed(server_of, peer, recorder, caplog):
    class Late(Connection):
        def on_read_error(self, exception):
            recorder("on_read_error")
            self.read(b"\n")

        def on_close(self):
            recorder("closed")

    server = server_of(Late)
    one = peer(server)
    only(server)
    one.reset()
    recorder.wait_for("closed")
    assert recorder == ["on_read_error", "closed"]
    assert trouble(caplog) == []


def test_exception_of_the_user_after_a_read_is_an_error_like_any_other(server_of, peer, recorder, caplog):
    def on_connect(stream):
        try:
            stream.read(b"\n")
        except ChannelClosed:
            raise RuntimeError("mine") from None

    one = peer(server_of(recorder.of(Stream, on_connect=on_connect)))
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert "on_error" in recorder.names()
    assert "mine" in caplog.text


def test_input_that_a_framer_cannot_cut_ends_read_and_goes_to_on_read_error(server_of, peer, recorder, caplog):
    def on_connect(stream):
        recorder("stream", stream)
        recorder("read", stream.read(Netstring()))
        stream.read(Netstring())

    def on_read_error(stream, exception):
        recorder("on_read_error", type(exception), stream.closed)

    kind = recorder.of(Stream, "on_error", "on_end", "on_close", on_connect=on_connect, on_read_error=on_read_error)
    one = peer(server_of(kind))
    one.send(b"2:ok,nonsense")
    recorder.wait_for("on_close")
    stream = recorder.pop(0)[1]
    assert recorder == [("read", b"ok"), ("on_read_error", ValueError, True), ("on_close",)]
    assert stream.close_reason is CloseReason.BAD_INPUT


# ---- Back-pressure


def test_answers_between_reads_stay_bounded_for_a_peer_that_does_not_read_and_go_on_when_it_does(recorder):
    def on_connect(stream):
        while True:
            stream.write(stream.read(b"\n") * 400)

    stream, end = memory_pair(recorder.of(Stream, "on_error", "on_close", on_connect=on_connect, high_water=64 * KIB, low_water=16 * KIB))
    line = b"%099d\n" % 7
    for _ in range(100):
        end.send(line)
    turns(200)
    # Every receive gives one line here, so that nothing is read above the mark.
    assert 16 * KIB < unsent(stream) <= 64 * KIB + len(line) * 400
    assert not end.all_taken
    assert end.wait_for(100 * 99 * 400) == line[:-1] * 40_000
    assert end.all_taken
    end.close()
    recorder.wait_for("on_close")
    assert recorder == [("on_close",)]


def test_answers_between_reads_stay_bounded_over_a_socket(server_of, peer, recorder):
    most = 0

    def on_connect(stream):
        nonlocal most
        while True:
            stream.write(stream.read(b"\n") * 1000)
            most = max(most, unsent(stream))

    server = server_of(recorder.of(Stream, "on_error", on_connect=on_connect, high_water=64 * KIB, low_water=16 * KIB))
    one = peer(server, rcvbuf=64 * KIB)
    line = b"%09d\n" % 7
    sent = 10_000

    def say():
        one.send(line * sent)
        one.shutdown_output()

    saying = gevent.spawn(say)
    stream = only(server)
    until(lambda: unsent(stream) > 64 * KIB)
    turns(50)
    # One receive, of 4 KiB at first and 64 KiB at most, is answered by a thousand times its size; write_limit stops that.
    assert most <= 17 * MIB
    received = one.recv_all()
    assert len(received) == sent * 9 * 1000
    assert received.count(b"7") == sent * 1000
    saying.join()


def test_read_that_waits_for_room_keeps_to_its_timeout(recorder):
    def on_connect(stream):
        stream.read(b"\n")
        stream.write(bytes(MIB))
        try:
            stream.read(b"\n", timeout=0.05)
        except ReadTimeout:
            recorder("timeout")

    _stream, end = memory_pair(recorder.of(Stream, on_connect=on_connect))
    end.send(b"1\n")
    end.send(b"2\n")
    recorder.wait_for("timeout")
    assert end.wait_for(MIB) == bytes(MIB)
    recorder.wait_for(("on_read", b"2\n"))
    end.close()
    recorder.wait_for("on_close")


def test_read_that_waits_for_room_is_left_when_another_greenlet_closes(recorder):
    def on_connect(stream):
        stream.read(b"\n")
        stream.write(bytes(MIB))
        stream.read(b"\n")

    stream, end = memory_pair(recorder.of(Stream, on_connect=on_connect))
    end.send(b"1\n")
    until(lambda: unsent(stream) > 64 * KIB)
    turns()
    stream.close()
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_close"]
    del end


@pytest.mark.parametrize("way", ["on_read", "read"])
def test_end_while_room_is_waited_for_lets_a_peer_that_still_writes_come_to_its_reading(server_of, peer, recorder, way):
    def on_connect(stream):
        while way == "read":
            stream.write(stream.read(b"\n") * 100_000)

    def on_read(stream, line):
        stream.write(line * 100_000)

    marks = {"high_water": 64 * KIB, "low_water": 16 * KIB, "read_delimiter": b"\n"}
    server = server_of(recorder.of(Stream, "on_close", "on_error", on_connect=on_connect, on_read=on_read, **marks))
    one = peer(server)
    stream = only(server)
    one.send(b"%099d\n" % 7)
    until(lambda: unsent(stream) > 64 * KIB and in_own_wait(stream))
    stream.end()
    one.send(bytes(32 * MIB))  # more than the kernel takes: goes through only if it is read
    assert one.recv_all() == b"%099d" % 7 * 100_000
    one.close()
    recorder.wait_for("on_close")
    assert recorder == [("on_close",)]


def test_output_queued_before_the_first_read_does_not_stop_it(recorder):
    def on_connect(stream):
        stream.write(bytes(MIB))
        recorder("read", stream.read(b"\n"))

    _stream, end = memory_pair(recorder.of(Stream, on_connect=on_connect))
    end.send(b"line\n")
    recorder.wait_for(("read", b"line"))
    end.close()
    recorder.wait_for("on_close")


@pytest.mark.parametrize("alerted", [False, True], ids=["", "which is woken"])
def test_output_queued_by_others_does_not_stop_a_read_that_waits(recorder, alerted):
    def on_connect(stream):
        recorder("read", stream.read(b"\n"))
        recorder("read", stream.read(b"\n"))

    stream, end = memory_pair(recorder.of(Stream, on_connect=on_connect))
    end.send(b"1\n")
    recorder.wait_for(("read", b"1"))
    until(lambda: in_own_wait(stream))
    stream.write(bytes(MIB))
    turns()
    if alerted:
        stream.pause()
        turns()
        stream.resume()
        turns()
    end.send(b"2\n")
    recorder.wait_for(("read", b"2"), timeout=1)
    end.close()
    recorder.wait_for("on_close")


def test_output_queued_by_others_since_the_last_callback_does_not_stop_a_read(recorder):
    def on_read(stream, line):
        recorder("read", stream.read(b"\n"))

    stream, end = memory_pair(recorder.of(Stream, on_read=on_read, read_delimiter=b"\n"))
    end.send(b"head\n")
    recorder.wait_for("on_read")
    end.send(b"1\n")
    recorder.wait_for(("read", b"1"))
    turns()
    stream.write(bytes(MIB))
    turns()
    end.send(b"head\n")
    recorder.wait_for(lambda events: chunks_of(events) == [b"head", b"head"])
    end.send(b"2\n")
    recorder.wait_for(("read", b"2"), timeout=1)
    end.close()
    recorder.wait_for("on_close")


class Slow(Framer):
    """A chunk that is never complete, and takes 2 ms to see that."""

    def find(self, data, start, searched):
        really_sleep(0.002)


@pytest.mark.parametrize("way", ["on_read", "read"])
def test_long_chunk_that_comes_fast_lets_others_go_on(recorder, way):
    ticks = []

    def on_connect(stream):
        if way == "read":
            stream.read(Slow())

    kind = recorder.of(Stream, on_connect=on_connect, read_delimiter=Slow(), buffer_size=64 * MIB)
    _stream, end = memory_pair(kind, capacity=64 * MIB)
    # Every receive is filled, as those of 4, 16, 64 KiB and so on are.
    for size in (4 * KIB, 16 * KIB, *[64 * KIB] * 100):
        end.send(bytes(size))
    end.shutdown_output()

    def tick():
        while "on_close" not in recorder.names():
            ticks.append(end.all_taken)
            gevent.sleep(0)

    ticking = gevent.spawn(tick)
    recorder.wait_for("on_close")
    ticking.join()
    # About 200 ms, of which nobody should have more than 10 at a time.
    assert ticks.count(False) > 5


def test_read_timeout_counts_while_the_peer_floods(server_of, peer, recorder):
    # Over a socket: in memory, where input is a callback of the hub, gevent lets timers wait for a thousand of these.
    def on_connect(stream):
        recorder("connected")
        began = time.monotonic()
        try:
            stream.read(Slow(), timeout=0.03)
        except ReadTimeout:
            recorder("timeout", time.monotonic() - began)
        stream.abort()

    one = peer(server_of(on_connect=on_connect, buffer_size=64 * MIB))
    recorder.wait_for("connected")
    flooding = gevent.spawn(one.send, bytes(64 * MIB))
    recorder.wait_for("timeout")
    assert recorder[1][1] < 0.2
    with pytest.raises(OSError, match=r"reset|pipe"):
        flooding.get()


# ---- Cost


def test_dialogue_of_short_lines_is_one_receive_and_one_wait_each(server_of, peer, ledger, recorder):
    def on_connect(stream):
        recorder("stream", stream)
        for _ in range(50):
            stream.write(stream.read(b"\n") + b"\n")
        recorder("done")

    one = peer(server_of(ledger.of(Connection, on_connect=on_connect)))
    for number in range(50):
        one.send(b"%d\n" % number)
        assert one.recv_until(b"\n") == b"%d\n" % number
    recorder.wait_for("done")
    reading = ledger.reading(recorder[0][1])
    # One receive a line, and the first one of the read loop, which finds nothing.
    assert [what for what in reading if what not in ("wait", BlockingIOError)] == [2] * 10 + [3] * 40
    assert reading.count(BlockingIOError) <= 1
    assert len(ledger.sends(recorder[0][1])) == 50


def test_lines_that_come_together_are_one_receive(server_of, peer, ledger, recorder):
    def on_connect(stream):
        recorder("stream", stream)
        for _ in range(50):
            stream.read(b"\n")
        recorder("done")

    one = peer(server_of(ledger.of(Connection, on_connect=on_connect)))
    one.send(b"line\n" * 50)
    recorder.wait_for("done")
    reading = ledger.reading(recorder[0][1])
    assert [what for what in reading if what not in ("wait", BlockingIOError)] == [250]
    assert reading.count(BlockingIOError) <= 1


def test_line_and_body_read_in_on_read_are_one_receive_each(server_of, peer, ledger, recorder):
    def on_read(stream, line):
        stream.write(stream.read(int(line)))

    one = peer(server_of(ledger.of(Connection, on_read=on_read, on_connect=recorder, read_delimiter=b"\n")))
    for _ in range(20):
        one.send(b"5\n")
        turns()
        one.send(b"abcde")
        assert one.recv_exactly(5) == b"abcde"
    reading = ledger.reading(recorder[0])
    assert len([what for what in reading if what not in ("wait", BlockingIOError)]) <= 40
    assert reading.count(BlockingIOError) <= 2, reading


def test_read_with_timeout_in_the_dialogue_costs_no_more_receives(server_of, peer, ledger, recorder):
    def on_connect(stream):
        recorder("stream", stream)
        for _ in range(20):
            stream.write(stream.read(b"\n", timeout=5) + b"\n")
        recorder("done")

    one = peer(server_of(ledger.of(Connection, on_connect=on_connect)))
    for number in range(20):
        one.send(b"%d\n" % number)
        one.recv_until(b"\n")
    recorder.wait_for("done")
    reading = ledger.reading(recorder[0][1])
    assert len([what for what in reading if what != "wait"]) <= 21, reading


def test_read_of_a_line_that_comes_byte_by_byte_searches_each_byte_once(recorder):
    seen = []

    class Watching(Framer):
        def find(self, data, start, searched):
            seen.append(len(data) - start - searched)
            return (bytes(data[start:-1]), len(data)) if data.endswith(b"\n") else None

    def on_connect(stream):
        recorder("read", stream.read(Watching()))

    _stream, end = memory_pair(recorder.of(Stream, on_connect=on_connect))
    for _ in range(300):
        end.send(b"x")
    end.send(b"\n")
    recorder.wait_for(("read", b"x" * 300))
    assert seen.count(1) == 301
    assert max(seen) == 1
    end.close()
    recorder.wait_for("on_close")
