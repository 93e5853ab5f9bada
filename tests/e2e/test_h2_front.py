"""What an HTTP/2 message is on both sides of the gateway: bodies, fields, trailers, and the odd requests.

The backend speaks HTTP/1.1. Every test runs over TLS (by ALPN) and in clear text (by prior knowledge).
"""

import contextlib
import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.h2_raw import (
    DATA,
    END_STREAM,
    PREFACE,
    RawH2,
    data,
    h2_context,
    headers,
    request,
    settings,
)
from tests.e2e.harness import Backend, BackendConnection, Client, Gateway, certificate, eventually
from tests.e2e.http_world import (
    World,
    answer,
    chunked,
    field,
    fields,
    http_world,
    read_body,
    read_chunked,
)
from tests.ports import free_port

FRONTS = ("tls", "h2c")
H2C = """
[[listeners]]
name = "h2c"
address = "127.0.0.1:{port_h2c}"
protocol = "h1"
h2c = true
backends = [{ address = "{backend}" }]
[observability.access_log]
path = "ACCESS"
"""


class Fronts:
    """A world with HTTP/2 clients."""

    def __init__(self, world: World, log: Path) -> None:
        self.world = world
        self.on = world.on
        self.gateway = world.gateway
        self.log = log
        self._tls = h2_context(str(world.trust))

    def client(self, front: str, *, grants: bool = True, offer: list[tuple[int, int]] | None = None) -> RawH2:
        tls = self._tls if front == "tls" else None
        return RawH2(self.world.ports[front], tls=tls, grants=grants, offer=offer or [])


@pytest.fixture(scope="module")
def fronts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fronts]:
    directory = tmp_path_factory.mktemp("h2")
    log = directory / "access.log"
    with http_world(
        directory, runtime="max_keepalive_requests = 0", more=H2C.replace("ACCESS", str(log))
    ) as world:
        yield Fronts(world, log)


@pytest.fixture(params=FRONTS)
def front(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def client(front: str, fronts: Fronts) -> Iterator[RawH2]:
    with fronts.client(front) as it:
        yield it


def pattern(size: int, start: int = 0) -> bytes:
    """Bytes in which every displacement shows."""
    return b"".join(b"%08d" % number for number in range(start, start + size // 8 + 1))[:size]


def echo(connection: BackendConnection, head: bytes) -> None:
    answer(connection, read_body(connection, head))


class TestBodies:
    @pytest.mark.parametrize("size", [0, 1, 1000, 65_535, 65_536, 3_000_017])
    @pytest.mark.parametrize("up", ["length", "open"])
    @pytest.mark.parametrize("down", ["length", "chunked", "close"])
    def test_arrive_as_they_were_sent(
        self, fronts: Fronts, client: RawH2, size: int, up: str, down: str
    ) -> None:
        heads = []

        def script(connection: BackendConnection, head: bytes) -> None:
            heads.append(head)
            body = read_body(connection, head)
            if down == "length":
                answer(connection, body)
            elif down == "chunked":
                connection.send(
                    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunked(body, 7777)
                )
            else:
                connection.send(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + body)
                raise EOFError

        body = pattern(size)
        length = [("content-length", str(size))] if up == "length" else []
        got = client.ask(request(fronts.on(script), "POST", *length), body)
        assert (got.status, got.is_complete, got.body) == (200, True, body)
        if size:
            assert field(heads[0], "content-length") == (str(size) if up == "length" else None)
            assert field(heads[0], "transfer-encoding") == ("chunked" if up == "open" else None)
        assert got.get("content-length") == (str(size) if down == "length" else None)
        assert got.get("transfer-encoding") is None

    def test_of_20_mb(self, fronts: Fronts, client: RawH2) -> None:
        body = pattern(20_000_000)
        assert client.ask(request(fronts.on(echo), "POST"), body).body == body

    def test_of_many_streams_at_once(self, fronts: Fronts, client: RawH2) -> None:
        path = fronts.on(echo)
        bodies = {}
        for number in range(40):
            stream = client.open(request(path, "POST"), end=False)
            bodies[stream] = pattern(150_000 + number, number * 1000)
        for at in range(0, 160_000, 20_000):
            for stream, body in bodies.items():
                part = body[at : at + 20_000]
                if part:
                    client.send_body(stream, part, end=at + 20_000 >= len(body))
        for stream, body in bodies.items():
            assert client.response(stream).body == body

    @pytest.mark.parametrize(("size", "count"), [(100, 2000), (7777, 500), (16_000, 500)])
    def test_to_a_client_that_grants_for_each_frame(
        self, fronts: Fronts, client: RawH2, size: int, count: int
    ) -> None:
        """Frames do not become shorter and shorter, and two WINDOW_UPDATEs for each are no attack."""

        def script(connection: BackendConnection, head: bytes) -> None:
            connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            connection.send(chunked(bytes(size * count), size))

        stream = client.open(request(fronts.on(script)))
        found = client.answer(stream)
        frames = 0
        while not found.is_over:
            with contextlib.suppress(EOFError):
                frames += client.read().kind == DATA
            assert not client.goaways
        assert len(found.body) == size * count
        assert frames <= 2 * count, "on average half a chunk at least"

    def test_many_requests_reuse_the_backends_connections(self, fronts: Fronts, client: RawH2) -> None:
        path = fronts.on(lambda connection, _: answer(connection, b"small"))
        before = fronts.world.backend.connections
        for _ in range(300):
            assert client.ask(request(path)).body == b"small"
        assert fronts.world.backend.connections - before <= 1


class TestFields:
    def test_of_a_request_pass_in_order_with_duplicates(self, fronts: Fronts, client: RawH2) -> None:
        heads = []

        def script(connection: BackendConnection, head: bytes) -> None:
            heads.append(head)
            answer(connection)

        sent = [
            ("accept", "text/html"),
            ("x-twice", "one"),
            ("x-twice", "two"),
            ("authorization", "Basic Zm9vOmJhcg=="),
            ("x-empty", ""),
            ("content-type", "text/plain; charset=utf-8"),
            ("x-bytes", "caf\xe9"),
            ("x-twice", "three"),
        ]
        dropped = [("te", "trailers"), ("http2-settings", "AAMAAABk"), ("proxy-authorization", "Basic x")]
        path = fronts.on(script)
        asked = request(f"{path}?q=%2f%41//x", "GET", *sent, *dropped)
        asked[3] = (":authority", "a.example:81")
        assert client.ask(asked).status == 200
        assert heads[0].startswith(f"GET {path}?q=%2f%41//x HTTP/1.1\r\n".encode())
        names = {name for name, _ in sent}
        assert [pair for pair in fields(heads[0]) if pair[0] in names] == sent
        assert not {name for name, _ in fields(heads[0])} & {name for name, _ in dropped}
        assert field(heads[0], "host") == "a.example:81"
        assert not [name for name, _ in fields(heads[0]) if name.startswith(":")]

    def test_of_a_response_pass_in_order_with_duplicates(self, fronts: Fronts, client: RawH2) -> None:
        sent = (
            b"Server: theirs/1\r\nSet-Cookie: a=b; Path=/\r\nX-One: 1\r\nset-cookie: c=d\r\nvary: accept\r\n"
            b"date: Mon, 01 Jan 2024 00:00:00 GMT\r\n"
        )
        private = b"connection: x-private\r\nx-private: 1\r\nkeep-alive: timeout=9\r\nupgrade: h2c\r\n"
        path = fronts.on(lambda connection, _: answer(connection, b"x", headers=sent + private))
        for _ in range(2):  # the second time from what the first has left in the tables
            got = client.ask(request(path))
            wanted = [(name.lower(), value) for name, value in fields(b"\r\n" + sent)]
            names = {name for name, _ in wanted}
            assert [pair for pair in got.headers if pair[0] in names] == wanted
            found = {name for name, _ in got.headers}
            assert not found & {"connection", "x-private", "keep-alive", "upgrade", "transfer-encoding"}
            assert all(name == name.lower() for name in found)

    def test_of_a_long_head_take_several_frames(self, fronts: Fronts, client: RawH2) -> None:
        heads = []

        def script(connection: BackendConnection, head: bytes) -> None:
            heads.append(head)
            answer(connection, headers=b"".join(b"x-%d: %s\r\n" % (n, b"~" * 700) for n in range(40)))

        sent = [(f"x-{number}", "~" * 700) for number in range(40)]
        got = client.ask(request(fronts.on(script), "GET", *sent))
        assert got.status == 200
        assert [
            pair for pair in fields(heads[0]) if pair[0].startswith("x-") and pair[0][2:].isdigit()
        ] == sent
        assert len([name for name, value in got.headers if value == "~" * 700]) == 40

    def test_cookie_crumbs_become_one(self, fronts: Fronts, client: RawH2) -> None:
        heads = []

        def script(connection: BackendConnection, head: bytes) -> None:
            heads.append(head)
            answer(connection)

        crumbs = [("cookie", "a=b"), ("x-a", "1"), ("cookie", "c=d; e=f"), ("cookie", "g")]
        client.ask(request(fronts.on(script), "GET", *crumbs))
        found = [value for name, value in fields(heads[0]) if name.lower() == "cookie"]
        assert found == ["a=b; c=d; e=f; g"]

    def test_tell_the_version(self, fronts: Fronts, client: RawH2, front: str) -> None:
        heads = []

        def script(connection: BackendConnection, head: bytes) -> None:
            heads.append(head)
            answer(connection, b"x")

        listener = "tls" if front == "tls" else "h2c"
        path = fronts.on(script)
        labels = {"listener": listener, "version": "2", "status_class": "2xx"}
        before = fronts.gateway.metric("http_requests_total", **labels)
        got = client.ask(request(path))
        assert field(heads[0], "via") == "2 expressgateway"
        assert field(heads[0], "x-forwarded-proto") == ("https" if front == "tls" else "http")
        assert field(heads[0], "x-forwarded-for") == "127.0.0.1"
        assert field(heads[0], "x-forwarded-host") == "localhost"
        assert got.get("via") == "1.1 expressgateway"
        eventually(
            lambda: fronts.gateway.metric("http_requests_total", **labels) == before + 1, "it is counted"
        )

        def logged() -> list[dict[str, object]]:
            lines = fronts.log.read_text().splitlines() if fronts.log.exists() else []
            return [entry for entry in map(json.loads, lines) if path in line_of(entry)]

        def line_of(entry: dict[str, object]) -> str:
            return json.dumps(entry)

        eventually(logged, "it is logged")
        assert [(entry["version"], entry["status"]) for entry in logged()] == [("2", 200)]


class TestTrailers:
    def test_of_a_request(self, fronts: Fronts, client: RawH2) -> None:
        seen = []

        def script(connection: BackendConnection, head: bytes) -> None:
            seen.append(read_chunked(connection))
            answer(connection)

        stream = client.open(request(fronts.on(script), "POST", ("trailer", "x-sum")), end=False)
        client.send_body(stream, b"abc", end=False)
        client.send_trailers(stream, [("x-sum", "7"), ("x-more", "a, b")])
        assert client.response(stream).status == 200
        assert seen == [(b"abc", [("x-sum", "7"), ("x-more", "a, b")])]

    @pytest.mark.parametrize("body", [b"", b"abc"])
    def test_of_a_response(self, fronts: Fronts, client: RawH2, body: bytes) -> None:
        def script(connection: BackendConnection, head: bytes) -> None:
            connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            connection.send((b"3\r\nabc\r\n" if body else b"") + b"0\r\ngrpc-status: 0\r\nX-Sum: 7\r\n\r\n")

        got = client.ask(request(fronts.on(script), "GET", ("te", "trailers")))
        assert (got.body, got.is_complete) == (body, True)
        assert got.trailers == [("grpc-status", "0"), ("x-sum", "7")]


class TestOddRequests:
    def test_103_passes_before_the_answer(self, fronts: Fronts, client: RawH2) -> None:
        def script(connection: BackendConnection, head: bytes) -> None:
            connection.send(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\nlink: </b>\r\n\r\n")
            connection.send(b"HTTP/1.1 103 Early Hints\r\nlink: </c>\r\n\r\n")
            answer(connection, b"end")

        got = client.ask(request(fronts.on(script)))
        assert got.body == b"end"
        told = [
            (status, [pair for pair in pairs if pair[0] == "link"]) for status, pairs in got.informational
        ]
        assert told == [(103, [("link", "</a>"), ("link", "</b>")]), (103, [("link", "</c>")])]

    @pytest.mark.parametrize("accepted", [True, False])
    def test_100_continue_is_the_backends(self, fronts: Fronts, client: RawH2, accepted: bool) -> None:
        def script(connection: BackendConnection, head: bytes) -> None:
            if field(head, "expect") != "100-continue":
                answer(connection, status="500 No Expect")
            elif accepted:
                connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                answer(connection, read_body(connection, head))
            else:
                answer(connection, b"no", status="417 Expectation Failed")
                raise EOFError

        more = [("expect", "100-continue"), ("content-length", "5")]
        stream = client.open(request(fronts.on(script), "POST", *more), end=False)
        found = client.answer(stream)
        client.until(lambda: found.informational or found.status, "an answer")
        if accepted:
            assert [status for status, _ in found.informational] == [100]
            client.send_body(stream, b"hello")
        assert client.response(stream).status == (200 if accepted else 417)
        assert found.body == (b"hello" if accepted else b"no")

    def test_head_has_the_length_and_no_body(self, fronts: Fronts, client: RawH2) -> None:
        def script(connection: BackendConnection, head: bytes) -> None:
            if head.startswith(b"HEAD"):
                connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 12345\r\n\r\n")
            else:
                answer(connection, b"body")

        path = fronts.on(script)
        for _ in range(2):
            got = client.ask(request(path, "HEAD"))
            assert (got.status, got.get("content-length"), got.body, got.is_complete) == (
                200,
                "12345",
                b"",
                True,
            )
            assert client.ask(request(path)).body == b"body"

    @pytest.mark.parametrize("head", [b"204 No Content\r\n", b"304 Not Modified\r\ncontent-length: 77\r\n"])
    def test_a_status_without_a_body(self, fronts: Fronts, client: RawH2, head: bytes) -> None:
        path = fronts.on(lambda connection, _: connection.send(b"HTTP/1.1 " + head + b"etag: x\r\n\r\n"))
        for _ in range(2):
            got = client.ask(request(path))
            assert (got.status, got.get("etag"), got.body, got.is_complete) == (int(head[:3]), "x", b"", True)
            assert (got.get("content-length") is not None) == (got.status == 304)

    def test_options_asterisk(self, fronts: Fronts, client: RawH2) -> None:
        seen = []

        def script(connection: BackendConnection, head: bytes) -> None:
            seen.append(head)
            answer(connection, headers=b"allow: GET\r\n")

        fronts.on(script, "*")
        assert client.ask(request("*", "OPTIONS")).get("allow") == "GET"
        assert seen[0].startswith(b"OPTIONS * HTTP/1.1\r\n")

    @pytest.mark.parametrize("status", ["201", "301", "404", "418", "500", "503", "599"])
    def test_the_backends_status_passes(self, fronts: Fronts, client: RawH2, status: str) -> None:
        got = client.ask(request(fronts.on(lambda it, _: answer(it, b"it", status=f"{status} Any"))))
        assert (got.status, got.body) == (int(status), b"it")

    def test_an_upgrade_by_the_backend_is_not_believed(self, fronts: Fronts, client: RawH2) -> None:
        def script(connection: BackendConnection, head: bytes) -> None:
            connection.send(
                b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
            )

        assert client.ask(request(fronts.on(script))).status == 502
        assert client.ask(request(fronts.on(echo))).status == 200


class TestVersions:
    @pytest.mark.parametrize(
        ("offered", "chosen"),
        [([], None), (["http/1.1"], "http/1.1"), (["h2", "http/1.1"], "h2"), (["http/1.1", "h2"], "h2"),
         (["spdy/3"], None)],
    )  # fmt: skip
    def test_alpn(self, fronts: Fronts, offered: list[str], chosen: str | None) -> None:
        context = ssl.create_default_context(cafile=str(fronts.world.trust))
        if offered:
            context.set_alpn_protocols(offered)
        path = fronts.on(lambda connection, _: answer(connection, b"served"))
        port = fronts.world.ports["tls"]
        if chosen == "h2":
            with RawH2(port, tls=context) as client:
                assert client.alpn == "h2"
                assert client.ask(request(path)).body == b"served"
        else:
            with Client(port, tls=context) as plain:
                assert isinstance(plain.sock, ssl.SSLSocket)
                assert plain.sock.selected_alpn_protocol() == chosen
                plain.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                assert plain.response()[::2] == (200, b"served")

    @pytest.mark.parametrize("cut", range(1, len(PREFACE) + 10))
    def test_a_preface_cut_anywhere(self, fronts: Fronts, cut: int) -> None:
        path = fronts.on(lambda connection, _: answer(connection, b"served"))
        whole = PREFACE + settings() + headers(1, request(path))
        with RawH2(fronts.world.ports["h2c"], first=whole[:cut]) as client:
            _let_it_be_read(client.sock)
            client.send(whole[cut:])
            assert client.response(1).body == b"served"

    def test_a_preface_byte_by_byte(self, fronts: Fronts) -> None:
        path = fronts.on(lambda connection, _: answer(connection, b"served"))
        with RawH2(fronts.world.ports["h2c"], first=b"") as client:
            for octet in PREFACE + settings() + headers(1, request(path)):
                client.send(bytes((octet,)))
            assert client.response(1).body == b"served"

    @pytest.mark.parametrize("method", ["GET", "POST", "PRI", "PROPFIND", "P"])
    def test_http_1_on_the_same_port(self, fronts: Fronts, method: str) -> None:
        path = fronts.on(lambda connection, head: answer(connection, head[: len(method)]))
        raw = f"{method} {path} HTTP/1.1\r\nHost: a.example\r\nContent-Length: 0\r\n\r\n".encode()
        for cut in range(1, 6):
            with Client(fronts.world.ports["h2c"]) as plain:
                plain.send(raw[:cut])
                _let_it_be_read(plain.sock)
                plain.send(raw[cut:] + raw)
                for _ in range(2):
                    assert plain.response()[2] == method.encode()

    def test_prior_knowledge_is_not_offered_unasked(self, fronts: Fronts) -> None:
        with Client(fronts.world.ports["clear"]) as plain:
            plain.send(PREFACE + settings())
            assert plain.rest().startswith(b"HTTP/1.1 ")

    def test_upgrade_to_h2c_is_not_done(self, fronts: Fronts) -> None:
        seen = []

        def script(connection: BackendConnection, head: bytes) -> None:
            seen.append(head)
            answer(connection, b"plain")

        with Client(fronts.world.ports["h2c"]) as plain:
            path = fronts.on(script)
            plain.send(
                f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
                "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n".encode()
            )
            assert plain.response()[::2] == (200, b"plain")
        assert b"h2c" not in seen[0].lower()
        assert b"http2-settings" not in seen[0].lower()


def _let_it_be_read(sock: socket.socket) -> None:
    """Most likely the gateway reads what was sent before what follows; the test holds either way."""
    sock.settimeout(0.002)
    try:
        sock.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        pass
    finally:
        sock.settimeout(60)


class TestVirtualHosts:
    def test_a_host_of_another_certificate_on_a_coalesced_connection_is_421(self, tmp_path: Path) -> None:
        """RFC 9113 9.1.1: a client may reuse a connection where the certificate allows; we say when not."""
        port = free_port()
        here, there = (certificate(tmp_path, f"{name}.example", stem=name) for name in "ab")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        with (
            Backend() as backend,
            Gateway(
                tmp_path,
                f"""
[[listeners]]
address = "127.0.0.1:{port}"
protocol = "h1s"
backends = [{{ address = "{backend.address}" }}]
[listeners.tls]
cert_path = "{here.certificate}"
key_path = "{here.key}"
certificates = [{{ cert_path = "{there.certificate}", key_path = "{there.key}" }}]
""",
            ) as gateway,
            RawH2(port, tls=context, sni="a.example") as client,
        ):
            asked = request()
            for host, status in (("a.example", 200), ("b.example", 421), ("A.example", 200)):
                asked[3] = (":authority", host)
                assert client.ask(asked).status == status, host
            assert gateway.metric("security_events_total", kind="sni_fronting") == 1
            assert not client.goaways
            assert len(backend.requests) == 2


def test_a_response_may_begin_and_end_before_the_request(fronts: Fronts, client: RawH2) -> None:
    path = fronts.on(lambda connection, _: answer(connection, b"enough" * 100, status="409 Conflict"))
    stream = client.open(request(path, "POST"), end=False)
    client.send_body(stream, bytes(20_000), end=False)
    got = client.response(stream)
    assert (got.status, got.body, got.is_complete) == (409, b"enough" * 100, True)
    client.until(lambda: got.reset is not None, "the client is told to stop")
    assert got.reset == 0, "NO_ERROR: the answer is whole (RFC 9113 8.1)"
    client.send(data(stream, b"on its way", END_STREAM))
    assert client.ask(request(fronts.on(echo), "POST"), b"fine").body == b"fine"


def test_bytes_go_both_ways_before_the_request_ends(fronts: Fronts, client: RawH2) -> None:
    def script(connection: BackendConnection, head: bytes) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while size := int(connection.until(b"\r\n"), 16):
            body = connection.exactly(size + 2)
            connection.send(b"%x\r\n" % size + body)
        connection.exactly(2)
        connection.send(b"0\r\n\r\n")

    stream = client.open(request(fronts.on(script), "POST"), end=False)
    got = client.answer(stream)
    client.until(lambda: got.status, "the head")
    for word in (b"one", b"two", b"three"):
        client.send_body(stream, word, end=False)
        client.until(lambda: got.body.endswith(word), "the echo")  # noqa: B023  # called within the turn
    client.send_body(stream, b"")
    assert client.response(stream).body == b"onetwothree"
