"""The account of reloads, and the queue of run-time changes."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from expressgateway.control.changes import Change, ChangeError, SetWeight
from expressgateway.control.reload import (
    APPLIED,
    FAILED,
    MAX_WAITING,
    UNCHANGED,
    FromFile,
    Outcome,
    Queue,
    Reloads,
    Wish,
    aside,
)


def test_only_applied_ones_make_a_version() -> None:
    times = iter([100.0, 200.0])
    reloads = Reloads(wall=lambda: next(times))
    assert (reloads.version, reloads.applied_at, reloads.is_due) == (1, 100.0, False)
    for result, version, at in ((UNCHANGED, 1, 100.0), (FAILED, 1, 100.0), (APPLIED, 2, 200.0)):
        reloads.requested += 1
        assert reloads.is_due
        reloads.finish(reloads.requested, Outcome(result))
        assert (reloads.version, reloads.applied_at, reloads.is_due) == (version, at, False)
    assert reloads.counts[APPLIED] == reloads.counts[FAILED] == reloads.counts[UNCHANGED] == 1


def test_one_asked_for_meanwhile_is_still_due() -> None:
    reloads = Reloads()
    reloads.requested = 1
    reloads.requested = 2
    reloads.finish(1, Outcome(FAILED, ("why",)))
    assert reloads.is_due
    assert reloads.status() == {
        "requested": 2,
        "finished": 1,
        "last_result": "failed",
        "last_report": ["why"],
    }


def test_success() -> None:
    assert Outcome(APPLIED).is_success
    assert Outcome(UNCHANGED).is_success
    assert not Outcome(FAILED).is_success


def test_changes_make_versions_and_are_no_reloads() -> None:
    times = iter([100.0, 200.0])
    reloads = Reloads(wall=lambda: next(times))
    assert reloads.finish_change(Outcome(APPLIED, ("so",))) == Outcome(APPLIED, ("so",), 2)
    assert reloads.finish_change(Outcome(FAILED)) == Outcome(FAILED, (), 2)
    assert (reloads.version, reloads.applied_at, reloads.last) == (2, 200.0, None)
    assert (reloads.changes[APPLIED], reloads.changes[FAILED], sum(reloads.counts.values())) == (1, 1, 0)


def change(number: int = 1) -> Change:
    return SetWeight("web", "b1", number)


class Maker:
    """Makes changes when it is let."""

    def __init__(self) -> None:
        self.made: list[Wish] = []
        self.may = asyncio.Event()
        self.began = asyncio.Event()

    async def make(self, change: Wish) -> Outcome:
        self.began.set()
        await self.may.wait()
        self.made.append(change)
        return Outcome(APPLIED, version=len(self.made))


def run(test: Callable[[Queue, Maker], Awaitable[None]], patience_s: float = 10.0) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await test(Queue(lambda: None, patience_s), Maker())

    asyncio.run(main())


async def asked(queue: Queue, *changes: Change) -> list[asyncio.Task[Outcome]]:
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(queue.ask(each)) for each in changes]
    await asyncio.sleep(0)
    return tasks


class TestQueue:
    def test_one_after_the_other_in_order(self) -> None:
        async def test(queue: Queue, maker: Maker) -> None:
            tasks = await asked(queue, change(1), change(2), change(3))
            maker.may.set()
            while queue.is_due:
                await queue.make_next(maker.make)
            assert [task.version for task in await asyncio.gather(*tasks)] == [1, 2, 3]
            assert maker.made == [change(1), change(2), change(3)]
            await queue.make_next(maker.make)
            assert len(maker.made) == 3

        run(test)

    def test_wakes(self) -> None:
        async def main() -> None:
            woken = asyncio.Event()
            queue = Queue(woken.set)
            (task,) = await asked(queue, change())
            assert woken.is_set()
            queue.close("over")
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(main())

    def test_refusal_and_defect_reach_the_asker(self) -> None:
        async def test(queue: Queue, _: Maker) -> None:
            async def refuse(_: Wish) -> Outcome:
                raise ChangeError(409, "it is there")

            async def fail(_: Wish) -> Outcome:
                raise RuntimeError("a defect")

            one, two = await asked(queue, change(1), change(2))
            await queue.make_next(refuse)
            with pytest.raises(RuntimeError):
                await queue.make_next(fail)
            with pytest.raises(ChangeError, match="it is there"):
                await one
            with pytest.raises(ChangeError) as caught:
                await two
            assert caught.value.status == 503

        run(test)

    def test_what_it_was_based_on_is_asked_when_its_turn_comes(self) -> None:
        async def test(queue: Queue, maker: Maker) -> None:
            def stale() -> None:
                raise ChangeError(412, "it has been changed since" if maker.made else "too early")

            loop = asyncio.get_running_loop()
            (one,) = await asked(queue, change(1))
            two = loop.create_task(queue.ask(change(2), stale))
            reload = loop.create_task(queue.ask(FromFile()))
            await asyncio.sleep(0)
            maker.may.set()
            while queue.is_due:
                await queue.make_next(maker.make)
            await one
            with pytest.raises(ChangeError, match="changed since"):
                await two
            await reload
            assert [str(each) for each in maker.made] == [str(change(1)), "a reload"]

        run(test)

    def test_too_many(self) -> None:
        async def test(queue: Queue, maker: Maker) -> None:
            tasks = await asked(queue, *map(change, range(MAX_WAITING)))
            with pytest.raises(ChangeError, match="wait already") as caught:
                await queue.ask(change())
            assert caught.value.status == 503
            queue.close("the gateway is stopping")
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert str(result) == "the gateway is stopping"
            with pytest.raises(ChangeError, match="is stopping"):
                await queue.ask(change())

        run(test)

    def test_not_begun_in_time_is_never_made(self) -> None:
        async def test(queue: Queue, maker: Maker) -> None:
            with pytest.raises(ChangeError, match="was not made") as caught:
                await queue.ask(change())
            assert caught.value.status == 503
            assert not queue.is_due

        run(test, patience_s=0.01)

    def test_not_ended_in_time_may_yet_be_made(self) -> None:
        async def test(queue: Queue, maker: Maker) -> None:
            (task,) = await asked(queue, change())
            making = asyncio.get_running_loop().create_task(queue.make_next(maker.make))
            with pytest.raises(ChangeError, match="may still be made") as caught:
                await task
            assert caught.value.status == 504
            maker.may.set()
            await making
            assert maker.made == [change()]

        run(test, patience_s=0.05)

    def test_asker_that_leaves(self) -> None:
        async def test(queue: Queue, maker: Maker) -> None:
            one, two = await asked(queue, change(1), change(2))
            making = asyncio.get_running_loop().create_task(queue.make_next(maker.make))
            await maker.began.wait()
            one.cancel()
            two.cancel()
            await asyncio.gather(one, two, return_exceptions=True)
            maker.may.set()
            await making
            assert maker.made == [change(1)], "what was begun is ended"
            assert not queue.is_due, "what was not begun is forgotten"

        run(test)


class TestAside:
    def test_gives_what_it_reads(self) -> None:
        assert asyncio.run(aside(lambda: 7)) == 7

    def test_raises_what_that_raises(self) -> None:
        def read() -> None:
            raise ChangeError(422, "no")

        with pytest.raises(ChangeError, match="no"):
            asyncio.run(aside(read))

    def test_what_hangs_holds_nobody_up(self) -> None:
        """Neither who waits, nor the end of the loop: `asyncio.run` waits for threads of its executor."""
        hanging = threading.Event()
        try:
            with pytest.raises(TimeoutError):
                asyncio.run(aside(hanging.wait, 0.01))
        finally:
            hanging.set()
