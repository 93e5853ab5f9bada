"""A worker's listeners: made from a plan, changed by the next one, drained at the end.

Each has a *number* of the supervisor's, which stands for its socket and for what is spoken there; other
workers know it by the same one. A plan swaps what a listener refers to - service, pool, certificates. For
what it was built from the supervisor gives another number: the new listener starts, and the old one retires,
when the plan is committed. Until then, all of it can be taken back.
"""

import asyncio
import logging
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

from expressgateway.config.schema import PASSTHROUGH
from expressgateway.l4.passthrough.listener import PassthroughListener
from expressgateway.l4.passthrough.settings import Settings as PassthroughSettings
from expressgateway.l4.quic_relay import RelaySettings
from expressgateway.l4.quic_relay_listener import QuicRelayListener
from expressgateway.l4.tcp import TcpListener
from expressgateway.l4.udp import UdpListener
from expressgateway.net.batches import Address, BatchSocket
from expressgateway.net.datagram import Control
from expressgateway.net.h3_listener import H3Listener
from expressgateway.net.http_listener import HttpListener
from expressgateway.net.listener import Census
from expressgateway.net.quic.endpoint import Sharing
from expressgateway.net.quic.sharing import Alone, QuicSharing, SharedListener
from expressgateway.net.quic.timers import Timers
from expressgateway.net.reactor import Reactor
from expressgateway.net.tickets import TicketsUnavailable, unpack_keys
from expressgateway.observe.counters import ListenerCounters
from expressgateway.observe.spans import Spans
from expressgateway.proxy.mirror import Mirrors
from expressgateway.proxy.records import Records
from expressgateway.proxy.service import HttpService
from expressgateway.proxy.trace_context import Ids
from expressgateway.upstream.pool import Pool
from expressgateway.worker.build import (
    ListenerPlan,
    Plan,
    h1_limits,
    h2_limits,
    http_service,
    timeouts_of,
)
from expressgateway.worker.build_pools import SnapshotError
from expressgateway.worker.build_quic import h3_limits, relay_settings
from expressgateway.worker.build_routes import RoutesBuilder
from expressgateway.worker.diallers import Diallers

log = logging.getLogger(__name__)

AnyListener = HttpListener | H3Listener | QuicRelayListener | TcpListener | UdpListener | PassthroughListener
Relays = Mapping[str, RelaySettings]
"""By the listener's name."""

_POLL_S: Final = 0.05
_GOODBYE_S: Final = 0.05


class Listeners:
    """See the module's text. Implements ``HandedSink``."""

    def __init__(
        self,
        reactor: Reactor,
        timers: Timers,
        census: Census,
        sockets: Mapping[int, socket.socket],
        sharing: QuicSharing | None,
        diallers: Diallers,
        records: Records,
        mirrors: Mirrors,
        spans: Spans | None = None,
    ) -> None:
        """``sockets``: by number. ``sharing``: how QUIC packets find the worker that they are for; None: this
        one is alone."""
        self._reactor = reactor
        self._timers = timers
        self._census = census
        self._sockets = dict(sockets)  # those that no listener has yet
        self._quic_sharing = sharing
        self._diallers = diallers
        self._records = records
        self._mirrors = mirrors
        self._spans = spans
        self._ids = Ids()
        self._counters: dict[str, ListenerCounters] = {}  # by the listener's name
        self._all: dict[int, AnyListener] = {}
        self._plans: dict[int, ListenerPlan] = {}  # what they were made of, but Mode A's
        self._wanted: tuple[int, ...] = ()  # by the last plan
        self._drains: dict[int, tuple[int, int]] = {}  # times to drain, and their jitters, in milliseconds
        self._is_started: set[int] = set()
        self._lasting: set[int] = set()  # as `give` was told; numbers are never given twice
        self._retired: dict[int, AnyListener] = {}  # until their connections have ended
        self._ends: set[asyncio.Task[None]] = set()  # of those
        self._aborted: dict[str, int] = {}
        self._tickets: dict[str, bytes] = {}
        if sharing is not None:
            sharing.on_moving = self._share_firsts

    def __iter__(self) -> Iterator[AnyListener]:
        return iter((*self._all.values(), *self._retired.values()))

    def __getitem__(self, number: int) -> AnyListener:
        return self._all[number]

    def counters(self) -> Iterator[ListenerCounters]:
        return iter(self._counters.values())

    def open(self) -> dict[str, int]:
        """Connections and flows open now, by listener."""
        found: dict[str, int] = {}
        for listener in self:
            name = listener.counters.name
            found[name] = found.get(name, 0) + listener.open
        return found

    def give(self, number: int, sock: socket.socket, *, is_lasting: bool = False) -> None:
        """The socket of a listener that a plan is about to have. It is this object's from here on.
        ``is_lasting``: it listens on when we are done with it."""
        if is_lasting:
            self._lasting.add(number)
        known = self._sockets.pop(number, None)
        if known is not None:
            known.close()
        self._sockets[number] = sock

    def leave_group(self, number: int, sock: socket.socket) -> None:
        """Have a datagram listener read what has come to its socket, then close it and send through ``sock``,
        which another worker reads. It is this object's from here on."""
        listener = self._all.get(number)
        if isinstance(listener, H3Listener | QuicRelayListener):
            listener.endpoint.leave_group(sock)
        elif isinstance(listener, UdpListener | PassthroughListener):
            listener.leave_group(sock)
        sock.close()

    # -- configuration ---------------------------------------------------------------------------------

    def compiled(self, plan: Plan, numbers: Sequence[int]) -> Relays:
        """What can fail. Raises ``SnapshotError``; nothing has changed then."""
        for number, each in zip(numbers, plan.listeners, strict=False):
            if number not in self._sockets and number not in self._all:
                raise SnapshotError(f"there is no socket for listener {each.config.name}")
        if plan.passthrough is not None and not (
            len(numbers) > len(plan.listeners) and (numbers[-1] in self._sockets or numbers[-1] in self._all)
        ):
            raise SnapshotError("there is no socket for passthrough")
        connect_s = plan.config.runtime.connect_timeout_ms / 1000
        return {
            each.config.name: relay_settings(
                each.quic,
                each.quic.relay,
                plan.pools[each.pool or ""],
                self._reactor,
                self._timers,
                connect_s,
            )
            for each in plan.listeners
            if each.quic is not None and each.quic.relay is not None
        }

    def configure(
        self,
        plan: Plan,
        numbers: Sequence[int],
        before: Plan | None,
        pools: Mapping[str, Pool],
        relays: Relays,
    ) -> None:
        """Take a plan into use; ``relays`` were compiled from it. ``numbers``: of its listeners, and Mode A's
        behind them."""
        self._wanted = tuple(numbers)
        for number in [one for one in self._all if one not in self._is_started and one not in numbers]:
            self._all.pop(number).stop()  # of a plan that was taken back
            self._plans.pop(number, None)
            self._drains.pop(number, None)
        for number, each in zip(numbers, plan.listeners, strict=False):
            counters = self._counters.setdefault(each.config.name, ListenerCounters(each.config.name))
            known = self._all.get(number)
            if known is None:
                self._all[number] = self._make(number, each, plan, counters, pools, relays)
            else:
                self._change(known, each, plan, self._plans.get(number), before, pools, relays)
            self._plans[number] = each
            self._drains[number] = each.config.drain_timeout_ms, each.config.drain_jitter_ms
            packed = self._tickets.get(each.config.name)
            if packed is not None:
                _install_tickets(each, packed)
        if plan.passthrough is not None:
            self._set_passthrough(numbers[-1], plan.passthrough, pools)
            self._drains[numbers[-1]] = plan.config.runtime.drain_timeout_ms, 0

    def commit(self, handed: Collection[int] = ()) -> None:
        """Start what the last plan has made, and retire what is not in it any more. ``handed``: of these, the
        sockets have new listeners."""
        for number in [one for one in self._all if one not in self._wanted]:
            self._retire(number, hands_over=number in handed)
        for number, listener in self._all.items():
            if number not in self._is_started:
                self._is_started.add(number)
                listener.start()
        for number in [one for one in self._sockets if one not in self._wanted]:
            self._sockets.pop(number).close()

    def _retire(self, number: int, *, hands_over: bool) -> None:
        listener = self._all.pop(number)
        times = self._drains.pop(number)
        self._plans.pop(number, None)
        self._is_started.discard(number)
        self._retired[number] = listener
        is_stream = isinstance(listener, HttpListener | TcpListener)
        listener.stop(hands_over=hands_over or (is_stream and number in self._lasting))
        self._lasting.discard(number)
        if hands_over and isinstance(listener, H3Listener | QuicRelayListener | PassthroughListener):
            # What comes for its connections comes to the new listener, which cannot know them.
            listener.go_away()
        task = asyncio.get_running_loop().create_task(self._end(number, *times), name=f"retired {number}")
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    async def _end(self, number: int, timeout_ms: int, jitter_ms: int) -> None:
        listener = self._retired[number]
        try:
            await self._drain_one(listener, timeout_ms, jitter_ms)
        finally:
            del self._retired[number]
            name = listener.counters.name
            if all(other.counters.name != name for other in self):
                self._counters.pop(name, None)

    def _change(
        self,
        known: AnyListener,
        each: ListenerPlan,
        plan: Plan,
        old: ListenerPlan | None,
        before: Plan | None,
        pools: Mapping[str, Pool],
        relays: Relays,
    ) -> None:
        config = each.config
        is_same = old is not None and before is not None and _is_same_service(each, old, plan, before)
        if isinstance(known, HttpListener | H3Listener) and not is_same:
            service = self._service(each, plan, known.counters, pools)
            service.succeed(known.service)
            known.service = service
            if isinstance(known, H3Listener):
                known.h3_limits = h3_limits(config, plan.config)
            else:
                known.h1_limits = h1_limits(each, plan.config)
                known.h2_limits = h2_limits(each, plan.config)
                known.offers_h2c = config.h2c
        if isinstance(known, HttpListener | TcpListener):
            known.door = each.door
            known.tls = each.tls
        if isinstance(known, H3Listener):
            known.trusted = plan.trusted
        if isinstance(known, H3Listener | QuicRelayListener) and each.quic is not None:
            known.endpoint.settings = each.quic.endpoint
        if isinstance(known, QuicRelayListener):
            known.settings = relays[config.name]
        if isinstance(known, TcpListener):
            known.max_attempts = plan.pools[each.pool or ""].retry.attempts
        if isinstance(known, TcpListener | UdpListener | QuicRelayListener):
            known.pool = pools[each.pool or ""]

    def _make(
        self,
        number: int,
        each: ListenerPlan,
        plan: Plan,
        counters: ListenerCounters,
        pools: Mapping[str, Pool],
        relays: Relays,
    ) -> AnyListener:
        sock = self._sockets.pop(number)
        if each.quic is not None:
            return self._make_quic(number, sock, each, plan, counters, pools, relays)
        if each.config.is_http:
            return HttpListener(
                self._reactor,
                sock,
                each.door,
                self._census,
                counters,
                self._service(each, plan, counters, pools),
                h1_limits(each, plan.config),
                h2_limits(each, plan.config),
                each.tls,
                offers_h2c=each.config.h2c,
            )
        pool = pools[each.pool or ""]
        if each.config.is_datagram:
            return UdpListener(self._reactor, sock, self._census, counters, pool)
        listener = TcpListener(
            self._reactor, sock, each.door, self._census, counters, pool, self._diallers.l4, each.tls
        )
        listener.max_attempts = plan.pools[each.pool or ""].retry.attempts
        return listener

    def _make_quic(
        self,
        number: int,
        sock: socket.socket,
        each: ListenerPlan,
        plan: Plan,
        counters: ListenerCounters,
        pools: Mapping[str, Pool],
        relays: Relays,
    ) -> AnyListener:
        batch = BatchSocket(sock)
        sharing: Sharing = Alone()
        if self._quic_sharing is not None:
            sharing = SharedListener(self._quic_sharing, number)
        quic = each.quic
        if quic is None:
            raise AssertionError("only QUIC listeners come here")
        if quic.relay is not None:
            return QuicRelayListener(
                self._reactor,
                self._timers,
                batch,
                self._census,
                counters,
                quic.endpoint,
                sharing,
                pools[each.pool or ""],
                relays[each.config.name],
            )
        return H3Listener(
            self._reactor,
            self._timers,
            batch,
            self._census,
            counters,
            quic.endpoint,
            self._service(each, plan, counters, pools),
            h3_limits(each.config, plan.config),
            plan.trusted,
            sharing,
        )

    def _set_passthrough(self, number: int, settings: PassthroughSettings, pools: Mapping[str, Pool]) -> None:
        known = self._all.get(number)
        if isinstance(known, PassthroughListener):
            known.adopt(settings)
            return
        counters = self._counters.setdefault(PASSTHROUGH, ListenerCounters(PASSTHROUGH))
        made = PassthroughListener(
            self._reactor, self._sockets.pop(number), self._census, counters, pools[PASSTHROUGH], settings
        )
        if self._quic_sharing is not None:
            made.share(SharedListener(self._quic_sharing, number))
        self._all[number] = made

    def _service(
        self, each: ListenerPlan, plan: Plan, counters: ListenerCounters, pools: Mapping[str, Pool]
    ) -> HttpService:
        builder = RoutesBuilder(
            plan.pools,
            pools,
            plan.trusted,
            counters,
            timeouts_of(each, plan.config),
            is_secure=each.tls is not None or each.quic is not None,
        )
        routing = builder.build(each.config.routes, each.pool)
        has_log = plan.config.observability.access_log is not None
        return http_service(
            each,
            plan.config,
            routing,
            self._mirrors,
            counters,
            self._reactor,
            self._ids,
            self._records if has_log else None,
            self._spans,
        )

    def install_tickets(self, listener: str, packed: bytes, plan: Plan | None) -> None:
        """Session ticket keys of a TLS listener, from the supervisor: the same for all workers."""
        is_first = listener not in self._tickets
        self._tickets[listener] = packed
        if plan is None:
            return
        for each in plan.listeners:
            if each.config.name == listener:
                _install_tickets(each, packed)
                if not is_first:
                    self._counters[listener].ticket_rotations += 1

    # -- life ------------------------------------------------------------------------------------------

    @property
    def are_retiring(self) -> bool:
        """Whether listeners that are in no plan any more have connections left."""
        return bool(self._retired)

    def start(self) -> None:
        """Begin to accept."""
        self.commit()
        if self._quic_sharing is not None:
            self._quic_sharing.handover.start(self._reactor, self)

    def stop(self, *, hands_over_streams: bool = False, hands_over_datagrams: bool = False) -> None:
        """Take nothing new. Whether others read the sockets, or will."""
        for number, listener in self._all.items():
            is_stream = isinstance(listener, HttpListener | TcpListener)
            is_left = hands_over_streams or number in self._lasting
            listener.stop(hands_over=is_left if is_stream else hands_over_datagrams)

    def _share_firsts(self) -> None:
        for listener in self:
            if isinstance(listener, H3Listener | QuicRelayListener):
                listener.endpoint.share_firsts()

    def on_handed(
        self,
        position: int,
        data: bytes,
        segment_bytes: int,
        address: Address,
        control: list[Control],
        ecn: int,
    ) -> None:
        """Another worker received what belongs to one of our connections."""
        listener = self._all.get(position) or self._retired.get(position)
        if isinstance(listener, H3Listener | QuicRelayListener):
            listener.endpoint.on_handed(data, segment_bytes, address, control, ecn)
        elif isinstance(listener, PassthroughListener):
            listener.on_handed(data, segment_bytes, address, control, ecn)

    async def drain(self) -> dict[str, int]:
        """Let everything end, cut short what is left after each listener's time: how much, by listener."""
        await asyncio.gather(
            *(self._drain_one(listener, *self._drains[number]) for number, listener in self._all.items()),
            *self._ends,
        )
        return self._aborted

    async def _drain_one(self, listener: AnyListener, timeout_ms: int, jitter_ms: int) -> None:
        loop = asyncio.get_running_loop()
        ends = loop.time() + timeout_ms / 1000
        listener.drain(jitter_ms / 1000)
        while listener.open and loop.time() < ends:  # noqa: ASYNC110 - nobody signals the last one
            await asyncio.sleep(_POLL_S)
        left = listener.go_away()
        if left:
            name = listener.counters.name
            self._aborted[name] = self._aborted.get(name, 0) + left
            await asyncio.sleep(_GOODBYE_S)  # they are on their way


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


def _is_same_service(each: ListenerPlan, same: ListenerPlan, plan: Plan, before: Plan) -> bool:
    """Whether a listener's service would be built again as it is. Compares by identity where it can: a
    run-time change leaves every other part of the configuration the same object."""
    new, old = plan.config, before.config
    return (
        each.config is same.config
        and each.tls is same.tls
        and new.runtime is old.runtime
        and new.security is old.security
        and new.observability is old.observability
        and all(
            pool.name in before.pools and pool.is_used_as(before.pools[pool.name])
            for pool in plan.pools.values()
        )
    )
