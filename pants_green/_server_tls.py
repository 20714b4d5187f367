"""The TLS of a server: its certificates, and the handshake of what it accepts, before anybody hears of that.

Accepting is in ``server``, the handshake itself in ``_greeting``; what options there are, in ``_tls_options``.
"""

import contextlib
import errno
import logging
from collections.abc import Iterator
from typing import Any, Self

from pants_green import _sockets
from pants_green._address import format_address
from pants_green._certificates import EXPIRY_WARNING, CertificateWatch
from pants_green._greeting import Greeting
from pants_green._lifecycle import CLOSED, LISTENING, STOPPING
from pants_green._reports import Reports
from pants_green._settings import Setting, seconds
from pants_green._tls import Filter, TLSTruncated
from pants_green._tls_options import TLSOptions
from pants_green._tls_socket import TLSSocket
from pants_green.channel import TLS_LOGGER, Channel
from pants_green.errors import ChannelStateError, HandshakeTimeout

__all__ = ["ServerTLS", "silence"]

#: Failed handshakes of which an overridden ``on_ssl_wrap_error`` may be told later; their sockets are open until then.
TELL_MOST = 100


def silence(sock: Any) -> None:
    """In a forked child: see that a socket of the parent's says no goodbye when it is closed here."""
    if isinstance(sock, TLSSocket):
        sock._tls = None


class ServerTLS(Channel):
    """The part of a server that has to do with TLS. Not made by itself."""

    __slots__ = ("_greetings", "_handshake_timeout", "_tls_options", "_to_be_told", "_watch")

    #: Seconds that the TLS handshake of an accepted connection may take; None: no limit.
    handshake_timeout: Setting[float | None] = Setting(10.0, seconds)

    _reports: Reports

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._handshake_timeout = type(self).handshake_timeout
        self._tls_options: TLSOptions | None = None
        self._greetings: set[Greeting] = set()
        self._watch: CertificateWatch | None = None
        self._to_be_told = 0

    def startSSL(self, ssl_options: Any = None) -> Self:
        """Speak TLS with every connection that is accepted from now on; those that are there stay as they are.

        Args:
            ssl_options: an ssl.SSLContext, or a dict, which is not changed: ``certfile``, ``keyfile``, ``password``; ``ca_certs``
                and ``cert_reqs``, to ask clients for a certificate (CERT_REQUIRED) or to look at one (CERT_OPTIONAL);
                ``ciphers``, ``ssl_version``, ``alpn_protocols`` (a list of str); ``handshake_timeout`` (seconds);
                ``suppress_ragged_eofs`` (True takes an end without TLS' goodbye for one); ``sni``, a dict
                of names (``"www.example.org"``, ``"*.example.org"``) and what of all this is different for a client that asks for
                that name: certificate, ciphers, protocols, or an SSLContext; or ``context``, an SSLContext, in the place of most of
                these. Both sides speak TLS 1.2 or newer.

        Returns:
            the server itself.

        Raises:
            ChannelStateError: (RuntimeError) it speaks TLS already, or is closed.
            TypeError, ValueError: an option is unknown, or makes no sense; there is no certificate (if it does not listen yet,
                ``listen()`` says so).
            OSError: a file cannot be read; an ssl.SSLError if it does not hold what it should.
        """
        call = f"startSSL() on {self!r}"
        if self._state is CLOSED:
            raise ChannelStateError(f"{call}: a closed server cannot be opened again; make a new one")
        if self._tls_options is not None:
            raise ChannelStateError(f"{call}: it speaks TLS already; reload_certificates() reads its certificates once more")
        options = TLSOptions(call, ssl_options, server_side=True)
        if self._state is LISTENING:
            self._check_certificate("startSSL()", options)
        self._tls_options = options
        return self

    def _check_certificate(self, call: str, options: TLSOptions | None) -> None:
        if options is not None and not options.has_certificate:
            hint = "give startSSL() certfile and keyfile, or context"
            raise ValueError(f"{call} on {self!r}: a server that speaks TLS needs a certificate; {hint}")

    def reload_certificates(self) -> None:
        """Read all files that ``startSSL()`` was given once more, for the connections that are accepted from now on.

        If they are not in order the old ones stay in force, whatever it was.

        Raises:
            ChannelStateError: (RuntimeError) it does not speak TLS, or with a context of yours: call the context's own
                ``load_cert_chain()``, which takes effect with the next handshake.
            OSError, ValueError: as ``startSSL()``.
        """
        call = f"reload_certificates() on {self!r}"
        if self._tls_options is None:
            raise ChannelStateError(f"{call}: it does not speak TLS; call startSSL() before")
        if self._tls_options.given_context:
            raise ChannelStateError(f"{call}: its context is yours; call load_cert_chain() on that, which holds from the next handshake on")
        self._tls_options = self._tls_options.again(call)
        self._log(logging.INFO, "certificates loaded", event="certificates_loaded", logger=TLS_LOGGER)

    def watch_certificates(self, seconds: float, expiry_warning: float = EXPIRY_WARNING) -> CertificateWatch:
        """Look at the files of the certificates again and again, and load them when they have changed.

        If they are not in order that is logged (ERROR) once, the old ones stay in force, and it is tried again at each look. Before
        a certificate expires that is logged, too (WARNING), once a day.

        Args:
            seconds: how often to look.
            expiry_warning: seconds before a certificate's end from which on to warn; 14 days by default.

        Returns:
            the watch, which has ``cancel()``; it ends with the server.

        Raises:
            ChannelStateError: (RuntimeError) the server does not speak TLS, speaks it with a context of yours, is closed, or is
                watching already.
            TypeError, ValueError: no number of seconds.
        """
        call = f"watch_certificates() on {self!r}"
        if self._tls_options is None or self._tls_options.given_context or self._state is CLOSED:
            hint = "it has to be open, and startSSL() to have been given certfile and keyfile"
            raise ChannelStateError(f"{call}: there are no files to watch; {hint}")
        if self._watch is not None and self._watch.active:
            raise ChannelStateError(f"{call}: it is watching already; cancel() what the first call returned")
        self._watch = CertificateWatch(self, call, seconds, expiry_warning)
        return self._watch

    @property
    def ssl_enabled(self) -> bool:
        """Whether connections that are accepted from now on speak TLS."""
        return self._tls_options is not None

    # ---- the handshake

    def _greet(self, worker: Any, accepted: tuple[Any, Any, Any, int]) -> tuple[Any, Any, Any, int] | None:
        """Do the TLS handshake of an accepted connection; return what may be offered now, or None if there is nothing."""
        options = self._tls_options
        assert options is not None
        sock, remote, local, key = accepted
        soon = self._engine._loop.run_callback
        try:
            with self._greeting(sock) as greeting:
                ragged = options.suppress_ragged_eofs
                tls = Filter(options.context, _sockets.ports_of(sock), soon, server_side=True, ragged_ends=ragged)
                greeting.shake_hands(tls, getattr(options, "handshake_timeout", self._handshake_timeout))
        except Exception as error:
            self._not_greeted(sock, remote, error.with_traceback(None))
            return None
        worker.tls = tls
        if self._accept_is_overridden():
            sock = TLSSocket._over(sock, tls, soon)
        return sock, remote, local, key

    @contextlib.contextmanager
    def _greeting(self, sock: Any) -> Iterator[Greeting]:
        """Have a Greeting of which the server knows, and which a kill of its greenlet leaves nothing of."""
        greeting = Greeting(self._engine, sock)
        self._greetings.add(greeting)
        if self._state is STOPPING:
            greeting.hurry()
        try:
            yield greeting
        except Exception:
            raise
        except BaseException:
            sock.close()
            raise
        finally:
            self._greetings.discard(greeting)

    def _not_greeted(self, sock: Any, remote: Any, error: Exception) -> None:
        """The handshake failed: it costs that socket and nothing else."""
        if self._state is CLOSED:
            sock.close()
        elif self._overrides("on_ssl_wrap_error", ServerTLS) and self._to_be_told < TELL_MOST:
            self._to_be_told += 1
            self._post("_tell_not_greeted", sock, remote, error)
        else:
            ServerTLS.on_ssl_wrap_error(self, sock, remote, error)

    def _tell_not_greeted(self, sock: Any, remote: Any, error: Exception) -> None:
        """Posted: tell an overridden on_ssl_wrap_error."""
        self._to_be_told -= 1
        try:
            if self._state is CLOSED:
                return
            self._call("on_ssl_wrap_error", sock, remote, error)
        finally:
            sock.close()

    def _accept_is_overridden(self) -> bool:
        """Tell whether somebody wants to see the accepted socket, who has to get one that knows of TLS."""
        raise NotImplementedError

    def _end_greetings(self) -> None:
        """The server is closed: nobody waits for those that are not through with the handshake."""
        for greeting in self._greetings:
            greeting.cut(ConnectionAbortedError(errno.ECONNABORTED, "the server was closed before the connection had begun"))
        if self._watch is not None:
            self._watch.cancel()

    def _after_fork(self) -> None:
        for greeting in self._greetings:
            greeting.forsake()
        self._greetings.clear()

    # ---- callbacks

    def on_ssl_wrap_error(self, sock: Any, addr: Any, exception: Exception) -> None:
        """The TLS handshake of a new connection failed; by default that is logged, and costs that connection only.

        *When*: instead of ``on_accept``; not once the server is closed. While 100 of them wait to be told, others are only logged.
        *Runs in*: a greenlet of the server's own.
        *Socket*: `sock` is open; it is closed afterwards.

        Args:
            sock: a gevent socket under TLS: what it sends goes out in clear text.
            addr: the peer's address.
            exception: an ssl.SSLError, HandshakeTimeout, or what the socket said.
        """
        # A FIN in the handshake is what tools send that only look whether somebody listens.
        left = isinstance(exception, TLSTruncated) or (isinstance(exception, OSError) and exception.errno in _sockets.PEER_LEFT)
        level = logging.DEBUG if left else logging.WARNING
        message = "the TLS handshake with %s failed: %s"
        limit: tuple[str, Any] = "TLS handshake", "failed"
        if isinstance(exception, HandshakeTimeout):
            limit = "handshake_timeout", getattr(self._tls_options, "handshake_timeout", self._handshake_timeout)
        args = format_address(addr), exception
        self._reports.tell(*limit, message, *args, level=level, event="handshake_error", logger=TLS_LOGGER)
        sock.close()
