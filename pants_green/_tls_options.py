"""What may be given to ``startSSL``: checked, and made into a context. What is done with one is in ``_tls``."""

import functools
import os
import ssl
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pants_green._settings import seconds

__all__ = ["TLSOptions", "expires", "stamp"]

#: What a context of the caller's leaves to be said.
BESIDE_CONTEXT = frozenset(
    {"context", "server_hostname", "handshake_timeout", "server_side", "do_handshake_on_connect", "suppress_ragged_eofs"}
)

KNOWN = BESIDE_CONTEXT | {
    "certfile",
    "keyfile",
    "password",
    "ca_certs",
    "cert_reqs",
    "check_hostname",
    "ciphers",
    "ssl_version",
    "alpn_protocols",
    "sni",
}

#: What an entry of `sni` may say: the rest is settled before the client's name is known.
KNOWN_TO_SNI = frozenset({"context", "certfile", "keyfile", "password", "ciphers", "alpn_protocols"})

#: The protocols of ``ssl.wrap_socket`` that stand for "the best that both sides know".
BEST = ("PROTOCOL_TLS", "PROTOCOL_SSLv23", "PROTOCOL_TLS_CLIENT", "PROTOCOL_TLS_SERVER")


class TLSOptions:
    """The options of ``startSSL``, checked; they are never changed, and neither is a context of the caller's.

    Args:
        call: what was called, and on what, for errors.
        options: a dict of options, an SSLContext, or None: no options.
        server_side: which part to play if the options do not say so.
        may_choose: whether the options may say otherwise.

    Attributes:
        context: the SSLContext.
        server_side: which part to play.
        suppress_ragged_eofs: whether an end without TLS' goodbye is one, too.
        server_hostname: for a client, the name to ask for, and to find in the certificate; None: the host that was dialled.
        handshake_timeout: seconds; missing if it was not given.
        has_certificate: whether there is a certificate, as far as one can tell.
        stamps: of each file that was read, what `stamp` said just before.
        certificates: the files of the own certificates.

    Raises:
        TypeError: `options` is neither dict nor SSLContext, an option is unknown or of the wrong type.
        ValueError: an option makes no sense, or not together with another.
        OSError: a file cannot be read; an ssl.SSLError if it does not hold what it should.
    """

    __slots__ = (
        "_call",
        "_options",
        "certificates",
        "context",
        "handshake_timeout",
        "has_certificate",
        "server_hostname",
        "server_side",
        "stamps",
        "suppress_ragged_eofs",
    )

    def __init__(self, call: str, options: Any, *, server_side: bool, may_choose: bool = False) -> None:
        self._call = call
        if options is None:
            options = {}
        elif isinstance(options, ssl.SSLContext) or hasattr(options, "wrap_bio"):
            options = {"context": options}
        elif not isinstance(options, Mapping):
            raise TypeError(f"{call} takes a dict of options or an ssl.SSLContext, not {options!r}")
        self._options = dict(options)
        self.stamps: dict[str, Any] = {}
        self.server_side = self._part(server_side, may_choose)
        self._check_names(self._options, KNOWN, "")
        self.server_hostname = self._hostname()
        self.suppress_ragged_eofs = self._truth("suppress_ragged_eofs")
        if "handshake_timeout" in self._options:
            self.handshake_timeout = seconds(f"{call}: handshake_timeout", self._options["handshake_timeout"])
        self.certificates: list[str] = []
        self.has_certificate = False
        self.context: ssl.SSLContext = self._context()

    def again(self, call: str) -> "TLSOptions":
        """Read the files once more.

        Args:
            call: what was called, for errors.

        Raises:
            OSError, ValueError: as the constructor.
        """
        return TLSOptions(call, self._options, server_side=self.server_side, may_choose=True)

    @property
    def given_context(self) -> bool:
        """Whether the context is the caller's own."""
        return self._options.get("context") is not None

    # ---- checking

    def _check_names(self, options: dict[str, Any], known: frozenset[str], where: str) -> None:
        for name in options:
            if name not in known:
                raise TypeError(f"{self._call}: there is no option {name!r}{where}; there are {', '.join(sorted(known))}")
        context = options.get("context")
        if context is None:
            return
        if not hasattr(context, "wrap_bio"):
            raise TypeError(f"{self._call}: context{where} is an ssl.SSLContext, not {context!r}")
        self._check_part(context, where)
        for name, value in options.items():
            if name not in BESIDE_CONTEXT and value is not None:
                raise ValueError(
                    f"{self._call}: {name}{where} and context do not go together, for a context of yours is never changed; "
                    f"set it up with all it needs, or give the options without it"
                )

    def _check_part(self, context: ssl.SSLContext, where: str) -> None:
        """Refuse a context that was made for the other side, with which every handshake would fail."""
        wrong, purpose = (ssl.PROTOCOL_TLS_CLIENT, "CLIENT_AUTH") if self.server_side else (ssl.PROTOCOL_TLS_SERVER, "SERVER_AUTH")
        if context.protocol == wrong:
            side = "server" if self.server_side else "client"
            hint = f"make one with ssl.create_default_context(ssl.Purpose.{purpose})"
            raise ValueError(f"{self._call}: context{where} is for the other side, and this is the {side}'s; {hint}")

    def _part(self, server_side: bool, may_choose: bool) -> bool:
        wanted = self._options.get("server_side", server_side)
        if wanted is not True and (wanted is not False or not may_choose):
            choice = "be True or False" if may_choose else "only be True on a server"
            raise ValueError(f"{self._call}: server_side can {choice}, not {wanted!r}; leave it out")
        if self._options.get("do_handshake_on_connect", False) is not False:
            raise ValueError(f"{self._call}: do_handshake_on_connect can only be False, for the handshake never blocks here; leave it out")
        return bool(wanted)

    def _truth(self, name: str) -> bool:
        value = self._options.get(name, False)
        if not isinstance(value, bool):
            raise TypeError(f"{self._call}: {name} is True or False, not {value!r}")
        return value

    def _hostname(self) -> str | None:
        name = self._options.get("server_hostname")
        if name is None:
            return None
        if self.server_side:
            raise ValueError(f"{self._call}: server_hostname is the client's to say; leave it out on a server")
        if not isinstance(name, str):
            raise TypeError(f"{self._call}: server_hostname is a str, not {name!r}")
        try:
            name.encode("idna")
            fit = bool(name.rstrip(".")) and "\0" not in name
        except UnicodeError:
            fit = False
        if not fit:
            raise ValueError(f"{self._call}: server_hostname is the name of a host, not {name!r}")
        return name

    # ---- making contexts

    def _context(self) -> ssl.SSLContext:
        options = self._options
        context: ssl.SSLContext | None = options.get("context")
        if context is not None:
            self.has_certificate = True  # as far as one can tell
            return context
        if not self.server_side and all(value is None for name, value in options.items() if name not in BESIDE_CONTEXT):
            return _default_client_context(ssl.SSLContext)
        context = self._fresh_context()
        self._limit_version(context)
        self._verify(context)
        self._load(context, options, "")
        if options.get("sni") is not None:
            if not self.server_side:
                raise ValueError(f"{self._call}: sni is for servers, which have several certificates; a client gives server_hostname")
            self._by_name(context, options["sni"])
        return context

    def _fresh_context(self) -> ssl.SSLContext:
        if self.server_side:
            return _default_context(ssl.Purpose.CLIENT_AUTH)
        authorities = self._options.get("ca_certs")
        if authorities is None:
            return _default_context(ssl.Purpose.SERVER_AUTH)
        made: ssl.SSLContext = self._reading(authorities, _default_context, ssl.Purpose.SERVER_AUTH, cafile=authorities)
        return made

    def _limit_version(self, context: ssl.SSLContext) -> None:
        version = self._options.get("ssl_version")
        if version is None or any(version == getattr(ssl, name, None) for name in BEST):
            return
        if version in (ssl.PROTOCOL_TLSv1_2, ssl.TLSVersion.TLSv1_2):
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        elif version == ssl.TLSVersion.TLSv1_3:
            context.minimum_version = ssl.TLSVersion.TLSv1_3
        else:
            hint = "leave it out for the best that both sides know"
            raise ValueError(f"{self._call}: ssl_version is TLS 1.2 or newer, not {version!r}; {hint}")

    def _verify(self, context: ssl.SSLContext) -> None:
        """Say whose certificates the peer may show."""
        needed, authorities, check = (self._options.get(name) for name in ("cert_reqs", "ca_certs", "check_hostname"))
        if check is not None:
            if self.server_side:
                raise ValueError(f"{self._call}: check_hostname is for clients; a server checks who signed, by ca_certs and cert_reqs")
            if not isinstance(check, bool):
                raise TypeError(f"{self._call}: check_hostname is True or False, not {check!r}")
        if needed is not None:
            try:
                needed = ssl.VerifyMode(needed)
            except ValueError:
                hint = "ssl.CERT_NONE, CERT_OPTIONAL and CERT_REQUIRED"
                raise ValueError(f"{self._call}: cert_reqs is one of {hint}, not {needed!r}") from None
            if needed == ssl.CERT_NONE and not self.server_side:
                if check:
                    raise ValueError(f"{self._call}: check_hostname needs a certificate to check; do not set cert_reqs to CERT_NONE")
                check = False
        if check is not None:
            context.check_hostname = check
        if needed is not None:
            context.verify_mode = needed
        if self.server_side:
            if authorities is not None:
                self._reading(authorities, context.load_verify_locations, authorities)
            elif needed is not None and needed != ssl.CERT_NONE:
                raise ValueError(f"{self._call}: cert_reqs asks clients for a certificate; give ca_certs, by whom it has to be signed")

    def _load(self, context: ssl.SSLContext, options: dict[str, Any], where: str) -> None:
        """Load a certificate and all else that may differ from name to name."""
        certificate, key, password = (options.get(name) for name in ("certfile", "keyfile", "password"))
        if password is not None and not isinstance(password, (str, bytes, bytearray)) and not callable(password):
            raise TypeError(f"{self._call}: password{where} is str, bytes or a function that returns one, not {password!r}")
        if certificate is not None:
            self._reading(certificate, context.load_cert_chain, certificate, key, password, also=key)
            self.certificates.append(os.fsdecode(certificate))
            self.has_certificate = True
        elif key is not None or password is not None:
            raise ValueError(f"{self._call}: keyfile and password{where} are of no use without certfile")
        if options.get("ciphers") is not None:
            if not isinstance(options["ciphers"], str):
                raise TypeError(f"{self._call}: ciphers{where} is a str, as openssl's, not {options['ciphers']!r}")
            try:
                context.set_ciphers(options["ciphers"])
            except ssl.SSLError as error:
                raise ValueError(f"{self._call}: ciphers{where}, {options['ciphers']!r}: {error}") from error
        protocols = options.get("alpn_protocols")
        if protocols is not None:
            several = isinstance(protocols, Iterable) and not isinstance(protocols, (str, bytes))
            if not several or not all(isinstance(one, str) for one in protocols):
                raise TypeError(f"{self._call}: alpn_protocols{where} is a list of str, such as ['h2', 'http/1.1'], not {protocols!r}")
            try:
                context.set_alpn_protocols(list(protocols))
            except (ssl.SSLError, UnicodeEncodeError) as error:
                raise ValueError(f"{self._call}: alpn_protocols{where}, {protocols!r}: {error}") from error

    def _reading(self, path: Any, load: Callable[..., Any], *args: Any, also: Any = None, **kwargs: Any) -> Any:
        for one in (path, also):
            if one is not None:
                if not isinstance(one, (str, bytes, os.PathLike)) or "\0" in os.fsdecode(one):
                    raise TypeError(f"{self._call}: {one!r} is not the path of a file; certfile, keyfile and ca_certs are")
                self.stamps[os.fsdecode(one)] = stamp(os.fsdecode(one))
        try:
            return load(*args, **kwargs)
        except ssl.SSLError as error:
            files = f"{path!r} does" if also is None else f"{path!r} and {also!r} do"
            hint = "PEM, with its key or beside keyfile" if also is None else "PEM, and a key that fits"
            text = f"{self._call}: {files} not hold what is needed ({hint}): {error}"
            raise type(error)(error.errno, text) from error
        except OSError as error:
            files = f"{path!r}" if also is None else f"{path!r} or {also!r}"
            raise type(error)(error.errno, f"{self._call}: cannot read {files}: {error.strerror}") from error

    # ---- several certificates

    def _by_name(self, context: ssl.SSLContext, entries: Any) -> None:
        if not isinstance(entries, Mapping):
            raise TypeError(f"{self._call}: sni is a dict of names and their options, not {entries!r}")
        contexts: dict[str, ssl.SSLContext] = {}
        for name, options in entries.items():
            key = self._key(name)
            contexts[key] = self._entry(context, name, options)

        def choose(connection: Any, name: str | None, current: ssl.SSLContext) -> None:
            if name is not None:
                name = name.rstrip(".").lower()
                found = contexts.get(name) or contexts.get("*." + name.partition(".")[2])
                if found is not None:
                    connection.context = found

        context.sni_callback = choose
        self.has_certificate = True

    def _key(self, name: Any) -> str:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{self._call}: the keys of sni are names of hosts, such as 'www.example.org' or '*.example.org', not {name!r}")
        try:
            star, bare = ("*.", name[2:]) if name.startswith("*.") else ("", name)
            key = bare.rstrip(".").encode("idna").decode().lower()
        except UnicodeError:
            key = ""
        if not key or "*" in key or key.replace(".", "").isdigit() or ":" in key:
            hint = "'www.example.org' and '*.example.org' are; for all others there is the server's own certfile"
            raise ValueError(f"{self._call}: {name!r} in sni is not the name of a host: {hint}")
        return star + key

    def _entry(self, context: ssl.SSLContext, host: str, options: Any) -> ssl.SSLContext:
        """Return the context for one name."""
        where = f" of sni[{host!r}]"
        if hasattr(options, "wrap_bio"):
            options = {"context": options}
        elif not isinstance(options, Mapping):
            raise TypeError(f"{self._call}: sni[{host!r}] is a dict of options or an ssl.SSLContext, not {options!r}")
        options = dict(options)
        self._check_names(options, KNOWN_TO_SNI, where)
        given: ssl.SSLContext | None = options.get("context")
        if given is not None:
            for name in ("verify_mode", "minimum_version", "maximum_version"):
                if getattr(given, name) != getattr(context, name):
                    hint = "say cert_reqs, ca_certs and ssl_version beside sni"
                    raise ValueError(
                        f"{self._call}: {name}{where} differs from the server's own, which is settled before the name is known; {hint}"
                    )
            return given
        if options.get("certfile") is None:
            raise ValueError(f"{self._call}: sni[{host!r}] needs a certificate; give its certfile")
        own = self._fresh_context()
        self._limit_version(own)
        self._verify(own)
        inherited = {key: self._options[key] for key in ("ciphers", "alpn_protocols") if key in self._options}
        self._load(own, {**inherited, **options}, where)
        return own


def _default_context(purpose: ssl.Purpose, cafile: Any = None) -> ssl.SSLContext:
    # By way of the module: in a patched process that makes one of gevent's, whose attributes can be set.
    context = ssl.create_default_context(purpose, cafile=cafile)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    return context


@functools.cache
def _default_client_context(kind: type) -> ssl.SSLContext:
    """Return the context of all clients that say nothing: to load the system's authorities takes 20 ms.

    Args:
        kind: ssl.SSLContext, which is another one once gevent has patched it.
    """
    return _default_context(ssl.Purpose.SERVER_AUTH)


def stamp(path: str) -> Any:
    """Return what tells whether a file has been changed."""
    try:
        status = os.stat(path)
    except OSError as error:
        return error.errno
    return status.st_mtime_ns, status.st_ino, status.st_size


def expires(path: str) -> float | None:
    """Return when the first certificate in a file ends, in seconds since the epoch; None if that cannot be told."""
    try:
        decode = ssl._ssl._test_decode_cert  # type: ignore[attr-defined]
        return float(ssl.cert_time_to_seconds(decode(path)["notAfter"]))
    except (AttributeError, KeyError, OSError, ValueError):
        return None
