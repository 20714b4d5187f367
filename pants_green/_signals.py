"""Waking a hub for signals.

Python's own handlers, such as that of Ctrl-C, run when the hub comes by. A signal that arrives in the instant between its last look
and its going to wait would be noticed only when something else happens, which on an idle server may be never.
"""

import os
import signal
from collections.abc import Callable
from typing import Any

__all__ = ["wake_for_signals"]

#: libev's flag for a descriptor that is to be read.
READ = 1


def wake_for_signals(loop: Any) -> Callable[[], None]:
    """Have every signal wake `loop`, if this is the main thread and nobody else has asked Python for the same.

    Returns:
        a function that ends it.

    *Source*: ``signal.set_wakeup_fd`` in the documentation of Python.
    """
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    try:
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    except ValueError:  # not the main thread, where no handler runs either
        before = None
    if before != -1:
        if before is not None:
            signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
        return _nothing
    watcher = loop.io(reader, READ)
    watcher.start(_drain, reader)

    def end() -> None:
        now = signal.set_wakeup_fd(-1)
        if now not in (-1, writer):
            signal.set_wakeup_fd(now)  # somebody else's by now
        watcher.stop()
        watcher.close()
        os.close(reader)
        os.close(writer)

    return end


def _drain(reader: int) -> None:
    """Hub: a signal came. Its handler runs before the hub waits again."""
    try:
        os.read(reader, 4096)
    except BlockingIOError:
        pass


def _nothing() -> None:
    pass
