"""A pytest plugin: ``pytest_plugins = ["pants_green.testing.pytest_plugin"]`` in ``conftest.py`` gives the fixture ``no_leaks``."""

from collections.abc import Iterator

import pytest

from pants_green.testing._leaks import LeakCheck, leak_check

__all__ = ["no_leaks"]


@pytest.fixture
def no_leaks() -> Iterator[LeakCheck]:
    """Fail the test if it leaves a greenlet, a channel or a descriptor behind.

    What fixtures set up after this one have made, they take down before it looks.
    """
    with leak_check() as check:
        yield check
