"""Relayed QUIC streams, between peers that we did not write: both ways and of every kind."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from aioquic.h3.connection import H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived

from expressgateway.l4.relay_streams import FIRST_BYTES, STREAM_BYTES
from expressgateway.net.quic.credit import Credit
from tests.l4.relay_scene import relay_scene, run, until
from tests.quic_peers import Pinned, allow_streams, is_stalled

if TYPE_CHECKING:
    from pathlib import Path

    from aioquic.quic.events import QuicEvent

    from tests.quic_peers import QuicPeer

BULK_BYTES = 5_000_000
LONG = b"a value that is worth an entry in a table"


class TestStreams:
    def test_bidirectional_from_the_client(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                stream = client.open()
                client.send(stream, b"question", end=True)
                await until(lambda: stream in server.ends)
                assert server.data[stream] == b"question"
                server.send(stream, b"answer", end=True)
                await until(lambda: stream in client.ends)
                assert client.data[stream] == b"answer"
                await until(lambda: one.counters.quic_streams_open == 0)
                assert one.counters.quic_streams == [1, 0]
                assert one.counters.relayed == [8, 6]

        run(main)

    def test_bidirectional_from_the_backend(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                stream = server.open()
                assert stream == 1
                server.send(stream, b"question", end=True)
                await until(lambda: stream in client.ends)
                client.send(stream, b"answer", end=True)
                await until(lambda: stream in server.ends)
                assert client.data[stream] == b"question"
                assert server.data[stream] == b"answer"
                await until(lambda: one.counters.quic_streams_open == 0)
                assert one.counters.quic_streams == [0, 1]

        run(main)

    def test_unidirectional_from_both(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                client.send(client.open(unidirectional=True), b"to", end=True)
                server.send(server.open(unidirectional=True), b"fro", end=True)
                await until(lambda: 2 in server.ends and 3 in client.ends)
                assert server.data[2] == b"to"
                assert client.data[3] == b"fro"
                await until(lambda: one.counters.quic_streams_open == 0)

        run(main)

    def test_an_end_without_data(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                client.send(client.open(), b"", end=True)
                await until(lambda: 0 in server.ends)
                server.send(0, b"", end=True)
                await until(lambda: 0 in client.ends)
                await until(lambda: one.counters.quic_streams_open == 0)

        run(main)

    def test_each_direction_ends_by_itself(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                client.send(client.open(), b"all I have", end=True)
                await until(lambda: 0 in server.ends)
                for number in range(20):
                    server.send(0, b"%d" % number)
                    await until(lambda number: client.data[0].endswith(b"%d" % number), number)
                assert one.counters.quic_streams_open == 1
                server.send(0, b"", end=True)
                await until(lambda: 0 in client.ends)

        run(main)

    @pytest.mark.parametrize("unidirectional", [False, True])
    def test_bulk_both_ways_at_once(self, tmp_path: Path, unidirectional: bool) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                there, back = os.urandom(BULK_BYTES), os.urandom(BULK_BYTES)
                upload = client.open(unidirectional=unidirectional)
                client.send(upload, there, end=True)
                await until(lambda: upload in server.data)
                download = server.open(unidirectional=True) if unidirectional else upload
                server.send(download, back, end=True)
                await until(lambda: upload in server.ends and download in client.ends)
                assert server.data[upload] == there
                assert client.data[download] == back
                assert one.counters.relayed == [BULK_BYTES, BULK_BYTES]

        run(main)

    def test_many_at_once_keep_their_ids(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair(is_echo=True)
                sent = {}
                for _ in range(100):
                    stream = client.open()
                    sent[stream] = os.urandom(5000)
                    client.send(stream, sent[stream], end=True)
                await until(lambda: len(client.ends) == len(sent))
                assert server.data == sent
                assert client.data == sent

        run(main)

    def test_ids_are_kept_when_streams_begin_out_of_order(self, tmp_path: Path) -> None:
        """Protocols write stream IDs into what they say: another ID would be another stream."""

        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                assert [client.quic._get_or_create_stream_for_send(each).stream_id for each in (0, 4)] == [
                    0,
                    4,
                ]
                client.send(8, b"third", end=True)
                await until(lambda: 8 in server.ends)
                assert bytes(server.data[8]) == b"third"
                client.send(0, b"first", end=True)
                client.send(4, b"second", end=True)
                await until(lambda: {0, 4, 8} <= server.ends)
                assert server.data[0] == b"first"
                assert server.data[4] == b"second"

        run(main)


class TestHttp3:
    def test_requests_whose_headers_refer_to_each_other(self, tmp_path: Path) -> None:
        """QPACK's decoder acknowledges by stream ID what the encoder refers to (RFC 9204 4.4.1): another ID
        would end the connection."""

        async def main() -> None:
            async with relay_scene(tmp_path, alpn=("h3",)) as one:
                client, server = await one.pair()
                asking, answering = H3Connection(client.quic), H3Connection(server.quic)
                asked: dict[int, dict[bytes, bytes]] = {}
                answered: dict[int, bytes] = {}

                def serve(event: QuicEvent) -> None:
                    for each in answering.handle_event(event):
                        if isinstance(each, HeadersReceived):
                            asked[each.stream_id] = dict(each.headers)
                            answering.send_headers(
                                each.stream_id, [(b":status", b"200"), (b"x-answer", LONG)]
                            )
                            body = asked[each.stream_id][b":path"] * 1000
                            answering.send_data(each.stream_id, body, end_stream=True)
                            server.transmit()

                def read(event: QuicEvent) -> None:
                    for each in asking.handle_event(event):
                        if isinstance(each, DataReceived):
                            answered[each.stream_id] = answered.get(each.stream_id, b"") + each.data

                server.tap, client.tap = serve, read
                expected = {}
                for number in range(50):
                    stream = client.open()
                    path = b"/%d" % number
                    fields = [
                        (b":method", b"GET"),
                        (b":scheme", b"https"),
                        (b":authority", b"a.example"),
                        (b":path", path),
                        (b"x-question", LONG),
                    ]
                    asking.send_headers(stream, fields, end_stream=True)
                    client.transmit()
                    expected[stream] = path * 1000
                    await until(lambda stream: stream in client.ends, stream)
                assert answered == expected
                assert {each[b"x-question"] for each in asked.values()} == {LONG}
                # Headers were referred to and acknowledged: what the QPACK streams carried says so.
                assert max(len(client.data[3]), len(client.data[7]), len(client.data[11])) > 50
                assert client.closed is None
                assert server.closed is None

        run(main)


class TestResets:
    @pytest.mark.parametrize("unidirectional", [False, True])
    @pytest.mark.parametrize("by_client", [False, True])
    def test_a_reset_keeps_its_code(self, tmp_path: Path, unidirectional: bool, by_client: bool) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                sender, receiver = (client, server) if by_client else (server, client)
                stream = sender.open(unidirectional=unidirectional)
                sender.send(stream, b"some")
                await until(lambda: receiver.data[stream] == b"some")
                sender.reset(stream, 0x1234_5678)
                await until(lambda: stream in receiver.resets)
                assert receiver.resets == {stream: 0x1234_5678}
                assert stream not in receiver.ends
                if not unidirectional:
                    receiver.send(stream, b"the other way goes on", end=True)
                    await until(lambda: stream in sender.ends)
                await until(lambda: one.counters.quic_streams_open == 0)
                assert client.closed is None
                assert server.closed is None

        run(main)

    @pytest.mark.parametrize("unidirectional", [False, True])
    @pytest.mark.parametrize("by_client", [False, True])
    def test_a_refusal_keeps_its_code(self, tmp_path: Path, unidirectional: bool, by_client: bool) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                receiver, sender = (client, server) if by_client else (server, client)
                stream = sender.open(unidirectional=unidirectional)
                sender.send(stream, b"some")
                await until(lambda: receiver.data[stream] == b"some")
                receiver.stop(stream, 0x0BAD_CAFE)
                await until(lambda: stream in sender.stops)
                assert sender.stops == {stream: 0x0BAD_CAFE}
                # The sender's own answer (RFC 9000 3.5) is what the receiver hears.
                await until(lambda: stream in receiver.resets)
                assert receiver.resets == {stream: 0x0BAD_CAFE}
                if not unidirectional:
                    receiver.send(stream, b"the other way goes on", end=True)
                    await until(lambda: stream in sender.ends)
                await until(lambda: one.counters.quic_streams_open == 0)

        run(main)

    def test_a_stream_that_begins_with_a_reset(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                client.send(client.open(), b"")
                client.reset(0, 7)
                await until(lambda: server.resets == {0: 7})

        run(main)

    def test_a_reset_gives_up_what_is_on_its_way(self, tmp_path: Path) -> None:
        """And the windows of the connection are whole again afterwards."""

        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                for code in range(8):  # each holds a window, four of which are the connection's
                    server.read_nothing()
                    stream = client.open()
                    client.send(stream, bytes(2_000_000))
                    await until(lambda stream: is_stalled(client, stream), stream)
                    client.reset(stream, code)
                    await until(lambda stream: stream in server.resets, stream)
                    server.read_again()
                    server.stop(stream, 1)
                    server.reset(stream, 1)
                stream = client.open()
                client.send(stream, b"goes on", end=True)
                await until(lambda: stream in server.ends)

        run(main)


def allow(server: QuicPeer, more: int) -> None:
    """That many streams more, with what is sent next."""
    limit = server.quic._local_max_streams_bidi
    assert isinstance(limit, Pinned)
    limit.allow(more)


class TestBackpressure:
    @pytest.mark.parametrize("to_backend", [True, False])
    def test_a_receiver_that_does_not_read_stalls_its_sender(self, tmp_path: Path, to_backend: bool) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                sender, receiver = (client, server) if to_backend else (server, client)
                receiver.read_nothing()
                stream = sender.open(unidirectional=True)
                data = os.urandom(8_000_000)
                sender.send(stream, data, end=True)

                def is_all_delivered() -> bool:
                    """But for one window of ours behind the receiver's own: the rest is not under way any
                    more."""
                    return sender.sent_and_accepted(stream) <= len(receiver.data[stream]) + STREAM_BYTES

                await until(
                    lambda: (
                        receiver.received >= STREAM_BYTES
                        and is_stalled(sender, stream)
                        and is_all_delivered()
                    )
                )
                accepted = sender.sent_and_accepted(stream)
                assert len(receiver.data[stream]) < accepted
                assert accepted < 2_000_000
                held = [
                    side.queued(stream) for relay in one.listener._relays for side in relay._sides if side
                ]
                assert max(held) <= STREAM_BYTES
                receiver.read_again()
                sender.send_datagram(b"")  # whatever makes the receiver send its windows
                await until(lambda: stream in receiver.ends)
                assert receiver.data[stream] == data

        run(main)

    @pytest.mark.parametrize("by_client", [True, False])
    def test_a_grant_that_is_lost_is_sent_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_client: bool
    ) -> None:
        """`aioquic` does not say that it is blocked, and there is no other traffic to send it with."""
        whole = Credit.frames
        lost = 0

        def frames(credit: Credit, now: float, patience_s: float) -> bytes:
            nonlocal lost
            sent = whole(credit, now, patience_s)
            if not lost and credit._connection.granted > 4 * STREAM_BYTES:
                lost = credit._connection.granted
                return b"\x01"  # PING
            return sent

        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                sender, receiver = (client, server) if by_client else (server, client)
                monkeypatch.setattr(Credit, "frames", frames)
                stream = sender.open(unidirectional=True)
                data = os.urandom(3_000_000)
                sender.send(stream, data, end=True)
                await until(lambda: stream in receiver.ends)
                assert receiver.data[stream] == data
                assert lost

        run(main)

    def test_only_its_own_stream(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                client, server = await one.pair()
                held: set[int] = set()
                write = server.quic._write_stream_limits

                def withhold(builder: object, space: object, stream: object) -> None:
                    if stream.stream_id not in held:  # type: ignore[attr-defined]
                        write(builder=builder, space=space, stream=stream)  # type: ignore[arg-type]

                server.quic._write_stream_limits = withhold  # type: ignore[method-assign]
                slow = client.open()
                held.add(slow)
                client.send(slow, bytes(8_000_000))
                await until(lambda: slow in server.data and is_stalled(client, slow))
                other = client.open()
                data = os.urandom(3_000_000)
                client.send(other, data, end=True)
                await until(lambda: other in server.ends)
                assert server.data[other] == data

        run(main)


class TestLimits:
    def test_no_more_streams_at_once_than_configured(self, tmp_path: Path) -> None:
        """Credit is withheld, and no data is lost."""

        async def main() -> None:
            async with relay_scene(tmp_path, max_streams=4) as one:
                client, server = await one.pair()
                streams = [client.open() for _ in range(1)]
                client.send(streams[0], b"0")
                for number in range(1, 12):
                    streams.append(client.open())
                    client.send(streams[-1], b"%d" % number, end=True)
                await until(lambda: len(server.data) == 4)
                assert one.counters.quic_streams_open == 4
                assert client.quic._remote_max_streams_bidi == 4
                for stream in streams:
                    await until(lambda stream: stream in server.data, stream)
                    assert one.counters.quic_streams_open <= 4
                    if stream == streams[0]:
                        client.send(stream, b"", end=True)
                    server.send(stream, b"done", end=True)
                await until(lambda: client.ends == set(streams))
                assert {stream: bytes(data) for stream, data in server.data.items()} == {
                    stream: b"%d" % number for number, stream in enumerate(streams)
                }

        run(main)

    def test_of_all_kinds_together(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path, max_streams=4) as one:
                client, server = await one.pair()
                for unidirectional in (False, True):
                    for _ in range(4):
                        client.send(client.open(unidirectional=unidirectional), b"x")
                await until(lambda: len(server.data) == 4)
                relay = next(iter(one.listener._relays))
                await until(lambda: len(relay.streams._by_id) == 8)
                assert len(server.data) == one.counters.quic_streams_open == 4
                for number in range(8):
                    await until(lambda number: len(server.data) > number, number)
                    stream = list(server.data)[number]
                    client.send(stream, b"y", end=True)
                    await until(lambda stream: stream in server.ends, stream)
                    if not stream & 2:
                        server.send(stream, b"", end=True)
                assert len(server.data) == 8
                assert all(data == b"xy" for data in server.data.values())

        run(main)

    def test_a_backend_that_allows_fewer(self, tmp_path: Path) -> None:
        """Those that wait hold little, and never so much that the others could not end."""

        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                backend = await one.backend(prepare=allow_streams(2))
                one.use(backend.port)
                client = await one.client()
                server = await backend.peer()
                first = client.open()
                data = {first: os.urandom(400_000)}
                client.send(first, data[first][:100])
                await until(lambda: server.data[first])
                for _ in range(100):  # in all more than the connection's window
                    stream = client.open()
                    data[stream] = os.urandom(FIRST_BYTES + 1000)
                    client.send(stream, data[stream], end=True)
                relay = next(iter(one.listener._relays))
                streams = relay.streams._by_id
                await until(lambda: sum(each.waiting is not None for each in streams.values()) == 99)
                for each in streams.values():
                    if each.waiting is not None:
                        await until(lambda each: is_stalled(client, each.id), each)
                        await until(lambda each: len(each.waiting.data) == FIRST_BYTES, each)
                client.send(first, data[first][100:], end=True)
                for stream in data:
                    await until(lambda stream: stream in server.ends, stream)
                    allow(server, 1)
                    server.send(stream, b"", end=True)
                assert server.data == data

        run(main)

    def test_what_waits_can_be_given_up(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with relay_scene(tmp_path) as one:
                backend = await one.backend(prepare=allow_streams(1))
                one.use(backend.port)
                client = await one.client()
                server = await backend.peer()
                client.send(client.open(), b"first")
                await until(lambda: server.data[0])
                second, third = client.open(), client.open()
                client.send(second, b"second")
                third = second + 4
                client.send(third, b"third", end=True)
                relay = next(iter(one.listener._relays))
                await until(lambda: third in relay.streams._by_id)
                client.reset(second, 21)
                client.stop(second, 22)
                waiting = relay.streams._by_id[second].waiting
                assert waiting is not None
                await until(lambda: (waiting.reset_code, waiting.stop_code) == (21, 22))
                client.send(0, b"", end=True)
                allow(server, 2)
                server.send(0, b"", end=True)
                await until(lambda: second in server.resets and second in server.stops)
                assert (server.resets[second], server.stops[second]) == (21, 22)
                assert not server.data[second]
                await until(lambda: third in server.ends)
                assert server.data[third] == b"third"

        run(main)
