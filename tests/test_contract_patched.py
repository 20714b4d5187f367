"""The suite of every transport in patched processes: patched by gevent.monkey before anything is imported, and after.

In the process of this test it runs as it is: see ``test_contract``.
"""

import faulthandler
import math
import os
import re
import sys
import tempfile
from pathlib import Path

import gevent
import gevent.subprocess
import pytest
from gevent import monkey
from test_contract import StreamContract

HERE = Path(__file__).resolve().parent

#: What stands in front of the arguments of pytest.
WAYS = {
    "before": ["-m", "gevent.monkey", "--module", "pytest"],
    "after": [str(HERE / "patch_late.py")],
}
if monkey.is_module_patched("socket"):
    del WAYS["before"]  # that is how test_contract has run here

CLASSES = ["TestTCPServer", "TestTCPClient", "TestUnixPair", "TestTLS12Server", "TestTLS13Server", "TestTLS12UnixPair", "TestTLSClient"]

#: Seconds for which a child may run; ten times what an idle machine needs.
PATIENCE = 200.0

# gevent's subprocess forks, and what becomes of it here is exec at once.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def deadline():
    """Let the children take their time: each of their tests has a deadline of its own."""
    faulthandler.dump_traceback_later(2 * PATIENCE, exit=True, file=sys.__stderr__)


def number_of_cases():
    """Return how many tests each class has."""
    methods = [getattr(StreamContract, name) for name in dir(StreamContract) if name.startswith("test_")]
    return sum(math.prod(len(list(mark.args[1])) for mark in getattr(method, "pytestmark", [])) for method in methods)


class PatchedProcess:
    """A process that is patched in one of the WAYS and runs tests."""

    def __init__(self, way, *tests):
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 (closed in result)
        self.child = gevent.subprocess.Popen(
            [sys.executable, *WAYS[way], "-q", "-ra", "-p", "no:cacheprovider", *tests],
            stdin=gevent.subprocess.DEVNULL,
            stdout=self.output,
            stderr=gevent.subprocess.STDOUT,
            cwd=HERE.parent,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])},
        )

    def result(self):
        """Wait for it; return its exit code and what it printed."""
        try:
            code = self.child.wait(PATIENCE)
        finally:
            self.end()
        with self.output:
            self.output.seek(0)
            return code, self.output.read().decode(errors="replace")

    def end(self):
        """End it, if it has not ended."""
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()


#: The processes of the whole contract, by way, once they have begun.
BEGUN = {}


def begin():
    """Begin with the contract: in a run of the whole suite before its first test, for these processes take half a minute."""
    tests = [f"{HERE / 'test_contract.py'}::{name}" for name in CLASSES]
    for way in WAYS:
        BEGUN[way] = PatchedProcess(way, *tests)


def test_contract_in_patched_processes_every_transport_passes():
    if not BEGUN:
        begin()
    for way in list(BEGUN):
        code, text = BEGUN.pop(way).result()
        tail = f"patched {way}:\n" + "\n".join(text.splitlines()[-60:])
        assert code == 0, tail
        assert re.search(r"^(\d+) passed in", text, re.MULTILINE)[1] == str(number_of_cases() * len(CLASSES)), tail


def test_contexts_and_sni_callbacks_work_in_a_process_that_is_patched_late():
    code, text = PatchedProcess("after", str(HERE / "test_tls_server.py"), "-k", "sni or context").result()
    assert code == 0, text
    assert int(re.search(r"^(\d+) passed", text, re.MULTILINE)[1]) >= 50, text
    assert "skipped" not in text
