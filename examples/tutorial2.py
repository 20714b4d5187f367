from pants_green import Engine, Server, Stream

class BlockEcho(Stream):
    def on_connect(self):
        self.read_delimiter = 8

    def on_read(self, block):
        self.write(block + b"\r\n")

server = Server(ConnectionClass=BlockEcho)
server.listen(4040)
Engine.instance().start()

# Every 8 bytes come back as a line. Try it:  python examples/tutorial2.py  and in another terminal  telnet localhost 4040
