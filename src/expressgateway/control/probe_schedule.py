"""When backends are probed: each on its own schedule, few at a time, nobody held up by another.

A backend's first probe runs at once; its second comes somewhere within the next interval, so that a thousand
backends found together do not stay in step; then one each interval, give or take the jitter. Intervals are
counted from one start to the next, whatever a probe takes, and a backend has one probe under way at most.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from expressgateway.control import probes
from expressgateway.control.probes import Probe, Result
from expressgateway.upstream.health_backend import HealthSettings

MAX_PROBES: Final = 256  # under way at a time; the next ones wait in order
MIN_OF_POOL: Final = 4  # so many of each pool need not wait for another pool, all of which hangs; ...
MOST_PROBES: Final = 512  # ... but no more than these are under way at all

_LEAST_FIRST_GAP: Final = 0.2  # of an interval

Key = tuple[str, str]
"""Pool and backend."""

OnResult = Callable[[Key, Result, float], None]
"""Told of each probe: whose, the result, and what it took in seconds."""

Run = Callable[[Probe, float], Awaitable[Result | None]]


class _Turn:
    """One backend's schedule."""

    __slots__ = ("due", "handle", "has_begun", "is_gone", "key", "probe", "settings", "task")

    def __init__(self, key: Key, probe: Probe, settings: HealthSettings, now: float) -> None:
        self.key = key
        self.probe = probe
        self.settings = settings
        self.due = now  # monotonic
        self.has_begun = False
        self.is_gone = False
        self.handle: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None


class ProbeSchedule:
    """Everybody's schedules. To be used on the loop's thread."""

    __slots__ = ("_clock", "_of_pool", "_on_result", "_queue", "_random", "_run", "_running", "_turns")

    def __init__(
        self,
        on_result: OnResult,
        clock: Callable[[], float],
        *,
        chance: Callable[[], float] = random.random,
        run: Run = probes.run,
    ) -> None:
        """`chance`: a number from 0 to 1."""
        self._on_result = on_result
        self._clock = clock
        self._random = chance
        self._run = run
        self._turns: dict[Key, _Turn] = {}
        self._queue: dict[_Turn, None] = {}  # due, and waiting for room; in order, each at most once
        self._running = 0
        self._of_pool: Counter[str] = Counter()  # of these; pools with none are not in it

    def watch(self, key: Key, probe: Probe, settings: HealthSettings) -> None:
        """Probe this backend from now on, the first time at once. Replaces an earlier schedule of the key."""
        self.forget(key)
        turn = self._turns[key] = _Turn(key, probe, settings, self._clock())
        self._on_due(turn)

    def forget(self, key: Key) -> None:
        """No result of this backend comes any more. Idempotent."""
        turn = self._turns.pop(key, None)
        if turn is None:
            return
        turn.is_gone = True
        self._queue.pop(turn, None)
        if turn.handle is not None:
            turn.handle.cancel()
        if turn.task is not None:
            turn.task.cancel()

    def close(self) -> None:
        """Forget all."""
        for key in list(self._turns):
            self.forget(key)

    @property
    def running(self) -> int:
        """Probes under way."""
        return self._running

    def _on_due(self, turn: _Turn) -> None:
        turn.handle = None
        if self._of_pool[turn.key[0]] < MIN_OF_POOL and self._running < MOST_PROBES:
            self._begin(turn)
        else:
            self._queue[turn] = None
            self._fill()

    def _fill(self) -> None:
        while self._queue and self._running < MAX_PROBES:
            turn = next(iter(self._queue))
            del self._queue[turn]
            self._begin(turn)

    def _begin(self, turn: _Turn) -> None:
        self._running += 1
        self._of_pool[turn.key[0]] += 1
        turn.task = asyncio.get_running_loop().create_task(self._probe(turn), name=f"probe {turn.key}")
        turn.task.add_done_callback(partial(self._on_done, turn))

    async def _probe(self, turn: _Turn) -> None:
        began = self._clock()
        result = await self._run(turn.probe, turn.settings.timeout_s)
        if result is not None and not turn.is_gone:
            self._on_result(turn.key, result, self._clock() - began)

    def _on_done(self, turn: _Turn, task: asyncio.Task[None]) -> None:
        turn.task = None
        self._running -= 1
        pool = turn.key[0]
        self._of_pool[pool] -= 1
        if not self._of_pool[pool]:
            del self._of_pool[pool]
        if not turn.is_gone:
            now = self._clock()
            turn.due = max(turn.due + self._gap_s(turn), now)
            loop = asyncio.get_running_loop()
            turn.handle = loop.call_later(turn.due - now, self._on_due, turn)
        self._fill()

    def _gap_s(self, turn: _Turn) -> float:
        settings = turn.settings
        chance = self._random()
        if settings.jitter and not turn.has_begun:
            share = _LEAST_FIRST_GAP + (1 - _LEAST_FIRST_GAP) * chance
        else:
            share = 1 + settings.jitter * (chance - 0.5)
        turn.has_begun = True
        return settings.interval_s * share
