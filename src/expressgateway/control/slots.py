"""The places of workers, and how each is kept filled.

A *slot* is a worker's place: its index, and its member of each listener. Workers come and go in it. One that
dies is replaced: at once the first time, then later and later (`backoff`). What is done with many at once is
`rolling`'s business; who has died without being dead is `watch`'s.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from expressgateway.control.backoff import Backoff
from expressgateway.control.channel import Message
from expressgateway.control.ledger import Ledger
from expressgateway.control.parcels import Parcel
from expressgateway.control.seats import NoSeatError
from expressgateway.control.worker_process import (
    HAND_OVER,
    SERVING,
    Launch,
    RefusedError,
    Snapshot,
    Worker,
    WorkerGoneError,
    told,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timing:
    """How patient the supervisor is with its workers, in seconds."""

    tick_s: float = 1.0
    """Between two looks at every worker: its liveness and its counters."""
    hung_after_s: float = 30.0
    """A worker that says nothing for so long is killed and replaced."""
    stacks_s: float = 1.0
    """For such a worker to tell where it is in its code, before that."""
    memory_pause_s: float = 60.0
    """Between two replacements of a worker for its memory, the first time; see `ceiling`."""
    start_s: float = 30.0
    """For a new worker to apply the configuration."""
    apply_s: float = 10.0
    """For a running worker to apply another one."""
    collect_s: float = 2.0
    """For counters; then those of the last time are used."""
    close_s: float = 5.0
    """For draining workers to stop accepting, before the listening sockets are closed over their heads."""


PATIENT: Final = Timing()


MEMORY: Final = "memory"
RELOAD: Final = "reload"
CAUSES: Final = (MEMORY, RELOAD)
"""Why a worker that lives is replaced."""

_LEAVE_S: Final = 12.0


class Sockets(Protocol):
    """What the fleet has the kernel do; see `socket_book.SocketBook`."""

    def steer(self, seats: Mapping[int, int]) -> None: ...
    def keep_from(self, slots: int) -> None: ...
    def leave_groups(self, slots: int) -> Sequence[Parcel]: ...
    def give_up(self, slots: int) -> bool: ...


class Slot:
    """A worker's place."""

    __slots__ = (
        "backoff",
        "cpu_before_s",
        "hangs",
        "index",
        "is_rolling",
        "replacements",
        "restarts",
        "worker",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.worker: Worker | None = None
        self.restarts = 0
        """Of dead workers."""
        self.hangs = 0
        """Workers that were killed because they hung."""
        self.replacements = dict.fromkeys(CAUSES, 0)
        """Of living workers."""
        self.backoff = Backoff()
        self.cpu_before_s = 0.0
        """Processor time of the workers that were here before."""
        self.is_rolling = False
        """Whether another worker is about to take the place: then a death is not answered with one more."""

    @property
    def deaths_in_a_row(self) -> int:
        """How many workers died here, none of them after a good life, and the last one not in one."""
        worker = self.worker
        if (
            worker is not None
            and worker.is_alive
            and time.monotonic() - worker.born >= self.backoff.good_life_s
        ):
            return 0
        return self.backoff.failures

    @property
    def is_crash_looping(self) -> bool:
        return self.deaths_in_a_row > 1

    def follow(self, before: "Slot") -> None:
        """Count on from where another account of the place ended."""
        self.restarts, self.hangs = before.restarts, before.hangs
        self.replacements = dict(before.replacements)
        self.cpu_before_s = before.cpu_before_s


class Slots:
    """Every place with its worker. The background work runs in `tasks`, which the caller owns."""

    def __init__(
        self,
        launch: Launch,
        tasks: asyncio.TaskGroup,
        standing: Callable[[], list[Message]] = list,
        timing: Timing = PATIENT,
        on_outcomes: Callable[[Message], None] | None = None,
        *,
        sockets: Sockets,
    ) -> None:
        """`standing`: what every worker is to know beside its configuration, as it is now."""
        self.launch = launch
        self._seats = launch.seats
        self._sockets = sockets
        self._tasks = tasks
        self._standing = standing
        self._on_outcomes = on_outcomes
        self.timing = timing
        self._snapshot: Snapshot | None = None
        self._is_stopping = asyncio.Event()
        self._keepers: set[asyncio.Task[None]] = set()
        self._leaving: dict[Worker, None] = {}
        self._is_held = asyncio.Event()
        self._is_held.set()
        self.foreign: dict[int, int] = {}
        """Slots by the seats of another supervisor's workers."""
        self.leave_s = _LEAVE_S
        """For a worker whose place another one has taken, until it is killed."""
        self.memory_limit_bytes = 0
        """Of each worker; 0: none."""
        self._stand_in: Slot | None = None
        """A worker that is about to take the place of one that is too large, or alike."""
        self.slots: list[Slot] = []
        self.ledger = Ledger()
        self.aborted: dict[str, int] = {}
        """Connections that the drain cut off, by listener."""

    # -- who is there

    @property
    def workers(self) -> Iterator[Worker]:
        """Those alive that have a slot."""
        return (slot.worker for slot in self.slots if slot.worker is not None and slot.worker.is_alive)

    @property
    def everybody(self) -> Iterator[Worker]:
        """Those alive, with those that leave, and the one that is about to take a place."""
        yield from self.workers
        if self._stand_in is not None and (coming := self._stand_in.worker) is not None and coming.is_alive:
            yield coming
        yield from (worker for worker in self._leaving if worker.is_alive)

    def places(self) -> dict[int, int]:
        """Slots by the seats of all workers, another supervisor's included."""
        return self.foreign | {worker.seat: worker.index for worker in self.everybody}

    def _steer(self) -> None:
        count = len(self.slots)
        self._sockets.steer({seat: index for seat, index in self.places().items() if index < count})

    async def _introduce(self, *, is_moving: bool) -> None:
        """Tell everybody who is there, and the kernel who reads what. A worker that does not listen is not
        waited for longer than for a configuration: it will be found out."""

        async def one(worker: Worker) -> None:
            try:
                await worker.seat_all(self._seats, is_moving=is_moving, timeout_s=self.timing.apply_s)
            except WorkerGoneError as error:
                if worker in self._leaving:
                    return  # it may be gone any moment, and needs to know no more
                log.warning("worker %d is not told who else is there: it %s", worker.index, error)

        await asyncio.gather(*(one(worker) for worker in self.everybody))
        self._steer()

    async def forget_absent(self) -> None:
        """Another supervisor's workers may be gone by now."""
        if self.foreign and (gone := self._seats.forget_absent()):
            self.foreign = {seat: slot for seat, slot in self.foreign.items() if seat not in gone}
            await self._introduce(is_moving=False)

    # -- one worker

    async def _launch_in(self, slot: Slot, launch: Launch, seat: int | None = None) -> Worker:
        """A process for the slot, on a seat of its own unless one is given. Raises `WorkerGoneError`."""
        try:
            taken = self._seats.take() if seat is None else seat
        except (NoSeatError, OSError) as error:
            raise WorkerGoneError(str(error)) from None
        try:
            worker = await Worker.launch(slot.index, taken, launch, self._tasks, self._on_outcomes)
        except BaseException:
            if seat is None:
                self._seats.free(taken)
            raise
        worker.counts = self.ledger.join()
        return worker

    async def _bring_up(self, slot: Slot) -> None:
        """A new worker in the slot, with the configuration and the ticket keys. Raises as `Worker` does."""
        seat = slot.worker.seat if slot.worker is not None else None  # the dead one's: its CIDs lead here
        worker = await self._launch_in(slot, self.launch, seat)
        slot.worker = worker
        if self._is_stopping.is_set():
            worker.kill()
            raise WorkerGoneError("is not needed any more")
        await self._prepare(worker)

    async def _prepare(self, worker: Worker) -> None:
        await worker.seat_all(self._seats, is_moving=False, timeout_s=self.timing.start_s)
        await self._configure(worker, self.timing.start_s)

    async def _configure(self, worker: Worker, timeout_s: float) -> None:
        """Give a worker the newest configuration, and again if a reload came between."""
        while self._snapshot is not None and worker.version != self._snapshot.version:
            snapshot = self._snapshot
            await worker.configure(snapshot, timeout_s)
            if worker.state is SERVING:
                worker.commit(snapshot)
            for message in self._standing():
                worker.send(message)

    async def _serve(self, slot: Slot) -> None:
        if slot.worker is not None:
            await slot.worker.serve(self.timing.start_s)

    async def _leave(self, workers: Sequence[Worker]) -> None:
        """Have them drain, their sockets being read by others; until they read them no more."""
        loop = asyncio.get_running_loop()
        for worker in workers:
            worker.drain(HAND_OVER)
            loop.call_later(self.leave_s, worker.kill)
        stopped = [worker.stopped_accepting for worker in workers]
        if stopped:
            await asyncio.wait(stopped, timeout=self.timing.close_s)

    # -- one after the other

    def _keep_up(self, slot: Slot, worker: Worker) -> None:
        task = self._tasks.create_task(
            self._keep(slot, worker), name=f"worker {slot.index} on seat {worker.seat}"
        )
        self._keepers.add(task)
        task.add_done_callback(self._keepers.discard)

    async def _keep(self, slot: Slot, worker: Worker) -> None:
        """Until the worker is dead; then somebody else in its slot, if it was still its own."""
        status = await worker.gone()
        lived_s = time.monotonic() - worker.born
        self._bury(slot, worker)
        if worker in self._leaving:
            del self._leaving[worker]
            self._seats.free(worker.seat)
            log.info("worker %d, which had left, is gone", slot.index, extra={"fields": {"pid": worker.pid}})
            if not self._is_stopping.is_set():
                await self._introduce(is_moving=False)
            return
        if self._is_stopping.is_set() or slot not in self.slots:
            return
        log.error(
            "worker %d %s after %.1f seconds of life; it is replaced",
            slot.index,
            told(status),
            lived_s,
            extra={"fields": {"worker": slot.index, "pid": worker.pid, "status": status}},
        )
        if not slot.is_rolling:
            await self._revive(slot, lived_s)

    async def _revive(self, slot: Slot, lived_s: float) -> None:
        """Somebody in a slot whose worker died. Comes back when it has one, or needs none any more."""
        while not await self._replace(slot, lived_s):
            lived_s = 0.0
            if self._is_stopping.is_set() or slot not in self.slots or slot.is_rolling:
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
        await self._is_held.wait()
        if self._is_stopping.is_set() or slot not in self.slots or slot.is_rolling:
            return False
        began = time.monotonic()
        slot.restarts += 1
        previous = slot.worker
        try:
            await self._bring_up(slot)
            if slot.worker is not None:
                await self._configure(slot.worker, self.timing.apply_s)
            await self._serve(slot)
            if slot.worker is not None:
                await self._configure(slot.worker, self.timing.apply_s)
        except (RefusedError, WorkerGoneError) as error:
            worker = slot.worker
            if worker is not None and worker is not previous:
                worker.kill()
                await worker.gone()
                self._bury(slot, worker)
            if not self._is_stopping.is_set():
                log.error("the new worker %d cannot take its place: it %s", slot.index, because(error))
            return False
        if slot not in self.slots and slot.worker is not None:  # a roll was faster
            self._leaving[slot.worker] = None
            self._keep_up(slot, slot.worker)
            await self._leave([slot.worker])
            return True
        log.info(
            "worker %d serves again, %.2f seconds later",
            slot.index,
            time.monotonic() - began,
            extra={"fields": {"worker": slot.index, "pid": slot.worker.pid if slot.worker else None}},
        )
        if slot.worker is not None:
            self._keep_up(slot, slot.worker)
        return True

    async def _stops_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._is_stopping.wait()
        except TimeoutError:
            return False
        return True

    def _bury(self, slot: Slot, worker: Worker) -> None:
        if worker.counts is not None:
            worker.counts.retire()
        slot.cpu_before_s += worker.cpu_s
        self._seats.clear(worker.seat)
        for name, count in worker.aborted.items():
            self.aborted[name] = self.aborted.get(name, 0) + count


def because(error: Exception) -> str:
    return f"refuses the configuration: {error}" if isinstance(error, RefusedError) else str(error)
