"""TLS with peers that others have written: openssl s_client, curl, the standard library's ssl, and asyncio."""

import hashlib
import os
import re
import shutil
import ssl

import gevent
import gevent.subprocess
import pytest
from certificates import authority, other_authority
from echoes import Echo, EchoLines
from test_load import Program
from waiting import nothing_is_kept  # noqa: F401

from pants_green import Client, CloseReason, Connection

MIB = 1 << 20

VERSIONS = ["1.2", "1.3"]

#: Seconds for which a program may say nothing, and which it may take to end.
PATIENCE = 10.0

# gevent's subprocess forks, and what becomes of it here is exec at once.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def needs(program):
    """Skip a test if this machine has no such program."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"this machine has no {program}")


class Running:
    """A program that is spoken with by stdin and stdout, which waits cooperatively; a context manager that ends it."""

    def __init__(self, *command):
        self.output = ""
        self.process = gevent.subprocess.Popen(
            [*map(str, command)], stdin=gevent.subprocess.PIPE, stdout=gevent.subprocess.PIPE, stderr=gevent.subprocess.STDOUT
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout):
            try:
                file.close()
            except OSError:
                pass

    def say(self, text):
        """Write to its stdin."""
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def expect(self, pattern):
        """Wait until `pattern` is found in what it has said since the last match, and return the match."""
        with gevent.Timeout(PATIENCE, False):
            while not (found := re.search(pattern, self.output)):
                data = os.read(self.process.stdout.fileno(), 65536) if self._readable() else b""
                if not data:
                    break
                self.output += data.decode(errors="replace")
            if found:
                self.output = self.output[found.end() :]
                return found
        raise AssertionError(f"{self.process.args} has not said {pattern!r} (exit code {self.process.poll()}):\n{self.output}")

    def _readable(self):
        gevent.socket.wait_read(self.process.stdout.fileno())
        return True

    def finish(self):
        """End its stdin, wait for its end, and return the exit code and the rest of what it has said."""
        with gevent.Timeout(PATIENCE, False):
            try:
                self.process.stdin.close()
            except OSError:
                pass
            while self._readable() and (data := os.read(self.process.stdout.fileno(), 65536)):
                self.output += data.decode(errors="replace")
            return self.process.wait(), self.output
        raise AssertionError(f"{self.process.args} does not end:\n{self.output}")


def s_client(server, *options, trusts=None):
    """Start openssl s_client, which checks the server's certificate and name."""
    return Running(
        *("openssl", "s_client", "-connect", f"127.0.0.1:{server.local_address[1]}"),
        *("-CAfile", (trusts or authority()).file, "-verify_return_error", *options),
    )


#: s_client's last words before it passes on what is said.
READY = r"Verify return code: 0 \(ok\)(.|\n)*?\n---\n"


def local_options(**more):
    return {**authority().localhost, **more}


# ---- openssl s_client


@needs("openssl")
@pytest.mark.parametrize(("flag", "version"), [(None, "TLSv1.3"), ("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")])
def test_s_client_talks_and_takes_its_leave(server_of, recorder, flag, version):
    kind = recorder.of(EchoLines, "on_connect", "on_read", "on_end", "on_ssl_error", "on_close")
    server = server_of(kind, on_ssl_handshake=lambda stream: recorder(stream.cipher[1])).startSSL(local_options())
    with s_client(server, *[flag] * (flag is not None)) as client:
        client.expect(f"New, {version}, Cipher is")
        client.expect(READY)
        client.say("hello\n")
        client.expect("hello\n")
        client.say("and goodbye\n")
        client.expect("and goodbye\n")
        code, rest = client.finish()
    assert code == 0, rest
    recorder.wait_for("on_close")
    assert recorder == [
        version,
        ("on_connect",),
        ("on_read", b"hello"),
        ("on_read", b"and goodbye"),
        ("on_end", b""),
        ("on_close",),
    ]


@needs("openssl")
def test_s_client_is_told_that_the_server_ends(server_of):
    server = server_of(EchoLines, on_read=lambda stream, line: (stream.write(b"that was all\n"), stream.end()))
    server.startSSL(local_options())
    with s_client(server) as client:
        client.expect(READY)
        client.say("end\n")
        client.expect("that was all\n")
        client.expect("(?i)closed")  # an end without goodbye is an error: "unexpected eof while reading"
        code, rest = client.finish()
    assert code == 0, rest
    assert "unexpected eof" not in rest


@needs("openssl")
@pytest.mark.parametrize("flag", ["-tls1_2", "-tls1_3"])
@pytest.mark.parametrize(("offered", "chosen"), [("h2,talk", "talk"), ("talk", "talk"), ("h2", None)])
def test_s_client_alpn(server_of, recorder, flag, offered, chosen):
    server = server_of(EchoLines, on_connect=lambda stream: recorder(stream.alpn_protocol))
    server.startSSL(local_options(alpn_protocols=["talk", "other"]))
    with s_client(server, flag, "-alpn", offered) as client:
        client.expect(f"ALPN protocol: {chosen}" if chosen else "No ALPN negotiated")
        recorder.wait_for(1)
        client.finish()
    assert recorder == [chosen]


@needs("openssl")
@pytest.mark.parametrize("flag", ["-tls1_2", "-tls1_3"])
@pytest.mark.parametrize(
    ("name", "expected"), [("one.example", "one"), ("ONE.Example", "one"), ("a.wild.example", "wild"), ("other", "default")]
)
def test_s_client_servername(server_of, flag, name, expected):
    issue = authority().issue
    entries = {
        "one.example": issue("one.example", common_name="one"),
        "*.wild.example": issue("*.wild.example", common_name="wild"),
    }
    options = {**issue("localhost", common_name="default"), "sni": entries}
    server = server_of(EchoLines).startSSL(options)
    with s_client(server, flag, "-servername", name) as client:
        client.expect(f"subject=.*CN ?= ?{expected}\n")
        client.expect(READY)
        client.say("hello\n")
        client.expect("hello\n")
        assert client.finish()[0] == 0


@needs("openssl")
def test_s_client_checks_the_name(server_of):
    server = server_of(EchoLines).startSSL(local_options())
    with s_client(server, "-verify_hostname", "localhost") as client:
        client.expect(READY)
        assert client.finish()[0] == 0
    with s_client(server, "-verify_hostname", "elsewhere.example") as client:
        code, said = client.finish()
    assert code != 0
    assert "hostname mismatch" in said.lower()


@needs("openssl")
@pytest.mark.parametrize("flag", ["-tls1_2", "-tls1_3"])
def test_s_client_that_does_not_trust_the_server_leaves_it_as_it_is(server_of, recorder, flag):
    server = server_of(recorder.of(EchoLines, "on_connect")).startSSL(local_options())
    server.on_ssl_wrap_error = lambda sock, addr, exception: recorder(type(exception))
    with s_client(server, flag, trusts=other_authority()) as client:
        code, said = client.finish()
    assert code != 0
    assert "verify failed" in said
    recorder.wait_for(1)
    assert recorder == [ssl.SSLError]
    with s_client(server, flag) as client:
        client.expect(READY)
        assert client.finish()[0] == 0


@needs("openssl")
@pytest.mark.parametrize("flag", ["-tls1_2", "-tls1_3"])
@pytest.mark.parametrize("shows", ["ours", "another's", "nothing"])
def test_s_client_certificate(server_of, recorder, flag, shows):
    def tell(stream):
        recorder(dict(pair for group in stream.peer_certificate["subject"] for pair in group)["commonName"])

    server = server_of(EchoLines, on_connect=tell)
    server.on_ssl_wrap_error = lambda sock, addr, exception: recorder(exception.reason)
    server.startSSL(local_options(ca_certs=authority().file, cert_reqs=ssl.CERT_REQUIRED))
    issued = (authority() if shows == "ours" else other_authority()).issue("somebody", common_name="Somebody")
    options = [] if shows == "nothing" else ["-cert", issued["certfile"], "-key", issued["keyfile"]]
    with s_client(server, flag, *options) as client:
        if shows == "ours":
            client.expect(READY)
            client.say("hello\n")
            client.expect("hello\n")
            assert client.finish()[0] == 0
        else:
            client.expect("alert")
            client.finish()
    expected = {"ours": "Somebody", "another's": "CERTIFICATE_VERIFY_FAILED", "nothing": "PEER_DID_NOT_RETURN_A_CERTIFICATE"}
    recorder.wait_for(1)
    assert recorder == [expected[shows]]


@needs("openssl")
def test_s_client_that_renegotiates_is_refused(server_of, recorder):
    server = server_of(recorder.of(EchoLines, "on_ssl_handshake", "on_connect", "on_read", "on_close")).startSSL(local_options())
    with s_client(server, "-tls1_2") as client:
        client.expect(READY)
        client.say("before\n")
        client.expect("before\n")
        client.say("R\n")
        client.expect("RENEGOTIATING")
        client.expect("no renegotiation")
        client.finish()
    recorder.wait_for("on_close")
    assert recorder == [("on_ssl_handshake",), ("on_connect",), ("on_read", b"before"), ("on_close",)]


@needs("openssl")
@pytest.mark.parametrize("command", ["K", "k"])
def test_s_client_that_updates_its_keys_is_understood(server_of, recorder, command):
    """K asks for new keys of the other side, too; k does not."""
    server = server_of(recorder.of(EchoLines, "on_read", "on_ssl_error", "on_close")).startSSL(local_options())
    with s_client(server, "-tls1_3") as client:
        client.expect(READY)
        client.say("before\n")
        client.expect("before\n")
        for number in range(5):
            client.say(f"{command}\n")
            client.expect("KEYUPDATE")
            client.say(f"after {number}\n")
            client.expect(f"after {number}\n")
        code, rest = client.finish()
    assert code == 0, rest
    recorder.wait_for("on_close")
    assert recorder == [("on_read", line) for line in (b"before", *(b"after %d" % number for number in range(5)))] + [("on_close",)]


@needs("openssl")
def test_s_client_that_resumes_a_session(server_of, tmp_path):
    server = server_of(EchoLines).startSSL(local_options())
    session = tmp_path / "session.pem"
    for flag, again in (("-sess_out", "New"), ("-sess_in", "Reused")):
        with s_client(server, "-tls1_2", flag, session) as client:
            client.expect(f"{again}, TLSv1.2")
            client.expect("Verify return code: 0")
            client.say("hello\n")
            client.expect("hello\n")
            assert client.finish()[0] == 0


# ---- curl


class WebConnection(Connection):
    """Just enough of HTTP: GET / tells who asked, POST echoes; /close answers without a length, and ends."""

    read_delimiter = b"\r\n\r\n"
    buffer_size = 8 * MIB

    def on_read(self, head):
        request, *fields = head.decode().split("\r\n")
        method, path, _ = request.split()
        headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
        body = b""
        if "expect" in headers:
            self.write("HTTP/1.1 100 Continue\r\n\r\n")
        if int(headers.get("content-length", 0)):
            body = self.read(int(headers["content-length"]))
        answer = body if method == "POST" else f"{method} {path} by {self.cipher[1]}\n".encode()
        if path == "/close":
            self.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + answer)
            self.end()
        else:
            self.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))


def curl(server, path, *options):
    """Run curl, which checks the server's certificate and name, and return the exit code and what it says."""
    port = server.local_address[1]
    where = ("--resolve", f"localhost:{port}:127.0.0.1", "--cacert", authority().file, "--max-time", "10")
    urls = [f"https://localhost:{port}{one}" for one in ([path] if isinstance(path, str) else path)]
    with Running("curl", "-sS", *where, *options, *urls) as running:
        return running.finish()


@needs("curl")
@pytest.mark.parametrize("options", [(), ("--tls-max", "1.2")], ids=["1.3", "1.2"])
@pytest.mark.parametrize("path", ["/", "/close"])
def test_curl_gets_an_answer(server_of, recorder, path, options):
    server = server_of(recorder.of(WebConnection, "on_ssl_error", "on_error", "on_close")).startSSL(local_options())
    version = "TLSv1.2" if options else "TLSv1.3"
    assert curl(server, path, *options) == (0, f"GET {path} by {version}\n")
    recorder.wait_for("on_close")
    assert recorder == [("on_close",)]


@needs("curl")
@pytest.mark.parametrize("path", ["/", "/close"])
def test_curl_posts_megabytes_and_gets_them_back(server_of, recorder, tmp_path, path):
    sent, received = tmp_path / "sent", tmp_path / "received"
    sent.write_bytes(os.urandom(4 * MIB))
    server = server_of(recorder.of(WebConnection, "on_ssl_error", "on_error", "on_close")).startSSL(local_options())
    assert curl(server, path, "--data-binary", f"@{sent}", "-o", received) == (0, "")
    assert received.read_bytes() == sent.read_bytes()
    recorder.wait_for("on_close")
    assert recorder == [("on_close",)]


@needs("curl")
def test_curl_keeps_the_connection_for_a_second_request(server_of, recorder):
    server = server_of(recorder.of(WebConnection, "on_connect", "on_close")).startSSL(local_options(alpn_protocols=["http/1.1"]))
    assert curl(server, ["/one", "/two"], "--http1.1") == (0, "GET /one by TLSv1.3\nGET /two by TLSv1.3\n")
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("on_close",)]


@needs("curl")
def test_curl_that_does_not_trust_the_server_says_so(server_of):
    issued = other_authority().localhost
    server = server_of(WebConnection).startSSL(issued)
    code, said = curl(server, "/")
    assert code == 60
    assert "certificate" in said


@needs("curl")
def test_curl_shows_its_certificate(server_of):
    def answer(stream, head):
        (name,) = [value for group in stream.peer_certificate["subject"] for key, value in group if key == "commonName"]
        stream.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(name)}\r\n\r\n{name}")

    server = server_of(WebConnection, on_read=answer)
    server.startSSL(local_options(ca_certs=authority().file, cert_reqs=ssl.CERT_REQUIRED))
    issued = authority().issue("somebody", common_name="Somebody")
    assert curl(server, "/", "--cert", issued["certfile"], "--key", issued["keyfile"]) == (0, "Somebody")
    assert curl(server, "/")[0] != 0


@needs("curl")
def test_curl_without_tls_gets_nothing_and_does_no_harm(server_of, recorder):
    server = server_of(recorder.of(WebConnection, "on_connect", "on_read")).startSSL(local_options())
    with Running("curl", "-sS", "--max-time", "10", f"http://127.0.0.1:{server.local_address[1]}/") as running:
        assert running.finish()[0] != 0
    assert recorder == []
    assert curl(server, "/") == (0, "GET / by TLSv1.3\n")


# ---- the standard library


@pytest.fixture
def peers():
    """Return a function that starts a program of ``tls_load_peers.py``; ended at the end."""
    programs = []

    def start(name, *arguments):
        program = Program("tls_load_peers.py", name, *arguments)
        programs.append(program)
        return program

    yield start
    for program in programs:
        program.close()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [2048, 2 * MIB])
def test_blocking_ssl_socket_is_echoed_and_takes_leave_in_both_directions(server_of, peers, recorder, version, size):
    server = server_of(recorder.of(Echo, "on_connect", "on_end", "on_ssl_error", "on_close")).startSSL(local_options())
    outcome = peers("blocking", authority().file, server.local_address[1], version, size).line()
    assert outcome == {"same": True, "version": f"TLSv{version}", "rest": 0}
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("on_end", b""), ("on_close",)]


@pytest.mark.parametrize("version", VERSIONS)
def test_asyncio_is_echoed_megabytes_both_ways_at_once(server_of, peers, recorder, version):
    server = server_of(recorder.of(Echo, "on_connect", "on_end", "on_ssl_error", "on_close")).startSSL(local_options())
    outcome = peers("asynchronous", authority().file, server.local_address[1], version, 6 * MIB).line()
    assert outcome == {"same": True, "version": f"TLSv{version}"}
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("on_end", b""), ("on_close",)]


class Asking(Client):
    """Sends a lot, takes a digest of what comes back, and ends when all has come."""

    blob = b""
    received = 0

    def on_connect(self):
        self.digest = hashlib.sha256()
        self.write(self.blob)

    def on_read(self, data):
        self.digest.update(data)
        self.received += len(data)
        if self.received == len(self.blob):
            self.end()


NAMES = ("on_ssl_handshake", "on_connect", "on_end", "on_ssl_handshake_error", "on_ssl_error", "on_error", "on_close")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [1000, 3 * MIB])
def test_ssl_server_of_the_standard_library_serves_our_client(peers, recorder, version, size):
    serving = peers("serve", *authority().localhost.values(), version, "waits")
    client = recorder.of(Asking, *NAMES, blob=os.urandom(size))(ssl_options={"ca_certs": authority().file})
    client.connect(("localhost", serving.line()["port"]))
    recorder.wait_for("on_close", timeout=15.0)
    assert recorder.names() == ["on_ssl_handshake", "on_connect", "on_close"]
    assert client.digest.digest() == hashlib.sha256(client.blob).digest()
    assert client.cipher[1] == f"TLSv{version}"
    assert serving.line() == {"received": size, "truncated": False}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("manners", "ends"), [("leaves", "on_end"), ("truncates", "on_ssl_error")])
def test_ssl_server_of_the_standard_library_that_leaves_first(peers, recorder, version, manners, ends):
    serving = peers("serve", *authority().localhost.values(), version, manners)
    kind = recorder.of(Asking, *NAMES, blob=b"hello", on_read=lambda stream, data: recorder(data))
    client = kind(ssl_options={"ca_certs": authority().file})
    client.connect(("localhost", serving.line()["port"]))
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_ssl_handshake", "on_connect", b"hello", ends, "on_close"]
    assert client.close_reason == (CloseReason.PEER_ENDED if manners == "leaves" else CloseReason.TLS_FAILED)
    assert serving.line() == {"received": 5, "truncated": False}


def test_ssl_server_of_the_standard_library_that_our_client_does_not_trust(peers, recorder):
    serving = peers("serve", *other_authority().localhost.values(), "1.3", "waits")
    client = recorder.of(Asking, *NAMES)(ssl_options={"ca_certs": authority().file})
    client.connect(("localhost", serving.line()["port"]))
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_ssl_handshake_error", "on_close"]
    assert isinstance(recorder[0][1], ssl.SSLCertVerificationError)
