"""The bench of routes: every kind of request takes the way its name says, and a small run gives numbers."""

import pytest
from bench.routes import entries, measure, requests

from expressgateway.proxy.paths import normalise
from expressgateway.proxy.routing import RouteTable

WAYS = {
    "host": 0,
    "wildcard": 3,
    "exact path": 4,
    "prefix": 5,
    "header": 7,
    "query": 9,
    "miss": None,
    "miss, any host": None,
}


@pytest.mark.parametrize("size", [10, 100, 1000])
def test_each_kind_of_request_takes_its_way(size: int) -> None:
    made = entries(size)
    assert len(made) == size
    table = RouteTable(made)
    for kind, heads in requests(size).items():
        found = [table.find(head, normalise(head.path)) for head in heads]
        assert {route % 10 if route is not None else None for route in found} == {WAYS[kind]}
        if WAYS[kind] is not None:
            assert len(set(found)) == min(100, size // 10)


def test_a_small_run() -> None:
    found = measure((10, 20), rounds=1, number=1)
    assert found.keys() == WAYS.keys()
    assert all(len(times) == 2 and min(times) > 0 for times in found.values())
