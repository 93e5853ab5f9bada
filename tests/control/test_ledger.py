"""Counts across workers and their deaths."""

from typing import Any

import pytest

from expressgateway.control import ledger as module
from expressgateway.control.ledger import Ledger, checked
from expressgateway.observe.counters import Sample

DURATIONS = [1, *[0] * 14, 0.25]


def samples(connections: int, inflight: int = 0) -> list[Sample]:
    return [
        ("connections", ("web",), connections),
        ("connections_inflight", ("web",), inflight),
        ("http_request_duration_seconds", ("web", "1.1"), list(DURATIONS)),
    ]


def test_adds_workers_up() -> None:
    ledger = Ledger()
    ledger.record(0, samples(3, 1))
    ledger.record(1, samples(4, 1))
    merged = ledger.merged([("config_version", (), 1)])
    assert merged["connections"] == {("web",): 7}
    assert merged["connections_inflight"] == {("web",): 2}
    assert merged["config_version"] == {(): 1}
    assert merged["http_request_duration_seconds"] == {("web", "1.1"): [2, *[0] * 14, 0.5]}


def test_counters_outlive_a_worker_and_gauges_do_not() -> None:
    ledger = Ledger()
    ledger.record(0, samples(3, 2))
    ledger.retire(0)
    ledger.retire(0)
    assert ledger.merged()["connections"] == {("web",): 3}
    assert "connections_inflight" not in ledger.merged()
    ledger.record(0, samples(1))
    assert ledger.merged()["connections"] == {("web",): 4}
    ledger.retire(0)
    assert ledger.merged()["connections"] == {("web",): 4}
    assert ledger.merged()["http_request_duration_seconds"] == {("web", "1.1"): [2, *[0] * 14, 0.5]}


def test_reading_changes_nothing() -> None:
    ledger = Ledger()
    ledger.record(0, samples(3))
    ledger.retire(0)
    ledger.record(0, samples(1))
    assert ledger.merged() == ledger.merged()


def test_series_of_the_dead_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RETIRED_SERIES", 3)
    ledger = Ledger()
    for number in range(10):
        ledger.record(0, [("connections", (f"web{number}",), 1), ("connections", ("web0",), 1)])
        ledger.retire(0)
    merged = ledger.merged()["connections"]
    assert len(merged) <= 3
    assert merged["web0",] == 11  # known ones go on


@pytest.mark.parametrize(
    "row",
    [
        "connections",
        ["connections", ["web"]],
        ["connections", "web", 1],
        ["connections", ["web", "x"], 1],
        ["connections", [1], 1],
        ["connections", ["web"], "1"],
        ["connections", ["web"], [1]],
        ["connections", ["web"], True],
        ["http_request_duration_seconds", ["web", "1.1"], [1, 2]],
        ["http_request_duration_seconds", ["web", "1.1"], 1],
        ["unheard_of", [], 1],
        [["connections"], ["web"], 1],
    ],
)
def test_nonsense_is_left_out(row: Any) -> None:
    assert checked([row, ["connections", ["web"], 1]]) == [("connections", ("web",), 1)]


def test_no_samples_at_all() -> None:
    assert checked(None) == checked({}) == []
