"""The relay of bytes: both directions, their ends, a backend that is not there, and bounds."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from expressgateway.l4.tcp import IDLE_S, Relay, TcpListener
from expressgateway.net.stream import STUCK_S
from tests.net.loopback import Backend, Peer, World, is_reset, refused_address, run
from tests.worker.inside import Inside, listener, pool

BULK = os.urandom(1 << 20) * 4


@pytest.fixture(params=[True, False], ids=["splice", "plain"])
def with_splice(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The fast path is optional: everything here holds without it."""
    if not request.param:
        monkeypatch.setattr("expressgateway.l4.tcp.can_splice", lambda source, target: False)
    return bool(request.param)


class Scene:
    def __init__(self, world: World) -> None:
        self.world = world
        self.there = Backend()
        self.inside = Inside(world)

    async def begin(self, *addresses: tuple[str, int], **more: Any) -> None:
        await self.inside.configure(
            listener("raw", "tcp", pool="p"), pools=[pool("p", *(addresses or (self.there.address,)))], **more
        )
        self.listener.start()

    @property
    def listener(self) -> TcpListener:
        found = self.inside.runtime._listeners[0]
        assert isinstance(found, TcpListener)
        return found

    @property
    def relay(self) -> Relay:
        (found,) = self.listener.connections()
        assert isinstance(found, Relay)
        return found

    async def pair(self) -> tuple[Peer, Peer]:
        client = self.inside.call()
        peer = await self.there.accept()
        await self.world.until(lambda: self.relay._is_ready)
        return client, peer

    def sweep(self, seconds: float) -> None:
        self.listener.sweep(self.inside.runtime.reactor.now + seconds)

    async def close(self, *peers: Peer) -> None:
        for peer in peers:
            peer.close()
        await self.world.until(lambda: not self.listener.open)
        await self.inside.close()
        self.there.close()


@pytest.mark.usefixtures("with_splice")
class TestRelaying:
    def test_bulk_both_ways_at_once(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client, peer = await scene.pair()

            async def say(end: Peer) -> None:
                await end.send(BULK)
                end.write_eof()

            _, _, up, down = await asyncio.gather(say(client), say(peer), peer.read_all(), client.read_all())
            assert (up == BULK, down == BULK) == (True, True)
            assert scene.listener.counters.relayed == [len(BULK), len(BULK)]
            await world.until(lambda: not scene.listener.open)
            assert not scene.listener.counters.relay_errors
            await scene.close(client, peer)

        run(test)

    def test_bulk_and_small_by_turns(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client, peer = await scene.pair()
            for turn in range(12):
                size = (300_000, 10, 70_000)[turn % 3]
                got, _ = await asyncio.gather(peer.read_exactly(size), client.send(BULK[turn : turn + size]))
                assert got == BULK[turn : turn + size]
                got, _ = await asyncio.gather(client.read_exactly(size), peer.send(BULK[turn : turn + size]))
                assert got == BULK[turn : turn + size]
            assert len(scene.relay._splices) <= 2
            await scene.close(client, peer)

        run(test)

    @pytest.mark.parametrize("is_client_first", [True, False])
    def test_each_end_is_passed_on_by_itself(self, is_client_first: bool) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client, peer = await scene.pair()
            first, second = (client, peer) if is_client_first else (peer, client)
            await first.send(b"question")
            first.write_eof()
            assert await second.read_all() == b"question"
            assert scene.listener.open == 1
            sending = asyncio.ensure_future(second.send(BULK))
            assert await first.read_exactly(len(BULK)) == BULK
            await sending
            second.write_eof()
            assert await first.read_all() == b""
            await scene.close(client, peer)

        run(test)

    @pytest.mark.parametrize(("who", "name"), [("client", "client_reset"), ("backend", "backend_reset")])
    @pytest.mark.parametrize("size", [0, 300_000])
    def test_a_reset_is_passed_on_as_a_reset(self, who: str, name: str, size: int) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client, peer = await scene.pair()
            ends = {"client": client, "backend": peer}
            if size:
                await ends[who].send(BULK[:size])
                await world.turns()
            ends[who].reset()
            (other,) = (end for each, end in ends.items() if each != who)
            assert await is_reset(other)
            assert dict(scene.listener.counters.relay_errors) == {name: 1}
            await scene.close(client, peer)

        run(test)

    def test_a_reader_that_does_not_read_stops_its_sender(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client, peer = await scene.pair()
            sent = 0
            for _ in range(2000):
                try:
                    sent += peer.sock.send(BULK[:65536])
                except BlockingIOError:
                    if not await world.batches_in(0.01):
                        break
            assert sent < 30_000_000
            assert await world.batches_in() == 0
            got = len(await client.read_exactly(sent))
            assert got == sent
            await scene.close(client, peer)

        run(test)


class TestEnding:
    def test_nobody_says_anything(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client, peer = await scene.pair()
            scene.sweep(IDLE_S - 1)
            assert scene.listener.open == 1
            scene.sweep(IDLE_S + 1)
            assert scene.listener.open == 0
            assert dict(scene.listener.counters.relay_errors) == {"idle": 1}
            await scene.close(client, peer)

        run(test)

    def test_a_rest_that_nobody_takes_is_given_up(self) -> None:
        """Both sides have ended; the client does not read what is left for it."""

        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client, peer = await scene.pair()
            stream = scene.relay._client.stream
            assert stream is not None
            while not stream.backlog_bytes:
                stream.write([BULK[:10_000]])  # as if the backend had sent it
            client.write_eof()
            peer.write_eof()
            await world.until(lambda: scene.relay._is_over)
            now = scene.inside.runtime.reactor.now
            scene.listener.sweep(now)
            scene.listener.sweep(now + STUCK_S - 1)
            assert scene.listener.open == 1
            scene.listener.sweep(now + STUCK_S + 1)
            assert scene.listener.open == 0
            await scene.close(client, peer)

        run(test)


class TestBackends:
    def test_one_that_refuses_is_replaced_before_the_client_hears_of_it(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin(refused_address(), scene.there.address)
            for _ in range(2):
                client = scene.inside.call()
                await client.send(b"hello")
                peer = await scene.there.accept()
                assert await peer.read_exactly(5) == b"hello"
                client.close()
                peer.close()
                await world.until(lambda: not scene.listener.open)
            bad, good = scene.inside.pool("p").backends
            assert (bad.connect_failures, bad.in_flight) == (2, 0)  # it has its turn each time
            assert (good.responses[2], good.in_flight) == (2, 0)
            await scene.close()

        run(test)

    def test_with_none_left_the_client_is_reset(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin(refused_address(), refused_address())
            client = scene.inside.call()
            assert await is_reset(client)
            assert sum(scene.listener.counters.relay_errors.values()) == 1
            assert [each.connect_failures for each in scene.inside.pool("p").backends] == [1, 1]
            await scene.close(client)

        run(test)

    def test_a_client_that_leaves_while_dialling_counts_as_no_success(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.begin()
            client = scene.inside.call()
            scene.listener._accept()
            relay = scene.relay
            assert not relay._is_ready
            relay.go_away()
            (backend,) = scene.inside.pool("p").backends
            assert (backend.in_flight, backend.responses[2]) == (0, 0)
            await scene.close(client)

        run(test)


def test_pipes_are_closed_when_they_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(flags: int) -> tuple[int, int]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("expressgateway.l4.splice.os.pipe2", exhausted)

    async def test(world: World) -> None:
        scene = Scene(world)
        await scene.begin()
        client, peer = await scene.pair()
        got, _ = await asyncio.gather(peer.read_exactly(len(BULK)), client.send(BULK))
        assert got == BULK
        await scene.close(client, peer)

    run(test)
