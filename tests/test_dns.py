"""Looking names up by callback: by gevent's resolver, and by questions to nameservers, which are small ones of the tests' own."""

import collections
import contextvars
import errno
import importlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import time

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.resolver
import dns.rrset
import gevent
import gevent.subprocess
import pytest
from gevent.event import AsyncResult, Event
from needs import needs_ipv6
from peers import in_thread
from test_layers import after_importing
from waiting import nothing_is_kept, turns, until  # noqa: F401

from pants_green import Connection, Datagram, Engine, Server, WrongThreadError, engine
from pants_green.dns import Lookup, getaddrinfo, gethostbyaddr, gethostbyname, gethostbyname_ex, query
from pants_green.framing import LengthPrefix

#: Seconds within which nothing of what a test waits for in vain is to come.
SHORT = 0.05

variable = contextvars.ContextVar("variable", default="default")

Outcome = collections.namedtuple("Outcome", "result error")


def ask(function, *args, **kwargs):
    """Look something up, wait, and return what the callback got."""
    got = AsyncResult()
    function(*args, callback=lambda result, error: got.set(Outcome(result, error)), **kwargs)
    assert not got.ready()
    outcome = got.get(timeout=5)
    assert (outcome.result is None) != (outcome.error is None)
    return outcome


class Resolver:
    """Stands in for gevent's: `known` has results by name, which may be exceptions, or functions."""

    def __init__(self):
        self.known = {}
        self.asked = []

    def _look_up(self, name, *rest):
        self.asked.append((name, *rest))
        found = self.known[name]
        if callable(found):
            found = found()
        if isinstance(found, BaseException):
            raise found
        return found

    gethostbyname = gethostbyname_ex = gethostbyaddr = getaddrinfo = _look_up


@pytest.fixture
def resolver(monkeypatch):
    """Return the Resolver that is asked during the test."""
    made = Resolver()
    monkeypatch.setattr(gevent.get_hub(), "resolver", made)
    return made


@pytest.fixture
def never(resolver):
    """Return a name whose lookup takes as long as the test."""
    resolver.known["never.test"] = Event().wait
    return "never.test"


# ---- by gevent's resolver


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (gethostbyname, ("localhost",)),
        (gethostbyname, ("127.0.0.1",)),
        (gethostbyname_ex, ("localhost",)),
        (gethostbyaddr, ("127.0.0.1",)),
        (getaddrinfo, ("localhost", 80)),
        (getaddrinfo, (None, 80)),
        (getaddrinfo, (b"127.0.0.1", "80")),
    ],
)
def test_lookup_gives_what_the_socket_module_does(function, args):
    assert ask(function, *args) == (getattr(socket, function.__name__)(*args), None)


def test_getaddrinfo_hands_on_what_to_look_for(resolver):
    resolver.known["host.test"] = []
    wanted = {"family": socket.AF_INET, "type": socket.SOCK_STREAM, "proto": 6, "flags": socket.AI_CANONNAME}
    assert ask(getaddrinfo, "host.test", "http", **wanted) == ([], None)
    assert resolver.asked == [("host.test", "http", *wanted.values())]


def test_callback_and_timeout_come_by_position_as_in_the_old_documents(resolver, recorder):
    resolver.known.update({"host.test": [], "127.0.0.1": []})
    gethostbyname("host.test", recorder, 5)
    gethostbyname_ex("host.test", recorder, 5)
    gethostbyaddr("127.0.0.1", recorder, 5)
    getaddrinfo("host.test", 80, recorder, 0, 0, 0, 0, 5)
    recorder.wait_for(4)
    assert recorder == [([], None)] * 4


def test_what_cannot_be_found_is_an_error_of_the_callback():
    result, error = ask(getaddrinfo, "no number", 80, flags=socket.AI_NUMERICHOST)
    assert result is None
    assert isinstance(error, socket.gaierror)
    assert error.errno == socket.EAI_NONAME


@pytest.mark.parametrize("failure", [socket.gaierror(socket.EAI_NONAME, "no such name"), socket.herror(1, "no host"), OSError(5, "bad")])
@pytest.mark.parametrize("function", [gethostbyname, gethostbyname_ex, gethostbyaddr])
def test_error_of_the_resolver_reaches_the_callback_as_it_is(resolver, function, failure):
    resolver.known["host.test"] = failure
    assert ask(function, "host.test").error is failure
    assert failure.__traceback__ is None


def test_error_is_an_oserror_whatever_the_resolver_raises(resolver):
    resolver.known["host.test"] = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    error = ask(gethostbyaddr, "host.test").error
    assert type(error) is OSError
    assert "gethostbyaddr('host.test')" in str(error)
    assert isinstance(error.__cause__, UnicodeDecodeError)


def test_callback_never_runs_inside_the_call(resolver, recorder):
    resolver.known["host.test"] = "127.0.0.1"
    gethostbyname("host.test", recorder)
    assert recorder == []
    assert resolver.asked == []
    recorder.wait_for(1)


def test_lookup_that_takes_long_holds_up_nobody(resolver, never, recorder, server_of, peer):
    resolver.known["host.test"] = "127.0.0.1"
    handle = gethostbyname(never, recorder)
    one = peer(server_of(Connection, on_read=Connection.write))
    one.send(b"hello")
    assert one.recv_exactly(5) == b"hello"
    assert ask(gethostbyname, "host.test").result == "127.0.0.1"
    assert recorder == []
    handle.cancel()


def test_lookups_run_side_by_side(resolver, recorder):
    go_on = Event()
    resolver.known["slow.test"] = lambda: go_on.wait() and "slow"
    for _ in range(20):
        gethostbyname("slow.test", recorder)
    until(lambda: len(resolver.asked) == 20)
    go_on.set()
    recorder.wait_for(20)


# ---- when it takes too long


def test_lookup_that_takes_too_long_is_a_timeout_error(never):
    began = time.monotonic()
    result, error = ask(gethostbyname, never, timeout=SHORT)
    assert SHORT <= time.monotonic() - began + 0.01 < 2
    assert result is None
    assert isinstance(error, TimeoutError)
    assert error.errno == errno.ETIMEDOUT
    assert "gethostbyname('never.test')" in str(error)
    assert "0.05 seconds" in str(error)
    assert (error.__traceback__, error.__context__) == (None, None)


def test_time_counts_from_the_call(never, recorder):
    gethostbyname(never, lambda *both: recorder("first"), timeout=SHORT)
    time.sleep(SHORT)  # which holds up everybody, so that the lookup has not begun
    gethostbyname(never, lambda *both: recorder("second"), timeout=0.9 * SHORT)
    recorder.wait_for(2)
    assert recorder == ["first", "second"]


def test_timeout_ends_the_waiting_and_not_the_thread(resolver, recorder):
    reading, writing = os.pipe()
    done = []
    # A pipe and no threading.Event, which in a patched process is none for threads.
    resolver.known["blocks.test"] = lambda: gevent.get_hub().threadpool.apply(lambda: done.append(os.read(reading, 1)))
    gethostbyname("blocks.test", recorder, SHORT)
    recorder.wait_for(1)
    assert isinstance(recorder[0][1], TimeoutError)
    assert done == []
    os.write(writing, b"!")
    until(lambda: done)
    turns()
    os.close(reading)
    os.close(writing)
    assert len(recorder) == 1


# ---- cancelling


@pytest.mark.parametrize("how", [Lookup.cancel, Lookup.__call__])
@pytest.mark.parametrize("begun", [False, True])
def test_cancelled_lookup_never_calls_back_and_ends_at_once(resolver, never, recorder, begun, how):
    handle = gethostbyname(never, recorder, timeout=SHORT)
    if begun:
        until(lambda: resolver.asked)
    how(handle)
    assert handle.cancelled
    how(handle)
    gevent.sleep(2 * SHORT)
    assert recorder == []
    assert len(resolver.asked) == begun


def test_cancelled_just_when_the_result_is_there(resolver, recorder):
    resolver.known["host.test"] = lambda: handle.cancel() or "127.0.0.1"
    handle = gethostbyname("host.test", recorder)
    turns()
    assert resolver.asked
    assert recorder == []


def test_cancelling_afterwards_or_in_the_callback_does_nothing(resolver, recorder):
    resolver.known["host.test"] = "127.0.0.1"

    def callback(result, error):
        handle.cancel()
        gevent.sleep(0)
        handle()
        recorder("done", result, error)

    handle = gethostbyname("host.test", callback)
    assert "callback" in repr(handle)
    recorder.wait_for("done")
    assert handle.cancelled
    handle.cancel()
    turns()
    assert recorder == [("done", "127.0.0.1", None)]


# ---- callbacks


def test_callback_may_block(resolver, recorder):
    resolver.known["host.test"] = "127.0.0.1"
    go_on = Event()

    def blocks(result, error):
        recorder("blocked")
        go_on.wait()
        recorder("went on")

    gethostbyname("host.test", blocks, timeout=SHORT)
    recorder.wait_for("blocked")
    assert ask(gethostbyname, "host.test").result == "127.0.0.1"
    gevent.sleep(2 * SHORT)  # the time limit is none of the callback
    go_on.set()
    recorder.wait_for("went on")
    assert recorder == ["blocked", "went on"]


def test_callback_that_raises_is_logged_and_harms_nobody(resolver, caplog):
    resolver.known["host.test"] = "127.0.0.1"

    def broken(result, error):
        raise ValueError("in the callback")

    gethostbyname("host.test", broken)
    assert ask(gethostbyname, "host.test").result == "127.0.0.1"
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("pants_green.engine", logging.ERROR)
    assert "broken" in record.message
    assert "in the callback" in record.message
    assert record.exc_info


@pytest.mark.parametrize("left", [gevent.Timeout, gevent.GreenletExit], ids=lambda kind: kind.__name__)
def test_callback_that_is_ended_from_outside_harms_nobody(resolver, caplog, left):
    resolver.known["host.test"] = "127.0.0.1"

    def ended(result, error):
        raise left

    gethostbyname("host.test", ended)
    assert ask(gethostbyname, "host.test").result == "127.0.0.1"
    assert len(caplog.records) == 1


def test_system_exit_in_a_callback_leaves_start(resolver):
    resolver.known["host.test"] = "127.0.0.1"

    def leave(result, error):
        raise SystemExit(3)

    gethostbyname("host.test", leave)
    with pytest.raises(SystemExit):
        engine.start()


def test_callback_finds_the_context_of_the_caller(resolver, recorder):
    resolver.known["host.test"] = lambda: variable.get()

    def callback(result, error):
        recorder(result, variable.get())
        variable.set("of the callback")

    def caller():
        variable.set("of the caller")
        gethostbyname("host.test", callback)
        variable.set("changed")
        recorder.wait_for(1)
        return variable.get()

    assert contextvars.copy_context().run(caller) == "changed"
    assert recorder == [("of the caller", "of the caller")]


def test_greenlets_are_used_again(resolver):
    resolver.known["host.test"] = "127.0.0.1"
    for _ in range(3):
        ask(gethostbyname, "host.test")
    pool = Engine.instance()._pool
    made = pool.made
    for _ in range(20):
        ask(gethostbyname, "host.test")
        turns(1)
    assert pool.made <= made + 1


def test_poll_notices_a_callback(resolver, recorder):
    resolver.known["host.test"] = lambda: gevent.sleep(SHORT) or "127.0.0.1"
    gethostbyname("host.test", recorder)
    while not recorder:
        assert Engine.instance().poll(5)
    assert recorder == [("127.0.0.1", None)]


def test_engine_may_be_given(resolver, recorder):
    resolver.known["host.test"] = "127.0.0.1"
    for given in (None, engine, Engine.instance(), Engine()):
        assert ask(gethostbyname, "host.test", engine=given).result == "127.0.0.1"
    with pytest.raises(TypeError, match="engine="):
        gethostbyname("host.test", recorder, engine="main")


def test_engine_of_another_thread_is_refused(recorder):
    here = Engine.instance()
    with pytest.raises(WrongThreadError):
        in_thread(lambda: gethostbyname("localhost", recorder, engine=here))


FORKS = """
import os, sys
import gevent
from gevent.event import Event
from pants_green import engine
from pants_green.dns import gethostbyname

class Slow:
    def gethostbyname(self, name):
        gevent.sleep(0.1)
        return "127.0.0.1"

gevent.get_hub().resolver = Slow()
parent = os.getpid()

def callback(*both):
    os.write(1, f"{os.getpid() == parent} {both}\\n".encode())

gethostbyname("host.test", callback)
gevent.sleep(0.01)
child = os.fork()
gevent.sleep(0.2)
if child:
    os.waitpid(child, 0)
else:
    gethostbyname("host.test", callback)
    gevent.sleep(0.2)
    os._exit(0)
"""


def test_lookup_stays_with_the_parent_over_a_fork():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], capture_output=True, text=True, timeout=25, check=False)
    assert (done.stdout.split("\n"), done.stderr) == (["True ('127.0.0.1', None)", "False ('127.0.0.1', None)", ""], "")


# ---- what makes no sense


def nothing(result, error):
    raise AssertionError("called back")


LOOKUPS = [
    pytest.param(lambda *args, **kwargs: gethostbyname("localhost", *args, **kwargs), id="gethostbyname"),
    pytest.param(lambda *args, **kwargs: gethostbyname_ex("localhost", *args, **kwargs), id="gethostbyname_ex"),
    pytest.param(lambda *args, **kwargs: gethostbyaddr("127.0.0.1", *args, **kwargs), id="gethostbyaddr"),
    pytest.param(lambda *args, **kwargs: getaddrinfo("localhost", 80, *args, **kwargs), id="getaddrinfo"),
    pytest.param(lambda *args, **kwargs: query("localhost", "A", *args, **kwargs), id="query"),
]


@pytest.mark.parametrize("look_up", LOOKUPS)
def test_arguments_of_all_are_checked_at_the_call(look_up):
    for callback in (None, "print", 5):
        with pytest.raises(TypeError, match="cannot be called"):
            look_up(callback)
    for timeout in (None, "5", True):
        with pytest.raises(TypeError, match="timeout is a number of seconds"):
            look_up(nothing, timeout=timeout)
    for timeout in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="timeout is a finite number of seconds"):
            look_up(nothing, timeout=timeout)
    turns()


@pytest.mark.parametrize("name", ["a" * 64, "a..b", "nul\0", ".".join(["label" * 10] * 6) + "\0"])
@pytest.mark.parametrize(
    "function",
    [
        gethostbyname,
        gethostbyname_ex,
        gethostbyaddr,
        lambda name, callback: getaddrinfo(name, 80, callback),
    ],
    ids=["gethostbyname", "gethostbyname_ex", "gethostbyaddr", "getaddrinfo"],
)
def test_name_that_cannot_be_encoded_is_refused_at_the_call(function, name):
    with pytest.raises(ValueError, match="name"):
        function(name, nothing)
    for other in (7, ("localhost",), ["localhost"]):
        with pytest.raises(TypeError, match="takes a name or an IP address"):
            function(other, nothing)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"port": 80.0}, TypeError),
        ({"port": True}, TypeError),
        ({"port": -1}, ValueError),
        ({"port": 65536}, ValueError),
        ({"family": "AF_INET"}, TypeError),
        ({"type": None}, TypeError),
        ({"proto": True}, TypeError),
        ({"flags": 1.5}, TypeError),
    ],
    ids=str,
)
def test_getaddrinfo_refuses_what_makes_no_sense(arguments, error):
    with pytest.raises(error, match=r"getaddrinfo\(\)"):
        getaddrinfo("localhost", **{"port": 80, "callback": nothing, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"name": ""}, ValueError, "the root is '.'"),
        ({"name": b"host.test"}, TypeError, "name as str"),
        ({"name": "a" * 64}, ValueError, "no name that could be asked for"),
        ({"name": "a..b"}, ValueError, "no name that could be asked for"),
        ({"name": ".".join(["label" * 10] * 6)}, ValueError, "no name that could be asked for"),
        ({"qtype": "NONSENSE"}, ValueError, "there is no qtype 'NONSENSE'"),
        ({"qtype": 65536}, ValueError, "there is no qtype 65536"),
        ({"qtype": "ANY"}, ValueError, "not that of any record"),
        ({"qtype": "AXFR"}, ValueError, "not that of any record"),
        ({"qtype": None}, TypeError, "qtype is a str such as 'MX'"),
        ({"qtype": nothing}, TypeError, "qtype is a str such as 'MX'"),
        ({"qclass": "NONSENSE"}, ValueError, "there is no qclass 'NONSENSE'"),
        ({"qclass": "ANY"}, ValueError, "not that of any record"),
        ({"qclass": True}, TypeError, "qclass is a str such as 'IN'"),
        ({"servers": "127.0.0.1"}, TypeError, "servers is a list of IP addresses"),
        ({"servers": []}, ValueError, "servers is empty"),
        ({"servers": ["localhost"]}, ValueError, "given by its IP address"),
        ({"servers": [2130706433]}, ValueError, "given by its IP address"),
        ({"servers": [("127.0.0.1", 0)]}, ValueError, "port 0"),
        ({"port": 65536}, ValueError, "port 65536"),
        ({"port": "53"}, ValueError, "port"),
        ({"port": 0}, ValueError, "port 0"),
        ({"port": 0, "servers": None}, ValueError, "port 0"),
    ],
    ids=str,
)
def test_query_refuses_what_makes_no_sense(arguments, error, said):
    with pytest.raises(error, match=said.replace("(", r"\(")):
        query(**{"name": "host.test", "callback": nothing, "servers": ["127.0.0.1"], **arguments})
    turns(2)


def test_query_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dns.resolver", None)
    with pytest.raises(ImportError, match=r"pip install pants_green\[dns\]"):
        query("host.test", "A", nothing)


# ---- by nameservers


def answering(*records, rcode=dns.rcode.NOERROR, flags=0):
    """Return what answers a question with records, each ``(type, text)``, or an rcode."""

    def answer(question):
        made = dns.message.make_response(question)
        made.set_rcode(rcode)
        made.flags |= flags | dns.flags.RA
        name = question.question[0].name
        for kind, *texts in records:
            made.answer.append(dns.rrset.from_text(name, 300, "IN", kind, *texts))
        return made

    return answer


def refusing(rcode):
    return answering(rcode=rcode)


def silent(question):
    return None


class Nameserver:
    """A nameserver on loopback.

    Args:
        answer: a function of the question that returns an answer, a message or bytes, a list of answers, or None.
        tcp: such a function for questions by TCP; None: it does not listen there.
        host: where it listens.

    Attributes:
        address: ``(host, port)``, for ``servers=``.
        questions: what was asked, each a message; `peers`: from where.
    """

    def __init__(self, answer, tcp=None, host="127.0.0.1"):
        self.questions = []
        self.peers = []
        self.by_tcp = 0
        self.server = None
        self.udp = OverUDP(self, answer)
        if tcp is None:
            self.udp.listen((host, 0))
        else:
            self._listen(host, type("OverTCP", (OverTCP,), {"nameserver": self, "answer": staticmethod(tcp)}))
        self.address = self.udp.local_address[:2]

    def _listen(self, host, over_tcp):
        """Listen for both on the same port."""
        while True:
            self.server = Server(over_tcp).listen((host, 0))
            try:
                self.udp.listen((host, self.server.local_address[1]))
            except OSError:  # somebody has that port, for UDP
                self.server.close()
            else:
                return

    def close(self):
        self.udp.close()
        if self.server is not None:
            for stream in list(self.server._children()):
                stream.abort()
            self.server.close()

    @staticmethod
    def wire(answer):
        return answer if isinstance(answer, bytes) else answer.to_wire(max_size=65535)


class OverUDP(Datagram):
    def __init__(self, nameserver, answer):
        super().__init__()
        self.nameserver = nameserver
        self.answer = answer

    def on_read(self, data):
        question = dns.message.from_wire(data)
        self.nameserver.questions.append(question)
        self.nameserver.peers.append(self.remote_address)
        answers = self.answer(question)
        for one in answers if isinstance(answers, list) else [answers]:
            if one is not None:
                self.write(Nameserver.wire(one))


class OverTCP(Connection):
    read_delimiter = LengthPrefix("!H")

    def on_read(self, data):
        self.nameserver.by_tcp += 1
        answer = self.answer(dns.message.from_wire(data))
        if answer is None:
            self.close()
        else:
            self.write_packed(Nameserver.wire(answer))


@pytest.fixture
def nameserver():
    """Return a function that makes a Nameserver, which is closed at the end; its `closing` is an event that is set then."""
    made = []

    def make(*args, **kwargs):
        made.append(Nameserver(*args, **kwargs))
        return made[-1]

    make.closing = Event()
    yield make
    make.closing.set()
    for one in made:
        one.close()


@pytest.fixture
def nobody():
    """Return an address at which nobody listens, and nobody will during the test."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.bind(("127.0.0.1", 0))
        taken = bound.getsockname()
        # Connected to itself, it takes packets of nobody else: for them the port is closed.
        bound.connect(taken)
        yield taken


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("A", ["192.0.2.1", "192.0.2.2"]),
        ("AAAA", ["2001:db8::1"]),
        ("MX", ["10 mail.test."]),
        ("TXT", ['"one" "two"']),
        ("SRV", ["1 2 443 host.test."]),
        ("PTR", ["host.test."]),
        ("CAA", ['0 issue "ca.test"']),
        ("TYPE65280", ["\\# 2 0102"]),
    ],
)
def test_query_gets_records_of_any_type(nameserver, kind, texts):
    one = nameserver(answering((kind, *texts)))
    answer, error = ask(query, "host.test", kind, servers=[one.address])
    assert error is None
    assert isinstance(answer, dns.resolver.Answer)
    assert sorted(record.to_text() for record in answer) == texts
    assert (answer.qname, answer.rrset.ttl) == (dns.name.from_text("host.test."), 300)
    assert (answer.nameserver, answer.port) == one.address
    assert answer.response.flags & dns.flags.RA
    (question,) = one.questions
    assert question.question[0].to_text() == f"host.test. IN {kind}"
    assert question.flags == dns.flags.RD


def test_query_asks_for_a_by_default(nameserver, recorder):
    one = nameserver(answering(("A", "192.0.2.1")))
    query("host.test", callback=recorder, servers=[one.address])
    recorder.wait_for(1)
    assert [record.address for record in recorder[0][0]] == ["192.0.2.1"]


def test_query_takes_callback_and_timeout_by_position_too(nameserver, recorder):
    one = nameserver(answering(("MX", "10 mail.test.")))
    query("host.test", "MX", recorder, 5, servers=(one.address[0],), port=one.address[1])
    recorder.wait_for(1)
    assert recorder[0][0][0].preference == 10


@pytest.mark.parametrize(
    "name", ["host.test.", "HOST.Test", *(dns.name.from_text("host.test", origin) for origin in (dns.name.root, None))], ids=repr
)
def test_query_takes_names_of_any_kind_from_the_root(nameserver, name):
    one = nameserver(answering(("A", "192.0.2.1")))
    assert ask(query, name, "a", servers=[one.address]).error is None
    assert one.questions[0].question[0].name == dns.name.from_text("host.test.")


def test_query_in_another_class(nameserver):
    def answer(question):
        made = dns.message.make_response(question)
        made.answer.append(dns.rrset.from_text(question.question[0].name, 0, "CH", "TXT", '"9.18"'))
        return made

    found = ask(query, "version.bind", "TXT", qclass="CH", servers=[nameserver(answer).address]).result
    assert found[0].strings == (b"9.18",)


def test_query_follows_another_name_within_the_answer(nameserver):
    def answer(question):
        made = dns.message.make_response(question)
        made.answer.append(dns.rrset.from_text("host.test.", 300, "IN", "CNAME", "true.test."))
        made.answer.append(dns.rrset.from_text("true.test.", 300, "IN", "A", "192.0.2.1"))
        return made

    found = ask(query, "host.test", servers=[nameserver(answer).address]).result
    assert found.canonical_name == dns.name.from_text("true.test.")
    assert found[0].address == "192.0.2.1"


@needs_ipv6
def test_query_over_ipv6(nameserver):
    one = nameserver(answering(("AAAA", "2001:db8::1")), host="::1")
    assert ask(query, "host.test", "AAAA", servers=[one.address]).result.nameserver == "::1"


def test_query_asks_the_nameservers_of_the_system(nameserver, monkeypatch, tmp_path):
    one = nameserver(answering(("A", "192.0.2.1")))
    config = tmp_path / "resolv.conf"
    config.write_text("search else.test\nnameserver 127.0.0.1\noptions edns0 timeout:1\n")
    made = dns.resolver.Resolver
    monkeypatch.setattr(dns.resolver, "Resolver", lambda: made(filename=str(config)))
    assert ask(query, "host", port=one.address[1]).error is None
    (question,) = one.questions
    assert question.question[0].name == dns.name.from_text("host.")
    assert (question.edns, question.payload) == (0, 1232)


def test_query_without_any_nameserver_is_an_error_of_the_callback(monkeypatch, tmp_path):
    made = dns.resolver.Resolver
    for text in ("", "nameserver https://dns.test/\n"):
        (tmp_path / "resolv.conf").write_text(text)
        monkeypatch.setattr(dns.resolver, "Resolver", lambda: made(filename=str(tmp_path / "resolv.conf")))
        assert isinstance(ask(query, "host.test").error, dns.resolver.NoResolverConfiguration)


# ---- what is no answer


def test_name_that_does_not_exist(nameserver):
    first, second = nameserver(refusing(dns.rcode.NXDOMAIN)), nameserver(answering(("A", "192.0.2.1")))
    error = ask(query, "host.test", servers=[first.address, second.address]).error
    assert isinstance(error, dns.resolver.NXDOMAIN)
    assert "host.test." in str(error)
    assert error.response(dns.name.from_text("host.test.")).rcode() == dns.rcode.NXDOMAIN
    assert (error.__traceback__, second.questions) == (None, [])


def test_name_without_records_of_that_type(nameserver):
    error = ask(query, "host.test", "MX", servers=[nameserver(answering()).address]).error
    assert isinstance(error, dns.resolver.NoAnswer)
    assert "host.test. IN MX" in str(error)


def test_name_that_becomes_too_long(nameserver):
    assert isinstance(ask(query, "host.test", servers=[nameserver(refusing(dns.rcode.YXDOMAIN)).address]).error, dns.resolver.YXDOMAIN)


@pytest.mark.parametrize("rcode", ["SERVFAIL", "REFUSED", "FORMERR", "NOTIMP"])
def test_next_nameserver_is_asked_at_once_if_one_fails(nameserver, rcode):
    first, second = nameserver(refusing(dns.rcode.from_text(rcode))), nameserver(answering(("A", "192.0.2.1")))
    began = time.monotonic()
    answer = ask(query, "host.test", servers=[first.address, second.address]).result
    assert time.monotonic() - began < 1
    assert (answer.nameserver, answer.port) == second.address
    assert (len(first.questions), len(second.questions)) == (1, 1)


def test_failure_of_all_nameservers_names_each(nameserver, nobody):
    servers = [nameserver(refusing(dns.rcode.SERVFAIL)).address, nobody, nameserver(refusing(dns.rcode.REFUSED)).address]
    began = time.monotonic()
    error = ask(query, "host.test", servers=servers).error
    assert time.monotonic() - began < 1
    assert isinstance(error, dns.resolver.NoNameservers)
    assert [one[:3] for one in error.kwargs["errors"]] == [(f"{host}:{port}", False, port) for host, port in servers]
    for said in ("host.test. IN A", "SERVFAIL", "refused", "REFUSED"):
        assert said in str(error)


def test_nobody_listens_and_the_next_is_asked_at_once(nameserver, nobody):
    one = nameserver(answering(("A", "192.0.2.1")))
    began = time.monotonic()
    assert ask(query, "host.test", servers=[nobody, one.address]).result.port == one.address[1]
    assert time.monotonic() - began < 1


def test_server_that_cannot_be_reached_is_left_out(nameserver):
    one = nameserver(answering(("A", "192.0.2.1")))
    assert ask(query, "host.test", servers=["fe80::1%nowhere", "255.255.255.255", one.address], port=9).error is None


def test_no_answer_at_all_is_a_timeout(nameserver):
    first, second = nameserver(silent), nameserver(silent)
    error = ask(query, "host.test", timeout=4 * SHORT, servers=[first.address, second.address]).error
    assert isinstance(error, dns.resolver.LifetimeTimeout)
    assert isinstance(error, dns.exception.Timeout)
    for host, port in (first.address, second.address):
        assert f"{host}:{port}" in str(error)
    assert len(first.questions) >= 2
    assert len(second.questions) >= 1
    assert (error.__traceback__, error.__context__) == (None, None)


def test_query_with_hardly_any_time_is_a_timeout(nameserver):
    one = nameserver(silent)
    error = ask(query, "host.test", timeout=1e-9, servers=[one.address]).error
    assert isinstance(error, dns.resolver.LifetimeTimeout)
    assert len(one.questions) <= 1


def test_each_question_has_an_id_and_a_port_of_its_own(nameserver):
    one = nameserver(silent)
    for _ in range(3):
        ask(query, "host.test", timeout=SHORT, servers=[one.address])
    assert len(one.questions) >= 3
    assert len(set(one.peers)) == len(one.peers)
    assert len({question.id for question in one.questions}) > 1


def test_silent_server_is_asked_again(nameserver):
    answers = [silent, answering(("A", "192.0.2.1"))]
    one = nameserver(lambda question: answers.pop(0)(question))
    assert ask(query, "host.test", timeout=6 * SHORT, servers=[one.address]).result
    assert len(one.questions) == 2


def test_silent_server_is_asked_less_and_less_often(nameserver, monkeypatch):
    monkeypatch.setattr("pants_green._question.PATIENCE", 0.01)
    one = nameserver(silent)
    ask(query, "host.test", timeout=4 * SHORT, servers=[one.address])
    assert 3 <= len(one.questions) <= 6


def test_answer_that_comes_late_counts(nameserver):
    """After the question has been put to others."""

    def answer(question):
        if len(first.questions) == 1:
            gevent.sleep(2 * SHORT)
            return answering(("A", "192.0.2.1"))(question)
        return None

    first, second = nameserver(answer), nameserver(silent)
    found = ask(query, "host.test", timeout=4 * SHORT, servers=[first.address, second.address]).result
    assert found.port == first.address[1]
    assert second.questions


def changed(message, **attributes):
    """Return an answer that fits but for some attributes."""
    made = answering(("A", "192.0.2.66"))(message)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def other_question(question, name="other.test.", kind="A"):
    return answering(("A", "192.0.2.66"))(dns.message.make_query(name, kind, id=question.id))


FORGED = {
    "wrong id": lambda question: changed(question, id=question.id ^ 1),
    "no response": lambda question: question,
    "another opcode": lambda question: changed(question, flags=dns.flags.QR | dns.opcode.to_flags(dns.opcode.NOTIFY)),
    "another name": other_question,
    "another type": lambda question: other_question(question, "host.test.", "AAAA"),
    "no question": lambda question: changed(question, question=[]),
    "wrong id, refused": lambda question: changed(question, id=question.id ^ 1, flags=dns.flags.QR | dns.rcode.REFUSED),
    "wrong id, truncated": lambda question: changed(question, id=question.id ^ 1, flags=dns.flags.QR | dns.flags.TC),
    "garbage": lambda question: b"garbage",
    "nothing": lambda question: b"",
    "garbage behind": lambda question: changed(question).to_wire() + b"garbage",
    "garbage inside": lambda question: changed(question).to_wire()[:-2],
    "garbage, long": lambda question: os.urandom(4000),
}


@pytest.mark.parametrize("forged", FORGED)
def test_what_does_not_fit_the_question_is_ignored(nameserver, forged):
    one = nameserver(lambda question: [FORGED[forged](question), answering(("A", "192.0.2.1"))(question)])
    answer = ask(query, "host.test", servers=[one.address]).result
    assert answer[0].address == "192.0.2.1"
    assert len(one.questions) == 1


def test_answer_of_somebody_else_is_ignored(nameserver):
    somebody = nameserver(silent)

    def answer(question):
        somebody.udp.write(answering(("A", "192.0.2.66"))(question).to_wire(), one.udp.remote_address)
        turns()
        return answering(("A", "192.0.2.1"))(question)

    one = nameserver(answer)
    assert ask(query, "host.test", servers=[one.address]).result[0].address == "192.0.2.1"


def test_names_that_go_in_a_circle_are_no_answer(nameserver):
    def answer(question):
        made = dns.message.make_response(question)
        for one, other in (("host.test.", "a.test."), ("a.test.", "host.test.")):
            made.answer.append(dns.rrset.from_text(one, 300, "IN", "CNAME", other))
        return made

    error = ask(query, "host.test", servers=[nameserver(answer).address]).error
    assert isinstance(error, dns.exception.DNSException)


# ---- by TCP


LONG = [f'"{number:03} {"x" * 200}"' for number in range(200)]

truncated = answering(flags=dns.flags.TC)


def test_truncated_answer_is_asked_for_by_tcp(nameserver):
    one = nameserver(truncated, tcp=answering(("TXT", *LONG)))
    answer = ask(query, "host.test", "TXT", servers=[one.address]).result
    assert len(answer) == 200
    assert (answer.nameserver, answer.port) == one.address
    assert one.by_tcp == 1


def test_answer_that_is_cut_in_the_middle_of_a_record_is_asked_for_by_tcp(nameserver):
    def cut(question):
        return answering(("A", "192.0.2.66"), flags=dns.flags.TC)(question).to_wire()[:-2]

    one = nameserver(cut, tcp=answering(("A", "192.0.2.1")))
    assert ask(query, "host.test", servers=[one.address]).result[0].address == "192.0.2.1"


@pytest.mark.parametrize(
    ("tcp", "said"),
    [
        (None, "refused"),
        (silent, "ended before the answer"),
        (truncated, "truncated"),
        (refusing(dns.rcode.SERVFAIL), "SERVFAIL"),
        (lambda question: b"garbage", "too short"),
        (FORGED["wrong id"], "does not respond"),
    ],
    ids=["nobody listens", "ends", "truncated", "fails", "garbage", "wrong id"],
)
def test_tcp_that_fails_is_a_failure_of_that_server(nameserver, tcp, said):
    first = nameserver(truncated, tcp=tcp)
    error = ask(query, "host.test", servers=[first.address]).error
    assert isinstance(error, dns.resolver.NoNameservers)
    ((where, by_tcp, _, reason, _),) = error.kwargs["errors"]
    assert (where, by_tcp) == ("{}:{}".format(*first.address), True)
    assert said.lower() in str(reason).lower()
    second = nameserver(answering(("A", "192.0.2.1")))
    assert ask(query, "host.test", servers=[first.address, second.address]).result.port == second.address[1]


def test_tcp_without_an_answer_is_a_timeout(nameserver):
    one = nameserver(truncated, tcp=lambda question: nameserver.closing.wait() and None)
    error = ask(query, "host.test", timeout=4 * SHORT, servers=[one.address]).error
    assert isinstance(error, dns.resolver.LifetimeTimeout)
    assert one.by_tcp == 1
    assert len(one.questions) == 1


# ---- queries as lookups


def test_several_queries_at_once(nameserver, recorder):
    def answer(question):
        number = question.question[0].name.labels[0].decode()
        return answering(("TXT", number))(question)

    one = nameserver(answer)

    def callback(answer, error):
        recorder(answer[0].strings[0].decode(), str(answer.qname), error)

    for number in range(50):
        query(f"{number}.test", "TXT", callback, servers=[one.address])
    recorder.wait_for(50)
    assert set(recorder) == {(str(number), f"{number}.test.", None) for number in range(50)}


@pytest.mark.parametrize("tcp", [False, True], ids=["UDP", "TCP"])
def test_cancelled_query_closes_its_sockets_at_once(nameserver, recorder, tcp):
    asked = Event()

    def silence(question):
        asked.set()
        nameserver.closing.wait()

    one = nameserver(truncated, tcp=silence) if tcp else nameserver(lambda question: asked.set())
    before = set(Engine.instance().channels)
    handle = query("host.test", "A", recorder, servers=[one.address])
    asked.wait()
    assert set(Engine.instance().channels) - before
    handle.cancel()
    until(lambda: not {channel for channel in Engine.instance().channels if channel not in before and not isinstance(channel, OverTCP)})
    assert recorder == []


def test_query_cancelled_before_it_begins_asks_nobody(nameserver, recorder):
    one = nameserver(answering(("A", "192.0.2.1")))
    query("host.test", "A", recorder, servers=[one.address]).cancel()
    turns(20)
    assert (recorder, one.questions) == ([], [])


def test_callback_of_a_query_may_ask_on(nameserver, recorder):
    one = nameserver(answering(("A", "192.0.2.1")))

    def callback(answer, error):
        recorder("first", variable.get(), ask(query, "again.test", servers=[one.address]).result[0].address)

    variable_set = contextvars.copy_context()
    variable_set.run(variable.set, "of the caller")
    variable_set.run(query, "host.test", "A", callback, servers=[one.address])
    recorder.wait_for("first")
    assert recorder == [("first", "of the caller", "192.0.2.1")]


@pytest.mark.skipif(shutil.which("dig") is None, reason="this machine has no dig")
# gevent's subprocess forks, and what becomes of it here is exec at once.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("options", "by_tcp"), [([], 0), (["+tcp"], 1), (["+noedns"], 1)], ids=["UDP", "TCP", "truncated"])
def test_dig_understands_the_nameserver_that_is_asked_here(nameserver, options, by_tcp):
    """Else the tests above would prove little."""
    answer = answering(("TXT", *LONG[:4]))

    def by_udp(question):
        return answer(question) if question.edns == 0 else truncated(question)

    one = nameserver(by_udp, tcp=answer)
    command = ["dig", "+short", "+tries=1", "+time=5", *options, f"@{one.address[0]}", "-p", str(one.address[1]), "host.test", "TXT"]
    done = gevent.subprocess.run(command, stdout=gevent.subprocess.PIPE, timeout=20, text=True)
    assert (done.returncode, sorted(done.stdout.splitlines()), one.by_tcp) == (0, LONG[:4], by_tcp)


# ---- the module


@pytest.mark.parametrize("name", ["engine", "channel", "stream", "datagram", "network", "dns"])
def test_s1_12_modules_of_the_old_pages_import(name):
    module = importlib.import_module(f"pants_green.{name}")
    assert module.__all__


def test_importing_the_module_loads_no_extra_and_creates_nothing():
    before, after, loaded = after_importing("pants_green.dns")
    assert after == before
    assert "dns" not in loaded
