"""Splits what arrives at commas, semicolons and ends of lines, and answers each word by its length.

Try it:  python examples/regex_split.py [PORT]  and in another terminal  nc localhost 4040  (or: telnet localhost 4040)
"""

import re
import sys

from pants_green import Connection, Server, engine


class Words(Connection):
    # Each of these is complete as soon as it matches. One that could go on, such as rb"[,;] *", would depend on how the bytes
    # are cut on their way: the blank behind a comma may not have arrived yet.
    read_delimiter = re.compile(rb"[,;]|\r?\n")

    def on_read(self, word):
        word = word.strip()
        if word:
            self.write(b"%s: %d\r\n" % (word, len(word)))


try:
    server = Server(Words).listen(int(sys.argv[1]) if len(sys.argv) > 1 else 4040)
    print(f"Splitting what comes in on port {server.local_address[1]}. Ctrl-C ends it.", flush=True)
    engine.start()
except (OSError, ValueError) as error:
    sys.exit(str(error))
except KeyboardInterrupt:
    print("\nBye.")
