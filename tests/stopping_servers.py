"""Processes that come to a graceful end, and the peers of one that is busy. JSON lines on stdout.

    python stopping_servers.py serve KIND GRACEFUL_TIMEOUT [CERTIFICATE KEY]
    python stopping_servers.py crowd PORT COUNT [AUTHORITY]

``serve`` says its port, and in the end how many requests it has answered. Each of a ``crowd`` has some requests under way at any
time, until the server ends the connection; it says when all of them are busy, and in the end how many whole answers have come.
"""

import json
import logging
import os
import resource
import select
import signal
import socket
import ssl
import sys

import gevent

from pants_green import Connection, Server, engine

#: Seconds after which a process ends in any case.
LAST_RESORT = 30

#: Bytes of an answer, its end of line included, and requests of one connection that are under way at a time.
ANSWER = 10_000
UNDER_WAY = 3


def say(**what):
    print(json.dumps(what), flush=True)


def answer_to(request):
    return request.ljust(ANSWER - 1, b".") + b"\n"


# ---- servers


class Busy(Connection):
    """Answers a line by a long one; now and then this takes a while."""

    read_delimiter = b"\n"
    answered = 0

    def on_read(self, request):
        if request.endswith(b"7"):
            gevent.sleep(0.005)
        self.write(answer_to(request))
        Busy.answered += 1


class Stuck(Busy):
    def on_read(self, request):
        self.write("one moment\n")
        gevent.sleep(LAST_RESORT)


class Stays(Busy):
    def on_stopping(self, deadline):
        self.write("no\n")


class Forks(Busy):
    """Forks when it is asked to end; the child says what it finds."""

    def on_stopping(self, deadline):
        self.write("written before the fork\n")
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            self.write("goodbye\n")
            self.end()
            return
        while not self.server.closed:
            gevent.sleep(0)
        say(connected=self.connected, channels=len(self.engine.channels), reason=self.server.close_reason)
        os._exit(0)


KINDS = {"busy": Busy, "stuck": Stuck, "stays": Stays, "forks": Forks}


def serve(kind, timeout, certfile=None, keyfile=None):
    logging.basicConfig()
    options = {"certfile": certfile, "keyfile": keyfile} if certfile else None
    server = Server(KINDS[kind], ssl_options=options).listen(("127.0.0.1", 0))
    say(port=server.local_address[1])
    engine.start(graceful_timeout=float(timeout))
    say(answered=Busy.answered)


# ---- their peers


class Peer:
    """One of the crowd.

    Attributes:
        whole: answers that have come.
        wrong: what has come and should not have.
    """

    def __init__(self, number, port, context):
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=LAST_RESORT)
        if context is not None:
            self.sock = context.wrap_socket(self.sock, server_hostname="localhost", suppress_ragged_eofs=False)
        self.sock.setblocking(False)
        self.number = number
        self.sent = self.whole = 0
        self.got = bytearray()
        self.wrong = None
        for _ in range(UNDER_WAY):
            self.ask()

    def ask(self):
        self.sock.send(b"%d.%d\n" % (self.number, self.sent))
        self.sent += 1

    def hear(self):
        """Take in what has come, and ask for more; tell whether there may be more."""
        try:
            while data := self.sock.recv(1 << 16):
                self.got += data
                while len(self.got) >= ANSWER:
                    self.take()
                    self.ask()
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError as error:
            self.wrong = repr(error)
        else:
            self.wrong = repr(bytes(self.got)) if self.got else self.wrong
        self.sock.close()
        return False

    def take(self):
        answer = bytes(self.got[:ANSWER])
        del self.got[:ANSWER]
        if answer != answer_to(b"%d.%d" % (self.number, self.whole)):
            self.wrong = repr(answer)
        self.whole += 1


def crowd(port, count, authority=None):
    context = ssl.create_default_context(cafile=authority) if authority else None
    everybody = [Peer(number, int(port), context) for number in range(int(count))]
    poll = select.poll()
    open_ones = {}
    for one in everybody:
        open_ones[one.sock.fileno()] = one
        poll.register(one.sock, select.POLLIN)
    idle = set(everybody)
    while open_ones and (ready := poll.poll(LAST_RESORT * 1000)):
        for descriptor, _ in ready:
            one = open_ones[descriptor]
            if not one.hear():
                poll.unregister(descriptor)
                del open_ones[descriptor]
            if idle and one.whole > UNDER_WAY:
                idle.discard(one)
                if not idle:
                    say(busy=len(everybody))
    say(whole=sum(one.whole for one in everybody), wrong=[one.wrong for one in everybody if one.wrong][:3])


def main(what, *arguments):
    signal.alarm(LAST_RESORT)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    {"serve": serve, "crowd": crowd}[what](*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
