"""From a configuration snapshot to the objects that serve it.

Everything that can fail is done in ``compile``, which touches nothing that runs; what it gives is then put
in place by ``runtime`` without any step that could fail half-way.
"""

import logging
import ssl
import time
from dataclasses import dataclass
from typing import Any

from expressgateway.config.listeners import Listener as ListenerConfig
from expressgateway.config.schema import Config
from expressgateway.l4.passthrough.settings import Settings as PassthroughSettings
from expressgateway.net.listener import Door, limited
from expressgateway.net.tls import CertificatePair, ServerTls, TlsConfigError
from expressgateway.observe.counters import ListenerCounters
from expressgateway.observe.spans import Spans
from expressgateway.proxy.forwarding import Forwarding, TrustedProxies
from expressgateway.proxy.grpc_health import Health
from expressgateway.proxy.mirror import Mirrors
from expressgateway.proxy.records import Records
from expressgateway.proxy.route import Timeouts
from expressgateway.proxy.service import Clock, GrpcRules, HttpService, WebSocketLimits
from expressgateway.proxy.trace_context import Ids
from expressgateway.proxy.traced import TracedForwarding
from expressgateway.proxy.tracer import Tracer
from expressgateway.wire.h1.fields import FieldReader
from expressgateway.wire.h1.server import Limits
from expressgateway.wire.h2.fields import FieldRules
from expressgateway.wire.h2.limits import H2Limits
from expressgateway.worker.build_passthrough import compile_passthrough
from expressgateway.worker.build_pools import Files, PoolPlan, SnapshotError, compile_pools
from expressgateway.worker.build_quic import QuicPlan, compile_quic
from expressgateway.worker.build_routes import Routing

log = logging.getLogger(__name__)

MAX_TARGET_BYTES = 16384  # of a request target
RATE_WINDOW_SWEEPS = 5  # an upload's rate is judged over so many sweeps, so that one late packet is no attack


@dataclass(frozen=True, slots=True)
class ListenerPlan:
    """One listener, compiled: ``config`` is its model, the rest what was made of it."""

    config: ListenerConfig
    pool: str | None
    """Where it sends what no route matches; None: nowhere."""
    door: Door
    tls: ServerTls | None
    quic: QuicPlan | None


@dataclass(frozen=True, slots=True)
class Plan:
    config: Config
    files: Files
    pools: dict[str, PoolPlan]
    listeners: tuple[ListenerPlan, ...]
    trusted: TrustedProxies
    passthrough: PassthroughSettings | None


def compile_snapshot(config: Config, files: Files, secrets: Files, before: Plan | None = None) -> Plan:
    """Make everything that could fail. What ``before`` made of the same is taken over.

    Raises ``SnapshotError``.
    """
    trusted = TrustedProxies([str(network) for network in config.runtime.trusted_proxies])
    pools = compile_pools(config, files, secrets)
    known = {each.config.name: each for each in before.listeners} if before is not None else {}
    listeners: list[ListenerPlan] = []
    for listener in config.listeners:
        own = config.pool_of(listener)
        door = Door(trusted, listener.proxy_protocol, config.runtime.handshake_timeout_ms / 1000)
        same = known.get(listener.name)
        if same is not None and before is not None and _has_same_tls(config, listener, files, before, same):
            tls = same.tls
        else:
            tls = _tls(config, listener, files)
        kept = None
        if before is not None and same is not None and _has_same_quic(listener, files, before, same):
            kept = same.quic
        tickets = None
        if same is not None and same.quic is not None and listener.quic == same.config.quic:
            tickets = same.quic.endpoint.tls.tickets  # of sessions that outlive a renewed certificate
        quic = compile_quic(listener, config, files, secrets, kept, tickets)
        listeners.append(ListenerPlan(listener, own.name if own else None, door, tls, quic))
    return Plan(config, files, pools, tuple(listeners), trusted, compile_passthrough(config, secrets))


def _has_same_tls(
    config: Config, listener: ListenerConfig, files: Files, before: Plan, same: ListenerPlan
) -> bool:
    """Contexts hold sessions' keys, and loading certificates takes time: what has not changed is kept."""
    if (listener.tls, listener.protocol) != (same.config.tls, same.config.protocol):
        return False
    if config.runtime.tls != before.config.runtime.tls:
        return False
    tls = listener.tls
    paths = [] if tls is None else [tls.client_ca_path]
    for each in tls.every if tls is not None else ():
        paths += [each.cert_path, each.key_path, each.ocsp_path]
    return all(files.get(str(path)) == before.files.get(str(path)) for path in paths)


def _has_same_quic(listener: ListenerConfig, files: Files, before: Plan, same: ListenerPlan) -> bool:
    quic = listener.quic
    return (
        quic is not None
        and quic == same.config.quic
        and all(
            files.get(str(path)) == before.files.get(str(path)) for path in (quic.cert_path, quic.key_path)
        )
    )


def _tls(config: Config, listener: ListenerConfig, files: Files) -> ServerTls | None:
    tls = listener.tls
    if tls is None:
        return None
    pairs = [
        CertificatePair(
            files[str(each.cert_path)],
            files[str(each.key_path)],
            str(each.cert_path),
            files.get(str(each.ocsp_path), b""),
        )
        for each in tls.every
    ]
    settings = config.runtime.tls
    try:
        made = ServerTls(
            pairs,
            client_auth=tls.client_auth,
            client_ca_pem=files[str(tls.client_ca_path)] if tls.client_ca_path is not None else None,
            min_version=settings.min_version,
            tls13_only=settings.tls13_only,
            ciphers=settings.ciphers,
            alpn=("h2", "http/1.1") if listener.protocol == "h1s" else (),
        )
    except TlsConfigError as error:
        raise SnapshotError(f"listener {listener.name}: {error}") from error
    if made.unstapled:
        log.warning(
            "no OCSP response is stapled: %s",
            made.unstapled,
            extra={"fields": {"listener": listener.name}},
        )
    if not listener.is_http:
        # Layer 4 has no framing to lose: FIN without close_notify is an end like any other, and what is still
        # to be sent the other way must not be lost by it.
        made.context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
    return made


def http_service(
    plan: ListenerPlan,
    config: Config,
    routing: Routing,
    mirrors: Mirrors,
    counters: ListenerCounters,
    clock: Clock,
    ids: Ids,
    records: Records | None,
    spans: Spans | None = None,
) -> HttpService:
    """The service of an HTTP listener."""
    listener = plan.config
    http = listener.http
    runtime = config.runtime
    alt_svc = None
    if listener.alt_svc is not None:
        alt_svc = f'h3=":{listener.alt_svc.h3_port}"; ma={listener.alt_svc.max_age}'
    websocket = None
    if listener.websocket is not None and listener.websocket.enabled:
        limits = listener.websocket
        websocket = WebSocketLimits(
            idle_s=limits.idle_timeout_seconds,
            max_message_bytes=limits.max_message_size_bytes,
            pings=limits.ping_rate_limit_per_window,
            pings_window_s=limits.ping_rate_limit_window_seconds,
            frame_s=limits.read_frame_timeout_seconds,
        )

    grpc = None
    if listener.grpc is not None and listener.grpc.enabled:
        health = Health(routing.pools, counters) if listener.grpc.health_synthesized else None
        grpc = GrpcRules(listener.grpc.max_deadline_seconds, health)

    def log_security(kind: str, source: str, message: str) -> None:
        limited.warning(kind, source, message, listener=listener.name)

    tracing = config.observability.tracing
    tracer = Tracer(spans, tracing.sample) if tracing is not None and spans is not None else None
    rules: dict[str, Any] = {
        "forwarded": http.forwarded,
        "via": http.via,
        "server_header": http.server_header,
        "alt_svc": alt_svc,
        "ids": ids,
    }
    forwarding = Forwarding(**rules) if tracer is None else TracedForwarding(tracer, **rules)
    return HttpService(
        clock=clock,
        wall_s=_wall_s,
        default=routing.default,
        routes=routing.table,
        mirrors=mirrors,
        forwarding=forwarding,
        timeouts=timeouts_of(plan, config),
        max_body_bytes=http.max_request_body_bytes,
        max_requests=runtime.max_requests_per_h3_connection
        if plan.quic is not None
        else runtime.max_keepalive_requests,
        min_body_bps=runtime.watchdog.body_progress_min_bps,
        min_body_window_s=RATE_WINDOW_SWEEPS * runtime.watchdog.sweep_interval_ms / 1000,
        websocket=websocket,
        counters=counters,
        log_security=log_security,
        is_misdirected=plan.tls.is_misdirected if plan.tls is not None else None,
        records=records,
        grpc=grpc,
        tracer=tracer,
    )


def timeouts_of(plan: ListenerPlan, config: Config) -> Timeouts:
    http = plan.config.http
    return Timeouts(
        # Two keys bound the same thing, one per listener and one for the process: the smaller one holds.
        header=min(http.header_timeout_ms, config.runtime.watchdog.header_deadline_ms) / 1000,
        body=http.body_timeout_ms / 1000,
        total=http.total_timeout_ms / 1000,
        head=http.head_timeout_ms / 1000,
        idle=http.idle_timeout_ms / 1000,
    )


def h2_limits(plan: ListenerPlan, config: Config) -> H2Limits:
    http = plan.config.http
    guard = plan.config.h2_security
    websocket = plan.config.websocket
    return H2Limits(
        FieldRules(
            http.max_header_count,
            min(MAX_TARGET_BYTES, http.max_header_bytes),
            config.runtime.header_underscore_policy,
        ),
        websocket=websocket is not None and websocket.enabled and websocket.h2_extended_connect,
        max_concurrent_streams=guard.max_concurrent_streams,
        max_header_list_size=min(guard.max_header_list_size, http.max_header_bytes),
        max_continuation_frames=guard.max_continuation_frames,
        max_send_buf_size=guard.max_send_buf_size,
        stream_window=guard.initial_stream_window_size,
        connection_window=guard.initial_connection_window_size,
        max_client_resets=guard.max_pending_accept_reset_streams,
        max_provoked_resets=guard.max_local_error_reset_streams,
        reset_window_s=guard.reset_window_seconds,
        reset_percent=guard.reset_percent,
        reset_min_streams=guard.reset_min_streams,
        max_settings=guard.max_settings_frames,
        max_pings=guard.max_ping_frames,
        max_empty_frames=guard.max_empty_frames,
        max_idle_frames=guard.max_idle_window_updates,
        control_window_s=guard.control_window_seconds,
        keep_alive_interval_s=guard.keep_alive_interval_ms / 1000,
        keep_alive_timeout_s=guard.keep_alive_timeout_ms / 1000,
    )


def h1_limits(plan: ListenerPlan, config: Config) -> Limits:
    http = plan.config.http
    fields = FieldReader(
        http.max_header_count,
        strict_te=config.security.strict_te,
        underscore=config.runtime.header_underscore_policy,
    )
    websocket = plan.config.websocket is not None and plan.config.websocket.enabled
    return Limits(fields, http.max_header_bytes, min(MAX_TARGET_BYTES, http.max_header_bytes), websocket)


def _wall_s() -> int:
    return int(time.time())  # noqa: TID251 - Date is wall time
