"""The drain: its phases, how long it may take, and what is said while it goes on.

SETTLE: readiness is off, connections are still accepted, so that whoever watches readiness stops sending
first. FINISH: nothing is accepted; what is open has the listeners' budgets to end.

Times come in as arguments.
"""

from typing import Final

from expressgateway.config.schema import Config

MARGIN_S: Final = 2.0
"""Beyond the largest budget: the workers keep their own time and end by themselves; this is for those that
do not."""

SETTLE: Final = "settle"
FINISH: Final = "finish"


def settle_s(config: Config) -> float:
    return config.runtime.readiness_settle_ms / 1000


def budget_s(config: Config) -> float:
    """From the order to drain until workers that are still there are killed."""
    timeouts = [listener.drain_timeout_ms for listener in config.listeners]
    if config.passthrough is not None:
        timeouts.append(config.runtime.drain_timeout_ms)
    return max(timeouts, default=config.runtime.drain_timeout_ms) / 1000 + MARGIN_S


class Progress:
    """How far a drain is: for the status line and for ``shutdown_drain_seconds``."""

    __slots__ = ("_began", "_phase", "_took")

    def __init__(self) -> None:
        self._phase: str | None = None
        self._began = 0.0
        self._took: dict[str, float] = {}

    def enter(self, phase: str, now: float) -> None:
        self.leave(now)
        self._phase = phase
        self._began = now

    def leave(self, now: float) -> None:
        if self._phase is not None:
            self._took[self._phase] = now - self._began
            self._phase = None

    def seconds(self, now: float) -> dict[str, float]:
        """By phase, the one under way up to now."""
        under_way = {} if self._phase is None else {self._phase: now - self._began}
        return self._took | under_way

    def sentence(self, open_: dict[str, int], limit_s: float, now: float) -> str:
        """What is still open, for the line that is logged every second."""
        left_s = max(0.0, limit_s - (now - self._began))
        count = sum(open_.values())
        listed = ", ".join(f"{name} {number}" for name, number in sorted(open_.items()) if number)
        what = f"{count} connection{'' if count == 1 else 's'} open{f' ({listed})' if listed else ''}"
        doing = "unready and still accepting" if self._phase == SETTLE else "draining"
        return f"{doing}: {what}, at most {left_s:.0f} seconds left"
