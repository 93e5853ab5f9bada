"""Backends as they are: closing while we reuse them, down, silent, slow, unequal, found by name.

What a client sees of it, and what the metrics say.
"""

import contextlib
import itertools
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.harness import Backend, BackendConnection, Client, Gateway, House, eventually
from tests.e2e.http_world import answer, read_body
from tests.ports import free_port

REQUEST = b"GET /x HTTP/1.1\r\nHost: a.example\r\n\r\n"
POST = b"POST /x HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\n\r\nhello"


def config(port: int, *backends: str, http: str = "", policy: str = "") -> str:
    """``backends``: addresses, or addresses with more keys of their tables."""
    tables = ", ".join(f"{{ {each} }}" if "=" in each else f'{{ address = "{each}" }}' for each in backends)
    balancing = f'load_balancing = {{ policy = "{policy}" }}' if policy else ""
    return f"""
[[listeners]]
name = "web"
address = "127.0.0.1:{port}"
protocol = "h1"
backends = [{tables}]
{balancing}
[listeners.http]
{http}
"""


def serve(connection: BackendConnection) -> None:
    """Answer with the backend's name."""
    while True:
        head = connection.until(b"\r\n\r\n")
        read_body(connection, head)
        answer(connection, connection.backend.name.encode())


@pytest.fixture
def dead() -> str:
    """An address on which nobody listens."""
    return f"127.0.0.1:{free_port()}"


class TestReuse:
    def test_one_connection_serves_many_clients_in_turn(self, house: House) -> None:
        port = house.port
        with Backend(serve) as backend, house.gateway(config(port, backend.address)) as gateway:
            for _ in range(20):
                with Client(port) as client:
                    for _ in range(10):
                        client.send(REQUEST)
                        assert client.response()[0] == 200
            assert backend.connections == 1
            gateway.wait_metric("pool_leases_total", 200)
            assert gateway.metric("pool_reuse_total") == 199
            assert gateway.metric("pool_connections", state="idle") == 1

    def test_an_idle_connection_is_closed_before_the_backend_would(self, house: House) -> None:
        """`Keep-Alive: timeout=2`: the gateway gives it up after one second."""
        port = house.port
        ended: list[float] = []

        def script(connection: BackendConnection) -> None:
            connection.until(b"\r\n\r\n")
            answer(connection, b"x", headers=b"keep-alive: timeout=2, max=100\r\n")
            began = time.monotonic()
            assert connection.sock.recv(1) == b""
            ended.append(time.monotonic() - began)

        with (
            Backend(script) as backend,
            house.gateway(config(port, backend.address)),
            Client(port) as client,
        ):
            client.send(REQUEST)
            assert client.response()[0] == 200
            eventually(lambda: ended, "the gateway closes it")
        # A busy machine may be late; that it is meant to be in time, tests/net/test_h1_back.py says.
        assert 0.9 < ended[0] < 10


def closes_after_five(announced: bool) -> Callable[[BackendConnection], None]:
    """Each connection answers five requests and is then closed by the backend."""

    def script(connection: BackendConnection) -> None:
        for number in range(1, 6):
            head = connection.until(b"\r\n\r\n")
            read_body(connection, head)
            is_last = announced and number == 5
            answer(connection, b"x", headers=b"connection: close\r\n" if is_last else b"")

    return script


def closes_when_idle(connection: BackendConnection) -> None:
    """Closed after 50 ms without a request, which is while the gateway reuses it."""
    with contextlib.suppress(TimeoutError):
        while True:
            connection.sock.settimeout(60)
            read_body(connection, connection.until(b"\r\n\r\n"))
            answer(connection, b"x")
            connection.sock.settimeout(0.05)
            connection.buffer += connection.sock.recv(65536) or _end()


def _end() -> bytes:
    raise EOFError


class TestBackendsThatClose:
    @pytest.mark.parametrize(
        "script", [closes_after_five(True), closes_after_five(False)], ids=["said", "unsaid"]
    )
    def test_ten_thousand_requests_without_a_failure(
        self, house: House, script: Callable[[BackendConnection], None]
    ) -> None:
        port = house.port
        with Backend(script) as backend, house.gateway(config(port, backend.address)) as gateway:
            statuses = hammer(port, 10_000, itertools.repeat(REQUEST))
            assert statuses == Counter({200: 10_000})
            assert backend.connections >= 2000
            assert gateway.metric("backend_requests_total", status_class="none") == 0

    def test_a_post_is_sent_again_unless_a_program_may_have_seen_it(self, house: House) -> None:
        """A backend that closes without a word while a request is on its way. Nearly always that request came
        too late and is repeated; one that was already in the backend's buffer may have been read, and is not
        (RFC 9110 9.2.2)."""
        port = house.port
        with (
            Backend(closes_after_five(False)) as backend,
            house.gateway(config(port, backend.address)) as gateway,
        ):
            statuses = hammer(port, 4000, itertools.repeat(POST))
            assert statuses[200] + statuses[502] == 4000
            assert statuses[502] <= 200, statuses
            assert gateway.metric("backend_retries_total", reason="stale") > 0

    def test_idle_connections_that_close_at_any_moment(self, house: House) -> None:
        """Twenty clients speak at the same moment, about as long after the last one as the backend waits."""
        port = house.port
        rounds = 25
        pauses = itertools.cycle([0.047, 0.048, 0.049, 0.0495, 0.05, 0.0505, 0.051, 0.053])
        clock = threading.Event()

        def think() -> None:
            clock.wait(next(pauses))

        barrier = threading.Barrier(20, think)
        with (
            Backend(closes_when_idle) as backend,
            house.gateway(config(port, backend.address)) as gateway,
        ):
            statuses = hammer(port, 20 * rounds, itertools.repeat(REQUEST), barrier, threads=20)
            assert statuses == Counter({200: 20 * rounds})
            assert backend.connections > 2 * 20, "they did close"
            assert gateway.metric("pool_reuse_total") > 2 * 20, "and some were reused"


def hammer(
    port: int,
    total: int,
    requests: Iterator[bytes],
    barrier: threading.Barrier | None = None,
    threads: int = 4,
) -> Counter[int]:
    """Send requests on a few keep-alive connections; how often each status came. -1: the connection broke.

    ``barrier``: passed by all clients together before each of their requests.
    """
    statuses: Counter[int] = Counter()
    lock = threading.Lock()

    def work() -> None:
        counts: Counter[int] = Counter()
        left = total // threads
        while left:
            with Client(port) as client:
                while left:
                    left -= 1
                    with lock:
                        request = next(requests)
                    if barrier is not None:
                        barrier.wait(20)
                    try:
                        client.send(request)
                        status, headers, _ = client.response()
                    except (OSError, AssertionError):
                        counts[-1] += 1
                        break
                    counts[status] += 1
                    if headers.get("connection") == "close":
                        break
        with lock:
            statuses.update(counts)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return statuses


class TestBackendsThatFail:
    def ask(self, port: int) -> tuple[int, dict[str, str], bytes]:
        with Client(port) as client:
            client.send(REQUEST)
            return client.response()

    def expect(self, gateway: Gateway, port: int, status: int, error: str, reason: str) -> None:
        got, headers, body = self.ask(port)
        assert got == status, body
        assert re.match(rf"expressgateway; error={error}(;|$)", headers["proxy-status"]), headers
        assert headers["x-request-id"].encode() in body
        assert headers["content-type"].startswith("text/plain")
        gateway.wait_metric("http_gateway_errors_total", 1, listener="web", reason=reason)

    def test_down(self, house: House, dead: str) -> None:
        port = house.port
        with house.gateway(config(port, dead)) as gateway:
            self.expect(gateway, port, 502, "connection_refused", "connect_refused")
            gateway.wait_metric("backend_connect_failures_total", 1, backend=dead)

    def test_one_of_two_down_costs_nothing(self, house: House, dead: str) -> None:
        port = house.port
        with (
            Backend(serve, "up") as backend,
            house.gateway(config(port, dead, backend.address)) as gateway,
        ):
            for _ in range(20):
                assert self.ask(port)[::2] == (200, b"up")
            with Client(port) as client:
                for _ in range(20):
                    client.send(POST)
                    assert client.response()[::2] == (200, b"up")
            assert 20 <= gateway.metric("backend_connect_failures_total", backend=dead) <= 40
            assert gateway.metric("http_gateway_errors_total") == 0

    def test_silent(self, house: House) -> None:
        port = house.port
        gone = threading.Event()

        def silent(connection: BackendConnection) -> None:
            connection.until(b"\r\n\r\n")
            with contextlib.suppress(OSError):
                connection.sock.recv(1)
            gone.set()

        fast = "head_timeout_ms = 300"
        with (
            Backend(silent) as backend,
            house.gateway(config(port, backend.address, http=fast)) as gateway,
        ):
            self.expect(gateway, port, 504, "http_response_timeout", "head_timeout")
            assert gone.wait(30), "and the backend's connection is closed"

    def test_slow_beyond_the_total(self, house: House) -> None:
        """A trickle of 1xx does not prolong it."""
        port = house.port

        def hinting(connection: BackendConnection) -> None:
            connection.until(b"\r\n\r\n")
            connection.sock.settimeout(0.05)
            while True:
                connection.send(b"HTTP/1.1 102 Processing\r\n\r\n")
                with contextlib.suppress(TimeoutError):
                    if not connection.sock.recv(1):
                        return

        fast = "total_timeout_ms = 400"
        with (
            Backend(hinting) as backend,
            house.gateway(config(port, backend.address, http=fast)) as gateway,
        ):
            with Client(port) as client:
                client.send(REQUEST)
                while (status := client.response()[0]) < 200:
                    pass
            assert status in (502, 504)
            eventually(lambda: gateway.metric("http_gateway_errors_total") == 1, "it is counted")

    def test_stalled_within_the_body(self, house: House) -> None:
        port = house.port

        def stalling(connection: BackendConnection) -> None:
            connection.until(b"\r\n\r\n")
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
            connection.sock.recv(1)

        fast = "body_timeout_ms = 300"
        with (
            Backend(stalling) as backend,
            house.gateway(config(port, backend.address, http=fast)) as gateway,
        ):
            with Client(port) as client:
                client.send(REQUEST)
                assert client.rest().endswith(b"half")
            gateway.wait_metric("http_gateway_errors_total", 1, reason="body_timeout")

    def test_never_connecting(self, house: House) -> None:
        port = house.port
        with (
            full_backlog() as address,
            house.gateway(config(port, address), runtime="connect_timeout_ms = 300") as gateway,
        ):
            self.expect(gateway, port, 504, "connection_timeout", "connect_timeout")

    def test_never_connecting_with_another_at_hand(self, house: House) -> None:
        port = house.port
        with full_backlog() as address, Backend(serve, "up") as backend:
            text = config(port, address, backend.address)
            with house.gateway(text, runtime="connect_timeout_ms = 1000"):
                assert [self.ask(port)[::2] for _ in range(2)] == [(200, b"up")] * 2

    @pytest.mark.parametrize(
        ("sent", "error", "reason"),
        [
            (b"", "connection_terminated", "backend_reset"),
            (b"HTTP/1.1 200", "http_response_incomplete", "backend_truncated"),
            (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "http_protocol_error", "backend_protocol"),
            (
                b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
                "http_protocol_error",
                "backend_protocol",
            ),
            (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000, "http_response_header_section_size",
             "backend_head_too_large"),
        ],
        ids=["closing", "half a head", "not HTTP", "two lengths", "endless head"],
    )  # fmt: skip
    def test_wrong(self, house: House, sent: bytes, error: str, reason: str) -> None:
        port = house.port

        def script(connection: BackendConnection) -> None:
            connection.until(b"\r\n\r\n")
            connection.send(sent)

        with Backend(script) as backend, house.gateway(config(port, backend.address)) as gateway:
            self.expect(gateway, port, 502, error, reason)
            assert gateway.metric("backend_requests_total", status_class="none") == 1

    def test_a_name_that_does_not_resolve(self, house: House) -> None:
        port = house.port
        with house.gateway(config(port, "nobody.invalid:80")) as gateway:
            self.expect(gateway, port, 502, "dns_error", "dns")


@contextlib.contextmanager
def full_backlog() -> Iterator[str]:
    """An address whose connections are neither accepted nor refused."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        address = sock.getsockname()
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(address)
        yield f"127.0.0.1:{address[1]}"


class TestBalancing:
    def shares(self, port: int, requests: int) -> Counter[bytes]:
        with Client(port) as client:
            counts: Counter[bytes] = Counter()
            for _ in range(requests):
                client.send(REQUEST)
                counts[client.response()[2]] += 1
            return counts

    @pytest.mark.parametrize(
        ("policy", "weights", "expected"),
        [
            ("round_robin", (1, 1, 1), (20, 20, 20)),
            ("round_robin", (1, 0, 1), (30, 0, 30)),
            ("weighted_round_robin", (1, 2, 3), (10, 20, 30)),
            ("weighted_round_robin", (5, 0, 1), (50, 0, 10)),
        ],
    )
    def test_shares_are_exact(
        self, house: House, policy: str, weights: tuple[int, ...], expected: tuple[int, ...]
    ) -> None:
        port = house.port
        with contextlib.ExitStack() as stack:
            backends = [stack.enter_context(Backend(serve, f"b{number}")) for number in range(len(weights))]
            tables = [
                f'address = "{backend.address}", weight = {weight}'
                for backend, weight in zip(backends, weights, strict=True)
            ]
            stack.enter_context(house.gateway(config(port, *tables, policy=policy)))
            counts = self.shares(port, 60)
        assert tuple(counts[f"b{number}".encode()] for number in range(len(weights))) == expected

    def test_a_backend_by_name(self, house: House) -> None:
        port = house.port
        with (
            Backend(serve, "named") as backend,
            house.gateway(config(port, f"localhost:{backend.port}")),
        ):
            assert self.shares(port, 10) == Counter({b"named": 10})
