"""An endpoint in this process on loopback, and aioquic clients with sockets of their own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from expressgateway.net.batches import BatchSocket
from expressgateway.net.quic.connection import QuicConnection
from expressgateway.net.quic.endpoint import EndpointSettings, QuicEndpoint, Sharing
from expressgateway.net.quic.events import Address, Ended
from expressgateway.net.quic.sharing import Alone
from expressgateway.net.quic.timers import Timers
from expressgateway.net.quic.tls import Grants, TicketStore, server_tls
from expressgateway.observe.counters import ListenerCounters
from tests.net.loopback import World, run
from tests.net.quic.world import ALPN, SECRET, SERVER, AioClient, Nameless, certificate

HANDSHAKE_TIMEOUT_S: Final = 5.0


class Doorman:
    """A `Census` with room for so many."""

    def __init__(self, room: int = 1000) -> None:
        self.room = room
        self.inside: list[str] = []

    def enter(self, ip: str) -> str | None:
        if len(self.inside) >= self.room:
            return "full"
        self.inside.append(ip)
        return None

    def leave(self, ip: str) -> None:
        self.inside.remove(ip)


class Echo:
    """A `Session` that sends back what comes."""

    def __init__(self, connection: QuicConnection) -> None:
        self.connection = connection
        self.is_open = False
        self.received = 0
        self.ended: Ended | None = None
        self.is_over = False

    def on_open(self) -> None:
        self.is_open = True
        self.connection.way.opened(self.connection)

    def on_stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        self.received += len(data)
        self.connection.engine.consumed(stream_id, len(data))
        self.connection.engine.send(stream_id, data, end)

    def on_stream_reset(self, stream_id: int, code: int) -> None: ...
    def on_stream_stop(self, stream_id: int, code: int) -> None: ...
    def on_streams_allowed(self) -> None: ...
    def on_datagram(self, data: bytes) -> None: ...

    def on_ended(self, ended: Ended) -> None:
        self.ended = ended
        self.connection.way.ended(self.connection, ended)

    def on_flushed(self) -> None: ...

    def on_over(self) -> None:
        self.is_over = True


class Scene:
    """An endpoint and what it knows of its clients."""

    def __init__(
        self,
        world: World,
        *,
        retry: str = "never",
        room: int = 1000,
        family: socket.AddressFamily = socket.AF_INET,
        sharing: Sharing | None = None,
    ) -> None:
        self.world = world
        self.reactor = world.reactor
        self.timers = Timers(world.reactor)
        self.sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.sock.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        self.address = self.sock.getsockname()
        self.batch = BatchSocket(self.sock)
        self.census = Doorman(room)
        self.counters = ListenerCounters("q")
        self.sessions: list[Echo] = []
        pem = certificate()
        self.settings = EndpointSettings(
            server_tls(pem.certificate, pem.key, [ALPN], Grants(), TicketStore()),
            SECRET,
            retry,
            HANDSHAKE_TIMEOUT_S,
            1350,
        )
        self.endpoint = QuicEndpoint(
            world.reactor,
            self.timers,
            self.batch,
            self.census,
            self.counters,
            self.settings,
            self._open,
            sharing or Alone(),
        )
        self.endpoint.start()
        self.clients: list[Client] = []
        self.sockets: list[socket.socket] = []

    def _open(self, connection: QuicConnection, ip: str, address: Address) -> Echo:
        session = Echo(connection)
        self.sessions.append(session)
        return session

    def client(self, **options: Any) -> Client:
        client = Client(self.address, **options)
        self.clients.append(client)
        return client

    async def opened(self, **options: Any) -> Client:
        client = self.client(**options)
        await self.world.until(lambda: client.is_open, "a client is served")
        await self.world.until(lambda: not self.endpoint._half_open or len(self.clients) > 1)
        return client

    def raw(self) -> socket.socket:
        """A bare socket that speaks to the endpoint."""
        sock = socket.socket(self.sock.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        sock.connect(self.address)
        self.sockets.append(sock)
        return sock

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for sock in self.sockets:
            sock.close()
        self.endpoint.stop()
        for connection in self.endpoint.connections():
            connection.forget()
        self.timers.close()
        assert self.census.inside == []
        assert self.endpoint._by_cid == {}
        assert self.counters.inflight == 0


class Client(AioClient):
    """An aioquic client with a socket on the loop."""

    def __init__(self, to: Address, *, sock: socket.socket | None = None, **options: Any) -> None:
        self._loop = asyncio.get_running_loop()
        super().__init__(now=self._loop.time(), **options)
        self.to = to
        self.sock = sock or socket.socket(
            socket.AF_INET6 if len(to) == 4 else socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
        )
        self._owns = sock is None
        self._timer: asyncio.TimerHandle | None = None
        self.is_mute = False
        if self._owns:
            self.sock.connect(to)
            self._loop.add_reader(self.sock.fileno(), self._read)
            self.flush()

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
            for _ in range(64):
                self.take(self.sock.recv(65536))
        self.flush()

    def take(self, data: bytes) -> None:
        self.receive(data, SERVER, self._loop.time())

    def flush(self) -> None:
        datagrams = [data for data, _ in self.transmit(self._loop.time())]
        if not self.is_mute:
            for data in datagrams:
                with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
                    self.sock.send(data)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        timer = self.timer()
        if timer is not None:
            self._timer = self._loop.call_at(timer, self._on_timer)

    def _on_timer(self) -> None:
        self.on_timer(self._loop.time())
        self.flush()

    def send(self, data: bytes, *, end: bool = True, stream_id: int | None = None) -> int:
        sent = super().send(data, end=end, stream_id=stream_id)
        self.flush()
        return sent

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._owns and self.sock.fileno() >= 0:
            self._loop.remove_reader(self.sock.fileno())
            self.sock.close()


def scene(
    test: Callable[[Scene], Coroutine[Any, Any, None]], *, timeout_s: float = 30.0, **options: Any
) -> None:
    """Run it with an endpoint; nothing is left behind."""

    async def main(world: World) -> None:
        one = Scene(world, **options)
        try:
            await test(one)
        finally:
            one.close()

    run(main, timeout_s=timeout_s)


class NamelessClient(Client, Nameless):
    """A client on the loop without a connection ID of its own."""


class Choked:
    """A socket that is full again and again."""

    def __init__(self, sock: socket.socket, every: int) -> None:
        self._sock = sock
        self._every = every
        self._count = 0
        self.refusals = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def sendmsg(self, buffers: Sequence[bytes], *arguments: Any) -> int:
        self._count += 1
        if self._count % self._every:
            self.refusals += 1
            raise BlockingIOError
        return self._sock.sendmsg(buffers, *arguments)
