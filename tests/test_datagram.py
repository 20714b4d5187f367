"""Datagrams: packets as they come and as they go, to many peers and to one; what the kernel and the user do to them."""

import errno
import functools
import gc
import logging
import os
import re
import shutil
import socket
import textwrap
import weakref
from socket import AF_INET, AF_INET6, AF_UNIX, SOCK_DGRAM
from struct import Struct

import gevent
import gevent.socket
import gevent.subprocess
import pytest
from children import Child
from gevent.event import Event
from needs import multicast_works, needs_ipv6, needs_multicast
from peers import TIMEOUT, PlainSocket, in_new_thread, in_thread
from waiting import nothing_is_kept, turns, unsent, until  # noqa: F401

import pants_green
from pants_green import (
    ChannelClosed,
    ChannelStateError,
    CloseReason,
    Datagram,
    DatagramTooLong,
    Engine,
    InvalidAddressFormatError,
    Stream,
    WriteTimeout,
    WrongThreadError,
)
from pants_green import engine as engine_module
from pants_green.channel import Channel
from pants_green.framing import LengthPrefix

LOCAL = ("127.0.0.1", 0)
LOCAL6 = ("::1", 0)


on_linux = pytest.mark.skipif(not os.path.exists("/proc/sys/net"), reason="as Linux does it")


class PacketPeer:
    """The other side: a plain blocking socket, bound to an address of its own."""

    def __init__(self, address=LOCAL, bufsize=None):
        family = AF_UNIX if isinstance(address, (str, bytes)) else AF_INET6 if ":" in address[0] else AF_INET
        self.socket = PlainSocket(family, SOCK_DGRAM)
        self.socket.settimeout(TIMEOUT)
        self.size = bufsize or 128 * 1024
        if bufsize is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, bufsize)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, bufsize)
        self.socket.bind(address)

    @property
    def address(self):
        return self.socket.getsockname()

    def leave(self):
        """Close, and return the address at which nobody is any more."""
        address = self.address
        self.close()
        return address

    def send(self, data, to):
        self.socket.sendto(data, getattr(to, "local_address", to))

    def receive(self):
        """Return the next packet and who sent it."""
        return in_thread(self.socket.recvfrom, self.size)

    def read(self, count=1):
        """Return the next packets, without their senders."""
        return [self.receive()[0] for _ in range(count)]

    def waiting(self):
        """Return what has come by now, without waiting."""
        found = []
        self.socket.settimeout(0)
        try:
            while True:
                found.append(self.socket.recv(self.size))
        except BlockingIOError:
            return found
        finally:
            self.socket.settimeout(TIMEOUT)

    def close(self):
        self.socket.close()


@pytest.fixture
def peer():
    """Return a function that makes a PacketPeer; closed at the end."""
    peers = []

    def make(*args, **options):
        peers.append(PacketPeer(*args, **options))
        return peers[-1]

    yield make
    for one in peers:
        one.close()


@pytest.fixture
def keep():
    """Return a function that closes a channel at the end of the test."""
    channels = []

    def add(channel):
        channels.append(channel)
        return channel

    yield add
    for channel in channels:
        if channel.engine is Engine.instance():
            channel.close()


@pytest.fixture
def listening(keep):
    """Return a function that makes a listening channel: ``listening(Class, address, **attributes of a subclass)``."""

    def make(base=Datagram, address=LOCAL, **attributes):
        made = type(base.__name__, (base,), attributes) if attributes else base
        return keep(made()).listen(address)

    return make


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "d")


@pytest.fixture
def names(monkeypatch):
    """Return what the resolver knows: names with their IP addresses, an exception, or an Event to wait for in front of them."""
    known = {}

    def getaddrinfo(host, port, family=0, kind=0, *rest):
        hosts = known[host]
        if isinstance(hosts[0], Event):
            hosts[0].wait()
            hosts = hosts[1:]
        if isinstance(hosts[0], Exception):
            raise type(hosts[0])(*hosts[0].args)
        found = [(AF_INET6, (one, port, 0, 0)) if ":" in one else (AF_INET, (one, port)) for one in hosts]
        return [(one, kind, 0, "", sockaddr) for one, sockaddr in found if family in (0, one)]

    monkeypatch.setattr("gevent.socket.getaddrinfo", getaddrinfo)
    return known


class Echo(Datagram):
    def on_read(self, data):
        self.write(data)


def recording(recorder, *names, base=Datagram, **attributes):
    """Return a class that records these callbacks, by default those of packets and their trouble."""
    names = names or ("on_read", "on_read_error", "on_write_error", "on_timeout", "on_error", "on_close")
    return recorder.of(base, *names, **attributes)


# ---- what it is


def test_s4_17_datagram_is_at_its_old_path_and_on_the_face():
    from pants_green.datagram import Datagram as at_old_path

    assert at_old_path is pants_green.Datagram is Datagram


def test_s4_31_packets_are_a_channel_beside_streams():
    assert issubclass(Datagram, Channel)
    assert not issubclass(Datagram, Stream)


@pytest.mark.parametrize("address", [LOCAL, pytest.param(LOCAL6, marks=needs_ipv6), "path", "\0abstract"], ids=repr)
def test_s4_31_packets_of_the_network_and_of_unix_sockets(listening, peer, path, address):
    where = {"path": path, "\0abstract": f"\0pants {path}"}.get(address, address)
    channel = listening(Echo, where)
    one = peer(f"{path}.peer" if isinstance(where, str) else address)
    one.send(b"hello", channel)
    data, sender = one.receive()
    assert data == b"hello"
    assert sender == channel.local_address


def test_s4_27_listen_as_the_documents_write_it(keep, peer):
    probe = peer(("", 0))
    port = probe.address[1]
    probe.close()
    channel = keep(Echo())
    assert channel.listen(("", port)) is channel
    assert channel.local_address == ("0.0.0.0", port)
    one = peer()
    one.send(b"foo", ("127.0.0.1", port))
    assert one.receive() == (b"foo", ("127.0.0.1", port))


def test_s4_10_packet_channels_have_no_callbacks_of_streams_and_servers():
    for name in ("on_connect", "on_connect_error", "on_accept", "on_end"):
        assert not hasattr(Datagram, name)


def test_s4_7_on_listen_is_called_before_listen_returns(keep, recorder):
    channel = keep(recording(recorder, "on_listen")())
    channel.on_listen_seen = None
    assert recorder == []
    channel.listen(LOCAL)
    assert recorder == [("on_listen",)]
    turns()
    assert recorder == [("on_listen",)]


def test_e1_20_on_listen_and_on_close_are_called_once_each(keep, recorder):
    channel = keep(recording(recorder, "on_listen", "on_close")())
    channel.listen(LOCAL)
    channel.close()
    assert recorder == [("on_listen",)]  # never inside close()
    recorder.wait_for("on_close")
    channel.close()
    channel.end()
    turns()
    assert recorder == [("on_listen",), ("on_close",)]
    assert (channel.closed, channel.listening, channel.close_reason) == (True, False, CloseReason.CLOSED_HERE)


@pytest.mark.parametrize("how", ["close", "end"])
def test_channel_that_never_opened_closes_with_on_close(how, recorder):
    channel = recording(recorder)()
    getattr(channel, how)()
    assert channel.closed
    recorder.wait_for("on_close")


def test_on_listen_that_blocks_holds_everything_else_back(keep, peer, recorder):
    """Callbacks run one at a time, also the one that runs in the greenlet of the caller."""
    one = peer()

    class Slow(Datagram):
        def on_listen(self):
            self.write(b"ready", one.address)
            one.send(b"early", self)
            recorder("on_listen begins")
            turns()
            recorder("on_listen ends")

        def on_write(self):
            recorder("on_write")

        def on_read(self, data):
            recorder(data)

    keep(Slow()).listen(LOCAL)
    recorder.wait_for(4)
    assert recorder == ["on_listen begins", "on_listen ends", "on_write", b"early"]


def test_on_listen_that_closes_or_raises(keep, recorder, caplog):
    class Closes(recording(recorder)):
        def on_listen(self):
            self.close()

    channel = keep(Closes()).listen(LOCAL)
    assert channel.closed
    recorder.wait_for("on_close")

    class Raises(Datagram):
        def on_listen(self):
            raise KeyError("no such thing")

    channel = keep(Raises()).listen(LOCAL)
    assert channel.listening
    assert "on_listen raised KeyError('no such thing')" in caplog.text


def test_properties_from_new_to_closed(keep, peer, recorder):
    channel = keep(recording(recorder)())
    assert (channel.listening, channel.connected, channel.closed) == (False, False, False)
    assert (channel.local_address, channel.remote_address, channel.socket, channel.fileno) == (None, None, None, None)
    assert repr(channel) == "<RecordedDatagram new>"
    assert channel not in Engine.instance().channels
    channel.listen(LOCAL)
    port = channel.local_address[1]
    assert (channel.listening, channel.connected, channel.closed) == (True, False, False)
    assert channel.local_address == ("127.0.0.1", port)
    assert channel.remote_address is None
    assert channel.fileno == channel.socket.fileno() >= 0
    assert repr(channel) == f"<RecordedDatagram listening 127.0.0.1:{port}>"
    assert channel in Engine.instance().channels
    assert channel.engine is Engine.instance()
    channel.close()
    assert (channel.listening, channel.connected, channel.closed) == (False, False, True)
    assert channel.local_address == ("127.0.0.1", port)
    assert (channel.remote_address, channel.socket, channel.fileno) == (None, None, None)
    assert repr(channel) == f"<RecordedDatagram closed 127.0.0.1:{port}>"
    assert channel not in Engine.instance().channels


# ---- listening


@pytest.mark.parametrize("address", [None, "127.0.0.1:80", 70000, -1, ("127.0.0.1", "80"), ("127.0.0.1",), 1.5, True], ids=repr)
@pytest.mark.parametrize("call", ["listen", "connect", "write"])
def test_address_that_is_none_is_refused_at_the_call_and_the_channel_stays(keep, call, address):
    channel = keep(Datagram())
    if call == "write" and address is None:
        with pytest.raises(ChannelStateError, match="where to"):
            channel.write(b"x", address)
    else:
        with pytest.raises(InvalidAddressFormatError):
            channel.write(b"x", address) if call == "write" else getattr(channel, call)(address)
    assert channel.listen(LOCAL).listening


@pytest.mark.parametrize("call", ["connect", "write"])
def test_port_0_nobody_can_be_sent_to(keep, call):
    channel = keep(Datagram())
    with pytest.raises(InvalidAddressFormatError, match="port 0"):
        channel.write(b"x", LOCAL) if call == "write" else channel.connect(LOCAL)


def test_port_in_use_is_an_error_at_the_call_and_another_may_be_tried(keep, listening):
    taken = listening().local_address
    channel = keep(Datagram())
    with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1:{taken[1]}: .*in use; another socket listens there") as caught:
        channel.listen(taken)
    assert caught.value.errno == errno.EADDRINUSE
    assert channel.socket is None
    assert channel.listen(LOCAL).listening


def test_address_of_another_machine_is_an_error_at_the_call(keep):
    with pytest.raises(OSError, match="no interface of this machine has that address"):
        keep(Datagram()).listen(("192.0.2.77", 0))


def test_unknown_name_is_an_error_at_the_call(keep):
    channel = keep(Datagram())
    with pytest.raises(socket.gaierror):
        channel.listen(("no.such.name.invalid", 0))
    with pytest.raises(socket.gaierror):
        channel.connect("no.such.name.invalid", 9)
    assert channel.listen(LOCAL).listening


def test_second_listen_and_listen_on_a_closed_channel_are_refused(listening):
    channel = listening()
    with pytest.raises(ChannelStateError, match="it receives already"):
        channel.listen(LOCAL)
    channel.close()
    with pytest.raises(RuntimeError, match="cannot be opened again"):
        channel.listen(LOCAL)
    with pytest.raises(RuntimeError, match="cannot be opened again"):
        channel.connect("127.0.0.1", 9)


def test_listen_after_the_first_write_is_refused(keep, peer):
    channel = keep(Datagram())
    channel.write(b"x", peer().address)
    with pytest.raises(ChannelStateError, match="it receives already"):
        channel.listen(LOCAL)


def test_reuse_port_shares_a_port_if_both_ask_for_it(keep, listening):
    first = keep(Datagram()).listen(LOCAL, reuse_port=True)
    with pytest.raises(OSError, match="in use"):
        listening(Datagram, first.local_address)
    second = keep(Datagram()).listen(first.local_address, reuse_port=True)
    assert second.local_address == first.local_address


def test_listen_to_a_name(keep, peer):
    channel = keep(Echo(family=AF_INET)).listen(("localhost", 0))
    one = peer()
    one.send(b"x", channel)
    assert one.read() == [b"x"]


@needs_ipv6
def test_e1_20_family_decides_what_every_interface_is(keep, peer):
    for address in (0, ("", 0)):
        channel = keep(Echo(family=AF_INET6)).listen(address)
        assert channel.local_address[0] == "::"
        one = peer(LOCAL6)
        one.send(b"x", ("::1", channel.local_address[1]))
        assert one.read() == [b"x"]
        channel.close()


@needs_ipv6
@pytest.mark.parametrize("call", ["listen", "connect", "write"])
def test_e1_20_family_that_does_not_fit_the_address_is_an_error_at_the_call(keep, call):
    channel = keep(Datagram(family=AF_INET6))
    with pytest.raises(InvalidAddressFormatError, match=r"127\.0\.0\.1:4040 is IPv4, and the channel is IPv6"):
        channel.write(b"x", ("127.0.0.1", 4040)) if call == "write" else getattr(channel, call)(("127.0.0.1", 4040))
    assert channel.socket is None


@pytest.mark.parametrize("wrong", [77, "IPv4", socket.AF_INET6 + 1000, SOCK_DGRAM + 90])
def test_family_that_is_none_is_a_value_error(wrong):
    with pytest.raises(ValueError, match="family="):
        Datagram(family=wrong)


@needs_ipv6
@pytest.mark.parametrize("call", ["listen", "connect", "write"])
def test_e1_20_family_chooses_among_the_addresses_of_a_name(keep, peer, names, call):
    names["both.test"] = ["127.0.0.1", "::1"]
    one = peer(LOCAL6)
    channel = keep(Datagram(family=AF_INET6))
    port = one.address[1]
    if call == "listen":
        assert channel.listen(("both.test", 0)).local_address[0] == "::1"
        return
    if call == "write":
        channel.write(b"x", ("both.test", port))
    else:
        channel.connect("both.test", port).write(b"x")
    data, sender = one.receive()
    assert (data, sender[0]) == (b"x", "::1")


@needs_ipv6
def test_ipv6_and_ipv4_do_not_mix_and_the_error_is_at_the_call(listening, peer):
    for address, other in ((LOCAL, ("::1", 4040)), (LOCAL6, ("127.0.0.1", 4040)), (LOCAL6, "/tmp/path"), (LOCAL, ("fe80::1%lo", 9))):
        channel = listening(Echo, address)
        with pytest.raises(ValueError, match="make another Datagram for it"):
            channel.write(b"x", other)
        with pytest.raises(ValueError, match="make another Datagram for it"):
            channel.connect(other)
        one = peer(address)
        one.send(b"still there", channel)
        assert one.read() == [b"still there"]


@needs_ipv6
def test_ipv6_any_does_not_take_ipv4_too(listening, peer):
    channel = listening(Echo, ("::", 0))
    assert listening(Echo, ("0.0.0.0", channel.local_address[1])).listening


# ---- reading


def test_e1_20_packets_that_arrive_together_are_each_an_on_read_of_their_own(listening, peer, recorder):
    channel = listening(recording(recorder, "on_read"))
    one = peer()
    for data in (b"one", b"two", b"", b"three"):
        one.send(data, channel)
    assert recorder.wait_for(4) == [("on_read", b"one"), ("on_read", b"two"), ("on_read", b""), ("on_read", b"three")]


def test_e1_20_empty_packets_go_both_ways_and_end_nothing(listening, peer):
    channel = listening(Echo)
    one = peer()
    for data in (b"", b"x", b"", b""):
        one.send(data, channel)
    assert one.read(4) == [b"", b"x", b"", b""]


def test_s4_30_one_datagram_talks_to_many_peers_each_in_order(listening, peer):
    """A burst from several senders, all of it waiting when the hub looks: none merged, none cut, and few wake-ups for many packets."""
    senders, seen, hub_turns = {}, [], []

    class Burst(Datagram):
        def on_read(self, data):
            seen.append((self.remote_address, data))
            hub_turns.append(turn[0])
            self.write(data[:4])

    channel = listening(Burst)
    turn = [0]
    count = Engine.instance().loop(lambda: turn.__setitem__(0, turn[0] + 1))
    try:
        peers = [peer() for _ in range(10)]
        for number in range(20):
            for one in peers:
                one.send(b"%04d" % number + b"x" * number, channel)
                senders.setdefault(one.address, []).append(b"%04d" % number + b"x" * number)
        until(lambda: len(seen) == 200)
    finally:
        count()
    for address, sent in senders.items():
        assert [data for sender, data in seen if sender == address] == sent
    assert len(set(hub_turns)) <= 20
    for one in peers:
        assert one.waiting() == [b"%04d" % number for number in range(20)]


@pytest.mark.parametrize(("address", "most"), [(LOCAL, 65507), pytest.param(LOCAL6, 65527, marks=needs_ipv6)])
def test_largest_packet_goes_whole_and_one_byte_more_is_an_error_at_the_call(listening, peer, recorder, address, most):
    channel = listening(recording(recorder, "on_read", "on_write", "on_write_error"), address)
    one = peer(address)
    data = os.urandom(most)
    one.send(data, channel)
    recorder.wait_for(("on_read", data))
    channel.write(data, one.address)
    assert one.read() == [data]
    recorder.wait_for("on_write")
    for wrong in (OSError, ValueError, DatagramTooLong):
        with pytest.raises(wrong, match=rf"{most + 1} bytes; a packet has at most {most} bytes") as caught:
            channel.write(data + b"x", one.address)
    assert caught.value.errno == errno.EMSGSIZE
    turns()
    assert recorder.names() == ["on_read", "on_write"]
    assert unsent(channel) == 0


def test_on_read_that_blocks_lets_packets_wait_and_others_go_on(listening, peer):
    go_on, seen, blocked = Event(), [], Event()

    class Blocks(Datagram):
        def on_read(self, data):
            seen.append(data)
            if data == b"block":
                blocked.set()
                go_on.wait()

    channel = listening(Blocks)
    other = listening(Echo)
    one = peer()
    for data in (b"block", b"later", b"last"):
        one.send(data, channel)
    blocked.wait()
    one.send(b"hello", other)
    assert one.read() == [b"hello"]
    assert seen == [b"block"]
    go_on.set()
    until(lambda: seen == [b"block", b"later", b"last"])


def test_on_read_that_raises_costs_the_packet_and_not_the_channel(listening, peer, recorder, caplog):
    class Raises(recording(recorder, "on_close")):
        def on_read(self, data):
            if data == b"bad":
                raise KeyError(data)
            self.write(data)

    channel = listening(Raises)
    one = peer()
    for data in (b"bad", b"good", b"bad", b"better"):
        one.send(data, channel)
    assert one.read(2) == [b"good", b"better"]
    found = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.name for record in found] == ["pants_green.datagram"] * 2
    assert "on_read raised KeyError(b'bad')" in found[0].getMessage()
    assert found[0].peer == one.address
    assert channel.listening
    assert recorder == []


def test_on_error_of_ones_own_gets_it_and_may_close(listening, peer, recorder):
    class Raises(recording(recorder, "on_close")):
        def on_read(self, data):
            raise KeyError(data)

        def on_error(self, exception):
            recorder(type(exception), self.remote_address)
            self.close()

    one = peer()
    one.send(b"x", listening(Raises))
    assert recorder.wait_for("on_close") == [(KeyError, one.address), ("on_close",)]


@pytest.mark.parametrize("escaping", [gevent.Timeout, gevent.GreenletExit])
def test_timeout_that_escapes_a_callback_closes_the_channel(listening, peer, recorder, escaping):
    class Escapes(recording(recorder, "on_error", "on_close")):
        def on_read(self, data):
            raise escaping()

    channel = listening(Escapes)
    peer().send(b"x", channel)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_error", "on_close"]
    assert channel.close_reason is CloseReason.CALLBACK_ERROR
    assert type(channel.close_error) is escaping


def test_timeout_that_fires_in_the_wait_for_packets_closes_the_channel(listening, peer, recorder):
    class Late(recording(recorder, "on_close")):
        def on_read(self, data):
            gevent.Timeout(0.001).start()

    channel = listening(Late)
    peer().send(b"x", channel)
    recorder.wait_for("on_close")
    assert channel.close_reason is CloseReason.CALLBACK_ERROR


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupt_in_on_read_ends_start_and_the_channel(listening, peer, recorder, error):
    class Interrupts(recording(recorder, "on_close")):
        def on_read(self, data):
            raise error

    channel = listening(Interrupts)
    peer().send(b"x", channel)
    with pytest.raises(error):
        Engine.instance().start()
    recorder.wait_for("on_close")
    assert channel.closed


def test_remote_address_is_the_senders_in_on_read_and_none_outside(listening, peer, recorder):
    class Tells(Datagram):
        def on_read(self, data):
            recorder("on_read", self.remote_address)
            self.write(data)
            if data == b"close":
                self.close()
                recorder("closed", self.remote_address)

        def on_write(self):
            recorder("on_write", self.remote_address)

        def on_close(self):
            recorder("on_close", self.remote_address)

    channel = listening(Tells)
    one, other = peer(), peer()
    one.send(b"x", channel)
    recorder.wait_for("on_write")
    assert channel.remote_address is None
    other.send(b"close", channel)
    recorder.wait_for("on_close")
    at_end = [("on_read", other.address), ("closed", other.address), ("on_close", None)]
    assert recorder == [("on_read", one.address), ("on_write", None), *at_end]


def test_posted_callbacks_between_two_packets_have_no_sender(listening, peer, recorder):
    class Tells(Datagram):
        def on_read(self, data):
            self.write(data)

        def on_write(self):
            try:
                self.write(b"to whom?")
            except ChannelStateError:
                recorder("nobody", self.remote_address)

    channel = listening(Tells)
    one = peer()
    for _ in range(3):
        one.send(b"x", channel)
    recorder.wait_for(3)
    turns()
    assert set(recorder) == {("nobody", None)}
    assert set(one.waiting()) == {b"x"}


@pytest.mark.parametrize("how", ["on_read", "on_write too", "on_read_error"])
def test_a_channel_that_has_much_to_do_lets_the_others_have_their_turn(keep, listening, peer, how):
    seen = []

    class Busy(Datagram):
        def on_read(self, data):
            seen.append(data)
            one.send(data, self)  # there is always another
            self.write(b"")

        def on_read_error(self, exception):
            seen.append(exception)
            self.write(b"try again")

    if how == "on_write too":
        Busy.on_write = lambda self: None
    one, other, gone = peer(), peer(), peer()
    echo = listening(Echo)
    if how == "on_read_error":
        busy = keep(Busy()).connect(gone.leave())
        busy.write(b"")
    else:
        busy = listening(Busy)
        one.send(b"again", busy)
    for _ in range(3):
        other.send(b"hello", echo)
        assert other.read() == [b"hello"]
    assert len(seen) > 50
    busy.close()


def test_close_when_the_turn_is_over_is_the_end(listening, peer, recorder, monkeypatch):
    monkeypatch.setattr("pants_green.datagram.TURN", 0)

    class Closes(recording(recorder, "on_close")):
        count = 0

        def on_read(self, data):
            self.count += 1
            if self.count == 16:
                self.close()

    channel = listening(Closes)
    one = peer()
    for _ in range(20):
        one.send(b"x", channel)
    recorder.wait_for("on_close")
    assert channel.count == 16


def test_on_read_set_on_the_instance_and_rebound_meanwhile(listening, peer, recorder):
    channel = listening()
    one = peer()

    def first(data):
        recorder("first", data)
        channel.on_read = lambda data: recorder("second", data)

    channel.on_read = first
    for data in (b"1", b"2"):
        one.send(data, channel)
    assert recorder.wait_for(2) == [("first", b"1"), ("second", b"2")]
    del channel.on_read


def test_handle_read_the_oldest_name_gets_packets_too(listening, peer, recorder):
    class Oldest(Datagram):
        def handle_read(self, data):
            recorder(data)

        def handle_close(self):
            recorder("closed")

    channel = listening(Oldest)
    peer().send(b"x", channel)
    recorder.wait_for(1)
    channel.close()
    assert recorder.wait_for(2) == [b"x", "closed"]


# ---- delimiters


@pytest.mark.parametrize(
    ("attributes", "packet", "chunks"),
    [
        ({"read_delimiter": b"\n"}, b"one\ntwo\n", [b"one", b"two"]),
        ({"read_delimiter": b"\n"}, b"one\ntwo", [b"one", b"two"]),
        ({"read_delimiter": b"\n"}, b"\n\n", [b"", b""]),
        ({"read_delimiter": b"\n"}, b"", []),
        ({"read_delimiter": "é"}, "aébé".encode(), [b"a", b"b"]),
        ({"read_delimiter": 3}, b"abcdef", [b"abc", b"def"]),
        ({"read_delimiter": re.compile(rb"[,;] *")}, b"a, b;c", [b"a", b"b", b"c"]),
        ({"read_delimiter": re.compile(rb"(,|;)")}, b"a,b;", [b"a", b"b"]),
        ({"read_delimiter": re.compile(rb";(?=b)")}, b"a;b", [b"a", b"b"]),
        ({"read_delimiter": Struct("!HB")}, b"\0\1\2\0\3\4", [(1, 2), (3, 4)]),
        ({"read_delimiter": Struct("!H")}, b"\0\7", [(7,)]),
        ({"read_delimiter": LengthPrefix("!H")}, b"\0\1a\0\2bc", [b"a", b"bc"]),
        ({"encoding": "utf-8"}, "grüß".encode(), ["grüß"]),
        ({"encoding": "utf-8"}, b"", [""]),
        ({"encoding": "utf-16"}, "ab".encode("utf-16"), ["ab"]),
        ({"encoding": "utf-8", "read_delimiter": "\n"}, "ä\nö".encode(), ["ä", "ö"]),
        ({"encoding": "utf-8", "read_delimiter": re.compile(" +")}, "ä  ö ".encode(), ["ä", "ö"]),
        ({"encoding": "utf-8", "read_delimiter": 2}, "äö".encode(), ["ä", "ö"]),
        ({"encoding": "utf-8", "read_delimiter": Struct("B")}, b"\1", [(1,)]),
    ],
    ids=repr,
)
def test_delimiter_cuts_one_packet_and_its_end_ends_the_last_chunk(listening, peer, recorder, attributes, packet, chunks):
    class Cuts(Datagram):
        def on_read(self, *data):
            recorder(data if isinstance(self.read_delimiter, Struct) else data[0])

    channel = listening(Cuts, **attributes)
    one = peer()
    for _ in range(2):
        one.send(packet, channel)
    one.send(b"" if "read_delimiter" in attributes else b"X".ljust(2, b"\0"), channel)
    until(lambda: len(recorder) >= 2 * len(chunks))
    turns(3)
    assert recorder[: 2 * len(chunks)] == chunks * 2


def test_delimiter_regex_the_other_way_gives_match_objects(listening, peer, recorder):
    channel = listening(recording(recorder, "on_read"), read_delimiter=re.compile(rb"([a-z]+)=(\d+);"), regex_search=False)
    peer().send(b"a=1;bc=23;", channel)
    recorder.wait_for(2)
    assert [match.groups() for _, match in recorder] == [(b"a", b"1"), (b"bc", b"23")]


@pytest.mark.parametrize(
    ("attributes", "packet", "good"),
    [
        ({"read_delimiter": 4}, b"abcdef", [b"abcd"]),
        ({"read_delimiter": Struct("!I")}, b"\0\0\0\1\0", [1]),
        ({"read_delimiter": LengthPrefix("!H")}, b"\0\1a\0\2b", [b"a"]),
        ({"read_delimiter": re.compile(rb"\d+;"), "regex_search": False}, b"x", []),
        ({"encoding": "utf-8"}, b"\xff\xfe", []),
        ({"encoding": "utf-8", "read_delimiter": "\n"}, b"a\n\xff\nb", ["a"]),
        ({"encoding": "utf-8", "read_delimiter": "\n"}, b"a\n\xff", ["a"]),
    ],
    ids=repr,
)
def test_packet_that_cannot_be_cut_is_on_read_error_and_nothing_of_it_is_kept(listening, peer, recorder, attributes, packet, good):
    class Cuts(Datagram):
        def on_read(self, data):
            recorder(data)

        def on_read_error(self, exception):
            recorder(type(exception), self.remote_address)

    channel = listening(Cuts, **attributes)
    one = peer()
    one.send(packet, channel)
    recorder.wait_for(lambda events: any(isinstance(event, tuple) for event in events))
    assert recorder[:-1] == good
    kind, sender = recorder[-1]
    assert issubclass(kind, ValueError)
    assert sender == one.address
    recorder.clear()
    one.send(packet, channel)
    recorder.wait_for(len(good) + 1)
    assert recorder[:-1] == good
    assert channel.listening


def test_packet_that_cannot_be_cut_is_logged_by_default(listening, peer, caplog):
    channel = listening(read_delimiter=4)
    one = peer()
    one.send(b"abcdef", channel)
    until(lambda: caplog.records)
    (record,) = caplog.records
    assert (record.levelname, record.peer, record.event) == ("WARNING", one.address, "read_error")
    assert "2 bytes are left over, of which the read_delimiter, 4, makes no chunk" in record.getMessage()


def test_delimiter_that_is_changed_takes_effect_within_the_packet(listening, peer, recorder):
    class Changes(Datagram):
        read_delimiter = b" "

        def on_read(self, data):
            recorder(data)
            self.read_delimiter = {b"two": 2, b"rest": None, b"lines": b"\n", b"words": b" "}.get(data, self.read_delimiter)

    channel = listening(Changes)
    one = peer()
    one.send(b"a two abcdef", channel)
    assert recorder.wait_for(5) == [b"a", b"two", b"ab", b"cd", b"ef"]
    recorder.clear()
    channel.read_delimiter = b" "
    one.send(b"lines a\nb\nwords\nx rest what is left", channel)
    recorder.wait_for(6)
    assert recorder == [b"lines", b"a", b"b", b"words", b"x", b"rest", b"what is left"]
    recorder.clear()
    one.send(b"the next\nas it is", channel)
    assert recorder.wait_for(1) == [b"the next\nas it is"]


@pytest.mark.parametrize("wrong", [b"", 0, -1, re.compile(b"x*"), object(), 1.5])
def test_delimiter_that_is_none_is_refused_on_class_and_instance(keep, wrong):
    with pytest.raises((TypeError, ValueError), match="read_delimiter"):
        type("Wrong", (Datagram,), {"read_delimiter": wrong})
    channel = keep(Datagram())
    with pytest.raises((TypeError, ValueError), match="read_delimiter"):
        channel.read_delimiter = wrong
    assert channel.read_delimiter is None


def test_close_in_mid_packet_delivers_nothing_more(listening, peer, recorder):
    class Closes(recording(recorder, "on_read", "on_close", read_delimiter=b"\n")):
        def on_read(self, data):
            super().on_read(data)
            self.close()

    peer().send(b"one\ntwo\n", listening(Closes))
    recorder.wait_for("on_close")
    assert recorder == [("on_read", b"one"), ("on_close",)]


# ---- writing


def test_first_write_makes_it_listen_and_on_listen_comes_first(keep, peer, recorder):
    class Asks(recording(recorder, "on_listen", "on_read", "on_write")):
        def on_listen(self):
            assert self.local_address[1]
            super().on_listen()

    channel = keep(Asks())
    one = peer()
    channel.write(b"question", one.address)
    assert channel.listening
    assert recorder == []
    data, sender = one.receive()
    assert (data, sender[1]) == (b"question", channel.local_address[1])
    one.send(b"answer", ("127.0.0.1", channel.local_address[1]))
    recorder.wait_for("on_read")
    assert recorder == [("on_listen",), ("on_write",), ("on_read", b"answer")]


@pytest.mark.parametrize(
    ("data", "sent"),
    [
        (b"bytes", b"bytes"),
        (bytearray(b"array"), b"array"),
        (memoryview(b"views")[1:], b"iews"),
        (memoryview(b"abcdef")[::2], b"ace"),
        ("tëxt", "tëxt".encode()),
        (type("Own", (bytes,), {})(b"own"), b"own"),
        ("", b""),
    ],
    ids=repr,
)
def test_write_takes_bytes_like_and_str(listening, peer, data, sent):
    one = peer()
    listening().write(data, one.address)
    assert one.read() == [sent]


def test_write_str_in_the_encoding(listening, peer):
    one = peer()
    listening(encoding="latin-1").write("é", one.address)
    assert one.read() == [b"\xe9"]


@pytest.mark.parametrize("data", [5, None, 1.5, ["x"], object()], ids=repr)
def test_e1_16_write_what_is_neither_bytes_nor_str_is_a_type_error_at_the_call(listening, peer, data):
    channel = listening()
    with pytest.raises(TypeError, match=r"write\(\) on <Datagram .* takes bytes or str"):
        channel.write(data, peer().address)


def test_write_without_address_outside_of_on_read_says_what_to_do(listening, peer, recorder):
    class Spawns(Datagram):
        def on_read(self, data):
            self.engine.callback(attempt, self)
            turns(3)  # while on_read runs the others are not in it
            recorder("on_read", self.remote_address)

    def attempt(channel):
        try:
            channel.write(b"x")
        except ChannelStateError as error:
            recorder(str(error))

    channel = listening(Spawns)
    attempt(channel)
    one = peer()
    one.send(b"x", channel)
    recorder.wait_for(3)
    assert recorder[0] == recorder[1]
    assert "where to? outside on_read" in recorder[0]
    assert "give addr=" in recorder[0]
    assert recorder[2] == ("on_read", one.address)


@pytest.mark.parametrize("how", ["in a callback", "outside"])
def test_write_on_a_closed_channel_is_refused(listening, peer, recorder, how):
    def attempt(channel, *addr):
        with pytest.raises(ChannelClosed, match="it is closed") as caught:
            channel.write(b"x", *addr)
        recorder("refused", caught.value.channel is channel)

    class Closes(Datagram):
        def on_read(self, data):
            self.close()
            if how == "in a callback":
                attempt(self)
                attempt(self, self.remote_address)

    channel = listening(Closes)
    one = peer()
    one.send(b"x", channel)
    until(lambda: channel.closed)
    attempt(channel, one.address)
    recorder.wait_for(3 if how == "in a callback" else 1)
    assert set(recorder) == {("refused", True)}
    assert one.waiting() == []


@pytest.mark.parametrize("flush", [False, True])
def test_write_in_on_read_to_another_address_and_with_flush(listening, peer, flush):
    other = peer()

    class Forwards(Datagram):
        def on_read(self, data):
            self.write(data, other.address, flush)
            self.write(b"done", flush=flush)

    one = peer()
    one.send(b"pass on", listening(Forwards))
    assert other.read() == [b"pass on"]
    assert one.read() == [b"done"]


def test_write_to_the_sender_that_is_kept_for_later(listening, peer, recorder):
    class Keeps(Datagram):
        def on_read(self, data):
            self.engine.callback(self.write, b"later", self.remote_address)

    one = peer()
    one.send(b"x", listening(Keeps))
    assert one.read() == [b"later"]


def test_on_write_is_called_once_per_burst_and_never_inside_write(listening, peer, recorder):
    channel = listening(recording(recorder, "on_write"))
    one = peer()
    for number in range(3):
        channel.write(b"%d" % number, one.address)
    assert recorder == []
    assert recorder.wait_for(1) == [("on_write",)]
    turns()
    assert len(recorder) == 1
    channel.write(b"3", one.address)
    recorder.wait_for(2)
    turns()
    assert len(recorder) == 2
    assert one.read(4) == [b"0", b"1", b"2", b"3"]


def test_on_write_set_on_the_instance_is_called_too(listening, peer, recorder):
    channel = listening()
    channel.on_write = lambda: recorder("on_write")
    channel.write(b"x", peer().address)
    recorder.wait_for("on_write")
    del channel.on_write


def test_on_write_that_writes_goes_on_turn_by_turn(listening, peer):
    one = peer()

    class Ticks(Datagram):
        count = 0

        def on_write(self):
            if self.count < 5:
                self.count += 1
                self.write(b"%d" % self.count, one.address)

    listening(Ticks).write(b"0", one.address)
    assert one.read(6) == [b"0", b"1", b"2", b"3", b"4", b"5"]


def test_address_that_cannot_be_reached_is_on_write_error_and_harms_nothing(listening, peer, recorder):
    channel = listening(recording(recorder))
    # A channel bound to the loopback interface reaches no other.
    channel.write(b"x", ("192.0.2.99", 9))
    recorder.wait_for("on_write_error")
    ((_, error),) = recorder
    assert isinstance(error, OSError)
    assert "cannot send to 192.0.2.99:9: " in str(error)
    one = peer()
    channel.write(b"y", one.address)
    assert one.read() == [b"y"]


def test_on_write_error_is_logged_by_default(listening, caplog):
    listening().write(b"x", ("192.0.2.99", 9))
    until(lambda: caplog.records)
    (record,) = caplog.records
    assert (record.levelname, record.name, record.event) == ("WARNING", "pants_green.datagram", "write_error")
    assert "cannot send to 192.0.2.99:9: " in record.getMessage()


# ---- names


NO_SUCH_NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_s4_28_write_to_a_host_name_as_the_documents_write_it(keep, peer):
    one = peer()
    channel = keep(Datagram())
    channel.write("foo", ("localhost", one.address[1]))
    data, sender = one.receive()
    assert data == b"foo"
    assert sender[1] == channel.local_address[1]
    channel.write("to this machine", ("", one.address[1]))
    assert one.read() == [b"to this machine"]


def test_write_to_a_name_waits_for_its_lookup_alone_and_keeps_the_order(listening, peer, names, recorder):
    slow = Event()
    names["slow.test"] = [slow, "127.0.0.1"]
    channel = listening(recording(recorder, "on_write"))
    one, other = peer(), peer()
    for number in range(5):
        channel.write(b"%d" % number, ("slow.test", one.address[1]))
    channel.write(b"at once", other.address)
    assert other.read() == [b"at once"]
    other.send(b"and it still reads", channel)
    turns()
    assert one.waiting() == []
    assert unsent(channel)
    slow.set()
    assert one.read(5) == [b"0", b"1", b"2", b"3", b"4"]
    assert unsent(channel) == 0
    assert recorder.names() == ["on_write"] * len(recorder)


def test_write_to_an_unknown_name_is_on_write_error(keep, peer, names, recorder):
    names["unknown.test"] = [NO_SUCH_NAME]
    channel = keep(recording(recorder, "on_write_error")())
    channel.write(b"1", ("unknown.test", 9))
    channel.write(b"2", ("unknown.test", 9))
    assert channel in Engine.instance().channels
    recorder.wait_for("on_write_error")
    ((_, error),) = recorder
    assert isinstance(error, socket.gaierror)
    assert error.errno == socket.EAI_NONAME
    assert "cannot send to unknown.test:9: Name or service not known" in str(error)
    assert channel.writes_dropped == 2
    assert unsent(channel) == 0
    assert channel not in Engine.instance().channels  # nothing is at work
    one = peer()
    channel.write(b"3", one.address)
    assert one.read() == [b"3"]


@needs_ipv6
def test_write_to_a_name_without_an_address_of_the_family_is_on_write_error(listening, names, recorder):
    names["six.test"] = ["::1"]
    channel = listening(recording(recorder, "on_write_error"))
    channel.write(b"x", ("six.test", 9))
    recorder.wait_for("on_write_error")
    assert "six.test:9: it has no IPv4 address" in str(recorder[0][1])


def test_write_to_a_name_takes_the_address_of_the_sockets_family(listening, peer, names):
    names["both.test"] = ["::1", "127.0.0.1"]
    one = peer()
    listening().write(b"x", ("both.test", one.address[1]))
    assert one.read() == [b"x"]


@pytest.mark.parametrize("call", ["listen", "connect", "write"])
def test_localhost_is_where_a_channel_that_listens_on_a_port_is(keep, names, recorder, call):
    names["localhost"] = ["::1", "127.0.0.1"]
    if call == "listen":
        assert keep(Datagram()).listen(("localhost", 0)).local_address[0] == "127.0.0.1"
        return
    port = keep(recording(recorder, "on_read")()).listen(0).local_address[1]
    channel = keep(Datagram())
    if call == "connect":
        channel.connect("localhost", port).write(b"x")
    else:
        channel.write(b"x", ("localhost", port))
    recorder.wait_for(("on_read", b"x"))


def test_write_to_a_name_of_what_is_too_long_for_its_family_is_told(listening, peer, names, recorder):
    names["four.test"] = ["127.0.0.1"]
    channel = listening(recording(recorder))
    one = peer()
    with pytest.raises(DatagramTooLong):
        channel.write(bytes(65528), ("four.test", one.address[1]))
    for data in (b"before", bytes(65527), b"behind"):
        channel.write(data, ("four.test", one.address[1]))
    assert one.read(2) == [b"before", b"behind"]
    recorder.wait_for("on_write_error")
    ((_, error),) = recorder
    assert isinstance(error, DatagramTooLong)
    assert unsent(channel) == 0


def test_write_to_a_name_where_no_socket_can_be_made_is_told(keep, names, recorder):
    names["four.test"] = ["127.0.0.1"]
    channel = keep(recording(recorder, multicast_interface="no such one")())
    channel.write(b"x", ("four.test", 9))
    recorder.wait_for("on_write_error")
    assert "no such one" in str(recorder[0][1])
    assert channel.writes_dropped == 1


@pytest.mark.parametrize("begun", [False, True])
def test_close_while_a_name_is_looked_up_drops_what_waits_for_it(keep, listening, peer, names, recorder, begun):
    slow = Event()
    names["slow.test"] = [slow, "127.0.0.1"]
    channel = (listening if begun else lambda kind: keep(kind()))(recording(recorder))
    one = peer()
    channel.write(b"x", ("slow.test", one.address[1]))
    turns(3)
    channel.close()
    assert channel not in Engine.instance().channels
    recorder.wait_for("on_close")
    slow.set()
    turns()
    assert one.waiting() == []
    assert recorder == [("on_close",)]
    assert (channel.writes_dropped, unsent(channel)) == (1, 0)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_end_while_a_name_is_looked_up_waits_for_it(keep, listening, peer, names, recorder, begun, known):
    slow = Event()
    names["slow.test"] = [slow, "127.0.0.1" if known else NO_SUCH_NAME]
    channel = (listening if begun else lambda kind: keep(kind()))(recording(recorder))
    one = peer()
    channel.write(b"x", ("slow.test", one.address[1]))
    channel.end()
    with pytest.raises(ChannelClosed, match=r"end\(\) was called"):
        channel.write(b"y", one.address)
    turns(3)
    assert recorder == []
    assert not channel.closed
    assert channel in Engine.instance().channels
    slow.set()
    recorder.wait_for("on_close")
    assert recorder.names() == (["on_close"] if known else ["on_write_error", "on_close"])
    assert one.waiting() == [b"x"] * known
    assert channel.close_reason is CloseReason.ENDED_HERE


def test_listen_while_a_name_is_looked_up(keep, peer, names):
    slow = Event()
    names["slow.test"] = [slow, "::1", "127.0.0.1"]
    channel = keep(Echo())
    one = peer()
    channel.write(b"x", ("slow.test", one.address[1]))
    channel.listen(LOCAL)
    slow.set()
    assert one.receive() == (b"x", channel.local_address)


# ---- connected mode


def test_connect_ties_it_to_one_peer(keep, peer, recorder):
    one, stranger = peer(), peer()
    channel = keep(recording(recorder, "on_listen", "on_read", "on_write")())
    assert channel.connect(one.address) is channel
    assert (channel.listening, channel.connected, channel.remote_address) == (True, True, one.address)
    assert repr(channel) == f"<RecordedDatagram listening 127.0.0.1:{channel.local_address[1]} to 127.0.0.1:{one.address[1]}>"
    channel.write(b"question")
    channel.write(b"the same", one.address)
    assert one.receive() == (b"question", channel.local_address)
    assert one.read() == [b"the same"]
    stranger.send(b"spam", channel)
    one.send(b"answer", channel)
    recorder.wait_for("on_read")
    turns()
    assert recorder == [("on_listen",), ("on_write",), ("on_read", b"answer")]
    channel.close()
    assert (channel.connected, channel.remote_address) == (False, one.address)


def test_connect_by_host_and_port_and_by_name(keep, peer, names):
    names["here.test"] = ["127.0.0.1"]
    one = peer()
    port = one.address[1]
    for arguments in (("127.0.0.1", port), ("here.test", port), (("here.test", port),)):
        channel = keep(Datagram()).connect(*arguments)
        channel.write(b"x")
        channel.write(b"y", ("here.test" if arguments[0] != "127.0.0.1" else "127.0.0.1", port))
        assert one.read(2) == [b"x", b"y"]
        assert channel.remote_address == one.address


@needs_ipv6
def test_connect_ipv6_in_any_spelling(keep, peer):
    one = peer(LOCAL6)
    channel = keep(Datagram()).connect("0:0:0:0:0:0:0:1", one.address[1])
    assert channel.remote_address == one.address
    for address in (("::1", one.address[1]), one.address, ("0:0:0:0:0:0:0:1", one.address[1])):
        channel.write(b"x", address)
        assert one.read() == [b"x"]


def test_connected_channel_sends_to_nobody_else(keep, peer):
    one, other = peer(), peer()
    channel = keep(Datagram()).connect(one.address)
    with pytest.raises(ChannelStateError, match="it is connected, and sends to nobody else; make another Datagram"):
        channel.write(b"x", other.address)
    with pytest.raises(ChannelStateError, match="it is connected already; make another Datagram"):
        channel.connect(other.address)
    with pytest.raises(ChannelStateError, match="it receives already"):
        channel.listen(LOCAL)
    assert other.waiting() == []


def test_connect_refuses_addresses_that_were_written_to_before(listening, peer):
    one, other = peer(), peer()
    channel = listening()
    channel.write(b"1", one.address)
    channel.write(b"1", other.address)
    channel.connect(one.address)
    with pytest.raises(ChannelStateError, match="sends to nobody else"):
        channel.write(b"2", other.address)
    channel.write(b"2", one.address)
    channel.write(b"3")
    assert one.read(3) == [b"1", b"2", b"3"]
    assert other.waiting() == [b"1"]


def test_connect_while_a_packet_waits_for_a_name_sends_it_there(listening, peer, names):
    slow = Event()
    names["slow.test"] = [slow, "127.0.0.1"]
    one, other = peer(), peer()
    channel = listening()
    channel.write(b"for other", ("slow.test", other.address[1]))
    channel.connect(one.address)
    channel.write(b"for one")
    slow.set()
    assert other.read() == [b"for other"]
    assert one.read() == [b"for one"]
    turns()
    assert one.waiting() == []


@pytest.mark.parametrize("where", ["outside", "in on_read"])
def test_connect_after_listen_drops_what_strangers_sent_before(keep, peer, recorder, where):
    class Connects(recording(recorder, "on_listen", "on_read")):
        def on_read(self, data):
            super().on_read(data)
            if data == b"connect":
                self.connect(self.remote_address)

    channel = keep(Connects()).listen(("", 0))
    one, stranger = peer(), peer()
    to = ("127.0.0.1", channel.local_address[1])
    if where == "in on_read":
        one.send(b"connect", to)
    stranger.send(b"spam", to)
    one.send(b"hello", to)
    stranger.send(b"spam", to)
    if where == "outside":
        channel.connect(one.address)
    recorder.wait_for(("on_read", b"hello"))
    one.send(b"again", to)
    recorder.wait_for(("on_read", b"again"))
    assert ("on_read", b"spam") not in recorder
    assert recorder.names().count("on_listen") == 1
    assert channel.local_address == to  # the kernel has chosen the interface
    assert channel.remote_address == one.address


def test_connected_channel_answers_in_on_read(keep, peer):
    one = peer()
    channel = keep(Echo()).connect(one.address)
    for data in (b"1", b"2"):
        one.send(data, channel)
    assert one.read(2) == [b"1", b"2"]


@pytest.mark.parametrize("address", [LOCAL, pytest.param(LOCAL6, marks=needs_ipv6)])
def test_connected_channel_is_told_that_nobody_listens_and_the_next_packet_is_sent(keep, peer, recorder, address):
    where = peer(address).leave()
    channel = keep(recording(recorder, "on_read_error", "on_write_error", "on_read")()).connect(where)
    channel.write(b"1")
    recorder.wait_for("on_read_error")
    ((_, error),) = recorder
    assert isinstance(error, ConnectionRefusedError)
    assert re.search(rf"\[?{re.escape(where[0])}\]?:{where[1]} does not take packets: Connection refused", str(error))
    assert channel.listening
    there = peer(where)
    channel.write(b"2")
    assert there.read() == [b"2"]
    there.send(b"3", channel)
    recorder.wait_for("on_read")
    assert recorder.names() == ["on_read_error", "on_read"]


def test_connected_channel_sends_the_packet_behind_the_error_too(keep, peer, recorder):
    """The error of an earlier packet meets the next send, which says so and has not sent."""
    where = peer().leave()
    channel = keep(recording(recorder, "on_read_error", "on_write_error", "on_write")()).connect(where)
    channel.write(b"1")
    there = peer(where)
    channel.write(b"2")  # without a turn of the hub between
    assert there.read() == [b"2"]
    recorder.wait_for(2)
    assert sorted(recorder.names()) == ["on_read_error", "on_write"]


def test_connection_refused_is_debug_by_default(keep, peer, caplog):
    where = peer().leave()
    caplog.set_level(logging.DEBUG, "pants_green")
    channel = keep(Datagram()).connect(where)
    channel.write(b"1")
    until(lambda: [record for record in caplog.records if record.event == "read_error"])
    (record,) = [record for record in caplog.records if record.event == "read_error"]
    assert record.levelno == logging.DEBUG
    assert channel.listening


# ---- broadcast


def test_broadcast_has_to_be_set(keep, peer):
    one = peer(("127.255.255.255", 0))
    address = ("127.255.255.255", one.address[1])
    channel = keep(Datagram())
    with pytest.raises(PermissionError, match=r"cannot send to 127\.255\.255\.255:\d+: .*set broadcast = True"):
        channel.write(b"x", address)
    with pytest.raises(PermissionError, match="set broadcast = True"):
        keep(Datagram()).connect(address)
    channel.broadcast = True
    channel.write(b"y", address)
    assert one.read() == [b"y"]
    channel.broadcast = False
    with pytest.raises(PermissionError):
        channel.write(b"z", address)


def test_broadcast_on_the_class_and_by_its_name(keep, listening, peer):
    one = peer(("127.255.255.255", 0))
    channel = keep(type("Loud", (Datagram,), {"broadcast": True})())
    channel.write(b"x", one.address)
    assert one.read() == [b"x"]
    with pytest.raises(PermissionError, match=r"255\.255\.255\.255:4040"):
        listening().write(b"x", ("<broadcast>", 4040))


# ---- multicast


#: The last one never leaves its interface: *source*: RFC 4291, section 2.7.
GROUP, OTHER_GROUP, GROUP6 = "239.77.1.2", "239.77.1.3", "ff01::77:12"
#: The interface for IPv6; Linux has no route for its groups to the loopback interface as a rule.
LINK = next((name for _, name in socket.if_nameindex() if multicast_works(AF_INET6, GROUP6, name)), None)

needs_multicast6 = pytest.mark.skipif(LINK is None, reason="no IPv6 multicast on any interface")


@needs_multicast
@pytest.mark.parametrize("interface", ["127.0.0.1", "lo", "number"])
def test_multicast_join_and_leave(listening, recorder, interface):
    interface = socket.if_nametoindex("lo") if interface == "number" else interface
    member = listening(recording(recorder, "on_read"), ("", 0))
    sender = listening(multicast_interface=interface)
    to = (GROUP, member.local_address[1])
    sender.write(b"too early", to)
    member.join(GROUP, interface)
    sender.write(b"hello", to)
    recorder.wait_for(("on_read", b"hello"))
    with pytest.raises(OSError, match=f"cannot join {GROUP}: it is a member already"):
        member.join(GROUP, interface)
    member.leave(GROUP, interface)
    with pytest.raises(OSError, match=f"cannot leave {GROUP}: it is no member"):
        member.leave(GROUP, interface)
    sender.write(b"too late", to)
    member.join(GROUP, interface)
    sender.write(b"back", to)
    recorder.wait_for(("on_read", b"back"))
    assert len(recorder) == 2


@needs_multicast
def test_multicast_two_members_on_one_port_both_hear_it(keep, recorder):
    kind = type("Member", (Datagram,), {"on_read": lambda self, data: recorder(self, data), "multicast_interface": "lo"})
    first = keep(kind()).listen(("", 0), reuse_address=True)
    second = keep(kind()).listen(first.local_address, reuse_address=True)
    for member in (first, second):
        member.join(GROUP, "lo")
    first.write(b"to all", (GROUP, first.local_address[1]))
    recorder.wait_for(2)
    assert set(recorder) == {(first, b"to all"), (second, b"to all")}


@needs_multicast
def test_multicast_members_of_different_groups_on_one_port_hear_each_their_own(keep, recorder):
    kind = type("Member", (Datagram,), {"on_read": lambda self, data: recorder(self, data), "multicast_interface": "lo"})
    first = keep(kind()).listen(("", 0), reuse_address=True)
    second = keep(kind()).listen(first.local_address, reuse_address=True)
    none = keep(kind()).listen(first.local_address, reuse_address=True)
    first.join(GROUP, "lo")
    second.join(OTHER_GROUP, "lo")
    none.write(b"1", (GROUP, first.local_address[1]))
    none.write(b"2", (OTHER_GROUP, first.local_address[1]))
    recorder.wait_for(2)
    turns()
    assert set(recorder) == {(first, b"1"), (second, b"2")}


@needs_multicast
def test_multicast_loop_and_ttl_are_the_sockets_too(listening, recorder):
    member = listening(recording(recorder, "on_read"), ("", 0))
    member.join(GROUP, "lo")
    sender = listening(multicast_interface="lo", multicast_loop=False, multicast_ttl=7)
    to = (GROUP, member.local_address[1])
    option = sender.socket.getsockopt
    assert option(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL) == 7
    assert option(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP) == 0
    sender.write(b"not for this machine", to)
    sender.multicast_loop = True
    sender.multicast_ttl = 0
    assert option(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL) == 0
    sender.write(b"for this machine alone", to)
    recorder.wait_for(("on_read", b"for this machine alone"))
    sender.multicast_interface = None
    assert (sender.multicast_interface, sender.multicast_ttl, sender.multicast_loop) == (None, 0, True)


@needs_multicast6
@pytest.mark.parametrize("interface", ["name", "number", "name in the group", "number in the group"])
def test_multicast_ipv6(listening, recorder, interface):
    number = socket.if_nametoindex(LINK)
    scope = {"name in the group": f"%{LINK}", "number in the group": f"%{number}"}.get(interface, "")
    given = {"name": (LINK,), "number": (number,)}.get(interface, ())
    group = GROUP6 + scope
    member = listening(recording(recorder, "on_read"), ("::", 0))
    member.join(group, *given)
    sender = listening(Datagram, ("::", 0), multicast_interface=LINK, multicast_ttl=3)
    assert sender.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS) == 3
    sender.write(b"hello", (GROUP6, member.local_address[1]))
    recorder.wait_for(("on_read", b"hello"))
    sender.write(b"by its scope", (f"{GROUP6}%{LINK}", member.local_address[1]))
    recorder.wait_for(("on_read", b"by its scope"))
    member.leave(group, *given)
    with pytest.raises(OSError, match="it is no member"):
        member.leave(group, *given)


@pytest.mark.parametrize(
    ("group", "error"),
    [
        ("127.0.0.1", "127.0.0.1 is no multicast group: these are"),
        ("example.com", "'example.com' is no multicast group"),
        (None, "None is no multicast group"),
        (1, "is no multicast group"),
        (GROUP6, "is not IPv4"),
    ],
)
def test_multicast_group_that_is_none_is_a_value_error(listening, group, error):
    channel = listening()
    for call in (channel.join, channel.leave):
        with pytest.raises(ValueError, match=error):
            call(group)


@pytest.mark.parametrize("interface", ["no such one", -1, 0, 2**40, 1.5, True, b"lo", "10.77.88.99", 10**6])
def test_multicast_interface_that_is_none_is_an_error_at_the_call(listening, keep, interface):
    channel = listening()
    with pytest.raises((ValueError, TypeError, OSError), match=re.escape(repr(interface)) + f"|{GROUP}"):
        channel.join(GROUP, interface)
    before = channel.multicast_interface
    with pytest.raises((ValueError, TypeError, OSError), match=re.escape(repr(interface))):
        channel.multicast_interface = interface
    assert channel.multicast_interface == before
    other = type("Other", (Datagram,), {})
    with pytest.raises((ValueError, TypeError, OSError), match=re.escape(repr(interface))):
        other.multicast_interface = interface
        keep(other()).listen(LOCAL)


@needs_ipv6
@pytest.mark.parametrize("interface", ["no such one", -1, 2**40, "127.0.0.1"])
def test_multicast_interface_that_ipv6_has_not_is_an_error_at_the_call(listening, interface):
    channel = listening(Datagram, LOCAL6)
    with pytest.raises((ValueError, OSError)):
        channel.join(GROUP6, interface)
    with pytest.raises((ValueError, OSError), match=re.escape(repr(interface))):
        channel.multicast_interface = interface


def test_multicast_needs_a_listening_channel_of_the_network(keep, listening, path):
    channel = keep(Datagram())
    for call in (channel.join, channel.leave):
        with pytest.raises(ChannelStateError, match=r"it does not listen; call listen"):
            call(GROUP)
    channel.close()
    with pytest.raises(ChannelStateError):
        channel.join(GROUP)
    with pytest.raises(ValueError, match="Unix sockets have no multicast groups"):
        listening(Datagram, path).join(GROUP)


# ---- Unix sockets


def test_unix_answers_go_to_the_sender_by_path_and_by_abstract_name(keep, listening, recorder, path):
    server = listening(Echo, path)
    assert os.path.exists(path)
    assert server.local_address == path
    for address in (None, f"{path}.client", f"\0{path}"):
        client = keep(recording(recorder, "on_read")())
        if address is not None and on_linux:
            client.listen(address)
        client.write(b"hello", path)
        recorder.wait_for(("on_read", b"hello"))
        assert client.local_address
        client.close()
        recorder.clear()
    server.close()
    assert os.listdir(os.path.dirname(path)) == []


def test_unix_connected_both_ways(keep, listening, recorder, path):
    server = listening(Echo, path)
    client = keep(recording(recorder, "on_read")()).connect(path)
    assert client.remote_address == path
    client.write(b"hello")
    recorder.wait_for(("on_read", b"hello"))
    assert server.listening


def test_unix_sender_without_an_address_cannot_be_answered(listening, recorder, path):
    class Tells(Datagram):
        def on_read(self, data):
            recorder(self.remote_address)
            try:
                self.write(b"answer")
            except ChannelStateError as error:
                recorder(str(error))

    channel = listening(Tells, path)
    with PlainSocket(AF_UNIX, SOCK_DGRAM) as nameless:
        nameless.sendto(b"x", path)
        recorder.wait_for(2)
    assert recorder[0] is None
    assert "for a sender without an address" in recorder[1]
    assert channel.listening


def test_unix_file_of_a_live_channel_is_in_use_and_a_stale_one_is_replaced(keep, listening, peer, path):
    first = listening(Echo, path)
    with pytest.raises(OSError, match="somebody listens there"):
        listening(Datagram, path)
    first.close()
    assert not os.path.exists(path)
    peer(path).close()  # which leaves its file behind
    assert os.path.exists(path)
    assert listening(Echo, path).listening


def test_unix_file_of_somebody_else_is_left_alone(keep, listening, peer, path):
    channel = listening(Echo, path)
    os.unlink(path)
    other = peer(path)
    channel.close()
    assert os.path.exists(path)
    other.close()
    with open(f"{path}.file", "w"):
        pass
    with pytest.raises(OSError, match="there is a regular file"):
        keep(Datagram()).listen(f"{path}.file")


@pytest.mark.parametrize("where", ["missing", "left behind", "a stream's", "too long"])
def test_unix_nobody_there_is_an_error_and_harms_nothing(listening, peer, recorder, path, where):
    target = f"{path}.{where}"
    if where == "left behind":
        peer(target).close()
    elif where == "a stream's":
        stream = PlainSocket(AF_UNIX)
        stream.bind(target)
    elif where == "too long":
        target += "x" * 200
    channel = listening(recording(recorder, base=Echo), path)
    if where == "too long":
        with pytest.raises(OSError, match="bytes, and the address of a Unix socket holds") as caught:
            channel.write(b"x", target)
        assert caught.value.errno == errno.ENAMETOOLONG
        with pytest.raises(OSError, match="bytes, and the address of a Unix socket holds"):
            Datagram().connect(target)
    else:
        channel.write(b"x", target)
        recorder.wait_for("on_write_error")
        assert f"cannot send to {target}: " in str(recorder[0][1])
        with pytest.raises(OSError, match=f"cannot connect to {target}: "):
            Datagram().connect(target)
    if where == "a stream's":
        stream.close()
    one = peer(f"{path}.peer")
    one.send(b"hello", channel)
    assert one.read() == [b"hello"]
    assert channel.listening


@pytest.mark.parametrize("size", [200_000, 3_000_000])
def test_unix_large_packets_are_not_cut(listening, peer, recorder, path, size):
    channel = listening(recording(recorder, "on_read", base=Echo), path)
    one = peer(f"{path}.peer", bufsize=2 * size)
    if one.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < size + 1000:
        pytest.skip("this machine does not let us send so much")
    channel.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * size)
    data = os.urandom(1000) * (size // 1000)
    for packet in (data, b""):
        one.send(packet, channel)
        assert one.read() == [packet]
    assert [event[1] for event in recorder] == [data, b""]


def test_unix_packet_for_which_no_send_buffer_has_room_is_an_error_at_the_call(listening, peer, path):
    channel = listening(Datagram, path)
    with pytest.raises(DatagramTooLong, match="send buffer"):
        channel.write(bytes(20_000_000), peer(f"{path}.peer").address)


def fill(channel, *address):
    """Write numbered packets until one has to wait; return their number."""
    number = 0
    while not unsent(channel):
        channel.write(b"%d" % number, *address)
        number += 1
        assert number < 100_000
    return number


@pytest.mark.parametrize("connected", [False, True])
def test_unix_receiver_that_is_full_is_waited_for_in_order(keep, listening, peer, recorder, path, connected):
    channel = listening(recording(recorder, "on_write"), f"{path}.own")
    one = peer(path)
    if connected:
        channel.connect(path)
    where = () if connected else (path,)
    recorder.clear()
    number = fill(channel, *where)
    for more in range(number, number + 5):
        channel.write(b"%d" % more, *where)
    before = len(recorder)
    turns()
    assert len(recorder) - before <= 1  # that of the packets which went
    told = len(recorder)
    assert one.read(number + 5) == [b"%d" % count for count in range(number + 5)]
    until(lambda: len(recorder) > told)
    assert unsent(channel) == 0
    channel.write(b"at once", *where)
    assert one.waiting() == [b"at once"]


def test_unix_receiver_that_is_full_costs_no_time_and_holds_nobody_up(listening, peer, recorder, path):
    channel = listening(Datagram, path)
    stuck, other = peer(f"{path}.stuck"), peer(f"{path}.other")
    number = fill(channel, stuck.address)
    for more in range(number, number + 3):
        channel.write(b"%d" % more, stuck.address)
    tries, send = [], channel._sendto
    channel._sendto = lambda data, to: tries.append(to) or send(data, to)
    gevent.sleep(0.15)
    assert len(tries) < 20
    channel.write(b"hello", other.address)
    assert other.waiting() == [b"hello"]  # at once
    for count in range(30):
        channel.write(b"%d" % count, other.address)  # until it is full, too
    assert other.read(30) == [b"%d" % count for count in range(30)]
    assert stuck.read(number + 3) == [b"%d" % count for count in range(number + 3)]
    until(lambda: not unsent(channel))


def test_unix_connected_peer_that_connects_elsewhere_says_so_and_the_channel_stays(keep, peer, recorder, path):
    one, other = peer(f"{path}.one"), peer(f"{path}.other")
    channel = keep(recording(recorder, "on_read_error", "on_close")()).listen(path).connect(one.address)
    for how in ("receive", "send"):
        one.socket.connect(path)
        channel.write(b"lost")
        one.socket.connect(other.address)
        if how == "send":
            one.socket.connect(path)  # else it takes nothing from us
            channel.write(b"kept")
            assert one.waiting() == [b"kept"]
        recorder.wait_for("on_read_error")
        assert isinstance(recorder.pop()[1], ConnectionResetError)
    turns()
    assert recorder == []
    assert channel.connected


def test_unix_receiver_that_leaves_while_it_is_full_is_on_write_error(listening, peer, recorder, path):
    channel = listening(recording(recorder, "on_write_error"), path)
    one = peer(f"{path}.peer")
    fill(channel, one.address)
    one.close()
    recorder.wait_for("on_write_error")
    assert isinstance(recorder[0][1], ConnectionRefusedError)
    assert unsent(channel) == 0
    assert channel.listening


# ---- the outbox


def test_outbox_is_bounded_and_what_has_no_room_is_counted(listening, peer, path, caplog):
    caplog.set_level(logging.DEBUG, "pants_green")
    channel = listening(Datagram, path, write_limit=1000)
    one = peer(f"{path}.peer")
    number = fill(channel, one.address)
    assert channel.writes_dropped == 0
    channel.write(b"x" * 500, one.address)
    for _ in range(3):
        channel.write(b"y" * 500, one.address)
    assert channel.writes_dropped == 3
    assert unsent(channel) <= 1000
    assert [record.event for record in caplog.records if record.levelno == logging.DEBUG] == ["write_dropped"] * 3
    assert one.read(number + 1)[-1] == b"x" * 500
    until(lambda: not unsent(channel))
    channel.write(b"z", one.address)
    assert one.read() == [b"z"]


def test_outbox_takes_one_packet_that_is_larger_than_its_limit(listening, peer, path):
    channel = listening(Datagram, path, write_limit=1)
    one = peer(f"{path}.peer")
    number = fill(channel, one.address)
    channel.write(b"dropped", one.address)
    assert channel.writes_dropped == 1
    assert len(one.read(number)) == number


def test_write_timeout_drops_what_waits_and_tells(listening, peer, recorder, path, caplog):
    channel = listening(recording(recorder, "on_timeout"), path, write_timeout=0.05)
    one = peer(f"{path}.peer")
    number = fill(channel, one.address)
    channel.write(b"x", one.address)
    recorder.wait_for(("on_timeout", "write"))
    assert (unsent(channel), channel.writes_dropped, channel.listening) == (0, 2, True)
    (record,) = [record for record in caplog.records if record.event == "timeout"]
    assert "nothing could be sent for write_timeout, 0.05 seconds; 2 packets were dropped" in record.getMessage()
    assert record.levelname == "WARNING"
    assert isinstance(channel._timeout_error, WriteTimeout)
    assert len(one.read(number - 1)) == number - 1
    channel.write(b"again", one.address)
    assert one.read() == [b"again"]


def test_write_timeout_set_while_packets_wait_begins_anew(listening, peer, recorder, path):
    channel = listening(recording(recorder, "on_timeout"), path, write_timeout=None)
    one = peer(f"{path}.peer")
    fill(channel, one.address)
    channel.write_timeout = 0.02
    recorder.wait_for("on_timeout")
    fill(channel, one.address)
    channel.write_timeout = None
    gevent.sleep(0.05)
    assert len(recorder) == 1
    assert unsent(channel)


def test_write_timeout_does_not_hit_while_something_goes(listening, peer, recorder, path):
    one = peer(f"{path}.peer")
    channel = listening(recording(recorder, "on_timeout"), path, write_timeout=0.15).connect(one.address)
    number = fill(channel)
    for more in range(number, number + 5):
        channel.write(b"%d" % more)
    for _ in range(5):
        gevent.sleep(0.04)
        one.read()
    assert unsent(channel)
    assert recorder == []


def test_s4_29_end_sends_what_waits_and_close_drops_it(listening, peer, recorder, path):
    for how in ("end", "close", "close with flush"):
        channel = listening(recording(recorder, "on_read", "on_close"), f"{path}.{how}")
        one = peer(f"{path}.{how} peer")
        number = fill(channel, one.address)
        channel.write(b"last", one.address)
        one.send(b"not read any more", channel)
        {"end": channel.end, "close": channel.close, "close with flush": functools.partial(channel.close, flush=True)}[how]()
        if how == "close":
            assert channel.closed
            recorder.wait_for("on_close")
            assert len(one.waiting()) == number - 1
            assert channel.writes_dropped == 2
        else:
            with pytest.raises(ChannelClosed, match=r"end\(\) was called"):
                channel.write(b"never", one.address)
            turns()
            assert not channel.closed
            assert recorder == []
            assert repr(channel).startswith("<RecordedDatagram draining ")
            assert one.read(number + 1)[-2:] == [b"%d" % (number - 1), b"last"]
            recorder.wait_for("on_close")
            assert channel.close_reason is CloseReason.ENDED_HERE
            assert channel.writes_dropped == 0
        assert recorder == [("on_close",)]
        recorder.clear()


def test_end_in_on_read_while_packets_wait_takes_no_more(listening, peer, recorder, path):
    class Ends(recording(recorder, "on_close")):
        def on_read(self, data):
            fill(self, stuck.address)
            self.end()
            for address in ((), (self.remote_address,), (stuck.address,)):
                try:
                    self.write(b"never", *address)
                except ChannelClosed as error:
                    recorder(str(error))

    stuck, one = peer(f"{path}.stuck"), peer(f"{path}.one")
    channel = listening(Ends, path)
    one.send(b"x", channel)
    recorder.wait_for(3)
    assert all("end() was called" in event for event in recorder)
    assert one.waiting() == []
    stuck.waiting()
    recorder.wait_for("on_close")


def test_end_when_the_receiver_never_reads_ends_by_write_timeout(listening, peer, recorder, path):
    channel = listening(recording(recorder, "on_timeout", "on_close"), path, write_timeout=0.03)
    fill(channel, peer(f"{path}.peer").address)
    channel.end()
    recorder.wait_for("on_close")
    assert recorder == [("on_timeout", "write"), ("on_close",)]


def test_close_while_draining_drops_the_rest(listening, peer, recorder, path):
    channel = listening(recording(recorder, "on_close"), path)
    fill(channel, peer(f"{path}.peer").address)
    channel.end()
    turns(3)
    channel.close()
    recorder.wait_for("on_close")
    assert channel.close_reason is CloseReason.CLOSED_HERE


def test_flush_tries_again_at_once(listening, peer, recorder, path):
    channel = listening(recording(recorder, "on_write"), path)
    one = peer(f"{path}.peer")
    channel.flush()
    fill(channel, one.address)
    channel.flush()
    assert unsent(channel)
    one.waiting()
    channel.flush()
    assert unsent(channel) == 0
    recorder.wait_for("on_write")
    channel.close()
    channel.flush()


class FullNow:
    """Stands for a UDP socket's send: no kernel says EAGAIN, or an error of the network, when one wants it to.

    Args:
        outcomes: what the next calls do: an exception is raised, None sends; afterwards all send.
    """

    def __init__(self, channel, *outcomes):
        self.outcomes = list(outcomes)
        self.send = channel._sendto
        channel._sendto = self

    def __call__(self, data, to):
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if outcome is not None:
            raise outcome
        return self.send(data, to)


def test_udp_outbox_keeps_the_order_and_goes_when_there_is_room(listening, peer, recorder):
    channel = listening(recording(recorder, "on_write"))
    one, other = peer(), peer()
    FullNow(channel, None, BlockingIOError(), BlockingIOError(), None, BlockingIOError(), BlockingIOError())
    for number in range(6):
        channel.write(b"%d" % number, (one if number % 2 else other).address)
    assert unsent(channel)
    assert one.read(3) == [b"1", b"3", b"5"]
    assert other.read(3) == [b"0", b"2", b"4"]
    recorder.wait_for("on_write")
    assert unsent(channel) == 0


def test_udp_error_of_an_earlier_packet_while_packets_wait_keeps_the_order(keep, peer, recorder):
    one = peer()
    channel = keep(recording(recorder, "on_read_error", "on_write_error", "on_write")()).connect(one.address)
    refused = ConnectionRefusedError(errno.ECONNREFUSED, "refused")
    FullNow(channel, BlockingIOError(), refused, BlockingIOError(), None, refused)
    for number in range(4):
        channel.write(b"%d" % number)
    assert one.read(4) == [b"0", b"1", b"2", b"3"]
    recorder.wait_for("on_write")
    assert recorder.names() == ["on_read_error", "on_read_error", "on_write"]
    assert unsent(channel) == 0


def test_udp_no_way_there_is_told_once_and_the_rest_goes(listening, peer, recorder):
    channel = listening(recording(recorder, "on_write_error"))
    one = peer()
    FullNow(channel, BlockingIOError(), OSError(errno.ENETUNREACH, "unreachable"))
    for number in range(3):
        channel.write(b"%d" % number, one.address)
    assert one.read(2) == [b"1", b"2"]
    recorder.wait_for("on_write_error")
    assert len(recorder) == 1


def test_receiving_that_fails_for_good_is_the_end(listening, recorder):
    """No kernel can be made to fail in recvfrom() in another way than by an error of the network."""
    channel = listening(recording(recorder, "on_read_error", "on_close"))

    def fails(size):
        raise OSError(errno.EIO, "broken")

    channel._recvfrom = fails
    channel.write(b"x", channel.local_address)
    recorder.wait_for("on_close")
    assert recorder.names() == ["on_read_error", "on_close"]
    assert channel.close_reason is CloseReason.IO_ERROR


def test_errors_that_nobody_hears_are_counted_from_some_on(listening, recorder):
    channel = listening(recording(recorder, "on_write_error"))
    for _ in range(150):
        channel.write(b"x", ("192.0.2.99", 9))
    assert channel.writes_dropped == 50
    recorder.wait_for(100)
    turns()
    assert len(recorder) == 100


# ---- settings


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [
        ("broadcast", True, 1),
        ("multicast_ttl", 5, 256),
        ("multicast_ttl", 0, -1),
        ("multicast_ttl", 255, "1"),
        ("multicast_ttl", 1, True),
        ("multicast_loop", False, 0),
        ("multicast_interface", "lo", 1.5),
        ("write_limit", 1, 0),
        ("write_timeout", 0.5, 0),
        ("write_timeout", None, "1"),
        ("encoding", "utf-8", "no such encoding"),
        ("read_delimiter", b"\n", b""),
        ("regex_search", False, 0),
    ],
)
def test_settings_are_checked_on_class_and_instance(keep, name, value, wrong):
    kind = type("Set", (Datagram,), {name: value})
    assert getattr(kind, name) == value
    channel = keep(kind())
    assert getattr(channel, name) == value
    with pytest.raises((TypeError, ValueError, LookupError), match=name):
        type("Wrong", (Datagram,), {name: wrong})
    with pytest.raises((TypeError, ValueError, LookupError), match=name):
        setattr(channel, name, wrong)
    assert getattr(channel, name) == value
    other = keep(Datagram())
    setattr(other, name, value)
    assert getattr(other, name) == value


# ---- sockets of the user's


def plain(family=AF_INET, bind=None, connect=None):
    made = PlainSocket(family, SOCK_DGRAM)
    if bind is not None:
        made.bind(bind)
    if connect is not None:
        made.connect(connect)
    return made


def green(family=AF_INET, bind=None, connect=None):
    made = gevent.socket.socket(family, SOCK_DGRAM)
    if bind is not None:
        made.bind(bind)
    if connect is not None:
        made.connect(connect)
    return made


both_kinds = pytest.mark.parametrize("make", [plain, green])


@both_kinds
def test_adopted_bound_socket_listens_at_once(keep, peer, recorder, make):
    channel = keep(recording(recorder, "on_listen", "on_read", base=Echo)(socket=make(bind=LOCAL)))
    assert channel.listening
    assert recorder == []
    one = peer()
    one.send(b"x", channel)
    assert one.read() == [b"x"]
    assert recorder == [("on_listen",), ("on_read", b"x")]


@both_kinds
def test_adopted_connected_socket_is_connected(keep, peer, make):
    one = peer()
    channel = keep(Echo(make(connect=one.address)))
    assert (channel.connected, channel.remote_address) == (True, one.address)
    channel.write(b"x")
    assert one.receive() == (b"x", channel.local_address)
    one.send(b"y", channel)
    assert one.read() == [b"y"]


@both_kinds
@pytest.mark.parametrize("how", ["write", "listen", "connect"])
def test_adopted_fresh_socket_is_new(keep, peer, recorder, make, how):
    one = peer()

    class Tells(Echo):
        def on_listen(self):
            recorder(self.local_address)

    channel = keep(Tells(socket=make()))
    assert not channel.listening
    if how == "listen":
        channel.listen(LOCAL)
    elif how == "connect":
        channel.connect(one.address)
    else:
        channel.write(b"x", one.address)
        assert one.receive()[1][1] == channel.local_address[1]
    recorder.wait_for(1)
    assert channel.listening
    assert recorder == [channel.local_address]
    assert channel.local_address[1]
    one.send(b"y", ("127.0.0.1", channel.local_address[1]))
    assert one.read() == [b"y"]


def test_adopted_fresh_unix_socket_gets_answers(keep, listening, recorder, path):
    listening(Echo, path)
    channel = keep(recording(recorder, "on_read")(socket=plain(AF_UNIX)))
    channel.write(b"x", path)
    recorder.wait_for(("on_read", b"x"))


def test_adopted_unix_pair(keep, recorder):
    left, right = socket.socketpair(AF_UNIX, SOCK_DGRAM)
    first = keep(Echo(left))
    second = keep(recording(recorder, "on_read")(right))
    second.write(b"hello")
    recorder.wait_for(("on_read", b"hello"))
    assert first.connected or first.listening


def test_adopted_socket_gets_the_settings_of_the_class(keep, peer):
    one = peer(("127.255.255.255", 0))
    channel = keep(type("Loud", (Datagram,), {"broadcast": True})(socket=plain()))
    channel.write(b"x", one.address)
    assert one.read() == [b"x"]


@needs_ipv6
def test_adopted_socket_of_another_family_is_refused_and_left_alone(keep):
    with plain() as sock:
        with pytest.raises(ValueError, match="family="):
            Datagram(sock, family=AF_INET6)
        assert sock.fileno() >= 0
    channel = keep(Datagram(plain()))
    with pytest.raises(InvalidAddressFormatError, match="the socket is IPv4"):
        channel.listen(LOCAL6)


@pytest.mark.parametrize("kind", ["stream", "closed", "no socket", "raw number"])
def test_adopting_what_is_no_datagram_socket_is_a_type_error(kind):
    with PlainSocket() as stream:
        closed = plain()
        closed.close()
        wrong = {"stream": stream, "closed": closed, "no socket": object(), "raw number": 5}[kind]
        with pytest.raises(TypeError, match=r"Datagram\(socket=\) takes"):
            Datagram(socket=wrong)
        assert stream.fileno() >= 0


# ---- engines, threads, forks


def test_engine_may_be_given_as_engine_or_module(keep):
    assert Datagram(engine=engine_module).engine is Datagram(engine=Engine.instance()).engine is Engine.instance()
    with pytest.raises(TypeError, match="engine="):
        Datagram(engine="main")


@pytest.mark.parametrize("call", ["listen", "connect", "write", "answer", "flush", "end", "close", "join", "leave"])
def test_use_in_another_thread_is_refused(keep, listening, peer, recorder, call):
    class Threads(Datagram):
        def on_read(self, data):
            if call == "answer":
                there(lambda: self.write(b"never", self.remote_address))
            self.write(data)

    def there(use):
        with pytest.raises(WrongThreadError):
            in_new_thread(use)
        recorder("refused")

    one = peer()
    channel = listening(Threads)
    use = {
        "listen": lambda: Datagram(engine=channel.engine).listen(LOCAL),
        "connect": lambda: channel.connect(one.address),
        "write": lambda: channel.write(b"never", one.address),
        "flush": channel.flush,
        "end": channel.end,
        "close": channel.close,
        "join": lambda: channel.join(GROUP),
        "leave": lambda: channel.leave(GROUP),
    }
    if call in use:
        there(use[call])
    one.send(b"hello", channel)
    assert one.read() == [b"hello"]
    assert recorder == ["refused"]
    assert one.waiting() == []
    assert channel.listening


def test_engine_of_another_thread_runs_its_own_datagrams():
    def life():
        one = Engine.instance()
        received = []

        class Asks(Datagram):
            def on_read(self, data):
                received.append(data)
                self.close()

            def on_close(self):
                echo.close()
                one.stop()

        echo = Echo().listen(LOCAL)
        Asks().write(b"hello", echo.local_address)
        one.start()
        turns(3)  # in which the other one has its on_close
        gevent.get_hub().destroy(destroy_loop=True)
        return received

    assert in_new_thread(life) == [b"hello"]


def test_poll_sees_packets(listening, peer, recorder):
    channel = listening(recording(recorder, "on_read"))
    one = peer()
    while Engine.instance().poll(0):
        pass
    one.send(b"x", channel)
    assert Engine.instance().poll(5) is True
    assert recorder == [("on_read", b"x")]
    assert Engine.instance().poll(0.01) is False


def test_context_variables_are_those_of_the_call_that_opened_it(keep, peer, recorder):
    import contextvars

    variable = contextvars.ContextVar("variable", default="none")

    class Tells(Datagram):
        def on_read(self, data):
            recorder(variable.get())

    channel = keep(Tells())
    contextvars.copy_context().run(lambda: (variable.set("listen"), channel.listen(LOCAL)))
    peer().send(b"x", channel)
    assert recorder.wait_for(1) == ["listen"]


FORKING = """
    import os, signal, sys
    from pants_green import Datagram, Engine

    class Talk(Datagram):
        def on_listen(self):
            say("on_listen", os.getpid() == parent)

        def on_close(self):
            say("on_close", os.getpid() == parent)

        def on_write_error(self, error):
            say("on_write_error", os.getpid() == parent)

        def on_read(self, data):
            if data == b"fork in a callback":
                child = os.fork()
                if not child:
                    signal.alarm(20)
                    try:
                        self.write(b"never")
                    except RuntimeError as error:
                        say("refused", "parent process" in str(error))
                    say("in the child", self.closed, self.fileno, os.path.exists(sys.argv[1]))
                    os._exit(0)
                say("status", os.waitpid(child, 0)[1])
            self.write(data)
            if data == b"end":
                self.end()
                Engine.instance().stop()

    def say(*words):
        os.write(1, (" ".join(map(str, words)) + "\\n").encode())

    signal.alarm(20)  # whatever happens this process ends
    parent = os.getpid()
    channel = Talk().listen(("127.0.0.1", 0))
    unix = Talk().listen(sys.argv[1])
    tied = Talk().connect(channel.local_address)  # its on_listen waits for the hub
    waits = Talk()
    waits.write(b"to a name", ("localhost", 9))
    child = os.fork()
    if not child:
        signal.alarm(20)
        engine = Engine.instance()
        say("child", [one.closed for one in (channel, unix, tied, waits)], str(channel.close_reason), engine.channels)
        own = Talk().listen(("127.0.0.1", 0))
        engine.defer(0.02, engine.stop)
        engine.start()
        own.close()
        say("child ends", os.path.exists(sys.argv[1]))
        os._exit(0)
    say("status", os.waitpid(child, 0)[1])
    say("port", channel.local_address[1])
    Engine.instance().start()
    unix.close()
    say("parent ends", os.path.exists(sys.argv[1]))
"""


def test_fork_leaves_datagrams_and_their_files_to_the_parent(peer, path):
    # A resolver's thread runs, of which newer Pythons warn.
    with Child("-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(FORKING), path) as program:
        one = peer()
        address = ("127.0.0.1", program.port())
        for data in (b"hello", b"fork in a callback", b"end"):
            one.send(data, address)
            assert one.receive() == (data, address)
        assert program.end() == 0
        lines = program.output.splitlines()
        assert program.error_output() == ""
    closed = "the connection belongs to the parent process"
    assert lines[:3] == ["on_listen True", "on_listen True", f"child [True, True, True, True] {closed} []"]
    # The one that the child made, and nothing of those that it has from the parent.
    assert lines[3:6] == ["on_listen False", "child ends True", "status 0"]
    assert "refused True" in lines
    assert "in the child True None True" in lines
    assert lines[-1] == "parent ends False"
    assert lines.count("on_close False") == 0


# ---- what is left


FATES = ["echoed", "refused", "unknown name", "full", "timed out", "too long", "forbidden", "raised", "bad packet", "connected"]


@pytest.mark.parametrize("what", FATES)
def test_closed_channel_is_freed_at_once(peer, names, path, recorder, caplog, what):
    """By its reference count alone: whoever makes many of them does not wait for the garbage collector."""
    names["unknown.test"] = [NO_SUCH_NAME]
    one = peer(path if what in ("full", "timed out") else LOCAL)

    class Busy(Datagram):
        read_delimiter = 4 if what == "bad packet" else None

        def on_read(self, data):
            if what == "raised":
                raise KeyError(data)
            self.write(data)

        def on_error(self, exception):
            recorder("done")

        def on_read_error(self, exception):
            recorder("done")

        def on_write_error(self, exception):
            recorder("done")

        def on_timeout(self, which):
            recorder("done")

        def on_close(self):
            recorder("closed")

    channel = Busy()
    if what == "unknown name":
        channel.write(b"x", ("unknown.test", 9))
    elif what == "full":
        fill(channel.listen(f"{path}.own"), path)
        recorder("done")
    elif what == "timed out":
        channel.write_timeout = 0.01
        fill(channel.listen(f"{path}.own"), path)
    elif what in ("refused", "connected"):
        channel.connect(one.address)
        if what == "refused":
            one.close()
        channel.write(b"1")
        try:
            channel.write(b"2")
        finally:
            recorder("done" if what == "connected" else "written")
    elif what == "forbidden":
        with pytest.raises(PermissionError):
            channel.write(b"x", ("127.255.255.255", 9))
        recorder("done")
    elif what == "too long":
        with pytest.raises(DatagramTooLong):
            channel.listen(LOCAL).write(bytes(70000), one.address)
        recorder("done")
    else:
        one.send(b"hello", channel.listen(LOCAL))
        if what == "echoed":
            recorder("done" if one.read() == [b"hello"] else "not echoed")
    recorder.wait_for("done")
    channel.close()
    recorder.wait_for("closed")
    turns(2)
    caplog.clear()
    caplog.get_records("call").clear()
    gone = weakref.ref(channel)
    gc.disable()
    try:
        del channel
        turns(2)
        assert gone() is None
    finally:
        gc.enable()


def test_e1_20_nothing_is_kept_for_each_peer(listening):
    channel = listening()
    for port in range(1, 2000):
        channel.write(b"", ("127.0.0.1", port))
    assert len(channel._known) <= 1024


def test_on_close_that_raises_is_logged_and_ends_there(listening, caplog):
    def on_close():
        raise KeyError("too late")

    channel = listening()
    channel.on_close = on_close
    channel.close()
    until(lambda: caplog.records)
    assert "on_close raised KeyError('too late')" in caplog.text
    del channel.on_close


def test_listening_is_logged(keep, caplog):
    caplog.set_level(logging.INFO, "pants_green")
    channel = keep(Datagram()).listen(LOCAL)
    (record,) = caplog.records
    assert (record.levelname, record.name, record.event, record.channel) == ("INFO", "pants_green.datagram", "listen", channel)


# ---- real peers


def needs_program(name):
    return pytest.mark.skipif(shutil.which(name) is None, reason=f"needs {name}")


# gevent's subprocess forks, and what becomes of it here is exec at once.
many_threads = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def answer_of(*command):
    """Give a program a line of input and return the first line of its output."""
    pipes = {"stdin": gevent.subprocess.PIPE, "stdout": gevent.subprocess.PIPE}
    with gevent.subprocess.Popen([*map(str, command)], **pipes) as process:
        try:
            process.stdin.write(b"hello\n")
            process.stdin.flush()
            return process.stdout.readline()
        finally:
            process.kill()


@many_threads
@needs_program("nc")
@pytest.mark.parametrize("address", [LOCAL, pytest.param(LOCAL6, marks=needs_ipv6)])
def test_nc_is_echoed(listening, address):
    channel = listening(Echo, address)
    host, port = channel.local_address[:2]
    assert answer_of("nc", "-u", host, port) == b"hello\n"


@many_threads
@needs_program("socat")
@pytest.mark.parametrize("address", ["UDP4", "UNIX"])
def test_socat_is_echoed(listening, path, address):
    channel = listening(Echo, path if address == "UNIX" else LOCAL)
    to = f"UNIX-SENDTO:{path},bind={path}.socat" if address == "UNIX" else f"UDP4:127.0.0.1:{channel.local_address[1]}"
    assert answer_of("socat", "-", to) == b"hello\n"
