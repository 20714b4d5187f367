"""What a test needs of the machine; it is skipped where that is not there."""

import os
import socket
import struct

import pytest
from peers import PlainSocket

from pants_green._sockets import ipv6_works


def multicast_works(family, group, interface):
    """Tell whether what is sent to a multicast group by this interface comes back to a member on this machine."""
    try:
        index = socket.if_nametoindex(interface)
        with PlainSocket(family, socket.SOCK_DGRAM) as one:
            one.settimeout(1)
            one.bind(("", 0))
            if family == socket.AF_INET:
                member = struct.pack("4s4si", socket.inet_aton(group), bytes(4), index)
                one.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
                one.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, struct.pack("4s4si", bytes(4), bytes(4), index))
                one.sendto(b"x", (group, one.getsockname()[1]))
            else:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, socket.inet_pton(family, group) + struct.pack("I", index))
                one.sendto(b"x", (group, one.getsockname()[1], 0, index))
            return one.recv(10) == b"x"
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not ipv6_works(), reason="this machine has no IPv6")
needs_multicast = pytest.mark.skipif(
    not multicast_works(socket.AF_INET, "239.77.1.2", "lo"), reason="this machine has no multicast on its loopback interface"
)
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="looks at the server in /proc")
