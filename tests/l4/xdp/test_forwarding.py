"""What becomes of packets that are sent on: every way of forwarding, both directions, every shape of them.

Expected frames are built anew, with lengths and checksums computed in full; so equality says that what the
program changed in them piecemeal is right.
"""

from collections.abc import Callable

import pytest

from expressgateway.l4.xdp.layout import Forwarding
from tests.l4.xdp.packets import (
    ACK,
    DESTINATION,
    ETH_QINQ,
    FIN,
    HOP_BY_HOP,
    PSH,
    ROUTING,
    SYN,
    TCP,
    UDP,
    Extension,
    Packet,
    Raw,
    faults,
)
from tests.l4.xdp.scene import (
    ENCAPSULATED,
    NAT,
    aged,
    begin,
    encapsulated,
    extended,
    relinked,
    stage,
    tagged,
    tcp,
    tcp_answer,
    to_backend,
    to_client,
    translated,
    udp,
    udp_answer,
)
from tests.l4.xdp.world import (
    BACK,
    BACKEND_PORT,
    BACKENDS,
    GATEWAY,
    PORT,
    REDIRECT,
    ROUTER,
    TX,
    V4,
    V6,
    Family,
    World,
)

TIMESTAMPS = bytes.fromhex("0101080a0000000100000002")
"""TCP options: two fillers and a timestamp."""
LONGER = b"\1\x0c" + bytes(12)
"""An extension header of 16 bytes, with a filler."""
DONE = b"\4\0" + bytes(4)
"""A routing header, which has no segment left."""

Shape = Callable[[Packet], Packet]

# Whatever a packet may have on it that is no business of ours: a description, and how to put it on.
SHAPES: dict[str, Shape] = {
    "plain": lambda packet: packet,
    "with data": lambda packet: packet.add(Raw(b"data")),
    "with data of an odd length": lambda packet: packet.add(Raw(b"odd data")).add(Raw(b"!")),
    "as long as the link allows": lambda packet: packet.add(Raw(bytes(range(256)) * 5)),
    "with a VLAN tag": lambda packet: tagged(packet, 42),
    "with a priority in its VLAN tag": lambda packet: tagged(packet, 0xE02A),
    "with a VLAN tag of a provider": lambda packet: tagged(packet, 42, ETH_QINQ),
    "with a traffic class": lambda packet: packet.but(ip={"tos": 0xBB}),
    "of a TTL of 2": lambda packet: packet.but(ip={"ttl": 2}),
    "of a TTL of 255": lambda packet: packet.but(ip={"ttl": 255}),
}
SHAPES_V4: dict[str, Shape] = {
    "that may be fragmented": lambda packet: packet.but(ip={"fragment": 0, "identification": 7}),
    "with the reserved bit": lambda packet: packet.but(ip={"fragment": 0xC000}),
    "with an IP option": lambda packet: packet.but(ip={"options": b"\x94\x04\0\0"}),
    "with all the IP options that fit": lambda packet: packet.but(ip={"options": b"\1" * 40}),
    "with IP options behind a VLAN tag": lambda packet: tagged(packet.but(ip={"options": b"\1" * 8}), 9),
}
SHAPES_V6: dict[str, Shape] = {
    "with a flow label": lambda packet: packet.but(ip={"flow_label": 0xABCDE}),
    "with hop-by-hop options": lambda packet: extended(packet, Extension(HOP_BY_HOP)),
    "with destination options": lambda packet: extended(packet, Extension(DESTINATION, LONGER)),
    "with a routing header that is done": lambda packet: extended(packet, Extension(ROUTING, DONE)),
    "with four extension headers": lambda packet: extended(
        packet, Extension(HOP_BY_HOP), Extension(DESTINATION), Extension(ROUTING, DONE),
        Extension(DESTINATION),
    ),
    "with extension headers behind a VLAN tag": lambda packet: tagged(
        extended(packet, Extension(HOP_BY_HOP, LONGER)), 9
    ),
    "with a long extension header": lambda packet: extended(
        packet, Extension(DESTINATION, (b"\1\xfd" + bytes(253)).ljust(382, b"\0"))
    ),
}  # fmt: skip
CASES = [
    pytest.param(family, shape, id=f"v{family.version}, {name}")
    for family, shapes in ((V4, SHAPES | SHAPES_V4), (V6, SHAPES | SHAPES_V6))
    for name, shape in shapes.items()
]
TRANSPORTS: dict[str, Callable[[Family], Packet]] = {
    "SYN": tcp,
    "SYN with options": lambda family: tcp(family).but(tcp={"options": TIMESTAMPS}),
    "UDP": udp,
    "UDP without data": lambda family: udp(family, b""),
    "UDP without a checksum": lambda family: udp(family).but(udp={"check": 0}),
}


def forward(world: World, packet: Packet, expected: Packet, verdict: int = REDIRECT) -> None:
    """It becomes exactly that, and what a receiver checks is right."""
    assert faults(bytes(packet)) == []
    outcome = world.send(packet)
    assert (outcome.verdict, outcome.frame.hex()) == (verdict, bytes(expected).hex()), world.reasons()
    assert faults(outcome.frame) == []


@pytest.mark.parametrize("forwarding", Forwarding)
@pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS)
@pytest.mark.parametrize(("family", "shape"), CASES)
def test_a_packet_to_a_vip_goes_to_its_backend(
    world: World, family: Family, shape: Shape, transport: Callable[[Family], Packet], forwarding: Forwarding
) -> None:
    stage(world, family, forwarding)
    packet = shape(transport(family))
    forward(world, packet, to_backend(packet, family, forwarding))
    counts, of_backend = world.counts(), world.backend_counts(1)
    assert (counts.in_packets, counts.in_bytes, counts.flows, counts.stateless) == (
        1,
        len(packet.inner),
        1,
        0,
    )
    assert (of_backend.in_packets, of_backend.in_bytes, of_backend.flows) == (1, len(packet.inner), 1)
    assert (counts.out_packets, counts.out_bytes) == (0, 0)
    assert world.reasons() == world.reasons(0) == {}


@pytest.mark.parametrize("protocol", [TCP, UDP], ids=["TCP", "UDP"])
@pytest.mark.parametrize(("family", "shape"), CASES)
def test_an_answer_goes_to_the_client(world: World, family: Family, shape: Shape, protocol: int) -> None:
    stage(world, family)
    begin(world, family, protocol)
    packet = shape(tcp_answer(family) if protocol == TCP else udp_answer(family))
    outcome = world.answer(packet)
    assert (outcome.verdict, outcome.frame.hex()) == (REDIRECT, bytes(to_client(packet, family)).hex())
    assert faults(outcome.frame) == []
    counts, of_backend = world.counts(), world.backend_counts(1)
    assert (counts.out_packets, counts.out_bytes) == (1, len(packet.inner))
    assert (of_backend.out_packets, of_backend.out_bytes) == (1, len(packet.inner))
    assert (counts.in_packets, counts.flows) == (1, 1)


@pytest.mark.parametrize("forwarding", Forwarding)
def test_a_conversation(world: World, family: Family, forwarding: Forwarding) -> None:
    """One flow is made, and every packet of it goes the same way."""
    stage(world, family, forwarding, backends=2)
    first = tcp(family)
    outcome = world.send(first)
    number = next(n for n in (1, 2) if outcome.frame[:6] == BACKENDS[n])
    assert outcome.frame == bytes(to_backend(first, family, forwarding, number=number))
    sent = 1
    for flags, data in ((ACK, b""), (ACK | PSH, b"request"), (ACK, b""), (ACK | FIN, b""), (ACK, b"")):
        packet = tcp(family, flags, data=data)
        forward(world, packet, to_backend(packet, family, forwarding, number=number))
        sent += 1
    counts = world.counts()
    assert (counts.in_packets, counts.flows, counts.stateless) == (sent, 1, 0)
    if forwarding is NAT:
        for flags, data in ((SYN | ACK, b""), (ACK | PSH, b"response"), (ACK | FIN, b"")):
            packet = tcp_answer(family, flags, number=number, data=data)
            assert world.answer(packet) == (REDIRECT, bytes(to_client(packet, family)))
        assert world.counts().out_packets == 3


def test_a_udp_checksum_that_comes_to_zero_is_sent_as_ones(world: World, family: Family) -> None:
    """0 says that there is none (RFC 768), and in IPv6 a receiver then drops it (RFC 8200 8.1)."""
    stage(world, family)
    missing = bytes(to_backend(udp(family, bytes(2)), family))[-4:-2]
    packet = udp(family, missing)
    expected = to_backend(packet, family)
    assert bytes(expected)[-4:-2] == b"\xff\xff"
    forward(world, packet, expected)


def test_a_udp_checksum_of_ones_is_a_checksum(world: World, family: Family) -> None:
    stage(world, family)
    missing = bytes(udp(family, bytes(2)))[-4:-2]
    packet = udp(family, missing)
    assert bytes(packet)[-4:-2] == b"\xff\xff"
    forward(world, packet, to_backend(packet, family))


class TestWays:
    """Where frames leave, and with what link header: what the route says, and the map of ports."""

    def test_by_a_router(self, world: World, family: Family) -> None:
        world.backend(1, family.far, family.source)
        world.vip(family.vip, 1)
        packet = tcp(family)
        sent = relinked(aged(packet), ROUTER, BACK)
        forward(world, packet, translated(sent, family.source, family.far, PORT, BACKEND_PORT))

    def test_encapsulated_by_a_router(self, world: World, family: Family) -> None:
        world.backend(1, family.far, family.source)
        world.vip(family.vip, 1, forwarding=ENCAPSULATED)
        packet = tcp(family)
        forward(world, packet, encapsulated(relinked(aged(packet), ROUTER, BACK), family.source, family.far))

    @pytest.mark.parametrize("tag", [0, 5])
    def test_back_by_the_port_where_it_came_in(self, world: World, family: Family, tag: int) -> None:
        world.backend(1, family.one_armed, family.one_armed_source)
        world.vip(family.vip, 1)
        packet = tagged(tcp(family), tag) if tag else tcp(family)
        sent = relinked(aged(packet), BACKENDS[3], GATEWAY)
        expected = translated(sent, family.one_armed_source, family.one_armed, PORT, BACKEND_PORT)
        forward(world, packet, expected, TX)

    @pytest.mark.parametrize("forwarding", Forwarding)
    @pytest.mark.parametrize("tag", [0, 5])
    def test_with_a_vlan_tag(self, world: World, family: Family, tag: int, forwarding: Forwarding) -> None:
        """By a VLAN device: the device below it, and the tag."""
        world.backend(1, family.tagged, family.tagged_source)
        world.vip(family.vip, 1, forwarding=forwarding)
        packet = tagged(tcp(family), tag) if tag else tcp(family)
        sent = relinked(aged(packet), BACKENDS[7], BACK, vlan=7)
        if forwarding is NAT:
            sent = translated(sent, family.tagged_source, family.tagged, PORT, BACKEND_PORT)
        elif forwarding is ENCAPSULATED:
            sent = encapsulated(sent, family.tagged_source, family.tagged)
        forward(world, packet, sent)

    def test_padding_stays_behind_the_packet(self, world: World, family: Family) -> None:
        """Frames of less than 60 bytes are filled up on a wire."""
        stage(world, family)
        packet = tcp(family)
        outcome = world.send(bytes(packet).ljust(80, b"\xee"))
        expected = bytes(to_backend(packet, family))
        assert outcome == (REDIRECT, expected.ljust(80, b"\xee"))
        assert world.counts().in_bytes == len(packet.inner)

    def test_a_packet_that_may_be_fragmented_may_be_so_in_its_outer_header(self, world: World) -> None:
        stage(world, V4, ENCAPSULATED)
        packet = udp(V4).but(ip={"fragment": 0})
        forward(world, packet, to_backend(packet, V4, ENCAPSULATED))
        assert bytes(to_backend(packet, V4, ENCAPSULATED))[14 + 6 : 14 + 8] == b"\0\0"


def test_two_vips_on_one_address_are_told_apart_by_port_and_protocol(world: World, family: Family) -> None:
    for number in (1, 2, 3):
        world.backend(number, family.backend(number if number < 3 else 1), family.source)
    world.vip(family.vip, 1, number=1, protocols=(TCP,))
    world.vip(family.vip, 2, number=2, protocols=(UDP,))
    forward(world, tcp(family), to_backend(tcp(family), family, number=1))
    forward(world, udp(family), to_backend(udp(family), family, number=2))
    other = tcp(family).but(tcp={"destination": 81})
    assert world.send(other) == (2, bytes(other))
    assert (world.counts(1).in_packets, world.counts(2).in_packets) == (1, 1)


def test_ways_of_forwarding_side_by_side(world: World, family: Family) -> None:
    """Nothing of one packet's way is left for the next one's."""
    world.backend(1, family.backend(1), family.source)
    for number, forwarding in enumerate(Forwarding, 1):
        world.vip(family.vip, 1, number=number, port=80 + number, forwarding=forwarding)
    for number, forwarding in [*enumerate(Forwarding, 1), *reversed([*enumerate(Forwarding, 1)])]:
        packet = tcp(family, ACK if world.counts(number).flows else SYN).but(tcp={"destination": 80 + number})
        forward(world, packet, to_backend(packet, family, forwarding))
