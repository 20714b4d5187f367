"""The other side of a TLS connection: the standard library's ssl over a plain blocking socket, in a real thread.

It speaks over memory BIOs, not with an SSLSocket: that would be one of gevent's in a monkey-patched process.
"""

import ssl
from collections.abc import Callable
from typing import Any

import pytest
from certificates import client_context
from peers import Peer

__all__ = ["TLSPeer", "tls_peer"]


class TLSPeer(Peer):
    """A Peer that speaks TLS; everything that Peer can do goes through it.

    Args:
        address: as Peer.
        context: an SSLContext; by default one that trusts the tests' authority.
        server_hostname: for a client, "localhost" by default.
        shake: whether to do the handshake at once; else call ``shake_hands``.
        **options: as Peer.

    Attributes:
        object: the SSLObject.
    """

    def __init__(
        self, address: Any, context: Any = None, server_hostname: str | None = "localhost", shake: bool = True, **options: Any
    ) -> None:
        super().__init__(address, **options)
        self._secure(context or client_context(), False, server_hostname, shake)

    @classmethod
    def over(
        cls, peer: Peer, context: Any = None, *, server_side: bool = False, server_hostname: str | None = "localhost", shake: bool = True
    ) -> "TLSPeer":
        """Return one that goes on with the socket of a plain peer, which has to be forgotten: STARTTLS, or the server's side."""
        made = cls.__new__(cls)
        made._begin(peer.socket)
        made._secure(context or client_context(), server_side, None if server_side else server_hostname, shake)
        return made

    def _secure(self, context: Any, server_side: bool, server_hostname: str | None, shake: bool) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.object = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname)
        if shake:
            try:
                self.shake_hands()
            except BaseException:
                self.close()
                raise

    def shake_hands(self) -> None:
        """Do the handshake."""
        self._run(self._pump, self.object.do_handshake)

    def _pump(self, operation: Callable[..., Any], *args: Any) -> Any:
        """Thread: do what TLS is asked for, with as much sending and receiving as that takes."""
        while True:
            try:
                return operation(*args)
            except ssl.SSLWantReadError:
                self._send_all()
                data = self.socket.recv(65536)
                if data:
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
            finally:
                self._send_all()

    def _send_all(self) -> None:
        if self._outgoing.pending:
            self.socket.sendall(self._outgoing.read())

    def send(self, data: bytes) -> None:
        """Send all of `data`."""
        self._run(self._send_pieces, data)

    def _send_pieces(self, data: bytes) -> None:
        for start in range(0, len(data), 1 << 18):
            self._pump(self.object.write, data[start : start + (1 << 18)])

    def _receive(self, size: int = 65536) -> bytes:
        try:
            return bytes(self._pump(self.object.read, size))
        except ssl.SSLZeroReturnError:
            return b""

    def recv(self, size: int = 65536) -> bytes:
        """Return 1 to `size` bytes, as soon as there are any; b"" after the goodbye; ssl.SSLEOFError at an end without one."""
        if self._pending:
            data, self._pending = self._pending[:size], self._pending[size:]
            return data
        return bytes(self._run(self._receive, size))

    def at_eof(self) -> bool:
        """Tell whether the next thing that comes is the goodbye; anything else is kept for the next ``recv``."""
        if not self._pending:
            self._pending = bytes(self._run(self._receive))
        return not self._pending

    def _more(self, wanted: str) -> None:
        data = self._run(self._receive)
        if not data:
            raise AssertionError(f"the connection ended while the peer waited for {wanted}; before that came {self._pending!r}")
        self._pending += data

    def _read_to_end(self) -> bytes:
        pieces = []
        while data := self._receive(1 << 18):
            pieces.append(data)
        return b"".join(pieces)

    def say_goodbye(self) -> None:
        """Send close_notify; reading goes on."""
        try:
            self.object.unwrap()
        except ssl.SSLError:
            pass  # the other side has not said its own yet
        self._run(self._send_all)

    def shutdown_output(self) -> None:
        """Say goodbye and send a FIN; reading goes on."""
        self.say_goodbye()
        super().shutdown_output()

    def truncate_output(self) -> None:
        """Send a FIN without a goodbye."""
        super().shutdown_output()

    def send_raw(self, data: bytes) -> None:
        """Send bytes past TLS."""
        self._run(self.socket.sendall, data)

    def encrypt(self, data: bytes) -> bytes:
        """Return the records that say `data`, without sending them; they have to be sent next, by ``send_raw``."""
        self.object.write(data)
        return self._outgoing.read()


@pytest.fixture
def tls_peer():
    """Return a function that makes a connected TLSPeer: ``tls_peer(server_or_address, context=None, ...)``; closed at the end."""
    peers = []

    def make(address, **options):
        made = TLSPeer(address, **options)
        peers.append(made)
        return made

    yield make
    for one in peers:
        one.close()
