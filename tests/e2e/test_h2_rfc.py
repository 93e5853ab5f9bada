"""RFC 9113, sections 3 to 6.6, on the running gateway: each wrong frame has its error code and its scope.

Every case runs over TLS and in clear text, on a connection of its own; ``test_h2_rfc2.py`` has the rest.
"""

from collections.abc import Iterator

import pytest

from tests.e2e.h2_cases import (
    FRONTS,
    KB,
    Case,
    H2World,
    Verdict,
    answered,
    beyond,
    cases,
    dies,
    done,
    fill,
    h2_world,
    in_pieces,
    resets,
    serves,
    was_reset,
)
from tests.e2e.h2_raw import (
    ACK,
    CANCEL,
    CLOSED,
    COMPRESSION,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    ENDS,
    GOAWAY,
    HEADERS,
    MAX,
    PING,
    PREFACE,
    PRIORITIZED,
    PRIORITY,
    PROTOCOL,
    PUSH,
    REFUSED,
    RST_STREAM,
    SETTINGS,
    SIZE,
    WINDOW,
    WINDOW_UPDATE,
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
    text,
    window_update,
)

BLOCK = block(request("/kb"))
GET = headers(1, BLOCK)
OPEN = headers(1, request("/sink", "POST"), END_HEADERS)
"""A request whose body is to come."""
NO_WINDOW = ((WINDOW, 0),)
"""A response stays without its end: the stream is half-closed (remote) as long as one likes."""
MALFORMED = [*request("/forbidden", "POST"), ("X-Upper", "1")]
UNKNOWN = 0x42


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[H2World]:
    with h2_world(tmp_path_factory.mktemp("rfc")) as it:
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


class TestPreface3p4:
    @pytest.mark.parametrize(
        "first",
        [
            b"XRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            PREFACE[:-1] + b"\r",
            b"INVALID CONNECTION PREFACE\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
        ],
        ids=["first", "last", "other", "http-1.1", "tls"],
    )
    def test_another_one_is_a_connection_error(self, world: H2World, first: bytes) -> None:
        with world.client("tls8", first=first) as client:
            dies(PROTOCOL)(client)

    @pytest.mark.parametrize(
        "second",
        [
            ping(),
            GET,
            frame(UNKNOWN, 0, 0),
            settings_ack(),
            window_update(0, 1),
            goaway(),
            priority(1, 3),
            data(1),
        ],
        ids=["ping", "headers", "unknown", "ack", "window-update", "goaway", "priority", "data"],
    )
    def test_settings_come_first(self, world: H2World, front: str, second: bytes) -> None:
        with world.client(front, first=PREFACE + second + settings()) as client:
            dies(PROTOCOL)(client)

    def test_the_gateways_first_frame_is_settings(self, world: H2World, front: str) -> None:
        with world.client(front) as client:
            first = client.read()
        assert (first.kind, first.flags & ACK, first.stream) == (SETTINGS, 0, 0)
        assert PUSH not in client.settings, "a server must not send it but as 0"

    @pytest.mark.parametrize("cut", [0, 1, len(PREFACE) - 1, len(PREFACE), len(PREFACE) + 3])
    def test_it_may_come_in_pieces(self, world: H2World, front: str, cut: int) -> None:
        whole = PREFACE + settings() + GET
        with world.client(front, first=whole[:cut]) as client:
            in_pieces(whole[cut:])(client)
            kb(1)(client)

    @cases(Case("a request before the gateway's settings", settings_ack(), GET, want=kb(1)))
    def test_soundness(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


class TestFrameFormat4p1:
    @cases(
        Case("an unknown type on the connection", frame(UNKNOWN, 0xFF, 0, b"any"), GET, want=kb(1)),
        Case("an unknown type on a stream", OPEN, frame(0xFF, 1, 1, b"x"), data(1, b"", 1), want=kb(1)),
        Case("an unknown type on an idle stream", frame(0x20, 0, 77, b"x"), GET, want=kb(1)),
        Case("ALTSVC", frame(0xA, 0, 0, b"\0\0h3"), GET, want=kb(1)),
        Case("ORIGIN", frame(0xC, 0, 0), GET, want=kb(1)),
        Case("PRIORITY_UPDATE", frame(0x10, 0, 0, b"\0\0\0\1u=1"), GET, want=kb(1)),
        Case("undefined flags on PING", frame(PING, 0xFE, 0, bytes(8)), GET, want=kb(1)),
        Case("undefined flags on SETTINGS", frame(SETTINGS, 0xFE, 0), GET, want=kb(1)),
        Case("undefined flags on HEADERS", frame(HEADERS, ENDS | 0xD2, 1, BLOCK), want=kb(1)),
        Case("undefined flags on DATA", OPEN, frame(DATA, END_STREAM | 0xF6, 1, b"x"), want=kb(1)),
        Case("undefined flags on WINDOW_UPDATE", frame(WINDOW_UPDATE, 0xFF, 0, b"\0\0\0\1"), GET, want=kb(1)),
        Case("undefined flags on RST_STREAM", OPEN, frame(RST_STREAM, 0xFF, 1, b"\0\0\0\x08"), want=serves()),
        Case("undefined flags on PRIORITY", frame(PRIORITY, 0xFF, 1, priority_of(3)), GET, want=kb(1)),
        Case("the reserved bit of PING", frame(PING, 0, 1 << 31, bytes(8)), GET, want=kb(1)),
        Case("the reserved bit of HEADERS", frame(HEADERS, ENDS, 1 | 1 << 31, BLOCK), want=kb(1)),
        Case("the reserved bit of DATA", OPEN, frame(DATA, END_STREAM, 1 | 1 << 31, b"x"), want=kb(1)),
    )
    def test_what_is_unknown_is_ignored(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)

    @cases(Case("byte by byte", in_pieces(frame(UNKNOWN, 0, 0, b"xyz") + GET), want=kb(1)))
    def test_frames_in_pieces(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


class TestFrameSize4p2:
    @cases(
        Case("DATA of 16384", OPEN, data(1, bytes(16_384), END_STREAM), want=kb(1)),
        Case("an unknown type of 16384", frame(UNKNOWN, 0, 0, bytes(16_384)), GET, want=kb(1)),
        Case("DATA of 16385", OPEN, data(1, bytes(16_385), END_STREAM), want=dies(SIZE)),
        Case("HEADERS of 16385", headers(1, BLOCK + bytes(16_385 - len(BLOCK))), want=dies(SIZE)),
        Case("HEADERS in mid-stream", OPEN, headers(1, bytes(16_385)), want=dies(SIZE)),
        Case(
            "CONTINUATION of 16385",
            headers(1, BLOCK, END_STREAM),
            frame(CONTINUATION, END_HEADERS, 1, bytes(16_385)),
            want=dies(SIZE),
        ),
        Case("SETTINGS of 16386", frame(SETTINGS, 0, 0, bytes(16_386)), want=dies(SIZE)),
        Case("an unknown type of 16385", frame(UNKNOWN, 0, 0, bytes(16_385)), want=dies(SIZE)),
        Case("a length is enough", frame(DATA, 0, 1, length=16_385), want=dies(SIZE)),
        Case("the largest length", frame(UNKNOWN, 0, 0, length=2**24 - 1), want=dies(SIZE)),
        Case("PING of 7", frame(PING, 0, 0, bytes(7)), want=dies(SIZE)),
    )
    def test_over_and_under(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


INDEXED = b"\x40" + text("x-a") + text("kept")
"""A literal that enters the table, where it is number 62."""


class TestHeaderBlocks4p3:
    @cases(
        Case("cannot be decoded", headers(1, b"\xff\xff\xff\xff\xff"), want=dies(COMPRESSION)),
        Case("ends inside a string", headers(1, BLOCK + b"\x00\x05ab"), want=dies(COMPRESSION)),
        Case("ends inside a number", headers(1, BLOCK + b"\x7f\x80"), want=dies(COMPRESSION)),
        Case("a bad one in a trailer", OPEN, headers(1, b"\xbf"), want=dies(COMPRESSION)),
        Case("a bad one on a closed stream", GET, done(), headers(1, b"\xbf"), want=dies(COMPRESSION)),
        Case("in two frames", headers(1, BLOCK[:9], END_STREAM), frame(9, 4, 1, BLOCK[9:]), want=kb(1)),
        Case("interrupted by PRIORITY", headers(1, BLOCK, END_STREAM), priority(1), want=dies(PROTOCOL)),
        Case("interrupted by PING", headers(1, BLOCK, END_STREAM), ping(), want=dies(PROTOCOL)),
        Case("interrupted by SETTINGS", headers(1, BLOCK, END_STREAM), settings(), want=dies(PROTOCOL)),
        Case("interrupted by DATA", headers(1, BLOCK, 0), data(1, b"x", 1), want=dies(PROTOCOL)),
        Case("interrupted by RST_STREAM", headers(1, BLOCK, 0), rst(1), want=dies(PROTOCOL)),
        Case("interrupted by WINDOW_UPDATE", headers(1, BLOCK, 0), window_update(0, 1), want=dies(PROTOCOL)),
        Case("interrupted by GOAWAY", headers(1, BLOCK, 0), goaway(), want=dies(PROTOCOL)),
        Case(
            "interrupted by an unknown type", headers(1, BLOCK, 0), frame(UNKNOWN, 0, 1), want=dies(PROTOCOL)
        ),
        Case("another stream's", headers(1, BLOCK, END_STREAM), headers(3, BLOCK), want=dies(PROTOCOL)),
    )
    def test_wrong_ones(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)

    @pytest.mark.parametrize("fate", ["malformed", "refused", "closed"])
    def test_one_that_is_not_served_changes_the_table(self, world: H2World, fate: str) -> None:
        with world.client("tls8", offer=NO_WINDOW) as client:
            if fate == "malformed":
                client.send(headers(1, block(MALFORMED) + INDEXED))
                was_reset(1)(client)
                stream = 3
            elif fate == "refused":
                fill(client)
                stream = beyond(client)
                client.send(headers(stream, BLOCK + INDEXED))
                was_reset(stream)(client)
                client.send(settings((WINDOW, 100_000)))
                done(1)(client)
                done(3)(client)
                stream += 2
            else:
                client.send(headers(1, request("/sink", "POST"), END_HEADERS) + rst(1))
                client.send(headers(1, BLOCK + INDEXED))
                was_reset(1)(client)
                stream = 3
            client.send(settings((WINDOW, 100_000)) + headers(stream, block(request("/echo")) + b"\xbe"))
            assert client.response(stream).get("x-got") == "kept"


class TestStates5p1:
    @cases(
        Case("DATA", data(1, b"x", END_STREAM), want=dies(PROTOCOL)),
        Case("RST_STREAM", rst(1), want=dies(PROTOCOL)),
        Case("WINDOW_UPDATE", window_update(1, 100), want=dies(PROTOCOL)),
        Case("CONTINUATION", frame(CONTINUATION, END_HEADERS, 1, BLOCK), want=dies(PROTOCOL)),
        Case("DATA above the last", GET, done(), data(3, b"x"), want=dies(PROTOCOL)),
        Case("RST_STREAM on one of ours", rst(2), want=dies(PROTOCOL)),
        Case("WINDOW_UPDATE on one of ours", window_update(2, 1), want=dies(PROTOCOL)),
        Case("PRIORITY", priority(1, 3), GET, want=kb(1)),
    )
    def test_idle(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)

    @cases(
        Case("WINDOW_UPDATE", GET, window_update(1, 2000), want=kb(1)),
        Case("PRIORITY", GET, priority(1, 3), window_update(1, 2000), want=kb(1)),
        Case("RST_STREAM", GET, rst(1), want=serves()),
        Case("RST_STREAM after the head", GET, answered(), rst(1), want=serves()),
        Case("DATA", GET, data(1, b"x"), want=resets(CLOSED)),
        Case("DATA with the end", GET, answered(), data(1, b"x", END_STREAM), want=resets(CLOSED)),
        Case("DATA without content", GET, data(1, b"", END_STREAM), want=resets(CLOSED)),
        Case("HEADERS", GET, GET, want=resets(CLOSED)),
        Case("a trailer section", GET, headers(1, [("x-sum", "1")]), want=resets(CLOSED)),
        Case("CONTINUATION", GET, frame(CONTINUATION, 4, 1, BLOCK), want=dies(PROTOCOL)),
    )
    def test_half_closed_remote(self, world: H2World, front: str, case: Case) -> None:
        case.offer = NO_WINDOW
        world.check(case, front)

    @cases(
        Case("DATA", OPEN, rst(1), data(1, b"x", END_STREAM), want=resets(CLOSED)),
        Case("HEADERS", OPEN, rst(1), GET, want=resets(CLOSED)),
        Case("CONTINUATION", OPEN, rst(1), frame(CONTINUATION, 4, 1, BLOCK), want=dies(PROTOCOL)),
        Case("WINDOW_UPDATE", OPEN, rst(1), window_update(1, 9), want=serves()),
        Case("RST_STREAM", OPEN, rst(1), rst(1), want=serves()),
        Case("PRIORITY", OPEN, rst(1), priority(1, 3), want=serves()),
        Case("an unknown type", OPEN, rst(1), frame(UNKNOWN, 0, 1), want=serves()),
    )
    def test_closed_by_the_clients_reset(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)

    @cases(
        Case("DATA", GET, done(), data(1, b"x", END_STREAM), want=resets(CLOSED)),
        Case("HEADERS", GET, done(), GET, want=dies(CLOSED)),
        Case("CONTINUATION", GET, done(), frame(CONTINUATION, 4, 1, BLOCK), want=dies(PROTOCOL)),
        Case("WINDOW_UPDATE", GET, done(), window_update(1, 9), want=serves()),
        Case("RST_STREAM", GET, done(), rst(1), want=serves()),
        Case("PRIORITY", GET, done(), priority(1, 3), want=serves()),
    )
    def test_closed_by_its_ends(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)

    @cases(
        Case("DATA", data(1, b"on its way", END_STREAM), want=resets(PROTOCOL)),
        Case("much DATA", data(1, bytes(16_000)) * 20, want=resets(PROTOCOL)),
        Case("a trailer section", headers(1, [("x-sum", "1")]), want=resets(PROTOCOL)),
        Case("WINDOW_UPDATE", window_update(1, 5), want=resets(PROTOCOL)),
        Case("WINDOW_UPDATE by nothing", window_update(1, 0), want=resets(PROTOCOL)),
        Case("RST_STREAM", rst(1), want=resets(PROTOCOL)),
        Case("PRIORITY", priority(1, 3), want=resets(PROTOCOL)),
    )
    def test_reset_by_the_gateway(self, world: H2World, front: str, case: Case) -> None:
        """What was sent before the client knew is ignored; it costs the connection's window, and that is
        given back."""
        opening = headers(1, MALFORMED, END_HEADERS)
        world.check(Case(case.name, opening, was_reset(), *case.steps, want=case.want), front)


class TestIdentifiers5p1p1:
    @cases(
        Case("an even one", headers(2, BLOCK), want=dies(PROTOCOL)),
        Case("zero", headers(0, BLOCK), want=dies(PROTOCOL)),
        Case("one below the last", headers(5, BLOCK), done(5), headers(3, BLOCK), want=dies(PROTOCOL, 5)),
        Case("far below the last", headers(99, BLOCK), headers(3, BLOCK), want=dies(PROTOCOL, 99)),
        Case(
            "the largest",
            headers(MAX, BLOCK),
            done(MAX),
            ping(b"12345678"),
            want=lambda client: client.pong(),
        ),
        Case("with gaps", headers(1, BLOCK), headers(9, BLOCK), headers(77, BLOCK), want=kb(1, 9, 77)),
        Case("WINDOW_UPDATE in a gap", headers(9, BLOCK), window_update(3, 1), want=kb(9)),
        Case("RST_STREAM in a gap", headers(9, BLOCK), rst(3), want=kb(9)),
    )
    def test_are_odd_and_grow(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


class TestConcurrency5p1p2:
    def test_one_stream_too_many_is_refused(self, world: H2World) -> None:
        with world.client("tls8", offer=NO_WINDOW) as client:
            fill(client)
            stream = beyond(client)
            client.send(headers(stream, BLOCK))
            was_reset(stream)(client)
            client.send(settings((WINDOW, 100_000)))
            for each in range(1, stream, 2):
                assert client.response(each).body == KB
            resets(REFUSED, stream)(client)

    def test_a_closed_one_makes_room(self, world: H2World) -> None:
        with world.client("tls8", offer=NO_WINDOW) as client:
            fill(client)
            client.send(rst(1))
            stream = beyond(client)
            client.send(headers(stream, BLOCK) + window_update(stream, 2000))
            assert client.response(stream).body == KB


class TestPriority5p3:
    @cases(
        Case("weight 1", frame(HEADERS, ENDS | PRIORITIZED, 1, priority_of(0, 1) + BLOCK), want=kb(1)),
        Case("weight 256", frame(HEADERS, ENDS | PRIORITIZED, 1, priority_of(0, 256) + BLOCK), want=kb(1)),
        Case("exclusive", frame(HEADERS, ENDS | PRIORITIZED, 1, priority_of(7, 9, True) + BLOCK), want=kb(1)),
        Case("PRIORITY weight 1", priority(1, 0, 1), GET, want=kb(1)),
        Case("PRIORITY weight 256", priority(1, 0, 256), GET, want=kb(1)),
        Case("PRIORITY on another", priority(3, 1), GET, want=kb(1)),
        Case("PRIORITY exclusive", GET, priority(3, 1, 16, True), want=kb(1)),
        Case("PRIORITY in mid-stream", OPEN, priority(1, 9), data(1, b"x", 1), want=kb(1)),
        Case("then a lower stream", priority(9, 1), GET, want=kb(1)),
    )
    def test_is_ignored(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)

    @cases(
        Case(
            "HEADERS",
            frame(HEADERS, ENDS | PRIORITIZED, 1, priority_of(1) + block(request("/forbidden"))),
            want=resets(PROTOCOL),
        ),
        Case("PRIORITY on an open stream", OPEN, priority(1, 1), want=resets(PROTOCOL)),
        Case("PRIORITY on an idle stream", priority(3, 3), want=dies(PROTOCOL)),
        Case("PRIORITY on a closed stream", GET, done(), priority(1, 1), want=serves()),
    )
    def test_of_a_stream_on_itself(self, world: H2World, front: str, case: Case) -> None:
        """RFC 7540 5.3.1 has it as an error; RFC 9113 has dropped the scheme and allows that."""
        world.check(case, front)


class TestErrors5p4:
    def test_goaway_names_the_last_stream_and_the_connection_ends(self, world: H2World, front: str) -> None:
        with world.client(front) as client:
            client.send(headers(1) + headers(7))
            client.send(data(0, b"x"))
            dies(PROTOCOL, 7)(client)

    def test_what_comes_behind_the_error_is_not_read(self, world: H2World, front: str) -> None:
        with world.client(front) as client:
            client.send(data(0, b"x") + headers(1, request("/forbidden")) + ping())
            dies(PROTOCOL, 0)(client)
            assert not client.pongs
        assert not world.forbidden

    def test_a_reset_is_not_answered_by_a_reset(self, world: H2World, front: str) -> None:
        with world.client(front) as client:
            client.send(OPEN + rst(1) + rst(1, PROTOCOL))
            serves()(client)

    def test_a_stream_error_leaves_its_siblings_alone(self, world: H2World, front: str) -> None:
        with world.client(front) as client:
            client.send(OPEN + headers(3, MALFORMED) + headers(5, BLOCK) + data(1, KB, END_STREAM))
            for stream in (1, 5):
                assert client.response(stream).body == KB
            resets(PROTOCOL, 3)(client)

    def test_the_end_of_the_client_is_an_end(self, world: H2World, front: str) -> None:
        with world.client(front) as client:
            client.send(OPEN)
            client.pong()
            client.reset_tcp()


class TestExtensions5p5:
    @cases(
        Case("a frame", frame(0x16, 0, 0, bytes(8)), ping(b"12345678"), want=serves()),
        Case("a setting", settings((0xFF, 1), (0x0, 7), (0xFFFF, MAX)), GET, want=kb(1)),
        Case("within a header block", headers(1, BLOCK, 0), frame(0x16, 0, 0), want=dies(PROTOCOL)),
        Case("before the end of a body", OPEN, frame(0x16, 0, 1, b"abc"), data(1, b"", 1), want=kb(1)),
    )
    def test_unknown_ones(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


def test_nothing_else_ends_a_connection(world: H2World) -> None:
    """One connection with a stream error of each kind and everything that is ignored, in the end serves."""
    with world.client("tls8") as client:
        client.send(frame(UNKNOWN, 0, 0) + headers(1, MALFORMED) + priority(3, 1) + headers(3, BLOCK))
        client.send(
            headers(5, request("/sink", "POST"), END_HEADERS) + rst(5, CANCEL) + frame(GOAWAY, 0, 0, bytes(8))
        )
        assert client.response(1).reset == PROTOCOL
        assert client.response(3).body == KB
        client.send(headers(7, BLOCK))
        assert client.response(7).body == KB
