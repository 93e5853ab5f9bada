"""Which backend has which number.

The program knows backends by numbers, flows remember them, and tables are made of them: so a number stays
with its backend, which is one id of one pool at one address. What leaves keeps its number, and its flows,
for a while; a number that is given to somebody else comes with another *generation*, by which flows tell
that the backend they knew is gone. All of it is in two maps, so that a process that takes over knows what
this one knew: `backends`, and `names` with a digest of whose each number is.
"""

import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from expressgateway.l4.xdp.kernel import NAME_BYTES, Table
from expressgateway.l4.xdp.layout import MAX_BACKENDS, Address, Backend, BackendCount, BackendFlag, address_of
from expressgateway.l4.xdp.wanted import IpAddress, WantedBackend

_NOBODY: Final = bytes(NAME_BYTES)
_U32: Final = struct.Struct("=I")
_LAST_GENERATION: Final = 2**32 - 1

Key = tuple[str, str, IpAddress, int]
"""Pool, id, address and port."""


@dataclass(slots=True)
class Holder:
    """A number that somebody has."""

    number: int
    digest: bytes
    entry: bytes
    """As it is in `backends`."""
    key: Key | None = None
    """None: known by its digest alone, for nobody has asked for it since it was taken over."""
    leaves_at_s: float | None = None
    """It is not wanted any more; its flows go on until then."""

    @property
    def is_alive(self) -> bool:
        return bool(Backend.from_buffer_copy(self.entry).flags & BackendFlag.BACKEND_ALIVE)


class Numbers:
    """To be used by one thread. Calls may raise `BpfError`."""

    def __init__(self, backends: Table, names: Table, counts: Table, cpus: int) -> None:
        self._backends = backends
        self._names = names
        self._counts = counts
        self._zero = bytes(cpus * len(bytes(BackendCount())))
        self._holders: dict[bytes, Holder] = {}  # by digest
        self._free: list[int] = []  # the lowest last
        self._generation = 0
        self._read()

    def _read(self) -> None:
        for number in range(MAX_BACKENDS - 1, 0, -1):
            digest = self._names.get(_U32.pack(number)) or _NOBODY
            entry = self._backends.get(_U32.pack(number)) or b""
            self._generation = max(self._generation, Backend.from_buffer_copy(entry).generation)
            if digest == _NOBODY:
                self._free.append(number)
            else:
                # Until somebody wants it, it leaves: when, the first `leave_others` says.
                self._holders[digest] = Holder(number, digest, entry)

    def take(self, pool: str, backend: WantedBackend, source: IpAddress | None) -> int:
        """The number of a backend, as it is from now on; 0: there are too many. `source`: our address
        towards it; None: there is no way at present, and it keeps what it had."""
        key = (pool, *backend.place)
        digest = _digest(key)
        holder = self._holders.get(digest)
        if holder is None:
            if not self._free:
                return 0
            holder = Holder(self._free.pop(), digest, b"")
            self._generation = self._generation % _LAST_GENERATION + 1
            generation = self._generation
            self._counts.set(_U32.pack(holder.number), self._zero)
        else:
            generation = Backend.from_buffer_copy(holder.entry).generation
        had = Backend.from_buffer_copy(holder.entry).source if holder.entry else Address()
        entry = bytes(
            Backend(
                address_of(backend.address),
                address_of(source) if source is not None else had,
                backend.port,
                BackendFlag.BACKEND_ALIVE if backend.is_alive else 0,
                0,
                generation,
            )
        )
        holder.key = key
        holder.leaves_at_s = None
        if entry != holder.entry:
            self._backends.set(_U32.pack(holder.number), entry)
            holder.entry = entry
        if digest not in self._holders:
            self._names.set(_U32.pack(holder.number), digest)
            self._holders[digest] = holder
        return holder.number

    def leave_others(
        self, wanted: set[int], drains_s: dict[str, float], drain_s: float, now_s: float
    ) -> None:
        """Those that are not among `wanted` leave: after their pool's time, or `drain_s` if that is not
        known."""
        for holder in self._holders.values():
            if holder.number not in wanted and holder.leaves_at_s is None:
                pool = holder.key[0] if holder.key is not None else ""
                holder.leaves_at_s = now_s + drains_s.get(pool, drain_s)

    def expire(self, now_s: float) -> int:
        """Whose time is over ends; how many."""
        over = [
            holder
            for holder in self._holders.values()
            if holder.leaves_at_s is not None and holder.leaves_at_s <= now_s
        ]
        for holder in over:
            entry = Backend.from_buffer_copy(holder.entry)
            entry.flags = 0
            self._backends.set(_U32.pack(holder.number), bytes(entry))
            self._names.set(_U32.pack(holder.number), _NOBODY)
            del self._holders[holder.digest]
            self._free.append(holder.number)
        if over:
            self._free.sort(reverse=True)
        return len(over)

    def holders(self) -> list[Holder]:
        return list(self._holders.values())

    def by_number(self) -> dict[int, Key]:
        return {holder.number: holder.key for holder in self._holders.values() if holder.key is not None}


def _digest(key: Key) -> bytes:
    text = "\0".join(map(str, key))
    return blake2b(text.encode(), digest_size=NAME_BYTES, person=b"xdp backend").digest()
