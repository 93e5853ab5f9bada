"""What an HTTP listener allows its clients: times, sizes, headers, and the protocols that ride on HTTP."""

from typing import Annotated, Literal

from pydantic import Field

from expressgateway.config.values import LIST, Block, HeaderValue, Matches, Range


class AltSvc(Block):
    """Tells clients of HTTP/1.1 and HTTP/2 where HTTP/3 is served (RFC 7838)."""

    h3_port: Annotated[int, Range(1, 65535)] = Field(description="UDP port on which HTTP/3 is served.")
    max_age: Annotated[int, Range(0, unit="seconds")] = Field(
        default=3600, description="Seconds for which clients may remember it."
    )


class Compression(Block):
    """Responses compressed on their way to clients that accept it."""

    algorithms: Annotated[tuple[Literal["zstd", "br", "gzip"], ...], LIST] = Field(
        default=("zstd", "br", "gzip"), min_length=1, description="Content codings, most preferred first."
    )
    min_bytes: Annotated[int, Range(0, unit="bytes")] = Field(
        default=1024, description="Smaller bodies are left as they are."
    )
    types: Annotated[tuple[Annotated[str, Matches("a media type", r"[\w.+-]+/[\w.+*-]+")], ...], LIST] = (
        Field(
            default=("text/*", "application/json", "application/javascript", "image/svg+xml"),
            min_length=1,
            description="Media types that are compressed.",
        )
    )


class Http(Block):
    """Times and sizes of HTTP exchanges, and the headers the gateway adds."""

    header_timeout_ms: Annotated[int, Range(1, unit="milliseconds")] = Field(
        default=10_000,
        description="From the first byte of a request head to its end. "
        "`runtime.watchdog.header_deadline_ms` holds if it is smaller.",
    )
    body_timeout_ms: Annotated[int, Range(1, unit="milliseconds")] = Field(
        default=30_000, description="No progress in a body, in either direction."
    )
    total_timeout_ms: Annotated[int, Range(1, unit="milliseconds", zero="off")] = Field(
        default=60_000,
        description="One exchange, to its response head. Never the life of a connection.",
    )
    head_timeout_ms: Annotated[int, Range(1, unit="milliseconds")] = Field(
        default=60_000, description="From the end of the upload to the response head."
    )
    idle_timeout_ms: Annotated[int, Range(1, unit="milliseconds")] = Field(
        default=75_000, description="A keep-alive connection without an exchange."
    )
    max_request_body_bytes: Annotated[int, Range(1, unit="bytes", zero="unlimited")] = Field(
        default=67_108_864, description="Larger request bodies are answered with 413."
    )
    max_header_bytes: Annotated[int, Range(1, unit="bytes")] = Field(
        default=65_536, description="Larger request heads are answered with 431."
    )
    max_header_count: Annotated[int, Range(1)] = Field(
        default=256, description="Request heads with more fields are answered with 431."
    )
    server_header: HeaderValue = Field(
        default="expressgateway", description="`Server` of responses whose backend set none."
    )
    via: bool = Field(default=True, description="Append `Via` to requests and responses.")
    forwarded: Literal["x-forwarded", "forwarded", "both", "none"] = Field(
        default="x-forwarded",
        description="How backends learn of the client: `X-Forwarded-*`, `Forwarded` (RFC 7239), "
        "both, or not.",
    )
    compression: Compression | None = Field(default=None, description="Response compression; absent = none.")


class H2Security(Block):
    """HTTP/2 limits and the thresholds of its attack detectors."""

    max_pending_accept_reset_streams: Annotated[int, Range(1)] = Field(
        default=100, description="Rapid reset: streams a client resets before they are answered, per window."
    )
    max_local_error_reset_streams: Annotated[int, Range(1)] = Field(
        default=100, description="Made-you-reset: resets a client provokes from the gateway, per window."
    )
    reset_window_seconds: Annotated[int, Range(1, 3600, "seconds")] = Field(
        default=10, description="Window of the two reset limits."
    )
    reset_percent: Annotated[int, Range(1, 100, "percent", zero="off")] = Field(
        default=50,
        description="Share of a connection's streams that may be reset, once past `reset_min_streams`.",
    )
    reset_min_streams: Annotated[int, Range(1)] = Field(
        default=200, description="Streams after which `reset_percent` counts."
    )
    max_concurrent_streams: Annotated[int, Range(1, 2**31 - 1)] = Field(
        default=256, description="Streams open at once; further ones are refused."
    )
    max_header_list_size: Annotated[int, Range(1, 2**31 - 1, "bytes")] = Field(
        default=65_536, description="Size of a decoded head."
    )
    max_continuation_frames: Annotated[int, Range(1)] = Field(
        default=16, description="CONTINUATION frames of one head."
    )
    max_settings_frames: Annotated[int, Range(1)] = Field(
        default=100, description="SETTINGS frames per `control_window_seconds`."
    )
    max_ping_frames: Annotated[int, Range(1)] = Field(
        default=50, description="PING frames per `control_window_seconds`."
    )
    max_empty_frames: Annotated[int, Range(1)] = Field(
        default=100, description="Frames without content or end, per `control_window_seconds`."
    )
    max_idle_window_updates: Annotated[int, Range(1)] = Field(
        default=1000,
        description="WINDOW_UPDATE and PRIORITY frames while no data moves, per `control_window_seconds`.",
    )
    control_window_seconds: Annotated[int, Range(1, 3600, "seconds")] = Field(
        default=10, description="Window of the frame limits."
    )
    max_send_buf_size: Annotated[int, Range(1, 2**31 - 1, "bytes")] = Field(
        default=65_536, description="Response bytes held for one stream."
    )
    keep_alive_interval_ms: Annotated[int, Range(1, unit="milliseconds", zero="off")] = Field(
        default=30_000, description="Silence after which a PING is sent."
    )
    keep_alive_timeout_ms: Annotated[int, Range(1, unit="milliseconds")] = Field(
        default=30_000, description="Wait for its answer; then the connection is closed."
    )
    initial_stream_window_size: Annotated[int, Range(1, 2**31 - 1, "bytes")] = Field(
        default=65_535, description="Flow control window of a stream (RFC 9113 6.9.2)."
    )
    initial_connection_window_size: Annotated[int, Range(65_535, 2**31 - 1, "bytes")] = Field(
        default=1_048_576, description="Flow control window of a connection."
    )


class WebSocket(Block):
    """WebSocket (RFC 6455); without this block an upgrade is not offered."""

    enabled: bool = Field(default=True, description="`false` is the same as leaving the block out.")
    idle_timeout_seconds: Annotated[int, Range(1, unit="seconds")] = Field(
        default=60, description="Silence in both directions; then the connection is closed with 1001."
    )
    max_message_size_bytes: Annotated[int, Range(1, unit="bytes")] = Field(
        default=16_777_216, description="Larger messages close the connection with 1009."
    )
    ping_rate_limit_per_window: Annotated[int, Range(1)] = Field(
        default=50, description="Client pings per window; more close the connection with 1008."
    )
    ping_rate_limit_window_seconds: Annotated[int, Range(1, unit="seconds")] = Field(
        default=10, description="Window of `ping_rate_limit_per_window`."
    )
    read_frame_timeout_seconds: Annotated[int, Range(1, unit="seconds")] = Field(
        default=30, description="A direction stuck in the middle of a frame; closed with 1008."
    )
    h2_extended_connect: bool = Field(default=False, description="Offer WebSocket over HTTP/2 (RFC 8441).")
    h3_extended_connect: bool = Field(default=False, description="Offer WebSocket over HTTP/3 (RFC 9220).")


class Grpc(Block):
    """gRPC awareness; without this block gRPC is forwarded as plain HTTP."""

    enabled: bool = Field(default=True, description="`false` is the same as leaving the block out.")
    max_deadline_seconds: Annotated[int, Range(1, unit="seconds")] = Field(
        default=300, description="Longer `grpc-timeout` values are clamped to it."
    )
    health_synthesized: bool = Field(
        default=True, description="Answer `grpc.health.v1.Health` from the pool's own health."
    )
