"""HTTP/2 connections to one backend: few, shared by many exchanges (`shared_back`)."""

from typing import Final

from expressgateway.net.dial import Dialler
from expressgateway.net.reactor import Reactor
from expressgateway.net.shared_back import IDLE_S, SharedConnections
from expressgateway.net.stream import Stream
from expressgateway.net.tls_stream import TlsStream
from expressgateway.upstream.backend import Backend, Waiter
from expressgateway.upstream.errors import Fault, UpstreamError
from expressgateway.wire.h2.client import H2Client, H2ClientStream
from expressgateway.wire.h2.fields import FieldRules
from expressgateway.wire.h2.limits import H2Limits
from expressgateway.wire.h2.streams import H2Stream

LIMITS: Final = H2Limits(
    FieldRules(underscore="allow"),
    stream_window=262_144,
    connection_window=4_194_304,
    max_concurrent_streams=1024,
    # What a backend does often it has been asked to do often.
    max_client_resets=10_000,
    max_provoked_resets=1000,
    reset_percent=0,
    max_pings=1000,
)


class H2BackConnection:
    """One connection: the stream's owner and the codec's shell."""

    __slots__ = (
        "_group",
        "_is_closing",
        "_is_leaving",
        "_is_rested",
        "codec",
        "due",
        "idle_since",
        "is_open",
        "is_told",
        "only_for",
        "stream",
    )

    def __init__(self, group: "H2Connections", due: float, only_for: Waiter | None) -> None:
        # Wiring
        self._group = group
        self.codec = H2Client(self, LIMITS)
        self.stream: Stream | None = None
        self.only_for = only_for  # it speaks for this one's client
        # Connection
        self.is_open = False
        self.is_told = False  # how many streams the backend allows; until then one
        self.due = due  # seconds: connected by then
        self.idle_since = 0.0
        self._is_rested = False  # counted as idle
        self._is_leaving = False
        self._is_closing = False

    @property
    def can_open(self) -> bool:
        codec = self.codec
        return (
            self.is_open
            and not (self._is_closing or self._is_leaving)
            and codec.can_open
            and (self.is_told or codec.is_idle)
        )

    @property
    def is_lasting(self) -> bool:
        """Open, and streams will be given again when others end."""
        codec = self.codec
        return self.is_open and not (
            self._is_closing or self._is_leaving or codec.is_leaving or codec.is_closed
        )

    def lease(self, waiter: Waiter) -> H2ClientStream:
        """A stream of this connection, which has one left."""
        backend = self._group.backend
        backend.leases += 1
        if self.codec.opened:
            backend.reused += 1
        if self._is_rested:
            self._is_rested = False
            backend.resumed()
        return self.codec.open(waiter)

    # -- StreamOwner -----------------------------------------------------------------------------------

    def on_open(self) -> None:
        stream = self.stream
        if (
            isinstance(stream, TlsStream)
            and stream.tls is not None
            and stream.tls.selected_alpn_protocol() != "h2"
        ):
            self._group.dial_failed(
                self, UpstreamError(Fault.PROTOCOL, "the backend did not agree to speak HTTP/2 (ALPN)")
            )
            self.reset()
            return
        self.is_open = True
        self.codec.begin()
        self._group.opened(self)
        self._rest_if_idle()

    def on_bytes(self, data: bytes) -> None:
        self.codec.receive_data(data, self._group.reactor.now)

    def on_eof(self) -> None:
        self.codec.receive_eof()

    def on_closed(self, error: str) -> None:
        if self.is_open:
            self.codec.receive_reset(error)
        elif self.stream is not None and not self._is_closing:
            self._is_closing = True
            self._group.dial_failed(self, self._group.dialler.explain(self.stream, error))

    def on_released(self) -> None:
        self.codec.receive_reset()
        if self._is_rested:
            self._is_rested = False
            self._group.backend.resumed()  # until it is counted as closed
        self._group.forget(self)

    def on_congested(self) -> None:
        self.codec.congested()

    def on_drained(self) -> None:
        self.codec.drained()

    # -- the codec's shell -----------------------------------------------------------------------------

    def wake(self) -> None:
        self._group.reactor.wake(self)

    def flush(self) -> None:
        """The reactor's call at the end of a batch."""
        out = self.codec.take_out()
        stream = self.stream
        if stream is None:
            return
        if out:
            stream.write(out)
        if self._is_closing:
            stream.close()

    def stream_done(self, stream: H2Stream) -> None:
        self._group.stream_ended()
        self._rest_if_idle()

    def limits_changed(self) -> None:
        self.is_told = True
        self._group.room_changed()

    def unavailable(self) -> None:
        """Who waits is served by another connection."""
        self._group.stream_ended()

    def security_event(self, kind: str, detail: str) -> None:
        self._group.backend.unsolicited += 1

    def close(self, linger: bool) -> None:
        self._is_closing = True
        self.wake()

    # -- between exchanges -----------------------------------------------------------------------------

    def _rest_if_idle(self) -> None:
        codec = self.codec
        if not codec.is_idle or codec.is_closed or self._is_closing or self._is_rested:
            return
        group = self._group
        if group.is_leaving or group.is_single_use:
            codec.go_away()
            return
        self._is_rested = True
        self.idle_since = group.reactor.now
        group.backend.rested()

    @property
    def is_idle(self) -> bool:
        return self._is_rested

    def leave(self) -> None:
        """Take no more exchanges, and close after the last.

        GOAWAY is said then, not now: it would tell the backend nothing but that streams of its own are not
        wanted, and there are servers that take it for the end and leave open requests without an answer.
        """
        self._is_leaving = True
        if self.codec.is_idle:
            self.codec.go_away()

    def reset(self) -> None:
        """The safety net's call, too."""
        self._is_closing = True
        self.codec.receive_reset()
        if self.stream is not None:
            self.stream.reset()

    def sweep(self, now: float) -> None:
        stream = self.stream
        if stream is None:
            return
        if not self.is_open:
            if now >= self.due and not self._is_closing:
                self._group.dial_failed(
                    self, UpstreamError(Fault.CONNECT_TIMEOUT, "the backend did not answer in time")
                )
                self.reset()
        elif self._is_closing:
            stream.sweep(now)
        elif self._is_rested and now - self.idle_since > IDLE_S:
            self.codec.go_away()
        else:
            self.codec.sweep(now)


class H2Connections(SharedConnections[H2BackConnection]):
    """All HTTP/2 connections of one worker to one backend."""

    __slots__ = ("dialler",)

    def __init__(self, backend: Backend, reactor: Reactor, dialler: Dialler) -> None:
        super().__init__(backend, reactor)
        self.dialler = dialler

    @property
    def connect_timeout_s(self) -> float:
        return self.dialler.connect_timeout_s

    def make(self, due: float, waiter: Waiter, only_for: Waiter | None) -> H2BackConnection:
        connection = H2BackConnection(self, due, only_for)
        connection.stream = self.dialler.dial(self.backend, connection, waiter.addresses)
        return connection
