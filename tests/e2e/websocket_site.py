"""A gateway with a listener for every pair of protocols that WebSocket on a stream has a part in.

Fronts: ``h2`` over TLS, ``h2c`` by prior knowledge, ``h3``, ``h1``. Backends: ``h1`` is the server of
``websockets``, ``h2`` one made of python-h2 and the sans-IO half of ``websockets``, ``h3`` one of ``aioquic``
and that.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve
from websockets.typing import Subprotocol
from websockets.utils import accept_key

from expressgateway.demo.certificate import CertificateFiles
from tests.e2e.h2_raw import CALM, CANCEL, LINGER_RESET, PROTOCOL
from tests.e2e.harness import BackendConnection, Gateway, certificate
from tests.e2e.http_world import client_context
from tests.e2e.websocket_h2 import H2Link
from tests.e2e.websocket_h2_peers import FLOOD, FLOODS, H2Sockets
from tests.e2e.websocket_h3 import H3Link, H3Sockets
from tests.e2e.websocket_sessions import Link
from tests.ports import free_port

LIMIT = 6_000_000
RUNTIME = "[runtime.watchdog]\nsweep_interval_ms = 100\n"
NO_LIMITS: Final[Mapping[str, int]] = MappingProxyType({})
Cell = tuple[str, str]
Sockets = H2Sockets | H3Sockets


class Codes(NamedTuple):
    """What a version calls the reasons for giving a stream up."""

    cancelled: int
    calm: int
    malformed: int


CODES = {
    "h2": Codes(CANCEL, CALM, PROTOCOL),
    "h2c": Codes(CANCEL, CALM, PROTOCOL),
    "h3": Codes(0x10C, 0x107, 0x10E),  # H3_REQUEST_CANCELLED, H3_EXCESSIVE_LOAD, H3_MESSAGE_ERROR
}


class Ends:
    """How to be in front of a gateway and behind it, by each version."""

    def __init__(self, files: CertificateFiles) -> None:
        self.files = files
        self._pair = f"cert_path = '{files.certificate}', key_path = '{files.key}'"
        self._secret = files.key.with_name("retry.secret")

    def listener(
        self,
        front: str,
        port: int,
        address: str,
        back: str = "h1",
        *,
        block: str | None = None,
        limits: Mapping[str, int] = NO_LIMITS,
    ) -> str:
        """A listener before one backend, as TOML. ``h1`` is spoken by those of ``h2c``.

        ``block``: instead of one that offers WebSocket with ``limits``.
        """
        protocol, more = {
            "h2": ("h1s", f"tls = {{ {self._pair} }}"),
            "h2c": ("h1", "h2c = true"),
            "h3": ("quic", f"quic = {{ {self._pair}, retry_secret_path = '{self._secret}' }}"),
        }[front]
        trust = ""
        if back == "h3":
            trust = f", tls_ca_path = '{self.files.certificate}', tls_verify_hostname = 'localhost'"
        if block is None:
            block = f"[listeners.websocket]\n{front[:2]}_extended_connect = true\n"
            block += "".join(f"{name} = {value}\n" for name, value in limits.items())
        return (
            f"[[listeners]]\nname = '{front}-{back}'\naddress = '127.0.0.1:{port}'\nprotocol = '{protocol}'\n"
            f"{more}\nbackends = [{{ address = '{address}', protocol = '{back}'{trust} }}]\n{block}\n"
        )

    def link(self, front: str, port: int) -> Link:
        if front == "h3":
            return H3Link(port, self.files)
        return H2Link(port, tls=client_context(self.files.certificate) if front == "h2" else None)

    def sockets(self, back: str, *, offers: bool = True) -> Sockets:
        return H3Sockets(self.files, offers=offers) if back == "h3" else H2Sockets(offers=offers)


def accepts(then: Callable[[BackendConnection], object]) -> Callable[[BackendConnection], None]:
    """A backend's script: agree to a handshake as one should, then this."""

    def script(connection: BackendConnection) -> None:
        head, _ = connection.request()
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
        connection.send(
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-accept: "
            + accept_key(fields[b"sec-websocket-key"].decode()).encode()
            + b"\r\n\r\n"
        )
        then(connection)

    return script


def resets(connection: BackendConnection) -> None:
    connection.sock.recv(100)
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)


class Site:
    """A gateway with a listener for every front and backend: ``port[front, back]``."""

    def __init__(self, ends: Ends) -> None:
        self.ends = ends
        self.port = {
            (front, back): free_port() for front in ("h2", "h2c", "h3") for back in ("h1", "h2", "h3")
        }
        self.sockets: dict[str, Sockets] = {}
        """Those of HTTP/2 and HTTP/3."""
        self.gateway: Gateway
        self.saw: list[Request] = []
        self.closed: list[tuple[int | None, str | None]] = []

    def link(self, front: str, back: str) -> Link:
        return self.ends.link(front, self.port[front, back])

    @contextlib.contextmanager
    def session(self, cell: Cell, path: str = "/echo", *more: tuple[str, str]) -> Iterator[Any]:
        """A ``Session``, or the client of ``websockets`` where the front is HTTP/1.1: they answer alike."""
        front, back = cell
        if front == "h1":
            url = f"ws://localhost:{self.port['h2c', back]}{path}"
            offered = dict(more).get("sec-websocket-protocol", "")
            with connect(
                url,
                max_size=None,
                proxy=None,
                compression=None,
                additional_headers=[each for each in more if each[0] != "sec-websocket-protocol"],
                subprotocols=[Subprotocol(each) for each in offered.split(", ") if each],
            ) as client:
                yield client
        else:
            with self.link(front, back) as link:
                yield link.connect(path, *more)

    def asked(self, back: str) -> dict[str, str]:
        """The header fields of the last handshake, as the backend saw them."""
        if back != "h1":
            return self.sockets[back].streams[-1].headers
        return {name.lower(): value for name, value in self.saw[-1].headers.raw_items()}

    def has_closed(self, back: str, code: int, reason: str) -> bool:
        if back == "h1":
            return (code, reason) in self.closed
        return any(
            (each.close_code, each.protocol.close_reason) == (code, reason)
            for each in self.sockets[back].streams
        )


def echo(connection: ServerConnection) -> None:
    for message in connection:
        connection.send(message)


def closes(connection: ServerConnection) -> None:
    connection.recv()
    connection.close(4001, "had enough")


def breaks(connection: ServerConnection) -> None:
    connection.recv()
    connection.socket.shutdown(2)


def floods(connection: ServerConnection) -> None:
    for _ in range(FLOODS):
        connection.send(FLOOD)


HANDLERS: dict[str, Callable[[ServerConnection], None]] = {
    "/closes": closes,
    "/breaks": breaks,
    "/floods": floods,
}


@pytest.fixture(scope="session")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    return Ends(certificate(tmp_path_factory.mktemp("ends")))


@pytest.fixture(scope="module")
def site(ends: Ends, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("websocket")
    behind = free_port()
    it = Site(ends)

    def handler(connection: ServerConnection) -> None:
        assert connection.request is not None
        it.saw.append(connection.request)
        try:
            HANDLERS.get(connection.request.path, echo)(connection)
        except ConnectionClosed:
            pass
        finally:
            it.closed.append((connection.close_code, connection.close_reason))

    def judge(connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/forbidden":
            return connection.respond(403, "not you\n")
        if request.path == "/plain":
            return connection.respond(200, "a page\n")
        return None

    with (
        ends.sockets("h2") as h2,
        ends.sockets("h3") as h3,
        serve(
            handler,
            "127.0.0.1",
            behind,
            process_request=judge,
            select_subprotocol=lambda _, offered: next((one for one in offered if one == "chat.v1"), None),
            max_size=None,
            ping_interval=None,
        ) as server,
    ):
        it.sockets = {"h2": h2, "h3": h3}
        address = {"h1": f"127.0.0.1:{behind}", "h2": h2.address, "h3": h3.address}
        text = "".join(
            ends.listener(front, port, address[back], back, limits={"max_message_size_bytes": LIMIT})
            for (front, back), port in it.port.items()
        )
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with Gateway(directory, text, runtime=RUNTIME) as it.gateway:
                yield it
        finally:
            server.shutdown()
            thread.join()
