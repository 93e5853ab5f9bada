"""The frame follower, section by section of RFC 6455, and against frames that another codec writes."""

from __future__ import annotations

import os
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.frames import Close, Frame, Opcode
from websockets.utils import accept_key

from expressgateway.wire import ws
from expressgateway.wire.ws import FrameFollower, Violation

CAP = 70_000


def follower(*, is_client: bool = True, cap: int = CAP) -> FrameFollower:
    return FrameFollower(is_client=is_client, max_message_bytes=cap)


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, mask: bool = True) -> bytes:
    """One frame as the `websockets` library writes it."""
    return Frame(Opcode(opcode), payload, fin).serialize(mask=mask)


def raw(first: int, second: int, rest: bytes = b"") -> bytes:
    """Bytes that no sane implementation writes."""
    return bytes((first, second)) + rest


MASK = b"\x01\x02\x03\x04"
TEXT, BINARY, CONT, CLOSE, PING, PONG = 1, 2, 0, 8, 9, 10


def outcome(data: bytes, sizes: list[int], *, is_client: bool = True) -> tuple[object, ...]:
    """Everything that can be seen of a follower after `data` came in chunks of `sizes` (the last one is the
    rest).

    `sound` is the number of bytes up to the last boundary, over all chunks.
    """
    watched = follower(is_client=is_client)
    at = sound = 0
    for size in [*sizes, len(data)]:
        chunk = data[at : at + size]
        watched.feed(chunk)
        if watched.boundary >= 0:
            sound = at + watched.boundary
        at += len(chunk)
    return (
        watched.violation,
        watched.violation is None and watched.is_mid_frame,
        watched.is_between_frames if watched.violation is None else None,
        watched.payload_left,
        watched.saw_close,
        watched.pings,
        sound,
    )


def fails_with(data: bytes, code: int, *, is_client: bool = True, cap: int = CAP) -> Violation:
    watched = follower(is_client=is_client, cap=cap)
    violation = watched.feed(data)
    assert violation is not None
    assert violation.code == code
    assert not watched.is_between_frames
    assert outcome(data, [1] * len(data), is_client=is_client)[0] == violation or cap != CAP
    return violation


class TestMasking5p1:
    def test_client_frames_must_be_masked(self) -> None:
        assert follower().feed(frame(TEXT, b"x", mask=True)) is None
        assert fails_with(frame(TEXT, b"x", mask=False), 1002).reason == "frame not masked"

    def test_backend_frames_must_not_be(self) -> None:
        assert follower(is_client=False).feed(frame(TEXT, b"x", mask=False)) is None
        assert fails_with(frame(TEXT, b"x", mask=True), 1002, is_client=False).reason == "frame masked"


class TestBaseFraming5p2:
    @pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, CAP])
    @pytest.mark.parametrize("mask", [True, False])
    def test_all_three_length_forms(self, size: int, mask: bool) -> None:
        watched = follower(is_client=mask)
        data = frame(BINARY, bytes(size), mask=mask)
        assert watched.feed(data) is None
        assert watched.is_between_frames
        assert watched.boundary == len(data)

    @pytest.mark.parametrize("opcode", [3, 4, 5, 6, 7, 11, 12, 13, 14, 15])
    def test_reserved_opcodes(self, opcode: int) -> None:
        assert fails_with(raw(0x80 | opcode, 0x80, MASK), 1002).reason == "reserved opcode"

    @pytest.mark.parametrize("rsv", range(8))
    def test_rsv_bits_are_the_extensions_business(self, rsv: int) -> None:
        assert follower().feed(raw(0x81 | rsv << 4, 0x81, MASK + b"x")) is None

    @pytest.mark.parametrize(
        "header",
        [
            raw(0x82, 0xFE, b"\x00\x7d" + MASK),
            raw(0x82, 0xFF, (65535).to_bytes(8, "big") + MASK),
            raw(0x82, 0xFF, (1 << 63).to_bytes(8, "big") + MASK),
            raw(0x82, 0xFF, b"\xff" * 8 + MASK),
        ],
    )
    def test_length_in_its_shortest_form_and_63_bits(self, header: bytes) -> None:
        assert fails_with(header, 1002).reason == "length not in its shortest form"

    def test_the_largest_legal_length_is_only_too_big(self) -> None:
        fails_with(raw(0x82, 0xFF, ((1 << 63) - 1).to_bytes(8, "big") + MASK), 1009)


class TestFragmentation5p4:
    def test_fragments_with_control_frames_between(self) -> None:
        watched = follower()
        data = b"".join(
            (
                frame(TEXT, b"a", fin=False),
                frame(PING, b"?"),
                frame(CONT, b"b", fin=False),
                frame(PONG),
                frame(CONT, b"c"),
                frame(BINARY, b"d"),
            )
        )
        assert watched.feed(data) is None
        assert watched.is_between_frames
        assert watched.pings == 1

    def test_between_two_fragments_is_between_frames(self) -> None:
        watched = follower()
        watched.feed(frame(TEXT, b"a", fin=False))
        assert watched.is_between_frames
        assert not watched.is_mid_frame

    @pytest.mark.parametrize(
        "data",
        [
            frame(CONT, b"x"),
            frame(CONT, b"x", fin=False),
            frame(TEXT, b"a") + frame(CONT, b"x"),
            frame(TEXT, b"a", fin=False) + frame(TEXT, b"x"),
            frame(TEXT, b"a", fin=False) + frame(CONT, b"b") + frame(CONT, b"x"),
        ],
        ids=["none-open", "none-open-nor-final", "after-a-whole-one", "new-one-too-early", "after-the-last"],
    )
    def test_out_of_order(self, data: bytes) -> None:
        assert fails_with(data, 1002).reason == "fragments out of order"

    def test_the_cap_is_on_the_message_not_the_frame(self) -> None:
        half = CAP // 2
        parts = frame(TEXT, bytes(half), fin=False), frame(CONT, bytes(half), fin=False), frame(CONT, b"x")
        watched = follower()
        assert watched.feed(parts[0]) is None
        assert watched.feed(parts[1]) is None
        assert watched.feed(parts[2]) == Violation(1009, "message too big")

    def test_control_payloads_do_not_count(self) -> None:
        data = frame(TEXT, bytes(CAP - 1), fin=False) + frame(PING, bytes(125)) + frame(CONT, b"x")
        assert follower().feed(data) is None

    def test_each_message_starts_from_zero(self) -> None:
        whole = frame(TEXT, bytes(CAP))
        split = frame(TEXT, bytes(CAP - 1), fin=False) + frame(CONT, b"x")
        assert follower().feed(whole + split + whole + split) is None


class TestControlFrames5p5:
    @pytest.mark.parametrize("opcode", [CLOSE, PING, PONG])
    def test_at_most_125_bytes(self, opcode: int) -> None:
        assert follower().feed(raw(0x80 | opcode, 0x80 | 125, MASK + bytes(125))) is None
        for length in (126, 127):
            reason = fails_with(raw(0x80 | opcode, 0x80 | length, bytes(200)), 1002).reason
            assert reason == "control frame too long"

    @pytest.mark.parametrize("opcode", [CLOSE, PING, PONG])
    def test_never_fragmented(self, opcode: int) -> None:
        assert fails_with(raw(opcode, 0x80, MASK), 1002).reason == "control frame fragmented"

    def test_close_is_seen_when_it_is_complete(self) -> None:
        data = frame(CLOSE, Close(1000, "bye").serialize())
        watched = follower()
        for byte in range(len(data) - 1):
            watched.feed(data[byte : byte + 1])
            assert not watched.saw_close
        watched.feed(data[-1:])
        assert watched.saw_close
        assert watched.is_between_frames

    def test_an_empty_close(self) -> None:
        watched = follower()
        watched.feed(frame(CLOSE))
        assert watched.saw_close

    def test_half_a_close_code(self) -> None:
        assert fails_with(raw(0x88, 0x81, MASK + b"x"), 1002).reason == "close code cut short"

    def test_what_follows_a_close_is_not_followed(self) -> None:
        watched = follower()
        tail = frame(PING) + raw(0xFF, 0xFF, b"\xff" * 20)
        close = frame(CLOSE)
        assert watched.feed(close + tail) is None
        assert watched.boundary == len(close + tail)
        assert watched.feed(tail) is None
        assert watched.boundary == len(tail)
        assert watched.pings == 0
        assert watched.is_between_frames

    def test_pings_are_counted_and_taken(self) -> None:
        watched = follower()
        watched.feed(frame(PING) * 7 + frame(PONG) * 3 + frame(TEXT, frame(PING)))
        assert watched.take_pings() == 7
        assert watched.take_pings() == 0
        watched.feed(frame(PING))
        assert watched.take_pings() == 1


class TestBoundary:
    def test_nothing_fed_yet(self) -> None:
        watched = follower()
        assert watched.is_between_frames
        assert watched.feed(b"") is None
        assert watched.boundary == 0

    def test_the_last_one_in_the_chunk(self) -> None:
        one = frame(TEXT, b"hello")
        for size in range(len(one)):
            watched = follower()
            watched.feed(one + one + one[:size])
            assert watched.boundary == 2 * len(one)
            assert watched.is_mid_frame is (size > 0)

    def test_a_chunk_inside_one_frame_has_none(self) -> None:
        watched = follower()
        one = frame(TEXT, b"hello world")
        watched.feed(one[:1])
        watched.feed(one[1:3])
        assert watched.boundary == -1
        watched.feed(one[3:8])
        assert watched.boundary == -1
        assert watched.payload_left == len(one) - 8
        watched.feed(one[8:] + one)
        assert watched.boundary == len(one) - 8 + len(one)

    def test_what_precedes_a_violation_is_sound(self) -> None:
        good = frame(TEXT, b"hello")
        watched = follower()
        assert watched.feed(good + frame(CONT, b"bad")) is not None
        assert watched.boundary == len(good)

    def test_a_violation_in_a_header_already_passed_on_in_part(self) -> None:
        watched = follower()
        assert watched.feed(frame(TEXT, b"hello") + b"\x81") is None
        assert watched.feed(b"\x00") is not None
        assert watched.boundary == -1

    @pytest.mark.parametrize(
        ("before", "first"),
        [(b"", 0x83), (b"", 0x8B), (b"", 0x09), (b"", 0x80), (frame(TEXT, b"a", fin=False), 0x81)],
        ids=["reserved", "reserved-control", "fragmented-ping", "continues-nothing", "message-in-message"],
    )
    def test_what_the_first_byte_says_is_judged_by_the_first_byte(self, before: bytes, first: int) -> None:
        """While there is a boundary before it."""
        watched = follower()
        assert watched.feed(before + bytes((first,))) is not None
        assert watched.boundary == len(before)

    def test_where_a_close_begins(self) -> None:
        text, close = frame(TEXT, b"hello"), frame(CLOSE, Close(1000, "bye").serialize())
        watched = follower()
        watched.feed(text)
        watched.feed(text + close)
        assert watched.close_at == len(text)
        for size in range(1, 6):
            watched = follower()
            watched.feed(text + close[:size])
            assert (watched.close_at, watched.header_bytes) == (None, size)
            watched.feed(close[size:])
            assert watched.close_at == -size

    def test_a_violation_is_final(self) -> None:
        watched = follower()
        violation = watched.feed(frame(CONT))
        for data in (b"", frame(TEXT, b"fine"), frame(CONT), bytes(100)):
            assert watched.feed(data) is violation
            assert watched.boundary == -1
            assert not watched.is_between_frames


GOOD = st.lists(
    st.one_of(
        st.builds(frame, st.sampled_from([TEXT, BINARY]), st.binary(max_size=300)),
        st.builds(frame, st.sampled_from([PING, PONG]), st.binary(max_size=125)),
        st.builds(
            lambda a, b, c: frame(TEXT, a, fin=False) + frame(PING, b) + frame(CONT, c),
            st.binary(max_size=20),
            st.binary(max_size=20),
            st.binary(max_size=140),
        ),
    ),
    max_size=6,
).map(b"".join)


class TestSplitting:
    def test_at_every_byte(self) -> None:
        data = b"".join(
            (
                frame(TEXT, b"a", fin=False),
                frame(PING, b"?"),
                frame(CONT, bytes(126)),
                frame(BINARY, bytes(65536)),
                frame(CLOSE, Close(1000, "").serialize()),
            )
        )
        whole = outcome(data, [])
        for size in [*range(1, 300), *range(len(data) - 40, len(data))]:
            assert outcome(data, [size]) == whole
            assert outcome(data, [size, 1, 2, 3]) == whole

    @given(GOOD, st.lists(st.integers(0, 40), max_size=30))
    def test_good_frames_in_any_chunks(self, data: bytes, sizes: list[int]) -> None:
        whole = outcome(data, [])
        assert whole[0] is None
        assert whole[-1] == len(data)
        assert outcome(data, sizes) == whole

    @given(GOOD, st.binary(max_size=40), st.lists(st.integers(0, 40), max_size=30))
    def test_garbage_after_good_frames_in_any_chunks(self, data: bytes, bad: bytes, sizes: list[int]) -> None:
        whole = outcome(data + bad, [])
        split = outcome(data + bad, sizes)
        if whole[0] is None:
            assert split == whole
        else:
            assert split[0] == whole[0]
            assert split[-1] == whole[-1]

    @given(st.binary(max_size=200), st.booleans())
    def test_never_raises(self, data: bytes, is_client: bool) -> None:
        outcome(data, [1] * len(data), is_client=is_client)
        follower(is_client=is_client).feed(memoryview(data))

    def test_no_payload_is_copied(self) -> None:
        data = memoryview(frame(BINARY, bytes(1_000_000), mask=False))
        watched = follower(is_client=False, cap=1 << 20)
        tracemalloc.start()
        try:
            watched.feed(data[:1])
            watched.feed(data[1:500_000])
            watched.feed(data[500_000:])
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert watched.is_between_frames
        assert peak < 10_000


class TestCloseFrame:
    def test_to_a_client_as_another_implementation_writes_it(self) -> None:
        for code, reason in (
            (1001, ""),
            (1008, "too many pings"),
            (1009, "message too big"),
            (3000, "é" * 20),
        ):
            expected = frame(CLOSE, Close(code, reason).serialize(), mask=False)
            assert ws.close_frame(code, reason) == expected

    @given(st.binary(min_size=4, max_size=4), st.text(max_size=200))
    @example(MASK, "é" * 62)
    def test_to_a_backend_and_cut_at_a_character(self, mask: bytes, reason: str) -> None:
        data = ws.close_frame(1008, reason, mask)
        watched = follower()
        assert watched.feed(data) is None
        assert watched.saw_close
        assert data[2:6] == mask
        payload = bytes(byte ^ mask[place % 4] for place, byte in enumerate(data[6:]))
        closed = Close.parse(payload)
        assert closed.code == 1008
        assert reason.encode("utf-8", "replace").decode().startswith(closed.reason)
        assert (
            len(closed.reason.encode()) > 119 or closed.reason == reason.encode("utf-8", "replace").decode()
        )

    @pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000])
    def test_codes_that_must_not_be_sent(self, code: int) -> None:
        with pytest.raises(ValueError, match="close code"):
            ws.close_frame(code)

    def test_a_mask_of_another_length(self) -> None:
        with pytest.raises(ValueError, match="four bytes"):
            ws.close_frame(1000, "", b"abc")


class TestHandshake4p2:
    def test_the_rfcs_own_example(self) -> None:
        assert ws.accept_value(b"dGhlIHNhbXBsZSBub25jZQ==") == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="

    def test_as_another_implementation_computes_it(self) -> None:
        for _ in range(20):
            key = ws.make_key(os.urandom(16))
            assert ws.is_valid_key(key)
            assert ws.accept_value(key).decode() == accept_key(key.decode())

    @pytest.mark.parametrize(
        "key",
        [
            b"",
            b"dGhlIHNhbXBsZSBub25jZQ=",
            b"dGhlIHNhbXBsZSBub25jZQ",
            b"dGhlIHNhbXBsZSBub25jZQ==\n",
            b"dGhlIHNhbXBsZSBub25jZQ== ",
            b"dGhlIHNhbXBsZSBub25jZWZm",
            b"dGhl\nHNhbXBsZSBub25jZQ==",
            b"dGhl-HNhbXBsZSBub25jZQ==",
            b"\xff" * 24,
            b"=" * 24,
        ],
    )
    def test_wrong_keys(self, key: bytes) -> None:
        assert not ws.is_valid_key(key)

    @given(st.binary(max_size=30))
    def test_asking_never_raises(self, key: bytes) -> None:
        ws.is_valid_key(key)

    def test_a_key_is_made_of_sixteen_bytes(self) -> None:
        with pytest.raises(ValueError, match="sixteen"):
            ws.make_key(bytes(15))
