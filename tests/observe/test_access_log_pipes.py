"""The access log on FIFOs and pipes that others share or do not read: nothing waits, nothing mixes."""

import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from expressgateway.observe import access_log
from expressgateway.observe.access_log import ATOMIC_BYTES, MAX_HELD_BYTES, AccessLog
from tests.observe.test_access_log import PATIENCE_S, eventually, lost, samples, write
from tests.observe.test_access_log_format import entry


@pytest.fixture
def log() -> Iterator[AccessLog]:
    made = AccessLog()
    yield made
    made.close(0)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    made = tmp_path / "fifo"
    os.mkfifo(made)
    return made


class TestSlowReader:
    def fill(self, log: AccessLog) -> int:
        """Record 8 MiB; how many lines."""
        lines = 8192
        for number in range(lines):
            write(log, f"/{number:06d}" + "x" * 500)
        return lines

    def test_nothing_waits_and_memory_is_bounded(self, log: AccessLog, fifo: Path) -> None:
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        log.configure(str(fifo))
        begun = time.monotonic()
        recorded = self.fill(log)
        assert time.monotonic() - begun < 2.0
        dropped = log.dropped()["full"]
        assert dropped > recorded / 2
        assert log._given_bytes - log._writer.taken_bytes <= MAX_HELD_BYTES + ATOMIC_BYTES
        # What was not dropped is there, whole and in order, once somebody reads.
        chunks: list[bytes] = []

        def drained() -> bool:
            log.flush()
            try:
                chunks.append(os.read(reader, 1 << 20))
            except BlockingIOError:
                pass
            return log._given_bytes == log._writer.taken_bytes

        eventually(drained)
        log.close(PATIENCE_S)
        while chunk := os.read(reader, 1 << 20):
            chunks.append(chunk)
        os.close(reader)
        found = [json.loads(line)["target"] for line in b"".join(chunks).splitlines()]
        assert found == sorted(found)
        assert len(found) == recorded - log.dropped()["full"] == samples(log)["access_log_lines"]

    def test_it_is_said(self, log: AccessLog, fifo: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        log.configure(str(fifo))
        log.sweep(1.0)
        self.fill(log)
        for now in (2.0, 3.0, 6.9):
            log.sweep(now)
        full = log.dropped()["full"]
        log.sweep(7.1)
        assert [record.getMessage() for record in caplog.records] == [
            "the access log is failing: it is not taken as fast as it is written",
            f"the access log is written again; {full} of its lines were lost",
        ]
        os.close(reader)

    def test_a_pipe_that_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Standard output is shared with others, so it cannot be made non-blocking."""
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        monkeypatch.setattr(access_log, "open_log", lambda _: os.dup(writer))
        log = AccessLog()
        log.configure("stdout")
        begun = time.monotonic()
        recorded = self.fill(log)
        assert time.monotonic() - begun < 2.0
        left = log.close(0.05)
        assert time.monotonic() - begun < 3.0
        assert left > 0
        counts = samples(log)
        assert counts["access_log_dropped closing"] == left
        assert counts["access_log_lines"] + left + counts["access_log_dropped full"] == recorded
        os.close(reader)  # lets the thread go
        os.close(writer)
        assert log._writer._thread is not None
        log._writer._thread.join(PATIENCE_S)
        assert not log._writer._thread.is_alive()
        assert log.close(0) == left

    def test_the_end_of_a_fifo_nobody_reads(self, log: AccessLog, fifo: Path) -> None:
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        log.configure(str(fifo))
        self.fill(log)
        begun = time.monotonic()
        left = log.close(0.1)
        assert left > 0
        assert time.monotonic() - begun < 1.0
        thread = log._writer._thread
        assert thread is not None
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        os.close(reader)

    def test_the_end_waits_for_a_reader_that_is_only_late(self, log: AccessLog, fifo: Path) -> None:
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        log.configure(str(fifo))
        eventually(lambda: log._writer._fd >= 0)
        write(log, *("/" + "x" * 2000 for _ in range(100)))
        log.flush()
        got: list[bytes] = []

        def read() -> None:
            os.set_blocking(reader, True)
            while chunk := os.read(reader, 65536):
                got.append(chunk)

        thread = threading.Thread(target=read)
        thread.start()
        assert log.close(PATIENCE_S) == 0
        thread.join(PATIENCE_S)
        os.close(reader)
        assert b"".join(got).count(b"\n") == 100


class TestSharedPipe:
    def test_a_line_too_long_for_one_call_is_cut(self, log: AccessLog, fifo: Path) -> None:
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        log.configure(str(fifo))
        for at in ("target", "user_agent", "referer", "authority", "request_id"):
            log.record(entry(**{at: b"\xff" * 9000}))
        log.record(entry(target=b"/" + b"x" * 3000))
        log.record(entry(**dict.fromkeys(("target", "user_agent", "referer", "authority"), b"\xff" * 9000)))
        log.close(PATIENCE_S)
        data = b""
        while chunk := os.read(reader, 65536):
            data += chunk
        os.close(reader)
        lines = data.splitlines(keepends=True)
        assert len(lines) == 7
        assert all(len(line) <= ATOMIC_BYTES for line in lines)
        assert [json.loads(line).get("cut", False) for line in lines] == [True] * 5 + [False, True]
        assert lost(log) == 0

    def test_a_line_formatted_for_a_file_does_not_reach_a_pipe(
        self, log: AccessLog, fifo: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "access.log"
        path.touch()
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        log.configure(str(path))
        eventually(lambda: log._writer.longest_bytes > ATOMIC_BYTES)
        writer = log._writer
        write(log, "/1", "/" + "x" * 5000, "/3")
        log._write_lines()
        batch = b"".join(log._batch)
        log._batch, log._batch_lines = [], 0
        writer.use(str(fifo))
        writer.put(batch, 3)
        log.close(PATIENCE_S)
        data = os.read(reader, 65536)
        os.close(reader)
        assert [json.loads(line)["target"] for line in data.splitlines()] == ["/1", "/3"]
        assert log.dropped()["too_long"] == 1
        assert samples(log)["access_log_lines"] == 2

    def test_lines_of_two_processes_never_mix(self) -> None:
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)  # full at once: from then on they take turns
        processes = [
            subprocess.Popen([sys.executable, "-c", _CHATTY, name], stdout=writer, stderr=subprocess.PIPE)
            for name in ("a", "b")
        ]
        os.close(writer)
        for process in processes:
            assert process.stderr is not None
            assert process.stderr.read(5) == b"ready"
        # Both have everything in hand and are stuck: nobody has read yet.
        with open(reader, "rb") as file:
            lines = file.read().splitlines()
        for process in processes:
            assert process.wait(PATIENCE_S) == 0
            assert process.stderr is not None
            process.stderr.close()
        seen = [json.loads(line)["target"] for line in lines]
        for name in ("a", "b"):
            assert [target[:6] for target in seen if target[1] == name] == [
                f"/{name}{n:04d}" for n in range(400)
            ]
        changes = sum(one[1] != other[1] for one, other in pairwise(seen))
        assert changes > 1, "they did not write at the same time: nothing was tested"


_CHATTY = """
import random, sys
from expressgateway.observe.access_log import AccessLog
from tests.observe.test_access_log_format import entry
log = AccessLog()
log.configure("stdout")
for number in range(400):
    log.record(entry(target=b"/%s%04d" % (sys.argv[1].encode(), number) + b"x" * random.randrange(3000)))
log.flush()
sys.stderr.write("ready")
sys.stderr.flush()
sys.exit(log.close(10) + sum(log.dropped().values()))
"""
