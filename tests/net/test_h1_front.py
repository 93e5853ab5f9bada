"""A client's HTTP/1 connection over a real socket: deadlines, early requests, ends of every kind."""

from __future__ import annotations

import gc
import socket
from typing import Any

import pytest

from expressgateway.net.h1_front import PARTING_S, H1FrontConnection
from expressgateway.net.http_listener import HttpListener
from expressgateway.proxy.exchange import Exchange
from tests.net.loopback import Backend, Peer, World, is_reset, run
from tests.net.tls_peers import site
from tests.worker.inside import Inside, listener, pool

REQUEST = b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
HTTP = {
    "header_timeout_ms": 2000,
    "body_timeout_ms": 3000,
    "head_timeout_ms": 4000,
    "total_timeout_ms": 60_000,
    "idle_timeout_ms": 5000,
}


class Scene:
    """One HTTP listener before one backend; time is the test's own: the runtime does not sweep."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.there = Backend()
        self.inside = Inside(world)

    async def begin(self, protocol: str = "h1", **more: Any) -> None:
        tls = {"tls": {"cert_path": "/c.pem", "key_path": "/k.pem"}} if protocol == "h1s" else {}
        await self.inside.configure(
            listener("web", protocol, pool="p", http=HTTP, **tls),
            pools=[pool("p", self.there.address)],
            files={"/c.pem": site("a.test").pem, "/k.pem": site("a.test").key_pem()},
            **more,
        )
        self.listener.start()

    @property
    def listener(self) -> HttpListener:
        found = self.inside.runtime._listeners[0]
        assert isinstance(found, HttpListener)
        return found

    @property
    def connection(self) -> H1FrontConnection:
        (found,) = self.listener.connections()
        assert isinstance(found, H1FrontConnection)
        return found

    def later(self, seconds: float) -> None:
        """Let time go by: all sweeps see it."""
        now = self.inside.runtime.reactor.now + seconds
        self.inside.runtime.reactor.now = now
        self.listener.sweep(now)
        for backend in self.inside.pool("p").backends:
            assert backend.connections is not None
            backend.connections.sweep(now)

    async def close(self, *peers: Peer) -> None:
        for peer in peers:
            peer.close()
        await self.world.until(lambda: not self.listener.open)
        await self.inside.close()
        self.there.close()


async def read_answer(client: Peer) -> bytes:
    head = await client.read_until(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            await client.read_exactly(int(line[15:]))
    return head


async def answer(backend: Peer) -> None:
    await backend.read_until(b"\r\n\r\n")
    await backend.send(OK)


class TestExchanges:
    def test_requests_that_came_early_are_answered_in_order(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client = scene.inside.call()
            await client.send(REQUEST * 3)
            peer = await scene.there.accept()
            for _ in range(3):
                await answer(peer)
                assert (await read_answer(client)).startswith(b"HTTP/1.1 200 ")
            assert scene.inside.pool("p").backends[0].reused == 2
            await scene.close(client, peer)

        run(test)

    def test_a_connection_has_a_budget_of_requests(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin(runtime={"max_keepalive_requests": 2})
            client = scene.inside.call()
            await client.send(REQUEST)
            peer = await scene.there.accept()
            await answer(peer)
            assert b"connection: close" not in (await read_answer(client)).lower()
            await client.send(REQUEST)
            await answer(peer)
            assert b"connection: close" in (await read_answer(client)).lower()
            assert await client.read_all() == b""
            await scene.close(client, peer)

        run(test)

    def test_a_client_that_leaves_takes_its_exchange_along(self) -> None:
        async def test(world: World) -> None:
            for end in (Peer.close, Peer.reset):
                scene = Scene(world)
                await scene.begin()
                client = scene.inside.call()
                await client.send(REQUEST)
                peer = await scene.there.accept()
                await peer.read_until(b"\r\n\r\n")
                end(client)
                assert await is_reset(peer)
                await scene.close(client, peer)

        run(test)

    def test_a_fault_of_ours_ends_the_exchange_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The safety net closes the client's stream: nothing of its exchange is left at the backend."""

        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client = scene.inside.call()
            await client.send(b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 100\r\n\r\nsome")
            peer = await scene.there.accept()
            await peer.read_until(b"some")
            assert scene.inside.pool("p").backends[0].in_flight == 1

            def broken(self: Exchange, chunk: bytes, end: bool) -> None:
                raise ValueError("a defect")

            monkeypatch.setattr(Exchange, "on_request_data", broken)
            await client.send(b"more")
            assert await is_reset(client)
            assert await is_reset(peer)
            assert scene.inside.pool("p").backends[0].in_flight == 0
            assert scene.inside.runtime.faults == 1
            scene.inside.runtime.reactor.faults = 0
            await scene.close(client, peer)

        run(test)

    def test_a_fault_with_a_request_that_came_early_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client = scene.inside.call()
            await client.send(REQUEST * 2)
            peer = await scene.there.accept()

            def broken(self: Exchange, head: object, end: bool) -> None:
                raise ValueError("a defect")

            monkeypatch.setattr(Exchange, "on_request", broken)
            await answer(peer)
            await is_reset(client)
            await world.until(lambda: not scene.listener.open)
            assert scene.inside.runtime.faults == 1
            scene.inside.runtime.reactor.faults = 0
            await scene.close(client, peer)

        run(test)


class TestDeadlines:
    def test_idle(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client = scene.inside.call()
            await world.until(lambda: scene.listener.open)
            scene.later(4.9)
            assert scene.listener.open == 1
            scene.later(0.2)
            assert await client.read_all() == b""
            await scene.close(client)

        run(test)

    def test_a_head_that_comes_by_drops(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client = scene.inside.call()
            await client.send(REQUEST[:10])
            await world.until(lambda: scene.listener.open and scene.connection._head_since)
            scene.later(1.5)
            await client.send(REQUEST[10:12])
            await world.turns()
            scene.later(2.1)  # drops do not begin it anew
            head = await client.read_until(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            client.write_eof()
            await client.read_all()
            assert dict(scene.listener.counters.errors) == {"slow_head": 1}
            await scene.close(client)

        run(test)

    def test_a_reader_that_does_not_read(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client = scene.inside.call()
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await client.send(REQUEST)
            peer = await scene.there.accept()
            await peer.read_until(b"\r\n\r\n")
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
            for _ in range(400):
                try:
                    peer.sock.send(bytes(65536))
                except BlockingIOError:
                    await world.turns(1)
            scene.later(0.1)
            assert scene.connection.unsent()
            scene.later(3.2)
            assert scene.listener.open == 0
            assert dict(scene.listener.counters.security) == {"slow_reader": 1}
            await scene.close(client, peer)

        run(test)

    def test_a_handshake_that_does_not_come(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin("h1s", runtime={"handshake_timeout_ms": 1000})
            client = scene.inside.call()
            await client.send(b"\x16\x03\x01")
            await world.until(lambda: scene.listener.open)
            scene.later(1.1)
            assert scene.listener.open == 0
            assert scene.listener.counters.handshakes == {("", "no", "timeout"): 1}
            assert dict(scene.listener.counters.security) == {"slow_handshake": 1}
            await scene.close(client)

        run(test)

    def test_a_client_gone_before_the_handshake_is_counted_out(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin("h1s")
            for _ in range(5):
                scene.inside.call().reset()
            await world.until(lambda: scene.listener.counters.connections == 5)
            assert scene.listener.open == 0
            assert scene.listener.counters.handshakes == {("", "no", "failed"): 5}
            gc.collect()
            await scene.close()

        run(test)


class TestDraining:
    def test_an_idle_connection_gets_a_moment_for_its_last_request(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client = scene.inside.call()
            await client.send(REQUEST)
            peer = await scene.there.accept()
            await answer(peer)
            await read_answer(client)
            scene.listener.drain()
            scene.later(PARTING_S / 2)
            assert scene.listener.open == 1
            await client.send(REQUEST)
            await answer(peer)
            assert b"connection: close" in (await read_answer(client)).lower()
            assert await client.read_all() == b""
            await scene.close(client, peer)

        run(test)

    def test_and_is_closed_after_it(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client = scene.inside.call()
            await world.until(lambda: scene.listener.open)
            scene.listener.drain()
            scene.later(PARTING_S + 0.1)
            assert await client.read_all() == b""
            await scene.close(client)

        run(test)

    def test_go_away_ends_what_is_under_way(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client = scene.inside.call()
            await client.send(REQUEST)
            peer = await scene.there.accept()
            await peer.read_until(b"\r\n\r\n")
            assert scene.listener.go_away() == 1
            await world.until(lambda: not scene.listener.open)
            assert await is_reset(peer)
            await scene.close(client, peer)

        run(test)


def test_a_refused_client_is_told_in_the_clear() -> None:
    async def test(world: World) -> None:
        scene = Scene(world)
        await scene.begin()
        scene.inside.census.total = 0
        client = scene.inside.call()
        assert (await client.read_all()).startswith(b"HTTP/1.1 503 ")
        assert dict(scene.listener.counters.rejects) == {"process_cap": 1}
        await scene.close(client)

    run(test)
