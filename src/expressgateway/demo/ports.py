"""Where the demo's gateway listens: the usual ports, or free ones where those are taken."""

from __future__ import annotations

import socket
from dataclasses import astuple, dataclass, fields
from typing import Final, Self

__all__ = ["Ports"]

HOST: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the gateway listens, on loopback."""

    http: int = 8080
    https: int = 8443
    tcp: int = 9000
    tls: int = 9443
    udp: int = 9053
    h3: int = 8443
    """UDP, where `https` is TCP."""
    admin: int = 9090

    @classmethod
    def from_base(cls, base: int) -> Self:
        """Consecutive ports from `base` on. Raises ValueError where they would not all be ports."""
        if not 1 <= base <= 65536 - len(fields(cls)):
            raise ValueError(f"{base} is not a port with {len(fields(cls)) - 1} more above it")
        return cls(*range(base, base + len(fields(cls))))

    def with_free_ones(self) -> tuple[Self, list[str]]:
        """The same where nothing listens yet, others where something does, and a sentence for each of
        those.
        """
        chosen, sentences = [], []
        taken = {*astuple(self)}
        for place, port in zip(fields(self), astuple(self), strict=True):
            kind = socket.SOCK_DGRAM if place.name in ("udp", "h3") else socket.SOCK_STREAM
            free = port if port and _is_free(port, kind) else _free_port(kind, taken)
            taken.add(free)
            chosen.append(free)
            if port and free != port:
                sentences.append(f"Port {port} for {place.name} is in use: taking {free} instead.")
        return type(self)(*chosen), sentences


def _is_free(port: int, kind: socket.SocketKind) -> bool:
    with socket.socket(socket.AF_INET, kind) as probe:
        if kind is socket.SOCK_STREAM:
            # Connections of an earlier demo that are still in TIME_WAIT are not in the way.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _free_port(kind: socket.SocketKind, taken: set[int]) -> int:
    while True:
        with socket.socket(socket.AF_INET, kind) as probe:
            probe.bind((HOST, 0))
            port: int = probe.getsockname()[1]
        if port not in taken:
            return port
