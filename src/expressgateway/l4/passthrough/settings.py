"""The ``[passthrough]`` table, compiled: what a listener of Mode A goes by. A reload gives it another one."""

from dataclasses import dataclass

from expressgateway.l4.passthrough.quic_lb import ServerIds
from expressgateway.l4.passthrough.retry import RetryTokens


@dataclass(frozen=True, slots=True)
class Settings:
    max_flows: int
    """Of this worker: its part of ``max_quic_connections``."""
    max_per_source: int
    """Of this worker: its part of ``per_ip_flow_cap``."""
    min_dcid_bytes: int = 8
    longest_cid_bytes: int = 20
    backlog: int = 32
    """Datagrams of one flow that wait for its backend's socket."""
    is_strict: bool = False
    """A flow's packets come from one place, or are dropped."""
    idle_s: float = 60.0
    """0: flows are not forgotten for being idle."""
    audit_window_s: float = 60.0
    server_ids: ServerIds | None = None
    tokens: RetryTokens | None = None
    """Given: new clients are answered with a Retry."""
