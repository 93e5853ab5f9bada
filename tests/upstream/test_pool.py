"""A pool's set and its walk: what stays keeps its object, what leaves finishes, nobody is asked twice."""

from dataclasses import replace
from typing import Any

from expressgateway.upstream.backend import Backend, BackendSettings, SocketAddress, Waiter
from expressgateway.upstream.pool import Pool
from expressgateway.wire.sinks import ClientStream

CHANGES: list[dict[str, Any]] = [{"host": "other"}, {"protocol": "tcp"}, {"send_proxy": "v1"}]
Found = tuple[BackendSettings, SocketAddress, str]


class Connections:
    """A backend's connections that only remember what they were asked."""

    def __init__(self) -> None:
        self.sweeps: list[float] = []
        self.closed = 0
        self.open_now = 0

    def lease(self, waiter: Waiter, fresh: bool = False) -> ClientStream | None:
        return None

    def cancel(self, waiter: Waiter) -> None:
        pass

    def sweep(self, now: float) -> None:
        self.sweeps.append(now)

    def close_idle(self) -> None:
        self.closed += 1

    @property
    def idle(self) -> int:
        return 0

    @property
    def open(self) -> int:
        return self.open_now


def settings(id_: str, weight: int = 1, **more: Any) -> BackendSettings:
    base = BackendSettings(id=id_, host="h", port=1, protocol="h1", weight=weight, tls=None, send_proxy=None)
    return replace(base, **more)


def found(*ids: str, weight: int = 1) -> list[Found]:
    return [(settings(id_, weight), ("127.0.0.1", 1), id_) for id_ in ids]


def attach(backend: Backend) -> None:
    backend.connections = Connections()


def pool_of(*ids: str, policy: str = "round_robin") -> Pool:
    pool = Pool("p", policy, attach)
    pool.replace(found(*ids), policy)
    return pool


def connections_of(backend: Backend) -> Connections:
    assert isinstance(backend.connections, Connections)
    return backend.connections


class TestReplace:
    def test_who_stays_keeps_object_and_counters(self) -> None:
        pool = pool_of("a", "b")
        a, b = pool.backends
        a.leases = 7
        connections = a.connections
        pool.replace(found("c", "a"), "round_robin")
        assert [each.id for each in pool.backends] == ["c", "a"]
        assert pool.backends[1] is a
        assert a.leases == 7
        assert a.connections is connections
        assert connections_of(a).closed == 0
        assert connections_of(b).closed == 1

    def test_a_weight_is_no_new_backend(self) -> None:
        pool = pool_of("a", "b")
        before = pool.backends
        pool.replace([*found("a", weight=3), *found("b")], "round_robin")
        assert pool.backends == before
        assert [each.weight for each in pool.backends] == [3, 1]
        picks = [pool.pick() for _ in range(400)]
        assert picks.count(before[0]) == 300

    def test_anything_else_is(self) -> None:
        for change in CHANGES:
            pool = pool_of("a")
            old = pool.backends[0]
            pool.replace([(settings("a", **change), ("127.0.0.1", 1), "a")], "round_robin")
            assert pool.backends[0] is not old
            assert connections_of(old).closed == 1
        pool = pool_of("a")
        old = pool.backends[0]
        pool.replace([(settings("a"), ("127.0.0.2", 1), "a")], "round_robin")
        assert pool.backends[0] is not old

    def test_who_leaves_is_swept_until_it_is_done(self) -> None:
        pool = pool_of("a", "b")
        leaving = pool.backends[0]
        connections_of(leaving).open_now = 1
        pool.replace(found("b"), "round_robin")
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
        pool.replace(found("a", "b"), "weighted_round_robin")
        assert pool.policy == "weighted_round_robin"
        assert type(pool.selection).__name__ == "WeightedRoundRobin"

    def test_to_nothing_and_back(self) -> None:
        pool = pool_of("a")
        pool.replace([], "round_robin")
        assert pool.pick() is None
        pool.replace(found("a"), "round_robin")
        assert pool.pick() is pool.backends[0]

    def test_close_idle_reaches_everyone(self) -> None:
        pool = pool_of("a", "b")
        leaving, staying = pool.backends
        connections_of(leaving).open_now = 1
        pool.replace(found("b"), "round_robin")
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
        pool.replace([*found("a", weight=0), *found("b")], "round_robin")
        assert {each.id for each in (pool.pick() for _ in range(9)) if each} == {"b"}
