"""Round robin: each in turn, in the order of the configuration. With weights, the smooth weighted kind."""

from collections.abc import Iterator, Sequence

from expressgateway.upstream.backend import Backend
from expressgateway.upstream.selection.weighted_round_robin import WeightedRoundRobin


class RoundRobin:
    __slots__ = ("_backends", "_next", "_weighted")

    def __init__(self, backends: Sequence[Backend], turns: Sequence[str] = ()) -> None:
        """``turns``: ids in the order of their coming turns, so that a changed set goes on from there."""
        self._backends = [backend for backend in backends if backend.weight > 0]
        self._weighted = (
            WeightedRoundRobin(self._backends) if len({b.weight for b in self._backends}) > 1 else None
        )
        index_of = {backend.id: index for index, backend in enumerate(self._backends)}
        self._next = next((index_of[id_] for id_ in turns if id_ in index_of), 0)

    def pick(self, key: bytes | None) -> Backend | None:
        if self._weighted is not None:
            return self._weighted.pick(key)
        backends = self._backends
        if not backends:
            return None
        at = self._next
        self._next = at + 1 if at + 1 < len(backends) else 0
        return backends[at]

    def others(self, picked: Backend) -> Iterator[Backend]:
        backends = self._backends
        start = backends.index(picked) + 1 if picked in backends else 0
        for offset in range(len(backends)):
            backend = backends[(start + offset) % len(backends)]
            if backend is not picked:
                yield backend

    def rebuilt(self, backends: Sequence[Backend]) -> "RoundRobin":
        at = self._next
        turns = [backend.id for backend in (*self._backends[at:], *self._backends[:at])]
        new = RoundRobin(backends, turns)
        if new._weighted is not None and self._weighted is not None:
            new._weighted = self._weighted.rebuilt(new._backends)
        return new
