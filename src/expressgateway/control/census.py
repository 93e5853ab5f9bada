"""The census: how many connections all workers together have open, in all and from each client address.

Caps hold for the whole process tree, and workers share no locks, so each worker writes only its own *row* of
a memory file and reads everybody's. A row holds the worker's total and a *sketch*: two hash tables of
counters, in which an address adds one to one cell of each. What a worker knows itself is exact; what it knows
of the others is the smaller of the two sums of their cells: never too low, and too high only where both cells
are shared with other busy addresses. The hash is keyed with random bytes of the supervisor, so nobody outside
can choose addresses that meet in a cell.

Two workers may count the last free place at the same moment: caps are exceeded by at most one connection for
each further worker. An IPv6 client is counted by its /64, the least that one customer gets.
"""

import mmap
import os
import socket
from _blake2 import blake2s  # what hashlib wraps; a copy of a keyed state is half the cost of a new one
from collections.abc import Callable, Iterable
from typing import Final

CELLS: Final = 65536
"""Cells of each of the two tables of a sketch."""

_HEADER_BYTES: Final = 4096
_KEY: Final = slice(0, 32)
_PAGE_BYTES: Final = 4096
_ROW_BYTES: Final = 2 * CELLS * 4 + _PAGE_BYTES  # whole pages: a row can be given back to the kernel
_STRIDE: Final = _ROW_BYTES // 4
_TOTAL: Final = 0
_SKETCH: Final = _PAGE_BYTES // 4

MAX_WORKERS: Final = 256


class CensusTable:
    """The supervisor's end: makes the memory and clears the rows of workers that died."""

    __slots__ = ("_map", "fd", "workers")

    def __init__(self, workers: int = MAX_WORKERS, fd: int | None = None) -> None:
        """``fd``: a table for as many workers that another supervisor made; this object's from here on."""
        if not 1 <= workers <= MAX_WORKERS:
            raise ValueError(f"a census is for 1 to {MAX_WORKERS} workers, not {workers}")
        self.workers = workers
        size = _HEADER_BYTES + workers * _ROW_BYTES
        self.fd = os.memfd_create("expressgateway-census", os.MFD_CLOEXEC) if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)
        if fd is None:
            self._map[_KEY] = os.urandom(32)

    def clear(self, index: int) -> None:
        """Forget a worker. Only after it died and before its replacement starts."""
        self._map.madvise(mmap.MADV_REMOVE, _HEADER_BYTES + index * _ROW_BYTES, _ROW_BYTES)

    def total(self) -> int:
        """Connections open now."""
        with memoryview(self._map) as whole, whole[_HEADER_BYTES:].cast("i") as cells:
            return sum(cells[_TOTAL::_STRIDE])

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)


class _Client:
    """One address with connections on this worker."""

    __slots__ = ("cells", "count")

    def __init__(self, cells: tuple[int, int]) -> None:
        self.count = 0
        self.cells = cells
        """Where its counters lie in each row, as offsets from the row's beginning."""


class Census:
    """A worker's end: `enter` for each connection accepted, `leave` when it is gone.

    The descriptor stays the caller's, who may close it after construction.
    """

    __slots__ = (
        "_bases",
        "_clients",
        "_exempt",
        "_hash",
        "_is_alone",
        "_max_inflight",
        "_per_ip",
        "_row",
        "_table",
        "_total",
    )

    def __init__(self, fd: int, index: int, workers: int) -> None:
        if not 0 <= index < workers <= MAX_WORKERS:
            raise ValueError(f"there is no worker {index} of {workers}")
        size = _HEADER_BYTES + workers * _ROW_BYTES
        if os.fstat(fd).st_size != size:
            raise ValueError("the census was made for another number of workers")
        shared = mmap.mmap(fd, size)
        self._table = memoryview(shared)[_HEADER_BYTES:].cast("i")
        self._row = index * _STRIDE
        self._bases = [other * _STRIDE for other in range(workers)]
        self._is_alone = workers == 1
        self._hash = blake2s(key=bytes(shared[_KEY]), digest_size=4)
        self._clients: dict[str, _Client] = {}
        self._total = 0
        self._max_inflight = 2_000_000
        self._per_ip = 2_000_000
        self._exempt: Callable[[str], bool] | None = None

    def set_limits(self, max_inflight: int, per_ip: int, exempt: Callable[[str], bool] | None = None) -> None:
        """The caps from now on; connections that are already in stay. `exempt`: addresses without a cap of
        their own. It is asked only when one would be refused."""
        self._max_inflight = max_inflight
        self._per_ip = per_ip
        self._exempt = exempt

    def set_live(self, seats: Iterable[int]) -> None:
        """The rows that belong to a living worker, this one's among them; all, as long as nobody says
        which."""
        self._bases = [seat * _STRIDE for seat in seats]
        is_alone = self._bases == [self._row]
        if self._is_alone and not is_alone:
            self._is_alone = False
            for ip, client in self._clients.items():  # nobody has asked for them before
                client.cells = self._cells(ip)
                self._publish(client, client.count)
        # Not the other way round: what is in the sketch must be taken out of it again.

    @property
    def inflight(self) -> int:
        """Connections of all workers."""
        if self._is_alone:
            return self._total
        table = self._table
        return sum([table[base] for base in self._bases])

    @property
    def total(self) -> int:
        """Connections counted in on this worker."""
        return self._total

    def enter(self, ip: str) -> str | None:
        """Count a connection in; ``process_cap`` or ``ip_cap`` if there is no room, and it is not counted."""
        if self.inflight >= self._max_inflight:
            return "process_cap"
        key = _network(ip) if ":" in ip else ip
        client = self._clients.get(key)
        if client is None:
            client = _Client((0, 0) if self._is_alone else self._cells(key))
        count = client.count
        if not self._is_alone:
            count += self._elsewhere(client.cells)
        if count >= self._per_ip and (self._exempt is None or not self._exempt(ip)):
            return "ip_cap"
        if not client.count:
            self._clients[key] = client  # as many as there are connections here, which are capped
        client.count += 1
        self._total += 1
        self._publish(client, 1)
        return None

    def leave(self, ip: str) -> None:
        """Count a connection out that `enter` had counted in."""
        key = _network(ip) if ":" in ip else ip
        client = self._clients.get(key)
        if client is None:
            return  # never below zero: a defect elsewhere must not open the caps
        client.count -= 1
        if not client.count:
            del self._clients[key]
        self._total -= 1
        self._publish(client, -1)

    def _publish(self, client: _Client, change: int) -> None:
        table, row = self._table, self._row
        table[row + _TOTAL] = self._total
        if not self._is_alone:
            first, second = client.cells
            table[row + first] += change
            table[row + second] += change

    def _elsewhere(self, cells: tuple[int, int]) -> int:
        """At most this many connections of the client are open on the other workers; seldom fewer."""
        table, row, bases = self._table, self._row, self._bases
        first, second = cells
        one = sum([table[base + first] for base in bases]) - table[row + first]
        if not one:
            return 0  # fast path: nobody else has it
        return min(one, sum([table[base + second] for base in bases]) - table[row + second])

    def _cells(self, key: str) -> tuple[int, int]:
        keyed = self._hash.copy()
        keyed.update(key.encode())
        digest = keyed.digest()
        return (
            _SKETCH + (digest[0] << 8 | digest[1]),
            _SKETCH + CELLS + (digest[2] << 8 | digest[3]),
        )


_MAPPED: Final = bytes(10) + b"\xff\xff"


def _network(ip: str) -> str:
    """The /64 of an IPv6 address, the address itself if it stands for an IPv4 one."""
    try:
        packed = socket.inet_pton(socket.AF_INET6, ip.partition("%")[0])
    except OSError:
        return ip
    return socket.inet_ntoa(packed[12:]) if packed.startswith(_MAPPED) else packed[:8].hex()
