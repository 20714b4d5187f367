"""Every promise of the old documents, and every defect of the old library, has a test that carries its number in its name.

The documents are five: S0 the oldest tutorial, S1 the first core manual, S2 the reference of servers, S3 the user guide, S4 the guide
to channels; E1 is the list of what the old library did wrong. ``test_s2_13_...`` tests the thirteenth promise of S2.
"""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest
from children import ROOT

import pants_green

#: How many promises each document makes; they are numbered from 1 on.
PROMISES = {"s0": 13, "s1": 12, "s2": 40, "s3": 26, "s4": 31, "e1": 24}

IDS = [f"{document}_{number}" for document, count in PROMISES.items() for number in range(1, count + 1)]

#: An id in the name of a test, of which one may carry several: test_s4_8_s4_25_...
CARRIED = re.compile(r"(?<=_)([se]\d_\d+)(?=_|$)")


def carried():
    """Return the names of all test functions under each id that they carry."""
    found = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for one in CARRIED.findall(node.name):
                    found.setdefault(one, []).append(f"{path.name}::{node.name}")
    return found


TESTS = carried()


@pytest.mark.parametrize("document", PROMISES)
def test_every_promise_has_its_test(document):
    assert [one for one in IDS if one.startswith(document) and one not in TESTS] == []


def test_no_test_carries_a_number_that_no_promise_has():
    assert {one: tests for one, tests in TESTS.items() if one not in IDS} == {}


# ---- promises that have no other place


def test_s3_4_is_installed_under_its_name_and_runs_from_a_checkout(tmp_path):
    assert importlib.metadata.version("pants_green") == pants_green.__version__
    program = "import sys; sys.path.insert(0, sys.argv[1]); import pants_green; print(pants_green.__file__)"
    done = subprocess.run([sys.executable, "-c", program, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, timeout=25, check=True)
    assert pathlib.Path(done.stdout.strip()).parent == ROOT / "pants_green"
