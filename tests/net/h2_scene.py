"""A backend's shared connections on loopback: exchanges that remember, and a far end that speaks HTTP/2.

Introduces the *scene*: one backend, its ``H2Connections``, and the connections that were accepted. ``scene``
makes a test of a coroutine that is given one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    DataReceived,
    Event,
    RequestReceived,
    StreamEnded,
)
from h2.settings import SettingCodes, Settings

from expressgateway.net.dial import Dialler
from expressgateway.net.h2_back import H2Connections
from expressgateway.upstream.backend import Backend, BackendSettings
from expressgateway.wire.errors import UnprocessedError
from expressgateway.wire.head import RequestHead
from tests.net import loopback
from tests.net.loopback import PATIENCE_S, Peer, World, run
from tests.net.test_h1_back import Waiter as Remembers

if TYPE_CHECKING:
    from collections.abc import Callable

    from expressgateway.wire.errors import WireError
    from expressgateway.wire.sinks import ClientStream

OK = [(":status", "200")]


class Waiter(Remembers):
    """An exchange that asks as soon as it may."""

    def __init__(self, ip: str = "192.0.2.1", *, body: bytes | None = None) -> None:
        super().__init__(ip)
        self._request = body
        self.then: Callable[[], None] = lambda: None
        """Called from inside ``on_leased``."""
        self.at_abort: Callable[[], None] = lambda: None

    def on_leased(self, stream: ClientStream) -> None:
        super().on_leased(stream)
        method = b"GET" if self._request is None else b"POST"
        stream.send_head(RequestHead(method, b"http", b"a.test", b"/", ()), self._request is None)
        if self._request:
            stream.send_data(self._request, False)
        self.then()

    def on_response_abort(self, error: WireError) -> None:
        super().on_response_abort(error)
        self.at_abort()

    @property
    def is_unprocessed(self) -> bool:
        return isinstance(self.error, UnprocessedError) and self.was_delivered is False


class H2Peer:
    """The backend's end of one connection, spoken by the `h2` library when the test says so."""

    def __init__(self, peer: Peer, **settings: int) -> None:
        self.peer = peer
        self.h2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        offered = {SettingCodes[name.upper()]: value for name, value in settings.items()}
        self.h2.local_settings = Settings(client=False, initial_values=offered)
        self.streams: list[int] = []
        """Requests so far, in order."""
        self.ended: set[int] = set()
        self.bodies: dict[int, int] = {}
        """Bytes by stream."""
        self.events: list[Event] = []
        self.grants = True
        """Give credit back for what was read."""

    async def begin(self) -> None:
        self.h2.initiate_connection()
        await self.flush()

    async def flush(self) -> None:
        await self.peer.send(self.h2.data_to_send())

    async def read(self) -> bool:
        """What came, and its effect; False at the end."""
        data = await self.peer.read(262_144)
        for event in self.h2.receive_data(data):
            self.events.append(event)
            if isinstance(event, RequestReceived):
                self.streams.append(event.stream_id)
            elif isinstance(event, DataReceived):
                self.bodies[event.stream_id] = self.bodies.get(event.stream_id, 0) + len(event.data)
                if self.grants:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, StreamEnded):
                self.ended.add(event.stream_id)
        await self.flush()
        return bool(data)

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            assert await self.read(), f"it ended; {self.events}"

    async def requests(self, count: int) -> list[int]:
        await self.until(lambda: len(self.streams) >= count)
        return self.streams

    def saw(self, kind: type[Event], **fields: object) -> bool:
        return any(
            isinstance(event, kind) and all(getattr(event, name) == value for name, value in fields.items())
            for event in self.events
        )

    async def answer(self, *streams: int) -> None:
        for stream in streams:
            self.h2.send_headers(stream, OK, end_stream=True)
        await self.flush()

    async def allow(self, streams: int) -> None:
        self.h2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: streams})
        await self.flush()

    async def goaway(self, last: int, code: int = 0) -> None:
        """Not the library's: it closes the connection for both sides."""
        await self.peer.send(b"\0\0\x08\x07\0\0\0\0\0" + last.to_bytes(4, "big") + code.to_bytes(4, "big"))

    async def rest(self) -> None:
        """Read to the end."""
        while await self.read():
            pass


class Scene:
    """One backend, its connections, and the far ends that were accepted."""

    def __init__(self, world: World, address: tuple[str, int] | None = None, **settings: Any) -> None:
        self.world = world
        self.there = loopback.Backend()
        host, port = address or self.there.address
        base = BackendSettings("b", host, port, "h2", 1, None, None)
        self.backend = Backend(replace(base, **settings), (host, port), "b")
        self.dialler = Dialler(world.reactor, PATIENCE_S, ("h2",))
        self.group = H2Connections(self.backend, world.reactor, self.dialler)
        self.backend.connections = self.group
        self.peers: list[Peer] = []

    async def accept(self, **settings: int) -> H2Peer:
        peer = await self.there.accept()
        self.peers.append(peer)
        there = H2Peer(peer, **settings)
        await there.begin()
        return there

    async def open(self, **settings: int) -> tuple[Waiter, H2Peer]:
        """A connection with one exchange on it, whose request has come."""
        waiter = self.ask()
        there = await self.accept(**settings)
        await there.requests(1)
        await self.world.until(lambda: waiter.calls == ["leased"])
        await self.world.turns(2)  # its SETTINGS are read
        return waiter, there

    def ask(self, body: bytes | None = None) -> Waiter:
        waiter = Waiter(body=body)
        self.lease(waiter)
        return waiter

    def lease(self, waiter: Waiter) -> None:
        stream = self.group.lease(waiter)
        if stream is not None:
            waiter.on_leased(stream)

    def several(self, count: int) -> list[Waiter]:
        return [self.ask() for _ in range(count)]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Connections open, busy and idle."""
        return self.backend.open, self.backend.busy, self.group.idle

    async def is_empty(self) -> None:
        """Whatever happened, nothing is counted any more."""
        await self.world.until(lambda: not self.group.open, f"{self.group} closes")
        assert self.counts == (0, 0, 0)
        assert self.backend.load.open == 0

    def close(self) -> None:
        for waiter in list(self.group._waiting):
            self.group.cancel(waiter)
        for connection in list(self.group._everyone):
            connection.reset()
        for peer in self.peers:
            peer.close()
        self.there.close()
        assert self.counts == (0, 0, 0)


def scene(**settings: Any) -> Callable[[Callable[[Any, Scene], Any]], Callable[[Any], None]]:
    """Make a test of a coroutine method that is given a scene."""

    def decorate(test: Callable[[Any, Scene], Any]) -> Callable[[Any], None]:
        def wrapped(self: Any) -> None:
            async def main(world: World) -> None:
                made = Scene(world, **settings)
                try:
                    await test(self, made)
                finally:
                    made.close()

            run(main)

        wrapped.__doc__ = test.__doc__
        return wrapped

    return decorate
