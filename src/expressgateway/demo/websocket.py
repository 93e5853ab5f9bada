"""The WebSocket echo of the demo's backends (RFC 6455).

Every frame comes back as it came, fragment by fragment; pings are answered, a Close is returned. Text must
be UTF-8. Extensions are not accepted; of the subprotocols offered the first one is.
"""

from __future__ import annotations

import asyncio
import codecs
from typing import TYPE_CHECKING, Final

from expressgateway.demo.http import RequestError
from expressgateway.wire import ws

if TYPE_CHECKING:
    from expressgateway.demo.http import Exchange

__all__ = ["echo_websocket"]

MAX_FRAME_BYTES: Final = 16 * 1024 * 1024
IDLE_TIMEOUT_S: Final = 600.0  # longer than any gateway's in front: its own limits are what is shown

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
INVALID_PAYLOAD: Final = 1007


class _EchoError(Exception):
    """The connection is to be closed with this code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


async def echo_websocket(exchange: Exchange, headers: list[tuple[str, str]]) -> None:
    """Shake hands, with `headers` in the answer, and echo until either side is done. Ends the connection."""
    key = (exchange.header("sec-websocket-key") or "").encode("latin-1")
    if "websocket" not in exchange.values("upgrade") or "upgrade" not in exchange.values("connection"):
        raise RequestError(426, "This address speaks WebSocket: ask with Upgrade: websocket.")
    if (
        exchange.method != "GET"
        or exchange.header("sec-websocket-version") != "13"
        or not ws.is_valid_key(key)
    ):
        raise RequestError(400, "This is not a WebSocket handshake of version 13.")
    fields = [
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Accept", ws.accept_value(key).decode()),
        *headers,
    ]
    offered = exchange.header("sec-websocket-protocol")
    if offered:
        fields.append(("Sec-WebSocket-Protocol", offered.split(",")[0].strip()))
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields)
    exchange.has_started, exchange.keeps_alive = True, False
    exchange.writer.write(f"HTTP/1.1 101 Switching Protocols\r\n{lines}\r\n".encode("latin-1"))
    try:
        async with asyncio.timeout(None) as idle:
            await _echo_frames(exchange.reader, exchange.writer, idle)
    except _EchoError as failure:
        exchange.writer.write(ws.close_frame(failure.code, str(failure)))
    except TimeoutError:
        exchange.writer.write(ws.close_frame(ws.GOING_AWAY, "idle"))


async def _echo_frames(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, idle: asyncio.Timeout
) -> None:
    loop = asyncio.get_running_loop()
    text: codecs.IncrementalDecoder | None = None  # of the text message that is open
    is_open = False  # a fragmented message is
    while True:
        idle.reschedule(loop.time() + IDLE_TIMEOUT_S)
        first, opcode, payload = await _read_frame(reader)
        is_final = first >= 0x80
        if opcode == CLOSE:
            code = int.from_bytes(payload[:2], "big") if payload else 1000
            try:
                writer.write(ws.close_frame(code) if payload else b"\x88\x00")
            except ValueError:
                raise _EchoError(ws.PROTOCOL_ERROR, "not a close code") from None
            return
        if opcode == PING:
            writer.write(bytes((0x80 | PONG, len(payload))) + payload)
        elif opcode != PONG:
            if (opcode == CONTINUATION) is not is_open:
                raise _EchoError(ws.PROTOCOL_ERROR, "fragments out of order")
            if opcode == TEXT:
                text = codecs.getincrementaldecoder("utf-8")()
            is_open = not is_final
            try:
                if text is not None:
                    text.decode(payload, is_final)
            except UnicodeDecodeError:
                raise _EchoError(INVALID_PAYLOAD, "text that is not UTF-8") from None
            text = text if is_open else None
            writer.write(_frame_head(first, len(payload)))
            writer.write(payload)
        await writer.drain()


async def _read_frame(reader: asyncio.StreamReader) -> tuple[int, int, bytes]:
    """(first byte, opcode, payload) of the next frame. Raises EOFError at the end of the stream."""
    first, second = await reader.readexactly(2)
    opcode, size = first & 0x0F, second & 0x7F
    if first & 0x70 or opcode not in {CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG}:
        raise _EchoError(ws.PROTOCOL_ERROR, "reserved bits or opcode")
    if second < 0x80:
        raise _EchoError(ws.PROTOCOL_ERROR, "frame not masked")
    if opcode >= CLOSE and (size > 125 or first < 0x80 or (opcode == CLOSE and size == 1)):
        raise _EchoError(ws.PROTOCOL_ERROR, "control frame too long, fragmented or cut")
    if size >= 126:
        size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8), "big")
    if size > MAX_FRAME_BYTES:
        raise _EchoError(ws.MESSAGE_TOO_BIG, "frame too big")
    mask = await reader.readexactly(4)
    payload = await reader.readexactly(size)
    # One exclusive-or over the whole payload as a number: a loop over its bytes would take seconds at 16 MiB.
    pattern = (mask * (size // 4 + 1))[:size]
    unmasked = int.from_bytes(payload, "big") ^ int.from_bytes(pattern, "big")
    return first, opcode, unmasked.to_bytes(size, "big")


def _frame_head(first: int, size: int) -> bytes:
    if size < 126:
        return bytes((first, size))
    if size < 65536:
        return bytes((first, 126)) + size.to_bytes(2, "big")
    return bytes((first, 127)) + size.to_bytes(8, "big")
