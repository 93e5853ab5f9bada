"""``ring_hash``: consistent by points on a ring of 64 bits. A key goes to the first point from its hash on.

A backend has ``virtual_nodes`` points for each unit of its weight, made from its id and nothing else: when
one leaves, its keys and no others move, exactly; when one joins, only what it takes over moves.

What that costs is evenness. Points fall by chance, and a backend with n of them has its share give or take
100 / sqrt(n) per cent: 8 % with 160 (docs/decisions/0014-ring-distribution.md). ``maglev`` is the even one.

A ring has 262,144 points at most. Above that every backend has half of its points, or a quarter, and so on
(one at least): shares stay, but a change of the set that crosses such a limit moves keys between the others.
"""

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from hashlib import blake2b
from struct import Struct
from typing import Final

from expressgateway.upstream.backend import Backend
from expressgateway.upstream.selection.keyed import Building, Kept, Keyed, Members

_MAX_POINTS: Final = 262_144  # 3 MiB, and ten times that while it is built
_POINTS: Final = Struct("<8Q")  # of one digest
_RANK_BITS: Final = 32


class RingHash(Keyed):
    __slots__ = ("_virtual_nodes",)

    def __init__(self, backends: Sequence[Backend], virtual_nodes: int, kept: Kept | None = None) -> None:
        self._virtual_nodes = virtual_nodes
        super().__init__(backends, kept)

    def rebuilt(self, backends: Sequence[Backend]) -> "RingHash":
        return RingHash(backends, self._virtual_nodes, self._kept())

    def _entries(self, members: Members) -> int:
        return sum(_numbers(members, self._virtual_nodes))

    def _build(self, members: Members) -> Building:
        return _build(members, _numbers(members, self._virtual_nodes))


class _Ring:
    __slots__ = ("_points", "_size", "owners")

    def __init__(self, points: Sequence[int], owners: Sequence[int]) -> None:
        """In the order of points; owners of equal ones by rank."""
        self.owners = owners
        self._points = points
        self._size = len(points)

    def entry(self, hash_: int) -> int:
        at = bisect_left(self._points, hash_)
        return at if at < self._size else 0


def _numbers(members: Members, virtual_nodes: int) -> list[int]:
    """How many points each has."""
    numbers = [weight * virtual_nodes for _, weight in members]
    while sum(numbers) > max(_MAX_POINTS, len(members)):
        numbers = [max(1, number // 2) for number in numbers]
    return numbers


def _build(members: Members, numbers: Sequence[int]) -> Building:
    # Sorted by their first bits as they are made, so that what is left to sort is always a few. A point and
    # its owner are one number: hundreds of thousands of tuples would set off the garbage collector.
    bits = (sum(numbers) // 16).bit_length()
    first = 64 - bits
    heaps: list[list[int]] = []
    while len(heaps) < 1 << bits:
        heaps.extend([] for _ in range(min(32, 1 << bits)))
        yield
    for rank, (id_, _) in enumerate(members):
        name = id_.encode()
        for done in range(0, numbers[rank], 8):
            digest = blake2b(name + done.to_bytes(8, "little"), person=b"ring").digest()
            for point in _POINTS.unpack(digest)[: numbers[rank] - done]:
                heaps[point >> first].append(point << _RANK_BITS | rank)
            yield
    points = array("Q")
    owners = array("I")
    for heap in heaps:
        heap.sort()
        for both in heap:
            points.append(both >> _RANK_BITS)
            owners.append(both & ((1 << _RANK_BITS) - 1))
        heap.clear()
        yield
    return _Ring(points, owners)
