"""The servers of the TLS load tests as a process of its own, whose memory, descriptors and garbage can be looked at.

    python tls_load_servers.py CERTIFICATE KEY

Prints its ports as one JSON line, and answers on the control port as ``load_servers.py``, on which it stands.
"""

import json
import logging
import os
import re
import resource
import sys
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # gevent.monkey runs a program without its folder

from load_servers import LAST_RESORT, Control, Echo, EchoLines

from pants_green import Engine, Server

#: What an honest peer says.
HONEST = re.compile(rb"good \d+|end|close|half a li")


class Lines(EchoLines):
    """Echoes lines, and keeps those that no honest peer has said."""

    def on_connect(self):
        Told.happened["on_connect"] += 1

    def on_read(self, line):
        Told.happened["on_read"] += 1
        if not HONEST.fullmatch(line):
            Told.strange.append(repr(line[:100]))
        super().on_read(line)

    def on_end(self, rest):
        if rest and not HONEST.fullmatch(rest):
            Told.strange.append(repr(rest[:100]))

    def on_ssl_error(self, exception):
        Told.happened["on_ssl_error"] += 1

    def on_close(self):
        Told.happened["on_close"] += 1


class SecureServer(Server):
    def on_ssl_wrap_error(self, sock, addr, exception):
        Told.happened["on_ssl_wrap_error"] += 1


class Told(Control):
    """The control connection, which knows of TLS."""

    happened = Counter()  # noqa: RUF012
    strange = []  # noqa: RUF012
    secure = {}  # noqa: RUF012

    def do_happened(self):
        return {**self.happened, "strange": self.strange}

    def do_greeted(self):
        """How many handshakes are going on."""
        return {name: len(server._greetings) for name, server in self.secure.items()}

    def do_forget(self):
        self.happened.clear()
        return {}


def main():
    logging.basicConfig(level=logging.CRITICAL)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    engine = Engine.instance()
    certificate = {"certfile": sys.argv[1], "keyfile": sys.argv[2], "handshake_timeout": 20}
    Told.secure = {name: SecureServer(kind, ssl_options=certificate).listen(("127.0.0.1", 0)) for name, kind in KINDS.items()}
    servers = {**Told.secure, "control": Server(Told).listen(("127.0.0.1", 0))}
    print(json.dumps({name: server.local_address[1] for name, server in servers.items()}), flush=True)
    engine.defer(LAST_RESORT, sys.exit, "nobody has ended this in time")
    engine.start()


KINDS = {"echo": Echo, "lines": Lines, "plain_lines": EchoLines}

if __name__ == "__main__":
    main()
