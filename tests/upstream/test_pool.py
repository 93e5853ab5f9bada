"""A pool's set and its walk: what stays keeps its object, what leaves finishes, nobody is asked twice."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from expressgateway.upstream.backend import Backend, BackendSettings, SocketAddress, Waiter
from expressgateway.upstream.errors import Fault
from expressgateway.upstream.pool import Pool, PoolSettings, Standing
from expressgateway.upstream.selection import POLICIES, UNKEYED, Balancing
from expressgateway.wire.sinks import ClientStream

CHANGES: list[dict[str, Any]] = [{"host": "other"}, {"protocol": "tcp"}, {"send_proxy": "v1"}]
Found = tuple[BackendSettings, SocketAddress, str]


class Connections:
    """A backend's connections that only remember what they were asked."""

    def __init__(self) -> None:
        self.sweeps: list[float] = []
        self.closed = 0
        self.open_now = 0
        self.idle = 0

    def lease(self, waiter: Waiter, fresh: bool = False) -> ClientStream | None:
        return None

    def cancel(self, waiter: Waiter) -> None:
        pass

    def sweep(self, now: float) -> None:
        self.sweeps.append(now)

    def close_idle(self) -> None:
        self.closed += 1

    @property
    def has_room(self) -> bool:
        return self.idle > 0

    @property
    def open(self) -> int:
        return self.open_now


def settings(id_: str, weight: int = 1, **more: Any) -> BackendSettings:
    base = BackendSettings(id=id_, host="h", port=1, protocol="h1", weight=weight, tls=None, send_proxy=None)
    return replace(base, **more)


def found(*ids: str, weight: int = 1) -> list[Found]:
    return [(settings(id_, weight), ("127.0.0.1", 1), id_) for id_ in ids]


class World:
    """A pool, and what surrounds it: time that stands still, and what it has to be called for later."""

    def __init__(self, policy: str = "round_robin", **balancing: Any) -> None:
        self.now = 1000.0
        self.calls: list[Callable[[], None]] = []
        self.attached: list[Backend] = []
        self.balancing = Balancing(policy, **balancing)
        self.pool = Pool("p", self._attach, self, self.calls.append)
        self.pool.replace((), PoolSettings(self.balancing))

    def _attach(self, backend: Backend) -> None:
        backend.connections = Connections()
        self.attached.append(backend)

    def turn(self) -> int:
        """Make the calls that are due; gives how many those were."""
        due = self.calls[:]
        self.calls.clear()
        for call in due:
            call()
        return len(due)

    def settle(self) -> None:
        while self.turn():
            pass

    def picks(self, count: int, key: bytes | None = None) -> list[str]:
        return [each.id for each in (self.pool.pick(key) for _ in range(count)) if each is not None]


def world_of(*ids: str, policy: str = "round_robin", **balancing: Any) -> World:
    world = World(policy, **balancing)
    world.pool.replace(found(*ids))
    world.settle()
    return world


def pool_of(*ids: str, policy: str = "round_robin") -> Pool:
    return world_of(*ids, policy=policy).pool


def connections_of(backend: Backend) -> Connections:
    assert isinstance(backend.connections, Connections)
    return backend.connections


class TestReplace:
    def test_who_stays_keeps_object_and_counters(self) -> None:
        pool = pool_of("a", "b")
        a, b = pool.backends
        a.leases = 7
        connections = a.connections
        pool.replace(found("c", "a"))
        assert [each.id for each in pool.backends] == ["c", "a"]
        assert pool.backends[1] is a
        assert a.leases == 7
        assert a.connections is connections
        assert connections_of(a).closed == 0
        assert connections_of(b).closed == 1

    def test_a_weight_is_no_new_backend(self) -> None:
        pool = pool_of("a", "b")
        before = pool.backends
        pool.replace([*found("a", weight=3), *found("b")])
        assert pool.backends == before
        assert [each.weight for each in pool.backends] == [3, 1]
        picks = [pool.pick() for _ in range(400)]
        assert picks.count(before[0]) == 300

    def test_anything_else_is(self) -> None:
        for change in CHANGES:
            pool = pool_of("a")
            old = pool.backends[0]
            pool.replace([(settings("a", **change), ("127.0.0.1", 1), "a")])
            assert pool.backends[0] is not old
            assert connections_of(old).closed == 1
        pool = pool_of("a")
        old = pool.backends[0]
        pool.replace([(settings("a"), ("127.0.0.2", 1), "a")])
        assert pool.backends[0] is not old

    def test_who_leaves_is_swept_until_it_is_done(self) -> None:
        pool = pool_of("a", "b")
        leaving = pool.backends[0]
        connections_of(leaving).open_now = 1
        pool.replace(found("b"))
        busy = [pool.is_busy]
        pool.sweep(1.0)
        assert connections_of(leaving).sweeps == [1.0]
        busy.append(pool.is_busy)
        connections_of(leaving).open_now = 0
        pool.sweep(2.0)
        busy.append(pool.is_busy)
        assert busy == [True, True, False]
        pool.sweep(3.0)
        assert connections_of(leaving).sweeps == [1.0, 2.0]
        assert connections_of(pool.backends[0]).sweeps == [1.0, 2.0, 3.0]

    def test_another_policy(self) -> None:
        pool = pool_of("a", "b")
        pool.replace(found("a", "b"), PoolSettings(Balancing("weighted_round_robin")))
        assert pool.settings.balancing.policy == "weighted_round_robin"
        assert type(pool.selection).__name__ == "WeightedRoundRobin"

    def test_to_nothing_and_back(self) -> None:
        pool = pool_of("a")
        pool.replace([])
        assert pool.pick() is None
        pool.replace(found("a"))
        assert pool.pick() is pool.backends[0]

    def test_close_idle_reaches_everyone(self) -> None:
        pool = pool_of("a", "b")
        leaving, staying = pool.backends
        connections_of(leaving).open_now = 1
        pool.replace(found("b"))
        pool.close_idle()
        assert connections_of(leaving).closed == 2
        assert connections_of(staying).closed == 1


class TestPick:
    def test_in_turn_and_counted(self) -> None:
        pool = pool_of("a", "b", "c")
        assert [each.id for each in (pool.pick() for _ in range(4)) if each] == ["a", "b", "c", "a"]
        assert (pool.picks, pool.unavailable) == (4, 0)

    def test_who_was_tried_is_not_asked_again(self) -> None:
        for policy in ("round_robin", "weighted_round_robin"):
            pool = pool_of("a", "b", "c", policy=policy)
            tried: list[Backend] = []
            for _ in range(3):
                picked = pool.pick(None, tried)
                assert picked is not None
                assert picked not in tried
                tried.append(picked)
            assert pool.pick(None, tried) is None
            assert pool.unavailable == 1

    def test_who_is_unavailable_is_passed_over(self) -> None:
        pool = pool_of("a", "b", "c")
        pool.backends[1].is_available = False
        assert {each.id for each in (pool.pick() for _ in range(9)) if each} == {"a", "c"}
        for each in pool.backends:
            each.is_available = False
        assert pool.pick() is None

    def test_the_share_of_one_that_is_down_is_spread(self) -> None:
        """Or its neighbour carries two shares, and is the next to fall."""
        for policy in ("round_robin", "weighted_round_robin"):
            pool = pool_of(*"abcde", policy=policy)
            pool.backends[4].is_available = False
            picks = [pool.pick() for _ in range(1000)]
            most = max(picks.count(each) for each in pool.backends)
            assert most <= 350, f"{policy}: one of four got {most} of 1000"

    def test_weight_zero_gets_nothing(self) -> None:
        pool = pool_of("a", "b")
        pool.replace([*found("a", weight=0), *found("b")])
        assert {each.id for each in (pool.pick() for _ in range(9)) if each} == {"b"}

    def test_all_weights_zero(self) -> None:
        for policy in POLICIES:
            world = world_of("a", "b", policy=policy, **SMALL)
            world.pool.replace(found("a", "b", weight=0))
            world.settle()
            assert world.picks(5) == world.picks(5, b"key") == [], policy
            assert world.pool.why_none() is Fault.DOWN


SMALL: dict[str, Any] = {"table_size": 251, "secret": b"secret"}


@pytest.mark.usefixtures("ordered")
class TestHooks:
    """A policy that goes by load hears of every change, and of none once it is not used any more."""

    def test_another_policy_does_not_hear(self) -> None:
        world = world_of("a", "b", policy="least_requests")
        a = world.pool.backends[0]
        assert all(each.on_load is not None for each in world.pool.backends)
        world.pool.replace(found("a", "b"), PoolSettings(Balancing("round_robin")))
        assert [each.on_load for each in world.pool.backends] == [None, None]
        a.begin()
        a.end()

    def test_nor_does_one_for_whom_a_backend_has_left_or_has_no_weight(self) -> None:
        world = world_of("a", "b", "c", policy="least_requests")
        a, b, c = world.pool.backends
        a.begin()
        world.pool.replace([*found("b", weight=0), *found("c")])
        assert (a.on_load, b.on_load) == (None, None)
        a.end()
        b.begin()
        b.end()
        assert c.on_load is not None
        c.begin()
        assert world.picks(1) == ["c"]

    def test_whatever_policy_left_it_there(self) -> None:
        """Somebody else's may forget to take its hook away."""
        world = world_of("a", "b")
        a, b = world.pool.backends
        heard: list[Backend] = []
        a.on_load = b.on_load = heard.append
        for each in (a, b, b):
            each.begin()
        world.pool.replace(found("b"))
        a.end()
        b.end()
        assert heard == [b]  # the policy is still the same for this one
        world.pool.replace(found("b"), PoolSettings(Balancing("random")))
        b.end()
        assert heard == [b]

    def test_a_policy_that_stays_goes_on_by_what_is_under_way(self) -> None:
        world = world_of("a", "b", policy="least_requests")
        world.pool.backends[0].begin()
        world.pool.replace(found("c", "a"))
        for _ in range(2):
            assert world.picks(8) == ["c"] * 8
            world.pool.judge(Standing())

    def test_what_leaves_is_still_counted_with_the_pool(self) -> None:
        world = world_of("a", "b")
        a = world.pool.backends[0]
        a.begin()
        a.opened()
        world.pool.replace(found("b"))
        assert (world.pool.load.in_flight, world.pool.load.open) == (1, 1)
        a.closed()
        a.end()
        assert (world.pool.load.in_flight, world.pool.load.open) == (0, 0)


class TestStanding:
    """The supervisor's word."""

    def test_down_and_draining_get_no_new_work(self) -> None:
        world = world_of("a", "b", "c")
        world.pool.judge(Standing(down=frozenset("a"), draining=frozenset("b")))
        assert set(world.picks(20)) == {"c"}
        assert [each.is_available for each in world.pool.backends] == [False, False, True]
        assert [each.is_down for each in world.pool.backends] == [True, False, False]
        assert [each.is_draining for each in world.pool.backends] == [False, True, False]
        world.pool.judge(Standing())
        assert set(world.picks(3)) == {"a", "b", "c"}

    def test_down_prevails(self) -> None:
        world = world_of("a")
        world.pool.judge(Standing(down=frozenset("a"), draining=frozenset("a")))
        (a,) = world.pool.backends
        assert (a.is_down, a.is_draining) == (True, False)

    def test_all_down(self) -> None:
        world = world_of("a", "b")
        world.pool.judge(Standing(down=frozenset("ab")))
        assert world.pool.pick() is None
        assert world.pool.unavailable == 1
        assert world.pool.why_none() is Fault.DOWN

    def test_panic_is_what_the_supervisor_makes_of_it(self) -> None:
        """It leaves out of ``down`` those that are to be used all the same; the pool adds nothing to that."""
        world = world_of("a", "b")
        world.pool.judge(Standing(down=frozenset("a"), is_panicking=True))
        assert world.picks(2) == ["b", "b"]
        assert world.pool.standing.is_panicking

    def test_ids_that_are_not_there_yet(self) -> None:
        world = world_of("a")
        world.pool.judge(Standing(down=frozenset("b"), draining=frozenset("c"), ramps={"d": world.now}))
        world.pool.replace(found("a", "b", "c", "d"), PoolSettings(Balancing(slow_start_s=10.0)))
        b, c, d = world.pool.backends[1:]
        assert (b.is_down, c.is_draining, d.ramp_from) == (True, True, world.now)

    def test_survives_a_reload(self) -> None:
        world = world_of("a", "b")
        world.pool.judge(Standing(down=frozenset("a")))
        world.pool.replace(found("b", "a"), PoolSettings(Balancing("least_requests")))
        assert set(world.picks(9)) == {"b"}

    def test_who_left_is_used_no_more_but_is_not_down(self) -> None:
        """What is relayed to it goes on."""
        world = world_of("a", "b")
        a = world.pool.backends[0]
        world.pool.replace(found("b"))
        assert (a.is_available, a.is_down, a.is_draining) == (False, False, False)

    def test_why_there_is_nobody(self) -> None:
        world = World()
        assert world.pool.why_none() is Fault.NO_BACKEND
        world.pool.empty_fault = Fault.DNS
        assert world.pool.why_none() is Fault.DNS


class TestSessions:
    def bound(self, **balancing: Any) -> World:
        world = world_of("a", "b", policy="session_affinity", **{**SMALL, **balancing})
        sessions = world.pool.sessions
        assert sessions is not None
        sessions.bind(b"key", world.pool.backends[0])
        return world

    def test_go_on_while_it_drains_and_without_weight(self) -> None:
        world = self.bound()
        a = world.pool.backends[0]
        assert world.pool.pick_bound(b"key") is a
        world.pool.judge(Standing(draining=frozenset("a")))
        assert world.pool.pick_bound(b"key") is a
        world.pool.judge(Standing())
        world.pool.replace([*found("a", weight=0), *found("b")])
        assert world.pool.pick_bound(b"key") is a
        assert world.pool.picks == 3
        assert set(world.picks(20, b"other")) == {"b"}

    def test_move_when_it_is_down_gone_or_was_tried(self) -> None:
        world = self.bound()
        a = world.pool.backends[0]
        assert world.pool.pick_bound(b"key", [a]) is None
        world.pool.judge(Standing(down=frozenset("a")))
        assert world.pool.pick_bound(b"key") is None
        assert world.pool.pick_session(b"key") is world.pool.backends[1]
        world.pool.judge(Standing())
        world.pool.replace(found("b"))
        assert world.pool.pick_bound(b"key") is None
        assert world.pool.pick_bound(b"unknown") is None

    def test_cookies_of_one_backend_are_spread_over_the_others(self) -> None:
        world = world_of("a", "b", "c", policy="session_affinity", has_cookie=True, **SMALL)
        sessions = world.pool.sessions
        assert sessions is not None
        token = sessions.token(world.pool.backends[0])
        assert world.pool.pick_session(token) is world.pool.backends[0]
        world.pool.judge(Standing(down=frozenset("a")))
        moved = [world.pool.pick_session(token) for _ in range(60)]
        assert {each.id for each in moved if each} == {"b", "c"}

    def test_no_other_policy_has_any(self) -> None:
        pool = pool_of("a")
        assert pool.sessions is None
        assert pool.pick_bound(b"key") is None
        assert pool.pick_session(b"key") is pool.backends[0]

    def test_a_reload_keeps_them(self) -> None:
        world = self.bound()
        a = world.pool.backends[0]
        world.pool.replace(found("c", "b", "a"))
        assert world.pool.pick_bound(b"key") is a


class TestOutcomes:
    def test_are_taken_once(self) -> None:
        world = world_of("a", "b")
        a, b = world.pool.backends
        a.good += 2
        world.pool.failed(b, "reset")
        world.pool.failed(b, "connection refused")
        assert world.pool.take_outcomes() == {"a": [2, 0, 0, ""], "b": [0, 2, 2, "connection refused"]}
        assert world.pool.take_outcomes() == {}
        world.pool.failed(b, "reset")
        assert world.pool.take_outcomes() == {"b": [0, 1, 1, "reset"]}

    def test_a_success_ends_the_streak(self) -> None:
        world = world_of("a")
        (a,) = world.pool.backends
        world.pool.failed(a, "reset")
        a.good += 1
        a.streak = 0
        world.pool.failed(a, "reset")
        assert world.pool.take_outcomes() == {"a": [1, 2, 1, "reset"]}

    def test_the_alarm_is_given_once_per_streak(self) -> None:
        world = world_of("a", "b")
        alarms: list[int] = []
        world.pool.on_alarm = lambda: alarms.append(1)
        world.pool.replace(found("a", "b"), PoolSettings(alarm_streak=3))
        a, b = world.pool.backends
        for each in (a, b, a, b):
            world.pool.failed(each, "reset")
        assert alarms == []
        for _ in range(4):
            world.pool.failed(a, "reset")
        assert alarms == [1]
        world.pool.take_outcomes()
        for _ in range(3):
            world.pool.failed(a, "reset")
        assert alarms == [1, 1]

    def test_without_outlier_detection_there_is_none(self) -> None:
        world = world_of("a")
        world.pool.on_alarm = lambda: (_ for _ in ()).throw(AssertionError)
        for _ in range(100):
            world.pool.failed(world.pool.backends[0], "reset")


@pytest.mark.parametrize("policy", sorted(UNKEYED))
def test_a_backend_that_is_down_is_not_even_chosen(policy: str) -> None:
    """Walking past it would cost every pick an order of preference."""
    world = World(policy)
    pool = world.pool
    pool.replace(found(*"abcde"))
    pool.judge(Standing(down=frozenset("a"), draining=frozenset("b")))
    picked = [pool.selection.pick(None) for _ in range(300)]
    assert {each.id for each in picked if each is not None} == set("cde")
    pool.judge(Standing())
    picked = [pool.selection.pick(None) for _ in range(300)]
    assert {each.id for each in picked if each is not None} == set("abcde")


def test_a_policy_by_keys_knows_those_that_are_down() -> None:
    world = World("ring_hash")
    pool = world.pool
    pool.replace(found(*"abcde"))
    pool.finish_table()
    before = {key: pool.pick(b"%d" % key) for key in range(300)}
    pool.judge(Standing(down=frozenset("a")))
    pool.finish_table()
    for key, backend in before.items():
        now = pool.pick(b"%d" % key)
        assert now is backend or (backend is not None and backend.id == "a" and now is not None)
