"""The client role: what is sent to a backend, what it may answer, and what its failures mean."""

import struct

import hpack
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
from expressgateway.wire.h2.fields import Secret
from expressgateway.wire.head import RequestHead, SharedFields
from tests.wire.h2_world import (
    ACK,
    CALM,
    CANCEL,
    CLOSED,
    COMPRESSION,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FLOW,
    HEADERS,
    NO_ERROR,
    OK,
    PING,
    PREFACE,
    PRIORITY,
    PROTOCOL,
    PUSH_PROMISE,
    REFUSED,
    RST_STREAM,
    SETTINGS,
    SETTINGS_ACK,
    SIZE,
    WINDOW_UPDATE,
    Case,
    ClientWorld,
    Fields,
    block,
    bodies,
    check,
    data,
    ended,
    error,
    frame,
    goaway,
    goaways,
    headers,
    ping,
    request,
    resets,
    rst,
    settings,
    window_update,
)

HEAD = headers(1, OK, END_HEADERS)
RESET = [(1, PROTOCOL)]


def cases(*each: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", each, ids=str)


def asked(method: bytes = b"GET", end: bool = True, **more: object) -> ClientWorld:
    world = ClientWorld(**more)  # type: ignore[arg-type]  # limits, whatever they are
    world.ask(request(method), end)
    world.take()
    world.seen.clear()
    return world


def sent(head: RequestHead, end: bool = True) -> list[tuple[bytes, bytes]]:
    world = ClientWorld(settings_of=((8, 1),))
    world.ask(head, end)
    out = world.take()
    assert out[0][:3] == (HEADERS, END_HEADERS | (END_STREAM if end else 0), 1)
    return [(bytes(name), bytes(value)) for name, value in hpack.Decoder().decode(out[0][3], raw=True)]


class TestRequests:
    PSEUDO = ((b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/"), (b":authority", b"example.org"))

    def test_begin(self) -> None:
        world = ClientWorld(raw=True, stream_window=1000)
        raw = b"".join(world.codec.take_out())
        assert raw.startswith(
            PREFACE + frame(SETTINGS, 0, 0, bytes.fromhex("0002000000000004000003e8000600010000"))
        )

    def test_a_head(self) -> None:
        head = request(headers=((b"x", b"y"),), accepts_trailers=True)
        head.shared = SharedFields(((b"via", b"1"),))
        assert sent(head) == [*self.PSEUDO, (b"via", b"1"), (b"x", b"y"), (b"te", b"trailers")]

    def test_a_declared_length(self) -> None:
        assert sent(request(b"POST", content_length=3), False)[-1] == (b"content-length", b"3")

    def test_without_an_authority(self) -> None:
        head = RequestHead(b"GET", b"http", b"", b"/", ())
        assert b":authority" not in dict(sent(head))

    def test_secrets_are_never_indexed(self) -> None:
        world = ClientWorld()
        marked = (b"x-key", Secret(b"what its sender marked"))
        secrets = (marked, (b"authorization", b"Basic x"), (b"cookie", b"short"), (b"cookie", b"l" * 40))
        world.ask(request(headers=secrets))
        fields = list(hpack.Decoder().decode(world.take()[0][3], raw=True))
        assert [each.indexable for each in fields[-4:]] == [False, False, False, True]

    def test_a_body_with_trailers(self) -> None:
        world = asked(b"POST", end=False)
        world.stream.send_data(b"x", False)
        world.stream.send_trailers(((b"a", b"b"),))
        assert [each[:2] for each in world.take()] == [(DATA, 0), (HEADERS, END_STREAM | END_HEADERS)]

    def test_ids_count_up(self) -> None:
        world = ClientWorld()
        first, second = world.codec.open(None), world.codec.open(None)  # type: ignore[arg-type]
        assert world.codec.can_open
        for stream in (first, second):
            stream.sink = world.ask()
        assert [each[2] for each in world.take() if each[0] == HEADERS] == [1, 3]

    @pytest.mark.parametrize(
        "chunks", [((b"hell", True),), ((b"hello!", False),), ((b"hello", False), (b"!", True))]
    )
    def test_a_body_that_contradicts_its_length(self, chunks: tuple[tuple[bytes, bool], ...]) -> None:
        world = ClientWorld()
        world.ask(request(b"POST", content_length=5), False)
        for chunk, end in chunks:
            world.stream.send_data(chunk, end)
        out = world.take()
        assert resets(out) == [(1, CANCEL)]
        assert not ended(out, 1)
        assert type(world.sink.error) is FramingError
        assert world.shell.done == [1]

    def test_a_head_that_ends_without_its_body(self) -> None:
        world = ClientWorld()
        world.ask(request(b"POST", content_length=5), True)
        assert type(world.sink.error) is FramingError
        assert world.take() == []

    def test_windows_hold(self) -> None:
        world = ClientWorld(settings_of=((4, 5),))
        world.ask(request(b"POST"), False)
        world.stream.send_data(b"x" * 100_000, True)
        assert ("blocked",) in world.sink.calls
        assert bodies(world.take(), 1) == b"xxxxx"
        world.feed(window_update(1, 200_000), window_update(0, 200_000))
        out = world.take()
        assert (len(bodies(out, 1)), ended(out, 1)) == (99_995, True)
        assert world.sink.calls[-1] == ("drained",) or ("drained",) not in world.sink.calls


class TestResponses:
    @cases(
        Case("a head", headers(1, OK), []),
        Case("a body", HEAD + data(1, b"x", True), []),
        Case("trailers", HEAD + data(1, b"x") + headers(1, [(b"a", b"b")]), []),
        Case("trailers right behind the head", HEAD + headers(1, [(b"a", b"b")]), []),
        Case("interim heads", headers(1, [(b":status", b"103")], 4) * 3 + HEAD + data(1, b"", True), []),
        Case("no :status", headers(1, [(b"x", b"y")]), RESET),
        Case(":status twice", headers(1, OK * 2), RESET),
        Case(":status of two digits", headers(1, [(b":status", b"20")]), RESET),
        Case(":status of four", headers(1, [(b":status", b"0200")]), RESET),
        Case(":status that is no number", headers(1, [(b":status", b"2x0")]), RESET),
        Case(":status of 600", headers(1, [(b":status", b"600")]), RESET),
        Case(":status of 99", headers(1, [(b":status", b"099")]), RESET),
        Case("another pseudo-header field", headers(1, (*OK, (b":path", b"/"))), RESET),
        Case(":status behind a field", headers(1, ((b"x", b"y"), *OK)), RESET),
        Case("upper case", headers(1, (*OK, (b"X", b"y"))), RESET),
        Case("a line break", headers(1, (*OK, (b"x", b"y\r\nz: 1"))), RESET),
        Case("Connection", headers(1, (*OK, (b"connection", b"close"))), RESET),
        Case("Transfer-Encoding", headers(1, (*OK, (b"transfer-encoding", b"chunked"))), RESET),
        Case("101", headers(1, [(b":status", b"101")], 4), RESET),
        Case("an interim head that ends", headers(1, [(b":status", b"100")]), RESET),
        Case(
            "an interim head with a length",
            headers(1, [(b":status", b"103"), (b"content-length", b"1")], 4),
            RESET,
        ),
        Case("32 interim heads", headers(1, [(b":status", b"103")], 4) * 32 + headers(1, OK), []),
        Case("33 interim heads", headers(1, [(b":status", b"103")], 4) * 33, RESET),
        Case("DATA before the head", data(1, b"x"), RESET),
        Case("an end before the head", data(1, b"", True), RESET),
        Case("a second head", HEAD * 2, RESET),
        Case("pseudo-header fields in trailers", HEAD + headers(1, OK), RESET),
        Case("framing in trailers", HEAD + headers(1, [(b"content-length", b"0")]), RESET),
        Case("DATA behind the end", headers(1, OK) + data(1, b"x"), [(1, CLOSED)]),
        Case("HEADERS behind the end", headers(1, OK) * 2, error(CLOSED)),
        Case("depends on itself", frame(HEADERS, 0x25, 1, struct.pack(">IB", 1, 0) + block(OK)), RESET),
    )
    def test_shapes(self, case: Case) -> None:
        check(case, asked)

    @pytest.mark.parametrize("fields", [OK, (*OK, (b"content-length", b"5"))])
    @pytest.mark.parametrize("status", [b"204", b"304"])
    def test_no_body_where_there_is_none(self, status: bytes, fields: Fields) -> None:
        fields = ((b":status", status), *list(fields)[1:])
        check(Case("", headers(1, fields), []), asked)
        check(Case("", headers(1, fields, 4) + data(1, b"", True), []), asked)
        check(Case("", headers(1, fields, 4) + data(1, b"hello", True), RESET), asked)

    def test_head(self) -> None:
        long = (*OK, (b"content-length", b"5"))
        check(Case("", headers(1, long), []), lambda: asked(b"HEAD"))
        check(Case("", headers(1, long, 4) + data(1, b"hello", True), RESET), lambda: asked(b"HEAD"))
        world = asked(b"HEAD")
        world.feed(headers(1, long))
        assert world.sink.response is not None
        assert (world.sink.response.content_length, world.sink.ended) == (5, True)

    @pytest.mark.parametrize(
        ("into", "ok"),
        [
            (data(1, b"hello", True), True),
            (data(1, b"hello") + data(1, b"", True), True),
            (data(1, b"hello") + headers(1, [(b"a", b"b")]), True),
            (data(1, b"hell", True), False),
            (data(1, b"hello!"), False),
            (data(1, b"hell") + headers(1, [(b"a", b"b")]), False),
        ],
    )
    def test_content_length(self, into: bytes, ok: bool) -> None:
        head = headers(1, (*OK, (b"content-length", b"5")), 4)
        check(Case("", head + into, [] if ok else RESET), asked)
        world = asked()
        world.feed(head + into)
        assert world.sink.ended is ok
        assert (type(world.sink.error) is FramingError) is not ok

    def test_a_length_and_an_end(self) -> None:
        check(Case("", headers(1, (*OK, (b"content-length", b"5"))), RESET), asked)

    def test_a_list_over_the_limit(self) -> None:
        world = asked(max_header_list_size=2000)
        world.feed(headers(1, (*OK, (b"x", b"y" * 2000))))
        assert type(world.sink.error) is HeadTooLargeError
        assert world.verdict() == RESET

    def test_too_many_fields(self) -> None:
        world = asked(max_count=10)
        world.feed(headers(1, (*OK, *[(b"x", b"y")] * 10)))
        assert type(world.sink.error) is HeadTooLargeError

    def test_equal_blocks_are_fresh_heads(self) -> None:
        world = ClientWorld()
        sinks = [world.ask() for _ in range(3)]
        for each in (1, 3, 5):
            world.feed(headers(each, (*OK, (b"x", b"y"))))
        heads = [sink.response for sink in sinks]
        assert len({id(head) for head in heads}) == 3
        assert all(head is not None and head.headers == ((b"x", b"y"),) for head in heads)

    def test_equal_blocks_mean_something_else_in_another_table(self) -> None:
        world = ClientWorld()
        sinks = []
        for at, raw in enumerate(
            [b"\x88\x40\x01a\x011", *[b"\x88\xbe"] * 3, b"\x88\x40\x01a\x012", b"\x88\xbe"]
        ):
            sinks.append(world.ask())
            world.feed(frame(HEADERS, 5, 1 + 2 * at, raw))
        values = [dict(sink.response.headers)[b"a"] for sink in sinks if sink.response is not None]
        assert values == [b"1"] * 4 + [b"2"] * 2

    def test_what_the_sink_is_told(self) -> None:
        world = asked()
        world.feed(
            headers(1, [(b":status", b"103"), (b"link", b"x")], 4),
            headers(1, (*OK, (b"x", b"y"), (b"proxy-authenticate", b"z")), 4),
            data(1, b"body"),
            headers(1, [(b"grpc-status", b"0")]),
        )
        assert world.sink.calls == [
            ("informational", 103, ((b"link", b"x"),)),
            ("response", 200),
            ("data", b"body", False),
            ("trailers", ((b"grpc-status", b"0"),)),
        ]
        assert world.sink.response is not None
        assert world.sink.response.headers == ((b"x", b"y"),)
        assert world.sink.response.version == b"2"
        assert world.shell.done == [1]


class TestFramesFromABackend:
    @cases(
        Case("another frame than SETTINGS first", ping(), error(PROTOCOL)),
        Case("HTTP/1.1", b"HTTP/1.1 400 Bad Request\r\n\r\n", error(SIZE)),
        Case("an acknowledgement first", SETTINGS_ACK, error(PROTOCOL)),
        Case("SETTINGS", settings((3, 10)), []),
    )
    def test_first(self, case: Case) -> None:
        check(case, lambda: ClientWorld(raw=True))

    @cases(
        Case("PUSH_PROMISE", frame(PUSH_PROMISE, 4, 1, struct.pack(">I", 2) + block(OK)), error(PROTOCOL)),
        Case("ENABLE_PUSH of 1", settings((2, 1)), error(PROTOCOL)),
        Case("ENABLE_PUSH of 0", settings((2, 0)), []),
        Case("ENABLE_CONNECT_PROTOCOL of 2", settings((8, 2)), error(PROTOCOL)),
        Case("ENABLE_CONNECT_PROTOCOL taken back", settings((8, 1)) + settings((8, 0)), error(PROTOCOL)),
        Case("HEADERS on an idle stream", headers(3, OK), error(PROTOCOL)),
        Case("HEADERS on the server's id", headers(2, OK), error(PROTOCOL)),
        Case("HEADERS on no stream", headers(0, OK), error(PROTOCOL)),
        Case("DATA on an idle stream", data(3, b"x"), error(PROTOCOL)),
        Case("DATA on no stream", data(0, b"x"), error(PROTOCOL)),
        Case("RST_STREAM on an idle stream", rst(3), error(PROTOCOL)),
        Case("RST_STREAM of another size", frame(RST_STREAM, 0, 1, b"x"), error(SIZE)),
        Case("WINDOW_UPDATE on an idle stream", window_update(3, 1), error(PROTOCOL)),
        Case("WINDOW_UPDATE by nothing", window_update(1, 0), RESET),
        Case("WINDOW_UPDATE too far", window_update(1, 2**31 - 1), [(1, FLOW)]),
        Case("PRIORITY", frame(PRIORITY, 0, 1, bytes(5)), []),
        Case("PING on a stream", frame(PING, 0, 1, bytes(8)), error(PROTOCOL)),
        Case("GOAWAY on a stream", goaway(0, stream=1), error(PROTOCOL)),
        Case("CONTINUATION alone", frame(CONTINUATION, 4, 1, block(OK)), error(PROTOCOL)),
        Case("CONTINUATION", frame(HEADERS, 1, 1, b"\x88") + frame(CONTINUATION, 4, 1), []),
        Case("interrupted", frame(HEADERS, 1, 1, b"\x88") + ping(), error(PROTOCOL)),
        Case("a block that cannot be decoded", frame(HEADERS, 5, 1, b"\xbe"), error(COMPRESSION)),
        Case("a frame too large", frame(DATA, 0, 1, bytes(16_385)), error(SIZE)),
        Case("an unknown frame", frame(0x42, 0, 1, b"x") + headers(1, OK), []),
        Case("padding too long", HEAD + frame(DATA, 8, 1, b"\x05x"), error(PROTOCOL)),
        Case(
            "more DATA than the window", HEAD + data(1, b"x" * 101), [(1, FLOW)], None, {"stream_window": 100}
        ),
    )
    def test_scopes(self, case: Case) -> None:
        check(case, lambda: asked(**(case.more or {})))

    def test_siblings_go_on(self) -> None:
        world = ClientWorld()
        first, second = world.ask(), world.ask()
        world.feed(headers(1, [(b"x", b"y")]), headers(3, OK))
        assert type(first.error) is MalformedError
        assert second.ended
        assert world.verdict() == RESET

    def test_a_connection_error_reaches_everyone(self) -> None:
        world = ClientWorld()
        sinks = [world.ask(), world.ask()]
        world.feed(data(0, b"x"))
        assert [sink.aborts for sink in sinks] == [1, 1]
        assert world.shell.done == [1, 3]
        assert goaways(world.take()) == [(0, PROTOCOL)]
        assert not world.codec.can_open


class TestFailures:
    @pytest.mark.parametrize(
        ("into", "kind", "delivered"),
        [
            (rst(1, REFUSED), UnprocessedError, False),
            (rst(1, CANCEL), StreamResetError, True),
            (rst(1, NO_ERROR), StreamResetError, True),
            (HEAD + rst(1, CALM), StreamResetError, True),
            (goaway(0), UnprocessedError, False),
            (goaway(0, CALM), UnprocessedError, False),
        ],
    )
    def test_before_the_end(self, into: bytes, kind: type[WireError], delivered: bool) -> None:
        world = asked()
        world.feed(into)
        assert type(world.sink.error) is kind
        assert world.stream.was_delivered() is delivered
        assert world.sink.aborts == 1
        assert world.shell.done == [1]

    def test_the_code_is_kept(self) -> None:
        world = asked()
        world.feed(rst(1, 0x1234))
        assert isinstance(world.sink.error, StreamResetError)
        assert world.sink.error.code == 0x1234

    def test_a_reset_behind_the_response(self) -> None:
        """8.1: a server that needs no more of the request says so with NO_ERROR."""
        world = asked(b"POST", end=False)
        world.feed(headers(1, OK) + rst(1, NO_ERROR))
        assert world.sink.ended
        assert world.sink.error is None
        world.stream.send_data(b"x", True)
        assert world.take() == []
        assert world.shell.done == [1]

    @pytest.mark.parametrize(
        ("into", "kind"),
        [(b"", PeerClosedError), (HEAD, TruncatedError), (HEAD + data(1, b"x"), TruncatedError)],
    )
    @pytest.mark.parametrize("end", ["receive_eof", "receive_reset"])
    def test_the_connection_is_gone(self, end: str, into: bytes, kind: type[WireError]) -> None:
        world = asked()
        world.feed(into)
        getattr(world.codec, end)()
        assert type(world.sink.error) is kind
        assert not world.codec.can_open

    def test_nothing_was_flushed(self) -> None:
        world = ClientWorld()
        world.ask()
        assert not world.stream.was_delivered()
        world.take()
        assert world.stream.was_delivered()

    def test_reused(self) -> None:
        world = ClientWorld()
        world.ask()
        assert not world.stream.is_reused
        world.ask()
        assert world.stream.is_reused

    @pytest.mark.parametrize(
        ("error", "code"), [(None, CANCEL), (StreamResetError(5), 5), (MalformedError("x"), CANCEL)]
    )
    def test_abort(self, error: WireError | None, code: int) -> None:
        world = asked(b"POST", end=False)
        world.stream.abort(error)
        world.stream.abort(None)
        world.feed(HEAD, data(1, b"x" * 1000), headers(1, [(b"a", b"b")]))
        assert world.verdict() == [(1, code)]
        assert world.sink.calls == []
        assert world.shell.done == [1]

    def test_abort_before_the_head(self) -> None:
        world = ClientWorld()
        stream = world.codec.open(world.ask())
        stream.abort(None)
        stream.send_head(request(), True)
        assert [each[2] for each in world.take()] == [1]


def has_room(world: ClientWorld) -> bool:
    return world.codec.can_open


class TestRoom:
    def test_the_backends_limit(self) -> None:
        world = ClientWorld(settings_of=((3, 2),))
        assert has_room(world)
        world.ask()
        world.codec.open(world.ask())
        assert not has_room(world)
        world.feed(headers(1, OK))
        assert not has_room(world)
        world.feed(headers(3, OK))
        assert has_room(world)
        world.feed(settings((3, 0)))
        assert not has_room(world)
        assert world.shell.told == ["limits", "limits"]

    def test_our_own(self) -> None:
        world = ClientWorld(max_concurrent_streams=1)
        world.ask()
        assert not has_room(world)

    def test_goaway(self) -> None:
        world = ClientWorld()
        first, second = world.ask(), world.ask()
        third = world.codec.open(second)
        world.feed(goaway(1))
        assert world.shell.told[-1] == "unavailable"
        assert not has_room(world)
        assert first.error is None
        assert type(second.error) is UnprocessedError
        third.sink = late = world.asked[0][1]
        third.send_head(request(), True)
        assert type(late.error) is UnprocessedError
        assert world.shell.closed == []
        first.error = None
        world.feed(headers(1, OK))
        assert world.shell.closed == [True]

    def test_goaway_in_two_steps(self) -> None:
        world = ClientWorld()
        first, second = world.ask(), world.ask()
        world.feed(goaway(2**31 - 1))
        assert (first.error, second.error) == (None, None)
        world.feed(goaway(1))
        assert (first.error, type(second.error)) == (None, UnprocessedError)
        assert world.shell.told.count("unavailable") == 1

    def test_idle_and_told_to_go(self) -> None:
        world = ClientWorld()
        world.feed(goaway(0))
        assert world.shell.closed == [True]

    def test_ids_run_out(self) -> None:
        world = ClientWorld()
        world.codec._next_id = 2**31 - 1
        assert has_room(world)
        sink = world.ask()
        assert not has_room(world)
        assert world.shell.told[-1] == "unavailable"
        assert sink.error is None
        assert type(world.ask().error) is UnprocessedError


class TestExtendedConnect:
    HANDSHAKE = (b"sec-websocket-version", b"13")

    def open(self, *offers: tuple[int, int]) -> ClientWorld:
        world = ClientWorld(settings_of=offers or ((8, 1),))
        world.ask(request(path=b"/chat", headers=(self.HANDSHAKE,), protocol=b"websocket"), False)
        return world

    def test_the_handshake(self) -> None:
        head = request(path=b"/chat", headers=(self.HANDSHAKE,), protocol=b"websocket")
        assert sent(head, False) == [
            (b":method", b"CONNECT"),
            (b":scheme", b"https"),
            (b":path", b"/chat"),
            (b":authority", b"example.org"),
            (b":protocol", b"websocket"),
            self.HANDSHAKE,
        ]

    def test_not_offered(self) -> None:
        world = self.open((3, 10))
        assert type(world.sink.error) is NotOfferedError
        assert world.take() == []

    def test_it_waits_for_the_offer(self) -> None:
        world = ClientWorld(raw=True)
        for _ in range(2):
            world.ask(request(protocol=b"websocket"), False)
        world.ask()
        world.take()
        assert [each[2] for each in world.seen if each[0] == HEADERS] == [1]
        world.feed(settings((8, 1)))
        assert [each[2] for each in world.take() if each[0] == HEADERS] == [3, 5]

    def test_accepted(self) -> None:
        world = self.open()
        world.take()
        world.feed(headers(1, (*OK, (b"x", b"y")), 4), data(1, b"hi"))
        assert world.sink.calls == [("informational", 101, ((b"x", b"y"),)), ("data", b"hi", False)]
        world.stream.send_data(b"ho", False)
        world.stream.close()
        out = world.take()
        assert bodies(out, 1) == b"ho"
        assert ended(out, 1)
        world.feed(data(1, b"late", True))
        assert world.sink.calls[-1] == ("data", b"hi", False)
        assert world.shell.done == [1]

    def test_declined(self) -> None:
        world = self.open()
        world.feed(headers(1, [(b":status", b"403"), (b"content-length", b"2")], 4), data(1, b"no", True))
        assert world.sink.calls == [("response", 403), ("data", b"no", True)]

    def test_the_backends_end(self) -> None:
        world = self.open()
        world.feed(headers(1, OK, 4), data(1, b"", True))
        assert world.sink.calls[-1] == ("data", b"", True)
        assert world.shell.done == []
        world.stream.send_data(b"", True)
        assert world.shell.done == [1]


class TestReceiving:
    def test_pause(self) -> None:
        world = asked(stream_window=1000, max_stream_window=1000)
        world.stream.pause()
        world.feed(HEAD, data(1, b"x" * 1000))
        assert [each for each in world.take() if each[0] == WINDOW_UPDATE] == []
        world.stream.resume()
        assert [each[2] for each in world.take() if each[0] == WINDOW_UPDATE] == [1]

    def test_ping(self) -> None:
        world = ClientWorld()
        world.feed(ping(b"abcdefgh"))
        assert world.take() == [(PING, ACK, 0, b"abcdefgh")]
