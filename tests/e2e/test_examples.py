"""The examples for routes, canaries, sessions, HTTP/3 and Mode A, started as they are, do what they say.

Only the ports are other ones. Each test proves the sentence that its name repeats.
"""

import asyncio
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from math import sqrt
from pathlib import Path

import pytest
from websockets.utils import accept_key

from expressgateway.demo.certificate import CertificateFiles
from tests.e2e.examples import EXAMPLES, Asker, Example, Got, reply
from tests.e2e.grpc_h3 import Service as GrpcService
from tests.e2e.grpc_h3 import unary
from tests.e2e.h3_site import ask
from tests.e2e.harness import (
    PATIENCE_S,
    BackendConnection,
    Client,
    certificate,
    eventually,
)
from tests.e2e.http_world import client_context
from tests.e2e.quic_world import World
from tests.e2e.quic_world import client as quic_client
from tests.e2e.talks import Talk, answer, rest
from tests.e2e.talks_h3 import H3Backend
from tests.e2e.websocket_h3 import H3Link

SIGMAS = 5
"""How far a count may lie from what is expected: once in a million runs it lies further."""


def is_share(count: int, total: int, share: float) -> bool:
    """Whether so many of ``total`` draws are what ``share`` lets expect."""
    return abs(count - total * share) <= SIGMAS * sqrt(total * share * (1 - share))


# -- routes.toml


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    with Example(tmp_path_factory.mktemp("routes"), "routes") as example:
        yield example


API = "api.example.com"


class TestRoutes:
    @pytest.mark.parametrize(
        ("path", "host", "backend"),
        [
            ("/", "any.test", "3000"),
            ("/img/7.jpg", "any.test", "3000"),
            ("/img/7.png", "any.test", "3004"),
            ("/img/7.webp?x=1", "any.test", "3004"),
            ("/img/7.png/x", "any.test", "3000"),
            ("/img/x7.png", "any.test", "3000"),
            ("/", "a.example.com", "3003"),
            ("/", "b.A.example.com:8080", "3003"),
            ("/", "example.com", "3000"),
            ("/healthz", "a.example.com", "3003"),
            ("/v2", API, "3003"),
            ("/v1x", API, "3003"),
            ("/search", "any.test", "3000"),
            ("/search?engine=new", "any.test", "3005"),
            ("/search/x?a=b&engine=new", "any.test", "3005"),
            ("/search?engine=old", "any.test", "3000"),
        ],
    )
    def test_what_goes_where(self, routes: Example, path: str, host: str, backend: str) -> None:
        got = routes.ask_for(path, host)
        assert (got.status, got.body) == (200, backend)

    def test_a_field_chooses_a_release(self, routes: Example) -> None:
        assert routes.ask_for("/search", x_beta="yes").body == "3005"
        assert routes.ask_for("/search", x_beta="no").body == "3000"

    @pytest.mark.parametrize(
        ("path", "arrives"), [("/v1/users?a=1", "/users?a=1"), ("/v1", "/"), ("/v1/", "/")]
    )
    def test_the_backends_know_nothing_of_v1(self, routes: Example, path: str, arrives: str) -> None:
        port = routes.ask_for(path, API).body
        assert port in ("3001", "3002")
        assert routes.seen(port).startswith(f"GET {arrives} HTTP/1.1\r\n".encode())

    def test_a_503_of_the_api_is_tried_again_elsewhere(self, routes: Example) -> None:
        answered: list[str] = []

        def once(connection: BackendConnection) -> None:
            answered.append(connection.backend.name)
            if len(answered) == 1:
                reply(connection, "busy", "503 Service Unavailable")
            else:
                reply(connection, connection.backend.name)

        routes.answers["/flaky"] = once
        got = routes.ask_for("/v1/flaky", API)
        assert (got.status, got.body) == (200, answered[1])
        assert sorted(answered) == ["3001", "3002"]

    def test_but_not_for_ever_and_not_for_others(self, routes: Example) -> None:
        routes.answers["/busy"] = lambda connection: reply(connection, connection.backend.name, "503 Busy")
        before = {port: len(backend.requests) for port, backend in routes.backends.items()}
        assert routes.ask_for("/v1/busy", API).status == 503
        assert routes.ask_for("/busy").status == 503
        tried = {port: len(backend.requests) - before[port] for port, backend in routes.backends.items()}
        assert (tried["3001"], tried["3002"], tried["3000"]) == (1, 1, 1)

    def test_nobody_deletes_anything(self, routes: Example) -> None:
        got = routes.ask_for("/v1/users", API, method="DELETE")
        assert (got.status, got.body) == (403, "read only\n")
        assert routes.ask_for("/users", method="DELETE").body == "3000"

    def test_fields_of_tenants(self, routes: Example) -> None:
        routes.answers["/fields"] = lambda connection: reply(
            connection, connection.backend.name, fields="x-powered-by: php\r\nx-other: 1\r\n"
        )
        got = routes.ask_for("/fields", "a.example.com", x_debug="1", x_zone="mine", x_other="2")
        head = routes.seen("3003").lower()
        assert (b"x-zone: tenants\r\n" in head, b"mine" in head, b"x-debug" in head) == (True, False, False)
        assert b"x-other: 2\r\n" in head
        assert got.headers["strict-transport-security"] == "max-age=31536000"
        assert ("x-powered-by" in got.headers, got.headers["x-other"]) == (False, "1")
        other = routes.ask_for("/fields", x_debug="1")
        assert b"x-debug: 1" in routes.seen("3000").lower()
        assert other.headers["x-powered-by"] == "php"

    def test_everything_of_one_host_moves_to_https(self, routes: Example) -> None:
        got = routes.ask_for("/a/b?c=d&e", "www.example.org:8080")
        assert (got.status, got.headers["location"]) == (301, "https://www.example.org/a/b?c=d&e")

    def test_what_the_gateway_answers_by_itself(self, routes: Example) -> None:
        got = routes.ask_for("/healthz")
        assert (got.status, got.body, got.headers["content-type"]) == (
            200,
            "ok\n",
            "text/plain; charset=utf-8",
        )
        for path in ("/.git", "/.git/config", "/x/../.git/HEAD", "/%2egit/config"):
            assert routes.ask_for(path).status == 404
        assert routes.ask_for("/.gitignore").status == 200

    def test_an_old_place_under_a_new_roof(self, routes: Example) -> None:
        assert routes.ask_for("/blog-2019/x?y=1").body == "3000"
        head = routes.seen("3000").lower()
        assert head.startswith(b"get /archive/2019/x?y=1 http/1.1\r\n")
        assert b"\r\nhost: blog.internal\r\n" in head

    def test_a_lookup_must_be_quick_and_a_report_need_not(self, routes: Example) -> None:
        def late(connection: BackendConnection) -> None:
            until = time.monotonic() + 0.8
            eventually(lambda: time.monotonic() > until, "some time has passed")
            reply(connection, connection.backend.name)

        routes.answers |= {"/lookup/x": late, "/reports/x": late}
        began = time.monotonic()
        assert routes.ask_for("/lookup/x").status == 504
        assert 0.45 < time.monotonic() - began < 0.8 + PATIENCE_S / 2
        assert routes.ask_for("/reports/x").status == 200
        routes.wait_metric("http_gateway_errors_total", reason="head_timeout")

    def test_a_copy_of_every_order_goes_to_the_next_version(self, routes: Example) -> None:
        shadow = routes.backends["3006"].requests
        before = len(shadow)
        assert routes.ask_for("/orders/1", method="POST").body == "3000"
        eventually(lambda: len(shadow) > before, "the copy has come")
        assert shadow[-1][0].startswith(b"POST /orders/1 HTTP/1.1\r\n")
        assert routes.ask_for("/orders/2").body == "3000"  # GET: no copy
        assert len(shadow) == before + 1

    def test_clients_do_not_notice_a_shadow_that_never_answers(self, routes: Example) -> None:
        def never(connection: BackendConnection) -> None:
            if connection.backend.name == "3006":
                connection.request()  # waits for a second one, which does not come
            reply(connection, connection.backend.name)

        routes.answers["/orders/3"] = never
        began = time.monotonic()
        for _ in range(20):
            assert routes.ask_for("/orders/3", method="POST").body == "3000"
        assert time.monotonic() - began < PATIENCE_S / 4

    def test_each_route_counts_for_itself(self, routes: Example) -> None:
        routes.ask_for("/", "www.example.org")
        routes.ask_for("/healthz")
        routes.ask_for("/v1/x", API)
        for route, status in (("to-https", "3xx"), ("/healthz", "2xx"), ("api.example.com/v1/*", "2xx")):
            routes.wait_metric("http_requests_total", route=route, status_class=status)


# -- canary.toml

DRAWS = 1000


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    with Example(tmp_path_factory.mktemp("canary"), "canary") as example:
        yield example


def is_new(got: Got) -> bool:
    return got.body == "3002"


class TestCanary:
    def test_a_tenth_of_new_clients_gets_the_new_release(self, canary: Example) -> None:
        counts = Counter(canary.ask_for().body for _ in range(DRAWS))
        assert is_share(counts["3002"], DRAWS, 0.1), counts
        assert is_share(counts["3000"], DRAWS, 0.45), counts

    def test_the_cookie(self, canary: Example) -> None:
        got = canary.ask_for()
        assert re.fullmatch(r"lane=[0-9a-f]+; Path=/; HttpOnly; SameSite=Lax", got.headers["set-cookie"]), (
            got.headers
        )

    def test_who_brings_it_back_goes_the_same_way(self, canary: Example) -> None:
        lanes = [canary.ask_for() for _ in range(200)]
        lanes = [got for got in lanes if is_new(got)][:5] + [got for got in lanes if not is_new(got)][:20]
        assert any(map(is_new, lanes))  # but for one run in a thousand million
        assert len({got.cookie for got in lanes}) == len(lanes)
        asker = Asker(canary.ports["8080"])
        for got in lanes:
            for _ in range(5):
                again = asker.ask(cookie=f"a=b; {got.cookie}; c=d")
                assert is_new(again) == is_new(got)
                assert "set-cookie" not in again.headers
            asker.close()  # another connection, and maybe another worker

    def test_testers_get_what_they_ask_for(self, canary: Example) -> None:
        counted = ("asked-for-canary", "asked-for-stable")
        before = [canary.metric("http_requests_total", route=route) for route in counted]
        for _ in range(60):
            always = canary.ask_for(x_canary="always", cookie="lane=0")
            assert is_new(always)
            assert not is_new(never := canary.ask_for(x_canary="never"))
            assert not always.cookie + never.cookie
        for route, number in zip(counted, before, strict=True):
            canary.wait_metric("http_requests_total", number + 60, route=route)

    def test_releases_are_compared_in_the_metrics(self, canary: Example) -> None:
        before = canary.metric("backend_requests_total", pool="canary", status_class="5xx")
        canary.answers["/broken"] = lambda connection: reply(connection, "", "500 Broken")
        for _ in range(3):
            assert canary.ask_for("/broken", x_canary="always").status == 500
        canary.wait_metric("backend_requests_total", before + 3, pool="canary", status_class="5xx")
        assert canary.metric("backend_requests_total", pool="stable", status_class="5xx") == 0

    def test_going_on_and_going_back(self, tmp_path: Path) -> None:
        text = (EXAMPLES / "canary.toml").read_text()
        with Example(tmp_path, "canary") as example:
            lanes = [example.ask_for() for _ in range(200)]
            assert example.reload(
                text.replace("weight = 90", "weight = 60").replace("weight = 10", "weight = 40")
            )
            after = [example.ask_for(cookie=got.cookie) for got in lanes]
            kept = [is_new(now) for got, now in zip(lanes, after, strict=True) if is_new(got)]
            joined = [is_new(now) for got, now in zip(lanes, after, strict=True) if not is_new(got)]
            assert all(kept)
            assert is_share(sum(joined), len(joined), 0.3 / 0.9), sum(joined)
            assert example.reload(text.replace("weight = 10", "weight = 0"))
            assert not any(is_new(example.ask_for(cookie=got.cookie)) for got in lanes)


# -- sticky.toml

PORT_OF = {"a": "3000", "b": "3001", "c": "3002"}


@pytest.fixture
def sticky(tmp_path: Path) -> Iterator[Example]:
    with Example(tmp_path, "sticky") as example:
        yield example


def sessions(example: Example, each: int = 3) -> dict[str, list[str]]:
    """Cookies of new clients, ``each`` for every backend, by its port."""
    found: dict[str, list[str]] = {port: [] for port in PORT_OF.values()}
    for _ in range(1000):
        got = example.ask_for()
        assert got.cookie.startswith("session=")
        found[got.body].append(got.cookie)
        if all(len(cookies) >= each for cookies in found.values()):
            return found
    raise AssertionError(f"some backends get no new clients: {found}")


def state(example: Example, id_: str) -> str:
    shown = json.loads(example.ask(f"/api/v1/pools/app/backends/{id_}")[1])["state"]
    assert isinstance(shown, str)
    return shown


class TestSticky:
    def test_a_client_stays_and_new_ones_are_spread_evenly(self, sticky: Example) -> None:
        counts = Counter(sticky.ask_for().body for _ in range(DRAWS))
        assert all(is_share(counts[port], DRAWS, 1 / 3) for port in PORT_OF.values()), counts
        cookies = sessions(sticky)
        asker = Asker(sticky.ports["8080"])
        for port, known in cookies.items():
            for _ in range(20):
                got = asker.ask(cookie=f"x=y; {known[0]}")
                assert (got.body, got.cookie) == (port, "")
            asker.close()
        assert len({cookie for known in cookies.values() for cookie in known}) == 3
        shown = sticky.ask_for().headers["set-cookie"].partition(";")[2]
        assert shown == " Path=/; HttpOnly; SameSite=Lax"

    def test_a_forged_cookie_counts_as_none(self, sticky: Example) -> None:
        real = sessions(sticky, 1)["3000"][0]
        forged = [
            real[:-1] + ("0" if real[-1] != "0" else "1"),
            "session=a",
            "session=",
            "session=" + "0" * 32,
        ]
        for cookie in forged:
            got = [sticky.ask_for(cookie=cookie) for _ in range(40)]
            assert len({each.body for each in got}) > 1
            assert all(each.cookie for each in got)

    def test_draining_keeps_the_sessions_and_takes_no_new_ones(self, sticky: Example) -> None:
        cookies = sessions(sticky)
        assert "app: a is draining" in sticky.command("backend", "drain", "app", "a")
        assert re.search(r"\n *a +\S+ +1 +draining", sticky.command("backend", "list", "app"))
        assert sticky.metric("backend_state", backend="a", state="draining") == 1
        eventually(lambda: self._takes_no_new(sticky), "no new client comes to it")
        for port, known in cookies.items():
            assert [sticky.ask_for(cookie=cookie).body for cookie in known] == [port] * len(known)
        sticky.command("backend", "enable", "app", "a")
        eventually(lambda: sticky.ask_for().body == "3000", "new clients come to it again")

    def test_so_does_weight_0_in_the_file_and_by_command(self, sticky: Example) -> None:
        cookies = sessions(sticky)
        text = (EXAMPLES / "sticky.toml").read_text()
        sticky.command("backend", "weight", "app", "a", "0")
        assert self._takes_no_new(sticky)
        assert sticky.ask_for(cookie=cookies["3000"][0]).body == "3000"
        assert sticky.reload(text)
        assert len(sessions(sticky, 1)["3000"]) >= 1  # until the next reload
        assert sticky.reload(text.replace('id = "a"', 'id = "a"\nweight = 0'))
        assert self._takes_no_new(sticky)
        assert sticky.ask_for(cookie=cookies["3000"][0]).body == "3000"

    @staticmethod
    def _takes_no_new(example: Example) -> bool:
        return "3000" not in {example.ask_for().body for _ in range(60)}

    def test_clients_of_a_sick_backend_get_another_one_and_a_new_cookie(self, sticky: Example) -> None:
        eventually(lambda: state(sticky, "a") == "healthy", "it was judged")
        cookie = sessions(sticky, 1)["3000"][0]
        sticky.sick.add("3000")
        eventually(lambda: state(sticky, "a") == "unhealthy", "it was found out")
        # Workers are told a moment later.
        eventually(lambda: sticky.ask_for(cookie=cookie).body != "3000", "its clients are given another one")
        moved = sticky.ask_for(cookie=cookie)
        assert moved.body != "3000"
        assert moved.cookie not in ("", cookie)
        assert sticky.ask_for(cookie=moved.cookie).body == moved.body
        probes = [event for event in sticky.log().splitlines() if "backend app/a becomes unhealthy" in event]
        assert len(probes) == 1
        sticky.sick.clear()
        eventually(lambda: state(sticky, "a") == "healthy", "it is back")

    def test_a_backend_that_recovers_gets_its_share_bit_by_bit(self, tmp_path: Path) -> None:
        text = (EXAMPLES / "sticky.toml").read_text()
        text = text.replace("interval_ms = 1000", "interval_ms = 100").replace("= 10000 ", "= 3000 ")
        with Example(tmp_path, "sticky", text) as example:
            example.sick.add("3000")
            eventually(lambda: state(example, "a") == "unhealthy", "it was found out")
            example.sick.clear()
            eventually(lambda: state(example, "a") == "healthy", "it is back")
            began = time.monotonic()
            early = Counter(example.ask_for().body for _ in range(200))
            grown = min((time.monotonic() - began + 0.3) / 3, 1.0)
            share = grown / (2 + grown)  # whom it does not take yet chooses again among the three
            assert early["3000"] <= 200 * share + SIGMAS * sqrt(200 * share * (1 - share)), early
            eventually(lambda: time.monotonic() - began > 3.2, "its time is over")
            late = Counter(example.ask_for().body for _ in range(300))
            assert is_share(late["3000"], 300, 1 / 3), late

    def test_sessions_outlive_the_gateway_with_a_secret_in_a_file(self, tmp_path: Path) -> None:
        text = (EXAMPLES / "sticky.toml").read_text()
        named = text.replace("# secret_path", "secret_path")
        assert named != text
        with Example(tmp_path, "sticky", named) as example:
            first = {port: known[0] for port, known in sessions(example, 1).items()}
        secret = tmp_path / "affinity.secret"
        assert (secret.stat().st_size, secret.stat().st_mode & 0o777) == (32, 0o600)
        with Example(tmp_path, "sticky", named) as example:
            assert all(example.ask_for(cookie=cookie).body == port for port, cookie in first.items())
        with Example(tmp_path, "sticky") as example:  # without the file: as if they were forged
            assert all(example.ask_for(cookie=cookie).cookie for cookie in first.values())


# -- quic-h3.toml


def echo_frames(connection: BackendConnection) -> None:
    """A server of WebSocket whose client says one short thing, which it repeats."""
    key = re.search(rb"(?i)sec-websocket-key: (\S+)", connection.backend.requests[-1][0])
    assert key is not None
    connection.send(
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-accept: " + accept_key(key[1].decode()).encode() + b"\r\n\r\n"
    )
    head = connection.exactly(6)
    size = head[1] & 0x7F
    said = bytes(byte ^ head[2 + at % 4] for at, byte in enumerate(connection.exactly(size)))
    connection.send(b"\x81" + bytes([size]) + said)
    connection.rest()


class TestHttp3:
    @pytest.fixture
    def files(self, tmp_path: Path) -> CertificateFiles:
        """Where the file says that they are."""
        made = certificate(tmp_path, "app.internal")
        (tmp_path / "certs").mkdir()
        files = CertificateFiles(tmp_path / "certs/server.pem", tmp_path / "certs/server.key")
        shutil.copy(made.certificate, files.certificate)
        shutil.copy(made.certificate, tmp_path / "certs/ca.pem")  # it has signed itself
        shutil.copy(made.key, files.key)
        return files

    def test_a_site(self, tmp_path: Path, files: CertificateFiles) -> None:
        """Found over TCP, used over UDP: pages of both pools, a call, a session, a sick backend."""
        calls = GrpcService()

        def origin(talk: Talk) -> None:
            if "grpc-timeout" in talk.headers:
                calls(talk)
            else:
                answer(talk, b"origin")

        example = Example(tmp_path, "quic-h3")
        port = example.ports["8443"]
        example.answers["/chat"] = echo_frames
        with (
            H3Backend(origin, "origin", files, port=example.ports["4433"]),
            example,
            Client(port, tls=client_context(files.certificate)) as first,
        ):
            first.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            status, headers, body = first.response()
            assert (status, headers["alt-svc"]) == (200, f'h3=":{port}"; ma=3600')
            assert body in (b"3000", b"3001")
            with H3Link(port, files) as link:
                client = link.end
                assert {rest(ask(client, "/")) for _ in range(4)} == {b"3000", b"3001"}
                assert rest(ask(client, "/static/x")) == b"origin"
                call = unary(client, "/shop.Cart/Echo", b"hello", timeout="100S")
                assert (call.rest(), call.status()) == ([b"hello"], 0)
                assert calls.seen["Echo"]["grpc-timeout"] != "100S"
                session = link.connect("/chat")
                session.send("hello")
                assert session.recv() == "hello"
                eventually(
                    lambda: example.metric("backend_state", state="healthy") == 3, "all of them are well"
                )
                example.sick.add("3000")
                eventually(lambda: example.metric("backend_state", state="unhealthy") == 1, "one is not")
                assert {rest(ask(client, "/")) for _ in range(4)} == {b"3001"}


# -- passthrough-mode-a.toml


class TestPassthrough:
    def test_ordinary_quic_servers(self, tmp_path: Path) -> None:
        with World(certificate(tmp_path)) as world, Example(tmp_path, "passthrough-mode-a") as example:
            for port in ("4433", "4434"):
                world.server(port, example.ports[port])

            async def main() -> None:
                seen = set()
                for _ in range(16):
                    async with quic_client(example.ports["8443"], world.configuration()) as one:
                        seen.add(await one.who())
                assert seen == {"4433", "4434"}

            asyncio.run(main())
            assert example.metric("connections_total", listener="passthrough") == 16
