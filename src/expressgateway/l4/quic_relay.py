"""One client's QUIC connection and the one to a backend that its streams and datagrams are relayed over.

The backend is dialled when the client's handshake is complete: only then is it known what both have agreed to
speak, and the backend is offered that and nothing else (docs/decisions/0020). What the client sends
meanwhile waits within its windows. A backend that does not complete a handshake is replaced by another one;
if there is none, the client is refused as a server refuses connections.

An application's close travels as it is: code and reason. What the transport says is about one connection and
not about the other, so the other side hears that the way is gone, in its own transport's words. Before either
is passed on, what was taken from the one that closes is sent, for a bounded time.
"""

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from expressgateway.l4.relay_datagrams import DatagramQueue
from expressgateway.l4.relay_streams import BACKEND, CLIENT, Streams
from expressgateway.net.facts import Facts, State
from expressgateway.net.listener import limited
from expressgateway.net.quic.connection import QuicConnection
from expressgateway.net.quic.dial import QuicDialler
from expressgateway.net.quic.events import INTERNAL_ERROR, NO_ERROR, Ended
from expressgateway.net.quic.tls import NO_APPLICATION_PROTOCOL
from expressgateway.net.reactor import Reactor
from expressgateway.observe.counters import ListenerCounters
from expressgateway.proxy.backend_side import MOST_ATTEMPTS
from expressgateway.proxy.errors import reason_of_fault
from expressgateway.upstream.backend import Backend
from expressgateway.upstream.errors import Fault, UpstreamError
from expressgateway.upstream.pool import Pool
from expressgateway.upstream.selection import UNKEYED

CONNECTION_REFUSED: Final = 0x2
LINGER_S: Final = 2.0  # for what was taken from a peer that has closed
_SILENCE: Final = "Idle timeout"  # the engine's word
_NAMES: Final = ("client", "backend")
_GONE: Final = frozenset(
    {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.EACCES}
)


@dataclass(frozen=True, slots=True)
class RelaySettings:
    """What a relay goes by; those under way keep what they began with."""

    diallers: Mapping[str, QuicDialler]
    """By application protocol: all that clients are offered."""
    max_streams: int
    max_datagrams: int
    """Waiting in each direction."""


class RelayHost(Protocol):
    """The listener of a relay."""

    reactor: Reactor
    counters: ListenerCounters
    pool: Pool

    def forget(self, relay: "QuicRelay") -> None:
        """The client's connection is gone."""


class RelaySide:
    """One end of a relay. Implements ``Session``, ``Side`` and ``DatagramSide``."""

    __slots__ = (
        "_relay",
        "active_at",
        "connection",
        "consumed",
        "engine",
        "hold",
        "number",
        "open_stream",
        "queued",
        "reset",
        "send",
        "send_datagram",
        "stop",
        "wake",
    )

    def __init__(self, relay: "QuicRelay", number: int, connection: QuicConnection) -> None:
        self._relay = relay
        self.number = number
        self.connection = connection
        self.engine = engine = connection.engine
        self.active_at = relay.host.reactor.now
        """When there was something to read or to send, in seconds."""
        # The engine's own, without a call between
        self.open_stream = engine.open_stream
        self.send = engine.send
        self.reset = engine.reset
        self.stop = engine.stop
        self.consumed = engine.consumed
        self.hold = engine.hold
        self.queued = engine.queued
        self.send_datagram = engine.send_datagram
        self.wake = connection.wake

    @property
    def is_usable(self) -> bool:
        return self.engine.is_open and self.engine.ended is None

    @property
    def room_bytes(self) -> int:
        return self.engine.room_bytes

    # -- what the engine tells -------------------------------------------------------------------------

    def on_open(self) -> None:
        self.connection.way.opened(self.connection)
        self._relay.on_open(self)

    def on_stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        self._relay.streams.on_data(self.number, stream_id, data, end)

    def on_stream_reset(self, stream_id: int, code: int) -> None:
        self._relay.streams.on_reset(self.number, stream_id, code)

    def on_stream_stop(self, stream_id: int, code: int) -> None:
        self._relay.streams.on_stop(self.number, stream_id, code)

    def on_streams_allowed(self) -> None:
        self._relay.streams.on_allowed()

    def on_datagram(self, data: bytes) -> None:
        self._relay.datagrams[self.number].add(data)

    def on_flushed(self) -> None:
        self._relay.on_flushed(self)

    def on_ended(self, ended: Ended) -> None:
        self.connection.way.ended(self.connection, ended)
        self._relay.on_ended(self, ended)

    def on_over(self) -> None:
        self._relay.on_over(self)

    def end(self, code: int, reason: str, *, is_application: bool = False) -> None:
        """Close, if it is not closed yet."""
        if is_application:
            self.engine.close(code, reason)
        else:
            self.engine.close_transport(code, reason)
        self.connection.wake()

    def __repr__(self) -> str:
        return f"<RelaySide {_NAMES[self.number]} {self.connection!r}>"


class QuicRelay:
    """See the module's text."""

    __slots__ = (
        "_backend",
        "_began",
        "_closing",
        "_due",
        "_ip",
        "_is_over",
        "_is_ready",
        "_pool",
        "_settings",
        "_sides",
        "_started_at",
        "_tried",
        "datagrams",
        "host",
        "streams",
    )

    def __init__(self, host: RelayHost, settings: RelaySettings, ip: str) -> None:
        # Wiring
        self.host = host
        self._settings = settings
        self._ip = ip
        self._sides: list[RelaySide | None] = [None, None]
        self.streams = Streams(settings.max_streams, host.counters)
        self.datagrams = tuple(
            DatagramQueue(origin, settings.max_datagrams, host.counters) for origin in (CLIENT, BACKEND)
        )
        """By the side they come from."""
        # Connection
        self._pool = host.pool
        self._backend: Backend | None = None
        self._tried: list[Backend] = []  # at most the pool
        self._began = host.reactor.now
        self._started_at = 0.0
        self._due = 0.0  # seconds: connected by then
        self._is_ready = False  # both sides are open
        self._closing: tuple[RelaySide, Ended, float] | None = None  # whom to close, how, and when at latest
        self._is_over = False  # both sides are closed

    def facts(self) -> Facts:
        client = self._sides[CLIENT]
        port = client.engine.peer_address[1] if client is not None else 0
        state = State.CLOSING if self._is_over or self._closing else State.ACTIVE
        return Facts("quic", self._ip, port, self._began, None, state if self._is_ready else State.OPENING)

    def meet(self, connection: QuicConnection) -> RelaySide:
        """The client's side."""
        return self._use(CLIENT, connection)

    def _use(self, number: int, connection: QuicConnection) -> RelaySide:
        side = RelaySide(self, number, connection)
        self._sides[number] = side
        self.streams.use(number, side)
        self.datagrams[1 - number].use(side)
        return side

    # -- opening ---------------------------------------------------------------------------------------

    def on_open(self, side: RelaySide) -> None:
        if self._is_over:
            return
        if side.number == CLIENT:
            self._find_backend(side)
        elif side is self._sides[BACKEND]:
            self._on_backend_open(side)

    def _find_backend(self, client: RelaySide) -> None:
        if client.engine.alpn not in self._settings.diallers:
            self._close_all(NO_APPLICATION_PROTOCOL, "no application protocol was agreed on")  # RFC 9001 8.1
            return
        pool = self._pool = self.host.pool
        backend = pool.pick_session(self._key)
        if backend is None:
            self._give_up(UpstreamError(pool.why_none()))
        else:
            self._dial(backend)

    @property
    def _key(self) -> bytes | None:
        """What policies go by that want a key; for the others a second choice must take no turn."""
        pool = self._pool
        if pool.sessions is None and pool.settings.balancing.policy in UNKEYED:
            return None
        return self._ip.encode("ascii")

    def _dial(self, backend: Backend) -> None:
        """Try this backend, and others while that comes to nothing at once."""
        client = self._sides[CLIENT]
        following: Backend | None = backend
        while following is not None and client is not None:
            backend, following = following, None
            dialler = self._settings.diallers[client.engine.alpn]
            now = self.host.reactor.now
            self._backend = backend
            backend.begin()
            backend.opened()
            backend.leases += 1
            self._started_at = now
            self._due = now + dialler.connect_timeout_s
            try:
                dialler.dial(backend, lambda connection: self._use(BACKEND, connection))
            except OSError as error:
                if error.errno not in _GONE:
                    self._leave_backend(0)
                    self._give_up(UpstreamError(Fault.OVER_CAPACITY, error.strerror or ""))
                    return
                refused = error.errno == errno.ECONNREFUSED
                following = self._replace(
                    UpstreamError(Fault.REFUSED if refused else Fault.UNREACHABLE, error.strerror or "")
                )

    def _replace(self, error: UpstreamError) -> Backend | None:
        """The backend did not complete a handshake. Gives the next one; without, the client is refused."""
        backend, pool = self._backend, self._pool
        if backend is None:
            return None
        other = None
        backend.connect_failures += 1
        pool.failed(backend, error.detail)
        self._tried.append(backend)
        limited.warning(
            "relay_backend",
            backend.id,
            f"a backend could not be connected to: {error.detail}",
            listener=self.host.counters.name,
        )
        if len(self._tried) < min(len(pool.backends), MOST_ATTEMPTS):
            other = pool.pick_instead(self._key, self._tried)
        self._leave_backend(0)
        if other is None:
            self._give_up(error)
        else:
            pool.retries.add("connect")
        return other

    def _give_up(self, error: UpstreamError) -> None:
        """There is no backend to be had."""
        counters = self.host.counters
        counters.relay_errors.add(reason_of_fault(error.fault).value)
        limited.warning("relay", counters.name, f"a connection had no backend: {error.detail}")
        self._close_all(CONNECTION_REFUSED, "no backend")

    def _on_backend_open(self, side: RelaySide) -> None:
        client = self._sides[CLIENT]
        if client is None:
            return
        if side.engine.alpn != client.engine.alpn:
            side.end(NO_APPLICATION_PROTOCOL, "no application protocol was agreed on")
            return  # that it ended is told, as of any other handshake that failed
        self._is_ready = True
        backend = self._backend
        if backend is not None:
            backend.succeeded()
            now = self.host.reactor.now
            took_s = now - self._started_at
            backend.connect_durations.observe(took_s)
            if self._pool.measuring is not None:
                self._pool.measuring.observe(backend, took_s, now)
            if self._pool.sessions is not None:
                self._pool.sessions.bind(self._ip.encode("ascii"), backend)
        self.streams.on_allowed()
        self.datagrams[CLIENT].on_room()

    def _leave_backend(self, status_class: int | None) -> None:
        backend, self._backend = self._backend, None
        if backend is not None:
            if status_class is not None:
                backend.responses[status_class] += 1
            backend.closed()
            backend.end()

    # -- relaying --------------------------------------------------------------------------------------

    def on_flushed(self, side: RelaySide) -> None:
        side.active_at = self.host.reactor.now
        self.streams.on_room(side.number)
        self.datagrams[1 - side.number].on_room()
        if self._closing is not None and self._closing[0] is side and not self._is_owed(side):
            self._close_now()

    # -- the end ---------------------------------------------------------------------------------------

    def on_ended(self, side: RelaySide, ended: Ended) -> None:
        """One side is closed: the other is to learn of it, or there is another backend."""
        if self._is_over or side is not self._sides[side.number]:
            return
        if not self._is_ready:
            if side.number == CLIENT:
                self._close_all(NO_ERROR, "the client left")
                return
            other = self._replace(QuicDialler.explain(ended))
            if other is not None:
                self._dial(other)
            return
        if self._closing is not None:
            self._close_now()
            return
        other_side = self._sides[1 - side.number]
        closing = self._in_other_words(side.number, ended)
        if other_side is not None and not ended.is_ours and self._is_owed(other_side):
            self._closing = (other_side, closing, self.host.reactor.now + LINGER_S)
            return
        self._close(closing)

    def _is_owed(self, side: RelaySide) -> bool:
        """Whether something that was taken for this side has not arrived there."""
        return self.streams.has_unsent(1 - side.number) or side.engine.in_flight_bytes > 0

    def _in_other_words(self, number: int, ended: Ended) -> Ended:
        """What the other side is told."""
        if ended.is_application and not ended.is_ours:
            return ended
        name = _NAMES[number]
        if not ended.is_ours and ended.code == NO_ERROR:
            return Ended(NO_ERROR, ended.reason)
        if ended.is_ours and ended.reason == _SILENCE:
            if self.streams.is_empty:
                self.host.counters.relay_errors.add("idle")
                return Ended(NO_ERROR, "idle")
            self.host.counters.relay_errors.add(f"{name}_silent")
            return Ended(INTERNAL_ERROR, f"the {name} fell silent")
        self.host.counters.relay_errors.add(f"{name}_reset")
        limited.warning(
            f"relay_{name}", self.host.counters.name, f"the connection to a {name} was lost: {ended}"
        )
        return Ended(INTERNAL_ERROR, f"the connection to the {name} was lost")

    def _close_now(self) -> None:
        closing, self._closing = self._closing, None
        if closing is not None:
            self._close(closing[1])

    def _close(self, ended: Ended) -> None:
        """Close whatever is open. Idempotent."""
        if self._is_over:
            return
        self._is_over = True
        self._closing = None
        for side in self._sides:
            if side is not None:
                side.end(ended.code, ended.reason, is_application=ended.is_application)
        self._leave_backend(2 if self._is_ready else None)
        self.streams.close()
        for queue in self.datagrams:
            queue.close()

    def _close_all(self, code: int, reason: str) -> None:
        self._close(Ended(code, reason, is_ours=True))

    def on_over(self, side: RelaySide) -> None:
        """A connection is gone and forgotten."""
        if side is not self._sides[side.number]:
            return
        if not self._is_over:
            # Without a word before: a handshake that took too long, or a defect.
            self._close_all(INTERNAL_ERROR, f"the connection to the {_NAMES[side.number]} was lost")
        if side.number == CLIENT:
            self.host.forget(self)

    # -- the listener's calls --------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        if self._closing is not None:
            if now >= self._closing[2]:
                self._close_now()
            return
        if self._is_over:
            return
        client, side = self._sides
        if self._is_ready:
            if client is not None and side is not None:
                self._keep_alive(client, side, now)
        elif self._backend is not None and now >= self._due and side is not None:
            self._sides[BACKEND] = None  # what it still says is not heard
            side.connection.forget()
            other = self._replace(UpstreamError(Fault.CONNECT_TIMEOUT))
            if other is not None:
                self._dial(other)

    def _keep_alive(self, client: RelaySide, side: RelaySide, now: float) -> None:
        """A client that keeps its connection alive keeps the backend's: its PINGs end here."""
        half_s = side.engine.idle_timeout_s / 2
        if now - side.active_at >= half_s and now - client.active_at < half_s:
            side.engine.ping()
            side.wake()

    def go_away(self) -> None:
        """End both sides now."""
        self._close_all(NO_ERROR, "going away")

    def reset(self) -> None:
        """The safety net's call."""
        self._close_all(INTERNAL_ERROR, "")

    def __repr__(self) -> str:
        return f"<QuicRelay {self._ip} client={self._sides[CLIENT]!r} backend={self._sides[BACKEND]!r}>"
