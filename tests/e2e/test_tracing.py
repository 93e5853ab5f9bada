"""Traces through running gateways: contexts from hop to hop, spans at a collector, collectors that fail."""

import itertools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cells import VERSIONS, call
from tests.e2e.collector import Collector, Told
from tests.e2e.harness import (
    Backend,
    BackendConnection,
    Client,
    Gateway,
    Steady,
    answer_ok,
    certificate,
    eventually,
    listener,
)
from tests.e2e.http_world import field, fields
from tests.e2e.talks import rest
from tests.ports import free_port

CALLER = "b7ad6b7169203331"


def new_trace() -> str:
    return secrets.token_hex(16)


def told_by(head: bytes) -> tuple[str, str, str]:
    """Trace, parent and flags in the one trace parent of a request."""
    (value,) = [value for name, value in fields(head) if name.lower() == "traceparent"]
    match = re.fullmatch(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})", value)
    assert match is not None
    return match[1], match[2], match[3]


def one(spans: list[Told], service: str, *, is_server: bool) -> Told:
    (found,) = [span for span in spans if span.service == service and span.is_server is is_server]
    return found


def tracing(collector: Collector, service: str = "gw", sample: float = 0.0) -> str:
    return (
        f"[observability.tracing]\nendpoint = '{collector.endpoint}'\n"
        f"service_name = '{service}'\nsample = {sample}\n"
    )


class Row:
    """A gateway, ``near``, before another one, ``far``, before a backend; both tell one collector."""

    def __init__(self, directory: Path) -> None:
        self.files = certificate(directory)
        self.ports = {middle: free_port() for middle in VERSIONS}
        self.clear = free_port()
        self.far_port = free_port()
        self.collector = Collector()
        self.backend = Backend(_script)
        self.near: Gateway
        self.far: Gateway

    @property
    def last(self) -> bytes:
        """The head of the last request that came through."""
        return self.backend.requests[-1][0]


def _script(connection: BackendConnection) -> None:
    while True:
        head, body = connection.request()
        connection.backend.requests.append((head, body))
        if b"upgrade: websocket" in head.lower():
            connection.send(
                b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
                b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
            )
            connection.rest()
            return
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Row]:
    directory = tmp_path_factory.mktemp("row")
    it = Row(directory)
    pair = f"cert_path = '{it.files.certificate}', key_path = '{it.files.key}'"
    secret = directory / "retry.secret"
    near = f"[[listeners]]\nname = 'clear'\naddress = '127.0.0.1:{it.clear}'\nprotocol = 'h1'\npool = 'h1'\n"
    near += "[listeners.websocket]\n"
    for middle, port in it.ports.items():
        for protocol, more in (
            ("h1s", f"tls = {{ {pair} }}"),
            ("quic", f"quic = {{ {pair}, retry_secret_path = '{secret}' }}"),
        ):
            near += (
                f"[[listeners]]\nname = '{protocol}-{middle}'\naddress = '127.0.0.1:{port}'\n"
                f"protocol = '{protocol}'\npool = '{middle}'\n{more}\n"
            )
        near += (
            f"[[pools]]\nname = '{middle}'\nbackends = [{{ address = '127.0.0.1:{it.far_port}', id = 'far'"
            f", protocol = '{middle}', tls = true, tls_ca_path = '{it.files.certificate}'"
            ", tls_verify_hostname = 'localhost' }]\n"
        )
    far = ""
    for protocol, more in (
        ("h1s", f"tls = {{ {pair} }}"),
        ("quic", f"quic = {{ {pair}, retry_secret_path = '{secret}' }}"),
    ):
        far += (
            f"[[listeners]]\nname = '{protocol}'\naddress = '127.0.0.1:{it.far_port}'\n"
            f"protocol = '{protocol}'\npool = 'app'\n{more}\n[listeners.websocket]\n"
        )
    far += f"[[pools]]\nname = 'app'\nbackends = [{{ address = '{it.backend.address}', id = 'b' }}]\n"
    (directory / "near").mkdir()
    (directory / "far").mkdir()
    with it.collector, it.backend:
        it.near = Gateway(directory / "near", tracing(it.collector, "near") + near)
        it.far = Gateway(directory / "far", tracing(it.collector, "far") + far)
        with it.near, it.far:
            yield it


class TestTwoGateways:
    @pytest.mark.parametrize(("front", "middle"), list(itertools.product(VERSIONS, VERSIONS)))
    def test_spans_are_joined(self, row: Row, front: str, middle: str) -> None:
        trace = new_trace()
        caller = VERSIONS[front].dial(row.files, row.ports[middle], True)
        context = (("traceparent", f"00-{trace}-{CALLER}-01"), ("tracestate", "a=1"))
        talk = call(caller, "/x?secret=1", *context)
        assert talk.read_head()[":status"] == "200"
        rest(talk)
        caller.close()
        spans = row.collector.of_trace(trace, 4)
        near, near_out = (one(spans, "near", is_server=is_server) for is_server in (True, False))
        far, far_out = (one(spans, "far", is_server=is_server) for is_server in (True, False))
        assert near.parent == CALLER
        assert (near_out.parent, far.parent, far_out.parent) == (near.id, near_out.id, far.id)
        assert told_by(row.last) == (trace, far_out.id, "01")
        assert field(row.last, "tracestate") == "a=1"
        assert near.name == "GET default"
        versions = {"h1": "1.1", "h2": "2", "h3": "3"}
        expected = {
            "http.request.method": "GET",
            "http.response.status_code": 200,
            "url.path": "/x",
            "url.scheme": "https",
            "server.address": "cells.example",
            "network.protocol.version": versions[front],
            "client.address": "127.0.0.1",
            "expressgateway.listener": f"{'quic' if front == 'h3' else 'h1s'}-{middle}",
            "expressgateway.route": "default",
        }
        assert near.attributes.items() >= expected.items()
        expected = {
            "server.address": "127.0.0.1",
            "server.port": row.far_port,
            "expressgateway.backend": "far",
            "network.protocol.version": versions[middle],
            "http.response.status_code": 200,
        }
        assert near_out.attributes.items() >= expected.items()
        assert not any(span.is_error for span in spans)
        assert "secret" not in repr(spans)

    def test_a_websocket_session(self, row: Row) -> None:
        trace = new_trace()
        with Client(row.clear) as client:
            client.send(
                b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
                + f"traceparent: 00-{trace}-{CALLER}-01\r\n\r\n".encode()
            )
            assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
            assert not [span for span in row.collector.spans if span.trace == trace]
            context = told_by(row.last)
        spans = row.collector.of_trace(trace, 4)
        assert context == (trace, one(spans, "far", is_server=False).id, "01")
        assert {span.attributes["http.response.status_code"] for span in spans} == {101}

    def test_what_is_not_recorded_passes_as_it_came(self, row: Row) -> None:
        trace = new_trace()
        with Client(row.clear) as client:
            client.send(f"GET / HTTP/1.1\r\nHost: a\r\ntraceparent: 00-{trace}-{CALLER}-00\r\n\r\n".encode())
            assert client.response()[0] == 200
        assert told_by(row.last) == (trace, CALLER, "00")

    @pytest.mark.parametrize("lines", ["", "traceparent: {}\r\ntraceparent: {}\r\n", "traceparent: x\r\n"])
    def test_what_is_not_valid_begins_anew(self, row: Row, lines: str) -> None:
        trace = new_trace()
        lines = lines.replace("{}", f"00-{trace}-{CALLER}-01") + "tracestate: a=1\r\n"
        with Client(row.clear) as client:
            client.send(f"GET / HTTP/1.1\r\nHost: a\r\n{lines}\r\n".encode())
            assert client.response()[0] == 200
        context = told_by(row.last)
        assert context[0] != trace
        assert context[2] == "00"
        assert field(row.last, "tracestate") is None

    def test_a_failure(self, row: Row) -> None:
        trace = new_trace()
        with Client(row.clear) as client:
            client.send(
                f"GET /%2e%2e/ HTTP/1.1\r\nHost: a\r\ntraceparent: 00-{trace}-{CALLER}-01\r\n\r\n".encode()
            )
            assert client.response()[0] == 400
        (span,) = row.collector.of_trace(trace, 1)
        assert span.attributes["expressgateway.flags"] == ["bad_path"]
        assert span.attributes["http.response.status_code"] == 400
        assert not span.is_error, "it is the client's"

    def test_where_and_how_it_is_told(self, row: Row) -> None:
        row.collector.until(lambda it: it.spans, "a span")
        assert row.collector.paths == {"/v1/traces"}
        assert row.collector.headers["content-type"] == "application/x-protobuf"
        row.near.wait_metric("trace_spans_exported_total")
        assert row.near.metric("trace_spans_dropped_total") == 0


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as it:
        yield it


def get(port: int, trace: str = "") -> None:
    with Client(port) as client:
        context = f"traceparent: 00-{trace}-{CALLER}-01\r\n" if trace else ""
        client.send(f"GET / HTTP/1.1\r\nHost: a\r\n{context}\r\n".encode())
        assert client.response()[0] == 200


def exporters_of(gateway: Gateway) -> list[int]:
    return [
        pid
        for pid in gateway.worker_pids()
        if b"expressgateway.exporter" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, int, str]]:
    """A gateway without tracing, its port, and its configuration: each test has its own collector."""
    port = free_port()
    with Backend(answer_ok) as backend:
        web = listener(port, backend)
        directory = tmp_path_factory.mktemp("alone")
        with Gateway(directory, web, runtime="max_keepalive_requests = 0") as gateway:
            yield gateway, port, web


class TestCollector:
    def test_one_that_does_not_answer_disturbs_nobody(
        self, alone: tuple[Gateway, int, str], collector: Collector
    ) -> None:
        gateway, port, web = alone
        collector.may_answer.clear()
        assert gateway.reload(tracing(collector, sample=1.0) + web)
        with Steady(port), Collector() as other:
            collector.until(lambda it: it.requests, "it is asked")
            assert gateway.reload(tracing(other, sample=1.0) + web)
            other.until(lambda it: it.spans, "another one is told")
            gateway.wait_metric(
                "trace_spans_dropped_total", reason="lost"
            )  # the old exporter's time was over
            assert gateway.reload(web)

    def test_one_that_refuses(self, alone: tuple[Gateway, int, str], collector: Collector) -> None:
        gateway, port, web = alone
        before = gateway.metric("trace_spans_dropped_total", reason="refused")
        exported = gateway.metric("trace_spans_exported_total")
        collector.status = 400
        assert gateway.reload(tracing(collector) + web)
        get(port, new_trace())
        gateway.wait_metric("trace_spans_dropped_total", before + 2, reason="refused")
        lines = [json.loads(line) for line in gateway.log().splitlines()]
        said = [line["message"] for line in lines if line["process"] == "exporter"]
        assert "the collector took no spans: they are dropped" in said
        collector.status = 200
        trace = new_trace()
        get(port, trace)
        collector.of_trace(trace, 2)
        gateway.wait_metric("trace_spans_exported_total", exported + 2)

    def test_a_dead_exporter_is_replaced(self, alone: tuple[Gateway, int, str], collector: Collector) -> None:
        gateway, port, web = alone
        assert gateway.reload(tracing(collector) + web)
        eventually(lambda: len(exporters_of(gateway)) == 1, "the one of another test is gone")
        (first,) = exporters_of(gateway)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: exporters_of(gateway) not in ([first], []), "there is another")
        assert "the exporter of spans was killed by SIGKILL" in gateway.log()
        trace = new_trace()
        get(port, trace)
        collector.of_trace(trace, 2)

    def test_reload(self, alone: tuple[Gateway, int, str], collector: Collector) -> None:
        gateway, port, web = alone
        assert gateway.reload(web)
        eventually(lambda: len(gateway.worker_pids()) == 1, "no exporter is left")
        get(port, new_trace())
        with Collector() as other:
            assert gateway.reload(tracing(collector) + web)
            first = new_trace()
            get(port, first)
            assert gateway.reload(tracing(other, "renamed") + web)
            second = new_trace()
            get(port, second)
            assert {span.service for span in other.of_trace(second, 2)} == {"renamed"}
            collector.of_trace(first, 2)  # told before, and not lost by the change
            assert gateway.reload(tracing(other, "renamed", 1.0) + web)
            get(port)
            other.until(lambda it: len(it.spans) == 4, "a new trace is recorded")
            assert gateway.reload(web)
            eventually(lambda: len(gateway.worker_pids()) == 1, "no exporter is left")
            get(port, new_trace())
            assert (len(collector.spans), len(other.spans)) == (2, 4)

    def test_what_is_left_is_told_at_the_end(self, tmp_path: Path, collector: Collector) -> None:
        port, trace = free_port(), new_trace()
        with Backend(answer_ok) as backend:
            with Gateway(tmp_path, tracing(collector) + listener(port, backend)):
                get(port, trace)
            collector.of_trace(trace, 2)


def test_without_the_libraries_it_is_a_mistake(tmp_path: Path) -> None:
    shadow = tmp_path / "opentelemetry"
    shadow.mkdir()
    (shadow / "__init__.py").touch()  # a package without those below it
    config = tmp_path / "c.toml"
    config.write_text(
        "[observability.tracing]\nendpoint = 'http://127.0.0.1:4318'\n" + listener(free_port(), "127.0.0.1:1")
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "expressgateway", str(config)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 78
    assert "pip install 'expressgateway[otlp]'" in done.stderr
