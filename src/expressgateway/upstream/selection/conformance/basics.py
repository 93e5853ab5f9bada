"""What every policy is held to: empty sets, weight 0, the others, and not knowing of health."""

from expressgateway.upstream.selection.conformance.bench import (
    Drive,
    Make,
    backend,
    backends,
    ready,
    require,
    round_of,
    take,
)
from expressgateway.upstream.selection.conformance.shares import WEIGHTS


def check_empty(make: Make) -> None:
    for selection in (make(()), make(backends(0, 0)), make(backends(1)).rebuilt(())):
        require(ready(selection).pick(None) is None, "a pick from no backends must give nothing")
        require(selection.pick(b"key") is None, "a pick from no backends must give nothing")
    stray = backend("stray")
    require(list(make(()).others(stray)) == [], "there are no others where there is nobody")
    filled = ready(make(()).rebuilt(backends(1)))
    require(filled.pick(None) is not None, "a set that was empty gives nothing when it is filled")


def check_weight_zero(make: Make) -> None:
    set_ = backends(3, 0, 1)
    selection = ready(make(set_))
    taken = set(take(selection, 200))
    require(set_[1] not in taken, "a backend of weight 0 was picked for new work")
    require(set_[1] not in set(Drive(10).take(selection, 200)), "a backend of weight 0 was picked under load")
    require(set_[1] not in set(selection.others(set_[0])), "a backend of weight 0 is among the others")
    alone = ready(make(backends(0, 1)))
    require({each.id for each in take(alone, 10)} == {"b1"}, "the only backend with weight gets all work")


def check_others(make: Make) -> None:
    for weights in WEIGHTS:
        set_ = backends(*weights)
        selection = ready(make(set_))
        for picked in take(selection, min(2 * round_of(weights) + 3, 300))[-5:]:
            others = list(selection.others(picked))
            require(picked not in others, f"{weights}: the picked one is among the others")
            require(len(others) == len(set(others)), f"{weights}: one of the others came twice")
            require(set(others) | {picked} == set(set_), f"{weights}: the others are not all the others")


def check_health_is_unknown(make: Make, *, is_determined: bool) -> None:
    """``pick`` names its choice; whether that one can be used is for the pool to know."""
    set_ = backends(1, 1, 1)
    selection = ready(make(set_))
    for each in set_:
        each.is_available = False
    found = set(take(selection, 300)) | set(Drive(9).take(selection, 300))
    require(len(found) == 3, "a pick must not look at health")
    if is_determined:
        sick, well = ready(make(backends(2, 1, 1))), ready(make(backends(2, 1, 1)))
        expected = [each.id for each in take(well, 40)]
        taken = []
        for each in take(sick, 1):
            each.is_available = False
            taken.append(each.id)
        # Policies that take turns go on; those that go by keys get the first key again.
        again = [each.id for each in take(sick, 40)]
        found_ids = {tuple(taken + again[:39]), tuple(again)}
        require(tuple(expected) in found_ids, "the picks changed when a backend's health did")
