"""What bounds the UDP listener: caps, descriptors, full buffers, the network's refusals, idle flows."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import types
from typing import TYPE_CHECKING, Any

import pytest

from expressgateway.l4.udp import IDLE_S
from expressgateway.net import listener as net_listener
from expressgateway.net import reactor as net_reactor
from tests.l4.udp_gateway import (
    UNTIL_IDLE_S,
    V4,
    FakeCensus,
    datagram_socket,
    gateway,
    run,
    until,
)
from tests.net.loopback import descriptors

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _fresh_log_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_listener.limited, "_since", {})


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The reactor's clock, standing still."""
    clock = Clock()
    monkeypatch.setattr(net_reactor, "time", types.SimpleNamespace(monotonic=clock.monotonic))
    return clock


class TestCaps:
    def test_per_address(self) -> None:
        async def main() -> None:
            async with gateway(census=FakeCensus(per_ip=2)) as one:
                echo = one.echo()
                one.use(echo.address)
                inside = [one.client(), one.client()]
                outside = one.client()
                for client in inside:
                    await client.ask(b"in")
                outside.send(b"out")
                outside.send(b"out")
                await until(lambda: one.counters.dropped.get("ip_cap") == 2)
                assert one.counters.rejects == {"ip_cap": 2}
                assert one.counters.security == {"connection_flood": 2}
                assert await one.client("127.0.0.2").ask(b"other") == b"other"
                assert await inside[0].ask(b"in") == b"in"
                assert outside.hears_nothing()
                assert b"out" not in echo.data
                assert one.census.inside == {V4: 2, "127.0.0.2": 1}
                one.listener.sweep(one.reactor.now + UNTIL_IDLE_S)
                assert await outside.ask(b"room") == b"room"

        run(main)

    def test_a_flood_of_5000_addresses(self, caplog: pytest.LogCaptureFixture) -> None:
        cap = 250

        async def main() -> None:
            async with gateway(census=FakeCensus(total=cap)) as one:
                echo = one.echo()
                one.use(echo.address)
                client = one.client()
                await client.ask(b"before")
                before = descriptors()
                most = 0
                for number in range(5000):
                    with datagram_socket(f"127.1.{number >> 8}.{number & 255}") as sock:
                        sock.sendto(b"flood", one.address)
                    if number % 50 == 0:
                        assert await client.ask(b"during") == b"during"
                        most = max(most, descriptors() - before)
                assert await client.ask(b"after") == b"after"
                assert one.listener.open == cap
                assert most <= cap
                assert one.counters.dropped == {"process_cap": 5000 - (cap - 1)}
                one.listener.sweep(one.reactor.now + UNTIL_IDLE_S)
                assert one.listener.open == 0
                assert descriptors() == before - 1
                assert await client.ask(b"again") == b"again"

        run(main)
        # The senders' addresses are forged at no cost: not a line for each.
        assert len(caplog.records) == 1

    def test_no_descriptor_left(self, caplog: pytest.LogCaptureFixture) -> None:
        async def main() -> None:
            async with gateway() as one:
                one.use(one.echo().address)
                old, new = one.client(), one.client()
                await old.ask(b"x")
                with no_descriptors():
                    new.send(b"lost")
                    new.send(b"lost")
                    old.send(b"served")
                    await until(lambda: one.counters.dropped.get("no_socket") == 2)
                    await until(lambda: one.counters.datagrams == [2, 2])
                assert await old.receive() == b"served"
                assert one.counters.accept_errors == {"EMFILE": 2}
                assert one.census.inside == {V4: 1}
                assert one.listener.open == 1
                assert await new.ask(b"y") == b"y"

        run(main)
        assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
            "no socket for a flow: EMFILE"
        ]

    @pytest.mark.parametrize(
        ("code", "reason"),
        [
            (errno.EAGAIN, "backend_buffer_full"),
            (errno.ENOBUFS, "no_buffers"),
            (errno.EPERM, "not_permitted"),
            (errno.EMSGSIZE, "too_big"),
            (errno.EINVAL, "send_failed"),
        ],
    )
    def test_what_cannot_be_sent_to_a_backend(self, code: int, reason: str) -> None:
        async def main() -> None:
            async with gateway() as one:
                echo = one.echo()
                one.use(echo.address)
                client = one.client()
                await client.ask(b"x")
                (flow,) = one.listener._flows.values()
                real = flow._sock
                flow._sock = Failing(real, code)  # type: ignore[assignment]  # a socket but for its sending
                client.send(b"lost")
                await until(lambda: one.counters.dropped)
                flow._sock = real
                assert one.counters.dropped == {reason: 1}
                assert await client.ask(b"y") == b"y"  # the newest was dropped, the flow goes on
                assert echo.data == [b"x", b"y"]
                assert one.counters.datagrams == [2, 2]

        run(main)

    @pytest.mark.parametrize("code", [errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNREFUSED])
    def test_what_the_network_says_is_gone(self, code: int) -> None:
        async def main() -> None:
            async with gateway() as one:
                a, b = one.echo(b"a"), one.echo(b"b")
                one.use(a.address, b.address)
                client = one.client()
                assert await client.ask(b"") == b"a"
                (flow,) = one.listener._flows.values()
                flow._sock = Failing(flow._sock, code)  # type: ignore[assignment]  # as above
                assert await client.ask(b"!") == b"b!"
                assert not one.counters.dropped
                assert one.pool.backends[0].connect_failures == 1

        run(main)

    @pytest.mark.parametrize("host", [V4, "0.0.0.0"])
    @pytest.mark.parametrize(
        ("code", "reason"),
        [
            (errno.EAGAIN, "client_buffer_full"),
            (errno.ENOBUFS, "no_buffers"),
            (errno.EPERM, "not_permitted"),
            (errno.EHOSTUNREACH, "unreachable"),
            (errno.EINVAL, "send_failed"),
        ],
    )
    def test_what_cannot_be_sent_to_a_client(self, host: str, code: int, reason: str) -> None:
        async def main() -> None:
            async with gateway(host) as one:
                one.use(one.echo().address)
                client = one.client(to=(V4, one.port))
                real = one.listener._sock
                one.listener._sock = Failing(real, code)  # type: ignore[assignment]  # as above
                client.send(b"lost")
                await until(lambda: one.counters.dropped)
                one.listener._sock = real
                assert one.counters.dropped == {reason: 1}
                assert await client.ask(b"y") == b"y"
                assert one.counters.datagrams == [2, 1]

        run(main)


class Failing:
    """A socket that cannot send."""

    def __init__(self, sock: Any, code: int) -> None:
        self._sock = sock
        self._code = code

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def send(self, *_: object) -> int:
        raise OSError(self._code, os.strerror(self._code))

    sendto = sendmsg = send


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


class TestIdle:
    def test_frees_everything(self, clock: Clock) -> None:
        async def main() -> None:
            async with gateway() as one:
                echo = one.echo()
                (backend,) = one.use(echo.address)
                client = one.client()
                before = descriptors()
                await client.ask(b"x")
                assert descriptors() == before + 1
                one.listener.sweep(clock.now + IDLE_S)
                assert one.listener.open == 1
                one.listener.sweep(clock.now + UNTIL_IDLE_S)
                assert (one.listener.open, one.counters.inflight, backend.in_flight) == (0, 0, 0)
                assert descriptors() == before
                assert not one.census.inside
                assert await client.ask(b"y") == b"y"  # a new flow
                assert echo.got[0][1] != echo.got[1][1] or one.counters.connections == 2

        run(main)

    def test_either_direction_keeps_a_flow(self, clock: Clock) -> None:
        async def main() -> None:
            async with gateway() as one:
                echo = one.echo()
                one.use(echo.address)
                asking, hearing, quiet = one.client(), one.client(), one.client()
                for client in (asking, hearing, quiet):
                    await client.ask(b"x")
                ports = [sender for _, sender in echo.got]
                echo.is_silent = True
                clock.now += 50
                asking.send(b"y")
                echo.sock.sendto(b"z", ports[1])
                assert await hearing.receive() == b"z"
                await until(lambda: len(echo.got) == 4)
                clock.now += 50
                one.listener.sweep(clock.now)
                assert [flow.address[1] for flow in one.listener._flows.values()] == [
                    client.sock.getsockname()[1] for client in (asking, hearing)
                ]
                clock.now += 11
                one.listener.sweep(clock.now)
                assert one.listener.open == 0

        run(main)

    def test_a_sweep_looks_at_no_flow_that_is_not_idle(self, clock: Clock) -> None:
        async def main() -> None:
            async with gateway() as one:
                one.use(one.echo().address)
                clients = [one.client() for _ in range(5)]
                for client in clients:
                    await client.ask(b"x")
                    clock.now += 2
                await clients[0].ask(b"x")  # the oldest is the youngest now
                order = [flow.address[1] for flow in one.listener._flows.values()]
                ports = [client.sock.getsockname()[1] for client in clients]
                assert order == [*ports[1:], ports[0]]
                one.listener.sweep(clock.now + UNTIL_IDLE_S - 5)  # 1002 and 1004 are idle, 1006 is not
                assert [flow.address[1] for flow in one.listener._flows.values()] == [*ports[3:], ports[0]]

        run(main)

    def test_one_sweep_ends_a_bounded_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("expressgateway.l4.udp._REAPS", 2)

        async def main() -> None:
            async with gateway() as one:
                one.use(one.echo().address)
                for _ in range(5):
                    await one.client().ask(b"x")
                left = []
                for _ in range(3):
                    one.listener.sweep(one.reactor.now + UNTIL_IDLE_S)
                    left.append(one.listener.open)
                assert left == [3, 1, 0]

        run(main)
