"""The command: `python -m bench` measures the gateway beside its peers, `python -m bench soak` its endurance.

Exit codes: 0 when the gateway was measured in all that was asked (or was not asked for), 1 when it failed
somewhere or its memory grew, 2 usage. A peer that fails is reported and does not decide the exit code.
"""

import argparse
import datetime
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench import report
from bench.cells import CELLS, Cell, Outcome, run_cell, start_variants
from bench.idle import IdleError, IdleFigures, measure_idle
from bench.load import LoadError
from bench.measure import TreeChangedError, raise_open_files, split_cores
from bench.peers import GATEWAY, PROXIES, Rack, UnavailableError, rack
from bench.scaling import run_scaling, scaling_cores
from bench.soak import STALLED_BUDGET_BYTES, flatness, many_requests, stalled_downloads
from bench.streams import StreamFigures, StreamsError, measure_streams

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs" / "performance.md"
RESULTS: Final = ROOT / "bench" / "results"
OPEN_FILES: Final = 40_000
IDLE_CELLS: Final = {"idle": (5000, False), "idle-tls": (2000, True)}
STREAMS_CELL: Final = "h2-streams"
HELD: Final = (100, 100)  # connections, and streams on each
SCALING_CELL: Final = "scaling"
CELL_NAMES: Final = (*(cell.name for cell in CELLS), *IDLE_CELLS, STREAMS_CELL, SCALING_CELL)


def arguments(given: list[str]) -> argparse.Namespace:
    """`soak` as the first word is the other command."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("command", nargs="?", choices=("run", "soak"), default="run")
    parser.add_argument(
        "--peers", default="", help=f"of {','.join(PROXIES)}; default all, for soak {GATEWAY}"
    )
    parser.add_argument(
        "--write", action="store_true", help="also write the results into docs/performance.md"
    )
    parser.add_argument("--cells", default=",".join(CELL_NAMES), help=f"of {','.join(CELL_NAMES)}")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each proxy in a cell (5)")
    parser.add_argument("--seconds", type=int, default=1, help="length of a run, bulk twice that (1)")
    parser.add_argument("--quick", action="store_true", help="one round, a tenth of the idle connections")
    parser.add_argument("--requests", type=int, default=1_000_000, help="soak: requests (1000000)")
    parser.add_argument("--stalled", type=int, default=100, help="soak: clients that do not read (100)")
    parser.add_argument("--stall-seconds", type=int, default=10, help="soak: for how long (10)")
    options = parser.parse_args(given)
    wanted = [name.strip() for name in options.cells.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in CELL_NAMES]:
        parser.error(f"no such cell: {', '.join(unknown)}; there are {', '.join(CELL_NAMES)}")
    if min(options.rounds, options.seconds, options.requests, options.stalled, options.stall_seconds) < 1:
        parser.error("rounds, seconds, requests, stalled and stall-seconds are at least 1")
    options.cells = [name for name in CELL_NAMES if name in wanted]
    if options.quick:
        options.rounds = 1
    try:
        everyone = ",".join(PROXIES) if options.command == "run" else GATEWAY
        options.peers = report.known_proxies(options.peers or everyone)
    except ValueError as error:
        parser.error(str(error))
    return options


def say(text: str) -> None:
    print(text, flush=True)


class Bench:
    """One run of the bench: asks each part for its results and keeps them for the report."""

    def __init__(self, options: argparse.Namespace, shelf: Rack) -> None:
        self.options = options
        self.rack = shelf
        self.cells: dict[str, dict[str, Outcome]] = {}
        self.idle: dict[str, dict[str, IdleFigures | str]] = {}
        self.streams: dict[str, StreamFigures | str] = {}
        self.scaling: dict[str, Outcome] | None = None
        self.scaling_shared = False
        self.sections: list[str] = []

    def _section(self, heading: str, text: str) -> None:
        self.sections.append(f"{heading}\n\n{text}")
        say(f"\n{heading}\n\n{text}")

    def run(self) -> None:
        """Raises UnavailableError without a backend: there is nothing to measure then."""
        backend = self.rack.start_backend()
        wanted = [cell for cell in CELLS if cell.name in self.options.cells]
        if wanted:
            self._load_cells(wanted)
        for name, (connections, tls) in IDLE_CELLS.items():
            if name in self.options.cells:
                self._idle_cell(name, connections // (10 if self.options.quick else 1), tls=tls)
        if STREAMS_CELL in self.options.cells:
            self._streams_cell()
        if SCALING_CELL in self.options.cells:
            cores = scaling_cores(os.sched_getaffinity(0) | self.rack.cores.proxy)
            self.scaling_shared = cores.shared
            self.scaling = run_scaling(
                self.rack,
                backend,
                self.options.peers,
                cores,
                rounds=self.options.rounds,
                seconds=self.options.seconds,
                scratch=self.rack.directory,
            )
            table = report.scaling_table(self.scaling, shared=cores.shared)
            self._section("### scaling: one and two workers, HTTP/1.1 keep-alive (wrk)", table)

    def _load_cells(self, wanted: list[Cell]) -> None:
        any_bulk = any(cell.bulk for cell in wanted)
        programs, missing = start_variants(self.rack, self.options.peers, tuned=any_bulk)
        for cell in wanted:
            entered = {name: one for name, one in programs.items() if cell.bulk or name in PROXIES}
            outcomes = run_cell(
                cell,
                entered,
                rounds=self.options.rounds,
                seconds=self.options.seconds * (2 if cell.bulk else 1),
                scratch=self.rack.directory,
                files=self.rack.site.files,
            )
            for name, why in missing.items():
                if cell.bulk or name in PROXIES:
                    outcomes[name] = Outcome(failure=why)
            self.cells[cell.name] = outcomes
            self._section(report.cell_heading(cell), report.load_table(outcomes, bulk=bool(cell.bulk)))
        for program in programs.values():
            self.rack.stop(program)

    def _idle_cell(self, name: str, connections: int, *, tls: bool) -> None:
        results: dict[str, IdleFigures | str] = {}
        for proxy in self.options.peers:
            try:
                program = self.rack.start_proxy(proxy)
            except UnavailableError as error:
                results[proxy] = str(error)
                continue
            try:
                results[proxy] = measure_idle(program, connections=connections, tls=tls)
            except IdleError as error:
                results[proxy] = str(error)
            self.rack.stop(program)
        self.idle[name] = results
        kind = "TLS" if tls else "clear-text"
        heading = (
            f"### {name}: {connections} idle {kind} keep-alive connections, one request answered on each"
        )
        self._section(heading, report.idle_table(results))

    def _streams_cell(self) -> None:
        connections, streams = HELD
        if self.options.quick:
            connections //= 10
        for proxy in self.options.peers:
            try:
                program = self.rack.start_proxy(proxy)
            except UnavailableError as error:
                self.streams[proxy] = str(error)
                continue
            try:
                self.streams[proxy] = measure_streams(
                    program, self.rack.site.held_port, connections=connections, streams=streams
                )
            except StreamsError as error:
                self.streams[proxy] = str(error)
            self.rack.stop(program)
        heading = (
            f"### {STREAMS_CELL}: {connections} HTTP/2 connections over TLS with {streams} requests on each "
            "that wait for their answers, every one on an HTTP/1.1 connection to the backend"
        )
        self._section(heading, report.streams_table(self.streams))

    def gateway_failed(self) -> bool:
        """Whether the gateway, if asked for, has no number somewhere."""
        outcomes: list[Mapping[str, Outcome]] = [*self.cells.values(), self.scaling or {}]
        failed = any(
            outcome.failure is not None
            for cell in outcomes
            for name, outcome in cell.items()
            if name.startswith(GATEWAY)
        )
        held: list[Mapping[str, object]] = [*self.idle.values(), self.streams]
        return failed or any(isinstance(results.get(GATEWAY), str) for results in held)


def facts(options: argparse.Namespace, command: str) -> dict[str, str]:
    """What stands above every table."""
    now = datetime.datetime.now(datetime.UTC)
    known = {"date": f"{now:%Y-%m-%d %H:%M} UTC", "command": f"`{command}`"}
    return {**known, **report.machine(), **report.versions(options.peers)}


def run_bench(options: argparse.Namespace, command: str) -> int:
    """The side-by-side measurement."""
    began = time.monotonic()
    about = facts(options, command)
    cores = split_cores(os.sched_getaffinity(0))
    about["cores"] = f"proxy on {sorted(cores.proxy)}, load and backend on {sorted(cores.load)}"
    if cores.shared:
        about["cores"] += " - THE SAME: this machine has one core, so latencies and rates mean little"
    about["runs"] = f"{options.rounds} interleaved rounds of {options.seconds} s (bulk twice that), medians"
    say(report.facts_list(about))
    with rack(cores) as shelf:
        os.sched_setaffinity(0, cores.load)  # what is started from here on, and we, keep off the proxy's core
        bench = Bench(options, shelf)
        bench.run()
    about["took"] = f"{time.monotonic() - began:.0f} s"
    bulk_cells = frozenset(cell.name for cell in CELLS if cell.bulk)
    verdict = report.verdicts(bench.cells, bulk_cells, bench.idle.get("idle"), bench.scaling)
    say(f"\n### Budgets\n\n{verdict}\n")
    record = {
        "facts": about,
        "cells": bench.cells,
        "idle": bench.idle,
        "streams": bench.streams,
        "scaling": bench.scaling,
    }
    name = f"bench-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}"
    say(f"samples: {report.write_record(RESULTS, name, record).relative_to(ROOT)}")
    if options.write:
        page = [
            "## Measured side by side",
            report.facts_list(about),
            f"### Budgets\n\n{verdict}",
            *bench.sections,
        ]
        report.write_section(PAGE, "bench", "\n\n".join(page))
        say(f"written: {PAGE.relative_to(ROOT)}")
    return 1 if bench.gateway_failed() else 0


def soak_one(shelf: Rack, name: str, options: argparse.Namespace) -> tuple[list[str], bool]:
    """Both trials on one proxy: lines for the report, and whether it held."""
    lines: list[str] = []
    held = True
    program = shelf.start_proxy(name)
    try:
        trial = many_requests(program, options.requests)
        cost = trial.cpu_s / trial.load.requests * 1e6
        took = f"in {trial.load.seconds:.0f} s, {cost:.1f} CPU us each, none failed"
        did = f"{trial.load.requests} requests {took}"
        try:
            flat = flatness(trial.samples)
            held = flat.is_flat
            early, late = (f"{size / 2**20:.1f} MiB" for size in (flat.early_bytes, flat.late_bytes))
            verdict = "flat" if held else "IT GROWS"
            lines.append(f"- {name}: {did}; memory {early} after warm-up, {late} at the end: {verdict}")
        except ValueError as error:
            held = False
            lines.append(f"- {name}: {did}; memory not judged: {error}")
    except (LoadError, TreeChangedError) as error:
        lines.append(f"- **{name} failed** under many requests: {error}")
        held = False
    try:
        stall = stalled_downloads(program, clients=options.stalled, seconds=options.stall_seconds)
        each = (stall.peak_bytes - stall.base_bytes) / stall.clients / 1024
        sizes = [
            f"{size / 2**20:.1f} MiB" for size in (stall.base_bytes, stall.peak_bytes, stall.after_bytes)
        ]
        verdict = "bounded" if stall.is_bounded else "OVER"
        lines.append(
            f"- {name}: {stall.clients} stalled 1 GB downloads for {stall.seconds:.0f} s; memory {sizes[0]} "
            f"before, {sizes[1]} at most ({each:.0f} KiB each), {sizes[2]} after they left: {verdict} "
            f"({STALLED_BUDGET_BYTES // 1024} KiB each allowed)"
        )
        held = held and stall.is_bounded
    except (OSError, UnavailableError) as error:
        lines.append(f"- **{name} failed** under stalled downloads: {error}")
        held = False
    shelf.stop(program)
    return lines, held


def run_soak(options: argparse.Namespace, command: str) -> int:
    """Endurance of the proxies asked for; the gateway's decides the exit code."""
    about = facts(options, command)
    say(report.facts_list(about) + "\n")
    cores = split_cores(os.sched_getaffinity(0))
    lines: list[str] = []
    gateway_held = True
    with rack(cores) as shelf:
        os.sched_setaffinity(0, cores.load)
        shelf.start_backend()
        for name in options.peers:
            try:
                said, held = soak_one(shelf, name, options)
            except UnavailableError as error:
                said, held = [f"- **{name} is left out**: {error}"], False
            lines += said
            gateway_held = gateway_held and (held or name != GATEWAY)
            say("\n".join(said))
    if options.write:
        report.write_section(
            PAGE, "soak", "\n\n".join(["## Endurance", report.facts_list(about), "\n".join(lines)])
        )
        say(f"written: {PAGE.relative_to(ROOT)}")
    return 0 if gateway_held else 1


def main(given: list[str]) -> int:
    """Returns the exit code."""
    options = arguments(given)
    command = shlex.join(["python", "-m", "bench", *given])
    if (limit := raise_open_files(OPEN_FILES)) < 12_000:
        say(f"note: only {limit} open files are allowed: the idle cells may fail (`ulimit -n`)")
    try:
        return run_soak(options, command) if options.command == "soak" else run_bench(options, command)
    except UnavailableError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: stopped; everything it had started is down", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
