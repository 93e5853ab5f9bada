"""What a QUIC connection tells, and the words for its end: what engine, connection and session have in
common.
"""

from typing import Final, Protocol

# RFC 9000 20.1
NO_ERROR: Final = 0x0
INTERNAL_ERROR: Final = 0x1
CONNECTION_REFUSED: Final = 0x2
FLOW_CONTROL_ERROR: Final = 0x3
STREAM_STATE_ERROR: Final = 0x5
PROTOCOL_VIOLATION: Final = 0xA
CRYPTO_BUFFER_EXCEEDED: Final = 0xD
NO_VIABLE_PATH: Final = 0x10
VIOLATIONS: Final = range(0x3, 0x10)  # whoever sends such has erred; FLOW_CONTROL_ERROR to AEAD_LIMIT_REACHED

Address = tuple[str, int] | tuple[str, int, int, int]


class Ended:
    """Why a connection is over. ``code`` is the wire's."""

    __slots__ = ("code", "errno", "is_application", "is_ours", "reason")

    def __init__(
        self, code: int, reason: str, *, is_application: bool = False, is_ours: bool = False, errno: int = 0
    ) -> None:
        """``errno``: the network's, where that is what ended it."""
        self.errno = errno
        self.code = code
        self.reason = reason
        self.is_application = is_application
        self.is_ours = is_ours

    @property
    def is_violation(self) -> bool:
        """Whether the peer broke the transport's rules, or asked too much of it."""
        return self.is_ours and not self.is_application and self.code in VIOLATIONS

    def __str__(self) -> str:
        who = "closed" if self.is_ours else "the peer closed"
        kind = "application error" if self.is_application else "error"
        reason = f": {self.reason}" if self.reason else ""
        return f"{who} with {kind} {self.code:#x}{reason}"


class EngineSink(Protocol):
    """What an engine tells. Nothing follows ``on_ended``."""

    def on_open(self) -> None:
        """The handshake is complete."""

    def on_stream_data(self, stream_id: int, data: bytes, end: bool) -> None: ...
    def on_stream_reset(self, stream_id: int, code: int) -> None: ...
    def on_stream_stop(self, stream_id: int, code: int) -> None:
        """STOP_SENDING has come; the engine has answered it with RESET_STREAM already (RFC 9000 3.5)."""

    def on_streams_allowed(self) -> None:
        """The peer allows more streams than before."""

    def on_datagram(self, data: bytes) -> None: ...
    def on_ended(self, ended: Ended) -> None: ...


class EngineOwner(Protocol):
    """Who gives the engine its datagrams."""

    def wake(self) -> None:
        """There is something to transmit that no call of the owner's has led to."""

    def on_cid_issued(self, cid: bytes) -> None: ...
    def on_cid_retired(self, cid: bytes) -> None:
        """Both: a connection ID of ours that the peer may use."""


class SinkAndOwner(EngineSink, EngineOwner, Protocol):
    """Both in one."""
