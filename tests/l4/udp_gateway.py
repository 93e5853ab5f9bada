"""What the UDP tests have in common: peers, a census of their own, and a listener with its surroundings.

Loopback delivers, and refuses, within the sender's system call: what a test has sent is in the listener's
queue when ``send`` returns, and one turn of the loop takes it from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import uvloop

from expressgateway.l4.udp import IDLE_S, UdpListener
from expressgateway.net.reactor import Reactor
from expressgateway.observe.counters import ListenerCounters
from expressgateway.upstream.backend import Backend, BackendSettings, SocketAddress
from expressgateway.upstream.pool import Pool, PoolSettings
from tests.net.loopback import descriptors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

PATIENCE_S: Final = 30.0
V4, V6 = "127.0.0.1", "::1"
UNTIL_IDLE_S: Final = IDLE_S + 1.0  # a flow's last datagram is remembered to the second


# --- peers --------------------------------------------------------------------------------------------------


def datagram_socket(host: str, port: int = 0, *, dual: bool = False) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual)
    sock.bind((host, port))
    return sock


class Echo:
    """A backend that answers with its name in front, and remembers what it got and from whom."""

    def __init__(self, name: bytes = b"", host: str = V4, port: int = 0) -> None:
        self.name = name
        self.sock = datagram_socket(host, port)
        self.address: SocketAddress = self.sock.getsockname()
        self.got: list[tuple[bytes, Any]] = []
        self.is_silent = False
        asyncio.get_running_loop().add_reader(self.sock, self._on_ready)

    @property
    def data(self) -> list[bytes]:
        return [data for data, _ in self.got]

    def _on_ready(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, sender = self.sock.recvfrom(65536)
                self.got.append((data, sender))
                if not self.is_silent:
                    self.sock.sendto(self.name + data, sender)

    def close(self) -> None:
        if self.sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self.sock)
            self.sock.close()


class Client:
    """Connected: it hears only what comes from the very address that it sends to."""

    def __init__(self, to: Any, ip: str | None = None) -> None:
        self.sock = datagram_socket(ip or (V6 if ":" in to[0] else V4))
        self.sock.connect(to)

    def send(self, data: bytes) -> None:
        self.sock.send(data)

    async def receive(self) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.get_running_loop().sock_recv(self.sock, 65536)

    async def ask(self, data: bytes) -> bytes:
        self.send(data)
        return await self.receive()

    def hears_nothing(self) -> bool:
        try:
            self.sock.recv(65536)
        except BlockingIOError:
            return True
        return False


class FakeCensus:
    def __init__(self, total: int = 1_000_000, per_ip: int = 1_000_000) -> None:
        self.total = total
        self.per_ip = per_ip
        self.inside: Counter[str] = Counter()

    def enter(self, ip: str) -> str | None:
        if self.inside.total() >= self.total:
            return "process_cap"
        if self.inside[ip] >= self.per_ip:
            return "ip_cap"
        self.inside[ip] += 1
        return None

    def leave(self, ip: str) -> None:
        self.inside[ip] -= 1
        if not self.inside[ip]:
            del self.inside[ip]


class Gateway:
    """A listener with what surrounds it."""

    def __init__(self, host: str, census: FakeCensus, *, dual: bool) -> None:
        self.reactor = Reactor(asyncio.get_running_loop())
        self.census = census
        self.counters = ListenerCounters("dns")
        self.backends: list[Backend] = []  # all there ever were
        self.pool = Pool("p", self.backends.append, self.reactor, self.reactor.call_soon)
        sock = datagram_socket(host, dual=dual)
        self.address = sock.getsockname()
        self.listener = UdpListener(self.reactor, sock, census, self.counters, self.pool)
        self.closes: list[Callable[[], None]] = []

    @property
    def port(self) -> int:
        port: int = self.address[1]
        return port

    def client(self, ip: str | None = None, to: Any = None) -> Client:
        client = Client(to or self.address, ip)
        self.closes.append(client.sock.close)
        return client

    def echo(self, name: bytes = b"", host: str = V4, port: int = 0) -> Echo:
        echo = Echo(name, host, port)
        self.closes.append(echo.close)
        return echo

    def use(
        self, *addresses: SocketAddress, weights: Sequence[int] = (), settings: PoolSettings | None = None
    ) -> tuple[Backend, ...]:
        """Make these the pool's backends."""
        self.pool.replace(
            [
                (settings_of(address, weight), address, f"{address[0]}:{address[1]}")
                for address, weight in zip(addresses, weights or [1] * len(addresses), strict=True)
            ],
            settings,
        )
        return self.pool.backends

    def is_closed(self) -> bool:
        return self.listener._sock.fileno() < 0


def settings_of(address: SocketAddress, weight: int = 1) -> BackendSettings:
    return BackendSettings(f"{address[0]}:{address[1]}", address[0], address[1], "tcp", weight, None, None)


@contextlib.asynccontextmanager
async def gateway(
    host: str = V4, census: FakeCensus | None = None, *, dual: bool = False
) -> AsyncIterator[Gateway]:
    """A started listener. At the end nothing may be left of it: no flow, no count, no descriptor."""
    before = descriptors()
    one = Gateway(host, census or FakeCensus(), dual=dual)
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
    assert not one.census.inside
    assert not one.reactor._handlers
    assert not any(backend.in_flight or backend.open for backend in one.backends)
    assert (one.pool.load.in_flight, one.pool.load.open) == (0, 0)
    assert descriptors() <= before


async def until(claim: Callable[[], object]) -> None:
    """Turn the loop until the claim is true."""
    async with asyncio.timeout(PATIENCE_S):
        while not claim():  # noqa: ASYNC110 - the claims are about counters, which wake nobody
            await asyncio.sleep(0)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def dead_address() -> SocketAddress:
    """Nobody is there: loopback answers with ICMP port unreachable."""
    with datagram_socket(V4) as sock:
        address: SocketAddress = sock.getsockname()
        return address
