"""Greenlets that run one job after another; the only place that makes any.

What the jobs are is the business of ``engine`` and of those who ask it.
"""

import threading
from collections.abc import Callable
from sys import getrefcount
from typing import Any
from weakref import getweakrefcount

from greenlet import getcurrent, greenlet

__all__ = ["Pool", "Worker", "work"]

#: Idle greenlets that are kept for the next connection; each holds some 7 KB.
FREE_LIMIT = 256


class Worker(greenlet):
    """A greenlet that runs one job after another: a connection's life, a timer, a server's callbacks.

    Recycled because a new greenlet costs an mmap of its Python stack (connect-echo-close 1.39 times faster). It may be
    used again only if nothing of the last job clings to it; see `Pool.take`.

    Attributes:
        offered: the accepted socket, and its addresses, that a Stream made in this greenlet may take over.
        claimed: the Stream that did.
        tls: the TLS filter between the two, if there is one.
        header: what a proxy has said of the connection, if it has.
    """

    __slots__ = ("claimed", "header", "offered", "tls")

    def __init__(self, run: Callable[[Any], None], hub: Any) -> None:
        super().__init__(run, hub)
        self.offered: Any = None
        self.claimed: Any = None
        self.tls: Any = None
        self.header: Any = None


class Pool:
    """Free greenlets.

    Attributes:
        limit: how many idle ones are kept.
        made: how many were ever made.
    """

    __slots__ = ("_free", "_fresh", "_references", "hub", "limit", "made", "on_escape", "to_hub")

    def __init__(self, hub: Any, on_escape: Callable[[BaseException], None]) -> None:
        self.hub = hub
        self.on_escape = on_escape
        # The raw switch: gevent's hub.switch() costs 1 % in ping-pong and checks nothing that matters here.
        self.to_hub: Callable[[], Any] = greenlet.switch.__get__(hub)
        self.limit = FREE_LIMIT
        self.made = 0
        self._free: list[Worker] = []
        self._references = 0
        self._fresh: int | None = None

    def take(self) -> Worker:
        """Return a greenlet that waits for a job and to which nothing of an earlier one clings. Hub only.

        A pending Timeout or kill and a held lock keep a strong reference to it, a gevent.local a weak one; so it must have
        as many of both as one that has done nothing. They are counted now and not when it was put back: a wake-up that was
        asked for holds one until it is delivered.
        """
        if self._fresh is None:
            self._measure_fresh()
        free = self._free
        while free:
            worker = free.pop()
            if getrefcount(worker) == self._references and getweakrefcount(worker) == self._fresh and not worker.dead:
                return worker
            # In a patched process one log call is enough to make gevent keep a dummy thread for the greenlet.
            if threading._active.pop(id(worker), None) is not None:  # type: ignore[attr-defined]
                free.append(worker)
            del worker
        return self._make()

    def _make(self) -> Worker:
        self.made += 1
        worker = Worker(work, self.hub)
        # To its first wait, without a job: what the first switch carries lies on its stack as long as it lives.
        worker.switch(self)
        return worker

    def _put_back(self) -> bool:
        """Keep the current greenlet, which has done its job, unless there are enough."""
        if len(self._free) >= self.limit:
            return False
        worker = getcurrent()
        if worker.__dict__:
            worker.__dict__.clear()
        if worker.gr_context is not None:
            worker.gr_context = None
        self._free.append(worker)
        return True

    def clear(self) -> list[Worker]:
        """Give up all free greenlets and return them."""
        free, self._free = self._free, []
        return free

    def __len__(self) -> int:
        return len(self._free)

    def _measure_fresh(self) -> None:
        """Count what refers to an idle greenlet that has done nothing, from a frame like that of `take`."""
        worker = self._make()
        self._references = getrefcount(worker)
        self._fresh = getweakrefcount(worker)
        self.made -= 1


def work(pool: Pool) -> None:
    """The body of a greenlet: run jobs until there are enough idle ones, or something is thrown into this idle one.

    While it is idle nothing on its stack refers to it: so one that is dropped ends, instead of keeping itself alive.
    """
    while True:
        try:
            task = pool.to_hub()
        except BaseException:
            # A Timeout or a kill that the last job left behind. It ends this greenlet and nothing else.
            return
        if type(task) is not list:
            return  # somebody kept its switch
        try:
            # [argument, job]. One plain argument: job(*args) would put a second C frame on the stack that every switch
            # copies. And no name for either: it would keep them for as long as the job runs, 130 bytes a connection.
            task.pop()(task.pop())
        except BaseException as error:
            pool.on_escape(error)
        del task
        if not pool._put_back():
            return
