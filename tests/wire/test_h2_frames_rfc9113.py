"""RFC 9113 by section: what each wrong frame, and each odd but right one, does to a server's connection.

Sections 3 to 7. Every case runs whole, cut in two at every byte, and byte by byte.
"""

import struct

import pytest

from tests.wire.h2_world import (
    ACK,
    BEGIN,
    CANCEL,
    CLOSED,
    COMPRESSION,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FLOW,
    GET,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    POST,
    PREFACE,
    PRIORITIZED,
    PRIORITY,
    PROTOCOL,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    SETTINGS_ACK,
    SIZE,
    WINDOW_UPDATE,
    Case,
    ServerWorld,
    block,
    check,
    data,
    error,
    frame,
    goaway,
    headers,
    ping,
    rst,
    settings,
    window_update,
)

OPEN = headers(1, POST, END_HEADERS)
"""A request whose body is to come."""
DONE = headers(1)
"""A request that is answered at once."""
BLOCK = block(GET)
TRAILERS = frame(HEADERS, END_STREAM | END_HEADERS, 1, block([(b"x-sum", b"1")]))


def run(case: Case) -> None:
    more = case.more or {}
    check(case, lambda: ServerWorld(**more))


def cases(*each: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", each, ids=str)


class TestSection3Preface:
    """RFC 9113 3.4."""

    @cases(
        Case("the preface and SETTINGS", BEGIN, [], 0),
        Case("a request right behind", BEGIN + DONE, [], 1),
        Case("settings in the first frame", PREFACE + settings((3, 100), (4, 1000)), [], 0),
        Case("another first letter", b"XRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings(), error(PROTOCOL)),
        Case("another last letter", PREFACE[:-1] + b"\r" + settings(), error(PROTOCOL)),
        Case("HTTP/1.1", b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", error(PROTOCOL), 0),
        Case("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40), error(PROTOCOL), 0),
        Case("another frame first", PREFACE + ping(), error(PROTOCOL)),
        Case("HEADERS first", PREFACE + DONE, error(PROTOCOL), 0),
        Case("an unknown frame first", PREFACE + frame(0x42, 0, 0), error(PROTOCOL)),
        Case("an acknowledgement first", PREFACE + SETTINGS_ACK, error(PROTOCOL)),
        Case("the preface twice", PREFACE + settings() + PREFACE, error(SIZE)),
    )
    def test_first_bytes(self, case: Case) -> None:
        check(case, lambda: ServerWorld(raw=True))


class TestSection4FrameFormat:
    """RFC 9113 4.1."""

    @cases(
        Case("an unknown type is ignored", frame(0xA, 0, 0, b"x" * 8) + DONE, [], 1),
        Case("an unknown type on a stream", frame(0xFF, 0xFF, 5, b"x") + DONE, [], 1),
        Case("unknown flags", ping(flags=0xFE) + frame(HEADERS, 0x5 | 0xC2, 1, BLOCK), [], 1),
        Case("the reserved bit of an id", frame(HEADERS, 5, 1 | 1 << 31, BLOCK), [], 1),
        Case("the reserved bit of a control frame", frame(PING, 0, 1 << 31, b"x" * 8), []),
    )
    def test_what_is_ignored(self, case: Case) -> None:
        run(case)


class TestSection4FrameSize:
    """RFC 9113 4.2."""

    @cases(
        Case("DATA of the largest size", OPEN + data(1, b"x" * 16_384, True), [], 1),
        Case("DATA above it", OPEN + data(1, b"x" * 16_385), error(SIZE)),
        Case("HEADERS above it", frame(HEADERS, 5, 1, bytes(16_385)), error(SIZE), 0),
        Case("an unknown frame above it", frame(0x42, 0, 0, bytes(16_385)), error(SIZE)),
        Case("only its header has come", frame(DATA, 0, 1, bytes(16_385))[:9], error(SIZE)),
        Case("the largest length there is", b"\xff\xff\xff" + bytes(6), error(SIZE)),
        Case("SETTINGS above it", frame(SETTINGS, 0, 0, bytes(16_386)), error(SIZE)),
    )
    def test_sizes(self, case: Case) -> None:
        run(case)


class TestSection4HeaderBlocks:
    """RFC 9113 4.3."""

    @cases(
        Case("an index beyond the tables", frame(HEADERS, 5, 1, b"\xbe"), error(COMPRESSION), 0),
        Case("index zero", frame(HEADERS, 5, 1, b"\x80"), error(COMPRESSION)),
        Case("a number without an end", frame(HEADERS, 5, 1, b"\xff\x80"), error(COMPRESSION)),
        Case("a number too long", frame(HEADERS, 5, 1, b"\xff" + b"\x80" * 9 + b"\x01"), error(COMPRESSION)),
        Case("a name without a value", frame(HEADERS, 5, 1, b"\x40\x01a"), error(COMPRESSION)),
        Case("nothing behind a literal", frame(HEADERS, 5, 1, b"\x40"), error(COMPRESSION)),
        Case("a string longer than the block", frame(HEADERS, 5, 1, b"\x00\x05ab"), error(COMPRESSION)),
        Case("a table size update at the end", frame(HEADERS, 5, 1, BLOCK + b"\x20"), error(COMPRESSION)),
        Case("an update above the limit", frame(HEADERS, 5, 1, b"\x3f\xe2\x1f" + BLOCK), error(COMPRESSION)),
        Case("an update to the limit", frame(HEADERS, 5, 1, b"\x3f\xe1\x1f" + BLOCK), [], 1),
        Case("two updates in front", frame(HEADERS, 5, 1, b"\x20\x3f\xe1\x1f" + BLOCK), [], 1),
        Case(
            "Huffman padding of zeros", frame(HEADERS, 5, 1, b"\x00\x01a\x83\x49\x50\x90"), error(COMPRESSION)
        ),
        Case(
            "Huffman padding of a byte",
            frame(HEADERS, 5, 1, b"\x00\x01a\x84\x49\x50\x9f\xff"),
            error(COMPRESSION),
        ),
        Case(
            "EOS in a Huffman string",
            frame(HEADERS, 5, 1, b"\x00\x01a\x88\x49\x51\xff\xff\xff\xfa\x7f\xff"),
            error(COMPRESSION),
        ),
        Case("a bad block on a closed stream", DONE + frame(HEADERS, 5, 1, b"\xbe"), error(COMPRESSION)),
        Case("a bad block in trailers", OPEN + frame(HEADERS, 5, 1, b"\xbe"), error(COMPRESSION)),
        Case(
            "a bad block of a refused stream",
            headers(1, POST, 4) + frame(HEADERS, 5, 3, b"\xbe"),
            error(COMPRESSION),
            1,
            {"max_concurrent_streams": 1},
        ),
    )
    def test_compression(self, case: Case) -> None:
        run(case)

    @cases(
        Case("two frames", frame(HEADERS, 1, 1, BLOCK[:9]) + frame(CONTINUATION, 4, 1, BLOCK[9:]), [], 1),
        Case(
            "three, one empty",
            frame(HEADERS, 1, 1)
            + frame(CONTINUATION, 0, 1, BLOCK[:3])
            + frame(CONTINUATION, 4, 1, BLOCK[3:]),
            [],
            1,
        ),
        Case("the last one empty", frame(HEADERS, 1, 1, BLOCK) + frame(CONTINUATION, 4, 1), [], 1),
        Case(
            "trailers in two",
            OPEN + frame(HEADERS, 1, 1, b"\x00\x01a") + frame(CONTINUATION, 4, 1, b"\x01b"),
            [],
            1,
        ),
        Case(
            "another stream's HEADERS between",
            frame(HEADERS, 1, 1, BLOCK[:9]) + headers(3),
            error(PROTOCOL),
            0,
        ),
        Case("DATA between", OPEN + frame(HEADERS, 1, 3, BLOCK) + data(1, b"x"), error(PROTOCOL)),
        Case("PING between", frame(HEADERS, 1, 1, BLOCK) + ping(), error(PROTOCOL)),
        Case("SETTINGS between", frame(HEADERS, 1, 1, BLOCK) + settings(), error(PROTOCOL)),
        Case(
            "PRIORITY between", frame(HEADERS, 1, 1, BLOCK) + frame(PRIORITY, 0, 1, bytes(5)), error(PROTOCOL)
        ),
        Case("an unknown frame between", frame(HEADERS, 1, 1, BLOCK) + frame(0x42, 0, 1), error(PROTOCOL)),
        Case("WINDOW_UPDATE between", frame(HEADERS, 1, 1, BLOCK) + window_update(0, 1), error(PROTOCOL)),
        Case("the same stream's HEADERS between", frame(HEADERS, 1, 1, BLOCK) + headers(1), error(PROTOCOL)),
        Case("RST_STREAM between", frame(HEADERS, 1, 1, BLOCK) + rst(1), error(PROTOCOL)),
        Case("GOAWAY between", frame(HEADERS, 1, 1, BLOCK) + goaway(0), error(PROTOCOL)),
    )
    def test_continuation(self, case: Case) -> None:
        run(case)


class TestSection5StreamStates:
    """RFC 9113 5.1."""

    RESET = OPEN + rst(1)

    @cases(
        Case("DATA on an idle stream", data(1, b"x"), error(PROTOCOL), 0),
        Case("RST_STREAM on an idle stream", rst(1), error(PROTOCOL)),
        Case("WINDOW_UPDATE on an idle stream", window_update(1, 1), error(PROTOCOL)),
        Case("CONTINUATION on an idle stream", frame(CONTINUATION, 4, 1, BLOCK), error(PROTOCOL)),
        Case("PRIORITY on an idle stream", frame(PRIORITY, 0, 1, bytes(5)) + DONE, [], 1),
        Case("WINDOW_UPDATE on a stream above the last", DONE + window_update(3, 1), error(PROTOCOL)),
        Case("DATA on the server's id", data(2, b"x"), error(PROTOCOL)),
        Case("RST_STREAM on the server's id", rst(2), error(PROTOCOL)),
        Case("WINDOW_UPDATE on the server's id", window_update(2, 1), error(PROTOCOL)),
    )
    def test_idle(self, case: Case) -> None:
        run(case)

    @cases(
        Case("DATA", headers(1) + data(1, b"x"), [(1, CLOSED)], 1, {"answer": None}),
        Case("HEADERS", headers(1) + headers(1), [(1, CLOSED)], 1, {"answer": None}),
        Case("WINDOW_UPDATE", headers(1) + window_update(1, 9), [], 1, {"answer": None}),
        Case("PRIORITY", headers(1) + frame(PRIORITY, 0, 1, bytes(5)), [], 1, {"answer": None}),
        Case("RST_STREAM", headers(1) + rst(1), [], 1, {"answer": None}),
        Case(
            "CONTINUATION",
            headers(1) + frame(CONTINUATION, 4, 1, BLOCK),
            error(PROTOCOL),
            1,
            {"answer": None},
        ),
        Case(
            "DATA behind an ended body",
            OPEN + data(1, b"", True) + data(1, b"x"),
            [(1, CLOSED)],
            1,
            {"answer": None},
        ),
        Case("DATA behind trailers", OPEN + TRAILERS + data(1, b"x"), [(1, CLOSED)], 1, {"answer": None}),
    )
    def test_half_closed_remote(self, case: Case) -> None:
        run(case)

    @cases(
        Case("DATA behind the client's reset", RESET + data(1, b"x"), [(1, CLOSED)], 1),
        Case("HEADERS behind the client's reset", RESET + headers(1), [(1, CLOSED)], 1),
        Case("CONTINUATION behind it", RESET + frame(CONTINUATION, 4, 1, BLOCK), error(PROTOCOL)),
        Case("WINDOW_UPDATE behind it", RESET + window_update(1, 1), []),
        Case("PRIORITY behind it", RESET + frame(PRIORITY, 0, 1, bytes(5)), []),
        Case("RST_STREAM behind it", RESET + rst(1), []),
        Case("DATA behind both ends", DONE + data(1, b"x"), [(1, CLOSED)], 1),
        Case("HEADERS behind both ends", DONE + headers(1), error(CLOSED), 1),
        Case("CONTINUATION behind both ends", DONE + frame(CONTINUATION, 4, 1, BLOCK), error(PROTOCOL)),
        Case("WINDOW_UPDATE behind both ends", DONE + window_update(1, 1), []),
        Case("WINDOW_UPDATE by nothing behind both ends", DONE + window_update(1, 0), []),
        Case("RST_STREAM behind both ends", DONE + rst(1), []),
        Case("PRIORITY behind both ends", DONE + frame(PRIORITY, 0, 1, bytes(5)), []),
        Case("DATA twice behind the end: one reset", DONE + data(1, b"x") * 2, [(1, CLOSED)]),
    )
    def test_closed(self, case: Case) -> None:
        run(case)

    @cases(
        Case("DATA", data(1, b"x") * 3, [(1, PROTOCOL)]),
        Case("trailers", TRAILERS, [(1, PROTOCOL)]),
        Case("RST_STREAM", rst(1), [(1, PROTOCOL)]),
        Case("WINDOW_UPDATE", window_update(1, 5), [(1, PROTOCOL)]),
    )
    def test_what_was_sent_before_our_reset_was_seen(self, case: Case) -> None:
        case = Case(case.name, headers(1, (*POST, (b"A", b"b")), 4) + case.into + headers(3), case.verdict, 1)
        run(case)

    @cases(
        Case("an even id", headers(2), error(PROTOCOL), 0),
        Case("id zero", headers(0), error(PROTOCOL), 0),
        Case("a lower id that was left out", headers(5) + headers(3), error(PROTOCOL), 1),
        Case("a lower id that was used", headers(1) + headers(3) + headers(1), error(CLOSED), 2),
        Case("ids with gaps", headers(1) + headers(7) + headers(101), [], 3),
        Case("the last id", headers(2**31 - 1), [], 1),
        Case("DATA on an id that was left out", headers(5) + data(3, b"x"), [(3, CLOSED)], 1),
    )
    def test_identifiers(self, case: Case) -> None:  # 5.1.1
        run(case)

    @cases(
        Case("one too many", headers(1, POST, 4) + headers(3, POST, 4) + headers(5), [(5, 7)], 2),
        Case(
            "its DATA is ignored",
            headers(1, POST, 4) + headers(3, POST, 4) + headers(5, POST, 4) + data(5, b"x"),
            [(5, 7)],
            2,
        ),
        Case(
            "room again after a reset", headers(1, POST, 4) + headers(3, POST, 4) + rst(1) + headers(5), [], 3
        ),
        Case(
            "room again after an end",
            headers(1, POST, 4) + headers(3, POST, 4) + data(3, b"", True) + headers(5),
            [],
            3,
        ),
    )
    def test_concurrency(self, case: Case) -> None:  # 5.1.2
        check(case, lambda: ServerWorld(max_concurrent_streams=2))


class TestSection5Priority:
    """RFC 9113 5.3."""

    @cases(
        Case(
            "HEADERS that depends on itself",
            frame(HEADERS, 0x25, 1, struct.pack(">IB", 1, 9) + BLOCK),
            [(1, PROTOCOL)],
            0,
        ),
        Case(
            "the same, exclusively",
            frame(HEADERS, 0x25, 1, struct.pack(">IB", 1 | 1 << 31, 9) + BLOCK),
            [(1, PROTOCOL)],
            0,
        ),
        Case(
            "PRIORITY of an open stream that does",
            OPEN + frame(PRIORITY, 0, 1, struct.pack(">IB", 1, 9)),
            [(1, PROTOCOL)],
        ),
        Case(
            "PRIORITY of an idle stream that does",
            frame(PRIORITY, 0, 1, struct.pack(">IB", 1, 9)),
            error(PROTOCOL),
        ),
        Case("HEADERS with a priority", frame(HEADERS, 0x25, 1, struct.pack(">IB", 0, 255) + BLOCK), [], 1),
        Case("on a stream to come", frame(HEADERS, 0x25, 1, struct.pack(">IB", 7, 255) + BLOCK), [], 1),
    )
    def test_dependencies(self, case: Case) -> None:
        run(case)


class TestSection6Data:
    """RFC 9113 6.1."""

    @cases(
        Case("on no stream", data(0, b"x"), error(PROTOCOL)),
        Case("padded", OPEN + frame(DATA, PADDED | END_STREAM, 1, b"\x04body" + bytes(4)), [], 1),
        Case("padding only", OPEN + frame(DATA, PADDED | END_STREAM, 1, b"\x03" + bytes(3)), [], 1),
        Case("no padding, but its length", OPEN + frame(DATA, PADDED | END_STREAM, 1, b"\x00body"), [], 1),
        Case("padding as long as the frame", OPEN + frame(DATA, PADDED, 1, b"\x05body"), error(PROTOCOL)),
        Case("padding longer than the frame", OPEN + frame(DATA, PADDED, 1, b"\xffbody"), error(PROTOCOL)),
        Case("without the pad length", OPEN + frame(DATA, PADDED, 1), error(SIZE)),
        Case("bad padding on a closed stream", DONE + frame(DATA, PADDED, 1, b"\x05body"), error(PROTOCOL)),
        Case("empty, then the end", OPEN + data(1) + data(1, b"", True), [], 1),
    )
    def test_data(self, case: Case) -> None:
        run(case)


class TestSection6Headers:
    """RFC 9113 6.2."""

    @cases(
        Case("padded", frame(HEADERS, 0xD, 1, b"\x03" + BLOCK + bytes(3)), [], 1),
        Case(
            "padded, with a priority", frame(HEADERS, 0x2D, 1, b"\x03" + bytes(5) + BLOCK + bytes(3)), [], 1
        ),
        Case("padding longer than the frame", frame(HEADERS, 0xD, 1, b"\xff" + BLOCK), error(PROTOCOL), 0),
        Case(
            "padding as long as the frame",
            frame(HEADERS, 0xD, 1, bytes((len(BLOCK) + 1,)) + BLOCK),
            error(PROTOCOL),
            0,
        ),
        Case("without the pad length", frame(HEADERS, PADDED | END_HEADERS, 1), error(SIZE)),
        Case(
            "too short for its priority", frame(HEADERS, PRIORITIZED | END_HEADERS, 1, b"1234"), error(SIZE)
        ),
        Case(
            "padding leaves no room for the priority",
            frame(HEADERS, 0x2D, 1, b"\x04" + bytes(8)),
            error(SIZE),
        ),
        Case("an empty block", frame(HEADERS, 5, 1), [(1, PROTOCOL)], 0),
    )
    def test_headers(self, case: Case) -> None:
        run(case)


class TestSection6Priority:
    """RFC 9113 6.3."""

    @cases(
        Case("on no stream", frame(PRIORITY, 0, 0, bytes(5)), error(PROTOCOL)),
        Case("too short", OPEN + frame(PRIORITY, 0, 1, bytes(4)), [(1, SIZE)]),
        Case("too long", OPEN + frame(PRIORITY, 0, 1, bytes(6)), [(1, SIZE)]),
        Case("too short on an idle stream", frame(PRIORITY, 0, 1, bytes(4)), error(SIZE)),
        Case("too short on a closed stream", DONE + frame(PRIORITY, 0, 1, bytes(4)), [(1, SIZE)]),
        Case(
            "of a closed stream that depends on itself",
            DONE + frame(PRIORITY, 0, 1, struct.pack(">IB", 1, 9)),
            [],
        ),
    )
    def test_priority(self, case: Case) -> None:
        run(case)


class TestSection6RstStream:
    """RFC 9113 6.4."""

    @cases(
        Case("on no stream", rst(0), error(PROTOCOL)),
        Case("too short", OPEN + frame(RST_STREAM, 0, 1, bytes(3)), error(SIZE)),
        Case("too long", OPEN + frame(RST_STREAM, 0, 1, bytes(5)), error(SIZE)),
        Case("an unknown code", OPEN + rst(1, 0xFFFFFFFF), [], 1),
        Case("with NO_ERROR", OPEN + rst(1, 0), [], 1),
    )
    def test_rst_stream(self, case: Case) -> None:
        run(case)


class TestSection6Settings:
    """RFC 9113 6.5."""

    @cases(
        Case("on a stream", frame(SETTINGS, 0, 1), error(PROTOCOL)),
        Case("a size that is no multiple of 6", frame(SETTINGS, 0, 0, bytes(5)), error(SIZE)),
        Case("an acknowledgement with content", frame(SETTINGS, ACK, 0, bytes(6)), error(SIZE)),
        Case("an acknowledgement on a stream", frame(SETTINGS, ACK, 1), error(PROTOCOL)),
        Case("an acknowledgement too many", SETTINGS_ACK, []),
        Case("empty", settings(), []),
        Case("unknown settings", settings((0xFF, 1), (0x99, 2**32 - 1)) + DONE, [], 1),
        Case("ENABLE_PUSH of 2", settings((2, 2)), error(PROTOCOL)),
        Case("ENABLE_PUSH of 1", settings((2, 1)), []),
        Case("an initial window above the limit", settings((4, 2**31)), error(FLOW)),
        Case("an initial window at the limit", settings((4, 2**31 - 1)), []),
        Case("frames too small", settings((5, 16_383)), error(PROTOCOL)),
        Case("frames too large", settings((5, 2**24)), error(PROTOCOL)),
        Case("frames as large as may be", settings((5, 2**24 - 1)), []),
        Case("the same setting twice", settings((4, 2**31 - 1), (4, 5)), []),
        Case("the second is wrong", settings((4, 5), (4, 2**31)), error(FLOW)),
    )
    def test_settings(self, case: Case) -> None:
        run(case)

    def test_they_are_acknowledged(self) -> None:
        world = ServerWorld()
        world.feed(settings((3, 9)), settings())
        assert world.take() == [(SETTINGS, ACK, 0, b"")] * 2

    def test_values_are_used_in_order(self) -> None:  # 6.5.3
        world = ServerWorld()
        world.feed(settings((4, 1), (4, 3)), headers(1, (*GET[:2], (b":path", b"/12345"), GET[3])))
        assert [body for kind, _, _, body in world.take() if kind == DATA] == [b"/12"]


class TestSection6PushPromise:
    """RFC 9113 6.6."""

    @cases(
        Case(
            "from a client", OPEN + frame(PUSH_PROMISE, 4, 1, struct.pack(">I", 2) + BLOCK), error(PROTOCOL)
        ),
        Case("on no stream", frame(PUSH_PROMISE, 4, 0, struct.pack(">I", 2) + BLOCK), error(PROTOCOL)),
    )
    def test_push(self, case: Case) -> None:
        run(case)


class TestSection6Ping:
    """RFC 9113 6.7."""

    @cases(
        Case("on a stream", frame(PING, 0, 1, bytes(8)), error(PROTOCOL)),
        Case("too short", frame(PING, 0, 0, bytes(7)), error(SIZE)),
        Case("too long", frame(PING, 0, 0, bytes(9)), error(SIZE)),
        Case("empty", frame(PING, 0, 0), error(SIZE)),
        Case("an answer to nothing", ping(flags=ACK), []),
    )
    def test_ping(self, case: Case) -> None:
        run(case)

    def test_it_is_answered_with_its_payload(self) -> None:
        world = ServerWorld()
        world.feed(ping(b"payload!"), ping(b"an echo?", ACK), ping(b"payload2"))
        assert world.take() == [(PING, ACK, 0, b"payload!"), (PING, ACK, 0, b"payload2")]


class TestSection6Goaway:
    """RFC 9113 6.8."""

    @cases(
        Case("on a stream", goaway(0, stream=1), error(PROTOCOL)),
        Case("too short", frame(GOAWAY, 0, 0, bytes(7)), error(SIZE)),
        Case("from a client: what follows is served", goaway(0) + ping() + DONE, [], 1),
        Case("with debug data", frame(GOAWAY, 0, 0, bytes(8) + b"good-bye"), []),
        Case("with an unknown code", goaway(2**31 - 1, 0xFFFFFFFF), []),
    )
    def test_goaway(self, case: Case) -> None:
        run(case)


class TestSection6WindowUpdate:
    """RFC 9113 6.9."""

    @cases(
        Case("by nothing, on the connection", window_update(0, 0), error(PROTOCOL)),
        Case("by nothing, on a stream", OPEN + window_update(1, 0), [(1, PROTOCOL)]),
        Case("by nothing, but the reserved bit", OPEN + window_update(1, 1 << 31), [(1, PROTOCOL)]),
        Case("too short", frame(WINDOW_UPDATE, 0, 0, bytes(3)), error(SIZE)),
        Case("too long", frame(WINDOW_UPDATE, 0, 0, bytes(5)), error(SIZE)),
        Case("too short on a stream", OPEN + frame(WINDOW_UPDATE, 0, 1, bytes(3)), error(SIZE)),
        Case("the connection's window too large", window_update(0, 2**31 - 1), error(FLOW)),
        Case("in two steps", window_update(0, 2**30) * 2, error(FLOW)),
        Case("a stream's window too large", OPEN + window_update(1, 2**31 - 1), [(1, FLOW)]),
        Case(
            "a stream's by SETTINGS", OPEN + window_update(1, 2**30) + settings((4, 2**31 - 1)), error(FLOW)
        ),
        Case("the largest there is", window_update(0, 2**31 - 1 - 65_535) + DONE, [], 1),
    )
    def test_window_update(self, case: Case) -> None:
        run(case)

    def test_data_beyond_the_streams_window(self) -> None:
        world = ServerWorld(None, stream_window=10)
        world.feed(headers(1, POST, END_HEADERS), data(1, b"x" * 11), headers(3))
        assert world.verdict() == [(1, FLOW)]
        assert len(world.exchanges) == 2

    def test_data_beyond_the_connections_window(self) -> None:
        world = ServerWorld(None, connection_window=65_535, stream_window=2**20, max_connection_window=65_535)
        world.codec.received.left = 10
        world.feed(OPEN + data(1, b"x" * 11))
        assert world.verdict() == error(FLOW)

    def test_padding_counts(self) -> None:
        world = ServerWorld(None, stream_window=10)
        world.feed(OPEN, frame(DATA, PADDED, 1, b"\x0a" + bytes(10)))
        assert world.verdict() == [(1, FLOW)]

    def test_a_smaller_window_holds_once_it_is_acknowledged(self) -> None:
        """6.9.2: before, the client may use the initial 65,535."""
        world = ServerWorld(None, raw=True, stream_window=100)
        world.feed(PREFACE + settings(), OPEN, data(1, b"x" * 5000))
        assert world.verdict() == []
        world.feed(SETTINGS_ACK, headers(3, POST, END_HEADERS), data(3, b"x" * 101))
        assert world.verdict() == [(3, FLOW)]


class TestSection6Continuation:
    """RFC 9113 6.10."""

    @cases(
        Case("without HEADERS", OPEN + frame(CONTINUATION, 4, 1, BLOCK), error(PROTOCOL)),
        Case("on no stream", frame(CONTINUATION, 4, 0, BLOCK), error(PROTOCOL)),
        Case("behind END_HEADERS", DONE + frame(CONTINUATION, 4, 1, BLOCK), error(PROTOCOL)),
        Case(
            "of another stream",
            frame(HEADERS, 1, 1, BLOCK) + frame(CONTINUATION, 4, 3, BLOCK),
            error(PROTOCOL),
        ),
        Case("of no stream", frame(HEADERS, 1, 1, BLOCK) + frame(CONTINUATION, 4, 0, BLOCK), error(PROTOCOL)),
        Case(
            "behind one with END_HEADERS",
            frame(HEADERS, 1, 1, BLOCK) + frame(CONTINUATION, 4, 1) * 2,
            error(PROTOCOL),
        ),
    )
    def test_continuation(self, case: Case) -> None:
        run(case)


class TestSection7Codes:
    def test_the_clients_code_is_passed_on(self) -> None:
        world = ServerWorld(None)
        world.feed(OPEN, rst(1, CANCEL))
        assert world.last.error is not None
        assert getattr(world.last.error, "code", None) == CANCEL
