"""`bpf/layout.h` in Python: the keys, values and numbers of every map, under the names that they have there.

`check` compares all of it with what the compiler wrote down of the header in the object (BTF): sizes, places
and numbers that differ are found before the object is loaded, not in packets.

Structures become bytes by ``bytes(structure)`` and come from them by ``Structure.from_buffer_copy``. Ports
are plain numbers here, whichever order they have in memory; addresses are `Address`, see `address_of`.
"""

import ctypes
import re
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from enum import IntEnum, IntFlag
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Annotated, Final, TypeVar, get_type_hints

from expressgateway.l4.xdp.libbpf import Object

LAYOUT_VERSION: Final = 1
MAX_VIPS: Final = 256
MAX_BACKENDS: Final = 8192
MAX_PORTS: Final = 256
MAX_DENIED: Final = 65536
MAX_SERVER_IDS: Final = 8192
MAX_FLOW_ENTRIES: Final = 131072
MAX_OPENING_ENTRIES: Final = 32768

# A field's type for Python, and for memory. Be16 is in network byte order.
U8 = Annotated[int, c_uint8]
U16 = Annotated[int, c_uint16]
U32 = Annotated[int, c_uint32]
U64 = Annotated[int, c_uint64]
Be16 = Annotated[int, vars(c_uint16)["__ctype_be__"]]
Octets = ctypes.Array[c_uint8]

STRUCTS: Final[dict[str, type[ctypes.Structure]]] = {}
"""By their names in C."""
ENUMS: Final[dict[str, type[IntEnum | IntFlag]]] = {}

_Made = TypeVar("_Made", bound=type[ctypes.Structure])
_Numbers = TypeVar("_Numbers", bound=type[IntEnum | IntFlag])


class LayoutError(RuntimeError):
    """The object was compiled from another `layout.h` than ours. The text is a sentence."""


def _struct(made: _Made) -> _Made:
    """Lay the annotated fields out as C does, in their order."""
    hints = get_type_hints(made, include_extras=True)
    fields = (
        (name, getattr(hints[name], "__metadata__", (hints[name],))[0]) for name in made.__annotations__
    )
    made._fields_ = tuple(fields)
    STRUCTS[_name_in_c(made)] = made
    return made


def _enum(made: _Numbers) -> _Numbers:
    ENUMS[_name_in_c(made)] = made
    return made


def _name_in_c(made: type) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", made.__name__).lower()


def octets(raw: bytes) -> Octets:
    """As a field of bytes takes it."""
    return (c_uint8 * len(raw))(*raw)


def address_bytes(ip: str | IPv4Address | IPv6Address) -> bytes:
    """Sixteen bytes; an IPv4 address is mapped."""
    ip = ip_address(ip)
    return ip.packed if ip.version == 6 else _MAPPED + ip.packed


def ip_of(raw: bytes) -> IPv4Address | IPv6Address:
    """The other way; a mapped address is an IPv4 address again."""
    return IPv4Address(raw[12:]) if raw.startswith(_MAPPED) else IPv6Address(raw)


_MAPPED: Final = bytes(10) + b"\xff\xff"


@_struct
class Address(ctypes.Structure):
    words: Annotated[ctypes.Array[c_uint32], vars(c_uint32)["__ctype_be__"] * 4]

    def __str__(self) -> str:
        return str(ip_of(bytes(self)))


def address_of(ip: str | IPv4Address | IPv6Address) -> Address:
    return Address.from_buffer_copy(address_bytes(ip))


@_struct
class Tuple(ctypes.Structure):
    source: Address
    destination: Address
    source_port: Be16
    destination_port: Be16
    protocol: U8
    zero: U8
    backend: U16


@_struct
class Tuple4(ctypes.Structure):
    """The same of IPv4 alone, as `flows4` has it."""

    source: Annotated[Octets, c_uint8 * 4]
    destination: Annotated[Octets, c_uint8 * 4]
    source_port: Be16
    destination_port: Be16
    protocol: U8
    zero: U8
    backend: U16


def tuple_of(key: bytes) -> Tuple:
    """A flow's key, of either table."""
    if len(key) == ctypes.sizeof(Tuple):
        return Tuple.from_buffer_copy(key)
    short = Tuple4.from_buffer_copy(key)
    return Tuple(
        source=address_of(IPv4Address(bytes(short.source))),
        destination=address_of(IPv4Address(bytes(short.destination))),
        source_port=short.source_port,
        destination_port=short.destination_port,
        protocol=short.protocol,
        backend=short.backend,
    )


def key_of(one: Tuple) -> bytes:
    """The other way: as the table of its family has it."""
    source, destination = bytes(one.source), bytes(one.destination)
    if not source.startswith(_MAPPED):
        return bytes(one)
    return bytes(
        Tuple4(
            source=octets(source[12:]),
            destination=octets(destination[12:]),
            source_port=one.source_port,
            destination_port=one.destination_port,
            protocol=one.protocol,
            backend=one.backend,
        )
    )


@_struct
class VipKey(ctypes.Structure):
    address: Address
    port: Be16
    protocol: U8
    zero: U8


@_enum
class Forwarding(IntEnum):
    FORWARD_NAT = 1
    FORWARD_DSR = 2
    FORWARD_DSR_ENCAPSULATED = 3


@_enum
class VipFlag(IntFlag):
    VIP_BY_ADDRESS = 1
    VIP_SERVER_IDS = 2


@_struct
class Vip(ctypes.Structure):
    number: U32
    table_size: U32
    forwarding: U8
    flags: U8
    config_id: U8
    server_id_length: U8
    zero: U32


@_enum
class BackendFlag(IntFlag):
    BACKEND_ALIVE = 1


@_struct
class Backend(ctypes.Structure):
    address: Address
    source: Address
    port: Be16
    flags: U8
    zero: U8
    generation: U32


@_enum
class Direction(IntEnum):
    TO_BACKEND = 1
    TO_CLIENT = 2


@_enum
class FlowFlag(IntFlag):
    FLOW_OPENING = 1
    FLOW_FIN = 2
    FLOW_TWIN_FIN = 4
    FLOW_RST = 8
    FLOW_SERVER_IDS = 16


@_struct
class Hop(ctypes.Structure):
    until_ns: U64
    ifindex: U32
    mtu: U32
    vlan: U16
    destination: Annotated[Octets, c_uint8 * 6]
    source: Annotated[Octets, c_uint8 * 6]
    zero: U16


@_struct
class Flow(ctypes.Structure):
    to: Tuple
    seen_ns: U64
    hop: Hop
    vip: U32
    backend: U32
    generation: U32
    direction: U8
    flags: U8
    forwarding: U8
    zero: U8


@_struct
class ServerId(ctypes.Structure):
    vip: U32
    bytes: Annotated[Octets, c_uint8 * 16]


@_struct
class Port(ctypes.Structure):
    ifindex: U32
    vlan: U16
    mac: Annotated[Octets, c_uint8 * 6]


@_struct
class Prefix4(ctypes.Structure):
    length: U32
    bytes: Annotated[Octets, c_uint8 * 4]


@_struct
class Prefix6(ctypes.Structure):
    length: U32
    bytes: Annotated[Octets, c_uint8 * 16]


@_struct
class Settings(ctypes.Structure):
    tcp_idle_ns: U64
    udp_idle_ns: U64
    closing_ns: U64
    new_flows_per_second: U32
    first_port: U16
    last_port: U16
    seed: U32
    denies: U32


@_enum
class Action(IntEnum):
    ACTION_PASS = 0
    ACTION_DROP = 1


@_enum
class Reason(IntEnum):
    PASS_FRAGMENT = 0
    PASS_MALFORMED = 1
    PASS_NOT_UNDERSTOOD = 2
    PASS_NO_FLOW = 3
    PASS_OVER_CAP = 4
    PASS_NO_BACKEND = 5
    PASS_NO_PORT = 6
    PASS_NO_ROUTE = 7
    DROP_DENIED = 8
    DROP_TTL = 9
    DROP_NO_NEIGHBOUR = 10
    DROP_NO_ROUTE = 11
    DROP_NO_PORT = 12
    DROP_NOT_ADJACENT = 13
    DROP_TOO_BIG = 14
    DROP_NO_SPACE = 15
    DROP_RACE = 16

    @property
    def action(self) -> Action:
        return Action.ACTION_DROP if self >= FIRST_DROP else Action.ACTION_PASS


FIRST_DROP: Final = Reason.DROP_DENIED
REASON_COUNT: Final = len(Reason)


@_struct
class VipCount(ctypes.Structure):
    in_packets: U64
    in_bytes: U64
    out_packets: U64
    out_bytes: U64
    flows: U64
    stateless: U64
    icmp_followed: U64
    icmp_too_big: U64
    reasons: Annotated[ctypes.Array[c_uint64], c_uint64 * REASON_COUNT]


@_struct
class BackendCount(ctypes.Structure):
    in_packets: U64
    in_bytes: U64
    out_packets: U64
    out_bytes: U64
    flows: U64


@_struct
class Rate(ctypes.Structure):
    second: U64
    flows: U64


@_struct
class Numbers(ctypes.Structure):
    """For `check` alone, as it is there."""

    forwarding: U32
    vip_flag: U32
    backend_flag: U32
    direction: U32
    flow_flag: U32
    action: U32
    reason: U32


@_struct
class Sweep(ctypes.Structure):
    flows4: U64
    flows6: U64
    opening: U64
    entries: U64
    removed: U64
    numbers: Annotated[ctypes.Array[Numbers], Numbers * 0]


def check(thing: Object) -> None:
    """Raise where the object and this module differ."""
    types = thing.types()
    for name, ours in STRUCTS.items():
        theirs = types.structs.get(name)
        if theirs is None:
            raise LayoutError(f"{thing.path} says nothing about struct {name}")
        if theirs.size != ctypes.sizeof(ours):
            sizes = f"{theirs.size} bytes, and {ctypes.sizeof(ours)} here"
            raise LayoutError(f"struct {name} of {thing.path} has {sizes}")
        _compare(f"struct {name}", thing, _offsets(ours), theirs.offsets)
    for name, numbers in ENUMS.items():
        values = types.enums.get(name)
        if values is None:
            raise LayoutError(f"{thing.path} says nothing about enum {name}")
        expected: dict[str, int] = {name: each.value for name, each in numbers.__members__.items()}
        if numbers is Reason:
            expected["REASON_COUNT"] = REASON_COUNT
        _compare(f"enum {name}", thing, expected, values)


def _offsets(made: type[ctypes.Structure]) -> dict[str, int]:
    return {field[0]: getattr(made, field[0]).offset for field in made._fields_}


def _compare(what: str, thing: Object, ours: dict[str, int], theirs: dict[str, int]) -> None:
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            values = f"{theirs.get(name, 'missing')}, and {ours.get(name, 'missing')} here"
            raise LayoutError(f"{name} in {what} of {thing.path} is {values}")
