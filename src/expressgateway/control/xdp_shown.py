"""What the admin listener shows of the XDP data plane. Functions without effects."""

from typing import Any

from expressgateway.config.schema import PASSTHROUGH, Config
from expressgateway.control.admin import shapes
from expressgateway.control.xdp import Xdp
from expressgateway.l4.xdp.seen import REASONS, BackendSeen, FlowSeen, VipSeen


def shown_xdp(xdp: Xdp, config: Config) -> shapes.Xdp:
    status = xdp.status or {}
    interfaces: list[Any] = status.get("interfaces", [])
    return {
        "state": _state(xdp, interfaces),
        "fault": xdp.fault,
        "pin_path": status.get("pin_path"),
        "program_id": status.get("program_id"),
        "is_adopted": bool(status.get("is_adopted")),
        "flows": status.get("flows", 0),
        "flows_ipv4": status.get("flows_ipv4", 0),
        "flows_ipv6": status.get("flows_ipv6", 0),
        "flows_opening": status.get("flows_opening", 0),
        "max_flows": status.get("max_flows", config.runtime.xdp_max_flows),
        "flows_ended": xdp.removed if status else 0,
        "evictions": xdp.evicted if status else 0,
        "next_hops": status.get("next_hops", 0),
        "interfaces": interfaces,
        "listeners": _listeners(xdp, config),
        "backends": [
            {"pool": pool, "id": id_, **_traffic(seen)}
            for (pool, id_), seen in (xdp.counted.backends if status else {}).items()
        ],
        "left_out": status.get("left_out", []),
        "nobodys": _reasons(xdp.counted.nobody) if status else {},
    }


def _state(xdp: Xdp, interfaces: list[Any]) -> Any:  # noqa: ANN401 - one of a few words
    if not xdp.is_on:
        return "detached" if xdp.is_detached else "off"
    if xdp.is_leaving:
        return "leaving"
    attached = sum(one["is_attached"] for one in interfaces)
    if attached == len(interfaces):
        return "attached"
    return "partly attached" if attached else "not attached"


def _listeners(xdp: Xdp, config: Config) -> list[shapes.XdpListener]:
    found: list[shapes.XdpListener] = []
    for vip in xdp.vips:
        seen = xdp.counted.vips.get(vip.name, VipSeen())
        own = next((each for each in config.listeners if each.name == vip.name), None)
        mode_a = config.passthrough
        address = own.address if own is not None else mode_a.bind_addr if mode_a is not None else ""
        found.append(
            {
                "name": vip.name,
                "address": str(address),
                "protocol": "quic" if vip.name == PASSTHROUGH else own.protocol if own is not None else "",
                "forwarding": vip.forwarding,
                "pool": vip.pool,
                "backends": xdp.open_backends(vip),
                "stateless_packets": seen.stateless,
                "passed": _reasons(seen, "pass"),
                "dropped": _reasons(seen, "drop"),
                **_traffic(seen),
            }
        )
    return found


def _traffic(seen: VipSeen | BackendSeen) -> shapes.XdpTraffic:
    return {
        "in_packets": seen.in_packets,
        "in_bytes": seen.in_bytes,
        "out_packets": seen.out_packets,
        "out_bytes": seen.out_bytes,
        "flows": seen.flows,
    }


def _reasons(seen: VipSeen, wanted: str = "") -> dict[str, int]:
    """Those that have happened."""
    return {
        reason: count
        for (_, action, reason), count in zip(REASONS, seen.reasons, strict=True)
        if count and wanted in ("", action)
    }


def shown_flow(flow: FlowSeen) -> shapes.XdpFlow:
    return {
        "listener": flow.listener,
        "protocol": flow.protocol,
        "client": flow.client,
        "vip": flow.vip,
        "forwarding": flow.forwarding,
        "pool": flow.pool,
        "backend": flow.backend,
        "source": flow.source,
        "state": flow.state,
        "idle_s": flow.idle_s,
    }
