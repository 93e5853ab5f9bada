"""What only some policies can do, held to it where they say that they can (``isinstance``)."""

from expressgateway.upstream.selection import Gradual, Measuring, Selection, Sessions
from expressgateway.upstream.selection.conformance.bench import (
    ConformanceError,
    Make,
    backend,
    backends,
    keys,
    must_pick,
    ready,
    require,
)


def check_gradual(make: Make) -> None:
    """While a table is built, picks name who is there or was there before; afterwards only who is there."""
    one = backends(1, 2, 3)
    if not isinstance(make(one), Gradual):
        return
    other = [*one[1:], backend("joins", 2), backend("resting", 0)]
    selection: Selection = make(one)
    allowed = set(one)
    for set_, next_set in ((one, other), (other, one), (one, one)):
        with_weight = {each for each in set_ if each.weight}
        allowed |= with_weight
        for key in keys(50):
            picked = must_pick(selection, key)
            require(
                picked in allowed, f"{picked.id} was picked while the table was built: it was never there"
            )
            _advance(selection)
        require(_advance(ready(selection)), "`advance` does not stay true when the table is in use")
        found = {must_pick(selection, key) for key in keys(300)}
        require(found == with_weight, "the table that is in use is not that of the set")
        allowed = with_weight
        selection = selection.rebuilt(next_set)
    # One change follows the other before the table is ready.
    hurried: Selection = make(backends(1, 1, 1))
    last = backends(1, 1)
    for set_ in (backends(1, 1, 1, 1), backends(2, 1), last):
        hurried = hurried.rebuilt(set_)
    ready(hurried)
    found = {must_pick(hurried, key) for key in keys(300)}
    require(found == set(last), "changes that followed each other quickly left another set than the last one")


def _advance(selection: Selection) -> bool:
    if not isinstance(selection, Gradual):
        raise ConformanceError("a selection that is built in steps is rebuilt as one that is not")
    return selection.advance(1)


def check_measuring(make: Make) -> None:
    quick, slow = backends(1, 1)
    selection = ready(make([quick, slow]))
    if not isinstance(selection, Measuring):
        return
    selection.observe(backend("stranger"), 1.0, 1.0)
    for at in range(20):
        selection.observe(quick, 0.01, 1.0 + at / 100)
        selection.observe(slow, 1.0, 1.0 + at / 100)
    rebuilt = ready(selection.rebuilt([slow, quick]))
    found = [must_pick(rebuilt, None) for _ in range(100)]
    require(
        found.count(quick) > 90, f"a backend that is 100 times slower had {found.count(slow)} of 100 picks"
    )


def check_sessions(make: Make) -> None:
    set_ = backends(3, 0, 1)
    selection = ready(make(set_))
    if not isinstance(selection, Sessions):
        return
    require(selection.bound(b"unknown") is None, "a key that was never bound is bound")
    tokens = {each: selection.token(each) for each in set_}
    by_token = selection.bound(tokens[set_[0]]) is set_[0]
    if not by_token:
        tokens = {each: b"key of %s" % each.id.encode() for each in set_}
        for each, key in tokens.items():
            selection.bind(key, each)
    require(len(set(tokens.values())) == len(set_), "two backends have the same token")
    for each, key in tokens.items():
        require(selection.bound(key) is each, f"{each.id} (weight {each.weight}) lost its session")
        if by_token:
            forged = bytes((key[0] ^ 1,)) + key[1:]
            require(selection.bound(forged) is None, "a token that was changed is taken for a true one")
            require(selection.bound(each.id.encode()) is None, "an id is taken for a token")
            twin = ready(make(backends(3, 0, 1)))
            found = twin.bound(key) if isinstance(twin, Sessions) else None
            require(found is not None and found.id == each.id, "another worker does not know the token")
    first, second, third = set_
    for each in set_:
        each.weight = 1 - min(each.weight, 1)
    after = ready(selection.rebuilt([third, second]))
    if not isinstance(after, Sessions):
        raise ConformanceError("a selection with sessions is rebuilt as one without")
    require(after.bound(tokens[second]) is second, "a change of the set lost a session")
    require(after.bound(tokens[third]) is third, "a backend whose weight became 0 lost its session")
    require(after.bound(tokens[first]) is None, "a session is bound to a backend that left")
