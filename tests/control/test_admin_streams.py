"""Streams of the admin listener: bounded, dropped when they are not read, closed at the end; and its page."""

import asyncio
import hashlib
import json
import re
import select
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import pytest

import expressgateway.control.admin
from expressgateway.config.schema import Config
from expressgateway.control.admin.endpoints import Endpoints
from expressgateway.control.admin.http import MAX_STREAMS, AdminServer, Request, Response
from expressgateway.control.admin.live import Facts
from expressgateway.control.admin.page import PATHS
from expressgateway.observe.counters import Tally
from tests.control.test_admin_http import Shown, ask, get, status_of

CONFIG: Final = Config.model_validate(
    {"listeners": [{"address": "127.0.0.1:1", "protocol": "tcp", "backends": [{"address": "127.0.0.1:2"}]}]}
)


class Watched(Shown):
    """A gateway without workers to look at."""

    def facts(self) -> Facts:
        status: dict[str, Any] = {
            "pid": 1,
            "version": "x",
            "state": "serving",
            "uptime_s": 1.0,
            "config": {"path": "/x.toml", "version": 1, "applied_at": 0.0},
            "reload": {"requested": 0, "finished": 0, "last_result": None, "last_report": []},
            "listeners": [],
            "workers": [],
        }
        return Facts(status, CONFIG)


Stream = Callable[[], AsyncGenerator[bytes, None]]


async def forever() -> AsyncGenerator[bytes, None]:
    yield b"hello\n"
    await asyncio.Event().wait()


async def flood() -> AsyncGenerator[bytes, None]:
    while True:
        yield b"x" * 100_000


def served(
    test: Callable[[int, Tally], Awaitable[None]],
    stream: Stream | None = None,
    shown: Shown | None = None,
    timeout_s: float = 5.0,
) -> Tally:
    async def answer(_: Request) -> Response:
        return Response(200, content_type="text/event-stream", stream=stream)

    async def main() -> Tally:
        sock = socket.create_server(("127.0.0.1", 0))
        seen = shown or Watched()
        chosen = answer if stream is not None else Endpoints(seen, seen.rejects).answer
        server = AdminServer(sock, chosen, seen.rejects, timeout_s)
        await server.start()
        try:
            async with asyncio.timeout(30):
                await test(sock.getsockname()[1], seen.rejects)
        finally:
            await server.close()
            sock.close()
        return seen.rejects

    return asyncio.run(main())


Opened = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def opened(port: int, *lines: str) -> Opened:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(get("/api/v1/events", *lines))
    return reader, writer


async def state(reader: asyncio.StreamReader) -> dict[str, Any]:
    """The next one."""
    while not (line := await reader.readuntil(b"\n")).startswith(b'data: {"at"'):
        pass
    shown: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
    return shown


class TestStreams:
    def test_head_and_events(self) -> None:
        async def test(port: int, _: Tally) -> None:
            reader, writer = await opened(port)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert b"Content-Type: text/event-stream\r\n" in head
            assert b"Cache-Control: no-store\r\n" in head
            assert b"Content-Length" not in head
            assert await reader.readline() == b"event: history\n"
            assert (await state(reader))["gateway"]["state"] == "serving"
            assert (await state(reader))["pools"] == []
            writer.close()

        served(test)

    def test_head_alone(self) -> None:
        async def test(port: int, _: Tally) -> None:
            head, body = await ask(port, get("/api/v1/events", method="HEAD"))
            assert head.startswith(b"HTTP/1.1 200 ")
            assert body == b""

        served(test)

    def test_the_seventeenth_is_refused_and_a_place_that_is_left_is_free(self) -> None:
        async def test(port: int, rejects: Tally) -> None:
            held = [await opened(port) for _ in range(MAX_STREAMS)]
            for reader, _ in held:
                await reader.readuntil(b"hello\n")
            head, body = await ask(port, get("/api/v1/events"))
            assert head.startswith(b"HTTP/1.1 503 ")
            assert b"Retry-After: 5" in head
            assert body == b"16 streams are open already\n"
            assert rejects == {"too_many_streams": 1}
            assert await status_of(port, get("/api/v1/events", method="HEAD")) == 200
            for _, writer in held:
                writer.close()

        served(test, forever)

    def test_who_leaves_makes_room(self) -> None:
        async def test(port: int, _: Tally) -> None:
            held = [await opened(port) for _ in range(MAX_STREAMS)]
            for reader, writer in held:
                await state(reader)
                writer.transport.abort()
            line = b""
            while b" 200 " not in line:  # that a reader has gone is seen when it is to get the next event
                reader, writer = await opened(port)
                line = await reader.readline()
                writer.transport.abort()

        served(test)

    def test_who_does_not_read_is_cut_off(self) -> None:
        async def test(port: int, rejects: Tally) -> None:
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.send(get("/x"))
                poller = select.poll()
                poller.register(client, 0)
                events = await asyncio.get_running_loop().run_in_executor(None, poller.poll, 60_000)
            assert events
            assert events[0][1] & select.POLLERR
            assert rejects == {"timeout": 1}

        served(test, flood, timeout_s=0.2)

    def test_the_end_closes_them(self, caplog: pytest.LogCaptureFixture) -> None:
        with socket.socket() as client:

            async def test(port: int, _: Tally) -> None:
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(client, ("127.0.0.1", port))
                await loop.sock_sendall(client, get("/x"))
                while b"hello" not in await loop.sock_recv(client, 4096):
                    pass

            served(test, forever)  # would else wait for ever
        assert not caplog.records

    def test_another_token_ends_it(self) -> None:
        shown = Watched("secret")

        async def test(port: int, _: Tally) -> None:
            assert await status_of(port, get("/api/v1/events")) == 401
            reader, writer = await opened(port, "Authorization: Bearer secret")
            await state(reader)
            shown.token_hash = hashlib.sha256(b"other").hexdigest()
            await reader.read()  # to its end, within a second
            writer.close()

        served(test, shown=shown)


class TestPage:
    def test_holds_no_data_and_needs_no_token(self) -> None:
        async def test(port: int, _: Tally) -> None:
            for path in PATHS:
                head, body = await ask(port, get(path))
                assert head.startswith(b"HTTP/1.1 200 ")
                assert body
                assert b"\r\nContent-Security-Policy: default-src 'none'; script-src 'self'; " in head
                assert b"frame-ancestors 'none'" in head
                assert b"\r\nX-Content-Type-Options: nosniff" in head
                assert b"\r\nReferrer-Policy: no-referrer" in head
                assert b"\r\nCache-Control: no-store" in head
            __, body = await ask(port, get("/"))
            assert b'data-token="needed"' in body
            assert await status_of(port, get("/", "Content-Length: 0", method="POST")) == 405
            assert await status_of(port, get("/assets/other.js")) == 404

        served(test, shown=Watched("secret"))

    def test_without_a_token_the_host_is_checked(self) -> None:
        async def test(port: int, _: Tally) -> None:
            wire = get("/").replace(b"Host: localhost", b"Host: rebound.example")
            assert await status_of(port, wire) == 421
            __, body = await ask(port, get("/"))
            assert b'data-token="none"' in body

        served(test)

    def test_nothing_stands_inline_and_nothing_comes_from_elsewhere(self) -> None:
        files = Path(expressgateway.control.admin.__file__).parent / "dashboard"
        page = (files / "index.html").read_text()
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
        for name in ("index.html", "dashboard.css", "dashboard.js", "favicon.svg"):
            text = (files / name).read_text().replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?://|url\(|@import|innerHTML|eval\(", text), name
