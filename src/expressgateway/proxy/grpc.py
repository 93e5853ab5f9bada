"""An exchange that knows gRPC: for listeners with a ``grpc`` block, in the place of the plain one.

A request is a *call* if it says so by its method and content type; every other is served as by the plain
exchange. What a call has beside that:

- Its deadline (``grpc-timeout``), clamped to the listener's and enforced to its end. While it runs, the
  listener's times do not: a stream may be silent for as long as its caller allows. Without one there are the
  listener's head and body times, but ``total_timeout_ms`` and the least rate of uploads hold for no call:
  they would end streams that are well.
- Whatever the gateway says of it is a status in gRPC's terms: with HTTP 200 and no body if there was no
  response yet; at the end of the stream, if the client has got whole messages and can take it; else the
  stream is reset.
- A backend's RST_STREAM goes on to the client as it is, before its response as well as within.
- gRPC-Web is translated (``grpc_web``), health is answered (``grpc_health``), its status is counted.
"""

import math
from typing import Final

from expressgateway.proxy.answers import proxy_status
from expressgateway.proxy.errors import Reason, status_of
from expressgateway.proxy.exchange import Exchange
from expressgateway.proxy.forwarding import Peer
from expressgateway.proxy.grpc_health import CHECK, WATCH, Health, HealthStream
from expressgateway.proxy.grpc_status import (
    CONTENT_TYPE,
    MESSAGE,
    STATUS,
    TIMEOUT,
    Code,
    code_of,
    code_of_http,
    code_of_reset,
    field_of,
    seconds_of,
    status_fields,
    status_in,
    subtype_of,
    timeout_of,
)
from expressgateway.proxy.grpc_web import WebBridge
from expressgateway.proxy.rewriting import Answer
from expressgateway.proxy.route import Route, Timeouts
from expressgateway.proxy.service import HttpService
from expressgateway.wire.errors import StreamResetError, WireError
from expressgateway.wire.head import NO_FIELDS, Field, Fields, RequestHead, ResponseHead
from expressgateway.wire.sinks import ServerStream

_FREE: Final = Timeouts(header=math.inf, body=math.inf, total=0.0, head=math.inf, idle=math.inf)
_PREFIX: Final = 5  # a flag and a length before each message
_OF_STATUS: Final = frozenset({STATUS, MESSAGE, b"grpc-status-details-bin"})
_CANNOT_HEAR: Final = frozenset({Reason.CLIENT_CLOSED, Reason.SLOW_READER})


class Call:
    """What a gRPC exchange knows beside what every exchange does."""

    __slots__ = ("_left", "_prefix", "code", "deadline_at", "timeouts", "web")

    def __init__(self, web: WebBridge | None) -> None:
        self.web = web
        self.deadline_at = 0.0  # seconds; 0: none
        self.code: Code | None = None
        """The status as far as it is known."""
        self.timeouts: Timeouts | None = None
        self._left = 0  # bytes of a message that are still to come
        self._prefix = b""  # of one of which fewer than five bytes have come

    @property
    def is_between_messages(self) -> bool:
        """Whether the client has got whole messages only."""
        return not self._left and not self._prefix

    def follow(self, chunk: bytes) -> None:
        """Response bytes pass."""
        size = len(chunk)
        at = self._left
        if at > size:
            # fast path: the middle of a message
            self._left = at - size
            return
        self._left = 0
        if self._prefix:
            missing = _PREFIX - len(self._prefix)
            prefix = self._prefix + chunk[:missing]
            if len(prefix) < _PREFIX:
                self._prefix = prefix
                return
            self._prefix = b""
            at = missing + int.from_bytes(prefix[1:], "big")
        while at + _PREFIX <= size:
            at += _PREFIX + int.from_bytes(chunk[at + 1 : at + _PREFIX], "big")
        if at > size:
            self._left = at - size
        else:
            self._prefix = chunk[at:]


class GrpcExchange(Exchange):
    """See the module's text."""

    __slots__ = ("_call",)

    def __init__(self, service: HttpService, front: ServerStream, peer: Peer) -> None:
        super().__init__(service, front, peer)
        self._call: Call | None = None  # it is one

    # -- the request -----------------------------------------------------------------------------------

    def refuse(self, error: WireError, head: RequestHead | None = None) -> None:
        if head is not None:
            self._call = _call_of(head)
        super().refuse(error, head)

    def on_request(self, head: RequestHead, end: bool) -> None:
        rules = self.service.grpc
        subtype = None
        if rules is not None and head.method == b"POST":
            subtype = subtype_of(field_of(head.headers, b"content-type"))
        if rules is None or subtype is None:
            super().on_request(head, end)
            return
        web = None
        if subtype.startswith(b"-"):
            web = WebBridge(subtype, field_of(head.headers, b"accept"))
        elif head.version.startswith(b"1"):
            self._refuse_call(head, end, Reason.UNSUPPORTED_MEDIA)
            return
        self._call = call = Call(web)
        if not self._take_deadline(head, call, rules.max_deadline_s):
            self._refuse_call(head, end, Reason.BAD_DEADLINE)
            return
        if web is not None:
            head.headers = tuple(
                (name, web.content_type if name == b"content-type" else value) for name, value in head.headers
            )
            head.accepts_trailers = True
            if web.is_text:
                head.content_length = None
        if rules.health is not None and head.path in (CHECK, WATCH):
            self._ask_ourselves(head, end, rules.health)
            return
        super().on_request(head, end)

    def _take_deadline(self, head: RequestHead, call: Call, most_s: int) -> bool:
        values = [value for name, value in head.headers if name == TIMEOUT]
        if not values:
            return True
        try:
            if len(values) > 1:
                return False
            seconds = seconds_of(values[0])
        except ValueError:
            return False
        if seconds > most_s:
            seconds = most_s
            clamped = timeout_of(most_s)
            head.headers = tuple(
                (name, clamped if name == TIMEOUT else value) for name, value in head.headers
            )
            self.flag("grpc_deadline_clamped")
            self.service.counters.security.add("grpc_deadline_clamped")
        call.deadline_at = self._started + seconds
        return True

    def _refuse_call(self, head: RequestHead, end: bool, reason: Reason) -> None:
        self._accept(head, end)
        self._go_by(self._route, head, end, reason)

    def _accept(self, head: RequestHead, end: bool) -> None:
        self._head = head
        if end:
            self._request_end = True
            self._uploaded_at = self._started

    def _ask_ourselves(self, head: RequestHead, end: bool, health: Health) -> None:
        reason = self.service.judge(head, self.peer)
        if reason is not None:
            self._refuse_call(head, end, reason)
            return
        self._accept(head, end)
        self.request_id = self.service.forwarding.request(head, self.peer)
        self.on_leased(HealthStream(health, self, head.path == WATCH))

    def on_request_data(self, chunk: bytes, end: bool) -> None:
        call = self._call
        if call is not None and call.web is not None and not self.is_done:
            try:
                chunk = call.web.decode(chunk, end)
            except ValueError:
                self._end_with(Reason.MALFORMED, "the body is not base64")
                return
        super().on_request_data(chunk, end)

    def on_request_trailers(self, fields: Fields) -> None:
        call = self._call
        if call is not None and call.web is not None and not self.is_done:
            try:
                call.web.decode(b"", True)
            except ValueError:
                self._end_with(Reason.MALFORMED, "the body is not base64")
                return
        super().on_request_trailers(fields)

    # -- the response ----------------------------------------------------------------------------------

    def on_response(self, head: ResponseHead, end: bool) -> None:
        call = self._call
        if call is None or self.is_done:
            super().on_response(head, end)
            return
        subtype = subtype_of(field_of(head.headers, b"content-type"))
        if subtype is None or subtype.startswith(b"-"):
            self._translate(head.status, end)
            return
        call.code = status_in(head.headers)
        web = call.web
        if web is None:
            super().on_response(head, end)
            return
        trailers = NO_FIELDS
        if end:
            # Metadata of such a response is trailing metadata; but browsers look for some of it in the head.
            trailers = tuple(field for field in head.headers if field[0] != b"content-type")
            head.headers = tuple(field for field in head.headers if field[0] not in _OF_STATUS)
        kind = web.answer_type(subtype)
        head.headers = tuple(
            (name, kind if name == b"content-type" else value) for name, value in head.headers
        )
        head.content_length = None
        super().on_response(head, False)
        if end:
            super().on_response_data(web.last_frame(trailers), True)

    def _translate(self, status: int, end: bool) -> None:
        """What answered was no gRPC server: say what its HTTP status means."""
        self._succeed(status)
        self._has_backend_begun = self._has_answered = True
        self._leave_backend(status)
        if end and self._request_end:
            self.back = None  # it has ended: its connection can be used again
        self.flag("grpc_translated")
        self._send_code(code_of_http(status), f"HTTP status {status}, and no gRPC, from the backend")

    def on_response_data(self, chunk: bytes, end: bool) -> None:
        call = self._call
        if call is None or self.is_done:
            super().on_response_data(chunk, end)
            return
        call.follow(chunk)
        web = call.web
        if web is None:
            super().on_response_data(chunk, end)
            return
        if chunk:
            super().on_response_data(web.encode(chunk), False)
        if end:
            # A call without a status; its client would wait for one.
            call.code = Code.UNKNOWN
            text = "the backend's response has no status"
            super().on_response_data(web.last_frame(status_fields(call.code, text)), True)

    def on_response_trailers(self, fields: Fields) -> None:
        call = self._call
        if call is not None and not self.is_done:
            call.code = status_in(fields)
            if call.web is not None:
                super().on_response_data(call.web.last_frame(fields), True)
                return
        super().on_response_trailers(fields)

    # -- what the gateway says -------------------------------------------------------------------------

    def _end_with(self, reason: Reason, detail: str = "", error: WireError | None = None) -> None:
        call = self._call
        if call is None:
            super()._end_with(reason, detail, error)
            return
        was_reset = isinstance(error, StreamResetError)
        call.code = code_of_reset(error.code) if isinstance(error, StreamResetError) else code_of(reason)
        if not self._response_begun:
            if not was_reset or call.web is not None:
                super()._end_with(reason, detail, error)
                return
            # As the backend ended it: no answer of ours could tell the client more.
            self._note(reason, detail)
            self._let_go()
            self._status = status_of(reason)
            self._finish()
            self.front.abort(error)
        elif (
            was_reset
            or reason in _CANNOT_HEAR
            or not call.is_between_messages
            or self._back_is_paused
            or self.front.unsent()
        ):
            super()._end_with(reason, detail, error)
        else:
            self._note(reason, detail)
            self._let_go()
            trailers = status_fields(call.code, _text_of(reason, detail))
            if call.web is None:
                self.front.send_trailers(trailers)
            else:
                frame = call.web.last_frame(trailers)
                self._response_bytes += len(frame)
                self.front.send_data(frame, True)
            self._finish()

    def _answer(self, reason: Reason, detail: str = "") -> None:
        call = self._call
        if call is None and self._head is not None:
            call = self._call = _call_of(self._head)  # one by another method than POST
        if call is None:
            super()._answer(reason, detail)
            return
        self._note(reason, detail)
        text = _text_of(reason, detail)
        field = (b"proxy-status", proxy_status(self.service.proxy_status_name, reason, text))
        code = call.code if call.code is not None else code_of(reason)
        self._send_code(code, text, field)

    def _send_made(self, route: Route, made: Answer | None) -> None:
        if self._call is None or made is None:
            super()._send_made(route, made)
        else:
            self._send_code(code_of_http(made[0]), f"HTTP status {made[0]}, and no gRPC, from the route")

    def _send_code(self, code: Code, text: str, *more: Field) -> None:
        """Answer with a status and nothing else."""
        self._let_go()
        call = self._call
        service = self.service
        fields = service.forwarding.own(service.wall_s())
        fields += [(b"x-request-id", self.request_id), *more]
        if self.attempts > 1:
            fields.append(self._attempts_field())
        trailers = status_fields(code, text)
        body = b""
        kind = CONTENT_TYPE
        if call is not None:
            call.code = code
            if call.web is not None:
                kind = call.web.answer_type(b"")
                body = call.web.last_frame(trailers)
                trailers = NO_FIELDS
        head = ResponseHead(200, ((b"content-type", kind), *trailers, *fields), len(body) if body else None)
        self._send_own(head, body)

    def _finish(self) -> None:
        call = self._call
        if call is not None and not self.is_done:
            # Without a status at its end a call is UNKNOWN to its client.
            code = call.code if call.code is not None else Code.UNKNOWN
            self.service.counters.grpc[code] += 1
        super()._finish()

    # -- deadlines -------------------------------------------------------------------------------------

    @property
    def timeouts(self) -> Timeouts:
        call = self._call
        given = self._route.timeouts
        if call is None:
            return given
        is_read = not (self._response_begun and self._back_is_paused)
        if is_read and (call.deadline_at or (isinstance(self.back, HealthStream) and self.back.is_watch)):
            return _FREE
        if call.timeouts is None:
            call.timeouts = Timeouts(given.header, given.body, 0.0, given.head, given.idle)
        return call.timeouts

    def sweep(self, now: float) -> None:
        call = self._call
        if call is not None and not self.is_done:
            if call.deadline_at and now >= call.deadline_at:
                self._end_with(Reason.GRPC_DEADLINE, "the call's deadline is over")
                return
            if isinstance(self.back, HealthStream):
                self.back.refresh()
        super().sweep(now)

    def _sweep_rate(self, now: float) -> None:
        if self._call is None:
            super()._sweep_rate(now)

    def leave(self) -> None:
        if isinstance(self.back, HealthStream) and not self.is_done:
            self.back.leave()


def _call_of(head: RequestHead) -> Call | None:
    """How to answer one whose content type says gRPC, whatever else is wrong with it; ``None``: as HTTP."""
    fields = (*head.shared.fields, *head.headers)  # it may be made up for the backend already
    subtype = subtype_of(field_of(fields, b"content-type"))
    if subtype is None:
        return None
    is_web = subtype.startswith(b"-")
    if not is_web and head.version.startswith(b"1"):
        return None  # HTTP/1 carries no calls but those of gRPC-Web
    return Call(WebBridge(subtype, field_of(fields, b"accept")) if is_web else None)


def _text_of(reason: Reason, detail: str) -> str:
    return f"{reason.value}: {detail}" if detail else reason.value.replace("_", " ")
