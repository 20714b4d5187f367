"""The file of a Unix socket: who has its path, who may connect to it, and whose it is to remove.

The sockets themselves are made in ``_sockets``.
"""

import errno
import os
import socket as stdlib_socket
import stat
from typing import Any, NamedTuple

from gevent import monkey

from pants_green._address import AF_UNIX

try:
    import fcntl
except ImportError:  # Windows, which has no such files either
    fcntl = None  # type: ignore[assignment]

__all__ = ["Permissions", "SocketFile", "bind_file", "is_abstract", "too_long"]

#: How often a lock that somebody else holds is tried again, and the seconds between: it is held for a few system calls.
LOCK_TRIES = 100
LOCK_PAUSE = 0.001

#: What is at a path where a socket's file should be; the others are rarer.
KINDS = {stat.S_IFREG: "a regular file", stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symbolic link"}

_plain_socket: Any = monkey.get_original("socket", "socket")
_plain_sleep: Any = monkey.get_original("time", "sleep")
_plain_close: Any = monkey.get_original("os", "close")  # gevent's waits for the next turn of the hub


class Permissions(NamedTuple):
    """Who may connect; None leaves what the kernel makes of it.

    Attributes:
        mode: the file's permissions, 0 to 0o777.
        owner: the uid of its owner. group: its gid.
    """

    mode: int | None = None
    owner: int | None = None
    group: int | None = None

    def give(self, path: str | bytes) -> None:
        """Give them to a file.

        Raises:
            OSError: this process may not do that; the text says what was asked.
        """
        asked = ""
        try:
            if self.mode is not None:
                asked = f"mode {self.mode:#o}"
                os.chmod(path, self.mode)
            if self.owner is not None or self.group is not None:
                asked = ", ".join(f"{name} {value}" for name, value in (("owner", self.owner), ("group", self.group)) if value is not None)
                os.chown(path, _or_unchanged(self.owner), _or_unchanged(self.group), follow_symlinks=False)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; this process may not give {asked} to its file") from error


class SocketFile:
    """The file that a socket of ours was bound to, while it is there."""

    __slots__ = ("_identity", "_path", "_process")

    def __init__(self, path: str | bytes) -> None:
        self._path = os.path.abspath(path)  # the process may go elsewhere
        self._process = os.getpid()
        self._identity = _identity(os.stat(path, follow_symlinks=False))

    def remove(self) -> None:
        """Remove it, if it still is the one that was made, and this the process that made it.

        Call this before the socket is closed: as long as that is open nobody takes the file for a stale one and puts another
        in its place, and no other file gets the number of its inode.
        """
        if os.getpid() != self._process:
            return  # a forked child parts with its copy of the socket, and the parent goes on
        try:
            if _identity(os.stat(self._path, follow_symlinks=False)) == self._identity:
                os.unlink(self._path)
        except OSError:
            pass


def bind_file(sock: Any, path: Any, permissions: Permissions | None = None) -> SocketFile | None:
    """Bind a Unix socket to a path, in the place of a stale file if there is one, or to an abstract name.

    A stale file is one that a socket left behind: no socket is bound to it any more.

    Args:
        sock: a new one, of any type.
        path: str or bytes.
        permissions: what the file is given. Nobody can connect before ``listen()``, so nobody does before they hold.

    Returns:
        the file that was made; None for an abstract name.

    Raises:
        OSError: the path is in use, or cannot be bound to, or the permissions cannot be given. No file is left.
    """
    if is_abstract(path):
        _bind(sock, path)
        return None
    if _stale(path) is not None:
        lock = _lock_beside(path)
        try:
            _remove_stale(path)
        finally:
            if lock >= 0:
                _unlock(lock)
    _bind(sock, path)
    file = SocketFile(path)
    try:
        if permissions is not None:
            permissions.give(path)
    except BaseException:
        file.remove()
        raise
    return file


def is_abstract(path: Any) -> bool:
    """Tell whether a path, as str or bytes, is an abstract name, which has no file."""
    return path[:1] in ("\0", b"\0")


def too_long(path: str | bytes) -> str:
    """Say what is wrong with a path that no socket can have."""
    return f"it has {len(os.fsencode(path))} bytes, and the address of a Unix socket holds 107 on Linux, 103 elsewhere"


def _bind(sock: Any, path: str | bytes) -> None:
    try:
        sock.bind(path)
    except OSError as error:
        code = error.errno or errno.ENAMETOOLONG  # Python itself looks how long it is
        reason = error.strerror or os.strerror(code)
        raise OSError(code, f"{reason}; {advice}" if (advice := _advice(code, path)) else reason) from error


def _stale(path: str | bytes) -> tuple[int, int, int] | None:
    """Return which file a socket has left behind at a path; None if there is none, or anything else, which binding will tell of."""
    try:
        found = os.stat(path, follow_symlinks=False)
        return _moment(found) if stat.S_ISSOCK(found.st_mode) and _probe(path) == errno.ECONNREFUSED else None
    except OSError:
        return None


def _remove_stale(path: str | bytes) -> None:
    """Remove the file that a socket left behind; call this with the lock, for others may have come first."""
    found = _stale(path)
    try:
        # Right before it goes, a second look: somebody who does not ask for the lock may have put a file of his own there since
        # the first. The number of its inode may be that of the old one again; its time of change is another.
        if found is not None and _moment(os.stat(path, follow_symlinks=False)) == found:
            os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; a socket has left that file behind, and this process may not remove it") from error


def _probe(path: str | bytes) -> int:
    """Ask the kernel whether a socket is bound to a file: ECONNREFUSED says that there is none."""
    # A datagram socket finds any kind of socket, also one that does not listen yet or whose queue is full, and is told
    # EPROTOTYPE by those that are none: the other side notices nothing. A kernel that does not look for another kind refuses
    # it as if there were nobody; so, where nobody was found, a stream asks, too. *Source*: unix(7), connect(2).
    for kind in (stdlib_socket.SOCK_DGRAM, stdlib_socket.SOCK_STREAM):
        with _plain_socket(AF_UNIX, kind) as probe:
            probe.setblocking(False)
            code = probe.connect_ex(path)
        if code != errno.ECONNREFUSED:
            break
    return int(code)


def _lock_beside(path: str | bytes) -> int:
    """Keep others of us from removing stale files in this directory while this process does.

    Two servers that start at the same moment find the same stale file. One removes it and binds, and then the other would
    remove what the first has bound, which nobody could reach any more. No system call compares and removes in one; but a
    directory can be locked, like any file, with nothing left behind, and the kernel ends the lock with its process. Who has it
    looks again whether the file is stale, and a socket that is bound is not, also if it does not listen yet. So among servers
    of this library exactly one gets the path.

    The lock holds off only those who ask for it, and anybody may keep it. So it is not waited for for long; and without it (on
    NFS, or in a directory that this process cannot read), or against other libraries, there is only the second look that
    `_remove_stale` takes, which leaves them the time between two system calls.

    Returns:
        the descriptor that holds the lock; -1 if it was not to be had.
    """
    if fcntl is None:
        return -1
    try:
        descriptor = os.open(os.path.dirname(path) or os.curdir, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return -1
    try:
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                _plain_sleep(LOCK_PAUSE)
    except OSError:
        pass
    except BaseException:
        _plain_close(descriptor)
        raise
    _plain_close(descriptor)
    return -1


def _unlock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough, if another thread has forked meanwhile
    finally:
        _plain_close(descriptor)


def _advice(code: int, path: str | bytes) -> str:
    """Return what to do about a path that cannot be bound to; empty where nothing is known."""
    if code == errno.ENAMETOOLONG:
        return too_long(path)
    if code == errno.EADDRINUSE:
        return _who_has(path)
    directory = os.fsdecode(os.path.dirname(path)) or os.curdir
    if code == errno.ENOENT and not os.path.isdir(directory):
        return f"there is no directory {directory!r}: make it first"
    if code == errno.ENOTDIR:
        return f"{directory!r} is no directory"
    if code in (errno.EACCES, errno.EPERM):
        return f"this process may not make files in {directory!r}"
    return ""


def _who_has(path: str | bytes) -> str:
    """Say what there is at a path that is in use."""
    if not is_abstract(path):
        try:
            kind = stat.S_IFMT(os.stat(path, follow_symlinks=False).st_mode)
            if kind != stat.S_IFSOCK:
                what = KINDS.get(kind, "something else than a socket")
                return f"there is {what}, and only what a socket has left behind is replaced: remove it or choose another path"
            if _probe(path) in (errno.EACCES, errno.EPERM):
                return "a socket is there, and this process may not ask whether somebody listens: choose another path"
        except OSError:
            pass
    return "somebody listens there: stop that program or choose another path"


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _moment(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_dev, found.st_ino, found.st_ctime_ns


def _or_unchanged(number: int | None) -> int:
    return -1 if number is None else number
