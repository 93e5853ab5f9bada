"""The program in a small world: a network namespace with devices, routes and neighbours, and maps to fill.

    clients - front - [gateway] - back - backends, and a router to others
                                  back.7: backends with a VLAN tag

The devices are only asked for their routes, neighbours and MACs: frames go into the program and come out of
it by `BPF_PROG_TEST_RUN`. So `back.7` need not be a VLAN device, which not every kernel can make: that it is
`back` and a tag is for the map of ports to say. A thread is in the namespace as long as `Namespace` is
entered, and nobody else ever is.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
import threading
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from expressgateway.l4.xdp import layout
from expressgateway.l4.xdp.layout import Forwarding, Reason
from expressgateway.l4.xdp.libbpf import INNER_MAP, Map, Object, create_array, possible_cpus
from tests.l4.xdp.packets import TCP, UDP, Packet, mac

OBJECT: Final = Path(layout.__file__).parent / "bpf" / "balancer.bpf.o"

PASS, DROP, TX, REDIRECT = 2, 1, 3, 4
"""enum xdp_action, of linux/bpf.h."""

GATEWAY: Final = mac("02:00:00:00:00:01")
"""Of `front`, where clients' frames come in."""
BACK: Final = mac("02:00:00:00:00:02")
"""Of `back`."""
CLIENT: Final = mac("02:00:00:00:01:01")
BACKENDS: Final = {number: mac(f"02:00:00:00:02:0{number}") for number in (1, 2, 3, 7)}
ROUTER: Final = mac("02:00:00:00:03:01")

_CLONE_NEWNET: Final = 0x40000000
_SIZE: Final = 251
"""Of a table. A prime, as tables are."""
_FLOWS: Final = 2048
FLOWS: Final = ("flows4", "flows6", "opening4", "opening6")
PORT: Final = 40000
"""The only one that flows are given, unless a test says otherwise: so it is known beforehand."""
VIP_PORT, BACKEND_PORT = 80, 8080


class Family(NamedTuple):
    """The same places in both versions of IP."""

    version: int
    client: str
    vip: str
    source: str
    """Ours, towards backends."""
    router: str
    link: str
    """Begins the addresses of backends on `back`."""
    tagged: str
    tagged_source: str
    far: str
    """A backend behind the router."""
    narrow: str
    """One to which only small packets fit."""
    silent: str
    """One whose MAC nobody knows."""
    one_armed: str
    """One on `front`."""
    one_armed_source: str
    nowhere: str
    elsewhere: str
    """By a device that is no port of ours."""

    def backend(self, number: int) -> str:
        return f"{self.link}{number}"


V4: Final = Family(
    4, "198.51.100.10", "203.0.113.80", "10.0.0.1", "10.0.0.254", "10.0.0.1", "10.7.0.7", "10.7.0.1",
    "10.9.0.5", "10.9.1.5", "10.0.0.99", "198.51.100.3", "198.51.100.1", "192.0.2.9", "10.8.0.5",
)  # fmt: skip
V6: Final = Family(
    6, "2001:db8:1::10", "2001:db8:80::80", "2001:db8:2::ff01", "2001:db8:2::fe", "2001:db8:2::1",
    "2001:db8:7::7", "2001:db8:7::ff01", "2001:db8:9::5", "2001:db8:91::5", "2001:db8:2::99",
    "2001:db8:1::3", "2001:db8:1::1", "2001:db8:dead::9", "2001:db8:8::5",
)  # fmt: skip

NARROW_MTU: Final = 1300


class Namespace:
    """A network namespace without a name, for the thread that enters it."""

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        self._before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        if _libc.unshare(_CLONE_NEWNET):
            number = ctypes.get_errno()
            os.close(self._before)
            raise OSError(number, f"unshare: {os.strerror(number)}")
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._thread == threading.get_ident()
        if _libc.setns(self._before, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(self._before)

    def ip(self, *commands: str) -> None:
        """Several commands of `ip`, at once."""
        done = subprocess.run(
            ["ip", "-batch", "-"],
            input="\n".join(commands),
            text=True,
            check=False,
            capture_output=True,
            timeout=20,
            env={**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"},
        )
        assert done.returncode == 0, done.stderr

    def index(self, device: str) -> int:
        """`/sys` is another namespace's, if.c is not."""
        index: int = _libc.if_nametoindex(device.encode())
        return index

    def _build(self) -> None:
        for setting in ("ipv4/conf/all/forwarding", "ipv6/conf/all/forwarding"):
            Path("/proc/sys/net", setting).write_text("1")
        self.ip(
            "link set lo up",
            f"link add front address {_text(GATEWAY)} type veth peer name front-end",
            f"link add back address {_text(BACK)} type veth peer name back-end",
            f"link add back.7 address {_text(BACK)} type veth peer name back.7-end",
            "link add out type veth peer name out-end",
            *(
                f"link set {device} addrgenmode none"
                for device in (*_DEVICES, *(f"{d}-end" for d in _DEVICES))
            ),
            *(f"link set {device} up" for device in (*_DEVICES, *(f"{d}-end" for d in _DEVICES))),
            *self._commands(V4),
            *self._commands(V6),
        )

    def _commands(self, family: Family) -> tuple[str, ...]:
        bits, wide = (24, "/32") if family.version == 4 else (64, "/128")
        nodad = "" if family.version == 4 else "nodad"
        neighbours = [
            (family.client, "front", CLIENT),
            (family.one_armed, "front", BACKENDS[3]),
            (family.backend(1), "back", BACKENDS[1]),
            (family.backend(2), "back", BACKENDS[2]),
            (family.router, "back", ROUTER),
            (family.tagged, "back.7", BACKENDS[7]),
        ]
        return (
            f"addr add {family.one_armed_source}/{bits} dev front {nodad}",
            f"addr add {family.source}/{bits} dev back {nodad}",
            f"addr add {family.tagged_source}/{bits} dev back.7 {nodad}",
            *(
                f"neigh replace {ip} lladdr {_text(at)} dev {device} nud permanent"
                for ip, device, at in neighbours
            ),
            f"route add {family.far}{wide} via {family.router}",
            f"route add {family.narrow}{wide} via {family.router} mtu lock {NARROW_MTU}",
            f"route add unreachable {family.nowhere}{wide}",
            f"route add {family.elsewhere}{wide} dev out",
            f"neigh replace {family.elsewhere} lladdr {_text(ROUTER)} dev out nud permanent",
        )


_DEVICES: Final = ("front", "back", "back.7", "out")


class Outcome(NamedTuple):
    verdict: int
    frame: bytes


class World:
    """The object, loaded and pinned nowhere, with maps that begin anew in every test (`reset`)."""

    def __init__(self, namespace: Namespace, path: Path = OBJECT) -> None:
        self.namespace = namespace
        with Object.open(path) as loaded:
            layout.check(loaded)
            for name in FLOWS:
                loaded.resize(name, _FLOWS)
            loaded.load()
            self.maps, self.programs = loaded.maps, loaded.programs
        self.front, self.back = namespace.index("front"), namespace.index("back")
        self._tables: dict[int, Map] = {}
        self._filled: dict[int, tuple[int, ...]] = {}
        self.settings = layout.Settings()
        self.reset()

    def close(self) -> None:
        for each in (*self.maps.values(), *self._tables.values()):
            each.close()
        for program in self.programs.values():
            program.close()

    # -- Maps

    def reset(self) -> None:
        """No flow, count, VIP nor backend; the ports, and settings that tests begin with."""
        for name in ("vips", *FLOWS, "server_ids", "ports", "denied4", "denied6"):
            for key in list(self.maps[name].keys()):
                self.maps[name].delete(key)
        for name in ("vip_counts", "backend_counts"):
            zero = bytes(_stride(self.maps[name]) * possible_cpus())
            for number in range(16):
                self.maps[name].set(_u32(number), zero)
        for number in range(16):
            self.maps["backends"].set(_u32(number), bytes(layout.Backend()))
        for name in ("rates", "works"):
            self.maps[name].set(_u32(0), bytes(_stride(self.maps[name]) * possible_cpus()))
        self.set(
            tcp_idle_ns=300 * 10**9,
            udp_idle_ns=60 * 10**9,
            closing_ns=10 * 10**9,
            new_flows_per_second=0,
            first_port=PORT,
            last_port=PORT,
            seed=0x5EED,
            denies=0,
        )
        tagged = self.namespace.index("back.7")
        for index, device, vlan, at in (
            (self.front, self.front, 0, GATEWAY),
            (self.back, self.back, 0, BACK),
            (tagged, self.back, 7, BACK),
        ):
            port = layout.Port(ifindex=device, vlan=vlan, mac=layout.octets(at))
            self.maps["ports"].set(_u32(index), bytes(port))

    def set(self, **settings: int) -> None:
        """Some of `struct settings`; the others stay."""
        for name, value in settings.items():
            setattr(self.settings, name, value)
        self.maps["settings"].set(_u32(0), bytes(self.settings))

    def backend(
        self, number: int, address: str, source: str, *, port: int = BACKEND_PORT, generation: int = 1,
        alive: bool = True,
    ) -> None:  # fmt: skip
        value = layout.Backend(
            address=layout.address_of(address),
            source=layout.address_of(source),
            port=port,
            flags=layout.BackendFlag.BACKEND_ALIVE if alive else 0,
            generation=generation,
        )
        self.maps["backends"].set(_u32(number), bytes(value))

    def vip(
        self, address: str, *backends: int, forwarding: Forwarding = Forwarding.FORWARD_NAT, number: int = 1,
        port: int = VIP_PORT, protocols: tuple[int, ...] = (TCP, UDP), **fields: Any,
    ) -> None:  # fmt: skip
        """A VIP whose table has these backends in turn."""
        self.table(number, *backends)
        for protocol in protocols:
            key = layout.VipKey(address=layout.address_of(address), port=port, protocol=protocol)
            value = layout.Vip(number=number, table_size=_SIZE, forwarding=forwarding, **fields)
            self.maps["vips"].set(bytes(key), bytes(value))

    def table(self, number: int, *backends: int, size: int = _SIZE) -> None:
        """What a VIP's table holds."""
        table = self._tables.get(number)
        if table is None or table.max_entries != size:
            self.swap(number, *backends, size=size)
        elif self._filled[number] != backends:
            _fill(table, backends)
            self._filled[number] = backends

    def swap(self, number: int, *backends: int, size: int = _SIZE) -> None:
        """Another table for a VIP, made aside and put in its place. Slow: the kernel waits for readers."""
        table = create_array("table", 4, size, INNER_MAP)
        _fill(table, backends)
        self.maps["tables"].set(_u32(number), _u32(table.fd))
        if number in self._tables:
            self._tables[number].close()
        self._tables[number], self._filled[number] = table, backends

    def deny(self, address: str, bits: int) -> None:
        packed = layout.address_bytes(address)
        if ":" in address:
            key = bytes(layout.Prefix6(length=bits, bytes=layout.octets(packed)))
        else:
            key = bytes(layout.Prefix4(length=bits, bytes=layout.octets(packed[12:])))
        self.maps["denied6" if ":" in address else "denied4"].set(key, b"\1")
        self.set(denies=1)

    # -- Packets

    def send(self, packet: Packet | bytes, *, device: int | None = None, ctx: bytes | None = None) -> Outcome:
        """As if it had come in by a device, which is `front` if nothing else is said."""
        index = self.front if device is None else device
        run = self.programs["balance"].test_run(bytes(packet), ifindex=index, ctx=ctx)
        return Outcome(run.verdict, run.data)

    def answer(self, packet: Packet | bytes) -> Outcome:
        """As if it had come in by `back`."""
        return self.send(packet, device=self.back)

    # -- What has been noted

    def counts(self, number: int = 1) -> layout.VipCount:
        total: layout.VipCount = _total(self.maps["vip_counts"], number, layout.VipCount)
        return total

    def backend_counts(self, number: int) -> layout.BackendCount:
        total: layout.BackendCount = _total(self.maps["backend_counts"], number, layout.BackendCount)
        return total

    def reasons(self, number: int = 1) -> dict[Reason, int]:
        """Those that have been counted for a VIP, or with 0 for none."""
        counted = self.counts(number).reasons
        return {reason: counted[reason] for reason in Reason if counted[reason]}

    def flows(self, version: int = 4) -> list[tuple[layout.Tuple, layout.Flow]]:
        """Those that go on, and those that begin."""
        found = []
        for flows in (self.maps[f"flows{version}"], self.maps[f"opening{version}"]):
            for key in list(flows.keys()):
                value = flows.get(key)
                if value is not None:
                    found.append((layout.tuple_of(key), layout.Flow.from_buffer_copy(value)))
        return sorted(found, key=lambda entry: entry[1].direction)

    def flags(self, version: int = 4) -> list[int]:
        """Of the one flow: the entry to the backend, and in `nat` the one to the client."""
        return [flow.flags for _, flow in self.flows(version)]

    def put_flow(self, key: layout.Tuple, flow: layout.Flow) -> None:
        self._home(key, flow).set(layout.key_of(key), bytes(flow))

    def lose(self, key: layout.Tuple, flow: layout.Flow) -> None:
        """As a table that is full does."""
        assert self._home(key, flow).delete(layout.key_of(key))

    def _home(self, key: layout.Tuple, flow: layout.Flow) -> Map:
        version = 4 if len(layout.key_of(key)) == ctypes.sizeof(layout.Tuple4) else 6
        table = "opening" if flow.flags & layout.FlowFlag.FLOW_OPENING else "flows"
        return self.maps[f"{table}{version}"]

    def sizes(self, version: int = 4) -> tuple[int, int]:
        """Entries of flows that go on, and of those that begin."""
        tables = (self.maps[f"flows{version}"], self.maps[f"opening{version}"])
        going, beginning = (len(list(table.keys())) for table in tables)
        return going, beginning

    def age(self, seconds: float) -> None:
        """Let every flow have been seen that much longer ago, and its next hop been asked for."""
        for name in FLOWS:
            for key in list(self.maps[name].keys()):
                value = self.maps[name].get(key)
                if value is not None:  # a full map makes room for what is set
                    flow = layout.Flow.from_buffer_copy(value)
                    flow.seen_ns -= int(seconds * 1e9)
                    flow.hop.until_ns = 0
                    self.maps[name].set(key, bytes(flow))

    def sweep(self) -> layout.Sweep:
        result, context = self.programs["sweep"].run(bytes(layout.Sweep()))
        assert result == 0
        return layout.Sweep.from_buffer_copy(context)


def _total(counts: Map, number: int, kind: type[Any]) -> Any:
    """The sum over all CPUs."""
    values = [kind.from_buffer_copy(value) for value in counts.get_percpu(_u32(number))]
    total = kind()
    for name, *_ in kind._fields_:
        if name == "reasons":
            for value in values:
                for at in range(layout.REASON_COUNT):
                    total.reasons[at] += value.reasons[at]
        else:
            setattr(total, name, sum(getattr(value, name) for value in values))
    return total


def _fill(table: Map, backends: tuple[int, ...]) -> None:
    size = table.max_entries
    entries = [backends[at % len(backends)] if backends else 0 for at in range(size)]
    table.set_batch(struct.pack(f"{size}I", *range(size)), struct.pack(f"{size}I", *entries), size)


def _u32(number: int) -> bytes:
    return struct.pack("I", number)


def _stride(counts: Map) -> int:
    return (counts.value_size + 7) & ~7


def _text(address: bytes) -> str:
    return re.sub("..(?=.)", r"\g<0>:", address.hex())


_libc = ctypes.CDLL(None, use_errno=True)
