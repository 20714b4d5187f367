"""Forwards connections: whoever connects here talks to HOST:PORT. Neither side sends faster than the other one takes.

Try it:  python -m http.server 8000  and  python examples/proxy.py 4040 localhost:8000  and then  curl localhost:4040
"""

import sys
from contextlib import suppress

from pants_green import ChannelClosed, Server, Stream, engine


class Side(Stream):
    allow_half_open = True  # when one direction has ended, the other goes on

    def on_connect(self):
        if self.server is None:  # this is the far side
            self.other.resume()
            return
        self.pause()  # there is nobody yet to pass anything on to
        host, port = sys.argv[2].rsplit(":", 1)
        self.other = Side().connect(host, int(port))
        self.other.other = self

    def on_read(self, data):
        with suppress(ChannelClosed):  # should the other side be gone, its on_close ends this one
            self.other.write(data)
            self.other.drain()  # nothing more is read here before the other side has taken most of it

    def on_end(self, rest):
        with suppress(ChannelClosed):
            self.other.write_eof()

    def on_close(self):
        self.other.end()


with suppress(KeyboardInterrupt):
    print(f"{Server(Side).listen(int(sys.argv[1]))} forwards to {sys.argv[2]}. Ctrl-C ends it.", flush=True)
    engine.start()
