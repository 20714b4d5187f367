"""Every kind of delimiter against the plainest reader: random bytes, random cuts, any delimiter after any other."""

import re
from itertools import accumulate, pairwise
from struct import Struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from waiting import nothing_is_kept  # noqa: F401

from pants_green import Stream
from pants_green._delimiters import framer_for
from pants_green._inbox import LONG, NOTHING, Inbox
from pants_green.errors import ChannelClosed, StreamBufferOverflow
from pants_green.framing import Framer, LengthPrefix, Netstring, Varint
from pants_green.testing import memory_pair
from pants_green.testing.strategies import fragments

BUFFER_SIZE = 1000


class Semicolons(Framer[bytes]):
    """A user's framer: what stands before a semicolon, a backslash hiding one."""

    def find(self, data, start, searched):
        end = data.find(b";", start)
        while end > start and data[end - 1 : end] == b"\\":
            end = data.find(b";", end + 1)
        return None if end < 0 else (bytes(data[start:end]), end + 1)


class Couple(Framer[tuple[bytes, bytes]]):
    """A user's framer whose chunks are two arguments: two bytes, one each."""

    spread = True

    def find(self, data, start, searched):
        return 2 if len(data) < start + 2 else ((bytes(data[start : start + 1]), bytes(data[start + 1 : start + 2])), start + 2)


class Named:
    """Unpacks like a NetStruct: the length of a name, the name, one byte more."""

    minimum_size = 2

    def iter_unpack(self, data=b""):
        while len(data) < 2:
            data += yield 2 - len(data)
        size = 2 + data[0] % 16
        while len(data) < size:
            data += yield size - len(data)
        yield [data[1 : size - 1], data[size - 1]]
        yield data[size:]


# ---- the plainest reader: it slices, and rebuilds what is left


class Overflow(Exception):
    pass


def plain_text(chunk, encoding):
    return chunk if encoding is None else chunk.decode(encoding)


def plain_incremental(buffer, encoding):
    """The longest text there is, if there is any; what stands behind it."""
    for end in range(len(buffer), 0, -1):
        try:
            return buffer[:end].decode(encoding), buffer[end:]
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data" and error.start == 0:
                raise
    return None


def plain_frame(head, size, buffer):
    """A frame of `size` bytes behind a head; an announced size counts at once."""
    if len(buffer) < head + size:
        if head + size > BUFFER_SIZE:
            raise Overflow
        return None
    return buffer[head : head + size], buffer[head + size :]


def plain_cut(delimiter, encoding, search, buffer):
    """Return one chunk and the bytes behind it; None if none is complete."""
    if not buffer:
        return None
    if delimiter is None:
        return (buffer, b"") if encoding is None else plain_incremental(buffer, encoding)
    if isinstance(delimiter, str):
        delimiter = delimiter.encode(encoding or "utf-8")
    if isinstance(delimiter, bytes):
        chunk, found, rest = buffer.partition(delimiter)
        return (plain_text(chunk, encoding), rest) if found else None
    if isinstance(delimiter, int):
        return (plain_text(buffer[:delimiter], encoding), buffer[delimiter:]) if len(buffer) >= delimiter else None
    if isinstance(delimiter, re.Pattern):
        pattern = delimiter if isinstance(delimiter.pattern, bytes) else re.compile(delimiter.pattern.encode())
        match = pattern.search(buffer) if search else pattern.match(buffer)
        if match is None:
            return None
        return (plain_text(buffer[: match.start()], encoding) if search else match), buffer[match.end() :]
    if isinstance(delimiter, Struct):
        return (delimiter.unpack(buffer[: delimiter.size]), buffer[delimiter.size :]) if len(buffer) >= delimiter.size else None
    if isinstance(delimiter, Named):
        size = 2 + buffer[0] % 16
        return ((buffer[1 : size - 1], buffer[size - 1]), buffer[size:]) if len(buffer) >= size else None
    if isinstance(delimiter, Couple):
        return ((buffer[:1], buffer[1:2]), buffer[2:]) if len(buffer) >= 2 else None
    if isinstance(delimiter, Semicolons):
        match = re.search(rb"(?<!\\);", buffer)
        return (plain_text(buffer[: match.start()], encoding), buffer[match.end() :]) if match else None
    found = plain_counted(delimiter, buffer)
    return found and (plain_text(found[0], encoding), found[1])


def plain_counted(delimiter, buffer):
    if isinstance(delimiter, LengthPrefix):
        return plain_frame(1, buffer[0], buffer)
    if isinstance(delimiter, Varint):
        head = re.match(rb"[\x80-\xff]*[\0-\x7f]", buffer)
        if head is None:
            if len(buffer) >= 10:
                raise ValueError
            return None
        if head.end() > 10:
            raise ValueError
        size = sum((byte & 127) << 7 * place for place, byte in enumerate(head.group()))
        if size >= 1 << 64:
            raise ValueError
        return plain_frame(head.end(), size, buffer)
    assert isinstance(delimiter, Netstring)
    if re.fullmatch(rb"|0|[1-9]\d{0,9}", buffer):
        return None
    head = re.match(rb"(0|[1-9]\d{0,9}):", buffer)
    if head is None:
        raise ValueError
    found = plain_frame(head.end(), int(head.group(1)) + 1, buffer)
    if found and found[0][-1:] != b",":
        raise ValueError
    return found and (found[0][:-1], found[1])


def shown(chunk):
    """A match object has no equality; and 1 is not True."""
    return (type(chunk), (chunk.group(), chunk.groups(), chunk.regs) if isinstance(chunk, re.Match) else chunk)


# ---- what is drawn

SEARCHED = [rb"\r?\n", rb"[,;]", rb"a+b", rb"(a)|(;)", rb"(?<=a);", rb";(?=;)", rb"\b,", rb"(?:ab){2}"]
MATCHED = [rb"[^;\n]*[;\n]", rb"(\d+)[:,]", rb"(a)(b)?;", rb"a(?=b)", rb"."]

PLAIN = st.one_of(
    st.sampled_from([b"\n", b"\r\n", b";", b"aa", b"aba", "\n", ",", b"\0"]),
    st.integers(1, 7),
    st.just(None),
)
COUNTED = st.sampled_from([LengthPrefix("B"), Netstring(), Varint()])
FIELDS = st.sampled_from([Struct("B"), Struct("!H"), Struct("<xB2s"), Named(), Couple()])
PATTERNS = st.sampled_from([*map(re.compile, SEARCHED)])
TO_MATCH = st.sampled_from([*map(re.compile, MATCHED)])

#: A delimiter, and whether a pattern is searched for.
ways = st.one_of(
    st.tuples(PLAIN, st.just(True)),
    st.tuples(COUNTED, st.just(True)),
    st.tuples(FIELDS, st.just(True)),
    st.tuples(PATTERNS, st.just(True)),
    st.tuples(TO_MATCH, st.just(False)),
    st.tuples(st.just(Semicolons()), st.just(True)),
)

encodings = st.sampled_from([None, None, None, "latin-1", "utf-8"])

#: Bytes that mean something to one kind or another, so that chunks come about and delimiters are cut in two.
tokens = st.sampled_from(
    [
        *(b"a", b"b", b"ab", b"aaab", b"aba", b"\n", b"\r\n", b"\r", b",", b";", b";;", b"\\;", b"\0", b"\x01", b"\x02", b"\x03xyz"),
        *(b"3:abc,", b"0:,", b"1:;,", b"2:", b"12:", b"\x80\x01", b"\x02hi", "é".encode(), "€".encode(), b"\xe9", b"\x05hello"),
    ]
)
some_bytes = st.one_of(st.lists(tokens, max_size=40).map(b"".join), st.binary(max_size=60))

#: What a callback does: nothing, set this delimiter, or read so.
actions = st.lists(
    st.tuples(st.sampled_from(["set", "set", "read", "read what is set", "encoding"]), ways, encodings), max_size=3
)


# ---- one kind at a time


def whole(delimiter, search, encoding, data):
    """Everything the plainest reader makes of these bytes: chunks, what is left, and how it ended."""
    chunks = []
    try:
        while (found := plain_cut(delimiter, encoding, search, data)) is not None:
            chunk, data = found
            chunks.append(shown(chunk))
    except Overflow:
        return chunks, None, "wants more than there may be"
    except ValueError as error:
        return chunks, None, type(error)
    return chunks, data, None


def through_an_inbox(delimiter, search, encoding, pieces, one_by_one):
    framer = framer_for(delimiter, encoding, search)
    inbox = Inbox(one_by_one)
    inbox.use(framer)
    chunks = []
    try:
        for piece in pieces:
            if framer is None or inbox.one_by_one:
                inbox.append(piece)
                while (chunk := inbox.next(framer)) is not NOTHING:
                    chunks.append(shown(chunk))
            else:
                # Not extend(), which keeps nothing of what came before an error.
                for chunk in inbox.feed(piece, framer):
                    chunks.append(shown(chunk))  # noqa: PERF401
                inbox.batch = None
    except ValueError as error:
        return chunks, None, type(error)
    if inbox.wanted > BUFFER_SIZE:
        return chunks, None, "wants more than there may be"
    return chunks, inbox.take_all(), None


@settings(max_examples=400, deadline=None)
@given(way=ways, encoding=encodings, pieces=fragments(some_bytes), one_by_one=st.booleans())
def test_any_kind_cut_at_random_gives_what_the_plainest_reader_gives(way, encoding, pieces, one_by_one):
    delimiter, search = way
    got = through_an_inbox(delimiter, search, encoding, pieces, one_by_one)
    if delimiter is None:  # the chunks depend on the cuts, but not what they are together
        together = whole(delimiter, search, encoding, b"".join(pieces))
        for chunks in (got[0], together[0]):
            chunks[:] = [type(chunks[0][1])().join(chunk for _, chunk in chunks)] if chunks else []
        assert got == together
    else:
        assert got == whole(delimiter, search, encoding, b"".join(pieces))


@settings(max_examples=60, deadline=None)
@given(
    way=ways.filter(lambda way: way[0] is not None),
    sizes=st.lists(st.integers(1, LONG + 500), min_size=1, max_size=8),
    fill=st.sampled_from(
        [b"x" * 5000 + b"\r\n", b"x", b"aaa" * 1500 + b"b;", b"\xc8" * 300 + b";;", b"200:" + b"y" * 200 + b",", b"a;ab\n,"]
    ),
    one_by_one=st.booleans(),
)
def test_any_kind_in_long_receives_gives_what_the_plainest_reader_gives(way, sizes, fill, one_by_one):
    data = (fill * (sum(sizes) // len(fill) + 1))[: sum(sizes)]
    pieces = [data[begin:end] for begin, end in pairwise(accumulate(sizes, initial=0))]
    assert through_an_inbox(*way, None, pieces, one_by_one) == whole(*way, None, data)


@settings(max_examples=150, deadline=None)
@given(way=ways, data=some_bytes, taken=st.integers(0, 6), encoding=encodings)
def test_batch_of_any_kind_put_back_is_what_the_plainest_reader_has_left(way, data, taken, encoding):
    delimiter, search = way
    framer = framer_for(delimiter, encoding, search)
    if framer is None or not framer.splits or not data:
        return
    inbox = Inbox()
    rest = data
    try:
        batch = iter(inbox.feed(data, framer))
        for _ in range(taken):
            found = plain_cut(delimiter, encoding, search, rest)
            if found is None:
                assert next(batch, NOTHING) is NOTHING
                break
            assert shown(next(batch)) == shown(found[0])
            rest = found[1]
    except UnicodeDecodeError:
        return
    inbox.put_back(framer)
    left = inbox.take_all()
    if delimiter is not None or taken:  # without a delimiter the only chunk is taken at once
        assert left == rest


# ---- streams whose callbacks change everything


class Script:
    """What happens, event for event, however it is brought about: ``on_connect`` does the first actions, each on_read the next."""

    def __init__(self, plan):
        self.plan = list(plan)
        self.events = []

    def next(self):
        return self.plan.pop(0) if self.plan else ()


class PlainStream:
    """A stream as plain as can be: one buffer, rebuilt after each chunk; each piece is one receive."""

    def __init__(self, script, way, encoding, pieces):
        self.script = script
        self.delimiter, self.search = way
        self.encoding = encoding
        self.pieces = list(pieces)
        self.buffer = b""

    def take(self, delimiter):
        """Return one chunk; receive as long as none is complete."""
        while True:
            found = plain_cut(delimiter, self.encoding, self.search, self.buffer)
            if found is not None:
                chunk, self.buffer = found
                return chunk
            if len(self.buffer) > BUFFER_SIZE:
                raise Overflow
            if not self.pieces:
                raise EOFError
            self.buffer += self.pieces.pop(0)

    def act(self):
        for kind, (delimiter, search), encoding in self.script.next():
            if kind == "set":
                self.delimiter, self.search = delimiter, search
            elif kind == "encoding":
                self.encoding = encoding
            else:
                if kind == "read":
                    self.search = search
                chunk = self.take(delimiter if kind == "read" else self.delimiter)
                self.script.events.append(("read", shown(chunk)))

    def live(self):
        events = self.script.events
        try:
            try:
                self.act()
                while True:
                    chunk = self.take(self.delimiter)
                    spread = isinstance(self.delimiter, (Struct, Named, Couple))
                    events.append(("on_read", *map(shown, chunk if spread else (chunk,))))
                    self.act()
            except EOFError:
                events.append(("on_end", self.buffer))
        except Overflow:
            events.append("overflow")
        except ValueError as error:
            events.append(("read_error", type(error)))
        return events


class RealStream(Stream):
    buffer_size = BUFFER_SIZE

    def search_by(self, search):
        # Only if it is another: to set it breaks a batch off, which is to be left to what comes next.
        if self.regex_search is not search:
            self.regex_search = search

    def act(self):
        for kind, (delimiter, search), encoding in self.script.next():
            if kind == "set":
                self.search_by(search)
                self.read_delimiter = delimiter
            elif kind == "encoding":
                self.encoding = encoding
            else:
                if kind == "read":
                    self.search_by(search)
                chunk = self.read(delimiter) if kind == "read" else self.read()
                self.script.events.append(("read", shown(chunk)))

    def on_connect(self):
        self.act()

    def on_read(self, *chunk):
        self.script.events.append(("on_read", *map(shown, chunk)))
        self.act()

    def on_end(self, rest):
        self.script.events.append(("on_end", rest))

    def on_overflow_error(self, exception):
        assert isinstance(exception, StreamBufferOverflow)
        self.script.events.append("overflow")
        self.abort()

    def on_read_error(self, exception):
        self.script.events.append(("read_error", type(exception)))

    def on_error(self, exception):
        self.script.events.append(("error", repr(exception)))
        self.abort()

    def on_close(self):
        self.script.events.append("close")


def live(plan, way, encoding, pieces):
    script = Script(plan)
    stream = RealStream()
    stream.script = script
    stream.encoding = encoding
    stream.regex_search = way[1]
    stream.read_delimiter = way[0]
    _, end = memory_pair(stream)
    for piece in pieces:
        end.send(piece)
    end.close()
    end.wait_for(lambda: "close" in script.events)
    assert script.events.pop() == "close"
    assert stream.script.events is script.events
    return script.events


@settings(max_examples=700, deadline=None)
@given(plan=st.lists(actions, max_size=12), way=ways, encoding=encodings, pieces=fragments(some_bytes))
@example(plan=[[], [("read", (None, True), None)]], way=(b"\n", True), encoding=None, pieces=[b"a\nb\nc", b"d"])
@example(plan=[[], [("set", (Struct("!H"), True), None)]], way=(re.compile(rb"\r?\n"), True), encoding=None, pieces=[b"a\r\nbcde\nf"])
@example(plan=[[("read", (3, True), None)]], way=(None, True), encoding="utf-8", pieces=[b"abc\xc3", b"\xa9\xff"])
def test_any_schedule_of_delimiters_and_reads_gives_what_the_plainest_stream_gives(plan, way, encoding, pieces):
    assert live(plan, way, encoding, pieces) == PlainStream(Script(plan), way, encoding, pieces).live()


@settings(max_examples=150, deadline=None)
@given(
    ways=st.lists(st.tuples(st.just("set"), ways.filter(lambda way: way[0] is not None), st.none()), min_size=1, max_size=10),
    pieces=fragments(some_bytes),
)
def test_delimiter_changed_after_each_chunk_does_not_depend_on_the_cuts(ways, pieces):
    """With None left out, for what that delivers is what came."""
    plan = [[way] for way in ways]
    first = ways[0][1]
    assert live(plan, first, None, pieces) == live(plan, first, None, [b"".join(pieces)] if pieces else [])


def test_read_that_the_peer_has_left_and_the_callback_expects_leaves_the_rest_to_on_read():
    """If it does not expect that, the rest is no chunk: on_end gets it, as the schedules show."""
    seen = []

    class Reading(Stream):
        read_delimiter = b";"

        def on_connect(self):
            with pytest.raises(ChannelClosed):
                self.read(9)
            seen.append("closed")

        def on_read(self, chunk):
            seen.append(chunk)

        def on_end(self, rest):
            seen.append(rest)

    _, end = memory_pair(Reading)
    end.send(b"a;b;c")
    end.close()
    end.wait_for()
    assert seen == ["closed", b"a", b"b", b"c"]
