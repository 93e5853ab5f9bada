"""Draws of chance, and orders of preference: what several policies are made of. Knows indices and weights.

``Draws`` draws by weight from cumulative sums: one, or two that are never the same.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heapify, heappop
from itertools import accumulate
from math import log
from random import random

from expressgateway.upstream.backend import Backend


class Draws:
    __slots__ = ("_cumulative", "_last", "_total", "_weights")

    def __init__(self, weights: Sequence[int]) -> None:
        """Of one weight or more, all above 0. Draws are indices into them."""
        # Floats, and exact: sums of weights are far below 2**53. bisect compares like with like faster.
        self._weights = [float(weight) for weight in weights]
        self._cumulative = list(accumulate(self._weights))
        self._total = self._cumulative[-1]
        self._last = len(self._weights) - 1

    def at(self, fraction: float) -> int:
        """The one whose share covers this point; from 0 to below 1."""
        return bisect_right(self._cumulative, fraction * self._total, 0, self._last)

    def pair(self) -> tuple[int, int]:
        """Two that differ, the second drawn by weight from all but the first. Of two weights or more."""
        last = self._last
        cumulative = self._cumulative
        one = bisect_right(cumulative, random() * self._total, 0, last)
        weight = self._weights[one]
        # The first one's share is cut out of the line, and what is above it moved up by its length.
        point = random() * (self._total - weight)
        if point >= cumulative[one] - weight:
            point += weight
        return one, bisect_right(cumulative, point, 0, last)


def exponential(weight: float) -> float:
    """A waiting time: of several, the shortest is each one's with a chance proportional to its weight."""
    return -log(1.0 - random()) / weight


def best_first(
    backends: Iterable[Backend], score: Callable[[Backend], float], picked: Backend
) -> Iterator[Backend]:
    """All but ``picked``, lowest score first, equals at random by weight. Sorts no further than it is asked.

    Backends have weight, all of them.
    """
    heap = [
        (score(backend), exponential(backend.weight), at, backend)
        for at, backend in enumerate(backends)
        if backend is not picked
    ]
    heapify(heap)
    while heap:
        yield heappop(heap)[3]
