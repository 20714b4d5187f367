"""The servers to measure against: ``python benchmarks/peers.py PEER MODE PORT [CERTFILE KEYFILE]``.

MODE is ``echo`` (whatever is read is written back), ``tls`` (the same over TLS, for which the two files are needed), ``line``
(split at CRLF; one callback, or one step of the loop, per line writes it back) or, for the two of gevent, ``change`` (lines and
bodies of 16 bytes in turn; the chunk is cut from the front of what was received, and the rest kept). All set TCP_NODELAY, listen
on 127.0.0.1 and print READY. PEER is one of

    gevent       a StreamServer and the loop that one writes by hand: a sendall for each line
    gevent-join  the same with the lines of one recv joined for one sendall: the best that such a loop can do
    asyncio      a Protocol with flow control
    uvloop       the same on uvloop
"""

import socket
import sys
from ssl import PROTOCOL_TLS_SERVER, SSLContext

EOL = b"\r\n"
BACKLOG = 1024
RECEIVE = 64 * 1024
BODY = 16


def ready():
    print("READY", flush=True)


def secure(context, files):
    """Return a context of ssl's, or of gevent's, with the certificate in two files."""
    context.load_cert_chain(*files)
    return context


def serve_gevent(mode, port, *files, joined=False):
    from gevent import ssl
    from gevent.server import StreamServer

    def echo(sock):
        while data := sock.recv(RECEIVE):
            sock.sendall(data)

    def each_line(sock, received=b""):
        while data := sock.recv(RECEIVE):
            *lines, received = (received + data).split(EOL)
            for line in lines:
                sock.sendall(line + EOL)

    def joined_lines(sock, received=b""):
        while data := sock.recv(RECEIVE):
            *lines, received = (received + data).split(EOL)
            answer = [line + EOL for line in lines]
            if answer:
                sock.sendall(b"".join(answer))

    def changing(sock, received=b"", in_body=False):
        while data := sock.recv(RECEIVE):
            received += data
            answer = []
            while len(received) >= BODY if in_body else EOL in received:
                if in_body:
                    chunk, received = received[:BODY], received[BODY:]
                else:
                    end = received.find(EOL)
                    chunk, received = received[:end] + EOL, received[end + len(EOL) :]
                in_body = not in_body
                if joined:
                    answer.append(chunk)
                else:
                    sock.sendall(chunk)
            if answer:
                sock.sendall(b"".join(answer))

    serve = {"echo": echo, "tls": echo, "line": joined_lines if joined else each_line, "change": changing}[mode]

    def handle(sock, address):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            serve(sock)
        except OSError:
            pass

    options = {"ssl_context": secure(ssl.SSLContext(PROTOCOL_TLS_SERVER), files)} if files else {}
    server = StreamServer(("127.0.0.1", port), handle, backlog=BACKLOG, **options)
    server.start()
    ready()
    server.serve_forever()


def serve_asyncio(mode, port, *files, run=None):
    import asyncio
    import logging

    # It would write a line for each answer to a load that has gone, and that takes the time of the next visit.
    logging.getLogger("asyncio").setLevel(logging.ERROR)

    class Echo(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport

        def data_received(self, data):
            self.transport.write(data)

        def pause_writing(self):
            self.transport.pause_reading()

        def resume_writing(self):
            self.transport.resume_reading()

    class Lines(Echo):
        received = b""

        def data_received(self, data):
            *lines, self.received = (self.received + data).split(EOL)
            for line in lines:
                self.line_received(line)

        def line_received(self, line):
            self.transport.write(line + EOL)

    async def main():
        # asyncio sets TCP_NODELAY where the socket says IPPROTO_TCP.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        context = secure(SSLContext(PROTOCOL_TLS_SERVER), files) if files else None
        protocol = Lines if mode == "line" else Echo
        server = await asyncio.get_running_loop().create_server(protocol, sock=listener, backlog=BACKLOG, ssl=context)
        ready()
        await server.serve_forever()

    (run or asyncio.run)(main())


def serve_uvloop(mode, port, *files):
    import uvloop

    serve_asyncio(mode, port, *files, run=uvloop.run)


def serve_gevent_joined(mode, port, *files):
    serve_gevent(mode, port, *files, joined=True)


PEERS = {"gevent": serve_gevent, "gevent-join": serve_gevent_joined, "asyncio": serve_asyncio, "uvloop": serve_uvloop}
MODES = dict.fromkeys(PEERS, ("echo", "tls", "line")) | dict.fromkeys(("gevent", "gevent-join"), ("echo", "tls", "line", "change"))


if __name__ == "__main__":
    peer, mode, port, *files = [*sys.argv[1:], "", "", ""] if len(sys.argv) < 4 else sys.argv[1:]
    if mode not in MODES.get(peer, ()) or not port.isdecimal() or len(files) != (2 if mode == "tls" else 0):
        sys.exit(f"usage: {sys.argv[0]} {{{'|'.join(PEERS)}}} {{echo|line|change}} PORT  or  ... tls PORT CERTFILE KEYFILE")
    PEERS[peer](mode, int(port), *files)
