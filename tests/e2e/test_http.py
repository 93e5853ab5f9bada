"""What an HTTP/1.1 message is on both sides of the gateway: bodies, fields, trailers, and the odd requests.

Every test runs against a listener in clear text and one with TLS.
"""

from collections.abc import Iterator

import pytest

from tests.e2e.harness import BackendConnection, Client
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

LISTENERS = "".join(
    f"""
[[listeners]]
name = "{name}"
address = "127.0.0.1:{{port_{name}}}"
protocol = "h1"
backends = [{{ address = "{{backend}}" }}]
{keys}
[listeners.http]
{http}
"""
    for name, keys, http in (
        ("forwarded", "", 'forwarded = "forwarded"'),
        ("both", "", 'forwarded = "both"'),
        ("none", "", 'forwarded = "none"'),
        ("novia", "alt_svc = { h3_port = 8443, max_age = 60 }", 'via = false\nserver_header = "edge"'),
    )
)
TRUSTED = "127.0.0.2"
SIZES = (0, 1, 1000, 65_536, 3_000_017)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("http")
    runtime = f'trusted_proxies = ["{TRUSTED}/32"]'
    with http_world(
        directory, runtime=runtime, http="max_request_body_bytes = 8000000", more=LISTENERS
    ) as it:
        yield it


@pytest.fixture(params=["clear", "tls"])
def client(request: pytest.FixtureRequest, world: World) -> Iterator[Client]:
    with world.client(request.param) as it:
        yield it


def pattern(size: int) -> bytes:
    """Bytes in which every displacement shows."""
    return b"".join(b"%08d" % number for number in range(size // 8 + 1))[:size]


def get(path: str, *lines: str, method: str = "GET", version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: a.example", *lines, "", ""]).encode()


class TestBodies:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("up", ["length", "chunked"])
    @pytest.mark.parametrize("down", ["length", "chunked", "close"])
    def test_arrive_as_they_were_sent(
        self, world: World, client: Client, size: int, up: str, down: str
    ) -> None:
        heads = []

        def echo(connection: BackendConnection, head: bytes) -> None:
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
        path = world.on(echo)
        if up == "length":
            client.send(get(path, f"Content-Length: {size}", method="POST") + body)
        else:
            client.send(get(path, "Transfer-Encoding: chunked", method="POST") + chunked(body, 33_333))
        status, headers, got = client.response()
        assert status == 200
        assert got == body
        if size:  # an empty one may be announced either way
            assert field(heads[0], "content-length") == (str(size) if up == "length" else None)
            assert field(heads[0], "transfer-encoding") == ("chunked" if up == "chunked" else None)
        assert headers.get("content-length") == (str(size) if down == "length" else None)

    def test_a_body_for_an_http_1_0_client_ends_with_the_connection(
        self, world: World, client: Client
    ) -> None:
        body = pattern(300_000)

        def script(connection: BackendConnection, head: bytes) -> None:
            connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunked(body))

        client.send(get(world.on(script), version="1.0"))
        status, headers, got = client.response()
        assert (status, headers["connection"]) == (200, "close")
        assert got == body


class TestFields:
    def test_of_a_request_pass_in_order_with_duplicates(self, world: World, client: Client) -> None:
        heads = []

        def script(connection: BackendConnection, head: bytes) -> None:
            heads.append(head)
            answer(connection)

        sent = [
            ("Accept", "text/html"),
            ("X-Twice", "one"),
            ("Cookie", "a=b; c=d"),
            ("X-Twice", "two"),
            ("Authorization", "Basic Zm9vOmJhcg=="),
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Cookie", "e=f"),
            ("X-Empty", ""),
            ("X-Bytes", "caf\xe9"),
        ]
        dropped = [
            ("Connection", "keep-alive, X-Private"),
            ("X-Private", "1"),
            ("Keep-Alive", "timeout=5"),
            ("Proxy-Connection", "keep-alive"),
            ("TE", "gzip"),
            ("Upgrade", "h2c"),
            ("HTTP2-Settings", "AAMAAABkAARAAAAAAAIAAAAA"),
            ("Proxy-Authorization", "Basic x"),
        ]
        text = "".join(f"{name}: {value}\r\n" for name, value in [*sent, *dropped])
        path = world.on(script)
        client.send(f"GET {path}?q=%2f%41//x HTTP/1.1\r\nHost: a.example:81\r\n{text}\r\n".encode("latin-1"))
        assert client.response()[0] == 200
        assert heads[0].startswith(f"GET {path}?q=%2f%41//x HTTP/1.1\r\n".encode())
        got = [(name, value) for name, value in fields(heads[0]) if name in {one[0].lower() for one in sent}]
        assert got == [(name.lower(), value) for name, value in sent]
        names = {name for name, _ in fields(heads[0])}
        assert not names & {name.lower() for name, _ in dropped if name != "Connection"}
        assert "private" not in (field(heads[0], "connection") or "").lower()
        assert field(heads[0], "host") == "a.example:81"

    def test_of_a_response_pass_in_order_with_duplicates(self, world: World, client: Client) -> None:
        sent = (
            b"server: theirs/1\r\nset-cookie: a=b; Path=/\r\nx-one: 1\r\nset-cookie: c=d\r\nvary: accept\r\n"
            b"date: Mon, 01 Jan 2024 00:00:00 GMT\r\n"
        )
        private = b"connection: x-private\r\nx-private: 1\r\nkeep-alive: timeout=9\r\n"
        path = world.on(lambda connection, _: answer(connection, b"x", headers=sent + private))
        client.send(get(path))
        head = client.until(b"\r\n\r\n")
        names = {name for name, _ in fields(sent)} | {"server"}
        got = [pair for pair in fields(head) if pair[0] in names]
        assert got == fields(b"\r\n" + sent)
        assert field(head, "x-private") is None
        assert field(head, "keep-alive") is None
        assert field(head, "via") == "1.1 expressgateway"

    @pytest.mark.parametrize("status", ["200", "201", "301", "404", "418", "500", "503", "599"])
    def test_the_backends_status_passes(self, world: World, client: Client, status: str) -> None:
        client.send(get(world.on(lambda connection, _: answer(connection, b"it", status=f"{status} Any"))))
        assert client.response()[::2] == (int(status), b"it")


class TestTrailers:
    def test_of_a_request(self, world: World, client: Client) -> None:
        seen = []

        def script(connection: BackendConnection, head: bytes) -> None:
            seen.append(read_chunked(connection))
            answer(connection)

        client.send(
            get(world.on(script), "Transfer-Encoding: chunked", "Trailer: X-Sum", method="POST")
            + b"3\r\nabc\r\n0\r\nX-Sum: 7\r\nX-More: a, b\r\n\r\n"
        )
        assert client.response()[0] == 200
        body, trailers = seen[0]
        assert body == b"abc"
        assert [(name.lower(), value) for name, value in trailers] == [("x-sum", "7"), ("x-more", "a, b")]

    @pytest.mark.parametrize("wanted", [True, False])
    def test_of_a_response_if_the_client_takes_them(self, world: World, client: Client, wanted: bool) -> None:
        def script(connection: BackendConnection, head: bytes) -> None:
            connection.send(
                b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
                b"3\r\nabc\r\n0\r\ngrpc-status: 0\r\nx-sum: 7\r\n\r\n"
            )

        path = world.on(script)
        client.send(get(path, *["TE: trailers"] * wanted))
        client.until(b"\r\n\r\n")
        assert read_chunked(client) == (b"abc", [("grpc-status", "0"), ("x-sum", "7")] if wanted else [])
        client.send(get(path))
        assert client.response()[::2] == (200, b"abc")


class TestOddRequests:
    def test_head_has_the_length_and_no_body(self, world: World, client: Client) -> None:
        def script(connection: BackendConnection, head: bytes) -> None:
            if head.startswith(b"HEAD"):
                connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 12345\r\n\r\n")
            else:
                answer(connection, b"body")

        path = world.on(script)
        for _ in range(2):
            client.send(get(path, method="HEAD"))
            status, headers, _ = client.response(head_only=True)
            assert (status, headers["content-length"]) == (200, "12345")
            client.send(get(path))
            assert client.response()[::2] == (200, b"body")

    @pytest.mark.parametrize("head", [b"204 No Content\r\n", b"304 Not Modified\r\ncontent-length: 77\r\n"])
    def test_a_status_without_a_body(self, world: World, client: Client, head: bytes) -> None:
        path = world.on(lambda connection, _: connection.send(b"HTTP/1.1 " + head + b"etag: x\r\n\r\n"))
        for _ in range(2):
            client.send(get(path))
            status, headers, _ = client.response()
            assert status == int(head[:3])
            assert headers["etag"] == "x"
            assert "transfer-encoding" not in headers
            assert ("content-length" in headers) == (status == 304)

    def test_options_asterisk(self, world: World, client: Client) -> None:
        seen = []

        def script(connection: BackendConnection, head: bytes) -> None:
            seen.append(head)
            answer(connection, headers=b"allow: GET\r\n")

        world.on(script, "*")
        client.send(get("*", method="OPTIONS"))
        assert client.response()[1]["allow"] == "GET"
        assert seen[0].startswith(b"OPTIONS * HTTP/1.1\r\n")

    def test_an_absolute_target_becomes_a_path(self, world: World, client: Client) -> None:
        seen = []

        def script(connection: BackendConnection, head: bytes) -> None:
            seen.append(head)
            answer(connection)

        path = world.on(script)
        scheme = "http" if client.sock.__class__.__name__ == "socket" else "https"
        client.send(get(f"{scheme}://a.example{path}?x=1"))
        assert client.response()[0] == 200
        assert seen[0].startswith(f"GET {path}?x=1 HTTP/1.1\r\nhost: a.example\r\n".encode())

    def test_http_1_0_closes_unless_asked(self, world: World, client: Client) -> None:
        path = world.on(lambda connection, _: answer(connection, b"x"))
        for _ in range(2):
            client.send(get(path, "Connection: keep-alive", version="1.0"))
            status, headers, body = client.response()
            assert (status, headers["connection"], body) == (200, "keep-alive", b"x")
        client.send(get(path, version="1.0"))
        assert client.response()[1]["connection"] == "close"
        assert client.is_closed()

    def test_fifty_pipelined_requests_are_answered_in_order(self, world: World, client: Client) -> None:
        def script(connection: BackendConnection, head: bytes) -> None:
            number = head.split(b" ")[1].partition(b"?")[2]
            answer(connection, number * (1 if int(number) % 2 else 1000) + read_body(connection, head))

        path = world.on(script)
        requests = b"".join(
            get(f"{path}?{number}", "Content-Length: 3", method="POST") + b"abc" if number % 5 == 0
            else get(f"{path}?{number}")
            for number in range(50)
        )  # fmt: skip
        client.send(requests)
        for number in range(50):
            body = str(number).encode() * (1 if number % 2 else 1000) + (b"abc" if number % 5 == 0 else b"")
            assert client.response()[::2] == (200, body)

    def test_connection_close_is_obeyed(self, world: World, client: Client) -> None:
        client.send(get(world.on(lambda connection, _: answer(connection, b"x")), "Connection: close"))
        assert client.response()[1]["connection"] == "close"
        assert client.is_closed()


class TestInformational:
    def test_100_continue_is_the_backends_to_say(self, world: World, client: Client) -> None:
        heads = []

        def script(connection: BackendConnection, head: bytes) -> None:
            heads.append(head)
            connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            answer(connection, read_body(connection, head))

        client.send(get(world.on(script), "Content-Length: 5", "Expect: 100-continue", method="POST"))
        assert client.response()[0] == 100
        assert field(heads[0], "expect") == "100-continue"
        client.send(b"hello")
        assert client.response()[::2] == (200, b"hello")

    def test_a_backend_may_refuse_the_body(self, world: World, client: Client) -> None:
        path = world.on(lambda connection, _: answer(connection, b"no", status="403 Forbidden"))
        client.send(get(path, "Content-Length: 5000000", "Expect: 100-continue", method="POST"))
        assert client.response()[::2] == (403, b"no")

    def test_early_hints_and_others_pass(self, world: World, client: Client) -> None:
        def script(connection: BackendConnection, head: bytes) -> None:
            connection.send(b"HTTP/1.1 102 Processing\r\n\r\n")
            connection.send(b"HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\r\n" * 2)
            answer(connection, b"page")

        path = world.on(script)
        client.send(get(path))
        assert client.response()[0] == 102
        for _ in range(2):
            status, headers, _ = client.response()
            assert (status, headers["link"]) == (103, "</a.css>; rel=preload")
        assert client.response()[::2] == (200, b"page")
        client.send(get(path, version="1.0"))
        assert client.response()[::2] == (200, b"page"), "none for an HTTP/1.0 client"


class TestTheGatewaysOwnFields:
    @pytest.fixture
    def asked(self, world: World) -> "Asked":
        return Asked(world)

    def test_x_forwarded_replaces_what_a_stranger_says(self, asked: "Asked") -> None:
        lie = ("X-Forwarded-For: 6.6.6.6", "X-Forwarded-Proto: gopher", "X-Forwarded-Host: evil.example")
        head, _ = asked("tls", "127.0.0.1", *lie)
        assert field(head, "x-forwarded-for") == "127.0.0.1"
        assert field(head, "x-forwarded-proto") == "https"
        assert field(head, "x-forwarded-host") == "a.example"
        assert field(head, "forwarded") is None
        assert field(head, "via") == "1.1 expressgateway"

    def test_x_forwarded_of_a_trusted_proxy_is_continued(self, asked: "Asked") -> None:
        said = ("X-Forwarded-For: 9.9.9.9", "X-Forwarded-Proto: https", "X-Forwarded-Host: www.example")
        head, _ = asked("clear", TRUSTED, *said, "Via: 1.0 first", "X-Request-Id: abc")
        assert field(head, "x-forwarded-for") == f"9.9.9.9, {TRUSTED}"
        assert field(head, "x-forwarded-proto") == "https"
        assert field(head, "x-forwarded-host") == "www.example"
        assert field(head, "via") == "1.0 first, 1.1 expressgateway"
        assert field(head, "x-request-id") == "abc"

    def test_forwarded(self, asked: "Asked") -> None:
        head, _ = asked("forwarded", "127.0.0.1", "Forwarded: for=6.6.6.6", "X-Forwarded-For: 6.6.6.6")
        assert field(head, "forwarded") == 'for=127.0.0.1;proto=http;host="a.example"'
        assert field(head, "x-forwarded-for") is None
        head, _ = asked("forwarded", TRUSTED, "Forwarded: for=9.9.9.9")
        assert field(head, "forwarded") == f'for=9.9.9.9, for={TRUSTED};proto=http;host="a.example"'

    def test_both_and_none(self, asked: "Asked") -> None:
        head, _ = asked("both", "127.0.0.1")
        assert field(head, "x-forwarded-for") == "127.0.0.1"
        assert (field(head, "forwarded") or "").startswith("for=127.0.0.1")
        head, _ = asked("none", "127.0.0.1", "X-Forwarded-For: 6.6.6.6", "Forwarded: for=6.6.6.6")
        assert field(head, "x-forwarded-for") is None
        assert field(head, "forwarded") is None

    def test_via_server_and_alt_svc_as_configured(self, asked: "Asked") -> None:
        head, headers = asked("novia", "127.0.0.1", backend=b'alt-svc: h3=":1"\r\n')
        assert field(head, "via") is None
        assert "via" not in headers
        assert headers["server"] == "edge"
        assert headers["alt-svc"] == 'h3=":8443"; ma=60'
        _, headers = asked("clear", "127.0.0.1")
        assert headers["server"] == "expressgateway"
        assert "alt-svc" not in headers
        assert "date" in headers

    def test_request_ids_are_made_once_each(self, asked: "Asked") -> None:
        made = [field(asked("clear", "127.0.0.1", "X-Request-Id: mine")[0], "x-request-id") for _ in range(3)]
        assert "mine" not in made
        assert None not in made
        assert len(set(made)) == 3

    def test_a_trace_is_continued_or_begun(self, asked: "Asked") -> None:
        trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        head, _ = asked("clear", "127.0.0.1", f"traceparent: {trace}", "tracestate: a=b")
        assert (field(head, "traceparent") or "").startswith("00-4bf92f3577b34da6a3ce929d0e0e4736-")
        assert field(head, "tracestate") == "a=b"
        for bad in ("", "traceparent: 00-" + "0" * 32 + "-00f067aa0ba902b7-01", "traceparent: nonsense"):
            head, _ = asked("clear", "127.0.0.1", *[bad] * bool(bad))
            version, trace_id, span, flags = (field(head, "traceparent") or "").split("-")
            assert (version, len(trace_id), len(span), len(flags)) == ("00", 32, 16, 2)
            assert trace_id.strip("0")


class Asked:
    """Ask once; gives the head that the backend got and the headers that the client got."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __call__(
        self, front: str, source: str, *lines: str, backend: bytes = b""
    ) -> tuple[bytes, dict[str, str]]:
        heads = []

        def script(connection: BackendConnection, head: bytes) -> None:
            heads.append(head)
            answer(connection, headers=backend)

        with self._world.client(front, source) as client:
            client.send(get(self._world.on(script), *lines))
            status, headers, _ = client.response()
        assert status == 200
        return heads[0], headers


def test_the_last_exchange_of_a_connections_budget_says_so(world: World, client: Client) -> None:
    """`max_keepalive_requests`, 100 by default; never a reset, also with more requests in the pipeline."""
    path = world.on(lambda connection, _: answer(connection, b"x"))
    client.send(get(path) * 105)
    said = []
    for _ in range(100):
        status, headers, _ = client.response()
        assert status == 200
        said.append(headers.get("connection"))
    assert said == [*[None] * 99, "close"]
    assert client.sock.recv(1) == b"", "an orderly end, not a reset"
