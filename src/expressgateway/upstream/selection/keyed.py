"""Consistent policies: the same key goes to the same backend. What ``maglev`` and ``ring_hash`` share.

A *table* is made from the ids and weights of a set, in whatever order that is given: each of its entries has
an *owner*, a *rank* among the ids in order. A key's hash leads to an entry. Hashes are the same in every
process, so all workers agree.

Large tables are built in steps, aside (``Gradual``). Meanwhile picks go by the table in use; the keys of
backends that have left it, and all keys where there is none yet, go to a *stand-in*: the backend into whose
share of the line of weights the hash falls. A set that is changed again while its table is being built
begins another one; one that is only named again (a name resolved to the same addresses) goes on.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import getrandbits
from typing import Final, Protocol

from expressgateway.upstream.backend import Backend
from expressgateway.upstream.selection.draws import Draws

_AT_ONCE: Final = 2048  # entries of a table that is built where it is asked for: 2 ms
_HASHES: Final = 2.0**64
_WALKED: Final = 4  # entries looked at for each backend of the set before `others` goes by rank


class Table(Protocol):
    @property
    def owners(self) -> Sequence[int]:
        """The rank of each entry's owner."""

    def entry(self, hash_: int) -> int:
        """The index of this hash's entry."""


Members = tuple[tuple[str, int], ...]
"""Ids and weights above 0, in order of ids."""

Building = Generator[None, None, Table]
"""Does a step of a few us for each ``next`` and returns the table."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a selection leaves to the one that is rebuilt from it."""

    members: Members
    building: Building | None
    table: Table | None
    ids: Sequence[str]
    """By rank in the table's set."""


def hash64(data: bytes) -> int:
    """64 evenly distributed bits, the same in every process."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


class Keyed(ABC):
    __slots__ = ("_building", "_hash", "_ids", "_members", "_named", "_ranked", "_stand_ins", "_table")

    def __init__(self, backends: Sequence[Backend], kept: Kept | None) -> None:
        """``kept``: of the selection that was picked from until now, and is no more."""
        self._ranked = sorted((each for each in backends if each.weight > 0), key=lambda each: each.id)
        self._members: Members = tuple((each.id, each.weight) for each in self._ranked)
        self._stand_ins = Draws([each.weight for each in self._ranked] or [1])
        self._hash = 0
        self._table: Table | None = None
        self._ids: Sequence[str] = ()
        """By rank in the table's set, which may be an older one."""
        self._named: Sequence[Backend | None] = ()
        """The same, as members of this set."""
        self._building: Building | None = None
        if not self._members:
            return
        if kept is not None:
            current = {each.id: each for each in self._ranked}
            self._table = kept.table
            self._ids = kept.ids
            self._named = [current.get(id_) for id_ in kept.ids]
            if kept.members == self._members:
                self._building = kept.building
                return
        self._building = self._build(self._members)
        if self._entries(self._members) <= _AT_ONCE:
            while not self.advance(1000):
                pass

    @abstractmethod
    def _build(self, members: Members) -> Building: ...

    @abstractmethod
    def _entries(self, members: Members) -> int:
        """How large the table will be."""

    def _kept(self) -> Kept:
        return Kept(self._members, self._building, self._table, self._ids)

    def pick(self, key: bytes | None) -> Backend | None:
        hash_ = getrandbits(64) if key is None else hash64(key)
        self._hash = hash_
        table = self._table
        if table is not None:
            picked = self._named[table.owners[table.entry(hash_)]]
            if picked is not None:
                return picked
        return self._stand_in(hash_)

    def others(self, picked: Backend) -> Iterator[Backend]:
        """From the entry of the last pick's key onwards: a key's second choice is always the same, and the
        keys of a backend that is down are spread over all of the others."""
        seen = {picked}
        table = self._table
        hash_ = self._hash
        if table is not None:
            owners = table.owners
            size = len(owners)
            at = table.entry(hash_)
            for _ in range(min(size, _WALKED * len(self._ranked))):
                at = at + 1 if at + 1 < size else 0
                other = self._named[owners[at]]
                if other is not None and other not in seen:
                    seen.add(other)
                    yield other
        number = len(self._ranked)
        for at in range(number):
            other = self._ranked[(hash_ + at) % number]
            if other not in seen:
                yield other

    def advance(self, steps: int) -> bool:
        building = self._building
        if building is None:
            return True
        try:
            for _ in range(steps):
                next(building)
        except StopIteration as done:
            self._table = done.value
            self._ids = [id_ for id_, _ in self._members]
            self._named = self._ranked
            self._building = None
            return True
        return False

    def _stand_in(self, hash_: int) -> Backend | None:
        if not self._ranked:
            return None
        return self._ranked[self._stand_ins.at(hash_ / _HASHES)]
