"""Ports for servers that a test starts: free now, and not what somebody else is given meanwhile."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress

# Linux gives a port from 32768 on to who asks for any: each connection, and each of a Ray's tens of servers. One of
# these, found free, can be taken before its server is there; a Ray whose client server finds it so ends as a whole.
BELOW_EPHEMERAL = range(20_000, 32_768)


def free_ports(count: int) -> list[int]:
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < count:
            one, port = stack.enter_context(socket.socket()), random.SystemRandom().choice(BELOW_EPHEMERAL)
            with suppress(OSError):
                one.bind(("127.0.0.1", port))
                found.append(port)
    return found
