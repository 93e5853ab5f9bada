"""What any selection policy must hold to, as one function: ``check_selection_policy(make, kind=...)``.

For the tests of every policy here and of everyone who writes another one. ``make`` is what the configuration
would name: a callable that builds a selection from a sequence of backends. A broken promise raises
``ConformanceError`` with a sentence; nothing is returned. The checks need no clock, no sockets and no pool.

Kinds of policies, and what they are held to beyond what all are:

- ``turns``: *exact* - over one *round*, as many picks as the weights divided by their greatest common divisor
  add up to, every backend has exactly its share; *smooth* - no backend is ever more than one turn ahead of or
  behind its share; *determined* - two selections built alike give the same picks.
- ``chance``: shares within ``tolerance``.
- ``least``: a busier backend is never picked while there is an idle one; equals are chosen among at random;
  under load, shares within ``tolerance``. Load is ``in_flight`` and ``open``, which change together here.
- ``sampled``: the same, of two backends; of more, the policy looks at some only.
- ``keyed``: the same key goes to the same backend, in whatever order the set is given; when one leaves, and
  comes back, at least ``stay`` of the others' keys stay where they are; when one joins, at most ``joins``
  times its share of the keys move, and of these no more than that between the others; shares within
  ``tolerance``.

What a policy can do beyond ``Selection`` (``Gradual``, ``Measuring``, ``Sessions``) is found out and checked.
"""

from expressgateway.upstream.selection.conformance.basics import (
    check_empty,
    check_health_is_unknown,
    check_others,
    check_weight_zero,
)
from expressgateway.upstream.selection.conformance.bench import (
    ConformanceError,
    Kind,
    Make,
    backend,
    backends,
    ready,
)
from expressgateway.upstream.selection.conformance.extras import (
    check_gradual,
    check_measuring,
    check_sessions,
)
from expressgateway.upstream.selection.conformance.keyed import check_keyed
from expressgateway.upstream.selection.conformance.shares import (
    check_changes,
    check_determined,
    check_load,
    check_shares,
    check_smooth,
)


def check_selection_policy(
    make: Make,
    *,
    kind: Kind = "turns",
    follows_weights: bool = True,
    tolerance: float = 0.02,
    picks: int = 100_000,
    stay: float = 0.97,
    joins: float = 1.3,
) -> None:
    """Put a policy through every rule that holds for its kind. Raises ``ConformanceError``.

    ``tolerance``: how far a backend may be from its share in ``picks`` picks, relative to the share; where
    that is less than chance allows (five standard deviations), chance counts. Policies that take turns are
    exact besides. ``follows_weights``: false for a policy that treats all weights above 0 alike.
    ``stay``, ``joins``: see ``keyed`` above; ``stay = 1.0`` is exact.
    """
    check_empty(make)
    check_weight_zero(make)
    check_others(make)
    check_health_is_unknown(make, is_determined=kind in ("turns", "keyed"))
    check_shares(make, kind, follows_weights, tolerance, picks)
    if kind == "turns":
        check_smooth(make)
        check_determined(make)
    elif kind in ("least", "sampled"):
        check_load(make, sees_all=kind == "least")
    elif kind == "keyed":
        check_determined(make)
        check_keyed(make, stay, joins)
    check_changes(make, kind, follows_weights, tolerance, picks)
    check_gradual(make)
    check_measuring(make)
    check_sessions(make)


__all__ = [
    "ConformanceError",
    "Kind",
    "Make",
    "backend",
    "backends",
    "check_selection_policy",
    "ready",
]
