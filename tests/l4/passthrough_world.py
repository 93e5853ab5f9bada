"""What the tests of Mode A have in common: packets by their public headers, and a listener with its
surroundings. Nothing here can encrypt, and neither can the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import TYPE_CHECKING, Any

from expressgateway.l4.passthrough.listener import PassthroughListener
from expressgateway.l4.passthrough.settings import Settings
from expressgateway.net.reactor import Reactor
from expressgateway.observe.counters import ListenerCounters
from expressgateway.upstream.backend import Backend, BackendSettings, SocketAddress
from expressgateway.upstream.pool import Pool, PoolSettings
from expressgateway.upstream.selection import Balancing
from tests.l4.udp_gateway import V4, Client, Echo, FakeCensus, datagram_socket
from tests.net.loopback import descriptors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

MAGLEV = PoolSettings(Balancing("maglev", table_size=251))


def long(
    dcid: bytes, scid: bytes = b"\xaa\xbb", *, kind: int = 0, version: int = 1, size: int = 1200
) -> bytes:
    """A long header packet; an Initial without a token if nothing else is said."""
    head = bytes((0xC0 | kind << 4,)) + version.to_bytes(4, "big")
    head += bytes((len(dcid),)) + dcid + bytes((len(scid),)) + scid
    return head.ljust(size, b"\0")


def initial_with(token: bytes, dcid: bytes) -> bytes:
    head = long(dcid, size=0) + (0x4000 | len(token)).to_bytes(2, "big") + token
    return head.ljust(1200, b"\0")


def short(dcid: bytes, text: bytes = b"") -> bytes:
    return b"\x40" + dcid + text + os.urandom(24)


class Server(Echo):
    """A backend: what it gets it remembers, and answers only when it is told to."""

    def __init__(self, name: bytes = b"", host: str = V4, port: int = 0) -> None:
        super().__init__(name, host, port)
        self.is_silent = True

    @property
    def peer(self) -> Any:
        """The gateway's socket of the last datagram."""
        return self.got[-1][1]

    def answer(self, data: bytes, to: Any = None) -> None:
        self.sock.sendto(data, to or self.peer)


class World:
    def __init__(self, settings: Settings, census: FakeCensus, host: str) -> None:
        self.reactor = Reactor(asyncio.get_running_loop())
        self.census = census
        self.counters = ListenerCounters("passthrough")
        self.backends: list[Backend] = []  # all there ever were
        self.pool = Pool("passthrough", self.backends.append, self.reactor, self.reactor.call_soon)
        sock = datagram_socket(host)
        self.address = sock.getsockname()
        self.listener = PassthroughListener(self.reactor, sock, census, self.counters, self.pool, settings)
        self.closes: list[Callable[[], None]] = []

    def client(self, ip: str = V4) -> Client:
        client = Client((V4, self.address[1]), ip)
        self.closes.append(client.sock.close)
        return client

    def server(self, name: bytes = b"", port: int = 0) -> Server:
        server = Server(name, port=port)
        self.closes.append(server.close)
        return server

    def use(self, *servers: Server | SocketAddress, ids: tuple[str, ...] = ()) -> tuple[Backend, ...]:
        """Make these the pool's backends."""
        found = []
        for at, server in enumerate(servers):
            host, port = (server.address if isinstance(server, Server) else server)[:2]
            id_ = ids[at] if ids else f"{host}:{port}"
            found.append((BackendSettings(id_, host, port, "tcp", 1, None, None), (host, port), id_))
        self.pool.replace(found, MAGLEV)
        return self.pool.backends

    @property
    def dropped(self) -> dict[str, int]:
        return dict(self.counters.dropped)


@contextlib.asynccontextmanager
async def world(census: FakeCensus | None = None, host: str = V4, **settings: Any) -> AsyncIterator[World]:
    """A started listener. At the end nothing may be left of it: no flow, no count, no descriptor."""
    before = descriptors()
    settings.setdefault("max_flows", 1000)
    settings.setdefault("max_per_source", 1000)
    one = World(Settings(**settings), census or FakeCensus(), host)
    one.listener.start()
    try:
        yield one
    finally:
        one.listener.stop()
        one.listener.go_away()
        one.reactor.close()
        for close in one.closes:
            close()
    assert one.reactor.faults == 0
    assert one.listener.open == one.counters.inflight == 0
    table = one.listener.table
    assert not table.by_cid
    assert not table.by_place
    assert not table.lengths
    assert not table._sources
    assert not one.census.inside
    assert not one.reactor._handlers
    assert not any(backend.in_flight or backend.open for backend in one.backends)
    assert descriptors() <= before


async def connected(one: World, client: Client, server: Server, cid: bytes) -> bytes:
    """A handshake, by its public headers: the client's first connection ID; the server's is ``cid``."""
    dcid = os.urandom(8)
    client.send(long(dcid))
    await until(lambda: any(data[6:14] == dcid for data, _ in server.got))
    server.answer(long(b"\xaa\xbb", cid))
    await client.receive()
    client.send(long(cid, kind=2, size=60))
    await until(lambda: server.got[-1][0][6 : 6 + len(cid)] == cid)
    return dcid


async def until(claim: Callable[[], object]) -> None:
    """Turn the loop until the claim is true."""
    async with asyncio.timeout(30):
        while not claim():  # noqa: ASYNC110 - the claims are about counters, which wake nobody
            await asyncio.sleep(0)


def send_cut(client: Client, datagrams: list[bytes]) -> None:
    """All in one buffer, which the kernel cuts: so they arrive, too."""
    size = len(datagrams[0])
    assert all(len(datagram) == size for datagram in datagrams[:-1])
    client.sock.sendmsg([b"".join(datagrams)], [(socket.IPPROTO_UDP, 103, size.to_bytes(2, "little"))])
