"""The counts of all workers as one, across the deaths of workers.

A worker's *samples* die with it. The ledger keeps the last it sent and, when the worker is gone, adds its
counters and histograms to a base, so that no counter ever goes backwards; its gauges are dropped. What a
worker counted after its last report is lost with it: reports are taken every second.
"""

from collections.abc import Iterable
from typing import Any, Final

from expressgateway.observe.counters import BUCKETS_S, FAMILIES, Sample, merge

MAX_RETIRED_SERIES: Final = 100_000
"""Series of dead workers that are kept; reloads that rename backends would else add to them for ever."""

Merged = dict[str, dict[tuple[str, ...], float | list[float]]]

_HISTOGRAM_LENGTH: Final = len(BUCKETS_S) + 2  # a count for each bucket and one beyond, and the sum


def checked(samples: Any) -> list[Sample]:  # noqa: ANN401 - what JSON gave
    """Samples as a worker sent them, without those that no family describes. Never raises."""
    if not isinstance(samples, list):
        return []
    rows = (row for row in samples if isinstance(row, list) and len(row) == 3 and _is_sample(*row))
    return [(name, tuple(labels), value) for name, labels, value in rows]


def _is_sample(name: Any, labels: Any, value: Any) -> bool:  # noqa: ANN401 - as above
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None or not isinstance(labels, list) or len(labels) != len(family.labels):
        return False
    if not all(isinstance(label, str) for label in labels):
        return False
    if family.kind == "histogram":
        return isinstance(value, list) and len(value) == _HISTOGRAM_LENGTH and all(map(_is_number, value))
    return _is_number(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Ledger:
    """The last samples of each living worker, by its index, and what the dead ones left."""

    __slots__ = ("_latest", "_retired")

    def __init__(self) -> None:
        self._latest: dict[int, list[Sample]] = {}
        self._retired: Merged = {}

    def record(self, index: int, samples: list[Sample]) -> None:
        self._latest[index] = samples

    def retire(self, index: int) -> None:
        """The worker is dead: its counters stay, its gauges go. Idempotent."""
        latest = self._latest.pop(index, None)
        if latest is None:
            return
        kept = [sample for sample in latest if FAMILIES[sample[0]].kind != "gauge"]
        room = MAX_RETIRED_SERIES - sum(map(len, self._retired.values()))
        if room < len(kept):
            kept = [sample for sample in kept if sample[1] in self._retired.get(sample[0], ())]
        self._retired = merge([_rows(self._retired), kept])

    def merged(self, own: Iterable[Sample] = ()) -> Merged:
        """Everything as one; `own` are the supervisor's samples."""
        return merge([_rows(self._retired), *self._latest.values(), own])


def _rows(merged: Merged) -> Iterable[Sample]:
    return ((name, labels, value) for name, series in merged.items() for labels, value in series.items())
