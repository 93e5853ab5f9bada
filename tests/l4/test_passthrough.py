"""Mode A, datagram by datagram: whose it is, where it goes, and what is dropped."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Any

import pytest

from expressgateway.l4.passthrough.flow import GRAIN_S, Flow
from expressgateway.l4.passthrough.flows import EVICTABLE_S
from expressgateway.l4.passthrough.listener import SILENCE_S
from expressgateway.l4.passthrough.quic_lb import ServerIds
from expressgateway.l4.passthrough.retry import RetryTokens
from expressgateway.l4.passthrough.settings import Settings
from expressgateway.net.batches import BatchSocket
from expressgateway.upstream.pool import Standing
from expressgateway.wire.quic import RETRY, read_long
from tests.l4.passthrough_world import (
    Server,
    World,
    connected,
    initial_with,
    long,
    send_cut,
    short,
    until,
    world,
)
from tests.l4.udp_gateway import FakeCensus, dead_address, run

CID = bytes(range(1, 9))
OTHER = bytes(range(101, 109))


class TestFinding:
    def test_by_the_connection_ids_of_long_headers(self) -> None:
        async def main() -> None:
            async with world() as one:
                server, client = one.server(), one.client()
                one.use(server)
                dcid = await connected(one, client, server, CID)
                assert one.listener.open == 1
                assert one.listener.knows(dcid)
                assert one.listener.knows(CID)
                for packet in (long(dcid, kind=1, size=50), short(CID), long(CID, size=1300)):
                    client.send(packet)
                    await until(lambda packet=packet: server.got[-1][0] == packet)  # type: ignore[misc]  # mypy does not infer lambdas with defaults
                assert one.listener.open == 1
                assert one.counters.datagrams == [5, 1]

        run(main)

    def test_connection_ids_that_nobody_has_seen_go_by_their_place(self) -> None:
        async def main() -> None:
            async with world() as one:
                server, client = one.server(), one.client()
                one.use(server)
                await connected(one, client, server, CID)
                packet = short(os.urandom(8))
                client.send(packet)
                await until(lambda: server.got[-1][0] == packet)
                assert one.listener.open == 1
                (told,) = one.listener.told()
                facts = told.facts()
                assert facts.protocol == "quic"
                assert (facts.ip, facts.port) == client.sock.getsockname()
                assert (facts.requests, facts.state) == (None, "active")

        run(main)

    @pytest.mark.parametrize("sizes", [(4, 8, 20), (20, 4, 8), (8, 8, 8)])
    def test_at_every_length_in_use(self, sizes: tuple[int, ...]) -> None:
        async def main() -> None:
            async with world() as one:
                server = one.server()
                one.use(server)
                cids = [os.urandom(size) for size in sizes]
                peers = []
                for cid in cids:
                    await connected(one, one.client(), server, cid)
                    peers.append(server.peer)
                assert one.listener.table.lengths == tuple(sorted(set(sizes), reverse=True))
                for cid, peer in zip(cids, peers, strict=True):
                    moved = one.client()  # from a new port, only the connection ID tells
                    packet = short(cid)
                    moved.send(packet)
                    await until(lambda packet=packet: server.got[-1][0] == packet)  # type: ignore[misc]  # as above
                    assert server.peer == peer
                assert one.counters.quic_rebinds == 3

        run(main)

    def test_several_connections_of_one_client_socket(self) -> None:
        async def main() -> None:
            async with world() as one:
                server, client = one.server(), one.client()
                one.use(server)
                cids = [os.urandom(8) for _ in range(3)]
                peers = []
                for cid in cids:
                    await connected(one, client, server, cid)
                    peers.append(server.peer)
                assert len(set(peers)) == one.listener.open == 3
                for cid, peer in [*zip(cids, peers, strict=True)] * 2:
                    packet = short(cid)
                    client.send(packet)
                    await until(lambda packet=packet: server.got[-1][0] == packet)  # type: ignore[misc]  # as above
                    assert server.peer == peer
                assert not one.counters.quic_rebinds

        run(main)

    def test_one_that_is_only_begun_does_not_take_the_place(self) -> None:
        """Anybody can send a first packet from a forged address; what goes by that address stays."""

        async def main() -> None:
            async with world() as one:
                server, client = one.server(), one.client()
                one.use(server)
                await connected(one, client, server, CID)
                peer = server.peer
                client.send(long(os.urandom(8)))  # as if it were forged
                await until(lambda: one.listener.open == 2)
                packet = short(os.urandom(8))
                client.send(packet)
                await until(lambda: server.got[-1][0] == packet)
                assert server.peer == peer

        run(main)

    def test_a_backends_retry(self) -> None:
        """Its connection ID is learned from it: what follows is the same flow's, with whatever token."""

        async def main() -> None:
            async with world() as one:
                servers = [one.server() for _ in range(5)]
                one.use(*servers)
                client = one.client()
                client.send(long(os.urandom(8)))
                await until(lambda: any(server.got for server in servers))
                (server,) = [each for each in servers if each.got]
                server.answer(long(b"\xaa\xbb", OTHER, kind=3, size=100))
                await client.receive()
                client.send(initial_with(b"token", OTHER))
                await until(lambda: len(server.got) == 2)
                assert one.listener.open == 1

        run(main)

    def test_an_unknown_version_by_version_independent_fields(self) -> None:
        async def main() -> None:
            async with world() as one:
                server, client = one.server(), one.client()
                one.use(server)
                packet = bytes((0x80,)) + long(os.urandom(30), os.urandom(40), version=0x7A7A7A7A)[1:]
                client.send(packet)
                await until(lambda: server.got)
                assert server.got[0][0] == packet
                client.send(packet)  # too long to be looked up: by its place
                await until(lambda: len(server.got) == 2)
                assert one.listener.open == 1

        run(main)

    def test_on_every_local_address(self) -> None:
        """Bound to a wildcard, answers come from where the client had sent to."""

        async def main() -> None:
            async with world(host="0.0.0.0") as one:
                server, client = one.server(), one.client()
                one.use(server)
                client.sock.connect(("127.0.0.7", one.address[1]))
                await connected(one, client, server, CID)

        run(main)


class TestBatches:
    def test_a_buffer_passes_whole_both_ways(self) -> None:
        async def main() -> None:
            async with world() as one:
                server, client = one.server(), one.client()
                one.use(server)
                await connected(one, client, server, CID)
                del server.got[:]
                sent = [short(CID, bytes((at,)) * 1000) for at in range(20)]
                send_cut(client, sent)
                await until(lambda: len(server.got) == 20)
                assert server.data == sent
                assert one.counters.datagrams[0] == 22
                back = [bytes((0x40, at)) * 500 for at in range(20)]
                server.sock.sendmsg(
                    [b"".join(back)],
                    [(socket.IPPROTO_UDP, 103, (1000).to_bytes(2, "little"))],
                    0,
                    server.peer,
                )
                assert [await client.receive() for _ in back] == back
                assert one.counters.datagrams[1] == 21

        run(main)

    def test_a_buffer_of_several_connections_is_taken_apart(self) -> None:
        async def main() -> None:
            async with world() as one:
                server, client = one.server(), one.client()
                one.use(server)
                peers = {}
                for cid in (CID, OTHER):
                    await connected(one, client, server, cid)
                    peers[cid] = server.peer
                del server.got[:]
                order = [CID, CID, OTHER, CID, OTHER, OTHER, OTHER]
                sent = [short(cid, bytes((at,)) * 100) for at, cid in enumerate(order)]
                junk = bytes((0xC0,)) + bytes((0xFF,)) * (len(sent[0]) - 1)  # a long header that is none
                send_cut(client, [*sent[:3], junk, *sent[3:]])
                await until(lambda: len(server.got) == len(sent))
                for cid in (CID, OTHER):
                    mine = [data for data, wanted in zip(sent, order, strict=True) if wanted == cid]
                    assert [data for data, peer in server.got if peer == peers[cid]] == mine
                assert sum(one.dropped.values()) == 1

        run(main)

    def test_single_datagrams_in_a_row_leave_together(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def main() -> None:
            async with world() as one:
                server, client = one.server(), one.client()
                one.use(server)
                await connected(one, client, server, CID)
                (flow,) = one.listener.table
                assert flow.batch is not None
                sizes: list[int] = []
                send = BatchSocket.send

                def noted(self: Any, datagrams: Any, *more: Any) -> int:
                    sizes.append(len(datagrams))
                    return send(self, datagrams, *more)

                monkeypatch.setattr(BatchSocket, "send", noted)
                for at in range(10):
                    client.send(short(CID, bytes((at,))))
                await until(lambda: len(server.got) == 12)
                assert sizes == [10]

        run(main)


class TestDrops:
    @pytest.mark.parametrize(
        ("packet", "reason"),
        [
            (b"\x40" + bytes(32), "unknown_connection"),
            (b"", "malformed"),
            (b"\x40", "unknown_connection"),
            (b"\xc0", "malformed"),
            (b"\xc0\0\0\0\x01\xff" + bytes(1300), "malformed"),  # a connection ID of 255 bytes in version 1
            (b"\xc0\0\0\0\x01\xff", "malformed"),
            (long(CID, size=1199), "short_initial"),
            (long(CID, version=0x1A2A3A4A, size=1199), "short_initial"),
            (long(CID[:7]), "short_dcid"),
            (long(b""), "short_dcid"),
            (long(CID, kind=1), "unknown_connection"),  # 0-RTT before its Initial
            (long(CID, kind=2), "unknown_connection"),
            (long(CID, kind=3), "unknown_connection"),
            (long(CID, version=0), "malformed"),
            (b"\x80" + long(CID)[1:], "malformed"),  # an Initial without the fixed bit
        ],
    )
    def test_what_is_nobodys_is_dropped_without_a_trace(self, packet: bytes, reason: str) -> None:
        async def main() -> None:
            async with world() as one:
                server, client = one.server(), one.client()
                one.use(server)
                client.send(packet)
                await until(lambda: one.dropped)
                assert one.dropped == {reason: 1}
                assert client.hears_nothing()
                assert not server.got
                assert one.listener.open == 0
                assert not one.listener.table._sources

        run(main)

    def test_lengths_are_configured(self) -> None:
        async def main() -> None:
            async with world(min_dcid_bytes=10, longest_cid_bytes=16) as one:
                server, client = one.server(), one.client()
                one.use(server)
                client.send(long(bytes(9)))
                await until(lambda: one.dropped)
                assert one.dropped == {"short_dcid": 1}
                client.send(long(bytes(10)))
                await until(lambda: server.got)
                server.answer(long(b"\xaa\xbb", bytes(17)))  # not looked up, and not learned
                await client.receive()
                assert one.listener.table.lengths == ()
                client.send(short(bytes(17)))
                await until(lambda: len(server.got) == 2)  # by its place
                one.client().send(short(bytes(17)))
                await until(lambda: one.dropped.get("unknown_connection") == 1)

        run(main)

    def test_what_another_worker_knows_is_handed_over(self) -> None:
        """This worker knows OTHER, its sibling CID."""

        class Shared:
            index = 0
            is_moving = False

            def __init__(self) -> None:
                self.known: dict[bytes, int] = {CID[:8]: 1}
                self.given: list[tuple[Any, ...]] = []

            def make_cid(self) -> bytes:
                raise AssertionError

            def owner(self, cid: bytes) -> int | None:
                return self.known.get(cid[:8])

            def add(self, cid: bytes) -> None:
                self.known[cid[:8]] = 0

            def remove(self, cid: bytes) -> None:
                del self.known[cid[:8]]

            def give(self, *given: Any) -> None:
                self.given.append(given)

        async def main() -> None:
            async with world() as one:
                server, client = one.server(), one.client()
                one.use(server)
                shared = Shared()
                one.listener.share(shared)
                mine, nobodys = short(CID), short(bytes(8))
                for packet in (mine, nobodys, long(CID, kind=2, size=50)):
                    client.send(packet)
                await until(lambda: len(shared.given) == 2 and one.dropped)
                assert shared.given[0] == (1, mine, len(mine), client.sock.getsockname(), [], 0)
                assert one.dropped == {"unknown_connection": 1}
                # The other end of it: what was handed over is as if it had come here.
                await connected(one, one.client(), server, OTHER)
                assert shared.known[OTHER[:8]] == 0
                moved = short(OTHER)
                one.listener.on_handed(moved, len(moved), *shared.given[0][3:])
                await until(lambda: server.got[-1][0] == moved)
                assert one.counters.quic_rebinds == 1
                one.listener.on_handed(mine, len(mine), *shared.given[0][3:])  # never twice
                assert len(shared.given) == 2
                one.listener.go_away()
                assert OTHER[:8] not in shared.known

        run(main)


class TestProof:
    def test_only_what_the_backend_chose_proves_anything(self) -> None:
        """Who forges an address can send all of the others without hearing an answer."""

        async def main() -> None:
            async with world() as one:
                server, client = one.server(), one.client()
                one.use(server)
                client.send(long(dcid := os.urandom(8)))
                await until(lambda: server.got)
                (flow,) = one.listener.table
                client.send(
                    long(CID, kind=2, size=50)
                )  # before there was an answer: nobody's, so by its place
                server.answer(long(b"\xaa\xbb", CID))
                await client.receive()
                for packet in (long(dcid), long(dcid, kind=1), short(os.urandom(8)), short(dcid)):
                    number = len(server.got)
                    client.send(packet)
                    await until(lambda number=number: len(server.got) > number)  # type: ignore[misc]  # as above
                    assert not flow.is_proven
                client.send(long(CID, kind=2, size=50))
                await until(lambda: flow.is_proven)

        run(main)

    def test_where_backends_have_no_connection_ids(self) -> None:
        async def main() -> None:
            async with world() as one:
                server, client = one.server(), one.client()
                one.use(server)
                client.send(long(os.urandom(8)))
                await until(lambda: server.got)
                server.answer(long(b"\xaa\xbb", b""))
                await client.receive()
                (flow,) = one.listener.table
                client.send(long(b"", kind=2, size=50))
                client.send(short(b""))
                await until(lambda: len(server.got) == 3)
                assert flow.is_proven

        run(main)


class TestRetry:
    def test_no_flow_before_the_address_is_proved(self) -> None:
        async def main() -> None:
            async with world(tokens=RetryTokens(bytes(32), lambda: 1_000_000)) as one:
                server, client = one.server(), one.client()
                one.use(server)
                for version in (1, 0x6B3343CF):
                    first = initial_with(b"", os.urandom(8))
                    if version != 1:
                        first = bytes((0xD0,)) + version.to_bytes(4, "big") + first[5:]
                    client.send(first)
                    answer = await client.receive()
                    assert one.listener.open == len(server.got)
                    header = read_long(answer)
                    assert header is not None
                    assert (header.type, header.version, header.destination) == (RETRY, version, b"\xaa\xbb")
                    assert len(answer) <= 3 * len(first)
                    again = initial_with(answer[header.end : -16], header.source)
                    if version != 1:
                        again = bytes((0xD0,)) + version.to_bytes(4, "big") + again[5:]
                    dropped = one.dropped.get("retry_token", 0)
                    one.client().send(again)  # another port
                    await until(lambda dropped=dropped: one.dropped.get("retry_token", 0) > dropped)  # type: ignore[misc]  # as above
                    client.send(again)
                    await until(lambda again=again: server.data[-1:] == [again])  # type: ignore[misc]  # as above
                assert one.counters.quic_retries == one.listener.open == 2
                assert one.counters.security == {"retry_token": 2}

        run(main)

    def test_what_needs_no_retry(self) -> None:
        async def main() -> None:
            async with world(tokens=RetryTokens(bytes(32), lambda: 1_000_000)) as one:
                server, client = one.server(), one.client()
                one.use(server)
                for packet in (
                    initial_with(b"foreign", os.urandom(8)),
                    long(os.urandom(8), version=0x1A2A3A4A),
                ):
                    client.send(packet)
                    await until(lambda packet=packet: server.data[-1:] == [packet])  # type: ignore[misc]  # as above
                client.send(long(os.urandom(8), size=0) + b"\xff" * 1200)  # a token longer than the packet
                await until(lambda: one.dropped == {"malformed": 1})
                assert not one.counters.quic_retries

        run(main)


class TestMoving:
    def test_strict_binding_on_every_packet_type(self) -> None:
        async def main() -> None:
            async with world(is_strict=True) as one:
                server, client = one.server(), one.client()
                one.use(server)
                dcid = await connected(one, client, server, CID)
                number = len(server.got)
                packets = [short(CID), long(CID, kind=2, size=60), long(CID), long(dcid), long(dcid, kind=1)]
                other = one.client()
                for packet in packets:
                    other.send(packet)
                await until(lambda: one.dropped.get("source_binding") == len(packets))
                assert one.counters.security == {"source_binding": len(packets)}
                assert len(server.got) == number
                assert other.hears_nothing()
                client.send(short(CID))
                await until(lambda: len(server.got) == number + 1)

        run(main)

    def test_counts_move_with_the_client(self) -> None:
        async def main() -> None:
            census = FakeCensus(per_ip=1)
            async with world(census) as one:
                server, client = one.server(), one.client()
                one.use(server)
                await connected(one, client, server, CID)
                moved = one.client("127.0.0.2")
                moved.send(short(CID))
                await until(lambda: one.counters.quic_rebinds == 1)
                assert census.inside == {"127.0.0.2": 1}
                assert one.listener.table._sources == {"127.0.0.2": 1}
                server.answer(b"\x40 to the new place")
                assert await moved.receive() == b"\x40 to the new place"
                # There is no room for another one of that address, and so none for one that moves there.
                await connected(one, client, server, OTHER)
                third = one.client("127.0.0.2")
                third.send(short(OTHER))
                await until(lambda: one.dropped.get("ip_cap") == 1)
                assert census.inside == {"127.0.0.2": 1, "127.0.0.1": 1}

        run(main)


class TestCaps:
    def test_of_one_address(self) -> None:
        async def main() -> None:
            async with world(max_per_source=2) as one:
                server = one.server()
                one.use(server)
                for _ in range(3):
                    one.client().send(long(os.urandom(8)))
                await until(lambda: one.dropped)
                assert one.dropped == one.counters.rejects == {"ip_flow_cap": 1}
                assert one.counters.security == {"connection_flood": 1}
                one.client("127.0.0.2").send(long(os.urandom(8)))
                await until(lambda: one.listener.open == 3)

        run(main)

    @pytest.mark.parametrize(
        ("census", "reason"), [(FakeCensus(1), "process_cap"), (FakeCensus(9, 1), "ip_cap")]
    )
    def test_of_the_process(self, census: FakeCensus, reason: str) -> None:
        async def main() -> None:
            async with world(census) as one:
                one.use(one.server())
                for _ in range(2):
                    one.client().send(long(os.urandom(8)))
                await until(lambda: one.dropped)
                assert one.dropped == {reason: 1}

        run(main)

    def test_flows_that_proved_nothing_make_room_first(self) -> None:
        async def main() -> None:
            async with world(max_flows=3) as one:
                server, client = one.server(), one.client()
                one.use(server)
                await connected(one, client, server, CID)
                for _ in range(50):  # a flood of first packets, each answered by the backend
                    one.client().send(long(os.urandom(8)))
                await until(lambda: one.counters.connections == 51)
                assert one.listener.open == 3
                assert one.counters.quic_evictions == 48
                client.send(packet := short(CID))
                await until(lambda: server.got[-1][0] == packet)

        run(main)

    def test_busy_ones_do_not_make_room(self) -> None:
        async def main() -> None:
            async with world(max_flows=2) as one:
                server = one.server()
                one.use(server)
                for cid in (CID, OTHER):
                    await connected(one, one.client(), server, cid)
                one.client().send(long(os.urandom(8)))
                await until(lambda: one.dropped)
                assert one.dropped == {"flow_cap": 1}
                for flow in one.listener.table:
                    flow.seen_at -= EVICTABLE_S + 1
                one.client().send(long(os.urandom(8)))
                await until(lambda: one.counters.quic_evictions == 1)
                assert not one.listener.knows(CID)  # the quietest
                assert one.listener.knows(OTHER)

        run(main)

    @pytest.mark.parametrize("kind", [errno.EMFILE, errno.EAGAIN, errno.ENOBUFS])
    def test_of_the_machine(self, monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
        """Descriptors or local ports have run out before a cap is reached: flows make room as if it were."""

        async def main() -> None:
            async with world() as one:
                server = one.server()
                one.use(server)
                connect = Flow._connect

                def limited(self: Flow, backend: Any) -> None:
                    if one.listener.open >= 3:
                        raise OSError(kind, "none left")
                    connect(self, backend)

                monkeypatch.setattr(Flow, "_connect", limited)
                client = one.client()
                await connected(one, client, server, CID)
                for _ in range(10):
                    one.client().send(long(os.urandom(8)))
                await until(lambda: one.counters.connections + one.dropped.get("no_socket", 0) == 11)
                assert one.dropped == {"no_socket": 1}
                assert one.counters.accept_errors == {errno.errorcode[kind]: 1}
                assert one.listener.open == 3
                assert one.listener.knows(CID)
                one.listener.sweep(one.reactor.now)
                assert not one.listener.table.is_full

        run(main)

    def test_what_a_full_socket_does_not_take_waits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def main() -> None:
            async with world(backlog=5) as one:
                server, client = one.server(), one.client()
                one.use(server)
                await connected(one, client, server, CID)
                del server.got[:]
                (flow,) = one.listener.table
                is_full = True
                real = BatchSocket.send

                def send(self: Any, datagrams: Any, *more: Any) -> int:
                    if is_full and self is flow.batch:
                        return 0
                    return real(self, datagrams, *more)

                with monkeypatch.context() as patch:
                    patch.setattr(BatchSocket, "send", send)
                    patch.setattr(BatchSocket, "send_cut", lambda *_: 0)
                    sent = [short(CID, bytes((at,)) * 9) for at in range(8)]
                    send_cut(client, sent)
                    await until(lambda: one.dropped)
                    assert one.dropped == {"backend_buffer_full": 3}
                    client.send(short(CID))  # behind the others: not before them
                    await until(lambda: one.dropped == {"backend_buffer_full": 4})
                    is_full = False
                    await until(lambda: len(server.got) == 5)
                assert server.data == sent[:5]
                client.send(packet := short(CID))
                await until(lambda: server.data[-1] == packet)

        run(main)


class TestIdle:
    @pytest.mark.parametrize("way", ["client", "backend"])
    def test_either_direction_counts(self, way: str) -> None:
        async def main() -> None:
            async with world(idle_s=10.0) as one:
                server, client = one.server(), one.client()
                one.use(server)
                await connected(one, client, server, CID)
                (flow,) = one.listener.table
                began = flow.seen_at
                flow.seen_at -= 9
                flow._heard_at -= 9
                one.listener._epoch_at -= GRAIN_S + 1
                if way == "client":
                    client.send(short(CID))
                else:
                    server.answer(b"\x40")
                    await client.receive()
                await until(lambda: flow.seen_at >= began)
                one.listener.sweep(began + 9)
                assert one.listener.open == 1
                one.listener.sweep(one.reactor.now + 12)
                assert one.listener.open == 0

        run(main)

    def test_off(self) -> None:
        async def main() -> None:
            async with world(idle_s=0.0) as one:
                server, client = one.server(), one.client()
                one.use(server)
                await connected(one, client, server, CID)
                one.listener.sweep(one.reactor.now + 1e9)
                assert one.listener.open == 1

        run(main)


class TestBackends:
    def test_one_that_is_gone_is_left_before_the_client_comes_again(self) -> None:
        async def main() -> None:
            async with world() as one:
                server = one.server()
                gone, there = one.use(dead_address(), server)
                for at in range(20):  # some of them are meant for the one that is gone
                    one.client().send(long(os.urandom(8)))
                    await until(lambda at=at: len(server.got) == at + 1)  # type: ignore[misc]  # as above
                outcomes = one.pool.take_outcomes()
                assert outcomes[gone.id][:2] == [0, gone.connect_failures]
                assert gone.connect_failures > 0
                assert there.in_flight == 20
                assert one.counters.relay_errors == {"connect_refused": gone.connect_failures}

        run(main)

    def test_all_gone_is_no_endless_search(self) -> None:
        async def main() -> None:
            async with world() as one:
                one.use(dead_address(), dead_address())
                one.client().send(long(os.urandom(8)))
                await until(lambda: one.dropped)
                for _ in range(20):
                    await asyncio.sleep(0)
                assert one.dropped == {"no_backend": 1}
                assert one.counters.relay_errors == {"connect_refused": 2}
                assert one.listener.open == 1  # until it is idle, or finds one

        run(main)

    def test_what_was_answered_stays_whoever_says_what(self) -> None:
        async def main() -> None:
            async with world() as one:
                server, other, client = one.server(), one.server(), one.client()
                one.use(server)
                await connected(one, client, server, CID)
                (backend,) = one.pool.backends
                one.use(other)  # a reload took it away
                client.send(packet := short(CID))
                await until(lambda: server.got[-1][0] == packet)
                one.pool.judge(Standing(down=frozenset({backend.id})))
                address = server.address
                server.close()
                client.send(short(CID))
                await until(lambda: one.counters.relay_errors == {"connect_refused": 1})
                again = one.server(port=address[1])
                client.send(packet := short(CID))
                await until(lambda: again.data[-1:] == [packet])
                assert not other.got

        run(main)


def test_silence_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with world() as one:
            silent, other = one.server(), one.server()
            backend, _ = one.use(silent, other)
            client, packet = await meant_for(one, silent)
            client.send(packet)
            await until(lambda: len(silent.got) == 2)
            one.listener.sweep(one.reactor.now + SILENCE_S + 0.1)
            assert one.counters.relay_errors == {"handshake_silence": 1}
            assert one.pool.take_outcomes() == {backend.id: [0, 1, 1, "handshake silence"]}
            client.send(packet)
            await until(lambda: other.data[-1:] == [packet])

    run(main)


def test_one_that_answers_anybody_is_not_silent() -> None:
    """Else anybody could have all backends ejected, with first packets that no server answers."""

    async def main() -> None:
        async with world() as one:
            server, other = one.server(), one.server()
            one.use(server, other)
            client, packet = await meant_for(one, server)
            client.send(packet)
            await until(lambda: len(server.got) == 2)
            good, _ = await meant_for(one, server)
            server.answer(long(b"\xaa\xbb", CID))
            await good.receive()
            one.listener.sweep(one.reactor.now + SILENCE_S + 0.1)
            assert not one.counters.relay_errors
            client.send(packet)
            await until(lambda: server.got[-1][0] == packet)

    run(main)


def test_one_that_answers_old_connections_is_not_silent() -> None:
    """Whichever side it was that spoke first."""

    async def main() -> None:
        async with world() as one:
            server, busy = one.server(), one.client()
            one.use(server)
            await connected(one, busy, server, CID)
            client, packet = await meant_for(one, server)
            client.send(packet)
            (old, new) = sorted(one.listener.table, key=lambda flow: flow.is_answered, reverse=True)
            for flow in (old, new):  # a while ago
                flow.began_at -= 2
                flow._heard_at -= 2
                one.listener.shared.heard[one.pool.backends[0]] -= 3
            one.listener._epoch_at -= GRAIN_S + 1
            busy.send(short(CID))
            await until(lambda: len(server.got) == 5)
            server.answer(b"\x40", next(peer for data, peer in server.got if data[6:14] == CID))
            await busy.receive()
            one.listener.sweep(one.reactor.now + SILENCE_S + 0.1)
            assert not one.counters.relay_errors

    run(main)


async def meant_for(one: World, server: Server) -> tuple[Any, bytes]:
    """A client, and its first packet, which went to this backend."""
    while True:
        client, packet = one.client(), long(os.urandom(8))
        client.send(packet)
        number = one.counters.datagrams[0]
        await until(lambda number=number: one.counters.datagrams[0] > number)  # type: ignore[misc]  # as above
        for _ in range(3):
            await asyncio.sleep(0)
        if server.data[-1:] == [packet]:
            return client, packet


class TestServerIds:
    IDS = ServerIds(2, 1, None)

    @staticmethod
    def cid(server_id: int) -> bytes:
        return bytes((2 << 5 | 8, server_id)) + os.urandom(7)

    def test_a_packet_of_a_connection_that_nobody_has_seen(self) -> None:
        async def main() -> None:
            async with world(server_ids=self.IDS) as one:
                a, b = one.server(), one.server()
                one.use(a, b, ids=("0a", "0b"))
                client = one.client()
                for packet, server in ((short(self.cid(11)), b), (short(self.cid(10)), a)):
                    client.send(packet)
                    await until(lambda packet=packet, server=server: server.data == [packet])  # type: ignore[misc]  # as above
                b.answer(b"\x40 answer", b.got[0][1])
                assert await client.receive() == b"\x40 answer"
                assert one.listener.open == 2
                client.send(short(self.cid(12)))  # nobody's: by its place
                await until(lambda: len(a.got) + len(b.got) == 3)
                other = one.client()
                other.send(short(self.cid(12)))
                other.send(short(bytes((7 << 5 | 8,)) + os.urandom(8)))
                await until(lambda: one.dropped == {"unknown_connection": 2})

        run(main)

    def test_a_set_that_changes(self) -> None:
        async def main() -> None:
            async with world(server_ids=self.IDS) as one:
                a, b = one.server(), one.server()
                one.use(a, ids=("0a",))
                one.client().send(short(self.cid(11)))
                await until(lambda: one.dropped == {"unknown_connection": 1})
                one.use(a, b, ids=("0a", "0b"))
                one.client().send(short(self.cid(11)))
                await until(lambda: b.got)

        run(main)

    def test_strict_binding_makes_no_flow_of_them(self) -> None:
        async def main() -> None:
            async with world(server_ids=self.IDS, is_strict=True) as one:
                one.use(one.server(), ids=("0a",))
                one.client().send(short(self.cid(10)))
                await until(lambda: one.dropped == {"source_binding": 1})
                assert one.listener.open == 0

        run(main)

    def test_known_connection_ids_stay_few(self) -> None:
        async def main() -> None:
            async with world(server_ids=self.IDS) as one:
                server, client = one.server(), one.client()
                one.use(server, ids=("0a",))
                await connected(one, client, server, self.cid(10))
                for at in range(50):
                    client.send(short(self.cid(10)))
                    await until(lambda at=at: len(server.got) == at + 3)  # type: ignore[misc]  # as above
                assert one.listener.open == 1
                assert len(one.listener.table.by_cid) == 8

        run(main)


class TestLife:
    def test_draining_takes_no_new_flows(self) -> None:
        async def main() -> None:
            async with world() as one:
                server, client = one.server(), one.client()
                one.use(server)
                await connected(one, client, server, CID)
                one.listener.stop()
                one.client().send(long(os.urandom(8)))
                client.send(packet := short(CID))
                await until(lambda: server.got[-1][0] == packet)
                assert one.dropped == {"draining": 1}
                assert one.listener.go_away() == 1

        run(main)

    def test_other_settings(self) -> None:
        async def main() -> None:
            async with world() as one:
                server, client = one.server(), one.client()
                one.use(server)
                await connected(one, client, server, CID)
                one.listener.adopt(Settings(max_flows=1, max_per_source=1, is_strict=True))
                one.client().send(short(CID))
                await until(lambda: one.dropped == {"source_binding": 1})
                one.client().send(long(os.urandom(8)))
                await until(lambda: one.dropped.get("ip_flow_cap") == 1)

        run(main)
