"""``maglev``: consistent by a table of prime size, after Eisenbud et al., "Maglev", NSDI 2016, 3.4.

Theory: each backend has a *permutation* of the table's entries, made from its id: an offset and a skip, which
step through all of them because the size is prime. Backends take turns; whoever's turn it is takes the first
entry of its permutation that is still free. So every backend has its share of the table, rounded to entries,
and when the set changes few entries change between those that stay: a few per cent at most.

Weights decide how often it is a backend's turn: the first time at once, so that everyone has an entry; after
n turns at the moment (n + 1/2) / weight. That needs nobody else's weight, so one that leaves does not change
the order among the others. In a small table the heavy ones lack what rounding gives to many light ones.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from heapq import heappush, heapreplace
from typing import Final

from expressgateway.upstream.backend import Backend
from expressgateway.upstream.selection.keyed import Building, Kept, Keyed, Members

_STEP: Final = 16  # probes, or what costs as much, in a step: about 2 us
_CLEARED: Final = 4096  # entries of a new table that are cleared in a step


class Maglev(Keyed):
    __slots__ = ("_size",)

    def __init__(self, backends: Sequence[Backend], table_size: int, kept: Kept | None = None) -> None:
        """``table_size``: a prime, much larger than the number of backends (100 times: shares within 1 %)."""
        self._size = table_size
        super().__init__(backends, kept)

    def rebuilt(self, backends: Sequence[Backend]) -> "Maglev":
        return Maglev(backends, self._size, self._kept())

    def _entries(self, members: Members) -> int:
        return self._size

    def _build(self, members: Members) -> Building:
        return build(members, self._size)


class _Table:
    __slots__ = ("_size", "owners")

    def __init__(self, owners: Sequence[int]) -> None:
        self.owners = owners
        self._size = len(owners)

    def entry(self, hash_: int) -> int:
        return hash_ % self._size


def build(members: Members, size: int) -> Building:
    """A table in steps of a few us. Members are in order of their ids, with weights above 0; at least one."""
    owners = array("I")
    taken = bytearray()
    while len(owners) < size:
        # A table may be millions of entries: not even to clear its memory is one step.
        more = min(_CLEARED, size - len(owners))
        owners.extend(array("I", bytes(owners.itemsize * more)))
        taken.extend(bytes(more))
        yield
    entries: list[int] = []  # of each rank: where it is in its permutation
    skips: list[int] = []
    turns: list[tuple[float, int]] = []  # a heap: when, who
    for rank, (id_, _) in enumerate(members):
        digest = blake2b(id_.encode(), digest_size=16, person=b"maglev").digest()
        entries.append(int.from_bytes(digest[:8], "little") % size)
        skips.append(int.from_bytes(digest[8:], "little") % (size - 1) + 1)
        heappush(turns, (0.0, rank))
        yield
    had = [0.5] * len(members)
    left = _STEP
    for _ in range(size):
        rank = turns[0][1]
        entry = entries[rank]
        skip = skips[rank]
        while taken[entry]:
            entry = (entry + skip) % size
            left -= 1
            if left < 0:
                left = _STEP
                yield
        taken[entry] = 1
        owners[entry] = rank
        entries[rank] = entry
        had[rank] += 1.0
        heapreplace(turns, (had[rank] / members[rank][1], rank))
        left -= 6  # a turn costs as much as so many probes
    return _Table(owners)
