"""The admin listener against clients that mean it no good, and what it answers to those that do."""

import asyncio
import hashlib
import json
import logging
import select
import socket
import tracemalloc
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expressgateway.control.admin import endpoints, shapes
from expressgateway.control.admin.endpoints import Endpoints
from expressgateway.control.admin.http import (
    MAX_BODY_BYTES,
    MAX_CONNECTIONS,
    MAX_HEAD_BYTES,
    AdminServer,
    BadRequestError,
    Request,
    Response,
    parse_head,
)
from expressgateway.control.admin.live import Facts
from expressgateway.observe.counters import Tally
from expressgateway.observe.logs import Limited
from tests.control.changing import FakeGateway


class Shown(FakeGateway):
    """A gateway to look at."""

    def __init__(self, token: str | None = None) -> None:
        super().__init__()
        self.token_hash = None if token is None else hashlib.sha256(token.encode()).hexdigest()
        self.breaks = False
        self.rejects = Tally()

    def status(self) -> shapes.Status:
        if self.breaks:
            raise RuntimeError("a defect")
        return super().status()

    def facts(self) -> Facts:
        raise AssertionError

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
            async with asyncio.timeout(30):
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
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


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
            assert await status_of(port, get("/nothing")) == 404

        served(test, shown)

    def test_metrics_and_status(self) -> None:
        async def test(port: int) -> None:
            head, body = await ask(port, get("/metrics", "Accept: a/b"))
            assert body == b"up 1\n"
            assert b"Content-Type: text/plain; for=a/b" in head
            head, body = await ask(port, get("/api/v1/status"))
            assert json.loads(body)["state"] == "serving"
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
            (get("/livez", method="POST"), 411),
            (get("/livez", "Content-Length: 0", method="POST"), 405),
            (get("/livez", method="OPTIONS"), 405),
            (get("/metrics", method="DELETE"), 405),
            (get("/api/v1/status", "Content-Type: application/json", method="BREW"), 405),
            (get("/api/v1/status", method="BREW"), 415),
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

        served(test, shown, timeout_s=1.0)
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
                events = await asyncio.get_running_loop().run_in_executor(None, poller.poll, 60_000)
            assert events
            assert events[0][1] & select.POLLERR, "not cut off"

        shown = Big()
        served(test, shown, timeout_s=0.2)
        assert shown.rejects == {"timeout": 1}

    def test_readers_that_do_not_read_hold_up_nobody_and_little_memory(self) -> None:
        body = b"x" * 50_000_000

        class Big(Shown):
            async def metrics(self, accept: str) -> tuple[bytes, str]:
                return body, "text/plain"

        async def test(port: int) -> None:
            tracemalloc.start()
            try:
                stuck = [socket.create_connection(("127.0.0.1", port)) for _ in range(10)]
                for client in stuck:
                    client.send(get("/metrics"))
                assert await status_of(port, get("/livez")) == 200
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            for client in stuck:
                client.close()
            assert peak < len(body) // 2, "each has a copy of its own"

        served(test, Big())

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


class Echo:
    """Answers with the request."""

    def __init__(self) -> None:
        self.rejects = Tally()
        self.seen: list[Request] = []

    async def answer(self, request: Request) -> Response:
        self.seen.append(request)
        return Response(200, request.body)


def echoed(
    test: Callable[[int, Echo], Awaitable[None]], timeout_s: float = 5.0, echo: Echo | None = None
) -> None:
    async def main() -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        seen = echo or Echo()
        server = AdminServer(sock, seen.answer, seen.rejects, timeout_s)
        await server.start()
        try:
            async with asyncio.timeout(30):
                await test(sock.getsockname()[1], seen)
        finally:
            await server.close()
            sock.close()

    asyncio.run(main())


class TestBodies:
    @pytest.mark.parametrize("size", [0, 1, MAX_HEAD_BYTES, MAX_BODY_BYTES])
    def test_read_whole(self, size: int) -> None:
        async def test(port: int, echo: Echo) -> None:
            wire = get("/x", f"Content-Length: {size}", method="POST")
            head, body = await ask(port, wire + b"b" * size)
            assert head.startswith(b"HTTP/1.1 200 ")
            assert body == b"b" * size

        echoed(test)

    @pytest.mark.parametrize(
        ("method", "lines", "status"),
        [
            ("POST", (), 411),
            ("PATCH", ("Transfer-Encoding: chunked",), 411),
            ("DELETE", ("Transfer-Encoding: chunked",), 411),
            ("POST", ("Transfer-Encoding: chunked", "Content-Length: 3"), 400),
            ("POST", ("Content-Length: 3", "Content-Length: 3"), 400),
            ("POST", ("Content-Length: 3, 3",), 400),
            ("POST", ("Content-Length: -1",), 400),
            ("POST", ("Content-Length: +3",), 400),
            ("POST", ("Content-Length: 0x3",), 400),
            ("POST", ("Content-Length:",), 400),
            ("POST", (f"Content-Length: {'9' * 5000}",), 400),
            ("POST", (f"Content-Length: {MAX_BODY_BYTES + 1}",), 413),
            ("POST", ("Content-Length: 99999999999",), 413),
            ("DELETE", ("Content-Length: 3",), 400),
            ("HEAD", ("Content-Length: 3",), 400),
            ("POST", ("Content-Length: 3", "Expect: 200-maybe"), 417),
            ("GET", ("Expect: x",), 417),
            ("POST", ("Content-Length: 3", "Content-Type: a/b", "Content-Type: a/c"), 400),
            ("POST", ("Content-Length: 3", "Origin: a", "Origin: b"), 400),
        ],
    )
    def test_refused_by_the_head(self, method: str, lines: tuple[str, ...], status: int) -> None:
        async def test(port: int, echo: Echo) -> None:
            head, _ = await ask(port, get("/x", *lines, method=method) + b"0\r\n\r\n")
            assert int(head.split(b" ")[1]) == status
            assert echo.seen == []
            assert echo.rejects == {"bad_request": 1}

        echoed(test)

    def test_client_that_is_sending_too_much_gets_to_read_why(self) -> None:
        def send_all_then_read(port: int) -> bytes:
            size = 10 * MAX_BODY_BYTES
            with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
                client.sendall(get("/x", f"Content-Length: {size}", method="POST"))
                select.select([client], [], [], 10)  # it is refused already
                poller = select.poll()
                poller.register(client, 0)  # resets are always reported
                for _ in range(10):
                    client.sendall(b"b" * MAX_BODY_BYTES)
                    assert poller.poll(10) == [], "reset while it still sends"
                client.shutdown(socket.SHUT_WR)
                return client.recv(64)

        async def test(port: int, echo: Echo) -> None:
            answer = await asyncio.to_thread(send_all_then_read, port)
            assert answer.startswith(b"HTTP/1.1 413 ")

        echoed(test)

    def test_waits_to_be_told_to_continue(self) -> None:
        async def test(port: int, echo: Echo) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(get("/x", "Content-Length: 3", "Expect: 100-Continue", method="POST"))
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"abc")
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.endswith(b"\r\n\r\nabc")
            writer.close()
            wire = get("/x", "Content-Length: 3", "Expect: 100-continue", method="POST")
            head, _ = await ask(port, wire.replace(b"HTTP/1.1", b"HTTP/1.0") + b"abc")
            assert head.startswith(b"HTTP/1.1 200 "), "RFC 9110 10.1.1: not for HTTP/1.0"

        echoed(test)

    def test_cut_short(self) -> None:
        async def test(port: int, echo: Echo) -> None:
            for sent in (b"", b"ab"):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(get("/x", "Content-Length: 3", method="POST") + sent)
                writer.write_eof()
                assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
                writer.close()
            assert echo.seen == []

        echoed(test)

    def test_slow(self) -> None:
        async def test(port: int, echo: Echo) -> None:
            assert await status_of(port, get("/x", "Content-Length: 3", method="POST") + b"ab") == 408
            assert echo.rejects == {"timeout": 1}

        echoed(test, timeout_s=0.2)

    def test_write_may_take_longer_to_answer_than_a_read(self) -> None:
        class Slow(Echo):
            async def answer(self, request: Request) -> Response:
                await asyncio.sleep(1.3)  # longer than a read may take
                return await super().answer(request)

        async def test(port: int, echo: Echo) -> None:
            assert await status_of(port, get("/x", "Content-Length: 0", method="POST")) == 200
            assert await ask_or_reset(port, get("/x")) == b""

        echoed(test, timeout_s=1.0, echo=Slow())


class TestHost:
    @pytest.mark.parametrize(
        ("host", "status"),
        [
            ("localhost", 200),
            ("LOCALHOST:9090", 200),
            ("localhost.", 200),
            ("127.0.0.1:9090", 200),
            ("127.1.2.3", 200),
            ("[::1]:9090", 200),
            ("[::1]", 200),
            ("evil.example", 421),
            ("evil.example:9090", 421),
            ("127.0.0.1.evil.example", 421),
            ("localhost.evil.example", 421),
            ("localhost:9090@evil", 421),
            ("192.0.2.1", 421),
            ("0.0.0.0", 421),
            ("", 421),
            (":", 421),
            ("[", 421),
            ("[::1", 421),
        ],
    )
    def test_without_a_token_it_must_be_this_machine(self, host: str, status: int) -> None:
        async def test(port: int) -> None:
            for path in ("/metrics", "/api/v1/status", "/api/v1/pools"):
                wire = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
                assert await status_of(port, wire) == status
            probe = f"GET /livez HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
            assert await status_of(port, probe) == 200

        served(test)

    def test_with_a_token_any_name_will_do(self) -> None:
        async def test(port: int) -> None:
            wire = b"GET /metrics HTTP/1.1\r\nHost: gateway.example\r\nAuthorization: Bearer secret\r\n\r\n"
            assert await status_of(port, wire) == 200

        served(test, Shown("secret"))

    def test_none_in_http_1_0(self) -> None:
        async def test(port: int) -> None:
            assert await status_of(port, b"GET /metrics HTTP/1.0\r\n\r\n") == 200

        served(test)
