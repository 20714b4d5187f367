"""Fetches a page over TLS and prints it: the head, then the body by its length, in chunks or up to the end.

Try it:  python examples/http_client.py https://www.python.org/about [CAFILE]
"""

import sys
from urllib.parse import urlsplit

from pants_green import Client, engine


class Page(Client):
    read_delimiter = b"\r\n"
    complete = False

    def on_connect(self):
        self.write(f"GET {url._replace(scheme='', netloc='').geturl() or '/'} HTTP/1.1\r\nHost: {url.netloc}\r\nConnection: close\r\n\r\n")
        show(head := self.read(b"\r\n\r\n") + b"\r\n\r\n")
        headers = dict(line.partition(b":")[::2] for line in head.lower().split(b"\r\n"))
        if b"chunked" in headers.get(b"transfer-encoding", b""):
            while size := int(self.read().partition(b";")[0], 16):
                show(self.read(size + 2)[:-2])
        else:
            self.complete = (left := int(headers.get(b"content-length", -1))) < 0  # to the end, then: were that cut, there is a close_error
            while left:
                left -= show(self.read(None))
        self.complete = True
        self.end()

    def on_close(self):
        sys.exit(self.close_error or (None if self.complete else "the answer is not complete"))


url, show = urlsplit("".join(sys.argv[1:2])), sys.stdout.buffer.write
try:
    Page(ssl_options={"ca_certs": (sys.argv[2:] or [None])[0]}).connect(url.hostname or sys.exit(__doc__), url.port or 443)
    engine.start()
except (OSError, ValueError, KeyboardInterrupt) as end:
    sys.exit(str(end) or None)  # Ctrl-C has nothing to say
