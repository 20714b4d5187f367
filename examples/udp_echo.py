"""A UDP echo server: every packet goes back to its sender.

Try it:  python examples/udp_echo.py [PORT]  and in another terminal  nc -u 127.0.0.1 4040
"""

import sys

from pants_green import Datagram, Engine


class Echo(Datagram):
    def on_read(self, data):
        self.write(data)  # to self.remote_address, as long as this runs


def main():
    port = sys.argv[1] if len(sys.argv) > 1 else "4040"
    if not port.isdecimal():
        sys.exit(f"usage: {sys.argv[0]} [PORT]")
    try:
        echo = Echo().listen(int(port))
        port = echo.local_address[1]
        print(f"Echoing packets on port {port}. Talk to it:  nc -u 127.0.0.1 {port}.  Ctrl-C ends it.", flush=True)
        Engine.instance().start()
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("\nBye.")


if __name__ == "__main__":
    main()
