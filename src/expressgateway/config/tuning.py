"""What the keys that tune a pool can do for the listeners that use it.

A relay (`tcp`, `tls`, `udp`) sees no headers and no statuses, and a `udp` listener no connections: keys that
rest on them would be accepted and do nothing. Introduces `Tuned`, a pool or a listener with backends of its
own. A value that is the default is never a fault here, for it may stand in a file that was printed.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from expressgateway.config.pools import (
    HTTP_FRONTS,
    CircuitBreaker,
    Front,
    LoadBalancing,
    Outlier,
    Retry,
)
from expressgateway.config.routes import Route
from expressgateway.config.values import Fault, Loc, shown


class Tuned(Protocol):
    @property
    def load_balancing(self) -> LoadBalancing: ...
    @property
    def outlier(self) -> Outlier | None: ...
    @property
    def retry(self) -> Retry | None: ...
    @property
    def circuit_breaker(self) -> CircuitBreaker | None: ...


def tuning_faults(where: Loc, tuned: Tuned, fronts: Collection[Front], user: str = "") -> Iterator[Fault]:
    """Keys below `where` without effect on all of `fronts`; `user` names a listener if it is a pool's."""
    if not fronts or not HTTP_FRONTS.isdisjoint(fronts):
        return
    front = next(iter(fronts))
    listener = f"a {front} listener{f' (used by {user})' if user else ''}"
    yield from _balancing_faults((*where, "load_balancing"), tuned.load_balancing, listener)
    yield from _outlier_faults((*where, "outlier"), tuned.outlier, listener)
    if set(fronts) == {"udp"}:
        yield from _udp_faults(where, tuned, listener)
    elif tuned.retry is not None:
        yield from _retry_faults((*where, "retry"), tuned.retry, listener)


def raw_faults(tuned: Tuned) -> Iterator[Fault]:
    """The same for a `quic` listener whose streams are relayed as they are."""
    listener = "a quic listener with raw_proxy"
    yield from _balancing_faults(("load_balancing",), tuned.load_balancing, listener)
    yield from _outlier_faults(("outlier",), tuned.outlier, listener)


def route_retry_faults(where: str, routes: Sequence[Route]) -> Iterator[Fault]:
    """A budget is a share of a pool's traffic, so a route has none of its own."""
    for index, route in enumerate(routes):
        if route.retry is not None and route.retry.budget_percent != Retry().budget_percent:
            yield Fault(
                (where, index, "retry", "budget_percent"),
                "budget_percent has no effect on a route: it is a share of a pool's traffic",
                "set it in the retry table of the pool",
            )


def _balancing_faults(where: Loc, balancing: LoadBalancing, listener: str) -> Iterator[Fault]:
    if balancing.cookie is not None:
        yield Fault(
            (*where, "cookie"),
            f"cookie has no effect on {listener}, which relays bytes and sees no headers",
            'to keep a client with one backend, set hash_key = "client_ip" instead',
        )
    if balancing.hash_key not in (None, "client_ip"):
        yield Fault(
            (*where, "hash_key"),
            f"{shown(balancing.hash_key)} has no effect on {listener}, which sees no requests",
            'the key there can only be "client_ip"',
        )


def _outlier_faults(where: Loc, outlier: Outlier | None, listener: str) -> Iterator[Fault]:
    if outlier is not None and outlier.count_5xx:
        yield Fault(
            (*where, "count_5xx"),
            f"count_5xx has no effect on {listener}, which sees no statuses",
            "remove the key: connections that cannot be made are counted",
        )


def _retry_faults(where: Loc, retry: Retry, listener: str) -> Iterator[Fault]:
    """A relay tries again to connect, and nothing else: what has been sent is gone."""
    for index, cause in enumerate(retry.on):
        if cause not in ("connect", "stale"):
            yield Fault(
                (*where, "on", index),
                f"{shown(cause)} has no effect on {listener}: only connecting can be tried again",
                'remove it, or write on = ["connect"]',
            )
    if "connect" not in retry.on:
        yield Fault(
            (*where, "on"),
            f'without "connect" a retry has no effect on {listener}: only connecting can be tried again',
            'write on = ["connect"]; attempts = 1 turns retries off',
        )
    if retry.per_try_timeout_ms:
        yield Fault(
            (*where, "per_try_timeout_ms"),
            f"per_try_timeout_ms has no effect on {listener}, where no response head is waited for",
            "runtime.connect_timeout_ms is the time for one attempt to connect",
        )
    if retry.budget_percent != Retry().budget_percent:
        yield Fault(
            (*where, "budget_percent"),
            f"budget_percent has no effect on {listener}: connecting again costs a backend nothing",
            "remove the key, and bound retries with attempts",
        )


def _udp_faults(where: Loc, tuned: Tuned, listener: str) -> Iterator[Fault]:
    if tuned.load_balancing.policy == "ewma":
        yield Fault(
            (*where, "load_balancing", "policy"),
            f'"ewma" has no effect on {listener}, where no latency is measured',
            'choose "least_connections" or another policy',
        )
    if tuned.retry is not None:
        yield Fault(
            (*where, "retry"),
            f"retry has no effect on {listener}, which does not know whether a datagram arrived",
            "remove it: a backend that is gone is left out by itself",
        )
    if (breaker := tuned.circuit_breaker) is not None:
        for key in ("max_pending", "pending_timeout_ms"):
            if getattr(breaker, key) != CircuitBreaker.model_fields[key].default:
                yield Fault(
                    (*where, "circuit_breaker", key),
                    f"{key} has no effect on {listener}, where nothing waits for room",
                    "remove the key: datagrams beyond a limit are dropped",
                )
