"""The common part of the demo's TCP servers."""

from __future__ import annotations

import asyncio

import pytest

from expressgateway.demo import stream
from expressgateway.demo.backends import TcpEcho


def test_more_connections_than_allowed_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_CONNECTIONS", 2)

    async def main() -> None:
        server = TcpEcho()
        await server.start()
        pairs = []
        for _ in range(2):
            reader, writer = await asyncio.open_connection(*server.address)
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            pairs.append((reader, writer))
        reader, writer = await asyncio.open_connection(*server.address)
        assert await reader.read() == b""
        writer.close()
        for _, writer in pairs:
            writer.close()
        await server.close()

    asyncio.run(main())


def test_a_server_that_was_never_started_can_be_closed() -> None:
    asyncio.run(TcpEcho().close())


def test_an_address_in_use_is_an_error() -> None:
    async def main() -> None:
        first, second = TcpEcho(), TcpEcho()
        await first.start()
        with pytest.raises(OSError, match="in use"):
            await second.start(*first.address)
        await first.close()

    asyncio.run(main())
