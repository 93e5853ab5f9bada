"""The moments at which QUIC connections want to be called: one heap, one timer of the loop, per worker.

A connection's timer moves with every packet, nearly always to later. So it has one entry here, at the
earliest moment it has asked for; when that comes, the connection looks itself whether it is due. Entries that
were overtaken by an earlier one stay in the heap until their time and are then passed over: at most one for
each time a connection's moment came forward within the longest of its timers, the idle timeout.

An entry keeps its connection in memory. When connections are over, entries that are good for nothing are
therefore removed, many at a time: no more of them stay than there are others.
"""

import asyncio
import heapq
import itertools
import time
from typing import Final, Protocol

from expressgateway.net.reactor import Reactor

NEVER: Final = float("inf")
_HALF_A_TICK_S: Final = 0.0005


class Timed(Protocol):
    due: float
    """The moment of its entry in seconds, ``NEVER`` without one: kept by `Timers`."""

    def on_timer(self, now: float) -> None: ...


class Timers:
    """See the module's text."""

    __slots__ = ("_armed_for", "_heap", "_loop", "_order", "_reactor", "_stale", "_timer")

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._loop = asyncio.get_running_loop()
        self._heap: list[tuple[float, int, Timed]] = []
        self._order = itertools.count()
        self._stale = 0  # entries that were overtaken, or are of nobody
        self._timer: asyncio.TimerHandle | None = None
        self._armed_for = NEVER

    def schedule(self, timed: Timed, at: float) -> None:
        """Call it at ``at``, or before."""
        if at >= timed.due:
            return
        if timed.due != NEVER:
            self._stale += 1
        timed.due = at
        heapq.heappush(self._heap, (at, next(self._order), timed))
        if at < self._armed_for:
            self._arm(at)

    def cancel(self, timed: Timed) -> None:
        """It is over: do not call it, and forget it soon."""
        if timed.due != NEVER:
            timed.due = NEVER
            self._stale += 1
        if 2 * self._stale > len(self._heap):
            self._stale = 0
            self._heap[:] = [entry for entry in self._heap if entry[0] == entry[2].due]
            heapq.heapify(self._heap)

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed_for = at
        # uvloop rounds to milliseconds: a call before the moment would be made again and again until then.
        self._timer = self._loop.call_later(max(0.0, at - time.monotonic()) + _HALF_A_TICK_S, self._fire)

    def _fire(self) -> None:
        now = time.monotonic()
        self._reactor.now = now
        self._timer = None
        self._armed_for = NEVER
        heap = self._heap
        while heap and heap[0][0] <= now:
            at, _, timed = heapq.heappop(heap)
            if at != timed.due:
                self._stale -= 1
                continue
            timed.due = NEVER
            try:
                timed.on_timer(now)
            except Exception:  # noqa: BLE001 - the safety net, as in the reactor
                self._reactor.fault(timed.on_timer)
        if heap and heap[0][0] < self._armed_for:
            self._arm(heap[0][0])

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._heap.clear()
        self._stale = 0
