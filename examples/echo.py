"""An echo server: whatever is sent to it comes back.

Try it:  python examples/echo.py [PORT]  and in another terminal  nc localhost 4040  (or: telnet localhost 4040)
"""

import sys

from pants_green import Engine, Server, Stream


class Echo(Stream):
    def on_read(self, data):
        self.write(data)


def main():
    port = sys.argv[1] if len(sys.argv) > 1 else "4040"
    if not port.isdecimal():
        sys.exit(f"usage: {sys.argv[0]} [PORT]")
    try:
        server = Server(Echo).listen(int(port))
        port = server.local_address[1]
        print(f"Echoing on port {port}. Talk to it:  nc localhost {port}  (or: telnet localhost {port}).  Ctrl-C ends it.", flush=True)
        Engine.instance().start()
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("\nBye.")


if __name__ == "__main__":
    main()
