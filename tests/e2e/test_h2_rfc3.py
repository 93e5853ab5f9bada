"""RFC 9113, section 8, and RFC 7541, on the running gateway; see ``test_h2_rfc.py``."""

from collections.abc import Iterator

import pytest

from tests.e2e.h2_cases import (
    FRONTS,
    KB,
    Case,
    H2World,
    Verdict,
    cases,
    dies,
    done,
    h2_world,
    resets,
    serves,
)
from tests.e2e.h2_raw import (
    CLOSED,
    COMPRESSION,
    DATA,
    END_HEADERS,
    END_STREAM,
    PROTOCOL,
    PUSH_PROMISE,
    WINDOW,
    Pairs,
    block,
    data,
    frame,
    headers,
    number,
    request,
    text,
)

BLOCK = block(request("/kb"))
GET = headers(1, BLOCK)
OPEN = headers(1, request("/sink", "POST"), END_HEADERS)
NO_WINDOW = ((WINDOW, 0),)
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


TRAILERS = [("x-sum", "7")]
ECHO = headers(1, request("/echo", "POST"), END_HEADERS)


class TestMessages8p1:
    @cases(
        Case("GET", GET, want=kb(1)),
        Case("HEAD", headers(1, request("/kb", "HEAD")), want=serves(1, body=b"")),
        Case("POST", ECHO, data(1, KB, END_STREAM), want=kb(1)),
        Case(
            "POST with trailers",
            ECHO,
            data(1, KB),
            headers(1, TRAILERS),
            want=serves(1, body=KB, check=lambda found: found.get("x-trailer") == "x-sum=7"),
        ),
        Case(
            "trailers without a body",
            ECHO,
            headers(1, TRAILERS),
            want=serves(1, body=b"", check=lambda found: found.get("x-trailer") == "x-sum=7"),
        ),
        Case("an empty trailer section", ECHO, data(1, KB), headers(1, b""), want=kb(1)),
        Case(
            "a second HEADERS without the end", OPEN, headers(1, TRAILERS, END_HEADERS), want=resets(PROTOCOL)
        ),
        Case("a second head", OPEN, headers(1, BLOCK, END_HEADERS), want=resets(PROTOCOL)),
        Case(
            "trailers without the end behind DATA",
            OPEN,
            data(1, b"x"),
            headers(1, TRAILERS, END_HEADERS),
            want=resets(PROTOCOL),
        ),
        Case(
            "DATA behind the trailers",
            headers(1, request("/kb", "POST"), END_HEADERS),
            headers(1, TRAILERS),
            data(1, b"x"),
            want=resets(CLOSED),
        ),
        Case(
            "a pseudo-header in the trailers", OPEN, headers(1, [(":method", "GET")]), want=resets(PROTOCOL)
        ),
        Case(
            ":status in the trailers",
            OPEN,
            data(1, b"x"),
            headers(1, [(":status", "200")]),
            want=resets(PROTOCOL),
        ),
        Case(
            "a connection's field in the trailers",
            OPEN,
            headers(1, [("connection", "close")]),
            want=resets(PROTOCOL),
        ),
        Case("framing in the trailers", OPEN, headers(1, [("content-length", "0")]), want=resets(PROTOCOL)),
        Case("Host in the trailers", OPEN, headers(1, [("host", "a")]), want=resets(PROTOCOL)),
        Case("upper case in the trailers", OPEN, headers(1, [("X-Sum", "1")]), want=resets(PROTOCOL)),
        Case(
            "a control character in the trailers",
            OPEN,
            headers(1, [("x-sum", "a\rb")]),
            want=resets(PROTOCOL),
        ),
    )
    def test_framing(self, world: H2World, front: str, case: Case) -> None:
        if "DATA behind" in case.name:
            case.offer = NO_WINDOW
        world.check(case, front)


def post(length: str) -> bytes:
    return headers(1, request("/sink", "POST", ("content-length", length)), END_HEADERS)


class TestMalformed8p1p1:
    @cases(
        Case("too little", post("2"), data(1, b"x", END_STREAM), want=resets(PROTOCOL)),
        Case("too much", post("1"), data(1, b"xx", END_STREAM), want=resets(PROTOCOL)),
        Case("too much before the end", post("1"), data(1, b"xx"), want=resets(PROTOCOL)),
        Case("too little in two frames", post("9"), data(1, b"xx"), data(1, b"x", 1), want=resets(PROTOCOL)),
        Case("too much in two frames", post("2"), data(1, b"xx") + data(1, b"x", 1), want=resets(PROTOCOL)),
        Case(
            "too little before an empty end", post("5"), data(1, b"x"), data(1, b"", 1), want=resets(PROTOCOL)
        ),
        Case(
            "too little before trailers",
            post("5"),
            data(1, b"x"),
            headers(1, TRAILERS),
            want=resets(PROTOCOL),
        ),
        Case("no body where one is declared", forbidden(("content-length", "1")), want=resets(PROTOCOL)),
        Case("a body where none is declared", post("0") + data(1, b"x", END_STREAM), want=resets(PROTOCOL)),
        Case("negative", forbidden(("content-length", "-1")), want=resets(PROTOCOL)),
        Case("signed", forbidden(("content-length", "+0")), want=resets(PROTOCOL)),
        Case("not a number", forbidden(("content-length", "x")), want=resets(PROTOCOL)),
        Case("a list", forbidden(("content-length", "0, 0")), want=resets(PROTOCOL)),
        Case("empty", forbidden(("content-length", "")), want=resets(PROTOCOL)),
        Case(
            "two that differ",
            forbidden(("content-length", "0"), ("content-length", "1")),
            want=resets(PROTOCOL),
        ),
        Case("as declared", post("2"), data(1, b"xx", END_STREAM), want=kb(1)),
        Case("as declared, padded", post("2"), frame(DATA, 9, 1, b"\5xx" + bytes(5)), want=kb(1)),
        Case("none, declared", headers(1, request("/kb", "GET", ("content-length", "0"))), want=kb(1)),
    )
    def test_a_length_that_the_body_contradicts(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


class TestFieldValidity8p2p1:
    @pytest.mark.parametrize(
        "name",
        [
            "X-Upper",
            "x-uppeR",
            "x bad",
            "x\x00bad",
            "x\rbad",
            "x\nbad",
            "x:bad",
            "x\x7fbad",
            "x\xe9",
            "",
            " x",
            "x ",
            "x(y)",
            "x\tb",
            "x,y",
            'x"y',
        ],
        ids=ascii,
    )
    def test_a_name_that_is_none(self, world: H2World, front: str, name: str) -> None:
        world.check(Case("name", forbidden((name, "value")), want=resets(PROTOCOL)), front)

    @pytest.mark.parametrize(
        "value",
        ["a\x00b", "a\rb", "a\nb", "a\r\nx-smuggled: 1", " a", "a ", "\ta", "a\t", "\r", "a\x7fb", "a\x01b"],
        ids=ascii,
    )
    def test_a_value_that_is_none(self, world: H2World, front: str, value: str) -> None:
        world.check(Case("value", forbidden(("x-a", value)), want=resets(PROTOCOL)), front)

    @pytest.mark.parametrize("name", [":path", ":method", ":authority", ":scheme"])
    def test_a_control_character_in_a_pseudo_header(self, world: H2World, front: str, name: str) -> None:
        for bad in ("\r\nx: y", "\0", "\n"):
            fields = [(each, value + bad if each == name else value) for each, value in request("/forbidden")]
            world.check(Case(name, headers(1, fields), want=resets(PROTOCOL)), front)

    @cases(
        Case("an empty value", headers(1, request("/echo", "GET", ("x-a", ""))), want=serves(1)),
        Case(
            "blanks inside",
            headers(1, request("/echo", "GET", ("x-a", "a b\tc"))),
            want=serves(1, check=lambda found: found.get("x-got") == "a b\tc"),
        ),
        Case(
            "bytes above 0x7f",
            headers(1, request("/echo", "GET", ("x-a", "caf\xe9"))),
            want=serves(1, check=lambda found: found.get("x-got") == "caf\xe9"),
        ),
    )
    def test_odd_but_right(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


class TestConnectionFields8p2p2:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("connection", "keep-alive"),
            ("connection", "close"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("transfer-encoding", "chunked"),
            ("transfer-encoding", "identity"),
            ("upgrade", "h2c"),
            ("upgrade", "websocket"),
            ("te", "gzip"),
            ("te", "trailers, deflate;q=0.5"),
            ("te", ""),
        ],
    )
    def test_are_malformed(self, world: H2World, front: str, name: str, value: str) -> None:
        world.check(Case(name, forbidden((name, value)), want=resets(PROTOCOL)), front)

    @cases(
        Case("te trailers", headers(1, request("/kb", "GET", ("te", "trailers"))), want=kb(1)),
        Case("http2-settings", headers(1, request("/kb", "GET", ("http2-settings", "AAMAAABk"))), want=kb(1)),
    )
    def test_allowed(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


class TestCookies8p2p3:
    @cases(
        Case(
            "crumbs are one cookie",
            headers(
                1,
                request("/echo", "GET", ("cookie", "a=b"), ("x-a", "1"), ("cookie", "c=d"), ("cookie", "e")),
            ),
            want=serves(1, check=lambda found: found.get("x-cookie") == "a=b; c=d; e"),
        ),
        Case(
            "one crumb",
            headers(1, request("/echo", "GET", ("cookie", "a=b; c=d"))),
            want=serves(1, check=lambda found: found.get("x-cookie") == "a=b; c=d"),
        ),
    )
    def test_each(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


METHOD, SCHEME, PATH, AUTHORITY = request("/forbidden")


class TestPseudoHeaders8p3:
    @cases(
        Case("unknown", pseudo(METHOD, SCHEME, PATH, AUTHORITY, (":unknown", "1")), want=resets(PROTOCOL)),
        Case("empty name", pseudo(METHOD, SCHEME, PATH, AUTHORITY, (":", "1")), want=resets(PROTOCOL)),
        Case(
            "a response's", pseudo(METHOD, SCHEME, PATH, AUTHORITY, (":status", "200")), want=resets(PROTOCOL)
        ),
        Case("behind a field", pseudo(METHOD, SCHEME, ("x-a", "1"), PATH, AUTHORITY), want=resets(PROTOCOL)),
        Case(
            "behind all fields", pseudo(METHOD, SCHEME, PATH, ("x-a", "1"), AUTHORITY), want=resets(PROTOCOL)
        ),
        Case("upper case", pseudo((":Method", "GET"), SCHEME, PATH, AUTHORITY), want=resets(PROTOCOL)),
    )
    def test_wrong_ones(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


class TestRequest8p3p1:
    @pytest.mark.parametrize(
        "fields",
        [
            [METHOD, SCHEME, (":path", ""), AUTHORITY],
            [SCHEME, PATH, AUTHORITY],
            [METHOD, PATH, AUTHORITY],
            [METHOD, SCHEME, AUTHORITY],
            [METHOD, METHOD, SCHEME, PATH, AUTHORITY],
            [METHOD, SCHEME, SCHEME, PATH, AUTHORITY],
            [METHOD, SCHEME, PATH, PATH, AUTHORITY],
            [METHOD, SCHEME, PATH, AUTHORITY, AUTHORITY],
            [(":method", ""), SCHEME, PATH, AUTHORITY],
            [(":method", "GET /x"), SCHEME, PATH, AUTHORITY],
            [METHOD, (":scheme", "ht tp"), PATH, AUTHORITY],
            [METHOD, SCHEME, (":path", "forbidden"), AUTHORITY],
            [METHOD, SCHEME, (":path", "https://a/forbidden"), AUTHORITY],
            [METHOD, SCHEME, (":path", "/forbidden x"), AUTHORITY],
            [METHOD, SCHEME, (":path", "/forbidden#x"), AUTHORITY],
            [METHOD, SCHEME, (":path", "*"), AUTHORITY],
        ],
        ids=lambda fields: ",".join(f"{name[1:]}={value}" for name, value in fields),
    )
    def test_malformed(self, world: H2World, front: str, fields: Pairs) -> None:
        world.check(Case("malformed", headers(1, fields), want=resets(PROTOCOL)), front)

    @pytest.mark.parametrize(
        "fields",
        [
            [METHOD, SCHEME, PATH],
            [METHOD, SCHEME, PATH, (":authority", "")],
            [METHOD, SCHEME, PATH, (":authority", "a,b")],
            [METHOD, SCHEME, PATH, (":authority", "a@b")],
            [METHOD, SCHEME, PATH, AUTHORITY, ("host", "other")],
            [METHOD, SCHEME, PATH, AUTHORITY, ("host", "localhost"), ("host", "localhost")],
        ],
        ids=lambda fields: ",".join(value for _, value in fields[3:]),
    )
    def test_an_authority_that_is_none_is_answered(self, world: H2World, front: str, fields: Pairs) -> None:
        world.check(Case("authority", headers(1, fields), want=serves(1, status=400)), front)

    @pytest.mark.parametrize(
        "fields",
        [
            [*request("/kb"), ("host", "localhost")],
            [METHOD, SCHEME, (":path", "/kb"), ("host", "a")],
            [(":path", "/kb"), AUTHORITY, SCHEME, METHOD],
        ],
        ids=["host-too", "host-instead", "another-order"],
    )
    def test_sound(self, world: H2World, front: str, fields: Pairs) -> None:
        world.check(Case("sound", headers(1, fields), want=kb(1)), front)


class TestPush8p4:
    @cases(
        Case("on the connection", frame(PUSH_PROMISE, 4, 0, b"\0\0\0\2" + BLOCK), want=dies(PROTOCOL)),
        Case("half-closed", GET, frame(PUSH_PROMISE, 4, 1, b"\0\0\0\2" + BLOCK), want=dies(PROTOCOL)),
        Case("open", OPEN, frame(PUSH_PROMISE, 4, 1, b"\0\0\0\2" + BLOCK), want=dies(PROTOCOL)),
        Case("an odd one", OPEN, frame(PUSH_PROMISE, 4, 1, b"\0\0\0\3" + BLOCK), want=dies(PROTOCOL)),
    )
    def test_is_not_a_clients(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


CONNECT = (":method", "CONNECT")


class TestConnect8p5:
    @cases(
        Case("is not served", pseudo(CONNECT, (":authority", "localhost:443")), want=serves(1, status=405)),
        Case(
            "with a scheme", pseudo(CONNECT, SCHEME, (":authority", "localhost:443")), want=resets(PROTOCOL)
        ),
        Case("with a path", pseudo(CONNECT, PATH, (":authority", "localhost:443")), want=resets(PROTOCOL)),
        Case("with both", pseudo(CONNECT, SCHEME, PATH, AUTHORITY), want=resets(PROTOCOL)),
        Case("without an authority", pseudo(CONNECT), want=resets(PROTOCOL)),
        Case(
            "extended, not offered",
            pseudo(CONNECT, (":protocol", "websocket"), SCHEME, PATH, AUTHORITY),
            want=resets(PROTOCOL),
        ),
        Case(
            "a protocol without CONNECT",
            pseudo(METHOD, (":protocol", "websocket"), SCHEME, PATH, AUTHORITY),
            want=resets(PROTOCOL),
        ),
    )
    def test_each(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


# -- RFC 7541 ----------------------------------------------------------------------------------------------

ECHOED = block(request("/echo"))


def field_of(raw: bytes) -> bytes:
    """A literal without indexing named x-a, whose value is a string as given."""
    return b"\x00" + text("x-a") + raw


def coded(raw: bytes) -> bytes:
    """A string that says it is in Huffman's code."""
    return number(len(raw), 7, 0x80) + raw


class TestHpackIndexSpace2p3p3:
    @cases(
        Case("an indexed field beyond the tables", headers(1, BLOCK + b"\xc6"), want=dies(COMPRESSION)),
        Case("just beyond the static table", headers(1, BLOCK + b"\xbe"), want=dies(COMPRESSION)),
        Case("a huge index", headers(1, BLOCK + number(2**31, 7, 0x80)), want=dies(COMPRESSION)),
        Case(
            "a literal's name beyond the tables", headers(1, BLOCK + b"\x7f\x07\x01x"), want=dies(COMPRESSION)
        ),
        Case("without indexing", headers(1, BLOCK + number(70, 4) + b"\x01x"), want=dies(COMPRESSION)),
        Case("never indexed", headers(1, BLOCK + number(70, 4, 0x10) + b"\x01x"), want=dies(COMPRESSION)),
        Case("index 0", headers(1, BLOCK + b"\x80"), want=dies(COMPRESSION)),
    )
    def test_is_ended(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


class TestHpackTableSize4p2:
    @cases(
        Case("0", headers(1, b"\x20" + BLOCK), want=kb(1)),
        Case("4096", headers(1, number(4096, 5, 0x20) + BLOCK), want=kb(1)),
        Case("two updates", headers(1, b"\x20" + number(4096, 5, 0x20) + BLOCK), want=kb(1)),
        Case("above what is allowed", headers(1, number(4097, 5, 0x20) + BLOCK), want=dies(COMPRESSION)),
        Case("far above", headers(1, number(2**30, 5, 0x20) + BLOCK), want=dies(COMPRESSION)),
        Case("behind a field", headers(1, BLOCK + b"\x20"), want=dies(COMPRESSION)),
        Case(
            "between fields",
            headers(1, BLOCK[:14] + number(4096, 5, 0x20) + BLOCK[14:]),
            want=dies(COMPRESSION),
        ),
        Case("in a trailer section", OPEN, headers(1, b"\x20" + block(TRAILERS)), want=kb(1)),
    )
    def test_updates(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)

    def test_zero_empties_the_table(self, world: H2World, front: str) -> None:
        kept = b"\x40" + text("x-a") + text("kept")
        with world.client(front) as client:
            client.send(headers(1, ECHOED + kept) + headers(3, ECHOED + b"\xbe"))
            for stream in (1, 3):
                assert client.response(stream).get("x-got") == "kept"
            client.send(headers(5, b"\x20" + number(4096, 5, 0x20) + ECHOED + b"\xbe"))
            dies(COMPRESSION)(client)

    def test_an_entry_over_the_size_empties_it(self, world: H2World, front: str) -> None:
        kept = b"\x40" + text("x-a") + text("kept")
        large = b"\x40" + text("x-b") + text("x" * 4096)
        with world.client(front) as client:
            client.send(headers(1, ECHOED + kept) + headers(3, ECHOED + large))
            for stream in (1, 3):
                assert client.response(stream).status == 200
            client.send(headers(5, ECHOED + b"\xbe"))
            dies(COMPRESSION)(client)


class TestHpackIntegers5p1:
    @cases(
        Case(
            "a number of too many bytes",
            headers(1, BLOCK + b"\x00\x7f" + b"\x80" * 12 + b"\x01"),
            want=dies(COMPRESSION),
        ),
        Case("a number that ends too early", headers(1, BLOCK + b"\xff\x80"), want=dies(COMPRESSION)),
        Case(
            "a length beyond the block",
            headers(1, BLOCK + b"\x00\x7f\xff\xff\xff\x07x"),
            want=dies(COMPRESSION),
        ),
        Case(
            "a number with needless bytes",
            headers(1, ECHOED + b"\x00\x03x-a\x7f\x81\x00" + b"y" * 128),
            want=serves(1, check=lambda found: found.get("x-got") == "y" * 128),
        ),
    )
    def test_each(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


def got(value: str) -> Verdict:
    return serves(1, check=lambda found: found.get("x-got") == value)


class TestHpackStrings5p2:
    """``1c7f`` is 00011 100011 11111: ``ab`` and five bits of padding; ``18`` is ``a`` and three zeros."""

    @cases(
        Case("in Huffman's code", headers(1, ECHOED + field_of(coded(b"\x1c\x7f"))), want=got("ab")),
        Case("as it is", headers(1, ECHOED + field_of(text("ab"))), want=got("ab")),
        Case("the empty one in code", headers(1, ECHOED + field_of(coded(b""))), want=serves(1)),
        Case(
            "padding of eight bits",
            headers(1, ECHOED + field_of(coded(b"\x1c\x7f\xff"))),
            want=dies(COMPRESSION),
        ),
        Case(
            "padding of a byte and more",
            headers(1, ECHOED + field_of(coded(b"\x1c\x7f\xff\xff"))),
            want=dies(COMPRESSION),
        ),
        Case("padding of zeros", headers(1, ECHOED + field_of(coded(b"\x18"))), want=dies(COMPRESSION)),
        Case(
            "padding with one zero", headers(1, ECHOED + field_of(coded(b"\x1c\x7e"))), want=dies(COMPRESSION)
        ),
        Case("nothing but padding", headers(1, ECHOED + field_of(coded(b"\xff"))), want=dies(COMPRESSION)),
        Case(
            "with EOS", headers(1, ECHOED + field_of(coded(b"\x1c\x7f\xff\xff\xff"))), want=dies(COMPRESSION)
        ),
        Case(
            "nothing but EOS",
            headers(1, ECHOED + field_of(coded(b"\xff\xff\xff\xff"))),
            want=dies(COMPRESSION),
        ),
        Case("a bad name", headers(1, ECHOED + b"\x00" + coded(b"\x18") + text("1")), want=dies(COMPRESSION)),
    )
    def test_each(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)


METHOD_GET, SCHEME_HTTPS = b"\x82", b"\x87"
_REST = text("/echo") + b"\x41" + text("localhost")
SHORT = METHOD_GET + SCHEME_HTTPS + b"\x04" + _REST
"""A head with indexed fields and names; ``localhost`` enters the table as number 62."""


class TestHpackRepresentations6:
    @cases(
        Case("6.1 indexed fields", headers(1, SHORT), want=serves(1)),
        Case(
            "6.1 from the dynamic table",
            headers(1, SHORT),
            headers(3, METHOD_GET + SCHEME_HTTPS + b"\x04" + text("/echo") + b"\xbe"),
            want=serves(1, 3),
        ),
        Case(
            "6.2.1 incremental, new name",
            headers(1, SHORT + b"\x40" + text("x-a") + text("1")),
            want=got("1"),
        ),
        Case(
            "6.2.1 incremental, indexed name",
            headers(1, SHORT + b"\x40" + text("x-a") + text("1")),
            done(1),
            headers(3, ECHOED + b"\x7e" + text("2")),
            want=serves(3, check=lambda found: found.get("x-got") == "2"),
        ),
        Case(
            "6.2.2 without indexing, new name",
            headers(1, SHORT + b"\x00" + text("x-a") + text("1")),
            want=got("1"),
        ),
        Case(
            "6.2.2 without indexing, indexed name",
            headers(1, SHORT + b"\x0f\x11" + text("a=b")),
            want=serves(1, check=lambda found: found.get("x-cookie") == "a=b"),
        ),
        Case(
            "6.2.3 never indexed, new name",
            headers(1, SHORT + b"\x10" + text("x-a") + text("1")),
            want=got("1"),
        ),
        Case(
            "6.2.3 never indexed, indexed name",
            headers(1, SHORT + b"\x1f\x11" + text("a=b")),
            want=serves(1, check=lambda found: found.get("x-cookie") == "a=b"),
        ),
        Case("6.3 an update and indexed fields", headers(1, b"\x3f\x01" + SHORT), want=serves(1)),
        Case("6.1 index 0", headers(1, SHORT + b"\x80"), want=dies(COMPRESSION)),
        Case("6.3 above the limit", headers(1, b"\x3f\xe2\x1f" + SHORT), want=dies(COMPRESSION)),
    )
    def test_each(self, world: H2World, front: str, case: Case) -> None:
        world.check(case, front)

    def test_what_is_never_indexed_is_not_in_the_table(self, world: H2World, front: str) -> None:
        with world.client(front) as client:
            client.send(headers(1, ECHOED + b"\x10" + text("x-a") + text("1")))
            done(1)(client)
            client.send(headers(3, ECHOED + b"\xbe"))
            dies(COMPRESSION)(client)
