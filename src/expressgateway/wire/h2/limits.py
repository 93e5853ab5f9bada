"""What one HTTP/2 connection may cost. One object per listener or backend, shared by its connections.

Memory, per connection, at the worst: ``max_concurrent_streams`` times ``stream_window`` and at most
``max_connection_window`` by which streams' windows have grown, for bodies that a paused exchange has not
taken; ``max_concurrent_streams`` times (``max_send_buf_size`` and one chunk) for bodies that the peer does
not take; one frame, one header block and one header list being read; two header tables of 4 KiB.
"""

from typing import Final

from expressgateway.wire.h2.fields import FieldRules

MAX_STREAM_WINDOW: Final = 1_048_576
MAX_CONNECTION_WINDOW: Final = 8_388_608


class H2Limits:
    """The defaults are those of the configuration. Zero means "off" where it says so."""

    __slots__ = (
        "connection_window",
        "control_window_s",
        "fields",
        "keep_alive_interval_s",
        "keep_alive_timeout_s",
        "max_client_resets",
        "max_concurrent_streams",
        "max_connection_window",
        "max_continuation_frames",
        "max_empty_frames",
        "max_header_list_size",
        "max_idle_frames",
        "max_pings",
        "max_provoked_resets",
        "max_send_buf_size",
        "max_settings",
        "max_stream_window",
        "reset_min_streams",
        "reset_percent",
        "reset_window_s",
        "stream_window",
        "websocket",
    )

    def __init__(
        self,
        fields: FieldRules,
        *,
        websocket: bool = False,
        max_concurrent_streams: int = 256,
        max_header_list_size: int = 65_536,
        max_continuation_frames: int = 16,
        max_send_buf_size: int = 65_536,
        stream_window: int = 65_535,
        connection_window: int = 1_048_576,
        max_stream_window: int = MAX_STREAM_WINDOW,
        max_connection_window: int = MAX_CONNECTION_WINDOW,
        max_client_resets: int = 100,
        max_provoked_resets: int = 100,
        reset_window_s: float = 10.0,
        reset_percent: int = 50,
        reset_min_streams: int = 200,
        max_settings: int = 100,
        max_pings: int = 50,
        max_empty_frames: int = 100,
        max_idle_frames: int = 1000,
        control_window_s: float = 10.0,
        keep_alive_interval_s: float = 30.0,
        keep_alive_timeout_s: float = 30.0,
    ) -> None:
        self.fields = fields
        self.websocket = websocket
        """Offer extended CONNECT (RFC 8441)."""
        self.max_concurrent_streams = max_concurrent_streams
        self.max_header_list_size = max_header_list_size
        self.max_continuation_frames = max_continuation_frames
        self.max_send_buf_size = max_send_buf_size
        self.stream_window = stream_window
        self.connection_window = max(connection_window, 65_535)
        self.max_stream_window = max(max_stream_window, stream_window)
        self.max_connection_window = max(max_connection_window, self.connection_window)
        self.max_client_resets = max_client_resets
        self.max_provoked_resets = max_provoked_resets
        self.reset_window_s = reset_window_s
        self.reset_percent = reset_percent
        """Zero: off."""
        self.reset_min_streams = reset_min_streams
        self.max_settings = max_settings
        self.max_pings = max_pings
        self.max_empty_frames = max_empty_frames
        self.max_idle_frames = max_idle_frames
        self.control_window_s = control_window_s
        self.keep_alive_interval_s = keep_alive_interval_s
        """Zero: no PING is sent."""
        self.keep_alive_timeout_s = keep_alive_timeout_s
