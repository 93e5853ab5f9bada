"""Floods and sizes: connections, heads, targets and bodies over the limits, and what the log says of it."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import (
    Backend,
    BackendConnection,
    Client,
    Gateway,
    House,
    Steady,
    certificate,
    eventually,
    listener,
)
from tests.ports import free_port

_NO_BUDGET = "max_keepalive_requests = 0\n"
_GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def _is_served(client: Client) -> bool:
    """One exchange: the connection is counted, by whichever worker has it."""
    client.send(_GET)
    return client.response()[0] == 200


def _is_refused(client: Client) -> bool:
    """503 with Retry-After, and the end, without having sent anything."""
    status, headers, _ = client.response()
    assert headers["retry-after"].isdigit()
    assert headers["connection"] == "close"
    return status == 503 and client.is_closed()


def _close(clients: list[Client]) -> None:
    for client in clients:
        client.sock.close()


# -- connections ---------------------------------------------------------------------------------------------


def test_one_address_cannot_have_more_than_its_cap(house: House) -> None:
    port = house.port
    runtime = _NO_BUDGET + "per_ip_connection_cap = 5\n"
    with (
        Backend() as backend,
        house.gateway(listener(port, backend), runtime=runtime) as gateway,
        Steady(port, source="127.0.0.9"),
    ):
        clients = [Client(port) for _ in range(5)]
        assert all(_is_served(client) for client in clients)
        for _ in range(20):
            with Client(port) as refused:
                assert _is_refused(refused)
        with Client(port, source="127.0.0.2") as other:
            assert _is_served(other)
        assert all(_is_served(client) for client in clients), "those who are in are left alone"
        assert gateway.metric("accept_reject_total", listener="web", reason="ip_cap") == 20
        assert gateway.metric("security_events_total", listener="web", kind="connection_flood") == 20
        clients.pop().sock.close()
        eventually(lambda: gateway.metric("connections_inflight", listener="web") == 5, "one has left")
        with Client(port) as fifth:
            assert _is_served(fifth)
        _close(clients)


def test_the_process_as_a_whole_has_a_cap(house: House) -> None:
    port = house.port
    runtime = _NO_BUDGET + "max_inflight_connections = 100\nper_ip_connection_cap = 60\n"
    with (
        Backend() as backend,
        house.gateway(listener(port, backend), runtime=runtime) as gateway,
        Steady(port, source="127.0.0.9"),
    ):
        clients = [Client(port, source=f"127.0.0.{2 + number % 3}") for number in range(99)]
        eventually(lambda: gateway.metric("connections_inflight", listener="web") == 100, "all are in")
        with Client(port, source="127.0.0.7") as refused:
            assert _is_refused(refused)
        assert gateway.metric("accept_reject_total", listener="web", reason="process_cap") == 1
        _close(clients)
        eventually(lambda: gateway.metric("connections_inflight", listener="web") == 1, "they have left")
        with Client(port) as client:
            assert _is_served(client)


def test_caps_hold_over_all_workers_together(house: House) -> None:
    """With a cap of its own each worker would let twice as many in."""
    port = house.port
    runtime = _NO_BUDGET + "per_ip_connection_cap = 12\n"
    with (
        Backend() as backend,
        house.gateway(listener(port, backend), workers=2, runtime=runtime) as gateway,
    ):
        clients: list[Client] = []
        for _ in range(12):
            clients.append(Client(port))
            assert _is_served(clients[-1])
        for _ in range(10):
            with Client(port) as refused:
                assert _is_refused(refused)
        assert gateway.metric("accept_reject_total", reason="ip_cap") == 10
        _close(clients)


def test_the_process_cap_holds_over_all_workers_together(house: House) -> None:
    port = house.port
    runtime = _NO_BUDGET + "max_inflight_connections = 100\n"
    with (
        Backend() as backend,
        house.gateway(listener(port, backend), workers=2, runtime=runtime) as gateway,
    ):
        clients = [Client(port) for _ in range(99)]
        assert all(_is_served(client) for client in clients)
        last = Client(port)
        assert _is_served(last)
        for _ in range(5):
            with Client(port) as refused:
                assert _is_refused(refused)
        assert gateway.metric("accept_reject_total", reason="process_cap") == 5
        _close([*clients, last])


def test_trusted_proxies_have_no_cap_of_their_own(house: House) -> None:
    port = house.port
    runtime = _NO_BUDGET + "per_ip_connection_cap = 3\ntrusted_proxies = ['127.0.0.5/32']\n"
    with Backend() as backend, house.gateway(listener(port, backend), runtime=runtime):
        trusted = [Client(port, source="127.0.0.5") for _ in range(10)]
        assert all(_is_served(client) for client in trusted)
        others = [Client(port, source="127.0.0.6") for _ in range(3)]
        assert all(_is_served(client) for client in others)
        with Client(port, source="127.0.0.6") as refused:
            assert _is_refused(refused)
        _close([*trusted, *others])


def test_elsewhere_a_refusal_says_nothing(tmp_path: Path) -> None:
    """Before TLS there is nothing to say it in: the cap comes before any handshake. It is one cap for all."""
    files = certificate(tmp_path)
    keys = f"tls = {{ cert_path = '{files.certificate}', key_path = '{files.key}' }}"
    ports = {protocol: free_port() for protocol in ("h1s", "tls", "tcp")}
    with Backend() as backend:
        config = "".join(
            listener(port, backend, keys if protocol != "tcp" else "", name=protocol, protocol=protocol)
            for protocol, port in ports.items()
        )
        with Gateway(tmp_path, config, runtime="per_ip_connection_cap = 2\n") as gateway:
            kept = [Client(ports["h1s"]), Client(ports["tcp"])]
            eventually(lambda: gateway.metric("connections_inflight") == 2, "both are in")
            for protocol, port in ports.items():
                with Client(port) as refused:
                    assert refused.is_closed()
                assert gateway.metric("accept_reject_total", listener=protocol, reason="ip_cap") == 1
            assert gateway.metric("tls_handshakes_total") == 0
            _close(kept)


def test_a_flood_leaves_one_line_in_the_log(tmp_path: Path) -> None:
    """One line for a kind and source a minute, whatever its number; the counter has them all."""
    port = free_port()
    with Backend() as backend, Gateway(tmp_path, listener(port, backend)) as gateway:
        for source, count in (("127.0.0.2", 100), ("127.0.0.3", 50)):
            for _ in range(count):
                with Client(port, source=source) as client:
                    client.send(b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 1\r\n\r\n")
                    assert client.response()[0] == 400
            with Client(port, source=source) as client:
                client.send(b"GET /%00 HTTP/1.1\r\nHost: a\r\n\r\n")
                assert client.response()[0] == 400
        assert gateway.metric("security_events_total", kind="request_smuggling") == 150
    lines = [json.loads(line) for line in gateway.log().splitlines()]
    seen = sorted(
        (line["kind"], line["source"]) for line in lines if line.get("listener") == "web" and "kind" in line
    )
    assert seen == [
        ("bad_path", "127.0.0.2"),
        ("bad_path", "127.0.0.3"),
        ("request_smuggling", "127.0.0.2"),
        ("request_smuggling", "127.0.0.3"),
    ]
    second = next(
        line for line in lines if line.get("kind") == "request_smuggling" and line["source"] == "127.0.0.3"
    )
    assert second["not_logged"] == 99, "the next line sums up what was held back"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Gateway]]:
    """One gateway for all rows of the table below."""
    port = free_port()
    with (
        Backend() as backend,
        Gateway(tmp_path_factory.mktemp("heads"), listener(port, backend), runtime=_NO_BUDGET) as gateway,
        Steady(port),
    ):
        yield port, gateway


# -- heads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(b"x-%d: y\r\n" % n for n in range(255)) + b"\r\n", 200),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(b"x-%d: y\r\n" % n for n in range(256)) + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 65000 + b"\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 65536 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 1_000_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x: y\r\n" * 170_000 + b"\r\n", 431),
        (b"GET /" + b"x" * 16383 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 200),
        (b"GET /" + b"x" * 16384 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET /" + b"x" * 1_000_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"X" * 1_000_000, 414),
        (b"GET / HTTP/1.1\r\n" * 60_000, 431),
    ],
    ids=[
        "256 fields",
        "257 fields",
        "just under 64 KiB",
        "over 64 KiB",
        "1 MB in one field",
        "1 MB in many fields",
        "16 KiB of target",
        "more target",
        "more target than head",
        "1 MB of target",
        "1 MB of method",
        "1 MB of request lines",
    ],
)
def test_heads_have_a_size(shared: tuple[int, Gateway], request_bytes: bytes, status: int) -> None:
    port, gateway = shared
    before = gateway.metric("security_events_total", listener="web")
    with Client(port) as client:
        client.send(request_bytes)
        assert client.response()[0] == status
        if status == 200:
            return
        assert not client.buffer
        assert client.sock.recv(1) == b"", "an end in order: a reset could destroy the answer on its way"
    assert gateway.metric("security_events_total", listener="web") == before + 1


# -- bodies --------------------------------------------------------------------------------------------------

_CAPPED = "[listeners.http]\nmax_request_body_bytes = 1000\n"


class _Recorder:
    def __init__(self) -> None:
        self.received = bytearray()

    def serve(self, connection: BackendConnection) -> None:
        while data := connection.sock.recv(65536):
            if data.startswith(b"GET /good"):
                connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\nbackend")
            else:
                self.received += data


@pytest.mark.parametrize("is_chunked", [False, True], ids=["declared", "counted"])
def test_bodies_have_a_size(house: House, is_chunked: bool) -> None:
    """The answer reaches a client that goes on sending without looking; no backend sees the request whole."""
    port = house.port
    recorder = _Recorder()
    with (
        Backend(recorder.serve) as backend,
        house.gateway(listener(port, backend, _CAPPED), runtime=_NO_BUDGET) as gateway,
        Steady(port),
    ):
        for number, size in enumerate((1001, 700_000, 20_000_000), 1):
            recorder.received.clear()
            with Client(port) as client:
                framing = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % size
                client.send(b"POST / HTTP/1.1\r\nHost: a\r\n" + framing + b"\r\n\r\n")
                if is_chunked:
                    client.send(b"%x\r\n" % size)
                try:
                    client.send(b"x" * size)
                except ConnectionError:
                    assert size > 1_000_000, "a megabyte is read on and forgotten"
                status, headers, _ = client.response()
                assert (status, headers["connection"]) == (413, "close")
            assert gateway.metric("security_events_total", listener="web", kind="body_too_large") == number
            eventually(lambda: gateway.metric("pool_connections", state="busy") <= 1, "it was given up")
            _, _, body = bytes(recorder.received).partition(b"\r\n\r\n")
            if is_chunked:
                assert b"\r\n0\r\n\r\n" not in body
            else:
                assert not recorder.received, "declared: refused before anything was forwarded"


def test_a_body_just_as_large_as_allowed(house: House) -> None:
    port = house.port
    with Backend() as backend, house.gateway(listener(port, backend, _CAPPED)), Client(port) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000)
        assert client.response()[0] == 200
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n" + b"x" * 1000)
        client.send(b"\r\n0\r\n\r\n")
        assert client.response()[0] == 200
        assert [len(body) for _, body in backend.requests] == [1000, 1000]


def test_running_out_of_descriptors_pauses_the_listener_and_no_more(tmp_path: Path) -> None:
    """Connections wait in the queue while there is no descriptor for them, and are served afterwards."""
    import resource

    port = free_port()
    with (
        Backend() as backend,
        Gateway(tmp_path, listener(port, backend), runtime=_NO_BUDGET) as gateway,
        Steady(port),
    ):
        (worker,) = gateway.worker_pids()
        accepted = gateway.metric("connections_total", listener="web")
        taken = len(list(Path(f"/proc/{worker}/fd").iterdir()))
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (taken + 20, taken + 20))
        clients = [Client(port) for _ in range(60)]
        gateway.wait_metric("accept_errors_total", listener="web", kind="EMFILE")
        _close(clients[:50])
        # Those who left wait in the queue as well, and take a descriptor each for as long as it takes to see
        # that they did. After that the others find one towards a backend too.
        gateway.wait_metric("connections_total", accepted + len(clients), listener="web")
        eventually(
            lambda: gateway.metric("connections_inflight", listener="web") <= 11, "only the others are left"
        )
        for client in clients[50:]:
            assert _is_served(client)
        _close(clients)


def test_a_client_that_sends_nothing_is_closed_when_idle(house: House) -> None:
    port = house.port
    more = "[listeners.http]\nidle_timeout_ms = 1500\n"
    runtime = "[runtime.watchdog]\nsweep_interval_ms = 100\n"
    with Backend() as backend, house.gateway(listener(port, backend, more), runtime=runtime) as gateway:
        with Client(port) as silent, Client(port) as kept_alive:
            assert _is_served(kept_alive)
            assert silent.is_closed()
            assert kept_alive.is_closed()
        assert gateway.metric("http_gateway_errors_total") == 0, "that is no attack"


def test_the_last_request_of_the_budget_says_close(house: House) -> None:
    port = house.port
    with (
        Backend() as backend,
        house.gateway(listener(port, backend), runtime="max_keepalive_requests = 3\n"),
        Client(port) as client,
    ):
        for number in range(3):
            client.send(_GET)
            status, headers, _ = client.response()
            assert status == 200
            assert headers.get("connection") == ("close" if number == 2 else None)
        client.sock.shutdown(socket.SHUT_WR)
        assert client.is_closed()
