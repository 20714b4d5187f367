"""Dialling: from an address of any kind to a connected socket; the addresses of a name race.

Runs in the stream's own greenlet and waits only in its own waits, so that ``close()`` ends it at once.

*Source*: RFC 8305, "Happy Eyeballs", of which section 4 is the order, section 5 the race.
"""

import errno
import os
import socket as stdlib_socket
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

from pants_green import _sockets
from pants_green._address import AF_UNIX, Address, format_address, parse_address
from pants_green._lifecycle import CONNECTING, NEW, CloseReason
from pants_green.errors import InvalidAddressFormatError, StreamConnectError

if TYPE_CHECKING:
    from pants_green.stream import Stream

__all__ = ["dial", "give_up", "parse_source"]

#: Seconds that an attempt is given before the next one begins beside it. *Source*: RFC 8305 section 8.
CONNECTION_ATTEMPT_DELAY = 0.25

#: Reasons for which a server was not even asked. Those of the other attempts tell more.
NOT_ASKED = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.ENETUNREACH})

#: The addresses that were dialled in vain, and why.
Failures = list[tuple[Address, OSError]]


def parse_source(source: Any, address: Address) -> Address:
    """Understand the `source_address` with which `address` is to be dialled.

    Returns:
        what to bind to; AF_UNSPEC if the host is left open.

    Raises:
        InvalidAddressFormatError: it is not ``(host, port)`` with a numeric host, or there is nothing to dial from there.
    """
    if address.family == AF_UNIX:
        raise InvalidAddressFormatError(
            f"source_address is for TCP, and {format_address(address.sockaddr)} is the path of a Unix socket; leave it out"
        )
    if not isinstance(source, tuple) or len(source) != 2:
        raise InvalidAddressFormatError(f"source_address is (host, port) of this machine, such as ('192.0.2.1', 0), not {source!r}")
    parsed = parse_address(source)
    if not parsed.sockaddr[0]:
        return parsed._replace(family=stdlib_socket.AF_UNSPEC)
    if parsed.needs_lookup:
        try:
            if "%" not in source[0]:
                raise OSError
            return _sockets.resolve(parsed)[0]  # does not wait for that
        except OSError:
            hint = "an IP address of this machine, or '' for any"
            raise InvalidAddressFormatError(f"the host of source_address is {hint}, not {source[0]!r}") from None
    return parsed


def dial(stream: "Stream[...]", address: Address) -> StreamConnectError | None:
    """Connect a stream that is CONNECTING.

    Returns:
        None if the stream has a connected socket now or was closed meanwhile, else why there is no connection.
    """
    failures: Failures = []
    try:
        found = _look_up(stream, address) if address.needs_lookup else [address]
    except OSError as error:
        found = []
        failures.append((address, error.with_traceback(None)))
    adopted = stream._socket
    if stream._source is not None:
        found = _of_family(stream._source, found, failures)
    if adopted is not None:
        found = _of_socket(adopted, found, failures)
    if stream._state is not CONNECTING:
        return None
    if adopted is not None and not found:
        stream._drop_socket()
    if len(found) == 1:
        _try(stream, found[0], failures)
    elif found:
        stream._race = race = Race(stream, failures)
        try:
            race.run(interleaved(found))
        finally:
            race.close()
            stream._race = None
    if stream._state is not CONNECTING:
        return None
    if stream._socket is None:
        return _failure(address, failures)
    if stream._limits is not None:
        stream._limits.cancel()
        stream._limits = None
    return None


def give_up(stream: "Stream[...]") -> None:
    """Hub: the time for dialling is up."""
    if stream._state is not CONNECTING and stream._state is not NEW:
        return
    text = f"cannot connect to {format_address(stream._remote)} within connect_timeout, {stream._connect_timeout:g} seconds"
    if stream._race is not None and stream._race.failures:
        text += f"; before that: {_reasons(stream._race.failures)}"
    failure = StreamConnectError(errno.ETIMEDOUT, text)
    stream._keep_posted("on_connect_error", failure)
    stream._shut(CloseReason.CONNECT_FAILED, failure)


def _failure(address: Address, failures: Failures) -> StreamConnectError:
    where = f"cannot connect to {format_address(address.sockaddr)}"
    if not failures:
        return StreamConnectError(None, f"{where}: no address was found")
    _, cause = next((one for one in failures if one[1].errno not in NOT_ASKED), failures[0])
    failure = StreamConnectError(cause.errno, f"{where}: {_reasons(failures)}")
    failure.__cause__ = cause
    return failure


def _reasons(failures: Failures) -> str:
    """Say why each address could not be dialled, or just why, if that is the same for all."""
    reasons: dict[str, list[str]] = {}
    for address, cause in failures:
        reasons.setdefault(cause.strerror or str(cause), []).append(format_address(address.sockaddr))
    if len(reasons) == 1:
        return next(iter(reasons))
    return ", ".join(f"{reason} ({', '.join(addresses)})" for reason, addresses in reasons.items())


def _of_family(source: Address, found: list[Address], failures: Failures) -> list[Address]:
    """Leave the addresses out that cannot be dialled from `source`."""
    fit = [one for one in found if source.family in (one.family, stdlib_socket.AF_UNSPEC)]
    if found and not fit:
        kind = "IPv6" if source.family == stdlib_socket.AF_INET6 else "IPv4"
        text = f"it has no {kind} address, which source_address {format_address(source.sockaddr)} asks for"
        failures.append((found[0], OSError(errno.EAFNOSUPPORT, text)))
    return fit


def _of_socket(sock: Any, found: list[Address], failures: Failures) -> list[Address]:
    """Leave one address, for a socket can be dialled with once: the first that fits it."""
    fit = [one for one in found if one.family == sock.family]
    if found and not fit:
        failures.append((found[0], OSError(errno.EAFNOSUPPORT, f"the given socket is of another family: {sock!r}")))
    return fit[:1]


def interleaved(addresses: Iterable[Address]) -> list[Address]:
    """Return addresses by turns of each family, that of the first one first."""
    families: dict[int, list[Address]] = {}
    for one in addresses:
        families.setdefault(one.family, []).append(one)
    return [one for one in chain.from_iterable(zip_longest(*families.values())) if one is not None]


def _try(stream: "Stream[...]", address: Address, failures: Failures) -> None:
    """Dial the only address there is."""
    try:
        socket, code = _sockets.dial(address, stream._source, stream._socket)
    except OSError as error:
        failures.append((address, error.with_traceback(None)))
        if stream._socket is not None:
            stream._drop_socket()
        return
    stream._use(socket, _sockets.ports_of(socket))
    local = None
    while _sockets.in_progress(code):
        stream._wait(stream._writer)
        if stream._state is not CONNECTING:
            return
        code, local = _sockets.dial_result(socket)
    if code == 0:
        stream._remote, stream._local = address.sockaddr, local
        return
    stream._drop_socket()
    stream._local = None
    failures.append((address, OSError(code, os.strerror(code))))


class Race:
    """Attempts at several addresses; the first that stands wins, and the stream has its socket.

    It can be waited for like a watcher: it fires when one of them may have come to its end.

    Args:
        stream: what is to be connected.
        failures: where to put those that fail.
    """

    __slots__ = ("_attempts", "_due", "_stream", "_timer", "failures")

    def __init__(self, stream: "Stream[...]", failures: Failures) -> None:
        self._stream = stream
        self.failures = failures
        #: Address, socket and ports of those that are under way, the eldest first.
        self._attempts: list[tuple[Address, Any, _sockets.Ports]] = []
        #: Whether it is time for the next one.
        self._due = True
        self._timer: Any = None

    def run(self, addresses: Iterable[Address]) -> None:
        """Dial until there is a connection, nothing is left to be tried, or the stream is closed."""
        stream = self._stream
        todo = deque(addresses)
        while stream._state is CONNECTING and not self._won():
            if todo and self._due:
                self._begin(todo.popleft(), bool(todo))
            elif self._attempts:
                stream._wait(self)
            else:
                return

    def _begin(self, address: Address, more: bool) -> None:
        """Begin one attempt, and see to it that the next one, if there is any, begins in time."""
        self._cancel_timer()
        try:
            socket, code = _sockets.dial(address, self._stream._source)
        except OSError as error:
            self.failures.append((address, error.with_traceback(None)))
            return
        attempt = address, socket, _sockets.ports_of(socket)
        if code and not _sockets.in_progress(code):
            self._fail(attempt, code)
            return
        self._attempts.append(attempt)
        self._due = False
        if more:
            self._timer = self._stream._engine._in_hub_after(CONNECTION_ATTEMPT_DELAY, self._fall_due)

    def _fall_due(self) -> None:
        """Hub: the last one has had its time."""
        self._timer = None
        self._due = True
        self._stream._alert()

    def _won(self) -> bool:
        """See how those under way are doing, and take the first that stands."""
        for attempt in self._attempts[:]:
            address, socket, ports = attempt
            code, local = _sockets.dial_result(socket)
            if code == 0:
                self._attempts.remove(attempt)
                self._stream._use(socket, ports)
                self._stream._remote, self._stream._local = address.sockaddr, local
                return True
            if not _sockets.in_progress(code):
                self._attempts.remove(attempt)
                self._fail(attempt, code)
                self._due = True
        return False

    def _fail(self, attempt: tuple[Address, Any, _sockets.Ports], code: int) -> None:
        address, socket, (_, _, reader, writer) = attempt
        _sockets.close(socket, reader, writer)
        self.failures.append((address, OSError(code, os.strerror(code))))

    def start(self, callback: Callable[[], Any]) -> None:
        """Call `callback`, in the hub, when one of them may have come to its end."""
        for _, _, (_, _, _, writer) in self._attempts:
            writer.start(callback)

    def stop(self) -> None:
        """Do so no more."""
        for _, _, (_, _, _, writer) in self._attempts:
            writer.stop()

    def close(self) -> None:
        """Give up all that are under way. The stream may wait for them."""
        self._cancel_timer()
        while self._attempts:
            _, socket, (_, _, reader, writer) = self._attempts.pop()
            _sockets.close(socket, reader, writer)

    def abandon(self) -> None:
        """In a child forked by another thread: see `_sockets.abandon`."""
        for _, socket, _ in self._attempts:
            _sockets.abandon(socket)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _look_up(stream: "Stream[...]", address: Address) -> list[Address]:
    """Look a name up in another greenlet, for the resolver's own wait cannot be woken by a close()."""
    found: list[Any] = []
    waiting = [stream]

    def look_up(address: Address) -> None:
        if not waiting:
            return
        answer: Any
        try:
            answer = _sockets.resolve(address)
        except BaseException as error:
            # Without its traceback: its frames hold the stream, and the stream will hold it.
            answer = error.with_traceback(None)
        for one in waiting:  # that it still is cannot be told by the stream: it may be dialling again by now
            found.append(answer)
            one._alert()

    stream._host = str(address.sockaddr[0])  # the certificate of a server that speaks TLS has to be its own
    stream._engine._run_soon(look_up, address, stream._context)
    try:
        while not found and stream._state is CONNECTING:
            stream._wait()
    finally:
        waiting.clear()
    if not found:
        return []
    if isinstance(found[0], BaseException):
        raise found[0]
    return list(found[0])
