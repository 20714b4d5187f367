"""The two servers' ends that most tests under load talk to."""

from pants_green import Connection


class Echo(Connection):
    def on_read(self, data):
        self.write(data)


class EchoLines(Connection):
    read_delimiter = b"\n"

    def on_read(self, line):
        self.write(line + b"\n")
