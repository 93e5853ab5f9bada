"""Maglev's tables for the kernel, without one: whose each slot is."""

from collections import Counter
from ipaddress import ip_address

import pytest

from expressgateway.l4.xdp.tables import LEAST_RAMP, Tables, members_of
from expressgateway.l4.xdp.wanted import WantedBackend
from expressgateway.upstream.backend import Backend, BackendSettings
from expressgateway.upstream.selection.maglev import Maglev

SIZE = 1009


def backends(*weights: int) -> list[WantedBackend]:
    return [
        WantedBackend(f"b{number}", ip_address(f"10.0.0.{number}"), 80, weight)
        for number, weight in enumerate(weights, 1)
    ]


def table(of: list[WantedBackend], *, closed: str = "", **shares: float) -> list[int]:
    """`closed`: ids of those that may have nothing; numbers are those of the names."""
    numbers = {each.id: int(each.id[1:]) for each in of if each.id not in closed.split()}
    return list(Tables().numbers(of, numbers, SIZE, shares))


def test_it_is_the_table_of_user_space() -> None:
    of = backends(1, 3, 1)
    there = [Backend(BackendSettings(e.id, "a", 1, "tcp", e.weight, None, None), ("a", 1), e.id) for e in of]
    selection = Maglev(there, SIZE)
    while not selection.advance(1000):
        pass
    ours = table(of)
    built = selection._table
    assert built is not None
    assert [f"b{number}" for number in ours] == [f"b{rank + 1}" for rank in built.owners]


def test_shares_follow_weights() -> None:
    counts = Counter(table(backends(1, 2, 5)))
    assert counts[3] / SIZE == pytest.approx(5 / 8, abs=0.01)
    assert counts[1] / SIZE == pytest.approx(1 / 8, abs=0.01)


def test_without_weight_there_is_no_slot() -> None:
    assert set(table(backends(1, 0))) == {1}


def test_one_that_is_closed_moves_nobody_else() -> None:
    before, after = table(backends(1, 1, 1, 1)), table(backends(1, 1, 1, 1), closed="b2")
    assert 2 not in after
    assert [(a, b) for a, b in zip(before, after, strict=True) if a != 2 and a != b] == []
    spread = Counter(b for a, b in zip(before, after, strict=True) if a == 2)
    assert set(spread) == {1, 3, 4}  # and not all to one neighbour


def test_nobody_at_all_is_an_empty_table() -> None:
    assert set(table(backends(1, 1), closed="b1 b2")) == {0}
    assert set(table(backends())) == {0}
    assert set(table(backends(0))) == {0}


def test_slow_start_only_ever_gains() -> None:
    of = backends(1, 1, 1)
    whole = {slot for slot, number in enumerate(table(of)) if number == 3}
    had: set[int] = set()
    for share in (0.0, 0.2, 0.5, 0.8, 0.99):
        has = {slot for slot, number in enumerate(table(of, b3=share)) if number == 3}
        assert had <= has <= whole
        assert len(has) / len(whole) == pytest.approx(max(share, LEAST_RAMP), abs=0.08)
        had = has
    assert table(of, b3=1.0) == table(of)


def test_where_all_are_in_slow_start_none_is() -> None:
    of = backends(1, 1)
    assert table(of, b1=0.1, b2=0.1) == table(of)
    assert table(backends(1, 1, 1), closed="b3", b1=0.1, b2=0.1) == table(backends(1, 1, 1), closed="b3")


def test_tables_are_remembered_by_what_they_were_made_of() -> None:
    tables = Tables()
    members = members_of(backends(1, 1))
    assert tables.ranks(members, SIZE) is tables.ranks(members, SIZE)
    assert tables.ranks(members, 11) is not tables.ranks(members, SIZE)


def test_a_table_that_nobody_asks_for_any_more_is_forgotten() -> None:
    tables = Tables()
    members = members_of(backends(1, 1))
    first = tables.ranks(members, SIZE)
    tables.forget_others()
    assert tables.ranks(members, SIZE) is first
    tables.forget_others()
    tables.forget_others()
    assert tables.ranks(members, SIZE) is not first


def test_whoever_waits_has_a_turn_while_one_is_built() -> None:
    rests: list[int] = []
    tables = Tables(lambda: rests.append(1))
    tables.ranks(members_of(backends(*[1] * 100)), 65537)
    assert len(rests) > 20
