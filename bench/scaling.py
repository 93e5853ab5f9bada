"""What a second worker brings.

With three cores or more, the proxy has two of them for itself and the ratio of throughputs is the answer.
With two, load, backend and both workers compete for the same cores, so throughput says little; what can be
known is the cost of a request with two workers and how evenly they share the work. From these comes a
*projection*: what two workers would carry, as a multiple of one, if each had a core of its own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench import load
from bench.cells import Outcome, run_rounds
from bench.load import Load
from bench.measure import Cores, pin, running_on
from bench.peers import GATEWAY, Program, Rack, UnavailableError
from bench.stats import Figures

if TYPE_CHECKING:
    from collections.abc import Callable

CONNECTIONS = 128
"""Enough that the kernel's choice of a worker for each connection comes out nearly even."""


def scaling_cores(available: set[int]) -> Cores:
    """Two cores for the proxy and the rest for the load; all for both when there are only two."""
    ordered = sorted(available)
    if len(ordered) < 3:
        return Cores(frozenset(ordered), frozenset(ordered))
    return Cores(frozenset(ordered[:2]), frozenset(ordered[2:]))


@dataclass(frozen=True)
class Scaling:
    """Two workers against one."""

    throughput: float
    projection: float


def compare(one: Figures, two: Figures) -> Scaling:
    """The busiest worker's core is full first: that bounds what the whole carries."""
    full_at_one = one.cpu_us_per_request * one.busiest_share
    full_at_two = two.cpu_us_per_request * two.busiest_share
    return Scaling(two.requests_per_s / one.requests_per_s, full_at_one / full_at_two)


def run_scaling(
    rack: Rack,
    backend: Program,
    proxies: list[str],
    cores: Cores,
    *,
    rounds: int,
    seconds: int,
    scratch: Path,
) -> dict[str, Outcome]:
    """One and two workers of the gateway, and of nginx beside it, interleaved."""
    outcomes: dict[str, Outcome] = {}
    senders: dict[str, tuple[Program, Callable[[], Load]]] = {}
    pin(backend.process.pid, cores.load)
    try:
        for name in ("nginx", GATEWAY):
            for workers in (1, 2):
                if name not in proxies:
                    continue
                variant = f"{name} x{workers}"
                outcomes[variant] = Outcome()
                try:
                    program = rack.start_proxy(name, workers=workers, cores=cores.proxy)
                except UnavailableError as error:
                    outcomes[variant].failure = str(error)
                    continue
                url = f"http://127.0.0.1:{program.ports.http}/small"

                def send(url: str = url) -> Load:
                    return load.wrk(url, connections=CONNECTIONS, seconds=seconds, script="", scratch=scratch)

                senders[variant] = program, send
        if senders:
            with running_on(cores.load):
                outcomes |= run_rounds(senders, rounds)
    finally:
        pin(backend.process.pid, rack.cores.load)
        for program, _ in senders.values():
            rack.stop(program)
    return outcomes
