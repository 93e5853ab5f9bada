"""A backend: one address that can be given work, its settings and its counters.

``BackendSettings`` is what the configuration says and never changes. ``Backend`` is the living thing: it
keeps its identity, counters and connections through reloads and re-resolutions while its settings stay.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from expressgateway.observe.counters import Histogram
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
    def has_room(self) -> bool:
        """Whether one more exchange needs no new connection."""

    @property
    def idle(self) -> int: ...
    @property
    def open(self) -> int: ...


class Load:
    """What is under way on all backends of a pool together, those that are leaving included."""

    __slots__ = ("in_flight", "open")

    def __init__(self) -> None:
        self.in_flight = 0
        self.open = 0


class Backend:
    """One address of a pool."""

    __slots__ = (
        "address",
        "bad",
        "busy",
        "cause",
        "connect_durations",
        "connect_failures",
        "connections",
        "durations",
        "good",
        "head_durations",
        "id",
        "in_flight",
        "is_available",
        "is_down",
        "is_draining",
        "leases",
        "load",
        "on_freed",
        "on_load",
        "open",
        "ramp_from",
        "responses",
        "reused",
        "settings",
        "streak",
        "unsolicited",
        "weight",
    )

    def __init__(
        self,
        settings: BackendSettings,
        address: SocketAddress,
        id: str,  # noqa: A002 - what it is called everywhere
        load: Load | None = None,
    ) -> None:
        """``load``: the pool's, to be counted in."""
        self.settings = settings
        self.address = address
        self.id = id
        """Stable: the same after every reload and re-resolution. Never an index."""
        self.weight = settings.weight
        self.connections: Connections | None = None
        # Whether it may be used: decided by the supervisor, kept by the pool
        self.is_available = True
        """Whether new work may go there."""
        self.is_down = False
        """Not available, and not well: what is relayed without an end should go elsewhere."""
        self.is_draining = False
        """Not available, but well: sessions that are bound to it may go on."""
        self.ramp_from = 0.0
        """Since when it is being given more and more work (seconds, monotonic); 0: it has its full share."""
        # Load
        self.load = load if load is not None else Load()
        self.in_flight = 0
        """Exchanges, or relayed connections, under way."""
        self.open = 0
        """Connections open or being opened."""
        self.busy = 0
        """Of them, those that are not idle."""
        self.on_load: Callable[[Backend], None] | None = None
        """Told when ``in_flight`` or ``busy`` has fallen: for policies that go by load. That it has risen
        they see when they look."""
        self.on_freed: Callable[[], None] | None = None
        """Told when there may be room for one more: for pools with limits."""
        # Outcomes since they were last reported to the supervisor
        self.good = 0
        self.bad = 0
        self.streak = 0
        """Failures since the last success."""
        self.cause = ""
        """Of the last failure, as a phrase."""
        # Counters
        self.leases = 0
        self.reused = 0
        self.connect_failures = 0
        self.unsolicited = 0
        """Connections dropped because the backend sent what nobody had asked for."""
        self.responses = [0] * 6
        """By status class; index 0 counts exchanges that failed without a response."""
        self.connect_durations = Histogram()
        """Of connections made, their TLS or QUIC handshake included."""
        self.head_durations = Histogram()
        """From the request on its connection to the head of the answer."""
        self.durations = Histogram()
        """From the choice of this backend to the end of its answer. Sessions are left out."""

    def begin(self) -> None:
        """An exchange, or a relayed connection, goes to this backend."""
        self.in_flight += 1
        self.load.in_flight += 1

    def end(self) -> None:
        """It has left it. Once for each ``begin``."""
        self.in_flight -= 1
        self.load.in_flight -= 1
        if self.on_load is not None:
            self.on_load(self)
        if self.on_freed is not None:
            self.on_freed()

    def opened(self) -> None:
        """A connection is being opened."""
        self.open += 1
        self.busy += 1
        self.load.open += 1

    def rested(self) -> None:
        """A connection is idle from now on."""
        self.busy -= 1
        if self.on_load is not None:
            self.on_load(self)
        if self.on_freed is not None:
            self.on_freed()

    def closed(self) -> None:
        """A connection is gone that was not idle. Once for each ``opened``."""
        self.open -= 1
        self.busy -= 1
        self.load.open -= 1
        if self.on_load is not None:
            self.on_load(self)
        if self.on_freed is not None:
            self.on_freed()

    def resumed(self) -> None:
        """An idle connection is idle no longer: it is in use, or on its way out."""
        self.busy += 1

    def succeeded(self) -> None:
        """An exchange, or a connection, went well."""
        self.good += 1
        self.streak = 0

    def failed(self, cause: str) -> None:
        """An exchange failed by this backend's fault."""
        self.bad += 1
        self.streak += 1
        self.cause = cause

    def __repr__(self) -> str:
        return f"<Backend {self.id} weight={self.weight} in_flight={self.in_flight}>"
