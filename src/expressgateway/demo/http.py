"""A small HTTP/1.1 server on asyncio streams, for the demo's backends.

A *service* is a coroutine that gets one *exchange*: it reads the request's body from it and answers through
it. The server keeps connections alive, answers `Expect: 100-continue` when a body is first asked for, reads
what a service left unread, and drops a connection rather than let a broken one look complete.

It is written to be read, and to be the other end of the gateway, not to be fast. It is not the gateway's
codec and shares nothing with it, so that the two check each other. It listens on loopback and trusts nobody
anyway: heads, bodies left unread, connections and waits are bounded. It refuses to know TLS and HTTP/2.
"""

from __future__ import annotations

import asyncio
import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, urlsplit

from expressgateway.demo.stream import StreamServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

__all__ = ["Exchange", "HttpServer", "RequestError"]

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_CHUNK_LINE_BYTES: Final = 256
MAX_UNREAD_BYTES: Final = 1024 * 1024  # of a body nobody asked for; more closes the connection
READ_BYTES: Final = 64 * 1024
IDLE_TIMEOUT_S: Final = 75.0
LINGER_TIMEOUT_S: Final = 2.0
PROGRESS_TIMEOUT_S: Final = 30.0  # for the next bytes of a head or body, either direction

REQUEST_LINE: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/1\.([01])")
FIELD: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00\r\n]*?)[ \t]*")
WITHOUT_BODY: Final = frozenset({204, 304})


class RequestError(Exception):
    """The request gets this status and sentence instead of its answer, and the connection is closed."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Exchange:
    """One request and its answer."""

    def __init__(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Raises RequestError if the head cannot be understood."""
        # Wiring
        self.reader = reader
        self.writer = writer

        # Request
        lines = head.decode("latin-1").split("\r\n")
        line = REQUEST_LINE.fullmatch(lines[0])
        if line is None:
            raise RequestError(400, "This is not an HTTP/1 request line.")
        self.request_line = lines[0]
        self.method: str = line[1]
        self.is_http_1_0 = line[3] == "0"
        self.headers = [_read_field(field) for field in lines[1:-2]]
        try:
            target = urlsplit(line[2])
            self.path = target.path
            self.query = dict(parse_qsl(target.query, max_num_fields=100))
        except ValueError:
            raise RequestError(400, "The target cannot be understood.") from None
        self.trailers: list[tuple[str, str]] = []
        self.is_chunked, self.length = self._read_framing()
        self.body_is_read = not self.is_chunked and self.length == 0
        self.awaits_continue = "100-continue" in self.values("expect") and not self.is_http_1_0

        # Answer
        persists = "keep-alive" in self.values("connection") if self.is_http_1_0 else True
        self.keeps_alive = persists and "close" not in self.values("connection")
        self.has_started = False
        self._writes_chunks = False

    def header(self, name: str) -> str | None:
        """The first value of a field, by its lower-case name."""
        return next((value for known, value in self.headers if known.lower() == name), None)

    def values(self, name: str) -> list[str]:
        """All values of a list field, in lower case."""
        lines = (value for known, value in self.headers if known.lower() == name)
        return [item.strip().lower() for line in lines for item in line.split(",")]

    def _read_framing(self) -> tuple[bool, int]:
        """(chunked, declared length); RFC 9112 6.3, and what is ambiguous is refused."""
        codings, lengths = self.values("transfer-encoding"), self.values("content-length")
        if codings and (codings != ["chunked"] or lengths or self.is_http_1_0):
            raise RequestError(400, "The body's framing is not one that can be relied on.")
        if len(lengths) > 1 or (lengths and not re.fullmatch(r"[0-9]{1,18}", lengths[0])):
            raise RequestError(400, "The body's length is not one number.")
        return bool(codings), int(lengths[0]) if lengths else 0

    # Reading

    async def body(self) -> AsyncIterator[bytes]:
        """The pieces of the body as they come; trailers are in `trailers` at the end. Never holds more than
        one.
        """
        if self.body_is_read:
            return
        if self.awaits_continue:
            self.awaits_continue = False
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            await self._drain()
        if self.is_chunked:
            while size := await self._read_chunk_size():
                async for piece in self._read_exactly(size):
                    yield piece
                if await self._read_line() != b"":
                    raise RequestError(400, "A chunk is longer than it says.")
            while line := await self._read_line():
                self.trailers.append(_read_field(line.decode("latin-1")))
                if len(self.trailers) > 100:
                    raise RequestError(431, "There are too many trailers.")
        else:
            async for piece in self._read_exactly(self.length):
                yield piece
        self.body_is_read = True

    async def _read_exactly(self, size: int) -> AsyncIterator[bytes]:
        while size:
            async with asyncio.timeout(PROGRESS_TIMEOUT_S):
                piece = await self.reader.read(min(size, READ_BYTES))
            if not piece:
                raise ConnectionError("the body was cut short")
            size -= len(piece)
            yield piece

    async def _read_line(self) -> bytes:
        async with asyncio.timeout(PROGRESS_TIMEOUT_S):
            line = await self.reader.readuntil(b"\r\n")
        return line[:-2]

    async def _read_chunk_size(self) -> int:
        line = await self._read_line()
        if len(line) > MAX_CHUNK_LINE_BYTES or not re.fullmatch(rb"[0-9A-Fa-f]{1,15}(;.*)?", line):
            raise RequestError(400, "A chunk does not begin with its size.")
        return int(line.partition(b";")[0], 16)

    async def skip_body(self) -> bool:
        """Read what the service left; False when it is too much, or was never begun, and the connection
        must go.
        """
        left = MAX_UNREAD_BYTES
        if self.awaits_continue and not self.body_is_read:
            return False
        async for piece in self.body():
            left -= len(piece)
            if left < 0:
                return False
        return True

    # Answering

    async def start(
        self, status: int, headers: Sequence[tuple[str, str]] = (), length: int | None = None
    ) -> bool:
        """Send the head; without `length` the body is chunked. False when no body may follow (HEAD, 204,
        304).
        """
        self.has_started = True
        fields = list(headers)
        may_have_body = status not in WITHOUT_BODY
        if may_have_body:
            if length is not None:
                fields.append(("Content-Length", str(length)))
            elif self.is_http_1_0:
                self.keeps_alive = False
            else:
                fields.append(("Transfer-Encoding", "chunked"))
        if not self.keeps_alive:
            fields.append(("Connection", "close"))
        elif self.is_http_1_0:
            fields.append(("Connection", "keep-alive"))
        sends_body = may_have_body and self.method != "HEAD"
        self._writes_chunks = sends_body and length is None and not self.is_http_1_0
        self.writer.write(_head(status, fields))
        await self._drain()
        return sends_body

    async def send(self, piece: bytes) -> None:
        """The next piece of the body. Waits while the other side does not read."""
        if self._writes_chunks and piece:
            self.writer.writelines((b"%x\r\n" % len(piece), piece, b"\r\n"))
        else:
            self.writer.write(piece)
        await self._drain()

    async def finish(self, trailers: Sequence[tuple[str, str]] = ()) -> None:
        """The end of a body without a declared length. To be left out when it is not complete."""
        if self._writes_chunks:
            lines = "".join(f"{name}: {value}\r\n" for name, value in trailers)
            self.writer.write(f"0\r\n{lines}\r\n".encode("latin-1"))
            await self._drain()

    async def respond(self, status: int, text: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        """A whole answer in plain text."""
        body = text.encode("latin-1", "replace")
        fields = [("Content-Type", "text/plain; charset=iso-8859-1"), *headers]
        if await self.start(status, fields, len(body)):
            await self.send(body)

    async def _drain(self) -> None:
        async with asyncio.timeout(PROGRESS_TIMEOUT_S):
            await self.writer.drain()


class HttpServer(StreamServer):
    """Serves one service."""

    def __init__(self, service: Callable[[Exchange], Awaitable[None]]) -> None:
        super().__init__(limit_bytes=MAX_HEAD_BYTES)
        self._service = service

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: exchange after exchange."""
        while await self._serve_exchange(reader, writer):
            pass
        # A close with unread bytes would reset the connection, and could take the answer from the client.
        writer.write_eof()
        left = MAX_UNREAD_BYTES
        async with asyncio.timeout(LINGER_TIMEOUT_S):
            while left > 0 and (data := await reader.read(READ_BYTES)):
                left -= len(data)

    async def _serve_exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection may carry another one."""
        exchange: Exchange | None = None
        try:
            exchange = Exchange(await _read_head(reader), reader, writer)
            await self._service(exchange)
            return await exchange.skip_body() and exchange.keeps_alive
        except RequestError as refusal:
            if exchange is None or not exchange.has_started:
                body = f"{refusal}\n".encode()
                fields = [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))]
                writer.write(_head(refusal.status, [*fields, ("Connection", "close")]) + body)
            return False


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    """Up to and with the empty line. EOFError: the peer is done; TimeoutError: it is silent."""
    try:
        async with asyncio.timeout(IDLE_TIMEOUT_S):
            first = await reader.readexactly(1)
        if first in b"\r\n":
            raise RequestError(400, "This is not an HTTP/1 request line.")
        async with asyncio.timeout(PROGRESS_TIMEOUT_S):
            return first + await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise RequestError(431, f"The head is longer than {MAX_HEAD_BYTES} bytes.") from None


def _read_field(line: str) -> tuple[str, str]:
    field = FIELD.fullmatch(line)
    if field is None:
        raise RequestError(400, "A header line is not a name and a value.")
    return field[1], field[2]


def _head(status: int, fields: Sequence[tuple[str, str]]) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Unknown"
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields)
    return f"HTTP/1.1 {status} {phrase}\r\n{lines}\r\n".encode("latin-1")
