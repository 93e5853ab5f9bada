"""The server role's windows, both ways, and its backpressure (RFC 9113 5.2, 6.9)."""

from typing import Any

import pytest

from expressgateway.wire.head import ResponseHead
from tests.wire.h2_world import (
    DATA,
    END_HEADERS,
    HEADERS,
    PING,
    POST,
    SETTINGS,
    WINDOW_UPDATE,
    ServerWorld,
    bodies,
    data,
    ended,
    headers,
    ping,
    rst,
    settings,
    window_update,
)
from tests.wire.recorder import answer


class TestSendWindows:
    def test_no_more_than_the_streams_window(self) -> None:
        world = ServerWorld(answer(200, b"x" * 10))
        world.feed(settings((4, 4)), headers(1))
        assert bodies(world.take(), 1) == b"xxxx"
        assert world.stream().unsent() == 6
        world.feed(window_update(1, 5))
        assert bodies(world.take(), 1) == b"xxxxx"
        world.feed(window_update(1, 5))
        out = world.take()
        assert (bodies(out, 1), ended(out, 1)) == (b"x", True)
        assert world.shell.done == [1]

    def test_no_more_than_the_connections_window(self) -> None:
        world = ServerWorld(answer(200, b"x" * 50_000))
        world.feed(headers(1), headers(3))
        out = world.take()
        assert len(bodies(out, 1) + bodies(out, 3)) == 65_535
        world.feed(window_update(0, 100_000))
        out += world.take()
        assert (len(bodies(out, 1)), len(bodies(out, 3))) == (50_000, 50_000)
        assert ended(out, 1)
        assert ended(out, 3)

    def test_an_end_needs_no_window(self) -> None:
        world = ServerWorld(None)
        world.feed(settings((4, 0)), headers(1), headers(3))
        for stream in (world.stream(0), world.stream(1)):
            stream.send_head(ResponseHead(200, ()), False)
        world.stream(0).send_data(b"", True)
        world.stream(1).send_trailers(((b"a", b"b"),))
        out = world.take()
        assert ended(out, 1)
        assert ended(out, 3)

    def test_a_window_that_becomes_negative(self) -> None:  # 6.9.2
        world = ServerWorld(None)
        world.feed(headers(1))
        stream = world.stream()
        stream.send_head(ResponseHead(200, ()), False)
        stream.send_data(b"x" * 1000, False)
        world.feed(settings((4, 100)))
        stream.send_data(b"y" * 10, False)
        world.take()
        assert stream.window == 100 - 1000
        world.feed(window_update(1, 900))
        assert bodies(world.take(), 1) == b""
        world.feed(settings((4, 105)))
        assert bodies(world.take(), 1) == b"yyyyy"
        stream.send_data(b"", True)
        world.feed(window_update(1, 100))
        out = world.take()
        assert (bodies(out, 1), ended(out, 1)) == (b"yyyyy", True)

    def test_trailers_wait_for_the_body(self) -> None:
        world = ServerWorld(answer(200, b"x" * 10, trailers=((b"a", b"b"),)))
        world.feed(settings((4, 4)), headers(1))
        assert not ended(world.take(), 1)
        world.feed(window_update(1, 6))
        out = world.take()
        assert [each[0] for each in out] == [DATA, HEADERS]
        assert ended(out, 1)

    @pytest.mark.parametrize(("asked", "longest"), [(16_384, 16_384), (20_000, 20_000), (2**24 - 1, 65_536)])
    def test_the_longest_frame(self, asked: int, longest: int) -> None:
        world = ServerWorld(answer(200, b"x" * 200_000))
        world.feed(settings((5, asked), (4, 2**20)), window_update(0, 2**20), headers(1))
        assert max(len(body) for _, _, _, body in world.take()) == longest

    def test_credit_wakes_who_waits_for_it(self) -> None:
        world = ServerWorld(answer(200, b"x" * 70_000))
        world.feed(settings((4, 2**20)), headers(1))
        world.take()
        world.shell.wakes = 0
        world.feed(window_update(0, 1000))
        assert world.shell.wakes == 1
        world.codec.take_out()
        world.shell.wakes = 0
        world.codec.congested()
        world.feed(window_update(0, 1000))
        assert world.shell.wakes == 0

    def test_streams_take_turns(self) -> None:
        world = ServerWorld(answer(200, b"x" * 60_000))
        world.codec.congested()
        world.feed(window_update(0, 2**20), headers(1), headers(3), headers(5))
        assert [each[0] for each in world.take()] == [HEADERS] * 3
        world.codec.drained()
        order = [stream for kind, _, stream, _ in world.take() if kind == DATA]
        assert order[:6] == [1, 3, 5, 1, 3, 5]

    def test_a_trickle_of_credit_costs_no_copies(self) -> None:
        """A large chunk is not cut again for each byte of window."""
        world = ServerWorld(answer(200, b"x" * 60_000), max_idle_frames=10**6)
        world.feed(settings((4, 0)), headers(1))
        for _ in range(2000):
            world.feed(window_update(1, 1))
        assert bodies(world.take(), 1) == b"x" * 2000
        queue = world.stream()._queue
        assert queue is not None
        assert len(queue[0]) == 60_000


class TestBackpressure:
    def test_blocked_and_drained_once(self) -> None:
        world = ServerWorld(None, max_send_buf_size=1000)
        world.feed(settings((4, 0)), headers(1))
        stream = world.stream()
        stream.send_head(ResponseHead(200, ()), False)
        calls = world.last.calls
        stream.send_data(b"x" * 1000, False)
        assert ("blocked",) not in calls
        stream.send_data(b"x", False)
        stream.send_data(b"x", False)
        assert calls.count(("blocked",)) == 1
        world.feed(window_update(1, 502))
        world.take()
        assert ("drained",) not in calls
        world.feed(window_update(1, 1))
        world.take()
        assert calls.count(("drained",)) == 1
        world.feed(window_update(1, 100))
        world.take()
        assert calls.count(("drained",)) == 1

    def test_a_congested_socket_stops_bodies_only(self) -> None:
        world = ServerWorld(answer(200, b"x" * 100))
        world.codec.congested()
        world.feed(headers(1), ping(), settings())
        assert [each[0] for each in world.take()] == [HEADERS, PING, SETTINGS]
        assert world.stream().unsent() == 100
        world.feed(window_update(0, 1000), window_update(1, 1000))
        assert world.take() == []
        world.shell.wakes = 0
        world.codec.drained()
        assert world.shell.wakes == 1
        assert bodies(world.take(), 1) == b"x" * 100

    def test_one_flush_takes_a_bounded_amount(self) -> None:
        world = ServerWorld(answer(200, b"x" * 1_000_000))
        world.codec.congested()
        world.feed(settings((4, 2**30)), window_update(0, 2**30), headers(1))
        world.take()
        world.codec.drained()
        world.shell.wakes = 0
        first = sum(map(len, world.codec.take_out()))
        assert 262_144 <= first < 300_000
        assert world.shell.wakes

    def test_unsent_does_not_move_for_others(self) -> None:
        world = ServerWorld(answer(200, b"x" * 10_000))
        world.feed(settings((4, 100)), headers(1), headers(3))
        world.take()
        before = world.stream(0).unsent()
        world.feed(window_update(3, 5000), ping())
        world.take()
        assert world.stream(0).unsent() == before == 9900

    def test_closed_streams_do_not_wait_for_a_turn(self) -> None:
        world = ServerWorld(answer(200, b"x" * 100))
        world.codec.congested()
        for each in range(1, 100, 2):
            world.feed(headers(each), rst(each))
        assert not world.codec.turns
        world.feed(headers(101))
        world.codec.drained()
        assert bodies(world.take(), 101) == b"x" * 100

    def test_reset_drops_what_was_queued(self) -> None:
        world = ServerWorld(answer(200, b"x" * 10_000))
        world.feed(settings((4, 100)), headers(1), rst(1), window_update(0, 10_000))
        world.take()
        assert world.stream().unsent() == 0
        assert not world.codec.streams


class TestReceiveWindows:
    def updates(self, world: ServerWorld) -> dict[int, int]:
        total: dict[int, int] = {}
        for kind, _, stream, body in world.take():
            if kind == WINDOW_UPDATE:
                total[stream] = total.get(stream, 0) + int.from_bytes(body, "big")
        return total

    def make(self, **given: Any) -> ServerWorld:
        more: dict[str, Any] = {
            "stream_window": 1000,
            "max_stream_window": 1000,
            "connection_window": 65_535,
            "max_connection_window": 65_535,
            **given,
        }
        world = ServerWorld(None, **more)
        world.feed(headers(1, POST, END_HEADERS))
        return world

    def test_credit_comes_back_by_halves(self) -> None:
        world = self.make()
        world.feed(data(1, b"x" * 499))
        assert self.updates(world) == {}
        world.feed(data(1, b"x"))
        assert self.updates(world) == {1: 500}

    def test_a_paused_stream_gets_none_and_its_connection_all(self) -> None:
        world = self.make()
        world.stream().pause()
        world.feed(data(1, b"x" * 1000))
        assert self.updates(world) == {}
        assert world.last.payload == b"x" * 1000
        for each in range(3, 200, 2):
            world.feed(headers(each, POST, END_HEADERS), data(each, b"y" * 900, True))
        assert self.updates(world)[0] >= 65_535
        world.stream(0).resume()
        assert self.updates(world) == {1: 1000}

    def test_none_behind_the_end(self) -> None:
        world = self.make()
        world.stream().pause()
        world.feed(data(1, b"x" * 1000), data(1, b"", True))
        world.stream().resume()
        assert self.updates(world) == {}

    def test_padding_comes_back(self) -> None:
        world = self.make()
        world.feed(b"\x00\x02\x01\x00\x08\x00\x00\x00\x01\xff" + b"x" * 257 + bytes(255))
        assert self.updates(world) == {1: 513}

    def test_a_window_turned_over_quickly_doubles(self) -> None:
        world = self.make(max_stream_window=6000, max_connection_window=1_000_000)
        sizes = []
        for _ in range(6):
            received = world.codec.streams[1].received
            world.feed(data(1, b"x" * (received.left if received is not None else 1000)))
            received = world.codec.streams[1].received
            assert received is not None
            sizes.append(received.size)
        assert sizes == [1000, 2000, 4000, 6000, 6000, 6000]
        assert world.verdict() == []

    def test_a_slow_one_does_not(self) -> None:
        world = self.make(max_stream_window=6000, max_connection_window=1_000_000)
        for _ in range(5):
            world.now += 0.3
            world.feed(data(1, b"x" * 1000))
        received = world.codec.streams[1].received
        assert received is not None
        assert received.size == 1000

    def test_all_streams_together_grow_within_a_bound(self) -> None:
        world = self.make(max_stream_window=60_000, max_connection_window=100_000)
        for stream in (1, 3, 5):
            if stream > 1:
                world.feed(headers(stream, POST, END_HEADERS))
            for _ in range(12):
                world.feed(data(stream, b"x" * 1000))
                world.take()
        grown = [each.has_grown_by for each in world.codec.streams.values()]
        assert world.codec.growth_left == 100_000 - sum(grown)
        world.feed(rst(1), rst(3), rst(5))
        assert world.codec.growth_left == 100_000

    def test_the_connections_window_grows(self) -> None:
        world = self.make(max_connection_window=300_000, max_stream_window=10**6, stream_window=10**6)
        for _ in range(60):
            world.feed(data(1, b"x" * 10_000))
        assert world.codec.received.size == 300_000
