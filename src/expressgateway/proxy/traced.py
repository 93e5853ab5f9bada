"""Exchanges that are recorded as spans: who is, and what is told of them.

Where a listener's service has a ``Tracer``, its exchanges are the ones of this module, and its forwarding
decides of each request whether it is recorded: a caller's decision is kept, of new traces a share is. What is
recorded gets a span of its own, below the caller's, and each attempt one below that: a backend sees the
attempt's. What is not recorded passes with the context it came with, so that no span points at one that
nobody has (docs/decisions/0024). Without a tracer nothing here is ever called.
"""

from typing import Any, Final

from expressgateway.observe.spans import AttemptSpan, ExchangeSpan, cut
from expressgateway.proxy.errors import Reason, reason_of_backend, reason_of_fault
from expressgateway.proxy.exchange import Exchange
from expressgateway.proxy.forwarding import Forwarding, Peer
from expressgateway.proxy.grpc import GrpcExchange
from expressgateway.proxy.route import Target
from expressgateway.proxy.service import HttpService
from expressgateway.proxy.trace_context import FLAGS, PARENT_ID, TRACE_ID
from expressgateway.proxy.tracer import Recorded, Tracer
from expressgateway.upstream.backend import Backend
from expressgateway.upstream.errors import UpstreamError
from expressgateway.wire.errors import WireError
from expressgateway.wire.head import RequestHead
from expressgateway.wire.sinks import ClientStream, ServerStream

_SAMPLED: Final = 0x01
_MAX_ATTEMPTS: Final = 32  # told of one exchange; there are fewer, but nobody bounds them in one place


class TracedForwarding(Forwarding):
    """Forwarding that decides who is recorded."""

    __slots__ = ("_tracer",)

    def __init__(self, tracer: Tracer, **rules: Any) -> None:  # noqa: ANN401 - as they are declared there
        """``rules``: those of ``Forwarding``."""
        super().__init__(**rules)
        self._tracer = tracer

    def request(self, head: RequestHead, peer: Peer) -> bytes:
        request_id = super().request(head, peer)
        first, (name, context) = head.headers
        if peer.kept_trace is None:
            if not self._tracer.wants_new(context):
                return request_id
            recorded = Recorded(context[: FLAGS.start] + b"01")
        elif int(context[FLAGS], 16) & _SAMPLED:
            recorded = Recorded(b"%b-%b-%b" % (context[: TRACE_ID.stop], self.ids.make(), context[FLAGS]))
            recorded.parent_id = context[PARENT_ID]
        else:
            return request_id
        head.headers = (first, (name, recorded))
        return request_id


class Trace:
    """What is noted of one recorded exchange. Times are the clock's."""

    __slots__ = ("_began_at", "_cause", "_span", "_tried", "attempts", "context", "reason", "version")

    def __init__(self, context: Recorded) -> None:
        self.context = context
        self.attempts: list[tuple[bytes, float, float, Backend, bytes, int, str]] = []
        """Those that have ended: span, beginning, end, backend, its version, its status, what went wrong."""
        self.reason = ""
        """Why the gateway ended the exchange."""
        # The attempt under way
        self._tried: Backend | None = None
        self._span = b""
        self._began_at = 0.0
        self._cause = ""
        self.version = b""

    @property
    def is_trying(self) -> bool:
        return self._tried is not None

    @property
    def child(self) -> bytes:
        """The trace parent for the attempt under way."""
        context = self.context
        return b"%b-%b-%b" % (context[: TRACE_ID.stop], self._span, context[FLAGS])

    def begin(self, backend: Backend, span: bytes, now: float) -> None:
        self.end(now)  # a stale connection is replaced without more ado
        self._tried, self._span, self._began_at = backend, span, now
        self._cause, self.version = "", b""

    def blame(self, reason: Reason) -> None:
        """The attempt under way fails by this."""
        self._cause = reason.value

    def end(self, now: float, status: int = 0, cause: str = "") -> None:
        """The attempt under way is over; nothing if there is none."""
        backend, self._tried = self._tried, None
        if backend is not None and len(self.attempts) < _MAX_ATTEMPTS:
            cause = cause if status else self._cause or cause
            self.attempts.append((self._span, self._began_at, now, backend, self.version, status, cause))


class Traced(Exchange):
    """What both kinds of exchange do beside their work."""

    __slots__ = ()

    _trace: Trace | None

    def __init__(self, service: HttpService, front: ServerStream, peer: Peer) -> None:
        super().__init__(service, front, peer)
        self._trace = None  # type: ignore[misc]  # a slot of the classes that are used: two bases cannot have some

    def _joined(self) -> Trace | None:
        """What is noted, if this exchange is recorded. Known once its head was made up for the backend."""
        if self._trace is None and self._head is not None:
            for _, value in self._head.headers:
                if type(value) is Recorded:
                    self._trace = Trace(value)  # type: ignore[misc]  # as above
        return self._trace

    # -- attempts --------------------------------------------------------------------------------------

    def _lease(self, target: Target) -> None:
        self._joined()
        super()._lease(target)

    def _ask(self, backend: Backend, fresh: bool) -> None:
        trace = self._trace
        if trace is not None:
            service = self.service
            trace.begin(backend, service.forwarding.ids.make(), service.clock.now)
        super()._ask(backend, fresh)

    def on_leased(self, stream: ClientStream) -> None:
        trace = self._joined()
        head = self._head
        if trace is not None and trace.is_trying and head is not None:
            trace.version = stream.version
            child = trace.child
            head.headers = tuple(
                (name, child if name == b"traceparent" else value) for name, value in head.headers
            )
        super().on_leased(stream)

    def on_lease_failed(self, error: UpstreamError) -> None:
        if self._trace is not None:
            self._trace.blame(reason_of_fault(error.fault))
        super().on_lease_failed(error)

    def on_response_abort(self, error: WireError) -> None:
        if self._trace is not None and not self.is_done:
            self._trace.blame(reason_of_backend(error))
        super().on_response_abort(error)

    def _time_out_attempt(self) -> None:
        if self._trace is not None:
            self._trace.blame(Reason.TRY_TIMEOUT)
        super()._time_out_attempt()

    def _leave_backend(self, status: int) -> None:
        if self._trace is not None:
            self._trace.end(self.service.clock.now, status)
        super()._leave_backend(status)

    # -- endings ---------------------------------------------------------------------------------------

    def _note(self, reason: Reason, detail: str = "") -> None:
        trace = self._joined()
        if trace is not None:
            trace.reason = reason.value
        super()._note(reason, detail)

    def _finish(self) -> None:
        trace = None if self.is_done else self._joined()
        if trace is not None:
            now = self.service.clock.now
            has_answer = self._has_answered or self._session is not None
            trace.end(now, self._status if has_answer else 0, trace.reason)
        super()._finish()
        tracer = self.service.tracer
        if trace is not None and tracer is not None:
            tracer.spans.put(self._told(trace, tracer))

    def _grpc_status(self) -> int:
        return -1

    def _told(self, trace: Trace, tracer: Tracer) -> ExchangeSpan:
        head = self._head
        if head is None:
            raise AssertionError("without a head nothing is recorded")
        now = self.service.clock.now
        # The clock stands while events are handled, so that what happened in one batch happened at once.
        since_ns = tracer.wall_ns() - round(now * 1e9)
        authority, target = self._asked or (head.authority, head.path)
        agent = next((value for name, value in head.shared.fields if name == b"user-agent"), b"")
        context = trace.context
        return ExchangeSpan(
            context[TRACE_ID].decode("ascii"),
            context[PARENT_ID].decode("ascii"),
            context.parent_id.decode("ascii"),
            int(context[FLAGS], 16),
            since_ns + round(self._started * 1e9),
            since_ns + round(now * 1e9),
            self.service.name,
            self._route.name,
            self._target.pool.name if self._target is not None else "",
            cut(head.method),
            cut(head.scheme),
            cut(authority),
            cut(target.partition(b"?")[0]),
            cut(head.version),
            cut(self.peer.ip),
            cut(agent),
            self._status,
            self._grpc_status(),
            self._body_bytes,
            self._response_bytes,
            trace.reason,
            tuple(self.flags),
            cut(self.request_id),
            tuple(
                AttemptSpan(
                    span.decode("ascii"),
                    since_ns + round(begun * 1e9),
                    since_ns + round(ended * 1e9),
                    backend.id,
                    backend.address[0],
                    backend.address[1],
                    version.decode("ascii"),
                    status,
                    cause,
                )
                for span, begun, ended, backend, version, status, cause in trace.attempts
            ),
        )


class TracedExchange(Traced):
    """An exchange of HTTP, or a WebSocket session."""

    __slots__ = ("_trace",)


class TracedGrpcExchange(Traced, GrpcExchange):
    """A gRPC call, or what else comes to a listener that takes some."""

    __slots__ = ("_trace",)

    def _grpc_status(self) -> int:
        call = self._call
        return -1 if call is None or call.code is None else int(call.code)


def open_exchange(service: HttpService, front: ServerStream, peer: Peer) -> Exchange:
    """The exchange for one request of a listener."""
    if service.tracer is not None:
        made = TracedExchange if service.grpc is None else TracedGrpcExchange
        return made(service, front, peer)
    return Exchange(service, front, peer) if service.grpc is None else GrpcExchange(service, front, peer)
