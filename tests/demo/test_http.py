"""The demo's HTTP server: framing, keep-alive, and what it does with nonsense."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expressgateway.demo import http
from expressgateway.demo.backends import HttpBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine


class Client:
    """A raw connection, and h11 to read what comes back."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.spare = b""

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, method: str = "GET") -> tuple[h11.Response, bytes]:
        """The next complete answer, by a parser we did not write; ConnectionError if it is not complete."""
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        parser.send(h11.EndOfMessage())
        if self.spare:
            parser.receive_data(self.spare)
        head: h11.Response | None = None
        body = b""
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                data = await self.reader.read(65536)
                if not data and head is None:
                    raise ConnectionError("no answer")
                parser.receive_data(data)
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                self.trailers = list(event.headers)
                self.spare = parser.trailing_data[0]
                return head, body

    async def is_closed(self) -> bool:
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True


def run(test: Callable[[Callable[[], Any]], Coroutine[Any, Any, None]]) -> None:
    """Run `test` with a function that connects to a fresh backend."""

    async def main() -> None:
        backend = HttpBackend("one")
        await backend.start()

        @contextlib.asynccontextmanager
        async def connect() -> AsyncIterator[Client]:
            reader, writer = await asyncio.open_connection(*backend.address)
            with contextlib.closing(writer):
                yield Client(reader, writer)

        try:
            await test(connect)
        finally:
            await backend.close()

    asyncio.run(main())


class TestExchanges:
    def test_keep_alive_and_pipelining(self) -> None:
        async def test(connect: Any) -> None:
            async with connect() as client:
                await client.send(b"GET /bytes?n=3 HTTP/1.1\r\nHost: x\r\n\r\n" * 5)
                for _ in range(5):
                    assert (await client.answer())[1] == bytes(range(3))
                await client.send(b"GET /bytes?n=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                head, _ = await client.answer()
                assert (b"connection", b"close") in head.headers
                assert await client.is_closed()

        run(test)

    def test_http_1_0(self) -> None:
        async def test(connect: Any) -> None:
            async with connect() as client:
                await client.send(b"GET /stream?n=2&ms=1 HTTP/1.0\r\n\r\n")
                head, body = await client.answer()
                assert b"transfer-encoding" not in dict(head.headers)
                assert body.count(b"\n") == 2
                assert await client.is_closed()
            async with connect() as client:
                await client.send(b"GET /bytes?n=2 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2)
                for _ in range(2):
                    assert (await client.answer())[1] == bytes(range(2))

        run(test)

    @pytest.mark.parametrize("page", ["/", "/bytes?n=9", "/stream?n=2", "/echo", "/status?code=404", "/no"])
    def test_head_has_the_head_only(self, page: str) -> None:
        async def test(connect: Any) -> None:
            async with connect() as client:
                await client.send(f"HEAD {page} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * 2)
                assert [(await client.answer("HEAD"))[1] for _ in range(2)] == [b"", b""]

        run(test)

    def test_a_chunked_upload_comes_back_chunked_and_with_its_trailers(self) -> None:
        async def test(connect: Any) -> None:
            data = (
                b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"5\r\nhello\r\nA;x=y\r\n0123456789\r\n0\r\nX-Sum: 1\r\n\r\n"
            )
            async with connect() as client:
                for size in (len(data), 1):
                    for at in range(0, len(data), size):
                        await client.send(data[at : at + size])
                    head, body = await client.answer("POST")
                    assert (b"transfer-encoding", b"chunked") in head.headers
                    assert body == b"hello0123456789"
                    assert client.trailers == [(b"x-sum", b"1")]
                await client.send(data[: data.index(b"5\r\n")] + b"0\r\n\r\n")
                assert (await client.answer("POST"))[1] == b""

        run(test)

    def test_a_body_nobody_asked_for_is_read_over(self) -> None:
        async def test(connect: Any) -> None:
            async with connect() as client:
                body = b"x" * 300_000
                upload = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
                await client.send(upload + body + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await client.answer("POST"))[0].status_code == 200
                assert (await client.answer())[0].status_code == 200

        run(test)

    def test_too_much_of_it_ends_the_connection(self) -> None:
        async def test(connect: Any) -> None:
            async with connect() as client:
                await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
                assert (await client.answer("POST"))[0].status_code == 200
                with contextlib.suppress(ConnectionError):
                    while not client.reader.at_eof():
                        await client.send(bytes(65536))
                assert await client.is_closed()

        run(test)

    def test_an_upload_cut_short_never_looks_complete(self) -> None:
        async def test(connect: Any) -> None:
            for framing in (
                b"Content-Length: 10\r\n\r\nhello",
                b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
            ):
                async with connect() as client:
                    await client.send(b"POST /echo HTTP/1.1\r\nHost: x\r\n" + framing)
                    client.writer.write_eof()
                    with pytest.raises((ConnectionError, h11.RemoteProtocolError)):
                        await client.answer("POST")

        run(test)

    def test_expect_continue(self) -> None:
        async def test(connect: Any) -> None:
            async with connect() as client:
                await client.send(
                    b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
                )
                assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
                await client.send(b"hi")
                assert (await client.answer("POST"))[1] == b"hi"
                # A page that wants no body does not ask for it, and cannot know what comes next.
                await client.send(
                    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
                )
                assert (await client.answer("POST"))[0].status_code == 200
                assert await client.is_closed()

        run(test)


GOOD = b"GET / HTTP/1.1\r\nHost: x\r\n"


class TestNonsense:
    @pytest.mark.parametrize(
        ("data", "status"),
        [
            (b"GET / HTTP/2.0\r\n\r\n", 400),
            (b"GET  / HTTP/1.1\r\n\r\n", 400),
            (b"\r\n\r\n", 400),
            (b"GET http://[::1 HTTP/1.1\r\n\r\n", 400),
            (GOOD + b"no colon\r\n\r\n", 400),
            (GOOD + b"name : value\r\n\r\n", 400),
            (GOOD + b" folded\r\n\r\n", 400),
            (GOOD + b"a: b\0c\r\n\r\n", 400),
            (GOOD + b"a: b\rc\r\n\r\n", 400),
            (GOOD + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n", 400),
            (GOOD + b"Content-Length: +1\r\n\r\n", 400),
            (GOOD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            (GOOD + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 400),
            (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            (b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
            (b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", 400),
            (GOOD + b"a: " + b"x" * 70_000 + b"\r\n\r\n", 431),
            (b"GET /bytes?n=x HTTP/1.1\r\n\r\n", 400),
            (b"GET /bytes?n=-1 HTTP/1.1\r\n\r\n", 400),
            (b"GET /slow?s=nan HTTP/1.1\r\n\r\n", 400),
            (b"GET /slow?s=1e9 HTTP/1.1\r\n\r\n", 400),
            (b"GET /status?code=101 HTTP/1.1\r\n\r\n", 400),
        ],
    )
    def test_is_refused_and_the_connection_closed(self, data: bytes, status: int) -> None:
        async def test(connect: Any) -> None:
            async with connect() as client:
                await client.send(data)
                head, body = await client.answer()
                assert head.status_code == status
                assert body.endswith(b".\n")
                assert await client.is_closed()

        run(test)

    def test_a_chunk_that_is_longer_than_it_says_breaks_the_answer_off(self) -> None:
        async def test(connect: Any) -> None:
            async with connect() as client:
                await client.send(
                    b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
                    b"2\r\nhello\r\n0\r\n\r\n"
                )
                with pytest.raises((ConnectionError, h11.RemoteProtocolError)):
                    await client.answer("POST")

        run(test)

    def test_too_many_trailers(self) -> None:
        async def test(connect: Any) -> None:
            async with connect() as client:
                upload = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
                await client.send(upload + b"a: b\r\n" * 101 + b"\r\n")
                assert (await client.answer("POST"))[0].status_code == 431

        run(test)

    @settings(max_examples=25, deadline=None)
    @given(
        st.lists(st.binary(max_size=200), max_size=4),
        st.sampled_from([b"", GOOD, b"POST /echo HTTP/1.1\r\n"]),
    )
    def test_garbage_harms_nobody_else(self, pieces: list[bytes], prefix: bytes) -> None:
        async def test(connect: Any) -> None:
            async with connect() as client, connect() as other:
                with contextlib.suppress(ConnectionError):
                    for piece in (prefix, *pieces):
                        await client.send(piece)
                    client.writer.write_eof()
                    while await client.reader.read(65536):
                        pass
                await other.send(GOOD + b"\r\n")
                assert (await other.answer())[0].status_code == 200

        run(test)


class TestBounds:
    def test_a_client_that_says_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(http, "IDLE_TIMEOUT_S", 0.01)

        async def test(connect: Any) -> None:
            async with connect() as client:
                assert await client.is_closed()

        run(test)

    @pytest.mark.parametrize("start", [b"G", b"POST /echo HTTP/1.1\r\nContent-Length: 5\r\n\r\nhi"])
    def test_a_client_that_stops_amid_a_request(self, monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
        monkeypatch.setattr(http, "PROGRESS_TIMEOUT_S", 0.01)

        async def test(connect: Any) -> None:
            async with connect() as client:
                await client.send(start)
                with contextlib.suppress(ConnectionError):
                    while await client.reader.read(65536):
                        pass

        run(test)

    def test_a_client_that_does_not_read_holds_little_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sent = 0
        send = http.Exchange.send
        gave_up = asyncio.Event()

        async def counted(exchange: http.Exchange, piece: bytes) -> None:
            nonlocal sent
            try:
                await send(exchange, piece)
            except TimeoutError:
                gave_up.set()
                raise
            sent += len(piece)

        monkeypatch.setattr(http.Exchange, "send", counted)
        monkeypatch.setattr(http, "PROGRESS_TIMEOUT_S", 0.2)

        async def test(connect: Any) -> None:
            async with connect() as client:
                client.writer.transport.pause_reading()
                await client.send(b"GET /bytes?n=1073741824 HTTP/1.1\r\nHost: x\r\n\r\n")
                await asyncio.wait_for(gave_up.wait(), 20)

        run(test)
        assert 0 < sent < 64 << 20

    def test_closing_ends_open_connections(self) -> None:
        async def main() -> None:
            backend = HttpBackend("one")
            await backend.start()
            reader, writer = await asyncio.open_connection(*backend.address)
            writer.write(b"GET /slow?s=60 HTTP/1.1\r\nHost: x\r\n\r\n")
            await writer.drain()
            while not backend._connections:  # noqa: ASYNC110 - nothing to wait for but the next turn of the loop
                await asyncio.sleep(0)
            await backend.close()
            await backend.close()
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            assert not backend._connections
            writer.close()

        asyncio.run(main())
