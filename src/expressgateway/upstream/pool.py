"""A pool: backends that are interchangeable, and the policy that chooses among them.

The pool owns the living backends. Its set changes in two ways - a reload, and names that resolve to other
addresses - and both go through ``replace``: what stays keeps its object, counters and connections; what
leaves finishes its exchanges and closes its idle connections.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from expressgateway.observe.counters import Tally
from expressgateway.upstream.backend import Backend, BackendSettings, SocketAddress
from expressgateway.upstream.errors import Fault
from expressgateway.upstream.selection import POLICIES, Selection

_TURNS: Final = 8  # asked of a policy before its order of preference is walked

Attach = Callable[[Backend], None]


class Pool:
    """One pool of one worker."""

    __slots__ = (
        "_attach",
        "_leaving",
        "backends",
        "empty_fault",
        "name",
        "picks",
        "policy",
        "retries",
        "selection",
        "unavailable",
        "unsolicited_before",
    )

    def __init__(self, name: str, policy: str, attach: Attach) -> None:
        """``attach`` gives a new backend its connections, in the way of its protocol."""
        self.name = name
        self.policy = policy
        self._attach = attach
        self.backends: tuple[Backend, ...] = ()
        self._leaving: list[Backend] = []
        self.selection: Selection = POLICIES[policy](())
        self.empty_fault = Fault.NO_BACKEND
        """Why there are no backends, when there are none."""
        # Counters
        self.picks = 0
        self.unavailable = 0
        self.retries = Tally()
        self.unsolicited_before = 0
        """``Backend.unsolicited`` of those that have left: the pool's count never goes back."""

    def replace(self, wanted: Sequence[tuple[BackendSettings, SocketAddress, str]], policy: str) -> None:
        """Make this the pool's set: settings, address and id of each. Ids are unique."""
        known = {(backend.id, backend.address): backend for backend in self.backends}
        backends: list[Backend] = []
        for settings, address, id_ in wanted:
            backend = known.get((id_, address))
            if backend is not None and _same_but_weight(backend.settings, settings):
                del known[(id_, address)]
                backend.settings = settings
                backend.weight = settings.weight
            else:
                backend = Backend(settings, address, id_)
                self._attach(backend)
            backends.append(backend)
        for backend in known.values():
            self.unsolicited_before += backend.unsolicited
            if backend.connections is not None:
                backend.connections.close_idle()
                self._leaving.append(backend)
        self.backends = tuple(backends)
        if policy == self.policy:
            self.selection = self.selection.rebuilt(self.backends)
        else:
            self.policy = policy
            self.selection = POLICIES[policy](self.backends)

    def pick(self, key: bytes | None = None, tried: Sequence[Backend] = ()) -> Backend | None:
        """The backend for the next exchange, none of ``tried``, or ``None`` if there is none to be had."""
        self.picks += 1
        backend = self.selection.pick(key)
        if backend is not None:
            if backend.is_available and backend not in tried:
                return backend
            if tried:
                # One exchange's second choice takes no turn: else two backends, one of them down, would be
                # in step with the turns, and every exchange would ask the dead one first.
                return self._walk(tried[-1], tried)
            # A policy that takes turns goes on to the next turn, so that the share of one that is down is
            # spread evenly; one that goes by a key repeats itself and is asked for its second choice.
            for _ in range(min(len(self.backends), _TURNS)):
                other = self.selection.pick(key)
                if other is not None and other.is_available and other not in tried:
                    return other
            return self._walk(backend, tried)
        self.unavailable += 1
        return None

    def _walk(self, first: Backend, tried: Sequence[Backend]) -> Backend | None:
        for other in self.selection.others(first):
            if other.is_available and other not in tried:
                return other
        self.unavailable += 1
        return None

    def sweep(self, now: float) -> None:
        for backend in self._everyone():
            if backend.connections is not None:
                backend.connections.sweep(now)
        self._leaving = [
            backend
            for backend in self._leaving
            if backend.connections is not None and backend.connections.open
        ]

    @property
    def is_busy(self) -> bool:
        """Backends that left still have connections."""
        return bool(self._leaving)

    def close_idle(self) -> None:
        for backend in self._everyone():
            if backend.connections is not None:
                backend.connections.close_idle()

    def _everyone(self) -> Iterable[Backend]:
        yield from self.backends
        yield from self._leaving

    def __repr__(self) -> str:
        return f"<Pool {self.name} {self.policy} {list(self.backends)!r}>"


def _same_but_weight(one: BackendSettings, other: BackendSettings) -> bool:
    return (one.host, one.port, one.protocol, one.tls, one.send_proxy) == (
        other.host,
        other.port,
        other.protocol,
        other.tls,
        other.send_proxy,
    )
