"""What tests of attempts, limits and routes have in common: a world that tries again, and its requests."""

from typing import Any

import pytest

from expressgateway.proxy.route import RetryPolicy, Timeouts
from expressgateway.upstream.pool import PoolSettings
from tests.proxy.ends import BackSide, ClientEnd, Work
from tests.proxy.world import CELLS, TIMEOUTS, PoolUse, World

Cell = tuple[str, str]
cells = pytest.mark.parametrize("cell", CELLS, ids=["-".join(cell) for cell in CELLS])

SERVER_ERRORS = frozenset(range(500, 600))


def trying(
    cell: Cell = ("h1", "h1"),
    backends: int = 3,
    *,
    budget: int | None = None,
    timeouts: Timeouts = TIMEOUTS,
    counts_5xx: bool = False,
    alarm: int = 0,
    **policy: Any,
) -> World:
    settings = PoolSettings(budget_percent=budget, counts_5xx=counts_5xx, alarm_streak=alarm)
    use = PoolUse(settings, RetryPolicy(**policy))
    return World(*cell, backends=backends, use=use, timeouts=timeouts)


def asked(world: World, method: bytes = b"GET", **what: Any) -> ClientEnd:
    client = world.client()
    client.request(method, **what)
    return client


def busy(world: World) -> tuple[BackSide, Work]:
    """The backend that has the one request that is under way, and the request."""
    side = next(side for side in world.sides if side.backend.in_flight)
    return side, side.work


def flags(world: World) -> list[str]:
    return world.exchanges[-1].flags


def seen_once(world: World) -> None:
    """No backend was asked twice."""
    assert all(len(side.works) <= 1 for side in world.sides)
