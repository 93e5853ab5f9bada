"""The names of all backends, asked about for as long as the configuration names them.

One task per distinct name asks the resolver, and again when the answer's time is over. The *answer* of a name
is what the workers are told; it goes on through failures of DNS. A name is in one *situation*: unasked, good,
stale (DNS could not be asked about some or all of it: the last good endpoints stay), failing (the same, and
there are none) or negative. Every change of situation is one line in the log.

A negative answer - DNS says that there is no such name - counts when it was repeated for NEGATIVE_HOLD_S:
zones are published by halves now and then, and an empty pool serves nobody. Until then it is a stale one.

This module knows no pool and no health: who is there, not who is well.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from expressgateway.control.channel import Message
from expressgateway.observe.counters import Sample
from expressgateway.upstream.backend import BackendSettings
from expressgateway.upstream.discovery import Endpoint, names_of, srv_name
from expressgateway.upstream.dns_answers import MAX_TTL_S, Answer, DnsCounters, DnsError, SrvAnswer

if TYPE_CHECKING:
    from expressgateway.upstream.dns import Resolver

log = logging.getLogger(__name__)

MIN_WAIT_S: Final = 1.0
"""Between two questions about one name."""

RETRY_S: Final = 5.0
"""After an answer that was none."""

NEGATIVE_HOLD_S: Final = 30.0
"""For how long DNS must go on saying that a name is gone before its endpoints are given up."""


class Situation(Enum):
    UNASKED = "unasked"
    GOOD = "good"
    STALE = "stale"
    FAILING = "failing"
    NEGATIVE = "negative"


class _Name:
    """What is known of one name."""

    __slots__ = (
        "asked",
        "endpoints",
        "error",
        "expires_at",
        "is_crowded",
        "key",
        "negative_since",
        "pools",
        "situation",
        "task",
    )

    def __init__(self, key: str) -> None:
        self.key = key
        self.pools: tuple[str, ...] = ()
        self.endpoints: tuple[Endpoint, ...] = ()
        self.situation = Situation.UNASKED
        self.error = ""
        """Why the situation is not good: a sentence."""
        self.expires_at = 0.0
        """When it is asked about again."""
        self.negative_since: float | None = None
        self.is_crowded = False
        """It has more addresses than are used."""
        self.asked = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    @property
    def title(self) -> str:
        srv = srv_name(self.key)
        name = f"the name {self.key}" if srv is None else f"the service {srv}"
        if not self.pools:
            return name
        return f"{name} ({'pool' if len(self.pools) == 1 else 'pools'} {', '.join(self.pools)})"


class Discovery:
    """The one of the supervisor. It takes the resolver over: ``close`` closes both.

    ``on_change`` is called with the keys whose endpoints are others than before, the first ones included; not
    for another order. Never from inside a call of ours.
    """

    def __init__(
        self,
        on_change: Callable[[frozenset[str]], None],
        resolver: "Resolver | None" = None,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._on_change = on_change
        self._resolver = resolver
        """None as long as nothing was to be asked."""
        self._now = now
        self._sleep = sleep
        self._names: dict[str, _Name] = {}  # as many as the configuration names, and the next one
        self._held = 0  # answers that said a name was gone, and were not believed yet

    def _resolving(self) -> "Resolver":
        if self._resolver is None:
            # Few configurations have names, and the library takes a tenth of the time that a start takes.
            from expressgateway.upstream.dns import Resolver

            self._resolver = Resolver()
        return self._resolver

    # -- what to watch

    def apply(self, pools: Mapping[str, Sequence[BackendSettings]]) -> None:
        """Watch the names of these backends and no others. A name that stays is not asked about anew; one
        that goes is forgotten, with its task."""
        users: dict[str, list[str]] = {}
        for pool, backends in pools.items():
            for key in names_of(backends):
                users.setdefault(key, []).append(pool)
        for key in [key for key in self._names if key not in users]:
            self._forget(self._names.pop(key))
        for key, of_pools in users.items():
            self._watch(key).pools = tuple(of_pools)

    async def first_answers(self, timeout_s: float) -> list[str]:
        """Wait until every name was asked about once, whatever the outcome. Gives those that were not in that
        time."""
        return await self._asked(list(self._names), timeout_s)

    async def preload(self, names: Iterable[str], timeout_s: float) -> list[str]:
        """Watch these keys (`names_of`) as well, until the next ``apply``, and wait for their first answers
        as ``first_answers`` does: so that a new configuration begins with full pools. If that is refused,
        ``apply`` the one in force again."""
        keys = list(names)
        for key in keys:
            self._watch(key)
        return await self._asked(keys, timeout_s)

    def close(self) -> None:
        """Ask no more. What is known stays readable. Idempotent."""
        for name in self._names.values():
            self._forget(name)
        if self._resolver is not None:
            self._resolver.close()

    def _watch(self, key: str) -> _Name:
        name = self._names.get(key)
        if name is None:
            name = self._names[key] = _Name(key)
            loop = asyncio.get_running_loop()
            name.task = loop.create_task(self._follow(name), name=f"discovery {key}")
        return name

    def _forget(self, name: _Name) -> None:
        if name.task is not None:
            name.task.cancel()
            name.task = None

    async def _asked(self, keys: Sequence[str], timeout_s: float) -> list[str]:
        waiting = [self._names[key].asked for key in keys if key in self._names]
        try:
            async with asyncio.timeout(timeout_s):
                for event in waiting:
                    await event.wait()
        except TimeoutError:
            pass
        return [key for key in keys if key in self._names and not self._names[key].asked.is_set()]

    # -- what is known

    def answers(self) -> dict[str, tuple[Endpoint, ...]]:
        """The endpoints of every name by its key; none for a name that never had any."""
        return {name.key: name.endpoints for name in self._names.values()}

    def message(self) -> Message:
        """The ``answers`` message: everything that is known, replacing what was said before."""
        names = {key: [list(each) for each in endpoints] for key, endpoints in self.answers().items()}
        return {"type": "answers", "names": names}

    def describe(self) -> list[dict[str, Any]]:
        """Every name as the admin listener shows it."""
        now = self._now()
        return [
            {
                "name": name.key,
                "pools": list(name.pools),
                "addresses": [_shown(each) for each in name.endpoints],
                "state": name.situation.value,
                "stale": name.situation is Situation.STALE,
                "ttl_left_ms": max(round((name.expires_at - now) * 1000), 0),
                "last_error": name.error or None,
            }
            for name in self._names.values()
        ]

    def samples(self) -> Iterator[Sample]:
        """The caller may pause between two of them."""
        counters = DnsCounters() if self._resolver is None else self._resolver.counters
        yield "dns_queries", (), counters.queries
        yield "dns_failures", (), counters.failures
        yield "dns_stale_served", (), counters.stale_served + self._held
        for name in list(self._names.values()):
            yield "dns_addresses", (name.key,), len(name.endpoints)

    # -- one name's task

    async def _follow(self, name: _Name) -> None:
        """A name that does not resolve holds no other up: each has a task of its own."""
        while True:
            wait_s = RETRY_S
            try:
                wait_s = await self._ask(name)
            except Exception:
                # The safety net: a defect here must not leave a pool with yesterday's addresses for ever.
                log.exception("%s: asking about it failed: this is a defect; it is tried again", name.title)
            wait_s = min(max(wait_s, MIN_WAIT_S), MAX_TTL_S)
            name.expires_at = self._now() + wait_s
            name.asked.set()
            await self._sleep(wait_s)

    async def _ask(self, name: _Name) -> float:
        """Ask once; the time until the next question."""
        srv = srv_name(name.key)
        try:
            if srv is None:
                answer: Answer | SrvAnswer = await self._resolving().resolve(name.key)
            else:
                answer = await self._resolving().resolve_srv(srv)
        except DnsError as error:
            return self._on_error(name, error)
        if isinstance(answer, SrvAnswer):
            endpoints = answer.endpoints
        else:
            endpoints = tuple(Endpoint(ip) for ip in answer.addresses)
        name.negative_since = None
        if answer.left_out and not name.is_crowded:
            log.warning("%s has more addresses than are used: %d are left out", name.title, answer.left_out)
        name.is_crowded = bool(answer.left_out)
        self._take(name, Situation.STALE if answer.stale else Situation.GOOD, answer.failure, endpoints)
        return answer.ttl_s

    def _on_error(self, name: _Name, error: DnsError) -> float:
        """What is known stays, unless DNS says for long enough that the name is gone."""
        now = self._now()
        if not error.is_negative:
            name.negative_since = None
            situation = Situation.STALE if name.endpoints else Situation.FAILING
            self._take(name, situation, str(error), name.endpoints)
            return RETRY_S
        if name.negative_since is None:
            name.negative_since = now
        if name.endpoints and now - name.negative_since < NEGATIVE_HOLD_S:
            self._held += 1
            self._take(name, Situation.STALE, str(error), name.endpoints)
        else:
            self._take(name, Situation.NEGATIVE, str(error), ())
        return RETRY_S

    def _take(self, name: _Name, situation: Situation, error: str, endpoints: tuple[Endpoint, ...]) -> None:
        before, name.situation, name.error = name.situation, situation, error
        has_changed = set(endpoints) != set(name.endpoints)
        if has_changed:
            name.endpoints = endpoints
        if situation is not before:
            _tell(name, before)
        if has_changed:
            self._on_change(frozenset((name.key,)))


def _tell(name: _Name, before: Situation) -> None:
    fields = {"fields": {"kind": "dns", "source": name.key, "state": name.situation.value}}
    count = len(name.endpoints)
    match name.situation:
        case Situation.GOOD:
            if before is not Situation.UNASKED:
                log.info("%s is resolved again, to %s", name.title, _counted(count), extra=fields)
        case Situation.STALE:
            sentence = "%s keeps the %s it has: %s"
            log.warning(sentence, name.title, _counted(count), name.error, extra=fields)
        case _:
            log.warning("%s gives no backends: %s", name.title, name.error, extra=fields)


def _counted(count: int) -> str:
    return "1 address" if count == 1 else f"{count} addresses"


def _shown(endpoint: Endpoint) -> str:
    if not endpoint.port:
        return endpoint.ip
    return f"[{endpoint.ip}]:{endpoint.port}" if ":" in endpoint.ip else f"{endpoint.ip}:{endpoint.port}"
