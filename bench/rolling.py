"""Does anybody notice that the gateway changes? ``python -m bench.rolling``, or ``make rolling``.

Loads of every protocol run without a break while the gateway is reloaded - each class of change in turn -
while its certificates are renewed and it is upgraded, and at the end while it drains. Tells by class how many
changes there were, and by load what was asked, what failed, and the longest time without an answer. The exit
code is 1 if anything failed.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench import configs
from bench.load import LoadError, run_generator
from bench.outage_world import LUA, parse_load
from bench.peers import UnavailableError, find_program
from bench.rolling_world import (
    FIXED,
    Gateway,
    Places,
    State,
    answers,
    start_module,
    until,
)
from bench.world import free_ports, make_site

SHORT_S: Final = 4
"""One run of wrk or h2load."""
DRAIN_MS: Final = 8000
SHORT_DRAIN_MS: Final = 2500
"""More than a slow answer takes."""
SETTLE_S: Final = 200.0

Change = Callable[[], None]


class Classes:
    """The classes of reload, each as a change of the state that the next one of its kind takes back."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._state = gateway.state
        self.all: dict[str, Change] = {
            "swap: weights and policy": self._weights,
            "swap: routes": self._routes,
            "swap: timeouts": self._timeouts,
            "swap: TLS settings": self._tls,
            "pool added, removed": self._pool,
            "listener added, removed": self._spare,
            "listener moved": self._move,
            "listener of another protocol": self._protocol,
            "listener under load renamed": self._rename,
            "listener under load of another protocol": self._turn,
            "workers more, fewer": self._workers,
            "workers of another user": self._user,
            "admin listener moved": self._admin,
            "passthrough added, removed": self._passthrough,
        }

    def _reload(self) -> None:
        self._gateway.reload()

    def _weights(self) -> None:
        state = self._state
        state.weights = (1, 3) if state.weights == (1, 1) else (1, 1)
        state.policy = "weighted_round_robin" if state.weights == (1, 3) else "round_robin"
        self._reload()

    def _routes(self) -> None:
        self._state.has_route = not self._state.has_route
        self._reload()

    def _timeouts(self) -> None:
        self._state.total_timeout_ms = 111_000 - self._state.total_timeout_ms
        self._reload()

    def _tls(self) -> None:
        self._state.min_version = "1.3" if self._state.min_version == "1.2" else "1.2"
        self._reload()

    def _pool(self) -> None:
        self._state.has_pool = not self._state.has_pool
        self._reload()

    def _spare(self) -> None:
        state = self._state
        if (port := state.spare_port) != 0:
            state.spare_port = 0
            self._reload()
            # Workers are told when all of them have agreed: one may take another client in before it hears.
            until(lambda: not answers(port), "a listener that was removed answers no more")
            return
        (state.spare_port,) = free_ports(1)
        self._reload()
        self._check_spare()

    def _check_spare(self) -> None:
        if self._state.spare_port and not answers(self._state.spare_port):
            raise UnavailableError("a listener that was just made does not answer")

    def _move(self) -> None:
        (self._state.spare_port,) = free_ports(1)  # added, if it is not there
        self._reload()
        self._check_spare()

    def _protocol(self) -> None:
        state = self._state
        if not state.spare_port:
            (state.spare_port,) = free_ports(1)
        state.spare_protocol = "tcp" if state.spare_protocol == "h1" else "h1"
        self._reload()
        self._check_spare()

    def _rename(self) -> None:
        self._state.turning_name = "turned" if self._state.turning_name == "turning" else "turning"
        self._reload()

    def _turn(self) -> None:
        self._state.turning_protocol = "tcp" if self._state.turning_protocol == "h1" else "h1"
        self._reload()

    def _workers(self) -> None:
        self._state.workers = 5 - self._state.workers
        self._reload()

    def _user(self) -> None:
        if os.geteuid() != 0:
            raise SkippedError
        self._state.user = None if self._state.user else "root"
        self._reload()

    def _admin(self) -> None:
        (self._state.admin,) = free_ports(1)
        self._reload()
        self._gateway.status()

    def _passthrough(self) -> None:
        self._state.has_passthrough = not self._state.has_passthrough
        self._reload()


class SkippedError(Exception):
    """This machine cannot do it."""


@dataclass
class Report:
    """What came of it."""

    counts: Counter[str] = field(default_factory=Counter)
    """Changes by class."""
    slowest_s: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    loads: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    drained_s: float = 0.0

    @property
    def is_good(self) -> bool:
        return not self.problems and not any(load["failures"] for load in self.loads)


class Slices(threading.Thread):
    """wrk or h2load, one run after another. Their own reports tell of failures."""

    def __init__(self, name: str, once: Callable[[], tuple[int, int, str]]) -> None:
        super().__init__(daemon=True)
        self._once = once
        self._stops = threading.Event()
        self.told: dict[str, Any] = {
            "name": name,
            "requests": 0,
            "connections": None,
            "failures": 0,
            "gap_s": None,
            "told": [],
        }

    def run(self) -> None:
        while not self._stops.is_set():
            try:
                requests, failures, what = self._once()
            except (LoadError, UnavailableError, subprocess.SubprocessError) as error:
                requests, failures, what = 0, 1, str(error)
            self.told["requests"] += requests
            self.told["failures"] += failures
            if failures and len(self.told["told"]) < 8:
                self.told["told"].append(f"{time.strftime('%H:%M:%S')} {what}")

    def stop(self) -> None:
        self._stops.set()
        self.join(SHORT_S + 30)


def wrk_once(port: int, script: Path) -> tuple[int, int, str]:
    command = [find_program("wrk"), "-t1", "-c8", f"-d{SHORT_S}s", "--timeout", "10s", "-s", str(script)]
    load = parse_load(run_generator([*command, f"http://127.0.0.1:{port}/"], SHORT_S))
    return load.requests, load.failures, str(dict(load.errors))


def h2load_once(port: int, version: str) -> tuple[int, int, str]:
    """Over TLS, as fast as one connection with one request at a time goes; not at a rate, for a connection of
    h2load's that was told to leave comes back without one.

    Over HTTP/2 its *errored* are not counted: the request that its library holds back when it has read a
    GOAWAY, and never sends, is one of them. The other HTTP/2 client tells of every stream that fails.

    ``-N``: if its time is over while it shakes hands again, it would otherwise wait for that connection for
    ever.
    """
    command = [find_program("h2load"), version, "-c1", f"-D{SHORT_S}", "-N5"]
    output = run_generator([*command, f"https://127.0.0.1:{port}/small"], SHORT_S)
    found = re.search(r"(\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", output)
    if found is None:
        raise LoadError(f"h2load wrote no summary: {output.strip()[-200:]!r}")
    _, succeeded, failed, errored, late = map(int, found.groups())
    unsent = 0 if version == "--h1" else errored
    return succeeded, failed - unsent + late, found[0]


@contextlib.contextmanager
def backends(directory: Path) -> Iterator[tuple[Any, dict[str, int]]]:
    """nginx, and those that it cannot be: the site, and their ports by kind."""
    site = make_site(directory)
    kinds = ("tcp", "udp", "websocket", "grpc", "slow")
    ports = dict(zip(kinds, free_ports(len(kinds)), strict=True))
    config = directory / "nginx.conf"
    config.write_text(configs.backend_conf(site, directory), "ascii")
    nginx = subprocess.Popen(
        [find_program("nginx"), "-p", str(directory), "-c", str(config)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    arguments = [word for kind, port in ports.items() for word in (f"--{kind}", str(port))]
    others = start_module("bench.rolling_backends", *arguments, has_output=False)
    try:
        until(lambda: answers(site.backend_port), "nginx answers")
        yield site, ports
    finally:
        for process in (nginx, others):
            process.terminate()
            process.wait(10)


class Run:
    """The whole of it."""

    def __init__(self, gateway: Gateway, arguments: argparse.Namespace, report: Report) -> None:
        self._gateway = gateway
        self._arguments = arguments
        self._report = report
        self._classes = Classes(gateway)

    def run(self) -> None:
        gateway, ports = self._gateway, self._gateway.places.listeners
        gateway.start()
        script = gateway.directory / "load.lua"
        script.write_text(LUA.replace("%PAUSE_MS%", "10").replace('"/work"', '"/small"'), "ascii")
        slices = [
            Slices("HTTP/1.1, wrk", lambda: wrk_once(ports["web"], script)),
            Slices("HTTP/1.1 over TLS, h2load", lambda: h2load_once(ports["secure"], "--h1")),
            Slices("HTTP/2, h2load", lambda: h2load_once(ports["secure"], "-m1")),
        ]
        loads = start_module(
            "bench.rolling_loads", "--ports", json.dumps(ports), "--roots", str(gateway.roots_path)
        )
        began = time.monotonic()
        try:
            for each in slices:
                each.start()
            self._change()
            for each in slices:
                each.stop()
            self._drain(loads)
        finally:
            self._report.seconds = time.monotonic() - began
            output, _ = loads.communicate(timeout=60)
            self._report.loads = [each.told for each in slices]
            self._report.loads += [json.loads(line) for line in output.splitlines()]
            self._report.problems += gateway.faults()

    def _change(self) -> None:
        """All changes, those of each kind evenly among the others."""
        wanted = self._arguments
        names = list(self._classes.all)
        ways = ("certificates by their files", "certificates by SIGUSR1")
        steps = [
            *((at / wanted.reloads, names[at % len(names)]) for at in range(wanted.reloads)),
            *(((at + 0.5) / wanted.rotations, ways[at % 2]) for at in range(wanted.rotations)),
            *(((at + 0.6) / wanted.upgrades, "upgrade") for at in range(wanted.upgrades)),
        ]
        for _, name in sorted(steps):
            time.sleep(wanted.pause)
            self._step(name)

    def _step(self, name: str) -> None:
        gateway, report = self._gateway, self._report
        began = time.monotonic()
        try:
            match name:
                case "upgrade":
                    gateway.upgrade()
                case "certificates by SIGUSR1":
                    gateway.renew(by_signal=True)
                case "certificates by their files":
                    gateway.renew(by_signal=False)
                case _:
                    self._classes.all[name]()
        except SkippedError:
            return
        except (UnavailableError, OSError, ValueError) as error:
            report.problems.append(f"{name}: {error}")
            print(f"  {name}: {error}", file=sys.stderr)
        took = time.monotonic() - began
        report.counts[name] += 1
        report.slowest_s[name] = max(report.slowest_s.get(name, 0.0), took)
        print(f"{time.strftime('%H:%M:%S')} {name}, {took:.2f} s", file=sys.stderr)

    def _drain(self, loads: "subprocess.Popen[str]") -> None:
        """Streams are ended by their clients; requests go on until the gateway turns them away."""
        gateway, report = self._gateway, self._report
        if loads.stdin is None:
            raise AssertionError("it has an input")
        loads.stdin.write("drain\n")
        loads.stdin.flush()
        if self._arguments.settles:
            until(gateway.is_alone, "workers of before have gone", SETTLE_S)
        gateway.state.drain_timeout_ms = DRAIN_MS if self._arguments.settles else SHORT_DRAIN_MS
        gateway.reload()
        report.drained_s = gateway.drain()
        for line in gateway.lines("drained in"):  # of every process that there was
            # No UDP client ever says that it will send nothing more.
            told = line["aborted"].items()
            if cut := {name: count for name, count in told if count and name != "datagrams"}:
                report.problems.append(f"a drain cut off {cut}")


def tell(report: Report, arguments: argparse.Namespace) -> str:
    """As Markdown."""
    when = datetime.datetime.now(datetime.UTC).date()
    lines = [
        f"`python -m bench.rolling --reloads {arguments.reloads} --rotations {arguments.rotations} "
        f"--upgrades {arguments.upgrades} --pause {arguments.pause}`, {when}, Python "
        f"{platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} cores, "
        f"{report.seconds:.0f} seconds.",
        "",
        "| change | times | slowest, s |",
        "| --- | ---: | ---: |",
    ]
    lines += [f"| {name} | {count} | {report.slowest_s[name]:.2f} |" for name, count in report.counts.items()]
    lines += [
        f"| drain (`SIGTERM`) | 1 | {report.drained_s:.2f} |",
        "",
        "| load | answers | failed | connections or streams | longest gap, s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for load in report.loads:
        gap = "" if load["gap_s"] is None else f"{load['gap_s']:.2f}"
        connections = "" if load["connections"] is None else load["connections"]
        lines.append(
            f"| {load['name']} | {load['requests']:,} | {load['failures']} | {connections} | {gap} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.rolling")
    parser.add_argument("--reloads", type=int, default=100)
    parser.add_argument("--rotations", type=int, default=10)
    parser.add_argument("--upgrades", type=int, default=10)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two changes")
    parser.add_argument("--keep-log", type=Path, help="copy the gateway's log there")
    arguments = parser.parse_args()
    arguments.settles = True
    report = Report()
    with tempfile.TemporaryDirectory(prefix="expressgateway-rolling-") as name:
        directory = Path(name)
        with backends(directory) as (site, ports):
            *listeners, passthrough, admin = free_ports(len(FIXED) + 3)
            places = Places(dict(zip((*FIXED, "turning"), listeners, strict=True)), ports, passthrough)
            gateway = Gateway(directory, site, places, State(admin=admin))
            try:
                Run(gateway, arguments, report).run()
            except UnavailableError as error:
                report.problems.append(str(error))
            finally:
                gateway.end()
                if arguments.keep_log is not None and gateway.log_path.exists():
                    arguments.keep_log.write_bytes(gateway.log_path.read_bytes())
    print(tell(report, arguments))
    for load in report.loads:
        for what in load["told"]:
            print(f"{load['name']}: {what}")
    for problem in report.problems:
        print(problem)
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
