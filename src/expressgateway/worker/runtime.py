"""The living worker: listeners, pools and what sweeps them, from one snapshot to the next.

``configure`` compiles a snapshot completely before it touches anything, then swaps: pools take their new
sets, listeners their new services. Exchanges and connections under way keep what they began with.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

from expressgateway.config.schema import Config
from expressgateway.control.channel import Message
from expressgateway.net.listener import Census
from expressgateway.net.quic.sharing import QuicSharing
from expressgateway.net.quic.timers import Timers
from expressgateway.net.reactor import Reactor
from expressgateway.observe.access_log import AccessLog
from expressgateway.observe.spans import Spans
from expressgateway.proxy.mirror import Mirrors
from expressgateway.proxy.records import Records
from expressgateway.upstream.discovery import Answers, Found, expand
from expressgateway.upstream.errors import Fault
from expressgateway.upstream.pool import Pool, PoolSettings, Standing
from expressgateway.worker.build import (
    Plan,
    compile_snapshot,
)
from expressgateway.worker.build_pools import Files, PoolPlan
from expressgateway.worker.connections import told
from expressgateway.worker.diallers import Diallers
from expressgateway.worker.listeners import Listeners
from expressgateway.worker.reports import Source
from expressgateway.worker.samples import collect_handover, listener_sources, pool_sources

log = logging.getLogger(__name__)

# All timeouts are found by a sweep that runs this many times per ``sweep_interval_ms``.
_SWEEPS_PER_INTERVAL: Final = 4
_MIN_TICK_S: Final = 0.025
_LAST_LINES_S: Final = 1.0  # for the access log, at the end of a drain


class Runtime:
    """Everything one worker serves with."""

    def __init__(
        self, census: Census, sockets: dict[int, socket.socket], steering: QuicSharing | None = None
    ) -> None:
        """``sockets``: listening sockets by the listener's number, as far as they are there already;
        ``steering``: how QUIC packets find the worker that they are for, unless this one is alone."""
        self._loop = asyncio.get_running_loop()
        self.reactor = Reactor(self._loop)
        self.steering = steering
        timers = Timers(self.reactor)
        self._plan: Plan | None = None
        self._pools: dict[str, Pool] = {}
        self._replaced: dict[str, Pool] = {}  # by another of its name, in a snapshot that may be taken back
        self._parting: list[Pool] = []  # removed by a reload, and listeners that go may still ask them
        self._retired: list[Pool] = []  # removed and empty, until their exchanges have ended
        self._found: dict[str, tuple[list[Found], PoolSettings]] = {}  # what each pool was given last
        self._answers: Answers = {}
        self._standings: dict[str, Standing] = {}
        self._mirrors = Mirrors()
        self.access_log = AccessLog()
        self.spans = Spans()
        self._report: Callable[[Message], None] = _to_nobody
        self._is_report_due = False
        self._diallers = Diallers(self.reactor, timers)
        self._listeners = Listeners(
            self.reactor,
            timers,
            census,
            sockets,
            steering,
            self._diallers,
            Records(self.access_log, time.time),  # noqa: TID251 - what people read
            self._mirrors,
            self.spans,
        )
        self._is_serving = False
        self._tick_s = 0.25
        self._lag_s = 0.0
        self._swept_at = time.monotonic()

    # -- configuration ---------------------------------------------------------------------------------

    def leave_group(self, number: int, sock: socket.socket) -> None:
        """A datagram listener's socket goes; see `Listeners.leave_group`."""
        self._listeners.leave_group(number, sock)

    def give(self, number: int, sock: socket.socket, *, is_lasting: bool = False) -> None:
        """The socket of a listener that the next snapshot has. It is this object's from here on."""
        self._listeners.give(number, sock, is_lasting=is_lasting)

    def configure(
        self,
        config: Config,
        files: Files,
        secrets: Files,
        answers: Answers,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Take a snapshot into use. Raises ``SnapshotError`` and changes nothing if it cannot be served.

        ``numbers``: of its listeners, and Mode A's behind them; None: they are numbered by their positions.
        What is new starts, and what is not in it any more goes, at `commit`: another ``configure`` before
        that takes it back."""
        before = self._plan
        plan = compile_snapshot(config, files, secrets, before)
        if numbers is None:
            numbers = range(len(plan.listeners) + (plan.passthrough is not None))
        diallers = self._diallers.compiled(plan)
        relays = self._listeners.compiled(plan, numbers)
        # From here on nothing fails.
        self.spans.flush()
        self._diallers.take_over(diallers)
        self._plan = plan
        self._answers = answers
        self._set_pools(plan, before)
        log_to = config.observability.access_log
        if log_to is None:
            self.access_log.configure(None)
        else:
            self.access_log.configure(log_to.path, log_to.format, log_to.sample)
        self._listeners.configure(plan, numbers, before, self._pools, relays)
        self._tick_s = max(
            _MIN_TICK_S, config.runtime.watchdog.sweep_interval_ms / 1000 / _SWEEPS_PER_INTERVAL
        )

    def commit(self, handed: Collection[int] = ()) -> None:
        """The snapshot stays. ``handed``: numbers of listeners that go, and whose sockets new ones have."""
        plan = self._plan
        if plan is None:
            return
        self._listeners.commit(handed)
        for name in [name for name in self._pools if name not in plan.pools]:
            pool = self._pools.pop(name)
            del self._found[name]
            self._standings.pop(name, None)  # a later pool of this name begins anew
            self._parting.append(pool)
        self._parting += self._replaced.values()
        self._replaced.clear()
        self._part()

    def _part(self) -> None:
        """Empty the pools that nobody asks any more: of a listener that goes, clients may have another
        request on its way."""
        if self._parting and not self._listeners.are_retiring:
            parting = self._parting
            self._parting = [pool for pool in parting if pool.queue]
            for pool in parting:
                if not pool.queue:
                    pool.replace(())
                    self._retired.append(pool)

    def _set_pools(self, plan: Plan, before: Plan | None) -> None:
        for name, pool_plan in plan.pools.items():
            if before is not None and name in before.pools and pool_plan.is_of_other_kind(before.pools[name]):
                self._replace_pool(name)
            if name not in self._pools:
                pool = Pool(name, self._diallers.attach, self.reactor, self.reactor.call_soon)
                self._pools[name] = pool
                pool.on_alarm = self._report_soon
                pool.standing = self._standings.get(name, pool.standing)
            self._set_backends(pool_plan)

    def _replace_pool(self, name: str) -> None:
        """A pool of this name is another one from now on. Listeners that go still need the one before, whose
        backends speak what they need; and so does everybody if the snapshot is taken back."""
        pool = self._pools.pop(name)
        self._found.pop(name, None)
        if (other := self._replaced.pop(name, None)) is not None:
            self._pools[name] = other
            pool.replace(())
            self._retired.append(pool)
        else:
            self._replaced[name] = pool

    def _set_backends(self, plan: PoolPlan) -> None:
        """Give a pool the backends it has now, if they are others than before."""
        pool = self._pools[plan.name]
        found = expand(plan.backends, self._answers)
        wanted = (found, plan.settings)
        if self._found.get(plan.name) == wanted:
            return
        self._found[plan.name] = wanted
        pool.empty_fault = Fault.DNS if plan.backends else Fault.NO_BACKEND
        pool.replace(found, plan.settings)

    def set_answers(self, answers: Answers) -> None:
        """What DNS says now."""
        self._answers = answers
        if self._plan is not None:
            for plan in self._plan.pools.values():
                self._set_backends(plan)

    def judge(self, standings: Mapping[str, Standing]) -> None:
        """Who may be used, by the supervisor's word, for the pools that are named."""
        for name, standing in standings.items():
            pool = self._pools.get(name)
            if pool is not None:
                pool.judge(standing)
            elif self._plan is not None:
                continue  # of a pool that has gone: one of this name that comes later begins anew
            self._standings[name] = standing

    def install_tickets(self, listener: str, packed: bytes) -> None:
        """Session ticket keys of a TLS listener, from the supervisor: the same for all workers."""
        self._listeners.install_tickets(listener, packed, self._plan)

    # -- life ------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Begin to accept. Idempotent."""
        if self._is_serving:
            return
        self._is_serving = True
        for pool in self._pools.values():
            pool.finish_table()
        self._listeners.start()
        self.commit()
        self._swept_at = time.monotonic()
        self._loop.call_later(self._tick_s, self._sweep)

    def _sweep(self) -> None:
        now = time.monotonic()
        self._lag_s = max(0.0, now - self._swept_at - self._tick_s)
        self._swept_at = now
        self.reactor.now = now
        # First of all: whatever fails below, every timeout hangs on the next sweep.
        self._loop.call_later(self._tick_s, self._sweep)
        for swept in (
            *self._listeners,
            *self._pools.values(),
            *self._replaced.values(),
            *self._parting,
            *self._retired,
            self._mirrors,
            self.access_log,
            self.spans,
        ):
            try:
                swept.sweep(now)
            except Exception:  # noqa: BLE001 - the safety net, as in the reactor
                self.reactor.fault(swept.sweep)
        self._part()
        self._retired = [pool for pool in self._retired if pool.is_busy]
        self._report_outcomes()

    # -- what the supervisor is told -------------------------------------------------------------------

    def report_to(self, send: Callable[[Message], None]) -> None:
        """``send`` takes messages for the supervisor."""
        self._report = self.spans.tell = send

    def _report_soon(self) -> None:
        """A backend keeps failing: that is not left for the next sweep."""
        if not self._is_report_due:
            self._is_report_due = True
            self.reactor.call_soon(self._report_outcomes)

    def _report_outcomes(self) -> None:
        self._is_report_due = False
        pools = {name: found for name, pool in self._pools.items() if (found := pool.take_outcomes())}
        if pools:
            self._report({"type": "outcomes", "pools": pools})

    def stop_accepting(self, sockets: str = "close") -> None:
        """``sockets``: ``close`` ends the listening; ``hand_over``: other workers read them from now on;
        ``keep``: somebody will accept later what comes now."""
        self._listeners.stop(
            hands_over_streams=sockets != "close", hands_over_datagrams=sockets == "hand_over"
        )

    async def drain(self, sockets: str = "close") -> dict[str, int]:
        """Stop accepting, let everything end, cut short what is left after each listener's time.

        Gives what was cut short, by listener. ``sockets``: as above.
        """
        plan = self._plan
        if plan is None:
            return {}
        self.stop_accepting(sockets)
        aborted = await self._listeners.drain()
        for pool in (*self._pools.values(), *self._parting):
            pool.close_idle()
        self.access_log.close(_LAST_LINES_S)
        self.spans.flush()
        return aborted

    def open(self) -> dict[str, int]:
        """Connections and flows open now, by listener."""
        return self._listeners.open()

    def told(self, limit: int) -> Message:
        """Clients' connections, for whoever asks: see ``connections``."""
        return told(self._listeners, limit, time.monotonic())

    # -- metrics ---------------------------------------------------------------------------------------

    def sources(self) -> Iterator[Source]:
        """Whatever counts in this worker. The caller may pause between two of them, whatever changes then."""
        for counters in list(self._listeners.counters()):
            yield from listener_sources(counters)
        for pool in list(self._pools.values()):
            yield from pool_sources(pool)
        yield self.access_log, None, self.access_log.collect
        yield self.spans, None, self.spans.collect
        if self.steering is not None:
            handover = self.steering.handover
            yield handover, None, partial(collect_handover, handover)

    @property
    def faults(self) -> int:
        return self.reactor.faults

    @property
    def lag_s(self) -> float:
        return self._lag_s


def _to_nobody(_: Message) -> None:
    """Before there is a channel."""
