"""W3C Trace Context, case by case, and for any bytes; the ids that we make."""

import re
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from expressgateway.proxy.trace_context import (
    FLAGS,
    MAX_MEMBERS,
    MAX_STATE_BYTES,
    PARENT_ID,
    TRACE_ID,
    Ids,
    read_parent,
    read_state,
)

TRACE = b"0af7651916cd43dd8448eb211c80319c"
SPAN = b"b7ad6b7169203331"
GOOD = b"00-" + TRACE + b"-" + SPAN + b"-01"


class TestParent:
    """W3C Trace Context 3.2 and 4.3."""

    @pytest.mark.parametrize(
        ("value", "read"),
        [
            (GOOD, GOOD),
            (GOOD[:-2] + b"00", GOOD[:-2] + b"00"),
            (GOOD[:-2] + b"03", GOOD[:-2] + b"03"),  # level 2: random
            (GOOD[:-2] + b"ff", GOOD[:-2] + b"03"),  # flags that we do not know are set to zero
            (GOOD[:-2] + b"fe", GOOD[:-2] + b"02"),
            # A later version: what we know of it is taken, and told as our own.
            (b"cc" + GOOD[2:], GOOD),
            (b"01" + GOOD[2:] + b"-what-the-future-will-be-like", GOOD),
            (b"01" + GOOD[2:] + b"-", GOOD),
            (b"fe" + GOOD[2:-2] + b"09", GOOD),
        ],
    )
    def test_continued(self, value: bytes, read: bytes) -> None:
        assert read_parent([value]) == read

    @pytest.mark.parametrize(
        "value",
        [
            b"",
            b"00",
            b"ff" + GOOD[2:],
            GOOD.upper(),
            b"0" + GOOD[1:2] + b"g" + GOOD[3:],
            b".0" + GOOD[2:],
            b"0" + GOOD,
            GOOD[1:],
            GOOD + b"-",
            GOOD + b"-extra",
            GOOD + b".",
            b"01" + GOOD[2:] + b".what",
            b"01" + GOOD[2:-1],
            b"00-" + b"0" * 32 + b"-" + SPAN + b"-01",
            b"00-" + TRACE + b"-" + b"0" * 16 + b"-01",
            b"00-" + TRACE[:-1] + b"-" + SPAN + b"-01",
            b"00-" + TRACE + b"0-" + SPAN + b"-01",
            b"00-" + TRACE[:-1] + b".-" + SPAN + b"-01",
            b"00-" + TRACE + b"-" + SPAN[:-1] + b"-01",
            b"00-" + TRACE + b"-" + SPAN + b"-0",
            b"00-" + TRACE + b"-" + SPAN + b"-001",
            b"00-" + TRACE + b"-" + SPAN + b"-0g",
            b" " + GOOD,
            GOOD + b" ",
            GOOD.replace(b"-", b"_"),
            GOOD + b"," + GOOD,
        ],
    )
    def test_begun_anew(self, value: bytes) -> None:
        assert read_parent([value]) is None

    @pytest.mark.parametrize("values", [[], [GOOD, GOOD], [GOOD, b""], [b"", GOOD]])
    def test_one_field_counts(self, values: Sequence[bytes]) -> None:
        assert read_parent(values) is None

    @given(
        st.lists(st.binary(max_size=70), max_size=2)
        | st.from_regex(rb"..-[0-9a-f]{32}-.*").map(lambda x: [x])
    )
    @example([b"\x00"])
    def test_any_bytes(self, values: list[bytes]) -> None:
        read = read_parent(values)
        assert read is None or re.fullmatch(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-0[0-3]", read)

    @given(
        st.integers(0, 254),
        st.integers(1, 2**128 - 1),
        st.integers(1, 2**64 - 1),
        st.integers(0, 255),
    )
    def test_every_good_one(self, version: int, trace: int, span: int, flags: int) -> None:
        read = read_parent([b"%02x-%032x-%016x-%02x" % (version, trace, span, flags)])
        assert read == b"00-%032x-%016x-%02x" % (trace, span, flags & 3)
        assert (read[TRACE_ID], read[PARENT_ID]) == (b"%032x" % trace, b"%016x" % span)
        assert int(read[FLAGS], 16) == flags & 3


def members(number: int, size: int = 0) -> list[bytes]:
    return [b"k%d=%s" % (at, b"v" * max(1, size - len(b"k%d=" % at))) for at in range(number)]


class TestState:
    """W3C Trace Context 3.3 and 4.3."""

    @pytest.mark.parametrize(
        ("values", "read"),
        [
            ([b"a=1"], b"a=1"),
            ([b"a=1,b=2"], b"a=1,b=2"),
            ([b"a=1", b"b=2", b"c=3"], b"a=1,b=2,c=3"),  # several fields are one list
            ([b"a=1 \t,\t b=2"], b"a=1,b=2"),
            ([b"a=1,,b=2", b""], b"a=1,b=2"),  # 3.3.1.1: empty members are allowed
            ([b""], b""),
            ([b" a=1"], b"a=1"),
            ([b"tenant@vendor=x y~!"], b"tenant@vendor=x y~!"),
            ([b"0t@v=1"], b"0t@v=1"),
            ([b"a_-*/0=1"], b"a_-*/0=1"),
        ],
    )
    def test_passed_on(self, values: list[bytes], read: bytes) -> None:
        assert read_state(values) == read

    @pytest.mark.parametrize(
        "value",
        [
            b"a",
            b"a=",
            b"=1",
            b"A=1",
            b"0=1",
            b"a=1,b",
            b"a b=1",
            b"a=b=c",
            b"a=\x7f",
            b"a=\xe9",
            b"a=1\0",
            b"a=1;b=2,a@b@c=1",
            b"@v=1",
            b"t@=1",
            b"t@0v=1",
            b"t@" + b"v" * 15 + b"=1",
            b"t" * 242 + b"@v=1",
            b"k" * 257 + b"=1",
            b"k=" + b"v" * 257,
            b"a=1,b=2,a=3",
        ],
    )
    def test_spoiled_as_a_whole(self, value: bytes) -> None:
        assert read_state([value]) == b""

    def test_members_are_counted(self) -> None:
        assert read_state([b",".join(members(MAX_MEMBERS))]) == b",".join(members(MAX_MEMBERS))
        assert read_state([b",".join(members(MAX_MEMBERS + 1))]) == b""
        assert read_state(members(MAX_MEMBERS + 1)) == b""

    def test_too_many_bytes_take_the_long_ones_first(self) -> None:
        short = members(3, 20)
        long = b"long=" + b"v" * 200
        assert read_state([b",".join([short[0], long, *short[1:]])]) == b",".join(
            [short[0], long, *short[1:]]
        ), "it fits"
        other = b"other=" + b"v" * 250
        assert read_state([b",".join([short[0], other, short[1], long, short[2]])]) == b",".join(
            [short[0], other, *short[1:]]
        ), "the last long one makes room enough"
        last = b"last=" + b"v" * 250
        given = [last, *short, other, long]
        assert read_state([b",".join(given)]) == b",".join([last, *short])

    def test_then_those_at_the_end(self) -> None:
        given = members(8, 100)
        assert read_state([b",".join(given)]) == b",".join(given[:5])

    @given(
        st.lists(st.binary(max_size=200) | st.text("abc=@,1 \t", max_size=100).map(str.encode), max_size=40)
    )
    def test_any_bytes(self, values: list[bytes]) -> None:
        read = read_state(values)
        assert len(read) <= MAX_STATE_BYTES
        assert re.fullmatch(rb"[\x20-\x7e]*", read)
        assert read == b"" or len(read.split(b",")) <= MAX_MEMBERS
        assert read_state([read]) == read, "what is passed on is passed on by the next"

    @given(st.lists(st.integers(1, 255), min_size=1, max_size=MAX_MEMBERS))
    def test_order_is_kept(self, sizes: list[int]) -> None:
        given = [b"k%d=%s" % (at, b"v" * size) for at, size in enumerate(sizes)]
        read = read_state([b",".join(given)]).split(b",")
        kept = iter(given)
        assert all(member in kept for member in read if member)


class TestIds:
    def test_are_valid_and_never_the_same(self) -> None:
        ids = Ids()
        made = [ids.traceparent(ids.make()) for _ in range(1000)]
        assert [read_parent([one]) for one in made] == made
        assert len({one[TRACE_ID] for one in made}) == len({one[PARENT_ID] for one in made}) == 1000

    @pytest.mark.parametrize("bits", [slice(19, 35), slice(21, 35)], ids=["64", "56"])
    def test_who_samples_by_the_trace_id_gets_the_share(self, bits: slice) -> None:
        ids = Ids()
        made = [int(ids.traceparent(ids.make())[bits], 16) for _ in range(1000)]
        below = 2 ** (4 * (bits.stop - bits.start)) // 10
        assert 95 <= sum(one < below for one in made) <= 105
