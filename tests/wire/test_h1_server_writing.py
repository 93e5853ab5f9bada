"""The server role, writing: answers, refusals, aborts and upgrades."""

from collections.abc import Callable
from typing import Any

import pytest

from expressgateway.wire.head import ResponseHead
from tests.wire.recorder import ServerWorld, answer, answer_ok, no_answer, ok, pieces

GET = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"
BODY = b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\n"


class TestWriting:
    def test_a_refusal_after_head_has_its_body(self) -> None:
        """What the last request was must not shape the answer to one that could not be read."""
        world = ServerWorld().feed(b"HEAD / HTTP/1.1\r\nHost: h\r\n\r\n")
        world.codec.out = []
        world.feed(b"nonsense\r\n\r\n")
        assert (
            world.out == b"HTTP/1.1 400 Bad Request\r\ncontent-length: 7\r\nconnection: close\r\n\r\nrefused"
        )

    def test_a_refusal_after_http_1_0_is_not_kept_alive(self) -> None:
        world = ServerWorld().feed(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + b"nonsense\r\n\r\n")
        assert world.out.endswith(b"content-length: 7\r\nconnection: close\r\n\r\nrefused")

    @pytest.mark.parametrize("chunks", [(b"hell",), (b"hello!",), (b"", b"hel", b"lo!"), (b"",)])
    def test_a_length_that_the_body_contradicts_never_looks_complete(self, chunks: tuple[bytes, ...]) -> None:
        world = ServerWorld(answer(200, *chunks, length=5)).feed(GET)
        assert world.shell.resets == 1
        assert True not in world.shell.done
        assert len(world.out.partition(b"\r\n\r\n")[2]) < 5
        world.feed(GET)
        assert len(world.exchanges) == 1

    def test_an_end_without_the_declared_body(self) -> None:
        world = ServerWorld(answer(200, length=5)).feed(GET)
        assert world.shell.resets == 1
        assert True not in world.shell.done

    def test_abort_never_looks_complete(self) -> None:
        for length in (None, 10):
            world = ServerWorld(no_answer).feed(GET)
            world.codec.send_head(ResponseHead(200, (), length), False)
            world.codec.send_data(b"hello", False)
            world.codec.abort(None)
            world.codec.abort(None)
            assert world.shell.resets == 1
            assert not world.out.endswith(b"0\r\n\r\n")
            assert world.shell.done == []
            world.feed(GET)
            assert len(world.exchanges) == 1

    def test_informational_passes_and_not_to_http_1_0(self) -> None:
        world = ServerWorld(no_answer).feed(GET)
        world.codec.send_informational(ResponseHead(103, ((b"link", b"</x>"),)))
        world.codec.send_informational(ResponseHead(102, ()))
        assert world.out == b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
        world = ServerWorld(no_answer).feed(b"GET / HTTP/1.0\r\n\r\n")
        world.codec.send_informational(ResponseHead(103, ()))
        assert world.out == b""

    def test_no_informational_after_the_final_head(self) -> None:
        world = ServerWorld(no_answer).feed(GET)
        world.codec.send_head(ResponseHead(200, (), 5), False)
        before = world.out
        world.codec.send_informational(ResponseHead(103, ()))
        assert world.out == before

    def test_a_complete_answer_before_the_request_ends_the_connection(self) -> None:
        world = ServerWorld(no_answer).feed(BODY + b"he")
        answer_ok(world.exchange)
        assert world.shell.done == [False]
        world.feed(b"llo" + GET)
        assert len(world.exchanges) == 1
        assert world.exchange.payload == b"he"

    def test_a_complete_answer_before_the_request_says_close(self) -> None:
        """RFC 9112 9.6: who will not read on says so, or the client sends its next request in vain."""
        world = ServerWorld(no_answer).feed(BODY + b"he")
        world.codec.send_head(ResponseHead(413, ()), True)
        assert b"connection: close\r\n" in world.out

    def test_a_streamed_answer_may_begin_before_the_request_ends(self) -> None:
        world = ServerWorld(no_answer).feed(BODY + b"he")
        world.codec.send_head(ResponseHead(200, (), 2), False)
        world.codec.send_data(b"a", False)
        world.feed(b"llo")
        assert world.exchange.ended
        world.codec.send_data(b"b", True)
        assert world.shell.done == [True]
        world.feed(GET)
        assert len(world.exchanges) == 2

    def test_the_shell_is_woken_once_per_batch(self) -> None:
        world = ServerWorld(answer(200, b"a", b"b", b"c")).feed(GET)
        assert world.shell.wakes == 1


UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: h\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\nX: y\r\n\r\n"
)


class TestUpgrade:
    """RFC 9110 7.8, RFC 6455 4."""

    def test_accepted(self) -> None:
        for cut in pieces(UPGRADE):
            world = ServerWorld(no_answer, websocket=True).feed(*cut)
            head = world.exchange.request
            assert head is not None
            assert head.protocol == b"websocket"
            assert head.headers == ((b"x", b"y"),)
            assert not world.exchange.ended
            world.codec.send_informational(ResponseHead(101, ((b"sec-websocket-accept", b"k"),)))
            assert world.out == (
                b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
                b"sec-websocket-accept: k\r\n\r\n"
            )
            world.codec.out = []
            world.feed(b"\x81\x00", GET)
            assert world.exchange.payload == b"\x81\x00" + GET
            assert len(world.exchanges) == 1
            world.codec.send_data(b"\x00raw", False)
            assert world.out == b"\x00raw"

    @pytest.mark.parametrize("first", ["client", "backend"])
    def test_both_ends_close_in_either_order(self, first: str) -> None:
        world = ServerWorld(no_answer, websocket=True).feed(UPGRADE)
        world.codec.send_informational(ResponseHead(101, ()))
        steps: list[Callable[[], Any]] = [world.eof, lambda: world.codec.send_data(b"", True)]
        if first == "backend":
            steps.reverse()
        steps[0]()
        assert world.shell.done == []
        steps[1]()
        assert world.shell.done == [False]
        assert world.exchange.ended
        assert world.shell.half_closes == (1 if first == "backend" else 0)

    def test_close_ends_a_tunnel_gracefully(self) -> None:
        world = ServerWorld(no_answer, websocket=True).feed(UPGRADE)
        world.codec.send_informational(ResponseHead(101, ()))
        world.codec.send_data(b"bye", False)
        world.codec.close()
        world.codec.close()
        assert world.shell.done == [False]
        assert world.shell.resets == 0
        assert world.out.endswith(b"bye")

    def test_declined_is_plain_http_again(self) -> None:
        world = ServerWorld(no_answer, websocket=True).feed(UPGRADE)
        answer_ok(world.exchange)
        assert world.out == ok(b"/ws")
        assert world.shell.done == [True]
        world.feed(GET)
        assert [e.request.path for e in world.exchanges if e.request] == [b"/ws", b"/a"]

    def test_nothing_is_told_before_the_backend_has_agreed(self) -> None:
        """Until 101 the connection speaks HTTP. What comes early may be the next request, and must neither
        reach the backend as raw bytes (request smuggling) nor be lost."""
        for cut in ([UPGRADE + GET], [UPGRADE, GET]):
            world = ServerWorld(no_answer, websocket=True).feed(*cut)
            assert world.exchange.payload == b""
            assert not any(call[0] == "data" for call in world.exchange.calls)

    def test_early_bytes_follow_the_101(self) -> None:
        world = ServerWorld(no_answer, websocket=True).feed(UPGRADE + b"\x81\x80abcd")
        world.codec.send_informational(ResponseHead(101, ()))
        world.go_on()
        world.feed(b"more")
        assert world.exchange.payload == b"\x81\x80abcdmore"

    def test_eof_before_the_answer(self) -> None:
        world = ServerWorld(no_answer, websocket=True).feed(UPGRADE).eof()
        assert world.exchange.error is not None

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (b"Upgrade: WebSocket", b"Upgrade: h2c"),
            (b"Upgrade: WebSocket", b"Upgrade: websocket, h2c"),
            (b"keep-alive, Upgrade", b"keep-alive"),
            (b"GET", b"POST"),
            (b"HTTP/1.1", b"HTTP/1.0"),
        ],
    )
    def test_anything_else_goes_on_as_plain_http(self, old: bytes, new: bytes) -> None:
        world = ServerWorld(websocket=True).feed(UPGRADE.replace(old, new))
        head = world.exchange.request
        assert head is not None
        assert head.protocol is None
        assert world.exchange.ended

    def test_an_upgrade_with_a_body_is_plain_http(self) -> None:
        raw = UPGRADE.replace(b"X: y", b"Content-Length: 2")
        world = ServerWorld(websocket=True).feed(raw + b"ab")
        head = world.exchange.request
        assert head is not None
        assert head.protocol is None
        assert world.exchange.payload == b"ab"
