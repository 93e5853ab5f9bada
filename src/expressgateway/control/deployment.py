"""What runs: a configuration, and everything that was made from it.

Sockets, workers, ticket keys, what is known of backends: a `Deployment` is all of these, and takes them
together from one configuration to the next, or leaves them together as they were. When that is to happen, and
what it is a part of - a start, a reload, a run-time change - is the supervisor's business.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

from expressgateway.config.load import Loaded
from expressgateway.config.schema import Config
from expressgateway.control import drain
from expressgateway.control.channel import FrameError, Message, pack_bytes
from expressgateway.control.failures import StartError
from expressgateway.control.log_files import prepare
from expressgateway.control.plan import Plan, backends_of
from expressgateway.control.privileges import worker_identity
from expressgateway.control.seats import Seats
from expressgateway.control.socket_book import Prepared, SocketBook, close_all
from expressgateway.control.ticket_keys import TicketKeys
from expressgateway.control.traces import Traces
from expressgateway.control.upstreams import Upstreams
from expressgateway.control.worker_process import CLOSE, KEEP, Launch, Snapshot
from expressgateway.control.workers import PATIENT, Fleet, Timing
from expressgateway.control.xdp import Xdp
from expressgateway.control.xdp_samples import samples_of
from expressgateway.observe.counters import Sample

log = logging.getLogger(__name__)

_MAX_KEY_SLEEP_S = 3600.0  # nobody trusts a timer of weeks; a look now and then costs nothing


@dataclass(slots=True)
class Heritage:
    """What a deployment begins with, if somebody was there before."""

    book: SocketBook = field(default_factory=SocketBook)
    seats: Seats = field(default_factory=Seats)
    foreign: dict[int, int] = field(default_factory=dict)
    """Slots by the seats of the other supervisor's workers."""
    tickets: dict[str, bytes] = field(default_factory=dict)
    """Session ticket keys by listener, as `TicketKeys.dump` gives them."""
    secret: bytes | None = None
    """The one that is made at every start; see `secrets`."""
    states: list[tuple[str, str, str, str]] = field(default_factory=list)
    """Of backends, as `HealthBoard.kept` gives them."""
    is_upgrade: bool = False
    """Whether the other supervisor still runs."""


class Deployment:
    """See the module's text. `tasks` runs what goes on in the background, and belongs to the caller."""

    def __init__(
        self,
        loaded: Loaded,
        tasks: asyncio.TaskGroup,
        command: tuple[str, ...],
        timing: Timing = PATIENT,
        heritage: Heritage | None = None,
    ) -> None:
        heritage = heritage if heritage is not None else Heritage()
        self.loaded = loaded
        """What is in force."""
        self.version = 1
        """Its number, from 1; the caller counts."""
        self.book = heritage.book
        self.seats = heritage.seats
        self.keys = TicketKeys()
        self._keys_adopted = asyncio.Event()
        self._command = command
        self._log_level: list[Message] = []  # the one that was set while it ran, if any
        self.upstreams = Upstreams(self._tell_of_backends)
        self.xdp = Xdp(self.upstreams.known, takes_over=heritage.is_upgrade)
        self._traces = Traces()
        self._heritage = heritage
        self.fleet = Fleet(
            Launch(self.seats, command=command),
            tasks,
            self._standing,
            timing,
            self._on_unasked,
            sockets=self.book,
        )
        self.fleet.foreign = dict(heritage.foreign)

    @property
    def config(self) -> Config:
        return self.loaded.config

    # -- life

    async def start(self, gate: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Have everything serve. Raises `StartError`; what was started is then to be closed.

        `gate`: what is to be waited for when all is ready and nothing serves yet.
        """
        config = self.config
        identity = worker_identity(config.runtime)
        count = config.runtime.worker_count
        if config.observability.access_log is not None:
            prepare(config.observability.access_log.path, identity)
        prepared = self.book.prepare(config, count)
        close_all(self.book.adopt(prepared, count))
        self.keys.restore(self._heritage.tickets)
        self.keys.adopt(self.keys.planned(config))
        self.upstreams.restore(self._heritage.secret)
        await self.upstreams.prepare(self.loaded)
        snapshot = self._snapshot(self.loaded, prepared)
        self.upstreams.adopt(self.loaded)
        self.upstreams.board.restore(self._heritage.states)
        self._traces.use(config)
        self.fleet.launch = Launch(self.seats, identity, self._command)
        self._take_limits(config)
        self.book.keep_from(count)
        await self.xdp.prepare(config)
        await self.fleet.start(snapshot, count, gate)
        await self.xdp.adopt(config, is_first=True)

    def _take_limits(self, config: Config) -> None:
        self.fleet.leave_s = drain.budget_s(config)
        self.fleet.memory_limit_bytes = config.runtime.worker_memory_limit_bytes

    async def have_alone(self) -> None:
        """The workers of the supervisor before this one read the sockets no more."""
        await self.fleet.part()
        self.book.give_up(len(self.fleet.slots))

    async def drain(self, budget_s: float, *, keeps_sockets: bool = False) -> None:
        """Stop accepting, let everything end; see `Fleet.drain`. ``keeps_sockets``: somebody has copies of
        the sockets and will serve them."""
        self.book.close()
        await self.xdp.stop_accepting()
        how = KEEP if keeps_sockets else CLOSE
        await asyncio.gather(self.fleet.drain(budget_s, how), self.xdp.drain(budget_s - drain.MARGIN_S))

    async def make_way(self, xdp_pins: str | None, budget_s: float, on_left: Callable[[], None]) -> None:
        """Another supervisor serves: see `Fleet.make_way`. `xdp_pins`: where it has the XDP program."""
        leaving = self.fleet.make_way(budget_s, on_left)
        if xdp_pins == self.xdp.pin_path:
            await leaving
        else:
            await self.xdp.part()
            await asyncio.gather(leaving, self.xdp.drain(budget_s - drain.MARGIN_S))

    async def end(self) -> None:
        """End what is left of the workers, now. Idempotent."""
        self.fleet.kill()
        await self.fleet.close()

    def open(self) -> dict[str, int]:
        """What is open, by listener; flows that the kernel forwards by themselves."""
        return self.fleet.open() | ({"xdp": self.xdp.flows} if self.xdp.is_on else {})

    async def close(self) -> None:
        await self._traces.close()
        await self.xdp.close()
        self.upstreams.close()
        self.book.close()
        self.seats.close()

    # -- what workers are told

    def _standing(self) -> list[Message]:
        """What every worker is to know beside its configuration."""
        return [*self.keys.messages(), *self._log_level, *self.upstreams.standing()]

    def set_log_level(self, level: str) -> None:
        """Of every worker, those to come included."""
        self._log_level = [{"type": "log_level", "level": level}]
        self.broadcast(self._log_level)

    def _on_unasked(self, message: Message) -> None:
        """What a worker says by itself."""
        if message["type"] == "spans":
            self._traces.take(message)
        else:
            self.upstreams.board.outcomes(message)

    def broadcast(self, messages: list[Message]) -> None:
        self.fleet.broadcast(messages)

    def _tell_of_backends(self, messages: list[Message]) -> None:
        self.broadcast(messages)
        self.xdp.poke()

    def reopen_log(self) -> None:
        """The access log's file may have been moved away, and a new one is wanted."""
        log_to = self.config.observability.access_log
        if log_to is None:
            return
        try:
            prepare(log_to.path, worker_identity(self.config.runtime))
        except StartError as error:
            log.error("%s", error)
        self.broadcast([{"type": "reopen"}])

    async def rotate_keys(self) -> None:
        """Have ticket keys change in time, for ever."""
        while True:
            self._keys_adopted.clear()
            try:
                async with asyncio.timeout(min(self.keys.next_change_s(), _MAX_KEY_SLEEP_S)):
                    await self._keys_adopted.wait()
            except TimeoutError:
                pass
            self.broadcast(self.keys.changed())

    # -- changes

    async def apply(self, loaded: Loaded, plan: Plan, pools: tuple[str, ...] | None = None) -> str | None:
        """Have everybody use a configuration, or nobody: a sentence says who cannot. `plan`: how it differs
        from the one in force; `pools`: what alone differs, beside files.

        Raises `StartError` if something that it needs cannot be had; then nothing has changed either.
        """
        config = loaded.config
        count = config.runtime.worker_count
        keys = self.keys.planned(config)
        identity = worker_identity(config.runtime)
        log_to = config.observability.access_log
        if log_to is not None and pools is None:
            prepare(log_to.path, identity)
        prepared = self.book.prepare(config, count)
        try:
            await self.upstreams.prepare(loaded)
            await self.xdp.prepare(config, is_read=pools is None)
            snapshot = self._snapshot(loaded, prepared, pools)
            if plan.rolls_workers:
                launch = Launch(self.seats, identity, self._command)
                fault = await self.fleet.roll(snapshot, count, launch)
            else:
                fault = await self.fleet.apply(snapshot, count)
        except BaseException:
            self.book.abandon(prepared)
            self.upstreams.adopt(self.loaded)
            await self.xdp.restore(self.config)
            raise
        if fault is not None:
            self.book.abandon(prepared)
            self.upstreams.adopt(self.loaded)
            await self.xdp.restore(self.config)
            return fault
        # Workers empty the queues of sockets that nobody has any more, and close them, when they hear of it.
        close_all(self.book.adopt(prepared, count))
        self.loaded = loaded
        self.version += 1
        self._take_limits(config)
        self.upstreams.adopt(loaded)
        await self.xdp.adopt(config)
        if pools is None:
            self._traces.use(config)
            self.keys.adopt(keys)
            self._keys_adopted.set()
            self.broadcast(self.keys.messages())
        return None

    def _snapshot(self, loaded: Loaded, prepared: Prepared, pools: tuple[str, ...] | None = None) -> Snapshot:
        """Raises `StartError` if it is too large to be sent, or if a secret cannot be made."""
        version = self.version if loaded is self.loaded else self.version + 1
        part = {
            "type": "configure",
            "version": version,
            "numbers": prepared.numbers,
            **self.upstreams.part(loaded),
        }

        def whole() -> Message:
            files = {path: pack_bytes(data) for path, data in loaded.material.files.items()}
            return {**part, "config": loaded.config.model_dump(mode="json"), "files": files}

        difference = None
        if pools is not None:
            known = self.loaded.material.files
            files = {path: data for path, data in loaded.material.files.items() if known.get(path) != data}
            backends = backends_of(loaded.config)
            difference = {
                **part,
                "backends": {
                    pool: [each.model_dump(mode="json") for each in backends[pool]] for pool in pools
                },
                "files": {path: pack_bytes(data) for path, data in files.items()},
            }
        try:
            return Snapshot(
                version, whole, prepared.bounds, prepared.handed, base=self.version, difference=difference
            )
        except FrameError as error:
            raise StartError(str(error)) from None

    # -- what can be seen

    def samples(self) -> Iterator[Sample]:
        """Read piece by piece: whatever is walked over is a copy."""
        yield from self.fleet.samples()
        yield from self.upstreams.samples()
        yield from self._traces.samples()
        yield from samples_of(self.xdp)
        for name, count in list(self.fleet.aborted.items()):
            yield "shutdown_aborted_connections", (name,), count
