"""A line protocol that begins in clear text and goes on in TLS, as SMTP does (RFC 3207): EHLO, STARTTLS, NOOP, QUIT.

Try it:  openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -keyout key.pem -out certificate.pem
         python examples/starttls.py 4040 certificate.pem key.pem  and  openssl s_client -connect localhost:4040 -starttls smtp -crlf -quiet
"""

import sys

from pants_green import Connection, Server, engine


class Session(Connection):
    read_delimiter = b"\r\n"

    def on_connect(self):
        self.write("220 localhost\r\n")

    def on_read(self, line):
        match line.decode(errors="replace").upper().split():
            case ["EHLO", *_]:
                self.write("250 localhost\r\n" if self.ssl_enabled else "250-localhost\r\n250 STARTTLS\r\n")
            case ["STARTTLS"] if not self.ssl_enabled:
                self.write("220 go ahead\r\n")  # the last that goes out in clear text
                self.startSSL({"certfile": certfile, "keyfile": keyfile})
            case ["NOOP"]:
                self.write(f"250 {self.tls_version if self.ssl_enabled else 'clear text'}\r\n")
            case ["QUIT"]:
                self.write("221 bye\r\n")
                self.end()
            case _:
                self.write("502 no such command here\r\n")


try:
    port, certfile, keyfile = sys.argv[1:] if len(sys.argv) == 4 else sys.exit(__doc__)
    print(f"Listening on port {Server(Session).listen(int(port)).local_address[1]}. Ctrl-C ends it.", flush=True)
    engine.start()
except (OSError, ValueError, KeyboardInterrupt) as end:
    sys.exit(str(end) or None)  # Ctrl-C has nothing to say
