"""Finding the greenlets, channels and descriptors that a piece of code leaves behind."""

import gc
import os
import time
import weakref
from collections.abc import Callable
from typing import Any

import gevent
from gevent import monkey
from gevent.event import Event
from greenlet import getcurrent, greenlet

from pants_green._address import format_address
from pants_green._pool import Worker, work
from pants_green.engine import Engine

__all__ = ["LeakCheck", "leak_check"]

#: Seconds for which what is still there may take its leave.
PATIENCE = 2.0

#: Where the kernel shows the descriptors of this process.
DESCRIPTORS = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"

#: Times that the hub gets a turn before garbage is collected, which is slow.
TURNS_BEFORE_COLLECTING = 3

# Hubs that have everything that they make once.
_ready: "weakref.WeakSet[Any]" = weakref.WeakSet()

_plain_socket: Any = monkey.get_original("socket", "socket")


def leak_check(patience: float = PATIENCE) -> "LeakCheck":
    """Return a context manager that fails if its body leaves a greenlet, a channel or a descriptor behind.

    On leaving it lets the hub run until nothing is there that was not there on entering, which takes no time as a rule.
    If the body raises, nothing is checked and its exception goes on.

    Args:
        patience: seconds to wait for what is on its way out.

    Raises:
        AssertionError: on leaving; it names everything that is left over.
    """
    return LeakCheck(patience)


class LeakCheck:
    """What existed at one moment, and what has come to it since; see `leak_check`.

    Looks at this thread only: the greenlets of its hub, the channels of ``Engine.instance()`` (lingering sockets
    included), and the descriptors of the process. Greenlets that wait in an engine for their next job do not count.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = patience
        self._greenlets: set[int] = set()
        self._idle: set[int] = set()
        self._channels: dict[int, Any] = {}
        self._descriptors: set[tuple[int, str]] = set()

    def __enter__(self) -> "LeakCheck":
        _make_ready()
        # Numbers, not references: these would keep a greenlet from being used again.
        found = _greenlets()
        self._greenlets = {id(one) for one in found if not _is_idle(one)}
        self._idle = {id(one) for one in found if _is_idle(one)}
        self._channels = {id(one): one for one in _channels()}
        self._descriptors = set(_descriptors())
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.check()

    def check(self) -> None:
        """Let the hub run until nothing is left over, within the limit.

        Raises:
            AssertionError: something is; it is named.
        """
        deadline = time.monotonic() + self.patience
        turns = 0
        while self._any_left():
            if turns > TURNS_BEFORE_COLLECTING and time.monotonic() > deadline:
                left = self.leftovers()
                if left:
                    raise AssertionError(f"{len(left)} left over:\n" + "\n".join(f"  {one}" for one in left))
                break
            turns += 1
            if turns <= TURNS_BEFORE_COLLECTING:
                gevent.sleep(0)
                continue
            if turns == TURNS_BEFORE_COLLECTING + 1:
                gc.collect()
            gevent.sleep(0.005)

    def leftovers(self) -> list[str]:
        """Return one line for everything that exists now and did not on entering."""
        left = [f"greenlet {_describe_greenlet(one)}" for one in _greenlets() if self._is_left(one)]
        left += [_describe_channel(one) for one in _channels() if id(one) not in self._channels]
        left += [_describe_descriptor(*one) for one in _descriptors() if one not in self._descriptors]
        return left

    def _any_left(self) -> bool:
        # The cheap things first: usually the answer is no, and then all are asked; but if it is yes the first may say so.
        return (
            any(id(one) not in self._channels for one in _channels())
            or any(one not in self._descriptors for one in _descriptors())
            or any(self._is_left(one) for one in _greenlets())
        )

    def _is_left(self, one: Any) -> bool:
        if not _is_idle(one):
            return id(one) not in self._greenlets
        # Waiting for a job that will never come is a leak, but not of this body if it did so before.
        return id(one) not in self._idle and not any(one is free for free in one.gr_frame.f_locals["pool"]._free)


def _make_ready() -> None:
    """Have everything made that the hub and the engine make once and keep."""
    hub = gevent.get_hub()
    if hub not in _ready:
        # The first use of an async watcher and of the pool opens a descriptor.
        hub.threadpool.apply(int)
        # The first job that an engine runs makes a greenlet to compare the others with.
        done = Event()
        Engine.instance().callback(done.set)
        done.wait()
        _ready.add(hub)


def _greenlets() -> list[greenlet]:
    """Return this thread's greenlets that are alive, but for the hub and the caller."""
    current: Any = getcurrent()
    hub = gevent.get_hub()
    main = current
    while main.parent is not None:
        main = main.parent
    found = []
    for one in [thing for thing in gc.get_objects() if isinstance(thing, greenlet)]:
        if one is current or one is hub or one is main or one.dead:
            continue
        root = one
        while root.parent is not None:
            root = root.parent
        if root is main:
            found.append(one)
    return found


def _is_idle(one: Any) -> bool:
    """Tell whether a greenlet is one of an engine's that waits for its next job, in the pool or forgotten by it."""
    return isinstance(one, Worker) and one.gr_frame is not None and one.gr_frame.f_code is work.__code__


def _channels() -> list[Any]:
    engine = Engine.instance()
    return [*engine.channels, *engine._lingering]


def _descriptors() -> list[tuple[int, str]]:
    """Return every open descriptor and what it stands for."""
    found = []
    for name in os.listdir(DESCRIPTORS):
        try:
            found.append((int(name), os.readlink(f"{DESCRIPTORS}/{name}")))
        except FileNotFoundError:
            continue  # that with which the directory was read
        except OSError:
            status = os.fstat(int(name))
            found.append((int(name), f"{status.st_dev}:{status.st_ino}"))
    return found


def _describe_greenlet(one: Any) -> str:
    frame = one.gr_frame
    if frame is None:
        return f"{one!r}, not started"
    if _is_idle(one):
        return f"{one!r}, which has done its job and which its pool has dropped"
    # The innermost frames belong to gevent and say less than who called it.
    places = []
    while frame is not None:
        code = frame.f_code
        places.append(f"{code.co_qualname} ({os.path.basename(code.co_filename)}:{frame.f_lineno})")
        frame = frame.f_back
    return f"{one!r}, waiting in " + ", called by ".join(places[:5])


def _describe_channel(one: Any) -> str:
    if one in Engine.instance()._lingering:
        return f"lingering socket {_names(one._socket.getsockname, one._socket.getpeername)}"
    return f"channel {one!r}"


def _describe_descriptor(number: int, target: str) -> str:
    described = f"descriptor {number}, {target}"
    if target.startswith("socket:"):
        try:
            sock = _plain_socket(fileno=number)
        except OSError:
            return described
        try:
            described += " " + _names(sock.getsockname, sock.getpeername)
        finally:
            sock.detach()
    return described


def _names(own: Callable[[], Any], other: Callable[[], Any]) -> str:
    said = []
    for ask in (own, other):
        try:
            said.append(format_address(ask()))
        except OSError:
            said.append("?")
    return "from {} to {}".format(*said)
