"""Files on their way out: what is sent of them, and in which place; from which objects; and what becomes of their descriptors."""

import codecs
import errno
import functools
import gzip
import io
import itertools
import logging
import mmap
import os
import pathlib
import random
import re
import resource
import tempfile
import textwrap
import time
import zipfile
import zlib
from struct import Struct

import gevent
import pytest
from certificates import authority, client_context
from children import Child
from gevent import monkey
from gevent.event import Event
from gevent.fileobject import FileObjectThread
from needs import needs_proc
from peers import in_thread
from tls_peers import TLSPeer, tls_peer  # noqa: F401
from transports import NARROW, TCPServer, TLS12Server, TLS13Server, Transport, UnixPair
from waiting import nothing_is_kept, settle, turns, unsent, until  # noqa: F401

from pants_green import ChannelClosed, CloseReason, Connection, Engine, Stream, _files
from pants_green.testing import memory_pair

KIB = 1024
MIB = 1024 * KIB

#: A file that is sent from its descriptor, and more than a narrow connection takes at once.
LARGE = 1 * MIB

#: One that is not worth a descriptor of its own.
SMALL = 1000

#: For real threads; gevent's would make a hub there.
real_sleep = monkey.get_original("time", "sleep")

BEHIND = b"what comes behind it"


def data_of(size, seed=0):
    """Return bytes of which no part looks like another."""
    return random.Random(seed).randbytes(size)


@pytest.fixture
def file_of(tmp_path):
    """Return a function that makes a file with this content, bytes or as many of them as are said, and returns its path and that."""
    numbers = itertools.count()

    def make(content):
        number = next(numbers)
        if isinstance(content, int):
            content = data_of(content, number)
        path = tmp_path / f"file {number}"
        path.write_bytes(content)
        return path, content

    return make


@pytest.fixture
def hollow_file(tmp_path):
    """Return a function that makes a file of that many zeros, which takes no room on the disk, and returns its path."""

    def make(size):
        path = tmp_path / f"{size} zeros"
        path.touch()
        os.truncate(path, size)
        return path

    return make


def send_file(stream, path, *args, **options):
    """Have a stream send a file that is closed at once."""
    with open(path, "rb") as file:
        stream.write_file(file, *args, **options)


def held(path):
    """Return how many descriptors of this process stand for a file."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{name}").removesuffix(" (deleted)") == str(path)
        except FileNotFoundError:
            pass  # that of the listing itself
    return count


class MemoryPeer:
    """The face of a Peer for the end of a memory pair."""

    def __init__(self, end):
        self.end = end
        self._taken = 0

    def recv_exactly(self, size):
        return self._next(self.end.wait_for(self._taken + size), size)

    def recv_all(self):
        return self._next(self.end.wait_for())

    def _next(self, received, size=None):
        data = received[self._taken :][:size]
        self._taken += len(data)
        return data

    def close(self):
        self.end.close()


class MemoryPair(Transport):
    """Two ends joined in memory, without a descriptor."""

    def connect(self, stream_class, *, narrow=False):
        stream, end = memory_pair(stream_class, capacity=NARROW if narrow else 4 * NARROW)
        self._streams.append(stream)
        peer = MemoryPeer(end)
        self._peers.append(peer)
        return self._standing(stream), peer


TRANSPORTS = {"tcp": TCPServer, "unix": UnixPair, "tls 1.2": TLS12Server, "tls 1.3": TLS13Server, "memory": MemoryPair}


@pytest.fixture(params=TRANSPORTS)
def transport(request):
    """Return a transport of each kind."""
    with TRANSPORTS[request.param]() as made:
        yield made


@pytest.fixture
def tcp():
    """Return a transport over TCP, for what is the same everywhere."""
    with TCPServer() as made:
        yield made


@pytest.fixture(params=["tcp", "tls 1.3"])
def sending(request):
    """Return a transport over which the kernel sends, and one over which we have to read."""
    with TRANSPORTS[request.param]() as made:
        yield made


# ---- what is sent


@pytest.mark.parametrize("narrow", [False, True])
def test_s4_21_write_file_sends_the_content_of_the_file(transport, file_of, narrow):
    stream, peer = transport.connect(Connection, narrow=narrow)
    whole = b""
    for size in (1, SMALL, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 3 * 64 * KIB, LARGE + 3):
        path, content = file_of(size)
        send_file(stream, path)
        whole += content
    stream.end()
    assert peer.recv_all() == whole


@pytest.mark.parametrize("places", ["file", "file data", "data file", "data file data", "file file", "data data file file data data"])
def test_order_file_first_last_and_alone(tcp, file_of, places):
    for size in (SMALL, 100 * KIB):
        stream, peer = tcp.connect(Connection)
        whole = b""
        for number, what in enumerate(places.split()):
            if what == "file":
                path, content = file_of(size)
                send_file(stream, path)
            else:
                content = b"data %d" % number
                stream.write(content)
            whole += content
        assert unsent(stream) == len(whole)
        stream.end()
        assert peer.recv_all() == whole


@pytest.mark.parametrize("narrow", [False, True])
def test_order_many_files_and_writes_of_one_turn_go_out_in_turn(transport, file_of, narrow):
    stream, peer = transport.connect(Connection, narrow=narrow)
    files = [file_of(size) for size in (0, 1, SMALL, 70 * KIB, 5)]
    whole = []
    for number in range(60):
        path, content = files[number % len(files)]
        send_file(stream, path)
        data = b"<%d>" % number * (number % 4)
        stream.write(data)
        whole += [content, data]
    stream.end()
    assert peer.recv_all() == b"".join(whole)


def test_order_two_callers_what_each_writes_at_once_stays_together(transport, file_of):
    stream, peer = transport.connect(Connection, narrow=True)
    whole = []

    def write(seed):
        for number in range(6):
            path, content = file_of(90 * KIB if number % 2 else 100)
            stream.write(b"head %d" % seed)
            send_file(stream, path)
            stream.write(b"tail")
            whole.extend([b"head %d" % seed, content, b"tail"])
            gevent.sleep(0)

    gevent.joinall([gevent.spawn(write, seed) for seed in range(2)])
    stream.end()
    assert peer.recv_all() == b"".join(whole)


@pytest.mark.parametrize("size", [SMALL, 150 * KIB])
def test_part_every_offset_and_count_sends_what_there_is(transport, file_of, size):
    path, content = file_of(size)
    stream, peer = transport.connect(Connection)
    whole = []
    numbers = [0, 1, size // 2, size - 1, size, size + 1, 1 << 70]
    for nbytes, offset in itertools.product(numbers, numbers):
        send_file(stream, path, nbytes, offset)
        stream.write(b"|")
        whole += [content[offset:][: nbytes or None], b"|"]
    send_file(stream, path, offset=10, nbytes=20)
    stream.end()
    assert peer.recv_all() == b"".join(whole) + content[10:30]


@pytest.mark.parametrize("what", ["empty", "past the end", "at the end", "empty, without a descriptor"])
def test_e1_9_zero_length_file_or_offset_past_the_end_stalls_nothing(transport, file_of, what):
    path, _ = file_of(0 if what == "empty" else 100)
    stream, peer = transport.connect(Connection)

    def nothing():
        if what == "empty, without a descriptor":
            stream.write_file(io.BytesIO())
        else:
            send_file(stream, path, offset={"empty": 0, "past the end": 1000, "at the end": 100}[what])

    nothing()
    assert unsent(stream) == 0
    stream.write(b"one")
    nothing()
    stream.write(b"two")
    nothing()
    assert peer.recv_exactly(6) == b"onetwo"
    nothing()
    stream.write(b"three")
    stream.end()
    assert peer.recv_all() == b"three"


def test_zero_length_file_flush_sends_what_was_written_before(tcp, file_of):
    stream, _ = tcp.connect(Connection)
    stream.write(b"before")
    send_file(stream, file_of(0)[0], flush=True)
    assert unsent(stream) == 0


@pytest.mark.parametrize("what", ["closed", "unlinked", "renamed", "replaced"])
def test_e1_10_file_that_is_gone_right_after_the_call_is_sent_whole(transport, file_of, what):
    path, content = file_of(LARGE)
    stream, peer = transport.connect(Connection, narrow=True)
    with open(path, "rb") as file:
        stream.write_file(file)
    if what == "unlinked":
        path.unlink()
    elif what == "renamed":
        path.rename(path.with_name("renamed"))
    elif what == "replaced":
        os.replace(file_of(b"something else")[0], path)
    stream.write(BEHIND)
    stream.end()
    assert peer.recv_all() == content + BEHIND


def test_e1_10_file_object_without_a_descriptor_is_sent_whole(transport):
    content = data_of(600 * KIB)
    stream, peer = transport.connect(Connection, narrow=True)
    stream.write_file(io.BytesIO(content))
    with OnlyRead(content) as source:
        stream.write_file(source)
    stream.end()
    assert peer.recv_all() == content * 2


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_position_does_not_matter_and_stays(sending, file_of, size):
    path, content = file_of(size)
    stream, peer = sending.connect(Connection)
    with open(path, "rb") as file:
        file.seek(123)
        stream.write_file(file)
        assert file.tell() == 123
        stream.write_file(file, 100, 50)
        stream.end()
        assert peer.recv_all() == content + content[50:150]
        assert file.tell() == 123
        assert file.read(10) == content[123:133]
        assert not file.closed


# ---- a file that changes on its way


@pytest.mark.parametrize("kept", [LARGE - 64 * KIB, 0])
def test_shrinking_file_what_is_behind_it_goes_on_and_the_log_warns(transport, file_of, caplog, kept):
    path, content = file_of(LARGE)
    stream, peer = transport.connect(Connection, narrow=True)
    send_file(stream, path)
    stream.write(BEHIND)
    until(lambda: unsent(stream) < LARGE)
    os.truncate(path, kept)
    stream.end()
    received = peer.recv_all()
    assert received.endswith(BEHIND)
    sent = len(received) - len(BEHIND)
    assert received[:sent] == content[:sent]
    assert sent == kept if kept else sent < LARGE
    until(lambda: [record for record in caplog.records if record.name == "pants_green.stream"])
    (record,) = caplog.records
    assert (record.levelno, record.event, record.channel) == (logging.WARNING, "file_cut_short", stream)
    assert f"{LARGE - sent} bytes are missing" in record.getMessage()


@pytest.mark.parametrize("behind", [b"", BEHIND])
def test_shrinking_file_to_nothing_before_anything_was_sent(transport, file_of, behind, recorder):
    first, second = file_of(LARGE)[0], file_of(LARGE)[0]
    stream, peer = transport.connect(recorder.of(Connection, "on_write"))
    send_file(stream, first)
    send_file(stream, second)
    stream.write(behind)
    os.truncate(first, 0)
    os.truncate(second, 0)
    recorder.wait_for("on_write")
    assert unsent(stream) == 0
    stream.write(b"later")
    stream.end()
    assert peer.recv_all() == behind + b"later"


def test_growing_file_is_sent_as_it_was(transport, file_of):
    path, content = file_of(LARGE)
    stream, peer = transport.connect(Connection, narrow=True)
    send_file(stream, path)
    stream.write(BEHIND)
    until(lambda: unsent(stream) < LARGE)
    with open(path, "ab") as more:
        more.write(b"more" * 50_000)
    stream.end()
    assert peer.recv_all() == content + BEHIND


def test_shrinking_file_log_handler_that_waits_sends_nothing_twice(tcp, file_of):
    path, content = file_of(LARGE)
    stream, peer = tcp.connect(Connection)
    done = Event()

    class Waiting(logging.Handler):
        def emit(self, record):
            stream.write(BEHIND, flush=True)
            gevent.sleep(0.002)
            done.set()

    handler = Waiting()
    logging.getLogger("pants_green.stream").addHandler(handler)
    try:
        send_file(stream, path)
        os.truncate(path, 64 * KIB)
        stream.flush()  # in this greenlet, where a handler may wait
        assert done.wait(5)
    finally:
        logging.getLogger("pants_green.stream").removeHandler(handler)
    stream.end()
    assert peer.recv_all() == content[: 64 * KIB] + BEHIND


# ---- objects that are no plain file


class Raw(io.RawIOBase):
    """A raw object of one's own, which reads from memory."""

    def __init__(self, content):
        super().__init__()
        self.content = io.BytesIO(content)

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, *args):
        return self.content.seek(*args)

    def tell(self):
        return self.content.tell()

    def readinto(self, buffer):
        return self.content.readinto(buffer)


class Unpacking(Raw):
    """One that has the descriptor of something else."""

    def __init__(self, content, packed):
        super().__init__(content)
        self.packed = packed

    def fileno(self):
        return self.packed.fileno()

    def close(self):
        self.packed.close()
        super().close()


class OnlyRead:
    """Something that can be read and nothing else, in pieces of any size, as any kind of bytes."""

    def __init__(self, content, most=7777, kind=bytes):
        self.content = io.BytesIO(content)
        self.most = most
        self.kind = kind

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.content.close()

    def read(self, size):
        return self.kind(self.content.read(min(size, self.most)))


class TooMuch:
    """Does not care how much it is asked for."""

    def __init__(self, content):
        self.content = content

    def read(self, size):
        content, self.content = self.content, b""
        return content


def spooled(content, most, mode="w+b", **options):
    return written_to(tempfile.SpooledTemporaryFile(most, mode, **options), content)


def named(content, mode="w+b", **options):
    return written_to(tempfile.NamedTemporaryFile(mode, **options), content)


def written_to(file, content=b"content"):
    """Return a file that this was written to, and not flushed."""
    file.write(content)
    return file


def written(path, mode, content, **options):
    return written_to(open(path, mode, **options), content)


def packed(opened, path, content):
    with opened(path, "wb") as file:
        file.write(content)
    return opened(path, "rb")


def piped(content):
    """Return the reading end of a pipe; a real thread writes to it, for it may take no more at once."""
    reading, writing = os.pipe()

    def write():
        try:
            with open(writing, "wb") as file:
                file.write(content)
        except BrokenPipeError:
            pass  # no more was wanted

    gevent.get_hub().threadpool.spawn(write)
    return open(reading, "rb")


def in_zip(path, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("member", content)
    with zipfile.ZipFile(path) as archive:
        return archive.open("member")


def mapped(path, content):
    path.write_bytes(content)
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def plain(path, content, *args, opened=open, **options):
    path.write_bytes(content)
    return opened(path, *args, **options)


def text(content):
    return content.decode("latin-1")


KINDS = {
    "buffered": lambda path, content: plain(path, content, "rb"),
    "unbuffered": lambda path, content: plain(path, content, "rb", buffering=0),
    "read and write": lambda path, content: plain(path, content, "r+b"),
    "text": lambda path, content: plain(path, content, "r", encoding="latin-1", newline=""),
    "written": lambda path, content: written(path, "w+b", content),
    "appended": lambda path, content: written(path, "a+b", content),
    "written text": lambda path, content: written(path, "w+", text(content), encoding="latin-1", newline=""),
    "codecs": lambda path, content: plain(path, content, "r", "latin-1", opened=codecs.open),
    "gevent's": lambda path, content: FileObjectThread(plain(path, content, "rb")),
    "named temporary": lambda path, content: named(content),
    "named temporary text": lambda path, content: named(text(content), "w+", encoding="latin-1", newline=""),
    "spooled, in memory": lambda path, content: spooled(content, 1 << 30),
    "spooled, on disk": lambda path, content: spooled(content, 10),
    "spooled text": lambda path, content: spooled(text(content), 1 << 30, "w+", encoding="latin-1", newline=""),
    "BytesIO": lambda path, content: io.BytesIO(content),
    "gzip": lambda path, content: packed(gzip.open, path, content),
    "zip": in_zip,
    "mmap": mapped,
    "raw of one's own": lambda path, content: Raw(content),
    "buffered over it": lambda path, content: io.BufferedReader(Raw(content)),
    "raw with another's descriptor": lambda path, content: Unpacking(content, plain(path, b"packed", "rb")),
    "buffered over that": lambda path, content: io.BufferedReader(Unpacking(content, plain(path, b"packed", "rb"))),
    "only read()": lambda path, content: OnlyRead(content),
    "bytearrays": lambda path, content: OnlyRead(content, kind=bytearray),
    "memoryviews": lambda path, content: OnlyRead(content, kind=memoryview),
    "too much": lambda path, content: TooMuch(content),
    "pipe": lambda path, content: piped(content),
}

#: Those that have no position to go back to.
GONE_THROUGH = {"only read()", "bytearrays", "memoryviews", "too much", "pipe"}


@pytest.mark.parametrize("kind", KINDS)
def test_kind_of_object_is_sent_whole_and_in_parts_and_keeps_its_position(tcp, tmp_path, kind):
    stream, peer = tcp.connect(Connection)
    numbers = itertools.count()
    whole = []
    for size in (0, SMALL, 600 * KIB):
        content = data_of(size, size)
        if kind == "mmap" and not size:
            continue  # nothing cannot be mapped
        parts = [(0, 0), (300, 100), (0, max(0, size - 10)), (0, size + 1), (10, 1 << 70)]
        source = None
        for nbytes, offset in parts:
            if source is None:
                source = KINDS[kind](tmp_path / f"{next(numbers)}", content)
            if kind in GONE_THROUGH:
                stream.write_file(source, nbytes, offset)
                getattr(source, "close", bool)()
                source = None
            else:
                source.seek(size // 2)
                position = source.tell()
                stream.write_file(source, nbytes, offset)
                assert source.tell() == position
            whole.append(content[offset:][: nbytes or None])
        getattr(source, "close", bool)()
    stream.write(BEHIND)
    stream.end()
    assert peer.recv_all() == b"".join(whole) + BEHIND


@needs_proc
def test_kind_of_object_file_of_the_kernel_that_says_it_is_empty_is_sent(tcp):
    stream, peer = tcp.connect(Connection)
    send_file(stream, "/proc/self/stat", 20)
    send_file(stream, "/proc/self/stat", 0, 1)
    stream.end()
    received = peer.recv_all().decode()
    assert received.startswith(f"{os.getpid()} (")
    assert f"{os.getpid()}"[1:] + " (" in received[20:]


def test_source_that_blocks_holds_up_its_caller_alone(tcp):
    stream, peer = tcp.connect(Connection)
    go = Event()

    class Slow(OnlyRead):
        def read(self, size):
            go.wait()
            return super().read(size)

    caller = gevent.spawn(stream.write_file, Slow(b"slow", 2))
    turns()
    stream.write(b"meanwhile ")
    assert peer.recv_exactly(10) == b"meanwhile "
    go.set()
    caller.get()
    stream.end()
    assert peer.recv_all() == b"slow"


@pytest.mark.parametrize("size", [SMALL, 600 * KIB])
def test_source_that_blocks_while_the_stream_is_closed_is_an_error(tcp, size):
    stream, _ = tcp.connect(Connection)
    go = Event()

    class Slow(OnlyRead):
        def read(self, size):
            go.wait()
            return super().read(size)

    caller = gevent.spawn(stream.write_file, Slow(bytes(size)))
    turns()
    stream.close()
    go.set()
    with pytest.raises(ChannelClosed, match=r"its output has ended"):
        caller.get()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), ValueError("senseless"), gevent.Timeout()])
@pytest.mark.parametrize("before", [0, SMALL, 600 * KIB])
def test_source_that_raises_nothing_of_it_is_queued(tcp, error, before):
    class Broken(OnlyRead):
        def read(self, size):
            data = super().read(size)
            if not data:
                raise error
            return data

    stream, peer = tcp.connect(Connection)
    stream.write(b"one")
    with pytest.raises(type(error)) as raised:
        stream.write_file(Broken(bytes(before)))
    assert raised.value is error
    stream.write(b"two")
    stream.end()
    assert peer.recv_all() == b"onetwo"


def test_source_that_raises_keeps_its_position(tcp):
    class Broken(Raw):
        def readinto(self, buffer):
            raise OSError(errno.EIO, "broken")

    stream, _ = tcp.connect(Connection)
    source = Broken(b"content")
    source.seek(3)
    with pytest.raises(OSError, match="broken"):
        stream.write_file(source)
    assert source.tell() == 3


# ---- arguments


def test_argument_that_is_no_file_is_refused_with_a_hint(tcp):
    stream, _ = tcp.connect(Connection)
    for file in (None, 3, True, "path", b"path", pathlib.Path("path"), b"", ["path"], object(), open):
        with pytest.raises(TypeError, match=r"^write_file\(\) on <\w+ open to .*> takes a file, as open\(path, 'rb'\) returns one, not "):
            stream.write_file(file)
    assert stream.connected
    assert unsent(stream) == 0


@pytest.mark.parametrize("name", ["nbytes", "offset"])
def test_argument_number_of_another_kind_is_refused(tcp, file_of, name):
    stream, _ = tcp.connect(Connection)
    for value in (True, False, 1.0, "1", None, b"1"):
        with pytest.raises(TypeError, match=rf"takes {name} as a number of bytes, an int, not {value!r}"):
            send_file(stream, file_of(10)[0], **{name: value})


@pytest.mark.parametrize("name", ["nbytes", "offset"])
def test_argument_negative_number_is_refused(tcp, file_of, name):
    stream, _ = tcp.connect(Connection)
    with pytest.raises(ValueError, match=rf"takes {name} as 0 bytes or more, not -1"):
        send_file(stream, file_of(10)[0], **{name: -1})


@pytest.mark.parametrize("source", [io.StringIO("text"), io.TextIOWrapper(io.BytesIO(b"text")), OnlyRead(b"text", kind=text)])
def test_argument_that_reads_as_text_is_refused_with_a_hint(tcp, source):
    stream, _ = tcp.connect(Connection)
    with pytest.raises(TypeError, match=r"reads as text; open it in binary mode \('rb'\)"):
        stream.write_file(source)
    assert unsent(stream) == 0


def test_argument_that_reads_as_something_else_is_refused(tcp):
    stream, _ = tcp.connect(Connection)
    for result in (5, [1, 2], 1.5):
        source = OnlyRead(b"", kind=lambda data, result=result: result)
        with pytest.raises(TypeError, match=r"read\(\) .* returned .*; it has to return bytes"):
            stream.write_file(source)
    assert unsent(stream) == 0


def test_argument_that_has_nothing_to_read_now_is_an_error_and_no_end(tcp):
    stream, _ = tcp.connect(Connection)
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with open(reading, "rb", buffering=0) as source, open(writing, "wb"):
        with pytest.raises(BlockingIOError, match=r"write_file\(\) on .* has nothing to read now"):
            stream.write_file(source)
    assert unsent(stream) == 0


class Holder:
    """Has a descriptor and nothing else."""

    def __init__(self, file):
        self.file = file
        self.fileno = file.fileno
        self.close = file.close


WRITING = {
    "wb": functools.partial(open, mode="wb"),
    "ab": functools.partial(open, mode="ab"),
    "text": functools.partial(open, mode="a"),
    "unbuffered": functools.partial(open, mode="ab", buffering=0),
    "gzip": functools.partial(gzip.open, mode="wb"),
    "descriptor alone": lambda path: Holder(open(path, "ab")),  # noqa: SIM115
}


@pytest.mark.parametrize("how", WRITING)
def test_argument_that_is_open_for_writing_only_is_refused_with_a_hint(tcp, file_of, how):
    stream, peer = tcp.connect(Connection)
    for size in (SMALL, LARGE):
        file = WRITING[how](file_of(size)[0])
        with pytest.raises(ValueError, match=r"^write_file\(\) on .* takes a file that is open for reading, .* is not"):
            stream.write_file(file, 0, 1)
        file.close()
    stream.write(BEHIND)
    stream.end()
    assert peer.recv_all() == BEHIND


def test_argument_closed_file_is_refused(tcp, tmp_path):
    stream, _ = tcp.connect(Connection)
    for kind in ("buffered", "unbuffered", "text", "gzip", "BytesIO", "named temporary", "raw of one's own", "mmap", "gevent's"):
        file = KINDS[kind](tmp_path / "file", b"content")
        file.close()
        with pytest.raises(ValueError, match=r"^write_file\(\) on .* takes an open file; .* is closed"):
            stream.write_file(file)


# ---- where it is called


@pytest.mark.parametrize("where", ["on_connect", "on_read", "on_write", "on_end", "timer", "cycle", "greenlet", "hub", "another"])
def test_call_from_anywhere_sends_the_file(tcp, file_of, where):
    path, content = file_of(LARGE)

    def call(*args):
        if where == "cycle":
            handle.cancel()
        send_file(stream, path, SMALL)
        send_file(stream, path)
        stream.end()

    def on_connect(self):
        nonlocal stream
        stream = self
        if where == "on_connect":
            call()
        elif where == "on_write":
            self.write(b"x")

    attributes = {"on_connect": on_connect}
    if where in ("on_read", "on_write", "on_end"):
        attributes[where] = call
    stream = None
    _, peer = tcp.connect(type("Calling", (Connection,), attributes))
    watcher = gevent.get_hub().loop.timer(0)
    if where == "on_read":
        peer.send(b"x")
    elif where == "on_end":
        peer.shutdown_output()
    elif where == "timer":
        Engine.instance().defer(0.001, call)
    elif where == "cycle":
        handle = Engine.instance().cycle(0.001, call)
    elif where == "greenlet":
        gevent.spawn(call)
    elif where == "hub":
        watcher.start(call)
    elif where == "another":
        tcp.connect(type("Other", (Connection,), {"on_connect": call}))
    received = peer.recv_all()
    watcher.stop()
    watcher.close()
    assert received.removeprefix(b"x" if where == "on_write" else b"") == content[:SMALL] + content


@needs_proc
@pytest.mark.parametrize("state", ["new", "connecting", "write_eof", "end", "close", "abort"])
def test_call_on_a_stream_that_takes_nothing_is_an_error_and_leaves_no_descriptor(tcp, file_of, state):
    path, _ = file_of(LARGE)
    if state in ("new", "connecting"):
        stream = Stream()
        if state == "connecting":
            stream.connect(("127.0.0.1", 1))
    else:
        stream, _ = tcp.connect(Connection)
        getattr(stream, state)()
    with open(path, "rb") as file:
        for source in (file, io.BytesIO(b"content"), OnlyRead(bytes(600 * KIB))):
            with pytest.raises(ChannelClosed, match=r"^write_file\(\) on <\w+ "):
                stream.write_file(source)
    assert held(path) == 0
    stream.abort()


def test_no_descriptor_left_is_an_error_and_the_stream_is_as_before(tcp, file_of):
    path, content = file_of(LARGE)
    stream, peer = tcp.connect(Connection)
    with open(path, "rb") as file:
        lowest_free = os.dup(0)
        os.close(lowest_free)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
        try:
            with pytest.raises(OSError, match="Too many open files") as raised:
                stream.write_file(file)
            with pytest.raises(OSError, match="Too many open files"):
                stream.write_file(OnlyRead(content))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert raised.value.errno == errno.EMFILE
        assert (stream.connected, unsent(stream)) == (True, 0)
        stream.write_file(file)
    stream.end()
    assert peer.recv_all() == content


# ---- how it ends


def in_mid_file(transport, path, stream_class=Connection):
    """Return a stream that has sent some of a large file and waits for its peer, which reads nothing, and the peer."""
    stream, peer = transport.connect(stream_class, narrow=True)
    send_file(stream, path)
    until(lambda: unsent(stream) < os.path.getsize(path))
    assert held(path) == 1
    return stream, peer


@needs_proc
@pytest.mark.parametrize("how", ["close", "abort"])
def test_ending_now_in_mid_file_closes_its_descriptor_at_once(sending, file_of, caplog, how):
    caplog.set_level(logging.DEBUG, "pants_green.stream")
    path, _ = file_of(4 * LARGE)
    stream, _ = sending.connect(Connection, narrow=True)
    for _ in range(2):
        send_file(stream, path)
        stream.write(BEHIND)
    until(lambda: unsent(stream) < 8 * LARGE)
    assert held(path) == 2
    pending = unsent(stream)
    getattr(stream, how)()
    assert held(path) == 0
    (record,) = [record for record in caplog.records if getattr(record, "event", "") == "dropped"]
    dropped = int(record.getMessage().partition("bytes were not sent")[0].split()[-1])
    assert 4 * LARGE < dropped <= pending
    if how == "abort":
        assert dropped == pending


@needs_proc
def test_reset_by_the_peer_in_mid_file_closes_its_descriptor(sending, file_of, recorder):
    path, _ = file_of(4 * LARGE)
    stream, peer = in_mid_file(sending, path, recorder.of(Connection, "on_close", "on_error"))
    send_file(stream, path)
    peer.reset()
    recorder.wait_for("on_close")
    assert recorder == [("on_close",)]
    assert stream.close_reason is CloseReason.PEER_LEFT
    assert held(path) == 0


@needs_proc
def test_callback_that_raises_in_mid_file_closes_its_descriptor(tcp, file_of, recorder):
    def on_read(stream, data):
        raise RuntimeError("as it was asked to")

    path, _ = file_of(4 * LARGE)
    _, peer = in_mid_file(tcp, path, recorder.of(Connection, "on_error", "on_close", on_read=on_read))
    peer.send(b"x")
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_error", "on_close"]
    assert held(path) == 0


@needs_proc
@pytest.mark.parametrize("how", ["end", "close with flush", "write_eof"])
def test_ending_gently_in_mid_file_sends_everything_and_then_the_end(transport, file_of, how, recorder):
    path, content = file_of(LARGE)
    stream, peer = transport.connect(recorder.of(Connection, "on_close"), narrow=True)
    send_file(stream, path)
    stream.write(BEHIND)
    send_file(stream, path, 100)
    until(lambda: unsent(stream) < LARGE)
    if how == "end":
        stream.end()
    elif how == "write_eof":
        stream.write_eof()
    else:
        stream.close(flush=True)
    assert peer.recv_all() == content + BEHIND + content[:100]
    assert held(path) == 0
    assert stream.connected is (how == "write_eof")


@pytest.mark.parametrize("size", [SMALL, 200 * KIB])
def test_close_sends_header_and_file_as_far_as_the_kernel_takes_them(sending, file_of, size):
    path, content = file_of(size)
    stream, peer = sending.connect(Connection)
    stream.write(b"header")
    send_file(stream, path)
    stream.write(b"trailer")
    send_file(stream, path)
    stream.close()
    assert peer.recv_all() == (b"header" + content + b"trailer" + content)


@pytest.mark.parametrize("size", [SMALL, 200 * KIB])
def test_flush_sends_header_and_file_at_once(sending, file_of, size):
    path, content = file_of(size)
    stream, peer = sending.connect(Connection)
    stream.write(b"header")
    send_file(stream, path, flush=True)
    assert unsent(stream) == 0
    assert peer.recv_exactly(6 + size) == b"header" + content


# ---- flow


def test_on_write_comes_once_after_all_files_and_writes(sending, file_of, recorder):
    path, content = file_of(LARGE)
    stream, peer = sending.connect(recorder.of(Connection, "on_write"), narrow=True)
    for _ in range(2):
        send_file(stream, path)
        stream.write(BEHIND)
    reading = gevent.spawn(peer.recv_exactly, 2 * (LARGE + len(BEHIND)))
    assert reading.get() == 2 * (content + BEHIND)
    recorder.wait_for("on_write")
    turns()
    assert recorder == [("on_write",)]


def test_drain_waits_for_the_file(sending, file_of):
    path, _ = file_of(4 * LARGE)
    stream, peer = sending.connect(Connection, narrow=True)
    send_file(stream, path)
    draining = gevent.spawn(stream.drain)
    settle(stream, 5)
    assert not draining.ready()
    reading = gevent.spawn(peer.recv_all)
    draining.get()
    assert unsent(stream) <= stream.low_water
    stream.end()
    reading.get()


@needs_proc
@pytest.mark.parametrize("size", [100, 10 * KIB])
def test_pipelined_requests_for_small_files_take_no_descriptors(tcp, file_of, size):
    path, content = file_of(size)
    requests = 5 * MIB // max(size, 1000)

    class Serving(Connection):
        read_delimiter = b"\n"

        def on_read(self, line):
            send_file(self, path)

    stream, peer = tcp.connect(Serving, narrow=True)
    peer.send(b"\n" * requests)
    until(lambda: unsent(stream) > stream.high_water)
    assert held(path) == 0
    assert gevent.spawn(peer.recv_exactly, requests * size).get() == content * requests


REQUESTS = {
    "lines": {"read_delimiter": b"\n"},
    "fields": {"read_delimiter": Struct("c")},
    "matches": {"read_delimiter": re.compile(b"\n"), "regex_search": False},
    "another delimiter each time": {"read_delimiter": b"\n", "changes": True},
}


@needs_proc
@pytest.mark.parametrize("kind", REQUESTS)
def test_pipelined_requests_for_large_files_wait_even_if_they_have_come_at_once(tcp, file_of, kind):
    path, content = file_of(100 * KIB)
    most = served = 0

    class Serving(Connection):
        changes = False

        def on_read(self, *request):
            nonlocal most, served
            served += 1
            send_file(self, path)
            most = max(most, held(path))
            if self.changes:
                self.read_delimiter = 1 if self.read_delimiter == b"\n" else b"\n"

    stream, peer = tcp.connect(type("Serving", (Serving,), REQUESTS[kind]), narrow=True)
    peer.send(b"\n" * 50)
    settle(stream, 5)
    assert stream.low_water < unsent(stream)
    assert (0 < served < 10, most <= 4) == (True, True)
    stream.write(b"meanwhile, by another")
    whole = gevent.spawn(peer.recv_exactly, 50 * len(content) + 21).get()
    assert whole.replace(b"meanwhile, by another", b"") == content * 50
    assert most <= 4


def test_files_do_not_count_for_write_limit(tcp, hollow_file, recorder):
    stream, _ = tcp.connect(recorder.of(Connection, "on_overflow_error", "on_close"), narrow=True)
    send_file(stream, hollow_file(100 * MIB))
    done = Event()

    def write():
        for _ in range(10):
            stream.write(b"x" * KIB)
        done.set()

    Engine.instance().callback(write)
    done.wait()
    turns()
    assert stream.connected
    assert recorder == []
    own = gevent.spawn(stream.write, b"y" * MIB)
    own.get(timeout=1)


def test_files_do_not_count_for_write_limit_when_what_is_before_them_goes_out_at_once(recorder):
    """More than the limit is pending, and gone as soon as it is tried; what is left is a file."""
    stream, end = memory_pair(recorder.of(Connection, "on_overflow_error", "on_close"), capacity=MIB)
    until(lambda: stream.connected)
    stream.write_limit = 100 * KIB
    with tempfile.TemporaryFile() as file:
        file.truncate(4 * MIB)
        done = Event()

        def write():
            stream.write(b"x" * 100 * KIB)
            stream.write_file(file)
            stream.write(b"y")
            done.set()

        Engine.instance().callback(write)
        done.wait()
    assert stream.connected
    stream.end()
    assert end.wait_for() == b"x" * 100 * KIB + bytes(4 * MIB) + b"y"
    end.close()
    recorder.wait_for(1)
    assert recorder == [("on_close",)]


@needs_proc
def test_write_timeout_peer_that_stops_reading_in_mid_file_is_closed(sending, file_of, recorder):
    path, _ = file_of(4 * LARGE)
    stream, peer = in_mid_file(sending, path, recorder.of(Connection, "on_timeout", "on_close"))
    peer.recv_exactly(100 * KIB)
    stream.write_timeout = 0.05
    recorder.wait_for("on_close")
    assert recorder == [("on_timeout", "write"), ("on_close",)]
    assert stream.close_reason is CloseReason.TIMED_OUT
    assert held(path) == 0


def test_write_timeout_peer_that_reads_slowly_all_the_time_gets_everything(tcp, file_of, recorder):
    path, content = file_of(LARGE)
    stream, peer = tcp.connect(recorder.of(Connection, "on_timeout", "on_close", write_timeout=0.15), narrow=True)
    began = time.monotonic()
    send_file(stream, path)
    stream.end()
    received = b""
    while time.monotonic() - began < 0.35:
        received += peer.recv_exactly(16 * KIB)
        gevent.sleep(0.01)
    assert unsent(stream) > 0
    assert received + peer.recv_all() == content
    recorder.wait_for("on_close")
    assert recorder == [("on_close",)]


# ---- TLS that begins later


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("kept", [None, 512 * KIB, 0])
def test_starttls_files_before_it_go_in_clear_and_those_behind_encrypted(tcp, file_of, narrow, kept):
    in_clear, clear = file_of(LARGE)
    path, secret = file_of(LARGE)

    class Upgrading(Connection):
        read_delimiter = b"\n"

        def on_read(self, line):
            self.write(b"go\n")
            send_file(self, in_clear)
            self.write(b"last words")
            if kept is not None:
                os.truncate(in_clear, kept)
            self.startSSL(authority().localhost)
            self.write(b"secret words")
            send_file(self, path)

        def on_ssl_handshake(self):
            self.write(b"more")
            send_file(self, path, 100)
            self.end()

    stream, peer = tcp.connect(Upgrading, narrow=narrow)
    peer.send(b"\n")
    expected = b"go\n" + clear[:kept] + b"last words"
    assert peer.recv_exactly(len(expected)) == expected
    assert unsent(stream) == 12 + LARGE
    secured = TLSPeer.over(peer, client_context())
    assert secured.recv_all() == b"secret words" + secret + b"more" + secret[:100]


def test_starttls_in_mid_file_the_rest_goes_in_clear_also_if_it_is_cut_short(tcp, file_of):
    path, content = file_of(LARGE)
    stream, peer = tcp.connect(Connection, narrow=True)
    send_file(stream, path)
    stream.write(b"last words")
    until(lambda: unsent(stream) < LARGE)
    stream.startSSL(authority().localhost)
    send_file(stream, path, 512 * KIB)
    os.truncate(path, 512 * KIB)
    expected = content[: 512 * KIB] + b"last words"
    assert peer.recv_exactly(len(expected)) == expected
    secured = TLSPeer.over(peer, client_context())
    stream.end()
    assert secured.recv_all() == content[: 512 * KIB]


# ---- when the kernel does not do it


def refusing(number):
    def sendfile(*args):
        raise OSError(number, os.strerror(number))

    return sendfile


def halfway(number, after):
    """Return a sendfile that does it some times, and then not any more."""
    left = itertools.count(-after)

    def sendfile(*args):
        if next(left) >= 0:
            raise OSError(number, os.strerror(number))
        return os.sendfile(*args)

    return sendfile


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(
    "sendfile",
    [None, refusing(errno.EINVAL), refusing(errno.ENOSYS), halfway(errno.EINVAL, 3)],
    ids=["missing", "EINVAL", "ENOSYS", "EINVAL later"],
)
def test_kernel_that_cannot_send_files_they_are_read(monkeypatch, tcp, file_of, sendfile, narrow):
    monkeypatch.setattr(_files, "_sendfile", sendfile)
    path, content = file_of(LARGE + 3)
    stream, peer = tcp.connect(Connection, narrow=narrow)
    stream.write(b"header")
    send_file(stream, path)
    stream.write(BEHIND)
    send_file(stream, path, 200 * KIB, 5)
    stream.end()
    assert peer.recv_all() == b"header" + content + BEHIND + content[5 : 5 + 200 * KIB]


@needs_proc
@pytest.mark.parametrize("after", [0, 3])
def test_file_that_cannot_be_read_closes_the_stream_and_says_so(monkeypatch, tcp, file_of, recorder, after):
    monkeypatch.setattr(_files, "_sendfile", halfway(errno.EIO, after))
    path, content = file_of(LARGE)
    stream, peer = tcp.connect(recorder.of(Connection, "on_write_error", "on_close"))
    send_file(stream, path)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_write_error", "on_close"]
    assert recorder[0][1].errno == errno.EIO
    assert stream.close_reason is CloseReason.IO_ERROR
    assert held(path) == 0
    assert peer.recv_all() == content[: after * 64 * KIB]


def test_interrupt_in_mid_file_nothing_is_sent_twice(monkeypatch, tcp, file_of):
    left = itertools.count(-3)

    def sendfile(*args):
        if next(left) == 0:
            raise KeyboardInterrupt
        return os.sendfile(*args)

    monkeypatch.setattr(_files, "_sendfile", sendfile)
    path, content = file_of(LARGE)
    stream, peer = tcp.connect(Connection)
    engine = Engine.instance()
    engine.callback(send_file, stream, path)
    with pytest.raises(KeyboardInterrupt):
        engine.start()
    stream.end()
    reading = gevent.spawn(peer.recv_all)
    reading.link(lambda _: engine.stop())
    engine.start()
    assert reading.get() == content


# ---- much, and others at the same time

SERVING = """
    import gzip, os, resource, signal, sys
    from pants_green import Engine, Server, Stream

    signal.alarm(30)  # whatever happens this process ends

    class Files(Stream):
        read_delimiter = b"\\n"

        def on_read(self, line):
            with (gzip.open if line == b"gzip" else open)(sys.argv[1], "rb") as file:
                self.write_file(file)
            self.end()

        def on_close(self):
            print("grown", peak() - before, len(os.listdir("/proc/self/fd")) - descriptors, flush=True)

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    def peak():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

    server = Server(Files, ssl_options=dict(zip(("certfile", "keyfile"), sys.argv[2:])) or None).listen(("127.0.0.1", 0))
    descriptors = len(os.listdir("/proc/self/fd")) + 3  # what the hub opens, and the connection
    before = resident()
    print("port", server.local_address[1], flush=True)
    Engine.instance().start()
"""


def numbered(path, mib, opened=open):
    """Make a file of which every MiB begins with its number; return the checksum of all."""
    checksum = 0
    with opened(path, "wb") as file:
        for number in range(mib):
            block = b"%06d" % number + bytes(MIB - 6)
            checksum = zlib.crc32(block, checksum)
            file.write(block)
    return checksum


def read_slowly(peer, pause):
    """Read everything, with a pause now and then; return its size and checksum."""

    def read():
        size = checksum = 0
        steps = 0
        while data := peer._receive(1 << 18) if isinstance(peer, TLSPeer) else peer.socket.recv(1 << 20):
            size += len(data)
            checksum = zlib.crc32(data, checksum)
            if size // (20 * MIB) > steps:
                steps += 1
                real_sleep(pause)
        return size, checksum

    return in_thread(read)


@needs_proc
@pytest.mark.parametrize(("what", "mib"), [("plain", 200), ("gzip", 40), ("tls", 24)])
def test_file_of_200_mib_to_a_slow_reader_takes_bounded_memory(tmp_path, peer, tls_peer, what, mib):  # noqa: F811
    path = tmp_path / "file"
    checksum = numbered(path, mib, functools.partial(gzip.open, compresslevel=1) if what == "gzip" else open)
    with Child("-c", textwrap.dedent(SERVING), path, *(authority().localhost.values() if what == "tls" else ())) as child:
        address = "127.0.0.1", child.port()
        one = tls_peer(address) if what == "tls" else peer(address)
        one.send(what.encode() + b"\n")
        assert read_slowly(one, 0.02) == (mib * MIB, checksum)
        one.close()
        grown, descriptors = map(int, child.expect(r"^grown (\d+) (-?\d+)$").groups())
        assert grown < 6 * MIB
        assert descriptors <= 0
        assert child.error_output() == ""


class Downloads(Connection):
    """Sends a file as soon as it is asked for it."""

    path = None

    def on_read(self, data):
        send_file(self, self.path)
        self.end()


class Downloading(Stream):
    """Fetches it, as fast as it comes."""

    got = 0

    def on_connect(self):
        self.write(b"?")

    def on_read(self, data):
        self.got += len(data)


def test_fairness_two_downloads_at_once_go_on_side_by_side(hollow_file, recorder):
    size = 32 * MIB

    class Serving(Downloads):
        path = hollow_file(size)

    class Both(Downloading):
        def on_close(self):
            recorder(min(one.got for one in both))

    with UnixPair() as unix:  # over which nobody's window grows faster than the other's
        both = [unix.pair(Serving, Both)[1] for _ in range(2)]
        recorder.wait_for(2)
    assert recorder[1] == size
    assert recorder[0] > size // 2


def test_fairness_others_are_served_while_a_file_is_downloaded(server_of, hollow_file, recorder):
    """Between a question and its answer no more than a few pieces of the file are sent."""
    server = server_of(Downloads, path=hollow_file(400 * MIB))
    echo = server_of(Connection, on_read=lambda stream, data: stream.write(data))

    class Asking(Downloading):
        def on_read(self, data):
            recorder(downloading.got)
            if downloading.got - recorder[0] < 64 * MIB:
                self.write(b"?")

    downloading = Downloading().connect(server.local_address)
    until(lambda: downloading.got)
    asking = Asking().connect(echo.local_address)
    recorder.wait_for(lambda got: got and got[-1] - got[0] >= 64 * MIB)
    asking.abort()
    downloading.abort()
    assert max(after - before for before, after in itertools.pairwise(recorder)) <= 12 * MIB


FORKING = """
    import os, signal, sys, threading
    from gevent.event import Event
    from pants_green import Engine, Server, Stream

    signal.alarm(30)  # whatever happens this process ends

    def held():
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link) == sys.argv[1] for link in links if os.path.lexists(link))

    class Files(Stream):
        read_delimiter = b"\\n"

        def on_read(self, line):
            if line == b"fork":
                fork.set()
                return
            with open(sys.argv[1], "rb") as file:
                self.write_file(file)
            self.end()

        def on_close(self):
            Engine.instance().stop()

    fork = Event()
    server = Server(Files).listen(("127.0.0.1", 0))
    print("port", server.local_address[1], flush=True)
    def fork_now():
        child = os.fork()
        if not child:
            os.write(1, f"held by the child {held()}\\n".encode())
            os._exit(0)
        os.waitpid(child, 0)

    fork.wait()
    if sys.argv[2] == "thread":
        forking = threading.Thread(target=fork_now)
        forking.start()
        forking.join()
    else:
        fork_now()
    os.write(1, f"held by the parent {held()}\\n".encode())
    Engine.instance().start()
"""


@needs_proc
@pytest.mark.parametrize("where", ["here", "thread"])
def test_fork_in_mid_file_the_parent_sends_it_and_the_child_holds_nothing(file_of, peer, where):
    path, content = file_of(16 * MIB)
    with Child("-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(FORKING), path, where) as child:
        address = "127.0.0.1", child.port()
        one, other = peer(address, rcvbuf=4096), peer(address)
        one.send(b"file\n")
        assert one.recv_exactly(10) == content[:10]
        other.send(b"fork\n")
        child.expect("^held by the child 0$")
        child.expect("^held by the parent 1$")
        assert one.recv_all() == content[10:]
        assert child.end() == 0
        assert child.error_output() == ""
