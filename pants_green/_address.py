"""Every spelling of an address -> family, sockaddr, whether it needs a lookup; pure.

Nothing is resolved here and no socket is made: that is the business of ``_sockets``.
"""

import os
import re
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, NamedTuple

from pants_green.errors import InvalidAddressFormatError

__all__ = ["AF_UNIX", "NOT_GIVEN", "Address", "ListenCall", "Sockaddr", "format_address", "parse_address", "parse_connect", "parse_listen"]

#: What a socket call takes: ``(host, port)``, ``(host, port, flowinfo, scope_id)``, or a Unix path.
Sockaddr = tuple[str, int] | tuple[str, int, int, int] | str | bytes

#: Platforms without Unix sockets have no AF_UNIX; no parsed address has this family there.
AF_UNIX = getattr(socket, "AF_UNIX", -1)

#: What an argument is that nobody gave, where None is a mistake.
NOT_GIVEN: Any = type("NotGiven", (), {"__slots__": (), "__repr__": lambda self: "<not given>"})()

#: What is meant as a port, if it stands where none is understood.
DIGITS = re.compile("[0-9]{1,5}")

FORMS = "a port, (host, port), (host, port, flowinfo, scope_id) for IPv6, or the path of a Unix socket"


class Address(NamedTuple):
    """A parsed address.

    Attributes:
        family: AF_INET, AF_INET6 or AF_UNIX; AF_UNSPEC while a name has yet to be looked up.
        sockaddr: what to bind to or to connect to, once looked up if `needs_lookup`.
        needs_lookup: whether the host is a name (or has a scope such as ``%eth0``).
    """

    family: int
    sockaddr: Sockaddr
    needs_lookup: bool

    @property
    def is_any(self) -> bool:
        """Whether it stands for every interface of the machine."""
        return self.family in (socket.AF_INET, socket.AF_INET6) and self.sockaddr[0] in ("", "0.0.0.0", "::")


class ListenCall(NamedTuple):
    """The arguments of ``listen()`` after the older spellings have been understood."""

    address: Address
    backlog: int
    slave: bool


def parse_address(address: Any) -> Address:
    """Tell what one address of any spelling means.

    Args:
        address: a port (int, 0 to 65535: every interface); ``(host, port)`` with an IPv4 or IPv6 address, a name,
            ``""`` (every interface) or ``"<broadcast>"``; ``(host, port, flowinfo, scope_id)`` for IPv6; the path of a Unix
            socket as str, bytes or path object (``"\\0name"`` is an abstract name).

    Raises:
        InvalidAddressFormatError: for anything else; it says what was given and what would do.
    """
    if isinstance(address, int):
        return Address(socket.AF_INET, ("", _port(address, address)), False)
    if isinstance(address, tuple):
        if len(address) == 2:
            return _parse_pair(address)
        if len(address) == 4:
            return _parse_quad(address)
        raise InvalidAddressFormatError(f"an address tuple has 2 or 4 elements, not {len(address)}: {address!r}; give {FORMS}")
    if isinstance(address, (str, bytes, os.PathLike)):
        return _parse_path(os.fspath(address))
    raise InvalidAddressFormatError(f"{address!r} is no address; give {FORMS}")


def parse_connect(address: Any, port: Any = None) -> Address:
    """Understand ``connect(address)`` and ``connect(host, port)``.

    A host of ``""`` means this machine.

    Raises:
        InvalidAddressFormatError: as parse_address, and for port 0, which nobody can be connected to.
    """
    parsed = parse_address(address if port is None else (address, port))
    if parsed.family == AF_UNIX:
        return parsed
    number = parsed.sockaddr[1]
    if number == 0:
        raise InvalidAddressFormatError(f"port 0 cannot be connected to: {address!r}; give the port that the server listens on")
    if isinstance(address, tuple) and len(address) == 4 and not address[0]:
        return Address(socket.AF_INET6, ("::1", *parsed.sockaddr[1:]), False)
    if parsed.sockaddr[0] == "":
        return Address(socket.AF_UNSPEC, ("localhost", number), True)  # type: ignore[arg-type]
    return parsed


def parse_listen(
    address: Any = NOT_GIVEN,
    legacy: tuple[Any, ...] = (),
    *,
    backlog: Any = None,
    slave: Any = None,
    host: Any = None,
    port: Any = None,
) -> ListenCall:
    """Understand every form of ``listen()`` that Pants ever had.

    The forms are told apart by type: a second positional str is a host (``listen(port, host, backlog)``, the oldest
    form), a second positional int is a backlog (``listen(address, backlog, slave)``).

    Args:
        address: as for parse_address; port 8080 if it is not given.
        legacy: further positional arguments.
        backlog: length of the accept queue, 1024 by default.
        slave: whether an "any" address serves both families, True by default.
        host, port: the keywords of the oldest form.

    Raises:
        InvalidAddressFormatError: the address makes no sense.
        TypeError, ValueError: another argument makes none.
    """
    rest = list(legacy)
    if port is not None:
        if address is not NOT_GIVEN:
            raise TypeError("listen() got the port twice, in the address and as port=")
        address = _port(port, port)
    if address is NOT_GIVEN:
        address = 8080
    if rest and (rest[0] is None or isinstance(rest[0], str)):
        if host is not None:
            raise TypeError("listen() got the host twice, by position and as host=")
        host = rest.pop(0) or ""
    if host is not None:
        if not isinstance(address, int):
            raise InvalidAddressFormatError(f"listen(port, host) takes a port first, not {address!r}; or give (host, port) as one address")
        address = (host, address)
    if rest:
        if backlog is not None:
            raise TypeError("listen() got the backlog twice, by position and as backlog=")
        backlog = rest.pop(0)
    if rest:
        if slave is not None:
            raise TypeError("listen() got slave twice, by position and as slave=")
        slave = rest.pop(0)
    if rest:
        raise TypeError(f"listen() takes an address, a backlog and slave; {rest!r} is left over")
    if backlog is None:
        backlog = 1024
    if isinstance(backlog, bool) or not isinstance(backlog, int):
        raise TypeError(f"backlog is the length of the accept queue, an int, not {backlog!r}")
    if backlog < 1:
        raise ValueError(f"backlog is the length of the accept queue and at least 1, not {backlog}")
    return ListenCall(parse_address(address), backlog, slave is None or bool(slave))


def format_address(sockaddr: Any) -> str:
    """Return an address as people write it: ``127.0.0.1:80``, ``[::1]:80``, a path."""
    if isinstance(sockaddr, tuple) and len(sockaddr) >= 2:
        host, port = sockaddr[0], sockaddr[1]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host or '*'}:{port}"
    if isinstance(sockaddr, bytes):
        sockaddr = os.fsdecode(sockaddr)
    return str(sockaddr).replace("\0", "@", 1) if sockaddr else "?"


def _parse_pair(address: tuple[Any, ...]) -> Address:
    host, port = address
    port = _port(port, address)
    if host is None or host == "":
        return Address(socket.AF_INET, ("", port), False)
    if not isinstance(host, str):
        raise InvalidAddressFormatError(f"the host of {address!r} is not a str; give {FORMS}")
    if host == "<broadcast>":
        return Address(socket.AF_INET, ("255.255.255.255", port), False)
    numeric = _numeric(host)
    if isinstance(numeric, IPv4Address):
        return Address(socket.AF_INET, (_bare(host), port), False)
    if isinstance(numeric, IPv6Address):
        return Address(socket.AF_INET6, (_bare(host), port, 0, 0), bool(numeric.scope_id))
    _check_name(host, address)
    return Address(socket.AF_UNSPEC, (host, port), True)


def _parse_quad(address: tuple[Any, ...]) -> Address:
    host, port, flowinfo, scope_id = address
    port = _port(port, address)
    if host is None or host == "":
        host = "::"
    if not isinstance(host, str):
        raise InvalidAddressFormatError(f"the host of {address!r} is not a str; give {FORMS}")
    for value, most in ((flowinfo, 0xFFFFF), (scope_id, 0xFFFFFFFF)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise InvalidAddressFormatError(f"flowinfo (0 to 1048575) and scope_id (0 to 4294967295) of {address!r} are ints")
    numeric = _numeric(host)
    if isinstance(numeric, IPv4Address):
        raise InvalidAddressFormatError(f"{address!r} has the four elements of an IPv6 address, but {host} is IPv4: give {(host, port)}")
    if numeric is None:
        _check_name(host, address)
        return Address(socket.AF_INET6, (host, port, flowinfo, scope_id), True)
    return Address(socket.AF_INET6, (_bare(host), port, flowinfo, scope_id), bool(numeric.scope_id))


def _parse_path(path: str | bytes) -> Address:
    text = os.fsdecode(path)
    if not text:
        raise InvalidAddressFormatError(f"an empty str is no address; give {FORMS}; every interface is ('', port)")
    if "\0" in text[1:]:
        raise InvalidAddressFormatError(f"the path {path!r} contains a NUL byte, which only an abstract name may begin with")
    if "/" not in text and not text.startswith("\0"):
        host, colon, port = text.rpartition(":")
        if _numeric(text) is not None:
            raise InvalidAddressFormatError(f"a str alone is the path of a Unix socket; for the IP address {text} give ({text!r}, port)")
        if not colon and DIGITS.fullmatch(text):
            hint = f"for a port give the int {int(text)}, and for a file of that name './{text}'"
            raise InvalidAddressFormatError(f"a str alone is the path of a Unix socket; {hint}")
        if colon and DIGITS.fullmatch(port):
            pair = f"({_bare(host)!r}, {int(port)})"
            raise InvalidAddressFormatError(f"a str alone is the path of a Unix socket; for host and port give {pair}")
    if AF_UNIX == -1:
        raise InvalidAddressFormatError(f"{path!r} is the path of a Unix socket, and this platform has none")
    return Address(AF_UNIX, path, False)


def _port(port: Any, address: Any) -> int:
    if isinstance(port, bool) or not isinstance(port, int):
        raise InvalidAddressFormatError(f"the port of {address!r} is not an int; give {FORMS}")
    if not 0 <= port <= 65535:
        raise InvalidAddressFormatError(f"port {port} is not between 0 and 65535")
    return int(port)


def _bare(host: str) -> str:
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _numeric(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(_bare(host))
    except ValueError:
        return None


def _check_name(host: str, address: Any) -> None:
    if "\0" in host or any(character.isspace() for character in host):
        raise InvalidAddressFormatError(f"the host of {address!r} is neither an IP address nor a name")
    if ":" in host or "/" in host:
        raise InvalidAddressFormatError(f"the host of {address!r} is neither an IP address nor a name; the port stands apart: (host, port)")
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise InvalidAddressFormatError(f"the host of {address!r} is no name that could be looked up: {error}") from None
