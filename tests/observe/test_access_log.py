"""The access log on real files, sick ones too: it loses nothing it need not, and says what it lost."""

import json
import logging
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from expressgateway.observe import access_log
from expressgateway.observe.access_log import AT_ONCE, ATOMIC_BYTES, BATCH_BYTES, AccessLog, open_log
from tests.observe.test_access_log_format import entry

PATIENCE_S = 30.0


def eventually(check: Callable[[], object]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not check():
        assert time.monotonic() < ends, "not in time"
        threading.Event().wait(0.002)


def write(log: AccessLog, *targets: str) -> None:
    for target in targets:
        assert log.wants()
        log.record(entry(target=target.encode()))


def targets(path: Path) -> list[str]:
    return [json.loads(line)["target"] for line in path.read_text().splitlines()]


def samples(log: AccessLog) -> dict[str, Any]:
    return {" ".join((family, *labels)): value for family, labels, value in log.collect()}


def lost(log: AccessLog) -> int:
    return sum(log.dropped().values())


@pytest.fixture
def log() -> Iterator[AccessLog]:
    made = AccessLog()
    yield made
    made.close(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "access.log"
    made.touch()
    return made


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    made = tmp_path / "fifo"
    os.mkfifo(made)
    return made


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "_RETRY_S", 0.01)


class TestFile:
    def test_lines_are_appended_in_order(self, log: AccessLog, path: Path) -> None:
        path.write_text('{"target":"/before"}\n')
        log.configure(str(path))
        write(log, "/1", "/2")
        log.flush()
        write(log, "/3")
        assert log.close(PATIENCE_S) == 0
        assert targets(path) == ["/before", "/1", "/2", "/3"]
        assert samples(log) == {
            "access_log_lines": 3,
            "access_log_errors": 0,
            "access_log_dropped full": 0,
            "access_log_dropped error": 0,
            "access_log_dropped too_long": 0,
            "access_log_dropped closing": 0,
        }

    def test_a_sweep_writes(self, log: AccessLog, path: Path) -> None:
        log.configure(str(path))
        write(log, "/1")
        log.sweep(0.0)
        eventually(lambda: targets(path) == ["/1"])

    def test_a_large_batch_does_not_wait_for_the_sweep(self, log: AccessLog, path: Path) -> None:
        log.configure(str(path))
        write(log, "/small")
        while not log._given_bytes or log._batch:
            write(log, "/" + "x" * 500)
        eventually(lambda: path.stat().st_size >= BATCH_BYTES)
        assert path.stat().st_size < BATCH_BYTES + AT_ONCE * 2000

    def test_off_until_configured_and_when_configured_so(self, log: AccessLog, path: Path) -> None:
        assert not log.wants()
        assert samples(log) == {}
        log.configure(str(path))
        write(log, "/1")
        log.configure(None)
        assert not log.wants()
        eventually(lambda: targets(path) == ["/1"] and log._writer._fd == -1)
        log.configure(str(path))
        write(log, "/2")
        log.close(PATIENCE_S)
        assert targets(path) == ["/1", "/2"]
        assert samples(log)["access_log_lines"] == 2

    def test_a_change_of_path_and_form_takes_effect_between_two_lines(
        self, log: AccessLog, path: Path, tmp_path: Path
    ) -> None:
        other = tmp_path / "other.log"
        other.touch()
        log.configure(str(path))
        write(log, "/1")
        log.configure(str(other))
        write(log, "/2")
        log.configure(str(other), "combined")
        write(log, "/3")
        log.close(PATIENCE_S)
        assert targets(path) == ["/1"]
        json_line, combined_line = other.read_text().splitlines()
        assert json.loads(json_line)["target"] == "/2"
        assert '"GET /3 HTTP/1.1" 200' in combined_line

    def test_long_lines_stay_whole_in_a_file(self, log: AccessLog, path: Path) -> None:
        log.configure(str(path))
        eventually(lambda: log._writer.longest_bytes > ATOMIC_BYTES)
        write(log, "/" + "x" * 30_000, "/2")
        log.close(PATIENCE_S)
        assert [len(target) for target in targets(path)] == [30_001, 2]

    def test_names_without_end_are_no_line(self, log: AccessLog, path: Path) -> None:
        log.configure(str(path))
        log.record(entry(route="x" * 70_000))
        write(log, "/2")
        log.close(PATIENCE_S)
        assert targets(path) == ["/2"]
        assert log.dropped()["too_long"] == 1

    def test_after_the_end(self, log: AccessLog, path: Path) -> None:
        log.configure(str(path))
        log.close(PATIENCE_S)
        assert not log.wants()
        log.record(entry())
        log.configure(str(path))
        log.reopen()
        assert log.close(PATIENCE_S) == 1
        log.sweep(0.0)
        assert log.dropped()["closing"] == 1
        assert not log._writer._thread or not log._writer._thread.is_alive()

    def test_no_descriptor_is_left(self, path: Path) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            log = AccessLog()
            log.configure(str(path))
            log.reopen()
            log.configure("stdout")
            log.configure(str(path))
            assert log.close(PATIENCE_S) == 0
        assert len(os.listdir("/proc/self/fd")) == before


class TestReopen:
    def test_a_file_that_was_moved_away(self, log: AccessLog, path: Path) -> None:
        moved = path.with_suffix(".1")
        log.configure(str(path))
        write(log, "/1")
        log.flush()
        eventually(lambda: targets(path) == ["/1"])
        path.rename(moved)
        path.touch()
        write(log, "/2")
        log.reopen()
        write(log, "/3")
        log.close(PATIENCE_S)
        assert targets(moved) == ["/1", "/2"]
        assert targets(path) == ["/3"]

    def test_the_same_settings_open_nothing(self, log: AccessLog, path: Path) -> None:
        log.configure(str(path))
        write(log, "/1")
        log.flush()
        eventually(lambda: targets(path) == ["/1"])
        moved = path.with_suffix(".1")
        path.rename(moved)
        log.configure(str(path), sample=1.0)
        write(log, "/2")
        log.close(PATIENCE_S)
        assert targets(moved) == ["/1", "/2"]
        assert samples(log)["access_log_errors"] == 0

    @pytest.mark.usefixtures("soon")
    def test_while_it_cannot_be_opened_the_old_one_is_written(self, log: AccessLog, path: Path) -> None:
        moved = path.with_suffix(".1")
        log.configure(str(path))
        eventually(lambda: log._writer._fd >= 0)
        path.rename(moved)
        log.reopen()
        eventually(lambda: log._writer.errors)
        write(log, "/1")
        log.flush()
        eventually(lambda: targets(moved) == ["/1"])
        assert "No such file" in log._writer.failure
        path.touch()
        eventually(lambda: not log._writer.failure)
        write(log, "/2")
        log.close(PATIENCE_S)
        assert targets(path) == ["/2"]
        assert lost(log) == 0

    @pytest.mark.usefixtures("soon")
    def test_the_first_opening_is_tried_again_too(self, log: AccessLog, tmp_path: Path) -> None:
        path = tmp_path / "later.log"
        log.configure(str(path))
        write(log, "/lost")
        log.flush()
        eventually(lambda: log.dropped()["error"] == 1)
        path.touch()
        eventually(lambda: not log._writer.failure)
        write(log, "/kept")
        log.close(PATIENCE_S)
        assert targets(path) == ["/kept"]

    def test_a_stuck_writer_is_given_one_order_only(self, log: AccessLog, fifo: Path) -> None:
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        log.configure(str(fifo))
        for _ in range(1000):
            write(log, "/" + "x" * 1000)
        log.flush()
        queued = log._writer._orders.qsize()
        for _ in range(100):
            log.reopen()
        assert log._writer._orders.qsize() <= queued + 2
        os.close(reader)

    def test_what_cannot_be_a_log(self, tmp_path: Path) -> None:
        for path, reason in (
            (tmp_path, "directory"),
            (tmp_path / "absent", "No such file"),
            (tmp_path / "fifo", "No such device"),
        ):
            if path.name == "fifo":
                os.mkfifo(path)
            with pytest.raises(OSError, match=reason):
                open_log(str(path))
        assert not (tmp_path / "absent").exists()


class TestSample:
    @pytest.mark.parametrize("share", [0.01, 0.25, 0.9])
    def test_share(self, log: AccessLog, share: float) -> None:
        log = AccessLog(random.Random(7).random)
        log.configure("/dev/null", sample=share)
        drawn = 20_000
        taken = sum(log.wants() for _ in range(drawn))
        assert abs(taken - drawn * share) < 4 * math.sqrt(drawn * share * (1 - share))
        log.close(0)

    def test_all_and_none(self, log: AccessLog) -> None:
        log.configure("/dev/null", sample=1.0)
        assert all(log.wants() for _ in range(1000))
        log.configure("/dev/null", sample=0.0)
        assert not any(log.wants() for _ in range(1000))


class TestFailures:
    def sweep(self, log: AccessLog, now: float) -> None:
        """A sweep with something to write, and what became of it."""
        before = log._writer._taken_lines
        write(log, "/x")
        log.flush()
        eventually(lambda: log._writer._taken_lines > before)
        log.sweep(now)

    def test_a_full_disk_is_said_once_and_so_is_its_end(
        self, log: AccessLog, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        log.configure("/dev/full")
        for now in (1.0, 2.0, 3.0):
            self.sweep(log, now)
        assert samples(log)["access_log_dropped error"] == 3
        assert samples(log)["access_log_errors"] == 3
        assert [record.getMessage() for record in caplog.records] == [
            "the access log is failing: /dev/full cannot be written: No space left on device"
        ]
        log.configure(str(path))
        self.sweep(log, 4.0)
        self.sweep(log, 7.9)
        assert len(caplog.records) == 1
        self.sweep(log, 8.1)
        assert [record.getMessage() for record in caplog.records][1:] == [
            "the access log is written again; 3 of its lines were lost"
        ]
        self.sweep(log, 20.0)
        assert len(caplog.records) == 2
        assert targets(path) == ["/x"] * 4

    def test_a_reader_that_went_and_came_back(self, log: AccessLog, fifo: Path) -> None:
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        log.configure(str(fifo))
        self.sweep(log, 1.0)
        assert b'"/x"' in os.read(reader, 4096)
        os.close(reader)
        self.sweep(log, 2.0)
        assert "Broken pipe" in log._writer.failure
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        self.sweep(log, 3.0)
        assert b'"/x"' in os.read(reader, 4096)
        assert not log._writer.failure
        assert (samples(log)["access_log_lines"], lost(log)) == (2, 1)
        os.close(reader)

    def test_a_disk_that_fills_up_in_the_middle_of_a_line(self, path: Path) -> None:
        """In a process of its own: the limit holds for every file it writes."""
        done = subprocess.run(
            [sys.executable, "-c", _FILLED, str(path)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stderr == ""
        assert done.stdout.split() == ["7", "13"]  # written, lost
        lines = path.read_text().splitlines()
        torn = lines.pop(6)
        with pytest.raises(json.JSONDecodeError):
            json.loads(torn)
        # Six whole ones before, what fits of the seventh, and after it what was recorded when there was room.
        assert [json.loads(line)["target"] for line in lines] == [f"/{n}" for n in range(6)] + ["/after"]

    def test_a_file_that_takes_little_at_a_time(
        self, log: AccessLog, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ends, in whole lines and torn ones that stand alone."""
        real = os.write
        log.configure(str(path))
        eventually(lambda: log._writer._fd >= 0)
        fd = log._writer._fd
        length = len(log._form.lines([entry(target=b"/0")])[0])
        monkeypatch.setattr(os, "write", lambda to, data: real(to, data[: length + 9] if to == fd else data))
        write(log, *(f"/{n}" for n in range(5)))
        assert log.close(PATIENCE_S) == 0
        assert lost(log) == 0
        lines = path.read_text().splitlines()
        whole = [json.loads(line)["target"] for line in lines if line.endswith("}")]
        assert whole == [f"/{n}" for n in range(5)]
        assert all(len(line) < 10 for line in lines if not line.endswith("}"))

    def test_a_file_that_takes_less_than_a_line(
        self, log: AccessLog, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.write
        log.configure(str(path))
        eventually(lambda: log._writer._fd >= 0)
        fd = log._writer._fd
        monkeypatch.setattr(os, "write", lambda to, data: real(to, data[:50] if to == fd else data))
        write(log, "/1", "/2")
        assert log.close(PATIENCE_S) == 0
        assert (log.dropped()["error"], samples(log)["access_log_lines"]) == (2, 0)
        assert path.stat().st_size < 200

    def test_a_defect_in_the_writer_stops_nothing(
        self, log: AccessLog, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        log.configure(str(path))
        eventually(lambda: log._writer._fd >= 0)
        with monkeypatch.context() as broken:
            broken.setattr(access_log.Writer, "_piece_end", lambda *_: 1 // 0)
            write(log, "/1")
            log.flush()
            eventually(lambda: log._writer._taken_lines == 1)
        assert "defect" in caplog.text
        write(log, "/2")
        assert log.close(PATIENCE_S) == 0
        assert targets(path) == ["/2"]
        assert log._given_bytes == log._writer.taken_bytes


_FILLED = """
import resource, sys
from expressgateway.observe.access_log import AccessLog
from tests.observe.test_access_log_format import entry
from tests.observe.test_access_log import eventually
log = AccessLog()
log.configure(sys.argv[1])
(line,) = log._form.lines([entry(target=b"/0")])
size = len(line)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (6 * size + 100, hard))
for number in range(10):
    log.record(entry(target=b"/%d" % number))
log.flush()
eventually(lambda: log._writer._taken_lines == 10)
for number in range(9):
    log.record(entry(target=b"/during"))
log.flush()
eventually(lambda: log._writer._taken_lines == 19)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.record(entry(target=b"/after"))
log.close(10)
counts = {family: value for family, labels, value in log.collect() if not labels}
print(counts["access_log_lines"], sum(log.dropped().values()))
"""
