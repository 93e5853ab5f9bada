"""Listeners ``tcp`` and ``tls``: a relay of bytes both ways.

Each direction is bounded by the other stream's backlog; FIN is passed on as FIN, a reset as a reset. The
client is not read from before there is a backend. A backend that cannot be reached is replaced by another
one before the client hears of it.
"""

import socket
from typing import Final

from expressgateway.l4.splice import Splice, can_splice
from expressgateway.net.dial import Dialler
from expressgateway.net.facts import Facts, State
from expressgateway.net.listener import Caller, Census, Connection, Door, Listener, limited
from expressgateway.net.reactor import Reactor
from expressgateway.net.stream import READ_BYTES, Stream
from expressgateway.net.tls import ServerTls
from expressgateway.net.tls_stream import TlsStream
from expressgateway.observe.counters import ListenerCounters
from expressgateway.proxy.backend_side import MOST_ATTEMPTS
from expressgateway.proxy.errors import Reason, reason_of_fault
from expressgateway.upstream.backend import Addresses, Backend
from expressgateway.upstream.errors import Fault, UpstreamError
from expressgateway.upstream.pool import Pool

IDLE_S: Final = 600.0  # without a byte in either direction
FROM_CLIENT: Final = 0
FROM_BACKEND: Final = 1


class TcpListener(Listener):
    """``pool`` may be swapped at any time; connections keep the backend they have."""

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        door: Door,
        census: Census,
        counters: ListenerCounters,
        pool: Pool,
        dialler: Dialler,
        tls: ServerTls | None,
    ) -> None:
        super().__init__(reactor, sock, door, census, counters)
        self.pool = pool
        self.max_attempts = 0
        """Backends tried for one connection; 0: as many as there are, up to ``MOST_ATTEMPTS``."""
        self.dialler = dialler
        self.tls = tls

    def attempts_in(self, pool: Pool) -> int:
        return self.max_attempts or min(len(pool.backends), MOST_ATTEMPTS)

    def admit(self, sock: socket.socket, caller: Caller) -> Connection:
        return Relay(self, sock, caller)


class _Side:
    """One end of a relay: the owner of its stream."""

    __slots__ = ("_relay", "direction", "is_eof", "other", "stream")

    def __init__(self, relay: "Relay", direction: int) -> None:
        self._relay = relay
        self.direction = direction
        self.stream: Stream | None = None
        self.other: _Side = self
        self.is_eof = False

    def on_open(self) -> None:
        if self.direction == FROM_CLIENT:
            self._relay.on_client_open()
        else:
            self._relay.on_backend_open()

    def on_bytes(self, data: bytes) -> None:
        stream = self.other.stream
        if stream is not None:
            self._relay.moved(self.direction, len(data))
            stream.write([data])
            if len(data) >= READ_BYTES:
                self._relay.on_bulk(self)

    def on_eof(self) -> None:
        self.is_eof = True
        if self.other.stream is not None:
            self.other.stream.write_eof()
        self._relay.on_eof()

    def on_closed(self, error: str) -> None:
        self._relay.on_closed(self, error)

    def on_released(self) -> None:
        self._relay.on_released(self)

    def on_congested(self) -> None:
        if self.other.stream is not None:
            self.other.stream.pause()

    def on_drained(self) -> None:
        if self.other.stream is not None:
            self.other.stream.resume()
        self._relay.on_drained()


class Relay:
    """One client connection and its backend connection."""

    __slots__ = (
        "_backend",
        "_began",
        "_caller",
        "_client",
        "_dialled_at",
        "_due",
        "_is_over",
        "_is_queued",
        "_is_ready",
        "_listener",
        "_moved_at",
        "_pool",
        "_splices",
        "_upstream",
        "key",
        "tried",
    )

    def __init__(self, listener: TcpListener, sock: socket.socket, caller: Caller) -> None:
        # Wiring
        self._listener = listener
        self._caller = caller
        self._client = _Side(self, FROM_CLIENT)
        self._upstream = _Side(self, FROM_BACKEND)
        self._client.other = self._upstream
        self._upstream.other = self._client
        if listener.tls is None:
            self._client.stream = Stream(listener.reactor, sock, self._client)
        else:
            stream = TlsStream(listener.reactor, sock, self._client, listener.tls.context)
            stream.is_ragged_eof_allowed = True
            self._client.stream = stream
        # Connection
        now = self._began = listener.reactor.now
        self._backend: Backend | None = None
        self._pool = listener.pool
        self.key: bytes | None = caller.ip.encode("ascii")
        """What policies go by that want a key."""
        self.tried: list[Backend] = []
        self._is_queued = False  # for room in the pool
        self._is_ready = False  # both sides are open
        self._is_over = False
        self._due = now + listener.door.handshake_timeout_s  # seconds: TLS is done, then connected, by then
        self._dialled_at = 0.0
        self._moved_at = now
        self._splices: dict[int, Splice] = {}  # by direction

    def begin(self) -> None:
        if self._client.stream is not None:
            self._client.stream.start()

    @property
    def addresses(self) -> Addresses:
        return (self._caller.ip, self._caller.port), self._caller.local

    def facts(self) -> Facts:
        state = State.CLOSING if self._is_over else State.ACTIVE if self._is_ready else State.OPENING
        protocol = "tcp" if self._listener.tls is None else "tls"
        return Facts(protocol, self._caller.ip, self._caller.port, self._began, None, state)

    # -- opening ---------------------------------------------------------------------------------------

    def on_client_open(self) -> None:
        stream = self._client.stream
        if stream is None:
            return
        if isinstance(stream, TlsStream) and stream.tls is not None:
            self._listener.counters.handshake(
                stream.tls.version() or "", bool(stream.tls.session_reused), "ok"
            )
        stream.pause()
        pool = self._pool = self._listener.pool
        backend = pool.pick_session(self.key)
        if backend is not None:
            self.on_turn(backend)
            return
        fault = pool.why_none()
        if fault is Fault.SATURATED and pool.wait(self):
            self._is_queued = True
            return
        self._give_up(UpstreamError(fault))

    def _give_up(self, error: UpstreamError) -> None:
        """There is no backend to be had: the client is closed."""
        listener = self._listener
        listener.counters.relay_errors.add(reason_of_fault(error.fault).value)
        limited.warning("relay", listener.counters.name, f"a connection had no backend: {error.detail}")
        self.reset()

    def on_turn(self, backend: Backend) -> None:
        """Dial this backend."""
        self._is_queued = False
        listener = self._listener
        self._backend = backend
        backend.begin()
        backend.opened()
        backend.leases += 1
        self._dialled_at = listener.reactor.now
        self._due = self._dialled_at + listener.dialler.connect_timeout_s
        try:
            self._upstream.stream = listener.dialler.dial(backend, self._upstream, self.addresses)
        except OSError as failure:
            self._leave_backend()
            self._give_up(UpstreamError(Fault.OVER_CAPACITY, failure.strerror or ""))
            return
        stream = self._upstream.stream
        if isinstance(stream, TlsStream):
            stream.is_ragged_eof_allowed = True

    def on_turn_lost(self) -> None:
        self._is_queued = False
        self._listener.counters.relay_errors.add(Reason.QUEUE_TIMEOUT.value)
        self.reset()

    def _backend_failed(self, error: UpstreamError) -> None:
        """Dial the next one; with none left the client is closed."""
        pool = self._pool
        other = None
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.closed()
            backend.connect_failures += 1
            backend.responses[0] += 1
            pool.failed(backend, error.detail)
            self.tried.append(backend)
            try:
                if len(self.tried) < self._listener.attempts_in(pool):
                    other = pool.pick_instead(self.key, self.tried)
            finally:
                backend.end()
        if other is None:
            self._give_up(error)
            return
        pool.retries.add("connect")
        self.on_turn(other)

    def on_backend_open(self) -> None:
        self._is_ready = True
        backend = self._backend
        if backend is not None:
            backend.succeeded()
            now = self._listener.reactor.now
            took_s = now - self._dialled_at
            backend.connect_durations.observe(took_s)
            if self._pool.measuring is not None:
                self._pool.measuring.observe(backend, took_s, now)
            if self._pool.sessions is not None and self.key is not None:
                self._pool.sessions.bind(self.key, backend)
        self._moved_at = self._listener.reactor.now
        if self._client.stream is not None:
            self._client.stream.resume()

    # -- relaying --------------------------------------------------------------------------------------

    def moved(self, direction: int, size: int) -> None:
        self._listener.counters.relayed[direction] += size
        self._moved_at = self._listener.reactor.now

    def on_bulk(self, side: _Side) -> None:
        """fast path: a direction that moves bulk is handed to the kernel."""
        source, target = side.stream, side.other.stream
        if source is None or target is None or side.is_eof or not can_splice(source, target):
            return
        splice = Splice.begin(source, target, lambda size: self.moved(side.direction, size))
        if splice is not None:
            self._splices[side.direction] = splice  # the one before has closed itself

    def on_drained(self) -> None:
        self._moved_at = self._listener.reactor.now

    def on_eof(self) -> None:
        if self._client.is_eof and self._upstream.is_eof:
            self._end()

    def _end(self) -> None:
        """Both directions are complete: send what is left, and close."""
        self._is_over = True
        for side in (self._client, self._upstream):
            if side.stream is not None:
                side.stream.close()

    def on_closed(self, side: _Side, error: str) -> None:
        """One side failed: the other learns it as a reset, or gets another backend."""
        if self._is_over:
            return
        if side is self._upstream and not self._is_ready:
            stream = side.stream
            if stream is not None:
                self._backend_failed(self._listener.dialler.explain(stream, error))
            return
        if (
            not self._is_ready
            and isinstance(side.stream, TlsStream)
            and self._backend is None
            and not self._is_queued
        ):
            self._listener.counters.handshake("", False, "failed")
            limited.warning("tls_failed", self._caller.ip, f"TLS handshake failed: {error}")
        elif self._is_ready:
            name = "client_reset" if side is self._client else "backend_reset"
            self._listener.counters.relay_errors.add(name)
        self.reset()

    def on_released(self, side: _Side) -> None:
        if side is self._upstream and (self._is_ready or self._is_over):
            backend = self._leave_backend()
            if backend is not None and self._is_ready:
                backend.responses[2] += 1
            if self._client.stream is not None and self._client.stream.is_closed:
                self._listener.forget(self)
        elif side is self._client:
            for splice in self._splices.values():
                splice.close()
            if self._backend is None:  # else it still has to take what is left, and the sweep watches over it
                self._listener.forget(self)

    def _leave_backend(self) -> Backend | None:
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.closed()
            backend.end()
        return backend

    def reset(self) -> None:
        """End both sides at once."""
        self._is_over = True
        if self._is_queued:
            self._is_queued = False
            self._pool.queue.leave(self)
        for side in (self._upstream, self._client):
            if side.stream is not None:
                side.stream.reset()
        self._leave_backend()

    # -- the listener's calls --------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        client = self._client.stream
        if client is None:
            return
        if self._is_over:  # what is left to be sent has its own clock
            for side in (self._client, self._upstream):
                if side.stream is not None:
                    side.stream.sweep(now)
            return
        if not self._is_ready:
            if now < self._due or self._is_queued:
                return
            if self._backend is None:
                self._listener.counters.handshake("", False, "timeout")
                self._listener.counters.security.add("slow_handshake")
                self.reset()
            elif self._upstream.stream is not None:
                stream, self._upstream.stream = self._upstream.stream, None
                stream.reset()
                self._backend_failed(UpstreamError(Fault.CONNECT_TIMEOUT))
        elif now - self._moved_at > IDLE_S:
            self._listener.counters.relay_errors.add("idle")
            self.reset()

    def drain(self) -> None:
        """A relay knows no message to wait for: it goes on until the drain's time is up."""

    def go_away(self) -> None:
        self.reset()

    def __repr__(self) -> str:
        return f"<Relay {self._caller.ip} client={self._client.stream!r} backend={self._upstream.stream!r}>"
