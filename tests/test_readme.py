"""Every block of code in the README is run, or looked up, as it stands there; only port 4040 becomes a free one."""

import configparser
import contextlib
import re
import socket
import textwrap

import pytest
from children import PATIENCE, ROOT, Child, Peer, free_port, wait_until_listening

import pants_green

README = (ROOT / "README.rst").read_text()

BLOCK = re.compile(r"^\.\. code-block:: (?P<language>\w+)\n(?:   :name: (?P<name>\S+)\n)?\n(?P<body>(?:(?:   .*)?\n)+)", re.MULTILINE)

BLOCKS = [(found["language"], found["name"], textwrap.dedent(found["body"]).strip() + "\n") for found in BLOCK.finditer(README)]

PROGRAMS = {name: body for language, name, body in BLOCKS if language == "python"}


def program(name, tmp_path, port):
    """Start a program of the README on `port`."""
    path = tmp_path / f"{name.replace('-', '_')}.py"
    path.write_text(PROGRAMS[name].replace("4040", str(port)))
    return Child(path)


def serving(name, tmp_path):
    """Start a server of the README; return it and its port once it listens."""
    port = free_port()
    child = program(name, tmp_path, port)
    try:
        wait_until_listening(child, port)
    except BaseException:
        child.__exit__()
        raise
    return child, port


def echo(tmp_path, name="echo"):
    child, port = serving(name, tmp_path)
    with child, Peer(port) as peer:
        peer.send(b"hello")
        assert peer.read(5) == b"hello"


def never_start(tmp_path):
    echo(tmp_path, "never-start")


def blocking(tmp_path):
    child, port = serving("blocking", tmp_path)
    with child, contextlib.ExitStack() as stack:
        # So many that one after the other they would exhaust our patience.
        peers = [stack.enter_context(Peer(port)) for _ in range(int(PATIENCE) * 2)]
        for peer in peers:
            peer.send(b"hello\r\n")
        for peer in peers:
            assert peer.read(7) == b"hello\r\n"


def chat(tmp_path):
    child, port = serving("chat", tmp_path)
    with child, Peer(port) as first:

        def says(speaker, listeners):
            speaker.send(b"hello\r\n")
            said = b"%d: hello\r\n" % speaker.socket.getsockname()[1]
            for listener in listeners:
                assert listener.read(len(said)) == said

        says(first, [first])
        with Peer(port) as second:
            says(second, [first, second])
            says(first, [first, second])


def client(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        with program("client", tmp_path, listener.getsockname()[1]) as child:
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(PATIENCE)
                assert peer.recv(100) == b"hello\r\n"
                peer.sendall(b"good day\r\n")
                assert child.end() == 0
            assert child.output == "the server says good day\n"
    with program("client", tmp_path, free_port()) as child:
        assert child.end() == 0
        assert "cannot connect to localhost" in child.output


def lengths(tmp_path):
    child, port = serving("lengths", tmp_path)
    with child:
        with Peer(port) as peer:
            messages = b"\0\0\0\5hello" + b"\0\0\0\1x"
            peer.send(messages)
            assert peer.read(len(messages)) == messages
        with Peer(port) as peer:
            peer.send(b"\0\0\0\0")
            with pytest.raises(ConnectionResetError):
                peer.read(1)


def timers(tmp_path):
    with program("timers", tmp_path, 4040) as child:
        assert child.end() == 0
        assert child.output.splitlines() == ["in the next turn", "every 0.1 seconds", "every 0.1 seconds"]


def threads(tmp_path):
    with program("threads", tmp_path, 4040) as child:
        assert child.end() == 0
        assert sorted(child.output.splitlines()) == ["499999500000", "called from a thread"]


def testing(tmp_path):
    (tmp_path / "conftest.py").write_text(PROGRAMS["testing-conftest"])
    (tmp_path / "test_shout.py").write_text(PROGRAMS["testing-test"])
    with Child("-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path, cwd=tmp_path) as child:
        assert child.end() == 0, child.output
        assert "3 passed" in child.output


CHECKS = {
    "blocking": blocking,
    "chat": chat,
    "client": client,
    "echo": echo,
    "lengths": lengths,
    "never-start": never_start,
    "testing-conftest": testing,
    "testing-test": testing,
    "threads": threads,
    "timers": timers,
}


def test_readme_programs_all_have_a_check():
    assert sorted(PROGRAMS) == sorted(CHECKS)
    assert README.count(".. code-block::") == len(BLOCKS)
    assert not re.search(r"::\n\n   ", re.sub(BLOCK, "", README)), "a block of code that is not marked as one"


@pytest.mark.parametrize("name", [name for name in CHECKS if name != "testing-conftest"])
def test_readme_program_does_what_it_says(name, tmp_path):
    CHECKS[name](tmp_path)


def test_readme_echo_server_has_seven_lines():
    assert len([line for line in PROGRAMS["echo"].splitlines() if line]) == 7


def test_readme_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    extras = set(settings["options.extras_require"])
    commands = [line for language, _, body in BLOCKS if language == "console" for line in body.splitlines()]
    assert commands
    for line in commands:
        if target := re.match(r"make (\S+)", line):
            assert re.search(rf"^{target[1]}:", makefile, re.MULTILINE), line
        else:
            assert line.startswith("python -m pip install ")
            assert set(re.findall(r"test|lint|bench", line)) <= extras


def test_readme_names_what_the_package_exports():
    errors = [name for name in re.findall(r"^``([A-Z]\w+)``  ", README, re.MULTILINE) if name != "None"]
    assert "ChannelClosed" in errors
    for name in [*errors, "PantsError"]:
        assert issubclass(getattr(pants_green, name), pants_green.PantsError)
