"""How much a pool may take at once, and who waits when it has it: breakers and the bounded queue.

Every worker holds to its own part of a limit, so that all together never pass it. A pick that finds nothing
but full backends is *saturated*: the exchange waits its *turn* in the pool's queue, first come, first served,
or is refused at once if the queue is full too.
"""

import sys
from dataclasses import dataclass
from typing import Final, Protocol

from expressgateway.observe.counters import Tally
from expressgateway.upstream.backend import Backend, Load

NO_LIMIT: Final = sys.maxsize


@dataclass(frozen=True, slots=True)
class Limits:
    """``[circuit_breaker]``: a worker's part of it. ``NO_LIMIT`` where there is none."""

    max_connections: int = NO_LIMIT
    """To one backend."""
    max_requests: int = NO_LIMIT
    """In flight on one backend."""
    pool_max_connections: int = NO_LIMIT
    pool_max_requests: int = NO_LIMIT
    max_pending: int = 1024
    """Waiting for a turn; 0: nobody waits."""
    pending_timeout_s: float = 5.0

    @property
    def is_off(self) -> bool:
        return (
            min(self.max_connections, self.max_requests, self.pool_max_connections, self.pool_max_requests)
            == NO_LIMIT
        )


UNLIMITED: Final = Limits()


class Turn(Protocol):
    """Who waits. Gets exactly one of the two calls, unless it leaves the queue."""

    key: bytes | None
    tried: list[Backend]

    def on_turn(self, backend: Backend) -> None: ...
    def on_turn_lost(self) -> None:
        """It took too long."""


class Queue:
    """Exchanges that wait for room, in order. At most ``max_pending``."""

    __slots__ = ("_due", "refused", "timeouts", "waited")

    def __init__(self) -> None:
        self._due: dict[Turn, float] = {}
        # Counters
        self.waited = 0
        self.refused = 0
        self.timeouts = 0

    def __len__(self) -> int:
        return len(self._due)

    def join(self, turn: Turn, limits: Limits, now: float) -> bool:
        """Whether there was a place left."""
        if len(self._due) >= limits.max_pending:
            self.refused += 1
            return False
        self.waited += 1
        self._due[turn] = now + limits.pending_timeout_s
        return True

    def leave(self, turn: Turn) -> None:
        """Idempotent."""
        self._due.pop(turn, None)

    def dismiss(self) -> None:
        """There is nobody to wait for any more: everyone's time is up."""
        for turn in self._due:
            self._due[turn] = 0.0

    def first(self) -> Turn | None:
        return next(iter(self._due), None)

    def sweep(self, now: float) -> None:
        """Tell those whose time is up."""
        late = [turn for turn, due in self._due.items() if now >= due]
        for turn in late:
            if self._due.pop(turn, None) is not None:  # it may have left because of the one before
                self.timeouts += 1
                turn.on_turn_lost()


def full(backend: Backend, load: Load, limits: Limits, hits: Tally) -> bool:
    """Whether one more exchange would pass a limit; ``load`` is the whole pool's. Counts which one."""
    if backend.in_flight >= limits.max_requests:
        hits.add("max_requests")
    elif load.in_flight >= limits.pool_max_requests:
        hits.add("pool_max_requests")
    elif _needs_connection(backend) and backend.open >= limits.max_connections:
        hits.add("max_connections")
    elif _needs_connection(backend) and load.open >= limits.pool_max_connections:
        hits.add("pool_max_connections")
    else:
        return False
    return True


def _needs_connection(backend: Backend) -> bool:
    return backend.connections is None or not backend.connections.has_room


class Budget:
    """Retries as a share of the traffic: each exchange pays in, each retry takes one out.

    What is saved is bounded, so that a quiet day does not pay for a storm; a small reserve lets a pool with
    next to no traffic retry at all.
    """

    __slots__ = ("_share", "_tokens", "refused")

    RESERVE: Final = 10.0
    MOST: Final = 500.0

    def __init__(self, percent: int) -> None:
        self._share = percent / 100
        self._tokens = self.RESERVE if percent else 0.0
        self.refused = 0

    def set_percent(self, percent: int) -> None:
        self._share = percent / 100
        if not percent:
            self._tokens = 0.0

    def deposit(self) -> None:
        if self._tokens < self.MOST:
            self._tokens += self._share

    def withdraw(self) -> bool:
        if self._tokens < 1.0:
            self.refused += 1
            return False
        self._tokens -= 1.0
        return True
