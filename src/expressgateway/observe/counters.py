"""A worker's counters: plain integers and fixed lists on the hot path, named only when asked.

``collect`` turns them into *samples*: family, label values, number. Samples are what crosses the control
channel; the supervisor adds those of all workers together (``merge``) and gives names, help and types from
``FAMILIES``. Labels come from the configuration and from closed sets, never from a peer.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

BUCKETS_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
PLACES: Final = 32  # in reports, for each series; a histogram needs 16
VERSIONS: Final = ("1.0", "1.1", "2", "3")
GRPC_CODES: Final = 17
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
        "Exchanges ended, by route, HTTP version and class of the status sent.",
        ("listener", "route", "version", "status_class"),
    ),
    "http_request_duration_seconds": Family(
        "histogram", "From the request's head to the end of the exchange.", ("listener", "route", "version")
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
    "grpc_requests": Family(
        "counter", "gRPC calls ended, by the number of their status.", ("listener", "status")
    ),
    "grpc_health_watches": Family("gauge", "Watches of health open now.", ("listener",)),
    "relay_bytes": Family("counter", "Bytes relayed by layer 4 listeners.", ("listener", "direction")),
    "relay_errors": Family(
        "counter", "Layer 4 connections or flows that failed, by reason.", ("listener", "reason")
    ),
    "udp_datagrams": Family("counter", "Datagrams relayed.", ("listener", "direction")),
    "udp_dropped": Family("counter", "Datagrams dropped, by reason.", ("listener", "reason")),
    "quic_retries": Family("counter", "Retries sent: clients asked to prove their address.", ("listener",)),
    "quic_wire_datagrams": Family(
        "counter", "UDP datagrams of QUIC listeners, received and sent.", ("listener", "direction")
    ),
    "quic_stateless_resets": Family(
        "counter", "Stateless resets sent: packets of connections that nobody knows.", ("listener",)
    ),
    "quic_version_negotiations": Family(
        "counter", "Clients told which versions of QUIC are spoken here.", ("listener",)
    ),
    "quic_handovers": Family(
        "counter", "Reads of QUIC packets passed between workers, given and taken.", ("direction",)
    ),
    "quic_handovers_dropped": Family(
        "counter", "Reads of QUIC packets that could not be passed on, by reason.", ("reason",)
    ),
    "quic_relayed_streams": Family(
        "counter", "Streams relayed, by who opened them.", ("listener", "direction")
    ),
    "quic_relayed_streams_open": Family("gauge", "Streams relayed now.", ("listener",)),
    "quic_datagrams": Family("counter", "DATAGRAM frames relayed.", ("listener", "direction")),
    "quic_datagrams_dropped": Family(
        "counter", "DATAGRAM frames dropped, by reason.", ("listener", "reason")
    ),
    "quic_evictions": Family("counter", "Flows that had to make room for others.", ("listener",)),
    "quic_rebinds": Family("counter", "Flows whose client came from another address or port.", ("listener",)),
    "backend_requests": Family(
        "counter",
        "Exchanges per backend, by class of its status; none: it gave no answer.",
        ("pool", "backend", "status_class"),
    ),
    "backend_request_duration_seconds": Family(
        "histogram",
        "From the choice of the backend to the end of its answer; sessions are left out.",
        ("pool", "backend"),
    ),
    "backend_connect_duration_seconds": Family(
        "histogram", "Time to make a connection, TLS or QUIC handshake included.", ("pool", "backend")
    ),
    "backend_head_duration_seconds": Family(
        "histogram", "From the request on its connection to the head of the answer.", ("pool", "backend")
    ),
    "backend_inflight": Family("gauge", "Exchanges or relayed connections under way.", ("pool", "backend")),
    "backend_connect_failures": Family("counter", "Connections that could not be made.", ("pool", "backend")),
    "backend_retries": Family("counter", "Further attempts, by how the last one ended.", ("pool", "reason")),
    "pool_retries_refused": Family("counter", "Retries that the budget did not pay for.", ("pool",)),
    "pool_inflight": Family("gauge", "Exchanges or relayed connections under way in the pool.", ("pool",)),
    "pool_limit_hits": Family(
        "counter", "Looks at a backend that a limit turned down, by limit.", ("pool", "limit")
    ),
    "pool_limit": Family("gauge", "Limits of the pool, as the workers share them.", ("pool", "limit")),
    "pool_pending": Family("gauge", "Exchanges that wait for room.", ("pool",)),
    "pool_queued": Family("counter", "Exchanges that found no room, by result.", ("pool", "result")),
    "pool_mirrored": Family("counter", "Copies of requests, by what became of them.", ("pool", "result")),
    "backend_up": Family("gauge", "Whether new work goes there.", ("pool", "backend")),
    "backend_state": Family("gauge", "1 for the state the backend is in.", ("pool", "backend", "state")),
    "backend_ejections": Family("counter", "Ejections, by cause.", ("pool", "backend", "cause")),
    "health_probes": Family("counter", "Active probes, by result.", ("pool", "backend", "result")),
    "pool_panic": Family("gauge", "1 while all backends are used because too few are well.", ("pool",)),
    "pool_connections": Family("gauge", "Connections to backends.", ("pool", "backend", "state")),
    "pool_leases": Family("counter", "Connections handed to exchanges.", ("pool", "backend")),
    "pool_reuse": Family("counter", "Of those, connections that had been used before.", ("pool", "backend")),
    "pool_unavailable": Family("counter", "Picks that found no usable backend.", ("pool",)),
    "dns_queries": Family("counter", "DNS questions asked.", ()),
    "dns_failures": Family("counter", "DNS questions without a usable answer.", ()),
    "dns_addresses": Family("gauge", "Addresses of a name now.", ("name",)),
    "dns_stale_served": Family("counter", "Times the last good answer was used instead.", ()),
    "access_log_lines": Family("counter", "Lines of the access log written.", ()),
    "access_log_errors": Family("counter", "Failed attempts to open or write the access log.", ()),
    "access_log_dropped": Family(
        "counter", "Lines of the access log that were lost, by reason.", ("reason",)
    ),
    "trace_spans_exported": Family("counter", "Spans that the collector took.", ()),
    "trace_spans_dropped": Family("counter", "Spans that were lost, by reason.", ("reason",)),
    "worker_faults": Family(
        "counter", "Unexpected errors caught by the safety net: each is a defect.", ("worker",)
    ),
    "worker_up": Family("gauge", "Whether the worker serves.", ("worker",)),
    "worker_restarts": Family("counter", "Replacements of a worker that died.", ("worker",)),
    "worker_crash_looping": Family(
        "gauge", "1 while workers die one after the other, soon after their start.", ("worker",)
    ),
    "worker_hangs": Family("counter", "Workers killed because they said nothing any more.", ("worker",)),
    "worker_replacements": Family(
        "counter", "Replacements of a worker that lived, by cause; it drains.", ("worker", "cause")
    ),
    "worker_memory_limit_bytes": Family(
        "gauge", "Resident memory at which a worker is replaced; 0: none.", ()
    ),
    "worker_rss_bytes": Family("gauge", "Resident memory.", ("worker",)),
    "worker_cpu_seconds": Family("counter", "Processor time used.", ("worker",)),
    "worker_loop_lag_seconds": Family("gauge", "How late the last sweep ran.", ("worker",)),
    "config_reload": Family("counter", "Reloads, by result.", ("result",)),
    "config_version": Family("gauge", "Number of the configuration in force.", ()),
    "config_applied_timestamp_seconds": Family("gauge", "When it came into force.", ()),
    "config_last_reload_successful": Family("gauge", "1 if the last reload was applied.", ()),
    "connections_limit": Family(
        "gauge", "Most connections that all workers together hold (runtime.max_inflight_connections).", ()
    ),
    "build_info": Family("gauge", "Always 1.", ("version", "python")),
}


SUPERVISOR_FAMILIES: Final[dict[str, Family]] = {
    "admin_rejects": Family("counter", "Clients the admin listener turned away, by reason.", ("reason",)),
    "certificate_expiry_timestamp_seconds": Family(
        "gauge", "When a listener's certificate ends, seconds since 1970.", ("listener", "subject")
    ),
    "certificate_ocsp_stapled": Family(
        "gauge",
        "1 if the OCSP response that the configuration names is stapled.",
        ("listener", "subject"),
    ),
    "certificate_reload": Family("counter", "Certificates read again and new, by result.", ("result",)),
    "certificate_reload_failing": Family(
        "gauge", "Certificates whose files cannot be used now; the old ones run.", ()
    ),
    "admin_streams": Family("gauge", "Event streams of the admin listener open now.", ()),
    "config_changes": Family("counter", "Run-time changes of backends, by result.", ("result",)),
    "upgrade_failures": Family("counter", "Upgrades that came to nothing: this process went on.", ()),
    "workers_leaving": Family("gauge", "Workers that drain while others have their place.", ()),
    "shutdown_drain_seconds": Family(
        "gauge", "How long a phase of the drain has taken, or takes so far.", ("phase",)
    ),
    "shutdown_aborted_connections": Family(
        "counter", "Connections still open at the end of the drain.", ("listener",)
    ),
    "xdp_attached": Family(
        "gauge", "1 if the XDP program is attached to the interface.", ("interface", "mode")
    ),
    "xdp_fault": Family("gauge", "1 if the kernel does not do all that the configuration wants.", ()),
    "xdp_flows": Family("counter", "Flows begun in the kernel.", ("listener",)),
    "xdp_flow_entries": Family("gauge", "Flows that the kernel knows, by address family.", ("family",)),
    "xdp_flow_entries_opening": Family(
        "gauge", "Of those flows, the ones of which there has been no second packet.", ()
    ),
    "xdp_flow_entries_limit": Family("gauge", "Flows of each address family that it has room for.", ()),
    "xdp_flows_ended": Family("counter", "Flows that ended, or were silent too long.", ()),
    "xdp_flow_evictions": Family("counter", "Flows that had to make room for others.", ()),
    "xdp_packets": Family(
        "counter",
        "Packets forwarded in the kernel, to backends (in) and clients (out).",
        ("listener", "direction"),
    ),
    "xdp_bytes": Family("counter", "Bytes of IP packets forwarded in the kernel.", ("listener", "direction")),
    "xdp_stateless_packets": Family(
        "counter", "Of them, those sent by the table alone, without a flow.", ("listener",)
    ),
    "xdp_icmp": Family(
        "counter",
        "ICMP messages that followed a flow, and those of ours that a packet is too big.",
        ("listener", "kind"),
    ),
    "xdp_not_forwarded_packets": Family(
        "counter",
        "Packets left to the kernel's stack (pass) or dropped, by reason; no listener: they were nobody's.",
        ("listener", "action", "reason"),
    ),
    "xdp_backend_packets": Family(
        "counter", "Packets forwarded in the kernel, by backend.", ("pool", "backend", "direction")
    ),
    "xdp_backend_bytes": Family(
        "counter",
        "Bytes of IP packets forwarded in the kernel, by backend.",
        ("pool", "backend", "direction"),
    ),
    "xdp_backend_flows": Family("counter", "Flows begun in the kernel, by backend.", ("pool", "backend")),
}
"""Families that only the supervisor has, besides those of `FAMILIES` that it fills."""


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


class RouteCounters:
    """What one route of a listener has seen."""

    __slots__ = ("durations", "name", "requests")

    def __init__(self, name: str) -> None:
        self.name = name
        self.requests = [[0] * len(CLASSES) for _ in VERSIONS]
        self.durations = [Histogram() for _ in VERSIONS]

    @property
    def total(self) -> int:
        """Exchanges counted: another number whenever anything here has changed."""
        return sum(map(sum, self.requests))

    def collect(self, listener: str) -> Iterator[Sample]:
        labels = (listener, self.name)
        for version, classes, durations in zip(VERSIONS, self.requests, self.durations, strict=True):
            for status_class, number in zip(CLASSES, classes, strict=True):
                if number:
                    yield "http_requests", (*labels, version, status_class), number
            if any(classes):
                yield "http_request_duration_seconds", (*labels, version), durations.as_list()


class ListenerCounters:
    """What one listener of one worker has seen."""

    __slots__ = (
        "accept_errors",
        "connections",
        "datagrams",
        "dropped",
        "errors",
        "grpc",
        "grpc_watches",
        "handshakes",
        "inflight",
        "name",
        "quic_datagrams",
        "quic_dropped",
        "quic_evictions",
        "quic_rebinds",
        "quic_resets",
        "quic_retries",
        "quic_streams",
        "quic_streams_open",
        "quic_versions",
        "quic_wire",
        "rejects",
        "relay_errors",
        "relayed",
        "request_bytes",
        "response_bytes",
        "routes",
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
        self.routes: dict[str, RouteCounters] = {}
        """By name: as many as the configurations so far had."""
        self.request_bytes = 0
        self.response_bytes = 0
        self.errors = Tally()
        self.grpc = [0] * GRPC_CODES
        self.grpc_watches = 0
        self.websockets = 0
        self.websockets_open = 0
        self.websocket_closed = Tally()
        self.relayed = [0, 0]
        """Bytes from clients, bytes from backends."""
        self.relay_errors = Tally()
        self.datagrams = [0, 0]
        self.dropped = Tally()
        self.quic_retries = 0
        self.quic_wire = [0, 0]
        """Datagrams received, datagrams sent."""
        self.quic_resets = 0
        self.quic_versions = 0
        self.quic_evictions = 0
        self.quic_rebinds = 0
        self.quic_streams = [0, 0]
        """Opened by clients, opened by backends."""
        self.quic_streams_open = 0
        self.quic_datagrams = [0, 0]
        self.quic_dropped = Tally()

    def route(self, name: str) -> RouteCounters:
        """A route's own counters, the same ones after a reload."""
        counters = self.routes.get(name)
        if counters is None:
            counters = self.routes[name] = RouteCounters(name)
        return counters

    def handshake(self, version: str, resumed: bool, result: str) -> None:
        key = (version, "yes" if resumed else "no", result)
        self.handshakes[key] = self.handshakes.get(key, 0) + 1

    def collect(self) -> Iterator[Sample]:
        """Everything, its routes included."""
        yield from self.collect_own()
        for route in self.routes.values():
            yield from route.collect(self.name)

    def collect_own(self) -> Iterator[Sample]:
        """What is not of its routes."""
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
            ("quic_datagrams_dropped", self.quic_dropped),
        ):
            for label, number in tally.items():
                yield family, (name, label), number
        for code, number in enumerate(self.grpc):
            if number:
                yield "grpc_requests", (name, str(code)), number
        for family, number in (
            ("ticket_key_rotations", self.ticket_rotations),
            ("http_request_bytes", self.request_bytes),
            ("http_response_bytes", self.response_bytes),
            ("websocket_sessions", self.websockets),
            ("websocket_sessions_open", self.websockets_open),
            ("grpc_health_watches", self.grpc_watches),
            ("quic_retries", self.quic_retries),
        ):
            yield family, (name,), number
        for family, number in (
            ("quic_evictions", self.quic_evictions),
            ("quic_rebinds", self.quic_rebinds),
            ("quic_stateless_resets", self.quic_resets),
            ("quic_version_negotiations", self.quic_versions),
        ):
            if number:
                yield family, (name,), number
        for family, numbers in (
            ("relay_bytes", self.relayed),
            ("udp_datagrams", self.datagrams),
            ("quic_relayed_streams", self.quic_streams),
            ("quic_datagrams", self.quic_datagrams),
        ):
            if any(numbers):
                yield family, (name, "from_client"), numbers[0]
                yield family, (name, "from_backend"), numbers[1]
        if any(self.quic_wire):
            yield "quic_wire_datagrams", (name, "received"), self.quic_wire[0]
            yield "quic_wire_datagrams", (name, "sent"), self.quic_wire[1]
        if any(self.quic_streams):
            yield "quic_relayed_streams_open", (name,), self.quic_streams_open


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
