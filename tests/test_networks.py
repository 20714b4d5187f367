"""Networks: which addresses are in them, and what makes none."""

import time
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest

from pants_green._networks import Networks, client_of


@pytest.mark.parametrize(
    ("networks", "inside", "outside"),
    [
        (["10.0.0.0/8"], ["10.0.0.0", "10.255.255.255", "::ffff:10.1.2.3"], ["9.255.255.255", "11.0.0.0", "::1", "::a00:1"]),
        (["192.0.2.7"], ["192.0.2.7"], ["192.0.2.6", "192.0.2.8"]),
        (["0.0.0.0/0"], ["1.2.3.4", "::ffff:1.2.3.4"], ["::1", "2001:db8::1"]),
        (["::/0"], ["::1", "2001:db8::1"], ["1.2.3.4", "::ffff:1.2.3.4"]),
        (["2001:db8::/32"], ["2001:db8::1", "2001:db8:ffff::"], ["2001:db9::"]),
        (["fe80::/10"], ["fe80::1%eth0", "fe80::1"], ["fec0::1"]),
        (["::ffff:10.0.0.0/104"], ["10.1.2.3", "::ffff:10.1.2.3"], ["11.0.0.0"]),
        (["::1", "127.0.0.1"], ["::1", "127.0.0.1"], ["127.0.0.2", "::2"]),
        ([], [], ["127.0.0.1", "::1"]),
        ([IPv4Address("192.0.2.7"), IPv6Network("2001:db8::/32")], ["192.0.2.7", "2001:db8::1"], ["192.0.2.8"]),
        ((IPv6Address("::1"), IPv4Network("10.0.0.0/8")), ["::1", "10.0.0.1"], ["::2"]),
        ({"10.0.0.1"}, ["10.0.0.1"], ["10.0.0.2"]),
    ],
    ids=str,
)
def test_network_holds_what_is_in_it(networks, inside, outside):
    made = Networks("allow", networks)
    for host in inside:
        assert (host, 1234) in made
    for host in outside:
        assert (host, 1234, 0, 0) not in made
    assert "" not in made
    assert b"\0name" not in made


@pytest.mark.parametrize("sockaddr", ["", "/run/some.socket", b"\0name", None, ("no address", 1)])
def test_network_unix_is_whatever_has_no_ip_address(sockaddr):
    assert sockaddr in Networks("allow", ["unix"])
    assert sockaddr not in Networks("allow", ["0.0.0.0/0", "::/0"])
    assert ("127.0.0.1", 1) not in Networks("allow", ["unix"])


def test_client_is_the_same_however_its_address_came():
    assert client_of(("::ffff:10.1.2.3", 5, 0, 0)) == client_of(("10.1.2.3", 7)) == IPv4Address("10.1.2.3")
    assert client_of(("fe80::1%lo", 5, 0, 1)) == IPv6Address("fe80::1")
    assert client_of("/path") == client_of("") == "unix"


@pytest.mark.parametrize("wrong", ["10.0.0.0/8", b"10.0.0.0/8", 5, None, [5], [None], [b"10.0.0.0/8"], [True]])
def test_network_of_a_wrong_type_is_a_type_error_that_shows_a_right_one(wrong):
    with pytest.raises(TypeError, match=r"^Gate\.allow.*'10\.0\.0\.0/8'"):
        Networks("Gate.allow", wrong)


@pytest.mark.parametrize("wrong", [["example.org"], ["10.0.0.0/33"], ["10.0.0.1/8"], [""], ["10.0.0.0/8", "::g"], ["300.1.1.1"]])
def test_network_that_is_none_is_a_value_error_that_shows_a_right_one(wrong):
    with pytest.raises(ValueError, match=r"^Gate\.deny: .*'10\.0\.0\.0/8'"):
        Networks("Gate.deny", wrong)


def test_network_thousands_cost_no_more_than_a_few():
    networks = Networks("deny", [f"10.{number // 256}.{number % 256}.0/24" for number in range(3000)])
    began = time.process_time()
    assert not any((f"192.0.2.{number}", 1) in networks for number in range(200))
    assert all((f"10.11.{number}.1", 1) in networks for number in range(184))
    assert time.process_time() - began < 0.1


def test_network_thousands_do_not_fill_the_log():
    networks = Networks("deny", [*(f"10.0.0.{number}" for number in range(184)), "unix"])
    assert repr(networks).endswith("'10.0.0.9/32'] and 175 more")
    assert len(list(networks)) == 185


def test_network_reads_as_a_list_and_can_be_made_into_a_longer_one():
    networks = Networks("allow", ["10.0.0.0/8", "::1", "unix"])
    assert repr(networks) == "['10.0.0.0/8', '::1/128', 'unix']"
    more = Networks("allow", [*networks, "192.0.2.0/24"])
    assert ("192.0.2.1", 1) in more
    assert "" in more
