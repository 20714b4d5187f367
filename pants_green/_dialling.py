"""Dialling: from an address of any kind to a connected socket, trying one after the other.

Runs in the stream's own greenlet and waits only in its own waits, so that ``close()`` ends it at once.
"""

import os
from typing import TYPE_CHECKING, Any

from pants_green import _sockets
from pants_green._address import Address, format_address
from pants_green._lifecycle import CONNECTING
from pants_green.errors import StreamConnectError

if TYPE_CHECKING:
    from pants_green.stream import Stream

__all__ = ["dial"]


def dial(stream: "Stream[...]", address: Address) -> StreamConnectError | None:
    """Connect a stream that is CONNECTING.

    Returns:
        None if the stream has a connected socket now or was closed meanwhile, else why there is no connection.
    """
    cause: OSError | None = None
    try:
        addresses = _look_up(stream, address) if address.needs_lookup else [address]
    except OSError as error:
        addresses, cause = [], error.with_traceback(None)
    for one in addresses:
        if stream._state is not CONNECTING:
            return None
        try:
            code = _try(stream, one)
        except OSError as error:
            cause = error.with_traceback(None)
            continue
        if code == 0 or stream._state is not CONNECTING:
            return None
        cause = OSError(code, os.strerror(code))
        stream._drop_socket()
        stream._local = None
    if stream._state is not CONNECTING:
        return None
    where = format_address(address.sockaddr)
    if cause is None:
        return StreamConnectError(None, f"cannot connect to {where}: no address was found")
    failure = StreamConnectError(cause.errno, f"cannot connect to {where}: {cause.strerror or cause}")
    failure.__cause__ = cause
    return failure


def _try(stream: "Stream[...]", address: Address) -> int:
    """Dial one address and wait for the outcome: 0 or an errno."""
    socket, code = _sockets.dial(address)
    stream._use(socket, _sockets.ports_of(socket))
    if _sockets.in_progress(code):
        stream._wait(stream._writer)
        if stream._state is not CONNECTING:
            return 0
        code = _sockets.dial_result(socket)
    if code == 0:
        stream._remote = address.sockaddr
        stream._local = _sockets.local_sockaddr(socket)
    return code


def _look_up(stream: "Stream[...]", address: Address) -> list[Address]:
    """Look a name up in another greenlet, for the resolver's own wait cannot be woken by a close()."""
    found: list[Any] = []

    def look_up(address: Address) -> None:
        try:
            found.append(_sockets.resolve(address))
        except BaseException as error:
            # Without its traceback: its frames hold the stream, and the stream will hold it.
            found.append(error.with_traceback(None))
        stream._interrupt()

    stream._host = str(address.sockaddr[0])  # the certificate of a server that speaks TLS has to be its own
    stream._engine._run_soon(look_up, address, stream._context)
    while not found and stream._state is CONNECTING:
        stream._wait()
    if not found:
        return []
    if isinstance(found[0], BaseException):
        raise found[0]
    return list(found[0])
