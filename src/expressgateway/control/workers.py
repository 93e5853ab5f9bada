"""The fleet: all workers, started together, watched, replaced, configured alike, drained at the end.

A *slot* is a worker's place: its index, its row of the census, its member of each listener. Workers come and
go in it. Start-up has two steps, so that nothing is half up: every worker applies the configuration, and only
then does any of them accept.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Final

from expressgateway.control.backoff import Backoff
from expressgateway.control.channel import Message
from expressgateway.control.failures import StartError
from expressgateway.control.ledger import Ledger
from expressgateway.control.worker_process import (
    SERVING,
    Launch,
    RefusedError,
    Snapshot,
    Worker,
    WorkerGoneError,
    told,
)
from expressgateway.observe.counters import Sample

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timing:
    """How patient the supervisor is with its workers, in seconds."""

    tick_s: float = 1.0
    """Between two looks at every worker: its liveness and its counters."""
    hung_after_s: float = 30.0
    """A worker that says nothing for so long is killed and replaced."""
    start_s: float = 30.0
    """For a new worker to apply the configuration."""
    apply_s: float = 10.0
    """For a running worker to apply another one."""
    collect_s: float = 0.5
    """For counters; then those of the last time are used."""
    close_s: float = 1.0
    """For draining workers to stop accepting, before the listening sockets are closed over their heads."""


PATIENT: Final = Timing()

_SILENCE_PER_TICK: Final = 2  # ticks; see Fleet._watch


class Slot:
    """A worker's place."""

    __slots__ = ("backoff", "cpu_before_s", "index", "restarts", "worker")

    def __init__(self, index: int) -> None:
        self.index = index
        self.worker: Worker | None = None
        self.restarts = 0
        self.backoff = Backoff()
        self.cpu_before_s = 0.0
        """Processor time of the workers that were here before."""


class Fleet:
    """Every worker. Its background work runs in `tasks`, which the caller owns."""

    def __init__(
        self,
        launch: Launch,
        tasks: asyncio.TaskGroup,
        tickets: Callable[[], list[Message]] = list,
        timing: Timing = PATIENT,
    ) -> None:
        self._launch = launch
        self._tasks = tasks
        self._tickets = tickets
        self._timing = timing
        self._snapshot: Snapshot | None = None
        self._is_stopping = asyncio.Event()
        self._collecting: asyncio.Task[None] | None = None
        self._keepers: list[asyncio.Task[None]] = []
        self._watcher: asyncio.Task[None] | None = None
        self.slots = [Slot(index) for index in range(launch.census.workers)]
        self.ledger = Ledger()
        self.aborted: dict[str, int] = {}
        """Connections that the drain cut off, by listener."""

    # -- what can be seen

    @property
    def workers(self) -> Iterator[Worker]:
        """Those alive."""
        return (slot.worker for slot in self.slots if slot.worker is not None and slot.worker.is_alive)

    @property
    def serving(self) -> int:
        """How many accept connections."""
        return sum(worker.state is SERVING for worker in self.workers)

    def open(self) -> dict[str, int]:
        """Connections open, by listener, as last told."""
        total: dict[str, int] = {}
        for worker in self.workers:
            for name, count in worker.open.items():
                total[name] = total.get(name, 0) + count
        return total

    def samples(self) -> Iterator[Sample]:
        """What the supervisor itself knows of its workers."""
        for slot in self.slots:
            labels = (str(slot.index),)
            worker = slot.worker if slot.worker is not None and slot.worker.is_alive else None
            yield "worker_up", labels, int(worker is not None and worker.state is SERVING)
            yield "worker_restarts", labels, slot.restarts
            yield "worker_rss_bytes", labels, worker.measure() if worker is not None else 0
            yield "worker_cpu_seconds", labels, slot.cpu_before_s + (worker.cpu_s if worker else 0.0)

    # -- life

    async def start(self, snapshot: Snapshot) -> None:
        """Have every worker serve. Raises `StartError`; what was started is then the caller's to `kill`."""
        self._snapshot = snapshot
        await self._all(self._bring_up, "before it was configured")
        await self._all(self._serve, "before it served")
        self._keepers = [
            self._tasks.create_task(self._keep(slot), name=f"slot {slot.index}") for slot in self.slots
        ]
        self._watcher = self._tasks.create_task(self._watch(), name="watch over the workers")

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

    async def _bring_up(self, slot: Slot) -> None:
        """A new worker in the slot, with the configuration and the ticket keys. Raises as `Worker` does."""
        worker = await Worker.launch(slot.index, self._launch, self._tasks)
        slot.worker = worker
        if self._is_stopping.is_set():
            worker.kill()
            raise WorkerGoneError("is not needed any more")
        await self._configure(worker, self._timing.start_s)

    async def _configure(self, worker: Worker, timeout_s: float) -> None:
        """Give a worker the newest configuration, and again if a reload came between."""
        while self._snapshot is not None and worker.version != self._snapshot.version:
            await worker.configure(self._snapshot, timeout_s)
            for message in self._tickets():
                worker.send(message)

    async def _serve(self, slot: Slot) -> None:
        if slot.worker is not None:
            await slot.worker.serve(self._timing.start_s)

    async def _keep(self, slot: Slot) -> None:
        """Somebody in the slot, until the drain."""
        while (worker := slot.worker) is not None:
            status = await worker.gone()
            lived_s = time.monotonic() - worker.born
            self._bury(slot, worker)
            if self._is_stopping.is_set():
                return
            log.error(
                "worker %d %s after %.1f seconds of life; it is replaced",
                slot.index,
                told(status),
                lived_s,
                extra={"fields": {"worker": slot.index, "pid": worker.pid, "status": status}},
            )
            while not await self._replace(slot, lived_s):
                lived_s = 0.0
                if self._is_stopping.is_set():
                    return

    async def _replace(self, slot: Slot, lived_s: float) -> bool:
        """One attempt at a new worker, after the pause that is due. False: it came to nothing."""
        pause_s = slot.backoff.pause_s(lived_s)
        if slot.backoff.failures > 1:
            log.error(
                "worker %d does not stay alive: %d deaths in a row; the next attempt is in %.1f seconds",
                slot.index,
                slot.backoff.failures,
                pause_s,
                extra={"fields": {"worker": slot.index}},
            )
        if pause_s and await self._stops_within(pause_s):
            return False
        began = time.monotonic()
        slot.restarts += 1
        previous = slot.worker
        try:
            await self._bring_up(slot)
            await self._serve(slot)
            if slot.worker is not None:
                await self._configure(slot.worker, self._timing.apply_s)
        except (RefusedError, WorkerGoneError) as error:
            worker = slot.worker
            if worker is not None and worker is not previous:
                worker.kill()
                await worker.gone()
                self._bury(slot, worker)
            if not self._is_stopping.is_set():
                log.error("the new worker %d cannot take its place: it %s", slot.index, _because(error))
            return False
        log.info(
            "worker %d serves again, %.2f seconds later",
            slot.index,
            time.monotonic() - began,
            extra={"fields": {"worker": slot.index, "pid": slot.worker.pid if slot.worker else None}},
        )
        return True

    async def _stops_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._is_stopping.wait()
        except TimeoutError:
            return False
        return True

    def _bury(self, slot: Slot, worker: Worker) -> None:
        self.ledger.record(slot.index, worker.samples)
        self.ledger.retire(slot.index)
        slot.cpu_before_s += worker.cpu_s
        self._launch.census.clear(slot.index)
        for name, count in worker.aborted.items():
            self.aborted[name] = self.aborted.get(name, 0) + count

    # -- watching

    async def _watch(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(self._timing.tick_s)
            # Silence counts only while we listen: after this process, or the machine, was stopped for a
            # minute, no worker may be taken for hung.
            elapsed_s = min(time.monotonic() - before, _SILENCE_PER_TICK * self._timing.tick_s)
            for worker in list(self.workers):
                if worker.can_report:
                    worker.silent_s += elapsed_s
                    if worker.silent_s > self._timing.hung_after_s and worker.state is SERVING:
                        log.error(
                            "worker %d has said nothing for %.0f seconds: it hangs and is killed",
                            worker.index,
                            worker.silent_s,
                            extra={"fields": {"worker": worker.index, "pid": worker.pid}},
                        )
                        worker.kill()
                    else:
                        worker.ping()
            await self.collect()

    async def collect(self) -> None:
        """Bring the ledger up to date, as far as workers answer in time. Callers at once share one."""
        if self._collecting is None or self._collecting.done():
            self._collecting = self._tasks.create_task(self._collect(), name="collect")
        await asyncio.shield(self._collecting)

    async def _collect(self) -> None:
        await asyncio.gather(*(self._collect_from(worker) for worker in self.workers if worker.can_report))

    async def _collect_from(self, worker: Worker) -> None:
        try:
            await worker.collect(self._timing.collect_s)
        except WorkerGoneError:
            pass  # its last samples stand
        if worker.is_alive:
            self.ledger.record(worker.index, worker.samples)

    # -- changes

    def broadcast(self, messages: list[Message]) -> None:
        """Send to every worker that is configured."""
        for worker in self.workers:
            if worker.version:
                for message in messages:
                    worker.send(message)

    async def apply(self, snapshot: Snapshot) -> str | None:
        """Have all workers swap to a configuration. A sentence if one of them cannot: then none has it.

        A worker that dies or hangs over it counts as one that cannot.
        """
        before = self._snapshot
        targets = [worker for worker in self.workers if worker.state is SERVING]
        attempts = (self._attempt(worker, snapshot) for worker in targets)
        faults = [fault for fault in await asyncio.gather(*attempts) if fault is not None]
        if faults and before is not None:
            await asyncio.gather(*(self._attempt_or_kill(worker, before) for worker in targets))
            self.broadcast(self._tickets())
            return faults[0]
        self._snapshot = snapshot
        # Those that came up in the meantime; who comes up from now on looks for itself.
        late = [worker for worker in self.workers if worker.state is SERVING]
        await asyncio.gather(
            *(
                self._attempt_or_kill(worker, snapshot)
                for worker in late
                if worker.version != snapshot.version
            )
        )
        return None

    async def _attempt(self, worker: Worker, snapshot: Snapshot) -> str | None:
        try:
            await worker.configure(snapshot, self._timing.apply_s)
        except RefusedError as error:
            return str(error)
        except WorkerGoneError as error:
            return f"worker {worker.index} {error}"
        return None

    async def _attempt_or_kill(self, worker: Worker, snapshot: Snapshot) -> None:
        """A worker that cannot apply what all others have is replaced."""
        if not worker.is_alive:
            return
        if (fault := await self._attempt(worker, snapshot)) is not None:
            log.error("worker %d cannot apply the configuration and is replaced: %s", worker.index, fault)
            worker.kill()

    # -- the end

    async def drain(self, budget_s: float) -> None:
        """Have all workers stop accepting, finish, and exit; kill what is left after `budget_s`.

        Closes the supervisor's ends of the listening sockets, so that a worker's close ends the listening.
        """
        self._is_stopping.set()
        # Before the workers: who closes a listening socket last resets what is in its queue, and only they
        # can empty it first.
        self.close_sockets()
        draining: list[Worker] = []
        for worker in list(self.workers):
            if worker.state is SERVING:
                worker.drain()
                draining.append(worker)
            else:
                worker.kill()
        ended = asyncio.get_running_loop().time() + budget_s
        stopped = [worker.stopped_accepting for worker in draining]
        if stopped:
            await asyncio.wait(stopped, timeout=min(self._timing.close_s, budget_s))
        if self._keepers:
            left_s = max(0.0, ended - asyncio.get_running_loop().time())
            _, late = await asyncio.wait(self._keepers, timeout=left_s)
            if late:
                for worker in self.workers:
                    log.warning("worker %d has not drained in time and is killed", worker.index)
                    worker.aborted = dict(worker.open)
                    worker.kill()
                await asyncio.wait(self._keepers)

    def close_sockets(self) -> None:
        for bound in self._launch.listeners:
            bound.close()

    def kill(self) -> None:
        """End every worker now, and replace none of them."""
        self._is_stopping.set()
        for worker in self.workers:
            worker.kill()

    async def close(self) -> None:
        """After `kill` or `drain`: until every worker is dead, and the background work over."""
        if self._watcher is not None:
            self._watcher.cancel()
        for slot in self.slots:
            if slot.worker is not None:
                await slot.worker.gone()


def _because(error: Exception) -> str:
    return f"refuses the configuration: {error}" if isinstance(error, RefusedError) else str(error)
