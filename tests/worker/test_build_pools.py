"""Pools compiled from their models: what has to come from more than one table."""

import pytest

from expressgateway.config.schema import Config
from expressgateway.worker.build_pools import compile_pools


@pytest.mark.parametrize(
    ("pool", "route", "budget"),
    [
        ({}, {}, None),
        ({"retry": {"budget_percent": 5}}, {}, 5),
        ({}, {"retry": {"on": ["5xx"]}}, 20),
        ({"retry": {"budget_percent": 5}}, {"retry": {"on": ["5xx"]}}, 5),
    ],
)
def test_a_routes_retries_are_paid_for_by_the_pool(
    pool: dict[str, object], route: dict[str, object], budget: int | None
) -> None:
    config = Config.model_validate(
        {
            "listeners": [
                {"address": "127.0.0.1:8080", "protocol": "h1", "routes": [{"pool": "app"} | route]},
            ],
            "pools": [{"name": "app", "backends": [{"address": "127.0.0.1:3000"}]} | pool],
        }
    )
    assert compile_pools(config, {}, {})["app"].settings.budget_percent == budget
