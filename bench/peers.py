"""The programs of the bench: where they are, which version, started and stopped.

A *program* runs as one process tree, with its configuration, log and scratch files in a directory of its own.
It counts as started when it answers a request through every port, and is stopped by the ids of its own
processes.
"""

import contextlib
import http.client
import importlib.util
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import configs
from bench.measure import Cores, pin, running_on, tree
from bench.world import Ports, free_ports, make_site

GATEWAY: Final = "gateway"
PROXIES: Final = ("nginx", "haproxy", "envoy", GATEWAY)
START_TIMEOUT_S: Final = 20.0
STOP_TIMEOUT_S: Final = 6.0
STREAM_MODULES: Final = (
    "/usr/lib/nginx/modules/ngx_stream_module.so",
    "/usr/lib64/nginx/modules/ngx_stream_module.so",
)


class UnavailableError(Exception):
    """A program is missing, or did not start; the message says which and why."""


def find_program(name: str) -> str:
    """The path of the program behind a proxy's name. Raises UnavailableError."""
    base = "expressgateway" if name == GATEWAY else name
    beside_python = Path(sys.executable).parent / base
    if name == "envoy":
        # The package's own command is a Python program that starts the binary: we want the binary alone.
        spec = importlib.util.find_spec("envoy")
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (binary := Path(folder) / "_bin" / "envoy").exists():
                return str(binary)
    if beside_python.exists():
        return str(beside_python)
    found = shutil.which(base) or shutil.which(base, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise UnavailableError(f"{base} is not installed")
    return found


def find_stream_module() -> str | None:
    """nginx's TCP proxying is a module and, in Debian, a package of its own; None when it is not there."""
    return next((path for path in STREAM_MODULES if Path(path).exists()), None)


def program_version(name: str) -> str:
    """One line that names the program and its version, or why there is none."""
    flag = {"nginx": "-v", "haproxy": "-v", "wrk": "-v"}.get(name, "--version")
    try:
        program = find_program(name)
        done = subprocess.run([program, flag], capture_output=True, text=True, timeout=20, check=False)
    except (UnavailableError, OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if not lines or (done.returncode != 0 and name != "wrk"):  # wrk ends with 1 after it has told its version
        return "version unknown"
    return lines[0].replace(program, name)


@dataclass
class Program:
    """A started program."""

    name: str
    process: subprocess.Popen[bytes]
    ports: Ports
    directory: Path

    def log_tail(self) -> str:
        """The last line it wrote that is not empty."""
        with contextlib.suppress(OSError):
            lines = (self.directory / "output.log").read_text("utf-8", "replace").split("\n")
            said = [line.strip() for line in lines if line.strip()]
            return said[-1][:300] if said else "it wrote nothing"
        return "its log cannot be read"

    def stop(self) -> None:
        """SIGTERM, a while to leave, then SIGKILL to what is left of the tree."""
        pids = tree(self.process.pid)
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pid in pids:
            # An id may belong to somebody else by now: ours are those still in the session we made for them.
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) == self.process.pid:
                    os.kill(pid, signal.SIGKILL)


def answer_of(
    port: int, path: str = "/small", *, tls: bool = False, timeout_s: float = 5.0
) -> tuple[int, int]:
    """Status and body length of one GET. Raises OSError or http.client.HTTPException."""
    connection: http.client.HTTPConnection
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=timeout_s, context=context)
    else:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, len(answer.read())


def _wait_until_serving(program: Program) -> None:
    ports = program.ports
    wanted = [
        (port, port in (ports.https, ports.h2))
        for port in (ports.http, ports.https, ports.tcp, ports.h2)
        if port
    ]
    deadline = time.monotonic() + START_TIMEOUT_S
    problem = ""
    while wanted:
        if program.process.poll() is not None:
            code = program.process.returncode
            raise UnavailableError(
                f"{program.name} ended with {code} instead of serving: {program.log_tail()}"
            )
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"{program.name} does not serve: {problem}; its last words: {program.log_tail()}"
            )
        port, tls = wanted[0]
        try:
            status, _ = answer_of(port, tls=tls)
            problem = f"port {port} answers {status}"
            if status == 200:
                wanted.pop(0)
                continue
        except (OSError, http.client.HTTPException) as error:
            problem = f"port {port}: {error}"
        time.sleep(0.05)


def start(command: list[str], name: str, ports: Ports, directory: Path, cores: frozenset[int]) -> Program:
    """Starts a command, in a session of its own, and waits until it serves. Raises UnavailableError."""
    with (directory / "output.log").open("wb") as log, running_on(cores):
        try:
            process = subprocess.Popen(
                command,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            raise UnavailableError(f"{name} cannot be run: {error}") from error
    program = Program(name, process, ports, directory)
    try:
        _wait_until_serving(program)
        pin(process.pid, cores)  # whatever it thought of its cores itself
    except BaseException:
        program.stop()
        raise
    return program


class Rack:
    """Starts programs for one site and remembers how to stop them. `stop_all` may be called at any time."""

    def __init__(self, directory: Path, cores: Cores) -> None:
        self.cores = cores
        self.directory = directory
        self.site = make_site(directory)
        self._running: list[Program] = []
        self._started = 0

    def _fresh_directory(self, name: str) -> Path:
        self._started += 1
        directory = self.directory / f"{self._started}-{name}"
        directory.mkdir()
        return directory

    def _launch(
        self, name: str, command: list[str], ports: Ports, directory: Path, cores: frozenset[int]
    ) -> Program:
        program = start(command, name, ports, directory, cores)
        self._running.append(program)
        return program

    def start_backend(self) -> Program:
        """nginx on the load's cores."""
        directory = self._fresh_directory("backend")
        config = directory / "nginx.conf"
        config.write_text(configs.backend_conf(self.site, directory), "ascii")
        command = [find_program("nginx"), "-p", str(directory), "-c", str(config)]
        return self._launch("backend", command, Ports(self.site.backend_port), directory, self.cores.load)

    def start_proxy(
        self,
        name: str,
        *,
        tuned: bool = False,
        workers: int = 1,
        cores: frozenset[int] | None = None,
        more: str = "",
    ) -> Program:
        """One proxy, on the proxy's core unless told otherwise; ``more`` is added to the gateway's
        configuration. Raises UnavailableError."""
        binary = find_program(name)
        directory = self._fresh_directory(name)
        http_port, https_port, tcp_port, full_port, h2_port, held_port, h3_port = free_ports(7)
        stream_module = find_stream_module() if name == "nginx" else None
        has_tcp = name != "nginx" or stream_module is not None
        ports = Ports(
            http_port,
            https_port,
            tcp_port if has_tcp else None,
            full_port if name == GATEWAY else None,
            h2_port if name != "nginx" else None,  # it has no HTTP/2 to backends
            held_port,
            h3_port if name in ("envoy", GATEWAY) else None,  # Debian builds the others without QUIC
        )
        config = directory / {"envoy": "envoy.json", GATEWAY: "gateway.toml"}.get(name, f"{name}.conf")
        match name:
            case "nginx":
                text = configs.nginx_conf(
                    self.site, ports, directory, workers=workers, tuned=tuned, stream_module=stream_module
                )
                command = [binary, "-p", str(directory), "-c", str(config)]
            case "haproxy":
                text = configs.haproxy_cfg(self.site, ports, tuned=tuned)
                command = [binary, "-db", "-f", str(config)]
            case "envoy":
                text = configs.envoy_json(self.site, ports)
                quiet = ["--disable-hot-restart", "--log-level", "error"]
                command = [binary, "-c", str(config), "--concurrency", str(workers), *quiet]
            case _:
                text = configs.gateway_toml(self.site, ports, workers=workers, directory=directory, more=more)
                command = [binary, str(config)]
        config.write_text(text, "ascii")
        return self._launch(name, command, ports, directory, cores or self.cores.proxy)

    def stop(self, program: Program) -> None:
        """Stops one program before the others."""
        program.stop()
        self._running.remove(program)

    def stop_all(self) -> None:
        """Stops everything, the last started first; what fails to stop does not keep the rest alive."""
        while self._running:
            program = self._running.pop()
            try:
                program.stop()
            except OSError as error:
                print(f"could not stop {program.name} ({program.process.pid}): {error}", file=sys.stderr)


@contextlib.contextmanager
def rack(cores: Cores) -> Iterator[Rack]:
    """A rack in a temporary directory; leaving it, for whatever reason, stops all and removes the files."""

    def leave(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    endings = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {ending: signal.getsignal(ending) for ending in endings}
    for ending in endings:
        if before[ending] is not signal.SIG_IGN:  # as under nohup
            signal.signal(ending, leave)
    with tempfile.TemporaryDirectory(prefix="expressgateway-bench-") as name:
        shelf = Rack(Path(name), cores)
        try:
            yield shelf
        finally:
            for ending in endings:  # a second Ctrl-C must not leave half of them running
                signal.signal(ending, signal.SIG_IGN)
            shelf.stop_all()
            for ending, handler in before.items():
                signal.signal(ending, handler)
