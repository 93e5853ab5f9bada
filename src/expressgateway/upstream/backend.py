"""A backend: one address that can be given work, its settings and its counters.

``BackendSettings`` is what the configuration says and never changes. ``Backend`` is the living thing: it
keeps its identity, counters and connections through reloads and re-resolutions while its settings stay.
"""

from dataclasses import dataclass
from typing import Protocol

from expressgateway.upstream.errors import UpstreamError
from expressgateway.wire.sinks import ClientStream, ResponseSink

SocketAddress = tuple[str, int] | tuple[str, int, int, int]


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """TLS to a backend. Contents, not paths: workers cannot read an operator's files."""

    verify_peer: bool
    hostname: str
    ca_pem: bytes | None
    cert_pem: bytes | None
    key_pem: bytes | None


@dataclass(frozen=True, slots=True)
class BackendSettings:
    """One ``[[backends]]`` entry after its defaults were filled in."""

    id: str
    host: str
    port: int
    protocol: str
    weight: int
    tls: TlsSettings | None
    send_proxy: str | None


Addresses = tuple[tuple[str, int], tuple[str, int]]
"""A client's address and the one it connected to, as PROXY headers tell them."""


class Waiter(ResponseSink, Protocol):
    """Who asked for a connection. Gets exactly one of the two calls, unless it cancels."""

    @property
    def addresses(self) -> Addresses | None: ...

    def on_leased(self, stream: ClientStream) -> None: ...
    def on_lease_failed(self, error: UpstreamError) -> None: ...


class Connections(Protocol):
    """A backend's connections, in the way of its protocol: a stack for HTTP/1, few shared ones later."""

    def lease(self, waiter: Waiter, fresh: bool = False) -> ClientStream | None:
        """A stream for one exchange, at once if a connection is at hand; else one of the waiter's calls
        follows, never from inside this one. ``fresh``: on a connection that was never used before."""

    def cancel(self, waiter: Waiter) -> None:
        """The waiter gave up. Idempotent; no call to it follows."""

    def sweep(self, now: float) -> None:
        """Close what has been idle too long, fail what takes too long to connect."""

    def close_idle(self) -> None:
        """The backend leaves: idle connections go now, others when their exchanges end."""

    @property
    def idle(self) -> int: ...
    @property
    def open(self) -> int: ...


class Backend:
    """One address of a pool."""

    __slots__ = (
        "address",
        "connect_failures",
        "connections",
        "id",
        "in_flight",
        "is_available",
        "leases",
        "responses",
        "reused",
        "settings",
        "unsolicited",
        "weight",
    )

    def __init__(self, settings: BackendSettings, address: SocketAddress, id: str) -> None:  # noqa: A002
        self.settings = settings
        self.address = address
        self.id = id
        """Stable: the same after every reload and re-resolution. Never an index."""
        self.weight = settings.weight
        self.connections: Connections | None = None
        self.is_available = True
        """Whether new work may go there."""
        # Counters
        self.in_flight = 0
        """Exchanges, or relayed connections, under way."""
        self.leases = 0
        self.reused = 0
        self.connect_failures = 0
        self.unsolicited = 0
        """Connections dropped because the backend sent what nobody had asked for."""
        self.responses = [0] * 6
        """By status class; index 0 counts exchanges that failed without a response."""

    def __repr__(self) -> str:
        return f"<Backend {self.id} weight={self.weight} in_flight={self.in_flight}>"
