"""Networks, to tell whether an address is in one of them; pure."""

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from itertools import islice
from typing import Any

__all__ = ["Client", "Networks", "client_of"]

#: Whom connections come from: an IP address, or "unix".
Client = IPv4Address | IPv6Address | str

#: Networks that a line of the log says; thousands would fill it.
SHOWN = 10

#: What IPv4 addresses are in IPv6.
MAPPED = ip_network("::ffff:0:0/96")


class Networks:
    """A set of networks.

    Args:
        name: the setting that says them, for errors.
        networks: addresses and networks as str (``"192.0.2.7"``, ``"10.0.0.0/8"``, ``"2001:db8::/32"``), or as objects of
            ``ipaddress``; "unix" for every Unix socket.

    Raises:
        TypeError, ValueError: one of them makes no sense.
    """

    __slots__ = ("_networks", "_numbers", "_unix")

    def __init__(self, name: str, networks: Iterable[Any]) -> None:
        if isinstance(networks, (str, bytes)):
            raise TypeError(f"{name} is a list of networks, such as ['10.0.0.0/8', '::1'], not the single {networks!r}")
        self._unix = False
        self._networks: list[IPv4Network | IPv6Network] = []
        #: Their addresses by version and number of bits that hosts have, as numbers without these: thousands cost no more than a few.
        self._numbers: dict[int, dict[int, set[int]]] = {4: {}, 6: {}}
        try:
            given = list(networks)
        except TypeError:
            raise TypeError(f"{name} is a list of networks, such as ['10.0.0.0/8', '::1'], not {networks!r}") from None
        for one in given:
            if one == "unix":
                self._unix = True
            elif not isinstance(one, (str, IPv4Address, IPv6Address, IPv4Network, IPv6Network)):
                raise TypeError(f"{name}: {one!r} is no network; give a str, such as '10.0.0.0/8'")
            else:
                try:
                    self._add(_unmapped(ip_network(one)))
                except ValueError as error:
                    raise ValueError(f"{name}: {error}; give an address or a network, such as '10.0.0.0/8'") from None

    def _add(self, network: IPv4Network | IPv6Network) -> None:
        self._networks.append(network)
        bits = network.max_prefixlen - network.prefixlen
        self._numbers[network.version].setdefault(bits, set()).add(int(network.network_address) >> bits)

    def __contains__(self, sockaddr: Any) -> bool:
        """Tell whether a socket address is in one of them."""
        client = client_of(sockaddr)
        if isinstance(client, str):
            return self._unix
        number = int(client)
        return any(number >> bits in networks for bits, networks in self._numbers[client.version].items())

    def __iter__(self) -> Iterator[str]:
        """Give them as str, so that others can be made of these and some more."""
        return iter([*map(str, self._networks), *["unix"] * self._unix])

    def __repr__(self) -> str:
        shown = list(islice(self, SHOWN))
        more = len(self._networks) + self._unix - len(shown)
        return f"{shown!r} and {more} more" if more else repr(shown)


def _unmapped(network: IPv4Network | IPv6Network) -> IPv4Network | IPv6Network:
    """Return the network of IPv4 for one that was given as it is in IPv6."""
    if isinstance(network, IPv6Network) and network.subnet_of(MAPPED):  # type: ignore[arg-type]
        return ip_network((int(network.network_address) & 0xFFFFFFFF, network.prefixlen - 96))
    return network


def client_of(sockaddr: Any) -> Client:
    """Return whom a socket address belongs to: an IP address (one of IPv4 that came as IPv6 is of IPv4), or "unix" for all others."""
    if not isinstance(sockaddr, tuple):
        return "unix"
    try:
        address = ip_address(str(sockaddr[0]).partition("%")[0])
    except ValueError:
        return "unix"
    return (address.version == 6 and address.ipv4_mapped) or address
