"""Flow control, receiving (RFC 9113 5.2, 6.9): the credit that we grant, and when we grant more.

What we may send is a plain number on the connection and on each stream, for it is spent on every frame.
What we grant is this object: one for the connection, one for each stream that has a body. A window that
is turned over quickly is too small for its path, and doubles.
"""

from typing import Final

QUICK_S: Final = 0.25
"""A window half of which is consumed in less is doubled: it settles at what a path moves in half a second."""


class ReceiveWindow:
    """Credit granted to a peer. ``left`` never exceeds ``size``."""

    __slots__ = ("_since", "left", "owed", "size")

    def __init__(self, size: int, now: float) -> None:
        self.size = size
        self.left = size  # what the peer may still send
        self.owed = 0  # what was consumed and not granted again
        self._since = now - QUICK_S  # seconds: the last grant. What is in flight at first says nothing

    def take(self, size: int) -> bool:
        """Bytes have come. False: more than were granted."""
        self.left -= size
        return self.left >= 0

    def give(self, size: int, now: float, room: int) -> int:
        """Bytes were consumed. Give the increment to announce, 0 for none yet.

        ``room``: by how much the window may still grow; see ``size`` for how much it did.
        """
        owed = self.owed = self.owed + size
        if owed * 2 < self.size:
            return 0
        if room > 0 and now - self._since < QUICK_S:
            growth = min(self.size, room)
            self.size += growth
            owed += growth
        self.left += owed
        self.owed = 0
        self._since = now
        return owed

    def resize(self, difference: int) -> None:
        """The initial size of windows was changed by a setting of ours that the peer has now seen."""
        self.size += difference
        self.left += difference

    def __repr__(self) -> str:
        return f"<ReceiveWindow {self.left}/{self.size} owed={self.owed}>"
