"""Names to addresses, and services to addresses and ports, with the time they hold.

`Resolver.resolve(host)` gives an *answer*: all A and AAAA addresses of the name and how long they may be
used. It looks, in this order, at the literal itself, the hosts file, `localhost`, its memory, and DNS.
`Resolver.resolve_srv(name)` does the same for a *service* (RFC 2782): the records of the lowest priority, and
the addresses of each record's host as `resolve` gives them. What a server volunteers beside the answer is not
believed.

An answer is *stale* when DNS did not answer and the last good one is given instead: a broken DNS server must
not take a working backend away. A *negative* answer (the name does not exist, or has nothing of what was
asked for) is an answer: it is an error, not stale.

Times are clamped: a TTL under MIN_TTL_S would have us ask all the time, one over MAX_TTL_S would keep a
moved backend alive for hours. Failures and negative answers hold for NEGATIVE_TTL_S, so a name that is
asked for by every request costs DNS one query in that time.

This module refuses to know backends and pools, logs nothing, and asks only when it is asked to: whoever wants
fresh addresses calls again after `ttl_s`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import dns.asyncresolver
import dns.exception
import dns.name
import dns.nameserver
import dns.rdatatype
import dns.resolver
import dns.rrset

from expressgateway.upstream.discovery import Endpoint
from expressgateway.upstream.dns_answers import MAX_TTL_S, Answer, DnsCounters, DnsError, SrvAnswer
from expressgateway.upstream.hosts import HostsFile, Watched, as_literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

MIN_TTL_S: Final = 1.0
NEGATIVE_TTL_S: Final = 5.0

LOCAL_TTL_S: Final = 5.0
"""What the hosts file says is looked at again after this: it costs no question, only a stat."""

MAX_NAMES: Final = 4096
"""Names remembered, and names asked for or waiting to be. The configuration names the backends, and a service
at most MAX_ADDRESSES hosts, so this is plenty; the name unused for longest is forgotten."""

MAX_AT_ONCE: Final = 256
"""Names that DNS is being asked for at one time: each takes two sockets. Others wait their turn."""

MAX_ADDRESSES: Final = 256
"""Addresses of one name, or endpoints of one service, that are used: of more, the lowest, so that the same
ones are kept from answer to answer.
"""


class _Record(NamedTuple):
    """What is used of an A, AAAA or SRV record."""

    host: str
    """An address, or the name that an SRV record gives."""

    port: int = 0
    weight: int = 0


Types = tuple[dns.rdatatype.RdataType, ...]

ADDRESSES: Final[Types] = (dns.rdatatype.A, dns.rdatatype.AAAA)
SERVICES: Final[Types] = (dns.rdatatype.SRV,)

_NEGATIVE: Final = {ADDRESSES: "has no addresses", SERVICES: "has no SRV records"}


@dataclass(slots=True)
class _Entry:
    """What is remembered of one name."""

    expires_at: float = 0.0

    failure: str = ""
    """Why DNS could not be asked about some or all of it: a sentence."""

    negative: str = ""
    """What DNS says, if there is nothing. Errors are made anew each time, or their traceback would grow."""

    good: dict[dns.rdatatype.RdataType, tuple[_Record, ...]] = field(default_factory=dict)
    """The last good records; at most MAX_ADDRESSES of each type."""

    left_out: dict[dns.rdatatype.RdataType, int] = field(default_factory=dict)

    @property
    def records(self) -> list[_Record]:
        """All of them, IPv4 first: types by their number."""
        return [record for each in sorted(self.good) for record in self.good[each]]


_Question = tuple[str, Types]
_T = TypeVar("_T")


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
        self._hosts = HostsFile(hosts_path)
        self._resolv_conf = Watched(resolv_conf_path)
        self._stub: dns.asyncresolver.Resolver | None = None

        # Names
        self._entries: dict[_Question, _Entry] = {}  # used longest ago first; at most max_names
        self._asking: dict[_Question, asyncio.Task[_Entry]] = {}  # at most max_names
        self._turns = asyncio.Semaphore(MAX_AT_ONCE)

    def __repr__(self) -> str:
        return f"<Resolver names={len(self._entries)} asking={len(self._asking)} {self.counters}>"

    async def resolve(self, host: str) -> Answer:
        """The addresses of `host`, an IP literal (without brackets) or a name. Raises DnsError and nothing
        else.

        Callers that ask for one name at one time share one query; one that is cancelled does not disturb
        the others.
        """
        literal = as_literal(host)
        if literal is not None:
            return Answer((literal,), math.inf)
        name = host.lower()
        local = self._hosts.look_up(name.removesuffix("."))
        if local is not None:
            kept, left_out = self._bounded(_in_order(local))
            return Answer(tuple(kept), LOCAL_TTL_S, left_out=left_out)
        return self._answer(await self._known(name, ADDRESSES))

    async def resolve_srv(self, name: str) -> SrvAnswer:
        """The endpoints of a service such as ``_http._tcp.example.com``. Raises DnsError and nothing else.

        RFC 2782: a record whose host is "." says that there is no such service: with no other, the answer is
        negative. A host that does not exist has no endpoint; one that could not be asked about keeps its last
        good addresses.
        """
        entry = await self._known(name.lower(), SERVICES)
        records = entry.records
        ttl_s, failure = entry.expires_at - self._now(), entry.failure
        left_out = sum(entry.left_out.values())
        weights: dict[tuple[str, int], int] = {}
        answers = await self._resolve_each({record.host for record in records})
        for answer in answers.values():
            if isinstance(answer, DnsError):
                ttl_s = min(ttl_s, NEGATIVE_TTL_S)
                if not answer.is_negative:
                    failure = f"of the service {name}, {answer}"
            else:
                ttl_s = min(ttl_s, answer.ttl_s)
                failure = answer.failure or failure
                left_out += answer.left_out
        for record in records:
            answer = answers[record.host]
            for ip in answer.addresses if isinstance(answer, Answer) else ():
                here = ip, record.port
                if here in weights or len(weights) < self._max_addresses:
                    # The same address and port twice is a mistake of the zone's: the larger weight counts.
                    weights[here] = max(record.weight, weights.get(here, 0))
                else:
                    left_out += 1
        if not weights:
            if not failure:
                raise DnsError(f"no host of {name} has an address, says DNS", is_negative=True)
            raise DnsError(failure)
        ordered = sorted(weights, key=lambda here: (_order(ipaddress.ip_address(here[0])), here[1]))
        endpoints = tuple(Endpoint(*here, weights[here]) for here in ordered)
        return SrvAnswer(endpoints, max(ttl_s, 0.0), bool(failure), left_out, failure)

    def close(self) -> None:
        """Stop asking; whoever waits for an answer is cancelled. Idempotent."""
        for task in self._asking.values():
            task.cancel()

    async def _resolve_each(self, hosts: Iterable[str]) -> dict[str, Answer | DnsError]:
        """Resolve the hosts of a service, in a time that does not grow with their number."""
        loop = asyncio.get_running_loop()
        tasks = {host: loop.create_task(self.resolve(host), name=f"resolve {host}") for host in hosts}
        try:
            # Twice: a host may have to wait for its turn behind others that do not answer.
            await asyncio.wait(tasks.values(), timeout=2 * self._total_timeout_s)
        finally:
            for task in tasks.values():
                task.cancel()  # no more than a word for those that are done
        answers: dict[str, Answer | DnsError] = {}
        for host, task in tasks.items():
            if not task.done() or task.cancelled():
                answers[host] = self._remembered(host)
            elif isinstance(error := task.exception(), DnsError):
                answers[host] = error
            else:
                answers[host] = task.result()
        return answers

    # Memory

    async def _known(self, name: str, types: Types) -> _Entry:
        """What is known of the name, from DNS if need be; it has records, or DnsError is raised."""
        question = (name, types)
        entry = self._entries.get(question)
        if entry is not None and entry.expires_at > self._now():
            self._entries[question] = self._entries.pop(question)
        else:
            entry = await asyncio.shield(self._ask_once(question))
        if not entry.good:
            raise DnsError(entry.failure or entry.negative, is_negative=not entry.failure)
        if entry.failure:
            self.counters.stale_served += 1
        return entry

    def _remembered(self, host: str) -> Answer | DnsError:
        """The last good answer for a name that DNS is still being asked about, or that waits for its turn."""
        failure = f"{host} was not resolved: DNS did not answer in time"
        entry = self._entries.get((host, ADDRESSES))
        if entry is None or not entry.good:
            return DnsError(failure)
        self.counters.stale_served += 1
        return replace(self._answer(entry), ttl_s=NEGATIVE_TTL_S, stale=True, failure=failure)

    def _answer(self, entry: _Entry) -> Answer:
        # Each family is bounded and in order, and IPv4 is the first.
        kept, left_out = self._bounded([record.host for record in entry.records])
        ttl_s = max(entry.expires_at - self._now(), 0.0)
        left_out += sum(entry.left_out.values())
        return Answer(tuple(kept), ttl_s, bool(entry.failure), left_out, entry.failure)

    def _remember(self, question: _Question, entry: _Entry) -> None:
        self._entries.pop(question, None)
        while len(self._entries) >= self._max_names:
            del self._entries[next(iter(self._entries))]
        self._entries[question] = entry

    # DNS

    def _ask_once(self, question: _Question) -> asyncio.Task[_Entry]:
        task = self._asking.get(question)
        if task is None:
            name, _ = question
            if len(self._asking) >= self._max_names:
                raise DnsError(f"{name} was not resolved: {self._max_names} other names are being asked for")
            # The dictionary keeps the task alive; from its turn on it ends within the total timeout.
            task = asyncio.get_running_loop().create_task(self._ask(question), name=f"resolve {name}")
            self._asking[question] = task
            task.add_done_callback(lambda _: self._asking.pop(question, None))
        return task

    async def _ask(self, question: _Question) -> _Entry:
        """Ask DNS, and remember what it says. Does not raise."""
        before = self._entries.get(question)
        entry = _Entry(good=dict(before.good), left_out=dict(before.left_out)) if before else _Entry()
        async with self._turns:
            self.counters.queries += 1
            ttl_s = await self._ask_types(*question, entry)
        if entry.failure:
            self.counters.failures += 1
        if entry.failure or not entry.good:
            ttl_s = min(ttl_s, NEGATIVE_TTL_S) if entry.good else NEGATIVE_TTL_S
        entry.expires_at = self._now() + ttl_s
        self._remember(question, entry)
        return entry

    async def _ask_types(self, name: str, types: Types, entry: _Entry) -> float:
        """Ask for all types at once, and put what DNS says into `entry`; the TTL of that.

        A type that fails keeps its last good records: a lost AAAA answer must not take half a pool away.
        """
        try:
            stub = self._configured_stub()
            results = await asyncio.gather(
                *(self._ask_type(stub, name, each) for each in types), return_exceptions=True
            )
        except Exception as error:  # noqa: BLE001 - the net under a library that reads a stranger's bytes
            results = [error]
        ttl_s = MAX_TTL_S
        entry.negative = f"{name} {_NEGATIVE[types]}"
        for each, result in zip(types, results, strict=False):
            if isinstance(result, dns.resolver.NXDOMAIN):
                self._keep(each, (), entry)
                entry.negative = f"{name} does not exist, says DNS"
            elif isinstance(result, BaseException):
                entry.failure = f"{name} was not resolved: {_cause(result)}"
            elif result.rrset is None:
                self._keep(each, (), entry)
            else:
                records = _READ[types](result.rrset)
                if not records:
                    entry.negative = f"{name} is a service that is not offered, says DNS"
                self._keep(each, records, entry)
                # Every alias on the way counts: the shortest-lived one ends the answer.
                ttl_s = min(ttl_s, float(result.chaining_result.minimum_ttl))
        return max(ttl_s, MIN_TTL_S)

    async def _ask_type(
        self, stub: dns.asyncresolver.Resolver, name: str, each: dns.rdatatype.RdataType
    ) -> dns.resolver.Answer:
        # The lifetime does not bound the pauses that the library makes between its tries.
        async with asyncio.timeout(self._total_timeout_s):
            return await stub.resolve(name, each, lifetime=self._total_timeout_s, raise_on_no_answer=False)

    def _keep(self, each: dns.rdatatype.RdataType, records: Sequence[_Record], entry: _Entry) -> None:
        kept, left_out = self._bounded(records)
        entry.good.pop(each, None)
        entry.left_out.pop(each, None)
        if kept:
            entry.good[each] = tuple(kept)
            entry.left_out[each] = left_out

    def _bounded(self, ordered: Sequence[_T]) -> tuple[Sequence[_T], int]:
        """As much as is used, and how many are left out."""
        return ordered[: self._max_addresses], max(len(ordered) - self._max_addresses, 0)

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


def _order(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> tuple[int, int]:
    return address.version, int(address)


def _in_order(addresses: Iterable[str]) -> list[str]:
    """Each once, IPv4 first."""
    return [str(each) for each in sorted({ipaddress.ip_address(each) for each in addresses}, key=_order)]


def _read_addresses(rrset: dns.rrset.RRset) -> list[_Record]:
    return [_Record(address) for address in _in_order(record.address for record in rrset)]


def _read_services(rrset: dns.rrset.RRset) -> list[_Record]:
    """The records that can be used: of the lowest priority number, with a host and a port; in order."""
    usable = [each for each in rrset if each.target != dns.name.root and each.port]
    lowest = min((each.priority for each in usable), default=0)
    # The dot at the end stays: a host in a record is never a matter for the search list.
    return sorted(
        {
            _Record(each.target.to_text().lower(), each.port, each.weight)
            for each in usable
            if each.priority == lowest
        }
    )


_READ: Final = {ADDRESSES: _read_addresses, SERVICES: _read_services}


def _cause(error: BaseException) -> str:
    if isinstance(error, TimeoutError | dns.exception.Timeout):
        return "DNS did not answer in time"
    if isinstance(error, dns.resolver.NoNameservers):
        return "no DNS server gave a usable answer"
    return f"{type(error).__name__}: {error}"
