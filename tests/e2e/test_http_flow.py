"""How HTTP/1.1 messages move: full duplex, bounded, cut short honestly, cancelled at once, without leaks.

Every test runs against a listener in clear text and one with TLS.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Backend, BackendConnection, Client, Gateway, eventually
from tests.e2e.http_world import (
    World,
    answer,
    chunked,
    fd_count,
    http_world,
    read_body,
    rss_bytes,
    send_until_stuck,
)
from tests.ports import free_port

BIG = 300_000_000
"""Bytes that no buffer on the way could hold."""
KERNEL_BYTES = 48_000_000
"""What the buffers of four loopback sockets may take at most."""
WINDOW_BYTES = 4_000_000
"""By how much a worker may grow for one stalled exchange: far above its windows, far below a body."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    capped = """
[[listeners]]
name = "capped"
address = "127.0.0.1:{port_capped}"
protocol = "h1"
backends = [{ address = "{backend}" }]
[listeners.http]
max_request_body_bytes = 1000
"""
    directory = tmp_path_factory.mktemp("flow")
    with http_world(
        directory, runtime="max_keepalive_requests = 0", http="max_request_body_bytes = 0", more=capped
    ) as it:
        yield it


@pytest.fixture(params=["clear", "tls"])
def client(request: pytest.FixtureRequest, world: World) -> Iterator[Client]:
    with world.client(request.param) as it:
        yield it


@pytest.fixture
def worker(world: World) -> int:
    (pid,) = world.gateway.worker_pids()
    return pid


def post(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: a.example", *lines, "", ""]).encode()


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: a.example\r\n\r\n".encode()


class Gate(threading.Event):
    """Opened by the test; a script waits there."""

    def pass_(self) -> None:
        assert self.wait(20)


class TestDuplex:
    def test_bytes_go_both_ways_before_the_request_ends(self, world: World, client: Client) -> None:
        def echo(connection: BackendConnection, head: bytes) -> None:
            connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            while size := int(connection.until(b"\r\n"), 16):
                data = connection.exactly(size + 2)
                connection.send(b"%x\r\n" % size + data)
            connection.exactly(2)
            connection.send(b"0\r\n\r\n")

        client.send(post(world.on(echo), "Transfer-Encoding: chunked"))
        client.until(b"\r\n\r\n")
        for word in (b"one", b"two", b"three"):
            client.send(b"%x\r\n%s\r\n" % (len(word), word))
            assert client.until(b"\r\n") == b"%x\r\n" % len(word)
            assert client.exactly(len(word) + 2) == word + b"\r\n"
        client.send(b"0\r\n\r\n")
        assert client.until(b"0\r\n\r\n") == b"0\r\n\r\n"

    @pytest.mark.parametrize("kind", ["length", "chunked"])
    def test_an_answer_may_come_while_the_body_is_sent(self, world: World, client: Client, kind: str) -> None:
        path = world.on(lambda connection, _: answer(connection, b"enough" * 1000, status="409 Conflict"))
        framing = "Content-Length: 100000000" if kind == "length" else "Transfer-Encoding: chunked"
        client.send(post(path, framing) + (b"" if kind == "length" else b"1000000\r\n") + bytes(40_000))
        status, headers, body = client.response()
        assert (status, body) == (409, b"enough" * 1000)
        assert headers["connection"] == "close"
        client.rest()
        with world.client("clear") as other:
            other.send(get(world.on(lambda connection, _: answer(connection, b"fine"))))
            assert other.response()[2] == b"fine", "the half-used backend connection is not used again"


class TestBackpressure:
    def test_a_client_that_does_not_read_stops_the_backend(
        self, world: World, client: Client, worker: int
    ) -> None:
        sent = []
        gate = Gate()

        def script(connection: BackendConnection, head: bytes) -> None:
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % BIG)
            sent.append(send_until_stuck(connection.sock, BIG))
            gate.set()
            connection.sock.settimeout(60)
            connection.sock.recv(1)

        before = rss_bytes(worker)
        client.send(get(world.on(script)))
        gate.pass_()
        assert 0 < sent[0] < KERNEL_BYTES
        assert rss_bytes(worker) - before < WINDOW_BYTES

    def test_a_backend_that_does_not_read_stops_the_client(
        self, world: World, client: Client, worker: int
    ) -> None:
        gate = Gate()
        path = world.on(lambda connection, _: gate.pass_())
        before = rss_bytes(worker)
        client.send(post(path, f"Content-Length: {BIG}"))
        sent = send_until_stuck(client.sock, BIG)
        grown = rss_bytes(worker) - before
        gate.set()
        assert 0 < sent < KERNEL_BYTES
        assert grown < WINDOW_BYTES

    def test_what_was_stalled_goes_on(self, world: World, client: Client) -> None:
        size = 30_000_000
        done = Gate()

        def script(connection: BackendConnection, head: bytes) -> None:
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
            sent = send_until_stuck(connection.sock, size, 0.2)
            done.set()
            connection.sock.settimeout(60)
            connection.send(bytes(size - sent))

        client.send(get(world.on(script)))
        done.pass_()
        client.until(b"\r\n\r\n")
        left = size - len(client.buffer)
        while left:
            data = client.sock.recv(262_144)
            assert data
            left -= len(data)


class TestTruncation:
    @pytest.mark.parametrize("kind", ["length", "chunked"])
    @pytest.mark.parametrize("reset", [False, True])
    def test_an_upload_cut_short_never_completes(
        self, world: World, client: Client, kind: str, reset: bool
    ) -> None:
        begun, ended = Gate(), Gate()
        got = bytearray()
        errors: list[OSError] = []

        def script(connection: BackendConnection, head: bytes) -> None:
            got.extend(connection.buffer)
            begun.set()
            try:
                while data := connection.sock.recv(65536):
                    got.extend(data)
            except OSError as error:
                errors.append(error)
            ended.set()
            raise EOFError

        framing = "Content-Length: 100" if kind == "length" else "Transfer-Encoding: chunked"
        client.send(post(world.on(script), framing) + (b"" if kind == "length" else b"64\r\n") + b"x" * 60)
        begun.pass_()
        if reset:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.sock.close()
        began = time.monotonic()
        ended.pass_()
        assert time.monotonic() - began < 20, "the backend learns at once, and not from a timeout"
        assert len(got) < 100
        assert b"0\r\n\r\n" not in got

    @pytest.mark.parametrize("kind", ["length", "chunked", "mid-chunk"])
    @pytest.mark.parametrize("reset", [False, True])
    def test_a_response_cut_short_never_looks_complete(
        self, world: World, client: Client, kind: str, reset: bool
    ) -> None:
        got = Gate()

        def script(connection: BackendConnection, head: bytes) -> None:
            if kind == "length":
                connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n" + b"x" * 60)
            else:
                connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                connection.send(b"3c\r\n" + b"x" * 60 + (b"\r\n" if kind == "chunked" else b""))
            got.pass_()
            if reset:
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            raise EOFError

        before = world.gateway.metric("http_gateway_errors_total")
        client.send(get(world.on(script)))
        head = client.until(b"\r\n\r\n")
        while client.buffer.count(b"x") < 60:
            client.buffer += client.sock.recv(1000)
        got.set()
        body = client.rest()
        assert body.count(b"x") == 60
        if b"transfer-encoding: chunked" in head:
            assert not body.endswith(b"0\r\n\r\n")
        else:
            assert len(body) < 1000
        eventually(lambda: world.gateway.metric("http_gateway_errors_total") == before + 1, "it is counted")

    def test_a_close_delimited_response_that_is_reset_is_not_complete(
        self, world: World, client: Client
    ) -> None:
        got = Gate()

        def script(connection: BackendConnection, head: bytes) -> None:
            connection.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
            got.pass_()
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            raise EOFError

        client.send(get(world.on(script)))
        client.until(b"half")
        got.set()
        assert not client.rest().endswith(b"0\r\n\r\n")

    def test_a_response_that_contradicts_its_length_is_not_passed_on_whole(
        self, world: World, client: Client
    ) -> None:
        path = world.on(
            lambda connection, _: connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabcdef")
        )
        client.send(get(path))
        assert client.response()[2] == b"abc"
        fine = world.on(lambda connection, _: answer(connection, b"fine"))
        client.send(get(fine))
        assert client.response()[2] == b"fine", "the rest is not taken for the next answer"


class TestCaps:
    def test_a_declared_length_over_the_cap(self, world: World) -> None:
        asked: list[bytes] = []
        path = world.on(lambda _, head: asked.append(head))
        with world.client("capped") as client:
            client.send(post(path, "Content-Length: 1001") + bytes(1001))
            status, headers, _ = client.response()
            assert (status, headers["connection"]) == (413, "close")
            assert "http_request_error" in headers["proxy-status"]
        assert not asked

    def test_a_counted_length_over_the_cap(self, world: World) -> None:
        got, begun, ended = bytearray(), Gate(), Gate()

        def script(connection: BackendConnection, head: bytes) -> None:
            begun.set()
            try:
                while data := connection.sock.recv(65536):
                    got.extend(data)
            except OSError:
                pass
            ended.set()
            raise EOFError

        with world.client("capped") as client:
            client.send(
                post(world.on(script), "Transfer-Encoding: chunked") + b"1f4\r\n" + bytes(500) + b"\r\n"
            )
            begun.pass_()
            client.send(chunked(bytes(501), 500))
            assert client.response()[0] == 413
        ended.pass_()
        assert not got.endswith(b"0\r\n\r\n"), "the backend never sees a complete request"
        world.gateway.wait_metric("http_gateway_errors_total", listener="capped", reason="body_too_large")

    def test_the_cap_itself_passes(self, world: World) -> None:
        path = world.on(lambda connection, head: answer(connection, read_body(connection, head)))
        with world.client("capped") as client:
            client.send(post(path, "Content-Length: 1000") + bytes(1000))
            assert client.response()[::2] == (200, bytes(1000))
            client.send(post(path, "Transfer-Encoding: chunked") + chunked(bytes(1000), 100))
            assert client.response()[::2] == (200, bytes(1000))


@pytest.mark.parametrize("when", ["before the answer", "within the answer"])
@pytest.mark.parametrize("how", ["fin", "rst"])
def test_a_client_that_leaves_is_seen_by_the_backend(
    world: World, client: Client, when: str, how: str
) -> None:
    begun, ended = Gate(), Gate()

    def script(connection: BackendConnection, head: bytes) -> None:
        if when == "within the answer":
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nbegin")
        begun.set()
        try:
            if connection.sock.recv(1) == b"":
                ended.set()
        except OSError:
            ended.set()
        raise EOFError

    client.send(get(world.on(script)))
    begun.pass_()
    if when == "within the answer":
        client.until(b"begin")
    if how == "rst":
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.sock.close()
    began = time.monotonic()
    ended.pass_()
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("front", ["clear", "tls"])
def test_ten_thousand_exchanges_leave_nothing_behind(world: World, worker: int, front: str) -> None:
    """Some end well, some badly, and on some connections the client leaves in the middle."""

    def stop(connection: BackendConnection, head: bytes) -> None:
        raise EOFError

    def half(connection: BackendConnection, head: bytes) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
        raise EOFError

    good = get(world.on(lambda connection, _: answer(connection, b"x" * 100)))
    echo = post(
        world.on(lambda connection, head: answer(connection, read_body(connection, head))),
        "Content-Length: 5",
    )
    failing, cut = get(world.on(stop)), get(world.on(half))

    def round_(exchanges: int) -> None:
        """40 to 45 exchanges on each connection."""
        for number in range(exchanges // 40):
            with world.client(front) as client:
                for _ in range(10):
                    client.send((good + echo + b"hello") * 2)
                    for body in (b"x" * 100, b"hello") * 2:
                        assert client.response()[::2] == (200, body)
                match number % 4:
                    case 0:
                        client.send(failing)
                        assert client.response()[0] == 502
                    case 1:
                        client.send(cut)
                        client.rest()
                    case 2:
                        client.send(echo + b"he")
                    case _:
                        client.send(good * 5)

    def in_threads(work: Callable[[int], None], exchanges: int) -> None:
        failures: list[BaseException] = []

        def guarded() -> None:
            try:
                work(exchanges // 2)
            except BaseException as error:  # noqa: BLE001 - told by the test's own thread
                failures.append(error)

        threads = [threading.Thread(target=guarded) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def is_quiet() -> bool:
        metric = world.gateway.metric
        return metric("connections_inflight") == metric("backend_inflight") == 0

    in_threads(round_, 2000)
    eventually(is_quiet, "nothing is under way")
    memory, files = rss_bytes(worker), fd_count(worker)
    in_threads(round_, 8000)
    eventually(is_quiet, "nothing is under way")
    idle = world.gateway.metric("pool_connections", state="idle")
    assert fd_count(worker) <= files + idle
    assert rss_bytes(worker) - memory < 2_000_000
    assert world.gateway.metric("worker_faults_total") == 0


def test_the_end_of_a_budget_never_resets_what_was_answered(tmp_path: Path) -> None:
    """What was sent behind the last request allowed is not read; closing must not destroy the answer."""
    port = free_port()
    config = f"""
[[listeners]]
name = "web"
address = "127.0.0.1:{port}"
protocol = "h1"
backends = [{{ address = "{{backend}}" }}]
"""
    request = b"GET / HTTP/1.1\r\nHost: a\r\nX-Pad: " + b"x" * 2000 + b"\r\n\r\n"
    with Backend() as backend:
        with (
            Gateway(
                tmp_path, config.replace("{backend}", backend.address), runtime="max_keepalive_requests = 2"
            ),
            Client(port) as client,
        ):
            client.send(request * 200)
            assert client.response()[1].get("connection") is None
            assert client.response()[1]["connection"] == "close"
            assert client.sock.recv(1) == b"", "an orderly end, and no reset"
        assert len(backend.requests) == 2
