"""One request and its answer, between a server stream and a client stream.

Theory. The exchange is the sink of both codecs. It holds no bodies: what one side gives is handed to the
other in the same call, and a side whose outgoing buffer is full makes the exchange pause the side that fills
it. Two things are kept, both bounded: what arrives before there is a backend (one read, then the client is
paused), and up to ``REPLAY_BYTES`` of a body that may have to be sent again. How a backend is found, and
another one, is in ``backend_side``.

Each exchange ends exactly once, in ``_finish``: complete, answered by the gateway, or cut short - which never
looks complete to the other side.
"""

from typing import Final

from expressgateway.observe.counters import VERSIONS
from expressgateway.proxy.answers import own_answer
from expressgateway.proxy.backend_side import NO_FLAGS, NO_RETRIES
from expressgateway.proxy.errors import (
    SECURITY_KINDS,
    Reason,
    blames_client,
    reason_of_backend,
    reason_of_client,
    status_of,
)
from expressgateway.proxy.forwarding import OURS, Peer
from expressgateway.proxy.mirror import Mirror
from expressgateway.proxy.records import Records
from expressgateway.proxy.rewriting import Answer
from expressgateway.proxy.route import Route
from expressgateway.proxy.service import HttpService
from expressgateway.proxy.session_side import SessionSide
from expressgateway.proxy.websocket import BACKEND, CLIENT
from expressgateway.wire.errors import WireError
from expressgateway.wire.head import Field, Fields, RequestHead, ResponseHead
from expressgateway.wire.sinks import ServerStream

_VERSIONS: Final = {version.encode("ascii"): number for number, version in enumerate(VERSIONS)}
_NEVER_SENT: Final = 499  # counted and logged when the client is to blame and gets no answer
_LONG: Final = frozenset({Reason.TOTAL_TIMEOUT, Reason.BODY_TIMEOUT})  # either side may have taken the time


class Exchange(SessionSide):
    """See the module's text. Implements ``RequestSink`` and ``Waiter`` (with it ``ResponseSink``)."""

    __slots__ = (
        "_asked",
        "_blames_client",
        "_fields",
        "_has_answered",
        "_mirror",
        "_response_bytes",
        "headed_at",
        "request_id",
    )

    def __init__(self, service: HttpService, front: ServerStream, peer: Peer) -> None:
        # The half that deals with backends
        self.service = service
        self.front = front
        self.peer = peer
        self.back = None
        self._backend = self.last = None
        self._target = None
        self._retry = NO_RETRIES
        self.is_done = self._request_end = self._response_begun = False
        self._head = None
        self._front_is_paused = self._back_is_paused = self._is_back_blocked = False
        self._has_backend_begun = self._is_waiting = self._is_queued = self._is_replaced = False
        self._held = []
        self._held_bytes = self.attempts = 0
        self._held_trailers = None
        self.key = None
        self.tried = []
        self.attempt_at = self.leased_at = 0.0
        self.flags = NO_FLAGS
        # WebSocket
        self._handshake = None
        self._session = None
        self._status = 0
        # This half
        now = service.clock.now
        self.request_id = b""
        self._route = service.default
        self._asked: tuple[bytes, bytes] | None = None  # authority and target, if they were rewritten
        self._has_answered = False  # the backend's final head has come
        self._blames_client = False  # it ends by the client's fault, which says nothing of the backend
        self._body_bytes = 0
        self._response_bytes = 0
        self._is_told_to_continue = False
        self._fields: tuple[Field, ...] = ()  # for the client, besides what the backend says
        self._mirror: Mirror | None = None
        self._started = now  # seconds, as all times here
        self.headed_at = 0.0
        self._uploaded_at = 0.0  # 0: the request is not complete
        self._progress_at = now  # some body moved, on either side
        self._unsent = 0  # bytes waiting in the streams at the last sweep
        self._rate = None

    # -- the client's side: RequestSink ----------------------------------------------------------------

    def on_request(self, head: RequestHead, end: bool) -> None:
        service = self.service
        self._head = head
        if end or head.protocol is not None:
            self._request_end = end
            self._uploaded_at = self._started
        reason = None
        if service.is_misdirected is not None or head.content_length is not None:
            reason = service.judge(head, self.peer)
        route = service.find(head)
        if route is None:
            reason = Reason.BAD_PATH
        else:
            self._route = route
        target = route.target if route is not None else None
        if reason is not None or route is None or target is None or not route.is_plain:
            self._go_by(self._route, head, end, reason)
            return
        # fast path: nothing to change, one pool to go to
        if target.is_keyed:
            self._take_key(target, head)
        self.request_id = service.forwarding.request(head, self.peer)
        self._retry = route.retry or target.retry
        self._lease(target)

    def _go_by(self, route: Route, head: RequestHead, end: bool, reason: Reason | None) -> None:
        """What a route asks for, step by step."""
        service = self.service
        target = route.target
        if reason is None:
            if route.split is not None:
                target, field = route.split.choose(head, self.peer)
                if field is not None:
                    self._fields = (field,)
            if target is None:
                self.request_id = service.forwarding.request(head, self.peer)
                if route.answer is None:
                    self._answer(Reason.NO_ROUTE)
                else:
                    self._send_made(route, route.answer(head))
                return
            self._take_key(target, head)  # by what the client asked for, not by what is made of it
            if route.rewrite is not None:
                self._asked = head.authority, head.path
                head.path = route.rewrite.target(head.path, service.path_of(head))
            if route.edits is not None:
                head.headers = route.edits.fields(head.headers)
        self.request_id = service.forwarding.request(head, self.peer)
        if reason is not None or target is None:
            self._answer(reason or Reason.NO_ROUTE)
            return
        # After the forwarding fields were made: they tell the host that the client asked for.
        if route.rewrite is not None and route.rewrite.host is not None:
            head.authority = route.rewrite.host
        rule = route.mirror
        if rule is not None and rule.applies():
            mirrors = service.mirrors
            self._mirror = mirrors.begin(rule.target, head, end, self.addresses, service.clock.now)
            if self._mirror is None:
                self.flag("mirror_dropped")
        self._retry = route.retry or target.retry
        self._lease(target)

    def on_request_data(self, chunk: bytes, end: bool) -> None:
        if self.is_done:
            return
        if self._session is not None:
            self._relay(CLIENT, chunk, end)
            return
        if not self._is_http():
            self._hold_early(chunk, end)
            return
        service = self.service
        self._progress_at = service.clock.now
        size = len(chunk)
        self._body_bytes += size
        if service.max_body_bytes and self._body_bytes > service.max_body_bytes:
            self._end_with(Reason.BODY_TOO_LARGE)
            return
        if end:
            self._request_end = True
            self._uploaded_at = self._progress_at
        if self._mirror is not None:
            self._mirror.send_data(chunk, end)
        back = self.back
        if back is None or (self._held is not None and not self._response_begun):
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
        if self._mirror is not None:
            self._mirror.send_trailers(fields)
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

    # -- the backend's side: ResponseSink --------------------------------------------------------------

    def on_informational(self, head: ResponseHead) -> None:
        if self.is_done:
            return
        self._has_backend_begun = True
        if self._is_http():
            self._held = None  # nothing is sent again
        self._is_told_to_continue = True
        if head.status == 101:
            self._begin_session(head)
        else:
            self.front.send_informational(head)

    def on_response(self, head: ResponseHead, end: bool) -> None:
        if self.is_done:
            return
        status = head.status
        if status in self._retry.statuses and self._can_repeat(None) and self._try_status(status):
            return
        if self._is_misleading(status):
            self._end_with(Reason.BACKEND_UPGRADE, f"the backend answered a handshake with status {status}")
            return
        service = self.service
        self._succeed(status)
        self._response_begun = True
        self._has_backend_begun = self._has_answered = True
        self._held = None
        request = self._head
        if request is not None and request.protocol is not None:
            self._request_end = True  # the upgrade was declined, and a handshake has no body
        self._progress_at = self.headed_at
        self._status = status
        service.forwarding.response(head, service.wall_s())
        if self._fields or self.attempts > 1 or self._route.response_edits is not None:
            self._add_fields(head)
        self.front.send_head(head, end)
        if end:
            self._response_done()

    def _try_status(self, status: int) -> bool:
        return self._try_another("status", f"status {status}", status)

    def _succeed(self, status: int) -> None:
        """The attempt under way has its response head."""
        now = self.headed_at = self.service.clock.now
        self._credit_backend(status)
        backend = self._backend
        if backend is not None:
            backend.head_durations.observe(now - self.leased_at)
        target = self._target
        if backend is not None and target is not None and target.pool.sessions is not None:
            field = self.session_field(backend)
            if field is not None:
                self._fields = (*self._fields, field)

    def _add_fields(self, head: ResponseHead) -> None:
        """What the client is told beside what the backend says."""
        edits = self._route.response_edits
        if edits is not None:
            head.shared = edits.shared(head.shared)
        if self.attempts > 1:
            self._fields = (*self._fields, self._attempts_field())
        head.headers = (*head.headers, *self._fields)

    def _attempts_field(self) -> Field:
        return (b"x-gateway-attempts", b"%d" % self.attempts)

    def on_response_data(self, chunk: bytes, end: bool) -> None:
        if self.is_done:
            return
        if self._session is not None:
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
        session = self._session
        if session is not None and session.may_be_left:
            # It was complete, and wants no more: nothing of it is missing on its way to the client.
            session.leave()
            self._finish()
        elif not self.is_done and not self._mend(error, stream):
            self._end_with(reason_of_backend(error), error.detail, error)

    def on_back_blocked(self) -> None:
        self._is_back_blocked = True
        self._pause_front()

    def on_back_drained(self) -> None:
        self._is_back_blocked = False
        self._progress_at = self.service.clock.now
        if self._front_is_paused and self.back is not None:
            self._front_is_paused = False
            self.front.resume()

    @property
    def is_cut_short(self) -> bool:
        """Its request never came to its end."""
        return not self._request_end

    # -- endings ---------------------------------------------------------------------------------------

    def _response_done(self) -> None:
        if not self._request_end and self.back is not None:
            # The response is complete before its request: the rest will not be read by anyone.
            self.back.abort(None)
        self._finish()

    def give_up(self, reason: Reason, detail: str = "") -> None:
        self._end_with(reason, detail)

    def _end_with(self, reason: Reason, detail: str = "", error: WireError | None = None) -> None:
        """The exchange cannot go on: answer if that is still possible, else cut the response short.

        ``error``: the backend's, which may carry a code that is the client's to know.
        """
        if self._response_begun:
            self._note(reason, detail)
            self._let_go()
            self._finish()
            self.front.abort(error)
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
        self._leave_queue()
        back, self.back = self.back, None
        if back is not None:
            back.abort(None)

    def _note(self, reason: Reason, detail: str = "") -> None:
        """Count a reason, and say it once: of a client, or of the backend that is to blame."""
        self.service.counters.errors.add(reason.value)
        self.flag(reason.value)
        self._blames_client = blames_client(reason)
        kind = SECURITY_KINDS.get(reason)
        if kind is not None:
            self.service.security_event(kind, self.peer, f"request refused: {reason.value}")
        elif not self._blames_client:
            source = self.service.name
            if self._backend is not None:
                source = self._backend.id
                if reason is not Reason.BACKEND_UPGRADE and (
                    reason not in _LONG or not self._is_clients_turn()
                ):
                    self._fail_backend(detail or reason.value.replace("_", " "))
            elif self._target is not None:
                source = self._target.pool.name
            self.service.log_security(reason.value, source, f"an exchange failed: {detail or reason.value}")

    def refuse(self, error: WireError, head: RequestHead | None = None) -> None:
        """Answer a request that could not be read, or only this much of it."""
        self._head = head
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
        if self.attempts > 1:
            head.headers = (*head.headers, self._attempts_field())
        self._send_own(head, text)

    def _send_made(self, route: Route, made: Answer | None) -> None:
        """A route that needs no backend: a redirect, or a fixed answer."""
        if made is None:
            self._answer(Reason.BAD_AUTHORITY, "the request names no host to be redirected on")
            return
        status, fields, body = made
        service = self.service
        fields = (*service.forwarding.own(service.wall_s()), (b"x-request-id", self.request_id), *fields)
        if route.response_edits is not None:
            fields = route.response_edits.fields(fields)
        self._send_own(ResponseHead(status, fields, len(body)), body)

    def _send_own(self, head: ResponseHead, body: bytes) -> None:
        self._response_begun = True
        self._status = head.status
        if not body or (self._head is not None and self._head.method == b"HEAD"):
            self.front.send_head(head, True)
        else:
            self._response_bytes += len(body)
            self.front.send_head(head, False)
            self.front.send_data(body, True)
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
            self._backend = None
            if self.back is not None or (self._has_answered and self._blames_client):
                backend.responses[status // 100] += 1
                if self._session is None:
                    backend.durations.observe(service.clock.now - self.attempt_at)
            elif not self._blames_client:
                backend.responses[0] += 1
            backend.end()
        session = self._session
        if session is not None:
            session.end()
            self._body_bytes += session.received
            self._response_bytes += session.sent
            if session.ended_by:
                self.flag(session.ended_by)
            self._session = None
        if self._mirror is not None:
            self._mirror.abort()
        head = self._head
        version = _VERSIONS.get(head.version, 1) if head is not None else 1
        route = self._route.counters
        route.requests[version][status // 100 if status < 600 else 0] += 1
        route.durations[version].observe(service.clock.now - self._started)
        counters.request_bytes += self._body_bytes
        counters.response_bytes += self._response_bytes
        records = service.records
        if records is not None and records.wants():
            self._record(records)

    def _record(self, records: Records) -> None:
        """Tell the access log."""
        target = self._target
        if target is not None and target.pool.standing.is_panicking:
            self.flag("panic")
        last = self.last
        begun = self._started
        now = self.service.clock.now
        leased_at, headed_at = self.leased_at, self.headed_at
        records.take(
            now,
            self._head,
            self._asked,
            self.peer.ip,
            self.request_id,
            (
                self.service.name,
                self._route.name,
                target.pool.name if target is not None else "",
                last.id if last is not None else "",
                self._status,
                self.attempts,
                tuple(self.flags),
            ),
            (self._body_bytes, self._response_bytes),
            (
                now - begun,
                leased_at - begun if leased_at else None,
                headed_at - begun if headed_at else None,
            ),
        )

    def __repr__(self) -> str:
        return f"<Exchange {self.request_id.decode('ascii')} status={self._status} done={self.is_done}>"
