"""Pools and backends as the dashboard shows them: those that are not well first, and no more than is read."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from expressgateway.config.schema import Config
from expressgateway.control.admin.rates import Labels, Pace
from expressgateway.control.admin.view import pool_warning
from expressgateway.control.health import HealthBoard
from expressgateway.control.ledger import Merged
from expressgateway.upstream.health_backend import (
    DISABLED,
    DRAINING,
    EJECTED,
    HEALTHY,
    UNHEALTHY,
    UNKNOWN,
    BackendHealth,
)

MAX_POOLS: Final = 100
MAX_BACKENDS: Final = 40
"""Of one pool."""
MAX_ROWS: Final = 400
"""Backends of all pools together."""

_RANKS: Final = {UNHEALTHY: 0, EJECTED: 0, DRAINING: 1, DISABLED: 1, UNKNOWN: 2, HEALTHY: 2}


@dataclass(frozen=True, slots=True)
class Traffic:
    """Per second. Empty while nothing is known."""

    is_known: bool = False
    requests: Mapping[Labels, float] = field(default_factory=dict)
    """Pool, backend, class of the status."""
    retries: Mapping[Labels, float] = field(default_factory=dict)
    """Pool."""


@dataclass(slots=True)
class _Work:
    """What one backend does, or a pool of them."""

    rps: float = 0.0
    errors_ps: float = 0.0
    in_flight: int = 0

    def shown(self, *, is_known: bool) -> dict[str, Any]:
        return {
            "rps": round(self.rps, 2) if is_known else None,
            "errors_ps": round(self.errors_ps, 2) if is_known else None,
            "in_flight": self.in_flight,
        }


async def pictures(
    config: Config, board: HealthBoard | None, traffic: Traffic, counts: Merged, pace: Pace
) -> tuple[list[dict[str, Any]], int]:
    """The pools in the order of the file, and how many there are beyond `MAX_POOLS`."""
    pools = list(config.every_pool())
    if board is None:
        return [], 0
    work = await _work(traffic, counts, pace)
    rows_left = MAX_ROWS
    shown = []
    for pool in pools[:MAX_POOLS]:
        await pace.rest()  # a pool may have hundreds of backends
        try:
            members = board.members(pool.name)
            described = board.describe_pool(pool.name)
        except LookupError:
            continue  # gone meanwhile
        chosen = sorted(members, key=lambda each: _RANKS[each.state])[: min(MAX_BACKENDS, rows_left)]
        rows_left -= len(chosen)
        states: dict[str, int] = {}
        whole = _Work()
        for member in members:
            states[member.state] = states.get(member.state, 0) + 1
            if (own := work.get((pool.name, member.id))) is not None:
                whole.rps += own.rps
                whole.errors_ps += own.errors_ps
                whole.in_flight += own.in_flight
        picture = {
            "name": pool.name,
            "policy": pool.load_balancing.policy,
            "panic": described["is_panicking"],
            "states": states,
            "ejections": sum(sum(each.ejections.values()) for each in members),
            "retries_ps": round(traffic.retries.get((pool.name,), 0.0), 2) if traffic.is_known else None,
            **whole.shown(is_known=traffic.is_known),
            "backends": [_backend(pool.name, each, work, traffic) for each in chosen],
            "more": len(members) - len(chosen),
        }
        if warning := pool_warning(pool.name, _flat(members)):
            picture["warning"] = warning
        shown.append(picture)
    return shown, max(0, len(pools) - MAX_POOLS)


async def _work(traffic: Traffic, counts: Merged, pace: Pace) -> dict[Labels, _Work]:
    work: dict[Labels, _Work] = {}
    for labels, rate in traffic.requests.items():
        if pace.is_due():
            await pace.rest()
        own = work.setdefault(labels[:2], _Work())
        own.rps += rate
        if labels[2] in ("5xx", "none"):
            own.errors_ps += rate
    for labels, value in counts["backend_inflight"].items():
        if pace.is_due():
            await pace.rest()
        if not isinstance(value, list) and value:
            work.setdefault(labels, _Work()).in_flight = int(value)
    return work


def _backend(
    pool: str, member: BackendHealth, work: Mapping[Labels, _Work], traffic: Traffic
) -> dict[str, Any]:
    described = member.describe()
    return {
        **{
            key: described[key]
            for key in ("id", "address", "weight", "state", "since", "cause", "last_probe")
        },
        "ejections": sum(member.ejections.values()),
        "slow_start": described["is_in_slow_start"],
        **work.get((pool, member.id), _Work()).shown(is_known=traffic.is_known),
    }


def _flat(members: Collection[BackendHealth]) -> list[dict[str, Any]]:
    """As much of the backends as a pool's warning is made of."""
    return [{"weight": each.weight, "state": each.state} for each in members]
