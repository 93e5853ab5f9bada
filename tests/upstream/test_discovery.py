"""Names become backends, keep their identity, and stay when DNS fails."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from expressgateway.upstream import discovery as module
from expressgateway.upstream.backend import Backend, BackendSettings
from expressgateway.upstream.discovery import Discovery, is_literal, socket_address
from expressgateway.upstream.dns import Answer, DnsError
from expressgateway.upstream.errors import Fault
from expressgateway.upstream.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any


class Names:
    """Answers that the test writes; ``held`` names wait until they are let go."""

    def __init__(self, **answers: tuple[str, ...]) -> None:
        self.answers = dict(answers)
        self.held: dict[str, asyncio.Event] = {}
        self.asked: list[str] = []

    async def resolve(self, host: str) -> Answer:
        self.asked.append(host)
        if host in self.held:
            await self.held[host].wait()
        if host not in self.answers:
            raise DnsError(f"{host} has no address")
        return Answer(self.answers[host], 0.0)


def settings(*hosts: str, weight: int = 1) -> list[BackendSettings]:
    return [BackendSettings(f"id-{host}", host, 80, "h1", weight, None, None) for host in hosts]


def attach(backend: Backend) -> None:
    pass


class World:
    def __init__(self, names: Names) -> None:
        self.names = names
        self.pool = Pool("p", "round_robin", attach)
        self.discovery = Discovery(self.pool, names)  # type: ignore[arg-type]  # a fake

    def apply(self, *hosts: str, weight: int = 1, policy: str = "round_robin") -> None:
        self.discovery.apply(settings(*hosts, weight=weight), policy)

    @property
    def ids(self) -> list[str]:
        return [backend.id for backend in self.pool.backends]

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(3):
            while not condition():  # noqa: ASYNC110 - nobody signals it
                await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MIN_WAIT_S", 0.002)
    monkeypatch.setattr(module, "_RETRY_S", 0.002)


def run(names: Names, test: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        world = World(names)
        try:
            await test(world)
        finally:
            world.discovery.close()

    asyncio.run(main())


def test_literals_count_at_once() -> None:
    async def test(world: World) -> None:
        world.apply("192.0.2.1", "2001:db8::1")
        assert [(backend.id, backend.address) for backend in world.pool.backends] == [
            ("id-192.0.2.1", ("192.0.2.1", 80)),
            ("id-2001:db8::1", ("2001:db8::1", 80, 0, 0)),
        ]
        await world.discovery.first_answers(0.0)
        assert world.names.asked == []

    run(Names(), test)


def test_every_address_of_a_name_is_a_backend_of_its_own() -> None:
    async def test(world: World) -> None:
        world.apply("192.0.2.9", "web")
        await world.discovery.first_answers(2.0)
        assert world.ids == ["id-192.0.2.9", "id-web#192.0.2.1", "id-web#192.0.2.2"]

    run(Names(web=("192.0.2.1", "192.0.2.2")), test)


def test_a_changed_answer_keeps_what_stays() -> None:
    async def test(world: World) -> None:
        world.apply("web")
        await world.discovery.first_answers(2.0)
        stays = world.pool.backends[1]
        world.names.answers["web"] = ("192.0.2.2", "192.0.2.3")
        await world.until(lambda: world.ids == ["id-web#192.0.2.2", "id-web#192.0.2.3"])
        assert world.pool.backends[0] is stays

    run(Names(web=("192.0.2.1", "192.0.2.2")), test)


def test_the_last_good_answer_stays_when_dns_fails() -> None:
    async def test(world: World) -> None:
        world.apply("web")
        await world.discovery.first_answers(2.0)
        del world.names.answers["web"]
        asked = len(world.names.asked)
        await world.until(lambda: len(world.names.asked) > asked + 2)
        assert world.ids == ["id-web#192.0.2.1"]

    run(Names(web=("192.0.2.1",)), test)


def test_before_any_answer_the_pool_says_why_and_recovers() -> None:
    async def test(world: World) -> None:
        world.apply("web")
        await world.discovery.first_answers(2.0)
        assert world.ids == []
        assert world.pool.empty_fault is Fault.DNS
        world.names.answers["web"] = ("192.0.2.1",)
        await world.until(lambda: world.ids)

    run(Names(), test)


def test_no_backends_at_all_is_another_reason() -> None:
    async def test(world: World) -> None:
        world.apply()
        assert world.pool.empty_fault is Fault.NO_BACKEND

    run(Names(), test)


@pytest.mark.parametrize("is_silent", [False, True])
def test_a_name_that_does_not_resolve_holds_no_other_up(is_silent: bool) -> None:
    async def test(world: World) -> None:
        if is_silent:
            world.names.held["dark"] = asyncio.Event()
        world.apply("dark", "web")
        await world.until(lambda: world.ids == ["id-web#192.0.2.1"])
        world.names.answers["web"] = ("192.0.2.2",)
        await world.until(lambda: world.ids == ["id-web#192.0.2.2"])

    run(Names(web=("192.0.2.1",)), test)


def test_waiting_for_first_answers_has_an_end() -> None:
    async def test(world: World) -> None:
        world.names.held["dark"] = asyncio.Event()
        world.apply("dark")
        async with asyncio.timeout(2):
            await world.discovery.first_answers(0.01)
        assert world.ids == []

    run(Names(), test)


def test_a_reload_uses_the_answers_it_knows_at_once() -> None:
    async def test(world: World) -> None:
        world.apply("web")
        await world.discovery.first_answers(2.0)
        backend = world.pool.backends[0]
        world.names.held["web"] = asyncio.Event()
        world.apply("web", "192.0.2.9", weight=5, policy="weighted_round_robin")
        assert world.ids == ["id-web#192.0.2.1", "id-192.0.2.9"]
        assert world.pool.backends[0] is backend
        assert backend.weight == 5
        assert world.pool.policy == "weighted_round_robin"
        world.apply("192.0.2.9")
        assert world.ids == ["id-192.0.2.9"]
        world.apply("web")  # forgotten meanwhile: it is asked anew
        assert world.ids == []

    run(Names(web=("192.0.2.1",)), test)


def test_the_same_address_twice_is_one_backend_each_id() -> None:
    async def test(world: World) -> None:
        world.discovery.apply([*settings("web"), *settings("web")], "round_robin")
        await world.discovery.first_answers(2.0)
        assert world.ids == ["id-web#192.0.2.1"]

    run(Names(web=("192.0.2.1",)), test)


def test_closed_it_asks_no_more() -> None:
    async def test(world: World) -> None:
        world.apply("web")
        await world.discovery.first_answers(2.0)
        world.discovery.close()
        world.discovery.close()
        asked = len(world.names.asked)
        await asyncio.sleep(0.02)
        assert len(world.names.asked) == asked

    run(Names(web=("192.0.2.1",)), test)


def test_what_a_literal_is() -> None:
    assert [is_literal(host) for host in ("192.0.2.1", "::1", "web", "1.2.3", "a.test")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert socket_address("::1", 1) == ("::1", 1, 0, 0)
