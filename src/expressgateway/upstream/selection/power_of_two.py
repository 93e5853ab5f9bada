"""``power_of_two``: of two distinct backends drawn by weight, the one with fewer exchanges in flight.

In flight counts for the weight. Equals go to the first draw, so that an idle pool follows the weights. Almost
as even as the least loaded of all, without everybody - other workers, other gateways - turning to the same
one at the same moment.
"""

from collections.abc import Iterator, Sequence

from expressgateway.upstream.backend import Backend
from expressgateway.upstream.selection.draws import Draws, best_first


class PowerOfTwo:
    __slots__ = ("_backends", "_draws")

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = [backend for backend in backends if backend.weight > 0]
        self._draws = Draws([backend.weight for backend in self._backends] or [1])

    def pick(self, key: bytes | None) -> Backend | None:
        backends = self._backends
        if len(backends) < 2:
            return backends[0] if backends else None
        at, other_at = self._draws.pair()
        one, other = backends[at], backends[other_at]
        if other.in_flight * one.weight < one.in_flight * other.weight:
            return other
        return one

    def others(self, picked: Backend) -> Iterator[Backend]:
        return best_first(self._backends, _load, picked)

    def rebuilt(self, backends: Sequence[Backend]) -> "PowerOfTwo":
        return PowerOfTwo(backends)


def _load(backend: Backend) -> float:
    return backend.in_flight / backend.weight
