"""The cells: what is sent through each proxy, and the interleaved rounds that measure it.

A *cell* is one kind of load; a *variant* is a proxy in one of its configurations (`nginx`, `nginx-64k`).
Rounds go through all variants before any has its next run, each round beginning with another one, so that the
drift of the machine falls on all alike. A variant that fails once in a cell is out of that cell, by name.
"""

import functools
import http.client
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench import load
from bench.load import Load, LoadError
from bench.measure import CpuReading, TreeChangedError, memory_bytes
from bench.peers import GATEWAY, Program, Rack, UnavailableError, answer_of
from bench.stats import Sample
from bench.world import BODY_BYTES, LARGE_BODY_BYTES, Ports

CONNECTIONS: Final = 32
BULK_CONNECTIONS: Final = 4
"""Few enough that what is in flight when a run ends does not weigh."""
LARGE_BODIES: Final = 4
"""Of 100 MB, in each run."""
OVER_H1: Final = f"{GATEWAY}-h1"
"""The variant that is the gateway by HTTP/1.1 over TLS, in cells where HTTP/2 is held against it."""
TUNED: Final = {f"{name}-64k": name for name in ("nginx", "haproxy")}
"""Variant to proxy, for those whose buffers are small as they come; Envoy's are 1 MiB."""


@dataclass(frozen=True)
class Run:
    """What a cell needs to know for one run."""

    ports: Ports
    seconds: int
    scratch: Path
    files: Path


@dataclass(frozen=True)
class Cell:
    """One kind of load; `bulk` is the bytes a request moves, 0 where CPU per request is what counts.
    `beside` is the load that the gateway is also measured with, as the variant OVER_H1."""

    name: str
    title: str
    port: Callable[[Ports], int | None]
    send: Callable[[Run, int], Load]
    path: str = "/small"
    bulk: int = 0
    tls: bool = False
    beside: Callable[[Run, int], Load] | None = None
    quic: bool = False


def _wrk(script: str, path: str, connections: int) -> Callable[[Run, int], Load]:
    def send(run: Run, port: int) -> Load:
        url = f"http://127.0.0.1:{port}{path}"
        return load.wrk(url, connections=connections, seconds=run.seconds, script=script, scratch=run.scratch)

    return send


def _h2load(run: Run, port: int) -> Load:
    url = f"https://127.0.0.1:{port}/small"
    return load.h2load(url, connections=CONNECTIONS, seconds=run.seconds, scratch=run.scratch)


def _h2(run: Run, port: int) -> Load:
    url = f"https://127.0.0.1:{port}/small"
    return load.h2load(url, connections=8, streams=16, seconds=run.seconds, scratch=run.scratch)


def _large(path: str, streams: int) -> Callable[[Run, int], Load]:
    def send(run: Run, port: int) -> Load:
        return load.h2load_bulk(
            f"https://127.0.0.1:{port}{path}",
            requests=LARGE_BODIES,
            streams=streams,
            at_most_s=run.seconds,
            body=run.files / "100m" if path == "/large-sink" else None,
            size=LARGE_BODY_BYTES,
        )

    return send


def _handshakes(run: Run, port: int) -> Load:
    return load.handshakes(port, connections=16, seconds=run.seconds)


def _http(ports: Ports) -> int | None:
    return ports.http


def _https(ports: Ports) -> int | None:
    return ports.https


def _full(ports: Ports) -> int | None:
    """What this costs is compared with what peers do without any of it."""
    return ports.full or ports.http


def _to_h2(ports: Ports) -> int | None:
    return ports.h2


def _h3_port(ports: Ports) -> int | None:
    return ports.h3


def _h3(run: Run, port: int) -> Load:
    return load.h3(port, "/small", connections=8, streams=16, seconds=run.seconds)


def _h3_download(run: Run, port: int) -> Load:
    return load.h3(port, "/10m", connections=2, streams=2, seconds=run.seconds)


def _h3_upload(run: Run, port: int) -> Load:
    return load.h3(port, "/sink", connections=2, streams=2, seconds=run.seconds, upload=BODY_BYTES)


def _tcp(ports: Ports) -> int | None:
    return ports.tcp


_small = _wrk("", "/small", CONNECTIONS)
_download = _wrk("", "/10m", BULK_CONNECTIONS)
CELLS: Final = (
    Cell("h1", f"HTTP/1.1 keep-alive, small body, {CONNECTIONS} connections (wrk)", _http, _small),
    Cell(
        "full",
        "The first cell with routes, health checks, outlier ejection, retries and least_requests in the "
        "gateway; peers as in the first cell",
        _full,
        _small,
    ),
    Cell(
        "h1-headers",
        f"HTTP/1.1 keep-alive, 11 browser headers that differ per request, {CONNECTIONS} connections (wrk)",
        _http,
        _wrk(load.VARYING_LUA, "/", CONNECTIONS),
    ),
    Cell(
        "tls",
        f"HTTP/1.1 over TLS 1.3, keep-alive, small body, {CONNECTIONS} connections (h2load --h1)",
        _https,
        _h2load,
        tls=True,
    ),
    Cell(
        "new",
        f"HTTP/1.1, a new connection for each request, {CONNECTIONS} at a time (wrk, Connection: close)",
        _http,
        _wrk(load.CLOSE_LUA, "/small", CONNECTIONS),
    ),
    Cell(
        "new-tls",
        "HTTP/1.1 over TLS 1.3, a new connection and a full handshake for each request, 16 at a time "
        "(the client is the limit here: rate and latencies are its own)",
        _https,
        _handshakes,
        tls=True,
    ),
    Cell(
        "download", "10 MB download over HTTP/1.1, 4 connections (wrk)", _http, _download, "/10m", BODY_BYTES
    ),
    Cell(
        "upload",
        "10 MB upload over HTTP/1.1, 4 connections (wrk)",
        _http,
        _wrk(load.upload_lua(BODY_BYTES), "/sink", BULK_CONNECTIONS),
        "/sink",
        BODY_BYTES,
    ),
    Cell(
        "h2",
        "HTTP/2 over TLS 1.3 to HTTP/1.1, small body, 8 connections with 16 streams each (h2load)",
        _https,
        _h2,
        tls=True,
    ),
    Cell(
        "h2-h2",
        "HTTP/2 over TLS 1.3 to HTTP/2 in clear text, small body, 8 connections with 16 streams each "
        "(h2load; nginx has no HTTP/2 to backends)",
        _to_h2,
        _h2,
        tls=True,
    ),
    Cell(
        "h2-download",
        f"100 MB downloads over HTTP/2 and TLS 1.3, one after another (h2load; {OVER_H1}: over HTTP/1.1)",
        _https,
        _large("/100m", 1),
        "/100m",
        LARGE_BODY_BYTES,
        tls=True,
        beside=_large("/100m", 0),
    ),
    Cell(
        "h2-upload",
        f"100 MB uploads over HTTP/2 and TLS 1.3, one after another (h2load; {OVER_H1}: over HTTP/1.1)",
        _https,
        _large("/large-sink", 1),
        "/large-sink",
        LARGE_BODY_BYTES,
        tls=True,
        beside=_large("/large-sink", 0),
    ),
    Cell(
        "h3",
        "HTTP/3 to HTTP/1.1, small body, 8 connections with 16 streams each (our own client; Debian builds "
        "nginx and HAProxy without QUIC)",
        _h3_port,
        _h3,
        quic=True,
    ),
    Cell(
        "h3-download",
        "10 MB downloads over HTTP/3, 2 connections with 2 streams each (our own client)",
        _h3_port,
        _h3_download,
        "/10m",
        BODY_BYTES,
        quic=True,
    ),
    Cell(
        "h3-upload",
        "10 MB uploads over HTTP/3, 2 connections with 2 streams each (our own client)",
        _h3_port,
        _h3_upload,
        "/sink",
        BODY_BYTES,
        quic=True,
    ),
    Cell("tcp", f"TCP relay, small request and answer, {CONNECTIONS} connections (wrk)", _tcp, _small),
    Cell("tcp-bulk", "TCP relay, 10 MB downloads, 4 connections (wrk)", _tcp, _download, "/10m", BODY_BYTES),
)


@dataclass
class Outcome:
    """What became of one variant in one cell: its samples, or why it has none."""

    samples: list[Sample] = field(default_factory=list)
    failure: str | None = None


def check(cell: Cell, ports: Ports) -> None:
    """One plain request, which must succeed as a whole. Raises UnavailableError."""
    port = cell.port(ports)
    if port is None:
        raise UnavailableError(
            "has no HTTP/3 here (Debian builds it without QUIC)"
            if cell.quic
            else "has no HTTP/2 to backends"
            if cell.port is _to_h2
            else "has no TCP listener here (nginx needs its stream module, which is not installed)"
        )
    if cell.quic:
        try:
            load.h3(port, "/small", connections=1, streams=1, seconds=2)
        except LoadError as error:
            raise UnavailableError(f"does not answer over HTTP/3: {error}") from error
        return
    try:
        status, length = answer_of(port, cell.path, tls=cell.tls)
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(f"does not answer GET {cell.path}: {error}") from error
    if status != 200 or (cell.path == "/10m" and length != BODY_BYTES):
        raise UnavailableError(f"answers GET {cell.path} with {status} and {length} bytes")


def measured(program: Program, send: Callable[[], Load], *, bulk: int = 0) -> Sample:
    """One run with the CPU time of the whole tree around it. Raises LoadError, TreeChangedError."""
    root = program.process.pid
    before = CpuReading.of(root)
    done = send()
    spent = CpuReading.of(root).since(before)
    total = sum(spent.values())
    return Sample(
        requests=done.requests,
        seconds=done.seconds,
        cpu_s=total,
        # What was read counts also the downloads that the end of the run cut; uploads count as complete ones.
        bytes=max(done.bytes, done.requests * bulk) if bulk else done.bytes,
        p50_us=done.p50_us,
        p99_us=done.p99_us,
        memory_bytes=memory_bytes(root),
        busiest_share=max(spent.values()) / total if total else 1.0,
    )


def run_rounds(
    senders: Mapping[str, tuple[Program, Callable[[], Load]]], rounds: int, *, bulk: int = 0
) -> dict[str, Outcome]:
    """That many interleaved rounds over all variants."""
    outcomes = {variant: Outcome() for variant in senders}
    names = list(senders)
    for turn in range(rounds):
        for variant in names[turn % len(names) :] + names[: turn % len(names)]:
            outcome = outcomes[variant]
            if outcome.failure is not None:
                continue
            program, send = senders[variant]
            try:
                outcome.samples.append(measured(program, send, bulk=bulk))
            except (LoadError, TreeChangedError) as error:
                outcome.failure = str(error)
    return outcomes


def run_cell(
    cell: Cell, programs: Mapping[str, Program], *, rounds: int, seconds: int, scratch: Path, files: Path
) -> dict[str, Outcome]:
    """Checks each variant once, which also warms it, then measures those that passed."""
    failures: dict[str, Outcome] = {}
    senders: dict[str, tuple[Program, Callable[[], Load]]] = {}
    for variant, program in programs.items():
        try:
            check(cell, program.ports)
        except UnavailableError as error:
            failures[variant] = Outcome(failure=str(error))
            continue
        run, port = Run(program.ports, seconds, scratch, files), cell.port(program.ports) or 0
        senders[variant] = program, functools.partial(cell.send, run, port)
        if variant == GATEWAY and cell.beside is not None:
            senders[OVER_H1] = program, functools.partial(cell.beside, run, port)
    outcomes = {**failures, **run_rounds(senders, rounds, bulk=cell.bulk)}
    return {variant: outcomes[variant] for variant in (*programs, OVER_H1) if variant in outcomes}


def start_variants(
    rack: Rack, proxies: list[str], *, tuned: bool
) -> tuple[dict[str, Program], dict[str, str]]:
    """The programs that started, and for each that did not, why."""
    wanted = [(name, name, False) for name in proxies]
    if tuned:
        wanted += [(variant, name, True) for variant, name in TUNED.items() if name in proxies]
    programs: dict[str, Program] = {}
    missing: dict[str, str] = {}
    for variant, name, is_tuned in wanted:
        try:
            programs[variant] = rack.start_proxy(name, tuned=is_tuned)
        except UnavailableError as error:
            missing[variant] = str(error)
            print(f"bench: {variant} is left out: {error}", file=sys.stderr)
    return programs, missing
