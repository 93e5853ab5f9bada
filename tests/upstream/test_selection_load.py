"""Policies of chance and of load: draws, ``least_*``, ``power_of_two``, ``ewma``."""

import random
from collections import Counter
from collections.abc import Sequence
from math import exp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expressgateway.upstream.backend import Backend
from expressgateway.upstream.selection import (
    Ewma,
    LeastConnections,
    LeastRequests,
    PowerOfTwo,
    WeightedRandom,
)
from expressgateway.upstream.selection.conformance import backend, backends, check_selection_policy
from expressgateway.upstream.selection.draws import Draws


@pytest.fixture(autouse=True)
def _the_same_chance() -> None:
    random.seed(3)


class TestDraws:
    @given(st.lists(st.integers(1, 65535), min_size=2, max_size=20))
    @settings(max_examples=60, deadline=None)
    def test_a_pair_is_never_one_twice(self, weights: list[int]) -> None:
        draws = Draws(weights)
        for _ in range(50):
            one, other = draws.pair()
            assert one != other
            assert 0 <= one < len(weights)
            assert 0 <= other < len(weights)

    def test_the_second_follows_the_weights_of_the_rest(self) -> None:
        draws = Draws([6, 3, 1])
        pairs = Counter(draws.pair() for _ in range(100_000))
        for one, other, chance in (
            (0, 1, 0.6 * 3 / 4),
            (0, 2, 0.6 / 4),
            (1, 0, 0.3 * 6 / 7),
            (2, 0, 0.1 * 6 / 9),
        ):
            assert pairs[(one, other)] / 100_000 == pytest.approx(chance, rel=0.06)

    def test_the_ends_of_the_line(self) -> None:
        draws = Draws([1, 2, 1])
        assert [draws.at(at) for at in (0.0, 0.24, 0.25, 0.74, 0.75, 0.999, 1.0)] == [0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("weights", [(1,), (3, 3, 3), (1, 2, 3, 4), (65535, 1), (7, 1, 1, 90, 2)], ids=str)
def test_the_alias_table_holds_the_weights_exactly(weights: tuple[int, ...]) -> None:
    selection = WeightedRandom(backends(*weights))
    parts: Counter[str] = Counter()
    for own, alias, mark in zip(selection._backends, selection._aliases, selection._marks, strict=True):
        parts[own.id] += mark  # type: ignore[assignment]  # a Counter of fractions
        parts[alias.id] += 1 - mark  # type: ignore[assignment]
    for at, weight in enumerate(weights):
        assert parts[f"b{at}"] / len(weights) == pytest.approx(weight / sum(weights), abs=1e-12)


@pytest.mark.usefixtures("ordered")
class TestLeast:
    @given(st.data())
    @settings(max_examples=60, deadline=None)
    def test_against_looking_at_everyone(self, data: st.DataObject) -> None:
        """Whatever comes and goes, a pick is one of the least loaded for their weights."""
        weights = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=8))
        set_ = backends(*weights)
        selection = LeastRequests(set_)
        for move in data.draw(st.lists(st.tuples(st.sampled_from("+-p"), st.integers(0, 7)), max_size=80)):
            each = set_[move[1] % len(set_)]
            if move[0] == "+":
                each.begin()
            elif move[0] == "-" and each.in_flight:
                each.end()
            picked = selection.pick(None)
            with_weight = [other for other in set_ if other.weight]
            if not with_weight:
                assert picked is None
                continue
            assert picked is not None
            assert picked.in_flight / picked.weight == min(o.in_flight / o.weight for o in with_weight)
            if move[0] == "p":
                picked.begin()
            order = list(selection.others(picked))
            assert [o.in_flight / o.weight for o in order] == sorted(o.in_flight / o.weight for o in order)
            assert len(selection._heap) <= selection._max_entries

    def test_connections_and_requests_are_counted_apart(self) -> None:
        a, b = backends(1, 1)
        requests = LeastRequests([a, b])
        a.opened()
        assert {requests.pick(None) for _ in range(50)} == {a, b}
        connections = LeastConnections([a, b])
        assert {connections.pick(None) for _ in range(50)} == {b}
        b.begin()
        assert {connections.pick(None) for _ in range(50)} == {b}

    def test_equals_follow_the_weights(self) -> None:
        set_ = backends(1, 2, 7)
        selection = LeastRequests(set_)
        counts: Counter[Backend | None] = Counter()
        for _ in range(50_000):
            picked = selection.pick(None)
            if picked is not None:
                counts[picked] += 1
        for each in set_:
            assert counts[each] / 5000 == pytest.approx(each.weight, rel=0.08)

    def test_voided_entries_are_bounded(self) -> None:
        """Load that goes up and down without a pick, on a machine that is never asked."""
        set_ = backends(1, 1, 1)
        selection = LeastRequests(set_)
        for each in set_:
            for _ in range(1000):
                each.begin()
        for _ in range(3):
            selection.pick(None)
        for each in set_:
            for _ in range(1000):
                each.end()
        assert len(selection._heap) <= selection._max_entries
        assert {selection.pick(None) for _ in range(50)} == set(set_)

    def test_a_selection_that_is_thrown_away_leaves_the_newer_one_its_hooks(self) -> None:
        a, b, c = backends(1, 1, 1)
        old = LeastRequests([a, b, c])
        new = old.rebuilt([a, b])
        assert (a.on_load, b.on_load, c.on_load) == (new._on_load, new._on_load, None)
        newest = LeastRequests([a, b])
        new.rebuilt([])
        assert a.on_load == newest._on_load

    def test_one_whose_weight_became_0_is_let_go(self) -> None:
        a, b = backends(1, 1)
        old = LeastRequests([a, b])
        b.weight = 0
        new = old.rebuilt([a, b])
        assert b.on_load is None
        b.begin()
        b.end()
        assert {new.pick(None) for _ in range(20)} == {a}


class TestPowerOfTwo:
    def test_of_two_the_less_busy_for_its_weight(self) -> None:
        a, b = backends(1, 3)
        selection = PowerOfTwo([a, b])
        a.begin()
        for _ in range(2):
            b.begin()
        assert {selection.pick(None) for _ in range(50)} == {b}
        for _ in range(2):
            b.begin()
        assert {selection.pick(None) for _ in range(50)} == {a}

    def test_the_busiest_of_all_is_never_picked(self) -> None:
        set_ = backends(1, 1, 1, 1)
        selection = PowerOfTwo(set_)
        set_[1].begin()
        assert {selection.pick(None) for _ in range(200)} == {set_[0], set_[2], set_[3]}

    def test_idle_backends_follow_the_weights(self) -> None:
        set_ = backends(1, 3)
        selection = PowerOfTwo(set_)
        counts = Counter(selection.pick(None) for _ in range(20_000))
        assert counts[set_[1]] / 20_000 == pytest.approx(0.75, abs=0.02)


class TestEwma:
    def measured(self, set_: Sequence[Backend], *seconds: float) -> Ewma:
        selection = Ewma(set_, 10.0)
        for each, latency in zip(set_, seconds, strict=True):
            selection.observe(each, latency, 100.0)
        return selection

    def average(self, selection: Ewma, each: Backend) -> float:
        return selection._known[each.id].average_s

    def test_a_peak_counts_at_once_and_fades_with_time(self) -> None:
        (each,) = set_ = backends(1)
        selection = self.measured(set_, 0.1)
        selection.observe(each, 2.0, 101.0)
        assert self.average(selection, each) == 2.0
        selection.observe(each, 0.1, 106.0)
        assert self.average(selection, each) == pytest.approx(0.1 + 1.9 * exp(-0.5))
        selection.observe(each, 0.1, 90.0)  # a clock that goes back changes nothing
        assert self.average(selection, each) == pytest.approx(0.1 + 1.9 * exp(-0.5))

    def test_the_score_is_latency_times_load_for_the_weight(self) -> None:
        a, b = set_ = backends(1, 2)
        selection = self.measured(set_, 0.1, 0.3)
        assert {selection.pick(None) for _ in range(20)} == {a}  # 0.1 to 0.15
        a.begin()
        assert {selection.pick(None) for _ in range(20)} == {b}  # 0.2 to 0.15
        b.begin()
        assert {selection.pick(None) for _ in range(20)} == {a}  # 0.2 to 0.3

    def test_one_that_was_slow_is_asked_again_in_time(self) -> None:
        """Nothing goes to it, so nothing is measured: its average must fade all the same."""
        a, b = set_ = backends(1, 1)
        selection = self.measured(set_, 0.01, 5.0)
        for second in range(100, 200):
            selection.observe(a, 0.01, float(second))
            if selection.pick(None) is b:
                break
        else:
            pytest.fail("it was never asked again")
        assert 150 < second < 170  # 10 s x ln(500)

    def test_unmeasured_ones_are_probed_with_one_each(self) -> None:
        measured, new = set_ = backends(1, 1)
        selection = Ewma(set_, 10.0)
        selection.observe(measured, 0.01, 1.0)
        assert selection.pick(None) is new
        new.begin()
        assert {selection.pick(None) for _ in range(50)} == {measured}
        selection.observe(new, 0.001, 1.1)
        new.end()
        assert {selection.pick(None) for _ in range(50)} == {new}

    def test_when_nobody_answers_it_goes_by_load(self) -> None:
        set_ = backends(1, 1, 1)
        selection = Ewma(set_, 10.0)
        for _ in range(30):
            picked = selection.pick(None)
            assert picked is not None
            picked.begin()
        assert max(each.in_flight for each in set_) <= 12

    def test_what_was_learnt_stays_with_the_id(self) -> None:
        set_ = backends(1, 1, 0)
        selection = self.measured(set_, 0.1, 0.2, 0.3)
        again = [backend("b1"), backend("b2"), backend("new")]
        after = selection.rebuilt(again)
        assert [self.average(after, each) for each in again] == [0.2, 0.3, 0.0]
        after.observe(set_[0], 1.0, 101.0)  # it has left: nothing to learn
        assert set(after._known) == {"b1", "b2", "new"}


@pytest.mark.usefixtures("ordered")
@pytest.mark.parametrize("make", [LeastRequests, LeastConnections])
def test_conformance_of_the_order(make: type[LeastRequests | LeastConnections]) -> None:
    check_selection_policy(make, kind="least", picks=5_000)
