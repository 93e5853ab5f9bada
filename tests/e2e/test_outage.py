"""Outages, with real processes: backends killed, hung, spoiled and restored while clients ask.

The command ``python -m bench.outage`` does the same at length and measures it. Discovery has no part here:
the gateway asks the name servers of /etc/resolv.conf, which is not a test's to change.
"""

import contextlib
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from bench.outage_world import FaultyBackend

from tests.e2e.harness import (
    PATIENCE_S,
    Backend,
    BackendConnection,
    Client,
    Gateway,
    Script,
    answer_ok,
    eventually,
)
from tests.e2e.load import Load
from tests.ports import free_port

RETRY = 'retry = { attempts = 3, on = ["connect", "reset", "stale"], per_try_timeout_ms = 1000 }'
RETRY_5XX = 'retry = { attempts = 3, on = ["connect", "reset", "stale", "5xx"], budget_percent = 100 }'
OUTLIER = "outlier = { consecutive_failures = 3, ejection_ms = 30000 }"
HEALTH = (
    'health = { type = "http", path = "/health", interval_ms = 100, timeout_ms = 1000, rise = 1, fall = 1 }'
)
RUNTIME = "max_keepalive_requests = 0\n[runtime.watchdog]\nsweep_interval_ms = 200"
REQUEST = b"GET /x HTTP/1.1\r\nHost: a.example\r\n\r\n"


def config(port: int, backends: Sequence[tuple[str, str]], *tables: str, protocol: str = "h1") -> str:
    """``backends``: id and address of each; ``tables``: lines of the pool."""
    each = ", ".join(f'{{ id = "{id_}", address = "{address}" }}' for id_, address in backends)
    return (
        f'[[listeners]]\nname = "web"\naddress = "127.0.0.1:{port}"\nprotocol = "{protocol}"\npool = "web"\n'
        f'[[pools]]\nname = "web"\nbackends = [{each}]\n' + "\n".join(tables) + "\n"
    )


@pytest.fixture
def three() -> Iterator[list[FaultyBackend]]:
    backends = [FaultyBackend(name, free_port()) for name in ("b1", "b2", "b3")]
    try:
        for backend in backends:
            backend.start()
        yield backends
    finally:
        for backend in backends:
            backend.kill()


def named(backends: Sequence[FaultyBackend]) -> list[tuple[str, str]]:
    return [(backend.name, backend.address) for backend in backends]


def in_state(gateway: Gateway, backend: str, *states: str) -> bool:
    return any(gateway.metric("backend_state", backend=backend, state=state) == 1 for state in states)


def wait_state(gateway: Gateway, backend: str, *states: str) -> None:
    eventually(lambda: in_state(gateway, backend, *states), f"{backend} is {' or '.join(states)}")


def wait_more(load: Load, count: int) -> None:
    wanted = load.total + count
    eventually(lambda: load.total >= wanted, f"{count} more answers")


def wait_until(moment: float) -> None:
    """What is measured is a share within a time."""
    eventually(lambda: time.monotonic() >= moment, "the time has come")


def ask(port: int) -> tuple[int, dict[str, str], bytes]:
    with Client(port) as client:
        client.send(REQUEST)
        return client.response()


def messages(gateway: Gateway) -> list[str]:
    return [str(json.loads(line)["message"]) for line in gateway.log().splitlines() if line.startswith("{")]


class TestOneOfThree:
    def test_killed(self, tmp_path: Path, three: list[FaultyBackend]) -> None:
        """No request fails: what was under way there is sent again, what would go there goes elsewhere."""
        port = free_port()
        text = config(port, named(three), RETRY.replace("1000", "5000"), OUTLIER)
        with Gateway(tmp_path, text, runtime=RUNTIME) as gateway:
            with Load(port) as load:
                wait_more(load, 200)
                three[1].mode("slow")  # so that there is something under way
                gateway.wait_metric("backend_inflight", 7, backend="b2")  # some of before may be among them
                three[1].kill()
                wait_state(gateway, "b2", "ejected")
                wait_more(load, 200)
            assert set(load.answers) == {200}
            assert load.broken == []
            assert set(load.bodies) == {b"b1", b"b2", b"b3"}
            again = sum(gateway.metric("backend_retries_total", reason=cause) for cause in ("stale", "reset"))
            assert again >= 3
            assert gateway.metric("backend_ejections_total", cause="consecutive_failures", backend="b2") == 1
            assert any(
                re.fullmatch(
                    r"backend web/b2 becomes ejected: \d+ failures in a row, .*; for 30 seconds", line
                )
                for line in messages(gateway)
            )

    def test_hung(self, tmp_path: Path, three: list[FaultyBackend]) -> None:
        """A stopped process still accepts, so only the time of an attempt shows it."""
        port = free_port()
        text = config(port, named(three), RETRY, OUTLIER)
        with Gateway(tmp_path, text, runtime=RUNTIME) as gateway:
            with Load(port) as load:
                wait_more(load, 200)
                three[1].stop()
                began = time.monotonic()
                wait_state(gateway, "b2", "ejected")
                took_s = time.monotonic() - began
                wait_more(load, 200)
            assert set(load.answers) == {200}
            assert load.broken == []
            assert took_s < 10  # the time of an attempt, and a sweep; the rest is the machine's
            assert gateway.metric("backend_retries_total", reason="timeout") > 0

    def test_recovers_with_a_growing_share(self, tmp_path: Path, three: list[FaultyBackend]) -> None:
        port = free_port()
        slow_start_s = 3
        balancing = f"load_balancing = {{ slow_start_ms = {slow_start_s * 1000:.0f} }}"
        text = config(port, named(three), RETRY, HEALTH, balancing)
        with Gateway(tmp_path, text, runtime=RUNTIME) as gateway:
            for backend in three:
                wait_state(gateway, backend.name, "healthy")
            three[1].kill()
            wait_state(gateway, "b2", "unhealthy")
            with Load(port) as load:
                wait_more(load, 50)
                three[1].start()
                wait_state(gateway, "b2", "healthy")
                began = time.monotonic()
                counts = [(load.bodies[b"b2"], load.total)]
                for third in range(1, 4):
                    wait_until(began + slow_start_s * third / 3)
                    counts.append((load.bodies[b"b2"], load.total))
                wait_more(load, 50)
            shares = [
                (own - own_before) / (everyone - everyone_before)
                for (own_before, everyone_before), (own, everyone) in itertools.pairwise(counts)
            ]
            assert shares[0] < 0.2, shares
            assert 2 * shares[0] < shares[2] < 0.4, shares
            assert set(load.answers) == {200}
            assert load.broken == []

    def test_answering_500_is_ejected_if_that_counts(
        self, tmp_path: Path, three: list[FaultyBackend]
    ) -> None:
        port = free_port()
        outlier = "outlier = { consecutive_failures = 3, ejection_ms = 30000, count_5xx = true }"
        with Gateway(tmp_path, config(port, named(three), RETRY_5XX, outlier), runtime=RUNTIME) as gateway:
            with Load(port) as load:
                wait_more(load, 100)
                three[1].mode("error")
                wait_state(gateway, "b2", "ejected")
                wait_more(load, 100)
            assert set(load.answers) == {200}
            assert load.broken == []
            assert gateway.metric("backend_retries_total", reason="status") >= 3
            assert "the last one: status 500" in gateway.log()

    def test_answering_500_is_the_applications_word_otherwise(
        self, tmp_path: Path, three: list[FaultyBackend]
    ) -> None:
        port = free_port()
        with Gateway(tmp_path, config(port, named(three), RETRY, OUTLIER), runtime=RUNTIME) as gateway:
            three[1].mode("error")
            with Load(port) as load:
                wait_more(load, 200)
            assert set(load.answers) == {200, 500}
            assert gateway.metric("backend_retries_total") == 0
            assert gateway.metric("backend_ejections_total") == 0


class TestAll:
    @pytest.mark.parametrize(
        ("percent", "status", "error"),
        [(50, 502, "connection_refused"), (0, 503, "destination_unavailable")],
        ids=["panic", "no panic"],
    )
    def test_dead_and_alive_again(
        self, tmp_path: Path, three: list[FaultyBackend], percent: int, status: int, error: str
    ) -> None:
        """With panic, which is named, they are tried all the same; the client is told either way."""
        port = free_port()
        outlier = f"outlier = {{ panic_threshold_percent = {percent} }}"
        text = config(port, named(three), RETRY, HEALTH, outlier)
        with Gateway(tmp_path, text, runtime=RUNTIME) as gateway:
            eventually(lambda: gateway.metric("backend_state", state="healthy") == 3, "all are healthy")
            for backend in three:
                backend.kill()
            for backend in three:
                wait_state(gateway, backend.name, "unhealthy")
            assert gateway.metric("pool_panic", pool="web") == int(percent > 0)
            eventually(lambda: ask(port)[0] == status, "workers know as well")
            answered, headers, body = ask(port)
            assert answered == status, body
            assert f"error={error};" in headers["proxy-status"]
            for backend in three:
                backend.start()
            eventually(lambda: gateway.metric("backend_state", state="healthy") == 3, "all are healthy again")
            assert gateway.metric("pool_panic", pool="web") == 0
            assert ask(port)[0] == 200
            said = [line for line in messages(gateway) if "panic" in line]
            if percent:
                assert re.fullmatch(
                    r"pool web panics and uses all its backends: "
                    r"[01] of 3 backends in service are fit, less than 50 percent",
                    said[0],
                )
                assert said[1].startswith("pool web no longer panics: ")
                assert len(said) == 2
            else:
                assert said == []


def flapping(connection: BackendConnection) -> None:
    """Works; its health changes with every third probe."""
    backend = connection.backend
    while True:
        head, _ = connection.request()
        if head.startswith(b"GET /health "):
            backend.requests.append((head, b""))
            status = b"200 OK" if len(backend.requests) // 3 % 2 else b"503 Away"
            connection.send(b"HTTP/1.1 %s\r\ncontent-length: 0\r\n\r\n" % status)
        else:
            text = backend.name.encode()
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text))


def sick(answer: bytes) -> Script:
    """A backend that works, but says this to a probe and nothing more."""

    def script(connection: BackendConnection) -> None:
        while True:
            head, _ = connection.request()
            if head.startswith(b"GET /health "):
                connection.send(answer)
                connection.sock.recv(1)
                return
            text = connection.backend.name.encode()
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text))

    return script


class TestHealthEndpoint:
    def test_flapping_keeps_serving(self, tmp_path: Path) -> None:
        port = free_port()
        with Backend(name="good") as good, Backend(flapping, name="odd") as odd:
            text = config(port, [("good", good.address), ("odd", odd.address)], RETRY, HEALTH)
            with Gateway(tmp_path, text, runtime=RUNTIME) as gateway:
                with Load(port, clients=2) as load:
                    eventually(
                        lambda: sum("web/odd becomes" in line for line in messages(gateway)) >= 6,
                        "it goes to and fro",
                    )
                assert set(load.answers) == {200}
                assert load.broken == []
                assert {b"good", b"odd"} == set(load.bodies)
                assert in_state(gateway, "good", "healthy")

    @pytest.mark.parametrize(
        ("answer", "cause"),
        [
            (b"", "timed out after 1000 ms"),
            (b"HTTP/1.1 200 OK\r\n", "timed out after 1000 ms"),
            (b"\x00\xff" * 500, ""),
            (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 50_000, ""),
            (b"HTTP/1.1 999999 \r\n\r\n", ""),
            (b"HTTP/1.1 503 Not now\r\ncontent-length: 0\r\n\r\n", "status 503"),
        ],
        ids=["silence", "half a head", "garbage", "endless head", "no status", "503"],
    )
    def test_broken_ones_take_their_backend_out(self, tmp_path: Path, answer: bytes, cause: str) -> None:
        port = free_port()
        with Backend(name="good") as good, Backend(sick(answer), name="odd") as odd:
            text = config(port, [("good", good.address), ("odd", odd.address)], RETRY, HEALTH)
            with Gateway(tmp_path, text, runtime=RUNTIME) as gateway:
                wait_state(gateway, "odd", "unhealthy")
                eventually(lambda: ask(port)[2] == b"good", "the workers know")
                with Load(port, clients=2) as load:
                    wait_more(load, 50)
                assert set(load.bodies) == {b"good"}
                shown = json.loads(gateway.ask("/api/v1/pools/web/backends/odd")[1])
                assert shown["state"] == "unhealthy"
                assert cause in shown["cause"]
                assert "\x00" not in shown["cause"]

    def test_of_the_only_backend_does_not_stop_it(self, tmp_path: Path) -> None:
        """Panic: nobody else is there, and it does work."""
        port = free_port()
        with Backend(sick(b""), name="odd") as odd:
            text = config(port, [("odd", odd.address)], HEALTH)
            with Gateway(tmp_path, text, runtime=RUNTIME) as gateway:
                wait_state(gateway, "odd", "unhealthy")
                gateway.wait_metric("pool_panic", 1)
                assert ask(port)[::2] == (200, b"odd")


class TestLayer4:
    """Outcomes of relays steer them too: nothing is probed here."""

    def test_tcp(self, tmp_path: Path) -> None:
        port = free_port()
        dead = f"127.0.0.1:{free_port()}"
        with Backend(answer_ok, name="good") as good:
            text = config(port, [("dead", dead), ("good", good.address)], OUTLIER, protocol="tcp")
            with Gateway(tmp_path, text, runtime="drain_timeout_ms = 100") as gateway:
                for _ in range(10):
                    assert ask(port)[::2] == (200, b"good")
                wait_state(gateway, "dead", "ejected")
                eventually(lambda: gateway.metric("backend_up", backend="dead") == 0, "it gets nothing")
                before = gateway.metric("backend_connect_failures_total", backend="dead")
                for _ in range(10):
                    assert ask(port)[::2] == (200, b"good")
                assert gateway.metric("backend_connect_failures_total", backend="dead") == before

    def test_udp(self, tmp_path: Path) -> None:
        """A refusal comes back as an ICMP message; a flow whose backend is found dead goes to another."""
        port = free_port()
        dead = f"127.0.0.1:{free_port()}"
        with echo() as address:
            text = config(port, [("dead", dead), ("good", address)], OUTLIER, protocol="udp")
            with Gateway(tmp_path, text, runtime="drain_timeout_ms = 100") as gateway:
                eventually(lambda: try_datagram(port) and in_state(gateway, "dead", "ejected"), "ejected")
                eventually(lambda: all(try_datagram(port) for _ in range(10)), "all flows are served")
                assert "backend web/dead becomes ejected" in gateway.log()


@contextlib.contextmanager
def echo() -> Iterator[str]:
    """A UDP backend; its address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(PATIENCE_S)

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    data, client = sock.recvfrom(2048)
                    if data == b"end":
                        return
                    sock.sendto(data, client)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        address = sock.getsockname()
        try:
            yield f"127.0.0.1:{address[1]}"
        finally:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
                last.sendto(b"end", address)
            thread.join(PATIENCE_S)


def try_datagram(port: int) -> bool:
    """Whether a new flow is answered, soon."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.1)
        sock.connect(("127.0.0.1", port))
        with contextlib.suppress(OSError):
            sock.send(b"hello")
            return sock.recv(100) == b"hello"
        return False
