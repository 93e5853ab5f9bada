"""What `bench.rolling` runs: backends, the gateway before them, and its configuration, which changes.

`State` is the configuration as values; `toml` writes it. `Gateway` is the process - after an upgrade another
one - and what it is asked. Nothing here decides what is changed when.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.handshakes import client_context
from bench.outage_world import ROOT, ask, parse_metrics, total
from bench.peers import GATEWAY, UnavailableError, find_program
from bench.world import Site, make_certificate

PATIENCE_S: Final = 60.0
STOP_S: Final = 5.0
FIXED: Final = ("web", "secure", "h3", "plain", "datagrams", "streams")
"""Listeners that stay where they are."""


@dataclass
class State:
    """The configuration, as far as it changes."""

    weights: tuple[int, int] = (1, 1)
    policy: str = "round_robin"
    has_route: bool = False
    total_timeout_ms: int = 60_000
    min_version: str = "1.2"
    has_pool: bool = False
    workers: int = 2
    user: str | None = None
    admin: int = 0
    has_passthrough: bool = False
    spare_port: int = 0
    """Of a listener that comes, moves and goes; 0: it is not there."""
    spare_protocol: str = "h1"
    turning_name: str = "turning"
    """Of a listener under load, which is another one now and then, on the same port."""
    turning_protocol: str = "h1"
    drain_timeout_ms: int = 300_000


@dataclass(frozen=True)
class Places:
    """Ports: of listeners by name, of backends by kind."""

    listeners: dict[str, int]
    backends: dict[str, int]
    passthrough: int


def toml(state: State, site: Site, places: Places, directory: Path) -> str:
    back = places.backends
    protocols = {
        "web": "h1",
        "secure": "h1s",
        "h3": "quic",
        "plain": "tcp",
        "datagrams": "udp",
        "streams": "h1",
    }
    user = f'user = "{state.user}"\n' if state.user else ""
    text = f"""\
[runtime]
workers = {state.workers}
{user}max_keepalive_requests = 0
per_ip_connection_cap = 100000
readiness_settle_ms = 0
drain_timeout_ms = {state.drain_timeout_ms}
drain_jitter_ms = 500
tls = {{ min_version = "{state.min_version}" }}
[observability]
metrics_bind = "127.0.0.1:{state.admin}"
"""
    if state.has_passthrough:
        text += f"""
[passthrough]
bind_addr = "127.0.0.1:{places.passthrough}"
backends = ["127.0.0.1:{back["udp"]}"]
"""
    for name in FIXED:
        text += f"""
[[listeners]]
name = "{name}"
address = "127.0.0.1:{places.listeners[name]}"
protocol = "{protocols[name]}"
"""
        match name:
            case "plain":
                text += f'backends = [{{ address = "127.0.0.1:{back["tcp"]}" }}]\n'
                continue
            case "datagrams":
                text += f'backends = [{{ address = "127.0.0.1:{back["udp"]}" }}]\n'
                continue
            case "streams":
                text += f'backends = [{{ address = "127.0.0.1:{back["websocket"]}" }}]\nwebsocket = {{}}\n'
                continue
        text += f"""\
pool = "web"
http = {{ total_timeout_ms = {state.total_timeout_ms} }}
"""
        routes = [("slow", "/slow")]
        if name == "secure":
            text += f'tls = {{ cert_path = "{site.cert_path}", key_path = "{site.key_path}" }}\ngrpc = {{}}\n'
            routes.append(("grpc", "/bench.Echo"))
        if name == "h3":
            text += (
                f'quic = {{ cert_path = "{site.cert_path}", key_path = "{site.key_path}", '
                f'retry_secret_path = "{directory}/retry.secret" }}\n'
            )
        if state.has_route:
            routes.append(("web", "/another"))
        for pool, prefix in routes:
            text += f'[[listeners.routes]]\nmatch = {{ path_prefix = "{prefix}" }}\npool = "{pool}"\n'
    turning = [(state.turning_name, places.listeners["turning"], state.turning_protocol)]
    spare = [("spare", state.spare_port, state.spare_protocol)] if state.spare_port else []
    for name, port, protocol in turning + spare:
        text += f"""
[[listeners]]
name = "{name}"
address = "127.0.0.1:{port}"
protocol = "{protocol}"
backends = [{{ address = "127.0.0.1:{site.backend_port}" }}]
"""
    backends = ", ".join(
        f'{{ address = "127.0.0.1:{port}", weight = {weight} }}'
        for port, weight in zip((site.backend_port, site.sink_port), state.weights, strict=True)
    )
    text += f"""
[[pools]]
name = "web"
backends = [{backends}]
load_balancing = {{ policy = "{state.policy}" }}
[[pools]]
name = "slow"
backends = [{{ address = "127.0.0.1:{back["slow"]}" }}]
[[pools]]
name = "grpc"
backends = [{{ address = "127.0.0.1:{back["grpc"]}", protocol = "h2" }}]
"""
    if state.has_pool:
        text += f'[[pools]]\nname = "more"\nbackends = [{{ address = "127.0.0.1:{site.sink_port}" }}]\n'
    return text


def until(check: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    """Ask until it is true. Raises UnavailableError."""
    ends = time.monotonic() + patience_s
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            if check():
                return
        if time.monotonic() > ends:
            raise UnavailableError(f"not within {patience_s:.0f} seconds: {what}")
        time.sleep(0.02)


def answers(port: int) -> bool:
    """Whether an HTTP/1.1 request is answered there."""
    try:
        return ask(port, "GET", "/small")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def certificate_at(port: int) -> bytes:
    """What a TLS listener shows, in DER."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        client_context().wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        return secure.getpeercert(binary_form=True) or b""


@dataclass
class Gateway:
    """The one that serves."""

    directory: Path
    site: Site
    places: Places
    state: State
    pid: int = 0
    processes: list[int] = field(default_factory=list)
    """Of every supervisor so far; the first is a child of ours, and those after it of one another."""

    @property
    def path(self) -> Path:
        return self.directory / "gateway.toml"

    @property
    def log_path(self) -> Path:
        return self.directory / "gateway.log"

    @property
    def roots_path(self) -> Path:
        """Every certificate so far."""
        return self.directory / "roots.pem"

    def start(self) -> None:
        """Raises UnavailableError."""
        self.write()
        self.roots_path.write_bytes(self.site.cert_path.read_bytes())
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [find_program(GATEWAY), str(self.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "LB_LOG_FORMAT": "json", "LB_LOG_LEVEL": "info"},
            )
        self._is_serving(self._process.pid)

    def _is_serving(self, pid: int) -> None:
        def check() -> bool:
            if not is_alive(pid):
                raise UnavailableError(f"the gateway has ended; see {self.log_path}")
            status = self.status()
            return bool(status["pid"] == pid and status["state"] == "serving")

        until(check, f"process {pid} serves")
        self.pid = pid
        self.processes.append(pid)

    def status(self) -> dict[str, Any]:
        code, text = ask(self.state.admin, "GET", "/api/v1/status")
        if code != 200:
            raise ValueError(f"the admin API answers {code}")
        found: dict[str, Any] = json.loads(text)
        return found

    def write(self) -> None:
        self.path.write_text(toml(self.state, self.site, self.places, self.directory), "utf-8")

    def reload(self) -> None:
        """Have it use `state`, and wait for that. Raises UnavailableError if it does not."""
        self.write()
        before = self._count_lines("reload ")
        os.kill(self.pid, signal.SIGHUP)
        # Not by the admin API, which may move.
        until(lambda: self._count_lines("reload ") > before, "the reload is answered")
        line = self.lines("reload ")[-1]
        if line.get("result") != "applied":
            raise UnavailableError(f"the reload was not applied: {line['message'].splitlines()[0]}")

    def lines(self, part: str) -> list[dict[str, Any]]:
        found = []
        for line in self.log_path.read_text("utf-8", "replace").splitlines():
            if f'"{part}' in line:
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def _count_lines(self, part: str) -> int:
        return self.log_path.read_text("utf-8", "replace").count(f'"{part}')

    def renew(self, *, by_signal: bool) -> None:
        """Another certificate. Raises UnavailableError if it is not used in time."""
        port = self.places.listeners["secure"]
        before = certificate_at(port)
        fresh = self.directory / "fresh"
        fresh.mkdir(exist_ok=True)
        cert_path, key_path, _ = make_certificate(fresh, f"renewed at {time.monotonic()}")
        with self.roots_path.open("ab") as roots:  # clients trust it before it is used
            roots.write(cert_path.read_bytes())
        key_path.replace(self.site.key_path)
        cert_path.replace(self.site.cert_path)
        if by_signal:
            os.kill(self.pid, signal.SIGUSR1)
        until(lambda: certificate_at(port) != before, "the new certificate is used")

    def upgrade(self) -> None:
        """Raises UnavailableError if no other process takes over."""
        before = self.pid
        os.kill(before, signal.SIGUSR2)

        def check() -> bool:
            status = self.status()
            return bool(status["pid"] != before and status["state"] == "serving")

        until(check, "another process serves")
        self.pid = int(self.status()["pid"])
        self.processes.append(self.pid)

    def drain(self) -> float:
        """Have it end: how long that took. Raises UnavailableError if it does not."""
        began = time.monotonic()
        os.kill(self.pid, signal.SIGTERM)
        until(lambda: not is_alive(self.pid), "it has ended")
        return time.monotonic() - began

    def is_alone(self) -> bool:
        """Whether all workers and supervisors of before have gone."""
        metrics = parse_metrics(ask(self.state.admin, "GET", "/metrics")[1])
        is_last = not any(is_alive(pid) for pid in self.processes if pid != self.pid)
        return is_last and total(metrics, "workers_leaving") == 0

    def faults(self) -> list[str]:
        """Lines of its log that tell of a defect."""
        text = self.log_path.read_text("utf-8", "replace")
        words = ("Traceback", "this is a defect", '"level": "critical"')
        return [line for line in text.splitlines() if any(word in line for word in words)]

    def end(self) -> None:
        """Whatever is left, at once: the second signal is for that."""
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            left = [pid for pid in self.processes if is_alive(pid)]
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            ends = time.monotonic() + STOP_S
            while any(map(is_alive, left)) and time.monotonic() < ends and number != signal.SIGKILL:
                time.sleep(0.05)
        with contextlib.suppress(AttributeError, subprocess.TimeoutExpired):
            self._process.wait(10)


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def start_module(name: str, *arguments: str, has_output: bool = True) -> "subprocess.Popen[str]":
    """``has_output``: its input and its output are pipes."""
    piped = subprocess.PIPE if has_output else subprocess.DEVNULL
    return subprocess.Popen(
        [sys.executable, "-m", name, *arguments],
        cwd=ROOT,
        stdin=piped,
        stdout=piped,
        text=True,
    )
