"""The two roles against each other, and each against the Python package ``h2``, which we did not write."""

import random
from collections.abc import Callable
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest

from expressgateway.wire.errors import StreamResetError, WireError
from expressgateway.wire.head import Fields, ResponseHead
from tests.wire.h2_world import PREFACE, ClientWorld, ServerWorld, request
from tests.wire.recorder import Recorder, answer


class Pair:
    """A client and a server joined in memory; bytes cross in cuts of any size."""

    def __init__(self, on_request: Callable[[Recorder], None] | None, cut: int = 0, **more: Any) -> None:
        self.server = ServerWorld(on_request, raw=True, **more)
        self.client = ClientWorld(raw=True, **more)
        self.cut = cut

    def run(self) -> None:
        """Until neither has anything to say."""
        for _ in range(100_000):
            asked = b"".join(self.client.codec.take_out())
            answered = b"".join(self.server.codec.take_out())
            if not asked and not answered:
                return
            for codec, raw in ((self.server.codec, asked), (self.client.codec, answered)):
                step = self.cut or max(len(raw), 1)
                for at in range(0, len(raw), step):
                    codec.receive_data(raw[at : at + step], 100.0)
        raise AssertionError("does not end")


CUTS = pytest.mark.parametrize("cut", [0, 1, 7, 1000])


class TestPair:
    @CUTS
    def test_many_exchanges(self, cut: int) -> None:
        def echo(recorder: Recorder) -> None:
            stream = recorder.stream
            assert stream is not None
            stream.send_informational(ResponseHead(103, ((b"link", b"x"),)))
            stream.send_head(ResponseHead(200, ((b"x-n", b"%d" % len(recorder.payload)),)), False)
            stream.send_data(recorder.payload, False)
            stream.send_trailers(recorder.trailers or ())

        pair = Pair(echo, cut)
        pair.run()
        sinks = []
        for each in range(20):
            head = request(b"POST", b"/%d" % each, headers=((b"cookie", b"c=%d" % each), (b"x", b"y" * each)))
            sinks.append(pair.client.ask(head, False))
            stream = pair.client.stream
            stream.send_data(b"%d" % each * 700, False)
            stream.send_trailers(((b"sum", b"%d" % each),))
        pair.run()
        for each, (sink, seen) in enumerate(zip(sinks, pair.server.exchanges, strict=True)):
            assert seen.request is not None
            assert seen.request.path == b"/%d" % each
            assert seen.request.headers == ((b"cookie", b"c=%d" % each), (b"x", b"y" * each))
            assert sink.payload == seen.payload == b"%d" % each * 700
            assert sink.trailers == ((b"sum", b"%d" % each),)
            assert sink.ended
        assert len(pair.server.shell.done) == len(pair.client.shell.done) == 20
        assert not pair.server.codec.streams
        assert not pair.client.codec.streams

    @CUTS
    @pytest.mark.parametrize("window", [100, 65_535])
    def test_a_body_longer_than_any_window(self, cut: int, window: int) -> None:
        size = 20_000 if window == 100 else 400_000
        body = random.Random(1).randbytes(size)
        pair = Pair(answer(200, body, length=size), cut, stream_window=window, max_stream_window=10 * window)
        pair.run()
        sink = pair.client.ask(request(b"POST", content_length=size), False)
        pair.client.stream.send_data(body, True)
        pair.run()
        assert pair.server.last.payload == body
        assert sink.payload == body
        assert sink.ended
        assert sink.calls.count(("blocked",)) == sink.calls.count(("drained",)) == (size > 65_536)

    def test_a_paused_reader_stops_the_writer_and_nobody_else(self) -> None:
        pair = Pair(answer(200, b"x" * 1_000_000), stream_window=1000, max_stream_window=1000)
        pair.run()
        slow = pair.client.ask()
        pair.client.stream.pause()
        quick = pair.client.ask()
        pair.run()
        assert (len(slow.payload), len(quick.payload)) == (1000, 1_000_000)
        pair.client.asked[0][0].resume()
        pair.run()
        assert len(slow.payload) == 1_000_000

    @pytest.mark.parametrize("code", [2, 7, 8, 0x1234])
    def test_resets_cross(self, code: int) -> None:
        pair = Pair(None)
        pair.run()
        pair.client.ask(request(b"POST"), False)
        pair.client.ask(request(b"POST"), False)
        pair.run()
        pair.client.asked[0][0].abort(StreamResetError(code))
        pair.server.stream(1).abort(StreamResetError(code))
        pair.run()
        errors: list[WireError | None] = [pair.server.exchanges[0].error, pair.client.asked[1][1].error]
        assert [getattr(error, "code", 7) for error in errors] == [code, code if code != 7 else 7]

    def test_a_tunnel(self) -> None:
        pair = Pair(None, websocket=True)
        pair.run()
        assert pair.client.codec.offers_connect
        pair.client.ask(request(path=b"/chat", protocol=b"websocket"), False)
        pair.run()
        server, client = pair.server.stream(), pair.client.stream
        assert pair.server.last.request is not None
        assert pair.server.last.request.protocol == b"websocket"
        server.send_informational(ResponseHead(101, ()))
        pair.run()
        assert pair.client.sink.calls == [("informational", 101, ())]
        client.send_data(b"hello", False)
        server.send_data(b"olleh", False)
        pair.run()
        assert (pair.server.last.payload, pair.client.sink.payload) == (b"hello", b"olleh")
        client.close()
        pair.run()
        assert pair.server.last.ended
        server.send_data(b"", True)
        pair.run()
        assert pair.server.shell.done == pair.client.shell.done == [1]

    def test_leaving(self) -> None:
        pair = Pair(None)
        pair.run()
        sink = pair.client.ask()
        pair.run()
        pair.server.codec.go_away_soon()
        pair.run()
        assert not pair.client.codec.can_open
        pair.server.codec.go_away()
        pair.server.stream().send_head(ResponseHead(200, ()), True)
        pair.run()
        assert sink.ended
        assert pair.server.shell.closed == pair.client.shell.closed == [True]


class TestTheirClient:
    """``h2`` asks our server."""

    def make(
        self, on_request: Callable[[Recorder], None] | None
    ) -> tuple[h2.connection.H2Connection, ServerWorld]:
        world = ServerWorld(on_request, raw=True)
        theirs = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
        theirs.initiate_connection()
        return theirs, world

    def talk(
        self, theirs: h2.connection.H2Connection, world: ServerWorld, cut: int = 0
    ) -> list[h2.events.Event]:
        events: list[h2.events.Event] = []
        for _ in range(10_000):
            asked = theirs.data_to_send()
            step = cut or max(len(asked), 1)
            for at in range(0, len(asked), step):
                world.codec.receive_data(asked[at : at + step], 100.0)
            answered = b"".join(world.codec.take_out())
            if not asked and not answered:
                return events
            new = theirs.receive_data(answered)
            for event in new:
                if isinstance(event, h2.events.DataReceived):
                    theirs.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            events += new
        raise AssertionError("does not end")

    @pytest.mark.parametrize("cut", [0, 1, 13])
    def test_exchanges(self, cut: int) -> None:
        def echo(recorder: Recorder) -> None:
            answer(200, recorder.payload, b"!", headers=((b"x", b"y"),), trailers=((b"sum", b"1"),))(recorder)

        theirs, world = self.make(echo)
        for each in range(1, 41, 2):
            fields: Fields = (
                (b":method", b"POST"),
                (b":scheme", b"https"),
                (b":authority", b"example.org"),
                (b":path", b"/%d" % each),
                (b"cookie", b"a=%d" % each),
                (b"cookie", b"b=2"),
                (b"content-length", b"2000"),
            )
            theirs.send_headers(each, fields)
            theirs.send_data(each, b"z" * 2000, end_stream=True, pad_length=5)
            events = self.talk(theirs, world, cut)
            assert world.last.payload == b"z" * 2000
            assert world.last.request is not None
            assert world.last.request.headers == ((b"cookie", b"a=%d; b=2" % each),)
            (head,) = [event for event in events if isinstance(event, h2.events.ResponseReceived)]
            assert [tuple(each) for each in head.headers or ()] == [(b":status", b"200"), (b"x", b"y")]
            got = b"".join(event.data or b"" for event in events if isinstance(event, h2.events.DataReceived))
            assert got == b"z" * 2000 + b"!"
            (trailers,) = [event for event in events if isinstance(event, h2.events.TrailersReceived)]
            assert [tuple(each) for each in trailers.headers or ()] == [(b"sum", b"1")]
        assert not world.codec.streams

    def test_bulk_both_ways(self) -> None:
        body = random.Random(2).randbytes(300_000)
        theirs, world = self.make(answer(200, body))
        fields: Fields = (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":authority", b"x"),
            (b":path", b"/"),
        )
        theirs.send_headers(1, fields)
        sent = 0
        got = b""
        while sent < len(body):
            room = min(theirs.local_flow_control_window(1), theirs.max_outbound_frame_size, len(body) - sent)
            assert room > 0
            theirs.send_data(1, body[sent : sent + room], end_stream=sent + room == len(body))
            sent += room
            for event in self.talk(theirs, world):
                if isinstance(event, h2.events.DataReceived):
                    got += event.data or b""
        assert world.last.payload == body
        assert got == body

    def test_small_windows_and_settings_that_change(self) -> None:
        theirs, world = self.make(answer(200, b"x" * 5000))
        theirs.update_settings(
            {h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 77, h2.settings.SettingCodes.HEADER_TABLE_SIZE: 0}
        )
        fields: Fields = (
            (b":method", b"GET"),
            (b":scheme", b"http"),
            (b":authority", b"x"),
            (b":path", b"/"),
        )
        theirs.send_headers(1, fields, end_stream=True)
        theirs.send_headers(3, fields, end_stream=True)
        events = self.talk(theirs, world)
        theirs.update_settings(
            {
                h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 3000,
                h2.settings.SettingCodes.HEADER_TABLE_SIZE: 4096,
            }
        )
        events += self.talk(theirs, world)
        assert (
            sum(len(event.data or b"") for event in events if isinstance(event, h2.events.DataReceived))
            == 10_000
        )

    def test_pings_resets_and_the_end(self) -> None:
        theirs, world = self.make(None)
        fields: Fields = (
            (b":method", b"GET"),
            (b":scheme", b"http"),
            (b":authority", b"x"),
            (b":path", b"/"),
        )
        theirs.send_headers(1, fields, end_stream=True)
        theirs.ping(b"12345678")
        events = self.talk(theirs, world)
        assert any(isinstance(event, h2.events.PingAckReceived) for event in events)
        theirs.reset_stream(1, 8)
        self.talk(theirs, world)
        assert getattr(world.last.error, "code", None) == 8
        world.codec.go_away()
        (gone,) = [
            event for event in self.talk(theirs, world) if isinstance(event, h2.events.ConnectionTerminated)
        ]
        assert gone.last_stream_id == 1


class TestTheirServer:
    """Our client asks ``h2``."""

    def make(self) -> tuple[ClientWorld, h2.connection.H2Connection]:
        theirs = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, header_encoding=None)
        )
        theirs.initiate_connection()
        return ClientWorld(raw=True), theirs

    def talk(
        self, world: ClientWorld, theirs: h2.connection.H2Connection, cut: int = 0
    ) -> list[h2.events.Event]:
        events: list[h2.events.Event] = []
        for _ in range(10_000):
            asked = b"".join(world.codec.take_out())
            new = theirs.receive_data(asked)
            for event in new:
                if isinstance(event, h2.events.DataReceived):
                    theirs.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            events += new
            answered = theirs.data_to_send()
            if not asked and not answered:
                return events
            step = cut or max(len(answered), 1)
            for at in range(0, len(answered), step):
                world.codec.receive_data(answered[at : at + step], 100.0)
        raise AssertionError("does not end")

    @pytest.mark.parametrize("cut", [0, 1, 13])
    def test_exchanges(self, cut: int) -> None:
        world, theirs = self.make()
        self.talk(world, theirs, cut)
        for each in range(1, 41, 2):
            sink = world.ask(request(b"POST", b"/%d" % each, headers=((b"x", b"%d" % (each % 5)),)), False)
            world.stream.send_data(b"q" * 3000, False)
            world.stream.send_trailers(((b"t", b"u"),))
            events = self.talk(world, theirs, cut)
            (asked,) = [event for event in events if isinstance(event, h2.events.RequestReceived)]
            assert dict(asked.headers or ())[b":path"] == b"/%d" % each
            assert any(isinstance(event, h2.events.TrailersReceived) for event in events)
            theirs.send_headers(each, [(b":status", b"100")])
            theirs.send_headers(each, [(b":status", b"200"), (b"content-length", b"4"), (b"x", b"y")])
            theirs.send_data(each, b"body", pad_length=3)
            theirs.send_headers(each, [(b"grpc-status", b"0")], end_stream=True)
            self.talk(world, theirs, cut)
            assert [call[0] for call in sink.calls] == ["informational", "response", "data", "trailers"]
            assert sink.payload == b"body"
            assert sink.ended
        assert not world.codec.streams
        assert world.stream.is_reused

    def test_a_long_upload(self) -> None:
        world, theirs = self.make()
        self.talk(world, theirs)
        body = random.Random(3).randbytes(300_000)
        world.ask(request(b"POST", content_length=len(body)), False)
        world.stream.send_data(body, True)
        events = self.talk(world, theirs)
        assert (
            b"".join(event.data or b"" for event in events if isinstance(event, h2.events.DataReceived))
            == body
        )
        assert any(isinstance(event, h2.events.StreamEnded) for event in events)

    def test_goaway_and_reset(self) -> None:
        world, theirs = self.make()
        self.talk(world, theirs)
        first, second = world.ask(), world.ask()
        self.talk(world, theirs)
        theirs.reset_stream(1, 7)
        theirs.close_connection(last_stream_id=1)
        self.talk(world, theirs)
        assert [type(sink.error).__name__ for sink in (first, second)] == ["UnprocessedError"] * 2
        assert world.shell.closed == [True]


def test_the_preface_is_what_they_send() -> None:
    theirs = h2.connection.H2Connection()
    theirs.initiate_connection()
    assert theirs.data_to_send().startswith(PREFACE)
