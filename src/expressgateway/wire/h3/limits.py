"""What one HTTP/3 connection may cost. One object per listener or backend, shared by its connections.

Memory, per connection, at the worst: for each of ``max_concurrent_streams`` the transport's stream window,
for bodies that a paused exchange has not taken and for streams that wait for the QPACK table; as much as
``max_send_buf_size`` and one chunk, in the transport, for bodies that the peer does not take; a header
block of ``max_header_list_size`` for each stream whose head is not complete; two QPACK tables.
"""

from typing import Final

from expressgateway.wire.h2.fields import FieldRules

QPACK_TABLE_BYTES: Final = 4096
QPACK_BLOCKED_STREAMS: Final = 16


class H3Limits:
    """The defaults are those of the configuration, and HTTP/2's. Zero means "off" where it says so."""

    __slots__ = (
        "control_window_s",
        "fields",
        "max_client_resets",
        "max_concurrent_streams",
        "max_empty_frames",
        "max_encoder_bytes",
        "max_header_list_size",
        "max_idle_frames",
        "max_pings",
        "max_provoked_resets",
        "max_send_buf_size",
        "max_settings",
        "qpack_blocked_streams",
        "qpack_table_bytes",
        "reset_min_streams",
        "reset_percent",
        "reset_window_s",
        "websocket",
    )

    def __init__(
        self,
        fields: FieldRules,
        *,
        websocket: bool = False,
        max_concurrent_streams: int = 256,
        max_header_list_size: int = 65_536,
        max_send_buf_size: int = 65_536,
        qpack_table_bytes: int = QPACK_TABLE_BYTES,
        qpack_blocked_streams: int = QPACK_BLOCKED_STREAMS,
        max_client_resets: int = 100,
        max_provoked_resets: int = 100,
        reset_window_s: float = 10.0,
        reset_percent: int = 50,
        reset_min_streams: int = 200,
        max_settings: int = 100,
        max_empty_frames: int = 100,
        max_idle_frames: int = 1000,
        max_encoder_bytes: int = 262_144,
        control_window_s: float = 10.0,
    ) -> None:
        self.fields = fields
        self.websocket = websocket
        """Offer extended CONNECT (RFC 9220)."""
        self.max_concurrent_streams = max_concurrent_streams
        """The transport's limit of streams is meant to be the same; what is above is rejected."""
        self.max_header_list_size = max_header_list_size
        self.max_send_buf_size = max_send_buf_size
        self.qpack_table_bytes = qpack_table_bytes
        """Of each direction's dynamic table, at the most. Zero: there is none."""
        self.qpack_blocked_streams = qpack_blocked_streams
        """Streams that may wait for the peer's insertions into its table (RFC 9204 2.1.2)."""
        self.max_client_resets = max_client_resets
        self.max_provoked_resets = max_provoked_resets
        self.reset_window_s = reset_window_s
        self.reset_percent = reset_percent
        """Zero: off."""
        self.reset_min_streams = reset_min_streams
        self.max_settings = max_settings
        """Frames on the control stream that have a meaning."""
        self.max_pings = 0  # QUIC's, not ours to count
        self.max_empty_frames = max_empty_frames
        self.max_idle_frames = max_idle_frames
        self.max_encoder_bytes = max_encoder_bytes
        """Of insertions into the table, beside what requests account for."""
        self.control_window_s = control_window_s
