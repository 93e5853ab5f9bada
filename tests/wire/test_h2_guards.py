"""The attack catalogue's HTTP/2 rows, on the codec of either role: where each line is, and what is no attack.

Each attack is run at its limit (served) and one above (GOAWAY with ENHANCE_YOUR_CALM, its event, the end).
"""

from collections.abc import Callable
from typing import Any

import pytest

from expressgateway.wire.head import ResponseHead
from tests.wire.h2_world import (
    CALM,
    COMPRESSION,
    CONTINUATION,
    END_HEADERS,
    GET,
    HEADERS,
    POST,
    PRIORITY,
    SETTINGS,
    ClientWorld,
    ServerWorld,
    World,
    block,
    data,
    error,
    frame,
    goaways,
    headers,
    ping,
    request,
    resets,
    rst,
    settings,
    window_update,
)
from tests.wire.recorder import no_answer

OPEN = headers(1, POST, END_HEADERS)
BAD = ((b":method", b"GET"), (b"Bad", b"1"))


def tripped(world: World, event: str) -> bool:
    """Whether the connection ended, and in the right way if so."""
    verdict = world.verdict()
    if not world.shell.closed:
        assert world.shell.events == []
        return False
    assert verdict == error(CALM)
    assert world.shell.events == [event]
    assert world.codec.is_closed
    return True


def silent(**more: Any) -> ServerWorld:
    return ServerWorld(no_answer, **more)


Attack = Callable[[int], bytes]

FLOODS: list[tuple[str, int, bytes, Attack]] = [
    ("settings_flood", 98, b"", lambda _: settings()),
    ("settings_flood", 98, b"", lambda _: frame(SETTINGS, 1, 0)),
    ("ping_flood", 50, b"", lambda _: ping()),
    ("ping_flood", 50, b"", lambda _: ping(flags=1)),
    ("empty_frame_flood", 100, OPEN, lambda _: data(1)),
    ("empty_frame_flood", 100, OPEN, lambda _: frame(0, 8, 1, b"\x02\0\0")),
    ("window_update_flood", 1002, OPEN, lambda _: window_update(1, 1)),
    ("window_update_flood", 1002, OPEN, lambda _: window_update(0, 1)),
    ("window_update_flood", 1002, headers(1) + rst(1), lambda _: window_update(1, 1)),
    ("priority_flood", 1000, b"", lambda _: frame(PRIORITY, 0, 9, bytes(5))),
    ("unknown_frame_flood", 1000, b"", lambda _: frame(0x42, 0, 0)),
    ("goaway_flood", 1000, b"", lambda _: frame(7, 0, 0, bytes(8))),
    ("reset_flood", 1002, headers(1) + rst(1), lambda _: rst(1)),
    ("rapid_reset", 100, b"", lambda each: headers(1 + 2 * each) + rst(1 + 2 * each)),
    ("made_you_reset", 100, b"", lambda each: headers(1 + 2 * each, BAD)),
    (
        "made_you_reset",
        100,
        b"",
        lambda each: headers(1 + 2 * each, POST, 4) + window_update(1 + 2 * each, 0),
    ),
    ("made_you_reset", 100, b"", lambda each: headers(1 + 2 * each) + data(1 + 2 * each, b"x")),
    (
        "made_you_reset",
        100,
        b"",
        lambda each: headers(1 + 2 * each, POST, 4) + frame(PRIORITY, 0, 1 + 2 * each, b"x"),
    ),
    (
        "made_you_reset",
        100,
        b"",
        lambda each: headers(1 + 2 * each, POST, 4) + window_update(1 + 2 * each, 2**31 - 1),
    ),
    ("hpack_bomb", 3, b"", lambda each: frame(HEADERS, 5, 1 + 2 * each, b"\x82" * 2000)),
]


class TestFloods:
    @pytest.mark.parametrize(
        ("event", "limit", "before", "attack"),
        FLOODS,
        ids=[f"{each[0]}-{at}" for at, each in enumerate(FLOODS)],
    )
    def test_the_line(self, event: str, limit: int, before: bytes, attack: Attack) -> None:
        world = silent()
        world.feed(before)
        for each in range(limit):
            world.feed(attack(each))
            world.take()
        assert not tripped(world, event)
        world.feed(attack(limit))
        assert tripped(world, event)
        world.feed(headers(9999), ping())
        assert world.take() == []

    @pytest.mark.parametrize(
        ("event", "limit", "before", "attack"),
        FLOODS,
        ids=[f"{each[0]}-{at}" for at, each in enumerate(FLOODS)],
    )
    def test_slowly_it_is_none(self, event: str, limit: int, before: bytes, attack: Attack) -> None:
        world = silent(reset_percent=0)
        world.feed(before)
        for each in range(limit * 2):
            if each % (limit // 2) == 0:
                world.now += 10
            world.feed(attack(each))
            world.take()
        assert not tripped(world, event)

    def test_stream_hoarding(self) -> None:
        world = silent(max_concurrent_streams=10)
        for each in range(500):
            world.feed(headers(1 + 2 * each))
        assert len(world.exchanges) == 10
        assert len(resets(world.take())) == 490
        assert set(world.shell.events) == {"stream_hoarding"}
        assert not world.shell.closed

    def test_settings_in_one_frame(self) -> None:
        world = silent()
        world.feed(settings(*[(4, each) for each in range(64)]))
        assert not tripped(world, "settings_flood")
        world.feed(settings(*[(4, each) for each in range(65)]))
        assert tripped(world, "settings_flood")


class TestHeaderBlocks:
    def test_continuation_frames(self) -> None:
        raw = block(GET)
        for frames, trips in ((16, False), (17, True)):
            world = silent()
            world.feed(frame(HEADERS, 1, 1, raw[:1]))
            for each in range(1, frames):
                world.feed(frame(CONTINUATION, 0, 1, raw[each : each + 1]))
            world.feed(frame(CONTINUATION, 4, 1, raw[frames:]))
            assert tripped(world, "continuation_flood") is trips

    def test_without_an_end(self) -> None:
        world = silent(max_continuation_frames=10**6)
        world.feed(frame(HEADERS, 1, 1, b"\x00" * 16_000))
        fed = 1
        while not world.shell.closed:
            fed += 1
            world.feed(frame(CONTINUATION, 0, 1, b"\x00" * 16_000))
            assert fed < 10
        assert tripped(world, "continuation_flood")
        assert sum(map(len, world.codec._block)) == 0

    @pytest.mark.parametrize(("size", "trips"), [(4000, False), (4001, True)])
    def test_the_last_fragment_counts(self, size: int, trips: bool) -> None:
        """Before it is decoded: this one could not be."""
        world = silent(max_header_list_size=4000)
        raw = block(GET) + b"\x20" * size
        world.feed(frame(HEADERS, 1, 1, raw[:1000]), frame(CONTINUATION, 4, 1, raw[1000:size]))
        if trips:
            assert tripped(world, "continuation_flood")
        else:
            assert world.verdict() == error(COMPRESSION)

    def test_empty_ones(self) -> None:
        world = silent(max_continuation_frames=10**6)
        world.feed(frame(HEADERS, 1, 1))
        for _ in range(100):
            world.feed(frame(CONTINUATION, 0, 1))
        assert tripped(world, "empty_frame_flood")

    def test_a_bomb_is_not_kept(self) -> None:
        """One-byte references to a field of 4,000 bytes: 64 MB, of which a slice is held at a time."""
        world = silent()
        first = block(GET) + b"\x40\x01x" + _long(4000)
        world.feed(frame(HEADERS, 5, 1, first))
        assert len(world.exchanges) == 1
        tail = b"\xbe" * 16_000
        world.feed(frame(HEADERS, 1, 3, block(GET)), frame(CONTINUATION, 4, 3, tail))
        assert [error.status for _, error in world.shell.refusals] == [431]
        world.feed(headers(5))
        assert len(world.exchanges) == 2


def _long(size: int) -> bytes:
    """A string of so many bytes, as HPACK has it."""
    rest, out = size - 127, b"\x7f"
    while rest >= 128:
        out += bytes((rest & 127 | 128,))
        rest >>= 7
    return out + bytes((rest,)) + b"y" * size


class TestGoodClients:
    def test_bandwidth_probes(self) -> None:
        """gRPC pings with the bodies that it moves."""
        world = silent()
        world.feed(OPEN)
        for _ in range(500):
            world.feed(data(1, b"x" * 600), ping())
            world.take()
        assert not tripped(world, "ping_flood")

    def test_but_not_on_credit(self) -> None:
        """A long transfer saves up for a limited number of frames."""
        world = silent()
        world.feed(OPEN)
        for _ in range(200):
            world.feed(data(1, b"x" * 16_000))
            world.take()
        for _ in range(50 + 129):
            world.feed(ping())
        assert tripped(world, "ping_flood")

    def test_small_windows_with_data_moving(self) -> None:
        def endless(recorder: object) -> None:
            stream = world.stream()
            stream.send_head(ResponseHead(200, ()), False)
            stream.send_data(b"x" * 10_000_000, True)

        world = ServerWorld(endless)
        world.feed(headers(1))
        for _ in range(3000):
            world.feed(window_update(1, 1024), window_update(0, 1024))
            world.take()
        assert not tripped(world, "window_update_flood")

    @pytest.mark.parametrize("size", [1, 10, 100, 511, 5000])
    def test_two_updates_for_each_frame_of_ours(self, size: int) -> None:
        """The stream's and the connection's, at once: small frames are the backend's doing."""
        world = silent()
        world.feed(OPEN)
        world.stream().send_head(ResponseHead(200, ()), False)
        for _ in range(3000):
            world.stream().send_data(b"x" * size, False)
            world.feed(window_update(1, size), window_update(0, size))
            world.take()
        assert not tripped(world, "window_update_flood")

    @pytest.mark.parametrize("size", [10, 100])
    def test_two_updates_for_each_frame_all_at_the_end(self, size: int) -> None:
        """A client that was busy: what it grants answers DATA that it has had for long."""
        world = silent()
        world.feed(OPEN, settings((4, 2**24)), window_update(0, 2**24))
        world.stream().send_head(ResponseHead(200, ()), False)
        for _ in range(3000):
            world.stream().send_data(b"x" * size, False)
        world.take()
        world.now += 60
        for _ in range(3000):
            world.feed(window_update(1, size), window_update(0, size))
        assert not tripped(world, "window_update_flood")

    def test_two_updates_for_each_frame_through_a_window_that_is_used_up(self) -> None:
        """Its own grants are what cut the frames."""
        world = silent()
        world.feed(OPEN)
        world.stream().send_head(ResponseHead(200, ()), False)
        world.stream().send_data(b"x" * 1_000_000, False)
        for _ in range(3000):
            world.feed(window_update(1, 100), window_update(0, 100))
            world.take()
        assert not tripped(world, "window_update_flood")

    @pytest.mark.parametrize("frames", [1, 10, 500])
    def test_but_not_more_than_that(self, frames: int) -> None:
        """Frames that moved account for two each, once, and their bytes for some more."""
        world = silent()
        world.feed(OPEN)
        world.stream().send_head(ResponseHead(200, ()), False)
        for _ in range(frames):
            world.stream().send_data(b"x" * 100, False)
        allowed = 1000 + 2 + 2 * frames + frames * 100 // 512
        for _ in range(allowed):
            world.feed(window_update(1, 1))
        assert not tripped(world, "window_update_flood")
        world.feed(window_update(1, 1))
        assert tripped(world, "window_update_flood")

    def test_an_end_without_a_body_accounts_for_none(self) -> None:
        world = silent()
        for each in range(10):
            world.feed(headers(1 + 2 * each))
            world.stream().send_head(ResponseHead(200, ()), False)
            world.stream().send_data(b"", True)
        for _ in range(1000 + 20):
            world.feed(window_update(0, 1))
        assert not tripped(world, "window_update_flood")
        world.feed(window_update(0, 1))
        assert tripped(world, "window_update_flood")

    def test_small_messages_given_back_at_once(self) -> None:
        """As HAProxy does with what passes in a tunnel, or a stream of gRPC: two updates for two bytes."""

        def opened(recorder: object) -> None:
            world.stream().send_head(ResponseHead(200, ()), False)

        world = ServerWorld(opened)
        world.feed(headers(1))
        for _ in range(3000):
            world.stream().send_data(b"hi", False)
            world.feed(window_update(1, 2), window_update(0, 2))
            world.take()
        assert not tripped(world, "window_update_flood")

    @pytest.mark.parametrize("number", [0, 1])
    def test_but_not_what_is_short_for_want_of_a_window(self, number: int) -> None:
        """Data dribble (CVE-2019-9511): each update provokes a frame of one byte."""

        def endless(recorder: object) -> None:
            stream = world.stream()
            stream.send_head(ResponseHead(200, ()), False)
            stream.send_data(b"x" * 10_000_000, True)

        world = ServerWorld(endless)
        world.feed(headers(1), window_update(1 - number, 2**20))
        world.take()
        # Accounted for: the window of bytes that went first, in four frames, and the request.
        for _ in range(1000 + 2 + 65_535 // 512 + 4 * 2 + 3):
            world.feed(window_update(number, 1))
            world.take()
        assert tripped(world, "window_update_flood")

    def test_an_update_and_a_priority_with_each_request(self) -> None:
        world = ServerWorld()
        for each in range(2000):
            number = 1 + 2 * each
            world.feed(frame(PRIORITY, 0, number, bytes(5)), headers(number), window_update(number, 2**20))
            world.take()
        assert not tripped(world, "window_update_flood")

    def test_cancelling_now_and_then(self) -> None:
        world = silent()
        for each in range(400):
            world.now += 0.2
            world.feed(headers(1 + 2 * each))
            if each % 2:
                world.feed(rst(1 + 2 * each))
            else:
                world.stream().send_head(ResponseHead(200, ()), True)
            world.take()
        assert not tripped(world, "rapid_reset")

    def test_cancelling_most_of_them(self) -> None:
        """Slowly, and behind the head of the answer: the share tells."""
        world = silent()
        for each in range(201):
            world.now += 1
            world.feed(headers(1 + 2 * each))
            world.stream().send_head(ResponseHead(200, ()), False)
            world.feed(rst(1 + 2 * each))
            world.take()
        assert tripped(world, "rapid_reset")


class TestBackends:
    """The same lines hold for a backend."""

    @pytest.mark.parametrize(
        ("event", "limit", "attack"),
        [
            (event, limit, attack)
            for event, limit, before, attack in FLOODS
            if not before and limit in (98, 50, 1000)
        ],
    )
    def test_the_line(self, event: str, limit: int, attack: Attack) -> None:
        world = ClientWorld()
        for each in range(limit):
            world.feed(attack(each) if event != "priority_flood" else frame(PRIORITY, 0, 1, bytes(5)))
            world.take()
        if event == "goaway_flood":
            return  # the first one ends an idle connection
        assert not tripped(world, event)
        world.feed(attack(limit))
        world.feed(attack(limit))
        assert tripped(world, event)

    def test_updates_for_each_frame_of_an_upload_are_no_attack(self) -> None:
        world = ClientWorld()
        world.ask(request(b"POST"), end=False)
        for _ in range(3000):
            world.stream.send_data(b"x" * 100, False)
            world.feed(window_update(1, 100), window_update(0, 100))
            world.take()
        assert not tripped(world, "window_update_flood")

    def test_resets_are_no_attack(self) -> None:
        world = ClientWorld()
        for each in range(500):
            world.ask()
            world.feed(rst(1 + 2 * each, 7))
            world.take()
        assert goaways(world.seen) == []
