"""The ceiling of workers' memory: when one of them is to be replaced for it, and how often that may be.

Decisions only: sizes and times go in. A worker is over the limit when it was so at several looks in a row. It
is replaced at once if its place has had no such replacement lately. Another one in the same place waits, the
next one longer (`backoff`): a leak costs a replacement now and then, and a limit that is too low for any
worker costs little more than a sentence. See docs/decisions/0028.
"""

from enum import Enum
from typing import Final

from expressgateway.control.backoff import Backoff

ROW: Final = 3
"""Looks in a row."""
FRESH_S: Final = 10.0
"""A worker that is over the limit at this age has not grown: it needs as much."""
GROWN: Final = 2.0
"""Times its size when it was replaced: a worker that drains and grows to that is killed."""
_CAP: Final = 60  # times the first pause
_GOOD_LIFE: Final = 10  # times the first pause


class Verdict(Enum):
    FINE = "fine"
    """Nothing is to be said or done."""
    OUTGROWN = "outgrown"
    """It is over the limit, for the first time; to be told. Said once of each worker."""
    DUE = "due"
    """It is to be replaced now."""


class Ceiling:
    """The account of one place."""

    __slots__ = ("_backoff", "_due", "_first_pause_s", "_limit_bytes", "_over", "_pid")

    def __init__(self, first_pause_s: float) -> None:
        self._first_pause_s = first_pause_s
        self._begin(0)

    def _begin(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        pause_s = self._first_pause_s
        self._backoff = Backoff(pause_s, _CAP * pause_s, _GOOD_LIFE * pause_s)
        self._pid = 0
        self._over = 0
        self._due: float | None = None

    def look(self, limit_bytes: int, pid: int, rss_bytes: int, age_s: float, now_s: float) -> Verdict:
        """At the worker that is in the place now. `limit_bytes`: 0 for none; another one than at the last
        look begins a new account."""
        if limit_bytes != self._limit_bytes:
            self._begin(limit_bytes)
        if pid != self._pid:
            self._pid, self._over, self._due = pid, 0, None
        if not limit_bytes or rss_bytes <= limit_bytes:
            self._over = 0
            return Verdict.FINE
        self._over += 1
        if self._over < ROW:
            return Verdict.FINE
        if self._due is None:
            self._due = now_s + self._backoff.pause_s(age_s)
            return Verdict.OUTGROWN
        return Verdict.DUE if now_s >= self._due else Verdict.FINE

    def wait_s(self, now_s: float) -> float:
        """Until the worker that is over the limit is due."""
        return max(0.0, self._due - now_s) if self._due is not None else 0.0

    def put_off(self, now_s: float) -> None:
        """It could not be replaced: the next attempt is later."""
        self._due = now_s + max(self._first_pause_s, self._backoff.pause_s(0.0))
