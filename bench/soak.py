"""Endurance: does a proxy's memory stay put under many requests, and under clients that do not read?

Two trials. *Requests*: a million small ones, the memory sampled twice a second; it is flat when the end is no
higher than the time after warm-up. *Stalled*: a hundred clients ask for 1 GB each and read nothing; memory
may grow by what a connection may buffer, never by the body.
"""

import contextlib
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from bench import load
from bench.load import Load
from bench.measure import CpuReading, memory_bytes, settled_memory_bytes
from bench.peers import Program, UnavailableError, answer_of
from bench.world import STALLED_BODY_BYTES

REQUEST_CONNECTIONS: Final = 64
REQUESTS_AT_MOST_S: Final = 600.0
FLAT_SHARE: Final = 0.03
FLAT_BYTES: Final = 1024 * 1024
"""Growth under the share or under this is no growth: allocators move by as much on their own."""
STALLED_BUDGET_BYTES: Final = 512 * 1024
"""What one stalled download may hold, buffers on both sides and the connection itself."""


@dataclass(frozen=True)
class Flatness:
    """Memory after warm-up (second quarter) and at the end (last quarter) of a trial; medians, in bytes."""

    early_bytes: int
    late_bytes: int

    @property
    def is_flat(self) -> bool:
        return self.late_bytes - self.early_bytes <= max(FLAT_BYTES, FLAT_SHARE * self.early_bytes)


def flatness(samples: Sequence[int]) -> Flatness:
    """Raises ValueError for fewer than eight samples: they would show nothing."""
    quarter = len(samples) // 4
    if quarter < 2:
        raise ValueError(f"{len(samples)} samples are too few to tell growth from noise")
    return Flatness(int(median(samples[quarter : 2 * quarter])), int(median(samples[-quarter:])))


@dataclass(frozen=True)
class RequestsTrial:
    """The result of many requests."""

    load: Load
    cpu_s: float
    samples: tuple[int, ...]
    """Memory in bytes, twice a second."""


def many_requests(program: Program, requests: int) -> RequestsTrial:
    """Raises LoadError when one fails, TreeChangedError when a process of the proxy does."""
    root = program.process.pid
    samples: list[int] = []
    before = CpuReading.of(root)
    done = load.h2load_count(
        f"http://127.0.0.1:{program.ports.http}/small",
        connections=REQUEST_CONNECTIONS,
        requests=requests,
        at_most_s=REQUESTS_AT_MOST_S,
        watch=lambda: samples.append(memory_bytes(root)),
    )
    spent = CpuReading.of(root).since(before)
    return RequestsTrial(done, sum(spent.values()), tuple(samples))


@dataclass(frozen=True)
class StalledTrial:
    """The result of clients that do not read, memory in bytes."""

    clients: int
    seconds: float
    base_bytes: int
    peak_bytes: int
    after_bytes: int
    """Once they have gone."""

    @property
    def is_bounded(self) -> bool:
        return self.peak_bytes - self.base_bytes <= self.clients * STALLED_BUDGET_BYTES


def stalled_downloads(program: Program, *, clients: int, seconds: float) -> StalledTrial:
    """Holds the stall for that long, checks that the bodies are still coming, and lets go.

    Raises UnavailableError when a download is refused or ends, or when the proxy no longer serves afterwards.
    """
    root, port = program.process.pid, program.ports.http
    answer_of(port)
    base = settled_memory_bytes(root)
    peak = base
    with contextlib.ExitStack() as keep:
        waiting: list[socket.socket] = []
        for _ in range(clients):
            client = keep.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            client.settimeout(10)
            client.connect(("127.0.0.1", port))
            client.sendall(b"GET /1g HTTP/1.1\r\nHost: localhost\r\n\r\n")
            waiting.append(client)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            time.sleep(0.25)
            peak = max(peak, memory_bytes(root))
        for client in waiting:
            _still_coming(client)
        peak = max(peak, memory_bytes(root))
    after = settled_memory_bytes(root)
    status, _ = answer_of(port)
    if status != 200:
        raise UnavailableError(f"answers {status} after the stalled downloads")
    return StalledTrial(clients, seconds, base, peak, after)


def _still_coming(client: socket.socket) -> None:
    """Reads a megabyte of the stalled download."""
    received = client.recv(65536)
    if not received.startswith(b"HTTP/1.1 200 ") or f"{STALLED_BODY_BYTES}".encode() not in received[:2000]:
        raise UnavailableError(f"a stalled download began with {received[:60]!r}")
    count = len(received)
    while count < 1_000_000:
        more = len(client.recv(65536))
        if not more:
            raise UnavailableError(f"a stalled download ended after {count} bytes")
        count += more
