"""The limits of a WebSocket tunnel (RFC 6455), enforced without touching what passes.

Both directions are relayed byte for byte as they come; a follower per direction steps from frame header to
frame header. When a limit is passed the gateway ends the session with a Close frame of its own, to each
side at the next frame boundary of what that side has been sent, and closes.
"""

import os
from typing import Final

from expressgateway.proxy.service import WebSocketLimits
from expressgateway.wire.ws import (
    GOING_AWAY,
    POLICY_VIOLATION,
    FrameFollower,
    close_frame,
)

CLIENT: Final = 0
BACKEND: Final = 1


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
