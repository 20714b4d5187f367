"""A chat: asks everybody for a name, announces who joins and who leaves, and passes each line on to all others.

Try it:  python examples/chat.py [PORT]  and in two other terminals  nc localhost 4040  (or: telnet localhost 4040)
"""

import sys

from pants_green import Connection, Server, engine


class Talker(Connection):
    read_delimiter = "\n"
    encoding = "utf-8"  # on_read and read() get str
    name = ""

    def on_connect(self):
        self.write("Your name? ")
        self.name = self.read().strip() or "somebody"  # only this connection waits; should the peer leave meanwhile, that was all
        self.tell_the_others(f"* {self.name} has joined")

    def on_read(self, line):
        self.tell_the_others(f"{self.name}: {line.rstrip()}")

    def on_close(self):
        if self.name:
            self.tell_the_others(f"* {self.name} has left")

    def tell_the_others(self, line):
        for other in self.server.channels.values():
            if other is not self and other.name:
                other.write(f"{line}\r\n")


try:
    server = Server(Talker).listen(int(sys.argv[1]) if len(sys.argv) > 1 else 4040)
    print(f"Talk on port {server.local_address[1]}. Ctrl-C ends it.", flush=True)
    engine.start()
except KeyboardInterrupt:
    print("\nBye.")
