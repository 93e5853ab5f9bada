"""What the XDP data plane has counted, as metrics. Read piece by piece: nothing walked over is changed."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from expressgateway.l4.xdp.seen import REASONS
from expressgateway.observe.counters import Sample

if TYPE_CHECKING:
    from expressgateway.control.xdp import Xdp

NOBODY: Final = ""
"""The `listener` of packets that are no listener's."""


def samples_of(xdp: "Xdp") -> Iterator[Sample]:
    """Nothing, where there is no data plane."""
    status = xdp.status
    if status is None:
        return
    counted = xdp.counted
    for one in status["interfaces"]:
        yield "xdp_attached", (one["name"], one["mode"] or "none"), int(one["is_attached"])
    yield "xdp_fault", (), int(bool(xdp.fault))
    yield "xdp_flow_entries", ("ipv4",), status["flows_ipv4"]
    yield "xdp_flow_entries", ("ipv6",), status["flows_ipv6"]
    yield "xdp_flow_entries_opening", (), status["flows_opening"]
    yield "xdp_flow_entries_limit", (), status["max_flows"]
    yield "xdp_flows_ended", (), xdp.removed
    yield "xdp_flow_evictions", (), xdp.evicted
    for name, vip in counted.vips.items():
        yield "xdp_packets", (name, "in"), vip.in_packets
        yield "xdp_packets", (name, "out"), vip.out_packets
        yield "xdp_bytes", (name, "in"), vip.in_bytes
        yield "xdp_bytes", (name, "out"), vip.out_bytes
        yield "xdp_flows", (name,), vip.flows
        yield "xdp_stateless_packets", (name,), vip.stateless
        yield "xdp_icmp", (name, "followed"), vip.icmp_followed
        yield "xdp_icmp", (name, "too_big"), vip.icmp_too_big
    for name, vip in (*counted.vips.items(), (NOBODY, counted.nobody)):
        for (_, action, reason), count in zip(REASONS, vip.reasons, strict=True):
            if count or name != NOBODY:
                yield "xdp_not_forwarded_packets", (name, action, reason), count
    for (pool, backend), seen in counted.backends.items():
        yield "xdp_backend_packets", (pool, backend, "in"), seen.in_packets
        yield "xdp_backend_packets", (pool, backend, "out"), seen.out_packets
        yield "xdp_backend_bytes", (pool, backend, "in"), seen.in_bytes
        yield "xdp_backend_bytes", (pool, backend, "out"), seen.out_bytes
        yield "xdp_backend_flows", (pool, backend), seen.flows
