"""Files in the outbox of a stream: what can be sent from its descriptor, what has to be read, and how either is done.

What the rest of the outbox is made of is in ``_outbox``; who sends, and when, in ``stream``.
"""

import errno
import io
import logging
import os
import stat
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pants_green import _sockets
from pants_green._outbox import FileItem

if TYPE_CHECKING:
    from pants_green.stream import Stream

__all__ = ["BURST", "FileSender", "item_of"]

#: Bytes that the kernel is asked to send in one go. Measured against the whole rest of the file per call: rate 1.4.
PIECE = 64 * 1024

#: Bytes of one flush, after which others get their turn.
BURST = 1024 * 1024

#: Bytes up to which a part of a file is read at once. That takes less time than to send it from its descriptor, 0.8 to 0.6 the
#: smaller it is, goes out together with what is written around it, and a peer who asks for many small files and takes none of
#: them ties up no descriptors.
SMALL = 64 * 1024

#: Bytes that are read in one go where the kernel cannot send them itself.
READ_AHEAD = 256 * 1024

#: Bytes of a source without a descriptor up to which they are kept in memory; more go to a temporary file.
IN_MEMORY = 256 * 1024

#: What says that the kernel cannot send from this kind of file, or to this kind of socket.
CANNOT = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSOCK, errno.EOVERFLOW})

#: Those of the standard library's files that have the bytes of what they stand on and nothing else: a GzipFile has not.
PLAIN = (io.BufferedReader, io.BufferedRandom, io.BufferedWriter)

_sendfile: Callable[[int, int, int, int], int] | None = getattr(os, "sendfile", None)


# ---- what is to be sent


def item_of(file: Any, nbytes: int, offset: int, call: str) -> FileItem | bytes:
    """Return what stands for a part of a file in an outbox; nothing that happens to `file` afterwards matters any more.

    Args:
        file, nbytes, offset: as ``Stream.write_file``.
        call: what was called on which channel, for errors.

    Returns:
        a FileItem that is not empty; or the bytes themselves.

    Raises:
        TypeError, ValueError: an argument makes no sense.
        OSError: no descriptor is left, or reading failed.
    """
    for name, value in (("nbytes", nbytes), ("offset", offset)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{call} takes {name} as a number of bytes, an int, not {value!r}")
        if value < 0:
            raise ValueError(f"{call} takes {name} as 0 bytes or more, not {value}")
    if getattr(file, "closed", False) is True:
        raise ValueError(f"{call} takes an open file; {file!r:.100} is closed")
    readable = getattr(file, "readable", None)
    if callable(readable) and not readable():
        raise _only_written(file, call)
    descriptor = _descriptor_of(file, call)
    if descriptor is not None:
        return _part_of(descriptor, nbytes, offset)
    if isinstance(file, io.BytesIO):
        with file.getbuffer() as content:
            return bytes(content[offset : offset + nbytes] if nbytes else content[offset:])
    if not callable(getattr(file, "read", None)):
        raise TypeError(f"{call} takes a file, as open(path, 'rb') returns one, not {type(file).__name__}: {file!r:.100}")
    return _read_out(file, nbytes, offset, call)


def _only_written(file: Any, call: str) -> ValueError:
    return ValueError(f"{call} takes a file that is open for reading, as 'rb' and 'w+b' open it; {file!r:.100} is not")


def _descriptor_of(file: Any, call: str) -> int | None:
    """Return the descriptor of a regular file whose bytes `file` stands for, as they are; else None."""
    inner = file.buffer if isinstance(file, io.TextIOWrapper) else file
    if isinstance(inner, PLAIN):
        inner = inner.raw
    if isinstance(inner, io.BufferedIOBase | io.RawIOBase) and not isinstance(inner, io.FileIO):
        return None  # a GzipFile, say: its descriptor is that of what it unpacks
    try:
        file.flush()  # what its user has written may not have got there yet
    except (AttributeError, io.UnsupportedOperation):
        pass
    try:
        descriptor = file.fileno()
    except (AttributeError, io.UnsupportedOperation):
        return None
    if not isinstance(descriptor, int) or isinstance(descriptor, bool):
        return None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return None
    try:
        begins = os.pread(descriptor, 1, 0)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        raise _only_written(file, call) from None
    if begins and not status.st_size:
        return None  # one of /proc, which all say that they are empty
    return descriptor


def _part_of(descriptor: int, nbytes: int, offset: int) -> FileItem | bytes:
    """Return a part of an open file, with a descriptor of its own, or read."""
    size = max(0, os.fstat(descriptor).st_size - offset)
    if nbytes:
        size = min(nbytes, size)
    if size <= SMALL:
        return os.pread(descriptor, size, offset) if size else b""
    return FileItem(open(os.dup(descriptor), "rb", buffering=0), offset, size)


def _read_out(file: Any, nbytes: int, offset: int, call: str) -> FileItem | bytes:
    """Read a source that has no descriptor, or none of a regular file, to its end: into memory, or into a temporary file."""
    before = None
    skip = offset
    if _seekable(file):
        before = file.tell()
        try:
            file.seek(offset)
        except (OverflowError, ValueError):
            return b""  # nothing is as long as that
        skip = 0
    pieces: list[bytes] = []
    spool: Any = None
    size = 0
    try:
        while not nbytes or size < nbytes:
            wanted = skip or (nbytes and nbytes - size) or READ_AHEAD
            data = _checked(file.read(min(wanted, READ_AHEAD)), file, call)
            if not data:
                break
            if skip:
                left_out = min(skip, len(data))
                skip -= left_out
                data = data[left_out:]
            if nbytes:
                data = data[: nbytes - size]  # there are some that do not care how much they are asked for
            size += len(data)
            if spool is None and size > IN_MEMORY:
                spool = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
                spool.write(b"".join(pieces))
                pieces.clear()
            if spool is None:
                pieces.append(bytes(data))
            else:
                spool.write(data)
        if spool is None:
            return b"".join(pieces)
        spool.flush()
        return _part_of(spool.fileno(), 0, 0)
    finally:
        if spool is not None:
            spool.close()
        if before is not None:
            file.seek(before)


def _seekable(file: Any) -> bool:
    seekable = getattr(file, "seekable", None)
    if callable(seekable):
        return bool(seekable())
    return callable(getattr(file, "seek", None)) and callable(getattr(file, "tell", None))  # an mmap, say


def _checked(data: Any, file: Any, call: str) -> Any:
    """Return what ``read()`` of a source has returned, if that is bytes-like."""
    if isinstance(data, bytes | bytearray | memoryview):
        return data
    if isinstance(data, str):
        raise TypeError(f"{call} sends bytes, and {file!r:.100} reads as text; open it in binary mode ('rb')")
    if data is None:
        raise BlockingIOError(errno.EAGAIN, f"{call} reads its file to the end, and {file!r:.100} has nothing to read now")
    raise TypeError(f"{call}: read() of {file!r:.100} returned {data!r:.100}; it has to return bytes")


# ---- sending


class FileSender:
    """Stands in the place of a stream's ``send`` while there are files in its outbox.

    Args:
        stream: the stream.
        send: what sends its bytes: the socket's, or that of TLS.
    """

    __slots__ = ("_out", "_stream", "send")

    def __init__(self, stream: "Stream[...]", send: Callable[[Any], int]) -> None:
        self._stream = stream
        self.send = send
        # Under TLS nobody but ourselves can encrypt it.
        self._out = None if stream._secure or _sendfile is None else _sockets.descriptor_of(stream._socket)

    def __call__(self, item: Any) -> int:
        """Send an item of the outbox, or some of it; return how many bytes that was."""
        if item.__class__ is not FileItem:
            return self.send(item)
        sent = self._send_from_kernel(item) if self._out is not None and not item.to_be_read else self._read_and_send(item)
        self._gone(item, sent)
        return sent

    def _gone(self, item: FileItem, sent: int) -> None:
        stream = self._stream
        stream._in_files -= sent
        if stream._meter is not None:
            stream._meter.active = stream._engine._clock()
        if sent == len(item):
            item.close()
            outbox = stream._outbox
            outbox.files -= 1
            if not outbox.files:
                stream._send = self.send

    def _send_from_kernel(self, item: FileItem) -> int:
        assert _sendfile is not None
        assert self._out is not None
        source = item.fileno()
        size = len(item)
        done = 0
        try:
            while done < size and done < BURST:
                try:
                    sent = _sendfile(self._out, source, item.offset + done, min(PIECE, size - done))
                except BlockingIOError:
                    break
                except OSError as error:
                    if done:
                        break  # it comes again
                    if error.errno not in CANNOT:
                        raise
                    item.to_be_read = True
                    return self._read_and_send(item)
                if not sent:
                    self._cut_short(item, done)
                    break
                done += sent
        except BaseException:
            # Ctrl-C, for one: what is gone must not be sent once more.
            self._gone(item, done)
            self._stream._outbox.sent(done)
            self._stream._pending -= done
            raise
        return done

    def _read_and_send(self, item: FileItem) -> int:
        if not item.ahead:
            item.ahead = memoryview(os.pread(item.fileno(), min(READ_AHEAD, len(item)), item.offset))
            if not item.ahead:
                self._cut_short(item, 0)
                return 0
        try:
            sent = self.send(item.ahead)
        except BlockingIOError:
            return 0
        item.ahead = item.ahead[sent:]
        return sent

    def _cut_short(self, item: FileItem, size: int) -> None:
        """The file has become shorter meanwhile: no more than `size` bytes are left of it. What was written behind it goes on."""
        missing = len(item) - size
        item.size = size
        stream = self._stream
        stream._pending -= missing
        stream._in_files -= missing
        if stream._tls is not None and stream._tls.clear:
            stream._tls.clear -= missing  # it was written before TLS began
        # In a greenlet of its own: a log handler may wait, and who flushes meanwhile must not find this item as it is.
        message = "a file has become shorter while it was sent: %d bytes are missing"
        stream._engine._run_soon(stream._write_log, (stream._logger, logging.WARNING, message, (missing,), "file_cut_short", None))
