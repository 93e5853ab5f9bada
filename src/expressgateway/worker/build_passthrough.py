"""Mode A, from its model to what its listener goes by. Touches nothing that runs."""

import time

from expressgateway.config.schema import Config
from expressgateway.l4.passthrough.quic_lb import ServerIds
from expressgateway.l4.passthrough.retry import RetryTokens
from expressgateway.l4.passthrough.settings import Settings
from expressgateway.worker.build_pools import Files, SnapshotError


def compile_passthrough(config: Config, secrets: Files) -> Settings | None:
    """``None``: there is no such listener. Raises ``SnapshotError``."""
    model = config.passthrough
    if model is None:
        return None
    workers = config.runtime.worker_count
    server_ids = None
    if (routing := model.cid_routing) is not None:
        key = bytes.fromhex(routing.key) if routing.key is not None else None
        server_ids = ServerIds(routing.config_id, routing.server_id_length, key)
    tokens = None
    if model.mint_retry:
        secret = secrets.get(str(model.retry_secret_path))
        if secret is None:
            raise SnapshotError("passthrough: there is no secret for Retry tokens")
        tokens = RetryTokens(secret, _wall_ms)
    return Settings(
        # Rounded up: a cap below the number of workers would else leave some of them without any room.
        max_flows=-(-model.max_quic_connections // workers),
        max_per_source=-(-model.per_ip_flow_cap // workers),
        min_dcid_bytes=model.min_client_dcid_len,
        longest_cid_bytes=model.max_dcid_len_routed,
        backlog=model.per_flow_backlog,
        is_strict=model.strict_source_binding,
        idle_s=model.flow_idle_timeout_ms / 1000,
        audit_window_s=model.audit_throttle_window_secs,
        server_ids=server_ids,
        tokens=tokens,
    )


def _wall_ms() -> int:
    return int(time.time() * 1000)  # noqa: TID251 - tokens outlive this process
