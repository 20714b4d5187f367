"""The server under test: ``python benchmarks/echo_server.py MODE PORT``.

MODE is ``echo`` (whatever is read is written back) or ``line`` (one callback per CRLF-ended line, which writes it back). It
listens on 127.0.0.1 and prints READY.
"""

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


MODES = {"echo": Echo, "line": Lines}


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in MODES or not sys.argv[2].isdigit():
        sys.exit(f"usage: {sys.argv[0]} {{{'|'.join(MODES)}}} PORT")
    Server(MODES[sys.argv[1]]).listen(("127.0.0.1", int(sys.argv[2])))
    print("READY", flush=True)
    Engine.instance().start()


if __name__ == "__main__":
    main()
