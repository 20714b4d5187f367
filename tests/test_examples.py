"""Every file in examples/ is run as a user would run it, with a real peer."""

import re
import signal
import socket
import struct
import threading

import pytest
from children import PATIENCE, ROOT, Child, Peer, free_port, keyboard_interrupts, wait_until_listening

EXAMPLES = ROOT / "examples"


def echo(tmp_path):
    with Child(EXAMPLES / "echo.py", 0) as child:
        port = child.port()
        for host in ("127.0.0.1", "localhost"):
            with Peer(port, host) as peer:
                peer.send(b"hello\r\n")
                assert peer.read(7) == b"hello\r\n"
                peer.send(bytes(range(256)) * 400)
                assert peer.rest() == bytes(range(256)) * 400
        assert f"nc localhost {port}" in child.output


def printer(tmp_path):
    with Child(EXAMPLES / "printer.py", 0) as child:
        with Peer(child.port()) as peer:
            child.expect(r"^127\.0\.0\.1 connected$")
            peer.send(b"any\x00thing")
            child.expect(r"^127\.0\.0\.1 sent b'any\\x00thing'$")
        child.expect(r"^127\.0\.0\.1 left: ")


def line_oriented(tmp_path):
    with Child(EXAMPLES / "line_oriented.py", 0) as child, Peer(child.port()) as peer:
        for piece in (b"o", b"ne\r", b"\ntwo\r\n\xff three\r\npart"):
            peer.send(piece)
        assert peer.rest() == b""
        for line in ("line: one", "line: two", "line: \N{REPLACEMENT CHARACTER} three", "not a whole line: b'part'"):
            child.expect(f"^{line}$")


def timers(tmp_path):
    with Child(EXAMPLES / "timers.py") as child:
        assert child.end() == 0
        assert child.output.splitlines() == [
            "in the next turn of the loop",
            "beat 1",
            "beat 2",
            "beat 3",
            "the cycle cancels itself",
            "the end: 3 beats, some turns of the loop",
        ]
        assert child.error_output() == ""


def blocking(tmp_path):
    with Child(EXAMPLES / "blocking.py", 0) as child:
        port = child.port()
        with Peer(port) as sleeper, Peer(port) as threaded, Peer(port) as other:
            sleeper.send(b"sleep 0.3\r\nawake\r\n")
            threaded.send(b"thread 0.3\r\nawake\r\n")
            order, replies = [], {}

            def listen(name, peer, size):
                replies[name] = peer.read(size)
                order.append(name)

            listeners = [
                threading.Thread(target=listen, args=("sleeper", sleeper, len(b"slept\r\nawake\r\n"))),
                threading.Thread(target=listen, args=("threaded", threaded, len(b"slept in a thread\r\nawake\r\n"))),
            ]
            for listener in listeners:
                listener.start()
            other.send(b"still there?\r\n")
            listen("other", other, len(b"still there?\r\n"))
            for listener in listeners:
                listener.join()
            assert order[0] == "other"
            assert replies["other"] == b"still there?\r\n"
            assert replies["sleeper"] == b"slept\r\nawake\r\n"
            assert replies["threaded"] == b"slept in a thread\r\nawake\r\n"


#: Runs a program as it is, but for what it logs from WARNING on, which goes to stderr.
LOGGED = "import logging, runpy, sys; logging.basicConfig(); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def logged(name, *arguments):
    """Start an example whose warnings and errors are to be seen."""
    return Child("-c", LOGGED, EXAMPLES / name, *arguments)


def far_end(listener):
    """Accept a connection that a program makes to `listener`, as the other end of it."""
    peer = Peer.__new__(Peer)
    peer.socket, _ = listener.accept()
    peer.socket.settimeout(PATIENCE)
    return peer


def reset(peer):
    """Break a connection off."""
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.socket.close()


def chat(tmp_path):
    with logged("chat.py", 0) as child:
        port = child.port()

        def hears(peer, text):
            data = text.encode()
            assert peer.read(len(data)) == data

        with Peer(port) as ann:
            hears(ann, "Your name? ")
            ann.send("Änn\r\n".encode())
            with Peer(port) as nobody:
                hears(nobody, "Your name? ")
                nobody.send(b"Nob")  # and leaves before it has said its name
            with Peer(port) as listener, Peer(port) as bob:
                hears(listener, "Your name? ")  # and never says it
                hears(bob, "Your name? ")
                bob.send(b"Bob\nhello\n")
                hears(ann, "* Bob has joined\r\nBob: hello\r\n")
                ann.send("grüß dich\r\n".encode())
                hears(bob, "Änn: grüß dich\r\n")
                assert bob.rest() == b""
                assert listener.rest() == b""
            hears(ann, "* Bob has left\r\n")
            assert ann.rest() == b""
        assert child.error_output() == ""


def proxy(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        with logged("proxy.py", 0, f"localhost:{listener.getsockname()[1]}") as child:
            port = int(child.expect(r":(\d+)> forwards to ")[1])
            with Peer(port) as near:
                near.send(b"question")
                with far_end(listener) as far:
                    assert far.read(8) == b"question"
                    near.socket.shutdown(socket.SHUT_WR)
                    assert far.read(1) == b""
                    far.send(b"an answer although the question has ended")
                    far.socket.shutdown(socket.SHUT_WR)
                    assert near.read(1000) == b"an answer although the question has ended"
            with Peer(port) as near, far_end(listener) as far:
                far.send(b"banner")
                far.socket.shutdown(socket.SHUT_WR)
                assert near.read(1000) == b"banner"
                near.send(b"it goes on")
                assert far.read(10) == b"it goes on"
                assert near.rest() == far.read(1) == b""
            with Peer(port) as near, far_end(listener) as far:
                # A far side that reads nothing holds the near side up, and nothing is lost.
                data = bytes(range(256)) * (128 * 1024)
                sender = threading.Thread(target=near.send, args=(data,), daemon=True)
                sender.start()
                sender.join(0.5)
                held_up = sender.is_alive()
                got = bytearray()
                while len(got) < len(data) and (more := far.socket.recv(1 << 20)):
                    got += more
                sender.join(PATIENCE)
                assert (held_up, got == data) == (True, True)
            for breaks_off, stays in ((0, 1), (1, 0)):
                with Peer(port) as near, far_end(listener) as far:
                    near.send(b"x")
                    assert far.read(1) == b"x"
                    reset((near, far)[breaks_off])
                    assert (near, far)[stays].read(1) == b""
            assert child.error_output() == ""
    with logged("proxy.py", 0, f"localhost:{free_port()}") as child:
        with Peer(int(child.expect(r":(\d+)> forwards to ")[1])) as near:
            near.send(b"is anybody there?")
            assert near.read(1) == b""
        assert "cannot connect to localhost" in child.error_output()


def binary_protocol(tmp_path):
    def message(kind, body):
        return struct.pack("!BI", kind, len(body)) + body

    with logged("binary_protocol.py", 0) as child:
        port = child.port()
        large = b"Aa" * (512 * 1024)
        with Peer(port) as peer:
            peer.send(message(1, b"hello") + message(2, b"Hello") + message(1, b"") + message(2, b"x")[:-1])
            answers = message(1, b"HELLO") + message(2, b"hELLO") + message(1, b"")
            assert peer.read(len(answers)) == answers
            peer.send(b"x" + message(2, large))
            assert peer.read(6) == message(2, b"X")
            answer = message(2, large.swapcase())
            assert peer.read(len(answer)) == answer
            peer.send(message(1, b"cut off")[:-4])
            assert peer.rest() == b""
        for senseless in (message(3, b"x"), struct.pack("!BI", 1, len(large) + 1)):
            with Peer(port) as peer:
                peer.send(senseless)
                with pytest.raises(ConnectionResetError):
                    peer.read(1)
        assert child.error_output() == ""


def regex_split(tmp_path):
    with Child(EXAMPLES / "regex_split.py", 0) as child, Peer(child.port()) as peer:
        for piece in (b"one,", b" two;three\r", b"\nfo", b"ur\n,,five\r\n", b"six"):
            peer.send(piece)
        assert peer.rest() == b"one: 3\r\ntwo: 3\r\nthree: 5\r\nfour: 4\r\nfive: 4\r\n"


def slow_consumer(tmp_path):
    def ticks(peer, count):
        return [int(number) for number in re.findall(rb"^tick (\d{6})\.+$", peer.read(count * 1000), re.MULTILINE)]

    with Child(EXAMPLES / "slow_consumer.py", 0) as child:
        port = child.port()
        with socket.socket() as slow, Peer(port) as quick:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.settimeout(PATIENCE)
            slow.connect(("127.0.0.1", port))
            numbers = ticks(quick, 300)
            assert numbers == list(range(numbers[0], numbers[0] + 300))
            late = Peer.__new__(Peer)
            late.socket = slow
            missing = ticks(late, 300)
            assert missing == sorted(set(missing))
            assert missing[-1] - missing[0] > 299
            address = slow.getsockname()[1]
        assert int(child.expect(rf"^{address} has left and missed (\d+) ticks$")[1]) > 0


def slip(tmp_path):
    with Child(EXAMPLES / "slip.py", 0) as child, Peer(child.port()) as peer:
        for piece in (b"\xc0hel", b"lo\xc0\xc0a\xdb", b"\xdcb\xdb\xdd\xdc\xc0", b"cut off"):
            peer.send(piece)
        assert peer.rest() == b"\xc0olleh\xc0" + b"\xc0\xdc\xdb\xddb\xdb\xdca\xc0"


def tutorial(name, tmp_path):
    """Return the port and the process of a copy of a tutorial, whose port is fixed, on a free one."""
    port = free_port()
    source = (EXAMPLES / name).read_text()
    assert "listen(4040)" in source
    copy = tmp_path / name
    copy.write_text(source.replace("4040", str(port)))
    return port, Child(copy)


def tutorial1(tmp_path):
    port, process = tutorial("tutorial1.py", tmp_path)
    with process as child:
        wait_until_listening(child, port)
        with Peer(port) as peer:
            peer.send(b"hello\r\n")
            assert peer.read(7) == b"hello\r\n"


def tutorial2(tmp_path):
    port, process = tutorial("tutorial2.py", tmp_path)
    with process as child:
        wait_until_listening(child, port)
        with Peer(port) as peer:
            peer.send(b"abc")
            peer.send(b"defgh")
            assert peer.read(10) == b"abcdefgh\r\n"
            peer.send(b"0123456789abcdefX")
            assert peer.rest() == b"01234567\r\n89abcdef\r\n"


def tutorial3(tmp_path):
    joined, left, host = b"Connected: 127.0.0.1\r\n", b"Disconnected: 127.0.0.1\r\n", b"127.0.0.1: "
    port, process = tutorial("tutorial3.py", tmp_path)
    with process as child:
        wait_until_listening(child, port)
        with Peer(port) as stays:
            assert stays.read(len(joined)) == joined
            with Peer(port) as leaves:
                assert leaves.read(len(joined)) == joined
                assert stays.read(len(joined)) == joined
                leaves.send(b"one\r\ntwo\r\nthr")
                said = host + b"one\r\n" + host + b"two\r\n"
                assert leaves.read(len(said)) == said
                assert stays.read(len(said)) == said
                assert leaves.rest() == b""
            assert stays.read(len(left)) == left
            assert stays.rest() == b""


CHECKS = {
    "binary_protocol.py": binary_protocol,
    "blocking.py": blocking,
    "chat.py": chat,
    "echo.py": echo,
    "line_oriented.py": line_oriented,
    "printer.py": printer,
    "proxy.py": proxy,
    "regex_split.py": regex_split,
    "slip.py": slip,
    "slow_consumer.py": slow_consumer,
    "timers.py": timers,
    "tutorial1.py": tutorial1,
    "tutorial2.py": tutorial2,
    "tutorial3.py": tutorial3,
}


def test_examples_all_have_a_check():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_example_does_what_it_says(name, tmp_path):
    CHECKS[name](tmp_path)


@pytest.mark.parametrize("name", CHECKS)
def test_example_is_short_and_says_how_to_try_it(name):
    source = (EXAMPLES / name).read_text()
    assert len(source.splitlines()) < 40
    assert f"python examples/{name}" in source


def test_s3_26_tutorials_keep_the_lines_that_documents_include():
    first = (EXAMPLES / "tutorial1.py").read_text().splitlines()
    assert (first[2], first[4]) == ("class Echo(Stream):", "        self.write(data)")
    assert (first[6], first[8]) == ("server = Server(ConnectionClass=Echo)", "Engine.instance().start()")
    third = (EXAMPLES / "tutorial3.py").read_text().splitlines()
    assert third[2] == "class EchoLineToAll(Stream):"
    assert third[11].startswith("        self.server.write_to_all(")
    assert third[13] == "class EchoLineToAllServer(Server):"
    assert third[19] == "                channel.write(data)"
    assert third[21:23] == ["EchoLineToAllServer().listen(4040)", "Engine.instance().start()"]
    assert [line for line in (first[5], third[12], third[20]) if line] == []


WITH_A_WORD = [name for name in CHECKS if name not in ("proxy.py", "timers.py") and not name.startswith("tutorial")]


@pytest.mark.parametrize("name", WITH_A_WORD)
def test_example_ctrl_c_ends_it_with_a_word(name):
    with keyboard_interrupts(), Child(EXAMPLES / name, 0) as child:
        child.port()
        child.process.send_signal(signal.SIGINT)
        assert child.end() == 0
        assert child.output.endswith("Bye.\n")
        assert "Traceback" not in child.error_output()


def test_proxy_ctrl_c_ends_it():
    with keyboard_interrupts(), Child(EXAMPLES / "proxy.py", 0, "localhost:1") as child:
        child.expect("forwards to")
        child.process.send_signal(signal.SIGINT)
        assert child.end() == 0
        assert child.error_output() == ""


@pytest.mark.parametrize("port", ["in use", "70000", "http"])
def test_echo_on_a_port_it_cannot_have_says_so_in_one_line(port):
    with Child(EXAMPLES / "echo.py", 0) as first:
        if port == "in use":
            port = first.port()
        with Child(EXAMPLES / "echo.py", port) as second:
            assert second.end() == 1
            (line,) = second.error_output().splitlines()
            assert line == {
                "70000": "port 70000 is not between 0 and 65535",
                "http": f"usage: {EXAMPLES / 'echo.py'} [PORT]",
            }.get(port, line)
            assert str(port) in line or port == "http"
            assert second.output == ""
