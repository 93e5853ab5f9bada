"""The hosts file (hosts(5)), and files that are read again when they have changed.

Knows nothing of DNS. A file that is missing, unreadable or no text has no names in it: that is no error, as
it is none for the C library.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from typing import Final

__all__ = ["HostsFile", "Watched", "as_literal"]

MAX_HOSTS_BYTES: Final = 1 << 20
"""Of a larger hosts file the rest is not read."""

LOOPBACK: Final = ("127.0.0.1", "::1")


def as_literal(host: str) -> str | None:
    """The address in its usual form; ``None`` if this is a name."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return None


class Watched:
    """A file that is read again when it has changed. One stat per question; no request waits for it."""

    __slots__ = ("_stamp", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None

    def has_changed(self) -> bool:
        """Since the last time this was asked; the first time, whether it is there."""
        stamp = None
        with contextlib.suppress(OSError):
            status = os.stat(self.path)
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        changed, self._stamp = stamp != self._stamp, stamp
        return changed


class HostsFile:
    """Names and their addresses, as the file has them now."""

    __slots__ = ("_file", "_hosts")

    def __init__(self, path: str) -> None:
        self._file = Watched(path)
        self._hosts: dict[str, tuple[str, ...]] = {}

    def look_up(self, name: str) -> tuple[str, ...] | None:
        """The addresses of a name (lower case, no dot at its end); ``None`` if it is not in the file."""
        if self._file.has_changed():
            self._hosts = _read(self._file.path)
        addresses = self._hosts.get(name)
        if addresses is None and (name == "localhost" or name.endswith(".localhost")):
            return LOOPBACK  # RFC 6761 6.3: never a question for DNS
        return addresses


def _read(path: str) -> dict[str, tuple[str, ...]]:
    """An address, then its names; a line that is not that is skipped, as the C library does."""
    hosts: dict[str, list[str]] = {}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read(MAX_HOSTS_BYTES).splitlines()
    except OSError:
        return {}
    for line in lines:
        fields = line.partition("#")[0].split()
        address = as_literal(fields[0]) if fields else None
        if address is not None:
            for name in fields[1:]:
                hosts.setdefault(name.lower().removesuffix("."), []).append(address)
    return {name: tuple(addresses) for name, addresses in hosts.items()}
