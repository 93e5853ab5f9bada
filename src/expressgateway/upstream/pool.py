"""A pool: backends that are interchangeable, and the policy that chooses among them.

The pool owns the living backends. Its set changes in three ways - a reload, a run-time change, and names that
resolve to other addresses - and all go through ``replace``: what stays keeps its object, counters and
connections; what leaves finishes its exchanges and closes its idle connections. Who of them may be used is
the supervisor's word (``Standing``); how much they may take is in ``limits``.
"""

import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol
from zlib import crc32

from expressgateway.observe.counters import Tally
from expressgateway.upstream.backend import Backend, BackendSettings, Load, SocketAddress
from expressgateway.upstream.errors import Fault
from expressgateway.upstream.limits import UNLIMITED, Budget, Limits, Queue, Turn, full
from expressgateway.upstream.selection import (
    UNKEYED,
    Balancing,
    Gradual,
    Measuring,
    RoundRobin,
    Selection,
    Sessions,
    make_selection,
)

log = logging.getLogger(__name__)

_TURNS: Final = 8  # asked of a policy before its order of preference is walked
_SLICE_S: Final = 0.0015  # of building a table, between two looks at the sockets
_SLICE_STEPS: Final = 64
_RAMP_SALT: Final = b"slow start"
_LEAST_RAMP: Final = 0.05  # of its share a backend has from the beginning of its slow start

Attach = Callable[[Backend], None]
Later = Callable[[Callable[[], None]], object]


class Clock(Protocol):
    now: float
    """Seconds, monotonic, read once per batch of events."""


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """A pool's configuration, but for its backends."""

    balancing: Balancing = field(default_factory=Balancing)
    limits: Limits = UNLIMITED
    budget_percent: int | None = None
    """Retries that load a backend, as a share of the pool's traffic; None: not limited."""
    counts_5xx: bool = False
    """Answers with a 5xx status are failures of the backend."""
    alarm_streak: int = 0
    """Failures in a row that are reported at once, not with the next sweep; 0: none."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What the supervisor says of a pool's backends, by id. Who is not named is well."""

    down: frozenset[str] = frozenset()
    draining: frozenset[str] = frozenset()
    ramps: Mapping[str, float] = field(default_factory=dict)
    """Since when (seconds, monotonic) those in slow start are there, or are there again."""
    is_panicking: bool = False


class Pool:
    """One pool of one worker."""

    __slots__ = (
        "_attach",
        "_chosen",
        "_clock",
        "_is_growing",
        "_is_plain",
        "_is_turn_due",
        "_later",
        "_leaving",
        "_may_pass",
        "_weight",
        "backends",
        "budget",
        "empty_fault",
        "hits",
        "load",
        "measuring",
        "mirrored",
        "name",
        "on_alarm",
        "picks",
        "queue",
        "retries",
        "selection",
        "sessions",
        "settings",
        "standing",
        "unavailable",
        "unsolicited_before",
    )

    def __init__(self, name: str, attach: Attach, clock: Clock, later: Later) -> None:
        """``attach`` gives a new backend its connections, in the way of its protocol; ``later`` makes a call
        after the events at hand."""
        # Wiring
        self.name = name
        self._attach = attach
        self._clock = clock
        self._later = later
        self.on_alarm: Callable[[], None] | None = None
        """Told when a backend failed ``alarm_streak`` times in a row: the supervisor should hear of it."""
        # State
        self.settings = PoolSettings()
        self.standing = Standing()
        self.backends: tuple[Backend, ...] = ()
        self._leaving: list[Backend] = []
        self.selection: Selection = make_selection(self.settings.balancing, ())
        self._chosen: tuple[Backend, ...] = ()  # what it was made of
        self.measuring: Measuring | None = None
        self.sessions: Sessions | None = None
        self.load = Load()
        self.queue = Queue()
        self.budget: Budget | None = None
        self.empty_fault = Fault.NO_BACKEND
        """Why there are no backends, when there are none."""
        self._weight = 0  # of all that are available
        self._is_plain = True  # nothing to ask of a backend but whether it is available
        self._is_growing = False
        self._is_turn_due = False
        self._may_pass = False  # the pick under way is for one who need not wait
        # Counters
        self.picks = 0
        self.unavailable = 0
        self.hits = Tally()
        """Picks turned down, by limit."""
        self.retries = Tally()
        self.mirrored = Tally()
        """Copies of requests that came here, by what became of them."""
        self.unsolicited_before = 0
        """``Backend.unsolicited`` of those that have left and are done: the pool's count never goes back."""

    # -- the set ---------------------------------------------------------------------------------------

    def replace(
        self,
        wanted: Sequence[tuple[BackendSettings, SocketAddress, str]],
        settings: PoolSettings | None = None,
    ) -> None:
        """Make this the pool's set: settings, address and id of each. Ids are unique."""
        known = {(backend.id, backend.address): backend for backend in self.backends}
        backends: list[Backend] = []
        for each, address, id_ in wanted:
            backend = known.get((id_, address))
            if backend is not None and _same_but_weight(backend.settings, each):
                del known[(id_, address)]
                backend.settings = each
                backend.weight = each.weight
            else:
                backend = Backend(each, address, id_, self.load)
                self._attach(backend)
            backends.append(backend)
        for backend in known.values():
            self._part_with(backend)
        self.backends = tuple(backends)
        before = self.settings
        if settings is not None:
            self._adopt(settings)
        self._mark(self.standing)
        chosen = self._choices()
        same = self.settings.balancing == before.balancing
        self._use(chosen, self.selection.rebuilt if same else self._make)
        self._tell_those_who_wait()

    def _choices(self) -> tuple[Backend, ...]:
        """Those the policy chooses among. One that goes by keys must know everybody, or keys of those that
        stay would move; for the others a backend that is down is only in the way."""
        if self.settings.balancing.policy in UNKEYED:
            return tuple(backend for backend in self.backends if backend.is_available)
        return self.backends

    def _make(self, backends: Sequence[Backend]) -> Selection:
        return make_selection(self.settings.balancing, backends)

    def _use(self, chosen: tuple[Backend, ...], make: Callable[[Sequence[Backend]], Selection]) -> None:
        try:
            selection = make(chosen)
        except Exception:  # noqa: BLE001 - somebody else's code; it is logged there
            selection = self._without_policy(chosen)
        self.selection = selection
        self._chosen = chosen
        self.measuring = selection if isinstance(selection, Measuring) else None
        self.sessions = selection if isinstance(selection, Sessions) else None
        if isinstance(selection, Gradual):
            self._grow_on()

    def _part_with(self, backend: Backend) -> None:
        backend.is_available = False  # a table that is still being replaced may name it
        backend.is_draining = False
        backend.on_load = None
        if backend.connections is not None:
            backend.connections.close_idle()
            self._leaving.append(backend)
        else:
            self.unsolicited_before += backend.unsolicited

    def _adopt(self, settings: PoolSettings) -> None:
        self.settings = settings
        percent = settings.budget_percent
        if percent is None:
            self.budget = None
        elif self.budget is None:
            self.budget = Budget(percent)
        else:
            self.budget.set_percent(percent)

    def judge(self, standing: Standing) -> None:
        """Take the supervisor's word on who may be used, and how."""
        self._mark(standing)
        chosen = self._choices()
        if chosen != self._chosen:
            self._use(chosen, self.selection.rebuilt)
        self._tell_those_who_wait()

    def _without_policy(self, chosen: Sequence[Backend]) -> Selection:
        """Somebody else's policy has failed: traffic goes on in turns until the next change of the pool."""
        log.exception(
            "pool %s: the policy %s failed and is not asked again: round robin goes on in its place",
            self.name,
            self.settings.balancing.policy,
        )
        for backend in chosen:
            backend.on_load = None
        return RoundRobin(chosen)

    def _mark(self, standing: Standing) -> None:
        self.standing = standing
        limited = not self.settings.limits.is_off
        ramps = standing.ramps if self.settings.balancing.slow_start_s else {}
        for backend in self.backends:
            id_ = backend.id
            backend.is_down = id_ in standing.down
            backend.is_draining = id_ in standing.draining and not backend.is_down
            backend.is_available = not backend.is_down and not backend.is_draining
            backend.ramp_from = ramps.get(id_, 0.0)
            backend.on_freed = self._freed if limited else None
        self._weight = sum(backend.weight for backend in self.backends if backend.is_available)
        self._is_plain = not limited and not any(backend.ramp_from for backend in self.backends)

    # -- tables that take long -------------------------------------------------------------------------

    def _grow_on(self) -> None:
        if not self._is_growing:
            self._is_growing = True
            self._later(self._grow)

    def _grow(self) -> None:
        selection = self.selection
        self._is_growing = False
        if not isinstance(selection, Gradual):
            return
        ends = time.perf_counter() + _SLICE_S
        while time.perf_counter() < ends:
            if selection.advance(_SLICE_STEPS):
                return
        self._grow_on()

    def finish_table(self) -> None:
        """Build what is left at once: for a worker that does not serve yet."""
        while isinstance(self.selection, Gradual) and not self.selection.advance(_SLICE_STEPS):
            pass

    # -- choosing --------------------------------------------------------------------------------------

    def pick(self, key: bytes | None = None, tried: Sequence[Backend] = ()) -> Backend | None:
        """The backend for the next exchange, none of ``tried``, or ``None`` if there is none to be had."""
        self.picks += 1
        if tried and key is None and self.sessions is None:
            # One exchange's second choice takes no turn: else two backends, one of them failing, would be in
            # step with the turns, and every exchange would ask the failing one first.
            return self._walk(tried[-1], key, tried)
        try:
            backend = self.selection.pick(key)
        except Exception:  # noqa: BLE001 - as above
            self.selection = self._without_policy(self._chosen)
            backend = self.selection.pick(key)
        if (
            backend is not None
            and backend.is_available
            and backend not in tried
            and (self._is_plain or (self._has_room(backend) and self._is_ripe(backend, key)))
        ):
            return backend
        return self._pick_other(backend, key, tried)

    def pick_bound(self, key: bytes, tried: Sequence[Backend] = ()) -> Backend | None:
        """The backend that a session is bound to, if it still can be used: draining ones can, new work or
        not, and so can those of weight 0."""
        backend = self.sessions.bound(key) if self.sessions is not None else None
        if (
            backend is not None
            and (backend.is_available or backend.is_draining)
            and backend not in tried
            and (self._is_plain or self._has_room(backend))
        ):
            self.picks += 1
            return backend
        return None

    def pick_session(self, key: bytes | None, tried: Sequence[Backend] = ()) -> Backend | None:
        """The backend that a session is bound to if there is one; or else as ``pick``."""
        if self.sessions is None or key is None:
            return self.pick(key, tried)
        backend = self.pick_bound(key, tried)
        if backend is None:
            # All sessions of one backend have the same token: by it, they would all move to the same other.
            backend = self.pick(None if self.settings.balancing.has_cookie else key, tried)
        return backend

    def pick_instead(self, key: bytes | None, tried: Sequence[Backend]) -> Backend | None:
        """Another one for an exchange that leaves the last of ``tried`` for it, where it is counted still.

        It takes one place and one connection, and leaves one of each, so those who wait lose nothing.
        """
        self.load.in_flight -= 1
        self.load.open -= 1
        try:
            return self._pick_past(key, tried)
        finally:
            self.load.in_flight += 1
            self.load.open += 1

    def _pick_past(self, key: bytes | None, tried: Sequence[Backend]) -> Backend | None:
        self._may_pass = True
        try:
            return self.pick_session(key, tried)
        finally:
            self._may_pass = False

    def _pick_other(
        self, backend: Backend | None, key: bytes | None, tried: Sequence[Backend]
    ) -> Backend | None:
        if backend is None:
            self.unavailable += 1
            return None
        if tried:
            return self._walk(tried[-1], key, tried)
        if key is None:
            # A policy that takes turns goes on to the next turn, so that the share of one that is down is
            # spread evenly; one that goes by a key repeats itself and is asked for its second choice.
            for _ in range(min(len(self.backends), _TURNS)):
                other = self.selection.pick(key)
                if other is not None and self._takes(other) and self._is_ripe(other, key):
                    return other
        return self._walk(backend, key, tried)

    def _walk(self, first: Backend, key: bytes | None, tried: Sequence[Backend]) -> Backend | None:
        unripe = first if first not in tried and self._takes(first) else None
        for other in self.selection.others(first):
            if other not in tried and self._takes(other):
                if not self._is_ripe(other, key):
                    unripe = unripe or other
                    continue
                return other
        if unripe is None:
            self.unavailable += 1
        return unripe

    def _takes(self, backend: Backend) -> bool:
        return backend.is_available and (self._is_plain or self._has_room(backend))

    def _has_room(self, backend: Backend) -> bool:
        if self.settings.limits.is_off:
            return True
        if self.queue and not self._may_pass:
            return False  # nobody passes those who wait
        return not full(backend, self.load, self.settings.limits, self.hits)

    def _is_ripe(self, backend: Backend, key: bytes | None) -> bool:
        """Whether a backend in slow start takes this one. By key where there is one, so that a client does
        not go to and fro: the keys it takes only ever become more. By chance else, as long as it has no more
        in flight than its part of what all have: policies that go by load would offer it everything."""
        if not backend.ramp_from:
            return True
        whole_s = self.settings.balancing.slow_start_s
        grown = (self._clock.now - backend.ramp_from) / whole_s if whole_s else 1.0
        if grown >= 1.0:
            backend.ramp_from = 0.0
            self._is_plain = self.settings.limits.is_off and not any(each.ramp_from for each in self.backends)
            return True
        grown = max(grown, _LEAST_RAMP)
        if key is not None:
            # Not the number that shares of a split are made of: it would be the same clients every time.
            return crc32(_RAMP_SALT, crc32(key)) / 2**32 < grown
        if backend.in_flight * self._weight > self.load.in_flight * backend.weight * grown:
            return False
        return random.random() < grown

    def why_none(self) -> Fault:
        """Why a pick without ``tried`` came to nothing."""
        if not self.backends:
            return self.empty_fault
        if not self.settings.limits.is_off and any(
            backend.is_available and backend.weight for backend in self.backends
        ):
            return Fault.SATURATED
        return Fault.DOWN

    def is_full_past(self, tried: Sequence[Backend]) -> bool:
        """Whether it is only for want of room that there is none besides ``tried``."""
        return not self.settings.limits.is_off and any(
            backend.is_available and backend.weight and backend not in tried for backend in self.backends
        )

    # -- waiting for room ------------------------------------------------------------------------------

    def wait(self, turn: Turn) -> bool:
        """Queue up until a backend has room. False: the queue is full."""
        return self.queue.join(turn, self.settings.limits, self._clock.now)

    def _tell_those_who_wait(self) -> None:
        """The set has changed: there may be room, or nobody left to wait for."""
        if self.queue and self.why_none() is not Fault.SATURATED:
            self.queue.dismiss()
        self._freed()

    def _freed(self) -> None:
        if self.queue and not self._is_turn_due:
            self._is_turn_due = True
            self._later(self._give_turns)

    def _give_turns(self) -> None:
        try:
            while (turn := self.queue.first()) is not None:
                backend = self._pick_past(turn.key, turn.tried)
                if backend is None:
                    return
                self.queue.leave(turn)
                turn.on_turn(backend)
        finally:
            self._is_turn_due = False

    # -- outcomes --------------------------------------------------------------------------------------

    def failed(self, backend: Backend, cause: str) -> None:
        """An exchange failed by this backend's fault; ``cause`` is a phrase."""
        backend.failed(cause)
        if backend.streak == self.settings.alarm_streak and self.on_alarm is not None:
            self.on_alarm()

    def take_outcomes(self) -> dict[str, list[int | str]]:
        """What happened since the last call, by backend id: successes, failures, the last streak, its cause.

        Streaks are counted anew from here: the supervisor adds up.
        """
        outcomes: dict[str, list[int | str]] = {}
        for backend in self.backends:
            if backend.good or backend.bad:
                outcomes[backend.id] = [backend.good, backend.bad, backend.streak, backend.cause]
                backend.good = backend.bad = backend.streak = 0
                backend.cause = ""
        return outcomes

    # -- life ------------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        if self.queue:
            self.queue.sweep(now)
            self._freed()  # room that nobody told of, as when limits came by a reload
        for backend in self.everyone():
            if backend.connections is not None:
                backend.connections.sweep(now)
        leaving, self._leaving = self._leaving, []
        for backend in leaving:
            if backend.connections is not None and backend.connections.open:
                self._leaving.append(backend)
            else:
                self.unsolicited_before += backend.unsolicited

    @property
    def is_busy(self) -> bool:
        """Backends that left still have connections, or somebody waits whose time is not up."""
        return bool(self._leaving or self.queue)

    def close_idle(self) -> None:
        for backend in self.everyone():
            if backend.connections is not None:
                backend.connections.close_idle()

    def everyone(self) -> Iterable[Backend]:
        """Those that have left and are not done included."""
        yield from self.backends
        yield from self._leaving

    def __repr__(self) -> str:
        return f"<Pool {self.name} {self.settings.balancing.policy} {list(self.backends)!r}>"


def _same_but_weight(one: BackendSettings, other: BackendSettings) -> bool:
    return (one.host, one.port, one.protocol, one.tls, one.send_proxy) == (
        other.host,
        other.port,
        other.protocol,
        other.tls,
        other.send_proxy,
    )
