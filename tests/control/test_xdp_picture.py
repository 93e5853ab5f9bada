"""What the dashboard and `expressgateway status` show of XDP."""

import asyncio
from typing import Any

from expressgateway.cli.status_page import page
from expressgateway.control.admin import shapes
from expressgateway.control.admin.xdp_picture import Rates, xdp_attention, xdp_picture
from tests.control.changing import FakeGateway

RATES: Rates = {
    "xdp_flows": {("web",): 4.0},
    "xdp_packets": {("web", "in"): 10.0, ("web", "out"): 8.0},
    "xdp_bytes": {("web", "in"): 1000.0},
    "xdp_not_forwarded_packets": {
        ("web", "pass", "no_flow"): 0.25,
        ("web", "pass", "over_cap"): 0.25,
        ("web", "drop", "denied"): 2.0,
        ("", "pass", "fragment"): 9.0,
    },
}


def shown(**more: Any) -> shapes.Xdp:
    found = asyncio.run(FakeGateway().xdp())
    return {**found, **more}  # type: ignore[typeddict-item]


def test_rates_are_those_of_the_listener() -> None:
    (web,) = xdp_picture(shown(), RATES)["listeners"]
    assert (web["flows_ps"], web["in_pps"], web["out_pps"], web["in_bps"], web["out_bps"]) == (
        4,
        10,
        8,
        1000,
        0,
    )
    assert (web["passed_ps"], web["dropped_ps"]) == (0.5, 2.0)


def test_before_anything_is_known_there_are_none() -> None:
    (web,) = xdp_picture(shown(), {})["listeners"]
    assert {web[key] for key in ("flows_ps", "in_pps", "out_bps", "passed_ps", "dropped_ps")} == {None}


def test_lists_are_cut() -> None:
    many = [shown()["listeners"][0]] * 70
    picture = xdp_picture(shown(listeners=many), RATES)
    assert (len(picture["listeners"]), picture["more_listeners"]) == (64, 6)


def test_what_somebody_should_look_at() -> None:
    assert list(xdp_attention(None)) == []
    assert list(xdp_attention(xdp_picture(shown(), {}))) == [
        ("bad", "XDP is not attached to eth1: the interface is gone")
    ]
    away = shown(state="detached", fault="the kernel has no memory", interfaces=[])
    assert [level for level, _ in xdp_attention(xdp_picture(away, {}))] == ["bad", "warn"]


def test_in_a_terminal() -> None:
    picture: dict[str, Any] = {
        "at": 0.0,
        "gateway": {"state": "serving", "pid": 1, "version": "0", "uptime_s": 1.0},
        "config": {"version": 1, "path": "/etc/x.toml"},
        "reload": {"requested": 0, "finished": 0, "last_result": None, "last_report": []},
        "totals": dict.fromkeys(("rps", "p50", "p90", "p99", "errors_ps", "in_bps", "out_bps")) | {"open": 0},
        "attention": [],
        "drain": None,
        "listeners": [],
        "more_listeners": 0,
        "routes": [],
        "more_routes": 0,
        "pools": [],
        "more_pools": 0,
        "workers": [],
        "errors": [],
        "security": [],
        "refused": [],
        "xdp": xdp_picture(shown(), RATES),
    }
    lines = page(picture)
    assert "in the kernel: attached; eth0 native, eth1 (not attached); 1 flows" in lines
    row = next(line for line in lines if line.startswith("web"))
    assert row.split() == ["web", "nat", "1", "4.0", "10", "8.0", "0.50", "2.0"]
    del picture["xdp"]
    assert not any("in the kernel" in line for line in page(picture))
