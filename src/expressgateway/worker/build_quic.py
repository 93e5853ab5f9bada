"""QUIC listeners, from the model to what they are served by: HTTP/3, or Mode B's relay. Touches nothing that
runs.
"""

from dataclasses import dataclass

from expressgateway.config.listeners import Listener as ListenerConfig
from expressgateway.config.schema import Config
from expressgateway.l4.quic_relay import RelaySettings
from expressgateway.l4.quic_relay_listener import relay_diallers, relay_grants
from expressgateway.net.quic.endpoint import EndpointSettings
from expressgateway.net.quic.timers import Timers
from expressgateway.net.quic.tls import Grants, TicketStore, server_tls
from expressgateway.net.reactor import Reactor
from expressgateway.wire.h2.fields import FieldRules
from expressgateway.wire.h3.limits import H3Limits
from expressgateway.worker.build_pools import Files, PoolPlan, SnapshotError

H3_STREAMS = 128  # requests of one HTTP/3 client at once


@dataclass(frozen=True, slots=True)
class RelayPlan:
    """What a listener's relays are bounded by."""

    alpn: tuple[str, ...]
    max_streams: int
    max_datagrams: int


@dataclass(frozen=True, slots=True)
class QuicPlan:
    """One listener, compiled."""

    endpoint: EndpointSettings
    relay: RelayPlan | None
    """Of one with ``raw_proxy``; ``None``: HTTP/3."""


def compile_quic(
    listener: ListenerConfig,
    config: Config,
    files: Files,
    secrets: Files,
    same: QuicPlan | None,
    tickets: TicketStore | None = None,
) -> QuicPlan | None:
    """``None``: the listener does not speak QUIC. ``same``: what was made of the same block, certificate and
    key; ``tickets``: of sessions that go on to be resumed if there is no such. Raises ``SnapshotError``."""
    quic, raw = listener.quic, listener.raw_proxy
    if quic is None:
        return None
    if same is not None:
        tls = same.endpoint.tls
    else:
        alpn = list(raw.alpn) if raw is not None else ["h3"]
        try:
            tls = server_tls(
                files[str(quic.cert_path)],
                files[str(quic.key_path)],
                alpn,
                _grants(listener),
                tickets or TicketStore(),
            )
        except ValueError as error:
            raise SnapshotError(f"listener {listener.name}: {error}") from error
    endpoint = EndpointSettings(
        tls=tls,
        secret=secrets[str(quic.retry_secret_path)],
        retry=quic.retry,
        handshake_timeout_s=config.runtime.handshake_timeout_ms / 1000,
        max_datagram_bytes=quic.max_recv_udp_payload_size,
    )
    relay = None if raw is None else RelayPlan(raw.alpn, raw.max_relay_streams, raw.dgram_queue_cap)
    return QuicPlan(endpoint, relay)


def _grants(listener: ListenerConfig) -> Grants:
    quic, raw = listener.quic, listener.raw_proxy
    if quic is None:
        raise SnapshotError(f"listener {listener.name}: there is no quic table")
    idle_s = quic.max_idle_timeout_ms / 1000
    if raw is not None:
        return relay_grants(raw.max_relay_streams, idle_s, quic.max_recv_udp_payload_size)
    return Grants(streams=H3_STREAMS, idle_timeout_s=idle_s, udp_payload_bytes=quic.max_recv_udp_payload_size)


def h3_limits(listener: ListenerConfig, config: Config) -> H3Limits:
    """Of a listener that speaks HTTP/3."""
    http = listener.http
    websocket = listener.websocket
    return H3Limits(
        FieldRules(http.max_header_count, underscore=config.runtime.header_underscore_policy),
        websocket=websocket is not None and websocket.enabled and websocket.h3_extended_connect,
        max_concurrent_streams=H3_STREAMS,
        max_header_list_size=http.max_header_bytes,
    )


def relay_settings(
    plan: QuicPlan, relay: RelayPlan, pool: PoolPlan, reactor: Reactor, timers: Timers, connect_s: float
) -> RelaySettings:
    """What a listener's relays go by. Raises ``SnapshotError``."""
    grants = plan.endpoint.tls.grants
    try:
        diallers = relay_diallers(reactor, timers, connect_s, relay.alpn, grants, pool.backends)
    except ValueError as error:
        raise SnapshotError(f"pool {pool.name}: {error}") from error
    return RelaySettings(diallers, relay.max_streams, relay.max_datagrams)
