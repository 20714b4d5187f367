"""Programs run as child processes, for the tests of the examples and of the README.

Everything has a deadline, and only the process that was started here is ever ended. Stdlib names only: the same under gevent.monkey.
"""

import contextlib
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: Seconds after which anything here has failed.
PATIENCE = 15.0


class Child:
    """A Python program at work; a context manager that ends it."""

    def __init__(self, *arguments, cwd=None):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self.process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        )
        self.output = ""
        self._lines = queue.Queue()
        self._reader = threading.Thread(target=self._read, name="output of a child", daemon=True)
        self._reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        try:
            if self.process.poll() is None:
                self.process.terminate()
                try:
                    self.process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self.process.wait()
        finally:
            self._reader.join(PATIENCE)
            self.process.stdout.close()
            self.errors.close()

    def _read(self):
        for line in iter(self.process.stdout.readline, b""):
            self._lines.put(line.decode())
        self._lines.put(None)

    def expect(self, pattern):
        """Wait for a line of its output that `pattern` is found in, and return the match."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                line = self._lines.get(timeout=max(deadline - time.monotonic(), 0.001))
            except queue.Empty:
                line = None
            if line is None:
                raise AssertionError(f"no line of the output has {pattern!r}:\n{self.output}\n{self.error_output()}")
            self.output += line
            found = re.search(pattern, line)
            if found:
                return found

    def port(self):
        """Return the port that it says it listens on."""
        return int(self.expect(r"port (\d+)")[1])

    def end(self):
        """Wait until it ends by itself and return its exit code; afterwards `output` is complete."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        while (line := self._lines.get_nowait()) is not None:
            self.output += line
        self._lines.put(None)
        return code

    def error_output(self):
        """Return what it has written to stderr so far."""
        self.errors.seek(0)
        return self.errors.read().decode()


class Peer:
    """The other end of a connection: a plain socket."""

    def __init__(self, port, host="127.0.0.1"):
        self.socket = socket.create_connection((host, port), timeout=PATIENCE)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def read(self, size):
        """Return the next `size` bytes, fewer only at the end."""
        data = b""
        while len(data) < size and (more := self.socket.recv(size - len(data))):
            data += more
        return data

    def rest(self):
        """End our side and return everything that still comes."""
        self.socket.shutdown(socket.SHUT_WR)
        return self.read(1 << 20)


def free_port():
    """Return a port on which nobody listens now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def wait_until_listening(child, port):
    """Return once `child`, which prints nothing, accepts connections on `port`."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with Peer(port) as peer:
                peer.rest()  # until it is through with us, so that nothing of this visit mixes with what the test does
            return
        except ConnectionRefusedError:
            if child.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"nobody listens on port {port}:\n{child.error_output()}") from None
        time.sleep(0.02)


@contextlib.contextmanager
def keyboard_interrupts():
    """Let children started meanwhile react to SIGINT, also if this process was told to ignore it (as ``... &`` does in a script)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
