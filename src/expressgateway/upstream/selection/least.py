"""The least loaded of all: what ``least_connections`` and ``least_requests`` have in common.

*Load* is a count of the backend divided by its weight. The structure is a heap of entries ``(load, tie,
slot)`` that is put right lazily. A backend whose load has risen keeps its old entry until that comes to the
top; one whose load has fallen gets a second entry at once (``Backend.on_load``), and the first is void. So an
idle gateway's ``begin`` and ``end`` move nothing.

Ties are broken at random, by weight: ``tie`` is a moment at which the backend, were it to wait by chance,
would come next. A winner's new moment counts from its last one, which makes every pick among equals a fresh
draw (waiting times of this kind do not remember how long they have lasted).

A few backends are looked at one by one: that costs less than keeping order among them, and needs no hooks.
"""

from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from math import log
from operator import attrgetter
from random import choices, random
from typing import ClassVar, Self

from expressgateway.upstream.backend import Backend
from expressgateway.upstream.selection.draws import best_first, exponential

_Entry = tuple[float, float, int]


class Least:
    __slots__ = (
        "_backends",
        "_clock",
        "_entries",
        "_heap",
        "_is_few",
        "_is_weighted",
        "_max_entries",
        "_slots",
        "_weights",
    )

    count: "ClassVar[attrgetter[int]]"
    """What is counted."""
    MOST_SCANNED: ClassVar[int] = 12
    """Backends, up to which they are all looked at in every pick."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = [backend for backend in backends if backend.weight > 0]
        self._weights = [backend.weight for backend in self._backends]
        self._slots = {backend: slot for slot, backend in enumerate(self._backends)}
        self._is_weighted = len(set(self._weights)) > 1
        self._is_few = len(self._backends) <= self.MOST_SCANNED
        self._clock = 0.0
        self._max_entries = 2 * len(self._backends) + 64  # void ones included; then all are made anew
        if self._is_few:
            return
        self._fill()
        for backend in self._backends:
            backend.on_load = self._on_load

    def _scan(self) -> Backend | None:
        backends = self._backends
        if not backends:
            return None
        loads: list[float] = list(map(self.count, backends))
        weights = self._weights
        if self._is_weighted:
            loads = [load / weight for load, weight in zip(loads, weights, strict=True)]
        least = min(loads)
        number = loads.count(least)
        if number == 1:
            return backends[loads.index(least)]
        if not self._is_weighted:
            chosen = int(random() * number)
            at = loads.index(least)
            for _ in range(chosen):
                at = loads.index(least, at + 1)
            return backends[at]
        tied = [at for at, load in enumerate(loads) if load == least]
        (at,) = choices(tied, [weights[at] for at in tied])
        return backends[at]

    def pick(self, key: bytes | None) -> Backend | None:
        if self._is_few:
            return self._scan()
        heap = self._heap
        while heap:
            entry = heap[0]
            noted, tie, slot = entry
            if self._entries[slot] is not entry:
                heappop(heap)
                continue
            backend = self._backends[slot]
            weight = self._weights[slot]
            load = self.count(backend) / weight
            if load == noted and tie > self._clock:
                self._clock = tie
            # ``exponential`` in place: a call less in every pick.
            entry = (load, self._clock - log(1.0 - random()) / weight, slot)
            self._entries[slot] = entry
            heapreplace(heap, entry)
            if load == noted:
                return backend
        return None

    def others(self, picked: Backend) -> Iterator[Backend]:
        return best_first(self._backends, self._load, picked)

    def rebuilt(self, backends: Sequence[Backend]) -> Self:
        """Takes over from this one, which must not be picked from any more."""
        for backend in self._backends:
            # Not if somebody newer listens already.
            if backend.on_load == self._on_load:
                backend.on_load = None
        return type(self)(backends)

    def _load(self, backend: Backend) -> float:
        return self.count(backend) / backend.weight

    def _on_load(self, backend: Backend) -> None:
        slot = self._slots[backend]
        weight = self._weights[slot]
        load = self.count(backend) / weight
        if load < self._entries[slot][0]:
            entry = (load, self._clock + exponential(weight), slot)
            self._entries[slot] = entry
            heappush(self._heap, entry)
            if len(self._heap) > self._max_entries:
                self._fill()

    def _fill(self) -> None:
        self._entries: list[_Entry] = [
            (self.count(backend) / weight, self._clock + exponential(weight), slot)
            for slot, (backend, weight) in enumerate(zip(self._backends, self._weights, strict=True))
        ]
        self._heap = list(self._entries)
        heapify(self._heap)
