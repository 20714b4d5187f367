from pants_green import Engine, Server, Stream

class EchoLineToAll(Stream):
    def on_connect(self):
        self.read_delimiter = "\r\n"
        self.server.write_to_all(f"Connected: {self.remote_address[0]}\r\n")

    def on_read(self, line):
        self.server.write_to_all(b"%s: %s\r\n" % (self.remote_address[0].encode(), line))

    def on_close(self):
        self.server.write_to_all(f"Disconnected: {self.remote_address[0]}\r\n")

class EchoLineToAllServer(Server):
    ConnectionClass = EchoLineToAll

    def write_to_all(self, data):
        for channel in self.channels.values():
            if channel.connected:
                channel.write(data)

EchoLineToAllServer().listen(4040)
Engine.instance().start()

# A chat. Try it:  python examples/tutorial3.py  and in two other terminals  telnet localhost 4040  (it sends the CRLF that ends a line)
