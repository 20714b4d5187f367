"""The peers of the load tests: a process of plain stdlib sockets. One JSON line on stdout for everything that has happened.

    python load_peers.py crowd|churn|flood|idle|loris|trips|read|push PORT [ARGUMENT ...]

``flood``, ``idle`` and ``loris`` go on until stdin ends; the others end when they are done.
"""

import hashlib
import json
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
import time

#: Seconds for which one call may block, and after which the process ends in any case.
TIMEOUT = 15.0
LAST_RESORT = 45

RESET = struct.pack("ii", 1, 0)

#: What stands for one block of the numbered lines that `push` sends.
LINES_IN_A_BLOCK = 4096


def say(**result):
    print(json.dumps(result), flush=True)


def connected(port, rcvbuf=None):
    sock = socket.socket()
    sock.settimeout(TIMEOUT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if rcvbuf:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
    sock.connect(("127.0.0.1", port))
    return sock


def exactly(sock, size):
    data = b""
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return data


def to_end(sock):
    while sock.recv(65536):
        pass


# ---- many at once


class Client:
    """One of the crowd: sends a message, waits for the very same bytes, sends the next."""

    def __init__(self, number, port, messages):
        self.sock = connected(port)
        self.sock.setblocking(False)
        self.messages = list(messages_of(number, messages))
        self.unsent = self.expected = b""
        self.got = bytearray()

    def begin(self):
        self.unsent = self.expected = self.messages.pop(0)
        self.got.clear()
        self.send()

    def send(self):
        try:
            self.unsent = self.unsent[self.sock.send(self.unsent) :]
        except BlockingIOError:
            pass

    def receive(self):
        """Take in what came; tell whether it was what it should be so far."""
        data = self.sock.recv(65536)
        self.got += data
        return bool(data) and self.expected.startswith(self.got)

    def events(self):
        return select.POLLIN | (select.POLLOUT if self.unsent else 0)


def messages_of(number, count):
    """Yield the messages of one client: one to three lines that no other client sends; a long one now and then."""
    chance = random.Random(number)
    for turn in range(count):
        lines = []
        for line in range(chance.randint(1, 3)):
            size = 20_000 if chance.random() < 0.005 else chance.randint(0, 150)
            lines.append(b"%d.%d.%d:" % (number, turn, line) + chance.randbytes(size).hex().encode() + b"\n")
        yield b"".join(lines)


def converse(clients, least):
    """Let all of them speak at once, until `least` messages of each are left; return those that got an answer not theirs."""
    poll = select.poll()
    busy, wrong = {}, []
    for client in clients:
        client.begin()
        busy[client.sock.fileno()] = client
        poll.register(client.sock, client.events())
    while busy and (ready := poll.poll(TIMEOUT * 1000)):
        for descriptor, events in ready:
            client = busy[descriptor]
            if events & select.POLLOUT:
                client.send()
            if events & ~select.POLLOUT and not client.receive():
                wrong.append(client)
            elif len(client.got) < len(client.expected):
                poll.modify(descriptor, client.events())
                continue
            elif len(client.messages) > least:
                client.begin()
                poll.modify(descriptor, client.events())
                continue
            poll.unregister(descriptor)
            del busy[descriptor]
    return wrong + list(busy.values())


def crowd(port, count, messages):
    """Connect all, and let all speak at once; nobody leaves before everybody was answered once."""
    clients = [Client(number, port, messages) for number in range(count)]
    wrong = converse(clients, messages - 1)
    if not wrong:
        wrong = converse(clients, 0)
    say(right=count - len(wrong), wrong=[[repr(one.expected[:80]), repr(bytes(one.got[:80]))] for one in wrong[:3]])


# ---- coming and going


def churn(port, cycles, at_once, manners):
    """Connect, have a line echoed, leave: in the first so many of the seven manners in which peers leave, in turn."""
    wrong = 0
    for begun in range(0, cycles, at_once):
        numbers = range(begun, min(begun + at_once, cycles))
        socks = [connected(port) for _ in numbers]
        for number, sock in zip(numbers, socks, strict=True):
            sock.sendall(b"cycle %d\n" % number)
        for number, sock in zip(numbers, socks, strict=True):
            line = b"cycle %d\n" % number
            leave = number % manners
            if leave != 3 and exactly(sock, len(line)) != line:
                wrong += 1
            if leave == 0:  # a FIN
                pass
            elif leave == 1:  # a reset
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            elif leave == 2:  # a reset in the middle of a line
                sock.sendall(b"half a li")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            elif leave == 3:  # gone before the answer
                pass
            elif leave == 4:  # a FIN, and reading to the end
                sock.sendall(b"half a li")
                sock.shutdown(socket.SHUT_WR)
                to_end(sock)
            elif leave == 5:  # the server ends, if it speaks in lines
                sock.sendall(b"end\n")
                to_end(sock)
            elif leave == 6:  # the server closes
                sock.sendall(b"close\n")
                to_end(sock)
            sock.close()
    say(cycles=cycles, wrong=wrong)


# ---- too much, and nothing at all


def flood(port, kind):
    """Send as fast as it goes, and read what comes back as fast as it goes, until stdin ends."""
    payload = memoryview(b"x" * (256 << 10) if kind == "stream" else b"a line of the flood\n" * 8192)
    sock = connected(port)
    sock.setblocking(False)
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLOUT)
    poll.register(0, select.POLLIN)
    sent, received, said = 0, 0, False
    while True:
        ready = dict(poll.poll(TIMEOUT * 1000))
        if 0 in ready or not ready:
            break
        if ready[sock.fileno()] & select.POLLIN:
            data = sock.recv(1 << 18)
            received += len(data)
            if not data:
                break
        if ready[sock.fileno()] & select.POLLOUT:
            sent += sock.send(payload[sent % len(payload) :])
        if received > 2 << 20 and not said:
            said = True
            say(flooding=True)
    say(sent=sent, received=received)


def idle(port, count):
    """Connect, be answered once each, and then say nothing until stdin ends."""
    socks = [connected(port) for _ in range(count)]
    for sock in socks:
        sock.sendall(b"hello\n")
    answered = sum(exactly(sock, 6) == b"hello\n" for sock in socks)
    say(answered=answered)
    sys.stdin.read()


def loris(port, count):
    """Connect, be answered once each; at a line on stdin send the beginning of another line each; then nothing until stdin ends."""
    socks, answered = [], 0
    while len(socks) < count:
        # Not faster than they are accepted: a SYN for which there is no room in the backlog comes again after a second.
        some = [socket.create_connection(("127.0.0.1", port)) for _ in range(min(500, count - len(socks)))]
        for sock in some:
            sock.send(b"hello\n")
        answered += sum(sock.recv(100) == b"hello\n" for sock in some)
        socks += some
    say(answered=answered)
    sys.stdin.readline()
    for sock in socks:
        sock.send(b"half a li")
    say(begun=count)
    sys.stdin.read()


def trips(port, count):
    """Send a line and wait for it to come back, `count` times; tell how long each took."""
    sock = connected(port)
    seconds = []
    for number in range(count):
        line = b"trip %d\n" % number
        began = time.monotonic()
        sock.sendall(line)
        assert exactly(sock, len(line)) == line
        seconds.append(time.monotonic() - began)
    say(seconds=seconds)


# ---- a lot of it


def read(port, request, pause):
    """Send a line, sleep, then read to the end."""
    sock = connected(port)
    sock.sendall(request.encode() + b"\n")
    time.sleep(pause)
    digest, size = hashlib.sha256(), 0
    while data := sock.recv(1 << 20):
        digest.update(data)
        size += len(data)
    say(size=size, sha256=digest.hexdigest())


def numbered_lines():
    """Yield blocks of lines of 16 bytes, for ever."""
    number = 0
    while True:
        yield b"".join(b"%015d\n" % line for line in range(number, number + LINES_IN_A_BLOCK))
        number += LINES_IN_A_BLOCK


def push(port, limit, more):
    """Send up to `limit` bytes and read nothing, until it does not go on; at a line on stdin read, and send `more` bytes."""
    sock = connected(port)
    sock.setblocking(False)
    blocks = numbered_lines()
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    sent, unsent, sent_digest = 0, b"", hashlib.sha256()

    def send():
        nonlocal sent, unsent
        if not unsent:
            unsent = next(blocks)
        count = sock.send(unsent)
        sent_digest.update(unsent[:count])
        unsent = unsent[count:]
        sent += count

    # A quarter of a second without room for one byte is what "it does not go on" means.
    while sent < limit and poll.poll(250):
        send()
    say(sent=sent)
    sys.stdin.readline()
    target = sent + more
    received, digest = 0, hashlib.sha256()
    poll.modify(sock, select.POLLIN | select.POLLOUT)
    while received < sent or sent < target:
        ready = poll.poll(TIMEOUT * 1000)
        if not ready:
            break
        if ready[0][1] & select.POLLIN:
            data = sock.recv(1 << 18)
            if not data:
                break
            received += len(data)
            digest.update(data)
        if ready[0][1] & select.POLLOUT and sent < target:
            send()
            if sent >= target:
                poll.modify(sock, select.POLLIN)
    say(sent=sent, received=received, same=digest.digest() == sent_digest.digest())


PROGRAMS = {one.__name__: one for one in (crowd, churn, flood, idle, loris, trips, read, push)}


def number_or_word(argument):
    for kind in (int, float):
        try:
            return kind(argument)
        except ValueError:
            continue
    return argument


if __name__ == "__main__":
    signal.alarm(LAST_RESORT)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    name, *arguments = sys.argv[1:]
    PROGRAMS[name](*map(number_or_word, arguments))
    sys.stdout.flush()
    # Sockets are left to the kernel: closing thousands one by one is nobody's wish.
    os._exit(0)
