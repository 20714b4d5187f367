"""Clients that dial again: when, how often, with what, and when no more."""

import contextlib
import contextvars
import errno
import gc
import logging
import random
import re
import socket
import textwrap
import weakref
from struct import Struct

import gevent
import pytest
from certificates import authority, client_context, server_context
from children import Child
from gevent.event import Event
from tls_peers import TLSPeer
from waiting import nothing_is_kept, turns, unsent, until  # noqa: F401

from pants_green import (
    ChannelClosed,
    ChannelStateError,
    CloseReason,
    Connection,
    Engine,
    InvalidAddressFormatError,
    ReconnectingClient,
    engine,
)
from pants_green._stream_state import COLD, StreamState
from pants_green.channel import Channel
from pants_green.client import MANY
from pants_green.stream import Stream

# gevent's subprocess forks, and what becomes of it here is exec at once.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")

ENDERS = {"close": CloseReason.CLOSED_HERE, "end": CloseReason.ENDED_HERE, "abort": CloseReason.ABORTED_HERE}

#: The callbacks that are recorded.
NAMES = ("on_connect", "on_connect_error", "on_read", "on_end", "on_error", "on_ssl_handshake_error", "on_close", "on_reconnect")


class Echo(Connection):
    def on_read(self, data):
        self.write(data)


class Greeting(Connection):
    """Says one line, and leaves."""

    def on_connect(self):
        self.write(b"hello\n")
        self.end()


@pytest.fixture
def client_of(recorder):
    """Return a function that makes a recording client: ``client_of(ssl_options=None, **attributes)``; stopped at the end."""
    made = []

    def make(ssl_options=None, **attributes):
        client = recorder.of(ReconnectingClient, *NAMES, **attributes)(ssl_options=ssl_options)
        made.append(client)
        return client

    yield make
    for one in made:
        one.stop()
        one.abort()
    until(lambda: all(one.closed for one in made))


@pytest.fixture
def ranges(monkeypatch):
    """Have every attempt follow at once; return a list to which what the delay could have been is added."""
    asked = []

    def uniform(low, high):
        assert low == 0
        asked.append(high)
        return 0.0

    monkeypatch.setattr(random, "uniform", uniform)
    return asked


@pytest.fixture
def later(monkeypatch):
    """Have the next attempt follow in an hour, that is, not in a test."""
    monkeypatch.setattr(random, "uniform", lambda low, high: 3600.0)


@pytest.fixture
def bound():
    """Return a socket that does not listen yet."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        yield made


@pytest.fixture
def nobody(bound):
    """Return an address at which nobody listens."""
    return bound.getsockname()


@pytest.fixture
def full(listening_peer):
    """Return an address that neither accepts nor refuses: the queue of its listener is full."""
    listener = listening_peer(backlog=0)
    waiting = [socket.socket() for _ in range(3)]
    for one in waiting:
        one.setblocking(False)
        one.connect_ex(listener.address)
    yield listener.address
    for one in waiting:
        one.close()


def times(recorder, name):
    return recorder.names().count(name)


def wait_for(recorder, name, number):
    recorder.wait_for(lambda events: times(events, name) >= number)


# ---- Again and again


def test_server_goes_away_and_comes_back(server_of, client_of, recorder, ranges):
    server = server_of(Echo)
    client = client_of(on_connect=lambda self: self.write(b"hello"))
    assert client.connect(server.local_address) is client
    wait_for(recorder, "on_read", 1)
    server.close()  # and with it the connection
    wait_for(recorder, "on_connect_error", 3)
    assert [*recorder.names()[:5], *recorder.names()[5:8]] == [
        *("on_connect", "on_read", "on_end", "on_close", "on_reconnect"),
        *("on_connect_error", "on_close", "on_reconnect"),
    ]
    assert all(event[1].errno == errno.ECONNREFUSED for event in recorder if event[0] == "on_connect_error")
    again = server_of(Echo, server.local_address)
    wait_for(recorder, "on_read", 2)
    assert client.connected
    assert len(again.channels) == 1


def test_refused_until_the_server_is_there(client_of, recorder, bound, ranges):
    client_of().connect(bound.getsockname())
    wait_for(recorder, "on_reconnect", 5)
    bound.listen()
    recorder.wait_for("on_connect")
    assert recorder.names()[:-1] == ["on_connect_error", "on_close", "on_reconnect"] * (len(recorder) // 3)


@pytest.mark.parametrize("leave", ["close", "reset"])
def test_whoever_leaves_it_dials_again(listening_peer, client_of, recorder, ranges, leave):
    listener = listening_peer()
    client_of().connect(listener.address)
    for number in range(1, 4):
        getattr(listener.accept(), leave)()
        wait_for(recorder, "on_reconnect", number)


@pytest.mark.parametrize("call", ENDERS)
@pytest.mark.parametrize("callback", ["on_connect", "on_read", "on_connect_error"])
def test_what_ends_the_connection_does_not_end_the_client(server_of, client_of, recorder, nobody, ranges, call, callback):
    server = server_of(Echo, on_connect=lambda self: self.write(b"x"))
    client = client_of(**{callback: lambda self, *args: getattr(self, call)()})
    client.connect(nobody if callback == "on_connect_error" else server.local_address)
    wait_for(recorder, "on_reconnect", 3)
    assert times(recorder, "on_close") in (3, 4)


@pytest.mark.parametrize("call", ENDERS)
def test_dial_that_is_closed_is_made_again(full, client_of, recorder, ranges, call):
    client = client_of().connect(full)
    turns()
    getattr(client, call)()
    assert not client.closed
    assert not client.connecting
    recorder.wait_for("on_reconnect")
    until(lambda: client.connecting)
    assert recorder == [("on_close",), ("on_reconnect", 0.0)]
    assert (client.close_reason, client.close_error) == (None, None)


@pytest.mark.parametrize("make", [ZeroDivisionError, lambda: gevent.Timeout(1), gevent.GreenletExit])
@pytest.mark.parametrize("callback", ["on_connect", "on_read", "on_reconnect"])
def test_callback_that_raises_ends_the_connection_and_it_dials_again(server_of, client_of, recorder, ranges, callback, make):
    def fails(self, *args):
        raise make()

    client_of(**{callback: fails}).connect(server_of(Greeting).local_address)
    wait_for(recorder, "on_connect", 3)
    assert times(recorder, "on_error") >= 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("callback", ["on_connect", "on_read", "on_close", "on_connect_error", "on_reconnect"])
def test_interrupt_in_a_callback_leaves_start_and_it_dials_no_more(server_of, client_of, recorder, nobody, ranges, callback, error):
    def raises(self, *args):
        raise error

    client = client_of(**{callback: raises})
    client.connect(nobody if callback == "on_connect_error" else server_of(Greeting).local_address)
    with pytest.raises(error):
        engine.start()
    recorder.wait_for("on_close")
    turns()
    assert times(recorder, "on_close") == times(recorder, callback) == 1
    assert times(recorder, "on_reconnect") == (callback == "on_reconnect")
    assert client.closed
    assert client not in Engine.instance().channels


def test_context_variables_of_each_connection_are_those_of_connect(server_of, client_of, recorder, ranges):
    variable = contextvars.ContextVar("variable", default="none")

    def on_connect(self):
        recorder(variable.get())
        variable.set("changed")

    token = variable.set("as it was")
    client_of(on_connect=on_connect, on_close=lambda self: recorder(variable.get())).connect(server_of(Greeting).local_address)
    variable.reset(token)
    wait_for(recorder, "on_connect", 2)
    said = [event for event in recorder if isinstance(event, str)]
    assert said[:3] == ["as it was", "changed", "as it was"]


def test_straight_line_client_reads_on_each_connection(server_of, client_of, recorder, ranges):
    def on_connect(self):
        recorder(self.read(b"\n"))
        self.read(b"\n")  # which the end cuts short

    client_of(on_connect=on_connect).connect(server_of(Greeting).local_address)
    wait_for(recorder, "on_connect", 3)
    assert recorder.count(b"hello") >= 2


def test_name_is_looked_up_for_each_attempt(server_of, client_of, recorder, names, ranges):
    server = server_of(Echo)
    known = iter([["127.0.0.2"], ["127.0.0.3"], ["127.0.0.1"]])
    names["moving.test"] = lambda: next(known)
    client = client_of().connect("moving.test", server.local_address[1])
    recorder.wait_for("on_connect")
    assert times(recorder, "on_connect_error") == 2
    assert client.remote_address == server.local_address


def test_late_answer_to_the_lookup_of_an_earlier_attempt_is_no_answer_to_this_one(server_of, client_of, recorder, names, ranges):
    server = server_of(Echo)
    answers = [Event(), Event()]
    looking = iter(answers)

    def slow():
        answer = next(looking)
        answer.wait()
        return ["127.0.0.2" if answer is answers[0] else "127.0.0.1"]

    names["slow.test"] = slow
    client = client_of().connect("slow.test", server.local_address[1])
    turns()
    client.close()
    recorder.wait_for("on_reconnect")
    until(lambda: client.connecting)
    turns()
    answers[0].set()
    turns()
    assert client.connecting
    answers[1].set()
    recorder.wait_for("on_connect")
    assert recorder.names() == ["on_close", "on_reconnect", "on_connect"]
    assert client.remote_address == server.local_address


def test_source_address_holds_for_each_attempt(listening_peer, client_of, ranges):
    listener = listening_peer()
    client_of().connect(listener.address, source_address=("127.0.0.5", 0))
    for _ in range(3):
        with listener.accept() as one:
            assert one.socket.getpeername()[0] == "127.0.0.5"


# ---- When


def test_delays_double_up_to_the_cap(client_of, recorder, nobody, ranges):
    client_of(initial_delay=0.5, max_delay=12).connect(nobody)
    wait_for(recorder, "on_reconnect", 8)
    assert ranges[:8] == [0.5, 1, 2, 4, 8, 12, 12, 12]
    assert (ReconnectingClient.initial_delay, ReconnectingClient.max_delay, ReconnectingClient.stable_time) == (1.0, 60.0, 10.0)


def test_delays_after_very_many_attempts_are_still_the_cap(client_of, recorder, nobody, ranges):
    client = client_of()
    client._attempts = MANY - 1
    client.connect(nobody)
    wait_for(recorder, "on_reconnect", 3)
    assert set(ranges) == {60.0}


def test_delay_is_random_and_on_reconnect_is_told_of_it(client_of, recorder, nobody):
    client_of(initial_delay=0.002, max_delay=0.002).connect(nobody)
    wait_for(recorder, "on_reconnect", 20)
    delays = [event[1] for event in recorder if event[0] == "on_reconnect"]
    assert all(0 <= delay <= 0.002 for delay in delays)
    assert len(set(delays)) > 15


def test_attempt_does_not_come_before_its_time(client_of, recorder, nobody, monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.05)
    clock = Engine.instance()._clock
    at = []
    client = client_of(on_connect_error=lambda self, error: at.append(clock()), on_reconnect=lambda self, delay: at.append(clock() + delay))
    client.connect(nobody)
    wait_for(recorder, "on_connect_error", 2)
    failed, due, again = at[:3]
    assert failed + 0.05 <= due <= again < due + 1


def test_time_that_on_reconnect_takes_counts(client_of, recorder, nobody, monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.05)
    client = client_of(on_reconnect=lambda self, delay: gevent.sleep(0.03))
    client.connect(nobody)
    recorder.wait_for("on_reconnect")
    until(lambda: client._next is not None)
    assert client._next.when - Engine.instance()._clock() < 0.025


def test_on_reconnect_may_block_and_holds_up_only_its_own_attempt(server_of, peer, client_of, recorder, nobody, ranges):
    go_on = Event()
    client = client_of(on_reconnect=lambda self, delay: go_on.wait()).connect(nobody)
    recorder.wait_for("on_reconnect")
    one = peer(server_of(Echo))
    one.send(b"meanwhile")
    assert one.recv_exactly(9) == b"meanwhile"
    turns()
    assert (client.connecting, client.closed) == (False, False)
    assert len(recorder) == 3
    go_on.set()
    wait_for(recorder, "on_reconnect", 2)


def test_delays_begin_anew_after_a_connection_that_stood_for_long_enough(listening_peer, client_of, recorder, ranges):
    listener = listening_peer()
    client = client_of(stable_time=0.03).connect(listener.address)
    for number in range(1, 4):
        listener.accept().close()
        wait_for(recorder, "on_reconnect", number)
    assert ranges == [1, 2, 4]
    one = listener.accept()
    wait_for(recorder, "on_connect", 4)
    gevent.sleep(0.04)  # time must pass here
    one.close()
    wait_for(recorder, "on_reconnect", 4)
    listener.accept().close()
    wait_for(recorder, "on_reconnect", 5)
    assert ranges == [1, 2, 4, 1, 2]
    client.stop()


def test_time_that_on_close_takes_makes_no_connection_stable(listening_peer, client_of, recorder, ranges):
    listener = listening_peer()
    client_of(stable_time=0.03, on_close=lambda self: gevent.sleep(0.04)).connect(listener.address)
    for number in range(1, 3):
        listener.accept().close()
        wait_for(recorder, "on_reconnect", number)
    assert ranges == [1, 2]


WRONG = [(0, ValueError), (-1, ValueError), (float("inf"), ValueError), (10**400, ValueError), (None, TypeError), ("1", TypeError)]


@pytest.mark.parametrize(("value", "error"), [*WRONG, (True, TypeError)], ids=lambda value: f"{value!r:.10}")
@pytest.mark.parametrize("name", ["initial_delay", "max_delay", "stable_time"])
def test_settings_that_make_no_sense_are_refused_where_they_are_set(name, value, error):
    client = ReconnectingClient()
    before = getattr(client, name)
    with pytest.raises(error, match=rf"ReconnectingClient\.{name} is a .*number of seconds"):
        setattr(client, name, value)
    assert getattr(client, name) == before
    with pytest.raises(error, match=rf"Hasty\.{name}"):
        type("Hasty", (ReconnectingClient,), {name: value})


def test_delays_may_be_changed_at_any_time(client_of, recorder, nobody, ranges):
    client = client_of(on_reconnect=lambda self, delay: setattr(self, "initial_delay", 5))
    client.connect(nobody)
    wait_for(recorder, "on_reconnect", 4)
    assert ranges[:4] == [1, 10, 20, 40]


# ---- In between


def test_while_it_waits(client_of, recorder, nobody, later):
    client = client_of().connect(nobody)
    recorder.wait_for("on_reconnect")
    turns()
    assert (client.connected, client.connecting, client.closed) == (False, False, False)
    assert client in Engine.instance().channels
    assert client._greenlet is None
    assert client.socket is None
    assert client.close_reason is CloseReason.CONNECT_FAILED
    assert client.close_error is recorder[0][1]
    assert re.fullmatch(rf"<RecordedReconnectingClient waiting 3(600|599)\.\d s to dial 127\.0\.0\.1:{nobody[1]} again>", repr(client))
    for call in (lambda: client.write(b"x"), lambda: client.write_packed(1, format="B"), client.flush, client.drain, client.write_eof):
        with pytest.raises(ChannelClosed, match="there is no connection now; do it while connected is true") as caught:
            call()
        assert caught.value.channel is client
    for name in ENDERS:
        getattr(client, name)()
    client.pause()
    client.resume()
    turns()
    assert not client.closed
    assert client.close_reason is CloseReason.CONNECT_FAILED
    assert len(recorder) == 3


def test_in_on_reconnect(client_of, recorder, server_of, later):
    def on_reconnect(client, delay):
        recorder("seen", client.closed, client.connected, client.close_reason, client.engine.channels.count(client), gevent.getcurrent())
        with pytest.raises(ChannelClosed):
            client.write(b"x")
        with pytest.raises(ChannelStateError):
            client.read()
        client.close()

    client = client_of(on_reconnect=on_reconnect, on_close=lambda client: recorder("greenlet", gevent.getcurrent()))
    client.connect(server_of(Greeting).local_address)
    recorder.wait_for("seen")
    seen = next(event for event in recorder if event[0] == "seen")
    assert seen[1:5] == (False, False, CloseReason.PEER_ENDED, 1)
    assert ("greenlet", seen[5]) in recorder
    turns()
    assert times(recorder, "on_error") == 0


def test_what_happens_a_second_time_is_logged_as_debug(client_of, recorder, server_of, ranges, caplog):
    caplog.set_level(logging.DEBUG, "pants_green.stream")
    server = server_of(Echo)
    server.close()

    def said():
        return [(record.levelno, record.event) for record in caplog.records if record.channel is client]

    client = client_of(stable_time=0.01).connect(server.local_address)
    wait_for(recorder, "on_reconnect", 4)
    troubles = [(logging.WARNING, "connect_error"), (logging.INFO, "reconnect")]
    again = [(logging.DEBUG, event) for _, event in troubles]
    assert said()[:8] == [*troubles, *again, *again, *again]
    server = server_of(Echo, server.local_address)
    recorder.wait_for("on_connect")
    assert said()[-1] == (logging.INFO, "reconnected")
    gevent.sleep(0.02)  # time must pass here
    caplog.clear()
    server.close()
    wait_for(recorder, "on_connect_error", times(recorder, "on_connect_error") + 2)
    assert [entry for entry in said() if entry[0] > logging.DEBUG] == [(logging.INFO, "reconnect"), *troubles]


def test_callback_that_takes_too_long_is_news_though_the_peer_has_taken_too_long_before(client_of, recorder, server_of, ranges, caplog):
    def on_connect(client):
        if times(recorder, "on_connect") == 2:
            gevent.sleep(10)

    client = client_of(idle_timeout=0.02, callback_timeout=0.02, on_connect=on_connect).connect(server_of().local_address)
    wait_for(recorder, "on_reconnect", 2)
    said = [record.getMessage() for record in caplog.records if record.event == "timeout" and record.levelno == logging.WARNING]
    assert ["idle_timeout" in said[0], "callback_timeout" in said[1], len(said)] == [True, True, 2]
    client.stop()


def test_trouble_of_a_stable_connection_is_news_again(listening_peer, client_of, recorder, ranges, caplog):
    listener = listening_peer()
    client = client_of(read_delimiter=b"\n", read_timeout=0.01, stable_time=60).connect(listener.address)
    for number in range(1, 5):
        with listener.accept() as one:
            wait_for(recorder, "on_connect", number)
            client.stable_time = 60 if number < 4 else 0.001
            one.send(b"half a line")
            wait_for(recorder, "on_reconnect", number)
    assert [record.levelno for record in caplog.records if record.event == "timeout"] == [logging.WARNING] * 2


# ---- stop()


def test_connect_is_called_once(client_of, recorder, nobody, later):
    client = client_of().connect(nobody)
    for _ in range(2):
        with pytest.raises(ChannelStateError, match=r"connect\(\).*has been called, and dials again by itself"):
            client.connect(nobody)
        recorder.wait_for("on_reconnect")
    client.stop()
    with pytest.raises(ChannelStateError, match=r"connect\(\).*stopped for good; make a new RecordedReconnectingClient"):
        client.connect(nobody)


def test_wrong_address_raises_and_the_client_is_as_before(client_of, recorder, server_of):
    client = client_of()
    with pytest.raises(InvalidAddressFormatError):
        client.connect("127.0.0.1:80")
    client.connect(server_of(Echo).local_address)
    recorder.wait_for("on_connect")


def test_constructor_takes_no_socket():
    with pytest.raises(TypeError):
        ReconnectingClient(object())


STOPS = {
    "on_connect": ["on_connect", "on_close"],
    "on_read": ["on_connect", "on_read", "on_close"],
    "on_end": ["on_connect", "on_read", "on_end", "on_close"],
    "on_close": ["on_connect", "on_read", "on_end", "on_close"],
    "on_connect_error": ["on_connect_error", "on_close"],
    "on_reconnect": ["on_connect", "on_read", "on_end", "on_close", "on_reconnect"],
}


@pytest.mark.parametrize("callback", STOPS)
def test_stop_in_a_callback_is_the_end(server_of, client_of, recorder, nobody, ranges, callback):
    def stops(self, *args):
        self.stop()
        self.stop()

    client = client_of(**{callback: stops})
    client.connect(nobody if callback == "on_connect_error" else server_of(Greeting).local_address)
    recorder.wait_for(callback)
    until(lambda: client.closed)
    turns()
    assert recorder.names() == STOPS[callback]
    assert client not in Engine.instance().channels


def test_stop_before_connect(client_of, recorder, nobody):
    client = client_of()
    client.stop()
    recorder.wait_for("on_close")
    with pytest.raises(ChannelStateError, match="stopped"):
        client.connect(nobody)
    assert client.closed


def test_stop_while_it_waits(client_of, recorder, nobody, later):
    client = client_of().connect(nobody)
    recorder.wait_for("on_reconnect")
    turns()
    client.stop()
    assert client.closed
    assert client.close_reason is CloseReason.ENDED_HERE
    assert client not in Engine.instance().channels
    assert len(Engine.instance()._scheduler) == 0
    client.stop()
    with pytest.raises(ChannelClosed):
        client.write(b"x")
    turns()
    assert recorder.names() == ["on_connect_error", "on_close", "on_reconnect"]


@pytest.mark.parametrize("when", ["at once", "later", "in the next attempt"])
def test_stop_while_it_dials(full, client_of, recorder, ranges, when):
    client = client_of().connect(full)
    if when != "at once":
        turns()
    if when == "in the next attempt":
        client.close()
        recorder.wait_for("on_reconnect")
        until(lambda: client.connecting)
        recorder.clear()
    client.stop()
    assert client.closed
    recorder.wait_for("on_close")
    turns()
    assert recorder == [("on_close",)]
    assert client.close_reason is CloseReason.ENDED_HERE


def test_stop_while_it_looks_up(client_of, recorder, names):
    known = Event()
    names["slow.test"] = lambda: known.wait() and ["127.0.0.1"]
    client = client_of().connect("slow.test", 80)
    turns()
    client.stop()
    recorder.wait_for("on_close")
    known.set()
    turns()
    assert recorder == [("on_close",)]


def test_stop_while_it_shakes_hands(listening_peer, client_of, recorder, ranges):
    listener = listening_peer()
    client = client_of(ssl_options=client_context()).connect(listener.address)
    one = listener.accept()
    turns()
    client.stop()
    recorder.wait_for("on_close")
    turns()
    assert recorder == [("on_close",)]
    one.close()


def test_stop_in_another_greenlet_while_on_reconnect_runs(client_of, recorder, nobody, ranges):
    go_on = Event()
    client = client_of(on_reconnect=lambda self, delay: go_on.wait()).connect(nobody)
    recorder.wait_for("on_reconnect")
    client.stop()
    assert not client.closed  # something is left
    go_on.set()
    until(lambda: client.closed)
    turns()
    assert len(recorder) == 3
    assert Engine.instance().channels == []


def test_stop_sends_what_is_queued(listening_peer, client_of, recorder, ranges):
    size = 3_000_000
    listener = listening_peer(rcvbuf=4096)
    client = client_of().connect(listener.address)
    one = listener.accept()
    recorder.wait_for("on_connect")
    client.write(bytes(size))
    client.stop()
    client.stop()
    turns()
    assert (client.connected, client.closed) == (False, False)
    assert one.recv_all() == bytes(size)
    recorder.wait_for("on_close")
    turns()
    assert recorder.names() == ["on_connect", "on_close"]
    assert client.closed


@pytest.mark.parametrize("delay", [0.0, 3600.0], ids=["after some attempts", "while it waits"])
@pytest.mark.parametrize("there", [True, False], ids=["connected", "refused"])
def test_stop_leaves_nothing_for_the_garbage_collector(server_of, nobody, monkeypatch, delay, there):
    class Quiet(ReconnectingClient):
        rounds = 0

        def on_connect_error(self, exception):
            pass  # a log record would keep it alive

        def on_reconnect(self, delay):
            self.rounds += 1
            if self.rounds == 3:
                self.stop()

    monkeypatch.setattr(random, "uniform", lambda low, high: delay)
    address = server_of(Greeting).local_address if there else nobody
    gc.disable()
    try:
        client = Quiet().connect(address)
        alive = weakref.ref(client)
        if delay:
            until(lambda: alive().rounds)
            turns()
            client.stop()
        del client
        until(lambda: alive() is None or alive().closed)
        turns()
        assert alive() is None
    finally:
        gc.enable()


# ---- What a connection begins with


#: Settings with what they are set to before connect(), and in on_connect.
CHANGED = {
    "read_delimiter": (b"\n", 4),
    "regex_search": (False, True),
    "encoding": ("utf-8", "latin-1"),
    "buffer_size": (1000, 2000),
    "read_timeout": (5.0, 6.0),
    "high_water": (100, 200),
    "low_water": (10, 20),
    "write_limit": (1000, 2000),
    "overflow": ("drop", "wait"),
    "write_timeout": (7.0, None),
    "connect_timeout": (8.0, 9.0),
    "handshake_timeout": (11.0, 12.0),
    "idle_timeout": (13.0, None),
    "read_rate": (1000.0, 2000.0),
    "chunk_rate": (100, None),
    "callback_timeout": (14.0, None),
    "linger_timeout": (15.0, 16.0),
    "allow_half_open": (True, False),
    "remote_address": (("192.0.2.1", 1), ("192.0.2.2", 2)),
}


def test_settings_of_every_connection_are_those_of_connect(server_of, client_of, recorder, ranges):
    def on_connect(self):
        recorder("seen", {name: getattr(self, name) for name in CHANGED}, self._framer, self._mark, self._inbox.one_by_one, self.paused)
        for name, (_, value) in CHANGED.items():
            setattr(self, name, value)
        self.note = "kept"
        self.close()
        self.resume()

    client = client_of(on_connect=on_connect)
    for name, (value, _) in CHANGED.items():
        if name != "remote_address":
            setattr(client, name, value)
    client.pause()
    client.connect(server_of(Echo).local_address)
    wait_for(recorder, "seen", 3)
    first, *others = [event for event in recorder if event[0] == "seen"]
    before = {name: value for name, (value, _) in CHANGED.items()} | {"remote_address": client._plan.address.sockaddr}
    assert first[1] == before
    for event in others[:2]:
        assert event == first
    assert client.note == "kept"


def test_settings_all_have_a_test():
    own = {"initial_delay", "max_delay", "stable_time", "proxy_header"}  # the latter: see test_proxy_server
    assert set(ReconnectingClient._settings) - own == set(CHANGED) - {"allow_half_open", "remote_address"}


def test_delimiter_that_was_changed_in_mid_protocol_is_the_first_one_again(server_of, client_of, recorder, ranges):
    class Header(Connection):
        def on_connect(self):
            self.write(b"4\nbodyrest")
            self.end()

    def on_read(self, data):
        self.read_delimiter = int(data) if data.isdigit() else b"never"

    client = client_of(on_read=on_read)
    client.read_delimiter = b"\n"  # before connect(), but not on the class
    client.connect(server_of(Header).local_address)
    wait_for(recorder, "on_reconnect", 2)
    once = [("on_connect",), ("on_read", b"4"), ("on_read", b"body"), ("on_end", b"rest"), ("on_close",), ("on_reconnect", 0.0)]
    assert recorder[:12] == once * 2


def test_fields_of_an_instances_delimiter_are_arguments_on_every_connection(listening_peer, client_of, recorder, ranges):
    listener = listening_peer()
    client = client_of(on_read=lambda self, one, two: None)
    client.read_delimiter = Struct("!BB")
    client.connect(listener.address)
    for number in range(1, 4):
        with listener.accept() as one:
            one.send(b"\1\2\3")
        wait_for(recorder, "on_reconnect", number)
    assert [event for event in recorder if event[0] in ("on_read", "on_end")] == [("on_read", 1, 2), ("on_end", b"\3")] * 3


def test_byte_order_that_a_connection_has_told_is_not_that_of_the_next(listening_peer, client_of, recorder, ranges):
    listener = listening_peer()
    client_of(encoding="utf-16").connect(listener.address)
    for number, order in enumerate(["utf-16-be", "utf-16-le", "utf-16-be"], 1):
        with listener.accept() as one:
            one.send("\N{BOM}text".encode(order) + b"?")  # and half of a character
        wait_for(recorder, "on_reconnect", number)
    assert [event for event in recorder if event[0] in ("on_read", "on_end")] == [("on_read", "text"), ("on_end", b"?")] * 3


def test_what_waited_to_be_read_or_sent_does_not_survive(listening_peer, client_of, recorder, ranges):
    listener = listening_peer(rcvbuf=4096)
    client = client_of(read_delimiter=b"\n", on_connect=lambda self: self.write(b"hello")).connect(listener.address)
    one = listener.accept()
    one.send(b"unfinished")
    recorder.wait_for("on_connect")
    client.write(bytes(3_000_000))
    turns()
    assert unsent(client) > 0
    one.reset()
    recorder.wait_for("on_reconnect")
    with listener.accept() as two:
        two.send(b"whole\n")
        assert two.recv_exactly(5) == b"hello"
        recorder.wait_for("on_read")
        assert recorder[-1] == ("on_read", b"whole")
        client.end()
        assert two.at_eof()


def test_greenlet_that_waits_for_room_is_told_of_the_end_and_writes_into_no_other_connection(listening_peer, client_of, recorder, ranges):
    listener = listening_peer(rcvbuf=4096)
    client = client_of(write_limit=1000, high_water=1000).connect(listener.address)
    one = listener.accept()
    recorder.wait_for("on_connect")

    def writes():
        with pytest.raises(ChannelClosed):
            for _ in range(100):
                client.write(bytes(1_000_000))
        recorder("ended")

    writer = gevent.spawn(writes)
    until(lambda: client._waiters)
    one.reset()
    with listener.accept() as two:
        recorder.wait_for("ended")
        wait_for(recorder, "on_connect", 2)
        client.close()
        assert two.recv_all() == b""
    writer.join()


def test_what_is_set_in_on_reconnect_holds_for_the_next_connection(server_of, client_of, recorder, nobody, ranges):
    def on_reconnect(self, delay):
        if times(recorder, "on_reconnect") == 1:
            self.read_delimiter = b"l"

    client_of(on_reconnect=on_reconnect, read_delimiter=b"\n").connect(server_of(Greeting).local_address)
    wait_for(recorder, "on_reconnect", 3)
    chunks = [event[1] for event in recorder if event[0] == "on_read"]
    assert chunks[:4] == [b"hello", b"he", b"", b"hello"]


def test_callbacks_of_the_instance_stay(server_of, client_of, recorder, ranges):
    client = client_of()
    client.connect(server_of(Greeting).local_address)
    client.on_connect = lambda: client.write(b"x")
    client.on_write = lambda: recorder("written")
    wait_for(recorder, "on_reconnect", 2)
    recorder.wait_for(lambda events: events.count("written") >= 3)


def test_nothing_of_a_connection_stays_on_the_client(server_of, client_of, recorder, names, later):
    """What has no slot is set where it is wanted; each such name has to be one that is taken away again."""
    names["localhost"] = ["127.0.0.2", "127.0.0.1"]
    seen = set()

    def on_connect(self):
        self.write(b"STARTTLS" * 100 + b"\n")
        recorder(self.read(3))
        self.encoding = "latin-1"
        self.startSSL({"ca_certs": authority().file})
        recorder(self.read(None))
        seen.update(vars(self))

    class Secure(Connection):
        read_delimiter = b"\n"

        def on_read(self, line):
            self.write(b"now")
            self.startSSL(authority().localhost)
            self.write(b"hello")
            self.end()

    server = server_of(Secure)
    client = client_of(on_connect=on_connect, encoding="utf-8", write_limit=10)
    client.note = "kept"
    client.connect("localhost", server.local_address[1], source_address=("127.0.0.1", 0))
    recorder.wait_for("on_reconnect")
    assert recorder.names() == ["on_connect", "now", "hello", "on_end", "on_close", "on_reconnect"]
    assert {"_host", "_source", "_race", "_tls", "_tls_options", "_shaking", "_encoding", "_decoder", "_in_read"} <= seen
    turns()
    assert {name for name in vars(client) if name not in vars(ReconnectingClient)} == {"note"}


def test_every_attribute_without_a_slot_is_known():
    """They stand in StreamState, where `_begin_anew` looks for them."""
    shared = {"_logger", "_watched", "_settings", "_initial", "_abc_impl"}
    for kind in (Channel, *(base for base in Stream.__mro__ if base.__module__.startswith("pants_green.") and base is not StreamState)):
        plain = {
            name
            for name, value in vars(kind).items()
            if re.match("_[a-z]", name) and not callable(value) and not hasattr(value, "__get__")
        }
        assert {name for name in plain if getattr(StreamState, name, None) is not vars(kind)[name]} - shared - COLD == set()


# ---- TLS


def secured(listener):
    return TLSPeer.over(listener.accept(), server_context(), server_side=True)


@pytest.mark.parametrize("how", ["ssl_options", "startSSL before", "startSSL after"])
def test_tls_is_spoken_on_every_connection(listening_peer, client_of, recorder, ranges, how):
    listener = listening_peer()
    options = {"ca_certs": authority().file}
    client = client_of(ssl_options=options if how == "ssl_options" else None, on_connect=lambda self: self.write(b"hello"))
    if how == "startSSL before":
        client.startSSL(options)
    client.connect(listener.address)
    if how == "startSSL after":
        client.startSSL(options)
    for number in range(1, 4):
        with secured(listener) as one:
            assert one.recv_exactly(5) == b"hello"
            assert client.tls_version == "TLSv1.3"
        wait_for(recorder, "on_reconnect", number)
        assert client.ssl_enabled
        assert client.ssl_object is None


def test_tls_begun_on_one_connection_is_not_spoken_on_the_next(listening_peer, client_of, recorder, ranges):
    listener = listening_peer()

    def on_read(self, data):
        self.startSSL({"ca_certs": authority().file})

    client_of(on_read=on_read, on_ssl_handshake=lambda self: self.write(b"hidden")).connect(listener.address)
    for number in range(1, 3):
        plain = listener.accept()
        plain.send(b"go ahead")
        with TLSPeer.over(plain, server_context(), server_side=True) as one:
            assert one.recv_exactly(6) == b"hidden"
        wait_for(recorder, "on_reconnect", number)
    assert times(recorder, "on_read") == 2
    assert times(recorder, "on_error") == 0


def test_tls_handshake_that_fails_is_tried_again(listening_peer, client_of, recorder, ranges):
    listener = listening_peer()
    client_of(ssl_options={}).connect(listener.address)  # the authority is unknown
    for number in range(1, 3):
        with contextlib.suppress(OSError):
            secured(listener)
        wait_for(recorder, "on_reconnect", number)
    assert recorder.names()[:6] == ["on_ssl_handshake_error", "on_close", "on_reconnect"] * 2


# ---- fork


FORKING = """
    import os, random, socket
    import gevent
    from pants_green import CloseReason, Connection, Engine, ReconnectingClient, Server, _dialling, _sockets
    from pants_green._address import Address

    parent = os.getpid()

    def say(*words):
        who = "parent" if os.getpid() == parent else "child"
        os.write(1, (" ".join([who, *map(str, words)]) + "\\n").encode())

    class Talks(ReconnectingClient):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def on_connect(self):
            say(self.name, "on_connect")

        def on_connect_error(self, exception):
            say(self.name, "on_connect_error")

        def on_close(self):
            say(self.name, "on_close")

    # Two addresses that never answer: the queues of their listeners are full.
    first = socket.create_server(("127.0.0.1", 0), backlog=0)
    port = first.getsockname()[1]
    second = socket.create_server(("127.0.0.2", port), backlog=0)
    filling = [socket.socket() for _ in range(6)]
    for number, one in enumerate(filling):
        one.setblocking(False)
        one.connect_ex((first, second)[number % 2].getsockname())
    hosts = ["127.0.0.1", "127.0.0.2"]
    _sockets.resolve = lambda address: [Address(socket.AF_INET, (host, port), False) for host in hosts]
    _dialling.CONNECTION_ATTEMPT_DELAY = 0.001
    random.uniform = lambda low, high: 0.1

    racing, waiting = Talks("racing"), Talks("waiting")
    racing.connect("both.test", port)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = bound.getsockname()
        waiting.connect(address)
        while racing._race is None or len(racing._race._attempts) < 2 or waiting._next is None:
            gevent.sleep(0.001)
        sockets = [sock for _, sock, _ in racing._race._attempts]
        child = os.fork()
        if not child:
            say("sockets", *(sock.fileno() for sock in sockets))
            for client in (racing, waiting):
                say(client.name, client.closed, client.close_reason is CloseReason.FORKED, client.socket)
            say("channels", Engine.instance().channels)
            gevent.sleep(0.2)  # time must pass here
            say("done")
            os._exit(0)
        os.waitpid(child, 0)
    say("sockets", all(sock.fileno() >= 0 for sock in sockets), racing.connecting)
    _sockets.resolve = lambda address: [address]
    server = Server(Connection).listen(address)
    while not waiting.connected:
        gevent.sleep(0.001)
    say("done")
    os._exit(0)
"""


def test_fork_leaves_attempts_and_the_wait_for_the_next_one_with_the_parent():
    with Child("-c", textwrap.dedent(FORKING)) as program:
        assert program.end() == 0
        assert program.error_output().count("Traceback") == 0
        lines = program.output.splitlines()
    assert [line for line in lines if line.startswith("child")] == [
        "child sockets -1 -1",
        "child racing True True None",
        "child waiting True True None",
        "child channels []",
        "child done",
    ]
    assert "parent sockets True True" in lines
    assert lines[-2:] == ["parent waiting on_connect", "parent done"]
