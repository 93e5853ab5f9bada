"""A worker's reports: what has changed, in parts, whatever happens in between."""

from __future__ import annotations

import asyncio
from array import array
from typing import TYPE_CHECKING, Any

from expressgateway.control.channel import unpack_bytes
from expressgateway.control.ledger import Ledger
from expressgateway.observe.counters import BUCKETS_S, PLACES
from expressgateway.worker import reports
from expressgateway.worker.reports import Changes, Reporter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

    from expressgateway.observe.counters import Sample
    from expressgateway.worker.reports import Source

LENGTH = len(BUCKETS_S) + 2


def test_a_histogram_has_room() -> None:
    assert LENGTH <= PLACES


def counter(value: float, name: str = "web") -> Sample:
    return "connections", (name,), value


def read(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a report, with its changes unpacked: series, place in a histogram, change."""
    places = array("I", unpack_bytes(part["places"]))
    changes = array("d", unpack_bytes(part["changes"]))
    values = [(*divmod(place, PLACES), change) for place, change in zip(places, changes, strict=True)]
    return {"new": part["new"], "values": values, "gone": part["gone"]}


class TestChanges:
    def look(self, changes: Changes, *sources: tuple[str, object, list[Sample]]) -> dict[str, Any]:
        for key, mark, samples in sources:
            changes.look((key, mark, lambda samples=samples: samples))  # type: ignore[misc]  # a default
        changes.finish()
        return read(changes.take())

    def test_a_series_is_named_once(self) -> None:
        changes = Changes()
        first = self.look(changes, ("a", None, [counter(3)]))
        assert first == {"new": [[0, "connections", ["web"]]], "values": [(0, 0, 3)], "gone": []}
        assert self.look(changes, ("a", None, [counter(5)])) == {"new": [], "values": [(0, 0, 2)], "gone": []}
        assert self.look(changes, ("a", None, [counter(5)])) == {"new": [], "values": [], "gone": []}

    def test_one_that_is_zero_is_named_all_the_same(self) -> None:
        assert self.look(Changes(), ("a", None, [counter(0)]))["new"] == [[0, "connections", ["web"]]]

    def test_what_has_the_same_mark_is_not_looked_at(self) -> None:
        changes = Changes()
        self.look(changes, ("a", 1, [counter(3)]))
        assert self.look(changes, ("a", 1, [counter(5)])) == {"new": [], "values": [], "gone": []}
        assert self.look(changes, ("a", 2, [counter(5)]))["values"] == [(0, 0, 2)]

    def test_a_gauge_is_told_as_it_is(self) -> None:
        changes = Changes()
        for value in (4, 1):
            gauge: Sample = ("connections_inflight", ("web",), value)
            assert self.look(changes, ("a", None, [gauge]))["values"] == [(0, 0, value)]

    def test_of_a_histogram_what_has_risen(self) -> None:
        changes = Changes()
        counts = [0.0] * LENGTH
        durations: Sample = ("http_request_duration_seconds", ("web", "a", "2"), list(counts))
        self.look(changes, ("a", None, [durations]))
        counts[3], counts[-1] = 2, 0.5
        durations = ("http_request_duration_seconds", ("web", "a", "2"), list(counts))
        assert self.look(changes, ("a", None, [durations]))["values"] == [(0, 3, 2), (0, 15, 0.5)]
        assert self.look(changes, ("a", None, [durations]))["values"] == []

    def test_a_source_that_is_not_there_any_more_is_gone(self) -> None:
        changes = Changes()
        self.look(changes, ("a", 1, [counter(3)]), ("b", 1, [counter(1, "other")]))
        assert self.look(changes, ("b", 1, []))["gone"] == [0]
        assert self.look(changes)["gone"] == [1]

    def test_so_is_a_series_that_its_source_has_no_more(self) -> None:
        changes = Changes()
        self.look(changes, ("a", None, [counter(3), counter(1, "other")]))
        assert self.look(changes, ("a", None, [counter(3)]))["gone"] == [1]

    def test_two_sources_may_have_the_same_name(self) -> None:
        """A backend that leaves, and the one in its place."""
        ledger = Ledger()
        counts = ledger.join()
        changes = Changes()
        rounds: list[list[tuple[str, object, list[Sample]]]] = [
            [("a", 1, [counter(3)])],
            [("a", 1, []), ("b", 1, [counter(1)])],
            [("b", 1, [])],
        ]
        for sources in rounds:
            for key, mark, samples in sources:
                changes.look((key, mark, lambda samples=samples: samples))  # type: ignore[misc]  # a default
            changes.finish()
            counts.take(changes.take())
        assert ledger.merged() == {"connections": {("web",): 4}}


class Told:
    """Where a reporter's messages go, and what it reports of."""

    def __init__(self, names: int) -> None:
        self.messages: list[dict[str, Any]] = []
        self.counts = {f"web-{number}": 1 for number in range(names)}
        self.ledger = Ledger()
        self.worker = self.ledger.join()
        self.reporter = Reporter(self.sources, self.take, lambda: {"open": {"web": 1}})

    def sources(self) -> Iterator[Source]:
        for name, value in list(self.counts.items()):
            yield name, value, lambda name=name, value=value: [counter(value, name)]  # type: ignore[misc]  # defaults

    def take(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self.worker.take(message)

    async def finished(self, report_id: int) -> None:
        while not any(each["id"] == report_id and "open" in each for each in self.messages):  # noqa: ASYNC110 - turns of the loop
            await asyncio.sleep(0)

    def total(self) -> float:
        return sum(
            value for value in self.ledger.merged()["connections"].values() if not isinstance(value, list)
        )


class TestReporter:
    def run(self, test: Callable[[], Any]) -> None:
        asyncio.run(test())

    def test_a_short_report_is_one_message_and_sent_at_once(self) -> None:
        async def test() -> None:
            told = Told(3)
            told.reporter.ask(7)
            (message,) = told.messages
            assert (message["id"], message["open"]) == (7, {"web": 1})
            assert told.total() == 3

        self.run(test)

    def test_a_long_one_leaves_turns_to_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reports, "SLICE_S", 0.0)

        async def test() -> None:
            told = Told(100)
            told.reporter.ask(1)
            assert len(told.messages) == 1
            assert "open" not in told.messages[0]
            told.counts["web-99"] = 5  # the list of sources was made; their values are of the moment
            await told.finished(1)
            assert len(told.messages) > 5
            told.reporter.ask(2)
            told.reporter.ask(3)
            told.reporter.ask(4)
            await told.finished(4)
            assert {message["id"] for message in told.messages} == {1, 2, 4}  # the newest only
            assert told.total() == 104

        self.run(test)

    def test_a_source_that_fails_ends_one_report_only(self, caplog: pytest.LogCaptureFixture) -> None:
        async def test() -> None:
            told = Told(1)
            good = told.sources
            told.reporter._sources = lambda: iter([("bad", None, lambda: 1 / 0)])  # type: ignore[list-item,return-value]  # on purpose
            told.reporter.ask(1)
            assert told.messages == []
            assert "this is a defect" in caplog.text
            told.reporter._sources = good
            told.reporter.ask(2)
            assert told.total() == 1

        self.run(test)
