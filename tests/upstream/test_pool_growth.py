"""What a pool does bit by bit: slow starts, and tables that take long to build."""

from __future__ import annotations

import random
import types
from typing import TYPE_CHECKING, Any

import pytest

from expressgateway.upstream import pool as pool_module
from expressgateway.upstream.pool import PoolSettings, Standing
from expressgateway.upstream.selection import POLICIES, Balancing, Maglev
from tests.upstream.test_pool import SMALL, World, found, world_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from expressgateway.upstream.backend import Backend

WHOLE_S = 100.0
PICKS = 20_000
KEYED = ("maglev", "ring_hash", "session_affinity")


def starting(policy: str, *ids: str, part: float, starts: str = "a", **more: Any) -> World:
    """Some backends are so far in their slow start, the others are not in any."""
    world = world_of(*ids, policy=policy, slow_start_s=WHOLE_S, **{**SMALL, **more})
    since = world.now - part * WHOLE_S
    world.pool.judge(Standing(ramps=dict.fromkeys(starts, since)))
    return world


def share(world: World, *, is_keyed: bool) -> float:
    picks = 0
    for number in range(PICKS):
        picked = world.pool.pick(b"client %d" % number if is_keyed else None)
        assert picked is not None
        picks += picked.id == "a"
    return picks / PICKS


class TestSlowStart:
    @pytest.fixture(autouse=True)
    def _seeded(self) -> None:
        random.seed(20)

    @pytest.mark.parametrize("policy", list(POLICIES))
    @pytest.mark.parametrize("part", [0.1, 0.5, 1.0])
    def test_the_share_grows_with_time(self, policy: str, part: float) -> None:
        """As if the weight had: ``part`` of what it will be; the others share the rest."""
        is_keyed = policy in KEYED
        found = share(starting(policy, *"abcd", part=part), is_keyed=is_keyed)
        expected = part / (3 + part)
        if is_keyed:  # there are no further turns: what it does not take yet goes to second choices
            expected = part * share(starting(policy, *"abcd", part=1.0), is_keyed=True)
        assert found == pytest.approx(expected, abs=3 * (expected / PICKS) ** 0.5)

    @pytest.mark.parametrize("policy", [*POLICIES])
    def test_it_has_a_little_from_the_beginning(self, policy: str) -> None:
        world = starting(policy, "a", "b", part=0.0)
        assert 0.01 < share(world, is_keyed=policy in KEYED) < 0.06

    @pytest.mark.parametrize("policy", ["least_requests", "least_connections", "power_of_two", "ewma"])
    def test_policies_that_go_by_load_do_not_fill_it_up(self, policy: str) -> None:
        """To them one that has just come is the least loaded of all."""
        world = starting(policy, *"abcd", part=0.1)
        for each in world.pool.backends[1:]:
            for _ in range(30):
                each.opened()
                each.begin()
        for _ in range(200):
            picked = world.pool.pick()
            assert picked is not None
            picked.opened()
            picked.begin()
        taken = world.pool.backends[0].in_flight
        assert 1 <= taken <= 0.1 * world.pool.load.in_flight / 4 + 1

    @pytest.mark.parametrize("policy", KEYED)
    def test_the_keys_it_takes_only_become_more(self, policy: str) -> None:
        keys = [b"client %d" % number for number in range(2000)]
        before: set[bytes] = set()
        grown = []
        for part in (0.0, 0.1, 0.3, 0.5, 0.8, 1.0):
            world = starting(policy, *"abcd", part=part)
            taken = {key for key in keys if world.picks(1, key) == ["a"]}
            assert before <= taken
            assert taken == {key for key in keys if world.picks(1, key) == ["a"]}
            before = taken
            grown.append(len(taken))
        assert grown == sorted(set(grown))

    @pytest.mark.parametrize("policy", KEYED)
    def test_a_key_does_not_go_to_and_fro_between_two_that_start(self, policy: str) -> None:
        world = starting(policy, *"abcd", part=0.5, starts="abc")
        for number in range(200):
            assert len(set(world.picks(10, b"client %d" % number))) == 1

    @pytest.mark.parametrize("policy", list(POLICIES))
    def test_the_only_one_gets_everything(self, policy: str) -> None:
        world = starting(policy, "a", "b", part=0.0)
        world.pool.judge(Standing(down=frozenset("b"), ramps={"a": world.now}))
        assert world.picks(300) == ["a"] * 300
        assert [world.picks(1, b"client %d" % number) for number in range(100)] == [["a"]] * 100
        assert world.pool.unavailable == 0

    def test_all_at_once_share_as_ever(self) -> None:
        world = starting("round_robin", *"abcd", part=0.0, starts="abcd")
        picks = world.picks(4000)
        assert all(abs(picks.count(each) - 1000) < 130 for each in "abcd")

    def test_a_second_attempt_goes_to_one_that_has_started(self) -> None:
        world = starting("round_robin", *"abc", part=0.0, starts="ab")
        c = world.pool.backends[2]
        others = [world.pool.pick(None, [c]) for _ in range(20)]
        assert all(each is not None and each is not c for each in others)
        a = world.pool.backends[0]
        seconds = [world.pool.pick(None, [a]) for _ in range(400)]
        assert seconds.count(c) > 350

    def test_it_ends_by_itself(self) -> None:
        world = starting("round_robin", "a", "b", part=0.5)
        world.now += WHOLE_S / 2
        world.picks(10)
        assert world.pool.backends[0].ramp_from == 0.0
        assert world.pool._is_plain

    def test_a_pool_without_it_ignores_what_is_said(self) -> None:
        world = world_of("a", "b")
        world.pool.judge(Standing(ramps={"a": world.now}))
        assert (world.pool.backends[0].ramp_from, world.pool._is_plain) == (0.0, True)
        assert world.picks(4) == ["a", "b"] * 2

    def test_a_session_is_no_new_work(self) -> None:
        world = starting("session_affinity", "a", "b", part=0.0)
        sessions = world.pool.sessions
        assert sessions is not None
        keys = [b"client %d" % number for number in range(100)]
        for key in keys:
            sessions.bind(key, world.pool.backends[0])
        assert all(world.pool.pick_bound(key) is world.pool.backends[0] for key in keys)


class Slow:
    """A policy whose table takes so many steps, each of them ``step_s`` of the clock that stands still."""

    def __init__(self, clock: Clock, backends: Sequence[Backend], steps: int) -> None:
        self.clock = clock
        self.backends = backends
        self.left = self.steps = steps

    def pick(self, key: bytes | None) -> Backend | None:
        return self.backends[0] if self.backends else None

    def others(self, picked: Backend) -> Iterable[Backend]:
        return self.backends[1:]

    def rebuilt(self, backends: Sequence[Backend]) -> Slow:
        return Slow(self.clock, backends, self.steps)

    def advance(self, steps: int) -> bool:
        done = min(steps, self.left)
        self.left -= done
        self.clock.now += done * self.clock.step_s
        return not self.left


def slow(clock: Clock) -> World:
    """A pool with such a policy."""
    world = World()
    world.pool.selection = Slow(clock, (), 10_000)
    return world


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.step_s = 5e-6

    def perf_counter(self) -> float:
        return self.now


class TestTables:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> Clock:
        clock = Clock()
        monkeypatch.setattr(pool_module, "time", types.SimpleNamespace(perf_counter=clock.perf_counter))
        return clock

    def test_no_slice_holds_the_loop(self, clock: Clock) -> None:
        world = slow(clock)
        world.pool.replace(found("a", "b"))
        assert clock.now == 0.0  # nothing of it in the call itself
        slices = []
        while world.calls:
            began = clock.now
            assert world.turn() == 1
            slices.append(clock.now - began)
        assert sum(slices) == pytest.approx(10_000 * clock.step_s)
        assert max(slices) < 0.002
        assert len(slices) < 60  # and none is wasted

    def test_another_set_meanwhile_is_built_instead(self, clock: Clock) -> None:
        world = slow(clock)
        world.pool.replace(found("a", "b"))
        first = world.pool.selection
        world.turn()
        world.pool.replace(found("a", "c"))
        assert len(world.calls) == 1
        world.settle()
        second = world.pool.selection
        assert isinstance(first, Slow)
        assert isinstance(second, Slow)
        assert (first.left > 0, second.left) == (True, 0)

    def test_another_policy_meanwhile(self, clock: Clock) -> None:
        world = slow(clock)
        world.pool.replace(found("a", "b"))
        world.turn()
        world.pool.replace(found("a", "b"), PoolSettings(Balancing("random")))
        world.settle()
        assert set(world.picks(50)) == {"a", "b"}
        world.pool.replace(found("a", "b"), PoolSettings(Balancing("maglev", table_size=5003)))
        assert len(world.calls) == 1
        world.settle()
        assert isinstance(world.pool.selection, Maglev)
        assert world.pool.selection.advance(0)

    def test_before_there_is_traffic_it_is_built_at_once(self) -> None:
        world = World("maglev", table_size=65537)
        world.pool.replace(found(*"abc"))
        assert isinstance(world.pool.selection, Maglev)
        assert not world.pool.selection.advance(0)
        world.pool.finish_table()
        assert world.pool.selection.advance(0)
        world.settle()

    def test_picks_go_on_while_it_is_built(self) -> None:
        world = world_of(*"abc", policy="maglev", table_size=65537)
        keys = [b"client %d" % number for number in range(300)]
        before = [world.picks(1, key) for key in keys]
        world.pool.replace(found(*"abcd"))
        assert [world.picks(1, key) for key in keys] == before
        assert world.turn() == 1
        world.pool.replace(found(*"abd"))
        during = [world.picks(1, key) for key in keys]
        assert all(len(each) == 1 and each != ["c"] for each in during)
        world.settle()
        after = [world.picks(1, key) for key in keys]
        stayed = [one == other for one, other in zip(before, after, strict=True) if one != ["c"]]
        assert ["d"] in after
        assert sum(stayed) / len(stayed) > 0.6
