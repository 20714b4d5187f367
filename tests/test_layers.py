"""The floors of the library: who may import whom, what each may know of the world, and that importing does nothing."""

import ast
import functools
import json
import pathlib
import subprocess
import sys

import pytest

import pants_green

PACKAGE = pathlib.Path(pants_green.__file__).parent

#: From the ground up: the modules of each floor, and what each may know of the outside world. A module imports from lower
#: floors only, so there are no circles. A new module needs a place here.
FLOORS = [
    {"errors": ""},
    # Pure: no socket, clock, greenlet or logger. _address and proxy_protocol take constants from socket, and paths by os.
    {"framing": "", "_outbox": "", "_lifecycle": "", "_timers": "", "_settings": "", "_address": "os socket", "_proxy_tlvs": ""},
    {"_inbox": "", "_delimiters": "", "proxy_protocol": "os socket"},
    {"_cutting": ""},
    {"_socket_file": "fcntl gevent os socket"},
    {"_buckets": "", "_networks": "", "_reports": "logging"},
    # Each outside thing has one door.
    {"_sockets": "gevent os select socket", "_tls": "ssl", "_tls_options": "os ssl"},
    {"_packets": "gevent os socket"},
    {"_adopting": "socket", "_tls_socket": "socket", "_pool": "greenlet threading", "_scheduler": "logging", "_signals": "os signal"},
    {"_drain": "logging signal"},
    {"engine": "contextvars gevent greenlet logging os threading time"},
    {"channel": "greenlet logging", "_linger": "", "_limits": "", "_meter": "", "_greeting": "greenlet"},
    {"_certificates": "logging time", "_files": "io logging os tempfile"},
    {"_callbacks": "logging", "_server_tls": "contextlib logging"},
    {"_server_proxy": "logging"},
    {"_server_limits": ""},
    {"_stopping": "gevent greenlet logging"},
    {"_datagram_state": "logging", "_stream_state": "logging", "_dialling": "os socket", "_room": "gevent greenlet logging"},
    {"_client_proxy": ""},
    {
        "_datagram_output": "contextvars logging socket",
        "_straight": "greenlet",
        "_stream_tls": "",
        "_counter": "",
        "_budget": "",
    },
    {"_stream_limits": ""},
    {"datagram": "contextvars greenlet logging socket", "stream": "contextvars greenlet logging socket"},
    {"server": "contextvars greenlet logging random socket", "client": "contextvars greenlet logging random"},
    {"network": "", "unix": "grp os pwd"},
    {"": "logging"},  # the face
    # The upper floor, which the face never imports.
    {"_question": "gevent logging"},
    {"dns": "contextvars dns greenlet logging"},
    {"testing._fragments": "", "testing._leaks": "gevent greenlet os time", "testing._memory": "gevent os socket"},
    {"testing": "", "testing.pytest_plugin": "pytest", "testing.strategies": "hypothesis"},
]

#: What only calculates. Everybody may import it.
HARMLESS = {
    *("abc", "bisect", "collections", "dataclasses", "enum", "errno", "functools", "gc", "heapq", "ipaddress", "itertools", "math"),
    *("codecs", "copy", "operator", "re", "stat", "string", "struct", "sys", "types", "typing", "weakref"),
}

PURE = {
    *("errors", "framing", "_inbox", "_delimiters", "_outbox", "_lifecycle", "_timers", "_settings", "_address"),
    *("proxy_protocol", "_proxy_tlvs"),
    *("_buckets", "_networks"),
    "testing._fragments",
}

#: What may be imported inside a function, for not everybody has it.
OPTIONAL = {"dns", "gunicorn", "hypothesis", "prometheus_client", "pytest", "redis", "wsproto"}

LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}
OUTSIDE = {name: set(known.split()) for floor in FLOORS for name, known in floor.items()}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}

each_module = pytest.mark.parametrize("name", FILES, ids=lambda name: name or "the face")


@functools.cache
def tree_of(name):
    return ast.parse(FILES[name].read_text())


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes_that_run(node):
    """Yield all nodes below `node` but those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(child):
            yield child
            yield from nodes_that_run(child)


def targets(node):
    """Return the dotted names of the modules that an import statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        inside = [f"{node.module}.{alias.name}" for alias in node.names]
        # `from pants_green import engine` imports a module, `from pants_green.engine import Engine` a name.
        modules = [one for one in inside if own_name(one) in FILES]
        return modules or [node.module]
    return []


def own_name(dotted):
    """Return what a module of ours is called here, None if it is not ours."""
    package, _, rest = dotted.partition(".")
    return rest if package == "pants_green" else None


def imports_of(name):
    return {target for node in nodes_that_run(tree_of(name)) for target in targets(node)}


def own_imports_of(name):
    return {own_name(target) for target in imports_of(name)} - {None}


def outside_imports_of(name):
    return {target.partition(".")[0] for target in imports_of(name) if own_name(target) is None}


@each_module
def test_module_has_a_floor(name):
    assert name in LEVEL, f"give {name} a place in FLOORS"


@each_module
def test_imports_go_down_only(name):
    up = {other for other in own_imports_of(name) if LEVEL[other] >= LEVEL[name]}
    assert not up, f"{name} imports from its own floor, or one above: {up}"


@each_module
def test_outside_world_is_known_only_where_the_table_says(name):
    assert outside_imports_of(name) - HARMLESS <= OUTSIDE[name]


@each_module
def test_table_allows_nothing_that_is_not_used(name):
    """Else it would say less and less."""
    assert OUTSIDE[name] <= outside_imports_of(name)


@each_module
def test_imports_for_type_checking_are_of_our_own(name):
    """What is imported for annotations alone may point upwards; it is ours, or from what every type checker brings along."""
    for block in ast.walk(tree_of(name)):
        if is_type_checking(block):
            imported = [target for node in ast.walk(block) for target in targets(node)]
            assert not block.orelse or "typing_extensions" in imported
            for target in imported:
                assert own_name(target) is not None or target in ("typing", "typing_extensions")


@each_module
def test_no_import_inside_a_function_but_of_optional_extras(name):
    for function in ast.walk(tree_of(name)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            for node in ast.walk(function):
                assert {target.partition(".")[0] for target in targets(node)} <= OPTIONAL, f"{name}:{node.lineno}"


def test_face_imports_nothing_of_the_upper_floor():
    seen, todo = set(), {""}
    while todo:
        name = todo.pop()
        seen.add(name)
        todo |= own_imports_of(name) - seen
    assert {name for name in seen if LEVEL[name] > LEVEL[""]} == set()
    assert len(seen) > 10


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_module_rests_on_pure_modules_alone(name):
    assert own_imports_of(name) <= PURE
    assert not outside_imports_of(name) & {"gevent", "greenlet", "logging", "select", "ssl", "threading", "time"}


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_module_touches_no_file_or_terminal(name):
    called = {node.func.id for node in ast.walk(tree_of(name)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"open", "print", "input", "exec", "eval", "__import__"}


@pytest.mark.parametrize("name", ["_address", "proxy_protocol"])
def test_only_constants_are_taken_from_socket_and_only_paths_from_os(name):
    used = {
        (node.value.id, node.attr)
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("socket", "os")
    }
    assert {attribute[:3] for module, attribute in used if module == "socket"} == {"AF_"}
    assert {attribute for module, attribute in used if module == "os"} <= {"PathLike", "fspath", "fsdecode", "fsencode"}


@pytest.mark.parametrize("private", ["_sock", "_read_event", "_write_event"])
def test_private_names_of_gevent_sockets_are_touched_in_the_door_alone(private):
    touched = set()
    for name in FILES:
        for node in ast.walk(tree_of(name)):
            if (isinstance(node, ast.Attribute) and node.attr == private) or (isinstance(node, ast.Constant) and node.value == private):
                touched.add(name)
    assert touched == {"_sockets"}


def test_greenlets_are_made_in_the_pool_alone():
    makers = set()
    for name in FILES:
        for node in ast.walk(tree_of(name)):
            if isinstance(node, ast.Attribute) and node.attr in ("spawn", "spawn_later", "spawn_raw", "Greenlet"):
                makers.add(name)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("greenlet", "Greenlet", "Worker"):
                makers.add(name)
    assert makers == {"_pool"}


@each_module
def test_module_says_what_lives_in_it(name):
    said = ast.get_docstring(tree_of(name))
    assert said
    assert said.splitlines()[0].endswith((".", ":", "..."))


PROBE = """
import gc, json, os, sys, threading
import gevent  # what it does by itself is not ours
from gevent._hub_local import get_hub_if_exists
from greenlet import getcurrent, greenlet

def look():
    return {
        "descriptors": sorted(os.listdir("/proc/self/fd")),
        "tasks": len(os.listdir("/proc/self/task")),
        "threads": threading.active_count(),
        "greenlets": sum(isinstance(one, greenlet) for one in gc.get_objects() if one is not getcurrent()),
        "hub": repr(get_hub_if_exists()),
    }

before = look()
import MODULE
print(json.dumps([before, look(), sorted(sys.modules)]))
"""


@functools.cache
def after_importing(module):
    code = PROBE.replace("MODULE", module)
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=25, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", ["pants_green", "pants_green.network", "pants_green.testing"])
def test_importing_creates_no_hub_greenlet_thread_or_socket(module):
    before, after, _ = after_importing(module)
    assert before["hub"] == "None"
    assert before["threads"] == before["tasks"] == 1
    assert after == before


def test_importing_the_face_loads_no_optional_extra_and_no_upper_floor():
    loaded = set(after_importing("pants_green")[2])
    upper = {f"pants_green.{name}" for name in LEVEL if LEVEL[name] > LEVEL[""]}
    assert not loaded & (upper | OPTIONAL)
    assert "pants_green.stream" in loaded


def test_importing_the_test_kit_loads_neither_pytest_nor_hypothesis():
    assert not set(after_importing("pants_green.testing")[2]) & {"pytest", "hypothesis"}
