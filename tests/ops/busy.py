"""A gateway of which every protocol is used, and in which much goes wrong: what it then exposes."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.utils import accept_key

from tests.e2e.h3_raw import RawH3
from tests.e2e.harness import (
    Backend,
    BackendConnection,
    Client,
    Gateway,
    certificate,
    eventually,
)
from tests.e2e.http_world import client_context
from tests.ports import free_port

CONFIG = """
max_label_cardinality = 100_000
access_log = {{ path = "{directory}/access.log" }}
[[listeners]]
name = "web"
address = "127.0.0.1:{web}"
protocol = "h1"
h2c = true
routes = [
  {{ name = "dead", match = {{ path_prefix = "/dead" }}, pool = "dead" }},
  {{ name = "nameless", match = {{ path_prefix = "/nameless" }}, pool = "nameless" }},
  {{ name = "copied", match = {{ path_prefix = "/copied" }}, pool = "app", mirror = {{ pool = "probed" }} }},
  {{ name = "shared", match = {{ path = "/shared" }}, pool = "shared", rewrite = {{ path = "/" }} }},
  {{ name = "rest", match = {{ path_prefix = "/" }}, pool = "app" }},
]
websocket = {{}}
[[listeners]]
name = "tls"
address = "127.0.0.1:{tls}"
protocol = "h1s"
tls = {{ cert_path = "{cert}", key_path = "{key}" }}
pool = "probed"
[[listeners]]
name = "h3"
address = "127.0.0.1:{h3}"
protocol = "quic"
pool = "app"
[listeners.quic]
cert_path = "{cert}"
key_path = "{key}"
retry_secret_path = "{directory}/retry"
retry = "always"
[[listeners]]
name = "tcp"
address = "127.0.0.1:{tcp}"
protocol = "tcp"
backends = [{{ address = "{backend}" }}]
[[listeners]]
name = "udp"
address = "127.0.0.1:{udp}"
protocol = "udp"
backends = [{{ address = "127.0.0.1:{echo}" }}]
[[pools]]
name = "app"
backends = [{{ address = "{backend}", id = "good" }}, {{ address = "127.0.0.1:{nobody}", id = "gone" }}]
circuit_breaker = {{ max_requests = 50 }}
retry = {{ attempts = 2, on = ["connect"] }}
[[pools]]
name = "probed"
backends = [{{ address = "{backend}", id = "p0" }}, {{ address = "127.0.0.1:{nobody}", id = "p1" }}]
health = {{ type = "tcp", interval_ms = 200, timeout_ms = 100, fall = 1 }}
[[pools]]
name = "shared"
backends = [{{ address = "127.0.0.1:{web}", id = "s0", protocol = "h2" }}]
[[pools]]
name = "dead"
backends = [{{ address = "127.0.0.1:{nobody}", id = "d0" }}]
outlier = {{ consecutive_failures = 1, max_ejection_percent = 100, panic_threshold_percent = 0 }}
[[pools]]
name = "nameless"
backends = [{{ address = "nobody.invalid:80", id = "n0" }}]
"""


class Scrapes(NamedTuple):
    """Of one gateway."""

    before: str
    """Before it has seen anything."""
    after: str
    openmetrics: str
    """As ``after``, in the other format."""


def _serve(connection: BackendConnection) -> None:
    while True:
        head, _ = connection.request()
        if b"upgrade: websocket" in head.lower():
            key = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key"))
            connection.send(_agreed(key.partition(b":")[2].strip()))
            connection.rest()
            return
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")


def _agreed(key: bytes) -> bytes:
    accept = accept_key(key.decode())
    return (
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
        f"sec-websocket-accept: {accept}\r\n\r\n"
    ).encode()


@contextlib.contextmanager
def _echo() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(30)
        yield sock


def scrapes(directory: Path) -> Scrapes:
    """Run it, use it, have it fail, and see what it says."""
    files = certificate(directory)
    ports = {name: free_port() for name in ("web", "tls", "h3", "tcp", "udp", "nobody")}
    with Backend(_serve) as backend, _echo() as echo:
        config = CONFIG.format(
            directory=directory,
            cert=files.certificate,
            key=files.key,
            backend=backend.address,
            echo=echo.getsockname()[1],
            **ports,
        )
        with Gateway(directory, config, workers=2) as gateway:
            before = gateway.ask("/metrics")[1]
            _use(ports, files.certificate, echo)
            _fail(gateway, ports)
            assert not gateway.reload(config.replace('protocol = "tcp"', 'protocol = "none"'))
            (worker, _) = gateway.worker_pids()
            os.kill(worker, signal.SIGKILL)
            gateway.wait_metric("worker_restarts_total")
            eventually(lambda: gateway.metric("worker_up") == 2, "both workers serve")
            gateway.wait_metric("backend_up", 1, pool="app", backend="good")
            after = gateway.ask("/metrics")[1]
            openmetrics = _ask_openmetrics(gateway)
    return Scrapes(before, after, openmetrics)


def _use(ports: dict[str, int], trust: Path, echo: socket.socket) -> None:
    """All that goes well."""
    for _ in range(4):
        with Client(ports["web"]) as client:
            for path in (b"/", b"/copied", b"/shared"):
                client.send(b"POST %s HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nhi" % path)
                assert client.response()[0] == 200
    context = client_context(trust)
    with Client(ports["tls"], tls=context) as client:
        client.send(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert client.response()[0] == 200
    with Client(ports["tcp"]) as client:
        client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        assert client.response()[0] == 200
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client_udp:
        client_udp.settimeout(30)
        client_udp.connect(("127.0.0.1", ports["udp"]))
        client_udp.send(b"ping")
        data, address = echo.recvfrom(100)
        echo.sendto(data, address)
        assert client_udp.recv(100) == b"ping"
    with RawH3(ports["h3"]) as quic:
        assert quic.begun().get()[0][b":status"] == b"200"
    with connect(f"ws://127.0.0.1:{ports['web']}/ws", proxy=None, open_timeout=60) as socket_:
        socket_.socket.sendall(b"\xff\xff\xff\xff")  # no frame: the gateway closes the session
        with contextlib.suppress(ConnectionClosed):
            socket_.recv(timeout=60)


def _fail(gateway: Gateway, ports: dict[str, int]) -> None:
    """All that does not."""
    for path, status in ((b"/dead", 502), (b"/nameless", 502)):
        for _ in range(3):
            with Client(ports["web"]) as client:
                client.send(b"GET %s HTTP/1.1\r\nhost: a\r\n\r\n" % path)
                assert client.response()[0] in (status, 503)
    with Client(ports["web"]) as client:
        client.send(b"GET / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n")
        assert client.response()[0] == 400
    with Client(ports["tls"]) as client:
        client.send(b"no TLS at all\r\n\r\n")
        client.rest()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as junk:
        junk.connect(("127.0.0.1", ports["h3"]))
        junk.send(b"\xc0\x0a\x0a\x0a\x0a\x08aaaaaaaa\x08bbbbbbbb" + bytes(1200))  # a version nobody speaks
        junk.send(b"\x40" + bytes(60))  # a connection nobody knows
    gateway.wait_metric("quic_version_negotiations_total")
    gateway.wait_metric("quic_stateless_resets_total")
    gateway.wait_metric("backend_ejections_total")
    gateway.wait_metric("health_probes_total", pool="probed", backend="p1", result="failure")


def _ask_openmetrics(gateway: Gateway) -> str:
    with Client(gateway.admin) as client:
        client.send(
            b"GET /metrics HTTP/1.1\r\nhost: localhost\r\naccept: application/openmetrics-text\r\n\r\n"
        )
        return client.response()[2].decode()
