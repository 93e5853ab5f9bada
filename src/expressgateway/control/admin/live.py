"""What the dashboard and `expressgateway status` show: one picture of the gateway a second, as JSON.

Everything is worked out here, so that two places that show a number show the same. A *picture* is made in
slices (`rates.Pace`) from counters that do not change meanwhile, and every list in it is cut at a number that
the picture itself tells.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from expressgateway.config.schema import Config
from expressgateway.control.admin import shapes
from expressgateway.control.admin.feed import Feed, event
from expressgateway.control.admin.pool_pictures import MAX_BACKENDS, MAX_POOLS, MAX_ROWS, Traffic, pictures
from expressgateway.control.admin.rates import (
    QUANTILE_WINDOW_S,
    RATE_WINDOW_S,
    Labels,
    Look,
    Looks,
    Pace,
    Span,
    quantiles,
    summed,
    together,
)
from expressgateway.control.admin.xdp_picture import WANTED as XDP_WANTED
from expressgateway.control.admin.xdp_picture import Rates as XdpRates
from expressgateway.control.admin.xdp_picture import xdp_attention, xdp_picture
from expressgateway.control.drain import budget_s, settle_s
from expressgateway.control.health import HealthBoard
from expressgateway.control.ledger import Ledger, Merged
from expressgateway.observe.counters import Sample

MAX_LISTENERS: Final = 64
MAX_ROUTES: Final = 64
MAX_REASONS: Final = 32
HISTORY: Final = 120
"""Points of the curves, one a second."""
STALE_S: Final = 5.0
"""Counters that are older say nothing of now."""
_LOUD_ERRORS: Final = (0.5, 0.2, 0.05)
"""Shares of the requests. Steps, because each change of a sentence is read out to who cannot see it."""
_LOUD_ERRORS_PS: Final = 0.5  # fewer are single ones
EXPIRY_WARNING_S: Final = 14 * 86400.0

WANTED: Final = frozenset(
    {
        "http_requests",
        "http_request_duration_seconds",
        "http_request_bytes",
        "http_response_bytes",
        "http_gateway_errors",
        "relay_bytes",
        "connections",
        "accept_reject",
        "security_events",
        "backend_requests",
        "backend_inflight",
        "backend_retries",
        "worker_rss_bytes",
        "worker_cpu_seconds",
        "worker_loop_lag_seconds",
        "certificate_expiry_timestamp_seconds",
        *XDP_WANTED,
    }
)


class Crew(Protocol):
    """The workers, as far as they are shown."""

    ledger: Ledger
    aborted: dict[str, int]
    """Connections that the drain cut off, by listener."""

    def samples(self) -> Iterable[Sample]:
        """What the supervisor counts of its workers."""
        ...


@dataclass(frozen=True, slots=True)
class Facts:
    """What the supervisor knows at one moment."""

    status: Mapping[str, Any]
    """As `Gateway.status` gives it."""
    config: Config
    crew: Crew | None = None
    board: HealthBoard | None = None
    drain: Mapping[str, float] = field(default_factory=dict)
    """Seconds that its phases have taken; empty before it begins."""
    own: Sequence[Sample] = ()
    """What it counts beside that."""
    xdp: shapes.Xdp | None = None
    """The XDP data plane; None: there is none."""


class Live:
    """Pictures of what `facts` tells, as a feed of events: one ``history``, then a ``state`` each second."""

    __slots__ = ("_facts", "_history", "_looks", "_mono", "_wall", "feed")

    def __init__(
        self,
        facts: Callable[[], Facts],
        mono: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,  # noqa: TID251 - shown to people
    ) -> None:
        self._facts = facts
        self._mono = mono
        self._wall = wall
        self._looks = Looks()
        self._history: deque[tuple[float | None, ...]] = deque(maxlen=HISTORY)
        self.feed = Feed(self._event, lambda: event("history", list(self._history)))

    async def _event(self) -> bytes:
        return event("state", await self.picture())

    async def picture(self) -> dict[str, Any]:
        """Everything that is shown, of now."""
        pace = Pace()
        facts = self._facts()
        parts: list[Iterable[Sample]] = []
        at = self._mono()
        if facts.crew is not None:
            ledger = facts.crew.ledger
            parts = [list(facts.crew.samples()), facts.own, ledger.walk(WANTED)]
            at = facts.crew.ledger.recorded_at
        counts = await summed(parts, WANTED, pace)
        self._looks.take(Look(at, counts))
        is_stale = self._mono() - at > STALE_S
        span = None if is_stale else self._looks.since(RATE_WINDOW_S)
        longer = None if is_stale else self._looks.since(QUANTILE_WINDOW_S)
        traffic = await _traffic(span, longer, pace)
        pools, more_pools = await pictures(facts.config, facts.board, traffic.backends, counts, pace)
        picture = {
            "at": round(self._wall(), 3),
            "gateway": {key: facts.status[key] for key in ("pid", "version", "state", "uptime_s")},
            "config": facts.status["config"],
            "reload": facts.status["reload"],
            "measured_s": None if span is None else round(span.seconds, 1),
            "limits": {
                "listeners": MAX_LISTENERS,
                "routes": MAX_ROUTES,
                "pools": MAX_POOLS,
                "backends": MAX_BACKENDS,
                "rows": MAX_ROWS,
                "reasons": MAX_REASONS,
            },
            "listeners": _listeners(facts.status["listeners"], traffic),
            "more_listeners": max(0, len(facts.status["listeners"]) - MAX_LISTENERS),
            "routes": _routes(traffic),
            "more_routes": max(0, len(traffic.routes) - MAX_ROUTES),
            "errors": _reasons(counts, "http_gateway_errors", traffic.errors),
            "refused": _reasons(counts, "accept_reject", traffic.refused),
            "security": _reasons(counts, "security_events", traffic.security),
            "pools": pools,
            "more_pools": more_pools,
            "workers": _workers(facts.status, counts, traffic),
            "certificates": _certificates(counts),
            "drain": _drain(facts),
            "xdp": None if facts.xdp is None else xdp_picture(facts.xdp, traffic.xdp),
        }
        picture["totals"] = _totals(facts.status["listeners"], traffic)
        picture["attention"] = attention(picture)
        self._remember(picture["totals"])
        return picture

    def _remember(self, totals: Mapping[str, Any]) -> None:
        point = (round(self._wall(), 1), *(totals[key] for key in ("rps", "p50", "p99", "errors_ps")))
        self._history.append(point)


# -- what the counters say


@dataclass(frozen=True, slots=True)
class _Rates:
    """Per second, by what the name says. All empty while nothing is known."""

    is_known: bool = False
    classes: Mapping[Labels, float] = field(default_factory=dict)
    """Listener, route, class of the status."""
    routes: Mapping[Labels, list[float]] = field(default_factory=dict)
    """Histograms by listener and route, also of routes that had nothing to do."""
    bytes_in: Mapping[Labels, float] = field(default_factory=dict)
    bytes_out: Mapping[Labels, float] = field(default_factory=dict)
    relayed: Mapping[Labels, float] = field(default_factory=dict)
    connections: Mapping[Labels, float] = field(default_factory=dict)
    errors: Mapping[Labels, float] = field(default_factory=dict)
    refused: Mapping[Labels, float] = field(default_factory=dict)
    security: Mapping[Labels, float] = field(default_factory=dict)
    cpu: Mapping[Labels, float] = field(default_factory=dict)
    backends: Traffic = field(default_factory=Traffic)
    xdp: XdpRates = field(default_factory=dict)


def _whole(labels: Labels) -> Labels:
    return labels


async def _traffic(span: Span | None, longer: Span | None, pace: Pace) -> _Rates:
    if span is None or longer is None:
        return _Rates()
    return _Rates(
        is_known=True,
        classes=await span.rates("http_requests", lambda labels: (*labels[:2], labels[3]), pace),
        routes=await longer.histograms("http_request_duration_seconds", lambda labels: labels[:2], pace),
        bytes_in=await span.rates("http_request_bytes", _whole, pace),
        bytes_out=await span.rates("http_response_bytes", _whole, pace),
        relayed=await span.rates("relay_bytes", _whole, pace),
        connections=await span.rates("connections", _whole, pace),
        errors=await span.rates("http_gateway_errors", _whole, pace),
        refused=await span.rates("accept_reject", _whole, pace),
        security=await span.rates("security_events", _whole, pace),
        cpu=await span.rates("worker_cpu_seconds", _whole, pace),
        backends=Traffic(
            is_known=True,
            requests=await span.rates("backend_requests", _whole, pace),
            retries=await span.rates("backend_retries", lambda labels: labels[:1], pace),
        ),
        xdp={family: await span.rates(family, _whole, pace) for family in sorted(XDP_WANTED)},
    )


def _rate(value: float, traffic: _Rates) -> float | None:
    return round(value, 2) if traffic.is_known else None


def _failed(classes: Mapping[str, float]) -> float:
    return classes.get("5xx", 0.0) + classes.get("none", 0.0)


def _by_class(traffic: _Rates, wanted: Callable[[Labels], bool]) -> dict[str, float]:
    found: dict[str, float] = {}
    for labels, rate in traffic.classes.items():
        if wanted(labels):
            found[labels[2]] = round(found.get(labels[2], 0.0) + rate, 2)
    return found


def _flow(name: str, traffic: _Rates) -> tuple[float, float]:
    """Bytes per second from and to the clients of a listener."""
    return (
        traffic.bytes_in.get((name,), 0.0) + traffic.relayed.get((name, "from_client"), 0.0),
        traffic.bytes_out.get((name,), 0.0) + traffic.relayed.get((name, "from_backend"), 0.0),
    )


# -- the parts of a picture


def _totals(listeners: Sequence[Mapping[str, Any]], traffic: _Rates) -> dict[str, Any]:
    classes = _by_class(traffic, lambda _: True)
    flows = [_flow(each["name"], traffic) for each in listeners]
    return {
        "rps": _rate(sum(classes.values()), traffic),
        "classes": classes,
        "errors_ps": _rate(_failed(classes), traffic),
        "open": sum(each["open"] for each in listeners),
        "connections_ps": _rate(sum(traffic.connections.values()), traffic),
        "in_bps": _rate(sum(flow[0] for flow in flows), traffic),
        "out_bps": _rate(sum(flow[1] for flow in flows), traffic),
        **quantiles(together(traffic.routes)),
    }


def _listeners(listeners: Sequence[Mapping[str, Any]], traffic: _Rates) -> list[dict[str, Any]]:
    rows = []
    for each in listeners[:MAX_LISTENERS]:
        name = each["name"]
        classes = _by_class(traffic, lambda labels, name=name: labels[0] == name)  # type: ignore[misc]  # mypy: a default binds the name
        coming, going = _flow(name, traffic)
        own = {labels: counts for labels, counts in traffic.routes.items() if labels[0] == name}
        rows.append(
            {
                **each,
                "connections_ps": _rate(traffic.connections.get((name,), 0.0), traffic),
                "rps": _rate(sum(classes.values()), traffic),
                "classes": classes,
                "in_bps": _rate(coming, traffic),
                "out_bps": _rate(going, traffic),
                **quantiles(together(own)),
            }
        )
    return rows


def _routes(traffic: _Rates) -> list[dict[str, Any]]:
    """In the order of their names: a table whose rows change places cannot be read."""
    rows = []
    for labels in sorted(traffic.routes)[:MAX_ROUTES]:
        classes = _by_class(traffic, lambda each, labels=labels: each[:2] == labels)  # type: ignore[misc]  # mypy: as above
        rows.append(
            {
                "listener": labels[0],
                "route": labels[1],
                "rps": _rate(sum(classes.values()), traffic),
                "errors_ps": _rate(_failed(classes), traffic),
                **quantiles(traffic.routes[labels]),
            }
        )
    return rows


def _reasons(counts: Merged, family: str, rates: Mapping[Labels, float]) -> list[dict[str, Any]]:
    """The counters of a family by listener and reason, the largest first."""
    rows: list[dict[str, Any]] = [
        {
            "listener": labels[0],
            "reason": labels[1],
            "total": int(value),
            "ps": round(rates.get(labels, 0.0), 2),
        }
        for labels, value in counts[family].items()
        if not isinstance(value, list) and value
    ]
    rows.sort(key=lambda row: (-row["total"], row["listener"], row["reason"]))
    return rows[:MAX_REASONS]


def _workers(status: Mapping[str, Any], counts: Merged, traffic: _Rates) -> list[dict[str, Any]]:
    is_stopping = status["state"] in ("draining", "stopped")
    rows = []
    for each in status["workers"]:
        labels = (str(each["index"]),)
        lag_s = counts["worker_loop_lag_seconds"].get(labels)
        is_there = each["pid"] is not None
        rows.append(
            {
                **each,
                "state": "ended" if is_stopping and not is_there else each["state"],
                "rss_bytes": counts["worker_rss_bytes"].get(labels) if is_there else None,
                "cpu_percent": _rate(100 * traffic.cpu.get(labels, 0.0), traffic),
                "lag_ms": None if lag_s is None or isinstance(lag_s, list) else round(lag_s * 1000, 2),
            }
        )
    return rows


def _certificates(counts: Merged) -> list[dict[str, Any]]:
    rows = [
        {"listener": labels[0], "subject": labels[1], "expires_at": value}
        for labels, value in counts["certificate_expiry_timestamp_seconds"].items()
        if not isinstance(value, list) and len(labels) > 1
    ]
    rows.sort(key=lambda row: (row["expires_at"], row["listener"]))
    return rows[:MAX_LISTENERS]


def _drain(facts: Facts) -> dict[str, Any] | None:
    if not facts.drain:
        return None
    return {
        "phases": {name: round(seconds, 1) for name, seconds in facts.drain.items()},
        "limits": {"settle": settle_s(facts.config), "finish": budget_s(facts.config)},
        "open": {each["name"]: each["open"] for each in facts.status["listeners"] if each["open"]},
        "aborted": dict(facts.crew.aborted) if facts.crew is not None else {},
    }


# -- what somebody should look at


def attention(picture: Mapping[str, Any]) -> list[dict[str, str]]:
    """Sentences, the worst first; `level` is ``bad``, ``warn`` or ``info``."""
    found = [
        *_of_the_gateway(picture),
        *xdp_attention(picture.get("xdp")),
        *_of_pools(picture["pools"]),
        *_of_certificates(picture),
    ]
    return [
        {"level": level, "text": text}
        for level in ("bad", "warn", "info")
        for each, text in found
        if each == level
    ][:MAX_REASONS]


def _of_the_gateway(picture: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    state = picture["gateway"]["state"]
    if state in ("settling", "draining"):
        doing = "unready and still accepting" if state == "settling" else "accepting nothing more"
        yield "warn", f"The gateway is stopping: {doing}"
    elif state != "serving":
        yield "warn", f"The gateway is {state}"
    for worker in picture["workers"]:
        if state == "serving" and worker["state"] != "serving":
            yield "bad", f"Worker {worker['index']} is {worker['state']}"
        if worker["deaths_in_a_row"] > 1:
            # Without the number: each change of a sentence is read out.
            yield "bad", f"Worker {worker['index']} does not stay alive: it dies soon after each start"
    totals = picture["totals"]
    rps, errors_ps = totals["rps"] or 0.0, totals["errors_ps"] or 0.0
    share = next((share for share in _LOUD_ERRORS if errors_ps > share * rps), None)
    if share is not None and errors_ps >= _LOUD_ERRORS_PS:
        yield "bad", f"More than {share:.0%} of the requests end in an error"
    result = picture["reload"]["last_result"]
    if result not in (None, "applied", "unchanged"):
        report = picture["reload"]["last_report"]
        yield "bad", f"The last reload was {result}{f': {report[0]}' if report else ''}"


def _of_pools(pools: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    for pool in pools:
        if warning := pool.get("warning"):
            yield "bad", warning[0].upper() + warning[1:]
        if pool["panic"]:
            yield "bad", f"Pool {pool['name']}: too few backends are well, so all are used"
        for backend in pool["backends"]:
            if backend["state"] in ("unhealthy", "ejected"):
                yield "bad", f"{pool['name']} / {backend['id']} is {backend['state']}: {backend['cause']}"
            elif backend["state"] in ("draining", "disabled"):
                yield "info", f"{pool['name']} / {backend['id']} is {backend['state']}: {backend['cause']}"


def _of_certificates(picture: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for one in picture["certificates"]:
        left_s = one["expires_at"] - picture["at"]
        if left_s <= 0:
            yield "bad", f"The certificate of {one['listener']} ({one['subject']}) has expired"
        elif left_s < EXPIRY_WARNING_S:
            days = int(left_s // 86400)
            yield "warn", f"The certificate of {one['listener']} ({one['subject']}) expires in {days} days"
