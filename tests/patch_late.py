"""Runs pytest in a process that is patched by gevent.monkey late: after pants_green, ssl and the modules of the tests were imported.

    python patch_late.py [arguments of pytest]

The SSLContexts of the tests are made before as well.
"""

import ssl
import sys
import warnings

import pytest
from gevent import monkey
from transports import contexts

import pants_green


def main() -> int:
    before = ssl.SSLContext
    made = [context for version in ("1.2", "1.3") for context in contexts(version)]
    assert pants_green.Stream is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", monkey.MonkeyPatchWarning)  # that it is late
        monkey.patch_all()
    assert ssl.SSLContext is not before
    assert all(type(context) is before for context in made)
    return pytest.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
