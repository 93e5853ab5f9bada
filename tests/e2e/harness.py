"""The running gateway, raw clients and scripted backends for end-to-end tests.

Nothing here sleeps: a test waits for bytes, for an answer, for a metric to reach a value (asked again and
again, with a bound), or for a process to end. Ports are free ones; everything is on loopback.
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from expressgateway.demo.certificate import CertificateFiles, make_certificate, write_certificate
from tests.ports import free_port

PATIENCE_S = 60.0
"""A wait that takes longer has failed. All takes a fraction of it, but the machine has other things to do."""


def need(*programs: str) -> pytest.MarkDecorator:
    """Skip by name where a program is missing; in CI (``CI=true``) the test then fails instead."""
    missing = [program for program in programs if shutil.which(program, path=_PATH) is None]
    wanted = bool(missing) and os.environ.get("CI") != "true"
    return pytest.mark.skipif(wanted, reason=f"needs {', '.join(missing) or 'nothing more'}")


_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def program(name: str) -> str:
    """The path of a peer. Debian keeps servers in /usr/sbin, which not everybody has in PATH."""
    found = shutil.which(name, path=_PATH)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed")
    return found


def eventually(check: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    """Ask until it is true; less and less often, for asking takes time from who is asked."""
    ends = time.monotonic() + patience_s
    pause_s = 0.005
    while not check():
        if time.monotonic() > ends:
            raise AssertionError(f"not within {patience_s} s: {what}")
        threading.Event().wait(pause_s)
        pause_s = min(1.2 * pause_s, 0.03)


def certificate(directory: Path, *names: str, stem: str = "server") -> CertificateFiles:
    """A self-signed certificate for localhost and ``names``, as files."""
    return write_certificate(directory, make_certificate(*names), stem)


class Gateway:
    """``expressgateway CONFIG`` as a process. ``config`` is TOML; ``{port}`` and the like are filled in."""

    def __init__(self, directory: Path, config: str, *, workers: int = 1, runtime: str = "") -> None:
        """``runtime``: more lines for the ``[runtime]`` block."""
        self.directory = directory
        self.path = directory / "gateway.toml"
        self.admin = free_port()
        self.log_path = directory / "gateway.log"
        self.interpreter = sys.executable
        self.environment = {**os.environ, "LB_LOG_FORMAT": "json", "LB_LOG_LEVEL": "info"}
        self._counted: dict[tuple[str, str], float] = {}
        """What the counters were when the present test began."""
        self._log_begins = 0
        self._head = (
            f"[runtime]\nworkers = {workers}\n"
            + ("" if "readiness_settle_ms" in runtime else "readiness_settle_ms = 0\n")
            + ("" if "drain_timeout_ms" in runtime else "drain_timeout_ms = 2000\n")
            + ("" if "handshake_timeout_ms" in runtime else "handshake_timeout_ms = 60000\n")
            + ("" if "connect_timeout_ms" in runtime else "connect_timeout_ms = 60000\n")
            + ("" if "drain_jitter_ms" in runtime else "drain_jitter_ms = 0\n")
            + f"{runtime}\n[observability]\nmetrics_bind = '127.0.0.1:{self.admin}'\n"
        )
        self.write(config)

    def write(self, config: str) -> None:
        self.path.write_text(self._head + config)

    def __enter__(self) -> Self:
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [self.interpreter, "-m", "expressgateway", str(self.path)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self.environment,
            )
        try:
            eventually(self._is_ready, "the gateway is ready")
        except BaseException:
            self.abandon()
            raise
        return self

    def abandon(self) -> None:
        """It did not start: nothing of it may be left to others."""
        self.process.kill()
        self.process.wait()

    def _is_ready(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"the gateway ended: {self.log()}")
        try:
            return self.ask("/readyz")[0] == 200
        except OSError:
            return False

    def __exit__(self, kind: object, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"the gateway did not stop: {self.log()}") from None
        if kind is None:
            self.is_sound()

    def is_sound(self) -> None:
        """It told of no defect of its own."""
        assert "Traceback" not in self.log(), self.log()
        assert "this is a defect" not in self.log(), self.log()

    def log(self) -> str:
        """Since the start, or since it was lent last."""
        return self.log_path.read_bytes()[self._log_begins :].decode(errors="replace")

    def ask(self, path: str) -> tuple[int, str]:
        """GET from the admin listener."""
        connection = http.client.HTTPConnection("127.0.0.1", self.admin, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a family's samples that have these labels; 0 if there are none."""
        total = 0.0
        for (family, text), value in self._samples().items():
            found = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', text)) if family == name else {}
            if family == name and labels.items() <= found.items():
                total += value - self._counted.get((family, text), 0)
        return total

    def _samples(self) -> dict[tuple[str, str], float]:
        """Values by family and labels, as they are told."""
        lines = (
            re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line) for line in self.ask("/metrics")[1].splitlines()
        )
        return {(match[1], match[2] or ""): float(match[3]) for match in lines if match is not None}

    def wait_metric(self, name: str, at_least: float = 1, **labels: str) -> None:
        eventually(lambda: self.metric(name, **labels) >= at_least, f"{name}{labels} >= {at_least}")

    def worker_pids(self) -> list[int]:
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def reload(self, config: str) -> bool:
        """Write another configuration, have it read, and wait for the outcome: whether it was applied."""
        before = self._reloads()
        self.write(config)
        self.process.send_signal(signal.SIGHUP)
        eventually(lambda: self._reloads() > before, "the reload is over")
        return self.metric("config_last_reload_successful") == 1

    def lend(self, config: str) -> bool:
        """Go on with another configuration, counters from zero and an empty log. Whether it was applied."""
        eventually(lambda: not self.metric("connections_inflight"), "the clients before are gone")
        eventually(lambda: not self.metric("backend_inflight"), "and what they had asked")
        self._counted = {key: value for key, value in self._samples().items() if _is_counter(key[0])}
        self._log_begins = self.log_path.stat().st_size
        if not self.reload(config):
            return False
        eventually(lambda: not self.metric("pool_connections"), "the backends before are gone")
        return True

    def _reloads(self) -> int:
        finished: int = json.loads(self.ask("/api/v1/status")[1])["reload"]["finished"]
        return finished


def _is_counter(family: str) -> bool:
    return family.endswith(("_total", "_bucket", "_count", "_sum"))


class House:
    """A module's gateways, one at a time. Who wants one with the ``[runtime]`` of the one before gets that
    one, reloaded: it takes a tenth of the time of a start. Not for tests that look at what a process keeps:
    its memory, its descriptors, and lines that are logged once in a while.
    """

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        """For the listener: one that is moved needs a start."""
        self._directory = directory
        self._open: Gateway | None = None
        self._kind: tuple[str, int] = ("", 0)
        self._starts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.leave(kind)

    @contextlib.contextmanager
    def gateway(self, config: str, *, workers: int = 1, runtime: str = "") -> Iterator[Gateway]:
        gateway = self._open
        if gateway is None or self._kind != (runtime, workers) or not gateway.lend(config):
            self.leave(None)
            self._starts += 1
            directory = self._directory / str(self._starts)
            directory.mkdir()
            gateway = Gateway(directory, config, workers=workers, runtime=runtime).__enter__()
            self._open, self._kind = gateway, (runtime, workers)
        try:
            yield gateway
        except BaseException as error:
            self.leave(type(error))
            raise
        gateway.is_sound()

    def leave(self, kind: object = None) -> None:
        """The next test has a new one."""
        if self._open is not None:
            gateway, self._open = self._open, None
            gateway.__exit__(kind)


class Client:
    """A raw TCP (or TLS) client."""

    def __init__(
        self,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        sni: str = "localhost",
        host: str = "127.0.0.1",
        source: str = "",
    ) -> None:
        """``source``: the local address to connect from."""
        local = (source, 0) if source else None
        sock = socket.create_connection((host, port), timeout=PATIENCE_S, source_address=local)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock: socket.socket = tls.wrap_socket(sock, server_hostname=sni) if tls else sock
        self.buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def until(self, part: bytes) -> bytes:
        """Read up to and with ``part``; fails on an early end."""
        while part not in self.buffer:
            data = self.sock.recv(65536)
            if not data:
                raise AssertionError(f"the connection ended; got {self.buffer!r}")
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(part)
        return head + part

    def exactly(self, size: int) -> bytes:
        while len(self.buffer) < size:
            data = self.sock.recv(65536)
            if not data:
                raise AssertionError(f"the connection ended; got {self.buffer!r}")
            self.buffer += data
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def rest(self) -> bytes:
        """Everything until the gateway closes. A reset counts as an end."""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while data := self.sock.recv(65536):
                self.buffer += data
        data, self.buffer = self.buffer, b""
        return data

    def response(self, *, head_only: bool = False) -> tuple[int, dict[str, str], bytes]:
        """One response: status, headers (lower-case, the last of duplicates), body."""
        head = self.until(b"\r\n\r\n").decode("latin-1")
        lines = head.split("\r\n")
        status = int(lines[0].split(" ")[1])
        headers = {}
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            if colon:
                headers[name.lower()] = value.strip()
        if head_only or status < 200 or status in (204, 304):
            return status, headers, b""
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.until(b"\r\n").split(b";")[0], 16):
                body += self.exactly(size)
                self.exactly(2)
            while self.until(b"\r\n") != b"\r\n":
                pass
            return status, headers, body
        if "content-length" in headers:
            return status, headers, self.exactly(int(headers["content-length"]))
        return status, headers, self.rest()

    def is_closed(self) -> bool:
        """Whether the gateway ends the connection without another byte (waits for it)."""
        return self.rest() == b""


class Steady:
    """A well-behaved client: one keep-alive connection, request after request in a thread of its own.

    It must be served whatever happens meanwhile: leaving the block fails if an answer was wrong or slow, or
    if the connection was closed. The gateway needs ``max_keepalive_requests = 0``.
    """

    def __init__(
        self,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        body: bytes = b"backend",
        source: str = "",
        slowest_s: float = 5.0,
    ) -> None:
        self._client = Client(port, tls=tls, source=source)
        self._body = body
        self._limit_s = slowest_s
        self._stop = threading.Event()
        self._failure = ""
        self.served = 0
        self.slowest_s = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._ask()  # served before the trouble begins
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)
        if kind is None:
            assert not self._failure, self._failure
            self._ask()  # and after it
            assert self.slowest_s < self._limit_s, f"an answer took {self.slowest_s} s"
        self._client.sock.close()

    def _ask(self) -> None:
        asked = time.monotonic()
        self._client.send(b"GET /good HTTP/1.1\r\nHost: good.example\r\n\r\n")
        status, _, body = self._client.response()
        assert (status, body) == (200, self._body), (status, body)
        self.served += 1
        self.slowest_s = max(self.slowest_s, time.monotonic() - asked)

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.005):
                self._ask()
        except (OSError, AssertionError) as error:
            self._failure = f"the good client, after {self.served} answers: {error!r}"


def resident_kib(pid: int) -> int:
    """A process's resident memory."""
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1])


def descriptors(pid: int) -> int:
    """How many file descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def listener(
    port: int, backend: "Backend | str", more: str = "", *, name: str = "web", protocol: str = "h1"
) -> str:
    """A listener with one backend, as TOML; ``more`` are further lines of its block."""
    address = backend if isinstance(backend, str) else backend.address
    return (
        f"[[listeners]]\nname = '{name}'\naddress = '127.0.0.1:{port}'\nprotocol = '{protocol}'\n"
        f"backends = [{{ address = '{address}' }}]\n{more}\n"
    )


Script = Callable[["BackendConnection"], None]


class BackendConnection(Client):
    """A backend's end of a connection from the gateway."""

    def __init__(self, sock: socket.socket, backend: "Backend", number: int) -> None:
        sock.settimeout(PATIENCE_S)
        self.sock = sock
        self.buffer = b""
        self.backend = backend
        self.number = number
        """Counts the backend's connections from 1."""

    def request(self) -> tuple[bytes, bytes]:
        """One request: head with its blank line, and body. Raises ``EOFError`` at the end."""
        while b"\r\n\r\n" not in self.buffer:
            data = self.sock.recv(65536)
            if not data:
                raise EOFError
            self.backend.received.append(data)
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        lower = head.lower()
        if b"transfer-encoding: chunked" in lower:
            body = b""
            while size := int(self.until(b"\r\n"), 16):
                body += self.exactly(size)
                self.exactly(2)
            while self.until(b"\r\n") != b"\r\n":
                pass
            return head + b"\r\n\r\n", body
        match = re.search(rb"content-length: (\d+)", lower)
        return head + b"\r\n\r\n", self.exactly(int(match[1])) if match else b""


def answer_ok(connection: BackendConnection) -> None:
    """Answer every request with 200 and the backend's name, and remember it."""
    while True:
        head, body = connection.request()
        connection.backend.requests.append((head, body))
        text = connection.backend.name.encode()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text))


class Backend:
    """A scripted TCP backend: ``script`` runs in a thread for each connection and may do anything."""

    def __init__(
        self, script: Script = answer_ok, name: str = "backend", tls: ssl.SSLContext | None = None
    ) -> None:
        self.name = name
        self.script = script
        self.requests: list[tuple[bytes, bytes]] = []
        self.received: list[bytes] = []
        """Raw bytes, as they came."""
        self.connections = 0
        self._tls = tls
        self._sock = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._sock.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self._open: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE_S)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._sock.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(sock, self.connections), daemon=True).start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError, EOFError, AssertionError, ValueError):
            if self._tls is not None:
                sock.settimeout(PATIENCE_S)
                sock = self._tls.wrap_socket(sock, server_side=True)
            self._open.add(sock)
            with sock:
                self.script(BackendConnection(sock, self, number))
        self._open.discard(sock)
        sock.close()


def run(*command: str, stdin: bytes = b"", check: bool = True) -> str:
    """Run a peer's program to its end; gives what it printed on both outputs."""
    done = subprocess.run(
        [program(command[0]), *command[1:]], input=stdin, capture_output=True, timeout=60, check=False
    )
    output = (done.stdout + done.stderr).decode(errors="replace")
    if check:
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{output}"
    return output


@contextlib.contextmanager
def server(*command: str, port: int) -> Iterator[subprocess.Popen[Any]]:
    """Run a peer as a server until the block ends; waits until its port accepts."""
    process = subprocess.Popen(
        [program(command[0]), *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

    def is_up() -> bool:
        if process.poll() is not None:
            output = process.stdout.read().decode(errors="replace") if process.stdout else ""
            raise AssertionError(f"{command[0]} ended: {output}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    try:
        eventually(is_up, f"{command[0]} accepts")
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        if process.stdout:
            process.stdout.close()
