"""A supervisor with fake workers as a process of its own, and what a test asks of it.

Nothing here sleeps: a test waits for a line of the log, for an answer, or for the process to end.
"""

import contextlib
import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

from tests.ports import free_port

PATIENCE_S = 60.0
"""A wait that takes longer has failed."""

_HERE = Path(__file__).parent

CONFIG = """
[[listeners]]
name = "web"
address = "127.0.0.1:{web}"
protocol = "h1"
backends = [{{ address = "127.0.0.1:9" }}]
http = {{ server_header = "{whim}" }}
{listener}
{more}
[runtime]
workers = {workers}
readiness_settle_ms = {settle_ms}
drain_timeout_ms = {drain_ms}
{runtime}
[observability]
metrics_bind = "127.0.0.1:{admin}"
{admin_block}
"""


class Gateway:
    """Started on entry, ended on exit. `settings` fill `CONFIG`; `timing` goes to the supervisor."""

    def __init__(
        self,
        directory: Path,
        *,
        timing: dict[str, float] | None = None,
        ready: bool = True,
        **settings: object,
    ) -> None:
        self.path = directory / "gateway.toml"
        self.web = free_port()
        self.admin = free_port()
        self.settings: dict[str, object] = {
            "whim": "x",
            "workers": 1,
            "settle_ms": 0,
            "drain_ms": 2000,
            "listener": "",
            "more": "",
            "runtime": "",
            "admin_block": "",
            **settings,
        }
        self._timing = timing or {}
        self._wants_ready = ready
        self.lines: list[dict[str, Any]] = []
        self.text: list[str] = []
        self.extra_groups: list[int] | None = None
        """Groups to start with, as root."""
        self._queue: queue.Queue[str | None] = queue.Queue()

    def write(self, **settings: object) -> None:
        self.settings |= settings
        self.path.write_text(CONFIG.format(web=self.web, admin=self.admin, **self.settings))

    def __enter__(self) -> Self:
        if not self.path.exists():
            self.write()
        timing = [f"{name}={seconds}" for name, seconds in self._timing.items()]
        self.process = subprocess.Popen(
            [sys.executable, str(_HERE / "fake_supervisor.py"), str(self.path), *timing],
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
            extra_groups=self.extra_groups,
            env={**os.environ, "LB_LOG_FORMAT": "json", "LB_LOG_LEVEL": "info"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            if self._wants_ready:
                self.wait_log("ready in")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        orphans: list[int] = []
        if self.process.poll() is None:
            # A worker that was just being started may outlive it, and would hold the log open for ever.
            self.process.send_signal(signal.SIGSTOP)
            pid = self.process.pid
            orphans = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            self.process.kill()
        self.process.wait(PATIENCE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # also who took over from it
        for orphan in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
        self._reader.join(PATIENCE_S)
        if self.process.stderr is not None:
            self.process.stderr.close()

    def _read(self) -> None:
        if self.process.stderr is not None:
            for line in self.process.stderr:
                self._queue.put(line)
        self._queue.put(None)

    def wait_log(self, part: str) -> dict[str, Any]:
        """The next line of the log that contains `part`, after those already waited for."""
        while (line := self._queue.get(timeout=PATIENCE_S)) is not None:
            self.text.append(line)
            with contextlib.suppress(ValueError):
                entry: dict[str, Any] = json.loads(line)
                self.lines.append(entry)
                if part in entry["message"]:
                    return entry
        raise AssertionError(f"the gateway ended without saying {part!r}:\n{''.join(self.text)}")

    def rest(self) -> str:
        """Everything said until the end of the process."""
        while (line := self._queue.get(timeout=PATIENCE_S)) is not None:
            self.text.append(line)
        return "".join(self.text)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.admin, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def status(self) -> dict[str, Any]:
        code, body = self.get("/api/v1/status")
        assert code == 200, body
        shown: dict[str, Any] = json.loads(body)
        return shown

    def metric(self, sample: str) -> float | None:
        """A value from /metrics by its whole name with labels."""
        _, text = self.get("/metrics")
        for line in text.splitlines():
            name, _, value = line.rpartition(" ")
            if name == sample:
                return float(value)
        return None

    def connect(self) -> "Client":
        return Client(self.web)

    def connect_to(self, index: int) -> "Client":
        """To one of the workers: the kernel chooses, so until it chose that one."""
        pid = self.status()["workers"][index]["pid"]
        for _ in range(500):
            client = self.connect()
            if client.pid == pid:
                return client
            client.close()
        raise AssertionError(f"worker {index} accepts nothing")


class Client:
    """A connection to a fake worker, which has said who it is."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self._lines = self.sock.makefile("r")
        pid, uid, version, census, self.tickets = self._lines.readline().split()
        self.pid = int(pid)
        self.uid = int(uid)
        self.version = int(version)
        self.census = int(census)

    def ask(self, question: str) -> str:
        """One of the questions that a fake worker answers."""
        self.sock.sendall(f"{question}\n".encode())
        return self._lines.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._lines.close()
        self.sock.close()
