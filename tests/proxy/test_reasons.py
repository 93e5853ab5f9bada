"""Every reason for which the gateway answers by itself, with its status, ``Proxy-Status`` and counters."""

from collections.abc import Callable

import h11
import pytest

from expressgateway.proxy.errors import (
    DeadlineError,
    Reason,
    proxy_status_of,
    reason_of_backend,
    reason_of_client,
    reason_of_fault,
    status_of,
)
from expressgateway.proxy.route import RetryPolicy, Timeouts
from expressgateway.proxy.service import GrpcRules
from expressgateway.upstream.errors import Fault
from expressgateway.wire import errors
from tests.proxy.ends import ClientEnd
from tests.proxy.h1_ends import H1BackConnection, H1ClientEnd, H1Work
from tests.proxy.world import PoolUse, World

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"

PRODUCED: set[Reason] = set()


def refused(world: World, client: ClientEnd, reason: Reason) -> None:
    """The gateway's answer is whole and right."""
    world.check_refused(client, reason, status_of(reason), proxy_status_of(reason))
    world.check_quiet(1)
    PRODUCED.add(reason)


def raw(world: World, data: bytes) -> H1ClientEnd:
    """A client that h11 would not let send this: bytes in, h11 reads the answer."""
    client = world.h1_client()

    client.h11.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    client.h11.send(h11.EndOfMessage())
    client.send(data)
    return client


class TestWhatAClientDid:
    @pytest.mark.parametrize(
        ("reason", "data", "kind"),
        [
            (Reason.MALFORMED, b"GET  / HTTP/1.1\r\n\r\n", "malformed_request"),
            (Reason.SMUGGLING, GET + b"Content-Length: +1\r\n\r\n", "request_smuggling"),
            (Reason.SMUGGLING, CHUNKED + b"zz\r\n", "request_smuggling"),
            (Reason.BAD_AUTHORITY, GET + b"Host: b\r\n\r\n", "bad_authority"),
            (Reason.BAD_PATH, b"GET /%00 HTTP/1.1\r\nHost: a\r\n\r\n", "bad_path"),
            (Reason.BAD_PATH, b"GET /a/%2E%2e/../b HTTP/1.1\r\nHost: a\r\n\r\n", "bad_path"),
            (Reason.FORBIDDEN_TRAILER, CHUNKED + b"0\r\nHost: b\r\n\r\n", "forbidden_trailer"),
            (Reason.METHOD, b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", None),
            (Reason.VERSION, b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", None),
            (Reason.HEAD_TOO_LARGE, GET + b"X: y\r\n" * 300 + b"\r\n", "head_too_large"),
            (Reason.URI_TOO_LONG, b"GET /" + b"a" * 17000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", "uri_too_long"),
        ],
    )
    def test_reading_it(self, reason: Reason, data: bytes, kind: str | None) -> None:
        world = World()
        client = raw(world, data)
        refused(world, client, reason)
        assert world.counters.security == ({kind: 1} if kind else {})
        assert [entry[:2] for entry in world.log] == ([(kind, "192.0.2.1")] if kind else [])
        assert not any(work.is_complete for work in world.side.works)
        assert (client.header(b"allow") is not None) == (reason is Reason.METHOD)

    @pytest.mark.parametrize("front", ["h1", "memory"])
    def test_bad_paths_on_every_front(self, front: str) -> None:
        for path in (
            b"/..",
            b"/a/../..",
            b"/%2e%2e/x",
            b"/%",
            b"/%0",
            b"/%zz",
            b"/a%00b",
            b"/../etc/passwd?x",
        ):
            world = World(front)
            client = world.client()
            client.request(path=path)
            refused(world, client, Reason.BAD_PATH)
            assert world.side.dials == 0

    @pytest.mark.parametrize("front", ["h1", "memory"])
    def test_a_declared_body_over_the_cap(self, front: str) -> None:
        world = World(front, max_body=10)
        client = world.client()
        client.request(b"POST", length=11, end=False)
        refused(world, client, Reason.BODY_TOO_LARGE)
        assert world.side.dials == 0
        world = World(front, max_body=10)
        client = world.client()
        client.request(b"POST", length=10, end=False)
        client.data(b"0123456789", True)
        world.work.ok()
        assert client.status == 200

    @pytest.mark.parametrize("front", ["h1", "memory"])
    @pytest.mark.parametrize("back", ["h1", "memory"])
    def test_a_counted_body_over_the_cap(self, front: str, back: str) -> None:
        world = World(front, back, max_body=10)
        client = world.client()
        client.request(b"POST", end=False)
        client.data(b"01234")
        client.data(b"56789")
        assert client.status == 0
        client.data(b"!")
        refused(world, client, Reason.BODY_TOO_LARGE)
        assert world.work.is_cut
        assert not world.work.is_complete
        assert world.work.body == b"0123456789"

    def test_a_body_over_the_cap_after_the_answer_began(self) -> None:
        world = World(max_body=10)
        client = world.client()
        client.request(b"POST", end=False)
        world.work.reply(200)
        world.work.data(b"x")
        client.data(b"0123456789!")
        assert client.is_cut
        assert not client.is_complete
        assert world.work.is_cut
        assert world.counters.errors == {Reason.BODY_TOO_LARGE.value: 1}
        world.check_quiet(1)

    @pytest.mark.parametrize("front", ["h1", "memory"])
    def test_misdirected(self, front: str) -> None:
        asked: list[tuple[str | None, str]] = []

        def judge(sni: str | None, host: str) -> bool:
            asked.append((sni, host))
            return host != "a.example"

        world = World(front, sni="a.example", is_misdirected=judge)
        client = world.client()
        client.request(host=b"b.example")
        refused(world, client, Reason.MISDIRECTED)
        assert asked == [("a.example", "b.example")]
        assert world.counters.security == {"sni_fronting": 1}
        world = World(front, sni=None, is_misdirected=lambda sni, host: True)
        client = world.client()
        client.request()
        world.work.ok()
        assert client.status == 200

    def test_slow_head(self) -> None:
        world = World()
        client = world.h1_client()

        client.h11.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
        client.send(b"GET / HT")
        client.codec.fail(DeadlineError(Reason.SLOW_HEAD))
        world.settle()
        refused(world, client, Reason.SLOW_HEAD)

    def test_client_closed_is_only_counted(self) -> None:
        for front in ("h1", "memory"):
            world = World(front)
            client = world.client()
            client.request()
            client.vanish()
            assert client.status == 0
            assert world.counters.errors == {"client_closed": 1}
            assert world.statuses() == {"4xx": 1}
            world.check_quiet(1)
            assert world.side.backend.responses[4] == 0
        PRODUCED.add(Reason.CLIENT_CLOSED)

    @pytest.mark.parametrize("begun", [True, False])
    def test_slow_reader_is_never_answered(self, begun: bool) -> None:
        world = World()
        client = world.h1_client()
        client.request()
        if begun:
            world.work.reply(200)
        assert client.exchange is not None
        client.exchange.on_request_abort(DeadlineError(Reason.SLOW_READER))
        world.settle()
        assert b" 499 " not in client.sent, "499 is only logged"
        assert not client.is_complete
        assert world.counters.errors == {"slow_reader": 1}
        assert world.counters.security == {"slow_reader": 1}
        world.check_quiet(1)
        PRODUCED.add(Reason.SLOW_READER)


class TestWhatTheGatewaySays:
    def test_over_capacity(self) -> None:
        world = World("memory")
        world.sides[0].fault = Fault.OVER_CAPACITY
        client = world.client()
        client.request()
        refused(world, client, Reason.OVER_CAPACITY)

    def test_no_backend_at_all(self) -> None:
        for fault, reason in ((Fault.NO_BACKEND, Reason.NO_BACKEND), (Fault.DNS, Reason.DNS)):
            world = World(backends=0)
            world.pool.empty_fault = fault
            client = world.client()
            client.request()
            refused(world, client, reason)
            assert world.pool.unavailable == 1

    def test_backends_down(self) -> None:
        world = World(backends=2)
        for backend in world.pool.backends:
            backend.is_available = False
        client = world.client()
        client.request()
        refused(world, client, Reason.BACKENDS_DOWN)

    @pytest.mark.parametrize("front", ["h1", "memory"])
    def test_no_route(self, front: str) -> None:
        world = World(front)
        world.default_to(None)
        world.route_by("/a")
        client = world.client()
        client.request(path=b"/b")
        refused(world, client, Reason.NO_ROUTE)
        assert world.side.dials == 0
        assert world.counters.security == {}

    @pytest.mark.parametrize("front", ["h1", "memory"])
    def test_queue_timeout(self, front: str) -> None:
        world = World(front, use=PoolUse.limited(max_requests=1, pending_timeout_s=2.0))
        first, second = world.client(), world.client()
        first.request()
        second.request()
        world.advance(1.9)
        assert second.status == 0
        world.advance(0.5)
        world.check_refused(second, Reason.QUEUE_TIMEOUT, 503, "connection_limit_reached")
        PRODUCED.add(Reason.QUEUE_TIMEOUT)
        world.work.ok()
        world.check_quiet(2)

    @pytest.mark.parametrize("front", ["h1", "memory"])
    def test_queue_full(self, front: str) -> None:
        world = World(front, use=PoolUse.limited(max_requests=1, max_pending=0))
        world.client().request()
        second = world.client()
        second.request()
        world.check_refused(second, Reason.SATURATED, 503, "connection_limit_reached")
        world.work.ok()
        world.check_quiet(2)


class TestCalls:
    def test_grpc_over_http_1(self) -> None:
        world = World(grpc=GrpcRules(300, None))
        client = world.client()
        client.request(b"POST", headers=((b"content-type", b"application/grpc"),))
        refused(world, client, Reason.UNSUPPORTED_MEDIA)

    @pytest.mark.parametrize(
        ("reason", "value", "code"),
        [(Reason.BAD_DEADLINE, b"soon", b"3"), (Reason.GRPC_DEADLINE, b"1S", b"4")],
    )
    def test_deadlines(self, reason: Reason, value: bytes, code: bytes) -> None:
        world = World("memory", "memory", grpc=GrpcRules(300, None))
        client = world.client()
        fields = ((b"content-type", b"application/grpc"), (b"grpc-timeout", value))
        client.request(b"POST", headers=fields)
        world.advance(1.5)
        assert client.header(b"grpc-status") == code
        error = b"gw; error=" + proxy_status_of(reason).encode() + b"; details="
        assert (client.header(b"proxy-status") or b"").startswith(error)
        assert world.counters.errors == {reason.value: 1}
        world.check_quiet(1)
        PRODUCED.add(reason)


class TestWhatABackendDid:
    @pytest.mark.parametrize("front", ["h1", "memory"])
    @pytest.mark.parametrize("back", ["h1", "memory"])
    def test_an_attempt_that_takes_too_long(self, front: str, back: str) -> None:
        world = World(front, back, use=PoolUse(retry=RetryPolicy(attempts=2, per_try_s=2.0)))
        client = world.client()
        client.request()
        world.advance(1.9)
        assert client.status == 0
        world.advance(0.5)
        refused(world, client, Reason.TRY_TIMEOUT)
        assert world.work.is_cut or back == "memory"

    @pytest.mark.parametrize("fault", list(Fault))
    @pytest.mark.parametrize("back", ["h1", "memory"])
    def test_connecting(self, fault: Fault, back: str) -> None:
        world = World("h1", back)
        world.side.fault = fault
        client = world.client()
        client.request()
        refused(world, client, reason_of_fault(fault))
        assert world.side.backend.connect_failures == 1

    @pytest.mark.parametrize("front", ["h1", "memory"])
    @pytest.mark.parametrize("back", ["h1", "memory"])
    def test_reset_before_its_answer(self, front: str, back: str) -> None:
        world = World(front, back)
        client = world.client()
        client.request()
        world.work.vanish()
        refused(world, client, Reason.BACKEND_RESET)
        assert world.side.backend.responses == [1, 0, 0, 0, 0, 0]

    @pytest.mark.parametrize(
        ("reason", "data"),
        [
            (Reason.BACKEND_PROTOCOL, b"SSH-2.0\r\n\r\n"),
            (Reason.BACKEND_PROTOCOL, b"HTTP/1.1 200 OK\r\nContent-Length: 1, 1\r\n\r\n"),
            (Reason.BACKEND_PROTOCOL, b"HTTP/1.1 103 E\r\n\r\n" * 33),
            (Reason.BACKEND_PROTOCOL, b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\n\r\n"),
            (Reason.BACKEND_HEAD_TOO_LARGE, b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20000),
        ],
    )
    def test_a_bad_head(self, reason: Reason, data: bytes) -> None:
        world = World()
        client = world.client()
        client.request()
        connection = connection_of(world)
        connection.tell(data)
        refused(world, client, reason)
        assert world.side.idle == 0

    def test_an_upgrade_that_proves_nothing(self) -> None:
        """A client without a key relies on the gateway for the check of the accept value."""
        world = World("memory", "h1")
        client = world.client()
        client.request(upgrade=True)
        world.work.accept((b"Sec-WebSocket-Accept", b"x"))
        refused(world, client, Reason.BACKEND_UPGRADE)

    def test_a_head_cut_short(self) -> None:
        world = World()
        client = world.client()
        client.request()
        connection_of(world).tell(b"HTTP/1.1 200 O")
        world.work.vanish()
        refused(world, client, Reason.BACKEND_TRUNCATED)

    def test_a_bad_body_cuts_the_response(self) -> None:
        world = World()
        client = world.client()
        client.request()
        connection_of(world).tell(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\nzz\r\n")
        assert client.is_cut
        assert not client.is_complete
        assert world.counters.errors == {"backend_protocol": 1}
        world.check_quiet(1)

    def test_what_follows_a_response_is_never_an_answer(self) -> None:
        world = World()
        client = world.client()
        client.request()
        ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
        connection_of(world).tell(ok + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
        assert client.body == b"ok"
        assert world.side.idle == 0
        other = world.client()
        other.request()
        assert other.status == 0
        assert world.side.dials == 2


def connection_of(world: World) -> H1BackConnection:
    work = world.work
    assert isinstance(work, H1Work)
    return work.connection


LIMITS = Timeouts(header=10, body=30, total=60, head=40, idle=75)


class TestDeadlines:
    @pytest.mark.parametrize("front", ["h1", "memory"])
    @pytest.mark.parametrize("back", ["h1", "memory"])
    def test_head_timeout_runs_from_the_end_of_the_upload(self, front: str, back: str) -> None:
        world = World(front, back)
        client = world.client()
        client.request(b"POST", length=2, end=False)
        world.advance(15)
        client.data(b"ab", True)
        world.advance(39)
        assert client.status == 0
        world.advance(2)
        refused(world, client, Reason.HEAD_TIMEOUT)
        if back == "h1":
            assert world.work.is_cut

    @pytest.mark.parametrize("front", ["h1", "memory"])
    def test_total_timeout_ends_at_the_head(self, front: str) -> None:
        limits = Timeouts(header=10, body=30, total=20, head=40, idle=75)
        world = World(front, timeouts=limits)
        client = world.client()
        client.request()
        world.advance(19)
        assert client.status == 0
        world.advance(2)
        refused(world, client, Reason.TOTAL_TIMEOUT)
        world = World(front, timeouts=limits)
        client = world.client()
        client.request()
        world.work.reply(200)
        for _ in range(10):
            world.advance(15)
            world.work.data(b"x")
        world.work.finish()
        assert client.body == b"x" * 10
        world.check_quiet(1)

    def test_total_timeout_0_is_off(self) -> None:
        world = World(timeouts=Timeouts(header=10, body=30, total=0, head=1000, idle=75))
        client = world.client()
        client.request()
        world.advance(900)
        world.work.ok()
        assert client.status == 200

    def test_total_timeout_while_connecting(self) -> None:
        world = World(timeouts=Timeouts(header=10, body=30, total=20, head=40, idle=75))
        world.side.connects = False
        client = world.client()
        client.request()
        world.advance(21)
        assert world.side.cancelled == 1
        refused(world, client, Reason.TOTAL_TIMEOUT)

    @pytest.mark.parametrize("front", ["h1", "memory"])
    def test_a_stalled_upload(self, front: str) -> None:
        world = World(front)
        client = world.client()
        client.request(b"POST", length=4, end=False)
        client.data(b"a")
        world.advance(29)
        client.data(b"b")
        world.advance(29)
        assert client.status == 0
        world.advance(2)
        refused(world, client, Reason.SLOW_BODY)
        assert world.work.is_cut
        assert world.counters.security == {"slow_body": 1}

    @pytest.mark.parametrize("front", ["h1", "memory"])
    def test_a_trickling_upload(self, front: str) -> None:
        """A byte a second keeps no stall timer alive: the rate is measured over windows."""
        world = World(front, min_bps=64, window_s=5.0, timeouts=Timeouts(10, 30, 0, 40, 75))
        client = world.client()
        client.request(b"POST", end=False)
        for _ in range(4):
            world.advance(1)
            client.data(b"x")
        assert client.status == 0
        world.advance(1.5)
        refused(world, client, Reason.SLOW_BODY)
        assert world.work.is_cut

    def test_an_upload_at_the_least_rate(self) -> None:
        world = World(min_bps=64, window_s=5.0, timeouts=Timeouts(10, 30, 0, 40, 75))
        client = world.client()
        client.request(b"POST", end=False)
        for _ in range(60):
            world.advance(1)
            client.data(b"x" * 100)
        client.finish()
        world.work.ok()
        assert client.status == 200

    def test_who_is_paused_is_not_slow(self) -> None:
        world = World(min_bps=64, window_s=5.0, timeouts=Timeouts(10, 300, 0, 400, 75))
        client = world.client()
        client.request(b"POST", end=False)
        client.data(b"x" * 10)
        world.work.block()
        world.advance(60)
        assert client.status == 0
        world.work.drain()
        client.data(b"x" * 1000, True)
        world.work.ok()
        assert client.status == 200

    def test_who_waits_for_100_continue_is_not_slow(self) -> None:
        """A client that asked first sends nothing before it was told to: the backend is late, if anyone."""
        world = World(min_bps=64, window_s=5.0)
        client = world.client()
        client.request(b"POST", headers=((b"Expect", b"100-continue"),), length=1000, end=False)
        world.advance(12)
        assert "slow_body" not in world.counters.errors, "the client was blamed"
        world.work.interim(100)
        client.data(b"x" * 1000, True)
        world.work.ok()
        assert client.status == 200

    @pytest.mark.parametrize("front", ["h1", "memory"])
    def test_a_backend_that_takes_no_upload(self, front: str) -> None:
        world = World(front)
        client = world.client()
        client.request(b"POST", end=False)
        client.data(b"x")
        world.work.block()
        world.advance(31)
        refused(world, client, Reason.BODY_TIMEOUT)

    def test_a_backend_that_stalls_in_its_body(self) -> None:
        world = World()
        client = world.client()
        client.request()
        world.work.reply(200)
        world.work.data(b"x")
        world.advance(31)
        assert client.is_cut
        assert not client.is_complete
        assert world.work.is_cut
        assert world.counters.errors == {"body_timeout": 1}
        world.check_quiet(1)

    def test_a_client_that_stalls_in_the_response(self) -> None:
        world = World()
        client = world.client()
        client.request()
        world.work.reply(200)
        client.block()
        client.waiting_bytes = 70000
        for _ in range(5):
            world.advance(20)
            client.waiting_bytes -= 1
        assert world.counters.errors == {}, "bytes moved"
        world.advance(32)
        assert client.is_cut
        assert world.counters.errors == {"slow_reader": 1}
        assert world.work.is_cut
        world.check_quiet(1)

    def test_an_upgrade_that_the_backend_does_not_answer(self) -> None:
        """The handshake has no body: its deadline is the backend's, and no fault of the client."""
        for min_bps in (0, 64):
            world = World(min_bps=min_bps, timeouts=Timeouts(10, 30, 0, 40, 75))
            client = world.client()
            client.request(upgrade=True)
            world.advance(41)
            assert client.status == 504, "answered as a slow upload"
            refused(world, client, Reason.HEAD_TIMEOUT)


MAPS: list[Callable[[Reason], object]] = [status_of, proxy_status_of]


@pytest.mark.parametrize("reason", list(Reason))
def test_the_maps_are_exhaustive(reason: Reason) -> None:
    assert status_of(reason) in (400, 404, 405, 408, 413, 414, 415, 421, 431, 499, 502, 503, 504, 505)
    assert proxy_status_of(reason).replace("_", "").isalpha()


def test_every_wire_error_has_a_reason() -> None:
    def family(kind: type[errors.WireError]) -> list[type[errors.WireError]]:
        return [kind, *(each for sub in kind.__subclasses__() for each in family(sub))]

    for kind in family(errors.WireError):
        if kind is DeadlineError or kind.__module__ != errors.__name__:
            continue  # those of one version's codec, if it was imported, are made in its own way
        error = kind(8) if kind is errors.StreamResetError else kind("x")
        assert reason_of_client(error) in Reason
        assert reason_of_backend(error) in Reason
        if kind.__name__.endswith("Error") and kind not in (
            errors.WireError,
            errors.TruncatedError,
            errors.PeerClosedError,
            errors.NotOfferedError,
            errors.UnprocessedError,
            errors.StreamResetError,
        ):
            assert status_of(reason_of_client(error)) == error.status


def test_zz_every_reason_was_produced(request: pytest.FixtureRequest) -> None:
    """Runs last in this module: each reason above was seen by a client, or counted where none is."""
    if request.config.option.keyword or any("::" in arg for arg in request.config.invocation_params.args):
        pytest.skip("not the whole module was run")
    left = set(Reason) - PRODUCED
    assert not left, f"no test produces {sorted(reason.value for reason in left)}"
