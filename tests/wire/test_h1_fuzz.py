"""What holds for any bytes: no codec raises, cuts change nothing, round trips are exact, peers agree."""

from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from expressgateway.wire.head import ResponseHead
from tests.smuggling_corpus import CASES
from tests.wire.peers import PeerError, by_h11, by_llhttp
from tests.wire.recorder import ClientWorld, Recorder, ServerWorld, answer_ok, no_answer, request

MANY = settings(max_examples=250, deadline=None)

REQUESTS = [case.raw for case in CASES]
ACCEPTED = [case.raw for case in CASES if not case.status]
RESPONSES = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n\r\nto the end",
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x00",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
]
WORDS = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\x00",
    b" ",
    b"\t",
    b":",
    b"0\r\n\r\n",
    b"Content-Length: 3\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: close\r\n",
    b"Host: b\r\n",
    b"Expect: 100-continue\r\n",
    b"Upgrade: websocket\r\nConnection: upgrade\r\n",
    b"HTTP/1.1",
    b"HTTP/1.0",
    b"GET ",
    b"\xff",
    b"5\r\nhello\r\n",
    b"X_y: z\r\n",
    b" \r\n",
]


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A sound message (or two) with words and bytes put in, taken out and changed."""
    data = draw(st.sampled_from(seeds))
    if draw(st.booleans()):
        data += draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 3)):
            case 0:
                data = data[:at] + draw(st.sampled_from(WORDS)) + data[at:]
            case 1:
                data = data[:at] + data[at + draw(st.integers(1, 4)) :]
            case 2:
                data = data[:at] + bytes((draw(st.integers(0, 255)),)) + data[at + 1 :]
            case _:
                data = data[:at]
    return data


def cut(draw: Any, data: bytes) -> list[bytes]:
    places = sorted(draw(st.lists(st.integers(0, len(data)), max_size=6)))
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


def early(recorder: Recorder) -> None:
    """An answer in the middle of the request: called at its end only, so the streams are free to refuse."""
    if recorder.stream is not None:
        recorder.stream.send_head(ResponseHead(200, (), 4), False)
        recorder.stream.send_data(b"toolong", True)


class TestServer:
    @MANY
    @given(data=st.data(), raw=mutated(REQUESTS) | st.binary(max_size=200))
    def test_never_raises_in_any_state(self, data: st.DataObject, raw: bytes) -> None:
        answer = data.draw(st.sampled_from([answer_ok, no_answer, early]))
        world = ServerWorld(answer, websocket=data.draw(st.booleans()), underscore="allow", max_head=200)
        for piece in cut(data.draw, raw):
            world.feed(piece)
            if world.exchanges and data.draw(st.integers(0, 5)) == 0:
                stream = world.codec
                asked = world.exchange.request is not None and world.exchange.request.protocol is not None
                head = ResponseHead(data.draw(st.sampled_from([100, 103, 101] if asked else [100, 103])), ())
                if world.exchange.error is None and stream._sink is not None:
                    stream.send_informational(head)
        ending = data.draw(st.sampled_from(["eof", "reset", "abort", "close"]))
        if ending == "abort":
            world.codec.abort(None)
        elif ending == "close":
            world.codec.close()
        else:
            getattr(world, ending)()
        world.feed(raw)
        assert len(world.codec._held) <= max(200, 2 * len(raw)) + 4

    @MANY
    @given(data=st.data(), raw=mutated(REQUESTS))
    def test_cuts_change_nothing(self, data: st.DataObject, raw: bytes) -> None:
        whole = ServerWorld().feed(raw)
        parts = ServerWorld().feed(*cut(data.draw, raw))
        assert normal(parts) == normal(whole)

    @MANY
    @given(data=st.data(), raw=mutated(REQUESTS))
    def test_the_caches_change_nothing(self, data: st.DataObject, raw: bytes) -> None:
        """A reader that has seen everything reads as one that has seen nothing."""
        assert normal(ServerWorld(fields=SEASONED).feed(raw)) == normal(ServerWorld().feed(raw))


SEASONED = ServerWorld().codec.limits.fields
for _raw in REQUESTS:
    ServerWorld(fields=SEASONED).feed(_raw)


def normal(world: ServerWorld) -> Any:
    """What may not depend on cuts: statuses, not the kind of error behind them."""
    exchanges, refusals, out, done, resets, half_closes = world.outcome()
    return (
        [(*meaning[:-1], meaning[-1] and meaning[-1][1]) for meaning in exchanges],
        [status for _, status in refusals],
        out,
        done,
        resets,
        half_closes,
    )


class TestClient:
    @MANY
    @given(data=st.data(), raw=mutated(RESPONSES) | st.binary(max_size=200))
    def test_never_raises_in_any_state(self, data: st.DataObject, raw: bytes) -> None:
        world = ClientWorld(max_head=200)
        for _ in range(2):
            if data.draw(st.booleans()):
                protocol = data.draw(st.sampled_from([None, b"websocket"]))
                world.ask(
                    request(data.draw(st.sampled_from([b"GET", b"HEAD", b"POST"])), protocol=protocol),
                    end=False,
                )
            for piece in cut(data.draw, raw):
                world.feed(piece)
                if world.codec.is_open and data.draw(st.integers(0, 4)) == 0:
                    world.codec.send_data(b"x", data.draw(st.booleans()))
            ending = data.draw(st.sampled_from(["eof", "reset", ""]))
            if ending == "eof":
                world.eof()
            elif ending == "reset":
                world.codec.receive_reset()
        world.codec.abort(None)
        world.feed(raw)
        assert len(world.codec._held) <= 200 + len(raw)

    @MANY
    @given(data=st.data(), raw=mutated(RESPONSES))
    def test_cuts_change_nothing(self, data: st.DataObject, raw: bytes) -> None:
        head = request(data.draw(st.sampled_from([b"GET", b"HEAD"])))
        whole = ClientWorld().ask(head).feed(raw)
        parts = ClientWorld().ask(head).feed(*cut(data.draw, raw))
        assert client_view(parts) == client_view(whole)
        assert client_view(parts.eof()) == client_view(whole.eof())


def client_view(world: ClientWorld) -> Any:
    _, answer, interim, body, trailers, ended, error = world.sink.meaning()
    return answer, interim, body, trailers, ended, error is not None, world.shell.done, world.is_reusable


tokens = st.text("abcXYZ019-!#", min_size=1, max_size=8).map(str.encode)
values = st.binary(max_size=20).map(
    lambda raw: bytes(byte for byte in raw if byte >= 0x80 or 0x20 <= byte < 0x7F or byte == 9).strip(b" \t")
)
fields = st.lists(st.tuples(tokens.map(lambda name: b"x-" + name.lower()), values), max_size=5).map(tuple)
bodies = st.lists(st.binary(min_size=1, max_size=300), max_size=4)


class TestRoundTrip:
    @MANY
    @given(
        data=st.data(),
        method=st.sampled_from([b"GET", b"POST", b"PUT", b"DELETE", b"OPTIONS"]),
        path=st.binary(max_size=20).map(lambda raw: b"/" + raw.hex().encode()),
        headers=fields,
        chunks=bodies,
        trailers=fields,
        has_length=st.booleans(),
    )
    def test_requests(
        self,
        data: st.DataObject,
        method: bytes,
        path: bytes,
        headers: tuple[tuple[bytes, bytes], ...],
        chunks: list[bytes],
        trailers: tuple[tuple[bytes, bytes], ...],
        has_length: bool,
    ) -> None:
        """client codec -> server codec, and what other parsers make of it."""
        body = b"".join(chunks)
        client = ClientWorld()
        length = len(body) if has_length else None
        client.ask(
            request(method, path, headers=headers, content_length=length), end=not chunks and not trailers
        )
        for at, chunk in enumerate(chunks):
            client.codec.send_data(chunk, not trailers and at == len(chunks) - 1)
        if trailers:
            client.codec.send_trailers(trailers)
        raw = client.out
        world = ServerWorld(no_answer).feed(*cut(data.draw, raw))
        seen = world.exchange
        assert seen.request is not None
        assert (seen.request.method, seen.request.path, seen.request.headers) == (method, path, headers)
        assert seen.payload == body
        assert seen.ended
        assert (seen.trailers or ()) == (() if has_length else trailers)
        for parse in (by_llhttp, by_h11):
            (one,) = parse(raw)
            assert (one.method, one.target, one.body, one.is_complete) == (method, path, body, True)
            assert one.fields == list(headers)

    @MANY
    @given(
        data=st.data(),
        status=st.sampled_from([200, 204, 206, 304, 404, 500, 599]),
        method=st.sampled_from([b"GET", b"HEAD", b"POST"]),
        headers=fields,
        chunks=bodies,
        trailers=fields,
        has_length=st.booleans(),
    )
    def test_responses(
        self,
        data: st.DataObject,
        status: int,
        method: bytes,
        headers: tuple[tuple[bytes, bytes], ...],
        chunks: list[bytes],
        trailers: tuple[tuple[bytes, bytes], ...],
        has_length: bool,
    ) -> None:
        """server codec -> client codec."""
        body = b"".join(chunks)
        server = ServerWorld(no_answer)
        server.feed(method + b" / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\n\r\n")
        server.codec.send_head(ResponseHead(status, headers, len(body) if has_length else None), False)
        for chunk in chunks:
            server.codec.send_data(chunk, False)
        server.codec.send_trailers(trailers)
        client = ClientWorld().ask(request(method))
        client.feed(*cut(data.draw, server.out))
        seen = client.sink
        assert seen.response is not None
        assert (seen.response.status, seen.response.headers) == (status, headers)
        has_body = method != b"HEAD" and status not in (204, 304)
        assert seen.payload == (body if has_body else b"")
        assert seen.ended
        assert client.is_reusable
        assert (seen.trailers or ()) == (trailers if has_body and not has_length else ())


class TestAgainstLlhttp:
    """Whatever both accept, both understand alike. We refuse more, on purpose: bare LF, folded lines, blanks
    around chunk sizes, repeated or listed Content-Length, any coding but chunked, unclean authorities, chunk
    extensions that are not well-formed, forbidden trailers and names with an underscore. We take what llhttp
    does not know: methods of one's own."""

    @settings(max_examples=600, deadline=None)
    @given(raw=mutated(ACCEPTED))
    @example(
        raw=b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n\r\n"
    )
    def test_we_agree_where_both_accept(self, raw: bytes) -> None:
        world = ServerWorld().feed(raw)
        if not world.exchanges or world.shell.refusals or any(each.error for each in world.exchanges):
            return  # we refuse it
        try:
            theirs = by_llhttp(raw)
        except PeerError:
            return
        ours = [exchange for exchange in world.exchanges if exchange.request and exchange.ended]
        complete = [one for one in theirs if one.is_complete]
        if world.shell.done and world.shell.done[-1] is False:
            complete = complete[: len(ours)]  # after Connection: close we read no more
        assert len(ours) == len(complete)
        for exchange, one in zip(ours, complete, strict=True):
            head = exchange.request
            assert head is not None
            assert head.method == one.method
            if one.target.startswith(b"/") or one.target == b"*":
                assert head.path == one.target
            assert exchange.payload == one.body
            mine = list(head.headers)
            # llhttp leaves the blanks at a value's end, which are not part of it (RFC 9110 5.5).
            stripped = [(name, value.strip(b" \t")) for name, value in one.fields]
            assert [each for each in stripped if each in mine] == mine
            if one.host:
                assert head.authority == one.host.strip().lower()
