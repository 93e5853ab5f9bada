"""A gateway without sockets: a pool, a service, a clock that tests move, and ends of either protocol."""

from collections import deque
from collections.abc import Callable
from typing import Any

from expressgateway.observe.counters import CLASSES, ListenerCounters
from expressgateway.proxy.errors import Reason
from expressgateway.proxy.exchange import Exchange
from expressgateway.proxy.forwarding import Forwarding, Ids, Peer
from expressgateway.proxy.service import HttpService, Timeouts, WebSocketLimits
from expressgateway.upstream.backend import Backend, BackendSettings
from expressgateway.upstream.pool import Pool
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


class World:
    """See the module's text. ``front`` and ``back`` name the protocols of the two sides."""

    def __init__(
        self,
        front: str = "h1",
        back: str = "h1",
        *,
        backends: int = 1,
        timeouts: Timeouts = TIMEOUTS,
        max_body: int = 1 << 20,
        min_bps: int = 0,
        window_s: float = 5.0,
        websocket: WebSocketLimits | None = WEBSOCKET,
        forwarded: str = "x-forwarded",
        via: bool = True,
        alt_svc: str | None = None,
        trusted: bool = False,
        sni: str | None = None,
        scheme: bytes = b"http",
        ip: str = "192.0.2.1",
        is_misdirected: Callable[[str | None, str], bool] | None = None,
    ) -> None:
        self.front_protocol = front
        self.back_protocol = back
        self.clock = Clock()
        self.counters = ListenerCounters("test")
        self.exchanges: list[Exchange] = []
        self.log: list[tuple[str, str, str]] = []
        self._later: deque[Callable[[], Any]] = deque()
        self.sides: list[BackSide] = []
        self.pool = Pool("pool", "round_robin", self._attach)
        found = [(settings(f"b{at}"), ("127.0.0.1", 80 + at), f"b{at}") for at in range(backends)]
        self.pool.replace(found, "round_robin")
        self.peer = Peer(ip, trusted, scheme, sni, (("192.0.2.1", 1), ("192.0.2.2", 80)))
        self.limits = Limits(FieldReader(256), 65536, 16384, websocket is not None)
        self.service = HttpService(
            clock=self.clock,
            wall_s=lambda: WALL_S,
            pool=self.pool,
            forwarding=Forwarding(
                forwarded=forwarded, via=via, server_header="gw", alt_svc=alt_svc, ids=Ids()
            ),
            timeouts=timeouts,
            max_body_bytes=max_body,
            max_requests=0,
            min_body_bps=min_bps,
            min_body_window_s=window_s,
            websocket=websocket,
            counters=self.counters,
            log_security=lambda kind, source, text: self.log.append((kind, source, text)),
            is_misdirected=is_misdirected,
        )

    def _attach(self, backend: Backend) -> None:
        side: BackSide = H1Back(self, backend) if self.back_protocol == "h1" else MemoryBack(self, backend)
        self.sides.append(side)
        backend.connections = side  # type: ignore[assignment]  # each kind of side leases its own streams

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
        exchange = Exchange(self.service, stream, peer)
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
            self.settle()

    @property
    def recorded(self) -> int:
        """Exchanges in the metrics."""
        return sum(map(sum, self.counters.requests))

    def statuses(self) -> dict[str, int]:
        classes = [sum(column) for column in zip(*self.counters.requests, strict=True)]
        return {name: number for name, number in zip(CLASSES, classes, strict=True) if number}

    def check_quiet(self, exchanges: int | None = None) -> None:
        """Everything has ended, was counted once, and left nothing behind."""
        if exchanges is not None:
            assert len(self.exchanges) == exchanges
        assert all(exchange.is_done for exchange in self.exchanges)
        assert self.recorded == len(self.exchanges)
        observed = sum(sum(histogram.counts) for histogram in self.counters.durations)
        assert observed == len(self.exchanges)
        assert [side.backend.in_flight for side in self.sides] == [0] * len(self.sides)
        assert self.counters.websockets_open == 0
        assert all(not side.pending for side in self.sides)

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
