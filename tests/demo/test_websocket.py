"""The WebSocket echo, with the `websockets` library as its client, and raw frames where that one is too
polite.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import Close, Frame, Opcode

from expressgateway.demo.backends import HttpBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def run(test: Callable[[HttpBackend], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        backend = HttpBackend("one")
        await backend.start()
        try:
            await test(backend)
        finally:
            await backend.close()

    asyncio.run(main())


def url(backend: HttpBackend) -> str:
    host, port = backend.address
    return f"ws://{host}:{port}/ws"


class TestEcho:
    def test_text_and_binary_of_every_length_form(self) -> None:
        async def test(backend: HttpBackend) -> None:
            async with connect(url(backend), max_size=None, compression=None) as client:
                assert client.response is not None
                assert client.response.headers["X-Backend"] == "one"
                for size in (0, 1, 125, 126, 65535, 65536, 1_000_000):
                    data = os.urandom(size)
                    await client.send(data)
                    assert await client.recv() == data
                await client.send("grüße")
                assert await client.recv() == "grüße"

        run(test)

    def test_fragments_and_a_character_across_them(self) -> None:
        async def test(backend: HttpBackend) -> None:
            async with connect(url(backend)) as client:
                await client.send(["a", "b", "c"])
                assert await client.recv() == "abc"
            reader, writer = await asyncio.open_connection(*backend.address)
            writer.write(HANDSHAKE)
            await reader.readuntil(b"\r\n\r\n")
            euro = "€".encode()
            writer.write(Frame(Opcode.TEXT, euro[:1], False).serialize(mask=True))
            writer.write(Frame(Opcode.PING, b"?").serialize(mask=True))
            writer.write(Frame(Opcode.CONT, euro[1:]).serialize(mask=True))
            expected = b"\x01\x01" + euro[:1] + b"\x8a\x01?" + b"\x80\x02" + euro[1:]
            assert await reader.readexactly(len(expected)) == expected
            writer.close()

        run(test)

    def test_ping_pong_and_close(self) -> None:
        async def test(backend: HttpBackend) -> None:
            async with connect(url(backend), subprotocols=["chat", "other"]) as client:  # type: ignore[list-item]
                assert client.subprotocol == "chat"
                await (await client.ping(b"x"))
                await client.close(4000, "enough")
                assert client.close_code == 4000

        run(test)


class TestHandshake:
    @pytest.mark.parametrize(
        ("old", "new", "status"),
        [
            (b"Upgrade: websocket", b"Upgrade: h2c", 426),
            (b"keep-alive, Upgrade", b"keep-alive", 426),
            (b"Version: 13", b"Version: 8", 400),
            (b"ZQ==", b"ZQ=", 400),
            (b"GET", b"POST", 400),
        ],
    )
    def test_is_refused(self, old: bytes, new: bytes, status: int) -> None:
        async def test(backend: HttpBackend) -> None:
            reader, writer = await asyncio.open_connection(*backend.address)
            writer.write(HANDSHAKE.replace(old, new))
            assert (await reader.readline()).split()[1] == str(status).encode()
            writer.close()

        run(test)


class TestWrongFrames:
    @pytest.mark.parametrize(
        ("data", "code"),
        [
            (Frame(Opcode.TEXT, b"x").serialize(mask=False), 1002),
            (b"\x83\x80\0\0\0\0", 1002),
            (b"\xc1\x80\0\0\0\0", 1002),
            (b"\x80\x80\0\0\0\0", 1002),
            (b"\x01\x80\0\0\0\0\x81\x80\0\0\0\0", 1002),
            (b"\x89\xfe\0\x7e\0\0\0\0", 1002),
            (b"\x09\x80\0\0\0\0", 1002),
            (b"\x88\x81\0\0\0\0x", 1002),
            (b"\x88\x82\0\0\0\0\x03\xed", 1002),
            (b"\x81\x81\0\0\0\0\xff", 1007),
            (b"\x81\x81\0\0\0\0\xc3", 1007),
            (b"\x82\xff\0\0\0\0\xff\0\0\0\0\0\0\0", 1009),
        ],
    )
    def test_end_with_their_code(self, data: bytes, code: int) -> None:
        async def test(backend: HttpBackend) -> None:
            reader, writer = await asyncio.open_connection(*backend.address)
            writer.write(HANDSHAKE + data)
            await reader.readuntil(b"\r\n\r\n")
            rest = await reader.read()
            at = rest.index(b"\x88")
            assert Close.parse(rest[at + 2 :]).code == code
            writer.close()

        run(test)

    def test_a_client_that_vanishes(self) -> None:
        async def test(backend: HttpBackend) -> None:
            async with connect(url(backend)) as client:
                client.transport.abort()
                with pytest.raises(ConnectionClosed):
                    await client.recv()
            async with connect(url(backend)) as other:
                await other.send("still there?")
                assert await other.recv() == "still there?"

        run(test)
