"""The corpus of ambiguous requests: refused, or forwarded in exactly one meaning that other parsers share."""

import pytest

from expressgateway.wire.head import RequestHead
from tests.smuggling_corpus import CASES, Case, Meaning
from tests.wire.peers import Seen, by_h11, by_llhttp
from tests.wire.recorder import ClientWorld, Recorder, ServerWorld

IDS = [case.name for case in CASES]
REFUSED = [case for case in CASES if case.status]
FORWARDED = [case for case in CASES if not case.status]


def read(case: Case, cuts: int = 0) -> ServerWorld:
    """The codec's reading: in one piece, or in pieces of ``cuts`` bytes."""
    world = ServerWorld()
    size = cuts or len(case.raw)
    world.feed(*(case.raw[at : at + size] for at in range(0, len(case.raw), size)))
    return world


def check(world: ServerWorld, case: Case) -> None:
    if case.status:
        assert not any(exchange.ended for exchange in world.exchanges), "a refused request was completed"
        if case.late and world.exchanges:
            error = world.exchange.error
            assert error is not None, "the exchange was not told"
            assert error.status == case.status
        else:
            assert not world.exchanges, "a refused request was forwarded"
            assert [error.status for error in world.shell.refusals] == [case.status]
            assert b"connection: close\r\n" in world.out
            assert world.shell.done == [False], "the connection must be closed"
        return
    assert case.meaning is not None
    expected: list[Meaning | int] = [case.meaning, *case.then]
    statuses = [error.status for error in world.shell.refusals]
    assert len(world.exchanges) + len(statuses) == len(expected)
    for exchange, meaning in zip(world.exchanges, expected, strict=False):
        assert isinstance(meaning, Meaning)
        compare(exchange, meaning)
    assert statuses == [status for status in expected if isinstance(status, int)]


def compare(exchange: Recorder, meaning: Meaning) -> None:
    head = exchange.request
    assert head is not None
    assert exchange.ended
    assert exchange.error is None
    assert (head.method, head.path, head.authority) == (meaning.method, meaning.path, meaning.authority)
    assert exchange.payload == meaning.body
    assert head.content_length in (None, len(meaning.body))
    assert head.protocol is None
    fields = dict(head.headers)
    for name, value in meaning.headers:
        assert fields.get(name) == value
    for name in (b"content-length", b"transfer-encoding", b"connection", b"host", b"te", b"upgrade"):
        assert name not in fields


def test_the_corpus_is_large_and_distinct() -> None:
    assert len({case.raw for case in CASES}) == len(CASES) >= 120
    assert len(set(IDS)) == len(CASES)
    assert len(REFUSED) >= 120


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_one_meaning_or_none(case: Case) -> None:
    check(read(case), case)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_cuts_change_nothing(case: Case) -> None:
    """In two, at every place, and byte by byte. Details of an error may differ, its status may not."""
    for cut in range(1, min(len(case.raw), 700)):
        world = ServerWorld()
        world.feed(case.raw[:cut], case.raw[cut:])
        check(world, case)
    for size in (1, 2, 3, 7):
        check(read(case, size), case)


@pytest.mark.parametrize("case", REFUSED, ids=[case.name for case in REFUSED])
def test_nothing_is_read_after_a_refusal(case: Case) -> None:
    world = read(case)
    before = world.outcome()
    world.feed(b"GET /smuggled HTTP/1.1\r\nHost: a.example\r\n\r\n" * 2)
    assert world.outcome() == before


def written(exchange: Recorder) -> bytes:
    """What the client codec sends to a backend for what the server codec told."""
    client = ClientWorld()
    head = exchange.request
    assert head is not None
    has_body = bool(exchange.body) or exchange.trailers is not None
    client.ask(
        RequestHead(
            head.method,
            head.scheme,
            head.authority,
            head.path,
            head.headers,
            head.protocol,
            head.content_length,
            head.version,
        ),
        end=not has_body,
    )
    if has_body:
        chunks = exchange.body
        for at, chunk in enumerate(chunks):
            client.codec.send_data(chunk, exchange.trailers is None and at == len(chunks) - 1)
        if exchange.trailers is not None:
            client.codec.send_trailers(exchange.trailers)
    return client.out


@pytest.mark.parametrize("case", FORWARDED, ids=[case.name for case in FORWARDED])
def test_other_parsers_read_what_we_write(case: Case) -> None:
    """A request that the server codec accepts and the client codec writes is one request to everyone."""
    for exchange in read(case).exchanges:
        head = exchange.request
        assert head is not None
        data = written(exchange)
        mine = Seen(
            head.method,
            head.path,
            head.authority,
            b"1.1",
            list(head.headers),
            exchange.payload,
            is_complete=True,
        )
        assert by_h11(data) == [mine]
        if head.method != b"get":  # llhttp knows a closed list of methods, in upper case
            assert by_llhttp(data) == [mine]
        probe = b"GET /probe HTTP/1.1\r\nhost: a.example\r\n\r\n"
        assert [seen.target for seen in by_h11(data + probe)] == [head.path, b"/probe"]


def test_strict_te_takes_nothing_but_the_word() -> None:
    raw = b"POST /p HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n0\r\n\r\n"
    assert ServerWorld(strict_te=True).feed(raw).exchanges == []
    assert len(ServerWorld(strict_te=False).feed(raw).exchanges) == 1


class TestUnderscores:
    RAW = b"GET / HTTP/1.1\r\nHost: a\r\nX_y: 1\r\nX-Y: 2\r\n\r\n"

    def test_reject(self) -> None:
        world = ServerWorld(underscore="reject").feed(self.RAW)
        assert [error.status for error in world.shell.refusals] == [400]

    def test_drop(self) -> None:
        head = ServerWorld(underscore="drop").feed(self.RAW).exchange.request
        assert head is not None
        assert head.headers == ((b"x-y", b"2"),)

    def test_allow(self) -> None:
        head = ServerWorld(underscore="allow").feed(self.RAW).exchange.request
        assert head is not None
        assert head.headers == ((b"x_y", b"1"), (b"x-y", b"2"))

    @pytest.mark.parametrize("policy", ["drop", "allow", "reject"])
    def test_the_line_cache_keeps_the_policy(self, policy: str) -> None:
        """The second reading of a line, from the cache, is the first one."""
        world = ServerWorld(underscore=policy)
        other = self.RAW.replace(b"X-Y: 2", b"X-Y: 3")  # another section: the section cache does not help
        world.feed(self.RAW, other, self.RAW)
        seen = [
            [field for field in e.request.headers if field[0] == b"x_y"] for e in world.exchanges if e.request
        ]
        assert seen == {"drop": [[], [], []], "allow": [[(b"x_y", b"1")]] * 3, "reject": []}[policy]

    def test_framing_in_disguise_is_no_framing(self) -> None:
        raw = b"POST / HTTP/1.1\r\nHost: a\r\nContent_Length: 5\r\nTransfer_Encoding: chunked\r\n\r\n"
        for policy in ("drop", "allow"):
            world = ServerWorld(underscore=policy).feed(raw)
            assert world.exchange.ended
            assert world.exchange.payload == b""
