from pants_green import Stream
from pants_green.testing import memory_pair, leak_check

class Echo(Stream):
    def on_read(self, data):
        self.write(data)

def test_a(server_of, peer, recorder):
    server = server_of(recorder.of(Echo))
    p = peer(server)
    p.send(b"hello")
    assert p.recv_exactly(5) == b"hello"
    p.close()
    recorder.wait_for("on_close")
    print(recorder)

def test_b():
    s, end = memory_pair(Echo)
    end.send(b"abc")
    assert end.wait_for(3) == b"abc"
    end.close()
