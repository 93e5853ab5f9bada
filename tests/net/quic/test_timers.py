"""One heap for all connections' moments."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from expressgateway.net.quic.timers import NEVER, Timers
from tests.net.loopback import World, run


class Timed:
    def __init__(self, name: str, calls: list[str], act: Callable[[], None] | None = None) -> None:
        self.name = name
        self.due = NEVER
        self._calls = calls
        self._act = act
        self.resets = 0

    def on_timer(self, now: float) -> None:
        self._calls.append(self.name)
        if self._act is not None:
            self._act()

    def reset(self) -> None:
        self.resets += 1


class Scene:
    """Timers whose clock the test turns: what is due is fired by hand."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.timers = Timers(world.reactor)
        self.calls: list[str] = []
        self.start = time.monotonic() + 1000

    def timed(self, name: str, act: Callable[[], None] | None = None) -> Timed:
        return Timed(name, self.calls, act)

    def at(self, seconds: float) -> float:
        return self.start + seconds

    def fire(self, seconds: float) -> list[str]:
        self.calls.clear()
        clock = time.monotonic
        try:
            time.monotonic = lambda: self.at(seconds)
            self.timers._fire()
        finally:
            time.monotonic = clock
        return list(self.calls)


def scene(test: Callable[[Scene], Coroutine[Any, Any, None]], *, faults: int = 0) -> None:
    async def main(world: World) -> None:
        one = Scene(world)
        try:
            await test(one)
        finally:
            one.timers.close()

    run(main, faults=faults)


def test_in_order() -> None:
    async def test(one: Scene) -> None:
        for name, at in (("c", 3), ("a", 1), ("b", 2), ("d", 4)):
            one.timers.schedule(one.timed(name), one.at(at))
        assert one.fire(3) == ["a", "b", "c"]
        assert one.fire(10) == ["d"]

    scene(test)


def test_of_one_moment_in_the_order_of_asking() -> None:
    async def test(one: Scene) -> None:
        for name in "abc":
            one.timers.schedule(one.timed(name), one.at(1))
        assert one.fire(1) == ["a", "b", "c"]

    scene(test)


def test_an_earlier_moment_overtakes_a_later_one() -> None:
    async def test(one: Scene) -> None:
        timed = one.timed("x")
        one.timers.schedule(timed, one.at(5))
        one.timers.schedule(timed, one.at(2))
        assert timed.due == one.at(2)
        assert one.fire(2) == ["x"]
        assert timed.due == NEVER
        # the stale entry is passed over
        assert one.fire(10) == []
        assert one.timers._heap == []

    scene(test)


def test_a_later_moment_changes_nothing() -> None:
    async def test(one: Scene) -> None:
        timed = one.timed("x")
        one.timers.schedule(timed, one.at(2))
        for _ in range(1000):
            one.timers.schedule(timed, one.at(5))
        assert len(one.timers._heap) == 1
        assert one.fire(2) == ["x"]

    scene(test)


def test_a_stale_entry_at_the_moment_of_a_new_one_calls_once() -> None:
    async def test(one: Scene) -> None:
        timed = one.timed("x")
        one.timers.schedule(timed, one.at(5))
        one.timers.schedule(timed, one.at(2))
        assert one.fire(2) == ["x"]
        one.timers.schedule(timed, one.at(5))
        assert one.fire(5) == ["x"]
        assert one.fire(6) == []

    scene(test)


def test_who_raises_does_not_stop_the_others() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    async def test(one: Scene) -> None:
        bad = one.timed("bad", fail)
        one.timers.schedule(one.timed("a"), one.at(1))
        one.timers.schedule(bad, one.at(2))
        one.timers.schedule(one.timed("b"), one.at(3))
        one.timers.schedule(one.timed("c"), one.at(9))
        assert one.fire(3) == ["a", "bad", "b"]
        assert bad.resets == 1
        assert one.fire(9) == ["c"]

    scene(test, faults=1)


def test_who_asks_again_while_it_is_called() -> None:
    async def test(one: Scene) -> None:
        timed: list[Timed] = []

        def again() -> None:
            if moments:
                one.timers.schedule(timed[0], one.at(moments.pop()))

        moments = [7.0]

        timed.append(one.timed("x", again))
        one.timers.schedule(timed[0], one.at(1))
        assert one.fire(2) == ["x"]
        assert timed[0].due == one.at(7)
        assert one.fire(6) == []
        assert one.fire(7) == ["x"]

    scene(test)


def test_the_loop_does_not_call_again_and_again_before_the_moment() -> None:
    async def test(one: Scene) -> None:
        fires = 0
        fire = Timers._fire

        class Counting(Timers):
            def _fire(self) -> None:
                nonlocal fires
                fires += 1
                fire(self)

        timers = Counting(one.world.reactor)
        for n in range(100):
            fired = asyncio.Event()
            timers.schedule(one.timed("x", fired.set), time.monotonic() + 0.001 + n * 0.000013)
            async with asyncio.timeout(30):
                await fired.wait()
        timers.close()
        assert fires < 150

    scene(test)


def test_the_loop_calls() -> None:
    async def test(one: Scene) -> None:
        now = time.monotonic()
        fired = asyncio.Event()
        one.timers.schedule(one.timed("late"), now + 3600)
        one.timers.schedule(one.timed("x", fired.set), now + 0.02)
        one.timers.schedule(one.timed("past"), now - 1)
        async with asyncio.timeout(30):
            await fired.wait()
        assert one.calls == ["past", "x"]
        assert time.monotonic() >= now + 0.02

    scene(test)


def test_what_is_over_is_not_called_and_not_kept() -> None:
    async def test(scene: Scene) -> None:
        everyone = [scene.timed(str(number)) for number in range(100)]
        for number, timed in enumerate(everyone):
            for later in (300, 200, 0):
                scene.timers.schedule(timed, scene.at(number + later))
        for number, timed in enumerate(everyone[:90]):
            scene.timers.cancel(timed)
            scene.timers.cancel(timed)
            over = number + 1
            assert len(scene.timers._heap) <= 2 * (100 - over) + 1
        assert scene.fire(200) == [str(number) for number in range(90, 100)]
        scene.timers.schedule(everyone[0], scene.at(201))
        scene.timers.cancel(everyone[0])
        assert scene.timers._heap == []

    scene(test)


def test_one_that_is_over_by_its_own_moment_leaves_no_overtaken_entries() -> None:
    async def test(scene: Scene) -> None:
        timed = scene.timed("it", lambda: scene.timers.cancel(timed))
        for at in (30, 20, 1):
            scene.timers.schedule(timed, scene.at(at))
        assert scene.fire(2) == ["it"]
        assert scene.timers._heap == []

    scene(test)


def test_one_that_is_over_when_it_is_called() -> None:
    async def test(scene: Scene) -> None:
        later = scene.timed("later")
        first = scene.timed("first", lambda: scene.timers.cancel(later))
        last = scene.timed("last")
        for at, timed in enumerate((first, later, last)):
            scene.timers.schedule(timed, scene.at(at))
        assert scene.fire(10) == ["first", "last"]

    scene(test)
