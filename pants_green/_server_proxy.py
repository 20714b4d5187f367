"""The PROXY protocol of a server: whose header is believed, and what it says of a connection, before anybody hears of that.

The header itself is in ``proxy_protocol``; waiting for it in ``_greeting``.
"""

import functools
import logging
from collections.abc import Iterable
from typing import Any, ClassVar

from pants_green._address import format_address
from pants_green._lifecycle import LISTENING, STOPPING
from pants_green._networks import Networks
from pants_green._reports import Reports
from pants_green._server_tls import ServerTLS
from pants_green._settings import Setting, byte_count, seconds
from pants_green.proxy_protocol import parse

__all__ = ["ServerProxy", "networks"]

#: The versions that each word stands for.
VERSIONS = {"v1": (1,), "v2": (2,), "auto": (1, 2)}


def networks(name: str, value: Any) -> Networks:
    """Check a list of networks; for a `Setting`."""
    return value if isinstance(value, Networks) else Networks(name, value)


def _version(name: str, value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or value not in VERSIONS):
        raise ValueError(f"{name} is 'v1', 'v2', 'auto' for either, or None, not {value!r}")
    return value


class ServerProxy(ServerTLS):
    """The part of a server that has to do with the PROXY protocol. Not made by itself."""

    __slots__ = ("_reports",)

    #: Whether every connection begins with a PROXY header, of which version: "v1", "v2", "auto" for either; None: without one.
    #: A connection without it is closed. With it, `remote_address` is that of the client behind the proxy, and `proxy_header`
    #: has the rest. It comes before the TLS handshake.
    proxy_protocol: Setting[str | None] = Setting(None, _version)

    #: Networks of the proxies that are believed; connections from elsewhere are closed. "unix" stands for Unix sockets.
    trusted: Setting[Any] = Setting(Networks("trusted", ["127.0.0.0/8", "::1", "unix"]), networks)

    #: Seconds that the header may take; None: no limit.
    proxy_timeout: Setting[float | None] = Setting(5.0, seconds)

    #: Bytes of the longest header that is taken; the certificate of a client may need more.
    proxy_header_size: Setting[int] = Setting(4096, byte_count)

    _proxy_protocol: ClassVar[str | None]
    _trusted: ClassVar[Networks]
    _proxy_timeout: ClassVar[float | None]
    _proxy_header_size: ClassVar[int]

    @classmethod
    def _settled(cls) -> None:
        for name in ("proxy_protocol", "trusted", "proxy_timeout", "proxy_header_size"):
            setattr(cls, "_" + name, getattr(cls, name))

    def __init__(self, engine: Any, proxy_protocol: str | None, trusted: Iterable[Any] | None) -> None:
        super().__init__(engine)
        self._reports = Reports(self)
        if proxy_protocol is not None:
            self.proxy_protocol = proxy_protocol
        if trusted is not None:
            self.trusted = trusted

    def _read_header(self, worker: Any, accepted: tuple[Any, ...]) -> tuple[Any, Any, Any, int] | None:
        """Take the header off an accepted connection; return what is known of it now, or None if it was closed."""
        sock, remote, local, key = accepted
        if remote not in self._trusted:
            text = "%s is no proxy that is believed; its connection was closed"
            self._reports.tell("trusted", self._trusted, text, format_address(remote))
            sock.close()
            return None
        assert self._proxy_protocol is not None
        versions = VERSIONS[self._proxy_protocol]
        try:
            with self._greeting(sock) as greeting:
                read = functools.partial(parse, versions=versions, max_length=self._proxy_header_size)
                header = greeting.read_header(read, self._proxy_timeout)
        except Exception as error:
            sock.close()
            self._without_header(remote, error.with_traceback(None))
            return None
        worker.header = header
        if not header.local and header.source is not None:
            remote = header.source
        return sock, remote, local, key

    def _without_header(self, remote: Any, error: Exception) -> None:
        """No header came: it costs that connection and nothing else."""
        if self._state is not LISTENING and self._state is not STOPPING:
            return
        message = "no header from %s, whose connection was closed: %s"
        if isinstance(error, OSError) and not isinstance(error, TimeoutError):
            self._log(logging.DEBUG, message, format_address(remote), error, event="peer_left")
        else:
            self._reports.tell("proxy_protocol", self._proxy_protocol, message, format_address(remote), error)
