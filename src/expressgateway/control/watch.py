"""Watching over workers: whether each of them still answers, how large it is, and what it counts.

A worker that says nothing is asked where it is in its code (`observe.stacks`); that is logged, and it is
killed. One that is too large is replaced by another one, and drains. Both are events of the log, and counted.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from expressgateway.control.ceiling import FRESH_S, GROWN, Ceiling, Verdict
from expressgateway.control.rolling import Rolling
from expressgateway.control.slots import MEMORY, Slot
from expressgateway.control.worker_process import SERVING, Worker

log = logging.getLogger(__name__)

_SILENCE_PER_TICK: Final = 2  # ticks; see Watch.run


class Watch:
    """Looks at every worker in its place, again and again."""

    def __init__(
        self, slots: Rolling, tasks: asyncio.TaskGroup, collect: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        """`tasks` runs what takes its time; `collect` brings the counters of all workers up to date."""
        self._slots = slots
        self._timing = slots.timing
        self._tasks = tasks
        self._collect = collect
        self._suspects: set[Worker] = set()
        self._ceilings: dict[int, Ceiling] = {}  # by the slot's index
        self._replacing: asyncio.Task[None] | None = None
        self._outgrown: dict[Worker, int] = {}  # those that drain for it, with their size when they began

    async def run(self) -> None:
        """For ever."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(self._timing.tick_s)
            # Silence counts only while we listen: after this process, or the machine, was stopped for a
            # minute, no worker may be taken for hung.
            self._listen(min(time.monotonic() - before, _SILENCE_PER_TICK * self._timing.tick_s))
            self._weigh()
            await self._collect()
            await self._slots.forget_absent()

    # -- silence

    def _listen(self, elapsed_s: float) -> None:
        for slot in list(self._slots.slots):
            worker = slot.worker
            if worker is None or not worker.can_report or worker in self._suspects:
                continue
            worker.silent_s += elapsed_s
            if worker.silent_s > self._timing.hung_after_s and worker.state is SERVING:
                self._suspects.add(worker)
                self._tasks.create_task(self._end(slot, worker), name=f"worker {slot.index} hangs")
            else:
                worker.ping()

    async def _end(self, slot: Slot, worker: Worker) -> None:
        """Of a worker that hangs, unless it turns out that it does not."""
        silent_s = worker.silent_s
        stack, why_not = await worker.stacks(self._timing.stacks_s)
        self._suspects.discard(worker)
        if not worker.is_alive:
            return  # which is told where it is noticed
        fields = {"worker": slot.index, "pid": worker.pid, "silent_s": round(silent_s, 1), "stack": stack}
        if worker.silent_s < silent_s:
            log.warning(
                "worker %d had said nothing for %.0f seconds and answers again: it is slow, and goes on",
                slot.index,
                silent_s,
                extra={"fields": fields},
            )
            return
        slot.hangs += 1
        log.error(
            "worker %d has said nothing for %.0f seconds: it hangs and is killed%s",
            slot.index,
            silent_s,
            f"; there is no stack of it: {why_not}" if why_not else "",
            extra={"fields": fields},
        )
        worker.kill()

    # -- memory

    def _weigh(self) -> None:
        now = time.monotonic()
        limit = self._slots.memory_limit_bytes
        for slot in list(self._slots.slots):
            worker = slot.worker
            if worker is None or worker.state is not SERVING:
                continue
            ceiling = self._ceilings.setdefault(slot.index, Ceiling(self._timing.memory_pause_s))
            rss = worker.measure() if limit else 0
            age_s = now - worker.born
            verdict = ceiling.look(limit, worker.pid, rss, age_s, now)
            if verdict is Verdict.OUTGROWN:
                self._tell(slot, worker, rss, age_s, ceiling.wait_s(now))
            elif verdict is Verdict.DUE and self._replacing is None:
                self._replacing = self._tasks.create_task(
                    self._replace(slot, worker, rss, ceiling), name=f"replace worker {slot.index}"
                )
        for worker, size in list(self._outgrown.items()):
            if not worker.is_alive:
                del self._outgrown[worker]
            elif worker.measure() > GROWN * size:
                self._cut_off(worker, size)

    def _tell(self, slot: Slot, worker: Worker, rss: int, age_s: float, wait_s: float) -> None:
        limit = self._slots.memory_limit_bytes
        when = f"in {wait_s:.0f} seconds" if wait_s else "now"
        fields = {"worker": slot.index, "pid": worker.pid, "rss_bytes": rss, "limit_bytes": limit}
        if age_s < FRESH_S:
            log.error(
                "worker %d uses %d bytes soon after its start: runtime.worker_memory_limit_bytes = %d is too "
                "low for what is configured, raise it; it is replaced %s",
                slot.index,
                rss,
                limit,
                when,
                extra={"fields": fields},
            )
        else:
            log.warning(
                "worker %d uses %d bytes, more than runtime.worker_memory_limit_bytes = %d: it is replaced "
                "%s",
                slot.index,
                rss,
                limit,
                when,
                extra={"fields": fields},
            )

    async def _replace(self, slot: Slot, worker: Worker, rss: int, ceiling: Ceiling) -> None:
        try:
            fault = await self._slots.replace(slot, MEMORY)
            if fault is None:
                self._outgrown[worker] = rss
                log.info(
                    "worker %d is replaced for its memory; the old one drains",
                    slot.index,
                    extra={"fields": {"worker": slot.index, "pid": worker.pid}},
                )
                return
            now = time.monotonic()
            ceiling.put_off(now)
            log.warning(
                "worker %d, which uses too much memory, goes on: it %s; the next attempt is in %.0f seconds",
                slot.index,
                fault,
                ceiling.wait_s(now),
                extra={"fields": {"worker": slot.index, "pid": worker.pid}},
            )
        finally:
            self._replacing = None

    def _cut_off(self, worker: Worker, size: int) -> None:
        log.error(
            "worker %d, which drains because of its memory, has grown on from %d bytes to twice that and is "
            "killed; %d connections are cut",
            worker.index,
            size,
            sum(worker.open.values()),
            extra={"fields": {"worker": worker.index, "pid": worker.pid}},
        )
        worker.aborted = dict(worker.open)
        del self._outgrown[worker]
        worker.kill()
