"""The part of a picture that is XDP's: where the program is attached, and what it forwards now."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from expressgateway.control.admin import shapes
from expressgateway.control.admin.rates import Labels

WANTED: Final = frozenset({"xdp_packets", "xdp_bytes", "xdp_flows", "xdp_not_forwarded_packets"})
"""The families that it is worked out from."""

MAX_LISTENERS: Final = 64
MAX_INTERFACES: Final = 64

Rates = Mapping[str, Mapping[Labels, float]]
"""Per second, by family and labels; empty while nothing is known."""


def xdp_picture(shown: shapes.Xdp, rates: Rates) -> dict[str, Any]:
    return {
        "state": shown["state"],
        "fault": shown["fault"],
        "flows": shown["flows"],
        "max_flows": shown["max_flows"],
        "evictions": shown["evictions"],
        "interfaces": [
            {key: one[key] for key in ("name", "mode", "is_attached", "fault")}
            for one in shown["interfaces"][:MAX_INTERFACES]
        ],
        "listeners": [_listener(one, rates) for one in shown["listeners"][:MAX_LISTENERS]],
        "more_listeners": max(0, len(shown["listeners"]) - MAX_LISTENERS),
    }


def _listener(one: shapes.XdpListener, rates: Rates) -> dict[str, Any]:
    name = one["name"]
    return {
        "name": name,
        "forwarding": one["forwarding"],
        "backends": one["backends"],
        "flows_ps": _rate(rates, "xdp_flows", (name,)),
        "in_pps": _rate(rates, "xdp_packets", (name, "in")),
        "out_pps": _rate(rates, "xdp_packets", (name, "out")),
        "in_bps": _rate(rates, "xdp_bytes", (name, "in")),
        "out_bps": _rate(rates, "xdp_bytes", (name, "out")),
        "passed_ps": _left(rates, name, "pass"),
        "dropped_ps": _left(rates, name, "drop"),
    }


def _rate(rates: Rates, family: str, labels: Labels) -> float | None:
    return round(rates[family].get(labels, 0.0), 2) if rates else None


def _left(rates: Rates, name: str, action: str) -> float | None:
    """Packets a second that were not forwarded, for whatever reason."""
    if not rates:
        return None
    found = rates["xdp_not_forwarded_packets"]
    return round(sum(rate for labels, rate in found.items() if labels[:2] == (name, action)), 2)


def xdp_attention(picture: Mapping[str, Any] | None) -> Iterable[tuple[str, str]]:
    if picture is None:
        return
    if picture["fault"]:
        yield "bad", f"XDP: {picture['fault']}"
    if picture["state"] == "detached":
        yield "warn", "XDP: the program was taken away, and its listeners are served in user space"
    for one in picture["interfaces"]:
        if not one["is_attached"]:
            yield "bad", f"XDP is not attached to {one['name']}{': ' if one['fault'] else ''}{one['fault']}"
