"""A chat: asks everybody for a name, announces who joins and who leaves, passes each line on to all others; says goodbye at the end.

Try it:  python examples/chat.py [PORT]  and in two other terminals  nc localhost 4040  (or: telnet localhost 4040)
"""

import sys

from pants_green import Connection, Server, engine


class Talker(Connection):
    read_delimiter, encoding, name = "\n", "utf-8", ""  # on_read gets str

    def on_connect(self):
        self.write("Your name? ")

    def on_read(self, line):
        known, self.name = self.name, self.name or line.strip() or "somebody"  # the first line is the name
        self.tell_the_others(f"{self.name}: {line.rstrip()}" if known else f"* {self.name} has joined")

    def on_stopping(self, deadline):
        self.write("* The chat is over. Goodbye!\r\n")
        self.end()

    def on_close(self):
        if self.name and not self.stopping:
            self.tell_the_others(f"* {self.name} has left")

    def tell_the_others(self, line):
        for other in [one for one in self.server.channels.values() if one is not self and one.name]:
            other.write(f"{line}\r\n")


try:
    port = Server(Talker).listen(int(sys.argv[1]) if len(sys.argv) > 1 else 4040).local_address[1]
    engine.callback(print, f"Talk on port {port}. Ctrl-C ends it.", flush=True)
    engine.start(graceful_timeout=5)  # Ctrl-C, or SIGTERM, calls on_stopping of everybody
except (OSError, ValueError) as error:
    sys.exit(str(error))
