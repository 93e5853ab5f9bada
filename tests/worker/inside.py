"""A worker's runtime inside the test's own process: real sockets, no supervisor."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from expressgateway.config.schema import Config
from expressgateway.upstream.dns import Answer, DnsError
from expressgateway.worker.runtime import Runtime
from tests.l4.udp_gateway import FakeCensus
from tests.net.loopback import Peer

if TYPE_CHECKING:
    from expressgateway.upstream.pool import Pool
    from tests.net.loopback import World


class Names:
    """A resolver whose answers the test writes; a name without one does not resolve."""

    def __init__(self, **answers: tuple[str, ...]) -> None:
        self.answers = {name.replace("_", "."): ips for name, ips in answers.items()}
        self.ttl_s = 1.0
        self.asked: list[str] = []

    async def resolve(self, host: str) -> Answer:
        self.asked.append(host)
        if host not in self.answers:
            raise DnsError(f"{host} has no address")
        return Answer(self.answers[host], self.ttl_s)


def listener(name: str, protocol: str = "h1", **more: Any) -> dict[str, Any]:
    return {"name": name, "address": "127.0.0.1:1", "protocol": protocol, **more}


def backends(*addresses: tuple[str, int], **more: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"b{number}", "address": f"{host}:{port}", **more}
        for number, (host, port) in enumerate(addresses)
    ]


def pool(name: str, *addresses: tuple[str, int], **more: Any) -> dict[str, Any]:
    return {"name": name, "backends": backends(*addresses, **more)}


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

    async def configure(
        self, *listeners: dict[str, Any], files: dict[str, bytes] | None = None, **more: Any
    ) -> None:
        pools = more.pop("pools", [])
        config = Config.model_validate({"listeners": list(listeners), "pools": pools, **more})
        await self.runtime.configure(config, files or {})

    def pool(self, name: str) -> Pool:
        return self.runtime._pools[name]

    def call(self, position: int = 0) -> Peer:
        sock = socket.create_connection(self.addresses[position], timeout=5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Peer(sock)

    async def close(self) -> None:
        """End it: nobody is left, nothing was caught by the safety net."""
        runtime = self.runtime
        runtime.stop_accepting()
        for each in runtime._listeners.values():
            each.go_away()
        for living in (*runtime._pools.values(), *runtime._retired):
            living.close_idle()
        for discovery in runtime._discoveries.values():
            discovery.close()
        await self.world.turns()
        assert runtime.faults == 0
        assert runtime.reactor._handlers == {}
        assert self.census.inside.total() == 0
        assert all(counters.inflight == 0 for counters in runtime._counters.values())
        assert all(
            backend.in_flight == 0 for living in runtime._pools.values() for backend in living.backends
        )
        runtime.reactor.close()
        for sock in self.sockets.values():
            sock.close()
