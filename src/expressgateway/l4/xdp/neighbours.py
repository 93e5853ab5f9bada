"""Keeping next hops resolved.

The program asks the kernel for the MAC address of a next hop and cannot have it looked up: a packet for one
that is not known is not forwarded. Nor does the kernel notice that a neighbour is in use, for it does not
send what the program sends. So somebody asks in its place, every few seconds: rtnetlink's RTM_NEWNEIGH with
NTF_USE is to a neighbour what a packet to it would be.
"""

import socket
import struct
from collections.abc import Iterable
from typing import Final

from expressgateway.l4.xdp.wanted import IpAddress

_ROUTE: Final = 0  # NETLINK_ROUTE
_REQUEST: Final = 1
_ACK: Final = 4
_CREATE: Final = 0x400
_ERROR: Final = 2  # NLMSG_ERROR
_NEW_ROUTE: Final = 24
_GET_ROUTE: Final = 26
_NEW_NEIGHBOUR: Final = 28
_GET_NEIGHBOUR: Final = 30
_STATIC: Final = 0x80 | 0x40  # NUD_PERMANENT, NUD_NOARP
_USE: Final = 1  # NTF_USE
_DST: Final = 1  # RTA_DST, NDA_DST
_OIF: Final = 4
_GATEWAY: Final = 5
_VIA: Final = 18
_HEADER: Final = struct.Struct("=IHHII")
_ROUTE_MESSAGE: Final = struct.Struct("=BBBBBBBBI")
_NEIGHBOUR_MESSAGE: Final = struct.Struct("=BxHiHBB")
_ATTRIBUTE: Final = struct.Struct("=HH")
_PATIENCE_S: Final = 1.0
_MAX_ANSWER: Final = 16_384

Hop = tuple[bytes, int]
"""The address of a next hop, and the ifindex of its device."""


class Neighbours:
    """To be used by one thread. No method raises but the first: `OSError` where there is no netlink."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _ROUTE)
        self._socket.settimeout(_PATIENCE_S)
        self._sequence = 0

    def keep(self, addresses: Iterable[IpAddress], routers: Iterable[tuple[str, int]] = ()) -> int:
        """Have the next hops towards these addresses resolved, and these routers; how many there are."""
        hops: set[Hop] = set()
        for text, ifindex in routers:
            family = socket.AF_INET6 if ":" in text else socket.AF_INET
            hops.add((socket.inet_pton(family, text), ifindex))
        for address in addresses:
            hop = self.next_hop(address)
            if hop is not None:
                hops.add(hop)
        for hop in hops:
            self._use(hop)
        return len(hops)

    def next_hop(self, address: IpAddress) -> Hop | None:
        """None: there is no route, or it leads to ourselves."""
        raw = address.packed
        family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
        message = _ROUTE_MESSAGE.pack(family, 8 * len(raw), 0, 0, 0, 0, 0, 0, 0)
        answer = self._ask(_GET_ROUTE, _REQUEST, message + _attribute(_DST, raw))
        if answer is None or answer[0] != _NEW_ROUTE:
            return None
        body = answer[1]
        if body[7] != 1:  # RTN_UNICAST
            return None
        attributes = _attributes(body[_ROUTE_MESSAGE.size :])
        if _OIF not in attributes:
            return None
        hop = attributes.get(_GATEWAY, raw)
        if (via := attributes.get(_VIA)) is not None:
            hop = via[2:]
        return hop, int.from_bytes(attributes[_OIF], "little")

    def _use(self, hop: Hop) -> None:
        raw, ifindex = hop
        family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
        asked = _NEIGHBOUR_MESSAGE.pack(family, 0, ifindex, 0, 0, 0) + _attribute(_DST, raw)
        known = self._ask(_GET_NEIGHBOUR, _REQUEST, asked)
        if known is not None and known[0] == _NEW_NEIGHBOUR:
            *_, state, _, _ = _NEIGHBOUR_MESSAGE.unpack_from(known[1])
            if state & _STATIC:  # an operator's: to use it in this way would make it one like any other
                return
        message = _NEIGHBOUR_MESSAGE.pack(family, 0, ifindex, 0, _USE, 0)
        self._ask(_NEW_NEIGHBOUR, _REQUEST | _ACK | _CREATE, message + _attribute(_DST, raw))

    def _ask(self, kind: int, flags: int, body: bytes) -> tuple[int, bytes] | None:
        """The kind and the body of the answer; None: it came to nothing."""
        self._sequence = self._sequence % 0xFFFF_FFFF + 1
        length = _HEADER.size + len(body)
        try:
            self._socket.send(_HEADER.pack(length, kind, flags, self._sequence, 0) + body)
            while True:
                data = self._socket.recv(_MAX_ANSWER)
                length, kind, _, sequence, _ = _HEADER.unpack_from(data)
                if sequence == self._sequence:
                    return kind, data[_HEADER.size : length]
        except OSError:
            return None

    def close(self) -> None:
        self._socket.close()


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            break
        found[kind] = data[_ATTRIBUTE.size : length]
        data = data[length + -length % 4 :]
    return found
