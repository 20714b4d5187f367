"""Every block of code in the README is run, or looked up, as it stands there; only port 4040 becomes a free one."""

import configparser
import contextlib
import re
import signal
import socket
import ssl
import textwrap
import time
from pathlib import Path

import pytest
from certificates import authority, client_context, server_context
from children import PATIENCE, ROOT, Child, Peer, free_port, wait_until_listening

import pants_green
from pants_green.proxy_protocol import build

README = (ROOT / "README.rst").read_text()

BLOCK = re.compile(r"^\.\. code-block:: (?P<language>\w+)\n(?:   :name: (?P<name>\S+)\n)?\n(?P<body>(?:(?:   .*)?\n)+)", re.MULTILINE)

BLOCKS = [(found["language"], found["name"], textwrap.dedent(found["body"]).strip() + "\n") for found in BLOCK.finditer(README)]

PROGRAMS = {name: body for language, name, body in BLOCKS if language == "python"}


def program(name, tmp_path, port):
    """Start a program of the README on `port`."""
    path = tmp_path / f"{name.replace('-', '_')}.py"
    path.write_text(PROGRAMS[name].replace("4040", str(port)))
    return Child(path, cwd=tmp_path)


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


def reconnecting(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        with program("reconnecting", tmp_path, listener.getsockname()[1]) as child:
            for last in (b"first\r\n", b"second\r\nbye\r\n"):
                peer, _ = listener.accept()
                with peer:
                    peer.settimeout(PATIENCE)
                    assert peer.recv(100) == b"subscribe\r\n"
                    peer.sendall(last)
            assert child.end() == 0
            assert child.output.splitlines() == ["first", "dialling again soon", "second", "bye"]


def packets(tmp_path):
    port = free_port()
    with program("packets", tmp_path, port) as child, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.settimeout(0.05)
        peer.connect(("127.0.0.1", port))
        answer = b""
        while not answer:
            assert child.process.poll() is None, child.error_output()
            try:
                peer.send(b"hello")
                answer = peer.recv(100)
            except (ConnectionRefusedError, TimeoutError):
                continue  # it does not listen yet
        assert answer == b"hello"


def files(tmp_path):
    child, port = serving("files", tmp_path)
    with child, Peer(port) as peer:
        assert peer.rest() == (tmp_path / "files.py").read_bytes()


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


def packed(tmp_path):
    child, port = serving("packed", tmp_path)
    with child, Peer(port) as peer:
        peer.send(b"\0\0\0\1\0\0\0\2" + b"\xff" * 8 + b"cut off")
        assert peer.rest() == b"\0\0\0\0\0\0\0\3" + b"\0\0\0\1\xff\xff\xff\xfe"


def framer(tmp_path):
    child, port = serving("framer", tmp_path)
    with child, Peer(port) as peer:
        for piece in (b"\nhello\n", b"one\\", b"\ntwo\\\n", b"\ncut off"):
            peer.send(piece)
        assert peer.rest() == b"0 bytes\n5 bytes\n10 bytes\n"


def text(tmp_path):
    child, port = serving("text", tmp_path)
    with child:
        with Peer(port) as peer:
            for piece in (b"gr\xc3", b"\xbc\xc3\x9f dich\r", b"\n"):
                peer.send(piece)
            assert peer.rest() == "GRÜSS DICH\r\n".encode()
        with Peer(port) as peer:
            peer.send(b"fine\r\n")
            assert peer.read(6) == b"FINE\r\n"
            peer.send(b"\xff\r\n")
            assert peer.read(1) == b""


def read(tmp_path):
    child, port = serving("read", tmp_path)
    with child:
        with Peer(port) as peer:
            assert peer.read(6) == b"name? "
            peer.send(b"Ann\r\n")
            assert peer.read(6) == b"size? "
            peer.send(b"5\r\nhelloand more\r\n")
            answer = b"5 bytes, please: Ann said hello\r\nAnn also said and more\r\n"
            assert peer.read(len(answer)) == answer
        with Peer(port) as peer:
            assert peer.rest() == b"name? "


def drain(tmp_path):
    child, port = serving("drain", tmp_path)
    with child, Peer(port) as peer:
        peer.send(b"100000\r\n3\r\n")
        assert peer.rest() == b"".join(b"%d\r\n" % number for number in (*range(100000), 0, 1, 2))


def overflow(tmp_path):
    child, port = serving("overflow", tmp_path)
    with child, Peer(port) as first, Peer(port) as second:
        for peer in (first, second):
            assert peer.read(12) == b"tick\r\ntick\r\n"


def pause(tmp_path):
    child, port = serving("pause", tmp_path)
    with child, Peer(port) as peer:
        began = time.monotonic()
        peer.send(b"1\r\n2\r\n3\r\n4\r\n")
        assert peer.read(12) == b"1\r\n2\r\n3\r\n4\r\n"
        assert time.monotonic() - began > 0.25


def put_certificates(tmp_path):
    """Put the files there that the README's programs with TLS read."""
    for stem, names in (("", ("localhost", "127.0.0.1")), ("example", ("www.example.org",))):
        issued = authority().issue(*names)
        (tmp_path / f"{stem or 'certificate'}.pem").write_text(Path(issued["certfile"]).read_text())
        (tmp_path / (f"{stem}.key" if stem else "key.pem")).write_text(Path(issued["keyfile"]).read_text())
    (tmp_path / "authority.pem").write_text(Path(authority().file).read_text())


def secured(peer, context=None, name="localhost"):
    """Have a Peer speak TLS."""
    peer.socket = (context or client_context()).wrap_socket(peer.socket, server_hostname=name, suppress_ragged_eofs=False)
    return peer


def tls_server(tmp_path):
    put_certificates(tmp_path)
    child, port = serving("tls-server", tmp_path)
    with child, Peer(port) as peer:
        secured(peer).send(b"hello")
        assert peer.read(5) == b"hello"


def tls_client(tmp_path):
    put_certificates(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        with program("tls-client", tmp_path, listener.getsockname()[1]) as child:
            sock, _ = listener.accept()
            sock.settimeout(PATIENCE)
            with sock, server_context().wrap_socket(sock, server_side=True) as peer:
                assert peer.recv(100) == b"hello\r\n"
                peer.sendall(b"good day")
                assert peer.recv(100) == b""
                assert child.end() == 0
            name, answer = child.output.splitlines()
            assert name.startswith("this is (('DNS', 'localhost'), ")
            assert answer == "the server says good day"
        with program("tls-client", tmp_path, listener.getsockname()[1]) as child:
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(PATIENCE)
                sock.sendall(b"220 this is not TLS\r\n")
                assert child.end() == 0
            assert "SSL" in child.output


def starttls(tmp_path):
    put_certificates(tmp_path)
    child, port = serving("starttls", tmp_path)
    with child, Peer(port) as peer:
        peer.send(b"hello\r\nSTARTTLS\r\n")
        assert peer.read(17) == b"hello\r\ngo ahead\r\n"
        secured(peer, client_context("1.3")).send(b"hello\r\nSTARTTLS\r\n")
        answer = b"this is TLSv1.3\r\nhello\r\nSTARTTLS\r\n"
        assert peer.read(len(answer)) == answer


def tls_names(tmp_path):
    put_certificates(tmp_path)
    child, port = serving("tls-names", tmp_path)
    with child:
        for name in ("localhost", "www.example.org"):
            context = client_context()
            context.load_cert_chain(**authority().issue("ann@example.org", common_name="Ann"))
            with Peer(port) as peer:
                assert secured(peer, context, name).read(14) == b"welcome, Ann\r\n"
        with Peer(port) as peer, pytest.raises((ssl.SSLError, ConnectionResetError)):
            secured(peer, client_context("1.3")).read(1)


def behind_proxy(tmp_path):
    child, port = serving("behind-proxy", tmp_path)
    with child, Peer(port) as peer:
        peer.send(build(2, ("192.0.2.7", 56324), ("198.51.100.1", 4040), authority="www.example.org"))
        assert peer.rest() == b"hello 192.0.2.7, you have asked for www.example.org\r\n"


def limits(tmp_path):
    child, port = serving("limits", tmp_path)
    with child, Peer(port) as first, Peer(port) as second:
        for peer in (first, second):
            peer.send(b"hello\r\n")
            assert peer.read(7) == b"hello\r\n"
        with Peer(port) as third:
            assert third.read(1) == b""


def stopping(tmp_path):
    child, port = serving("stopping", tmp_path)
    with child:
        with Peer(port) as peer:
            peer.send(b"hello\r\nhalf a li")
            assert peer.read(7) == b"hello\r\n"
            child.process.send_signal(signal.SIGTERM)
            assert peer.read(100) == b"goodbye\r\n"
        assert child.end() == 0


def typed(tmp_path):
    child, port = serving("typed", tmp_path)
    with child, Peer(port) as peer:
        peer.send(b"\0\1\0\2\xff\xff\0\0")
        assert peer.rest() == b"\0\2\0\1\0\0\xff\xff"


def timers(tmp_path):
    with program("timers", tmp_path, 4040) as child:
        assert child.end() == 0
        assert child.output.splitlines() == ["in the next turn", "every 0.1 seconds", "every 0.1 seconds"]


def threads(tmp_path):
    with program("threads", tmp_path, 4040) as child:
        assert child.end() == 0
        assert sorted(child.output.splitlines()) == ["499999500000", "called from a thread"]


def kit(tmp_path):
    (tmp_path / "conftest.py").write_text(PROGRAMS["testing-conftest"])
    (tmp_path / "test_shout.py").write_text(PROGRAMS["testing-test"])
    with Child("-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path, cwd=tmp_path) as child:
        assert child.end() == 0, child.output
        assert "3 passed" in child.output


CHECKS = {
    "behind-proxy": behind_proxy,
    "blocking": blocking,
    "chat": chat,
    "client": client,
    "drain": drain,
    "echo": echo,
    "files": files,
    "framer": framer,
    "lengths": lengths,
    "limits": limits,
    "never-start": never_start,
    "overflow": overflow,
    "packed": packed,
    "packets": packets,
    "pause": pause,
    "read": read,
    "reconnecting": reconnecting,
    "starttls": starttls,
    "stopping": stopping,
    "testing-conftest": kit,
    "testing-test": kit,
    "text": text,
    "threads": threads,
    "timers": timers,
    "tls-client": tls_client,
    "tls-names": tls_names,
    "tls-server": tls_server,
    "typed": typed,
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
