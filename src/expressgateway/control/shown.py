"""What the admin listener shows, made of the pieces that the supervisor has: functions without effects, but
that `connections` asks the workers."""

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, cast

from expressgateway import __version__
from expressgateway.config.load import Loaded
from expressgateway.config.render import redacted
from expressgateway.config.schema import PASSTHROUGH
from expressgateway.control.admin import shapes
from expressgateway.control.admin.view import SHOWN_FAMILIES, pools_shown
from expressgateway.control.deployment import Deployment
from expressgateway.control.ledger import Merged
from expressgateway.control.plan import runtime_changes
from expressgateway.control.reload import Reloads, Upgrades
from expressgateway.control.worker_process import Worker, WorkerGoneError
from expressgateway.control.workers import Slot

log = logging.getLogger(__name__)

CONNECTIONS_S: Final = 2.0
"""For workers to tell of their connections."""


def status(
    state: str,
    age_s: float,
    loaded: Loaded,
    reloads: Reloads,
    upgrades: Upgrades,
    deployment: Deployment | None,
) -> shapes.Status:
    """The gateway in one look."""
    return {
        "pid": os.getpid(),
        "version": __version__,
        "state": state,
        "uptime_s": round(age_s, 1),
        "config": _running(loaded, reloads),
        "reload": cast("shapes.LastReload", reloads.status()),
        "upgrade": cast("shapes.LastUpgrade", upgrades.status()),
        "listeners": list(_listener_states(deployment)),
        "workers": [_worker_state(slot) for slot in slots(deployment)],
    }


def config(loaded: Loaded, reloads: Reloads) -> shapes.EffectiveConfig:
    return {
        **_running(loaded, reloads),
        "changes": {pool: list(words) for pool, words in runtime_changes(loaded).items()},
        "config": redacted(loaded.config),
    }


def _running(loaded: Loaded, reloads: Reloads) -> shapes.Running:
    return {
        "path": str(loaded.path.absolute()),
        "version": reloads.version,
        "applied_at": reloads.applied_at,
    }


# -- listeners


def _listener_states(deployment: Deployment | None) -> Iterator[shapes.ListenerState]:
    if deployment is None:
        return
    open_ = deployment.fleet.open()
    protocols = [*(each.protocol for each in deployment.config.listeners), PASSTHROUGH]
    # passthrough is last, and may be absent
    for each, protocol in zip(deployment.book.bounds, protocols, strict=False):
        yield {
            "name": each.name,
            "protocol": protocol,
            "bound": str(each.address),
            "open": open_.get(each.name, 0),
        }


def listeners(deployment: Deployment | None) -> list[shapes.Listener]:
    """Every listener, with what was counted of it."""
    if deployment is None:
        return []
    config = deployment.config
    merged: Merged = deployment.fleet.ledger.merged(("connections", "http_requests"))
    accepted = _by_listener(merged, "connections")
    requests = _by_listener(merged, "http_requests")
    configured = {each.name: each for each in config.listeners}
    found: list[shapes.Listener] = []
    for state in _listener_states(deployment):
        own = configured.get(state["name"])
        mode_a = config.passthrough
        found.append(
            {
                **state,
                "address": str(own.address if own is not None else mode_a.bind_addr if mode_a else ""),
                "tls": own is not None and (own.tls is not None or own.quic is not None),
                "connections": accepted.get(state["name"], 0),
                "requests": requests.get(state["name"], 0),
                "drain_timeout_ms": (own or config.runtime).drain_timeout_ms,
                "drain_jitter_ms": own.drain_jitter_ms if own is not None else 0,
            }
        )
    return found


def _by_listener(merged: Merged, family: str) -> dict[str, int]:
    """A family whose first label is the listener, over all its other labels."""
    totals: dict[str, int] = {}
    for labels, value in merged.get(family, {}).items():
        if not isinstance(value, list):
            totals[labels[0]] = totals.get(labels[0], 0) + int(value)
    return totals


def pools(deployment: Deployment | None) -> list[dict[str, Any]]:
    """Every pool as `view.pools_shown` shows them."""
    if deployment is None:
        return []
    return pools_shown(
        deployment.config,
        deployment.upstreams.seen(),
        deployment.fleet.ledger.merged(SHOWN_FAMILIES),
        panicking=deployment.upstreams.panicking(),
        changes=runtime_changes(deployment.loaded),
    )


# -- workers


def slots(deployment: Deployment | None) -> Iterable[Slot]:
    return deployment.fleet.slots if deployment is not None else ()


def _living(slot: Slot) -> Worker | None:
    return slot.worker if slot.worker is not None and slot.worker.is_alive else None


def _worker_state(slot: Slot) -> shapes.WorkerState:
    living = _living(slot)
    return {
        "index": slot.index,
        "pid": living.pid if living is not None else None,
        "state": slot.worker.state.value if slot.worker is not None else "starting",
        "restarts": slot.restarts,
        "deaths_in_a_row": slot.deaths_in_a_row,
    }


def workers(deployment: Deployment | None) -> list[shapes.Worker]:
    """Every place for a worker, with who is there."""
    if deployment is None:
        return []
    now = time.monotonic()
    lag_s = deployment.fleet.ledger.merged(("worker_loop_lag_seconds",)).get("worker_loop_lag_seconds", {})
    found: list[shapes.Worker] = []
    for slot in deployment.fleet.slots:
        worker = _living(slot)
        rss_bytes = worker.measure() if worker is not None else 0
        found.append(
            {
                **_worker_state(slot),
                "hangs": slot.hangs,
                "replacements": dict(slot.replacements),
                "uptime_s": round(now - worker.born, 1) if worker is not None else None,
                "rss_bytes": rss_bytes,
                "cpu_s": round(slot.cpu_before_s + (worker.cpu_s if worker is not None else 0.0), 2),
                "loop_lag_s": _number(lag_s.get((str(slot.index),))) if worker is not None else None,
                "open": sum(worker.open.values()) if worker is not None else 0,
                "config_version": worker.version if worker is not None else 0,
            }
        )
    return found


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


# -- connections


@dataclass(frozen=True, slots=True)
class _Told:
    """What one worker said of its clients' connections."""

    looked_at: int
    counts: dict[str, dict[str, int]]
    listed: list[shapes.Connection]


async def connections(deployment: Deployment | None, limit: int) -> shapes.Connections:
    """What the workers tell of their clients' connections; `limit`: how many are listed."""
    everybody = deployment.fleet.everybody if deployment is not None else ()
    asked = [worker for worker in everybody if worker.can_report]
    answers = await asyncio.gather(*(_connections_of(worker, limit) for worker in asked))
    told = [answer for answer in answers if answer is not None]
    open_ = deployment.fleet.open() if deployment is not None else {}
    protocols: dict[str, Counter[str]] = {name: Counter() for name in open_}
    for answer in told:
        for name, counts in answer.counts.items():
            protocols.setdefault(name, Counter()).update(counts)
    looked_at = sum(answer.looked_at for answer in told)
    return {
        # Workers told of some at one moment and of the others at another: never less than what was seen.
        "open": max(sum(open_.values()), looked_at),
        "looked_at": looked_at,
        "silent_workers": [
            worker.index for worker, answer in zip(asked, answers, strict=True) if answer is None
        ],
        "listeners": [
            {"name": name, "open": max(open_.get(name, 0), counts.total()), "protocols": dict(counts)}
            for name, counts in protocols.items()
        ],
        "listed": sorted(
            (each for answer in told for each in answer.listed), key=lambda each: -each["age_s"]
        )[:limit],
    }


async def _connections_of(worker: Worker, limit: int) -> _Told | None:
    """None: it does not answer, or not in a way that can be understood."""
    try:
        answer = await worker.connections(limit, CONNECTIONS_S)
        return _Told(
            int(answer["looked_at"]),
            {
                str(name): {str(protocol): int(count) for protocol, count in counts.items()}
                for name, counts in answer["counts"].items()
            },
            [_connection(worker.index, *row) for row in answer["listed"]],
        )
    except WorkerGoneError:
        return None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        log.error("worker %d sent nonsense of its connections (%r)", worker.index, error)
        return None


def _connection(
    worker: int,
    listener: str,
    protocol: str,
    ip: str,
    port: int,
    age_s: float,
    requests: int | None,
    state: str,
) -> shapes.Connection:
    return {
        "listener": listener,
        "worker": worker,
        "protocol": protocol,
        "client": f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}",
        "age_s": float(age_s),
        "requests": requests,
        "state": state,
    }
