"""The TLS of a stream: how it begins, before the first byte or after some, and the handshake.

Runs in the stream's own greenlet and waits only in its own waits, so that ``close()`` ends it at once. What TLS does with the
bytes is in ``_tls``; the handshake of a server that speaks TLS from the start is over before there is a stream: see ``_greeting``.
"""

from typing import TYPE_CHECKING, Any

from pants_green._delimiters import Incremental
from pants_green._files import FileSender
from pants_green._lifecycle import CLOSED, CONNECTING, NEW, OPEN, READ_ONLY, CloseReason
from pants_green._meter import Meter
from pants_green._stream_state import INTERRUPTED
from pants_green._tls import DORMANT, Filter
from pants_green._tls_options import TLSOptions
from pants_green.errors import ChannelStateError, HandshakeTimeout

if TYPE_CHECKING:
    from pants_green.stream import Stream

__all__ = ["begin", "overdue", "put_meter", "shake_hands", "stand_on"]


def begin(stream: "Stream[...]", options: Any) -> None:
    """Have a stream speak TLS: see `Stream.startSSL`."""
    call = f"startSSL() on {stream!r}"
    if stream._secure:
        raise ChannelStateError(f"{call}: it speaks TLS already")
    if stream._state not in (NEW, CONNECTING, OPEN):
        raise ChannelStateError(f"{call}: TLS needs both directions; make a new stream, or call it before one of them ends")
    checked = TLSOptions(call, options, server_side=stream._server is not None, may_choose=True)
    if checked.server_side and not checked.has_certificate:
        raise ValueError(f"{call}: the server's side needs a certificate; give certfile and keyfile, or context")
    if stream._state is OPEN:
        _over_live_stream(stream, checked)
    stream._tls_options = checked
    stream._secure = stream._shaking = True


def _over_live_stream(stream: "Stream[...]", options: TLSOptions) -> None:
    """From here on everything that comes belongs to TLS, and what was not written yet, too.

    What came behind the chunk that asked for TLS is none of the user's: it goes to the handshake, which plain text fails.
    """
    stream._tls = _filter(stream, options, clear=stream._pending)
    inbox = stream._inbox
    if inbox.batch is not None:
        inbox.put_back(stream._framer)
    if inbox.data:
        stream._tls.feed(inbox.take_all())
    if isinstance(stream._framer, Incremental):
        stream._framer = stream._framer.fresh()  # what it knows of the encoding came in clear
    stream._decoder = None
    if stream._limits is not None:
        stream._limits.end("read")
    if stream._sending:
        stream._sending = False
        stream._writer.stop()
    stream._recv, stream._writer = stream._tls.recv_nothing, DORMANT
    stream._secure = True
    stream._send_by(stream._tls.send_clear)
    stream._interrupt()


def _filter(stream: "Stream[...]", options: TLSOptions, clear: int = 0) -> Filter:
    hostname = None
    if not options.server_side:
        hostname = options.server_hostname or _dialled_host(stream)
        if hostname is not None:
            hostname = hostname.rstrip(".")  # the root of all names, which no certificate knows
        if hostname is None and options.context.check_hostname:
            hint = "give server_hostname, for no host was dialled; or server_side=True, if this is the server's side"
            raise ValueError(f"startSSL() on {stream!r}: whose certificate is it to be? {hint}")
    send = stream._send.send if isinstance(stream._send, FileSender) else stream._send
    raw = (stream._recv, send, stream._reader, stream._writer)
    soon = stream._engine._loop.run_callback
    return Filter(
        options.context,
        raw,
        soon,
        server_side=options.server_side,
        server_hostname=hostname,
        clear=clear,
        ragged_ends=options.suppress_ragged_eofs,
    )


def _dialled_host(stream: "Stream[...]") -> str | None:
    """Return the name, or the address, that ``connect()`` was given; None for a Unix socket, or one that was connected before."""
    host = stream._host
    if host is None and stream._key is None and isinstance(stream._remote, tuple):
        host = stream._remote[0]
    return host.partition("%")[0] if host else None


def shake_hands(stream: "Stream[...]", alarm: Any = None) -> None:
    """Do the handshake that is due. When this returns it is done, or the stream is closed, or the time of `alarm` is up.

    What is posted meanwhile waits.

    Args:
        alarm: something whose `rang` ends the wait; it has to alert the stream.
    """
    tls = stream._tls
    try:
        if tls is None:
            assert stream._tls_options is not None
            tls = stream._tls = _filter(stream, stream._tls_options)
        _send_what_is_clear(stream, tls, alarm)
        done = _limited_handshake(stream, tls, alarm)
    except (OSError, ValueError) as error:
        _failed(stream, error)
        return
    if done and stream._state is not CLOSED:
        _established(stream, tls)


def _send_what_is_clear(stream: "Stream[...]", tls: Filter, alarm: Any) -> None:
    while tls.clear and stream._state is not CLOSED:
        stream._sending = False
        stream._flush()
        if not tls.clear or stream._state is CLOSED or (alarm and alarm.rang):
            break
        stream._wait(tls.raw[3])


def _limited_handshake(stream: "Stream[...]", tls: Filter, alarm: Any) -> bool:
    """Tell whether it is done, and all that it says is sent."""
    if tls.clear:
        return False
    seconds = _limit_of(stream)
    if seconds is not None and not (stream._limits is not None and stream._limits.runs("handshake")):
        stream._limit("handshake", seconds)
    # An SNI callback of the user's may wait, too, in which nobody wakes this greenlet: so look before each wait.
    while (watcher := tls.shake_hands()) is not None and stream._state is not CLOSED:
        if alarm and alarm.rang:
            return False
        stream._wait(watcher)
        if stream._state is CLOSED:
            return False
    if stream._limits is not None:
        stream._limits.end("handshake")
    return True


def _limit_of(stream: "Stream[...]") -> float | None:
    seconds: float | None = getattr(stream._tls_options, "handshake_timeout", stream._handshake_timeout)
    return seconds


def overdue(stream: "Stream[...]") -> None:
    """Hub: the time for the handshake is up."""
    seconds = _limit_of(stream)
    if stream._shaking and seconds is not None:
        _failed(stream, HandshakeTimeout._after(seconds))


def _failed(stream: "Stream[...]", error: Exception) -> None:
    if stream._state is CLOSED:
        return
    callback = "on_ssl_handshake_error" if isinstance(error, OSError) else "on_ssl_error"
    stream._keep_posted(callback, error.with_traceback(None))
    stream._shut(CloseReason.TLS_FAILED, error)


def _established(stream: "Stream[...]", tls: Filter) -> None:
    stream._shaking = False
    stand_on(stream, tls)
    if stream._state is NEW or stream._state is CONNECTING:
        return  # on_ssl_handshake comes just before on_connect
    stream._keep_posted("on_ssl_handshake")
    stream._attention = INTERRUPTED
    stream._inbox.begin_again(stream._framer, stream._counted)
    stream._sending = False
    if stream._limits is not None:
        stream._limits.end("write")
    if stream._outbox.items:
        stream._flush()
    elif stream._state is READ_ONLY:
        stream._finish_output()


def stand_on(stream: "Stream[...]", tls: Filter) -> None:
    """Put an established filter between a stream and its socket."""
    stream._secure = True
    stream._tls = tls
    if stream._limited and stream._metered and stream._meter is None:
        put_meter(stream)
    tls.owner = stream
    stream._recv, stream._reader, stream._writer = tls.recv, tls.reader, tls.raw[3]
    stream._send_by(tls.send)


def put_meter(stream: "Stream[...]") -> None:
    """Put a meter in front of the socket of a stream, below its TLS."""
    if stream._tls is not None:
        stream._meter = Meter(stream, stream._tls.raw)
        stream._tls.stand_on(stream._meter.ports(), stream._engine._loop.run_callback)
        return
    send = stream._send.send if isinstance(stream._send, FileSender) else stream._send
    stream._meter = Meter(stream, (stream._recv, send, stream._reader, stream._writer))
    stream._recv, send, stream._reader, stream._writer = stream._meter.ports()
    stream._send_by(send)
