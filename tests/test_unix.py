"""Unix sockets: addresses, the socket's file and whose it is, permissions, who the peer is, and programs that others have written.

What every stream does is in ``stream_contract.py``, which runs over a pair of Unix sockets, too; TLS over them is in the tests of TLS.
"""

import contextlib
import errno
import fcntl
import gc
import logging
import os
import pathlib
import shutil
import socket
import stat
import sys
import tempfile
import textwrap
import weakref

import gevent
import gevent.socket
import gevent.subprocess
import pytest
from children import Child
from echoes import Echo, EchoLines
from peers import PlainSocket
from waiting import nothing_is_kept, turns, until  # noqa: F401

from pants_green import (
    ChannelStateError,
    Client,
    CloseReason,
    Connection,
    InvalidAddressFormatError,
    ReconnectingClient,
    Server,
    Stream,
    StreamServer,
    UnixClient,
    UnixConnection,
    UnixServer,
    _socket_file,
)
from pants_green._socket_file import bind_file
from pants_green.testing import memory_pair
from pants_green.unix import Credentials

pytestmark = [
    pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this platform has no Unix sockets"),
    # gevent's subprocess forks, and what becomes of it here is exec at once.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux' own")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")

#: Somebody who is not root, and a group.
NOBODY, GROUP = 65534, 54321


def needs(program):
    """Skip a test if this machine has no such program."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"this machine has no {program}")


def run(*command, told=""):
    """Run a program, which waits cooperatively, and return what it says."""
    command = [*map(str, command)]
    done = gevent.subprocess.run(command, input=told.encode(), capture_output=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def python(code, *arguments, told=""):
    """Run a program that needs the standard library alone."""
    return run(sys.executable, "-ISc", textwrap.dedent(code), *arguments, told=told)


class EchoUnix(UnixConnection):
    def on_read(self, data):
        self.write(data)


class Asker(UnixClient):
    """Asks, and closes when it has the answer."""

    def on_connect(self):
        self.write(b"question")

    def on_read(self, data):
        self.close()


@pytest.fixture
def path(tmp_path):
    """Return the path of a socket that is not there yet."""
    return str(tmp_path / "socket")


@pytest.fixture
def unix_server_of(server_of):
    """Return a function that makes a listening UnixServer: ``unix_server_of(StreamClass, path, **attributes)``."""

    def make(stream_class, path, **attributes):
        return server_of(stream_class, path, server_class=UnixServer, **attributes)

    return make


@pytest.fixture
def plain():
    """Return a function that makes a plain Unix socket, closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(kind=socket.SOCK_STREAM):
            made = stack.enter_context(PlainSocket(socket.AF_UNIX, kind))
            made.setblocking(False)
            return made

        yield make


def leave_stale(path):
    """Make the file of a socket that is gone."""
    with PlainSocket(socket.AF_UNIX) as gone:
        gone.bind(path)
        gone.listen()


def answers(one, data=b"hello"):
    """Tell whether this peer is echoed."""
    one.send(data)
    return one.recv_exactly(len(data)) == data


def descriptors():
    return len(os.listdir("/proc/self/fd"))


# ---- Addresses

#: How a path can be written.
SPELLINGS = [
    pytest.param(lambda path: path, id="str"),
    pytest.param(os.fsencode, id="bytes"),
    pytest.param(pathlib.Path, id="PathLike"),
    pytest.param(os.path.relpath, id="relative"),
]


@pytest.mark.parametrize("kind", [UnixClient, Client, Stream])
@pytest.mark.parametrize("make", [lambda: UnixServer(EchoUnix), lambda: Server(EchoUnix)], ids=["UnixServer", "Server"])
def test_s4_18_s4_31_unix_servers_and_clients_speak_with_one_another(open_server, recorder, path, make, kind):
    server = open_server(make())
    assert server.listen(path) is server
    client = recorder.of(kind, on_connect=Asker.on_connect, on_read=Asker.on_read)()
    assert client.connect(path) is client
    recorder.wait_for("on_close")
    assert recorder == [("on_connect",), ("on_read", b"question"), ("on_close",)]
    assert server.local_address == client.remote_address == path


@pytest.mark.parametrize("spelled", SPELLINGS)
def test_path_may_be_str_bytes_or_path_object(unix_server_of, recorder, path, spelled):
    server = unix_server_of(EchoUnix, spelled(path))
    assert server.socket.family == socket.AF_UNIX
    assert server.local_address in (path, os.path.relpath(path))
    recorder.of(Asker)().connect(spelled(path))
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_close"]


def test_path_that_is_no_text(unix_server_of, recorder, tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff\xfe"
    server = unix_server_of(EchoUnix, path)
    assert os.fsencode(server.local_address) == path
    recorder.of(Asker)().connect(path)
    recorder.wait_for("on_close")
    server.close()
    assert not os.path.exists(path)


@linux_only
@pytest.mark.parametrize("spelled", [str, os.fsencode], ids=["str", "bytes"])
def test_abstract_name_has_no_file(unix_server_of, recorder, tmp_path, monkeypatch, spelled):
    monkeypatch.chdir(tmp_path)
    name = spelled(f"\0pants_green {os.getpid()}")
    server = unix_server_of(EchoUnix, name)
    assert server.local_address == os.fsencode(name)
    assert repr(server) == f"<UnixServer listening on @pants_green {os.getpid()}>"
    recorder.of(Asker)().connect(name)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_connect", "on_read", "on_close"]
    assert os.listdir() == []
    with pytest.raises(OSError, match=r"@pants_green .* in use; somebody listens there") as caught:
        UnixServer().listen(name)
    assert caught.value.errno == errno.EADDRINUSE
    server.close()
    assert UnixServer().listen(name).close() is None


def test_s4_31_unix_server_is_of_the_unix_family_and_makes_unix_connections(unix_server_of, peer, path):
    server = unix_server_of(None, path)
    assert isinstance(server, StreamServer)
    assert (server.socket.family, server.socket.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
    one = peer(path)
    until(lambda: server.channels)
    (channel,) = server.channels.values()
    assert type(channel) is UnixConnection
    assert channel.server is server
    assert channel.local_address == path
    assert channel.remote_address == one.address == ""


def test_connection_class_of_a_unix_server_may_be_any_stream(unix_server_of, peer, path):
    assert answers(peer(unix_server_of(Echo, path)))


def test_client_with_a_name_of_its_own_is_known_by_it(unix_server_of, plain, tmp_path, path):
    server = unix_server_of(EchoUnix, path)
    one = plain()
    one.bind(str(tmp_path / "mine"))
    one.connect(path)
    until(lambda: server.channels)
    assert server.channels.values()[0].remote_address == str(tmp_path / "mine")


NO_PATHS = [80, ("localhost", 80), ("::1", 80, 0, 0), "127.0.0.1", b"127.0.0.1", "::1", "localhost:80", "", "a\0b", None, 1.5]


@pytest.mark.parametrize("wrong", NO_PATHS, ids=repr)
def test_s2_26_unix_classes_refuse_what_is_no_path(wrong):
    server, client = UnixServer(), UnixClient()
    with pytest.raises(InvalidAddressFormatError, match=r"UnixServer\.listen\(\) takes the path .*; Server takes hosts") as caught:
        server.listen(wrong)
    assert repr(wrong) in str(caught.value)
    with pytest.raises(InvalidAddressFormatError, match=r"UnixClient\.connect\(\) takes the path .*; Client takes hosts") as caught:
        client.connect(wrong)
    assert repr(wrong) in str(caught.value)
    assert not server.listening
    assert not client.connecting


def test_s2_26_unix_client_refuses_a_port_and_may_be_used_nevertheless(unix_server_of, recorder, path):
    client = recorder.of(Asker)()
    with pytest.raises(InvalidAddressFormatError, match=r"not \('localhost', 80\); Client takes hosts and ports"):
        client.connect("localhost", 80)
    with pytest.raises(InvalidAddressFormatError, match="source_address is for TCP"):
        client.connect(path, source_address=("", 0))
    unix_server_of(EchoUnix, path)
    client.connect(path)
    recorder.wait_for("on_close")


@pytest.mark.parametrize("backlog", [0, -1, True, "localhost", 1.0], ids=repr)
def test_wrong_backlog_is_an_error(path, backlog):
    with pytest.raises((TypeError, ValueError), match="backlog"):
        UnixServer().listen(path, backlog)
    assert not os.path.exists(path)


def test_unix_server_takes_a_backlog_by_position_as_it_always_did(open_server, peer, path):
    assert answers(peer(open_server(UnixServer(EchoUnix)).listen(path, 5)))


@pytest.mark.parametrize("state", ["bound", "listening"])
def test_unix_server_that_is_given_a_socket_needs_no_path_and_leaves_the_file(open_server, peer, path, state):
    given = gevent.socket.socket(socket.AF_UNIX)
    given.bind(path)
    if state == "listening":
        given.listen()
    server = open_server(UnixServer(EchoUnix, socket=given))
    assert server.listen() is server
    assert answers(peer(server))
    assert server.channels.values()[0].peer_credentials == (os.getpid(), os.geteuid(), os.getegid())
    server.close()
    assert os.path.exists(path)


def test_unix_server_that_is_given_no_socket_needs_a_path():
    with pytest.raises(InvalidAddressFormatError, match="takes the path of a Unix socket, not <not given>"):
        UnixServer().listen()


def test_unix_server_that_is_given_a_socket_without_a_path_needs_one():
    server = UnixServer(socket=gevent.socket.socket(socket.AF_UNIX))
    with pytest.raises(InvalidAddressFormatError, match="takes the path of a Unix socket, not <not given>"):
        server.listen()
    server.close()


def test_unix_server_listens_once(unix_server_of, path, tmp_path):
    server = unix_server_of(EchoUnix, path)
    other = tmp_path / "other"
    with pytest.raises(ChannelStateError, match="listens already"):
        server.listen(other, mode=0o600)
    server.close()
    with pytest.raises(ChannelStateError, match="closed"):
        server.listen(other)
    assert not other.exists()


def test_connect_to_nobody_is_a_connect_error(recorder, path):
    leave_stale(path)
    for where, code in ((path, errno.ECONNREFUSED), (f"{path} of nobody", errno.ENOENT)):
        recorder.clear()
        recorder.of(UnixClient)().connect(where)
        recorder.wait_for("on_close")
        assert recorder.names() == ["on_connect_error", "on_close"]
        assert recorder[0][1].errno == code
        assert where in str(recorder[0][1])


# ---- The file

EACH_SERVER = pytest.mark.parametrize("server_class", [UnixServer, Server])


@EACH_SERVER
def test_e1_18_file_goes_with_its_server_and_a_stale_one_is_replaced(server_of, peer, path, server_class):
    server = server_of(Echo, path, server_class=server_class)
    assert stat.S_ISSOCK(os.stat(path).st_mode)
    server.close()
    assert not os.path.exists(path)
    leave_stale(path)
    again = server_of(Echo, path, server_class=server_class)
    assert answers(peer(again))
    assert again.channels.values()[0].local_address == path


def test_e1_18_file_of_a_server_that_was_killed_is_replaced(unix_server_of, peer, path):
    python("import os, socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); os._exit(0)", path)
    assert os.path.exists(path)
    assert answers(peer(unix_server_of(EchoUnix, path)))


def test_stale_file_is_one_whose_listener_is_gone_although_its_connections_are_not(unix_server_of, plain, peer, path):
    listener, client = plain(), plain()
    listener.bind(path)
    listener.listen()
    client.connect(path)
    descriptor, _ = listener._accept()
    listener.close()
    try:
        assert answers(peer(unix_server_of(EchoUnix, path)))
    finally:
        os.close(descriptor)


@EACH_SERVER
def test_second_server_finds_the_path_in_use_and_the_first_notices_nothing(server_of, peer, recorder, path, server_class):
    first = server_of(recorder.of(Echo, "on_connect", "on_close"), path, server_class=server_class)
    second = server_class()
    with pytest.raises(OSError, match="somebody listens there: stop that program or choose another path") as caught:
        second.listen(path)
    assert caught.value.errno == errno.EADDRINUSE
    assert path in str(caught.value)
    turns()
    assert recorder == []
    assert answers(peer(first))
    assert not second.listening
    second.listen(f"{path} of the second").close()
    assert os.path.exists(path)


@pytest.mark.parametrize("state", ["bound", "listening", "full", "datagram"])
def test_path_of_any_socket_that_is_bound_is_in_use(plain, path, state):
    """Also of one that does not listen yet, and of one whose queue is full, to which nobody can connect."""
    owner = plain(socket.SOCK_DGRAM if state == "datagram" else socket.SOCK_STREAM)
    owner.bind(path)
    if state in ("listening", "full"):
        owner.listen(0)
    if state == "full":
        with contextlib.suppress(BlockingIOError):
            while True:
                plain().connect(path)
    before = os.stat(path)
    with pytest.raises(OSError, match="somebody listens there"):
        UnixServer().listen(path)
    assert os.stat(path).st_ino == before.st_ino
    if state == "listening":
        with pytest.raises(BlockingIOError):
            owner._accept()


def test_kernel_that_looks_for_sockets_of_the_same_kind_alone_is_asked_by_a_stream_too(plain, path, monkeypatch):
    owner = plain()
    owner.bind(path)
    owner.listen()
    asked = []

    class Narrow(PlainSocket):
        def connect_ex(self, address):
            asked.append(self.type)
            return errno.ECONNREFUSED if self.type == socket.SOCK_DGRAM else super().connect_ex(address)

    monkeypatch.setattr(_socket_file, "_plain_socket", Narrow)
    with pytest.raises(OSError, match="somebody listens there"):
        UnixServer().listen(path)
    assert asked[:2] == [socket.SOCK_DGRAM, socket.SOCK_STREAM]


def regular_file(path):
    pathlib.Path(path).write_text("precious")


def link_to_a_stale_socket(path):
    leave_stale(f"{path} elsewhere")
    os.symlink(f"{path} elsewhere", path)


IN_THE_WAY = {
    "a regular file": regular_file,
    "a directory": os.mkdir,
    "a symbolic link": link_to_a_stale_socket,
    "something else than a socket": os.mkfifo,
}


@EACH_SERVER
@pytest.mark.parametrize("what", IN_THE_WAY)
def test_what_is_no_socket_is_never_removed_and_the_error_says_what_it_is(path, what, server_class):
    IN_THE_WAY[what](path)
    before = os.lstat(path)
    server = server_class()
    with pytest.raises(OSError, match=f"there is {what}, .*: remove it or choose another path") as caught:
        server.listen(path)
    assert caught.value.errno == errno.EADDRINUSE
    assert os.lstat(path) == before
    server.close()
    assert os.lstat(path) == before


NOWHERE = [
    ("none/socket", errno.ENOENT, "there is no directory '.*none': make it first"),
    ("file/socket", errno.ENOTDIR, "'.*file' is no directory"),
    ("x" * 108, errno.ENAMETOOLONG, "too long; it has [0-9]+ bytes, and the address of a Unix socket holds 107 on Linux"),
]


@EACH_SERVER
@pytest.mark.parametrize("spelled", [str, os.fsencode], ids=["str", "bytes"])
@pytest.mark.parametrize(("name", "code", "said"), NOWHERE, ids=["no directory", "file as directory", "too long"])
def test_path_that_cannot_be_is_a_clear_error_at_the_call(server_of, peer, tmp_path, path, server_class, spelled, name, code, said):
    (tmp_path / "file").touch()
    before = descriptors()
    server = server_class(EchoUnix)
    with pytest.raises(OSError, match=said) as caught:
        server.listen(spelled(str(tmp_path / name)))
    assert caught.value.errno == code
    assert str(tmp_path / name) in str(caught.value)
    assert descriptors() == before
    try:
        assert answers(peer(server.listen(path)))  # another path will do
    finally:
        server.close()


@linux_only
def test_path_of_107_bytes_is_not_too_long_and_one_more_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    UnixServer().listen("x" * 107).close()
    for name in ("x" * 108, "\0" + "x" * 108):
        with pytest.raises(OSError, match=f"it has {len(name)} bytes"):
            UnixServer().listen(name)
    assert os.listdir() == []


def test_place_where_no_socket_can_be_is_an_error():
    with pytest.raises(OSError, match="cannot listen on /proc/pants_green"):
        UnixServer().listen("/proc/pants_green")


@EACH_SERVER
def test_file_that_another_server_has_put_there_since_stays(server_of, plain, path, server_class):
    server = server_of(Echo, path, server_class=server_class)
    os.unlink(path)
    other = plain()
    other.bind(path)
    other.listen()
    server.close()
    assert os.path.exists(path)
    plain().connect(path)


def test_file_that_is_gone_when_the_server_closes_is_no_error(unix_server_of, path, caplog):
    server = unix_server_of(EchoUnix, path)
    os.unlink(path)
    server.close()
    assert server.closed
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


def test_relative_path_is_found_again_from_elsewhere(unix_server_of, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    regular_file(tmp_path / "elsewhere" / "socket")
    monkeypatch.chdir(tmp_path)
    server = unix_server_of(EchoUnix, "socket")
    monkeypatch.chdir(tmp_path / "elsewhere")
    server.close()
    assert os.listdir(tmp_path) == ["elsewhere"]
    assert os.listdir() == ["socket"]


def test_file_goes_before_the_socket_so_that_nobody_takes_it_for_stale(unix_server_of, path, monkeypatch):
    server = unix_server_of(EchoUnix, path)
    seen = []
    unlink = os.unlink

    def look(name):
        seen.append(_socket_file._probe(name))
        unlink(name)

    monkeypatch.setattr(os, "unlink", look)
    server.close()
    assert seen == [errno.EPROTOTYPE]


FORKING = """
    import os, sys
    import gevent
    from gevent.event import Event
    from pants_green import UnixConnection, UnixServer

    class Echo(UnixConnection):
        def on_read(self, data):
            self.write(data)

        def on_close(self):
            left.set()

    left = Event()
    path = sys.argv[1]
    server = UnixServer(Echo).listen(path)
    if os.fork() == 0:
        server.close()
        gevent.sleep(0.01)
        print("in the child", server.closed, os.path.exists(path), flush=True)
        os._exit(0)
    os.wait()
    print("forked", flush=True)
    left.wait()
    server.close()
    print("closed", os.path.exists(path), flush=True)
"""


def test_forked_child_that_closes_its_copy_leaves_the_file_to_the_parent(peer, path):
    with Child("-c", textwrap.dedent(FORKING), path) as program:
        program.expect("^in the child True True$")
        program.expect("^forked$")
        with peer(path) as one:
            assert answers(one)
        program.expect("^closed False$")
        assert program.end() == 0


# ---- Two that start at the same moment


def race(path, count):
    """Have so many threads listen on a path at the same moment; return their sockets, and what they were told."""
    made, errors = [], []
    gate, start = os.pipe()

    def listen():
        sock = PlainSocket(socket.AF_UNIX)
        made.append(sock)
        os.read(gate, 1)
        try:
            bind_file(sock, path)
            sock.listen()
        except OSError as error:
            errors.append(error.errno)

    try:
        threads = [gevent.get_hub().threadpool.spawn(listen) for _ in range(count)]
        until(lambda: len(made) == count)
        os.write(start, bytes(count))
        for thread in threads:
            thread.get()
    finally:
        os.close(gate)
        os.close(start)
    return made, errors


def test_servers_that_find_a_stale_file_at_the_same_moment_do_not_remove_each_others(plain, path):
    for _ in range(40):
        leave_stale(path)
        made, errors = race(path, 4)
        try:
            assert errors == [errno.EADDRINUSE] * 3
            plain().connect(path)
            accepted = 0
            for one in made:
                one.setblocking(False)
                with contextlib.suppress(BlockingIOError, OSError):
                    os.close(one._accept()[0])
                    accepted += 1
            assert accepted == 1
        finally:
            for one in made:
                one.close()
            os.unlink(path)


def test_server_that_had_to_wait_for_the_lock_looks_again(plain, tmp_path, path, monkeypatch):
    leave_stale(path)
    other = plain()
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)

    def let_the_other_come_first(seconds):
        os.unlink(path)
        other.bind(path)
        other.listen()
        fcntl.flock(held, fcntl.LOCK_UN)

    monkeypatch.setattr(_socket_file, "_plain_sleep", let_the_other_come_first)
    try:
        with pytest.raises(OSError, match="somebody listens there"):
            UnixServer().listen(path)
    finally:
        os.close(held)
    plain().connect(path)


@pytest.mark.parametrize("look", [1, 2])
def test_file_that_somebody_who_does_not_lock_has_put_there_meanwhile_stays(plain, path, monkeypatch, look):
    leave_stale(path)
    probe = _socket_file._probe
    other = plain()
    looks = []

    def probe_and_be_overtaken(name):
        found = probe(name)
        looks.append(found)
        if len(looks) == look:
            os.unlink(path)
            other.bind(path)
            other.listen()
        return found

    monkeypatch.setattr(_socket_file, "_probe", probe_and_be_overtaken)
    with pytest.raises(OSError, match="somebody listens there"):
        UnixServer().listen(path)
    plain().connect(path)


def test_lock_that_somebody_keeps_holds_nobody_up(unix_server_of, peer, tmp_path, path):
    leave_stale(path)
    held = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert answers(peer(unix_server_of(EchoUnix, path)))
    finally:
        os.close(held)


@root_only
def test_lock_that_cannot_be_had_is_done_without(unix_server_of, peer, open_folder):
    os.chmod(open_folder, 0o333)
    path = os.path.join(open_folder, "socket")
    with somebody(NOBODY):
        leave_stale(path)
        server = unix_server_of(EchoUnix, path)
    assert answers(peer(server))


@pytest.mark.parametrize("end", ["listens", "fails"])
def test_lock_is_not_kept(unix_server_of, tmp_path, path, monkeypatch, end):
    leave_stale(path)
    if end == "fails":

        def refuse(path):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "unlink", refuse)
        with pytest.raises(PermissionError, match="may not remove it"):
            UnixServer().listen(path)
    else:
        unix_server_of(EchoUnix, path)
    held = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(held)


# ---- Permissions


@contextlib.contextmanager
def somebody(uid, gid=NOBODY):
    """Be somebody else; nothing inside may wait."""
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def open_folder():
    """Return a folder that everybody may pass through and write to, which pytest's are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield folder


@pytest.mark.parametrize("mode", [0o777, 0o660, 0o600, 0o666, 0])
def test_mode_is_that_of_the_file(open_server, path, mode):
    open_server(UnixServer()).listen(path, mode=mode)
    assert stat.S_IMODE(os.stat(path).st_mode) == mode


@pytest.mark.parametrize("umask", [0, 0o027, 0o077], ids=oct)
def test_without_a_mode_the_umask_decides(unix_server_of, path, umask):
    before = os.umask(umask)
    try:
        unix_server_of(None, path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o777 & ~umask


@root_only
@pytest.mark.parametrize("by", ["number", "name"])
def test_owner_and_group_by_number_and_by_name(open_server, path, by):
    import grp
    import pwd

    user, group = pwd.getpwall()[-1], grp.getgrall()[-1]
    owner, group = (user.pw_uid, group.gr_gid) if by == "number" else (user.pw_name, group.gr_name)
    open_server(UnixServer()).listen(path, owner=owner, group=group)
    found = os.stat(path)
    assert (found.st_uid, found.st_gid) == (user.pw_uid, grp.getgrall()[-1].gr_gid)


@root_only
def test_only_what_is_asked_for_changes(open_server, tmp_path):
    umask = os.umask(0o022)
    os.umask(umask)
    for number, (asked, found) in enumerate(
        [
            ({"owner": NOBODY}, (NOBODY, 0, 0o777 & ~umask)),
            ({"group": GROUP}, (0, GROUP, 0o777 & ~umask)),
            ({"mode": 0o640, "group": GROUP}, (0, GROUP, 0o640)),
        ]
    ):
        path = tmp_path / str(number)
        open_server(UnixServer()).listen(path, **asked)
        assert (path.stat().st_uid, path.stat().st_gid, stat.S_IMODE(path.stat().st_mode)) == found


@root_only
@pytest.mark.parametrize(
    ("asked", "uid", "gid", "admitted"),
    [
        ({"mode": 0o600}, NOBODY, NOBODY, False),
        ({"mode": 0o600, "owner": NOBODY}, NOBODY, NOBODY, True),
        ({"mode": 0o660, "group": GROUP}, NOBODY, GROUP, True),
        ({"mode": 0o660, "group": GROUP}, NOBODY, NOBODY, False),
        ({"mode": 0o666}, NOBODY, NOBODY, True),
        ({"mode": 0o600, "owner": NOBODY}, 0, 0, True),
    ],
)
def test_another_user_can_connect_if_he_may(open_server, plain, recorder, open_folder, asked, uid, gid, admitted):
    path = os.path.join(open_folder, "socket")
    server = open_server(UnixServer(recorder.of(EchoUnix, "on_connect"))).listen(path, **asked)
    one = plain()
    with somebody(uid, gid):
        assert one.connect_ex(path) == (0 if admitted else errno.EACCES)
    if admitted:
        recorder.wait_for("on_connect")
        assert server.channels.values()[0].peer_credentials == (os.getpid(), uid, gid)


def test_permissions_hold_before_the_first_connection_can_be_made(open_server, plain, path, monkeypatch):
    seen = []

    def spy(name):
        function = getattr(os, name)

        def spying(*args, **kwargs):
            seen.append((name, plain().connect_ex(path)))
            return function(*args, **kwargs)

        return spying

    monkeypatch.setattr(os, "chmod", spy("chmod"))
    monkeypatch.setattr(os, "chown", spy("chown"))
    open_server(UnixServer()).listen(path, mode=0o600, owner=os.geteuid(), group=os.getegid())
    assert seen == [("chmod", errno.ECONNREFUSED), ("chown", errno.ECONNREFUSED)]
    assert plain().connect_ex(path) == 0


def test_permissions_also_of_a_file_that_replaces_a_stale_one(open_server, path):
    leave_stale(path)
    os.chmod(path, 0o777)
    open_server(UnixServer()).listen(path, mode=0o600)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


@root_only
@pytest.mark.parametrize("asked", [{"owner": 0}, {"group": GROUP, "mode": 0o660}, {"owner": "root", "group": GROUP}], ids=repr)
def test_permissions_that_cannot_be_given_leave_neither_file_nor_descriptor(open_folder, recorder, asked):
    path = os.path.join(open_folder, "socket")
    server = UnixServer(EchoUnix)
    before = descriptors()
    with somebody(NOBODY):
        with pytest.raises(PermissionError) as caught:
            server.listen(path, **asked)
        assert os.listdir(open_folder) == []
        assert descriptors() == before
        text = str(caught.value)
        for name in {"owner", "group"} & set(asked):
            assert f"{name} {0 if asked[name] == 'root' else asked[name]}" in text
        assert f"cannot listen on {path}: Operation not permitted; this process may not give" in text
        server.listen(path)  # without them it may
    server.close()


def test_mode_that_cannot_be_given_leaves_neither_file_nor_descriptor(path, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chmod", refuse)
    before = descriptors()
    with pytest.raises(PermissionError, match=f"cannot listen on {path}: .*may not give mode 0o660 to its file"):
        UnixServer().listen(path, mode=0o660)
    assert descriptors() == before
    assert not os.path.exists(path)


WRONG = [
    ({"mode": 660}, ValueError, r"from 0 to 0o777, such as 0o660, not 660 \(0o1224\)"),
    ({"mode": -1}, ValueError, "from 0 to 0o777"),
    ({"mode": 0o1000}, ValueError, "from 0 to 0o777"),
    ({"mode": True}, TypeError, "int such as 0o660, not True"),
    ({"mode": "660"}, TypeError, "int such as 0o660, not '660'"),
    ({"owner": "nobody of that name"}, ValueError, "no user 'nobody of that name'"),
    ({"group": "nobody of that name"}, ValueError, "no group 'nobody of that name'"),
    ({"owner": ""}, ValueError, "no user ''"),
    ({"owner": "a\0b"}, ValueError, "no user"),
    ({"owner": -1}, ValueError, "uid from 0 to 4294967294, not -1"),
    ({"group": 1 << 32}, ValueError, "gid from 0 to"),
    ({"owner": True}, TypeError, "name of a user or a uid, not True"),
    ({"group": b"root"}, TypeError, "name of a group or a gid, not b'root'"),
    ({"group": 1.0}, TypeError, "name of a group or a gid, not 1.0"),
]


@pytest.mark.parametrize(("asked", "kind", "said"), WRONG, ids=[repr(asked) for asked, _, _ in WRONG])
def test_permissions_that_make_no_sense_are_an_error_at_the_call(path, asked, kind, said):
    server = UnixServer()
    with pytest.raises(kind, match=said):
        server.listen(path, **asked)
    assert not server.listening
    assert not os.path.exists(path)


@pytest.mark.parametrize("asked", [{"mode": 0o600}, {"owner": 0}, {"group": 0}], ids=repr)
@pytest.mark.parametrize("name", ["\0name", b"\0name"], ids=repr)
def test_permissions_of_an_abstract_name_are_an_error(name, asked):
    with pytest.raises(ValueError, match="has no file"):
        UnixServer().listen(name, **asked)


@root_only
@pytest.mark.parametrize(
    ("mode", "said"),
    [(0o777, "a socket has left that file behind, and this process may not remove it"), (0o700, "may not ask whether somebody listens")],
)
def test_stale_file_of_somebody_else_is_an_error_that_says_so(open_folder, mode, said):
    path = os.path.join(open_folder, "socket")
    os.chmod(open_folder, 0o1777)
    leave_stale(path)
    os.chmod(path, mode)
    with somebody(NOBODY):
        with pytest.raises(OSError, match=said):
            UnixServer().listen(path)
    assert os.path.exists(path)


@root_only
def test_directory_that_is_somebody_elses_is_an_error_that_says_so(open_folder):
    os.chmod(open_folder, 0o755)
    with somebody(NOBODY):
        with pytest.raises(PermissionError, match=f"this process may not make files in '{open_folder}'"):
            UnixServer().listen(os.path.join(open_folder, "socket"))


# ---- Who the peer is

CONNECT = """
    import os, socket, sys
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(sys.argv[1])
    peer.sendall(b"%d\\n" % os.getpid())
    print(peer.recv(100).decode())
"""

LISTEN = """
    import os, socket, sys
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    print("listening", flush=True)
    peer = listener.accept()[0]
    peer.sendall(b"%d\\n" % os.getpid())
    peer.recv(100)
"""


@linux_only
def test_connection_knows_the_process_that_connected_also_in_on_close(unix_server_of, recorder, path):
    class Noting(UnixConnection):
        read_delimiter = b"\n"

        def on_connect(self):
            recorder("open", self.peer_credentials)

        def on_read(self, line):
            recorder("pid", int(line))
            self.write(b"bye")
            self.end()

        def on_close(self):
            recorder("closed", self.peer_credentials)

    unix_server_of(Noting, path)
    python(CONNECT, path)
    recorder.wait_for("closed")
    credentials = Credentials(recorder[1][1], os.geteuid(), os.getegid())
    assert recorder == [("open", credentials), ("pid", credentials.pid), ("closed", credentials)]
    assert credentials.pid != os.getpid()
    assert (credentials.pid, credentials.uid, credentials.gid) == credentials


@linux_only
def test_client_knows_the_process_that_listens_also_in_on_close(recorder, path):
    class Noting(UnixClient):
        read_delimiter = b"\n"

        def on_read(self, line):
            recorder("pid", int(line))
            self.close()

        def on_close(self):
            recorder("closed", self.peer_credentials)

    process = gevent.subprocess.Popen([sys.executable, "-ISc", textwrap.dedent(LISTEN), path], stdout=gevent.subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"listening\n"
        client = Noting()
        assert client.peer_credentials is None
        client.connect(path)
        assert client.peer_credentials is None
        recorder.wait_for("closed")
        assert recorder == [("pid", process.pid), ("closed", (process.pid, os.geteuid(), os.getegid()))]
        assert client.peer_credentials.pid == process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@linux_only
def test_credentials_that_nobody_has_asked_for_are_known_in_on_close(unix_server_of, peer, recorder, path):
    unix_server_of(EchoUnix, path, on_close=lambda stream: recorder(stream.peer_credentials, stream.close_reason))
    peer(path).close()
    recorder.wait_for(1)
    assert recorder == [((os.getpid(), os.geteuid(), os.getegid()), CloseReason.PEER_ENDED)]


@linux_only
def test_credentials_of_a_client_that_dials_again_are_those_of_the_connection_at_hand(unix_server_of, recorder, path):
    class Again(UnixClient, ReconnectingClient):
        initial_delay = 0.001

        def on_connect(self):
            recorder("connected", self.peer_credentials)
            self.close()

        def on_reconnect(self, delay):
            recorder("between", self.peer_credentials)

    unix_server_of(EchoUnix, path)
    client = Again().connect(path)
    recorder.wait_for(4)
    client.stop()
    own = (os.getpid(), os.geteuid(), os.getegid())
    assert recorder[:4] == [("connected", own), ("between", None)] * 2
    until(lambda: client.closed)


def test_client_that_was_never_connected_has_no_peer(recorder, path):
    client = recorder.of(UnixClient)()
    assert client.peer_credentials is None
    client.connect(path)
    recorder.wait_for("on_close")
    assert client.peer_credentials is None


def test_unix_connection_on_another_kind_of_socket_has_no_credentials(server_of, peer):
    server = server_of(EchoUnix)
    assert answers(peer(server))
    assert server.channels.values()[0].peer_credentials is None
    stream, end = memory_pair(EchoUnix())
    end.send(b"hello")
    assert end.wait_for(5) == b"hello"
    assert stream.peer_credentials is None
    stream.close()


def test_platform_that_tells_nothing_has_no_credentials(unix_server_of, peer, path, monkeypatch):
    monkeypatch.setattr("pants_green._sockets.SO_PEERCRED", None)
    server = unix_server_of(EchoUnix, path)
    assert answers(peer(server))
    assert server.channels.values()[0].peer_credentials is None


@linux_only
def test_unix_client_that_takes_over_a_socket_knows_its_peer(plain):
    ours, theirs = socket.socketpair()
    with theirs:
        client = UnixClient(socket=gevent.socket.socket(fileno=ours.detach()))
        assert client.peer_credentials.pid == os.getpid()
        client.close()


@linux_only
def test_repr_says_who_the_peer_is(unix_server_of, peer, path):
    server = unix_server_of(EchoUnix, path)
    client = UnixClient().connect(path)
    until(lambda: server.channels and client.connected)
    who = f"pid {os.getpid()}, uid {os.geteuid()}"
    assert repr(client) == f"<UnixClient open to {path} ({who})>"
    assert repr(server.channels.values()[0]) == f"<EchoUnix open to ? ({who})>"
    client.close()


def test_closed_unix_connection_is_freed(unix_server_of, peer, path):
    made = []
    server = unix_server_of(EchoUnix, path, on_connect=lambda stream: made.append(weakref.ref(stream)))
    with peer(server) as one:
        assert answers(one)
    until(lambda: not server.channels)
    turns()
    gc.collect()
    assert made[0]() is None


# ---- Programs that others have written


class OneAnswer(Connection):
    """Answers the first line it gets, and ends."""

    read_delimiter = b"\n"

    def on_read(self, line):
        self.write(b"you said " + line)
        self.end()


class HTTP(UnixConnection):
    """Answers every request by what was asked for."""

    read_delimiter = "\r\n\r\n"
    encoding = "latin-1"

    def on_read(self, head):
        request = head.split("\r\n")[0]
        self.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(request)}\r\n\r\n{request}")


@needs("curl")
def test_curl_fetches_over_a_unix_socket(unix_server_of, path):
    unix_server_of(HTTP, path)
    said = run("curl", "-sS", "--unix-socket", path, "http://localhost/one", "http://localhost/two")
    assert said == b"GET /one HTTP/1.1GET /two HTTP/1.1"


@needs("curl")
@linux_only
def test_curl_fetches_from_an_abstract_name(unix_server_of):
    unix_server_of(HTTP, f"\0pants_green {os.getpid()}")
    assert run("curl", "-sS", "--abstract-unix-socket", f"pants_green {os.getpid()}", "http://localhost/") == b"GET / HTTP/1.1"


@needs("socat")
def test_socat_talks_and_takes_its_leave(unix_server_of, recorder, path):
    unix_server_of(recorder.of(EchoLines, "on_end", "on_close"), path)
    assert run("socat", "-t5", "-", f"UNIX-CONNECT:{path}", told="one\ntwo\nrest") == b"one\ntwo\n"
    recorder.wait_for("on_close")
    assert recorder == [("on_end", b"rest"), ("on_close",)]


@needs("socat")
def test_client_talks_to_socat(recorder, path):
    with gevent.subprocess.Popen(["socat", f"UNIX-LISTEN:{path}", "SYSTEM:cat"], stdin=gevent.subprocess.DEVNULL) as process:
        try:
            until(lambda: os.path.exists(path) and _socket_file._probe(path) == errno.EPROTOTYPE)
            while "on_read" not in recorder.names():
                recorder.clear()  # it may be bound, and not listen yet
                recorder.of(Asker)().connect(path)
                recorder.wait_for("on_close")
            assert recorder == [("on_connect",), ("on_read", b"question"), ("on_close",)]
            with gevent.Timeout(5):
                process.wait()
        finally:
            process.kill()


def nc_knows_unix_sockets():
    if shutil.which("nc") is None:
        return False
    asked = gevent.subprocess.run(["nc", "-h"], capture_output=True, timeout=10, check=False)
    return b"-U" in asked.stdout + asked.stderr


@needs("nc")
def test_nc_talks(unix_server_of, path):
    if not nc_knows_unix_sockets():
        pytest.skip("this machine's nc knows no Unix sockets")
    unix_server_of(OneAnswer, path)
    assert run("nc", "-U", path, told="hello\n") == b"you said hello"
