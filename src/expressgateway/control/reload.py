"""A reload, from the file to the running workers, and the account of how it went; and the same for changes.

`Reloads` counts what was asked for and what is done, so that whoever asked can tell their own answer from an
earlier one. `Queue` holds the run-time changes that wait for a reload, or for each other: the supervisor does
one thing at a time, whoever asked for it.
"""

import asyncio
import concurrent.futures
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from expressgateway.control.changes import Change, ChangeError

APPLIED: Final = "applied"
UNCHANGED: Final = "unchanged"
INVALID: Final = "invalid"
REFUSED: Final = "refused"
FAILED: Final = "failed"

RESULTS: Final = (APPLIED, UNCHANGED, INVALID, REFUSED, FAILED)

MAX_WAITING: Final = 32
"""Changes that wait; the next one is refused with 503. Each holds a connection of the admin listener."""
PATIENCE_S: Final = 30.0
"""For a change to be made: a little more than workers take to apply it and, if one cannot, to go back."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a reload or a run-time change ended."""

    result: str
    """One of `RESULTS`. After any but APPLIED and UNCHANGED the old configuration runs on."""
    report: tuple[str, ...] = ()
    """Sentences or diagnostics for the operator."""
    version: int = 0
    """Once it is counted: number of the configuration in force."""

    @property
    def is_success(self) -> bool:
        return self.result in (APPLIED, UNCHANGED)


class FromFile:
    """The wish for a reload that takes its place among run-time changes."""

    def __str__(self) -> str:
        return "a reload"


class Renewal:
    """The wish to have certificates read again."""

    def __str__(self) -> str:
        return "a renewal of certificates"


Wish = Change | FromFile | Renewal


class Reloads:
    """What became of the reloads so far, and which configuration is in force."""

    __slots__ = ("_wall", "applied_at", "changes", "counts", "finished", "last", "requested", "version")

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
        self.changes = dict.fromkeys(RESULTS, 0)
        """Run-time changes, by result."""

    @property
    def is_due(self) -> bool:
        return self.finished < self.requested

    def finish(self, asked: int, outcome: Outcome) -> Outcome:
        """The reload that answers the first `asked` requests is over: its outcome, with the version."""
        self.finished = asked
        self.last = outcome
        self.counts[outcome.result] += 1
        self._count_version(outcome)
        return replace(outcome, version=self.version)

    def finish_change(self, outcome: Outcome) -> Outcome:
        """A run-time change is over: its outcome, with the version."""
        self.changes[outcome.result] += 1
        self._count_version(outcome)
        return replace(outcome, version=self.version)

    def _count_version(self, outcome: Outcome) -> None:
        if outcome.result == APPLIED:
            self.version += 1
            self.applied_at = self._wall()

    def finish_renewal(self, outcome: Outcome) -> Outcome:
        """Workers were given renewed certificates, as a version of their own."""
        self._count_version(outcome)
        return outcome

    def status(self) -> dict[str, Any]:
        last = self.last
        return {
            "requested": self.requested,
            "finished": self.finished,
            "last_result": last.result if last else None,
            "last_report": list(last.report) if last else [],
        }


class Upgrades:
    """What became of the upgrades that failed; after one that did not, another process answers."""

    __slots__ = ("failures", "finished", "last", "requested")

    def __init__(self) -> None:
        self.requested = 0
        self.finished = 0
        self.failures = 0
        self.last = ""

    @property
    def is_due(self) -> bool:
        return self.finished < self.requested

    def fail(self, asked: int, sentence: str) -> None:
        """The one that answers the first `asked` requests came to nothing."""
        self.finished = asked
        self.failures += 1
        self.last = sentence

    def status(self) -> dict[str, Any]:
        return {"requested": self.requested, "finished": self.finished, "last_failure": self.last or None}


FILES_PATIENCE_S: Final = 20.0
"""For a configuration and its files to be read: a dead network mount can take for ever."""

_T = TypeVar("_T")


async def aside(read: Callable[[], _T], patience_s: float | None = FILES_PATIENCE_S) -> _T:
    """Call `read` on a thread of its own, which a stop does not wait for. Raises what it raises, and
    `TimeoutError`: the thread is then left to itself. None: wait as long as it takes."""
    loop = asyncio.get_running_loop()
    told: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def work() -> None:
        try:
            result = read()
        except BaseException as error:  # noqa: BLE001 - handed on to who waits
            told.set_exception(error)
        else:
            told.set_result(result)

    told.set_running_or_notify_cancel()  # nobody's impatience may cancel it under the thread
    # Not the loop's executor: its threads are joined when the process ends.
    threading.Thread(target=work, name="files", daemon=True).start()
    async with asyncio.timeout(patience_s):
        return await asyncio.wrap_future(told, loop=loop)


Check = Callable[[], None]
"""Raises `ChangeError` if a wish is not to be fulfilled any more."""
_Waiting = tuple[Wish, Check | None, asyncio.Future[Outcome]]


class Queue:
    """Run-time changes and reloads in the order they came. `wake` is called when there is one to make."""

    __slots__ = ("_closed", "_waiting", "_wake", "patience_s")

    def __init__(self, wake: Callable[[], None], patience_s: float = PATIENCE_S) -> None:
        self._wake = wake
        self._waiting: deque[_Waiting] = deque()  # at most MAX_WAITING
        self._closed = ""
        self.patience_s = patience_s

    @property
    def is_due(self) -> bool:
        return bool(self._waiting)

    async def ask(self, wish: Wish, check: Check | None = None) -> Outcome:
        """Have a change made, and wait for it. `check` is asked right before.

        Raises `ChangeError`: what stands against it, 503 if it was not begun (too many wait, none is made any
        more), 504 if it takes too long and may yet be made.
        """
        if self._closed:
            raise ChangeError(503, self._closed)
        if len(self._waiting) >= MAX_WAITING:
            raise ChangeError(503, f"{MAX_WAITING} changes wait already: try again")
        told: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        entry = wish, check, told
        self._waiting.append(entry)
        self._wake()
        try:
            await asyncio.wait({told}, timeout=self.patience_s)
        finally:
            # Also if the asker is gone: what nobody waits for is not begun any more.
            if is_unbegun := entry in self._waiting:
                self._waiting.remove(entry)
            if not told.done():
                told.cancel()
        if not told.cancelled():
            return told.result()
        if is_unbegun:
            raise ChangeError(503, "the changes before this one take too long: it was not made, try again")
        raise ChangeError(504, "the workers take too long to confirm: the change may still be made")

    async def make_next(self, make: Callable[[Wish], Awaitable[Outcome]]) -> None:
        """Make the first change that waits, and tell its asker; at once if there is none.

        `make` may raise `ChangeError`. Anything else that it raises reaches the caller too.
        """
        if not self._waiting:
            return
        wish, check, told = self._waiting.popleft()
        try:
            if check is not None:
                check()
            outcome = await make(wish)
        except ChangeError as refused:
            _refuse(told, refused)
        except BaseException:
            _refuse(told, ChangeError(503, "the gateway ended over the change"))
            raise
        else:
            if not told.done():
                told.set_result(outcome)

    def close(self, reason: str) -> None:
        """Refuse what waits and what is asked for from now on. Idempotent."""
        self._closed = reason
        while self._waiting:
            _refuse(self._waiting.popleft()[-1], ChangeError(503, reason))


def _refuse(told: asyncio.Future[Outcome], error: ChangeError) -> None:
    if not told.done():
        told.set_exception(error)
