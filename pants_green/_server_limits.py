"""The limits of a server: how many connections it has, how fast they come, and from where.

What is refused here never gets to ``on_accept``. Limits of single connections are the business of ``_stream_limits``.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar

from pants_green._address import format_address
from pants_green._buckets import TokenBucket
from pants_green._lifecycle import LISTENING
from pants_green._networks import Client, Networks, client_of
from pants_green._server_proxy import ServerProxy, networks
from pants_green._settings import Setting, per_second, positive_count

__all__ = ["NOBODY", "ServerLimits"]

NOBODY: Any = object()


def _networks_or_none(name: str, value: Any) -> Networks | None:
    return None if value is None else networks(name, value)


class Limit(Setting[Any]):
    """A setting that says who may come in; what it allows holds from now on."""

    def __set__(self, instance: Any, value: Any) -> None:
        super().__set__(instance, value)
        instance._limits_changed()


class ServerLimits(ServerProxy):
    """The part of a server that says who may come in. Not made by itself."""

    __slots__ = ("_at_work", "_bucket", "_by_client", "_held", "_hold_timer", "_suspended")

    #: Connections at a time; None: as many as there are descriptors. Those that are more wait in the backlog of the kernel, and
    #: are accepted as others end. Connections in their TLS handshake, in ``on_accept``, and such as are still sending, count; a socket
    #: of which ``on_accept`` makes no stream does so only until that returns.
    max_connections: Setting[int | None] = Limit(None, positive_count)

    #: Connections at a time from one IP address, or from all Unix sockets together; None: no limit. Those that are more are closed.
    #: Of IPv6 a single host has many addresses as a rule.
    max_connections_per_ip: Setting[int | None] = Limit(None, positive_count)

    #: Connections accepted per second, and as many at once; None: no limit. Those that are more wait in the backlog.
    accept_rate: Setting[float | None] = Limit(None, per_second)

    #: Networks from which alone connections may come; None: from everywhere. And those from which they may not. Both are lists of
    #: str such as ``"10.0.0.0/8"``, in which "unix" stands for Unix sockets; others are closed at once.
    allow: Setting[Any] = Limit(None, _networks_or_none)
    deny: Setting[Any] = Limit(None, _networks_or_none)

    #: Only a Server has one.
    _write_budget: int | None = None

    _max_connections: ClassVar[int | None]
    _max_connections_per_ip: ClassVar[int | None]
    _accept_rate: ClassVar[float | None]
    _allow: ClassVar[Networks | None]
    _deny: ClassVar[Networks | None]
    #: Whether one of these is set, or was on this instance.
    _limited: bool

    @classmethod
    def _settled(cls) -> None:
        super()._settled()
        values = {name: getattr(cls, name) for name in ("max_connections", "max_connections_per_ip", "accept_rate", "allow", "deny")}
        for name, value in values.items():
            setattr(cls, "_" + name, value)
        cls._limited = any(value is not None for value in values.values())

    def __init__(self, engine: Any, proxy_protocol: str | None, trusted: Iterable[Any] | None) -> None:
        super().__init__(engine, proxy_protocol, trusted)
        #: The greenlets that are at work for a connection, each with the peer's address, NOBODY until that has been let in; and how
        #: many connections each client has, while that is limited.
        self._at_work: dict[Any, Any] = {}
        self._by_client: dict[Client, int] | None = None
        #: Whether accepting pauses until one of them ends, or until the timer's time has come; whether suspend() holds.
        self._held = False
        self._hold_timer: Any = None
        self._suspended = False
        self._bucket: TokenBucket | None = None

    def _limits_changed(self) -> None:
        """What may come in has changed: that holds from now on."""
        self._limited = True
        if self._held or self._hold_timer is not None:
            self._engine._enter()
            self._hold_no_more()
            self._resume_accepting()

    @property
    def _active(self) -> int:
        """How many connections there are."""
        return len(self._at_work)

    # ---- before a connection is accepted

    def _may_accept(self) -> bool:
        """Hub: tell whether one more connection may be accepted now."""
        most, rate = self._max_connections, self._accept_rate
        if most is not None and self._active >= most:
            return False
        if rate is None:
            self._bucket = None
            return True
        now = self._engine._clock()
        if self._bucket is None or self._bucket.rate != rate:
            self._bucket = TokenBucket(rate, now)
        return not self._bucket.delay(now)

    def _hold(self) -> None:
        """Hub: connections wait that may not be accepted yet. See to it that they are when they may."""
        self._stop_accepting()
        most = self._max_connections
        if most is not None and self._active >= most:
            self._held = True
            self._reports.tell_once("max_connections", most, "further connections wait until others end")
        elif self._bucket is not None:
            self._hold_timer = self._engine._in_hub_after(self._bucket.delay(self._engine._clock()), self._hold_is_over)
            self._reports.tell_once("accept_rate", self._accept_rate, "further connections wait")

    def _count_accepted(self) -> None:
        """Hub: a connection was accepted."""
        if self._bucket is not None:
            self._bucket.take(1, self._engine._clock())

    def _hold_is_over(self) -> None:
        """Hub: there is a token again."""
        self._hold_timer = None
        self._resume_accepting()

    def _hold_no_more(self) -> None:
        self._held = False
        if self._hold_timer is not None:
            self._hold_timer.cancel()
            self._hold_timer = None

    def _one_less(self) -> None:
        """A connection has ended."""
        if self._held and (self._max_connections is None or self._active < self._max_connections):
            self._held = False
            self._resume_accepting()

    def _may_resume(self) -> bool:
        return self._state is LISTENING and not self._suspended and not self._held and self._hold_timer is None

    def _resume_accepting(self) -> None:
        raise NotImplementedError

    def _stop_accepting(self) -> None:
        raise NotImplementedError

    # ---- once its client is known

    def _admit(self, sock: Any, remote: Any) -> bool:
        """Tell whether a client may come in; if not the socket is closed."""
        if self._deny is not None and remote in self._deny:
            self._reports.tell("deny", self._deny, "the connection of %s was closed", format_address(remote))
        elif self._allow is not None and remote not in self._allow:
            self._reports.tell("allow", self._allow, "the connection of %s was closed", format_address(remote))
        elif not self._count_client(client_of(remote)):
            text = "one more connection of %s was closed"
            self._reports.tell("max_connections_per_ip", self._max_connections_per_ip, text, format_address(remote))
        else:
            return True
        sock.close()
        return False

    def _count_client(self, client: "Client") -> bool:
        """Count one more connection of a client, unless that is too many; while there is no limit nobody counts."""
        most = self._max_connections_per_ip
        if most is None:
            self._by_client = None
            return True
        if self._by_client is None:
            self._by_client = Counter(client_of(remote) for remote in self._at_work.values() if remote is not NOBODY)
        count = self._by_client.get(client, 0)
        if count >= most:
            return False
        self._by_client[client] = count + 1
        return True

    def _let_out(self, by_client: "dict[Client, int]", client: "Client") -> None:
        """A connection of a client has ended."""
        count = by_client[client] - 1
        if count:
            by_client[client] = count
        else:
            del by_client[client]

    def _after_fork(self) -> None:
        self._at_work.clear()
        if self._by_client is not None:
            self._by_client = {}
        self._reports.forget()
        super()._after_fork()
        if self._held or self._hold_timer is not None:
            self._hold_no_more()
            self._resume_accepting()  # the connections for which it waited are the parent's
