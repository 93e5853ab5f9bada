"""Who sits where: the numbers by which workers know each other, and the memory they share.

A *seat* is a number from 0 to 255 that belongs to one worker process as long as anything of it may be left:
it is in the connection IDs of its QUIC connections, it names its row in the shared tables and its queue of
handed-over datagrams. Workers that drain keep their seats beside those that have taken their place, and a
supervisor that takes over from another one (an upgrade) gives its workers seats that the other's do not have.

`Seats` is the supervisor's book of them. *Foreign* seats are those of another supervisor's workers: only the
way to their queues is known, and `forget_absent` finds out when nobody is at the other end any more.
"""

import socket
from typing import Final

from expressgateway.control.census import MAX_WORKERS, CensusTable
from expressgateway.control.parcels import WRITER, Parcel
from expressgateway.net.quic.handover import Pair, is_there
from expressgateway.net.quic.spares import SpareTable

SEATS: Final = MAX_WORKERS


class NoSeatError(Exception):
    """All seats are taken. `str()` is the rest of a sentence that begins with the worker."""


class Seats:
    """See the module's text."""

    __slots__ = ("_foreign", "_own", "census", "spares")

    def __init__(self, census: CensusTable | None = None, spares: SpareTable | None = None) -> None:
        """The tables: new ones, or those of the supervisor before this one; this object's from here on."""
        self.census = census if census is not None else CensusTable()
        self.spares = spares if spares is not None else SpareTable()
        self._own: dict[int, Pair] = {}
        self._foreign: dict[int, socket.socket] = {}

    @property
    def live(self) -> list[int]:
        """Every seat that is taken, foreign ones too."""
        return sorted((*self._own, *self._foreign))

    @property
    def own(self) -> list[int]:
        return sorted(self._own)

    def take(self) -> int:
        """A free seat. Raises `NoSeatError`, or `OSError` if its queue cannot be made."""
        seat = next(
            (seat for seat in range(SEATS) if seat not in self._own and seat not in self._foreign), -1
        )
        if seat < 0:
            raise NoSeatError(f"has no seat: {SEATS} workers are there already, those that drain included")
        self._own[seat] = Pair()
        self.clear(seat)
        return seat

    def clear(self, seat: int) -> None:
        """Forget what a dead worker left in shared memory. Before its replacement starts."""
        self.census.clear(seat)
        self.spares.clear(seat)

    def free(self, seat: int) -> None:
        """Its worker is dead and is not replaced. Idempotent."""
        pair = self._own.pop(seat, None)
        if pair is not None:
            pair.close()
            self.clear(seat)

    # -- what passes between processes

    def reader(self, seat: int) -> int:
        """The descriptor at which the worker in this seat is handed datagrams."""
        return self._own[seat].reader.fileno()

    def writers(self) -> list[Parcel]:
        """The way to every worker's queue."""
        return [
            *((f"{WRITER} {seat}", pair.writer.fileno()) for seat, pair in self._own.items()),
            *((f"{WRITER} {seat}", sock.fileno()) for seat, sock in self._foreign.items()),
        ]

    def writer(self, seat: int) -> Parcel:
        """The way to one worker's queue."""
        return f"{WRITER} {seat}", self._own[seat].writer.fileno()

    def add_foreign(self, seat: int, writer: socket.socket) -> None:
        """There is a worker of another supervisor. The socket is this object's from here on."""
        if seat in self._own:
            raise ValueError(f"seat {seat} is taken")
        known = self._foreign.pop(seat, None)
        if known is not None:
            known.close()
        writer.setblocking(False)
        self._foreign[seat] = writer

    def forget_absent(self) -> list[int]:
        """Foreign seats at whose other end nobody is any more: free from now on."""
        gone = [seat for seat, writer in self._foreign.items() if not is_there(writer)]
        for seat in gone:
            self._foreign.pop(seat).close()
        return gone

    def close(self) -> None:
        """Idempotent."""
        for pair in self._own.values():
            pair.close()
        for writer in self._foreign.values():
            writer.close()
        self._own.clear()
        self._foreign.clear()
        if self.census.fd >= 0:
            self.census.close()
            self.spares.close()


def seat_of(label: str) -> int | None:
    """The seat that a ``writer`` parcel is the way to; None for another label."""
    kind, _, seat = label.partition(" ")
    return int(seat) if kind == WRITER and seat.isdecimal() else None
