"""What a scrape costs, and whom it holds up: ``python -m bench.scrape [--backends 1000] [--workers 8]``.

Two looks at the same thing. In this process, with the gateway's own classes and nothing else running: how
much CPU time one turn of a worker's report, and one turn of the supervisor's scrape, takes at most, when
every backend has changed and when none has. Then a real gateway, whose every worker has spoken with every
backend: how long ``/metrics`` takes to answer, and how long ``/livez`` does meanwhile. Prints Markdown.
"""

import argparse
import asyncio
import contextlib
import gc
import http.client
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from bench.world import free_ports
from expressgateway.control.admin.scrapes import Scrapes
from expressgateway.control.channel import Decoder, Message, encode
from expressgateway.control.ledger import Contribution, Ledger
from expressgateway.upstream.backend import BackendSettings
from expressgateway.upstream.pool import Pool
from expressgateway.worker.reports import Reporter, Source
from expressgateway.worker.samples import pool_sources

ROUNDS: Final = 7
PATIENCE_S: Final = 60.0


class _Clock:
    now = 0.0


class Timed(Reporter):
    """Notes how long each of its turns takes."""

    def __init__(
        self, sources: Callable[[], Iterator[Source]], send: Callable[[Message], None], turns_s: list[float]
    ) -> None:
        super().__init__(sources, send, lambda: {"open": {}})
        self._turns_s = turns_s

    def _turn(self) -> None:
        began = time.thread_time()
        super()._turn()
        self._turns_s.append(time.thread_time() - began)


class ModelWorker:
    """A worker's counters and reports, and the supervisor's end of them; no sockets."""

    def __init__(self, ledger: Ledger, backends: int) -> None:
        self.pool = Pool("p", lambda _: None, _Clock(), lambda *_: None)
        self.pool.replace(
            [
                (
                    BackendSettings(f"b{number}", "127.0.0.1", 1, "h1", 1, None, None),
                    ("127.0.0.1", 1),
                    f"b{number}",
                )
                for number in range(backends)
            ]
        )
        self.frames: list[bytes] = []
        self.counts: Contribution = ledger.join()
        self.decoder = Decoder()
        self.turns_s: list[float] = []
        """Of the report: how long each took."""
        self.reporter = Timed(self.sources, self._send, self.turns_s)

    def sources(self) -> Iterator[Source]:
        yield from pool_sources(self.pool)

    def _send(self, message: Message) -> None:
        self.frames.append(encode(message))

    def exchange(self) -> None:
        """One more exchange on each backend."""
        for backend in self.pool.backends:
            backend.leases += 1
            backend.responses[2] += 1
            for histogram in (backend.connect_durations, backend.head_durations, backend.durations):
                histogram.observe(0.003)

    async def report(self) -> None:
        self.reporter.ask(1)
        while self.reporter.is_busy:  # noqa: ASYNC110 - turns of the loop are what is measured
            await asyncio.sleep(0)
        for frame in self.frames:
            for message in self.decoder.feed(frame):
                self.counts.take(message)
            await asyncio.sleep(0)
        self.frames.clear()


async def modelled(backends: int, workers: int) -> list[tuple[str, str]]:
    """Rows: what, and how long."""
    ledger = Ledger()
    fleet = [ModelWorker(ledger, backends) for _ in range(workers)]

    async def collect() -> None:
        for worker in fleet:
            await worker.report()

    scrapes = Scrapes(ledger, collect, lambda: iter(()))
    longest = 0.0
    stop = False

    async def watch() -> None:
        nonlocal longest
        while not stop:
            began = time.thread_time()
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - began)

    for worker in fleet:
        worker.exchange()
    await scrapes.answer("")  # names every series
    gc.collect()
    gc.freeze()
    rows = []
    for what, change in (("all backends have changed in all workers", True), ("nothing has changed", False)):
        spent, blocked, turns, reports = [], [], [], []
        for _ in range(ROUNDS):
            for worker in fleet:
                if change:
                    worker.exchange()
                worker.turns_s.clear()
            longest = 0.0
            watching = asyncio.ensure_future(watch())
            began = time.thread_time()
            body, _ = await scrapes.answer("")
            total = time.thread_time() - began
            stop = True
            await watching
            stop = False
            blocked.append(longest)
            turns.append(max(max(worker.turns_s) for worker in fleet))
            reports.append(statistics.fmean(sum(worker.turns_s) for worker in fleet))
            spent.append(total - sum(sum(worker.turns_s) for worker in fleet))
        rows += [
            (f"{what}: a worker's report", _ms(reports)),
            (f"{what}: its longest turn", _ms(turns)),
            (f"{what}: the supervisor's part ({len(body) / 2**20:.1f} MiB)", _ms(spent)),
            (f"{what}: the longest turn of all", _ms(blocked)),
        ]
    return rows


def _ms(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1000:.1f} ms (worst of {len(seconds)}: {max(seconds) * 1000:.1f})"


# -- a real one

_CONFIG: Final = """
[runtime]
workers = {workers}
per_ip_connection_cap = 100000
readiness_settle_ms = 0
drain_timeout_ms = 500
drain_jitter_ms = 0
[observability]
metrics_bind = "127.0.0.1:{admin}"
max_label_cardinality = 10_000_000
[[listeners]]
name = "web"
address = "127.0.0.1:{web}"
protocol = "h1"
backends = [
{backends}
]
"""


class _Answering(asyncio.Protocol):
    """A backend at every address of 127.0.0.0/8."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        answer = b"HTTP/1.1 204 No Content\r\n\r\n" * data.count(b"\r\n\r\n")
        self.transport.write(answer)  # type: ignore[attr-defined]  # it is a WriteTransport


@contextlib.contextmanager
def answering() -> Iterator[int]:
    """The port of a backend that runs in a thread."""
    loop = asyncio.new_event_loop()
    sock = socket.create_server(("0.0.0.0", 0), backlog=4096)
    loop.run_until_complete(loop.create_server(_Answering, sock=sock))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield int(sock.getsockname()[1])
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        sock.close()


def ask(port: int, path: str) -> tuple[float, bytes]:
    """How long the answer took, and its body."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("GET", path)
        body = connection.getresponse().read()
    return time.perf_counter() - began, body


def visit_all(port: int, requests: int, is_over: Callable[[], bool]) -> int:
    """Send requests, each on a connection of its own, so that the kernel spreads them; how many."""
    done = 0
    while done < requests and not is_over():
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as sock,
        ):
            for _ in range(50):
                sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 20)
                seen = 0
                while seen < 20:
                    data = sock.recv(65536)
                    if not data:
                        raise ConnectionResetError
                    seen += data.count(b"HTTP/1.1 ")
                done += 20
    return done


def real(backends: int, workers: int) -> list[tuple[str, str]]:
    """Rows, as above."""
    web, admin = free_ports(2)
    with tempfile.TemporaryDirectory() as name, answering() as port:
        path = Path(name) / "gateway.toml"
        lines = (
            f'  {{ address = "127.1.{number // 250}.{number % 250 + 1}:{port}" }},'
            for number in range(backends)
        )
        path.write_text(_CONFIG.format(workers=workers, admin=admin, web=web, backends="\n".join(lines)))
        with (Path(name) / "log").open("w") as log:
            process = subprocess.Popen([sys.executable, "-m", "expressgateway", str(path)], stderr=log)
        try:
            _until_ready(admin, process)
            visit_all(web, 3 * backends * workers, lambda: False)
            quiet = [ask(admin, "/metrics") for _ in range(ROUNDS)]
            touched = _touched(quiet[-1][1])
            stop = threading.Event()
            load = threading.Thread(target=visit_all, args=(web, 10**9, stop.is_set))
            load.start()
            try:
                busy = [ask(admin, "/metrics")[0] for _ in range(ROUNDS)]
                probes: list[float] = []
                scraping = threading.Thread(target=lambda: [ask(admin, "/metrics") for _ in range(3)])
                scraping.start()
                while scraping.is_alive():
                    probes.append(ask(admin, "/livez")[0])
                scraping.join()
            finally:
                stop.set()
                load.join()
        finally:
            process.terminate()
            process.wait(PATIENCE_S)
    size = len(quiet[-1][1]) / 2**20
    return [
        (
            f"a gateway, quiet: /metrics ({size:.1f} MiB, {touched} backends have histograms)",
            _ms([s for s, _ in quiet]),
        ),
        ("under load from one client on the same cores: /metrics", _ms(busy)),
        ("meanwhile: /livez", _ms(probes)),
    ]


def _touched(body: bytes) -> int:
    return body.count(b"\nbackend_request_duration_seconds_count{")


def _until_ready(port: int, process: "subprocess.Popen[Any]") -> None:
    ends = time.monotonic() + PATIENCE_S
    while time.monotonic() < ends and process.poll() is None:
        with contextlib.suppress(OSError):
            if b"ready" in ask(port, "/readyz")[1]:
                return
        time.sleep(0.05)
    raise SystemExit("the gateway did not start")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scrape", description=__doc__.partition("\n")[0])
    parser.add_argument("--backends", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=8)
    options = parser.parse_args()
    print(f"{options.backends} backends, {options.workers} workers, {os.cpu_count()} cores\n")
    print("| what | median |\n| --- | --- |")
    for what, took in asyncio.run(modelled(options.backends, options.workers)):
        print(f"| {what} | {took} |")
    for what, took in real(options.backends, options.workers):
        print(f"| {what} | {took} |")


if __name__ == "__main__":
    main()
