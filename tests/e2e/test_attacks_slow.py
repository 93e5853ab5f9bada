"""Clients that take their time: heads and bodies that trickle, downloads that nobody reads.

Each attack runs beside a good client on the same (only) worker, which must be served all the while.
"""

import contextlib
import select
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.e2e.harness import (
    Backend,
    BackendConnection,
    Client,
    Gateway,
    House,
    Steady,
    answer_ok,
    eventually,
    listener,
    resident_kib,
)
from tests.ports import free_port

_RUNTIME = (
    "max_keepalive_requests = 0\n[runtime.watchdog]\nsweep_interval_ms = 100\nheader_deadline_ms = 400\n"
)
_DOWNLOAD = 100_000_000


def _trickle(client: Client, part: bytes, every_s: float, at_most: int = 800) -> None:
    """Send ``part`` again and again until the gateway answers or closes."""
    for _ in range(at_most):
        if select.select([client.sock], [], [], every_s)[0]:
            return
        with contextlib.suppress(ConnectionError):
            client.send(part)
    raise AssertionError("the gateway went along with it")


class Uploads:
    """A backend's script that records uploads and tells whether their end was seen."""

    def __init__(self) -> None:
        self.begun = 0
        self.received = bytearray()
        self.ended = threading.Event()
        """The connection was cut."""
        self.errors: list[str] = []

    def serve(self, connection: BackendConnection) -> None:
        is_upload = False
        try:
            while data := connection.sock.recv(65536):
                if data.startswith(b"GET /good"):
                    connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\nbackend")
                    continue
                self.begun += data.startswith(b"POST ")
                self.received += data
                is_upload = True
        except ConnectionError as error:
            if is_upload:
                self.errors.append(type(error).__name__)
        if is_upload:
            self.ended.set()


# -- slow heads ----------------------------------------------------------------------------------------------


def test_a_head_that_trickles_is_answered_408(house: House) -> None:
    port = house.port
    with (
        Backend() as backend,
        house.gateway(listener(port, backend), runtime=_RUNTIME) as gateway,
        Steady(port),
    ):
        with Client(port) as client:
            began = time.monotonic()
            client.send(b"GET / HTTP/1.1\r\nHost: a\r\nX: ")
            _trickle(client, b"x", 0.02)
            status, headers, _ = client.response()
            took_s = time.monotonic() - began
            assert (status, headers["connection"]) == (408, "close")
            assert client.is_closed()
            assert 0.3 < took_s < 4.5  # five seconds are the default
        assert gateway.metric("security_events_total", listener="web", kind="slow_head") == 1
        assert gateway.metric("http_gateway_errors_total", listener="web", reason="slow_head") == 1
        assert all(b"GET /good" in data for data in backend.received)


def test_the_deadline_counts_from_the_first_byte_of_each_head(house: House) -> None:
    """An idle keep-alive connection is not slow; a second head that trickles is."""
    port = house.port
    with Backend() as backend, house.gateway(listener(port, backend), runtime=_RUNTIME) as gateway:
        with Client(port) as client, Client(port) as idle:
            for _ in range(2):
                client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                assert client.response()[0] == 200
            client.send(b"G")
            assert client.response()[0] == 408
            idle.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")  # connected all the while
            assert idle.response()[0] == 200
        assert gateway.metric("http_gateway_errors_total", reason="slow_head") == 1


def test_many_slow_connections_beside_a_good_client(tmp_path: Path) -> None:
    port = free_port()
    with (
        Backend() as backend,
        Gateway(tmp_path, listener(port, backend), runtime=_RUNTIME) as gateway,
        Steady(port) as good,
    ):
        (worker,) = gateway.worker_pids()
        before = resident_kib(worker)
        slow = [Client(port) for _ in range(300)]
        for client in slow:
            client.send(b"GET / HTTP/1.1\r\nHost: a\r\nX-Slow: ")
        waiting = {client.sock: client for client in slow}
        ends = time.monotonic() + 60
        while waiting and time.monotonic() < ends:
            readable, _, _ = select.select(list(waiting), [], [], 0.05)
            for sock in readable:
                client = waiting.pop(sock)
                assert client.response()[0] == 408
                assert client.is_closed()
                client.sock.close()
            for sock in waiting:
                with contextlib.suppress(ConnectionError):
                    sock.send(b"a")
        assert not waiting
        assert gateway.metric("security_events_total", kind="slow_head") == 300
        assert good.served > 10
        assert resident_kib(worker) - before < 30_000
        eventually(lambda: gateway.metric("connections_inflight", listener="web") == 1, "they are gone")


# -- slow bodies ---------------------------------------------------------------------------------------------


def test_a_body_that_trickles_is_answered_408_and_never_completes(house: House) -> None:
    for head, part, end in (
        (b"Content-Length: 1000", b"x", None),
        (b"Transfer-Encoding: chunked", b"1\r\nx\r\n", b"0\r\n\r\n"),
    ):
        port = house.port
        uploads = Uploads()
        with (
            Backend(uploads.serve) as backend,
            house.gateway(listener(port, backend), runtime=_RUNTIME) as gateway,
            Steady(port),
        ):
            with Client(port) as client:
                client.send(b"POST / HTTP/1.1\r\nHost: a\r\n" + head + b"\r\n\r\n" + part)
                _trickle(client, part, 0.05)  # 20 bytes a second; 64 are asked for
                status, headers, _ = client.response()
                assert (status, headers["connection"]) == (408, "close")
                assert client.is_closed()
            assert uploads.ended.wait(30)
            assert gateway.metric("security_events_total", listener="web", kind="slow_body") == 1
        assert uploads.begun == 1
        _, _, body = bytes(uploads.received).partition(b"\r\n\r\n")
        assert len(body) < 1000
        assert end is None or not body.endswith(end)


def test_a_body_that_stops_is_answered_408_and_never_completes(house: House) -> None:
    port = house.port
    uploads = Uploads()
    runtime = _RUNTIME + "body_progress_min_bps = 0\n"
    more = "[listeners.http]\nbody_timeout_ms = 400\n"
    with (
        Backend(uploads.serve) as backend,
        house.gateway(listener(port, backend, more), runtime=runtime) as gateway,
        Steady(port),
    ):
        with Client(port) as client:
            client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n" + b"x" * 999)
            status, headers, _ = client.response()
            assert (status, headers["connection"]) == (408, "close")
            assert client.is_closed()
        assert uploads.ended.wait(30)
        assert gateway.metric("security_events_total", listener="web", kind="slow_body") == 1
    assert uploads.received.endswith(b"x" * 999)
    assert uploads.errors == ["ConnectionResetError"], "cut, not ended in order"


def test_an_upload_that_is_fast_enough_is_left_alone(house: House) -> None:
    port = house.port
    with (
        Backend() as backend,
        house.gateway(listener(port, backend), runtime=_RUNTIME.replace("= 100", "= 300")),
        Client(port) as client,
    ):
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6400\r\n\r\n")
        for _ in range(64):  # for three seconds, two windows of the rate
            assert not select.select([client.sock], [], [], 0.05)[0]
            client.send(b"x" * 100)
        assert client.response()[0] == 200


# -- slow readers --------------------------------------------------------------------------------------------


class Downloads:
    """A backend's script with an endless appetite for sending; counts what it got rid of."""

    def __init__(self) -> None:
        self.sent = 0
        self.cut = 0
        self._lock = threading.Lock()

    def serve(self, connection: BackendConnection) -> None:
        while True:
            head, _ = connection.request()
            if not head.startswith(b"GET /big"):
                connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\nbackend")
                continue
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % _DOWNLOAD)
            piece = b"x" * 262144
            try:
                while True:
                    size = connection.sock.send(piece)
                    with self._lock:
                        self.sent += size
            except ConnectionError:
                with self._lock:
                    self.cut += 1
                return


def _stalled(port: int) -> Client:
    client = Client(port)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.send(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
    return client


def test_stalled_downloads_are_held_back_in_flat_memory_and_then_reset(tmp_path: Path) -> None:
    port = free_port()
    downloads = Downloads()
    more = "[listeners.http]\nbody_timeout_ms = 1500\n"
    with (
        Backend(downloads.serve) as backend,
        Gateway(tmp_path, listener(port, backend, more), runtime=_RUNTIME) as gateway,
        Steady(port),
    ):
        (worker,) = gateway.worker_pids()
        before = resident_kib(worker)
        clients = [_stalled(port) for _ in range(20)]
        eventually(
            lambda: gateway.metric("connections_inflight", listener="web") == 21, "the downloads have begun"
        )
        highest = before
        while downloads.cut < 20:
            highest = max(highest, resident_kib(worker))
            assert not threading.Event().wait(0.02)
            assert downloads.sent < 20 * 40_000_000, "the backend was not held back"
        # 20 windows of the gateway's, each a read and a backlog; the rest stands in the kernel's buffers
        assert highest - before < 20 * 1024, f"{highest - before} KiB for 20 stalled downloads"
        for client in clients:
            received = 0
            try:
                while data := client.sock.recv(1 << 20):
                    received += len(data)
                raise AssertionError("an orderly end of a response that was cut")
            except ConnectionResetError:
                assert received < _DOWNLOAD
            client.sock.close()
        assert gateway.metric("security_events_total", listener="web", kind="slow_reader") == 20
        assert gateway.metric("http_gateway_errors_total", reason="slow_reader") == 20
        eventually(lambda: gateway.metric("connections_inflight", listener="web") == 1, "they are gone")


def test_a_client_that_only_asks_is_held_back_and_then_reset(tmp_path: Path) -> None:
    """Pipelined requests whose answers nobody reads: each exchange is complete, only the client is stuck."""
    port = free_port()
    body = b"x" * 10_000

    def serve(connection: BackendConnection) -> None:
        while True:
            head, _ = connection.request()
            text = b"backend" if head.startswith(b"GET /good") else body
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text) + text)

    more = "[listeners.http]\nbody_timeout_ms = 500\n"
    with (
        Backend(serve) as backend,
        Gateway(tmp_path, listener(port, backend, more), runtime=_RUNTIME) as gateway,
        Steady(port),
    ):
        (worker,) = gateway.worker_pids()
        before = resident_kib(worker)
        with Client(port) as client:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            requests = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 2_000_000
            with pytest.raises(ConnectionError):
                client.send(requests)
        assert resident_kib(worker) - before < 4096
        assert gateway.metric("security_events_total", listener="web", kind="slow_reader") == 1
        eventually(lambda: gateway.metric("connections_inflight", listener="web") == 1, "it is gone")


def test_a_reader_that_is_slow_but_moves_gets_everything(house: House) -> None:
    port = house.port
    size = 3_000_000

    def serve(connection: BackendConnection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size)
        answer_ok(connection)

    more = "[listeners.http]\nbody_timeout_ms = 2000\n"
    with Backend(serve) as backend, house.gateway(listener(port, backend, more), runtime=_RUNTIME):
        client = Client(port)
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        with client:
            client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            client.until(b"\r\n\r\n")
            received = len(client.buffer)
            client.buffer = b""
            while received < size:
                threading.Event().wait(0.04)  # longer in all than the timeout
                received += len(client.sock.recv(50_000))
            assert received == size
