"""What stands for a ``read_delimiter``: for bytes, a number, a pattern, a struct, with or without an encoding; pure.

Framers that count their chunks, and the base of all, are in ``framing``.
"""

import codecs
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import islice
from operator import itemgetter, methodcaller
from re import _parser as pattern_parser  # type: ignore[attr-defined]
from struct import Struct
from typing import Any

from pants_green.errors import ReadDelimiterTypeError, ReadDelimiterValueError
from pants_green.framing import Framer

__all__ = [
    "Delimited",
    "Fields",
    "Fixed",
    "Incremental",
    "Matched",
    "Searched",
    "Splitter",
    "Text",
    "VariableFields",
    "check_encoding",
    "framer_for",
    "last_chunk",
]

#: Takes the only field out of what ``Struct.iter_unpack`` yields, at the speed of C.
first = itemgetter(0)

#: Bytes of a chunk up to which Struct cuts it out; it keeps a code for each.
STRUCT_LIMIT = 8 * 1024

#: What the categories of a pattern of bytes stand for.
CATEGORIES = {"CATEGORY_SPACE": set(b" \t\n\r\f\v"), "CATEGORY_DIGIT": set(b"0123456789")}

#: Bytes of a pattern's match from which on it counts as having no limit.
LONGEST_MATCH = 64 * 1024


class Splitter(Framer[Any]):
    """A framer that can cut a whole receive at once, at the speed of C.

    Attributes:
        count: for one that spreads its chunks, how many elements each has; 0 if they have not all the same.
    """

    __slots__ = ()

    splits = True
    count: int = 0

    @abstractmethod
    def split(self, data: bytes) -> tuple[Iterable[Any], bytes]:
        """Cut `data` into all its complete chunks.

        Returns:
            the chunks, to be iterated over once, and the bytes behind the last of them.
        """

    @abstractmethod
    def unsplit(self, batch: Any, rest: bytes) -> bytes:
        """Put what was not taken from a ``split`` together again, as it was received."""


class Batch:
    """Chunks that cannot be put together again, with what they were cut from.

    Attributes:
        chunks: an iterator over them.
        data: all bytes from the first chunk on.
        count: how many chunks there were.
    """

    __slots__ = ("chunks", "count", "data")

    def __init__(self, chunks: Iterator[Any], data: bytes, count: int) -> None:
        self.chunks = chunks
        self.data = data
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return self.chunks

    def taken(self) -> int:
        """Return how many chunks have been taken, and take the others."""
        return self.count - sum(1 for _ in self.chunks)


# ---- bytes and numbers


class Delimited(Splitter):
    """Chunks that end in a fixed byte string, which is dropped."""

    __slots__ = ("delimiter", "room")

    def __init__(self, delimiter: bytes) -> None:
        self.delimiter = delimiter
        self.room = len(delimiter)

    def split(self, data: bytes) -> tuple[Iterator[bytes], bytes]:
        chunks = data.split(self.delimiter)
        rest = chunks.pop()
        return iter(chunks), rest

    def unsplit(self, batch: Iterator[bytes], rest: bytes) -> bytes:
        pieces = list(batch)
        pieces.append(rest)
        return self.delimiter.join(pieces)

    def find(self, data: bytes | bytearray, start: int, searched: int) -> tuple[bytes, int] | None:
        # The delimiter may have begun in the last bytes that were searched before.
        end = data.find(self.delimiter, start + max(0, searched - self.room + 1) if searched else start)
        if end < 0:
            return None
        if type(data) is bytes:
            return data[start:end], end + self.room
        return bytes(memoryview(data)[start:end]), end + self.room


class Fixed(Splitter):
    """Chunks of one size."""

    __slots__ = ("_unpack", "room")

    def __init__(self, size: int) -> None:
        self.room = size
        # iter_unpack is 1.4 times slicing in a loop; a size that Struct cannot hold falls back to slices.
        self._unpack = Struct(f"{size}s").iter_unpack if size <= STRUCT_LIMIT else None

    def split(self, data: bytes) -> tuple[Iterator[bytes], bytes]:
        size = self.room
        whole = len(data) - len(data) % size
        if not whole:
            return iter(()), data
        rest = data[whole:]
        if self._unpack is None:
            return (data[start : start + size] for start in range(0, whole, size)), rest
        return map(first, self._unpack(data if whole == len(data) else data[:whole])), rest

    def unsplit(self, batch: Iterator[bytes], rest: bytes) -> bytes:
        pieces = list(batch)
        pieces.append(rest)
        return b"".join(pieces)

    def find(self, data: bytes | bytearray, start: int, searched: int) -> tuple[bytes, int] | int:
        size = self.room
        end = start + size
        if len(data) < end:
            return size
        if type(data) is bytes:
            return data[start:end], end
        return bytes(memoryview(data)[start:end]), end


# ---- structs


class Fields(Splitter):
    """The fields of a ``struct.Struct``, again and again.

    Attributes:
        count: how many fields there are.
    """

    __slots__ = ("count", "room", "struct")

    spread = True

    def __init__(self, struct: Struct) -> None:
        self.struct = struct
        self.room = struct.size
        self.count = len(struct.unpack(bytes(struct.size)))

    def split(self, data: bytes) -> tuple[Iterable[tuple[Any, ...]], bytes]:
        left = len(data) % self.room
        if left == len(data):
            return (), data
        whole = data[:-left] if left else data
        return Batch(self.struct.iter_unpack(whole), whole, len(whole) // self.room), data[-left:] if left else b""

    def unsplit(self, batch: Batch | tuple[()], rest: bytes) -> bytes:
        # Not by packing them again: padding, or the bits of a NaN, would not be what was received.
        return batch.data[batch.taken() * self.room :] + rest if isinstance(batch, Batch) else rest

    def find(self, data: bytes | bytearray, start: int, searched: int) -> tuple[tuple[Any, ...], int] | int:
        end = start + self.room
        if len(data) < end:
            return self.room
        return self.struct.unpack_from(data, start), end


class VariableFields(Framer[tuple[Any, ...]]):
    """The fields of a ``netstruct.NetStruct``, or what has its ``iter_unpack`` and ``minimum_size``, again and again."""

    __slots__ = ("room", "struct")

    spread = True

    def __init__(self, struct: Any) -> None:
        self.struct = struct
        self.room = struct.minimum_size

    def find(self, data: bytes | bytearray, start: int, searched: int) -> tuple[tuple[Any, ...], int] | int:
        end = start
        unpacking = self.struct.iter_unpack(b"")
        found = next(unpacking)
        while isinstance(found, int):
            if found < 1:
                raise ValueError(f"{self.struct!r} asks for {found} bytes")
            if len(data) < end + found:
                return end + found - start
            piece = bytes(memoryview(data)[end : end + found])
            end += found
            found = unpacking.send(piece)
        return tuple(found), end - len(next(unpacking, b""))


# ---- patterns


class Searched(Framer[bytes]):
    """Chunks between the matches of a pattern, which are dropped.

    Args:
        pattern: a compiled pattern of bytes that never matches the empty string.
    """

    __slots__ = ("pattern",)

    def __init__(self, pattern: re.Pattern[bytes]) -> None:
        self.pattern = pattern

    def find(self, data: bytes | bytearray, start: int, searched: int) -> tuple[bytes, int] | None:
        # A chunk is a string of its own: what came before it is not to be looked back at.
        with memoryview(data) as view, view[start:] as part:
            match = self.pattern.search(part)
            if match is None:
                return None
            begin, end = match.span()
            del match  # it holds the memoryview
        if begin == end:
            raise ValueError(f"{self.pattern!r} has matched the empty string")
        return bytes(data[start : start + begin]), start + end


class SplitAt(Searched, Splitter):
    """The same for patterns that look at nothing but what they match: all chunks of a receive at once.

    Args:
        most: bytes of the longest match, None if there is no limit: then a chunk that grows is searched from its start each
            time that a match can have come to its end, which `buffer_size` bounds.
        ends: finds the bytes in which a match can end; None if these can be any.
    """

    __slots__ = ("ends", "most")

    splits = True

    def __init__(self, pattern: re.Pattern[bytes], most: int | None, ends: re.Pattern[bytes] | None) -> None:
        super().__init__(pattern)
        self.most = most
        self.ends = ends

    def find(self, data: bytes | bytearray, start: int, searched: int) -> tuple[bytes, int] | None:
        skip = 0
        if searched:
            if self.ends is not None and self.ends.search(data, start + searched) is None:
                return None
            if self.most is not None:  # a match may have begun in the last bytes that were searched before
                skip = max(0, searched - self.most + 1)
        match = self.pattern.search(data, start + skip)
        if match is None:
            return None
        begin, end = match.span()
        return bytes(data[start:begin]), end

    def split(self, data: bytes) -> tuple[Iterable[bytes], bytes]:
        if self.pattern.groups:
            chunks, end = [], 0
            for match in self.pattern.finditer(data):
                chunks.append(data[end : match.start()])
                end = match.end()
            rest = data[end:]
        else:
            chunks = self.pattern.split(data)
            rest = chunks.pop()
        return Batch(iter(chunks), data, len(chunks)) if chunks else (), rest

    def unsplit(self, batch: Batch | tuple[()], rest: bytes) -> bytes:
        if not isinstance(batch, Batch):
            return rest
        taken = batch.taken()
        *_, last = (None, *islice(self.pattern.finditer(batch.data), taken))
        return batch.data if last is None else batch.data[last.end() :]


class Matched(Framer[re.Match[bytes]]):
    """What a pattern matches from the start of each chunk on, as match objects.

    Args:
        pattern: a compiled pattern of bytes that never matches the empty string.
        looks_around: whether it depends on more than the bytes it matches.
        ends: finds the bytes in which a match can end; None if these can be any.
    """

    __slots__ = ("ends", "looks_around", "pattern")

    def __init__(self, pattern: re.Pattern[bytes], looks_around: bool, ends: re.Pattern[bytes] | None) -> None:
        self.pattern = pattern
        self.looks_around = looks_around
        self.ends = ends

    def find(self, data: bytes | bytearray, start: int, searched: int) -> tuple[re.Match[bytes], int] | None:
        if searched and self.ends is not None and self.ends.search(data, start + searched) is None:
            return None
        with memoryview(data) as view, view[start:] as part:
            match = self.pattern.match(part)
            if match is None:
                return None
            end = size = match.end()
            groups = match.regs if self.looks_around else None
            del match
        if not end:
            raise ValueError(f"{self.pattern!r} has matched the empty string")
        # The user gets one that stands on bytes of its own, for he may keep it: on no more than it matches, or than it looks at.
        # All that has come would do as well, but a copy of it for each of many short chunks is quadratic.
        while True:
            match = self.pattern.match(bytes(data[start : start + size]))
            if match is not None and (groups is None or match.regs == groups):
                return match, start + end
            size = 64 + 4 * size


def shape(pattern: re.Pattern[bytes]) -> tuple[int, int | None, bool, re.Pattern[bytes] | None]:
    """Tell what can be known of a pattern's matches beforehand.

    Returns:
        the bytes of the shortest; those of the longest, None if it has no limit; whether it looks around; and a pattern that finds
        the bytes in which one can end, None if these can be any.
    """
    parsed = pattern_parser.parse(pattern.pattern, pattern.flags)
    least, most = parsed.getwidth()
    looks_around = _looks_around(parsed)
    last = None if looks_around or pattern.flags & re.IGNORECASE else _last_bytes(parsed)
    ends = None if not last else re.compile(b"[" + b"".join(re.escape(bytes([byte])) for byte in sorted(last)) + b"]")
    return least, most if most <= LONGEST_MATCH else None, looks_around, ends


def _looks_around(parsed: Any) -> bool:
    """Tell whether a parsed pattern depends on more than the bytes it matches: on a position, or on what is beside it."""
    if isinstance(parsed, (pattern_parser.SubPattern, list, tuple)):
        return any(_looks_around(part) for part in parsed)
    return str(parsed) in ("AT", "ASSERT", "ASSERT_NOT")


def _last_bytes(parsed: Any) -> set[int] | None:
    """Return the bytes in which a match of a parsed pattern can end; None if these can be any, or it is hard to say."""
    found: set[int] = set()
    for element in reversed(list(parsed)):
        last = _last_bytes_of(*element)
        if last is None:
            return None
        found |= last
        if pattern_parser.SubPattern(parsed.state, [element]).getwidth()[0]:
            break  # what comes before it is not the last
    return found


def _last_bytes_of(kind: Any, what: Any) -> set[int] | None:
    """Return the same for one element of a pattern."""
    name = str(kind)
    if name == "LITERAL":
        return {what}
    if name == "RANGE":
        return set(range(what[0], what[1] + 1))
    if name == "CATEGORY":
        return CATEGORIES.get(str(what))
    if name == "IN":
        parts = [_last_bytes_of(*part) for part in what]
    elif name == "BRANCH":
        parts = [_last_bytes(part) for part in what[1]]
    elif name in ("MAX_REPEAT", "MIN_REPEAT") or (name == "SUBPATTERN" and not what[1]):
        parts = [_last_bytes(what[-1])]
    else:
        return None
    found: set[int] = set()
    for part in parts:
        if part is None:
            return None
        found |= part
    return found


# ---- text


class Text(Framer[Any]):
    """The chunks of another framer, decoded."""

    __slots__ = ("decode", "framer", "room", "spread")

    def __init__(self, framer: Framer[Any], encoding: str) -> None:
        decode = codecs.getdecoder(encoding)
        self.framer = framer
        self.room = framer.room
        self.spread = framer.spread
        #: Only bytes are decoded; a framer of the user's own may make anything of them.
        self.decode: Callable[[Any], Any] = lambda chunk: decode(chunk)[0] if chunk.__class__ is bytes else chunk

    def find(self, data: bytes | bytearray, start: int, searched: int) -> Any:
        found = self.framer.find(data, start, searched)
        if found.__class__ is not tuple:
            return found
        chunk, end = found
        return self.decode(chunk), end

    def __repr__(self) -> str:
        return repr(self.framer)


class SplitText(Text, Splitter):
    """The same for those that split."""

    __slots__ = ("encoding",)

    splits = True

    def __init__(self, framer: Splitter, encoding: str) -> None:
        super().__init__(framer, encoding)
        self.encoding = encoding

    def split(self, data: bytes) -> tuple[Iterable[str], bytes]:
        batch, rest = self.framer.split(data)  # type: ignore[attr-defined]
        return Decoded(batch, self.encoding), rest

    def unsplit(self, batch: "Decoded", rest: bytes) -> bytes:
        return self.framer.unsplit(batch.batch, rest)  # type: ignore[attr-defined, no-any-return]


class Decoded:
    """The chunks of a batch, decoded as they are taken; those that are not can be put back as bytes."""

    __slots__ = ("batch", "encoding")

    def __init__(self, batch: Iterable[bytes], encoding: str) -> None:
        self.batch = batch
        self.encoding = encoding

    def __iter__(self) -> Iterator[str]:
        return map(methodcaller("decode", self.encoding), self.batch)


class Incremental(Splitter):
    """Whatever arrives, decoded as far as it goes. Unlike the others it holds the state of one stream.

    Args:
        encoding: of the text.
    """

    __slots__ = ("_decoder", "_state", "encoding")

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        #: What the decoder knows of the encoding, such as the byte order, from the text that was handed out.
        self._state = self._decoder.getstate()[1]

    def fresh(self) -> "Incremental":
        """Return one for another stream."""
        return Incremental(self.encoding)

    def _decode(self, data: bytes) -> tuple[str, bytes, UnicodeDecodeError | None]:
        """Return the text, the bytes behind it, and what is wrong with these. Where nothing is text that is raised at once."""
        decoder = self._decoder
        wrong, behind = None, b""
        try:
            text = decoder.decode(data)
        except UnicodeDecodeError as error:
            # What stands in front of it is text all the same, as it would be had it come earlier.
            decoder.setstate((b"", self._state))
            good = len(data) - len(error.object) + error.start
            text = decoder.decode(data[:good])
            if not text:
                raise
            wrong, behind = error, data[good:]
        pending, state = decoder.getstate()
        # What is not complete waits with the stream and comes again; the decoder keeps only what it knows of the encoding. And
        # not even that if there is no text: then all of it comes again, a byte order mark, too.
        if text:
            self._state = state
            behind = pending + behind
        else:
            behind = data
        decoder.setstate((b"", self._state))
        return text, behind, wrong

    def split(self, data: bytes) -> tuple[Iterable[str], bytes]:
        text, rest, wrong = self._decode(data)
        return iter((text,) if text else ()) if wrong is None else self._and_then_raise(text, wrong), rest

    @staticmethod
    def _and_then_raise(text: str, wrong: UnicodeDecodeError) -> Iterator[str]:
        yield text
        raise wrong

    def unsplit(self, batch: Iterator[str], rest: bytes) -> bytes:
        return rest  # there is one chunk, and it is taken

    def find(self, data: bytes | bytearray, start: int, searched: int) -> tuple[str, int] | None:
        text, rest, _ = self._decode(bytes(data[start:]))
        return (text, len(data) - len(rest)) if text else None


def last_chunk(framer: Framer[Any], rest: bytes, delimiter: Any) -> Any:
    """Return what the bytes behind the last complete chunk are if nothing can come after them: a chunk, too.

    Args:
        delimiter: the `read_delimiter` of which `framer` was made, for the error.

    Raises:
        ValueError: chunks do not end in a delimiter, and these bytes are not enough for one.
    """
    inner = framer.framer if isinstance(framer, Text) else framer
    if not isinstance(inner, (Delimited, Searched)):
        raise ValueError(f"{len(rest)} bytes are left over, of which the read_delimiter, {delimiter!r}, makes no chunk: {rest!r:.100}")
    return framer.decode(rest) if isinstance(framer, Text) else rest


def check_encoding(name: str, encoding: Any) -> str | None:
    """Check the name of a text encoding, or None; for a `Setting`."""
    if encoding is None:
        return None
    if not isinstance(encoding, str):
        raise TypeError(f"{name} is the name of a text encoding, such as 'utf-8', or None, not {encoding!r}")
    try:
        "a".encode(encoding)  # which tells an encoding of text from the others; nothing to encode would tell nothing
        codecs.getincrementaldecoder(encoding)
    except (LookupError, ValueError) as error:
        raise ValueError(f"{name} is {encoding!r}: {error}; give the name of a text encoding, such as 'utf-8'") from None
    return encoding


# ---- which of them a delimiter means


def framer_for(delimiter: Any, encoding: str | None = None, regex_search: bool = True) -> Framer[Any] | None:
    """Return the framer of a read delimiter; None for None without encoding, which delivers whatever arrives.

    Equal delimiters share one, but for `Incremental`.

    Args:
        delimiter: None; bytes or str that end a chunk; an int, the size of every chunk in bytes; a compiled pattern; a
            ``struct.Struct`` or what unpacks like a ``netstruct.NetStruct``; a Framer.
        encoding: that of the text, or None for bytes.
        regex_search: whether chunks are what is between the matches of a pattern; else they are the matches.

    Raises:
        ReadDelimiterValueError: it could never end a chunk: empty, zero, negative.
        ReadDelimiterTypeError: no kind of delimiter has this type.
    """
    if isinstance(delimiter, Framer):
        return delimiter if encoding is None else Text(delimiter, encoding)
    if delimiter is None:
        return None if encoding is None else Incremental(encoding)
    try:
        return _framer_for(delimiter, encoding, bool(regex_search))
    except ReadDelimiterTypeError:
        raise
    except TypeError:
        raise _no_such_kind(delimiter) from None  # unhashable


@lru_cache(maxsize=256, typed=True)
def _framer_for(delimiter: Any, encoding: str | None, regex_search: bool) -> Framer[Any]:
    if isinstance(delimiter, str):
        delimiter = _encoded(delimiter, encoding)
    framer: Splitter | Framer[Any]
    if isinstance(delimiter, bytes):
        if not delimiter:
            raise ReadDelimiterValueError("an empty read_delimiter would match everywhere; None delivers whatever arrives")
        framer = Delimited(bytes(delimiter))
    elif isinstance(delimiter, int) and not isinstance(delimiter, bool):
        if delimiter < 1:
            raise ReadDelimiterValueError(f"read_delimiter is {delimiter}; as a size of chunks in bytes it is at least 1")
        framer = Fixed(int(delimiter))
    elif isinstance(delimiter, re.Pattern):
        return _pattern_framer(delimiter, encoding, regex_search)
    elif isinstance(delimiter, Struct):
        if not delimiter.size:
            raise ReadDelimiterValueError("read_delimiter is a Struct of 0 bytes, which would match everywhere")
        return Fields(delimiter)
    elif not isinstance(delimiter, type) and hasattr(delimiter, "iter_unpack") and hasattr(delimiter, "minimum_size"):
        if delimiter.minimum_size < 1:
            raise ReadDelimiterValueError(f"read_delimiter is {delimiter!r} of 0 bytes, which would match everywhere")
        return VariableFields(delimiter)
    else:
        raise _no_such_kind(delimiter)
    return framer if encoding is None else SplitText(framer, encoding)


def _encoded(delimiter: str, encoding: str | None) -> bytes:
    if encoding is not None and "\n".encode(encoding) != b"\n":
        hint = "a str is found only in an encoding that writes ASCII as it is, such as 'utf-8'; give bytes, a number, or a Framer"
        raise ReadDelimiterValueError(f"read_delimiter is {delimiter!r} and encoding is {encoding!r}: {hint}")
    encoding = encoding or "utf-8"
    try:
        return delimiter.encode(encoding)
    except UnicodeEncodeError as error:
        raise ReadDelimiterValueError(f"read_delimiter is {delimiter!r}, which {encoding} cannot encode: {error.reason}") from None


def _pattern_framer(pattern: re.Pattern[Any], encoding: str | None, regex_search: bool) -> Framer[Any]:
    if isinstance(pattern.pattern, str):
        pattern = _bytes_pattern(pattern, encoding)
    least, most, looks_around, ends = shape(pattern)
    if not least:
        raise ReadDelimiterValueError(f"read_delimiter is {pattern!r}, which can match the empty string, and so everywhere")
    if not regex_search:
        return Matched(pattern, looks_around, ends)
    if looks_around:
        return Searched(pattern) if encoding is None else Text(Searched(pattern), encoding)
    return SplitAt(pattern, most, ends) if encoding is None else SplitText(SplitAt(pattern, most, ends), encoding)


def _bytes_pattern(pattern: re.Pattern[str], encoding: str | None) -> re.Pattern[bytes]:
    """Return the pattern of bytes that matches what this one of str does, for framing is in bytes."""
    if encoding is None:
        hint = f"give one of bytes, re.compile({pattern.pattern.encode()!r}), or set encoding"
        raise ReadDelimiterTypeError(f"read_delimiter is {pattern!r}, a pattern of str, but bytes are what arrives; {hint}")
    single = codecs.lookup(encoding).name == "iso8859-1"
    # An ASCII pattern can say "\\xe9", too, which is one byte only in latin-1.
    ascii_only = pattern.pattern.isascii() and not _beyond_ascii(pattern_parser.parse(pattern.pattern, pattern.flags))
    if "az09;".encode(encoding) != b"az09;" or not (single or ascii_only):
        hint = "give an ASCII pattern, and an encoding of which ASCII is a part"
        raise ReadDelimiterValueError(f"read_delimiter is {pattern!r}, which cannot be searched for in {encoding}; {hint}")
    try:
        return re.compile(pattern.pattern.encode("latin-1"), pattern.flags & ~re.UNICODE)
    except (re.error, UnicodeEncodeError) as error:
        raise ReadDelimiterValueError(f"read_delimiter is {pattern!r}, which has no counterpart of bytes: {error}") from None


def _beyond_ascii(parsed: Any) -> bool:
    """Tell whether a parsed pattern names a character outside of ASCII."""
    if isinstance(parsed, tuple) and len(parsed) == 2:
        kind, value = parsed
        if kind is pattern_parser.LITERAL or kind is pattern_parser.NOT_LITERAL:
            return bool(value > 127)
        if kind is pattern_parser.RANGE:
            return bool(value[1] > 127)
    return isinstance(parsed, (pattern_parser.SubPattern, list, tuple)) and any(_beyond_ascii(part) for part in parsed)


def _no_such_kind(delimiter: Any) -> ReadDelimiterTypeError:
    kinds = "give None, bytes, str, a number of bytes as int, a compiled pattern, a struct.Struct, or a Framer of pants_green.framing"
    if isinstance(delimiter, type) and issubclass(delimiter, Framer):
        kinds = f"give an instance, such as {delimiter.__name__}()"
    return ReadDelimiterTypeError(f"read_delimiter is {delimiter!r}, of type {type(delimiter).__name__}; {kinds}")
