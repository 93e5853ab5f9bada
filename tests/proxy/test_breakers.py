"""Limits and the queue: how much a pool takes at once, who waits, in which order, and how waiting ends."""

from typing import Any

import pytest

from expressgateway.proxy.errors import Reason
from expressgateway.upstream.errors import Fault
from expressgateway.upstream.limits import Limits, Queue
from expressgateway.upstream.pool import PoolSettings, Standing
from expressgateway.wire.errors import PeerClosedError
from tests.proxy.ends import ClientEnd
from tests.proxy.trying import Cell, asked, cells
from tests.proxy.world import CELLS, PoolUse, World


def limited(cell: Cell = ("h1", "h1"), backends: int = 1, **limits: Any) -> World:
    return World(*cell, backends=backends, use=PoolUse.limited(**limits))


def paths(world: World) -> list[bytes]:
    """What the backends have been asked for, backend by backend."""
    return [work.path for work in world.works]


def asks(world: World, number: int) -> list[ClientEnd]:
    return [asked(world, path=b"/%d" % at) for at in range(number)]


@cells
class TestLimits:
    @pytest.mark.parametrize(
        ("limit", "backends", "room"),
        [("max_requests", 1, 2), ("max_requests", 3, 6), ("pool_max_requests", 3, 2)],
    )
    def test_requests(self, cell: Cell, limit: str, backends: int, room: int) -> None:
        world = limited(cell, backends, **{limit: 2})
        clients = asks(world, room + 2)
        assert len(world.works) == room
        assert len(world.pool.queue) == 2
        assert world.pool.load.in_flight == room
        assert set(world.pool.hits) == {limit}
        assert all(side.backend.in_flight <= 2 for side in world.sides)
        for at in range(room + 2):
            work = next(work for work in world.works if work.path == b"/%d" % at)
            work.ok(b"%d" % at)
            assert clients[at].body == b"%d" % at
        world.check_quiet(room + 2)

    @pytest.mark.parametrize("limit", ["max_connections", "pool_max_connections"])
    def test_connections(self, cell: Cell, limit: str) -> None:
        world = limited(cell, 1, **{limit: 2})
        clients = asks(world, 4)
        if cell[1] == "memory":
            assert world.pool.load.open == 1, "one connection is enough for all"
        else:
            assert world.side.dials == 2
            assert len(world.pool.queue) == 2
            assert set(world.pool.hits) == {limit}
        for at in range(4):
            next(work for work in world.works if work.path == b"/%d" % at).ok()
        assert [client.status for client in clients] == [200] * 4
        assert world.side.dials == (1 if cell[1] == "memory" else 2)
        world.check_quiet(4)

    def test_a_connection_that_is_idle_needs_no_other(self, cell: Cell) -> None:
        world = limited(cell, 1, max_connections=1)
        for _ in range(3):
            client = asked(world)
            world.work.ok()
            assert client.status == 200
        assert world.side.dials == 1
        assert world.pool.queue.waited == 0

    def test_a_backend_with_room_is_found(self, cell: Cell) -> None:
        world = limited(cell, 2, max_requests=1)
        clients = asks(world, 2)
        world.sides[1].work.ok()
        for _ in range(5):
            client = asked(world)
            world.sides[1].work.ok()
            assert client.status == 200
        assert len(world.sides[0].works) == 1
        world.sides[0].work.ok()
        assert clients[0].status == 200
        assert world.pool.queue.waited == 0

    def test_the_pools_limit_counts_those_that_are_leaving(self, cell: Cell) -> None:
        world = limited(cell, 1, pool_max_requests=1)
        old = asked(world)
        gone = world.work
        world.change("b9")
        client = asked(world)
        assert len(world.pool.queue) == 1
        gone.ok()
        assert old.status == 200
        world.side_of("b9").work.ok()
        assert client.status == 200
        world.check_quiet(2)

    def test_off(self, cell: Cell) -> None:
        world = limited(cell, 1)
        asks(world, 50)
        assert len(world.works) == 50
        assert world.pool.hits == {}


@cells
class TestTheQueue:
    def test_first_come_first_served(self, cell: Cell) -> None:
        world = limited(cell, 1, max_requests=1)
        clients = asks(world, 6)
        for at in range(6):
            assert paths(world) == [b"/%d" % each for each in range(at + 1)]
            world.work.ok()
            assert clients[at].status == 200
        assert world.pool.queue.waited == 5
        assert [exchange.flags for exchange in world.exchanges] == [[]] + [["queued"]] * 5
        world.check_quiet(6)

    def test_nobody_passes_those_who_wait(self, cell: Cell) -> None:
        """Whoever comes between the moment there is room and the turn that is given is behind the others."""
        world = limited(cell, 1, max_requests=1)
        clients = asks(world, 2)
        world.exchanges[0].on_request_abort(PeerClosedError("it left"))  # its turn is still to be given
        late = asked(world, path=b"/late")
        assert paths(world)[1:] == [b"/1"]
        world.work.ok()
        world.work.ok()
        assert paths(world)[1:] == [b"/1", b"/late"]
        assert [clients[1].status, late.status] == [200, 200]
        world.check_quiet(3)

    def test_nor_when_there_is_room_elsewhere(self, cell: Cell) -> None:
        """Room that was not given yet, after a change that made it."""
        world = limited(cell, 1, max_requests=1)
        asks(world, 3)
        world.pool.replace(
            [(side.backend.settings, side.backend.address, side.backend.id) for side in world.sides],
            PoolSettings(limits=Limits(max_requests=2)),
        )
        asked(world, path=b"/late")
        assert paths(world) == [b"/0", b"/1"]

    def test_full(self, cell: Cell) -> None:
        world = limited(cell, 1, max_requests=1, max_pending=2)
        clients = asks(world, 5)
        assert [client.status for client in clients] == [0, 0, 0, 503, 503]
        assert world.counters.errors == {Reason.SATURATED.value: 2}
        assert world.pool.queue.refused == 2
        assert world.exchanges[3].flags == ["queue_full", "saturated"]
        for _ in range(3):
            world.work.ok()
        assert world.outcomes() == {"b0": [3, 0, 0, ""]}, "no backend is to blame for a full queue"
        world.check_quiet(5)

    def test_too_long(self, cell: Cell) -> None:
        world = limited(cell, 1, max_requests=1, pending_timeout_s=2.0)
        first, second = asks(world, 2)
        world.advance(1)
        third = asked(world, path=b"/2")
        world.advance(1.5)
        world.check_refused(second, Reason.QUEUE_TIMEOUT, 503, "connection_limit_reached")
        assert third.status == 0
        world.work.ok()
        assert paths(world) == [b"/0", b"/2"]
        world.work.ok()
        assert (first.status, third.status) == (200, 200)
        assert world.pool.queue.timeouts == 1
        assert world.outcomes() == {"b0": [2, 0, 0, ""]}
        world.check_quiet(3)

    def test_who_leaves_is_forgotten(self, cell: Cell) -> None:
        world = limited(cell, 1, max_requests=1)
        clients = asks(world, 4)
        clients[1].vanish()
        clients[2].vanish()
        assert len(world.pool.queue) == 1
        world.work.ok()
        assert paths(world) == [b"/0", b"/3"]
        world.work.ok()
        world.advance(10)
        assert world.counters.errors == {"client_closed": 2}
        world.check_quiet(4)

    def test_an_upload_that_waits(self, cell: Cell) -> None:
        """One read is held; the client is paused until it is its turn."""
        world = limited(cell, 1, max_requests=1)
        asked(world)
        client = asked(world, b"POST", end=False)
        client.data(b"a")
        client.data(b"b")
        assert client.pauses == ["pause"]
        world.work.ok()
        assert client.pauses == ["pause", "resume"]
        client.data(b"c", True)
        assert (world.work.body, world.work.is_complete) == (b"abc", True)
        world.work.ok()
        assert client.status == 200
        world.check_quiet(2)

    def test_a_handshake_that_waits(self, cell: Cell) -> None:
        world = limited(cell, 1, max_requests=1)
        asked(world)
        client = world.client()
        client.request(upgrade=True)
        world.work.ok()
        world.work.accept()
        assert client.interim == [101]
        late = asked(world)
        assert late.status == 0
        client.vanish()
        world.work.ok()
        assert late.status == 200
        world.check_quiet(3)


@cells
class TestTurns:
    """What gives those who wait their turn, besides an exchange that ends."""

    @pytest.mark.parametrize("how", ["reset", "client", "cut", "refused", "timeout"])
    def test_an_exchange_that_fails(self, cell: Cell, how: str) -> None:
        world = limited(cell, 1, max_requests=1, pending_timeout_s=100)
        world.side.connects = how != "refused"
        first = asked(world)
        world.advance(5)
        second = asked(world, path=b"/second")
        if how == "reset":
            world.work.vanish()
        elif how == "client":
            first.vanish()
        elif how == "cut":
            world.work.reply(200)
            world.work.vanish()
        elif how == "timeout":
            world.advance(36)
        else:
            world.side.fault = Fault.REFUSED
            world.side.connect()
            world.settle()
            world.side.fault = None
            world.side.connect()
            world.settle()
        assert world.work.path == b"/second"
        world.work.ok()
        assert second.status == 200
        world.check_quiet(2)

    def test_a_backend_that_recovers(self, cell: Cell) -> None:
        world = limited(cell, 2, max_requests=1)
        world.pool.judge(Standing(down=frozenset({"b1"})))
        asks(world, 3)
        assert paths(world) == [b"/0"]
        world.pool.judge(Standing())
        world.settle()
        assert paths(world) == [b"/0", b"/1"]
        assert len(world.pool.queue) == 1

    def test_a_backend_that_joins(self, cell: Cell) -> None:
        world = limited(cell, 1, max_requests=1)
        asks(world, 3)
        world.change("b0", "b1")
        assert paths(world) == [b"/0", b"/1"]

    def test_a_limit_that_is_raised(self, cell: Cell) -> None:
        world = limited(cell, 1, max_requests=1)
        asks(world, 5)
        world.change("b0", limits=Limits(max_requests=3))
        assert paths(world) == [b"/0", b"/1", b"/2"]

    def test_limits_that_are_taken_away(self, cell: Cell) -> None:
        world = limited(cell, 1, max_requests=1)
        asks(world, 5)
        world.change("b0", limits=Limits())
        assert len(world.works) == 5
        assert len(world.pool.queue) == 0

    def test_a_pool_that_is_replaced(self, cell: Cell) -> None:
        """All wait for the new set; nobody is lost."""
        world = limited(cell, 1, max_requests=1)
        clients = asks(world, 4)
        old = world.work
        world.change("b8", "b9")
        new = [world.side_of("b8"), world.side_of("b9")]
        assert [len(side.works) for side in new] == [1, 1]
        for _ in range(3):
            busy_now = next(side for side in new if side.backend.in_flight)
            busy_now.work.ok()
        old.ok()
        assert [client.status for client in clients] == [200] * 4
        world.check_quiet(4)

    def test_a_pool_that_is_emptied(self, cell: Cell) -> None:
        world = limited(cell, 1, max_requests=1, pending_timeout_s=2.0)
        clients = asks(world, 2)
        world.change()
        assert asked(world).status == 502
        world.advance(3)
        assert clients[1].status == 503
        world.works[0].ok()
        assert clients[0].status == 200
        world.check_quiet(3)

    def test_a_limit_that_comes_later(self, cell: Cell) -> None:
        """Backends that were there before the limit give turns, too."""
        world = World(*cell)
        first = asked(world)
        world.change("b0", limits=Limits(max_requests=1))
        second = asked(world)
        world.work.ok()
        world.work.ok()
        assert (first.status, second.status) == (200, 200)
        world.check_quiet(2)


class TestOneConnection:
    def test_that_becomes_idle(self) -> None:
        """The exchange has ended before its connection may be used again."""
        world = limited(("h1", "h1"), 1, max_connections=1)
        first, second = asks(world, 2)
        world.work.ok()
        assert first.status == 200
        assert world.side.dials == 1
        world.work.ok()
        assert second.status == 200

    def test_that_closes(self) -> None:
        world = limited(("h1", "h1"), 1, max_connections=1)
        first, second = asks(world, 2)
        world.work.reply(200, headers=[(b"Connection", b"close")], length=0, end=True)
        assert first.status == 200
        assert world.side.dials == 2
        world.work.ok()
        assert second.status == 200
        world.check_quiet(2)


class TestMany:
    @pytest.mark.parametrize("cell", CELLS, ids=["-".join(cell) for cell in CELLS])
    def test_a_thousand_that_wait_are_served_one_by_one(self, cell: Cell) -> None:
        world = limited(cell, 1, max_requests=1, pending_timeout_s=100)
        clients = asks(world, 1001)
        for _ in range(1001):
            world.work.ok()
        assert all(client.status == 200 for client in clients)
        assert paths(world) == [b"/%d" % at for at in range(1001)]
        world.check_quiet(1001)

    def test_a_thousand_at_once(self) -> None:
        """Room for all, in one go: no call inside a call inside a call."""
        for change in (Limits(), Limits(max_requests=2000)):
            world = limited(("memory", "memory"), 1, max_requests=1)
            asks(world, 1001)
            world.change("b0", limits=change)
            assert paths(world) == [b"/%d" % at for at in range(1001)]

    @pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.OVER_CAPACITY])
    def test_a_thousand_that_fail(self, fault: Fault) -> None:
        world = limited(("memory", "h1"), 1, max_requests=1)
        world.side.connects = False
        clients = asks(world, 1001)
        world.side.connects = True
        world.side.fault = fault
        world.side.connect()
        for _ in range(20):
            world.settle() if world.pool.queue else None
        assert [client.status for client in clients].count(0) == 0
        world.check_quiet(1001)

    def test_a_thousand_whose_time_is_up(self) -> None:
        world = limited(("h1", "memory"), 1, max_requests=1, pending_timeout_s=1.0)
        clients = asks(world, 1001)
        world.advance(2)
        assert [client.status for client in clients[1:]] == [503] * 1000
        world.work.ok()
        world.check_quiet(1001)


class Waiting:
    """One who waits, and takes another with it when its time is up."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.key: bytes | None = None
        self.tried: list[Any] = []
        self.friend: Waiting | None = None
        self.lost = 0

    def on_turn(self, backend: Any) -> None:
        raise AssertionError("there is no room")

    def on_turn_lost(self) -> None:
        self.lost += 1
        if self.friend is not None:
            self.queue.leave(self.friend)


def test_who_left_because_of_another_is_not_told() -> None:
    queue = Queue()
    one, other = Waiting(queue), Waiting(queue)
    one.friend = other
    for each in (one, other):
        assert queue.join(each, Limits(max_requests=1), 0.0)
    queue.sweep(10.0)
    assert (one.lost, other.lost, queue.timeouts, len(queue)) == (1, 0, 1, 0)
