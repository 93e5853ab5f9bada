"""Listeners ``tcp`` and ``tls``: a relay of bytes both ways.

Each direction is bounded by the other stream's backlog; FIN is passed on as FIN, a reset as a reset. The
client is not read from before there is a backend. A backend that cannot be reached is replaced by another
one before the client hears of it.
"""

import socket
from typing import Final

from expressgateway.l4.splice import Splice, can_splice
from expressgateway.net.dial import Dialler
from expressgateway.net.listener import Caller, Census, Connection, Door, Listener, limited
from expressgateway.net.reactor import Reactor
from expressgateway.net.stream import READ_BYTES, Stream
from expressgateway.net.tls import ServerTls
from expressgateway.net.tls_stream import TlsStream
from expressgateway.observe.counters import ListenerCounters
from expressgateway.proxy.errors import reason_of_fault
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
        self.dialler = dialler
        self.tls = tls

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
        "_caller",
        "_client",
        "_due",
        "_is_over",
        "_is_ready",
        "_listener",
        "_moved_at",
        "_splices",
        "_tried",
        "_upstream",
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
        now = listener.reactor.now
        self._backend: Backend | None = None
        self._tried: list[Backend] = []
        self._is_ready = False  # both sides are open
        self._is_over = False
        self._due = now + listener.door.handshake_timeout_s  # seconds: TLS is done, then connected, by then
        self._moved_at = now
        self._splices: dict[int, Splice] = {}  # by direction

    def begin(self) -> None:
        if self._client.stream is not None:
            self._client.stream.start()

    @property
    def addresses(self) -> Addresses:
        return (self._caller.ip, self._caller.port), self._caller.local

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
        self._choose(UpstreamError(self._listener.pool.empty_fault))

    def _choose(self, error: UpstreamError) -> None:
        """Dial the next backend; with none left the client is closed, for the last ``error``."""
        listener = self._listener
        backend = listener.pool.pick(None, self._tried)
        if backend is None:
            listener.counters.relay_errors.add(reason_of_fault(error.fault).value)
            limited.warning("relay", listener.counters.name, f"a connection had no backend: {error.detail}")
            self.reset()
            return
        self._backend = backend
        backend.in_flight += 1
        backend.leases += 1
        self._due = listener.reactor.now + listener.dialler.connect_timeout_s
        try:
            self._upstream.stream = listener.dialler.dial(backend, self._upstream, self.addresses)
        except OSError as failure:
            self._backend_failed(UpstreamError(Fault.OVER_CAPACITY, failure.strerror or ""))
            return
        stream = self._upstream.stream
        if isinstance(stream, TlsStream):
            stream.is_ragged_eof_allowed = True

    def _backend_failed(self, error: UpstreamError) -> None:
        backend = self._leave_backend()
        if backend is not None:
            backend.connect_failures += 1
            backend.responses[0] += 1
            self._tried.append(backend)
        self._choose(error)

    def on_backend_open(self) -> None:
        self._is_ready = True
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
        if not self._is_ready and isinstance(side.stream, TlsStream) and self._backend is None:
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
        elif side is self._client:
            for splice in self._splices.values():
                splice.close()
            self._listener.forget(self)

    def _leave_backend(self) -> Backend | None:
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.in_flight -= 1
        return backend

    def reset(self) -> None:
        """End both sides at once."""
        self._is_over = True
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
            if now < self._due:
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
