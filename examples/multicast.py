"""Who else is here? Every copy of this program calls out to a multicast group, and the others say their names.

Try it:  python examples/multicast.py [PORT [NAME [INTERFACE]]]  in several terminals, on one machine or on several of a network:
python examples/multicast.py 4040 Ann  and  python examples/multicast.py 4040 Bob
"""

import sys

from pants_green import Datagram, engine

GROUP = "239.77.71.1"


class Neighbour(Datagram):
    encoding = "utf-8"

    def on_read(self, text):
        word, _, name = text.partition(" ")
        if name != me and word in ("hello", "welcome"):
            print(f"{name} is here, at {self.remote_address[0]}", flush=True)
            if word == "hello":
                self.write(f"welcome {me}")  # to the one who has called, and to nobody else


me = sys.argv[2] if len(sys.argv) > 2 else "somebody"
interface = sys.argv[3] if len(sys.argv) > 3 else None
try:
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 4040
    hears = Neighbour().listen(("", port), reuse_address=True)  # several programs of one machine may hear the same
    hears.join(GROUP, interface)
    calls = Neighbour()
    calls.multicast_interface = interface
    calls.write(f"hello {me}", (GROUP, hears.local_address[1]))
    print(f"{me} listens on port {hears.local_address[1]}. Ctrl-C ends it.", flush=True)
    engine.start()
except (OSError, ValueError) as error:
    sys.exit(str(error))
except KeyboardInterrupt:
    print("\nBye.")
