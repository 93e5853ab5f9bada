"""A small, strict HTTP/1.1 server for the admin listener: one request on each connection, GET and HEAD.

Everything is bounded: connections, the head, and the time for all of it. It knows nothing of what is asked
for; `Answer` functions do.
"""

import asyncio
import logging
import re
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final

from expressgateway.observe.counters import Tally

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 64  # the next one is closed at once
MAX_HEAD_BYTES: Final = 8192  # 431 beyond
TIMEOUT_S: Final = 5.0  # for the head to come in (408), and for the answer to be taken (close)

REJECTS: Final = ("too_many", "timeout", "bad_request", "unauthorized")
"""What is counted against clients. `timeout`: slow to ask, or to take the answer and close."""

_TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TARGET: Final = re.compile(rb"/[!-~]*")
_VALUE: Final = re.compile(rb"[\t -~\x80-\xff]*")


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    """Without the query."""
    headers: dict[str, str]
    """Names in lower case; of a repeated field the first."""
    client: str = ""
    """Address of who asks."""


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes = b""
    content_type: str = "text/plain; charset=utf-8"
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def plain(cls, status: int, text: str = "", **headers: str) -> "Response":
        body = f"{text or HTTPStatus(status).phrase}\n".encode()
        return cls(status, body, headers={name.replace("_", "-"): value for name, value in headers.items()})


Answer = Callable[[Request], Awaitable[Response]]


class BadRequestError(Exception):
    """The head cannot be read; `status` is what to answer."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def parse_head(head: bytes, client: str = "") -> Request:
    """Read a head that `client` sent and that ends with an empty line. Raises `BadRequestError`.

    Stricter than RFC 9112: only CRLF, only origin form, no body.
    """
    start, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    parts = start.split(b" ")
    if len(parts) != 3 or not _TOKEN.fullmatch(parts[0]) or not _TARGET.fullmatch(parts[1]):
        raise BadRequestError(400)
    method, target, version = parts
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise BadRequestError(505 if version.startswith(b"HTTP/") else 400)
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise BadRequestError(400)
        key = name.decode("ascii").lower()
        if key in headers and key in ("host", "authorization"):
            raise BadRequestError(400)
        headers.setdefault(key, value.decode("latin-1").strip(" \t"))
    if version == b"HTTP/1.1" and "host" not in headers:
        raise BadRequestError(400)  # RFC 9112 3.2
    if method not in (b"GET", b"HEAD"):
        raise BadRequestError(405)
    if "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
        raise BadRequestError(400)  # nothing we answer takes a body
    path = target.decode("ascii").partition("?")[0]
    return Request(method.decode("ascii"), path, headers, client)


class AdminServer:
    """Serves `answer` on a listening socket, which it owns, and counts in `rejects` what it turns away."""

    def __init__(
        self, sock: socket.socket, answer: Answer, rejects: Tally, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._sock = sock
        self._answer = answer
        self._rejects = rejects
        self._timeout_s = timeout_s
        self._open: dict[asyncio.StreamWriter, asyncio.Task[None] | None] = {}
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, sock=self._sock, limit=MAX_HEAD_BYTES)

    async def close(self) -> None:
        """Stop at once; answers under way are cut off."""
        if self._server is not None:
            self._server.close()
        tasks = [task for task in self._open.values() if task is not None]
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= MAX_CONNECTIONS:
            self._rejects.add("too_many")
            writer.transport.abort()
            return
        self._open[writer] = asyncio.current_task()
        request = None
        try:
            async with asyncio.timeout(self._timeout_s):
                request, response = await self._exchange(reader, _client(writer))
            _write(writer, response, is_head=request is not None and request.method == "HEAD")
            async with asyncio.timeout(self._timeout_s):
                await writer.drain()
                writer.write_eof()
                # Closing with unread bytes would reset the connection, and the answer with it.
                await reader.read(MAX_HEAD_BYTES)
        except TimeoutError:
            if request is not None:  # else it is our answer that took too long, or it is counted already
                self._rejects.add("timeout")
            _make_reset(writer)
        except OSError:
            pass
        except Exception:
            log.exception("the admin listener failed to answer: this is a defect")
        finally:
            self._open.pop(writer, None)
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, client: str) -> tuple[Request | None, Response]:
        try:
            async with asyncio.timeout(self._timeout_s / 2):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return None, self._bad_request(431)
        except asyncio.IncompleteReadError as error:
            if not error.partial:
                raise ConnectionResetError from None  # a probe of the port: nothing to answer
            return None, self._bad_request(400)
        except TimeoutError:
            self._rejects.add("timeout")
            return None, Response.plain(408)
        try:
            request = parse_head(head, client)
        except BadRequestError as error:
            allow = {"Allow": "GET, HEAD"} if error.status == 405 else {}
            return None, self._bad_request(error.status, **allow)
        return request, await self._answer(request)

    def _bad_request(self, status: int, **headers: str) -> Response:
        self._rejects.add("bad_request")
        return Response.plain(status, **headers)


def _client(writer: asyncio.StreamWriter) -> str:
    peer = writer.get_extra_info("peername")  # None if it has gone already
    return str(peer[0]) if peer else ""


def _make_reset(writer: asyncio.StreamWriter) -> None:
    """Have the close reset it, or the kernel would go on offering what the client does not take."""
    sock: socket.socket = writer.get_extra_info("socket")
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass  # it is closed already


def _write(writer: asyncio.StreamWriter, response: Response, *, is_head: bool) -> None:
    lines = [
        f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}",
        f"Content-Type: {response.content_type}",
        f"Content-Length: {len(response.body)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
        *(f"{name}: {value}" for name, value in response.headers.items()),
    ]
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    writer.write(head if is_head else head + response.body)
