"""The admin listener against clients that mean it no good, and what it answers to those that do."""

import asyncio
import hashlib
import json
import logging
import select
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expressgateway.control.admin import endpoints
from expressgateway.control.admin.endpoints import Endpoints
from expressgateway.control.admin.http import (
    MAX_CONNECTIONS,
    MAX_HEAD_BYTES,
    AdminServer,
    BadRequestError,
    parse_head,
)
from expressgateway.observe.counters import Tally
from expressgateway.observe.logs import Limited


class Shown:
    """A gateway to look at."""

    def __init__(self, token: str | None = None) -> None:
        self.token_hash = None if token is None else hashlib.sha256(token.encode()).hexdigest()
        self.is_started = True
        self.reason: str | None = None
        self.breaks = False
        self.rejects = Tally()

    def unready(self) -> str | None:
        return self.reason

    def status(self) -> dict[str, Any]:
        if self.breaks:
            raise RuntimeError("a defect")
        return {"state": "serving"}

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        return b"up 1\n", f"text/plain; for={accept}"


Ask = Callable[[bytes], Awaitable[tuple[bytes, bytes]]]


def served(
    test: Callable[[int], Awaitable[None]], shown: Shown | None = None, timeout_s: float = 5.0
) -> None:
    async def main() -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        seen = shown or Shown()
        server = AdminServer(sock, Endpoints(seen, seen.rejects).answer, seen.rejects, timeout_s)
        await server.start()
        try:
            async with asyncio.timeout(20):
                await test(sock.getsockname()[1])
        finally:
            await server.close()
            sock.close()

    asyncio.run(main())


async def ask(port: int, wire: bytes) -> tuple[bytes, bytes]:
    """Status line and headers, and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(wire)
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


def get(path: str, *lines: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


async def status_of(port: int, wire: bytes) -> int:
    head, _ = await ask(port, wire)
    return int(head.split(b" ")[1])


class TestPaths:
    def test_probes(self) -> None:
        shown = Shown("secret")  # probes need no token

        async def test(port: int) -> None:
            for path in ("/livez", "/healthz", "/readyz", "/startupz", "/livez?x=1"):
                assert await status_of(port, get(path)) == 200
            shown.reason = "draining"
            shown.is_started = False
            assert (await ask(port, get("/readyz")))[1] == b"draining\n"
            assert await status_of(port, get("/readyz")) == 503
            assert await status_of(port, get("/startupz")) == 503
            assert await status_of(port, get("/livez")) == 200
            assert await status_of(port, get("/")) == 404

        served(test, shown)

    def test_metrics_and_status(self) -> None:
        async def test(port: int) -> None:
            head, body = await ask(port, get("/metrics", "Accept: a/b"))
            assert body == b"up 1\n"
            assert b"Content-Type: text/plain; for=a/b" in head
            head, body = await ask(port, get("/api/v1/status"))
            assert json.loads(body) == {"state": "serving"}
            assert b"Connection: close" in head
            assert b"Cache-Control: no-store" in head

        served(test)

    def test_head_has_no_body(self) -> None:
        async def test(port: int) -> None:
            head, body = await ask(port, get("/metrics", method="HEAD"))
            assert body == b""
            assert b"Content-Length: 5" in head

        served(test)


class TestToken:
    @pytest.mark.parametrize(
        "line",
        [
            "X: y",
            "Authorization: Bearer wrong",
            "Authorization: Bearer",
            "Authorization: Basic secret",
            "Authorization: secret",
            "Authorization: Bearer secrets",
            "Authorization: Bearer \xff",
        ],
    )
    def test_wrong(self, line: str) -> None:
        async def test(port: int) -> None:
            for path in ("/metrics", "/api/v1/status", "/api/nothing"):
                head, _ = await ask(port, get(path, line).decode().encode("latin-1"))
                assert head.startswith(b"HTTP/1.1 401 ")
                assert b"WWW-Authenticate: Bearer" in head

        served(test, Shown("secret"))

    @pytest.mark.parametrize("line", ["Authorization: Bearer secret", "authorization:  bearer  secret "])
    def test_right(self, line: str) -> None:
        async def test(port: int) -> None:
            assert await status_of(port, get("/metrics", line)) == 200
            assert await status_of(port, get("/api/nothing", line)) == 404

        served(test, Shown("secret"))

    def test_wrong_ones_are_counted_each_and_logged_once(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(endpoints, "limited", Limited(logging.getLogger("expressgateway.test")))
        shown = Shown("secret")

        async def test(port: int) -> None:
            for path in ("/metrics", "/api/v1/status", "/api/nothing"):
                assert await status_of(port, get(path, "Authorization: Bearer hush-hush")) == 401
            assert await status_of(port, get("/metrics", "Authorization: Bearer secret")) == 200
            assert await status_of(port, get("/livez")) == 200

        served(test, shown)
        assert shown.rejects == {"unauthorized": 3}
        (line,) = caplog.records
        assert line.__dict__["fields"] == {"kind": "admin_unauthorized", "source": "127.0.0.1"}
        assert "hush" not in caplog.text

    def test_two_are_none(self) -> None:
        async def test(port: int) -> None:
            wire = get("/metrics", "Authorization: Bearer wrong", "Authorization: Bearer secret")
            assert await status_of(port, wire) == 400

        served(test, Shown("secret"))


class TestAbuse:
    @pytest.mark.parametrize(
        ("wire", "status"),
        [
            (get("/livez", method="POST"), 405),
            (get("/livez", method="DELETE"), 405),
            (get("/livez", "Content-Length: 3"), 400),
            (get("/livez", "Transfer-Encoding: chunked"), 400),
            (b"GET /livez HTTP/1.1\r\n\r\n", 400),
            (b"GET http://x/livez HTTP/1.1\r\nHost: x\r\n\r\n", 400),
            (b"GET /livez HTTP/2.0\r\nHost: x\r\n\r\n", 505),
            (b"GET /livez HTTP/1.1\nHost: x\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nHost : x\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nHost: x\0\r\n\r\n", 400),
            (b"GET  /livez HTTP/1.1\r\nHost: x\r\n\r\n", 400),
            (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
            (get("/livez", "X: " + "a" * MAX_HEAD_BYTES), 431),
            (b"a" * (1 << 20), 431),
        ],
    )
    def test_answered_and_closed(self, wire: bytes, status: int) -> None:
        shown = Shown()

        async def test(port: int) -> None:
            assert await status_of(port, wire[: 4 * MAX_HEAD_BYTES]) == status
            assert await status_of(port, get("/livez")) == 200

        served(test, shown)
        assert shown.rejects == {"bad_request": 1}

    def test_probe_of_the_port_is_no_abuse(self) -> None:
        shown = Shown()

        async def test(port: int) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
            assert await status_of(port, get("/nothing")) == 404

        served(test, shown)
        assert shown.rejects == {}

    def test_allowed_methods_are_named(self) -> None:
        async def test(port: int) -> None:
            head, _ = await ask(port, get("/livez", method="PUT"))
            assert b"\r\nAllow: GET, HEAD" in head

        served(test)

    def test_slow_head(self) -> None:
        shown = Shown()

        async def test(port: int) -> None:
            assert await status_of(port, b"GET /livez HT") == 408

        served(test, shown, timeout_s=0.2)
        assert shown.rejects == {"timeout": 1}

    def test_head_cut_short(self) -> None:
        shown = Shown()

        async def test(port: int) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /livez HT")
            writer.write_eof()
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
            writer.close()

        served(test, shown)
        assert shown.rejects == {"bad_request": 1}

    def test_answer_of_ours_that_takes_too_long_is_nobodys_abuse(self) -> None:
        class Slow(Shown):
            async def metrics(self, accept: str) -> tuple[bytes, str]:
                await asyncio.Event().wait()
                raise AssertionError

        shown = Slow()

        async def test(port: int) -> None:
            assert await ask_or_reset(port, get("/metrics")) == b""

        served(test, shown, timeout_s=0.2)
        assert shown.rejects == {}

    def test_reader_that_does_not_read(self) -> None:
        class Big(Shown):
            async def metrics(self, accept: str) -> tuple[bytes, str]:
                return b"x" * 50_000_000, "text/plain"

        async def test(port: int) -> None:
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.send(get("/metrics"))
                poller = select.poll()
                poller.register(client, 0)  # an error is always reported; that there is data is not
                events = await asyncio.get_running_loop().run_in_executor(None, poller.poll, 10_000)
            assert events
            assert events[0][1] & select.POLLERR, "not cut off"

        shown = Big()
        served(test, shown, timeout_s=0.2)
        assert shown.rejects == {"timeout": 1}

    def test_sixty_fifth_connection_is_closed_and_the_others_go_on(self) -> None:
        shown = Shown()

        async def test(port: int) -> None:
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(MAX_CONNECTIONS)]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                assert await reader.read() == b""
            except ConnectionResetError:
                pass
            writer.close()
            for reader, writer in held:
                writer.write(get("/livez"))
                assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
                writer.close()
            assert await status_of(port, get("/livez")) == 200

        served(test, shown)
        assert shown.rejects == {"too_many": 1}

    def test_defect_closes_one_connection_only(self, caplog: pytest.LogCaptureFixture) -> None:
        shown = Shown()
        shown.breaks = True

        async def test(port: int) -> None:
            assert await ask_or_reset(port, get("/api/v1/status")) == b""
            assert await status_of(port, get("/livez")) == 200

        served(test, shown)
        assert "a defect" in caplog.text

    @given(st.binary(max_size=200))
    def test_parser_raises_nothing_else(self, head: bytes) -> None:
        try:
            parse_head(head + b"\r\n\r\n")
        except BadRequestError:
            pass


async def ask_or_reset(port: int, wire: bytes) -> bytes:
    try:
        return (await ask(port, wire))[0]
    except ConnectionResetError:
        return b""
