"""The server role at work: answers, ends, and when it asks to be flushed."""

import hpack
import pytest

from expressgateway.wire.errors import ContradictionError, MalformedError, PeerClosedError, StreamResetError
from expressgateway.wire.head import NO_FIELDS, ResponseHead, SharedFields
from tests.wire.h2_world import (
    CANCEL,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GET,
    HEADERS,
    INTERNAL,
    NO_ERROR,
    POST,
    SETTINGS,
    WINDOW_UPDATE,
    ServerWorld,
    data,
    ended,
    goaways,
    headers,
    lists,
    ping,
    resets,
    rst,
    settings,
    window_update,
)
from tests.wire.recorder import answer

OPEN = headers(1, POST, END_HEADERS)
HEAD = ((b":method", b"HEAD"), *GET[1:])
WEBSOCKET = (
    (b":method", b"CONNECT"),
    (b":protocol", b"websocket"),
    (b":scheme", b"https"),
    (b":path", b"/chat"),
    (b":authority", b"example.org"),
)


class TestBegin:
    def test_what_we_say_first(self) -> None:
        world = ServerWorld(raw=True, max_concurrent_streams=7, stream_window=1000, max_header_list_size=99)
        first, credit = world.take()
        assert first[:3] == (SETTINGS, 0, 0)
        assert first[3].hex() == "0003000000070004000003e8000600000063"
        assert credit == (WINDOW_UPDATE, 0, 0, (1_048_576 - 65_535).to_bytes(4, "big"))

    def test_extended_connect_is_offered(self) -> None:
        world = ServerWorld(raw=True, websocket=True)
        assert bytes.fromhex("000800000001") in world.take()[0][3]


class TestAnswers:
    def test_head_and_body(self) -> None:
        world = ServerWorld(answer(200, b"hel", b"lo", length=5, headers=((b"x", b"y"),)))
        world.feed(headers(1))
        out = world.take()
        assert lists(out) == [[(b":status", b"200"), (b"x", b"y"), (b"content-length", b"5")]]
        assert [each[:2] + each[3:] for each in out[1:]] == [(DATA, 0, b"hel"), (DATA, END_STREAM, b"lo")]
        assert world.shell.done == [1]

    def test_shared_fields_come_first_and_are_made_once(self) -> None:
        shared = SharedFields(((b"server", b"x"), (b"set-cookie", b"s")))
        world = ServerWorld(None)
        world.feed(headers(1), headers(3))
        for number in (0, 1):
            head = ResponseHead(200, ((b"a", b"b"),))
            head.shared = shared
            world.stream(number).send_head(head, True)
        expected = [(b":status", b"200"), (b"server", b"x"), (b"set-cookie", b"s"), (b"a", b"b")]
        assert lists(world.take()) == [expected, expected]
        assert shared.h2 == ((b"server", b"x", False), (b"set-cookie", b"s", True))

    def test_an_end_without_a_body(self) -> None:
        world = ServerWorld(answer(404))
        world.feed(headers(1))
        assert [each[:3] for each in world.take()] == [(HEADERS, END_STREAM | END_HEADERS, 1)]

    @pytest.mark.parametrize(
        ("fields", "status", "length", "told"),
        [(HEAD, 200, 5, True), (GET, 304, 5, True), (GET, 204, 0, False), (HEAD, 200, None, False)],
    )
    def test_bodies_that_are_not_sent(
        self, fields: tuple[tuple[bytes, bytes], ...], status: int, length: int | None, told: bool
    ) -> None:
        world = ServerWorld(answer(status, b"hello", length=length))
        world.feed(headers(1, fields))
        out = world.take()
        assert [each[:3] for each in out] == [(HEADERS, END_STREAM | END_HEADERS, 1)]
        assert (b"content-length" in dict(lists(out)[0])) is told
        assert world.shell.done == [1]

    def test_trailers(self) -> None:
        world = ServerWorld(answer(200, b"x", trailers=((b"grpc-status", b"0"),)))
        world.feed(headers(1))
        out = world.take()
        assert [each[:2] for each in out] == [
            (HEADERS, END_HEADERS),
            (DATA, 0),
            (HEADERS, END_STREAM | END_HEADERS),
        ]
        assert lists(out)[1] == [(b"grpc-status", b"0")]

    def test_empty_trailers_are_an_end(self) -> None:
        world = ServerWorld(None)
        world.feed(headers(1))
        world.stream().send_head(ResponseHead(200, ()), False)
        world.stream().send_trailers(NO_FIELDS)
        assert world.take()[-1] == (DATA, END_STREAM, 1, b"")

    def test_interim_heads(self) -> None:
        world = ServerWorld(None)
        world.feed(OPEN)
        for status in (100, 103):
            world.stream().send_informational(ResponseHead(status, ((b"link", b"x"),)))
        world.stream().send_head(ResponseHead(200, ()), False)
        world.stream().send_informational(ResponseHead(103, ()))
        assert [each[0][1] for each in lists(world.take())] == [b"100", b"103", b"200"]

    def test_a_head_longer_than_a_frame(self) -> None:
        world = ServerWorld(answer(200, headers=((b"x", b"\xff" * 40_000),)))
        world.feed(headers(1))
        out = world.take()
        assert [(kind, flags) for kind, flags, _, _ in out] == [
            (HEADERS, END_STREAM),
            *[(CONTINUATION, 0)] * (len(out) - 2),
            (CONTINUATION, END_HEADERS),
        ]
        assert {len(body) for _, _, _, body in out[:-1]} == {16_384}
        joined = b"".join(body for _, _, _, body in out)
        assert len(list(hpack.Decoder().decode(joined, raw=True))) == 2

    @pytest.mark.parametrize("chunks", [(b"hell",), (b"hello!",), (b"hello", b"!"), ()])
    def test_a_body_that_contradicts_its_length(self, chunks: tuple[bytes, ...]) -> None:
        world = ServerWorld(answer(200, *chunks, length=5))
        world.feed(headers(1))
        out = world.take()
        assert resets(out) == [(1, INTERNAL)]
        assert not ended(out, 1)
        assert type(world.last.error) is ContradictionError
        assert world.shell.done == [1]

    def test_trailers_before_the_declared_end(self) -> None:
        world = ServerWorld(answer(200, b"x", length=5, trailers=((b"a", b"b"),)))
        world.feed(headers(1))
        assert resets(world.take()) == [(1, INTERNAL)]

    def test_repeated_answers_are_right_for_another_decoder(self) -> None:
        """The blocks that are sent again refer to a table that has not changed since."""
        world = ServerWorld(None, max_concurrent_streams=1000)
        decoder = hpack.Decoder()
        for each in range(200):
            world.feed(headers(1 + 2 * each))
            head = ResponseHead(200 + each % 3, ((b"x-%d" % (each % 7), b"v" * (each % 5 * 300)),), each % 4)
            world.stream().send_head(head, False)
            fields = dict(lists(world.take(), decoder)[0])
            assert fields[b":status"] == b"%d" % head.status
            assert fields[head.headers[0][0]] == head.headers[0][1]
            world.feed(rst(1 + 2 * each))
            if each % 50 == 49:
                world.feed(settings((1, 100 * each), (1, 4096)))

    @pytest.mark.parametrize("between", ["nothing", "trailers", "interim", "another", "settings"])
    def test_a_block_is_not_sent_again_when_it_means_something_else(self, between: str) -> None:
        world = ServerWorld(None)
        decoder = hpack.Decoder()
        heads = [ResponseHead(200, ((b"x-%c" % each, b"v"),)) for each in b"abab"]
        expected: list[list[tuple[bytes, bytes]]] = []
        for at, head in enumerate(heads * 3):
            world.feed(headers(1 + 2 * at))
            stream = world.stream()
            new = ((b"x-%s-%d" % (between.encode(), at), b"v"),)
            if between == "settings":
                world.feed(settings((1, 0)), settings((1, 4096)))
            elif between == "interim":
                stream.send_informational(ResponseHead(103, new))
                expected.append([(b":status", b"103"), *new])
            elif between == "another":
                stream = world.stream()
                stream.send_informational(ResponseHead(103, head.headers))
                expected.append([(b":status", b"103"), *head.headers])
            stream.send_head(head, False)
            expected.append([(b":status", b"200"), *head.headers])
            if between == "trailers":
                stream.send_trailers(new)
                expected.append(list(new))
            else:
                stream.send_data(b"", True)
        assert lists(world.take(), decoder) == expected

    def test_an_insertion_is_not_sent_again(self) -> None:
        """Else the client's table would hold it twice, and what comes behind it would mean another entry."""
        world = ServerWorld(None)
        first, second = ResponseHead(200, ((b"x-a", b"v"),)), ResponseHead(200, ((b"x-b", b"v"),))
        heads = [first, second, first, ResponseHead(404, second.headers)]
        for at, head in enumerate(heads):
            world.feed(headers(1 + 2 * at))
            world.stream().send_head(head, True)
        told = [[(b":status", b"%d" % head.status), *head.headers] for head in heads]
        assert lists(world.take(), hpack.Decoder()) == told

    def test_calls_on_a_closed_stream_do_nothing(self) -> None:
        world = ServerWorld(None)
        world.feed(headers(1), rst(1))
        stream = world.stream()
        world.take()
        stream.send_informational(ResponseHead(103, ()))
        stream.send_head(ResponseHead(200, ()), False)
        stream.send_data(b"x", True)
        stream.send_trailers(())
        stream.abort(None)
        stream.close()
        stream.resume()
        assert world.take() == []
        assert stream.unsent() == 0
        assert world.shell.done == [1]


class TestEnds:
    def test_a_response_before_its_request(self) -> None:
        world = ServerWorld(None)
        world.feed(OPEN, data(1, b"some"))
        world.stream().send_head(ResponseHead(200, (), 2), False)
        world.stream().send_data(b"ok", True)
        out = world.take()
        assert ended(out, 1)
        assert resets(out) == [(1, NO_ERROR)]
        assert out[-1][0] == 3
        assert world.shell.done == [1]
        left = world.codec.received.left
        world.feed(data(1, b"x" * 10_000), data(1, b"", True))
        assert world.verdict() == [(1, NO_ERROR)]
        assert (
            world.codec.received.left + world.codec.received.owed == left + world.codec.received.owed - 10_000
        )
        assert world.last.payload == b"some"

    def test_it_waits_for_the_queue(self) -> None:
        world = ServerWorld(answer(200, b"x" * 70_000))
        world.feed(headers(3))
        world.feed(headers(5, POST, END_HEADERS))
        world.stream().send_head(ResponseHead(200, ()), False)
        world.stream().send_data(b"y" * 10, True)
        assert resets(world.take()) == []
        world.feed(window_update(0, 100_000))
        assert resets(world.take()) == [(5, NO_ERROR)]

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (None, INTERNAL),
            (StreamResetError(CANCEL), CANCEL),
            (StreamResetError(0), INTERNAL),
            (StreamResetError(0x77), 0x77),
            (MalformedError("x"), INTERNAL),
        ],
    )
    def test_abort(self, error: MalformedError | None, code: int) -> None:
        world = ServerWorld(None)
        world.feed(headers(1))
        world.stream().send_head(ResponseHead(200, ()), False)
        world.stream().send_data(b"part", False)
        world.stream().abort(error)
        world.stream().abort(None)
        out = world.take()
        assert resets(out) == [(1, code)]
        assert not ended(out, 1)
        assert world.last.aborts == 0

    def test_what_is_remembered_of_resets_is_bounded(self) -> None:
        world = ServerWorld(None, reset_percent=0, max_client_resets=10**6)
        for each in range(1, 2001, 2):
            world.feed(headers(each), rst(each))
        assert len(world.codec._resets) == 256
        assert 1999 in world.codec._resets

    def test_the_clients_reset_reaches_the_exchange_once(self) -> None:
        world = ServerWorld(None)
        world.feed(OPEN, rst(1), rst(1))
        assert isinstance(world.last.error, StreamResetError)
        assert (world.last.error.code, world.last.aborts) == (CANCEL, 1)

    @pytest.mark.parametrize("end", ["receive_eof", "receive_reset"])
    def test_the_connection_is_gone(self, end: str) -> None:
        world = ServerWorld(None)
        world.feed(OPEN, headers(3))
        getattr(world.codec, end)()
        assert [type(each.error) for each in world.exchanges] == [PeerClosedError] * 2
        assert sorted(world.shell.done) == [1, 3]
        world.feed(headers(5))
        assert len(world.exchanges) == 2

    def test_a_connection_error_tells_every_exchange(self) -> None:
        world = ServerWorld(None)
        world.feed(OPEN, headers(3), data(0, b"x"), headers(5))
        assert [each.aborts for each in world.exchanges] == [1, 1]
        assert goaways(world.take()) == [(3, 1)]
        assert world.shell.closed == [True]
        assert sorted(world.shell.done) == [1, 3]


class TestWaking:
    def test_once_for_whatever_is_written_in_one_read(self) -> None:
        world = ServerWorld()
        world.shell.wakes = 0
        world.feed(headers(1) + headers(3) + ping())
        assert world.shell.wakes == 1
        world.take()
        world.shell.wakes = 0
        assert world.codec.take_out() == []
        assert world.shell.wakes == 0
