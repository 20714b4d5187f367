"""What can be imported from where: the face, the modules' own lists, and the paths of the old documents."""

import ast
import collections
import functools
import importlib
import logging
import pathlib
import pkgutil
import types

import pytest

import pants_green
from pants_green.channel import Channel

PACKAGE = pathlib.Path(pants_green.__file__).parent

MODULES = ["pants_green", *(found.name for found in pkgutil.walk_packages(pants_green.__path__, "pants_green."))]

UNIX = ["UnixClient", "UnixConnection", "UnixServer"]

#: What the documents promise of the face, as far as it is built.
FACE = ["Client", "Connection", "Datagram", "Engine", "ReconnectingClient", "Server", "Stream", "StreamServer", *UNIX, "engine"]


@pytest.mark.parametrize("name", MODULES)
def test_all_names_what_is_there(name):
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    assert [one for one in module.__all__ if not hasattr(module, one)] == []
    assert [one for one in module.__all__ if one.startswith("_")] == []


@functools.cache
def names_taken():
    """Return by module the names that other modules of the package import from it."""
    taken = collections.defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                taken[node.module] |= {alias.name for alias in node.names if f"{node.module}.{alias.name}" not in MODULES}
    return taken


@pytest.mark.parametrize("name", [name for name in MODULES if "._" in name])
def test_all_of_a_private_module_names_everything_that_others_take(name):
    """What is not in the list is nobody else's business; a public module's list is for users."""
    assert names_taken()[name] - set(importlib.import_module(name).__all__) == set()


@pytest.mark.parametrize("name", MODULES)
def test_star_import_brings_exactly_the_list(name):
    space = {}
    exec(f"from {name} import *", space)
    assert set(space) - {"__builtins__"} == set(importlib.import_module(name).__all__)


@pytest.mark.parametrize("name", FACE)
def test_face_has_what_the_documents_promise(name):
    assert name in pants_green.__all__


@pytest.mark.parametrize("name", pants_green.__all__)
def test_face_re_exports_the_very_object(name):
    found = getattr(pants_green, name)
    if isinstance(found, types.ModuleType):
        assert found.__name__ == f"pants_green.{name}"
    else:
        home = importlib.import_module(found.__module__)
        assert getattr(home, name) is found
        assert name in home.__all__


def test_face_re_exports_every_exception_but_the_two_kinds_of_delimiter_error():
    errors = importlib.import_module("pants_green.errors")
    assert set(errors.__all__) - set(pants_green.__all__) == {"ReadDelimiterTypeError", "ReadDelimiterValueError"}


def test_face_defines_nothing_of_its_own():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert {type(node) for node in tree.body} == {ast.Expr, ast.Import, ast.ImportFrom, ast.Assign}
    assert [node.targets[0].id for node in tree.body if isinstance(node, ast.Assign)] == ["__all__", "__version__"]


def test_version_is_one():
    parts = pants_green.__version__.split(".")
    assert len(parts) == 3
    assert all(part.isdigit() for part in parts)


def test_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()


def test_library_logs_to_its_own_logger_and_sets_up_no_other():
    assert [type(handler) for handler in logging.getLogger("pants_green").handlers] == [logging.NullHandler]
    for name in ("datagram", "engine", "stream", "server"):
        assert logging.getLogger(f"pants_green.{name}").handlers == []
        assert logging.getLogger(f"pants_green.{name}").level == logging.NOTSET


# ---- the old paths


def test_s0_1_server_and_connection_from_the_package():
    from pants_green import Connection, Server

    assert issubclass(Server, Channel)
    assert issubclass(Connection, Channel)


@pytest.mark.parametrize("path", ["engine.Engine", "channel.Channel", "network.Server", "network.Connection", "network.Client"])
def test_s1_1_old_paths_lead_to_the_classes_of_today(path):
    module, name = path.split(".")
    found = getattr(importlib.import_module(f"pants_green.{module}"), name)
    assert found is getattr(pants_green, name, Channel)
    assert found.__name__ == name


@pytest.mark.parametrize("name", ["Server", "Connection", "Client"])
def test_s1_2_network_classes_are_channels(name):
    assert issubclass(getattr(pants_green, name), Channel)


def test_s1_6_engine_is_a_module_that_answers_for_the_global_engine():
    from pants_green import Connection, Engine, Server, engine

    assert engine.Engine is Engine
    for name in ("start", "stop", "poll", "callback", "loop", "defer", "cycle", "call_from_thread", "run_in_thread"):
        assert isinstance(getattr(engine, name), types.FunctionType)
        assert name in vars(engine)
    assert Server(Connection, engine=engine).engine is Engine.instance()


def test_s2_1_server_at_both_of_its_paths():
    from pants_green.server import Server

    assert pants_green.Server is Server


def test_s3_5_tutorial_imports():
    from pants_green import Engine, Server, Stream

    class Echo(Stream):
        pass

    assert Server(ConnectionClass=Echo).ConnectionClass is Echo
    assert Engine.instance() is Engine.instance()


@pytest.mark.parametrize(
    "path",
    [
        *("stream.Stream", "server.StreamServer", "network.Client", "network.Connection", "network.Server", "datagram.Datagram"),
        *(f"unix.{name}" for name in UNIX),
    ],
)
def test_s4_17_old_paths_lead_to_the_classes_of_today(path):
    module, name = path.split(".")
    assert getattr(importlib.import_module(f"pants_green.{module}"), name) is getattr(pants_green, name)


def test_s4_17_stream_server_is_at_its_old_path():
    from pants_green.stream import StreamServer

    assert StreamServer is pants_green.StreamServer


@pytest.mark.parametrize(
    ("name", "base"),
    [
        *(("Client", "Stream"), ("Connection", "Stream"), ("Server", "StreamServer"), ("Stream", None), ("StreamServer", None)),
        ("Datagram", None),
        ("ReconnectingClient", "Client"),
        *(("UnixClient", "Client"), ("UnixConnection", "Connection"), ("UnixServer", "Server")),
        *(("UnixClient", "Stream"), ("UnixConnection", "Stream"), ("UnixServer", "StreamServer")),
    ],
)
def test_s4_18_high_level_classes_are_subclasses_of_the_low_level_ones(name, base):
    parent = getattr(pants_green, base) if base else Channel
    assert parent in getattr(pants_green, name).__mro__[1:]
