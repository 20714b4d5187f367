"""The PROXY protocol: the header by which a proxy says whose connection it hands on; pure: bytes in, values out.

What receives a header, whose header is believed, and how long it may take, is the business of the Server.

A header is received without a byte of what stands behind it like this, by a ``receive(most)`` that raises when there is no more::

    data = b""
    while isinstance(found := parse(data), int):
        data += receive(found)
    header, end = found

*Source*: "The PROXY protocol, Versions 1 & 2", ``doc/proxy-protocol.txt`` of HAProxy. The sections named below are its own.

What a header says besides the addresses is in ``_proxy_tlvs``.
"""

import os
import re
import socket
from collections.abc import Callable, Collection, Iterable
from ipaddress import IPv4Address, IPv6Address
from struct import Struct
from typing import Any, NamedTuple

from pants_green._address import AF_UNIX, Address, Sockaddr, format_address, parse_address
from pants_green._proxy_tlvs import (
    ALPN,
    AUTHORITY,
    CRC32C,
    NETNS,
    SSL,
    TLV,
    UNIQUE_ID,
    ProxySSL,
    crc32c_of,
    first,
    pack_tlvs,
    read_ssl,
    read_tlvs,
    wrong,
)
from pants_green.errors import InvalidAddressFormatError

__all__ = ["ProxyHeader", "ProxySSL", "build", "parse"]

#: Bytes of the longest line of version 1, its CRLF included. Source: section 2.1.
LONGEST_LINE = 107

#: Bytes of the shortest lines: "PROXY UNKNOWN", "PROXY TCP4 0.0.0.0 0.0.0.0 0 0" and "PROXY TCP6 :: :: 0 0", with CRLF.
SHORTEST_LINE = {b"UNKNOWN": 15, b"TCP4": 32, b"TCP6": 22}

#: What version 2 begins with. Source: section 2.2.
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"

#: Bytes of version 2 that say how many follow.
FIXED = 16

#: Version 2 and the command, one byte.
LOCAL, PROXY = b"\x20", b"\x21"

#: The families of version 2 that have addresses; what sockets call them; bytes of both addresses and ports.
INET, INET6, UNIX = 1, 2, 3
FAMILIES = {INET: socket.AF_INET, INET6: socket.AF_INET6, UNIX: AF_UNIX}
ADDRESSES = {INET: 12, INET6: 36, UNIX: 216}

#: What stands in front of an IPv4 address in IPv6.
MAPPED = bytes(10) + b"\xff\xff"

#: Bytes of the path of a Unix socket.
UNIX_PATH = 108

PORTS = Struct("!HH")
WORDS = Struct("!8H")
IPV4 = "%d.%d.%d.%d"
IPV6 = "%x:%x:%x:%x:%x:%x:%x:%x"

OCTETS = frozenset(b"%d" % number for number in range(256))
GROUP = re.compile(rb"[0-9A-Fa-f]{1,4}")
PORT = re.compile(rb"0|[1-9][0-9]{0,4}")
ZEROS = re.compile(r"\b0(?::0)+\b")
LONE = re.compile(rb"\r|\n")


class ProxyHeader(NamedTuple):
    """What a proxy says of the connection that it hands on.

    If a TLV comes more than once, the first counts.

    Attributes:
        version: 1 or 2.
        local: whether the real peer's address counts, for the proxy speaks for itself or does not know better (LOCAL, UNKNOWN,
            AF_UNSPEC); `family` is AF_UNSPEC then, and the addresses are None.
        family: AF_INET, AF_INET6, AF_UNIX or AF_UNSPEC.
        source: the client's address: ``(host, port)`` for IPv4, ``(host, port, 0, 0)`` for IPv6; for Unix sockets a path as str, an
            abstract name as bytes, ``""`` for one without a name.
        destination: the address that the client connected to, likewise.
        tlvs: ``(type, value)`` of all that version 2 has behind the addresses, in order; the types 0xE0 to 0xEF are for your own use.
    """

    version: int
    local: bool
    family: int
    source: Sockaddr | None
    destination: Sockaddr | None
    tlvs: tuple[TLV, ...] = ()

    @property
    def alpn(self) -> bytes | None:
        """The protocol that the client and the proxy agreed upon, such as ``b"h2"``."""
        return first(self.tlvs, ALPN)

    @property
    def authority(self) -> str | None:
        """The host name that the client asked for: in TLS, its SNI."""
        value = first(self.tlvs, AUTHORITY)
        return None if value is None else value.decode()

    @property
    def crc32c(self) -> int | None:
        """The checksum that came with the header, and was right."""
        value = first(self.tlvs, CRC32C)
        return None if value is None else int.from_bytes(value, "big")

    @property
    def unique_id(self) -> bytes | None:
        """What the proxy calls this connection; at most 128 bytes."""
        return first(self.tlvs, UNIQUE_ID)

    @property
    def ssl(self) -> ProxySSL | None:
        """The TLS that the client spoke to the proxy."""
        value = first(self.tlvs, SSL)
        return None if value is None else read_ssl(value)

    @property
    def netns(self) -> str | None:
        """The name of the network namespace of the proxy."""
        value = first(self.tlvs, NETNS)
        return None if value is None else value.decode("ascii")

    def __repr__(self) -> str:
        # Fit for a log: one line, of limited length, whatever the client has put into it.
        ends = "local" if self.local else f"{_shown(self.source)} -> {_shown(self.destination)}"
        known = {"alpn": first(self.tlvs, ALPN), "authority": first(self.tlvs, AUTHORITY), "unique_id": first(self.tlvs, UNIQUE_ID)}
        said = "".join(f" {name}={value[:64]!r}" for name, value in known.items() if value is not None)
        more = len(self.tlvs) - sum(value is not None for value in known.values())
        return f"<ProxyHeader v{self.version} {ends}{said}{f' and {more} more' if more else ''}>"


def parse(
    data: bytes | bytearray | memoryview, *, versions: Collection[int] = (1, 2), max_length: int = 4096
) -> tuple[ProxyHeader, int] | int:
    """Look for a header at the beginning of `data`.

    Garbage is refused at its first wrong byte: a line of version 1 wherever that is, version 2 within its first 16 bytes; what
    follows there is looked at when all of it has come.

    Args:
        data: what has come so far, from the first byte on.
        versions: those that are allowed: 1, 2, or both.
        max_length: bytes that version 2 may announce behind its first 16; a line of version 1 has at most 107 in all.

    Returns:
        the header, and where it ends: what is behind it belongs to the connection; or, if the header is not complete, how many
        bytes more it needs at least, 1 or more: so many can be received without taking one that is not of the header.

    Raises:
        ProxyHeaderError: no valid header begins like that, and the connection has to be cut. The message says what was expected
            where.
        TypeError, ValueError: an argument makes no sense.
    """
    if not isinstance(data, (bytes, bytearray)):
        data = _view(data)
    if not versions or not all(version in (1, 2) for version in versions):
        raise ValueError(f"versions is (1, 2), (1,) or (2,), not {versions!r}")
    if not data:
        return SHORTEST_LINE[b"UNKNOWN"] if 1 in versions else FIXED
    if data[0] == 0x50 and 1 in versions:
        return _parse_line(data)
    if data[0] == 0x0D and 2 in versions:
        return _parse_block(data, max_length)
    starts = {1: "b'PROXY ' of version 1", 2: "the signature of version 2"}
    raise wrong(data, 0, " or ".join(starts[version] for version in sorted(set(versions))))


def _view(data: Any) -> memoryview:
    try:
        return memoryview(data).cast("B")
    except TypeError:
        raise TypeError(f"parse() takes bytes, not {type(data).__name__}") from None


# ---- version 1: a line of text. Source: section 2.1.


def _parse_line(data: bytes | bytearray | memoryview) -> tuple[ProxyHeader, int] | int:
    line = bytes(data[:LONGEST_LINE])
    end = line.find(b"\r\n")
    # A CR at the very end may be the first half of CRLF.
    text = line[:end] if end >= 0 else line.removesuffix(b"\r")
    ended = len(text) < len(line)
    if not text.startswith(b"PROXY "):
        same = _agreement(text, b"PROXY ")
        if ended or same < len(text):
            raise wrong(line, same, "b'PROXY '")
        return SHORTEST_LINE[b"UNKNOWN"] - len(line)
    word, space, rest = text[6:].partition(b" ")
    found: ProxyHeader | int
    if word in FIELDS:
        found = _parse_fields(line, word, rest.split(b" ") if space else [], ended)
    elif word == b"UNKNOWN":
        # Whatever else stands there is ignored. Not so a lone CR or LF: a line that ends in one would swallow what is behind it.
        if lone := LONE.search(rest):
            raise wrong(line, len(text) - len(rest) + lone.start(), "no CR or LF but CRLF")
        found = ProxyHeader(1, True, socket.AF_UNSPEC, None, None)
    else:
        same = max(_agreement(word, one) for one in SHORTEST_LINE)
        if ended or space or same < len(word):
            raise wrong(line, 6 + same, "TCP4, TCP6 or UNKNOWN, and one space")
        return min(size for one, size in SHORTEST_LINE.items() if one.startswith(word)) - len(line)
    if isinstance(found, int):
        missing = found + 2
    elif end >= 0:
        return found, end + 2
    else:
        missing = 1 if ended else 2
    if len(line) + missing > LONGEST_LINE:
        raise wrong(line, LONGEST_LINE - 2, f"CRLF, for a line has no more than {LONGEST_LINE} bytes,")
    return missing


def _parse_fields(line: bytes, word: bytes, fields: list[bytes], ended: bool) -> ProxyHeader | int:
    """Return the header, or how many bytes of the fields are missing at least."""
    expected = FIELDS[word]
    at = 11
    missing = 0
    for number, field in enumerate(fields):
        if number == len(expected):
            raise wrong(line, at - 1, "CRLF")
        look, _, what = expected[number]
        missing = look(field)
        if missing and (missing < 0 or ended or number + 1 < len(fields)):
            good = next((size for size in range(len(field)) if look(field[: size + 1]) < 0), len(field))
            raise wrong(line, at + good, what)
        at += len(field) + 1
    later = expected[len(fields) :]
    if later and ended:
        raise wrong(line, at - 1, f"one space and {later[0][2]}")
    if later or missing:
        return missing + sum(1 + least for _, least, _ in later)
    one, other = int(fields[2]), int(fields[3])
    if word == b"TCP4":
        return ProxyHeader(1, False, socket.AF_INET, (fields[0].decode(), one), (fields[1].decode(), other))
    hosts = [_host6(_words(field)) for field in fields[:2]]
    return ProxyHeader(1, False, socket.AF_INET6, (hosts[0], one, 0, 0), (hosts[1], other, 0, 0))


def _agreement(text: bytes, other: bytes) -> int:
    """Return how many bytes both begin with."""
    return next((at for at, (one, two) in enumerate(zip(text, other, strict=False)) if one != two), min(len(text), len(other)))


# Each of these three returns how many bytes are missing at least until the text is valid: 0 if it is, -1 if it can never be.


def _look_at_ipv4(text: bytes) -> int:
    octets = text.split(b".")
    last = octets.pop()
    if len(octets) > 3 or not OCTETS.issuperset(octets) or (last and last not in OCTETS):
        return -1
    return 2 * (3 - len(octets)) + (not last)


def _look_at_ipv6(text: bytes) -> int:
    if text in (b"", b":"):
        return 2 - len(text)
    head, gap, tail = text.partition(b"::")
    groups = (head.split(b":") if head else []) + (tail.split(b":") if tail else [])
    # "::" stands for one group at least.
    most = 7 if gap else 8
    last = groups.pop() if tail or not gap else None
    if len(groups) + (last is not None) > most or not all(map(GROUP.fullmatch, groups)):
        return -1
    if last is None:
        return 0
    if b"." in last:
        # An IPv4 address may be the last two groups (RFC 4291, 2.2): so inet_ntop(), and HAProxy, writes IPv4 in IPv6.
        fits = len(groups) + 2 <= most if gap else len(groups) + 2 == most
        return _look_at_ipv4(last) if fits else -1
    if not last:
        return 1
    if not GROUP.fullmatch(last):
        return -1
    return 0 if gap or len(groups) + 1 == most else 2


def _look_at_port(text: bytes) -> int:
    if not text:
        return 1
    return 0 if PORT.fullmatch(text) and int(text) <= 65535 else -1


Field = tuple[Callable[[bytes], int], int, str]

#: What follows each word: how to look at a field, the bytes of the shortest, what is expected there.
FIELDS: dict[bytes, tuple[Field, ...]] = {
    word: (
        (look, least, f"{what} as the source"),
        (look, least, f"{what} as the destination"),
        (_look_at_port, 1, "a port from 0 to 65535 as the source"),
        (_look_at_port, 1, "a port from 0 to 65535 as the destination"),
    )
    for word, look, least, what in (
        (b"TCP4", _look_at_ipv4, 7, "an IPv4 address"),
        (b"TCP6", _look_at_ipv6, 2, "an IPv6 address"),
    )
}


def _words(text: bytes) -> tuple[int, ...]:
    """Return the eight numbers of a valid IPv6 address."""
    return WORDS.unpack(IPv6Address(text.decode()).packed)


def _host6(words: tuple[int, ...], mixed: bool = True) -> str:
    """Return an IPv6 address as ``getpeername()`` writes it.

    Args:
        words: its eight numbers.
        mixed: whether an IPv4 address in it is written as one.

    *Source*: RFC 5952; what inet_ntop(3) of glibc and BSD takes for an IPv4 address.
    """
    if mixed and not any(words[:5]) and (words[5] == 0xFFFF or (not words[5] and words[6])):
        return f"::{'ffff:' if words[5] else ''}{words[6] >> 8}.{words[6] & 255}.{words[7] >> 8}.{words[7] & 255}"
    text = IPV6 % words
    longest = max(ZEROS.findall(text), key=len, default="")
    if not longest:
        return text
    head, _, tail = f":{text}:".partition(f":{longest}:")
    return f"{head[1:]}::{tail[:-1]}"


# ---- version 2: a block of bytes. Source: section 2.2.


def _parse_block(data: bytes | bytearray | memoryview, max_length: int) -> tuple[ProxyHeader, int] | int:
    fixed = bytes(data[:FIXED])
    if not SIGNATURE.startswith(fixed[:12]):
        raise wrong(fixed, _agreement(fixed, SIGNATURE), f"the signature of version 2, {SIGNATURE!r},")
    if fixed[12:13] not in (b"", LOCAL, PROXY):
        raise wrong(fixed, 12, "version 2 with LOCAL or PROXY, 0x20 or 0x21,")
    proxied = fixed[12:13] == PROXY
    # LOCAL is accepted with any family: it is ignored, as all that follows is.
    family, transport = divmod(fixed[13], 16) if proxied and len(fixed) > 13 else (0, 0)
    if family > UNIX or transport > 2:
        raise wrong(fixed, 13, "a family from 0 to 3 and a transport from 0 to 2, such as 0x11 for TCP over IPv4,")
    length = int.from_bytes(fixed[14:].ljust(2, b"\0"), "big")  # what is there of it: it can only grow
    if length > max_length:
        raise wrong(fixed, 14, f"a length of no more than {max_length} bytes")
    size = ADDRESSES.get(family, 0) if transport else 0
    if len(fixed) < FIXED:
        return FIXED + max(length, size) - len(fixed)
    if length < size:
        raise wrong(fixed, 14, f"a length of at least {size} bytes, those of the addresses,")
    end = FIXED + length
    if len(data) < end:
        return end - len(data)
    if not proxied or (family and not transport):
        # Of LOCAL the whole block is to be discarded. Where the transport is unknown, so is where the TLVs begin.
        return ProxyHeader(2, True, socket.AF_UNSPEC, None, None), end
    block = bytes(data[:end])
    tlvs = read_tlvs(block, FIXED + size)
    if not family:
        # No address: the real one may be used (section 2.2), and HAProxy puts TLVs behind it.
        return ProxyHeader(2, True, socket.AF_UNSPEC, None, None, tlvs), end
    source, destination = _read_addresses(family, block[FIXED : FIXED + size])
    return ProxyHeader(2, False, FAMILIES[family], source, destination, tlvs), end


def _read_addresses(family: int, block: bytes) -> tuple[Sockaddr, Sockaddr]:
    if family == UNIX:
        return _path(block[:UNIX_PATH]), _path(block[UNIX_PATH:])
    one, other = PORTS.unpack(block[-4:])
    if family == INET:
        return (IPV4 % tuple(block[:4]), one), (IPV4 % tuple(block[4:8]), other)
    return (_host6(WORDS.unpack(block[:16])), one, 0, 0), (_host6(WORDS.unpack(block[16:32])), other, 0, 0)


def _path(padded: bytes) -> str | bytes:
    """Return a Unix address as ``getpeername()`` does: a path as str, an abstract name as bytes, ``""`` if there is none."""
    if padded.startswith(b"\0"):
        return padded.rstrip(b"\0") or ""
    return os.fsdecode(padded.partition(b"\0")[0])


def _shown(address: Sockaddr | None) -> str:
    return format_address(address) if isinstance(address, tuple) else repr(format_address(address))


# ---- building


def build(
    version: int,
    source: Any,
    destination: Any,
    *,
    tlvs: Iterable[TLV] = (),
    alpn: bytes | None = None,
    authority: str | None = None,
    unique_id: bytes | None = None,
    crc32c: bool = False,
) -> bytes:
    """Return a header for a stream, to be sent in front of everything else.

    Args:
        version: 1 or 2; only 2 has Unix addresses and TLVs.
        source, destination: the addresses that the client has and has connected to, as sockets give them (a flowinfo and a scope_id
            cannot be sent). One IPv4 and one IPv6 address go as IPv6, the former as ``::ffff:a.b.c.d``. None and None: LOCAL, or
            UNKNOWN in version 1, for a connection of the sender's own, such as a health check; receivers ignore its TLVs.
        tlvs: ``(type, value)`` of further TLVs, such as those from 0xE0 to 0xEF, which are free for your own use.
        alpn, authority, unique_id: as in `ProxyHeader`.
        crc32c: whether to add a checksum.

    Raises:
        InvalidAddressFormatError: an address cannot be sent, or the two do not go together.
        TypeError, ValueError: another argument makes no sense, or all is more than 65,535 bytes.
    """
    if version not in (1, 2):
        raise ValueError(f"the PROXY protocol has the versions 1 and 2, not {version!r}")
    if (source is None) != (destination is None):
        raise InvalidAddressFormatError(f"give both addresses, or None for both, not {source!r} and {destination!r}")
    ends = None if source is None else _pack_addresses(source, destination)
    packed = pack_tlvs(tlvs, alpn, authority, unique_id)
    if version == 1:
        if packed or crc32c:
            raise ValueError("version 1 of the PROXY protocol has no TLVs; use version 2")
        return b"PROXY UNKNOWN\r\n" if ends is None else _build_line(*ends)
    if crc32c:
        packed += CRC32C.to_bytes(1, "big") + b"\0\4" + bytes(4)
    fixed, block = LOCAL + b"\0", b""
    if ends is not None:
        family, one, other, ports = ends
        fixed, block = PROXY + bytes((family << 4 | 1,)), one + other + (b"" if family == UNIX else PORTS.pack(*ports))
    length = len(block) + len(packed)
    if length > 0xFFFF:
        raise ValueError(f"a header has at most 65535 bytes behind its first 16, and {length} are more")
    header = SIGNATURE + fixed + length.to_bytes(2, "big") + block + packed
    return header[:-4] + crc32c_of(header).to_bytes(4, "big") if crc32c else header


def _build_line(family: int, one: bytes, other: bytes, ports: tuple[int, int]) -> bytes:
    if family == UNIX:
        raise InvalidAddressFormatError("version 1 of the PROXY protocol has no Unix addresses; use version 2")
    if family == INET:
        hosts = [IPV4 % tuple(packed) for packed in (one, other)]
    else:
        # Groups of digits alone: the specification knows no other form, and not every receiver does.
        hosts = [_host6(WORDS.unpack(packed), mixed=False) for packed in (one, other)]
    return f"PROXY TCP{4 if family == INET else 6} {hosts[0]} {hosts[1]} {ports[0]} {ports[1]}\r\n".encode()


def _pack_addresses(source: Any, destination: Any) -> tuple[int, bytes, bytes, tuple[int, int]]:
    """Return the family of version 2, both addresses as it has them, both ports."""
    (family, one, port), (second, other, second_port) = _pack_address(source), _pack_address(destination)
    if family != second:
        if UNIX in (family, second):
            raise InvalidAddressFormatError(f"{source!r} and {destination!r} are not of the same kind: one is of a Unix socket")
        # Source: RFC 4291, 2.5.5.2. HAProxy does the same.
        one, other = (MAPPED + packed if len(packed) == 4 else packed for packed in (one, other))
        family = INET6
    return family, one, other, (port, second_port)


def _pack_address(address: Any) -> tuple[int, bytes, int]:
    path = os.fsencode(address) if isinstance(address, (str, bytes)) else None
    # parse_address() knows what can be bound or connected to; here a name may be missing, or be abstract with NULs inside as well.
    if path is None or path[:1] not in (b"", b"\0"):
        parsed = parse_address(address)
        if parsed.family != AF_UNIX:
            return _pack_ip(address, parsed)
        path = os.fsencode(parsed.sockaddr)  # type: ignore[arg-type]
    if len(path) > UNIX_PATH:
        raise InvalidAddressFormatError(f"the PROXY protocol takes paths of at most {UNIX_PATH} bytes; {address!r} has {len(path)}")
    if path.endswith(b"\0"):
        raise InvalidAddressFormatError(f"the NUL at the end of {address!r} could not be told from padding")
    return UNIX, path.ljust(UNIX_PATH, b"\0"), 0


def _pack_ip(address: Any, parsed: Address) -> tuple[int, bytes, int]:
    host, port = str(parsed.sockaddr[0]), int(parsed.sockaddr[1])
    if parsed.needs_lookup or not host:
        raise InvalidAddressFormatError(f"the PROXY protocol takes the numbers of an IP address, without a zone, and not {address!r}")
    if parsed.family == socket.AF_INET:
        return INET, IPv4Address(host).packed, port
    return INET6, IPv6Address(host).packed, port
