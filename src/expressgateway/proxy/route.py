"""Where a request goes and by which rules: a compiled route, and the targets it may have.

A *target* is a pool as one listener uses it: with what it takes for a key, its session cookie and its
retries. A *route* leads to one target, to several by weight, or to an answer of its own.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Final
from zlib import crc32

from expressgateway.observe.counters import RouteCounters
from expressgateway.proxy.forwarding import Peer
from expressgateway.proxy.rewriting import Answer, HeaderEdits, Rewrite
from expressgateway.upstream.pool import Pool
from expressgateway.wire.head import Field, RequestHead

KeyOf = Callable[[RequestHead, Peer], bytes | None]

ANY_NUMBER: Final = 0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """``[retry]``, compiled. As it stands: what a pool without the table gets."""

    attempts: int = ANY_NUMBER
    """In all, the first included; ``ANY_NUMBER``: as many as there are backends."""
    on_connect: bool = True
    on_stale: bool = True
    on_reset: bool = False
    statuses: frozenset[int] = frozenset()
    per_try_s: float = 0.0
    """For one attempt, to its response head; 0: off."""

    @property
    def replays(self) -> bool:
        """Whether a request may have to be sent again although a fresh connection took it."""
        return self.on_reset or bool(self.statuses) or self.per_try_s > 0


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; 0 is off."""

    header: float
    body: float
    total: float
    head: float
    idle: float


@dataclass(frozen=True, slots=True)
class SessionCookie:
    """A cookie by which a client is known again."""

    name: bytes
    attributes: bytes
    """As they stand behind the value, each with its semicolon."""

    @classmethod
    def of(
        cls, name: str, *, path: str, secure: bool, http_only: bool, same_site: str, max_age_s: int
    ) -> "SessionCookie":
        tail = f"; Path={path}"
        if max_age_s:
            tail += f"; Max-Age={max_age_s}"
        if secure:
            tail += "; Secure"
        if http_only:
            tail += "; HttpOnly"
        return cls(name.encode("ascii"), f"{tail}; SameSite={same_site.capitalize()}".encode("ascii"))

    def field(self, value: bytes) -> Field:
        """The field that gives it to a client (RFC 6265 4.1)."""
        return (b"set-cookie", self.name + b"=" + value + self.attributes)


class Target:
    """A pool, as one listener uses it."""

    __slots__ = ("cookie", "is_keyed", "key_of", "pool", "retry")

    def __init__(
        self,
        pool: Pool,
        retry: RetryPolicy,
        key_of: KeyOf | None = None,
        cookie: SessionCookie | None = None,
    ) -> None:
        self.pool = pool
        self.retry = retry
        self.key_of = key_of
        """What its policy goes by; None: a policy that needs no key."""
        self.cookie = cookie
        self.is_keyed = key_of is not None or cookie is not None


class Split:
    """Several targets by weight. The same key always gives the same one; without a key chance decides."""

    __slots__ = ("_bounds", "_cookie", "_key_of", "_total", "targets")

    def __init__(
        self,
        shares: Iterable[tuple[Target, int]],
        key_of: KeyOf | None = None,
        cookie: SessionCookie | None = None,
    ) -> None:
        """``shares``: at least one has a weight. ``cookie``: what a client without a key is given as one."""
        weighted = [(target, weight) for target, weight in shares if weight]
        self.targets = [target for target, _ in weighted]
        self._bounds = list(accumulate(weight for _, weight in weighted))
        self._total = self._bounds[-1]
        self._key_of = key_of
        self._cookie = cookie

    def choose(self, head: RequestHead, peer: Peer) -> tuple[Target, Field | None]:
        """The target, and the field that makes the client come back to it."""
        field = None
        key = self._key_of(head, peer) if self._key_of is not None else None
        if key is None and self._cookie is not None:
            key = b"%016x" % random.getrandbits(64)
            field = self._cookie.field(key)
        point = random.random() if key is None else crc32(key) / 2**32
        return self.targets[bisect_right(self._bounds, point * self._total)], field


class MirrorRule:
    """A copy of some requests goes to another pool."""

    __slots__ = ("_share", "target")

    def __init__(self, target: Target, percent: int) -> None:
        self.target = target
        self._share = percent / 100

    def applies(self) -> bool:
        return random.random() < self._share


class Route:
    """See the module's text. ``is_plain``: nothing to do but to go to its one target."""

    __slots__ = (
        "answer",
        "counters",
        "edits",
        "is_plain",
        "mirror",
        "name",
        "response_edits",
        "retry",
        "rewrite",
        "split",
        "target",
        "timeouts",
    )

    def __init__(
        self,
        name: str,
        counters: RouteCounters,
        timeouts: Timeouts,
        *,
        target: Target | None = None,
        split: Split | None = None,
        answer: Callable[[RequestHead], Answer | None] | None = None,
        rewrite: Rewrite | None = None,
        edits: HeaderEdits | None = None,
        response_edits: HeaderEdits | None = None,
        retry: RetryPolicy | None = None,
        mirror: MirrorRule | None = None,
    ) -> None:
        """At most one of ``target``, ``split`` and ``answer``; without any it leads nowhere. ``retry``:
        instead of its targets' own."""
        self.name = name
        self.counters = counters
        self.timeouts = timeouts
        self.target = target
        self.split = split
        self.answer = answer
        self.rewrite = rewrite
        self.edits = edits
        self.response_edits = response_edits
        self.retry = retry
        self.mirror = mirror
        changes = (rewrite, edits, mirror)
        self.is_plain = target is not None and all(change is None for change in changes)
