"""What a worker tells of its clients' connections: shared fairly, and never more than it has time for."""

from collections.abc import Iterable
from itertools import count

import pytest

from expressgateway.net.facts import Facts, State, Told
from expressgateway.observe.counters import ListenerCounters
from expressgateway.worker.connections import MOST_COUNTED, MOST_LISTED, told


class Held:
    """A connection, which counts how often it was asked."""

    asked = count()

    def __init__(self, began: float, protocol: str) -> None:
        self.began = began
        self.protocol = protocol

    def facts(self) -> Facts:
        next(self.asked)
        return Facts(self.protocol, "192.0.2.1", 5, self.began, None, State.IDLE)


class Holder:
    def __init__(self, name: str, number: int, *protocols: str) -> None:
        self.counters = ListenerCounters(name)
        names = protocols or ("tcp",)
        self._held = [Held(float(at), names[at % len(names)]) for at in range(number)]

    @property
    def open(self) -> int:
        return len(self._held)

    def told(self) -> Iterable[Told]:
        return self._held


def test_a_row() -> None:
    assert told([Holder("web", 1)], 10, now=7.25) == {
        "counts": {"web": {"tcp": 1}},
        "looked_at": 1,
        "listed": [["web", "tcp", "192.0.2.1", 5, 7.25, None, "idle"]],
    }


def test_nothing() -> None:
    assert told([], 10, 0.0) == {"counts": {}, "looked_at": 0, "listed": []}
    assert told([Holder("web", 0)], 10, 0.0)["counts"] == {"web": {}}


def test_protocols_are_counted() -> None:
    found = told([Holder("web", 5, "HTTP/1.1", "HTTP/2")], 0, 0.0)
    assert found["counts"] == {"web": {"HTTP/1.1": 3, "HTTP/2": 2}}


@pytest.mark.parametrize(
    ("sizes", "limit", "shares"),
    [
        ((100, 100), 10, (5, 5)),
        ((100, 2), 10, (8, 2)),
        ((2, 100, 0), 10, (2, 8, 0)),
        ((3, 3), 10, (3, 3)),
        ((9, 9), 0, (0, 0)),
        ((9, 9), -1, (0, 0)),
    ],
)
def test_listeners_share_the_room(sizes: tuple[int, ...], limit: int, shares: tuple[int, ...]) -> None:
    found = told([Holder(str(place), size) for place, size in enumerate(sizes)], limit, 1000.0)
    names = [row[0] for row in found["listed"]]
    assert tuple(names.count(str(place)) for place in range(len(sizes))) == shares
    for place in range(len(sizes)):
        ages = [row[4] for row in found["listed"] if row[0] == str(place)]
        assert ages == sorted(ages, reverse=True), "the oldest are listed"


def test_bounds() -> None:
    before = next(Held.asked)
    found = told([Holder("few", 10), Holder("many", 50_000)], 1_000_000, 0.0)
    assert next(Held.asked) - before - 1 == found["looked_at"] == MOST_COUNTED
    assert len(found["listed"]) == MOST_LISTED
    assert found["counts"] == {"few": {"tcp": 10}, "many": {"tcp": MOST_COUNTED - 10}}
