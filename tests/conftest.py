"""What every test has: a deadline, the leak check, and fixtures for servers, peers and recorded events."""

import faulthandler
import gc
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent.event import Event
from peers import ListeningPeer, Peer

from pants_green import Engine, Server, Stream
from pants_green._address import Address

pytest_plugins = ["pants_green.testing.pytest_plugin"]

#: Seconds after which a test fails where it waits.
DEADLINE = 30.0

#: Seconds after which the process ends, with the tracebacks of all threads: a test that blocks for real cannot be failed.
LAST_RESORT = 90.0

#: Seconds after which that is put off by the next test. It takes a thread: one for each test would be a tenth of the suite's time.
RENEWAL = 5.0

#: Tests from which on a run is taken for one of the whole suite.
MANY = 1000

#: The callbacks that ``Recorder.of`` records unless it is told which. The others are called only if somebody overrides
#: them, so that recording them changes what happens.
ALWAYS_CALLED = ("on_connect", "on_connect_error", "on_read", "on_end", "on_overflow_error", "on_error", "on_close")

_stderr = -1
_finished = 0
_renewed = -RENEWAL


def pytest_configure(config: pytest.Config) -> None:
    global _stderr
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is None:
        _stderr = os.dup(2)
    else:
        with capture.global_and_fixture_disabled():
            _stderr = os.dup(2)


def pytest_collection_finish(session: pytest.Session) -> None:
    contract = next((item.module for item in session.items if item.path.stem == "test_contract_patched"), None)  # type: ignore[attr-defined]
    if contract is not None and len(session.items) > MANY and not session.config.option.collectonly:
        contract.begin()
    # What is there by now stays. Out of the collector's sight it costs the leak check no time: 1 ms instead of 10 per test.
    gc.collect()
    gc.freeze()


def pytest_runtest_logfinish() -> None:
    # pytest keeps a report of each test: the collector would look at ever more of them, 30 ms per test in the end.
    global _finished
    _finished += 1
    if _finished % 50 == 0:
        Engine.instance()._pool.clear()  # the leak check has to see its greenlets
        gc.collect()
        gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    for one in getattr(sys.modules.get("test_contract_patched"), "BEGUN", {}).values():
        one.end()


def pytest_unconfigure() -> None:
    faulthandler.cancel_dump_traceback_later()
    os.close(_stderr)


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """Fail the test, in its own greenlet, when it takes too long."""
    global _renewed
    if time.monotonic() - _renewed > RENEWAL:
        faulthandler.dump_traceback_later(LAST_RESORT, exit=True, file=_stderr)
        _renewed = time.monotonic()
    # Failed is a BaseException, so no `except Exception` on the way can swallow it.
    overdue = gevent.Timeout(DEADLINE, pytest.fail.Exception(f"the test was not done after {DEADLINE:g} seconds"))
    overdue.start()
    try:
        yield
    finally:
        overdue.close()


@pytest.fixture(autouse=True)
def leaves_nothing_behind(deadline: None, no_leaks: Any) -> None:
    """Apply the leak check to every test."""


class Recorder(list[Any]):
    """Events in the order in which they happened. To be used by the greenlets of the test's own thread."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = Event()

    def __call__(self, *event: Any) -> None:
        """Record one event: a single value as it is, several as a tuple."""
        self.append(event[0] if len(event) == 1 else event)

    def append(self, event: Any) -> None:
        """Record one event."""
        super().append(event)
        self._changed.set()

    def names(self) -> list[Any]:
        """Return the events without their arguments: the first element of those that are tuples."""
        return [event[0] if isinstance(event, tuple) else event for event in self]

    def wait_for(self, condition: Any, timeout: float = 5.0) -> "Recorder":
        """Wait, cooperatively, until `condition` holds; it is looked at after every event.

        Args:
            condition: an int, the number of events that are wanted at least; a function of the recorder; or else an event
                that is to be among those recorded, with its arguments or, as a str, by its name alone.
            timeout: seconds until AssertionError, which tells what was recorded.
        """
        if isinstance(condition, int):
            met: Callable[[Recorder], Any] = lambda events: len(events) >= condition  # noqa: E731
        elif callable(condition):
            met = condition
        elif isinstance(condition, str):
            met = lambda events: condition in events.names()  # noqa: E731
        else:
            met = lambda events: condition in events  # noqa: E731
        with gevent.Timeout(timeout, False):
            while not met(self):
                self._changed.clear()
                self._changed.wait()
            return self
        raise AssertionError(f"waited {timeout:g} seconds for {condition!r}; recorded: {list(self)!r}")

    def of(self, base: type[Stream], *names: str, **attributes: Any) -> type[Stream]:
        """Return a subclass of `base` that records its callbacks as ``(name, *arguments)`` and then does as `base` does.

        Args:
            base: a Stream class.
            *names: the callbacks to record; all that are called in any case by default.
            **attributes: further attributes of the new class, such as ``read_delimiter``.
        """
        made: dict[str, Any] = {"__slots__": (), **attributes}
        for name in names or ALWAYS_CALLED:
            made[name] = self._recording(name, made.get(name) or getattr(base, name))
        return type(f"Recorded{base.__name__}", (base,), made)

    def _recording(self, name: str, wrapped: Callable[..., Any]) -> Callable[..., Any]:
        def recording(stream: Any, *args: Any) -> Any:
            self.append((name, *args))
            return wrapped(stream, *args)

        recording.__name__ = name
        return recording


@pytest.fixture
def recorder() -> Recorder:
    """Return an empty Recorder."""
    return Recorder()


@pytest.fixture
def server_of() -> Iterator[Callable[..., Server]]:
    """Return a function that makes a listening server.

    ``server_of(StreamClass, address=("127.0.0.1", 0), server_class=Server, **attributes)``: the attributes are those of a
    subclass of `StreamClass` made for this server (``on_read=``, ``read_delimiter=``, ...); set the server's own on what is
    returned. At the end of the test it is closed and its connections are aborted.
    """
    servers: list[Server] = []

    def make(
        stream_class: Any = Stream, address: Any = ("127.0.0.1", 0), *, server_class: type[Server] = Server, **attributes: Any
    ) -> Server:
        if attributes:
            stream_class = type(stream_class.__name__, (stream_class,), attributes)
        server = server_class(stream_class)
        servers.append(server)
        server.listen(address)
        return server

    yield make
    for server in servers:
        server.close(connections=False)
        for stream in list(server._children()):
            stream.abort()


@pytest.fixture
def open_server() -> Iterator[Callable[[Any], Any]]:
    """Return a function that closes a server, and its connections, at the end of the test."""
    servers: list[Any] = []

    def keep(server: Any) -> Any:
        servers.append(server)
        return server

    yield keep
    for server in servers:
        server.close(*[False] * isinstance(server, Server))
        for stream in list(server._children()):
            stream.abort()


@pytest.fixture
def peer() -> Iterator[Callable[..., Peer]]:
    """Return a function that makes a connected Peer: ``peer(server_or_address, rcvbuf=None, family=None)``; closed at the end."""
    peers: list[Peer] = []

    def make(address: Any, **options: Any) -> Peer:
        made = Peer(address, **options)
        peers.append(made)
        return made

    yield make
    for one in peers:
        one.close()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return a dictionary of names and the hosts that they have; a value may be an exception, or a function that returns either."""
    known: dict[str, Any] = {}

    def resolve(address: Address) -> list[Address]:
        if not address.needs_lookup:
            return [address]
        found = known[address.sockaddr[0]]
        if callable(found):
            found = found()
        if isinstance(found, BaseException):
            raise found
        families = [(socket.AF_INET6 if ":" in host else socket.AF_INET, host) for host in found]
        return [Address(family, (host, address.sockaddr[1]), False) for family, host in families]

    monkeypatch.setattr("pants_green._sockets.resolve", resolve)
    return known


@pytest.fixture
def listening_peer() -> Iterator[Callable[..., ListeningPeer]]:
    """Return a function that makes a ListeningPeer: ``listening_peer(address=("127.0.0.1", 0), ...)``; closed at the end."""
    listeners: list[ListeningPeer] = []

    def make(*args: Any, **options: Any) -> ListeningPeer:
        made = ListeningPeer(*args, **options)
        listeners.append(made)
        return made

    yield make
    for one in listeners:
        one.close()
