"""From a configuration snapshot to the objects that serve it.

Everything that can fail is done in ``compile``, which touches nothing that runs; what it gives is then put
in place by ``runtime`` without any step that could fail half-way.
"""

import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass

from expressgateway.config.listeners import Listener as ListenerConfig
from expressgateway.config.pools import Backend as BackendConfig
from expressgateway.config.schema import Config
from expressgateway.net.listener import Door, limited
from expressgateway.net.tls import CertificatePair, ServerTls, TlsConfigError
from expressgateway.observe.counters import ListenerCounters
from expressgateway.proxy.forwarding import Forwarding, Ids, TrustedProxies
from expressgateway.proxy.service import Clock, HttpService, Timeouts, WebSocketLimits
from expressgateway.upstream.backend import BackendSettings, TlsSettings
from expressgateway.upstream.pool import Pool
from expressgateway.wire.h1.fields import FieldReader
from expressgateway.wire.h1.server import Limits

MAX_TARGET_BYTES = 16384  # of a request target
RATE_WINDOW_SWEEPS = 5  # an upload's rate is judged over so many sweeps, so that one late packet is no attack

Files = Mapping[str, bytes]


class SnapshotError(Exception):
    """The snapshot cannot be served; the text is a sentence for the operator."""


@dataclass(frozen=True, slots=True)
class PoolPlan:
    name: str
    policy: str
    backends: tuple[BackendSettings, ...]


@dataclass(frozen=True, slots=True)
class ListenerPlan:
    """One listener, compiled: ``config`` is its model, the rest what was made of it."""

    config: ListenerConfig
    pool: str
    door: Door
    tls: ServerTls | None


@dataclass(frozen=True, slots=True)
class Plan:
    config: Config
    pools: dict[str, PoolPlan]
    listeners: tuple[ListenerPlan, ...]


def compile_snapshot(config: Config, files: Files) -> Plan:
    """Make everything that could fail. Raises ``SnapshotError``."""
    trusted = TrustedProxies([str(network) for network in config.runtime.trusted_proxies])
    pools: dict[str, PoolPlan] = {}
    listeners: list[ListenerPlan] = []
    for listener in config.listeners:
        pool = config.pool_of(listener)
        pools[pool.name] = PoolPlan(
            pool.name,
            pool.load_balancing.policy,
            tuple(_backend(backend, files) for backend in pool.backends),
        )
        door = Door(trusted, listener.proxy_protocol, config.runtime.handshake_timeout_ms / 1000)
        listeners.append(ListenerPlan(listener, pool.name, door, _tls(config, listener, files)))
    return Plan(config, pools, tuple(listeners))


def _tls(config: Config, listener: ListenerConfig, files: Files) -> ServerTls | None:
    tls = listener.tls
    if tls is None:
        return None
    pairs = [(tls.cert_path, tls.key_path), *((each.cert_path, each.key_path) for each in tls.certificates)]
    settings = config.runtime.tls
    try:
        made = ServerTls(
            [CertificatePair(files[str(cert)], files[str(key)], str(cert)) for cert, key in pairs],
            client_auth=tls.client_auth,
            client_ca_pem=files[str(tls.client_ca_path)] if tls.client_ca_path is not None else None,
            min_version=settings.min_version,
            tls13_only=settings.tls13_only,
            ciphers=settings.ciphers,
            alpn=("http/1.1",) if listener.protocol == "h1s" else (),
        )
    except TlsConfigError as error:
        raise SnapshotError(f"listener {listener.name}: {error}") from error
    if not listener.is_http:
        # Layer 4 has no framing to lose: FIN without close_notify is an end like any other, and what is still
        # to be sent the other way must not be lost by it.
        made.context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
    return made


def _backend(backend: BackendConfig, files: Files) -> BackendSettings:
    tls = None
    if backend.tls:
        tls = TlsSettings(
            verify_peer=backend.tls_verify_peer,
            hostname=backend.tls_verify_hostname or "",
            ca_pem=files[str(backend.tls_ca_path)] if backend.tls_ca_path is not None else None,
            cert_pem=files[str(backend.tls_cert_path)] if backend.tls_cert_path is not None else None,
            key_pem=files[str(backend.tls_key_path)] if backend.tls_key_path is not None else None,
        )
    return BackendSettings(
        id=backend.id,
        host=backend.address.host,
        port=backend.address.port,
        protocol=backend.protocol,
        weight=backend.weight,
        tls=tls,
        send_proxy=backend.send_proxy,
    )


def http_service(
    plan: ListenerPlan, config: Config, pool: Pool, counters: ListenerCounters, clock: Clock, ids: Ids
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

    def log_security(kind: str, source: str, message: str) -> None:
        limited.warning(kind, source, message, listener=listener.name)

    return HttpService(
        clock=clock,
        wall_s=_wall_s,
        pool=pool,
        forwarding=Forwarding(
            forwarded=http.forwarded, via=http.via, server_header=http.server_header, alt_svc=alt_svc, ids=ids
        ),
        timeouts=Timeouts(
            # Two keys bound the same thing, one per listener and one for the process: the smaller one holds.
            header=min(http.header_timeout_ms, runtime.watchdog.header_deadline_ms) / 1000,
            body=http.body_timeout_ms / 1000,
            total=http.total_timeout_ms / 1000,
            head=http.head_timeout_ms / 1000,
            idle=http.idle_timeout_ms / 1000,
        ),
        max_body_bytes=http.max_request_body_bytes,
        max_requests=runtime.max_keepalive_requests,
        min_body_bps=runtime.watchdog.body_progress_min_bps,
        min_body_window_s=RATE_WINDOW_SWEEPS * runtime.watchdog.sweep_interval_ms / 1000,
        websocket=websocket,
        counters=counters,
        log_security=log_security,
        is_misdirected=plan.tls.is_misdirected if plan.tls is not None else None,
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
