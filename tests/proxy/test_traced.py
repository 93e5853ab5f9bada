"""Exchanges that are recorded: who is, what each side is told, and what is told of every way to end."""

import pytest

from expressgateway.observe.spans import ExchangeSpan
from expressgateway.proxy.rewriting import Respond, Rewrite
from expressgateway.proxy.route import MirrorRule, RetryPolicy
from expressgateway.proxy.service import GrpcRules
from expressgateway.proxy.trace_context import FLAGS, PARENT_ID, TRACE_ID, read_parent
from expressgateway.upstream.errors import Fault
from tests.proxy.ends import Work
from tests.proxy.test_tunnel import KEY, frame
from tests.proxy.trying import Cell, asked, cells
from tests.proxy.world import WALL_S, PoolUse, World

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"


def parent(flags: str = "01", trace: str = TRACE) -> tuple[tuple[bytes, bytes], ...]:
    return ((b"traceparent", f"00-{trace}-{CALLER}-{flags}".encode()),)


def told_to(work: Work) -> tuple[str, str, str]:
    """Trace, parent and flags in the one trace parent that a backend was sent."""
    (value,) = [value for name, value in work.headers if name == b"traceparent"]
    assert read_parent([value]) == value
    return value[TRACE_ID].decode(), value[PARENT_ID].decode(), value[FLAGS].decode()


def only(world: World) -> ExchangeSpan:
    (span,) = world.told()
    assert span.began_ns <= span.ended_ns == WALL_S * 10**9
    for attempt in span.attempts:
        assert span.began_ns <= attempt.began_ns <= attempt.ended_ns <= span.ended_ns
    ids = [span.span_id, *(attempt.span_id for attempt in span.attempts)]
    assert len(set(ids)) == len(ids)
    return span


@cells
class TestWhoIsRecorded:
    def test_whose_caller_was(self, cell: Cell) -> None:
        world = World(*cell, sample=0.0)
        asked(
            world, path=b"/a?secret=1", headers=(*parent(), (b"tracestate", b"a=1"), (b"User-Agent", b"me"))
        )
        trace, span, flags = told_to(world.work)
        assert world.work.header(b"tracestate") == b"a=1"
        world.work.ok()
        told = only(world)
        (attempt,) = told.attempts
        assert (told.trace_id, told.parent_id, told.flags) == (TRACE, CALLER, 1)
        assert (trace, span, flags) == (TRACE, attempt.span_id, "01")
        assert told.span_id not in (CALLER, attempt.span_id)
        assert (told.method, told.scheme, told.authority, told.path) == ("GET", "http", "a.example", "/a")
        assert (told.status, told.agent, told.client) == (200, "me", "192.0.2.1")
        assert (told.listener, told.route, told.pool, told.error) == ("test", "default", "pool", "")
        assert (told.request_bytes, told.response_bytes, told.grpc_status) == (0, 2, -1)
        assert told.request_id == world.exchanges[0].request_id.decode()
        assert (attempt.backend, attempt.status, attempt.error) == ("b0", 200, "")
        assert attempt.version == ("1.1" if cell[1] == "h1" else "2")
        world.check_quiet(1)

    def test_not_whose_caller_was_not(self, cell: Cell) -> None:
        """And the context passes as it came: no span of ours stands between."""
        world = World(*cell, sample=1.0)
        asked(world, headers=parent("00"))
        assert told_to(world.work) == (TRACE, CALLER, "00")
        world.work.ok()
        assert world.told() == []

    def test_all_new_ones_or_none(self, cell: Cell) -> None:
        world = World(*cell, sample=1.0)
        asked(world)
        trace, span, flags = told_to(world.work)
        world.work.ok()
        told = only(world)
        assert (told.trace_id, told.parent_id, told.flags, flags) == (trace, "", 1, "01")
        assert told.attempts[0].span_id == span
        world = World(*cell, sample=0.0)
        asked(world)
        assert told_to(world.work)[2] == "00"
        world.work.ok()
        assert world.told() == []

    def test_a_share_by_the_trace_id(self, cell: Cell) -> None:
        world = World(*cell, sample=0.25)
        client = world.client()
        sampled = []
        for _ in range(200):
            client = world.client()
            client.request()
            trace, _, flags = told_to(world.work)
            assert (flags == "01") == (int(trace[-14:], 16) < 2**56 // 4)
            sampled.append(flags == "01")
            world.work.ok()
        assert 40 <= sum(sampled) <= 60
        assert len(world.told()) == sum(sampled)

    def test_an_invalid_parent_begins_anew(self, cell: Cell) -> None:
        world = World(*cell, sample=1.0)
        asked(world, headers=(*parent(), *parent(), (b"tracestate", b"a=1")))
        assert told_to(world.work)[0] != TRACE
        assert world.work.header(b"tracestate") is None
        world.work.ok()
        assert only(world).parent_id == ""


@cells
class TestAttempts:
    def test_each_is_a_span_of_its_own(self, cell: Cell) -> None:
        use = PoolUse(retry=RetryPolicy(statuses=frozenset({503}), attempts=2))
        world = World(*cell, backends=2, use=use, sample=0.0)
        client = asked(world, headers=parent())
        first = next(side for side in world.sides if side.works)
        second = next(side for side in world.sides if side is not first)
        first.work.reply(503, length=0, end=True)
        second.work.ok()
        assert client.status == 200
        told = only(world)
        assert [(each.backend, each.status, each.error) for each in told.attempts] == [
            (first.backend.id, 503, ""),
            (second.backend.id, 200, ""),
        ]
        assert [told_to(side.work)[1] for side in (first, second)] == [each.span_id for each in told.attempts]
        assert list(told.decided) == ["retry_status"]

    def test_no_connection(self, cell: Cell) -> None:
        world = World(*cell, backends=2, sample=1.0)
        for side in world.sides:
            side.fault = Fault.REFUSED
        asked(world)
        told = only(world)
        assert [(each.status, each.error, each.version) for each in told.attempts] == [
            (0, "connect_refused", "")
        ] * 2
        assert (told.status, told.error) == (502, "connect_refused")

    def test_a_stale_connection(self, cell: Cell) -> None:
        world = World(*cell, sample=1.0)
        asked(world, headers=parent("00"))
        world.work.ok()
        world.side.go_stale()
        asked(world)
        world.work.ok()
        told = only(world)
        assert [(each.backend, each.status, each.error) for each in told.attempts] == [
            ("b0", 0, "backend_reset"),
            ("b0", 200, ""),
        ]
        assert told_to(world.work)[1] == told.attempts[1].span_id

    def test_an_attempt_that_takes_too_long(self, cell: Cell) -> None:
        use = PoolUse(retry=RetryPolicy(per_try_s=1.0, attempts=2, on_reset=True))
        world = World(*cell, backends=2, use=use, sample=1.0)
        asked(world)
        world.advance(1.5)
        world.advance(1.5)
        told = only(world)
        assert [each.error for each in told.attempts] == ["try_timeout", "try_timeout"]
        assert (told.status, told.error) == (504, "try_timeout")
        assert told.attempts[0].ended_ns - told.attempts[0].began_ns == pytest.approx(1e9, abs=0.5e9)

    def test_a_response_that_is_cut(self, cell: Cell) -> None:
        world = World(*cell, sample=1.0)
        asked(world)
        world.work.reply(200, length=10)
        world.work.data(b"abc")
        world.work.vanish()
        told = only(world)
        (attempt,) = told.attempts
        assert (told.status, told.error) == (200, "backend_truncated")
        assert (attempt.status, attempt.error) == (200, "backend_truncated")

    def test_a_client_that_leaves(self, cell: Cell) -> None:
        world = World(*cell, sample=1.0)
        client = asked(world)
        client.vanish()
        told = only(world)
        assert (told.status, told.error) == (499, "client_closed")
        assert [each.error for each in told.attempts] == ["client_closed"]


@cells
class TestWithoutABackend:
    def test_no_route(self, cell: Cell) -> None:
        world = World(*cell, sample=1.0)
        world.default_to(None)
        asked(world, headers=parent())
        told = only(world)
        assert (told.status, told.error, told.attempts) == (404, "no_route", ())
        assert (told.parent_id, told.pool) == (CALLER, "")

    def test_an_answer_of_the_route(self, cell: Cell) -> None:
        world = World(*cell, sample=1.0)
        world.route_by(answer=Respond(200, "made").answer)
        asked(world)
        told = only(world)
        assert (told.status, told.response_bytes, told.route, told.attempts) == (200, 4, "r", ())

    def test_a_rewrite_does_not_show(self, cell: Cell) -> None:
        world = World(*cell, sample=1.0)
        world.route_by("/a", rewrite=Rewrite(path="/b"))
        asked(world, path=b"/a")
        assert world.work.path == b"/b"
        world.work.ok()
        assert only(world).path == "/a"


@cells
def test_a_copy_is_of_the_same_trace(cell: Cell) -> None:
    world = World(*cell, sample=1.0)
    copies = world.add_pool("copies", ["m0"])
    world.route_by(mirror=MirrorRule(copies, 100))
    asked(world, headers=parent())
    copy = told_to(world.side_of("m0").work)
    world.work.ok()
    told = only(world)
    assert copy == (TRACE, told.span_id, "01")
    assert told_to(world.work) == (TRACE, told.attempts[0].span_id, "01")


@cells
def test_a_websocket_session_is_one_span(cell: Cell) -> None:
    world = World(*cell, sample=0.0)
    client = world.client()
    client.request(path=b"/ws", headers=(*KEY, *parent()), upgrade=True)
    world.work.accept()
    assert world.told() == []
    client.data(frame(1, b"hello", mask=True))  # type: ignore[arg-type]  # text
    world.advance(5)
    client.vanish()
    told = only(world)
    assert (told.status, told.parent_id) == (101, CALLER)
    assert told.request_bytes == len(frame(1, b"hello", mask=True))  # type: ignore[arg-type]  # text
    (attempt,) = told.attempts
    assert told_to(world.work) == (TRACE, attempt.span_id, "01")
    assert attempt.status == 101


class TestGrpc:
    def world(self, **more: object) -> World:
        return World("memory", "memory", grpc=GrpcRules(300, None), sample=1.0, **more)  # type: ignore[arg-type]

    def call(self, world: World) -> None:
        client = world.client()
        client.request(b"POST", b"/app.S/M", headers=((b"content-type", b"application/grpc"), *parent()))

    def test_its_status(self) -> None:
        world = self.world()
        self.call(world)
        assert told_to(world.work)[0] == TRACE
        world.work.reply(200, headers=[(b"content-type", b"application/grpc")])
        world.work.finish((b"grpc-status", b"5"))
        told = only(world)
        assert (told.status, told.grpc_status, told.parent_id) == (200, 5, CALLER)

    def test_one_that_the_gateway_gave(self) -> None:
        world = self.world()
        world.side.fault = Fault.REFUSED
        self.call(world)
        told = only(world)
        assert (told.status, told.grpc_status, told.error) == (200, 14, "connect_refused")

    def test_what_is_no_grpc(self) -> None:
        world = self.world()
        self.call(world)
        world.work.reply(404, length=0, end=True)
        told = only(world)
        assert (told.status, told.grpc_status) == (200, 12)
        assert [(each.status, each.error) for each in told.attempts] == [(404, "")]

    def test_what_is_no_call(self) -> None:
        world = self.world()
        client = world.client()
        client.request()
        world.work.ok()
        assert only(world).grpc_status == -1
