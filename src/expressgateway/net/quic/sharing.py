"""What the workers of one gateway share for QUIC, as one of them sees it.

Each worker has a *seat*, a number that its connection IDs carry and by which the others reach it; who is
there changes while a worker runs. Introduces `QuicSharing`, a worker's end, and `SharedListener`, what one
listener's endpoint asks of it. The supervisor's end is `control.seats`.
"""

import os
import socket
from collections.abc import Callable, Collection, Sequence

from expressgateway.net.batches import Address
from expressgateway.net.datagram import Control
from expressgateway.net.quic.cids import CID_BYTES, make_cid, worker_of
from expressgateway.net.quic.handover import Handover
from expressgateway.net.quic.spares import Spares


class Alone:
    """One worker: nothing to share. Implements ``endpoint.Sharing``."""

    index = 0
    is_moving = False

    def make_cid(self) -> bytes:
        return os.urandom(CID_BYTES)

    def owner(self, cid: bytes) -> int | None:
        return None

    def add(self, cid: bytes) -> None:
        """Nobody asks."""

    def remove(self, cid: bytes) -> None:
        """As above."""

    def give(
        self,
        worker: int,
        data: bytes,
        segment_bytes: int,
        address: Address,
        control: Sequence[Control],
        ecn: int,
    ) -> None:
        """There is nobody."""


class QuicSharing:
    """A worker's end."""

    __slots__ = ("_live", "handover", "is_moving", "on_moving", "seat", "spares")

    def __init__(self, seat: int, spares: Spares, handover: Handover) -> None:
        self.seat = seat
        self.spares = spares
        self.handover = handover
        self._live: frozenset[int] = frozenset((seat,))
        self.is_moving = False
        """Whether another worker reads, or is about to read, the sockets that this one reads: then it must
        find in the table also the connection IDs that clients chose for their first packets."""
        self.on_moving: Callable[[], None] | None = None
        """Told when that begins."""

    @property
    def live(self) -> frozenset[int]:
        """The seats that are taken, this one's among them."""
        return self._live

    def seat_all(self, seats: Collection[int], is_moving: bool) -> None:
        """Who is there from now on."""
        self._live = frozenset((*seats, self.seat))
        self.spares.set_live(sorted(self._live))
        for other in self.handover.others:
            if other not in self._live:
                self.handover.disconnect(other)
        begins = is_moving and not self.is_moving
        self.is_moving = is_moving
        if begins and self.on_moving is not None:
            self.on_moving()

    def connect(self, seat: int, writer: socket.socket) -> None:
        """Where another worker takes what is handed to it. The socket is this object's from here on."""
        self.handover.connect(seat, writer)


class SharedListener:
    """What one listener's endpoint asks of it. Implements ``endpoint.Sharing``."""

    __slots__ = ("_number", "_sharing", "index")

    def __init__(self, sharing: QuicSharing, number: int) -> None:
        """``number``: of the listener, by which the other workers know it, too."""
        self._sharing = sharing
        self._number = number
        self.index = sharing.seat

    @property
    def is_moving(self) -> bool:
        return self._sharing.is_moving

    def make_cid(self) -> bytes:
        return make_cid(self.index)

    def owner(self, cid: bytes) -> int | None:
        worker = worker_of(cid)
        if worker is None or worker not in self._sharing.live:
            return self._sharing.spares.owner(cid)
        return worker

    def add(self, cid: bytes) -> None:
        self._sharing.spares.add(cid)

    def remove(self, cid: bytes) -> None:
        if worker_of(cid) is None:
            self._sharing.spares.remove(cid)

    def give(
        self,
        worker: int,
        data: bytes,
        segment_bytes: int,
        address: Address,
        control: Sequence[Control],
        ecn: int,
    ) -> None:
        self._sharing.handover.give(worker, self._number, data, segment_bytes, address, list(control), ecn)
