"""gRPC-Web through an exchange, over both kinds of fronts, and its two encodings by themselves."""

import base64

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from expressgateway.proxy.grpc_health import CHECK, Health
from expressgateway.proxy.grpc_status import Code
from expressgateway.proxy.grpc_web import WebBridge
from expressgateway.proxy.service import GrpcRules
from expressgateway.upstream.errors import Fault
from tests.proxy.ends import ClientEnd
from tests.proxy.memory import MemoryWork
from tests.proxy.test_grpc import GRPC, called, counted, gateway, message

WEB = b"application/grpc-web"
TEXT = b"application/grpc-web-text"
FRONTS = pytest.mark.parametrize("front", ["h1", "memory"])


def frames(body: bytes) -> tuple[list[bytes], dict[bytes, bytes]]:
    """A response's messages, and the trailers in its last frame."""
    messages: list[bytes] = []
    while body:
        size = int.from_bytes(body[1:5], "big")
        part, flag, body = body[5 : 5 + size], body[0], body[5 + size :]
        assert len(part) == size, "cut short"
        if flag == 0x80:
            assert body == b"", "something behind the trailers"
            assert part.endswith(b"\r\n")
            lines = part.decode().split("\r\n")[:-1]
            return messages, {n.encode(): v.encode() for n, v in (line.split(": ", 1) for line in lines)}
        messages.append(part)
    raise AssertionError("no trailers")


def plain(body: bytes) -> bytes:
    """Base64 with padding in many places."""
    return b"".join(base64.b64decode(body[at : at + 4], validate=True) for at in range(0, len(body), 4))


def failed(client: ClientEnd, code: Code, kind: bytes = WEB) -> None:
    assert client.status == 200
    assert client.is_complete
    assert client.header(b"content-type") == kind
    body = client.body if kind == WEB else plain(client.body)
    messages, trailers = frames(body)
    assert messages == []
    assert trailers[b"grpc-status"] == b"%d" % code


@FRONTS
class TestCalls:
    def test_binary(self, front: str) -> None:
        world = gateway(front=front)
        client = called(world, kind=WEB + b"+proto", end=False)
        client.data(message(b"ask"))
        client.finish()
        work = world.work
        assert work.header(b"content-type") == b"application/grpc+proto"
        assert work.body == message(b"ask")
        assert work.is_complete
        assert isinstance(work, MemoryWork)
        assert work.head is not None
        assert work.head.accepts_trailers, "TE: trailers is not asked for"
        work.reply(200, headers=[(b"content-type", b"application/grpc+proto"), (b"x-meta", b"1")])
        work.data(message(b"one"))
        work.data(message(b"two"))
        work.finish((b"grpc-status", b"0"), (b"x-end", b"2"))
        assert client.header(b"content-type") == WEB + b"+proto"
        assert client.header(b"x-meta") == b"1"
        assert client.header(b"grpc-status") is None
        assert frames(client.body) == ([b"one", b"two"], {b"grpc-status": b"0", b"x-end": b"2"})
        assert client.trailers == []
        assert counted(world) == {Code.OK: 1}
        world.check_quiet(1)

    def test_text(self, front: str) -> None:
        world = gateway(front=front)
        client = called(world, kind=TEXT, end=False)
        for piece in (b"a", b"bb", b"ccc", b"dddd"):
            client.data(base64.b64encode(message(piece)))
        client.finish()
        work = world.work
        assert work.body == b"".join(message(piece) for piece in (b"a", b"bb", b"ccc", b"dddd"))
        assert work.header(b"content-type") == b"application/grpc"
        work.reply(200, headers=[GRPC])
        for piece in (b"1", b"22", b"333"):
            work.data(message(piece))
            assert plain(client.body).endswith(message(piece)), "held back"
        work.finish((b"grpc-status", b"0"))
        assert client.header(b"content-type") == TEXT
        assert frames(plain(client.body))[0] == [b"1", b"22", b"333"]
        world.check_quiet(1)

    def test_text_with_a_declared_length(self, front: str) -> None:
        world = gateway(front=front)
        body = base64.b64encode(message(b"ask"))
        client = world.client()
        client.request(b"POST", b"/s/m", headers=((b"content-type", TEXT),), length=len(body), end=False)
        client.data(body)
        client.finish()
        assert world.work.body == message(b"ask")
        assert isinstance(world.work, MemoryWork)
        assert world.work.head is not None
        assert world.work.head.content_length is None
        assert world.work.is_complete
        world.work.reply(200, headers=[GRPC], length=len(message(b"x")))
        world.work.data(message(b"x"))
        world.work.finish((b"grpc-status", b"0"))
        assert client.header(b"content-length") is None
        assert frames(plain(client.body)) == ([b"x"], {b"grpc-status": b"0"})

    def test_a_status_without_a_message(self, front: str) -> None:
        world = gateway(front=front)
        client = called(world, kind=WEB)
        fields = [GRPC, (b"grpc-status", b"7"), (b"grpc-message", b"no"), (b"x-meta", b"1")]
        world.work.reply(200, headers=fields, end=True)
        assert client.header(b"x-meta") == b"1"
        assert client.header(b"grpc-status") is None
        assert frames(client.body) == ([], dict(fields[1:]))
        assert counted(world) == {Code.PERMISSION_DENIED: 1}
        world.check_quiet(1)

    def test_no_status_at_all(self, front: str) -> None:
        world = gateway(front=front)
        client = called(world, kind=WEB)
        world.work.reply(200, headers=[GRPC])
        world.work.data(message(b"x"), end=True)
        messages, trailers = frames(client.body)
        assert (messages, trailers[b"grpc-status"]) == ([b"x"], b"2")
        assert counted(world) == {Code.UNKNOWN: 1}
        world.check_quiet(1)

    @pytest.mark.parametrize("kind", [WEB, TEXT])
    def test_what_the_gateway_says(self, front: str, kind: bytes) -> None:
        world = gateway(front=front)
        world.side.fault = Fault.REFUSED
        failed(called(world, kind=kind), Code.UNAVAILABLE, kind)
        failed(called(world, (b"grpc-timeout", b"x"), kind=kind), Code.INVALID_ARGUMENT, kind)
        world = gateway(front=front)
        client = called(world, kind=kind)
        world.work.reply(503, headers=[(b"content-type", b"text/html")], end=True)
        failed(client, Code.UNAVAILABLE, kind)
        client = called(world, (b"grpc-timeout", b"1S"), kind=kind)
        world.advance(1.25)
        failed(client, Code.DEADLINE_EXCEEDED, kind)
        world.check_quiet(2)

    def test_a_deadline_within(self, front: str) -> None:
        world = gateway(front=front)
        client = called(world, (b"grpc-timeout", b"1S"), kind=WEB)
        world.work.reply(200, headers=[GRPC])
        world.work.data(message(b"x"))
        world.advance(1.25)
        messages, trailers = frames(client.body)
        assert (messages, trailers[b"grpc-status"]) == ([b"x"], b"4")
        assert client.is_complete
        world.check_quiet(1)

    @pytest.mark.parametrize("body", [b"AAA", b"AA*A", b"A===", b"====", b"AAAA\n", b"AA=A"])
    def test_no_base64(self, front: str, body: bytes) -> None:
        world = gateway(front=front)
        client = called(world, kind=TEXT, end=False)
        client.data(body)
        if client.status == 0:
            client.finish()
        failed(client, Code.INVALID_ARGUMENT, TEXT)
        assert not world.works[0].is_complete
        world.check_quiet(1)

    def test_health(self, front: str) -> None:
        world = gateway(front=front)
        world.reload(grpc=GrpcRules(9, Health({"pool": world.pool}, world.counters)))
        client = called(world, kind=WEB, path=CHECK, end=False)
        client.data(message(b""))
        client.finish()
        assert frames(client.body) == ([b"\x08\x01"], {b"grpc-status": b"0"})
        world.check_quiet(1)

    def test_a_reset_of_the_backend(self, front: str) -> None:
        world = gateway(front=front)
        client = called(world, kind=WEB)
        world.work.vanish()
        failed(client, Code.UNAVAILABLE)


class TestAccept:
    @pytest.mark.parametrize(
        ("subtype", "accept", "answer"),
        [
            (b"-web", b"", WEB),
            (b"-web-text", b"", TEXT),
            (b"-web-text", b"*/*", TEXT),
            (b"-web-text", b"application/grpc-web-text", TEXT),
            (b"-web-text+proto", b"application/grpc-web+proto", WEB),
            (b"-web", b"Application/gRPC-Web-Text", TEXT),
        ],
    )
    def test_what_the_answer_is(self, subtype: bytes, accept: bytes, answer: bytes) -> None:
        assert WebBridge(subtype, accept).answer_type(b"") == answer


@given(st.lists(st.binary(max_size=20), max_size=8), st.lists(st.integers(1, 9), min_size=1, max_size=9))
@example([b"", b"a"], [1])
def test_base64_in_any_pieces(parts: list[bytes], sizes: list[int]) -> None:
    text = b"".join(base64.b64encode(part) for part in parts)
    bridge = WebBridge(b"-web-text", b"")
    out = []
    at = number = 0
    while at < len(text):
        size = sizes[number % len(sizes)]
        out.append(bridge.decode(text[at : at + size], False))
        at += size
        number += 1
    out.append(bridge.decode(b"", True))
    assert b"".join(out) == b"".join(parts)


@given(st.binary(max_size=40))
def test_nothing_but_base64_is_taken(text: bytes) -> None:
    bridge = WebBridge(b"-web-text", b"")
    try:
        out = bridge.decode(text, True)
    except ValueError:
        return
    assert len(out) <= len(text) * 3 // 4
