"""RFC 9113, sections 6 and 7, on the running gateway: each frame. See ``test_h2_rfc.py``."""

from collections.abc import Iterator

import pytest

from tests.e2e.h2_cases import (
    FRONTS,
    KB,
    Case,
    H2World,
    Verdict,
    answered,
    cases,
    dies,
    done,
    h2_world,
    resets,
    serves,
)
from tests.e2e.h2_raw import (
    ACK,
    CALM,
    CLOSED,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    ENDS,
    FLOW,
    FRAME_SIZE,
    GOAWAY,
    MAX,
    PADDED,
    PING,
    PRIORITIZED,
    PRIORITY,
    PROTOCOL,
    PUSH,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    SIZE,
    TABLE_SIZE,
    WINDOW,
    WINDOW_UPDATE,
    RawH2,
    block,
    data,
    frame,
    goaway,
    headers,
    ping,
    priority,
    priority_of,
    request,
    rst,
    settings,
    settings_ack,
    window_update,
)

BLOCK = block(request("/kb"))
GET = headers(1, BLOCK)
OPEN = headers(1, request("/sink", "POST"), END_HEADERS)
NO_WINDOW = ((WINDOW, 0),)
UNKNOWN = 0x42
TINY = ((WINDOW, 1),)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[H2World]:
    with h2_world(tmp_path_factory.mktemp("rfc2")) as it:
        yield it


@pytest.fixture(params=FRONTS)
def front(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="class", autouse=True)
def sound(world: H2World) -> Iterator[None]:
    """After each section the gateway is as sound as before."""
    yield
    world.is_sound()


def kb(*streams: int) -> Verdict:
    return serves(*streams, body=KB)


def forbidden(*more: tuple[str, str], method: str = "GET") -> bytes:
    """A request that must not be forwarded, with ``more`` in it."""
    return headers(1, request("/forbidden", method, *more))


def pseudo(*pairs: tuple[str, str]) -> bytes:
    return headers(1, pairs)


def padded(length: int, payload: bytes, padding: bytes) -> bytes:
    return bytes((length,)) + payload + padding


ECHO = headers(1, request("/echo", "POST"), END_HEADERS)


class TestData6p1:
    @cases(
        Case("one frame", ECHO, data(1, KB, END_STREAM), want=kb(1)),
        Case(
            "many frames",
            ECHO,
            *(data(1, KB[at : at + 64]) for at in range(0, 1024, 64)),
            data(1, b"", END_STREAM),
            want=kb(1),
        ),
        Case("padded", ECHO, data(1, padded(9, KB, bytes(9)), END_STREAM | PADDED), want=kb(1)),
        Case("padded by nothing", ECHO, data(1, padded(0, KB, b""), END_STREAM | PADDED), want=kb(1)),
        Case(
            "padded by the most", ECHO, data(1, padded(255, KB, bytes(255)), END_STREAM | PADDED), want=kb(1)
        ),
        Case("only padding", ECHO, data(1, padded(5, b"", bytes(5)), PADDED), data(1, KB, 1), want=kb(1)),
        Case("no content, the end", ECHO, data(1, b"", END_STREAM), want=serves(1, body=b"")),
        Case(
            "padding that is not zero", ECHO, data(1, padded(3, KB, b"xyz"), END_STREAM | PADDED), want=kb(1)
        ),
    )
    def test_content(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)

    @cases(
        Case("on the connection", OPEN, data(0, b"x"), want=dies(PROTOCOL)),
        Case("padding as long as the frame", OPEN, data(1, b"\x04abc", PADDED), want=dies(PROTOCOL)),
        Case("padding longer than the frame", OPEN, data(1, b"\xffabc", PADDED), want=dies(PROTOCOL)),
        Case("without the pad length", OPEN, data(1, b"", PADDED), want=dies(SIZE)),
        Case("on a stream that has ended", GET, done(), data(1, b"x"), want=resets(CLOSED)),
    )
    def test_wrong_ones(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)

    def test_padding_costs_the_window_and_is_given_back(self, world: H2World, front: str) -> None:
        with world.client(front) as client:
            client.send(OPEN)
            for _ in range(600):  # 154 kB, 600 bytes of which are content
                client.send(data(1, padded(255, b"x", bytes(255)), PADDED))
            client.send(data(1, b"", END_STREAM))
            kb(1)(client)
            assert client.windows[1] > 100_000, "credit for the stream"


class TestHeaders6p2:
    @cases(
        Case("padded", headers(1, padded(7, BLOCK, bytes(7)), ENDS | PADDED), want=kb(1)),
        Case("padded by nothing", headers(1, padded(0, BLOCK, b""), ENDS | PADDED), want=kb(1)),
        Case("with a priority", headers(1, priority_of(0) + BLOCK, ENDS | PRIORITIZED), want=kb(1)),
        Case(
            "with both",
            headers(1, padded(2, priority_of(3) + BLOCK, bytes(2)), ENDS | PADDED | PRIORITIZED),
            want=kb(1),
        ),
        Case(
            "padded in two frames",
            headers(1, padded(7, BLOCK[:5], bytes(7)), END_STREAM | PADDED),
            frame(CONTINUATION, END_HEADERS, 1, BLOCK[5:]),
            want=kb(1),
        ),
        Case("on the connection", headers(0, BLOCK), want=dies(PROTOCOL)),
        Case("padding as long as the frame", headers(1, b"\x04abc", ENDS | PADDED), want=dies(PROTOCOL)),
        Case(
            "padding longer than the frame", headers(1, b"\xff" + BLOCK, ENDS | PADDED), want=dies(PROTOCOL)
        ),
        Case("without the pad length", headers(1, b"", ENDS | PADDED), want=dies(SIZE)),
        Case("too short for its priority", headers(1, bytes(4), ENDS | PRIORITIZED), want=dies(SIZE)),
        Case(
            "padding in the place of the priority",
            headers(1, padded(6, bytes(4), bytes(6)), ENDS | 0x28),
            want=dies(SIZE),
        ),
        Case("an empty block", headers(1, b""), want=resets(PROTOCOL)),
    )
    def test_each(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


class TestPriority6p3:
    @cases(
        Case("on the connection", priority(0, 1), want=dies(PROTOCOL)),
        Case("of 4 bytes", OPEN, frame(PRIORITY, 0, 1, bytes(4)), want=resets(SIZE)),
        Case("of 6 bytes", OPEN, frame(PRIORITY, 0, 1, bytes(6)), want=resets(SIZE)),
        Case("of nothing", OPEN, frame(PRIORITY, 0, 1), want=resets(SIZE)),
        Case("of 4 bytes on an idle stream", frame(PRIORITY, 0, 1, bytes(4)), want=dies(SIZE)),
        Case("of 4 bytes on a closed one", GET, done(), frame(PRIORITY, 0, 1, bytes(4)), want=resets(SIZE)),
        Case("on a closed stream, depending on itself", GET, done(), priority(1, 1), want=serves()),
    )
    def test_wrong_ones(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


class TestRstStream6p4:
    @cases(
        Case("on the connection", rst(0), want=dies(PROTOCOL)),
        Case("on an idle stream", rst(1), want=dies(PROTOCOL)),
        Case("of 3 bytes", OPEN, frame(RST_STREAM, 0, 1, bytes(3)), want=dies(SIZE)),
        Case("of 5 bytes", OPEN, frame(RST_STREAM, 0, 1, bytes(5)), want=dies(SIZE)),
        Case("of nothing", OPEN, frame(RST_STREAM, 0, 1), want=dies(SIZE)),
        Case("of 3 bytes on an idle stream", frame(RST_STREAM, 0, 1, bytes(3)), want=dies(SIZE)),
        Case("on an open stream", OPEN, rst(1), want=serves()),
    )
    def test_each(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


def acknowledged(client: RawH2, count: int) -> None:
    client.until(lambda: client.acks >= count, "SETTINGS are acknowledged")


class TestSettings6p5:
    @cases(
        Case("an acknowledgement with content", frame(SETTINGS, ACK, 0, bytes(6)), want=dies(SIZE)),
        Case("an acknowledgement with a byte", frame(SETTINGS, ACK, 0, b"\0"), want=dies(SIZE)),
        Case("on a stream", frame(SETTINGS, 0, 1), want=dies(PROTOCOL)),
        Case("an acknowledgement on a stream", frame(SETTINGS, ACK, 1), want=dies(PROTOCOL)),
        Case("of 3 bytes", frame(SETTINGS, 0, 0, bytes(3)), want=dies(SIZE)),
        Case("of 7 bytes", frame(SETTINGS, 0, 0, bytes(7)), want=dies(SIZE)),
        Case("one acknowledgement too many", settings_ack() * 3, GET, want=kb(1)),
    )
    def test_the_frame(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)

    @cases(
        Case("ENABLE_PUSH 2", settings((PUSH, 2)), want=dies(PROTOCOL)),
        Case("ENABLE_PUSH 0", settings((PUSH, 0)), GET, want=kb(1)),
        Case("ENABLE_PUSH 1", settings((PUSH, 1)), GET, want=kb(1)),
        Case("INITIAL_WINDOW_SIZE 2^31", settings((WINDOW, 1 << 31)), want=dies(FLOW)),
        Case("INITIAL_WINDOW_SIZE 2^32-1", settings((WINDOW, 2**32 - 1)), want=dies(FLOW)),
        Case("INITIAL_WINDOW_SIZE 2^31-1", settings((WINDOW, MAX)), GET, want=kb(1)),
        Case("MAX_FRAME_SIZE 16383", settings((FRAME_SIZE, 16_383)), want=dies(PROTOCOL)),
        Case("MAX_FRAME_SIZE 0", settings((FRAME_SIZE, 0)), want=dies(PROTOCOL)),
        Case("MAX_FRAME_SIZE 2^24", settings((FRAME_SIZE, 1 << 24)), want=dies(PROTOCOL)),
        Case("MAX_FRAME_SIZE 2^24-1", settings((FRAME_SIZE, 2**24 - 1)), GET, want=kb(1)),
        Case("HEADER_TABLE_SIZE 2^32-1", settings((TABLE_SIZE, 2**32 - 1)), GET, want=kb(1)),
        Case("MAX_CONCURRENT_STREAMS 0", settings((3, 0)), GET, want=kb(1)),
        Case("a wrong one behind a right one", settings((WINDOW, 5), (PUSH, 3)), want=dies(PROTOCOL)),
        Case("an unknown one", settings((0x9999, 1)), GET, want=kb(1)),
    )
    def test_values(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)

    def test_each_is_acknowledged(self, world: H2World, front: str) -> None:
        with world.client(front) as client:
            client.send(settings() + settings((WINDOW, 9), (WINDOW, 10)) + settings((0xAB, 1)))
            acknowledged(client, 4)
            client.pong()
            assert client.acks == 4

    def test_the_last_value_counts(self, world: H2World, front: str) -> None:
        with world.client(front) as client:
            client.send(settings((WINDOW, 100), (WINDOW, 1)) + GET)
            frames = [client.read()]
            while frames[-1].kind != DATA:
                frames.append(client.read())
            assert len(frames[-1].payload) == 1

    def test_a_table_that_the_client_forbids_is_not_used(self, world: H2World, front: str) -> None:
        with world.client(front, offer=[(TABLE_SIZE, 0)]) as client:
            acknowledged(client, 1)
            client.decoder.max_allowed_table_size = 0
            for _ in range(3):
                assert client.ask(request("/kb")).body == KB
            assert client.decoder.header_table_size == 0

    def test_frames_are_no_longer_than_the_client_allows(self, world: H2World, front: str) -> None:
        for allowed in (16_384, 20_000):
            with world.client(front, offer=[(FRAME_SIZE, allowed), (WINDOW, MAX)]) as client:
                client.send(window_update(0, 1_000_000))
                stream = client.open(request("/echo", "POST"), end=False)
                client.send_body(stream, bytes(200_000))
                longest = 0
                while not client.answer(stream).is_complete:
                    longest = max(longest, len(client.read().payload))
                assert longest <= allowed


class TestPushPromise6p6:
    @cases(
        Case("on an open stream", OPEN, frame(PUSH_PROMISE, 4, 1, b"\0\0\0\2" + BLOCK), want=dies(PROTOCOL)),
        Case("on an idle stream", frame(PUSH_PROMISE, 4, 1, b"\0\0\0\2" + BLOCK), want=dies(PROTOCOL)),
        Case("on the connection", frame(PUSH_PROMISE, 4, 0, b"\0\0\0\2" + BLOCK), want=dies(PROTOCOL)),
    )
    def test_a_client_cannot_push(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


class TestPing6p7:
    @cases(
        Case("on a stream", frame(PING, 0, 1, bytes(8)), want=dies(PROTOCOL)),
        Case("an answer on a stream", frame(PING, ACK, 1, bytes(8)), want=dies(PROTOCOL)),
        Case("of nothing", frame(PING, 0, 0), want=dies(SIZE)),
        Case("of 6 bytes", frame(PING, 0, 0, bytes(6)), want=dies(SIZE)),
        Case("of 9 bytes", frame(PING, 0, 0, bytes(9)), want=dies(SIZE)),
        Case("an answer of 7 bytes", frame(PING, ACK, 0, bytes(7)), want=dies(SIZE)),
        Case("an answer nobody asked for", frame(PING, ACK, 0, b"nobody's"), GET, want=kb(1)),
    )
    def test_the_frame(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)

    def test_is_answered_with_its_payload(self, world: H2World, front: str) -> None:
        with world.client(front) as client:
            sent = [b"\0\1\2\3\xff\xfe\xfd\xfc", b"second!!", bytes(8)]
            client.send(b"".join(ping(each) for each in sent) + frame(PING, ACK, 0, b"nobody's"))
            client.until(lambda: len(client.pongs) == 3)
            assert client.pongs == sent


class TestGoAway6p8:
    @cases(
        Case("on a stream", goaway(stream=1), want=dies(PROTOCOL)),
        Case("of 7 bytes", frame(GOAWAY, 0, 0, bytes(7)), want=dies(SIZE)),
        Case("of nothing", frame(GOAWAY, 0, 0), want=dies(SIZE)),
        Case("then the open stream goes on", OPEN, goaway(), data(1, b"x", END_STREAM), want=kb(1)),
        Case("with words for the operator", GET, goaway(debug=b"so long" * 100), want=kb(1)),
        Case("with a last stream that never was", GET, goaway(MAX), want=kb(1)),
        Case("twice", OPEN, goaway(MAX), goaway(0), data(1, b"x", END_STREAM), want=kb(1)),
    )
    def test_each(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


class TestWindowUpdate6p9:
    @cases(
        Case("by nothing on the connection", window_update(0, 0), want=dies(PROTOCOL)),
        Case("by nothing on a stream", OPEN, window_update(1, 0), want=resets(PROTOCOL)),
        Case("by nothing but the reserved bit", OPEN, window_update(1, 1 << 31), want=resets(PROTOCOL)),
        Case("of 3 bytes", frame(WINDOW_UPDATE, 0, 0, bytes(3)), want=dies(SIZE)),
        Case("of 5 bytes", frame(WINDOW_UPDATE, 0, 0, bytes(5)), want=dies(SIZE)),
        Case("of 3 bytes on a stream", OPEN, frame(WINDOW_UPDATE, 0, 1, bytes(3)), want=dies(SIZE)),
        Case("of nothing", frame(WINDOW_UPDATE, 0, 0), want=dies(SIZE)),
        Case("with the reserved bit", frame(WINDOW_UPDATE, 0, 0, b"\x80\0\0\1"), GET, want=kb(1)),
        Case("on the connection", window_update(0, 1), GET, want=kb(1)),
        Case("on a stream", OPEN, window_update(1, 1), data(1, b"x", END_STREAM), want=kb(1)),
    )
    def test_the_frame(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


class TestWindow6p9p1:
    @cases(
        Case("over 2^31-1 on the connection", window_update(0, MAX), want=dies(FLOW)),
        Case("in two steps", window_update(0, MAX - 65_535), window_update(0, 1), want=dies(FLOW)),
        Case("just 2^31-1 on the connection", window_update(0, MAX - 65_535), GET, want=kb(1)),
        Case("over 2^31-1 on a stream", OPEN, window_update(1, MAX), want=resets(FLOW)),
        Case(
            "in two steps on a stream",
            OPEN,
            window_update(1, MAX - 65_535),
            window_update(1, 1),
            want=resets(FLOW),
        ),
        Case("just 2^31-1 on a stream", OPEN, window_update(1, MAX - 65_535), data(1, b"", 1), want=kb(1)),
    )
    def test_overflow(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)

    def test_what_is_sent_heeds_the_streams_window(self, world: H2World, front: str) -> None:
        with world.client(front, offer=TINY, grants=False) as client:
            client.send(GET)
            found = client.answer(1)
            for size in range(1, 20):
                while len(found.body) < size:
                    client.read()
                client.pong()
                assert len(found.body) == size
                client.send(window_update(1, 1))
            client.send(window_update(1, 2000))
            kb(1)(client)

    def test_what_is_sent_heeds_the_connections_window(self, world: H2World, front: str) -> None:
        with world.client(front, offer=[(WINDOW, MAX)], grants=False) as client:
            stream = client.open(request("/echo", "POST"), end=False)
            client.send_body(stream, bytes(100_000))
            found = client.answer(stream)
            client.until(lambda: len(found.body) == 65_535, "all that is allowed")
            client.send(window_update(stream, 1000))
            client.pong()
            assert len(found.body) == 65_535, "a stream's credit is not the connection's"
            client.send(window_update(0, 100_000))
            assert len(client.response(stream).body) == 100_000

    def test_frames_other_than_data_are_free(self, world: H2World, front: str) -> None:
        with world.client(front, offer=NO_WINDOW, grants=False) as client:
            client.send(GET + headers(3, request("/empty")))
            answered(1)(client)
            assert client.response(3).status == 204
            client.pong()
            assert not client.answer(1).body

    def test_an_end_without_content_needs_no_window(self, world: H2World, front: str) -> None:
        with world.client(front, offer=NO_WINDOW, grants=False) as client:
            client.send(headers(1, request("/echo", "POST"), END_HEADERS) + data(1, b"", END_STREAM))
            assert client.response(1).body == b""


class TestInitialWindow6p9p2:
    def test_a_change_holds_for_open_streams(self, world: H2World, front: str) -> None:
        with world.client(front, offer=NO_WINDOW, grants=False) as client:
            client.send(GET)
            answered(1)(client)
            client.send(settings((WINDOW, 10)))
            found = client.answer(1)
            client.until(lambda: len(found.body) == 10)
            client.send(settings((WINDOW, 2000)))
            kb(1)(client)

    def test_a_window_may_become_negative(self, world: H2World, front: str) -> None:
        with world.client(front, offer=[(WINDOW, 30)], grants=False) as client:
            client.send(GET)
            found = client.answer(1)
            client.until(lambda: len(found.body) == 30)
            client.send(settings((WINDOW, 10)) + window_update(1, 20))
            client.pong()
            assert len(found.body) == 30, "it is just zero"
            client.send(window_update(1, 1))
            client.until(lambda: len(found.body) == 31)
            client.send(settings((WINDOW, 5000)))
            kb(1)(client)

    @cases(
        Case(
            "by a setting", OPEN, window_update(1, MAX - 65_535), settings((WINDOW, 65_536)), want=dies(FLOW)
        ),
        Case("by a far too large setting", settings((WINDOW, 1 << 31)), want=dies(FLOW)),
        Case(
            "the setting leaves the connection's alone",
            settings((WINDOW, MAX)),
            window_update(0, 1),
            GET,
            want=kb(1),
        ),
    )
    def test_overflow(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


def more(payload: bytes = b"", flags: int = 0, stream: int = 1) -> bytes:
    return frame(CONTINUATION, flags, stream, payload)


class TestContinuation6p10:
    @cases(
        Case("one", headers(1, BLOCK[:7], END_STREAM), more(BLOCK[7:], END_HEADERS), want=kb(1)),
        Case("several", headers(1, BLOCK[:7], END_STREAM), more(BLOCK[7:9]), more(BLOCK[9:], 4), want=kb(1)),
        Case("an empty one at the end", headers(1, BLOCK, END_STREAM), more(b"", END_HEADERS), want=kb(1)),
        Case("behind an empty HEADERS", headers(1, b"", END_STREAM), more(BLOCK, END_HEADERS), want=kb(1)),
        Case("with undefined flags", headers(1, BLOCK[:7], END_STREAM), more(BLOCK[7:], 0xFF), want=kb(1)),
        Case(
            "of a trailer section",
            OPEN,
            data(1, b"x"),
            headers(1, b"", END_STREAM),
            more(block([("x-sum", "1")]), END_HEADERS),
            want=kb(1),
        ),
        Case("on the connection", headers(1, BLOCK, END_STREAM), more(b"", 4, 0), want=dies(PROTOCOL)),
        Case("on another stream", headers(1, BLOCK, END_STREAM), more(b"", 4, 3), want=dies(PROTOCOL)),
        Case("behind the end of the block", GET, more(b"", END_HEADERS), want=dies(PROTOCOL)),
        Case(
            "behind a CONTINUATION that ends the block",
            headers(1, BLOCK, END_STREAM),
            more(b"", END_HEADERS),
            more(b"", END_HEADERS),
            want=dies(PROTOCOL),
        ),
        Case("behind DATA", OPEN, data(1, b"x"), more(b"", END_HEADERS), want=dies(PROTOCOL)),
        Case("first of all", more(BLOCK, END_HEADERS), want=dies(PROTOCOL)),
        Case("another HEADERS instead", headers(1, BLOCK, END_STREAM), GET, want=dies(PROTOCOL)),
        Case("too many", headers(1, BLOCK, END_STREAM), more() * 17, more(b"", END_HEADERS), want=dies(CALM)),
    )
    def test_each(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


class TestErrorCodes7:
    @cases(
        Case("in GOAWAY", GET, goaway(0, 0xFF), want=kb(1)),
        Case("in GOAWAY, large", GET, goaway(0, 2**32 - 1), want=kb(1)),
        Case("in RST_STREAM", OPEN, rst(1, 0xFF), want=serves()),
        Case("in RST_STREAM, large", OPEN, rst(1, 2**32 - 1), want=serves()),
        Case(
            "all known in RST_STREAM",
            *(
                headers(2 * code + 1, request("/sink", "POST"), END_HEADERS) + rst(2 * code + 1, code)
                for code in range(14)
            ),
            want=serves(),
        ),
    )
    def test_unknown_ones_are_like_any(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)
