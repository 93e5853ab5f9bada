"""Flow control by consumption: a peer sends what it was granted, and is granted what was used."""

from collections.abc import Iterable

import pytest
from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.quic.packet import QuicFrameType

from expressgateway.net.quic import credit as credit_module
from expressgateway.net.quic.credit import MAX_GRANTS, MAX_RENEWALS, NEVER, Credit, varint
from expressgateway.net.quic.engine import Engine
from expressgateway.net.quic.events import FLOW_CONTROL_ERROR, Address
from expressgateway.net.quic.tls import Grants
from tests.net.quic.world import (
    ROUND_TRIP_S,
    AioClient,
    AioServer,
    Ear,
    End,
    Fate,
    Link,
    OurClient,
    OurServer,
    Weather,
    add_frame,
    both_open,
    faithful,
    noise,
)

STREAM = 262_144
CONNECTION = 1_048_576


def holding(fate: Fate = faithful, grants: Grants | None = None) -> tuple[Link, AioClient, OurServer]:
    """A server that uses nothing by itself."""
    client = AioClient()
    server = OurServer(Ear(holds=True), grants=grants)
    link = Link(client, server, fate)
    both_open(link)
    return link, client, server


class TestWindows:
    def test_a_stream_that_nobody_reads_stops_at_its_window(self) -> None:
        link, client, server = holding()
        stream_id = client.send(noise(STREAM * 3))
        link.run(seconds=5)
        assert len(server.ear.data[stream_id]) == STREAM

    def test_its_siblings_go_on(self) -> None:
        link, client, server = holding()
        stuck = client.send(noise(STREAM * 3))
        link.run(seconds=5)
        server.ear.holds = False
        other = client.send(noise(3_000_000, 2))
        link.run(lambda: other in server.ear.finished, 20)
        assert len(server.ear.data[stuck]) == STREAM

    def test_consumption_opens_it_again(self) -> None:
        link, client, server = holding()
        data = noise(STREAM * 3)
        stream_id = client.send(data)
        for turn in range(1, 4):
            link.run(seconds=2)
            assert len(server.ear.data[stream_id]) == STREAM * turn
            server.ear.use(stream_id)
            link.flush()
        link.run(lambda: stream_id in server.ear.finished)
        assert server.ear.data[stream_id] == data

    def test_and_by_no_more_than_was_used(self) -> None:
        link, client, server = holding()
        stream_id = client.send(noise(STREAM * 3))
        link.run(seconds=2)
        server.ear.use(stream_id, 1000)
        link.run(seconds=2)
        assert len(server.ear.data[stream_id]) == STREAM + 1000

    def test_the_connections_window(self) -> None:
        link, client, server = holding()
        ids = [client.send(noise(STREAM * 2, n)) for n in range(8)]
        link.run(seconds=5)
        assert sum(len(server.ear.data[one]) for one in ids) == CONNECTION
        server.ear.holds = False
        for one in ids:
            server.ear.use(one)
        link.run(lambda: server.ear.finished.issuperset(ids), 20)

    def test_our_client_grants_as_little(self) -> None:
        client = OurClient(Ear(holds=True))
        server = AioServer()
        link = Link(client, server)
        both_open(link)
        stream_id = client.engine.open_stream(False)
        assert stream_id is not None
        client.engine.send(stream_id, noise(STREAM * 3), True)
        link.run(seconds=5)
        assert len(client.ear.data[stream_id]) == STREAM
        client.ear.holds = False
        client.ear.use(stream_id)
        link.run(lambda: stream_id in client.ear.finished)

    def test_bytes_used_after_a_reset_count_for_the_connection(self) -> None:
        link, client, server = holding()
        stuck = client.send(noise(STREAM * 2), end=False)
        link.run(seconds=2)
        client.quic.reset_stream(stuck, 7)
        link.run(lambda: stuck in server.ear.resets)
        assert server.ear.resets == {stuck: 7}
        server.ear.use(stuck)
        balance = server.engine._credit._connection
        assert balance.consumed == balance.received

    def test_a_grant_for_more_streams_than_fit_into_one_packet(self) -> None:
        count = MAX_GRANTS + 30
        link, client, server = holding(grants=Grants(1000, 1_000_000, streams=count))
        ids = [client.send(noise(2000, n)) for n in range(count)]
        link.run(seconds=3)
        assert all(len(server.ear.data[one]) == 1000 for one in ids)
        for one in ids:
            server.ear.use(one)
        for data, _ in server.engine.transmit(link.now, 64):
            link.throw(client, data, server.address)
        assert not server.engine._credit.is_due, "some are left for a next time that may not come"
        link.run(lambda: server.ear.finished.issuperset(ids), 10 * ROUND_TRIP_S)


class Thief:
    """Drops what our end sends of its own, so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.left = times
        self.taken = 0
        self._ours: set[bytes] = set()
        send = Engine._send_credit

        def marked(engine: Engine, out: list[tuple[bytes, Address]]) -> None:
            before = len(out)
            send(engine, out)
            self._ours.update(data for data, _ in out[before:])

        monkeypatch.setattr(Engine, "_send_credit", marked)

    def __call__(self, sender: End, data: bytes, number: int) -> Iterable[tuple[float, bytes]]:
        if data in self._ours and self.left:
            self.left -= 1
            self.taken += 1
            return ()
        return faithful(sender, data, number)


class TestLostGrants:
    @pytest.mark.parametrize("times", [1, 2, 5])
    def test_are_renewed(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        # aioquic never says that it is blocked.
        thief = Thief(monkeypatch, times)
        link, client, server = holding(thief)
        data = noise(STREAM * 2)
        stream_id = client.send(data)
        link.run(seconds=2)
        server.ear.holds = False
        server.ear.use(stream_id)
        link.run(lambda: stream_id in server.ear.finished, 10)
        assert thief.taken == times

    def test_also_if_more_came_after_the_grant_was_sent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        thief = Thief(monkeypatch, 1)
        client = AioClient()
        server = OurServer()
        link = Link(client, server, thief)
        both_open(link)
        stream_id = client.send(noise(STREAM * 2))
        link.run(lambda: stream_id in server.ear.finished, 2)
        assert thief.taken == 1

    def test_the_connections(self, monkeypatch: pytest.MonkeyPatch) -> None:
        thief = Thief(monkeypatch, 3)
        link, client, server = holding(thief)
        ids = [client.send(noise(STREAM * 2, n)) for n in range(8)]
        link.run(seconds=3)
        server.ear.holds = False
        for one in ids:
            server.ear.use(one)
        link.run(lambda: server.ear.finished.issuperset(ids), 10)
        assert thief.taken == 3

    def test_who_says_that_it_is_blocked_is_told_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        thief = Thief(monkeypatch, 1)
        link, client, server = holding(thief)
        stream_id = client.send(noise(STREAM * 2))
        link.run(seconds=2)
        server.ear.use(stream_id)
        link.run(seconds=ROUND_TRIP_S)
        assert len(server.ear.data[stream_id]) == STREAM
        add_frame(client, QuicFrameType.STREAM_DATA_BLOCKED, varint(stream_id) + varint(STREAM))
        link.run(lambda: len(server.ear.data[stream_id]) > STREAM, 2 * ROUND_TRIP_S)

    def test_who_has_nothing_to_send_is_not_told_for_ever(self) -> None:
        link, client, server = holding()
        stream_id = client.send(noise(STREAM), end=False)
        link.run(seconds=2)
        server.ear.use(stream_id)
        link.flush()
        before = link.count[server]
        link.run(seconds=25)
        assert link.count[server] - before <= 2 * MAX_RENEWALS
        assert server.engine._credit.renew_at == NEVER


def boundless(client: AioClient) -> None:
    """It heeds no limit any more."""
    quic = client.quic
    quic._remote_max_data = 1 << 40
    for stream in quic._streams.values():
        stream.max_stream_data_remote = 1 << 40
    for name in ("bidi_local", "bidi_remote", "uni"):
        setattr(quic, f"_remote_max_stream_data_{name}", 1 << 40)


class TestCheats:
    def test_more_than_a_stream_was_granted(self) -> None:
        link, client, server = holding()
        boundless(client)
        client.send(noise(STREAM + 1))
        link.run(lambda: client.ended, 5)
        assert client.ended is not None
        assert client.ended.error_code == FLOW_CONTROL_ERROR
        assert server.ear.ended is not None
        assert server.ear.ended.is_ours

    def test_more_than_the_connection_was_granted(self) -> None:
        link, client, _ = holding()
        boundless(client)
        for n in range(6):
            client.send(noise(STREAM - 100, n))
        link.run(lambda: client.ended, 5)
        assert client.ended is not None
        assert client.ended.error_code == FLOW_CONTROL_ERROR

    def test_a_final_size_beyond_the_grant(self) -> None:
        link, client, _ = holding()
        stream_id = client.send(b"x", end=False)
        link.run(seconds=1)
        body = varint(stream_id) + varint(9) + varint(STREAM + 1)
        add_frame(client, QuicFrameType.RESET_STREAM, body)
        link.run(lambda: client.ended, 5)
        assert client.ended is not None
        assert client.ended.error_code == FLOW_CONTROL_ERROR

    def test_final_sizes_of_reset_streams_add_up(self) -> None:
        # RFC 9000 4.5: what was never sent counts all the same, or the windows would drift apart.
        link, client, server = holding()
        for _ in range(4):
            stream_id = client.send(b"x", end=False)
            link.run(seconds=1)
            add_frame(client, QuicFrameType.RESET_STREAM, varint(stream_id) + varint(9) + varint(STREAM))
            link.run(seconds=1)
        balance = server.engine._credit._connection
        assert server.ear.ended is None
        assert balance.received == 4 * STREAM
        assert balance.received - balance.consumed == 4  # what was delivered, which nobody has used yet
        assert balance.granted > CONNECTION

    def test_a_reset_behind_the_end_counts_nothing_twice(self) -> None:
        # RFC 9000 3.1: a sender may still reset what it has sent completely, as long as it is unacknowledged.
        link, client, server = holding(grants=Grants(STREAM, 2 * STREAM))
        server.ear.holds = False
        for n in range(10):
            stream_id = client.send(noise(STREAM, n))
            link.run(lambda one=stream_id: one in server.ear.finished)  # type: ignore[misc]
            body = varint(stream_id) + varint(9) + varint(STREAM)
            add_frame(client, QuicFrameType.RESET_STREAM, body)
            link.run(seconds=0.3)
            assert server.ear.ended is None
        balance = server.engine._credit._connection
        assert balance.received == balance.consumed == 10 * STREAM
        assert server.ear.resets == {}

    def test_an_end_that_moves(self) -> None:
        link, client, _ = holding()
        stream_id = client.send(b"x" * 10)
        link.run(seconds=1)
        add_frame(client, QuicFrameType.RESET_STREAM, varint(stream_id) + varint(9) + varint(11))
        link.run(lambda: client.ended, 5)
        assert client.ended is not None
        assert client.ended.error_code == 0x6  # FINAL_SIZE_ERROR

    @pytest.mark.parametrize(("piece", "room"), [(1, 1000), (1000, 1000), (1, 100)])
    def test_what_comes_out_of_order_is_bounded_for_the_connection(self, piece: int, room: int) -> None:
        # The core bounds it for each stream, and for each byte that comes alone it takes a hundred.
        link, client, server = holding()
        sent = 0
        while server.ear.ended is None:
            stream_id = client.quic.get_next_available_stream_id()
            client.quic._get_or_create_stream_for_send(stream_id)
            at = 1
            while at < STREAM - 1000 and server.ear.ended is None:
                frames = b""
                while len(frames) < room:
                    frames += b"\x0e" + varint(stream_id) + varint(at) + varint(piece) + bytes(piece)
                    at += piece + 1
                add_frame(client, 0x01, frames)
                link.now += room / 1_000_000
                sent += len(frames)
                for data, _ in client.transmit(link.now):
                    server.receive(data, client.address, link.now)
                for data, _ in server.transmit(link.now):
                    client.receive(data, server.address, link.now)
                assert sent < 5 * CONNECTION
        assert server.ear.ended.code == FLOW_CONTROL_ERROR
        assert sent > 2 * CONNECTION

    @pytest.mark.parametrize("loss", [0.1, 0.2])
    def test_a_bad_link_is_no_attack(self, loss: float) -> None:
        client, server = AioClient(), OurServer(Ear(), grants=Grants(STREAM, STREAM))
        link = Link(client, server)
        both_open(link)
        link.fate = Weather(4, drop=loss, duplicate=0.3, reorder=0.5)
        most = 0
        ids = [client.send(noise(400_000, n)) for n in range(5)]
        link.flush()
        while not server.ear.finished.issuperset(ids):
            assert link.step(1000)
            most = max(most, server.engine._waiting_bytes)
            assert server.engine._unasked < 200
        assert most < 2 * STREAM
        assert server.ear.endings == 0

    def test_small_messages_are_no_attack(self) -> None:
        """A thousand a second, each in a packet of its own, and nothing is answered."""
        link, client, server = holding()
        server.ear.holds = False
        stream_id = client.send(b"x", end=False)
        for _ in range(3000):
            client.send(bytes(20), end=False, stream_id=stream_id)
            link.run(seconds=0.001)
            assert server.engine._waiting_bytes < 2000
        assert server.ear.endings == 0


class TestCredit:
    def test_streams_are_forgotten(self) -> None:
        link, client, server = holding()
        server.ear.holds = False
        server.ear.echoes = True
        ids = [client.send(noise(100_000, n)) for n in range(20)]
        link.run(lambda: client.finished.issuperset(ids), 20)
        link.run(seconds=3)
        credit = server.engine._credit
        assert credit._streams == credit._due == credit._unproved == {}
        assert server.engine._finished == set()

    def test_frames_are_bounded(self) -> None:
        credit = Credit(100, 1000)
        for stream_id in range(0, 4 * 200, 4):
            credit.receive(stream_id, 100, False)
            credit.consume(stream_id, 100)
        sizes = []
        while credit.is_due:
            sizes.append(len(credit.frames(0.0, 0.1)))
        assert len(sizes) > 1
        assert max(sizes) <= 17 * MAX_GRANTS

    @pytest.mark.parametrize("value", [0, 63, 64, 16383, 16384, (1 << 30) - 1, 1 << 30, (1 << 62) - 1])
    def test_varints(self, value: int) -> None:
        assert Buffer(data=varint(value)).pull_uint_var() == value
        assert credit_module.MAX_GRANTS * 17 + 60 < 1200
