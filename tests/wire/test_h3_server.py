"""The server role: what an exchange does with a stream, how streams and connections end."""

import pytest

from expressgateway.wire.errors import (
    ContradictionError,
    MalformedError,
    PeerClosedError,
    SlowHeadError,
    StreamResetError,
    WireError,
)
from expressgateway.wire.h3.frames import MAX_REQUEST_ID
from expressgateway.wire.head import ResponseHead
from tests.wire.h3_world import (
    CANCELLED,
    CAPACITY,
    CONNECT,
    DATA,
    GET,
    HEADERS,
    INCOMPLETE,
    INTERNAL,
    NO_ERROR,
    POST,
    REJECTED,
    ServerWorld,
    block,
    data,
    frame,
    headers,
    insert,
    lists,
)
from tests.wire.recorder import answer, no_answer


def opened(**more: object) -> ServerWorld:
    world = ServerWorld(no_answer, **more)  # type: ignore[arg-type]
    world.feed(0, headers(POST))
    return world


def tunnel() -> ServerWorld:
    world = ServerWorld(no_answer, websocket=True)
    world.feed(0, headers(CONNECT))
    world.stream().send_informational(ResponseHead(101, ((b"a", b"b"),)))
    return world


class TestResponses:
    def test_a_response(self) -> None:
        world = ServerWorld(answer(200, b"one", b"two", length=6, headers=((b"x", b"y"),)))
        world.feed(0, headers(), True)
        assert [kind for kind, _ in world.said(0)] == [HEADERS, DATA, DATA]
        assert lists(world, 0) == [[(b":status", b"200"), (b"x", b"y"), (b"content-length", b"6")]]
        assert world.transport.ends == {0}
        assert world.shell.done == [], "the transport has not sent it"
        world.flush()
        assert world.shell.done == [0]
        assert not world.codec.streams
        assert world.codec.is_idle

    def test_interim_and_trailers(self) -> None:
        world = opened()
        stream = world.stream()
        stream.send_informational(ResponseHead(103, ((b"link", b"x"),)))
        stream.send_head(ResponseHead(200, ()), False)
        stream.send_data(b"x", False)
        stream.send_trailers(((b"a", b"b"),))
        assert lists(world, 0) == [
            [(b":status", b"103"), (b"link", b"x")],
            [(b":status", b"200")],
            [(b"a", b"b")],
        ]
        assert world.transport.ends == {0}

    @pytest.mark.parametrize("chunk", [b"x" * 3, b"x" * 5000, b"x" * 100_000])
    def test_chunks_of_any_size(self, chunk: bytes) -> None:
        world = ServerWorld(answer(200, chunk, chunk))
        world.feed(0, headers(), True)
        assert b"".join(body for kind, body in world.said(0) if kind == DATA) == 2 * chunk

    @pytest.mark.parametrize(("method", "status"), [(b"HEAD", 200), (b"GET", 204), (b"GET", 304)])
    def test_no_body(self, method: bytes, status: int) -> None:
        world = ServerWorld(answer(status, b"x", length=1))
        world.feed(0, headers(((b":method", method), *GET[1:])), True)
        assert [kind for kind, _ in world.said(0)] == [HEADERS]
        assert world.transport.ends == {0}
        assert ((b"content-length", b"1") in lists(world, 0)[0]) is (status != 204)

    @pytest.mark.parametrize(
        "chunks", [(b"toolong",), (b"tool", b"ong"), (b"x", b""), ()], ids=["long", "later", "short", "none"]
    )
    def test_a_response_that_contradicts_its_length(self, chunks: tuple[bytes, ...]) -> None:
        world = ServerWorld(answer(200, *chunks, length=4))
        world.feed(0, headers(), True)
        assert world.transport.resets == {0: INTERNAL}
        assert isinstance(world.last.error, ContradictionError)
        assert world.shell.done == [0]

    def test_before_the_requests_end(self) -> None:
        """RFC 9114 4.1: the response is whole, the rest of the request is not wanted."""
        world = opened()
        world.stream().send_head(ResponseHead(200, ()), True)
        assert world.transport.stops == {0: NO_ERROR}
        assert world.transport.resets == {}
        world.feed(0, data(b"x" * 100), False).feed(0, b"", True)
        world.flush()
        assert world.shell.done == [0]
        assert not world.codec._ignored
        world.account()

    @pytest.mark.parametrize(
        ("cause", "code"),
        [
            (None, INTERNAL),
            (MalformedError("x"), INTERNAL),
            (StreamResetError(CANCELLED), CANCELLED),
            (StreamResetError(8), CANCELLED),
            (StreamResetError(7), REJECTED),
            (StreamResetError(0), INTERNAL),
            (StreamResetError(NO_ERROR), INTERNAL),
            (StreamResetError(0x77), INTERNAL),
            (StreamResetError(0x4242), 0x4242),
        ],
        ids=str,
    )
    def test_abort(self, cause: WireError | None, code: int) -> None:
        world = opened()
        stream = world.stream()
        stream.abort(cause)
        stream.abort(cause)
        assert world.transport.resets == {0: code}
        assert world.transport.stops == {0: code}
        assert world.last.aborts == 0
        assert world.shell.done == [0]
        world.feed(0, data(b"late")).reset(0)
        assert not world.codec._ignored
        world.account()

    def test_equal_heads_are_encoded_once(self) -> None:
        world = ServerWorld(answer(200, b"x", length=1, headers=((b"a", b"b"),)), peer=((1, 4096), (7, 16)))
        before = world.transport.sent[7]
        for each in range(0, 40, 4):
            world.feed(each, headers(), True)
        assert len({world.transport.sent[each] for each in range(0, 40, 4)}) == 1
        assert world.transport.sent[7] == before

    def test_the_table_is_used(self) -> None:
        """Heads that differ are encoded by the library, which refers to what it has sent before."""
        world = ServerWorld(None, peer=((1, 4096), (7, 16)))
        for each in range(0, 40, 4):
            world.feed(each, headers(), True)
            head = ResponseHead(200, ((b"x-long-name", b"a long value"), (b"n", b"%d" % each)))
            world.stream().send_head(head, True)
        assert len(world.transport.sent[36]) < len(world.transport.sent[0])
        assert lists(world, 36) == [[(b":status", b"200"), (b"x-long-name", b"a long value"), (b"n", b"36")]]


DYNAMIC = frame(HEADERS, b"\x02\0" + block(GET)[2:] + b"\x80")
"""It refers to the first entry of the table, or to the 257th (RFC 9204 4.5.1.1)."""


class TestBlocksThatRepeatThemselves:
    def test_static_ones_are_read_once(self) -> None:
        world = ServerWorld()
        for each in range(3):
            world.feed(4 * each, headers(), True)
        assert list(world.codec.known) == [block(GET)]
        assert len({id(each.request) for each in world.exchanges}) == 3, "each has a head of its own"

    def test_others_are_acknowledged_each_time(self) -> None:
        world = ServerWorld()
        world.insertions(CAPACITY, insert(b"a", b"first"))
        for each in range(4):
            world.feed(4 * each, DYNAMIC, True)
        assert len(world.codec.known) == 1
        assert world.transport.sent[11] == b"\x03\x80\x84\x88\x8c"

    def test_forgotten_with_the_table(self) -> None:
        world = ServerWorld()
        world.insertions(CAPACITY, insert(b"a", b"first"))
        for each in range(4):
            world.feed(4 * each, DYNAMIC, True)
        for each in range(255):
            world.insertions(insert(b"x", b"%d" % each))
        world.insertions(insert(b"a", b"257th"))
        world.feed(16, DYNAMIC, True)
        values = [each.request.headers[-1][1] for each in world.exchanges if each.request is not None]
        assert values == [b"first"] * 4 + [b"257th"]

    def test_a_stream_that_is_given_up_is_cancelled(self) -> None:
        """RFC 9204 2.2.2.2: or its references would stay for ever."""
        world = ServerWorld(no_answer)
        world.feed(0, headers(POST)).reset(0)
        assert world.transport.sent[11] == b"\x03", "nothing refers to the table"
        world.insertions(CAPACITY, insert(b"a", b"first"))
        world.feed(4, headers(POST)).reset(4)
        world.feed(8, headers(), True).stop(8)
        assert world.transport.sent[11] == b"\x03\x44"


class TestBackpressure:
    def test_a_paused_stream_is_not_consumed(self) -> None:
        world = opened()
        stream = world.stream()
        stream.pause()
        before = world.transport.eaten[0]
        world.feed(0, data(b"x" * 1000))
        assert len(world.last.payload) == 1000
        assert world.transport.eaten[0] - before == 3, "the frame's type and length"
        wakes = world.shell.wakes
        world.flush()
        stream.resume()
        assert world.shell.wakes > wakes
        assert world.transport.eaten[0] - before == 1003
        stream.resume()
        world.account()

    def test_paused_while_it_is_told(self) -> None:
        world = opened()
        stream = world.stream()
        world.last.on_request_data = lambda chunk, end: stream.pause()  # type: ignore[method-assign]
        before = world.transport.eaten[0]
        world.feed(0, data(b"x" * 1000))
        assert world.transport.eaten[0] - before == 3

    @pytest.mark.parametrize("how", ["abort", "reset", "stop", "answer", "close"])
    def test_what_was_withheld_is_consumed_at_the_end(self, how: str) -> None:
        world = opened()
        stream = world.stream()
        stream.pause()
        world.feed(0, data(b"x" * 1000))
        if how == "abort":
            stream.abort(None)
        elif how == "reset":
            world.reset(0)
        elif how == "stop":
            world.stop(0)
        elif how == "answer":
            stream.send_head(ResponseHead(200, ()), True)
        else:
            world.codec.receive_closed("gone")
        assert stream._withheld == 0 or how == "close"
        world.account()

    def test_blocked_and_drained(self) -> None:
        world = opened(max_send_buf_size=1000)
        stream = world.stream()
        stream.send_head(ResponseHead(200, ()), False)
        world.transport.holds.add(0)
        for _ in range(5):
            stream.send_data(b"x" * 300, False)
        assert world.last.calls.count(("blocked",)) == 1
        assert stream.unsent() == stream.queued > 1000
        world.flush()
        assert ("drained",) not in world.last.calls
        world.transport.waiting[0] = 600
        world.flush()
        assert ("drained",) not in world.last.calls
        world.transport.waiting[0] = 499
        world.flush()
        assert world.last.calls.count(("drained",)) == 1
        stream.send_data(b"x" * 600, False)
        assert world.last.calls.count(("blocked",)) == 2

    def test_many_small_chunks_are_looked_at(self) -> None:
        world = opened(max_send_buf_size=1000)
        world.stream().send_head(ResponseHead(200, ()), False)
        world.transport.holds.add(0)
        for _ in range(600):
            world.stream().send_data(b"xx", False)
        assert world.last.calls.count(("blocked",)) == 1

    def test_a_stream_stays_until_it_is_sent(self) -> None:
        world = ServerWorld(answer(200, b"x" * 1000))
        world.transport.holds.add(0)
        world.feed(0, headers(), True)
        world.flush()
        world.flush()
        assert list(world.codec.streams) == [0]
        assert world.codec.streams[0].queued
        world.codec.reset_stream(world.codec.streams[0], CANCELLED)
        assert world.shell.done == [0]
        assert world.transport.resets == {0: CANCELLED}

    def test_woken_once_a_batch(self) -> None:
        world = ServerWorld()
        wakes = world.shell.wakes
        for each in range(0, 40, 4):
            world.feed(each, headers(), True)
        assert world.shell.wakes == wakes + 1
        world.flush()
        world.feed(40, headers(), True)
        assert world.shell.wakes == wakes + 2


class TestTheClientGivesUp:
    def test_reset(self) -> None:
        world = opened()
        world.reset(0, 0x10C)
        assert isinstance(world.last.error, StreamResetError)
        assert world.last.error.code == 0x10C
        assert world.transport.resets == {0: CANCELLED}
        assert world.transport.stops == {}
        assert world.shell.done == [0]
        world.stop(0)
        assert world.last.aborts == 1

    def test_stop(self) -> None:
        world = ServerWorld(no_answer)
        world.feed(0, headers(), True).stop(0, 0x10C)
        assert isinstance(world.last.error, StreamResetError)
        assert world.transport.resets == {0: CANCELLED}
        assert world.shell.done == [0]

    def test_stop_while_the_request_comes(self) -> None:
        world = opened()
        world.stop(0)
        assert world.transport.stops == {0: CANCELLED}
        world.feed(0, data(b"x"))
        world.reset(0)
        assert world.last.aborts == 1
        assert not world.codec._ignored
        world.account()

    def test_reset_before_anything_came(self) -> None:
        world = ServerWorld()
        world.reset(0)
        assert world.transport.resets == {0: CANCELLED}
        assert world.codec.last_id == 0

    def test_reset_inside_the_head(self) -> None:
        world = ServerWorld()
        world.feed(0, headers()[:-3])
        assert world.codec.streams[0].is_mid_head
        world.reset(0)
        assert world.codec.fail_slow_heads(world.now + 1) == 0
        assert world.shell.done == [0]
        world.account()

    def test_its_answer_to_being_stopped(self) -> None:
        """RFC 9000 3.5: STOP_SENDING is answered by RESET_STREAM, and the response is whole all the same."""
        world = opened()
        world.stream().send_head(ResponseHead(200, ()), True)
        world.reset(0, NO_ERROR)
        assert world.transport.resets == {}
        assert world.last.aborts == 0
        world.flush()
        assert world.shell.done == [0]
        assert not world.codec._ignored

    def test_a_reset_behind_the_end_says_nothing(self) -> None:
        world = ServerWorld(no_answer)
        world.feed(0, headers(), True).reset(0)
        assert world.last.aborts == 0

    def test_the_connection_is_lost(self) -> None:
        world = opened()
        world.codec.receive_closed("timed out")
        assert isinstance(world.last.error, PeerClosedError)
        assert world.last.error.detail == "timed out"
        assert world.shell.done == [0]
        assert world.shell.closed == [False]
        assert world.transport.closed == []
        world.stream().send_head(ResponseHead(200, ()), True)
        assert 0 not in world.transport.sent


class TestGoAway52:
    def test_in_two_steps(self) -> None:
        world = opened()
        world.codec.go_away_soon()
        assert world.goaways() == [MAX_REQUEST_ID]
        world.feed(8, headers(), True)
        assert len(world.exchanges) == 2
        world.codec.go_away()
        world.codec.go_away()
        assert world.goaways() == [MAX_REQUEST_ID, 12]
        world.feed(12, headers(), True)
        assert world.transport.resets == {12: REJECTED}
        assert world.transport.stops == {}
        world.feed(4, headers(), True)
        assert len(world.exchanges) == 3, "it was on its way"
        assert not world.shell.closed
        for each in range(3):
            world.stream(each).send_head(ResponseHead(200, ()), True)
        assert not world.shell.closed
        world.flush()
        assert world.shell.closed == [True]
        assert world.transport.closed == [], "its shell closes when all has arrived"
        world.account()

    def test_idle(self) -> None:
        world = ServerWorld()
        world.codec.go_away()
        assert world.goaways() == [0]
        assert world.shell.closed == [True]

    def test_too_many_streams(self) -> None:
        world = ServerWorld(no_answer, max_concurrent_streams=2)
        for each in (0, 4, 8):
            world.feed(each, headers(POST))
        assert len(world.exchanges) == 2
        assert world.transport.resets == world.transport.stops == {8: REJECTED}
        assert world.shell.events == ["stream_hoarding"]
        world.feed(8, data(b"x"), True)
        world.account()


class TestSlowHeads:
    def test_since(self) -> None:
        world = ServerWorld(no_answer)
        world.feed(0, headers()[:3])
        world.now = 101.0
        world.feed(4, headers()[:3])
        assert world.codec.fail_slow_heads(100.0) == 0
        assert world.codec.fail_slow_heads(100.5) == 1
        assert world.transport.resets == {0: INCOMPLETE}
        assert [type(each) for each in world.shell.rejections] == [SlowHeadError]
        world.feed(4, headers()[3:], True)
        assert world.codec.fail_slow_heads(102.0) == 0
        assert world.last.request is not None


class TestTunnels9220:
    def test_opened(self) -> None:
        world = tunnel()
        assert lists(world, 0) == [[(b":status", b"200"), (b"a", b"b")]]
        assert world.last.request is not None
        assert world.last.request.protocol == b"websocket"
        assert world.last.request.method == b"GET"
        world.feed(0, data(b"up"))
        world.stream().send_data(b"down", False)
        assert world.last.payload == b"up"

    @pytest.mark.parametrize("first", ["client", "us"])
    def test_each_side_ends_by_itself(self, first: str) -> None:
        world = tunnel()
        if first == "client":
            world.feed(0, data(b"up"), True)
            assert world.last.ended
        world.stream().send_data(b"down", True)
        world.flush()
        if first == "us":
            assert world.shell.done == []
            assert world.transport.stops == {}
            world.feed(0, data(b"up"), True)
            assert world.last.payload == b"up"
        assert world.shell.done == [0]

    def test_declined(self) -> None:
        world = ServerWorld(answer(403, b"no"), websocket=True)
        world.feed(0, headers(CONNECT))
        world.stream().send_head(ResponseHead(403, ()), True)
        assert world.transport.stops == {0: NO_ERROR}
        world.flush()
        assert world.shell.done == [0]

    def test_closed_by_us(self) -> None:
        """The client's end is waited for, a little."""
        world = tunnel()
        world.stream().close()
        assert world.transport.ends == {0}
        world.feed(0, data(b"late"))
        assert world.last.payload == b""
        world.flush()
        world.codec.sweep(world.now + 1)
        assert world.shell.done == []
        wakes = world.shell.wakes
        world.codec.sweep(world.now + 6)
        assert world.shell.wakes == wakes + 1
        assert world.shell.done == [0]
        assert world.transport.stops == {0: NO_ERROR}
        assert world.transport.resets == {}
        world.account()

    def test_aborted(self) -> None:
        world = tunnel()
        world.stream().abort(None)
        assert world.transport.resets == {0: CANCELLED}
