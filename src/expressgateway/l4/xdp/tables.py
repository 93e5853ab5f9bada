"""Maglev's tables for the kernel: which backend's number each slot has.

A table is made of *all* backends with a weight, as user space makes it (`upstream/selection/maglev.py`), so
that health moves nobody but the clients of the backends concerned. Over it goes who may have new flows now:
a slot of one that may not goes to the owner of the next slot whose owner may, as a pick in user space does;
and in slow start a backend has the slots whose number's hash lies below its share so far, so that it only
ever gains.
"""

import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from expressgateway.l4.xdp.wanted import WantedBackend
from expressgateway.upstream.selection.maglev import build

Members = tuple[tuple[str, int], ...]
"""Ids and weights above 0, in order of ids."""

LEAST_RAMP: Final = 0.05
"""Of its share a backend has from the beginning of its slow start: as in user space."""

_STEPS: Final = 256  # of building, between two rests: half a millisecond
_HASH: Final = 2654435761  # Knuth's, of the golden ratio


def members_of(backends: Sequence[WantedBackend]) -> Members:
    return tuple(sorted((each.id, each.weight) for each in backends if each.weight > 0))


class Tables:
    """Tables of ranks, remembered by what they were made of while somebody wants them (`forget_others`).

    To be used by one thread, which may be any."""

    def __init__(self, rest: Callable[[], None] = lambda: time.sleep(0)) -> None:
        """`rest` is called between steps, so that other threads get their turn."""
        self._rest = rest
        self._kept: dict[tuple[Members, int], array[int]] = {}
        self._used: set[tuple[Members, int]] = set()

    def ranks(self, members: Members, size: int) -> "array[int]":
        """Of each slot, the place of its owner among the members."""
        key = (members, size)
        self._used.add(key)
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = self._built(members, size)
        return found

    def forget_others(self) -> None:
        """What nobody has asked for since this was called before. A table is a quarter of a megabyte."""
        self._kept = {key: self._kept[key] for key in self._used}
        self._used.clear()

    def _built(self, members: Members, size: int) -> "array[int]":
        building = build(members, size)
        try:
            while True:
                for _ in range(_STEPS):
                    next(building)
                self._rest()
        except StopIteration as done:
            owners = done.value.owners
            assert isinstance(owners, array)
            return owners

    def numbers(
        self,
        backends: Sequence[WantedBackend],
        number_of: Mapping[str, int],
        size: int,
        shares: Mapping[str, float],
    ) -> "array[int]":
        """The table itself: a backend's number for each slot, 0 where there is nobody.

        `number_of`: by id, of those that may have new flows; `shares`: how far those in slow start have come.
        """
        members = members_of(backends)
        if not any(number_of.get(id_) for id_, _ in members):
            return array("I", bytes(4 * size))
        ranks = self.ranks(members, size)
        own = [number_of.get(id_, 0) for id_, _ in members]
        table = array("I", map(own.__getitem__, ranks))
        ramping = {
            number_of[id_]: int(max(share, LEAST_RAMP) * 2**32)
            for id_, share in shares.items()
            if share < 1 and number_of.get(id_)
        }
        if set(ramping) >= {number for number in own if number}:
            ramping = {}  # nobody else is there to take what they do not
        if 0 not in own and not ramping:
            return table
        self._rest()
        others = array("I", (0 if number in ramping else number for number in table))
        _fill(others)
        if ramping:
            self._rest()
            _fill(table)
            for slot, number in enumerate(table):
                if number in ramping and slot * _HASH % 2**32 >= ramping[number]:
                    table[slot] = others[slot]
            return table
        return others


def _fill(table: "array[int]") -> None:
    """Give each empty slot to the owner of the next one that is not, around the end."""
    last = next((number for number in table if number), 0)
    for slot in range(len(table) - 1, -1, -1):
        if table[slot]:
            last = table[slot]
        else:
            table[slot] = last
