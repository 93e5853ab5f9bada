"""Backends, pools and everything that says how work is shared out among them.

Introduces `Backend`, `Pool` and the blocks that tune a pool. A pool does not know which listeners use it;
what a listener's protocol asks of its backends is `backend_faults`, called with that listener's `Front`.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Final, Literal

from pydantic import Field

from expressgateway.config.availability import on_offer
from expressgateway.config.values import (
    LIST,
    TOKEN,
    BackendAddress,
    BadValueError,
    Block,
    Custom,
    Fault,
    FilePath,
    HeaderValue,
    Loc,
    Matches,
    Name,
    Range,
    UrlPath,
    expect_string,
    listed,
    shown,
)

BackendProtocol = Literal["tcp", "h1", "h2", "h3"]
Front = Literal["tcp", "tls", "udp", "h1", "h1s", "quic"]
"""What a listener speaks to its clients."""

HTTP_FRONTS: Final = frozenset({"h1", "h1s", "quic"})
DATAGRAM_FRONTS: Final = frozenset({"udp", "quic"})

_TLS_KEYS: Final = (
    "tls_ca_path",
    "tls_verify_hostname",
    "tls_verify_peer",
    "tls_cert_path",
    "tls_key_path",
)


class Backend(Block):
    """One place work can be sent to."""

    address: BackendAddress = Field(
        description="Where the backend listens. A name is resolved again when its DNS answer "
        "expires, and every address of the answer is a backend of its own. `_http._tcp.example.com` is a "
        "service, without a port: its SRV records of the lowest priority give hosts, ports and weights, "
        "which `weight` multiplies."
    )
    protocol: BackendProtocol = Field(
        default="tcp", description="What the backend speaks. On HTTP listeners `tcp` means `h1`."
    )
    weight: Annotated[int, Range(0, 65535)] = Field(
        default=1, description="Share of the work, relative to the other backends. 0 means no new work."
    )
    tls: bool = Field(
        default=False, description="Speak TLS to a `tcp`, `h1` or `h2` backend. An `h3` backend always does."
    )
    tls_ca_path: FilePath | None = Field(
        default=None,
        description="CA bundle (PEM) that signs the backend's certificate; without it the system's "
        "roots. `h3` requires it unless `tls_verify_peer = false`.",
    )
    tls_verify_hostname: (
        Annotated[str, Matches("a host name or address", r"[0-9A-Za-z:._-]{1,253}")] | None
    ) = Field(
        default=None,
        description="Name sent as SNI and looked for in the backend's certificate.",
        json_schema_extra={"default_text": "host of `address`; of a service, its domain: `example.com`"},
    )
    tls_verify_peer: bool = Field(
        default=True,
        description="Check the backend's certificate. `false` is logged as a warning at every start.",
    )
    tls_cert_path: FilePath | None = Field(
        default=None, description="Client certificate (PEM) shown to the backend; needs `tls_key_path`."
    )
    tls_key_path: FilePath | None = Field(default=None, description="Private key (PEM) of `tls_cert_path`.")
    send_proxy: Literal["v1", "v2"] | None = Field(
        default=None, description="Begin each connection to the backend with a PROXY protocol header."
    )
    id: Name = Field(
        default="",
        description="Stable identity for hashing, health and metrics.",
        json_schema_extra={"default_text": "`address`"},
    )

    @property
    def speaks_tls(self) -> bool:
        return self.tls or self.protocol == "h3"

    def resolve(self) -> None:
        if not self.id:
            self.settle(id=str(self.address))
        if self.protocol == "h3" and not self.is_set("tls"):
            self.settle(tls=True)
        if self.speaks_tls and self.tls_verify_hostname is None:
            # Of a service it is the domain that was asked for (RFC 9525 6.1, the source domain): the hosts in
            # its records come from DNS, and prove nothing.
            self.settle(tls_verify_hostname=self.address.domain)

    def is_idle(self, key: str) -> bool:
        return key in _TLS_KEYS and not self.speaks_tls

    def faults(self) -> Iterator[Fault]:
        if not self.speaks_tls:
            for key in _TLS_KEYS:
                if self.is_set(key):
                    yield Fault(
                        (key,),
                        f"{key} has no effect on a clear-text backend",
                        "add tls = true to speak TLS to this backend, or remove the key",
                        depends=(("tls",), ("protocol",)),
                    )
            return
        if self.protocol == "h3" and not self.tls:
            yield Fault(
                ("tls",),
                "an h3 backend always speaks TLS",
                "remove the key, or choose another protocol",
                depends=(("protocol",),),
            )
        if self.protocol == "h3" and self.tls_ca_path is None and self.tls_verify_peer:
            yield Fault(
                ("tls_ca_path",),
                "an h3 backend needs tls_ca_path",
                "name the CA bundle that signs its certificate",
                depends=(("protocol",), ("tls_verify_peer",)),
            )
        if self.tls_ca_path is not None and not self.tls_verify_peer:
            yield Fault(
                ("tls_ca_path",),
                "tls_ca_path has no effect with tls_verify_peer = false",
                "remove tls_verify_peer to have the backend's certificate checked against this bundle",
                depends=(("tls_verify_peer",),),
            )
        for present, absent in (("tls_cert_path", "tls_key_path"), ("tls_key_path", "tls_cert_path")):
            if getattr(self, present) is not None and getattr(self, absent) is None:
                yield Fault(
                    (present,),
                    f"{present} needs {absent}",
                    "a client certificate and its private key are given together",
                    depends=((absent,),),
                )


_POLICIES = (
    "round_robin",
    "weighted_round_robin",
    "random",
    "weighted_random",
    "least_connections",
    "least_requests",
    "power_of_two",
    "maglev",
    "ring_hash",
    "ewma",
    "session_affinity",
)


def _parse_policy(value: object) -> str:
    text = expect_string(value, "a balancing policy")
    module, colon, name = text.partition(":")
    if text in _POLICIES or (
        colon and name.isidentifier() and all(p.isidentifier() for p in module.split("."))
    ):
        return text
    offered = ", ".join(on_offer("pools.load_balancing.policy", _POLICIES))
    raise BadValueError(
        f"expected one of {offered}, found {shown(text)}",
        nearest(text, _POLICIES),
    )


def nearest(text: str, known: Iterable[str]) -> str:
    """The hint that suggests the known word closest to `text`; empty if none is close."""
    if not any(char.isalpha() for char in text):
        return ""
    close = difflib.get_close_matches(text.lower(), list(known), n=1, cutoff=0.6)
    return f"did you mean {shown(close[0])}?" if close else ""


class AffinityCookie(Block):
    """The cookie by which `session_affinity` knows a client again."""

    name: Annotated[str, Matches("a cookie name", TOKEN)] = Field(
        default="expressgateway", description="Name of the cookie."
    )
    path: UrlPath = Field(default="/", description="Path attribute of the cookie.")
    secure: bool = Field(default=True, description="Sent over TLS only.")
    http_only: bool = Field(default=True, description="Hidden from scripts.")
    same_site: Literal["strict", "lax", "none"] = Field(default="lax", description="SameSite attribute.")
    max_age_seconds: Annotated[int, Range(0)] = Field(
        default=0, description="Life of the cookie; 0 = until the browser closes."
    )
    secret_path: FilePath | None = Field(
        default=None,
        description="File of 32 bytes that cookies are signed with, created with mode 0600 if absent. Give "
        "every gateway the same one. Without it sessions end when the gateway is restarted.",
    )


class LoadBalancing(Block):
    """How the next backend is chosen."""

    policy: Annotated[
        str,
        Custom(
            ", ".join(f"`{policy}`" for policy in _POLICIES),
            _parse_policy,
            (("anyOf", [{"enum": list(_POLICIES)}, {"type": "string", "pattern": "^[\\w.]+:\\w+$"}]),),
        ),
    ] = Field(
        default="round_robin",
        description="The balancing policy. `package.module:Class` names one written in Python.",
    )
    hash_key: (
        Annotated[
            str,
            Matches(
                '"client_ip", "path", "header:NAME" or "cookie:NAME"',
                rf"client_ip|path|(?:header|cookie):{TOKEN}",
            ),
        ]
        | None
    ) = Field(
        default=None,
        description="What `maglev`, `ring_hash` and `session_affinity` hash; a request without it is "
        "balanced at random. On a listener with `xdp` flows are hashed by the client's address and port; "
        'with `"client_ip"`, written down, by its address alone.',
        json_schema_extra={"default_text": "`client_ip` for `maglev` and `ring_hash`"},
    )
    slow_start_ms: Annotated[int, Range(0, 3_600_000, "milliseconds")] = Field(
        default=0, description="Time in which a new or recovered backend grows to its full weight; 0 = off."
    )
    table_size: Annotated[int, Range(3, 5_000_011)] = Field(
        default=65537, description="`maglev`: entries of the table, a prime."
    )
    virtual_nodes: Annotated[int, Range(1, 10_000)] = Field(
        default=160, description="`ring_hash`: points on the ring for each unit of weight."
    )
    decay_ms: Annotated[int, Range(1, 3_600_000, "milliseconds")] = Field(
        default=10_000,
        description="`ewma`: time after which a measured latency has lost most of its influence.",
    )
    cookie: AffinityCookie | None = Field(
        default=None, description="`session_affinity`: recognise clients by a cookie made by the gateway."
    )

    def resolve(self) -> None:
        if self.hash_key is None and self.policy in ("maglev", "ring_hash"):
            self.settle(hash_key="client_ip")

    def faults(self) -> Iterator[Fault]:
        for key, policies in _KNOBS.items():
            if self.is_set(key) and self.policy not in policies and ":" not in self.policy:
                yield Fault(
                    (key,),
                    f"{key} has no effect with policy {shown(self.policy)}",
                    f"it belongs to {listed(policies)}",
                    depends=(("policy",),),
                )
        if not _is_prime(self.table_size):
            yield Fault(("table_size",), f"expected a prime number, found {self.table_size}", "65537 is one")
        if self.policy == "session_affinity" and self.cookie is None and self.hash_key is None:
            yield Fault(("policy",), "session_affinity needs a cookie table or a hash_key")
        both = self.cookie is not None and self.hash_key is not None
        if both and not (self.is_idle("cookie") or self.is_idle("hash_key")):
            yield Fault(
                ("hash_key",),
                "hash_key and cookie exclude each other",
                "a session is known by one of them: keep one",
                depends=(("cookie",),),
            )

    def is_idle(self, key: str) -> bool:
        if key == "hash_key" and self.policy == "maglev" and not self.is_set(key):
            return True  # the default is not the same as the key on a listener with `xdp`
        return key in _KNOBS and self.policy not in _KNOBS[key] and ":" not in self.policy


_KNOBS: Final = {
    "hash_key": ("maglev", "ring_hash", "session_affinity"),
    "table_size": ("maglev", "session_affinity"),
    "virtual_nodes": ("ring_hash",),
    "decay_ms": ("ewma",),
    "cookie": ("session_affinity",),
}


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


class Health(Block):
    """Active probes."""

    type: Literal["http", "tcp", "tls", "grpc"] = Field(description="What a probe does.")
    path: UrlPath = Field(default="/", description="`http`: path asked for.")
    host: Annotated[str, Matches("a host", r"[0-9A-Za-z:.\[\]_-]{1,255}")] | None = Field(
        default=None,
        description="`http`, `grpc`: Host or :authority sent.",
        json_schema_extra={"default_text": "the backend's"},
    )
    expect_status: Annotated[tuple[Annotated[int, Range(100, 599)], ...], LIST] = Field(
        default=(200,), min_length=1, description="`http`: statuses that count as healthy."
    )
    expect_body: Annotated[str, Matches("a text of 1 to 4096 characters", r"(?s).{1,4096}")] | None = Field(
        default=None, description="`http`: text the body must contain."
    )
    interval_ms: Annotated[int, Range(100, 3_600_000, "milliseconds")] = Field(
        default=5000, description="Time between two probes of a backend."
    )
    timeout_ms: Annotated[int, Range(10, 600_000, "milliseconds")] = Field(
        default=2000, description="Time after which a probe has failed."
    )
    rise: Annotated[int, Range(1, 100)] = Field(
        default=3, description="Successes in a row that make it healthy."
    )
    fall: Annotated[int, Range(1, 100)] = Field(
        default=2, description="Failures in a row that make it unhealthy."
    )
    jitter: Annotated[int, Range(0, 100, "percent")] = Field(
        default=20, description="Percent of the interval by which probes are spread."
    )

    def is_idle(self, key: str) -> bool:
        return key in _ASKED and self.type not in _ASKED[key]

    def faults(self) -> Iterator[Fault]:
        for key, types in _ASKED.items():
            if self.is_set(key) and self.type not in types:
                yield Fault(
                    (key,),
                    f"{key} has no effect with type {shown(self.type)}",
                    f"it belongs to {listed(types)}",
                    depends=(("type",),),
                )


_ASKED: Final = {
    "path": ("http",),
    "host": ("http", "grpc"),
    "expect_status": ("http",),
    "expect_body": ("http",),
}
"""Keys of probes that make sense for some types only."""


class Outlier(Block):
    """Passive health: judged by real traffic."""

    consecutive_failures: Annotated[int, Range(1, 100_000, zero="off")] = Field(
        default=5, description="Failures in a row that eject a backend."
    )
    failure_percent: Annotated[int, Range(1, 100, "percent", zero="off")] = Field(
        default=0, description="Share of failures within `window_ms` that ejects a backend."
    )
    window_ms: Annotated[int, Range(100, 3_600_000, "milliseconds")] = Field(
        default=10_000, description="Window of `failure_percent`."
    )
    ejection_ms: Annotated[int, Range(100, 3_600_000, "milliseconds")] = Field(
        default=30_000, description="First ejection; each further one lasts twice as long."
    )
    max_ejection_ms: Annotated[int, Range(100, 86_400_000, "milliseconds")] = Field(
        default=300_000, description="Longest ejection."
    )
    max_ejection_percent: Annotated[int, Range(0, 100, "percent")] = Field(
        default=50, description="Share of the pool that may be ejected at once."
    )
    panic_threshold_percent: Annotated[int, Range(0, 100, "percent")] = Field(
        default=50, description="Below this share of healthy backends all are used."
    )
    count_5xx: bool = Field(default=False, description="Answers with a 5xx status are failures too.")

    def faults(self) -> Iterator[Fault]:
        if self.max_ejection_ms < self.ejection_ms:
            yield Fault(
                ("max_ejection_ms",),
                f"max_ejection_ms ({self.max_ejection_ms}) is below ejection_ms ({self.ejection_ms})",
                depends=(("ejection_ms",),),
            )


def _parse_retry_on(value: object) -> str | int:
    words = ("connect", "reset", "stale", "5xx")
    if isinstance(value, int) and not isinstance(value, bool) and 400 <= value <= 599:
        return value
    if isinstance(value, str) and value in words:
        return value
    hint = nearest(value, words) if isinstance(value, str) else ""
    raise BadValueError(
        f'expected "connect", "reset", "stale", "5xx" or a status from 400 to 599, found {shown(value)}', hint
    )


RetryOn = Annotated[
    str | int,
    Custom(
        "`connect`, `reset`, `stale`, `5xx`, 400..599",
        _parse_retry_on,
        (
            (
                "anyOf",
                [
                    {"enum": ["connect", "reset", "stale", "5xx"]},
                    {"type": "integer", "minimum": 400, "maximum": 599},
                ],
            ),
        ),
    ),
]


class Retry(Block):
    """When a failed exchange is tried again on another backend."""

    attempts: Annotated[int, Range(1, 10)] = Field(
        default=2, description="Attempts in all, the first included."
    )
    on: Annotated[tuple[RetryOn, ...], LIST] = Field(
        default=("connect", "stale"), min_length=1, description="Failures that are tried again."
    )
    budget_percent: Annotated[int, Range(0, 100, "percent")] = Field(
        default=20, description="Share of the pool's traffic that may be retries."
    )
    per_try_timeout_ms: Annotated[int, Range(1, unit="milliseconds", zero="off")] = Field(
        default=0, description="Time for one attempt, to its response head."
    )


class CircuitBreaker(Block):
    """Limits beyond which work waits, or is refused. Every worker holds to an equal part of each."""

    max_connections: Annotated[int, Range(1, zero="off")] = Field(
        default=0, description="Connections to one backend."
    )
    max_requests: Annotated[int, Range(1, zero="off")] = Field(
        default=0, description="Exchanges in flight on one backend."
    )
    pool_max_connections: Annotated[int, Range(1, zero="off")] = Field(
        default=0, description="Connections to all backends of the pool."
    )
    pool_max_requests: Annotated[int, Range(1, zero="off")] = Field(
        default=0, description="Exchanges in flight on all backends of the pool."
    )
    max_pending: Annotated[int, Range(0, 1_000_000)] = Field(
        default=1024,
        description="Exchanges that wait for room when a limit is reached; more are refused with 503. "
        "0 = none waits.",
    )
    pending_timeout_ms: Annotated[int, Range(1, 600_000, "milliseconds")] = Field(
        default=5000, description="Longest wait for room; then 503."
    )

    def is_idle(self, key: str) -> bool:
        return key in ("max_pending", "pending_timeout_ms") and not any(getattr(self, k) for k in _LIMITS)

    def faults(self) -> Iterator[Fault]:
        for key in ("max_pending", "pending_timeout_ms"):
            if self.is_set(key) and self.is_idle(key):
                yield Fault(
                    (key,),
                    f"{key} has no effect without a limit to wait for",
                    f"set one of {listed(_LIMITS)}",
                    depends=tuple((limit,) for limit in _LIMITS),
                )


_LIMITS: Final = ("max_connections", "max_requests", "pool_max_connections", "pool_max_requests")


class Pool(Block):
    """Backends that share work, under a name that listeners and routes refer to."""

    name: Name = Field(description="The pool's name, used by `pool` keys, metrics and logs.")
    backends: Annotated[tuple[Backend, ...], LIST] = Field(description="The pool's backends, at least one.")
    load_balancing: LoadBalancing = Field(
        default_factory=LoadBalancing, description="How the next backend is chosen."
    )
    health: Health | None = Field(default=None, description="Active health checks; absent = none.")
    outlier: Outlier | None = Field(default=None, description="Passive health checks; absent = none.")
    retry: Retry | None = Field(
        default=None, description="Retries; absent = stale connections and refused connects only."
    )
    circuit_breaker: CircuitBreaker | None = Field(default=None, description="Limits; absent = none.")

    def faults(self) -> Iterator[Fault]:
        if not self.backends:
            yield Fault(("backends",), "a pool needs at least one backend")
        yield from set_faults(("backends",), self.backends)


def set_faults(where: Loc, backends: Sequence[Backend]) -> Iterator[Fault]:
    """Rules among the backends of one pool; `where` is the location of their array."""
    first_of: dict[str, int] = {}
    for index, backend in enumerate(backends):
        if (first := first_of.setdefault(backend.id, index)) != index:
            key = "id" if backend.is_set("id") else "address"
            yield Fault(
                (*where, index, key),
                f"backend id {shown(backend.id)} is already taken by {{other}}",
                "remove one of the two, or give each its own id",
                depends=((*where, first),),
                other=(*where, first),
            )
    if backends and not any(backend.weight for backend in backends):
        yield Fault(
            (*where, 0, "weight"),
            "every backend has weight 0, so none would get work",
            "give at least one backend a weight of 1 or more",
            depends=(where,),
        )


def protocol_faults(where: Loc, backends: Sequence[Backend]) -> Iterator[Fault]:
    """One pool, one backend protocol - as its listeners understand it, so after `as_http`."""
    for index, backend in enumerate(backends):
        if backend.protocol != backends[0].protocol:
            yield Fault(
                (*where, index, "protocol"),
                f"this backend speaks {backend.protocol}, the first of its pool {backends[0].protocol}",
                "all backends of a pool speak one protocol: make a pool for each",
                depends=((*where, 0, "protocol"),),
            )


def backend_faults(front: Front, where: Loc, backends: Sequence[Backend], user: str = "") -> Iterator[Fault]:
    """What a listener that speaks `front` asks of its backends; `user` names it if they stand in a pool."""
    of_user = f" (used by {user})" if user else ""
    for index, backend in enumerate(backends):
        here = (*where, index)
        if front not in HTTP_FRONTS and backend.protocol != "tcp":
            yield Fault(
                (*here, "protocol"),
                f"a {front} listener{of_user} relays bytes and cannot speak {backend.protocol} to a backend",
                "remove the key, or give the listener the protocol h1 or h1s",
            )
        if front == "udp":
            for key in ("tls", "send_proxy"):
                if getattr(backend, key):
                    yield Fault(
                        (*here, key),
                        f"{key} needs a connection, and a udp listener{of_user} relays datagrams",
                        "remove the key",
                    )


def as_http(backends: Sequence[Backend]) -> tuple[Backend, ...]:
    """The same backends for an HTTP listener, where `tcp` means `h1`."""
    return tuple(b.model_copy(update={"protocol": "h1"}) if b.protocol == "tcp" else b for b in backends)


__all__ = [
    "DATAGRAM_FRONTS",
    "HTTP_FRONTS",
    "Backend",
    "BackendProtocol",
    "CircuitBreaker",
    "Front",
    "HeaderValue",
    "Health",
    "LoadBalancing",
    "Outlier",
    "Pool",
    "Retry",
]
