"""What the codec needs of a QUIC connection (RFC 9000). The connection's owner implements it.

None of these calls raises, for a stream that is gone neither. The owner gives what a stream brings in
order, and after a stream's end or reset nothing more of that stream.
"""

from typing import Protocol


class Transport(Protocol):
    def open_stream(self, unidirectional: bool) -> int | None:
        """Give a new local stream's id. ``None``: the peer allows no more now."""

    def send(self, stream_id: int, data: bytes, end: bool) -> None:
        """Queue bytes, and the end of the stream behind them."""

    def reset(self, stream_id: int, code: int) -> None:
        """RESET_STREAM (RFC 9000 19.4): what is queued is dropped. Idempotent."""

    def stop(self, stream_id: int, code: int) -> None:
        """STOP_SENDING (RFC 9000 19.5). What comes all the same is still given."""

    def consumed(self, stream_id: int, size: int) -> None:
        """That many bytes of a stream were used: credit for them may be granted again."""

    def queued(self, stream_id: int) -> int:
        """Bytes given to ``send`` that have not been sent for the first time yet."""

    def close(self, code: int, reason: str) -> None:
        """CONNECTION_CLOSE with an application error (RFC 9000 19.19): at once, what is queued is dropped."""
