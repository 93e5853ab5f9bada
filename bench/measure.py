"""What a program costs: CPU time and memory of a process tree, and the cores it may use.

CPU time comes from the kernel's per-process CPU clock, in nanoseconds, which also counts threads that have
ended; the counters in /proc move in ticks of 4 to 10 ms and would be the noise of a one-second run. Memory is
the proportional set size (PSS): pages shared by several workers count once. Nothing here knows what the
program is.
"""

import contextlib
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

CPUCLOCK_SCHED = 2
"""The kind of per-process clock that counts user plus system time exactly (clock_getcpuclockid(3))."""


class TreeChangedError(Exception):
    """A process of the tree came or went between two readings: its CPU time is lost, so is the run."""


@dataclass(frozen=True)
class Cores:
    """Who runs where. `shared` says that load and proxy had to share a core, which a report must say."""

    proxy: frozenset[int]
    load: frozenset[int]

    @property
    def shared(self) -> bool:
        return bool(self.proxy & self.load)


def split_cores(available: set[int]) -> Cores:
    """The first core is the proxy's; the load generator and the backend have all the others."""
    first, *rest = sorted(available)
    return Cores(frozenset({first}), frozenset(rest or {first}))


@contextlib.contextmanager
def running_on(cores: frozenset[int]) -> Iterator[None]:
    """What is started inside inherits these cores; our own come back afterwards."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def tree(root: int) -> list[int]:
    """The process ids of `root` and all its descendants; empty when it has ended."""
    try:
        top = psutil.Process(root)
        if top.status() == psutil.STATUS_ZOMBIE:
            return []
        return [root, *sorted(child.pid for child in top.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def pin(root: int, cores: frozenset[int]) -> None:
    """Moves a running tree to those cores."""
    for pid in tree(root):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(pid, cores)


def process_cpu_s(pid: int) -> float:
    """CPU seconds of one process so far, its ended threads included. Raises OSError when it has ended."""
    return time.clock_gettime((~pid << 3) | CPUCLOCK_SCHED)


@dataclass(frozen=True)
class CpuReading:
    """CPU seconds by process id at one moment."""

    by_pid: dict[int, float]

    @classmethod
    def of(cls, root: int) -> "CpuReading":
        """Raises TreeChangedError when a process ends while we look."""
        try:
            return cls({pid: process_cpu_s(pid) for pid in tree(root)})
        except OSError as error:
            raise TreeChangedError(f"a process of {root} ended while it was measured") from error

    def since(self, before: "CpuReading") -> dict[int, float]:
        """CPU seconds by process between the two. Raises TreeChangedError if the processes changed."""
        if not self.by_pid or self.by_pid.keys() != before.by_pid.keys():
            changed = f"{sorted(before.by_pid)} -> {sorted(self.by_pid)}"
            raise TreeChangedError(f"processes changed during the run: {changed}")
        return {pid: spent - before.by_pid[pid] for pid, spent in self.by_pid.items()}


def parse_pss(smaps_rollup: str) -> int:
    """Bytes of the Pss line of /proc/PID/smaps_rollup; 0 when it is not there (a kernel thread)."""
    for line in smaps_rollup.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def memory_bytes(root: int) -> int:
    """PSS of the tree, or the sum of RSS where the kernel does not say PSS. An ended process is 0."""
    total = 0
    for pid in tree(root):
        try:
            with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
                total += parse_pss(file.read())
        except OSError:
            with contextlib.suppress(psutil.Error):
                total += psutil.Process(pid).memory_info().rss
    return total


def settled_memory_bytes(root: int, *, within: float = 0.02, tries: int = 10, pause_s: float = 0.2) -> int:
    """The memory once two readings `pause_s` apart agree within that share, or the last reading."""
    last = memory_bytes(root)
    for _ in range(tries):
        time.sleep(pause_s)
        now = memory_bytes(root)
        if abs(now - last) <= within * max(last, 1):
            return now
        last = now
    return last


def raise_open_files(wanted: int) -> int:
    """Raises the limit of open files, ours and our children's, as far as allowed; returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted:
        return soft
    for new_soft, new_hard in ((wanted, max(hard, wanted)), (min(wanted, hard), hard)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (new_soft, new_hard))
            return new_soft
    return soft
