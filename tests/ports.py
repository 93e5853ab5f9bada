"""Ports that tests may give to what they start.

A port asked of the kernel (bind to 0) lies where outgoing connections take theirs: between the question and
the use, any connection of another test can have it. These lie below that range, each test process walks
through a part of its own, and a port is given only if nobody has it on any address of either family.
"""

import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_LOWEST: Final = 10_000
_PROCESSES: Final = 8  # parts of the range: more test processes than that share them

_KINDS: Final = (socket.SOCK_STREAM, socket.SOCK_DGRAM)
_EVERYWHERE: Final = ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::"))


def _range() -> range:
    """Below the ports of outgoing connections, wherever the machine has those."""
    lowest_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text("ascii").split()[0])
    return range(_LOWEST, lowest_outgoing if lowest_outgoing > _LOWEST + 1000 else 32_768)


def _candidates() -> Iterator[int]:
    ports = _range()
    size = len(ports) // _PROCESSES
    part = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % _PROCESSES
    mine = ports[part * size : (part + 1) * size]
    # Two runs on one machine begin at different places.
    first = os.getpid() * 37 % size
    return itertools.cycle([*mine[first:], *mine[:first]])


_next_port = _candidates()


def _is_free(port: int, kind: int) -> bool:
    for family, host in _EVERYWHERE:
        with socket.socket(family, kind) as probe:
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind((host, port))
            except OSError:
                return False
    return True


def free_port() -> int:
    """A port that is free for TCP and UDP, on every address; not given again before the range was walked."""
    for port in itertools.islice(_next_port, len(_range())):
        if all(_is_free(port, kind) for kind in _KINDS):
            return port
    raise RuntimeError(f"no free port in {_range()}")
