"""What the load tests of flow control look at from outside: a server, a proxy or a broadcaster as a process of its own.

    python flow_servers.py answers|proxy [PORT]

Prints its port as a JSON line. Each line on stdin is answered by a line with its memory and what it has pending; it ends with stdin.
"""

import json
import resource
import sys
import time

import gevent
from gevent.os import tp_read

from pants_green import Client, Connection, Engine, Server

PAGE = resource.getpagesize()

#: Seconds after which it ends in any case.
LAST_RESORT = 40.0


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


class Echo(Connection):
    def on_read(self, data):
        self.write(data)


class Lines(Connection):
    """Answers each line by more than it has got."""

    read_delimiter = b"\n"

    def on_read(self, line):
        self.write(line * 8)


class Passing:
    """One direction of the proxy: what this end gets goes out at the other, no faster than it leaves."""

    other = None

    def on_read(self, data):
        self.other.write(data)
        self.other.drain()

    def on_close(self):
        if self.other is not None:
            self.other.end()


class Far(Passing, Client):
    pass


class Near(Passing, Connection):
    def on_connect(self):
        self.other = Far()
        self.other.other = self
        self.pause()
        self.other.on_connect = self.resume
        self.other.connect(("127.0.0.1", int(sys.argv[2])))


KINDS = {"echo": Echo, "lines": Lines, "proxy": Near}


def main():
    engine = Engine.instance()
    server = Server(KINDS[sys.argv[1]]).listen(("127.0.0.1", 0))
    most = 0

    def look():
        nonlocal most
        most = max([most, *(channel._pending for channel in engine.channels if isinstance(channel, (Connection, Client)))])

    engine.loop(look)
    before = resident()
    print(json.dumps({"port": server.local_address[1]}), flush=True)

    def answer():
        while tp_read(0, 100):
            print(json.dumps({"grown": resident() - before, "peak": peak() - before, "pending": most}), flush=True)
        engine.stop()

    gevent.spawn(answer)
    engine.defer(LAST_RESORT, sys.exit, "nobody has ended this in time")
    began = time.monotonic()
    engine.start()
    assert time.monotonic() - began < LAST_RESORT


if __name__ == "__main__":
    main()
