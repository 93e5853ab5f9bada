"""Backends that speak HTTP/2: one that is told what to do (by the `h2` library), and servers of other makers.

``H2There`` is a backend's end of one connection; a script of a ``harness.Backend`` drives it from its thread.
``backend_table`` is the backend as the configuration names it, ``World`` a gateway before one pool,
``app`` what hypercorn runs.
"""

import contextlib
import ssl
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    RequestReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes, Settings

from expressgateway.demo.certificate import CertificateFiles
from tests.e2e.h2_raw import RawH2, request
from tests.e2e.harness import BackendConnection, Client, Gateway, House, eventually, server

GET = b"GET /x HTTP/1.1\r\nHost: a.example\r\n\r\n"
Pairs = list[tuple[str, str]]
CHUNK = 16_384


class Request:
    """One stream, as far as it has come."""

    def __init__(self, stream: int, fields: Pairs) -> None:
        self.stream = stream
        self.fields = fields
        self.body = bytearray()
        self.trailers: Pairs = []
        self.is_complete = False
        self.is_answered = False
        self.reset: int | None = None

    def get(self, name: str) -> str | None:
        found = [value for each, value in self.fields if each == name]
        return ", ".join(found) if found else None

    @property
    def path(self) -> str:
        return self.get(":path") or ""


class H2There:
    """See the module's text. Raises ``EOFError`` when the gateway closes."""

    def __init__(self, connection: BackendConnection, **settings: int) -> None:
        self.connection = connection
        self.h2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        offered = {SettingCodes[name.upper()]: value for name, value in settings.items()}
        self.h2.local_settings = Settings(client=False, initial_values=offered)
        self.requests: dict[int, Request] = {}
        self.goaway: int | None = None
        """The code of the gateway's GOAWAY."""
        self.h2.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self.connection.send(self.h2.data_to_send())

    def read(self) -> None:
        """What comes next, and its effect."""
        data = self.connection.sock.recv(262_144)
        if not data:
            raise EOFError
        for event in self.h2.receive_data(data):
            self._take(event)
        self.flush()

    def _take(self, event: object) -> None:
        if isinstance(event, RequestReceived):
            self.requests[event.stream_id] = Request(event.stream_id, event.headers)  # type: ignore[arg-type]  # as text
        elif isinstance(event, DataReceived):
            self.requests[event.stream_id].body += event.data
            self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, TrailersReceived):
            self.requests[event.stream_id].trailers = event.headers  # type: ignore[assignment]  # as above
        elif isinstance(event, StreamEnded):
            self.requests[event.stream_id].is_complete = True
        elif isinstance(event, StreamReset):
            self.requests[event.stream_id].reset = event.error_code
        elif isinstance(event, ConnectionTerminated):
            self.goaway = event.error_code

    def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self.read()

    def wait(self, count: int, *, complete: bool = True) -> list[Request]:
        """So many requests, each to its end unless told otherwise."""

        def have() -> list[Request]:
            return [each for each in self.requests.values() if each.is_complete or not complete]

        self.until(lambda: len(have()) >= count)
        return have()

    def head(self, stream: int, status: int = 200, *more: tuple[str, str], end: bool = False) -> None:
        self.requests[stream].is_answered = True
        self.h2.send_headers(stream, [(":status", str(status)), *more], end_stream=end)
        self.flush()

    def body(self, stream: int, body: bytes, *, end: bool = True) -> None:
        """As the windows allow; stops if the stream is reset."""
        view = memoryview(body)
        while view and self.requests[stream].reset is None:
            room = min(self.h2.local_flow_control_window(stream), CHUNK, len(view))
            if not room:
                self.read()
                continue
            self.h2.send_data(stream, bytes(view[:room]), end_stream=end and room == len(view))
            view = view[room:]
            self.flush()
        if end and not body:
            self.h2.end_stream(stream)
            self.flush()

    def answer(self, stream: int, body: bytes = b"ok", status: int = 200, *more: tuple[str, str]) -> None:
        self.head(stream, status, ("content-length", str(len(body))), *more)
        self.body(stream, body)

    def reset(self, stream: int, code: ErrorCodes) -> None:
        self.requests[stream].is_answered = True
        self.h2.reset_stream(stream, code)
        self.flush()

    def say_goaway(self, last: int, code: int = 0) -> None:
        """By hand: the library's would end both sides."""
        self.connection.send(b"\0\0\x08\x07\0\0\0\0\0" + last.to_bytes(4, "big") + code.to_bytes(4, "big"))

    def serve(self, answer: Callable[[Request], bytes]) -> None:
        """Answer each request when it is complete, to the end of the connection."""
        while True:
            for each in self.pending():
                self.answer(each.stream, answer(each))
            self.read()

    def pending(self) -> list[Request]:
        """Requests that are complete and without an answer."""
        return [
            each
            for each in self.requests.values()
            if each.is_complete and not each.is_answered and each.reset is None
        ]


def name_of(connection: BackendConnection) -> Callable[[Request], bytes]:
    return lambda request: connection.backend.name.encode()


def answer_h2(connection: BackendConnection) -> None:
    """A script: every request is answered with the backend's name."""
    H2There(connection).serve(name_of(connection))


def backend_table(address: str, files: CertificateFiles | None = None, more: str = "") -> str:
    """``files``: the certificate that a backend over TLS has. ``more``: further keys."""
    tls = (
        f", tls = true, tls_ca_path = '{files.certificate}', tls_verify_hostname = 'localhost'"
        if files
        else ""
    )
    return f"{{ address = '{address}', protocol = 'h2'{tls}{', ' if more else ''}{more} }}"


def server_tls(files: CertificateFiles, *alpn: str) -> ssl.SSLContext:
    """A backend's side of TLS; nothing named: it knows no ALPN."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


# --- the gateway before them --------------------------------------------------------------------------------


def config(port: int, *tables: str, more: str = "", http: str = "") -> str:
    return f"""
[[listeners]]
name = "web"
address = "127.0.0.1:{port}"
protocol = "h1"
h2c = true
backends = [{", ".join(tables)}]
{more}
[listeners.http]
{http}
"""


class World:
    """A gateway with one pool, in clear text for HTTP/1.1 and HTTP/2."""

    def __init__(self, gateway: Gateway, port: int) -> None:
        self.gateway = gateway
        self.port = port

    def h2(self, **more: object) -> RawH2:
        return RawH2(self.port, **more)  # type: ignore[arg-type]  # RawH2's own

    def ask(self, raw: bytes = GET) -> tuple[int, dict[str, str], bytes]:
        with Client(self.port) as client:
            client.send(raw)
            return client.response()

    def several(self, count: int, *fields: tuple[str, str], body: bytes | None = None) -> Counter[int]:
        """So many requests at once on one HTTP/2 connection: how often each status came. 0: none."""
        with self.h2() as client:
            method = "GET" if body is None else "POST"
            streams = [client.open(request("/x", method, *fields), end=body is None) for _ in range(count)]
            if body is not None:
                for stream in streams:
                    client.send_body(stream, body)
            return Counter(client.response(stream).status for stream in streams)

    def is_quiet(self) -> None:
        """Nothing is under way any more, and every open connection is idle."""
        eventually(lambda: self.gateway.metric("backend_inflight") == 0, "no exchange is under way")
        eventually(lambda: self.gateway.metric("pool_connections", state="busy") == 0, "none is busy")
        assert self.gateway.metric("worker_faults_total") == 0


@contextlib.contextmanager
def world(house: House, *tables: str, more: str = "", http: str = "") -> Iterator[World]:
    with house.gateway(config(house.port, *tables, more=more, http=http)) as gateway:
        yield World(gateway, house.port)


# --- hypercorn ----------------------------------------------------------------------------------------------

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """``/echo``: the body back as it comes, two cookies; ``/fields``: what was asked, as text; ``/empty``:
    204; ``/big``: 5 MB."""
    if scope["type"] != "http":
        raise ValueError(scope["type"])
    path = scope["path"]
    fields = [(b"x-version", scope["http_version"].encode())]
    if path == "/empty":
        await send({"type": "http.response.start", "status": 204, "headers": fields})
        await send({"type": "http.response.body", "body": b""})
        return
    cookies = [(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2; Path=/")]
    await send({"type": "http.response.start", "status": 200, "headers": fields + cookies})
    if path == "/fields":
        text = b"\n".join(name + b": " + value for name, value in scope["headers"])
        await send({"type": "http.response.body", "body": text})
    elif path == "/big":
        await send({"type": "http.response.body", "body": bytes(range(256)) * 20_000})
    else:
        is_more = True
        while is_more:
            message = await receive()
            is_more = message.get("more_body", False)
            part = {"type": "http.response.body", "body": message.get("body", b""), "more_body": is_more}
            await send(part)


@contextlib.contextmanager
def hypercorn(port: int, files: CertificateFiles | None = None) -> Iterator[None]:
    tls = ["--certfile", str(files.certificate), "--keyfile", str(files.key)] if files else []
    command = [sys.executable, "-m", "hypercorn", "-b", f"127.0.0.1:{port}", "--log-level", "error"]
    with server(*command, *tls, f"{__name__}:app", port=port):
        yield
