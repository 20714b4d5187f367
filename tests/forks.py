"""A child of the process of all tests, for what a fork does to channels that are open."""

import contextlib
import os

import gevent
from gevent import monkey
from peers import in_thread

__all__ = ["in_child"]

#: Of a patched process too: gevent's own waits in the hub of the thread that calls it, which hears of no child.
wait_for_process = monkey.get_original("os", "waitpid")


def in_child(function):
    """Call `function`, which returns a str, in a forked child; return what it returns, or the text of its error."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        said = "nothing"
        try:
            with gevent.Timeout(5):
                said = function()
        except BaseException as error:
            said = repr(error)
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as answer:
            return in_thread(answer.read).decode()
    finally:
        with contextlib.suppress(ChildProcessError):  # the hub has done it, where it looks after children
            in_thread(wait_for_process, pid, 0)
