"""Names are followed while they are configured: against a DNS server on loopback, on a clock of ours."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any

import pytest

from expressgateway.control.discovery import Discovery
from expressgateway.upstream.backend import BackendSettings
from expressgateway.upstream.discovery import Endpoint, expand, read_answers
from tests.upstream.name_server import Bench, NameServer, name_server, servfail, silence

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

ONE, TWO, THREE = (Endpoint(f"192.0.2.{number}") for number in (1, 2, 3))
SERVICE = "_http._tcp.example"
KEY = f"srv:{SERVICE}"


def backends(*hosts: str) -> list[BackendSettings]:
    return [
        BackendSettings(
            id=host,
            host=host,
            port=0 if host.startswith("_") else 80,
            protocol="h1",
            weight=1,
            tls=None,
            send_proxy=None,
        )
        for host in hosts
    ]


class World(Bench):
    """A name server, a discovery that asks it, and a clock that both see and the test moves."""

    def __init__(self, server: NameServer, files: Path, **settings: Any) -> None:
        super().__init__(server, files, **settings)
        self.changes: list[set[str]] = []
        self.waits: list[float] = []
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []
        self._news = asyncio.Event()
        self.discovery = Discovery(self._on_change, self.resolver, now=self.clock, sleep=self._sleep)

    def _on_change(self, keys: frozenset[str]) -> None:
        self.changes.append(set(keys))

    async def _sleep(self, wait_s: float) -> None:
        self.waits.append(wait_s)
        future = asyncio.get_running_loop().create_future()
        self._sleepers.append((self.clock.time + wait_s, future))
        self._news.set()
        await future

    @property
    def sleeping(self) -> int:
        return sum(not future.done() for _, future in self._sleepers)

    async def settled(self) -> None:
        """Until every name that is watched waits for its time."""
        async with asyncio.timeout(30):
            while self.sleeping < len(self.discovery.answers()):
                self._news.clear()
                await self._news.wait()

    async def pass_(self, seconds: float) -> None:
        """Let time pass, a second at a time, with all that happens meanwhile."""
        end = self.clock.time + seconds
        while self.clock.time < end:
            self.clock.time = min(self.clock.time + 1.0, end)
            for due, future in self._sleepers:
                if due <= self.clock.time and not future.done():
                    future.set_result(None)
            self._sleepers = [each for each in self._sleepers if not each[1].done()]
            await self.settled()

    async def apply(self, *hosts: str, pool: str = "p") -> None:
        self.discovery.apply({pool: backends(*hosts)})
        await self.settled()

    def known(self, key: str = "web.example") -> tuple[Endpoint, ...]:
        return self.discovery.answers()[key]

    def described(self, key: str = "web.example") -> dict[str, Any]:
        (found,) = (each for each in self.discovery.describe() if each["name"] == key)
        return found


def run(test: Callable[[World], Coroutine[Any, Any, None]], files: Path, **settings: Any) -> None:
    async def main() -> None:
        async with name_server() as server:
            server.put("web.example.", "A", ONE.ip, TWO.ip)
            server.put(f"{SERVICE}.", "SRV", "0 5 8080 one.example.", "0 7 8081 one.example.", ttl=30)
            server.put("one.example.", "A", ONE.ip, ttl=40)
            world = World(server, files, **settings)
            try:
                await test(world)
            finally:
                world.discovery.close()

    asyncio.run(main())


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "expressgateway.control.discovery")


class TestAnswers:
    def test_every_name_is_asked_about_once_and_literals_never(self, tmp_path: Path) -> None:
        async def test(world: World) -> None:
            of_pools = {"a": backends("web.example", "192.0.2.9"), "b": backends("web.example", SERVICE)}
            world.discovery.apply(of_pools)
            assert world.discovery.answers() == {"web.example": (), KEY: ()}
            assert await world.discovery.first_answers(5.0) == []
            assert world.discovery.answers() == {
                "web.example": (ONE, TWO),
                KEY: (Endpoint(ONE.ip, 8080, 5), Endpoint(ONE.ip, 8081, 7)),
            }
            assert sorted(world.changes, key=str) == [{KEY}, {"web.example"}]
            assert world.resolver.counters.queries == 3
            assert world.described()["pools"] == ["a", "b"]

        run(test, tmp_path)

    def test_the_message_holds_all_and_gives_the_workers_the_same(self, tmp_path: Path) -> None:
        async def test(world: World) -> None:
            await world.apply("web.example", SERVICE, "no.example")
            message = json.loads(json.dumps(world.discovery.message()))
            assert message == {
                "type": "answers",
                "names": {
                    "web.example": [["192.0.2.1", 0, 0], ["192.0.2.2", 0, 0]],
                    KEY: [["192.0.2.1", 8080, 5], ["192.0.2.1", 8081, 7]],
                    "no.example": [],
                },
            }
            found = expand(backends("web.example", SERVICE), read_answers(message["names"]))
            assert [(each.weight, id_) for each, _, id_ in found] == [
                (1, "web.example#192.0.2.1"),
                (1, "web.example#192.0.2.2"),
                (5, f"{SERVICE}#192.0.2.1:8080"),
                (7, f"{SERVICE}#192.0.2.1:8081"),
            ]

        run(test, tmp_path)

    def test_a_name_is_asked_about_again_when_its_time_is_over(self, tmp_path: Path) -> None:
        async def test(world: World) -> None:
            await world.apply("web.example")
            world.server.put("web.example.", "A", TWO.ip, THREE.ip, ttl=7)
            await world.pass_(59.0)
            assert world.known() == (ONE, TWO)
            assert world.resolver.counters.queries == 1
            await world.pass_(1.0)
            assert world.known() == (TWO, THREE)
            assert world.changes == [{"web.example"}] * 2
            assert world.waits == [60.0, 7.0]

        run(test, tmp_path)

    def test_the_same_answer_in_another_order_is_no_change(self, tmp_path: Path) -> None:
        async def test(world: World) -> None:
            await world.apply("web.example")
            world.server.put("web.example.", "A", TWO.ip, ONE.ip)
            await world.pass_(120.0)
            assert world.resolver.counters.queries == 3
            assert world.changes == [{"web.example"}]

        run(test, tmp_path)

    def test_a_weight_that_changes_is_a_change(self, tmp_path: Path) -> None:
        async def test(world: World) -> None:
            await world.apply(SERVICE)
            world.server.put(f"{SERVICE}.", "SRV", "0 5 8080 one.example.", "0 9 8081 one.example.")
            await world.pass_(30.0)
            assert world.known(KEY) == (Endpoint(ONE.ip, 8080, 5), Endpoint(ONE.ip, 8081, 9))
            assert world.changes == [{KEY}] * 2

        run(test, tmp_path)

    def test_never_faster_than_once_a_second(self, tmp_path: Path) -> None:
        async def test(world: World) -> None:
            world.server.put("web.example.", "A", ONE.ip, ttl=0)
            await world.apply("web.example")
            await world.pass_(10.0)
            assert world.resolver.counters.queries == 11
            assert set(world.waits) == {1.0}

        run(test, tmp_path)

    def test_never_faster_although_a_part_of_the_answer_is_over_sooner(self, tmp_path: Path) -> None:
        async def test(world: World) -> None:
            await world.ask("one.example.")
            world.clock.time += 39.5
            assert (await world.ask("one.example.")).ttl_s == 0.5
            await world.apply(SERVICE)
            assert world.waits == [1.0]

        run(test, tmp_path)

    def test_the_hosts_file_counts_soon_after_it_changed(self, tmp_path: Path) -> None:
        async def test(world: World) -> None:
            world.hosts.write_text("10.0.0.1 web.example\n")
            await world.apply("web.example")
            assert world.known() == (Endpoint("10.0.0.1"),)
            world.hosts.write_text("10.0.0.22 web.example\n")
            await world.pass_(5.0)
            assert world.known() == (Endpoint("10.0.0.22"),)
            assert world.server.asked == []

        run(test, tmp_path)

    def test_more_addresses_than_are_used_are_told_once(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def test(world: World) -> None:
            many = [f"10.0.{number // 250}.{number % 250}" for number in range(500)]
            world.server.put("web.example.", "A", *many, ttl=1)
            await world.apply("web.example")
            await world.pass_(3.0)
            assert len(world.known()) == 256
            assert caplog.messages == [
                "the name web.example (pool p) has more addresses than are used: 244 are left out"
            ]

        run(test, tmp_path)


class TestFailures:
    def test_the_last_good_answer_stays_and_the_log_says_so_once(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def test(world: World) -> None:
            await world.apply("web.example")
            world.server.mangle = servfail
            world.resolver._total_timeout_s = 0.1
            await world.pass_(75.0)
            assert world.known() == (ONE, TWO)
            assert world.resolver.counters.failures == 4
            described = world.described()
            assert (described["state"], described["stale"], described["ttl_left_ms"]) == ("stale", True, 5000)
            assert "web.example was not resolved: " in described["last_error"]
            world.mend()
            await world.pass_(5.0)
            assert world.described()["last_error"] is None
            assert world.changes == [{"web.example"}]
            kept, again = caplog.messages
            assert kept.startswith(
                "the name web.example (pool p) keeps the 2 addresses it has: web.example was not resolved: "
            )
            assert again == "the name web.example (pool p) is resolved again, to 2 addresses"

        run(test, tmp_path)

    def test_a_name_that_was_never_resolved_has_none_and_recovers(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def test(world: World) -> None:
            world.break_with(silence)
            await world.apply("web.example")
            assert world.known() == ()
            assert world.described()["state"] == "failing"
            world.mend()
            await world.pass_(5.0)
            assert world.known() == (ONE, TWO)
            assert [line.partition(":")[0] for line in caplog.messages] == [
                "the name web.example (pool p) gives no backends",
                "the name web.example (pool p) is resolved again, to 2 addresses",
            ]

        run(test, tmp_path)

    def test_a_name_that_is_gone_is_believed_when_it_was_said_for_long_enough(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def test(world: World) -> None:
            await world.apply("web.example")
            world.server.zone.clear()
            await world.pass_(85.0)
            assert world.known() == (ONE, TWO)
            assert world.described()["state"] == "stale"
            await world.pass_(5.0)
            assert world.known() == ()
            assert world.described()["state"] == "negative"
            assert world.changes == [{"web.example"}] * 2
            assert caplog.messages == [
                "the name web.example (pool p) keeps the 2 addresses it has: "
                "web.example does not exist, says DNS",
                "the name web.example (pool p) gives no backends: web.example does not exist, says DNS",
            ]
            samples = {family: number for family, _, number in world.discovery.samples()}
            assert samples["dns_stale_served"] == 6

        run(test, tmp_path)

    def test_a_name_that_is_gone_for_a_moment_is_not(self, tmp_path: Path) -> None:
        async def test(world: World) -> None:
            await world.apply(SERVICE)
            for _ in range(3):
                world.server.put(f"{SERVICE}.", "SRV", "0 0 0 .")
                await world.pass_(50.0)  # 30 until it is asked, 20 of which it is gone
                world.server.put(f"{SERVICE}.", "SRV", "0 5 8080 one.example.", ttl=30)
                await world.pass_(5.0)
                assert world.described(KEY)["state"] == "good"
            assert world.changes == [{KEY}] * 2  # the second one: 8081 left
            assert world.known(KEY) == (Endpoint(ONE.ip, 8080, 5),)

        run(test, tmp_path)

    def test_a_name_that_does_not_answer_holds_no_other_up(self, tmp_path: Path) -> None:
        async def test(world: World) -> None:
            world.server.mangle = silence_about("dark.example.")
            world.discovery.apply({"p": backends("dark.example", "web.example")})
            assert await world.discovery.first_answers(1.5) == ["dark.example"]
            assert world.known() == (ONE, TWO)

        run(test, tmp_path, total_timeout_s=30.0, query_timeout_s=30.0)

    def test_a_defect_ends_no_name(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        async def test(world: World) -> None:
            def broken(_: frozenset[str]) -> None:
                raise RuntimeError("a defect")

            world.discovery._on_change = broken
            await world.apply("web.example")
            assert "this is a defect" in caplog.text
            world.discovery._on_change = world._on_change
            world.server.put("web.example.", "A", THREE.ip)
            await world.pass_(60.0)
            assert world.known() == (THREE,)
            assert world.changes == [{"web.example"}]

        run(test, tmp_path)


def silence_about(name: str) -> Callable[..., bytes | None]:
    return lambda reply: None if reply.question[0].name.to_text() == name else bytes(reply.to_wire())


class TestApply:
    def test_what_stays_is_not_asked_about_anew_and_what_goes_is_forgotten(self, tmp_path: Path) -> None:
        async def test(world: World) -> None:
            await world.apply("web.example", SERVICE)
            queries = world.resolver.counters.queries
            await world.apply("web.example", "192.0.2.9", pool="other")
            assert world.resolver.counters.queries == queries
            assert world.discovery.answers() == {"web.example": (ONE, TWO)}
            assert world.described()["pools"] == ["other"]
            await asyncio.sleep(0)
            assert world.sleeping == 1  # the task of the other one has ended
            await world.apply("web.example", SERVICE)
            assert len(world.known(KEY)) == 2

        run(test, tmp_path)

    def test_a_question_under_way_about_a_name_that_goes_changes_nothing(self, tmp_path: Path) -> None:
        async def test(world: World) -> None:
            world.server.mangle = silence
            world.discovery.apply({"p": backends("web.example")})
            await world.server.changed.wait()
            world.discovery.apply({})
            assert world.discovery.answers() == {}
            assert await world.discovery.first_answers(5.0) == []
            assert [task for task in asyncio.all_tasks() if task.get_name().startswith("discovery")] != []
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert [task for task in asyncio.all_tasks() if task.get_name().startswith("discovery")] == []
            assert world.changes == []

        run(test, tmp_path, total_timeout_s=30.0, query_timeout_s=30.0)

    def test_what_was_preloaded_is_there_at_once(self, tmp_path: Path) -> None:
        async def test(world: World) -> None:
            await world.apply("web.example")
            assert await world.discovery.preload(["web.example", KEY], 5.0) == []
            assert len(world.known(KEY)) == 2
            queries = world.resolver.counters.queries
            await world.apply("web.example", SERVICE)
            assert len(world.known(KEY)) == 2
            assert world.resolver.counters.queries == queries

        run(test, tmp_path)

    def test_what_was_preloaded_in_vain_is_forgotten(self, tmp_path: Path) -> None:
        async def test(world: World) -> None:
            await world.apply("web.example")
            world.break_with(silence)
            assert await world.discovery.preload(["web.example", KEY], 0.01) == [KEY]
            await world.apply("web.example")
            assert world.discovery.answers().keys() == {"web.example"}

        run(test, tmp_path)

    def test_closed_it_asks_no_more_and_still_knows(self, tmp_path: Path) -> None:
        async def test(world: World) -> None:
            await world.apply("web.example")
            world.discovery.close()
            world.discovery.close()
            await asyncio.sleep(0)
            assert world.sleeping == 0
            assert world.known() == (ONE, TWO)

        run(test, tmp_path)


def test_what_the_admin_listener_and_the_metrics_show(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.server.put("one.example.", "AAAA", "2001:db8::1")
        world.server.put(f"{SERVICE}.", "SRV", "0 5 8080 one.example.")
        await world.apply("web.example", SERVICE, "no.example")
        await world.pass_(1.5)
        assert json.loads(json.dumps(world.discovery.describe())) == [
            {
                "name": "web.example",
                "pools": ["p"],
                "addresses": ["192.0.2.1", "192.0.2.2"],
                "state": "good",
                "stale": False,
                "ttl_left_ms": 58500,
                "last_error": None,
            },
            {
                "name": KEY,
                "pools": ["p"],
                "addresses": ["192.0.2.1:8080", "[2001:db8::1]:8080"],
                "state": "good",
                "stale": False,
                "ttl_left_ms": 38500,
                "last_error": None,
            },
            {
                "name": "no.example",
                "pools": ["p"],
                "addresses": [],
                "state": "negative",
                "stale": False,
                "ttl_left_ms": 3500,
                "last_error": "no.example does not exist, says DNS",
            },
        ]
        assert list(world.discovery.samples()) == [
            ("dns_queries", (), 4),
            ("dns_failures", (), 0),
            ("dns_stale_served", (), 0),
            ("dns_addresses", ("web.example",), 2),
            ("dns_addresses", (KEY,), 2),
            ("dns_addresses", ("no.example",), 0),
        ]

    run(test, tmp_path)
