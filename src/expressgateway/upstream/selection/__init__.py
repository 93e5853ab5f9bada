"""Who is next: one file a policy, all behind ``Selection``.

A selection is built from a set of backends and knows nothing of health: ``pick`` names its choice, and the
pool walks ``others`` when that one cannot be used. Backends of weight 0 are never picked for new work.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from expressgateway.upstream.backend import Backend
from expressgateway.upstream.selection.round_robin import RoundRobin
from expressgateway.upstream.selection.weighted_round_robin import WeightedRoundRobin


class Selection(Protocol):
    def pick(self, key: bytes | None) -> Backend | None:
        """The next choice, or ``None`` when no backend has any weight. Costs less than 2 us."""

    def others(self, picked: Backend) -> Iterable[Backend]:
        """Every other backend with weight, best first, each once."""

    def rebuilt(self, backends: Sequence[Backend]) -> "Selection":
        """The same policy over another set, keeping what it has learnt of those that stay."""


POLICIES: dict[str, Callable[[Sequence[Backend]], Selection]] = {
    "round_robin": RoundRobin,
    "weighted_round_robin": WeightedRoundRobin,
}

__all__ = ["POLICIES", "RoundRobin", "Selection", "WeightedRoundRobin"]
