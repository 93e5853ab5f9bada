"""A worker's counts as samples, named as in ``observe.counters.FAMILIES``, and where they come from."""

from collections.abc import Iterator
from functools import partial

from expressgateway.net.quic.handover import Handover
from expressgateway.observe.counters import CLASSES, ListenerCounters, Sample
from expressgateway.upstream.backend import Backend
from expressgateway.upstream.limits import NO_LIMIT
from expressgateway.upstream.pool import Pool
from expressgateway.worker.reports import Source


def listener_sources(counters: ListenerCounters) -> Iterator[Source]:
    """A listener and its routes."""
    yield counters, None, counters.collect_own
    for route in list(counters.routes.values()):
        yield route, route.total, partial(route.collect, counters.name)


def pool_sources(pool: Pool) -> Iterator[Source]:
    """A pool and its backends."""
    everyone = list(pool.everyone())
    unsolicited = pool.unsolicited_before
    for backend in everyone:
        unsolicited += backend.unsolicited
    queue = pool.queue
    mark = (
        pool.settings,
        pool.unavailable,
        pool.load.in_flight,
        sum(pool.retries.values()),
        pool.budget.refused if pool.budget is not None else None,
        sum(pool.mirrored.values()),
        sum(pool.hits.values()),
        len(queue),
        queue.waited,
        queue.refused,
        queue.timeouts,
        unsolicited,
    )
    yield pool, mark, partial(_collect_pool, pool, unsolicited)
    for backend in everyone:
        idle = _idle(backend)
        mark_of_backend = (
            backend.in_flight,
            backend.leases,
            backend.reused,
            backend.connect_failures,
            backend.open,
            idle,
            sum(backend.responses),
            sum(backend.connect_durations.counts),
            sum(backend.head_durations.counts),
            sum(backend.durations.counts),
        )
        yield backend, mark_of_backend, partial(_collect_backend, pool.name, backend, idle)


def collect_handover(handover: Handover) -> Iterator[Sample]:
    """What this worker passed to others, and was passed."""
    yield "quic_handovers", ("given",), handover.given
    yield "quic_handovers", ("taken",), handover.taken
    for reason, number in handover.dropped.items():
        yield "quic_handovers_dropped", (reason,), number


def _collect_pool(pool: Pool, unsolicited: int) -> Iterator[Sample]:
    name = pool.name
    yield "pool_unavailable", (name,), pool.unavailable
    yield "pool_inflight", (name,), pool.load.in_flight
    for reason, number in pool.retries.items():
        yield "backend_retries", (name, reason), number
    if pool.budget is not None:
        yield "pool_retries_refused", (name,), pool.budget.refused
    for result, number in pool.mirrored.items():
        yield "pool_mirrored", (name, result), number
    limits = pool.settings.limits
    if not limits.is_off:
        for limit in ("max_connections", "max_requests", "pool_max_connections", "pool_max_requests"):
            most = getattr(limits, limit)
            if most != NO_LIMIT:
                yield "pool_limit", (name, limit), most
                yield "pool_limit_hits", (name, limit), pool.hits.get(limit, 0)
        yield "pool_limit", (name, "max_pending"), limits.max_pending
        queue = pool.queue
        yield "pool_pending", (name,), len(queue)
        yield "pool_queued", (name, "waited"), queue.waited
        yield "pool_queued", (name, "refused"), queue.refused
        yield "pool_queued", (name, "timeout"), queue.timeouts
    if unsolicited:
        yield "security_events", (name, "unsolicited_response"), unsolicited


def _idle(backend: Backend) -> int:
    return backend.connections.idle if backend.connections is not None else 0


def _collect_backend(pool: str, backend: Backend, idle: int) -> Iterator[Sample]:
    labels = (pool, backend.id)
    for status_class, number in zip(CLASSES, backend.responses, strict=True):
        if number:
            yield "backend_requests", (*labels, status_class), number
    yield "backend_inflight", labels, backend.in_flight
    yield "backend_connect_failures", labels, backend.connect_failures
    yield "pool_leases", labels, backend.leases
    yield "pool_reuse", labels, backend.reused
    for family, histogram in (
        ("backend_request_duration_seconds", backend.durations),
        ("backend_connect_duration_seconds", backend.connect_durations),
        ("backend_head_duration_seconds", backend.head_durations),
    ):
        if any(histogram.counts):
            yield family, labels, histogram.as_list()
    yield "pool_connections", (*labels, "idle"), idle
    yield "pool_connections", (*labels, "busy"), backend.open - idle
