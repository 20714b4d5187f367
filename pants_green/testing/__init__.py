"""Tools for testing programs that use pants_green: cut bytes, join streams without sockets, find what was left behind.

Neither pytest nor Hypothesis is imported here. The pytest fixture is in ``pants_green.testing.pytest_plugin``, the
Hypothesis strategies are in ``pants_green.testing.strategies``.
"""

from pants_green.testing._fragments import fragmentations
from pants_green.testing._leaks import LeakCheck, leak_check
from pants_green.testing._memory import MemoryEnd, memory_pair

__all__ = ["LeakCheck", "MemoryEnd", "fragmentations", "leak_check", "memory_pair"]
