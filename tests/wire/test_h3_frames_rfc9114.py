"""Frames and streams of HTTP/3: what a server and a client make of them, whole and cut at every byte."""

from typing import Any

import pytest

from tests.wire.h3_world import (
    CANCEL_PUSH,
    CANCELLED,
    CONTROL,
    CREATION,
    CRITICAL,
    DATA,
    DECODER,
    DECODER_ERROR,
    DECOMPRESSION,
    ENCODER,
    ENCODER_ERROR,
    EXCESSIVE,
    FRAME,
    GET,
    GOAWAY,
    HEADERS,
    ID,
    INCOMPLETE,
    MAX_PUSH_ID,
    MISSING,
    OK,
    POST,
    PUSH,
    PUSH_PROMISE,
    SETTINGS,
    SETTINGS_ERROR,
    UNEXPECTED,
    Case,
    ClientWorld,
    ServerWorld,
    check,
    data,
    error,
    frame,
    frames,
    headers,
    integer,
    read_integer,
    settings,
)

GREASE = 0x1F * 7 + 0x21
REQUEST = (0, headers(), True)


def by_name(*cases: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=str)


class TestRequestStreams4:
    """RFC 9114 4.1, 7.1, 7.2, 9."""

    @by_name(
        Case("a request", [REQUEST], [], 1),
        Case("a request with a body", [(0, headers(POST) + data(b"hello"), True)], [], 1),
        Case("the end alone", [(0, headers(POST) + data(b"hello"), False), (0, b"", True)], [], 1),
        Case(
            "integers longer than needed",
            [(0, integer(1, 8) + integer(2, 4) + b"\0\0", True)],
            [(0, 0x10E)],
            0,
        ),
        Case("DATA before HEADERS", [(0, data(b"x"), False)], error(UNEXPECTED), 0),
        Case("empty DATA before HEADERS", [(0, data(b""), False)], error(UNEXPECTED), 0),
        Case(
            "DATA behind trailers",
            [(0, headers(POST) + headers([(b"a", b"b")]) + data(b"x"), False)],
            error(UNEXPECTED),
            1,
        ),
        Case(
            "HEADERS behind trailers",
            [(0, headers(POST) + 2 * headers([(b"a", b"b")]), False)],
            error(UNEXPECTED),
            1,
        ),
        Case("trailers", [(0, headers(POST) + data(b"x") + headers([(b"a", b"b")]), True)], [], 1),
        Case("an unknown frame in front", [(0, frame(GREASE, b"xyz") + headers(), True)], [], 1),
        Case("an unknown frame behind", [(0, headers() + frame(GREASE, b"xyz"), True)], [], 1),
        Case(
            "unknown frames all over",
            [
                (
                    0,
                    headers(POST)
                    + frame(GREASE)
                    + data(b"x")
                    + frame(0xF0700, b"y")
                    + headers([(b"a", b"b")])
                    + frame(0x2F, b"z"),
                    True,
                )
            ],
            [],
            1,
        ),
        Case("ends inside DATA", [(0, headers(POST) + data(b"hello")[:-1], True)], error(FRAME), 1),
        Case("ends inside HEADERS", [(0, headers()[:-1], True)], error(FRAME), 0),
        Case("ends inside a type", [(0, headers(POST) + b"\x40", True)], error(FRAME), 1),
        Case("ends inside a length", [(0, headers(POST) + b"\x00\x40", True)], error(FRAME), 1),
        Case(
            "ends inside an unknown frame",
            [(0, headers(POST) + frame(GREASE, b"xyz")[:-1], True)],
            error(FRAME),
            1,
        ),
        Case("ends before its head", [(0, b"", True)], [(0, INCOMPLETE)], 0),
        Case("ends behind an unknown frame", [(0, frame(GREASE), True)], [(0, INCOMPLETE)], 0),
        *(
            Case(
                f"type {kind:#x} on a request stream",
                [(0, headers(POST) + frame(kind, b"\0"), False)],
                error(UNEXPECTED),
                1,
            )
            for kind in (CANCEL_PUSH, SETTINGS, PUSH_PROMISE, GOAWAY, MAX_PUSH_ID, 0x2, 0x6, 0x8, 0x9)
        ),
    )
    def test_server(self, case: Case) -> None:
        check(case, ServerWorld)

    @by_name(
        Case("a response", [(0, headers(OK) + data(b"x"), True)], []),
        Case(
            "interim, final, trailers",
            [(0, headers([(b":status", b"103")]) + headers(OK) + data(b"x") + headers([(b"a", b"b")]), True)],
            [],
        ),
        Case("DATA before a head", [(0, data(b"x"), False)], error(UNEXPECTED)),
        Case(
            "DATA behind an interim head",
            [(0, headers([(b":status", b"103")]) + data(b"x"), False)],
            error(UNEXPECTED),
        ),
        Case("ends inside DATA", [(0, headers(OK) + data(b"hello")[:-1], True)], error(FRAME)),
        Case("ends before a final head", [(0, headers([(b":status", b"103")]), True)], [(0, 0x10E)]),
        Case("ends at once", [(0, b"", True)], [(0, 0x10E)]),
        Case("PUSH_PROMISE", [(0, frame(PUSH_PROMISE, b"\0\0\0"), False)], error(ID)),
        Case("MAX_PUSH_ID", [(0, frame(MAX_PUSH_ID, b"\0"), False)], error(UNEXPECTED)),
        Case("a stream from the server", [(1, headers(), False)], error(CREATION)),
    )
    def test_client(self, case: Case) -> None:
        def make() -> ClientWorld:
            world = ClientWorld()
            world.ask()
            world.flush()
            return world

        check(case, make)

    def test_a_body_is_told_as_it_comes(self) -> None:
        world = ServerWorld(None)
        world.feed(0, headers(POST) + data(b"x" * 100_000)[:1000])
        assert len(world.last.payload) == 1000 - 5
        world.feed(0, b"x" * 99_000)
        assert len(world.last.payload) == 100_000 - 5
        assert not world.last.ended

    def test_streams_in_any_order(self) -> None:
        world = ServerWorld()
        for each in (8, 0, 4):
            world.feed(each, headers(), True)
        assert len(world.exchanges) == 3
        assert world.verdict() == []


class TestUnidirectionalStreams6:
    """RFC 9114 6.2; RFC 9204 4.2."""

    BEGIN = (2, integer(CONTROL) + settings(), False)

    @by_name(
        Case("a control stream", [BEGIN, REQUEST], [], 1),
        Case("a second one", [BEGIN, (6, integer(CONTROL), False)], error(CREATION)),
        Case(
            "a second encoder stream",
            [(2, integer(ENCODER), False), (6, integer(ENCODER), False)],
            error(CREATION),
        ),
        Case(
            "a second decoder stream",
            [(2, integer(DECODER), False), (6, integer(DECODER), False)],
            error(CREATION),
        ),
        Case("a push stream", [(2, integer(PUSH) + b"\0", False)], error(CREATION)),
        Case("a control stream that ends", [(2, integer(CONTROL) + settings(), True)], error(CRITICAL)),
        Case("an encoder stream that ends", [(2, integer(ENCODER), True)], error(CRITICAL)),
        Case("a decoder stream that ends", [(2, integer(DECODER), True)], error(CRITICAL)),
        Case("an unknown type", [(2, integer(GREASE) + b"xyz", True), REQUEST], [], 1),
        Case("one that ends before its type", [(2, b"\x40", True), REQUEST], [], 1),
        Case("an empty one", [(2, b"", True), REQUEST], [], 1),
    )
    def test_server(self, case: Case) -> None:
        check(case, lambda: ServerWorld(raw=True))

    def test_a_type_that_is_unknown_is_not_read(self) -> None:
        world = ServerWorld()
        world.feed(14, integer(GREASE) + b"xyz").feed(14, b"more")
        assert world.transport.stops == {14: CREATION}
        world.account()

    def test_a_push_stream_to_a_client(self) -> None:
        world = ClientWorld()
        world.feed(15, integer(PUSH) + b"\0")
        assert world.verdict() == error(ID)

    @pytest.mark.parametrize("number", [2, 6, 10])
    def test_a_critical_stream_that_is_reset(self, number: int) -> None:
        assert ServerWorld().reset(number).verdict() == error(CRITICAL)

    @pytest.mark.parametrize("number", [3, 7, 11])
    def test_a_critical_stream_that_is_stopped(self, number: int) -> None:
        assert ServerWorld().stop(number).verdict() == error(CRITICAL)

    def test_other_streams_may_be_reset(self) -> None:
        world = ServerWorld()
        world.feed(14, integer(GREASE)).reset(14).reset(18)
        assert world.verdict() == []

    @pytest.mark.parametrize("make", [ServerWorld, ClientWorld])
    def test_what_we_open(self, make: Any) -> None:
        world = make(raw=True)
        kinds = [
            world.transport.sent[each][0]
            for each in (world.base ^ 1, (world.base ^ 1) + 4, (world.base ^ 1) + 8)
        ]
        assert kinds == [CONTROL, ENCODER, DECODER]
        assert frames(world.transport.sent[world.base ^ 1][1:])[0][0] == SETTINGS

    def test_a_peer_that_allows_too_few(self) -> None:
        world = ServerWorld(raw=True)
        world.transport.open_stream = lambda unidirectional: None  # type: ignore[method-assign]
        world.codec.begin(1.0)
        assert world.verdict() == error(CREATION)


class TestControlStream7:
    """RFC 9114 6.2.1, 7.2."""

    @by_name(
        Case("no SETTINGS first", [(2, b"\0" + frame(GOAWAY, b"\0"), False)], error(MISSING)),
        Case("an unknown frame first", [(2, b"\0" + frame(GREASE, b"\0"), False)], error(MISSING)),
        Case("SETTINGS twice", [(2, b"\0" + settings() + settings(), False)], error(UNEXPECTED)),
        Case(
            "unknown settings",
            [(2, b"\0" + settings((GREASE, 1), (0x33, 1), (6, 100)), False), REQUEST],
            [],
            1,
        ),
        *(
            Case(f"setting {number:#x}", [(2, b"\0" + settings((number, 1)), False)], error(SETTINGS_ERROR))
            for number in (0, 2, 3, 4, 5)
        ),
        Case("a setting twice", [(2, b"\0" + settings((6, 1), (6, 1)), False)], error(SETTINGS_ERROR)),
        Case("CONNECT neither 0 nor 1", [(2, b"\0" + settings((8, 2)), False)], error(SETTINGS_ERROR)),
        Case("datagrams neither 0 nor 1", [(2, b"\0" + settings((0x33, 2)), False)], error(SETTINGS_ERROR)),
        Case("a setting cut short", [(2, b"\0" + frame(SETTINGS, b"\x06"), False)], error(FRAME)),
        Case("a value cut short", [(2, b"\0" + frame(SETTINGS, b"\x06\x40"), False)], error(FRAME)),
        *(
            Case(f"type {kind:#x}", [(2, b"\0" + settings() + frame(kind, b"\0"), False)], error(UNEXPECTED))
            for kind in (DATA, HEADERS, PUSH_PROMISE, 0x2, 0x6, 0x8, 0x9)
        ),
        Case("CANCEL_PUSH", [(2, b"\0" + settings() + frame(CANCEL_PUSH, b"\0"), False)], error(ID)),
        Case(
            "MAX_PUSH_ID",
            [
                (2, b"\0" + settings() + frame(MAX_PUSH_ID, b"\x05") + frame(MAX_PUSH_ID, b"\x05"), False),
                REQUEST,
            ],
            [],
            1,
        ),
        Case(
            "MAX_PUSH_ID going down",
            [(2, b"\0" + settings() + frame(MAX_PUSH_ID, b"\x05") + frame(MAX_PUSH_ID, b"\x04"), False)],
            error(ID),
        ),
        Case("MAX_PUSH_ID empty", [(2, b"\0" + settings() + frame(MAX_PUSH_ID), False)], error(FRAME)),
        Case(
            "MAX_PUSH_ID with more",
            [(2, b"\0" + settings() + frame(MAX_PUSH_ID, b"\0\0"), False)],
            error(FRAME),
        ),
        Case("GOAWAY too long", [(2, b"\0" + settings() + frame(GOAWAY, bytes(9)), False)], error(FRAME)),
        Case("GOAWAY cut short", [(2, b"\0" + settings() + frame(GOAWAY, b"\x40"), False)], error(FRAME)),
        Case(
            "GOAWAY",
            [(2, b"\0" + settings() + frame(GOAWAY, b"\x03") + frame(GOAWAY, b"\x01"), False), REQUEST],
            [],
            1,
        ),
        Case(
            "GOAWAY going up",
            [(2, b"\0" + settings() + frame(GOAWAY, b"\x01") + frame(GOAWAY, b"\x03"), False)],
            error(ID),
        ),
        Case(
            "unknown frames",
            [
                (
                    2,
                    b"\0"
                    + settings()
                    + frame(GREASE, b"abc")
                    + frame(0xF0700, b"\0u=1")
                    + frame(GOAWAY, b"\0"),
                    False,
                ),
                REQUEST,
            ],
            [],
            1,
        ),
        Case("a great many settings", [(2, b"\0" + frame(SETTINGS, bytes(1025)), False)], error(EXCESSIVE)),
    )
    def test_server(self, case: Case) -> None:
        check(case, lambda: ServerWorld(raw=True))

    @by_name(
        Case("MAX_PUSH_ID from a server", [(3, frame(MAX_PUSH_ID, b"\0"), False)], error(UNEXPECTED)),
        Case("CANCEL_PUSH", [(3, frame(CANCEL_PUSH, b"\0"), False)], error(ID)),
        Case("GOAWAY with a server's id", [(3, frame(GOAWAY, b"\x01"), False)], error(ID)),
        Case("GOAWAY going up", [(3, frame(GOAWAY, b"\x04") + frame(GOAWAY, b"\x08"), False)], error(ID)),
    )
    def test_client(self, case: Case) -> None:
        def make() -> ClientWorld:
            world = ClientWorld()
            world.ask()
            return world

        check(case, make)

    def test_our_settings(self) -> None:
        raw = frames(ServerWorld(websocket=True).transport.sent[3][1:])[0][1]
        found = {}
        while raw:
            number, raw = read_integer(raw)
            found[number], raw = read_integer(raw)
        assert found == {1: 4096, 6: 65_536, 7: 16, 8: 1}
        assert 0x33 not in found
        assert b"\x08" not in frames(ServerWorld().transport.sent[3][1:])[0][1][::2]


class TestQpackStreams:
    """RFC 9204 2.2.3, 6: whose error is which."""

    def test_a_block_that_is_none(self) -> None:
        assert ServerWorld().feed(0, frame(HEADERS, b"\0\0\xff\x24"), True).verdict() == error(DECOMPRESSION)
        assert ServerWorld().feed(0, frame(HEADERS, b""), True).verdict() == error(DECOMPRESSION)
        assert ServerWorld().feed(0, frame(HEADERS, b"\0\0\x80"), True).verdict() == error(DECOMPRESSION)

    def test_insertions_that_are_none(self) -> None:
        assert ServerWorld().insertions(b"\x3f\xe2\x1f").verdict() == error(ENCODER_ERROR)
        assert ServerWorld().insertions(b"\x00").verdict() == error(ENCODER_ERROR)

    def test_acknowledgements_that_are_none(self) -> None:
        assert ServerWorld().feed(10, b"\x00").verdict() == error(DECODER_ERROR)
        assert ServerWorld().feed(10, b"\x80").verdict() == error(DECODER_ERROR)
        assert ServerWorld().feed(10, b"\x01").verdict() == error(DECODER_ERROR)

    def test_after_an_error_nothing_is_read(self) -> None:
        world = ServerWorld(None)
        world.feed(0, headers(POST)).feed(10, b"\x00")
        world.feed(0, data(b"x")).reset(0).stop(0)
        world.flush()
        world.codec.sweep(1000.0)
        world.codec.receive_closed("late")
        assert world.last.aborts == 1
        assert world.shell.closed == [False]
        assert world.last.payload == b""


def test_numbers() -> None:
    assert CANCELLED == 0x10C
    assert INCOMPLETE == 0x10D
    assert GET[0] == (b":method", b"GET")
