"""What it costs to be watched: ``python -m bench.watching [--rounds 15]``.

The gateway with its access log off, with the log written to a file, and with the log and a scrape every
second, each under the same load in interleaved rounds. Prints CPU per request, and the ratio to the first
with the spread of its rounds: a ratio inside that spread is noise. Then what counting itself takes, which
cannot be turned off, in nanoseconds.
"""

import argparse
import contextlib
import functools
import http.client
import os
import statistics
import threading
import timeit
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench.cells import CELLS, Run, run_rounds
from bench.measure import split_cores
from bench.peers import GATEWAY, rack
from bench.world import free_ports
from expressgateway.observe.counters import ListenerCounters

OFF: Final = "log off"
LOG: Final = "log to a file"
ALL: Final = "log, and a scrape a second"
TIMES: Final = 100_000


@contextlib.contextmanager
def scraping(port: int) -> Iterator[None]:
    """Ask for the metrics every second, as Prometheus does every fifteen."""
    stop = threading.Event()

    def scrape() -> None:
        while not stop.wait(1.0):
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/metrics")
                connection.getresponse().read()
                connection.close()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def watched(rounds: int, seconds: int) -> dict[str, list[float]]:
    """CPU seconds per request, by variant and round."""
    cores = split_cores(os.sched_getaffinity(0))
    cell = next(cell for cell in CELLS if cell.name == "h1")
    with rack(cores) as shelf:
        os.sched_setaffinity(0, cores.load)
        shelf.start_backend()
        ports = free_ports(3)
        senders = {}
        for variant, admin in zip((OFF, LOG, ALL), ports, strict=True):
            observed = f'[observability]\nmetrics_bind = "127.0.0.1:{admin}"\n'
            if variant is not OFF:
                observed += f'access_log = {{ path = "{shelf.directory}/{admin}.log" }}\n'
            program = shelf.start_proxy(GATEWAY, more=f"\n{observed}")
            run = Run(program.ports, seconds, shelf.directory, shelf.site.files)
            senders[variant] = program, functools.partial(cell.send, run, program.ports.http)
        with scraping(ports[-1]):
            outcomes = run_rounds(senders, rounds)
        for admin in ports[1:]:
            assert (Path(shelf.directory) / f"{admin}.log").stat().st_size, "nothing was logged"
    found = {}
    for variant, outcome in outcomes.items():
        if outcome.failure is not None:
            raise SystemExit(f"{variant}: {outcome.failure}")
        found[variant] = [sample.cpu_s / sample.requests for sample in outcome.samples]
    return found


def counting_ns() -> float:
    """What the counters of one HTTP/1.1 exchange over a kept connection take."""
    counters = ListenerCounters("web")
    route = counters.route("default")
    requests, durations = route.requests, route.durations
    heads, answers = durations[2], durations[3]

    def count() -> None:
        requests[1][2] += 1
        durations[1].observe(0.003)
        heads.observe(0.002)
        answers.observe(0.003)
        counters.request_bytes += 0
        counters.response_bytes += 1000

    return min(timeit.repeat(count, number=TIMES, repeat=7)) / TIMES * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.watching", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=int, default=1)
    options = parser.parse_args()
    found = watched(options.rounds, options.seconds)
    print("| | CPU us a request | ratio, median of the rounds | of the rounds, the middle half |")
    print("| --- | --- | --- | --- |")
    for variant, costs in found.items():
        ratios = sorted(cost / base for cost, base in zip(costs, found[OFF], strict=True))
        quarter = len(ratios) // 4
        print(
            f"| {variant} | {statistics.median(costs) * 1e6:.1f} | {statistics.median(ratios):.3f} "
            f"| {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f} |"
        )
    print(f"\ncounting: {counting_ns():.0f} ns a request")


if __name__ == "__main__":
    main()
