"""A service manager as the gateway sees systemd: it passes sockets, listens, and keeps descriptors."""

import array
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from tests.e2e.harness import PATIENCE_S, Gateway, eventually

_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred

# Puts the given descriptors in a row from 3 on, and becomes the gateway: LISTEN_PID is to be its own number.
_LAUNCHER: Final = """
import fcntl, os, sys
fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1].split(",") if fd]
for number, fd in enumerate(fds, 3):
    os.dup2(fd, number)
os.environ["LISTEN_PID"] = os.environ["WATCHDOG_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, slots=True)
class Said:
    """A message."""

    pid: int
    """Whose it is."""
    lines: tuple[str, ...]

    def value(self, name: str) -> str | None:
        return next((line.partition("=")[2] for line in self.lines if line.startswith(f"{name}=")), None)


class Systemd:
    """See the module's text. A context manager."""

    def __init__(self, directory: Path) -> None:
        self.address = str(directory / "notify")
        self.said: list[Said] = []
        self.store: dict[str, int] = {}
        """Descriptors by FDNAME."""
        self.stored = 0
        """How often one was sent."""
        self.faults: list[str] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(self.address)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", self.address)
        self._thread.join(PATIENCE_S)
        self._sock.close()
        for fd in self.store.values():
            os.close(fd)
        if kind is None:
            assert not self.faults

    def _read(self) -> None:
        rights = array.array("i")
        space = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(16 * rights.itemsize)
        while True:
            data, ancillary, _, _ = self._sock.recvmsg(4096, space)
            if not data:
                return
            pid, fds = 0, array.array("i")
            for _, kind, value in ancillary:
                if kind == socket.SCM_RIGHTS:
                    fds.frombytes(value)
                elif kind == socket.SCM_CREDENTIALS:
                    pid = _CREDENTIALS.unpack(value)[0]
            said = Said(pid, tuple(data.decode().split("\n")))
            self._keep(said, list(fds))
            self.said.append(said)

    def _keep(self, said: Said, fds: list[int]) -> None:
        name = said.value("FDNAME") or ""
        if "FDSTOREREMOVE=1" in said.lines:
            with contextlib.suppress(KeyError):
                os.close(self.store.pop(name))
        for fd in fds:
            self.stored += 1
            if name in self.store or inode(fd) in map(inode, self.store.values()):
                # systemd would close it, and go on with what it has.
                self.faults.append(f"{name} is stored twice")
                os.close(fd)
            else:
                self.store[name] = fd

    # -- what was said

    def count(self, *lines: str, since: int = 0) -> int:
        """Messages with these lines, after the first `since` ones."""
        return sum(set(lines) <= set(said.lines) for said in self.said[since:])

    def wait(self, *lines: str, since: int = 0) -> Said:
        """The first message with these lines, after the first `since` ones."""
        eventually(lambda: self.count(*lines, since=since), f"it says {lines}")
        return next(said for said in self.said[since:] if set(lines) <= set(said.lines))


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


class Unit(Gateway):
    """A gateway that systemd starts. Entered, it has said that it is ready; nobody has asked it anything."""

    def __init__(
        self,
        systemd: Systemd,
        directory: Path,
        config: str,
        *,
        fds: Sequence[int] = (),
        names: Sequence[str] = (),
        keeps: bool = False,
        watchdog_s: float = 0.0,
        workers: int = 1,
        runtime: str = "",
    ) -> None:
        super().__init__(directory, config, workers=workers, runtime=runtime)
        self.systemd = systemd
        self.fds = list(fds)
        self._command = (sys.executable, "-m", "expressgateway", str(self.path))
        self.environment["NOTIFY_SOCKET"] = systemd.address
        self.environment["LISTEN_FDS"] = str(len(self.fds))
        self.environment["LISTEN_FDNAMES"] = ":".join(names or ["expressgateway.socket"] * len(self.fds))
        if keeps:
            self.environment["EXPRESSGATEWAY_FDSTORE"] = "1"
        if watchdog_s:
            self.environment["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))

    def __enter__(self) -> Self:
        self.begin()
        try:
            self.wait_ready()
        except BaseException:
            self.abandon()
            raise
        return self

    def begin(self) -> None:
        self._since = len(self.systemd.said)
        with self.log_path.open("ab") as log:
            fds = ",".join(map(str, self.fds))
            self.process = subprocess.Popen(
                [sys.executable, "-c", _LAUNCHER, fds, *self._command],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                pass_fds=self.fds,
            )

    def wait_ready(self) -> None:
        def is_ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"the gateway ended: {self.log()}")
            return bool(self.systemd.count("READY=1", since=self._since))

        eventually(is_ready, "it says READY=1")

    def again(self) -> None:
        """The next process, with the descriptors that were kept, newest first."""
        assert self.process.poll() is not None
        self.fds = list(reversed(self.systemd.store.values()))
        self.environment["LISTEN_FDS"] = str(len(self.fds))
        self.environment["LISTEN_FDNAMES"] = ":".join(reversed(self.systemd.store))
        self.begin()

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE_S) == 0


def is_over(pid: int) -> bool:
    """Whether a process that is not our child has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
