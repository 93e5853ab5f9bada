"""``ewma``: of two distinct backends drawn by weight, the one that would answer sooner.

Its *score* is the peak EWMA of the time to its response heads, times what is in flight and this one, for its
weight. Peak: a sample above the average replaces it at once; what is below pulls it down with the time
constant ``decay_s``. While nothing comes from a backend its average fades in the same way, so that one which
was slow once is asked again. The clock is the last moment anybody was observed at; the policy has none.

Two draws instead of the lowest of all: a full scan costs more than a pick may, and sends everybody to the
same backend until its next sample. Backends that were never measured come first, but with one exchange only
until it has answered: probed, not flooded.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import exp, inf
from typing import Final

from expressgateway.upstream.backend import Backend
from expressgateway.upstream.selection.draws import Draws, best_first

_TRIES: Final = 3  # draws of two, when both are unmeasured and have their probe under way
_MIN_LATENCY_S: Final = 1e-6  # averages fade, but two that have faded still differ by what is in flight


class _Latency:
    """What is known of one backend."""

    __slots__ = ("at", "average_s")

    def __init__(self) -> None:
        self.average_s = 0.0
        """0: not measured yet."""
        self.at = 0.0
        """When it was last observed (seconds, monotonic)."""


class Ewma:
    __slots__ = ("_backends", "_decay_s", "_draws", "_known", "_latencies", "_now")

    def __init__(
        self,
        backends: Sequence[Backend],
        decay_s: float,
        known: Mapping[str, _Latency] | None = None,
        now: float = 0.0,
    ) -> None:
        """``known``: by id, what another selection has learnt up to ``now``."""
        self._decay_s = decay_s
        self._now = now
        self._backends = [backend for backend in backends if backend.weight > 0]
        self._draws = Draws([backend.weight for backend in self._backends] or [1])
        # Those of weight 0 are measured too: their sessions go on, and they may come back.
        learnt = known or {}
        self._known = {backend.id: learnt.get(backend.id) or _Latency() for backend in backends}
        self._latencies = [self._known[backend.id] for backend in self._backends]

    def pick(self, key: bytes | None) -> Backend | None:
        backends = self._backends
        if len(backends) < 2:
            return backends[0] if backends else None
        for _ in range(_TRIES):
            at, other_at = self._draws.pair()
            one, other = backends[at], backends[other_at]
            one_score = self._score(one, self._latencies[at])
            other_score = self._score(other, self._latencies[other_at])
            if one_score < inf or other_score < inf:
                return other if other_score < one_score else one
        return other if other.in_flight * one.weight < one.in_flight * other.weight else one

    def others(self, picked: Backend) -> Iterator[Backend]:
        known = self._known
        return best_first(self._backends, lambda each: self._score(each, known[each.id]), picked)

    def rebuilt(self, backends: Sequence[Backend]) -> "Ewma":
        return Ewma(backends, self._decay_s, self._known, self._now)

    def observe(self, backend: Backend, seconds: float, now: float) -> None:
        latency = self._known.get(backend.id)
        if latency is None:
            return  # it has left
        self._now = max(self._now, now)
        if seconds >= latency.average_s or latency.average_s == 0.0:
            latency.average_s = max(seconds, _MIN_LATENCY_S)
        else:
            kept = exp(-max(now - latency.at, 0.0) / self._decay_s)
            latency.average_s = max(seconds + (latency.average_s - seconds) * kept, _MIN_LATENCY_S)
        latency.at = now

    def _score(self, backend: Backend, latency: _Latency) -> float:
        average = latency.average_s
        if average == 0.0:
            return inf if backend.in_flight else 0.0
        age = self._now - latency.at
        if age > 0.0:
            average = max(average * exp(-age / self._decay_s), _MIN_LATENCY_S)
        return average * (backend.in_flight + 1) / backend.weight
