"""The attack catalogue's HTTP/3 rows, on the codec: where each line is, and what is no attack.

Each attack is run at its limit (served) and one above (H3_EXCESSIVE_LOAD, its event, the end).
"""

from collections.abc import Callable
from typing import Any

import pytest

from expressgateway.wire.head import ResponseHead
from tests.wire.h3_world import (
    CAPACITY,
    DATA,
    DECOMPRESSION,
    EXCESSIVE,
    GET,
    GOAWAY,
    HEADERS,
    MAX_PUSH_ID,
    POST,
    ClientWorld,
    ServerWorld,
    World,
    data,
    error,
    frame,
    headers,
    insert,
    integer,
    request,
)
from tests.wire.recorder import no_answer

BAD = ((b":method", b"GET"), (b"Bad", b"1"))
GREASE = 0x21
WAITS = frame(HEADERS, b"\x02\0\x80")


def tripped(world: World, event: str, code: int = EXCESSIVE) -> bool:
    """Whether the connection ended, and in the right way if so."""
    verdict = world.verdict()
    if not world.shell.closed:
        assert world.shell.events == []
        return False
    assert verdict == error(code)
    assert world.shell.events == [event]
    assert world.codec.is_closed
    return True


def silent(**more: Any) -> ServerWorld:
    return ServerWorld(no_answer, **more)


def resets(world: ServerWorld, count: int) -> None:
    for each in range(count):
        world.feed(4 * each, headers(POST)).reset(4 * each)


def stops(world: ServerWorld, count: int) -> None:
    for each in range(count):
        world.feed(4 * each, headers(), True).stop(4 * each)


def bare_resets(world: ServerWorld, count: int) -> None:
    for each in range(count):
        world.reset(4 * each)


def resets_inside_the_head(world: ServerWorld, count: int) -> None:
    for each in range(count):
        world.feed(4 * each, headers()[:5]).reset(4 * each)


def provoked(world: ServerWorld, count: int) -> None:
    for each in range(count):
        world.feed(4 * each, headers(BAD), True)


def incomplete(world: ServerWorld, count: int) -> None:
    for each in range(count):
        world.feed(4 * each, b"", True)


def empty(world: ServerWorld, count: int) -> None:
    world.feed(0, headers(POST))
    for _ in range(count):
        world.feed(0, frame(DATA))


def unknown_frames(world: ServerWorld, count: int) -> None:
    world.feed(0, headers(POST))
    world.codec.guards.moved = world.codec.guards._seen_moved = 0
    world.feed(0, frame(GREASE, b"x") * count)


def unknown_control_frames(world: ServerWorld, count: int) -> None:
    world.control(frame(GREASE, b"x") * count)


def control_frames(world: ServerWorld, count: int) -> None:
    world.control((frame(MAX_PUSH_ID, b"\0") + frame(GOAWAY, b"\0")) * ((count - 1) // 2))
    world.control(frame(GOAWAY, b"\0") * ((count - 1) % 2))


def unknown_streams(world: ServerWorld, count: int) -> None:
    for each in range(count):
        world.feed(14 + 4 * each, integer(GREASE) + b"x", True)


def oversized(world: ServerWorld, count: int) -> None:
    for each in range(count):
        world.feed(4 * each, headers((*GET, (b"a", b"x" * 2000))), True)
        world.flush()


def long_blocks(world: ServerWorld, count: int) -> None:
    for each in range(count):
        world.feed(4 * each, frame(HEADERS, bytes(1001))[:10])
        world.flush()


def bombs(world: ServerWorld, count: int) -> None:
    """Each line stands for a large entry of the table."""
    world.insertions(CAPACITY, insert(b"a", b"x" * 900))
    for each in range(count):
        world.feed(4 * each, frame(HEADERS, b"\x02\0" + b"\x80" * 900), True)
        world.flush()


Attack = Callable[[ServerWorld, int], None]


class TestEachHasALimit:
    @pytest.mark.parametrize(
        ("attack", "event", "limit", "more"),
        [
            (resets, "rapid_reset", 100, {}),
            (stops, "rapid_reset", 100, {}),
            (bare_resets, "rapid_reset", 100, {}),
            (resets_inside_the_head, "rapid_reset", 100, {}),
            (provoked, "made_you_reset", 100, {}),
            (incomplete, "made_you_reset", 100, {}),
            (empty, "empty_frame_flood", 100, {}),
            (unknown_frames, "unknown_frame_flood", 1000, {}),
            (unknown_control_frames, "unknown_frame_flood", 1000, {}),
            (control_frames, "settings_flood", 100, {}),
            (unknown_streams, "unknown_stream_flood", 1000, {}),
            (oversized, "qpack_bomb", 3, {"max_header_list_size": 1000}),
            (long_blocks, "qpack_bomb", 3, {"max_header_list_size": 1000}),
            (bombs, "qpack_bomb", 3, {"max_header_list_size": 1000}),
        ],
    )
    def test_at_and_above(self, attack: Attack, event: str, limit: int, more: dict[str, Any]) -> None:
        world = silent(**more)
        attack(world, limit)
        assert not tripped(world, event)
        world = silent(**more)
        attack(world, limit + 1)
        assert tripped(world, event)

    def test_a_window_ends(self) -> None:
        world = silent(reset_percent=0)
        for round_of in range(3):
            for each in range(100):
                number = 4 * (100 * round_of + each)
                world.feed(number, headers(POST)).reset(number)
            world.now += 10.0
        assert not tripped(world, "")

    def test_slowly_and_most_of_all_streams(self) -> None:
        world = silent(max_client_resets=10_000)
        for each in range(201):
            world.feed(4 * each, headers(POST)).reset(4 * each)
        assert tripped(world, "rapid_reset")

    def test_answered_and_reset(self) -> None:
        world = silent(reset_percent=0)
        for each in range(300):
            world.feed(4 * each, headers(POST))
            world.stream().send_head(ResponseHead(200, ()), False)
            world.reset(4 * each)
        assert not tripped(world, "")


class TestQpack:
    def test_streams_that_wait(self) -> None:
        world = silent()
        for each in range(16):
            world.feed(4 * each, WAITS, True)
        assert not tripped(world, "")
        world.feed(64, WAITS, True)
        assert tripped(world, "qpack_blocked_streams", DECOMPRESSION)

    def test_streams_that_wait_and_are_given_up(self) -> None:
        """They wait no more, and count as resets."""
        world = silent()
        for each in range(100):
            world.feed(4 * each, WAITS).reset(4 * each)
        assert not tripped(world, "")
        world.feed(400, WAITS).reset(400)
        assert tripped(world, "rapid_reset")

    def test_what_comes_behind_a_block_that_waits(self) -> None:
        """It is not consumed: the transport's window bounds it."""
        world = silent()
        world.feed(0, WAITS + data(b"x" * 1000)).feed(0, data(b"y" * 1000))
        assert world.transport.eaten[0] == len(WAITS)
        world.account()
        world.reset(0)
        world.account()

    @pytest.mark.parametrize("size", [40, 4000])
    def test_insertions_that_nothing_uses(self, size: int) -> None:
        world = silent(max_encoder_bytes=50_000)
        one = insert(b"a", b"x" * size)
        world.insertions(CAPACITY)
        count = (50_000 - 4) // len(one)
        for _ in range(count):
            world.insertions(one)
        assert not tripped(world, "")
        for _ in range(50_000 // len(one) + 1):
            world.insertions(one)
        assert tripped(world, "qpack_bomb")

    def test_insertions_of_requests(self) -> None:
        world = ServerWorld(max_encoder_bytes=5000)
        world.insertions(CAPACITY)
        for each in range(100):
            world.insertions(insert(b"cookie", b"x" * 1000))
            world.feed(4 * each, headers(), True)
            world.flush()
        assert not tripped(world, "")

    def test_a_bomb_is_not_kept(self) -> None:
        world = silent()
        world.insertions(CAPACITY, insert(b"a", b"x" * 3900))
        world.feed(0, frame(HEADERS, b"\x02\0" + b"\x80" * 60_000), True)
        assert [type(each).__name__ for _, each in world.shell.refusals] == ["HeadTooLargeError"]
        world.feed(4, headers(), True)
        assert len(world.exchanges) == 1


class TestNoAttack:
    def test_requests_account_for_unknown_frames(self) -> None:
        world = ServerWorld()
        for each in range(3000):
            world.feed(4 * each, headers() + frame(GREASE), True)
            world.flush()
        assert not tripped(world, "")

    def test_a_backend_that_resets(self) -> None:
        world = ClientWorld(max_client_resets=5, reset_percent=0)
        for each in range(5):
            world.ask()
            world.reset(4 * each)
        assert not tripped(world, "")
        world.ask(request())
        world.reset(20)
        assert tripped(world, "rapid_reset")
