"""How fast an upload comes. A trickle that never stops is as bad as a stall."""


class UploadRate:
    """Measures an upload over whole windows, so that one late packet is no attack."""

    __slots__ = ("_bytes_before", "_since")

    def __init__(self, since: float) -> None:
        """``since``: when the upload began, in seconds."""
        self._since = since
        self._bytes_before = 0

    def begin(self, now: float, body_bytes: int) -> None:
        """A new window: also while the client is held up, for which it is not to blame."""
        self._since = now
        self._bytes_before = body_bytes

    def is_too_slow(self, now: float, body_bytes: int, *, min_bps: int, window_s: float) -> bool:
        """Whether the window that ends now saw less than ``min_bps``; False within a window."""
        window = now - self._since
        if window < window_s:
            return False
        if body_bytes - self._bytes_before < min_bps * window:
            return True
        self.begin(now, body_bytes)
        return False
