"""Calls through an exchange that knows gRPC: deadlines, statuses, cancellation, and what is no call."""

import pytest

from expressgateway.proxy.errors import Reason
from expressgateway.proxy.grpc import Call
from expressgateway.proxy.grpc_status import (
    Code,
    code_of,
    code_of_http,
    code_of_value,
    encoded,
    seconds_of,
    subtype_of,
)
from expressgateway.proxy.rewriting import Redirect, Respond
from expressgateway.proxy.route import RetryPolicy, Timeouts
from expressgateway.proxy.service import GrpcRules
from expressgateway.upstream.errors import Fault
from expressgateway.upstream.pool import Standing
from expressgateway.wire.errors import StreamResetError, TruncatedError
from tests.proxy.ends import ClientEnd, FieldList, Work
from tests.proxy.memory import MemoryWork
from tests.proxy.world import PoolUse, World

GRPC = (b"content-type", b"application/grpc")
BACKS = pytest.mark.parametrize("back", ["memory", "h1"])


def message(text: bytes) -> bytes:
    return b"\0" + len(text).to_bytes(4, "big") + text


def gateway(back: str = "memory", *, most_s: int = 300, front: str = "memory", **what: object) -> World:
    return World(front, back, grpc=GrpcRules(most_s, None), **what)  # type: ignore[arg-type]


def called(
    world: World,
    *fields: tuple[bytes, bytes],
    end: bool = True,
    path: bytes = b"/app.Service/Method",
    kind: bytes = b"application/grpc",
) -> ClientEnd:
    client = world.client()
    client.request(b"POST", path, headers=((b"content-type", kind), *fields), end=end)
    return client


def answer(work: Work, text: bytes = b"hi") -> None:
    work.reply(200, headers=[GRPC])
    work.data(message(text))


def only_status(client: ClientEnd, code: Code, text: bytes = b"") -> None:
    """A response of nothing but a status."""
    assert client.status == 200
    assert client.is_complete
    assert client.body == b""
    assert client.trailers == []
    assert client.header(b"content-type") == b"application/grpc"
    assert client.header(b"grpc-status") == b"%d" % code
    assert text in (client.header(b"grpc-message") or b"")
    assert client.header(b"x-request-id")


def counted(world: World) -> dict[Code, int]:
    return {Code(number): count for number, count in enumerate(world.counters.grpc) if count}


class TestWhatIsACall:
    @pytest.mark.parametrize(
        ("value", "subtype"),
        [
            (b"application/grpc", b""),
            (b"Application/GRPC+Proto", b"+proto"),
            (b"application/grpc ; x=y", b""),
            (b"application/grpc+json;charset=utf-8", b"+json"),
            (b"application/grpc-web", b"-web"),
            (b"application/grpc-web-text+proto", b"-web-text+proto"),
            (b"application/grpc-webx", None),
            (b"application/grpcx", None),
            (b"application/json", None),
            (b"", None),
        ],
    )
    def test_by_its_content_type(self, value: bytes, subtype: bytes | None) -> None:
        assert subtype_of(value) == subtype

    def test_what_is_none_is_left_alone(self) -> None:
        world = gateway()
        client = world.client()
        client.request(headers=((b"content-type", b"application/grpc"), (b"grpc-timeout", b"junk")))
        world.work.reply(503, headers=[(b"content-type", b"text/html")], end=True)
        assert client.status == 503
        other = called(world, (b"grpc-timeout", b"junk"), kind=b"application/json")
        world.work.ok()
        assert other.status == 200
        assert counted(world) == {}
        world.check_quiet(2)

    def test_without_the_block_it_is_http(self) -> None:
        world = World("memory", "memory")
        client = called(world, (b"grpc-timeout", b"junk"))
        answer(world.work)
        world.work.finish((b"grpc-status", b"5"))
        assert client.trailers == [(b"grpc-status", b"5")]
        assert client.body == message(b"hi")
        client = called(world)
        world.work.reply(503, headers=[(b"content-type", b"text/html")], end=True)
        assert client.status == 503
        world.check_quiet(2)

    @BACKS
    def test_on_http_1_it_is_refused(self, back: str) -> None:
        world = gateway(back, front="h1")
        client = called(world)
        assert client.status == 415
        assert client.header(b"content-type") == b"text/plain; charset=utf-8"
        assert world.works == []
        assert world.counters.errors == {"unsupported_media": 1}
        world.check_quiet(1)


@BACKS
class TestPassing:
    def test_a_unary_call(self, back: str) -> None:
        world = gateway(back)
        client = called(world, (b"TE", b"trailers"), (b"x-meta-bin", b"AAE="), end=False)
        client.data(message(b"ask"), end=True)
        work = world.work
        assert work.body == message(b"ask")
        assert work.header(b"x-meta-bin") == b"AAE="
        answer(work)
        work.finish((b"grpc-status", b"0"), (b"x-end", b"1"))
        assert (client.status, client.body) == (200, message(b"hi"))
        assert client.trailers == [(b"grpc-status", b"0"), (b"x-end", b"1")]
        assert counted(world) == {Code.OK: 1}
        world.check_quiet(1)

    def test_a_status_without_a_message(self, back: str) -> None:
        world = gateway(back)
        client = called(world)
        world.work.reply(200, headers=[GRPC, (b"grpc-status", b"7"), (b"grpc-message", b"no")], end=True)
        assert client.header(b"grpc-status") == b"7"
        assert client.is_complete
        assert counted(world) == {Code.PERMISSION_DENIED: 1}
        world.check_quiet(1)

    def test_both_ways_at_once(self, back: str) -> None:
        world = gateway(back)
        client = called(world, end=False)
        work = world.work
        answer(work, b"0")
        for number in range(1, 4):
            client.data(message(b"%d" % number))
            work.data(message(b"%d" % number))
        client.finish()
        assert work.body == b"".join(message(b"%d" % number) for number in range(1, 4))
        work.finish((b"grpc-status", b"0"))
        assert client.body == b"".join(message(b"%d" % number) for number in range(4))
        world.check_quiet(1)

    def test_a_status_that_is_none(self, back: str) -> None:
        world = gateway(back)
        for value in (b"17", b"-1", b"x", b"0000", b""):
            called(world)
            answer(world.work)
            world.work.finish((b"grpc-status", value))
        called(world)
        answer(world.work)
        world.work.finish()
        assert counted(world) == {Code.UNKNOWN: 6}


class TestOurOwnAnswers:
    @pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.CONNECT_TIMEOUT, Fault.TLS, Fault.OVER_CAPACITY])
    @BACKS
    def test_connecting(self, fault: Fault, back: str) -> None:
        world = gateway(back)
        world.side.fault = fault
        client = called(world)
        only_status(client, Code.UNAVAILABLE, b"it failed")
        assert (client.header(b"proxy-status") or b"").startswith(b"gw; error=")
        assert counted(world) == {Code.UNAVAILABLE: 1}
        world.check_quiet(1)

    def test_nobody_is_there(self) -> None:
        world = gateway()
        world.change()
        only_status(called(world), Code.UNAVAILABLE, b"no backend")
        world.check_quiet(1)

    def test_all_are_down(self) -> None:
        world = gateway()
        world.pool.judge(Standing(down=frozenset({"b0"})))
        only_status(called(world), Code.UNAVAILABLE, b"backends down")

    def test_no_room(self) -> None:
        world = gateway(use=PoolUse.limited(max_requests=1, max_pending=0))
        called(world)
        only_status(called(world), Code.UNAVAILABLE, b"saturated")

    def test_no_route(self) -> None:
        world = gateway()
        world.default_to(None)
        only_status(called(world), Code.UNIMPLEMENTED, b"no route")

    def test_a_bad_path(self) -> None:
        only_status(called(gateway(), path=b"/../x"), Code.INVALID_ARGUMENT)

    @pytest.mark.parametrize(
        ("made", "code"),
        [
            (Respond(403, "no").answer, Code.PERMISSION_DENIED),
            (Redirect("https://b.example/").answer, Code.UNKNOWN),
        ],
    )
    def test_a_route_of_its_own(self, made: object, code: Code) -> None:
        world = gateway()
        world.route_by(answer=made)
        only_status(called(world), code, b"HTTP status")
        assert counted(world) == {code: 1}
        world.check_quiet(1)

    def test_too_large(self) -> None:
        world = gateway(max_body=100)
        client = called(world, end=False)
        client.data(message(bytes(200)))
        only_status(client, Code.RESOURCE_EXHAUSTED)
        assert world.work.is_cut
        world.check_quiet(1)

    def test_too_large_while_the_response_is_under_way(self) -> None:
        world = gateway(max_body=100)
        client = called(world, end=False)
        answer(world.work)
        client.data(message(bytes(200)))
        assert client.trailers[0] == (b"grpc-status", b"8")
        assert client.body == message(b"hi")
        world.check_quiet(1)

    @BACKS
    @pytest.mark.parametrize("front", ["memory"])
    def test_a_backend_that_goes_away(self, back: str, front: str) -> None:
        world = gateway(back, front=front)
        client = called(world)
        world.work.vanish()
        only_status(client, Code.UNAVAILABLE)
        client = called(world)
        answer(world.work)
        world.work.vanish()
        assert client.trailers[0] == (b"grpc-status", b"14")
        assert world.outcomes()["b0"][:2] == [1, 2]
        world.check_quiet(2)

    def test_never_in_the_middle_of_a_message(self) -> None:
        world = gateway()
        for size in range(1, len(message(b"hello"))):
            client = called(world)
            world.work.reply(200, headers=[GRPC])
            world.work.data(message(b"first") + message(b"hello")[:size])
            world.work.vanish()
            assert client.is_cut
            assert client.trailers == []
        assert isinstance(client.cut_by, TruncatedError)
        assert counted(world) == {Code.UNAVAILABLE: 9}

    def test_never_to_a_client_that_does_not_read(self) -> None:
        world = gateway()
        client = called(world)
        answer(world.work)
        client.waiting_bytes = 7
        world.work.vanish()
        assert client.is_cut

    @BACKS
    @pytest.mark.parametrize(
        ("status", "code"),
        [
            (400, Code.INTERNAL),
            (401, Code.UNAUTHENTICATED),
            (403, Code.PERMISSION_DENIED),
            (404, Code.UNIMPLEMENTED),
            (429, Code.UNAVAILABLE),
            (502, Code.UNAVAILABLE),
            (503, Code.UNAVAILABLE),
            (504, Code.UNAVAILABLE),
            (500, Code.UNKNOWN),
            (200, Code.UNKNOWN),
            (302, Code.UNKNOWN),
        ],
    )
    @pytest.mark.parametrize("has_body", [True, False])
    def test_what_is_no_grpc(self, status: int, code: Code, has_body: bool, back: str) -> None:
        world = gateway(back)
        client = called(world)
        headers: FieldList = [(b"content-type", b"text/html")]
        if has_body:
            world.work.reply(status, headers=headers, length=1000)
            world.work.data(b"<html>")
        else:
            world.work.reply(status, headers=headers, length=0, end=True)
        only_status(client, code, b"HTTP status %d" % status)
        assert counted(world) == {code: 1}
        assert world.exchanges[-1].flags == ["grpc_translated"]
        assert world.side.backend.responses[status // 100] == 1
        assert code_of_http(status) is code
        assert world.side.idle == (0 if has_body and back == "h1" else 1)
        world.check_quiet(1)

    @pytest.mark.parametrize("reason", list(Reason))
    def test_every_reason_has_a_code(self, reason: Reason) -> None:
        assert code_of(reason) is not Code.OK


class TestDeadlines:
    @pytest.mark.parametrize(
        ("value", "seconds"),
        [
            (b"1H", 3600),
            (b"2M", 120),
            (b"3S", 3),
            (b"99999999S", 99999999),
            (b"1500m", 1.5),
            (b"5u", 5e-6),
            (b"7n", 7e-9),
            (b"00000000n", 0),
        ],
    )
    def test_reading_one(self, value: bytes, seconds: float) -> None:
        assert seconds_of(value) == pytest.approx(seconds)

    @pytest.mark.parametrize(
        "value",
        [b"", b"1", b"S", b"123456789S", b"-1S", b"+1S", b" 1S", b"1s", b"1h", b"1.5S", b"1SS", b"1S\n"],
    )
    def test_a_malformed_one(self, value: bytes) -> None:
        with pytest.raises(ValueError, match="grpc-timeout"):
            seconds_of(value)
        world = gateway()
        client = called(world, (b"grpc-timeout", value), end=False)
        only_status(client, Code.INVALID_ARGUMENT)
        assert world.works == []
        assert world.counters.security == {"grpc_bad_deadline": 1}
        assert counted(world) == {Code.INVALID_ARGUMENT: 1}
        world.check_quiet(1)

    def test_more_than_one(self) -> None:
        world = gateway()
        only_status(called(world, (b"grpc-timeout", b"1S"), (b"grpc-timeout", b"1S")), Code.INVALID_ARGUMENT)

    @BACKS
    def test_it_travels(self, back: str) -> None:
        world = gateway(back, most_s=60)
        for sent, seen in ((b"60S", b"60S"), (b"59999m", b"59999m"), (b"61S", b"60S"), (b"9H", b"60S")):
            called(world, (b"x-before", b"1"), (b"grpc-timeout", sent), (b"x-after", b"2"))
            headers = [value for name, value in world.work.headers if name == b"grpc-timeout"]
            assert headers == [seen]
            answer(world.work)
            world.work.finish((b"grpc-status", b"0"))
        assert [exchange.flags for exchange in world.exchanges][1:3] == [[], ["grpc_deadline_clamped"]]
        assert world.counters.security == {"grpc_deadline_clamped": 2}
        called(world)
        assert world.work.header(b"grpc-timeout") is None

    @BACKS
    def test_over_before_the_response(self, back: str) -> None:
        world = gateway(back)
        client = called(world, (b"grpc-timeout", b"5S"), end=False)
        world.advance(4.75)
        assert client.status == 0
        world.advance(0.5)
        only_status(client, Code.DEADLINE_EXCEEDED, b"deadline")
        assert world.work.is_cut
        assert world.exchanges[-1].flags == ["grpc_deadline"]
        assert world.counters.errors == {"grpc_deadline": 1}
        assert counted(world) == {Code.DEADLINE_EXCEEDED: 1}
        assert world.outcomes() == {}, "its caller chose the time"
        assert world.log == []
        world.check_quiet(1)

    def test_over_within_the_response(self) -> None:
        world = gateway()
        client = called(world, (b"grpc-timeout", b"5S"))
        answer(world.work)
        work = world.work
        world.advance(5.25)
        assert client.body == message(b"hi")
        assert client.trailers[0] == (b"grpc-status", b"4")
        assert client.is_complete
        assert isinstance(work, MemoryWork)
        assert work.waiter is None, "the backend was not told"
        world.check_quiet(1)

    def test_over_in_the_middle_of_a_message(self) -> None:
        world = gateway()
        client = called(world, (b"grpc-timeout", b"5S"))
        world.work.reply(200, headers=[GRPC])
        world.work.data(message(b"hello")[:7])
        world.advance(5.25)
        assert client.is_cut
        assert counted(world) == {Code.DEADLINE_EXCEEDED: 1}

    def test_a_clamped_one_is_enforced(self) -> None:
        world = gateway(most_s=3)
        client = called(world, (b"grpc-timeout", b"1H"))
        world.advance(3.25)
        only_status(client, Code.DEADLINE_EXCEEDED)

    def test_over_while_connecting_and_in_the_queue(self) -> None:
        world = gateway()
        world.side.connects = False
        client = called(world, (b"grpc-timeout", b"1S"))
        world.advance(1.25)
        only_status(client, Code.DEADLINE_EXCEEDED)
        assert world.side.cancelled == 1
        world.check_quiet(1)
        world = gateway(use=PoolUse.limited(max_requests=1, max_pending=9, pending_timeout_s=60))
        called(world)
        client = called(world, (b"grpc-timeout", b"1S"))
        world.advance(1.25)
        only_status(client, Code.DEADLINE_EXCEEDED)
        assert len(world.pool.queue) == 0

    def test_it_stands_in_the_place_of_the_other_times(self) -> None:
        times = Timeouts(header=10, body=3, total=4, head=5, idle=75)
        world = gateway(timeouts=times, min_bps=100, window_s=2)
        early = called(world, (b"grpc-timeout", b"100S"), end=False)
        late = called(world, (b"grpc-timeout", b"100S"))
        streaming = called(world, (b"grpc-timeout", b"100S"), end=False)
        answer(world.work)
        world.advance(99)
        assert (early.status, late.status) == (0, 0)
        assert not streaming.is_cut
        assert not streaming.is_complete
        world.advance(1.5)
        only_status(early, Code.DEADLINE_EXCEEDED)
        only_status(late, Code.DEADLINE_EXCEEDED)
        assert streaming.trailers[0] == (b"grpc-status", b"4")
        assert world.counters.errors == {"grpc_deadline": 3}
        world.check_quiet(3)

    def test_but_not_for_a_client_that_does_not_read(self) -> None:
        world = gateway(timeouts=Timeouts(header=10, body=3, total=4, head=5, idle=75))
        client = called(world, (b"grpc-timeout", b"100S"))
        answer(world.work)
        client.block()
        world.advance(3.5)
        assert client.is_cut
        assert world.counters.errors == {"slow_reader": 1}
        assert counted(world) == {Code.CANCELLED: 1}

    def test_without_one(self) -> None:
        """Head and body times hold; the total one, and the rate, do not."""
        times = Timeouts(header=10, body=3, total=4, head=5, idle=75)
        world = gateway(timeouts=times, min_bps=100, window_s=2)
        client = called(world, end=False)
        for _ in range(6):
            client.data(message(b"x"))
            world.advance(1)
        assert client.status == 0
        assert not client.is_complete
        client.finish()
        world.advance(5.5)
        only_status(client, Code.DEADLINE_EXCEEDED)
        assert world.counters.errors == {"head_timeout": 1}
        silent = called(world)
        answer(world.work)
        world.advance(3.5)
        assert silent.trailers[0] == (b"grpc-status", b"4")
        assert world.counters.errors == {"head_timeout": 1, "body_timeout": 1}
        world.check_quiet(2)

    def test_one_attempt_may_still_be_limited(self) -> None:
        world = gateway(use=PoolUse(retry=RetryPolicy(per_try_s=2.0)))
        client = called(world, (b"grpc-timeout", b"100S"))
        world.advance(2.5)
        only_status(client, Code.DEADLINE_EXCEEDED, b"one attempt")


class TestCancellation:
    def test_by_the_client(self) -> None:
        world = gateway()
        for begun in (False, True):
            client = called(world, end=False)
            if begun:
                answer(world.work)
            work = world.work
            client.vanish()
            assert work.is_cut
        assert counted(world) == {Code.CANCELLED: 2}
        world.check_quiet(2)

    def test_who_has_cancelled_is_told_nothing(self) -> None:
        world = gateway()
        client = called(world)
        answer(world.work)
        world.exchanges[-1].on_request_abort(StreamResetError(8))
        assert client.is_cut
        assert client.trailers == []

    @pytest.mark.parametrize(
        ("code", "status"), [(8, Code.CANCELLED), (2, Code.INTERNAL), (0xB, Code.RESOURCE_EXHAUSTED)]
    )
    @pytest.mark.parametrize("begun", [False, True])
    def test_by_the_backend(self, code: int, status: Code, begun: bool) -> None:
        world = gateway()
        client = called(world)
        work = world.work
        if begun:
            answer(work)
        assert isinstance(work, MemoryWork)
        assert work.waiter is not None
        work.waiter.on_response_abort(StreamResetError(code))
        assert client.is_cut
        assert client.status == (200 if begun else 0)
        assert isinstance(client.cut_by, StreamResetError)
        assert client.cut_by.code == code
        assert counted(world) == {status: 1}
        world.check_quiet(1)


class TestFollowing:
    """Where messages end, however they are cut."""

    STREAM = message(b"") + message(b"a") + message(bytes(300)) + message(b"xyz")
    ENDS = (0, 5, 11, 316, 324)

    @pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 11, 100, 311, 324])
    def test_every_cut(self, size: int) -> None:
        call = Call(None)
        at = 0
        while at < len(self.STREAM):
            assert call.is_between_messages == (at in self.ENDS), at
            call.follow(self.STREAM[at : at + size])
            at += size
        assert call.is_between_messages

    def test_each_place(self) -> None:
        for first in range(len(self.STREAM)):
            call = Call(None)
            call.follow(self.STREAM[:first])
            assert call.is_between_messages == (first in self.ENDS), first
            call.follow(b"")
            call.follow(self.STREAM[first:])
            assert call.is_between_messages


def test_messages_are_percent_encoded() -> None:
    assert encoded("a b~") == b"a b~"
    assert encoded("100%\n\x7f\u00fc") == b"100%25%0A%7F%C3%BC"


def test_codes_as_they_are_sent() -> None:
    assert [code_of_value(b"%d" % code) for code in Code] == list(Code)
    assert len(Code) == 17


def test_an_ordinary_listener_has_ordinary_exchanges() -> None:
    world = World("memory", "memory")
    called(world)
    assert type(world.exchanges[0]).__name__ == "Exchange"
