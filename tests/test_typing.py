"""What type checkers see of the public classes: mypy runs over small programs. That the same works at run time, too."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from struct import Struct

import pytest
from waiting import nothing_is_kept  # noqa: F401

import pants_green
from pants_green import Server, Stream
from pants_green.framing import Framer
from pants_green.testing import memory_pair

ROOT = Path(pants_green.__file__).parents[1]

#: Each program by a name of its own; a comment says what mypy has to reveal, or to complain about, in that line.
PROGRAMS = {
    "on_read_gets_bytes_by_default": """
        class A(Stream):
            def on_read(self, data):
                reveal_type(data)  # Any

        class B(Stream):
            def on_read(self, data: bytes) -> None:
                reveal_type(data)  # bytes

        class C(Connection):
            def on_read(self, data: bytes) -> None:
                self.write(data)

        class D(Client):
            def on_read(self, data: bytes) -> None:
                self.write("text")

        class E(Stream[bytes]):
            def on_read(self, data: bytes) -> None: ...

        class F(Stream):
            def on_read(self, data: object) -> None: ...
    """,
    "on_read_gets_text": """
        class A(Stream[str]):
            encoding = "utf-8"

            def on_read(self, data: str) -> None:
                reveal_type(data)  # str
                self.write(data)
    """,
    "on_read_gets_fields": """
        class A(Stream[int, int]):
            read_delimiter = Struct("!BH")

            def on_read(self, kind: int, size: int) -> None: ...

        class B(Stream[int, bytes, str]):
            def on_read(self, a: int, b: bytes, c: str) -> None: ...

        class C(Stream[re.Match[bytes]]):
            read_delimiter = re.compile(b"x")
            regex_search = False

            def on_read(self, match: re.Match[bytes]) -> None: ...
    """,
    "on_read_of_another_type_is_an_error": """
        class A(Stream):
            def on_read(self, data: str) -> None: ...  # error: override

        class B(Stream[str]):
            def on_read(self, data: bytes) -> None: ...  # error: override

        class C(Stream[int, int]):
            def on_read(self, data: int) -> None: ...  # error: override

        class D(Stream[int, int]):
            def on_read(self, a: int, b: str) -> None: ...  # error: override

        class E(Connection):
            def on_read(self, data: int) -> None: ...  # error: override
    """,
    "other_callbacks_of_another_type_are_errors": """
        class A(Stream):
            def on_end(self, rest: str) -> None: ...  # error: override

        class B(Stream):
            def on_timeout(self) -> None: ...  # error: override

        class C(Stream):
            def on_end(self, rest: bytes) -> None: ...
            def on_timeout(self, which: str) -> None: ...
            def on_write(self) -> None: ...
            def on_error(self, exception: BaseException) -> None: ...
    """,
    "callbacks_about_the_end": """
        class A(Connection):
            def on_stopping(self, deadline: float) -> None:
                reveal_type(self.stopping)  # bool

        class B(Connection):
            def on_stopping(self) -> None: ...  # error: override
    """,
    "packets": """
        class A(Datagram):
            def on_read(self, data: bytes) -> None:
                self.write(data)
                self.write("text", ("localhost", 7))

        class B(Datagram[int, int]):
            read_delimiter = Struct("!BH")

            def on_read(self, kind: int, size: int) -> None: ...

        class C(Datagram):
            def on_read(self, data: int) -> None: ...  # error: override
    """,
    "read_of_bytes": """
        class A(Stream):
            def on_connect(self) -> None:
                reveal_type(self.read(b"x"))  # bytes
                reveal_type(self.read("x", timeout=1.5))  # bytes
                reveal_type(self.read(4))  # bytes
                reveal_type(self.read(None))  # bytes
                reveal_type(self.read(Struct("!I")))  # tuple[Any, ...]
                reveal_type(self.read(LengthPrefix()))  # bytes
                reveal_type(self.read(Netstring(), 3))  # bytes
                reveal_type(self.read(Number()))  # int
                reveal_type(self.read())  # Any
                reveal_type(self.read(timeout=3))  # Any

        class B(Connection):
            def on_read(self, data: bytes) -> None:
                reveal_type(self.read(b"x"))  # bytes

        class C(Client):
            def on_connect(self) -> None:
                reveal_type(self.read(b"x", None))  # bytes
    """,
    "read_of_text": """
        class A(Stream[str]):
            encoding = "utf-8"

            def on_connect(self) -> None:
                reveal_type(self.read(b"x"))  # str
                reveal_type(self.read("x"))  # str
                reveal_type(self.read(None))  # str
                reveal_type(self.read(4, timeout=1))  # str
                reveal_type(self.read(Struct("!I")))  # tuple[Any, ...]
                reveal_type(self.read(Number()))  # int
    """,
    "arguments_of_a_wrong_type_are_errors": """
        class A(Stream):
            def on_connect(self) -> None:
                self.read(b"x", timeout="1")  # error: call-overload
                self.write_eof(1)  # error: call-arg
                self.close(True)
                self.write(b"x", flush=True)
    """,
    "connection_classes": """
        class A(Stream[int, int]):
            def on_read(self, a: int, b: int) -> None: ...

        class B(Server):
            ConnectionClass = A

        Server(ConnectionClass=A)
        Server(A)
        Server(Connection)
    """,
    "settings": """
        class A(Stream):
            read_delimiter = b"x"
            encoding = None
            regex_search = False
            buffer_size = 10
            read_timeout = 3.5
            write_timeout = None
            overflow = "drop"
            allow_half_open = True

        class B(Stream):
            def on_connect(self) -> None:
                reveal_type(self.read_delimiter)  # Any
                reveal_type(self.encoding)  # str | None
                reveal_type(self.regex_search)  # bool
                reveal_type(self.buffer_size)  # int
                reveal_type(self.read_timeout)  # float | None
                reveal_type(self.overflow)  # str
                reveal_type(self.paused)  # bool
                self.read_delimiter = 4
                self.read_delimiter = None
                self.encoding = "latin-1"
                self.encoding = None
                self.read_timeout = None
                self.buffer_size = 20
    """,
    "settings_whose_type_changes_are_annotated": """
        class A(Stream):
            read_delimiter: bytes | int | None = b"x"
            encoding: str | None = "utf-8"

            def on_connect(self) -> None:
                self.read_delimiter = 4
                self.read_delimiter = None
                self.encoding = None
    """,
}

HEAD = """\
import re
from struct import Struct
from typing import Any

from pants_green import Client, Connection, Datagram, Server, Stream
from pants_green.framing import Framer, LengthPrefix, Netstring


class Number(Framer[int]):
    def find(self, data: bytes | bytearray, start: int, searched: int) -> tuple[int, int] | int | None:
        return None

"""


@pytest.fixture(scope="module")
def revealed(tmp_path_factory, pytestconfig):
    """Return what mypy says of each line of the programs: ``{name: {line: [messages]}}``."""
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("typed")
    for name, text in PROGRAMS.items():
        (folder / f"{name}.py").write_text(HEAD + textwrap.dedent(text))
    # One run for all, and what it has learned about the library is kept for the next.
    cache = pytestconfig.cache.mkdir("mypy")
    # As a user has it, to whom the library is installed: its own lines are not looked at, and gevent has no types.
    options = ["--config-file=", "--check-untyped-defs", "--follow-imports=silent", "--ignore-missing-imports", "--cache-dir", str(cache)]
    files = sorted(map(str, folder.glob("*.py")))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--no-error-summary", "--hide-error-context", *files],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
    )
    found = {name: {} for name in PROGRAMS}
    for line in done.stdout.splitlines():
        match = re.match(r"(?:.*/)?(\w+)\.py:(\d+): (error|note): (.*)", line)
        assert match, done.stdout + done.stderr
        if match[1] in found:
            found[match[1]].setdefault(int(match[2]), []).append((match[3], match[4]))
    assert any(found.values()), done.stdout + done.stderr
    return found


def plain(text):
    """Return a type without the modules of its names."""
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text)


@pytest.mark.parametrize("name", PROGRAMS)
def test_mypy_sees(revealed, name):
    wanted, got = {}, {}
    for number, line in enumerate((HEAD + textwrap.dedent(PROGRAMS[name])).splitlines(), 1):
        code, _, comment = line.partition("  # ")
        if comment:
            wanted[number] = comment if comment.startswith("error") else f"{code.strip()} is {comment}"
        for kind, text in revealed[name].get(number, ()):
            if shown := re.match(r'Revealed type is "(.*)"', text):
                got[number] = f"{code.strip()} is {plain(shown[1])}"
            elif kind == "error":
                got[number] = f"error: {text.rpartition('[')[2].rstrip(']')}"
    assert got == wanted


# ---- At run time


class Number(Framer[int]):
    def find(self, data, start, searched):
        return (int(bytes(data[start : start + 1])), start + 1) if len(data) > start else 1


class Pair(Stream[int, int]):
    read_delimiter = Struct("!BB")

    def on_read(self, a: int, b: int) -> None:
        self.write(bytes((a + b,)))


class Text(Stream[str]):
    encoding = "utf-8"
    read_delimiter = "\n"

    def on_read(self, line: str) -> None:
        self.write(line.upper())


@pytest.mark.parametrize("way", ["argument", "attribute"])
def test_subscripted_stream_works_as_connection_class(server_of, peer, way):
    class Holder(Server):
        ConnectionClass = Pair

    server = server_of(Pair) if way == "argument" else server_of(server_class=lambda _: Holder())
    one = peer(server)
    one.send(b"\1\2\3\4")
    assert one.recv_exactly(2) == b"\3\7"


def test_subscripted_stream_of_text_answers_in_text(server_of, peer):
    one = peer(server_of(Text))
    one.send("é\n".encode())
    assert one.recv_exactly(2).decode() == "É"


def test_subscripted_stream_is_still_a_stream():
    assert type(Stream[int, int]()) is Stream
    assert Stream in Pair.__bases__
    assert isinstance(Pair(), Stream)


def test_subscripted_stream_can_dial(server_of, recorder):
    class Told(Stream[int, int]):
        read_delimiter = Struct("!BB")

        def on_connect(self) -> None:
            self.write(b"\1\2\3\4")

        def on_read(self, a: int, b: int) -> None:
            recorder(a, b)
            self.end()

        def on_close(self) -> None:
            recorder("closed")

    Told().connect(server_of(Pair).local_address)
    recorder.wait_for("closed")
    assert recorder == [(3, 7), "closed"]


@pytest.mark.parametrize("types", [str, (str,), (int, int), (str, bytes, int), [str]], ids=repr)
def test_stream_can_be_subscripted_by_any_number_of_types(recorder, types):
    class Kind(Stream[types]):
        encoding = "latin-1"

    stream, end = memory_pair(recorder.of(Kind))
    assert stream.encoding == "latin-1"
    end.send(b"\xe9")
    recorder.wait_for(("on_read", "é"))
    end.close()
    recorder.wait_for("on_close")


def test_generic_subclass_of_the_user_keeps_its_settings(recorder):
    class Lines(Stream[int]):
        read_delimiter = Number()

    class More(Lines):
        buffer_size = 10

    _stream, end = memory_pair(recorder.of(More))
    end.send(b"12")
    end.close()
    recorder.wait_for("on_close")
    assert recorder[1:3] == [("on_read", 1), ("on_read", 2)]


def test_framer_can_be_subscripted_and_is_still_abstract():
    class Unfinished(Framer[int]):
        pass

    with pytest.raises(TypeError, match="find"):
        Unfinished()
    assert Number().find(b"7", 0, 0) == (7, 1)
