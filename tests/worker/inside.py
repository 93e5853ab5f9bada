"""A worker's runtime inside the test's own process: real sockets, no supervisor."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from expressgateway.config.schema import Config
from expressgateway.upstream.discovery import Endpoint
from expressgateway.worker.runtime import Runtime
from tests.l4.udp_gateway import FakeCensus
from tests.net.loopback import Peer

if TYPE_CHECKING:
    from expressgateway.upstream.pool import Pool
    from tests.net.loopback import World


SECRET = bytes(range(32))


def listener(name: str, protocol: str = "h1", **more: Any) -> dict[str, Any]:
    return {"name": name, "address": "127.0.0.1:1", "protocol": protocol, **more}


def backends(*addresses: tuple[str, int], **more: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"b{number}", "address": f"{host}:{port}", **more}
        for number, (host, port) in enumerate(addresses)
    ]


def pool(
    name: str, *addresses: tuple[str, int], settings: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """``settings``: the pool's; the others are its backends'."""
    return {"name": name, "backends": backends(*addresses, **more), **(settings or {})}


class Inside:
    """The runtime with a listening socket for each listener of its first configuration."""

    def __init__(self, world: World, count: int = 1) -> None:
        self.world = world
        self.sockets = {}
        self.addresses = []
        for position in range(count):
            sock = socket.create_server(("127.0.0.1", 0))
            sock.setblocking(False)
            self.sockets[position] = sock
            self.addresses.append(sock.getsockname())
        self.census = FakeCensus()
        self.runtime = Runtime(self.census, self.sockets)
        self.said: list[dict[str, Any]] = []
        """Every message for the supervisor."""
        self.runtime.report_to(self.said.append)

    async def configure(
        self,
        *listeners: dict[str, Any],
        files: dict[str, bytes] | None = None,
        secrets: dict[str, bytes] | None = None,
        answers: dict[str, tuple[str, ...]] | None = None,
        **more: Any,
    ) -> Config:
        """As after a ``configure`` message; ``answers``: addresses by name."""
        pools = more.pop("pools", [])
        config = Config.model_validate({"listeners": list(listeners), "pools": pools, **more})
        known = {name: tuple(Endpoint(ip) for ip in ips) for name, ips in (answers or {}).items()}
        self.runtime.configure(config, files or {}, {"": SECRET, **(secrets or {})}, known)
        if self.runtime._is_serving:
            self.runtime.commit()
        return config

    def pool(self, name: str) -> Pool:
        return self.runtime._pools[name]

    def call(self, position: int = 0) -> Peer:
        sock = socket.create_connection(self.addresses[position], timeout=60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Peer(sock)

    async def close(self) -> None:
        """End it: nobody is left, nothing was caught by the safety net."""
        runtime = self.runtime
        runtime.stop_accepting()
        for each in runtime._listeners:
            each.go_away()
        for living in (*runtime._pools.values(), *runtime._retired):
            living.close_idle()
        await self.world.turns()
        assert runtime.faults == 0
        assert runtime.reactor._handlers == {}
        assert self.census.inside.total() == 0
        assert all(counters.inflight == 0 for counters in runtime._listeners.counters())
        for living in runtime._pools.values():
            assert (living.load.in_flight, living.load.open, len(living.queue)) == (0, 0, 0)
            assert all(backend.in_flight == backend.open == 0 for backend in living.backends)
        runtime.reactor.close()
        for listener in runtime._listeners._sockets.values():
            listener.close()
        for sock in self.sockets.values():
            sock.close()
