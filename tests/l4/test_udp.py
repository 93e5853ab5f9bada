"""The UDP listener over real sockets, the real reactor and uvloop: relaying, choosing, leaving."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from expressgateway.upstream.pool import Pool
from tests.l4.udp_gateway import (
    UNTIL_IDLE_S,
    V4,
    V6,
    FakeCensus,
    Gateway,
    datagram_socket,
    dead_address,
    gateway,
    run,
    settings_of,
    until,
)
from tests.net.loopback import descriptors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from expressgateway.upstream.backend import Backend
    from expressgateway.upstream.selection import Selection

# --- relaying -----------------------------------------------------------------------------------------------


class TestRelaying:
    @pytest.mark.parametrize("host", [V4, V6])
    @pytest.mark.parametrize("size", [0, 1, 1472, 9000, 65507])
    def test_a_datagram_there_and_back(self, host: str, size: int) -> None:
        async def main() -> None:
            async with gateway(host) as one:
                echo = one.echo(host=host)
                (backend,) = one.use(echo.address)
                data = os.urandom(size)
                assert await one.client().ask(data) == data
                assert echo.data == [data]
                assert one.counters.datagrams == [1, 1]
                assert one.counters.relayed == [size, size]
                assert not one.counters.dropped
                assert (backend.in_flight, backend.leases) == (1, 1)
                assert (one.counters.connections, one.counters.inflight) == (1, 1)
            assert backend.responses[2] == 1

        run(main)

    def test_boundaries_and_order_of_more_than_one_batch(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                echo = one.echo()
                one.use(echo.address)
                client = one.client()
                sent = [bytes([number]) * (number % 7) for number in range(200)]
                for data in sent:
                    client.send(data)
                assert [await client.receive() for _ in sent] == sent
                assert echo.data == sent
                assert one.listener.open == 1

        run(main)

    def test_one_event_takes_a_bounded_number(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                echo = one.echo()
                one.use(echo.address)
                client = one.client()
                for _ in range(100):
                    client.send(b"x")
                one.listener._on_ready(0)
                assert one.counters.datagrams[0] == 64
                one.listener._on_ready(0)
                assert one.counters.datagrams[0] == 100
                await until(lambda: one.counters.datagrams[1] == 100)

        run(main)

    def test_a_backend_may_speak_unasked_and_more_than_once(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                echo = one.echo()
                one.use(echo.address)
                client = one.client()
                await client.ask(b"hello")
                flow = echo.got[0][1]
                for data in (b"1", b"", b"333"):
                    echo.sock.sendto(data, flow)
                assert [await client.receive() for _ in range(3)] == [b"1", b"", b"333"]

        run(main)

    def test_only_the_backend_is_heard(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                echo = one.echo()
                one.use(echo.address)
                client = one.client()
                await client.ask(b"hello")
                with datagram_socket(V4) as stranger:
                    stranger.sendto(b"forged", echo.got[0][1])
                assert await client.ask(b"again") == b"again"
                assert one.counters.datagrams == [2, 2]

        run(main)

    def test_ipv6_clients_and_an_ipv4_backend_that_cannot_take_the_longest(self) -> None:
        async def main() -> None:
            async with gateway(V6) as one:
                one.use(one.echo().address)
                client = one.client()
                client.send(bytes(65527))  # 20 bytes more than IPv4 has room for
                await until(lambda: one.counters.dropped)
                assert one.counters.dropped == {"too_big": 1}
                assert await client.ask(b"short") == b"short"
                assert one.counters.datagrams == [1, 1]

        run(main)


class FirstOfAll:
    """A policy that clings to one backend, as hashing does."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = backends

    def pick(self, key: bytes | None) -> Backend | None:
        return self._backends[0]

    def others(self, picked: Backend) -> Iterable[Backend]:
        return [backend for backend in self._backends if backend is not picked]

    def rebuilt(self, backends: Sequence[Backend]) -> Selection:
        return FirstOfAll(backends)


class Seen:
    """A policy that remembers what it was asked with."""

    def __init__(self, policy: Selection) -> None:
        self._policy = policy
        self.keys: list[bytes | None] = []

    def pick(self, key: bytes | None) -> Backend | None:
        self.keys.append(key)
        return self._policy.pick(key)

    def others(self, picked: Backend) -> Iterable[Backend]:
        return self._policy.others(picked)

    def rebuilt(self, backends: Sequence[Backend]) -> Selection:
        return Seen(self._policy.rebuilt(backends))


class TestChoosing:
    def test_clients_are_balanced_and_stay(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                one.use(*(one.echo(name).address for name in (b"a", b"b")))
                clients = [one.client() for _ in range(6)]
                answers = [[await client.ask(b"") for client in clients] for _ in range(3)]
                assert answers == [[b"a", b"b"] * 3] * 3
                assert [backend.in_flight for backend in one.pool.backends] == [3, 3]
                assert one.listener.open == 6

        run(main)

    def test_the_key_is_the_address_of_the_client(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                one.use(one.echo().address)
                seen = Seen(one.pool.selection)
                one.pool.selection = seen
                await one.client("127.0.0.9").ask(b"x")
                assert seen.keys == [b"127.0.0.9"]

        run(main)

    def test_a_reload_moves_new_flows_only(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                a, b, c = one.echo(b"a"), one.echo(b"b"), one.echo(b"c")
                one.use(a.address)
                first = one.client()
                assert await first.ask(b"") == b"a"
                one.use(b.address)  # a is taken away
                second = one.client()
                assert await second.ask(b"") == b"b"
                other = Pool("q", lambda backend: None, one.reactor, one.reactor.call_soon)
                other.replace([(settings_of(c.address), c.address, "c")])
                one.listener.pool = other
                assert await one.client().ask(b"") == b"c"
                assert [await first.ask(b""), await second.ask(b"")] == [b"a", b"b"]

        run(main)

    def test_no_new_flows_for_weight_0(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                a = one.echo(b"a")
                one.use(a.address)
                first, second = one.client(), one.client()
                await first.ask(b"")
                one.use(a.address, weights=[0])
                second.send(b"")
                await until(lambda: one.counters.dropped)
                assert one.counters.dropped == {"no_backend": 1}
                assert await first.ask(b"!") == b"a!"

        run(main)

    def test_without_backends_nothing_is_kept(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                client = one.client()
                client.send(b"x")
                await until(lambda: one.counters.dropped)
                assert one.counters.dropped == {"no_backend": 1}
                assert one.counters.relay_errors == {"no_backend": 1}
                assert (one.listener.open, one.counters.connections) == (0, 0)
                assert not one.census.inside
                one.use(one.echo().address)
                assert await client.ask(b"y") == b"y"

        run(main)


class TestBackendGone:
    def test_the_next_datagram_goes_elsewhere(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                echo = one.echo()
                dead, live = one.use(dead_address(), echo.address)
                client = one.client()
                client.send(b"lost")
                await until(lambda: one.counters.relay_errors)
                assert one.counters.relay_errors == {"connect_refused": 1}
                assert (one.listener.open, dead.in_flight) == (1, 0)
                assert await client.ask(b"next") == b"next"
                assert echo.data == [b"next"]  # nothing is sent twice
                assert await client.ask(b"again") == b"again"
                assert (dead.connect_failures, dead.responses[0]) == (1, 1)
                assert (live.in_flight, one.listener.open) == (1, 1)

        run(main)

    def test_a_refusal_met_while_sending_costs_only_the_refused(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                echo = one.echo()
                one.use(dead_address(), echo.address)
                client = one.client()
                client.send(b"lost")
                client.send(b"next")  # in the same batch: the socket has the error pending
                assert await client.receive() == b"next"
                assert echo.data == [b"next"]
                assert one.counters.relay_errors == {"connect_refused": 1}

        run(main)

    def test_a_backend_that_died_with_flows(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                a, b = one.echo(b"a"), one.echo(b"b")
                one.use(a.address, b.address)
                client = one.client()
                assert await client.ask(b"") == b"a"
                a.close()
                client.send(b"lost")
                await until(lambda: one.counters.relay_errors)
                assert await client.ask(b"!") == b"b!"

        run(main)

    def test_a_policy_that_clings_is_led_on_until_one_answers(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                first, second = dead_address(), one.echo(b"second")
                one.pool.selection = FirstOfAll(one.use(first, second.address, one.echo(b"third").address))
                client = one.client()
                client.send(b"lost")
                assert await client.ask(b"!") == b"second!"
                assert [backend.connect_failures for backend in one.pool.backends] == [1, 0, 0]
                one.echo(b"first", port=first[1])
                second.close()
                client.send(b"lost")
                await until(lambda: one.pool.backends[1].connect_failures)
                assert await client.ask(b"!") == b"first!"  # an answer in between: it is asked again

        run(main)

    def test_all_gone_and_one_comes_back(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                addresses = [dead_address(), dead_address()]
                backends = one.use(*addresses)
                client = one.client()

                async def refused(count: int) -> None:
                    await until(lambda: sum(backend.connect_failures for backend in backends) == count)

                for count in range(1, 6):  # it keeps asking, each of them in turn
                    client.send(b"lost")
                    await refused(count)
                assert sorted(backend.connect_failures for backend in backends) == [2, 3]
                one.echo(b"back", port=addresses[0][1])
                one.echo(b"back", port=addresses[1][1])
                assert await client.ask(b"") == b"back"
                assert one.listener.open == 1

        run(main)

    def test_an_address_without_a_route_is_passed_over_at_once(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                echo = one.echo()
                # A broadcast address needs a permission that our sockets do not ask for.
                unreachable, _ = one.use(("255.255.255.255", 9), echo.address)
                assert await one.client().ask(b"x") == b"x"
                assert unreachable.connect_failures == 1
                assert one.counters.relay_errors == {"connect_failed": 1}
                assert one.counters.connections == 1

        run(main)


class TestLeaving:
    @pytest.mark.parametrize("how", ["stop", "drain"])
    def test_flows_go_on_and_new_ones_are_refused(self, how: str) -> None:
        async def main() -> None:
            async with gateway() as one:
                echo = one.echo()
                one.use(echo.address)
                old, new = one.client(), one.client()
                await old.ask(b"x")
                getattr(one.listener, how)()
                new.send(b"new")
                await until(lambda: one.counters.dropped)
                assert one.counters.dropped == one.counters.rejects == {"draining": 1}
                assert not one.counters.security
                assert await old.ask(b"y") == b"y"
                echo.sock.sendto(b"z", echo.got[0][1])
                assert await old.receive() == b"z"
                assert new.hears_nothing()
                assert one.listener.go_away() == 1
                assert one.is_closed() == (how == "stop")

        run(main)

    def test_stopping_takes_what_is_in_the_queue(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                one.use(one.echo().address)
                client = one.client()
                client.send(b"early")
                one.listener.stop()
                assert one.listener.open == 1
                assert await client.receive() == b"early"

        run(main)

    def test_the_socket_closes_after_the_last_flow(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                one.use(one.echo().address)
                await one.client().ask(b"x")
                one.listener.stop()
                assert not one.is_closed()
                one.listener.sweep(one.reactor.now + UNTIL_IDLE_S)
                assert one.is_closed()
                one.listener.stop()

        run(main)

    def test_without_flows_it_closes_at_once(self) -> None:
        async def main() -> None:
            async with gateway() as one:
                one.listener.stop()
                assert one.is_closed()
                assert one.listener.go_away() == 0

        run(main)

    def test_never_started(self) -> None:
        async def main() -> None:
            before = descriptors()
            one = Gateway(V4, FakeCensus(), dual=False)
            one.listener.stop()
            one.reactor.close()
            assert descriptors() == before

        run(main)

    def test_a_defect_costs_one_flow(self, caplog: pytest.LogCaptureFixture) -> None:
        async def main() -> None:
            async with gateway() as one:
                echo = one.echo()
                one.use(echo.address)
                broken, sound = one.client(), one.client()
                await sound.ask(b"x")
                await broken.ask(b"x")
                flow = list(one.listener._flows.values())[-1]
                flow.control = [b"not a control message"]  # type: ignore[list-item]  # that is the defect
                broken.send(b"y")
                await until(lambda: one.reactor.faults)
                assert one.listener.open == 1
                assert await sound.ask(b"z") == b"z"
                one.reactor.faults = 0

        run(main)
        assert any("defect" in record.getMessage() for record in caplog.records)
