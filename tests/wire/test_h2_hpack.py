"""HPACK's door: both libraries agree, what they do not refuse is refused, and nothing is kept of a bomb."""

import tracemalloc

import hpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expressgateway.wire.h2 import hpack as door
from expressgateway.wire.h2.hpack import (
    HpackDecoder,
    HpackEncoder,
    HpackError,
    OversizedError,
    changes_table,
    walk,
)

MANY = settings(max_examples=300, deadline=None)
NAMES = st.sampled_from([b":method", b":path", b"accept", b"x-a", b"x-b", b"cookie", b"a" * 70])
VALUES = st.sampled_from([b"", b"GET", b"/", b"x", b"y" * 300]) | st.binary(max_size=40)
TRIPLES = st.lists(st.tuples(NAMES, VALUES, st.booleans()), max_size=12)
BOTH = pytest.mark.parametrize("is_native", [True, False] if door.IS_NATIVE else [False])

PIECES = st.sampled_from(
    [
        b"\x82",
        b"\x84",
        b"\xbe",
        b"\x40",
        b"\x01a",
        b"\x01b",
        b"\x00",
        b"\x10",
        b"\x20",
        b"\x3f\xe1\x1f",
        b"\x7f",
        b"\xff",
        b"\x80",
        b"\x83\x49\x50\x9f",
        b"\x85\xf2\xb2\x4a\x84\xff",
        b"\x0f\x2f",
        b"\x41\x8a",
    ]
)
RAW = st.binary(max_size=40) | st.lists(PIECES, max_size=12).map(b"".join)


def test_the_native_one_is_there() -> None:
    assert door.IS_NATIVE


@BOTH
class TestRoundTrips:
    @MANY
    @given(lists=st.lists(TRIPLES, max_size=6))
    def test_what_is_encoded_is_decoded(
        self, is_native: bool, lists: list[list[tuple[bytes, bytes, bool]]]
    ) -> None:
        encoder, decoder, other = (
            HpackEncoder(is_native),
            HpackDecoder(is_native),
            HpackDecoder(not is_native),
        )
        for fields in lists:
            block = encoder.encode(fields)
            read = decoder.decode(block, 2**20)
            assert [each[:2] for each in read] == [each[:2] for each in fields]
            assert other.decode(block, 2**20) == read
            assert decoder.has_changed == changes_table(block)

    def test_secrets_are_literals_that_say_so(self, is_native: bool) -> None:
        encoder = HpackEncoder(is_native)
        for _ in range(2):
            block = encoder.encode([(b"authorization", b"x", True)])
            assert block[0] & 0xF0 == 0x10
            assert not changes_table(block)

    def test_the_peers_table_size_is_heeded(self, is_native: bool) -> None:
        encoder, peer = HpackEncoder(is_native), hpack.Decoder()
        fields = [(b"x-a", b"1", False)]
        encoder.encode(fields)
        for size in (0, 4096, 100_000, 50):
            encoder.set_table_bytes(size)
            block = encoder.encode(fields)
            peer.max_allowed_table_size = max(size, 4096)
            assert peer.decode(block, raw=True)
            assert peer.header_table_size <= min(size, 4096)

    @pytest.mark.parametrize(
        ("sizes", "told"),
        [
            ([4096], b""),
            ([0], b"\x20"),
            ([4096, 0], b"\x20"),
            ([0, 4096], b"\x20\x3f\xe1\x1f"),
            ([100, 0, 50, 4096, 70_000], b"\x20\x3f\xe1\x1f"),
            ([100, 50], b"\x3f\x13"),
        ],
    )
    def test_the_smallest_size_and_the_last(self, is_native: bool, sizes: list[int], told: bytes) -> None:
        """RFC 7541 4.2."""
        encoder = HpackEncoder(is_native)
        for size in sizes:
            encoder.set_table_bytes(size)
        assert encoder.encode([(b":method", b"GET", False)]) == told + b"\x82"
        assert encoder.encode([(b":method", b"GET", False)]) == b"\x82"


class TestDifferential:
    @MANY
    @given(blocks=st.lists(RAW, max_size=4))
    @example(blocks=[b"\x40"])
    @example(blocks=[b"\xff"])
    @example(blocks=[b"\x82\x20"])
    @example(blocks=[b"\x00\x01a\x83\x49\x50\x90"])
    @example(blocks=[b"\x00\x01a\x84\x49\x50\x9f\xff"])
    def test_both_say_the_same(self, blocks: list[bytes]) -> None:
        """Of any bytes; after a refusal neither goes on."""
        rust, python = HpackDecoder(True), HpackDecoder(False)
        for block in blocks:
            outcomes: list[list[tuple[bytes, bytes]] | None] = []
            for decoder in (rust, python):
                try:
                    outcomes.append([(n, v) for n, v, _ in decoder.decode(block, 2**20)])
                except HpackError:
                    outcomes.append(None)
            assert outcomes[0] == outcomes[1]
            if outcomes[0] is None:
                return

    @MANY
    @given(text=st.binary(max_size=80), junk=st.integers(0, 127))
    def test_padding(self, text: bytes, junk: int) -> None:
        """A Huffman string that is read is the one that its text is written as: nothing hides in padding."""
        encode = hpack.Encoder().huffman_coder.encode
        string = bytearray(encode(text)[:120])
        if string:
            string[-1] ^= junk
        block = b"\x00\x01a" + bytes((0x80 | len(string),)) + bytes(string)
        for is_native in (True, False):
            try:
                ((_, read, _),) = HpackDecoder(is_native).decode(block, 2**20)
            except HpackError:
                assert junk
            else:
                assert encode(read) == string

    def test_the_counted_way_is_the_summed_way(self) -> None:
        for text in (b"x" * 100, bytes(range(32, 127)), bytes(range(256)), b"a/b?c=d&e" * 20):
            assert door._code_bits(text) == sum(door._HUFFMAN_BITS[each] for each in text)


class TestRefused:
    @BOTH
    @pytest.mark.parametrize(
        "block",
        [
            b"\x80",
            b"\xbe",
            b"\x40",
            b"\x40\x01",
            b"\x40\x01a",
            b"\x40\x01a\x05",
            b"\xff",
            b"\xff\x80\x80\x80\x80\x80\x80\x01",
            b"\xff\xff\xff\xff\x7f",
            b"\x82\x20",
            b"\x3f\xe2\x1f",
            b"\x7f\x10\x01b",
            b"\x00\x01a\x83\x49\x50\x90",
            b"\x00\x83\x49\x50\x90\x01a",
            b"\x00\x01a\x81\xff",
        ],
    )
    def test_blocks(self, is_native: bool, block: bytes) -> None:
        with pytest.raises(HpackError):
            HpackDecoder(is_native).decode(block, 2**20)


class TestOversized:
    @BOTH
    def test_the_table_is_right_afterwards(self, is_native: bool) -> None:
        encoder, decoder = hpack.Encoder(), HpackDecoder(is_native)
        big = [(b"x-%d" % each, b"v" * 200) for each in range(30)]
        with pytest.raises(OversizedError):
            decoder.decode(encoder.encode(big), 1000)
        again = encoder.encode([(b"x-29", b"v" * 200), (b"x-25", b"v" * 200)])
        assert len(again) == 2
        assert [name for name, _, _ in decoder.decode(again, 1000)] == [b"x-29", b"x-25"]

    @pytest.mark.parametrize(("most", "fits"), [(32 + 2, True), (32 + 1, False)])
    def test_the_bound(self, most: int, fits: bool) -> None:
        for block in (b"\x00\x01a\x01b", b"\x40\x01a\x01b"):
            if fits:
                assert len(HpackDecoder().decode(block, most)) == 1
            else:
                with pytest.raises(OversizedError):
                    HpackDecoder().decode(block, most)
        with pytest.raises(OversizedError):
            HpackDecoder().decode(b"\x82" * 60, 60 * 42 - 1)
        assert len(HpackDecoder().decode(b"\x82" * 60, 60 * 42)) == 60

    @BOTH
    @pytest.mark.parametrize("most", [0, 41, 42, 41 + 43, 42 + 43, 42 + 43 + 299])
    def test_the_beginning_is_told(self, is_native: bool, most: int) -> None:
        """As much of it as is within the limit, in one slice or several."""
        fields = [(b":method", b"GET"), (b":scheme", b"http"), (b"x", b"v" * 300), (b"y", b"z")]
        within = [(42, 1), (42 + 43, 2)]
        for tail in (b"", (b"\x40\x01k" + b"\x7f\xa1\x1e" + b"w" * 4000 + b"\xbe" * 70) * 4):
            block = hpack.Encoder().encode(fields, huffman=False) + tail
            with pytest.raises(OversizedError) as caught:
                HpackDecoder(is_native).decode(block, most)
            count = max((number for size, number in within if most >= size), default=0)
            assert [each[:2] for each in caught.value.fields] == fields[:count]

    @BOTH
    def test_memory(self, is_native: bool) -> None:
        """64 KiB that decode to 260 MB."""
        decoder = HpackDecoder(is_native)
        value = b"y" * 4000
        decoder.decode(hpack.Encoder().encode([(b"x", value)], huffman=False), 2**20)
        tracemalloc.start()
        try:
            with pytest.raises(OversizedError):
                decoder.decode(b"\xbe" * 65_000, 65_536)
            assert tracemalloc.get_traced_memory()[1] < 4_000_000
        finally:
            tracemalloc.stop()
        assert decoder.decode(b"\xbe", 2**20) == [(b"x", value, False)]

    @BOTH
    def test_slices_that_change_the_table(self, is_native: bool) -> None:
        """Nothing of them is kept, and all of them is learnt."""
        big = hpack.Encoder().encode([(b"x", b"y" * 4000)], huffman=False)
        decoder = HpackDecoder(is_native)
        tracemalloc.start()
        try:
            with pytest.raises(OversizedError):
                decoder.decode((big + b"\xbe" * 70) * 16 + b"\x40\x01k\x01v", 65_536)
            assert tracemalloc.get_traced_memory()[1] < 2_000_000
        finally:
            tracemalloc.stop()
        assert decoder.decode(b"\xbe", 2**20) == [(b"k", b"v", False)]

    @pytest.mark.parametrize("block", [b"\x00\x05ab", b"\x00\x01a\x02b", b"\x00\x01a\x83\x49\x50"])
    def test_a_walk_does_not_leave_its_block(self, block: bytes) -> None:
        with pytest.raises(HpackError):
            walk(block)

    def test_slices_end_between_fields(self) -> None:
        block = (b"\xbe" * 40 + b"\x40\x01a\x01b") * 20
        found = walk(block)
        assert len(found.cuts) > 5
        assert found.cuts[-1][0] == len(block)
        assert found.changes
