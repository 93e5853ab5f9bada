"""The processes of an outage: backends that can be made to fail, the gateway before them, and wrk before it.

Knows how each is started, asked and ended, and nothing of what is tried with them. Everything is ended by the
id of its own process.
"""

import contextlib
import datetime
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.peers import GATEWAY, UnavailableError, find_program
from bench.world import free_ports

ROOT: Final = Path(__file__).resolve().parent.parent
NAMES: Final = ("b1", "b2", "b3")
VICTIM: Final = "b2"
KEYED: Final = frozenset({"maglev", "ring_hash", "session_affinity"})
START_S: Final = 30.0
CONNECTIONS: Final = 32

# A thousand keys, so that policies that go by one have something to go by; a pause before each request, so
# that it is not the machine's limits that are measured.
LUA: Final = """
local pool, at = {}, 0
init = function(args)
  for i = 1, 1000 do pool[i] = wrk.format("GET", "/work", {["X-Key"] = "key-" .. (i * 7919)}) end
end
request = function()
  at = at % 1000 + 1
  return pool[at]
end
delay = function() return math.random(%PAUSE_MS%) end
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\nRESULT {"requests":%d,"microseconds":%d,"p50":%f,"p99":%f,"max":%f,' ..
    '"status":%d,"connect":%d,"read":%d,"write":%d,"timeout":%d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), latency.max,
    e.status, e.connect, e.read, e.write, e.timeout))
end
"""

Metrics = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""Family and labels to value."""


def ask(port: int, method: str, path: str, body: object = None, timeout_s: float = 10.0) -> tuple[int, str]:
    """Status and text of one request. Raises OSError or http.client.HTTPException."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    with contextlib.closing(connection):
        data = None if body is None else json.dumps(body)
        # The admin listener wants it of every request that changes something.
        fields = {} if method == "GET" else {"Content-Type": "application/json"}
        connection.request(method, path, data, fields)
        response = connection.getresponse()
        return response.status, response.read().decode()


def wait_for(port: int, path: str, process: subprocess.Popen[bytes], what: str) -> None:
    """Until it answers 200. Raises UnavailableError."""
    ends = time.monotonic() + START_S
    while time.monotonic() < ends and process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if ask(port, "GET", path, timeout_s=1.0)[0] == 200:
                return
        time.sleep(0.02)
    raise UnavailableError(f"{what} does not serve")


class FaultyBackend:
    """One backend process and what can be done to it."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.port = port
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Also after `kill`, on the same port. Raises UnavailableError."""
        command = [sys.executable, "-m", "bench.outage_backend", str(self.port), self.name]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL)
        wait_for(self.port, "/health", self.process, f"the backend {self.name}")

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def mode(self, mode: str) -> None:
        ask(self.port, "GET", f"/mode/{mode}")

    def served(self) -> int:
        return int(ask(self.port, "GET", "/count")[1])


@dataclass(frozen=True)
class Rules:
    """In what one pool differs from another."""

    is_5xx_retried: bool = True
    is_5xx_counted: bool = True
    panic_percent: int = 50


POOLS: Final = {
    "web": Rules(),
    "retried": Rules(is_5xx_counted=False),
    "plain": Rules(is_5xx_retried=False, is_5xx_counted=False),
    "calm": Rules(panic_percent=30),
}
"""One listener and one pool each, over the same backends."""


@dataclass(frozen=True)
class Settings:
    """The pool's, as far as the report names them."""

    policy: str = "round_robin"
    slow_start_ms: int = 4000
    ejection_ms: int = 2000
    max_ejection_ms: int = 4000
    per_try_timeout_ms: int = 300
    interval_ms: int = 500
    consecutive_failures: int = 5
    attempts: int = 3
    pools: tuple[str, ...] = tuple(POOLS)


def config(settings: Settings, backends: Mapping[str, str], ports: Mapping[str, int], admin: int) -> str:
    """The gateway's configuration; `backends` are addresses by id, `ports` those of the listeners by pool."""
    tables = ", ".join(f'{{ id = "{id_}", address = "{address}" }}' for id_, address in backends.items())
    key = ', hash_key = "header:X-Key"' if settings.policy in KEYED else ""
    text = f"""\
[runtime]
workers = 1
max_keepalive_requests = 0
per_ip_connection_cap = 100000
readiness_settle_ms = 0
drain_timeout_ms = 1000
drain_jitter_ms = 0
[observability]
metrics_bind = "127.0.0.1:{admin}"
"""
    for name in settings.pools:
        rules = POOLS[name]
        causes = '"connect", "reset", "stale"' + (', "5xx"' if rules.is_5xx_retried else "")
        text += f"""
[[listeners]]
name = "{name}"
address = "127.0.0.1:{ports[name]}"
protocol = "h1"
pool = "{name}"
[[pools]]
name = "{name}"
backends = [{tables}]
load_balancing = {{ policy = "{settings.policy}", slow_start_ms = {settings.slow_start_ms}{key} }}
health = {{ type = "http", path = "/health", interval_ms = {settings.interval_ms}, \
timeout_ms = 400, rise = 2 }}
retry = {{ attempts = {settings.attempts}, on = [{causes}], \
per_try_timeout_ms = {settings.per_try_timeout_ms} }}
[pools.outlier]
consecutive_failures = {settings.consecutive_failures}
ejection_ms = {settings.ejection_ms}
max_ejection_ms = {settings.max_ejection_ms}
panic_threshold_percent = {rules.panic_percent}
count_5xx = {"true" if rules.is_5xx_counted else "false"}
"""
    return text


_SAMPLE: Final = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def parse_metrics(text: str) -> Metrics:
    found: Metrics = {}
    for line in text.splitlines():
        if (match := _SAMPLE.fullmatch(line)) is not None:
            found[match[1], frozenset(_LABEL.findall(match[2] or ""))] = float(match[3])
    return found


def total(metrics: Metrics, family: str, **labels: str) -> float:
    """The sum of the samples that have these labels."""
    wanted = set(labels.items())
    return sum(value for (name, has), value in metrics.items() if name == family and wanted <= has)


def by_label(metrics: Metrics, family: str, label: str, **labels: str) -> dict[str, float]:
    """The samples that have these labels, summed by one more."""
    wanted = set(labels.items())
    found: dict[str, float] = {}
    for (name, has), value in metrics.items():
        if name == family and wanted <= has and (key := dict(has).get(label)) is not None:
            found[key] = found.get(key, 0.0) + value
    return found


@dataclass
class World:
    """What runs. `settings` are those of the gateway."""

    directory: Path
    settings: Settings
    backends: dict[str, FaultyBackend]
    ports: dict[str, int]
    admin: int
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def victim(self) -> FaultyBackend:
        return self.backends[VICTIM]

    @property
    def log_path(self) -> Path:
        return self.directory / "gateway.log"

    def start_gateway(self) -> None:
        path = self.directory / "gateway.toml"
        addresses = {name: backend.address for name, backend in self.backends.items()}
        path.write_text(config(self.settings, addresses, self.ports, self.admin), "ascii")
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [find_program(GATEWAY), str(path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "LB_LOG_FORMAT": "json", "LB_LOG_LEVEL": "info"},
            )
        wait_for(self.admin, "/readyz", self.process, "the gateway")

    def stop_all(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for backend in self.backends.values():
            backend.kill()

    def metrics(self) -> Metrics:
        return parse_metrics(ask(self.admin, "GET", "/metrics")[1])

    def api(self, method: str, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
        """One request to the admin API: status and answer."""
        status, text = ask(self.admin, method, f"/api/v1/{path}", body, timeout_s=30.0)
        answer: dict[str, Any] = json.loads(text)
        return status, answer

    def state(self, pool: str, name: str) -> dict[str, Any]:
        """A backend as the admin API shows it."""
        return self.api("GET", f"pools/{pool}/backends/{name}")[1]

    def events(self) -> Iterator[dict[str, Any]]:
        """The lines of the gateway's log, each with `at`, seconds of wall time."""
        for line in self.log_path.read_text("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and "time" in event:
                    event["at"] = datetime.datetime.fromisoformat(event["time"]).timestamp()
                    yield event


@contextlib.contextmanager
def world(directory: Path, settings: Settings) -> Iterator[World]:
    """Everything up; leaving it, for whatever reason, ends all of it."""
    *backend_ports, admin = free_ports(len(NAMES) + 1)
    backends = {name: FaultyBackend(name, port) for name, port in zip(NAMES, backend_ports, strict=True)}
    ports = dict(zip(settings.pools, free_ports(len(settings.pools)), strict=True))
    here = World(directory, settings, backends, ports, admin)
    try:
        for backend in backends.values():
            backend.start()
        here.start_gateway()
        yield here
    finally:
        here.stop_all()


@dataclass(frozen=True)
class Load:
    """What wrk saw. A *failure* is an answer that is none of success, or none at all."""

    requests: int
    seconds: float
    p50_us: float
    p99_us: float
    max_us: float
    errors: Mapping[str, int]
    """By kind: status, connect, read, write, timeout; those that happened."""

    @property
    def failures(self) -> int:
        return sum(self.errors.values())


def parse_load(output: str) -> Load:
    """Reads the line that the script wrote. Raises UnavailableError without one."""
    found = re.search(r"^RESULT (\{.*\})$", output, re.MULTILINE)
    if found is None:
        raise UnavailableError(f"wrk wrote no result: {output.strip()[-200:]!r}")
    said = json.loads(found[1])
    kinds = ("status", "connect", "read", "write", "timeout")
    return Load(
        said["requests"],
        said["microseconds"] / 1e6,
        said["p50"],
        said["p99"],
        said["max"],
        {kind: said[kind] for kind in kinds if said[kind]},
    )


@contextlib.contextmanager
def wrk(
    port: int, directory: Path, seconds: int, *, pause_ms: int, connections: int = CONNECTIONS
) -> Iterator[subprocess.Popen[str]]:
    """wrk at work; `result` waits for what it says. It does not outlive the block."""
    script = directory / "outage.lua"
    script.write_text(LUA.replace("%PAUSE_MS%", str(pause_ms)), "ascii")
    command = [find_program("wrk"), "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s"]
    process = subprocess.Popen(
        [*command, "-s", str(script), f"http://127.0.0.1:{port}/"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def result(process: subprocess.Popen[str], timeout_s: float) -> Load:
    """What wrk says at its end. Raises UnavailableError."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise UnavailableError("wrk did not end") from None
    return parse_load(output)
