"""The door of an endpoint, and who comes through it: over loopback, with clients that we did not write."""

import os
import random
import socket
from typing import Any

import pytest

from expressgateway.net.batches import BatchSocket
from expressgateway.net.quic import endpoint as endpoint_module
from expressgateway.net.quic.endpoint import Budget
from expressgateway.wire import quic
from expressgateway.wire.quic import KNOWN_VERSIONS, VERSION_1, read_long
from tests.net.quic.endpoints import HANDSHAKE_TIMEOUT_S, Choked, Client, NamelessClient, Scene, scene
from tests.net.quic.test_hostile import hello, mutated
from tests.net.quic.world import ALPN, Forger, noise

CONNECTION_REFUSED = 0x2


def forged() -> bytes:
    """An Initial with a ClientHello that deserves an answer, to an ID of its own."""
    return Forger(original=os.urandom(8)).crypto(hello())


class Frozen(Budget):
    """A budget for which no time passes."""

    def spend(self, now: float) -> bool:
        return super().spend(1.0)


async def answers(one: Scene, sock: socket.socket, count: int = 1) -> list[bytes]:
    heard: list[bytes] = []

    def listen() -> bool:
        try:
            heard.append(sock.recv(65536))
        except BlockingIOError:
            pass
        return len(heard) >= count

    await one.world.until(listen, "an answer")
    return heard


async def no_answer(one: Scene, sock: socket.socket) -> None:
    await one.world.turns(10)
    with pytest.raises(BlockingIOError):
        sock.recv(65536)


class TestService:
    def test_echo(self) -> None:
        async def test(one: Scene) -> None:
            client = await one.opened()
            data = noise(1_000_000)
            stream_id = client.send(data)
            await one.world.until(lambda: stream_id in client.finished)
            assert client.data[stream_id] == data
            assert one.counters.connections == one.counters.inflight == 1
            assert one.counters.handshakes == {("TLSv1.3", "no", "ok"): 1} or one.counters.handshakes

        scene(test)

    def test_of_many_at_once(self) -> None:
        async def test(one: Scene) -> None:
            clients = [one.client() for _ in range(20)]
            await one.world.until(lambda: all(client.is_open for client in clients))
            ids = [client.send(noise(50_000, n)) for n, client in enumerate(clients)]
            await one.world.until(
                lambda: all(sid in client.finished for sid, client in zip(ids, clients, strict=True))
            )
            for n, (client, stream_id) in enumerate(zip(clients, ids, strict=True)):
                assert client.data[stream_id] == noise(50_000, n)

        scene(test)

    def test_over_ipv6(self) -> None:
        async def test(one: Scene) -> None:
            client = await one.opened()
            stream_id = client.send(b"hello")
            await one.world.until(lambda: stream_id in client.finished)

        scene(test, family=socket.AF_INET6)

    def test_a_client_of_one_link(self) -> None:
        # Its address has a zone, which no address of the core can have.
        async def test(one: Scene) -> None:
            one.endpoint.on_datagrams(forged(), 1200, ("fe80::1%lo", 9, 0, 1), [], 0)
            assert one.endpoint.open == 1
            assert one.census.inside == ["fe80::1%lo"] or one.census.inside
            await one.world.turns()

        scene(test, family=socket.AF_INET6)

    def test_of_a_client_without_a_connection_id(self) -> None:
        async def test(one: Scene) -> None:
            client = NamelessClient(one.address)
            one.clients.append(client)
            await one.world.until(lambda: client.is_open)
            data = noise(1_000_000)
            stream_id = client.send(data)
            await one.world.until(lambda: stream_id in client.finished)
            assert client.data[stream_id] == data
            assert not one.counters.quic_retries
            one.endpoint.sweep(one.reactor.now + HANDSHAKE_TIMEOUT_S + 1)
            again = client.send(b"still there")
            await one.world.until(lambda: again in client.finished)

        scene(test)

    def test_a_connection_that_is_closed_is_forgotten(self) -> None:
        async def test(one: Scene) -> None:
            client = await one.opened()
            client.quic.close(0, None, "done")
            client.flush()
            await one.world.until(lambda: one.sessions[0].is_over)
            assert one.endpoint.open == 0

        scene(test)

    def test_several_connections_in_one_buffer(self) -> None:
        async def test(one: Scene) -> None:
            sock = one.raw()
            clients = [Client(one.address, sock=sock) for _ in range(8)]
            one.clients += clients
            segments: list[int] = []
            take = one.endpoint.on_datagrams

            def counted(data: bytes, segment_bytes: int, *rest: Any) -> None:
                segments.append(-(-len(data) // segment_bytes))
                take(data, segment_bytes, *rest)

            one.endpoint.on_datagrams = counted  # type: ignore[method-assign, assignment]
            now = one.world.loop.time()
            first = [data for client in clients for data, _ in client.transmit(now)]
            assert {len(data) for data in first} == {1200}
            batch = BatchSocket(sock)
            assert batch.send(first, None) == len(first)
            await one.world.until(lambda: one.endpoint.open == 8)
            assert max(segments) > 1, "the kernel gave them one by one: nothing was tested"
            by_cid = {client.quic.host_cid: client for client in clients}

            def exchange() -> bool:
                out: list[bytes] = []
                while True:
                    try:
                        data = sock.recv(65536)
                    except BlockingIOError:
                        break
                    header = read_long(data)
                    cid = header.destination if header is not None else data[1:9]
                    by_cid[cid].take(data)
                for client in clients:
                    out += [data for data, _ in client.transmit(one.world.loop.time())]
                batch.send(out, None)
                return all(client.is_open for client in clients)

            # GRO would join what comes to this socket, too.
            sock.setsockopt(socket.IPPROTO_UDP, 104, 0)
            await one.world.until(exchange, "all are served")
            assert one.endpoint.open == 8

        scene(test)

    def test_a_hello_of_two_datagrams_in_one_buffer(self) -> None:
        # Post-quantum key shares: the second datagram belongs to the connection that the first one begins.
        async def test(one: Scene) -> None:
            sock = one.raw()
            client = Client(
                one.address, sock=sock, alpn_protocols=[ALPN, *(f"{n:03}" * 50 for n in range(12))]
            )
            one.clients.append(client)
            first = [data for data, _ in client.transmit(one.world.loop.time())]
            assert [len(data) for data in first] == [1200, 1200]
            one.endpoint.on_datagrams(b"".join(first), 1200, sock.getsockname(), [], 0)
            assert one.endpoint.open == 1
            assert one.counters.connections == 1

            def exchange() -> bool:
                try:
                    client.take(sock.recv(65536))
                except BlockingIOError:
                    pass
                for data, _ in client.transmit(one.world.loop.time()):
                    sock.send(data)
                return client.is_open

            await one.world.until(exchange)

        scene(test)

    def test_a_full_socket(self) -> None:
        async def test(one: Scene) -> None:
            choked = Choked(one.batch.sock, 3)
            one.batch.sock = choked  # type: ignore[assignment]
            clients = [one.client() for _ in range(4)]
            await one.world.until(lambda: all(client.is_open for client in clients))
            data = noise(400_000)
            ids = [client.send(data) for client in clients]
            await one.world.until(
                lambda: all(sid in client.finished for sid, client in zip(ids, clients, strict=True))
            )
            assert all(client.data[sid] == data for sid, client in zip(ids, clients, strict=True))
            assert choked.refusals > 10
            await one.world.until(lambda: not one.endpoint._blocked)
            assert await one.world.batches_in() < 20

        scene(test)

    def test_what_a_peer_does_not_read_waits_within_bounds(self) -> None:
        async def test(one: Scene) -> None:
            client = await one.opened()
            choked = Choked(one.batch.sock, 1 << 60)  # nothing is taken from now on
            one.batch.sock = choked  # type: ignore[assignment]
            client.send(noise(200_000))
            connection = one.endpoint.connections()[0]
            await one.world.until(lambda: connection._unsent)
            await one.world.turns(20)
            assert len(connection._unsent) <= 66
            one.batch.sock = one.sock
            await one.world.until(lambda: 0 in client.finished)

        scene(test)


class TestDoor:
    def test_a_version_that_is_not_offered(self) -> None:
        async def test(one: Scene) -> None:
            sock = one.raw()
            initial = bytes.fromhex("c01a2a3a4a") + b"\x08original\x06source" + bytes(1180)
            sock.send(initial)
            (answer,) = await answers(one, sock)
            header = read_long(answer)
            assert header is not None
            assert (header.version, header.destination, header.source) == (0, b"source", b"original")
            offered = [int.from_bytes(answer[at : at + 4], "big") for at in range(header.end, len(answer), 4)]
            assert tuple(offered) == KNOWN_VERSIONS
            assert one.endpoint.open == 0

        scene(test)

    def test_a_client_finds_a_common_version(self) -> None:
        async def test(one: Scene) -> None:
            await one.opened(supported_versions=[0x1A2A3A4A, VERSION_1], original_version=0x1A2A3A4A)

        scene(test)

    @pytest.mark.parametrize("data", [bytes.fromhex("c01a2a3a4a") + b"\x08original\x06source" + bytes(1100)])
    def test_a_short_one_of_another_version(self, data: bytes) -> None:
        async def test(one: Scene) -> None:
            sock = one.raw()
            sock.send(data)
            await no_answer(one, sock)

        scene(test)

    def test_version_negotiation_is_not_answered(self) -> None:
        async def test(one: Scene) -> None:
            sock = one.raw()
            sock.send(bytes.fromhex("c000000000") + b"\x08original\x06source" + bytes(1180))
            await no_answer(one, sock)

        scene(test)

    @pytest.mark.parametrize("size", [200, 1199])
    def test_a_short_initial(self, size: int) -> None:
        async def test(one: Scene) -> None:
            sock = one.raw()
            sock.send(Forger().initial(b"\x01", size=size))
            await no_answer(one, sock)
            assert one.counters.dropped == {"short_initial": 1}
            assert one.endpoint.open == 0

        scene(test)

    def test_a_connection_id_too_short_to_be_random(self) -> None:
        async def test(one: Scene) -> None:
            sock = one.raw()
            sock.send(Forger(original=b"7 bytes").crypto(hello()))
            await no_answer(one, sock)
            assert one.endpoint.open == 0

        scene(test)

    def test_too_big(self) -> None:
        async def test(one: Scene) -> None:
            sock = one.raw()
            sock.send(Forger().initial(b"\x01", size=1400))
            await no_answer(one, sock)
            assert one.counters.dropped == {"too_big": 1}

        scene(test)

    def test_retry_always(self) -> None:
        async def test(one: Scene) -> None:
            client = await one.opened()
            stream_id = client.send(noise(100_000))
            await one.world.until(lambda: stream_id in client.finished)
            assert one.counters.quic_retries == 1
            sock = one.raw()
            sock.send(forged())
            (answer,) = await answers(one, sock)
            assert len(answer) <= 1200
            assert one.counters.quic_retries == 2
            assert one.endpoint.open == 1, "something is kept for who has proved nothing"

        scene(test, retry="always")

    def test_a_token_from_elsewhere(self) -> None:
        async def test(one: Scene) -> None:
            sock = one.raw()
            sock.send(forged())
            (answer,) = await answers(one, sock)
            header = read_long(answer)
            assert header is not None
            token = answer[header.end : -16]
            other = one.raw()
            again = Forger(original=header.source).initial(b"\x06\x00\x01\x01", token=token)
            other.send(again)
            await no_answer(one, other)
            assert one.counters.dropped == {"token_address": 1}
            sock.send(again)
            await one.world.until(lambda: one.endpoint.open == 1)
            one.endpoint.connections()[0].forget()
            sock.send(again)
            await one.world.until(lambda: one.counters.security.get("quic_token_replay"))
            assert one.endpoint.open == 0

        scene(test, retry="always")

    def test_retry_when_many_are_half_open(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(endpoint_module, "HALF_OPEN_BEFORE_RETRY", 3)

        async def test(one: Scene) -> None:
            await one.opened()
            sock = one.raw()
            for _ in range(3):
                sock.send(forged())
            await one.world.until(lambda: one.endpoint.open == 4)
            assert one.counters.quic_retries == 0
            await one.opened()
            assert one.counters.quic_retries == 1
            for _ in range(5):
                sock.send(forged())
            await one.world.until(lambda: one.counters.quic_retries == 6)
            assert one.endpoint.open == 5

        scene(test, retry="adaptive")

    def test_no_room(self) -> None:
        async def test(one: Scene) -> None:
            await one.opened()
            client = one.client()
            await one.world.until(lambda: client.is_closed)
            ended = client.quic._close_event
            assert ended is not None
            assert ended.error_code == CONNECTION_REFUSED
            assert one.counters.rejects["full"] >= 1
            assert one.counters.security["connection_flood"] >= 1
            assert one.endpoint.open == 1

        scene(test, room=1)

    def test_refusals_are_rationed(self) -> None:
        async def test(one: Scene) -> None:
            one.endpoint._answers = Frozen(5)
            sock = one.raw()
            for _ in range(20):
                sock.send(forged())
            await one.world.until(lambda: one.counters.rejects.get("full") == 20)
            assert len(await answers(one, sock, 5)) == 5
            await no_answer(one, sock)

        scene(test, room=0)

    def test_a_reset_for_a_packet_of_nobody(self) -> None:
        async def test(one: Scene) -> None:
            sock = one.raw()
            for size in (22, 23, 40, 43, 44, 1200):
                cid = os.urandom(12)
                sock.send(b"\x40" + cid + os.urandom(size - 13))
                (answer,) = await answers(one, sock)
                assert quic.MIN_RESET_BYTES <= len(answer) < size
                assert answer[0] & 0xC0 == 0x40
                assert answer[-16:] == quic.reset_token(b"the listener's secret", cid)
            for size in (1, 5, 13, 20, 21):
                sock.send(b"\x40" + bytes(size - 1))
            await no_answer(one, sock)

        scene(test)

    def test_resets_are_rationed(self) -> None:
        async def test(one: Scene) -> None:
            one.endpoint._answers = Frozen(7)
            sock = one.raw()
            for _ in range(50):
                sock.send(b"\x40" + os.urandom(60))
            await one.world.until(lambda: one.counters.dropped.get("unknown_connection") == 50)
            assert len(await answers(one, sock, 7)) == 7
            await no_answer(one, sock)

        scene(test)

    def test_the_budget_grows_with_time(self) -> None:
        budget = Budget(10)
        assert [budget.spend(100.0) for _ in range(12)] == [True] * 10 + [False] * 2
        assert [budget.spend(100.25) for _ in range(4)] == [True] * 2 + [False] * 2
        assert [budget.spend(500.0) for _ in range(12)] == [True] * 10 + [False] * 2


class TestCopies:
    @pytest.mark.parametrize("retry", ["never", "always"])
    def test_a_late_copy_of_a_first_packet_begins_nothing(self, retry: str) -> None:
        async def test(one: Scene) -> None:
            firsts: list[tuple[Any, ...]] = []
            take = one.endpoint.on_datagrams

            def listen(data: bytes, *rest: Any) -> None:
                if data[0] & 0xF0 == 0xC0:
                    firsts.append((data, *rest))
                take(data, *rest)

            one.endpoint.on_datagrams = listen  # type: ignore[method-assign, assignment]
            client = await one.opened()
            await one.world.until(lambda: one.endpoint._half_open == {})
            chosen = firsts[0] if retry == "never" else firsts[1]
            take(*chosen)
            assert one.endpoint.open == one.counters.connections == 1
            assert one.counters.security == {}
            (connection,) = one.endpoint.connections()
            first = one.endpoint._connections[connection].first
            one.endpoint.sweep(one.reactor.now + HANDSHAKE_TIMEOUT_S + 1)
            assert first not in one.endpoint._by_cid
            assert not one.endpoint._newly_open
            stream_id = client.send(b"hello")
            await one.world.until(lambda: stream_id in client.finished)

        scene(test, retry=retry)


class TestEndings:
    def test_draining(self) -> None:
        async def test(one: Scene) -> None:
            client = await one.opened()
            one.endpoint.stop()
            stream_id = client.send(b"still here")
            await one.world.until(lambda: stream_id in client.finished)
            late = one.client()
            await one.world.until(lambda: late.is_closed)
            assert late.quic._close_event is not None
            assert late.quic._close_event.error_code == CONNECTION_REFUSED
            assert one.counters.rejects == {"draining": one.counters.rejects["draining"]}
            client.quic.close(0, None, "")
            client.flush()
            await one.world.until(lambda: one.sock.fileno() < 0, "the socket is closed with the last one")

        scene(test)

    def test_a_handshake_that_does_not_go_on(self) -> None:
        async def test(one: Scene) -> None:
            await one.opened()
            sock = one.raw()
            for _ in range(10):
                sock.send(forged())
            await one.world.until(lambda: one.endpoint.open == 11)
            one.endpoint.sweep(one.reactor.now + HANDSHAKE_TIMEOUT_S - 1)
            assert one.endpoint.open == 11
            one.endpoint.sweep(one.reactor.now + HANDSHAKE_TIMEOUT_S + 1)
            assert one.endpoint.open == len(one.census.inside) == 1
            assert one.counters.security["slow_handshake"] == 10
            assert one.endpoint._half_open == {}

        scene(test)

    def test_what_is_forgotten_is_not_kept_by_its_timer(self) -> None:
        async def test(one: Scene) -> None:
            sock = one.raw()
            sock.send(forged())
            await one.world.until(lambda: one.endpoint.open == 1)
            (connection,) = one.endpoint.connections()
            await one.world.turns()
            connection.forget()
            connection.due = float("inf")
            one.timers._heap.clear()
            connection.on_timer(one.reactor.now - 1)
            assert one.timers._heap == []

        scene(test)


class TestFlood:
    def test_of_initials_from_anywhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(endpoint_module, "HALF_OPEN_BEFORE_RETRY", 32)

        async def test(one: Scene) -> None:
            first = await one.opened()
            for number in range(3000):
                address = (f"127.{number % 250}.{number // 250}.9", 1 + number)
                one.endpoint.on_datagrams(forged(), 1200, address, [], 0)
                if number % 100 == 0:
                    await one.world.turns(1)
            assert one.endpoint.open <= 33
            assert len(one.endpoint._by_cid) <= 12 * 33
            assert len(one.timers._heap) <= 3 * 33
            assert len(one.endpoint.tokens._used) == 0
            assert one.counters.quic_retries >= 2900
            second = await one.opened()
            for client in (first, second):
                stream_id = client.send(noise(50_000))
                await one.world.until(lambda c=client, s=stream_id: s in c.finished)  # type: ignore[misc]
            one.endpoint.sweep(one.reactor.now + HANDSHAKE_TIMEOUT_S + 1)
            assert one.endpoint.open == 2

        scene(test, retry="adaptive")

    def test_of_anything(self) -> None:
        async def test(one: Scene) -> None:
            client = await one.opened()
            source = random.Random(5)
            (connection,) = one.endpoint.connections()
            cids = [*one.endpoint._connections[connection].cids, b"", b"short"]
            real = [forged() for _ in range(5)]
            for _ in range(4000):
                kind = source.randrange(4)
                if kind == 0:
                    data = source.randbytes(source.randrange(0, 100))
                elif kind == 1:
                    data = mutated(source, source.choice(real))
                elif kind == 2:
                    data = b"\x40" + source.choice(cids) + source.randbytes(source.randrange(60))
                else:
                    data = b"".join(mutated(source, source.choice(real))[:1300] for _ in range(3))
                segment = source.choice([len(data) or 1, 1200, 1, source.randrange(1, 1500)])
                if segment == 1:
                    data = data[:50]
                one.endpoint.on_datagrams(data, segment, ("127.0.0.9", source.randrange(1, 65536)), [], 0)
                if one.endpoint.open > 50:
                    await one.world.turns(1)
                    one.endpoint.sweep(one.reactor.now + HANDSHAKE_TIMEOUT_S + 1)
            stream_id = client.send(noise(50_000))
            await one.world.until(lambda: stream_id in client.finished)

        scene(test)
