"""The fleet: all workers, started together, watched, replaced, configured alike, drained at the end.

Start-up has two steps, so that nothing is half up: every worker applies the configuration, and only then does
any of them accept. Whatever cannot be done is taken back. The places are kept filled by `slots`, changes are
`rolling`'s, and `watch` looks after those that serve.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any

from expressgateway.control.failures import StartError
from expressgateway.control.rolling import Rolling
from expressgateway.control.slots import PATIENT, Slot, Timing
from expressgateway.control.watch import Watch
from expressgateway.control.worker_process import (
    CLOSE,
    HAND_OVER,
    SERVING,
    RefusedError,
    Snapshot,
    Worker,
    WorkerGoneError,
    told,
)
from expressgateway.observe.counters import Sample

__all__ = ["PATIENT", "Fleet", "Slot", "Timing"]

log = logging.getLogger(__name__)


class Fleet(Rolling):
    """Every worker."""

    _watching: asyncio.Task[None] | None = None
    _collecting: asyncio.Task[None] | None = None

    # -- what can be seen

    @property
    def leaving(self) -> int:
        """How many drain while another one has their place."""
        return len(self._leaving)

    @property
    def serving(self) -> int:
        """How many accept connections."""
        return sum(worker.state is SERVING for worker in self.workers)

    def open(self) -> dict[str, int]:
        """Connections open, by listener, as last told."""
        total: dict[str, int] = {}
        for worker in self.everybody:
            for name, count in worker.open.items():
                total[name] = total.get(name, 0) + count
        return total

    def samples(self) -> Iterator[Sample]:
        """What the supervisor itself knows of its workers."""
        for slot in list(self.slots):
            labels = (str(slot.index),)
            worker = slot.worker if slot.worker is not None and slot.worker.is_alive else None
            yield "worker_up", labels, int(worker is not None and worker.state is SERVING)
            yield "worker_restarts", labels, slot.restarts
            yield "worker_crash_looping", labels, int(slot.is_crash_looping)
            yield "worker_hangs", labels, slot.hangs
            for cause, count in slot.replacements.items():
                yield "worker_replacements", (*labels, cause), count
            yield "worker_rss_bytes", labels, worker.measure() if worker is not None else 0
            yield "worker_cpu_seconds", labels, slot.cpu_before_s + (worker.cpu_s if worker else 0.0)
        yield "worker_memory_limit_bytes", (), self.memory_limit_bytes
        yield "workers_leaving", (), len(self._leaving)

    # -- life

    async def start(
        self, snapshot: Snapshot, count: int, gate: Callable[[], Coroutine[Any, Any, None]] | None = None
    ) -> None:
        """Have so many workers serve. Raises `StartError`; what was started is then the caller's to `kill`.

        `gate`: what is to be waited for between the two steps. It may raise `StartError`, too.
        """
        self._snapshot = snapshot
        self.slots = [Slot(index) for index in range(count)]
        await self._all(self._bring_up, "before it was configured")
        await self._introduce(is_moving=gate is not None)
        if gate is not None:
            await gate()
        await self._all(self._serve, "before it served")
        for slot in self.slots:
            if slot.worker is not None:
                self._keep_up(slot, slot.worker)
        watch = Watch(self, self._tasks, self.collect)
        self._watching = self._tasks.create_task(watch.run(), name="watch over the workers")

    async def _all(self, step: Callable[[Slot], Coroutine[Any, Any, None]], when: str) -> None:
        results = await asyncio.gather(*(step(slot) for slot in self.slots), return_exceptions=True)
        for slot, result in zip(self.slots, results, strict=True):
            if isinstance(result, RefusedError):
                raise StartError(f"the configuration cannot be applied: {result}")
            if isinstance(result, WorkerGoneError):
                end = str(result)
                if slot.worker is not None and (status := await slot.worker.soon_exited()) is not None:
                    end = f"{told(status)} {when}; its own output may say why"
                raise StartError(f"worker {slot.index} {end}")
            if result is not None:
                raise result

    # -- counters

    async def collect(self) -> None:
        """Bring the ledger up to date, as far as workers answer in time. Callers at once share one."""
        if self._collecting is None or self._collecting.done():
            self._collecting = self._tasks.create_task(self._collect(), name="collect")
        await asyncio.shield(self._collecting)

    async def _collect(self) -> None:
        await asyncio.gather(*(self._collect_from(worker) for worker in self.everybody if worker.can_report))

    async def _collect_from(self, worker: Worker) -> None:
        try:
            await worker.collect(self.timing.collect_s)
        except WorkerGoneError:
            pass  # its last counts stand

    # -- another supervisor

    def hold(self) -> None:
        """Start no worker until `release`: another supervisor chooses seats."""
        self._is_held.clear()

    def release(self) -> None:
        self._is_held.set()

    async def meet(self, foreign: Mapping[int, int]) -> None:
        """Have everybody know of another supervisor's workers - their slots by their seats - before these
        read our sockets."""
        self.foreign |= foreign
        await self._introduce(is_moving=True)

    async def make_way(self, budget_s: float, on_left: Callable[[], None]) -> None:
        """Another supervisor's workers serve: have ours drain and exit, as in `drain`. `on_left` is called
        when they have stopped reading the sockets."""
        self._is_stopping.set()
        self._is_held.set()
        await self._end(budget_s, HAND_OVER, on_left)

    async def part(self) -> None:
        """Another supervisor's workers do not read our sockets any more; those that are gone are
        forgotten."""
        for seat in self._seats.forget_absent():
            self.foreign.pop(seat, None)
        await self._introduce(is_moving=False)

    # -- the end

    async def drain(self, budget_s: float, how: str = CLOSE) -> None:
        """Have all workers stop accepting, finish, and exit; kill what is left after `budget_s`.

        To be called when the supervisor's ends of the listening sockets are closed: who closes one last
        resets what is in its queue, and only workers can empty it first. `how`: `KEEP` if somebody else has
        the sockets and will serve them later.
        """
        self._is_stopping.set()
        self._is_held.set()
        await self._end(budget_s, how)

    async def _end(self, budget_s: float, how: str, on_stopped: Callable[[], None] = lambda: None) -> None:
        draining: list[Worker] = []
        for worker in list(self.workers):
            if worker.state is SERVING:
                worker.drain(how)
                draining.append(worker)
            else:
                worker.kill()
        ended = asyncio.get_running_loop().time() + budget_s
        stopped = [worker.stopped_accepting for worker in draining]
        if stopped:
            await asyncio.wait(stopped, timeout=min(self.timing.close_s, budget_s))
        on_stopped()
        if self._keepers:
            left_s = max(0.0, ended - asyncio.get_running_loop().time())
            _, late = await asyncio.wait(self._keepers, timeout=left_s)
            if late:
                for worker in self.everybody:
                    log.warning("worker %d has not drained in time and is killed", worker.index)
                    worker.aborted = dict(worker.open)
                    worker.kill()
                await asyncio.wait(late)

    def kill(self) -> None:
        """End every worker now, and replace none of them."""
        self._is_stopping.set()
        self._is_held.set()
        for worker in self.everybody:
            worker.kill()

    async def close(self) -> None:
        """After `kill` or `drain`: until every worker is dead, and the background work over."""
        if self._watching is not None:
            self._watching.cancel()
        for slot in [*self.slots, *([self._stand_in] if self._stand_in is not None else [])]:
            if slot.worker is not None:
                await slot.worker.gone()
        for worker in list(self._leaving):
            await worker.gone()
