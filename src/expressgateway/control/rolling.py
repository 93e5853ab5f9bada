"""Many workers at once: another configuration, other processes, more or fewer of them.

What is to have no gap is *rolled*: new workers read the same sockets beside the old ones, which then leave:
they drain, and end when they are idle. What cannot be done is taken back, and everybody goes on as before.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from expressgateway.control.channel import Message
from expressgateway.control.slots import RELOAD, Slot, Slots, because
from expressgateway.control.worker_process import (
    CLOSE,
    HAND_OVER,
    SERVING,
    Launch,
    RefusedError,
    Snapshot,
    Worker,
    WorkerGoneError,
)

log = logging.getLogger(__name__)

_LAST_HANDSHAKES_S: Final = 1.0
"""Between the moment when a slot that is given up gets no new connections and the end of its sockets: those
that are half made have so long to be complete."""


class Rolling(Slots):
    """Slots whose workers change together."""

    def broadcast(self, messages: list[Message]) -> None:
        """Send to every worker that is configured."""
        for worker in self.everybody:
            if worker.version:
                for message in messages:
                    worker.send(message)

    async def apply(self, snapshot: Snapshot, count: int) -> str | None:
        """Have so many workers, and all of them swap to a configuration. A sentence if one of them cannot:
        then none has it.

        A worker that dies or hangs over it counts as one that cannot.
        """
        before = self._snapshot
        targets = [worker for worker in self.workers if worker.state is SERVING]
        added = [Slot(index) for index in range(len(self.slots), count)]
        results = await asyncio.gather(
            *(self._attempt(worker, snapshot) for worker in targets),
            self._rise(added, snapshot, self.launch),
        )
        faults = [fault for fault in results if fault is not None]
        if faults and before is not None:
            await self._fall(added)
            await asyncio.gather(*(self._attempt_or_kill(worker, before) for worker in targets))
            self.broadcast(self._standing())
            return faults[0]
        self._snapshot = snapshot
        for worker in targets:
            worker.commit(snapshot)
        self.slots += added
        if added or before is None or before.bounds != snapshot.bounds:
            await self._introduce(is_moving=False)  # answered when listeners have come and gone
        if added:
            await self._open(added)
        elif count < len(self.slots):
            surplus = self.slots[count:]
            del self.slots[count:]
            self._begin_giving_up(surplus, count)
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

    async def roll(self, snapshot: Snapshot, count: int, launch: Launch | None = None) -> str | None:
        """New workers in every slot, so many, and with another `launch` if one is given; the old ones leave.
        A sentence if that cannot be had: then the old ones go on as they were."""
        launch = launch or self.launch
        slots = [Slot(index) for index in range(count)]
        for slot in self.slots:
            slot.is_rolling = True
        try:
            if (fault := await self._rise(slots, snapshot, launch)) is not None:
                await self._fall(slots)
                return fault
            old = self.slots
            for was, slot in zip(old, slots, strict=False):
                slot.follow(was)
                slot.replacements[RELOAD] += 1
            self.launch, self._snapshot, self.slots = launch, snapshot, slots
            leaving = [
                slot.worker for slot in old[:count] if slot.worker is not None and slot.worker.is_alive
            ]
            self._leaving.update(dict.fromkeys(leaving))
            self._vacate(old[:count])
            await self._introduce(is_moving=True)
            await self._open(slots)
            await self._leave(leaving)
            await self._introduce(is_moving=False)
            if len(old) > count:
                self._begin_giving_up(old[count:], count)
            return None
        finally:
            for slot in self.slots:
                if slot.is_rolling:
                    slot.is_rolling = False
                    if slot.worker is not None and not slot.worker.is_alive:
                        self._tasks.create_task(self._revive(slot, 0.0), name=f"revive {slot.index}")

    async def replace(self, slot: Slot, cause: str) -> str | None:
        """A new worker in one slot, for one of `CAUSES`; the old one leaves when it serves. If that cannot be
        had, the old one goes on as it was: then the rest of a sentence that begins with it. One at a time."""
        old = slot.worker
        if self._is_stopping.is_set() or not self._is_held.is_set() or self._stand_in is not None:
            return "is not to be replaced now"
        if old is None or old.state is not SERVING or slot.is_rolling or slot not in self.slots:
            return "is being replaced already"
        stand_in = self._stand_in = Slot(slot.index)
        slot.is_rolling = True
        try:
            fault = await self._serve_beside(stand_in)
            if fault is None and (self._is_stopping.is_set() or slot not in self.slots or not old.is_alive):
                fault = "has gone in the meantime"
            if fault is not None or stand_in.worker is None:
                await self._fall([stand_in])
                self._stand_in = None
                await self._introduce(is_moving=False)
                return fault
            slot.worker, self._stand_in = stand_in.worker, None
            slot.replacements[cause] += 1
            self._leaving[old] = None
            self._keep_up(slot, slot.worker)
            await self._leave([old])
            await self._introduce(is_moving=False)
            return None
        except BaseException:
            if stand_in.worker is not None and stand_in.worker is not slot.worker:
                stand_in.worker.kill()  # `close` waits for it
            raise
        finally:
            slot.is_rolling = False
            if slot.worker is not None and not slot.worker.is_alive:
                self._tasks.create_task(self._revive(slot, 0.0), name=f"revive {slot.index}")

    async def _serve_beside(self, stand_in: Slot) -> str | None:
        """One more worker that reads the sockets of a slot. What is wrong, if it cannot."""
        try:
            worker = stand_in.worker = await self._launch_in(stand_in, self.launch)
            await worker.seat_all(self._seats, is_moving=True, timeout_s=self.timing.start_s)
            await self._configure(worker, self.timing.start_s)
            await self._introduce(is_moving=True)
            await worker.serve(self.timing.start_s)
            await self._configure(worker, self.timing.apply_s)
        except (RefusedError, WorkerGoneError) as error:
            return f"cannot be replaced, because the new one {because(error)}"
        return None

    async def _rise(self, slots: Sequence[Slot], snapshot: Snapshot, launch: Launch) -> str | None:
        """Workers in empty slots, configured and not yet serving. A sentence if one of them cannot."""

        async def one(slot: Slot) -> str | None:
            try:
                slot.worker = await self._launch_in(slot, launch)
                await slot.worker.seat_all(self._seats, is_moving=True, timeout_s=self.timing.start_s)
                await slot.worker.configure(snapshot, self.timing.start_s)
                for message in self._standing():
                    slot.worker.send(message)
            except RefusedError as error:
                return str(error)
            except WorkerGoneError as error:
                return f"the new worker {slot.index} {error}"
            return None

        return next((fault for fault in await asyncio.gather(*map(one, slots)) if fault is not None), None)

    async def _fall(self, slots: Sequence[Slot]) -> None:
        """Take `_rise` back."""
        for slot in slots:
            worker, slot.worker = slot.worker, None
            if worker is not None:
                worker.kill()
                await worker.gone()
                if worker.counts is not None:
                    worker.counts.retire()
                self._seats.free(worker.seat)

    async def _open(self, slots: Sequence[Slot]) -> None:
        """Have workers that are configured serve; who cannot is replaced like any other."""
        for slot in slots:
            if slot.worker is None:
                continue
            self._keep_up(slot, slot.worker)
            try:
                await slot.worker.serve(self.timing.start_s)
                await self._configure(slot.worker, self.timing.apply_s)
            except (RefusedError, WorkerGoneError) as error:
                log.error("the new worker %d cannot serve and is replaced: it %s", slot.index, because(error))
                slot.worker.kill()

    def _begin_giving_up(self, slots: Sequence[Slot], count: int) -> None:
        workers = [slot.worker for slot in slots if slot.worker is not None and slot.worker.is_alive]
        self._leaving.update(dict.fromkeys(workers))
        self._vacate(slots)
        self._tasks.create_task(self._give_up(workers, count), name="slots that are given up")

    def _vacate(self, slots: Sequence[Slot]) -> None:
        """These slots are nobody's any more: the seats of workers that died in them are free."""
        for slot in slots:
            if slot.worker is not None and not slot.worker.is_alive:
                self._seats.free(slot.worker.seat)

    async def _give_up(self, workers: Sequence[Worker], count: int) -> None:
        """Workers that get no successor: nothing new comes to them, then they drain."""
        self._sockets.keep_from(count)
        await self._leave_groups(workers, count)
        await asyncio.sleep(_LAST_HANDSHAKES_S)
        loop = asyncio.get_running_loop()
        # Another reload may want them again.
        how = CLOSE if self._sockets.give_up(count) else HAND_OVER
        for worker in workers:
            worker.drain(how)
            loop.call_later(self.leave_s, worker.kill)

    async def _leave_groups(self, workers: Sequence[Worker], count: int) -> None:
        """Have datagrams come to others. Those of connections are handed over by who gets them, for which
        connections that have just begun must be known to all."""
        if len(self.slots) > count:
            return  # another reload wants more again
        await self._introduce(is_moving=True)
        given = self._sockets.leave_groups(count)
        for worker in workers:
            try:
                worker.leave_groups(given)
            except WorkerGoneError as error:
                log.warning("worker %d goes on reading its datagram sockets: it %s", worker.index, error)
        await self._introduce(is_moving=False)  # answered by those that have done it

    async def _attempt(self, worker: Worker, snapshot: Snapshot) -> str | None:
        try:
            await worker.configure(snapshot, self.timing.apply_s)
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
        else:
            worker.commit(snapshot)
