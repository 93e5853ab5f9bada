"""The whole configuration file, validated.

`Config` ties the blocks together: rules that need more than one block are here, and so are the values that
one block inherits from another. A validated `Config` is complete and frozen: nobody who reads it needs a
default. It survives `Config.model_validate_json(config.model_dump_json())`, which is how workers receive it.
"""

from collections.abc import Iterator
from typing import Annotated, Final

from pydantic import Field

from expressgateway.config.blocks import (
    AccessLog,
    Admin,
    CidRouting,
    Observability,
    Passthrough,
    Runtime,
    RuntimeTls,
    Security,
    Tracing,
    Watchdog,
)
from expressgateway.config.http import AltSvc, Compression, Grpc, H2Security, Http, WebSocket
from expressgateway.config.listeners import Listener, jitter_faults
from expressgateway.config.pools import (
    Backend,
    CircuitBreaker,
    Front,
    Health,
    LoadBalancing,
    Outlier,
    Pool,
    Retry,
    as_http,
    backend_faults,
    nearest,
    protocol_faults,
)
from expressgateway.config.routes import Route
from expressgateway.config.tls import Certificate, ListenerTls, Quic, RawProxy
from expressgateway.config.tuning import tuning_faults
from expressgateway.config.values import LIST, Address, Block, Fault, Loc, shown
from expressgateway.config.xdp import MAX_VIPS, address_faults, served_faults

# How many values the labels of metrics can have that do not come from the configuration. This room knows no
# metrics: a test holds these numbers against those who count.
SECURITY_EVENT_KINDS: Final = 64
"""Upper bound of the `kind` label of `security_events_total`."""
GATEWAY_ERRORS: Final = 48
"""Upper bound of the `reason` label of `http_gateway_errors_total` and `relay_errors_total`."""
STATUS_CLASSES: Final = 6
"""`1xx` to `5xx`, and `none`."""
PASSTHROUGH: Final = "passthrough"
"""The name of Mode A's listener and of its pool, in metrics, logs and commands."""
HISTOGRAM_SERIES: Final = 17
"""15 buckets, the sum and the count."""
POOL_STATES: Final = 2
BACKEND_STATES: Final = 6


def raw_backends(raw: RawProxy) -> tuple[Backend, ...]:
    """What Mode B relays to, as a pool's backends: always over TLS, always verified."""
    addresses = raw.backends if raw.backend_addr is None else (raw.backend_addr,)
    return tuple(
        Backend.model_validate({"address": str(address)}).model_copy(
            update={
                "protocol": "quic",
                "tls": True,
                "tls_ca_path": raw.backend_ca_path,
                "tls_verify_hostname": raw.sni,
            }
        )
        for address in addresses
    )


class Config(Block):
    """One configuration file."""

    listeners: Annotated[tuple[Listener, ...], LIST] = Field(default=(), description="Where clients connect.")
    pools: Annotated[tuple[Pool, ...], LIST] = Field(
        default=(), description="Named pools that listeners and routes share."
    )
    runtime: Runtime = Field(default_factory=Runtime, description="Settings of the whole process.")
    observability: Observability = Field(
        default_factory=Observability, description="What can be seen from outside."
    )
    admin: Admin = Field(default_factory=Admin, description="Who may use the admin listener.")
    security: Security = Field(default_factory=Security, description="Strictness beyond the standards.")
    passthrough: Passthrough | None = Field(default=None, description="QUIC passthrough (Mode A).")

    def pool_of(self, listener: Listener) -> Pool | None:
        """The pool a listener sends its work to, or what no route matches; an unnamed one goes by the
        listener's name. None for a listener that has routes only.
        """
        if listener.pool is not None:
            return next(pool for pool in self.pools if pool.name == listener.pool)
        if listener.raw_proxy is not None:
            return Pool.model_construct(
                name=listener.name,
                backends=raw_backends(listener.raw_proxy),
                load_balancing=listener.load_balancing,
                outlier=listener.outlier,
            )
        if listener.routes and not listener.backends:
            return None
        # Not validated again: a pool that was emptied while it ran is one all the same.
        return Pool.model_construct(
            name=listener.name,
            backends=listener.backends,
            load_balancing=listener.load_balancing,
            health=listener.health,
            outlier=listener.outlier,
            retry=listener.retry,
            circuit_breaker=listener.circuit_breaker,
        )

    def with_backends(self, pool_name: str, backends: tuple[Backend, ...]) -> "Config":
        """The same configuration with other backends in a pool; the rest stays the same objects.

        No rule is checked. `passthrough` is a pool of that name. A listener's own pool that is left empty
        becomes a named pool of the same name, which keeps its settings. Raises `LookupError` for a pool that
        is not there.
        """
        for index, pool in enumerate(self.pools):
            if pool.name == pool_name:
                changed = pool.model_copy(update={"backends": backends})
                return self.model_copy(
                    update={"pools": (*self.pools[:index], changed, *self.pools[index + 1 :])}
                )
        for index, listener in enumerate(self.listeners):
            own = self.pool_of(listener) if listener.pool is None else None
            if listener.name == pool_name and own is not None:
                update: dict[str, object] = {"backends": backends}
                if not backends:
                    update["pool"] = pool_name
                other = listener.model_copy(update=update)
                changes: dict[str, object] = {
                    "listeners": (*self.listeners[:index], other, *self.listeners[index + 1 :])
                }
                if not backends:
                    changes["pools"] = (*self.pools, own.model_copy(update={"backends": ()}))
                return self.model_copy(update=changes)
        if pool_name == PASSTHROUGH and self.passthrough is not None:
            mode_a = self.passthrough.model_copy(update={"backends": backends})
            return self.model_copy(update={"passthrough": mode_a})
        raise LookupError(pool_name)

    def every_pool(self) -> Iterator[Pool]:
        """Named pools in use, and listeners' unnamed ones, Mode A's included. Names are unique."""
        used = {name for _, _, name in self._pool_names()}
        yield from (pool for pool in self.pools if pool.name in used)
        for listener in self.listeners:
            if listener.pool is None and (own := self.pool_of(listener)) is not None:
                yield own
        if self.passthrough is not None:
            # Clients choose connection IDs, and their hash a backend: the same one on every worker. Only what
            # comes of new connections tells whether a backend is well.
            yield Pool.model_construct(
                name=PASSTHROUGH,
                backends=self.passthrough.backends,
                load_balancing=LoadBalancing(policy="maglev"),
                health=None,
                outlier=Outlier(),
                retry=None,
                circuit_breaker=None,
            )

    def users_of(self, pool_name: str) -> Iterator[tuple[Loc, Listener]]:
        """The listeners that send work to a named pool, with the location of the name."""
        for loc, listener, name in self._pool_names():
            if name == pool_name:
                yield loc, listener

    def users(self) -> dict[str, list[Listener]]:
        """The listeners that send work to each named pool: once for every place that names it."""
        users: dict[str, list[Listener]] = {}
        for _, listener, name in self._pool_names():
            users.setdefault(name, []).append(listener)
        return users

    def unused_pools(self) -> Iterator[tuple[int, Pool]]:
        """Named pools that nothing refers to, with their index."""
        used = {name for _, _, name in self._pool_names()}
        return ((index, pool) for index, pool in enumerate(self.pools) if pool.name not in used)

    def _pool_names(self) -> Iterator[tuple[Loc, Listener, str]]:
        for index, listener in enumerate(self.listeners):
            if listener.pool is not None:
                yield ("listeners", index, "pool"), listener, listener.pool
            for number, route in enumerate(listener.routes):
                for loc, name in route.pools():
                    yield ("listeners", index, "routes", number, *loc), listener, name

    # -- inherited values

    def resolve(self) -> None:
        self.settle(listeners=tuple(self._settled(listener) for listener in self.listeners))
        http_pools = {name for _, listener, name in self._pool_names() if listener.is_http}
        self.settle(
            pools=tuple(
                pool.model_copy(update={"backends": as_http(pool.backends)})
                if pool.name in http_pools
                else pool
                for pool in self.pools
            )
        )

    def _settled(self, listener: Listener) -> Listener:
        changes: dict[str, object] = {}
        timeout_ms = listener.drain_timeout_ms
        if not listener.is_set("drain_timeout_ms"):
            timeout_ms = changes["drain_timeout_ms"] = self.runtime.drain_timeout_ms
        if not listener.is_set("drain_jitter_ms"):
            changes["drain_jitter_ms"] = min(self.runtime.drain_jitter_ms, timeout_ms)
        if not listener.is_set("name") and listener.is_datagram:
            streams = (other.address for other in self.listeners if not other.is_datagram)
            if listener.address in streams:
                changes["name"] = f"{listener.address}/udp"
        return listener.model_copy(update=changes) if changes else listener

    # -- rules

    def faults(self) -> Iterator[Fault]:
        if not self.listeners and self.passthrough is None:
            yield Fault(
                ("listeners",),
                "the file has no listeners, so there is nothing to serve",
                "add a [[listeners]] table with address, protocol and backends; `expressgateway "
                "init` prints one",
                depends=(("passthrough",),),
            )
        yield from self._name_faults()
        yield from self._address_faults()
        yield from self._pool_faults()
        yield from self._runtime_faults()
        yield from self._xdp_faults()
        yield from self._admin_faults()

    def _name_faults(self) -> Iterator[Fault]:
        first_of: dict[str, int] = {}
        for index, listener in enumerate(self.listeners):
            if (first := first_of.setdefault(listener.name, index)) == index:
                continue
            if not listener.is_set("name") and not self.listeners[first].is_set("name"):
                continue  # the same address twice: said once, by the address
            yield Fault(
                ("listeners", index, "name"),
                f"the name {shown(listener.name)} is already taken by {{other}}",
                "give each listener its own name",
                depends=(("listeners", first, "name"), ("listeners", first, "address")),
                other=("listeners", first),
            )
        if self.passthrough is not None:
            named = [(("listeners", index, "name"), one.name) for index, one in enumerate(self.listeners)]
            named += [(("pools", index, "name"), pool.name) for index, pool in enumerate(self.pools)]
            for loc, name in named:
                if name == PASSTHROUGH:
                    yield Fault(
                        loc,
                        f"the name {shown(name)} is already taken by {{other}}",
                        "choose another name",
                        other=("passthrough",),
                    )
        pools: dict[str, int] = {}
        for index, pool in enumerate(self.pools):
            if (first := pools.setdefault(pool.name, index)) != index:
                yield Fault(
                    ("pools", index, "name"),
                    f"the name {shown(pool.name)} is already taken by {{other}}",
                    "give each pool its own name",
                    depends=(("pools", first, "name"),),
                    other=("pools", first),
                )
        for index, listener in enumerate(self.listeners):
            if (listener.backends or listener.raw_proxy is not None) and listener.name in pools:
                yield Fault(
                    ("pools", pools[listener.name], "name"),
                    "{other} of the same name has backends, which form a pool of that name",
                    "rename the pool or the listener",
                    depends=(("listeners", index, "name"),),
                    other=("listeners", index),
                )

    def _address_faults(self) -> Iterator[Fault]:
        bound: list[tuple[bool, Address | None, Loc]] = [
            (listener.is_datagram, listener.address, ("listeners", index, "address"))
            for index, listener in enumerate(self.listeners)
        ]
        bound.append((False, self.observability.metrics_bind, ("observability", "metrics_bind")))
        if self.passthrough is not None:
            bound.append((True, self.passthrough.bind_addr, ("passthrough", "bind_addr")))
        taken: dict[tuple[bool, Address], Loc] = {}
        for is_datagram, address, loc in bound:
            if address is not None and (holder := taken.setdefault((is_datagram, address), loc)) != loc:
                yield Fault(
                    loc,
                    f"{shown(str(address))} is already bound by {{other}}",
                    "choose another address or port",
                    other=holder[:2],
                )

    def _pool_faults(self) -> Iterator[Fault]:
        known = [pool.name for pool in self.pools]
        for loc, _, name in self._pool_names():
            if name not in known:
                listed = (
                    f"the pools are {', '.join(known)}"
                    if known
                    else "add it as [[pools]] with name and backends"
                )
                yield Fault(
                    loc,
                    f"there is no pool named {shown(name)}",
                    nearest(name, known) or listed,
                    depends=(("pools",),),
                )
        users_of = self.users()  # once: with a thousand pools and routes it is a million look-ups
        for index, pool in enumerate(self.pools):
            backends: Loc = ("pools", index, "backends")
            mixed = list(protocol_faults(backends, pool.backends))
            yield from mixed
            seen: set[Front] = set()
            relay: Listener | None = None
            http: Listener | None = None
            users = users_of.get(pool.name, [])
            for listener in users:
                if listener.is_http:
                    http = http or listener
                else:
                    relay = relay or listener
            if relay is not None and http is not None:
                yield Fault(
                    backends,
                    f"the pool is used by the {http.protocol} listener {shown(http.name)} and by the "
                    f"{relay.protocol} "
                    f"listener {shown(relay.name)}, so its backends would have to speak two protocols",
                    "all backends of a pool speak one protocol: make a pool for each listener",
                )
                continue
            if users:
                fronts = dict.fromkeys(user.protocol for user in users)
                yield from tuning_faults(("pools", index), pool, fronts, shown(users[0].name))
            for listener in () if mixed else users:
                if listener.protocol not in seen:
                    seen.add(listener.protocol)
                    yield from backend_faults(
                        listener.protocol, backends, pool.backends, shown(listener.name)
                    )

    def _runtime_faults(self) -> Iterator[Fault]:
        for index, listener in enumerate(self.listeners):
            for fault in jitter_faults(listener.drain_jitter_ms, listener.drain_timeout_ms):
                yield Fault(
                    ("listeners", index, *fault.loc),
                    fault.message,
                    fault.hint,
                    depends=(("listeners", index, "drain_timeout_ms"), ("runtime", "drain_timeout_ms")),
                )
            if listener.proxy_protocol and not self.runtime.trusted_proxies:
                yield Fault(
                    ("listeners", index, "proxy_protocol"),
                    "proxy_protocol needs runtime.trusted_proxies, or no PROXY header would ever be accepted",
                    'add the networks of your load balancers, as in trusted_proxies = ["10.0.0.0/8"]',
                    depends=(("runtime", "trusted_proxies"),),
                )

    def _xdp_faults(self) -> Iterator[Fault]:
        listeners = [listener for listener in self.listeners if listener.xdp]
        is_mode_a = self.passthrough is not None and self.passthrough.xdp
        if len(listeners) + is_mode_a > MAX_VIPS:
            yield Fault(
                ("listeners", self.listeners.index(listeners[MAX_VIPS - is_mode_a]), "xdp"),
                f"expected at most {MAX_VIPS} listeners with xdp, found {len(listeners) + is_mode_a}",
                "serve the others in user space",
            )
        indices = {pool.name: index for index, pool in enumerate(self.pools)}
        told: set[str] = set()
        for listener in listeners:
            name = listener.pool
            if name is None or name not in indices:
                continue
            where: Loc = ("pools", indices[name])
            pool = self.pools[indices[name]]
            if name not in told:
                told.add(name)
                yield from served_faults(where, pool, shown(listener.name))
            user = shown(listener.name)
            backends: Loc = (*where, "backends")
            yield from address_faults(
                backends, pool.backends, listener.address, listener.xdp_forwarding, user
            )

    def _admin_faults(self) -> Iterator[Fault]:
        bind = self.observability.metrics_bind
        if bind is not None and not bind.is_loopback and not self.admin.allow_non_loopback:
            yield Fault(
                ("observability", "metrics_bind"),
                f"{shown(str(bind))} can be reached from other machines",
                "bind it to 127.0.0.1 or [::1], or set admin.allow_non_loopback = true with an "
                "api_token_hash",
                depends=(("admin", "allow_non_loopback"), ("admin", "api_token_hash")),
            )
        limit = self.observability.max_label_cardinality
        for metric, series in self.series().items():
            if series > limit:
                yield Fault(
                    ("observability", "max_label_cardinality"),
                    f"this configuration gives {metric} {series} series, more than the {limit} allowed",
                    "raise max_label_cardinality, or use fewer listeners, routes or backends",
                    depends=(("listeners",), ("pools",)),
                )
                return

    def series(self) -> dict[str, int]:
        """How many series each metric with configured labels can have, the largest first.

        Metrics that can never have more than another one here are left out. Backends count as they are
        written: a DNS name is one, however many addresses it has. What no route matches counts as one more.
        """
        listeners = len(self.listeners)
        http = sum(listener.http_versions > 0 for listener in self.listeners)
        routes = sum(  # times the versions in which they can be asked for
            (1 + len(listener.routes)) * listener.http_versions
            for listener in self.listeners
            if listener.http_versions
        )
        backends = sum(len(listener.backends) for listener in self.listeners)
        backends += sum(
            len(raw_backends(listener.raw_proxy)) for listener in self.listeners if listener.raw_proxy
        )
        backends += sum(len(pool.backends) for pool in self.pools)
        if self.passthrough is not None:
            listeners += 1
            backends += len(self.passthrough.backends)
        counts = {
            "http_requests_total": routes * STATUS_CLASSES,
            "http_request_duration_seconds": routes * HISTOGRAM_SERIES,
            "http_gateway_errors_total": http * GATEWAY_ERRORS,
            "relay_errors_total": (listeners - http) * GATEWAY_ERRORS,
            "security_events_total": listeners * SECURITY_EVENT_KINDS,
            "backend_requests_total": backends * STATUS_CLASSES,
            "backend_request_duration_seconds": backends * HISTOGRAM_SERIES,
            "backend_connect_duration_seconds": backends * HISTOGRAM_SERIES,
            "backend_head_duration_seconds": backends * HISTOGRAM_SERIES,
            "backend_state": backends * BACKEND_STATES,
            "pool_connections": backends * POOL_STATES,
            "worker_up": self.runtime.worker_count,
        }
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


__all__ = [
    "AccessLog",
    "Address",
    "Admin",
    "AltSvc",
    "Backend",
    "Certificate",
    "CidRouting",
    "CircuitBreaker",
    "Compression",
    "Config",
    "Front",
    "Grpc",
    "H2Security",
    "Health",
    "Http",
    "Listener",
    "ListenerTls",
    "LoadBalancing",
    "Observability",
    "Outlier",
    "Passthrough",
    "Pool",
    "Quic",
    "RawProxy",
    "Retry",
    "Route",
    "Runtime",
    "RuntimeTls",
    "Security",
    "Tracing",
    "Watchdog",
    "WebSocket",
]
