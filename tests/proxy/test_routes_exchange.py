"""Routes at work: what is changed on the way there and back, who is asked, and what is answered at once."""

from collections import Counter
from typing import Any

import pytest

from expressgateway.proxy.errors import Reason
from expressgateway.proxy.forwarding import TrustedProxies
from expressgateway.proxy.keys import key_of
from expressgateway.proxy.rewriting import HeaderEdits, Redirect, Respond, Rewrite
from expressgateway.proxy.route import RetryPolicy, Route, SessionCookie, Split, Timeouts
from expressgateway.proxy.routing import Match, RouteTable
from expressgateway.upstream.errors import Fault
from tests.proxy.ends import ClientEnd
from tests.proxy.trying import SERVER_ERRORS, Cell, asked, cells
from tests.proxy.world import PoolUse, World

fronts = pytest.mark.parametrize("front", ["h1", "memory"])

THEIRS = [(b"Server", b"theirs"), (b"Date", b"their own")]
COOKIE = SessionCookie.of("gw_split", path="/", secure=True, http_only=True, same_site="lax", max_age_s=60)


def routed(cell: Cell, *routes: tuple[dict[str, Any], Route], world: World | None = None) -> World:
    world = world or World(*cell)
    world.reload(routes=RouteTable([(Match.of(**match), route) for match, route in routes]))
    return world


def answering(front: str, made: Redirect | Respond, **more: Any) -> World:
    world = World(front)
    world.route_by("/own", "own", answer=made.answer, **more)
    return world


def cookies(client: ClientEnd) -> list[bytes]:
    return [value for name, value in client.headers if name == b"set-cookie"]


@cells
class TestChanges:
    def test_of_the_request(self, cell: Cell) -> None:
        world = World(*cell)
        world.route_by(
            "/api",
            rewrite=Rewrite(host="inner.example", strip_prefix="/api", add_prefix="/v2"),
            edits=HeaderEdits(set={"X-Set": "new"}, add={"X-Add": "b"}, remove=["X-Gone"]),
        )
        fields = ((b"X-Set", b"old"), (b"X-Add", b"a"), (b"X-Gone", b"1"), (b"X-Stays", b"1"))
        client = asked(world, path=b"/api/a%2Fb?x=/api", headers=fields)
        work = world.work
        assert (work.path, work.host) == (b"/v2/a%2Fb?x=/api", b"inner.example")
        assert [value for name, value in work.headers if name == b"x-set"] == [b"new"]
        assert [value for name, value in work.headers if name == b"x-add"] == [b"a", b"b"]
        assert work.header(b"x-gone") is None
        assert work.header(b"x-stays") == b"1"
        assert work.header(b"x-forwarded-host") == b"a.example", "what the client asked for"
        assert work.header(b"x-request-id") == world.exchanges[0].request_id
        world.work.ok()
        assert client.status == 200
        world.check_quiet(1)

    def test_of_the_response(self, cell: Cell) -> None:
        """Also of what the gateway adds by itself."""
        world = World(*cell, alt_svc='h3=":443"')
        edits = HeaderEdits(
            set={"Server": "mine", "Date": "then", "X-Set": "1"},
            add={"X-Add": "b"},
            remove=["Via", "X-Gone", "Alt-Svc"],
        )
        world.route_by(response_edits=edits)
        for _ in range(2):
            client = asked(world)
            world.work.reply(
                200,
                headers=[
                    (b"Server", b"theirs"),
                    (b"X-Gone", b"1"),
                    (b"X-Add", b"a"),
                    (b"Set-Cookie", b"s=1"),
                ],
                length=0,
                end=True,
            )
            got = client.headers
            assert [value for name, value in got if name == b"server"] == [b"mine"]
            assert [value for name, value in got if name == b"date"] == [b"then"]
            assert [value for name, value in got if name == b"x-add"] == [b"a", b"b"]
            assert client.header(b"x-set") == b"1"
            assert cookies(client) == [b"s=1"]
            assert all(client.header(name) is None for name in (b"via", b"x-gone", b"alt-svc"))
        world.check_quiet(2)

    def test_of_an_upgrade(self, cell: Cell) -> None:
        world = World(*cell)
        world.route_by(
            "/ws",
            rewrite=Rewrite(path="/chat"),
            edits=HeaderEdits(set={"x-set": "1"}),
            response_edits=HeaderEdits(set={"x-back": "1"}),
        )
        client = world.client()
        client.request(path=b"/ws", upgrade=True)
        assert (world.work.path, world.work.header(b"x-set")) == (b"/chat", b"1")
        world.work.accept()
        assert client.header(b"x-back") == b"1"
        client.vanish()
        world.check_quiet(1)

    def test_each_attempt_gets_the_same(self, cell: Cell) -> None:
        world = World(*cell, backends=2)
        world.route_by(
            retry=RetryPolicy(on_reset=True),
            rewrite=Rewrite(host="inner.example", add_prefix="/v2"),
            edits=HeaderEdits(set={"x-set": "1"}),
        )
        client = asked(world, path=b"/a")
        world.sides[0].work.vanish()
        first, second = world.works
        assert (second.path, second.host, second.headers) == (first.path, first.host, first.headers)
        assert second.path == b"/v2/a"
        second.ok()
        assert client.status == 200

    def test_other_routes_are_left_alone(self, cell: Cell) -> None:
        world = World(*cell)
        world.route_by(
            "/api", rewrite=Rewrite(strip_prefix="/api"), response_edits=HeaderEdits(set={"x": "1"})
        )
        client = asked(world, path=b"/apix/a")
        assert world.work.path == b"/apix/a"
        world.work.ok()
        assert client.header(b"x") is None
        client = asked(world, path=b"/api/a")
        assert world.work.path == b"/a"
        world.work.ok()
        assert client.header(b"x") == b"1"

    def test_options_star(self, cell: Cell) -> None:
        world = World(*cell)
        world.route_by("/", rewrite=Rewrite(add_prefix="/v2"))
        asked(world, b"OPTIONS", path=b"*")
        assert world.work.path == b"*"


@cells
class TestWhoIsAsked:
    def test_the_most_specific(self, cell: Cell) -> None:
        world = World(*cell)
        pools = {name: world.add_pool(name, [name]) for name in ("one", "two", "three")}
        routed(
            cell,
            ({"path_prefix": "/"}, world.route("all", target=pools["one"])),
            ({"path_prefix": "/a"}, world.route("a", target=pools["two"])),
            ({"path_prefix": "/a", "method": "POST"}, world.route("post", target=pools["three"])),
            world=world,
        )
        for method, path, name in (
            (b"GET", b"/b", "one"),
            (b"GET", b"/a/x", "two"),
            (b"GET", b"/%61/x", "two"),
            (b"GET", b"/b/../a", "two"),
            (b"POST", b"/a", "three"),
        ):
            client = asked(world, method, path=path, length=0)
            side = world.side_of(name)
            assert side.backend.in_flight == 1, path
            assert side.work.path == path, "byte for byte"
            side.work.ok()
            assert client.status == 200
        assert {name: world.recorded_by(name) for name in ("all", "a", "post")} == {
            "all": 1,
            "a": 3,
            "post": 1,
        }
        world.check_quiet(5)

    def test_the_default(self, cell: Cell) -> None:
        world = World(*cell)
        target = world.add_pool("other", ["x0"])
        world.route_by("/a", target=target)
        client = asked(world, path=b"/b")
        world.side_of("b0").work.ok()
        assert client.status == 200
        assert (world.recorded_by("default"), world.recorded_by("r")) == (1, 0)

    def test_nobody(self, cell: Cell) -> None:
        world = World(*cell)
        world.route_by("/a")
        world.default_to(None)
        client = asked(world, b"POST", path=b"/b", length=2, end=False)
        world.check_refused(client, Reason.NO_ROUTE, 404, "destination_not_found")
        assert world.side.dials == 0
        assert world.recorded_by("default") == 1
        world.check_quiet(1)

    def test_a_bad_path_is_no_route_at_all(self, cell: Cell) -> None:
        world = World(*cell)
        world.route_by("/", answer=Respond(200, "hello").answer)
        for path in (b"/..", b"/%zz"):
            assert asked(world, path=path).status == 400
        assert world.counters.errors == {"bad_path": 2}

    def test_after_a_reload(self, cell: Cell) -> None:
        """An exchange keeps the routes it began with."""
        world = World(*cell)
        world.route_by("/", name="old", response_edits=HeaderEdits(set={"x-by": "old"}))
        client = asked(world)
        world.route_by("/", name="new", response_edits=HeaderEdits(set={"x-by": "new"}))
        late = asked(world)
        for work in world.works:
            work.ok()
        assert (client.header(b"x-by"), late.header(b"x-by")) == (b"old", b"new")
        assert (world.recorded_by("old"), world.recorded_by("new")) == (1, 1)


@cells
class TestTimesAndRetries:
    def test_its_own_timeouts(self, cell: Cell) -> None:
        world = World(*cell)
        world.route_by("/a", timeouts=Timeouts(header=10, body=30, total=0, head=5, idle=75))
        quick, slow = asked(world, path=b"/a"), asked(world, path=b"/b")
        world.advance(6)
        assert (quick.status, slow.status) == (504, 0)
        assert world.counters.errors == {"head_timeout": 1}
        world.advance(35)
        assert slow.status == 504

    def test_its_own_total_and_body(self, cell: Cell) -> None:
        world = World(*cell)
        world.route_by("/a", timeouts=Timeouts(header=10, body=4, total=8, head=50, idle=75))
        total = asked(world, path=b"/a")
        stalled = asked(world, b"POST", path=b"/a", length=4, end=False)
        world.advance(5)
        assert (total.status, stalled.status) == (0, 408)
        world.advance(4)
        assert total.status == 504
        assert world.counters.errors == {"slow_body": 1, "total_timeout": 1}

    def test_its_own_retries_instead_of_the_pools(self, cell: Cell) -> None:
        use = PoolUse(retry=RetryPolicy(on_reset=True))
        world = World(*cell, backends=3, use=use)
        world.route_by("/a", retry=RetryPolicy(attempts=2, on_connect=False, statuses=SERVER_ERRORS))
        client = asked(world, path=b"/a")
        world.sides[0].work.vanish()
        assert client.status == 502, "the pool's own retries were used"
        client = asked(world, path=b"/a")
        world.sides[1].work.reply(500, end=True)
        world.sides[2].work.ok()
        assert client.status == 200
        world.check_quiet(2)
        world = World(*cell, backends=3, use=use)
        world.route_by("/a", retry=RetryPolicy(attempts=2, on_connect=False))
        for side in world.sides:
            side.fault = Fault.REFUSED
        assert asked(world, path=b"/a").header(b"x-gateway-attempts") is None
        assert asked(world, path=b"/b").header(b"x-gateway-attempts") == b"3"
        world.check_quiet(2)


class TestOwnAnswers:
    @fronts
    def test_redirect(self, front: str) -> None:
        world = answering(front, Redirect("https://{host}{path}{query}", 308))
        client = asked(world, path=b"/own/a?b=c")
        assert (client.status, client.body, client.is_complete) == (308, b"", True)
        assert client.header(b"location") == b"https://a.example/own/a?b=c"
        assert client.header(b"content-length") == b"0"
        assert client.header(b"x-request-id") == world.exchanges[0].request_id
        assert client.header(b"server") == b"gw"
        assert client.header(b"date")
        assert client.header(b"proxy-status") is None, "it is no failure"
        assert world.counters.errors == {}
        assert world.side.dials == 0
        assert (world.recorded_by("own"), world.statuses()) == (1, {"3xx": 1})
        world.check_quiet(1)

    @fronts
    def test_respond(self, front: str) -> None:
        edits = HeaderEdits(set={"X-Set": "1", "Server": "mine"}, remove=["Date"])
        world = answering(front, Respond(418, "teapot"), response_edits=edits)
        client = asked(world, path=b"/own")
        assert (client.status, client.body, client.is_complete) == (418, b"teapot", True)
        assert client.header(b"content-type") == b"text/plain; charset=utf-8"
        assert client.header(b"content-length") == b"6"
        assert (client.header(b"x-set"), client.header(b"server")) == (b"1", b"mine")
        assert client.header(b"date") is None
        assert world.counters.response_bytes == 6
        world.check_quiet(1)

    @fronts
    def test_head(self, front: str) -> None:
        """RFC 9110 9.3.2: what a GET would get, without the content."""
        world = answering(front, Respond(200, "hello"))
        client = asked(world, b"HEAD", path=b"/own")
        assert (client.status, client.body, client.is_complete) == (200, b"", True)
        assert client.header(b"content-length") == b"5"
        assert world.counters.response_bytes == 0
        world.check_quiet(1)

    @fronts
    def test_head_refused(self, front: str) -> None:
        world = World(front)
        world.side.fault = Fault.REFUSED
        client = asked(world, b"HEAD")
        assert (client.status, client.body, client.is_complete) == (502, b"", True)
        assert int(client.header(b"content-length") or b"") > 0
        world.check_quiet(1)

    def test_head_on_the_wire(self) -> None:
        world = answering("h1", Respond(200, "hello"))
        client = world.h1_client()
        client.request(b"HEAD", b"/own")
        assert client.sent.endswith(b"\r\n\r\n")
        client.again()
        client.request(b"GET", b"/own")
        assert client.body == b"hello"

    @fronts
    @pytest.mark.parametrize("status", [204, 304])
    def test_without_content(self, front: str, status: int) -> None:
        world = answering(front, Respond(status))
        client = asked(world, path=b"/own")
        assert (client.status, client.body, client.is_complete) == (status, b"", True)

    @fronts
    def test_no_host_to_be_redirected_on(self, front: str) -> None:
        world = World(front)
        world.route_by("/", answer=Redirect("https://{host}/").answer)
        if front == "h1":
            client = world.h1_client()
            client.send(b"GET / HTTP/1.0\r\n\r\n")
            assert b" 400 " in client.sent.partition(b"\r\n")[0]
        else:
            assert asked(world, host=b"").status == 400
        assert world.counters.errors == {Reason.BAD_AUTHORITY.value: 1}

    @fronts
    @pytest.mark.parametrize("length", [10, None])
    @pytest.mark.parametrize(
        "made",
        [Respond(200, "hello"), Redirect("/x"), Respond(403, "no")],
        ids=["text", "redirect", "refusal"],
    )
    def test_an_upload_that_goes_on(self, front: str, length: int | None, made: Any) -> None:
        """The answer is whole, the rest is not read, and no later request can be taken for it."""
        world = answering(front, made)
        client = asked(world, b"POST", path=b"/own", length=length, end=False)
        assert client.is_complete
        assert not client.is_cut
        if front == "h1":
            assert client.is_closed
        assert world.exchanges[0].is_cut_short, "the connection must linger, or the answer may be lost"
        if front == "memory":
            client.data(b"more")
        assert world.works == []
        world.check_quiet(1)

    def test_an_upload_that_came_with_its_head(self) -> None:
        world = answering("h1", Respond(403, "no"))
        client = world.h1_client()
        client.send(
            b"POST /own HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nok" + b"GET / HTTP/1.1\r\n\r\n"
        )
        head = client.sent.partition(b"\r\n\r\n")[0]
        assert b" 403 " in head
        assert b"connection: close" in head
        assert client.is_closed
        assert client.sent.count(b"HTTP/1.1 ") == 1
        world.check_quiet(1)

    def test_the_connection_goes_on_without_one(self) -> None:
        world = answering("h1", Redirect("/x"))
        client = world.h1_client()
        for _ in range(3):
            client.request(b"GET", b"/own")
            assert client.status == 302
            assert not client.is_closed
            client.again()
        client.request(b"GET", b"/else")
        world.work.ok()
        assert client.status == 200
        world.check_quiet(4)

    @fronts
    def test_an_upgrade(self, front: str) -> None:
        world = answering(front, Respond(403, "no"))
        client = world.client()
        client.request(path=b"/own", upgrade=True)
        assert (client.status, client.body) == (403, b"no")
        world.check_quiet(1)


@cells
class TestSplit:
    def split(self, world: World, weights: dict[str, int], **how: Any) -> Split:
        pools = [(world.add_pool(name, [name]), weight) for name, weight in weights.items()]
        split = Split(pools, **how)
        world.route_by(split=split)
        return split

    def went(self, world: World, client: ClientEnd) -> str:
        side = next(side for side in world.sides if side.backend.in_flight)
        side.work.ok()
        assert client.status == 200
        return side.backend.id

    def test_by_weight(self, cell: Cell) -> None:
        world = World(*cell)
        self.split(world, {"a": 90, "b": 10, "none": 0})
        went = Counter(self.went(world, asked(world)) for _ in range(1000))
        assert set(went) == {"a", "b"}
        assert 60 <= went["b"] <= 140
        world.check_quiet(1000)

    def test_the_same_key_goes_the_same_way(self, cell: Cell) -> None:
        world = World(*cell)
        self.split(world, {"a": 1, "b": 1}, key_of=key_of("header:x-user", TrustedProxies([])))
        ways = set()
        for user in range(30):
            fields = ((b"X-User", b"%d" % user),)
            way = {self.went(world, asked(world, headers=fields)) for _ in range(3)}
            assert len(way) == 1
            ways |= way
        assert ways == {"a", "b"}
        assert len({self.went(world, asked(world)) for _ in range(40)}) == 2, "without a key chance decides"

    def test_a_cookie_is_made_for_who_has_none(self, cell: Cell) -> None:
        world = World(*cell)
        key = key_of("cookie:gw_split", TrustedProxies([]))
        self.split(world, {"a": 1, "b": 1}, key_of=key, cookie=COOKIE)
        seen = set()
        for _ in range(20):
            client = asked(world)
            way = self.went(world, client)
            (cookie,) = cookies(client)
            value, _, attributes = cookie.partition(b";")
            assert attributes == b" Path=/; Max-Age=60; Secure; HttpOnly; SameSite=Lax"
            seen.add(value)
            for _ in range(3):
                again = asked(world, headers=((b"Cookie", value),))
                assert self.went(world, again) == way
                assert cookies(again) == []
        assert len(seen) == 20
        world.check_quiet(80)

    def test_each_target_with_its_own_retries(self, cell: Cell) -> None:
        world = World(*cell)
        use = PoolUse(retry=RetryPolicy(on_reset=True))
        split = Split([(world.add_pool("a", ["a0", "a1"], use), 1)])
        world.route_by(split=split)
        client = asked(world)
        world.side_of("a0").work.vanish()
        world.side_of("a1").work.ok()
        assert client.status == 200
        assert world.side_of("b0").dials == 0

    def test_a_target_without_backends_is_a_failure(self, cell: Cell) -> None:
        """A share of the traffic never moves over to another release by itself."""
        world = World(*cell)
        world.route_by(split=Split([(world.add_pool("empty", []), 1)]))
        client = asked(world)
        world.check_refused(client, Reason.NO_BACKEND, 502, "destination_not_found")


@cells
class TestCounters:
    def test_by_the_routes_name(self, cell: Cell) -> None:
        world = World(*cell)
        routed(
            cell,
            ({"path_prefix": "/a"}, world.route("a")),
            ({"path_prefix": "/b"}, world.route("b", answer=Respond(404).answer)),
            ({"path_prefix": "/c"}, world.route("a")),
            world=world,
        )
        for path in (b"/a", b"/c", b"/d"):
            asked(world, path=path)
            world.work.ok()
        asked(world, path=b"/b")
        asked(world, path=b"/a").vanish()
        samples = {
            (sample[1][1], sample[1][3]): sample[2]
            for sample in world.counters.collect()
            if sample[0] == "http_requests"
        }
        assert samples == {
            ("a", "2xx"): 2,
            ("a", "4xx"): 1,
            ("b", "4xx"): 1,
            ("default", "2xx"): 1,
        }
        world.check_quiet(5)
