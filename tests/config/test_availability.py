"""Every key is either done by this version or refused by it; nothing is accepted and ignored."""

from typing import Any

import pytest

from expressgateway.config.availability import NOT_YET, Later, refusals
from expressgateway.config.diagnose import blocks
from expressgateway.config.reference import is_available_path
from expressgateway.config.validate import validate

DONE = {
    "": "listeners pools runtime observability admin security passthrough",
    "listeners": "name address protocol tls quic alt_svc http h2_security websocket grpc drain_timeout_ms "
    "drain_jitter_ms proxy_protocol h2c xdp xdp_forwarding backends routes pool load_balancing health "
    "outlier retry circuit_breaker",
    "listeners.tls": "cert_path key_path ocsp_path certificates client_auth client_ca_path "
    "ticket_rotation_interval_seconds "
    "ticket_rotation_overlap_seconds",
    "listeners.tls.certificates": "cert_path key_path ocsp_path",
    "listeners.quic": "cert_path key_path retry_secret_path max_idle_timeout_ms max_recv_udp_payload_size "
    "retry raw_proxy",
    "listeners.quic.raw_proxy": "backend_addr backends sni backend_ca_path dgram_queue_cap "
    "max_relay_streams alpn",
    "listeners.alt_svc": "h3_port max_age",
    "listeners.http": "header_timeout_ms body_timeout_ms total_timeout_ms head_timeout_ms idle_timeout_ms "
    "max_request_body_bytes max_header_bytes max_header_count server_header via forwarded",
    "listeners.h2_security": "max_pending_accept_reset_streams max_local_error_reset_streams "
    "reset_window_seconds reset_percent reset_min_streams max_concurrent_streams max_header_list_size "
    "max_continuation_frames max_settings_frames max_ping_frames max_empty_frames max_idle_window_updates "
    "control_window_seconds max_send_buf_size keep_alive_interval_ms keep_alive_timeout_ms "
    "initial_stream_window_size initial_connection_window_size",
    "listeners.websocket": "enabled idle_timeout_seconds max_message_size_bytes ping_rate_limit_per_window "
    "ping_rate_limit_window_seconds read_frame_timeout_seconds h2_extended_connect "
    "h3_extended_connect",
    "listeners.grpc": "enabled max_deadline_seconds health_synthesized",
    "listeners.backends": "address protocol weight tls tls_ca_path tls_verify_hostname "
    "tls_verify_peer tls_cert_path "
    "tls_key_path send_proxy id",
    "listeners.routes": "name match pool split sticky redirect respond rewrite headers timeouts retry mirror",
    "listeners.routes.match": "host path path_prefix path_regex method headers query",
    "listeners.routes.split": "pool weight",
    "listeners.routes.redirect": "to status",
    "listeners.routes.respond": "status body content_type",
    "listeners.routes.rewrite": "host path strip_prefix add_prefix",
    "listeners.routes.headers": "request response",
    "listeners.routes.headers.request": "set add remove",
    "listeners.routes.headers.response": "set add remove",
    "listeners.routes.timeouts": "body_timeout_ms total_timeout_ms head_timeout_ms",
    "listeners.routes.mirror": "pool percent",
    "pools": "name backends load_balancing health outlier retry circuit_breaker",
    "pools.load_balancing": "policy hash_key slow_start_ms table_size virtual_nodes decay_ms cookie",
    "pools.load_balancing.cookie": "name path secure http_only same_site max_age_seconds secret_path",
    "pools.health": "type path host expect_status expect_body interval_ms timeout_ms rise fall jitter",
    "pools.outlier": "consecutive_failures failure_percent window_ms ejection_ms max_ejection_ms "
    "max_ejection_percent panic_threshold_percent count_5xx",
    "pools.retry": "attempts on budget_percent per_try_timeout_ms",
    "pools.circuit_breaker": "max_connections max_requests pool_max_connections pool_max_requests "
    "max_pending pending_timeout_ms",
    "runtime": "workers xdp_enabled xdp_interface xdp_mode xdp_new_flow_cap_per_sec_per_cpu xdp_max_flows "
    "xdp_source_ports xdp_tcp_idle_timeout_seconds xdp_udp_idle_timeout_seconds "
    "xdp_closing_timeout_seconds xdp_denied xdp_pin_path max_requests_per_h3_connection "
    "drain_timeout_ms readiness_settle_ms drain_jitter_ms "
    "handshake_timeout_ms "
    "max_inflight_connections connect_timeout_ms per_ip_connection_cap header_underscore_policy "
    "max_keepalive_requests trusted_proxies user group tls watchdog worker_memory_limit_bytes",
    "runtime.tls": "tls13_only min_version ciphers",
    "runtime.watchdog": "header_deadline_ms body_progress_min_bps sweep_interval_ms",
    "observability": "metrics_bind max_label_cardinality access_log tracing",
    "observability.access_log": "path format sample",
    "observability.tracing": "endpoint service_name sample",
    "admin": "api_token_hash allow_non_loopback",
    "security": "strict_te",
    "passthrough": "bind_addr backends retry_secret_path max_quic_connections min_client_dcid_len "
    "per_flow_backlog strict_source_binding audit_throttle_window_secs max_dcid_len_routed mint_retry "
    "flow_idle_timeout_ms per_ip_flow_cap cid_routing xdp xdp_forwarding",
    "passthrough.cid_routing": "config_id server_id_length key",
}
"""What this version does. A key that appears here needs the code that makes it take effect."""
DONE["pools.backends"] = DONE["passthrough.backends"] = DONE["listeners.backends"]
DONE["listeners.routes.retry"] = DONE["pools.retry"]
DONE |= {
    path.replace("pools.", "listeners."): keys for path, keys in DONE.items() if path.startswith("pools.")
}


def test_every_key_is_done_or_refused() -> None:
    available = {
        f"{path}.{key}".removeprefix(".")
        for path, block in blocks().items()
        for key in block.model_fields
        if is_available_path(f"{path}.{key}".removeprefix("."))
    }
    assert available == {
        f"{path}.{key}".removeprefix(".") for path, keys in DONE.items() for key in keys.split()
    }


@pytest.mark.parametrize("row", NOT_YET, ids=lambda row: f"{row.key}={row.value}")
def test_rows_name_keys_of_the_schema_and_are_refused(row: Later) -> None:
    path, _, key = row.key.rpartition(".")
    assert key in blocks()[path].model_fields
    value = "some.module:Class" if row.value == "*:*" else row.value
    document: dict[str, Any] = {key: {} if value is None else value}
    for part in reversed(path.split(".") if path else []):
        document = {part: [document] if part in ("listeners", "pools", "backends", "routes") else document}
    ((loc, message),) = refusals(document)
    assert loc[-1] == key
    assert message.startswith("not available in this version: ")
    assert message in [problem.message for problem in validate(document).problems]


def test_off_is_on_offer() -> None:
    document = {
        "listeners": [{"websocket": {"h3_extended_connect": False}}],
        "runtime": {"xdp_enabled": False},
    }
    assert not list(refusals(document))


def test_a_value_of_another_type_is_not_taken_for_a_row() -> None:
    assert not list(refusals({"runtime": {"xdp_enabled": 1}, "listeners": [{"protocol": 1}, 3, "x"]}))
