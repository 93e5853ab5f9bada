"""Logs whose reader goes, sleeps or was never there, and a disk that is full: the gateway serves on."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import (
    PATIENCE_S,
    Backend,
    Client,
    Gateway,
    Steady,
    answer_ok,
    eventually,
    listener,
)
from tests.ports import free_port


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with Backend(answer_ok) as it:
        yield it


def to(path: Path | str) -> str:
    return f"[observability.access_log]\npath = '{path}'\n"


def said(gateway: Gateway, text: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in gateway.log().splitlines() if line.startswith('{"time": ')]
    return [line for line in lines if text in str(line["message"])]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, backend: Backend) -> Iterator[tuple[Gateway, int, str]]:
    """One gateway, its port, and its configuration: each test has its log written elsewhere."""
    port = free_port()
    web = listener(port, backend)
    sweep = "max_keepalive_requests = 0\nwatchdog = { sweep_interval_ms = 200 }"
    with Gateway(tmp_path_factory.mktemp("logs"), web, runtime=sweep) as gateway:
        yield gateway, port, web


class TestAccessLog:
    def fails(self, alone: tuple[Gateway, int, str], path: Path | str, why: str) -> None:
        """Lines are dropped and counted, one sentence says why, and nobody notices."""
        gateway, port, web = alone
        before = len(said(gateway, why))
        dropped = gateway.metric("access_log_dropped_total", reason="error")
        assert gateway.reload(to(path) + web)
        with Steady(port) as steady:
            gateway.wait_metric("access_log_dropped_total", dropped + 100, reason="error")
            served = steady.served
            eventually(lambda: steady.served > served + 50, "it serves on")
        sentences = said(gateway, why)[before:]
        assert len(sentences) == 1, sentences
        assert sentences[0]["level"] == "warning"

    def test_a_device_that_is_full(self, alone: tuple[Gateway, int, str]) -> None:
        self.fails(alone, "/dev/full", "/dev/full cannot be written: No space left on device")

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
    def test_a_disk_that_is_full(self, alone: tuple[Gateway, int, str], tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True, check=False
        )
        if mounted.returncode:
            pytest.skip(f"mount: {mounted.stderr.decode()}")
        try:
            path = disk / "access.log"
            self.fails(alone, path, "No space left on device")
            gateway, port, web = alone
            lines = path.read_bytes().splitlines()
            assert all(json.loads(line)["status"] == 200 for line in lines[:-1]), "what is there is whole"
            # There is room again: so is the log.
            written = gateway.metric("access_log_lines_total")
            path.write_bytes(b"")
            with Steady(port):
                gateway.wait_metric("access_log_lines_total", written + 10)
            assert gateway.reload(web)
            eventually(lambda: not _uses(gateway, disk), "it is left alone")
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)

    def test_a_reader_that_goes(self, alone: tuple[Gateway, int, str], tmp_path: Path) -> None:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        gateway, port, web = alone
        assert gateway.reload(to(fifo) + web)
        with Client(port) as client:
            client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert client.response()[0] == 200
        eventually(lambda: _some(reader), "a line comes")
        os.close(reader)
        with Steady(port):
            gateway.wait_metric("access_log_dropped_total", reason="error")
            eventually(lambda: said(gateway, "fifo cannot be written: Broken pipe"), "it is said")
        assert gateway.reload(web)

    def test_a_reader_that_sleeps(self, alone: tuple[Gateway, int, str], tmp_path: Path) -> None:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
        gateway, port, web = alone
        assert gateway.reload(to(fifo) + web)
        agent = "x" * 3000
        with Steady(port), Client(port) as client:
            for _ in range(40):  # 1 MiB is held
                client.send(f"GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: {agent}\r\n\r\n".encode() * 10)
                for _ in range(10):
                    assert client.response()[0] == 200
            gateway.wait_metric("access_log_dropped_total", reason="full")
            eventually(lambda: said(gateway, "it is not taken as fast as it is written"), "it is said")
            assert gateway.reload(web)
        os.close(reader)

    def test_a_fifo_that_nobody_reads_is_refused(
        self, alone: tuple[Gateway, int, str], tmp_path: Path
    ) -> None:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        gateway, port, web = alone
        with Steady(port):
            assert not gateway.reload(to(fifo) + web)
        assert said(gateway, "nobody reads it; start its reader first")

    def test_a_directory_that_goes(self, alone: tuple[Gateway, int, str], tmp_path: Path) -> None:
        directory = tmp_path / "logs"
        directory.mkdir()
        gateway, port, web = alone
        config = to(directory / "access.log") + web
        assert gateway.reload(config)
        (directory / "access.log").unlink()
        directory.rmdir()
        lines = gateway.metric("access_log_lines_total")
        with Steady(port):
            gateway.reload(config)  # also the order to open it again
            assert said(gateway, "create its directory")
            gateway.wait_metric("access_log_lines_total", lines + 10)  # the one that is still open
            eventually(lambda: said(gateway, "cannot be opened: No such file"), "it is said")
            directory.mkdir()
            gateway.reload(config)
            eventually(lambda: (directory / "access.log").stat().st_size > 0, "it is written there again")


def _some(reader: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        return bool(os.read(reader, 65536))
    return False


def _uses(gateway: Gateway, directory: Path) -> bool:
    """Whether a worker has a file open there."""
    for pid in gateway.worker_pids():
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(directory) in str(fd.readlink()):
                    return True
    return False


class Piped(Gateway):
    """A gateway that logs to a pipe: its reader is the test."""

    stdout: int
    stderr: int

    def __enter__(self) -> "Piped":
        self.stdout, out = os.pipe()
        self.stderr, error = os.pipe()
        fcntl.fcntl(error, fcntl.F_SETPIPE_SZ, 4096)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "expressgateway", str(self.path)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=error,
            env=self.environment,
        )
        os.close(out)
        os.close(error)
        eventually(self._is_ready, "the gateway is ready")
        return self

    def log(self) -> str:
        return ""


def malformed(port: int, source: str) -> None:
    """A request that is worth a line of the log."""
    with Client(port, source=source) as client:
        client.send(b"GET /%2e%2e/ HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.response()[0] == 400


class TestPipes:
    def test_readers_that_go(self, tmp_path: Path, backend: Backend) -> None:
        port = free_port()
        web = to("stdout") + listener(port, backend)
        with Piped(tmp_path, web, workers=2, runtime="max_keepalive_requests = 0") as gateway:
            os.close(gateway.stdout)
            os.close(gateway.stderr)
            with Steady(port):
                for number in range(1, 20):
                    malformed(port, f"127.0.0.{number}")
                gateway.wait_metric("access_log_dropped_total", 20, reason="error")
                assert gateway.reload(web + "[listeners.http]\nvia = false\n")
                assert not gateway.reload("nonsense")
            os.kill(gateway.worker_pids()[0], signal.SIGKILL)
            gateway.wait_metric("worker_restarts_total")
            gateway.wait_metric("worker_up", 2)
            gateway.process.send_signal(signal.SIGTERM)
            assert gateway.process.wait(PATIENCE_S) == 0

    def test_a_reader_that_sleeps(self, tmp_path: Path, backend: Backend) -> None:
        port = free_port()
        with Piped(tmp_path, listener(port, backend), runtime="max_keepalive_requests = 0") as gateway:
            with Steady(port):
                for number in range(1, 60):  # three times what the pipe holds
                    malformed(port, f"127.0.0.{number}")
                assert gateway.reload(listener(port, backend, "http = { via = false }"))
            # Once it wakes it hears what it missed, and what comes then.
            text = _some_text(gateway.stderr)
            malformed(port, "127.0.1.1")
            eventually(lambda: _hears(gateway.stderr, "lines of this log were lost"), "it is told")
            os.close(gateway.stdout)
            os.close(gateway.stderr)
            assert all(json.loads(line) for line in text.splitlines())


def _some_text(fd: int) -> str:
    return os.read(fd, 65536).decode()


def _hears(fd: int, text: str) -> bool:
    return text in _some_text(fd)
