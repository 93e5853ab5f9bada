"""The board: from configuration, probes and reports to messages, log lines and numbers."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expressgateway.config.pools import Health, Outlier
from expressgateway.control.channel import Message
from expressgateway.control.health import HealthBoard, PoolTargets, health_settings, outlier_settings
from expressgateway.observe.counters import Sample
from expressgateway.upstream.discovery import Found
from expressgateway.upstream.health_backend import HealthSettings, OutlierSettings
from tests.control.test_probes import backend, hang, serving
from tests.control.test_probes import wanted as probed_by

JUDGED = OutlierSettings(
    consecutive_failures=5,
    failure_percent=0,
    window_s=10,
    ejection_s=30,
    max_ejection_s=300,
    max_ejection_percent=50,
    panic_threshold_percent=50,
)
EMPTY = {"panic": False, "down": [], "draining": [], "ramps": {}}


def found(*ids: str, address: tuple[str, int] = ("127.0.0.1", 1), **more: Any) -> list[Found]:
    return [(backend(id=id_, **more), address, id_) for id_ in ids]


def targets(
    *ids: str,
    health: HealthSettings | None = None,
    outlier: OutlierSettings | None = JUDGED,
    slow_start_s: float = 0,
    **more: Any,
) -> PoolTargets:
    return PoolTargets(health, outlier, slow_start_s, found(*ids, **more))


class World:
    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.late_s = 0.0
        """How far the board's clock is moved ahead of the loop's."""
        self.board = HealthBoard(self.messages.append, clock=self.clock, wall=lambda: 1_700_000_000.0)

    def clock(self) -> float:
        return asyncio.get_running_loop().time() + self.late_s

    def fails(self, id_: str, times: int = 5, pool: str = "web") -> None:
        self.board.outcomes(
            {"type": "outcomes", "pools": {pool: {id_: [0, times, times, "connection refused"]}}}
        )

    async def turn(self) -> list[Message]:
        """What was said by the end of this turn of the loop."""
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        said, self.messages[:] = list(self.messages), []
        return said

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not done():  # noqa: ASYNC110 - what is waited for is made of many probes
                await asyncio.sleep(0.002)

    def state(self, id_: str, pool: str = "web") -> str:
        return next(str(row["state"]) for row in self.board.describe(pool) if row["id"] == id_)


def play(talk: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        world = World()
        try:
            await talk(world)
        finally:
            world.board.close()
            await world.until(lambda: world.board.schedule.running == 0)

    asyncio.run(main())


class TestSettings:
    def test_of_the_configuration(self) -> None:
        health = health_settings(Health(type="http", expect_body="ök", expect_status=(200, 204)))
        assert health == HealthSettings(
            type="http",
            path="/",
            host=None,
            expect_status=frozenset({200, 204}),
            expect_body="ök".encode(),
            interval_s=5,
            timeout_s=2,
            rise=3,
            fall=2,
            jitter=0.2,
        )
        assert outlier_settings(Outlier()) == JUDGED
        assert health_settings(None) is None
        assert outlier_settings(None) is None


class TestMessages:
    def test_nothing_to_say_at_first(self) -> None:
        async def talk(world: World) -> None:
            world.board.adopt({"web": targets("a", "b")})
            assert await world.turn() == []
            assert world.board.message() == {"type": "health", "pools": {"web": EMPTY}}
            assert world.board.message(["web", "nobody"])["pools"] == {"web": EMPTY}
            assert world.board.message([]) == {"type": "health", "pools": {}}

        play(talk)

    def test_all_of_one_turn_in_one(self) -> None:
        async def talk(world: World) -> None:
            world.board.adopt({"web": targets("a", "b", "c", "d"), "api": targets("a", "b")})
            world.fails("a")
            world.fails("b")
            world.fails("b", pool="api")
            assert world.messages == []
            (message,) = await world.turn()
            assert message == {
                "type": "health",
                "pools": {"web": {**EMPTY, "down": ["a", "b"]}, "api": {**EMPTY, "down": ["b"]}},
            }
            world.board.set_state("api", "a", "draining", "by hand")
            (message,) = await world.turn()
            assert list(message["pools"]) == ["api"]

        play(talk)

    def test_not_for_what_changes_nothing(self) -> None:
        async def talk(world: World) -> None:
            world.board.adopt({"web": targets("a", "b")})
            world.board.set_state("web", "a", "disabled", "x")
            world.board.set_state("web", "a", "ready", "x")
            world.board.outcomes({"pools": {"web": {"a": [5, 0, 0, ""]}}})
            assert await world.turn() == []

        play(talk)

    def test_ejections_end_without_anybody_asking(self) -> None:
        async def talk(world: World) -> None:
            world.board.adopt({"web": targets("a", "b")})
            world.fails("a")
            assert len(await world.turn()) == 1
            timer = world.board._timer
            assert timer is not None
            assert timer.when() - asyncio.get_running_loop().time() == pytest.approx(30, abs=1)
            world.late_s = 31
            world.board.tick()
            (message,) = await world.turn()
            assert message["pools"] == {"web": EMPTY}
            assert world.board._timer is None

        play(talk)

    def test_the_timer_itself(self) -> None:
        async def talk(world: World) -> None:
            short = OutlierSettings(5, 0, 10, 0.03, 0.03, 50, 0)
            world.board.adopt({"web": targets("a", "b", outlier=short)})
            world.fails("a")
            await world.until(lambda: len(world.messages) == 2)
            assert world.messages[1]["pools"] == {"web": EMPTY}

        play(talk)

    def test_slow_start_of_who_joins(self) -> None:
        async def talk(world: World) -> None:
            world.board.adopt({"web": targets("a", slow_start_s=60)})
            world.board.adopt({"web": targets("a", "b", slow_start_s=60)})
            (message,) = await world.turn()
            since = message["pools"]["web"]["ramps"]["b"]
            assert since == pytest.approx(world.clock(), abs=1)
            world.board.adopt({"web": targets("b", "a", slow_start_s=60)})
            assert await world.turn() == []

        play(talk)


class TestAdopt:
    def test_state_survives_and_who_is_gone_is_forgotten(self) -> None:
        async def talk(world: World) -> None:
            world.board.adopt({"web": targets("a", "b"), "api": targets("a", "b")})
            world.fails("a")
            world.fails("a", pool="api")
            await world.turn()
            world.board.adopt({"web": targets("b", "a", weight=3)})
            assert world.state("a") == "ejected"
            assert await world.turn() == []
            world.board.adopt({"web": targets("a", "b"), "api": targets("a", "b")})
            assert world.state("a", "api") == "unknown"
            assert world.board.message()["pools"]["api"] == EMPTY
            world.board.adopt({})
            await world.turn()
            assert world.board._dues == {}
            assert world.board._timer is None
            assert list(world.board.samples()) == []

        play(talk)

    def test_probes_follow(self) -> None:
        async def talk(world: World) -> None:
            async with serving(hang) as address:
                health = probed_by("tcp", interval_s=1000)
                world.board.adopt({"web": targets("a", "b", health=health, address=address)})
                await world.until(lambda: {world.state("a"), world.state("b")} == {"healthy"})
                before = dict(world.board.schedule._turns)
                # A reload that leaves them as they are restarts nothing, a weight included.
                world.board.adopt({"web": targets("a", "b", health=health, address=address, weight=9)})
                assert world.board.schedule._turns == before
                # What is another endpoint is probed anew; what has gone is left alone.
                world.board.adopt({"web": targets("a", health=health, address=("127.0.0.1", 1))})
                assert world.state("a") == "unknown"
                assert set(world.board.schedule._turns) == {("web", "a")}
                await world.until(lambda: world.board.describe("web")[0]["last_probe"] is not None)
                world.board.adopt({"web": targets("a", address=address)})
                assert world.board.schedule._turns == {}

        play(talk)

    def test_a_backend_that_cannot_be_probed_is_used(self, caplog: pytest.LogCaptureFixture) -> None:
        async def talk(world: World) -> None:
            world.board.adopt({"web": targets("a", health=probed_by("http"), protocol="udp")})
            assert await world.turn() == []
            assert world.state("a") == "unknown"

        play(talk)
        assert "backend web/a is not probed: there is no http probe" in caplog.text


class TestProbed:
    def test_dead_alive_and_back(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)

        async def talk(world: World) -> None:
            health = probed_by("tcp", interval_s=0.01, rise=2)
            async with serving(hang) as alive, serving(hang) as other:
                rows = [*found("a", address=alive), *found("b", address=other)]
                world.board.adopt({"web": PoolTargets(health, None, 60, rows)})
                await world.until(lambda: {world.state("a"), world.state("b")} == {"healthy"})
                assert world.messages == []
            # Both are gone now: the pool is of no use, and panics.
            await world.until(lambda: {world.state("a"), world.state("b")} == {"unhealthy"})
            await world.until(lambda: bool(world.messages) and world.messages[-1]["pools"]["web"]["panic"])
            async with serving(hang, at=alive):
                await world.until(lambda: world.state("a") == "healthy")
                told = world.board.message()["pools"]["web"]
                assert (told["panic"], told["down"], list(told["ramps"])) == (False, ["b"], ["a"])

        play(talk)
        lines = [record for record in caplog.records if record.name.endswith("control.health")]
        of_a = [record for record in lines if "web/a" in record.getMessage()]
        assert [record.levelname for record in of_a[:3]] == ["INFO", "WARNING", "INFO"]
        assert of_a[1].getMessage() == (
            "backend web/a becomes unhealthy: 2 probes failed in a row, the last one: connection refused"
        )
        fields = of_a[1].fields  # type: ignore[attr-defined]  # ours, see observe.logs
        assert fields == {
            "pool": "web",
            "backend": "a",
            "state": "unhealthy",
            "cause": "2 probes failed in a row, the last one: connection refused",
        }
        panics = [record.getMessage() for record in lines if "pool web" in record.getMessage()]
        assert panics == [
            "pool web panics and uses all its backends: 0 of 2 backends in service are fit, "
            "less than 50 percent",
            "pool web no longer panics: 1 of 2 backends in service are fit",
        ]


class TestReports:
    def test_of_who_is_not_there(self) -> None:
        async def talk(world: World) -> None:
            world.board.adopt({"web": targets("a", "b")})
            world.fails("nobody")
            world.fails("a", pool="nowhere")
            assert await world.turn() == []

        play(talk)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["pools", "web", "a"]), inner),
            max_leaves=20,
        )
    )
    def test_nonsense_changes_nothing(self, message: object) -> None:
        async def main() -> None:
            world = World()
            world.board.adopt({"web": targets("a", "b")})
            world.board.outcomes(message)
            world.board.close()

        asyncio.run(main())

    @pytest.mark.parametrize(
        "row",
        [
            None,
            {},
            [],
            [0, 9, 9],
            [0, -9, 9, ""],
            [0, 9.5, 9, ""],
            [0, 9, 9, 9],
            [0, 10**30, 9, ""],
        ],
    )
    def test_a_bad_row_spoils_no_other(self, row: object) -> None:
        async def talk(world: World) -> None:
            world.board.adopt({"web": targets("a", "b")})
            world.board.outcomes({"pools": {"api": 3, "web": {"a": row, "b": [0, 5, 5, "x"]}}})
            (message,) = await world.turn()
            assert message["pools"]["web"]["down"] == ["b"]

        play(talk)

    def test_a_cause_is_made_fit_for_a_line(self) -> None:
        async def talk(world: World) -> None:
            world.board.adopt({"web": targets("a", "b")})
            world.board.outcomes({"pools": {"web": {"a": [0, 5, 5, "x\n" + "y" * 10_000]}}})
            cause = world.board.describe("web")[0]["cause"]
            assert "x?y" in cause
            assert len(cause) < 300

        play(talk)


class TestAsked:
    def test_errors(self) -> None:
        async def talk(world: World) -> None:
            world.board.adopt({"web": targets("a")})
            for ask in (world.board.describe, world.board.describe_pool):
                with pytest.raises(LookupError, match="there is no pool nowhere"):
                    ask("nowhere")
            with pytest.raises(LookupError, match="the pool web has no backend b"):
                world.board.set_state("web", "b", "ready", "x")
            with pytest.raises(ValueError, match="expected one of"):
                world.board.set_state("web", "a", "dead", "x")

        play(talk)

    def test_described(self) -> None:
        async def talk(world: World) -> None:
            world.board.adopt({"web": targets("a", "b")})
            world.board.set_state("web", "a", "draining", "drained by an operator")
            row, _ = world.board.describe("web")
            assert row == {
                "id": "a",
                "address": "127.0.0.1:1",
                "weight": 1,
                "state": "draining",
                "since": 1_700_000_000.0,
                "cause": "drained by an operator",
                "last_probe": None,
                "ejections": {"consecutive_failures": 0, "failure_percent": 0},
                "is_in_slow_start": False,
            }
            assert world.board.describe_pool("web") == {
                "is_panicking": False,
                "panic_since": None,
                "backends": 2,
                "in_service": 1,
                "fit": 1,
            }

        play(talk)

    def test_counted(self) -> None:
        async def talk(world: World) -> None:
            world.board.adopt({"web": targets("a", "b")})
            world.fails("a")
            samples: list[Sample] = list(world.board.samples())
            assert ("pool_panic", ("web",), 0) in samples
            assert ("backend_up", ("web", "a"), 0) in samples
            assert ("backend_up", ("web", "b"), 1) in samples
            assert ("backend_state", ("web", "a", "ejected"), 1) in samples
            assert ("backend_state", ("web", "a", "unknown"), 0) in samples
            assert ("backend_ejections", ("web", "a", "consecutive_failures"), 1) in samples
            assert ("health_probes", ("web", "a", "failure"), 0) in samples
            assert len(samples) == len({(name, labels) for name, labels, _ in samples})

        play(talk)
