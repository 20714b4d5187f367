"""The peers of the TLS tests that are processes of their own: the standard library's ssl and asyncio, and peers that misbehave.

    python tls_load_peers.py blocking|asynchronous|mixed|hold|churn|push AUTHORITY PORT [ARGUMENT ...]
    python tls_load_peers.py serve CERTIFICATE KEY VERSION MANNERS

One JSON line on stdout for everything that has happened, as ``load_peers.py``, on which it stands.
"""

import asyncio
import concurrent.futures
import functools
import hashlib
import os
import resource
import select
import signal
import socket
import ssl
import sys

from load_peers import LAST_RESORT, LINES_IN_A_BLOCK, RESET, TIMEOUT, connected, exactly, number_or_word, numbered_lines, say, to_end

#: What no server may ever take for something that was said.
POISON = b"this was said without TLS\n" * 4


@functools.cache
def context_of(authority, version=None):
    context = ssl.create_default_context(cafile=authority)
    if version is not None:
        context.minimum_version = context.maximum_version = {1.2: ssl.TLSVersion.TLSv1_2, 1.3: ssl.TLSVersion.TLSv1_3}[version]
    return context


def secured(authority, port, version=None):
    sock = context_of(authority, version).wrap_socket(connected(port), server_hostname="localhost")
    sock.settimeout(TIMEOUT)
    return sock


def blob_of(size):
    """Return bytes of which no part looks like another."""
    return b"".join(hashlib.sha256(b"%d" % number).digest() * 64 for number in range(size // 2048))


# ---- honest ones


def blocking(authority, port, version, size):
    """Have so many bytes echoed by way of a blocking SSLSocket, and take leave in both directions."""
    sock = secured(authority, port, version)
    blob = blob_of(size)
    # Piece by piece: the two sides would wait for each other if neither read.
    same = True
    for start in range(0, len(blob), 65536):
        piece = blob[start : start + 65536]
        sock.sendall(piece)
        same = same and exactly(sock, len(piece)) == piece
    spoken = sock.version()
    plain = sock.unwrap()  # sends the goodbye, and waits for the other side's
    say(same=same, version=spoken, rest=len(plain.recv(100)))


async def talk(authority, port, version, size):
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context_of(authority, version), server_hostname="localhost")
    blob = blob_of(size)

    async def send():
        for start in range(0, len(blob), 100_000):
            writer.write(blob[start : start + 100_000])
            await writer.drain()

    sending = asyncio.ensure_future(send())
    same = await reader.readexactly(len(blob)) == blob
    await sending
    version = writer.get_extra_info("ssl_object").version()
    writer.close()
    await writer.wait_closed()
    say(same=same, version=version)


def asynchronous(authority, port, version, size):
    """Have so many bytes echoed by way of asyncio, reading while it writes."""
    asyncio.run(asyncio.wait_for(talk(authority, port, version, size), TIMEOUT))


def serve(certificate, key, version, manners):
    """Echo one connection by way of a blocking SSLSocket.

    Manners: "waits" for the client's goodbye, and says its own; "leaves" with a goodbye after the first bytes; "truncates" then.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    context.minimum_version = context.maximum_version = {1.2: ssl.TLSVersion.TLSv1_2, 1.3: ssl.TLSVersion.TLSv1_3}[version]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT)
        say(port=listener.getsockname()[1])
        plain, _ = listener.accept()
    plain.settimeout(TIMEOUT)
    sock = context.wrap_socket(plain, server_side=True)
    received = 0
    truncated = False
    while True:
        try:
            data = sock.recv(65536)
        except ssl.SSLEOFError:
            truncated = True
            break
        received += len(data)
        if not data:
            break
        sock.sendall(data)
        if manners != "waits":
            break
    if manners == "truncates":
        socket.socket.shutdown(sock, socket.SHUT_WR)
    else:
        sock.unwrap()
    say(received=received, truncated=truncated)


# ---- those who misbehave


def hello():
    """Return the first message of an honest client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(incoming, outgoing, server_hostname="localhost")
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read()


def record(content, kind=22):
    return bytes([kind, 3, 1]) + len(content).to_bytes(2) + content


def quietly_to_end(sock):
    try:
        to_end(sock)
    except OSError:
        pass


def garbage(sock):
    # A zero first: one in 400 of all random beginnings announces a record that a server has to wait for.
    sock.sendall(bytes(2) + os.urandom(600))
    quietly_to_end(sock)


def plain_text(sock):
    sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + POISON)
    quietly_to_end(sock)


def short_record(sock):
    sock.sendall(bytes([22, 3, 1]) + (16384).to_bytes(2) + POISON)
    sock.shutdown(socket.SHUT_WR)
    quietly_to_end(sock)


def reset_in_mid_handshake(sock):
    sock.sendall(hello())
    sock.recv(1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def plain_text_and_away(sock):
    sock.sendall(POISON)


def reset_after_plain_text(sock):
    sock.sendall(POISON)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def half_a_hello(sock):
    message = hello()
    sock.sendall(message[: len(message) // 2])
    sock.shutdown(socket.SHUT_WR)
    quietly_to_end(sock)


def announced_16_mib(sock):
    """Announce a handshake message of 16 MiB, and send the first part of it."""
    sock.sendall(record(b"\x01\xff\xff\xff" + bytes(8000)))
    try:
        for _ in range(8):
            sock.sendall(record(bytes(16000)))
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        return
    quietly_to_end(sock)


def hello_and_plain_text(sock):
    sock.sendall(hello() + record(POISON, 23) + POISON)
    quietly_to_end(sock)


def plain_text_in_mid_handshake(sock):
    sock.sendall(hello())
    sock.recv(1)
    sock.sendall(POISON)
    quietly_to_end(sock)


BROKEN = [
    garbage,
    plain_text,
    short_record,
    reset_in_mid_handshake,
    plain_text_and_away,
    reset_after_plain_text,
    half_a_hello,
    announced_16_mib,
    hello_and_plain_text,
    plain_text_in_mid_handshake,
]


def good(authority, port, number):
    """Have a line echoed; tell whether it was."""
    sock = secured(authority, port)
    line = b"good %d\n" % number
    sock.sendall(line)
    right = exactly(sock, len(line)) == line
    leave(sock, number % 4)
    return right


def leave(sock, manner):
    """Leave in one of four manners: with both goodbyes, with ours, with none, or with a reset."""
    if manner == 0:
        sock = sock.unwrap()
        to_end(sock)
    elif manner == 1:
        sock.settimeout(0.0)
        try:
            sock.unwrap()
        except OSError:
            pass  # it has been sent; the other's has not come
    elif manner == 3:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


def bad(port, number):
    """Misbehave; it is all the same what comes of it."""
    sock = connected(port)
    try:
        BROKEN[number % len(BROKEN)](sock)
    except ConnectionError:
        pass
    sock.close()


def mixed(authority, port, honest, broken):
    """So many good and so many broken peers, sixteen at a time."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        bads = [pool.submit(bad, port, number) for number in range(broken // 2)]
        goods = [pool.submit(good, authority, port, number) for number in range(honest)]
        bads += [pool.submit(bad, port, number) for number in range(broken // 2, broken)]
        for one in bads:
            one.result(TIMEOUT)
        say(good=sum(one.result(TIMEOUT) for one in goods), bad=len(bads))


def hold(authority, port, count, kind):
    """So many peers that begin a handshake and do not go on, until stdin ends."""
    message = hello()
    beginnings = {
        "nothing": b"",
        "half": message[: len(message) // 2],
        "hello": message,
        "announced": record(b"\x01\xff\xff\xff" + bytes(8000)) + record(bytes(16000)),
    }
    socks = [connected(port) for _ in range(count)]
    for sock in socks:
        sock.sendall(beginnings[kind])
    if kind == "hello":
        for sock in socks:
            sock.recv(1)
    say(holding=len(socks))
    sys.stdin.read()


def churn(authority, port, cycles, at_once, manners):
    """Connect, have a line echoed, leave: with goodbye, without, with a reset, in mid-line, or by asking the server to go."""
    wrong = 0
    for begun in range(0, cycles, at_once):
        numbers = range(begun, min(begun + at_once, cycles))
        socks = [secured(authority, port, 1.2 if number % 2 else 1.3) for number in numbers]
        for number, sock in zip(numbers, socks, strict=True):
            line = b"good %d\n" % number
            sock.sendall(line)
            if exactly(sock, len(line)) != line:
                wrong += 1
            manner = number % manners
            if manner < 4:
                leave(sock, manner)
            elif manner == 4:
                sock.sendall(b"half a li")
                leave(sock, 2)
            else:
                sock.sendall(b"end\n" if manner == 5 else b"close\n")
                to_end(sock)
                sock.close()
    say(cycles=cycles, wrong=wrong)


def push(authority, port, limit, more):
    """Send up to `limit` bytes and read nothing, until it does not go on; at a line on stdin read, and send `more` bytes."""
    sock = secured(authority, port)
    sock.setblocking(False)
    blocks = numbered_lines()
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    sent, unsent, sent_digest = 0, b"", hashlib.sha256()

    def send():
        nonlocal sent, unsent
        if not unsent:
            unsent = next(blocks)
            assert len(unsent) == 16 * LINES_IN_A_BLOCK
        try:
            count = sock.send(unsent)
        except ssl.SSLWantWriteError:
            return
        sent_digest.update(unsent[:count])
        unsent = unsent[count:]
        sent += count

    while sent < limit and poll.poll(250):
        send()
    say(sent=sent)
    sys.stdin.readline()
    target = sent + more
    received, digest = 0, hashlib.sha256()
    while received < sent or sent < target:
        poll.modify(sock, select.POLLIN | (select.POLLOUT if sent < target else 0))
        if not sock.pending() and not poll.poll(TIMEOUT * 1000):
            break
        try:
            data = sock.recv(1 << 18)
        except ssl.SSLWantReadError:
            pass
        else:
            if not data:
                break
            received += len(data)
            digest.update(data)
        if sent < target:
            send()
    say(sent=sent, received=received, same=digest.digest() == sent_digest.digest())


PROGRAMS = {one.__name__: one for one in (blocking, asynchronous, serve, mixed, hold, churn, push)}

if __name__ == "__main__":
    signal.alarm(LAST_RESORT)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    name, *arguments = sys.argv[1:]
    PROGRAMS[name](*map(number_or_word, arguments))
    sys.stdout.flush()
    os._exit(0)
