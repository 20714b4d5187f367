r"""A binary protocol: each message is a kind (1 byte), a size (4 bytes) and a body of that size. So is each answer.

Try it:  python examples/binary_protocol.py [PORT]  and in another terminal
         python -c "import socket; s = socket.create_connection(('localhost', 4040)); s.sendall(b'\1\0\0\0\5hello'); print(s.recv(99))"
"""

import sys
from struct import Struct

from pants_green import Connection, Server, engine

ANSWERS = {1: bytes.upper, 2: bytes.swapcase}
LARGEST = 1024 * 1024


class Messages(Connection):
    read_delimiter = Struct("!BI")

    def on_read(self, kind, size):
        if kind not in ANSWERS or size > LARGEST:  # a size comes from outside: without a limit it could be 4 GiB
            self.abort()
            return
        body = self.read(size) if size else b""
        answer = ANSWERS[kind](body)
        self.write_packed(kind, len(answer))  # as the read_delimiter packs it
        self.write(answer)


try:
    server = Server(Messages).listen(int(sys.argv[1]) if len(sys.argv) > 1 else 4040)
    print(f"Answering messages on port {server.local_address[1]}. Ctrl-C ends it.", flush=True)
    engine.start()
except (OSError, ValueError) as error:
    sys.exit(str(error))
except KeyboardInterrupt:
    print("\nBye.")
