"""Pools and backends as the API shows them: what is configured, with what is known of each address.

A *backend* is what the configuration has; its *addresses* are what it stands for at present: one for a
literal address, under the same id, or those a name resolves to, under ids of their own. Pure: what is known
is handed in.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from expressgateway.config.pools import nearest
from expressgateway.config.schema import PASSTHROUGH, Backend, Config, raw_backends
from expressgateway.config.values import shown
from expressgateway.control.changes import ChangeError
from expressgateway.control.ledger import Merged

SHOWN_FAMILIES: Final = ("backend_inflight", "pool_connections", "backend_requests")
"""What of the counts is shown."""

_IDLE_STATES: Final = ("draining", "disabled")


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of one address of a backend."""

    id: str
    """As in metrics: that of the backend, or made of it and the address."""
    of: str
    """Id of the backend in the configuration."""
    address: str
    state: str = "unknown"
    since: float | None = None
    """Seconds since 1970."""
    cause: str = ""
    last_probe: Mapping[str, Any] | None = None
    """Whatever is known of it, ready for JSON; None: there was none."""


def pools_shown(
    config: Config,
    seen: Mapping[str, Sequence[Seen]],
    merged: Merged,
    *,
    panicking: Collection[str] = (),
    changes: Mapping[str, Sequence[str]] | None = None,
) -> list[dict[str, Any]]:
    """Every pool in the order of the file, those of listeners first.

    `seen`: by pool; `merged`: the ledger's; `panicking`: pools that use all backends because too few are
    well; `changes`: `plan.runtime_changes`.
    """
    load = _Load(merged)
    own = [
        (listener.name, listener.load_balancing.policy, listener.backends)
        for listener in config.listeners
        if listener.backends
    ]
    own += [
        (listener.name, listener.load_balancing.policy, raw_backends(listener.raw_proxy))
        for listener in config.listeners
        if listener.raw_proxy is not None
    ]
    if config.passthrough is not None:
        own.append((PASSTHROUGH, "maglev", config.passthrough.backends))
    named = [(pool.name, pool.load_balancing.policy, pool.backends) for pool in config.pools]
    users_of = config.users()
    pools = []
    for name, policy, backends in (*own, *named):
        by_backend: dict[str, list[Seen]] = {}
        for each in seen.get(name, ()):
            by_backend.setdefault(each.of, []).append(each)
        users = {listener.name for listener in users_of.get(name, ())}
        pool: dict[str, Any] = {
            "name": name,
            "listeners": [
                listener.name
                for listener in config.listeners
                if listener.name in users
                or (listener.name == name and (listener.backends or listener.raw_proxy))
            ]
            + ([PASSTHROUGH] if name == PASSTHROUGH and config.passthrough is not None else []),
            "policy": policy,
            "panic": name in panicking,
            "changes": list((changes or {}).get(name, ())),
            "backends": [
                _backend_shown(name, backend, by_backend.get(backend.id, ()), load) for backend in backends
            ],
        }
        if warning := pool_warning(name, pool["backends"]):
            pool["warning"] = warning
        pools.append(pool)
    return pools


class _Load:
    """Counts by pool and address."""

    __slots__ = ("_in_flight", "_open", "_requests")

    def __init__(self, merged: Merged) -> None:
        self._in_flight = _summed(merged, "backend_inflight")
        self._open = _summed(merged, "pool_connections")
        self._requests = _summed(merged, "backend_requests")

    def of(self, pool: str, ids: Iterable[str]) -> dict[str, int]:
        keys = [(pool, id_) for id_ in ids]
        return {
            "in_flight": sum(self._in_flight.get(key, 0) for key in keys),
            "open": sum(self._open.get(key, 0) for key in keys),
            "requests": sum(self._requests.get(key, 0) for key in keys),
        }


def _summed(merged: Merged, family: str) -> dict[tuple[str, str], int]:
    """A family whose first labels are pool and backend, over all its other labels."""
    totals: dict[tuple[str, str], int] = {}
    for labels, value in merged.get(family, {}).items():
        if not isinstance(value, list):
            key = labels[0], labels[1]
            totals[key] = totals.get(key, 0) + int(value)
    return totals


def _backend_shown(pool: str, backend: Backend, seen: Sequence[Seen], load: _Load) -> dict[str, Any]:
    shown_: dict[str, Any] = {
        "id": backend.id,
        "address": str(backend.address),
        "protocol": backend.protocol,
        "tls": backend.speaks_tls,
        "weight": backend.weight,
    }
    if len(seen) == 1 and seen[0].id == backend.id:
        return shown_ | _seen_shown(pool, seen[0], load)
    if backend.address.ip is not None:
        return shown_ | _seen_shown(pool, Seen(backend.id, backend.id, str(backend.address)), load)
    shown_ |= _together(seen) | load.of(pool, [each.id for each in seen])
    shown_["resolved"] = [
        {"id": each.id, "address": each.address} | _seen_shown(pool, each, load) for each in seen
    ]
    return shown_


def _seen_shown(pool: str, seen: Seen, load: _Load) -> dict[str, Any]:
    return {
        "state": seen.state,
        "since": seen.since,
        "cause": seen.cause,
        "last_probe": None if seen.last_probe is None else dict(seen.last_probe),
    } | load.of(pool, [seen.id])


def _together(seen: Sequence[Seen]) -> dict[str, Any]:
    """The state of a backend with several addresses: theirs if they agree."""
    states = {each.state for each in seen}
    if not states:
        state, cause = "unresolved", "the name has no address at present"
    elif len(states) == 1:
        state, cause = seen[0].state, seen[0].cause
    else:
        state, cause = "mixed", "its addresses differ"
    since = [each.since for each in seen if each.since is not None]
    return {"state": state, "since": max(since, default=None), "cause": cause, "last_probe": None}


def pool_warning(name: str, backends: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with a pool that gives no backend new work; empty if it does."""
    if not backends:
        why = "has no backends"
    elif not any(backend["weight"] for backend in backends):
        why = "has only backends of weight 0"
    elif all(
        one["state"] in _IDLE_STATES
        for backend in backends
        if backend["weight"]
        for one in backend.get("resolved") or [backend]
    ):
        why = "has only backends that are drained or disabled"
    else:
        return ""
    return f"pool {name} {why}: new requests are answered with {503 if backends else 502}"


# -- looking up


def find_pool(pools: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Raises `ChangeError` (404)."""
    return _find("pool", pools, "name", name, "")


def find_backend(pool: dict[str, Any], id_: str) -> dict[str, Any]:
    """A backend, or one of its addresses. Raises `ChangeError` (404)."""
    backends = pool["backends"]
    addresses = [address for backend in backends for address in backend.get("resolved", ())]
    return _find("backend", [*backends, *addresses], "id", id_, f" in pool {pool['name']}")


def _find(what: str, rows: Sequence[dict[str, Any]], key: str, wanted: str, where: str) -> dict[str, Any]:
    found = next((row for row in rows if row[key] == wanted), None)
    if found is None:
        hint = nearest(wanted, [row[key] for row in rows])
        raise ChangeError(404, f"there is no {what} {shown(wanted)}{where}{hint and f': {hint}'}")
    return found
