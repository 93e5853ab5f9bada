"""What any selection policy must hold to, as one function: ``check_selection_policy(make)``.

For the tests of every policy here and of everyone who writes another one. ``make`` is what the configuration
would name: a callable that builds a selection from a sequence of backends. A broken promise raises
``ConformanceError`` with a sentence; nothing is returned. The checks need no clock, no sockets and no pool.

Words: a policy is *exact* if over one *round* - as many picks as the weights, divided by their greatest
common divisor, add up to - every backend has exactly its share; it is *smooth* if no backend is ever more
than one turn ahead of or behind its share. Policies of chance or of load are neither: they are held to the
shares within ``tolerance`` over many picks. A *determined* policy gives the same picks to two selections
built alike.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from math import gcd
from typing import Final

from expressgateway.upstream.backend import Backend, BackendSettings
from expressgateway.upstream.selection import Selection

Make = Callable[[Sequence[Backend]], Selection]

MANY_PICKS: Final = 100_000
WEIGHTS: Final = ((1, 1), (1, 1, 1, 1, 1), (5, 1, 1), (1, 2, 3, 4), (10, 20, 30), (7, 1), (1, 100))
_MARGIN: Final = 1e-6  # of a turn: shares are fractions


class ConformanceError(AssertionError):
    """The policy broke a promise; the text says which, with the weights that showed it."""


def backend(id_: str, weight: int = 1) -> Backend:
    """A backend for a check, with no connections."""
    settings = BackendSettings(
        id=id_, host="127.0.0.1", port=1, protocol="tcp", weight=weight, tls=None, send_proxy=None
    )
    return Backend(settings, ("127.0.0.1", 1), id_)


def backends(*weights: int) -> list[Backend]:
    """``b0``, ``b1``... of these weights."""
    return [backend(f"b{at}", weight) for at, weight in enumerate(weights)]


def check_selection_policy(
    make: Make,
    *,
    is_exact: bool = True,
    is_smooth: bool = True,
    is_determined: bool = True,
    tolerance: float = 0.02,
    picks: int = MANY_PICKS,
) -> None:
    """Put a policy through every rule that holds for its kind.

    ``tolerance`` is relative to each share, over ``picks`` picks, for a policy that is not exact. Raises
    ``ConformanceError``.
    """
    _check_empty(make)
    _check_weight_zero(make)
    _check_others(make)
    _check_health_is_unknown(make, is_determined)
    _check_shares(make, is_exact, tolerance, picks)
    if is_smooth:
        _check_smooth(make)
    if is_determined:
        _check_determined(make)
    _check_set_changes(make, is_exact, tolerance, picks)


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise ConformanceError(sentence)


def _take(selection: Selection, number: int) -> list[Backend]:
    taken = []
    for at in range(number):
        picked = selection.pick(b"key %d" % at)
        if picked is None:
            raise ConformanceError("a pick gave nothing although there are backends with weight")
        taken.append(picked)
    return taken


def _round_of(weights: Sequence[int]) -> int:
    return sum(weights) // gcd(*weights)


def _check_empty(make: Make) -> None:
    for selection in (make(()), make(backends(0, 0)), make(backends(1)).rebuilt(())):
        _require(selection.pick(None) is None, "a pick from no backends must give nothing")
    stray = backend("stray")
    _require(list(make(()).others(stray)) == [], "there are no others where there is nobody")


def _check_weight_zero(make: Make) -> None:
    set_ = backends(3, 0, 1)
    selection = make(set_)
    taken = set(_take(selection, 200))
    _require(set_[1] not in taken, "a backend of weight 0 was picked for new work")
    _require(set_[1] not in set(selection.others(set_[0])), "a backend of weight 0 is among the others")
    alone = make(backends(0, 1))
    _require({each.id for each in _take(alone, 10)} == {"b1"}, "the only backend with weight gets all work")


def _check_others(make: Make) -> None:
    for weights in WEIGHTS:
        set_ = backends(*weights)
        selection = make(set_)
        for picked in _take(selection, 2 * _round_of(weights) + 3)[-5:]:
            others = list(selection.others(picked))
            _require(picked not in others, f"{weights}: the picked one is among the others")
            _require(len(others) == len(set(others)), f"{weights}: one of the others came twice")
            _require(set(others) | {picked} == set(set_), f"{weights}: the others are not all the others")


def _check_health_is_unknown(make: Make, is_determined: bool) -> None:
    """``pick`` names its choice; whether that one can be used is for the pool to know."""
    set_ = backends(1, 1, 1)
    selection = make(set_)
    for each in set_:
        each.is_available = False
    _require(len(set(_take(selection, 300))) == 3, "a pick must not look at health")
    if is_determined:
        sick, well = make(backends(2, 1, 1)), make(backends(2, 1, 1))
        expected = [each.id for each in _take(well, 40)]
        first = sick.pick(b"key 0")
        if first is None:
            raise ConformanceError("a pick gave nothing although there are backends with weight")
        first.is_available = False
        found = [first.id, *(each.id for each in _take(sick, 39))]
        _require(found == expected, "the picks changed when a backend's health did")


def _check_shares(make: Make, is_exact: bool, tolerance: float, picks: int) -> None:
    for weights in WEIGHTS:
        set_ = backends(*weights)
        selection = make(set_)
        total = sum(weights)
        if is_exact:
            step = _round_of(weights)
            for number in range(3):
                counts = Counter(_take(selection, step))
                for each, weight in zip(set_, weights, strict=True):
                    _require(
                        counts[each] * total == weight * step,
                        f"{weights}: {each.id} had {counts[each]} of {step} turns in round {number + 1}",
                    )
        counts = Counter(_take(selection, picks))
        for each, weight in zip(set_, weights, strict=True):
            share = picks * weight / total
            _require(
                abs(counts[each] - share) <= max(share * tolerance, 1),
                f"{weights}: {each.id} had {counts[each]} of {picks} picks, its share is {share:.0f}",
            )


def _check_smooth(make: Make) -> None:
    for weights in WEIGHTS:
        _require_smooth(_take(make(backends(*weights)), 3 * _round_of(weights)), weights, f"{weights}", 1.0)


def _require_smooth(taken: Sequence[Backend], weights: Sequence[int], what: str, turns: float) -> None:
    """Nobody is ever more than ``turns`` ahead of or behind its share of the picks so far."""
    total = sum(weights)
    counts: Counter[str] = Counter()
    known = {each.id: each.weight for each in taken}
    for number, each in enumerate(taken, 1):
        counts[each.id] += 1
        for id_, weight in known.items():
            ahead = counts[id_] - number * weight / total
            _require(
                abs(ahead) <= turns + _MARGIN, f"{what}: {id_} is {ahead:+.2f} turns off after {number} picks"
            )


def _check_determined(make: Make) -> None:
    for weights in WEIGHTS:
        one, other = make(backends(*weights)), make(backends(*weights))
        _require(
            [each.id for each in _take(one, 250)] == [each.id for each in _take(other, 250)],
            f"{weights}: two selections built alike pick differently",
        )


def _check_set_changes(make: Make, is_exact: bool, tolerance: float, picks: int) -> None:
    """After a change - at any point of a round - the new set's shares hold, from the start."""
    changes: tuple[tuple[dict[str, int], dict[str, int]], ...] = (
        ({"a": 1, "b": 1}, {"a": 1, "b": 1}),
        ({"a": 1, "b": 1}, {"a": 1, "b": 1, "c": 1}),
        ({"a": 1, "b": 1, "c": 1}, {"a": 1, "c": 1}),
        ({"a": 1, "b": 1, "c": 1}, {"c": 1, "b": 1, "a": 1}),
        ({"a": 5, "b": 1, "c": 1}, {"a": 1, "b": 5, "c": 1}),
        ({"a": 100, "b": 1}, {"a": 1, "b": 1}),
        ({"a": 100, "b": 1}, {"c": 1, "b": 1}),
        ({"a": 100, "b": 100}, {"a": 1, "b": 2}),
        ({"a": 1, "b": 2}, {"a": 1, "b": 2, "c": 0}),
    )
    for before, after in changes:
        step = _round_of(list(before.values()))
        for used in sorted({0, 1, step // 2, step - 1, step, step + step // 3}):
            selection = make([backend(id_, weight) for id_, weight in before.items()])
            _take(selection, used)
            set_ = [backend(id_, weight) for id_, weight in after.items()]
            selection = selection.rebuilt(set_)
            what = f"{before} to {after} after {used} picks"
            _check_after_a_change(selection, set_, what, is_exact, tolerance, picks)


def _check_after_a_change(
    selection: Selection, set_: Sequence[Backend], what: str, is_exact: bool, tolerance: float, picks: int
) -> None:
    weights = [each.weight for each in set_]
    taken = _take(selection, max(picks // 50, 10 * sum(weights)))
    _require(set(taken) <= set(set_), f"{what}: a backend that left was picked")
    if is_exact:
        # What was learnt of those that stay may shift a turn or two, and no more than that.
        _require_smooth(taken, weights, what, 2.0)
        return
    counts = Counter(taken)
    for each in set_:
        share = len(taken) * each.weight / sum(weights)
        _require(
            abs(counts[each] - share) <= max(share * tolerance * 7, 3),
            f"{what}: {each.id} had {counts[each]} of {len(taken)} picks, its share is {share:.0f}",
        )
