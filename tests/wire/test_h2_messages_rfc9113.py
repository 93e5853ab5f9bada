"""RFC 9113 section 8, and RFC 8441: what a request may hold, and what the exchange is told of it."""

import pytest

from expressgateway.wire.errors import (
    AuthorityError,
    FramingError,
    HeadTooLargeError,
    MalformedError,
    MethodError,
    TargetTooLongError,
    TrailerError,
    WireError,
)
from expressgateway.wire.h2.fields import Secret
from tests.wire.h2_world import (
    END_HEADERS,
    END_STREAM,
    GET,
    HEADERS,
    POST,
    PROTOCOL,
    Case,
    Fields,
    ServerWorld,
    block,
    check,
    data,
    frame,
    headers,
)

RESET = [(1, PROTOCOL)]
OPEN = headers(1, POST, END_HEADERS)


def cases(*each: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", each, ids=str)


def run(case: Case) -> None:
    check(case, lambda: ServerWorld(**(case.more or {})))


def trailers(*fields: tuple[bytes, bytes], flags: int = END_STREAM | END_HEADERS) -> bytes:
    return frame(HEADERS, flags, 1, block(fields))


def pseudo(**values: bytes | None) -> bytes:
    """A GET with pseudo-header fields changed, or left out."""
    fields = dict(GET)
    for name, value in values.items():
        if value is None:
            del fields[b":" + name.encode()]
        else:
            fields[b":" + name.encode()] = value
    return headers(1, fields.items())


def field(name: bytes, value: bytes = b"x") -> bytes:
    return headers(1, (*GET, (name, value)))


def body(length: bytes, *chunks: bytes, end: bool = True) -> bytes:
    out = headers(1, (*POST, (b"content-length", length)), END_HEADERS)
    for at, chunk in enumerate(chunks):
        out += data(1, chunk, end and at == len(chunks) - 1)
    return out


class TestSection8MessageFraming:
    """RFC 9113 8.1."""

    @cases(
        Case(
            "trailers that do not end the stream", OPEN + trailers((b"a", b"b"), flags=END_HEADERS), RESET, 1
        ),
        Case("a second head", OPEN + headers(1, POST, END_HEADERS), RESET, 1),
        Case("trailers right behind the head", OPEN + trailers((b"a", b"b")), [], 1),
        Case("trailers behind the body", OPEN + data(1, b"x") + trailers((b"a", b"b")), [], 1),
        Case("empty trailers", OPEN + trailers(), [], 1),
        Case("a pseudo-header field in trailers", OPEN + trailers((b":path", b"/x")), RESET, 1),
        Case(":method in trailers", OPEN + trailers((b"a", b"b"), (b":method", b"GET")), RESET, 1),
        Case("upper case in trailers", OPEN + trailers((b"A", b"b")), RESET, 1),
        Case("a line break in trailers", OPEN + trailers((b"a", b"b\r\nc: d")), RESET, 1),
        Case("Content-Length in trailers", OPEN + trailers((b"content-length", b"3")), RESET, 1),
        Case("Transfer-Encoding in trailers", OPEN + trailers((b"transfer-encoding", b"chunked")), RESET, 1),
        Case("Host in trailers", OPEN + trailers((b"host", b"other")), RESET, 1),
        Case("TE in trailers", OPEN + trailers((b"te", b"trailers")), RESET, 1),
        Case("Authorization in trailers", OPEN + trailers((b"authorization", b"x")), RESET, 1),
    )
    def test_trailers(self, case: Case) -> None:
        run(case)

    @cases(
        Case("the length that was said", body(b"4", b"body"), [], 1),
        Case("in two", body(b"4", b"bo", b"dy"), [], 1),
        Case("an end behind it", body(b"4", b"body", b""), [], 1),
        Case("nothing, as said", body(b"0", b""), [], 1),
        Case("less", body(b"5", b"body"), RESET, 1),
        Case("more", body(b"3", b"body"), RESET, 1),
        Case("more, later", body(b"4", b"body", b"x", end=False), RESET, 1),
        Case("trailers too early", body(b"5", b"body", end=False) + trailers((b"a", b"b")), RESET, 1),
        Case("trailers in time", body(b"4", b"body", end=False) + trailers((b"a", b"b")), [], 1),
        Case("a length and no body", headers(1, (*POST, (b"content-length", b"4"))), RESET, 0),
        Case("no length and no body", headers(1, (*POST, (b"content-length", b"0"))), [], 1),
        Case("twice", headers(1, (*POST, *[(b"content-length", b"4")] * 2), END_HEADERS), RESET, 0),
        Case("a list", body(b"4, 4", b"body"), RESET, 0),
        Case("a sign", body(b"+4", b"body"), RESET, 0),
        Case("a zero in front", body(b"04", b"body"), RESET, 0),
        Case("no number", body(b"4 ", b"body"), RESET, 0),
        Case("empty", body(b"", b"body"), RESET, 0),
        Case("beyond all bounds", body(b"9" * 30, b"body"), RESET, 0),
    )
    def test_content_length(self, case: Case) -> None:  # 8.1.1
        run(case)

    @pytest.mark.parametrize(
        ("into", "error"),
        [
            (body(b"5", b"body"), FramingError),
            (OPEN + trailers((b"host", b"x")), TrailerError),
            (OPEN + headers(1, POST, END_HEADERS), MalformedError),
        ],
    )
    def test_the_exchange_is_told(self, into: bytes, error: type[WireError]) -> None:
        world = ServerWorld(None)
        world.feed(into)
        assert type(world.last.error) is error
        assert world.last.aborts == 1
        assert world.shell.done == [1]


class TestSection8Fields:
    """RFC 9113 8.2."""

    @cases(
        Case("upper case in a name", field(b"X-a"), RESET, 0),
        Case("upper case inside a name", field(b"x-A"), RESET, 0),
        Case("an empty name", field(b""), RESET, 0),
        Case("a blank in a name", field(b"x a"), RESET, 0),
        Case("a colon in a name", field(b"x:a"), RESET, 0),
        Case("a line break in a name", field(b"x\r\na"), RESET, 0),
        Case("NUL in a name", field(b"x\0"), RESET, 0),
        Case("0x7f in a name", field(b"x\x7f"), RESET, 0),
        Case("0xff in a name", field(b"x\xff"), RESET, 0),
        Case("CR in a value", field(b"x", b"a\rb"), RESET, 0),
        Case("LF in a value", field(b"x", b"a\nb"), RESET, 0),
        Case("a header in a value", field(b"x", b"a\r\nevil: 1"), RESET, 0),
        Case("NUL in a value", field(b"x", b"a\0b"), RESET, 0),
        Case("ESC in a value", field(b"x", b"\x1b[31m"), RESET, 0),
        Case("a blank in front of a value", field(b"x", b" a"), RESET, 0),
        Case("a blank behind a value", field(b"x", b"a "), RESET, 0),
        Case("a tab in front of a value", field(b"x", b"\ta"), RESET, 0),
        Case("a tab behind a value", field(b"x", b"a\t"), RESET, 0),
        Case("blanks in the middle", field(b"x", b"a  \tb"), [], 1),
        Case("an empty value", field(b"x", b""), [], 1),
        Case("obs-text", field(b"x", b"caf\xe9"), [], 1),
        Case("every character of a token", field(b"!#$%&'*+-.^`|~09az"), [], 1),
        Case("a line break in :path", pseudo(path=b"/\r\nx"), RESET, 0),
    )
    def test_validity(self, case: Case) -> None:  # 8.2.1
        run(case)

    @cases(
        Case("Connection", field(b"connection", b"close"), RESET, 0),
        Case("Keep-Alive", field(b"keep-alive", b"timeout=5"), RESET, 0),
        Case("Proxy-Connection", field(b"proxy-connection", b"keep-alive"), RESET, 0),
        Case("Transfer-Encoding", field(b"transfer-encoding", b"chunked"), RESET, 0),
        Case("Upgrade", field(b"upgrade", b"h2c"), RESET, 0),
        Case("TE: trailers", field(b"te", b"trailers"), [], 1),
        Case("TE: gzip", field(b"te", b"gzip"), RESET, 0),
        Case("TE: trailers and more", field(b"te", b"trailers, deflate"), RESET, 0),
    )
    def test_connection_specific(self, case: Case) -> None:  # 8.2.2
        run(case)

    def test_crumbs_are_one_cookie(self) -> None:  # 8.2.3
        world = ServerWorld()
        fields = ((b"cookie", b"a=1"), (b"x", b"y"), (b"cookie", b"b=2"), (b"cookie", b"c=3"))
        world.feed(headers(1, (*GET, *fields)))
        assert world.last.request is not None
        assert world.last.request.headers == ((b"cookie", b"a=1; b=2; c=3"), (b"x", b"y"))

    def test_what_was_marked_as_secret_stays_marked(self) -> None:
        world = ServerWorld()
        world.feed(frame(HEADERS, 5, 1, block(GET) + b"\x10\x01x\x06hidden" + b"\x00\x01y\x04open"))
        request = world.last.request
        assert request is not None
        assert [type(value) for _, value in request.headers] == [Secret, bytes]

    def test_what_belongs_to_this_hop_is_taken_out(self) -> None:
        world = ServerWorld()
        hop = ((b"proxy-authorization", b"x"), (b"http2-settings", b"AAA"), (b"te", b"trailers"))
        world.feed(headers(1, (*GET, *hop, (b"host", b"example.org"), (b"expect", b"100-continue"))))
        request = world.last.request
        assert request is not None
        assert request.headers == ((b"expect", b"100-continue"),)
        assert request.accepts_trailers
        assert request.expects_continue


class TestSection8Pseudo:
    """RFC 9113 8.3."""

    @cases(
        Case("no :method", pseudo(method=None), RESET, 0),
        Case("no :scheme", pseudo(scheme=None), RESET, 0),
        Case("no :path", pseudo(path=None), RESET, 0),
        Case("an empty :path", pseudo(path=b""), RESET, 0),
        Case("an empty :method", pseudo(method=b""), RESET, 0),
        Case("an empty :scheme", pseudo(scheme=b""), RESET, 0),
        Case("a :method with a blank", pseudo(method=b"GET /x"), RESET, 0),
        Case("a :scheme with a colon", pseudo(scheme=b"http://x"), RESET, 0),
        Case("a :path without a slash", pseudo(path=b"x"), RESET, 0),
        Case("a :path with a blank", pseudo(path=b"/x y"), RESET, 0),
        Case("a :path with a fragment", pseudo(path=b"/x#y"), RESET, 0),
        Case("a :path that is not ASCII", pseudo(path=b"/\xe9"), RESET, 0),
        Case("an absolute :path", pseudo(path=b"http://x/"), RESET, 0),
        Case("a :path of *", pseudo(path=b"*"), RESET, 0),
        Case("OPTIONS *", pseudo(method=b"OPTIONS", path=b"*"), [], 1),
        Case("a method of our own", pseudo(method=b"X-PURGE"), [], 1),
        Case("another scheme", pseudo(scheme=b"http"), [], 1),
        Case(":status in a request", headers(1, (*GET, (b":status", b"200"))), RESET, 0),
        Case("an unknown one", headers(1, ((b":test", b"x"), *GET)), RESET, 0),
        Case("a bare colon", headers(1, ((b":", b"x"), *GET)), RESET, 0),
        Case("behind a field", headers(1, (*GET[:3], (b"x", b"y"), GET[3])), RESET, 0),
        Case(
            "behind a field that is taken out", headers(1, (*GET[:3], (b"te", b"trailers"), GET[3])), RESET, 0
        ),
        Case("behind a cookie", headers(1, (*GET[:3], (b"cookie", b"x"), GET[3])), RESET, 0),
        *(Case(f"{each[0].decode()} twice", headers(1, (*GET, each)), RESET, 0) for each in GET),
        Case("CONNECT with a path", pseudo(method=b"CONNECT"), RESET, 0),
        Case("CONNECT without an authority", headers(1, [(b":method", b"CONNECT")]), RESET, 0),
    )
    def test_requests(self, case: Case) -> None:
        run(case)

    def test_what_the_exchange_is_told(self) -> None:
        world = ServerWorld()
        fields = ((b"accept", b"*/*"), (b"x-a", b"1"), (b"x-a", b"2"))
        world.feed(headers(1, (*GET, *fields)))
        head = world.last.request
        assert head is not None
        assert (head.method, head.scheme, head.authority, head.path) == (
            b"GET",
            b"https",
            b"example.org",
            b"/",
        )
        assert head.headers == fields
        assert head.version == b"2"
        assert (head.protocol, head.content_length, head.accepts_trailers) == (None, None, False)

    @pytest.mark.parametrize("number", [1, 2, 3, 9])
    def test_equal_blocks_are_fresh_heads(self, number: int) -> None:
        world = ServerWorld()
        for each in range(number):
            world.feed(headers(1 + 2 * each, (*GET, (b"x", b"y"))))
        heads = [each.request for each in world.exchanges]
        assert len({id(head) for head in heads}) == number
        for head in heads:
            assert head is not None
            assert head.headers == ((b"x", b"y"),)
            head.headers = ()
            head.path = b"/changed"


class TestRememberedBlocks:
    """A block is not decoded again while it must mean the same."""

    def feed(self, world: ServerWorld, *blocks: bytes) -> list[Fields]:
        first = world.codec.last_id
        for at, raw in enumerate(blocks):
            world.feed(frame(HEADERS, 5, first + 2 * at + (2 if first else 1), raw))
        return [each.request.headers for each in world.exchanges if each.request is not None]

    def test_only_what_came_twice(self) -> None:
        world = ServerWorld()
        for _ in range(3):
            self.feed(world, block(GET), block((*GET, (b"x", b"%d" % len(world.exchanges)))))
        assert list(world.codec._known) == [block(GET)]

    def test_not_beyond_a_change_of_the_table(self) -> None:
        world = ServerWorld()
        refer = block(GET) + b"\xbe"
        seen = self.feed(world, block(GET) + b"\x40\x01a\x011", *[refer] * 3)
        assert seen == [((b"a", b"1"),)] * 4
        assert world.codec._known
        seen = self.feed(world, block(GET) + b"\x40\x01a\x012", *[refer] * 3)
        assert seen[4:] == [((b"a", b"2"),)] * 4

    def test_nothing_that_changes_the_table(self) -> None:
        world = ServerWorld()
        self.feed(world, *[block(GET) + b"\x40\x01a\x011"] * 4)
        assert not world.codec._known

    def test_a_small_block_that_means_a_lot(self) -> None:
        world = ServerWorld()
        long = block([(b"a", b"x" * 90)])
        self.feed(world, block(GET) + b"\x40" + long[1:], *[block(GET) + b"\xbe" * 40] * 4)
        assert len(world.exchanges) == 5
        assert not world.codec._known

    def test_no_more_than_a_few(self) -> None:
        world = ServerWorld()
        for each in range(60):
            self.feed(world, *[block((*GET, (b"x", b"%d" % each)))] * 3)
        assert len(world.codec._known) <= 4
        assert len(world.codec._once) <= 16


def refusal(fields: Fields, **more: object) -> tuple[type[WireError], int]:
    """The error that is answered for a sound request that is not served."""
    world = ServerWorld(**more)  # type: ignore[arg-type]  # limits, whatever they are
    world.feed(headers(1, fields), headers(3))
    assert len(world.exchanges) == 1, "its siblings go on"
    assert world.verdict() == []
    ((stream, error),) = world.shell.refusals
    assert stream == 1
    return type(error), error.status


class TestRefused:
    """Sound messages that are answered by the gateway, and not forwarded."""

    HOST = (*GET[:3], (b"host", b"example.org"))

    @pytest.mark.parametrize(
        ("fields", "error"),
        [
            (GET[:3], (AuthorityError, 400)),
            ((*GET, (b"host", b"other.example")), (AuthorityError, 400)),
            ((*GET, (b"host", b"example.org"), (b"host", b"example.org")), (AuthorityError, 400)),
            ((*GET[:3], (b":authority", b"")), (AuthorityError, 400)),
            ((*GET[:3], (b":authority", b"a,b")), (AuthorityError, 400)),
            ((*GET[:3], (b":authority", b"user@example.org")), (AuthorityError, 400)),
            ((*GET[:3], (b":authority", b"[::1")), (AuthorityError, 400)),
            ((*GET[:3], (b":authority", b"example.org:99999")), (AuthorityError, 400)),
            (((b":method", b"CONNECT"), (b":authority", b"example.org:443")), (MethodError, 405)),
            ((*GET, (b"x_y", b"1")), (MalformedError, 400)),
            ((*GET[:2], (b":path", b"/" + b"x" * 16_384), GET[3]), (TargetTooLongError, 414)),
            ((*GET, *[(b"x", b"y")] * 253), (HeadTooLargeError, 431)),
        ],
    )
    def test_answered(self, fields: Fields, error: tuple[type[WireError], int]) -> None:
        assert refusal(fields) == error

    @pytest.mark.parametrize("name", [b"example.org", b"EXAMPLE.org", b"example.org:8443", b"[::1]:80"])
    def test_host_instead_of_authority(self, name: bytes) -> None:
        world = ServerWorld()
        world.feed(headers(1, (*GET[:3], (b"host", name))))
        assert world.last.request is not None
        assert world.last.request.authority == name.lower()

    @pytest.mark.parametrize(("policy", "kept"), [("allow", ((b"x_y", b"1"),)), ("drop", ())])
    def test_underscores_by_policy(self, policy: str, kept: Fields) -> None:
        world = ServerWorld(underscore=policy)
        world.feed(headers(1, (*GET, (b"x_y", b"1"))))
        assert world.last.request is not None
        assert world.last.request.headers == kept

    def test_the_largest_that_is_served(self) -> None:
        world = ServerWorld()
        world.feed(headers(1, (*GET[:2], (b":path", b"/" + b"x" * 16_300), GET[3])))
        world.feed(headers(3, (*GET, *[(b"x", b"y")] * 252)))
        assert len(world.exchanges) == 2

    def test_a_list_over_the_limit_is_answered_and_the_table_kept(self) -> None:
        world = ServerWorld(max_header_list_size=4000)
        fields = b"\x40\x01k\x01v" + block([(b"x", b"y" * 5000)])
        world.feed(frame(HEADERS, 5, 1, block(GET) + fields), frame(HEADERS, 5, 3, block(GET) + b"\xbe"))
        assert [(stream, type(error)) for stream, error in world.shell.refusals] == [(1, HeadTooLargeError)]
        assert world.last.request is not None
        assert world.last.request.headers == ((b"k", b"v"),)


class TestRfc8441ExtendedConnect:
    HANDSHAKE = (
        (b":method", b"CONNECT"),
        (b":protocol", b"websocket"),
        (b":scheme", b"https"),
        (b":path", b"/chat"),
        (b":authority", b"example.org"),
        (b"sec-websocket-version", b"13"),
    )

    def shake(self, *without: bytes, **more: bytes) -> bytes:
        fields = [each for each in self.HANDSHAKE if each[0] not in without]
        changed = [(name, more.get(name.strip(b":").decode(), value)) for name, value in fields]
        return headers(1, changed, END_HEADERS)

    def test_a_handshake(self) -> None:
        world = ServerWorld(websocket=True)
        world.feed(self.shake())
        head = world.last.request
        assert head is not None
        assert (head.method, head.protocol, head.path) == (b"GET", b"websocket", b"/chat")
        assert head.headers == ((b"sec-websocket-version", b"13"),)
        assert not world.last.ended

    def test_not_offered(self) -> None:
        check(Case("", self.shake(), RESET, 0), ServerWorld)

    @pytest.mark.parametrize("name", [b":scheme", b":path", b":authority"])
    def test_incomplete(self, name: bytes) -> None:
        check(Case("", self.shake(name), RESET, 0), lambda: ServerWorld(websocket=True))

    def test_another_method(self) -> None:
        check(Case("", self.shake(method=b"GET"), RESET, 0), lambda: ServerWorld(websocket=True))

    def test_another_protocol(self) -> None:
        world = ServerWorld(websocket=True)
        world.feed(self.shake(protocol=b"connect-udp"))
        assert [type(error) for _, error in world.shell.refusals] == [MethodError]

    def test_a_declared_body(self) -> None:
        into = headers(1, (*self.HANDSHAKE, (b"content-length", b"3")), END_HEADERS)
        check(Case("", into, RESET, 0), lambda: ServerWorld(websocket=True))

    def test_trailers_in_a_tunnel(self) -> None:
        into = self.shake() + trailers((b"a", b"b"))
        check(Case("", into, RESET, 1), lambda: ServerWorld(None, websocket=True))
