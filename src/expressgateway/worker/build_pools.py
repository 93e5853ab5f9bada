"""Pools, from their models to what a worker runs them by. Touches nothing that runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from expressgateway.config.pools import Pool as PoolConfig
from expressgateway.config.pools import Retry as RetryConfig
from expressgateway.config.schema import Config
from expressgateway.control.targets import backend_settings
from expressgateway.proxy.route import RetryPolicy, SessionCookie
from expressgateway.upstream.backend import BackendSettings
from expressgateway.upstream.limits import NO_LIMIT, UNLIMITED, Limits
from expressgateway.upstream.pool import PoolSettings
from expressgateway.upstream.selection import Balancing, SelectionError, find_policy

Files = Mapping[str, bytes]

_HTTP: Final = frozenset({"h1", "h2", "h3"})
"""What backends speak that exchanges are for; relays need no more than addresses."""


class SnapshotError(Exception):
    """The snapshot cannot be served; the text is a sentence for the operator."""


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """One pool, compiled."""

    name: str
    settings: PoolSettings
    backends: tuple[BackendSettings, ...]
    retry: RetryPolicy
    hash_key: str | None
    cookie: SessionCookie | None

    def is_used_as(self, other: "PoolPlan") -> bool:
        """Whether routes that lead here need not know of the difference."""
        return (self.retry, self.hash_key, self.cookie) == (other.retry, other.hash_key, other.cookie)

    def is_of_other_kind(self, other: "PoolPlan") -> bool:
        """Whether one is for HTTP exchanges and the other for relays, which take nothing but addresses."""
        kinds = {each.protocol in _HTTP for pool in (self, other) for each in pool.backends}
        return len(kinds) > 1


def compile_pools(config: Config, files: Files, secrets: Files) -> dict[str, PoolPlan]:
    """Every pool of the configuration, by name. Raises ``SnapshotError``."""
    routes = (route for listener in config.listeners for route in listener.routes)
    # A route's retries are paid for by the pool, also by one that has no such table of its own.
    retried = {name for route in routes if route.retry is not None for _, name in route.pools()}
    workers = config.runtime.worker_count
    return {
        pool.name: _pool(pool, workers, files, secrets, is_retried=pool.name in retried)
        for pool in config.every_pool()
    }


def _pool(
    pool: PoolConfig, workers: int, files: Files, secrets: Files, *, is_retried: bool = False
) -> PoolPlan:
    balancing = pool.load_balancing
    try:
        find_policy(balancing.policy)
    except SelectionError as error:
        raise SnapshotError(f"pool {pool.name}: {error}") from error
    cookie = balancing.cookie
    secret_path = "" if cookie is None or cookie.secret_path is None else str(cookie.secret_path)
    outlier = pool.outlier
    retry = pool.retry or (RetryConfig() if is_retried else None)
    settings = PoolSettings(
        balancing=Balancing(
            policy=balancing.policy,
            table_size=balancing.table_size,
            virtual_nodes=balancing.virtual_nodes,
            decay_s=balancing.decay_ms / 1000,
            slow_start_s=balancing.slow_start_ms / 1000,
            has_cookie=cookie is not None,
            secret=secrets.get(secret_path, b""),
        ),
        limits=_limits(pool, workers),
        budget_percent=retry.budget_percent if retry is not None else None,
        counts_5xx=outlier is not None and outlier.count_5xx,
        alarm_streak=outlier.consecutive_failures if outlier is not None else 0,
    )
    return PoolPlan(
        name=pool.name,
        settings=settings,
        backends=tuple(backend_settings(backend, files) for backend in pool.backends),
        retry=retry_policy(pool.retry),
        hash_key=balancing.hash_key,
        cookie=None
        if cookie is None
        else SessionCookie.of(
            cookie.name,
            path=cookie.path,
            secure=cookie.secure,
            http_only=cookie.http_only,
            same_site=cookie.same_site,
            max_age_s=cookie.max_age_seconds,
        ),
    )


def _limits(pool: PoolConfig, workers: int) -> Limits:
    breaker = pool.circuit_breaker
    if breaker is None:
        return UNLIMITED

    def part(limit: int) -> int:
        # Rounded up: a limit below the number of workers would else leave some of them without any room.
        return -(-limit // workers) if limit else NO_LIMIT

    return Limits(
        max_connections=part(breaker.max_connections),
        max_requests=part(breaker.max_requests),
        pool_max_connections=part(breaker.pool_max_connections),
        pool_max_requests=part(breaker.pool_max_requests),
        max_pending=-(-breaker.max_pending // workers),
        pending_timeout_s=breaker.pending_timeout_ms / 1000,
    )


def retry_policy(retry: RetryConfig | None) -> RetryPolicy:
    """``[retry]``; without the table, stale connections and refused connects only."""
    if retry is None:
        return RetryPolicy()
    statuses: set[int] = set()
    for cause in retry.on:
        if cause == "5xx":
            statuses.update(range(500, 600))
        elif isinstance(cause, int):
            statuses.add(cause)
    return RetryPolicy(
        attempts=retry.attempts,
        on_connect="connect" in retry.on,
        on_stale="stale" in retry.on,
        on_reset="reset" in retry.on,
        statuses=frozenset(statuses),
        per_try_s=retry.per_try_timeout_ms / 1000,
    )
