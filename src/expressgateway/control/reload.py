"""A reload, from the file to the running workers, and the account of how it went.

`Reloads` counts what was asked for and what is done, so that whoever asked can tell their own answer from an
earlier one.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

APPLIED: Final = "applied"
UNCHANGED: Final = "unchanged"
INVALID: Final = "invalid"
REFUSED: Final = "refused"
FAILED: Final = "failed"

RESULTS: Final = (APPLIED, UNCHANGED, INVALID, REFUSED, FAILED)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a reload ended."""

    result: str
    """One of `RESULTS`. After any but APPLIED and UNCHANGED the old configuration runs on."""
    report: tuple[str, ...] = ()
    """Sentences or diagnostics for the operator."""

    @property
    def is_success(self) -> bool:
        return self.result in (APPLIED, UNCHANGED)


class Reloads:
    """What became of the reloads so far, and which configuration is in force."""

    __slots__ = ("_wall", "applied_at", "counts", "finished", "last", "requested", "version")

    def __init__(self, wall: Callable[[], float] = time.time) -> None:  # noqa: TID251 - shown to people
        self._wall = wall
        self.version = 1
        """Number of the configuration in force, from 1."""
        self.applied_at = wall()
        """When it came into force, seconds since 1970."""
        self.requested = 0
        """Reloads asked for."""
        self.finished = 0
        """Of those, how many are done; some may have shared one."""
        self.counts = dict.fromkeys(RESULTS, 0)
        self.last: Outcome | None = None

    @property
    def is_due(self) -> bool:
        return self.finished < self.requested

    def finish(self, asked: int, outcome: Outcome) -> None:
        """The reload that answers the first `asked` requests is over."""
        self.finished = asked
        self.last = outcome
        self.counts[outcome.result] += 1
        if outcome.result == APPLIED:
            self.version += 1
            self.applied_at = self._wall()

    def status(self) -> dict[str, Any]:
        last = self.last
        return {
            "requested": self.requested,
            "finished": self.finished,
            "last_result": last.result if last else None,
            "last_report": list(last.report) if last else [],
        }
