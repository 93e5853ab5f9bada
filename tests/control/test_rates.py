"""Rates and quantiles from two looks at the counters."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expressgateway.control.admin.rates import (
    QUANTILE_WINDOW_S,
    RATE_WINDOW_S,
    Look,
    Looks,
    Pace,
    Span,
    quantile,
    quantiles,
    summed,
    together,
)
from expressgateway.control.ledger import Merged
from expressgateway.observe.counters import BUCKETS_S, Histogram, Sample


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def look(at: float, **counts: Any) -> Look:
    return Look(at, {name: {("web",): value} for name, value in counts.items()})


def rates(span: Span, family: str = "connections") -> Any:
    return run(span.rates(family, lambda labels: labels, Pace()))


class TestQuantile:
    def test_of_nothing(self) -> None:
        assert quantile([0] * 15, 0.5) is None
        assert quantiles(None) == {"p50": None, "p90": None, "p99": None}

    def test_lies_evenly_within_its_bucket(self) -> None:
        counts = [0] * 15
        counts[4] = 100  # 5 to 10 ms
        assert quantile(counts, 0.5) == pytest.approx(0.0075)
        assert quantiles(counts) == {"p50": 7.5, "p90": 9.5, "p99": 9.95}

    def test_the_first_bucket_begins_at_nothing(self) -> None:
        assert quantile([10, *[0] * 14], 0.5) == pytest.approx(0.00025)

    def test_beyond_the_last_bound_is_the_last_bound(self) -> None:
        assert quantile([*[0] * 14, 1], 0.5) == 10.0

    def test_across_buckets(self) -> None:
        counts = [90, *[0] * 12, 10, 0]  # 90 below half a millisecond, 10 between 5 and 10 s
        assert quantile(counts, 0.5) == pytest.approx(0.0005 * 50 / 90)
        assert quantile(counts, 0.99) == pytest.approx(5 + 5 * 0.9)

    @given(st.lists(st.floats(0, 20), min_size=1, max_size=200), st.floats(0.01, 0.99))
    def test_is_in_the_bucket_of_the_value(self, values: list[float], q: float) -> None:
        histogram = Histogram()
        for value in values:
            histogram.observe(value)
        found = quantile(histogram.counts, q)
        true = sorted(values)[min(len(values) - 1, int(q * len(values)))]
        below = sorted(values)[max(0, int(q * len(values)) - 1)]
        assert found is not None
        upper = next((bound for bound in BUCKETS_S if bound >= true), BUCKETS_S[-1])
        lower = max((bound for bound in BUCKETS_S if bound < below), default=0.0)
        assert lower - 1e-9 <= found <= upper + 1e-9

    def test_of_several_together(self) -> None:
        assert together({}) is None
        assert together({("a",): [1, 2], ("b",): [3, 4]}) == [4, 6]


class TestSpan:
    def test_a_rate_is_a_difference_by_time(self) -> None:
        span = Span(look(10, connections=100), look(12, connections=150))
        assert rates(span) == {("web",): 25.0}

    def test_what_is_new_began_at_nothing(self) -> None:
        assert rates(Span(Look(0, {}), look(2, connections=10))) == {("web",): 5.0}

    def test_backwards_is_standing_still(self) -> None:
        assert rates(Span(look(0, connections=9), look(1, connections=5))) == {}

    def test_two_looks_at_one_moment_divide_by_no_zero(self) -> None:
        assert rates(Span(look(1, connections=0), look(1, connections=0))) == {}

    def test_series_are_added_up_by_key(self) -> None:
        counts: Merged = {"http_requests": {("web", "a", "1.1", "2xx"): 4, ("web", "b", "2", "2xx"): 6}}
        span = Span(Look(0, {}), Look(2, counts))
        found = run(span.rates("http_requests", lambda labels: (labels[0], labels[3]), Pace()))
        assert found == {("web", "2xx"): 5.0}

    def test_histograms_lose_their_sums_and_what_was_before(self) -> None:
        before: Merged = {"d": {("web", "1.1"): [5, 1, 9.5]}}
        after: Merged = {"d": {("web", "1.1"): [7, 1, 11.0], ("web", "2"): [1, 1, 3.0]}}
        span = Span(Look(0, before), Look(1, after))
        assert run(span.histograms("d", lambda labels: labels[:1], Pace())) == {("web",): [3, 1]}


class TestLooks:
    def test_one_is_none(self) -> None:
        looks = Looks()
        assert looks.since(RATE_WINDOW_S) is None
        looks.take(look(1, connections=1))
        assert looks.since(RATE_WINDOW_S) is None

    def test_the_window_is_as_long_as_there_are_looks(self) -> None:
        looks = Looks()
        spans = []
        for at in range(30):
            looks.take(look(at, connections=at * 7))
            span = looks.since(RATE_WINDOW_S)
            spans.append(None if span is None else span.seconds)
        assert spans == [None, 1, 2, *[3] * 27]
        longer = looks.since(QUANTILE_WINDOW_S)
        assert longer is not None
        assert longer.seconds == 10
        assert rates(longer) == {("web",): 7.0}

    def test_the_same_moment_is_the_same_look(self) -> None:
        looks = Looks()
        looks.take(look(1, connections=1))
        looks.take(look(1, connections=1))
        assert looks.since(RATE_WINDOW_S) is None
        looks.take(look(2, connections=3))
        looks.take(look(2, connections=3))
        span = looks.since(RATE_WINDOW_S)
        assert span is not None
        assert rates(span) == {("web",): 2.0}

    def test_what_was_seen_long_ago_makes_no_rate(self) -> None:
        looks = Looks()
        for at in (1, 2, 3, 100):
            looks.take(look(at, connections=at))
        assert looks.since(RATE_WINDOW_S) is None


class TestSummed:
    def test_only_what_is_wanted(self) -> None:
        one: list[Sample] = [("connections", ("web",), 1), ("dns_queries", (), 5)]
        other: list[Sample] = [("connections", ("web",), 2), ("connections", ("api",), 4)]
        found = run(summed([one, other], frozenset({"connections", "relay_bytes"}), Pace()))
        assert found == {"connections": {("web",): 3, ("api",): 4}, "relay_bytes": {}}

    def test_histograms_are_added_and_the_samples_left_alone(self) -> None:
        one: list[Sample] = [("d", ("web",), [1, 2, 0.5])]
        found = run(summed([one, one], frozenset({"d"}), Pace()))
        assert found == {"d": {("web",): [2, 4, 1.0]}}
        assert one == [("d", ("web",), [1, 2, 0.5])]

    def test_others_run_meanwhile(self) -> None:
        samples: list[Sample] = [("connections", (str(n),), n) for n in range(60_000)]

        async def main() -> int:
            turns = 0
            work = asyncio.get_running_loop().create_task(
                summed([samples], frozenset({"connections"}), Pace())
            )
            while not work.done():
                turns += 1
                await asyncio.sleep(0)
            return turns

        assert run(main()) > 3
