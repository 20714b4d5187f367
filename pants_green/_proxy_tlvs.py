"""TLVs of the PROXY protocol: what a header says besides the addresses; each is a type, a length of two bytes, a value.

*Source*: as of ``proxy_protocol``, of which this is a part.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from pants_green.errors import ProxyHeaderError

__all__ = [
    "ALPN",
    "AUTHORITY",
    "CRC32C",
    "NETNS",
    "SSL",
    "TLV",
    "UNIQUE_ID",
    "ProxySSL",
    "crc32c_of",
    "first",
    "pack_tlvs",
    "read_ssl",
    "read_tlvs",
    "wrong",
]

#: Types of TLVs; 0x04, NOOP, means nothing. Source: sections 2.2.1 to 2.2.7.
ALPN, AUTHORITY, CRC32C, UNIQUE_ID, SSL, NETNS = 0x01, 0x02, 0x03, 0x05, 0x20, 0x30

#: The texts inside the TLV for SSL, and their encoding. The certificate, 0x28, is bytes.
CN = 0x22
SSL_ENCODINGS = {0x21: "ascii", CN: "utf-8", 0x23: "ascii", 0x24: "ascii", 0x25: "ascii", 0x26: "ascii", 0x27: "ascii"}

#: Bytes of the longest unique_id. Source: section 2.2.5.
LONGEST_ID = 128

TLV = tuple[int, bytes]


class ProxySSL(NamedTuple):
    """What a proxy says of the TLS that a client spoke to it.

    Attributes:
        client: the flags; `tls`, `certificate_on_connection` and `certificate_in_session` tell them apart.
        verify: 0 if the certificate of the client was found good, or if there was none; see `verified`.
        tlvs: ``(type, value)`` of everything else, in order.

    *Source*: section 2.2.6.
    """

    client: int
    verify: int
    tlvs: tuple[TLV, ...] = ()

    @property
    def tls(self) -> bool:
        """Whether the client spoke TLS."""
        return bool(self.client & 1)

    @property
    def certificate_on_connection(self) -> bool:
        """Whether the client showed a certificate on this connection."""
        return bool(self.client & 2)

    @property
    def certificate_in_session(self) -> bool:
        """Whether the client showed a certificate at least once in the TLS session to which this connection belongs."""
        return bool(self.client & 4)

    @property
    def verified(self) -> bool:
        """Whether the client showed a certificate and it was found good. `verify` alone is 0 without a certificate, too."""
        return not self.verify and bool(self.client & 6)

    @property
    def version(self) -> str | None:
        """The version of TLS, such as ``"TLSv1.3"``."""
        return self._text(0x21)

    @property
    def cn(self) -> str | None:
        """The common name of the client's certificate; bytes in it that are not UTF-8 are there as with "surrogateescape"."""
        return self._text(CN)

    @property
    def cipher(self) -> str | None:
        """The cipher, such as ``"ECDHE-RSA-AES128-GCM-SHA256"``."""
        return self._text(0x23)

    @property
    def sig_alg(self) -> str | None:
        """How the proxy's certificate was signed, such as ``"RSA-SHA256"``."""
        return self._text(0x24)

    @property
    def key_alg(self) -> str | None:
        """The kind of key of the proxy's certificate, such as ``"RSA2048"``."""
        return self._text(0x25)

    @property
    def group(self) -> str | None:
        """The group of the key exchange, such as ``"X25519"``."""
        return self._text(0x26)

    @property
    def sig_scheme(self) -> str | None:
        """The signature scheme of the handshake."""
        return self._text(0x27)

    @property
    def certificate(self) -> bytes | None:
        """The client's certificate, in DER."""
        return first(self.tlvs, 0x28)

    def _text(self, kind: int) -> str | None:
        value = first(self.tlvs, kind)
        return None if value is None else _ssl_text(kind, value)

    def __repr__(self) -> str:
        certificate = "verified" if self.verified else "not verified" if self.client & 6 else "none"
        said = "".join(f" {name}={getattr(self, name)!r:.80}" for name in ("version", "cipher", "cn") if getattr(self, name) is not None)
        return f"<ProxySSL tls={self.tls} certificate={certificate}{said}>"


# ---- reading


def wrong(data: bytes | bytearray | memoryview, at: int, expected: str) -> ProxyHeaderError:
    begin = max(0, at - 40)
    shown = bytes(data[begin : at + 16])
    return ProxyHeaderError(f"no PROXY header: expected {expected} at byte {at} of {'...' if begin else ''}{shown!r}", at)


def read_tlvs(block: bytes, at: int) -> tuple[TLV, ...]:
    """Return the TLVs of a whole header, checked."""
    found, end = _split(block, at)
    if end != len(block):
        raise wrong(block, end, "a TLV that ends where the header does, or earlier,")
    checksum = 0
    for at, kind, value in found:
        try:
            _check(kind, value)
        except ValueError as error:
            raise wrong(block, at, str(error)) from None
        if kind == CRC32C:
            if checksum:
                raise wrong(block, at, "no second CRC32C")
            checksum = at + 3
    if checksum:
        right = crc32c_of(block[:checksum] + bytes(4) + block[checksum + 4 :])
        if right != int.from_bytes(block[checksum : checksum + 4], "big"):
            raise wrong(block, checksum, f"the CRC32C {right:#010x}")
    return tuple((kind, value) for _, kind, value in found)


def _split(data: bytes, at: int) -> tuple[list[tuple[int, int, bytes]], int]:
    """Cut ``data[at:]`` into TLVs: where each begins, its type and its value; and where the last whole one ends."""
    found = []
    while at + 3 <= len(data):
        end = at + 3 + int.from_bytes(data[at + 1 : at + 3], "big")
        if end > len(data):
            break
        found.append((at, data[at], data[at + 3 : end]))
        at = end
    return found, at


def _check(kind: int, value: bytes) -> None:
    """Raise ValueError, which says what is expected, for a TLV that a property could not read."""
    if kind == CRC32C and len(value) != 4:
        raise ValueError("a CRC32C of 4 bytes")
    if kind == UNIQUE_ID and len(value) > LONGEST_ID:
        raise ValueError(f"a unique_id of at most {LONGEST_ID} bytes")
    try:
        if kind in (AUTHORITY, NETNS):
            value.decode("utf-8" if kind == AUTHORITY else "ascii")
        elif kind == SSL:
            for inner, text in read_ssl(value).tlvs:
                _ssl_text(inner, text)
    except UnicodeDecodeError as error:
        raise ValueError(f"text in {error.encoding} in the TLV of type {kind:#04x}") from None


def read_ssl(value: bytes) -> ProxySSL:
    found, end = _split(value, 5)
    if end != len(value):
        raise ValueError("an SSL TLV of 5 bytes and whole TLVs")
    return ProxySSL(value[0], int.from_bytes(value[1:5], "big"), tuple((kind, inner) for _, kind, inner in found))


def _ssl_text(kind: int, value: bytes) -> str:
    # HAProxy hands a CN on as it is in the certificate, and in an old one (T61String) that is Latin-1: the client is no worse for it.
    return value.decode(SSL_ENCODINGS.get(kind, "latin-1"), "surrogateescape" if kind == CN else "strict")


def first(tlvs: tuple[TLV, ...], kind: int) -> bytes | None:
    return next((value for one, value in tlvs if one == kind), None)


# ---- building


def pack_tlvs(tlvs: Iterable[TLV], alpn: Any, authority: Any, unique_id: Any) -> bytes:
    if authority is not None:
        if not isinstance(authority, str):
            raise TypeError(f"authority is a host name, a str, not {authority!r:.100}")
        authority = authority.encode()
    named = [(kind, value) for kind, value in ((ALPN, alpn), (AUTHORITY, authority), (UNIQUE_ID, unique_id)) if value is not None]
    packed = []
    for kind, value in (*named, *tlvs):
        if isinstance(kind, bool) or not isinstance(kind, int):
            raise TypeError(f"the type of a TLV is an int, not {kind!r:.100}")
        if not 0 <= kind <= 0xFF:
            raise ValueError(f"the type of a TLV is from 0 to 255, not {kind}")
        if not isinstance(value, (bytes, bytearray, memoryview)):
            raise TypeError(f"the value of the TLV of type {kind:#04x} is bytes, not {value!r:.100}")
        value = bytes(value)
        if kind == CRC32C:
            raise ValueError("the checksum is added by crc32c=True and cannot be given")
        if len(value) > 0xFFFF:
            raise ValueError(f"the TLV of type {kind:#04x} has {len(value)} bytes; 65535 are the most")
        try:
            _check(kind, value)
        except ValueError as error:
            raise ValueError(f"no receiver could read {value!r:.100}; expected {error}") from None
        packed.append(bytes((kind,)) + len(value).to_bytes(2, "big") + value)
    return b"".join(packed)


# ---- the checksum


def _crc_of_byte(crc: int) -> int:
    for _ in range(8):
        crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


CRC_TABLE = tuple(map(_crc_of_byte, range(256)))


def crc32c_of(data: bytes) -> int:
    """Return the CRC32C (Castagnoli) of `data`.

    *Source*: RFC 4960, appendix B, which section 2.2.3 names: the polynomial 0x1EDC6F41, here with its bits in reverse, and a table
    for each byte (D. V. Sarwate, "Computation of Cyclic Redundancy Checks via Table Look-Up", 1988).
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF
