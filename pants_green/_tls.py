"""TLS as a filter of bytes: between the socket and everything that a stream does with what it receives and sends.

It speaks over memory BIOs, so it waits for nothing, and works with the contexts of ssl and of gevent alike. What the options of
``startSSL`` mean is in ``_tls_options``; who waits for the handshake, in ``_stream_tls`` and ``_greeting``.

*Source*: what OpenSSL was seen to do: ``write()`` into a memory BIO takes all it is given; ``read()`` returns one record;
``unwrap()`` with data of the peer unread loses that data, and so does a second one.
"""

import copy
import errno
import functools
import ssl
from collections.abc import Callable
from typing import Any

__all__ = ["DORMANT", "Filter", "TLSError", "TLSTruncated"]

#: The trouble of TLS itself, an OSError.
TLSError = ssl.SSLError

#: That of them which tells of an end without a goodbye.
TLSTruncated = ssl.SSLEOFError

#: Bytes of the largest record's content. *Source*: RFC 8446 section 5.1.
RECORD = 16 * 1024

#: Bytes that are encrypted in one go, for as much may lie here in a second copy.
PIECE = 256 * 1024

#: Bytes that one flush encrypts at most, before others get their turn.
BURST = 1024 * 1024

#: Receives of one handshake before others get their turn.
RECEIVES_AT_ONCE = 4

#: Bytes of answers to the peer's requests, mostly for new keys, that may wait for it to read.
OWN_MOST = 16 * 1024


class Dormant:
    """Stands in the place of a watcher for which nothing is to wait."""

    __slots__ = ()

    def start(self, *args: Any) -> None:
        """Wait for nothing."""

    def stop(self) -> None:
        """Do nothing."""


DORMANT = Dormant()


class Immediate:
    """Stands in the place of a watcher when there is something to read of which the kernel knows nothing."""

    __slots__ = ("_raw", "_soon", "_wakeup")

    def __init__(self, raw: Any, soon: Callable[..., Any]) -> None:
        self._raw = raw
        self._soon = soon
        self._wakeup: Any = None

    def start(self, callback: Callable[..., Any], *args: Any) -> None:
        """Call `callback` in the next turn of the hub."""
        self._wakeup = self._soon(callback, *args)

    def stop(self) -> None:
        """Do so no more."""
        if self._wakeup is not None:
            self._wakeup.stop()
            self._wakeup = None
        self._raw.stop()


class Filter:
    """One connection's TLS, over the ports of its socket; offers the same four itself.

    After ``recv`` nothing that could be decrypted is left in here, so that waiting for the socket is right; where something has
    to be left, `reader` fires at once.

    Args:
        context: an ssl.SSLContext, or gevent's.
        raw: ``recv``, ``send``, read watcher and write watcher of the socket.
        soon: ``soon(callback, *args)`` calls back in the next turn of the hub and returns something with ``stop()``.
        server_side: which part to play in the handshake.
        server_hostname: for a client, the name to ask for and to find in the certificate.
        clear: bytes that are still to be sent as they are, before the handshake.
        ragged_ends: whether an end without goodbye is one, too.

    Attributes:
        object: the ssl.SSLObject.
        raw: the ports of the socket.
        reader: the watcher to wait for: that of the socket, or one that fires at once.
        owner: the stream, which is told of another one; None if nobody is to be.
        clear: as above.
        established: whether the handshake is done.

    Raises:
        ValueError: `server_hostname` cannot be one, or is missing.
    """

    __slots__ = (
        "_early",
        "_encrypted",
        "_gone",
        "_incoming",
        "_late",
        "_left",
        "_outgoing",
        "_overhead",
        "_own",
        "_poor",
        "_ragged_ends",
        "_raw_recv",
        "_raw_send",
        "_read",
        "_ready",
        "_said_goodbye",
        "_soon",
        "_take_in",
        "_tidy",
        "_whole",
        "_write",
        "clear",
        "established",
        "object",
        "owner",
        "raw",
        "reader",
    )

    def __init__(
        self,
        context: ssl.SSLContext,
        raw: Any,
        soon: Callable[..., Any],
        *,
        server_side: bool,
        server_hostname: str | None = None,
        clear: int = 0,
        ragged_ends: bool = False,
    ) -> None:
        self.owner: Any = None
        self._ready = False
        self.stand_on(raw, soon)
        self.clear = clear
        self._ragged_ends = ragged_ends
        self.established = False
        _hear_sni(context)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.object = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname)
        bare = getattr(self.object, "_sslobj", self.object)  # the methods under those of SSLObject, which only call them
        self._take_in: Callable[[bytes], int] = self._incoming.write
        self._read: Callable[[int], bytes] = bare.read
        self._write: Callable[[Any], int] = bare.write
        #: Bytes in their encrypted form that the kernel has not taken, and how many bytes of the outbox they stand for; and how
        #: many of the outbox are gone without its having been told.
        self._left: bytes | memoryview = b""
        self._encrypted = 0
        self._gone = 0
        #: Whether there is something to read of which the kernel knows nothing: what was read too early, what the handshake
        #: left, and the end, or an error, behind all that: then `_ready` is true.
        self._early: list[bytes] = []
        self._late: bytes | OSError | None = None
        #: Bytes of `_left` that TLS itself had to say.
        self._own = 0
        self._said_goodbye = False
        #: Whether no part of a record has been read already, so that what comes next is no longer than what is received.
        self._whole = False
        #: Whether the latest long receive brought little but what is for TLS itself.
        self._poor = False
        #: Whether it is none of that: nothing is kept, no part of a record is inside, and no long receive was poor.
        self._tidy = False
        #: Bytes around the content of a record; -1 if they are not always as many, or not known.
        self._overhead = -1

    def stand_on(self, raw: Any, soon: Callable[..., Any]) -> None:
        """Speak over these ports."""
        self.raw = raw
        self._raw_recv, self._raw_send = raw[:2]
        self._soon = soon
        self._be_ready(self._ready)

    # ---- the handshake

    def feed(self, data: bytes) -> None:
        """Take in bytes that were received before this filter was there: they belong to the handshake."""
        self._incoming.write(data)

    def shake_hands(self) -> Any:
        """Go on with the handshake, as far as what has come allows.

        Returns:
            None when it is done; else the watcher of the socket to wait for before the next call.

        Raises:
            OSError: it has failed: an ssl.SSLError, or what the socket said.
        """
        receives = 0
        while self._push():
            if self.established:
                return None
            try:
                self.object.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                self._send_own()  # the alert that tells the peer why
                raise
            else:
                self.established = True
                self._overhead = _overhead(self.object)
                if self._incoming.pending:
                    self._be_ready()
            if self._outgoing.pending:
                self._left = self._outgoing.read()
                continue
            if self.established:
                return None
            receives += 1
            if receives > RECEIVES_AT_ONCE:
                return self.raw[2]  # there is more, but the others get their turn
            try:
                data = self._raw_recv(RECORD)
            except BlockingIOError:
                return self.raw[2]
            if not data:
                raise ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "the peer ended the connection during the TLS handshake")
            self._take_in(data)
        return self.raw[3]

    def recv_nothing(self, size: int) -> bytes:
        """The ``recv`` of a stream until the handshake is done."""
        raise BlockingIOError(errno.EAGAIN, "the TLS handshake is not done yet")

    def send_clear(self, data: bytes | memoryview) -> int:
        """The ``send`` of a stream until the handshake is done: what was written before ``startSSL`` goes out as it is."""
        if not self.clear:
            raise BlockingIOError(errno.EAGAIN, "the TLS handshake is not done yet")
        sent: int = self._raw_send(memoryview(data)[: self.clear])
        self.clear -= sent
        return sent

    # ---- reading

    def recv(self, size: int) -> bytes:
        """Receive, and return everything that can be decrypted.

        Returns:
            bytes: as many as `size`, or some more, if there may be others to receive; fewer if there are none; empty when the
            peer has said goodbye.

        Raises:
            BlockingIOError: nothing has come, or no whole record.
            OSError: an ssl.SSLError, of which SSLEOFError is an end without goodbye; or what the socket said.
        """
        if not self._tidy:
            return self._recv_any(size)
        # Mostly one record comes, and nothing else. To know that without asking the BIO is 1 % of a round trip's instructions.
        raw = self._raw_recv(size + (size >> 3) + 64)  # what is encrypted is longer
        if not raw:
            return self._truncated()
        self._take_in(raw)
        try:
            data = self._read(len(raw))  # not more: to allocate 16 KiB, for this and for what is received, costs 5 %
        except ssl.SSLError as error:
            self._not_read(error)
            data = b""
        else:
            if len(raw) - len(data) == self._overhead:
                return data
            if not data:
                self._late = b""
        return self._recv_on(size, raw, [data] if data else [])

    def _recv_any(self, size: int) -> bytes:
        """Do what ``recv`` does, in whatever state this is."""
        if self._ready:
            data = self._recv_ready()
            if data is not None:
                return data
        # Who sends little else than what is for TLS itself gets no long turns for that.
        raw = self._raw_recv(RECORD if self._poor else size + (size >> 3) + 64)
        if not raw:
            return self._truncated()
        self._take_in(raw)
        return self._recv_on(size, raw, [])

    def _recv_on(self, size: int, raw: bytes, pieces: list[bytes]) -> bytes:
        """Go on after the first receive, which brought `raw`, of which `pieces` have been read."""
        wanted = RECORD if self._poor else size + (size >> 3) + 64
        total = sum(map(len, pieces))
        came = len(raw)
        while True:
            total += self._decrypt(pieces)
            self._poor = came >= RECORD and total < came >> 3
            if len(raw) < wanted or total >= size or self._late is not None or self._poor:
                break
            try:
                raw = self._raw_recv(wanted)
            except BlockingIOError:
                break
            except OSError as error:
                self._late = error.with_traceback(None)  # behind what came before
                break
            if not raw:
                break  # it is there once more next time
            self._take_in(raw)
            came += len(raw)
        self._tidy = self._whole and not self._poor and not self._ready and self._late is None
        if self._outgoing.pending:
            self._send_own()
        if self._late is not None:
            self._be_ready()  # to tell it again, or first of all
            if not pieces:
                return self._end()
        if not pieces:
            raise BlockingIOError(errno.EAGAIN, "no whole TLS record has come yet")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _decrypt(self, pieces: list[bytes]) -> int:
        """Read out all whole records; return how many bytes they had."""
        read = self._read
        incoming = self._incoming
        total = 0
        try:
            while incoming.pending and self._late is None:
                data = read(RECORD)
                total += len(data)
                if data:
                    pieces.append(data)
                    self._whole = True
                else:
                    self._late = b""
        except ssl.SSLError as error:
            self._not_read(error)
        return total

    def _not_read(self, error: ssl.SSLError) -> None:
        self._tidy = False
        if isinstance(error, ssl.SSLWantReadError):
            self._whole = False  # the beginning of a record is inside now
        elif isinstance(error, ssl.SSLZeroReturnError):
            self._late = b""
        else:
            self._late = error.with_traceback(None)

    def _recv_ready(self) -> bytes | None:
        """Return what was kept, or came with the handshake; None if that is no whole record."""
        if self._late is None:
            self._decrypt(self._early)
            if self._outgoing.pending:
                self._send_own()
        if self._early:
            data = b"".join(self._early)
            self._early.clear()
            if self._late is None:
                self._be_ready(False)
            return data
        if self._late is not None:
            return self._end()
        self._be_ready(False)
        return None

    def _end(self) -> bytes:
        if isinstance(self._late, OSError):
            raise copy.copy(self._late)  # the one that is kept would keep the frames that it goes through
        return b""

    def _truncated(self) -> bytes:
        if self._ragged_ends:
            return b""
        raise ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "the peer ended the connection without a TLS goodbye: something may be missing")

    def unread(self, data: bytes) -> None:
        """Put back what ``recv`` has returned last."""
        self._early.insert(0, data)
        self._be_ready()

    def _be_ready(self, ready: bool = True) -> None:
        self._ready = ready
        self._tidy = False
        self.reader = Immediate(self.raw[2], self._soon) if ready else self.raw[2]
        if self.owner is not None:
            self.owner._reader = self.reader

    # ---- writing

    def send(self, data: bytes | memoryview) -> int:
        """Encrypt and send.

        Returns:
            how many bytes of `data` the kernel has taken, more or less: what is encrypted and waits for room counts in
            proportion, and the last byte only when all is gone. The next call has to go on with the rest.
        """
        done = 0
        if self._left or self._gone:
            done, self._gone = self._gone, 0
            if self._left:
                done += self._go_on()
            if self._left:
                return done
        else:
            size = len(data)
            if size <= PIECE:
                self._write(data)
                wire = self._outgoing.read()
                try:
                    sent = self._raw_send(wire)
                except BlockingIOError:
                    sent = 0
                if sent == len(wire):
                    return size
                self._left, self._encrypted = memoryview(wire), size
                return self._taken(sent)
        view = memoryview(data)
        while done < len(view) and done < BURST:
            piece = view[done : done + PIECE]
            self._write(piece)
            self._left, self._encrypted = self._outgoing.read(), len(piece)
            done += self._go_on()
            if self._left:
                break
        return done

    def tell_again(self, count: int) -> None:
        """Have the next ``send``, which goes on with the same bytes, tell once more that `count` of them are gone."""
        self._gone += count

    def forget_outbox(self) -> None:
        """Another outbox begins: what is encrypted goes out before it, and stands for nothing in it."""
        self._encrypted = self._gone = 0

    def _go_on(self) -> int:
        """Send what is encrypted; return how many bytes of the outbox are gone with it."""
        try:
            return self._taken(self._raw_send(self._left))
        except BlockingIOError:
            return 0

    def _taken(self, sent: int) -> int:
        left = self._left
        told = self._encrypted * sent // len(left)
        self._encrypted -= told
        if sent < len(left):
            self._left = memoryview(left)[sent:]
        else:
            self._left = b""
            self._own = 0
        return told

    def _push(self) -> bool:
        """Send what is encrypted, outside of ``send``; tell whether all of it is gone."""
        while self._left:
            before = len(self._left)
            self._gone += self._go_on()
            if len(self._left) == before:
                return False
        return True

    def _send_own(self) -> None:
        """Send what TLS itself has to say; if the kernel takes none of it, it goes before the next data."""
        own = self._outgoing.read()
        self._own += len(own)
        self._left = bytes(self._left) + own
        try:
            self._push()
        except OSError:
            pass  # those who read or write will see it
        if self._left and self._own > OWN_MOST and self._late is None:
            self._late = ssl.SSLError(ssl.SSL_ERROR_SSL, "the peer asks for new keys again and again, and does not read the answers")

    def goodbye(self) -> bool:
        """Say that nothing more will be sent (close_notify), if that has not been said; all data has been sent.

        Returns:
            whether the kernel has taken it. If not, call again when there is room.
        """
        if not self._said_goodbye:
            self._said_goodbye = True
            if not self.established:
                return True
            if self._ready and self._late is None:
                self._decrypt(self._early)
            try:
                self.object.unwrap()
            except (ssl.SSLError, ValueError):
                pass  # the peer has not said its own goodbye yet
            self._left = bytes(self._left) + self._outgoing.read()
        try:
            return self._push()
        except OSError:
            return True  # there is nobody to say it to


def _overhead(connection: ssl.SSLObject) -> int:
    """Return how many bytes every record has beside its content, if that can be told.

    *Source*: RFC 8446 section 5.2 (header, type and tag), RFC 5288 section 3 (header, nonce and tag), RFC 7905 section 2.
    """
    name, _, _ = connection.cipher() or ("", "", 0)
    if "CCM" in name:
        return -1
    if connection.version() == "TLSv1.3":
        return 5 + 1 + 16
    if "CHACHA20" in name:
        return 5 + 16
    return 5 + 8 + 16 if "GCM" in name else -1


def _hear_sni(context: ssl.SSLContext) -> None:
    """Have the SNI callback of a gevent context called for memory BIOs, too; no effect on others.

    gevent wraps the callback, and its wrapper knows only gevent's own sockets. So it is set once more, in the class below.
    """
    for base in type(context).__mro__:
        if base.__module__ == "_ssl":
            below = vars(base)["sni_callback"]
            wrapped = below.__get__(context)
            if hasattr(wrapped, "user_function") and not hasattr(wrapped, "called_by_all"):
                kind: Any = _called_by_all(type(wrapped))  # type: ignore[arg-type]
                below.__set__(context, kind(wrapped.user_function))
            return


@functools.cache
def _called_by_all(wrapper: Any) -> Any:
    """Return a subclass of gevent's wrapper, for gevent's getter to unwrap, that can be called for memory BIOs too."""

    class SNICallback(wrapper):  # type: ignore[misc]
        __slots__ = ()

        called_by_all = True

        def __call__(self, connection: Any, *args: Any) -> Any:
            socket = getattr(connection, "_sslsock", None)
            return self.user_function(connection if socket is None else socket(), *args)

    return SNICallback
