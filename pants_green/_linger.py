"""Lingering: the descriptor of a stream that has said everything and whose peer has not; no callback, no greenlet.

Closing it at once would make the kernel answer the peer's next bytes with a reset, and a reset may destroy what the peer
has not read yet. So what comes is read and thrown away until the peer is done, within limits.

*Source*: RFC 9112 section 9.6; nginx' ``lingering_close``, whose limits these are.
"""

import math
from collections.abc import Callable
from typing import Any

from pants_green._sockets import close, most_descriptors
from pants_green.engine import Engine

__all__ = ["Linger"]

#: Seconds without a byte from the peer after which it is let go.
IDLE_LIMIT = 5.0

#: The same when nothing else keeps the process from its end.
IDLE_LIMIT_AT_THE_END = 1.0

#: Of so many descriptors that the process may have one is for peers that linger; when there are more the first is let go.
SHARE = 4

#: Bytes that are thrown away at once before others get their turn.
GULP = 256 * 1024


class Linger:
    """Reads and discards what a peer still sends, then closes the socket.

    Args:
        engine: the stream's. socket, recv, reader, writer: what it has let go.
        limit: seconds after which the peer is let go in any case; None: never.
        overdue: called in the hub if that comes.
    """

    __slots__ = ("_deadline", "_engine", "_heard", "_idle_limit", "_overdue", "_reader", "_recv", "_socket", "_timer", "_writer")

    def __init__(
        self,
        engine: Engine,
        socket: Any,
        recv: Callable[[int], bytes],
        reader: Any,
        writer: Any,
        limit: float | None = 30.0,
        overdue: Callable[[], None] | None = None,
    ) -> None:
        self._engine = engine
        self._socket = socket
        self._recv = recv
        self._reader = reader
        self._writer = writer
        self._overdue = overdue
        self._heard = engine._clock()
        self._idle_limit = IDLE_LIMIT
        self._deadline = math.inf if limit is None else self._heard + limit
        self._timer: Any = None

    def start(self) -> None:
        """Begin, once the stream has let the socket go."""
        lingering = self._engine._lingering
        most = most_descriptors() // SHARE
        if 0 < most <= len(lingering):
            next(iter(lingering)).close()  # they count for no limit of the server's, and have had their answer as a rule
        lingering[self] = None
        self._timer = self._engine._in_hub_after(min(self._idle_limit, self._deadline - self._heard), self._check)
        self._reader.start(self._discard)

    def _discard(self) -> None:
        """Hub: something came, or the peer is done."""
        try:
            data = self._recv(GULP)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._heard = self._engine._clock()
        else:
            self.close()

    def _check(self) -> None:
        """Hub: an idle limit may be over."""
        now = self._engine._clock()
        due = min(self._heard + self._idle_limit, self._deadline)
        if now >= due:
            if now >= self._deadline and self._overdue is not None:
                self._overdue()
            self.close()
        else:
            self._timer = self._engine._in_hub_after(due - now, self._check)

    def hurry(self) -> None:
        """Hub: be content with less silence, for everything else is over."""
        self._idle_limit = IDLE_LIMIT_AT_THE_END
        self._timer.cancel()
        self._check()

    def close(self) -> None:
        """Let the peer go now."""
        self._timer.cancel()
        self._engine._lingering.pop(self, None)
        close(self._socket, self._reader, self._writer)
