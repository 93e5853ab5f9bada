"""The nine cells, front by back: the gateway between callers and backends of every version.

A *cell* is the version that the client speaks with the one that the backend speaks, in clear or over TLS.
Its two ends are ``talks``. A further version of HTTP is a row in ``VERSIONS``, and no test.
"""

import contextlib
import itertools
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from expressgateway.demo.certificate import CertificateFiles
from tests.e2e.harness import (
    PATIENCE_S,
    Backend,
    BackendConnection,
    Gateway,
    Script,
    certificate,
    server,
)
from tests.e2e.talks import Answerer, CutError, Fields, H1Caller, H1Talk, H2End, Talk, answer, begin_h2
from tests.e2e.talks_h3 import H3Backend, dial_h3
from tests.ports import free_port

_ENDLESS = "max_keepalive_requests = 0\nmax_requests_per_h3_connection = 0"
CAP_BYTES = 1_000_000
"""The largest request body of the listeners named ``capped``."""


AnyBackend = Backend | H3Backend


class Caller(Protocol):
    """One connection of a client."""

    def call(self, fields: Fields, *, end: bool) -> Talk: ...
    def close(self) -> None: ...


def _fix_buffer(sock: socket.socket) -> None:
    """The kernel makes the buffers of a connection that was fast larger than any body here."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 262_144)


def _h1_script(answerer: Answerer) -> Script:
    def script(connection: BackendConnection) -> None:
        _fix_buffer(connection.sock)
        talk = H1Talk(connection.sock, connection.number)
        with contextlib.suppress(CutError):
            while True:
                talk.read_head()
                talk.trailers = []
                answerer(talk)
                if not talk.is_read:
                    return

    return script


def _h2_script(answerer: Answerer) -> Script:
    def script(connection: BackendConnection) -> None:
        _fix_buffer(connection.sock)
        H2End(connection.sock, answerer, connection.number).pump()

    return script


class Version(Protocol):
    """What a version of HTTP adds to the suite."""

    is_multiplexed: bool
    stall_bytes: int
    """A body larger than all buffers between one who sends by this version and one who does not read."""
    secured: tuple[bool, ...]
    """Whether it is spoken in clear (``False``) and over TLS (``True``)."""

    def dial(self, files: CertificateFiles, port: int, is_tls: bool) -> Caller: ...
    def backend(self, answerer: Answerer, name: str, files: CertificateFiles, is_tls: bool) -> AnyBackend: ...


class TcpVersion:
    """One that is spoken on a connection of TCP."""

    secured: tuple[bool, ...] = (False, True)
    stall_bytes = 64_000_000  # the kernel's buffers of both connections: tcp_rmem may allow 32 MiB for each

    def __init__(
        self,
        alpn: str,
        caller: Callable[[socket.socket], Caller],
        script: Callable[[Answerer], Script],
        *,
        is_multiplexed: bool,
    ) -> None:
        self.is_multiplexed = is_multiplexed
        self._alpn = alpn
        self._caller = caller
        self._script = script

    def dial(self, files: CertificateFiles, port: int, is_tls: bool) -> Caller:
        sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _fix_buffer(sock)
        if is_tls:
            context = ssl.create_default_context(cafile=str(files.certificate))
            context.set_alpn_protocols([self._alpn])
            sock = context.wrap_socket(sock, server_hostname="localhost")
        return self._caller(sock)

    def backend(self, answerer: Answerer, name: str, files: CertificateFiles, is_tls: bool) -> Backend:
        context = None
        if is_tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(files.certificate, files.key)
            context.set_alpn_protocols([self._alpn])
        return Backend(self._script(answerer), name, context)


class H3Version:
    """HTTP/3: on QUIC, which is always secured."""

    secured: tuple[bool, ...] = (True,)
    is_multiplexed = True
    stall_bytes = 16_000_000  # windows, and the kernel's buffers of one connection over TCP

    def dial(self, files: CertificateFiles, port: int, is_tls: bool) -> Caller:
        return dial_h3(files, port)

    def backend(self, answerer: Answerer, name: str, files: CertificateFiles, is_tls: bool) -> H3Backend:
        return H3Backend(answerer, name, files)


VERSIONS: dict[str, Version] = {
    "h1": TcpVersion("http/1.1", H1Caller, _h1_script, is_multiplexed=False),
    "h2": TcpVersion("h2", begin_h2, _h2_script, is_multiplexed=True),
    "h3": H3Version(),
}


class Cell(NamedTuple):
    front: str
    back: str
    is_tls: bool

    def __str__(self) -> str:
        return f"{self.front}-{self.back}{'-tls' if self.is_tls else ''}"


CELLS = [
    Cell(front, back, is_tls)
    for is_tls, front, back in itertools.product((False, True), VERSIONS, VERSIONS)
    if is_tls in VERSIONS[front].secured and is_tls in VERSIONS[back].secured
]
BACKS = [(back, is_tls) for back, version in VERSIONS.items() for is_tls in version.secured]


class Place:
    """The gateway before backends of every version; a test's paths are answered by its own handlers."""

    def __init__(self, files: CertificateFiles) -> None:
        self.files = files
        self.gateway: Gateway
        self.ports: dict[tuple[str, bool, str], int] = {}
        """By back, TLS on both sides, and kind: ``plain``, ``capped`` or ``dead``."""
        self.backends: dict[tuple[str, bool], AnyBackend] = {}
        self._handlers: dict[str, Answerer] = {}
        self._numbers = itertools.count(1)

    def on(self, handler: Answerer) -> str:
        """A path that is answered by ``handler``."""
        path = f"/t{next(self._numbers)}"
        self._handlers[path] = handler
        return path

    def answerer(self, talk: Talk) -> None:
        self._handlers[talk.headers[":path"]](talk)

    def dial(self, cell: Cell, kind: str = "plain") -> Caller:
        port = self.ports[cell.back, cell.is_tls, kind]
        return VERSIONS[cell.front].dial(self.files, port, cell.is_tls)


def is_quiet(gateway: Gateway) -> bool:
    """Nothing is under way, by the gauges."""
    metric = gateway.metric
    names = ("connections_inflight", "backend_inflight", "pool_inflight", "pool_pending")
    return not any(metric(name) for name in names) and not metric("pool_connections", state="busy")


def call(caller: Caller, path: str, *more: tuple[str, str], body: bytes | None = None) -> Talk:
    """A request as a whole: GET, or POST with a length."""
    talk = begin(caller, path, *more, length=None if body is None else len(body), end=body is None)
    if body is not None:
        talk.send(body, end=True)
    return talk


def begin(
    caller: Caller,
    path: str,
    *more: tuple[str, str],
    length: int | None = None,
    end: bool = False,
) -> Talk:
    """A request's head; a body of unknown length follows if there is no ``length``, and not ``end``."""
    fields = [
        (":method", "GET" if end else "POST"),
        (":scheme", "https"),
        (":authority", "cells.example"),
        (":path", path),
        *more,
    ]
    if length is not None:
        fields.append(("content-length", str(length)))
    return caller.call(fields, end=end)


def _config(place: Place, addresses: Iterable[tuple[tuple[str, bool], str]]) -> str:
    """Listeners for every front before each back; over TLS one on TCP and one on UDP, by one port."""
    files = place.files
    pair = f"cert_path = '{files.certificate}', key_path = '{files.key}'"
    secret = files.certificate.with_name("retry.secret")
    text = ""
    for (back, is_tls), address in addresses:
        for kind in ("plain", "capped", "dead"):
            port = place.ports[back, is_tls, kind] = free_port()
            cap = CAP_BYTES if kind == "capped" else 0
            to = f"127.0.0.1:{free_port()}" if kind == "dead" else address
            trust = (
                f", tls = true, tls_ca_path = '{files.certificate}', tls_verify_hostname = 'localhost'"
                if is_tls
                else ""
            )
            fronts = [("h1", "h2c = true")]
            if is_tls:
                fronts = [
                    ("h1s", f"tls = {{ {pair} }}"),
                    ("quic", f"quic = {{ {pair}, retry_secret_path = '{secret}' }}"),
                ]
            for protocol, more in fronts:
                text += (
                    f"[[listeners]]\nname = '{protocol}-{back}-{kind}'\n"
                    f"address = '127.0.0.1:{port}'\nprotocol = '{protocol}'\n{more}\n"
                    f"backends = [{{ address = '{to}', protocol = '{back}'{trust} }}]\n"
                    f"http = {{ max_request_body_bytes = {cap} }}\n"
                )
    return text


@contextlib.contextmanager
def place_of_cells(directory: Path) -> Iterator[Place]:
    """All cells of one gateway, before backends that are told what to do."""
    place = Place(certificate(directory))
    with contextlib.ExitStack() as keep:
        for name, is_tls in BACKS:
            place.backends[name, is_tls] = backend = VERSIONS[name].backend(
                place.answerer, name, place.files, is_tls
            )
            keep.enter_context(backend)
        config = _config(place, ((key, each.address) for key, each in place.backends.items()))
        place.gateway = keep.enter_context(Gateway(directory, config, runtime=_ENDLESS))
        yield place


@contextlib.contextmanager
def nginx_of_cells(directory: Path) -> Iterator[Place]:
    """All cells of one gateway, before nginx, which answers everything with a few bytes; in HTTP/3, which
    not every nginx speaks, ``aioquic`` does.
    """
    place = Place(certificate(directory))
    ports = {(back, is_tls): free_port() for back, is_tls in BACKS if back != "h3"}
    listens = "".join(
        f"    listen 127.0.0.1:{port}{' ssl' if is_tls else ''}{' http2' if back == 'h2' else ''};\n"
        for (back, is_tls), port in ports.items()
    )
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "\n".join(f"  {kind}_temp_path {directory}/{kind};" for kind in kinds)
    config = directory / "nginx.conf"
    config.write_text(
        f"""daemon off;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ worker_connections 1000; }}
http {{
  access_log off;
  keepalive_requests 100000;
{paths}
  server {{
{listens}
    ssl_certificate {place.files.certificate};
    ssl_certificate_key {place.files.key};
    location / {{ return 200 "served"; }}
  }}
}}
"""
    )
    command = ("nginx", "-e", f"{directory}/error.log", "-p", str(directory), "-c", str(config))
    addresses = {key: f"127.0.0.1:{port}" for key, port in ports.items()}
    with (
        server(*command, port=ports["h1", False]),
        H3Backend(lambda talk: answer(talk, b"served"), "h3", place.files) as h3,
    ):
        addresses["h3", True] = h3.address
        text = _config(place, addresses.items())
        with Gateway(directory, text, runtime=_ENDLESS) as place.gateway:
            yield place
