"""A listener: where clients connect, what they speak, and where their work goes.

Introduces `Listener`. Times it inherits from `[runtime]` and the pools it names are settled by the whole
configuration, which alone can see them.
"""

from collections.abc import Iterator
from typing import Annotated, Final, get_args

from pydantic import Field

from expressgateway.config.availability import on_offer
from expressgateway.config.http import AltSvc, Grpc, H2Security, Http, WebSocket
from expressgateway.config.pools import (
    DATAGRAM_FRONTS,
    HTTP_FRONTS,
    Backend,
    CircuitBreaker,
    Front,
    Health,
    LoadBalancing,
    Outlier,
    Retry,
    as_http,
    backend_faults,
    nearest,
    protocol_faults,
    set_faults,
)
from expressgateway.config.routes import Route, route_faults
from expressgateway.config.tls import ListenerTls, Quic, RawProxy
from expressgateway.config.tuning import raw_faults, route_retry_faults, tuning_faults
from expressgateway.config.values import (
    LIST,
    Address,
    BadValueError,
    Block,
    Fault,
    Name,
    Range,
    before,
    expect_string,
    listed,
    shown,
)
from expressgateway.config.xdp import XDP_FRONTS, Forwarding, address_faults, served_faults, vip_faults

DRAIN_TIMEOUT: Final = Range(100, 300_000, "milliseconds")
DRAIN_JITTER: Final = Range(0, 300_000, "milliseconds")

_MISTAKEN: Final = {
    "http": 'write "h1" for HTTP/1.1 in clear text, "h1s" for HTTP over TLS, "quic" for HTTP/3',
    "https": 'write "h1s" for HTTP over TLS',
    "h2": 'write "h1s": HTTP/2 is negotiated there by ALPN',
    "h3": 'write "quic" for HTTP/3',
}


def _parse_front(value: object) -> str:
    fronts = get_args(Front)
    offered = ", ".join(on_offer("listeners.protocol", fronts))
    text = expect_string(value, f"one of {offered}")
    if text in fronts:
        return text
    raise BadValueError(
        f"expected one of {offered}, found {shown(text)}",
        _MISTAKEN.get(text) or nearest(text, fronts),
    )


_ONLY_ON: Final = {
    "alt_svc": ("h1", "h1s"),
    "http": ("h1", "h1s", "quic"),
    "h2_security": ("h1s",),
    "websocket": ("h1", "h1s", "quic"),
    "grpc": ("h1s", "quic"),
    "routes": ("h1", "h1s", "quic"),
    "proxy_protocol": ("tcp", "tls", "h1", "h1s"),
    "h2c": ("h1",),
    "xdp": XDP_FRONTS,
    "xdp_forwarding": XDP_FRONTS,
}
"""Keys that make sense for some protocols only."""

_SWITCHES: Final = ("proxy_protocol", "h2c", "xdp")
"""Of these, the ones that are off when they are false."""

_OF_HTTP2: Final = ("h2_security", "grpc")
"""Of these, the ones that an `h1` listener may have when it speaks HTTP/2 too (`h2c`)."""

POOL_KEYS: Final = ("load_balancing", "health", "outlier", "retry", "circuit_breaker")
"""Keys that tune the unnamed pool made of `backends`."""

RAW_POOL_KEYS: Final = ("load_balancing", "outlier")
"""Of these, the ones that tune the backends of `quic.raw_proxy`."""


class Listener(Block):
    """One bound address."""

    name: Name = Field(
        default="",
        description="Used in metrics and logs. A `udp` or `quic` listener that shares its address "
        "with another is called `ADDRESS/udp` by default.",
        json_schema_extra={"default_text": "`address`"},
    )
    address: Address = Field(description="Bind address: `host:port` or `[v6]:port`.")
    protocol: Annotated[Front, before(_parse_front)] = Field(
        description="`tcp` and `udp` relay, `tls` terminates and relays, `h1` is HTTP in clear text, "
        "`h1s` HTTP over TLS, `quic` HTTP/3."
    )
    tls: ListenerTls | None = Field(
        default=None, description="Required for `tls` and `h1s`, refused elsewhere."
    )
    quic: Quic | None = Field(default=None, description="Required for `quic`, refused elsewhere.")
    alt_svc: AltSvc | None = Field(
        default=None,
        description="h1, h1s: advertise HTTP/3 with `{h3_port, max_age}`, replacing a backend's Alt-Svc.",
    )
    http: Http = Field(default_factory=Http, description="h1, h1s, quic: times, sizes and headers.")
    h2_security: H2Security = Field(
        default_factory=H2Security, description="h1s, and h1 with `h2c`: HTTP/2 limits."
    )
    websocket: WebSocket | None = Field(default=None, description="h1, h1s, quic: WebSocket; absent = off.")
    grpc: Grpc | None = Field(
        default=None, description="h1s, quic, and h1 with `h2c`: gRPC; absent = plain HTTP."
    )
    drain_timeout_ms: Annotated[int, DRAIN_TIMEOUT] = Field(
        default=0,
        description="Time connections have to finish when the listener is drained.",
        json_schema_extra={"default_text": "from `runtime`"},
    )
    drain_jitter_ms: Annotated[int, DRAIN_JITTER] = Field(
        default=0,
        description="Time over which clients are told to leave, at most `drain_timeout_ms`. An "
        "inherited value is capped to it.",
        json_schema_extra={"default_text": "from `runtime`", "range_text": "0..drain timeout"},
    )
    proxy_protocol: bool = Field(
        default=False,
        description="Accept PROXY v1 and v2 headers, from `runtime.trusted_proxies` only. Not for "
        "udp and quic.",
    )
    h2c: bool = Field(default=False, description="h1: also HTTP/2 with prior knowledge in clear text.")
    xdp: bool = Field(
        default=False,
        description="tcp, udp: have the kernel forward its packets, with `runtime.xdp_enabled`; see "
        "docs/xdp.md. What the kernel does not do is served in user space.",
    )
    xdp_forwarding: Forwarding = Field(
        default="nat",
        description="With `xdp`: `nat` rewrites both addresses, and answers come back through the gateway; "
        "`dsr` gives packets another MAC address, for backends on the link that hold the listener's address; "
        "`dsr_encapsulated` sends them in IP-in-IP to such backends anywhere.",
    )
    backends: Annotated[tuple[Backend, ...], LIST] = Field(
        default=(), description="The unnamed pool of this listener."
    )
    routes: Annotated[tuple[Route, ...], LIST] = Field(
        default=(), description="h1, h1s, quic: rules that send exchanges to pools."
    )
    pool: Name | None = Field(default=None, description="Name of a pool, instead of `backends`.")
    load_balancing: LoadBalancing = Field(
        default_factory=LoadBalancing, description="As in `pools`, for `backends`."
    )
    health: Health | None = Field(default=None, description="As in `pools`, for `backends`.")
    outlier: Outlier | None = Field(default=None, description="As in `pools`, for `backends`.")
    retry: Retry | None = Field(default=None, description="As in `pools`, for `backends`.")
    circuit_breaker: CircuitBreaker | None = Field(default=None, description="As in `pools`, for `backends`.")

    @property
    def is_http(self) -> bool:
        return self.protocol in HTTP_FRONTS

    @property
    def is_datagram(self) -> bool:
        return self.protocol in DATAGRAM_FRONTS

    @property
    def raw_proxy(self) -> RawProxy | None:
        """Mode B of QUIC, which has backends of its own."""
        return self.quic.raw_proxy if self.quic is not None else None

    def resolve(self) -> None:
        if not self.name:
            self.settle(name=str(self.address))
        if self.is_http:
            self.settle(backends=as_http(self.backends))

    def is_idle(self, key: str) -> bool:
        if key in POOL_KEYS:
            return not (self.backends or (self.raw_proxy is not None and key in RAW_POOL_KEYS))
        if key == "xdp_forwarding" and not self.xdp:
            return True
        return key in _ONLY_ON and not self._may_have(key)

    @property
    def speaks_h2(self) -> bool:
        return self.protocol == "h1s" or (self.protocol == "h1" and self.h2c)

    @property
    def http_versions(self) -> int:
        """How many versions of HTTP its exchanges may have: 1.0, 1.1 and 2 over TCP, 3 over QUIC."""
        if not self.is_http or self.raw_proxy is not None:
            return 0
        if self.protocol == "quic":
            return 1
        return 3 if self.speaks_h2 else 2

    def _may_have(self, key: str) -> bool:
        return self.protocol in _ONLY_ON[key] or (key in _OF_HTTP2 and self.speaks_h2)

    def faults(self) -> Iterator[Fault]:
        yield from self._protocol_faults()
        yield from self._backend_faults()
        yield from self._route_faults()
        yield from self._xdp_faults()
        if self.is_set("drain_timeout_ms") and self.is_set("drain_jitter_ms"):
            yield from jitter_faults(self.drain_jitter_ms, self.drain_timeout_ms)

    def _protocol_faults(self) -> Iterator[Fault]:
        protocol = (("protocol",),)
        for key, needed_by in (("tls", ("tls", "h1s")), ("quic", ("quic",))):
            given = getattr(self, key) is not None
            if self.protocol in needed_by and not given:
                yield Fault(
                    (key,),
                    f"a listener with protocol {shown(self.protocol)} needs a {key} table",
                    f"add [listeners.{key}] with cert_path and key_path",
                    depends=protocol,
                )
            if given and self.protocol not in needed_by:
                instead = {
                    "h1": ' (for HTTP over TLS the protocol is "h1s")',
                    "tcp": ' (for TLS the protocol is "tls")',
                }
                yield Fault(
                    (key,),
                    f"{key} has no effect on a listener with protocol {shown(self.protocol)}",
                    f"remove the table, or choose another protocol{instead.get(self.protocol, '')}"
                    if key == "tls"
                    else 'remove the table, or choose the protocol "quic"',
                    depends=protocol,
                )
        for key, fronts in _ONLY_ON.items():
            where = listed(on_offer("listeners.protocol", fronts) or fronts)
            asked = getattr(self, key) is True if key in _SWITCHES else self.is_set(key)
            if asked and not self._may_have(key):
                is_near = key in _OF_HTTP2 and self.protocol == "h1"
                yield Fault(
                    (key,),
                    f"{key} has no effect on a listener with protocol {shown(self.protocol)}"
                    f"{' that does not speak HTTP/2' if is_near else ''}",
                    f"it belongs to {where} listeners: remove it, "
                    f"or {'set h2c = true' if is_near else 'choose another protocol'}",
                    depends=(*protocol, ("h2c",)) if is_near else protocol,
                )
        websocket = self.websocket
        if websocket is not None and websocket.h2_extended_connect and self.is_http and not self.speaks_h2:
            yield Fault(
                ("websocket", "h2_extended_connect"),
                "the listener does not speak HTTP/2",
                "remove it, or set h2c = true" if self.protocol == "h1" else "remove it",
                depends=(*protocol, ("h2c",)),
            )

        if (
            websocket is not None
            and websocket.h3_extended_connect
            and self.is_http
            and self.protocol != "quic"
        ):
            yield Fault(
                ("websocket", "h3_extended_connect"),
                "the listener does not speak HTTP/3",
                "remove it: it belongs to quic listeners",
                depends=protocol,
            )

    def _backend_faults(self) -> Iterator[Fault]:
        raw_proxy = self.raw_proxy is not None
        if not (self.backends or self.routes or raw_proxy) and self.pool is None:
            yield Fault(
                ("backends",),
                "the listener has no backends",
                "add [[listeners.backends]] with an address, or pool with the name of a pool",
                depends=(("pool",), ("routes",), ("quic", "raw_proxy")),
            )
        if self.pool is not None and self.backends:
            yield Fault(
                ("pool",),
                "pool and backends exclude each other",
                "keep the pool, or the listener's own backends",
                depends=(("backends",),),
            )
        if raw_proxy and (self.backends or self.pool is not None):
            yield Fault(
                ("backends",) if self.backends else ("pool",),
                "a listener with quic.raw_proxy takes its backends from there",
                "remove them here, or remove raw_proxy",
            )
        if not self.backends:
            for key in POOL_KEYS:
                if raw_proxy and self.is_set(key):
                    if key not in RAW_POOL_KEYS:
                        yield Fault(
                            (key,),
                            f"{key} has no effect on a listener with quic.raw_proxy",
                            f"remove it: {listed(RAW_POOL_KEYS)} are what tunes its backends",
                        )
                elif self.is_set(key):
                    where = f"set it in the pool {shown(self.pool)}" if self.pool else "set it in the pool"
                    yield Fault(
                        (key,),
                        f"{key} has no effect without backends of the listener's own",
                        where,
                        depends=(("backends",),),
                    )
        yield from set_faults(("backends",), self.backends)
        yield from protocol_faults(("backends",), self.backends)
        yield from backend_faults(self.protocol, ("backends",), self.backends)
        yield from raw_faults(self) if raw_proxy else tuning_faults((), self, (self.protocol,))

    def _xdp_faults(self) -> Iterator[Fault]:
        if self.protocol not in XDP_FRONTS:
            return
        if not self.xdp:
            if self.is_set("xdp_forwarding"):
                yield Fault(
                    ("xdp_forwarding",),
                    "xdp_forwarding has no effect without xdp",
                    "set xdp = true, or remove the key",
                    depends=(("xdp",),),
                )
            return
        yield from vip_faults(("address",), self.address)
        if self.proxy_protocol:
            yield Fault(
                ("proxy_protocol",),
                "proxy_protocol has no effect on a listener with xdp: the kernel forwards packets unread",
                "remove one of the two",
                depends=(("xdp",),),
            )
        if self.backends:
            yield from served_faults((), self)
            yield from address_faults(("backends",), self.backends, self.address, self.xdp_forwarding)

    def _route_faults(self) -> Iterator[Fault]:
        yield from route_faults("routes", self.routes)
        yield from route_retry_faults("routes", self.routes)


def jitter_faults(jitter_ms: int, timeout_ms: int) -> Iterator[Fault]:
    """The jitter spreads the beginning of a drain, so it must lie within it."""
    if jitter_ms > timeout_ms:
        yield Fault(
            ("drain_jitter_ms",),
            f"expected at most the drain timeout ({timeout_ms} milliseconds), found {jitter_ms}",
            "lower drain_jitter_ms, or raise drain_timeout_ms",
            depends=(("drain_timeout_ms",),),
        )
