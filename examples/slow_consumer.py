"""Sends a hundred ticks a second to everybody. Who reads too slowly misses some, and holds up nobody else.

Try it:  python examples/slow_consumer.py [PORT]  and in two other terminals  nc localhost 4040 | cut -c 1-12
Hold one of them up by Ctrl-Z for ten seconds, and let it go on by fg: there is a gap in its ticks, and none in the other's.
"""

import itertools
import socket
import sys

from pants_green import Connection, Server, engine


class Listener(Connection):
    write_limit = 32 * 1024  # bytes that may wait for this listener here ...
    overflow = "drop"  # ... and what becomes of ticks above that; "close" would send the listener away

    def on_connect(self):
        # The kernel would keep megabytes for a listener who does not read; no tick that waits there can be dropped.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)

    def on_close(self):
        print(f"{self.remote_address[1]} has left and missed {self.writes_dropped} ticks", flush=True)


def tick():
    line = f"tick {next(numbers):06}".ljust(999, ".") + "\n"
    for listener in server.channels.values():
        listener.write(line)  # never waits, as this is not the listener's own greenlet


try:
    server = Server(Listener).listen(int(sys.argv[1]) if len(sys.argv) > 1 else 4040)
    print(f"Ticking on port {server.local_address[1]}. Ctrl-C ends it.", flush=True)
    numbers = itertools.count(1)
    engine.cycle(0.01, tick)
    engine.start()
except (OSError, ValueError, KeyboardInterrupt) as end:
    sys.exit(str(end) or None)  # Ctrl-C has nothing to say
