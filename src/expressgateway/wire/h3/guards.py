"""The attack counters of one connection: HTTP/2's (``h2.guards``), and what only HTTP/3 has.

Going over a limit ends the connection with H3_EXCESSIVE_LOAD.
"""

from typing import ClassVar, Final

from expressgateway.wire.errors import WireError
from expressgateway.wire.h2.guards import Guards
from expressgateway.wire.h3.frames import excess
from expressgateway.wire.h3.limits import H3Limits

STREAM_BYTES: Final = 8192  # of insertions, that a stream accounts for


class H3Guards(Guards):
    BOMB: ClassVar = "qpack_bomb"

    __slots__ = ("_encoder_bytes", "_encoder_since", "_encoder_streams", "_max_bytes", "_window_s")

    def __init__(self, limits: H3Limits) -> None:
        super().__init__(limits)
        # Wiring
        self._max_bytes = limits.max_encoder_bytes
        self._window_s = limits.control_window_s
        # The windows
        self._encoder_since = 0.0  # seconds
        self._encoder_streams = 0  # opened before the window began
        self._encoder_bytes = 0

    def fault(self, event: str, detail: str) -> WireError:
        return excess(event, detail)

    def on_insertions(self, now: float, size: int) -> None:
        """Bytes on the peer's encoder stream: work that nothing need ever use."""
        if now - self._encoder_since >= self._window_s:
            self._encoder_since = now
            self._encoder_streams = self.streams
            self._encoder_bytes = 0
        self._encoder_bytes += size
        if self._encoder_bytes > self._max_bytes + STREAM_BYTES * (self.streams - self._encoder_streams):
            raise excess("qpack_bomb", "too much for the QPACK table, and no requests that use it")
