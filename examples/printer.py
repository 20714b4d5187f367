"""Prints whatever arrives, in the pieces in which it arrives.

Try it:  python examples/printer.py [PORT]  and in another terminal  nc localhost 4040  (or: telnet localhost 4040)
"""

import sys

from pants_green import Connection, Server, engine


class Printer(Connection):
    def on_connect(self):
        print(f"{self.remote_address[0]} connected", flush=True)

    def on_read(self, data):
        print(f"{self.remote_address[0]} sent {data!r}", flush=True)

    def on_close(self):
        print(f"{self.remote_address[0]} left: {self.close_reason}", flush=True)


try:
    server = Server(Printer).listen(int(sys.argv[1]) if len(sys.argv) > 1 else 4040)
    print(f"Printing what comes in on port {server.local_address[1]}. Ctrl-C ends it.", flush=True)
    engine.start()
except (OSError, ValueError) as error:
    sys.exit(str(error))
except KeyboardInterrupt:
    print("\nBye.")
