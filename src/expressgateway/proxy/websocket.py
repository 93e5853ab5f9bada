"""The limits of a WebSocket tunnel (RFC 6455), enforced without touching what passes.

Both directions are relayed byte for byte as they come; a follower per direction steps from frame header to
frame header. When a limit is passed the gateway ends the session with a Close frame of its own, to each
side at the next frame boundary of what that side has been sent, and closes. A client whose frames break the
protocol is told a little later than its backend (``Parting``).
"""

import os
from typing import Final

from expressgateway.proxy.service import WebSocketLimits
from expressgateway.wire.ws import (
    GOING_AWAY,
    POLICY_VIOLATION,
    PROTOCOL_ERROR,
    FrameFollower,
    close_frame,
)

CLIENT: Final = 0
BACKEND: Final = 1

PARTING_S: Final = 0.5
"""How long a backend has to answer what a client sent before its frames broke the protocol. Seconds."""


class Verdict:
    """The session is over: the code, why, and whether each side may still be sent a Close frame."""

    __slots__ = ("code", "kind", "reason")

    def __init__(self, code: int, kind: str, reason: str) -> None:
        self.code = code
        self.kind = kind
        self.reason = reason


class Tunnel:
    """One session. Follows what comes ``CLIENT`` and ``BACKEND`` send."""

    __slots__ = ("_followers", "_limits", "_mid_frame_since", "_pings", "_window_ends", "moved_at")

    def __init__(self, limits: WebSocketLimits, now: float) -> None:
        self._limits = limits
        self._followers = (
            FrameFollower(is_client=True, max_message_bytes=limits.max_message_bytes),
            FrameFollower(is_client=False, max_message_bytes=limits.max_message_bytes),
        )
        self._mid_frame_since: list[float] = [0.0, 0.0]  # seconds; 0: at a boundary
        self._pings = 0
        self._window_ends = now + limits.pings_window_s
        self.moved_at = now

    def follow(self, side: int, data: bytes, now: float) -> Verdict | None:
        """Look at bytes that ``side`` sent, before they are passed on."""
        self.moved_at = now
        follower = self._followers[side]
        violation = follower.feed(data)
        if violation is not None:
            return Verdict(violation.code, f"websocket_{violation.code}", violation.reason)
        if not follower.is_mid_frame:
            self._mid_frame_since[side] = 0.0
        else:
            self._mid_frame_since[side] = now
        if side == CLIENT:
            if now >= self._window_ends:
                self._pings = 0
                self._window_ends = now + self._limits.pings_window_s
            self._pings += follower.take_pings()
            if self._pings > self._limits.pings:
                return Verdict(POLICY_VIOLATION, "websocket_ping_flood", "too many pings")
        return None

    def sweep(self, now: float, is_client_paused: bool, is_backend_paused: bool) -> Verdict | None:
        """Look at the clock. Who is not read from cannot be late."""
        if now - self.moved_at > self._limits.idle_s:
            return Verdict(GOING_AWAY, "websocket_idle", "idle for too long")
        since = self._mid_frame_since
        for side, is_paused in ((CLIENT, is_client_paused), (BACKEND, is_backend_paused)):
            if since[side] and is_paused:
                since[side] = now
            elif since[side] and now - since[side] > self._limits.frame_s:
                return Verdict(POLICY_VIOLATION, "websocket_frame_stall", "a frame that does not end")
        return None

    def part(self, verdict: Verdict, now: float) -> "Parting | None":
        """The client did what ``verdict`` says, and the backend is told: have it heard out.

        ``None`` where that is not due: a client that passes a limit is cut off at once, and there is nothing
        to wait for where the backend's Close frame is on its way. Nor may the client stand in a header.
        """
        backend = self._followers[BACKEND]
        if verdict.code != PROTOCOL_ERROR:
            return None
        if backend.close_at is not None or backend.header_bytes or backend.violation is not None:
            return None
        return Parting(backend, verdict, now + PARTING_S)

    def sound_part(self, side: int, data: bytes) -> bytes:
        """Of the chunk that ``side`` sent last, what may still be passed on: whole frames."""
        return data[: max(0, self._followers[side].boundary)]

    def farewell(self, verdict: Verdict, side: int, *, after_chunk: bool) -> bytes:
        """The Close frame towards ``side``, or nothing where it would land inside another frame.

        ``after_chunk``: of the other side's last chunk only the sound part was passed on.
        """
        sender = self._followers[1 - side]
        is_between = sender.boundary >= 0 if after_chunk else sender.is_between_frames
        if not is_between or sender.saw_close:
            return b""
        mask = os.urandom(4) if side == BACKEND else None
        return close_frame(verdict.code, verdict.reason, mask)


class Parting:
    """What a backend still says to a client that broke the protocol: its answers to what came before that.

    The client has them, whole frames, up to the backend's own Close frame; in that one's place goes the
    gateway's, whose code says what happened. It lasts ``PARTING_S`` at most, and what the client sends
    meanwhile is dropped.
    """

    __slots__ = ("_ends_at", "_follower", "_held", "_verdict", "is_over")

    def __init__(self, follower: FrameFollower, verdict: Verdict, ends_at: float) -> None:
        self._follower = follower
        self._verdict = verdict
        self._ends_at = ends_at
        self._held = b""  # of a header that may be a Close frame's; under MAX_HEADER_BYTES
        self.is_over = False

    def is_due(self, now: float) -> bool:
        return now > self._ends_at

    def take(self, data: bytes) -> bytes:
        """Of the backend's next chunk, what the client may be sent."""
        follower = self._follower
        violation = follower.feed(data)
        held = self._held
        whole = held + data
        if violation is not None:
            self.is_over = True
            end = len(held) + follower.boundary if follower.boundary >= 0 else 0
        elif follower.close_at is not None:
            self.is_over = True
            end = len(held) + follower.close_at
        else:
            end = len(whole) - follower.header_bytes
        self._held = whole[end:] if not self.is_over else b""
        return whole[:end]

    def farewell(self) -> bytes:
        """The Close frame to the client, or nothing where it would land inside another frame."""
        if not self.is_over and self._follower.payload_left:
            return b""
        return close_frame(self._verdict.code, self._verdict.reason)
