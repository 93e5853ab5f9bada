"""What the kernel is to do, made of the configuration and of what is known of backends. Pure."""

import ipaddress
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from expressgateway.config.listeners import Listener
from expressgateway.config.schema import PASSTHROUGH, Config, Pool
from expressgateway.l4.xdp.wanted import (
    TCP,
    UDP,
    Rules,
    ServerIds,
    Wanted,
    WantedBackend,
    WantedPool,
    WantedVip,
)
from expressgateway.upstream.discovery import Found

_PROTOCOLS: Final = {"tcp": TCP, "udp": UDP}


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a pool: who is there, and who of them is well, as workers are told (`health`)."""

    found: tuple[Found, ...] = ()
    standing: Mapping[str, Any] | None = None


Ask = Callable[[str], Known]
"""By a pool's name."""


def served(config: Config) -> tuple[Listener, ...]:
    """The listeners that the kernel serves."""
    return tuple(listener for listener in config.listeners if listener.xdp)


def versions_of(config: Config) -> set[int]:
    """Of IP, that the VIPs are of."""
    return {vip.address.version for vip in _vips(config)}


def pools_of(config: Config) -> set[str]:
    """The names of the pools that VIPs send work to."""
    return {vip.pool for vip in _vips(config)}


def wanted_of(config: Config, ask: Ask, *, is_closing: bool = False) -> Wanted:
    """Everything, where `runtime.xdp_enabled`; else nothing."""
    if not config.runtime.xdp_enabled:
        return Wanted(rules=rules_of(config))
    vips = tuple(_vips(config))
    used = {vip.pool: 0.0 for vip in vips}
    for vip in vips:
        used[vip.pool] = max(used[vip.pool], vip.drain_s)
    pools = {
        pool.name: _pool(pool, ask(pool.name), used[pool.name])
        for pool in config.every_pool()
        if pool.name in used
    }
    return Wanted(vips, pools, rules_of(config), is_closing)


def rules_of(config: Config) -> Rules:
    runtime = config.runtime
    first, _, last = runtime.xdp_source_ports.partition("-")
    return Rules(
        tcp_idle_s=runtime.xdp_tcp_idle_timeout_seconds,
        udp_idle_s=runtime.xdp_udp_idle_timeout_seconds,
        closing_s=runtime.xdp_closing_timeout_seconds,
        new_flows_per_second=runtime.xdp_new_flow_cap_per_sec_per_cpu,
        first_port=int(first),
        last_port=int(last),
        denied=frozenset(runtime.xdp_denied),
    )


def _vips(config: Config) -> Iterator[WantedVip]:
    for listener in served(config):
        pool = config.pool_of(listener)
        if listener.address.ip is None or pool is None:
            continue  # the configuration has made sure of both
        balancing = pool.load_balancing
        yield WantedVip(
            listener.name,
            listener.address.ip,
            listener.address.port,
            _PROTOCOLS[listener.protocol],
            pool.name,
            listener.xdp_forwarding,
            balancing.is_set("hash_key") and balancing.hash_key == "client_ip",
            drain_s=listener.drain_timeout_ms / 1000,
        )
    mode_a = config.passthrough
    if (
        mode_a is not None
        and mode_a.xdp
        and mode_a.cid_routing is not None
        and mode_a.bind_addr.ip is not None
    ):
        yield WantedVip(
            PASSTHROUGH,
            mode_a.bind_addr.ip,
            mode_a.bind_addr.port,
            UDP,
            PASSTHROUGH,
            mode_a.xdp_forwarding,
            server_ids=ServerIds(mode_a.cid_routing.config_id, mode_a.cid_routing.server_id_length),
            drain_s=config.runtime.drain_timeout_ms / 1000,
        )


def _pool(pool: Pool, known: Known, drain_s: float) -> WantedPool:
    standing = known.standing or {}
    down = frozenset(standing.get("down", ()))
    draining = frozenset(standing.get("draining", ()))
    ramps = standing.get("ramps", {})
    return WantedPool(
        pool.name,
        tuple(
            WantedBackend(
                id_,
                ipaddress.ip_address(address[0]),
                address[1],
                settings.weight,
                is_alive=id_ not in down,
                is_open=settings.weight > 0 and id_ not in down and id_ not in draining,
                ramp_from_s=ramps.get(id_) or 0.0,
            )
            for settings, address, id_ in known.found
        ),
        pool.load_balancing.table_size,
        pool.load_balancing.slow_start_ms / 1000,
        drain_s,
    )
