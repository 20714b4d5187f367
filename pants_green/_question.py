"""A question to nameservers: whom to ask, by what, in which order, and which answer counts.

Messages are dnspython's, an optional extra, which is handed in; the channels are ours. Who asks, and when that has taken too long, is
the business of ``dns``.
"""

import ipaddress
import logging
from typing import Any

from gevent.queue import Empty, Queue

from pants_green._address import format_address
from pants_green.client import Client
from pants_green.datagram import Datagram
from pants_green.engine import Engine
from pants_green.framing import LengthPrefix

__all__ = ["Enough", "Nameserver", "Question", "is_ip_address"]

#: Seconds for which a nameserver is waited for before the next is asked, in the first round; doubled in each further one.
PATIENCE = 2.0

#: The same, however little time there is: each time costs a socket.
PATIENCE_LEAST = 0.01

#: How many rounds there is to be time for; so all are waited for less if the time is short.
ROUNDS = 2

#: A nameserver: ``(host, port)``.
Nameserver = tuple[str, int]


def is_ip_address(host: Any) -> bool:
    """Tell whether it is an IPv4 or IPv6 address, a str."""
    try:
        return isinstance(host, str) and bool(ipaddress.ip_address(host))
    except ValueError:
        return False


class Enough(BaseException):
    """Thrown into the greenlet of a lookup whose time is up, or that was cancelled: it ends with an error of its own."""


class Question:
    """One question, put to one nameserver after the other until one answers.

    Args:
        dns: the package ``dns``.
        terms: name, type and class.
        servers: whom to ask; None: the system's.
        port: of the system's.
        timeout: seconds for all in all, which the lookup counts.
        engine: whose channels are used.
    """

    def __init__(
        self, dns: Any, terms: tuple[Any, Any, Any], servers: list[Nameserver] | None, port: int, timeout: float, engine: Engine
    ) -> None:
        self.dns = dns
        self.engine = engine
        self._terms = terms
        self._servers = servers
        self._port = port
        self._timeout = timeout
        self._patience = PATIENCE
        self._edns: dict[str, Any] = {}
        self._request: Any = None
        self._channels: list[ByUDP | ByTCP] = []
        #: Those who were asked by TCP, each once.
        self._by_tcp: set[Nameserver] = set()
        #: What each did wrong last, as dnspython puts it.
        self._errors: dict[Nameserver, tuple[Any, ...]] = {}
        #: What came in: from whom, whether by TCP, and a message or an exception.
        self._heard: Any = None

    def ask(self) -> Any:
        """Return the answer, a ``dns.resolver.Answer``; waits, in the greenlet of a lookup.

        Raises:
            dns.exception.DNSException: there is none.
        """
        self._heard = Queue()
        try:
            return self._ask_in_turn(self._servers or self._servers_of_the_system())
        except Enough:
            pass
        finally:
            for channel in self._channels:
                channel.close()
            self._channels.clear()
        # Outside: else it would keep what was thrown, whose frames keep it.
        raise self.dns.resolver.LifetimeTimeout(timeout=self._timeout, errors=list(self._errors.values()))

    def _ask_in_turn(self, servers: list[Nameserver]) -> Any:
        time_for_each = self._timeout / (len(servers) * (2**ROUNDS - 1))
        patience = max(min(self._patience, time_for_each), PATIENCE_LEAST)
        while servers:
            for server in servers[:]:
                if server in servers:
                    self._put(server, server in self._by_tcp)
                    answer = self._wait_for(server, servers, patience)
                    if answer is not None:
                        return answer
            patience *= 2
        raise self.dns.resolver.NoNameservers(request=self._request, errors=list(self._errors.values()))

    def _wait_for(self, server: Nameserver, servers: list[Nameserver], patience: float) -> Any:
        """Return the answer, whoever gives it; None: `server` has given none in time. Take those that fail out of `servers`."""
        dns, clock = self.dns, self.engine._clock
        until = clock() + patience
        while server in servers:
            try:
                # At least one turn of the hub, in which the lookup's time may turn out to be up.
                source, by_tcp, reply = self._heard.get(timeout=max(until - clock(), 0.0))
            except Empty:
                self._failed(server, server in self._by_tcp, dns.exception.Timeout(timeout=patience))
                return None
            if isinstance(reply, dns.message.Message) and reply.flags & dns.flags.TC and not by_tcp:
                self._put(source, True)
                until = clock() + patience
            elif (answer := self._judged(source, by_tcp, reply)) is not None:
                return answer
            elif source in servers:
                servers.remove(source)
        return None

    def _servers_of_the_system(self) -> list[Nameserver]:
        resolver = self.dns.resolver.Resolver()
        if resolver.timeout > 0:
            self._patience = resolver.timeout
        if resolver.edns >= 0:
            self._edns = {"use_edns": resolver.edns, "ednsflags": resolver.ednsflags, "payload": resolver.payload}
        found = [(host, self._port) for host in resolver.nameservers if is_ip_address(host)]
        if not found:
            raise self.dns.resolver.NoResolverConfiguration("no nameservers")
        return found

    def _put(self, server: Nameserver, by_tcp: bool) -> None:
        """Put the question to a server; by TCP only once."""
        if by_tcp and server in self._by_tcp:
            return
        # A new id and, on a new socket, a new port: whoever wants to forge an answer has to guess both.
        request = self._request = self.dns.message.make_query(*self._terms, **self._edns)
        channel: ByUDP | ByTCP
        if by_tcp:
            self._by_tcp.add(server)
            channel = ByTCP(self, server, request)
        else:
            channel = ByUDP(self, server, request)
        # It stays open until all is over: an answer may come late.
        self._channels.append(channel)
        try:
            channel.put()
        except OSError as error:  # no way to that address
            self.hear(server, by_tcp, error)

    def hear(self, server: Nameserver, by_tcp: bool, reply: Any) -> None:
        """Take note of what a server has answered, or of an exception; in any greenlet."""
        if isinstance(reply, BaseException):
            reply = reply.with_traceback(None)
        self._heard.put((server, by_tcp, reply))

    def parsed(self, data: bytes, request: Any) -> Any:
        """Return the message that answers `request`; it may be one that was cut short.

        Raises:
            Exception: it is none.
        """
        message = self.dns.message
        try:
            reply = message.from_wire(data, raise_on_truncation=True)
        except message.Truncated as error:
            reply = error.message()
        if not request.is_response(reply):
            raise self.dns.query.BadResponse
        return reply

    def _judged(self, server: Nameserver, by_tcp: bool, reply: Any) -> Any:
        """Return the answer that a reply contains; None: it contains none, and others may know better.

        Raises:
            dns.exception.DNSException: nobody else will know better.
        """
        dns = self.dns
        if not isinstance(reply, dns.message.Message):
            return self._failed(server, by_tcp, reply)
        rcode = reply.rcode()
        if reply.flags & dns.flags.TC:
            return self._failed(server, by_tcp, "a truncated message", reply)
        if rcode == dns.rcode.NXDOMAIN:
            raise dns.resolver.NXDOMAIN(qnames=[self._terms[0]], responses={self._terms[0]: reply})
        if rcode == dns.rcode.YXDOMAIN:
            raise dns.resolver.YXDOMAIN
        if rcode != dns.rcode.NOERROR:
            return self._failed(server, by_tcp, dns.rcode.to_text(rcode), reply)
        try:
            answer = dns.resolver.Answer(*self._terms, reply, *server)
        except dns.exception.DNSException as error:  # such as names that go in a circle
            return self._failed(server, by_tcp, error.with_traceback(None), reply)
        if answer.rrset is None:
            raise dns.resolver.NoAnswer(response=reply)
        return answer

    def _failed(self, server: Nameserver, by_tcp: bool, error: Any, reply: Any = None) -> None:
        """Keep, for the exception that may come of it, what a server did wrong."""
        self._errors[server] = (format_address(server), by_tcp, server[1], error, reply)


class ByUDP(Datagram):
    """A question to one nameserver, in one packet."""

    def __init__(self, question: Question, server: Nameserver, request: Any) -> None:
        super().__init__(engine=question.engine)
        self.question = question
        self.asked = server
        self.request = request

    def _end_gracefully(self, deadline: float) -> None:
        """Go on: the question has a time limit of its own, and somebody waits for the answer."""

    def put(self) -> None:
        """Ask.

        Raises:
            OSError: there is no way to the server.
        """
        self.connect(self.asked).write(self.request.to_wire())

    def on_read(self, data: bytes) -> None:
        try:
            reply = self.question.parsed(data, self.request)
        except Exception as error:
            # Anybody can send such a thing, and so must not be able to end the waiting by it.
            self._log(logging.DEBUG, "ignoring what is no answer: %r", error, event="no_answer")
            return
        self.question.hear(self.asked, False, reply)

    def on_read_error(self, exception: BaseException) -> None:
        self.question.hear(self.asked, False, exception)

    def on_write_error(self, exception: BaseException) -> None:
        self.question.hear(self.asked, False, exception)


class ByTCP(Client):
    """A question to one nameserver, whose answer may be long."""

    read_delimiter = LengthPrefix("!H", max_size=65535)

    def __init__(self, question: Question, server: Nameserver, request: Any) -> None:
        super().__init__(engine=question.engine)
        self.question = question
        self.asked = server
        self.request = request
        self.answered = False

    def _end_gracefully(self, deadline: float) -> None:
        """Go on: the question has a time limit of its own, and somebody waits for the answer."""

    def put(self) -> None:
        """Ask."""
        self.connect(self.asked)

    def on_connect(self) -> None:
        self.write_packed(self.request.to_wire())

    def on_read(self, data: bytes) -> None:
        try:
            reply = self.question.parsed(data, self.request)
        except Exception as error:
            reply = error
        self.answered = True
        self.question.hear(self.asked, True, reply)
        self.close()

    def on_connect_error(self, exception: Exception) -> None:
        """on_close tells it."""

    def on_close(self) -> None:
        if not self.answered:
            self.question.hear(self.asked, True, self.close_error or EOFError("the connection ended before the answer"))
