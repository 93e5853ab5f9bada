"""One request and its answer, between a server stream and a client stream.

Theory. The exchange is the sink of both codecs. It holds no bodies: what one side gives is handed to the
other in the same call, and a side whose outgoing buffer is full makes the exchange pause the side that fills
it. Two things are kept, both bounded: what arrives before there is a backend (one read, then the client is
paused), and up to ``REPLAY_BYTES`` of a body sent on a reused connection, in case that connection proves to
be stale.

Each exchange ends exactly once, in ``_finish``: complete, answered by the gateway, or cut short - which never
looks complete to the other side.
"""

from typing import Final

from expressgateway.proxy.answers import own_answer
from expressgateway.proxy.errors import (
    SECURITY_KINDS,
    Reason,
    blames_client,
    reason_of_backend,
    reason_of_client,
    reason_of_fault,
    status_of,
)
from expressgateway.proxy.forwarding import OURS, Peer
from expressgateway.proxy.service import HttpService
from expressgateway.proxy.websocket import BACKEND, CLIENT, Tunnel, Verdict
from expressgateway.upstream.backend import Addresses, Backend
from expressgateway.upstream.errors import Fault, UpstreamError
from expressgateway.wire.errors import PeerClosedError, WireError
from expressgateway.wire.head import Fields, RequestHead, ResponseHead
from expressgateway.wire.sinks import ClientStream, ServerStream
from expressgateway.wire.ws import GOING_AWAY

REPLAY_BYTES: Final = 65536  # of a request body kept for a retry; a longer one cannot be sent again
_NEVER_SENT: Final = 499  # counted and logged when the client is to blame and gets no answer
_IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"TRACE"})  # RFC 9110 9.2.2


class Exchange:
    """See the module's text. Implements ``RequestSink`` and ``Waiter`` (with it ``ResponseSink``)."""

    __slots__ = (
        "_back_is_paused",
        "_backend",
        "_blames_client",
        "_body_bytes",
        "_front_is_paused",
        "_has_answered",
        "_has_backend_begun",
        "_head",
        "_held",
        "_held_bytes",
        "_held_trailers",
        "_is_back_blocked",
        "_is_told_to_continue",
        "_is_waiting",
        "_progress_at",
        "_rate_bytes",
        "_rate_from",
        "_request_end",
        "_response_begun",
        "_response_bytes",
        "_response_end",
        "_retried",
        "_started",
        "_status",
        "_tried",
        "_tunnel",
        "_unsent",
        "_uploaded_at",
        "back",
        "front",
        "is_done",
        "peer",
        "request_id",
        "service",
    )

    def __init__(self, service: HttpService, front: ServerStream, peer: Peer) -> None:
        # Wiring
        self.service = service
        self.front = front
        self.peer = peer
        self.back: ClientStream | None = None
        self._backend: Backend | None = None
        # Exchange
        now = service.clock.now
        self.request_id = b""
        self.is_done = False
        self._head: RequestHead | None = None
        self._request_end = False
        self._response_end = False  # of a tunnel: the backend's side has ended
        self._response_begun = False  # the final head went to the client: no answer of our own any more
        self._status = 0
        self._is_waiting = False  # for a connection
        self._tried: list[Backend] = []
        self._retried = False
        self._held: list[bytes] | None = []  # the body so far; None: longer than REPLAY_BYTES
        self._held_bytes = 0
        self._held_trailers: Fields | None = None
        self._front_is_paused = False
        self._back_is_paused = False
        self._is_back_blocked = False  # it does not take what it was given
        self._has_backend_begun = False  # an interim head, or the final one, has come
        self._has_answered = False  # the final one
        self._blames_client = False  # it ends by the client's fault, which says nothing of the backend
        self._body_bytes = 0
        self._response_bytes = 0
        self._is_told_to_continue = False
        self._tunnel: Tunnel | None = None
        self._started = now  # seconds, as all times here
        self._uploaded_at = 0.0  # 0: the request is not complete
        self._progress_at = now  # some body moved, on either side
        self._unsent = 0  # bytes waiting in the streams at the last sweep
        self._rate_from = now  # the window in which the upload's rate is measured
        self._rate_bytes = 0

    # -- the client's side: RequestSink ----------------------------------------------------------------

    def on_request(self, head: RequestHead, end: bool) -> None:
        service = self.service
        self._head = head
        if end or head.protocol is not None:
            self._request_end = end
            self._uploaded_at = self._started
        reason = service.judge(head, self.peer)
        self.request_id = service.forwarding.request(head, self.peer)
        if reason is not None:
            self._answer(reason)
        else:
            self._lease()

    def on_request_data(self, chunk: bytes, end: bool) -> None:
        if self.is_done:
            return
        if self._tunnel is not None:
            self._relay(CLIENT, chunk, end)
            return
        if not self._is_http():
            self._hold_early(chunk)
            return
        service = self.service
        self._progress_at = service.clock.now
        size = len(chunk)
        self._body_bytes += size
        if service.max_body_bytes and self._body_bytes > service.max_body_bytes and self._is_http():
            self._end_with(Reason.BODY_TOO_LARGE)
            return
        if end:
            self._request_end = True
            self._uploaded_at = self._progress_at
        back = self.back
        if back is None or (back.is_reused and not self._response_begun):
            self._hold(chunk)
        if back is not None:
            back.send_data(chunk, end)

    def on_request_trailers(self, fields: Fields) -> None:
        if self.is_done:
            return
        self._request_end = True
        self._uploaded_at = self._progress_at = self.service.clock.now
        # RFC 9110 6.5.1: what the gateway itself says of a request is not the client's to add at its end.
        fields = tuple(field for field in fields if field[0] not in OURS)
        self._held_trailers = fields
        if self.back is not None:
            self.back.send_trailers(fields)

    def on_request_abort(self, error: WireError) -> None:
        if not self.is_done:
            self._end_with(reason_of_client(error), error.detail)

    def on_front_blocked(self) -> None:
        if not self._back_is_paused:
            self._back_is_paused = True
            if self.back is not None:
                self.back.pause()

    def on_front_drained(self) -> None:
        self._progress_at = self.service.clock.now
        if self._back_is_paused:
            self._back_is_paused = False
            if self.back is not None:
                self.back.resume()

    def _is_http(self) -> bool:
        return self._head is None or self._head.protocol is None

    def _hold(self, chunk: bytes) -> None:
        """Keep body bytes until there is a backend, or in case a reused connection is stale."""
        held = self._held
        if held is None:
            return
        self._held_bytes += len(chunk)
        if self._held_bytes > REPLAY_BYTES and self.back is not None:
            self._held = None
            return
        if chunk:
            held.append(chunk)
        if self.back is None:
            self._pause_front()

    def _pause_front(self) -> None:
        if not self._front_is_paused:
            self._front_is_paused = True
            self.front.pause()

    def _hold_early(self, chunk: bytes) -> None:
        """Bytes behind a handshake may be a request in disguise: no backend sees them before it agreed."""
        if self._held is not None and not self._response_begun:
            self._held.append(chunk)
        self._pause_front()

    # -- towards a backend: Waiter ---------------------------------------------------------------------

    def _lease(self, failure: Reason | None = None, detail: str = "") -> None:
        """Ask a backend for a connection. ``failure``: why the one before could not be used."""
        pool = self.service.pool
        backend = pool.pick(None, self._tried)
        if backend is None:
            nobody = Reason.BACKENDS_DOWN if pool.backends else reason_of_fault(pool.empty_fault)
            self._answer(failure or nobody, detail)
            return
        self._backend = backend
        backend.in_flight += 1
        self._ask(backend, fresh=False)

    def _ask(self, backend: Backend, fresh: bool) -> None:
        if backend.connections is None:
            self._answer(Reason.NO_BACKEND)
            return
        stream = backend.connections.lease(self, fresh)
        if stream is not None:
            self.on_leased(stream)
        else:
            self._is_waiting = True

    def on_leased(self, stream: ClientStream) -> None:
        self._is_waiting = False
        self.back = stream
        head = self._head
        if head is None:
            return
        end = self._request_end
        held = self._held
        if head.protocol is not None or (not held and self._held_trailers is None):
            # fast path: nothing but the head so far; and nothing of a tunnel before the backend has agreed
            stream.send_head(head, end and head.protocol is None)
        else:
            stream.send_head(head, False)
            for chunk in held or ():
                stream.send_data(chunk, False)
            if self._held_trailers is not None:
                stream.send_trailers(self._held_trailers)
            elif end:
                stream.send_data(b"", True)
        if self._back_is_paused:
            stream.pause()  # what the client has not read of earlier answers fills its buffer already
        if not stream.is_reused and head.protocol is None:
            self._held = None
        if self._front_is_paused:
            self._front_is_paused = False
            self.front.resume()

    def on_lease_failed(self, error: UpstreamError) -> None:
        """Nothing was sent: another backend may be asked at once, each at most once."""
        self._is_waiting = False
        backend = self._leave_backend()
        if backend is None or self.is_done:
            return
        backend.connect_failures += 1
        backend.responses[0] += 1
        self._tried.append(backend)
        if error.fault is not Fault.OVER_CAPACITY and len(self._tried) < len(self.service.pool.backends):
            self._lease(reason_of_fault(error.fault), error.detail)
        else:
            self._answer(reason_of_fault(error.fault), error.detail)

    def _leave_backend(self) -> Backend | None:
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.in_flight -= 1
        return backend

    # -- the backend's side: ResponseSink --------------------------------------------------------------

    def on_informational(self, head: ResponseHead) -> None:
        if self.is_done:
            return
        self._has_backend_begun = True
        if self._is_http():
            self._held = None  # nothing is sent again
        self._is_told_to_continue = True
        if head.status == 101:
            limits = self.service.websocket
            if limits is None:
                self._end_with(Reason.BACKEND_PROTOCOL, "an upgrade that is not offered any more")
                return
            now = self.service.clock.now
            self._tunnel = Tunnel(limits, now)
            self._response_begun = True
            self._status = 101
            self.service.counters.websockets += 1
            self.service.counters.websockets_open += 1
            self.service.forwarding.response(head, self.service.wall_s())
            self.front.send_informational(head)
            held, self._held = self._held, None
            for chunk in held or ():
                self._relay(CLIENT, chunk, False)
            if not self._is_back_blocked:
                self.on_back_drained()
            return
        self.front.send_informational(head)

    def on_response(self, head: ResponseHead, end: bool) -> None:
        if self.is_done:
            return
        service = self.service
        self._response_begun = True
        self._has_backend_begun = self._has_answered = True
        self._held = None
        if not self._is_http():
            self._request_end = True  # the upgrade was declined, and a handshake has no body
        self._progress_at = service.clock.now
        self._status = head.status
        service.forwarding.response(head, service.wall_s())
        self.front.send_head(head, end)
        if end:
            self._response_done()

    def on_response_data(self, chunk: bytes, end: bool) -> None:
        if self.is_done:
            return
        if self._tunnel is not None:
            self._relay(BACKEND, chunk, end)
            return
        self._progress_at = self.service.clock.now
        self._response_bytes += len(chunk)
        self.front.send_data(chunk, end)
        if end:
            self._response_done()

    def on_response_trailers(self, fields: Fields) -> None:
        if not self.is_done:
            self.front.send_trailers(fields)
            self._response_done()

    def on_response_abort(self, error: WireError) -> None:
        stream, self.back = self.back, None
        if self.is_done:
            return
        if self._can_retry(error, stream):
            backend = self._backend
            if backend is not None:
                self._retried = True
                self.service.pool.retries.add("stale")
                self._ask(backend, fresh=True)
                return
        self._end_with(reason_of_backend(error), error.detail)

    def _can_retry(self, error: WireError, stream: ClientStream | None) -> bool:
        """A reused connection that was closed under us, before any answer, with a request we still hold.

        Whatever is idempotent may be sent again (RFC 9110 9.2.2). Anything else only if the backend's kernel
        acknowledged none of it: then no program can have seen it.
        """
        if stream is None or not stream.is_reused or self._retried or self._has_backend_begun:
            return False
        if not isinstance(error, PeerClosedError) or self._held is None or self._head is None:
            return False
        return self._head.method in _IDEMPOTENT or not stream.was_delivered()

    def on_back_blocked(self) -> None:
        self._is_back_blocked = True
        self._pause_front()

    def on_back_drained(self) -> None:
        self._is_back_blocked = False
        self._progress_at = self.service.clock.now
        if self._front_is_paused and self.back is not None:
            self._front_is_paused = False
            self.front.resume()

    # -- a tunnel --------------------------------------------------------------------------------------

    def _relay(self, side: int, chunk: bytes, end: bool) -> None:
        tunnel = self._tunnel
        back = self.back
        if tunnel is None or back is None:
            return
        verdict = tunnel.follow(side, chunk, self.service.clock.now) if chunk else None
        if verdict is not None:
            sound = tunnel.sound_part(side, chunk)
            if sound and side == CLIENT:
                back.send_data(sound, False)
            elif sound:
                self.front.send_data(sound, False)
            self._close_tunnel(tunnel, verdict, side)
        elif side == CLIENT:
            self._body_bytes += len(chunk)
            self._request_end = self._request_end or end
            if end and self._response_end:
                self._finish()
            back.send_data(chunk, end)
        else:
            self._response_bytes += len(chunk)
            self._response_end = self._response_end or end
            if end and self._request_end:
                self._finish()
            self.front.send_data(chunk, end)

    def _close_tunnel(self, tunnel: Tunnel, verdict: Verdict, violator: int | None) -> None:
        """End the session with a Close frame to each side, wherever a frame may stand."""
        if verdict.code != GOING_AWAY:
            self.service.security_event(verdict.kind, self.peer, f"websocket closed: {verdict.reason}")
        self.service.counters.websocket_closed.add(str(verdict.code))
        back = self.back
        self._finish()
        # Both sides are told; what they still send is of no interest to anyone.
        if back is not None:
            back.send_data(tunnel.farewell(verdict, BACKEND, after_chunk=violator == CLIENT), False)
            back.close()
        self.front.send_data(tunnel.farewell(verdict, CLIENT, after_chunk=violator == BACKEND), False)
        self.front.close()

    def go_away(self) -> None:
        """The drain's time is up: a tunnel is told 1001, everything else is cut short by its connection."""
        tunnel = self._tunnel
        if tunnel is not None and not self.is_done:
            self._close_tunnel(tunnel, Verdict(1001, "websocket_drained", "the gateway is going away"), None)

    @property
    def is_cut_short(self) -> bool:
        """Its request never came to its end."""
        return not self._request_end

    @property
    def addresses(self) -> Addresses | None:
        return self.peer.addresses

    # -- endings ---------------------------------------------------------------------------------------

    def _response_done(self) -> None:
        if not self._request_end and self.back is not None:
            # The response is complete before its request: the rest will not be read by anyone.
            self.back.abort(None)
        self._finish()

    def _end_with(self, reason: Reason, detail: str = "") -> None:
        """The exchange cannot go on: answer if that is still possible, else cut the response short."""
        if self._response_begun:
            self._note(reason, detail)
            self._let_go()
            self._finish()
            self.front.abort(None)
        elif status_of(reason) == _NEVER_SENT:
            self._note(reason, detail)
            self._let_go()
            self._status = _NEVER_SENT
            self._finish()
            self.front.abort(None)
        else:
            self._answer(reason, detail)

    def _let_go(self) -> None:
        """Leave the backend's side, so that it never sees a complete request."""
        back, self.back = self.back, None
        backend = self._backend
        if self._is_waiting and backend is not None and backend.connections is not None:
            self._is_waiting = False
            backend.connections.cancel(self)
        if back is not None:
            back.abort(None)

    def _note(self, reason: Reason, detail: str = "") -> None:
        """Count a reason, and say it once: of a client, or of the backend that is to blame."""
        self.service.counters.errors.add(reason.value)
        self._blames_client = blames_client(reason)
        kind = SECURITY_KINDS.get(reason)
        if kind is not None:
            self.service.security_event(kind, self.peer, f"request refused: {reason.value}")
        elif not self._blames_client:
            backend = self._backend.id if self._backend is not None else self.service.pool.name
            self.service.log_security(reason.value, backend, f"an exchange failed: {detail or reason.value}")

    def refuse(self, error: WireError) -> None:
        """Answer a request that could not be read."""
        reason = reason_of_client(error)
        if reason is Reason.CLIENT_CLOSED:
            self._end_with(reason)
            return
        self.request_id = self.service.forwarding.ids.request_id(self.service.forwarding.ids.make())
        self._answer(reason, error.detail)

    def _answer(self, reason: Reason, detail: str = "") -> None:
        """Answer by ourselves: status, ``Proxy-Status``, a short text with the request's id."""
        service = self.service
        self._note(reason, detail)
        self._let_go()
        head, text = own_answer(service, reason, detail, self.request_id)
        self._response_begun = True
        self._status = head.status
        self._response_bytes += len(text)
        self.front.send_head(head, False)
        self.front.send_data(text, True)
        self._finish()

    def _finish(self) -> None:
        """Count, and be done. Once."""
        if self.is_done:
            return
        self.is_done = True
        service = self.service
        counters = service.counters
        backend = self._backend
        status = self._status
        if backend is not None:
            backend.in_flight -= 1
            self._backend = None
            if self.back is not None or (self._has_answered and self._blames_client):
                backend.responses[status // 100] += 1
            elif not self._blames_client:
                backend.responses[0] += 1
        if self._tunnel is not None:
            counters.websockets_open -= 1
            self._tunnel = None
        head = self._head
        version = 0 if head is not None and head.version == b"1.0" else 1
        counters.requests[version][status // 100 if status < 600 else 0] += 1
        counters.durations[version].observe(service.clock.now - self._started)
        counters.request_bytes += self._body_bytes
        counters.response_bytes += self._response_bytes

    # -- deadlines -------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Find what is due. Called by the front connection, a few times a second."""
        if self.is_done:
            return
        timeouts = self.service.timeouts
        tunnel = self._tunnel
        if tunnel is not None:
            verdict = tunnel.sweep(now, self._front_is_paused, self._back_is_paused)
            if verdict is not None:
                self._close_tunnel(tunnel, verdict, None)
            return
        if not self._response_begun:
            if timeouts.total and now - self._started > timeouts.total:
                self._end_with(Reason.TOTAL_TIMEOUT, "no response head in time")
                return
            if self._uploaded_at and now - self._uploaded_at > timeouts.head:
                self._end_with(Reason.HEAD_TIMEOUT, "no response head in time")
                return
        if self._uploaded_at and not self._response_begun:
            return
        unsent = self.front.unsent() + (self.back.unsent() if self.back is not None else 0)
        if unsent != self._unsent:
            self._unsent = unsent
            self._progress_at = now
        if now - self._progress_at > timeouts.body:
            self._end_with(self._stalled())
        elif not self._request_end:
            self._sweep_rate(now)

    def _stalled(self) -> Reason:
        """No body moved for too long: whose fault is it?"""
        is_clients_turn = not self._request_end and not self._front_is_paused and not self._awaits_continue()
        if is_clients_turn and not self._response_begun:
            return Reason.SLOW_BODY
        if self._response_begun and self._back_is_paused:
            return Reason.SLOW_READER
        return Reason.BODY_TIMEOUT

    def _awaits_continue(self) -> bool:
        """The client asked before sending its body (RFC 9110 10.1.1) and has not been told."""
        asked = self._head is not None and self._head.expects_continue
        return asked and not self._is_told_to_continue and not self._body_bytes

    def _sweep_rate(self, now: float) -> None:
        """A trickle that never stops is as bad as a stall: measure the upload over whole windows."""
        service = self.service
        is_held_up = self._front_is_paused or self._response_begun or self._awaits_continue()
        if not service.min_body_bps or is_held_up:
            self._rate_from = now
            self._rate_bytes = self._body_bytes
            return
        window = now - self._rate_from
        if window >= service.min_body_window_s:
            if self._body_bytes - self._rate_bytes < service.min_body_bps * window:
                self._end_with(Reason.SLOW_BODY, "the body comes too slowly")
                return
            self._rate_from = now
            self._rate_bytes = self._body_bytes

    def __repr__(self) -> str:
        return f"<Exchange {self.request_id.decode('ascii')} status={self._status} done={self.is_done}>"
