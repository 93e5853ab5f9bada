"""Medians, percentiles and ratios."""

import pytest
from bench.stats import Sample, percentile, round_ratios, summarise


def sample(requests: int, cpu_s: float, **more: float) -> Sample:
    return Sample(requests=requests, seconds=2.0, cpu_s=cpu_s, **more)  # type: ignore[arg-type]  # ints among them


@pytest.mark.parametrize(("percent", "expected"), [(1, 1), (50, 50), (99, 99), (100, 100)])
def test_percentile_is_a_value_that_occurred(percent: float, expected: float) -> None:
    assert percentile(range(1, 101), percent) == expected


def test_percentile_of_one_value_and_of_none() -> None:
    assert percentile([7.0], 99) == 7.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_summary_takes_medians_run_by_run() -> None:
    figures = summarise([sample(100, 0.001), sample(200, 0.006), sample(1000, 0.02)], bulk=False)
    assert figures.cpu_us_per_request == pytest.approx(20.0)
    assert figures.requests_per_s == pytest.approx(100.0)
    assert figures.spread == pytest.approx(1.0)
    assert figures.p99_us is None


def test_bulk_counts_bytes_in_units_of_a_thousand() -> None:
    figures = summarise([sample(100, 0.5, bytes=1_000_000_000)], bulk=True)
    assert figures.cpu_ms_per_gb == pytest.approx(500.0)
    assert figures.mb_per_s == pytest.approx(500.0)


def test_unknown_percentiles_do_not_hide_known_ones() -> None:
    figures = summarise([sample(1, 1.0), sample(1, 1.0, p50_us=5.0), sample(1, 1.0, p50_us=7.0)], bulk=False)
    assert figures.p50_us == 6.0


def test_summary_of_nothing() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summarise([], bulk=False)


def test_round_ratios_pair_neighbours_in_time() -> None:
    # A machine three times slower in one round leaves its ratio at 2; the quotient of the medians would be 4.
    assert round_ratios([2.0, 6.0, 4.0], [1.0, 3.0, 1.0]) == pytest.approx(2.0)


def test_round_ratios_need_the_same_rounds() -> None:
    with pytest.raises(ValueError, match="2 rounds against 1"):
        round_ratios([1.0, 2.0], [1.0])
