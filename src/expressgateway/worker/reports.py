"""What a worker tells the supervisor of its counters: what has changed, and a little at a time.

A *source* is a thing that counts: a listener, a route, a backend. Its *mark* is equal to the last one's if
nothing of it has changed; then it is not looked at any closer. A *series* is one of its samples; it is named
once, and has a number from then on. Of a counter or histogram the increase is told, of a gauge the value.

A report is made in turns of the loop, each of which looks at sources for ``SLICE_S`` at most and sends what
it found as a message of its own: however many backends there are, no request waits longer for it.
"""

import asyncio
import logging
import time
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Final

from expressgateway.control.channel import Message, pack_bytes
from expressgateway.observe.counters import FAMILIES, PLACES, Sample

log = logging.getLogger(__name__)

SLICE_S: Final = 0.001
_LEAST_SOURCES: Final = 8  # in a turn, or a clock that jumps would stop the report

Source = tuple[Hashable, object, Callable[[], Iterable[Sample]]]
"""What it is, its mark (None: to be looked at every time), and its samples. Its samples are taken at once;
between two sources everything may change."""

_Key = tuple[str, tuple[str, ...]]


class _Series:
    """What was told of one sample."""

    __slots__ = ("is_gauge", "number", "told")

    def __init__(self, number: int, is_gauge: bool) -> None:
        self.number = number
        self.is_gauge = is_gauge
        self.told: float | list[float] = 0


class _Known:
    """What was told of one source."""

    __slots__ = ("mark", "seen", "series")

    def __init__(self) -> None:
        self.mark: object = None
        self.seen = 0
        self.series: dict[_Key, _Series] = {}


class Changes:
    """Finds what has changed since the last report. As large as what is counted."""

    __slots__ = ("_changes", "_gone", "_known", "_new", "_next", "_places", "_round")

    def __init__(self) -> None:
        self._known: dict[Hashable, _Known] = {}
        self._next = 0
        self._round = 0
        # Since the last `take`
        self._new: list[list[object]] = []
        self._places = array("I")
        self._changes = array("d")
        self._gone: list[int] = []

    def look(self, source: Source) -> None:
        """Compare a source with what was told of it."""
        key, mark, samples = source
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _Known()
        elif mark is not None and known.mark == mark:
            known.seen = self._round
            return
        known.mark = mark
        known.seen = self._round
        series = known.series
        found = 0
        taken = list(samples())
        for family, labels, value in taken:
            found += 1
            one = series.get((family, labels))
            if one is None:
                one = series[family, labels] = self._begin(family, labels)
            if isinstance(value, list):
                self._count_all(one, value)
            elif value != one.told:
                self._count(one, value)
        if found < len(series):
            here = {(family, labels) for family, labels, _ in taken}
            for missing in [each for each in series if each not in here]:
                self._gone.append(series.pop(missing).number)

    def _begin(self, family: str, labels: tuple[str, ...]) -> _Series:
        number = self._next
        self._next += 1
        self._new.append([number, family, list(labels)])
        return _Series(number, FAMILIES[family].kind == "gauge")

    def _count(self, one: _Series, value: float) -> None:
        told = one.told
        if isinstance(told, list):
            return
        self._places.append(one.number * PLACES)
        # A count that is less than before has begun anew.
        self._changes.append(value if one.is_gauge or value < told else value - told)
        one.told = value

    def _count_all(self, one: _Series, counts: list[float]) -> None:
        told = one.told
        if not isinstance(told, list):
            told = [0] * len(counts)
        if counts != told:
            place = one.number * PLACES
            for now, before in zip(counts, told, strict=True):
                if now != before:
                    self._places.append(place)
                    self._changes.append(now - before)
                place += 1
        one.told = counts

    def finish(self) -> None:
        """All sources were looked at: those that were not there are gone."""
        for key in [key for key, known in self._known.items() if known.seen != self._round]:
            self._gone += (series.number for series in self._known.pop(key).series.values())
        self._round += 1

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to `take`."""
        return not (self._new or self._places or self._gone)

    def take(self) -> Message:
        """What was found since the last call, as parts of a message."""
        part: Message = {
            "new": self._new,
            "places": pack_bytes(self._places.tobytes()),
            "changes": pack_bytes(self._changes.tobytes()),
            "gone": self._gone,
        }
        self._new, self._places, self._changes, self._gone = [], array("I"), array("d"), []
        return part


class Reporter:
    """Answers ``collect``. `sources` may be left half-way, or continued after anything has changed."""

    __slots__ = ("_changes", "_id", "_last", "_loop", "_next_id", "_send", "_sources", "_walk")

    def __init__(
        self,
        sources: Callable[[], Iterator[Source]],
        send: Callable[[Message], None],
        last: Callable[[], Message],
    ) -> None:
        """``last``: what the last message of a report says besides."""
        self._sources = sources
        self._send = send
        self._last = last
        self._loop = asyncio.get_running_loop()
        self._changes = Changes()
        self._walk: Iterator[Source] | None = None
        self._id = 0
        self._next_id: int | None = None  # of a report asked for while another is made; the newest only

    @property
    def is_busy(self) -> bool:
        """Whether a report is being made."""
        return self._walk is not None

    def ask(self, report_id: int) -> None:
        """Have a report made. Its first messages are sent before this returns."""
        if self._walk is not None:
            self._next_id = report_id
            return
        self._id = report_id
        self._walk = self._sources()
        self._turn()

    def _turn(self) -> None:
        try:
            self._go_on()
        except Exception:
            self._walk = None  # the next report begins anew
            log.exception("counters could not be reported: this is a defect")

    def _go_on(self) -> None:
        walk = self._walk
        if walk is None:
            return
        changes = self._changes
        until = time.perf_counter() + SLICE_S
        left = _LEAST_SOURCES
        for source in walk:
            changes.look(source)
            left -= 1
            if left <= 0 and time.perf_counter() >= until:
                if not changes.is_empty:
                    self._send({"type": "samples", "id": self._id, **changes.take()})
                self._loop.call_soon(self._turn)
                return
        changes.finish()
        self._send({"type": "samples", "id": self._id, **changes.take(), **self._last()})
        self._walk = None
        if self._next_id is not None:
            next_id, self._next_id = self._next_id, None
            self.ask(next_id)
