"""The engine: the face of the gevent hub of one thread. Timers, greenlets, the flush; and the global engine's functions.

No socket is known here; greenlets are made in ``_pool``, timers run in ``_scheduler``. The module itself stands for the engine of the
calling thread: ``engine.start()`` is ``Engine.instance().start()``, and ``engine=engine`` is understood everywhere.
"""

import contextvars
import logging
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from time import monotonic
from types import ModuleType
from typing import Any

import gevent
from gevent import monkey
from gevent.event import Event
from greenlet import getcurrent

from pants_green._drain import Drain
from pants_green._lifecycle import CLOSED
from pants_green._pool import Pool
from pants_green._scheduler import HubTimer, Scheduler
from pants_green._settings import seconds
from pants_green._signals import wake_for_signals
from pants_green._timers import Timer
from pants_green.errors import ChannelStateError, WrongThreadError

__all__ = [
    "Engine",
    "Timer",
    "call_from_thread",
    "callback",
    "cycle",
    "defer",
    "loop",
    "poll",
    "run_in_thread",
    "start",
    "stop",
]

log = logging.getLogger("pants_green.engine")

#: Dirty streams from which on a read loop flushes them all between two batches, instead of the next hub turn.
FLUSH_AT = 16

# What a thread is, also in a monkey-patched process, where threading's own functions tell greenlets apart.
_get_ident: Callable[[], int] = monkey.get_original("_thread", "get_ident")
_instances: Any = monkey.get_original("_thread", "_local")()


class _Life:
    """Lasts as long as a thread, which alone keeps it: the number of one that has ended is soon that of another."""

    __slots__ = ("__weakref__",)


def _life_of_this_thread() -> _Life:
    life: _Life | None = getattr(_instances, "life", None)
    if life is None:
        life = _instances.life = _Life()
    return life


_first_instance: "Engine | None" = None

#: Engines whose ``start()`` is at work, the earliest first.
_running: "list[Engine]" = []

#: Under "engine": that of the next thread that asks for one. Threads without any have handed calls to it already.
_awaited: "dict[str, Engine]" = {}


class Engine:
    """Runs callbacks and timers, and knows the channels, of one thread.

    An engine belongs to the thread that first uses it and from then on to that thread's hub, which it never owns:
    channels and timers work as soon as the hub runs, whoever runs it. Making one creates no hub.
    """

    __slots__ = (
        "__dict__",
        "__weakref__",
        "_clock",
        "_dirty",
        "_flush_asked",
        "_flush_at",
        "_forks",
        "_forsaken",
        "_from_threads",
        "_hub",
        "_life",
        "_lingering",
        "_loop",
        "_pollers",
        "_pool",
        "_roots",
        "_runner",
        "_scheduler",
        "_stopping",
        "_thread",
    )

    def __init__(self) -> None:
        self._thread: int | None = None
        self._life: weakref.ref[_Life] | None = None
        self._hub: Any = None
        self._loop: Any = None
        self._pool: Any = None
        self._clock: Callable[[], float] = monotonic
        self._dirty: list[Any] = []
        self._flush_asked = False
        self._flush_at = FLUSH_AT
        self._roots: set[Any] = set()
        #: In order: when there are too many the first is let go.
        self._lingering: dict[Any, None] = {}
        self._scheduler: Any = None
        self._pollers: list[Event] = []
        self._from_threads: list[Timer] = []
        self._runner: Any = None
        self._stopping = False
        self._forsaken: list[Any] = []
        self._forks = 0

    @classmethod
    def instance(cls) -> "Engine":
        """Return the engine of the calling thread: always the same one in the same thread."""
        global _first_instance
        engine: Engine | None = getattr(_instances, "engine", None)
        if engine is None:
            engine = _instances.engine = _awaited.pop("engine", None) or Engine()
            if _first_instance is None or not _first_instance._thread_lives():
                _first_instance = engine
        return engine

    def __repr__(self) -> str:
        if self._hub is None:
            return "<Engine, not used yet>"
        running = "running" if self._runner is not None else "not running"
        return f"<Engine {running}, {len(self.channels)} channels, {len(self._scheduler)} timers>"

    # ---- running

    def start(self, graceful_timeout: float | None = None) -> None:
        """Run until ``stop()`` is called; in any greenlet, as often as you like.

        While it runs, a second call returns at once. An idle engine uses no CPU and does not return.

        Args:
            graceful_timeout: seconds; SIGTERM and SIGINT (Ctrl-C) then end the engine gracefully: servers stop as by
                ``Server.stop(graceful_timeout)``; after them the other channels are asked to end (``on_stopping``); and this
                returns when no channel, and no callback of one, is left, or when the time is up. Timers go on meanwhile, and
                are not waited for. A second signal ends it at once. None: signals do what they do elsewhere.

        Raises:
            KeyboardInterrupt, SystemExit: raised in a callback, or by the user's Ctrl-C; with `graceful_timeout` by a second
                signal while a callback has not let the hub come by since the first, a second ago or more (exit code 128 and its
                number).
            ChannelStateError: (RuntimeError) `graceful_timeout` was given outside of the main thread, to which signals come.
            TypeError, ValueError: `graceful_timeout` is not a number of seconds of more than 0.
        """
        graceful_timeout = seconds("start(): graceful_timeout", graceful_timeout)
        self._enter()
        if self._runner is not None:
            return
        if getcurrent() is self._hub:
            raise ChannelStateError("Engine.start() was called in the hub; call it in the main greenlet or in one of your own")
        keep_alive = self._loop.async_()
        keep_alive.start(_nothing)
        self._runner = getcurrent()
        _running.append(self)
        self._stopping = False
        # In the hub, and so after what it still has to do about an interrupt: it stops the watcher in whose callback that came.
        self._loop.run_callback(self._repair)
        # The hub would print a Ctrl-C before it is raised here.
        not_errors = self._hub.NOT_ERROR
        self._hub.NOT_ERROR = (*not_errors, KeyboardInterrupt)
        wake_no_more = wake_for_signals(self._loop)
        drain = None
        try:
            if graceful_timeout is not None:
                drain = Drain(self, graceful_timeout)
            while not self._stopping:
                self._hub.switch()
        finally:
            if drain is not None:
                drain.end()
            wake_no_more()
            self._runner = None
            _running.remove(self)
            self._hub.NOT_ERROR = not_errors
            keep_alive.stop()
            keep_alive.close()

    def stop(self) -> None:
        """Make ``start()`` return, at the end of this hub turn. Channels stay as they are; no effect if it does not run."""
        self._enter()
        if self._runner is not None:
            self._stopping = True
            self._loop.run_callback(self._resume_runner)

    def poll(self, timeout: float | None = 0.2) -> bool:
        """Let the hub run until one of our channels or timers did something.

        Args:
            timeout: seconds to wait at most; None waits for as long as it takes.

        Returns:
            whether anything was done.
        """
        self._enter()
        done = Event()
        keep_alive = self._loop.async_()
        keep_alive.start(_nothing)
        self._pollers.append(done)
        self._flush_at = 0
        try:
            return bool(done.wait(timeout))
        finally:
            self._pollers.remove(done)
            if not self._pollers:
                self._flush_at = FLUSH_AT
            keep_alive.stop()
            keep_alive.close()

    @property
    def latest_poll_time(self) -> float:
        """When the hub last looked for events: seconds since the epoch."""
        self._enter()
        return float(self._loop.now())

    @property
    def channels(self) -> list[Any]:
        """All channels that are at work: listening, dialling, connected, or sending their last bytes."""
        found: list[Any] = []
        for root in list(self._roots):
            if root._state is not CLOSED:
                found.append(root)
            found.extend(root._children())
        return found

    # ---- timers

    def callback(self, function: Callable[..., object], /, *args: Any, **kwargs: Any) -> Timer:
        """Run `function` once, in the next hub turn, in a greenlet: it may block.

        Returns:
            a handle; call it or its ``cancel()`` to prevent the run.

        Raises:
            TypeError: `function` is not callable.
        """
        return self.defer(0, function, *args, **kwargs)

    def loop(self, function: Callable[..., object], /, *args: Any, **kwargs: Any) -> Timer:
        """Run `function` once in every hub turn, and every 20 ms while nothing else happens, until cancelled.

        Each run has a greenlet. A run that blocks is waited for, so the runs never overlap.

        Returns:
            a handle; call it or its ``cancel()``, from inside too, to stop.

        Raises:
            TypeError: `function` is not callable.
        """
        timer = self._timer("loop", function, args, kwargs)
        self._scheduler.each_turn(timer)
        return timer

    def defer(self, delay: float, function: Callable[..., object], /, *args: Any, **kwargs: Any) -> Timer:
        """Run `function` once, `delay` seconds after this call, in a greenlet: it may block.

        The oldest order, ``defer(function, delay)``, is told apart by its types.

        Args:
            delay: seconds from now, finite and not negative; 0 means the next hub turn.

        Returns:
            a handle; call it or its ``cancel()`` to prevent the run.

        Raises:
            ValueError: `delay` is negative, infinite or not a number.
            TypeError: `delay` is no number at all, or `function` is not callable.
        """
        delay, function = _in_order("defer", delay, function)
        timer = self._timer("defer", function, args, kwargs)
        if delay == 0:
            self._scheduler.soon(timer)
        else:
            self._scheduler.after(delay, timer)
        return timer

    def cycle(self, interval: float, function: Callable[..., object], /, *args: Any, **kwargs: Any) -> Timer:
        """Run `function` every `interval` seconds until cancelled, for the first time after `interval`.

        The beat does not drift. A run that takes longer than `interval` is waited for; the beats it missed are left out.
        An exception is logged and the cycle goes on.

        Args:
            interval: seconds, finite and more than 0.

        Returns:
            a handle; call it or its ``cancel()``, from inside too, to stop.

        Raises:
            ValueError, TypeError: as for ``defer``.
        """
        interval, function = _in_order("cycle", interval, function)
        if interval == 0:
            raise ValueError("cycle() takes an interval of more than 0 seconds; to run once per hub turn use loop()")
        timer = self._timer("cycle", function, args, kwargs)
        timer.interval = interval
        self._scheduler.after(interval, timer)
        return timer

    # ---- threads

    def call_from_thread(self, function: Callable[..., object], /, *args: Any, **kwargs: Any) -> Timer:
        """Run `function` in this engine's thread, in a greenlet, soon. The one method that any thread may call.

        Returns:
            a handle; call it or its ``cancel()`` to prevent the run.

        Raises:
            TypeError: `function` is not callable.
        """
        _check_callable("call_from_thread", function)
        timer = Timer(function, args, kwargs, context=contextvars.copy_context())
        self._from_threads.append(timer)
        if self._loop is not None:
            self._loop.run_callback_threadsafe(self._start_from_threads)
        return timer

    def run_in_thread(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run a function that blocks for real in a thread of gevent's pool; only the calling greenlet waits.

        Returns:
            what `function` returns; what it raises is raised here.

        Raises:
            TypeError: `function` is not callable.
        """
        self._enter()
        _check_callable("run_in_thread", function)
        context = contextvars.copy_context()
        failed, result = self._hub.threadpool.apply(_outcome, (context, function, args, kwargs))
        if failed:
            try:
                raise result
            finally:
                del result  # else its traceback holds this frame, and this frame it
        return result

    # ---- binding

    def _enter(self) -> None:
        """Bind to this thread's hub at the first call; afterwards refuse any other thread."""
        if self._thread != _get_ident():
            self._bind()

    def _bind(self) -> None:
        ident = _get_ident()
        if self._thread is not None:
            raise WrongThreadError(
                f"this engine belongs to {_thread_name(self._thread)} and was used in {_thread_name(ident)}; hand the call over with "
                "engine.call_from_thread(function, ...), or use the engine of this thread, Engine.instance()"
            )
        self._thread = ident
        self._life = weakref.ref(_life_of_this_thread())
        self._hub = gevent.get_hub()
        self._pool = Pool(self._hub, self._escaped)
        self._scheduler = Scheduler(self, self._hub.loop)
        # Last: other threads that call call_from_thread look at it to see whether there is anybody to wake.
        self._loop = self._hub.loop
        _bound.add(self)
        _register_fork_handler()
        if self._from_threads:
            self._loop.run_callback(self._start_from_threads)

    def _thread_lives(self) -> bool:
        """Tell whether the thread that this engine belongs to, if it does to any yet, has not ended."""
        return self._life is None or self._life() is not None

    def _timer(self, what: str, function: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Timer:
        self._enter()
        _check_callable(what, function)
        return Timer(function, args, kwargs, context=contextvars.copy_context())

    def _start_from_threads(self) -> None:
        while self._from_threads:
            self._scheduler.start(self._from_threads.pop(0))

    # ---- greenlets

    def _run(self, job: Callable[[Any], object], argument: Any, context: contextvars.Context | None) -> None:
        """Run ``job(argument)`` in a free greenlet until it first waits. Hub only.

        Args:
            context: what the job finds in its context variables, in a copy of its own; None or empty: nothing.
        """
        worker = self._pool.take()
        if context:
            worker.gr_context = context.copy()
        worker.switch([argument, job])
        if self._pollers:
            self._acted()

    def _run_soon(self, job: Callable[[Any], object], argument: Any = None, context: contextvars.Context | None = None) -> None:
        """Run ``job(argument)`` in a free greenlet in the next hub turn."""
        self._loop.run_callback(self._run, job, argument, context)

    def _repair(self) -> None:
        """Set going again what an interrupt, raised anywhere in the hub, may have left undone."""
        self._scheduler.rearm()
        for channel in self.channels:
            channel._repair()
        self._flush_asked_for()

    def _escaped(self, error: BaseException) -> None:
        """Something left a job. Jobs catch what user code raises, so this is the last resort."""
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            self._interrupt(error)
        elif not isinstance(error, gevent.GreenletExit):
            log.error("a greenlet of the engine failed", exc_info=error)

    def _interrupt(self, error: BaseException) -> None:
        """Hand KeyboardInterrupt or SystemExit to whoever waits in start(), else to the main greenlet."""
        self._loop.run_callback(self._throw_into_runner, error, error.__traceback__)

    def _throw_into_runner(self, error: BaseException, traceback: Any) -> None:
        if self._runner is not None:
            self._runner.throw(type(error), error, traceback)
        else:
            self._hub.handle_system_error(type(error), error.with_traceback(traceback))

    def _resume_runner(self) -> None:
        if self._runner is not None and self._stopping:
            self._runner.switch()

    def _in_hub_after(self, delay: float, function: Callable[..., object], /, *args: Any) -> Timer:
        """Run a function of the library's own in the hub, `delay` seconds from now."""
        timer = HubTimer(function, args)
        self._scheduler.after(delay, timer)
        return timer

    # ---- the flush

    def _ask_flush(self) -> None:
        """Have the dirty streams flushed once in the next hub turn."""
        if self._thread != _get_ident():
            self._bind()
        self._flush_asked = True
        self._loop.run_callback(self._flush_asked_for)

    def _flush_asked_for(self) -> None:
        self._flush_asked = False
        if self._dirty:
            self._flush_dirty()

    def _flush_dirty(self) -> None:
        """Send what every dirty stream has written since the last flush: one send each."""
        dirty = self._dirty
        streams = iter(dirty[:])
        flush_each = dirty[0]._flush_each  # one for all streams, of which this module knows nothing else
        dirty.clear()
        try:
            flush_each(streams)
        except BaseException:
            # Not one stream's trouble, which it keeps to itself, but a signal in the middle of the flush. The rest waits.
            dirty[:0] = streams
            if dirty and not self._flush_asked:
                self._ask_flush()
            raise

    def _turn(self) -> None:
        """Hub, once per turn while there are loop functions: run them, and send what they wrote."""
        # Without another turn for the flush: a loop function that writes would never let the hub rest.
        asked, self._flush_asked = self._flush_asked, True
        try:
            self._scheduler.run_loops()
        finally:
            self._flush_asked = asked
        if self._dirty:
            self._flush_dirty()

    def _batch_done(self) -> None:
        """A read loop has delivered a batch and found `_flush_at` or more dirty streams."""
        if self._pollers:
            self._acted()
        if len(self._dirty) >= FLUSH_AT:
            self._flush_dirty()

    def _acted(self) -> None:
        for done in self._pollers:
            done.set()

    # ---- fork

    def _after_fork(self) -> None:
        """In the child: the hub gets descriptors of its own; connections stay with the parent, listeners are shared."""
        self._forks += 1
        if self._thread != _get_ident():
            # The thread of this engine does not exist here, and its hub will never run. But the descriptors do.
            for channel in self.channels:
                channel._abandon()
            return
        self._loop.reinit()
        self._dirty.clear()
        self._flush_asked = False
        # Kept, and never switched to: what they were doing is the parent's business.
        self._forsaken.extend(self._pool.clear())
        for channel in self.channels:
            channel._after_fork()
        for linger in list(self._lingering):
            linger.close()


def _outcome(context: contextvars.Context, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
    # gevent's pool prints the traceback of what a function raises, though the caller gets it too. So it is handed over.
    try:
        return False, context.run(function, *args, **kwargs)
    except BaseException as error:
        return True, error


def _in_order(what: str, delay: Any, function: Any) -> tuple[float, Any]:
    if callable(delay) and not callable(function):
        delay, function = function, delay
    _check_callable(what, function)
    if isinstance(delay, bool) or not isinstance(delay, (int, float)):
        raise TypeError(f"{what}() takes seconds as int or float, not {delay!r}")
    if not math.isfinite(delay) or delay < 0:
        raise ValueError(f"{what}() takes a finite number of seconds, 0 or more, not {delay!r}")
    return delay, function


def _check_callable(what: str, function: Any) -> None:
    if not callable(function):
        raise TypeError(f"{what}() takes a function and its arguments; {function!r} cannot be called")


def _thread_name(ident: int) -> str:
    for thread in threading.enumerate():
        if thread.ident == ident:
            return f"thread {thread.name!r}"
    return f"thread {ident}"


def _nothing() -> None:
    pass


def engine_for(engine: Any) -> Engine:
    """Return the Engine that `engine` stands for: None and this module mean the calling thread's.

    Raises:
        TypeError: it is neither.
    """
    if engine is None or engine is sys.modules[__name__]:
        return Engine.instance()
    if isinstance(engine, Engine):
        return engine
    kind = "module" if isinstance(engine, ModuleType) else type(engine).__name__
    raise TypeError(f"engine= takes an Engine or the module pants_green.engine, not the {kind} {engine!r}")


# ---- fork

_bound: "weakref.WeakSet[Engine]" = weakref.WeakSet()
_fork_handler_registered = False


def _register_fork_handler() -> None:
    global _fork_handler_registered
    if not _fork_handler_registered and hasattr(os, "register_at_fork"):
        _fork_handler_registered = True
        os.register_at_fork(after_in_child=_after_fork_in_child)


def _after_fork_in_child() -> None:
    engines: Iterable[Engine] = list(_bound)
    for engine in engines:
        engine._after_fork()
    _running[:] = [engine for engine in _running if engine._thread_lives()]


# ---- the engine of the calling thread, as a module


def start(graceful_timeout: float | None = None) -> None:
    """Run this thread's engine until ``stop()``; see `Engine.start`."""
    Engine.instance().start(graceful_timeout)


def stop() -> None:
    """Make ``start()`` return; see `Engine.stop`."""
    Engine.instance().stop()


def poll(timeout: float | None = 0.2) -> bool:
    """Let the hub run until something was done; see `Engine.poll`."""
    return Engine.instance().poll(timeout)


def callback(function: Callable[..., object], /, *args: Any, **kwargs: Any) -> Timer:
    """Run `function` in the next hub turn; see `Engine.callback`."""
    return Engine.instance().callback(function, *args, **kwargs)


def loop(function: Callable[..., object], /, *args: Any, **kwargs: Any) -> Timer:
    """Run `function` in every hub turn; see `Engine.loop`."""
    return Engine.instance().loop(function, *args, **kwargs)


def defer(delay: float, function: Callable[..., object], /, *args: Any, **kwargs: Any) -> Timer:
    """Run `function` after `delay` seconds; see `Engine.defer`."""
    return Engine.instance().defer(delay, function, *args, **kwargs)


def cycle(interval: float, function: Callable[..., object], /, *args: Any, **kwargs: Any) -> Timer:
    """Run `function` every `interval` seconds; see `Engine.cycle`."""
    return Engine.instance().cycle(interval, function, *args, **kwargs)


def call_from_thread(function: Callable[..., object], /, *args: Any, **kwargs: Any) -> Timer:
    """Run `function` in an engine's thread; see `Engine.call_from_thread`.

    Which one: the calling thread's engine if it has one, else the one that runs, the first of them; if none does, the program's
    first, and that of the next thread that uses one if there is none yet.
    """
    engine: Engine | None = getattr(_instances, "engine", None) or next(iter(_running), _first_instance)
    if engine is None or not engine._thread_lives():
        engine = _awaited.setdefault("engine", Engine())
    return engine.call_from_thread(function, *args, **kwargs)


def run_in_thread(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run a blocking function in a thread of gevent's pool; see `Engine.run_in_thread`."""
    return Engine.instance().run_in_thread(function, *args, **kwargs)


def __getattr__(name: str) -> Any:
    """Give the attributes ``channels`` and ``latest_poll_time`` of this thread's engine."""
    if name in ("channels", "latest_poll_time"):
        return getattr(Engine.instance(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
