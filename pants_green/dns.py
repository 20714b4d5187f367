"""Looking names up without waiting: what is found, or what went wrong, comes to a callback.

The functions named as in ``socket`` ask gevent's resolver, ``query`` asks nameservers itself, by messages of dnspython over channels of
ours. How the resolver is reached is in ``_sockets``; looking up the host of a ``connect()`` is not done here.
"""

import contextvars
import errno
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent

from pants_green import _sockets
from pants_green._address import parse_connect
from pants_green._question import Enough, Nameserver, Question, is_ip_address
from pants_green._timers import Timer
from pants_green.engine import Engine, engine_for

__all__ = ["Lookup", "getaddrinfo", "gethostbyaddr", "gethostbyname", "gethostbyname_ex", "query"]

log = logging.getLogger("pants_green.engine")

#: The port of nameservers.
PORT = 53

HostInfo = tuple[str, list[str], list[str]]
AddressInfo = list[tuple[int, int, int, str, Any]]


class Lookup(Timer):
    """The handle of a lookup: call it, or its ``cancel()``, and the callback will not be called.

    It runs in a greenlet of its own, and so does the callback at its end: in the same one.
    """

    __slots__ = ("_engine", "_forks", "_look_up", "_worker")

    def __init__(self, look_up: Callable[[], Any], callback: Any, timeout: float, engine: Engine) -> None:
        super().__init__(callback, when=engine._clock() + timeout)
        self._look_up: Callable[[], Any] | None = look_up
        self._engine = engine
        self._forks = engine._forks
        self._worker: Any = None  # its greenlet, while that may be interrupted
        # No context is kept: the greenlet has a copy.
        engine._run_soon(Lookup._run, self, contextvars.copy_context())

    def cancel(self) -> None:
        """End the lookup; its callback is not called. Harmless if it was called or the lookup was cancelled before."""
        super().cancel()
        self._look_up = None
        if self._worker is not None:
            self._engine._loop.run_callback(self._interrupt)

    __call__ = cancel

    def _interrupt(self) -> None:
        """Hub: end the wait of the greenlet that looks up."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.throw(Enough)

    def _run(self) -> None:
        """Look up and call back, in a greenlet of its own."""
        look_up, self._look_up = self._look_up, None
        if look_up is None:
            return
        engine = self._engine
        result = failure = None
        alarm = engine._in_hub_after(max(self.when - engine._clock(), 0.0), self._interrupt)
        self._worker = getcurrent()
        try:
            result = look_up()
        except Exception as error:
            failure = error.with_traceback(None)  # whose frames hold this greenlet
        finally:
            self._worker = None
            alarm.cancel()
        callback = self.function
        if callback is None or engine._forks != self._forks:  # in a forked child it is the parent's business
            return
        super().cancel()  # it has had its run
        try:
            callback(result, failure)
        except (KeyboardInterrupt, SystemExit) as error:
            engine._interrupt(error)
        except BaseException as error:
            name = getattr(callback, "__qualname__", repr(callback))
            log.error("%s, called back by a lookup, raised %r", name, error, exc_info=error, extra={"event": "lookup_error"})
        if engine._pollers:
            engine._acted()


# ---- by gevent's resolver


def gethostbyname(
    hostname: str, callback: Callable[[str | None, OSError | None], object], timeout: float = 10.0, *, engine: Any = None
) -> Lookup:
    """Look up the IPv4 address of a host; returns at once.

    This function and the next three are those of ``socket``, asked through gevent's resolver, which by default uses threads of a
    small pool. A lookup that takes long holds up nobody else, but for other lookups if ten of them are under way.

    Args:
        hostname: a name, or an IPv4 address, which is returned as it is.
        callback: ``callback(result, error)``; exactly one of both is None. `result` is what ``socket.gethostbyname`` returns, a
            str; `error` what it raises, a ``socket.gaierror``, or a TimeoutError; always an OSError. It runs later, in a greenlet
            of its own with a copy of the caller's context, and may block. What it raises is logged.
        timeout: seconds after which the callback gets a TimeoutError. The resolver's thread may go on, for it cannot be interrupted.
        engine: the Engine, or the module ``pants_green.engine``; by default this thread's.

    Returns:
        a handle; call it or its ``cancel()``, and the callback is not called.

    Raises:
        TypeError, ValueError: an argument makes no sense, such as a name that cannot be encoded.
    """
    _check_host("gethostbyname", "hostname", hostname)
    return _ask_resolver("gethostbyname", (hostname,), callback, timeout, engine)


def gethostbyname_ex(
    hostname: str, callback: Callable[[HostInfo | None, OSError | None], object], timeout: float = 10.0, *, engine: Any = None
) -> Lookup:
    """Look up the true name, the other names, and the IPv4 addresses of a host; returns at once.

    Args:
        hostname, timeout, engine: as for ``gethostbyname``.
        callback: ``callback(result, error)``, as there; `result` is ``(name, aliases, addresses)``.

    Returns:
        a handle, as there.

    Raises:
        TypeError, ValueError: as there.
    """
    _check_host("gethostbyname_ex", "hostname", hostname)
    return _ask_resolver("gethostbyname_ex", (hostname,), callback, timeout, engine)


def gethostbyaddr(
    ip_address: str, callback: Callable[[HostInfo | None, OSError | None], object], timeout: float = 10.0, *, engine: Any = None
) -> Lookup:
    """Look up the name that belongs to an IPv4 or IPv6 address; returns at once.

    Args:
        ip_address: the address.
        callback: ``callback(result, error)``, as for ``gethostbyname``; `result` is ``(name, aliases, addresses)``, `error` usually
            a ``socket.herror``.
        timeout, engine: as there.

    Returns:
        a handle, as there.

    Raises:
        TypeError, ValueError: as there.
    """
    _check_host("gethostbyaddr", "ip_address", ip_address)
    return _ask_resolver("gethostbyaddr", (ip_address,), callback, timeout, engine)


def getaddrinfo(
    host: str | bytes | None,
    port: int | str | bytes | None,
    callback: Callable[[AddressInfo | None, OSError | None], object],
    family: int = 0,
    type: int = 0,  # noqa: A002, as socket calls it
    proto: int = 0,
    flags: int = 0,
    timeout: float = 10.0,
    *,
    engine: Any = None,
) -> Lookup:
    """Look up everything that a socket needs to be connected to a service; returns at once.

    Args:
        host: a name, an IPv4 or IPv6 address, or None for this machine.
        port: a number, the name of a service such as ``"http"``, or None.
        callback: ``callback(result, error)``, as for ``gethostbyname``; `result` is a list of
            ``(family, type, proto, canonname, sockaddr)``.
        family, type, proto, flags: what to look for, as for ``socket.getaddrinfo``; 0: anything.
        timeout, engine: as for ``gethostbyname``.

    Returns:
        a handle, as there.

    Raises:
        TypeError, ValueError: as there.
    """
    if host is not None:
        _check_host("getaddrinfo", "host", host, bytes_too=True)
    if isinstance(port, bool) or not (port is None or isinstance(port, (int, str, bytes))):
        raise TypeError(f"getaddrinfo() takes a port, the name of a service, or None, not {port!r}")
    if isinstance(port, int) and not 0 <= port <= 65535:
        raise ValueError(f"getaddrinfo(): port {port} is not between 0 and 65535")
    for name, value in (("family", family), ("type", type), ("proto", proto), ("flags", flags)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"getaddrinfo(): {name} is a number, as in socket, not {value!r}")
    return _ask_resolver("getaddrinfo", (host, port, family, type, proto, flags), callback, timeout, engine)


def _ask_resolver(function: str, args: tuple[Any, ...], callback: Any, timeout: Any, engine: Any) -> Lookup:
    engine = _checked(function, callback, timeout, engine)
    return Lookup(functools.partial(_resolved, function, args, timeout), callback, timeout, engine)


def _resolved(function: str, args: tuple[Any, ...], timeout: float) -> Any:
    """Return what the resolver says; only the calling greenlet waits.

    Raises:
        OSError: whatever went wrong.
    """
    try:
        return _sockets.look_up(function, *args)
    except Enough:
        pass
    except OSError:
        raise
    except Exception as error:  # such as a name that a server gave and nobody can decode
        raise OSError(None, f"{_call(function, args)} failed: {error!r}") from error.with_traceback(None)
    # Outside: else it would keep what was thrown, whose frames keep it.
    raise TimeoutError(errno.ETIMEDOUT, f"{_call(function, args)} was not answered within {timeout:g} seconds")


def _call(function: str, args: tuple[Any, ...]) -> str:
    return f"{function}({', '.join(map(repr, args))})"


def _checked(what: str, callback: Any, timeout: Any, engine: Any) -> Engine:
    """Check what every function here takes; return the engine."""
    if not callable(callback):
        raise TypeError(f"{what}() takes a function to call back, callback(result, error); {callback!r} cannot be called")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"{what}(): timeout is a number of seconds, not {timeout!r}")
    if not 0 < timeout < math.inf:
        raise ValueError(f"{what}(): timeout is a finite number of seconds and more than 0, not {timeout!r:.100}")
    found = engine_for(engine)
    found._enter()
    return found


def _check_host(what: str, name: str, host: Any, *, bytes_too: bool = False) -> None:
    if not isinstance(host, (str, bytes) if bytes_too else str):
        raise TypeError(f"{what}() takes a name or an IP address as str, not {host!r}")
    try:
        encoded = host.encode("idna") if isinstance(host, str) else host
    except UnicodeError as error:
        raise ValueError(f"{what}(): {name} {host!r} is no name that could be looked up: {error}") from None
    if b"\0" in encoded:
        raise ValueError(f"{what}(): {name} {host!r} contains a NUL byte, which no name does")


# ---- by nameservers


def query(
    name: Any,
    qtype: Any = "A",
    callback: Callable[[Any, Exception | None], object] | None = None,
    timeout: float = 10.0,
    *,
    qclass: Any = "IN",
    servers: Any = None,
    port: int = PORT,
    engine: Any = None,
) -> Lookup:
    """Ask nameservers for the records of a name; returns at once. Needs dnspython, the extra ``pants_green[dns]``.

    The question goes out by UDP, each time from a new port and with a new id; what does not fit that port, id, server and question
    is no answer. One that was cut short is asked for again by TCP. If a server does not answer within two seconds the next is
    asked, and all of them again until `timeout`, with twice the patience each time; one that refuses or fails is left out. An
    answer that comes late counts.

    Args:
        name: what to ask for, a str or ``dns.name.Name``; always from the root: no search list is used, and no hosts file.
        qtype: the type of the records: ``"A"``, ``"AAAA"``, ``"MX"``, ``"TXT"``, ..., or a number.
        callback: ``callback(answer, error)``; exactly one of both is None. They are what ``dns.resolver.resolve()`` returns and raises.
            `answer` is a ``dns.resolver.Answer``: iterate over it for the records; its ``response`` is the whole message. `error` is a
            ``dns.resolver.NXDOMAIN`` (there is no such name), ``NoAnswer`` (but no records of that type), ``NoNameservers`` (each of
            them refused or failed), ``LifetimeTimeout``, ..., all of them a ``dns.exception.DNSException``. It runs later, in a greenlet of
            its own with a copy of the caller's context, and may block. What it raises is logged.
        timeout: seconds for all in all.
        qclass: the class of the records, ``"IN"``, ``"CH"``, ..., or a number.
        servers: a list of IP addresses, or of pairs ``(address, port)``; None: those of the system, with its ``timeout`` and ``edns0``
            (``/etc/resolv.conf``).
        port: of the servers that are given without one.
        engine: the Engine, or the module ``pants_green.engine``; by default this thread's.

    Returns:
        a handle; call it or its ``cancel()``, and the callback is not called.

    Raises:
        ImportError: there is no dnspython.
        TypeError, ValueError: an argument makes no sense, such as a name that cannot be encoded, or an unknown type.

    *Source*: RFC 1035, RFC 7766 (TCP), RFC 5452 (what is no answer).
    """
    engine = _checked("query", callback, timeout, engine)
    dns = _dnspython()
    question = (_name(dns, name), _code(dns, "qtype", qtype), _code(dns, "qclass", qclass))
    parse_connect(("", port))  # refuses what is no port
    asked = None if servers is None else _nameservers(servers, port)
    return Lookup(Question(dns, question, asked, port, timeout, engine).ask, callback, timeout, engine)


def _dnspython() -> Any:
    """Return the package ``dns``."""
    try:
        import dns.resolver  # noqa: PLC0415 (an optional extra; it imports all that is used of the others)
    except ImportError as error:
        raise ImportError(f"pants_green.dns.query() needs dnspython ({error}): pip install pants_green[dns]", name="dns") from error
    return dns


def _name(dns: Any, name: Any) -> Any:
    if isinstance(name, dns.name.Name):
        found = name
    elif not isinstance(name, str):
        raise TypeError(f"query() takes a name as str or dns.name.Name, not {name!r}")
    elif not name:
        raise ValueError("query() takes a name; that of the root is '.'")
    else:
        try:
            found = dns.name.from_text(name)
        except (dns.exception.DNSException, UnicodeError) as error:
            raise ValueError(f"query(): {name!r} is no name that could be asked for: {error}") from None
    return found if found.is_absolute() else found.concatenate(dns.name.root)


def _code(dns: Any, what: str, value: Any) -> Any:
    """Return the number of a record type or class."""
    kind, is_meta = (
        (dns.rdatatype.RdataType, dns.rdatatype.is_metatype)
        if what == "qtype"
        else (dns.rdataclass.RdataClass, dns.rdataclass.is_metaclass)
    )
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"query(): {what} is a str such as {'MX' if what == 'qtype' else 'IN'!r}, or a number, not {value!r}")
    try:
        code = kind.make(value)
    except (dns.exception.DNSException, ValueError) as error:
        raise ValueError(f"query(): there is no {what} {value!r}: {error}") from None
    if is_meta(code):
        raise ValueError(f"query(): {what} {value!r} is not that of any record")
    return code


def _nameservers(servers: Any, port: Any) -> list[Nameserver]:
    if not isinstance(servers, (list, tuple)):
        raise TypeError(f"query(): servers is a list of IP addresses, or of pairs (address, port), not {servers!r}")
    if not servers:
        raise ValueError("query(): servers is empty; None stands for those of the system")
    return [_nameserver(*one) if isinstance(one, tuple) and len(one) == 2 else _nameserver(one, port) for one in servers]


def _nameserver(host: Any, port: Any) -> Nameserver:
    if not is_ip_address(host):
        raise ValueError(f"query(): a nameserver is given by its IP address, a str, not as {host!r}; look its name up first")
    parse_connect((host, port))
    return host, port
