"""What is known of one backend's health: facts, each from its own source, and the one state made of them.

Sources: *probes* give a verdict, *outcomes* of real traffic lead to an ejection, an operator's word is the
*admin* state. They are kept apart, so that one never wipes out another: a backend that is enabled again is as
unhealthy as the probes know it to be. What is shown is the first that applies of disabled, draining,
unhealthy, ejected, healthy or unknown.

Knows no pool: how many may be ejected, and who hears of it, is the business of ``health``. No clock either.
"""

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from expressgateway.upstream.backend import SocketAddress

UNKNOWN: Final = "unknown"
HEALTHY: Final = "healthy"
UNHEALTHY: Final = "unhealthy"
EJECTED: Final = "ejected"
DRAINING: Final = "draining"
DISABLED: Final = "disabled"
READY: Final = "ready"
"""The admin state of a backend that nobody has taken out of service. Never shown: the facts are."""

STATES: Final = (UNKNOWN, HEALTHY, UNHEALTHY, EJECTED, DRAINING, DISABLED)
ADMIN_STATES: Final = (READY, DRAINING, DISABLED)
USABLE: Final = frozenset({UNKNOWN, HEALTHY})

CONSECUTIVE: Final = "consecutive_failures"
PERCENT: Final = "failure_percent"
EJECTION_CAUSES: Final = (CONSECUTIVE, PERCENT)

MIN_VOLUME: Final = 10
"""Outcomes in the window below which their share of failures says nothing."""

_BUCKETS: Final = 10  # parts of the window: it covers between nine and ten of them, whatever the traffic
_MAX_COUNT: Final = 10**9  # of streaks; only a threshold is compared with them


class Moment(NamedTuple):
    """One moment on two clocks: intervals are measured on the first, people are shown the second."""

    mono: float
    """Seconds, ``time.monotonic``."""
    wall: float
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class HealthSettings:
    """Active probes of one pool (config: ``health``)."""

    type: str
    path: str
    host: str | None
    expect_status: frozenset[int]
    expect_body: bytes | None
    interval_s: float
    timeout_s: float
    rise: int
    fall: int
    jitter: float
    """Width of the spread as a share of the interval: 0.2 is 0.9 to 1.1 intervals."""


@dataclass(frozen=True, slots=True)
class OutlierSettings:
    """Passive health of one pool (config: ``outlier``). 0 turns a threshold off."""

    consecutive_failures: int
    failure_percent: int
    window_s: float
    ejection_s: float
    max_ejection_s: float
    max_ejection_percent: int
    panic_threshold_percent: int


class LastProbe(NamedTuple):
    ok: bool
    at: float
    """Seconds since 1970."""
    took_ms: float
    detail: str


class BackendHealth:
    """One backend's facts. The methods change facts only; ``shown`` says what they amount to."""

    __slots__ = (
        "_buckets",
        "_doublings",
        "_row",
        "address",
        "admin",
        "admin_cause",
        "cause",
        "ejected_until",
        "ejection_cause",
        "ejection_s",
        "ejections",
        "endpoint",
        "id",
        "last_probe",
        "probes",
        "quiet_from",
        "ramp_from",
        "since",
        "state",
        "streak",
        "verdict",
        "verdict_cause",
        "weight",
    )

    def __init__(
        self,
        id: str,  # noqa: A002 - the word of the configuration
        address: SocketAddress,
        weight: int,
        endpoint: object,
        now: Moment,
    ) -> None:
        self.id = id
        self.address = address
        self.weight = weight
        self.endpoint = endpoint
        """Everything that makes it another backend when it changes, though its id stays."""
        # What is shown; kept by the pool
        self.state = UNKNOWN
        self.since = now
        self.cause = "not judged yet"
        self.ramp_from: float | None = None
        """Since when it is in slow start; None: it is not."""
        # The operator's word
        self.admin = READY
        self.admin_cause = ""
        # Probes
        self.verdict: bool | None = None
        self.verdict_cause = ""
        self._row = 0  # probes in a row that speak against the verdict; of an unknown backend, failures
        self.last_probe: LastProbe | None = None
        self.probes = [0, 0]
        """Failures, successes."""
        # Outcomes
        self.streak = 0
        self._buckets = [[-1, 0, 0] for _ in range(_BUCKETS)]  # part of the window, good, bad
        self.ejected_until: float | None = None
        """Monotonic; None: not ejected."""
        self.ejection_cause = ""
        self.ejection_s = 0.0
        """Length of the last ejection."""
        self.quiet_from = 0.0  # its end
        self._doublings = 0
        self.ejections = dict.fromkeys(EJECTION_CAUSES, 0)

    def succeed(self, old: "BackendHealth") -> None:
        """Take the place of another endpoint that had this id: what was said and counted of the id stays,
        what was learned of the endpoint does not."""
        self.admin, self.admin_cause = old.admin, old.admin_cause
        self.state, self.since, self.cause = old.state, old.since, old.cause
        self.probes, self.ejections = old.probes, old.ejections

    # -- what the facts amount to

    @property
    def is_fit(self) -> bool:
        """Neither probes nor outcomes speak against it."""
        return self.verdict is not False and self.ejected_until is None

    @property
    def is_in_service(self) -> bool:
        """Meant to get new work: counted when shares of the pool are."""
        return self.admin == READY and self.weight > 0

    def shown(self) -> tuple[str, str]:
        """The state, and the cause of the fact that makes it."""
        if self.admin != READY:
            return self.admin, self.admin_cause
        if self.verdict is False:
            return UNHEALTHY, self.verdict_cause
        if self.ejected_until is not None:
            return EJECTED, self.ejection_cause
        return (HEALTHY, self.verdict_cause) if self.verdict else (UNKNOWN, "")

    # -- probes

    def probed(self, result: LastProbe, rise: int, fall: int) -> bool:
        """Take a probe's result; True if the verdict changed.

        The first success makes an unknown backend healthy: it had traffic already, and a decisive answer
        soon is worth more than two further ones. Its first ``fall`` failures in a row make it unhealthy.
        """
        self.last_probe = result
        self.probes[result.ok] += 1
        if result.ok:
            if self.verdict is None:
                return self.judge(True, "its first probe succeeded")
            needed = rise
        else:
            needed = fall
        if self.verdict is result.ok:
            self._row = 0
            return False
        self._row += 1
        if self._row < needed:
            return False
        count = f"{self._row} probe{'' if self._row == 1 else 's'}"
        if result.ok:
            return self.judge(True, f"{count} succeeded in a row")
        last = "with" if self._row == 1 else "in a row, the last one:"
        return self.judge(False, f"{count} failed {last} {result.detail}")

    def judge(self, verdict: bool, cause: str) -> bool:
        self.verdict = verdict
        self.verdict_cause = cause
        self._row = 0
        if verdict:
            self.forget_outcomes()  # they are of the time before
        return True

    def forget_verdict(self) -> None:
        """Nobody probes it any more."""
        self.verdict = None
        self._row = 0
        self.last_probe = None

    # -- outcomes

    def took(
        self, good: int, bad: int, streak: int, cause: str, settings: OutlierSettings, now: float
    ) -> tuple[str, str] | None:
        """Add a worker's report. What should eject the backend, if anything: label and cause."""
        if not good and bad == streak:
            self.streak = min(self.streak + bad, _MAX_COUNT)
        else:
            self.streak = min(streak, bad, _MAX_COUNT)
        if settings.failure_percent:
            self._count(good, bad, settings, now)
        if not bad:
            return None
        if 0 < settings.consecutive_failures <= self.streak:
            return CONSECUTIVE, f"{self.streak} failures in a row, the last one: {cause}"
        if settings.failure_percent:
            all_good, all_bad = self._counted(settings, now)
            total = all_good + all_bad
            if total >= MIN_VOLUME and all_bad * 100 >= settings.failure_percent * total:
                return PERCENT, (
                    f"{all_bad} of {total} exchanges within {settings.window_s:g} seconds failed, "
                    f"the last one: {cause}"
                )
        return None

    def _count(self, good: int, bad: int, settings: OutlierSettings, now: float) -> None:
        part = int(now * _BUCKETS / settings.window_s)
        bucket = self._buckets[part % _BUCKETS]
        if bucket[0] != part:
            bucket[:] = (part, 0, 0)
        bucket[1] += good
        bucket[2] += bad

    def _counted(self, settings: OutlierSettings, now: float) -> tuple[int, int]:
        oldest = int(now * _BUCKETS / settings.window_s) - _BUCKETS + 1
        within = [bucket for bucket in self._buckets if bucket[0] >= oldest]
        return sum(bucket[1] for bucket in within), sum(bucket[2] for bucket in within)

    def forget_outcomes(self) -> None:
        self.streak = 0
        for bucket in self._buckets:
            bucket[:] = (-1, 0, 0)

    # -- ejection

    def eject(self, kind: str, cause: str, settings: OutlierSettings, now: float) -> None:
        """Each ejection lasts twice as long as the one before, up to the cap; each quiet time as long as the
        last one takes a doubling back."""
        if self._doublings:
            quiet = int((now - self.quiet_from) / self.ejection_s)
            self._doublings = max(0, self._doublings - quiet)
        self.ejection_s = min(settings.ejection_s * 2**self._doublings, settings.max_ejection_s)
        if self.ejection_s < settings.max_ejection_s:
            self._doublings += 1
        self.ejected_until = now + self.ejection_s
        self.ejection_cause = f"{cause}; for {self.ejection_s:g} seconds"
        self.ejections[kind] += 1
        self.forget_outcomes()

    def end_ejection(self, now: float) -> None:
        self.ejected_until = None
        self.quiet_from = now
        self.forget_outcomes()

    def forget_ejections(self) -> None:
        """Nobody judges by outcomes any more. The counts stay: they are counters."""
        self.ejected_until = None
        self._doublings = 0
        self.forget_outcomes()

    # -- for people

    def describe(self) -> dict[str, Any]:
        last = self.last_probe
        host, port = self.address[:2]
        return {
            "id": self.id,
            "address": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            "weight": self.weight,
            "state": self.state,
            "since": self.since.wall,
            "cause": self.cause,
            "last_probe": None if last is None else last._asdict(),
            "ejections": dict(self.ejections),
            "is_in_slow_start": self.ramp_from is not None,
        }

    def __repr__(self) -> str:
        return f"<BackendHealth {self.id} {self.state} streak={self.streak}>"
