"""Routes on a running gateway: what matches, what is answered, and what is changed on the way."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.backend_crowd import Answer, Crowd, ask, get, shares
from tests.e2e.harness import Client, Gateway, certificate, eventually
from tests.e2e.http_world import client_context
from tests.ports import free_port

MATCHES = {  # body of the answer: what matches
    "exact host": "host = 'exact.example'",
    "wildcard": "host = '*.example'",
    "deep wildcard": "host = '*.deep.example'",
    "host alone": "host = 'm.example'",
    "exact path": "host = 'm.example', path = '/x/exact'",
    "regex": "host = 'm.example', path_regex = '/x/e[a-z]+'",
    "longer regex": "host = 'm.example', path_regex = '/x/e[a-z]+[0-9]{2}'",
    "prefix": "host = 'm.example', path_prefix = '/x'",
    "below prefix": "host = 'm.example', path_prefix = '/x/y/'",
    "any method": "host = 'm.example', path = '/m'",
    "post": "host = 'm.example', path = '/m', method = 'POST'",
    "no header": "host = 'm.example', path = '/h'",
    "one header": "host = 'm.example', path = '/h', headers = { x-a = '1' }",
    "two headers": "host = 'm.example', path = '/h', headers = { x-a = '1', x-b = '2, 3' }",
    "no query": "host = 'm.example', path = '/q'",
    "query": "host = 'm.example', path = '/q', query = { v = 'a b' }",
    "method, not header": "host = 'm.example', path = '/mh', method = 'PUT'",
    "header, not method": "host = 'm.example', path = '/mh', headers = { x-a = '1' }",
}

ROUTES = """
[[listeners.routes]]
match = { host = 'go.example', path_prefix = '/old' }
redirect = { to = 'https://{host}/new{path}{query}', status = 308 }

[[listeners.routes]]
match = { host = 'go.example', path = '/plain' }
redirect = { to = '/else' }

[[listeners.routes]]
match = { host = 'go.example', path_prefix = '/here' }
redirect = { to = '{scheme}://other.test{path}?from={host}', status = 301 }

[[listeners.routes]]
match = { host = 'go.example' }
redirect = { to = '{path}?open', status = 307 }

[[listeners.routes]]
name = 'fixed'
match = { host = 'said.example' }
respond = { status = 418, body = "it's me\\n", content_type = 'text/x-me' }
headers.response.set = { x-said = 'yes' }

[[listeners.routes]]
match = { host = 'strip.example' }
pool = 'a'
rewrite = { strip_prefix = '/api' }

[[listeners.routes]]
match = { host = 'strip.example', path_prefix = '/api' }
pool = 'a'
rewrite = { strip_prefix = '/api' }

[[listeners.routes]]
match = { host = 'add.example' }
pool = 'a'
rewrite = { add_prefix = '/base/v%20' }

[[listeners.routes]]
match = { host = 'both.example' }
pool = 'a'
rewrite = { strip_prefix = '/api', add_prefix = '/base' }

[[listeners.routes]]
match = { host = 'path.example' }
pool = 'a'
rewrite = { path = '/fixed%2Fpath' }

[[listeners.routes]]
match = { host = 'host.example' }
pool = 'a'
rewrite = { host = 'inner.test:8080' }

[[listeners.routes]]
match = { host = 'edit.example' }
pool = 'a'
headers.request = { set = { x-set = 'ours' }, add = { x-add = 'more' }, remove = ['x-gone', 'cookie'] }
headers.response = { set = { x-old = 'ours' }, add = { set-cookie = 'two=2' }, remove = ['x-no', 'server'] }

[[listeners.routes]]
match = { host = 'slow.example', path = '/total' }
pool = 'b'
timeouts = { total_timeout_ms = 300 }

[[listeners.routes]]
match = { host = 'slow.example', path = '/head' }
pool = 'b'
timeouts = { head_timeout_ms = 300 }

[[listeners.routes]]
match = { host = 'slow.example', path = '/body' }
pool = 'b'
timeouts = { body_timeout_ms = 300 }

[[listeners.routes]]
match = { host = 'slow.example' }
pool = 'b'

[[listeners.routes]]
match = { host = 'again.example', path = '/retried' }
pool = 'pair'
retry = { attempts = 2, on = [503] }

[[listeners.routes]]
match = { host = 'again.example' }
pool = 'pair'
"""

POOLS = {"a": ["a"], "b": ["b"], "c": ["c"], "pair": ["c", "d"]}


class World:
    def __init__(self, directory: Path, crowd: Crowd) -> None:
        self.crowd = crowd
        self.port, self.tls_port, self.rest_port = free_port(), free_port(), free_port()
        self.files = {name: certificate(directory, f"{name}.example", stem=name) for name in "ab"}
        self.gateway = Gateway(
            directory, self.text(), runtime="max_keepalive_requests = 0\ndrain_timeout_ms = 200"
        )

    def text(self) -> str:
        text = f"[[listeners]]\nname = 'web'\naddress = '127.0.0.1:{self.port}'\nprotocol = 'h1'\n"
        for name, match in MATCHES.items():
            text += f"[[listeners.routes]]\nname = '{name}'\nmatch = {{ {match} }}\n"
            text += f"respond = {{ status = 200, body = '{name}' }}\n"
        text += ROUTES
        text += f"[[listeners]]\nname = 'tls'\naddress = '127.0.0.1:{self.tls_port}'\nprotocol = 'h1s'\n"
        pairs = [f"cert_path = '{each.certificate}', key_path = '{each.key}'" for each in self.files.values()]
        text += f"tls = {{ {pairs[0]}, certificates = [{{ {pairs[1]} }}] }}\n"
        for name in "ab":
            text += f"[[listeners.routes]]\nmatch.host = '{name}.example'\npool = '{name}'\n"
        text += f"[[listeners]]\nname = 'rest'\naddress = '127.0.0.1:{self.rest_port}'\nprotocol = 'h1'\n"
        text += "pool = 'c'\n[[listeners.routes]]\nmatch.host = 'a.example'\npool = 'a'\n"
        for name, members in POOLS.items():
            tables = ", ".join(self.crowd[member].toml() for member in members)
            text += f"[[pools]]\nname = '{name}'\nbackends = [{tables}]\n"
        text += "retry.budget_percent = 100\n"  # of the pair: routes have none of their own
        return text

    def ask(self, *requests: bytes, lanes: int = 4) -> list[Answer]:
        return ask(self.port, requests, lanes=lanes)

    def sent(self, request: bytes, to: str = "a") -> bytes:
        """The head of the request that the backend got."""
        (answer,) = self.ask(request)
        assert answer.status == 200, answer
        return self.crowd[to].requests[-1][0]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Crowd("a", "b", "c", "d") as crowd:
        world = World(tmp_path_factory.mktemp("routes"), crowd)
        with world.gateway:
            yield world


@pytest.fixture
def world(running: World) -> World:
    running.crowd.calm()
    return running


class TestMatching:
    @pytest.mark.parametrize(
        ("request_line", "host", "fields", "expected"),
        [
            ("GET /", "exact.example", "", "exact host"),
            ("GET /", "EXACT.Example.:8080", "", "exact host"),
            ("GET /", "other.example", "", "wildcard"),
            ("GET /", "x.exact.example", "", "wildcard"),
            ("GET /", "deep.example", "", "wildcard"),
            ("GET /", "x.y.deep.example", "", "deep wildcard"),
            ("GET /none", "m.example", "", "host alone"),
            ("GET /x/exact", "m.example", "", "exact path"),
            ("GET /x/./y/../ex%61ct?q", "m.example", "", "exact path"),
            ("GET /x/else", "m.example", "", "regex"),
            ("GET /x/else12", "m.example", "", "longer regex"),
            ("GET /x/else/", "m.example", "", "prefix"),
            ("GET /x", "m.example", "", "prefix"),
            ("GET /x/", "m.example", "", "prefix"),
            ("GET /xy", "m.example", "", "host alone"),
            ("GET /x%2Fexact", "m.example", "", "host alone"),
            ("GET /x/y", "m.example", "", "prefix"),
            ("GET /x/y/z", "m.example", "", "below prefix"),
            ("GET /m", "m.example", "", "any method"),
            ("POST /m", "m.example", "Content-Length: 0\r\n", "post"),
            ("GET /h", "m.example", "", "no header"),
            ("GET /h", "m.example", "X-A: 2\r\n", "no header"),
            ("GET /h", "m.example", "X-A: 1\r\n", "one header"),
            ("GET /h", "m.example", "X-A: 1\r\nX-B: 2\r\nX-B: 3\r\n", "two headers"),
            ("GET /q", "m.example", "", "no query"),
            ("GET /q?v=b&v=a+b", "m.example", "", "no query"),
            ("GET /q?u&v=%61+b&v=c", "m.example", "", "query"),
            ("PUT /mh", "m.example", "X-A: 1\r\nContent-Length: 0\r\n", "method, not header"),
            ("GET /mh", "m.example", "X-A: 1\r\n", "header, not method"),
            ("GET /mh", "m.example", "", "host alone"),
        ],
    )
    def test_the_most_specific_wins(
        self, world: World, request_line: str, host: str, fields: str, expected: str
    ) -> None:
        request = f"{request_line} HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n".encode()
        (answer,) = world.ask(request)
        assert (answer.status, answer.body.decode()) == (200, expected)

    def test_nothing_matches(self, world: World) -> None:
        before = world.gateway.metric("http_gateway_errors_total", listener="web", reason="no_route")
        for host in ("nowhere.test", "example", "127.0.0.1"):
            (answer,) = world.ask(get(host))
            assert answer.status == 404
            assert "error=destination_not_found" in answer.header("Proxy-Status")
            assert "no_route" in answer.body.decode()
        after = world.gateway.metric("http_gateway_errors_total", listener="web", reason="no_route")
        assert after == before + 3

    def test_the_listeners_pool_takes_the_rest(self, world: World) -> None:
        assert [a.name for a in ask(world.rest_port, [get("a.example"), get("b.example")])] == ["a", "c"]

    def test_metrics_are_told_apart_by_route(self, world: World) -> None:
        def counted(route: str, listener: str = "web") -> float:
            return world.gateway.metric("http_requests_total", listener=listener, route=route)

        routes = ["exact host", "fixed", "strip.example/api/*", "strip.example", "default"]
        before = [counted(route) for route in routes]
        hosts = ["exact.example", "said.example", "strip.example", "strip.example", "nowhere.test"]
        world.ask(*(get(host) for host in hosts), get("strip.example", "/api/x"))
        assert [counted(route) - old for route, old in zip(routes, before, strict=True)] == [1, 1, 1, 2, 1]

    def test_over_tls(self, world: World) -> None:
        """By the host that was asked for, which SNI must not contradict."""
        for name, other in ("ab", "ba"):
            context = client_context(world.files[name].certificate)
            with Client(world.tls_port, tls=context, sni=f"{name}.example") as client:
                client.send(get(f"{name}.example"))
                assert client.response()[2].decode() == name
                client.send(get("nowhere.test"))
                assert client.response()[0] == 404
                client.send(get(f"{other}.example"))  # for which there is another certificate
                assert client.response()[0] == 421


class TestAnswers:
    @pytest.mark.parametrize(
        ("target", "status", "location"),
        [
            ("/old/x%20y?a=b%2F&c", 308, "https://go.example/new/old/x%20y?a=b%2F&c"),
            ("/old", 308, "https://go.example/new/old"),
            ("/plain?x", 302, "/else"),
            ("/here/we?go", 301, "http://other.test/here/we?from=go.example"),
            ("/x", 307, "/x?open"),
            ("//evil.test/x", 307, "/evil.test/x?open"),
            ("/\\evil.test", 307, "/evil.test?open"),
        ],
    )
    def test_redirect(self, world: World, target: str, status: int, location: str) -> None:
        (answer,) = world.ask(get("go.example:8080", target))
        assert (answer.status, answer.header("Location")) == (status, location)

    def test_fixed(self, world: World) -> None:
        (answer,) = world.ask(get("said.example"))
        assert (answer.status, answer.body) == (418, b"it's me\n")
        assert answer.header("Content-Type") == "text/x-me"
        assert answer.header("X-Said") == "yes"
        assert answer.header("X-Request-Id")

    def test_head(self, world: World) -> None:
        with Client(world.port) as client:
            client.send(b"HEAD / HTTP/1.1\r\nHost: said.example\r\n\r\n" + get("said.example"))
            status, headers, _ = client.response(head_only=True)
            assert (status, headers["content-length"]) == (418, "8")
            assert client.response()[2] == b"it's me\n"

    @pytest.mark.parametrize("framing", ["Content-Length: 1000000", "Transfer-Encoding: chunked"])
    def test_an_upload_under_way_is_answered_at_once(self, world: World, framing: str) -> None:
        """And what comes of it afterwards is never taken for a request."""
        with Client(world.port) as client:
            client.send(f"POST / HTTP/1.1\r\nHost: said.example\r\n{framing}\r\n\r\n".encode())
            assert client.response()[0] == 418
            smuggled = get("exact.example", "/inside")
            rest = smuggled if "Length" in framing else b"%x\r\n%s\r\n" % (len(smuggled), smuggled)
            client.send(rest)
            client.sock.shutdown(1)
            assert b"exact host" not in client.rest()


class TestChanges:
    @pytest.mark.parametrize(
        ("host", "target", "expected"),
        [
            ("strip", "/api/x%2Fy%20z?q=%20&a=b+c%2f", "/x%2Fy%20z?q=%20&a=b+c%2f"),
            ("strip", "/api", "/"),
            ("strip", "/api?x=/api", "/?x=/api"),
            ("strip", "/api//x", "//x"),
            ("strip", "/apix/y", "/apix/y"),
            ("strip", "/%61pi/x%20y", "/x%20y"),
            ("strip", "/api/../secret", "/secret"),
            ("strip", "/a%2epi/x", "/a%2epi/x"),
            ("add", "/x//y%c3%a9?%3f#", None),
            ("add", "/x//y%c3%a9?%3f=%00", "/base/v%20/x//y%c3%a9?%3f=%00"),
            ("both", "/api/v1?x", "/base/v1?x"),
            ("both", "/other?", "/base/other?"),
            ("both", "/api/%2e%2e/x", "/base/x"),
            ("path", "/any/thing?q=%41&q", "/fixed%2Fpath?q=%41&q"),
            ("path", "/", "/fixed%2Fpath"),
        ],
    )
    def test_rewritten_targets(self, world: World, host: str, target: str, expected: str | None) -> None:
        request = get(f"{host}.example", target)
        if expected is None:
            assert world.ask(request)[0].status == 400  # a fragment is no part of a target
            return
        line = world.sent(request).split(b"\r\n")[0]
        assert line.decode() == f"GET {expected} HTTP/1.1"

    def test_rewritten_host(self, world: World) -> None:
        head = world.sent(get("Host.example:80", "/x?y")).lower()
        assert b"\r\nhost: inner.test:8080\r\n" in head
        assert re.search(rb"\r\nx-forwarded-host: host\.example(:80)?\r\n", head)
        assert head.count(b"\r\nhost:") == 1

    def test_request_fields(self, world: World) -> None:
        head = world.sent(
            get("edit.example", X_Set="theirs", X_Add="first", X_Gone="1", Cookie="a=b", X_Stays="x")
        )
        fields = head.decode().lower().split("\r\n")
        assert [line for line in fields if line.startswith("x-set")] == ["x-set: ours"]
        assert [line for line in fields if line.startswith("x-add")] == ["x-add: first", "x-add: more"]
        assert "x-stays: x" in fields
        assert not [line for line in fields if line.startswith(("x-gone", "cookie"))]

    def test_response_fields(self, world: World) -> None:
        world.crowd["a"].says = (
            b"HTTP/1.1 200 OK\r\nServer: theirs\r\nX-Old: 1\r\nX-Old: 2\r\nSet-Cookie: one=1\r\n"
            b"X-No: 1\r\nX-Stays: x\r\nContent-Length: 1\r\n\r\na"
        )
        for _ in range(3):  # what was made of a section is remembered
            (answer,) = world.ask(get("edit.example"))
            fields = answer.head.decode().lower().split("\r\n")
            assert [line for line in fields if line.startswith("x-old")] == ["x-old: ours"]
            assert [line for line in fields if line.startswith("set-cookie")] == [
                "set-cookie: one=1",
                "set-cookie: two=2",
            ]
            assert "x-stays: x" in fields
            assert not [line for line in fields if line.startswith(("x-no", "server"))]

    @pytest.mark.parametrize("path", ["/total", "/head"])
    def test_its_own_times(self, world: World, path: str) -> None:
        world.crowd.hold("b")
        with Client(world.port) as patient:
            patient.send(get("slow.example"))  # the listener's times
            eventually(lambda: len(world.crowd["b"].held) == 1, "it is asked")
            started = time.monotonic()
            (answer,) = world.ask(get("slow.example", path))
            assert 0.2 < time.monotonic() - started < 20
            assert answer.status == 504
            assert "error=http_response_timeout" in answer.header("Proxy-Status")
            world.crowd.release("b")
            assert patient.response()[2] == b"b"

    def test_its_own_time_for_a_body(self, world: World) -> None:
        """Of a response that stalls: it is cut short, and so looks."""
        world.crowd["b"].says = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npart"
        with Client(world.port) as client:
            client.send(get("slow.example", "/body"))
            client.until(b"part")
            started = time.monotonic()
            assert client.rest() == b""
            assert time.monotonic() - started < 20

    def test_its_own_retries(self, world: World) -> None:
        world.crowd["c"].says = b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"
        plain = Counter(answer.status for answer in world.ask(*[get("again.example")] * 40, lanes=1))
        assert plain == {200: 20, 503: 20}
        retried = world.ask(*[get("again.example", "/retried")] * 40, lanes=1)
        assert shares(retried) == {"d": 40}
        assert "2" in {answer.header("X-Gateway-Attempts") for answer in retried}

    def test_a_retry_takes_no_turn(self, world: World) -> None:
        world.crowd["c"].says = b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"
        retried = world.ask(*[get("again.example", "/retried")] * 40, lanes=1)
        attempts = Counter(answer.header("X-Gateway-Attempts") for answer in retried)
        assert attempts == {"": 20, "2": 20}
