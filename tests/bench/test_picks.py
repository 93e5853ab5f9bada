"""The bench of policies: it measures every policy, and what it says it does."""

import pytest
from bench.picks import main, measure_growth, measure_pick, weights_of

from expressgateway.upstream.selection import POLICIES


def test_every_policy_is_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--sizes", "3", "--picks", "20", "--runs", "1"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows[: len(POLICIES)]] == list(POLICIES)
    assert all(row.count("|") == 4 for row in rows[: len(POLICIES)])
    assert [row.split("`")[1] for row in rows[len(POLICIES) :: 2]] == [
        "maglev",
        "ring_hash",
        "session_affinity",
    ]


def test_picks_and_exchanges_are_both_measured() -> None:
    costs = measure_pick("least_requests", 10, is_weighted=True, picks=500, runs=3)
    assert costs.pick_ns > 0
    assert costs.loaded_ns > 0


def test_a_table_takes_longer_than_one_of_its_slices() -> None:
    growth = measure_growth("maglev", 10, is_weighted=False)
    assert 0 < growth.longest_ms < growth.whole_ms
    assert growth.first_ms < growth.whole_ms


def test_weights() -> None:
    assert weights_of(3, is_weighted=False) == [1, 1, 1]
    assert weights_of(102, is_weighted=True)[98:] == [99, 100, 1, 2]
