"""What consistent policies promise: the same key, the same backend, whatever else changes."""

from collections.abc import Mapping, Sequence
from typing import Final

from expressgateway.upstream.backend import Backend
from expressgateway.upstream.selection import Selection
from expressgateway.upstream.selection.conformance.bench import (
    Make,
    backend,
    backends,
    keys,
    must_pick,
    ready,
    require,
)

_KEYS: Final = 10_000


def check_keyed(make: Make, stay: float, joins: float) -> None:
    _check_same(make)
    for weights in ((1, 1, 1, 1, 1), (1, 2, 3, 4)):
        set_ = backends(*weights)
        selection = ready(make(set_))
        before = _placed(selection, keys(_KEYS))
        _check_order(make, selection, set_, before)
        _check_removal(make, set_, before, stay)
        _check_addition(selection, set_, before, stay, joins)


def _placed(selection: Selection, of: Sequence[bytes]) -> dict[bytes, str]:
    return {key: must_pick(selection, key).id for key in of}


def _check_same(make: Make) -> None:
    selection = ready(make(backends(1, 1, 1)))
    once = _placed(selection, keys(200))
    for _ in range(200):
        selection.pick(None)
    require(_placed(selection, keys(200)) == once, "the same key was picked for differently")
    require(set(once.values()) == {"b0", "b1", "b2"}, "200 keys do not reach all of three backends")
    without = {must_pick(selection, None).id for _ in range(300)}
    require(len(without) == 3, "without a key, picks do not reach all backends")


def _check_order(
    make: Make, selection: Selection, set_: Sequence[Backend], before: Mapping[bytes, str]
) -> None:
    turned = set_[::-1]
    require(_placed(ready(make(turned)), keys(_KEYS)) == before, "another order of the set moved keys")
    rebuilt = ready(selection.rebuilt(turned))
    require(_placed(rebuilt, keys(_KEYS)) == before, "a set named again in another order moved keys")


def _check_removal(make: Make, set_: Sequence[Backend], before: Mapping[bytes, str], stay: float) -> None:
    for gone in set_:
        selection = ready(make(set_))
        after = _placed(ready(selection.rebuilt([each for each in set_ if each is not gone])), keys(_KEYS))
        others = [key for key, id_ in before.items() if id_ != gone.id]
        stayed = sum(after[key] == before[key] for key in others) / len(others)
        require(
            stayed >= stay,
            f"{gone.id} of {len(set_)} left, and {stayed:.2%} of the others' keys stayed, not {stay:.2%}",
        )
        again = _placed(ready(selection.rebuilt(set_)), keys(_KEYS))
        require(again == before, f"{gone.id} left and came back, and keys are not where they were")


def _check_addition(
    selection: Selection, set_: Sequence[Backend], before: Mapping[bytes, str], stay: float, joins: float
) -> None:
    more = [*set_, backend("joins")]
    after = _placed(ready(selection.rebuilt(more)), keys(_KEYS))
    share = 1 / sum(each.weight for each in more)
    moved = sum(after[key] != before[key] for key in before) / len(before)
    require(
        moved <= joins * share,
        f"one joined with {share:.1%} of all weight, and {moved:.1%} of the keys moved",
    )
    between = sum(after[key] not in (before[key], "joins") for key in before) / len(before)
    require(
        between <= 1 - stay, f"one joined, and {between:.2%} of the keys moved between those that were there"
    )
