"""The life of relayed QUIC connections: opening, failing over, datagrams, closing, draining."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from aioquic.quic.packet import QuicErrorCode

from expressgateway.demo.certificate import make_certificate, write_certificate
from expressgateway.l4.quic_relay import LINGER_S
from tests.l4.relay_scene import relay_scene, run, until
from tests.l4.udp_gateway import datagram_socket, dead_address
from tests.quic_peers import is_stalled

if TYPE_CHECKING:
    from pathlib import Path

NO_ALPN = 0x178


class TestOpening:
    @pytest.mark.parametrize("alpn", ["relayed", "other"])
    def test_the_backend_is_offered_what_was_agreed_on(self, tmp_path: Path, alpn: str) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                backend = await one.backend(alpn=("other", "relayed"))
                one.use(backend.port)
                client = await one.client(alpn)
                server = await backend.peer()
                assert client.alpn == server.alpn == alpn

        run(main)

    def test_a_protocol_that_is_not_offered(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                backend = await one.backend()
                one.use(backend.port)
                client = await one.client("foreign")
                assert client.closed is not None
                assert client.closed.error_code == NO_ALPN
                assert not backend.peers

        run(main)

    def test_a_backend_that_speaks_something_else(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                backend = await one.backend(alpn=("other",))
                one.use(backend.port)
                client = await one.client("relayed")
                await until(lambda: client.closed is not None)
                assert client.closed is not None
                assert client.closed.error_code == QuicErrorCode.CONNECTION_REFUSED
                assert dict(one.counters.relay_errors) == {"backend_protocol": 1}

        run(main)

    def test_what_comes_early_is_not_lost(self, tmp_path: Path) -> None:
        """The client sends as soon as it may; the backend's handshake is yet to come."""

        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                backend = await one.backend(is_echo=True)
                one.use(backend.port)
                client = await one.client(is_waiting=False)
                data = os.urandom(300_000)
                stream = client.open()
                client.send(stream, data, end=True)
                client.send_datagram(b"early")
                await until(lambda: stream in client.ends)
                assert client.data[stream] == data
                await until(lambda: backend.peers[0].datagrams == [b"early"])

        run(main)

    @pytest.mark.parametrize(
        ("names", "sni", "days"), [(("wrong.example",), None, 30), ((), "wrong.example", 30), ((), None, -1)]
    )
    def test_a_certificate_that_does_not_prove_it(
        self, tmp_path: Path, names: tuple[str, ...], sni: str | None, days: float
    ) -> None:
        async def main() -> None:
            options: dict[str, Any] = {"sni": sni} if sni else {}
            async with relay_scene(tmp_path, **options) as one:
                pem = make_certificate(*(names or ("backend.example",)), days=days, local=False)
                if not sni:
                    one.back = write_certificate(tmp_path, pem, "other")
                backend = await one.backend()
                (used,) = one.use(backend.port)
                client = await one.client()
                await until(lambda: client.closed is not None)
                assert client.closed is not None
                assert client.closed.error_code == QuicErrorCode.CONNECTION_REFUSED
                assert client.closed.frame_type is not None  # the transport's, not an application's
                assert dict(one.counters.relay_errors) == {"backend_certificate": 1}
                assert used.connect_failures == used.bad == 1
                assert used.cause

        run(main)

    def test_a_certificate_of_somebody_else(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                foreign = write_certificate(
                    tmp_path, make_certificate("backend.example", local=False), "foreign"
                )
                backend = await one.backend(files=foreign)
                one.use(backend.port)
                client = await one.client()
                await until(lambda: client.closed is not None)
                assert dict(one.counters.relay_errors) == {"backend_certificate": 1}

        run(main)


class TestFailover:
    def test_another_backend_for_one_that_refuses(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                backend = await one.backend(is_echo=True)
                dead, alive = one.use(dead_address()[1], backend.port)
                for number in range(2):  # whoever is asked first
                    client = await one.client()
                    client.send(client.open(), b"hello", end=True)
                    await until(lambda client: client.data[0] == b"hello", client)
                    assert alive.responses[0] == 0
                    assert alive.in_flight == number + 1
                assert dead.connect_failures == dead.bad == 1
                assert one.pool.retries["connect"] == 1
                assert not one.counters.relay_errors

        run(main)

    def test_another_backend_for_one_with_a_wrong_certificate(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                wrong = write_certificate(tmp_path, make_certificate("x.example", local=False), "wrong")
                first = await one.backend(files=wrong)
                second = await one.backend(is_echo=True)
                one.use(first.port, second.port)
                client = await one.client()
                client.send(client.open(), b"hello", end=True)
                await until(lambda: client.data[0] == b"hello")
                assert not one.counters.relay_errors

        run(main)

    def test_another_backend_for_one_that_is_silent(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path, connect_timeout_s=1.5) as one:
                with datagram_socket("127.0.0.1") as silent:
                    backend = await one.backend(is_echo=True)
                    mute, _ = one.use(silent.getsockname()[1], backend.port)
                    client = await one.client()
                    client.send(client.open(), b"hello", end=True)
                    await until(lambda: client.data[0] == b"hello")
                    assert mute.cause == "connecting took too long"

        run(main)

    def test_no_backend_to_be_had(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                one.use(dead_address()[1], dead_address()[1])
                client = await one.client()
                await until(lambda: client.closed is not None)
                assert client.closed is not None
                assert client.closed.error_code == QuicErrorCode.CONNECTION_REFUSED
                assert dict(one.counters.relay_errors) == {"connect_refused": 1}

        run(main)

    def test_an_empty_pool(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client = await one.client()
                await until(lambda: client.closed is not None)
                assert dict(one.counters.relay_errors) == {"no_backend": 1}

        run(main)

    def test_connections_are_balanced(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                backends = [await one.backend() for _ in range(3)]
                used = one.use(*(backend.port for backend in backends))
                for _ in range(6):
                    await one.client()
                await until(lambda: all(len(backend.peers) == 2 for backend in backends))
                assert [backend.leases for backend in used] == [2, 2, 2]

        run(main)

    def test_a_client_that_leaves_while_the_backend_is_dialled(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                with datagram_socket("127.0.0.1") as silent:
                    (mute,) = one.use(silent.getsockname()[1])
                    client = await one.client()
                    await until(lambda: mute.in_flight == 1)
                    client.leave(5)
                    await until(lambda: mute.in_flight == 0)
                    assert mute.bad == 0
                    assert not one.counters.relay_errors

        run(main)


class TestDatagrams:
    def test_both_ways(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                there = [os.urandom(size) for size in (0, 1, 500, 1100)]
                for data in there:
                    client.send_datagram(data)
                    await until(lambda data: data in server.datagrams, data)
                    server.send_datagram(data[::-1])
                    await until(lambda data: data[::-1] in client.datagrams, data)
                assert server.datagrams == there
                assert one.counters.quic_datagrams == [4, 4]
                assert not one.counters.quic_dropped

        run(main)

    def test_a_backend_that_takes_none(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair(datagrams=False)
                client.send_datagram(b"lost")
                client.send(client.open(), b"not lost", end=True)
                await until(lambda: 0 in server.ends)
                assert dict(one.counters.quic_dropped) == {"not_taken": 1}
                assert client.closed is None

        run(main)

    def test_the_queue_is_bounded_and_the_newest_loses(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path, max_datagrams=3) as one:
                with datagram_socket("127.0.0.1") as silent:
                    one.use(silent.getsockname()[1])
                    client = await one.client()
                    relay = next(iter(one.listener._relays))
                    for number in range(10):
                        client.send_datagram(b"%d" % number)
                    await until(lambda: one.counters.quic_dropped.get("queue_full") == 7)
                    assert list(relay.datagrams[0]._waiting) == [b"0", b"1", b"2"]
                await until(lambda: client.closed is not None)
                assert one.counters.quic_dropped["closed"] == 3

        run(main)


class TestClosing:
    @pytest.mark.parametrize("by_client", [False, True])
    @pytest.mark.parametrize(
        ("code", "reason"), [(0, ""), (0x100, "H3_NO_ERROR"), (0x3FFF_FFFF_FFFF, "gr\u00fc\u00dfe")]
    )
    def test_an_application_close_is_carried_across(
        self, tmp_path: Path, by_client: bool, code: int, reason: str
    ) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                client.send(client.open(), b"x")
                await until(lambda: server.data[0])
                leaver, other = (client, server) if by_client else (server, client)
                leaver.leave(code, reason)
                await until(lambda: other.closed is not None)
                closed = other.closed
                assert closed is not None
                assert (closed.error_code, closed.reason_phrase) == (code, reason)
                assert closed.frame_type is None  # an application's
                assert not one.counters.relay_errors

        run(main)

    @pytest.mark.parametrize("by_client", [False, True])
    def test_a_transport_error_is_not_an_applications(self, tmp_path: Path, by_client: bool) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                leaver, other = (client, server) if by_client else (server, client)
                leaver.quic.close(
                    error_code=QuicErrorCode.PROTOCOL_VIOLATION, frame_type=0, reason_phrase="x"
                )
                leaver.transmit()
                await until(lambda: other.closed is not None)
                closed = other.closed
                assert closed is not None
                assert closed.error_code == QuicErrorCode.INTERNAL_ERROR
                assert closed.frame_type is not None
                name = "client_reset" if by_client else "backend_reset"
                assert dict(one.counters.relay_errors) == {name: 1}

        run(main)

    def test_what_was_sent_before_a_close_arrives_before_it(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                server.read_nothing()
                data = os.urandom(2_000_000)
                stream = client.open()
                client.send(stream, data, end=True)
                relay = next(iter(one.listener._relays))
                await until(lambda: server.received and is_stalled(client, stream))
                client.leave(7, "done")
                await until(lambda: relay._closing is not None)
                server.read_again()
                server.quic.send_ping(1)
                server.transmit()
                await until(lambda: server.closed is not None)
                assert server.closed is not None
                assert server.closed.error_code == 7
                taken = one.counters.relayed[0]
                assert len(server.data[stream]) == taken
                assert server.data[stream] == data[:taken]

        run(main)

    def test_a_receiver_that_does_not_read_holds_up_a_close_for_a_bounded_time(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                server.read_nothing()
                stream = client.open()
                client.send(stream, bytes(2_000_000), end=True)
                relay = next(iter(one.listener._relays))
                await until(lambda: server.received and is_stalled(client, stream))
                client.leave(7, "done")
                await until(lambda: relay._closing is not None)
                one.sweep(LINGER_S + 0.1)
                await until(lambda: server.closed is not None)
                assert server.closed is not None
                assert server.closed.error_code == 7

        run(main)

    def test_silence_of_both(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path, idle_timeout_s=1.5) as one:
                client, server = await one.pair()
                await until(lambda: client.closed is not None and server.closed is not None)
                await until(lambda: not one.listener.open)
                assert set(one.counters.relay_errors) <= {"idle"}

        run(main)

    def test_a_backend_that_vanishes(self, tmp_path: Path) -> None:
        """Its port is closed: ICMP says so."""

        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                server.vanish()
                client.send(client.open(), b"anybody there?")
                await until(lambda: client.closed is not None)
                closed = client.closed
                assert closed is not None
                assert closed.error_code == QuicErrorCode.INTERNAL_ERROR
                assert closed.frame_type is not None
                assert dict(one.counters.relay_errors) == {"backend_reset": 1}

        run(main)

    def test_a_client_that_is_kept_alive_keeps_its_backend(self, tmp_path: Path) -> None:
        """PINGs end at the gateway: it sends its own."""

        async def main() -> None:
            async with relay_scene(tmp_path, idle_timeout_s=30) as one:
                client, server = await one.pair(idle_timeout_s=2)
                ends = one.reactor.now + 4
                while one.reactor.now < ends:
                    await client.ping()
                    before = one.reactor.now
                    await until(lambda before: one.reactor.now - before > 0.1, before)
                assert server.closed is None
                assert client.closed is None

        run(main)


class TestDraining:
    def test_no_new_ones_and_the_others_go_on(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                one.listener.drain()
                late = await one.client()
                assert late.closed is not None
                assert late.closed.error_code == QuicErrorCode.CONNECTION_REFUSED
                assert dict(one.counters.rejects) == {"draining": 1}
                client.send(client.open(), b"still here", end=True)
                await until(lambda: server.data[0] == b"still here")
                assert one.listener.open == 1
                assert len(one.listener.connections()) == 1
                (told,) = one.listener.told()
                facts = told.facts()
                assert (facts.protocol, facts.ip, facts.requests, facts.state) == (
                    "quic",
                    "127.0.0.1",
                    None,
                    "active",
                )
                assert facts.port
                assert 0 < facts.began <= one.reactor.now

        run(main)

    def test_what_is_left_is_told(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                assert one.listener.go_away() == 1
                await until(lambda: client.closed is not None and server.closed is not None)
                for closed in (client.closed, server.closed):
                    assert closed is not None
                    assert closed.error_code == QuicErrorCode.NO_ERROR
                    assert closed.frame_type is not None

        run(main)
