"""Rates and quantiles from the difference of two looks at the same counters. No clock, no loop of its own.

A *look* is what the counters said at one moment. Nothing that was counted before the first look, by a worker
of another time, makes a rate: what goes backwards counts as standing still.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from expressgateway.control.ledger import Merged
from expressgateway.observe.counters import BUCKETS_S, Sample

SLICE_S: Final = 0.002
"""Work that others wait for is done in pieces of about this length."""
_ROWS: Final = 128  # between two looks at the clock: some tens of microseconds of work

RATE_WINDOW_S: Final = 3.0
QUANTILE_WINDOW_S: Final = 10.0

Labels = tuple[str, ...]


class Pace:
    """Gives the loop back now and then. To be asked for every piece of work that may be one of many."""

    __slots__ = ("_began", "_rows")

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._rows = 0

    def is_due(self) -> bool:
        self._rows += 1
        return self._rows % _ROWS == 0 and time.perf_counter() - self._began > SLICE_S

    async def rest(self) -> None:
        await asyncio.sleep(0)
        self._began = time.perf_counter()


class Look(NamedTuple):
    at: float
    """When the counters were read, monotonic seconds."""
    counts: Merged


async def summed(parts: Iterable[Iterable[Sample]], wanted: frozenset[str], pace: Pace) -> Merged:
    """The wanted families of all samples, those with the same labels added together.

    The samples must not change meanwhile: others run between two pieces of the work.
    """
    counts: Merged = {family: {} for family in wanted}
    for part in parts:
        for family, labels, value in part:
            if pace.is_due():
                await pace.rest()
            if family not in wanted:
                continue
            series = counts[family]
            known = series.get(labels)
            if known is None:
                series[labels] = value
            elif isinstance(known, list):
                if isinstance(value, list):
                    series[labels] = [one + other for one, other in zip(known, value, strict=True)]
            elif not isinstance(value, list):
                series[labels] = known + value
    return counts


class Looks:
    """The looks of the last seconds, at most one for each change of the counters."""

    __slots__ = ("_looks",)

    def __init__(self) -> None:
        self._looks: deque[Look] = deque(maxlen=32)

    def take(self, look: Look) -> None:
        """The same moment again is the same look, with what was added to it since."""
        if self._looks and self._looks[-1].at >= look.at:
            self._looks.pop()
        self._looks.append(look)
        while len(self._looks) > 2 and look.at - self._looks[1].at > QUANTILE_WINDOW_S:
            self._looks.popleft()
        if len(self._looks) == 2 and look.at - self._looks[0].at > 2 * QUANTILE_WINDOW_S:
            self._looks.popleft()  # nobody watched for long: its average says nothing of now

    def since(self, window_s: float) -> "Span | None":
        """What happened in the last `window_s` seconds, or somewhat more; None before there are two looks."""
        if len(self._looks) < 2:
            return None
        last = self._looks[-1]
        # A second early is near enough: looks are about a second apart, and never exactly.
        first = next((look for look in reversed(self._looks) if last.at - look.at > window_s - 0.5), None)
        return Span(first or self._looks[0], last)


class Span:
    """Two looks, and what lies between them."""

    __slots__ = ("_first", "_last", "seconds")

    def __init__(self, first: Look, last: Look) -> None:
        self._first = first.counts
        self._last = last.counts
        self.seconds = max(last.at - first.at, 1e-3)

    async def rates(self, family: str, key: Callable[[Labels], Labels], pace: Pace) -> dict[Labels, float]:
        """Per second, added up over all series to which `key` gives the same labels; no zeros."""
        before = self._first.get(family, {})
        found: dict[Labels, float] = {}
        for labels, value in self._last.get(family, {}).items():
            if pace.is_due():
                await pace.rest()
            known = before.get(labels, 0)
            if isinstance(value, list) or isinstance(known, list) or value <= known:
                continue
            name = key(labels)
            found[name] = found.get(name, 0.0) + (value - known) / self.seconds
        return found

    async def histograms(
        self, family: str, key: Callable[[Labels], Labels], pace: Pace
    ) -> dict[Labels, list[float]]:
        """The counts by bucket, without the sum, that `key` gives the same labels."""
        before = self._first.get(family, {})
        found: dict[Labels, list[float]] = {}
        for labels, value in self._last.get(family, {}).items():
            if pace.is_due():
                await pace.rest()
            known = before.get(labels)
            if not isinstance(value, list):
                continue
            counts = value[:-1]
            if isinstance(known, list):
                counts = [max(0.0, one - other) for one, other in zip(counts, known[:-1], strict=True)]
            name = key(labels)
            total = found.get(name)
            found[name] = (
                counts if total is None else [one + other for one, other in zip(total, counts, strict=True)]
            )
        return found


def quantile(counts: Sequence[float], q: float) -> float | None:
    """The value, in seconds, below which a share `q` of what was counted lies; None of nothing.

    As Prometheus's histogram_quantile: even within a bucket; beyond the last bound, that bound.
    """
    total = sum(counts)
    if not total:
        return None
    rank = q * total
    below = 0.0
    lower = 0.0
    for upper, count in zip(BUCKETS_S, counts, strict=False):
        if count and below + count >= rank:
            return lower + (upper - lower) * max(0.0, rank - below) / count
        below += count
        lower = upper
    return BUCKETS_S[-1]


def quantiles(counts: Sequence[float] | None) -> dict[str, float | None]:
    """p50, p90 and p99 in milliseconds, as they are shown."""
    return {
        name: None if counts is None or (value := quantile(counts, q)) is None else round(value * 1000, 3)
        for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    }


def together(histograms: Mapping[Labels, Sequence[float]]) -> list[float] | None:
    """All of them as one; None of none."""
    rows = list(histograms.values())
    return [sum(column) for column in zip(*rows, strict=True)] if rows else None
