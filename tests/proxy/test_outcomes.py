"""What attempts cost, and what the pool is told of them: the budget, and good, bad, streak and cause."""

import pytest

from expressgateway.proxy.route import Timeouts
from expressgateway.upstream.errors import Fault
from expressgateway.upstream.limits import Budget
from expressgateway.wire.errors import ContradictionError
from tests.proxy.trying import SERVER_ERRORS, Cell, asked, busy, cells, flags, trying
from tests.proxy.world import World


class TestBudget:
    def spent(self, world: World) -> World:
        """A world whose reserve is used up."""
        assert world.pool.budget is not None
        while world.pool.budget.withdraw():
            pass
        return world

    def test_a_share_of_the_traffic(self) -> None:
        world = self.spent(trying(budget=20, on_reset=True, on_stale=False))
        refused = []
        for number in range(50):
            client = asked(world)
            busy(world)[1].vanish()
            if client.status == 0:
                busy(world)[1].ok()
                assert client.status == 200
            else:
                world.exchanges[-1].flags.index("budget_spent")
                refused.append(number)
        assert len(refused) in (40, 41), "a fifth may be tried again"
        assert world.pool.retries == {"reset": 50 - len(refused)}
        assert world.counters.errors == {"backend_reset": len(refused)}
        assert world.pool.budget is not None
        assert world.pool.budget.refused == len(refused) + 1
        world.check_quiet(50)

    def test_the_reserve(self) -> None:
        world = trying(budget=1, on_reset=True, on_stale=False)
        for _ in range(int(Budget.RESERVE)):
            client = asked(world)
            busy(world)[1].vanish()
            busy(world)[1].ok()
            assert client.status == 200
        client = asked(world)
        busy(world)[1].vanish()
        assert client.status == 502

    def test_connect_and_stale_are_free(self) -> None:
        world = trying(backends=2, budget=0)
        world.sides[0].fault = Fault.REFUSED
        client = asked(world)
        world.sides[1].work.ok()
        world.sides[1].go_stale()
        world.sides[0].backend.is_available = False
        client = asked(world)
        world.sides[1].work.ok()
        assert client.status == 200
        assert world.pool.retries == {"connect": 1, "stale": 1}

    @pytest.mark.parametrize("cause", ["status", "timeout", "reset"])
    def test_everything_else_is_paid_for(self, cause: str) -> None:
        world = trying(budget=0, on_reset=True, statuses=SERVER_ERRORS, per_try_s=2.0)
        client = asked(world)
        if cause == "status":
            busy(world)[1].reply(503, end=True)
        elif cause == "reset":
            busy(world)[1].vanish()
        else:
            world.advance(2.5)
        assert client.status == {"status": 503, "timeout": 504, "reset": 502}[cause]
        assert flags(world)[0] == "budget_spent"
        assert len(world.works) == 1
        world.check_quiet(1)

    def test_nothing_is_paid_if_there_is_no_other(self) -> None:
        world = trying(backends=2, budget=1, on_reset=True, on_stale=False)
        world.sides[1].backend.is_available = False
        for _ in range(30):
            asked(world)
            busy(world)[1].vanish()
        world.sides[1].backend.is_available = True
        client = asked(world)
        busy(world)[1].vanish()
        busy(world)[1].ok()
        assert client.status == 200, "what was never tried again was paid for"


@cells
class TestOutcomes:
    """What the pool tells the supervisor of each backend: good, bad, streak, cause."""

    def test_an_answer(self, cell: Cell) -> None:
        world = trying(cell, 1)
        for status in (200, 304, 404, 500, 599):
            asked(world)
            busy(world)[1].reply(status, end=True)
        assert world.outcomes() == {"b0": [5, 0, 0, ""]}
        assert world.outcomes() == {}

    def test_5xx_if_asked(self, cell: Cell) -> None:
        world = trying(cell, 1, counts_5xx=True)
        for status in (500, 404, 503, 502):
            asked(world)
            busy(world)[1].reply(status, end=True)
        assert world.outcomes() == {"b0": [1, 3, 2, "status 502"]}

    @pytest.mark.parametrize("counts", [True, False])
    def test_an_answer_that_was_dropped(self, cell: Cell, counts: bool) -> None:
        """A backend that always fails is found out although no client hears of it."""
        world = trying(cell, 2, statuses=SERVER_ERRORS, counts_5xx=counts)
        client = asked(world)
        busy(world)[1].reply(503, end=True)
        busy(world)[1].ok()
        assert client.status == 200
        first = [0, 1, 1, "status 503"] if counts else [1, 0, 0, ""]
        assert world.outcomes() == {"b0": first, "b1": [1, 0, 0, ""]}

    @pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.CONNECT_TIMEOUT, Fault.TLS, Fault.CERTIFICATE])
    def test_connecting(self, cell: Cell, fault: Fault) -> None:
        world = trying(cell, 2)
        for side in world.sides:
            side.fault = fault
        asked(world)
        assert world.outcomes() == {"b0": [0, 1, 1, "it failed"], "b1": [0, 1, 1, "it failed"]}

    def test_our_own_lack_of_sockets_is_nobodys_failure(self, cell: Cell) -> None:
        world = trying(cell, 2)
        world.sides[0].fault = Fault.OVER_CAPACITY
        asked(world)
        assert world.outcomes() == {}

    def test_a_reset(self, cell: Cell) -> None:
        world = trying(cell, 2, on_reset=True)
        asked(world)
        busy(world)[1].vanish()
        busy(world)[1].vanish()
        outcomes = world.outcomes()
        assert [each[:3] for each in outcomes.values()] == [[0, 1, 1], [0, 1, 1]]
        assert all(each[3] for each in outcomes.values())

    def test_a_response_cut_short(self, cell: Cell) -> None:
        world = trying(cell, 1)
        asked(world)
        busy(world)[1].reply(200, length=10)
        busy(world)[1].vanish()
        assert world.outcomes()["b0"][:3] == [1, 1, 1]

    def test_timeouts(self, cell: Cell) -> None:
        world = trying(cell, 1, timeouts=Timeouts(header=10, body=30, total=0, head=4, idle=75))
        asked(world)
        world.advance(5)
        assert world.outcomes() == {"b0": [0, 1, 1, "no response head in time"]}
        world = trying(cell, 2, per_try_s=2.0)
        asked(world)
        world.advance(5)
        assert [each[:3] for each in world.outcomes().values()] == [[0, 1, 1], [0, 1, 1]]
        world = trying(cell, 1, timeouts=Timeouts(header=10, body=30, total=3, head=40, idle=75))
        asked(world)
        world.advance(5)
        assert world.outcomes()["b0"][:3] == [0, 1, 1]
        world = trying(cell, 1)
        asked(world)
        busy(world)[1].reply(200)
        world.advance(31)
        assert world.outcomes()["b0"][:3] == [1, 1, 1]

    def test_a_backend_that_takes_no_upload(self, cell: Cell) -> None:
        for limits in (Timeouts(10, 5, 0, 40, 75), Timeouts(10, 30, 5, 40, 75)):
            world = trying(cell, 1, timeouts=limits)
            client = asked(world, b"POST", end=False)
            client.data(b"x")
            world.work.block()
            world.advance(7)
            assert client.status == 504
            assert world.outcomes()["b0"][:3] == [0, 1, 1]

    def test_a_stale_connection_is_no_failure(self, cell: Cell) -> None:
        world = trying(cell, 1)
        asked(world)
        busy(world)[1].ok()
        world.side.go_stale()
        asked(world)
        busy(world)[1].ok()
        assert world.outcomes() == {"b0": [2, 0, 0, ""]}

    @pytest.mark.parametrize("state", ["connecting", "waiting", "answered"])
    def test_not_the_clients_going(self, cell: Cell, state: str) -> None:
        world = trying(cell, 1, on_reset=True, per_try_s=30)
        world.side.connects = state != "connecting"
        client = asked(world, b"PUT", end=False)
        if state == "answered":
            busy(world)[1].reply(200)
        client.vanish()
        assert world.outcomes() == ({"b0": [1, 0, 0, ""]} if state == "answered" else {})
        world.check_quiet(1)

    def test_not_the_clients_slowness(self, cell: Cell) -> None:
        world = trying(cell, 1, timeouts=Timeouts(header=10, body=30, total=20, head=40, idle=75))
        client = asked(world, b"POST", end=False)
        for _ in range(5):
            client.data(b"x")
            world.advance(4.5)
        assert client.status == 504
        assert world.outcomes() == {}, "a slow upload is no failure of the backend"
        world = trying(cell, 1)
        asked(world, b"POST", length=4, end=False)
        world.advance(31)
        assert world.outcomes() == {}
        world = trying(cell, 1)
        asked(world, b"POST", end=False)
        busy(world)[1].reply(200)
        world.advance(31)
        assert world.counters.errors == {"body_timeout": 1}
        assert world.outcomes() == {"b0": [1, 0, 0, ""]}, "each waits for the other: nobody is to blame"

    def test_not_a_client_that_does_not_read(self, cell: Cell) -> None:
        world = trying(cell, 1)
        client = asked(world)
        busy(world)[1].reply(200)
        client.block()
        client.waiting_bytes = 70000
        world.advance(32)
        assert world.counters.errors == {"slow_reader": 1}
        assert world.outcomes() == {"b0": [1, 0, 0, ""]}

    def test_not_a_body_over_the_cap(self, cell: Cell) -> None:
        world = World(*cell, max_body=10)
        client = asked(world, b"POST", end=False)
        client.data(b"x" * 11)
        assert client.status == 413
        assert world.outcomes() == {}

    def test_a_contradiction_is_the_backends(self, cell: Cell) -> None:
        world = trying(cell, 1)
        asked(world)
        busy(world)[1].reply(200, length=10)
        world.exchanges[0].on_request_abort(ContradictionError("more than it declared"))
        world.settle()
        assert world.outcomes()["b0"][:3] == [1, 1, 1]

    def test_a_streak_is_told_at_once(self, cell: Cell) -> None:
        world = trying(cell, 1, alarm=3, on_stale=False)
        alarms: list[int] = []
        world.pool.on_alarm = lambda: alarms.append(world.side.backend.streak)
        for _ in range(5):
            asked(world)
            busy(world)[1].vanish()
        assert alarms == [3]
