"""Ways of cutting bytes into chunks, for ``read_delimiter``: the Framer, and those that count their chunks; pure.

What stands for the plain delimiters (bytes, numbers, patterns, structs) is in ``_delimiters``; what waits is in ``_inbox``.

A framer of your own is a subclass of `Framer` with one method. This one reads lines in which a backslash hides a newline::

    class Escaped(Framer[bytes]):
        def find(self, data, start, searched):
            end = data.find(b"\\n", start + searched)
            while end > start and data[end - 1 : end] == b"\\\\":
                end = data.find(b"\\n", end + 1)
            return None if end < 0 else (bytes(data[start:end]), end + 1)

``examples/slip.py`` has another, for SLIP packets.
"""

from abc import ABC, abstractmethod
from struct import Struct
from struct import error as StructError
from typing import Any, Generic, TypeVar

from pants_green.errors import ReadDelimiterTypeError, ReadDelimiterValueError, StreamBufferOverflow

__all__ = ["Framer", "LengthPrefix", "Netstring", "Varint"]

T_co = TypeVar("T_co", covariant=True)

#: Digits of a netstring's length: enough for 10 GB.
NETSTRING_DIGITS = 10

#: Bytes of a varint: enough for 64 bits. Source: Protocol Buffers, "Encoding", base 128 varints.
VARINT_BYTES = 10


class Framer(ABC, Generic[T_co]):
    """One way of cutting a stream into chunks. It holds no state of a stream, so that many streams can share it.

    Attributes:
        room: bytes that may wait for one chunk even if ``buffer_size`` is less.
        spread: whether a chunk is a tuple of which ``on_read`` gets the elements as arguments.
        splits: True for the library's own that can cut a whole receive at once.
    """

    __slots__ = ()

    room: int = 0
    spread: bool = False
    splits: bool = False

    @abstractmethod
    def find(self, data: bytes | bytearray, start: int, searched: int) -> "tuple[T_co, int] | int | None":
        """Look for one complete chunk at the beginning of ``data[start:]``.

        Args:
            data: what has been received. Not to be kept or changed; the chunk is a copy of what it takes from it.
            start: where the chunk begins.
            searched: how many bytes behind `start` an earlier call has seen in vain; 0 if none.

        Returns:
            the chunk, and where the next one begins (behind `start`); or, if the chunk is not complete, how many bytes from
            `start` on it needs at least: the next call comes when they are there. None if that cannot be told.

        Raises:
            ValueError: the bytes make no sense. The stream is closed, and ``on_read_error`` gets the exception.
            StreamBufferOverflow: the chunk is longer than is allowed. The stream is closed, and ``on_overflow_error`` gets the
                exception; in a ``read()`` it is raised there.
        """


class Counted(Framer[bytes]):
    """Chunks that come behind their length."""

    __slots__ = ("max_size", "room")

    def __init__(self, max_size: int | None, overhead: int) -> None:
        kind = type(self).__name__
        if max_size is not None and (isinstance(max_size, bool) or not isinstance(max_size, int)):
            raise ReadDelimiterTypeError(f"{kind}: max_size is a number of bytes, an int, or None, not {max_size!r}")
        if max_size is not None and max_size < 0:
            raise ReadDelimiterValueError(f"{kind}: max_size is a number of bytes and not negative; {max_size} is")
        self.max_size = max_size
        self.room = 0 if max_size is None else max_size + overhead

    def __eq__(self, other: object) -> bool:
        # A subclass may hold more than is known here; two of them are equal only if it says so.
        kind = type(self)
        return self is other or (type(other) is kind and kind in (LengthPrefix, Netstring, Varint) and other._key() == self._key())

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return (self.max_size,)

    def _bytes_of(self, data: Any) -> bytes:
        """Return what is to be packed as bytes, whose length is that of what is sent."""
        if isinstance(data, bytes):
            return data
        try:
            return memoryview(data).tobytes()
        except TypeError:
            hint = "encode it first" if isinstance(data, str) else "give something bytes-like"
            raise TypeError(f"{self!r}.pack() takes bytes, not {type(data).__name__}; {hint}") from None

    def _check(self, size: int) -> None:
        if self.max_size is not None and size > self.max_size:
            raise StreamBufferOverflow(f"a chunk of {size} bytes was announced to {self!r}", size, self.max_size)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(max_size={self.max_size})"


class LengthPrefix(Counted):
    """Chunks behind a length of fixed size.

    Args:
        format: of the length, as in ``struct``: one integer, such as ``"!H"`` or ``"<I"``.
        max_size: bytes of the largest frame without its prefix; more are an overflow as soon as the length is known. None:
            ``buffer_size`` decides. If it is more than that, it counts.
        offset: bytes of the header in front of the length.
        adjustment: bytes that come behind the length in addition to those that it counts; negative if it counts too many.
        inclusive: the length counts the bytes in front of it and its own, too.
        strip: bytes to be dropped from the front of each frame; None: the length, if nothing is in front of it, else none.

    Raises:
        ReadDelimiterValueError, ReadDelimiterTypeError: one of these makes no sense.

    *Source*: the parameters are those of Netty's ``LengthFieldBasedFrameDecoder``.
    """

    __slots__ = ("_fixed", "_least", "_struct", "adjustment", "format", "inclusive", "offset", "strip")

    def __init__(
        self,
        format: str = "!I",  # noqa: A002, as struct calls it
        max_size: int | None = None,
        *,
        offset: int = 0,
        adjustment: int = 0,
        inclusive: bool = False,
        strip: int | None = None,
    ) -> None:
        for name, value in (("offset", offset), ("adjustment", adjustment), ("strip", 0 if strip is None else strip)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ReadDelimiterTypeError(f"LengthPrefix: {name} is a number of bytes, an int, not {value!r}")
            if value < 0 and name != "adjustment":
                raise ReadDelimiterValueError(f"LengthPrefix: {name} is a number of bytes and not negative; {value} is")
        self.format = format
        self._struct = self._struct_of(format)
        self.offset = offset
        self.adjustment = adjustment
        self.inclusive = inclusive
        #: Bytes up to the end of the length.
        self._least = offset + self._struct.size
        self.strip = (0 if offset else self._least) if strip is None else strip
        # Bytes of a frame that its length does not count.
        self._fixed = adjustment + (0 if inclusive else self._least)
        super().__init__(max_size, self._least)

    @staticmethod
    def _struct_of(format: str) -> Struct:  # noqa: A002
        if not isinstance(format, str):
            raise ReadDelimiterTypeError(f"LengthPrefix: format is a str as in struct, not {format!r}")
        try:
            struct = Struct(format)
            fields = struct.unpack(bytes(struct.size))
        except (StructError, UnicodeEncodeError) as error:
            raise ReadDelimiterValueError(f"LengthPrefix: format {format!r}: {error}") from None
        if len(fields) != 1 or type(fields[0]) is not int:
            raise ReadDelimiterValueError(f"LengthPrefix: format {format!r} is not one integer; give one such as '!I'")
        return struct

    def find(self, data: bytes | bytearray, start: int, searched: int) -> tuple[bytes, int] | int:
        least = self._least
        if len(data) - start < least:
            return least
        size = self._struct.unpack_from(data, start + self.offset)[0] + self._fixed
        if size < least or size < self.strip:
            raise ValueError(f"a frame of {size} bytes was announced, of which {max(least, self.strip)} are its header")
        if self.max_size is not None:
            self._check(size - least)
        end = start + size
        if len(data) < end:
            return int(size)
        chunk = data[start + self.strip : end]
        return (chunk if chunk.__class__ is bytes else bytes(chunk)), end

    def pack(self, data: bytes) -> bytes:
        """Return `data` with its length in front: what a peer has to send.

        Args:
            data: what follows the length. For an `offset` it begins with the bytes in front of the length.

        Raises:
            ValueError: the length does not fit into the format, or `data` is less than the `offset`.
        """
        data = self._bytes_of(data)
        if len(data) < self.offset:
            raise ValueError(f"{len(data)} bytes are less than the {self.offset} in front of the length; data begins with these")
        try:
            length = self._struct.pack(len(data) + self._struct.size - self._fixed)
            return b"".join((data[: self.offset], length, data[self.offset :]))
        except StructError as error:
            raise ValueError(f"{len(data)} bytes do not fit into the length {self.format!r}: {error}") from None

    def _key(self) -> tuple[Any, ...]:
        return (self.format, self.max_size, self.offset, self.adjustment, self.inclusive, self.strip)

    def __repr__(self) -> str:
        more = "".join(
            f", {name}={value!r}"
            for name, value, usual in (
                ("offset", self.offset, 0),
                ("adjustment", self.adjustment, 0),
                ("inclusive", self.inclusive, False),
                ("strip", self.strip, 0 if self.offset else self._least),
            )
            if value != usual
        )
        return f"LengthPrefix({self.format!r}, max_size={self.max_size}{more})"


class Netstring(Counted):
    """Chunks as ``5:hello,``: their length in decimal digits, a colon, themselves, a comma.

    Args:
        max_size: bytes of the largest chunk; more are an overflow as soon as the length is known. None: ``buffer_size``
            decides. If it is more than that, it counts.

    *Source*: D. J. Bernstein, "Netstrings", 1997.
    """

    __slots__ = ()

    def __init__(self, max_size: int | None = None) -> None:
        super().__init__(max_size, NETSTRING_DIGITS + 2)

    def find(self, data: bytes | bytearray, start: int, searched: int) -> tuple[bytes, int] | int:
        colon = data.find(b":", start, start + NETSTRING_DIGITS + 1)
        digits = bytes(data[start : start + NETSTRING_DIGITS + 1 if colon < 0 else colon])
        # Not int(): it takes blanks, signs and underscores, too.
        if (digits and not digits.isdigit()) or (len(digits) > 1 and digits[0] == 0x30):
            raise ValueError(f"a netstring begins with its length and a colon, not with {digits!r}")
        if colon < 0:
            if len(digits) > NETSTRING_DIGITS:
                raise ValueError(f"the length of a netstring has no more than {NETSTRING_DIGITS} digits; {digits!r} are more")
            return len(digits) + 1  # not 2: what is wrong, or too long, is to be known as soon as the colon is there
        if not digits:
            raise ValueError("a netstring begins with its length, not with the colon")
        size = int(digits)
        self._check(size)
        end = colon + 1 + size
        if len(data) <= end:
            return end + 1 - start
        if data[end] != 0x2C:
            raise ValueError(f"a netstring of {size} bytes ends in a comma, not in {bytes(data[end : end + 1])!r}")
        return bytes(data[colon + 1 : end]), end + 1

    def pack(self, data: bytes) -> bytes:
        """Return `data` as a netstring."""
        data = self._bytes_of(data)
        return b"%d:%b," % (len(data), data)


class Varint(Counted):
    """Chunks behind their length as a base 128 varint, as in delimited Protocol Buffers messages.

    Args:
        max_size: bytes of the largest chunk; more are an overflow as soon as the length is known. None: ``buffer_size``
            decides. If it is more than that, it counts.

    *Source*: Protocol Buffers, "Encoding" and "Streaming Multiple Messages".
    """

    __slots__ = ()

    def __init__(self, max_size: int | None = None) -> None:
        super().__init__(max_size, VARINT_BYTES)

    def find(self, data: bytes | bytearray, start: int, searched: int) -> tuple[bytes, int] | int:
        size = shift = 0
        begin = start
        for byte in data[start : start + VARINT_BYTES]:
            begin += 1
            size |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
        else:
            if begin - start == VARINT_BYTES:
                raise ValueError(f"a varint has no more than {VARINT_BYTES} bytes")
            return begin - start + 1
        if size >> 64:
            raise ValueError(f"a varint has no more than 64 bits; {size} has")
        self._check(size)
        end = begin + size
        if len(data) < end:
            return end - start
        return bytes(data[begin:end]), end

    def pack(self, data: bytes) -> bytes:
        """Return `data` with its length in front."""
        data = self._bytes_of(data)
        size = len(data)
        prefix = bytearray()
        while size > 0x7F:
            prefix.append(size & 0x7F | 0x80)
            size >>= 7
        prefix.append(size)
        return bytes(prefix) + data
