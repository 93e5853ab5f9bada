"""A worker's place, and what it remembers."""

import time
from types import SimpleNamespace

from expressgateway.control.slots import MEMORY, RELOAD, Slot


def living(for_s: float) -> SimpleNamespace:
    return SimpleNamespace(is_alive=True, born=time.monotonic() - for_s)


def test_a_crash_loop_ends_with_a_good_life() -> None:
    slot = Slot(0)
    slot.worker = living(1)  # type: ignore[assignment]  # as much of a worker as it takes
    slot.backoff.pause_s(1)
    assert (slot.deaths_in_a_row, slot.is_crash_looping) == (1, False), "one death is no loop"
    slot.backoff.pause_s(1)
    assert (slot.deaths_in_a_row, slot.is_crash_looping) == (2, True)
    slot.worker = living(31)  # type: ignore[assignment]  # as above
    assert (slot.deaths_in_a_row, slot.is_crash_looping) == (0, False)


def test_counts_go_on_after_a_roll() -> None:
    before, after = Slot(0), Slot(0)
    before.restarts, before.hangs, before.cpu_before_s = 3, 1, 2.5
    before.replacements[MEMORY] = 4
    after.follow(before)
    after.replacements[RELOAD] += 1
    assert (after.restarts, after.hangs, after.cpu_before_s) == (3, 1, 2.5)
    assert (after.replacements, before.replacements[RELOAD]) == ({MEMORY: 4, RELOAD: 1}, 0)
