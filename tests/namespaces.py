"""Network namespaces, entered by threads.

A namespace is entered by a thread (setns(2)): sockets and processes that are made inside stay there, and the
file systems are everybody's, /sys/fs/bpf among them. ``ip netns exec`` would hide that one.
"""

import array
import contextlib
import ctypes
import fcntl
import os
import secrets
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

PATH: Final = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"

_CLONE_NEWNET: Final = 0x40000000

# From linux/ethtool.h: switches of a device, by SIOCETHTOOL.
_SIOCETHTOOL: Final = 0x8946
_TX_CHECKSUMS: Final = 0x17
_TSO: Final = 0x1F
_GSO: Final = 0x24
_GRO: Final = 0x2C

_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceError(OSError):
    """ip(8) refused."""


class Namespace:
    """A network namespace, from ``with`` to its end."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.name = f"eg-{role}-{secrets.token_hex(3)}"
        self.path = Path("/run/netns") / self.name

    def __enter__(self) -> Self:
        _ip("netns", "add", self.name)
        self.ip("link set lo up")
        return self

    def __exit__(self, *_: object) -> None:
        _ip("netns", "del", self.name)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This thread is inside; what it makes there stays there."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _setns(there)
            finally:
                os.close(there)
            try:
                yield
            finally:
                _setns(home)
        finally:
            os.close(home)

    def ip(self, *commands: str) -> None:
        """Commands of ip(8), in one process."""
        _ip("-n", self.name, "-batch", "-", stdin="\n".join(commands))

    def show(self, command: str) -> str:
        """What a command of ip(8) prints."""
        return _ip("-n", self.name, *command.split())

    def sysctl(self, **values: int | str) -> None:
        """Settings below /proc/sys/net; ``__`` stands for a slash."""
        with self.entered():
            for name, value in values.items():
                Path("/proc/sys/net", name.replace("__", "/")).write_text(f"{value}\n")

    def run(self, *command: str, check: bool = True) -> str:
        """A program inside, to its end; gives what it printed on both outputs."""
        with self.entered():
            done = subprocess.run(
                [_program(command[0]), *command[1:]], capture_output=True, timeout=60, check=False
            )
        output = (done.stdout + done.stderr).decode(errors="replace")
        assert not check or done.returncode == 0, f"{command} ended with {done.returncode}:\n{output}"
        return output

    def mac(self, device: str) -> bytes:
        fields = self.show(f"-o link show {device}").split()
        return bytes.fromhex(fields[fields.index("link/ether") + 1].replace(":", ""))

    def ifindex(self, device: str) -> int:
        with self.entered():
            return socket.if_nametoindex(device)

    def wire_like(self, device: str, *, gro: bool) -> None:
        """Packets leave as they would on a wire. ``gro``: programs at the other end may send to it."""
        with self.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for switch, on in ((_TSO, False), (_GSO, False), (_TX_CHECKSUMS, False), (_GRO, gro)):
                value = array.array("I", (switch, on))
                request = struct.pack("16sP", device.encode(), value.buffer_info()[0])
                fcntl.ioctl(sock, _SIOCETHTOOL, request.ljust(40, b"\0"))


def _ip(*arguments: str, stdin: str = "") -> str:
    """Raises `NamespaceError` with what ip(8) says."""
    done = subprocess.run(
        [_program("ip"), *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode != 0:
        raise NamespaceError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _program(name: str) -> str:
    return shutil.which(name, path=PATH) or name
