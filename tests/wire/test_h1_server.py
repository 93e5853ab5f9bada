"""The server role, reading: conversations, limits and ends, each also cut at every byte."""

import time
from dataclasses import dataclass

import pytest

from expressgateway.wire.errors import (
    FramingError,
    HeadTooLargeError,
    MalformedError,
    PeerClosedError,
    TargetTooLongError,
    TruncatedError,
)
from expressgateway.wire.head import ResponseHead
from tests.wire.recorder import Answer, ServerWorld, answer, answer_ok, no_answer, ok, pieces

GET = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"
CLOSING = b"GET /z HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"


@dataclass
class Talk:
    """One conversation: what comes in, what the sink is told, what goes out, and whether it may go on."""

    name: str
    into: bytes
    out: bytes
    requests: list[tuple[bytes, bytes, bytes]]  # method, path, body
    done: list[bool]
    answer: Answer = answer_ok


CHUNKED = b"POST /p HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"

TALKS = [
    Talk("one request", GET, ok(b"/a"), [(b"GET", b"/a", b"")], [True]),
    Talk(
        "three pipelined requests, in order",
        GET + GET.replace(b"/a", b"/b") + GET.replace(b"/a", b"/c"),
        ok(b"/a") + ok(b"/b") + ok(b"/c"),
        [(b"GET", b"/a", b""), (b"GET", b"/b", b""), (b"GET", b"/c", b"")],
        [True] * 3,
    ),
    Talk(
        "close asked for",
        CLOSING + GET,
        ok(b"/z", b"connection: close"),
        [(b"GET", b"/z", b"")],
        [False],
    ),
    Talk(
        "close in a list, in other case",
        b"GET /z HTTP/1.1\r\nHost: h\r\nConnection: x, CLOSE\r\n\r\n",
        ok(b"/z", b"connection: close"),
        [(b"GET", b"/z", b"")],
        [False],
    ),
    Talk(
        "HTTP/1.0 closes",
        b"GET /o HTTP/1.0\r\n\r\n" + GET,
        ok(b"/o", b"connection: close"),
        [(b"GET", b"/o", b"")],
        [False],
    ),
    Talk(
        "HTTP/1.0 with keep-alive",
        b"GET /o HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n" * 2,
        ok(b"/o", b"connection: keep-alive") * 2,
        [(b"GET", b"/o", b"")] * 2,
        [True, True],
    ),
    Talk(
        "HTTP/1.0 with keep-alive, and a body of unknown length",
        b"GET /o HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2,
        b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello",
        [(b"GET", b"/o", b"")],
        [False],
        answer(200, b"hel", b"lo"),
    ),
    Talk(
        "a body by length, then a request",
        b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello" + GET,
        ok(b"/p") + ok(b"/a"),
        [(b"POST", b"/p", b"hello"), (b"GET", b"/a", b"")],
        [True, True],
    ),
    Talk(
        "a chunked body, then a request",
        CHUNKED + b"5\r\nhello\r\n1;x\r\n \r\n0\r\n\r\n" + GET,
        ok(b"/p") + ok(b"/a"),
        [(b"POST", b"/p", b"hello "), (b"GET", b"/a", b"")],
        [True, True],
    ),
    Talk(
        "a chunked body with trailers, then a request",
        CHUNKED + b"5\r\nhello\r\n0\r\nX-Sum: 1\r\nX-Sum: 2\r\n\r\n" + GET,
        ok(b"/p") + ok(b"/a"),
        [(b"POST", b"/p", b"hello"), (b"GET", b"/a", b"")],
        [True, True],
    ),
    Talk(
        "an empty chunked body",
        CHUNKED + b"0\r\n\r\n",
        ok(b"/p"),
        [(b"POST", b"/p", b"")],
        [True],
    ),
    Talk(
        "HEAD has a length and no body",
        b"HEAD /h HTTP/1.1\r\nHost: h\r\n\r\n" + GET,
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"
        + b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
        [(b"HEAD", b"/h", b""), (b"GET", b"/a", b"")],
        [True, True],
        answer(200, b"hello", length=5),
    ),
    Talk(
        "HEAD of an unknown length",
        b"HEAD /h HTTP/1.1\r\nHost: h\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        [(b"HEAD", b"/h", b"")],
        [True],
        answer(200, b"hello"),
    ),
    Talk(
        "204 has neither",
        GET * 2,
        b"HTTP/1.1 204 No Content\r\n\r\n" * 2,
        [(b"GET", b"/a", b"")] * 2,
        [True, True],
        answer(204, length=0),
    ),
    Talk(
        "304 has a length and no body",
        GET * 2,
        b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n" * 2,
        [(b"GET", b"/a", b"")] * 2,
        [True, True],
        answer(304, length=9),
    ),
    Talk(
        "304 does not pass a body on",
        GET,
        b"HTTP/1.1 304 Not Modified\r\n\r\n",
        [(b"GET", b"/a", b"")],
        [True],
        answer(304, b"oops"),
    ),
    Talk(
        "an unknown length is sent in chunks",
        GET * 2,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n" * 2,
        [(b"GET", b"/a", b"")] * 2,
        [True, True],
        answer(200, b"hel", b"", b"lo"),
    ),
    Talk(
        "an end without a body",
        GET,
        b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
        [(b"GET", b"/a", b"")],
        [True],
        answer(404),
    ),
    Talk(
        "trailers to a client that takes them",
        b"GET /t HTTP/1.1\r\nHost: h\r\nTE: trailers\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nx-sum: 1\r\n\r\n",
        [(b"GET", b"/t", b"")],
        [True],
        answer(200, b"hi", trailers=((b"x-sum", b"1"),)),
    ),
    Talk(
        "no trailers to one that did not say so",
        GET,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        [(b"GET", b"/a", b"")],
        [True],
        answer(200, b"hi", trailers=((b"x-sum", b"1"),)),
    ),
    Talk(
        "trailers after a body by length are dropped",
        b"GET /t HTTP/1.1\r\nHost: h\r\nTE: trailers\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi",
        [(b"GET", b"/t", b"")],
        [True],
        answer(200, b"hi", length=2, trailers=((b"x-sum", b"1"),)),
    ),
    Talk(
        "headers in order, duplicates kept",
        GET,
        b"HTTP/1.1 200 OK\r\nset-cookie: a\r\nx: 1\r\nset-cookie: b\r\ncontent-length: 0\r\n\r\n",
        [(b"GET", b"/a", b"")],
        [True],
        answer(200, headers=((b"set-cookie", b"a"), (b"x", b"1"), (b"set-cookie", b"b"))),
    ),
    Talk(
        "a status without a registered phrase",
        GET,
        b"HTTP/1.1 599 \r\ncontent-length: 0\r\n\r\n",
        [(b"GET", b"/a", b"")],
        [True],
        answer(599),
    ),
    Talk(
        "a malformed request after a good one",
        GET + b"GET  / HTTP/1.1\r\nHost: h\r\n\r\n" + GET,
        ok(b"/a") + b"HTTP/1.1 400 Bad Request\r\ncontent-length: 7\r\nconnection: close\r\n\r\nrefused",
        [(b"GET", b"/a", b"")],
        [True, False],
    ),
]


@pytest.mark.parametrize("talk", TALKS, ids=[talk.name for talk in TALKS])
def test_conversations(talk: Talk) -> None:
    for cut in pieces(talk.into):
        world = ServerWorld(talk.answer).feed(*cut)
        assert world.out == talk.out, cut
        seen = [(e.request.method, e.request.path, e.payload) for e in world.exchanges if e.request]
        assert seen == talk.requests
        assert all(exchange.ended for exchange in world.exchanges)
        assert world.shell.done == talk.done
        assert world.shell.resets == 0


class TestHead:
    def test_fields_in_order_lower_case_without_this_hop(self) -> None:
        raw = (
            b"GET / HTTP/1.1\r\nB: 2\r\nHost: H.example\r\nA: 1\r\nConnection: x-drop, close\r\nB: 3\r\n"
            b"X-Drop: 1\r\nTE: trailers\r\nCookie: a\r\nCookie: b\r\nKeep-Alive: 5\r\nEmpty:\r\n\r\n"
        )
        head = ServerWorld().feed(raw).exchange.request
        assert head is not None
        assert head.headers == (
            (b"b", b"2"),
            (b"a", b"1"),
            (b"b", b"3"),
            (b"cookie", b"a"),
            (b"cookie", b"b"),
            (b"empty", b""),
        )
        assert head.authority == b"h.example"
        assert head.accepts_trailers
        assert (head.scheme, head.version, head.protocol) == (b"http", b"1.1", None)

    def test_the_section_of_another_request_is_not_taken(self) -> None:
        """The cache of the last header section holds nothing of a request line, and nothing that differs."""
        world = ServerWorld()
        world.feed(b"GET /1 HTTP/1.1\r\nHost: a\r\nX: 1\r\n\r\n" * 2)
        world.feed(b"GET /2 HTTP/1.1\r\nHost: b\r\nX: 1\r\n\r\n")
        world.feed(b"HEAD /3 HTTP/1.1\r\nHost: b\r\nX: 1\r\n\r\n")
        world.feed(b"GET /4 HTTP/1.1\r\nHost: b\r\nX: 2\r\n\r\n")
        heads = [exchange.request for exchange in world.exchanges]
        seen = [(h.method, h.path, h.authority, h.headers[0][1]) for h in heads if h]
        assert seen == [
            (b"GET", b"/1", b"a", b"1"),
            (b"GET", b"/1", b"a", b"1"),
            (b"GET", b"/2", b"b", b"1"),
            (b"HEAD", b"/3", b"b", b"1"),
            (b"GET", b"/4", b"b", b"2"),
        ]

    def test_a_known_section_does_not_excuse_another_target(self) -> None:
        """The authority of a section that was judged before is still held against an absolute target."""
        world = ServerWorld()
        world.feed(b"GET /1 HTTP/1.1\r\nHost: a\r\nX: 1\r\n\r\n" * 4)
        world.feed(b"GET http://a/ok HTTP/1.1\r\nHost: a\r\nX: 1\r\n\r\n")
        world.feed(b"GET http://b/evil HTTP/1.1\r\nHost: a\r\nX: 1\r\n\r\n")
        assert len(world.exchanges) == 5
        assert [error.status for error in world.shell.refusals] == [400]

    def test_a_body_is_not_remembered_by_the_section_cache(self) -> None:
        raw = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n"
        world = ServerWorld().feed(raw + b"ab", raw + b"cd", raw, b"e", b"f")
        assert [exchange.payload for exchange in world.exchanges] == [b"ab", b"cd", b"ef"]

    def test_expect_is_told_and_forwarded(self) -> None:
        raw = b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\nContent-Length: 2\r\n\r\n"
        world = ServerWorld(no_answer).feed(raw)
        head = world.exchange.request
        assert head is not None
        assert head.expects_continue
        assert (b"expect", b"100-Continue") in head.headers
        assert world.out == b""
        world.codec.send_informational(ResponseHead(100, ()))
        assert world.out == b"HTTP/1.1 100 Continue\r\n\r\n"
        world.feed(b"ok")
        assert world.exchange.payload == b"ok"

    @pytest.mark.timeout(20)
    @pytest.mark.parametrize("start", [b"x:", b"x: a", b"x: a\t"])
    def test_a_line_of_blanks_costs_no_more_than_its_length(self, start: bytes) -> None:
        """60 KB of blanks before a control character: linear, or one request stops a worker for seconds."""

        def cost(size: int) -> float:
            raw = b"GET / HTTP/1.1\r\nHost: a\r\n" + start + b" " * size + b"\x01\r\n\r\n"
            before = time.thread_time()
            world = ServerWorld().feed(raw)
            took = time.thread_time() - before
            assert [error.status for error in world.shell.refusals] == [400]
            return took

        assert cost(8000) < 0.05


class TestLimits:
    def test_head_bytes(self) -> None:
        for cut in ([7000], [100] * 70):
            world = ServerWorld(max_head=4096)
            raw = b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 8000 + b"\r\n\r\n"
            at = 0
            for size in cut:
                world.feed(raw[at : at + size])
                at += size
            assert [type(error) for error in world.shell.refusals] == [HeadTooLargeError]
            assert world.codec._held == b""

    def test_a_head_of_exactly_the_limit_however_it_is_cut(self) -> None:
        raw = b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100
        for cut in pieces(raw + b"\r\n\r\n"):
            world = ServerWorld(max_head=len(raw)).feed(*cut)
            assert len(world.exchanges) == 1, f"refused when cut into {[len(piece) for piece in cut][:3]}"
        for cut in pieces(raw + b"a\r\n\r\n"):
            world = ServerWorld(max_head=len(raw)).feed(*cut)
            assert [error.status for error in world.shell.refusals] == [431]

    def test_field_count(self) -> None:
        lines = b"".join(b"X%d: 1\r\n" % number for number in range(9))
        raw = b"GET / HTTP/1.1\r\nHost: a\r\n"
        assert len(ServerWorld(max_fields=10).feed(raw + lines + b"\r\n").exchanges) == 1
        world = ServerWorld(max_fields=10).feed(raw + lines + b"Y: 1\r\n\r\n")
        assert [error.status for error in world.shell.refusals] == [431]

    def test_target(self) -> None:
        world = ServerWorld(max_target=100).feed(b"GET /" + b"a" * 100 + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        assert [type(error) for error in world.shell.refusals] == [TargetTooLongError]
        world = ServerWorld(max_target=100).feed(b"GET /" + b"a" * 99 + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        assert len(world.exchanges) == 1

    @pytest.mark.parametrize("size", [0, 1000])
    def test_a_target_over_both_limits_is_414_however_it_is_cut(self, size: int) -> None:
        raw = b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"
        world = ServerWorld(max_target=1000, max_head=4000)
        step = size or len(raw)
        world.feed(*(raw[at : at + step] for at in range(0, len(raw), step)))
        assert [error.status for error in world.shell.refusals] == [414]

    def test_a_megabyte_of_head(self) -> None:
        world = ServerWorld()
        for _ in range(16):
            world.feed(b"A" * 65536)
        assert [error.status for error in world.shell.refusals] == [414]
        assert len(world.codec._held) == 0

    def test_a_chunk_line_of_exactly_the_limit_however_it_is_cut(self) -> None:
        line = b"5;a=" + b"b" * 252
        assert len(line) == 256
        raw = CHUNKED + line + b"\r\nhello\r\n0\r\n\r\n"
        start = len(CHUNKED) + 250
        for at in range(start, start + 12):
            assert ServerWorld().feed(raw[:at], raw[at:]).exchange.ended, f"refused when cut at {at - start}"

    def test_a_trailer_section_is_bounded_however_it_is_cut(self) -> None:
        raw = CHUNKED + b"0\r\n" + b"".join(b"X%d: %s\r\n" % (n, b"a" * 1000) for n in range(30)) + b"\r\n"
        for size in (len(raw), 1000):
            world = ServerWorld(no_answer).feed(*(raw[at : at + size] for at in range(0, len(raw), size)))
            error = world.exchange.error
            assert error is not None, f"in pieces of {size}"
            assert error.status == 431

    def test_pipelined_bytes_wait_unread(self) -> None:
        """One read may be held; then the shell stops reading until the answer is out."""
        world = ServerWorld(no_answer).feed(GET)
        assert world.shell.asked == []
        world.codec.receive_data(GET.replace(b"/a", b"/b") * 3)
        assert world.shell.is_paused
        assert len(world.exchanges) == 1
        answer_ok(world.exchange)
        world.go_on()
        assert [e.request.path for e in world.exchanges if e.request] == [b"/a", b"/b"]
        assert world.shell.is_paused

    def test_resume_does_not_undo_the_pause_for_pipelined_bytes(self) -> None:
        world = ServerWorld(no_answer).feed(GET)
        world.codec.receive_data(GET)
        world.codec.pause()
        world.codec.resume()
        assert world.shell.is_paused

    def test_a_budget_ends_with_a_close(self) -> None:
        world = ServerWorld(budget=2).feed(GET * 3)
        assert world.out == ok(b"/a") + ok(b"/a", b"connection: close")
        assert world.shell.done == [True, False]
        assert len(world.exchanges) == 2


class TestEnds:
    """EOF and reset at every stage (RFC 9112 8)."""

    BODY = b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\n"

    def test_eof_while_idle(self) -> None:
        world = ServerWorld().eof()
        assert world.outcome() == ([], [], b"", [], 0, 0)
        assert ServerWorld().feed(GET).eof().shell.done == [True]

    def test_eof_at_every_byte_of_a_head(self) -> None:
        for at in range(1, len(GET)):
            world = ServerWorld().feed(GET[:at]).eof().feed(GET)
            assert world.exchanges == [], at

    @pytest.mark.parametrize("raw", [BODY + b"hello", CHUNKED + b"5\r\nhello\r\n0\r\nX-A: b\r\n\r\n"])
    def test_eof_at_every_byte_of_a_body(self, raw: bytes) -> None:
        """An upload cut short never completes."""
        start = raw.index(b"\r\n\r\n") + 4
        for at in range(start, len(raw)):
            world = ServerWorld(no_answer).feed(raw[:at]).eof()
            assert isinstance(world.exchange.error, TruncatedError), at
            assert not world.exchange.ended

    def test_eof_while_the_answer_is_due_is_a_cancellation(self) -> None:
        world = ServerWorld(no_answer).feed(GET).eof()
        assert isinstance(world.exchange.error, PeerClosedError)

    @pytest.mark.parametrize("raw", [GET, BODY, BODY + b"he", CHUNKED + b"5\r\nhe"])
    def test_reset_tells_the_exchange_once(self, raw: bytes) -> None:
        world = ServerWorld(no_answer).feed(raw).reset().reset()
        assert isinstance(world.exchange.error, PeerClosedError)
        assert world.exchange.aborts == 1
        world.feed(b"llo")
        assert world.exchange.payload in (b"", b"he")

    def test_nothing_is_told_after_the_end_of_an_exchange(self) -> None:
        world = ServerWorld().feed(GET).reset()
        assert world.exchange.error is None

    def test_a_bad_body_aborts_and_stops_reading(self) -> None:
        world = ServerWorld(no_answer).feed(CHUNKED + b"5\r\nhello\r\nZZ\r\n" + GET).feed(GET)
        assert isinstance(world.exchange.error, FramingError)
        assert len(world.exchanges) == 1
        answer_ok(world.exchange)
        assert world.out == ok(b"/p", b"connection: close")
        assert world.shell.done == [False]

    def test_a_failed_deadline_in_the_head_is_refused(self) -> None:
        world = ServerWorld().feed(GET[:10])
        assert world.codec.is_mid_head
        world.codec.fail(MalformedError("too slow"))
        assert len(world.shell.refusals) == 1
        assert world.shell.done == [False]
        world.feed(GET[10:])
        assert world.exchanges == []
