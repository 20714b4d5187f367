from pants_green import Engine, Server, Stream

class Echo(Stream):
    def on_read(self, data):
        self.write(data)

server = Server(ConnectionClass=Echo)
server.listen(4040)
Engine.instance().start()

# The echo server of the tutorial. Try it:  python examples/tutorial1.py  and in another terminal  telnet localhost 4040
