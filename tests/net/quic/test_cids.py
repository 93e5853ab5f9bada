"""Host CIDs: the worker comes back, random ones are told apart, and packets show theirs."""

import random
from collections.abc import Callable
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expressgateway.net.quic.cids import CID_BYTES, destination_of, make_cid, worker_of
from expressgateway.net.quic.spares import MAX_WORKERS

VERSIONS: Final = (b"\0\0\0\1", b"\x6b\x33\x43\xcf", b"\x1a\x2a\x3a\x4a")


def long_packet(cid: bytes, version: bytes = VERSIONS[0], payload: bytes = bytes(30)) -> bytes:
    return b"\xc0" + version + bytes((len(cid),)) + cid + b"\x04peer" + payload


def short_packet(cid: bytes, payload: bytes = bytes(30)) -> bytes:
    return b"\x40" + cid + payload


class TestFormat:
    @given(st.integers(0, MAX_WORKERS - 1))
    def test_the_worker_comes_back(self, worker: int) -> None:
        cid = make_cid(worker)
        assert len(cid) == CID_BYTES
        assert worker_of(cid) == worker

    def test_the_bytes(self) -> None:
        cid = make_cid(5)
        first, second, third, fourth = cid[:4]
        assert second == first ^ 5
        assert third == first ^ second ^ 0xA5
        assert fourth == (first + second + third) % 256

    @pytest.mark.parametrize("worker", [-1, 256, 1000])
    def test_there_is_no_such_worker(self, worker: int) -> None:
        with pytest.raises(ValueError, match="range"):
            make_cid(worker)

    def test_no_two_are_alike(self) -> None:
        made = {make_cid(3) for _ in range(10_000)}
        assert len(made) == 10_000
        assert len({cid[4:] for cid in made}) == 10_000
        assert len({cid[:1] for cid in made}) == 256

    @given(st.binary(max_size=40).filter(lambda cid: len(cid) != CID_BYTES))
    def test_others_of_another_length(self, cid: bytes) -> None:
        assert worker_of(cid) is None

    @given(st.integers(0, 255), st.integers(0, 255), st.integers(2, 3), st.integers(1, 255))
    def test_each_byte_of_the_check_counts(self, worker: int, seed: int, at: int, change: int) -> None:
        cid = bytearray(make_cid(worker))
        cid[at] ^= change
        assert worker_of(bytes(cid)) is None

    @given(st.binary(min_size=CID_BYTES, max_size=CID_BYTES))
    def test_what_passes_could_be_ours(self, cid: bytes) -> None:
        worker = worker_of(cid)
        if worker is not None:
            assert cid[1] == cid[0] ^ worker
            assert cid[2] == worker ^ 0xA5

    def test_of_all_first_bytes_one_in_65536_passes(self) -> None:
        """For each of the first two bytes, exactly one pair of the next two: not a matter of luck."""
        tail = bytes(8)
        for first, second in ((0, 0), (0, 255), (255, 0), (255, 255), (17, 200), (128, 127)):
            passing = [
                check
                for check in range(65_536)
                if worker_of(bytes((first, second)) + check.to_bytes(2, "big") + tail) is not None
            ]
            assert len(passing) == 1

    def test_random_ones_seldom_pass(self) -> None:
        source = random.Random(20)
        runs = 1_000_000
        passed = sum(worker_of(source.randbytes(CID_BYTES)) is not None for _ in range(runs))
        assert 3 <= passed <= 35  # 15 are expected


class TestDestination:
    def test_short_header(self) -> None:
        cid = make_cid(1)
        assert destination_of(short_packet(cid)) == cid
        assert destination_of(short_packet(cid, b"")) == cid

    @pytest.mark.parametrize("version", VERSIONS)
    def test_long_header(self, version: bytes) -> None:
        cid = make_cid(1)
        assert destination_of(long_packet(cid, version)) == cid

    @pytest.mark.parametrize("size", [0, 4, 8, 11, 13, 20])
    def test_long_header_of_another_length(self, size: int) -> None:
        assert destination_of(long_packet(bytes(size))) is None

    @pytest.mark.parametrize("make", [short_packet, long_packet])
    def test_cut_short_anywhere(self, make: Callable[..., bytes]) -> None:
        packet = make(make_cid(1), payload=b"")
        assert destination_of(packet) is not None
        for size in range(len(packet)):
            assert destination_of(packet[:size]) is None

    @given(st.binary(max_size=60))
    def test_nothing_raises(self, packet: bytes) -> None:
        found = destination_of(packet)
        assert found is None or len(found) == CID_BYTES
        if found is not None:
            worker_of(found)
