"""A listener with ``raw_proxy`` between QUIC peers that we did not write, in one process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from typing import TYPE_CHECKING, Any

from expressgateway.demo.certificate import CertificateFiles, make_certificate, write_certificate
from expressgateway.l4.quic_relay import RelaySettings
from expressgateway.l4.quic_relay_listener import QuicRelayListener, relay_diallers, relay_grants
from expressgateway.net.batches import BatchSocket
from expressgateway.net.quic.endpoint import EndpointSettings
from expressgateway.net.quic.sharing import Alone
from expressgateway.net.quic.timers import Timers
from expressgateway.net.quic.tls import TicketStore, server_tls
from expressgateway.net.reactor import Reactor
from expressgateway.observe.counters import ListenerCounters
from expressgateway.upstream.backend import Backend, BackendSettings, TlsSettings
from expressgateway.upstream.pool import Pool
from tests.l4.udp_gateway import FakeCensus, datagram_socket, run
from tests.net.loopback import descriptors
from tests.quic_peers import QuicBackend, QuicPeer, quic_backend, quic_client, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

__all__ = ["NAME", "RelayScene", "relay_scene", "run", "until"]

NAME = "backend.example"
SWEEP_S = 0.05


class RelayScene:
    """See the module's text. Options are those of ``raw_proxy``."""

    def __init__(
        self,
        directory: Path,
        *,
        alpn: tuple[str, ...] = ("relayed", "other"),
        max_streams: int = 256,
        max_datagrams: int = 1024,
        idle_timeout_s: float = 30.0,
        connect_timeout_s: float = 5.0,
        handshake_timeout_s: float = 5.0,
        sni: str = NAME,
    ) -> None:
        self.directory = directory
        self.front = write_certificate(directory, make_certificate("front.example"), "front")
        self.back = write_certificate(directory, make_certificate(NAME, local=False), "back")
        self.alpn = alpn
        self.sni = sni
        self.reactor = Reactor(asyncio.get_running_loop())
        self.timers = Timers(self.reactor)
        self.census = FakeCensus()
        self.counters = ListenerCounters("raw")
        self.backends: list[Backend] = []  # all there ever were
        self.pool = Pool("raw", self.backends.append, self.reactor, self.reactor.call_soon)
        grants = relay_grants(max_streams, idle_timeout_s, 1472)
        self.diallers = relay_diallers(self.reactor, self.timers, connect_timeout_s, alpn, grants, [])
        sock = datagram_socket("127.0.0.1")
        self.port: int = sock.getsockname()[1]
        tls = server_tls(
            self.front.certificate.read_bytes(),
            self.front.key.read_bytes(),
            list(alpn),
            grants,
            TicketStore(),
        )
        self.listener = QuicRelayListener(
            self.reactor,
            self.timers,
            BatchSocket(sock),
            self.census,
            self.counters,
            EndpointSettings(tls, bytes(32), "never", handshake_timeout_s, 1472),
            Alone(),
            self.pool,
            RelaySettings(self.diallers, max_streams, max_datagrams),
        )
        self.stack = contextlib.AsyncExitStack()

    async def backend(
        self, alpn: tuple[str, ...] = (), files: CertificateFiles | None = None, **more: Any
    ) -> QuicBackend:
        """A server; it is in no pool yet."""
        files = files or self.back
        return await self.stack.enter_async_context(
            quic_backend(files.certificate, files.key, list(alpn or self.alpn), **more)
        )

    async def client(self, *alpn: str, **more: Any) -> QuicPeer:
        return await self.stack.enter_async_context(
            quic_client(self.port, list(alpn or self.alpn[:1]), **more)
        )

    def use(self, *ports: int) -> tuple[Backend, ...]:
        """Make these the pool's backends."""
        tls = TlsSettings(True, self.sni, self.back.certificate.read_bytes(), None, None)
        found = [
            BackendSettings(f"127.0.0.1:{port}", "127.0.0.1", port, "quic", 1, tls, None) for port in ports
        ]
        for dialler in self.diallers.values():
            for settings in found:
                dialler.context_for(settings)
        self.pool.replace([(each, (each.host, each.port), each.id) for each in found])
        return self.pool.backends

    async def pair(self, **more: Any) -> tuple[QuicPeer, QuicPeer]:
        """A client and the connection that a backend of its own sees for it."""
        backend = await self.backend(**more)
        self.use(backend.port)
        client = await self.client()
        return client, await backend.peer()

    async def sweep_on(self) -> None:
        """As a worker does, and more often."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep()

    def sweep(self, later_s: float = 0.0) -> None:
        self.reactor.now = time.monotonic()
        self.listener.sweep(self.reactor.now + later_s)


@contextlib.asynccontextmanager
async def relay_scene(directory: Path, **options: Any) -> AsyncIterator[RelayScene]:
    """A started listener. At the end nothing may be left of it: no connection, no count, no descriptor."""
    gc.collect()  # what earlier tests left to the collector is not to go meanwhile
    before = descriptors()
    one = RelayScene(directory, **options)
    one.listener.start()
    sweeper = asyncio.get_running_loop().create_task(one.sweep_on(), name="sweep")
    try:
        yield one
        one.listener.stop()
        one.listener.go_away()
        await until(lambda: not one.listener.open and len(one.reactor._handlers) == 0)
    finally:
        sweeper.cancel()
        await one.stack.aclose()
        one.timers.close()
        one.reactor.close()
    await asyncio.sleep(0)
    counters = one.counters
    assert one.reactor.faults == 0
    assert counters.inflight == counters.quic_streams_open == 0
    assert not one.listener._relays
    assert not one.census.inside
    assert not any(backend.in_flight or backend.open for backend in one.backends)
    assert (one.pool.load.in_flight, one.pool.load.open) == (0, 0)
    await until(lambda: descriptors() <= before)
