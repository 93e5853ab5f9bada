"""Facts about network devices, from ioctl and /proc: both know the network namespace of who asks.

(What is in /sys/class/net is that of whoever mounted it, which is another one after `nsenter --net`; and
/proc/net is that of the first thread.)
"""

import fcntl
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from expressgateway.l4.xdp.wanted import IpAddress

_SIOCGIFHWADDR: Final = 0x8927
_ARPHRD_ETHER: Final = 1
_ARPHRD_LOOPBACK: Final = 772
_ANY_PORT: Final = 9
_VLANS: Final = Path("/proc/thread-self/net/vlan/config")
_SYSCTL: Final = Path("/proc/sys")


@dataclass(frozen=True, slots=True)
class Place:
    """Where frames leave: a device, or a VLAN on it."""

    route_ifindex: int
    """What a route names."""
    ifindex: int
    """The device itself."""
    vlan: int
    """0: none."""
    mac: bytes


def ifindex_of(name: str) -> int:
    """0: there is none of this name."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def mac_of(name: str) -> bytes | None:
    """None: it is gone, or its frames are not Ethernet's."""
    request = struct.pack("16sH14x", name.encode()[:15], 0) + bytes(8)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock, _SIOCGIFHWADDR, request)
        except OSError:
            return None
    (kind,) = struct.unpack_from("H", answer, 16)
    return answer[18:24] if kind in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK) else None


def vlans_on(name: str) -> list[tuple[str, int]]:
    """The VLAN devices on top of a device: name and tag of each."""
    try:
        lines = _VLANS.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines[2:]:
        fields = [field.strip() for field in line.split("|")]
        if len(fields) == 3 and fields[2] == name and fields[1].isdigit():
            found.append((fields[0], int(fields[1])))
    return found


def places_of(name: str) -> list[Place]:
    """A device and the VLANs on it; empty if it is gone."""
    ifindex, mac = ifindex_of(name), mac_of(name)
    if not ifindex or mac is None:
        return []
    found = [Place(ifindex, ifindex, 0, mac)]
    for vlan_name, tag in vlans_on(name):
        if (vlan_ifindex := ifindex_of(vlan_name)) and (vlan_mac := mac_of(vlan_name)) is not None:
            found.append(Place(vlan_ifindex, ifindex, tag, vlan_mac))
    return found


def source_towards(address: IpAddress) -> IpAddress | None:
    """Our address on the way there, as the kernel chooses it; None: there is no way."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((str(address), _ANY_PORT))
            text = sock.getsockname()[0]
        except OSError:
            return None
    return type(address)(text)


def forwarding_off(names: list[str], versions: set[int]) -> list[str]:
    """The sysctl keys that would have to be 1: for packets of these versions of IP that come in there."""
    wanting = []
    for name in names:
        for version in sorted(versions):
            family = "ipv4" if version == 4 else "ipv6"
            try:
                value = (_SYSCTL / "net" / family / "conf" / name / "forwarding").read_text()
            except OSError:
                continue  # gone, or the kernel lacks the protocol: then there is more to say than this
            if value.strip() == "0":
                # sysctl takes a slash for the dot in the name of a VLAN device
                wanting.append(f"net.{family}.conf.{name.replace('.', '/')}.forwarding")
    return wanting


def routers() -> set[tuple[str, int]]:
    """The gateways of the routes of this namespace: address and ifindex."""
    found: set[tuple[str, int]] = set()
    try:
        lines = Path("/proc/thread-self/net/route").read_text().splitlines()[1:]
    except OSError:
        lines = []
    for line in lines:
        fields = line.split()
        if len(fields) > 3 and int(fields[2], 16) and (ifindex := ifindex_of(fields[0])):
            found.add((socket.inet_ntop(socket.AF_INET, struct.pack("=I", int(fields[2], 16))), ifindex))
    try:
        lines = Path("/proc/thread-self/net/ipv6_route").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        fields = line.split()
        if len(fields) == 10 and int(fields[4], 16) and (ifindex := ifindex_of(fields[9])):
            found.add((socket.inet_ntop(socket.AF_INET6, bytes.fromhex(fields[4])), ifindex))
    return found
