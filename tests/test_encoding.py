"""`encoding`: chunks as text, with every delimiter, however the bytes are cut, and what is no text."""

import codecs
import logging
import re
from struct import Struct

import pytest
from gevent.event import Event
from waiting import nothing_is_kept, turns, unread, until  # noqa: F401

from pants_green import ChannelClosed, CloseReason, Connection, InvalidReadDelimiterError, Stream
from pants_green.framing import Framer, LengthPrefix, Netstring, Varint
from pants_green.testing import fragmentations, memory_pair

#: One character of 1, 2, 3 and 4 bytes each, then one that is made of several.
TEXT = "aé€😀e\u0301Ωあ"


class TwoDigits(Framer):
    """Two ASCII digits, as a number."""

    def find(self, data, start, searched):
        if len(data) < start + 2:
            return 2
        return int(bytes(data[start : start + 2])), start + 2


class Pairs(Framer):
    """Two bytes each."""

    def find(self, data, start, searched):
        if len(data) < start + 2:
            return 2
        return bytes(data[start : start + 2]), start + 2


def chunks_of(recorder, name="on_read"):
    """Return what on_read, or whatever else was recorded under that name, got."""
    return [event[1] if len(event) == 2 else event[1:] for event in recorder if event[0] == name]


def only(server):
    """Return the stream of a server once it has one."""
    until(lambda: len(server.channels) == 1)
    return server.channels.values()[0]


def heard(recorder, data, **attributes):
    """Yield the events of a stream of these attributes without the first and the last, for each way of cutting `data`."""
    for pieces in fragmentations(data):
        recorder.clear()
        _stream, end = memory_pair(recorder.of(Stream, **attributes))
        for piece in pieces:
            end.send(piece)
        end.shutdown_output()
        recorder.wait_for("on_close")
        yield recorder[1:-1]


# ---- Each kind of delimiter

EURO = "€".encode()

KINDS = [
    pytest.param(b"\r\n", f"{TEXT}\r\n\r\nb\r\n".encode() + EURO[:2], [TEXT, "", "b"], EURO[:2], id="bytes"),
    pytest.param("\r\n", f"{TEXT}\r\n\r\nb\r\n".encode() + EURO[:2], [TEXT, "", "b"], EURO[:2], id="str"),
    pytest.param("€", f"{TEXT}€b€".encode() + EURO[:2], ["aé", "😀e\u0301Ωあ", "b"], EURO[:2], id="str not ASCII"),
    pytest.param(3, "€aéxyz".encode() + EURO[:2], ["€", "aé", "xyz"], EURO[:2], id="int"),
    pytest.param(re.compile("[;,]"), f"{TEXT};b,".encode() + EURO[:1], [TEXT, "b"], EURO[:1], id="regex of str"),
    pytest.param(re.compile(rb"[;,]"), f"{TEXT};b,".encode() + EURO[:1], [TEXT, "b"], EURO[:1], id="regex of bytes"),
    pytest.param(re.compile(";(?=x)"), f"{TEXT};xb;x".encode() + EURO[:1], [TEXT, "xb"], b"x" + EURO[:1], id="regex that looks around"),
    pytest.param(re.compile("(;)(,)?x"), f"{TEXT};xb;,x".encode() + EURO[:1], [TEXT, "b"], EURO[:1], id="regex with groups"),
    pytest.param(LengthPrefix("!H"), b"\0\4a" + EURO + b"\0\0\0\3" + EURO + b"\0\4", ["a€", "", "€"], b"\0\4", id="LengthPrefix"),
    pytest.param(Netstring(), b"3:" + EURO + b",0:,1:a,9:" + EURO, ["€", "", "a"], b"9:" + EURO, id="Netstring"),
    pytest.param(Varint(), b"\3" + EURO + b"\1a" + b"\x81", ["€", "a"], b"\x81", id="Varint"),
    pytest.param(Pairs(), "aaéb".encode(), ["aa", "é"], b"b", id="Framer of bytes"),
    pytest.param(TwoDigits(), b"42171", [42, 17], b"1", id="Framer of numbers"),
]


@pytest.mark.parametrize(("delimiter", "data", "chunks", "rest"), KINDS)
def test_chunks_are_text_however_the_bytes_are_cut(recorder, delimiter, data, chunks, rest):
    wanted = [*(("on_read", chunk) for chunk in chunks), ("on_end", rest)]
    for events in heard(recorder, data, read_delimiter=delimiter, encoding="utf-8"):
        assert events == wanted
        assert {type(event[1]) for event in events[:-1]} == {type(chunks[0])}
        assert type(events[-1][1]) is bytes


@pytest.mark.parametrize(("delimiter", "data", "chunks", "rest"), KINDS)
def test_chunks_are_text_over_a_socket(server_of, peer, recorder, delimiter, data, chunks, rest):
    one = peer(server_of(recorder.of(Stream, read_delimiter=delimiter, encoding="utf-8")))
    for number in range(len(data)):
        one.send(data[number : number + 1])
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert chunks_of(recorder)[: len(chunks)] == chunks


@pytest.mark.parametrize(("delimiter", "data", "chunks", "rest"), KINDS)
def test_read_returns_text(recorder, delimiter, data, chunks, rest):
    def on_connect(stream):
        for _ in chunks:
            recorder("read", stream.read(delimiter))

    for _events in heard(recorder, data, on_connect=on_connect, read_delimiter=100, encoding="utf-8"):
        assert chunks_of(recorder, "read") == chunks


def test_struct_fields_stay_bytes(recorder):
    def on_connect(stream):
        recorder("read", *stream.read(Struct("!B3s")))

    wanted = [("read", 1, EURO), ("on_read", 2, EURO), ("on_read", 3, b"\xff\xff\xff"), ("on_end", b"\4")]
    data = b"\1" + EURO + b"\2" + EURO + b"\3\xff\xff\xff\4"
    for events in heard(recorder, data, on_connect=on_connect, read_delimiter=Struct("!B3s"), encoding="utf-8"):
        assert events == wanted


@pytest.mark.parametrize("pattern", [re.compile(r"(\w+)=(.*?);"), re.compile(rb"(\w+)=(.*?);")], ids=["str", "bytes"])
def test_match_objects_stay_bytes(recorder, pattern):
    for events in heard(recorder, "a=€;b=\N{DEGREE SIGN};".encode(), read_delimiter=pattern, encoding="utf-8", regex_search=False):
        *matches, _end = events
        assert [event[1].groups() for event in matches] == [(b"a", EURO), (b"b", b"\xc2\xb0")]


# ---- No delimiter: characters that are cut


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-16-le", "utf-16-be", "utf-16", "utf-32", "utf-8-sig", "gb18030", "utf-7", "UTF8", "u8"],
)
def test_s4_13_none_delivers_text_at_once_and_never_half_a_character(recorder, encoding):
    data = TEXT.encode(encoding)
    for events in heard(recorder, data, encoding=encoding):
        *read, end = events
        assert "".join(event[1] for event in read) == TEXT
        assert "" not in [event[1] for event in read]
        assert end == ("on_end", b"")


@pytest.mark.parametrize("encoding", ["shift_jis", "euc_jp", "iso2022_jp", "big5", "latin-1", "cp1252", "ascii", "koi8-r"])
def test_none_delivers_text_in_other_encodings(recorder, encoding):
    text = {"latin-1": "aé", "cp1252": "€é", "ascii": "abc", "koi8-r": "Привет", "big5": "a中文b"}.get(encoding, "aあいbカ漢字c")
    for events in heard(recorder, text.encode(encoding), encoding=encoding):
        assert "".join(event[1] for event in events[:-1]) == text
        assert events[-1] == ("on_end", b"")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32", "utf-8-sig", "utf-16-be", "gb18030", "iso2022_jp", "utf-7"])
@pytest.mark.parametrize("before", ["another delimiter", "a read"])
def test_none_after_something_else_delivers_the_same_text(recorder, encoding, before):
    # From then on the stream finds chunks one by one.
    text = "aあいbカ漢字c"

    def on_connect(stream):
        if before == "a read":
            recorder("read", stream.read(Struct("!H")))

    def on_read(stream, *_):
        stream.read_delimiter = None

    delimiter = None if before == "a read" else Struct("!H")
    kind = {"on_connect": on_connect, "on_read": on_read, "encoding": encoding, "read_delimiter": delimiter}
    for events in heard(recorder, b"\0\1" + text.encode(encoding), **kind):
        first, *read, end = events
        assert first[1] in (1, (1,))
        assert "".join(event[1] for event in read) == text
        assert end == ("on_end", b"")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_mark_that_comes_alone_is_no_text_when_chunks_are_found_one_by_one(recorder, encoding):
    def on_connect(stream):
        recorder("read", stream.read(Struct("!B")))  # bytes, in whatever encoding

    for events in heard(recorder, b"\7" + "abc".encode(encoding), on_connect=on_connect, encoding=encoding):
        assert "".join(event[1] for event in events[1:-1]) == "abc"


def test_character_that_never_gets_whole_is_the_rest_of_on_end_as_bytes(server_of, peer, recorder):
    one = peer(server_of(recorder.of(Stream, encoding="utf-8")))
    one.send(b"abc\xf0\x9f")
    recorder.wait_for(("on_read", "abc"))
    one.send(b"\x98")
    one.shutdown_output()
    recorder.wait_for("on_close")
    assert recorder[1:] == [("on_read", "abc"), ("on_end", b"\xf0\x9f\x98"), ("on_close",)]


def test_streams_of_one_class_do_not_share_half_a_character(server_of, peer, recorder):
    server = server_of(recorder.of(Stream, encoding="utf-8"))
    first, second = peer(server), peer(server)
    first.send(b"1\xe2")
    recorder.wait_for(("on_read", "1"))
    second.send(b"2\xc3")
    recorder.wait_for(("on_read", "2"))
    first.send(b"\x82\xac")
    recorder.wait_for(("on_read", "€"))
    second.send(b"\xa9")
    recorder.wait_for(("on_read", "é"))


def test_streams_of_one_class_do_not_share_a_byte_order(server_of, peer, recorder):
    server = server_of(recorder.of(Stream, encoding="utf-16"))
    first, second = peer(server), peer(server)
    first.send(codecs.BOM_UTF16_BE)
    until(lambda: len(server.channels) == 2)
    turns()
    second.send(codecs.BOM_UTF16_LE + "xy".encode("utf-16-le"))
    recorder.wait_for(("on_read", "xy"))
    first.send("ab".encode("utf-16-be"))
    recorder.wait_for(("on_read", "ab"))
    second.send("z".encode("utf-16-le"))
    recorder.wait_for(("on_read", "z"))


def test_read_none_of_text_waits_for_the_whole_character(server_of, peer, recorder):
    def on_connect(stream):
        recorder("read", stream.read(None))
        recorder("read", stream.read(None))

    server = server_of(recorder.of(Stream, on_connect=on_connect, encoding="utf-8", read_delimiter=b"\n"))
    one = peer(server)
    one.send(b"a\xe2")
    recorder.wait_for(("read", "a"))
    one.send(b"\x82")
    until(lambda: unread(only(server)) == 2)
    one.send(b"\xacb\nc\n")
    recorder.wait_for(("read", "€b\nc\n"))


# ---- Where it is set


@pytest.mark.parametrize("where", ["class", "on_connect", "constructor", "instance"])
def test_encoding_may_be_set_on_the_class_and_on_an_instance(server_of, peer, recorder, where):
    class Kind(Connection):
        read_delimiter = "\n"

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if where == "constructor":
                self.encoding = "latin-1"

        def on_connect(self):
            if where == "on_connect":
                self.encoding = "latin-1"
            recorder("connected")

        def on_read(self, line):
            recorder(line, self.encoding)

    if where == "class":
        Kind.encoding = "latin-1"
    server = server_of(Kind)
    one = peer(server)
    recorder.wait_for("connected")
    if where == "instance":
        only(server).encoding = "latin-1"
    one.send(b"\xe9\n")
    recorder.wait_for(("é", "latin-1"))
    assert Kind.encoding == ("latin-1" if where == "class" else None)
    assert Connection.encoding is None


def test_subclass_may_take_the_encoding_back(server_of, peer, recorder):
    class Text(Connection):
        encoding = "utf-8"

    one = peer(server_of(recorder.of(Text, encoding=None)))
    one.send(b"\xff")
    recorder.wait_for(("on_read", b"\xff"))


@pytest.mark.parametrize(
    "delimiter",
    [b";", 1, re.compile(rb";"), re.compile(rb";(?!x)"), LengthPrefix("!H")],
    ids=["bytes", "int", "regex", "regex that looks around", "LengthPrefix"],
)
def test_encoding_changed_inside_a_batch_counts_from_the_next_chunk_on(recorder, delimiter):
    def on_read(stream, chunk):
        stream.count = getattr(stream, "count", 0) + 1
        if stream.count < 5:
            stream.encoding = ["latin-1", None, "cp437", None][stream.count - 1]

    chunks = [b"a", b"\xe9", b"\xe9", b"\x81", b"\xff"]
    if isinstance(delimiter, LengthPrefix):
        data = b"".join(map(delimiter.pack, chunks))
    else:
        data = b"".join(chunk + (b"" if delimiter == 1 else b";") for chunk in chunks)
    for events in heard(recorder, data, read_delimiter=delimiter, encoding="utf-8", on_read=on_read):
        assert [event[1] for event in events[:-1]] == ["a", "é", b"\xe9", "ü", b"\xff"]


def test_encoding_changed_while_half_a_character_waits(server_of, peer, recorder):
    server = server_of(recorder.of(Stream, encoding="utf-8"))
    one = peer(server)
    one.send(b"a\xc3")
    recorder.wait_for(("on_read", "a"))
    only(server).encoding = "latin-1"
    recorder.wait_for(("on_read", "Ã"))
    one.send(b"\xa9")
    recorder.wait_for(("on_read", "©"))
    only(server).encoding = None
    one.send(b"\xa9")
    recorder.wait_for(("on_read", b"\xa9"))


def test_encoding_changed_while_a_callback_blocks(server_of, peer, recorder):
    gate = Event()

    def on_read(stream, chunk):
        if chunk == "a":
            gate.wait()

    server = server_of(recorder.of(Stream, encoding="utf-8", read_delimiter=b"\n", on_read=on_read))
    one = peer(server)
    one.send(b"a\n\xe9\n")
    recorder.wait_for(("on_read", "a"))
    only(server).encoding = "latin-1"
    gate.set()
    recorder.wait_for(("on_read", "é"))


def test_str_delimiter_is_encoded_anew_when_the_encoding_changes(server_of, peer, recorder):
    def on_read(stream, chunk):
        stream.encoding = "latin-1"

    one = peer(server_of(recorder.of(Stream, encoding="utf-8", read_delimiter="é", on_read=on_read)))
    one.send(b"1\xc3\xa92\xe93\xc3\xe9")
    recorder.wait_for(lambda events: len(chunks_of(events)) == 3)
    assert chunks_of(recorder) == ["1", "2", "3Ã"]


# ---- What is no text


@pytest.mark.parametrize(
    ("delimiter", "data"),
    [
        (b"\n", b"good\n\xe2\x82\xac\nb\xff\nnever\n"),
        (4, b"good\xe2\x82\xac.b\xff..nev."),
        (re.compile(";"), b"good;\xe2\x82\xac;b\xff;never;"),
        (Netstring(), b"4:good,3:\xe2\x82\xac,2:b\xff,1:n,"),
        (b"\n", b"good\n\xe2\x82\xac\n\xe2\x82\nnever\n"),
    ],
    ids=["bytes", "int", "regex", "Netstring", "cut short"],
)
def test_undecodable_chunk_is_on_read_error_after_the_chunks_before(recorder, delimiter, data):
    def on_read_error(stream, exception):
        recorder("on_read_error", type(exception), stream.closed, stream.socket is None)

    kind = {"on_read_error": on_read_error, "read_delimiter": delimiter, "encoding": "utf-8"}
    euro = "€." if delimiter == 4 else "€"
    for pieces in fragmentations(data):
        recorder.clear()
        stream, end = memory_pair(recorder.of(Stream, **kind))
        for piece in pieces:
            end.send(piece)
        recorder.wait_for("on_close")
        wanted = [("on_read", "good"), ("on_read", euro), ("on_read_error", UnicodeDecodeError, True, True), ("on_close",)]
        assert recorder[1:] == wanted, pieces
        assert stream.close_reason is CloseReason.BAD_INPUT
        assert isinstance(stream.close_error, UnicodeDecodeError)


def test_undecodable_bytes_over_a_socket_close_with_one_warning(server_of, peer, recorder, caplog):
    one = peer(server_of(recorder.of(Stream, read_delimiter="\n", encoding="utf-8")))
    one.send(b"good\nb\xff\nnever\n")
    recorder.wait_for("on_close")
    assert recorder[1:] == [("on_read", "good"), ("on_close",)]
    records = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.levelname for record in records] == ["WARNING"]
    assert "utf-8" in records[0].getMessage()


def test_undecodable_bytes_without_delimiter(server_of, peer, recorder):
    def on_read_error(stream, exception):
        recorder("on_read_error", type(exception))

    one = peer(server_of(recorder.of(Stream, encoding="utf-8", on_read_error=on_read_error)))
    one.send(b"good\xe2")
    recorder.wait_for(("on_read", "good"))
    one.send(b"x")
    recorder.wait_for("on_close")
    assert recorder[1:] == [("on_read", "good"), ("on_read_error", UnicodeDecodeError), ("on_close",)]


def test_undecodable_chunk_in_read_is_on_read_error(server_of, peer, recorder, caplog):
    def on_connect(stream):
        recorder("read", stream.read("\n"))
        try:
            stream.read("\n")
        except ChannelClosed as error:
            recorder("left", type(error.__cause__))
            raise

    def on_read_error(stream, exception):
        recorder("on_read_error", type(exception))

    kind = recorder.of(Stream, encoding="ascii", on_connect=on_connect, on_read_error=on_read_error)
    one = peer(server_of(kind))
    one.send(b"good\n\xff\n")
    recorder.wait_for("on_close")
    assert recorder == [
        ("on_connect",),
        ("read", "good"),
        ("left", UnicodeDecodeError),
        ("on_read_error", UnicodeDecodeError),
        ("on_close",),
    ]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_undecodable_chunk_that_is_read_as_bytes_harms_nobody(server_of, peer, recorder):
    def on_read(stream, line):
        stream.encoding = None
        recorder("read", stream.read(b"\n"))
        stream.encoding = "utf-8"

    one = peer(server_of(recorder.of(Stream, read_delimiter=b"\n", encoding="utf-8", on_read=on_read)))
    one.send(b"1\n\xff\n2\n\xfe\n")
    recorder.wait_for(("read", b"\xfe"))
    assert recorder[1:] == [("on_read", "1"), ("read", b"\xff"), ("on_read", "2"), ("read", b"\xfe")]


# ---- Writing


@pytest.mark.parametrize("encoding", [None, "utf-8", "latin-1", "utf-16-be", "cp437"])
def test_text_is_written_in_the_encoding(server_of, peer, encoding):
    class Kind(Connection):
        def on_connect(self):
            self.write("aé")
            self.write(b"\xff\0")
            self.write("")
            self.end()

    one = peer(server_of(Kind, encoding=encoding))
    assert one.recv_all() == "aé".encode(encoding or "utf-8") + b"\xff\0"


def test_text_is_written_in_the_encoding_that_holds_then(server_of, peer):
    def on_connect(stream):
        stream.write("é")
        stream.encoding = "latin-1"
        stream.write("é")
        stream.encoding = None
        stream.write("é")
        stream.end()

    assert peer(server_of(encoding="utf-16-be", on_connect=on_connect)).recv_all() == b"\0\xe9\xe9\xc3\xa9"


def test_text_that_the_encoding_has_not_is_an_error_at_the_call_and_nothing_is_lost(server_of, peer, recorder):
    def on_connect(stream):
        stream.write("before ")
        with pytest.raises(UnicodeEncodeError):
            stream.write("€")
        stream.write("after")
        stream.end()

    kind = recorder.of(Stream, "on_error", "on_close", encoding="latin-1", on_connect=on_connect)
    assert peer(server_of(kind)).recv_all() == b"before after"
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_close"]


def test_echo_of_text(server_of, peer):
    class Echo(Connection):
        encoding = "utf-8"
        read_delimiter = "\r\n"

        def on_read(self, line):
            self.write(line.upper() + "\r\n")

    one = peer(server_of(Echo))
    one.send("grüße\r\nπ\r\n".encode())
    assert one.recv_exactly(len("GRÜSSE\r\nΠ\r\n".encode())).decode() == "GRÜSSE\r\nΠ\r\n"


# ---- Delimiters that go with an encoding or do not


def test_str_pattern_may_be_any_in_latin_1(recorder):
    data = b"a\xe9b\xe8c"
    for events in heard(recorder, data, read_delimiter=re.compile("[è-é]"), encoding="latin-1"):
        assert events == [("on_read", "a"), ("on_read", "b"), ("on_end", b"c")]


def test_str_pattern_keeps_its_flags(recorder):
    for events in heard(recorder, b"aXbxc", read_delimiter=re.compile("x", re.IGNORECASE), encoding="utf-8"):
        assert events == [("on_read", "a"), ("on_read", "b"), ("on_end", b"c")]


@pytest.mark.parametrize(
    ("delimiter", "encoding"),
    [
        (re.compile("é"), "utf-8"),
        (re.compile("[€]"), "cp1252"),
        (re.compile(";"), None),
        (re.compile(";"), "utf-16"),
        ("\n", "utf-16"),
        ("\n", "utf-32-be"),
        ("€", "latin-1"),
        ("é", "ascii"),
    ],
    ids=repr,
)
def test_str_delimiter_that_cannot_be_found_in_the_encoding_is_an_error_that_says_so(delimiter, encoding):
    with pytest.raises(InvalidReadDelimiterError, match="Kind"):
        type("Kind", (Stream,), {"read_delimiter": delimiter, "encoding": encoding})

    class Later(Stream):
        pass

    Later.encoding = encoding
    with pytest.raises(InvalidReadDelimiterError, match="Later"):
        Later.read_delimiter = delimiter
    assert Later.read_delimiter is None
    stream = Later()
    with pytest.raises(InvalidReadDelimiterError, match="Later"):
        stream.read_delimiter = delimiter
    assert stream.read_delimiter is None


def test_encoding_that_does_not_go_with_the_delimiter_is_refused_and_nothing_changes(server_of, peer, recorder):
    def on_read(stream, line):
        with pytest.raises(InvalidReadDelimiterError):
            stream.encoding = "utf-16"
        assert stream.encoding == "utf-8"

    one = peer(server_of(recorder.of(Stream, read_delimiter="\n", encoding="utf-8", on_read=on_read)))
    one.send("é\nπ\n".encode())
    recorder.wait_for(("on_read", "π"))
    assert recorder[1:] == [("on_read", "é"), ("on_read", "π")]


def test_bytes_delimiter_goes_with_any_encoding(recorder):
    data = "aé".encode("utf-16-le") + b"\n\0" + "b".encode("utf-16-le") + b"\n\0"
    for events in heard(recorder, data, read_delimiter=b"\n\0", encoding="utf-16-le"):
        assert events == [("on_read", "aé"), ("on_read", "b"), ("on_end", b"")]


# ---- Values that make no sense

WRONG = [
    pytest.param("no-such-encoding", ValueError, id="unknown"),
    pytest.param("", ValueError, id="empty"),
    pytest.param("utf-8\0", ValueError, id="NUL"),
    pytest.param("hex", ValueError, id="hex"),
    pytest.param("base64", ValueError, id="base64"),
    pytest.param("zlib", ValueError, id="zlib"),
    pytest.param("rot13", ValueError, id="rot13"),
    pytest.param("undefined", ValueError, id="undefined"),
    pytest.param("\ud800", ValueError, id="surrogate"),
    pytest.param(8, TypeError, id="int"),
    pytest.param(b"utf-8", TypeError, id="bytes"),
    pytest.param(True, TypeError, id="bool"),
    pytest.param(codecs.lookup("utf-8"), TypeError, id="CodecInfo"),
]


@pytest.mark.parametrize("where", ["class", "later", "instance"])
@pytest.mark.parametrize(("encoding", "error"), WRONG)
def test_encoding_that_makes_no_sense_is_an_error_that_names_class_and_attribute(encoding, error, where):
    class Later(Stream):
        pass

    stream = Later()
    with pytest.raises(error, match=r"(Kind|Later)\.encoding"):
        if where == "class":
            type("Kind", (Stream,), {"encoding": encoding})
        elif where == "later":
            Later.encoding = encoding
        else:
            stream.encoding = encoding
    assert Later.encoding is None
    assert stream.encoding is None


def test_encoding_without_an_incremental_decoder_is_a_value_error_or_works(recorder):
    """A codec of the user's own need not have one."""

    def search(name):
        return codecs.CodecInfo(codecs.utf_8_encode, codecs.utf_8_decode, name=name) if name == "plain_utf" else None

    codecs.register(search)
    try:
        with pytest.raises(ValueError, match=r"Kind\.encoding"):
            type("Kind", (Stream,), {"encoding": "plain_utf"})
    finally:
        codecs.unregister(search)
