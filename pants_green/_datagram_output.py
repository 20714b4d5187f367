"""What a datagram channel has still to send: packets whose names are being looked up, and those for which the kernel has no room.

What is sent at once, and everything else that a channel does, is in ``datagram``.
"""

import contextvars
import errno
import logging
from socket import AF_INET
from typing import Any

from pants_green import _packets, _sockets
from pants_green._address import AF_UNIX, Address, format_address
from pants_green._callbacks import Chunk
from pants_green._datagram_state import DatagramState
from pants_green._lifecycle import CLOSED, DRAINING, NEW
from pants_green._limits import Limits
from pants_green.errors import DatagramTooLong, WriteTimeout

__all__ = ["DatagramOutput"]

#: Bytes that a packet in the outbox counts beside its own.
OVERHEAD = 64

#: Seconds after which a send is tried again where no watcher can tell when there is room: doubled each time, up to the second.
RETRY_LEAST = 0.001
RETRY_MOST = 0.1

#: Errors that may wait to be told; of more only the packets are counted that were not sent.
TROUBLES = 100


class DatagramOutput(DatagramState[Chunk]):
    """The outbox of a datagram channel at work. Nothing here waits, but for the greenlets that look names up."""

    __slots__ = ()

    # ---- waiting for a name

    def _queue_for_name(self, data: bytes, address: Address) -> None:
        """Keep a packet until its receiver's name has been looked up."""
        if len(data) > max(_packets.MOST.values()):
            raise self._too_long(data)
        if not self._counted(data):
            return
        waiting = self._names.get(address)
        if waiting is not None:
            waiting.append(data)
            return
        self._names[address] = [data]
        self._engine._roots.add(self)
        self._engine._run_soon(self._look_up, address, contextvars.copy_context())

    def _look_up(self, address: Address) -> None:
        """In a greenlet of its own, for the resolver waits: look a name up, and send what waits for it."""
        name = format_address(address.sockaddr)
        found: list[Address] = []
        trouble: OSError | None = None
        try:
            found = _sockets.resolve(address)
        except OSError as error:
            trouble = type(error)(error.errno, f"cannot send to {name}: {error.strerror or error}")
        finally:
            waiting = self._names.pop(address, [])
            self._pending -= sum(len(data) + OVERHEAD for data in waiting)
        if self._state is CLOSED:
            return
        to = _packets.fitting(found, self._family)
        if trouble is None and to is None:
            reason = f"it has no {_packets.family_name(self._family or 0)} address"
            trouble = OSError(errno.EAFNOSUPPORT, f"cannot send to {name}: {reason}")
        if to is not None:
            try:
                self._open(to.family)
            except (OSError, ValueError) as error:
                code = error.errno if isinstance(error, OSError) else errno.EINVAL
                trouble = OSError(code, f"cannot send to {name}: {error}")
        if trouble is not None:
            self._writes_dropped += len(waiting)
            self._tell_trouble("on_write_error", trouble)
        elif to is not None:
            for data in waiting:
                self._queue(data, to.sockaddr, at_call=False)
            self._flush_all()
        if self._state is NEW and not self._names:
            self._engine._roots.discard(self)
        elif self._state is DRAINING:
            self._alert()

    def _open(self, family: int) -> None:
        """Have a socket of `family`, to send from and receive with, if there is none."""
        raise NotImplementedError

    # ---- waiting for room

    def _queue(self, data: bytes, to: Any, at_call: bool = True) -> None:
        """Keep a packet until there is room in the kernel."""
        if len(data) > _packets.MOST.get(self._family or 0, len(data)):
            if at_call:
                raise self._too_long(data)
            self._tell_trouble("on_write_error", self._too_long(data))
        elif self._counted(data):
            self._outbox.append((data, to))
            self._stuck.add(to)
            if not self._sending:
                self._wait_for_room()

    def _counted(self, data: bytes) -> bool:
        """Count a packet that is to wait, if there is room for it; else drop it."""
        size = len(data) + OVERHEAD
        if self._pending and self._pending + size > self._write_limit:
            self._writes_dropped += 1
            self._log(logging.DEBUG, "a packet of %d bytes was dropped", len(data), event="write_dropped")
            return False
        self._pending += size
        return True

    def _wait_for_room(self) -> None:
        """Have what waits sent when the kernel has room."""
        self._sending = True
        if self._retry:
            self._retry_timer = self._engine._in_hub_after(self._retry, self._writable)
        else:
            self._writer.start(self._writable)
        if self._write_timeout is not None and not (self._limits is not None and self._limits.runs("write")):
            self._limit("write", self._write_timeout)

    def _writable(self) -> None:
        """Hub: the kernel has room again, or says so."""
        self._stop_waiting()
        if self._flush() or not self._outbox:
            self._retry = 0.0
        else:
            # A Unix socket that is tied to no peer is always writable, however full that of the receiver is.
            self._retry = min(max(self._retry * 2, RETRY_LEAST), RETRY_MOST)
        if self._outbox and not self._sending:
            self._wait_for_room()

    def _stop_waiting(self) -> None:
        self._sending = False
        if self._writer is not None:
            self._writer.stop()
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry_timer = None

    def _flush(self) -> int:
        """Send what the kernel takes, in order to each receiver; return how many packets it took, or will never take."""
        outbox = self._outbox
        self._stuck = full = set()  # receivers without room: for a Unix socket each has its own
        done = 0
        for _ in range(len(outbox)):
            packet = outbox.popleft()
            data, to = packet
            if to in full:
                outbox.append(packet)
                continue
            try:
                self._attempt(data, to)
            except BlockingIOError:
                if self._family != AF_UNIX:
                    outbox.appendleft(packet)
                    break
                full.add(to)
                outbox.append(packet)
                continue
            except OSError as error:
                self._refused(data, to, error, at_call=False)
            self._pending -= len(data) + OVERHEAD
            done += 1
        if done and self._limits is not None:
            self._limits.end("write")
            if outbox and self._write_timeout is not None:
                self._limit("write", self._write_timeout)
        if not outbox:
            if done and self._write_heard and not self._write_told:
                self._tell_written()
            if self._state is DRAINING:
                self._alert()
        return done

    def _attempt(self, data: bytes, to: Any) -> None:
        try:
            self._sendto(data, to)
        except OSError as error:
            if not self._is_of_earlier(error):
                raise
            self._sendto(data, to)

    def _flush_all(self) -> None:
        """Send what the kernel takes, also if the write watcher waits already."""
        if self._outbox:
            self._stop_waiting()
            self._flush()
            if self._outbox:
                self._wait_for_room()

    # ---- the time limit

    def _limit(self, which: str, seconds: float) -> None:
        """Start a time limit, or start it anew."""
        if self._limits is None:
            self._limits = Limits(self._engine, self._limit_hit)
        self._limits.begin(which, seconds)

    def _limit_changed(self, which: str) -> None:
        """A limit has to run anew, or from now on, or no more."""
        if self._limits is not None:
            self._limits.end(which)
        if self._outbox and self._write_timeout is not None:
            self._limit(which, self._write_timeout)

    def _limit_hit(self, which: str) -> None:
        """Hub: nothing could be sent for too long."""
        if self._flush() or not self._outbox or self._write_timeout is None:
            if not self._outbox:
                self._stop_waiting()
            return
        text = f"nothing could be sent for write_timeout, {self._write_timeout:g} seconds; {len(self._outbox)} packets were dropped"
        self._stop_waiting()
        self._retry = 0.0
        self._writes_dropped += len(self._outbox)
        self._pending -= sum(len(data) + OVERHEAD for data, _ in self._outbox)
        self._outbox.clear()
        self._stuck.clear()
        self._timeout_error = WriteTimeout(text)
        self._post("on_timeout", which)
        if self._state is DRAINING:
            self._alert()

    # ---- what is told

    def _tell_written(self) -> None:
        self._write_told = True
        self._post("_written")

    def _written(self) -> None:
        """Posted: everything was sent."""
        self._write_told = False
        if self._state is not CLOSED:
            self._call("on_write")

    def _is_of_earlier(self, error: OSError) -> bool:
        """If an error is about a packet that was sent before tell the user of it: the one at hand has not been looked at."""
        code = error.errno
        if self._peer is None or code not in _packets.ICMP or (self._family == AF_UNIX and code != errno.ECONNRESET):
            return False
        self._tell_trouble("on_read_error", self._from_network(error))
        return True

    def _refused(self, data: bytes, to: Any, error: OSError, at_call: bool) -> None:
        """The system refuses a packet: raise what is the caller's mistake, and tell what is not."""
        code = error.errno or errno.ENAMETOOLONG  # Python itself looks how long a path is
        to = to or self._peer
        text = f"cannot send to {format_address(to)}: {_packets.reason(code, to)}"
        if code == errno.EMSGSIZE and at_call:
            raise self._too_long(data) from None
        if code == errno.EMSGSIZE:
            self._tell_trouble("on_write_error", self._too_long(data))
        elif at_call and code == errno.EACCES and self._family == AF_INET and not self._broadcast:
            raise PermissionError(code, f"{text}; if that is a broadcast address set broadcast = True on {self!r}") from None
        elif at_call and code == errno.ENAMETOOLONG:
            raise OSError(code, text) from None
        else:
            self._tell_trouble("on_write_error", OSError(code, text))

    def _too_long(self, data: bytes) -> DatagramTooLong:
        most = _packets.MOST.get(self._family or 0)
        if most is None:
            limit = "its send buffer (SO_SNDBUF) has no room for so many"
        elif len(data) > most:
            limit = f"a packet has at most {most} bytes"
        else:
            limit = "the way there takes no packet of that length, and to cut it on the way was forbidden"
        return DatagramTooLong(errno.EMSGSIZE, f"write() on {self!r}: {len(data)} bytes; {limit}")

    def _from_network(self, error: OSError) -> OSError:
        """Return an error that the network has told, with the peer in its text."""
        return OSError(error.errno, f"{format_address(self._peer)} does not take packets: {error.strerror}")

    def _tell_trouble(self, name: str, error: OSError) -> None:
        """Have the callback `name` called with `error`, unless too many of its kind wait already."""
        if self._posted is None or len(self._posted) < TROUBLES:
            self._post(name, error)
        elif name == "on_write_error":
            self._writes_dropped += 1  # nobody listens that fast

    # ---- the end

    def _drop_output(self) -> int:
        """Send nothing more of what waits; return how many packets that were."""
        dropped = len(self._outbox) + sum(map(len, self._names.values()))
        self._writes_dropped += dropped
        self._outbox.clear()
        self._stuck.clear()
        self._names.clear()
        self._pending = 0
        self._stop_waiting()
        if self._limits is not None:
            self._limits.cancel()
            self._limits = None  # it holds the channel
        return dropped
