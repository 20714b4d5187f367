"""An echo server over TLS. Without a certificate it makes one of its own, for this machine, which nobody knows.

Try it:  python examples/tls_echo.py [PORT [CERTFILE KEYFILE]]  and in another terminal
         openssl s_client -connect localhost:4040 -quiet
"""

import subprocess
import sys
import tempfile

from pants_green import Connection, Server, engine

SELF_SIGNED = "openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1"


class Echo(Connection):
    def on_ssl_handshake(self):
        self.write(f"You speak {self.tls_version}.\n")

    def on_read(self, data):
        self.write(data)


def make_certificate(folder):
    certificate, key = f"{folder}/certificate.pem", f"{folder}/key.pem"
    subprocess.run([*SELF_SIGNED.split(), "-out", certificate, "-keyout", key], check=True, stderr=subprocess.DEVNULL)
    return certificate, key


try:
    port, *files = sys.argv[1:] or ["4040"]
    with tempfile.TemporaryDirectory() as folder:
        certfile, keyfile = files or make_certificate(folder)
        server = Server(Echo, ssl_options={"certfile": certfile, "keyfile": keyfile}).listen(int(port))
        port = server.local_address[1]
        print(f"Echoing on port {port}. Talk to it:  openssl s_client -connect localhost:{port} -quiet  Ctrl-C ends it.", flush=True)
        engine.start()
except (OSError, ValueError, KeyboardInterrupt) as end:
    sys.exit(str(end) or None)  # Ctrl-C has nothing to say
