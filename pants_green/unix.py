"""Unix sockets: the server, connection and client that take paths alone, and know who the peer is.

``Server`` and ``Client`` take paths, too; here is only what differs.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple, Self

from pants_green import _sockets
from pants_green._address import AF_UNIX, NOT_GIVEN, Address, parse_address, parse_listen
from pants_green._adopting import is_bound
from pants_green._callbacks import Chunk
from pants_green._socket_file import Permissions, is_abstract
from pants_green.client import Client
from pants_green.errors import InvalidAddressFormatError
from pants_green.server import Connection, Server
from pants_green.stream import Stream

try:
    import grp
    import pwd
except ImportError:  # Windows, where no address is the path of a Unix socket
    pass

__all__ = ["Credentials", "UnixClient", "UnixConnection", "UnixServer"]

#: The highest uid or gid; the number above means "leave it" to chown.
HIGHEST_ID = 0xFFFFFFFE


class Credentials(NamedTuple):
    """Who is at the other end of a Unix socket, as the kernel says.

    Attributes:
        pid: the process that connected, or that called ``listen()``; it may have ended, or have handed the socket on. 0 for one
            that cannot be seen from here, such as one outside of this container.
        uid, gid: its effective user and group at that time.
    """

    pid: int
    uid: int
    gid: int


class UnixStream(Stream[Chunk]):
    """What both ends of a Unix connection have in common."""

    __slots__ = ()

    # Not a slot, which needs filling: only few ever ask.
    _credentials: tuple[int, int, int] | None = None

    @property
    def peer_credentials(self) -> Credentials | None:
        """Pid, uid and gid of the peer; None before it is connected, and where the platform does not tell; still known in ``on_close``."""
        if self._credentials is None and self._socket is not None:
            self._credentials = _sockets.peer_credentials(self._socket)
        return None if self._credentials is None else Credentials(*self._credentials)

    def _adopt(self, socket: Any) -> None:
        _check_family(type(self).__name__, socket, "Stream")
        super()._adopt(socket)

    def _let_go(self) -> None:
        if self._credentials is None:
            self._credentials = _sockets.peer_credentials(self._socket)
        super()._let_go()

    def _begin_anew(self, chosen: tuple[dict[str, Any], dict[str, Any]]) -> None:
        super()._begin_anew(chosen)
        self._credentials = None  # the next peer may be another process

    def _describe(self) -> str:
        text, known = super()._describe(), self.peer_credentials
        return text if known is None else f"{text} (pid {known.pid}, uid {known.uid})"


class UnixConnection(UnixStream[Chunk], Connection[Chunk]):
    """The server's end of a connection over a Unix socket.

    Its ``remote_address`` is "" for clients without a name, which most are; ``peer_credentials`` tells who they are.
    """

    __slots__ = ()


class UnixClient(UnixStream[Chunk], Client[Chunk]):
    """A Stream that is meant to ``connect()`` to a Unix socket."""

    __slots__ = ()

    def connect(self, address: Any, port: int | None = None, *, source_address: Any = None) -> Self:
        """Dial; returns at once. ``on_connect`` or ``on_connect_error`` follows, never inside this call.

        Args:
            address: the path of a Unix socket, as str, bytes or path object; ``"\\0name"`` is an abstract name.
            port, source_address: a path has none; they are here for the sake of errors that say so.

        Returns:
            the stream itself.

        Raises:
            ChannelStateError: (RuntimeError) it is connecting, connected or closed.
            InvalidAddressFormatError: (ValueError) `address` is no path; hosts and ports are for `Client`.
        """
        _check_path(f"{type(self).__name__}.connect()", address if port is None else (address, port), "Client")
        return super().connect(address, source_address=source_address)


class UnixServer(Server):
    """Listens on a Unix socket, and makes a stream of the connection class for every connection.

    Args:
        ConnectionClass: as for `Server`; `UnixConnection` by default.
        socket, engine, ssl_options, proxy_protocol, trusted: as for `Server`.
    """

    __slots__ = ()

    ConnectionClass: Any = UnixConnection

    def _adopt(self, socket: Any) -> None:
        _check_family(type(self).__name__, socket, "Server")
        super()._adopt(socket)

    def listen(  # type: ignore[override]
        self,
        path: Any = NOT_GIVEN,
        backlog: int = 1024,
        *,
        mode: int | None = None,
        owner: int | str | None = None,
        group: int | str | None = None,
    ) -> Any:
        """Bind, listen and accept. ``on_listen`` is called before this returns.

        A file that another server has left behind at that path is replaced; one on which somebody listens is "in use", and
        whatever else is there stays. The file is removed when the server is closed, unless another has taken its place or
        a forked child is what closes.

        To connect one needs the right to write to the file and to pass through its directories. Nobody can connect before
        `mode`, `owner` and `group` hold.

        Args:
            path: str, bytes or a path object, up to 107 bytes on Linux; ``"\\0name"`` is an abstract name, which has no file: any
                process in the same network namespace can connect. Only a server that was given a bound socket needs none.
            backlog: connections that may wait to be accepted.
            mode: the permissions of the file, 0 to 0o777, such as 0o660; None: 0o777 without the bits of the umask.
            owner: uid or name of the user that is to own the file; only root may give it away.
            group: gid or name of its group; others than root may give it to groups that they are in.

        Returns:
            the server itself.

        Raises:
            ChannelStateError: (RuntimeError) it listens already, or is closed.
            InvalidAddressFormatError: (ValueError) `path` is no path; hosts and ports are for `Server`.
            TypeError, ValueError: another argument makes no sense, or there is no such user or group.
            OSError: the path is in use or cannot be bound to, or the permissions cannot be given. The server stays as it was, no
                file is left, and it may try another.
        """
        if path is NOT_GIVEN and self._given is not None and is_bound(self._given) and (mode, owner, group) == (None, None, None):
            return super().listen(backlog=backlog)
        what = f"{type(self).__name__}.listen()"
        address = _check_path(what, path, "Server")
        call = parse_listen(path, backlog=backlog)
        permissions = Permissions(_mode(what, mode), _number(what, "owner", owner), _number(what, "group", group))
        if permissions == Permissions():
            return self._listen(call)
        if is_abstract(address.sockaddr):
            raise ValueError(f"{what} takes mode, owner and group with a path; the abstract name {path!r} has no file to give them to")
        return self._listen(call, permissions=permissions)


def _check_family(owner: str, socket: Any, other: str) -> None:
    """Refuse a socket that is no Unix socket; `other` is the class that takes it. What is no socket at all is refused later."""
    if getattr(socket, "family", AF_UNIX) != AF_UNIX:
        raise TypeError(f"{owner}(socket=) takes a Unix socket, not {socket!r}; {other} takes those of IPv4 and IPv6")


def _check_path(what: str, path: Any, other: str) -> Address:
    """Return the address that a path is.

    Args:
        what: what was called.
        other: the class that takes other addresses.
    """
    hint = f"{what} takes the path of a Unix socket, not {path!r}; {other} takes hosts and ports"
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise InvalidAddressFormatError(hint)
    try:
        return parse_address(path)
    except InvalidAddressFormatError as error:
        raise InvalidAddressFormatError(f"{hint} ({error})") from None


def _mode(what: str, mode: Any) -> int | None:
    if mode is None:
        return None
    if isinstance(mode, bool) or not isinstance(mode, int):
        raise TypeError(f"{what} takes mode= as an int such as 0o660, not {mode!r}")
    if not 0 <= mode <= 0o777:
        raise ValueError(f"{what} takes mode= from 0 to 0o777, such as 0o660, not {mode} ({mode:#o})")
    return int(mode)


def _number(what: str, kind: str, given: Any) -> int | None:
    """Return the uid of an owner, or the gid of a group."""
    if given is None:
        return None
    called, number = ("user", "uid") if kind == "owner" else ("group", "gid")
    if isinstance(given, str):
        look_up: Callable[[str], Any] = pwd.getpwnam if kind == "owner" else grp.getgrnam
        try:
            return int(look_up(given)[2])
        except (KeyError, ValueError):
            raise ValueError(f"{what} takes {kind}= as a name or a {number}, and this machine has no {called} {given!r}") from None
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{what} takes {kind}= as the name of a {called} or a {number}, not {given!r}")
    if not 0 <= given <= HIGHEST_ID:
        raise ValueError(f"{what} takes {kind}= as a {number} from 0 to {HIGHEST_ID}, not {given}")
    return int(given)
