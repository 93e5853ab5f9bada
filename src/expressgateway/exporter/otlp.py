"""From an exchange to OpenTelemetry's spans, by its conventions for HTTP and gRPC, and on to a collector.

https://opentelemetry.io/docs/specs/semconv/http/http-spans/. What is ours alone is under ``expressgateway.``.
"""

import socket
from collections.abc import Iterable, Iterator
from typing import Final
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from expressgateway import __version__
from expressgateway.observe.spans import AttemptSpan, ExchangeSpan

SIGNAL_PATH: Final = "/v1/traces"  # of OTLP over HTTP, below an endpoint

Attributes = dict[str, str | int | tuple[str, ...]]

_METHODS: Final = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"}
)
_NEVER_SENT: Final = 499
# Of a server's span: UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS.
_GRPC_ERRORS: Final = frozenset({2, 4, 12, 13, 14, 15})


def url_of(endpoint: str) -> str:
    """Where spans are sent: below the endpoint, unless it names the place already."""
    path = urlsplit(endpoint).path
    return endpoint if path.endswith(SIGNAL_PATH) else endpoint.rstrip("/") + SIGNAL_PATH


class Collector:
    """Sends spans to one collector."""

    def __init__(self, endpoint: str, service_name: str, patience_s: float) -> None:
        """``patience_s``: for one batch, with its repetitions. Headers, and whom to trust, come from the
        environment, by the names that OpenTelemetry gave them."""
        self._exporter = OTLPSpanExporter(url_of(endpoint), timeout=patience_s, compression=Compression.Gzip)
        self._resource = Resource.create(
            {"service.name": service_name, "service.version": __version__, "host.name": socket.gethostname()}
        )
        self._scope = InstrumentationScope("expressgateway", __version__)

    def send(self, exchanges: Iterable[ExchangeSpan]) -> bool:
        """Whether the collector took them. Blocks for ``patience_s`` at most."""
        spans = [span for exchange in exchanges for span in self.spans(exchange)]
        return self._exporter.export(spans) is SpanExportResult.SUCCESS

    def spans(self, exchange: ExchangeSpan) -> Iterator[ReadableSpan]:
        """The exchange's own, then one for each attempt."""
        trace, flags = int(exchange.trace_id, 16), TraceFlags(exchange.flags)
        own = SpanContext(trace, int(exchange.span_id, 16), is_remote=False, trace_flags=flags)
        parent = None
        if exchange.parent_id:
            parent = SpanContext(trace, int(exchange.parent_id, 16), is_remote=True, trace_flags=flags)
        attributes = _of_exchange(exchange)
        error = attributes.get("error.type")
        yield ReadableSpan(
            name=_name(exchange),
            context=own,
            parent=parent,
            resource=self._resource,
            attributes=attributes,
            kind=SpanKind.SERVER,
            status=Status(StatusCode.ERROR, str(error)) if error else Status(),
            start_time=exchange.began_ns,
            end_time=exchange.ended_ns,
            instrumentation_scope=self._scope,
        )
        for number, attempt in enumerate(exchange.attempts):
            attributes = _of_attempt(exchange, attempt, number)
            error = attributes.get("error.type")
            yield ReadableSpan(
                name=_method(exchange),
                context=SpanContext(trace, int(attempt.span_id, 16), is_remote=False, trace_flags=flags),
                parent=own,
                resource=self._resource,
                attributes=attributes,
                kind=SpanKind.CLIENT,
                status=Status(StatusCode.ERROR, str(error)) if error else Status(),
                start_time=attempt.began_ns,
                end_time=attempt.ended_ns,
                instrumentation_scope=self._scope,
            )


def _method(exchange: ExchangeSpan) -> str:
    """For names: there must be few of them."""
    return exchange.method if exchange.method in _METHODS else "HTTP"


def _name(exchange: ExchangeSpan) -> str:
    return f"{_method(exchange)} {exchange.route}" if exchange.route else _method(exchange)


def _of_exchange(exchange: ExchangeSpan) -> Attributes:
    found = _of_method(exchange)
    host, port = _host_and_port(exchange.authority)
    for name, text in (
        ("url.scheme", exchange.scheme),
        ("url.path", exchange.path),
        ("server.address", host),
        ("client.address", exchange.client),
        ("network.protocol.version", exchange.version),
        ("user_agent.original", exchange.agent),
        ("expressgateway.listener", exchange.listener),
        ("expressgateway.route", exchange.route),
        ("expressgateway.pool", exchange.pool),
        ("expressgateway.request_id", exchange.request_id),
    ):
        if text:
            found[name] = text
    if port:
        found["server.port"] = port
    if exchange.status not in (0, _NEVER_SENT):
        found["http.response.status_code"] = exchange.status
    found["http.request.body.size"] = exchange.request_bytes
    found["http.response.body.size"] = exchange.response_bytes
    if exchange.decided:
        found["expressgateway.flags"] = tuple(exchange.decided)
    if exchange.grpc_status >= 0:
        found["rpc.system"] = "grpc"
        found["rpc.grpc.status_code"] = exchange.grpc_status
    if error := _error_of(exchange):
        found["error.type"] = error
    return found


def _error_of(exchange: ExchangeSpan) -> str:
    """What a server is to blame for; a client's mistakes are none of its errors."""
    status = exchange.status
    if status >= 500:
        return exchange.error or str(status)
    if exchange.grpc_status in _GRPC_ERRORS:
        return exchange.error or str(exchange.grpc_status)
    return exchange.error if status < 400 else ""  # it had begun and was cut short


def _of_attempt(exchange: ExchangeSpan, attempt: AttemptSpan, number: int) -> Attributes:
    found = _of_method(exchange)
    found |= {
        "server.address": attempt.host,
        "server.port": attempt.port,
        "expressgateway.pool": exchange.pool,
        "expressgateway.backend": attempt.backend,
    }
    if attempt.version:
        found["network.protocol.version"] = attempt.version
    if number:
        found["http.request.resend_count"] = number
    if attempt.status:
        found["http.response.status_code"] = attempt.status
    if attempt.error or attempt.status >= 400:
        found["error.type"] = attempt.error or str(attempt.status)
    return found


def _of_method(exchange: ExchangeSpan) -> Attributes:
    if exchange.method in _METHODS:
        return {"http.request.method": exchange.method}
    return {"http.request.method": "_OTHER", "http.request.method_original": exchange.method}


def _host_and_port(authority: str) -> tuple[str, int]:
    """0: it names no port."""
    host, colon, port = authority.rpartition(":")
    if colon and port.isascii() and port.isdecimal() and len(port) <= 5:
        return host.strip("[]"), int(port)
    return authority.strip("[]"), 0
