"""The census: exact alone, never too low together, across processes and deaths."""

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expressgateway.control.census import CELLS, Census, CensusTable


@pytest.fixture(params=[1, 3])
def table(request: pytest.FixtureRequest) -> CensusTable:
    return CensusTable(request.param)


def workers(table: CensusTable, max_inflight: int = 1000, per_ip: int = 1000) -> list[Census]:
    found = [Census(table.fd, index, table.workers) for index in range(table.workers)]
    for worker in found:
        worker.set_limits(max_inflight, per_ip)
    return found


class TestCaps:
    def test_process_cap_over_all_workers(self, table: CensusTable) -> None:
        everyone = workers(table, max_inflight=6)
        for number in range(6):
            assert everyone[number % len(everyone)].enter(f"192.0.2.{number}") is None
        for worker in everyone:
            assert worker.enter("192.0.2.99") == "process_cap"
        assert table.total() == 6
        everyone[0].leave("192.0.2.0")
        assert everyone[-1].enter("192.0.2.99") is None

    def test_address_cap_over_all_workers(self, table: CensusTable) -> None:
        everyone = workers(table, per_ip=6)
        for number in range(6):
            assert everyone[number % len(everyone)].enter("192.0.2.1") is None
        for worker in everyone:
            assert worker.enter("192.0.2.1") == "ip_cap"
            assert worker.enter("192.0.2.2") is None
        everyone[0].leave("192.0.2.1")
        assert everyone[-1].enter("192.0.2.1") is None

    def test_exempt_addresses_are_counted_but_never_refused(self, table: CensusTable) -> None:
        worker = workers(table)[0]
        worker.set_limits(100, 2, {"192.0.2.1"}.__contains__)
        assert [worker.enter("192.0.2.1") for _ in range(5)] == [None] * 5
        assert [worker.enter("192.0.2.2") for _ in range(3)] == [None, None, "ip_cap"]
        assert table.total() == worker.total == 7

    def test_limits_can_change_under_open_connections(self, table: CensusTable) -> None:
        worker = workers(table)[0]
        for _ in range(5):
            worker.enter("192.0.2.1")
        worker.set_limits(100, 3)
        assert worker.enter("192.0.2.1") == "ip_cap"
        worker.set_limits(100, 10)
        assert worker.enter("192.0.2.1") is None

    def test_ipv6_counts_by_64(self, table: CensusTable) -> None:
        worker = workers(table, per_ip=2)[0]
        assert worker.enter("2001:db8::1") is None
        assert worker.enter("2001:db8::ffff:1%eth0") is None
        assert worker.enter("2001:db8:0:0:9::") == "ip_cap"
        assert worker.enter("2001:db8:0:1::1") is None
        worker.leave("2001:db8::2")  # any address of the /64 stands for it
        assert worker.enter("2001:db8::3") is None

    def test_mapped_address_is_the_ipv4_one(self, table: CensusTable) -> None:
        worker = workers(table, per_ip=1)[0]
        assert worker.enter("192.0.2.1") is None
        assert worker.enter("::ffff:192.0.2.1") == "ip_cap"
        assert worker.enter("::ffff:192.0.2.2") is None

    def test_refused_connections_are_not_counted(self, table: CensusTable) -> None:
        worker = workers(table, per_ip=1)[0]
        worker.enter("192.0.2.1")
        for _ in range(100):
            worker.enter("192.0.2.1")
        worker.leave("192.0.2.1")
        assert worker.total == 0
        assert worker._clients == {}

    def test_leaving_without_having_entered_opens_nothing(self, table: CensusTable) -> None:
        worker = workers(table, max_inflight=1)[0]
        worker.leave("192.0.2.1")
        assert worker.enter("192.0.2.1") is None
        assert worker.enter("192.0.2.2") == "process_cap"


class TestSharing:
    def test_never_too_low_with_many_addresses(self) -> None:
        table = CensusTable(2)
        here, there = workers(table, max_inflight=100_000, per_ip=5)
        for number in range(5000):
            there.enter(f"10.1.{number >> 8}.{number & 255}")
        for _ in range(4):
            assert there.enter("192.0.2.1") is None
        assert here.enter("192.0.2.1") is None
        assert here.enter("192.0.2.1") == "ip_cap"

    def test_strangers_are_not_refused_for_others(self) -> None:
        table = CensusTable(2)
        table._map[:32] = bytes(32)  # the same collisions in every run
        here, there = workers(table, max_inflight=100_000, per_ip=4)
        for number in range(30_000):
            there.enter(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
        refused = sum(here.enter(f"10.2.{n >> 8}.{n & 255}") is not None for n in range(4000))
        assert refused == 0  # four strangers in both cells of one address: about 1 in a million

    def test_cells_cannot_be_known_outside(self) -> None:
        cells = {workers(CensusTable(2))[0]._cells("192.0.2.1") for _ in range(8)}
        assert len(cells) > 1

    @given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.booleans()), max_size=200))
    @settings(max_examples=25)
    def test_books_balance(self, moves: list[tuple[int, int, bool]]) -> None:
        table = CensusTable(3)
        everyone = workers(table)
        inside: list[tuple[int, int]] = []
        for worker, client, enters in moves:
            if enters:
                everyone[worker].enter(f"192.0.2.{client}")
                inside.append((worker, client))
            elif (worker, client) in inside:
                everyone[worker].leave(f"192.0.2.{client}")
                inside.remove((worker, client))
        assert table.total() == len(inside)
        for worker, client in inside:
            everyone[worker].leave(f"192.0.2.{client}")
        assert table.total() == 0
        assert not any(bytes(table._map[4096:]))
        table.close()

    def test_dead_worker_is_cleared_alone(self) -> None:
        table = CensusTable(3)
        everyone = workers(table, per_ip=10)
        for worker in everyone:
            for _ in range(3):
                worker.enter("192.0.2.1")
        table.clear(1)
        assert table.total() == 6
        successor = Census(table.fd, 1, 3)
        successor.set_limits(100, 7)
        assert successor.enter("192.0.2.1") is None
        assert successor.enter("192.0.2.1") == "ip_cap"

    def test_two_processes(self) -> None:
        table = CensusTable(2)
        script = (
            "import sys; from expressgateway.control.census import Census;"
            f"c = Census({table.fd}, 1, 2); c.set_limits(100, 4);"
            "print([c.enter('192.0.2.1') for _ in range(3)], flush=True); sys.stdin.read(1);"
            "print(c.enter('192.0.2.1'), flush=True); sys.stdin.read()"
        )
        (mine, _) = workers(table, per_ip=4)
        with subprocess.Popen(
            [sys.executable, "-c", script],
            pass_fds=[table.fd],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as other:
            assert other.stdin is not None
            assert other.stdout is not None
            assert other.stdout.readline() == "[None, None, None]\n"
            assert mine.enter("192.0.2.1") is None
            assert mine.enter("192.0.2.1") == "ip_cap"
            other.stdin.write("x")
            other.stdin.flush()
            assert other.stdout.readline() == "ip_cap\n"
            other.kill()
        assert table.total() == 4
        table.clear(1)
        assert table.total() == 1
        assert mine.enter("192.0.2.1") is None


class TestConstruction:
    def test_other_number_of_workers(self) -> None:
        table = CensusTable(2)
        with pytest.raises(ValueError, match="another number"):
            Census(table.fd, 0, 3)
        with pytest.raises(ValueError, match="no worker 2"):
            Census(table.fd, 2, 2)
        with pytest.raises(ValueError, match="1 to 256"):
            CensusTable(257)

    def test_descriptor_may_be_closed(self) -> None:
        table = CensusTable(1)
        copy = os.dup(table.fd)
        census = Census(copy, 0, 1)
        os.close(copy)
        assert census.enter("192.0.2.1") is None
        assert table.total() == 1

    def test_memory_is_taken_only_as_used(self) -> None:
        table = CensusTable(256)
        before = os.fstat(table.fd).st_blocks
        table.clear(7)
        assert os.fstat(table.fd).st_blocks == before
        assert os.fstat(table.fd).st_size > 256 * CELLS * 8
