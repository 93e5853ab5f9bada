"""Who is next: one file a policy, all behind ``Selection``.

A selection is built from a set of backends and knows nothing of health: ``pick`` names its choice, and the
pool walks ``others`` when that one cannot be used. Backends of weight 0 are never picked for new work.

What only some policies can do is asked for by ``isinstance`` once, when the pool takes a selection into use:
``Gradual`` (its table is built in steps), ``Measuring`` (it wants latencies), ``Sessions`` (it remembers).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Protocol, cast, runtime_checkable

from expressgateway.upstream.backend import Backend
from expressgateway.upstream.selection.ewma import Ewma
from expressgateway.upstream.selection.least_connections import LeastConnections
from expressgateway.upstream.selection.least_requests import LeastRequests
from expressgateway.upstream.selection.maglev import Maglev
from expressgateway.upstream.selection.power_of_two import PowerOfTwo
from expressgateway.upstream.selection.ring_hash import RingHash
from expressgateway.upstream.selection.round_robin import RoundRobin
from expressgateway.upstream.selection.session_affinity import SessionAffinity
from expressgateway.upstream.selection.uniform import Uniform
from expressgateway.upstream.selection.weighted_random import WeightedRandom
from expressgateway.upstream.selection.weighted_round_robin import WeightedRoundRobin


@dataclass(frozen=True, slots=True)
class Balancing:
    """``[load_balancing]``, compiled."""

    policy: str = "round_robin"
    table_size: int = 65537
    """``maglev``, ``session_affinity``: entries, a prime."""
    virtual_nodes: int = 160
    """``ring_hash``: points for each unit of weight."""
    decay_s: float = 10.0
    """``ewma``."""
    slow_start_s: float = 0.0
    """The pool's: in this time a backend that joined or recovered grows to its full share; 0: at once."""
    has_cookie: bool = False
    """``session_affinity``: keys are the tokens of our cookie; else whatever ``hash_key`` names."""
    secret: bytes = b""
    """``session_affinity``: what tokens are made with; the same for all workers."""


class Selection(Protocol):
    def pick(self, key: bytes | None) -> Backend | None:
        """The next choice, or ``None`` when no backend has any weight. Costs less than 2 us at 100 backends.

        ``key``: what consistent policies go by; ``None``: the request has none, and they choose at random.
        """

    def others(self, picked: Backend) -> Iterable[Backend]:
        """Every other backend with weight, best first, each once. Lazy where sorting them all is dear."""

    def rebuilt(self, backends: Sequence[Backend]) -> "Selection":
        """The same policy over another set, keeping what it has learnt of those that stay."""


@runtime_checkable
class Gradual(Protocol):
    """A selection whose table takes long to build: picks go by the old one until it is done."""

    def advance(self, steps: int) -> bool:
        """Build on for so many steps (one step costs a few us at most). True when the table is in use."""


@runtime_checkable
class Measuring(Protocol):
    def observe(self, backend: Backend, seconds: float, now: float) -> None:
        """A response head came after ``seconds`` (or the attempt failed after them). ``now``: monotonic."""


@runtime_checkable
class Sessions(Protocol):
    def bound(self, key: bytes) -> Backend | None:
        """The backend this key is bound to, whatever its weight: it may have become 0 since."""

    def bind(self, key: bytes, backend: Backend) -> None:
        """From now on this key belongs there. Nothing to do where keys are tokens."""

    def token(self, backend: Backend) -> bytes:
        """What a client is given to be recognised by: nobody without the secret can make one."""


Make = Callable[[Sequence[Backend], Balancing], Selection]

POLICIES: dict[str, Make] = {
    "round_robin": lambda backends, _: RoundRobin(backends),
    "weighted_round_robin": lambda backends, _: WeightedRoundRobin(backends),
    "random": lambda backends, _: Uniform(backends),
    "weighted_random": lambda backends, _: WeightedRandom(backends),
    "least_connections": lambda backends, _: LeastConnections(backends),
    "least_requests": lambda backends, _: LeastRequests(backends),
    "power_of_two": lambda backends, _: PowerOfTwo(backends),
    "maglev": lambda backends, balancing: Maglev(backends, balancing.table_size),
    "ring_hash": lambda backends, balancing: RingHash(backends, balancing.virtual_nodes),
    "ewma": lambda backends, balancing: Ewma(backends, balancing.decay_s),
    "session_affinity": lambda backends, balancing: SessionAffinity(
        backends,
        Maglev(backends, balancing.table_size),
        has_cookie=balancing.has_cookie,
        secret=balancing.secret,
    ),
}


UNKEYED = frozenset(POLICIES) - {"maglev", "ring_hash", "session_affinity"}
"""Policies to which it makes no difference whether a backend that cannot be used is in their set."""


class SelectionError(ValueError):
    """There is no such policy, or it is none; the text is a sentence."""


def make_selection(balancing: Balancing, backends: Sequence[Backend]) -> Selection:
    """By the name of a policy, or of a class of somebody else's: ``package.module:Class``.

    For a set that had a selection of another policy, or of other settings; else ask that one for
    ``rebuilt``. Raises ``SelectionError``.
    """
    make = find_policy(balancing.policy)
    for backend in backends:
        backend.on_load = None  # of a policy that is no longer used
    return make(backends, balancing)


def find_policy(name: str) -> Make:
    """What makes selections of this policy. Raises ``SelectionError``; runs the code that is named."""
    return POLICIES[name] if name in POLICIES else _import_policy(name)


@cache
def _import_policy(name: str) -> Make:
    # Somebody else's code may raise anything; what it raises is told in a sentence.
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise SelectionError(f"there is no balancing policy {name!r}")
    try:
        found = import_module(module)
    except Exception as error:
        raise SelectionError(f"the balancing policy {name!r} cannot be imported: {_told(error)}") from error
    make = getattr(found, attribute, None)
    if make is None:
        raise SelectionError(f"the balancing policy {name!r}: {module} has no {attribute}")
    if not callable(make):
        raise SelectionError(f"the balancing policy {name!r} is not callable")
    try:
        made = make(())
    except Exception as error:
        raise SelectionError(
            f"the balancing policy {name!r} fails without backends: {_told(error)}"
        ) from error
    if missing := [word for word in ("pick", "others", "rebuilt") if not callable(getattr(made, word, None))]:
        raise SelectionError(f"the balancing policy {name!r} has no {' and no '.join(missing)}")
    return lambda backends, _: cast("Selection", make(backends))


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


__all__ = [
    "POLICIES",
    "UNKEYED",
    "Balancing",
    "Ewma",
    "Gradual",
    "LeastConnections",
    "LeastRequests",
    "Maglev",
    "Make",
    "Measuring",
    "PowerOfTwo",
    "RingHash",
    "RoundRobin",
    "Selection",
    "SelectionError",
    "SessionAffinity",
    "Sessions",
    "Uniform",
    "WeightedRandom",
    "WeightedRoundRobin",
    "find_policy",
    "make_selection",
]
