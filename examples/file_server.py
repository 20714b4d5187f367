"""Serves the files of a directory: a line with a name is answered by a line with the file's size and then its content.

Try it:  python examples/file_server.py [PORT [DIRECTORY]]  and in another terminal  nc localhost 4040  where you type README.rst
"""

import os
import pathlib
import sys

from pants_green import Connection, Server, engine

root = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else ".").resolve()


class FileServer(Connection):
    read_delimiter = b"\n"

    def on_read(self, line):
        try:
            path = (root / line.strip().decode()).resolve()  # where "..", "/" and links lead to
            if not (path.is_relative_to(root) and path.is_file()):  # else a pipe, say, that nobody writes to
                raise FileNotFoundError
            file = path.open("rb")
        except (OSError, ValueError):
            self.write("error: no such file\n")
            return
        with file:
            self.write(f"{os.fstat(file.fileno()).st_size}\n")
            self.write_file(file)


try:
    server = Server(FileServer).listen(int(sys.argv[1]) if len(sys.argv) > 1 else 4040)
    print(f"Serving {root} on port {server.local_address[1]}. Ctrl-C ends it.", flush=True)
    engine.start()
except (OSError, ValueError) as error:
    sys.exit(str(error))
except KeyboardInterrupt:
    print("\nBye.")
