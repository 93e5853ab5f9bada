"""The BPF file system, where what is in the kernel has names: it stays there when its owner is gone."""

import contextlib
import ctypes
import fcntl
import os
from pathlib import Path
from typing import Final

from expressgateway.l4.xdp.faults import XdpError

USUAL: Final = Path("/sys/fs/bpf")
_MOUNTS: Final = Path("/proc/self/mountinfo")


def file_system_of(path: Path) -> str:
    """The kind of file system that a path is on, or would be."""
    real = Path(os.path.realpath(path))
    best, kind = -1, ""
    for line in _MOUNTS.read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].encode().decode("unicode_escape"))
        if real.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), after.split()[0]
    return kind


def prepare(path: Path) -> None:
    """Have `path` be a directory on a BPF file system. Raises `XdpError`."""
    if file_system_of(path) != "bpf":
        why = ""
        if path.is_relative_to(USUAL):
            why = _mount(USUAL)
        if file_system_of(path) != "bpf":
            raise XdpError(
                f"runtime.xdp_pin_path {path} is not on a BPF file system{why}: "
                f"`mount -t bpf bpf {USUAL}` makes one, and a path below it is the place"
            )
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        dots = " (it takes no names with a dot in them)" if "." in str(path) else ""
        raise XdpError(
            f"runtime.xdp_pin_path {path} cannot be made on the BPF file system: {error.strerror}{dots}"
        ) from None


def _mount(where: Path) -> str:
    """Empty, or why it cannot be done."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not where.is_dir():
        return ", and there is none"
    if libc.mount(b"bpf", os.fsencode(where), b"bpf", 0, None):
        return f", and none can be mounted ({os.strerror(ctypes.get_errno())})"
    return ""


class Lock:
    """Says that somebody looks after a directory. It is given up with the process, however that ends."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def take(self) -> bool:
        """False: another process has it. Idempotent."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def file_name(name: str) -> str:
    """An interface's name as that of a file there."""
    return name.replace("%", "%25").replace(".", "%2e")


def named(file: str) -> str:
    """The other way."""
    return file.replace("%2e", ".").replace("%25", "%")


def remove(path: Path) -> None:
    """Take a directory away, with all that is in it; as far as that can be done."""
    with contextlib.suppress(OSError):
        for each in sorted(path.rglob("*"), reverse=True):
            with contextlib.suppress(OSError):
                each.rmdir() if each.is_dir() else each.unlink()
        path.rmdir()
