"""From an exchange to spans: names, attributes by the conventions, and whose fault a failure is."""

from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind

from expressgateway.exporter.otlp import Collector, url_of
from expressgateway.observe.spans import AttemptSpan, ExchangeSpan, decode, encode

TRACE, SPAN, CALLER, CHILD = "0a" * 16, "0b" * 8, "0c" * 8, "0d" * 8


def attempt(**changed: Any) -> AttemptSpan:
    values: dict[str, Any] = {
        "span_id": CHILD,
        "began_ns": 1_100,
        "ended_ns": 1_900,
        "backend": "b",
        "host": "192.0.2.9",
        "port": 80,
        "version": "1.1",
        "status": 200,
        "error": "",
    }
    return AttemptSpan(**{**values, **changed})


def exchange(*attempts: AttemptSpan, **changed: Any) -> ExchangeSpan:
    values: dict[str, Any] = {
        "trace_id": TRACE,
        "span_id": SPAN,
        "parent_id": CALLER,
        "flags": 1,
        "began_ns": 1_000,
        "ended_ns": 2_000,
        "listener": "web",
        "route": "api",
        "pool": "app",
        "method": "GET",
        "scheme": "https",
        "authority": "a.example:8443",
        "path": "/x",
        "version": "2",
        "client": "192.0.2.1",
        "agent": "curl",
        "status": 200,
        "grpc_status": -1,
        "request_bytes": 0,
        "response_bytes": 5,
        "error": "",
        "decided": [],
        "request_id": "r-1",
        "attempts": attempts,
    }
    return ExchangeSpan(**{**values, **changed})


@pytest.fixture(scope="module")
def collector() -> Collector:
    return Collector("http://127.0.0.1:9", "svc", 1.0)


def spans(collector: Collector, given: ExchangeSpan) -> list[ReadableSpan]:
    (again,) = [decode(line) for line in encode([given]).encode().splitlines()]
    assert again == given
    return list(collector.spans(given))


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("https://c/otlp", "https://c/otlp/v1/traces"),
        ("https://c/otlp/v1/traces", "https://c/otlp/v1/traces"),
    ],
)
def test_where(endpoint: str, url: str) -> None:
    assert url_of(endpoint) == url


def test_an_exchange(collector: Collector) -> None:
    own, tried = spans(collector, exchange(attempt(), decided=["queued"]))
    assert (own.name, own.kind, own.start_time, own.end_time) == ("GET api", SpanKind.SERVER, 1_000, 2_000)
    assert own.context is not None
    assert own.parent is not None
    assert f"{own.context.trace_id:032x}" == TRACE
    assert (f"{own.context.span_id:016x}", f"{own.parent.span_id:016x}") == (SPAN, CALLER)
    assert own.parent.is_remote
    assert dict(own.attributes or {}) == {
        "http.request.method": "GET",
        "url.scheme": "https",
        "url.path": "/x",
        "server.address": "a.example",
        "server.port": 8443,
        "client.address": "192.0.2.1",
        "network.protocol.version": "2",
        "user_agent.original": "curl",
        "http.response.status_code": 200,
        "http.request.body.size": 0,
        "http.response.body.size": 5,
        "expressgateway.listener": "web",
        "expressgateway.route": "api",
        "expressgateway.pool": "app",
        "expressgateway.request_id": "r-1",
        "expressgateway.flags": ("queued",),
    }
    assert own.resource.attributes["service.name"] == "svc"
    assert (tried.name, tried.kind, tried.parent) == ("GET", SpanKind.CLIENT, own.context)
    assert dict(tried.attributes or {}) == {
        "http.request.method": "GET",
        "server.address": "192.0.2.9",
        "server.port": 80,
        "network.protocol.version": "1.1",
        "http.response.status_code": 200,
        "expressgateway.pool": "app",
        "expressgateway.backend": "b",
    }


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"status": 404}, None),
        ({"status": 404, "error": "no_route"}, None),
        ({"status": 499, "error": "client_closed"}, None),
        ({"status": 500}, "500"),
        ({"status": 502, "error": "connect_refused"}, "connect_refused"),
        ({"status": 200, "error": "backend_truncated"}, "backend_truncated"),
        ({"status": 0, "error": "backend_reset"}, "backend_reset"),
        ({"status": 200, "grpc_status": 5}, None),
        ({"status": 200, "grpc_status": 13}, "13"),
        ({"status": 200, "grpc_status": 14, "error": "backends_down"}, "backends_down"),
    ],
)
def test_whose_fault(collector: Collector, changed: dict[str, Any], error: str | None) -> None:
    (own,) = spans(collector, exchange(**changed))
    assert (own.attributes or {}).get("error.type") == error
    assert own.status.is_ok == (error is None)
    sent = changed["status"] not in (0, 499)
    assert ("http.response.status_code" in (own.attributes or {})) == sent


def test_attempts_that_fail(collector: Collector) -> None:
    given = exchange(attempt(status=0, error="connect_refused", version=""), attempt(status=404), attempt())
    _, first, second, third = spans(collector, given)
    found = [dict(each.attributes or {}) for each in (first, second, third)]
    assert [each.get("error.type") for each in found] == ["connect_refused", "404", None]
    assert [each.get("http.request.resend_count") for each in found] == [None, 1, 2]
    assert [each.get("http.response.status_code") for each in found] == [None, 404, 200]
    assert "network.protocol.version" not in found[0]
    assert [each.status.is_ok for each in (first, second, third)] == [False, False, True]


def test_what_a_client_may_send(collector: Collector) -> None:
    (own,) = spans(
        collector, exchange(method="BREW", parent_id="", authority="[2001:db8::1]", agent="", route="")
    )
    assert own.name == "HTTP"
    assert own.parent is None
    found = own.attributes or {}
    assert (found["http.request.method"], found["http.request.method_original"]) == ("_OTHER", "BREW")
    assert found["server.address"] == "2001:db8::1"
    assert not {"server.port", "user_agent.original", "expressgateway.route"} & found.keys()


def test_nobody_there(collector: Collector) -> None:
    assert not Collector("http://127.0.0.1:9", "svc", 0.2).send([exchange()])
