"""What a test needs of the machine; it is skipped where that is not there."""

import os

import pytest

from pants_green._sockets import ipv6_works

needs_ipv6 = pytest.mark.skipif(not ipv6_works(), reason="this machine has no IPv6")
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="looks at the server in /proc")
