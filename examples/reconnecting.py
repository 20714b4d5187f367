"""Prints the lines that a server sends. When it is lost, or not there yet, dials again, ever more patiently; "bye" is the end.

Try it:  python examples/reconnecting.py [PORT]  and in another terminal, now and again,  nc -l 4040  (Ctrl-C there loses it)
"""

import sys

from pants_green import CloseReason, ReconnectingClient, engine


class Follower(ReconnectingClient):
    read_delimiter = b"\n"
    encoding = "utf-8"
    initial_delay, max_delay = 0.2, 10.0  # seconds; twice as long after each failure, a random part of it

    def on_connect(self):
        print(f"connected to port {self.remote_address[1]}", flush=True)

    def on_read(self, line):
        print(f"line: {line}", flush=True)
        if line == "bye":
            self.stop()

    def on_connect_error(self, exception):
        print(exception.strerror, flush=True)

    def on_reconnect(self, delay):
        print(f"{self.close_reason}; once more in {delay:.1f} seconds", flush=True)

    def on_close(self):
        if self.close_reason is CloseReason.ENDED_HERE:  # by stop()
            engine.stop()


try:
    Follower().connect("localhost", int(sys.argv[1]) if len(sys.argv) > 1 else 4040)
    engine.start()
except (OSError, ValueError, KeyboardInterrupt) as end:
    sys.exit(str(end) or None)  # Ctrl-C has nothing to say
