"""Spare CIDs: what one worker adds all others see, within bounds, and no longer than it lives."""

import mmap
import os
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expressgateway.net.quic import spares
from expressgateway.net.quic.spares import SLOTS, Spares, SpareTable

WORKERS = 3
BLOCKS_PER_PAGE = mmap.PAGESIZE // 512


def blocks(table: SpareTable) -> int:
    """Memory in use, in units of 512 bytes."""
    return os.fstat(table.fd).st_blocks


def workers(table: SpareTable) -> list[Spares]:
    return [Spares(table.fd, index, table.workers) for index in range(table.workers)]


class TestOwners:
    def test_everybody_sees_who_owns_it(self) -> None:
        table = SpareTable(WORKERS)
        everyone = workers(table)
        cids = [os.urandom(12) for _ in range(300)]
        for number, cid in enumerate(cids):
            assert everyone[number % WORKERS].add(cid)
        for number, cid in enumerate(cids):
            assert [one.owner(cid) for one in everyone] == [number % WORKERS] * WORKERS
        assert [one.count for one in everyone] == [100] * WORKERS

    def test_removed_ones_are_nobodys(self) -> None:
        first, second, _ = workers(SpareTable(WORKERS))
        cid, other = os.urandom(12), os.urandom(12)
        first.add(cid)
        first.add(other)
        second.remove(cid)  # not this one's: nothing happens
        assert second.owner(cid) == 0
        first.remove(cid)
        first.remove(cid)
        assert second.owner(cid) is None
        assert second.owner(other) == 0
        assert first.count == 1

    def test_added_twice_is_there_once(self) -> None:
        first, second, _ = workers(SpareTable(WORKERS))
        cid = os.urandom(12)
        assert first.add(cid)
        assert first.add(cid)
        assert first.count == 1
        first.remove(cid)
        assert second.owner(cid) is None

    @pytest.mark.parametrize("cid", [b"", b"x", bytes(7), bytes(8), bytes(12), bytes(20), b"\xff" * 7])
    def test_what_no_spare_can_be(self, cid: bytes) -> None:
        first, *_ = workers(SpareTable(WORKERS))
        assert first.owner(cid) is None

    def test_the_one_key_that_means_empty_is_refused(self) -> None:
        first, *_ = workers(SpareTable(WORKERS))
        assert not first.add(bytes(12))
        first.remove(bytes(12))
        assert (first.count, first.refused) == (0, 1)

    def test_the_last_window_ends_in_the_row(self) -> None:
        first, second, _ = workers(SpareTable(WORKERS))
        last = [b"\xff\xff\xff" + os.urandom(9) for _ in range(spares._WINDOW)]
        assert all(first.add(cid) for cid in last)
        assert [second.owner(cid) for cid in last] == [0] * len(last)
        assert second.add(b"\0\0\0" + os.urandom(9))
        assert second._map[second._row :].count(b"\xff\xff\xff") == 0, "nothing of it is in the next row"

    def test_parts_of_two_keys_are_no_third(self) -> None:
        first, second, _ = workers(SpareTable(WORKERS))
        # Neighbouring slots, both in the window of what follows: one key's end and the next one's beginning.
        one, other = b"\0\0\0\0abcd", b"\0\0\x40\0efgh"
        assert first.add(one)
        assert first.add(other)
        assert second.owner(b"\0abcd\0\0\x40") is None
        assert second.owner(b"\0\0abcd\0\0") is None

    @settings(max_examples=30)
    @given(st.lists(st.tuples(st.sampled_from("ar"), st.integers(0, 1), st.integers(0, 99))))
    def test_like_a_dictionary(self, steps: list[tuple[str, int, int]]) -> None:
        """Keys crowd into two windows and end in zeros, where an empty slot seems to begin too early."""
        everyone = workers(SpareTable(2))
        model: list[set[bytes]] = [set(), set()]
        cids = [bytes((0, 0, number % 3 << 6, 0, 0, number + 1, 0, 0)) for number in range(100)]
        for what, worker, number in steps:
            cid = cids[number]
            if what == "r":
                everyone[worker].remove(cid)
                model[worker].discard(cid)
            elif everyone[worker].add(cid):
                model[worker].add(cid)
            else:
                assert len(model[worker]) >= spares._WINDOW
        for cid in cids:
            expected = next((index for index in (0, 1) if cid in model[index]), None)
            assert everyone[0].owner(cid) == everyone[1].owner(cid) == expected
        assert [one.count for one in everyone] == [len(owned) for owned in model]


class TestBounds:
    def test_a_full_window_refuses_and_counts(self) -> None:
        first, second, _ = workers(SpareTable(WORKERS))
        cids = [b"\x12\x34\x56" + os.urandom(9) for _ in range(spares._WINDOW + 2)]
        assert [first.add(cid) for cid in cids] == [True] * spares._WINDOW + [False] * 2
        assert (first.count, first.refused) == (spares._WINDOW, 2)
        assert [second.owner(cid) for cid in cids] == [0] * spares._WINDOW + [None] * 2
        first.remove(cids[3])
        assert first.add(cids[-1])
        assert second.owner(cids[-1]) == 0

    def test_170_000_fit(self) -> None:
        first, second = workers(SpareTable(2))
        source = random.Random(7)
        cids = [source.randbytes(12) for _ in range(170_000)]
        for cid in cids:
            first.add(cid)
        assert first.count + first.refused == len(cids)
        assert first.refused <= len(cids) / 1000
        found = sum(second.owner(cid) == 0 for cid in cids)
        assert found == first.count
        for cid in cids:
            first.remove(cid)
        assert first.count == 0
        assert first._map[:].count(b"\0") == len(first._map)
        assert all(second.owner(cid) is None for cid in cids[:1000])
        assert SLOTS == 262_144

    @pytest.mark.parametrize("count", [0, 257])
    def test_number_of_workers(self, count: int) -> None:
        with pytest.raises(ValueError, match="1 to 256 workers"):
            SpareTable(count)

    def test_whose_end(self) -> None:
        table = SpareTable(WORKERS)
        with pytest.raises(ValueError, match="no worker 3 of 3"):
            Spares(table.fd, 3, WORKERS)
        with pytest.raises(ValueError, match="another number of workers"):
            Spares(table.fd, 0, WORKERS + 1)


class TestMemory:
    def test_rows_cost_nothing_before_they_are_used_and_after_they_are_cleared(self) -> None:
        table = SpareTable(64)
        assert blocks(table) == 0
        one = Spares(table.fd, 5, 64)
        other = Spares(table.fd, 6, 64)
        cids = [os.urandom(12) for _ in range(2000)]
        nearly_nothing = 64 * BLOCKS_PER_PAGE  # the page with a row's count
        for cid in cids:
            assert other.owner(cid) is None
        assert blocks(table) <= nearly_nothing
        for cid in cids:
            one.add(cid)
            other.owner(cid)
        assert nearly_nothing < blocks(table) <= nearly_nothing + 513 * BLOCKS_PER_PAGE
        table.clear(5)
        # A look into a row without keys would take its pages back.
        assert [other.owner(cid) for cid in cids] == [None] * len(cids)
        assert blocks(table) <= nearly_nothing
        replacement = Spares(table.fd, 5, 64)
        assert replacement.add(cids[0])
        assert other.owner(cids[0]) == 5
        table.close()


class TestProcesses:
    def test_another_process_adds_and_dies(self) -> None:
        table = SpareTable(2)
        mine = Spares(table.fd, 1, 2)
        program = (
            "import sys; from expressgateway.net.quic.spares import Spares\n"
            "spares = Spares(int(sys.argv[1]), 0, 2)\n"
            "spares.add(b'abcdefghijkl')\n"
            "assert spares.owner(b'ABCDEFGHIJKL') == 1"
        )
        mine.add(b"ABCDEFGHIJKL")
        subprocess.run([sys.executable, "-c", program, str(table.fd)], pass_fds=[table.fd], check=True)
        assert mine.owner(b"abcdefghijkl") == 0
        table.clear(0)
        assert mine.owner(b"abcdefghijkl") is None
        assert mine.owner(b"ABCDEFGHIJKL") == 1
        table.close()


@pytest.mark.parametrize("size", [0, 4, 7])
def test_short_ones_are_nobodys(size: int) -> None:
    table = SpareTable(2)
    first, second = workers(table)
    short = b"\1" * size
    assert not first.add(short)
    assert second.owner(short) is None
    first.remove(short)
    assert (first.count, second.owner(b"\1" * 8)) == (0, None)
    table.close()
