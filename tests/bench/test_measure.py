"""CPU clocks, memory and cores."""

import os
import time

import pytest
from bench.measure import (
    CpuReading,
    TreeChangedError,
    parse_pss,
    process_cpu_s,
    running_on,
    split_cores,
    tree,
)
from bench.scaling import compare, scaling_cores
from bench.stats import Sample, summarise


def test_proxy_and_load_have_different_cores() -> None:
    cores = split_cores({3, 1, 2})
    assert (set(cores.proxy), set(cores.load), cores.shared) == ({1}, {2, 3}, False)


def test_one_core_is_shared_and_says_so() -> None:
    assert split_cores({0}).shared


@pytest.mark.parametrize(
    ("available", "proxy", "load"), [({0, 1}, {0, 1}, {0, 1}), ({0, 1, 2, 3}, {0, 1}, {2, 3})]
)
def test_scaling_needs_two_cores_for_the_proxy(available: set[int], proxy: set[int], load: set[int]) -> None:
    cores = scaling_cores(available)
    assert (set(cores.proxy), set(cores.load), cores.shared) == (proxy, load, proxy == load)


def test_cores_come_back() -> None:
    before = os.sched_getaffinity(0)
    one = frozenset({min(before)})
    with running_on(one):
        assert os.sched_getaffinity(0) == one
    assert os.sched_getaffinity(0) == before


def test_the_cpu_clock_agrees_with_the_one_of_this_process() -> None:
    low = time.process_time()
    read = process_cpu_s(os.getpid())
    assert low <= read <= time.process_time()


def test_a_process_that_ended_has_no_clock() -> None:
    with pytest.raises(OSError, match=r"Invalid argument|No such process"):
        process_cpu_s(2**22 + 1)


def test_the_tree_begins_with_its_root() -> None:
    assert tree(os.getpid())[0] == os.getpid()
    assert tree(2**22 + 1) == []


def test_cpu_spent_is_told_by_process() -> None:
    before, after = CpuReading({1: 1.0, 2: 5.0}), CpuReading({1: 1.5, 2: 8.0})
    assert after.since(before) == {1: 0.5, 2: 3.0}


@pytest.mark.parametrize("after", [{1: 1.5}, {1: 1.5, 3: 8.0}, {}])
def test_a_process_that_came_or_went_spoils_the_run(after: dict[int, float]) -> None:
    with pytest.raises(TreeChangedError, match="processes changed"):
        CpuReading(after).since(CpuReading({1: 1.0, 2: 5.0}))


def test_pss_line() -> None:
    assert parse_pss("Rss:  9000 kB\nPss:                1234 kB\nPss_Dirty: 5 kB\n") == 1234 * 1024
    assert parse_pss("") == 0


def test_projection_is_bounded_by_the_busiest_worker() -> None:
    one = summarise([Sample(requests=100, seconds=1, cpu_s=0.002)], bulk=False)
    even = summarise([Sample(requests=120, seconds=1, cpu_s=0.0024, busiest_share=0.5)], bulk=False)
    lopsided = summarise([Sample(requests=120, seconds=1, cpu_s=0.0024, busiest_share=0.8)], bulk=False)
    assert compare(one, even).projection == pytest.approx(2.0)
    assert compare(one, even).throughput == pytest.approx(1.2)
    assert compare(one, lopsided).projection == pytest.approx(1.25)
