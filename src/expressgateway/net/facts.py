"""What a client's connection tells of itself to an operator who asks. Nothing is kept for that alone, but the
moment it began."""

from enum import StrEnum
from typing import NamedTuple, Protocol

from expressgateway.proxy.forwarding import Peer


class State(StrEnum):
    OPENING = "opening"
    """Before anything is passed on: a handshake, a first byte to come, a backend that is being looked for."""
    IDLE = "idle"
    ACTIVE = "active"
    CLOSING = "closing"


class Facts(NamedTuple):
    """One connection, or flow, now."""

    protocol: str
    """As it is spoken: ``HTTP/1.1``, ``HTTP/2``, ``HTTP/3``, ``tcp``, ``tls``, ``udp`` or ``quic``."""
    ip: str
    port: int
    began: float
    """By the reactor's clock, in seconds."""
    requests: int | None
    """Exchanges begun on it; None where none can be seen."""
    state: State


class Told(Protocol):
    """A connection or flow that can be asked. It looks at nothing but itself."""

    def facts(self) -> Facts: ...


def of_peer(peer: Peer, protocol: str, requests: int, state: State) -> Facts:
    """Of a client that speaks HTTP."""
    port = peer.addresses[0][1] if peer.addresses is not None else 0
    return Facts(protocol, peer.ip.decode("ascii"), port, peer.began, requests, state)
