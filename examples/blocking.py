"""Callbacks that block: only their own connection waits, all others go on.

Try it:  python examples/blocking.py [PORT]  and in two other terminals  telnet localhost 4040  (or: nc -C localhost 4040)
Say "sleep 5" or "thread 5" in one; what you say in the other is answered meanwhile.
"""

import sys
import time

import gevent

from pants_green import Connection, Server, engine


class Patient(Connection):
    read_delimiter = b"\r\n"

    def on_read(self, line):
        match line.decode().split():
            case ["sleep", seconds]:
                gevent.sleep(float(seconds))  # or anything else that waits the gevent way
                self.write("slept\r\n")
            case ["thread", seconds]:
                engine.run_in_thread(time.sleep, float(seconds))  # what blocks for real goes to a thread
                self.write("slept in a thread\r\n")
            case _:
                self.write(line + b"\r\n")


try:
    server = Server(Patient).listen(int(sys.argv[1]) if len(sys.argv) > 1 else 4040)
    print(f"Listening on port {server.local_address[1]}. Ctrl-C ends it.", flush=True)
    engine.start()
except (OSError, ValueError) as error:
    sys.exit(str(error))
except KeyboardInterrupt:
    print("\nBye.")
