"""Every kind of delimiter: what it cuts, what it refuses, what becomes of input that makes no sense, and what it costs."""

import array
import enum
import math
import re
import struct
from struct import Struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import nothing_is_kept  # noqa: F401

from pants_green import Stream, _inbox
from pants_green._delimiters import Delimited, Fixed, SplitAt, framer_for, shape
from pants_green._inbox import LONG, NOTHING, Inbox
from pants_green._lifecycle import CloseReason
from pants_green.errors import (
    InvalidReadDelimiterError,
    ReadDelimiterTypeError,
    ReadDelimiterValueError,
    StreamBufferOverflow,
)
from pants_green.framing import Framer, LengthPrefix, Netstring, Varint
from pants_green.testing import fragmentations, memory_pair


class Slip(Framer[bytes]):
    """SLIP packets, as RFC 1055 has them: a framer such as a user would write."""

    def find(self, data, start, searched):
        end = data.find(b"\xc0", start + searched)
        if end < 0:
            return None
        return bytes(data[start:end]).replace(b"\xdb\xdc", b"\xc0").replace(b"\xdb\xdd", b"\xdb"), end + 1


class Pairs(Framer[tuple[bytes, bytes]]):
    """``key=value;``, of which on_read gets both as arguments."""

    spread = True

    def find(self, data, start, searched):
        end = data.find(b";", start)
        return None if end < 0 else (tuple(bytes(data[start:end]).split(b"=", 1)), end + 1)


class Named:
    """Unpacks like a NetStruct: a byte that counts the bytes of a name, the name, and a number of two bytes."""

    minimum_size = 3

    def iter_unpack(self, data=b""):
        for needed in (1, 3):
            while len(data) < needed:
                data += yield 3 - len(data)
        size = 3 + data[0]
        while len(data) < size:
            data += yield size - len(data)
        yield [data[1 : size - 2], int.from_bytes(data[size - 2 : size])]
        yield data[size:]


def cut(delimiter, pieces, one_by_one=False, **options):
    """Return the chunks of an Inbox that gets these pieces, and the bytes that still wait."""
    framer = framer_for(delimiter, **options)
    inbox = Inbox(one_by_one)
    inbox.use(framer)
    chunks = []
    for piece in pieces:
        if framer is None or inbox.one_by_one:
            inbox.append(piece)
            while (chunk := inbox.next(framer)) is not NOTHING:
                chunks.append(chunk)
        else:
            chunks.extend(inbox.feed(piece, framer))
            inbox.batch = None
    waiting = len(inbox)
    rest = inbox.take_all()
    assert len(rest) == waiting
    return [(chunk.group(), chunk.groups()) if isinstance(chunk, re.Match) else chunk for chunk in chunks], rest


UTF8 = {"encoding": "utf-8"}
LATIN = {"encoding": "latin-1"}
MATCHES = {"regex_search": False}
LONG_LINE = b"x" * (LONG + 100)

#: Delimiter, options, input, chunks, what is left.
EXAMPLES = [
    # bytes, str and numbers, decoded
    (b"\n", UTF8, "één\ntwee\ndr".encode(), ["één", "twee"], b"dr"),
    (b"\n", LATIN, b"\xe9\xff\n\n", ["\xe9\xff", ""], b""),
    (b"\n", {"encoding": "utf-16-le"}, b"a\0b\0\n", ["ab"], b""),
    ("é", UTF8, "aébéc".encode(), ["a", "b"], b"c"),
    ("é", LATIN, b"a\xe9b\xc3\xe9", ["a", "b\xc3"], b""),
    ("€", UTF8, "10€\xe2\x8220€".encode(), ["10", "\xe2\x8220"], b""),
    (2, UTF8, "éabñ".encode(), ["é", "ab", "ñ"], b""),
    (3, LATIN, b"\xe9\xe8\xe7ab", ["\xe9\xe8\xe7"], b"ab"),
    # patterns that are searched for
    (re.compile(rb"\r?\n"), {}, b"one\r\ntwo\n\r\nthr", [b"one", b"two", b""], b"thr"),
    (re.compile(rb"\r?\n"), {}, b"one\rtwo\r\r\n", [b"one\rtwo\r"], b""),
    (re.compile(rb"[,;]"), {}, b",a;b,", [b"", b"a", b"b"], b""),
    (re.compile(rb"(,)|(;)"), {}, b",a;b,", [b"", b"a", b"b"], b""),
    (re.compile(rb"<br(\s*)/?>", re.IGNORECASE), {}, b"one<BR />two<br>three<br", [b"one", b"two"], b"three<br"),
    (re.compile(rb"a+b"), {}, b"xaaabyabaa", [b"x", b"y"], b"aa"),
    (re.compile(rb"--\w{1,4}--"), {}, b"a--b--c--defg----h--i--j", [b"a", b"c", b"", b"i--j"][:3], b"i--j"),
    (re.compile(rb";(?=;)"), {}, b"a;b;;c;;;", [b"a;b", b";c", b""], b";"),
    (re.compile(rb"(?<=;)\n"), {}, b"a\nb;\n;\n\nc", [b"a\nb;", b";"], b"\nc"),
    (re.compile(rb"\b;"), {}, b"a;;b;", [b"a", b";b"], b""),
    (re.compile(rb"\r?\n"), UTF8, "één\r\ntwee\n".encode(), ["één", "twee"], b""),
    (re.compile(r"\r?\n"), UTF8, "één\r\ntwee\n".encode(), ["één", "twee"], b""),
    (re.compile(r"[;,é]"), LATIN, b"\xe8\xe9b;", ["\xe8", "b"], b""),
    (re.compile(r"[;,\xe9]"), LATIN, b"\xe8\xe9b;", ["\xe8", "b"], b""),
    (re.compile(r"(?<=;)\n"), UTF8, "é\n;\n".encode(), ["é\n;"], b""),
    # patterns that have to match
    (re.compile(rb"(\w+)=(\d+);"), MATCHES, b"a=1;b=23;c=", [(b"a=1;", (b"a", b"1")), (b"b=23;", (b"b", b"23"))], b"c="),
    (re.compile(rb"(\w+)=(\d+);"), MATCHES, b"a=1;;b=2;", [(b"a=1;", (b"a", b"1"))], b";b=2;"),
    (re.compile(rb"[^\n]*\n"), MATCHES, b"one\n\ntwo", [(b"one\n", ()), (b"\n", ())], b"two"),
    (re.compile(rb"(\w)(?=(;))"), MATCHES, b"a;b;", [(b"a", (b"a", b";"))], b";b;"),
    (re.compile(rb"\w(?=\w)"), MATCHES, b"abc;", [(b"a", ()), (b"b", ())], b"c;"),
    (re.compile(rb"^\d"), MATCHES, b"12a", [(b"1", ()), (b"2", ())], b"a"),
    (re.compile(r"(\w+);"), {**MATCHES, **UTF8}, b"a;b;", [(b"a;", (b"a",)), (b"b;", (b"b",))], b""),
    # structs
    (Struct("!HB"), {}, b"\0\x01\x02\0\x03\x04\0", [(1, 2), (3, 4)], b"\0"),
    (Struct("!HB"), UTF8, b"\0\x01\x02", [(1, 2)], b""),
    (Struct("<3s"), LATIN, b"abcdef", [(b"abc",), (b"def",)], b""),
    (Struct("<2xB"), {}, b"??\x05??\x06?", [(5,), (6,)], b"?"),
    (Struct("2x"), {}, b"abcde", [(), ()], b"e"),
    (Named(), {}, b"\0\x01\x02\x03abc\0\x07\x01a\xff", [(b"", 258), (b"abc", 7)], b"\x01a\xff"),
    (Named(), UTF8, b"\x01a\0\x07", [(b"a", 7)], b""),
    # frames behind their length
    (LengthPrefix("!H"), {}, b"\0\x03abc\0\0\0\x01d\0", [b"abc", b"", b"d"], b"\0"),
    (LengthPrefix(), {}, b"\0\0\0\x02ab\0\0\0\x02c", [b"ab"], b"\0\0\0\x02c"),
    (LengthPrefix("<I"), UTF8, b"\x02\0\0\0\xc3\xa9", ["é"], b""),
    (LengthPrefix("B", strip=0), {}, b"\x01a\x00\x02bc", [b"\x01a", b"\x00", b"\x02bc"], b""),
    (LengthPrefix("!H", inclusive=True), {}, b"\0\x05abc\0\x02", [b"abc", b""], b""),
    (LengthPrefix("B", offset=2), {}, b"hi\x02abho\x00", [b"hi\x02ab", b"ho\x00"], b""),
    (LengthPrefix("B", offset=2, strip=3), {}, b"hi\x02abho\x00", [b"ab", b""], b""),
    (LengthPrefix("B", offset=1, inclusive=True), {}, b"h\x04ab", [b"h\x04ab"], b""),
    (LengthPrefix("B", adjustment=2), {}, b"\x01crc\x00cr", [b"crc", b"cr"], b""),
    (LengthPrefix("B", adjustment=-1), {}, b"\x03ab\x01", [b"ab", b""], b""),
    (LengthPrefix("b", adjustment=2), {}, b"\xff-\xfe", [b"-", b""], b""),
    (LengthPrefix("B", offset=1, adjustment=1, strip=1), {}, b"k\x01abk\x00c", [b"\x01ab", b"\x00c"], b""),
    (LengthPrefix("B", max_size=0), {}, b"\0\0", [b"", b""], b""),
    (Netstring(), {}, b"5:hello,0:,12:hello, world,3:a", [b"hello", b"", b"hello, world"], b"3:a"),
    (Netstring(), UTF8, "3:é,,1:a,".encode(), ["é,", "a"], b""),
    (Varint(), {}, b"\x03abc\x00\x81\x00d\x02e", [b"abc", b"", b"d"], b"\x02e"),
    (Varint(), {}, b"\x96\x01" + b"x" * 150 + b"\x01y", [b"x" * 150, b"y"], b""),
    (Varint(), LATIN, b"\x01\xe9", ["\xe9"], b""),
    # the user's own
    (Slip(), {}, b"\xc0ab\xdb\xdcc\xc0\xdb\xdd\xc0d", [b"", b"ab\xc0c", b"\xdb"], b"d"),
    (Slip(), LATIN, b"\xdb\xdc\xe9\xc0", ["\xc0\xe9"], b""),
    (Pairs(), {}, b"a=1;b=;c", [(b"a", b"1"), (b"b", b"")], b"c"),
    (Pairs(), UTF8, b"a=1;", [(b"a", b"1")], b""),
]

#: The same for chunks that are collected over several receives.
BIG_EXAMPLES = [
    (b"\r\n", UTF8, "é".encode() * LONG + b"\r\nshort\r\n", ["é" * LONG, "short"], b""),
    (re.compile(rb"\r?\n\r?\n"), {}, LONG_LINE + b"\r\n\r\nshort\n\n" + LONG_LINE, [LONG_LINE, b"short"], LONG_LINE),
    (re.compile(rb"(,+)(;)"), {}, LONG_LINE + b",,,;" + LONG_LINE + b",;", [LONG_LINE, LONG_LINE], b""),
    (re.compile(rb"(?<=x);"), {}, LONG_LINE + b";;y;x;", [LONG_LINE, b";y;x"], b""),
    (re.compile(rb"(x+);"), MATCHES, LONG_LINE + b";x;", [(LONG_LINE + b";", (LONG_LINE,)), (b"x;", (b"x",))], b""),
    (Struct(f"{LONG + 1}sB"), {}, b"a" * (LONG + 2) + b"b" * (LONG + 2), [(b"a" * (LONG + 1), 97), (b"b" * (LONG + 1), 98)], b""),
    (LengthPrefix("!I"), {}, LengthPrefix("!I").pack(LONG_LINE) * 2 + b"\0", [LONG_LINE] * 2, b"\0"),
    (LengthPrefix("!I", strip=0), {}, b"\0\0\x20\x64" + LONG_LINE, [b"\0\0\x20\x64" + LONG_LINE], b""),
    (Netstring(), {}, Netstring().pack(LONG_LINE) * 2 + b"0:", [LONG_LINE] * 2, b"0:"),
    (Varint(), UTF8, Varint().pack(LONG_LINE) * 2, [LONG_LINE.decode()] * 2, b""),
    (Slip(), {}, LONG_LINE + b"\xc0" + LONG_LINE + b"\xdb\xdc\xc0", [LONG_LINE, LONG_LINE + b"\xc0"], b""),
]


def ids(value):
    text = repr(value)
    return text if len(text) < 40 else text[:36] + "..."


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(("delimiter", "options", "data", "chunks", "rest"), EXAMPLES + BIG_EXAMPLES, ids=ids)
def test_chunks_of_every_kind_however_the_network_cuts_are_the_same(delimiter, options, data, chunks, rest, one_by_one):
    for number, pieces in enumerate(fragmentations(data)):
        if len(data) > LONG and number % 3 == 1:
            continue  # enough ways are left; of the long ones, the one byte at a time is tried below
        assert cut(delimiter, pieces, one_by_one, **options) == (chunks, rest), [len(piece) for piece in pieces]


@pytest.mark.parametrize(("delimiter", "options", "data", "chunks", "rest"), EXAMPLES + BIG_EXAMPLES, ids=ids)
def test_chunks_of_every_kind_through_a_stream_are_the_same(delimiter, options, data, chunks, rest, recorder):
    spread = framer_for(delimiter, **options).spread
    pieces = [data[:1], data[1:-1], data[-1:]]

    class Reading(Stream):
        read_delimiter = delimiter
        encoding = options.get("encoding")
        regex_search = options.get("regex_search", True)

        def on_read(self, *chunk):
            (only,) = (chunk,) if spread else chunk
            recorder((only.group(), only.groups()) if isinstance(only, re.Match) else [only])

        def on_end(self, rest):
            recorder("rest", rest)

    _, end = memory_pair(Reading)
    for piece in pieces:
        end.send(piece)
    end.close()
    end.wait_for()
    expected = [chunk if options.get("regex_search") is False else [chunk] for chunk in chunks]
    assert recorder == [*expected, ("rest", rest)]


@pytest.mark.parametrize(
    ("format", "data", "chunks", "rest"),
    [
        (b"b$", b"\x03abc\x00\x02d", [(b"abc",), (b"",)], b"\x02d"),
        (b"ih$5b", struct.pack("!ih3s5b", 7, 3, b"abc", 1, 2, 3, 4, 5), [(7, b"abc", 1, 2, 3, 4, 5)], b""),
        (b"H$H$", b"\0\x01a\0\x02bc\0\0\0\0\0", [(b"a", b"bc"), (b"", b"")], b"\0"),
        (b"<H", b"\x01\0\x02\0\x03", [(1,), (2,)], b"\x03"),
    ],
)
def test_netstruct_however_the_network_cuts_gives_the_same_fields(format, data, chunks, rest):  # noqa: A002
    delimiter = pytest.importorskip("netstruct").NetStruct(format)
    for pieces in fragmentations(data):
        assert cut(delimiter, pieces) == (chunks, rest)


def test_netstruct_of_no_bytes_is_refused():
    netstruct = pytest.importorskip("netstruct")
    for wrong, error in ((netstruct.NetStruct(b""), ReadDelimiterValueError), (netstruct.NetStruct, TypeError), (netstruct, TypeError)):
        with pytest.raises(error, match="read_delimiter"):
            framer_for(wrong)


def test_struct_by_duck_typing_that_ends_behind_its_fields_is_taken():
    class Short:
        minimum_size = 2

        def iter_unpack(self, data):
            data += yield 2
            yield (data,)

    assert cut(Short(), [b"a", b"bcd", b"e"]) == ([(b"ab",), (b"cd",)], b"e")


def test_struct_by_duck_typing_that_asks_for_nothing_is_bad_input():
    class Zero:
        minimum_size = 2

        def iter_unpack(self, data):
            while True:
                yield 0

    with pytest.raises(ValueError, match="asks for 0 bytes"):
        cut(Zero(), [b"ab"])


# ---- text that arrives in pieces

TEXT = "aé€𝄞b"

ENCODINGS = ["utf-8", "latin-1", "utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7", "shift_jis", "gb18030", "iso2022_jp", "cp1252"]


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_without_delimiter_however_the_network_cuts_is_the_same(encoding, one_by_one):
    text = "".join(letter for letter in TEXT + "あいa" if letter in letter.encode(encoding, "ignore").decode(encoding))
    data = text.encode(encoding)
    assert len(text) > 1
    for pieces in fragmentations(data):
        chunks, rest = cut(None, pieces, one_by_one, encoding=encoding)
        assert ("".join(chunks), rest.strip(b"\x1b(B-")) == (text, b""), pieces
        assert "" not in chunks


def test_text_without_delimiter_is_handed_out_as_far_as_it_is_complete():
    assert cut(None, [b"a\xc3", b"\xa9\xe2\x82", b"\xac", b"\xe2"], encoding="utf-8") == (["a", "é", "€"], b"\xe2")


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(
    ("encoding", "data", "text"),
    [
        ("utf-8", b"abc\xffdef", "abc"),
        ("utf-8", b"\xc3\xa9\xc3(", "é"),
        ("utf-8-sig", b"\xef\xbb\xbfab\xffc", "ab"),
        ("utf-16", b"\xff\xfea\0\0\xdcb\0", "a"),
        ("ascii", b"ab\x80", "ab"),
        ("shift_jis", b"a\x82\xa0\xff", "aあ"),
        ("utf-8", b"\xff", ""),
        ("utf-8-sig", b"\xef\xbb\xbf\xff", ""),
    ],
)
def test_text_in_front_of_a_bad_byte_is_handed_out_before_the_error(encoding, data, text, one_by_one):
    for pieces in fragmentations(data):
        framer = framer_for(None, encoding)
        inbox = Inbox(one_by_one)
        chunks = []
        with pytest.raises(UnicodeDecodeError):
            for piece in pieces:
                if one_by_one:
                    inbox.append(piece)
                    while (chunk := inbox.next(framer)) is not NOTHING:
                        chunks.append(chunk)
                else:
                    # Not extend(), which keeps nothing of what came before an error.
                    for chunk in inbox.feed(piece, framer):
                        chunks.append(chunk)  # noqa: PERF402
        assert "".join(chunks) == text


def test_delimiter_changed_behind_text_and_before_a_bad_byte_gets_that_byte():
    class Reading(Stream):
        encoding = "utf-8"

        def on_read(self, chunk):
            chunks.append(chunk)
            self.encoding = None

    chunks = []
    _, end = memory_pair(Reading)
    end.send(b"abc\xffdef")
    end.close()
    end.wait_for()
    assert chunks == ["abc", b"\xffdef"]


def test_decoder_of_one_stream_is_not_that_of_another():
    class Reading(Stream):
        encoding = "utf-16"

        def on_read(self, chunk):
            chunks.append(chunk)

    chunks = []
    ends = [memory_pair(Reading)[1] for _ in range(2)]
    ends[0].send(b"\xfe\xff")
    ends[1].send(b"\xff\xfe")
    for end, data in zip(ends, (b"\0a", b"b\0"), strict=True):
        end.send(data)
        end.close()
        end.wait_for()
    assert sorted(chunks) == ["a", "b"]


# ---- match objects


def test_match_stands_on_bytes_of_its_own():
    framer = framer_for(re.compile(rb"(\w+);"), None, False)
    data = bytearray(b"one;two;")
    match, end = framer.find(data, 0, 0)
    second, _ = framer.find(data, end, 0)
    data[:] = b"?" * len(data)  # which a memoryview of it would not allow, or show
    data += b"more"
    assert (match.group(1), second.group(1)) == (b"one", b"two")
    assert (type(second.string), second.string, second.span()) == (bytes, b"two;", (0, 4))


@pytest.mark.parametrize(
    ("pattern", "data"),
    [(rb"(?:(a$)|(a))", b"ax"), (rb"a(b(?!c)|bc|)?", b"abc"), (rb"(a)(?=b{200}(c?))", b"a" + b"b" * 200 + b"c"), (rb"a(?:\b(;)|)", b"ab")],
)
def test_match_that_looks_beyond_its_end_is_that_of_all_that_came(pattern, data):
    """Looked at alone, what it matched could match in another way."""
    match, end = framer_for(re.compile(pattern), None, False).find(data + b" " * 10_000, 0, 0)
    expected = re.match(pattern, data + b" " * 10_000)
    assert (match.regs, end) == (expected.regs, expected.end())


def test_many_short_matches_that_look_ahead_copy_little():
    """Each match has bytes of its own, but not all that came."""
    framer = framer_for(re.compile(rb"\w(?=\w)"), None, False)
    data = b"x" * 100_000
    copied = end = 0
    while (found := framer.find(data, end, 0)) is not None:
        match, end = found
        copied += len(match.string)
    assert end == len(data) - 1
    assert copied < 200 * len(data)


# ---- packing


@pytest.mark.parametrize(
    "framer",
    [
        *(LengthPrefix(), LengthPrefix("<H"), LengthPrefix("B", strip=1), LengthPrefix("!H", inclusive=True)),
        *(LengthPrefix("B", adjustment=-1), LengthPrefix("b", adjustment=3), Netstring(), Varint(), Varint(max_size=200)),
    ],
    ids=repr,
)
def test_pack_makes_what_find_takes_apart(framer):
    for data in (b"", b"a", b"abc", b"x" * 120, bytearray(b"ab"), memoryview(b"abc"), array.array("B", b"abc")):
        packed = framer.pack(data)
        assert type(packed) is bytes
        assert framer.find(packed + b"more", 0, 0) == (bytes(data), len(packed))


def test_pack_with_an_offset_puts_the_length_behind_what_comes_first():
    framer = LengthPrefix("!H", offset=2)
    assert framer.pack(b"hiabc") == b"hi\0\x03abc"
    assert framer.find(framer.pack(b"hiabc"), 0, 0) == (b"hi\0\x03abc", 7)
    assert LengthPrefix("!H", offset=2, inclusive=True).pack(b"hiabc") == b"hi\0\x07abc"
    assert framer.pack(b"hi") == b"hi\0\0"
    for short in (b"", b"h"):
        with pytest.raises(ValueError, match="less than the 2 in front of the length"):
            framer.pack(short)


@pytest.mark.parametrize(
    ("framer", "size"), [(LengthPrefix("B"), 256), (LengthPrefix("B", inclusive=True), 255), (LengthPrefix("b"), 128)], ids=repr
)
def test_pack_of_more_than_the_length_can_say_is_a_value_error(framer, size):
    assert len(framer.pack(bytes(size - 1))) == size
    with pytest.raises(ValueError, match="do not fit into the length"):
        framer.pack(bytes(size))


# ---- delimiters that make no sense


class Unfinished(Framer[bytes]):
    """Its find() is what a test wants."""

    def __init__(self, *results):
        self.results = list(results)

    def find(self, data, start, searched):
        result = self.results.pop(0)
        if isinstance(result, BaseException):
            raise result
        return result


class Flavour(enum.Enum):
    LINES = b"\n"


#: What is set, the error, and what its message says besides the attribute and the class.
BAD = [
    ({"read_delimiter": 0}, ValueError, "at least 1"),
    ({"read_delimiter": -5}, ValueError, "at least 1"),
    ({"read_delimiter": b""}, ValueError, "None delivers whatever arrives"),
    ({"read_delimiter": ""}, ValueError, "None delivers whatever arrives"),
    ({"read_delimiter": Struct("")}, ValueError, "Struct of 0 bytes"),
    ({"read_delimiter": Struct("0s0I")}, ValueError, "Struct of 0 bytes"),
    ({"read_delimiter": type("Zero", (Named,), {"minimum_size": 0})()}, ValueError, "of 0 bytes"),
    ({"read_delimiter": re.compile(b"")}, ValueError, "can match the empty string"),
    ({"read_delimiter": re.compile(rb"a*")}, ValueError, "can match the empty string"),
    ({"read_delimiter": re.compile(rb"\b")}, ValueError, "can match the empty string"),
    ({"read_delimiter": re.compile(rb"(?=a)|b")}, ValueError, "can match the empty string"),
    ({"read_delimiter": re.compile(rb"a*"), "regex_search": False}, ValueError, "can match the empty string"),
    ({"read_delimiter": re.compile(r"a*"), "encoding": "utf-8"}, ValueError, "can match the empty string"),
    ({"read_delimiter": re.compile(r"a+b")}, TypeError, r"re\.compile\(b'a\+b'\), or set encoding"),
    ({"read_delimiter": re.compile(r"é"), "encoding": "utf-8"}, ValueError, "give an ASCII pattern"),
    ({"read_delimiter": re.compile(r"\xe9"), "encoding": "utf-8"}, ValueError, "give an ASCII pattern"),
    ({"read_delimiter": re.compile(r"[^a-\xe9;]x"), "encoding": "utf-8"}, ValueError, "give an ASCII pattern"),
    ({"read_delimiter": re.compile(r"(?:a|(b[^\u20ac])){2,300}"), "encoding": "utf-8"}, ValueError, "give an ASCII pattern"),
    ({"read_delimiter": re.compile(r"€"), "encoding": "latin-1"}, ValueError, "no counterpart of bytes"),
    ({"read_delimiter": re.compile(r"\u00e9"), "encoding": "latin-1"}, ValueError, "no counterpart of bytes"),
    ({"read_delimiter": re.compile(r"(?u)a"), "encoding": "latin-1"}, ValueError, "no counterpart of bytes"),
    ({"read_delimiter": re.compile(r"a"), "encoding": "utf-16"}, ValueError, "of which ASCII is a part"),
    ({"read_delimiter": "\n", "encoding": "utf-16"}, ValueError, "writes ASCII as it is.*; give bytes, a number, or a Framer"),
    ({"read_delimiter": "€", "encoding": "latin-1"}, ValueError, "latin-1 cannot encode"),
    ({"read_delimiter": "\ud800"}, ValueError, "utf-8 cannot encode"),
    ({"read_delimiter": LengthPrefix}, TypeError, r"give an instance, such as LengthPrefix\(\)"),
    ({"read_delimiter": Slip}, TypeError, r"give an instance, such as Slip\(\)"),
    ({"read_delimiter": Named}, TypeError, "give None, bytes, str"),
    ({"read_delimiter": Struct}, TypeError, "give None, bytes, str"),
    ({"read_delimiter": Flavour.LINES}, TypeError, "of type Flavour; give None, bytes, str"),
    ({"read_delimiter": [b"\n"]}, TypeError, "of type list; give None, bytes, str"),
    ({"read_delimiter": 1.0}, TypeError, "of type float; give None, bytes, str"),
    ({"read_delimiter": math.nan}, TypeError, "of type float; give None, bytes, str"),
    ({"read_delimiter": True}, TypeError, "of type bool; give None, bytes, str"),
    ({"read_delimiter": False}, TypeError, "of type bool; give None, bytes, str"),
    ({"read_delimiter": bytearray(b"\n")}, TypeError, "of type bytearray; give None, bytes, str"),
]


BAD_CASES = [pytest.param(*case, id=ids(case[0]["read_delimiter"]) + " and ".join(list(case[0])[1:])) for case in BAD]


def expect(error, hint, *names):
    """Return a context that expects an InvalidReadDelimiterError of that kind, with a message that names these and the fix."""
    kind = ReadDelimiterTypeError if error is TypeError else ReadDelimiterValueError
    assert issubclass(kind, error)
    assert issubclass(kind, InvalidReadDelimiterError)
    return pytest.raises(kind, match="(?s)" + ".*".join((*names, "read_delimiter", hint)))


@pytest.mark.parametrize(("setting", "error", "hint"), BAD_CASES)
def test_bad_delimiter_on_a_class_is_refused_by_name(setting, error, hint):
    with expect(error, hint, "^Degenerate: "):
        type("Degenerate", (Stream,), setting)


@pytest.mark.parametrize(("setting", "error", "hint"), BAD_CASES)
def test_bad_delimiter_on_a_mixin_is_refused_by_name(setting, error, hint):
    mixin = type("Mixin", (), setting)
    with expect(error, hint, "^Mixed: "):
        type("Mixed", (mixin, Stream), {})


@pytest.mark.parametrize(("setting", "error", "hint"), BAD_CASES)
def test_bad_delimiter_on_an_instance_leaves_everything_as_it_was(setting, error, hint):
    chunks = []

    class Reading(Stream):
        read_delimiter = b"\n"
        encoding = setting.get("encoding")
        regex_search = setting.get("regex_search", True)

        def on_read(self, chunk):
            chunks.append(chunk)
            with expect(error, hint, "^Reading: "):
                self.read_delimiter = setting["read_delimiter"]
            with expect(error, hint):
                self.read(setting["read_delimiter"])

    stream, end = memory_pair(Reading)
    with expect(error, hint, "^Reading: "):
        stream.read_delimiter = setting["read_delimiter"]
    assert stream.read_delimiter == b"\n"
    end.send(b"one\ntwo\n" if "16" not in str(stream.encoding) else b"o\0n\0\nt\0w\0\n")
    end.close()
    end.wait_for()
    assert [bytes(chunk, "ascii") if isinstance(chunk, str) else chunk for chunk in chunks] in ([b"one", b"two"], [b"on", b"tw"])
    assert stream.read_delimiter == b"\n"
    assert stream.close_reason is CloseReason.PEER_ENDED


@pytest.mark.parametrize(("setting", "error", "hint"), BAD_CASES)
def test_bad_delimiter_on_an_existing_class_leaves_everything_as_it_was(setting, error, hint):
    class Base(Stream):
        encoding = setting.get("encoding")
        regex_search = setting.get("regex_search", True)

    class Lines(Base):
        read_delimiter = b"\n"

    class Inheriting(Base):
        pass

    with expect(error, hint, "^(Base|Inheriting): "):
        Base.read_delimiter = setting["read_delimiter"]
    with expect(error, hint, "^Lines: "):
        Lines.read_delimiter = setting["read_delimiter"]
    for cls, expected in ((Base, None), (Lines, b"\n"), (Inheriting, None)):
        assert cls.read_delimiter == expected
        assert cls().read_delimiter == expected
    assert "read_delimiter" not in vars(Inheriting)
    Lines.read_delimiter = 3
    assert Lines().read_delimiter == 3


@pytest.mark.parametrize(
    ("delimiter", "setting", "value", "error", "hint"),
    [
        (re.compile(r"\r?\n"), "encoding", None, TypeError, "or set encoding"),
        (re.compile(r"\r?\n"), "encoding", "utf-16", ValueError, "give an ASCII pattern"),
        ("\n", "encoding", "utf-16", ValueError, "give bytes, a number, or a Framer"),
        ("€", "encoding", "latin-1", ValueError, "latin-1 cannot encode"),
    ],
)
def test_encoding_that_does_not_go_with_the_delimiter_is_refused(delimiter, setting, value, error, hint):
    class Text(Stream):
        read_delimiter = delimiter
        encoding = "utf-8"

    stream = Text()
    for owner in (stream, Text):
        with expect(error, hint, "^Text: "):
            setattr(owner, setting, value)
    assert (stream.encoding, Text.encoding, Text().encoding) == ("utf-8",) * 3
    assert (stream.read_delimiter, Text().read_delimiter) == (delimiter, delimiter)


@pytest.mark.parametrize(
    ("value", "error"),
    [("no-such-thing", ValueError), ("hex", ValueError), ("rot13", ValueError), ("", ValueError), (b"utf-8", TypeError), (8, TypeError)],
)
def test_encoding_that_is_none_is_refused_by_name(value, error):
    with pytest.raises(error, match=r"Wrong\.encoding .*'utf-8'"):
        type("Wrong", (Stream,), {"encoding": value})
    stream = Stream()
    with pytest.raises(error, match=r"Stream\.encoding .*'utf-8'"):
        stream.encoding = value
    assert stream.encoding is None


@pytest.mark.parametrize(
    ("make", "error", "hint"),
    [
        (lambda: LengthPrefix("!HH"), ValueError, "'!HH' is not one integer; give one such as '!I'"),
        (lambda: LengthPrefix("!f"), ValueError, "is not one integer"),
        (lambda: LengthPrefix("4s"), ValueError, "is not one integer"),
        (lambda: LengthPrefix("?"), ValueError, "is not one integer"),
        (lambda: LengthPrefix("2x"), ValueError, "is not one integer"),
        (lambda: LengthPrefix(""), ValueError, "is not one integer"),
        (lambda: LengthPrefix("!Z"), ValueError, "'!Z': bad char"),
        (lambda: LengthPrefix("é"), ValueError, "format 'é'"),
        (lambda: LengthPrefix(b"!I"), TypeError, "format is a str"),
        (lambda: LengthPrefix(4), TypeError, "format is a str"),
        (lambda: LengthPrefix(max_size=-1), ValueError, "max_size .* not negative"),
        (lambda: LengthPrefix(max_size=1.5), TypeError, "max_size is a number of bytes, an int, or None"),
        (lambda: LengthPrefix(max_size=True), TypeError, "max_size is a number of bytes, an int, or None"),
        (lambda: LengthPrefix(offset=-1), ValueError, "offset .* not negative"),
        (lambda: LengthPrefix(strip=-1), ValueError, "strip .* not negative"),
        (lambda: LengthPrefix(offset="4"), TypeError, "offset is a number of bytes"),
        (lambda: LengthPrefix(adjustment=None), TypeError, "adjustment is a number of bytes"),
        (lambda: LengthPrefix(strip=False), TypeError, "strip is a number of bytes"),
        (lambda: Netstring(-1), ValueError, "Netstring: max_size .* not negative"),
        (lambda: Netstring("1"), TypeError, "Netstring: max_size is a number of bytes"),
        (lambda: Varint(max_size=-1), ValueError, "Varint: max_size .* not negative"),
        (lambda: Varint(max_size=b"1"), TypeError, "Varint: max_size is a number of bytes"),
    ],
)
def test_framer_of_senseless_sizes_is_refused(make, error, hint):
    kind = ReadDelimiterTypeError if error is TypeError else ReadDelimiterValueError
    with pytest.raises(kind, match=hint):
        make()


def test_framer_without_find_cannot_be_made():
    class Nothing(Framer[bytes]):
        pass

    with pytest.raises(TypeError, match="find"):
        Nothing()


def test_framers_of_equal_sizes_are_equal():
    for make in (LengthPrefix, Netstring, Varint):
        assert make(max_size=5) == make(max_size=5)
        assert hash(make(max_size=5)) == hash(make(max_size=5))
        assert make(max_size=5) != make(max_size=6)
    assert LengthPrefix("!I") != LengthPrefix("!H")
    assert Netstring() != Varint()


def test_framers_of_a_users_own_subclass_are_not_taken_for_each_other():
    """They may hold more than the library knows of; a delimiter that is equal to that of before is not set."""

    class Tagged(LengthPrefix):
        def __init__(self, tag):
            super().__init__("B")
            self.tag = tag

        def find(self, data, start, searched):
            found = super().find(data, start, searched)
            return (self.tag + found[0], found[1]) if isinstance(found, tuple) else found

    assert Tagged(b"a") != Tagged(b"b")
    chunks = []

    class Reading(Stream):
        read_delimiter = Tagged(b"a:")

        def on_read(self, chunk):
            chunks.append(chunk)
            self.read_delimiter = Tagged(b"b:")

    _, end = memory_pair(Reading)
    end.send(b"\x01x\x01y")
    end.close()
    end.wait_for()
    assert chunks == [b"a:x", b"b:y"]


@pytest.mark.parametrize(
    ("framer", "text"),
    [
        (LengthPrefix(), "LengthPrefix('!I', max_size=None)"),
        (LengthPrefix("B", 9, offset=2, strip=3), "LengthPrefix('B', max_size=9, offset=2, strip=3)"),
        (LengthPrefix(adjustment=-1, inclusive=True), "LengthPrefix('!I', max_size=None, adjustment=-1, inclusive=True)"),
        (LengthPrefix("!H", offset=2, strip=0), "LengthPrefix('!H', max_size=None, offset=2)"),
        (Netstring(5), "Netstring(max_size=5)"),
        (Varint(), "Varint(max_size=None)"),
    ],
)
def test_framer_is_shown_as_it_was_made(framer, text):
    assert repr(framer) == text
    assert eval(text) == framer


# ---- input that makes no sense


def watching(recorder, **attributes):
    """Return a class whose streams record what is told of them, and how they stand then."""

    class Watching(Stream):
        def on_read(self, *chunk):
            recorder("read", *chunk)

        def on_read_error(self, exception):
            recorder("read_error", type(exception), self.socket, self.closed, self.close_reason)

        def on_overflow_error(self, exception):
            recorder("overflow", exception.size, exception.limit, self.connected)
            super().on_overflow_error(exception)

        def on_end(self, rest):
            recorder("end", rest)

        def on_close(self):
            recorder("close", self.close_reason)

    return type("Watched", (Watching,), attributes)


#: Delimiter, encoding, input, the chunks in front of what is wrong, the error.
MALFORMED = [
    (Netstring(), None, b"1:a,01:b,", [b"a"], ValueError),
    (Netstring(), None, b"1:a,x", [b"a"], ValueError),
    (Netstring(), None, b"1:a,:", [b"a"], ValueError),
    (Netstring(), None, b"1:a,-1:", [b"a"], ValueError),
    (Netstring(), None, b"1:a, 1:b,", [b"a"], ValueError),
    (Netstring(), None, b"1:a,1_0:", [b"a"], ValueError),
    (Netstring(), None, "1:a,²:".encode("latin-1"), [b"a"], ValueError),
    (Netstring(), None, b"1:a,1:bc", [b"a"], ValueError),
    (Netstring(), None, b"0:," + b"1" * 11, [b""], ValueError),
    (Varint(), None, b"\x01a" + b"\x80" * 10, [b"a"], ValueError),
    (Varint(), None, b"\x01a" + b"\xff" * 9 + b"\x02", [b"a"], ValueError),
    (LengthPrefix("b"), None, b"\x01a\xff", [b"a"], ValueError),
    (LengthPrefix("B", inclusive=True), None, b"\x02a\x00", [b"a"], ValueError),
    (LengthPrefix("B", adjustment=-2), None, b"\x03a\x01", [b"a"], ValueError),
    (LengthPrefix("B", strip=3), None, b"\x02ab\x01a", [b""], ValueError),
    (b"\n", "utf-8", b"a\n\xc3\nb\n", ["a"], UnicodeDecodeError),
    (2, "utf-8", "aaé€".encode(), ["aa", "é"], UnicodeDecodeError),
    (3, "ascii", b"abc\x80bc", ["abc"], UnicodeDecodeError),
    (re.compile(rb"[;,]"), "utf-8", b"a;b\xff,c;", ["a"], UnicodeDecodeError),
    (re.compile(rb"(?<!a);"), "utf-8", b"b;\xff;", ["b"], UnicodeDecodeError),
    (Netstring(), "utf-8", b"1:a,1:\xff,", ["a"], UnicodeDecodeError),
    (None, "utf-8", b"abc\xffdef", ["abc"], UnicodeDecodeError),
]


@pytest.mark.parametrize("sent", ["at once", "byte by byte"])
@pytest.mark.parametrize(("delimiter", "encoding", "data", "chunks", "error"), MALFORMED, ids=ids)
def test_malformed_input_is_a_read_error_behind_the_chunks_before(delimiter, encoding, data, chunks, error, sent, recorder):
    stream, end = memory_pair(watching(recorder, read_delimiter=delimiter, encoding=encoding))
    pieces = [data] if sent == "at once" or delimiter is None else [data[place : place + 1] for place in range(len(data))]
    for piece in pieces:
        end.send(piece)
    end.wait_for()  # not closed from here: the stream closes by itself
    assert stream.close_error is not None
    assert recorder == [
        *(("read", chunk) for chunk in chunks),
        ("read_error", error, None, True, CloseReason.BAD_INPUT),
        ("close", CloseReason.BAD_INPUT),
    ]


class Broken(Framer[bytes]):
    """Lines, but for one of "bad": then it does what a test wants."""

    def __init__(self, bad):
        self.bad = bad

    def find(self, data, start, searched):
        end = data.find(b"\n", start)
        if end < 0:
            return None
        return self.bad(data, start, end) if data[start:end] == b"bad" else (bytes(data[start:end]), end + 1)


def raising(error):
    def bad(data, start, end):
        raise error

    return bad


BROKEN = [
    (raising(ValueError("no")), ValueError, "no"),
    (raising(KeyError("no")), KeyError, "no"),
    (raising(StopIteration()), StopIteration, ""),
    (lambda data, start, end: (b"", start), ValueError, r"find\(\) returned \d+ as the end of a chunk that begins at \d+"),
    (lambda data, start, end: (b"", start - 1), ValueError, r"find\(\) returned -?\d+ as the end"),
    (lambda data, start, end: (b"", len(data) + 1), ValueError, r"find\(\) returned \d+ as the end .* of \d+ bytes"),
    (lambda data, start, end: "chunk", TypeError, r"find\(\) returned 'chunk'; it returns \(chunk, end\)"),
    (lambda data, start, end: [b"", end], TypeError, r"find\(\) returned \[.*\]; it returns \(chunk, end\)"),
    (lambda data, start, end: 1.5, TypeError, r"find\(\) returned 1.5; it returns \(chunk, end\)"),
    (lambda data, start, end: (b"", end, end), ValueError, "too many values"),
    (lambda data, start, end: (b"", "end"), TypeError, ""),
]


@pytest.mark.parametrize("how", ["on_read", "on_read with encoding", "read"])
@pytest.mark.parametrize(("bad", "error", "message"), BROKEN)
def test_framer_of_the_users_that_fails_is_a_read_error_behind_the_chunks_before(bad, error, message, how, recorder):
    def reading(stream, chunk):
        recorder("read", chunk)
        if how == "read":
            while True:
                recorder("read", stream.read())

    encoding = "ascii" if "encoding" in how else None
    stream, end = memory_pair(watching(recorder, read_delimiter=Broken(bad), encoding=encoding, on_read=reading))
    end.send(b"one\ntwo\nbad\nthree\n")
    end.wait_for()
    lines = ("one", "two") if encoding else (b"one", b"two")
    reason = CloseReason.BAD_INPUT
    assert recorder == [*(("read", line) for line in lines), ("read_error", error, None, True, reason), ("close", reason)]
    assert re.search(message, str(stream.close_error))


def test_framer_that_returns_a_named_tuple_is_understood():
    class Found(tuple):
        __slots__ = ()

    assert cut(Unfinished(Found((b"ab", 2)), None), [b"abc"]) == ([b"ab"], b"c")


def test_framer_is_asked_again_only_when_the_bytes_it_wants_are_there():
    class Asking(Framer[bytes]):
        def find(self, data, start, searched):
            asked.append(len(data) - start)
            return 10 if len(data) - start < 10 else (bytes(data[start : start + 10]), start + 10)

    asked = []
    assert cut(Asking(), [b"x"] * 25) == ([b"x" * 10] * 2, b"x" * 5)
    assert asked == [1, 10, 1, 10, 1]


def test_framer_is_told_how_far_it_has_searched():
    class Telling(Framer[bytes]):
        def find(self, data, start, searched):
            told.append((bytes(data[start:]), searched))
            end = data.find(b";", start + searched)
            return None if end < 0 else (bytes(data[start:end]), end + 1)

    told = []
    assert cut(Telling(), [b"a;b", b"c", b";d"]) == ([b"a", b"bc"], b"d")
    assert told == [(b"a;b", 0), (b"b", 0), (b"bc", 1), (b"bc;d", 2), (b"d", 0)]


# ---- too much input

#: Delimiter, buffer_size, chunks that are allowed, the first bytes of one that is not, bytes announced or waiting, the limit.
OVERFLOWS = [
    (LengthPrefix("!I", max_size=100), 10, [b"x" * 100, b""], b"\0\0\0\x65", 101, 100),
    (LengthPrefix("!I", max_size=5), 1000, [b"x" * 5], b"\0\0\0\x06", 6, 5),
    (LengthPrefix("!H", max_size=5, inclusive=True), 1000, [b"x" * 5], b"\0\x08", 6, 5),
    (LengthPrefix("!I"), 100, [b"x" * 96], b"\0\0\0\x61", 101, 100),
    (LengthPrefix("!Q"), 100, [b"x" * 92], b"\xff" * 8, 2**64 + 7, 100),
    (Netstring(max_size=100), 10, [b"x" * 100, b""], b"101:", 101, 100),
    (Netstring(max_size=5), 1000, [b"x" * 5], b"6:", 6, 5),
    (Netstring(), 100, [b"x" * 96], b"97:", 101, 100),
    (Varint(max_size=200), 10, [b"x" * 200, b""], b"\xc9\x01", 201, 200),
    (Varint(), 100, [b"x" * 99], b"\x64", 101, 100),
]


@pytest.mark.parametrize("encoding", [None, "ascii"])
@pytest.mark.parametrize(("framer", "buffer_size", "allowed", "start", "size", "limit"), OVERFLOWS, ids=ids)
def test_announced_size_is_an_overflow_as_soon_as_it_is_known(framer, buffer_size, allowed, start, size, limit, encoding, recorder):
    stream, end = memory_pair(watching(recorder, read_delimiter=framer, buffer_size=buffer_size, encoding=encoding))
    for chunk in allowed:
        for byte in framer.pack(chunk):
            end.send(bytes((byte,)))
    for byte in start:
        assert not stream.closed
        end.send(bytes((byte,)))
    end.wait_for()
    chunks = [chunk.decode() if encoding else chunk for chunk in allowed]
    assert [event for event in recorder if event[0] == "read"] == [("read", chunk) for chunk in chunks]
    told = next(event for event in recorder if event[0] == "overflow")
    assert told[1:3] == (size, limit)
    assert recorder[-1] == ("close", CloseReason.OVERFLOW)
    assert "read_error" not in recorder.names()


@pytest.mark.parametrize(
    ("framer", "buffer_size", "allowed", "start", "size", "limit"), [case for case in OVERFLOWS if case[0].max_size is None], ids=ids
)
def test_announced_size_that_is_too_much_for_read_is_an_overflow(framer, buffer_size, allowed, start, size, limit, recorder):
    def on_connect(stream):
        for chunk in allowed:
            recorder("got", stream.read(framer) == chunk)
        with pytest.raises(StreamBufferOverflow) as caught:
            stream.read(framer)
        recorder(caught.value.size, caught.value.limit)
        stream.close()

    _, end = memory_pair(watching(recorder, buffer_size=buffer_size, on_connect=on_connect))
    end.send(b"".join(map(framer.pack, allowed)) + start)
    end.wait_for()
    recorder.wait_for("close")
    assert recorder == [*[("got", True)] * len(allowed), (size, limit), ("close", CloseReason.CLOSED_HERE)]


def test_overflow_that_a_framer_of_the_users_raises_is_an_overflow(recorder):
    bad = raising(StreamBufferOverflow("too long", 7, 5))
    _, end = memory_pair(watching(recorder, read_delimiter=Broken(bad)))
    end.send(b"one\nbad\nthree\n")
    end.wait_for()
    assert recorder == [("read", b"one"), ("overflow", 7, 5, False), ("close", CloseReason.OVERFLOW)]


@pytest.mark.parametrize(
    ("delimiter", "data", "size"),
    [
        (b"\n", b"x" * 101, 101),
        (re.compile(rb"\r?\n"), b"x" * 101, 101),
        (re.compile(rb"(?<=;)\n"), b"x" * 101, 101),
        (re.compile(rb"a+b"), b"a" * 101, 101),
        (Slip(), b"x" * 101, 101),
        (Netstring(), b"101", None),
    ],
    ids=ids,
)
def test_waiting_bytes_overflow_from_buffer_size_on(delimiter, data, size, recorder):
    _, end = memory_pair(watching(recorder, read_delimiter=delimiter, buffer_size=100))
    end.send(data[:-1])
    end.wait_for(lambda: end.all_taken)
    assert recorder == []
    end.send(data[-1:])
    if size is None:
        end.close()
        end.wait_for()
        assert recorder[0] == ("end", data)
    else:
        end.wait_for()
        assert recorder == [("overflow", size, 100, True), ("close", CloseReason.OVERFLOW)]


@pytest.mark.parametrize("delimiter", [200, Struct("200s"), LengthPrefix("B", max_size=200), Netstring(200), Varint(200)], ids=ids)
def test_delimiter_that_knows_its_size_raises_buffer_size_to_that(delimiter, recorder):
    data = delimiter.pack(b"x" * 200) if hasattr(delimiter, "pack") else b"x" * 200
    _, end = memory_pair(watching(recorder, read_delimiter=delimiter, buffer_size=10))
    for piece in (data[:150], data[150:-1], data[-1:]):
        end.send(piece)
    end.close()
    end.wait_for()
    assert recorder == [("read", b"x" * 200), ("end", b""), ("close", CloseReason.PEER_ENDED)]


def test_costly_pattern_is_cut_off_by_buffer_size(recorder):
    """One that looks at all that came, from each of its bytes on: what it may cost is what buffer_size allows."""
    looked_at = []

    class Costly(SplitAt):
        __slots__ = ()

        def find(self, data, start, searched):
            looked_at.append(len(data) - start)
            return super().find(data, start, searched)

        def split(self, data):
            looked_at.append(len(data))
            return super().split(data)

    pattern = re.compile(rb"a+b")
    stream, end = memory_pair(watching(recorder, buffer_size=4096))
    stream.read_delimiter = Costly(pattern, shape(pattern)[1], None)
    for _ in range(1000):
        end.send(b"a" * 100)
    with pytest.raises(BrokenPipeError):
        while True:
            end.wait_for(lambda: end.all_taken or stream.closed)
            end.send(b"a" * 100)
    assert recorder == [("overflow", 4100, 4096, True), ("close", CloseReason.OVERFLOW)]
    assert looked_at == list(range(100, 4200, 100))


def pack_lines(delimiter, lines):
    if hasattr(delimiter, "pack") and not isinstance(delimiter, Struct):
        return b"".join(map(delimiter.pack, lines))
    separator = b";" if isinstance(delimiter, re.Pattern) else delimiter if isinstance(delimiter, bytes) else b""
    return b"".join(line + separator for line in lines)


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(
    "delimiter",
    [b";", 5, re.compile(rb"[;,]"), re.compile(rb";(?!;)|;;"), Struct("5s"), LengthPrefix("B"), Netstring(), Varint(), Slip()],
    ids=ids,
)
def test_burst_of_short_chunks_is_delivered_whole(delimiter, one_by_one):
    """They come in receives of up to 256 KiB, four times what buffer_size allows to wait; but complete chunks never count."""
    chunks = []

    class Reading(Stream):
        read_delimiter = b"start" if one_by_one else delimiter

        def on_read(self, chunk):
            if chunk:
                chunks.append(chunk)
            else:
                self.read_delimiter = delimiter

        def on_overflow_error(self, exception):
            chunks.append(exception)

    lines = [b"%05d" % number for number in range(60_000)]
    data = b"\xc0".join([*lines, b""]) if isinstance(delimiter, Slip) else pack_lines(delimiter, lines)
    _, end = memory_pair(Reading)
    end.send(b"start" + data if one_by_one else data)
    end.close()
    end.wait_for()
    assert len(chunks) == 60_000
    assert chunks == lines


# ---- batches of which the rest is put back

NAN = struct.pack("!d", math.nan)[:-1] + b"\x05"

#: Delimiter, options, input of several chunks.
BATCHES = [
    (b"\r\n", {}, b"one\r\n\r\ntwo\r\nthr"),
    ("é", UTF8, "aébéc".encode()),
    (3, {}, b"abcdefghij"),
    (LONG + 1, {}, b"a" * (LONG + 1) + b"b" * (LONG + 1) + b"c"),
    (4, LATIN, b"\xe9bcd\xffbcd\0"),
    (Struct("!2xB"), {}, b"ab\x01cd\x02ef\x03g"),
    (Struct("<BxH"), {}, b"\x01?\x02\x03\x04!\x05\x06\x07"),
    (Struct("!d"), {}, NAN + b"\xff" * 8 + NAN + b"\x7f\xf0"),
    (Struct("<?"), {}, b"\x05\x00\xff\x01"),
    (Struct("4p"), {}, b"\x02abc\x00xyz\xffabc\x01"),
    (re.compile(rb"\r?\n"), {}, b"one\r\ntwo\n\r\n\nthr\r"),
    (re.compile(rb"(,+)|(;)"), {}, b"a,,b;,,,c,;d"),
    (re.compile(rb"<BR\s*/?>", re.IGNORECASE), {}, b"a<br>b<BR  />c<Br/>"),
    (re.compile(rb"\r?\n"), UTF8, "é\r\nè\n€".encode()),
    (re.compile(r"(,+)|(;)"), LATIN, b"\xe9,,\xe8;,,,\xff,;d"),
]


@pytest.mark.parametrize(("delimiter", "options", "data"), BATCHES, ids=ids)
def test_batch_put_back_is_byte_for_byte_what_was_not_taken(delimiter, options, data):
    framer = framer_for(delimiter, **options)
    assert framer.splits
    # What the plainest reader, one by one, has left after each chunk.
    inbox = Inbox(True)
    inbox.append(data)
    chunks, rests = [], [data]
    while (chunk := inbox.next(framer)) is not NOTHING:
        chunks.append(chunk)
        rests.append(bytes(inbox.data[inbox.start :]))
    assert len(chunks) > 1
    for taken in range(len(chunks) + 1):
        inbox = Inbox()
        batch = iter(inbox.feed(data, framer))
        assert [repr(next(batch)) for _ in range(taken)] == [repr(chunk) for chunk in chunks[:taken]]
        inbox.put_back(framer)
        assert (len(inbox), inbox.take_all()) == (len(rests[taken]), rests[taken])


@pytest.mark.parametrize(("delimiter", "options", "data"), BATCHES, ids=ids)
def test_batch_behind_waiting_bytes_is_put_back_with_them(delimiter, options, data):
    """The first chunk began in an earlier receive."""
    framer = framer_for(delimiter, **options)
    for begun in (1, len(data) // 3):
        inbox = Inbox()
        taken = list(inbox.feed(data[:begun], framer))
        batch = iter(inbox.feed(data[begun:], framer))
        taken.extend(next(batch) for _ in range(1))
        inbox.put_back(framer)
        rest = inbox.take_all()
        chunks, left = cut(delimiter, [data], **options)
        again, left_again = cut(delimiter, [rest], **options)
        assert (repr([*taken, *again]), left_again) == (repr(chunks), left)


@pytest.mark.parametrize("how", ["read_delimiter", "read"])
@pytest.mark.parametrize(("delimiter", "options", "data"), BATCHES, ids=ids)
def test_batch_left_in_a_callback_gives_the_rest_byte_for_byte(delimiter, options, data, how):
    got = []

    class Reading(Stream):
        read_delimiter = delimiter
        encoding = options.get("encoding")

        def on_read(self, *chunk):
            got.append(chunk)
            if how == "read_delimiter" or isinstance(self.read_delimiter, re.Pattern):
                self.read_delimiter = None
            if self.encoding is not None:
                self.encoding = None
            if how == "read":
                got.append(self.read(None))

        def on_end(self, rest):
            got.append(rest)

    stream, end = memory_pair(Reading)
    stream._receive_size = 256 * 1024  # all in one batch
    end.send(data)
    end.close()
    end.wait_for()
    framer = framer_for(delimiter, **options)
    inbox = Inbox(True)
    inbox.append(data)
    first = inbox.next(framer)
    assert repr(got[0]) == repr(first if framer.spread else (first,))
    assert b"".join(part[0] if isinstance(part, tuple) else part for part in got[1:]) == inbox.take_all()


# ---- work: no chunk that grows is looked at or copied again and again


class CountedArray(bytearray):
    """Counts the bytes that are searched and copied; stands for the bytearray in which an Inbox collects a long chunk."""

    work = 0

    def __init__(self, data=b""):
        super().__init__(data)
        CountedArray.work += len(self)

    def __iadd__(self, data):
        CountedArray.work += len(data)
        return super().__iadd__(data)

    def __getitem__(self, where):
        found = super().__getitem__(where)
        if isinstance(where, slice):
            CountedArray.work += len(found)
        return found

    def __delitem__(self, where):
        # Bytes are taken off the front without moving the others.
        assert where.start in (None, 0)
        super().__delitem__(where)

    def find(self, what, start=0, end=None):
        found = super().find(what, start, len(self) if end is None else end)
        CountedArray.work += (min(len(self), len(self) if end is None else end) if found < 0 else found) - start
        return found


class CountedPattern:
    """Counts the bytes that are searched."""

    groups = 0

    def __init__(self, pattern):
        self.pattern = pattern

    def search(self, data, start=0):
        match = self.pattern.search(data, start)
        CountedArray.work += (len(data) if match is None else match.end()) - start
        return match

    def split(self, data):
        CountedArray.work += len(data)
        return self.pattern.split(data)


def counted_pattern(pattern):
    return lambda size: SplitAt(CountedPattern(re.compile(pattern)), shape(re.compile(pattern))[1], None)


GROWING = [
    pytest.param(lambda size: Delimited(b"\r\n"), b"", b"\r\n", id="bytes"),
    pytest.param(lambda size: Fixed(size), b"", b"", id="int"),
    pytest.param(lambda size: framer_for(Struct(f"{size}s")), b"", b"", id="Struct"),
    pytest.param(lambda size: LengthPrefix("!I"), "LengthPrefix", b"", id="LengthPrefix"),
    pytest.param(lambda size: Netstring(), "Netstring", b",", id="Netstring"),
    pytest.param(lambda size: Varint(), "Varint", b"", id="Varint"),
    pytest.param(counted_pattern(rb"\r?\n\r?\n"), b"", b"\n\n", id="pattern"),
    pytest.param(lambda size: Slip(), b"", b"\xc0", id="Framer"),
]


def work_of_one_chunk(make, front, behind, size, piece, one_by_one):
    """Return how many bytes are searched and copied for one chunk of `size` bytes."""
    framer = make(size)
    if isinstance(front, str):
        front = framer.pack(memoryview(bytes(size)))[: -size - len(behind)]
    inbox = Inbox(one_by_one or not framer.splits)
    CountedArray.work = 0
    data = b"x" * piece
    found = []

    def receive(data):
        if inbox.one_by_one:
            inbox.append(data)
            chunk = inbox.next(framer)
            if chunk is not NOTHING:
                found.append(chunk)
        else:
            found.extend(inbox.feed(data, framer))

    if front:
        receive(front)
    for _ in range(size // piece):
        assert not found
        receive(data)
    if behind:
        assert not found
        receive(behind)
    (chunk,) = found
    assert len(chunk[0] if isinstance(chunk, tuple) else chunk) == size
    return CountedArray.work


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(("make", "front", "behind"), GROWING)
def test_long_chunk_over_many_receives_costs_in_proportion_to_its_length(make, front, behind, one_by_one, monkeypatch):
    """Counted in bytes and not in time: eight times the bytes are eight times the work, not 64 times."""
    monkeypatch.setattr(_inbox, "bytearray", CountedArray, raising=False)
    mib = 1024 * 1024
    small = work_of_one_chunk(make, front, behind, 2 * mib, 16 * 1024, one_by_one)
    large = work_of_one_chunk(make, front, behind, 16 * mib, 16 * 1024, one_by_one)
    assert 2 * mib <= small <= 5 * 2 * mib
    assert 7 * small <= large <= 9 * small


def test_work_that_is_quadratic_would_be_counted(monkeypatch):
    """The test above can fail: for a pattern without a limit the chunk is searched from its start each time."""
    monkeypatch.setattr(_inbox, "bytearray", CountedArray, raising=False)
    make = counted_pattern(rb"\r*\n")
    assert make(0).most is None
    small = work_of_one_chunk(make, b"", b"\n", 1 << 16, 4096, True)
    large = work_of_one_chunk(make, b"", b"\n", 1 << 19, 4096, True)
    assert large > 40 * small


@pytest.mark.parametrize("make", [LengthPrefix, Netstring, Varint])
def test_many_short_frames_one_by_one_are_not_copied_again_for_each(make):
    framer = make()
    inbox = Inbox(True)
    data = framer.pack(b"frame") * 20_000
    inbox.append(data)
    for _ in range(19_999):
        assert inbox.next(framer) == b"frame"
        assert inbox.data is data
    assert inbox.next(framer) == b"frame"
    assert inbox.next(framer) is NOTHING


@pytest.mark.parametrize(
    ("pattern", "most"), [(rb"\r?\n", 2), (rb"a{3}(b|cd)", 5), (rb"a+", None), (rb"(a|bc){1,9}", 18), (rb"(ab?)\1", 4)]
)
def test_shape_tells_how_long_a_match_can_be(pattern, most):
    assert shape(re.compile(pattern))[1:3] == (most, False)


@pytest.mark.parametrize(
    "pattern", [rb"(?<=a)b", rb"a$", rb"^a", rb"a(?!b)", rb"(a|b\b)+", rb"(?:a|(b(?=c)))", rb"(a)(?(1)b|\Bc)", rb"(?>a\b)"]
)
def test_shape_tells_that_a_pattern_looks_around(pattern):
    assert shape(re.compile(pattern))[2]


@pytest.mark.parametrize("one_by_one", [False, True])
def test_read_in_a_callback_that_is_no_on_read_searches_what_waits_again(one_by_one, recorder):
    """What was searched in vain for one delimiter, or waits until it is long enough, says nothing about another."""

    class Reading(Stream):
        read_delimiter = LengthPrefix("B") if one_by_one else 100

        def on_write(self):
            recorder(self.read(b";"), self.read(b";"))

        def on_read(self, chunk):
            recorder("read", chunk)

    stream, end = memory_pair(Reading)
    end.send(b"Pone;two;three")
    end.wait_for(lambda: end.all_taken)
    stream.write(b"go")
    end.wait_for(2)
    recorder.wait_for((b"Pone", b"two"))
    end.close()
    end.wait_for()
    assert recorder == [(b"Pone", b"two")]


# ---- Patterns without a longest match

#: Patterns, and the bytes in which their matches can end; None if any.
LAST_BYTES = [
    (rb"\r*\n", b"\n"),
    (rb"a+b?", b"ab"),
    (rb"(?:x|yz)+", b"xz"),
    (rb"(a|b)c*", b"abc"),
    (rb"[,;]\s*", b",; \t\n\r\f\v"),
    (rb"x[0-3]{2,}", b"0123"),
    (rb"\d+-?", b"0123456789-"),
    (rb".*?\n", b"\n"),
    (rb"x.", None),
    (rb"a[^b]", None),
    (rb"(?i)a", None),
    (rb"(a)\1", None),
    (rb"\n(?=x)", None),
    (rb"x\w", None),
    (rb"(?i:a)", None),
]


@pytest.mark.parametrize(("pattern", "last"), LAST_BYTES, ids=repr)
def test_last_bytes_of_a_pattern_are_known(pattern, last):
    ends = shape(re.compile(pattern))[3]
    assert (None if ends is None else {byte for byte in range(256) if ends.match(bytes([byte]))}) == (None if last is None else set(last))


class Unsearched:
    """Stands for a pattern that must not be tried."""

    def search(self, *args):
        raise AssertionError

    match = search


@pytest.mark.parametrize("regex_search", [True, False])
def test_pattern_without_a_longest_match_is_not_tried_again_before_it_can_end(regex_search):
    framer = framer_for(re.compile(rb"[^\n]*\r*\n" if not regex_search else rb"\r*\n"), regex_search=regex_search)
    assert framer.find(b"x" * 10, 0, 0) is None
    pattern, framer.pattern = framer.pattern, Unsearched()
    try:
        assert framer.find(b"x" * 20 + b"\r", 0, 10) is None
    finally:
        framer.pattern = pattern
    assert framer.find(b"x" * 20 + b"\r\n", 0, 21)[1] == 22


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([rb"\r*\n", rb"-+>", rb"(?:ab|-)*\n", rb"a?-{2,}\n", rb"[ab]*>"]),
    st.lists(st.text("ab->\r\n", max_size=6).map(str.encode), max_size=12),
)
def test_pattern_without_a_longest_match_cuts_as_the_plainest_search_does(pattern, pieces):
    compiled, buffer, wanted = re.compile(pattern), b"", []
    for piece in pieces:
        buffer += piece
        while match := compiled.search(buffer):
            wanted.append(buffer[: match.start()])
            buffer = buffer[match.end() :]
    inbox, framer, got = Inbox(one_by_one=True), framer_for(compiled), []
    for piece in pieces:
        inbox.append(piece)
        while (chunk := inbox.next(framer)) is not NOTHING:
            got.append(chunk)
    assert (got, inbox.take_all()) == (wanted, buffer)
