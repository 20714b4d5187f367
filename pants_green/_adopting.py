"""Adopting: sockets that a user has made, in whatever state they are, become gevent sockets of ours; TLS is taken off them.

What a channel does with such a socket is its own business.
"""

import socket as stdlib_socket
from typing import Any

from pants_green import _sockets
from pants_green._address import AF_UNIX
from pants_green.errors import ChannelStateError

__all__ = ["adopt", "is_bound", "is_listening"]

KINDS: dict[int, str] = {stdlib_socket.SOCK_STREAM: "stream", stdlib_socket.SOCK_DGRAM: "datagram"}


def adopt(sock: Any, kind: int, owner: str) -> tuple[Any, dict[str, Any] | None]:
    """Take over the descriptor of a socket; one that is not gevent's own, is another thread's, or has TLS, loses it.

    Args:
        sock: a socket of gevent or of the standard library, or an SSLSocket of either before its handshake.
        kind: SOCK_STREAM or SOCK_DGRAM, which it has to be.
        owner: the name of the class that wants it, for errors.

    Returns:
        a gevent socket; and what ``startSSL()`` takes for it, if TLS was to be spoken over it, else None.

    Raises:
        TypeError: it is no such socket, or is closed.
        ChannelStateError: (RuntimeError) it speaks TLS already.
    """
    what = f"{owner}(socket=)"
    if not isinstance(sock, (_sockets.GeventSocket, _sockets.PlainSocket)):
        raise TypeError(f"{what} takes a socket of gevent or of the standard library, not {sock!r}")
    if sock.fileno() < 0:
        raise TypeError(f"{what} takes an open socket; {sock!r} is closed")
    if sock.type != kind or sock.family not in (stdlib_socket.AF_INET, stdlib_socket.AF_INET6, AF_UNIX):
        raise TypeError(f"{what} takes a {KINDS[kind]} socket of IPv4, IPv6 or Unix, not {sock!r}")
    tls = None
    if hasattr(sock, "do_handshake"):
        if sock.version() is not None:
            raise ChannelStateError(
                f"{what}: the TLS handshake of {sock!r} is done, and what has been received with it cannot be taken over; hand the "
                "socket over before (do_handshake_on_connect=False), or a plain one with ssl_options="
            )
        tls = {"context": sock.context, "server_side": sock.server_side}
        if sock.server_hostname is not None:
            tls["server_hostname"] = sock.server_hostname
    if tls is not None or not _sockets.is_of_this_thread(sock):
        sock = _sockets.take_over(sock)
    if kind == stdlib_socket.SOCK_STREAM and sock.family != AF_UNIX:
        _sockets.set_tcp_defaults(sock)
    return sock, tls


def is_listening(sock: Any) -> bool:
    """Tell whether connections can be accepted from a socket."""
    try:
        return bool(sock.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_ACCEPTCONN))
    except (OSError, AttributeError):
        return False  # it is no socket at all, or nobody can tell: that is found out when it is used


def is_bound(sock: Any) -> bool:
    """Tell whether a socket has an address of its own."""
    local = _sockets.local_sockaddr(sock)
    return bool(local[1] if isinstance(local, tuple) else local)
