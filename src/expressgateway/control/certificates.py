"""Certificates under a running gateway: read again when asked (SIGUSR1) and when their files change.

Files are watched by looking at them every `LOOK_S`, on a thread aside, and not by inotify: a look follows
symlinks, so the swap of Kubernetes' ``..data`` is a change like any other; it sees network and overlay
mounts, which tell nobody; there is no queue that could overflow and no watch that is lost with a directory.
It costs microseconds a file.

A renewal is one of the things that the supervisor does one after the other, with reloads and run-time
changes. What cannot be used keeps what runs, is told of once, and is tried again until it can: a pair of
which only one half was replaced at a look has until the next one before anybody is told.
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Final

from expressgateway.config.load import Loaded
from expressgateway.config.material import Pair, pairs
from expressgateway.config.staples import ends_at
from expressgateway.config.values import quoted
from expressgateway.control import reload
from expressgateway.control.certificate_facts import DAY_S, Facts, Stage, facts_of
from expressgateway.control.reload import Outcome, aside
from expressgateway.control.renewal import Fresh, Kept, Unit, User, read_again, units, user_of, with_files
from expressgateway.observe.counters import Sample

log = logging.getLogger(__name__)

RENEWED: Final = "renewed"
FAILED: Final = "failed"
RESULTS: Final = (RENEWED, FAILED)

LOOK_S: Final = 2.0
RETRY_S: Final = 30.0
"""After which what could not be used is tried again, though its files seem the same."""
_WARN_EVERY_S: Final = 60.0
_PATIENCE_S: Final = 60.0  # for all files to be read and checked
_MAX_TRIES: Final = 16  # for workers to take a renewal, in ever smaller parts
_MAX_LISTED: Final = 10

Apply = Callable[[Loaded, str], Awaitable[Outcome]]
"""Has the workers use what differs in its material alone. The sentence says what is new."""
Signature = tuple[int, ...] | None
"""What tells a file from what was there before; None: there is none."""


@dataclass(slots=True)
class _Trouble:
    """A unit that cannot be renewed now."""

    digest: bytes
    """Of what workers could not use; empty: it was not offered to them."""
    retry_at: float
    told: str = ""
    """The reason that was given last; empty: nobody was told yet."""
    told_at: float = 0.0


@dataclass(frozen=True, slots=True)
class _Entry:
    """A certificate in use."""

    user: User
    pair: Pair
    unit: str
    facts: Facts
    staple_ends: float | None
    """Until when its OCSP response is good; None: for ever, or there is none."""
    is_stapled: bool


class Certificates:
    """All certificates of the configuration in force. To be used on the loop's thread."""

    def __init__(
        self,
        running: Callable[[], Loaded],
        wake: Callable[[], None],
        *,
        insecure_key_permissions: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,  # noqa: TID251 - certificates end by the calendar
    ) -> None:
        """``running``: the configuration in force. ``wake`` is called when `renew` has something to do."""
        self._running = running
        self._wake = wake
        self._insecure = insecure_key_permissions
        self._clock = clock
        self._wall = wall
        self._asked = 0
        self._done = 0
        self._is_changed = False
        self._seen: dict[str, Signature] = {}  # one for each file of the configuration
        self._is_settling = False
        self._troubles: dict[str, _Trouble] = {}  # by unit: at most one for each that there is
        self._failures: dict[str, tuple[float, str]] = {}  # the last one of each unit, and when it was
        self._renewed_at: dict[tuple[User, str], float] = {}  # by user and chain
        self._warned: dict[tuple[str, str], tuple[Stage, float]] = {}  # by chain and fingerprint
        self._warn_at = 0.0
        self._staples_at = clock() + RETRY_S
        self._said: tuple[str, ...] = ()
        self._known: Loaded | None = None
        self._entries: tuple[_Entry, ...] = ()
        self._units: tuple[Unit, ...] = ()
        self.counts = dict.fromkeys(RESULTS, 0)

    # -- being asked

    def ask(self) -> None:
        """Read everything again. Asking several times before it is done is asking once; none is lost."""
        if self._asked == self._done:
            log.info("SIGUSR1: certificates are read again")
        self._asked += 1
        self._wake()

    @property
    def is_due(self) -> bool:
        return self._asked > self._done or self._is_changed

    # -- watching

    async def watch(self) -> None:
        """Look at the files for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Look once. A mount that does not answer holds up the next look, and nothing else."""
        self._refresh()
        paths = [path for unit in self._units for path in unit.paths]
        seen = await aside(lambda: signatures(paths), None)
        is_changed = seen != self._seen
        now = self._clock()
        retried = any(now >= trouble.retry_at for trouble in self._troubles.values())
        if now >= self._staples_at:
            # One that was not good yet becomes so by itself.
            self._staples_at = now + RETRY_S
            retried |= any(each.pair.ocsp is not None and not each.is_stapled for each in self._entries)
        # Once more after a change: a file can be written twice within what its times can tell.
        if is_changed or self._is_settling or retried or self._is_staple_over():
            self._is_changed = True
            self._wake()
        self._seen, self._is_settling = seen, is_changed
        if now >= self._warn_at:
            self._warn()

    def _is_staple_over(self) -> bool:
        now = self._wall()
        return any(each.is_stapled and (each.staple_ends or inf) <= now for each in self._entries)

    # -- renewing

    async def renew(self, apply: Apply) -> Outcome:
        """Read everything again, and have ``apply`` put into use what is new and good: what came of it, a
        sentence for each. Never raises for what files hold."""
        asked, is_asked = self._asked, self._asked > self._done
        self._is_changed = False
        running = self._running()
        began = self._clock()
        try:
            found = await aside(
                lambda: read_again(running, insecure_key_permissions=self._insecure), _PATIENCE_S
            )
        except TimeoutError:
            log.error("the files of certificates cannot be read in time: what runs stays")
            self.counts[FAILED] += 1
            self._done = asked
            return Outcome(reload.FAILED, ("the files cannot be read in time: what runs stays",))
        self._refresh()
        self._say(found.warnings, is_asked=is_asked)
        fresh = [each for each in found.fresh if is_asked or not self._was_refused(each)]
        offered = {each.unit.name for each in fresh}
        held = {
            each.unit.name: self._troubles[each.unit.name]
            for each in found.fresh
            if each.unit.name not in offered
        }
        refused = await self._adopt(fresh, apply, [_MAX_TRIES])
        self._refresh()
        self._note(found.kept, refused, held, is_asked=is_asked)
        self._done = asked
        failed = {each.unit.name for each, _ in refused}
        taken = [each for each in fresh if each.unit.name not in failed]
        renewed = [each.unit for each in taken if not each.is_staple]
        self.counts[RENEWED] += len(renewed)
        took_ms = (self._clock() - began) * 1000
        if renewed:
            log.info("certificates renewed in %.0f ms: %s", took_ms, _listed(renewed))
        if staples := [each.unit for each in taken if each.is_staple]:
            log.info("OCSP responses read anew in %.0f ms, for %s", took_ms, _listed(staples))
        if is_asked and not (taken or found.kept or refused):
            log.info("certificates were read again in %.0f ms, and none has changed", took_ms)
        self._warn()
        stays = [f"{each.unit} is not renewed, the old one stays: {each.reason}" for each in found.kept]
        stays += [f"{each.unit} is not renewed, the old one stays: {reason}" for each, reason in refused]
        report = (*(f"{each.unit} is renewed" for each in taken), *stays)
        result = reload.FAILED if stays else reload.APPLIED if taken else reload.UNCHANGED
        return Outcome(result, report or ("none has changed",))

    def _was_refused(self, fresh: Fresh) -> bool:
        trouble = self._troubles.get(fresh.unit.name)
        if trouble is None or not trouble.digest or self._clock() >= trouble.retry_at:
            return False
        return trouble.digest == fresh.digest

    async def _adopt(self, fresh: list[Fresh], apply: Apply, tries: list[int]) -> list[tuple[Fresh, str]]:
        """Have it used: all of it, or what is left without those that workers refuse, which are given with
        the reason."""
        if not fresh:
            return []
        running = self._running()
        outcome = await apply(
            replace(running, material=with_files(running, fresh)), _listed([each.unit for each in fresh])
        )
        tries[0] -= 1
        if outcome.is_success:
            return []
        if len(fresh) == 1 or tries[0] <= 0:
            return [(each, "; ".join(outcome.report)) for each in fresh]
        half = len(fresh) // 2
        first = await self._adopt(fresh[:half], apply, tries)
        return first + await self._adopt(fresh[half:], apply, tries)

    def _note(
        self,
        kept: Iterable[Kept],
        refused: Iterable[tuple[Fresh, str]],
        held: dict[str, _Trouble],
        *,
        is_asked: bool,
    ) -> None:
        """Remember what cannot be renewed, and tell of it once."""
        before, self._troubles = self._troubles, dict(held)
        now = self._clock()
        found = [(each.unit, each.reason, b"") for each in kept]
        found += [(each.unit, reason, each.digest) for each, reason in refused]
        for unit, reason, digest in found:
            known = before.get(unit.name)
            # Whoever replaces two files has one moment in which they do not fit.
            if known is None and not (is_asked or digest):
                self._troubles[unit.name] = _Trouble(digest, now)
                continue
            is_new = known is None or not known.told
            if known is not None and not (is_asked or is_new):
                # One reason after the other is no reason to fill the log.
                is_new = reason != known.told and now - known.told_at >= RETRY_S
            if is_asked or is_new or known is None:
                self._failures[unit.name] = self._wall(), reason
                self.counts[FAILED] += 1
                log.error("the certificate %s is not renewed, the old one stays: %s", unit, reason)
                self._troubles[unit.name] = _Trouble(digest, now + RETRY_S, reason, now)
            else:
                self._troubles[unit.name] = _Trouble(digest, now + RETRY_S, known.told, known.told_at)

    def _say(self, warnings: tuple[str, ...], *, is_asked: bool) -> None:
        for text in warnings:
            if is_asked or text not in self._said:
                log.warning("%s", text)
        self._said = warnings

    # -- what is known of them

    def _refresh(self) -> None:
        """Look at what runs, if it is another than before."""
        loaded = self._running()
        if loaded is self._known:
            return
        before = self._known
        if before is None or before.config is not loaded.config:
            self._units = units(loaded.config)
        owner = {path: unit.name for unit in self._units for path in unit.paths}
        files = loaded.material.files
        facts = {str(entry.pair.chain): entry.facts for entry in self._entries}
        old = before.material.files if before is not None else {}
        entries: list[_Entry] = []
        renewed: dict[tuple[User, str], float] = {}
        for pair in pairs(loaded.config):
            chain, user = str(pair.chain), user_of(loaded.config, pair.chain_loc)
            if chain not in facts or old.get(chain) != files.get(chain):
                read = facts_of(files.get(chain, b""))
                if read is None:
                    continue
                facts[chain] = read
            key = user, chain
            is_other = any(path in old and old[path] != files.get(path) for path in (chain, str(pair.key)))
            if is_other:
                renewed[key] = self._wall()
            elif key in self._renewed_at:
                renewed[key] = self._renewed_at[key]
            staple = files.get(str(pair.ocsp), b"") if pair.ocsp is not None else b""
            entries.append(_Entry(user, pair, owner[chain], facts[chain], ends_at(staple), bool(staple)))
        self._entries = tuple(entries)
        self._renewed_at = renewed
        names = {unit.name for unit in self._units}
        self._troubles = {name: each for name, each in self._troubles.items() if name in names}
        self._failures = {name: each for name, each in self._failures.items() if name in names}
        self._known = loaded

    def _warn(self) -> None:
        """Tell of certificates that end: once per stage, and once a day."""
        self._warn_at = self._clock() + _WARN_EVERY_S
        now = self._wall()
        users: dict[tuple[str, str], list[_Entry]] = {}
        for entry in self._entries:
            users.setdefault((str(entry.pair.chain), entry.facts.fingerprint), []).append(entry)
        warned: dict[tuple[str, str], tuple[Stage, float]] = {}
        for key, group in users.items():
            stage = group[0].facts.stage(now)
            if stage is Stage.FINE:
                continue
            known = self._warned.get(key)
            if known is not None and known[0] is stage and 0 <= now - known[1] < DAY_S:
                warned[key] = known
                continue
            warned[key] = stage, now
            name = quoted(key[0])
            whose = ", ".join(str(entry.user) for entry in group[:_MAX_LISTED])
            left = group[0].facts.not_after - now
            day = time.strftime("%Y-%m-%d", time.gmtime(group[0].facts.not_after))
            if stage is Stage.OVER:
                log.error("the certificate %s (%s) expired on %s: clients refuse it", name, whose, day)
            else:
                log.warning(
                    "the certificate %s (%s) ends in %s, on %s: renew it",
                    name,
                    whose,
                    _time(left),
                    day,
                )
        self._warned = warned

    # -- what can be seen

    def describe(self) -> list[dict[str, Any]]:
        """Every certificate in use, for each listener and backend that uses it. Times are seconds since 1970.

        ``listener`` is None for a certificate that is shown to a backend, ``pool`` and ``backend`` are for
        all others. ``last_failure`` stays when it was overcome; ``is_failing`` says whether it lasts.
        """
        self._refresh()
        now = self._wall()
        shown: list[dict[str, Any]] = []
        for entry in self._entries:
            facts, pair, user = entry.facts, entry.pair, entry.user
            failure = self._failures.get(entry.unit)
            trouble = self._troubles.get(entry.unit)
            shown.append(
                {
                    "listener": user.listener or None,
                    "pool": user.pool or None,
                    "backend": user.backend or None,
                    "subject": facts.subject,
                    "names": list(facts.names),
                    "issuer": facts.issuer,
                    "serial": facts.serial,
                    "fingerprint_sha256": facts.fingerprint,
                    "key_type": facts.key_type,
                    "not_before": facts.not_before,
                    "not_after": facts.not_after,
                    "days_left": round((facts.not_after - now) / DAY_S, 1),
                    "state": facts.stage(now).name.lower(),
                    "cert_path": str(pair.chain),
                    "key_path": str(pair.key),
                    "ocsp": None
                    if pair.ocsp is None
                    else {
                        "path": str(pair.ocsp),
                        "is_stapled": entry.is_stapled,
                        "next_update": entry.staple_ends,
                    },
                    "last_renewal": self._renewed_at.get((user, str(pair.chain))),
                    "last_failure": None if failure is None else {"at": failure[0], "reason": failure[1]},
                    "is_failing": trouble is not None and bool(trouble.told),
                }
            )
        return shown

    def samples(self) -> Iterator[Sample]:
        """For a scrape. Two certificates of a listener with the same subject count as the earlier end."""
        self._refresh()
        ends: dict[tuple[str, str], float] = {}
        stapled: dict[tuple[str, str], int] = {}
        for entry in self._entries:
            if not entry.user.listener:
                continue
            labels = entry.user.listener, entry.facts.label
            ends[labels] = min(entry.facts.not_after, ends.get(labels, entry.facts.not_after))
            if entry.pair.ocsp is not None:
                stapled[labels] = min(int(entry.is_stapled), stapled.get(labels, 1))
        for labels, end in ends.items():
            yield "certificate_expiry_timestamp_seconds", labels, end
        for labels, is_stapled in stapled.items():
            yield "certificate_ocsp_stapled", labels, is_stapled
        for result, count in self.counts.items():
            yield "certificate_reload", (result,), count
        failing = sum(bool(trouble.told) for trouble in self._troubles.values())
        yield "certificate_reload_failing", (), failing


def signatures(paths: Iterable[str]) -> dict[str, Signature]:
    """What tells each file from what was there before."""
    return {path: _signature(path) for path in paths}


def _signature(path: str) -> Signature:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    # Also the times of the change of its mode: a key that others could read may be fine now.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _listed(found: list[Unit]) -> str:
    more = f" and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
    return ", ".join(map(str, found[:_MAX_LISTED])) + more


def _time(left_s: float) -> str:
    days, hours = int(left_s // DAY_S), int(left_s // 3600)
    if days >= 2:
        return f"{days} days"
    return f"{hours} hours" if hours >= 2 else f"{max(1, int(left_s // 60))} minutes"
