"""Mode A: a datagram socket whose QUIC connections are routed by connection ID and never decrypted.

Whose a datagram is, `flows` knows. What belongs to nobody begins a flow if it may: a client's Initial of a
known version, or any long header of another one, in a datagram of at least 1200 bytes; with QUIC-LB also a
packet whose connection ID names a backend. Everything else is dropped and counted, without an answer and
without a trace in memory. A new flow's backend is chosen by the connection ID that its client chose.

Buffers are passed on as they came: datagrams that follow each other and belong to one flow leave in one call.

**Other workers.** The kernel spreads clients over workers by address and port. A client that changes its
port may come to a worker that has not seen its connection. With QUIC-LB every worker can route it; without,
only the one that has the flow. So where there are several, connection IDs that backends chose are told to a
table that all share (``share``), and what nobody here knows goes to the worker that knows its ID, which takes
it by ``on_handed``. That one's flow has moved then, and its answers leave by that worker's own socket, which
is bound to the same address; what the client sends keeps coming to the worker that does not know it, and goes
the same way. IDs of less than eight bytes are not shared.
"""

import errno
import socket
from collections import deque
from collections.abc import Iterable
from typing import Final

from expressgateway.l4.passthrough.flow import GRAIN_S, Flow, Shared
from expressgateway.l4.passthrough.flows import MIN_CID_BYTES, Place, source_of
from expressgateway.l4.passthrough.retry import Verdict, retry_cid
from expressgateway.l4.passthrough.settings import Settings
from expressgateway.net.batches import Address, BatchSocket, never_fragment
from expressgateway.net.datagram import Control, has_come, reason_of, stand_in
from expressgateway.net.facts import Told
from expressgateway.net.listener import Census, plain_ip
from expressgateway.net.quic.endpoint import Sharing
from expressgateway.net.reactor import IN, Reactor
from expressgateway.observe.counters import ListenerCounters
from expressgateway.upstream.backend import Backend
from expressgateway.upstream.pool import Pool
from expressgateway.wire.quic import (
    INITIAL,
    MIN_INITIAL_BYTES,
    UNKNOWN,
    LongHeader,
    read_long,
    retry,
    token_of,
)

SILENCE_S: Final = 3.0  # in which a backend must have answered somebody
RECEIVE_BUFFER_BYTES: Final = 4 * 2**20  # of the listener's socket, which all clients share; kernel memory

_LAST_READS: Final = 256
_REAPS: Final = 4096  # flows closed per sweep: some 50 ms; the rest is closed by the next
_BLAME_S: Final = 1.0  # a backend's silence is a failure once in this time, however many flows it concerns
_LONG: Final = 0x80

_CID_AT: Final = 1  # in a short header; how long it is, only its owner knows


class PassthroughListener:
    """One datagram socket of one worker. Pool and settings may be swapped at any time; flows keep theirs."""

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        census: Census,
        counters: ListenerCounters,
        pool: Pool,
        settings: Settings,
    ) -> None:
        """``sock``: bound, non-blocking. It is the listener's from here on."""
        self.reactor = reactor
        self.counters = counters
        self._sharing: Sharing | None = None
        self._census = census
        self._front = BatchSocket(sock, tells_ecn=False)
        self._identity = self._front.local.identity
        self.shared = Shared(reactor, self._front, counters, pool, settings, self._await_answer, self._forget)
        self.table = self.shared.table
        self._run: list[bytes] = []  # single datagrams of one flow, not passed on yet: at most one batch
        self._run_flow: Flow | None = None
        self._trials: deque[tuple[float, Flow, Backend]] = deque()  # flows begun within SILENCE_S
        self._firsts: list[Flow] = []  # those that keep their first datagram: begun since the last sweep
        self._blamed: dict[Backend, float] = {}  # for silence, and when; at most the pool
        self._servers: dict[bytes, Backend] = {}  # by server id
        self._served: tuple[Backend, ...] | None = None  # the pool's backends that it was made of
        self._epoch = 0  # counts grains of time in which something came
        self._epoch_at = float("-inf")
        self._is_reading = False
        self._is_handed = False  # what is being taken came by another worker
        self._is_draining = False  # no new flows
        self._is_stopped = False  # the socket closes after the last flow
        never_fragment(sock)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):  # cut to net.core.[rw]mem_max
            sock.setsockopt(socket.SOL_SOCKET, option, RECEIVE_BUFFER_BYTES)

    @property
    def pool(self) -> Pool:
        return self.shared.pool

    @pool.setter
    def pool(self, pool: Pool) -> None:
        self.shared.pool = pool
        self._served = None

    def adopt(self, settings: Settings) -> None:
        """From now on. What exceeds a lowered cap stays."""
        self.shared.settings = settings
        self.shared.audit.window_s = settings.audit_window_s
        self.table.max_flows = settings.max_flows
        self.table.max_per_source = settings.max_per_source
        self.table.longest = settings.longest_cid_bytes
        self._served = None

    # -- life ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to relay."""
        self._is_reading = True
        self.reactor.add(self._front.fileno(), IN, self.on_ready)

    def stop(self, *, hands_over: bool = False) -> None:
        """Take what is in the queue already, then no new flow. The socket stays open while there are
        flows: they go on in both directions. Idempotent.

        ``hands_over``: another worker reads the socket from now on, and hands over what is for this one.
        """
        if self._is_stopped:
            return
        if hands_over:
            self._stop_reading()
        elif self._is_reading:
            self.on_ready(0)
        self._is_draining = True
        self._is_stopped = True
        if not self.open:
            self._close()

    def leave_group(self, other: socket.socket) -> None:
        """Take what is in the queue, then read no more, and send through ``other``: it is bound to the same
        address, and another worker reads it and hands over what is for this one."""
        if not self._is_reading:
            return
        for _ in range(_LAST_READS):
            if not has_come(self._front.sock):
                break
            self.on_ready(0)
        self._stop_reading()
        stand_in(self._front.sock, other)

    def drain(self, jitter_s: float = 0.0) -> None:
        """No new flows, whatever the jitter. Nobody without keys can ask a client to leave: flows go on."""
        self._is_draining = True

    def go_away(self) -> int:
        """End what is left now; gives how many flows that were."""
        left = list(self.table)
        for flow in left:
            flow.end()
        return len(left)

    def sweep(self, now: float) -> None:
        """End flows that are idle, and judge backends that do not answer."""
        for flow in self._firsts:
            flow.forget_first()
        self._firsts.clear()
        self.table.ceiling = None  # one first datagram is lost to find out whether it still is the same
        self._judge_silence(now)
        idle_s = self.shared.settings.idle_s
        if not idle_s:
            return
        for flow in self.table.idle(now, idle_s + min(GRAIN_S, idle_s), _REAPS):
            try:
                flow.end()
            except Exception:  # noqa: BLE001 - the safety net, as in the reactor: this flow only
                self.reactor.fault(flow.end)

    @property
    def open(self) -> int:
        return len(self.table)

    def told(self) -> Iterable[Told]:
        return self.table

    def knows(self, cid: bytes) -> bool:
        """Whether a connection ID is one of this worker's flows'."""
        return cid in self.table.by_cid

    def _stop_reading(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self.reactor.remove(self._front.fileno())

    def _close(self) -> None:
        self._stop_reading()
        self._front.close()

    def _forget(self, flow: Flow) -> None:
        if not self.table.remove(flow):
            return
        self.counters.inflight -= 1
        self._census.leave(flow.ip)
        if self._is_stopped and not self.open:
            self._close()

    # -- from clients ----------------------------------------------------------------------------------

    def on_ready(self, events: int) -> None:
        now = self.reactor.now
        if now - self._epoch_at >= GRAIN_S:
            self._epoch_at = now
            self._epoch += 1
        try:
            self._front.receive(self)
        except OSError as error:
            self.counters.accept_errors.add(errno.errorcode.get(error.errno or 0, "other"))
        if self._run:
            self.flush()

    def flush(self) -> None:
        """Pass on what was kept back for more of the same flow to come."""
        run, self._run = self._run, []
        flow, self._run_flow = self._run_flow, None
        if flow is not None:
            flow.send(run)

    def share(self, sharing: Sharing) -> None:
        """There are other workers: see the module's text."""
        self._sharing = sharing
        self.table.on_learned = sharing.add
        self.table.on_forgotten = sharing.remove

    def on_handed(
        self, data: bytes, segment_bytes: int, address: Address, control: list[Control], ecn: int
    ) -> None:
        """Another worker received what belongs to a flow of ours. It is not handed on."""
        self._is_handed = True
        try:
            self.on_datagrams(data, segment_bytes, address, control, ecn)
            self.flush()
        finally:
            self._is_handed = False

    def on_datagrams(
        self, data: bytes, segment_bytes: int, address: Address, control: list[Control], ecn: int
    ) -> None:
        """What one client sent."""
        place: Place = (address, control[0][2][self._identity]) if control else address
        size = len(data)
        if size <= segment_bytes:
            flow = self.find(data, place, address, control, ecn)
            if flow is not self._run_flow and self._run:
                self.flush()
            if flow is not None:
                self._run_flow = flow
                self._run.append(data)
            return
        if self._run:
            self.flush()
        self._on_buffer(data, segment_bytes, place, address, control, ecn)

    def _on_buffer(
        self,
        data: bytes,
        segment_bytes: int,
        place: Place,
        address: Address,
        control: list[Control],
        ecn: int,
    ) -> None:
        """Several datagrams. Those in a row that are one flow's are passed on together."""
        size = len(data)
        flow: Flow | None = None
        begin = width = 0  # of the row; of the connection ID that its short headers have
        cid = b""
        for at in range(0, size, segment_bytes):
            if width and data[at] < _LONG and data[at + 1 : at + 1 + width] == cid:
                continue  # fast path: as the one before
            packet = data[at : at + segment_bytes]
            found = self.find(packet, place, address, control, ecn)
            if found is not flow:
                if flow is not None:
                    self._send_row(flow, data, begin, at, segment_bytes)
                flow, begin = found, at
            width = 0
            if found is not None and packet[0] < _LONG:
                cid = found.cid_of(packet) or packet[1 : 1 + max(self.table.lengths, default=0)]
                width = len(cid)
        if flow is not None:
            self._send_row(flow, data, begin, size, segment_bytes)

    @staticmethod
    def _send_row(flow: Flow, data: bytes, begin: int, end: int, segment_bytes: int) -> None:
        flow.send_cut(data if end - begin == len(data) else data[begin:end], segment_bytes)

    def find(
        self, packet: bytes, place: Place, address: Address, control: list[Control], ecn: int
    ) -> Flow | None:
        """Whose this datagram is; ``None``: nobody's, and it was counted."""
        if not packet:
            self.counters.dropped.add("malformed")
            return None
        if packet[0] < _LONG:
            flow = self.table.by_short(packet, place)
            if flow is None or (self.shared.settings.server_ids is not None and not flow.cid_of(packet)):
                flow = self._unknown_short(packet, flow, place, address, control, ecn)
        else:
            # Version-independent fields alone: RFC 8999 5.1.
            at = 6 + packet[5] if len(packet) > 6 else len(packet)
            if at >= len(packet):
                self.counters.dropped.add("malformed")
                return None
            flow = self.table.by_long(packet[6:at], place)
            if flow is None:
                flow = self._unknown_long(packet, packet[6:at], place, address, control, ecn)
        if flow is None:
            return None
        if flow.place != place and not self._move(flow, place, address, control):
            return None
        if not flow.is_proven and flow.is_answered and flow.is_proof(packet):
            self.table.prove(flow)
        if flow.epoch is not self._epoch:
            # Compared as an object: of a hundred thousand flows' own numbers none is in a cache, this is.
            flow.epoch = self._epoch
            self.table.touch(flow, self.reactor.now)
        return flow

    def _move(self, flow: Flow, place: Place, address: Address, control: list[Control]) -> bool:
        """A flow's packet came from another place. Nobody without keys can tell whether its client did move:
        the last packet decides, and the next one may decide otherwise."""
        counters = self.counters
        ip = plain_ip(address[0])
        if self.shared.settings.is_strict:
            self._refuse("source_binding", "source_binding", ip, "a packet from another address was dropped")
            return False
        if ip != flow.ip:
            reason = self._census.enter(ip)
            if reason is not None:
                self._refuse(reason, "connection_flood", ip, f"a flow cannot move: {reason}")
                return False
        if not self.table.move(flow, place, source_of(ip)):
            self._census.leave(ip)  # another ip, or its source were the same
            self._refuse("ip_flow_cap", "connection_flood", ip, "a flow cannot move: ip_flow_cap")
            return False
        if ip != flow.ip:
            self._census.leave(flow.ip)
            flow.ip = ip
        flow.address = address
        flow.control = self._front.local.reply(control)
        counters.quic_rebinds += 1
        return True

    # -- what belongs to nobody ------------------------------------------------------------------------

    def _unknown_short(
        self,
        packet: bytes,
        flow: Flow | None,
        place: Place,
        address: Address,
        control: list[Control],
        ecn: int,
    ) -> Flow | None:
        """Nobody's by its connection ID, or with QUIC-LB maybe of another flow than its place says."""
        server_ids = self.shared.settings.server_ids
        if server_ids is not None:
            size = server_ids.cid_bytes(packet[1]) if len(packet) > 1 else 0
            cid = packet[1 : 1 + size]
            backend = self._server_of(cid) if size else None
            if backend is not None:
                return self._routed(flow, backend, cid, place, address, control)
        if flow is None and not self._is_taken(packet, address, control, ecn):
            self._refuse("unknown_connection", "quic_junk", plain_ip(address[0]), "packets of no connection")
        return flow

    def _routed(
        self,
        flow: Flow | None,
        backend: Backend,
        cid: bytes,
        place: Place,
        address: Address,
        control: list[Control],
    ) -> Flow | None:
        """A packet whose connection ID names a backend: the flow of its place, if that goes there, or else
        a new one. Its connection is known to the backend only; here it need not have been seen before."""
        if flow is not None and flow.backend is backend:
            self.table.learn(flow, cid)
            return flow
        if self.shared.settings.is_strict:
            ip = plain_ip(address[0])
            self._refuse("source_binding", "source_binding", ip, "a packet from another address was dropped")
            return None
        flow = self._admit(place, address, control, cid, backend)
        if flow is not None:
            self.table.learn(flow, cid)
        return flow

    def _server_of(self, cid: bytes) -> Backend | None:
        server_ids = self.shared.settings.server_ids
        if server_ids is None:
            return None
        backends = self.shared.pool.backends
        if backends is not self._served:
            self._served = backends
            self._servers = {}
            for backend in backends:
                # A name's addresses share its server id: the first one has it.
                self._servers.setdefault(bytes.fromhex(backend.settings.id), backend)
        id_ = server_ids.read(cid)
        return None if id_ is None else self._servers.get(id_)

    def _unknown_long(
        self, packet: bytes, cid: bytes, place: Place, address: Address, control: list[Control], ecn: int
    ) -> Flow | None:
        header = read_long(packet)
        if header is not None and header.version == 0:
            self.counters.dropped.add("malformed")  # clients are told of versions, and tell nobody of any
            return None
        begins = header is not None and header.type in (INITIAL, UNKNOWN)
        flow = self.table.by_place.get(place)
        if flow is not None and not (begins and MIN_CID_BYTES <= len(cid) <= self.table.longest):
            # The backend's connection ID is empty, or one that is not looked up.
            return flow
        backend = self._server_of(cid)
        if begins and header is not None:
            return self._begin(packet, header, place, address, control, backend)
        if backend is not None:
            return self._routed(flow, backend, cid, place, address, control)
        if not self._is_taken(packet, address, control, ecn):
            reason = "malformed" if header is None else "unknown_connection"
            self._refuse(reason, "quic_junk", plain_ip(address[0]), "packets of no connection")
        return None

    def _is_taken(self, packet: bytes, address: Address, control: list[Control], ecn: int) -> bool:
        sharing = self._sharing
        if sharing is None or self._is_handed:
            return False
        header = read_long(packet)
        worker = sharing.owner(packet[_CID_AT:] if header is None else header.destination)
        if worker is None or worker == sharing.index:
            return False
        sharing.give(worker, packet, len(packet), address, control, ecn)
        return True

    def _begin(
        self,
        packet: bytes,
        header: LongHeader,
        place: Place,
        address: Address,
        control: list[Control],
        backend: Backend | None,
    ) -> Flow | None:
        """A client's first packet, by its look. ``backend``: whom its connection ID names; it may be that of
        a Retry that was the backend's."""
        settings = self.shared.settings
        ip = plain_ip(address[0])
        if len(packet) < MIN_INITIAL_BYTES:
            self._refuse("short_initial", "quic_bad_initial", ip, "a first packet was too short")
            return None
        if header.type == INITIAL and len(header.destination) < settings.min_dcid_bytes:
            self._refuse("short_dcid", "quic_bad_initial", ip, "a first connection ID was too short")
            return None
        if self._is_draining:
            self.counters.rejects.add("draining")
            self.counters.dropped.add("draining")
            return None
        if settings.tokens is not None and header.type == INITIAL:
            token = token_of(packet, header)
            if token is None:
                self._refuse("malformed", "quic_bad_initial", ip, "a first packet was cut short")
                return None
            if not token:
                self._send_retry(header, address, control)
                return None
            verdict = settings.tokens.check(token, address, header.destination)
            if verdict is Verdict.STALE:
                self._refuse("retry_token", "retry_token", ip, "a Retry token of another client or time")
                return None
        if backend is not None and not backend.is_available:
            backend = None
        flow = self._admit(place, address, control, header.destination or repr(place).encode(), backend)
        if flow is not None:
            self.table.choose(flow, header.destination)
            self._firsts.append(flow)
        return flow

    def _send_retry(self, header: LongHeader, address: Address, control: list[Control]) -> None:
        tokens = self.shared.settings.tokens
        if tokens is None:
            return
        source = retry_cid()
        answer = retry(header, source, tokens.mint(address, header.destination, source))
        try:
            taken = self._front.send((answer,), address, self._front.local.reply(control))
        except OSError as error:
            self.counters.dropped.add(reason_of(error))
            return
        if taken:
            self.counters.quic_retries += 1
        else:
            self.counters.dropped.add("client_buffer_full")

    # -- new flows -------------------------------------------------------------------------------------

    def _admit(
        self, place: Place, address: Address, control: list[Control], key: bytes, backend: Backend | None
    ) -> Flow | None:
        """A flow with a socket, or ``None``: then its datagram is counted as dropped."""
        counters = self.counters
        ip = plain_ip(address[0])
        if self._is_draining:
            counters.rejects.add("draining")
            counters.dropped.add("draining")
            return None
        source = source_of(ip)
        reason = self.table.refusal(source) or self._make_room() or self._census.enter(ip)
        if reason is not None:
            counters.rejects.add(reason)
            self._refuse(reason, "connection_flood", ip, f"a flow was refused: {reason}")
            return None
        flow = Flow(self.shared, place, source, ip, address, self._front.local.reply(control), key, backend)
        if not flow.open():
            self._census.leave(ip)
            return None
        counters.connections += 1
        counters.inflight += 1
        self.table.add(flow)
        return flow

    def _make_room(self) -> str | None:
        """Room for one more, or the reason why there is none."""
        if not self.table.is_full:
            return None
        flow = self.table.to_evict(self.reactor.now)
        if flow is None:
            return "flow_cap"
        self.counters.quic_evictions += 1
        self.counters.security.add("flow_eviction")
        flow.end()
        return None

    def _refuse(self, reason: str, kind: str, ip: str, message: str) -> None:
        self.counters.dropped.add(reason)
        self.counters.security.add(kind)
        # The source of a datagram proves nothing: a line for each would be the sender's to choose.
        self.shared.audit.warning(kind, self.counters.name, message, client=ip)

    # -- silence ---------------------------------------------------------------------------------------

    def _await_answer(self, flow: Flow) -> None:
        if flow.backend is not None and not flow.is_pinned:  # of pinned ones nobody knows what they sent
            self._trials.append((self.reactor.now + SILENCE_S, flow, flow.backend))

    def _judge_silence(self, now: float) -> None:
        """A client that came again, and got no answer in ``SILENCE_S``, from a backend that answered nobody
        else meanwhile: the backend is not there, or anybody could have its backends judged by sending what
        no server answers. The flow has another one with the client's next datagram."""
        trials = self._trials
        heard = self.shared.heard
        while trials and trials[0][0] <= now:
            _, flow, backend = trials.popleft()
            if flow.is_answered or flow.backend is not backend or not flow.is_open or flow.sent < 2:
                continue
            if heard.get(backend, 0.0) >= flow.began_at:
                continue
            if now - self._blamed.get(backend, 0.0) >= _BLAME_S:
                self._blamed[backend] = now
                flow.blame(backend, "handshake_silence")
            else:
                flow.avoid(backend)
            flow.leave_backend()
        known = len(self.shared.pool.backends)
        for seen in (heard, self._blamed):
            if len(seen) > 2 * known + 64:
                current = set(self.shared.pool.backends)
                for gone in [each for each in seen if each not in current]:
                    del seen[gone]

    def __repr__(self) -> str:
        return f"<PassthroughListener {self.counters.name} flows={self.open}>"
