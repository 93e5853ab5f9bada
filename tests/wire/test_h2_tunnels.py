"""RFC 8441 in both roles: when a handshake is sent, what becomes of one that waits, how tunnels end."""

from collections.abc import Callable

import pytest

from expressgateway.wire.errors import NotOfferedError, StreamResetError, WireError
from expressgateway.wire.head import ResponseHead, SharedFields
from tests.wire.h2_world import (
    CANCEL,
    HEADERS,
    NO_ERROR,
    OK,
    ClientWorld,
    ServerWorld,
    bodies,
    data,
    ended,
    headers,
    request,
    resets,
    rst,
    settings,
)

CONNECT = (
    (b":method", b"CONNECT"),
    (b":protocol", b"websocket"),
    (b":scheme", b"https"),
    (b":path", b"/chat"),
    (b":authority", b"example.org"),
)


def waiting() -> ClientWorld:
    """A handshake on a connection whose backend has not said anything yet."""
    world = ClientWorld(raw=True)
    world.ask(request(protocol=b"websocket"), False)
    return world


def kinds(world: ClientWorld) -> list[int]:
    return [kind for kind, *_ in world.take()]


class TestTheClient:
    @pytest.mark.parametrize(
        ("offer", "is_sent"), [(((8, 1),), True), (((8, 0),), False), ((), False)], ids=str
    )
    def test_a_handshake_waits_for_the_backends_settings(
        self, offer: tuple[tuple[int, int], ...], is_sent: bool
    ) -> None:
        """3: what is offered is not known before them."""
        world = waiting()
        assert HEADERS not in kinds(world)
        assert not world.codec.is_idle
        world.feed(settings(*offer))
        assert (HEADERS in kinds(world)) is is_sent
        assert isinstance(world.sink.error, NotOfferedError) is not is_sent
        assert world.codec.is_idle is not is_sent

    @pytest.mark.parametrize(
        "end",
        [
            lambda world: world.codec.receive_eof(),
            lambda world: world.codec.go_away(),
            lambda world: world.feed(b"SSH-2.0-nonsense"),
        ],
        ids=["closed", "left", "failed"],
    )
    def test_one_that_waits_hears_of_the_connections_end(self, end: Callable[[ClientWorld], object]) -> None:
        world = waiting()
        end(world)
        assert isinstance(world.sink.error, WireError)
        assert world.codec.is_idle
        assert len(world.shell.done) == 1

    def test_given_up_while_it_waits(self) -> None:
        world = waiting()
        world.stream.abort(None)
        world.feed(settings((8, 1)))
        assert HEADERS not in kinds(world)
        assert world.sink.error is None
        assert world.codec.is_idle

    def test_another_request_need_not_wait(self) -> None:
        world = ClientWorld(raw=True)
        world.ask()
        assert HEADERS in kinds(world)

    def test_a_reset_behind_the_backends_end_is_told(self) -> None:
        """Of a response it means that no more of the request is wanted; of a tunnel that it is over."""
        world = waiting()
        world.feed(settings((8, 1)), headers(1, OK, 4), data(1, b"", True), rst(1, NO_ERROR))
        assert isinstance(world.sink.error, StreamResetError)


class TestTheServer:
    def opened(self) -> ServerWorld:
        world = ServerWorld(answer=None, websocket=True)
        world.feed(headers(1, CONNECT, 4))
        return world

    def test_success_has_the_fields_of_101(self) -> None:
        """Those that responses share among them."""
        world = self.opened()
        head = ResponseHead(101, ((b"a", b"b"),))
        head.shared = SharedFields(((b"sec-websocket-protocol", b"chat"),))
        world.stream().send_informational(head)
        (block,) = [payload for kind, _, _, payload in world.take() if kind == HEADERS]
        fields = ClientWorld().codec.decoder.decode(block, 1000)
        assert [(name, value) for name, value, _ in fields] == [
            (b":status", b"200"),
            (b"sec-websocket-protocol", b"chat"),
            (b"a", b"b"),
        ]

    def test_what_is_cut_is_cancelled(self) -> None:
        """5: what a reset is to TCP."""
        world = self.opened()
        world.stream().send_informational(ResponseHead(101, ()))
        world.stream().send_data(b"x", False)
        world.stream().abort(WireError("the backend is gone"))
        out = world.take()
        assert bodies(out, 1) == b"x"
        assert not ended(out, 1)
        assert resets(out) == [(1, CANCEL)]

    def test_the_backends_own_code_goes_before(self) -> None:
        world = self.opened()
        world.stream().send_informational(ResponseHead(101, ()))
        world.stream().abort(StreamResetError(0xB))
        assert resets(world.take()) == [(1, 0xB)]
