"""A file of ``config/examples`` as a running gateway, the backends that it names, and a client."""

import contextlib
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Self

from click.testing import CliRunner

from expressgateway.cli.main import main
from tests.e2e.harness import Backend, BackendConnection, Client, Gateway, eventually
from tests.ports import free_port

EXAMPLES = Path(__file__).parents[2] / "config" / "examples"
Answer = Callable[[BackendConnection], None]


class Example(Gateway):
    """A file of `config/examples`, run as it is but for its ports. ``backends`` by the port in the file."""

    def __init__(self, directory: Path, name: str, text: str = "") -> None:
        """``text``: what stands in the file; as it is if empty."""
        self._text = text or (EXAMPLES / f"{name}.toml").read_text()
        self.ports = {port: free_port() for port in ("8080", "9090", "8443", "4433", "4434")}
        self.backends: dict[str, Backend] = {}
        self.answers: dict[str, Answer] = {}
        """By path: instead of 200 and the backend's port."""
        self.sick: set[str] = set()
        """Backends whose /healthz answers 503."""
        for port in sorted(set(re.findall(r"127\.0\.0\.1:(3\d\d\d)", self._text))):
            self.backends[port] = Backend(self._serve, port)
            self.ports[port] = self.backends[port].port
        super().__init__(directory, self._text)
        self.admin = self.ports["9090"]
        self._asker = Asker(self.ports["8080"])

    def write(self, config: str) -> None:
        self.path.write_text(
            re.sub(
                r"(127\.0\.0\.1:|h3_port = )(\d+)", lambda match: match[1] + str(self.ports[match[2]]), config
            )
        )

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        for backend in self.backends.values():
            self._stack.enter_context(backend)
        try:
            return super().__enter__()
        except BaseException:
            self.__exit__(AssertionError)
            raise

    def __exit__(self, kind: object, *_: object) -> None:
        with self._stack:
            self._asker.close()

            def has_ended() -> bool:
                # The second stop is immediate: nobody waits for the default `readiness_settle_ms`.
                self.process.send_signal(signal.SIGTERM)
                return self.process.poll() is not None

            if self.process.poll() is None:
                eventually(has_ended, "the gateway stops")
            super().__exit__(kind)

    def _serve(self, connection: BackendConnection) -> None:
        backend = connection.backend
        while True:
            head, body = connection.request()
            path = head.split()[1].decode().partition("?")[0]
            if path == "/healthz" and b"x-forwarded-for" not in head.lower():  # a probe of the gateway's
                status = "503 Sick" if backend.name in self.sick else "200 OK"
                connection.send(f"HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n".encode())
                continue
            backend.requests.append((head, body))
            if (answer := self.answers.get(path)) is not None:
                answer(connection)
            else:
                reply(connection, backend.name)

    def ask_for(self, path: str = "/", host: str = "any.test", **more: str) -> "Got":
        return self._asker.ask(path, host, **more)

    def seen(self, port: str) -> bytes:
        """The head of the last request that came to a backend."""
        return self.backends[port].requests[-1][0]

    def command(self, *words: str) -> str:
        done = CliRunner().invoke(main, [*words, "--config", str(self.path)])
        assert done.exit_code == 0, done.output
        return done.output


def reply(connection: BackendConnection, body: str, status: str = "200 OK", fields: str = "") -> None:
    head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{fields}\r\n"
    connection.send((head + body).encode())


class Got:
    """An answer. ``body`` is the port, in the file, of the backend that gave it."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body.decode()

    @property
    def cookie(self) -> str:
        """Name and value of the cookie that was set."""
        return self.headers.get("set-cookie", "").partition(";")[0]


class Asker:
    """A client without a memory, on one connection as long as the gateway keeps it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._client: Client | None = None

    def ask(self, path: str = "/", host: str = "any.test", method: str = "GET", **fields: str) -> Got:
        if self._client is None:
            self._client = Client(self._port)
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
        if method == "POST":
            lines.append("Content-Length: 0")
        self._client.send("\r\n".join([*lines, "", ""]).encode())
        got = Got(*self._client.response(head_only=method == "HEAD"))
        if got.headers.get("connection") == "close":
            self.close()
        return got

    def close(self) -> None:
        if self._client is not None:
            self._client.sock.close()
            self._client = None
