"""Every key is either done by this version or refused by it; nothing is accepted and ignored."""

from typing import Any

import pytest

from expressgateway.config.availability import NOT_YET, Later, refusals
from expressgateway.config.diagnose import blocks
from expressgateway.config.reference import is_available_path
from expressgateway.config.validate import validate

DONE = {
    "": "listeners pools runtime observability admin security",
    "listeners": "name address protocol tls alt_svc http websocket drain_timeout_ms drain_jitter_ms "
    "proxy_protocol h2c backends pool load_balancing",
    "listeners.tls": "cert_path key_path certificates client_auth client_ca_path "
    "ticket_rotation_interval_seconds "
    "ticket_rotation_overlap_seconds",
    "listeners.tls.certificates": "cert_path key_path",
    "listeners.alt_svc": "h3_port max_age",
    "listeners.http": "header_timeout_ms body_timeout_ms total_timeout_ms head_timeout_ms idle_timeout_ms "
    "max_request_body_bytes max_header_bytes max_header_count server_header via forwarded",
    "listeners.websocket": "enabled idle_timeout_seconds max_message_size_bytes ping_rate_limit_per_window "
    "ping_rate_limit_window_seconds read_frame_timeout_seconds h2_extended_connect "
    "h3_extended_connect",
    "listeners.backends": "address protocol weight tls tls_ca_path tls_verify_hostname "
    "tls_verify_peer tls_cert_path "
    "tls_key_path send_proxy id",
    "listeners.load_balancing": "policy",
    "pools": "name backends load_balancing",
    "pools.load_balancing": "policy",
    "runtime": "workers xdp_enabled drain_timeout_ms readiness_settle_ms drain_jitter_ms "
    "handshake_timeout_ms "
    "max_inflight_connections connect_timeout_ms per_ip_connection_cap header_underscore_policy "
    "max_keepalive_requests trusted_proxies user group tls watchdog",
    "runtime.tls": "tls13_only min_version ciphers",
    "runtime.watchdog": "header_deadline_ms body_progress_min_bps sweep_interval_ms",
    "observability": "metrics_bind max_label_cardinality",
    "admin": "api_token_hash allow_non_loopback",
    "security": "strict_te",
}
"""What this version does. A key that appears here needs the code that makes it take effect."""
DONE["pools.backends"] = DONE["listeners.backends"]


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
        document = {part: [document] if part in ("listeners", "pools", "backends") else document}
    ((loc, message),) = refusals(document)
    assert loc[-1] == key
    assert message.startswith("not available in this version: ")
    assert message in [problem.message for problem in validate(document).problems]


def test_off_is_on_offer() -> None:
    document = {
        "listeners": [
            {"h2c": False, "websocket": {"h2_extended_connect": False, "h3_extended_connect": False}}
        ],
        "runtime": {"xdp_enabled": False},
    }
    assert not list(refusals(document))


def test_a_value_of_another_type_is_not_taken_for_a_row() -> None:
    assert not list(refusals({"runtime": {"xdp_enabled": 1}, "listeners": [{"protocol": 1}, 3, "x"]}))
