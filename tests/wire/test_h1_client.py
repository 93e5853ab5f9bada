"""The client role: what is written to a backend, and what may be believed of its answer."""

from dataclasses import dataclass

import pytest

from expressgateway.wire.errors import (
    FramingError,
    HeadTooLargeError,
    MalformedError,
    PeerClosedError,
    TrailerError,
    TruncatedError,
    WireError,
)
from expressgateway.wire.h1.client import BROKEN, MAX_INFORMATIONAL
from expressgateway.wire.head import RequestHead, ResponseHead
from tests.wire.recorder import ClientWorld, Recorder, pieces, request

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class TestWriting:
    """RFC 9112 3, 6, 7."""

    def test_a_head_without_a_body(self) -> None:
        head = request(path=b"/a?b", headers=((b"x", b"1"), (b"y", b"2"), (b"x", b"3")))
        world = ClientWorld().ask(head)
        assert world.out == b"GET /a?b HTTP/1.1\r\nhost: example.org\r\nx: 1\r\ny: 2\r\nx: 3\r\n\r\n"

    @pytest.mark.parametrize("method", [b"GET", b"HEAD", b"DELETE", b"OPTIONS", b"TRACE"])
    def test_no_length_where_none_is_expected(self, method: bytes) -> None:
        assert b"content-length" not in ClientWorld().ask(request(method)).out

    @pytest.mark.parametrize("method", [b"POST", b"PUT", b"PATCH", b"PROPFIND"])
    def test_a_length_of_zero_where_one_is_expected(self, method: bytes) -> None:
        assert b"content-length: 0\r\n\r\n" in ClientWorld().ask(request(method)).out

    def test_a_declared_length(self) -> None:
        world = ClientWorld().ask(request(b"POST", content_length=5), end=False)
        world.codec.send_data(b"hel", False)
        world.codec.send_data(b"lo", True)
        assert world.out == b"POST / HTTP/1.1\r\nhost: example.org\r\ncontent-length: 5\r\n\r\nhello"
        assert world.feed(OK).is_reusable

    def test_an_unknown_length_in_chunks_with_trailers(self) -> None:
        world = ClientWorld().ask(request(b"POST"), end=False)
        world.codec.send_data(b"hello", False)
        world.codec.send_data(b"", False)
        world.codec.send_data(b" you", False)
        world.codec.send_trailers(((b"x-sum", b"1"), (b"x-sum", b"2")))
        assert world.out == (
            b"POST / HTTP/1.1\r\nhost: example.org\r\ntransfer-encoding: chunked\r\n\r\n"
            b"5\r\nhello\r\n4\r\n you\r\n0\r\nx-sum: 1\r\nx-sum: 2\r\n\r\n"
        )
        assert world.feed(OK).is_reusable

    def test_trailers_after_a_declared_length_are_dropped(self) -> None:
        world = ClientWorld().ask(request(b"POST", content_length=2), end=False)
        world.codec.send_data(b"ab", False)
        world.codec.send_trailers(((b"x", b"1"),))
        assert world.out.endswith(b"\r\n\r\nab")
        assert world.feed(OK).is_reusable

    def test_an_empty_chunked_body(self) -> None:
        world = ClientWorld().ask(request(b"POST"), end=False)
        world.codec.send_data(b"", True)
        assert world.out.endswith(b"chunked\r\n\r\n0\r\n\r\n")

    def test_the_clients_version_is_not_the_backends(self) -> None:
        assert b" HTTP/1.1\r\n" in ClientWorld().ask(request(version=b"1.0")).out

    def test_an_upgrade(self) -> None:
        head = request(headers=((b"sec-websocket-key", b"k"),), protocol=b"websocket")
        world = ClientWorld().ask(head, end=False)
        assert world.out == (
            b"GET / HTTP/1.1\r\nhost: example.org\r\nsec-websocket-key: k\r\n"
            b"connection: upgrade\r\nupgrade: websocket\r\n\r\n"
        )

    @pytest.mark.parametrize(
        "chunks", [(b"hello!",), (b"hel", b"lo!"), (b"hello", b"GET / HTTP/1.1\r\n\r\n")]
    )
    def test_no_byte_beyond_the_declared_length(self, chunks: tuple[bytes, ...]) -> None:
        """A front that counts differently must not smuggle a second request to the backend."""
        world = ClientWorld().ask(request(b"POST", content_length=5), end=False)
        for chunk in chunks:
            world.codec.send_data(chunk, False)
        assert len(world.out.partition(b"\r\n\r\n")[2]) <= 5
        assert world.shell.resets == 1 or world.codec.reading is BROKEN

    def test_a_body_shorter_than_declared_never_completes(self) -> None:
        """Or the backend would take the next request on this connection for the rest of this body."""
        world = ClientWorld().ask(request(b"POST", content_length=5), end=False)
        world.codec.send_data(b"hel", True)
        world.feed(OK)
        assert not world.is_reusable

    def test_a_body_shorter_than_declared_that_ends_with_trailers(self) -> None:
        world = ClientWorld().ask(request(b"POST", content_length=5), end=False)
        world.codec.send_data(b"hel", False)
        world.codec.send_trailers(((b"x-sum", b"1"),))
        world.feed(OK)
        assert not world.is_reusable

    def test_an_end_with_the_head_but_a_declared_length(self) -> None:
        world = ClientWorld().ask(request(b"POST", content_length=5), end=True)
        world.feed(OK)
        assert not world.is_reusable

    def test_abort_resets_and_tells_nobody(self) -> None:
        world = ClientWorld().ask(request(b"POST"), end=False)
        world.codec.abort(None)
        world.codec.abort(None)
        assert world.shell.resets == 1
        assert not world.out.endswith(b"0\r\n\r\n")
        world.feed(OK).eof()
        assert world.sink.calls == []
        assert not world.is_reusable


@dataclass
class Answer:
    """A response, its meaning, and whether the connection may be used again."""

    name: str
    raw: bytes
    status: int
    body: bytes = b""
    reusable: bool = True
    method: bytes = b"GET"
    trailers: tuple[tuple[bytes, bytes], ...] | None = None
    length: int | None = None
    by_eof: bool = False


ANSWERS = [
    Answer("by length", OK, 200, b"hello", length=5),
    Answer("empty by length", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, length=0),
    Answer("in chunks", CHUNKED + b"5;a=b\r\nhello\r\n1\r\n!\r\n0\r\n\r\n", 200, b"hello!"),
    Answer("no chunk but the last", CHUNKED + b"0\r\n\r\n", 200),
    Answer(
        "trailers", CHUNKED + b"2\r\nhi\r\n0\r\nX-Sum: 1\r\n\r\n", 200, b"hi", trailers=((b"x-sum", b"1"),)
    ),
    Answer("to its end", b"HTTP/1.1 200 OK\r\n\r\nhello", 200, b"hello", False, by_eof=True),
    Answer("nothing to its end", b"HTTP/1.1 200 OK\r\n\r\n", 200, b"", False, by_eof=True),
    Answer("no reason phrase", b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", 200, length=0),
    Answer("no reason phrase and no blank", b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", 200, length=0),
    Answer("a phrase in obs-text", b"HTTP/1.1 200 \xd6k\r\nContent-Length: 0\r\n\r\n", 200, length=0),
    Answer("no fields at all", b"HTTP/1.1 204 No Content\r\n\r\n", 204),
    Answer(
        "HEAD with a length", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", 200, method=b"HEAD", length=5
    ),
    Answer("HEAD in chunks", CHUNKED, 200, method=b"HEAD"),
    Answer("HEAD without either", b"HTTP/1.1 200 OK\r\n\r\n", 200, method=b"HEAD"),
    Answer("304 with a length", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", 304, length=5),
    Answer(
        "204 with a length of zero", b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", 204, length=0
    ),
    Answer(
        "close", OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), 200, b"hello", False, length=5
    ),
    Answer(
        "close on HEAD",
        b"HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: 5\r\n\r\n",
        200,
        b"",
        False,
        b"HEAD",
        length=5,
    ),
    Answer("HTTP/1.0", OK.replace(b"1.1", b"1.0"), 200, b"hello", False, length=5),
    Answer(
        "HTTP/1.0 with keep-alive",
        OK.replace(b"1.1", b"1.0").replace(b"\r\n\r\n", b"\r\nConnection: keep-alive\r\n\r\n"),
        200,
        b"hello",
        length=5,
    ),
    Answer("HTTP/1.0 to its end", b"HTTP/1.0 200 OK\r\n\r\nhi", 200, b"hi", False, by_eof=True),
]


@pytest.mark.parametrize("answer", ANSWERS, ids=[answer.name for answer in ANSWERS])
def test_answers(answer: Answer) -> None:
    """RFC 9112 6.3, each cut at every byte."""
    for cut in pieces(answer.raw):
        world = ClientWorld().ask(request(answer.method)).feed(*cut)
        if answer.by_eof:
            assert not world.sink.ended
            world.eof()
        sink = world.sink
        assert sink.error is None
        assert sink.ended
        assert sink.response is not None
        assert (sink.response.status, sink.response.content_length) == (answer.status, answer.length)
        assert sink.payload == answer.body
        assert sink.trailers == answer.trailers
        assert world.shell.done == [answer.reusable]
        assert world.is_reusable is answer.reusable


@pytest.mark.parametrize("answer", [a for a in ANSWERS if not a.by_eof], ids=lambda answer: answer.name)
class TestAfterAResponse:
    def test_one_byte_more_is_never_an_answer(self, answer: Answer) -> None:
        """Request tunnelling by early upstream bytes: with the response, or later."""
        for more in (b"x", b"\r\n", OK):
            for cut in ([answer.raw + more], [answer.raw, more]):
                world = ClientWorld().ask(request(answer.method)).feed(*cut)
                assert world.sink.ended
                assert world.sink.payload == answer.body
                assert world.codec.reading is BROKEN
                assert not world.is_reusable

    def test_an_end_while_idle_is_not_told(self, answer: Answer) -> None:
        world = ClientWorld().ask(request(answer.method)).feed(answer.raw).eof()
        assert world.sink.error is None
        assert world.codec.reading is BROKEN

    def test_the_next_exchange_is_not_shaped_by_this_one(self, answer: Answer) -> None:
        world = ClientWorld().ask(request(answer.method)).feed(answer.raw)
        if world.is_reusable:
            assert world.codec.is_reused
            world.ask(request(b"POST", content_length=1), end=False)
            world.codec.send_data(b"x", True)
            world.feed(OK)
            assert world.sink.payload == b"hello"
            assert world.is_reusable


class TestInformational:
    """RFC 9110 15.2."""

    def test_they_pass_in_order_before_the_answer(self) -> None:
        raw = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        for cut in pieces(raw + OK):
            world = ClientWorld().ask().feed(*cut)
            assert [call for call in world.sink.calls if call[0] in ("informational", "response")] == [
                ("informational", 100, ()),
                ("informational", 103, ((b"link", b"</a>"),)),
                ("response", 200),
            ]
            assert world.is_reusable

    def test_their_number_is_limited(self) -> None:
        one = b"HTTP/1.1 103 Early Hints\r\n\r\n"
        world = ClientWorld().ask().feed(one * MAX_INFORMATIONAL + OK)
        assert world.is_reusable
        world.ask().feed(one * MAX_INFORMATIONAL)
        assert [call for call in world.sink.calls if call[0] == "abort"] == []
        world.feed(one + OK)
        assert isinstance(world.sink.error, MalformedError)
        assert not world.sink.ended

    @pytest.mark.parametrize(
        "line", [b"Content-Length: 5", b"Content-Length: 0", b"Transfer-Encoding: chunked"]
    )
    def test_a_body_is_an_error(self, line: bytes) -> None:
        world = ClientWorld().ask().feed(b"HTTP/1.1 103 Early Hints\r\n" + line + b"\r\n\r\n" + OK)
        assert isinstance(world.sink.error, FramingError)
        assert world.shell.resets == 1

    def test_close_in_an_interim_response_is_not_the_answers(self) -> None:
        world = ClientWorld().ask().feed(b"HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\n" + OK)
        assert world.is_reusable

    def test_101_only_if_asked(self) -> None:
        raw = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
        world = ClientWorld().ask().feed(raw + b"tunnel")
        assert isinstance(world.sink.error, MalformedError)
        assert world.sink.payload == b""

    @pytest.mark.parametrize("upgrade", [b"", b"Upgrade: h2c\r\n", b"Upgrade: websocket, h2c\r\n"])
    def test_101_only_to_what_was_asked(self, upgrade: bytes) -> None:
        world = ClientWorld().ask(request(protocol=b"websocket"), end=False)
        world.feed(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\n" + upgrade + b"\r\n")
        assert isinstance(world.sink.error, MalformedError)


class TestTunnel:
    RAW = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\nX: y\r\n\r\n"

    def open(self) -> ClientWorld:
        world = ClientWorld().ask(request(protocol=b"websocket"), end=False)
        world.take_out()
        return world

    def test_bytes_both_ways(self) -> None:
        for cut in pieces(self.RAW + b"\x81\x00HTTP/1.1"):
            world = self.open().feed(*cut)
            assert world.sink.calls[0] == ("informational", 101, ((b"x", b"y"),))
            assert world.sink.payload == b"\x81\x00HTTP/1.1"
            world.codec.send_data(b"\x00", False)
            assert world.out == b"\x00"

    @pytest.mark.parametrize("order", ["us first", "backend first"])
    def test_ends_in_either_order(self, order: str) -> None:
        world = self.open().feed(self.RAW)
        if order == "us first":
            world.codec.send_data(b"", True)
            assert world.shell.half_closes == 1
            assert world.shell.done == []
            world.feed(b"late").eof()
            assert world.sink.payload == b"late"
        else:
            world.eof()
            assert world.shell.done == []
            world.codec.send_data(b"late", True)
            assert world.out == b"late"
        assert world.sink.ended
        assert world.shell.done == [False]

    def test_a_declined_upgrade_is_an_answer(self) -> None:
        world = self.open().feed(OK)
        assert world.sink.payload == b"hello"
        assert world.sink.ended
        assert not world.is_reusable


BAD: list[tuple[str, bytes, type[WireError]]] = [
    ("not HTTP", b"SSH-2.0-OpenSSH\r\n\r\n", MalformedError),
    ("HTTP/0.9", b"<html></html>\r\n\r\n", MalformedError),
    ("HTTP/2.0", b"HTTP/2.0 200 OK\r\n\r\n", MalformedError),
    ("HTTP/1.2", b"HTTP/1.2 200 OK\r\n\r\n", MalformedError),
    ("a status of two digits", b"HTTP/1.1 20 OK\r\n\r\n", MalformedError),
    ("a status of four digits", b"HTTP/1.1 2000 OK\r\n\r\n", MalformedError),
    ("a status below 100", b"HTTP/1.1 099 OK\r\n\r\n", MalformedError),
    ("a status above 599", b"HTTP/1.1 600 OK\r\n\r\n", MalformedError),
    ("two blanks", b"HTTP/1.1  200 OK\r\n\r\n", MalformedError),
    ("a control character in the phrase", b"HTTP/1.1 200 O\x00K\r\n\r\n", MalformedError),
    ("a blank line first", b"\r\nHTTP/1.1 200 OK\r\n\r\n", MalformedError),
    ("a bare LF", b"HTTP/1.1 200 OK\nX: y\r\n\r\n", MalformedError),
    ("a folded line", b"HTTP/1.1 200 OK\r\nX: y\r\n z\r\n\r\n", MalformedError),
    ("a blank before the colon", b"HTTP/1.1 200 OK\r\nX : y\r\n\r\n", MalformedError),
    ("NUL in a value", b"HTTP/1.1 200 OK\r\nX: \x00\r\n\r\n", MalformedError),
    ("a header split by CR", b"HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: b\r\n\r\n", MalformedError),
    (
        "both framings",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        FramingError,
    ),
    ("two lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", FramingError),
    ("a list of lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n", FramingError),
    ("a signed length", b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\n", FramingError),
    ("gzip, chunked", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", FramingError),
    ("identity", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\n", FramingError),
    (
        "chunked from HTTP/1.0",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        FramingError,
    ),
    ("a bad chunk size", CHUNKED + b"xyz\r\nhello\r\n0\r\n\r\n", FramingError),
    ("a chunk longer than its size", CHUNKED + b"5\r\nhello!\r\n0\r\n\r\n", FramingError),
    ("a bare LF after a chunk", CHUNKED + b"5\r\nhello\n0\r\n\r\n", FramingError),
    ("a forbidden trailer", CHUNKED + b"0\r\nSet-Cookie: a=b\r\n\r\n", TrailerError),
    ("an endless line", b"HTTP/1.1 200 " + b"a" * 70000, HeadTooLargeError),
    ("endless fields", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20000, HeadTooLargeError),
    ("too many fields", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300 + b"\r\n", HeadTooLargeError),
    ("an endless trailer section", CHUNKED + b"0\r\n" + b"X: y\r\n" * 20000, HeadTooLargeError),
]


@pytest.mark.parametrize(("raw", "error"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
class TestBadAnswers:
    def test_in_one_piece(self, raw: bytes, error: type[WireError]) -> None:
        world = ClientWorld().ask().feed(raw).feed(OK)
        self.check(world, error)

    def test_in_pieces(self, raw: bytes, error: type[WireError]) -> None:
        step = 1 if len(raw) < 1000 else 997
        world = ClientWorld().ask().feed(*(raw[at : at + step] for at in range(0, len(raw), step)))
        self.check(world, error)

    def check(self, world: ClientWorld, error: type[WireError]) -> None:
        assert type(world.sink.error) is error
        assert not world.sink.ended
        assert world.shell.resets == 1
        assert world.codec.reading is BROKEN
        assert len(world.codec._held) == 0


class TestEnds:
    def test_eof_at_every_byte(self) -> None:
        """A response cut short never looks complete; before its first byte the connection was stale."""
        for raw in (OK, CHUNKED + b"5\r\nhello\r\n0\r\nX: y\r\n\r\n", b"HTTP/1.1 103 E\r\n\r\n" + OK):
            for at in range(len(raw)):
                world = ClientWorld().ask().feed(raw[:at]).eof()
                assert not world.sink.ended, at
                expected = PeerClosedError if at == 0 else TruncatedError
                assert type(world.sink.error) is expected, at
                assert world.shell.resets == 1

    def test_reset_at_every_byte(self) -> None:
        for at in range(len(OK)):
            world = ClientWorld().ask().feed(OK[:at])
            world.codec.receive_reset()
            assert world.sink.error is not None, at
            assert not world.sink.ended

    def test_a_reset_inside_a_head_is_no_stale_connection(self) -> None:
        """``PeerClosedError`` is what makes a retry possible: with part of an answer there is none."""
        world = ClientWorld().ask().feed(b"HTTP/1.1 2")
        world.codec.receive_reset()
        assert not isinstance(world.sink.error, PeerClosedError)

    def test_a_reset_of_a_body_that_ends_with_the_connection(self) -> None:
        world = ClientWorld().ask().feed(b"HTTP/1.1 200 OK\r\n\r\nhel")
        world.codec.receive_reset()
        assert not world.sink.ended
        assert world.sink.error is not None

    def test_bytes_while_idle(self) -> None:
        world = ClientWorld().feed(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        assert world.codec.reading is BROKEN

    def test_keep_alive_hint(self) -> None:
        world = ClientWorld().ask().feed(OK.replace(b"\r\n\r\n", b"\r\nKeep-Alive: timeout=7, max=3\r\n\r\n"))
        assert world.codec.keep_alive_hint == b"timeout=7, max=3"
        assert world.sink.response is not None
        assert all(name != b"keep-alive" for name, _ in world.sink.response.headers)

    def test_an_early_answer_and_then_the_rest_of_the_request(self) -> None:
        world = ClientWorld().ask(request(b"POST", content_length=4), end=False).feed(OK)
        assert world.sink.ended
        assert world.shell.done == []
        world.codec.send_data(b"abcd", True)
        assert world.is_reusable

    def test_a_sink_may_give_up_inside_any_call(self) -> None:
        class Quitter(Recorder):
            def on_response(self, head: ResponseHead, end: bool) -> None:
                super().on_response(head, end)
                world.codec.abort(None)

        for raw in (OK, CHUNKED + b"5\r\nhello\r\n0\r\n\r\n", CHUNKED + b"zz\r\n", OK + OK):
            world = ClientWorld()
            sink = Quitter()
            world.codec.open(sink)
            world.codec.send_head(request(), True)
            world.feed(raw).eof()
            assert sink.calls == [("response", 200)]
            assert world.shell.resets == 1
            assert world.shell.done == []


def test_the_header_cache_of_responses() -> None:
    """Equal sections are one reading; another section is another."""
    world = ClientWorld()
    for value in (b"1", b"1", b"2", b"1"):
        world.ask().feed(OK.replace(b"\r\n\r\n", b"\r\nX: " + value + b"\r\n\r\n"))
        assert world.sink.response is not None
        assert world.sink.response.headers == ((b"x", value),)
    world.ask().feed(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert not world.is_reusable


def test_head_is_not_touched() -> None:
    head: RequestHead = request(headers=((b"x", b"1"),))
    before = head.headers
    ClientWorld().ask(head)
    assert head.headers is before
