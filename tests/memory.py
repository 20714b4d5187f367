"""What a process of the tests takes of memory: bytes, now and at most. Linux only."""

import resource

PAGE = resource.getpagesize()


def resident():
    """Return the bytes that are resident now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def peak():
    """Return the most that ever were."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
