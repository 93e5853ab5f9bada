"""One gateway for many HTTP tests: listeners in clear text and TLS before a backend that is told what to do.

Introduces the *world*: ``world.on(handler)`` gives a path, and whatever is asked under it is answered by the
handler, on any connection. So tests share a process and its pooled connections, as real clients do.
"""

import contextlib
import itertools
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.e2e.harness import Backend, BackendConnection, Client, Gateway, certificate
from tests.ports import free_port

Handler = Callable[[BackendConnection, bytes], None]
"""Gets the connection and the request's head; reads the body itself. Raises ``EOFError`` to close."""

Headers = list[tuple[str, str]]


class World:
    """See the module's text. ``listeners`` are named by their ``fronts``: ``clear``, ``tls`` and more."""

    def __init__(self, backend: Backend, handlers: dict[bytes, Handler], trust: Path) -> None:
        self.backend = backend
        self.trust = trust
        self.ports: dict[str, int] = {}
        self.gateway: Gateway
        self._handlers = handlers
        self._numbers = itertools.count(1)

    def on(self, handler: Handler, path: str = "") -> str:
        """A path of the test's own (or ``path``), answered by ``handler``."""
        path = path or f"/t{next(self._numbers)}"
        self._handlers[path.encode()] = handler
        return path

    def client(self, front: str, source: str = "127.0.0.1") -> Client:
        """A connection to the listener ``front``, from the address ``source``."""
        context = client_context(self.trust) if front.startswith("tls") else None
        return Client(self.ports[front], tls=context, host="127.0.0.1", source=source)


def _dispatch(connection: BackendConnection, handlers: dict[bytes, Handler]) -> None:
    while True:
        head = connection.until(b"\r\n\r\n")
        match = re.match(rb"\S+ (/\w+|\*)", head)
        handler = handlers.get(match[1]) if match else None
        if handler is None:
            answer(connection, b"nobody asked for this", status="404 Not Found")
        else:
            handler(connection, head)


def client_context(trust: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(trust))
    context.set_alpn_protocols(["http/1.1"])
    return context


@contextlib.contextmanager
def http_world(directory: Path, *, runtime: str = "", http: str = "", more: str = "") -> Iterator[World]:
    """``http``: lines of every ``[listeners.http]``. ``more``: further listeners, with ``{port_x}`` for ports
    and ``{backend}`` for the backend's address."""
    files = certificate(directory)
    names = ["clear", "tls", *re.findall(r"\{port_(\w+)\}", more)]
    handlers: dict[bytes, Handler] = {}
    with Backend(lambda connection: _dispatch(connection, handlers)) as backend:
        world = World(backend, handlers, files.certificate)
        ports = world.ports
        ports.update({name: free_port() for name in names})
        text = more.replace("{backend}", backend.address)
        for name, port in ports.items():
            text = text.replace(f"{{port_{name}}}", str(port))
        config = f"""
[[listeners]]
name = "clear"
address = "127.0.0.1:{ports["clear"]}"
protocol = "h1"
backends = [{{ address = "{backend.address}", id = "b" }}]
[listeners.http]
{http}
[[listeners]]
name = "tls"
address = "127.0.0.1:{ports["tls"]}"
protocol = "h1s"
tls = {{ cert_path = "{files.certificate}", key_path = "{files.key}" }}
backends = [{{ address = "{backend.address}", id = "b" }}]
[listeners.http]
{http}
{text}
"""
        with Gateway(directory, config, runtime=runtime) as world.gateway:
            yield world


def answer(
    connection: BackendConnection, body: bytes = b"", *, status: str = "200 OK", headers: bytes = b""
) -> None:
    """A response with a length. ``headers``: further lines, each with its CRLF."""
    head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n".encode()
    connection.send(head + headers + b"\r\n" + body)


def fields(head: bytes) -> Headers:
    """Name and value of each field of a head, in order."""
    lines = head.decode("latin-1").split("\r\n")[1:]
    return [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines if line)]


def field(head: bytes, name: str) -> str | None:
    """All values of a field, joined; None if there is none."""
    values = [value for found, value in fields(head) if found.lower() == name]
    return ", ".join(values) if values else None


def read_chunked(connection: Client) -> tuple[bytes, Headers]:
    """A chunked body and its trailer section."""
    parts = []
    while size := int(connection.until(b"\r\n").split(b";")[0], 16):
        parts.append(connection.exactly(size))
        if connection.exactly(2) != b"\r\n":
            raise ValueError("a chunk that does not end where it says")
    trailers = b""
    while (line := connection.until(b"\r\n")) != b"\r\n":
        trailers += line
    return b"".join(parts), fields(b"\r\n" + trailers)


def read_body(connection: Client, head: bytes) -> bytes:
    """The body that a head announces."""
    if field(head, "transfer-encoding") == "chunked":
        return read_chunked(connection)[0]
    return connection.exactly(int(field(head, "content-length") or 0))


def chunked(body: bytes, size: int = 50_000) -> bytes:
    """A body in chunks, with its end."""
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


def fd_count(pid: int) -> int:
    """Open descriptors of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def send_until_stuck(sock: socket.socket, total: int, quiet_s: float = 0.5) -> int:
    """Send up to ``total`` bytes; stops when none is taken for ``quiet_s``. The number of bytes taken."""
    sent = 0
    data = memoryview(bytes(65536))
    sock.settimeout(quiet_s)
    with contextlib.suppress(TimeoutError):
        while sent < total:
            sent += sock.send(data[: total - sent])
    return sent
