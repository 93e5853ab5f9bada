"""Where a process is in its code, told by itself even when it does nothing else any more.

A `Sheet` is memory that two processes share: one of them is watched, the other one watches. On `SIGNAL` the
watched one writes there where each of its threads is. Its handler is `faulthandler`'s, which is C and asks
neither the interpreter nor its lock: a loop without end, or a library that does not come back, cannot hold it
up. A process that is stopped, or waits in the kernel for a disk, writes nothing.
"""

import faulthandler
import fcntl
import os
import signal
from typing import Final

SIGNAL: Final = signal.SIGQUIT
MAX_BYTES: Final = 32 * 1024
"""Of a sheet: what is beyond is not written. A line of the log with so much in it fits into a pipe."""

_CUT: Final = "\n... cut here"


class Sheet:
    """See the module's text. Made by who watches, which passes `fd` on."""

    __slots__ = ("fd",)

    def __init__(self) -> None:
        """Raises `OSError`."""
        self.fd = os.memfd_create("stacks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, MAX_BYTES)
        # The size is the bound, and the kernel keeps to it, whoever sends the signal and how often.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)

    def clear(self) -> None:
        """For the next time. The writer begins at its start again: both share one position."""
        os.pwrite(self.fd, bytes(MAX_BYTES), 0)
        os.lseek(self.fd, 0, os.SEEK_SET)

    def read(self) -> str:
        """What was written; empty if nothing was, or after `close`."""
        if self.fd < 0:
            return ""
        data = os.pread(self.fd, MAX_BYTES, 0)
        text = data.partition(b"\0")[0].decode("utf-8", "replace").rstrip()
        return text + _CUT if data[-1:] not in (b"\0", b"") else text

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def tell_on(fd: int) -> None:
    """Have this process write to a sheet whenever `SIGNAL` comes. The descriptor is to stay open."""
    faulthandler.register(SIGNAL, file=fd, all_threads=True, chain=False)
