"""A worker's counters: plain integers and fixed lists on the hot path, named only when asked.

``collect`` turns them into *samples*: family, label values, number. Samples are what crosses the control
channel; the supervisor adds those of all workers together (``merge``) and gives names, help and types from
``FAMILIES``. Labels come from the configuration and from closed sets, never from a peer.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

BUCKETS_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
VERSIONS: Final = ("1.0", "1.1")
CLASSES: Final = ("none", "1xx", "2xx", "3xx", "4xx", "5xx")

Sample = tuple[str, tuple[str, ...], float | list[float]]


class Family(NamedTuple):
    kind: str
    """``counter``, ``gauge`` or ``histogram``."""
    help: str
    labels: tuple[str, ...]


FAMILIES: Final[dict[str, Family]] = {
    "http_requests": Family(
        "counter",
        "Exchanges ended, by HTTP version and class of the status sent.",
        ("listener", "version", "status_class"),
    ),
    "http_request_duration_seconds": Family(
        "histogram", "From the request's head to the end of the exchange.", ("listener", "version")
    ),
    "http_request_bytes": Family("counter", "Bytes of request bodies.", ("listener",)),
    "http_response_bytes": Family("counter", "Bytes of response bodies.", ("listener",)),
    "http_gateway_errors": Family(
        "counter",
        "Exchanges that the gateway answered or ended by itself, by reason.",
        ("listener", "reason"),
    ),
    "connections": Family("counter", "Connections (or UDP flows) accepted.", ("listener",)),
    "connections_inflight": Family("gauge", "Connections (or UDP flows) open now.", ("listener",)),
    "accept_reject": Family("counter", "Connections refused at the door, by reason.", ("listener", "reason")),
    "accept_errors": Family("counter", "Failures of accept itself, by kind.", ("listener", "kind")),
    "tls_handshakes": Family(
        "counter", "TLS handshakes ended.", ("listener", "version", "resumed", "result")
    ),
    "ticket_key_rotations": Family("counter", "Session ticket keys taken into use.", ("listener",)),
    "security_events": Family("counter", "Attacks and abuses stopped, by kind.", ("listener", "kind")),
    "websocket_sessions": Family("counter", "WebSocket sessions opened.", ("listener",)),
    "websocket_sessions_open": Family("gauge", "WebSocket sessions open now.", ("listener",)),
    "websocket_closed": Family(
        "counter", "WebSocket sessions the gateway closed, by code.", ("listener", "code")
    ),
    "relay_bytes": Family("counter", "Bytes relayed by layer 4 listeners.", ("listener", "direction")),
    "relay_errors": Family(
        "counter", "Layer 4 connections or flows that failed, by reason.", ("listener", "reason")
    ),
    "udp_datagrams": Family("counter", "Datagrams relayed.", ("listener", "direction")),
    "udp_dropped": Family("counter", "Datagrams dropped, by reason.", ("listener", "reason")),
    "backend_requests": Family(
        "counter",
        "Exchanges per backend, by class of its status; none: it gave no answer.",
        ("pool", "backend", "status_class"),
    ),
    "backend_inflight": Family("gauge", "Exchanges or relayed connections under way.", ("pool", "backend")),
    "backend_connect_failures": Family("counter", "Connections that could not be made.", ("pool", "backend")),
    "backend_retries": Family("counter", "Requests sent again on a fresh connection.", ("pool", "reason")),
    "pool_connections": Family("gauge", "Connections to backends.", ("pool", "backend", "state")),
    "pool_leases": Family("counter", "Connections handed to exchanges.", ("pool", "backend")),
    "pool_reuse": Family("counter", "Of those, connections that had been used before.", ("pool", "backend")),
    "pool_unavailable": Family("counter", "Picks that found no usable backend.", ("pool",)),
    "dns_queries": Family("counter", "DNS questions asked.", ()),
    "dns_failures": Family("counter", "DNS questions without a usable answer.", ()),
    "dns_stale_served": Family("counter", "Times the last good answer was used instead.", ()),
    "worker_faults": Family(
        "counter", "Unexpected errors caught by the safety net: each is a defect.", ("worker",)
    ),
    "worker_up": Family("gauge", "Whether the worker serves.", ("worker",)),
    "worker_restarts": Family("counter", "Replacements of a worker that died.", ("worker",)),
    "worker_rss_bytes": Family("gauge", "Resident memory.", ("worker",)),
    "worker_cpu_seconds": Family("counter", "Processor time used.", ("worker",)),
    "worker_loop_lag_seconds": Family("gauge", "How late the last sweep ran.", ("worker",)),
    "config_reload": Family("counter", "Reloads, by result.", ("result",)),
    "config_version": Family("gauge", "Number of the configuration in force.", ()),
    "config_applied_timestamp_seconds": Family("gauge", "When it came into force.", ()),
    "config_last_reload_successful": Family("gauge", "1 if the last reload was applied.", ()),
    "build_info": Family("gauge", "Always 1.", ("version", "python")),
}


class Histogram:
    """Counts per bucket (not cumulative), with the sum. The last bucket has no upper bound."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.sum = 0.0

    def observe(self, value_s: float) -> None:
        self.counts[bisect_left(BUCKETS_S, value_s)] += 1
        self.sum += value_s

    def as_list(self) -> list[float]:
        return [*self.counts, self.sum]


class Tally(dict[str, int]):
    """Counts by a label from a closed set."""

    __slots__ = ()

    def add(self, label: str) -> None:
        self[label] = self.get(label, 0) + 1


class ListenerCounters:
    """What one listener of one worker has seen."""

    __slots__ = (
        "accept_errors",
        "connections",
        "datagrams",
        "dropped",
        "durations",
        "errors",
        "handshakes",
        "inflight",
        "name",
        "rejects",
        "relay_errors",
        "relayed",
        "request_bytes",
        "requests",
        "response_bytes",
        "security",
        "ticket_rotations",
        "websocket_closed",
        "websockets",
        "websockets_open",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.connections = 0
        self.inflight = 0
        self.rejects = Tally()
        self.accept_errors = Tally()
        self.handshakes: dict[tuple[str, str, str], int] = {}
        self.ticket_rotations = 0
        self.security = Tally()
        self.requests = [[0] * len(CLASSES) for _ in VERSIONS]
        self.durations = [Histogram() for _ in VERSIONS]
        self.request_bytes = 0
        self.response_bytes = 0
        self.errors = Tally()
        self.websockets = 0
        self.websockets_open = 0
        self.websocket_closed = Tally()
        self.relayed = [0, 0]
        """Bytes from clients, bytes from backends."""
        self.relay_errors = Tally()
        self.datagrams = [0, 0]
        self.dropped = Tally()

    def handshake(self, version: str, resumed: bool, result: str) -> None:
        key = (version, "yes" if resumed else "no", result)
        self.handshakes[key] = self.handshakes.get(key, 0) + 1

    def collect(self) -> Iterator[Sample]:
        name = self.name
        yield "connections", (name,), self.connections
        yield "connections_inflight", (name,), self.inflight
        for labels, number in self.handshakes.items():
            yield "tls_handshakes", (name, *labels), number
        for family, tally in (
            ("accept_reject", self.rejects),
            ("accept_errors", self.accept_errors),
            ("security_events", self.security),
            ("http_gateway_errors", self.errors),
            ("websocket_closed", self.websocket_closed),
            ("relay_errors", self.relay_errors),
            ("udp_dropped", self.dropped),
        ):
            for label, number in tally.items():
                yield family, (name, label), number
        for version, classes, durations in zip(VERSIONS, self.requests, self.durations, strict=True):
            for status_class, number in zip(CLASSES, classes, strict=True):
                if number:
                    yield "http_requests", (name, version, status_class), number
            if any(classes):
                yield "http_request_duration_seconds", (name, version), durations.as_list()
        for family, number in (
            ("ticket_key_rotations", self.ticket_rotations),
            ("http_request_bytes", self.request_bytes),
            ("http_response_bytes", self.response_bytes),
            ("websocket_sessions", self.websockets),
            ("websocket_sessions_open", self.websockets_open),
        ):
            yield family, (name,), number
        for family, numbers in (("relay_bytes", self.relayed), ("udp_datagrams", self.datagrams)):
            if any(numbers):
                yield family, (name, "from_client"), numbers[0]
                yield family, (name, "from_backend"), numbers[1]


def merge(snapshots: Iterable[Iterable[Sample]]) -> dict[str, dict[tuple[str, ...], float | list[float]]]:
    """Add samples of the same family and labels together."""
    merged: dict[str, dict[tuple[str, ...], float | list[float]]] = {}
    for snapshot in snapshots:
        for family, labels, value in snapshot:
            by_labels = merged.setdefault(family, {})
            key = tuple(labels)
            known = by_labels.get(key)
            if known is None:
                by_labels[key] = list(value) if isinstance(value, list) else value
            elif isinstance(known, list) and isinstance(value, list):
                by_labels[key] = [one + other for one, other in zip(known, value, strict=True)]
            elif not isinstance(known, list) and not isinstance(value, list):
                by_labels[key] = known + value
    return merged
