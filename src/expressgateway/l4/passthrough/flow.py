"""One flow: a client's place, a backend, and a socket between the two that is the flow's own.

The kernel sorts what the backend answers by that socket, and tells there by ICMP that nobody is there. What a
backend once answered stays with it: only it has the connection's keys. A flow that was never answered may go
to another one.
"""

import errno
import logging
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

from expressgateway.l4.passthrough.flows import Entry, FlowTable, Place
from expressgateway.l4.passthrough.settings import Settings
from expressgateway.net.batches import Address, BatchSocket, cut_up, never_fragment
from expressgateway.net.datagram import Control, reason_of
from expressgateway.net.facts import Facts, State
from expressgateway.net.reactor import IN, OUT, Reactor
from expressgateway.observe.counters import ListenerCounters
from expressgateway.observe.logs import Limited
from expressgateway.proxy.errors import reason_of_fault
from expressgateway.upstream.backend import Backend
from expressgateway.upstream.errors import Fault
from expressgateway.upstream.pool import Pool

log = logging.getLogger(__name__)

FROM_CLIENT: Final = 0
FROM_BACKEND: Final = 1
GRAIN_S: Final = 1.0  # how exactly a flow's last datagram is remembered
BUFFER_BYTES: Final = 2**20  # of a flow's socket, each way; kernel memory, cut to net.core.[rw]mem_max

_ROUNDS: Final = 3  # backends tried for one datagram
_LONG: Final = 0x80
_BLAME_S: Final = 1.0  # one established flow blames its backend once in this time

# What says that a backend is not there, by ICMP or by the routing table.
GONE: Final = frozenset(
    {
        errno.ECONNREFUSED,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.ENETDOWN,
        errno.ENOPROTOOPT,
        errno.EACCES,
    }
)


class Shared:
    """What all flows of a listener have in common."""

    __slots__ = (
        "audit",
        "counters",
        "forget",
        "front",
        "heard",
        "opened",
        "out",
        "pool",
        "reactor",
        "settings",
        "table",
    )

    def __init__(
        self,
        reactor: Reactor,
        front: BatchSocket,
        counters: ListenerCounters,
        pool: Pool,
        settings: Settings,
        opened: "Callable[[Flow], None]",
        forget: "Callable[[Flow], None]",
    ) -> None:
        self.reactor = reactor
        self.front = front
        self.counters = counters
        self.pool = pool
        self.settings = settings
        self.audit = Limited(log, window_s=settings.audit_window_s)
        self.opened = opened
        """Told when a flow has a backend, the first one or another."""
        self.forget = forget
        """Told when a flow has ended."""
        self.table: FlowTable[Flow] = FlowTable(
            settings.max_flows, settings.max_per_source, settings.longest_cid_bytes
        )
        self.heard: dict[Backend, float] = {}
        """When a backend sent something last, to the grain; as many as there are, some that left besides."""
        self.out: list[bytes] = []
        """Datagrams of the flow that is being read, on their way to its client."""


class Flow(Entry):
    __slots__ = (
        "_backlog",
        "_blamed_at",
        "_first",
        "_heard_at",
        "_is_nameless",
        "_key",
        "_shared",
        "_tried",
        "address",
        "backend",
        "batch",
        "began_at",
        "control",
        "ip",
        "is_answered",
        "is_over",
        "is_pinned",
        "sent",
    )

    def __init__(
        self,
        shared: Shared,
        place: Place,
        source: str,
        ip: str,
        address: Address,
        control: list[Control],
        key: bytes,
        pinned: Backend | None = None,
    ) -> None:
        """``key``: by which a backend is chosen; ``pinned``: the only one it may be."""
        super().__init__(place, source, shared.reactor.now)
        # Wiring
        self._shared = shared
        self.ip = ip
        self.address = address
        self.control = control
        """What makes replies come from the address that the client sent to."""
        self._key = key
        self.backend: Backend | None = pinned
        self.is_pinned = pinned is not None
        # Connection
        self.batch: BatchSocket | None = None
        self.began_at = self.seen_at
        """When this backend was first sent something."""
        self.is_answered = False  # by this backend
        self.is_over = False
        self._heard_at = float("-inf")  # from the backend, to the grain
        self._is_nameless = False  # the backend's connection ID has no bytes: all goes by place
        self.sent = 0
        """Times that something was sent before there was an answer."""
        self._first: bytes | None = None
        """The first datagram, until it is answered or forgotten: to be sent elsewhere on ICMP's word."""
        self._tried: list[Backend] = []  # gone, or silent; at most the pool
        self._backlog: deque[bytes] | None = None  # at most settings.backlog
        self._blamed_at = float("-inf")

    def facts(self) -> Facts:
        """Its beginning is that of its time with this backend."""
        state = State.CLOSING if self.is_over else State.ACTIVE if self.is_answered else State.OPENING
        return Facts("quic", self.ip, self.address[1], self.began_at, None, state)

    # -- the backend -----------------------------------------------------------------------------------

    def open(self, *, again: bool = True) -> bool:
        """Choose a backend and connect to it. If there is none to be had, a datagram is counted dropped.

        ``again``: where all have been tried, begin with them anew.
        """
        shared = self._shared
        counters = shared.counters
        for attempt in range(_ROUNDS):
            backend = self.backend if self.is_pinned else self._choose(again=again and attempt == 0)
            if backend is None:
                break
            try:
                self._connect(backend)
            except OSError as error:
                if error.errno in GONE:
                    self._blame(backend, error)
                    if self.is_pinned:
                        break
                    continue
                # It is us who have no descriptor, port or memory left: no other backend would help, but flows
                # that can make room.
                shared.table.ceiling = max(1, len(shared.table))
                kind = errno.errorcode.get(error.errno or 0, "other")
                counters.accept_errors.add(kind)
                counters.dropped.add("no_socket")
                shared.audit.warning(
                    f"flow_{kind}",
                    counters.name,
                    f"no socket for a flow: {kind}; raise the limit of open files, "
                    "or widen net.ipv4.ip_local_port_range",
                )
                return False
            self.backend = backend
            self.is_answered = False
            self._heard_at = float("-inf")
            self.sent = 0
            self.began_at = shared.reactor.now
            backend.begin()
            backend.opened()
            backend.leases += 1
            shared.opened(self)
            return True
        if not self._tried and not self.is_pinned:
            counters.relay_errors.add(reason_of_fault(shared.pool.why_none()).value)
            shared.audit.warning("relay", counters.name, "a flow had no backend")
        counters.dropped.add("no_backend")
        return False

    def _choose(self, *, again: bool) -> Backend | None:
        pool = self._shared.pool
        backend = pool.pick(self._key, self._tried)
        if backend is None and again and self._tried:
            # Every backend was gone at some time: begin again, one may have come back.
            self._tried.clear()
            backend = pool.pick(self._key)
        return backend

    def _connect(self, backend: Backend) -> None:
        address = backend.address
        sock = socket.socket(
            socket.AF_INET6 if len(address) == 4 else socket.AF_INET,
            socket.SOCK_DGRAM | socket.SOCK_NONBLOCK,
        )
        try:
            never_fragment(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            sock.connect(address)
            batch = BatchSocket(sock, tells_ecn=False)
            self._shared.reactor.add(sock.fileno(), IN, self.on_ready)
        except OSError:
            sock.close()
            raise
        self.batch = batch

    def _blame(self, backend: Backend, error: OSError) -> None:
        refused = error.errno == errno.ECONNREFUSED
        reason = reason_of_fault(Fault.REFUSED if refused else Fault.UNREACHABLE).value
        backend.connect_failures += 1
        self.blame(backend, reason)

    def blame(self, backend: Backend, reason: str) -> None:
        """It was the backend's fault; ``reason``: a label."""
        shared = self._shared
        self._blamed_at = shared.reactor.now
        shared.pool.failed(backend, reason.replace("_", " "))
        if not self.is_pinned:
            self._tried.append(backend)
        shared.counters.relay_errors.add(reason)
        shared.audit.warning(
            "backend_gone",
            backend.id,
            "a backend is gone: new connections go elsewhere",
            listener=shared.counters.name,
            cause=reason,
        )

    def _on_gone(self, error: OSError) -> None:
        """ICMP's word. It speaks of an earlier datagram."""
        backend = self.backend
        if backend is None:
            return
        if self.is_answered or self.is_pinned:
            # Nobody else can have this connection; its backend may come back.
            if self._shared.reactor.now - self._blamed_at >= _BLAME_S:
                self._blame(backend, error)
                self._tried.clear()
            return
        self._blame(backend, error)
        first = self._first
        self.leave_backend()
        # Not twice to the same: where nobody is there, that would never end.
        if first is not None and self.open(again=False):
            self.send([first])

    def avoid(self, backend: Backend) -> None:
        """Choose another one the next time."""
        self._tried.append(backend)

    def leave_backend(self) -> None:
        """The flow stays, and chooses again with its next datagram."""
        batch, self.batch = self.batch, None
        backend = self.backend
        self._backlog = None
        if batch is None:
            return
        if backend is not None:
            backend.closed()
            backend.end()
            backend.responses[2 if self.is_answered else 0] += 1
        if not self.is_pinned:
            self.backend = None
        self._shared.reactor.remove(batch.fileno())
        batch.close()

    @property
    def is_open(self) -> bool:
        return self.batch is not None

    def forget_first(self) -> None:
        self._first = None

    # -- from the client -------------------------------------------------------------------------------

    def send(self, datagrams: list[bytes]) -> None:
        """Datagrams of the client, in order. Never raises ``OSError``."""
        batch = self._ready()
        if batch is None:
            return
        if not self.is_answered:
            self._note_sent(datagrams[0])
        if self._backlog:
            self._wait(datagrams)
            return
        taken = self._try(batch, datagrams)
        if taken < len(datagrams):
            self._wait(datagrams[taken:])

    def send_cut(self, data: bytes, segment_bytes: int) -> None:
        """The same for a buffer of several."""
        batch = self._ready()
        if batch is None:
            return
        if self._backlog or not self.is_answered:
            self.send(cut_up(data, segment_bytes))
            return
        try:
            taken = batch.send_cut(data, segment_bytes, None)
        except OSError:
            # An earlier datagram's error, most of the time: said once, and not of these.
            self.send(cut_up(data, segment_bytes))
            return
        counters = self._shared.counters
        counters.datagrams[FROM_CLIENT] += taken
        if taken * segment_bytes >= len(data):
            counters.relayed[FROM_CLIENT] += len(data)
            return
        counters.relayed[FROM_CLIENT] += taken * segment_bytes
        self._wait(cut_up(data[taken * segment_bytes :], segment_bytes))

    def _ready(self) -> BatchSocket | None:
        backend = self.backend
        if backend is not None and backend.is_down and not self.is_answered and not self.is_pinned:
            self.leave_backend()
        if self.batch is None and (self.is_over or not self.open()):
            return None
        return self.batch

    def _note_sent(self, first: bytes) -> None:
        self.sent += 1
        if self.sent == 1 and self._first is None and not self.is_pinned:
            self._first = first

    def _try(self, batch: BatchSocket, datagrams: list[bytes]) -> int:
        """How many of them are done with: sent, or dropped for good."""
        counters = self._shared.counters
        done = 0
        rounds = 0
        while done < len(datagrams):
            rest = datagrams[done:] if done else datagrams
            try:
                taken = batch.send(rest, None)
            except OSError as error:
                if error.errno not in GONE:
                    counters.dropped.add(reason_of(error))
                    done += 1
                    continue
                # It is an earlier datagram that was refused; these have not been sent yet.
                self._on_gone(error)
                rounds += 1
                if self.batch is None or rounds == _ROUNDS:
                    counters.dropped.add("no_backend")
                    return len(datagrams)
                batch = self.batch
                continue
            if not taken:
                break
            counters.datagrams[FROM_CLIENT] += taken
            counters.relayed[FROM_CLIENT] += sum(map(len, rest[:taken]))
            done += taken
        return done

    def _wait(self, datagrams: list[bytes]) -> None:
        """The socket's buffer is full."""
        batch = self.batch
        if batch is None:
            return
        backlog = self._backlog
        if backlog is None:
            backlog = self._backlog = deque()
        if not backlog:
            self._shared.reactor.modify(batch.fileno(), IN | OUT)
        for datagram in datagrams:
            if len(backlog) >= self._shared.settings.backlog:
                self._shared.counters.dropped.add("backend_buffer_full")
            else:
                backlog.append(datagram)

    def _drain_backlog(self) -> None:
        backlog, batch = self._backlog, self.batch
        if batch is None:
            return
        if backlog:
            taken = self._try(batch, list(backlog))
            if self.batch is not batch:
                return  # the backend was gone, and what waited for it with it
            for _ in range(min(taken, len(backlog))):
                backlog.popleft()
        if not backlog:
            self._backlog = None
            self._shared.reactor.modify(batch.fileno(), IN)

    # -- from the backend ------------------------------------------------------------------------------

    def on_ready(self, events: int) -> None:
        batch = self.batch
        if batch is None:
            return
        if events & OUT:
            self._drain_backlog()
            batch = self.batch
            if batch is None:
                return
        shared = self._shared
        out = shared.out
        if out:
            out.clear()  # of a flow whose reading failed: nobody else's client is to get it
        try:
            batch.receive(self)
        except OSError as error:
            if out:
                self._flush(out)
            if error.errno in GONE:
                self._on_gone(error)
            else:
                shared.counters.dropped.add(reason_of(error))  # the network's word on an earlier one
            return
        if out:
            self._flush(out)

    def on_datagrams(
        self, data: bytes, segment_bytes: int, address: Address, control: list[Control], ecn: int
    ) -> None:
        """What the backend sent. In a buffer of several all have the same source connection ID."""
        if not data:
            return
        shared = self._shared
        if shared.reactor.now - self._heard_at >= GRAIN_S:
            self._touch()
        if data[0] >= _LONG:
            self._learn(data)
        if not self.is_answered:
            self._note_answer()
        out = shared.out
        if len(data) <= segment_bytes:
            out.append(data)
            return
        if out:
            self._flush(out)
        try:
            taken = shared.front.send_cut(data, segment_bytes, self.address, self.control)
        except OSError:
            taken = 0
        counters = shared.counters
        if taken * segment_bytes >= len(data):
            # fast path: as it came, so it went
            counters.datagrams[FROM_BACKEND] += taken
            counters.relayed[FROM_BACKEND] += len(data)
            return
        counters.datagrams[FROM_BACKEND] += taken
        counters.relayed[FROM_BACKEND] += taken * segment_bytes
        out.extend(cut_up(data[taken * segment_bytes :], segment_bytes))
        self._flush(out)

    def _flush(self, out: list[bytes]) -> None:
        """Send single datagrams on, as few buffers. What the socket does not take is lost."""
        shared = self._shared
        counters = shared.counters
        done = 0
        while done < len(out):
            rest = out[done:] if done else out
            try:
                taken = shared.front.send(rest, self.address, self.control)
            except OSError as error:
                counters.dropped.add(reason_of(error))
                done += 1
                continue
            if not taken:
                counters.dropped.add("client_buffer_full")
                break
            counters.datagrams[FROM_BACKEND] += taken
            counters.relayed[FROM_BACKEND] += sum(map(len, rest[:taken]))
            done += taken
        out.clear()

    def _touch(self) -> None:
        shared = self._shared
        now = self._heard_at = shared.reactor.now
        shared.table.touch(self, now)
        if self.backend is not None:
            shared.heard[self.backend] = now

    def _learn(self, data: bytes) -> None:
        """The backend's own connection ID, from a long header: version-independent fields alone (RFC 8999
        5.1). In Version Negotiation it is the client's."""
        at = 6 + data[5] if len(data) > 6 else len(data)
        if at >= len(data) or not any(data[1:5]):
            return
        size = data[at]
        cid = data[at + 1 : at + 1 + size]
        if not size:
            self._is_nameless = True
        elif len(cid) == size:
            self._shared.table.learn(self, cid)

    def _note_answer(self) -> None:
        """The backend is there."""
        self.is_answered = True
        self._first = None
        self._tried.clear()
        if self.backend is not None:
            self.backend.succeeded()

    def cid_of(self, packet: bytes) -> bytes:
        """The connection ID of this flow that the packet is for; empty if it is none that is known."""
        begin = 1 if packet[0] < _LONG else 6
        for cid in self.cids:
            if packet.startswith(cid, begin):
                return cid
        return b""

    def is_proof(self, packet: bytes) -> bool:
        """Whether the client could know what it says only by having received what was sent to it."""
        if self._is_nameless:
            return packet[0] < _LONG
        cid = self.cid_of(packet)
        return bool(cid) and cid is not self.chose

    # -- the end ---------------------------------------------------------------------------------------

    def end(self) -> None:
        """Close and be forgotten. Idempotent."""
        self.is_over = True
        self.leave_backend()
        self._shared.forget(self)

    reset = end

    def __repr__(self) -> str:
        return f"<Flow {self.ip} to {self.backend!r}>"
