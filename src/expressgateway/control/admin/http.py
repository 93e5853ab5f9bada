"""A small, strict HTTP/1.1 server for the admin listener: one request on each connection.

An answer is bytes, or a stream that goes on until one of both ends it.

Everything is bounded: connections, the head, the body, and the time for all of it. It knows nothing of what
is asked for, nor who may ask; `Answer` functions do.
"""

import asyncio
import json
import logging
import re
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Final

from expressgateway.observe.counters import Tally

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 64  # the next one is closed at once
MAX_STREAMS: Final = 16  # of those connections; the next one gets 503
MAX_HEAD_BYTES: Final = 8192  # 431 beyond
MAX_BODY_BYTES: Final = 65536  # 413 beyond
TIMEOUT_S: Final = 5.0  # for the head to come in (408), and for the answer to be taken (close)
WRITE_TIMEOUT_S: Final = 40.0  # for a write to be answered: it may wait for a reload, and has its own limit

JSON: Final = "application/json"
READS: Final = ("GET", "HEAD")
_NEEDS_BODY: Final = ("POST", "PATCH")  # if only an empty one
_WITHOUT_BODY: Final = (*READS, "DELETE")

REJECTS: Final = ("too_many", "too_many_streams", "timeout", "bad_request", "unauthorized")
"""What is counted against clients. `timeout`: slow to ask, or to take the answer and close."""

_STREAM_BACKLOG_BYTES: Final = 65536
"""What may wait for a reader of a stream before it gets no more; a chunk may come on top of it."""

_PIECE_BYTES: Final = 65536  # of an answer, given to the socket at once
_LINGER_BYTES: Final = 1 << 20
"""Read and thrown away after an answer, so that a client that still sends gets to read it."""

_MAX_DIGITS: Final = 18  # of a length
_TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TARGET: Final = re.compile(rb"/[!-~]*")
_VALUE: Final = re.compile(rb"[\t -~\x80-\xff]*")
_ONCE: Final = frozenset(
    {"host", "authorization", "content-length", "content-type", "transfer-encoding", "expect", "origin"}
)
"""Fields of which there cannot be two: one would be judged, and the other be meant."""


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    """Without the query."""
    headers: dict[str, str]
    """Names in lower case; of a repeated field the first."""
    client: str = ""
    """Address of who asks."""
    body: bytes = b""
    query: str = ""
    """What follows the path's question mark, as it came."""

    @property
    def is_write(self) -> bool:
        return self.method not in READS


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes = b""
    content_type: str = "text/plain; charset=utf-8"
    headers: dict[str, str] = field(default_factory=dict)
    is_reject: bool = False
    """Counted as a bad request: it should not have been sent, whatever the gateway's state."""
    stream: Callable[[], AsyncGenerator[bytes, None]] | None = None
    """Instead of `body`: chunks that are sent as they come. Closed when the client has gone."""

    @classmethod
    def plain(cls, status: int, text: str = "", **headers: str) -> "Response":
        body = f"{text or HTTPStatus(status).phrase}\n".encode()
        return cls(status, body, headers={name.replace("_", "-"): value for name, value in headers.items()})


def rejected(status: int, text: str = "", **headers: str) -> Response:
    """The answer to what should not have been asked, as JSON."""
    body = json.dumps({"error": text or HTTPStatus(status).phrase}).encode()
    return Response(status, body, JSON, headers, is_reject=True)


def not_allowed(methods: Iterable[str]) -> Response:
    """405 with the methods that the path has."""
    return rejected(405, Allow=", ".join(methods))


Answer = Callable[[Request], Awaitable[Response]]


class BadRequestError(Exception):
    """The head cannot be read; `status` is what to answer."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def parse_head(head: bytes, client: str = "") -> Request:
    """Read a head that `client` sent and that ends with an empty line. Raises `BadRequestError`.

    Stricter than RFC 9112: only CRLF, only origin form, no transfer coding.
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
        if key in headers and key in _ONCE:
            raise BadRequestError(400)
        headers.setdefault(key, value.decode("latin-1").strip(" \t"))
    if version == b"HTTP/1.1" and "host" not in headers:
        raise BadRequestError(400)  # RFC 9112 3.2
    path, _, query = target.decode("ascii").partition("?")
    request = Request(method.decode("ascii"), path, headers, client, query=query)
    length = body_length(request)
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise BadRequestError(417)
    if length > MAX_BODY_BYTES:
        raise BadRequestError(413)
    return request


def body_length(request: Request) -> int:
    """How many bytes follow the head. Raises `BadRequestError`."""
    given = request.headers.get("content-length")
    has_coding = "transfer-encoding" in request.headers
    if has_coding and (given is not None or not request.is_write):
        raise BadRequestError(400)
    if given is None:
        if has_coding or request.method in _NEEDS_BODY:
            raise BadRequestError(411)
        return 0
    if not (given.isascii() and given.isdigit()) or len(given) > _MAX_DIGITS:
        raise BadRequestError(400)
    length = int(given)
    if length and request.method in _WITHOUT_BODY:
        raise BadRequestError(400)  # what we answer to these takes no body
    return length


class AdminServer:
    """Serves `answer` on a listening socket, which it owns, and counts in `rejects` what it turns away."""

    def __init__(
        self,
        sock: socket.socket,
        answer: Answer,
        rejects: Tally,
        timeout_s: float = TIMEOUT_S,
        write_timeout_s: float = WRITE_TIMEOUT_S,
    ) -> None:
        self._sock = sock
        self._answer = answer
        self._rejects = rejects
        self._timeout_s = timeout_s
        self._write_timeout_s = write_timeout_s
        self._open: dict[asyncio.StreamWriter, asyncio.Task[None] | None] = {}
        self._streams: set[asyncio.Task[None] | None] = set()
        self._server: asyncio.Server | None = None
        self._is_closing = False

    @property
    def streams(self) -> int:
        """How many are open."""
        return len(self._streams)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, sock=self._sock, limit=MAX_HEAD_BYTES)

    async def finish(self) -> None:
        """Accept no more; answers under way may end, each within its time. The socket is closed."""
        if self._server is not None:
            self._server.close()
        tasks = [
            task for task in self._open.values() if task is not None and task is not asyncio.current_task()
        ]
        if tasks:
            await asyncio.wait(tasks, timeout=self._timeout_s)

    async def close(self) -> None:
        """Stop at once; answers under way are cut off."""
        self._is_closing = True
        if self._server is not None:
            self._server.close()
        tasks = [task for task in self._open.values() if task is not None]
        for stream in self._streams:
            if stream is not None:
                stream.cancel()  # it waits for its source, and would not see its connection go
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
            async with asyncio.timeout(self._timeout_s) as limit:
                request, response = await self._exchange(reader, writer, limit)
            if response.stream is not None and request is not None and request.method != "HEAD":
                if len(self._streams) < MAX_STREAMS:
                    await self._send_stream(writer, response, response.stream)
                    return
                self._rejects.add("too_many_streams")
                response = Response.plain(503, f"{MAX_STREAMS} streams are open already", Retry_After="5")
            async with asyncio.timeout(self._timeout_s):
                await _write(writer, response, is_head=request is not None and request.method == "HEAD")
                await writer.drain()
                writer.write_eof()
                # Closing with unread bytes would reset the connection, and the answer with it.
                await _linger(reader)
        except TimeoutError:
            if request is not None:  # else it is our answer that took too long, or it is counted already
                self._rejects.add("timeout")
            _make_reset(writer)
        except OSError:
            pass
        except asyncio.CancelledError:
            if not self._is_closing:
                raise  # else it ends here: asyncio's streams of Python 3.11 log a cancelled task as an error
        except Exception:
            log.exception("the admin listener failed to answer: this is a defect")
        finally:
            self._open.pop(writer, None)
            writer.transport.abort()

    async def _send_stream(
        self,
        writer: asyncio.StreamWriter,
        response: Response,
        stream: Callable[[], AsyncGenerator[bytes, None]],
    ) -> None:
        """Until the source ends, the client has gone, or takes nothing for so long that it is cut off."""
        task = asyncio.current_task()
        self._streams.add(task)
        writer.transport.set_write_buffer_limits(high=_STREAM_BACKLOG_BYTES)
        try:
            await _write(writer, response, is_head=True)
            async with aclosing(stream()) as chunks:
                async for chunk in chunks:
                    writer.write(chunk)
                    async with asyncio.timeout(self._timeout_s):
                        await writer.drain()
        finally:
            self._streams.discard(task)

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: asyncio.Timeout
    ) -> tuple[Request | None, Response]:
        """One request and its answer; `limit` is put off for a write."""
        try:
            async with asyncio.timeout(self._timeout_s / 2):
                head = await reader.readuntil(b"\r\n\r\n")
                request = parse_head(head, _client(writer))
                if length := body_length(request):
                    if "expect" in request.headers and head.split(b"\r\n", 1)[0].endswith(b"HTTP/1.1"):
                        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    request = replace(request, body=await reader.readexactly(length))
        except asyncio.LimitOverrunError:
            return None, self._bad_request(431)
        except asyncio.IncompleteReadError as error:
            if not error.partial and error.expected is None:
                raise ConnectionResetError from None  # a probe of the port: nothing to answer
            return None, self._bad_request(400)
        except TimeoutError:
            self._rejects.add("timeout")
            return None, rejected(408)
        except BadRequestError as error:
            return None, self._bad_request(error.status)
        if request.is_write:
            limit.reschedule(asyncio.get_running_loop().time() + self._write_timeout_s)
        response = await self._answer(request)
        if response.is_reject:
            self._rejects.add("bad_request")
        return request, response

    def _bad_request(self, status: int) -> Response:
        self._rejects.add("bad_request")
        return rejected(status)


def _client(writer: asyncio.StreamWriter) -> str:
    peer = writer.get_extra_info("peername")  # None if it has gone already
    return str(peer[0]) if peer else ""


async def _linger(reader: asyncio.StreamReader) -> None:
    left = _LINGER_BYTES
    while left > 0 and (chunk := await reader.read(MAX_BODY_BYTES)):
        left -= len(chunk)


def _make_reset(writer: asyncio.StreamWriter) -> None:
    """Have the close reset it, or the kernel would go on offering what the client does not take."""
    sock: socket.socket = writer.get_extra_info("socket")
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass  # it is closed already


async def _write(writer: asyncio.StreamWriter, response: Response, *, is_head: bool) -> None:
    """In pieces: a scrape's text is shared by all who asked for it, and no copy of it waits for each."""
    lines = [
        f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}",
        f"Content-Type: {response.content_type}",
        *((f"Content-Length: {len(response.body)}",) if response.stream is None else ()),
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
        *(f"{name}: {value}" for name, value in response.headers.items()),
    ]
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    writer.write(head)
    body = memoryview(b"" if is_head else response.body)
    for start in range(0, len(body), _PIECE_BYTES):
        writer.write(body[start : start + _PIECE_BYTES])
        await writer.drain()
