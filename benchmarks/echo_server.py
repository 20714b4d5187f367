"""The server under test: ``python benchmarks/echo_server.py MODE PORT``.

MODE is ``echo`` (whatever is read is written back), ``line`` (one callback per CRLF-ended line, which writes it back) or
``change`` (the same for lines and bodies of 16 bytes in turn: each callback changes the delimiter). It listens on 127.0.0.1 and
prints READY.

The other modes are there to be measured against each other. Each cuts the load generator's lines in another way, and writes for
every chunk the same bytes, the line that it should have been, so that they differ in nothing but the cutting.
"""

import re
import struct
import sys

from pants_green import Engine, Server, Stream


class Echo(Stream):
    def on_read(self, data):
        self.write(data)


class Lines(Stream):
    read_delimiter = b"\r\n"
    buffer_size = 128 * 1024 * 1024

    def on_read(self, line):
        self.write(line + b"\r\n")


class Changing(Stream):
    read_delimiter = b"\r\n"
    in_body = False

    def on_read(self, data):
        if self.in_body:
            self.read_delimiter = b"\r\n"
            self.write(data)
        else:
            self.read_delimiter = 16
            self.write(data + b"\r\n")
        self.in_body = not self.in_body


def line_of(size):
    """Return a line of `size` bytes as the load generator sends it."""
    return bytes(ord("a") + place % 26 for place in range(size - 2)) + b"\r\n"


def cut(delimiter, size):
    """Return a class of streams that write a line of `size` bytes for each chunk."""
    line = line_of(size)

    class Cut(Stream):
        read_delimiter = delimiter

        def on_read(self, data):
            self.write(line)

    return Cut


class Pairs(Stream):
    read_delimiter = struct.Struct("!II")
    line = line_of(8)

    def on_read(self, first, second):
        self.write(self.line)


MODES = {
    "echo": Echo,
    "line": Lines,
    "change": Changing,
    "bytes8": cut(b"\r\n", 8),
    "bytes64": cut(b"\r\n", 64),
    "int8": cut(8, 8),
    "int64": cut(64, 64),
    "struct8": Pairs,
    "regex64": cut(re.compile(rb"\r?\n"), 64),
}


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in MODES or not sys.argv[2].isdigit():
        sys.exit(f"usage: {sys.argv[0]} {{{'|'.join(MODES)}}} PORT")
    Server(MODES[sys.argv[1]]).listen(("127.0.0.1", int(sys.argv[2])))
    print("READY", flush=True)
    Engine.instance().start()


if __name__ == "__main__":
    main()
