"""WebSocket through the gateway, with the `websockets` library as client and as server."""

import contextlib
import os
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, ConnectionClosedOK, InvalidStatus
from websockets.http11 import Request, Response
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import ServerConnection, serve
from websockets.typing import Origin, Subprotocol

from tests.e2e.harness import Gateway, certificate, eventually
from tests.e2e.http_world import client_context
from tests.ports import free_port

BIG = 5_000_000
LIMIT = 6_000_000


class Site:
    """A gateway before a WebSocket server; ``saw`` is what the server was asked."""

    def __init__(self, clear: int, secure: int, plain: int, context: ssl.SSLContext) -> None:
        self.clear = clear
        self.secure = secure
        self.plain = plain
        self._context = context
        self.gateway: Gateway
        self.saw: list[Request] = []
        self.closed: list[tuple[int | None, str | None]] = []

    def connect(self, front: str, path: str = "/echo", **options: Any) -> ClientConnection:
        if front == "secure":
            options["ssl"] = self._context
        scheme = "wss" if front == "secure" else "ws"
        client: ClientConnection = connect(
            f"{scheme}://localhost:{getattr(self, front)}{path}",
            max_size=None,
            proxy=None,
            open_timeout=60,
            **options,
        )
        return client


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("websocket")
    files = certificate(directory)
    behind = free_port()
    it = Site(free_port(), free_port(), free_port(), client_context(files.certificate))

    def handler(connection: ServerConnection) -> None:
        assert connection.request is not None
        it.saw.append(connection.request)
        try:
            HANDLERS.get(connection.request.path, echo)(connection)
        except ConnectionClosed:
            pass
        finally:
            it.closed.append((connection.close_code, connection.close_reason))

    def judge(connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/forbidden":
            return connection.respond(403, "not you\n")
        return None

    text = "".join(
        f"""
[[listeners]]
name = "{name}"
address = "127.0.0.1:{port}"
protocol = "{"h1s" if tls else "h1"}"
backends = [{{ address = "127.0.0.1:{behind}" }}]
{tls}
{block}
"""
        for name, port, tls, block in (
            ("clear", it.clear, "", f"[listeners.websocket]\nmax_message_size_bytes = {LIMIT}"),
            (
                "secure",
                it.secure,
                f'tls = {{ cert_path = "{files.certificate}", key_path = "{files.key}" }}',
                f"[listeners.websocket]\nmax_message_size_bytes = {LIMIT}",
            ),
            ("plain", it.plain, "", ""),
        )
    )
    with serve(
        handler,
        "127.0.0.1",
        behind,
        process_request=judge,
        select_subprotocol=lambda _, offered: next((one for one in offered if one == "chat.v1"), None),
        max_size=None,
        ping_interval=None,
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with Gateway(directory, text) as it.gateway:
                yield it
        finally:
            server.shutdown()
            thread.join()


def echo(connection: ServerConnection) -> None:
    for message in connection:
        connection.send(message)


def closes(connection: ServerConnection) -> None:
    connection.recv()
    connection.close(4001, "had enough")


def breaks(connection: ServerConnection) -> None:
    """Gone in the middle, without a Close frame."""
    connection.recv()
    connection.socket.shutdown(2)


def floods(connection: ServerConnection) -> None:
    for _ in range(200):
        connection.send(b"x" * 50_000)


HANDLERS: dict[str, Callable[[ServerConnection], None]] = {
    "/closes": closes,
    "/breaks": breaks,
    "/floods": floods,
}

both = pytest.mark.parametrize("front", ["clear", "secure"])


@both
def test_messages_of_all_kinds(site: Site, front: str) -> None:
    blob = os.urandom(BIG)
    with site.connect(front) as client:
        for message in ("grüße", b"\x00\xff", "", b"", "x" * 70_000, blob):
            client.send(message)
            assert client.recv(20) == message


@both
def test_fragments(site: Site, front: str) -> None:
    with site.connect(front, compression=None) as client:
        client.send(["one ", "two ", "", "three"])
        assert client.recv(10) == "one two three"
        client.send([b"x" * 100_000] * 20)
        assert client.recv(10) == b"x" * 2_000_000


@both
def test_ping_and_pong(site: Site, front: str) -> None:
    with site.connect(front) as client:
        for payload in ("", "hello", "x" * 125):
            assert client.ping(payload).wait(30)


@both
def test_the_handshake_is_between_client_and_server(site: Site, front: str) -> None:
    with site.connect(
        front,
        "/echo?q=1",
        origin=Origin("https://app.example"),
        subprotocols=[Subprotocol("chat.v1"), Subprotocol("other")],
        additional_headers={"Cookie": "session=1; a=b", "Authorization": "Bearer x"},
    ) as client:
        assert client.subprotocol == "chat.v1"
        assert client.response is not None
        assert "permessage-deflate" in client.response.headers["Sec-WebSocket-Extensions"]
        text = "compress me " * 10_000
        client.send(text)
        assert client.recv(10) == text
    request = site.saw[-1]
    assert request.path == "/echo?q=1"
    assert request.headers["Origin"] == "https://app.example"
    assert request.headers["Cookie"] == "session=1; a=b"
    assert request.headers["Authorization"] == "Bearer x"
    assert request.headers["X-Forwarded-Proto"] == ("https" if front == "secure" else "http")
    assert request.headers["Host"].startswith("localhost:")


@both
def test_the_client_closes(site: Site, front: str) -> None:
    before = len(site.closed)
    with site.connect(front) as client:
        client.send("x")
        client.recv(5)
        client.close(4002, "bye")
        assert (client.close_code, client.close_reason) == (4002, "bye")
    eventually(lambda: (4002, "bye") in site.closed[before:], "the server got the code")


@both
def test_the_server_closes(site: Site, front: str) -> None:
    with site.connect(front, "/closes") as client:
        client.send("x")
        with pytest.raises(ConnectionClosedError) as caught:
            client.recv(5)
        assert caught.value.rcvd is not None
        assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (4001, "had enough")


@both
def test_an_orderly_end_is_one_for_both(site: Site, front: str) -> None:
    before = len(site.closed)
    with site.connect(front) as client:
        client.close()
        with pytest.raises(ConnectionClosedOK):
            client.recv(5)
    # An earlier session may be told of only now: hence "among"
    eventually(lambda: 1000 in [code for code, _ in site.closed[before:]], "the server saw 1000")


@both
def test_a_server_that_vanishes_is_seen(site: Site, front: str) -> None:
    with site.connect(front, "/breaks") as client:
        client.send("x")
        with pytest.raises(ConnectionClosedError) as caught:
            client.recv(5)
        assert caught.value.rcvd is None, "no Close frame was made up"


@both
def test_a_client_that_vanishes_is_seen(site: Site, front: str) -> None:
    before = len(site.closed)
    with site.connect(front) as client:
        client.send("x")
        client.recv(5)
        client.socket.shutdown(2)
        eventually(lambda: 1006 in [code for code, _ in site.closed[before:]], "the server saw it")


@both
def test_a_server_that_refuses_is_quoted(site: Site, front: str) -> None:
    with pytest.raises(InvalidStatus) as caught, site.connect(front, "/forbidden"):
        pass
    response = caught.value.response
    assert response.status_code == 403
    assert response.body == b"not you\n"
    assert "upgrade" not in response.headers.get("Connection", "").lower()


def test_without_the_block_it_is_plain_http(site: Site) -> None:
    with pytest.raises(InvalidStatus) as caught, site.connect("plain"):
        pass
    assert caught.value.response.status_code == 426, "the server says that it wants an upgrade"


def test_a_message_over_the_cap(site: Site) -> None:
    with site.connect("clear", compression=None) as client:
        with contextlib.suppress(ConnectionClosed):
            client.send([b"x" * (LIMIT // 100)] * 101)
        with pytest.raises(ConnectionClosedError) as caught:
            client.recv(10)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1009
    site.gateway.wait_metric("websocket_closed_total", 1, listener="clear", code="1009")


def test_a_flood_of_pings(site: Site) -> None:
    with site.connect("clear", ping_interval=None) as client:
        with contextlib.suppress(ConnectionClosed):
            for number in range(60):
                client.ping(str(number))
        with pytest.raises(ConnectionClosedError) as caught:
            client.recv(10)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1008


@both
def test_a_flood_of_messages_meets_a_slow_reader(site: Site, front: str) -> None:
    (worker,) = site.gateway.worker_pids()
    with site.connect(front, "/floods", max_queue=2) as client:
        first = client.recv(10)
        rss = int(Path(f"/proc/{worker}/statm").read_text().split()[1]) * 4096
        assert [first, *client] == [b"x" * 50_000] * 200
        assert int(Path(f"/proc/{worker}/statm").read_text().split()[1]) * 4096 - rss < 4_000_000


def test_what_is_open_is_counted(site: Site) -> None:
    metric = site.gateway.metric
    eventually(lambda: metric("websocket_sessions_open", listener="clear") == 0, "none is left")
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(site.connect("clear"))
        assert metric("websocket_sessions_open", listener="clear") == 5
    eventually(lambda: metric("websocket_sessions_open", listener="clear") == 0, "all have ended")
    eventually(lambda: metric("connections_inflight") == 0, "and their connections")
