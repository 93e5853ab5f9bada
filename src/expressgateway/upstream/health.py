"""The health of one pool: who may be given work, and why not.

A state machine without I/O or clock: members, probe results, outcomes, an operator's word and the passing of
time come in as calls, each with its ``Moment``; *events* (sentences for the log) and the pool's part of the
``health`` message come out. The facts of each backend are in ``health_backend``; this is what needs the whole
pool:

- **The cap.** At most ``max_ejection_percent`` of the backends in service are ejected at once, rounded down,
  but one always may be where that is not 0 and the pool has more than one. Failures beyond it are remembered:
  the next one ejects, once there is room.
- **Panic.** When fewer than ``panic_threshold_percent`` of the backends in service are fit, the health of
  the pool says more about who judges than about the backends: all of them are used, and none is in slow start
  then, for it would hand the work to the sick ones.
- **Slow start.** A backend *ramps* since it joined a pool that had backends already, or since it came back
  into use. The ramp is remembered here, and not where it is applied, so that it survives reloads and workers.

*In service* are backends with a weight that no operator has drained or disabled; *fit* are those that neither
probes nor outcomes speak against; unknown ones are.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from expressgateway.upstream.backend import SocketAddress
from expressgateway.upstream.health_backend import (
    ADMIN_STATES,
    DISABLED,
    DRAINING,
    EJECTED,
    HEALTHY,
    READY,
    UNHEALTHY,
    USABLE,
    BackendHealth,
    HealthSettings,
    LastProbe,
    Moment,
    OutlierSettings,
)

DEFAULT_PANIC_PERCENT: Final = 50
"""The threshold of a pool that is probed but has no ``outlier`` table."""

MAX_WORDS: Final = 1024
"""Addresses of names that are away for now, and drained or disabled all the same; more are forgotten."""

PANIC: Final = "panic"
NO_PANIC: Final = "no panic"


class Member(NamedTuple):
    """One backend of the pool as the configuration and DNS have it now."""

    id: str
    address: SocketAddress
    weight: int
    endpoint: object
    """See ``BackendHealth.endpoint``."""


class Event(NamedTuple):
    """Something to be told once."""

    text: str
    """A sentence with its cause."""
    is_bad: bool
    backend: str
    """Its id; empty if it is of the pool as such."""
    state: str
    cause: str


class PoolHealth:
    """One pool's health. No method raises but as it says."""

    __slots__ = (
        "_disabled",
        "_draining",
        "_ejected",
        "_ending",
        "_events",
        "_fit",
        "_health",
        "_in_service",
        "_members",
        "_outlier",
        "_slow_start_s",
        "_unfit",
        "_words",
        "is_panicking",
        "name",
        "panic_since",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_panicking = False
        self.panic_since: Moment | None = None
        """Since when it panics, or no longer does; None: it never did."""
        self._health: HealthSettings | None = None
        self._outlier: OutlierSettings | None = None
        self._slow_start_s = 0.0
        self._members: dict[str, BackendHealth] = {}
        self._events: list[Event] = []  # taken by the caller after each call
        # Ids, so that shares and messages need no walk over a thousand backends at each change
        self._in_service: set[str] = set()
        self._fit: set[str] = set()  # of those in service
        self._ejected: set[str] = set()  # of those in service
        self._unfit: set[str] = set()
        self._draining: set[str] = set()
        self._disabled: set[str] = set()
        self._words: dict[str, tuple[str, str]] = {}  # an operator's, on addresses that are away: MAX_WORDS
        self._ending: set[str] = set()  # an ejection or a ramp of theirs will be over

    # -- who is there

    def adopt(
        self,
        members: Iterable[Member],
        health: HealthSettings | None,
        outlier: OutlierSettings | None,
        slow_start_s: float,
        now: Moment,
    ) -> None:
        """The pool's backends and settings from now on. Who stays keeps its state; who leaves is forgotten.

        A backend whose endpoint changed is another one behind the old id: only the operator's word stays.
        """
        has_judges_changed = outlier != self._outlier
        self._health, self._outlier, self._slow_start_s = health, outlier, slow_start_s
        had_members = bool(self._members)
        before, self._members = self._members, {}
        for wanted in members:
            member = before.pop(wanted.id, None)
            if member is None or member.endpoint != wanted.endpoint:
                old = member
                member = BackendHealth(wanted.id, wanted.address, wanted.weight, wanted.endpoint, now)
                if old is not None:
                    member.succeed(old)
                elif wanted.id in self._words:
                    member.admin, member.admin_cause = self._words.pop(wanted.id)
                if had_members and slow_start_s:
                    member.ramp_from = now.mono
            member.weight = wanted.weight
            if health is None:
                member.forget_verdict()
            if outlier is None:
                member.forget_ejections()
            elif has_judges_changed:
                member.forget_outcomes()  # they were counted in another window
            if not slow_start_s:
                member.ramp_from = None
            self._members[wanted.id] = member
            self._settle(member, "its settings changed", now)
        for gone, member in before.items():
            if member.admin != READY and "#" in gone and len(self._words) < MAX_WORDS:
                # An address that a name does not resolve to now: it may come back with the next answer.
                self._words[gone] = member.admin, member.admin_cause
            self._forget(gone)
        self._review(now)

    # -- what is heard of them

    def probed(self, id_: str, result: LastProbe, now: Moment) -> None:
        """A probe is over. One of a backend that is gone is ignored."""
        member, health = self._members.get(id_), self._health
        if member is not None and health is not None and member.probed(result, health.rise, health.fall):
            self._settle(member, member.verdict_cause, now)
            self._review(now)

    def took(self, id_: str, good: int, bad: int, streak: int, cause: str, now: Moment) -> None:
        """A worker's report of one backend: exchanges that went well, that failed, and how many of those
        since the last good one. Reports of who is gone, or not in use, are ignored: they are late."""
        member, outlier = self._members.get(id_), self._outlier
        if member is None or outlier is None or not member.is_fit or member.admin != READY:
            return
        found = member.took(good, bad, streak, cause, outlier, now.mono)
        if found is None or len(self._ejected) >= self._max_ejected(outlier):
            return
        member.eject(*found, outlier, now.mono)
        self._settle(member, member.ejection_cause, now)
        self._review(now)

    def _max_ejected(self, outlier: OutlierSettings) -> int:
        count = len(self._in_service)
        allowed = count * outlier.max_ejection_percent // 100
        return max(allowed, 1) if outlier.max_ejection_percent and count > 1 else allowed

    def kept(self) -> Iterator[tuple[str, str, str]]:
        """What a process that takes over is to know: address, state, cause. Operators' words other than
        ready, and whom probes have found unhealthy."""
        for id_, member in self._members.items():
            if member.verdict is False:
                yield id_, UNHEALTHY, member.verdict_cause
            if member.admin != READY:
                yield id_, member.admin, member.admin_cause

    def believe(self, id_: str, cause: str, now: Moment) -> None:
        """Probes of the process before this one have found it unhealthy. Nothing happens if it is not there,
        or not probed any more."""
        member = self._members.get(id_)
        if member is not None and self._health is not None and member.verdict is None:
            member.judge(False, cause)
            self._settle(member, cause, now)
            self._review(now)

    def set_admin(self, id_: str, admin: str, cause: str, now: Moment) -> None:
        """An operator's word: ready, draining or disabled. Raises ``LookupError`` for who is not there,
        ``ValueError`` for another word."""
        if admin not in ADMIN_STATES:
            raise ValueError(f"expected one of {', '.join(ADMIN_STATES)}, found {admin!r}")
        member = self._members.get(id_)
        if member is None:
            raise LookupError(f"the pool {self.name} has no backend {id_}")
        if member.admin != admin:
            member.admin, member.admin_cause = admin, cause
            self._settle(member, cause, now)
            self._review(now)

    # -- time

    def next_due(self) -> float | None:
        """When ``tick`` has something to do (monotonic); None: never, as things are."""
        dues = [due for id_ in self._ending for due in self._dues(self._members[id_])]
        return min(dues, default=None)

    def _dues(self, member: BackendHealth) -> Iterable[float]:
        if member.ejected_until is not None:
            yield member.ejected_until
        if member.ramp_from is not None:
            yield member.ramp_from + self._slow_start_s

    def tick(self, now: Moment) -> None:
        """End what is due. Early and late calls do no harm."""
        for id_ in sorted(self._ending):
            member = self._members[id_]
            if member.ramp_from is not None and member.ramp_from + self._slow_start_s <= now.mono:
                member.ramp_from = None
                self._place(member)
            if member.ejected_until is not None and member.ejected_until <= now.mono:
                member.end_ejection(now.mono)
                self._settle(member, f"its ejection of {member.ejection_s:g} seconds is over", now)
        self._review(now)

    # -- what follows

    def _settle(self, member: BackendHealth, trigger: str, now: Moment) -> None:
        """A fact of this member may have changed: bring what is shown, and what is counted, up to date."""
        state, fact = member.shown()
        if state != member.state:
            # What happened, and if something else makes the state, that too.
            cause = trigger if fact in (trigger, "") or state == HEALTHY else f"{trigger}; {fact}"
            if member.state not in USABLE and self._slow_start_s:
                member.ramp_from = now.mono
            member.state, member.since, member.cause = state, now, cause
            is_bad = state in (UNHEALTHY, EJECTED)
            text = f"backend {self.name}/{member.id} becomes {state}: {cause}"
            self._events.append(Event(text, is_bad, member.id, state, cause))
        if state not in USABLE:
            member.ramp_from = None
        self._place(member)

    def _place(self, member: BackendHealth) -> None:
        id_ = member.id
        is_fit, is_in_service = member.is_fit, member.is_in_service
        is_ejected = member.ejected_until is not None
        for ids, belongs in (
            (self._in_service, is_in_service),
            (self._fit, is_in_service and is_fit),
            (self._ejected, is_in_service and is_ejected),
            (self._unfit, not is_fit),
            (self._draining, member.admin == DRAINING),
            (self._disabled, member.admin == DISABLED),
            (self._ending, is_ejected or member.ramp_from is not None),
        ):
            if belongs:
                ids.add(id_)
            else:
                ids.discard(id_)

    def _forget(self, id_: str) -> None:
        for ids in (
            self._in_service,
            self._fit,
            self._ejected,
            self._unfit,
            self._draining,
            self._disabled,
            self._ending,
        ):
            ids.discard(id_)

    def _review(self, now: Moment) -> None:
        """Whether the pool panics."""
        count, fit = len(self._in_service), len(self._fit)
        threshold = self._panic_percent
        panics = fit * 100 < threshold * count
        if panics is self.is_panicking:
            return
        self.is_panicking = panics
        self.panic_since = now
        share = f"{fit} of {count} backends in service are fit"
        if panics:
            cause = f"{share}, less than {threshold} percent"
            text = f"pool {self.name} panics and uses all its backends: {cause}"
        else:
            cause = share
            text = f"pool {self.name} no longer panics: {cause}"
        self._events.append(Event(text, panics, "", PANIC if panics else NO_PANIC, cause))

    @property
    def _panic_percent(self) -> int:
        if self._outlier is not None:
            return self._outlier.panic_threshold_percent
        return DEFAULT_PANIC_PERCENT if self._health is not None else 0

    # -- what comes out

    def take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def message(self) -> dict[str, Any]:
        """This pool's entry in the ``health`` message."""
        down = self._disabled if self.is_panicking else self._disabled | self._unfit
        ramps = {
            id_: member.ramp_from
            for id_ in sorted(self._ending)
            if (member := self._members[id_]).ramp_from is not None and id_ not in down
        }
        return {
            "panic": self.is_panicking,
            "down": sorted(down),
            "draining": sorted(self._draining - down),
            "ramps": {} if self.is_panicking else ramps,
        }

    @property
    def members(self) -> Iterable[BackendHealth]:
        """To be read only."""
        return self._members.values()

    def is_used(self, member: BackendHealth) -> bool:
        """Whether it gets new work, panic considered."""
        return member.admin == READY and (member.is_fit or self.is_panicking)

    def describe(self) -> dict[str, Any]:
        """The pool as such, for people."""
        return {
            "is_panicking": self.is_panicking,
            "panic_since": self.panic_since.wall if self.is_panicking and self.panic_since else None,
            "backends": len(self._members),
            "in_service": len(self._in_service),
            "fit": len(self._fit),
        }

    def __repr__(self) -> str:
        states = " ".join(f"{member.id}={member.state}" for member in self._members.values())
        return f"<PoolHealth {self.name}{' panics' if self.is_panicking else ''} {states}>"
