"""Who gets how much: turns, chance and load."""

from collections import Counter
from collections.abc import Sequence
from math import sqrt
from typing import Final

from expressgateway.upstream.backend import Backend
from expressgateway.upstream.selection import Measuring, Selection
from expressgateway.upstream.selection.conformance.bench import (
    Drive,
    Kind,
    Make,
    backend,
    backends,
    load,
    must_pick,
    ready,
    require,
    round_of,
    take,
)

WEIGHTS: Final = ((1, 1), (1, 1, 1, 1, 1), (5, 1, 1), (1, 2, 3, 4), (10, 20, 30), (7, 1), (1, 100))
_CHANGES: Final[tuple[tuple[dict[str, int], dict[str, int]], ...]] = (
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
_MARGIN: Final = 1e-6  # of a turn: shares are fractions
_SIGMAS: Final = 5.0  # of chance: seen once in a million checks
_HELD: Final = 100  # exchanges under way for each unit of weight when a load policy is driven


def check_shares(make: Make, kind: Kind, follows_weights: bool, tolerance: float, picks: int) -> None:
    for weights in WEIGHTS:
        set_ = backends(*weights)
        selection = ready(make(set_))
        shares = list(weights) if follows_weights else [1] * len(weights)
        if kind == "turns":
            _require_exact(selection, set_, shares)
        if kind in ("least", "sampled"):
            drive = Drive(_HELD * round_of(shares))
            drive.take(selection, 2 * _HELD * round_of(shares))
            taken = drive.take(selection, picks)
        else:
            taken = take(selection, picks)
        _require_shares(taken, set_, shares, tolerance, kind in ("chance", "keyed"), f"{weights}")


def check_changes(make: Make, kind: Kind, follows_weights: bool, tolerance: float, picks: int) -> None:
    """After a change - at any point of a round - the new set's shares hold, from the start."""
    for before, after in _CHANGES:
        step = round_of(list(before.values()))
        used_before = {0, 1, step // 2, step - 1, step, step + step // 3}
        # Only who takes turns can be interrupted in a round.
        for used in sorted(used_before if kind == "turns" else {step + step // 3}):
            selection = ready(make([backend(id_, weight) for id_, weight in before.items()]))
            take(selection, used)
            set_ = [backend(id_, weight) for id_, weight in after.items()]
            selection = ready(selection.rebuilt(set_))
            what = f"{before} to {after} after {used} picks"
            shares = list(after.values()) if follows_weights else [min(1, each) for each in after.values()]
            number = max(picks // 50, 10 * sum(shares))
            if kind in ("least", "sampled"):
                drive = Drive(_HELD)
                drive.take(selection, 2 * _HELD)
                taken = drive.take(selection, number)
            else:
                taken = take(selection, number)
            require(set(taken) <= set(set_), f"{what}: a backend that left was picked")
            if kind == "turns":
                # What was learnt of those that stay may shift a turn or two, and no more than that.
                _require_smooth(taken, shares, what, 2.0)
            else:
                is_chance = kind in ("chance", "keyed")
                _require_shares(taken, set_, shares, 7 * tolerance, is_chance, what)


def _require_exact(selection: Selection, set_: Sequence[Backend], shares: Sequence[int]) -> None:
    step = round_of(shares)
    for number in range(3):
        counts = Counter(take(selection, step))
        for each, share in zip(set_, shares, strict=True):
            require(
                counts[each] * sum(shares) == share * step,
                f"{shares}: {each.id} had {counts[each]} of {step} turns in round {number + 1}",
            )


def _require_shares(
    taken: Sequence[Backend],
    set_: Sequence[Backend],
    shares: Sequence[int],
    tolerance: float,
    is_chance: bool,
    what: str,
) -> None:
    counts = Counter(taken)
    number = len(taken)
    for each, share in zip(set_, shares, strict=True):
        part = share / sum(shares)
        allowed = max(number * part * tolerance, 3.0)
        if is_chance:
            allowed = max(allowed, _SIGMAS * sqrt(number * part * (1 - part)))
        require(
            abs(counts[each] - number * part) <= allowed,
            f"{what}: {each.id} had {counts[each]} of {number} picks, its share is {number * part:.0f}",
        )


def check_smooth(make: Make) -> None:
    for weights in WEIGHTS:
        _require_smooth(
            take(ready(make(backends(*weights))), 3 * round_of(weights)), weights, f"{weights}", 1
        )


def _require_smooth(taken: Sequence[Backend], weights: Sequence[int], what: str, turns: float) -> None:
    """Nobody is ever more than ``turns`` ahead of or behind its share of the picks so far."""
    total = sum(weights)
    counts: Counter[str] = Counter()
    known = {each.id: each.weight for each in taken}
    for number, each in enumerate(taken, 1):
        counts[each.id] += 1
        for id_, weight in known.items():
            ahead = counts[id_] - number * weight / total
            require(
                abs(ahead) <= turns + _MARGIN, f"{what}: {id_} is {ahead:+.2f} turns off after {number} picks"
            )


def check_determined(make: Make) -> None:
    for weights in WEIGHTS:
        one, other = make(backends(*weights)), make(backends(*weights))
        require(
            [each.id for each in take(one, 250)] == [each.id for each in take(other, 250)],
            f"{weights}: two selections built alike pick differently",
        )


def check_load(make: Make, sees_all: bool) -> None:
    """A busier one is never picked while others are idle: of all, or of two where two are looked at."""
    number = 5 if sees_all else 2
    for idle in range(number):
        set_ = backends(*[1] * number)
        selection = _measured(ready(make(set_)), set_)
        for each in set_:
            load(each, 3)
        must_pick(selection, None)  # so that it has seen them all busy
        load(set_[idle], -3)
        for _ in range(20):
            picked = must_pick(selection, None)
            require(picked is set_[idle], f"{picked.id} was picked with 3 in flight, {set_[idle].id} is idle")
    # The load is that of the backends, not of this selection's picks: it holds after a change as well.
    set_ = backends(*[1] * number)
    old = ready(make(set_))
    load(set_[0], 3)
    selection = _measured(ready(old.rebuilt(set_)), set_)
    require(
        set_[0] not in {must_pick(selection, None) for _ in range(20)},
        "a busy backend was picked after a change of the set, while others are idle",
    )
    for each in set_:
        load(each, 5)
    for _ in range(20):
        must_pick(selection, None)
    load(set_[0], -8)
    require(
        {must_pick(selection, None) for _ in range(20)} == {set_[0]},
        "after a change of the set, a backend whose load has fallen is not picked",
    )
    fewer = ready(selection.rebuilt(set_[1:]))
    load(set_[0], 2)
    load(set_[0], -2)
    require(must_pick(fewer, None) is not set_[0], "a backend that left was picked when its load had fallen")
    if sees_all:
        set_ = backends(1, 1, 1, 1)
        load(set_[2], 1)
        selection = ready(make(set_))
        found = {must_pick(selection, None) for _ in range(300)}
        require(found == {set_[0], set_[1], set_[3]}, "equals are not chosen among at random")


def _measured(selection: Selection, set_: Sequence[Backend]) -> Selection:
    if isinstance(selection, Measuring):
        for each in set_:
            selection.observe(each, 0.01, 1.0)
    return selection
