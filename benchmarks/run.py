"""Measures our echo server against those of its peers, side by side, and prints tables of ratios.

    python benchmarks/run.py                          all benches; some minutes
    python benchmarks/run.py --benches pp64,lines --rounds 2 --seconds 0.3

For each bench every server is started once and stays up; a load generator in C visits them in turn, in an order that rotates
from round to round, so that whatever else the machine does hits all of them alike. Servers and load have a CPU each, if there
are two. Only the ratios of one run mean anything, and of these work per CPU second is the one that repeats.

Linux only (epoll, /proc); needs a C compiler, named by CC or cc, and for TLS the headers and the command of OpenSSL. Nothing
leaves 127.0.0.1.
"""

import argparse
import contextlib
import json
import os
import resource
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
BUILD = HERE / "build"
LOAD = BUILD / "load"
TLS_LOAD = BUILD / "load-tls"
CERTIFICATE = (BUILD / "certificate.pem", BUILD / "key.pem")
OURS = "pants_green"
PEERS = ("gevent", "gevent-join", "asyncio", "uvloop")
CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


class Bench(NamedTuple):
    mode: str  # what the servers do: echo, line, tls or another mode of our server
    load: str  # the arguments of the load generator
    about: str
    fixed: bool = False  # a fixed amount of work, not a fixed time
    against: tuple[str, ...] = ()  # what to measure against, if not the peers that were asked for: peers, or modes of our own


BENCHES = {
    "pp1": Bench("echo", "pingpong -c 1 -m 64", "64 B ping-pong, 1 connection"),
    "pp64": Bench("echo", "pingpong -c 64 -m 64", "64 B ping-pong, 64 connections"),
    "pp16k": Bench("echo", "pingpong -c 16 -m 16384", "16 KiB ping-pong, 16 connections"),
    "bulk": Bench("echo", "bulk -c 4", "streaming echo, 4 connections"),
    "lines": Bench("line", "lines -c 16 -m 32 -b 100", "100 lines of 32 B at once, 16 connections"),
    "bytes64": Bench("line", "lines -c 16 -m 64 -b 100", "100 lines of 64 B at once, 16 connections"),
    "lines1": Bench("line", "lines -c 64 -m 32 -b 1", "one line of 32 B at once, 64 connections"),
    "churn": Bench("line", "churn -c 16 -m 16", "connect, one line, close; 16 at once"),
    "dribble": Bench("line", "dribble -k 4194304 -m 1448", "one line of 4 MiB in pieces of 1448 B", fixed=True),
    "idle": Bench("line", "idle -e -c 1000", "memory of 1000 idle connections (less is better)"),
    "tlspp": Bench("tls", "pingpong -T -c 16 -m 64", "TLS 64 B ping-pong, 16 connections"),
    "tlsbulk": Bench("tls", "bulk -T -c 2", "TLS streaming echo, 2 connections"),
    "int8": Bench("int8", "lines -c 16 -m 8 -b 100", "100 chunks of 8 B, int", against=("bytes8",)),
    "struct8": Bench("struct8", "lines -c 16 -m 8 -b 100", "100 chunks of 8 B, Struct", against=("bytes8",)),
    "int64": Bench("int64", "lines -c 16 -m 64 -b 100", "100 chunks of 64 B, int", against=("bytes64",)),
    "regex64": Bench("regex64", "lines -c 16 -m 64 -b 100", "100 chunks of 64 B, pattern", against=("bytes64",)),
    "change": Bench(
        "change", "lines -c 2 -m 24 -l 8 -b 2500", "2500 lines of 8 B and bodies of 16 B in turn", against=("gevent", "gevent-join")
    ),
}

#: Seconds after which a fixed amount of work has failed, and beyond its own time after which a load has.
FIXED_LIMIT = 20.0
GRACE = 20.0


class Result(NamedTuple):
    rate: float  # work per second, or bytes per idle connection
    unit: str
    per_cpu: float  # work per CPU second of the server, 0 if not measured


class Failed(Exception):
    """A server or the load did not do what it should; the text is for people."""


class Server:
    """An echo server in a process of its own, on the first CPU: ours, that of a peer, or ours in another mode, named so."""

    def __init__(self, name, mode):
        self.name = name
        self.port = free_port()
        script = [HERE / "peers.py", name, mode] if name in PEERS else [HERE / "echo_server.py", mode if name == OURS else name]
        path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
        # A file and not a pipe: nobody reads what it says there before it fails, and a full pipe would stop it.
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self.process = subprocess.Popen(
            [sys.executable, *map(str, script), str(self.port), *map(str, CERTIFICATE if mode == "tls" else ())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, "PYTHONPATH": path},
        )
        pin(self.process, 0)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def wait_until_ready(self):
        ready, _, _ = select.select([self.process.stdout], [], [], GRACE)
        if not ready or b"READY" not in self.process.stdout.readline():
            self.process.kill()
            self.process.wait()
            self.errors.seek(0)
            last_words = self.errors.read().decode().strip().splitlines() or ["it never said that it is ready"]
            raise Failed(f"{self.name} did not start: {last_words[-1]}")

    def cpu_seconds(self):
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def memory(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def pin(process, which):
    """Keep a process on the first CPU (0) or the last (-1); with only one there is nothing to choose."""
    if len(CPUS) > 1:
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(process.pid, {CPUS[which]})


def build():
    """Compile the load generator if it is older than its source."""
    source = HERE / "load.c"
    compiler = os.environ.get("CC") or "cc"
    if sys.platform != "linux":
        sys.exit("The benchmarks run on Linux only: the load generator uses epoll.")
    if is_newer(LOAD, source):
        return
    if shutil.which(compiler) is None:
        sys.exit(f"The load generator is in C, and there is no {compiler} here. Install a C compiler, or name one:  CC=clang make bench")
    BUILD.mkdir(exist_ok=True)
    subprocess.run([compiler, "-O2", "-o", str(LOAD), str(source)], check=True)


def build_for_tls():
    """Compile the load generator once more, with TLS, and make a certificate; return why that is not possible, if it is not."""
    source = HERE / "load.c"
    if not is_newer(TLS_LOAD, source):
        command = [os.environ.get("CC") or "cc", "-O2", "-DWITH_TLS", "-o", str(TLS_LOAD), str(source), "-lssl", "-lcrypto"]
        compiled = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if compiled.returncode:
            errors = [line for line in compiled.stderr.splitlines() if "error" in line or "cannot find" in line]
            trouble = errors[0] if errors else "it does not compile"
            return f"the load generator cannot be built with TLS ({trouble}). Install the headers of OpenSSL (Debian, Ubuntu: libssl-dev)"
    if not all(file.exists() for file in CERTIFICATE):
        if shutil.which("openssl") is None:
            return "there is no openssl here to make a certificate with. Install OpenSSL"
        subject = ["-days", "3650", "-subj", "/CN=localhost", "-out", str(CERTIFICATE[0]), "-keyout", str(CERTIFICATE[1])]
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject], check=True, stderr=subprocess.DEVNULL)
    return None


def is_newer(file, source):
    return file.exists() and file.stat().st_mtime > source.stat().st_mtime


def start_load(bench, port, seconds):
    command = [str(TLS_LOAD if bench.mode == "tls" else LOAD), *bench.load.split(), "-p", str(port), "-t", f"{seconds:.2f}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pin(process, -1)
    return process


def measure(server, bench, seconds):
    """Let the load visit a server once."""
    if bench.fixed:
        seconds = FIXED_LIMIT
    began = server.cpu_seconds()
    with start_load(bench, server.port, seconds) as load:
        try:
            output, _ = load.communicate(timeout=seconds + GRACE)
        except subprocess.TimeoutExpired:
            load.kill()
            raise Failed(f"{server.name}: the load did not come to an end") from None
    report = json.loads(output or '{"error": "the load generator failed"}')
    if "error" in report or report["errors"]:
        raise Failed(f"{server.name}: {report.get('error', 'connections broke or hung')}")
    return Result(report["rate"], report["unit"], report["amount"] / max(server.cpu_seconds() - began, 1e-9))


def measure_idle(server, bench):
    """Return the memory that a server takes for each idle connection; the kernel's is not counted."""
    before = server.memory()
    with start_load(bench, server.port, GRACE) as load:
        line = load.stdout.readline().decode()  # bounded: the load gives up on a server that does not answer
        time.sleep(0.5)  # for what the server does after its last answer
        after = server.memory()
        load.stdin.close()
    if not line.startswith("ESTABLISHED"):
        raise Failed(f"{server.name}: {line.strip()}")
    return Result((after - before) / int(line.split()[1]), "B/connection", 0.0)


def run_bench(name, names, rounds, seconds, complain):
    """Return the results of every server that could do this bench."""
    bench = BENCHES[name]
    results = {}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(one, bench.mode)) for one in names]

        def attempt(server, action, *arguments):
            try:
                return action(*arguments)
            except Failed as failure:
                complain(f"{name}: {failure}")
                results.pop(server.name, None)
                servers.remove(server)

        for server in list(servers):
            attempt(server, server.wait_until_ready)
        if name == "idle":
            return {server.name: [one] for server in list(servers) if (one := attempt(server, measure_idle, server, bench))}
        for server in list(servers):
            attempt(server, measure, server, bench, 0.2)  # warm
        for turn in range(rounds):
            order = servers[turn % len(servers) :] + servers[: turn % len(servers)] if servers else []
            for server in order if turn % 2 == 0 else reversed(order):
                if (one := attempt(server, measure, server, bench, seconds)) is not None:
                    results.setdefault(server.name, []).append(one)
    return results


def print_table(table, peers):
    """Print our rates and, against each of `peers`, the ratios of the medians and of the best work per CPU second."""
    width = max(len(f"{name}: {BENCHES[name].about}") for name in table)
    print(f"\n{'':{width}}  {OURS:>22}" + "".join(f"  {'/ ' + peer:>17}" for peer in peers))
    print(f"{'':{width}}  {'':>22}" + f"  {'rate':>8} {'per CPU':>8}" * len(peers))
    for name, results in table.items():
        ours = results.get(OURS)
        rate = f"{statistics.median(one.rate for one in ours):.0f} {ours[0].unit}" if ours else "-"
        line = f"{f'{name}: {BENCHES[name].about}':{width}}  {rate:>22}"
        for peer in peers:
            theirs = results.get(peer)
            rates = cpus = "-"
            if ours and theirs:
                if middle := statistics.median(one.rate for one in theirs):
                    rates = f"{statistics.median(one.rate for one in ours) / middle:.2f}"
                if best := max(one.per_cpu for one in theirs):
                    cpus = f"{max(one.per_cpu for one in ours) / best:.2f}"
            line += f"  {rates:>8} {cpus:>8}"
        print(line)


def print_tables(table, peers):
    """Print one table for the peers that were asked for, and one for each company that some benches keep to themselves."""
    for company in dict.fromkeys(BENCHES[name].against for name in table):
        print_table({name: results for name, results in table.items() if BENCHES[name].against == company}, company or peers)
    print("\nMore than 1.00: we do more, or take more memory. Only compare within one run.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benches", default=",".join(BENCHES), help="of %(default)s")
    parser.add_argument("--peers", default="gevent,asyncio,uvloop", help=f"of {','.join(PEERS)}; by default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="visits to each server; by default %(default)s")
    parser.add_argument("--seconds", type=float, default=0.8, help="length of a visit; by default %(default)s")
    options = parser.parse_args()
    benches, peers = options.benches.split(","), options.peers.split(",")
    if unknown := [one for one in benches if one not in BENCHES] + [one for one in peers if one not in PEERS]:
        parser.error(f"unknown: {', '.join(unknown)}")
    if not 1 <= options.rounds <= 100 or not 0.1 <= options.seconds <= 60:
        parser.error("--rounds is 1 to 100, --seconds 0.1 to 60")
    build()
    with_tls = [name for name in benches if BENCHES[name].mode == "tls"]
    if with_tls and (why := build_for_tls()):
        print(f"{', '.join(with_tls)}: left out, for {why}.\n", flush=True)
        benches = [name for name in benches if name not in with_tls]
        if not benches:
            sys.exit("Nothing is left to measure.")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096 if most == resource.RLIM_INFINITY else min(most, 4096), most))
    complaints, table = [], {}
    for name in benches:
        print(f"{name} ...", flush=True)
        table[name] = run_bench(name, [OURS, *(BENCHES[name].against or peers)], options.rounds, options.seconds, complaints.append)
    print_tables(table, peers)
    sys.exit("\n".join(complaints) if complaints else 0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
