"""Forwards connections: whoever connects here talks to HOST:PORT. Neither side sends faster than the other one takes.

Try it:  python -m http.server 8000  and  python examples/proxy.py 4040 localhost:8000  and then  curl localhost:4040
"""

import sys
from contextlib import suppress

from pants_green import ChannelClosed, Server, Stream, engine


class Side(Stream):
    allow_half_open = True  # when one direction has ended, the other goes on

    def on_connect(self):
        self.pause()  # there is nobody yet to pass anything on to
        self.other = Side()
        self.other.other, self.other.on_connect = self, self.resume
        self.other.connect(host, int(far_port))

    def on_read(self, data):
        with suppress(ChannelClosed):  # should the other side be gone, its on_close ends this one
            self.other.write(data)
            self.other.drain()  # nothing more is read here before the other side has taken most of it

    def on_end(self, rest):
        with suppress(ChannelClosed):
            self.other.write_eof()

    def on_close(self):
        self.other.end()


try:
    port, (host, _, far_port) = (sys.argv[1], sys.argv[2].rpartition(":")) if len(sys.argv) == 3 else sys.exit(__doc__)
    print(f"{Server(Side).listen(int(port))} forwards to {host}:{int(far_port)}. Ctrl-C ends it.", flush=True)
    engine.start()
except (OSError, ValueError, KeyboardInterrupt) as end:
    sys.exit(str(end) or None)  # Ctrl-C has nothing to say
