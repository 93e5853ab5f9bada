"""Attempts: what is tried again elsewhere, how often, and that nobody is left behind."""

import pytest

from expressgateway.proxy.backend_side import REPLAY_BYTES
from expressgateway.proxy.errors import Reason
from expressgateway.proxy.route import RetryPolicy, Timeouts
from expressgateway.upstream.errors import Fault
from tests.proxy.memory import MemoryBack
from tests.proxy.trying import SERVER_ERRORS, Cell, asked, busy, cells, flags, seen_once, trying
from tests.proxy.world import PoolUse, World


@cells
class TestConnect:
    def test_without_the_table_all_backends_are_asked(self, cell: Cell) -> None:
        world = trying(cell, 5)
        for side in world.sides[:4]:
            side.fault = Fault.REFUSED
        client = asked(world, b"POST")
        world.sides[4].work.ok()
        assert client.status == 200
        assert client.header(b"x-gateway-attempts") == b"5"
        assert world.pool.retries == {"connect": 4}
        assert flags(world) == ["retry_connect"]
        world.check_quiet(1)

    @pytest.mark.parametrize("attempts", [1, 2, 3])
    def test_no_more_than_the_limit(self, cell: Cell, attempts: int) -> None:
        world = trying(cell, 5, attempts=attempts)
        for side in world.sides:
            side.fault = Fault.REFUSED
        client = asked(world)
        world.check_refused(client, Reason.CONNECT_REFUSED, 502, "connection_refused")
        assert sum(side.dials for side in world.sides) == attempts
        expected = None if attempts == 1 else b"%d" % attempts
        assert client.header(b"x-gateway-attempts") == expected
        world.check_quiet(1)

    def test_not_if_it_is_not_asked_for(self, cell: Cell) -> None:
        world = trying(cell, on_connect=False)
        world.sides[0].fault = Fault.REFUSED
        client = asked(world)
        assert client.status == 502
        assert [side.dials for side in world.sides] == [1, 0, 0]
        world.check_quiet(1)

    def test_a_stale_connection_before_it_is_no_attempt(self, cell: Cell) -> None:
        """A backend that was stopped: its kept connections end, then it refuses. The other one is well."""
        world = trying(cell, 2)
        asked(world)
        world.sides[0].work.ok()
        world.sides[0].go_stale()
        world.sides[0].fault = Fault.REFUSED
        asked(world)
        world.sides[1].work.ok()
        client = asked(world)
        assert len(world.sides[1].works) == 2, "nobody asked the backend that is well"
        world.sides[1].work.ok()
        assert client.status == 200
        assert client.header(b"x-gateway-attempts") == b"3"
        assert flags(world) == ["retry_stale", "retry_connect"]
        world.check_quiet(3)

    def test_said_of_the_backend(self, cell: Cell) -> None:
        world = trying(cell, 1)
        world.side.fault = Fault.REFUSED
        asked(world)
        assert world.log == [("connect_refused", "b0", "an exchange failed: it failed")]

    def test_a_handshake_may_still_go_elsewhere(self, cell: Cell) -> None:
        world = trying(cell)
        world.sides[0].fault = Fault.REFUSED
        client = world.client()
        client.request(upgrade=True)
        world.sides[1].work.accept()
        assert client.interim == [101]
        assert client.header(b"x-gateway-attempts") == b"2"
        client.vanish()
        world.check_quiet(1)


@cells
class TestReset:
    def test_what_is_idempotent_goes_elsewhere(self, cell: Cell) -> None:
        world = trying(cell, on_reset=True)
        client = asked(world, b"PUT", length=0)
        ids = []
        for _ in range(2):
            _, work = busy(world)
            ids.append((work.header(b"x-request-id"), work.header(b"traceparent"), work.header(b"via")))
            work.vanish()
        side, work = busy(world)
        ids.append((work.header(b"x-request-id"), work.header(b"traceparent"), work.header(b"via")))
        work.ok()
        assert (client.status, client.body) == (200, b"ok")
        assert len(set(ids)) == 1, "the attempts of one request have one id"
        assert ids[0][0] == world.exchanges[0].request_id
        assert client.header(b"x-gateway-attempts") == b"3"
        assert world.pool.retries == {"reset": 2}
        seen_once(world)
        assert side.backend.responses[2] == 1
        assert sorted(side.backend.responses[0] for side in world.sides) == [0, 1, 1]
        world.check_quiet(1)

    def test_nothing_is_said_of_a_single_attempt(self, cell: Cell) -> None:
        world = trying(cell, on_reset=True)
        client = asked(world)
        busy(world)[1].ok()
        assert client.header(b"x-gateway-attempts") is None
        assert flags(world) == []

    def test_each_backend_once_then_the_failure(self, cell: Cell) -> None:
        world = trying(cell, on_reset=True)
        client = asked(world)
        for _ in range(3):
            busy(world)[1].vanish()
        world.check_refused(client, Reason.BACKEND_RESET, 502, "connection_terminated")
        assert client.header(b"x-gateway-attempts") == b"3"
        seen_once(world)
        world.check_quiet(1)

    @pytest.mark.parametrize("delivered", [True, False])
    def test_post_only_if_nobody_can_have_seen_it(self, cell: Cell, delivered: bool) -> None:
        world = trying(cell, on_reset=True)
        client = asked(world, b"POST", length=0)
        side, work = busy(world)
        side.was_delivered = delivered
        work.vanish()
        if delivered:
            world.check_refused(client, Reason.BACKEND_RESET, 502, "connection_terminated")
            assert world.pool.retries == {}
        else:
            busy(world)[1].ok()
            assert client.status == 200
        world.check_quiet(1)

    @pytest.mark.parametrize("size", [1, 10_000, REPLAY_BYTES])
    @pytest.mark.parametrize("declared", [True, False])
    def test_the_body_is_sent_again_byte_for_byte(self, cell: Cell, size: int, declared: bool) -> None:
        world = trying(cell, on_reset=True)
        body = bytes(at * 7 % 251 for at in range(size))
        client = asked(world, b"PUT", length=size if declared else None, end=False)
        half = size // 2
        for chunk in (body[:half], body[half:]):
            if chunk:
                client.data(chunk)
        if declared:
            client.finish()
        else:
            client.finish((b"x-sum", b"1"))
        for _ in range(2):
            _, work = busy(world)
            assert (work.body, work.is_complete) == (body, True)
            assert work.trailers == ([] if declared else [(b"x-sum", b"1")])
            if cell[1] == "h1":
                assert work.header(b"content-length") == (b"%d" % size if declared else None)
            work.vanish()
        _, work = busy(world)
        assert work.body == body
        work.ok()
        assert client.status == 200
        world.check_quiet(1)

    def test_a_body_that_goes_on_meanwhile(self, cell: Cell) -> None:
        """The first attempt fails in the middle of the upload, the second while it connects."""
        world = trying(cell, on_reset=True)
        client = asked(world, b"PUT", end=False)
        client.data(b"a" * 1000)
        world.sides[1].connects = False
        busy(world)[1].vanish()
        client.data(b"b" * 1000)
        assert client.pauses[-1:] == ["pause"]
        world.sides[1].fault = Fault.REFUSED
        world.sides[1].connect()
        world.settle()
        assert client.pauses[-1:] == ["resume"]
        client.data(b"c" * 1000)
        client.finish((b"x-sum", b"1"))
        work = world.sides[2].work
        assert work.body == b"a" * 1000 + b"b" * 1000 + b"c" * 1000
        assert work.trailers == [(b"x-sum", b"1")]
        work.ok()
        assert client.status == 200
        assert world.pool.retries == {"reset": 1, "connect": 1}
        world.check_quiet(1)

    def test_a_client_is_not_paused_for_a_backend_that_is_gone(self, cell: Cell) -> None:
        world = trying(cell, on_reset=True)
        client = asked(world, b"PUT", end=False)
        client.data(b"a")
        _, work = busy(world)
        work.block()
        assert client.pauses[-1:] == ["pause"]
        work.vanish()
        assert client.pauses[-1:] == ["resume"]
        client.data(b"b", True)
        _, second = busy(world)
        assert (second.body, second.is_complete) == (b"ab", True)
        second.ok()
        assert client.status == 200
        world.check_quiet(1)

    def test_a_backend_that_takes_no_more_than_what_was_held(self, cell: Cell) -> None:
        """It is full at once: the client stays paused, or nothing would bound what it sends."""
        if cell[1] == "h1":
            pytest.skip("its buffer is judged after the events at hand")
        world = trying(cell)
        world.side.connects = False
        client = asked(world, b"PUT", end=False)
        client.data(b"a")
        assert isinstance(world.side, MemoryBack)
        world.side.is_full = True
        world.side.connect()
        world.settle()
        assert client.pauses == ["pause"]
        world.work.drain()
        assert client.pauses == ["pause", "resume"]

    def test_a_longer_body_is_not_sent_again(self, cell: Cell) -> None:
        world = trying(cell, on_reset=True)
        client = asked(world, b"PUT", length=REPLAY_BYTES + 1, end=False)
        client.data(b"x" * REPLAY_BYTES)
        client.data(b"x", True)
        busy(world)[1].vanish()
        world.check_refused(client, Reason.BACKEND_RESET, 502, "connection_terminated")
        assert "body_too_long_to_retry" in flags(world)
        assert len(world.works) == 1
        world.check_quiet(1)

    @pytest.mark.parametrize("begun", ["interim", "head", "body"])
    def test_nothing_once_the_backend_has_begun(self, cell: Cell, begun: str) -> None:
        world = trying(cell, on_reset=True, statuses=SERVER_ERRORS, per_try_s=2.0)
        client = asked(world)
        _, work = busy(world)
        if begun == "interim":
            work.interim(103)
        else:
            work.reply(200)
        if begun == "body":
            work.data(b"x")
        work.vanish()
        assert len(world.works) == 1
        assert "body_too_long_to_retry" not in flags(world)
        assert client.status == (502 if begun == "interim" else 200)
        assert client.is_cut == (begun != "interim")
        world.check_quiet(1)

    def test_no_status_and_no_timeout_after_an_interim_answer(self, cell: Cell) -> None:
        world = trying(cell, statuses=SERVER_ERRORS, per_try_s=2.0)
        client = asked(world)
        busy(world)[1].interim(103)
        busy(world)[1].reply(503, end=True)
        assert client.status == 503
        assert flags(world) == []
        late = asked(world)
        busy(world)[1].interim(103)
        world.advance(3)
        assert late.status == 504
        assert len(world.works) == 2
        world.check_quiet(2)

    @pytest.mark.parametrize("delivered", [True, False])
    def test_a_handshake_is_never_sent_again(self, cell: Cell, delivered: bool) -> None:
        world = trying(cell, on_reset=True, statuses=SERVER_ERRORS)
        client = world.client()
        client.request(upgrade=True)
        side, work = busy(world)
        side.was_delivered = delivered
        work.vanish()
        assert client.status == 502
        second = world.client()
        second.request(upgrade=True)
        busy(world)[1].reply(503, end=True)
        assert second.status == 503
        assert len(world.works) == 2
        world.check_quiet(2)

    def test_stale_again_elsewhere(self, cell: Cell) -> None:
        """A reset on a kept connection is mended in place first, then elsewhere."""
        world = trying(cell, 2, on_reset=True)
        asked(world)
        busy(world)[1].ok()
        asked(world)
        busy(world)[1].ok()
        world.sides[0].go_stale()
        client = asked(world)
        side, work = busy(world)
        assert side is world.sides[0]
        work.vanish()
        side, work = busy(world)
        assert side is world.sides[1]
        work.ok()
        assert client.status == 200
        assert world.pool.retries == {"stale": 1, "reset": 1}
        world.check_quiet(3)

    def test_stale_is_not_mended_if_it_is_not_asked_for(self, cell: Cell) -> None:
        world = trying(cell, 1, on_stale=False)
        asked(world)
        busy(world)[1].ok()
        world.side.go_stale()
        client = asked(world)
        assert client.status == 502
        assert world.side.dials == 1
        world.check_quiet(2)


@cells
class TestStatus:
    @pytest.mark.parametrize("status", [500, 503, 599])
    @pytest.mark.parametrize("shape", ["whole", "begun", "empty"])
    def test_another_is_asked_and_the_answer_dropped(self, cell: Cell, status: int, shape: str) -> None:
        world = trying(cell, statuses=SERVER_ERRORS)
        client = asked(world)
        side, work = busy(world)
        if shape == "empty":
            work.reply(status, end=True)
        elif shape == "begun":
            work.reply(status)
        else:
            work.reply(status, length=4)
            work.data(b"oops", True)
        other, second = busy(world)
        assert other is not side
        if shape == "begun" and cell[1] == "memory":
            work.data(b"what nobody waits for any more")
        second.reply(200, headers=[(b"X-From", b"two")], length=2)
        second.data(b"ok", True)
        assert (client.status, client.body, client.is_complete) == (200, b"ok", True)
        assert client.header(b"x-gateway-attempts") == b"2"
        assert client.header(b"x-from") == b"two"
        assert world.pool.retries == {"status": 1}
        assert side.backend.responses == [0, 0, 0, 0, 0, 1]
        world.check_quiet(1)

    def test_single_codes(self, cell: Cell) -> None:
        world = trying(cell, statuses=frozenset({404, 503}))
        for status, is_retried in ((404, True), (503, True), (500, False), (502, False)):
            client = asked(world)
            busy(world)[1].reply(status, length=0, end=True)
            if is_retried:
                busy(world)[1].ok()
            assert client.status == (200 if is_retried else status)
        world.check_quiet(4)

    def test_the_last_answer_is_delivered_whole(self, cell: Cell) -> None:
        world = trying(cell, 2, statuses=SERVER_ERRORS)
        client = asked(world)
        busy(world)[1].reply(500, end=True)
        _, work = busy(world)
        work.reply(503, headers=[(b"Retry-After", b"7")], length=4)
        work.data(b"oops", True)
        assert (client.status, client.body, client.is_complete) == (503, b"oops", True)
        assert client.header(b"retry-after") == b"7"
        assert client.header(b"proxy-status") is None, "it is the backend's answer, not ours"
        assert client.header(b"x-gateway-attempts") == b"2"
        assert world.counters.errors == {}
        world.check_quiet(1)

    @pytest.mark.parametrize("why", ["alone", "limit", "down", "full", "budget"])
    def test_without_another_the_answer_stands(self, cell: Cell, why: str) -> None:
        world = trying(
            cell,
            1 if why == "alone" else 2,
            statuses=SERVER_ERRORS,
            attempts=1 if why == "limit" else 3,
            budget=0 if why == "budget" else None,
        )
        if why == "down":
            world.sides[1].backend.is_available = False
        if why == "full":
            world.change("b0", "b1", limits=PoolUse.limited(max_requests=1).settings.limits)
            asked(world)
        client = asked(world)
        work = (world.sides[1] if why == "full" else world.sides[0]).work
        work.reply(500)
        work.data(b"one")
        work.data(b"two", True)
        assert (client.status, client.body, client.is_complete) == (500, b"onetwo", True)
        assert client.header(b"x-gateway-attempts") is None
        assert world.pool.retries == {}
        if why == "full":
            world.sides[0].work.ok()
        world.check_quiet()
        assert ("budget_spent" in flags(world)) == (why == "budget")

    def test_post_is_never_sent_again_for_its_answer(self, cell: Cell) -> None:
        world = trying(cell, statuses=SERVER_ERRORS)
        client = asked(world, b"POST", length=0)
        busy(world)[1].reply(500, end=True)
        assert client.status == 500
        assert len(world.works) == 1

    def test_an_answer_before_the_end_of_the_upload(self, cell: Cell) -> None:
        world = trying(cell, statuses=SERVER_ERRORS)
        client = asked(world, b"PUT", length=4, end=False)
        client.data(b"ab")
        _, first = busy(world)
        first.reply(503, length=0, end=True)
        client.data(b"cd", True)
        _, second = busy(world)
        assert (second.body, second.is_complete) == (b"abcd", True)
        assert first.is_cut
        second.ok()
        assert client.status == 200
        world.check_quiet(1)


@cells
class TestPerTryTimeout:
    def test_while_it_waits_for_an_answer(self, cell: Cell) -> None:
        world = trying(cell, per_try_s=2.0)
        client = asked(world)
        first, work = busy(world)
        world.advance(2.5)
        side, second = busy(world)
        assert side is not first
        if cell[1] == "h1":
            assert work.is_cut
        world.advance(1.5)
        second.ok()
        assert client.status == 200
        assert client.header(b"x-gateway-attempts") == b"2"
        assert world.pool.retries == {"timeout": 1}
        world.check_quiet(1)

    @pytest.mark.parametrize("method", [b"GET", b"POST"])
    def test_while_it_connects(self, cell: Cell, method: bytes) -> None:
        """Nothing was sent: anything may go elsewhere, a body that is not complete included."""
        world = trying(cell, per_try_s=2.0)
        world.sides[0].connects = False
        client = asked(world, method, length=2, end=False)
        client.data(b"a")
        world.advance(2.5)
        assert world.sides[0].cancelled == 1
        client.data(b"b", True)
        work = world.sides[1].work
        assert (work.body, work.is_complete) == (b"ab", True)
        work.ok()
        assert client.status == 200
        world.check_quiet(1)

    def test_post_that_was_sent_is_given_up(self, cell: Cell) -> None:
        world = trying(cell, per_try_s=2.0)
        client = asked(world, b"POST", length=0)
        world.advance(2.5)
        world.check_refused(client, Reason.TRY_TIMEOUT, 504, "http_response_timeout")
        assert len(world.works) == 1
        world.check_quiet(1)

    def test_it_runs_from_the_end_of_the_upload(self, cell: Cell) -> None:
        world = trying(cell, per_try_s=2.0)
        client = asked(world, b"PUT", length=2, end=False)
        for _ in range(4):
            world.advance(1.5)
        client.data(b"ab", True)
        world.advance(1.5)
        assert world.pool.retries == {}
        busy(world)[1].ok()
        assert client.status == 200
        world.check_quiet(1)

    def test_it_ends_at_the_head(self, cell: Cell) -> None:
        world = trying(cell, per_try_s=2.0)
        client = asked(world)
        _, work = busy(world)
        work.reply(200)
        for _ in range(4):
            world.advance(1.5)
            work.data(b"x")
        work.finish()
        assert client.body == b"xxxx"
        assert client.is_complete

    def test_waiting_for_room_is_no_attempt(self, cell: Cell) -> None:
        use = PoolUse.limited(RetryPolicy(per_try_s=2.0), max_requests=1)
        world = World(*cell, use=use)
        asked(world, b"POST", length=0)
        world.advance(1.0)
        second = asked(world)
        world.advance(0.5)
        world.work.ok()
        assert second.status == 0
        world.advance(1.0)
        assert second.status == 0, "the time in the queue was counted in"
        world.work.ok()
        assert second.status == 200
        world.check_quiet(2)

    def test_all_attempts_together_end_with_the_total(self, cell: Cell) -> None:
        limits = Timeouts(header=10, body=30, total=5, head=40, idle=75)
        world = trying(cell, 5, per_try_s=2.0, timeouts=limits)
        client = asked(world)
        world.advance(6)
        world.check_refused(client, Reason.TOTAL_TIMEOUT, 504, "http_response_timeout")
        assert client.header(b"x-gateway-attempts") == b"3"
        world.check_quiet(1)


@cells
class TestTheClientLeaves:
    """In every state: nothing stays behind, and no attempt follows."""

    def test_while_the_second_attempt_connects(self, cell: Cell) -> None:
        world = trying(cell, on_reset=True)
        client = asked(world)
        for side in world.sides[1:]:
            side.connects = False
        busy(world)[1].vanish()
        client.vanish()
        assert sum(side.cancelled for side in world.sides) == 1
        world.advance(10)
        assert len(world.works) == 1
        world.check_quiet(1)

    def test_while_the_second_attempt_waits(self, cell: Cell) -> None:
        world = trying(cell, on_reset=True, per_try_s=2.0)
        client = asked(world)
        busy(world)[1].vanish()
        _, work = busy(world)
        client.vanish()
        if cell[1] == "h1":
            assert work.is_cut
        world.advance(10)
        assert len(world.works) == 2
        world.check_quiet(1)

    def test_after_an_answer_was_dropped(self, cell: Cell) -> None:
        world = trying(cell, statuses=SERVER_ERRORS)
        client = asked(world)
        _, first = busy(world)
        first.reply(500)
        client.vanish()
        if cell[1] == "memory":
            first.data(b"late", True)
        world.check_quiet(1)

    def test_in_the_queue(self, cell: Cell) -> None:
        world = World(*cell, use=PoolUse.limited(max_requests=1))
        asked(world)
        client = asked(world)
        client.vanish()
        assert len(world.pool.queue) == 0
        world.work.ok()
        assert len(world.works) == 1
        world.check_quiet(2)


class TestPoolsPlaces:
    """A retry takes one place and leaves one: a pool that is full can still try again."""

    @pytest.mark.parametrize("waiting", [0, 2])
    def test_with_the_pools_limit_reached(self, waiting: int) -> None:
        use = PoolUse.limited(pool_max_requests=1)
        world = World(backends=2, use=use)
        world.sides[0].connects = False
        client = asked(world)
        others = [asked(world) for _ in range(waiting)]
        assert len(world.pool.queue) == waiting
        world.sides[0].fault = Fault.REFUSED
        world.sides[0].connect()
        world.settle()
        world.sides[0].connects = True
        world.sides[0].fault = None
        world.sides[1].work.ok()
        assert client.status == 200
        assert world.pool.load.in_flight == min(waiting, 1)
        for other in others:
            busy(world)[1].ok()
            assert other.status == 200
        world.check_quiet(1 + waiting)

    def test_the_others_limit_still_holds(self) -> None:
        world = World(backends=2, use=PoolUse.limited(max_requests=1))
        first = asked(world)
        world.sides[1].fault = Fault.REFUSED
        second = asked(world)
        assert (first.status, second.status) == (0, 0)  # it waits for the one that is well
        assert len(world.sides[0].works) == 1
        world.sides[0].work.ok()
        world.settle()
        world.sides[0].work.ok()
        assert (first.status, second.status) == (200, 200)
        assert second.header(b"x-gateway-attempts") == b"2"
        world.check_quiet(2)
