"""How streams and connections to a backend end: what goes on, what comes back, and what is lost."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, PingAckReceived, PingReceived, StreamReset, WindowUpdated

from expressgateway.net.h2_back import LIMITS
from expressgateway.net.shared_back import IDLE_S
from expressgateway.wire.errors import StreamResetError
from tests.net.h2_scene import OK, Scene, Waiter, scene
from tests.net.loopback import Peer, World, run


class TestGoAway:
    @scene()
    async def test_what_is_above_the_last_stream_comes_back_and_the_rest_finishes(self, at: Scene) -> None:
        waiters = [at.ask(b"part of a body") for _ in range(4)]
        there = await at.accept()
        await there.requests(4)
        await there.goaway(3)
        await at.world.until(lambda: waiters[2].error and waiters[3].error)
        assert [each.is_unprocessed for each in waiters] == [False, False, True, True]
        again = at.ask()
        assert again.calls == []
        other = await at.accept()
        await other.requests(1)
        assert again.calls == ["leased"]
        for each in waiters[:2]:
            assert each.stream is not None
            each.stream.send_data(b", and its end", True)
        await there.until(lambda: there.ended >= {1, 3})
        await there.answer(1, 3)
        await at.world.until(
            lambda: "response 200" in waiters[0].calls and "response 200" in waiters[1].calls
        )
        await there.rest()
        assert at.group.open == 1

    @scene()
    async def test_in_two_steps(self, at: Scene) -> None:
        """After the first nothing is opened, and nothing comes back; the second says what does."""
        first, there = await at.open()
        second = at.ask()
        await there.requests(2)
        await there.goaway(2**31 - 1)
        await at.world.until(lambda: not at.group.has_room)
        assert [first.calls, second.calls] == [["leased"]] * 2
        third = at.ask()
        other = await at.accept()
        await other.requests(1)
        assert third.calls == ["leased"]
        await there.goaway(1)
        await at.world.until(lambda: second.error)
        assert second.is_unprocessed
        assert first.calls == ["leased"]
        await there.answer(1)
        await at.world.until(lambda: "response 200" in first.calls)
        await there.rest()
        assert at.counts == (1, 1, 0)

    @scene()
    async def test_while_it_is_idle(self, at: Scene) -> None:
        _, there = await at.open()
        await there.answer(1)
        await at.world.until(lambda: at.group.idle)
        await there.goaway(1)
        await there.rest()
        await at.is_empty()

    @scene()
    async def test_those_who_wait_go_to_another_connection(self, at: Scene) -> None:
        _, there = await at.open(max_concurrent_streams=1)
        at.group._dial_at = at.world.reactor.now + 60
        waiter = at.ask()
        await at.world.turns()
        at.group._dial_at = 0.0
        await there.goaway(1)
        other = await at.accept()
        await other.requests(1)
        assert waiter.calls == ["leased"]


class TestResets:
    @scene()
    async def test_refused_it_comes_back(self, at: Scene) -> None:
        waiters = [at.ask(b"body") for _ in range(3)]
        there = await at.accept()
        await there.requests(3)
        there.h2.reset_stream(3, ErrorCodes.REFUSED_STREAM)
        await there.flush()
        await at.world.until(lambda: waiters[1].error)
        assert waiters[1].is_unprocessed
        assert [waiters[0].calls, waiters[2].calls] == [["leased"]] * 2
        assert at.ask().calls == ["leased"], "the connection goes on"

    @pytest.mark.parametrize("code", [ErrorCodes.CANCEL, ErrorCodes.INTERNAL_ERROR, ErrorCodes.NO_ERROR])
    def test_one_streams_end_is_its_own(self, code: ErrorCodes) -> None:
        async def test(world: World) -> None:
            made = Scene(world)
            waiters = made.several(3)
            there = await made.accept()
            await there.requests(3)
            for stream in (1, 3, 5):
                there.h2.send_headers(stream, OK)
                there.h2.send_data(stream, b"some")
            there.h2.reset_stream(3, code)
            there.h2.send_data(1, b" more", end_stream=True)
            there.h2.send_data(5, b" more", end_stream=True)
            await there.flush()
            await world.until(lambda: made.group.idle)
            assert [each.body for each in waiters] == [b"some more", b"some", b"some more"]
            error = waiters[1].error
            assert isinstance(error, StreamResetError)
            assert error.code == code
            assert made.group.open == 1
            made.close()

        run(test)

    @scene()
    async def test_given_up_it_is_reset_and_its_siblings_go_on(self, at: Scene) -> None:
        waiters = at.several(2)
        there = await at.accept()
        await there.requests(2)
        assert waiters[0].stream is not None
        waiters[0].stream.abort(None)
        await there.until(lambda: there.saw(StreamReset, stream_id=1, error_code=ErrorCodes.CANCEL))
        await there.answer(3)
        await at.world.until(lambda: at.group.idle)
        assert "abort" not in waiters[0].calls


class TestLost:
    @pytest.mark.parametrize("how", [Peer.close, Peer.reset])
    def test_with_fifty_streams_each_has_its_own_fate(self, how: Any) -> None:
        async def test(world: World) -> None:
            made = Scene(world)
            waiters = made.several(50)
            there = await made.accept()
            await there.requests(50)
            await there.answer(1)
            there.h2.send_headers(3, OK)
            await there.flush()
            await world.until(lambda: "response 200" in waiters[1].calls)
            how(there.peer)
            await world.until(lambda: all("abort" in each.calls for each in waiters[1:]))
            assert "abort" not in waiters[0].calls
            assert all(each.calls.count("abort") == 1 for each in waiters[1:])
            assert all(each.was_delivered for each in waiters[2:])
            await made.is_empty()
            made.close()

        run(test)

    @scene()
    async def test_a_new_connection_from_inside_the_loss(self, at: Scene) -> None:
        waiters = at.several(10)
        there = await at.accept()
        await there.requests(10)
        again = [Waiter() for _ in waiters]
        for old, new in zip(waiters, again, strict=True):
            old.at_abort = functools.partial(at.lease, new)
        there.peer.reset()
        other = await at.accept()
        await other.requests(10)
        assert all(each.calls == ["leased"] for each in again)
        assert at.counts == (1, 1, 0)

    @scene()
    async def test_idle_it_closes_after_its_time(self, at: Scene) -> None:
        _, there = await at.open()
        await there.answer(1)
        await at.world.until(lambda: at.group.idle)
        since = at.group._everyone[0].idle_since
        at.group.sweep(since + IDLE_S - 0.01)
        await at.world.turns()
        assert at.counts == (1, 0, 1)
        at.group.sweep(since + IDLE_S + 0.01)
        await there.rest()
        assert there.saw(ConnectionTerminated, error_code=0)
        await at.is_empty()

    @scene()
    async def test_busy_it_does_not(self, at: Scene) -> None:
        _, there = await at.open()
        at.group.sweep(at.world.reactor.now + IDLE_S + 1)
        await there.until(lambda: there.saw(PingReceived))
        assert at.counts == (1, 1, 0)

    @pytest.mark.parametrize("is_idle", [True, False])
    def test_a_peer_that_answers_no_ping_is_dropped(self, is_idle: bool) -> None:
        async def test(world: World) -> None:
            made = Scene(world)
            waiter, there = await made.open()
            if is_idle:
                await there.answer(1)
                await world.until(lambda: made.group.idle)
            now = world.reactor.now + LIMITS.keep_alive_interval_s + 1
            made.group.sweep(now)
            await there.until(lambda: there.saw(PingReceived))  # the library answers; we keep it
            assert made.group.open == 1
            # Its answer comes in time ...
            await world.turns()
            made.group.sweep(now + 1)
            # ... but not the second time.
            now += 2 * LIMITS.keep_alive_interval_s + 2
            made.group.sweep(now)
            made.group.sweep(now + LIMITS.keep_alive_timeout_s + 1)
            assert ("abort" in waiter.calls) is not is_idle
            await made.is_empty()
            made.close()

        run(test)


class TestLeaving:
    @scene()
    async def test_idle_ones_close_and_busy_ones_after_their_last_exchange(self, at: Scene) -> None:
        waiter, there = await at.open(max_concurrent_streams=1)
        at.group._dial_at = float("inf")
        waiting = at.ask()
        at.group._dial_at = 0.0
        at.group.close_idle()
        other = await at.accept()  # for the one that waited
        await other.requests(1)
        await there.answer(1)
        await other.answer(1)
        await at.world.until(lambda: "response 200" in waiter.calls and "response 200" in waiting.calls)
        await there.rest()
        await other.rest()
        await at.is_empty()

    @scene()
    async def test_goaway_is_said_behind_the_last_exchange(self, at: Scene) -> None:
        """There are servers that answer nothing any more once they have read it; and no exchange is begun."""
        first, there = await at.open()
        second = at.ask()
        await there.requests(2)
        at.group.close_idle()
        assert not at.group.has_room
        third = at.ask()
        other = await at.accept()
        await other.requests(1)
        for stream, waiter in ((1, first), (3, second)):
            await at.world.turns()
            there.h2.ping(b"are you?")
            await there.flush()
            await there.until(lambda: there.saw(PingAckReceived))
            assert not there.saw(ConnectionTerminated)
            await there.answer(stream)
            await at.world.until(lambda: "response 200" in waiter.calls)  # noqa: B023  # called within the turn
        await there.until(lambda: there.saw(ConnectionTerminated, error_code=0))
        await there.rest()
        await other.answer(1)
        await at.world.until(lambda: "response 200" in third.calls)

    @scene()
    async def test_one_that_is_being_made_serves_and_closes(self, at: Scene) -> None:
        waiter = at.ask()
        at.group.close_idle()
        there = await at.accept()
        await there.requests(1)
        await there.answer(1)
        await at.world.until(lambda: "response 200" in waiter.calls)
        await there.rest()
        await at.is_empty()

    @scene()
    async def test_idle(self, at: Scene) -> None:
        _, there = await at.open()
        await there.answer(1)
        await at.world.until(lambda: at.group.idle)
        at.group.close_idle()
        await there.rest()
        await at.is_empty()


class TestFlow:
    @scene()
    async def test_a_paused_exchange_stalls_its_backend_and_nobody_else(self, at: Scene) -> None:
        slow, there = await at.open()
        assert slow.stream is not None
        slow.stream.pause()
        there.h2.send_headers(1, OK)
        sent = 0
        while room := min(there.h2.local_flow_control_window(1), 16_384):
            there.h2.send_data(1, bytes(room))
            sent += room
            await there.flush()
        await at.world.turns()
        assert sent <= LIMITS.stream_window
        assert not there.saw(WindowUpdated, stream_id=1)
        quick = at.ask()
        await there.requests(2)
        there.h2.send_headers(3, OK)
        there.h2.send_data(3, bytes(16_384), end_stream=True)
        await there.flush()
        await at.world.until(lambda: "end" in quick.calls)
        slow.stream.resume()
        await there.until(lambda: there.saw(WindowUpdated, stream_id=1))

    @scene()
    async def test_a_backend_that_does_not_read_blocks_its_exchange(self, at: Scene) -> None:
        waiter = at.ask(b"")
        there = await at.accept()
        there.grants = False
        await there.requests(1)
        assert waiter.stream is not None
        sent = 0
        while "blocked" not in waiter.calls:
            waiter.stream.send_data(bytes(16_384), False)
            sent += 16_384
            await at.world.turns(1)
        assert sent <= 65_535 + LIMITS.max_send_buf_size + 16_384
        await there.until(lambda: there.bodies.get(1) == 65_535)
        there.h2.increment_flow_control_window(2**20)
        there.h2.increment_flow_control_window(2**20, 1)
        await there.flush()
        await at.world.until(lambda: "drained" in waiter.calls)
        waiter.stream.send_data(b"", True)
        await there.until(lambda: 1 in there.ended)
        assert there.bodies[1] == sent
