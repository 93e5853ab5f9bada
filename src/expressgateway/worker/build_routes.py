"""A listener's routes, from their models to the table that exchanges ask. Touches nothing that runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from expressgateway.config.routes import HeaderEdit
from expressgateway.config.routes import Route as RouteConfig
from expressgateway.observe.counters import ListenerCounters
from expressgateway.proxy.forwarding import TrustedProxies
from expressgateway.proxy.keys import key_of
from expressgateway.proxy.rewriting import Answer, HeaderEdits, Redirect, Respond, Rewrite
from expressgateway.proxy.route import MirrorRule, Route, SessionCookie, Split, Target, Timeouts
from expressgateway.proxy.routing import Match, RouteTable
from expressgateway.upstream.pool import Pool
from expressgateway.wire.head import RequestHead
from expressgateway.worker.build_pools import PoolPlan, retry_policy

DEFAULT_ROUTE = "default"
"""The metrics' name for what no route matches."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Where a listener's exchanges go."""

    default: Route
    table: RouteTable[Route] | None
    pools: Mapping[str, Pool]
    """Those that exchanges can be sent to, by name."""


class RoutesBuilder:
    """Builds one listener's routes. ``pools`` are the living ones."""

    def __init__(
        self,
        plans: Mapping[str, PoolPlan],
        pools: Mapping[str, Pool],
        trusted: TrustedProxies,
        counters: ListenerCounters,
        timeouts: Timeouts,
        *,
        is_secure: bool,
    ) -> None:
        self._plans = plans
        self._pools = pools
        self._trusted = trusted
        self._counters = counters
        self._timeouts = timeouts
        self._is_secure = is_secure
        self._targets: dict[str, Target] = {}

    def build(self, routes: tuple[RouteConfig, ...], own_pool: str | None) -> Routing:
        default = Route(
            DEFAULT_ROUTE,
            self._counters.route(DEFAULT_ROUTE),
            self._timeouts,
            target=self._target(own_pool) if own_pool is not None else None,
        )
        table = RouteTable([(_match(each), self._route(each)) for each in routes]) if routes else None
        names = [own_pool, *(each.pool for each in routes)]
        names += [share.pool for each in routes for share in each.split]
        return Routing(default, table, {name: self._pools[name] for name in names if name is not None})

    def _target(self, name: str) -> Target:
        target = self._targets.get(name)
        if target is None:
            plan = self._plans[name]
            key = key_of(plan.hash_key, self._trusted) if plan.hash_key is not None else None
            target = self._targets[name] = Target(self._pools[name], plan.retry, key, plan.cookie)
        return target

    def _route(self, route: RouteConfig) -> Route:
        rewrite = route.rewrite
        request = route.headers.request if route.headers is not None else None
        response = route.headers.response if route.headers is not None else None
        return Route(
            route.name,
            self._counters.route(route.name),
            self._times(route),
            target=self._target(route.pool) if route.pool is not None else None,
            split=self._split(route),
            answer=_answer(route),
            rewrite=None
            if rewrite is None
            else Rewrite(
                host=rewrite.host,
                path=rewrite.path,
                strip_prefix=rewrite.strip_prefix,
                add_prefix=rewrite.add_prefix,
            ),
            edits=_edits(request),
            response_edits=_edits(response),
            retry=retry_policy(route.retry) if route.retry is not None else None,
            mirror=None
            if route.mirror is None
            else MirrorRule(self._target(route.mirror.pool), route.mirror.percent),
        )

    def _split(self, route: RouteConfig) -> Split | None:
        if not route.split:
            return None
        shares = [(self._target(share.pool), share.weight) for share in route.split]
        sticky = route.sticky
        cookie = None
        if sticky is not None and sticky.startswith("cookie:"):
            cookie = SessionCookie.of(
                sticky.partition(":")[2],
                path="/",
                secure=self._is_secure,
                http_only=True,
                same_site="lax",
                max_age_s=0,
            )
        return Split(shares, key_of(sticky, self._trusted) if sticky is not None else None, cookie)

    def _times(self, route: RouteConfig) -> Timeouts:
        given = route.timeouts
        if given is None:
            return self._timeouts
        base = self._timeouts
        return Timeouts(
            header=base.header,
            body=base.body if given.body_timeout_ms is None else given.body_timeout_ms / 1000,
            total=base.total if given.total_timeout_ms is None else given.total_timeout_ms / 1000,
            head=base.head if given.head_timeout_ms is None else given.head_timeout_ms / 1000,
            idle=base.idle,
        )


def _match(route: RouteConfig) -> Match:
    match = route.match
    return Match.of(
        host=match.host,
        path=match.path,
        path_prefix=match.path_prefix,
        path_regex=match.path_regex,
        method=match.method,
        headers=match.headers,
        query=match.query,
    )


def _answer(route: RouteConfig) -> Callable[[RequestHead], Answer | None] | None:
    if route.redirect is not None:
        return Redirect(route.redirect.to, route.redirect.status).answer
    if route.respond is not None:
        return Respond(route.respond.status, route.respond.body, route.respond.content_type).answer
    return None


def _edits(edit: HeaderEdit | None) -> HeaderEdits | None:
    if edit is None or not (edit.set or edit.add or edit.remove):
        return None
    return HeaderEdits(set=edit.set, add=edit.add, remove=edit.remove)
