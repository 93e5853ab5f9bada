"""What all exchanges of one listener share: a compiled, immutable reading of its configuration.

A reload builds a new ``HttpService`` and swaps the listener's reference; an exchange keeps the one it began
with. Counters and pools live longer than any service and are passed in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from expressgateway.observe.counters import ListenerCounters
from expressgateway.proxy.errors import Reason
from expressgateway.proxy.forwarding import Forwarding, Peer
from expressgateway.proxy.grpc_health import Health
from expressgateway.proxy.mirror import Mirrors
from expressgateway.proxy.paths import PathError, normalise
from expressgateway.proxy.records import Records
from expressgateway.proxy.route import Route, Timeouts
from expressgateway.proxy.routing import RouteTable
from expressgateway.proxy.tracer import Tracer
from expressgateway.wire.head import RequestHead

_MAX_DECIDED: Final = 1024
_MAX_DECIDED_BYTES: Final = 512  # of authority and target together; longer ones are looked up each time


class Clock(Protocol):
    now: float
    """Seconds, monotonic, read once per batch of events."""


@dataclass(frozen=True, slots=True)
class WebSocketLimits:
    idle_s: float
    max_message_bytes: int
    pings: int
    pings_window_s: float
    frame_s: float


@dataclass(slots=True)
class GrpcRules:
    max_deadline_s: int
    health: Health | None
    """None: calls of ``grpc.health.v1.Health`` go to the backends like any other."""


class HttpService:
    """See the module's text."""

    __slots__ = (
        "_decided",
        "clock",
        "counters",
        "default",
        "forwarding",
        "grpc",
        "is_misdirected",
        "log_security",
        "max_body_bytes",
        "max_requests",
        "min_body_bps",
        "min_body_window_s",
        "mirrors",
        "name",
        "proxy_status_name",
        "records",
        "routes",
        "timeouts",
        "tracer",
        "wall_s",
        "websocket",
    )

    def __init__(
        self,
        *,
        clock: Clock,
        wall_s: Callable[[], int],
        default: Route,
        routes: RouteTable[Route] | None,
        mirrors: Mirrors,
        forwarding: Forwarding,
        timeouts: Timeouts,
        max_body_bytes: int,
        max_requests: int,
        min_body_bps: int,
        min_body_window_s: float,
        websocket: WebSocketLimits | None,
        counters: ListenerCounters,
        log_security: Callable[[str, str, str], None],
        is_misdirected: Callable[[str | None, str], bool] | None = None,
        records: Records | None = None,
        grpc: GrpcRules | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """``default``: for what no other route matches; without a target that is nothing, and answered 404.
        ``max_requests``: a connection's budget, 0 = off. ``is_misdirected``: judges SNI against host."""
        self.clock = clock
        self.wall_s = wall_s
        self.default = default
        self.routes = routes
        self._decided: dict[tuple[bytes, bytes], Route] = {}
        """Routes by authority and target, where nothing else decides; starts afresh when full."""
        self.mirrors = mirrors
        self.name = counters.name
        self.forwarding = forwarding
        self.timeouts = timeouts
        self.max_body_bytes = max_body_bytes
        self.max_requests = max_requests
        self.min_body_bps = min_body_bps
        self.min_body_window_s = min_body_window_s
        self.websocket = websocket
        self.counters = counters
        self.log_security = log_security
        self.is_misdirected = is_misdirected
        self.grpc = grpc
        """None: gRPC is HTTP like any other."""
        self.records = records
        """The access log; None: there is none."""
        self.tracer = tracer
        """Who records spans; None: nobody does."""
        self.proxy_status_name = forwarding.name.decode("ascii")

    def succeed(self, before: "HttpService") -> None:
        """Take over what outlives a reload: watches of health go on, and see what is there now."""
        if self.grpc is not None and before.grpc is not None:
            mine, old = self.grpc.health, before.grpc.health
            if mine is not None and old is not None:
                old.pools = mine.pools
                self.grpc.health = old

    def find(self, head: RequestHead) -> Route | None:
        """The most specific route that matches, or the default one; None for a path that no backend should
        see."""
        path = head.path
        if self.routes is not None:
            # fast path: what is asked for again and again
            route = self._decided.get((head.authority, path))
            if route is not None:
                return route
        if b"%" in path or b"/." in path:
            try:
                path = normalise(path)
            except PathError:
                return None
        return self.default if self.routes is None else self._search(self.routes, head, path)

    def _search(self, routes: RouteTable[Route], head: RequestHead, path: bytes) -> Route:
        authority = head.authority
        path = path.partition(b"?")[0]
        route = routes.decided(authority, path)
        if route is None:
            return routes.find(head, path) or self.default
        if len(authority) + len(head.path) <= _MAX_DECIDED_BYTES:
            if len(self._decided) >= _MAX_DECIDED:
                self._decided.clear()
            self._decided[authority, head.path] = route
        return route

    def judge(self, head: RequestHead, peer: Peer) -> Reason | None:
        """Refuse what no backend should see, whatever the protocol it came by."""
        if (
            self.is_misdirected is not None
            and peer.sni is not None
            and self.is_misdirected(peer.sni, head.authority.decode("ascii"))
        ):
            return Reason.MISDIRECTED
        length = head.content_length
        if length is not None and self.max_body_bytes and length > self.max_body_bytes:
            return Reason.BODY_TOO_LARGE
        return None

    @staticmethod
    def path_of(head: RequestHead) -> bytes:
        """The path as routes see it. Raises ``PathError`` for one that ``find`` refuses."""
        return normalise(head.path)

    def security_event(self, kind: str, peer: Peer, message: str) -> None:
        """Count and (rate-limited) log what a client tried."""
        self.counters.security.add(kind)
        self.log_security(kind, peer.ip.decode("ascii"), message)
