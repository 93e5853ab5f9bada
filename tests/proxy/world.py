"""A gateway without sockets: a pool, a service, a clock that tests move, and ends of either protocol."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from expressgateway.observe.counters import CLASSES, ListenerCounters
from expressgateway.observe.spans import ExchangeSpan, Spans, decode
from expressgateway.proxy.errors import Reason
from expressgateway.proxy.exchange import Exchange
from expressgateway.proxy.forwarding import Forwarding, Peer
from expressgateway.proxy.mirror import Mirrors
from expressgateway.proxy.route import KeyOf, RetryPolicy, Route, SessionCookie, Target, Timeouts
from expressgateway.proxy.routing import Match, RouteTable
from expressgateway.proxy.service import GrpcRules, HttpService, WebSocketLimits
from expressgateway.proxy.trace_context import Ids
from expressgateway.proxy.traced import TracedForwarding, open_exchange
from expressgateway.proxy.tracer import Tracer
from expressgateway.upstream.backend import Backend, BackendSettings
from expressgateway.upstream.discovery import Found
from expressgateway.upstream.limits import Limits as PoolLimits
from expressgateway.upstream.pool import Pool, PoolSettings
from expressgateway.wire.h1.fields import FieldReader
from expressgateway.wire.h1.server import Limits
from expressgateway.wire.sinks import ServerStream
from tests.proxy.ends import BackSide, ClientEnd, Work
from tests.proxy.h1_ends import H1Back, H1ClientEnd
from tests.proxy.memory import MemoryBack, MemoryClientEnd

PROTOCOLS = ("h1", "memory")
CELLS = [(front, back) for front in PROTOCOLS for back in PROTOCOLS]

WALL_S = 1_700_000_000
TICK_S = 0.25

WEBSOCKET = WebSocketLimits(idle_s=60, max_message_bytes=1000, pings=5, pings_window_s=10, frame_s=30)
TIMEOUTS = Timeouts(header=10, body=30, total=60, head=40, idle=75)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0


def settings(id_: str, weight: int = 1) -> BackendSettings:
    return BackendSettings(
        id=id_, host="127.0.0.1", port=80, protocol="h1", weight=weight, tls=None, send_proxy=None
    )


def found(*ids: str, weights: dict[str, int] | None = None) -> list[Found]:
    """A pool's set: each with an address of its own."""
    known = weights or {}
    return [
        (
            settings(id_, known.get(id_, 1)),
            ("127.0.0.1", 1 + int.from_bytes(id_.encode(), "big") % 60000),
            id_,
        )
        for id_ in ids
    ]


@dataclass
class PoolUse:
    """A pool, and how a route goes to it."""

    settings: PoolSettings = field(default_factory=PoolSettings)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    key_of: KeyOf | None = None
    cookie: SessionCookie | None = None

    @classmethod
    def limited(cls, retry: RetryPolicy | None = None, **limits: Any) -> "PoolUse":
        return cls(PoolSettings(limits=PoolLimits(**limits)), retry or RetryPolicy())


class World:
    """See the module's text. ``front`` and ``back`` name the protocols of the two sides."""

    def __init__(
        self,
        front: str = "h1",
        back: str = "h1",
        *,
        backends: int = 1,
        use: PoolUse | None = None,
        timeouts: Timeouts = TIMEOUTS,
        max_body: int = 1 << 20,
        min_bps: int = 0,
        window_s: float = 5.0,
        websocket: WebSocketLimits | None = WEBSOCKET,
        grpc: GrpcRules | None = None,
        forwarded: str = "x-forwarded",
        via: bool = True,
        alt_svc: str | None = None,
        trusted: bool = False,
        sni: str | None = None,
        scheme: bytes = b"http",
        ip: str = "192.0.2.1",
        is_misdirected: Callable[[str | None, str], bool] | None = None,
        sample: float | None = None,
    ) -> None:
        """``sample``: the share of new traces that are recorded; None: there is no tracing."""
        self.front_protocol = front
        self.back_protocol = back
        self.clock = Clock()
        self.counters = ListenerCounters("test")
        self.exchanges: list[Exchange] = []
        self.log: list[tuple[str, str, str]] = []
        self._later: deque[Callable[[], Any]] = deque()
        self.sides: list[BackSide] = []
        self.pools: list[Pool] = []
        self.timeouts = timeouts
        self.target = self.add_pool("pool", [f"b{at}" for at in range(backends)], use)
        self.pool = self.target.pool
        self.mirrors = Mirrors()
        self.peer = Peer(ip, trusted, scheme, sni, (("192.0.2.1", 1), ("192.0.2.2", 80)))
        self.limits = Limits(FieldReader(256), 65536, 16384, websocket is not None)
        self.spans = Spans()
        tracer = Tracer(self.spans, sample, lambda: WALL_S * 10**9) if sample is not None else None
        fields: dict[str, Any] = {
            "forwarded": forwarded,
            "via": via,
            "server_header": "gw",
            "alt_svc": alt_svc,
            "ids": Ids(),
        }
        self._rules: dict[str, Any] = {
            "clock": self.clock,
            "wall_s": lambda: WALL_S,
            "default": Route("default", self.counters.route("default"), timeouts, target=self.target),
            "routes": None,
            "mirrors": self.mirrors,
            "forwarding": Forwarding(**fields) if tracer is None else TracedForwarding(tracer, **fields),
            "timeouts": timeouts,
            "max_body_bytes": max_body,
            "max_requests": 0,
            "min_body_bps": min_bps,
            "min_body_window_s": window_s,
            "websocket": websocket,
            "counters": self.counters,
            "log_security": lambda kind, source, text: self.log.append((kind, source, text)),
            "is_misdirected": is_misdirected,
            "grpc": grpc,
            "tracer": tracer,
        }
        self.service = HttpService(**self._rules)

    # -- what there is besides one pool ----------------------------------------------------------------

    def add_pool(self, name: str, ids: list[str], use: PoolUse | None = None) -> Target:
        use = use or PoolUse()
        pool = Pool(name, self._attach, self.clock, self.later)
        self.pools.append(pool)
        pool.replace(found(*ids), use.settings)
        self.settle()  # tables that are built in steps
        return Target(pool, use.retry, use.key_of, use.cookie)

    def reload(self, **changes: Any) -> None:
        """Another service for the exchanges to come."""
        self._rules |= changes
        self.service = HttpService(**self._rules)

    def route(self, name: str, timeouts: Timeouts | None = None, **what: Any) -> Route:
        """A route of this world's listener. Its target is the world's, if ``what`` does not say otherwise."""
        if not what.keys() & {"target", "split", "answer"}:
            what["target"] = self.target
        return Route(name, self.counters.route(name), timeouts or self.timeouts, **what)

    def route_by(
        self, prefix: str = "/", name: str = "r", timeouts: Timeouts | None = None, **what: Any
    ) -> None:
        """From now on one route, for a prefix of the path."""
        route = self.route(name, timeouts, **what)
        self.reload(routes=RouteTable([(Match.of(path_prefix=prefix), route)]))

    def default_to(self, target: Target | None) -> None:
        """Where what no route matches goes: nowhere, or to a target."""
        self.reload(default=self.route("default", target=target))

    def change(self, *ids: str, weights: dict[str, int] | None = None, **changes: Any) -> None:
        """Another set for the world's pool, and other settings if any are named."""
        self.pool.replace(found(*ids, weights=weights), replace(self.pool.settings, **changes))
        self.settle()

    def side_of(self, id_: str) -> BackSide:
        """The newest backend of that name."""
        return next(side for side in reversed(self.sides) if side.backend.id == id_)

    def _attach(self, backend: Backend) -> None:
        side: BackSide = H1Back(self, backend) if self.back_protocol == "h1" else MemoryBack(self, backend)
        self.sides.append(side)
        backend.connections = side  # type: ignore[assignment]  # each kind of side leases its own streams

    def told(self) -> list[ExchangeSpan]:
        """What was recorded since the last time."""
        said: list[dict[str, Any]] = []
        self.spans.tell = said.append
        self.spans.flush()
        lines = "".join(message["lines"] for message in said).encode().splitlines()
        spans = [decode(line) for line in lines]
        assert sum(message["number"] for message in said) == sum(span.spans for span in spans)
        return spans

    # -- Settling --------------------------------------------------------------------------------------

    def later(self, call: Callable[[], Any]) -> None:
        self._later.append(call)

    def settle(self) -> None:
        for _ in range(10_000):
            if not self._later:
                return
            self._later.popleft()()
        raise AssertionError("never settles")

    def new_exchange(self, stream: ServerStream, peer: Peer) -> Exchange:
        exchange = open_exchange(self.service, stream, peer)
        self.exchanges.append(exchange)
        return exchange

    # -- what the tests use ----------------------------------------------------------------------------

    def client(self) -> ClientEnd:
        """A client with a connection, or a stream, of its own."""
        if self.front_protocol == "h1":
            return H1ClientEnd(self, self.limits, self.peer)
        return MemoryClientEnd(self, self.peer)

    def h1_client(self) -> H1ClientEnd:
        return H1ClientEnd(self, self.limits, self.peer)

    @property
    def side(self) -> BackSide:
        return self.sides[0]

    @property
    def work(self) -> Work:
        return self.side.work

    def advance(self, seconds: float) -> None:
        """Time passes; the sweep runs as it goes."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now = min(end, self.clock.now + TICK_S)
            for exchange in self.exchanges:
                exchange.sweep(self.clock.now)
            for pool in self.pools:
                pool.sweep(self.clock.now)
            self.mirrors.sweep(self.clock.now)
            self.settle()

    def recorded_by(self, route: str) -> int:
        """Exchanges in the metrics of one route."""
        return sum(map(sum, self.counters.route(route).requests))

    @property
    def recorded(self) -> int:
        """Exchanges in the metrics."""
        return sum(map(self.recorded_by, self.counters.routes))

    def statuses(self) -> dict[str, int]:
        rows = [row for route in self.counters.routes.values() for row in route.requests]
        classes = [sum(column) for column in zip(*rows, strict=True)]
        return {name: number for name, number in zip(CLASSES, classes, strict=True) if number}

    @property
    def works(self) -> list[Work]:
        """What all backends have seen, backend by backend."""
        return [work for side in self.sides for work in side.works]

    def outcomes(self) -> dict[str, list[int | str]]:
        """What the supervisor would hear of the world's pool now."""
        return self.pool.take_outcomes()

    def check_quiet(self, exchanges: int | None = None) -> None:
        """Everything has ended, was counted once, and left nothing behind."""
        if exchanges is not None:
            assert len(self.exchanges) == exchanges
        assert all(exchange.is_done for exchange in self.exchanges)
        assert self.recorded == len(self.exchanges)
        durations = [each for route in self.counters.routes.values() for each in route.durations]
        assert sum(sum(histogram.counts) for histogram in durations) == len(self.exchanges)
        assert [side.backend.in_flight for side in self.sides] == [0] * len(self.sides)
        assert self.counters.websockets_open == 0
        assert all(not side.pending for side in self.sides)
        assert len(self.mirrors) == 0
        for side in self.sides:
            assert side.backend.open == side.open == side.idle, f"{side.backend.id} leaks connections"
        for pool in self.pools:
            assert len(pool.queue) == 0
            assert pool.load.in_flight == 0
            assert pool.load.open == sum(s.open for s in self.sides if s.backend.load is pool.load)

    def check_refused(self, client: ClientEnd, reason: Reason, status: int, error: str) -> None:
        """The gateway answered by itself, whole, and counted why."""
        assert client.status == status
        assert client.is_complete
        assert not client.is_cut
        assert client.header(b"proxy-status") is not None
        assert (client.header(b"proxy-status") or b"").startswith(
            b"gw; error=" + error.encode() + b"; details="
        )
        assert client.header(b"content-type") == b"text/plain; charset=utf-8"
        request_id = client.header(b"x-request-id")
        assert request_id
        assert request_id in client.body
        assert client.header(b"content-length") == b"%d" % len(client.body)
        assert (client.header(b"retry-after") is not None) == (status == 503)
        assert self.counters.errors == {reason.value: 1}
