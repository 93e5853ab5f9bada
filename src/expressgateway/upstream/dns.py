"""Names to addresses, with the time they hold.

`Resolver.resolve(host)` gives an *answer*: all A and AAAA addresses of the name and how long they may be
used. It looks, in this order, at the literal itself, the hosts file, `localhost`, its cache, and DNS. An
answer is *stale* when DNS did not answer and the last good one is given instead: a broken DNS server must
not take a working backend away. A *negative* answer (the name does not exist, or has no addresses) is an
answer: it is an error, not stale.

Times are clamped: a TTL under MIN_TTL_S would have us ask all the time, one over MAX_TTL_S would keep a
moved backend alive for hours. Failures and negative answers hold for NEGATIVE_TTL_S, so a name that is
asked for by every request costs DNS one query in that time.

This module refuses to know backends, pools and ports, and asks only when it is asked to: whoever wants
fresh addresses calls again after `ttl_s`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import math
import os
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import dns.asyncresolver
import dns.exception
import dns.nameserver
import dns.rdatatype
import dns.resolver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["Answer", "DnsCounters", "DnsError", "Resolver"]

log = logging.getLogger(__name__)

MIN_TTL_S: Final = 1.0
MAX_TTL_S: Final = 300.0
NEGATIVE_TTL_S: Final = 5.0

MAX_NAMES: Final = 1024
"""Names remembered, and names asked for at one time. The configuration names the backends, so this is
plenty; the name unused for longest is forgotten."""

MAX_ADDRESSES: Final = 256
"""Addresses of one name that are used: of more, the lowest, so that the same ones are kept from answer to
answer.
"""

MAX_HOSTS_BYTES: Final = 1 << 20
"""Of a larger hosts file the rest is not read."""

LOOPBACK: Final = ("127.0.0.1", "::1")


class DnsError(Exception):
    """There is no address to give for a name. The text is a sentence; `is_negative` if DNS itself says so."""

    def __init__(self, sentence: str, *, is_negative: bool = False) -> None:
        super().__init__(sentence)
        self.is_negative = is_negative


@dataclass(frozen=True, slots=True)
class Answer:
    """The addresses of a name. Never empty, without duplicates, IPv4 first and in order: equal sets are
    equal.
    """

    addresses: tuple[str, ...]

    ttl_s: float
    """For how long from now this may be used; math.inf for a literal."""

    stale: bool = False
    """DNS could not be asked about some or all of it: these are the addresses that were good before."""

    left_out: int = 0
    """Addresses beyond the bound, which are not used."""


@dataclass(slots=True)
class DnsCounters:
    """Since the start: questions put to DNS (one for A and AAAA together), those that failed, stale answers
    given.
    """

    queries: int = 0
    failures: int = 0
    stale_served: int = 0


@dataclass(slots=True)
class _Entry:
    """What is remembered of one name."""

    expires_at: float = 0.0
    answer: Answer | None = None  # its ttl_s is not used
    # Why there is no answer. The error is made anew each time it is raised, or its traceback would grow.
    sentence: str = ""
    is_negative: bool = False
    last_good: dict[dns.rdatatype.RdataType, tuple[str, ...]] = field(default_factory=dict)


class _Watched:
    """A file that is read again when it has changed. One stat per question; no request waits for it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None

    def has_changed(self) -> bool:
        stamp = None
        with contextlib.suppress(OSError):
            status = os.stat(self.path)
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        changed, self._stamp = stamp != self._stamp, stamp
        return changed


class Resolver:
    """Resolves names for one process. Not for several event loops.

    `nameservers` are (address, port) pairs used instead of those of `resolv_conf_path`; search list and
    ndots come from that file in any case. `query_timeout_s` is for one try with one server,
    `total_timeout_s` for all of them.
    """

    def __init__(
        self,
        *,
        nameservers: Sequence[tuple[str, int]] | None = None,
        hosts_path: str = "/etc/hosts",
        resolv_conf_path: str = "/etc/resolv.conf",
        query_timeout_s: float = 2.0,
        total_timeout_s: float = 5.0,
        max_names: int = MAX_NAMES,
        max_addresses: int = MAX_ADDRESSES,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        # Wiring
        self._nameservers = nameservers
        self._query_timeout_s = query_timeout_s
        self._total_timeout_s = total_timeout_s
        self._max_names = max_names
        self._max_addresses = max_addresses
        self._now = now
        self.counters = DnsCounters()

        # Files
        self._hosts_file = _Watched(hosts_path)
        self._hosts: dict[str, tuple[str, ...]] = {}
        self._resolv_conf = _Watched(resolv_conf_path)
        self._stub: dns.asyncresolver.Resolver | None = None

        # Names
        self._entries: dict[str, _Entry] = {}  # used longest ago first; at most max_names
        self._asking: dict[str, asyncio.Task[_Entry]] = {}  # at most max_names

    def __repr__(self) -> str:
        return f"<Resolver names={len(self._entries)} asking={len(self._asking)} {self.counters}>"

    async def resolve(self, host: str) -> Answer:
        """The addresses of `host`, an IP literal (without brackets) or a name. Raises DnsError and nothing
        else.

        Callers that ask for one name at one time share one query; one that is cancelled does not disturb
        the others.
        """
        literal = _as_literal(host)
        if literal is not None:
            return Answer((literal,), math.inf)
        name = host.lower()
        local = self._look_up_hosts(name.removesuffix("."))
        if local is not None:
            return local
        entry = self._entries.get(name)
        if entry is not None and entry.expires_at > self._now():
            self._entries[name] = self._entries.pop(name)
        else:
            entry = await asyncio.shield(self._ask_once(name))
        if entry.answer is None:
            raise DnsError(entry.sentence, is_negative=entry.is_negative)
        if entry.answer.stale:
            self.counters.stale_served += 1
        return replace(entry.answer, ttl_s=max(entry.expires_at - self._now(), 0.0))

    def close(self) -> None:
        """Stop asking; whoever waits for an answer is cancelled. Idempotent."""
        for task in self._asking.values():
            task.cancel()

    # hosts

    def _look_up_hosts(self, name: str) -> Answer | None:
        if self._hosts_file.has_changed():
            self._hosts = _read_hosts(self._hosts_file.path)
        addresses = self._hosts.get(name)
        if addresses is None and (name == "localhost" or name.endswith(".localhost")):
            addresses = LOOPBACK  # RFC 6761 6.3: never a question for DNS
        return None if addresses is None else self._bounded(name, addresses, MAX_TTL_S)

    # DNS

    def _ask_once(self, name: str) -> asyncio.Task[_Entry]:
        task = self._asking.get(name)
        if task is None:
            if len(self._asking) >= self._max_names:
                raise DnsError(f"{name} was not resolved: {self._max_names} other names are being asked for")
            # The dictionary keeps the task alive; it ends by itself within the total timeout.
            task = asyncio.get_running_loop().create_task(self._ask(name), name=f"resolve {name}")
            self._asking[name] = task
            task.add_done_callback(lambda _: self._asking.pop(name, None))
        return task

    async def _ask(self, name: str) -> _Entry:
        """Ask DNS, and remember what it says. Does not raise."""
        before = self._entries.get(name)
        entry = _Entry(last_good=dict(before.last_good) if before else {})
        self.counters.queries += 1
        ttl_s, failure, negative = await self._ask_both(name, entry)
        addresses = [address for family in FAMILIES for address in entry.last_good.get(family, ())]
        if addresses:
            ttl_s = min(ttl_s, NEGATIVE_TTL_S) if failure else ttl_s
            entry.answer = replace(self._bounded(name, addresses, ttl_s), stale=bool(failure))
        elif failure:
            entry.sentence = failure
        else:
            entry.sentence, entry.is_negative = f"{name} {negative}", True
        if failure:
            self.counters.failures += 1
            log.warning("%s%s", failure, "; its last good addresses stay in use" if addresses else "")
        held_s = NEGATIVE_TTL_S if entry.answer is None else entry.answer.ttl_s
        entry.expires_at = self._now() + held_s
        self._remember(name, entry)
        return entry

    async def _ask_both(self, name: str, entry: _Entry) -> tuple[float, str, str]:
        """Ask for A and AAAA at once, and put what they say into `entry.last_good`.

        A family that fails keeps its last good addresses: a lost AAAA answer must not take half a pool away.
        Returns the TTL, the sentence that says what failed, if anything did, and what a negative answer
        means.
        """
        try:
            stub = self._configured_stub()
            results = await asyncio.gather(
                *(
                    stub.resolve(name, family, lifetime=self._total_timeout_s, raise_on_no_answer=False)
                    for family in FAMILIES
                ),
                return_exceptions=True,
            )
        except Exception as error:  # noqa: BLE001 - the net under a library that reads a stranger's bytes
            results = [error]
        ttl_s, failure, negative = MAX_TTL_S, "", "has no addresses"
        for family, result in zip(FAMILIES, results, strict=False):
            if isinstance(result, dns.resolver.NXDOMAIN):
                entry.last_good.pop(family, None)
                negative = "does not exist, says DNS"
            elif isinstance(result, BaseException):
                failure = f"{name} was not resolved: {_cause(result)}"
            else:
                entry.last_good.pop(family, None)
                if result.rrset is not None:
                    entry.last_good[family] = tuple(record.address for record in result.rrset)
                    # Every alias on the way counts: the shortest-lived one ends the answer.
                    ttl_s = min(ttl_s, float(result.chaining_result.minimum_ttl))
        return max(ttl_s, MIN_TTL_S), failure, negative

    def _configured_stub(self) -> dns.asyncresolver.Resolver:
        if self._resolv_conf.has_changed() or self._stub is None:
            stub = dns.asyncresolver.Resolver(configure=False)
            try:
                stub.read_resolv_conf(self._resolv_conf.path)
            except dns.resolver.NoResolverConfiguration:
                stub.nameservers = ["127.0.0.1"]  # what resolv.conf(5) says of a missing one
            if self._nameservers is not None:
                stub.nameservers = [dns.nameserver.Do53Nameserver(*server) for server in self._nameservers]
            stub.use_search_by_default = True  # as the C library does
            stub.timeout = self._query_timeout_s
            stub.cache = None  # the cache is ours: it keeps what was good
            self._stub = stub
        return self._stub

    # Both

    def _bounded(self, name: str, addresses: Iterable[str], ttl_s: float) -> Answer:
        ordered = sorted({ipaddress.ip_address(address) for address in addresses}, key=_order)
        left_out = max(len(ordered) - self._max_addresses, 0)
        if left_out:
            log.warning("%s has %d addresses; %d of them are not used", name, len(ordered), left_out)
            del ordered[self._max_addresses :]
        return Answer(tuple(map(str, ordered)), ttl_s, left_out=left_out)

    def _remember(self, name: str, entry: _Entry) -> None:
        self._entries.pop(name, None)
        while len(self._entries) >= self._max_names:
            del self._entries[next(iter(self._entries))]
        self._entries[name] = entry


FAMILIES: Final = (dns.rdatatype.A, dns.rdatatype.AAAA)


def _order(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> tuple[int, int]:
    return address.version, int(address)


def _as_literal(host: str) -> str | None:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return None


def _cause(error: BaseException) -> str:
    if isinstance(error, dns.exception.Timeout):
        return "DNS did not answer in time"
    if isinstance(error, dns.resolver.NoNameservers):
        return "no DNS server gave a usable answer"
    return f"{type(error).__name__}: {error}"


def _read_hosts(path: str) -> dict[str, tuple[str, ...]]:
    """hosts(5): an address, then its names; a line that is not that is skipped, as the C library does."""
    hosts: dict[str, list[str]] = {}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read(MAX_HOSTS_BYTES).splitlines()
    except OSError:
        return {}
    for line in lines:
        fields = line.partition("#")[0].split()
        address = _as_literal(fields[0]) if fields else None
        if address is not None:
            for name in fields[1:]:
                hosts.setdefault(name.lower().removesuffix("."), []).append(address)
    return {name: tuple(addresses) for name, addresses in hosts.items()}
