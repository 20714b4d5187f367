r"""A Framer of one's own: packets as SLIP frames them (RFC 1055). Each packet comes back reversed.

Try it:  python examples/slip.py [PORT]  and in another terminal
         python -c "import socket; s = socket.create_connection(('localhost', 4040)); s.sendall(b'hello\300'); print(s.recv(99))"
"""

import sys

from pants_green import Connection, Server, engine
from pants_green.framing import Framer

END, ESC, ESC_END, ESC_ESC = b"\xc0", b"\xdb", b"\xdb\xdc", b"\xdb\xdd"


class Slip(Framer[bytes]):
    def find(self, data, start, searched):
        end = data.find(END, start + searched)
        if end < 0:
            return None  # not complete, and nobody knows how much is missing
        return bytes(data[start:end]).replace(ESC_END, END).replace(ESC_ESC, ESC), end + 1

    def pack(self, packet):
        return END + packet.replace(ESC, ESC_ESC).replace(END, ESC_END) + END


class Packets(Connection):
    read_delimiter = Slip()

    def on_read(self, packet):
        if packet:  # between two packets there may be more than one END
            self.write_packed(packet[::-1])


try:
    server = Server(Packets).listen(int(sys.argv[1]) if len(sys.argv) > 1 else 4040)
    print(f"SLIP on port {server.local_address[1]}. Ctrl-C ends it.", flush=True)
    engine.start()
except (OSError, ValueError, KeyboardInterrupt) as end:
    sys.exit(str(end) or None)  # Ctrl-C has nothing to say
