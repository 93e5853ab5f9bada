"""Smooth weighted round robin.

Each pick adds every backend's weight to its credit, takes the largest credit, and subtracts the sum of
weights from the winner: shares are exact over a round, and a heavy backend's turns are spread, not bunched.

A round has sum/gcd(weights) picks and ends with the credits it began with. So the first round is computed
pick by pick and remembered, and every later pick is a look-up. Rounds too long to remember are computed.
"""

from collections.abc import Iterator, Sequence
from math import gcd
from typing import Final

from expressgateway.upstream.backend import Backend

_MAX_ROUND: Final = 16384  # picks remembered, at most: 128 KiB


class WeightedRoundRobin:
    __slots__ = ("_backends", "_credits", "_next", "_round", "_start", "_steps", "_total", "_weights")

    def __init__(self, backends: Sequence[Backend], credits: dict[str, int] | None = None) -> None:  # noqa: A002
        self._backends = [backend for backend in backends if backend.weight > 0]
        self._weights = [backend.weight for backend in self._backends]
        self._total = sum(self._weights)
        carried = credits or {}
        self._credits = [carried.get(backend.id, 0) for backend in self._backends]
        if self._credits:
            # Credits always add up to nothing; a set that changed must not owe or own turns.
            self._credits[0] -= sum(self._credits)
        divisor = gcd(*self._weights) if self._weights else 1
        self._steps = self._total // divisor if self._total // divisor <= _MAX_ROUND else 0
        self._round: list[Backend] = []
        self._start = list(self._credits)
        self._next = 0

    def pick(self, key: bytes | None) -> Backend | None:
        at = self._next
        turns = self._round
        if self._steps and len(turns) == self._steps:
            # fast path: the round is known
            self._next = at + 1 if at + 1 < self._steps else 0
            return turns[at]
        if not self._backends:
            return None
        return self._compute()

    def _compute(self) -> Backend:
        credits = self._credits  # noqa: A001
        best = 0
        most = None
        for index, weight in enumerate(self._weights):
            credit = credits[index] + weight
            credits[index] = credit
            if most is None or credit > most:
                best = index
                most = credit
        credits[best] -= self._total
        backend = self._backends[best]
        if self._steps:
            self._round.append(backend)
            if len(self._round) == self._steps and credits != self._start:
                # Carried-over credits have not settled yet: begin the round again from here.
                self._round.clear()
                self._start = list(credits)
        return backend

    def others(self, picked: Backend) -> Iterator[Backend]:
        """By falling credit, as far as it was computed: heavy ones first."""
        order = sorted(range(len(self._backends)), key=lambda index: -self._credits[index])
        return (self._backends[index] for index in order if self._backends[index] is not picked)

    def rebuilt(self, backends: Sequence[Backend]) -> "WeightedRoundRobin":
        # Credits are exact only while a round is being computed; replay the known part of it.
        credits = list(self._start)  # noqa: A001
        if self._steps and len(self._round) == self._steps:
            index_of = {backend.id: index for index, backend in enumerate(self._backends)}
            for backend in self._round[: self._next]:
                for index, weight in enumerate(self._weights):
                    credits[index] += weight
                credits[index_of[backend.id]] -= self._total
        else:
            credits = self._credits  # noqa: A001
        # Credits are shares of the old sum of weights; as such they carry over to the new one.
        total = sum(backend.weight for backend in backends)
        carried = {
            backend.id: int(credit * total / self._total)
            for backend, credit in zip(self._backends, credits, strict=True)
        }
        return WeightedRoundRobin(backends, carried)
