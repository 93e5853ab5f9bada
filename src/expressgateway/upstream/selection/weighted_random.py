"""``weighted_random``: each backend with a chance proportional to its weight, by an alias table.

Theory: scale the weights to a mean of 1 and give each backend a bin of that width. What a light one leaves
of its bin is filled by one heavy one, its *alias*. A draw then is a bin, chosen evenly, and a point in it:
below the mark the bin's own backend, above it the alias (Walker 1974; filled in one pass as by Vose 1991).
"""

from collections.abc import Iterator, Sequence
from random import random

from expressgateway.upstream.backend import Backend
from expressgateway.upstream.selection.draws import best_first


class WeightedRandom:
    __slots__ = ("_aliases", "_backends", "_marks")

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = [backend for backend in backends if backend.weight > 0]
        self._aliases = list(self._backends)
        number = len(self._backends)
        total = sum(backend.weight for backend in self._backends)
        # Whole numbers: a backend's bin is `total` wide, and it fills `weight * number` of all bins.
        left = [backend.weight * number for backend in self._backends]
        self._marks = [1.0] * number
        light = [at for at, part in enumerate(left) if part < total]
        heavy = [at for at, part in enumerate(left) if part > total]
        while light:
            at, giver = light.pop(), heavy[-1]
            self._marks[at] = left[at] / total
            self._aliases[at] = self._backends[giver]
            left[giver] -= total - left[at]
            if left[giver] <= total:
                heavy.pop()
                if left[giver] < total:
                    light.append(giver)

    def pick(self, key: bytes | None) -> Backend | None:
        backends = self._backends
        if not backends:
            return None
        point = random() * len(backends)
        at = int(point)
        return backends[at] if point - at < self._marks[at] else self._aliases[at]

    def others(self, picked: Backend) -> Iterator[Backend]:
        """In an order of chance by weight."""
        return best_first(self._backends, _no_score, picked)

    def rebuilt(self, backends: Sequence[Backend]) -> "WeightedRandom":
        return WeightedRandom(backends)


def _no_score(_: Backend) -> float:
    return 0.0
