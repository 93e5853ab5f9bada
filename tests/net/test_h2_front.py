"""A client's HTTP/2 connection over a real socket: its beginning, its deadlines, and how it is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    DataReceived,
    Event,
    PingReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)

from expressgateway.net.h2_front import H2FrontConnection
from expressgateway.net.shared_front import NOTICE_S
from tests.net.loopback import Peer, World, is_reset, run
from tests.net.test_h1_front import HTTP, OK, REQUEST, answer, read_answer
from tests.net.test_h1_front import Scene as H1Scene
from tests.worker.inside import listener, pool

if TYPE_CHECKING:
    from collections.abc import Callable

GET = [(":method", "GET"), (":scheme", "http"), (":authority", "a.test"), (":path", "/")]
POST = [(":method", "POST"), *GET[1:]]
MAX_ID = 2**31 - 1


class H2Client:
    """The client's end, spoken by the `h2` library; GOAWAY by hand, for the library would stop at it."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.h2 = H2Connection(H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.events: list[Event] = []
        self.goaways: list[tuple[int, int]] = []
        """Last stream and code."""
        self._raw = bytearray()

    async def flush(self) -> None:
        await self.peer.send(self.h2.data_to_send())

    async def ask(self, fields: list[tuple[str, str]] = GET, *, end: bool = True) -> int:
        stream: int = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream, fields, end_stream=end)
        await self.flush()
        return stream

    async def read(self) -> bool:
        """What came; False at the end."""
        data = await self.peer.read()
        self._raw += data
        while len(self._raw) >= 9:
            size = 9 + int.from_bytes(self._raw[:3], "big")
            if len(self._raw) < size:
                break
            frame = bytes(self._raw[:size])
            del self._raw[:size]
            if frame[3] == 7:
                self.goaways.append((int.from_bytes(frame[9:13], "big"), int.from_bytes(frame[13:17], "big")))
            else:
                self.events += self.h2.receive_data(frame)
        if not self.goaways:
            await self.flush()
        return bool(data)

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            assert await self.read(), f"it ended; {self.events}, {self.goaways}"

    def saw(self, kind: type[Event], stream: int = 0) -> bool:
        return any(
            isinstance(each, kind) and stream in (0, getattr(each, "stream_id", 0)) for each in self.events
        )

    async def body(self, stream: int) -> bytes:
        await self.until(lambda: self.saw(StreamEnded, stream))
        parts = [
            each.data for each in self.events if isinstance(each, DataReceived) and each.stream_id == stream
        ]
        return b"".join(parts)


class Scene(H1Scene):
    """A listener that speaks both in clear text."""

    async def begin(self, protocol: str = "h1", **more: Any) -> None:
        await self.inside.configure(
            listener("web", protocol, pool="p", http=HTTP, h2c=True),
            pools=[pool("p", self.there.address)],
            **more,
        )
        self.listener.start()

    async def client(self) -> H2Client:
        client = H2Client(self.inside.call())
        await client.flush()
        await client.until(lambda: client.events)
        return client

    async def is_left(self) -> None:
        """Nothing is under way at the backend."""
        await self.world.until(lambda: not self.inside.pool("p").backends[0].in_flight)


class TestBeginning:
    @pytest.mark.parametrize("cut", [1, 3, 16, 18, 20, 23, 24, 30])
    def test_a_preface_in_two_pieces(self, cut: int) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client = H2Client(scene.inside.call())
            client.h2.send_headers(1, GET, end_stream=True)
            raw = client.h2.data_to_send()
            await client.peer.send(raw[:cut])
            await world.turns()
            await client.peer.send(raw[cut:])
            peer = await scene.there.accept()
            await answer(peer)
            assert await client.body(1) == b"ok"
            await scene.close(client.peer, peer)

        run(test)

    def test_http_1_is_spoken_as_before(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client = scene.inside.call()
            await client.send(REQUEST)
            peer = await scene.there.accept()
            await answer(peer)
            assert (await read_answer(client)).startswith(b"HTTP/1.1 200 ")
            await scene.close(client, peer)

        run(test)

    @pytest.mark.parametrize(("first", "limit_s"), [(b"PRI * HTTP/2.0\r\n", 2.0), (b"", 5.0)])
    def test_one_that_says_too_little(self, first: bytes, limit_s: float) -> None:
        """Of a preface as long as a head may take; without a byte as long as any may be idle."""

        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client = scene.inside.call()
            await client.send(first)
            await world.until(lambda: scene.listener.open)
            await world.turns()
            scene.later(limit_s - 0.5)
            await world.turns()
            assert scene.listener.open == 1
            scene.later(1.0)
            assert await is_reset(client)
            await scene.close(client)

        run(test)


class TestLeaving:
    def test_idle_it_is_told_and_then_left(self) -> None:
        """In two steps: what was on its way between them is still served."""

        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client = await scene.client()
            (connection,) = scene.listener.connections()
            assert isinstance(connection, H2FrontConnection)
            await world.turns()
            since = connection._idle_since
            connection.sweep(since + 4.9)
            await world.turns()
            assert not connection._leaving_at
            connection.sweep(since + 5.1)
            await client.until(lambda: client.goaways == [(MAX_ID, 0)])
            stream = await client.ask()
            peer = await scene.there.accept()
            await peer.read_until(b"\r\n\r\n")
            assert connection._leaving_at == pytest.approx(
                scene.inside.runtime.reactor.now + NOTICE_S, abs=0.5
            )
            connection.sweep(connection._leaving_at)
            await client.until(lambda: client.goaways[1:] == [(stream, 0)])
            await peer.send(OK)
            assert await client.body(stream) == b"ok"
            while await client.read():
                pass
            await scene.close(client.peer, peer)

        run(test)

    def test_a_budget_of_requests(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin(runtime={"max_keepalive_requests": 2})
            client = await scene.client()
            await client.ask()
            peer = await scene.there.accept()
            await answer(peer)
            assert await client.body(1) == b"ok"
            assert not client.goaways
            await client.ask()
            await answer(peer)
            assert await client.body(3) == b"ok"
            await client.until(lambda: client.goaways == [(MAX_ID, 0)])
            await scene.close(client.peer, peer)

        run(test)

    @pytest.mark.parametrize("how", [Peer.close, Peer.reset])
    def test_a_client_that_leaves_takes_its_exchanges_along(self, how: Any) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client = await scene.client()
            peers = []
            for _ in range(3):
                await client.ask(POST, end=False)
                peers.append(await scene.there.accept())
                await peers[-1].read_until(b"\r\n\r\n")
            how(client.peer)
            for peer in peers:
                assert await is_reset(peer)
            await scene.is_left()
            await scene.close(client.peer, *peers)

        run(test)

    def test_a_stream_given_up_is_one_exchange(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client = await scene.client()
            first, second = await client.ask(), await client.ask()
            peers = [await scene.there.accept() for _ in range(2)]
            heads = [await peer.read_until(b"\r\n\r\n") for peer in peers]
            assert len(heads) == 2
            client.h2.reset_stream(first, 8)
            await client.flush()
            await world.until(lambda: scene.inside.pool("p").backends[0].in_flight == 1)
            for peer in peers:
                try:
                    await peer.send(OK)
                except OSError:
                    pass  # the one whose exchange was given up
            assert await client.body(second) == b"ok"
            assert not client.saw(ResponseReceived, first)
            await scene.close(client.peer, *peers)

        run(test)


class TestDeadlines:
    def test_half_a_header_block(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client = await scene.client()
            client.h2.send_headers(1, GET, end_stream=True)
            await client.peer.send(client.h2.data_to_send()[:12])
            await world.turns()
            scene.later(0.1)
            scene.later(1.8)
            await world.turns()
            scene.later(0.3)
            await client.until(lambda: client.goaways)
            assert client.goaways[0][1] == 0xB
            await scene.close(client.peer)

        run(test)

    def test_a_backend_that_does_not_answer(self) -> None:
        """504 on its stream; the connection stays."""

        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client = await scene.client()
            stream = await client.ask()
            peer = await scene.there.accept()
            await peer.read_until(b"\r\n\r\n")
            scene.later(4.1)
            await client.body(stream)
            (head,) = [each for each in client.events if isinstance(each, ResponseReceived)]
            assert [str(value) for name, value in head.headers or () if str(name) == ":status"] == ["504"]
            assert scene.listener.open == 1
            assert not client.saw(StreamReset)
            await scene.close(client.peer, peer)

        run(test)

    def test_a_client_that_answers_no_ping(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client = await scene.client()
            await client.ask(POST, end=False)
            peer = await scene.there.accept()
            await peer.read_until(b"\r\n\r\n")
            (connection,) = scene.listener.connections()
            assert isinstance(connection, H2FrontConnection)
            codec = connection.codec
            now = scene.inside.runtime.reactor.now
            codec.sweep(now)
            codec.sweep(now + codec.limits.keep_alive_interval_s + 1)
            await client.until(lambda: client.saw(PingReceived))
            codec._heard_at = now  # whatever the library has answered
            codec.sweep(now + codec.limits.keep_alive_interval_s + codec.limits.keep_alive_timeout_s + 2)
            assert await is_reset(peer)
            await scene.is_left()
            await scene.close(client.peer, peer)

        run(test)
