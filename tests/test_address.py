"""Every spelling of an address: what it means, or why it is refused and what to give instead."""

import enum
import os
import pathlib
from socket import AF_INET, AF_INET6, AF_UNIX, AF_UNSPEC

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pants_green._address import Address, ListenCall, format_address, parse_address, parse_connect, parse_listen
from pants_green.errors import InvalidAddressFormatError


class Port(enum.IntEnum):
    HTTP = 80


ANY_8080 = Address(AF_INET, ("", 8080), False)

#: Spelling, family, sockaddr, whether it needs a lookup.
MEANINGS = [
    # a port
    (8080, AF_INET, ("", 8080), False),
    (0, AF_INET, ("", 0), False),
    (65535, AF_INET, ("", 65535), False),
    (Port.HTTP, AF_INET, ("", 80), False),
    # (host, port)
    (("", 8080), AF_INET, ("", 8080), False),
    ((None, 8080), AF_INET, ("", 8080), False),
    (("0.0.0.0", 8080), AF_INET, ("0.0.0.0", 8080), False),
    (("127.0.0.1", 8080), AF_INET, ("127.0.0.1", 8080), False),
    (("255.255.255.255", 0), AF_INET, ("255.255.255.255", 0), False),
    (("<broadcast>", 8080), AF_INET, ("255.255.255.255", 8080), False),
    (("127.0.0.1", Port.HTTP), AF_INET, ("127.0.0.1", 80), False),
    (("::", 8080), AF_INET6, ("::", 8080, 0, 0), False),
    (("::1", 8080), AF_INET6, ("::1", 8080, 0, 0), False),
    (("[::1]", 8080), AF_INET6, ("::1", 8080, 0, 0), False),
    (("2001:db8::1", 8080), AF_INET6, ("2001:db8::1", 8080, 0, 0), False),
    (("::ffff:127.0.0.1", 8080), AF_INET6, ("::ffff:127.0.0.1", 8080, 0, 0), False),
    (("fe80::1%lo", 8080), AF_INET6, ("fe80::1%lo", 8080, 0, 0), True),
    (("localhost", 8080), AF_UNSPEC, ("localhost", 8080), True),
    (("example.com", 80), AF_UNSPEC, ("example.com", 80), True),
    (("a_b-c.example.", 80), AF_UNSPEC, ("a_b-c.example.", 80), True),
    (("bücher.example", 80), AF_UNSPEC, ("bücher.example", 80), True),
    # What only the resolver reads as IPv4.
    (("127.1", 80), AF_UNSPEC, ("127.1", 80), True),
    # (host, port, flowinfo, scope_id)
    (("::1", 8080, 0, 0), AF_INET6, ("::1", 8080, 0, 0), False),
    (("[::1]", 8080, 0, 0), AF_INET6, ("::1", 8080, 0, 0), False),
    (("", 8080, 0, 0), AF_INET6, ("::", 8080, 0, 0), False),
    ((None, 8080, 0, 0), AF_INET6, ("::", 8080, 0, 0), False),
    (("fe80::1", 8080, 5, 2), AF_INET6, ("fe80::1", 8080, 5, 2), False),
    (("fe80::1", 8080, 0xFFFFF, 0xFFFFFFFF), AF_INET6, ("fe80::1", 8080, 0xFFFFF, 0xFFFFFFFF), False),
    (("fe80::1%lo", 8080, 0, 0), AF_INET6, ("fe80::1%lo", 8080, 0, 0), True),
    (("localhost", 8080, 0, 0), AF_INET6, ("localhost", 8080, 0, 0), True),
    # a path
    ("/run/app.sock", AF_UNIX, "/run/app.sock", False),
    ("./app.sock", AF_UNIX, "./app.sock", False),
    ("app.sock", AF_UNIX, "app.sock", False),
    ("app", AF_UNIX, "app", False),
    ("/run/with space", AF_UNIX, "/run/with space", False),
    ("./127.0.0.1", AF_UNIX, "./127.0.0.1", False),
    ("/run/app:80", AF_UNIX, "/run/app:80", False),
    ("app:", AF_UNIX, "app:", False),
    ("app:eighty", AF_UNIX, "app:eighty", False),
    (b"/run/app.sock", AF_UNIX, b"/run/app.sock", False),
    (b"/run/\xff", AF_UNIX, b"/run/\xff", False),
    (pathlib.Path("/run/app.sock"), AF_UNIX, "/run/app.sock", False),
    ("\0abstract", AF_UNIX, "\0abstract", False),
    (b"\0abstract", AF_UNIX, b"\0abstract", False),
    ("\0abstract:80", AF_UNIX, "\0abstract:80", False),
    ("\0127.0.0.1", AF_UNIX, "\0127.0.0.1", False),
]

#: Spelling, what the message says: what is wrong, and where it can be guessed what would do.
REFUSALS = [
    # a port
    (-1, ["port -1", "0 and 65535"]),
    (65536, ["port 65536", "0 and 65535"]),
    (10**30, ["0 and 65535"]),
    (True, ["port", "True", "not an int"]),
    # (host, port)
    (("127.0.0.1", -1), ["port -1", "0 and 65535"]),
    (("127.0.0.1", 65536), ["port 65536", "0 and 65535"]),
    (("127.0.0.1", "80"), ["port", "('127.0.0.1', '80')", "not an int", "(host, port)"]),
    (("127.0.0.1", 80.0), ["port", "not an int"]),
    (("127.0.0.1", None), ["port", "not an int"]),
    (("127.0.0.1", True), ["port", "not an int"]),
    ((8080, "127.0.0.1"), ["port", "not an int", "(host, port)"]),
    ((b"127.0.0.1", 80), ["host", "not a str"]),
    ((1, 80), ["host", "not a str"]),
    ((("a", 1), 80), ["host", "not a str"]),
    (("a b", 80), ["host", "'a b'", "neither an IP address nor a name"]),
    ((" localhost", 80), ["host", "neither"]),
    (("localhost\n", 80), ["host", "neither"]),
    (("local\0host", 80), ["host", "neither"]),
    (("localhost:80", 80), ["host", "neither", "the port stands apart: (host, port)"]),
    (("http://localhost", 80), ["host", "neither", "(host, port)"]),
    (("/run/app.sock", 80), ["host", "neither"]),
    (("::g", 80), ["host", "neither"]),
    (("[::1", 80), ["host", "neither"]),
    (("1.2.3.4:80", 80), ["host", "neither", "the port stands apart"]),
    # (host, port, flowinfo, scope_id)
    (("127.0.0.1", 80, 0, 0), ["four elements of an IPv6 address", "127.0.0.1 is IPv4", "('127.0.0.1', 80)"]),
    (("::1", 65536, 0, 0), ["port 65536"]),
    (("::1", "80", 0, 0), ["port", "not an int"]),
    ((b"::1", 80, 0, 0), ["host", "not a str"]),
    (("a b", 80, 0, 0), ["host", "neither"]),
    (("::1", 80, -1, 0), ["flowinfo (0 to 1048575)"]),
    (("::1", 80, 0x100000, 0), ["flowinfo (0 to 1048575)"]),
    (("::1", 80, "0", 0), ["flowinfo"]),
    (("::1", 80, False, 0), ["flowinfo"]),
    (("::1", 80, 0, -1), ["scope_id (0 to 4294967295)"]),
    (("::1", 80, 0, 1 << 32), ["scope_id (0 to 4294967295)"]),
    (("::1", 80, 0, "lo"), ["scope_id"]),
    (("::1", 80, 0, None), ["scope_id"]),
    # other tuples
    ((), ["2 or 4 elements", "not 0"]),
    (("localhost",), ["2 or 4 elements", "not 1", "('localhost',)"]),
    (("::1", 80, 0), ["2 or 4 elements", "not 3"]),
    (("::1", 80, 0, 0, 0), ["2 or 4 elements", "not 5"]),
    # a str that is meant to be something else
    ("", ["empty", "('', port)"]),
    (b"", ["empty", "('', port)"]),
    ("127.0.0.1", ["path of a Unix socket", "('127.0.0.1', port)"]),
    (b"127.0.0.1", ["path of a Unix socket", "('127.0.0.1', port)"]),
    ("::1", ["path of a Unix socket", "('::1', port)"]),
    ("[::1]", ["path of a Unix socket", "('[::1]', port)"]),
    ("127.0.0.1:80", ["path of a Unix socket", "('127.0.0.1', 80)"]),
    ("localhost:8080", ["path of a Unix socket", "('localhost', 8080)"]),
    ("[::1]:80", ["path of a Unix socket", "('::1', 80)"]),
    ("8080", ["path of a Unix socket", "the int 8080", "'./8080'"]),
    (":8080", ["path of a Unix socket", "('', 8080)"]),
    ("localhost:0080", ["('localhost', 80)"]),
    ("/run/\0app", ["NUL byte"]),
    ("app\0", ["NUL byte"]),
    ("\0a\0b", ["NUL byte"]),
    # no address at all
    (None, ["None is no address", "a port, (host, port)", "path of a Unix socket"]),
    (80.5, ["80.5 is no address"]),
    (["127.0.0.1", 80], ["no address", "(host, port)"]),
    ({"host": ""}, ["no address"]),
    (object(), ["no address"]),
    (bytearray(b"/run/app"), ["no address"]),
]


@pytest.mark.parametrize(("spelling", "family", "sockaddr", "needs_lookup"), MEANINGS, ids=repr)
def test_parse_address_every_spelling_means_one_thing(spelling, family, sockaddr, needs_lookup):
    assert parse_address(spelling) == (family, sockaddr, needs_lookup)


@pytest.mark.parametrize(("spelling", "said"), REFUSALS, ids=repr)
def test_parse_address_nonsense_is_refused_with_a_hint(spelling, said):
    with pytest.raises(InvalidAddressFormatError) as caught:
        parse_address(spelling)
    for words in said:
        assert words in str(caught.value)


@pytest.mark.parametrize("spelling", [spelling for spelling, _ in REFUSALS], ids=repr)
def test_s2_26_invalid_form_is_an_error_to_listen_and_to_connect(spelling):
    with pytest.raises(ValueError, match=r"\w"):
        parse_listen(spelling)
    with pytest.raises(ValueError, match=r"\w"):
        parse_connect(spelling)


def test_parse_address_port_of_another_int_type_is_a_plain_int():
    """The kernel's bindings take any int; messages and reprs are to show a number."""
    address = parse_address(Port.HTTP)
    assert type(address.sockaddr[1]) is int


@pytest.mark.parametrize(
    ("spelling", "is_any"),
    [
        (8080, True),
        (("", 8080), True),
        (("0.0.0.0", 8080), True),
        (("::", 8080), True),
        (("", 8080, 0, 0), True),
        (("127.0.0.1", 8080), False),
        (("::1", 8080), False),
        (("localhost", 8080), False),
        ("/run/app.sock", False),
        ("\0name", False),
    ],
    ids=repr,
)
def test_is_any_tells_whether_every_interface_is_meant(spelling, is_any):
    assert parse_address(spelling).is_any is is_any


# ---- connect


@pytest.mark.parametrize(
    ("arguments", "meaning"),
    [
        ((("example.com", 80),), (AF_UNSPEC, ("example.com", 80), True)),
        ((("127.0.0.1", 80),), (AF_INET, ("127.0.0.1", 80), False)),
        ((("::1", 80, 0, 0),), (AF_INET6, ("::1", 80, 0, 0), False)),
        (("example.com", 80), (AF_UNSPEC, ("example.com", 80), True)),
        (("127.0.0.1", 80), (AF_INET, ("127.0.0.1", 80), False)),
        (("::1", 80), (AF_INET6, ("::1", 80, 0, 0), False)),
        # No host, or an empty one: this machine, by whichever family it listens.
        ((8080,), (AF_UNSPEC, ("localhost", 8080), True)),
        ((("", 8080),), (AF_UNSPEC, ("localhost", 8080), True)),
        (("", 8080), (AF_UNSPEC, ("localhost", 8080), True)),
        (("/run/app.sock",), (AF_UNIX, "/run/app.sock", False)),
        ((b"\0name",), (AF_UNIX, b"\0name", False)),
    ],
    ids=repr,
)
def test_d_2_connect_takes_an_address_or_host_and_port(arguments, meaning):
    assert parse_connect(*arguments) == meaning


def test_s4_1_connect_host_and_port():
    assert parse_connect("example.com", 80) == (AF_UNSPEC, ("example.com", 80), True)


def test_s4_19_connect_a_tuple_with_a_host_name():
    assert parse_connect(("example.com", 80)) == (AF_UNSPEC, ("example.com", 80), True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0,), ["port 0 cannot be connected to"]),
        ((("127.0.0.1", 0),), ["port 0", "the port that the server listens on"]),
        ((("::1", 0, 0, 0),), ["port 0"]),
        (("localhost", 0), ["port 0"]),
        (("127.0.0.1",), ["('127.0.0.1', port)"]),
        (("localhost:80",), ["('localhost', 80)"]),
        (("localhost", "80"), ["port", "not an int"]),
        (("localhost", 65536), ["port 65536"]),
        ((80, "localhost"), ["port", "not an int"]),
        ((80, 80), ["host", "not a str"]),
        ((("localhost", 80), 80), ["host", "not a str"]),
        (("/run/app.sock", 80), ["host", "neither an IP address nor a name"]),
        ((None,), ["None is no address"]),
    ],
    ids=repr,
)
def test_connect_what_cannot_be_dialled_is_refused_with_a_hint(arguments, said):
    with pytest.raises(InvalidAddressFormatError) as caught:
        parse_connect(*arguments)
    for words in said:
        assert words in str(caught.value)


def test_connect_empty_host_of_ipv6_is_this_machine():
    assert parse_connect(("", 80, 0, 0)) == (AF_INET6, ("::1", 80, 0, 0), False)


# ---- listen


def test_s0_3_listen_without_arguments_is_any_interface_port_8080():
    assert parse_listen() == (ANY_8080, 1024, True)


def test_s0_4_listen_port_alone():
    assert parse_listen(8080).address == ANY_8080


def test_s0_5_listen_port_first_host_second():
    assert parse_listen(8080, ("",)).address == ANY_8080


def test_s2_19_listen_address_backlog_slave():
    assert parse_listen(("127.0.0.1", 80), (5, False)) == (Address(AF_INET, ("127.0.0.1", 80), False), 5, False)
    call = parse_listen(("127.0.0.1", 80))
    assert (call.backlog, call.slave) == (1024, True)


def test_s2_21_listen_string_is_a_unix_path():
    assert parse_listen("/run/app.sock").address == (AF_UNIX, "/run/app.sock", False)


def test_s2_22_listen_integer_is_a_port_on_any_interface():
    assert parse_listen(80).address == parse_listen(("", 80)).address


def test_s2_23_listen_pair_is_ipv4():
    assert parse_listen(("127.0.0.1", 80)).address.family == AF_INET
    assert parse_listen(("", 80)).address.family == AF_INET


def test_s2_24_listen_four_elements_are_ipv6():
    assert parse_listen(("::1", 80, 0, 0)).address == (AF_INET6, ("::1", 80, 0, 0), False)


@pytest.mark.parametrize(
    ("spelling", "family"), [(80, AF_INET), (("", 80), AF_INET), (("", 80, 0, 0), AF_INET6), (("::", 80), AF_INET6), ("/run/x", AF_UNIX)]
)
def test_s2_25_family_fits_the_address(spelling, family):
    assert parse_listen(spelling).address.family == family


def test_s4_24_listen_empty_host_is_any():
    assert parse_listen(("", 8080)).address == ANY_8080
    assert parse_listen(("", 8080)).address.is_any


LOOPBACK = Address(AF_INET, ("127.0.0.1", 8080), False)


@pytest.mark.parametrize(
    ("arguments", "keywords", "meaning"),
    [
        # listen(port, host, backlog): a str in the second place is a host
        ((8080, "127.0.0.1"), {}, (LOOPBACK, 1024, True)),
        ((8080, None), {}, (ANY_8080, 1024, True)),
        ((8080, "", 5), {}, (ANY_8080, 5, True)),
        ((8080, "127.0.0.1", 5, False), {}, (LOOPBACK, 5, False)),
        ((8080, "localhost"), {}, (Address(AF_UNSPEC, ("localhost", 8080), True), 1024, True)),
        ((8080, "::1"), {}, (Address(AF_INET6, ("::1", 8080, 0, 0), False), 1024, True)),
        ((8080, "127.0.0.1"), {"backlog": 5, "slave": False}, (LOOPBACK, 5, False)),
        # listen(port=, host=, backlog=)
        ((), {"port": 8080, "host": "127.0.0.1"}, (LOOPBACK, 1024, True)),
        ((), {"port": 8080, "host": "127.0.0.1", "backlog": 5}, (LOOPBACK, 5, True)),
        ((), {"port": 8080}, (ANY_8080, 1024, True)),
        ((), {"host": "127.0.0.1"}, (LOOPBACK, 1024, True)),
        ((), {"host": ""}, (ANY_8080, 1024, True)),
        ((8080,), {"host": "127.0.0.1"}, (LOOPBACK, 1024, True)),
        # listen(address, backlog, slave): an int in the second place is a backlog
        ((8080, 5), {}, (ANY_8080, 5, True)),
        ((8080, 5, False), {}, (ANY_8080, 5, False)),
        ((("127.0.0.1", 8080), 5), {}, (LOOPBACK, 5, True)),
        ((("127.0.0.1", 8080),), {"backlog": 5}, (LOOPBACK, 5, True)),
        ((("127.0.0.1", 8080),), {"slave": False}, (LOOPBACK, 1024, False)),
        ((("127.0.0.1", 8080), 5), {"slave": False}, (LOOPBACK, 5, False)),
        (("/run/app.sock", 5), {}, (Address(AF_UNIX, "/run/app.sock", False), 5, True)),
    ],
    ids=repr,
)
def test_d_1_listen_every_form_it_ever_had(arguments, keywords, meaning):
    address, *legacy = arguments or (8080,)
    call = parse_listen(address, tuple(legacy), **keywords) if arguments else parse_listen(**keywords)
    assert isinstance(call, ListenCall)
    assert call == meaning


@pytest.mark.parametrize(
    ("arguments", "keywords", "kind", "said"),
    [
        ((("", 80), "127.0.0.1"), {}, InvalidAddressFormatError, ["takes a port first", "('', 80)", "(host, port) as one address"]),
        (("/run/app.sock", "127.0.0.1"), {}, InvalidAddressFormatError, ["takes a port first"]),
        (("80", "127.0.0.1"), {}, InvalidAddressFormatError, ["takes a port first", "'80'"]),
        ((("", 80),), {"host": "127.0.0.1"}, InvalidAddressFormatError, ["takes a port first"]),
        ((65536, ""), {}, InvalidAddressFormatError, ["port 65536"]),
        ((8080, "a b"), {}, InvalidAddressFormatError, ["neither an IP address nor a name"]),
        ((8080, "/run"), {}, InvalidAddressFormatError, ["neither an IP address nor a name"]),
        ((8080, "127.0.0.1"), {"host": "::1"}, TypeError, ["host twice"]),
        ((8080, 5), {"backlog": 6}, TypeError, ["backlog twice"]),
        ((8080, "", 5), {"backlog": 6}, TypeError, ["backlog twice"]),
        ((8080, 5, False), {"slave": True}, TypeError, ["slave twice"]),
        ((8080, 5, False, 7), {}, TypeError, ["[7]", "left over"]),
        ((8080, "", 5, False, 7), {}, TypeError, ["left over"]),
        ((8080, 0), {}, ValueError, ["backlog", "at least 1", "not 0"]),
        ((8080,), {"backlog": -5}, ValueError, ["backlog", "at least 1", "not -5"]),
        ((8080,), {"backlog": "5"}, TypeError, ["backlog", "an int", "'5'"]),
        ((8080,), {"backlog": 5.0}, TypeError, ["backlog", "an int"]),
        ((8080,), {"backlog": True}, TypeError, ["backlog", "an int"]),
        ((8080, False), {}, TypeError, ["backlog", "an int", "False"]),
        ((8080, b"127.0.0.1"), {}, TypeError, ["backlog", "an int"]),
    ],
    ids=repr,
)
def test_listen_confused_arguments_are_refused_with_a_hint(arguments, keywords, kind, said):
    address, *legacy = arguments or (8080,)
    with pytest.raises(kind) as caught:
        parse_listen(address, tuple(legacy), **keywords)
    for words in said:
        assert words in str(caught.value)


def test_listen_an_address_and_a_port_is_refused():
    with pytest.raises(TypeError, match="twice"):
        parse_listen(("127.0.0.1", 80), port=81)


@pytest.mark.parametrize("port", ["80", "/run/app.sock", ("127.0.0.1", 80)], ids=repr)
def test_listen_port_keyword_that_is_no_port_is_refused(port):
    with pytest.raises(InvalidAddressFormatError):
        parse_listen(port=port)


# ---- spellings that look right and reach the kernel wrong


def test_parse_address_ipv4_in_brackets_is_bare_or_refused():
    try:
        host = parse_address(("[127.0.0.1]", 80)).sockaddr[0]
    except InvalidAddressFormatError:
        return
    assert host == "127.0.0.1"


def test_parse_address_scope_in_brackets_is_bare():
    assert parse_address(("[fe80::1%lo]", 80)).sockaddr == ("fe80::1%lo", 80, 0, 0)


@pytest.mark.parametrize("host", ["a..b", ".", ".example.com", "a" * 64, "a" * 64 + ".example.com"])
def test_parse_address_name_that_cannot_be_encoded_is_refused(host):
    with pytest.raises(InvalidAddressFormatError):
        parse_address((host, 80))


# ---- text


@pytest.mark.parametrize(
    ("sockaddr", "text"),
    [
        (("127.0.0.1", 80), "127.0.0.1:80"),
        (("::1", 80, 0, 0), "[::1]:80"),
        (("fe80::1%lo", 80, 0, 2), "[fe80::1%lo]:80"),
        (("localhost", 80), "localhost:80"),
        (("", 80), "*:80"),
        ("/run/app.sock", "/run/app.sock"),
        (b"/run/app.sock", "/run/app.sock"),
        ("\0name", "@name"),
        (b"\0name", "@name"),
        (b"/run/\xff", "/run/" + os.fsdecode(b"\xff")),
        ("", "?"),
        (b"", "?"),
        (None, "?"),
    ],
    ids=repr,
)
def test_format_address_is_as_people_write_it(sockaddr, text):
    assert format_address(sockaddr) == text


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=5).map(tuple), st.lists(inner, max_size=5)),
    max_leaves=6,
)
hosts = st.one_of(
    st.ip_addresses().map(str), st.sampled_from(["", "localhost", "[::1]", "<broadcast>", "::1%lo", "x:1"]), st.text(max_size=20), st.none()
)
ports = st.one_of(st.integers(-2, 65537), anything)


@given(st.one_of(anything, st.tuples(hosts, ports), st.tuples(hosts, ports, st.integers(-1, 1 << 20), st.integers(-1, 1 << 32))))
def test_parse_address_anything_is_understood_or_refused_by_the_one_error(spelling):
    try:
        address = parse_address(spelling)
    except InvalidAddressFormatError:
        return
    family, sockaddr, needs_lookup = address
    if family == AF_UNIX:
        assert isinstance(sockaddr, (str, bytes))
        assert not needs_lookup
    else:
        assert len(sockaddr) == (4 if family == AF_INET6 else 2)
        assert 0 <= sockaddr[1] <= 65535
        assert needs_lookup or family in (AF_INET, AF_INET6)
    assert format_address(sockaddr)


@given(st.ip_addresses(), st.integers(1, 65535))
def test_parse_address_every_numeric_host_needs_no_lookup(host, port):
    family = AF_INET if host.version == 4 else AF_INET6
    address = parse_address((str(host), port))
    assert (address.family, address.sockaddr[:2], address.needs_lookup) == (family, (str(host), port), False)
    assert parse_connect(str(host), port) == parse_connect((str(host), port)) == address
