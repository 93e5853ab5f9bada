"""What all exchanges of one listener share: a compiled, immutable reading of its configuration.

A reload builds a new ``HttpService`` and swaps the listener's reference; an exchange keeps the one it began
with. Counters and pools live longer than any service and are passed in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from expressgateway.observe.counters import ListenerCounters
from expressgateway.proxy.errors import Reason
from expressgateway.proxy.forwarding import Forwarding, Peer
from expressgateway.proxy.paths import PathError, normalise
from expressgateway.upstream.pool import Pool
from expressgateway.wire.head import RequestHead


class Clock(Protocol):
    now: float
    """Seconds, monotonic, read once per batch of events."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; 0 is off."""

    header: float
    body: float
    total: float
    head: float
    idle: float


@dataclass(frozen=True, slots=True)
class WebSocketLimits:
    idle_s: float
    max_message_bytes: int
    pings: int
    pings_window_s: float
    frame_s: float


class HttpService:
    """See the module's text."""

    __slots__ = (
        "clock",
        "counters",
        "forwarding",
        "is_misdirected",
        "log_security",
        "max_body_bytes",
        "max_requests",
        "min_body_bps",
        "min_body_window_s",
        "pool",
        "proxy_status_name",
        "timeouts",
        "wall_s",
        "websocket",
    )

    def __init__(
        self,
        *,
        clock: Clock,
        wall_s: Callable[[], int],
        pool: Pool,
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
    ) -> None:
        """``max_requests``: a connection's budget, 0 = off. ``is_misdirected``: judges SNI against host."""
        self.clock = clock
        self.wall_s = wall_s
        self.pool = pool
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
        self.proxy_status_name = forwarding.name.decode("ascii")

    def judge(self, head: RequestHead, peer: Peer) -> Reason | None:
        """Refuse what no backend should see, whatever the protocol it came by."""
        path = head.path
        if b"%" in path or b"/." in path:
            try:
                normalise(path)
            except PathError:
                return Reason.BAD_PATH
        if (
            self.is_misdirected is not None
            and peer.sni is not None
            and self.is_misdirected(peer.sni, head.authority.decode("ascii"))
        ):
            return Reason.MISDIRECTED
        if self.max_body_bytes and (head.content_length or 0) > self.max_body_bytes:
            return Reason.BODY_TOO_LARGE
        return None

    def security_event(self, kind: str, peer: Peer, message: str) -> None:
        """Count and (rate-limited) log what a client tried."""
        self.counters.security.add(kind)
        self.log_security(kind, peer.ip.decode("ascii"), message)
