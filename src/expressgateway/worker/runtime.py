"""The living worker: listeners, pools and what sweeps them, from one snapshot to the next.

``configure`` compiles a snapshot completely before it touches anything, then swaps: pools take their new
sets, listeners their new services. Exchanges and connections under way keep what they began with.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Iterator
from typing import Final

from expressgateway.config.schema import Config
from expressgateway.l4.tcp import TcpListener
from expressgateway.l4.udp import UdpListener
from expressgateway.net.dial import Dialler
from expressgateway.net.h1_back import H1Connections
from expressgateway.net.http_listener import HttpListener
from expressgateway.net.listener import Census
from expressgateway.net.reactor import Reactor
from expressgateway.net.tickets import TicketsUnavailable, unpack_keys
from expressgateway.net.tls import TlsConfigError
from expressgateway.observe.counters import CLASSES, ListenerCounters, Sample
from expressgateway.proxy.forwarding import Ids
from expressgateway.upstream.backend import Backend
from expressgateway.upstream.discovery import Discovery
from expressgateway.upstream.dns import Resolver
from expressgateway.upstream.pool import Pool
from expressgateway.worker.build import (
    Files,
    ListenerPlan,
    Plan,
    SnapshotError,
    compile_snapshot,
    h1_limits,
    http_service,
)

log = logging.getLogger(__name__)

# All timeouts are found by a sweep that runs this many times per ``sweep_interval_ms``.
_SWEEPS_PER_INTERVAL: Final = 4
_MIN_TICK_S: Final = 0.025
_FIRST_ANSWERS_S: Final = 2.0  # how long readiness waits for DNS

AnyListener = HttpListener | TcpListener | UdpListener


class Runtime:
    """Everything one worker serves with."""

    def __init__(self, census: Census, sockets: dict[int, socket.socket]) -> None:
        """``sockets``: this worker's listening sockets by position in ``config.listeners``."""
        self._loop = asyncio.get_running_loop()
        self.reactor = Reactor(self._loop)
        self._census = census
        self._sockets = sockets
        self._resolver = Resolver()
        self._ids = Ids()
        self._plan: Plan | None = None
        self._pools: dict[str, Pool] = {}
        self._retired: list[Pool] = []  # removed by a reload, until their exchanges have ended
        self._discoveries: dict[str, Discovery] = {}
        self._dialler = Dialler(self.reactor, 5.0, ("http/1.1",))
        self._l4_dialler = Dialler(self.reactor, 5.0, (), is_framed=False)
        self._counters: dict[int, ListenerCounters] = {}
        self._listeners: dict[int, AnyListener] = {}
        self._tickets: dict[str, bytes] = {}
        self._is_serving = False
        self._tick_s = 0.25
        self._lag_s = 0.0
        self._swept_at = time.monotonic()

    # -- configuration ---------------------------------------------------------------------------------

    async def configure(self, config: Config, files: Files) -> None:
        """Take a snapshot into use. Raises ``SnapshotError`` and changes nothing if it cannot be served."""
        plan = compile_snapshot(config, files)
        dialler = Dialler(self.reactor, config.runtime.connect_timeout_ms / 1000, ("http/1.1",))
        l4_dialler = Dialler(self.reactor, config.runtime.connect_timeout_ms / 1000, (), is_framed=False)
        for position, each in enumerate(plan.listeners):
            chosen = dialler if each.config.is_http else l4_dialler
            for backend in plan.pools[each.pool].backends:
                if backend.tls is not None:
                    try:
                        chosen.context_for(backend.tls)
                    except TlsConfigError as error:
                        raise SnapshotError(f"pool {each.pool}, backend {backend.id}: {error}") from error
            if position not in self._sockets:
                raise SnapshotError(f"there is no socket for listener {each.config.name}")
        # From here on nothing fails.
        self._dialler.take_over(dialler)
        self._l4_dialler.take_over(l4_dialler)
        self._plan = plan
        self._set_pools(plan)
        for position, each in enumerate(plan.listeners):
            self._set_listener(position, each, config)
        self._tick_s = max(
            _MIN_TICK_S, config.runtime.watchdog.sweep_interval_ms / 1000 / _SWEEPS_PER_INTERVAL
        )
        if not self._is_serving:
            await asyncio.gather(
                *(discovery.first_answers(_FIRST_ANSWERS_S) for discovery in self._discoveries.values())
            )

    def _set_pools(self, plan: Plan) -> None:
        for name in list(self._pools):
            if name not in plan.pools:
                pool = self._pools.pop(name)
                self._discoveries.pop(name).close()
                pool.replace((), pool.policy)
                self._retired.append(pool)
        for name, pool_plan in plan.pools.items():
            known = self._pools.get(name)
            if known is None:
                attach = _Attach(self.reactor, self._dialler)
                known = self._pools[name] = Pool(name, pool_plan.policy, attach)
                self._discoveries[name] = Discovery(known, self._resolver)
            self._discoveries[name].apply(pool_plan.backends, pool_plan.policy)

    def _set_listener(self, position: int, each: ListenerPlan, config: Config) -> None:
        pool = self._pools[each.pool]
        counters = self._counters.get(position)
        if counters is None:
            counters = self._counters[position] = ListenerCounters(each.config.name)
        known = self._listeners.get(position)
        if isinstance(known, HttpListener):
            known.service = http_service(each, config, pool, counters, self.reactor, self._ids)
            known.h1_limits = h1_limits(each, config)
            known.door = each.door
            known.tls = each.tls
        elif isinstance(known, TcpListener):
            known.pool = pool
            known.door = each.door
            known.tls = each.tls
        elif isinstance(known, UdpListener):
            known.pool = pool
        else:
            self._listeners[position] = self._make(position, each, config, counters, pool)
        packed = self._tickets.get(each.config.name)
        if packed is not None:
            self._install_tickets(each, packed)

    def _make(
        self, position: int, each: ListenerPlan, config: Config, counters: ListenerCounters, pool: Pool
    ) -> AnyListener:
        sock = self._sockets[position]
        if each.config.is_datagram:
            return UdpListener(self.reactor, sock, self._census, counters, pool)
        if each.config.is_http:
            service = http_service(each, config, pool, counters, self.reactor, self._ids)
            limits = h1_limits(each, config)
            return HttpListener(
                self.reactor, sock, each.door, self._census, counters, service, limits, each.tls
            )
        return TcpListener(
            self.reactor, sock, each.door, self._census, counters, pool, self._l4_dialler, each.tls
        )

    def install_tickets(self, listener: str, packed: bytes) -> None:
        """Session ticket keys of a TLS listener, from the supervisor: the same for all workers."""
        is_first = listener not in self._tickets
        self._tickets[listener] = packed
        if self._plan is None:
            return
        for position, each in enumerate(self._plan.listeners):
            if each.config.name == listener:
                self._install_tickets(each, packed)
                if not is_first:
                    self._counters[position].ticket_rotations += 1

    @staticmethod
    def _install_tickets(each: ListenerPlan, packed: bytes) -> None:
        if each.tls is None:
            return
        try:
            each.tls.install_tickets(unpack_keys(packed))
        except TicketsUnavailable as error:
            log.warning(
                "TLS sessions resume on one worker only: %s",
                error,
                extra={"fields": {"listener": each.config.name}},
            )

    # -- life ------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Begin to accept. Idempotent."""
        if self._is_serving:
            return
        self._is_serving = True
        for listener in self._listeners.values():
            listener.start()
        self._swept_at = time.monotonic()
        self._loop.call_later(self._tick_s, self._sweep)

    def _sweep(self) -> None:
        now = time.monotonic()
        self._lag_s = max(0.0, now - self._swept_at - self._tick_s)
        self._swept_at = now
        self.reactor.now = now
        # First of all: whatever fails below, every timeout hangs on the next sweep.
        self._loop.call_later(self._tick_s, self._sweep)
        for swept in (*self._listeners.values(), *self._pools.values(), *self._retired):
            try:
                swept.sweep(now)
            except Exception:  # noqa: BLE001 - the safety net, as in the reactor
                self.reactor.fault(swept.sweep)
        self._retired = [pool for pool in self._retired if pool.is_busy]

    def stop_accepting(self) -> None:
        for listener in self._listeners.values():
            listener.stop()

    async def drain(self) -> dict[str, int]:
        """Stop accepting, let everything end, cut short what is left after each listener's time.

        Gives what was cut short, by listener.
        """
        plan = self._plan
        aborted: dict[str, int] = {}
        if plan is None:
            return aborted
        self.stop_accepting()
        await asyncio.gather(
            *(
                self._drain_listener(self._listeners[position], each, aborted)
                for position, each in enumerate(plan.listeners)
            )
        )
        for pool in self._pools.values():
            pool.close_idle()
        return aborted

    async def _drain_listener(
        self, listener: AnyListener, each: ListenerPlan, aborted: dict[str, int]
    ) -> None:
        ends = self._loop.time() + each.config.drain_timeout_ms / 1000
        listener.drain(each.config.drain_jitter_ms / 1000)
        while listener.open and self._loop.time() < ends:  # noqa: ASYNC110 - nobody signals the last one
            await asyncio.sleep(min(self._tick_s, 0.05))
        left = listener.go_away()
        if left:
            aborted[each.config.name] = left
            await asyncio.sleep(0.05)  # goodbyes are on their way

    def open(self) -> dict[str, int]:
        """Connections and flows open now, by listener."""
        if self._plan is None:
            return {}
        return {
            each.config.name: self._listeners[position].open
            for position, each in enumerate(self._plan.listeners)
        }

    # -- metrics ---------------------------------------------------------------------------------------

    def collect(self) -> Iterator[Sample]:
        """This worker's samples."""
        for counters in self._counters.values():
            yield from counters.collect()
        for pool in self._pools.values():
            yield "pool_unavailable", (pool.name,), pool.unavailable
            for reason, number in pool.retries.items():
                yield "backend_retries", (pool.name, reason), number
            unsolicited = pool.unsolicited_before
            for backend in pool.backends:
                unsolicited += backend.unsolicited
                yield from _collect_backend(pool.name, backend)
            if unsolicited:
                yield "security_events", (pool.name, "unsolicited_response"), unsolicited
        dns = self._resolver.counters
        yield "dns_queries", (), dns.queries
        yield "dns_failures", (), dns.failures
        yield "dns_stale_served", (), dns.stale_served

    @property
    def faults(self) -> int:
        return self.reactor.faults

    @property
    def lag_s(self) -> float:
        return self._lag_s


class _Attach:
    """Gives a new backend its connections; a layer 4 pool's backends are dialled per connection."""

    def __init__(self, reactor: Reactor, dialler: Dialler) -> None:
        self._reactor = reactor
        self._dialler = dialler

    def __call__(self, backend: Backend) -> None:
        if backend.settings.protocol == "h1":
            backend.connections = H1Connections(backend, self._reactor, self._dialler)


def _collect_backend(pool: str, backend: Backend) -> Iterator[Sample]:
    labels = (pool, backend.id)
    for status_class, number in zip(CLASSES, backend.responses, strict=True):
        if number:
            yield "backend_requests", (*labels, status_class), number
    yield "backend_inflight", labels, backend.in_flight
    yield "backend_connect_failures", labels, backend.connect_failures
    yield "pool_leases", labels, backend.leases
    yield "pool_reuse", labels, backend.reused
    if backend.connections is not None:
        idle = backend.connections.idle
        yield "pool_connections", (*labels, "idle"), idle
        yield "pool_connections", (*labels, "busy"), backend.connections.open - idle
