"""A gateway with XDP, backends that serve all of its listeners, and clients: one for a module of tests.

Each *way* is a VIP, with the client that comes to it and how its packets are sent on; there are listeners for
TCP and UDP of both versions of IP at each.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from tests.e2e.harness import eventually
from tests.e2e.xdp_peers import Backend, Datagrams, Flow, Newcomers, Stream, connected, decapsulating
from tests.e2e.xdp_world import (
    DSR_VIP,
    ENCAPSULATED_VIP,
    NAT_VIP,
    World,
    XdpGateway,
    authority,
    front,
    lan,
)
from tests.namespaces import Namespace

PORT: Final = 7000
BACKENDS: Final = ("a", "b")
VERSIONS: Final = (4, 6)
_NOBODYS_PORT: Final = 1
_QUICK: Final = "drain_timeout_ms = 200"


@dataclass(frozen=True)
class Way:
    """How packets come and go."""

    name: str
    forwarding: str
    vip: int
    is_far: bool = False
    """The client is on another interface than the backends: two arms."""

    def address(self, version: int) -> str:
        return (front if self.is_far else lan)(self.vip, version)

    def client(self, world: World) -> Namespace:
        return world.far if self.is_far else world.near


ONE_ARM: Final = Way("one-arm", "nat", NAT_VIP)
TWO_ARMS: Final = Way("two-arms", "nat", NAT_VIP, is_far=True)
DSR: Final = Way("dsr", "dsr", DSR_VIP)
ENCAPSULATED: Final = Way("encapsulated", "dsr_encapsulated", ENCAPSULATED_VIP)
WAYS: Final = (ONE_ARM, TWO_ARMS, DSR, ENCAPSULATED)


def listener(way: Way, protocol: str, version: int) -> str:
    """The name of one."""
    return f"{way.name}-{protocol}{version}"


def config(
    ways: tuple[Way, ...] = WAYS,
    versions: tuple[int, ...] = VERSIONS,
    *,
    weights: dict[str, int] | None = None,
    health: str = "type = 'tcp', interval_ms = 100, timeout_ms = 400, jitter = 0, rise = 1, fall = 2",
    pool: str = "",
    xdp: bool = True,
) -> str:
    """Listeners for each, and a pool for each version. ``pool``: more lines for the pools."""
    weights = weights or dict.fromkeys(BACKENDS, 1)
    text = ""
    for version in versions:
        backends = ", ".join(
            f"{{ id = '{name}', address = '{authority(lan(name, version), PORT)}', weight = {weight} }}"
            for name, weight in weights.items()
        )
        text += (
            f"[[pools]]\nname = 'v{version}'\nbackends = [{backends}]\n"
            "load_balancing = { policy = 'maglev', table_size = 1009 }\n"
            f"{f'health = {{ {health} }}' if health else ''}\n{pool}\n"
        )
    for way in ways:
        for version in versions:
            for protocol in ("tcp", "udp"):
                text += (
                    f"[[listeners]]\nname = '{listener(way, protocol, version)}'\nprotocol = '{protocol}'\n"
                    f"address = '{authority(way.address(version), PORT)}'\npool = 'v{version}'\n"
                )
                if xdp:
                    text += f"xdp = true\nxdp_forwarding = '{way.forwarding}'\n"
    return text


class Site:
    """See the module's text. ``text``: the gateway's listeners and pools; ``more`` is as of `XdpGateway`."""

    def __init__(
        self,
        directory: Path,
        text: str,
        *,
        world: World | None = None,
        runtime: str = "",
        **more: Any,
    ) -> None:
        self._stack = contextlib.ExitStack()
        self.world = world or self._stack.enter_context(World())
        self.backends = {
            name: Backend(
                self.world[name],
                PORT,
                *(
                    lan(address, version)
                    for address in (name, DSR_VIP, ENCAPSULATED_VIP)
                    for version in VERSIONS
                ),
            )
            for name in BACKENDS
        }
        self.gateway = XdpGateway(self.world, directory, text, runtime=f"{runtime}\n{_QUICK}", **more)

    def __enter__(self) -> Self:
        with self._stack as stack:
            for name in BACKENDS:
                stack.enter_context(self.backends[name])
                stack.enter_context(decapsulating(self.world[name]))
            stack.enter_context(self.gateway)
            self.resolve()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._stack.__exit__(*failure)

    def resolve(self) -> None:
        """Who will talk with whom has been resolved: a flow whose next hop is not known yet begins in user
        space."""
        world = self.world
        for version in VERSIONS:
            for name in BACKENDS:
                for namespace in (world.gateway, world.near):
                    connected(namespace, lan(name, version), PORT).close()
            for namespace, address in (
                (world.near, lan("gateway", version)),
                (world.far, front("gateway", version)),
            ):
                with contextlib.suppress(ConnectionRefusedError):
                    connected(namespace, address, _NOBODYS_PORT)

    # -- clients

    def flow(self, way: Way, version: int = 4, **more: Any) -> Flow:
        return Flow(way.client(self.world), way.address(version), PORT, **more)

    def datagrams(self, way: Way, version: int = 4, **more: Any) -> Datagrams:
        return Datagrams(way.client(self.world), way.address(version), PORT, **more)

    def stream(self, way: Way, port: int = PORT, **more: Any) -> Stream:
        return Stream(way.client(self.world), way.address(4), port, self.world.dropped, **more)

    def newcomers(self, way: Way, port: int = PORT, *, first_source_port: int) -> Newcomers:
        return Newcomers(
            way.client(self.world),
            way.address(4),
            port,
            self.world.dropped,
            first_source_port=first_source_port,
        )

    def one_of_each(self, way: Way, version: int = 4) -> dict[str, Flow]:
        """A connection to each backend."""
        found: dict[str, Flow] = {}
        for _ in range(50):
            flow = self.flow(way, version)
            name = flow.who()
            if name in found:
                flow.close()
            else:
                found[name] = flow
            if len(found) == len(BACKENDS):
                return found
        raise AssertionError(f"nobody else than {list(found)} gets connections")

    # -- what the gateway says

    def served_in_user_space(self, name: str | None = None) -> float:
        """Connections and UDP flows that workers have accepted, of one listener or of all."""
        return self.gateway.metric("connections_total", **({"listener": name} if name else {}))

    def counts(self, name: str) -> dict[str, float]:
        """What the kernel has counted of a listener; it is read about once a second."""
        samples = self.gateway._samples()

        def value(family: str, **labels: str) -> float:
            text = ",".join(f'{key}="{label}"' for key, label in {"listener": name, **labels}.items())
            return samples.get((family, text), 0.0)

        found = {
            f"{way}_{what}": value(f"xdp_{what}_total", direction=way)
            for way in ("in", "out")
            for what in ("packets", "bytes")
        }
        found["flows"] = value("xdp_flows_total")
        return found | {
            f"icmp_{kind}": value("xdp_icmp_total", kind=kind) for kind in ("followed", "too_big")
        }

    def eventually_healthy(self, *names: str, version: int = 4) -> None:
        """These backends of the pool are in use, and no others."""
        wanted = {name: name in names for name in BACKENDS}

        def is_so() -> bool:
            return wanted == {
                name: self.gateway.metric("backend_up", pool=f"v{version}", backend=name) == 1
                for name in BACKENDS
            }

        eventually(is_so, f"{names} are in use")
