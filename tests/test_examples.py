"""Every file in examples/ is run as a user would run it, with a real peer."""

import contextlib
import io
import os
import re
import runpy
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from certificates import authority, client_context, other_authority, server_context
from children import PATIENCE, ROOT, Child, Peer, free_port, keyboard_interrupts, wait_until_listening
from needs import multicast_works

EXAMPLES = ROOT / "examples"

#: Runs a program as it is, but for what it logs from WARNING on, which goes to stderr.
LOGGED = "import logging, runpy, sys; logging.basicConfig(); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


class Example(Child):
    """An example at work. When all is well Ctrl-C ends it, if it still runs: in peace, and with a word if there is one in its source."""

    def __init__(self, name, *arguments, how=()):
        self.path = EXAMPLES / name
        with keyboard_interrupts():
            super().__init__(*how, self.path, *arguments)

    def __exit__(self, kind, *more):
        try:
            if kind is None and self.process.poll() is None:
                self.process.send_signal(signal.SIGINT)
                assert self.end() == 0
                assert "Traceback" not in self.error_output()
                assert self.output.endswith("Bye.\n") == ("Bye." in self.path.read_text())
        finally:
            super().__exit__(kind, *more)


def logged(name, *arguments):
    """Start an example whose warnings and errors are to be seen."""
    return Example(name, *arguments, how=("-c", LOGGED))


def run_here(name, *arguments):
    """Run an example that ends by itself in this process, which is quicker; return its exit code, its output and its error output."""
    output = io.TextIOWrapper(io.BytesIO())
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "argv", [str(EXAMPLES / name), *map(str, arguments)])
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = None
        except SystemExit as end:
            code = end.code
    error_output = "" if code is None else f"{code}\n"
    return int(code is not None), output.buffer.getvalue().decode(), error_output


def echo(tmp_path):
    with Example("echo.py", 0) as child:
        port = child.port()
        for host in ("127.0.0.1", "localhost"):
            with Peer(port, host) as peer:
                peer.send(b"hello\r\n")
                assert peer.read(7) == b"hello\r\n"
                peer.send(bytes(range(256)) * 400)
                assert peer.rest() == bytes(range(256)) * 400
        assert f"nc localhost {port}" in child.output


def printer(tmp_path):
    with Example("printer.py", 0) as child:
        with Peer(child.port()) as peer:
            child.expect(r"^127\.0\.0\.1 connected$")
            peer.send(b"any\x00thing")
            child.expect(r"^127\.0\.0\.1 sent b'any\\x00thing'$")
        child.expect(r"^127\.0\.0\.1 left: ")


def file_server(tmp_path):
    inside, outside = tmp_path / "served", tmp_path / "outside"
    (inside / "folder").mkdir(parents=True)
    outside.write_bytes(b"a secret")
    content = bytes(range(256)) * 4000
    files = {"a file.bin": content, "folder/ä": b"small", "empty": b""}
    for name, data in files.items():
        (inside / name).write_bytes(data)
    (inside / "way out").symlink_to(outside)
    os.mkfifo(inside / "pipe")
    (inside / "way in").symlink_to(inside / "empty")
    with logged("file_server.py", 0, inside) as child, Peer(port := child.port()) as peer:
        for name in ("a file.bin", "folder/ä", "empty", "folder/../empty", "way in", f"{inside}/empty"):
            data = files.get(name, b"")
            answer = b"%d\n%s" % (len(data), data)
            peer.send(f"{name}\r\n".encode())
            assert peer.read(len(answer)) == answer
        wrong = ["nothing", "folder", "", "..", "../outside", str(outside), "way out", "pipe", "/etc/passwd", "a\0b", "x" * 5000]
        peer.send(b"".join(f"{name}\n".encode() for name in wrong) + b"\xff\na file.bin\nempty\n")
        answers = b"error: no such file\n" * (len(wrong) + 1) + b"%d\n%s0\n" % (len(content), content)
        assert peer.read(len(answers)) == answers
        assert peer.rest() == b""
        with Peer(port) as other:
            other.send(b"a file.bin\n")
            assert other.rest() == b"%d\n%s" % (len(content), content)
        assert child.error_output() == ""


def line_oriented(tmp_path):
    with Example("line_oriented.py", 0) as child, Peer(child.port()) as peer:
        for piece in (b"o", b"ne\r", b"\ntwo\r\n\xff three\r\npart"):
            peer.send(piece)
        assert peer.rest() == b""
        for line in ("line: one", "line: two", "line: \N{REPLACEMENT CHARACTER} three", "not a whole line: b'part'"):
            child.expect(f"^{line}$")


def timers(tmp_path):
    with Example("timers.py") as child:
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
    with Example("blocking.py", 0) as child:
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
            with Peer(port) as silent:
                hears(silent, "Your name? ")
                child.process.send_signal(signal.SIGINT)
                for peer in (ann, silent):
                    hears(peer, "* The chat is over. Goodbye!\r\n")
                    assert peer.rest() == b""
        assert child.end() == 0
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
    with Example("regex_split.py", 0) as child, Peer(child.port()) as peer:
        for piece in (b"one,", b" two;three\r", b"\nfo", b"ur\n,,five\r\n", b"six"):
            peer.send(piece)
        assert peer.rest() == b"one: 3\r\ntwo: 3\r\nthree: 5\r\nfour: 4\r\nfive: 4\r\n"


def slow_consumer(tmp_path):
    def ticks(peer, count):
        return [int(number) for number in re.findall(rb"^tick (\d{6})\.+$", peer.read(count * 1000), re.MULTILINE)]

    with Example("slow_consumer.py", 0) as child:
        port = child.port()
        with socket.socket() as slow, Peer(port) as quick:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.settimeout(PATIENCE)
            slow.connect(("127.0.0.1", port))
            numbers = ticks(quick, 180)
            assert numbers == list(range(numbers[0], numbers[0] + 180))
            late = Peer.__new__(Peer)
            late.socket = slow
            missing = ticks(late, 120)
            assert missing == sorted(set(missing))
            assert missing[-1] - missing[0] > 119
            address = slow.getsockname()[1]
        assert int(child.expect(rf"^{address} has left and missed (\d+) ticks$")[1]) > 0


def slip(tmp_path):
    with Example("slip.py", 0) as child, Peer(child.port()) as peer:
        for piece in (b"\xc0hel", b"lo\xc0\xc0a\xdb", b"\xdcb\xdb\xdd\xdc\xc0", b"cut off"):
            peer.send(piece)
        assert peer.rest() == b"\xc0olleh\xc0" + b"\xc0\xdc\xdb\xddb\xdb\xdca\xc0"


class SecurePeer(Peer):
    """A Peer that speaks TLS, from the start or from ``secure()`` on; at the end it insists on TLS' goodbye."""

    def __init__(self, port, context=None):
        super().__init__(port)
        if context is not None:
            self.secure(context)

    def secure(self, context):
        self.socket = context.wrap_socket(self.socket, server_hostname="localhost", suppress_ragged_eofs=False)


@contextlib.contextmanager
def s_client(port, *options):
    """Run ``openssl s_client -quiet``, of which stdin and stdout are the connection."""
    command = ["openssl", "s_client", "-connect", f"localhost:{port}", "-quiet", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0) as client:
        deadline = threading.Timer(PATIENCE, client.kill)
        deadline.start()
        try:
            yield client
        finally:
            deadline.cancel()
            deadline.join()
            client.kill()


def tls_echo(tmp_path):
    with Example("tls_echo.py", 0) as child:  # with a certificate of its own
        port = child.port()
        with s_client(port, "-tls1_3") as client:
            assert client.stdout.readline() == b"You speak TLSv1.3.\n"
            client.stdin.write(b"hello\n")
            assert client.stdout.readline() == b"hello\n"
        credulous = ssl.create_default_context()
        credulous.check_hostname, credulous.verify_mode = False, ssl.CERT_NONE
        with SecurePeer(port, credulous) as peer:
            certificate = ssl.DER_cert_to_PEM_cert(peer.socket.getpeercert(True))
        with SecurePeer(port, ssl.create_default_context(cadata=certificate)) as peer:
            assert peer.read(19) == b"You speak TLSv1.3.\n"
        assert f"openssl s_client -connect localhost:{port} -quiet" in child.output
    with logged("tls_echo.py", 0, *authority().localhost.values()) as child:
        port = child.port()
        with SecurePeer(port, client_context("1.2")) as peer:
            assert peer.read(19) == b"You speak TLSv1.2.\n"
            data = bytes(range(256)) * 400
            peer.send(data)
            assert peer.read(len(data)) == data
            peer.socket.unwrap()  # each side says goodbye
        assert child.error_output() == ""
        with Peer(port) as stranger:
            stranger.send(b"GET / HTTP/1.0\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                stranger.read(100)
        with pytest.raises(ssl.SSLCertVerificationError):
            SecurePeer(port, ssl.create_default_context(cafile=other_authority().file))
        with SecurePeer(port, client_context()) as peer:
            assert peer.read(19) == b"You speak TLSv1.3.\n"
        assert child.error_output().count("the TLS handshake with 127.0.0.1") == 2


def starttls(tmp_path):
    with logged("starttls.py", 0, *authority().localhost.values()) as child:
        port = child.port()
        with Peer(port) as peer:
            peer.send(b"STARTTLS\r\nNOOP\r\n")  # somebody on the way has put in what is to look as if it had come by TLS
            expected = b"220 localhost\r\n220 go ahead\r\n"
            assert peer.read(len(expected)) == expected
            with contextlib.suppress(ConnectionResetError):
                assert b"250" not in peer.read(1000)
        with SecurePeer(port) as peer:

            def says(command, answer):
                peer.send(command)
                assert peer.read(len(answer)) == answer

            says(b"", b"220 localhost\r\n")
            says(b"EHLO me\r\n", b"250-localhost\r\n250 STARTTLS\r\n")
            says(b"noop\r\nDATA\r\n", b"250 clear text\r\n502 no such command here\r\n")
            says(b"starttls\r\n", b"220 go ahead\r\n")
            peer.secure(client_context("1.3"))
            says(b"NOOP\r\n", b"250 TLSv1.3\r\n")
            says(b"EHLO me\r\nSTARTTLS\r\n", b"250 localhost\r\n502 no such command here\r\n")
            says(b"QUIT\r\nNOOP\r\n", b"221 bye\r\n")
            assert peer.read(1) == b""
        with s_client(port, "-starttls", "smtp", "-crlf") as client:
            output, _ = client.communicate(b"NOOP\nQUIT\n")
            assert output.endswith(b"250 TLSv1.3\r\n221 bye\r\n")
        with Peer(port) as peer:
            peer.send(b"QUIT\r\n")
            assert peer.read(100) == b"220 localhost\r\n221 bye\r\n"
        (line,) = child.error_output().splitlines()
        assert "the TLS handshake failed" in line


HEAD = "HTTP/1.1 200 OK\r\n"


@contextlib.contextmanager
def fetching(*arguments, context=None):
    """Run http_client with `arguments`, behind the port of a server; yield the child, and that server's end of the connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        url, *others = arguments
        with Example("http_client.py", url.format(listener.getsockname()[1]), *others) as child, far_end(listener) as peer:
            with contextlib.suppress(OSError):  # the client may not like the certificate
                peer.socket = (context or server_context()).wrap_socket(peer.socket, server_side=True)
            yield child, peer


REQUEST = "GET /page?x=1 HTTP/1.1\r\nHost: localhost:{}\r\nConnection: close\r\n\r\n"


def answer_a_request(listener, answer, goodbye):
    """Be the server of one request for ``/page?x=1``."""
    with far_end(listener) as peer:
        peer.socket = server_context().wrap_socket(peer.socket, server_side=True)
        request = REQUEST.format(listener.getsockname()[1]).encode()
        assert peer.read(len(request)) == request
        peer.send(answer.encode())
        if goodbye:
            with contextlib.suppress(ssl.SSLEOFError):  # after nonsense the client says none
                peer.socket.unwrap()


def fetched(answer, *, goodbye=True):
    """Return the exit code, the output and the error output of http_client when a server answers so."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        with ThreadPoolExecutor(1) as thread:
            serving = thread.submit(answer_a_request, listener, answer, goodbye)
            result = run_here("http_client.py", f"https://localhost:{listener.getsockname()[1]}/page?x=1", authority().file)
            serving.result()
        return result


def http_client(tmp_path):
    page = "one line\n" * 100_000
    length, chunked = f"{HEAD}content-length: {len(page)}\r\n\r\n", f"{HEAD}Transfer-Encoding: Chunked\r\n\r\n"
    to_the_end = f"{HEAD}X: y\r\n\r\n"
    with fetching("https://localhost:{}/page?x=1", authority().file) as (child, peer):
        request = REQUEST.format(peer.socket.getsockname()[1]).encode()
        assert peer.read(len(request)) == request
        peer.send((length + page).encode())
        peer.socket.unwrap()
        assert (child.end(), child.output, child.error_output()) == (0, length + page, "")
    assert fetched(length + page) == (0, length + page, "")
    assert fetched(f"{chunked}5;x=y\r\nhello\r\nC\r\n, you\r\nthere\r\n0\r\n\r\n") == (0, f"{chunked}hello, you\r\nthere", "")
    assert fetched(to_the_end + page) == (0, to_the_end + page, "")
    assert fetched(f"{HEAD}Content-Length: 0\r\n\r\n") == (0, f"{HEAD}Content-Length: 0\r\n\r\n", "")
    assert fetched(f"{chunked}no number\r\n") == (1, chunked, "invalid literal for int() with base 16: b'no number'\n")
    for answer in (length + "hello", f"{chunked}5\r\nhello\r\n"):
        code, _, error_output = fetched(answer)
        assert (code, error_output) == (1, "the answer is not complete\n")
    for answer in (HEAD, length + "hello", to_the_end + "hello"):
        code, _, error_output = fetched(answer, goodbye=False)
        assert code == 1
        assert "without a TLS goodbye" in error_output


def reconnecting(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.settimeout(PATIENCE)
        port = listener.getsockname()[1]
        with logged("reconnecting.py", port) as child:
            child.expect(rf"^cannot connect to localhost:{port}: .*refused")
            child.expect(r"^the connection could not be made; once more in 0\.[0-2] seconds$")
            listener.listen()
            with far_end(listener) as peer:
                child.expect(f"^connected to port {port}$")
                peer.send("Grüße\nhalf a li".encode())
                child.expect("^line: Grüße$")
            child.expect(r"^the peer ended the connection; once more in 0\.[0-4] seconds$")
            with far_end(listener) as peer:
                peer.send(b"bye\nnever mind\n")
                assert child.end() == 0
            assert child.output.endswith("line: bye\n")
            assert child.error_output() == ""


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


def unix_echo(tmp_path):
    path = str(tmp_path / "echo.sock")
    with keyboard_interrupts(), Example("unix_echo.py", path) as child:
        assert child.expect(r"nc -U (\S+) ")[1] == path
        peer = Peer.__new__(Peer)
        peer.socket = socket.socket(socket.AF_UNIX)
        with peer:
            peer.socket.settimeout(PATIENCE)
            peer.socket.connect(path)
            child.expect(f"^process {os.getpid()} of user {os.geteuid()} has connected$")
            peer.send(b"hello\n")
            assert peer.read(6) == b"hello\n"
            assert peer.rest() == b""
        with Example("unix_echo.py", path) as second:
            assert second.end() == 1
            (line,) = second.error_output().splitlines()
            assert path in line
            assert "somebody listens there" in line
        child.process.send_signal(signal.SIGINT)
        assert child.end() == 0
        assert child.output.endswith("Bye.\n")
        assert child.error_output() == ""
    assert not os.path.exists(path)


def udp_echo(tmp_path):
    with logged("udp_echo.py", 0) as child, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.settimeout(PATIENCE)
        port = child.port()
        assert f"nc -u 127.0.0.1 {port}" in child.output
        for data in (b"hello", b"", bytes(65507)):
            peer.sendto(data, ("127.0.0.1", port))
            assert peer.recvfrom(1 << 16) == (data, ("127.0.0.1", port))
        assert child.error_output() == ""


def multicast(tmp_path):
    if not multicast_works(socket.AF_INET, "239.77.71.1", "lo"):
        pytest.skip("this machine has no multicast on its loopback interface")
    with keyboard_interrupts(), logged("multicast.py", 0, "Ann", "lo") as ann:
        port = ann.port()
        with logged("multicast.py", port, "Björn", "127.0.0.1") as other:
            ann.expect(r"^Björn is here, at 127\.0\.0\.1$")
            other.expect(r"^Ann is here, at 127\.0\.0\.1$")
        ann.process.send_signal(signal.SIGINT)
        assert ann.end() == 0
        assert ann.output.splitlines() == [f"Ann listens on port {port}. Ctrl-C ends it.", "Björn is here, at 127.0.0.1", "", "Bye."]
        assert ann.error_output() == ""
    with Example("multicast.py", 0, "Ann", "no such one") as child:
        assert child.end() == 1
        assert child.error_output().startswith("this machine has no interface 'no such one'")


CHECKS = {
    "binary_protocol.py": binary_protocol,
    "blocking.py": blocking,
    "chat.py": chat,
    "echo.py": echo,
    "file_server.py": file_server,
    "http_client.py": http_client,
    "line_oriented.py": line_oriented,
    "multicast.py": multicast,
    "printer.py": printer,
    "proxy.py": proxy,
    "reconnecting.py": reconnecting,
    "regex_split.py": regex_split,
    "slip.py": slip,
    "slow_consumer.py": slow_consumer,
    "starttls.py": starttls,
    "timers.py": timers,
    "tls_echo.py": tls_echo,
    "tutorial1.py": tutorial1,
    "tutorial2.py": tutorial2,
    "tutorial3.py": tutorial3,
    "udp_echo.py": udp_echo,
    "unix_echo.py": unix_echo,
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


def test_reconnecting_ctrl_c_ends_it_without_a_word():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with Example("reconnecting.py", nobody.getsockname()[1]) as child:
            child.expect("once more")
            child.process.send_signal(signal.SIGINT)
            assert child.end() == 0
            assert child.error_output() == ""


#: What stands behind the port of those that want more.
FURTHER = {"proxy.py": ["localhost:1"], **dict.fromkeys(("starttls.py", "tls_echo.py"), authority().localhost.values())}

#: Those that listen on a port which nobody else may have.
NO_SERVERS = ("http_client.py", "multicast.py", "reconnecting.py", "unix_echo.py")
SERVERS = [name for name in CHECKS if "sys.argv" in (EXAMPLES / name).read_text() and name not in NO_SERVERS]


@pytest.mark.parametrize("port", ["70000", "http"])
@pytest.mark.parametrize("name", ["multicast.py", "reconnecting.py", *SERVERS])
def test_example_with_a_port_that_is_none_says_so_in_one_line(name, port):
    code, output, error_output = run_here(name, port, *FURTHER.get(name, ()))
    assert (code, output) == (1, "")
    (line,) = error_output.splitlines()
    assert port in line or line == f"usage: {EXAMPLES / name} [PORT]"


@pytest.mark.parametrize("name", SERVERS)
def test_example_as_a_second_copy_on_one_port_says_so_in_one_line(name):
    kind = socket.SOCK_DGRAM if name.startswith("udp") else socket.SOCK_STREAM
    with socket.socket(type=kind) as first:
        first.bind(("", 0))
        port = first.getsockname()[1]
        code, output, error_output = run_here(name, port, *FURTHER.get(name, ()))
    assert (code, output) == (1, "")
    (line,) = error_output.splitlines()
    assert f":{port}: Address already in use" in line


@pytest.mark.parametrize("name", ["proxy.py", "starttls.py", "http_client.py"])
def test_example_without_its_arguments_tells_how_to_try_it(name):
    code, output, error_output = run_here(name)
    assert (code, output) == (1, "")
    assert f"python examples/{name}" in error_output


def test_http_client_ctrl_c_ends_it_without_a_word():
    with fetching("https://127.0.0.1:{}", authority().file) as (child, peer):
        peer.read(len(b"GET / HTTP/1.1\r\n"))
        child.process.send_signal(signal.SIGINT)
        assert child.end() == 0
        assert (child.output, child.error_output()) == ("", "")


@pytest.mark.parametrize("wrong", ["authority", "name"])
def test_http_client_wrong_certificate_says_so_in_one_line(wrong):
    if wrong == "authority":
        cafile, certificate = other_authority().file, authority().localhost
    else:
        cafile, certificate = authority().file, authority().issue("elsewhere.example")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(**certificate)
    with fetching("https://localhost:{}", cafile, context=context) as (child, _):
        assert child.end() == 1
        (line,) = child.error_output().splitlines()
        assert {"authority": "unable to get local issuer certificate", "name": "Hostname mismatch"}[wrong] in line
        assert child.output == ""


@pytest.mark.parametrize(
    ("arguments", "trouble"),
    [
        (("https://localhost:{}/",), "[Errno 111] cannot connect to localhost:{}: Connection refused"),
        (("https://localhost/", "no such file"), "cannot read 'no such file': No such file or directory"),
        (("https://localhost:70000",), "Port out of range 0-65535"),
    ],
)
def test_http_client_what_cannot_work_is_said_in_one_line(arguments, trouble):
    port = free_port()
    code, output, error_output = run_here("http_client.py", *(one.format(port) for one in arguments))
    assert (code, output) == (1, "")
    (line,) = error_output.splitlines()
    assert line.endswith(trouble.format(port))


def test_tls_echo_without_its_files_says_which():
    code, output, error_output = run_here("tls_echo.py", 0, "no such file", "no such key")
    assert (code, output) == (1, "")
    assert error_output.endswith("cannot read 'no such file' or 'no such key': No such file or directory\n")
