"""When probes run: at once, apart, never two of one backend, and nobody behind one that hangs."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from expressgateway.control import probe_schedule as module
from expressgateway.control.probe_schedule import Key, ProbeSchedule
from expressgateway.control.probes import Probe, Result
from expressgateway.upstream.health_backend import HealthSettings
from tests.control.test_probes import wanted

OFTEN = replace(wanted("tcp"), interval_s=0.02, jitter=0.0)


class Named:
    """A probe that is only a name: what running it means is the test's business."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def run(self) -> str:
        return self.name


class World:
    """Runs probes in place of the network."""

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()
        self.starts: list[float] = []
        self.now: dict[str, int] = {}
        self.most = 0
        self.results: list[tuple[Key, Result]] = []
        self.hanging: set[str] = set()
        self.takes_s = 0.0
        self.schedule = ProbeSchedule(self.on_result, self.clock, chance=lambda: 0.5, run=self.run)

    @staticmethod
    def clock() -> float:
        return asyncio.get_running_loop().time()

    def on_result(self, key: Key, result: Result, took_s: float) -> None:
        self.results.append((key, result))

    async def run(self, probe: Probe, timeout_s: float) -> Result | None:
        assert isinstance(probe, Named)
        name = probe.name
        self.ran[name] += 1
        self.starts.append(self.clock())
        self.now[name] = self.now.get(name, 0) + 1
        assert self.now[name] == 1, "two probes of one backend"
        self.most = max(self.most, sum(self.now.values()))
        try:
            if name in self.hanging:
                await asyncio.Event().wait()
            await asyncio.sleep(self.takes_s)
        finally:
            self.now[name] -= 1
        return Result(True, name)

    def watch(self, *names: str, settings: HealthSettings = OFTEN) -> None:
        for name in names:
            self.schedule.watch(("web", name), Named(name), settings)

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not done():  # noqa: ASYNC110 - what is waited for is made of many probes
                await asyncio.sleep(0.002)


def test_at_once_and_again() -> None:
    async def main() -> None:
        world = World()
        world.watch("a", settings=replace(OFTEN, interval_s=1000))
        await world.until(lambda: len(world.results) == 1)
        world.watch("b")
        await world.until(lambda: world.ran["b"] >= 3)
        assert world.ran["a"] == 1
        world.schedule.close()

    asyncio.run(main())


def test_what_a_probe_takes_is_no_drift() -> None:
    async def main() -> None:
        world = World()
        world.takes_s = 0.03
        world.watch("a", settings=replace(OFTEN, interval_s=0.05))
        await world.until(lambda: len(world.results) == 6)
        world.schedule.close()
        # Intervals and not intervals plus probes, which would be 0.4.
        assert world.starts[5] - world.starts[0] < 0.35

    asyncio.run(main())


def test_one_that_takes_longer_than_its_interval() -> None:
    async def main() -> None:
        world = World()
        world.takes_s = 0.03
        world.watch("a", settings=replace(OFTEN, interval_s=0.001))
        await world.until(lambda: world.ran["a"] >= 3)  # never two at a time: see `run`
        world.schedule.close()

    asyncio.run(main())


def test_hanging_ones_hold_nobody_up() -> None:
    async def main() -> None:
        world = World()
        world.hanging = {"a", "b"}
        world.watch("a", "b", "c")
        await world.until(lambda: world.ran["c"] >= 5)
        assert world.ran["a"] == world.ran["b"] == 1
        world.schedule.close()

    asyncio.run(main())


def test_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(module, "MAX_PROBES", 4)
        world = World()
        world.takes_s = 0.002
        names = [str(number) for number in range(40)]
        world.watch(*names, settings=replace(OFTEN, interval_s=1000))
        await world.until(lambda: len(world.results) == 40)
        assert world.most == 4
        assert world.schedule.running == 0
        world.schedule.close()

    asyncio.run(main())


def test_a_pool_that_hangs_does_not_hold_up_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(module, "MAX_PROBES", 8)
        monkeypatch.setattr(module, "MOST_PROBES", 16)
        world = World()
        names = [str(number) for number in range(40)]
        world.hanging = set(names)
        world.watch(*names)
        for _ in range(2):  # also one whose schedule had run before
            world.schedule.watch(("other", "well"), Named("well"), OFTEN)
            await world.until(lambda: world.ran["well"] >= 5)
            world.ran["well"] = 0
        assert world.most <= 9
        for number in range(40):
            world.hanging.add(f"pool {number}")
            world.schedule.watch((f"pool {number}", "b"), Named(f"pool {number}"), OFTEN)
        await world.until(lambda: world.schedule.running >= 16)
        world.schedule.close()
        await world.until(lambda: world.schedule.running == 0)
        assert world.most <= 17  # one was begun while the well one's was
        assert not world.schedule._of_pool

    asyncio.run(main())


def test_forgotten_while_under_way_and_while_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(module, "MAX_PROBES", 1)
        monkeypatch.setattr(module, "MIN_OF_POOL", 1)
        world = World()
        world.hanging = {"a"}
        world.watch("a", "b", "c")
        await world.until(lambda: world.ran["a"] == 1)
        world.schedule.forget(("web", "b"))
        world.schedule.forget(("web", "a"))
        world.schedule.forget(("web", "a"))
        await world.until(lambda: world.ran["c"] >= 2)
        assert world.ran["b"] == 0
        assert {key for key, _ in world.results} == {("web", "c")}
        world.schedule.close()
        await world.until(lambda: world.schedule.running == 0)
        before = world.ran.total()
        await asyncio.sleep(0.05)
        assert world.ran.total() == before

    asyncio.run(main())


def test_another_probe_replaces_the_old_one() -> None:
    async def main() -> None:
        world = World()
        world.hanging = {"old"}
        world.schedule.watch(("web", "a"), Named("old"), OFTEN)
        await world.until(lambda: world.ran["old"] == 1)
        world.schedule.watch(("web", "a"), Named("new"), OFTEN)
        await world.until(lambda: world.ran["new"] >= 2)
        assert world.ran["old"] == 1
        world.schedule.close()

    asyncio.run(main())


@pytest.mark.parametrize(("chance", "first", "later"), [(0.0, 0.2, 0.9), (0.5, 0.6, 1.0), (1.0, 1.0, 1.1)])
def test_spread(chance: float, first: float, later: float) -> None:
    schedule = ProbeSchedule(lambda *_: None, lambda: 0.0, chance=lambda: chance)
    settings = replace(OFTEN, interval_s=10, jitter=0.2)
    turn = module._Turn(("web", "a"), Named("a"), settings, 0.0)
    gaps = [schedule._gap_s(turn) for _ in range(3)]
    assert gaps == pytest.approx([first * 10, later * 10, later * 10])
