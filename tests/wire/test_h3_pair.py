"""The two roles against each other, and each against ``aioquic``'s HTTP/3, which we did not write."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from aioquic.h3.connection import H3Connection
from aioquic.h3.events import DataReceived, H3Event, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import QuicEvent, StreamDataReceived, StreamReset

from expressgateway.wire.errors import StreamResetError
from expressgateway.wire.h3 import core
from expressgateway.wire.h3.qpack import QpackDecoder, QpackEncoder
from expressgateway.wire.head import Fields, ResponseHead
from tests.wire.h3_world import CANCELLED, ClientWorld, ServerWorld, World, request
from tests.wire.recorder import Recorder, answer, no_answer

CUTS = pytest.mark.parametrize("cut", [0, 1, 7, 1000])
TABLE = {"peer": ((1, 4096), (7, 16))}


class Pair:
    """A client and a server joined in memory; bytes cross in cuts of any size, streams in any order."""

    def __init__(
        self, on_request: Callable[[Recorder], None] | None, cut: int = 0, seed: int = 0, **more: Any
    ) -> None:
        self.server = ServerWorld(on_request, raw=True, **more)
        self.client = ClientWorld(raw=True, **more)
        self.cut = cut
        self.random = random.Random(seed)
        self.said = {each: (set[int](), set[int]()) for each in (0, 1)}
        self.run()

    def _cross(self, source: World, into: World, side: int) -> bool:
        out, source.transport.outgoing = source.transport.outgoing, []
        source.flush()
        by_stream: dict[int, list[tuple[int, bytes, bool]]] = {}
        for each in out:
            by_stream.setdefault(each[0], []).append(each)
        order = list(by_stream)
        self.random.shuffle(order)
        resets, stops = self.said[side]
        for stream_id in order:
            raw = b"".join(data for _, data, _ in by_stream[stream_id])
            end = any(each for _, _, each in by_stream[stream_id])
            if stream_id in source.transport.resets:
                continue
            step = self.cut or max(len(raw), 1)
            for at in range(0, len(raw), step):
                into.feed(stream_id, raw[at : at + step], end and at + step >= len(raw))
            if not raw:
                into.feed(stream_id, b"", end)
        moved = bool(out)
        for stream_id, code in list(source.transport.resets.items()):
            if stream_id not in resets:
                resets.add(stream_id)
                into.reset(stream_id, code)
                moved = True
        for stream_id, code in list(source.transport.stops.items()):
            if stream_id not in stops:
                stops.add(stream_id)
                into.stop(stream_id, code)
                moved = True
        return moved

    def run(self) -> None:
        """Until neither has anything to say."""
        for _ in range(10_000):
            moved = self._cross(self.client, self.server, 0)
            if not self._cross(self.server, self.client, 1) and not moved:
                return
        raise AssertionError("does not end")

    def close(self) -> None:
        for world in (self.server, self.client):
            assert world.transport.closed == []
            assert not world.codec.streams
            assert not world.codec._ignored
            assert not world.codec._parked
            assert not world.codec._busy
            world.account()


class TestPair:
    @CUTS
    @pytest.mark.parametrize("seed", range(3))
    def test_many_exchanges(self, cut: int, seed: int) -> None:
        """Streams overtake each other and the table that they refer to."""

        def echo(recorder: Recorder) -> None:
            stream = recorder.stream
            assert stream is not None
            stream.send_informational(ResponseHead(103, ((b"link", b"x"),)))
            stream.send_head(ResponseHead(200, ((b"x-n", b"%d" % len(recorder.payload)),)), False)
            stream.send_data(recorder.payload, False)
            stream.send_trailers(recorder.trailers or ())

        pair = Pair(echo, cut, seed)
        for round_of in range(5):
            sinks = []
            for each in range(12):
                fields = ((b"cookie", b"c=%032d" % each), (b"x", b"y" * each))
                sinks.append(pair.client.ask(request(b"POST", b"/%d" % each, headers=fields), False))
                stream = pair.client.stream
                stream.send_data(b"%d" % each * 700, False)
                stream.send_trailers(((b"sum", b"%d" % each),))
            pair.run()
            seen = {
                each.request.path: each for each in pair.server.exchanges[12 * round_of :] if each.request
            }
            for each, sink in enumerate(sinks):
                there = seen[b"/%d" % each]
                assert there.request is not None
                assert there.request.headers == ((b"cookie", b"c=%032d" % each), (b"x", b"y" * each))
                assert sink.payload == there.payload == b"%d" % each * 700
                assert sink.trailers == ((b"sum", b"%d" % each),)
                assert sink.ended
        assert len(pair.server.shell.done) == len(pair.client.shell.done) == 60
        assert len(pair.client.transport.sent[pair.client.codec.encoder_id]) > 20, "the table is used"
        pair.close()

    def test_with_the_other_libraries(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Either can do without the other."""
        monkeypatch.setattr(core, "QpackDecoder", partial(QpackDecoder, with_lsqpack=False))
        monkeypatch.setattr(core, "QpackEncoder", partial(QpackEncoder, with_qh3=False))
        self.test_many_exchanges(0, 1)
        self.test_many_exchanges(7, 2)

    @CUTS
    def test_a_long_body(self, cut: int) -> None:
        size = 20_000 if cut == 1 else 400_000
        body = random.Random(1).randbytes(size)
        pair = Pair(answer(200, body, length=size), cut)
        sink = pair.client.ask(request(b"POST", content_length=size), False)
        pair.client.stream.send_data(body, True)
        pair.run()
        assert pair.server.last.payload == sink.payload == body
        assert sink.ended
        pair.close()

    @pytest.mark.parametrize("code", [CANCELLED, 0x10B, 0x102, 8])
    @pytest.mark.parametrize("side", ["client", "server"])
    def test_reset(self, side: str, code: int) -> None:
        pair = Pair(no_answer)
        sink = pair.client.ask(request(b"POST"), False)
        pair.run()
        if side == "client":
            pair.client.stream.abort(StreamResetError(code))
        else:
            pair.server.stream().abort(StreamResetError(code))
        pair.run()
        if side == "client":
            assert isinstance(pair.server.last.error, StreamResetError)
            assert pair.server.last.aborts == 1
        else:
            assert sink.aborts == 1
        pair.close()

    def test_goaway(self) -> None:
        pair = Pair(no_answer)
        first = pair.client.ask()
        pair.run()
        pair.server.codec.go_away_soon()
        second = pair.client.ask()
        pair.run()
        pair.server.codec.go_away()
        pair.run()
        for each in (0, 1):
            pair.server.stream(each).send_head(ResponseHead(200, ()), True)
        pair.run()
        assert first.ended
        assert second.ended
        assert pair.server.shell.closed == pair.client.shell.closed == [True]

    def test_a_tunnel(self) -> None:
        def accept(recorder: Recorder) -> None:
            raise AssertionError("no end yet")

        pair = Pair(accept, websocket=True)
        sink = pair.client.ask(request(protocol=b"websocket"), False)
        pair.run()
        pair.server.last.answer = None
        pair.server.stream().send_informational(ResponseHead(101, ()))
        pair.server.stream().send_data(b"down", False)
        pair.client.stream.send_data(b"up", True)
        pair.run()
        assert pair.server.last.payload == b"up"
        assert pair.server.last.ended
        assert sink.payload == b"down"
        pair.server.stream().send_data(b"", True)
        pair.run()
        pair.close()


class Quic:
    """What ``aioquic``'s HTTP/3 needs of a QUIC connection, without one."""

    def __init__(self, is_client: bool) -> None:
        self.configuration = QuicConfiguration(is_client=is_client)
        self._is_client = is_client
        self._quic_logger = None
        self._remote_max_datagram_frame_size = None
        self._next = {False: 0 if is_client else 1, True: 2 if is_client else 3}
        self.out: list[tuple[int, bytes, bool]] = []
        self.closed: list[int] = []

    def get_next_available_stream_id(self, is_unidirectional: bool = False) -> int:
        number = self._next[is_unidirectional]
        self._next[is_unidirectional] += 4
        return number

    def send_stream_data(self, stream_id: int, data: bytes, end_stream: bool = False) -> None:
        self.out.append((stream_id, data, end_stream))

    def close(self, error_code: int, reason_phrase: str = "") -> None:
        self.closed.append(error_code)


class Foreign:
    """``aioquic``'s HTTP/3 joined to one of our roles."""

    def __init__(self, world: World, is_client: bool) -> None:
        self.world = world
        self.quic = Quic(is_client)
        self.h3 = H3Connection(self.quic)  # type: ignore[arg-type]
        self.events: list[H3Event] = []
        self.run()

    def run(self) -> None:
        for _ in range(1000):
            ours, self.world.transport.outgoing = self.world.transport.outgoing, []
            self.world.flush()
            theirs, self.quic.out = self.quic.out, []
            if not ours and not theirs:
                break
            for stream_id, data, end in ours:
                event: QuicEvent = StreamDataReceived(data=data, end_stream=end, stream_id=stream_id)
                self.events += self.h3.handle_event(event)
            for stream_id, data, end in theirs:
                self.world.feed(stream_id, data, end)
        assert self.quic.closed == []
        assert self.world.transport.closed == []
        self.world.account()

    def heads(self, stream_id: int) -> list[Any]:
        return [
            each.headers
            for each in self.events
            if isinstance(each, HeadersReceived) and each.stream_id == stream_id
        ]

    def body(self, stream_id: int) -> bytes:
        return b"".join(
            each.data
            for each in self.events
            if isinstance(each, DataReceived) and each.stream_id == stream_id
        )


class TestAioquic:
    def test_its_client(self) -> None:
        world = ServerWorld(
            answer(200, b"hello", trailers=((b"t", b"u"),), headers=((b"a", b"b"),)), raw=True
        )
        peer = Foreign(world, is_client=True)
        for number in range(0, 200, 4):
            peer.h3.send_headers(
                number,
                [
                    (b":method", b"POST"),
                    (b":scheme", b"https"),
                    (b":authority", b"example.org"),
                    (b":path", b"/%d" % number),
                    (b"user-agent", b"somebody else"),
                    (b"x-latin", b"\xe4"),
                ],
            )
            peer.h3.send_data(number, b"x" * 3000, end_stream=False)
            peer.h3.send_headers(number, [(b"sum", b"1")], end_stream=True)
            peer.run()
            seen = world.last
            assert seen.request is not None
            assert seen.request.path == b"/%d" % number
            assert seen.request.headers == ((b"user-agent", b"somebody else"), (b"x-latin", b"\xe4"))
            assert len(seen.payload) == 3000
            assert seen.trailers == ((b"sum", b"1"),)
            assert peer.heads(number) == [[(b":status", b"200"), (b"a", b"b")], [(b"t", b"u")]]
            assert peer.body(number) == b"hello"
        assert len(world.shell.done) == 50
        assert world.codec.decoder.has_insertions, "its table was used"

    def test_its_server(self) -> None:
        world = ClientWorld(raw=True)
        peer = Foreign(world, is_client=False)
        for number in range(0, 200, 4):
            fields: Fields = ((b"x-some-name", b"some value"), (b"n", b"%d" % number))
            sink = world.ask(request(b"POST", headers=fields), False)
            world.stream.send_data(b"y" * 3000, False)
            world.stream.send_trailers(((b"a", b"b"),))
            peer.run()
            assert peer.heads(number)[0][-2:] == list(fields)
            assert peer.heads(number)[1] == [(b"a", b"b")]
            assert len(peer.body(number)) == 3000
            peer.h3.send_headers(
                number, [(b":status", b"200"), (b"server", b"somebody else"), (b"x", b"\xe4")]
            )
            peer.h3.send_data(number, b"hello", end_stream=False)
            peer.h3.send_headers(number, [(b"t", b"u")], end_stream=True)
            peer.run()
            assert sink.response is not None
            assert sink.response.headers == ((b"server", b"somebody else"), (b"x", b"\xe4"))
            assert sink.payload == b"hello"
            assert sink.trailers == ((b"t", b"u"),)
        assert len(world.shell.done) == 50
        assert world.codec.decoder.has_insertions

    def test_a_stream_that_it_resets(self) -> None:
        world = ServerWorld(no_answer, raw=True)
        peer = Foreign(world, is_client=True)
        peer.h3.send_headers(
            0, [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"a"), (b":path", b"/")]
        )
        peer.run()
        peer.h3.handle_event(StreamReset(error_code=CANCELLED, stream_id=0))
        world.reset(0)
        peer.run()
        assert world.last.aborts == 1
