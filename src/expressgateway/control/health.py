"""The supervisor's account of everybody's health, from which workers learn whom to use.

`HealthBoard` joins the pools' state machines (`upstream.health`) to the world: it has backends probed, takes
what workers report of real traffic and what operators say, lets time pass, writes each event to the log once,
and calls `on_change` with a ``health`` message when workers must hear of something. All changes within one
turn of the loop make one message. Nothing polls: between probes there is at most one timer, for the next
ejection or slow start that ends.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from expressgateway.config.pools import Health, Outlier
from expressgateway.control.channel import Message
from expressgateway.control.probe_schedule import Key, ProbeSchedule
from expressgateway.control.probes import Result, probe_for, short
from expressgateway.observe.counters import Sample
from expressgateway.upstream.discovery import Found
from expressgateway.upstream.health import Member, PoolHealth
from expressgateway.upstream.health_backend import (
    STATES,
    UNHEALTHY,
    BackendHealth,
    HealthSettings,
    LastProbe,
    Moment,
    OutlierSettings,
)

log = logging.getLogger(__name__)

_MAX_REPORTED: Final = 10**9  # of one worker in one report: more is nonsense
_AT_FIRST: Final[dict[str, Any]] = {"panic": False, "down": [], "draining": [], "ramps": {}}
"""What a worker assumes of a pool it has heard nothing of."""


@dataclass(frozen=True, slots=True)
class PoolTargets:
    """One pool as configuration and discovery have it now."""

    health: HealthSettings | None
    outlier: OutlierSettings | None
    slow_start_s: float
    found: Sequence[Found]


def health_settings(model: Health | None) -> HealthSettings | None:
    if model is None:
        return None
    return HealthSettings(
        type=model.type,
        path=model.path,
        host=model.host,
        expect_status=frozenset(model.expect_status),
        expect_body=model.expect_body.encode() if model.expect_body is not None else None,
        interval_s=model.interval_ms / 1000,
        timeout_s=model.timeout_ms / 1000,
        rise=model.rise,
        fall=model.fall,
        jitter=model.jitter / 100,
    )


def outlier_settings(model: Outlier | None) -> OutlierSettings | None:
    if model is None:
        return None
    return OutlierSettings(
        consecutive_failures=model.consecutive_failures,
        failure_percent=model.failure_percent,
        window_s=model.window_ms / 1000,
        ejection_s=model.ejection_ms / 1000,
        max_ejection_s=model.max_ejection_ms / 1000,
        max_ejection_percent=model.max_ejection_percent,
        panic_threshold_percent=model.panic_threshold_percent,
    )


class HealthBoard:
    """Every pool's health. To be used on the loop's thread; `on_change` is called from the loop."""

    __slots__ = (
        "_clock",
        "_dirty",
        "_dues",
        "_flush",
        "_on_change",
        "_pools",
        "_sent",
        "_timer",
        "_wall",
        "_watched",
        "schedule",
    )

    def __init__(
        self,
        on_change: Callable[[Message], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,  # noqa: TID251 - shown to people
    ) -> None:
        self._on_change = on_change
        self._clock = clock
        self._wall = wall
        self.schedule = ProbeSchedule(self._on_probed, clock)
        self._pools: dict[str, PoolHealth] = {}
        self._sent: dict[str, dict[str, Any]] = {}  # what workers were told last, by pool
        self._watched: dict[Key, object] = {}  # what the probe of a backend was made of
        self._dues: dict[str, float] = {}  # pools in which something ends by itself
        self._dirty: set[str] = set()
        self._flush: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None

    # -- what is there

    def adopt(self, pools: Mapping[str, PoolTargets]) -> None:
        """These pools and no others, from now on. What stays keeps its state; what leaves is forgotten.

        To be called at every change of configuration, at run-time changes, and when DNS answers change.
        """
        now = self._now()
        for name in self._pools.keys() - pools.keys():
            del self._pools[name]
            self._sent.pop(name, None)
            self._dues.pop(name, None)
            self._dirty.discard(name)
        wanted: dict[Key, object] = {}
        for name, targets in pools.items():
            pool = self._pools.get(name)
            if pool is None:
                pool = self._pools[name] = PoolHealth(name)
                self._sent[name] = _AT_FIRST
            members = [_member(found) for found in targets.found]
            pool.adopt(members, targets.health, targets.outlier, targets.slow_start_s, now)
            self._changed(pool)
            if targets.health is not None:
                wanted.update(((name, each.id), (each.endpoint, targets.health)) for each in members)
        self._watch(wanted, pools)

    def _watch(self, wanted: Mapping[Key, object], pools: Mapping[str, PoolTargets]) -> None:
        """Probe those that are new or are to be probed in another way; leave the others' schedules alone."""
        for key in self._watched.keys() - wanted.keys():
            del self._watched[key]
            self.schedule.forget(key)
        for name, targets in pools.items():
            health = targets.health
            if health is None:
                continue
            for settings, address, id_ in targets.found:
                key = (name, id_)
                if self._watched.get(key) == wanted[key]:
                    continue
                self._watched[key] = wanted[key]
                try:
                    probe = probe_for(health, settings, address)
                except LookupError as error:
                    log.warning("backend %s/%s is not probed: %s", name, id_, error)
                    self.schedule.forget(key)
                else:
                    self.schedule.watch(key, probe, health)

    def close(self) -> None:
        """End all probes and timers. Nothing is called any more."""
        self.schedule.close()
        for handle in (self._flush, self._timer):
            if handle is not None:
                handle.cancel()
        self._flush = self._timer = None
        self._pools.clear()
        self._watched.clear()

    # -- what is heard

    def _on_probed(self, key: Key, result: Result, took_s: float) -> None:
        pool = self._pools.get(key[0])
        if pool is not None:
            now = self._now()
            took_ms = round(took_s * 1000, 3)
            pool.probed(key[1], LastProbe(result.ok, now.wall, took_ms, result.detail), now)
            self._changed(pool)

    def outcomes(self, message: object) -> None:
        """A worker's ``outcomes`` message. What makes no sense in it is ignored; never raises."""
        pools = message.get("pools") if isinstance(message, dict) else None
        if not isinstance(pools, dict):
            return
        now = self._now()
        for name, reports in pools.items():
            pool = self._pools.get(name)
            if pool is None or not isinstance(reports, dict):
                continue
            for id_, report in reports.items():
                if (numbers := _checked(report)) is not None:
                    pool.took(id_, *numbers, now)
            self._changed(pool)

    def set_state(self, pool: str, backend: str, state: str, cause: str) -> None:
        """An operator's word: ``ready``, ``draining`` or ``disabled``. Raises `LookupError` for a pool or
        backend that is not there, `ValueError` for another word."""
        found = self._found(pool)
        found.set_admin(backend, state, short(cause), self._now())
        self._changed(found)

    def kept(self) -> list[tuple[str, str, str, str]]:
        """What a process that takes over is to know: pool, backend, state, cause."""
        return [(name, *each) for name, pool in self._pools.items() for each in pool.kept()]

    def restore(self, kept: Iterable[tuple[str, str, str, str]]) -> None:
        """What `kept` said in the process before. Backends that are not there any more are left out."""
        for name, backend, state, cause in kept:
            pool = self._pools.get(name)
            if pool is not None and state == UNHEALTHY:
                pool.believe(backend, short(cause), self._now())
                self._changed(pool)
                continue
            try:
                self.set_state(name, backend, state, cause)
            except (LookupError, ValueError) as error:
                log.warning("the state %s of %s in pool %s is not kept: %s", state, backend, name, error)

    # -- what follows

    def _changed(self, pool: PoolHealth) -> None:
        """Tell the log now, and the workers at the end of this turn of the loop."""
        for event in pool.take_events():
            fields = {"pool": pool.name, "backend": event.backend, "state": event.state, "cause": event.cause}
            if not event.backend:
                del fields["backend"]
            level = logging.WARNING if event.is_bad else logging.INFO
            log.log(level, "%s", event.text, extra={"fields": fields})
        self._dirty.add(pool.name)
        if self._flush is None:
            self._flush = asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._flush = None
        changed: dict[str, Any] = {}
        for name in sorted(self._dirty):
            pool = self._pools[name]
            entry = pool.message()
            if entry != self._sent[name]:
                self._sent[name] = changed[name] = entry
            due = pool.next_due()
            if due is None:
                self._dues.pop(name, None)
            else:
                self._dues[name] = due
        self._dirty.clear()
        self._arm()
        if changed:
            self._on_change({"type": "health", "pools": changed})

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._dues:
            delay_s = max(0.0, min(self._dues.values()) - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.tick()

    def tick(self) -> None:
        """End what is due. The board's own timer calls it."""
        now = self._now()
        for name, due in list(self._dues.items()):
            if due <= now.mono:
                self._pools[name].tick(now)
                self._changed(self._pools[name])
        if self._timer is None and self._flush is None:  # early
            self._arm()

    # -- what is asked

    def message(self, pools: Iterable[str] | None = None) -> Message:
        """The ``health`` message of these pools, or of all; names that are not there are left out."""
        names = self._pools if pools is None else [name for name in pools if name in self._pools]
        return {"type": "health", "pools": {name: self._pools[name].message() for name in names}}

    def describe(self, pool: str) -> list[dict[str, Any]]:
        """The backends of a pool, for people. Raises `LookupError`."""
        return [member.describe() for member in self._found(pool).members]

    def members(self, pool: str) -> list[BackendHealth]:
        """What is known of the backends of a pool, in the order of the file; to be read at once, not kept.
        Raises `LookupError`."""
        return list(self._found(pool).members)

    def describe_pool(self, pool: str) -> dict[str, Any]:
        """The pool as such, for people. Raises `LookupError`."""
        return self._found(pool).describe()

    def samples(self) -> Iterator[Sample]:
        """The caller may pause between two of them."""
        for name, pool in list(self._pools.items()):
            yield "pool_panic", (name,), int(pool.is_panicking)
            for member in list(pool.members):
                labels = (name, member.id)
                yield "backend_up", labels, int(pool.is_used(member))
                for state in STATES:
                    yield "backend_state", (*labels, state), int(member.state == state)
                for kind, count in list(member.ejections.items()):
                    yield "backend_ejections", (*labels, kind), count
                for result, count in zip(("failure", "success"), member.probes, strict=True):
                    yield "health_probes", (*labels, result), count

    def _found(self, pool: str) -> PoolHealth:
        found = self._pools.get(pool)
        if found is None:
            raise LookupError(f"there is no pool {pool}")
        return found

    def _now(self) -> Moment:
        return Moment(self._clock(), self._wall())


def _member(found: Found) -> Member:
    settings, address, id_ = found
    # A weight is no other endpoint.
    return Member(id_, address, settings.weight, (address, replace(settings, weight=0)))


def _checked(report: object) -> tuple[int, int, int, str] | None:
    """A worker's row as it should be: good, bad, streak, cause of the last failure."""
    if not isinstance(report, list | tuple) or len(report) != 4:
        return None
    good, bad, streak, cause = report
    for number in (good, bad, streak):
        if not isinstance(number, int) or not 0 <= number <= _MAX_REPORTED:
            return None
    return (good, bad, streak, short(cause) or "no cause given") if isinstance(cause, str) else None
