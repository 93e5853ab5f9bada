"""How flows use their pool: keys, limits, outcomes, sessions, and what health decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from expressgateway.net import listener as net_listener
from expressgateway.upstream.limits import Limits
from expressgateway.upstream.pool import PoolSettings, Standing
from expressgateway.upstream.selection import Balancing
from tests.l4.udp_gateway import UNTIL_IDLE_S, Gateway, dead_address, gateway, run, until

if TYPE_CHECKING:
    from expressgateway.upstream.backend import Backend

MAGLEV = PoolSettings(Balancing("maglev", table_size=251))
AFFINITY = PoolSettings(Balancing("session_affinity", table_size=251))


@pytest.fixture(autouse=True)
def _fresh_log_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_listener.limited, "_since", {})


def say(one: Gateway, *, down: str = "", draining: str = "") -> None:
    """The supervisor's word, by the places of backends in the pool."""

    def ids(places: str) -> frozenset[str]:
        return frozenset(one.pool.backends[int(place)].id for place in places)

    one.pool.judge(Standing(down=ids(down), draining=ids(draining)))


def ab(one: Gateway, settings: PoolSettings | None = None) -> tuple[Backend, ...]:
    return one.use(*(one.echo(name).address for name in (b"a", b"b")), settings=settings)


class TestHealth:
    def test_down_moves_a_flow_with_its_next_datagram(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                a, b = ab(one)
                client = one.client()
                assert await client.ask(b"") == b"a"
                say(one, down="0")
                assert (a.in_flight, a.open) == (1, 1)  # until then
                assert await client.ask(b"") == b"b"
                assert (a.in_flight, a.open, b.in_flight) == (0, 0, 1)
                assert one.listener.open == 1
                say(one)
                assert await client.ask(b"") == b"b"  # it does not go back by itself
                assert a.responses[2] == 1
                assert not one.counters.relay_errors

        run(main)

    def test_what_its_backend_says_meanwhile_is_passed_on(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                echo = one.echo()
                one.use(echo.address)
                client = one.client()
                await client.ask(b"x")
                say(one, down="0")
                echo.sock.sendto(b"late", echo.got[0][1])
                assert await client.receive() == b"late"

        run(main)

    def test_all_down(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                ab(one)
                client, other = one.client(), one.client()
                assert await client.ask(b"") == b"a"
                say(one, down="01")
                client.send(b"")
                other.send(b"")
                await until(lambda: one.counters.dropped.get("no_backend") == 2)
                assert one.counters.relay_errors == {"backends_down": 2}
                assert one.listener.open == 1  # the flow stays, and has a backend again
                say(one, down="0")
                assert await client.ask(b"") == b"b"

        run(main)

    def test_draining_keeps_its_flows_and_gets_no_new_ones(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                ab(one)
                first = one.client()
                assert await first.ask(b"") == b"a"
                say(one, draining="0")
                assert [await one.client().ask(b"") for _ in range(3)] == [b"b"] * 3
                assert await first.ask(b"") == b"a"

        run(main)

    @pytest.mark.parametrize("how", ["weight 0", "removed", "both"])
    def test_so_do_weight_0_and_a_removal(self, how: str) -> None:
        async def main() -> None:
            async with gateway() as one:
                a, b = ab(one)
                first = one.client()
                assert await first.ask(b"") == b"a"
                if how != "removed":
                    one.use(a.address, b.address, weights=[0, 1])
                if how != "weight 0":
                    one.use(b.address)
                assert [await one.client().ask(b"") for _ in range(3)] == [b"b"] * 3
                assert await first.ask(b"") == b"a"
                assert a.in_flight == 1

        run(main)

    def test_of_weight_0_that_is_down_flows_move_too(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                a, b = ab(one)
                first = one.client()
                assert await first.ask(b"") == b"a"
                one.use(a.address, b.address, weights=[0, 1])
                say(one, down="0")
                assert await first.ask(b"") == b"b"

        run(main)


class TestOutcomes:
    def test_an_answer_is_a_success_once_per_flow(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                echo = one.echo()
                (backend,) = one.use(echo.address)
                one.pool.failed(backend, "x")
                client = one.client()
                for _ in range(3):
                    await client.ask(b"")
                await one.client().ask(b"")
                assert one.pool.take_outcomes() == {backend.id: [2, 1, 0, "x"]}

        run(main)

    def test_silence_says_nothing(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                echo = one.echo()
                echo.is_silent = True
                one.use(echo.address)
                one.client().send(b"x")
                await until(lambda: echo.got)
                one.listener.sweep(one.reactor.now + UNTIL_IDLE_S)
                assert one.listener.open == 0
                assert one.pool.take_outcomes() == {}
                assert one.pool.backends[0].responses[0] == 1

        run(main)

    def test_one_that_is_gone_is_a_failure_and_raises_the_alarm(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                alarms: list[int] = []
                one.pool.on_alarm = lambda: alarms.append(1)
                (backend,) = one.use(dead_address(), settings=PoolSettings(alarm_streak=2))
                client = one.client()
                for count in (1, 2):
                    client.send(b"lost")
                    await until(lambda count=count: backend.connect_failures == count)  # type: ignore[misc]  # mypy does not infer lambdas with defaults
                assert alarms == [1]
                assert one.pool.take_outcomes() == {backend.id: [0, 2, 2, "connect refused"]}

        run(main)


class TestLimits:
    @pytest.mark.parametrize(
        "limit", ["max_connections", "max_requests", "pool_max_connections", "pool_max_requests"]
    )
    def test_a_flow_too_many_is_refused_and_counted(self, limit: str) -> None:
        async def main() -> None:
            async with gateway() as one:
                one.use(one.echo(b"a").address, settings=PoolSettings(limits=Limits(**{limit: 2})))
                clients = [one.client() for _ in range(3)]
                for client in clients[:2]:
                    assert await client.ask(b"") == b"a"
                clients[2].send(b"")
                clients[2].send(b"")
                await until(lambda: one.counters.dropped.get("no_backend") == 2)
                assert one.counters.relay_errors == {"saturated": 2}
                assert list(one.pool.hits) == [limit]
                assert (one.listener.open, len(one.pool.queue)) == (2, 0)  # no datagram waits
                assert one.census.inside.total() == 2
                assert await clients[0].ask(b"") == b"a"
                one.listener.sweep(one.reactor.now + UNTIL_IDLE_S)
                assert await clients[2].ask(b"") == b"a"

        run(main)

    def test_a_flow_that_moves_is_not_in_its_own_way(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                ab(one, PoolSettings(limits=Limits(pool_max_requests=1, pool_max_connections=1)))
                client = one.client()
                assert await client.ask(b"") == b"a"
                say(one, down="0")
                assert await client.ask(b"") == b"b"

        run(main)


class TestKeys:
    @pytest.mark.parametrize("settings", [MAGLEV, AFFINITY])
    def test_all_flows_of_an_address_have_one_backend(self, settings: PoolSettings) -> None:
        async def main() -> None:
            async with gateway() as one:
                ab(one, settings)
                found: dict[str, set[bytes]] = {}
                for number in range(24):
                    ip = f"127.0.0.{number % 8 + 1}"
                    found.setdefault(ip, set()).add(await one.client(ip).ask(b""))
                assert all(len(each) == 1 for each in found.values())
                assert len(set.union(*found.values())) == 2

        run(main)

    def test_a_session_outlives_its_flow(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                addresses: list[Any] = [one.echo(name).address for name in (b"a", b"b")]
                one.use(addresses[1], settings=AFFINITY)
                client = one.client()
                assert await client.ask(b"") == b"b"
                one.listener.sweep(one.reactor.now + UNTIL_IDLE_S)
                one.use(*addresses, weights=[1, 0], settings=AFFINITY)
                assert await client.ask(b"") == b"b"
                assert await one.client("127.0.0.9").ask(b"") == b"a"
                one.listener.sweep(one.reactor.now + UNTIL_IDLE_S)
                say(one, down="1")
                assert await client.ask(b"") == b"a"
                one.listener.sweep(one.reactor.now + UNTIL_IDLE_S)
                say(one)
                assert await client.ask(b"") == b"a"  # that is its backend now

        run(main)

    def test_one_that_never_answered_is_no_session(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                silent = one.echo()
                silent.is_silent = True
                one.use(silent.address, settings=AFFINITY)
                one.client().send(b"x")
                await until(lambda: silent.got)
                assert one.pool.pick_bound(b"127.0.0.1") is None

        run(main)
