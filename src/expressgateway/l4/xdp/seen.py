"""What the kernel says of traffic: counts, and flows."""

import time
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar

from expressgateway.l4.xdp.kernel import Table
from expressgateway.l4.xdp.layout import (
    REASON_COUNT,
    Action,
    Direction,
    Flow,
    FlowFlag,
    Forwarding,
    Reason,
    tuple_of,
)
from expressgateway.l4.xdp.libbpf import Map

REASONS: Final = tuple(
    (reason, "drop" if reason.action is Action.ACTION_DROP else "pass", reason.name.partition("_")[2].lower())
    for reason in Reason
)
"""Each with its action and its name, as metrics have them."""

_FORWARDING: Final[Mapping[int, str]] = {
    Forwarding.FORWARD_NAT: "nat",
    Forwarding.FORWARD_DSR: "dsr",
    Forwarding.FORWARD_DSR_ENCAPSULATED: "dsr_encapsulated",
}
_K = TypeVar("_K")
_PROTOCOLS: Final = {6: "tcp", 17: "udp"}
_NS: Final = 1_000_000_000
_BATCH: Final = 1024

NOBODY: Final = 0
"""The VIP of packets that belong to none."""


@dataclass(frozen=True, slots=True)
class VipSeen:
    in_packets: int = 0
    in_bytes: int = 0
    out_packets: int = 0
    out_bytes: int = 0
    flows: int = 0
    stateless: int = 0
    icmp_followed: int = 0
    icmp_too_big: int = 0
    reasons: tuple[int, ...] = (0,) * REASON_COUNT


@dataclass(frozen=True, slots=True)
class BackendSeen:
    in_packets: int = 0
    in_bytes: int = 0
    out_packets: int = 0
    out_bytes: int = 0
    flows: int = 0


@dataclass(frozen=True, slots=True)
class Counted:
    """One look at all counters."""

    vips: dict[str, VipSeen] = field(default_factory=dict)
    """By listener."""
    backends: dict[tuple[str, str], BackendSeen] = field(default_factory=dict)
    """By pool and id."""
    nobody: VipSeen = VipSeen()


@dataclass(frozen=True, slots=True)
class FlowSeen:
    """One flow, in the direction to its backend."""

    listener: str
    protocol: str
    client: str
    vip: str
    forwarding: str
    pool: str
    backend: str
    source: str
    """`nat`: the address and port that the backend sees."""
    state: str
    idle_s: float


def counted(
    vip_counts: Table,
    backend_counts: Table | None,
    vips: Mapping[int, str],
    backends: Mapping[int, tuple[str, str]],
) -> Counted:
    """Names by number. Where two numbers have one name - one of them leaves - they are added up."""
    by_listener: dict[str, list[int]] = {}
    by_backend: dict[tuple[str, str], list[int]] = {}
    for number, name in vips.items():
        _add(by_listener, name, _sums(vip_counts, number))
    if backend_counts is not None:
        for number, key in backends.items():
            _add(by_backend, key, _sums(backend_counts, number))
    return Counted(
        {name: _vip(sums) for name, sums in by_listener.items()},
        {key: BackendSeen(*sums) for key, sums in by_backend.items()},
        _vip(_sums(vip_counts, NOBODY)),
    )


def _vip(sums: list[int]) -> VipSeen:
    *traffic, stateless, followed, too_big = sums[:-REASON_COUNT]
    in_packets, in_bytes, out_packets, out_bytes, flows = traffic
    reasons = tuple(sums[-REASON_COUNT:])
    return VipSeen(in_packets, in_bytes, out_packets, out_bytes, flows, stateless, followed, too_big, reasons)


def _add(into: dict[_K, list[int]], key: _K, sums: list[int]) -> None:
    into[key] = [one + other for one, other in zip(into[key], sums, strict=True)] if key in into else sums


def _sums(table: Table, number: int) -> list[int]:
    """Each field of a struct of counters, over all CPUs."""
    each = table.get_percpu(number.to_bytes(4, "little"))
    values = array("Q", b"".join(each))
    fields = len(values) // max(len(each), 1)
    return [sum(values[at::fields]) for at in range(fields)]


def flows_in(
    table: Map, vips: Mapping[int, str], backends: Mapping[int, tuple[str, str]]
) -> Iterator[FlowSeen]:
    now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    for keys, values, count in table.batches(_BATCH):
        key_size, value_size = len(keys) // count, len(values) // count
        for at in range(count):
            flow = Flow.from_buffer_copy(values, at * value_size)
            if flow.direction != Direction.TO_BACKEND:
                continue
            key = tuple_of(keys[at * key_size : (at + 1) * key_size])
            pool, backend = backends.get(flow.backend, ("", ""))
            is_nat = flow.forwarding == Forwarding.FORWARD_NAT
            yield FlowSeen(
                listener=vips.get(flow.vip, ""),
                protocol=_PROTOCOLS.get(key.protocol, str(key.protocol)),
                client=_joined(str(key.source), key.source_port),
                vip=_joined(str(key.destination), key.destination_port),
                forwarding=_FORWARDING.get(flow.forwarding, ""),
                pool=pool,
                backend=backend,
                source=_joined(str(flow.to.source), flow.to.source_port) if is_nat else "",
                state=_state(key.protocol, flow.flags),
                idle_s=round(max(0, now_ns - flow.seen_ns) / _NS, 3),
            )


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _state(protocol: int, flags: int) -> str:
    if protocol != 6:
        return "open"
    if flags & FlowFlag.FLOW_RST:
        return "reset"
    if flags & FlowFlag.FLOW_FIN or flags & FlowFlag.FLOW_TWIN_FIN:
        return "closing"
    return "opening" if flags & FlowFlag.FLOW_OPENING else "open"
