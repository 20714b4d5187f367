"""The PROXY protocol byte by byte: what a header says, how much of it is still to come, and at which byte garbage is refused."""

import io
import re
import socket
import tracemalloc
from ipaddress import IPv4Address, IPv6Address
from socket import AF_INET, AF_INET6, AF_UNIX, AF_UNSPEC

import proxyprotocol.result as theirs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from proxyprotocol.tlv import ProxyProtocolSSLTLV, ProxyProtocolTLV
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from pants_green._proxy_tlvs import crc32c_of
from pants_green.errors import InvalidAddressFormatError, PantsError, ProxyHeaderError
from pants_green.proxy_protocol import ProxyHeader, ProxySSL, build, parse
from pants_green.testing import fragmentations

SIGNATURE = bytes.fromhex("0D0A0D0A000D0A515549540A")

REQUEST = b"GET / HTTP/1.1\r\nHost: 192.168.0.11\r\n\r\n"

#: A TLS ClientHello begins like this.
HELLO = bytes.fromhex("16030100f5010000f10303")

LOCAL_V1 = ProxyHeader(1, True, AF_UNSPEC, None, None)
LOCAL_V2 = ProxyHeader(2, True, AF_UNSPEC, None, None)


def v2(command, family, block=b"", length=None):
    """Put a header of version 2 together by hand."""
    return SIGNATURE + bytes((command, family)) + (len(block) if length is None else length).to_bytes(2, "big") + block


def tlv(kind, value):
    return bytes((kind,)) + len(value).to_bytes(2, "big") + value


def slow_crc32c(data):
    """The same as crc32c_of, bit by bit, the bits in the order in which the polynomial is written."""

    def mirrored(number, bits):
        return int(f"{number:0{bits}b}"[::-1], 2)

    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= mirrored(byte, 8) << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x1EDC6F41 if crc >> 31 else 0)) & 0xFFFFFFFF
    return mirrored(crc, 32) ^ 0xFFFFFFFF


def sealed(header):
    """Fill in the only checksum of a header, four zeros behind its type and length."""
    at = header.index(b"\x03\x00\x04\0\0\0\0", 16) + 3
    return header[:at] + slow_crc32c(header).to_bytes(4, "big") + header[at + 4 :]


TCP4 = bytes((192, 168, 0, 1, 192, 168, 0, 11)) + (56324).to_bytes(2, "big") + (443).to_bytes(2, "big")
TCP6 = bytes.fromhex("20010db8000000000000000000000001 20010db8000000000000000000000002") + TCP4[-4:]
PATHS = b"/run/client.sock".ljust(108, b"\0") + b"\0server".ljust(108, b"\0")

IPV4_ENDS = (("192.168.0.1", 56324), ("192.168.0.11", 443))
IPV6_ENDS = (("2001:db8::1", 56324, 0, 0), ("2001:db8::2", 443, 0, 0))

SSL = b"\x07\0\0\0\0" + b"".join(
    (
        tlv(0x21, b"TLSv1.3"),
        tlv(0x22, "Jürgen".encode()),
        tlv(0x23, b"TLS_AES_128_GCM_SHA256"),
        tlv(0x24, b"RSA-SHA256"),
        tlv(0x25, b"RSA2048"),
        tlv(0x26, b"X25519"),
        tlv(0x27, b"ecdsa_secp256r1_sha256"),
        tlv(0x28, b"\x30\x03\x01\0\0"),
        tlv(0x77, b"\xff"),
    )
)

ALL_TLVS = (
    (0x01, b"h2"),
    (0x02, b"example.com"),
    (0x04, b""),
    (0x05, b"\0" * 128),
    (0x20, SSL),
    (0x30, b"blue"),
    (0xE0, b"ours"),
    (0xEF, b"\xff" * 300),
    (0xF0, b""),
)


def line(text, family=AF_INET, *ends):
    return text, ProxyHeader(1, False, family, *ends)


#: Every kind of valid header, and what it says.
VALID = {
    # The example of the specification, and its longest lines.
    "v1-example": line(b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n", AF_INET, *IPV4_ENDS),
    "v1-longest-tcp4": line(
        b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", AF_INET, ("255.255.255.255", 65535), ("255.255.255.255", 65535)
    ),
    "v1-longest-tcp6": line(
        b"PROXY TCP6 %b %b 65535 65535\r\n" % ((b":".join([b"ffff"] * 8),) * 2),
        AF_INET6,
        (":".join(["ffff"] * 8), 65535, 0, 0),
        (":".join(["ffff"] * 8), 65535, 0, 0),
    ),
    "v1-unknown": (b"PROXY UNKNOWN\r\n", LOCAL_V1),
    "v1-longest-unknown": (b"PROXY UNKNOWN %b %b 65535 65535\r\n" % ((b":".join([b"ffff"] * 8),) * 2), LOCAL_V1),
    "v1-unknown-and-anything": (b"PROXY UNKNOWN \0\xff  TCP4 1.2.3.4 \t\r\n", LOCAL_V1),
    "v1-unknown-and-a-space": (b"PROXY UNKNOWN \r\n", LOCAL_V1),
    "v1-shortest-tcp4": line(b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n", AF_INET, ("0.0.0.0", 0), ("0.0.0.0", 0)),
    "v1-shortest-tcp6": line(b"PROXY TCP6 :: :: 0 0\r\n", AF_INET6, ("::", 0, 0, 0), ("::", 0, 0, 0)),
    "v1-upper-case": line(b"PROXY TCP6 2001:0DB8:0000::0001 2001:DB8:0:0:0:0:0:2 56324 443\r\n", AF_INET6, *IPV6_ENDS),
    "v1-ipv4-in-ipv6": line(
        b"PROXY TCP6 ::ffff:192.168.0.1 64:ff9b::1.2.3.4 1 2\r\n", AF_INET6, ("::ffff:192.168.0.1", 1, 0, 0), ("64:ff9b::102:304", 2, 0, 0)
    ),
    "v1-gap-of-one": line(
        b"PROXY TCP6 ::2:3:4:5:6:7:8 1:2:3:4:5:6:7:: 1 2\r\n", AF_INET6, ("0:2:3:4:5:6:7:8", 1, 0, 0), ("1:2:3:4:5:6:7:0", 2, 0, 0)
    ),
    "v1-dotted-without-gap": line(
        b"PROXY TCP6 1:2:3:4:5:6:7.8.9.10 1::5:6:1.2.3.4 1 2\r\n", AF_INET6, ("1:2:3:4:5:6:708:90a", 1, 0, 0), ("1::5:6:102:304", 2, 0, 0)
    ),
    "v2-local": (v2(0x20, 0x00), LOCAL_V2),
    # LOCAL: the family is ignored, the block skipped, TLVs or not, and whatever its checksum.
    "v2-local-with-addresses": (v2(0x20, 0x11, TCP4 + tlv(3, b"nope")), LOCAL_V2),
    "v2-local-of-no-family": (v2(0x20, 0xFF, b"\1\2\3"), LOCAL_V2),
    "v2-tcp4": (v2(0x21, 0x11, TCP4), ProxyHeader(2, False, AF_INET, *IPV4_ENDS)),
    "v2-udp4": (v2(0x21, 0x12, TCP4), ProxyHeader(2, False, AF_INET, *IPV4_ENDS)),
    "v2-tcp6": (v2(0x21, 0x21, TCP6), ProxyHeader(2, False, AF_INET6, *IPV6_ENDS)),
    "v2-udp6": (v2(0x21, 0x22, TCP6), ProxyHeader(2, False, AF_INET6, *IPV6_ENDS)),
    "v2-unix": (v2(0x21, 0x31, PATHS), ProxyHeader(2, False, AF_UNIX, "/run/client.sock", b"\0server")),
    "v2-unix-datagrams": (v2(0x21, 0x32, PATHS), ProxyHeader(2, False, AF_UNIX, "/run/client.sock", b"\0server")),
    "v2-unix-without-names": (v2(0x21, 0x31, bytes(216)), ProxyHeader(2, False, AF_UNIX, "", "")),
    "v2-unix-full": (v2(0x21, 0x31, b"/" * 108 + b"\0" + b"x" * 107), ProxyHeader(2, False, AF_UNIX, "/" * 108, b"\0" + b"x" * 107)),
    "v2-unix-garbage-behind-nul": (v2(0x21, 0x31, b"/a\0b".ljust(108, b"x") * 2), ProxyHeader(2, False, AF_UNIX, "/a", "/a")),
    "v2-unix-nul-inside": (v2(0x21, 0x31, b"\0a\0b".ljust(108, b"\0") * 2), ProxyHeader(2, False, AF_UNIX, b"\0a\0b", b"\0a\0b")),
    # AF_UNSPEC: no addresses; HAProxy sends TLVs all the same.
    "v2-unspec": (v2(0x21, 0x00), LOCAL_V2),
    "v2-unspec-with-tlvs": (v2(0x21, 0x00, tlv(2, b"a.example")), LOCAL_V2._replace(tlvs=((2, b"a.example"),))),
    "v2-unspec-with-a-transport": (v2(0x21, 0x01), LOCAL_V2),
    # An unknown transport: nobody can tell what is in the block.
    "v2-no-transport": (v2(0x21, 0x10, b"\1\2\3"), LOCAL_V2),
    "v2-unix-without-transport": (v2(0x21, 0x30), LOCAL_V2),
    "v2-tlvs": (
        v2(0x21, 0x11, TCP4 + b"".join(tlv(*one) for one in ALL_TLVS)),
        ProxyHeader(2, False, AF_INET, *IPV4_ENDS, ALL_TLVS),
    ),
    "v2-the-same-tlv-twice": (
        v2(0x21, 0x21, TCP6 + tlv(2, b"a") + tlv(2, b"b")),
        ProxyHeader(2, False, AF_INET6, *IPV6_ENDS, ((2, b"a"), (2, b"b"))),
    ),
    "v2-checksum": (
        sealed(v2(0x21, 0x11, TCP4 + tlv(3, bytes(4)) + tlv(4, b"padding"))),
        ProxyHeader(2, False, AF_INET, *IPV4_ENDS, ((3, bytes.fromhex("e1d6faa4")), (4, b"padding"))),
    ),
}

each_valid = pytest.mark.parametrize(("data", "header"), VALID.values(), ids=VALID)


def rebuilt(header):
    """Build what was parsed again. What is local loses its TLVs, for nobody reads them."""
    if header.local:
        return build(header.version, None, None)
    tlvs = [one for one in header.tlvs if one[0] != 3]
    return build(header.version, header.source, header.destination, tlvs=tlvs, crc32c=header.crc32c is not None)


def said(header):
    """What of a header survives being built again."""
    return header._replace(tlvs=() if header.local else tuple(one for one in header.tlvs if one[0] != 3))


# ---- valid headers


@each_valid
def test_valid_header_is_parsed_and_ends_where_it_does(data, header):
    for behind in (b"", REQUEST, HELLO, b"\r\n", data):
        for kind in (bytes, bytearray, memoryview):
            assert parse(kind(data + behind)) == (header, len(data))
    assert parse(data, versions=[header.version]) == (header, len(data))


@each_valid
def test_every_prefix_asks_for_more_but_not_for_too_much(data, header):
    for size in range(len(data)):
        for versions in ((1, 2), (header.version,)):
            assert 1 <= parse(data[:size], versions=versions) <= len(data) - size


@each_valid
def test_header_in_pieces_is_the_same(data, header):
    for pieces in fragmentations(data) if len(data) < 120 else [[data[at : at + 1] for at in range(len(data))]]:
        come = b""
        for piece in pieces:
            come += piece
            found = parse(come)
            if not isinstance(found, int):
                break
        assert (come, found) == (data, (header, len(data)))


@each_valid
def test_receiving_what_is_asked_for_takes_no_byte_too_many(data, header):
    stream = io.BytesIO(data + HELLO)
    come = b""
    while isinstance(found := parse(come), int):
        come += stream.read(found)
    assert found == (header, len(data))
    assert stream.read() == HELLO


@each_valid
def test_valid_header_built_again_says_the_same(data, header):
    again, end = parse(rebuilt(header))
    assert said(again) == said(header)
    assert end == len(rebuilt(header))


def test_documented_loop_receives_the_header_alone():
    one, other = socket.socketpair()
    with one, other:
        one.sendall(VALID["v1-example"][0] + REQUEST)
        data = b""
        while isinstance(found := parse(data), int):
            data += other.recv(found)
        header, end = found
        assert (header.source, end) == (("192.168.0.1", 56324), len(data))
        assert other.recv(1000) == REQUEST


# ---- how much is missing


#: Whatever may be next in a line, and some that never may.
NEXT = sorted({*b"PROXY TCP46UNKNOWN0123456789abcdefF:.\r\n", *b"gG-+\0\t\x7f\xff%/"})

LINES = [data for data, _ in VALID.values() if data.startswith(b"PROXY")] + [
    b"PROXY TCP4 1.20.255.0 ",
    b"PROXY TCP6 1:2:3:4:5:6:7:8 1::7 ",
    b"PROXY TCP6 fe80::1:2:3:4:0.1.2.3 ::",
]


@pytest.mark.parametrize("whole", LINES)
def test_number_of_missing_bytes_is_that_of_the_shortest_header(whole):
    """One byte brings the end nearer by one at most, and some byte does: so as many as are missing can be all."""
    for size in range(whole.find(b"\r\n") if whole.endswith(b"\n") else len(whole)):
        begun = whole[:size]
        missing = parse(begun)
        nearest = missing
        for byte in NEXT:
            try:
                found = parse(begun + bytes((byte,)))
            except ProxyHeaderError:
                continue
            nearest = min(nearest, found if isinstance(found, int) else 0)
        assert nearest == missing - 1, begun


def test_block_asks_for_its_addresses_before_its_length_is_known():
    data = v2(0x21, 0x21, TCP6)
    assert [parse(data[:size]) for size in (12, 13, 14, 15, 16, 17)] == [4, 3, 38, 37, 36, 35]


@pytest.mark.parametrize(("versions", "asked"), [((1, 2), 15), ((1,), 15), ([2], 16), ({1, 2}, 15)])
def test_nothing_yet_asks_for_the_shortest_header(versions, asked):
    assert parse(b"", versions=versions) == asked


def test_unfinished_line_that_no_crlf_could_end_in_time_is_refused():
    begun = b"PROXY UNKNOWN ".ljust(105, b"x")
    assert parse(begun) == 2
    assert parse(begun + b"\r") == 1
    assert parse(begun + b"\r\n") == (LOCAL_V1, 107)
    for more in (b"x", b"\rx", b"xx\r\n"):
        with pytest.raises(ProxyHeaderError, match=r"107 bytes|no CR or LF but CRLF"):
            parse(begun + more)
    # inet_ntop() never writes an address like that, and there is no room for two of them.
    wide = b":".join([b"ffff"] * 6) + b":255.255.255.255"
    assert parse(b"PROXY TCP6 %b %b" % (wide, wide[:-1])) == 6
    with pytest.raises(ProxyHeaderError, match="no more than 107 bytes"):
        parse(b"PROXY TCP6 %b %b" % (wide, wide))


# ---- wrong input


#: What is refused at the byte of that number, and not before.
WRONG = {
    "http": (REQUEST, 0),
    "tls": (HELLO, 0),
    "zero": (b"\0", 0),
    "space-first": (b" PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n", 0),
    "lower-case": (b"proxy TCP4 1.2.3.4 1.2.3.4 1 2\r\n", 0),
    "http-post": (b"POST / HTTP/1.1\r\n", 1),
    "smtp-crlf": (b"\r\nEHLO example.com\r\n", 2),
    "tab": (b"PROXY\tTCP4 1.2.3.4 1.2.3.4 1 2\r\n", 5),
    "proxy-alone": (b"PROXY\r\n", 5),
    "two-spaces": (b"PROXY  TCP4 1.2.3.4 1.2.3.4 1 2\r\n", 6),
    "family-of-udp": (b"PROXY UDP4 1.2.3.4 1.2.3.4 1 2\r\n", 7),
    "family-5": (b"PROXY TCP5 1.2.3.4 1.2.3.4 1 2\r\n", 9),
    "family-too-short": (b"PROXY TCP 1.2.3.4 1.2.3.4 1 2\r\n", 9),
    "family-too-long": (b"PROXY TCP46 1.2.3.4 1.2.3.4 1 2\r\n", 10),
    "unknown-too-long": (b"PROXY UNKNOWNS\r\n", 13),
    "unknown-lone-lf": (b"PROXY UNKNOWN \nGET / HTTP/1.1\r\n", 14),
    "unknown-lone-lf-at-once": (b"PROXY UNKNOWN\nGET / HTTP/1.1\r\n", 13),
    "family-alone": (b"PROXY TCP4\n", 10),
    "no-space-twice": (b"PROXY TCP4  1.2.3.4 1.2.3.4 1 2\r\n", 11),
    "octet-of-256": (b"PROXY TCP4 1.2.3.256 1.2.3.4 1 2\r\n", 19),
    "octet-with-zero": (b"PROXY TCP4 1.2.3.04 1.2.3.4 1 2\r\n", 18),
    "octet-missing": (b"PROXY TCP4 1.2.3 1.2.3.4 1 2\r\n", 16),
    "octet-empty": (b"PROXY TCP4 1..2.3 1.2.3.4 1 2\r\n", 13),
    "octet-too-many": (b"PROXY TCP4 1.2.3.4.5 1.2.3.4 1 2\r\n", 18),
    "octet-in-hex": (b"PROXY TCP4 0x1.2.3.4 1.2.3.4 1 2\r\n", 12),
    "ipv6-for-ipv4": (b"PROXY TCP4 ::1 ::1 1 2\r\n", 11),
    "ipv4-for-ipv6": (b"PROXY TCP6 1.2.3.4 1.2.3.4 1 2\r\n", 12),
    "name": (b"PROXY TCP4 localhost 1.2.3.4 1 2\r\n", 11),
    "bracket": (b"PROXY TCP6 [::1] ::1 1 2\r\n", 11),
    "zone": (b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n", 18),
    "three-colons": (b"PROXY TCP6 1:::2 ::1 1 2\r\n", 14),
    "two-gaps": (b"PROXY TCP6 1::2::3 ::1 1 2\r\n", 16),
    "one-colon-first": (b"PROXY TCP6 :1::2 ::1 1 2\r\n", 12),
    "one-colon-last": (b"PROXY TCP6 1:2: ::1 1 2\r\n", 15),
    "seven-groups": (b"PROXY TCP6 1:2:3:4:5:6:7 ::1 1 2\r\n", 24),
    "nine-groups": (b"PROXY TCP6 1:2:3:4:5:6:7:8:9 ::1 1 2\r\n", 26),
    "gap-of-none": (b"PROXY TCP6 1:2:3:4::5:6:7:8 ::1 1 2\r\n", 25),
    "gap-of-none-at-the-end": (b"PROXY TCP6 1:2:3:4:5:6:7:8:: ::1 1 2\r\n", 26),
    "group-too-long": (b"PROXY TCP6 ::12345 ::1 1 2\r\n", 17),
    "group-no-hex": (b"PROXY TCP6 ::fg ::1 1 2\r\n", 14),
    "dotted-too-early": (b"PROXY TCP6 1:2:3:4:5:1.2.3.4 ::1 1 2\r\n", 22),
    "dotted-in-front": (b"PROXY TCP6 1.2.3.4:: ::1 1 2\r\n", 12),
    "dotted-of-five": (b"PROXY TCP6 ::1.2.3.4.5 ::1 1 2\r\n", 20),
    "port-with-zero": (b"PROXY TCP4 1.2.3.4 1.2.3.4 011 2\r\n", 28),
    "port-with-plus": (b"PROXY TCP4 1.2.3.4 1.2.3.4 +1 2\r\n", 27),
    "port-with-minus": (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 -2\r\n", 29),
    "port-with-underscore": (b"PROXY TCP4 1.2.3.4 1.2.3.4 1_0 2\r\n", 28),
    "port-of-65536": (b"PROXY TCP4 1.2.3.4 1.2.3.4 65536 2\r\n", 31),
    "port-of-six-digits": (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 100000\r\n", 34),
    "port-empty": (b"PROXY TCP4 1.2.3.4 1.2.3.4  2\r\n", 27),
    "port-in-arabic": ("PROXY TCP4 1.2.3.4 1.2.3.4 ٣ 2\r\n".encode(), 27),
    "port-in-superscript": (b"PROXY TCP4 1.2.3.4 1.2.3.4 \xb2 2\r\n", 27),
    "port-missing": (b"PROXY TCP4 1.2.3.4 1.2.3.4 1\n", 28),
    "lone-lf": (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\nGET / HTTP/1.1\r\n", 30),
    "space-before-crlf": (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2 \r\n", 30),
    "sixth-field": (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2 3\r\n", 30),
    "nul": (b"PROXY TCP4 1.2.3.4\0 1.2.3.4 1 2\r\n", 18),
    "line-of-200-bytes": (b"PROXY UNKNOWN".ljust(200) + b"\r\n", 105),
    "line-without-end": (b"PROXY UNKNOWN " + b"x" * 10_000, 105),
    "signature": (SIGNATURE[:11] + b"\r", 11),
    "version-1-of-2": (v2(0x11, 0x11, TCP4), 12),
    "version-3": (v2(0x31, 0x11, TCP4), 12),
    "command-2": (v2(0x22, 0x11, TCP4), 12),
    "command-15": (v2(0x2F, 0x11, TCP4), 12),
    "family-4-of-v2": (v2(0x21, 0x41, TCP4), 13),
    "family-15-of-v2": (v2(0x21, 0xF0, TCP4), 13),
    "transport-3": (v2(0x21, 0x13, TCP4), 13),
    "transport-15-of-unspec": (v2(0x21, 0x0F, TCP4), 13),
}

#: The same of lines that end where something is missing: at their CR, which is known to be wrong when more is there, or not.
WRONG_ENDS = {
    "proxy": (b"PROXY \r\n", 6),
    "half-a-word": (b"PROXY TCP\r\n", 9),
    "half-of-unknown": (b"PROXY UNKNOW\r\n", 12),
    "word": (b"PROXY TCP4\r\n", 10),
    "word-and-space": (b"PROXY TCP4 \r\n", 11),
    "half-an-address": (b"PROXY TCP4 1.2.3\r\n", 16),
    "address": (b"PROXY TCP6 ::1\r\n", 14),
    "half-a-gap": (b"PROXY TCP6 ::1 :\r\n", 16),
    "addresses": (b"PROXY TCP4 1.2.3.4 1.2.3.4\r\n", 26),
    "port": (b"PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n", 28),
    "port-and-space": (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 \r\n", 29),
    "two-cr": (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\r\n", 30),
    "lone-cr": (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\rGET", 30),
    "lone-cr-of-unknown": (b"PROXY UNKNOWN x\rGET / HTTP/1.1\r\n", 15),
    "two-cr-of-unknown": (b"PROXY UNKNOWN\r\r\n", 13),
    "length-high-byte": (v2(0x20, 0x00, length=0x1100), 14),
    "length": (v2(0x20, 0x00, length=4097), 14),
    "length-most": (v2(0x21, 0x11, length=65535), 14),
    "no-addresses": (v2(0x21, 0x11), 14),
    "ipv4-too-short": (v2(0x21, 0x11, TCP4[:11]), 14),
    "ipv6-too-short": (v2(0x21, 0x21, TCP6[:35]), 14),
    "ipv4-for-ipv6": (v2(0x21, 0x22, TCP4), 14),
    "unix-too-short": (v2(0x21, 0x31, PATHS[:215]), 14),
}

#: TLVs that are wrong, where, and what was expected there; seen when the whole header is there.
WRONG_TLVS = {
    "type-alone": (b"\xe0", 28, "a TLV that ends"),
    "half-a-length": (b"\xe0\0", 28, "a TLV that ends"),
    "value-missing": (b"\xe0\0\1", 28, "a TLV that ends"),
    "value-too-short": (tlv(1, b"h2") + b"\xe0\0\5abcd", 33, "a TLV that ends"),
    "padding-of-two": (tlv(1, b"h2") + b"\0\0", 33, "a TLV that ends"),
    "overlapping-the-next": (b"\x01\0\4h2" + tlv(2, b""), 35, "a TLV that ends"),
    "authority": (tlv(2, b"\xff.example"), 28, "text in utf-8 in the TLV of type 0x02"),
    "netns": (tlv(0x30, "blå".encode()), 28, "text in ascii in the TLV of type 0x30"),
    "unique-id": (tlv(1, b"") + tlv(5, b"x" * 129), 31, "a unique_id of at most 128 bytes"),
    "checksum": (tlv(3, bytes(4)), 31, "the CRC32C 0x"),
    "checksum-of-three-bytes": (tlv(3, bytes(3)), 28, "a CRC32C of 4 bytes"),
    "checksum-of-five-bytes": (tlv(3, bytes(5)), 28, "a CRC32C of 4 bytes"),
    "ssl-empty": (tlv(0x20, b""), 28, "an SSL TLV of 5 bytes"),
    "ssl-too-short": (tlv(0x20, b"\1\0\0\0"), 28, "an SSL TLV of 5 bytes"),
    "ssl-half-a-tlv": (tlv(0x20, b"\1\0\0\0\0\x21\0"), 28, "whole TLVs"),
    "ssl-past-its-end": (tlv(0x20, b"\1\0\0\0\0\x21\0\7TLSv1.") + tlv(1, b"3"), 28, "whole TLVs"),
    "ssl-cipher": (tlv(0x20, b"\1\0\0\0\0" + tlv(0x23, b"\xc3\xbc")), 28, "text in ascii in the TLV of type 0x20"),
}


@pytest.mark.parametrize(("data", "position"), WRONG.values(), ids=WRONG)
def test_wrong_byte_is_refused_as_soon_as_it_is_there(data, position):
    for size in range(position):
        assert parse(data[:size]) >= 1
    for come in (data[: position + 1], data, data + REQUEST):
        with pytest.raises(ProxyHeaderError, match=f"at byte {position} of ") as caught:
            parse(come)
        assert caught.value.position == position


@pytest.mark.parametrize(("data", "position"), WRONG_ENDS.values(), ids=WRONG_ENDS)
def test_wrong_ending_or_length_is_refused_at_its_first_byte(data, position):
    for size in range(position):
        assert parse(data[:size]) >= 1
    # A CR is wrong by itself but where CRLF may be; of a length the second byte may decide.
    for come in (data[: position + 2], data):
        with pytest.raises(ProxyHeaderError, match=f"at byte {position} of ") as caught:
            parse(come)
        assert caught.value.position == position


@pytest.mark.parametrize(("block", "position", "expected"), WRONG_TLVS.values(), ids=WRONG_TLVS)
def test_wrong_tlv_is_refused_when_the_header_is_there(block, position, expected):
    data = v2(0x21, 0x11, TCP4 + block)
    for size in range(len(data)):
        assert 1 <= parse(data[:size]) <= len(data) - size
    with pytest.raises(ProxyHeaderError, match=re.escape(expected)) as caught:
        parse(data + REQUEST)
    assert caught.value.position == position
    # LOCAL is accepted, whatever it brings along.
    assert parse(v2(0x20, 0x11, TCP4 + block) + REQUEST) == (LOCAL_V2, len(data))


def test_second_checksum_is_refused_before_any_is_calculated():
    # Else a header full of them would keep the process busy for a second.
    with pytest.raises(ProxyHeaderError, match="no second CRC32C at byte 35"):
        parse(v2(0x21, 0x11, TCP4 + tlv(3, bytes(4)) * 580))


def test_changed_byte_of_a_header_with_checksum_is_always_noticed():
    data, _ = VALID["v2-checksum"]
    for at in {*range(len(data))} - {28}:  # without its type it is no checksum
        with pytest.raises(ProxyHeaderError):
            parse(data[:at] + bytes((data[at] ^ 0x10,)) + data[at + 1 :])


@pytest.mark.parametrize("name", ["v1-example", "v1-ipv4-in-ipv6", "v1-unknown", "v2-tcp4", "v2-checksum", "v2-unspec-with-tlvs"])
def test_changed_byte_is_refused_or_says_something_consistent(name):
    data, _ = VALID[name]
    for at in range(len(data)):
        for byte in range(256):
            changed = data[:at] + bytes((byte,)) + data[at + 1 :]
            try:
                found = parse(changed + REQUEST, max_length=300)
            except ProxyHeaderError:
                continue
            if not isinstance(found, int):
                header, end = found
                assert said(parse(rebuilt(header))[0]) == said(header)
                assert parse((changed + REQUEST)[:end]) == found


def test_payload_is_not_taken_for_tlvs():
    data, header = VALID["v2-tcp4"]
    assert parse(data + tlv(0xE0, b"x")) == (header, len(data))


def test_version_that_is_not_allowed_is_refused_at_the_first_byte():
    with pytest.raises(ProxyHeaderError, match="expected the signature of version 2 at byte 0"):
        parse(VALID["v1-example"][0], versions=(2,))
    with pytest.raises(ProxyHeaderError, match="expected b'PROXY ' of version 1 at byte 0"):
        parse(VALID["v2-tcp4"][0], versions=(1,))


def test_error_is_a_value_error_whose_message_is_short():
    with pytest.raises(ProxyHeaderError) as caught:
        parse(b"PROXY UNKNOWN " + b"\xff" * 1_000_000)
    assert isinstance(caught.value, PantsError)
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 350
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("versions", [(), (3,), (1, 3), [0], ("1",)])
def test_versions_that_do_not_exist_are_refused(versions):
    with pytest.raises(ValueError, match=r"versions is \(1, 2\), \(1,\) or \(2,\), not"):
        parse(b"", versions=versions)


@pytest.mark.parametrize("data", ["PROXY", None, 5, [1]])
def test_what_is_not_bytes_is_refused(data):
    with pytest.raises(TypeError, match=r"parse\(\) takes bytes, not"):
        parse(data)


# ---- limits


def test_length_is_bounded_by_max_length():
    begun = v2(0x21, 0x11, length=5000)
    with pytest.raises(ProxyHeaderError, match="a length of no more than 4096 bytes"):
        parse(begun)
    assert parse(begun, max_length=5000) == 5000
    assert parse(v2(0x21, 0x11, length=4096)) == 4096
    # The first byte of the length is enough, if it is.
    assert parse(begun[:15], max_length=5000) == 1 + (5000 & 0xFF00)
    with pytest.raises(ProxyHeaderError):
        parse(begun[:15], max_length=4000)
    whole = v2(0x21, 0x11, TCP4 + tlv(0xE0, bytes(65535 - 15)))
    assert parse(whole, max_length=65535)[1] == len(whole) == 16 + 65535


def test_memory_does_not_depend_on_what_is_behind_or_before_the_end():
    unfinished = v2(0x21, 0x11, bytes(60_000), length=65_535)
    behind = VALID["v1-example"][0] + bytes(5_000_000)
    tracemalloc.start()
    try:
        for data in (behind, memoryview(behind), VALID["v2-tlvs"][0] + behind, unfinished):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            parse(data, max_length=65_535)
            assert tracemalloc.get_traced_memory()[1] - before < 10_000
    finally:
        tracemalloc.stop()


# ---- what a header says


def test_tlvs_are_properties_of_the_header():
    header, _ = parse(VALID["v2-tlvs"][0])
    assert header.tlvs == ALL_TLVS
    assert (header.alpn, header.authority, header.netns) == (b"h2", "example.com", "blue")
    assert (header.unique_id, header.crc32c) == (bytes(128), None)
    ssl = header.ssl
    assert (ssl.client, ssl.verify) == (7, 0)
    assert (ssl.tls, ssl.certificate_on_connection, ssl.certificate_in_session, ssl.verified) == (True, True, True, True)
    assert (ssl.version, ssl.cn, ssl.cipher) == ("TLSv1.3", "Jürgen", "TLS_AES_128_GCM_SHA256")
    assert (ssl.sig_alg, ssl.key_alg, ssl.group, ssl.sig_scheme) == ("RSA-SHA256", "RSA2048", "X25519", "ecdsa_secp256r1_sha256")
    assert ssl.certificate == b"\x30\x03\x01\0\0"
    assert ssl.tlvs[-1] == (0x77, b"\xff")


def test_tlvs_that_are_not_there_are_none():
    for header in (LOCAL_V1, LOCAL_V2, parse(VALID["v1-example"][0])[0]):
        assert [header.alpn, header.authority, header.crc32c, header.unique_id, header.ssl, header.netns] == [None] * 6
    ssl = ProxySSL(0, 1)
    assert [ssl.version, ssl.cn, ssl.cipher, ssl.sig_alg, ssl.key_alg, ssl.group, ssl.sig_scheme, ssl.certificate] == [None] * 8


def test_first_of_two_equal_tlvs_counts():
    assert parse(VALID["v2-the-same-tlv-twice"][0])[0].authority == "a"


def test_checksum_is_a_number():
    assert parse(VALID["v2-checksum"][0])[0].crc32c == 0xE1D6FAA4


@pytest.mark.parametrize(
    ("client", "verify", "verified"), [(1, 0, False), (3, 0, True), (5, 0, True), (3, 1, False), (7, 20, False), (0, 0, False)]
)
def test_certificate_is_verified_only_if_there_was_one(client, verify, verified):
    """OpenSSL, and so HAProxy, has no complaint about a certificate that was not shown."""
    header, _ = parse(v2(0x21, 0x11, TCP4 + tlv(0x20, bytes((client,)) + verify.to_bytes(4, "big"))))
    assert (header.ssl.verified, header.ssl.verify) == (verified, verify)
    assert (header.ssl.tls, header.ssl.certificate_on_connection, header.ssl.certificate_in_session) == (
        client in (1, 3, 5, 7),
        client in (3, 7),
        client in (5, 7),
    )


def test_common_name_in_latin_1_is_what_haproxy_makes_of_an_old_certificate():
    ssl = tlv(0x20, b"\7\0\0\0\0" + tlv(0x22, b"J\xfcrgen"))
    header, _ = parse(v2(0x21, 0x11, TCP4 + ssl))
    assert header.ssl.cn == "J\udcfcrgen"
    assert header.ssl.cn.encode("utf-8", "surrogateescape") == b"J\xfcrgen"
    assert repr(header.ssl).isascii()


def test_header_is_a_value():
    one, _ = parse(VALID["v2-tlvs"][0])
    other, _ = parse(bytearray(VALID["v2-tlvs"][0]))
    assert one == other
    assert hash(one) == hash(other)
    for changed in (one, one.ssl):
        with pytest.raises(AttributeError):
            changed.version = 1
        with pytest.raises(AttributeError):
            changed.more = 1
        assert not hasattr(changed, "__dict__")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v1-example", "<ProxyHeader v1 192.168.0.1:56324 -> 192.168.0.11:443>"),
        ("v1-unknown", "<ProxyHeader v1 local>"),
        ("v2-tcp6", "<ProxyHeader v2 [2001:db8::1]:56324 -> [2001:db8::2]:443>"),
        ("v2-unix", "<ProxyHeader v2 '/run/client.sock' -> '@server'>"),
        ("v2-unix-without-names", "<ProxyHeader v2 '?' -> '?'>"),
        ("v2-unspec-with-tlvs", "<ProxyHeader v2 local authority=b'a.example'>"),
        ("v2-checksum", "<ProxyHeader v2 192.168.0.1:56324 -> 192.168.0.11:443 and 2 more>"),
    ],
)
def test_repr_is_fit_for_a_log(name, text):
    assert repr(parse(VALID[name][0])[0]) == text


def test_repr_of_anything_is_one_short_line():
    nasty = b"\n\x1b[2J" * 1000
    ssl = b"\7\0\0\0\0" + b"".join(tlv(kind, nasty) for kind in range(0x21, 0x28))
    block = b"/\n\xff".ljust(108, b"\n") * 2 + tlv(1, nasty) + tlv(2, nasty) + tlv(5, nasty[:128]) + tlv(0x20, ssl)
    header, _ = parse(v2(0x21, 0x31, block), max_length=65535)
    for text in (repr(header), repr(header.ssl)):
        assert len(text) < 2000
        assert text.isprintable()
    assert repr(ProxySSL(1, 0)) == "<ProxySSL tls=True certificate=none>"
    assert repr(ProxySSL(3, 9)) == "<ProxySSL tls=True certificate=not verified>"


# ---- building


def test_built_headers_are_those_of_the_specification():
    for version, name, ends in ((1, "v1-example", IPV4_ENDS), (2, "v2-tcp4", IPV4_ENDS), (2, "v2-tcp6", IPV6_ENDS)):
        assert build(version, *ends) == VALID[name][0]
    assert build(2, "/run/client.sock", b"\0server") == VALID["v2-unix"][0]
    assert build(2, "", b"") == VALID["v2-unix-without-names"][0]
    assert build(1, None, None) == VALID["v1-unknown"][0]
    assert build(2, None, None) == VALID["v2-local"][0]
    assert build(2, *IPV4_ENDS, tlvs=[(0xE0, bytearray(b"x"))], alpn=b"h2", authority="ä.example", unique_id=b"7") == v2(
        0x21, 0x11, TCP4 + tlv(1, b"h2") + tlv(2, "ä.example".encode()) + tlv(5, b"7") + tlv(0xE0, b"x")
    )
    assert build(2, *IPV4_ENDS, tlvs=iter([(4, b"padding")]), crc32c=True) == sealed(
        v2(0x21, 0x11, TCP4 + tlv(4, b"padding") + tlv(3, bytes(4)))
    )
    assert build(2, None, None, crc32c=True) == sealed(v2(0x20, 0x00, tlv(3, bytes(4))))


def test_ipv4_beside_ipv6_goes_as_ipv6():
    mapped = "::ffff:192.168.0.1"
    for version in (1, 2):
        header, _ = parse(build(version, ("192.168.0.1", 1), ("::1", 2, 0, 0)))
        assert (header.source, header.destination) == ((mapped, 1, 0, 0), ("::1", 2, 0, 0))
        header, _ = parse(build(version, ("::1", 1), ("192.168.0.1", 2)))
        assert (header.source, header.destination) == (("::1", 1, 0, 0), (mapped, 2, 0, 0))
    # The specification knows groups of digits alone.
    assert build(1, ("192.168.0.1", 1), ("::1", 2)) == b"PROXY TCP6 ::ffff:c0a8:1 ::1 1 2\r\n"
    assert build(1, ("192.168.0.1", 1), (mapped, 2)) == b"PROXY TCP6 ::ffff:c0a8:1 ::ffff:c0a8:1 1 2\r\n"


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "match"),
    [
        ((3, None, None), {}, ValueError, "versions 1 and 2, not 3"),
        (("1", None, None), {}, ValueError, "versions 1 and 2, not '1'"),
        ((2, None, ("::1", 1)), {}, InvalidAddressFormatError, "both addresses, or None for both"),
        ((2, ("::1", 1), None), {}, InvalidAddressFormatError, "both addresses, or None for both"),
        ((2, ("localhost", 1), ("::1", 1)), {}, InvalidAddressFormatError, "the numbers of an IP address"),
        ((2, ("", 1), ("::1", 1)), {}, InvalidAddressFormatError, "the numbers of an IP address"),
        ((2, 80, 80), {}, InvalidAddressFormatError, "the numbers of an IP address"),
        ((2, ("fe80::1%lo", 1), ("::1", 1)), {}, InvalidAddressFormatError, "without a zone"),
        ((2, ("127.1", 1), ("127.1", 1)), {}, InvalidAddressFormatError, "the numbers of an IP address"),
        ((2, ("1.2.3.4", 65536), ("1.2.3.4", 1)), {}, InvalidAddressFormatError, "port 65536"),
        ((2, "/a", ("1.2.3.4", 1)), {}, InvalidAddressFormatError, "not of the same kind"),
        ((2, ("::1", 1), ""), {}, InvalidAddressFormatError, "not of the same kind"),
        ((2, "/a", "/" * 109), {}, InvalidAddressFormatError, "at most 108 bytes; .* has 109"),
        ((2, "/a", b"\0a\0"), {}, InvalidAddressFormatError, "NUL"),
        ((2, "/a", "/b\0"), {}, InvalidAddressFormatError, "NUL"),
        ((2, "/a", "\0"), {}, InvalidAddressFormatError, "NUL"),
        ((2, "192.168.0.1:80", "/a"), {}, InvalidAddressFormatError, "for host and port give"),
        ((1, "/a", "/b"), {}, InvalidAddressFormatError, "no Unix addresses; use version 2"),
        ((1, *IPV4_ENDS), {"alpn": b"h2"}, ValueError, "no TLVs; use version 2"),
        ((1, *IPV4_ENDS), {"crc32c": True}, ValueError, "no TLVs; use version 2"),
        ((2, *IPV4_ENDS), {"alpn": "h2"}, TypeError, "type 0x01 is bytes, not 'h2'"),
        ((2, *IPV4_ENDS), {"authority": b"a"}, TypeError, "authority is a host name, a str, not b'a'"),
        ((2, *IPV4_ENDS), {"authority": "\ud800"}, ValueError, "surrogates"),
        ((2, *IPV4_ENDS), {"unique_id": bytes(129)}, ValueError, "at most 128 bytes"),
        ((2, *IPV4_ENDS), {"tlvs": [(5, bytes(129))]}, ValueError, "at most 128 bytes"),
        ((2, *IPV4_ENDS), {"tlvs": [(3, bytes(4))]}, ValueError, "crc32c=True"),
        ((2, *IPV4_ENDS), {"tlvs": [(0x20, b"")]}, ValueError, "an SSL TLV of 5 bytes"),
        ((2, *IPV4_ENDS), {"tlvs": [(256, b"")]}, ValueError, "from 0 to 255, not 256"),
        ((2, *IPV4_ENDS), {"tlvs": [("1", b"")]}, TypeError, "is an int, not '1'"),
        ((2, *IPV4_ENDS), {"tlvs": [(0xE0, 5)]}, TypeError, "type 0xe0 is bytes, not 5"),
        ((2, *IPV4_ENDS), {"tlvs": [(0xE0, bytes(65536))]}, ValueError, "65535 are the most"),
        ((2, *IPV4_ENDS), {"tlvs": [(0xE0, bytes(65535))]}, ValueError, "at most 65535 bytes behind its first 16"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, options, kind, match):
    with pytest.raises(kind, match=match):
        build(*arguments, **options)


# ---- the checksum


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        # RFC 3720, B.4.
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc32c_is_that_of_the_rfc(data, crc):
    assert crc32c_of(data) == slow_crc32c(data) == crc


# ---- anything


ipv4 = st.integers(0, 2**32 - 1).map(lambda number: str(IPv4Address(number)))
#: Many zeros, for these are what IPv6 writes in more than one way.
ipv6_bytes = st.one_of(
    st.binary(min_size=16, max_size=16),
    st.lists(st.sampled_from([b"\0\0", b"\0\1", b"\xff\xff", b"\x0f\0"]), min_size=8, max_size=8).map(b"".join),
)
ports = st.integers(0, 65535)
ipv4_address = st.tuples(ipv4, ports)
ipv6_address = st.tuples(ipv6_bytes.map(lambda packed: socket.inet_ntop(AF_INET6, packed)), ports, st.just(0), st.just(0))
name = st.binary(min_size=1, max_size=106).filter(lambda text: not text.endswith(b"\0"))
path = st.one_of(st.text("ab/.é", min_size=1, max_size=40).map("/".__add__), name.map(b"\0".__add__), st.just(""))
pairs = st.one_of(st.tuples(ipv4_address, ipv4_address), st.tuples(ipv6_address, ipv6_address))
other_tlvs = st.lists(st.tuples(st.integers(0xE0, 0xFF) | st.just(4), st.binary(max_size=20)), max_size=5)
said_of_client = st.fixed_dictionaries(
    {
        "alpn": st.none() | st.binary(max_size=20),
        "authority": st.none() | st.text(max_size=20),
        "unique_id": st.none() | st.binary(max_size=128),
        "crc32c": st.booleans(),
    }
)
some = settings(max_examples=60, deadline=None, database=None)


@some
@given(pairs, st.binary(max_size=10))
def test_line_built_is_parsed_again(ends, behind):
    data = build(1, *ends)
    assert len(data) <= 107
    found, end = parse(data + behind)
    assert (found.source, found.destination, end) == (*ends, len(data))


@some
@given(pairs | st.tuples(path, path), other_tlvs, said_of_client, st.binary(max_size=10))
def test_block_built_is_parsed_again(ends, tlvs, options, behind):
    data = build(2, *ends, tlvs=tlvs, **options)
    found, end = parse(data + behind)
    assert (found.source, found.destination, end) == (*ends, len(data))
    assert (found.alpn, found.authority, found.unique_id) == (options["alpn"], options["authority"], options["unique_id"])
    assert [one for one in found.tlvs if one[0] not in (1, 2, 3, 5)] == tlvs
    assert (found.crc32c is not None) == options["crc32c"]


@some
@given(
    st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 1:", b"PROXY UNKNOWN ", SIGNATURE, v2(0x21, 0x11, TCP4, length=60)]),
    st.one_of(st.binary(max_size=150), st.text("PROXYTC46 0125.:f\r\n", max_size=110).map(str.encode)),
)
def test_anything_is_a_header_or_wrong_or_unfinished(begin, rest):
    try:
        found = parse(begin + rest)
    except ProxyHeaderError:
        return
    if isinstance(found, int):
        assert found >= 1
    else:
        assert found[1] <= len(begin + rest)
        assert said(parse(rebuilt(found[0]))[0]) == said(found[0])


@some
@given(ipv6_bytes)
def test_ipv6_address_is_written_as_sockets_write_it(packed):
    header, _ = parse(v2(0x21, 0x21, packed * 2 + bytes(4)))
    assert header.source == header.destination == (socket.inet_ntop(AF_INET6, packed), 0, 0, 0)


@settings(some, max_examples=200)
@given(st.one_of(ipv6_address.map(lambda address: address[0]), st.text(":::0fF1.", max_size=25), st.text("1:2.", max_size=20)))
def test_ipv6_address_is_read_as_the_standard_library_reads_it(host):
    data = f"PROXY TCP6 {host} :: 0 0\r\n".encode()
    try:
        expected = socket.inet_ntop(AF_INET6, IPv6Address(host).packed)
    except ValueError:
        with pytest.raises(ProxyHeaderError):
            parse(data)
        return
    header, _ = parse(data)
    assert header.source[0] == expected
    for size in range(len(data)):
        assert 1 <= parse(data[:size]) <= len(data) - size


# ---- what another implementation makes of it


def their_result(ends, tlvs):
    if ends is None:
        return theirs.ProxyResultLocal(tlv=tlvs)
    if isinstance(ends[0], str):
        return theirs.ProxyResultUnix(*ends, protocol=socket.SOCK_STREAM, tlv=tlvs)
    address, result = (IPv4Address, theirs.ProxyResultIPv4) if len(ends[0]) == 2 else (IPv6Address, theirs.ProxyResultIPv6)
    return result(*((address(end[0]), end[1]) for end in ends), protocol=socket.SOCK_STREAM, tlv=tlvs)


their_paths = st.text("ab/.", min_size=1, max_size=40).map("/".__add__)


@some
@given(pairs)
def test_lines_are_those_of_proxy_protocol(ends):
    other = ProxyProtocolV1()
    header, _ = parse(other.pack(their_result(ends, ProxyProtocolTLV())))
    assert (header.source, header.destination) == ends
    result = other.unpack(build(1, *ends))
    assert result.family == header.family
    for (host, port, *_), (found, number) in zip(ends, (result.source, result.dest), strict=True):
        assert (type(found)(host), port) == (found, number)


@some
@given(
    st.none() | pairs | st.tuples(their_paths, their_paths),
    st.dictionaries(st.integers(0xE0, 0xEF), st.binary(max_size=20), max_size=3),
    said_of_client,
    st.booleans(),
)
def test_blocks_are_those_of_proxy_protocol(ends, custom, options, flag):
    other = ProxyProtocolV2()
    checksum = options.pop("crc32c")
    ssl = ProxyProtocolSSLTLV(has_ssl=True, has_cert_conn=flag, verified=flag, version="TLSv1.3", cn="ü", cipher="x", key_alg="RSA2048")
    tlvs = ProxyProtocolTLV(init=custom, ssl=ssl, netns="blue", **options)
    packed = other.pack(their_result(ends, tlvs))

    header, end = parse(packed)
    assert end == len(packed)
    assert (header.source, header.destination) == ((None, None) if ends is None else ends)
    if ends is not None:
        assert dict(header.tlvs) == dict(tlvs)
        assert (header.alpn, header.authority, header.netns) == (options["alpn"], options["authority"], "blue")
        assert (header.unique_id or b"") == tlvs.unique_id
        assert (header.ssl.version, header.ssl.cn, header.ssl.cipher, header.ssl.key_alg) == ("TLSv1.3", "ü", "x", "RSA2048")
        assert (header.ssl.certificate_on_connection, header.ssl.verified) == (flag, flag)

    built = build(2, *(ends or (None, None)), tlvs=[*custom.items(), (0x20, bytes(ssl)), (0x30, b"blue")], crc32c=checksum, **options)
    result = other.unpack(built)
    again = their_result(ends, tlvs)
    assert (result.type, result.source, result.dest) == (again.type, again.source, again.dest)
    assert {kind: value for kind, value in result.tlv.items() if kind != 3} == dict(tlvs)
    assert (3 in result.tlv) == checksum
