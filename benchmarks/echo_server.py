"""The server under test: ``python benchmarks/echo_server.py MODE PORT [FILE | CERTFILE KEYFILE]``.

MODE is ``echo`` (whatever is read is written back), ``tls`` (the same over TLS; without a certificate it makes one), ``udp`` (the
same for packets), ``sendfile`` (each connection gets FILE), ``line`` (one callback per CRLF-ended line, which writes it back) or
``change`` (the same for lines and bodies of 16 bytes in turn: each callback changes the delimiter). It listens on 127.0.0.1 and
prints READY.

The other modes are there to be measured against each other. Each cuts the load generator's lines in another way, and writes for
every chunk the same bytes, the line that it should have been, so that they differ in nothing but the cutting.
"""

import argparse
import os
import re
import ssl
import struct
import subprocess
import tempfile

from pants_green import Datagram, Engine, Server, Stream


class Echo(Stream):
    def on_read(self, data):
        self.write(data)


class Packets(Datagram):
    def on_read(self, data):
        self.write(data)


class Files(Stream):
    path = os.devnull

    def on_connect(self):
        with open(self.path, "rb") as file:
            self.write_file(file)
        self.end()


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
    "udp": Packets,
    "sendfile": Files,
    "echo": Echo,
    "tls": Echo,
    "line": Lines,
    "change": Changing,
    "bytes8": cut(b"\r\n", 8),
    "bytes64": cut(b"\r\n", 64),
    "int8": cut(8, 8),
    "int64": cut(64, 64),
    "struct8": Pairs,
    "regex64": cut(re.compile(rb"\r?\n"), 64),
}


def options_of(cert, key):
    """Return what startSSL() takes; without a certificate that of one which lives as long as this process."""
    if cert is not None:
        return {"certfile": cert, "keyfile": key}
    with tempfile.TemporaryDirectory() as folder:
        cert, key = (os.path.join(folder, name) for name in ("cert.pem", "key.pem"))
        make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout", key, "-out", cert]
        subprocess.run(make, check=True, stderr=subprocess.DEVNULL)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(cert, key)
        return context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("port", type=int)
    parser.add_argument("files", nargs="*", help="what to send; or the certificate and its key, in the place of --cert and --key")
    parser.add_argument("--cert")
    parser.add_argument("--key")
    given = parser.parse_args()
    if given.mode == "sendfile":
        if not given.files:
            parser.error("sendfile takes the FILE that is to be sent")
        Files.path = given.files[0]
    server = Packets() if given.mode == "udp" else Server(MODES[given.mode])
    if given.mode == "tls":
        cert, key = (*given.files, None, None)[:2]
        server.startSSL(options_of(given.cert or cert, given.key or key))
    server.listen(("127.0.0.1", given.port))
    print("READY", flush=True)
    Engine.instance().start()


if __name__ == "__main__":
    main()
