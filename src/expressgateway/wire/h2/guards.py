"""The attack counters of one connection, in either role.

Each count has its limit and its window in ``H2Limits``; going over it raises the fault that ends the
connection with ENHANCE_YOUR_CALM. A window is fixed, not sliding: it begins with the first event after the
last one ended, so that a count costs an addition and a comparison.

What a peer sends for a reason is not counted. A PING, like others that move nothing, is accounted for by
``WORTH_BYTES`` of body that moved in either direction since the last one (bandwidth probes of gRPC), or by a
request. A WINDOW_UPDATE is by as much, and by each DATA frame that we sent, however small: some peers answer
every one with two, for the stream and for the connection. But not by a dribble: a frame of less than
``DRIBBLE_BYTES`` that is so short because the peer's window is, which is what each of its updates provokes
(CVE-2019-9511).
"""

from typing import ClassVar, Final, Protocol

from expressgateway.wire.errors import WireError
from expressgateway.wire.h2.frames import calm

WORTH_BYTES: Final = 512
DRIBBLE_BYTES: Final = 64
UPDATES_A_FRAME: Final = 2  # WINDOW_UPDATEs that a DATA frame of ours accounts for, besides its bytes
_SAVED_BYTES: Final = 128 * WORTH_BYTES  # what a long transfer may save up for later
MAX_OVERSIZED: Final = 3  # header lists over the limit in one window; the next ends the connection


class GuardLimits(Protocol):
    """What of a connection's limits the counters need; the same in HTTP/2 and HTTP/3."""

    control_window_s: float
    max_client_resets: int
    max_empty_frames: int
    max_idle_frames: int
    max_pings: int
    max_provoked_resets: int
    max_settings: int
    reset_min_streams: int
    reset_percent: int
    reset_window_s: float


class Guards:
    """The counters. ``fault`` makes the connection error of the version that counts."""

    BOMB: ClassVar = "hpack_bomb"

    __slots__ = (
        "_client_resets",
        "_control_since",
        "_empty",
        "_idle",
        "_limits",
        "_oversized",
        "_pings",
        "_provoked",
        "_reset_since",
        "_seen_moved",
        "_settings",
        "_updates",
        "moved",
        "resets",
        "sent_frames",
        "streams",
    )

    def __init__(self, limits: GuardLimits) -> None:
        # Wiring
        self._limits = limits
        # Connection
        self.moved = 0  # bytes of bodies, both ways; a request counts for two frames
        self._seen_moved = 0  # of them, what frames were accounted for by; WINDOW_UPDATEs are apart
        self.sent_frames = 0  # DATA frames of ours that had a body, without dribble
        self._updates = 0  # WINDOW_UPDATEs that were accounted for
        self.streams = 0  # opened by the peer
        self.resets = 0  # of them, reset by the peer
        # The windows
        self._control_since = 0.0  # seconds
        self._settings = 0
        self._pings = 0
        self._empty = 0
        self._idle = 0
        self._reset_since = 0.0
        self._client_resets = 0
        self._provoked = 0
        self._oversized = 0

    def fault(self, event: str, detail: str) -> WireError:
        return calm(event, detail)

    def _control(self, now: float) -> None:
        if now - self._control_since >= self._limits.control_window_s:
            self._control_since = now
            self._settings = self._pings = self._empty = self._idle = 0

    def _reset(self, now: float) -> None:
        if now - self._reset_since >= self._limits.reset_window_s:
            self._reset_since = now
            self._client_resets = self._provoked = self._oversized = 0

    def _is_worth(self) -> bool:
        """Whether something moved since that accounts for one more frame."""
        unspent = self.moved - self._seen_moved
        if unspent < WORTH_BYTES:
            return False
        self._seen_moved = self.moved - min(unspent, _SAVED_BYTES) + WORTH_BYTES
        return True

    def on_settings(self, now: float) -> None:
        self._control(now)
        self._settings += 1
        if self._settings > self._limits.max_settings:
            raise self.fault("settings_flood", "too many SETTINGS frames")

    def on_ping(self, now: float) -> None:
        if self._is_worth():
            return
        self._control(now)
        self._pings += 1
        if self._pings > self._limits.max_pings:
            raise self.fault("ping_flood", "too many PING frames")

    def on_empty(self, now: float) -> None:
        """A frame that carries nothing and ends nothing."""
        self._control(now)
        self._empty += 1
        if self._empty > self._limits.max_empty_frames:
            raise self.fault("empty_frame_flood", "too many frames without content or end")

    def on_window_update(self, now: float) -> None:
        """Credit for what we send.

        What accounts for it does not lapse: it may answer DATA that has stood in its peer's buffers for long,
        and how much those hold is the peer's choice. So all that a connection can send uncounted is in
        proportion to what we sent on it.
        """
        if self._updates < self.moved // WORTH_BYTES + self.sent_frames * UPDATES_A_FRAME:
            self._updates += 1
        else:
            self._count_idle(now, "window_update_flood")

    def on_idle(self, now: float, event: str) -> None:
        """A frame that moves nothing by itself: PRIORITY, one for a closed stream."""
        if not self._is_worth():
            self._count_idle(now, event)

    def _count_idle(self, now: float, event: str) -> None:
        self._control(now)
        self._idle += 1
        if self._idle > self._limits.max_idle_frames:
            raise self.fault(event, "too many frames while no data moves")

    def on_client_reset(self, now: float, was_answered: bool) -> None:
        """The client reset a stream that was under way."""
        limits = self._limits
        self.resets += 1
        if not was_answered:
            self._reset(now)
            self._client_resets += 1
            if self._client_resets > limits.max_client_resets:
                raise self.fault("rapid_reset", "too many streams reset before they were answered")
        if (
            limits.reset_percent
            and self.streams > limits.reset_min_streams
            and self.resets * 100 > self.streams * limits.reset_percent
        ):
            raise self.fault("rapid_reset", "too many of all streams reset")

    def on_provoked_reset(self, now: float) -> None:
        """We had to reset a stream for what the peer sent."""
        self._reset(now)
        self._provoked += 1
        if self._provoked > self._limits.max_provoked_resets:
            raise self.fault("made_you_reset", "too many streams that had to be reset")

    def on_oversized(self, now: float) -> None:
        """A header list over the limit was decoded."""
        self._reset(now)
        self._oversized += 1
        if self._oversized > MAX_OVERSIZED:
            raise self.fault(self.BOMB, "too many header lists over the limit")
