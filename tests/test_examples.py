"""Every file in examples/ is run as a user would run it, with a real peer."""

import signal
import threading

import pytest
from children import ROOT, Child, Peer, free_port, keyboard_interrupts, wait_until_listening

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
    "blocking.py": blocking,
    "echo.py": echo,
    "line_oriented.py": line_oriented,
    "printer.py": printer,
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


@pytest.mark.parametrize("name", ["blocking.py", "echo.py", "line_oriented.py", "printer.py"])
def test_example_ctrl_c_ends_it_with_a_word(name):
    with keyboard_interrupts(), Child(EXAMPLES / name, 0) as child:
        child.port()
        child.process.send_signal(signal.SIGINT)
        assert child.end() == 0
        assert child.output.endswith("Bye.\n")
        assert "Traceback" not in child.error_output()


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
