"""An echo server on a Unix socket, for the programs of this machine: whatever is sent to it comes back.

Try it:  python examples/unix_echo.py [PATH]  and in another terminal  nc -U /tmp/echo.sock
(or: socat - UNIX-CONNECT:/tmp/echo.sock).  Only you, and root, can connect.
"""

import sys

from pants_green import Engine, UnixConnection, UnixServer


class Echo(UnixConnection):
    def on_connect(self):
        who = self.peer_credentials
        if who is not None:
            print(f"process {who.pid} of user {who.uid} has connected", flush=True)

    def on_read(self, data):
        self.write(data)


def main():
    path = sys.argv[1] if len(sys.argv) > 1 else "/tmp/echo.sock"
    server = UnixServer(Echo)
    try:
        server.listen(path, mode=0o600)
        print(f"Echoing on {path}. Talk to it:  nc -U {path}  (or: socat - UNIX-CONNECT:{path}).  Ctrl-C ends it.", flush=True)
        Engine.instance().start()
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        server.close()  # which removes the file
        print("\nBye.")


if __name__ == "__main__":
    main()
