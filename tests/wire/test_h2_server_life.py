"""The server role's tunnels (RFC 8441), its leaving (RFC 9113 6.8), and what its sweep finds."""

import hpack

from expressgateway.wire.errors import PeerClosedError
from expressgateway.wire.head import ResponseHead
from tests.wire.h2_world import (
    ACK,
    BEGIN,
    CALM,
    DATA,
    END_HEADERS,
    GET,
    GOAWAY,
    NO_ERROR,
    PING,
    POST,
    SETTINGS_ACK,
    SETTINGS_TIMEOUT,
    ServerWorld,
    data,
    ended,
    goaways,
    headers,
    lists,
    ping,
    resets,
)
from tests.wire.recorder import answer_ok

WEBSOCKET = (
    (b":method", b"CONNECT"),
    (b":protocol", b"websocket"),
    (b":scheme", b"https"),
    (b":path", b"/chat"),
    (b":authority", b"example.org"),
)


class TestTunnel:
    def open(self) -> ServerWorld:
        world = ServerWorld(None, websocket=True)
        world.feed(headers(1, WEBSOCKET, END_HEADERS))
        return world

    def accepted(self) -> ServerWorld:
        world = self.open()
        world.stream().send_informational(ResponseHead(101, ((b"sec-websocket-protocol", b"chat"),)))
        return world

    def test_101_is_200(self) -> None:
        world = self.accepted()
        out = world.take()
        assert lists(out) == [[(b":status", b"200"), (b"sec-websocket-protocol", b"chat")]]
        assert not ended(out, 1)

    def test_bytes_both_ways(self) -> None:
        world = self.accepted()
        world.take()
        world.feed(data(1, b"ping"))
        world.stream().send_data(b"pong", False)
        assert world.last.calls[-1] == ("data", b"ping", False)
        assert world.take() == [(DATA, 0, 1, b"pong")]

    def test_each_side_ends_by_itself(self) -> None:
        world = self.accepted()
        world.stream().send_data(b"bye", True)
        out = world.take()
        assert ended(out, 1)
        assert resets(out) == []
        assert world.shell.done == []
        world.feed(data(1, b"late"), data(1, b"", True))
        assert world.last.calls[-2:] == [("data", b"late", False), ("data", b"", True)]
        assert world.shell.done == [1]

    def test_the_clients_end_first(self) -> None:
        world = self.accepted()
        world.feed(data(1, b"", True))
        assert world.shell.done == []
        world.stream().send_data(b"bye", False)
        world.stream().close()
        assert ended(world.take(), 1)
        assert world.shell.done == [1]

    def test_close_waits_for_the_client_and_not_for_ever(self) -> None:
        world = self.accepted()
        world.stream().send_data(b"bye", False)
        world.stream().close()
        assert ended(world.take(), 1)
        calls = len(world.last.calls)
        world.feed(data(1, b"x" * 16_000) * 4)
        assert len(world.last.calls) == calls, "nobody reads it"
        world.codec.sweep(world.now + 4.9)
        assert resets(world.take()) == []
        world.codec.sweep(world.now + 5.1)
        assert resets(world.take()) == [(1, NO_ERROR)]
        assert world.shell.done == [1]

    def test_declined(self) -> None:
        world = self.open()
        world.stream().send_head(ResponseHead(403, (), 2), False)
        world.stream().send_data(b"no", True)
        out = world.take()
        assert lists(out)[0][0] == (b":status", b"403")
        assert ended(out, 1)
        assert resets(out) == [(1, NO_ERROR)]

    def test_early_bytes_are_given_on(self) -> None:
        world = self.open()
        world.feed(data(1, b"early"))
        assert world.last.calls[-1] == ("data", b"early", False)


class TestLeaving:
    def test_two_steps(self) -> None:
        world = ServerWorld(None)
        world.feed(headers(1))
        world.codec.go_away_soon()
        assert goaways(world.take()) == [(2**31 - 1, NO_ERROR)]
        world.feed(headers(3))
        assert len(world.exchanges) == 2
        world.codec.go_away()
        world.codec.go_away()
        assert goaways(world.take()) == [(3, NO_ERROR)]
        world.feed(headers(5), headers(7, POST, END_HEADERS), data(7, b"x"), data(7, b"", True))
        assert len(world.exchanges) == 2
        assert resets(world.take()) == []
        assert world.shell.closed == []
        for number in (0, 1):
            world.stream(number).send_head(ResponseHead(200, ()), True)
        assert world.shell.closed == [True]
        assert world.codec.is_closed

    def test_what_is_ignored_is_not_reset(self) -> None:
        world = ServerWorld(None)
        world.feed(headers(1))
        world.codec.go_away()
        world.feed(headers(3, (*GET, (b"Bad", b"x"))), headers(5, (*GET, (b"x", b"y" * 70_000))))
        assert resets(world.take()) == []
        assert world.shell.refusals == []

    def test_what_is_ignored_keeps_the_table_right(self) -> None:
        world = ServerWorld(None)
        encoder = hpack.Encoder()
        get = [(name.decode(), value.decode()) for name, value in GET]
        world.feed(headers(1, POST, END_HEADERS))
        world.codec.go_away()
        ignored = encoder.encode([*get, ("x", "y")])
        world.feed(b"".join((len(ignored).to_bytes(3, "big"), b"\x01\x05\x00\x00\x00\x03", ignored)))
        trailers = encoder.encode([("x", "y")])
        assert len(trailers) == 1
        world.feed(b"".join((len(trailers).to_bytes(3, "big"), b"\x01\x05\x00\x00\x00\x01", trailers)))
        assert world.last.trailers == ((b"x", b"y"),)

    def test_at_once_when_idle(self) -> None:
        world = ServerWorld()
        world.feed(headers(1))
        world.codec.go_away(CALM, "enough")
        assert world.shell.closed == [True]
        (last,) = [each for each in world.take() if each[0] == GOAWAY]
        assert last[3][8:] == b"enough"

    def test_an_exchange_may_be_the_last(self) -> None:
        """The shell decides so when it opens one."""
        world = ServerWorld(answer_ok)
        world.feed(headers(1))
        original = world.shell.open_exchange

        def last(stream: object) -> object:
            world.codec.go_away()
            return original(stream)  # type: ignore[arg-type]  # as it came

        world.shell.open_exchange = last  # type: ignore[method-assign,assignment]
        world.feed(headers(3) + headers(5))
        assert len(world.exchanges) == 2
        assert goaways(world.take()) == [(3, NO_ERROR)]
        assert world.shell.closed == [True]


class TestSweep:
    def test_settings_that_are_not_acknowledged(self) -> None:
        world = ServerWorld(raw=True)
        world.feed(BEGIN.removesuffix(SETTINGS_ACK))
        world.codec.sweep(101.0)
        world.feed(ping())
        world.codec.sweep(131.0)
        assert not world.shell.closed
        world.codec.sweep(200.0)
        assert world.verdict() == ("connection", SETTINGS_TIMEOUT)

    def test_a_ping_after_silence_and_a_close_after_more(self) -> None:
        world = ServerWorld(None)
        world.feed(headers(1))
        world.codec.sweep(world.now + 29)
        assert world.take() == []
        world.codec.sweep(world.now + 31)
        world.codec.sweep(world.now + 40)
        assert [each[:2] for each in world.take()] == [(PING, 0)]
        world.codec.sweep(world.now + 62)
        assert world.shell.closed == [False]
        assert type(world.last.error) is PeerClosedError

    def test_any_sign_of_life_will_do(self) -> None:
        world = ServerWorld()
        world.codec.sweep(world.now + 31)
        ((_, _, _, payload),) = world.take()
        world.now += 40
        world.feed(ping(payload, ACK))
        for later in (10, 25, 29):
            world.codec.sweep(world.now + later)
        assert not world.shell.closed
        assert world.take() == []

    def test_off(self) -> None:
        world = ServerWorld(keep_alive_interval_s=0)
        world.codec.sweep(world.now + 1000)
        assert world.take() == []
