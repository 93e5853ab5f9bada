"""HTTP/3 connections to one backend: few, shared by many exchanges (`shared_back`)."""

from typing import Final

from expressgateway.net.quic.connection import QuicConnection
from expressgateway.net.quic.dial import QuicDialler
from expressgateway.net.quic.events import Ended
from expressgateway.net.quic.tls import Grants
from expressgateway.net.reactor import Reactor
from expressgateway.net.shared_back import IDLE_S, SharedConnections
from expressgateway.upstream.backend import Backend, Waiter
from expressgateway.upstream.errors import Fault, UpstreamError
from expressgateway.wire.h2.fields import FieldRules
from expressgateway.wire.h3.client import H3Client, H3ClientStream
from expressgateway.wire.h3.frames import NO_ERROR
from expressgateway.wire.h3.limits import H3Limits
from expressgateway.wire.h3.streams import H3Stream

PING_S: Final = 10.0  # between keep-alive PINGs while exchanges are under way: less than any idle timeout

LIMITS: Final = H3Limits(
    FieldRules(underscore="allow"),
    max_concurrent_streams=1024,
    # What a backend does often it has been asked to do often.
    max_client_resets=10_000,
    max_provoked_resets=1000,
    reset_percent=0,
)
GRANTS: Final = Grants(
    stream_bytes=262_144,
    connection_bytes=4_194_304,
    streams=0,  # a server opens none (RFC 9114 6.1)
    unidirectional=16,
    idle_timeout_s=30.0,
)


class H3BackConnection:
    """One connection: the QUIC session and the codec's shell."""

    __slots__ = (
        "_group",
        "_is_closing",
        "_is_forgotten",
        "_is_leaving",
        "_is_rested",
        "_pinged_at",
        "codec",
        "due",
        "idle_since",
        "is_open",
        "is_told",
        "only_for",
        "quic",
    )

    def __init__(self, group: "H3Connections", quic: QuicConnection, due: float) -> None:
        # Wiring
        self._group = group
        self.quic = quic
        self.codec = H3Client(self, quic.engine, LIMITS)
        self.only_for: Waiter | None = None  # there is no PROXY header over QUIC
        # Connection
        self.is_open = False
        self.is_told = False  # the backend's SETTINGS have come; how many streams it allows, QUIC has told
        self.due = due  # seconds: connected by then
        self.idle_since = 0.0
        self._pinged_at = 0.0
        self._is_rested = False  # counted as idle
        self._is_leaving = False  # its group gives it no more exchanges
        self._is_closing = False
        self._is_forgotten = False

    @property
    def can_open(self) -> bool:
        return self.is_open and not (self._is_leaving or self._is_closing) and self.codec.can_open

    @property
    def is_lasting(self) -> bool:
        """Open, and streams will be given again when others end."""
        codec = self.codec
        is_ending = self._is_leaving or self._is_closing or codec.is_leaving or codec.is_closed
        return self.is_open and not is_ending

    def lease(self, waiter: Waiter) -> H3ClientStream:
        """A stream of this connection, which has one left."""
        backend = self._group.backend
        backend.leases += 1
        if self.codec.opened:
            backend.reused += 1
        if self._is_rested:
            self._is_rested = False
            backend.resumed()
        return self.codec.open(waiter)

    # -- Session ---------------------------------------------------------------------------------------

    def on_open(self) -> None:
        self.is_open = self.is_told = True
        self._pinged_at = self._group.reactor.now
        self.codec.begin(self._group.reactor.now)
        self._group.opened(self)
        self._rest_if_idle()

    def on_stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        self.codec.receive(stream_id, data, end, self._group.reactor.now)

    def on_stream_reset(self, stream_id: int, code: int) -> None:
        self.codec.receive_reset(stream_id, code, self._group.reactor.now)

    def on_stream_stop(self, stream_id: int, code: int) -> None:
        self.codec.receive_stop(stream_id, code, self._group.reactor.now)

    def on_streams_allowed(self) -> None:
        self._group.room_changed()

    def on_datagram(self, data: bytes) -> None:
        """None were agreed on."""

    def on_ended(self, ended: Ended) -> None:
        was_closing, self._is_closing = self._is_closing, True
        if self.is_open:
            self.codec.receive_closed(str(ended))
        elif not was_closing:
            self._group.dial_failed(self, QuicDialler.explain(ended))
        self._forget()

    def on_flushed(self) -> None:
        self.codec.sent()
        if self._is_closing and self.quic.engine.ended is None and self.quic.engine.is_settled:
            self.quic.engine.close(NO_ERROR, "")
            self.quic.wake()

    def on_over(self) -> None:
        self.codec.receive_closed("the connection is gone")
        self._forget()

    def _forget(self) -> None:
        """It serves nobody any more; its last packets are the engine's business."""
        if not self._is_forgotten:
            self._is_forgotten = True
            if self._is_rested:
                self._is_rested = False
                self._group.backend.resumed()  # until it is counted as closed
            self._group.forget(self)

    # -- the codec's shell -----------------------------------------------------------------------------

    def wake(self) -> None:
        self.quic.wake()

    def stream_done(self, stream: H3Stream) -> None:
        self._group.stream_ended()
        self._rest_if_idle()

    def limits_changed(self) -> None:
        self._group.room_changed()

    def unavailable(self) -> None:
        """Who waits is served by another connection."""
        self._group.stream_ended()

    def security_event(self, kind: str, detail: str) -> None:
        self._group.backend.unsolicited += 1

    def close(self, linger: bool) -> None:
        self._is_closing = True
        if not linger and self.quic.engine.ended is None:
            self.quic.engine.close(NO_ERROR, "")
        self.quic.wake()

    # -- between exchanges -----------------------------------------------------------------------------

    def _rest_if_idle(self) -> None:
        codec = self.codec
        if not codec.is_idle or codec.is_closed or self._is_closing or self._is_rested:
            return
        group = self._group
        if self._is_leaving or group.is_leaving:
            codec.go_away()
            return
        self._is_rested = True
        self.idle_since = group.reactor.now
        group.backend.rested()

    @property
    def is_idle(self) -> bool:
        return self._is_rested

    def leave(self) -> None:
        """Take no more exchanges, and close after the last: GOAWAY is said then, as over HTTP/2."""
        self._is_leaving = True
        if self.codec.is_idle:
            self.codec.go_away()

    def reset(self) -> None:
        """The safety net's call, too."""
        self._is_closing = True
        self.codec.receive_closed("given up")
        self.quic.reset()
        self._forget()

    def sweep(self, now: float) -> None:
        engine = self.quic.engine
        if engine.ended is not None:
            return
        if not self.is_open:
            if now >= self.due and not self._is_closing:
                self._is_closing = True
                self._group.dial_failed(
                    self, UpstreamError(Fault.CONNECT_TIMEOUT, "the backend did not answer in time")
                )
                engine.abandon(0, "the backend did not answer in time")
                self.quic.wake()
            return
        if self._is_closing:
            return
        if self._is_rested:
            if now - self.idle_since > IDLE_S:
                self.codec.go_away()
        elif now - self._pinged_at > PING_S:
            # A backend that died says nothing; one that lives acknowledges (RFC 9000 10.1.2).
            self._pinged_at = now
            engine.ping()
            self.quic.wake()
        self.codec.sweep(now)


class H3Connections(SharedConnections[H3BackConnection]):
    """All HTTP/3 connections of one worker to one backend."""

    __slots__ = ("dialler",)

    def __init__(self, backend: Backend, reactor: Reactor, dialler: QuicDialler) -> None:
        super().__init__(backend, reactor)
        self.dialler = dialler

    @property
    def connect_timeout_s(self) -> float:
        return self.dialler.connect_timeout_s

    def make(self, due: float, waiter: Waiter, only_for: Waiter | None) -> H3BackConnection:
        made: list[H3BackConnection] = []

        def open_session(quic: QuicConnection) -> H3BackConnection:
            made.append(H3BackConnection(self, quic, due))
            return made[0]

        self.dialler.dial(self.backend, open_session)
        return made[0]
