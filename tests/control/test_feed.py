"""One event for everybody who watches."""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any

import pytest

from expressgateway.control.admin.feed import Feed, event


class Counted:
    def __init__(self) -> None:
        self.rendered = 0
        self.breaks = 0

    async def render(self) -> bytes:
        self.rendered += 1
        if self.breaks:
            self.breaks -= 1
            raise RuntimeError("a defect")
        return event("state", self.rendered)


def run(work: Coroutine[Any, Any, None]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await work

    asyncio.run(main())


def made(counted: Counted, interval_s: float = 0.01, beat_s: float = 5.0) -> Feed:
    return Feed(counted.render, lambda: event("history", []), interval_s, beat_s)


def test_an_event_is_a_name_and_a_line() -> None:
    assert event("state", {"a": "x\ny"}) == b'event: state\ndata: {"a":"x\\ny"}\n\n'


def test_the_past_comes_first_and_then_one_after_the_other() -> None:
    async def main() -> None:
        feed = made(Counted())
        async with aclosing(feed.watch()) as events:
            assert [await anext(events) for _ in range(4)] == [
                event("history", []),
                *(event("state", number) for number in (1, 2, 3)),
            ]

    run(main())


def test_sixteen_watchers_cost_what_one_does() -> None:
    async def watch(feed: Feed) -> list[bytes]:
        async with aclosing(feed.watch()) as events:
            return [await anext(events) for _ in range(4)]

    async def main() -> None:
        counted = Counted()
        feed = made(counted, interval_s=0.05)
        seen = await asyncio.gather(*(watch(feed) for _ in range(16)))
        assert all(each == seen[0] for each in seen)
        assert counted.rendered == 3

    run(main())


def test_nothing_is_done_for_nobody() -> None:
    async def main() -> None:
        counted = Counted()
        feed = made(counted)
        await asyncio.sleep(0)
        assert counted.rendered == 0
        async with aclosing(feed.watch()) as events:
            await anext(events)
            assert feed.watchers == 1
            await anext(events)
        assert feed.watchers == 0
        assert len(asyncio.all_tasks()) <= 3  # ours, its guard, and the one that was just cancelled
        await asyncio.sleep(0)
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "events"]
        async with aclosing(feed.watch()) as events:  # and again from the beginning
            await anext(events)
            assert await anext(events) == event("state", counted.rendered)

    run(main())


def test_who_is_late_gets_the_newest() -> None:
    async def main() -> None:
        counted = Counted()
        feed = made(counted)
        async with aclosing(feed.watch()) as slow, aclosing(feed.watch()) as quick:
            await anext(slow)
            for _ in range(6):
                await anext(quick)
            assert await anext(slow) == event("state", counted.rendered)
            assert counted.rendered >= 5

    run(main())


def test_a_defect_costs_one_event_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        counted = Counted()
        counted.breaks = 2
        async with aclosing(made(counted).watch()) as events:
            await anext(events)
            assert await anext(events) == event("state", 3)

    run(main())
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2


def test_a_comment_keeps_a_silent_stream_alive() -> None:
    async def main() -> None:
        counted = Counted()
        counted.breaks = 10_000
        feed = made(counted, interval_s=100, beat_s=0.01)
        async with aclosing(feed.watch()) as events:
            await anext(events)
            assert await anext(events) == b": still here\n\n"

    run(main())
