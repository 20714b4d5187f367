"""The programs of the old documents, run as they stand there, but on free ports and with ``pants_green`` for ``pants``."""

import re
import threading

import pytest
from children import ROOT, Child, Peer, free_port, wait_until_listening

#: Typed in after programs whose documents come before engines were invented.
RUN_IT = "\nfrom pants_green import engine\nengine.start()\n"

S0_ECHO = """
from pants_green import Connection

class EchoConnection(Connection):
    def handle_read(self, data):
        self.send(data)

from pants_green import Server

Server(EchoConnection).listen()
"""

S0_BROADCAST = """
from pants_green import Connection, Server

class EchoConnection(Connection):
    def handle_read(self, data):
        self.server.send(data)

class EchoServer(Server):
    ConnectionClass = EchoConnection

    def send(self, data):
        for channel in self.channels.itervalues():
            channel.send(data)

EchoServer().listen()
"""

S1_ECHO = """
from pants_green import Connection, engine, Server

class Echo(Connection):
    def on_read(self, data):
        self.write(data)

Server(Echo).listen(4000)
engine.start()
"""

S2_CLASS = """
import pants_green as pants

class MyConnectionClass(pants.Stream):
    def on_read(self, data):
        self.write(data)

server = pants.Server(MyConnectionClass)
server.listen(('', 8080))
"""

S2_SUBCLASS = """
import pants_green as pants

class MyConnectionClass(pants.Stream):
    def on_read(self, data):
        self.write(data)

class MyServer(pants.Server):
    ConnectionClass = MyConnectionClass

MyServer().listen(8080)
"""

S4_PRINTER = """
from pants_green import Connection, Server

class Printer(Connection):
    def on_read(self, data):
        print(data)

Server(Printer).listen(8080)
"""

S4_LINES = """
from pants_green import Connection, Server

class LineOriented(Connection):
    def on_connect(self):
        self.read_delimiter = '\\r\\n'

    def on_read(self, line):
        print(line)

Server(LineOriented).listen(8080)
"""


def tutorial(number):
    """Return the source of a tutorial."""
    return (ROOT / "examples" / f"tutorial{number}.py").read_text()


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a program, on a free port, and returns that port and the child."""
    children = []

    def start(source):
        port = free_port()
        source = re.sub(r"\b(?:8080|4040|4000)\b", str(port), source.replace(".listen()", f".listen({port})"))
        program = tmp_path / f"program{len(children)}.py"
        program.write_text(source if "engine.start" in source else source + RUN_IT)
        child = Child(program)
        children.append(child)
        wait_until_listening(child, port)
        return port, child

    yield start
    for child in children:
        child.__exit__(None, None, None)


@pytest.mark.parametrize("program", [S0_ECHO, S1_ECHO, S2_CLASS, S2_SUBCLASS], ids=["S0", "S1", "S2 class", "S2 subclass"])
def test_s0_6_s0_7_s1_7_s2_3_s2_4_echo_programs_echo(run, program):
    port, child = run(program)
    with Peer(port) as one, Peer(port, "localhost") as other:
        one.send(b"hello\r\n")
        other.send(b"world\r\n")
        assert one.read(7) == b"hello\r\n"
        assert other.read(7) == b"world\r\n"
        big = bytes(range(256)) * 2000
        sender = threading.Thread(target=one.send, args=(big,))
        sender.start()
        assert one.read(len(big)) == big
        sender.join()
        assert one.rest() == b""
    assert child.error_output() == ""


def test_s0_11_s0_12_s0_13_everybody_gets_the_broadcast_the_sender_included(run):
    port, child = run(S0_BROADCAST)
    with Peer(port) as one:
        one.send(b"1")
        assert one.read(1) == b"1"
        with Peer(port) as other:
            other.send(b"2")
            assert (one.read(1), other.read(1)) == (b"2", b"2")
            with Peer(port) as leaves:
                leaves.send(b"3")
                assert (one.read(1), other.read(1), leaves.read(1)) == (b"3", b"3", b"3")
                assert leaves.rest() == b""
            one.send(b"who is left?")
            assert one.read(12) == other.read(12) == b"who is left?"
    assert child.error_output() == ""


def test_s3_5_s3_6_s3_8_tutorial_1_echoes_line_by_line_and_has_7_lines(run):
    source = tutorial(1)
    code = [line for line in source.splitlines() if line and not line.startswith("#")]
    assert len(code) == 7
    port, child = run(source)
    with Peer(port, "localhost") as one:
        for line in (b"first\r\n", b"second\r\n"):
            one.send(line)
            assert one.read(len(line)) == line
    assert child.error_output() == ""


def test_s3_12_s3_14_tutorial_2_sends_blocks_of_8_back_as_lines(run):
    port, child = run(tutorial(2))
    with Peer(port) as one:
        for piece in (b"123", b"45678ABCDEFGHx"):
            one.send(piece)
        assert one.read(20) == b"12345678\r\nABCDEFGH\r\n"
        assert one.rest() == b""
    assert child.error_output() == ""


def test_s3_16_tutorial_2_with_a_compiled_regular_expression_sends_what_is_between_its_matches(run):
    source = tutorial(2).replace("self.read_delimiter = 8", 'self.read_delimiter = re.compile(b"[,;]")')
    port, child = run("import re\n" + source)
    with Peer(port) as one:
        for piece in (b"one,t", b"wo;;thr"):
            one.send(piece)
        assert one.read(12) == b"one\r\ntwo\r\n\r\n"[:12]
        assert one.rest() == b"one\r\ntwo\r\n\r\n"[12:]
    assert child.error_output() == ""


def test_s3_18_s3_19_s3_20_s3_21_s3_22_tutorial_3_is_a_chat(run):
    joined, left = b"Connected: 127.0.0.1\r\n", b"Disconnected: 127.0.0.1\r\n"
    said = b"127.0.0.1: one\r\n127.0.0.1: two\r\n"
    port, child = run(tutorial(3))
    with Peer(port) as a:
        assert a.read(len(joined)) == joined
        with Peer(port) as b:
            assert b.read(len(joined)) == a.read(len(joined)) == joined
            a.send(b"one\r\ntwo\r\npart")
            assert a.read(len(said)) == b.read(len(said)) == said
            assert a.rest() == b""
            assert b.read(len(left)) == left
            assert b.rest() == b""
    assert child.error_output() == ""


def test_s4_11_printer_prints_what_arrives(run):
    port, child = run(S4_PRINTER)
    with Peer(port) as one:
        one.send(b"any\x00thing")
        child.expect(r"^b'any\\x00thing'$")
    assert child.error_output() == ""


def test_s4_16_line_oriented_prints_lines_without_their_ends(run):
    port, child = run(S4_LINES)
    with Peer(port) as one:
        for piece in (b"one\r", b"\ntw", b"o\r\n\r\nthree\n\r\npart"):
            one.send(piece)
        for line in ("b'one'", "b'two'", "b''", r"b'three\\n'"):
            child.expect(f"^{line}$")
        assert one.rest() == b""
    assert "part" not in child.output
    assert child.error_output() == ""


def test_s3_11_without_start_the_program_ends_and_nobody_is_served():
    program = """
from pants_green import Server, Stream
server = Server(ConnectionClass=Stream)
server.listen(("127.0.0.1", 0))
print("port", server.local_address[1])
"""
    with Child("-c", program) as child:
        port = child.port()
        assert child.end() == 0
        assert child.error_output() == ""
    with pytest.raises(ConnectionRefusedError):
        Peer(port)


def test_s1_1_s1_6_modules_and_names_of_the_old_documents_import():
    program = """
from pants_green import Connection, engine, Server, Client, Stream, StreamServer, Engine
from pants_green.engine import Engine as E
from pants_green.channel import Channel
from pants_green.network import Server as S, Connection as C, Client as K
from pants_green.stream import Stream as T, StreamServer as N
import pants_green
assert E is Engine and S is Server and C is Connection and K is Client and T is Stream and N is StreamServer
assert pants_green.engine.Engine is Engine
assert engine is pants_green.engine
assert callable(engine.start) and callable(engine.stop) and callable(engine.defer)
print("all there")
"""
    with Child("-c", program) as child:
        child.expect("all there")
        assert child.end() == 0
