"""Names, health and secrets, tied to the configuration in force: what workers are told, and when."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from expressgateway.config.load import Loaded
from expressgateway.config.schema import Config
from expressgateway.control import upstreams as upstreams_module
from expressgateway.control.discovery import Discovery
from expressgateway.control.failures import StartError
from expressgateway.control.ledger import Ledger
from expressgateway.control.upstreams import Upstreams
from expressgateway.upstream.dns_answers import Answer, DnsCounters, DnsError, SrvAnswer
from tests.control.rounds import set_all

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path


class Names:
    """A resolver whose answers the test writes: none for a name that is not among them, and no end for
    `None`. It is asked again when the test says so."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[str, ...] | None] = {}
        self.asked: list[str] = []
        self.counters = DnsCounters()
        self._waiting: list[asyncio.Future[None]] = []

    async def resolve(self, host: str) -> Answer:
        self.asked.append(host)
        self.counters.queries += 1
        ips = self.answers.get(host, ())
        if ips is None:
            await asyncio.get_running_loop().create_future()
        if not ips:
            raise DnsError(f"{host} has no address")
        return Answer(ips, 1.0)

    async def resolve_srv(self, service: str) -> SrvAnswer:
        raise DnsError(f"{service} is not there")

    async def sleep(self, _: float) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    async def ask_again(self) -> None:
        """Let everybody who waits ask, and until they wait again or are answered."""
        due, self._waiting = self._waiting, []
        for future in due:
            if not future.done():
                future.set_result(None)
        for _ in range(5):
            await asyncio.sleep(0)

    def close(self) -> None:
        pass


class World:
    def __init__(self, names: Names) -> None:
        self.names = names
        self.told: list[dict[str, Any]] = []
        self.upstreams = Upstreams(self._tell)

    def _tell(self, messages: list[dict[str, Any]]) -> None:
        self.told += json.loads(json.dumps(messages))  # as it crosses the channel

    async def use(self, configured: Loaded) -> dict[str, Any]:
        """As the supervisor does; gives the snapshot's part."""
        await self.upstreams.prepare(configured)
        part = self.upstreams.part(configured)
        self.upstreams.adopt(configured)
        await self.settle()
        return dict(part)

    async def settle(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)

    def take(self, kind: str) -> list[dict[str, Any]]:
        """What was told since the last look, of one kind."""
        found = [each for each in self.told if each["type"] == kind]
        self.told = [each for each in self.told if each["type"] != kind]
        return found

    def ids(self, pool: str = "p") -> list[str]:
        return [each["id"] for each in self.upstreams.board.describe(pool)]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[World], Coroutine[Any, Any, None]]], None]:
    names = Names()

    def discovery(on_change: Callable[[frozenset[str]], None]) -> Discovery:
        return Discovery(on_change, names, sleep=names.sleep)  # type: ignore[arg-type]  # a fake

    monkeypatch.setattr(upstreams_module, "Discovery", discovery)
    monkeypatch.setattr(upstreams_module, "_FIRST_ANSWERS_S", 0.05)

    def run(test: Callable[[World], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            world = World(names)
            try:
                async with asyncio.timeout(30):
                    await test(world)
            finally:
                world.upstreams.close()

        asyncio.run(main())

    return run


def loaded(*backends: str, **settings: Any) -> Loaded:
    pool = {
        "name": "p",
        "backends": [{"address": address, "id": f"b{number}"} for number, address in enumerate(backends)],
        **settings,
    }
    listener = {"name": "web", "address": "127.0.0.1:8080", "protocol": "h1", "pool": "p"}
    config = Config.model_validate({"listeners": [listener], "pools": [pool]})
    return Loaded(config, __file__)  # type: ignore[arg-type]  # of no interest here


def test_a_configuration_waits_for_the_first_answers(run: Any) -> None:
    async def test(world: World) -> None:
        world.names.answers = {"a.test": ("192.0.2.1", "192.0.2.2")}
        part = await world.use(loaded("a.test:80", "b.test:80", "192.0.2.9:80"))
        assert part["answers"] == {"a.test": [["192.0.2.1", 0, 0], ["192.0.2.2", 0, 0]], "b.test": []}
        assert list(part["secrets"]) == [""]
        assert world.ids() == ["b0#192.0.2.1", "b0#192.0.2.2", "b2"]

    run(test)


def test_but_not_for_ever(run: Any) -> None:
    async def test(world: World) -> None:
        world.names.answers = {"a.test": ("192.0.2.1",), "slow.test": None}
        part = await world.use(loaded("slow.test:80", "a.test:80"))
        assert part["answers"] == {"slow.test": [], "a.test": [["192.0.2.1", 0, 0]]}
        assert world.ids() == ["b1#192.0.2.1"]

    run(test)


def test_other_answers_reach_workers_and_the_board(run: Any) -> None:
    async def test(world: World) -> None:
        world.names.answers = {"a.test": ("192.0.2.1",)}
        await world.use(loaded("a.test:80"))
        world.take("answers")
        await world.names.ask_again()
        assert world.take("answers") == []  # the same ones are not told
        world.names.answers = {"a.test": ("192.0.2.1", "192.0.2.2")}
        await world.names.ask_again()
        (told,) = world.take("answers")
        assert told["names"] == {"a.test": [["192.0.2.1", 0, 0], ["192.0.2.2", 0, 0]]}
        assert world.ids() == ["b0#192.0.2.1", "b0#192.0.2.2"]
        assert world.upstreams.standing()[0] == told

    run(test)


def test_many_answers_are_handed_on_together(run: Any) -> None:
    """Each by itself would be a walk over every backend, here and in each worker."""

    async def test(world: World) -> None:
        names = [f"n{number}.test" for number in range(50)]
        await world.use(loaded(*(f"{name}:80" for name in names)))
        world.take("answers")
        world.names.answers = dict.fromkeys(names, ("192.0.2.1",))
        await world.names.ask_again()
        (told,) = world.take("answers")
        assert all(told["names"][name] for name in names)
        assert len(world.ids()) == 50

    run(test)


def test_answers_that_change_all_the_time_wait_for_their_turn(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstreams_module, "_PAUSE_PER_COST", 1e9)

    async def test(world: World) -> None:
        await world.use(loaded("a.test:80"))
        for number in range(1, 9):
            world.names.answers = {"a.test": (f"192.0.2.{number}",)}
            await world.names.ask_again()
        assert world.ids() == ["b0#192.0.2.1"]
        assert len(world.take("answers")) == 2  # that of `use`, and the first
        # Whoever asks is told the newest: a worker that is replaced does not wait.
        assert world.upstreams.standing()[0]["names"] == {"a.test": [["192.0.2.8", 0, 0]]}

    run(test)


def test_answers_that_overtook_a_snapshot_are_told_again(run: Any) -> None:
    """It was made before they came, and workers get it after them."""

    async def test(world: World) -> None:
        world.names.answers = {"a.test": ("192.0.2.1",)}
        await world.use(loaded("a.test:80"))
        configured = loaded("a.test:80", load_balancing={"policy": "random"})
        await world.upstreams.prepare(configured)
        part = world.upstreams.part(configured)
        world.names.answers = {"a.test": ("192.0.2.2",)}
        await world.names.ask_again()
        world.take("answers")
        assert part["answers"] == {"a.test": [["192.0.2.1", 0, 0]]}
        world.upstreams.adopt(configured)
        assert world.take("answers")[-1]["names"] == {"a.test": [["192.0.2.2", 0, 0]]}

    run(test)


def test_a_configuration_that_is_not_taken_leaves_nothing(run: Any) -> None:
    async def test(world: World) -> None:
        old = loaded("a.test:80")
        await world.use(old)
        await world.upstreams.prepare(loaded("b.test:80"))
        assert set(world.upstreams._discovery.answers()) == {"a.test", "b.test"}
        world.upstreams.adopt(old)
        assert [each["name"] for each in world.upstreams.names()] == ["a.test"]
        world.names.asked.clear()
        await world.names.ask_again()
        assert world.names.asked == ["a.test"]

    run(test)


def test_what_workers_report_comes_back_as_health(run: Any) -> None:
    async def test(world: World) -> None:
        world.names.answers = {"a.test": ("192.0.2.1", "192.0.2.2")}
        await world.use(loaded("a.test:80", outlier={"consecutive_failures": 3}))
        assert world.take("health") == []
        bad = "b0#192.0.2.2"
        world.upstreams.board.outcomes({"type": "outcomes", "pools": {"p": {bad: [0, 3, 3, "reset"]}}})
        await world.settle()
        (told,) = world.take("health")
        assert told["pools"] == {"p": {"panic": False, "down": [bad], "draining": [], "ramps": {}}}
        assert world.upstreams.standing()[1] == told
        seen = {each.id: each for each in world.upstreams.seen()["p"]}
        assert (seen[bad].of, seen[bad].state) == ("b0", "ejected")
        assert "reset" in seen[bad].cause
        assert seen["b0#192.0.2.1"].state != "ejected"
        assert world.upstreams.panicking() == []

    run(test)


def test_panic_is_seen(run: Any) -> None:
    async def test(world: World) -> None:
        outlier = {"consecutive_failures": 1, "max_ejection_percent": 100}
        await world.use(loaded("192.0.2.1:80", "192.0.2.2:80", outlier=outlier))
        rows = {f"b{number}": [0, 1, 1, "reset"] for number in range(2)}
        world.upstreams.board.outcomes({"pools": {"p": rows}})
        await world.settle()
        assert world.upstreams.panicking() == ["p"]
        assert world.take("health")[-1]["pools"]["p"]["panic"] is True

    run(test)


def test_every_sample_has_a_family(run: Any) -> None:
    async def test(world: World) -> None:
        world.names.answers = {"a.test": ("127.0.0.1", "127.0.0.2")}
        health = {"type": "tcp"}
        await world.use(loaded("a.test:80", outlier={"consecutive_failures": 1}, health=health))
        world.upstreams.board.outcomes({"pools": {"p": {"b0#127.0.0.1": [0, 1, 1, "reset"]}}})
        samples = list(world.upstreams.samples())
        ledger = Ledger()
        set_all(ledger.join(), samples)
        assert sum(map(len, ledger.merged().values())) == len(samples)
        values = {(name, *labels): value for name, labels, value in samples}
        assert len(values) == len(samples)
        assert values["dns_addresses", "a.test"] == 2
        assert values["dns_queries",] == 1
        assert values["backend_up", "p", "b0#127.0.0.1"] == 0
        assert values["backend_state", "p", "b0#127.0.0.1", "ejected"] == 1
        assert {name for name, *_ in values} >= {"health_probes", "backend_ejections", "pool_panic"}

    run(test)


def test_a_secret_that_cannot_be_made_is_told(run: Any, tmp_path: Path) -> None:
    async def test(world: World) -> None:
        cookie = {"secret_path": str(tmp_path / "absent" / "secret")}
        configured = loaded("192.0.2.1:80", load_balancing={"policy": "session_affinity", "cookie": cookie})
        await world.upstreams.prepare(configured)
        with pytest.raises(StartError, match="cannot be made"):
            world.upstreams.part(configured)

    run(test)


def test_closed_means_silent(run: Any) -> None:
    async def test(world: World) -> None:
        world.names.answers = {"a.test": ("192.0.2.1",)}
        await world.use(loaded("a.test:80"))
        world.told.clear()
        world.upstreams.close()
        world.names.answers = {"a.test": ("192.0.2.2",)}
        await world.names.ask_again()
        assert world.told == []

    run(test)
