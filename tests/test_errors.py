"""The exceptions: what each is caught as, and what it carries."""

import copy
import errno
import re

import pytest

from pants_green import errors

#: Every exception and everything that it is caught as.
TREE = {
    "PantsError": (Exception,),
    "ChannelStateError": (errors.PantsError, RuntimeError),
    "ChannelClosed": (errors.ChannelStateError, errors.PantsError, RuntimeError),
    "WrongThreadError": (errors.PantsError, RuntimeError),
    "InvalidAddressFormatError": (errors.PantsError, ValueError),
    "InvalidReadDelimiterError": (errors.PantsError,),
    "ReadDelimiterTypeError": (errors.InvalidReadDelimiterError, TypeError),
    "ReadDelimiterValueError": (errors.InvalidReadDelimiterError, ValueError),
    "StreamConnectError": (errors.PantsError, OSError),
    "DatagramTooLong": (errors.PantsError, OSError, ValueError),
    "ProxyHeaderError": (errors.PantsError, ValueError),
    "StreamBufferOverflow": (errors.PantsError,),
    "HandshakeTimeout": (errors.PantsError, TimeoutError),
    "ReadTimeout": (errors.PantsError, TimeoutError),
    "WriteTimeout": (errors.PantsError, TimeoutError),
    "IdleTimeout": (errors.PantsError, TimeoutError),
    "CallbackTimeout": (errors.PantsError, TimeoutError),
}


@pytest.mark.parametrize("name", TREE)
def test_error_is_caught_as_all_its_kinds(name):
    for kind in TREE[name]:
        with pytest.raises(kind, match="what happened"):
            raise getattr(errors, name)("what happened")


def test_tree_is_complete():
    # What comes later needs a line above.
    assert set(errors.__all__) == set(TREE)


@pytest.mark.parametrize("name", [name for name in TREE if OSError not in TREE[name] and TimeoutError not in TREE[name]])
def test_error_of_ours_is_no_os_error(name):
    assert not issubclass(getattr(errors, name), OSError)


@pytest.mark.parametrize(("one", "other"), [(TypeError, ValueError), (ValueError, TypeError)])
def test_delimiter_error_is_either_of_type_or_of_value(one, other):
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.InvalidReadDelimiterError)]
    assert not any(issubclass(kind, one) and issubclass(kind, other) for kind in kinds)


def test_docstring_shows_the_whole_tree():
    """The picture in the module's docstring names every class, under its parent, with the built-in that it also is."""
    parents = {0: None}
    seen = {}
    for line in errors.__doc__.splitlines():
        if match := re.match(r"( {4,})(\w+)(?: \((\w+)\))?", line):
            depth = len(match[1])
            parents[depth] = match[2]
            seen[match[2]] = (parents.get(depth - 2), match[3])
    assert set(seen) == set(errors.__all__)
    for name, (parent, builtin) in seen.items():
        bases = {base.__name__ for base in getattr(errors, name).__bases__}
        inherited = {base.__name__ for base in getattr(errors, name).__mro__}
        assert {parent or "Exception"} <= bases, name
        assert builtin is None or builtin in inherited, name


def test_channel_closed_carries_the_channel_beside_its_message():
    channel = object()
    error = errors.ChannelClosed("write() on <Stream closed>", channel)
    assert error.channel is channel
    assert str(error) == "write() on <Stream closed>"
    assert errors.ChannelClosed("nobody's").channel is None


def test_stream_connect_error_is_errno_and_text():
    """D.13: it unpacks as (errno, strerror), which is what the oldest on_connect_error took."""
    error = errors.StreamConnectError(errno.ECONNREFUSED, "cannot connect to 127.0.0.1:1: Connection refused")
    code, text = error.args
    assert (code, text) == (error.errno, error.strerror) == (errno.ECONNREFUSED, "cannot connect to 127.0.0.1:1: Connection refused")
    assert type(error) is errors.StreamConnectError


def test_stream_buffer_overflow_carries_size_and_limit():
    error = errors.StreamBufferOverflow("70000 bytes wait", 70000, 65536)
    assert (str(error), error.size, error.limit, error.setting) == ("70000 bytes wait", 70000, 65536, "buffer_size")


def test_stream_buffer_overflow_copied_keeps_its_numbers():
    error = copy.copy(errors.StreamBufferOverflow("70000 bytes wait", 70000, 65536, "write_limit"))
    assert (error.size, error.limit, error.setting) == (70000, 65536, "write_limit")
