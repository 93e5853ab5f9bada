"""RFC 9114 4.1 to 4.4, RFC 9220: what a request may hold, and what the exchange is told of it."""

import pytest

from expressgateway.wire.errors import (
    AuthorityError,
    HeadTooLargeError,
    MalformedError,
    MethodError,
    TargetTooLongError,
    WireError,
)
from expressgateway.wire.h2.fields import Secret
from tests.wire.h3_world import (
    CONNECT,
    GET,
    HEADERS,
    INCOMPLETE,
    MESSAGE,
    POST,
    UNEXPECTED,
    Case,
    Sent,
    ServerWorld,
    block,
    check,
    data,
    error,
    frame,
    headers,
)
from tests.wire.recorder import no_answer

RESET = [(0, MESSAGE)]


def cases(*each: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", each, ids=str)


def run(case: Case) -> None:
    check(case, lambda: ServerWorld(**(case.more or {})))


def whole(*raw: bytes) -> list[Sent]:
    return [(0, b"".join(raw), True)]


def pseudo(**values: bytes | None) -> list[Sent]:
    """A GET with pseudo-header fields changed, or left out."""
    fields = dict(GET)
    for name, value in values.items():
        if value is None:
            del fields[b":" + name.encode()]
        else:
            fields[b":" + name.encode()] = value
    return whole(headers(fields.items()))


def field(name: bytes, value: bytes = b"x") -> list[Sent]:
    return whole(headers((*GET, (name, value))))


def body(length: bytes, *chunks: bytes) -> list[Sent]:
    return whole(headers((*POST, (b"content-length", length))), *(data(chunk) for chunk in chunks))


def trailers(*fields: tuple[bytes, bytes]) -> list[Sent]:
    return whole(headers(POST), data(b"x"), headers(fields))


class TestSection412Malformed:
    """A stream error of type H3_MESSAGE_ERROR, and nobody hears of it."""

    @cases(
        Case("a length that is right", body(b"5", b"hel", b"lo"), [], 1),
        Case("no body for length 0", body(b"0"), [], 1),
        Case("less than the length", body(b"5", b"hell"), RESET, 1),
        Case("no body at all", body(b"5"), RESET, None),
        Case("more than the length", body(b"5", b"hello", b"!"), RESET, 1),
        Case("two lengths", whole(headers((*GET, *2 * [(b"content-length", b"0")]))), RESET, 0),
        Case("a length with a sign", body(b"+5", b"hello"), RESET, 0),
        Case(
            "less, then trailers",
            whole(headers((*POST, (b"content-length", b"5"))), headers([(b"a", b"b")])),
            RESET,
            1,
        ),
    )
    def test_content_length(self, case: Case) -> None:
        if case.name in ("no body at all", "less than the length"):
            # What is told before the end is known depends on the cut.
            world = ServerWorld()
            world.feed(*case.into[0])
            assert world.verdict() == RESET
            return
        run(case)

    def test_what_contradicts_is_not_told(self) -> None:
        world = ServerWorld(no_answer)
        world.feed(0, headers((*POST, (b"content-length", b"5"))) + data(b"hello!"))
        assert world.last.payload == b""
        assert world.last.aborts == 1


class TestSection42Fields:
    @cases(
        *(
            Case(repr(name), field(name), RESET, 0)
            for name in (
                b"Upper",
                b"a b",
                b"a:b",
                b"connection",
                b"keep-alive",
                b"proxy-connection",
                b"transfer-encoding",
                b"upgrade",
                b"a\r",
                b"\xe4",
            )
        ),
        *(
            Case(repr(value), field(b"a", value), RESET, 0)
            for value in (b"x\r\ny", b"x\0", b"\nx", b" x", b"x ", b"\x7f")
        ),
        Case("te: gzip", field(b"te", b"gzip"), RESET, 0),
        Case("te: trailers", field(b"te", b"trailers"), [], 1),
        Case("an underscore", field(b"a_b"), [], 0),
    )
    def test_names_and_values(self, case: Case) -> None:
        run(case)

    def test_crumbs_are_joined(self) -> None:
        world = ServerWorld(no_answer)
        world.feed(0, headers((*GET, (b"cookie", b"a=1"), (b"x", b"y"), (b"cookie", b"b=2"))), True)
        assert world.last.request is not None
        assert world.last.request.headers == ((b"cookie", b"a=1; b=2"), (b"x", b"y"))
        assert world.last.request.version == b"3"

    def test_a_marked_value_stays_marked(self) -> None:
        """RFC 9204 7.1.3."""
        world = ServerWorld(no_answer)
        world.feed(0, frame(HEADERS, block((*GET, (b"x", b"secret")), marked=True)), True)
        assert world.last.request is not None
        assert type(world.last.request.headers[0][1]) is Secret


class TestSection431Requests:
    @cases(
        *(
            Case(f"no {name}", pseudo(**{name: None}), RESET, 0)
            for name in ("method", "scheme", "path", "authority")
        ),
        Case("no path, but empty", pseudo(path=b""), RESET, 0),
        Case("path without a slash", pseudo(path=b"x"), RESET, 0),
        Case("path with a blank", pseudo(path=b"/a b"), RESET, 0),
        Case("path with a fragment", pseudo(path=b"/#"), RESET, 0),
        Case("method with a blank", pseudo(method=b"G ET"), RESET, 0),
        Case("an authority that is none", pseudo(authority=b"a,b"), [], 0),
        Case("a host instead", whole(headers((*GET[:3], (b"host", b"example.org")))), [], 1),
        Case("host that disagrees", field(b"host", b"other.org"), [], 0),
        Case("twice", whole(headers((GET[0], *GET))), RESET, 0),
        Case("behind a field", whole(headers((GET[0], (b"a", b"b"), *GET[1:]))), RESET, 0),
        Case("unknown", whole(headers((*GET, (b":x", b"y")))), RESET, 0),
        Case("a response's", whole(headers((*GET, (b":status", b"200")))), RESET, 0),
        Case("CONNECT", whole(headers([(b":method", b"CONNECT"), GET[3]])), [], 0),
        Case("CONNECT with a path", pseudo(method=b"CONNECT"), RESET, 0),
        Case("OPTIONS *", pseudo(method=b"OPTIONS", path=b"*"), [], 1),
        Case(":protocol, not offered", whole(headers(CONNECT)), RESET, 0),
        Case(
            ":protocol with GET",
            whole(headers((*GET, (b":protocol", b"websocket")))),
            RESET,
            0,
            {"websocket": True},
        ),
    )
    def test_pseudo_header_fields(self, case: Case) -> None:
        run(case)

    @pytest.mark.parametrize(
        ("sent", "kind", "more"),
        [
            (pseudo(authority=b"a,b"), AuthorityError, {}),
            (field(b"host", b"other.org"), AuthorityError, {}),
            (whole(headers([(b":method", b"CONNECT"), GET[3]])), MethodError, {}),
            (pseudo(path=b"/" + b"x" * 200), TargetTooLongError, {"max_target": 100}),
            (field(b"a_b"), MalformedError, {}),
            (whole(headers((*GET, *[(b"a", b"b")] * 10))), HeadTooLargeError, {"max_count": 10}),
            (field(b"a", b"x" * 2000), HeadTooLargeError, {"max_header_list_size": 1000}),
            (whole(headers((*CONNECT[:4], (b":protocol", b"other")))), MethodError, {"websocket": True}),
        ],
    )
    def test_sound_and_not_served(
        self, sent: list[Sent], kind: type[WireError], more: dict[str, object]
    ) -> None:
        world = ServerWorld(**more)  # type: ignore[arg-type]
        for each in sent:
            world.feed(*each)
        assert [(number, type(each)) for number, each in world.shell.refusals] == [(0, kind)]
        assert not world.exchanges
        world.flush()
        assert world.shell.done == [0]
        world.account()

    def test_what_is_too_large_is_known_by_its_beginning(self) -> None:
        world = ServerWorld(max_header_list_size=1000)
        kind = (b"content-type", b"application/grpc")
        world.feed(0, headers((*POST, kind, *[(b"a", b"x" * 90)] * 8, (b"b", b"y"))), True)
        (head,) = world.shell.refused_heads
        assert head is not None
        assert (head.method, head.path, head.headers[0]) == (b"POST", b"/", kind)
        assert (b"b", b"y") not in head.headers

    def test_what_is_too_large_to_be_read_is_not_known(self) -> None:
        """Nor is one that is malformed, as far as it goes."""
        world = ServerWorld(max_header_list_size=1000)
        world.feed(0, headers((*POST, (b"a", b"x" * 2000))))
        world.feed(4, headers(((b"a", b"b"), *POST, *[(b"a", b"x" * 60)] * 12)))
        assert world.shell.refused_heads == [None, None]

    def test_what_was_refused_before_its_end_is_stopped(self) -> None:
        world = ServerWorld(max_header_list_size=1000)
        world.feed(0, headers((*POST, (b"a", b"x" * 2000))))
        assert [type(each) for _, each in world.shell.refusals] == [HeadTooLargeError]
        assert world.transport.stops == {0: 0x100}
        world.feed(0, data(b"x") * 100, True)
        world.flush()
        assert world.shell.done == [0]
        world.account()


class TestSection41Trailers:
    @cases(
        Case("trailers", trailers((b"a", b"b")), [], 1),
        Case("empty ones", trailers(), [], 1),
        Case(
            "trailers, then an unknown frame",
            whole(headers(POST), headers([(b"a", b"b")]), frame(0x21, b"x")),
            [],
            1,
        ),
        Case("a pseudo-header field", trailers((b":path", b"/")), RESET, 1),
        Case("a length", trailers((b"content-length", b"1")), RESET, 1),
        Case("a host", trailers((b"host", b"x")), RESET, 1),
        Case("te", trailers((b"te", b"trailers")), RESET, 1),
        Case("transfer-encoding", trailers((b"transfer-encoding", b"x")), RESET, 1),
        Case("upper case", trailers((b"A", b"b")), RESET, 1),
        Case("too many", trailers(*[(b"a", b"b")] * 20), RESET, 1, {"max_count": 10}),
        Case("too large", trailers((b"a", b"b" * 300)), RESET, 1, {"max_header_list_size": 250}),
    )
    def test_server(self, case: Case) -> None:
        run(case)

    def test_told_with_the_end(self) -> None:
        """A stream that is reset behind its trailers was not complete."""
        world = ServerWorld(no_answer)
        world.feed(0, headers(POST) + headers([(b"a", b"b")]))
        assert not world.last.ended
        world.reset(0)
        assert world.last.trailers is None
        assert world.last.aborts == 1


class TestTunnels9220:
    TUNNEL = (0, headers(CONNECT), False)

    @cases(
        Case("a tunnel", [TUNNEL, (0, data(b"x"), True)], [], 1, {"websocket": True}),
        Case(
            "trailers in it",
            [TUNNEL, (0, headers([(b"a", b"b")]), False)],
            error(UNEXPECTED),
            1,
            {"websocket": True},
        ),
        Case(
            "with a length",
            whole(headers((*CONNECT, (b"content-length", b"1")))),
            RESET,
            0,
            {"websocket": True},
        ),
        Case("ends before it", [(0, headers(CONNECT)[:0], True)], [(0, INCOMPLETE)], 0, {"websocket": True}),
    )
    def test_server(self, case: Case) -> None:
        check(case, lambda: ServerWorld(no_answer, **(case.more or {})))
