"""QUIC through Mode A: aioquic's client and server, unmodified, with the gateway between them."""

import json
import os
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.packet import QuicProtocolVersion

from tests.e2e.harness import certificate
from tests.e2e.passthrough_e2e import (
    LABELS,
    MEGABYTE,
    Gateway,
    is_whole,
    passthrough,
    quic_initial,
    run,
    until,
)
from tests.e2e.quic_lb_backend import Issuer, issuing
from tests.e2e.quic_world import Server, World, client
from tests.e2e.retry_backend import TokenReader, reading
from tests.ports import free_port


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(certificate(tmp_path_factory.mktemp("quic"))) as world:
        yield world


class TestOrdinaryBackends:
    def test_a_megabyte_both_ways(self, world: World, tmp_path: Path) -> None:
        port = free_port()
        with Gateway(tmp_path, passthrough(port, world.server())) as gateway:

            async def main() -> None:
                async with client(port, world.configuration()) as one:
                    assert await one.who() == "a"
                    await is_whole(one)

            run(main)
            for direction in ("from_client", "from_backend"):
                assert gateway.metric("relay_bytes_total", **LABELS, direction=direction) > MEGABYTE
            assert gateway.metric("connections_total", **LABELS) == 1
            # No key, no handshake: what passes is counted, and nothing of it is known.
            assert gateway.metric("tls_handshakes_total") == 0
            assert gateway.metric("udp_dropped_total") == 0
            assert gateway.metric("security_events_total") == 0
            pools = json.loads(gateway.ask("/api/v1/pools")[1])["pools"]
            assert [(pool["name"], pool["listeners"], pool["policy"]) for pool in pools] == [
                ("passthrough", ["passthrough"], "maglev")
            ]

    @pytest.mark.parametrize("cid_bytes", [4, 8, 20, 0])
    def test_whatever_connection_ids_they_choose(self, world: World, tmp_path: Path, cid_bytes: int) -> None:
        """4 bytes are quic-go's default; with none, all goes by the client's address."""
        port = free_port()

        def make(protocol: QuicConnectionProtocol) -> None:
            if not cid_bytes:
                protocol._quic._replenish_connection_ids = lambda: None  # type: ignore[method-assign]  # there are no others

        server = world.server(cid_bytes=cid_bytes, make_connection=make)
        with Gateway(tmp_path, passthrough(port, server)):

            async def main() -> None:
                async with client(port, world.configuration()) as one:
                    await is_whole(one, 100_000)

            run(main)

    def test_several_are_balanced_and_a_client_stays(self, world: World, tmp_path: Path) -> None:
        port = free_port()
        servers = [world.server(name) for name in "abc"]
        with Gateway(tmp_path, passthrough(port, *servers), workers=2) as gateway:

            async def main() -> None:
                counts: Counter[str] = Counter()
                for _ in range(40):
                    async with client(port, world.configuration()) as one:
                        names = {await one.who() for _ in range(3)}
                        assert len(names) == 1
                        counts.update(names)
                assert set(counts) == set("abc"), counts
                assert max(counts.values()) < 30, counts

            run(main)
            assert sum(server.connections for server in servers) == 40
            assert gateway.metric("pool_leases_total", pool="passthrough") == 40

    def test_version_2(self, world: World, tmp_path: Path) -> None:
        port = free_port()
        server = world.server(versions=[QuicProtocolVersion.VERSION_2])
        with Gateway(tmp_path, passthrough(port, server)):

            async def main() -> None:
                version = int(QuicProtocolVersion.VERSION_2)
                configuration = world.configuration(supported_versions=[version], original_version=version)
                async with client(port, configuration) as one:
                    assert await one.who() == "a"
                    assert one.quic._version == version

            run(main)

    def test_version_negotiation_is_the_backends(self, world: World, tmp_path: Path) -> None:
        """The client begins with version 1, and the backend speaks version 2 only."""
        port = free_port()
        server = world.server(versions=[QuicProtocolVersion.VERSION_2])
        with Gateway(tmp_path, passthrough(port, server)) as gateway:

            async def main() -> None:
                versions = [int(QuicProtocolVersion.VERSION_1), int(QuicProtocolVersion.VERSION_2)]
                configuration = world.configuration(supported_versions=versions, original_version=versions[0])
                async with client(port, configuration) as one:
                    assert one.quic._version == versions[1]
                    assert await one.who() == "a"

            run(main)
            # And of a version that nobody knows, in version-independent fields alone.
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.settimeout(60)
                sock.connect(("127.0.0.1", port))
                head = bytes.fromhex("c0 1a2a3a4a 08 0102030405060708 03 aabbcc")
                sock.send(head.ljust(1200, b"\0"))
                answer = sock.recv(2000)
                assert answer[1:5] == bytes(4)
                assert answer[5:9] == bytes.fromhex("03aabbcc")
                assert answer[9:18] == bytes.fromhex("08 0102030405060708")
            assert gateway.metric("udp_dropped_total") == 0

    def test_a_backends_own_retry_passes(self, world: World, tmp_path: Path) -> None:
        port = free_port()
        servers = [world.server(name, retry=True) for name in "abc"]
        with Gateway(tmp_path, passthrough(port, *servers)) as gateway:

            async def main() -> None:
                for _ in range(12):
                    async with client(port, world.configuration()) as one:
                        assert one.quic._retry_count == 1
                        await one.who()

            run(main)
            assert gateway.metric("connections_total", **LABELS) == 12
            assert gateway.metric("quic_retries_total") == 0


class TestClientsThatMove:
    def test_another_port_with_a_learned_connection_id(self, world: World, tmp_path: Path) -> None:
        port = free_port()
        servers = [world.server(name) for name in "abc"]
        with Gateway(tmp_path, passthrough(port, *servers)) as gateway:

            async def main() -> None:
                async with client(port, world.configuration()) as one:
                    name = await one.who()
                    for _ in range(3):
                        await one.rebind()
                        assert await one.who() == name
                        await is_whole(one, 200_000)

            run(main)
            assert gateway.metric("quic_rebinds_total", **LABELS) == 3
            assert gateway.metric("connections_total", **LABELS) == 1

    def test_another_port_at_another_worker(self, world: World, tmp_path: Path) -> None:
        port = free_port()
        with Gateway(tmp_path, passthrough(port, world.server()), workers=2) as gateway:

            async def main() -> None:
                async with client(port, world.configuration()) as one:
                    for _ in range(8):  # each of which comes to the other worker by a chance of one half
                        await one.who()
                        await one.rebind()
                    await is_whole(one, 200_000)

            run(main)
            assert gateway.metric("connections_total", **LABELS) == 1

    def test_another_address(self, world: World, tmp_path: Path) -> None:
        port = free_port()
        with Gateway(tmp_path, passthrough(port, world.server())) as gateway:

            async def main() -> None:
                async with client(port, world.configuration()) as one:
                    await one.who()
                    await one.rebind("127.0.0.2")
                    await is_whole(one, 200_000)

            run(main)
            assert gateway.metric("quic_rebinds_total", **LABELS) == 1

    def test_not_where_sources_are_bound(self, world: World, tmp_path: Path) -> None:
        port = free_port()
        text = passthrough(port, world.server(), more="strict_source_binding = true")
        with Gateway(tmp_path, text) as gateway:

            async def main() -> None:
                async with client(port, world.configuration()) as one:
                    await one.who()
                    await is_whole(one, 200_000)
                    await one.rebind()
                    one.protocol._quic.send_ping(1)
                    one.protocol.transmit()
                    await until(lambda: gateway.metric("udp_dropped_total", reason="source_binding"))

            run(main)
            assert gateway.metric("quic_rebinds_total") == 0
            assert gateway.metric("security_events_total", **LABELS, kind="source_binding") >= 1

    @pytest.mark.parametrize("key", [None, "8f95f09245765f80256934e50c66207f"])
    @pytest.mark.parametrize("nonce_bytes", [6, 14])
    def test_with_server_ids(self, world: World, tmp_path: Path, key: str | None, nonce_bytes: int) -> None:
        """Another port, another connection ID, another worker: the backend is in the connection ID."""
        port = free_port()
        ids = {name: bytes((0x40 + at, at)) for at, name in enumerate("abc")}
        servers = {}
        for name, id_ in ids.items():
            issuer = Issuer(3, id_, nonce_bytes, bytes.fromhex(key) if key else None)
            servers[name] = world.server(name, cid_bytes=issuer.cid_bytes, make_connection=issuing(issuer))
        backends = ", ".join(
            f'{{ address = "{server.address}", id = "{ids[name].hex()}" }}'
            for name, server in servers.items()
        )
        routing = "config_id = 3, server_id_length = 2" + (f', key = "{key}"' if key else "")
        text = f"[passthrough]\nbind_addr = '127.0.0.1:{port}'\nbackends = [{backends}]\n"
        text += f"cid_routing = {{ {routing} }}\n"
        with Gateway(tmp_path, text, workers=2) as gateway:

            async def main() -> None:
                seen = set()
                for _ in range(8):
                    async with client(port, world.configuration()) as one:
                        name = await one.who()
                        seen.add(name)
                        issued = one.change_cid()
                        assert issued[0] >> 5 == 3
                        assert await one.who() == name
                        for _ in range(3):
                            await one.rebind()  # any worker's
                            assert await one.who() == name
                            one.change_cid()
                            await one.rebind()  # both at once: nobody has seen this connection ID
                            assert await one.who() == name
                        await is_whole(one, 100_000)
                assert len(seen) > 1

            run(main)
            assert gateway.metric("security_events_total") == 0

    def test_server_ids_and_bound_sources(self, world: World, tmp_path: Path) -> None:
        port = free_port()
        issuer = Issuer(0, b"\x07", 8, None)
        server = world.server(cid_bytes=issuer.cid_bytes, make_connection=issuing(issuer))
        text = (
            f"[passthrough]\nbind_addr = '127.0.0.1:{port}'\nstrict_source_binding = true\n"
            f"backends = [{{ address = '{server.address}', id = '07' }}]\n"
            "cid_routing = { config_id = 0, server_id_length = 1 }\n"
        )
        with Gateway(tmp_path, text) as gateway:

            async def main() -> None:
                async with client(port, world.configuration()) as one:
                    await one.who()
                    one.change_cid()
                    assert await one.who() == "a"
                    one.change_cid()
                    await one.rebind()
                    one.protocol._quic.send_ping(1)
                    one.protocol.transmit()
                    await until(lambda: gateway.metric("udp_dropped_total", reason="source_binding"))

            run(main)
            assert gateway.metric("connections_total", **LABELS) == 1


class TestMintedRetry:
    def text(self, tmp_path: Path, port: int, *servers: Server) -> str:
        path = tmp_path / "retry.secret"
        return passthrough(port, *servers, more=f"mint_retry = true\nretry_secret_path = '{path}'")

    def world_of(self, world: World, tmp_path: Path) -> tuple[TokenReader, list[Server]]:
        secret = tmp_path / "retry.secret"
        secret.touch(mode=0o600)
        secret.write_bytes(bytes(range(32)))
        reader = TokenReader(secret)
        return reader, [world.server(name, make_server=reading(reader)) for name in "ab"]

    def test_a_backend_that_reads_the_token(self, world: World, tmp_path: Path) -> None:
        port = free_port()
        reader, servers = self.world_of(world, tmp_path)
        with Gateway(tmp_path, self.text(tmp_path, port, *servers), workers=2) as gateway:

            async def main() -> None:
                for number in range(6):
                    async with client(port, world.configuration()) as one:
                        original = one.quic._original_destination_connection_id
                        await is_whole(one, 50_000)
                        assert one.quic._retry_count == 1
                        told = reader.read[number]
                        assert (told["ip"], told["port"]) == (bytes((127, 0, 0, 1)), one.address[1])
                        assert told["original"] == original

            run(main)
            assert gateway.metric("quic_retries_total", **LABELS) == 6
            assert gateway.metric("connections_total", **LABELS) == 6
            assert not reader.asked_for_tokens

    def test_in_version_2(self, world: World, tmp_path: Path) -> None:
        port = free_port()
        reader, servers = self.world_of(world, tmp_path)
        with Gateway(tmp_path, self.text(tmp_path, port, *servers)):

            async def main() -> None:
                version = int(QuicProtocolVersion.VERSION_2)
                configuration = world.configuration(supported_versions=[version], original_version=version)
                async with client(port, configuration) as one:
                    await one.who()
                assert len(reader.read) == 1

            run(main)

    def test_the_secret_is_made_and_tokens_outlive_the_gateway(self, world: World, tmp_path: Path) -> None:
        port = free_port()
        text = self.text(tmp_path, port, world.server())
        initial = quic_initial(b"\x01" * 8)
        with Gateway(tmp_path, text), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            secret = tmp_path / "retry.secret"
            assert (secret.stat().st_size, secret.stat().st_mode & 0o777) == (32, 0o600)
            sock.settimeout(60)
            sock.bind(("127.0.0.1", 0))
            local = sock.getsockname()
            sock.sendto(initial, ("127.0.0.1", port))
            answer = sock.recv(2000)
            assert answer[0] >> 4 == 0xF  # Retry
            assert len(answer) <= 3 * len(initial)
        begin = 6 + answer[5]
        source = answer[begin + 1 : begin + 1 + answer[begin]]
        token = answer[begin + 1 + len(source) : -16]
        with Gateway(tmp_path, text) as gateway:
            for address, drops in ((("127.0.0.1", 0), 1), (("127.0.0.2", local[1]), 2), (local, 2)):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    sock.bind(address)
                    sock.sendto(quic_initial(source, token), ("127.0.0.1", port))
                    gateway.wait_metric("relay_bytes_total" if address == local else "udp_dropped_total")
                    assert gateway.metric("udp_dropped_total", reason="retry_token") == drops
            assert gateway.metric("connections_total", **LABELS) == 1
            assert gateway.metric("quic_retries_total") == 0

    def test_tokens_of_others_pass_untouched(self, world: World, tmp_path: Path) -> None:
        port, backend = free_port(), free_port()
        text = self.text(tmp_path, port, world.server()).replace(
            "backends = [", f'backends = ["127.0.0.1:{backend}"] # '
        )
        with (
            Gateway(tmp_path, text) as gateway,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        ):
            server.bind(("127.0.0.1", backend))
            server.settimeout(60)
            for token in (b"x", b"somebody else's", b"EGR1" + bytes(100)):
                sent = quic_initial(os.urandom(8), token)
                sock.sendto(sent, ("127.0.0.1", port))
                assert server.recv(2000) == sent
            assert gateway.metric("quic_retries_total") == 0

    def test_an_ordinary_backend_is_broken_by_it(self, world: World, tmp_path: Path) -> None:
        """Why it is off by default: the client compares connection IDs (RFC 9000 7.3)."""
        port = free_port()
        with Gateway(tmp_path, self.text(tmp_path, port, world.server())):

            async def main() -> None:
                with pytest.raises(ConnectionError):
                    async with client(port, world.configuration()):
                        pass

            run(main)
