"""The servers of the load tests as a process of its own, whose memory, descriptors and CPU time can be looked at.

Prints its ports as one JSON line. On the control port it answers a line with a line of JSON. It ends with that connection.
"""

import gc
import hashlib
import json
import logging
import os
import random
import resource
import socket
import sys
import time
from collections import Counter

import gevent
import gevent.socket
from gevent import monkey
from greenlet import greenlet

from pants_green import Connection, Engine, Server, Stream
from pants_green._lifecycle import CloseReason

PlainSocket = monkey.get_original("socket", "socket")

#: Seconds after which it ends in any case.
LAST_RESORT = 60.0

PAGE = resource.getpagesize()

#: Not a round number, so that a block more or less shows.
BLOCK = random.Random(5).randbytes((1 << 20) - 3)
BLOCKS = 100
PIECE = 64 << 10


class Echo(Connection):
    def on_read(self, data):
        self.write(data)


class EchoLines(Connection):
    read_delimiter = b"\n"
    buffer_size = 1 << 20

    def on_read(self, line):
        if line == b"end":
            self.end()
        elif line == b"close":
            self.close()
        else:
            self.write(line + b"\n")


class Raising(EchoLines):
    """Raises at every line, after the answer."""

    def on_read(self, line):
        super().on_read(line)
        self.flush()
        raise RuntimeError("as it was asked to")


class Guarded(EchoLines):
    """With every limit that it could hit."""

    idle_timeout = 45.0
    read_timeout = 45.0
    read_rate = 1 << 20
    chunk_rate = 1000
    callback_timeout = 45.0


class GuardedServer(Server):
    max_connections = 50_000
    max_connections_per_ip = 50_000
    max_connection_age = 300.0
    write_budget = 1 << 30
    deny = ("192.0.2.0/24",)


class Bulk(Connection):
    """Sends a lot, in one write or in many, and ends."""

    read_delimiter = b"\n"

    def on_read(self, request):
        blob = BLOCK * BLOCKS
        digest = hashlib.sha256(blob).hexdigest()
        if request == b"one":
            Control.bulk = {"size": len(blob), "sha256": digest, "rss": resident()}
            self.write(blob)
        else:
            pieces = [blob[start : start + PIECE] for start in range(0, len(blob), PIECE)]
            Control.bulk = {"size": len(blob), "sha256": digest, "rss": resident(), "pieces": len(pieces)}
            del blob
            for piece in pieces:
                self.write(piece)
        self.end()


class Ticker:
    """A short cycle, and the longest time that it was kept waiting."""

    count = 0
    longest = 0.0
    last = 0.0

    def __init__(self):
        self.last = time.monotonic()

    def __call__(self):
        now = time.monotonic()
        self.count += 1
        self.longest = max(self.longest, now - self.last)
        self.last = now


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def context_switches():
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


class Control(Connection):
    read_delimiter = b"\n"
    bulk = None
    ticker = None

    def on_read(self, command):
        self.write(json.dumps(getattr(self, "do_" + command.decode())()) + "\n")

    def on_close(self):
        self.engine.stop()

    def do_memory(self):
        return {"rss": resident(), "peak": peak()}

    def do_cpu(self):
        return {"cpu": time.process_time(), "wakeups": context_switches()}

    def do_channels(self):
        return {"channels": len(self.engine.channels)}

    def do_left(self):
        """What connections leave behind, this one included."""
        pool = self.engine._pool
        busy = sum(isinstance(one, greenlet) and not one.dead for one in gc.get_objects()) - len(pool)
        return {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "channels": len(self.engine.channels),
            "lingering": len(self.engine._lingering),
            "greenlets": busy,
            "made": pool.made,
        }

    def do_garbage_begin(self):
        gc.collect()
        gc.disable()
        return {}

    def do_garbage_end(self):
        """What only the collector would find, by type."""
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        found = Counter(type(one).__qualname__ for one in gc.garbage)
        gc.garbage.clear()
        gc.enable()
        return found

    def do_dial_nobody(self):
        """Dial a name that cannot be looked up, and a port on which nobody listens, a few times each."""

        def no_such_host(*args):
            raise socket.gaierror(socket.EAI_NONAME, "as it was asked to")

        before, gevent.socket.getaddrinfo = gevent.socket.getaddrinfo, no_such_host
        try:
            with PlainSocket() as taken:
                taken.bind(("127.0.0.1", 0))
                streams = [Stream().connect(where) for where in [("nobody.invalid", 1), taken.getsockname()] * 10]
                while not all(stream.closed for stream in streams):
                    gevent.sleep(0.005)
        finally:
            gevent.socket.getaddrinfo = before
        return {"failed": sum(stream.close_reason == CloseReason.CONNECT_FAILED for stream in streams)}

    def do_bulk(self):
        return self.bulk

    def do_tick(self):
        Control.ticker = Ticker()
        self.engine.cycle(0.01, Control.ticker)
        return {}

    def do_ticks(self):
        return {"count": self.ticker.count, "longest": self.ticker.longest}


def main():
    logging.basicConfig()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    engine = Engine.instance()
    make = {"guarded": GuardedServer}
    servers = {name: make.get(name, Server)(kind).listen(("127.0.0.1", 0)) for name, kind in KINDS.items()}
    print(json.dumps({name: server.local_address[1] for name, server in servers.items()}), flush=True)
    engine.defer(LAST_RESORT, sys.exit, "nobody has ended this in time")
    engine.start()


KINDS = {"echo": Echo, "lines": EchoLines, "guarded": Guarded, "raising": Raising, "bulk": Bulk, "control": Control}

if __name__ == "__main__":
    main()
