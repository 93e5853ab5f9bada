"""A client's connection with many exchanges, whatever version of HTTP is spoken on it: what its shells share.

It ends in two steps: the client is told that it is to leave, and a moment later which requests are still
served, so nothing that was on its way is lost (RFC 9113 6.8, RFC 9114 5.2). A stream whose client takes
nothing of it is reset, also when its exchange is long complete.
"""

from collections.abc import Iterable
from typing import Final, Generic, Protocol, TypeVar

from expressgateway.net.facts import Facts, State, of_peer
from expressgateway.net.reactor import Reactor
from expressgateway.proxy.errors import SECURITY_KINDS, Reason, reason_of_client
from expressgateway.proxy.exchange import Exchange
from expressgateway.proxy.forwarding import Peer
from expressgateway.proxy.service import HttpService
from expressgateway.proxy.traced import open_exchange
from expressgateway.wire.errors import WireError
from expressgateway.wire.head import RequestHead
from expressgateway.wire.sinks import ServerStream

NOTICE_S: Final = 1.0  # between the two steps: more than a round trip, nearly always


class FrontStream(Protocol):
    """One of the codec's."""

    def unsent(self) -> int:
        """Bytes that were given to it and have not left."""


S = TypeVar("S", bound=FrontStream)


class FrontListener(Protocol):
    """What the connection is of."""

    @property
    def reactor(self) -> Reactor: ...
    @property
    def service(self) -> HttpService: ...


class SharedFront(Generic[S]):
    """``S`` is the codec's own kind of stream. The version's own class says what its codec is asked."""

    __slots__ = ("_exchanges", "_idle_since", "_leaving_at", "_listener", "_opened", "_stalled", "peer")

    label: str
    """Of the version, for logs."""

    def __init__(self, listener: FrontListener, peer: Peer) -> None:
        # Wiring
        self._listener = listener
        self.peer = peer
        # Connection
        self._exchanges: dict[S, Exchange] = {}  # as many as the codec has streams
        self._opened = 0
        self._idle_since = listener.reactor.now  # seconds, as all times here
        self._leaving_at = 0.0  # when the second step is due; 0: it is not leaving
        self._stalled: dict[S, tuple[int, float]] = {}  # bytes at the last sweep, and since when

    # -- the version's own -----------------------------------------------------------------------------

    def say_goaway_soon(self) -> None:
        """The first step."""
        raise NotImplementedError

    def say_goaway(self) -> None:
        """The second one."""
        raise NotImplementedError

    def cancel(self, stream: S) -> None:
        """Reset a stream whose client does not take it."""
        raise NotImplementedError

    # -- the codec's shell -----------------------------------------------------------------------------

    def open_exchange(self, stream: ServerStream) -> Exchange:
        service = self._listener.service
        exchange = open_exchange(service, stream, self.peer)
        self._exchanges[stream] = exchange  # type: ignore[index]  # the codec's streams are of its own kind
        self._opened += 1
        if self._opened == service.max_requests:
            self._leave()
        return exchange

    def refuse(self, stream: ServerStream, error: WireError, head: RequestHead | None) -> None:
        open_exchange(self._listener.service, stream, self.peer).refuse(error, head)

    def stream_done(self, stream: S) -> None:
        self._exchanges.pop(stream, None)
        if not self._exchanges:
            self._idle_since = self._listener.reactor.now

    def security_event(self, kind: str, detail: str) -> None:
        self._listener.service.security_event(kind, self.peer, f"{self.label}: {detail}")

    def rejected(self, error: WireError) -> None:
        """A malformed request was reset: no exchange tells of it."""
        reason = reason_of_client(error)
        self._listener.service.counters.errors.add(reason.value)
        kind = SECURITY_KINDS.get(reason)
        if kind is not None:
            self.security_event(kind, error.detail)

    # -- ending ----------------------------------------------------------------------------------------

    def _leave(self) -> None:
        if not self._leaving_at:
            self._leaving_at = self._listener.reactor.now + NOTICE_S
            self.say_goaway_soon()

    def drain(self) -> None:
        """Tell the client to leave; what it has begun is served."""
        self._leave()
        for exchange in list(self._exchanges.values()):
            exchange.leave()

    def sweep_exchanges(self, now: float) -> None:
        for exchange in list(self._exchanges.values()):
            exchange.sweep(now)

    def sweep_leaving(self, now: float) -> None:
        """Take the second step when it is due, and the first when nothing was asked for long."""
        if self._leaving_at and now >= self._leaving_at:
            self.say_goaway()
        elif not self._exchanges and now - self._idle_since > self._listener.service.timeouts.idle:
            self._leave()

    def sweep_stalled(self, streams: Iterable[S], now: float) -> None:
        """Find streams whose exchange is complete while the client takes nothing of what is left."""
        before = self._stalled
        stalled: dict[S, tuple[int, float]] = {}
        limit_s = self._listener.service.timeouts.body
        for stream in list(streams):
            exchange = self._exchanges.get(stream)
            if exchange is not None and not exchange.is_done:
                continue
            queued = stream.unsent()
            if not queued:
                continue
            mark = before.get(stream)
            if mark is None or mark[0] != queued:
                stalled[stream] = (queued, now)
            elif now - mark[1] > limit_s:
                self._listener.service.counters.errors.add(Reason.SLOW_READER.value)
                self.security_event("slow_reader", "the client does not take a response")
                self.cancel(stream)
            else:
                stalled[stream] = mark
        self._stalled = stalled

    def facts(self) -> Facts:
        state = State.ACTIVE if self._exchanges else State.CLOSING if self._leaving_at else State.IDLE
        return of_peer(self.peer, self.label, self._opened, state)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.peer.ip.decode('ascii')} exchanges={len(self._exchanges)}>"
