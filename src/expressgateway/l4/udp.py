"""Listener ``udp``: a relay of datagrams, each as long as it came, empty ones too.

A *flow* is what one client address exchanges with one backend (on a wildcard bind: from one of our
addresses). It owns a socket connected to the backend, so the kernel sorts the answers and passes ICMP errors
on; answers leave by the listener's own socket, from the address the client had used.

UDP may lose datagrams, and so may we; nothing is queued here. What a socket's buffer does not take is dropped
and counted. A flow ends when no datagram has come either way for ``IDLE_S``. A backend that ICMP says is gone
loses the flow, and so does one that health says is down: the next datagram goes to another one. One that a
reload took away, or that is draining or has the weight 0,
keeps the flows it has until they are idle, and gets no new ones.

Each flow needs a descriptor and a local port of the machine (``net.ipv4.ip_local_port_range``): when either
runs out, new flows are dropped and counted, and the ones that exist go on.
"""

import errno
import logging
import socket
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from expressgateway.net.datagram import (
    MAX_DATAGRAM_BYTES,
    Control,
    LocalAddress,
    has_come,
    reason_of,
    stand_in,
)
from expressgateway.net.facts import Facts, State, Told
from expressgateway.net.listener import Census, limited, plain_ip
from expressgateway.net.reactor import IN, Reactor
from expressgateway.observe.counters import ListenerCounters
from expressgateway.proxy.errors import reason_of_fault
from expressgateway.upstream.backend import Backend
from expressgateway.upstream.errors import Fault
from expressgateway.upstream.pool import Pool

log = logging.getLogger(__name__)

IDLE_S: Final = 60.0  # without a datagram in either direction
FROM_CLIENT: Final = 0
FROM_BACKEND: Final = 1
RECEIVE_BUFFER_BYTES: Final = 4 * 2**20  # of the listener's socket, which all clients share; kernel memory

_GRAIN_S: Final = 1.0  # how exactly a flow's last datagram is remembered
_LAST_READS: Final = 256  # of so many datagrams each
_RECEIVES: Final = 64  # datagrams per event: other sockets want their turn, too
_REAPS: Final = 4096  # flows closed per sweep: some 50 ms; the rest is closed by the next
_ROUNDS: Final = 3  # backends tried for one datagram

# What says that a backend is not there, by ICMP or by the routing table.
_GONE: Final = frozenset(
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

Address = tuple[str, int] | tuple[str, int, int, int]
Key = Address | tuple[Address, bytes]


class UdpListener:
    """One datagram socket of one worker. ``pool`` may be swapped at any time; flows keep their backends."""

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        census: Census,
        counters: ListenerCounters,
        pool: Pool,
    ) -> None:
        """``sock``: bound, non-blocking. It is the listener's from here on."""
        self.reactor = reactor
        self.counters = counters
        self.pool = pool
        self._sock = sock
        self._census = census
        self._local = LocalAddress(sock)
        # Quietest first, to the grain. As many as the census lets in.
        self._flows: OrderedDict[Key, Flow] = OrderedDict()
        self._is_reading = False
        self._is_draining = False  # no new flows
        self._is_stopped = False  # the socket closes after the last flow
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)  # cut to net.core.rmem_max

    # -- life ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to relay."""
        self._is_reading = True
        self.reactor.add(self._sock.fileno(), IN, self._on_ready)

    def stop(self, *, hands_over: bool = False) -> None:
        """Take what is in the queue already, then no new flow. The socket stays open while there are
        flows: they go on in both directions. Idempotent.

        ``hands_over``: another worker reads the socket from now on, and begins flows of its own for what
        comes; this one's go on towards the clients."""
        if self._is_stopped:
            return
        if hands_over:
            self._stop_reading()
        elif self._is_reading:
            self._on_ready(0)
        self._is_draining = True
        self._is_stopped = True
        if not self._flows:
            self._close()

    def leave_group(self, other: socket.socket) -> None:
        """Take what is in the queue, then read no more, and send through ``other``: it is bound to the same
        address, and another worker reads it. Clients' datagrams begin flows there; backends' answers to this
        one's flows still leave."""
        if not self._is_reading:
            return
        for _ in range(_LAST_READS):
            if not has_come(self._sock):
                break
            self._on_ready(0)
        self._stop_reading()
        stand_in(self._sock, other)

    def drain(self, jitter_s: float = 0.0) -> None:
        """No new flows, whatever the jitter. No datagram tells whether another follows: flows go on."""
        self._is_draining = True

    def go_away(self) -> int:
        """End what is left now; gives how many flows that were."""
        left = list(self._flows.values())
        for flow in left:
            flow.end()
        return len(left)

    def sweep(self, now: float) -> None:
        """End flows that are idle. Looks at those and at no others."""
        idle: list[Flow] = []
        for flow in self._flows.values():
            if now - flow.seen_at < IDLE_S + _GRAIN_S or len(idle) == _REAPS:
                break
            idle.append(flow)
        for flow in idle:
            try:
                flow.end()
            except Exception:
                self.reactor.faults += 1
                log.exception("ending an idle flow failed: this is a defect")

    @property
    def open(self) -> int:
        return len(self._flows)

    def told(self) -> Iterable[Told]:
        return self._flows.values()

    def _stop_reading(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self.reactor.remove(self._sock.fileno())

    def _close(self) -> None:
        self._stop_reading()
        self._sock.close()

    # -- from clients ----------------------------------------------------------------------------------

    def _on_ready(self, events: int) -> None:
        receive = self._sock.recvmsg
        control_bytes = self._local.control_bytes
        identity = self._local.identity
        flows = self._flows
        now = self.reactor.now
        for _ in range(_RECEIVES):
            try:
                data, control, _flags, address = receive(MAX_DATAGRAM_BYTES, control_bytes)
            except BlockingIOError:
                return
            except OSError as error:
                self.counters.accept_errors.add(errno.errorcode.get(error.errno or 0, "other"))
                return
            key: Key = (address, control[0][2][identity]) if control else address
            flow = flows.get(key)
            if flow is None:
                flow = self._admit(key, address, control)
                if flow is None:
                    continue
            elif now - flow.seen_at >= _GRAIN_S:
                flow.seen_at = now
                flows.move_to_end(key)
            flow.send(data)

    def _admit(self, key: Key, address: Address, control: list[Control]) -> "Flow | None":
        """A flow with a socket, or ``None``: then its datagram is counted as dropped."""
        counters = self.counters
        ip = plain_ip(address[0])
        reason = "draining" if self._is_draining else self._census.enter(ip)
        if reason is not None:
            counters.rejects.add(reason)
            counters.dropped.add(reason)
            if reason != "draining":
                counters.security.add("connection_flood")
                # The source of a datagram proves nothing: a line for each would be the sender's to choose.
                limited.warning("connection_flood", counters.name, f"a flow was refused: {reason}", client=ip)
            return None
        flow = Flow(self, key, ip, address, self._local.reply(control))
        if not flow.open():
            self._census.leave(ip)
            return None
        counters.connections += 1
        counters.inflight += 1
        self._flows[key] = flow
        return flow

    # -- to clients ------------------------------------------------------------------------------------

    def reply(self, flow: "Flow", data: bytes) -> None:
        """Send a backend's datagram on. Never raises ``OSError``."""
        counters = self.counters
        try:
            if flow.control:
                self._sock.sendmsg((data,), flow.control, 0, flow.address)
            else:
                self._sock.sendto(data, flow.address)
        except BlockingIOError:
            counters.dropped.add("client_buffer_full")
        except OSError as error:
            counters.dropped.add(reason_of(error))
        else:
            counters.datagrams[FROM_BACKEND] += 1
            counters.relayed[FROM_BACKEND] += len(data)

    def touch(self, flow: "Flow") -> None:
        """A datagram came, the first in a while."""
        flow.seen_at = self.reactor.now
        self._flows.move_to_end(flow.key)

    def forget(self, flow: "Flow") -> None:
        """The flow's descriptor is closed."""
        if self._flows.pop(flow.key, None) is None:
            return
        self.counters.inflight -= 1
        self._census.leave(flow.ip)
        if self._is_stopped and not self._flows:
            self._close()

    def __repr__(self) -> str:
        return f"<UdpListener {self.counters.name} flows={len(self._flows)}>"


class Flow:
    """One client address and, most of the time, a backend."""

    __slots__ = (
        "_backend",
        "_began",
        "_is_answered",
        "_listener",
        "_sock",
        "_tried",
        "address",
        "control",
        "ip",
        "key",
        "seen_at",
    )

    def __init__(
        self, listener: UdpListener, key: Key, ip: str, address: Address, control: list[Control]
    ) -> None:
        # Wiring
        self._listener = listener
        self.key = key
        self.ip = ip
        self.address = address
        self.control = control
        """What makes replies come from the address that the client sent to."""
        # Connection
        self.seen_at = self._began = listener.reactor.now
        """When there was a datagram, in seconds; up to ``_GRAIN_S`` too early."""
        self._sock: socket.socket | None = None
        self._backend: Backend | None = None
        self._is_answered = False  # by this backend
        self._tried: list[Backend] = []  # gone since one of them answered last; at most the pool

    def facts(self) -> Facts:
        state = State.ACTIVE if self._is_answered else State.OPENING
        return Facts("udp", self.ip, self.address[1], self._began, None, state)

    # -- the backend -----------------------------------------------------------------------------------

    def open(self) -> bool:
        """Choose a backend and connect to it. If there is none to be had, a datagram is counted dropped."""
        listener = self._listener
        counters = listener.counters
        pool = listener.pool
        client = self.ip.encode("ascii")
        for attempt in range(_ROUNDS):
            backend = pool.pick_session(client, self._tried)
            if backend is None and attempt == 0 and self._tried:
                # Every backend was gone at some time: begin again, one may have come back.
                self._tried.clear()
                backend = pool.pick(client)
            if backend is None:
                break
            try:
                sock = self._connect(backend)
            except OSError as error:
                if error.errno in _GONE:
                    self._count_gone(backend, error)
                    continue
                # It is us who have no descriptor, port or memory left: no other backend would help.
                kind = errno.errorcode.get(error.errno or 0, "other")
                counters.accept_errors.add(kind)
                counters.dropped.add("no_socket")
                limited.warning(
                    f"flow_{kind}",
                    counters.name,
                    f"no socket for a flow: {kind}; raise the limit of open files, "
                    "or widen net.ipv4.ip_local_port_range",
                )
                return False
            self._sock = sock
            self._backend = backend
            self._is_answered = False
            backend.begin()
            backend.opened()
            backend.leases += 1
            return True
        if not self._tried:
            counters.relay_errors.add(reason_of_fault(pool.why_none()).value)
            limited.warning("relay", counters.name, "a flow had no backend")
        counters.dropped.add("no_backend")
        return False

    def _connect(self, backend: Backend) -> socket.socket:
        address = backend.address
        sock = socket.socket(
            socket.AF_INET6 if len(address) == 4 else socket.AF_INET,
            socket.SOCK_DGRAM | socket.SOCK_NONBLOCK,
        )
        try:
            sock.connect(address)
            self._listener.reactor.add(sock.fileno(), IN, self._on_ready)
        except OSError:
            sock.close()
            raise
        return sock

    def _count_gone(self, backend: Backend, error: OSError) -> None:
        refused = error.errno == errno.ECONNREFUSED
        reason = reason_of_fault(Fault.REFUSED if refused else Fault.UNREACHABLE).value
        backend.connect_failures += 1
        self._listener.pool.failed(backend, reason.replace("_", " "))
        self._tried.append(backend)
        counters = self._listener.counters
        counters.relay_errors.add(reason)
        limited.warning(
            "backend_gone",
            backend.id,
            "a backend is gone: its flows go elsewhere",
            listener=counters.name,
            cause=reason,
        )

    def _lose_backend(self, error: OSError) -> None:
        """The flow stays, and has no backend until the next datagram."""
        backend = self._backend
        if backend is not None:
            self._count_gone(backend, error)
        self._leave_backend()

    def _leave_backend(self) -> None:
        sock, self._sock = self._sock, None
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.closed()
            backend.end()
            backend.responses[2 if self._is_answered else 0] += 1
        if sock is not None:
            self._listener.reactor.remove(sock.fileno())
            sock.close()

    # -- relaying --------------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """A datagram of the client. Never raises ``OSError``."""
        counters = self._listener.counters
        if self._backend is not None and self._backend.is_down:
            self._leave_backend()
        for _ in range(_ROUNDS):
            if self._sock is None and not self.open():
                return
            sock = self._sock
            if sock is None:
                return
            try:
                sock.send(data)
            except BlockingIOError:
                counters.dropped.add("backend_buffer_full")
                return
            except OSError as error:
                if error.errno not in _GONE:
                    counters.dropped.add(reason_of(error))
                    return
                # It is an earlier datagram that was refused; this one has not been sent yet.
                self._lose_backend(error)
            else:
                counters.datagrams[FROM_CLIENT] += 1
                counters.relayed[FROM_CLIENT] += len(data)
                return
        counters.dropped.add("no_backend")

    def _on_ready(self, events: int) -> None:
        sock = self._sock
        if sock is None:
            return
        listener = self._listener
        if listener.reactor.now - self.seen_at >= _GRAIN_S:
            listener.touch(self)
        receive = sock.recv
        for _ in range(_RECEIVES):
            try:
                data = receive(MAX_DATAGRAM_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _GONE:
                    self._lose_backend(error)
                    return
                listener.counters.dropped.add(reason_of(error))  # the network's word on an earlier one
                continue
            if not self._is_answered:
                self._is_answered = True
                self._tried.clear()
                self._note_answer()
            listener.reply(self, data)

    def _note_answer(self) -> None:
        """The backend is there."""
        backend = self._backend
        if backend is not None:
            backend.succeeded()
            sessions = self._listener.pool.sessions
            if sessions is not None:
                sessions.bind(self.ip.encode("ascii"), backend)

    # -- the end ---------------------------------------------------------------------------------------

    def end(self) -> None:
        """Close and be forgotten. Idempotent."""
        self._leave_backend()
        self._listener.forget(self)

    reset = end

    def __repr__(self) -> str:
        return f"<Flow {self.ip} to {self._backend!r}>"
