"""The demo's backends as curl and sockets see them."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from expressgateway.demo.backends import DemoBackends

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path


def run(test: Callable[[DemoBackends], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with DemoBackends() as backends:
            await test(backends)

    asyncio.run(main())


async def curl(*arguments: str) -> bytes:
    done = await asyncio.to_thread(
        subprocess.run, ["curl", "-sS", "--max-time", "30", *arguments], capture_output=True, check=True
    )
    return bytes(done.stdout)


def urls(backends: DemoBackends) -> list[str]:
    return [f"http://{host}:{port}" for host, port in (server.address for server in backends.http)]


class TestHttp:
    def test_the_two_tell_each_other_apart(self) -> None:
        async def test(backends: DemoBackends) -> None:
            for url, name in zip(urls(backends), ("one", "two"), strict=True):
                answer = (await curl("-i", "-H", "X-Test: a", "-H", "X-Test: b", f"{url}/?x=y")).decode()
                assert f"X-Backend: {name}\r\n" in answer
                assert f"This is backend {name}. It was asked:\n\nGET /?x=y HTTP/1.1\n" in answer
                assert "X-Test: a\nX-Test: b\n" in answer

        run(test)

    @pytest.mark.parametrize("header", ["Expect:", "Transfer-Encoding: chunked", "Expect: 100-continue"])
    @pytest.mark.parametrize("size", [1, 3_000_000])
    def test_echo_gives_back_every_byte(self, tmp_path: Path, header: str, size: int) -> None:
        async def test(backends: DemoBackends) -> None:
            upload = tmp_path / "upload"
            upload.write_bytes(os.urandom(size))
            arguments = ("-H", header, "-H", "Content-Type: a/b", "-D", str(tmp_path / "head"))
            body = await curl("-T", str(upload), *arguments, urls(backends)[0] + "/echo")
            assert body == upload.read_bytes()
            head = (tmp_path / "head").read_text()
            assert "Content-Type: a/b\n" in head
            assert ("Transfer-Encoding: chunked" in head) is ("chunked" in header)
            if "Expect" in header:
                assert ("100 Continue" in head) is ("100-continue" in header)

        run(test)

    def test_slow_takes_its_time(self) -> None:
        async def test(backends: DemoBackends) -> None:
            loop = asyncio.get_running_loop()
            begin = loop.time()
            assert await curl(urls(backends)[0] + "/slow?s=0.2") == b"Backend one took 0.2 seconds.\n"
            assert loop.time() - begin >= 0.2

        run(test)

    def test_stream_sends_each_line_when_it_is_made(self) -> None:
        async def test(backends: DemoBackends) -> None:
            reader, writer = await asyncio.open_connection(*backends.http[1].address)
            # The second line would come in ten seconds: what comes now was sent alone.
            writer.write(b"GET /stream?n=2&ms=10000 HTTP/1.1\r\nHost: x\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"\r\nTransfer-Encoding: chunked\r\n" in head
            assert (await reader.readuntil(b"\n\r\n")).endswith(b"line 1 of 2 from backend two\n\r\n")
            writer.close()
            whole = (await curl(urls(backends)[1] + "/stream?n=3&ms=1")).decode().splitlines()
            assert whole == [f"line {number} of 3 from backend two" for number in (1, 2, 3)]

        run(test)

    def test_bytes(self) -> None:
        async def test(backends: DemoBackends) -> None:
            for size in (0, 1, 65536, 200_001):
                body = await curl(urls(backends)[0] + f"/bytes?n={size}")
                assert body == (bytes(range(256)) * (size // 256 + 1))[:size]

        run(test)

    @pytest.mark.parametrize("code", [200, 204, 304, 404, 503, 599])
    def test_status(self, code: int) -> None:
        async def test(backends: DemoBackends) -> None:
            shown = await curl(
                "-o", os.devnull, "-w", "%{http_code}", urls(backends)[0] + f"/status?code={code}"
            )
            assert shown == str(code).encode()

        run(test)

    def test_another_page(self) -> None:
        async def test(backends: DemoBackends) -> None:
            assert await curl(urls(backends)[0] + "/no") == (
                b"Backend one knows only / /echo /slow /stream /bytes /status /ws\n"
            )

        run(test)


class TestTcp:
    def test_echo_to_the_last_byte_after_half_close(self) -> None:
        async def test(backends: DemoBackends) -> None:
            for server in backends.tcp:
                reader, writer = await asyncio.open_connection(*server.address)
                data = os.urandom(2_000_000)
                writer.write(data)
                writer.write_eof()
                assert await reader.readexactly(len(data)) == data
                assert await reader.read() == b""
                writer.close()

        run(test)

    def test_closing_ends_open_connections(self) -> None:
        async def test(backends: DemoBackends) -> None:
            reader, writer = await asyncio.open_connection(*backends.tcp[0].address)
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            await backends.tcp[0].close()
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
            writer.close()

        run(test)


class TestUdp:
    def test_echo(self) -> None:
        async def test(backends: DemoBackends) -> None:
            for server in backends.udp:
                with socket.socket(type=socket.SOCK_DGRAM) as client:
                    client.settimeout(30)
                    client.connect(server.address)
                    for data in (b"", b"x", os.urandom(60_000)):
                        client.send(data)
                        assert await asyncio.to_thread(client.recv, 65536) == data

        run(test)


def test_addresses_are_asked_for_after_the_start() -> None:
    backends = DemoBackends()
    for server in (backends.http[0], backends.tcp[0], backends.udp[0]):
        with pytest.raises(RuntimeError, match="not started"):
            server.address  # noqa: B018 - the look is the test
