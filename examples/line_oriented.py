"""Prints what arrives line by line, however it was cut on its way. A line ends in CRLF.

Try it:  python examples/line_oriented.py [PORT]  and in another terminal  telnet localhost 4040  (or: nc -C localhost 4040)
"""

import sys

from pants_green import Connection, Server, engine


class LineOriented(Connection):
    def on_connect(self):
        self.read_delimiter = b"\r\n"

    def on_read(self, line):
        print(f"line: {line.decode(errors='replace')}", flush=True)

    def on_end(self, rest):
        if rest:
            print(f"not a whole line: {rest!r}", flush=True)


try:
    server = Server(LineOriented).listen(int(sys.argv[1]) if len(sys.argv) > 1 else 4040)
    print(f"Printing lines that come in on port {server.local_address[1]}. Ctrl-C ends it.", flush=True)
    engine.start()
except (OSError, ValueError) as error:
    sys.exit(str(error))
except KeyboardInterrupt:
    print("\nBye.")
