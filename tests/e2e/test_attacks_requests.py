"""Single requests that abuse something: authorities, paths, trailers, upgrades, expectations."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Backend, BackendConnection, Client, Gateway, House, Steady, eventually, listener
from tests.ports import free_port

_OK = b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\nbackend"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Gateway, Backend]]:
    """One gateway for the tables below, with a good client on its only worker."""
    port = free_port()
    with (
        Backend() as backend,
        Gateway(
            tmp_path_factory.mktemp("requests"),
            listener(port, backend),
            runtime="max_keepalive_requests = 0\n",
        ) as gateway,
        Steady(port),
    ):
        yield port, gateway, backend


def _others(backend: Backend) -> list[tuple[bytes, bytes]]:
    """Requests that are not the good client's."""
    return [request for request in list(backend.requests) if not request[0].startswith(b"GET /good ")]


def _refused(world: tuple[int, Gateway, Backend], request: bytes, status: int, kind: str) -> None:
    port, gateway, backend = world
    forwarded = len(_others(backend))
    before = gateway.metric("security_events_total", listener="web", kind=kind)
    with Client(port) as client:
        client.send(request)
        answer = client.response()
        assert answer[0] == status, answer
    assert len(_others(backend)) == forwarded
    assert gateway.metric("security_events_total", listener="web", kind=kind) == before + 1


# -- authorities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [
        b"",
        b"Host:",
        b"Host: a\r\nHost: b",
        b"Host: a\r\nHost: a",
        b"Host: a, b",
        b"Host: a b",
        b"Host: a/b",
        b"Host: user@a",
        b"Host: a:b",
        b"Host: a:99999",
        b"Host: [::1",
        b"Host: [not-an-ip]",
        b"Host: a\xe9",
        b"Host: a%0d%0ab\r\nHost: b",
    ],
)
def test_an_authority_that_two_could_read_differently(
    world: tuple[int, Gateway, Backend], lines: bytes
) -> None:
    _refused(
        world, b"GET / HTTP/1.1\r\n" + (lines + b"\r\n" if lines else b"") + b"\r\n", 400, "bad_authority"
    )


@pytest.mark.parametrize("target", [b"http://b/", b"http://a:81/", b"http://a.b/", b"https://b/"])
def test_a_target_and_a_host_that_disagree(world: tuple[int, Gateway, Backend], target: bytes) -> None:
    _refused(world, b"GET " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n", 400, "bad_authority")


# -- paths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        b"/..",
        b"/../",
        b"/../etc/passwd",
        b"/a/../../b",
        b"/a/../..",
        b"/./..",
        b"/%2e%2e",
        b"/%2E%2e/x",
        b"/.%2e/x",
        b"/%2e./x",
        b"/a/%2e%2e/%2e%2e/b",
        b"/%00",
        b"/a%00.html",
        b"/%",
        b"/%2",
        b"/%zz",
        b"/a%g0",
    ],
)
def test_a_path_that_leaves_the_root_or_hides_something(
    world: tuple[int, Gateway, Backend], path: bytes
) -> None:
    _refused(world, b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n", 400, "bad_path")


@pytest.mark.parametrize(
    "path",
    [
        b"/a/../b",
        b"/a/%2e%2e/b",
        b"/a%2f..%2f..%2fb",
        b"/..%2f",
        b"//a//b",
        b"/...",
        b"/.a",
        b"/a?x=/../../y&z=%00",
        b"/%41%c3%a9",
        b"/;a=b/..;/c",
    ],
)
def test_any_other_path_arrives_byte_for_byte(world: tuple[int, Gateway, Backend], path: bytes) -> None:
    port, _, backend = world
    with Client(port) as client:
        client.send(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.response()[0] == 200
    assert any(head.startswith(b"GET " + path + b" HTTP/1.1\r\n") for head, _ in backend.requests)


# -- trailers ------------------------------------------------------------------------------------------------


FORBIDDEN_TRAILERS = (
    b"Content-Length: 0",
    b"Transfer-Encoding: chunked",
    b"Host: b",
    b"Connection: close",
    b"TE: trailers",
    b"Upgrade: websocket",
    b"Authorization: Basic eDp5",
    b"Cookie: a=b",
    b"HTTP2-Settings: AAMAAABk",
)


def test_a_forbidden_trailer_ends_the_request_unfinished(house: House) -> None:
    port = house.port
    received: list[bytearray] = []

    def serve(connection: BackendConnection) -> None:
        received.append(bytearray())
        with contextlib.suppress(ConnectionError):
            while data := connection.sock.recv(65536):
                received[connection.number - 1].extend(data)

    with Backend(serve) as backend, house.gateway(listener(port, backend)) as gateway:
        for number, field in enumerate(FORBIDDEN_TRAILERS, 1):
            with Client(port) as client:
                client.send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
                eventually(lambda: bool(received) and received[-1].endswith(b"hello\r\n"), "it is on its way")
                client.send(b"0\r\n" + field + b"\r\n\r\n")
                assert client.response()[0] == 400, field
                assert client.is_closed()
            assert gateway.metric("security_events_total", kind="forbidden_trailer") == number
            assert received[-1].endswith(b"hello\r\n"), "not even the last chunk"
            received[-1].clear()


def test_other_trailers_pass(world: tuple[int, Gateway, Backend], house: House) -> None:
    port = house.port
    seen: list[bytes] = []

    def serve(connection: BackendConnection) -> None:
        seen.append(connection.until(b"\r\n\r\n") + connection.until(b"x-sum: 1\r\n\r\n"))
        connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n")
        connection.send(b"2\r\nok\r\n0\r\nx-sum: 2\r\n\r\n")

    with Backend(serve) as backend, house.gateway(listener(port, backend)), Client(port) as client:
        client.send(
            b"POST / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nConnection: TE\r\nTransfer-Encoding: chunked\r\n"
        )
        client.send(b"\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n")
        assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        assert client.until(b"\r\n\r\n") == b"2\r\nok\r\n0\r\nx-sum: 2\r\n\r\n"
    assert seen[0].endswith(b"5\r\nhello\r\n0\r\nx-sum: 1\r\n\r\n")


# -- upgrades ------------------------------------------------------------------------------------------------


UPGRADES = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
    b"Connection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
    b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
    b"Connection: upgrade\r\nUpgrade: H2C\r\nhttp2-settings: AAMAAABk\r\n",
    b"Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n",
    b"Connection: Upgrade\r\nUpgrade: h2c\r\nUpgrade: websocket\r\n",
    b"Connection: Upgrade\r\nUpgrade: TLS/1.3\r\n",
)


def test_no_upgrade_but_websocket_is_forwarded(tmp_path: Path) -> None:
    """A backend that would switch is never asked to, so what follows cannot bypass the gateway."""
    plain, websocket = free_port(), free_port()

    def serve(connection: BackendConnection) -> None:
        while True:
            head, _ = connection.request()
            connection.backend.requests.append((head, b""))
            if b"h2c" in head.lower():
                connection.send(b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
            connection.send(_OK)

    with Backend(serve) as backend:
        config = listener(plain, backend)
        config += listener(websocket, backend, "[listeners.websocket]\n", name="websocket")
        with Gateway(tmp_path, config):
            for port in (plain, websocket):
                for lines in UPGRADES:
                    with Client(port) as client:
                        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n" + lines + b"\r\n")
                        assert client.response()[0] == 200
                        client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                        assert client.response()[0] == 505
                        assert client.is_closed()
    assert len(backend.requests) == 2 * len(UPGRADES)
    for head, _ in backend.requests:
        for word in (b"upgrade", b"h2c", b"http2-settings", b"tls/1.3"):
            assert word not in head.lower()


# -- Expect --------------------------------------------------------------------------------------------------


def test_expect_is_the_backends_to_answer(house: House) -> None:
    """End to end: no 100 of our own, no body before the backend asked for it."""
    port = house.port
    seen: list[bytes] = []

    def serve(connection: BackendConnection) -> None:
        seen.append(connection.until(b"\r\n\r\n"))
        assert not connection.buffer
        connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        seen.append(connection.exactly(5))
        connection.send(_OK)
        seen.append(connection.until(b"\r\n\r\n"))
        connection.send(b"HTTP/1.1 417 Expectation Failed\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

    with Backend(serve) as backend, house.gateway(listener(port, backend)):
        head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
        with Client(port) as client:
            client.send(head)
            assert client.response()[0] == 100
            client.send(b"hello")
            assert client.response()[0] == 200
            client.send(head)
            status, headers, _ = client.response()
            assert status == 417
            assert headers["connection"] == "close", "the body was promised and never came"
            assert client.is_closed()
    assert seen[0].lower().count(b"\r\nexpect: 100-continue\r\n") == 1
    assert seen[1] == b"hello"


def test_no_interim_answer_for_http_1_0(house: House) -> None:
    port = house.port

    def serve(connection: BackendConnection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" + _OK)

    with Backend(serve) as backend, house.gateway(listener(port, backend)), Client(port) as client:
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        assert client.response()[0] == 200


def test_an_expectation_over_the_cap_is_refused_before_the_body(house: House) -> None:
    port = house.port
    more = "[listeners.http]\nmax_request_body_bytes = 10\n"
    with Backend() as backend, house.gateway(listener(port, backend, more)), Client(port) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\nExpect: 100-continue\r\n\r\n")
        status, headers, _ = client.response()
        assert (status, headers["connection"]) == (413, "close")
        assert backend.connections == 0
