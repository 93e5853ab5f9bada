"""Scrapes: sharing, slices, and what one that is given up leaves to the others."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from expressgateway.control.admin import scrapes as module
from expressgateway.control.admin.scrapes import Scrapes
from expressgateway.control.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

    from expressgateway.observe.counters import Sample

OPEN = "application/openmetrics-text"


class World:
    def __init__(self, names: int = 1) -> None:
        self.collected = 0
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.names = names
        self.scrapes = Scrapes(Ledger(), self.collect, self.own)

    async def collect(self) -> None:
        self.collected += 1
        await self.may_go_on.wait()

    def own(self) -> Iterator[Sample]:
        for number in range(self.names):
            yield "dns_addresses", (f"name-{number}",), self.collected

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


def run(test: Callable[[], Any]) -> None:
    asyncio.run(test())


def test_each_scrape_is_fresh() -> None:
    async def test() -> None:
        world = World()
        for number in (1, 2):
            body, content_type = await world.scrapes.answer("")
            assert f'dns_addresses{{name="name-0"}} {number}.0\n'.encode() in body
            assert content_type.startswith("text/plain")

    run(test)


def test_scrapes_at_the_same_time_are_one() -> None:
    async def test() -> None:
        world = World()
        world.may_go_on.clear()
        asked = [asyncio.ensure_future(world.scrapes.answer("")) for _ in range(3)]
        await world.settle()
        other = asyncio.ensure_future(world.scrapes.answer(OPEN))
        await world.settle()
        world.may_go_on.set()
        bodies = {(await each)[0] for each in asked}
        assert len(bodies) == 1
        assert (await other)[0].endswith(b"# EOF\n")
        assert world.collected == 2  # one for each format

    run(test)


def test_who_gives_up_leaves_the_others_alone() -> None:
    async def test() -> None:
        world = World()
        world.may_go_on.clear()
        leaving, staying = (asyncio.ensure_future(world.scrapes.answer("")) for _ in range(2))
        await world.settle()
        leaving.cancel()
        await world.settle()
        world.may_go_on.set()
        assert b"dns_addresses" in (await staying)[0]
        assert world.collected == 1

    run(test)


def test_a_scrape_leaves_turns_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE_S", 0.0)

    async def test() -> None:
        world = World(names=1000)
        turns = 0
        asked = asyncio.ensure_future(world.scrapes.answer(""))
        while not asked.done():
            await asyncio.sleep(0)
            turns += 1
        assert turns > 40
        assert (await asked)[0].count(b"\n") == 1002

    run(test)


def test_names_that_are_no_more_are_not_told() -> None:
    async def test() -> None:
        world = World(names=3)
        assert (await world.scrapes.answer(""))[0].count(b"\n") == 5
        world.names = 1
        assert (await world.scrapes.answer(""))[0].count(b"\n") == 3

    run(test)
