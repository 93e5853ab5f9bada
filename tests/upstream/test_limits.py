"""What a pool takes at once: each limit, the queue before it, and the budget of retries."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from expressgateway.observe.counters import Tally
from expressgateway.upstream.backend import Backend, Load
from expressgateway.upstream.errors import Fault
from expressgateway.upstream.limits import NO_LIMIT, UNLIMITED, Budget, Limits, Queue, full
from expressgateway.upstream.pool import PoolSettings, Standing
from tests.upstream.test_pool import World, connections_of, found, settings

if TYPE_CHECKING:
    from collections.abc import Callable

LIMITS = ["max_connections", "max_requests", "pool_max_connections", "pool_max_requests"]


class Exchange:
    """Somebody who wants a backend, and waits for it if need be."""

    def __init__(self, world: World, name: str = "", key: bytes | None = None) -> None:
        self.world = world
        self.name = name
        self.key = key
        self.tried: list[Backend] = []
        self.backend: Backend | None = None
        self.calls: list[str] = []
        self.then: Callable[[], object] = lambda: None

    def begin(self) -> bool:
        """Whether it has a backend at once."""
        backend = self.world.pool.pick(self.key, self.tried)
        if backend is not None:
            self.take(backend)
        return backend is not None

    def ask(self) -> Exchange:
        if not self.begin() and not self.world.pool.wait(self):
            self.calls.append("refused")
        return self

    def take(self, backend: Backend) -> None:
        self.backend = backend
        backend.opened()
        backend.begin()

    def end(self) -> None:
        assert self.backend is not None
        self.backend.closed()
        self.backend.end()
        self.backend = None

    def on_turn(self, backend: Backend) -> None:
        self.calls.append("turn")
        self.take(backend)
        self.then()

    def on_turn_lost(self) -> None:
        self.calls.append("lost")


def limited(*ids: str, policy: str = "round_robin", **limits: Any) -> World:
    world = World(policy, table_size=251, secret=b"secret")
    world.pool.replace(found(*ids), PoolSettings(world.balancing, limits=Limits(**limits)))
    world.settle()
    return world


class TestFull:
    def backend(self) -> Backend:
        backend = Backend(settings("a"), ("127.0.0.1", 1), "a")
        for _ in range(3):
            backend.begin()
            backend.opened()
        return backend

    @pytest.mark.parametrize("limit", LIMITS)
    def test_each_limit_by_itself(self, limit: str) -> None:
        backend = self.backend()
        hits = Tally()
        assert not full(backend, backend.load, Limits(**{limit: 4}), hits)
        assert hits == {}
        assert full(backend, backend.load, Limits(**{limit: 3}), hits)
        assert full(backend, backend.load, Limits(**{limit: 2}), hits)  # a reload made it smaller
        assert hits == {limit: 2}

    @pytest.mark.parametrize("limit", LIMITS[2:])
    def test_the_pools_count_what_all_have(self, limit: str) -> None:
        backend = Backend(settings("a"), ("127.0.0.1", 1), "a")
        load = Load()
        load.in_flight = load.open = 3
        assert full(backend, load, Limits(**{limit: 3}), Tally())
        assert not full(backend, load, Limits(**{limit.removeprefix("pool_"): 3}), Tally())

    @pytest.mark.parametrize(("limit", "is_full"), [*zip(LIMITS, [False, True, False, True], strict=True)])
    def test_an_idle_connection_is_no_further_one(self, limit: str, is_full: bool) -> None:
        world = limited("a")
        (backend,) = world.pool.backends
        connections_of(backend).idle = 1
        backend.open = backend.in_flight = 3
        load = Load()
        load.in_flight = load.open = 3
        assert full(backend, load, Limits(**{limit: 3}), Tally()) == is_full

    def test_nothing_is_limited(self) -> None:
        assert UNLIMITED.is_off
        assert not full(self.backend(), Load(), UNLIMITED, Tally())
        for limit in LIMITS:
            assert not replace(UNLIMITED, **{limit: 5}).is_off
        assert Limits(max_pending=1, pending_timeout_s=1.0).is_off
        assert NO_LIMIT > 2**40


class TestPicking:
    @pytest.mark.parametrize("limit", LIMITS)
    def test_none_is_picked_beyond_it(self, limit: str) -> None:
        limits: dict[str, Any] = {limit: 2}
        world = limited("a", "b", **limits)
        exchanges = [Exchange(world) for _ in range(6)]
        started = [each.begin() for each in exchanges]
        room = 2 if limit.startswith("pool_") else 4
        assert started == [True] * room + [False] * (6 - room)
        assert list(world.pool.hits) == [limit]
        assert world.pool.why_none() is Fault.SATURATED
        exchanges[0].end()
        assert exchanges[-1].begin()
        assert not exchanges[-2].begin()

    def test_who_has_room_is_found(self) -> None:
        for policy in ("round_robin", "least_requests", "maglev"):
            world = limited(*"abc", policy=policy, max_requests=1)
            keys = [b"key"] * 3 if policy == "maglev" else [None] * 3
            picked = [Exchange(world, key=key).ask().backend for key in keys]
            assert {each.id for each in picked if each} == {"a", "b", "c"}

    def test_a_session_too(self) -> None:
        world = limited("a", "b", policy="session_affinity", max_requests=1)
        assert world.pool.sessions is not None
        world.pool.sessions.bind(b"key", world.pool.backends[0])
        one = Exchange(world)
        backend = world.pool.pick_bound(b"key")
        assert backend is world.pool.backends[0]
        one.take(backend)
        assert world.pool.pick_bound(b"key") is None

    def test_those_that_left_still_count_for_the_pool(self) -> None:
        world = limited("a", pool_max_requests=1)
        leaving = Exchange(world).ask()
        world.pool.replace(found("b"))
        waiting = Exchange(world).ask()
        assert (waiting.backend, waiting.calls) == (None, [])
        leaving.end()
        world.settle()
        assert waiting.backend is world.pool.backends[0]

    def test_why(self) -> None:
        world = limited("a", max_requests=1)
        Exchange(world).ask()
        assert world.pool.why_none() is Fault.SATURATED
        world.pool.judge(Standing(down=frozenset("a")))
        assert world.pool.why_none() is Fault.DOWN  # waiting would not help
        world.pool.replace(())
        assert world.pool.why_none() is Fault.NO_BACKEND

    def test_a_second_attempt_passes_those_who_wait(self) -> None:
        """It gives up a place for the one it takes."""
        world = limited("a", "b", pool_max_requests=2)
        one, _ = [Exchange(world).ask() for _ in range(2)]
        waiting = Exchange(world).ask()
        assert one.backend is not None
        one.tried.append(one.backend)
        assert world.pool.pick(None, one.tried) is None
        assert world.pool.pick_instead(None, one.tried) is world.pool.backends[1]
        assert world.pool.load.in_flight == 2
        assert waiting.calls == []


class TestQueue:
    def test_turns_are_given_in_order(self) -> None:
        world = limited("a", max_requests=1)
        first = Exchange(world).ask()
        waiting = [Exchange(world, name).ask() for name in "xyz"]
        assert [each.calls for each in waiting] == [[], [], []]
        assert len(world.pool.queue) == 3
        busy = first
        for each in waiting:
            busy.end()
            assert each.calls == []  # never from inside the call that made room
            world.settle()
            assert each.calls == ["turn"]
            busy = each
        assert (world.pool.queue.waited, len(world.pool.queue)) == (3, 0)

    def test_nobody_passes_those_who_wait(self) -> None:
        world = limited("a", max_requests=1)
        first = Exchange(world).ask()
        waiting = Exchange(world).ask()
        first.end()
        late = Exchange(world)
        assert not late.begin()  # the turn is not given yet, and the room is not his
        world.settle()
        assert waiting.calls == ["turn"]
        assert not late.begin()

    def test_room_for_several_is_given_at_once(self) -> None:
        world = limited("a", pool_max_requests=3)
        busy = [Exchange(world).ask() for _ in range(3)]
        waiting = [Exchange(world).ask() for _ in range(5)]
        for each in busy:
            each.end()
        assert len(world.calls) == 1  # one call for all
        world.settle()
        assert [each.calls for each in waiting] == [["turn"]] * 3 + [[]] * 2

    def test_who_ends_within_his_turn_gives_it_on(self) -> None:
        world = limited("a", max_requests=1)
        first = Exchange(world).ask()
        waiting = [Exchange(world).ask() for _ in range(3)]
        for each in waiting[:2]:
            each.then = each.end
        first.end()
        world.settle()
        assert [each.calls for each in waiting] == [["turn"]] * 3
        assert waiting[2].backend is not None

    def test_only_so_many_wait(self) -> None:
        world = limited("a", max_requests=1, max_pending=2)
        asked = [Exchange(world).ask() for _ in range(5)]
        assert [each.calls for each in asked] == [[], [], [], ["refused"], ["refused"]]
        assert (world.pool.queue.waited, world.pool.queue.refused) == (2, 2)

    def test_nobody_waits(self) -> None:
        world = limited("a", max_requests=1, max_pending=0)
        assert [Exchange(world).ask().calls for _ in range(2)] == [[], ["refused"]]

    def test_only_so_long(self) -> None:
        world = limited("a", max_requests=1, pending_timeout_s=2.0)
        Exchange(world).ask()
        early = Exchange(world).ask()
        world.now += 1.0
        late = Exchange(world).ask()
        world.pool.sweep(world.now + 0.99)
        assert (early.calls, late.calls) == ([], [])
        world.pool.sweep(world.now + 1.0)
        assert (early.calls, late.calls) == (["lost"], [])
        world.pool.sweep(world.now + 2.0)
        assert (early.calls, late.calls) == (["lost"], ["lost"])
        assert (world.pool.queue.timeouts, len(world.pool.queue)) == (2, 0)

    def test_who_leaves_gets_no_call(self) -> None:
        world = limited("a", max_requests=1)
        first = Exchange(world).ask()
        gone, stays = Exchange(world).ask(), Exchange(world).ask()
        for _ in range(2):
            world.pool.queue.leave(gone)
        first.end()
        world.settle()
        world.pool.sweep(world.now + 100)
        assert (gone.calls, stays.calls) == ([], ["turn"])

    @pytest.mark.parametrize("change", ["backend", "limits", "limit", "recovery"])
    def test_room_that_a_change_makes(self, change: str) -> None:
        world = limited("a", "b", max_requests=1)
        world.pool.judge(Standing(down=frozenset("b")))
        Exchange(world).ask()
        waiting = Exchange(world).ask()
        assert waiting.calls == []
        match change:
            case "backend":
                world.pool.replace(found("a", "b", "c"))
            case "limits":
                world.pool.replace(found("a", "b"), PoolSettings())
            case "limit":
                world.pool.replace(found("a", "b"), PoolSettings(limits=Limits(max_requests=2)))
            case _:
                world.pool.judge(Standing())
        world.settle()
        assert waiting.calls == ["turn"]

    def test_a_connection_that_becomes_idle_is_room(self) -> None:
        world = limited("a", max_connections=1)
        (backend,) = world.pool.backends
        first = Exchange(world).ask()
        waiting = Exchange(world).ask()
        backend.end()  # the exchange ends, its connection stays
        world.settle()
        assert waiting.calls == []
        connections_of(backend).idle = 1
        assert backend.on_freed is not None
        backend.on_freed()
        world.settle()
        assert waiting.calls == ["turn"]
        assert first.backend is backend

    def test_one_that_was_tried_is_not_given_as_a_turn(self) -> None:
        world = limited("a", "b", max_requests=1)
        one, other = Exchange(world).ask(), Exchange(world).ask()
        waiting = Exchange(world)
        waiting.tried = [world.pool.backends[0]]
        waiting.ask()
        one.end()
        world.settle()
        assert waiting.calls == []
        other.end()
        world.settle()
        assert waiting.backend is world.pool.backends[1]

    def test_a_pool_with_somebody_in_its_queue_is_busy(self) -> None:
        """Taken out of the configuration, it is swept until the last one was told."""
        world = limited("a", max_requests=1, pending_timeout_s=1.0)
        world.pool.backends[0].connections = None  # as on layer 4
        Exchange(world).ask()
        waiting = Exchange(world).ask()
        world.pool.replace(())
        world.settle()
        assert world.pool.is_busy
        world.pool.sweep(world.now + 1.0)
        assert waiting.calls == ["lost"]
        assert not world.pool.is_busy

    def test_of_a_queue_alone(self) -> None:
        world = World()
        queue = Queue()
        assert queue.first() is None
        one = Exchange(world)
        assert queue.join(one, Limits(max_pending=1), 0.0)
        assert queue.first() is one
        queue.leave(Exchange(world))
        assert len(queue) == 1


class TestBudget:
    def test_pays_for_its_share(self) -> None:
        budget = Budget(20)
        while budget.withdraw():
            pass
        paid = 0
        for _ in range(1000):
            budget.deposit()
            paid += budget.withdraw()
        assert 199 <= paid <= 201
        assert budget.refused == 1 + 1000 - paid

    def test_has_a_reserve(self) -> None:
        budget = Budget(1)
        assert [budget.withdraw() for _ in range(11)] == [True] * 10 + [False]

    def test_saves_no_more_than_so_much(self) -> None:
        budget = Budget(100)
        for _ in range(10_000):
            budget.deposit()
        paid = 0
        while budget.withdraw():
            paid += 1
        assert paid == Budget.MOST

    def test_of_nothing_pays_nothing(self) -> None:
        budget = Budget(0)
        budget.deposit()
        assert not budget.withdraw()
        changed = Budget(50)
        changed.set_percent(0)
        changed.deposit()
        assert not changed.withdraw()

    def test_a_reload_keeps_what_was_saved(self) -> None:
        world = World()
        world.pool.replace(found("a"), PoolSettings(budget_percent=10))
        budget = world.pool.budget
        assert budget is not None
        for _ in range(10):
            budget.withdraw()
        world.pool.replace(found("a"), PoolSettings(budget_percent=50))
        assert world.pool.budget is budget
        assert not budget.withdraw()
        for _ in range(2):
            budget.deposit()
        assert budget.withdraw()
        world.pool.replace(found("a"), PoolSettings())
        assert world.pool.budget is None
