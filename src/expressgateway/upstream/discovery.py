"""Who is there: from configured addresses to a pool's living backends.

Literal addresses are known at once. Names are resolved by TTL, every address a backend of its own with an id
made of the configured id and the address, so that counters and affinity survive a changed answer. When DNS
fails, the last good answer stays; before there is any, the pool is empty and says why.
"""

import asyncio
import ipaddress
import logging
from collections.abc import Sequence
from typing import Final

from expressgateway.observe.logs import Limited
from expressgateway.upstream.backend import BackendSettings, SocketAddress
from expressgateway.upstream.dns import DnsError, Resolver
from expressgateway.upstream.errors import Fault
from expressgateway.upstream.pool import Pool

log = logging.getLogger(__name__)
limited: Final = Limited(log)

_RETRY_S: Final = 5.0  # after a failure
_MIN_WAIT_S: Final = 1.0
_MAX_WAIT_S: Final = 300.0

Found = tuple[BackendSettings, SocketAddress, str]


def is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def socket_address(ip: str, port: int) -> SocketAddress:
    return (ip, port, 0, 0) if ":" in ip else (ip, port)


class Discovery:
    """Keeps one pool's set current. ``apply`` may be called again with another configuration."""

    def __init__(self, pool: Pool, resolver: Resolver) -> None:
        self._pool = pool
        self._resolver = resolver
        self._settings: tuple[BackendSettings, ...] = ()
        self._policy = pool.policy
        self._answers: dict[str, tuple[str, ...]] = {}  # one entry per configured name
        self._tasks: list[asyncio.Task[None]] = []  # one per configured name
        self._unasked: set[str] = set()
        self._is_asked = asyncio.Event()

    def apply(self, settings: Sequence[BackendSettings], policy: str) -> None:
        """Literal addresses count from now on; names from their first answer (or the one known already)."""
        self._settings = tuple(settings)
        self._policy = policy
        names = {each.host for each in settings if not is_literal(each.host)}
        self._answers = {name: self._answers[name] for name in names if name in self._answers}
        self._publish()
        self.close()
        self._unasked = set(names)
        self._is_asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._watch(name), name=f"discovery {self._pool.name} {name}") for name in names
        ]

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks = []

    async def first_answers(self, timeout_s: float) -> None:
        """Wait until every name was asked for once and what was found is in the pool, or the time is up."""
        if self._unasked:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._is_asked.wait()
            except TimeoutError:
                return

    async def _watch(self, name: str) -> None:
        """One name's task: a name that does not resolve holds no other one up."""
        while True:
            try:
                answer = await self._resolver.resolve(name)
            except DnsError as error:
                limited.warning("dns", name, f"a backend's name could not be resolved: {error}")
                wait_s = _RETRY_S
                if not self._pool.backends:
                    self._pool.empty_fault = Fault.DNS
            else:
                wait_s = min(answer.ttl_s, _MAX_WAIT_S)
                if self._answers.get(name) != answer.addresses:
                    self._answers[name] = answer.addresses
                    self._publish()
            self._unasked.discard(name)
            if not self._unasked:
                self._is_asked.set()
            await asyncio.sleep(max(wait_s, _MIN_WAIT_S))

    def _publish(self) -> None:
        found: list[Found] = []
        taken: set[str] = set()
        for each in self._settings:
            if is_literal(each.host):
                ips: tuple[str, ...] = (each.host,)
            else:
                ips = self._answers.get(each.host, ())
            for ip in ips:
                id_ = each.id if is_literal(each.host) else f"{each.id}#{ip}"
                if id_ not in taken:
                    taken.add(id_)
                    found.append((each, socket_address(ip, each.port), id_))
        self._pool.replace(found, self._policy)
        if not found:
            self._pool.empty_fault = Fault.DNS if self._settings else Fault.NO_BACKEND
