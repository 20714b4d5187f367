"""What an accepted connection has to get through before anybody hears of it: the TLS handshake.

Runs in the connection's own greenlet. It ends in time: when it is done, when the peer is in the way, when the limit is up, or when
the server closes.
"""

from typing import Any

from greenlet import getcurrent

from pants_green import _sockets
from pants_green._tls import Filter
from pants_green.engine import Engine
from pants_green.errors import HandshakeTimeout

__all__ = ["Greeting"]


class Greeting:
    """The handshake of one accepted connection.

    Args:
        engine: the server's.
        socket: the accepted socket.
        tls: the filter over it.
    """

    __slots__ = ("_engine", "_failure", "_greenlet", "_limit", "_socket", "_tls", "_waiting", "_wakeup")

    def __init__(self, engine: Engine, socket: Any, tls: Filter) -> None:
        self._engine = engine
        self._socket = socket
        self._tls = tls
        self._greenlet: Any = getcurrent()
        self._failure: BaseException | None = None
        self._limit: Any = None
        self._waiting: Any = None
        self._wakeup: Any = None

    def shake_hands(self, seconds: float | None) -> None:
        """Wait until the handshake is done.

        Args:
            seconds: how long that may take; None: no limit.

        Raises:
            OSError: it has failed: an ssl.SSLError, HandshakeTimeout, what the socket said, or what `cut` was given.
        """
        if seconds is not None:
            self._limit = self._engine._in_hub_after(seconds, self.cut, HandshakeTimeout._after(seconds))
        try:
            # An SNI callback of the user's may have waited, too, in which nobody wakes this greenlet: so look before each wait.
            while (watcher := self._tls.shake_hands()) is not None and self._failure is None:
                self._wait(watcher)
            if self._failure is not None:
                raise self._failure
        finally:
            self._cancel_limit()
            self._failure = None  # its traceback holds this frame

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

    def _cancel_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def cut(self, failure: BaseException) -> None:
        """Have ``shake_hands`` raise `failure`."""
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
        _, _, reader, writer = self._tls.raw
        _sockets.close(self._socket, reader, writer)
