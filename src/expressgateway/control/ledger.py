"""The counts of all workers as one, across the deaths of workers.

A *series* is a family with one set of labels. Whoever counts has a *contribution* of its own: a worker, by
what it reports, and the supervisor itself. A series is the sum of its contributions, and is kept up to date
as they come, so that reading it costs nothing.

The counters of a dead worker stay in their series, so that none ever goes backwards; its gauges go. What a
worker counted after its last report is lost with it: reports are taken every second. A series that every
living worker has given up, because its backend or route is configured no more, goes as a whole.
"""

import time
from array import array
from collections.abc import Collection, Iterator
from typing import Any, Final

from expressgateway.control.channel import unpack_bytes
from expressgateway.observe.counters import (
    BUCKETS_S,
    FAMILIES,
    PLACES,
    SUPERVISOR_FAMILIES,
    Family,
    Sample,
)

MAX_RETIRED_SERIES: Final = 100_000
"""Series of dead workers that are kept; reloads that rename backends would else add to them for ever."""

Value = float | list[float]
Merged = dict[str, dict[tuple[str, ...], Value]]

_HISTOGRAM_LENGTH: Final = len(BUCKETS_S) + 2  # a count for each bucket and one beyond, and the sum


class Series:
    """One line of the exposition, or a histogram's lines."""

    __slots__ = ("family", "has_dead", "holders", "labels", "text", "value")

    def __init__(self, family: str, labels: tuple[str, ...], value: Value) -> None:
        self.family = family
        self.labels = labels
        self.value = value
        self.holders = 0
        """Living contributions."""
        self.has_dead = False
        """Dead ones count in it, and it is kept for their sake."""
        self.text = ""
        """Whoever renders it keeps the text here; empty: it has changed since."""


class Table:
    """The series of one family."""

    __slots__ = ("_ordered", "description", "series")

    def __init__(self, description: Family) -> None:
        self.description = description
        self.series: dict[tuple[str, ...], Series] = {}
        self._ordered: list[Series] | None = None

    def ordered(self) -> list[Series]:
        """By labels. Not to be changed; a series that comes or goes makes another list."""
        if self._ordered is None:
            self._ordered = [self.series[labels] for labels in sorted(self.series)]
        return self._ordered

    def add(self, series: Series) -> None:
        self.series[series.labels] = series
        self._ordered = None

    def remove(self, series: Series) -> None:
        del self.series[series.labels]
        self._ordered = None


class Ledger:
    """All series there are."""

    __slots__ = ("_retired", "recorded_at", "tables")

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {
            name: Table(family) for name, family in {**FAMILIES, **SUPERVISOR_FAMILIES}.items()
        }
        """By the name of the family, in the order of the catalogue."""
        self.recorded_at = time.monotonic()
        """When a worker's counts last came, monotonic seconds."""
        self._retired = 0  # series that are kept for the sake of dead workers

    def join(self) -> "Contribution":
        """Somebody begins to count."""
        return Contribution(self)

    def merged(self, families: Collection[str] | None = None) -> Merged:
        """A copy of everything, or of these families."""
        names = self.tables if families is None else families
        return {
            name: {series.labels: _copy(series.value) for series in self.tables[name].series.values()}
            for name in names
            if self.tables[name].series
        }

    def walk(self, families: Collection[str]) -> Iterator[Sample]:
        """Of these families, sample by sample: for who does it piece by piece."""
        for name in families:
            for series in self.tables[name].ordered():
                yield name, series.labels, _copy(series.value)

    # -- for contributions

    def hold(self, family: str, labels: tuple[str, ...]) -> Series | None:
        """The series, one holder more; None if no family describes it."""
        table = self.tables.get(family)
        if table is None or len(labels) != len(table.description.labels):
            return None
        series = table.series.get(labels)
        if series is None:
            is_histogram = table.description.kind == "histogram"
            series = Series(family, labels, [0.0] * _HISTOGRAM_LENGTH if is_histogram else 0.0)
            table.add(series)
        series.holders += 1
        return series

    def let_go(self, series: Series, *, has_died: bool) -> None:
        """One holder less. `has_died`: what it counted is to stay."""
        table = self.tables[series.family]
        series.holders -= 1
        if (
            has_died
            and not series.has_dead
            and table.description.kind != "gauge"
            and self._retired < MAX_RETIRED_SERIES
        ):
            series.has_dead = True
            self._retired += 1
        if not series.holders and not (has_died and series.has_dead):
            table.remove(series)
            self._retired -= series.has_dead


class Contribution:
    """What one counts. After `retire` everything else does nothing."""

    __slots__ = ("_by_key", "_by_number", "_gauges", "_has_ended", "_ledger", "_next", "_round", "_seen")

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._by_number: dict[int, Series | None] = {}  # as many as a worker has; None: not described
        self._gauges: dict[int, float] = {}  # of these: what is in the series
        self._has_ended = False
        # The supervisor's own
        self._by_key: dict[tuple[str, tuple[str, ...]], int] = {}
        self._next = 0
        self._seen: dict[int, int] = {}
        self._round = 0

    # -- a worker's report

    def take(self, message: dict[str, Any]) -> None:
        """A part of a report (`worker.reports`).

        Raises `ValueError`, `TypeError`, `KeyError` or `IndexError` for nonsense.
        """
        if self._has_ended:
            return
        for number, family, labels in message["new"]:
            if number in self._by_number or not isinstance(number, int):
                raise ValueError(f"series {number!r} is named twice")
            if not isinstance(family, str) or not all(isinstance(label, str) for label in labels):
                raise ValueError(f"series {number} has no name")
            self._begin(number, family, tuple(labels))
        places = array("I", unpack_bytes(message["places"]))
        changes = array("d", unpack_bytes(message["changes"]))
        by_number = self._by_number
        for place, change in zip(places, changes, strict=True):
            series = by_number[place // PLACES]
            if series is None:
                continue
            total = series.value
            if isinstance(total, list):
                if not change >= 0:
                    raise ValueError(f"a histogram of {series.family} cannot change by {change}")
                total[place % PLACES] += change
                series.text = ""
            else:
                self._change(place // PLACES, series, total, change)
        self._ledger.recorded_at = time.monotonic()
        for number in message["gone"]:
            self._end(number, has_died=False)

    def _begin(self, number: int, family: str, labels: tuple[str, ...]) -> None:
        series = self._by_number[number] = self._ledger.hold(family, labels)
        if series is not None and self._ledger.tables[family].description.kind == "gauge":
            self._gauges[number] = 0

    def _change(self, number: int, series: Series, total: float, change: float) -> None:
        before = self._gauges.get(number)
        if before is not None:
            self._gauges[number] = change
            # Alone it is exact: a sum of fractions would keep the dust of all that it once held.
            series.value = change if total == before else total - before + change
        elif change >= 0:
            series.value = total + change
        else:
            raise ValueError(f"a counter of {series.family} cannot change by {change}")
        series.text = ""

    def _end(self, number: int, *, has_died: bool) -> None:
        series = self._by_number.pop(number)
        if series is None:
            return
        before = self._gauges.pop(number, None)
        if before is not None and not isinstance(series.value, list):
            series.value -= before
            series.text = ""
        self._ledger.let_go(series, has_died=has_died)

    def retire(self) -> None:
        """It is dead: its counters stay, its gauges go. Idempotent."""
        self._has_ended = True
        for number in list(self._by_number):
            self._end(number, has_died=True)

    # -- the supervisor's own samples

    def begin_round(self) -> None:
        """All samples there are follow, each by `set`, and then `end_round`."""
        self._round += 1

    def set(self, sample: Sample) -> None:
        """A sample as it is now, of a family that is no histogram. Of the same name, the last one counts."""
        family, labels, value = sample
        if isinstance(value, list):
            raise TypeError(f"{family} is a histogram")
        key = family, labels
        number = self._by_key.get(key)
        if number is None:
            number = self._by_key[key] = self._next
            self._next += 1
            self._begin(number, family, labels)
            self._gauges[number] = 0  # a counter of one holder is told as it stands
        self._seen[number] = self._round
        series = self._by_number[number]
        if self._gauges[number] != value and series is not None and not isinstance(series.value, list):
            self._change(number, series, series.value, value)

    def end_round(self) -> None:
        """What was not set in this round is gone."""
        for key, number in list(self._by_key.items()):
            if self._seen[number] != self._round:
                del self._by_key[key], self._seen[number]
                self._end(number, has_died=False)


def _copy(value: Value) -> Value:
    return list(value) if isinstance(value, list) else value
