"""How HTTP/2 messages move towards an HTTP/1.1 backend: bounded, cut short honestly, each stream for itself.

Every test runs over TLS (by ALPN) and in clear text (by prior knowledge).
"""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.e2e.h2_raw import (
    CANCEL,
    CLOSED,
    END_STREAM,
    FLOW,
    FRAME_SIZE,
    INTERNAL,
    LINGER_RESET,
    MAX,
    NO_ERROR,
    PROTOCOL,
    WINDOW,
    RawH2,
    data,
    h2_context,
    headers,
    request,
    rst,
    settings,
    window_update,
)
from tests.e2e.harness import BackendConnection, eventually
from tests.e2e.http_world import (
    World,
    answer,
    chunked,
    http_world,
    read_body,
    rss_bytes,
    send_until_stuck,
)

BIG = 300_000_000
"""Bytes that no buffer on the way could hold."""
KERNEL_BYTES = 48_000_000
"""What the buffers of four loopback sockets may take at most."""
WINDOW_BYTES = 4_000_000
"""By how much a worker may grow for one stalled exchange: far above its windows, far below a body."""
LISTENERS = """
[[listeners]]
name = "h2c"
address = "127.0.0.1:{port_h2c}"
protocol = "h1"
h2c = true
backends = [{ address = "{backend}" }]
[listeners.http]
max_request_body_bytes = 0
[[listeners]]
name = "capped"
address = "127.0.0.1:{port_capped}"
protocol = "h1"
h2c = true
backends = [{ address = "{backend}" }]
[listeners.http]
max_request_body_bytes = 1000
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with http_world(
        tmp_path_factory.mktemp("h2flow"),
        runtime="max_keepalive_requests = 0",
        http="max_request_body_bytes = 0",
        more=LISTENERS,
    ) as it:
        yield it
        assert it.gateway.metric("worker_faults_total") == 0


def connect(
    world: World, front: str, *, grants: bool = True, offer: tuple[tuple[int, int], ...] = ()
) -> RawH2:
    tls = h2_context(str(world.trust)) if front == "tls" else None
    return RawH2(world.ports[front], tls=tls, grants=grants, offer=offer)


@pytest.fixture(params=["tls", "h2c"])
def front(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def client(world: World, front: str) -> Iterator[RawH2]:
    with connect(world, front) as it:
        yield it


@pytest.fixture
def worker(world: World) -> int:
    (pid,) = world.gateway.worker_pids()
    return pid


class Gate(threading.Event):
    """Opened by the test; a script waits there."""

    def pass_(self) -> None:
        assert self.wait(20)


class Watched:
    """A backend's script that takes an upload to its end, whichever that is, and remembers all of it."""

    def __init__(self, begin: bytes = b"") -> None:
        self.begun, self.ended = Gate(), Gate()
        self.got = bytearray()
        self.was_reset = False
        self._begin = begin

    def __call__(self, connection: BackendConnection, head: bytes) -> None:
        connection.send(self._begin)
        self.got.extend(connection.buffer)
        self.begun.set()
        try:
            while part := connection.sock.recv(65536):
                self.got.extend(part)
        except OSError:
            self.was_reset = True
        self.ended.set()
        raise EOFError


def still_serves(world: World, client: RawH2) -> None:
    assert client.ask(request(world.on(lambda it, _: answer(it, b"fine")))).body == b"fine"
    assert not client.goaways


def pattern(size: int) -> bytes:
    """Bytes in which every displacement shows."""
    return b"".join(b"%08d" % number for number in range(size // 8 + 1))[:size]


class TestWindows:
    def test_changed_in_mid_transfer(self, world: World, front: str) -> None:
        body = pattern(1_000_003)
        path = world.on(lambda connection, _: answer(connection, body))
        with connect(world, front, offer=((WINDOW, 10),), grants=False) as client:
            stream = client.open(request(path))
            found = client.answer(stream)
            client.until(lambda: found.size == 10)
            client.send(window_update(0, 2_000_000))
            total = 10
            # Initial windows; each changes the stream's by the difference to the one before.
            for before, after in (
                (10, 5000),
                (5000, 0),
                (0, 70_000),
                (70_000, 1),
                (1, 300_000),
                (300_000, 65_535),
            ):
                client.send(settings((WINDOW, after)))
                client.pong()
                total = max(total, after)
                client.until(lambda: found.size == total)  # noqa: B023  # called within the turn
                client.pong()
                assert found.size == total, (before, after)
            client.send(settings((FRAME_SIZE, 30_000), (WINDOW, MAX)))
            assert client.response(stream).body == body

    def test_of_a_few_bytes(self, world: World, front: str) -> None:
        body = pattern(3000)
        path = world.on(lambda connection, _: answer(connection, body))
        with connect(world, front, offer=((WINDOW, 7),)) as client:
            assert client.ask(request(path)).body == body

    def test_one_at_zero_does_not_hold_up_its_siblings(self, world: World, front: str) -> None:
        body = pattern(200_000)
        path = world.on(lambda connection, _: answer(connection, body))
        with connect(world, front, offer=((WINDOW, 0),), grants=False) as client:
            stalled = client.open(request(path))
            client.send(window_update(0, 1_000_000))
            for _ in range(3):
                stream = client.open(request(path))
                client.send(window_update(stream, 200_000))
                assert client.response(stream).body == body
            assert client.answer(stalled).size == 0
            client.send(window_update(stalled, 200_000))
            assert client.response(stalled).body == body

    def test_that_the_client_exceeds_are_a_stream_error(self, world: World, client: RawH2) -> None:
        """A backend that does not read: credit ends, the client goes on regardless."""
        watched = Gate()
        path = world.on(lambda connection, _: watched.pass_())
        stream = client.open(request(path, "POST"), end=False)
        client.until(lambda: client.granted, "credit for the connection")
        found = client.answer(stream)
        left = 60_000_000
        while found.reset is None and left > 0:
            room = min(16_384, client.window)
            if room <= 0:
                client.read()
                continue
            client.window -= room
            left -= room
            client.send(data(stream, bytes(room)))
            client.sock.settimeout(0.0001)
            with contextlib.suppress(TimeoutError):
                client.read()
            client.sock.settimeout(60)
        watched.set()
        assert found.reset == FLOW
        still_serves(world, client)


class TestBackpressure:
    def test_a_client_that_does_not_read_stops_the_backend(
        self, world: World, front: str, worker: int
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
        with connect(world, front) as client:
            client.send(window_update(0, MAX - 65_535) + settings((WINDOW, MAX)))
            client.open(request(world.on(script)))  # and then reads nothing at all
            gate.pass_()
            assert 0 < sent[0] < KERNEL_BYTES
            assert rss_bytes(worker) - before < WINDOW_BYTES

    def test_streams_without_credit_stop_the_backend(self, world: World, front: str, worker: int) -> None:
        sent = []
        gate = threading.Semaphore(0)
        streams = 30

        def script(connection: BackendConnection, head: bytes) -> None:
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % BIG)
            sent.append(send_until_stuck(connection.sock, BIG))
            gate.release()
            connection.sock.settimeout(60)
            connection.sock.recv(1)

        path = world.on(script)
        before = rss_bytes(worker)
        with connect(world, front, offer=((WINDOW, 0),), grants=False) as client:
            for _ in range(streams):
                client.open(request(path))
            for _ in range(streams):
                assert gate.acquire(timeout=60)
            assert max(sent) < KERNEL_BYTES // 2
            # max_send_buf_size and one chunk for each
            assert rss_bytes(worker) - before < streams * 600_000
            other = client.open(request(world.on(lambda it, _: answer(it, b"fine"))))
            client.send(window_update(other, 100))
            assert client.response(other).body == b"fine"

    def test_a_backend_that_does_not_read_stops_the_client(
        self, world: World, client: RawH2, worker: int
    ) -> None:
        gate = Gate()
        path = world.on(lambda connection, _: gate.pass_())
        before = rss_bytes(worker)
        stream = client.open(request(path, "POST"), end=False)
        client.until(lambda: client.granted)
        sent = 0
        client.sock.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while sent < BIG:
                client.send_body(stream, bytes(65_536), end=False)
                sent += 65_536
        client.sock.settimeout(60)
        assert 0 < sent < KERNEL_BYTES
        assert rss_bytes(worker) - before < WINDOW_BYTES
        assert client.window > 0, "it is the stream's credit that is withheld, not the connection's"
        still_serves(world, client)
        gate.set()

    def test_what_was_stalled_goes_on(self, world: World, front: str) -> None:
        size = 20_000_000
        done = Gate()

        def script(connection: BackendConnection, head: bytes) -> None:
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
            sent = send_until_stuck(connection.sock, size, 0.2)
            done.set()
            connection.sock.settimeout(60)
            connection.send(bytes(size - sent))

        with connect(world, front) as client:
            stream = client.open(request(world.on(script)))
            done.pass_()
            assert client.response(stream).size == size

    def test_an_upload_that_was_stalled_goes_on(self, world: World, client: RawH2) -> None:
        body = pattern(12_000_000)
        gate = Gate()

        def script(connection: BackendConnection, head: bytes) -> None:
            gate.pass_()
            answer(connection, b"same" if read_body(connection, head) == body else b"other")

        stream = client.open(request(world.on(script), "POST"), end=False)
        client.sock.settimeout(0.3)
        at = 0
        with contextlib.suppress(TimeoutError):
            while at < len(body):
                if not client.window or not client.windows[stream]:
                    client.read()
                size = min(16_384, client.window, client.windows[stream], len(body) - at)
                if size:
                    client.send_body(stream, body[at : at + size], end=False)
                    at += size
        assert at < len(body)
        client.sock.settimeout(60)
        gate.set()
        client.send_body(stream, body[at:])
        assert client.response(stream).body == b"same"


class TestTruncation:
    @pytest.mark.parametrize("how", ["RST_STREAM", "FIN", "RST"])
    @pytest.mark.parametrize("kind", ["length", "open"])
    def test_an_upload_cut_short_never_completes(
        self, world: World, client: RawH2, kind: str, how: str
    ) -> None:
        watched = Watched()
        length = [("content-length", "100")] if kind == "length" else []
        stream = client.open(request(world.on(watched), "POST", *length), end=False)
        client.send_body(stream, b"x" * 60, end=False)
        watched.begun.pass_()
        if how == "RST_STREAM":
            client.send(rst(stream, CANCEL))
        elif how == "FIN":
            client.sock.close()
        else:
            client.reset_tcp()
        began = time.monotonic()
        watched.ended.pass_()
        assert time.monotonic() - began < 20, "the backend learns at once, and not from a timeout"
        assert watched.got.count(b"x") <= 60
        assert b"0\r\n\r\n" not in watched.got
        if how == "RST_STREAM":
            still_serves(world, client)

    def test_an_upload_that_contradicts_its_length_never_completes(self, world: World, client: RawH2) -> None:
        watched = Watched()
        stream = client.open(request(world.on(watched), "POST", ("content-length", "100")), end=False)
        client.send_body(stream, b"x" * 60, end=False)
        watched.begun.pass_()
        client.send(data(stream, b"y", END_STREAM))
        assert client.response(stream).reset == PROTOCOL
        watched.ended.pass_()
        assert len(watched.got) < 100
        still_serves(world, client)

    @pytest.mark.parametrize("kind", ["length", "chunked", "mid-chunk"])
    @pytest.mark.parametrize("reset", [False, True])
    def test_a_response_cut_short_never_looks_complete(
        self, world: World, client: RawH2, kind: str, reset: bool
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
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            raise EOFError

        before = world.gateway.metric("http_gateway_errors_total")
        stream = client.open(request(world.on(script)))
        found = client.answer(stream)
        client.until(lambda: found.size == 60)
        got.set()
        client.response(stream)
        assert not found.is_complete
        assert found.reset == INTERNAL
        still_serves(world, client)
        eventually(lambda: world.gateway.metric("http_gateway_errors_total") == before + 1, "it is counted")

    def test_a_response_cut_within_its_trailers(self, world: World, client: RawH2) -> None:
        def script(connection: BackendConnection, head: bytes) -> None:
            connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nx-a: 1\r\n")
            raise EOFError

        found = client.ask(request(world.on(script)))
        assert (found.is_complete, found.trailers, found.reset) == (False, None, INTERNAL)

    def test_a_close_delimited_response_that_is_reset_is_not_complete(
        self, world: World, client: RawH2
    ) -> None:
        got = Gate()

        def script(connection: BackendConnection, head: bytes) -> None:
            connection.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
            got.pass_()
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            raise EOFError

        stream = client.open(request(world.on(script)))
        client.until(lambda: client.answer(stream).size == 4)
        got.set()
        assert client.response(stream).reset == INTERNAL

    def test_a_backend_that_closes_before_its_head_is_502(self, world: World, client: RawH2) -> None:
        def script(connection: BackendConnection, head: bytes) -> None:
            raise EOFError

        found = client.ask(request(world.on(script), "POST"), b"x")
        assert (found.status, found.is_complete) == (502, True)
        assert "error=" in (found.get("proxy-status") or "")
        still_serves(world, client)


class TestSiblings:
    def test_one_streams_failure_is_its_own(self, world: World, client: RawH2) -> None:
        body = pattern(400_000)
        gate = Gate()

        def slow(connection: BackendConnection, head: bytes) -> None:
            got = read_body(connection, head)
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(got) + got[:1000])
            gate.pass_()
            connection.send(got[1000:])

        def broken(connection: BackendConnection, head: bytes) -> None:
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nx")
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            raise EOFError

        good = [client.open(request(world.on(slow), "POST"), end=False) for _ in range(5)]
        for stream in good:
            client.send_body(stream, body)
        for stream in good:
            client.until(lambda stream=stream: client.answer(stream).size >= 1000)  # type: ignore[misc]  # mypy
        assert client.ask(request(world.on(broken))).reset == INTERNAL
        assert client.ask(request("/x y")).reset == PROTOCOL
        bad = client.open(request(world.on(slow), "POST", ("content-length", "5")), end=False)
        client.send(data(bad, b"too much", END_STREAM))
        assert client.response(bad).reset == PROTOCOL
        cancelled = client.open(request(world.on(slow), "POST"), end=False)
        client.send(rst(cancelled))
        gate.set()
        for stream in good:
            assert client.response(stream).body == body
        assert not client.goaways

    def test_a_malformed_request_is_never_forwarded(self, world: World, client: RawH2) -> None:
        seen = []
        path = world.on(lambda connection, head: seen.append(head))
        for more in (("X-Upper", "1"), ("connection", "close"), ("x", "a\r\nb: c"), (":late", "1")):
            stream = client.open([*request(path), more])
            assert client.response(stream).reset == PROTOCOL
        still_serves(world, client)
        assert not seen


class TestCancellation:
    @pytest.mark.parametrize("when", ["before the answer", "within the answer"])
    @pytest.mark.parametrize("code", [CANCEL, NO_ERROR, CLOSED])
    def test_a_reset_reaches_the_backend(self, world: World, client: RawH2, when: str, code: int) -> None:
        begin = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nbegin" if when.startswith("within") else b""
        watched = Watched(begin)
        stream = client.open(request(world.on(watched)))
        watched.begun.pass_()
        if begin:
            client.until(lambda: client.answer(stream).size == 5)
        client.send(rst(stream, code))
        began = time.monotonic()
        watched.ended.pass_()
        assert time.monotonic() - began < 20
        still_serves(world, client)
        assert not client.answer(stream).is_complete

    @pytest.mark.parametrize("how", ["FIN", "RST"])
    def test_the_end_of_the_connection_reaches_every_backend(
        self, world: World, client: RawH2, how: str
    ) -> None:
        watched = [Watched() for _ in range(10)]
        for each in watched:
            client.open(request(world.on(each)))
        for each in watched:
            each.begun.pass_()
        if how == "FIN":
            client.sock.close()
        else:
            client.reset_tcp()
        began = time.monotonic()
        for each in watched:
            each.ended.pass_()
        assert time.monotonic() - began < 20

    def test_many_cancelled_leave_nothing_behind(self, world: World, client: RawH2) -> None:
        """In a browser's measure: far below what counts as an attack."""
        for _ in range(40):
            watched = Watched()
            stream = client.open(request(world.on(watched), "POST"), end=False)
            watched.begun.pass_()
            client.send(rst(stream))
            watched.ended.pass_()
        still_serves(world, client)


class TestCaps:
    @pytest.fixture
    def capped(self, world: World) -> Iterator[RawH2]:
        with connect(world, "capped") as it:
            yield it

    def test_a_declared_length_over_the_cap(self, world: World, capped: RawH2) -> None:
        seen: list[bytes] = []
        path = world.on(lambda _, head: seen.append(head))
        stream = capped.open(request(path, "POST", ("content-length", "1001")), end=False)
        found = capped.response(stream)
        assert (found.status, found.is_complete) == (413, True)
        assert "http_request_error" in (found.get("proxy-status") or "")
        capped.send(data(stream, bytes(1001), END_STREAM))
        still_serves(world, capped)
        assert not seen

    def test_a_counted_length_over_the_cap(self, world: World, capped: RawH2) -> None:
        watched = Watched()
        stream = capped.open(request(world.on(watched), "POST"), end=False)
        capped.send_body(stream, bytes(500), end=False)
        watched.begun.pass_()
        capped.send_body(stream, bytes(501))
        assert capped.response(stream).status == 413
        watched.ended.pass_()
        assert not watched.got.endswith(b"0\r\n\r\n"), "the backend never sees a complete request"
        still_serves(world, capped)

    def test_the_cap_itself_passes(self, world: World, capped: RawH2) -> None:
        path = world.on(lambda connection, head: answer(connection, read_body(connection, head)))
        for more in ([("content-length", "1000")], []):
            assert capped.ask(request(path, "POST", *more), bytes(1000)).body == bytes(1000)


def test_a_list_over_the_limit_is_431(world: World, client: RawH2) -> None:
    found = client.ask([*request(), *((f"x-{number}", "v" * 7000) for number in range(10))])
    assert (found.status, found.is_complete) == (431, True)
    still_serves(world, client)


def test_a_chunk_of_every_size_of_trailers(world: World, client: RawH2) -> None:
    """A body that ends in the same read as its trailers, or far from them."""
    for body in (b"", b"x", bytes(70_000), bytes(300_000)):

        def script(connection: BackendConnection, head: bytes, body: bytes = body) -> None:
            connection.send(
                b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
                + chunked(body)[:-2]
                + b"x-sum: %d\r\n\r\n" % len(body)
            )

        found = client.ask(request(world.on(script)))
        assert (found.body, found.trailers) == (body, [("x-sum", str(len(body)))])


def test_headers_alone_are_a_request(world: World, client: RawH2) -> None:
    """END_STREAM in an empty DATA frame instead of on HEADERS."""
    path = world.on(lambda connection, head: answer(connection, read_body(connection, head) + b"."))
    client.send(headers(1, request(path, "POST"), 0x4) + data(1, b"", END_STREAM))
    assert client.response(1).body == b"."
