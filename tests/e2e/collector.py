"""A collector of spans: OTLP over HTTP, read with the protocol's own definitions, and told how to behave."""

import gzip
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.e2e.harness import eventually


class Told:
    """One span, as it came."""

    def __init__(self, service: str, span: Span) -> None:
        self.service = service
        self.kind = span.kind
        self.name = span.name
        self.trace = span.trace_id.hex()
        self.id = span.span_id.hex()
        self.parent = span.parent_span_id.hex()
        self.is_error = span.status.code == 2
        self.ns = span.end_time_unix_nano - span.start_time_unix_nano
        self.attributes: dict[str, object] = {}
        for each in span.attributes:
            kind = each.value.WhichOneof("value")
            value: object = getattr(each.value, kind) if kind is not None else None
            if kind == "array_value":
                value = [one.string_value for one in each.value.array_value.values]
            self.attributes[each.key] = value

    @property
    def is_server(self) -> bool:
        return self.kind == Span.SPAN_KIND_SERVER

    def __repr__(self) -> str:
        return f"<{self.service} {self.name} {self.trace} {self.id} of {self.parent} {self.attributes}>"


class Collector:
    """See the module's text. ``status`` is what it answers; unless ``may_answer`` is set, nothing."""

    def __init__(self) -> None:
        self.status = 200
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.paths: set[str] = set()
        self.headers: dict[str, str] = {}
        self.requests = 0
        self.spans: list[Told] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 20.0

            def do_POST(self) -> None:
                collector.take(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def take(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["content-length"]))
        if handler.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.requests += 1
        self.paths.add(handler.path)
        self.headers = {name.lower(): value for name, value in handler.headers.items()}
        self.may_answer.wait(30.0)
        if self.status == 200:
            self.spans += _read(body)
        try:
            handler.send_response(self.status)
            handler.send_header("content-length", "0")
            handler.end_headers()
        except OSError:
            handler.close_connection = True

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.may_answer.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def of_trace(self, trace: str, number: int) -> list[Told]:
        """Its spans, once there are so many."""
        found: list[Told] = []

        def are_there() -> bool:
            found[:] = [span for span in self.spans if span.trace == trace]
            return len(found) >= number

        eventually(are_there, f"{number} spans of trace {trace}")
        assert len(found) == number, found
        return found

    def until(self, check: Callable[[Self], object], what: str) -> None:
        eventually(lambda: bool(check(self)), what)


def _read(body: bytes) -> Iterator[Told]:
    message = ExportTraceServiceRequest()
    message.ParseFromString(body)
    for resource in message.resource_spans:
        named = {each.key: each.value.string_value for each in resource.resource.attributes}
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Told(named["service.name"], span)
