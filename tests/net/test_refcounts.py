"""What an exchange leaves behind: nothing, and that without the cyclic collector.

An exchange and its two streams know each other. Whoever ends it cuts that, or every request would be garbage
that only the collector finds: pauses, and memory that grows in between. So the collector is off here, and
what is still alive while the connections are idle is what was not cut.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from expressgateway.proxy.exchange import Exchange
from expressgateway.wire.h2.client import H2ClientStream
from expressgateway.wire.h2.server import H2ServerStream
from tests.net.h2_scene import H2Peer
from tests.net.loopback import Peer, World, run
from tests.net.test_h1_front import HTTP, OK, REQUEST, read_answer
from tests.net.test_h2_front import POST, H2Client, Scene
from tests.worker.inside import listener, pool

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

KINDS = (Exchange, H2ServerStream, H2ClientStream)
UPLOAD = REQUEST.replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n")
SEVERAL = 3


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def alive() -> list[str]:
    """By name, for a list of the objects would keep them."""
    return sorted(type(each).__name__ for each in gc.get_objects() if type(each) in KINDS)


class Ends(Scene):
    """A gateway with a client and a backend that each speak one of the versions."""

    def __init__(self, world: World, front: str, back: str) -> None:
        super().__init__(world)
        self.front, self.back = front, back
        self.peers: list[Peer] = []
        self.h2: H2Client | None = None
        self.there_h2: H2Peer | None = None

    async def open(self) -> None:
        await self.inside.configure(
            listener("web", "h1", pool="p", http=HTTP, h2c=True),
            pools=[pool("p", self.there.address, protocol=self.back)],
        )
        self.listener.start()
        if self.front == "h2":
            self.h2 = await self.client()
        peer = self.inside.call() if self.h2 is None else self.h2.peer
        self.peers.append(peer)

    async def ask(self) -> int:
        """A request whose body is not complete: so there is an exchange, and it can end in any way."""
        if self.h2 is None:
            await self.peers[0].send(UPLOAD)
            return 0
        return await self.h2.ask([*POST, ("content-length", "5")], end=False)

    async def complete(self, stream: int) -> None:
        if self.h2 is None:
            await self.peers[0].send(b"hello")
        else:
            self.h2.h2.send_data(stream, b"hello", end_stream=True)
            await self.h2.flush()

    async def is_asked(self) -> None:
        """The request has come to the backend."""
        if len(self.peers) == 1:
            self.peers.append(await self.there.accept())
            if self.back == "h2":
                self.there_h2 = H2Peer(self.peers[1])
                await self.there_h2.begin()
        if self.there_h2 is None:
            await self.peers[1].read_until(b"\r\n\r\n")
        else:
            await self.there_h2.requests(len(self.there_h2.streams) + 1)

    async def answer(self) -> None:
        if self.there_h2 is None:
            await self.peers[1].send(OK)
        else:
            await self.there_h2.answer(self.there_h2.streams[-1])

    async def body_has_come(self) -> None:
        if self.there_h2 is None:
            await self.peers[1].read_until(b"hello")
        else:
            there, stream = self.there_h2, self.there_h2.streams[-1]
            await there.until(lambda: stream in there.ended)

    async def is_answered(self, stream: int) -> None:
        if self.h2 is None:
            await read_answer(self.peers[0])
        else:
            await self.h2.body(stream)

    async def is_over(self) -> None:
        """Nothing is under way, and nothing is alive that should not be."""
        backend = self.inside.pool("p").backends[0]
        await self.world.until(lambda: not backend.in_flight, "nothing is under way")
        ends = self.world.loop.time() + 1
        while alive() and self.world.loop.time() < ends:  # what is put off to the end of a batch
            await self.world.turns()
        assert alive() == []


async def whole(ends: Ends) -> None:
    """Requests that are answered, one after the other, on connections that stay open."""
    for _ in range(SEVERAL):
        stream = await ends.ask()
        await ends.is_asked()
        assert alive(), "it would be seen"
        await ends.complete(stream)
        await ends.body_has_come()
        await ends.answer()
        await ends.is_answered(stream)
        await ends.is_over()
    assert ends.listener.open == 1, "its connection is still there"
    assert ends.inside.pool("p").backends[0].open == 1


async def answered_early(ends: Ends) -> None:
    """A response that is complete before its request."""
    stream = await ends.ask()
    await ends.is_asked()
    await ends.answer()
    await ends.is_answered(stream)
    await ends.is_over()


async def client_gone(ends: Ends) -> None:
    await ends.ask()
    await ends.is_asked()
    ends.peers[0].reset()
    await ends.is_over()


async def client_cancels(ends: Ends) -> None:
    """On HTTP/2 one stream only; over HTTP/1 there is nothing but to leave."""
    stream = await ends.ask()
    await ends.is_asked()
    if ends.h2 is None:
        ends.peers[0].close()
    else:
        ends.h2.h2.reset_stream(stream, 8)
        await ends.h2.flush()
    await ends.is_over()


async def backend_gone(ends: Ends) -> None:
    stream = await ends.ask()
    await ends.is_asked()
    ends.peers[1].reset()
    await ends.is_answered(stream)
    await ends.is_over()


async def backend_resets(ends: Ends) -> None:
    """On HTTP/2 one stream only."""
    stream = await ends.ask()
    await ends.is_asked()
    if ends.there_h2 is None:
        await ends.peers[1].send(b"no HTTP\r\n\r\n")
    else:
        ends.there_h2.h2.reset_stream(ends.there_h2.streams[-1], 2)
        await ends.there_h2.flush()
    await ends.is_answered(stream)
    await ends.is_over()


async def too_late(ends: Ends) -> None:
    """The gateway's own answer."""
    stream = await ends.ask()
    await ends.is_asked()
    await ends.complete(stream)
    await ends.body_has_come()
    ends.later(4.5)
    await ends.is_answered(stream)
    await ends.is_over()


async def drained(ends: Ends) -> None:
    """The drain's time is up."""
    await ends.ask()
    await ends.is_asked()
    ends.inside.runtime.stop_accepting()
    ends.listener.go_away()
    await ends.is_over()


WAYS = (
    whole,
    answered_early,
    client_gone,
    client_cancels,
    backend_gone,
    backend_resets,
    too_late,
    drained,
)


@pytest.mark.parametrize("way", WAYS, ids=[way.__name__ for way in WAYS])
@pytest.mark.parametrize("back", ["h1", "h2"])
@pytest.mark.parametrize("front", ["h1", "h2"])
def test_an_exchange_and_its_streams_are_freed_when_it_ends(
    front: str, back: str, way: Callable[[Ends], Coroutine[None, None, None]]
) -> None:
    async def test(world: World) -> None:
        ends = Ends(world, front, back)
        await ends.open()
        with no_collector():
            await way(ends)
        await ends.close(*ends.peers)

    run(test)
