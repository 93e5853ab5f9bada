"""The client role: responses, who may be sent again, how a backend leaves, and tunnels (RFC 9220)."""

import pytest

from expressgateway.wire.errors import (
    FramingError,
    HeadTooLargeError,
    MalformedError,
    NotOfferedError,
    PeerClosedError,
    StreamResetError,
    TruncatedError,
    UnprocessedError,
    WireError,
)
from tests.wire.h3_world import (
    CANCELLED,
    DATA,
    GOAWAY,
    INTERNAL,
    MESSAGE,
    NO_ERROR,
    OK,
    REJECTED,
    UNEXPECTED,
    ClientWorld,
    data,
    error,
    frame,
    headers,
    integer,
    lists,
    request,
    settings,
)
from tests.wire.recorder import Recorder

OFFER = ((8, 1),)


def goaway(identifier: int) -> bytes:
    return frame(GOAWAY, integer(identifier))


def status(number: int, *fields: tuple[bytes, bytes]) -> bytes:
    return headers([(b":status", b"%d" % number), *fields])


class TestRequests:
    def test_a_request(self) -> None:
        world = ClientWorld()
        world.ask(
            request(b"POST", b"/a?b", headers=((b"x", b"y"), (b"cookie", b"a=1")), content_length=5), False
        )
        world.stream.send_data(b"hello", True)
        assert lists(world, 0) == [
            [
                (b":path", b"/a?b"),
                (b":method", b"POST"),
                (b":scheme", b"https"),
                (b":authority", b"example.org"),
                (b"x", b"y"),
                (b"cookie", b"a=1"),
                (b"content-length", b"5"),
            ]
        ]
        assert world.said(0)[1:] == [(DATA, b"hello")]
        assert world.transport.ends == {0}
        assert world.stream.version == b"3"

    @pytest.mark.parametrize("chunks", [(b"toolong",), (b"x", b"")])
    def test_a_body_that_contradicts_its_head(self, chunks: tuple[bytes, ...]) -> None:
        world = ClientWorld()
        sink = world.ask(request(b"POST", content_length=4), False)
        for at, chunk in enumerate(chunks):
            world.stream.send_data(chunk, at == len(chunks) - 1)
        assert isinstance(sink.error, FramingError)
        assert world.transport.resets == {0: CANCELLED}

    def test_a_declared_body_that_does_not_come(self) -> None:
        world = ClientWorld()
        assert isinstance(world.ask(request(b"POST", content_length=4), True).error, FramingError)
        assert 0 not in world.transport.sent
        assert world.codec.is_idle

    @pytest.mark.parametrize(
        ("cause", "code"),
        [(None, CANCELLED), (StreamResetError(8), CANCELLED), (StreamResetError(0x102), INTERNAL)],
        ids=str,
    )
    def test_abort(self, cause: WireError | None, code: int) -> None:
        world = ClientWorld()
        sink = world.ask()
        world.stream.abort(cause)
        world.stream.abort(cause)
        assert world.transport.resets == world.transport.stops == {0: code}
        assert sink.aborts == 0
        assert world.shell.done == [0]
        world.feed(0, headers(OK), True)
        world.account()
        assert not world.codec._ignored

    def test_abort_before_the_head(self) -> None:
        """The stream that was taken for it is kept for the next."""
        world = ClientWorld(streams=1)
        assert world.codec.can_open
        stream = world.codec.open(Recorder())
        stream.abort(None)
        assert world.codec.is_idle
        assert world.codec.can_open
        assert world.ask().error is None
        assert world.stream.id == 0
        assert world.stream.is_reused


class TestResponses:
    def test_a_response(self) -> None:
        world = ClientWorld()
        sink = world.ask()
        world.flush()
        world.feed(0, status(103, (b"link", b"x")) + status(200, (b"a", b"b")))
        world.feed(0, data(b"body") + headers([(b"t", b"u")]), True)
        assert [call[0] for call in sink.calls] == ["informational", "response", "data", "trailers"]
        assert sink.response is not None
        assert sink.response.version == b"3"
        assert sink.trailers == ((b"t", b"u"),)
        assert world.shell.done == [0]
        world.account()

    @pytest.mark.parametrize("how", ["HEAD", "204", "304"])
    def test_no_body(self, how: str) -> None:
        world = ClientWorld()
        sink = world.ask(request(b"HEAD" if how == "HEAD" else b"GET"))
        world.flush()
        number = 200 if how == "HEAD" else int(how)
        length = [] if number == 204 else [(b"content-length", b"5")]
        world.feed(0, status(number, *length), True)
        assert sink.ended
        other = ClientWorld()
        other.ask(request(b"HEAD" if how == "HEAD" else b"GET"))
        other.feed(0, status(number) + data(b"x"))
        assert other.transport.resets == {0: MESSAGE}

    @pytest.mark.parametrize(
        ("raw", "cause"),
        [
            (headers([(b"a", b"b")]), MalformedError),
            (headers([(b":status", b"20")]), MalformedError),
            (headers([(b":status", b"200"), (b":status", b"200")]), MalformedError),
            (headers([(b"a", b"b"), (b":status", b"200")]), MalformedError),
            (headers([(b":status", b"200"), (b":path", b"/")]), MalformedError),
            (status(200, (b"A", b"b")), MalformedError),
            (status(200, (b"connection", b"close")), MalformedError),
            (status(101), MalformedError),
            (status(103, (b"content-length", b"0")), MalformedError),
            (33 * status(103), MalformedError),
            (status(200, (b"content-length", b"1")) + data(b"xy"), FramingError),
            (status(200) + headers([(b":status", b"200")]), MalformedError),
            (status(200, (b"a", b"x" * 70_000)), HeadTooLargeError),
        ],
    )
    def test_malformed(self, raw: bytes, cause: type[WireError]) -> None:
        world = ClientWorld()
        sink, other = world.ask(), world.ask()
        world.feed(0, raw)
        assert type(sink.error) is cause
        assert world.transport.resets == {0: MESSAGE}
        assert other.error is None
        assert world.shell.done == [0]
        world.account()

    @pytest.mark.parametrize("raw", [b"", status(103), status(200, (b"content-length", b"2")) + data(b"x")])
    def test_ends_too_early(self, raw: bytes) -> None:
        world = ClientWorld()
        sink = world.ask()
        world.feed(0, raw, True)
        assert isinstance(sink.error, TruncatedError | FramingError | MalformedError)
        assert world.transport.resets == {0: MESSAGE}

    def test_equal_heads_are_read_once(self) -> None:
        world = ClientWorld()
        for each in range(0, 20, 4):
            world.ask()
            world.feed(each, headers(OK), True)
        assert len(world.codec.known) == 1
        heads = [sink.response for _, sink in world.asked]
        assert len({id(head) for head in heads}) == 5, "each has its own"

    def test_before_the_requests_end(self) -> None:
        world = ClientWorld()
        sink = world.ask(request(b"POST"), False)
        world.feed(0, headers(OK) + data(b"x"), True)
        world.stop(0, NO_ERROR)
        assert sink.ended
        assert sink.error is None
        assert world.transport.resets == {0: NO_ERROR}
        assert world.shell.done == [] or world.shell.done == [0]
        world.flush()
        assert world.shell.done == [0]

    def test_stopped_then_answered(self) -> None:
        world = ClientWorld()
        sink = world.ask(request(b"POST"), False)
        world.stop(0, NO_ERROR)
        world.stream.send_data(b"not wanted", True)
        world.flush()
        world.feed(0, headers(OK) + data(b"x"), True)
        assert sink.payload == b"x"
        assert world.shell.done == [0]


class TestWhoMayBeSentAgain:
    @pytest.mark.parametrize(
        ("code", "cause", "delivered"),
        [(REJECTED, UnprocessedError, False), (INTERNAL, StreamResetError, True)],
    )
    @pytest.mark.parametrize("how", ["reset", "stop"])
    def test_reset(self, how: str, code: int, cause: type[WireError], delivered: bool) -> None:
        world = ClientWorld()
        sink = world.ask(request(b"POST"), False)
        world.flush()
        getattr(world, how)(0, code)
        assert type(sink.error) is cause
        assert world.asked[0][0].was_delivered() is delivered
        assert world.transport.resets == {0: CANCELLED}
        assert world.shell.done == [0]

    def test_a_reset_inside_a_response(self) -> None:
        world = ClientWorld()
        sink = world.ask()
        world.feed(0, headers(OK)).reset(0, 0x10C)
        assert isinstance(sink.error, StreamResetError)
        assert sink.error.code == 0x10C

    def test_not_flushed(self) -> None:
        world = ClientWorld()
        world.ask()
        assert not world.stream.was_delivered()
        world.transport.waiting.clear()
        assert world.stream.was_delivered(), "the transport has sent it by itself"
        world.flush()
        assert world.stream.was_delivered()

    def test_the_connection_is_lost(self) -> None:
        world = ClientWorld()
        before, inside = world.ask(), world.ask()
        world.flush()
        world.feed(4, headers(OK))
        world.codec.receive_closed("gone")
        assert type(before.error) is PeerClosedError
        assert type(inside.error) is TruncatedError
        assert not world.codec.can_open
        assert world.shell.closed == [False]

    def test_goaway(self) -> None:
        world = ClientWorld()
        sinks = [world.ask() for _ in range(3)]
        world.flush()
        world.control(goaway(2**62 - 4))
        assert world.shell.told == ["limits", "unavailable"]
        assert not world.codec.can_open
        assert [sink.error for sink in sinks] == [None] * 3
        world.control(goaway(4))
        assert sinks[0].error is None
        assert [type(sink.error) for sink in sinks[1:]] == [UnprocessedError] * 2
        assert not world.asked[1][0].was_delivered()
        assert not world.shell.closed
        world.feed(0, headers(OK), True)
        assert sinks[0].ended
        assert world.shell.closed == [True]
        assert world.shell.told.count("unavailable") == 1

    def test_leased_before_goaway(self) -> None:
        world = ClientWorld()
        world.ask()
        sink = Recorder()
        stream = world.codec.open(sink)
        world.control(goaway(4))
        stream.send_head(request(), True)
        assert isinstance(sink.error, UnprocessedError)
        assert not stream.was_delivered()

    def test_we_leave(self) -> None:
        world = ClientWorld()
        world.ask()
        world.flush()
        world.codec.go_away()
        assert world.goaways() == [0]
        assert not world.codec.can_open
        world.feed(0, headers(OK), True)
        assert world.shell.closed == [True]


class TestHowMany:
    def test_within_the_transports_limit(self) -> None:
        world = ClientWorld(streams=2)
        answers = []
        for _ in range(3):
            answers.append(world.codec.can_open)
            world.ask()
        assert answers == [True, True, False]
        assert isinstance(world.sink.error, UnprocessedError)
        world.transport.left = 1
        assert world.codec.can_open

    def test_asking_takes_no_more_than_one(self) -> None:
        world = ClientWorld(streams=10)
        for _ in range(5):
            assert world.codec.can_open
        assert world.transport.left == 9

    def test_within_ours(self) -> None:
        world = ClientWorld(max_concurrent_streams=2)
        world.ask()
        world.codec.open(Recorder())
        assert not world.codec.can_open


class TestBackpressure:
    def test_paused(self) -> None:
        world = ClientWorld()
        world.ask()
        world.stream.pause()
        world.feed(0, headers(OK) + data(b"x" * 1000))
        assert world.stream._withheld == 1000
        world.account()
        world.stream.resume()
        assert world.stream._withheld == 0
        world.account()

    def test_blocked_and_drained(self) -> None:
        world = ClientWorld(max_send_buf_size=1000)
        sink = world.ask(request(b"POST"), False)
        world.transport.holds.add(0)
        world.stream.send_data(b"x" * 2000, False)
        assert sink.calls == [("blocked",)]
        world.transport.holds.clear()
        world.flush()
        assert sink.calls == [("blocked",), ("drained",)]


class TestTunnels9220:
    def test_a_handshake_waits_for_settings(self) -> None:
        for offer, is_sent in ((OFFER, True), (((8, 0),), False), ((), False)):
            world = ClientWorld(raw=True)
            sink = world.ask(request(protocol=b"websocket"), False)
            assert 0 not in world.transport.sent
            assert not world.codec.is_idle
            world.feed(3, b"\0" + settings(*offer))
            assert (0 in world.transport.sent) is is_sent
            assert isinstance(sink.error, NotOfferedError) is not is_sent
            assert world.codec.is_idle is not is_sent

    def test_accepted(self) -> None:
        world = ClientWorld(peer=OFFER)
        sink = world.ask(request(protocol=b"websocket", path=b"/chat"), False)
        sent = dict(lists(world, 0)[0])
        assert sent[b":method"] == b"CONNECT"
        assert sent[b":protocol"] == b"websocket"
        world.feed(0, status(200, (b"a", b"b")) + data(b"down"))
        assert sink.calls[0][:3] == ("informational", 101, ((b"a", b"b"),))
        assert sink.payload == b"down"
        world.stream.send_data(b"up", True)
        world.flush()
        assert world.shell.done == []
        world.feed(0, b"", True)
        assert world.shell.done == [0]

    def test_only_data(self) -> None:
        world = ClientWorld(peer=OFFER)
        world.ask(request(protocol=b"websocket"), False)
        world.feed(0, status(200) + headers([(b"a", b"b")]))
        assert world.verdict() == error(UNEXPECTED)

    def test_declined(self) -> None:
        world = ClientWorld(peer=OFFER)
        sink = world.ask(request(protocol=b"websocket"), False)
        world.feed(0, status(403) + data(b"no"), True)
        assert sink.response is not None
        assert sink.response.status == 403
        assert sink.ended

    def test_closed_by_us(self) -> None:
        world = ClientWorld(peer=OFFER)
        world.ask(request(protocol=b"websocket"), False)
        world.feed(0, status(200))
        world.stream.close()
        world.flush()
        world.codec.sweep(world.now + 6)
        assert world.shell.done == [0]
        assert world.transport.stops == {0: NO_ERROR}

    def test_lost_while_it_waits(self) -> None:
        world = ClientWorld(raw=True)
        sink = world.ask(request(protocol=b"websocket"), False)
        world.codec.receive_closed("gone")
        assert isinstance(sink.error, PeerClosedError)
