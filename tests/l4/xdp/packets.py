"""Frames, layer by layer, with checksums that are computed; and frames taken apart again by other code.

    packet = Packet().ether(GATEWAY, CLIENT).ip(client, vip).tcp(1234, 80, SYN).raw(b"...")
    bytes(packet), bytes(packet.but(ip={"ttl": 63}))

Whatever a layer computes (lengths, next headers, checksums) can be given in its place: that is how malformed
ones are made.
"""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, NamedTuple, Self

ETH_IP, ETH_IPV6, ETH_VLAN, ETH_QINQ, ETH_ARP = 0x0800, 0x86DD, 0x8100, 0x88A8, 0x0806
ICMP, IPIP, TCP, UDP, IPV6, ICMPV6 = 1, 4, 6, 17, 41, 58
HOP_BY_HOP, ROUTING, FRAGMENT, ESP, AUTHENTICATION, NOTHING, DESTINATION = 0, 43, 44, 50, 51, 59, 60
FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32
DF, MF = 0x4000, 0x2000


def summed(data: bytes, start: int = 0) -> int:
    """The sum of its 16-bit words, in ones' complement (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total: int = start + sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def pseudo(source: str, destination: str, protocol: int, length: int) -> bytes:
    addresses = ip_address(source).packed + ip_address(destination).packed
    return addresses + (struct.pack("!HH", protocol, length) if len(addresses) == 8 else
                        struct.pack("!II", length, protocol))  # fmt: skip


class Layer:
    """``inner`` is what follows, packed; ``around`` the nearest IP header."""

    kind: int | None = None
    """Its number in the layer below."""

    def pack(self, inner: bytes, following: int | None, around: Ip | None) -> bytes:
        raise NotImplementedError


@dataclass(frozen=True)
class Ether(Layer):
    destination: bytes
    source: bytes
    type: int | None = None

    def pack(self, inner: bytes, following: int | None, around: Ip | None) -> bytes:
        kind = following if self.type is None else self.type
        return self.destination + self.source + struct.pack("!H", kind or 0) + inner


@dataclass(frozen=True)
class Vlan(Layer):
    tag: int
    tpid: int = ETH_VLAN
    type: int | None = None

    @property
    def kind(self) -> int:  # type: ignore[override]
        return self.tpid

    def pack(self, inner: bytes, following: int | None, around: Ip | None) -> bytes:
        return struct.pack("!HH", self.tag, (following if self.type is None else self.type) or 0) + inner


@dataclass(frozen=True)
class Ip(Layer):
    """Of either version, by the addresses; ``ttl`` is the hop limit as well."""

    source: str
    destination: str
    ttl: int = 64
    tos: int = 0
    flow_label: int = 0
    identification: int = 0x1234
    fragment: int = DF
    options: bytes = b""
    version: int | None = None
    header_words: int | None = None
    length: int | None = None
    """Total length (IPv4) or payload length (IPv6)."""
    protocol: int | None = None
    check: int | None = None

    @property
    def is_v6(self) -> bool:
        return ":" in self.source

    @property
    def kind(self) -> int:  # type: ignore[override]
        return ETH_IPV6 if self.is_v6 else ETH_IP

    def pack(self, inner: bytes, following: int | None, around: Ip | None) -> bytes:
        protocol = (NOTHING if following is None else following) if self.protocol is None else self.protocol
        addresses = ip_address(self.source).packed + ip_address(self.destination).packed
        if self.is_v6:
            version = (self.version or 6) << 28 | self.tos << 20 | self.flow_label
            length = len(inner) if self.length is None else self.length
            return struct.pack("!IHBB", version, length, protocol, self.ttl) + addresses + inner
        words = 5 + len(self.options) // 4 if self.header_words is None else self.header_words
        length = 20 + len(self.options) + len(inner) if self.length is None else self.length
        first = struct.pack("!BBHHHBB", (self.version or 4) << 4 | words, self.tos, length,
                            self.identification, self.fragment, self.ttl, protocol)  # fmt: skip
        header = first + b"\0\0" + addresses + self.options
        check = ~summed(header) & 0xFFFF if self.check is None else self.check
        return first + struct.pack("!H", check) + header[12:] + inner


@dataclass(frozen=True)
class Extension(Layer):
    """An extension header of IPv6; ``body`` from its third byte on."""

    number: int
    body: bytes = b"\1\4\0\0\0\0"
    next: int | None = None
    length: int | None = None

    @property
    def kind(self) -> int:  # type: ignore[override]
        return self.number

    def pack(self, inner: bytes, following: int | None, around: Ip | None) -> bytes:
        following = (NOTHING if following is None else following) if self.next is None else self.next
        length = (len(self.body) + 2) // 8 - 1 if self.length is None else self.length
        return bytes([following, length]) + self.body + inner


@dataclass(frozen=True)
class Tcp(Layer):
    source: int
    destination: int
    flags: int = ACK
    sequence: int = 0x01020304
    acknowledged: int = 0x05060708
    window: int = 0x1000
    options: bytes = b""
    header_words: int | None = None
    check: int | None = None
    kind = TCP

    def pack(self, inner: bytes, following: int | None, around: Ip | None) -> bytes:
        words = 5 + len(self.options) // 4 if self.header_words is None else self.header_words
        first = struct.pack("!HHIIBBH", self.source, self.destination, self.sequence, self.acknowledged,
                            words << 4, self.flags, self.window)  # fmt: skip
        last = b"\0\0" + self.options + inner
        return first + _check(first + b"\0\0" + last, TCP, around, self.check) + last


@dataclass(frozen=True)
class Udp(Layer):
    source: int
    destination: int
    length: int | None = None
    check: int | None = None
    kind = UDP

    def pack(self, inner: bytes, following: int | None, around: Ip | None) -> bytes:
        length = 8 + len(inner) if self.length is None else self.length
        first = struct.pack("!HHH", self.source, self.destination, length)
        return first + _check(first + b"\0\0" + inner, UDP, around, self.check) + inner


@dataclass(frozen=True)
class Icmp(Layer):
    """ICMP, or ICMPv6 where that is what the address around it is."""

    type: int
    code: int = 0
    rest: int = 0
    check: int | None = None
    v6: bool = False

    @property
    def kind(self) -> int:  # type: ignore[override]
        return ICMPV6 if self.v6 else ICMP

    def pack(self, inner: bytes, following: int | None, around: Ip | None) -> bytes:
        first, last = bytes([self.type, self.code]), struct.pack("!I", self.rest) + inner
        around = around if self.v6 else None
        return first + _check(first + b"\0\0" + last, ICMPV6, around, self.check) + last


@dataclass(frozen=True)
class Raw(Layer):
    data: bytes

    def pack(self, inner: bytes, following: int | None, around: Ip | None) -> bytes:
        return self.data + inner


def _check(data: bytes, protocol: int, around: Ip | None, given: int | None) -> bytes:
    if given is not None:
        return struct.pack("!H", given)
    start = summed(pseudo(around.source, around.destination, protocol, len(data))) if around else 0
    check = ~summed(data, start) & 0xFFFF
    return struct.pack("!H", 0xFFFF if protocol == UDP and not check else check)


@dataclass(frozen=True)
class Packet:
    layers: tuple[Layer, ...] = ()

    def ether(self, destination: bytes, source: bytes, **fields: Any) -> Self:
        return self.add(Ether(destination, source, **fields))

    def vlan(self, tag: int, tpid: int = ETH_VLAN, **fields: Any) -> Self:
        return self.add(Vlan(tag, tpid, **fields))

    def ip(self, source: str, destination: str, **fields: Any) -> Self:
        return self.add(Ip(source, destination, **fields))

    def extension(self, number: int, **fields: Any) -> Self:
        return self.add(Extension(number, **fields))

    def tcp(self, source: int, destination: int, flags: int = ACK, **fields: Any) -> Self:
        return self.add(Tcp(source, destination, flags, **fields))

    def udp(self, source: int, destination: int, **fields: Any) -> Self:
        return self.add(Udp(source, destination, **fields))

    def icmp(self, type: int, code: int = 0, rest: int = 0, **fields: Any) -> Self:  # noqa: A002
        inside = next(layer for layer in reversed(self.layers) if isinstance(layer, Ip))
        return self.add(Icmp(type, code, rest, v6=inside.is_v6, **fields))

    def raw(self, data: bytes) -> Self:
        return self.add(Raw(data))

    def add(self, *layers: Layer) -> Self:
        return dataclasses.replace(self, layers=(*self.layers, *layers))

    def but(self, **changes: dict[str, Any]) -> Self:
        """The first layer of each name with other fields: ``but(ip={"ttl": 1})``."""
        layers = list(self.layers)
        for name, fields in changes.items():
            at = next(i for i, layer in enumerate(layers) if type(layer).__name__.lower() == name)
            layers[at] = dataclasses.replace(layers[at], **fields)  # type: ignore[type-var]
        return dataclasses.replace(self, layers=tuple(layers))

    def without(self, name: str) -> Self:
        layers = (layer for layer in self.layers if type(layer).__name__.lower() != name)
        return dataclasses.replace(self, layers=tuple(layers))

    def within(self, outer: Ip) -> Self:
        """With another IP header in front of the first."""
        at = next(i for i, layer in enumerate(self.layers) if isinstance(layer, Ip))
        return dataclasses.replace(self, layers=(*self.layers[:at], outer, *self.layers[at:]))

    @property
    def inner(self) -> bytes:
        """Without the link's headers: what is quoted, and what is counted."""
        at = next(i for i, layer in enumerate(self.layers) if isinstance(layer, Ip))
        return bytes(Packet(self.layers[at:]))

    def __bytes__(self) -> bytes:
        packed, following = b"", None
        for at in range(len(self.layers) - 1, -1, -1):
            layer = self.layers[at]
            around = next((each for each in reversed(self.layers[:at]) if isinstance(each, Ip)), None)
            packed = layer.pack(packed, following, around)
            following = layer.kind
            if isinstance(layer, Ip) and isinstance(around, Ip) and at:
                following = IPV6 if layer.is_v6 else IPIP
        return packed


# -- Taken apart, without the code above: what a receiver would say of a frame.


def faults(frame: bytes) -> list[str]:
    """What is wrong with the lengths and checksums of a frame with IP in it; [] if nothing is."""
    at, kind = 12, int.from_bytes(frame[12:14], "big")
    while kind in (ETH_VLAN, ETH_QINQ):
        at += 4
        kind = int.from_bytes(frame[at : at + 2], "big")
    return _ip_faults(frame[at + 2 :], 4 if kind == ETH_IP else 6)


def _ip_faults(data: bytes, version: int) -> list[str]:
    if not data or data[0] >> 4 != version:
        return ["the version"]
    found = []
    if version == 4:
        size, length, protocol = (data[0] & 15) * 4, int.from_bytes(data[2:4], "big"), data[9]
        if summed(data[:size]) != 0xFFFF:
            found.append("the header's checksum")
        addresses = data[12:20]
    else:
        size, length, protocol = 40, 40 + int.from_bytes(data[4:6], "big"), data[6]
        addresses = data[8:40]
        while protocol in (HOP_BY_HOP, ROUTING, DESTINATION):
            protocol, size = data[size], size + 8 + 8 * data[size + 1]
    if length > len(data):
        return [*found, "the length"]
    payload = data[size:length]
    if protocol in (IPIP, IPV6):
        return found + _ip_faults(payload, 4 if protocol == IPIP else 6)
    head = addresses + struct.pack("!II", len(payload), protocol)
    if protocol == TCP and summed(head + payload) != 0xFFFF:
        found.append("TCP's checksum")
    if protocol == UDP:
        check, length = payload[6:8], int.from_bytes(payload[4:6], "big")
        head = addresses + struct.pack("!II", length, protocol)
        if check != b"\0\0" and summed(head + payload[:length]) != 0xFFFF:
            found.append("UDP's checksum")
    if protocol == ICMP and summed(payload) != 0xFFFF:
        found.append("ICMP's checksum")
    if protocol == ICMPV6 and summed(head + payload) != 0xFFFF:
        found.append("ICMPv6's checksum")
    return found


class Addressed(NamedTuple):
    """Whose packet it is: what a host would deliver it by."""

    source: bytes
    destination: bytes
    protocol: int
    ports: tuple[int, int]
    """0, 0 of ICMP."""
    ttl: int
    tcp_flags: int
    length: int


def addressed(frame: bytes) -> Addressed | None:
    """None unless it is one whole packet of TCP, UDP or ICMP; one VLAN and four extension headers at most."""
    at, kind = 14, int.from_bytes(frame[12:14], "big")
    if kind in (ETH_VLAN, ETH_QINQ) and len(frame) >= 18:
        at, kind = 18, int.from_bytes(frame[16:18], "big")
    data = frame[at:]
    if kind == ETH_IP and len(data) >= 20 and data[0] >> 4 == 4:
        size, length, protocol, ttl = (data[0] & 15) * 4, int.from_bytes(data[2:4], "big"), data[9], data[8]
        is_fragment = int.from_bytes(data[6:8], "big") & 0x3FFF
        if size < 20 or not size <= length <= len(data) or is_fragment:
            return None
        source, destination = data[12:16], data[16:20]
    elif kind == ETH_IPV6 and len(data) >= 40 and data[0] >> 4 == 6:
        size, length, protocol, ttl = 40, 40 + int.from_bytes(data[4:6], "big"), data[6], data[7]
        if length > len(data):
            return None
        for _ in range(4):
            if protocol not in (HOP_BY_HOP, ROUTING, DESTINATION):
                break
            if len(data) < size + 4 or (protocol == ROUTING and data[size + 3]):
                return None
            protocol, size = data[size], size + 8 + 8 * data[size + 1]
            if size + at > 0x1FF:
                return None
        source, destination = data[8:24], data[24:40]
    else:
        return None
    payload = data[size:length] if size <= length else b""
    ports = struct.unpack("!HH", payload[:4]) if len(payload) >= 4 else (0, 0)
    if protocol == TCP:
        words = payload[12] >> 4 if len(payload) >= 20 else 0
        if words < 5 or words * 4 > len(payload):
            return None
        return Addressed(source, destination, protocol, ports, ttl, payload[13], length)
    if protocol == UDP:
        if len(payload) < 8 or not 8 <= int.from_bytes(payload[4:6], "big") <= len(payload):
            return None
        return Addressed(source, destination, protocol, ports, ttl, 0, length)
    if protocol == (ICMP if kind == ETH_IP else ICMPV6) and len(payload) >= 8:
        return Addressed(source, destination, protocol, (0, 0), ttl, 0, length)
    return None
