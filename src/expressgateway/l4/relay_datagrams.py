"""DATAGRAM frames (RFC 9221) on their way to one side of a relay: a bounded queue, in which the newest loses.

The engine sends datagrams before streams and keeps those that congestion control holds back without a bound.
So it is given no more than leaves at once: as much as there is room for, and at most one when there is none,
with which it tells that there is room again.
"""

from collections import deque
from typing import Final, Protocol

from expressgateway.observe.counters import ListenerCounters

MOST_AT_ONCE: Final = 32  # less than a connection sends in one turn: what was given is gone after it
_PACKET_BYTES: Final = 1232
_OVERHEAD_BYTES: Final = 44  # of a packet with one datagram


class DatagramSide(Protocol):
    """One connection, as far as datagrams go."""

    @property
    def is_usable(self) -> bool: ...
    @property
    def room_bytes(self) -> int:
        """How much congestion control lets go now."""

    def send_datagram(self, data: bytes) -> bool: ...
    def wake(self) -> None: ...


class DatagramQueue:
    """See the module's text."""

    __slots__ = ("_counters", "_direction", "_given", "_inside_bytes", "_most", "_side", "_waiting")

    def __init__(self, direction: int, most: int, counters: ListenerCounters) -> None:
        """``direction``: the side they come from. ``most``: that wait; further ones are dropped."""
        self._direction = direction
        self._most = most
        self._counters = counters
        self._side: DatagramSide | None = None
        self._waiting: deque[bytes] = deque()
        self._given = 0  # since something was sent
        self._inside_bytes = 0  # that the engine may still hold

    def __len__(self) -> int:
        return len(self._waiting)

    def use(self, side: DatagramSide) -> None:
        """Where they go; in place of a connection that never came to be."""
        self._side = side

    def add(self, data: bytes) -> None:
        if len(self._waiting) >= self._most:
            self._counters.quic_dropped.add("queue_full")
            return
        self._waiting.append(data)
        self._give()

    def on_room(self) -> None:
        """The side has sent what it could."""
        side = self._side
        if side is None or not (self._waiting or self._inside_bytes):
            return
        self._given = 0
        if side.room_bytes >= _PACKET_BYTES:
            self._inside_bytes = 0
        self._give()

    def _give(self) -> None:
        side = self._side
        if side is None or not side.is_usable:
            return
        waiting = self._waiting
        counters = self._counters
        room = side.room_bytes
        has_given = False
        while waiting and self._given < MOST_AT_ONCE:
            size = len(waiting[0]) + _OVERHEAD_BYTES
            if self._inside_bytes and self._inside_bytes + size > room:
                break
            data = waiting.popleft()
            if not side.send_datagram(data):
                # The peer takes none (RFC 9221 3), or none so large, or no path we know of carries it.
                counters.quic_dropped.add("not_taken")
                continue
            has_given = True
            self._given += 1
            self._inside_bytes += size
            counters.quic_datagrams[self._direction] += 1
            counters.relayed[self._direction] += len(data)
        if has_given:
            side.wake()

    def close(self) -> None:
        """There is no way to the side any more."""
        for _ in self._waiting:
            self._counters.quic_dropped.add("closed")
        self._waiting.clear()
        self._side = None
