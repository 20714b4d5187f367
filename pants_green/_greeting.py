"""What an accepted connection has to get through before anybody hears of it: a PROXY header, the TLS handshake.

Runs in the connection's own greenlet. It ends in time: when it is done, when the peer is in the way, when the limit is up, or when
the server closes.
"""

import errno
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent

from pants_green import _sockets
from pants_green._tls import Filter
from pants_green.engine import Engine
from pants_green.errors import HandshakeTimeout, ProxyHeaderError

__all__ = ["Greeting"]

#: Seconds that a peer has to send anything at all, once the server stops.
SILENCE_AT_THE_END = 1.0


class Greeting:
    """The beginning of one accepted connection.

    Args:
        engine: the server's.
        socket: the accepted socket.
    """

    __slots__ = ("_engine", "_failure", "_greenlet", "_heard", "_hurry", "_limit", "_ports", "_socket", "_waiting", "_wakeup")

    def __init__(self, engine: Engine, socket: Any) -> None:
        self._engine = engine
        self._socket = socket
        self._ports = _sockets.ports_of(socket)
        self._greenlet: Any = getcurrent()
        self._failure: BaseException | None = None
        self._limit: Any = None
        self._hurry: Any = None
        #: Whether something has come for which this has waited.
        self._heard = False
        self._waiting: Any = None
        self._wakeup: Any = None

    def read_header(self, parse: Callable[[bytes], Any], seconds: float | None) -> Any:
        """Wait until a header has come, and take it off the socket, without a byte of what is behind it.

        Args:
            parse: returns the header and where it ends, or how many bytes more it needs at least.
            seconds: how long that may take; None: no limit.

        Raises:
            OSError, ValueError: it has not come, or is none; ConnectionAbortedError if the peer has sent nothing at all and left.
        """
        recv, _, reader, _ = self._ports
        data = b""
        self._begin(seconds, lambda: HandshakeTimeout(f"no PROXY header came within proxy_timeout, {seconds:g} seconds"))
        try:
            while isinstance(found := parse(data), int):
                try:
                    more = recv(found)
                except BlockingIOError:
                    self._wait(reader)
                    if self._failure is not None:
                        raise self._failure from None
                    continue
                if not more:
                    raise _ended_in_header(data)
                data += more
            return found[0]
        finally:
            self._end()

    def shake_hands(self, tls: Filter, seconds: float | None) -> None:
        """Wait until the TLS handshake is done.

        Args:
            tls: the filter over the socket.
            seconds: how long that may take; None: no limit.

        Raises:
            OSError: it has failed: an ssl.SSLError, HandshakeTimeout, what the socket said, or what `cut` was given.
        """
        self._begin(seconds, lambda: HandshakeTimeout._after(seconds or 0.0))
        try:
            # An SNI callback of the user's may have waited, too, in which nobody wakes this greenlet: so look before each wait.
            while (watcher := tls.shake_hands()) is not None and self._failure is None:
                self._wait(watcher)
            if self._failure is not None:
                raise self._failure
        finally:
            self._end()

    def _begin(self, seconds: float | None, failure: Callable[[], BaseException]) -> None:
        if seconds is not None:
            self._limit = self._engine._in_hub_after(seconds, self._overdue, failure)

    def _overdue(self, failure: Callable[[], BaseException]) -> None:
        self.cut(failure())

    def _end(self) -> None:
        self._cancel_limit()
        self._failure = None  # its traceback holds the frame that raised it

    def _wait(self, watcher: Any) -> None:
        self._waiting = watcher
        try:
            watcher.start(self._greenlet.switch)
            self._engine._pool.to_hub()
        finally:
            watcher.stop()
            self._waiting = None
            if self._wakeup is not None:
                self._wakeup.stop()
                self._wakeup = None
        self._heard = self._failure is None

    def _cancel_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
        if self._hurry is not None:
            self._hurry.cancel()
            self._hurry = None

    def hurry(self) -> None:
        """Hub: the server stops; it does not wait for long for a peer that says nothing."""
        if self._hurry is None:
            self._hurry = self._engine._in_hub_after(SILENCE_AT_THE_END, self._cut_if_silent)

    def _cut_if_silent(self) -> None:
        if not self._heard:
            self.cut(ConnectionAbortedError(errno.ECONNABORTED, "the server stops, and the peer has said nothing"))

    def cut(self, failure: BaseException) -> None:
        """Have what is waited for fail."""
        self._failure = failure
        if self._waiting is not None and self._wakeup is None:
            self._wakeup = self._engine._loop.run_callback(self._greenlet.switch)

    def forsake(self) -> None:
        """In a forked child: the connection is the parent's, and so is what this greenlet was doing."""
        self._engine._forsaken.append(self._greenlet)
        self._cancel_limit()
        if self._waiting is not None:
            self._waiting.stop()
            self._waiting = None
        if self._wakeup is not None:
            self._wakeup.stop()
            self._wakeup = None
        _, _, reader, writer = self._ports
        _sockets.close(self._socket, reader, writer)


def _ended_in_header(data: bytes) -> Exception:
    if not data:
        # What load balancers and monitors do to see whether somebody listens.
        return ConnectionAbortedError(errno.ECONNABORTED, "the peer ended the connection before the PROXY header")
    return ProxyHeaderError(f"the connection ended in the PROXY header, after {len(data)} bytes: {data!r:.100}", len(data))
