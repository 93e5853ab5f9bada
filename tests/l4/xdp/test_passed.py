"""What the program leaves to the kernel: as it came, and counted where it could have been ours."""

from collections.abc import Callable

import pytest

from expressgateway.l4.xdp.layout import Reason
from tests.l4.xdp.packets import (
    ACK,
    AUTHENTICATION,
    DESTINATION,
    ESP,
    ETH_ARP,
    ETH_QINQ,
    FRAGMENT,
    HOP_BY_HOP,
    ICMP,
    ICMPV6,
    MF,
    NOTHING,
    ROUTING,
    TCP,
    UDP,
    Extension,
    Packet,
    Raw,
    Vlan,
    mac,
)
from tests.l4.xdp.scene import NAT, extended, link, stage, tagged, tcp, udp
from tests.l4.xdp.world import CLIENT, GATEWAY, PASS, V4, V6, Family, World

MALFORMED, FRAGMENTED = Reason.PASS_MALFORMED, Reason.PASS_FRAGMENT
NOT_UNDERSTOOD = Reason.PASS_NOT_UNDERSTOOD

LONGER = b"\1\x0c" + bytes(12)
"""An extension header of 16 bytes."""

Make = Callable[[Family], Packet | bytes]


def cut(packet: Packet, size: int) -> bytes:
    """The frame ends there; what its headers say stays."""
    return bytes(packet)[:size]


# Frames that are not ours, or no business of this program: nobody counts them.
NOT_OURS: dict[str, Make] = {
    "to another MAC": lambda f: tcp(f).but(ether={"destination": mac("02:00:00:00:00:99")}),
    "to a MAC that differs in its last bit": lambda f: tcp(f).but(ether={"destination": mac("020000000000")}),
    "to a MAC that differs in its first bit": lambda f: tcp(f).but(
        ether={"destination": mac("820000000001")}
    ),
    "to everybody": lambda f: tcp(f).but(ether={"destination": b"\xff" * 6}),
    "ARP": lambda _: Packet().ether(GATEWAY, CLIENT, type=ETH_ARP).raw(bytes(46)),
    "a frame of 802.3": lambda _: Packet().ether(GATEWAY, CLIENT, type=46).raw(bytes(46)),
    "a VLAN tag that is cut off": lambda f: cut(tagged(tcp(f), 5), 16),
    "nothing behind a VLAN tag": lambda f: tagged(tcp(f), 5).but(vlan={"type": 0}),
    "two VLAN tags": lambda f: tagged(tagged(tcp(f), 5), 6, ETH_QINQ),
    "three VLAN tags": lambda f: tagged(tagged(tagged(tcp(f), 5), 6), 7),
    "another address": lambda f: tcp(f).but(ip={"destination": f.nowhere}),
    "another port": lambda f: tcp(f).but(tcp={"destination": 81}),
    "the VIP's port in the other byte order": lambda f: tcp(f).but(tcp={"destination": 80 << 8}),
    "from the VIP": lambda f: tcp(f).but(ip={"source": f.vip, "destination": f.client}),
    "an answer that nobody asked for": lambda f: link(f.backend(1), f.source).tcp(8080, 40000, ACK),
    "UDP to another port": lambda f: udp(f).but(udp={"destination": 81}),
}
IP_HEADER = {4: 20, 6: 40}

# What could have been for a VIP and was not looked at to the end: counted, with 0 in the VIP's place.
COUNTED: dict[str, tuple[Reason, Make]] = {
    "an IP header that is cut off": (MALFORMED, lambda f: cut(tcp(f), 14 + IP_HEADER[f.version] - 1)),
    "of which nothing is there": (MALFORMED, lambda f: cut(tcp(f), 14)),
    "of which one byte is there": (MALFORMED, lambda f: cut(tcp(f), 15)),
    "another version inside": (MALFORMED, lambda f: tcp(f).but(ip={"version": 10 - f.version})),
    "version 5": (MALFORMED, lambda f: tcp(f).but(ip={"version": 5})),
    "a length beyond the frame": (MALFORMED, lambda f: tcp(f).but(ip={"length": 1000})),
    "a length of one byte beyond the frame": (
        MALFORMED, lambda f: tcp(f).but(ip={"length": (41 if f.version == 4 else 21)}),
    ),
    "a length without a whole TCP header": (
        MALFORMED, lambda f: tcp(f).but(ip={"length": (39 if f.version == 4 else 19)}),
    ),
    "a length of nothing": (MALFORMED, lambda f: tcp(f).but(ip={"length": 0})),
    "a length of the longest": (MALFORMED, lambda f: tcp(f).but(ip={"length": 0xFFFF})),
    "a TCP header that is cut off": (MALFORMED, lambda f: link(f.client, f.vip, protocol=TCP).raw(bytes(19))),
    "no TCP header": (MALFORMED, lambda f: link(f.client, f.vip, protocol=TCP).raw(b"\0")),
    "a TCP header of four words": (MALFORMED, lambda f: tcp(f).but(tcp={"header_words": 4})),
    "a TCP header of no words": (MALFORMED, lambda f: tcp(f).but(tcp={"header_words": 0})),
    "TCP options beyond the packet": (MALFORMED, lambda f: tcp(f).but(tcp={"header_words": 6})),
    "TCP options beyond the packet, in padding": (
        MALFORMED, lambda f: bytes(tcp(f).but(tcp={"header_words": 15})) + bytes(60),
    ),
    "a UDP header that is cut off": (MALFORMED, lambda f: link(f.client, f.vip, protocol=UDP).raw(bytes(7))),
    "a UDP length of less than its header": (MALFORMED, lambda f: udp(f).but(udp={"length": 7})),
    "a UDP length of 0": (MALFORMED, lambda f: udp(f).but(udp={"length": 0})),
    "a UDP length beyond the packet": (MALFORMED, lambda f: udp(f).but(udp={"length": 17})),
    "another protocol": (NOT_UNDERSTOOD, lambda f: link(f.client, f.vip, protocol=132).raw(bytes(20))),
    "ESP": (NOT_UNDERSTOOD, lambda f: link(f.client, f.vip, protocol=ESP).raw(bytes(20))),
    "AH": (NOT_UNDERSTOOD, lambda f: link(f.client, f.vip, protocol=AUTHENTICATION).raw(bytes(24))),
    "IP in IP": (NOT_UNDERSTOOD, lambda f: link(f.client, f.vip, protocol=4).raw(bytes(tcp(V4))[14:])),
    "the other family's ICMP": (
        NOT_UNDERSTOOD,
        lambda f: link(f.client, f.vip, protocol=ICMP if f.version == 6 else ICMPV6).raw(bytes(20)),
    ),
    "a ping": (NOT_UNDERSTOOD, lambda f: link(f.client, f.vip).icmp(8 if f.version == 4 else 128, 0, 7)),
}  # fmt: skip
COUNTED_V4: dict[str, tuple[Reason, Make]] = {
    "a header of four words": (MALFORMED, lambda f: tcp(f).but(ip={"header_words": 4})),
    "a header of no words": (MALFORMED, lambda f: tcp(f).but(ip={"header_words": 0})),
    "a header that is longer than the packet": (
        MALFORMED, lambda f: link(f.client, f.vip, header_words=15, protocol=TCP).raw(bytes(20)),
    ),
    "a header that is longer than the frame": (
        MALFORMED, lambda f: link(f.client, f.vip, header_words=15, length=60, protocol=TCP).raw(bytes(20)),
    ),
    "a length of less than the header": (MALFORMED, lambda f: tcp(f).but(ip={"length": 19})),
    "options that leave no room for TCP": (
        MALFORMED, lambda f: tcp(f).but(ip={"header_words": 6}),
    ),
    "a first fragment": (FRAGMENTED, lambda f: tcp(f).but(ip={"fragment": MF})),
    "a middle fragment": (FRAGMENTED, lambda f: tcp(f).but(ip={"fragment": MF | 10})),
    "a last fragment": (FRAGMENTED, lambda f: tcp(f).but(ip={"fragment": 1})),
    "a last fragment far behind": (FRAGMENTED, lambda f: tcp(f).but(ip={"fragment": 0x1FFF})),
    "a fragment with DF": (FRAGMENTED, lambda f: tcp(f).but(ip={"fragment": 0x4000 | MF})),
}  # fmt: skip
COUNTED_V6: dict[str, tuple[Reason, Make]] = {
    "a fragment header": (FRAGMENTED, lambda f: extended(tcp(f), Extension(FRAGMENT, b"\0\0\0\0\0\1"))),
    "a fragment header behind another": (
        FRAGMENTED, lambda f: extended(tcp(f), Extension(HOP_BY_HOP), Extension(FRAGMENT, b"\0\1\0\0\0\1")),
    ),
    "a fragment header behind four others": (
        FRAGMENTED, lambda f: extended(tcp(f), *[Extension(DESTINATION)] * 4, Extension(FRAGMENT, bytes(6))),
    ),
    "an extension header that is cut off": (
        MALFORMED, lambda f: link(f.client, f.vip, protocol=HOP_BY_HOP, length=8).raw(bytes(2)),
    ),
    "an extension header, and no byte of it": (
        MALFORMED, lambda f: link(f.client, f.vip, protocol=HOP_BY_HOP).raw(b""),
    ),
    "an extension header that is longer than the packet": (
        MALFORMED, lambda f: extended(tcp(f), Extension(HOP_BY_HOP, length=10)),
    ),
    "an extension header that ends behind the packet, in padding": (
        MALFORMED,
        lambda f: bytes(link(f.client, f.vip, protocol=DESTINATION).raw(b"\6\1" + bytes(6))) + bytes(60),
    ),
    "TCP behind an extension header, in padding": (
        MALFORMED,
        lambda f: bytes(extended(tcp(f), Extension(DESTINATION, LONGER)).but(ip={"length": 8})),
    ),
    "UDP behind an extension header, in padding": (
        MALFORMED,
        lambda f: bytes(extended(udp(f), Extension(DESTINATION, LONGER)).but(ip={"length": 8})),
    ),
    "an extension header of the greatest length": (
        NOT_UNDERSTOOD, lambda f: extended(tcp(f), Extension(HOP_BY_HOP, length=255)),
    ),
    "extension headers that end where no program can look": (
        NOT_UNDERSTOOD, lambda f: extended(tcp(f), *[Extension(DESTINATION, bytes(254))] * 2),
    ),
    "a routing header with a segment left": (
        NOT_UNDERSTOOD, lambda f: extended(tcp(f), Extension(ROUTING, b"\4\1" + bytes(4))),
    ),
    "five extension headers": (NOT_UNDERSTOOD, lambda f: extended(tcp(f), *[Extension(DESTINATION)] * 5)),
    "nothing behind the headers": (
        NOT_UNDERSTOOD, lambda f: link(f.client, f.vip, protocol=NOTHING).raw(bytes(8)),
    ),
    "no TCP behind an extension header": (
        MALFORMED, lambda f: link(f.client, f.vip, protocol=DESTINATION).raw(bytes([TCP, 0]) + bytes(6)),
    ),
}  # fmt: skip
MAPPED = "::ffff:203.0.113.80"
COUNTED_V6 |= {
    "from an IPv4 address that is mapped": (NOT_UNDERSTOOD, lambda f: tcp(f).but(ip={"source": MAPPED})),
    "to an IPv4 address that is mapped": (NOT_UNDERSTOOD, lambda f: tcp(f).but(ip={"destination": MAPPED})),
}
CASES = [
    pytest.param(family, reason, make, id=f"v{family.version}, {name}")
    for family, more in ((V4, COUNTED_V4), (V6, COUNTED_V6))
    for name, (reason, make) in (COUNTED | more).items()
]


@pytest.mark.parametrize("make", NOT_OURS.values(), ids=NOT_OURS)
def test_what_is_not_ours_is_not_touched(world: World, family: Family, make: Make) -> None:
    stage(world, family)
    frame = bytes(make(family))
    assert world.send(frame) == (PASS, frame)
    assert world.reasons(0) == world.reasons() == {}
    assert world.flows(family.version) == []


@pytest.mark.parametrize("tag", [0, 5], ids=["bare", "tagged"])
@pytest.mark.parametrize(("family", "reason", "make"), CASES)
def test_what_is_not_understood_is_left_as_it_came(
    world: World, family: Family, reason: Reason, make: Make, tag: int
) -> None:
    stage(world, family)
    made = make(family)
    frame = bytes(made)
    if tag:
        frame = frame[:12] + b"\x81\0\0\5" + frame[12:]
    assert world.send(frame) == (PASS, frame)
    assert world.reasons(0) == {reason: 1}
    assert world.reasons() == {}
    assert world.flows(family.version) == []


@pytest.mark.parametrize("size", range(14, 14 + 4 + 40 + 8 + 20 + 12))
@pytest.mark.parametrize("make", [tcp, udp, lambda f: extended(tcp(V6), Extension(HOP_BY_HOP))])
def test_a_frame_that_ends_anywhere(
    world: World, family: Family, make: Callable[..., Packet], size: int
) -> None:
    """Not one byte is changed, and nothing is sent on, unless all of the packet is there."""
    stage(world, family)
    whole = tagged(make(family).add(Raw(b"123")), 3)
    frame = cut(whole, size)
    outcome = world.send(frame)
    if size < len(bytes(whole)):
        assert outcome == (PASS, frame)
        assert world.flows(4) == world.flows(6) == []
        assert list(world.reasons(0)) in ([MALFORMED], [])


def test_a_vip_s_address_in_the_other_family_s_clothes(world: World) -> None:
    """Maps know IPv4 addresses as mapped ones: a packet that has one of these is for nobody."""
    stage(world, V4)
    world.namespace.ip(f"route add default via {V6.router}")
    try:
        for packet in (tcp(V6), udp(V6)):
            frame = bytes(packet.but(ip={"destination": MAPPED}))
            assert world.send(frame) == (PASS, frame)
        assert world.reasons() == {}
        assert world.reasons(0) == {NOT_UNDERSTOOD: 2}
    finally:
        world.namespace.ip(f"route del default via {V6.router}")


def test_a_port_that_is_not_ours(world: World, family: Family) -> None:
    stage(world, family)
    packet = bytes(tcp(family))
    assert world.send(packet, device=world.namespace.index("out")) == (PASS, packet)
    assert world.send(packet, device=0) == (PASS, packet)
    # The MAC of another port of ours is not this one's.
    assert world.send(packet, device=world.back) == (PASS, packet)
    assert world.reasons(0) == world.reasons() == {}


def test_without_settings_or_a_table_nothing_is_sent(world: World, family: Family) -> None:
    """As the maps are before anybody has filled them."""
    packet = bytes(tcp(family))
    assert world.send(packet) == (PASS, packet)
    world.vip(family.vip, forwarding=NAT)
    assert world.send(packet) == (PASS, packet)
    assert world.reasons() == {Reason.PASS_NO_BACKEND: 1}
    world.vip(family.vip, 1, number=200)
    assert world.send(packet) == (PASS, packet)


def test_a_vlan_tag_of_zero_is_a_tag(world: World, family: Family) -> None:
    """Priority tagging (802.1Q): the frame is in no VLAN, and has a header of 18 bytes."""
    stage(world, family)
    packet = tagged(tcp(family), 0)
    assert isinstance(packet.layers[1], Vlan)
    assert world.send(packet).verdict != PASS
