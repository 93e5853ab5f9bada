"""Listeners that the kernel serves (XDP): their values, and the rules that nothing else has.

A packet that the kernel forwards is never seen by a worker, so a listener with `xdp` can have what its
program knows, and nothing that rests on reading or ending a connection: such keys would hold for a part of
the traffic only. What a rule needs of other blocks comes in as arguments.
"""

import re
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Any, Final, Literal, Protocol

from pydantic import PlainSerializer

from expressgateway.config.pools import Backend, CircuitBreaker, Front, LoadBalancing, Retry
from expressgateway.config.values import (
    Address,
    BadValueError,
    Custom,
    Fault,
    Loc,
    Parsed,
    expect_string,
    shown,
)

XDP_FRONTS: Final[tuple[Front, ...]] = ("tcp", "udp")

Forwarding = Literal["nat", "dsr", "dsr_encapsulated"]

MAX_VIPS: Final = 255
"""Addresses that the program serves at once (`MAX_VIPS` of its layout, where 0 is nobody)."""
MAX_DENIED: Final = 65_536
"""Networks of one address family in its deny list (`MAX_DENIED` there)."""
MAX_INTERFACES: Final = 64

_LOWEST_PORT: Final = 1024
_INTERFACE: Final = r"[^\s/]{1,15}"
_ONE: Final = {"type": "string", "pattern": f"^{_INTERFACE}$"}


# -- values


def _parse_interfaces(value: object) -> tuple[str, ...]:
    names = value if isinstance(value, list | tuple) else [value]
    if not names:
        raise BadValueError(
            "expected the name of a network interface, or an array of them, found an empty array"
        )
    if len(names) > MAX_INTERFACES:
        raise BadValueError(f"expected at most {MAX_INTERFACES} network interfaces, found {len(names)}")
    for name in names:
        text = expect_string(name, "the name of a network interface")
        if re.fullmatch(_INTERFACE, text) is None or text in (".", ".."):
            raise BadValueError(f"expected the name of a network interface, found {shown(text)}")
        if names.count(name) > 1:
            raise BadValueError(f"the network interface {shown(text)} is named twice")
    return tuple(names)


def _written(names: tuple[str, ...]) -> str | list[str]:
    return names[0] if len(names) == 1 else list(names)


class _Interfaces(Parsed):
    """One name, or an array of names."""

    __slots__ = ()

    def describe(self) -> str:
        return "name of a network interface, or array of them"

    def parse(self, value: object) -> tuple[str, ...]:
        return _parse_interfaces(value)

    def json_schema(self) -> dict[str, Any]:
        several = {"type": "array", "items": _ONE, "minItems": 1, "maxItems": MAX_INTERFACES}
        return {"anyOf": [_ONE, several]}


Interfaces = Annotated[tuple[str, ...], _Interfaces(), PlainSerializer(_written)]


def _parse_ports(value: object) -> str:
    what = f'two ports from {_LOWEST_PORT} to 65535, as in "10000-32767"'
    text = expect_string(value, what)
    first, dash, last = text.partition("-")
    if not dash or not all(re.fullmatch("[0-9]{1,5}", port) for port in (first, last)):
        raise BadValueError(f"expected {what}, found {shown(text)}")
    if not all(_LOWEST_PORT <= int(port) <= 65535 for port in (first, last)):
        raise BadValueError(f"expected {what}, found {shown(text)}")
    if int(first) > int(last):
        raise BadValueError(f"the first port of {shown(text)} is above the last one")
    return f"{int(first)}-{int(last)}"


SourcePorts = Annotated[
    str,
    Custom(
        "two ports, 1024..65535",
        _parse_ports,
        (("type", "string"), ("pattern", "^[0-9]{1,5}-[0-9]{1,5}$")),
    ),
]


def denied_faults(networks: Sequence[IPv4Network | IPv6Network]) -> Iterator[Fault]:
    for version in (4, 6):
        count = sum(network.version == version for network in networks)
        if count > MAX_DENIED:
            yield Fault(
                ("xdp_denied",),
                f"expected at most {MAX_DENIED} networks of IPv{version}, found {count}",
                "join neighbouring networks into larger ones",
            )


# -- rules


class Served(Protocol):
    """A pool, or a listener with backends of its own."""

    @property
    def load_balancing(self) -> LoadBalancing: ...
    @property
    def retry(self) -> Retry | None: ...
    @property
    def circuit_breaker(self) -> CircuitBreaker | None: ...


def vip_faults(where: Loc, address: Address) -> Iterator[Fault]:
    """What the address of a listener has to be for the program to know its packets. `where`: of the key."""
    ip = address.ip
    said = f"{shown(str(address))} cannot be served by XDP"
    if ip is None:
        yield Fault(
            where, f"{said}: packets carry addresses, not names", "write the address", depends=(("xdp",),)
        )
    elif ip.is_unspecified:
        yield Fault(
            where,
            f"{said}: the program knows the packets of a listener by their destination",
            "write the address that clients connect to, one listener for each",
            depends=(("xdp",),),
        )
    elif ip.is_multicast or (ip.version == 6 and (ip.is_link_local or ip.ipv4_mapped is not None)):
        hint = "write the address that clients connect to"
        if ip.version == 6 and ip.ipv4_mapped is not None:
            hint = f'write "{ip.ipv4_mapped}:{address.port}"'
        yield Fault(
            where, f"{said}: it is no address of one host on every network", hint, depends=(("xdp",),)
        )


def served_faults(where: Loc, served: Served, user: str = "") -> Iterator[Fault]:
    """What a pool that the kernel balances cannot have; `user` names a listener if it is a named pool."""
    listener = f"a listener with xdp{f' (used by {user})' if user else ''}"
    depends = () if user else (("xdp",),)
    policy = served.load_balancing.policy
    if policy != "maglev":
        yield Fault(
            (*where, "load_balancing", "policy"),
            f"the kernel balances {listener} by Maglev's table, and cannot do {shown(policy)}",
            'write policy = "maglev" in its load_balancing table',
            depends=depends,
        )
    if served.retry is not None:
        yield Fault(
            (*where, "retry"),
            f"retry has no effect on {listener}: the kernel forwards packets and makes no connections",
            "remove it: a backend that health checks find down is left out by itself",
            depends=depends,
        )
    if served.circuit_breaker is not None:
        yield Fault(
            (*where, "circuit_breaker"),
            f"circuit_breaker has no effect on {listener}: the kernel forwards packets and counts no "
            "connections",
            "remove it; runtime.xdp_max_flows bounds what is known of flows",
            depends=depends,
        )


def address_faults(
    where: Loc, backends: Sequence[Backend], vip: Address, forwarding: Forwarding, user: str = ""
) -> Iterator[Fault]:
    """What the program asks of each backend at `where`; names are looked at when they have been resolved."""
    of_user = f" (used by {user})" if user else ""
    for index, backend in enumerate(backends):
        for key in ("tls", "send_proxy"):
            if getattr(backend, key):
                yield Fault(
                    (*where, index, key),
                    f"{key} has no effect on a listener with xdp{of_user}: the kernel forwards packets as "
                    "they are",
                    "remove the key, or xdp",
                )
        ip, vip_ip = backend.address.ip, vip.ip
        if ip is not None and vip_ip is not None and ip.version != vip_ip.version:
            yield Fault(
                (*where, index, "address"),
                f"an IPv{ip.version} backend cannot be reached from an IPv{vip_ip.version} listener with "
                f"xdp{of_user}: the kernel does not translate between the two",
                f"use a backend with an IPv{vip_ip.version} address",
            )
        if forwarding != "nat" and not backend.address.is_srv and backend.address.port != vip.port:
            yield Fault(
                (*where, index, "address"),
                f"with xdp_forwarding = {shown(forwarding)} packets keep their port, which is {vip.port}"
                f"{of_user}, and the backend's is {backend.address.port}",
                f"have the backend listen on port {vip.port}, or use nat",
            )
