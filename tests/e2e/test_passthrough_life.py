"""Mode A over time: backends that die, configurations that change, and floods."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from expressgateway.cli.main import main as command
from tests.e2e import harness
from tests.e2e.harness import certificate, descriptors, eventually, resident_kib
from tests.e2e.passthrough_e2e import LABELS, Gateway, is_whole, passthrough, quic_initial, run, until
from tests.e2e.quic_world import World, client
from tests.ports import free_port


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(certificate(tmp_path_factory.mktemp("quic"))) as world:
        yield world


class TestBackendsThatDie:
    def test_new_connections_go_elsewhere_and_others_go_on(self, world: World, tmp_path: Path) -> None:
        port = free_port()
        a, b = world.server("a"), world.server("b")
        with Gateway(tmp_path, passthrough(port, a, b)) as gateway:

            async def main() -> None:
                async with client(port, world.configuration()) as one:
                    survivor = await one.who()
                    gone = a if survivor == "b" else b
                    world.stop(gone)
                    for _ in range(16):
                        async with client(port, world.configuration()) as other:
                            assert await other.who() == survivor
                    await is_whole(one, 200_000)
                    failures = gateway.metric("backend_connect_failures_total", backend=gone.address)
                    assert failures > 0
                    # By then it is ejected, or not enough of them were meant for it.
                    if failures >= 5:
                        gateway.wait_metric("backend_state", backend=gone.address, state="ejected")
                        assert gateway.metric("backend_up", backend=gone.address) == 0

            run(main)

    def test_one_that_comes_back_is_used_again(self, world: World, tmp_path: Path) -> None:
        """The last one of a pool is not left for being gone once."""
        port = free_port()
        a = world.server("a")
        with Gateway(tmp_path, passthrough(port, a)):

            async def main() -> None:
                async with client(port, world.configuration()) as one:
                    assert await one.who() == "a"
                    world.stop(a)
                    world.restart(a)
                    async with client(port, world.configuration()) as other:
                        assert await other.who() == "a"

            run(main)

    def test_silence(self, world: World, tmp_path: Path) -> None:
        """No ICMP: packets fall into a hole. Clients that come again are sent elsewhere."""
        port = free_port()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as hole:
            hole.bind(("127.0.0.1", free_port()))
            dead = f"127.0.0.1:{hole.getsockname()[1]}"
            with Gateway(tmp_path, passthrough(port, dead, world.server("a"))) as gateway:

                async def main() -> None:
                    for _ in range(20):
                        async with client(port, world.configuration()) as one:
                            assert await one.who() == "a"
                        if gateway.metric("relay_errors_total", reason="handshake_silence"):
                            return

                run(main)
                assert gateway.metric("relay_errors_total", reason="handshake_silence") >= 1


class TestChanges:
    def test_a_reload_changes_backends_and_breaks_no_flow(self, world: World, tmp_path: Path) -> None:
        port = free_port()
        a, b = world.server("a"), world.server("b")
        with Gateway(tmp_path, passthrough(port, a), workers=2) as gateway:

            async def main() -> None:
                async with client(port, world.configuration()) as one:
                    assert await one.who() == "a"
                    more = "flow_idle_timeout_ms = 30000\nstrict_source_binding = true"
                    assert await asyncio.to_thread(gateway.reload, passthrough(port, b, more=more))
                    for _ in range(6):
                        async with client(port, world.configuration()) as other:
                            assert await other.who() == "b"
                    await is_whole(one, 200_000)
                    assert await one.who() == "a"

            run(main)

    def test_it_moves_and_goes(self, world: World, tmp_path: Path) -> None:
        port, other_port = free_port(), free_port()
        a = world.server("a")
        # What is removed may go on for so long: enough for what is asked of it below.
        patient = "drain_timeout_ms = 8000"
        with Gateway(tmp_path, passthrough(port, a), workers=2, runtime=patient) as gateway:

            async def main() -> None:
                async with client(port, world.configuration()) as one:
                    assert await one.who() == "a"
                    assert await asyncio.to_thread(gateway.reload, passthrough(other_port, a))
                    async with client(other_port, world.configuration()) as other:
                        assert await other.who() == "a"
                        assert await one.who() == "a", "its flows may end"
                        assert await asyncio.to_thread(
                            gateway.reload,
                            f"[[listeners]]\naddress = '127.0.0.1:{free_port()}'\nprotocol = 'udp'\n"
                            "backends = [{ address = '127.0.0.1:1' }]\n",
                        )
                        await is_whole(other, 200_000)

            run(main)

    def test_changes_at_run_time(self, world: World, tmp_path: Path) -> None:
        port = free_port()
        a, b = world.server("a"), world.server("b")
        with Gateway(tmp_path, passthrough(port, a)) as gateway:

            def do(*words: str) -> str:
                done = CliRunner().invoke(command, ["backend", *words, "--config", str(gateway.path)])
                assert done.exit_code == 0, done.output
                return done.output

            async def who() -> set[str]:
                names = set()
                for _ in range(6):
                    async with client(port, world.configuration()) as one:
                        names.add(await one.who())
                return names

            async def main() -> None:
                async with client(port, world.configuration()) as one:
                    assert await one.who() == "a"
                    await asyncio.to_thread(do, "add", "passthrough", b.address)
                    await asyncio.to_thread(do, "drain", "passthrough", a.address)
                    await asyncio.to_thread(
                        eventually, lambda: not gateway.metric("backend_up", backend=a.address), "drained"
                    )
                    assert await who() == {"b"}
                    await asyncio.to_thread(do, "enable", "passthrough", a.address)
                    await asyncio.to_thread(do, "remove", "passthrough", b.address)
                    assert await who() == {"a"}
                    assert await one.who() == "a"

            run(main)
            shown = json.loads(gateway.ask("/api/v1/pools/passthrough")[1])
            assert [backend["id"] for backend in shown["backends"]] == [a.address]

    def test_idle_flows_are_forgotten(self, world: World, tmp_path: Path) -> None:
        port = free_port()
        text = passthrough(port, world.server(), more="flow_idle_timeout_ms = 300")
        with Gateway(tmp_path, text) as gateway:

            async def main() -> None:
                async with client(port, world.configuration()) as one:
                    await one.who()

            run(main)
            eventually(lambda: not gateway.metric("connections_inflight", **LABELS), "it is forgotten")

    def test_a_drain_lets_connections_go_on(self, world: World, tmp_path: Path) -> None:
        port = free_port()
        text = passthrough(port, world.server())
        with harness.Gateway(tmp_path, text, runtime="drain_timeout_ms = 6000") as gateway:

            async def main() -> None:
                async with client(port, world.configuration()) as one:
                    await one.who()
                    gateway.process.send_signal(signal.SIGTERM)
                    await until(lambda: "draining: " in gateway.log())
                    await is_whole(one, 200_000)
                    async with client(port, world.configuration(), wait=False) as other:
                        await until(lambda: gateway.metric("udp_dropped_total", reason="draining"))
                        assert not other.protocol._connected

            run(main)
            assert gateway.process.wait(30) == 0
            assert "1 connection cut off" in gateway.log()

    def test_what_the_status_shows(self, world: World, tmp_path: Path) -> None:
        port = free_port()
        with Gateway(tmp_path, passthrough(port, world.server())) as gateway:
            (shown,) = json.loads(gateway.ask("/api/v1/status")[1])["listeners"]
            assert (shown["name"], shown["protocol"]) == ("passthrough", "passthrough")
            assert shown["bound"] == f"127.0.0.1:{port}"


class TestFloods:
    """With a well-behaved client beside them."""

    ROUNDS = 20
    PACKETS = 500

    def test_junk(self, world: World, tmp_path: Path) -> None:
        port = free_port()
        with Gateway(tmp_path, passthrough(port, world.server())) as gateway:
            (worker,) = gateway.worker_pids()
            junk = [b"\x40" + os.urandom(40 + at % 1000) for at in range(self.PACKETS)]
            sent = self._flood(world, port, [junk] * self.ROUNDS)
            dropped = gateway.metric("udp_dropped_total", **LABELS, reason="unknown_connection")
            assert dropped > sent / 10  # the kernel's queue lost the others
            assert gateway.metric("security_events_total", **LABELS, kind="quic_junk") == dropped
            assert gateway.metric("connections_total", **LABELS) == 1
            assert gateway.log().count("packets of no connection") == 1
            self._is_flat(worker, port, [junk] * self.ROUNDS)

    def test_first_packets_from_everywhere(self, world: World, tmp_path: Path) -> None:
        """From many addresses, none of which ever answers."""
        port = free_port()
        text = passthrough(port, world.server(), more="max_quic_connections = 50\nper_ip_flow_cap = 20")
        with Gateway(tmp_path, text) as gateway:
            (worker,) = gateway.worker_pids()
            rounds = [[quic_initial(os.urandom(8)) for _ in range(25)] for _ in range(40)]
            self._flood(world, port, rounds, addresses=True)
            assert gateway.metric("connections_inflight", **LABELS) <= 50
            assert gateway.metric("quic_evictions_total", **LABELS) > 0
            assert gateway.metric("udp_dropped_total", **LABELS, reason="ip_flow_cap") > 0
            assert gateway.metric("security_events_total", **LABELS, kind="connection_flood") > 0
            assert descriptors(worker) < 100
            self._is_flat(worker, port, rounds)

    def test_first_packets_where_addresses_are_proved(self, world: World, tmp_path: Path) -> None:
        """With `mint_retry` they make no flow at all. The good client here is one of before."""
        port = free_port()
        server = world.server()
        secret = tmp_path / "retry.secret"
        with Gateway(tmp_path, passthrough(port, server)) as gateway:
            (worker,) = gateway.worker_pids()
            rounds = [[quic_initial(os.urandom(8)) for _ in range(25)] for _ in range(40)]
            more = f"mint_retry = true\nretry_secret_path = '{secret}'"

            def prove() -> None:
                assert gateway.reload(passthrough(port, server, more=more))

            self._flood(world, port, rounds, addresses=True, before=prove)
            assert gateway.metric("connections_total", **LABELS) == 1
            assert gateway.metric("quic_retries_total", **LABELS) > 100
            self._is_flat(worker, port, rounds)

    def _flood(
        self,
        world: World,
        port: int,
        rounds: list[list[bytes]],
        *,
        addresses: bool = False,
        before: Callable[[], None] | None = None,
    ) -> int:
        sent = 0

        async def main() -> None:
            nonlocal sent
            async with client(port, world.configuration()) as good:
                assert await good.who() == "a"
                if before is not None:
                    await asyncio.to_thread(before)
                for number, packets in enumerate(rounds):
                    host = f"127.0.1.{number % 200 + 1}" if addresses and number % 2 else "127.0.0.3"
                    sent += send_all(port, packets, host)
                    assert await good.who() == "a"
                await is_whole(good, 100_000)

        run(main)
        return sent

    @staticmethod
    def _is_flat(worker: int, port: int, rounds: list[list[bytes]]) -> None:
        """The same once more takes no more memory."""
        before = resident_kib(worker)
        for packets in rounds:
            send_all(port, packets, "127.0.0.3")
        assert resident_kib(worker) < before + 4096


def send_all(port: int, packets: list[bytes], host: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((host, 0))
        for packet in packets:
            sock.sendto(packet, ("127.0.0.1", port))
    return len(packets)
