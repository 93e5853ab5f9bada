"""The backends of the demo: HTTP, TCP and UDP servers that say who they are and send back what they get.

An HTTP backend has a *name*, which stands in its text and in the header `X-Backend` of every answer. The
TCP and UDP ones echo and add nothing, so that what came through the gateway can be compared byte for byte.

They run in the event loop of whoever starts them, on loopback, and share no code with the gateway's data
path.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Final, Self

from expressgateway.demo.http import Exchange, HttpServer, RequestError
from expressgateway.demo.stream import StreamServer
from expressgateway.demo.websocket import echo_websocket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["BACKEND_NAMES", "DemoBackends", "HttpBackend", "TcpEcho", "UdpEcho"]

BACKEND_NAMES: Final = ("one", "two")

MAX_SLOW_S: Final = 60.0
MAX_STREAM_LINES: Final = 1000
STREAM_INTERVAL_MS: Final = 200
MAX_BYTES: Final = 1 << 30
BLOCK: Final = bytes(range(256)) * 256  # 64 KiB, and every byte can be told from its neighbours
MAX_DATAGRAMS_A_TURN: Final = 64  # then others get theirs
TCP_IDLE_TIMEOUT_S: Final = 600.0


class HttpBackend(HttpServer):
    """Answers `/`, `/echo`, `/slow`, `/stream`, `/bytes`, `/status` and `/ws`; anything else is 404."""

    def __init__(self, name: str) -> None:
        super().__init__(self._answer)
        self.name = name
        self._who = [("X-Backend", name)]
        self._pages: dict[str, Callable[[Exchange], Awaitable[None]]] = {
            "/": self._tell,
            "/echo": self._echo,
            "/slow": self._slow,
            "/stream": self._stream,
            "/bytes": self._bytes,
            "/status": self._status,
            "/ws": self._websocket,
        }

    async def _answer(self, exchange: Exchange) -> None:
        page = self._pages.get(exchange.path)
        if page is None:
            known = " ".join(self._pages)
            await exchange.respond(404, f"Backend {self.name} knows only {known}\n", self._who)
        else:
            await page(exchange)

    async def _tell(self, exchange: Exchange) -> None:
        lines = [f"This is backend {self.name}. It was asked:", "", exchange.request_line]
        lines += [f"{name}: {value}" for name, value in exchange.headers]
        await exchange.respond(200, "\n".join(lines) + "\n", self._who)

    async def _echo(self, exchange: Exchange) -> None:
        # The first piece is asked for before the answer begins, so that 100 Continue comes before 200.
        body = exchange.body()
        piece = await anext(body, b"")
        kind = exchange.header("content-type") or "application/octet-stream"
        length = None if exchange.is_chunked else exchange.length
        sends_body = await exchange.start(200, [("Content-Type", kind), *self._who], length)
        while piece:
            if sends_body:
                await exchange.send(piece)
            piece = await anext(body, b"")
        await exchange.finish(exchange.trailers)

    async def _slow(self, exchange: Exchange) -> None:
        seconds = _number(exchange, "s", 2.0, MAX_SLOW_S)
        await asyncio.sleep(seconds)
        await exchange.respond(200, f"Backend {self.name} took {seconds:g} seconds.\n", self._who)

    async def _stream(self, exchange: Exchange) -> None:
        lines = int(_number(exchange, "n", 10, MAX_STREAM_LINES))
        interval_s = _number(exchange, "ms", STREAM_INTERVAL_MS, 10_000) / 1000
        if await exchange.start(200, [("Content-Type", "text/plain"), *self._who]):
            for line in range(1, lines + 1):
                await exchange.send(f"line {line} of {lines} from backend {self.name}\n".encode())
                if line < lines:
                    await asyncio.sleep(interval_s)
            await exchange.finish()

    async def _bytes(self, exchange: Exchange) -> None:
        left = int(_number(exchange, "n", 1024, MAX_BYTES))
        if await exchange.start(200, [("Content-Type", "application/octet-stream"), *self._who], left):
            while left:
                piece = BLOCK[:left]
                await exchange.send(piece)
                left -= len(piece)

    async def _status(self, exchange: Exchange) -> None:
        code = int(_number(exchange, "code", 200, 599))
        if code < 200:
            raise RequestError(400, "code must be from 200 to 599.")
        await exchange.respond(code, f"Backend {self.name} answers {code}, as asked.\n", self._who)

    async def _websocket(self, exchange: Exchange) -> None:
        await echo_websocket(exchange, self._who)


def _number(exchange: Exchange, key: str, default: float, top: float) -> float:
    """A number of the query, cut at `top`. Raises RequestError on anything but decimal digits with a
    point.
    """
    text = exchange.query.get(key)
    if text is None:
        return default
    if not text.isascii() or not text.replace(".", "", 1).isdigit() or len(text) > 20:
        raise RequestError(400, f"{key} must be a number.")
    return min(float(text), top)


class TcpEcho(StreamServer):
    """Sends back what it gets, byte for byte, and ends when the other side has ended."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as idle:
            while True:
                idle.reschedule(loop.time() + TCP_IDLE_TIMEOUT_S)
                data = await reader.read(65536)
                if not data:
                    break
                writer.write(data)
                await writer.drain()


class UdpEcho:
    """Sends back each datagram to whom it came from; an empty one too, which asyncio's transports drop."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    @property
    def address(self) -> tuple[str, int]:
        """(host, port) it listens on."""
        if self._socket is None:
            raise RuntimeError("the server is not started")
        host, port = self._socket.getsockname()[:2]
        return host, port

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen; port 0 takes a free one. Raises OSError."""
        listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        try:
            listening.setblocking(False)
            listening.bind((host, port))
        except OSError:
            listening.close()
            raise
        self._socket = listening
        asyncio.get_running_loop().add_reader(listening, self._echo, listening)

    async def close(self) -> None:
        """Stop. Idempotent."""
        if self._socket is not None and self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()

    def _echo(self, listening: socket.socket) -> None:
        try:
            for _ in range(MAX_DATAGRAMS_A_TURN):
                data, sender = listening.recvfrom(65536)
                listening.sendto(data, sender)
        except OSError:
            pass  # nothing left to read, no room to send, or nobody there: a datagram may be lost


class DemoBackends:
    """One HTTP, one TCP and one UDP backend for each of BACKEND_NAMES, started and closed together."""

    def __init__(self) -> None:
        self.http = tuple(HttpBackend(name) for name in BACKEND_NAMES)
        self.tcp = tuple(TcpEcho() for _ in BACKEND_NAMES)
        self.udp = tuple(UdpEcho() for _ in BACKEND_NAMES)
        self._all: tuple[StreamServer | UdpEcho, ...] = (*self.http, *self.tcp, *self.udp)

    async def __aenter__(self) -> Self:
        try:
            for server in self._all:
                await server.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all of them. Idempotent."""
        for server in self._all:
            await server.close()
