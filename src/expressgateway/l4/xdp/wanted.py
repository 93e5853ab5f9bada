"""What the kernel is to do, as whoever follows the configuration and the backends' health says it.

Introduces the *VIP*, an address that clients connect to and the program serves; its *pool*, the backends that
share its work; and `Wanted`, all of it at one time. Plain values: nothing here knows the kernel.
"""

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

IpAddress = IPv4Address | IPv6Address
IpNetwork = IPv4Network | IPv6Network

TCP: Final = 6
UDP: Final = 17

NAT: Final = "nat"
DSR: Final = "dsr"
DSR_ENCAPSULATED: Final = "dsr_encapsulated"


@dataclass(frozen=True, slots=True)
class WantedBackend:
    """One address of a pool."""

    id: str
    address: IpAddress
    port: int
    weight: int = 1
    """0: no new flows, those it has go on."""
    is_alive: bool = True
    """Its flows go on."""
    is_open: bool = True
    """It may be given new ones."""
    ramp_from_s: float = 0.0
    """In slow start since then (CLOCK_MONOTONIC); 0: it has its full share."""

    @property
    def place(self) -> tuple[str, IpAddress, int]:
        """What makes it the same backend as before."""
        return (self.id, self.address, self.port)


@dataclass(frozen=True, slots=True)
class WantedPool:
    """Backends that share the work of one VIP or of several."""

    name: str
    backends: tuple[WantedBackend, ...]
    table_size: int = 65537
    slow_start_s: float = 0.0
    drain_s: float = 10.0
    """How long the flows of a backend that is taken out may go on."""


@dataclass(frozen=True, slots=True)
class ServerIds:
    """QUIC whose connection IDs name a backend: its id is its server ID, in hexadecimal digits."""

    config_id: int
    length: int


@dataclass(frozen=True, slots=True)
class WantedVip:
    """One address that is served."""

    name: str
    """The listener's."""
    address: IpAddress
    port: int
    protocol: int
    pool: str
    forwarding: str = NAT
    is_by_address: bool = False
    """A client's address alone decides, not its port."""
    server_ids: ServerIds | None = None
    drain_s: float = 10.0
    """How long its flows may go on once it is gone."""

    @property
    def place(self) -> tuple[IpAddress, int, int]:
        return (self.address, self.port, self.protocol)

    def fits(self, backend: WantedBackend) -> bool:
        """Whether the program can send its packets there: addresses of one family, and in `dsr` one port."""
        if backend.address.version != self.address.version:
            return False
        return self.forwarding == NAT or backend.port == self.port


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for all flows."""

    tcp_idle_s: float = 3600.0
    udp_idle_s: float = 60.0
    closing_s: float = 10.0
    new_flows_per_second: int = 125_000
    """On each CPU; 0: no limit."""
    first_port: int = 10_000
    last_port: int = 32_767
    denied: frozenset[IpNetwork] = frozenset()


@dataclass(frozen=True, slots=True)
class Wanted:
    """Everything."""

    vips: tuple[WantedVip, ...] = ()
    pools: dict[str, WantedPool] = field(default_factory=dict)
    rules: Rules = Rules()
    is_closing: bool = False
    """No new flows for anybody; those there are go on."""

    @property
    def versions(self) -> set[int]:
        """Of IP, that the VIPs are of."""
        return {vip.address.version for vip in self.vips}
