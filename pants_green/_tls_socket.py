"""The socket that ``on_accept`` gets from a server that speaks TLS: to be asked, to be read and written, or to be wrapped in a Stream.

It blocks as every socket of gevent's does: only the greenlet that calls. What TLS does with the bytes is in ``_tls``.
"""

import errno
import socket as stdlib_socket
from collections.abc import Callable
from typing import Any, NoReturn

from pants_green import _sockets
from pants_green._tls import Filter

__all__ = ["TLSSocket"]

#: Bytes that are received at once.
RECEIVE = 64 * 1024

#: Bytes that are sent at once.
SEND = 256 * 1024


class TLSSocket(_sockets.GeventSocket):  # type: ignore[misc]
    """A gevent socket behind whose handshake TLS begins: what is sent and received is encrypted on the way. Not made by itself.

    One greenlet may read while another one writes. ``Stream(socket=...)`` takes it over as it is; then it is the stream's.
    """

    __slots__ = ("_busy", "_rest", "_tls")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._tls: Filter | None = None
        self._rest = memoryview(b"")
        self._busy = False
        super().__init__(*args, **kwargs)

    @classmethod
    def _over(cls, sock: Any, tls: Filter, soon: Callable[..., Any]) -> "TLSSocket":
        """Return one that stands on the descriptor of a gevent socket, which is of no use any more, and on its filter."""
        family, kind, proto = sock.family, sock.type, sock.proto
        made = cls(family, kind, proto, fileno=sock.detach())
        made._tls = tls
        tls.stand_on(_sockets.ports_of(made), soon)
        return made

    def _hand_over(self) -> Filter:
        """Give the filter away, with what was received and not read."""
        tls = self._filter()
        if self._busy:
            raise _sockets.ConcurrentUse(f"another greenlet is writing to {self!r}")
        self._tls = None
        tls.forget_outbox()
        if self._rest:
            tls.unread(bytes(self._rest))
            self._rest = memoryview(b"")
        return tls

    def _filter(self) -> Filter:
        if self._tls is None:
            raise ValueError("this TLS socket is closed, or belongs to a stream: use that")
        return self._tls

    # ---- what is known of the peer

    @property
    def ssl_object(self) -> Any:
        """The ssl.SSLObject."""
        return self._filter().object

    def getpeercert(self, binary_form: bool = False) -> Any:
        """Return the peer's certificate, as ``ssl.SSLSocket`` does."""
        return self._filter().object.getpeercert(binary_form)

    def cipher(self) -> tuple[str, str, int] | None:
        """Return the name of the cipher, the version of TLS that brought it, and its bits."""
        return self._filter().object.cipher()

    def version(self) -> str | None:
        """Return the version of TLS."""
        return self._filter().object.version()

    def selected_alpn_protocol(self) -> str | None:
        """Return what both sides have chosen of their protocols, if anything."""
        return self._filter().object.selected_alpn_protocol()

    # ---- reading

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """Wait for up to `bufsize` bytes; empty at the end.

        Raises:
            ssl.SSLEOFError: the peer ended without TLS' goodbye.
            TimeoutError: nothing came within the socket's timeout.
        """
        self._without(flags)
        if bufsize < 0:
            raise ValueError("negative buffersize in recv")
        tls = self._filter()
        if not self._rest and bufsize:
            while True:
                try:
                    self._rest = memoryview(tls.recv(RECEIVE))
                    break
                except BlockingIOError:
                    if self.timeout == 0.0:
                        raise
                _sockets.wait_readable(self)
        data, self._rest = bytes(self._rest[:bufsize]), self._rest[bufsize:]
        return data

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Wait for bytes and put them into `buffer`; return how many."""
        view = memoryview(buffer).cast("B")
        if nbytes < 0 or nbytes > len(view):
            raise ValueError(f"recv_into() was asked for {nbytes} bytes, and the buffer has {len(view)}")
        data = self.recv(nbytes or len(view), flags)
        view[: len(data)] = data
        return len(data)

    # ---- writing

    def send(self, data: Any, flags: int = 0) -> int:
        """Send the beginning of `data`, waiting until there is room for it; return how many bytes that was.

        Raises:
            gevent.exceptions.ConcurrentObjectUseError: another greenlet is writing.
            TimeoutError: the peer took nothing within the socket's timeout. What has been encrypted cannot be taken back: after
                this, or after BlockingIOError, the next call has to go on with the same bytes.
        """
        self._without(flags)
        tls = self._filter()
        view = memoryview(data).cast("B")[:SEND]
        if self._busy:
            # What that one has encrypted comes first, and would count as this one's.
            raise _sockets.ConcurrentUse(f"another greenlet is writing to {self!r}")
        self._busy = True
        sent = 0
        try:
            if view:
                sent = tls.send(view)
            while sent < len(view):
                if self.timeout == 0.0:
                    if sent:
                        break
                    raise BlockingIOError(errno.EAGAIN, "the kernel takes nothing now")
                _sockets.wait_writable(self)
                sent += tls.send(view[sent:])
        except BaseException:
            tls.tell_again(sent)
            raise
        finally:
            self._busy = False
        return sent

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all of `data`."""
        view = memoryview(data).cast("B")
        while view:
            view = view[self.send(view, flags) :]

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """Send a file that was opened for binary reading, from `offset` on, `count` bytes or all; return how many that was."""
        if offset:
            file.seek(offset)
        sent = 0
        while count is None or sent < count:
            data = file.read(SEND if count is None else min(SEND, count - sent))
            if not data:
                break
            self.sendall(data)
            sent += len(data)
        return sent

    # ---- ending

    def shutdown(self, how: int) -> None:
        """End one direction, or both; before the output ends TLS says goodbye, and this waits until there is room for that."""
        if how != stdlib_socket.SHUT_RD and self._tls is not None:
            while not self._tls.goodbye() and self.timeout != 0.0:
                _sockets.wait_writable(self)
        super().shutdown(how)

    def close(self) -> None:
        """Close; TLS says goodbye if the kernel takes that at once."""
        if self._tls is not None and not _sockets.has_files(self):
            self._tls.goodbye()
            self._tls = None
        super().close()

    # ---- what would go by TLS

    def _without(self, flags: int) -> None:
        if flags:
            raise ValueError(f"a TLS socket takes no flags, such as {flags}: they are about the encrypted bytes")

    def _go_by(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("a TLS socket can do this only past TLS, and so does not; use send, sendall, recv or recv_into")

    sendto = sendmsg = recvfrom = recvfrom_into = recvmsg = recvmsg_into = detach = dup = _go_by
