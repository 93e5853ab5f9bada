"""Whose the connection IDs are that carry nothing: a table in memory that all workers share.

*Spare CIDs* are those that the QUIC library makes for its clients to change to (NEW_CONNECTION_ID, RFC 9000
5.1.1): random bytes. A client that migrates uses one of them from a new address, so the kernel gives its
packets to any worker; that worker asks here.

Workers share no locks, so each writes only its own *row* and reads everybody's. A row is a set of the first 8
bytes of connection IDs, in a table of slots: a key's place is one of ``_WINDOW`` slots in a row, the first
given by its own first bits. They are random and ours: nobody outside chooses what goes in, and a window is
all that is looked at, whatever is asked for. A row that is read while its owner writes may tell of a key too
early or too late, which costs one packet.

A row holds 170,000 before it refuses more than one in a thousand: 7 for each of 24,000 connections. One
that finds no slot is refused and counted; none is displaced for it, for the older one has been promised to a
client just the same. Packets that come with a refused one reach their connection only if the client's address
has not changed.
"""

import mmap
import os
from collections.abc import Sequence
from typing import Final

MAX_WORKERS: Final = 256  # what the byte of a host CID can say (`cids`)

SLOTS: Final = 2**18
"""First slots of windows in a row."""

_KEY_BYTES: Final = 8  # of all in a full row, two are alike with a probability of 2 ** -29
_WINDOW: Final = 32
_WINDOW_BYTES: Final = _WINDOW * _KEY_BYTES
_PAGE_BYTES: Final = 4096
_ROW_BYTES: Final = SLOTS * _KEY_BYTES + _PAGE_BYTES  # in the last page: ends of windows, and the count
_STRIDE: Final = _ROW_BYTES // 8
_EMPTY: Final = bytes(_KEY_BYTES)


class SpareTable:
    """The supervisor's end: makes the memory and clears the rows of workers that died.

    A row takes up to 2 MiB while its worker has spare CIDs, and a page otherwise.
    """

    __slots__ = ("_map", "fd", "workers")

    def __init__(self, workers: int = MAX_WORKERS, fd: int | None = None) -> None:
        """``fd``: a table for as many workers that another supervisor made; this object's from here on."""
        if not 1 <= workers <= MAX_WORKERS:
            raise ValueError(f"a table of spare connection IDs is for 1 to {MAX_WORKERS} workers")
        self.workers = workers
        size = workers * _ROW_BYTES
        self.fd = os.memfd_create("expressgateway-spares", os.MFD_CLOEXEC) if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)

    def clear(self, index: int) -> None:
        """Forget a worker. Only after it died and before its replacement starts."""
        self._map.madvise(mmap.MADV_REMOVE, index * _ROW_BYTES, _ROW_BYTES)

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)


class Spares:
    """A worker's end. The descriptor stays the caller's, who may close it after construction.

    Connection IDs of less than 8 bytes are nobody's.
    """

    __slots__ = ("_counts", "_find", "_index", "_live", "_map", "_row", "count", "refused")

    def __init__(self, fd: int, index: int, workers: int) -> None:
        if not 0 <= index < workers <= MAX_WORKERS:
            raise ValueError(f"there is no worker {index} of {workers}")
        size = workers * _ROW_BYTES
        if os.fstat(fd).st_size != size:
            raise ValueError("the table of spare connection IDs was made for another number of workers")
        self._map = mmap.mmap(fd, size)
        self._find = self._map.find
        self._index = index
        self._row = index * _ROW_BYTES
        self._counts = memoryview(self._map).cast("Q")[_STRIDE - 1 :: _STRIDE]
        self._live: Sequence[int] = range(workers)
        self.count = 0
        """In this worker's row."""
        self.refused = 0
        """How many found no slot."""

    def set_live(self, seats: Sequence[int]) -> None:
        """The rows that belong to a living worker; all of them, as long as nobody says which."""
        self._live = seats

    def add(self, cid: bytes) -> bool:
        """This worker owns it from now on. False: there is no room, or it is too short. Idempotent."""
        key = cid[:_KEY_BYTES]
        if len(key) < _KEY_BYTES:
            return False
        first = self._row + _offset(key)
        end = first + _WINDOW_BYTES
        slot = self._find_key(_EMPTY, first, end)
        if key == _EMPTY:
            slot = -1  # would look like a free slot
        elif self._find_key(key, first, end) >= 0:
            return True
        if slot < 0:
            self.refused += 1
            return False
        self._map[slot : slot + _KEY_BYTES] = key
        self.count += 1
        self._counts[self._index] = self.count
        return True

    def remove(self, cid: bytes) -> None:
        """Nobody owns it any more. Does nothing if this worker did not."""
        key = cid[:_KEY_BYTES]
        if len(key) < _KEY_BYTES:
            return
        first = self._row + _offset(key)
        slot = self._find_key(key, first, first + _WINDOW_BYTES)
        if slot >= 0 and key != _EMPTY:
            self._map[slot : slot + _KEY_BYTES] = _EMPTY
            self.count -= 1
            self._counts[self._index] = self.count

    def owner(self, cid: bytes) -> int | None:
        """The worker that has added it, this one included."""
        key = cid[:_KEY_BYTES]
        if len(key) < _KEY_BYTES or key == _EMPTY:
            return None
        offset = _offset(key)
        find = self._find
        counts = self._counts
        for index in self._live:
            if not counts[index]:
                continue  # only to look at a page of it would make the kernel provide that page
            first = index * _ROW_BYTES + offset
            slot = find(key, first, first + _WINDOW_BYTES)
            if slot >= 0 and not slot % _KEY_BYTES:  # else parts of two keys look like a third
                return index
        return None

    def _find_key(self, key: bytes, first: int, end: int) -> int:
        """The slot with this key, or -1."""
        slot = self._find(key, first, end)
        while slot >= 0 and slot % _KEY_BYTES:  # begins in one slot and ends in the next
            slot = self._find(key, slot + 1, end)
        return slot


def _offset(key: bytes) -> int:
    """Where a key's window begins in a row: 18 bits of the key, in slots."""
    return (key[0] << 10 | key[1] << 2 | key[2] >> 6) * _KEY_BYTES
