"""A WebSocket session on its way through an exchange: bytes both ways after the backend has said 101.

What the limits are is in ``websocket``; here is what is done about them. The session knows both streams and
nothing of heads, retries or pools.
"""

from expressgateway.proxy.forwarding import Peer
from expressgateway.proxy.service import HttpService, WebSocketLimits
from expressgateway.proxy.websocket import BACKEND, CLIENT, Parting, Tunnel, Verdict
from expressgateway.wire.sinks import ClientStream, ServerStream
from expressgateway.wire.ws import GOING_AWAY


class Session:
    """See the module's text. Over when both sides have ended, or ``close`` was called: then ``is_over``."""

    __slots__ = (
        "_back",
        "_front",
        "_parting",
        "_peer",
        "_service",
        "_tunnel",
        "ended_by",
        "has_backend_ended",
        "has_client_ended",
        "is_over",
        "received",
        "sent",
    )

    def __init__(
        self,
        service: HttpService,
        limits: WebSocketLimits,
        front: ServerStream,
        back: ClientStream,
        peer: Peer,
    ) -> None:
        # Wiring
        self._service = service
        self._front = front
        self._back = back
        self._peer = peer
        # Session
        self._tunnel = Tunnel(limits, service.clock.now)
        self._parting: Parting | None = None
        self.has_client_ended = False
        self.has_backend_ended = False
        self.is_over = False
        self.ended_by = ""  # the limit or fault for which the gateway closed it; empty: it did not
        self.received = 0  # bytes from the client
        self.sent = 0  # bytes from the backend
        service.counters.websockets += 1
        service.counters.websockets_open += 1

    def relay(self, side: int, chunk: bytes, end: bool) -> None:
        """Pass on what ``side`` sent."""
        if self.is_over:
            return
        if self._parting is not None:
            if side == BACKEND:
                self._hear_out(self._parting, chunk, end)
            return
        tunnel = self._tunnel
        verdict = tunnel.follow(side, chunk, self._service.clock.now) if chunk else None
        if verdict is not None:
            sound = tunnel.sound_part(side, chunk)
            if sound and side == CLIENT:
                self._back.send_data(sound, False)
            elif sound:
                self._front.send_data(sound, False)
            self.close(verdict, side)
        elif side == CLIENT:
            self.received += len(chunk)
            self.has_client_ended = self.has_client_ended or end
            self._end_if_done(end)
            self._back.send_data(chunk, end)
        else:
            self.sent += len(chunk)
            self.has_backend_ended = self.has_backend_ended or end
            self._end_if_done(end)
            self._front.send_data(chunk, end)

    def _end_if_done(self, end: bool) -> None:
        if end and self.has_client_ended and self.has_backend_ended:
            self.end()

    def close(self, verdict: Verdict, violator: int | None) -> None:
        """End it with a Close frame to each side, wherever a frame may stand."""
        if self._parting is not None:
            self._part(self._parting)
            return
        self.ended_by = verdict.kind
        if verdict.code != GOING_AWAY:
            self._service.security_event(verdict.kind, self._peer, f"websocket closed: {verdict.reason}")
        self._service.counters.websocket_closed.add(str(verdict.code))
        # Both sides are told; what they still send is of no interest to anyone, but for a backend's answers
        # to what its client sent before it broke the protocol.
        tunnel = self._tunnel
        told = tunnel.farewell(verdict, BACKEND, after_chunk=violator == CLIENT)
        if told and violator == CLIENT and not self.has_backend_ended:
            self._parting = tunnel.part(verdict, self._service.clock.now)
        if self._parting is not None:
            self._back.send_data(told, False)
            return
        self.end()
        self._back.send_data(told, False)
        self._back.close()
        self._front.send_data(tunnel.farewell(verdict, CLIENT, after_chunk=violator == BACKEND), False)
        self._front.close()

    def _hear_out(self, parting: Parting, chunk: bytes, end: bool) -> None:
        """What the backend says after its client broke the protocol."""
        said = parting.take(chunk)
        if said:
            self.sent += len(said)
            self._front.send_data(said, False)
        if end or parting.is_over:
            self._part(parting)

    def _part(self, parting: Parting) -> None:
        self.end()
        self._back.close()
        self._front.send_data(parting.farewell(), False)
        self._front.close()

    @property
    def may_be_left(self) -> bool:
        """The backend may go as it likes: it has said all, or the session is ending without it."""
        return self.has_backend_ended or self._parting is not None

    def leave(self) -> None:
        """The backend is gone (``may_be_left``): end the client's side behind it."""
        self.end()
        if self._parting is not None:
            self._front.send_data(self._parting.farewell(), False)
        self._front.close()

    def end(self) -> None:
        """Count it out. Idempotent."""
        if not self.is_over:
            self.is_over = True
            self._service.counters.websockets_open -= 1

    def sweep(self, now: float, is_front_paused: bool, is_back_paused: bool) -> None:
        if self._parting is not None:
            if self._parting.is_due(now):
                self._part(self._parting)
            return
        verdict = self._tunnel.sweep(now, is_front_paused, is_back_paused)
        if verdict is not None:
            self.close(verdict, None)
