"""The door to gevent's datagram sockets: making, binding, options, multicast groups. Nothing here waits.

Looking up, and what a gevent socket is made of, is the business of ``_sockets``; the file of a Unix socket is that of ``_socket_file``.
"""

import errno
import os
import socket as stdlib_socket
import struct
import sys
from collections.abc import Callable
from ipaddress import IPv4Address, ip_address
from typing import Any

import gevent.socket

from pants_green import _sockets
from pants_green._address import AF_UNIX, Address, format_address
from pants_green._socket_file import bind_file, too_long

__all__ = [
    "DGRAM",
    "FAMILIES",
    "ICMP",
    "MOST",
    "OPTIONS",
    "bind",
    "bind_anywhere",
    "connect",
    "family_name",
    "fitting",
    "make",
    "membership",
    "only_from",
    "reason",
    "receive_size",
    "set_option",
]

DGRAM = stdlib_socket.SOCK_DGRAM

#: Bytes that a packet can carry at most. Unix sockets have no limit but that of their send buffer.
#: *Source*: RFC 768 and RFC 791 (65,535 less the headers of UDP and IPv4), RFC 8200 section 4 (the header of IPv6 does not count).
MOST: dict[int, int] = {stdlib_socket.AF_INET: 65507, stdlib_socket.AF_INET6: 65527}

#: What the network says, by ICMP, about packets that were sent before. *Source*: udp(7), icmp(7). The last is the word of a Unix
#: socket that was connected to this one, and is to another now.
ICMP = frozenset(
    getattr(errno, name)
    for name in ("ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH", "ENOPROTOOPT", "EPROTO", "EHOSTDOWN", "ECONNRESET")
    if hasattr(errno, name)
)

#: The families of which there are datagram sockets.
FAMILIES = (stdlib_socket.AF_INET, stdlib_socket.AF_INET6, AF_UNIX)

NAMES = {stdlib_socket.AF_INET: "IPv4", stdlib_socket.AF_INET6: "IPv6", AF_UNIX: "Unix", stdlib_socket.AF_UNSPEC: "a host name"}

IP = stdlib_socket.IPPROTO_IP
IPV6 = getattr(stdlib_socket, "IPPROTO_IPV6", 41)

#: Level and number of the options that every family has under another name.
OPTIONS = {
    "broadcast": {stdlib_socket.AF_INET: (stdlib_socket.SOL_SOCKET, stdlib_socket.SO_BROADCAST)},
    "multicast_ttl": {
        stdlib_socket.AF_INET: (IP, stdlib_socket.IP_MULTICAST_TTL),
        stdlib_socket.AF_INET6: (IPV6, stdlib_socket.IPV6_MULTICAST_HOPS),
    },
    "multicast_loop": {
        stdlib_socket.AF_INET: (IP, stdlib_socket.IP_MULTICAST_LOOP),
        stdlib_socket.AF_INET6: (IPV6, stdlib_socket.IPV6_MULTICAST_LOOP),
    },
    "multicast_interface": {
        stdlib_socket.AF_INET: (IP, stdlib_socket.IP_MULTICAST_IF),
        stdlib_socket.AF_INET6: (IPV6, stdlib_socket.IPV6_MULTICAST_IF),
    },
}

#: The option by which a socket hears the groups that it has joined itself, as everywhere else; on Linux, as it comes, it hears
#: those of every other socket of the machine, too. *Source*: ip(7), IP_MULTICAST_ALL; the second one is in linux/in6.h.
MULTICAST_ALL: dict[int, tuple[int, int]] = {}
if sys.platform == "linux":
    MULTICAST_ALL = {stdlib_socket.AF_INET: (IP, 49), stdlib_socket.AF_INET6: (IPV6, 29)}


def family_name(family: int) -> str:
    """Return what people call an address family."""
    return NAMES.get(family, f"address family {family}")


def receive_size(family: int) -> int:
    """Return how many bytes a receive has to allow for, so that no packet is cut."""
    # Unix sockets have no limit; on Linux `packet_ports_of` asks for the size of each, and this one does not matter.
    return 64 * 1024 if family != AF_UNIX else 512 * 1024


def fitting(found: list[Address], family: int | None) -> Address | None:
    """Return the one to take of the addresses of a name; None if there is none of `family`.

    That of ``localhost``, which has two on many machines, is the one of IPv4: where ``listen(port)`` and most other programs are.
    What goes to the other one is lost, and nobody says so.
    """
    fit = [one for one in found if family in (None, one.family)]
    if fit and fit[0].sockaddr[0] == "::1":
        fit.sort(key=lambda one: one.sockaddr[0] != "127.0.0.1")
    return fit[0] if fit else None


def only_from(peer: Any, recvfrom: Callable[[int], tuple[bytes, Any]]) -> Callable[[int], tuple[bytes, Any]]:
    """Return a ``recvfrom()`` that leaves out what others have sent, before the socket was tied to `peer`."""

    def receive(size: int) -> tuple[bytes, Any]:
        while True:
            data, sender = recvfrom(size)
            if sender == peer:
                return data, sender

    return receive


def reason(code: int, sockaddr: Any) -> str:
    """Return why nothing can be sent to an address, and what is known beside that."""
    return os.strerror(code) if code != errno.ENAMETOOLONG else f"{os.strerror(code)}; {too_long(sockaddr)}"


def make(family: int) -> Any:
    """Return a new gevent socket."""
    sock = gevent.socket.socket(family, DGRAM)
    if family in MULTICAST_ALL:
        try:
            sock.setsockopt(*MULTICAST_ALL[family], 0)
        except OSError:
            pass  # an older kernel
    return sock


def bind(sock: Any, address: Address, *, reuse_port: bool, reuse_address: bool) -> Any:
    """Bind a socket to an address of its family.

    Returns:
        the file that this has made, for a Unix path; else None.

    Raises:
        OSError: with the errno of the call that failed and the address in its text.
    """
    try:
        if address.family == AF_UNIX:
            return bind_file(sock, address.sockaddr)
        if reuse_address:
            sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEPORT, 1)
        if address.family == stdlib_socket.AF_INET6:
            sock.setsockopt(IPV6, stdlib_socket.IPV6_V6ONLY, 1)
        sock.bind(address.sockaddr)
    except OSError as error:
        raise _sockets.explained(error, address) from error
    return None


def bind_anywhere(sock: Any) -> None:
    """Bind a socket to a free port of every interface, or to a free abstract name, so that answers reach it."""
    if sock.family != AF_UNIX:
        sock.bind(("", 0))
    elif sys.platform == "linux":
        sock.bind("")  # *Source*: unix(7), "Autobind feature"


def connect(sock: Any, address: Address) -> None:
    """Tie a socket to one peer; nothing is sent.

    Raises:
        OSError: with the address in its text.
    """
    if address.family == AF_UNIX and not _sockets.local_sockaddr(sock):
        bind_anywhere(sock)
    try:
        code = _sockets.connect_at_once(sock, address.sockaddr)
    except OSError as error:
        code = error.errno or errno.ENAMETOOLONG  # Python itself looks how long a path is
    if code:
        broadcast = code == errno.EACCES and address.family == stdlib_socket.AF_INET
        hint = "; if that is a broadcast address set broadcast = True" if broadcast else ""
        raise OSError(code, f"cannot connect to {format_address(address.sockaddr)}: {reason(code, address.sockaddr)}{hint}")


def set_option(sock: Any, name: str, value: Any) -> None:
    """Set one of OPTIONS, unless the family of the socket has no such thing.

    Raises:
        OSError, ValueError: the system does not know that interface.
    """
    family = sock.family
    if family not in OPTIONS[name]:
        return
    level, number = OPTIONS[name][family]
    try:
        if name != "multicast_interface":
            sock.setsockopt(level, number, int(value))
        elif family == stdlib_socket.AF_INET6:
            sock.setsockopt(level, number, _index(value))
        else:
            sock.setsockopt(level, number, struct.pack("4s4si", bytes(4), *_interface(value)))
    except OSError as error:
        raise OSError(error.errno, f"{name} cannot be {value!r}: {error.strerror}") from error


def membership(sock: Any, group: str, interface: Any, *, join: bool) -> None:
    """Join or leave a multicast group.

    Raises:
        ValueError: `group` is no multicast address of the socket's family, or there is no such interface.
        OSError: the system refuses: it is a member already, or is none.
    """
    try:
        parsed = ip_address(group)
    except ValueError:
        raise ValueError(f"{group!r} is no multicast group; give its IP address as a str, such as '239.1.2.3'") from None
    if not parsed.is_multicast:
        raise ValueError(f"{group} is no multicast group: these are 224.0.0.0 to 239.255.255.255, and ff00::/8")
    if sock.family == AF_UNIX:
        raise ValueError("Unix sockets have no multicast groups")
    if (parsed.version == 4) != (sock.family == stdlib_socket.AF_INET):
        raise ValueError(f"{group} is not {family_name(sock.family)}, as the socket is; listen on an address of its family")
    try:
        if parsed.version == 4:
            number = stdlib_socket.IP_ADD_MEMBERSHIP if join else stdlib_socket.IP_DROP_MEMBERSHIP
            sock.setsockopt(IP, number, struct.pack("4s4si", parsed.packed, *_interface(interface)))
        else:
            number = stdlib_socket.IPV6_JOIN_GROUP if join else stdlib_socket.IPV6_LEAVE_GROUP
            scope = getattr(parsed, "scope_id", None)
            index = _index(int(scope) if scope and interface is None and scope.isdecimal() else interface or scope)
            sock.setsockopt(IPV6, number, struct.pack("16sI", parsed.packed, index))
    except OSError as error:
        hint = {
            errno.EADDRINUSE: "it is a member already",
            errno.EADDRNOTAVAIL: "it is no member" if not join else f"there is no interface {interface!r}",
            errno.ENODEV: f"there is no interface {interface!r}" if interface else "no interface leads there; give one, as interface=",
        }.get(error.errno or 0, error.strerror)
        raise OSError(error.errno, f"cannot {'join' if join else 'leave'} {group}: {hint}") from error


def _interface(interface: Any) -> tuple[bytes, int]:
    """Return the address and the number of an interface of IPv4; zeros: the system chooses."""
    if isinstance(interface, str):
        try:
            return IPv4Address(interface).packed, 0
        except ValueError:
            pass
    return bytes(4), _index(interface)


def _index(interface: Any) -> int:
    if interface is None:
        return 0
    if isinstance(interface, int) and not isinstance(interface, bool):
        if not 0 < interface < 2**31:
            raise ValueError(f"the number of an interface is at least 1, not {interface!r}")
        return interface
    if isinstance(interface, str):
        try:
            return stdlib_socket.if_nametoindex(interface)
        except OSError:
            raise ValueError(f"this machine has no interface {interface!r}; give a name, its number, or for IPv4 its address") from None
    raise TypeError(f"an interface is a name, a number, or for IPv4 an address, not {interface!r}")
