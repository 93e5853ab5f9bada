"""Counts across workers and their deaths."""

import math
from array import array
from typing import Any

import pytest

from expressgateway.control import ledger as module
from expressgateway.control.channel import pack_bytes
from expressgateway.control.ledger import Contribution, Ledger
from expressgateway.observe.counters import Sample
from expressgateway.worker.reports import Changes
from tests.control.rounds import set_all

DURATIONS = [1, *[0] * 14, 0.25]


def part(
    new: list[object] = [],  # noqa: B006 - it is not changed
    changes: list[tuple[int, float]] = [],  # noqa: B006 - nor is this
    gone: list[int] = [],  # noqa: B006 - nor this
) -> dict[str, Any]:
    """A message of a report."""
    places = array("I", [place for place, _ in changes])
    values = array("d", [change for _, change in changes])
    return {
        "new": new,
        "places": pack_bytes(places.tobytes()),
        "changes": pack_bytes(values.tobytes()),
        "gone": gone,
    }


class Counting:
    """A worker, as far as the ledger sees one: its reports, as they come through the channel."""

    def __init__(self, ledger: Ledger) -> None:
        self.changes = Changes()
        self.counts: Contribution = ledger.join()

    def report(self, *samples: Sample) -> None:
        self.changes.look((self, None, lambda: samples))
        self.changes.finish()
        self.counts.take(self.changes.take())


def samples(connections: int, inflight: int = 0) -> list[Sample]:
    return [
        ("connections", ("web",), connections),
        ("connections_inflight", ("web",), inflight),
        ("http_request_duration_seconds", ("web", "api", "1.1"), list(DURATIONS)),
    ]


def test_adds_workers_up() -> None:
    ledger = Ledger()
    Counting(ledger).report(*samples(3, 1))
    Counting(ledger).report(*samples(4, 1))
    set_all(ledger.join(), [("config_version", (), 1)])
    merged = ledger.merged()
    assert merged["connections"] == {("web",): 7}
    assert merged["connections_inflight"] == {("web",): 2}
    assert merged["config_version"] == {(): 1}
    assert merged["http_request_duration_seconds"] == {("web", "api", "1.1"): [2, *[0] * 14, 0.5]}
    assert ledger.merged(["connections"]) == {"connections": {("web",): 7}}


def test_one_worker_is_followed() -> None:
    ledger = Ledger()
    worker = Counting(ledger)
    worker.report(*samples(3, 1))
    worker.report(*samples(3, 1))
    worker.report(*samples(5, 0))
    assert ledger.merged()["connections"] == {("web",): 5}
    assert ledger.merged()["connections_inflight"] == {("web",): 0}
    assert ledger.merged()["http_request_duration_seconds"] == {("web", "api", "1.1"): DURATIONS}


def test_counters_outlive_a_worker_and_gauges_do_not() -> None:
    ledger = Ledger()
    worker = Counting(ledger)
    worker.report(*samples(3, 2))
    worker.counts.retire()
    worker.counts.retire()
    worker.report(*samples(9))  # it comes too late
    assert ledger.merged()["connections"] == {("web",): 3}
    assert "connections_inflight" not in ledger.merged()
    other = Counting(ledger)
    other.report(*samples(1))
    assert ledger.merged()["connections"] == {("web",): 4}
    other.counts.retire()
    assert ledger.merged()["connections"] == {("web",): 4}
    assert ledger.merged()["http_request_duration_seconds"] == {("web", "api", "1.1"): [2, *[0] * 14, 0.5]}


def test_a_counter_that_begins_anew_does_not_go_backwards() -> None:
    ledger = Ledger()
    worker = Counting(ledger)
    worker.report(*samples(3))
    worker.report(*samples(1))
    assert ledger.merged()["connections"] == {("web",): 4}


def test_what_all_workers_have_given_up_goes() -> None:
    ledger = Ledger()
    dead, one, other = Counting(ledger), Counting(ledger), Counting(ledger)
    for worker in (dead, one, other):
        worker.report(*samples(1))
    dead.counts.retire()
    one.report()
    assert ledger.merged()["connections"] == {("web",): 3}
    other.report()
    assert ledger.merged() == {}


def test_gauges_leave_no_dust() -> None:
    ledger = Ledger()
    worker = Counting(ledger)
    for lag in (0.1, 0.7, 1e-17, 0.3, 0.0):
        worker.report(("worker_loop_lag_seconds", ("0",), lag))
        assert ledger.merged()["worker_loop_lag_seconds"] == {("0",): lag}


def test_series_of_the_dead_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RETIRED_SERIES", 3)
    ledger = Ledger()
    for number in range(10):
        worker = Counting(ledger)
        worker.report(("connections", (f"web{number}",), 1), ("connections", ("web-0",), 1))
        worker.counts.retire()
    merged = ledger.merged()["connections"]
    assert len(merged) <= 3
    assert merged["web-0",] == 10  # known ones go on


def test_the_supervisors_own() -> None:
    ledger = Ledger()
    own = ledger.join()
    set_all(own, [("dns_addresses", ("a",), 2), ("dns_addresses", ("b",), 1), ("dns_queries", (), 7)])
    set_all(own, [("dns_addresses", ("a",), 3), ("dns_queries", (), 7)])
    assert ledger.merged() == {"dns_addresses": {("a",): 3}, "dns_queries": {(): 7}}


def test_what_no_family_describes_is_left_out() -> None:
    ledger = Ledger()
    named: list[object] = [
        [0, "unheard_of", []],
        [1, "connections", ["web", "x"]],
        [2, "connections", ["web"]],
    ]
    ledger.join().take(part(named, [(0, 1), (32, 1), (64, 1)], [0]))
    assert ledger.merged() == {"connections": {("web",): 1}}


@pytest.mark.parametrize(
    "bad",
    [
        {"places": None},
        {"places": "&"},
        {"places": "AAA="},
        part([], [(0, 1)]) | {"changes": ""},
        part([], [(32, 1)]),
        part([], [(0, -1)]),
        part([], [(0, math.nan)]),
        part([], [(3 * 32 + 20, 1)]),
        part([], [(3 * 32, -1)]),
        part([[0, "connections", ["again"]]]),
        part([["7", "connections", ["web"]]]),
        part([[7, ["connections"], ["web"]]]),
        part([[7, "connections", [1]]]),
        part([[7, "connections"]]),
        {"new": None},
        {"gone": [7]},
    ],
)
def test_nonsense_is_an_error(bad: dict[str, Any]) -> None:
    counts = Ledger().join()
    named: list[object] = [
        [0, "connections", ["web"]],
        [2, "connections_inflight", ["web"]],
        [3, "http_request_duration_seconds", ["web", "api", "1.1"]],
    ]
    counts.take(part(named))
    with pytest.raises((ValueError, TypeError, KeyError, IndexError)):
        counts.take(part() | bad)
