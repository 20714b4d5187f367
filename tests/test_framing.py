"""Cutting bytes into chunks, byte by byte: however the network cuts them, the chunks are the same."""

import enum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pants_green import Stream
from pants_green._delimiters import Delimited, Fixed, framer_for
from pants_green._inbox import LONG, NOTHING, Inbox
from pants_green.errors import InvalidReadDelimiterError, ReadDelimiterTypeError, ReadDelimiterValueError
from pants_green.testing import fragmentations, memory_pair
from pants_green.testing.strategies import fragments


class Reader:
    """Moves an Inbox exactly as ``Stream._deliver`` and ``_deliver_waiting`` do.

    Args:
        delimiter: that with which it begins.
        plan: {number of chunks delivered: the delimiter that the callback sets then}.
    """

    def __init__(self, delimiter, plan=None):
        self.inbox = Inbox()
        self.plan = plan or {}
        self.chunks = []
        self.active = framer_for(delimiter)

    def set_delimiter(self, delimiter):
        self.active = framer_for(delimiter)
        self.inbox.forget_search()

    def on_read(self, chunk):
        self.chunks.append(chunk)
        if len(self.chunks) in self.plan:
            self.set_delimiter(self.plan[len(self.chunks)])

    def receive(self, data):
        framer = self.active
        if framer is None:
            self.on_read(data)
        elif self.inbox.one_by_one:
            self.inbox.append(data)
            self.deliver_waiting()
        else:
            for chunk in self.inbox.feed(data, framer):
                self.on_read(chunk)
                if self.active is not framer:
                    self.inbox.put_back(framer)
                    self.deliver_waiting()
                    return
            self.inbox.batch = None

    def deliver_waiting(self):
        while (chunk := self.inbox.next(self.active)) is not NOTHING:
            self.on_read(chunk)

    def feed_all(self, pieces):
        """Receive all pieces; return the chunks and the bytes that still wait."""
        for piece in pieces:
            self.receive(piece)
        waiting = len(self.inbox)
        rest = self.inbox.take_all()
        assert len(rest) == waiting
        return self.chunks, rest


def read(delimiter, pieces, plan=None):
    return Reader(delimiter, plan).feed_all(pieces)


def naive(delimiter, pieces, plan=None):
    """The same as `read`, in the plainest way."""
    chunks, buffer = [], b""
    for piece in pieces:
        buffer += piece
        while True:
            if isinstance(delimiter, str):
                delimiter = delimiter.encode()
            if delimiter is None:
                if not buffer:
                    break
                chunk, buffer = buffer, b""
            elif isinstance(delimiter, int):
                if len(buffer) < delimiter:
                    break
                chunk, buffer = buffer[:delimiter], buffer[delimiter:]
            else:
                if delimiter not in buffer:
                    break
                chunk, buffer = buffer.split(delimiter, 1)
            chunks.append(chunk)
            if plan and len(chunks) in plan:
                delimiter = plan[len(chunks)]
    return chunks, buffer


# ---- every example as a whole, one byte at a time, and cut in every other way

LONG_LINE = b"x" * (LONG + 100)

#: Delimiter, input, chunks, what is left.
EXAMPLES = [
    (b"\n", b"", [], b""),
    (b"\n", b"one", [], b"one"),
    (b"\n", b"one\n", [b"one"], b""),
    (b"\n", b"\n", [b""], b""),
    (b"\n", b"\n\n\n", [b"", b"", b""], b""),
    (b"\n", b"one\ntwo\nthr", [b"one", b"two"], b"thr"),
    (b"\n", b"\none", [b""], b"one"),
    ("\n", b"one\ntwo\n", [b"one", b"two"], b""),
    (b"\r\n", b"one\r\ntwo\r\n", [b"one", b"two"], b""),
    (b"\r\n", b"one\rtwo\nthree\n\rfour", [], b"one\rtwo\nthree\n\rfour"),
    (b"\r\n", b"\r\r\n\n", [b"\r"], b"\n"),
    ("é", "aébé".encode(), [b"a", b"b"], b""),
    ("é", b"a\xc3b\xc3\xa9", [b"a\xc3b"], b""),
    (b"\0", b"\0\x01\0", [b"", b"\x01"], b""),
    # Delimiters that overlap with themselves.
    (b"aa", b"aaa", [b""], b"a"),
    (b"aa", b"aaaa", [b"", b""], b""),
    (b"aba", b"ababa", [b""], b"ba"),
    (b"aab", b"aaab", [b"a"], b""),
    (b"--end--", b"a--end-b--end----end--", [b"a--end-b", b""], b""),
    (1, b"abc", [b"a", b"b", b"c"], b""),
    (3, b"", [], b""),
    (3, b"ab", [], b"ab"),
    (3, b"abc", [b"abc"], b""),
    (3, b"abcdefgh", [b"abc", b"def"], b"gh"),
    (8, b"0123456789abcdefX", [b"01234567", b"89abcdef"], b"X"),
]

BIG_EXAMPLES = [
    (b"\n", LONG_LINE + b"\nshort\n" + LONG_LINE, [LONG_LINE, b"short"], LONG_LINE),
    (b"\r\n\r\n", LONG_LINE + b"\r\n\r\n\r\n", [LONG_LINE], b"\r\n"),
    (LONG, b"a" * LONG + b"b" * LONG + b"c", [b"a" * LONG, b"b" * LONG], b"c"),
    (LONG + 1, b"a" * (LONG + 1) + b"b" * (LONG + 1) + b"c", [b"a" * (LONG + 1), b"b" * (LONG + 1)], b"c"),
    (1 << 40, LONG_LINE, [], LONG_LINE),
    (LONG_LINE, b"one" + LONG_LINE + b"two", [b"one"], b"two"),
]

ids = lambda value: repr(value) if len(repr(value)) < 40 else repr(value)[:36] + "..."  # noqa: E731


@pytest.mark.parametrize(("delimiter", "data", "chunks", "rest"), EXAMPLES + BIG_EXAMPLES, ids=ids)
def test_chunks_however_the_network_cuts_are_the_same(delimiter, data, chunks, rest):
    for pieces in fragmentations(data):
        assert read(delimiter, pieces) == (chunks, rest), [len(piece) for piece in pieces]


@pytest.mark.parametrize(("delimiter", "data", "chunks", "rest"), EXAMPLES + BIG_EXAMPLES, ids=ids)
def test_chunks_found_one_by_one_are_the_same(delimiter, data, chunks, rest):
    """The mode in which a stream stays once it has changed its delimiter in the middle of a batch."""
    for pieces in fragmentations(data):
        reader = Reader(delimiter)
        reader.inbox.one_by_one = True
        assert reader.feed_all(pieces) == (chunks, rest), [len(piece) for piece in pieces]


@pytest.mark.parametrize("cut", range(1, 8))
@pytest.mark.parametrize("one_by_one", [False, True])
def test_delimiter_cut_behind_a_long_chunk_is_found(cut, one_by_one):
    """The search goes on where it ended, and not behind the first bytes of a delimiter that it saw there."""
    delimiter = b"--end---"
    reader = Reader(delimiter)
    reader.inbox.one_by_one = one_by_one
    pieces = [LONG_LINE, b"y" * 100, delimiter[:cut], delimiter[cut:] + b"rest"]
    assert reader.feed_all(pieces) == ([LONG_LINE + b"y" * 100], b"rest")


@pytest.mark.parametrize(("delimiter", "data"), [(delimiter, data) for delimiter, data, _, _ in EXAMPLES + BIG_EXAMPLES], ids=ids)
def test_chunk_is_bytes_whatever_it_was_collected_in(delimiter, data):
    for one_by_one in (False, True):
        for pieces in ([data], [data[:1], data[1:]], [data[: LONG + 50], data[LONG + 50 :]]):
            reader = Reader(delimiter)
            reader.inbox.one_by_one = one_by_one
            chunks, rest = reader.feed_all([piece for piece in pieces if piece])
            assert {type(one) for one in (*chunks, rest)} == {bytes}


# ---- the promises of the old documents


def test_s3_14_bytes_short_of_eight_stay_buffered():
    reader = Reader(8)
    reader.receive(b"abc")
    assert (reader.chunks, len(reader.inbox)) == ([], 3)
    reader.receive(b"defgh")
    assert (reader.chunks, len(reader.inbox)) == ([b"abcdefgh"], 0)
    reader.receive(b"0123456789abcdefX")
    assert (reader.chunks[1:], len(reader.inbox)) == ([b"01234567", b"89abcdef"], 1)


def test_s4_12_delimiter_holds_until_changed():
    assert read(b"\n", [b"a\nb\ncde", b"fgh"], {2: 3}) == ([b"a", b"b", b"cde", b"fgh"], b"")


def test_s4_13_none_everything_is_passed_on_at_once():
    pieces = [b"a", b"\r\n", b"bc" * 5000]
    assert read(None, pieces) == (pieces, b"")


def test_s4_14_string_bytes_wait_until_it_is_met():
    reader = Reader("\r\n")
    for piece in (b"on", b"e\r"):
        reader.receive(piece)
        assert reader.chunks == []
    reader.receive(b"\n")
    assert reader.chunks == [b"one"]


def test_s4_15_integer_is_that_many_bytes():
    assert read(4, [b"ab", b"cdefg", b"h"]) == ([b"abcd", b"efgh"], b"")


def test_s4_16_line_by_line_without_the_crlf():
    assert read("\r\n", [b"GET / HTTP/1.0\r\nHost: ", b"a\r\n\r\n"])[0] == [b"GET / HTTP/1.0", b"Host: a", b""]


def test_s3_23_length_then_body_by_changing_the_delimiter():
    """A packet protocol: the next delimiter is what the chunk said."""

    class Packets(Reader):
        def on_read(self, chunk):
            self.chunks.append(chunk)
            self.set_delimiter(int(chunk) if self.active == framer_for(b":") else b":")

    data = b"3:abc12:hello, world1:x"
    for pieces in fragmentations(data):
        reader = Packets(b":")
        assert reader.feed_all(pieces) == ([b"3", b"abc", b"12", b"hello, world", b"1", b"x"], b""), pieces


# ---- changed delimiters


@pytest.mark.parametrize(
    ("delimiter", "plan", "data", "chunks", "rest"),
    [
        (b"\n", {1: 3}, b"a\nbcdefg", [b"a", b"bcd", b"efg"], b""),
        (b"\n", {1: b","}, b"a\nb,c\nd,e", [b"a", b"b", b"c\nd"], b"e"),
        (3, {1: b"\n"}, b"abcde\nfgh\n", [b"abc", b"de", b"fgh"], b""),
        (3, {1: 2, 2: 1}, b"abcdefg", [b"abc", b"de", b"f", b"g"], b""),
        (LONG + 1, {1: 2}, b"x" * (LONG + 1) + b"abcde", [b"x" * (LONG + 1), b"ab", b"cd"], b"e"),
        (b"\n", {1: b"\n"}, b"a\nb\n", [b"a", b"b"], b""),
        (b"\n", {1: "\n"}, b"a\nb\n", [b"a", b"b"], b""),
        # The last chunk of a receive; what waits is looked at again with the new one.
        (b"\n", {1: b"b"}, b"a\nxby", [b"a", b"x"], b"y"),
        (b"\n", {1: 100}, b"a\nbc", [b"a"], b"bc"),
    ],
    ids=ids,
)
def test_delimiter_changed_in_mid_batch_holds_from_the_next_chunk_on(delimiter, plan, data, chunks, rest):
    for pieces in fragmentations(data):
        assert read(delimiter, pieces, plan) == (chunks, rest), [len(piece) for piece in pieces]


def test_delimiter_changed_to_none_in_mid_batch_hands_out_the_rest_at_once():
    assert read(b"\n", [b"a\nb\nc", b"d"], {1: None}) == ([b"a", b"b\nc", b"d"], b"")


def test_delimiter_changed_while_bytes_wait_searches_them_again():
    """A search that was in vain for one delimiter says nothing about another."""
    reader = Reader(b"\n")
    reader.receive(b"a;" + LONG_LINE)
    reader.receive(b"more")  # long enough to be searched only where it is new
    reader.receive(b"and more")
    reader.set_delimiter(b";")
    reader.inbox.one_by_one = True
    reader.receive(b"x")
    assert reader.chunks == [b"a"]


def test_put_back_gives_back_exactly_what_was_not_handed_out():
    for delimiter, data, _, _ in EXAMPLES:
        framer = framer_for(delimiter)
        count = len(read(delimiter, [data])[0])
        for taken in range(count + 1):
            inbox = Inbox()
            batch = inbox.feed(data, framer)
            gone = [next(batch) for _ in range(taken)]
            inbox.put_back(framer)
            assert inbox.one_by_one
            assert inbox.batch is None
            separator = framer.delimiter if isinstance(framer, Delimited) else b""
            assert b"".join(chunk + separator for chunk in gone) + inbox.take_all() == data


def test_take_all_hands_out_the_rest_and_leaves_nothing():
    inbox = Inbox()
    list(inbox.feed(b"a\nbc", framer_for(b"\n")))
    assert (len(inbox), inbox.take_all(), len(inbox), inbox.take_all()) == (2, b"bc", 0, b"")


@pytest.mark.parametrize("line", [b"short", LONG_LINE])
def test_append_between_two_chunks_keeps_what_was_not_handed_out(line):
    inbox = Inbox()
    framer = framer_for(b"\n")
    inbox.append(b"one\n" + line + b"\nthr")
    assert inbox.next(framer) == b"one"
    assert len(inbox) == len(line) + 4
    inbox.append(b"ee\nfour\n")
    assert len(inbox) == len(line) + 12
    assert [inbox.next(framer) for _ in range(4)] == [line, b"three", b"four", NOTHING]
    assert len(inbox) == 0


def test_next_without_a_framer_hands_out_everything_once():
    inbox = Inbox()
    assert inbox.next(None) is NOTHING
    inbox.append(b"ab")
    inbox.append(b"c")
    assert inbox.next(None) == b"abc"
    assert inbox.next(None) is NOTHING


def test_nothing_is_no_chunk_that_could_come():
    assert repr(NOTHING) == "<nothing>"
    assert NOTHING not in (b"", None, (), False)


# ---- against the naive reader

letters = st.sampled_from([b"a", b"b", b"ab", b"\r\n", b"\n", b"\0"])
some_bytes = st.one_of(st.lists(letters, max_size=40).map(b"".join), st.binary(max_size=60))
kept_delimiters = st.one_of(
    st.sampled_from([b"\n", b"\r\n", b"a", b"ab", b"aa", b"aba", "\n", b"\0\0"]), st.integers(1, 12), st.binary(min_size=1, max_size=3)
)
delimiters = st.one_of(st.none(), kept_delimiters)


@given(delimiter=kept_delimiters, data=some_bytes, cuts=st.data())
def test_random_cuts_give_what_the_naive_reader_gives(delimiter, data, cuts):
    pieces = cuts.draw(fragments(data))
    assert read(delimiter, pieces) == naive(delimiter, [data])


@given(delimiter=delimiters, pieces=fragments(some_bytes), plan=st.dictionaries(st.integers(1, 12), delimiters, max_size=6))
def test_random_delimiter_changes_give_what_the_naive_reader_gives(delimiter, pieces, plan):
    assert read(delimiter, pieces, plan) == naive(delimiter, pieces, plan)


@given(delimiter=kept_delimiters, pieces=fragments(some_bytes), plan=st.dictionaries(st.integers(1, 12), kept_delimiters, max_size=6))
def test_random_delimiter_changes_do_not_depend_on_the_cuts(delimiter, pieces, plan):
    assert read(delimiter, pieces, plan) == naive(delimiter, [b"".join(pieces)], plan)


@settings(max_examples=60)
@given(
    delimiter=kept_delimiters,
    sizes=st.lists(st.integers(1, LONG + 500), min_size=1, max_size=12),
    plan=st.dictionaries(st.integers(1, 6), st.one_of(kept_delimiters, st.integers(LONG - 1, LONG * 2)), max_size=3),
    fill=st.sampled_from([b"x", b"xxxxxxx\n", b"ab" * 3000 + b"\r\n", bytes(range(256))]),
)
def test_random_long_receives_give_what_the_naive_reader_gives(delimiter, sizes, plan, fill):
    pieces = [(fill * (size // len(fill) + 1))[:size] for size in sizes]
    assert read(delimiter, pieces, plan) == naive(delimiter, pieces, plan)


@settings(max_examples=60, deadline=None)
@given(delimiter=delimiters, pieces=fragments(some_bytes), plan=st.dictionaries(st.integers(1, 12), delimiters, max_size=6))
def test_stream_delivers_what_the_reader_of_this_test_delivers(delimiter, pieces, plan):
    """The Reader above stands for the stream; this is what makes it true."""
    chunks, rests = [], []

    class Reading(Stream):
        read_delimiter = delimiter

        def on_read(self, chunk):
            chunks.append(chunk)
            if len(chunks) in plan:
                self.read_delimiter = plan[len(chunks)]

        def on_end(self, rest):
            rests.append(rest)

    _, end = memory_pair(Reading)
    for piece in pieces:
        end.send(piece)
    end.close()
    end.wait_for()
    # on_end gets no rest if the last delimiter is None: everything was handed out.
    assert (chunks, rests) == (naive(delimiter, pieces, plan)[0], [naive(delimiter, pieces, plan)[1]])


# ---- work


class Counting(Delimited):
    """Counts the bytes that are looked at."""

    __slots__ = ()
    scanned = 0

    def split(self, data):
        Counting.scanned += len(data)
        return super().split(data)

    def find(self, data, start, searched):
        found = super().find(data, start, searched)
        begin = start + max(0, searched - self.room + 1)
        Counting.scanned += (len(data) if found is None else found[1]) - begin
        return found


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(("size", "piece"), [(4 << 20, 4096), (4 << 20, 2 * LONG), (256 << 10, 64), (1 << 20, 1000)])
def test_long_chunk_over_many_receives_is_searched_and_copied_once(size, piece, one_by_one):
    framer = Counting(b"\r\n\r\n")
    Counting.scanned = 0
    inbox = Inbox()
    inbox.one_by_one = one_by_one
    containers = set()
    for start in range(0, size, piece):
        data = b"x" * min(piece, size - start)
        if one_by_one:
            inbox.append(data)
            assert inbox.next(framer) is NOTHING
        else:
            assert list(inbox.feed(data, framer)) == []
        if len(inbox) > 4 * LONG:
            containers.add(id(inbox.data))
    # Once while it grows. Below LONG the whole is searched at each receive, which is cheaper than to remember; and each
    # receive goes back by less than a delimiter.
    assert Counting.scanned <= size + LONG * (LONG // piece + 2) + 4 * (size // piece)
    assert len(containers) == 1
    if one_by_one:
        inbox.append(b"\r\n\r\n")
        assert inbox.next(framer) == b"x" * size
    else:
        assert list(inbox.feed(b"\r\n\r\n", framer)) == [b"x" * size]
    assert Counting.scanned <= 2 * size + LONG * (LONG // piece + 2) + 4 * (size // piece) + 100


def test_many_chunks_one_by_one_are_not_copied_again_for_each():
    framer = Counting(b"\n")
    Counting.scanned = 0
    inbox = Inbox()
    data = b"line\n" * 50_000
    inbox.append(data)
    for _ in range(49_999):
        assert inbox.next(framer) == b"line"
        assert inbox.data is data
    assert inbox.next(framer) == b"line"
    assert inbox.next(framer) is NOTHING
    assert Counting.scanned == len(data)


def test_long_chunk_of_fixed_size_is_not_copied_at_each_receive():
    framer = framer_for(1 << 20)
    inbox = Inbox()
    containers = set()
    for _ in range(255):
        assert list(inbox.feed(b"x" * 4096, framer)) == []
        if len(inbox) > 2 * LONG:
            containers.add(id(inbox.data))
    assert len(containers) == 1
    assert list(inbox.feed(b"x" * 4096, framer)) == [b"x" * (1 << 20)]


def test_chunks_handed_out_are_dropped_once_nothing_more_is_found():
    """Bytes that were delivered do not stay in memory with those that wait."""
    for waiting in (b"abc", LONG_LINE):
        inbox = Inbox()
        inbox.append(b"line\n" * 1000 + waiting[:1])
        inbox.append(waiting[1:])
        while inbox.next(framer_for(b"\n")) is not NOTHING:
            pass
        assert bytes(inbox.data) == waiting


def test_whole_receive_in_one_chunk_is_not_copied():
    data = b"x" * 4096
    (chunk,) = Inbox().feed(data, framer_for(4096))
    assert chunk == data
    inbox = Inbox()
    assert list(inbox.feed(data, framer_for(b"\n"))) == []
    assert inbox.data is data or inbox.data == data


# ---- delimiters


class Size(enum.IntEnum):
    EIGHT = 8


class OwnBytes(bytes):
    pass


class OwnText(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("delimiter", "kind", "least"),
    [
        (b"\n", Delimited, 1),
        ("\r\n", Delimited, 2),
        ("é", Delimited, 2),
        (OwnBytes(b"\n"), Delimited, 1),
        (OwnText("\n"), Delimited, 1),
        (8, Fixed, 8),
        (Size.EIGHT, Fixed, 8),
        (10**30, Fixed, 10**30),
    ],
    ids=repr,
)
def test_framer_for_knows_how_many_bytes_a_chunk_needs(delimiter, kind, least):
    framer = framer_for(delimiter)
    assert type(framer) is kind
    assert framer.room == least


def test_framer_for_none_is_no_framer():
    assert framer_for(None) is None


def test_framer_for_equal_delimiters_is_one_framer():
    assert framer_for(b"\r\n") is framer_for(bytes(bytearray(b"\r\n")))
    assert framer_for(300) is framer_for(300)


def test_framer_for_one_is_not_that_for_true():
    """Equal and of equal hash, but one is a size and the other a mistake: whichever is asked for first."""
    assert framer_for(1).room == 1
    with pytest.raises(ReadDelimiterTypeError):
        framer_for(True)
    assert framer_for(1).room == 1


@pytest.mark.parametrize("delimiter", [b"", "", 0, -1, -(10**30), OwnBytes(b"")], ids=repr)
def test_e1_4_degenerate_delimiter_is_a_value_error(delimiter):
    for kind in (ReadDelimiterValueError, ValueError, InvalidReadDelimiterError):
        with pytest.raises(kind, match="read_delimiter"):
            framer_for(delimiter)
    with pytest.raises(ValueError, match="read_delimiter"):
        type("Degenerate", (Stream,), {"read_delimiter": delimiter})
    stream = Stream()
    stream.read_delimiter = b"kept"
    with pytest.raises(ValueError, match="read_delimiter"):
        stream.read_delimiter = delimiter
    assert stream.read_delimiter == b"kept"


class Unhashable:
    __hash__ = None


@pytest.mark.parametrize(
    "delimiter",
    [
        *(True, False, 1.0, 8.5, float("nan"), 1j, len, int, object(), Unhashable()),
        *((b"\n",), [b"\n"], {b"\n"}, {}, bytearray(b"\n"), memoryview(b"\n")),
    ],
    ids=lambda value: type(value).__name__ + str(value)[:6],
)
def test_unknown_delimiter_is_a_type_error(delimiter):
    for kind in (ReadDelimiterTypeError, TypeError, InvalidReadDelimiterError):
        with pytest.raises(kind, match=r"give None, bytes, str.*int") as caught:
            framer_for(delimiter)
        assert type(delimiter).__name__ in str(caught.value)
    with pytest.raises(TypeError, match="read_delimiter"):
        type("Unknown", (Stream,), {"read_delimiter": delimiter})
    stream = Stream()
    with pytest.raises(TypeError, match="read_delimiter"):
        stream.read_delimiter = delimiter
    assert stream.read_delimiter is None
