"""Waiting, cooperatively, for what tells nobody that it has happened; and forgetting what would keep things alive."""

import time

import gevent
import pytest

from pants_green import Engine


@pytest.fixture(autouse=True)
def nothing_is_kept(leaves_nothing_behind, caplog, recorder):
    """Forget, before the leak check looks, the exceptions that were logged or recorded: their frames keep a greenlet alive.

    For every test of a module that imports this name.
    """
    yield
    caplog.get_records("call").clear()
    recorder.clear()


def until(condition, timeout=5.0):
    """Let the hub run until `condition()` holds; AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:g} seconds in vain"
        gevent.sleep(0.001)


def turns(count=10):
    """Let the hub run `count` turns, in which what should not happen could happen."""
    for _ in range(count):
        gevent.sleep(0.0005)  # by a timer: many sleeps of 0 go by in one turn, in which no socket is looked at


def lingering():
    """Return how many sockets linger: closed for the user, kept open until the peer is done."""
    return len(Engine.instance()._lingering)


def unread(stream):
    """Return how many bytes of a stream wait for their delimiter."""
    return len(stream._inbox)


def unsent(stream):
    """Return how many bytes of a stream wait to be sent."""
    return stream._pending


def settle(stream, quiet_for=20):
    """Return once the kernel takes nothing more, even if it is asked; it takes a little after it has said that it is full."""
    quiet = 0
    while quiet < quiet_for:
        pending = unsent(stream)
        stream.flush()
        gevent.sleep(0.001)
        quiet = quiet + 1 if unsent(stream) == pending else 0
