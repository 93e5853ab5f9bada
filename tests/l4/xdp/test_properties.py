"""Whatever comes: nothing that is not ours is touched, and what is sent on is as right as it came.

Valid packets, changed anywhere. What may be sent on is told by `addressed`, which is other code than the
program's; a checksum that was right still is, and one that was wrong is not made right.
"""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from expressgateway.l4.xdp import layout
from expressgateway.l4.xdp.layout import FIRST_DROP, Forwarding, Reason
from tests.l4.xdp.packets import (
    ACK,
    DESTINATION,
    FIN,
    HOP_BY_HOP,
    ICMP,
    ICMPV6,
    RST,
    SYN,
    TCP,
    UDP,
    Addressed,
    Extension,
    Packet,
    addressed,
    faults,
)
from tests.l4.xdp.scene import (
    CLIENT_PORT,
    back_link,
    extended,
    link,
    tagged,
    tcp,
    tcp_answer,
    udp,
    udp_answer,
)
from tests.l4.xdp.world import BACK, DROP, GATEWAY, PASS, PORT, REDIRECT, TX, V4, V6, VIP_PORT, Family, World

LOW, HIGH = 20000, 29999
WAYS: Final = {VIP_PORT + number: forwarding for number, forwarding in enumerate(Forwarding)}
"""Each VIP's address has one port for each way of forwarding."""


def shapes(family: Family) -> list[Packet]:
    """Packets to the VIP, new and of a flow that is known, and errors about it."""
    known = Packet().ip(family.vip, family.client).tcp(VIP_PORT, CLIENT_PORT, ACK)
    about = link(family.client, family.vip).icmp(3 if family.version == 4 else 1, 4, 1400)
    found = [
        packet
        for port in WAYS
        for packet in (
            tcp(family, port=CLIENT_PORT + 1, data=b"data").but(tcp={"destination": port}),
            tcp(family, ACK, data=b"data").but(tcp={"destination": port}),
            tcp(family, FIN | ACK).but(tcp={"destination": port}),
            udp(family).but(udp={"destination": port}),
        )
    ]
    found += [tcp(family, RST), tagged(tcp(family, ACK), 5), tagged(udp(family), 0xE005)]
    found += [about.raw(known.inner), about.raw(known.inner[:48])]
    if family.version == 4:
        found += [tcp(family).but(ip={"options": b"\1" * 8}), udp(family).but(ip={"fragment": 0})]
        found += [udp(family, bytes(1480)), tcp(family, ACK, data=bytes(1480))]
    else:
        found += [extended(tcp(family), Extension(HOP_BY_HOP), Extension(DESTINATION))]
        found += [extended(udp(family), Extension(DESTINATION, b"\1\x0c" + bytes(12)))]
        found += [tcp(family, ACK, data=bytes(1480))]
    return found


def answers(family: Family) -> list[Packet]:
    """From the backend of the flow that is known, whose port of ours is put in by `Stage`."""
    quoted = Packet().ip(family.source, family.backend(1)).tcp(PORT, 8080, ACK)
    return [
        tcp_answer(family, data=b"data"),
        tcp_answer(family, FIN | ACK),
        udp_answer(family),
        back_link(family).icmp(3 if family.version == 4 else 1, 3).raw(quoted.inner),
    ]


FAMILIES = {family: (shapes(family), answers(family)) for family in (V4, V6)}
BASES = [bytes(packet) for shapes_, _ in FAMILIES.values() for packet in shapes_]
ANSWERS = [bytes(packet) for _, answers_ in FAMILIES.values() for packet in answers_]

Change = tuple[str, int, bytes]

CHANGES: st.SearchStrategy[list[Change]] = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(12, 140), st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("flip"), st.integers(0, 140 * 8), st.just(b"")),
        st.tuples(st.just("cut"), st.integers(14, 160), st.just(b"")),
        st.tuples(st.just("remove"), st.integers(12, 100), st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("insert"), st.integers(12, 100), st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("append"), st.just(0), st.binary(min_size=1, max_size=64)),
    ),
    max_size=4,
)


def changed(frame: bytes, changes: list[Change]) -> bytes:
    for what, at, data in changes:
        if what == "set":
            frame = (frame[:at] + data + frame[at + len(data) :])[: len(frame)]
        elif what == "flip" and at // 8 < len(frame):
            flipped = frame[at // 8] ^ 1 << at % 8
            frame = frame[: at // 8] + bytes([flipped]) + frame[at // 8 + 1 :]
        elif what == "cut":
            frame = frame[:at]
        elif what == "remove":
            frame = frame[:at] + frame[at + len(data) :]
        elif what == "insert":
            frame = frame[:at] + data + frame[at:]
        elif what == "append":
            frame += data
    return frame.ljust(14, b"\0")  # less is no frame


class Stage:
    """A world with one VIP in each family and way, and one flow that is known in each."""

    def __init__(self, world: World) -> None:
        self.world = world
        world.reset()
        world.set(first_port=PORT, last_port=PORT)
        for family in (V4, V6):
            number = 1 if family is V4 else 2
            world.backend(number, family.backend(1), family.source)
            for at, (port, forwarding) in enumerate(WAYS.items()):
                world.vip(
                    family.vip, number, number=1 + at + (0 if family is V4 else 3), port=port,
                    forwarding=forwarding,
                )  # fmt: skip
            world.send(tcp(family))
            world.send(udp(family))
            for port in list(WAYS)[1:]:
                world.send(tcp(family).but(tcp={"destination": port}))
        world.set(first_port=LOW, last_port=HIGH)
        self.before = self.counted()

    def counted(self) -> dict[Reason, int]:
        found: dict[Reason, int] = {}
        for number in range(7):
            for reason, count in self.world.reasons(number).items():
                found[reason] = found.get(reason, 0) + count
        return found

    def check(self, frame: bytes, *, back: bool = False) -> int:
        """Send it, and say what holds whatever it is."""
        world = self.world
        outcome = world.send(frame, device=world.back if back else world.front)
        now = self.counted()
        reasons = {reason: now[reason] - self.before.get(reason, 0) for reason in now}
        reasons = {reason: count for reason, count in reasons.items() if count}
        assert sum(reasons.values()) <= 1
        packet = addressed(frame) if frame[:6] == (BACK if back else GATEWAY) else None
        if outcome.verdict == PASS:
            assert outcome.frame == frame
            assert all(reason < FIRST_DROP for reason in reasons)
        elif outcome.verdict == DROP:
            assert packet is not None, "dropped, and not ours"
            assert self.is_ours(packet)
            assert all(reason >= FIRST_DROP for reason in reasons)
            assert reasons
        else:
            assert outcome.verdict in (TX, REDIRECT)
            assert reasons == {}
            assert packet is not None, "sent on, and not ours"
            assert self.is_ours(packet)
            self.check_sent(frame, packet, outcome.frame)
        if packet is not None:
            self.check_verdict(packet, outcome.verdict, reasons)
        return outcome.verdict

    def is_ours(self, packet: Addressed) -> bool:
        """To a VIP, or to a port that a flow has."""
        family = V4 if len(packet.source) == 4 else V6
        ours = {_packed(family.vip), _packed(family.source)}
        if packet.protocol in (ICMP, ICMPV6):
            return packet.destination in ours
        if packet.destination == _packed(family.source):
            return packet.ports[1] == PORT and packet.source == _packed(family.backend(1))
        return packet.destination == _packed(family.vip) and packet.ports[1] in WAYS

    def check_verdict(self, packet: Addressed, verdict: int, reasons: dict[Reason, int]) -> None:
        """What is well-formed, to a VIP and begins something is never left to the kernel."""
        family = V4 if len(packet.source) == 4 else V6
        if packet.destination != _packed(family.vip) or packet.ports[1] not in WAYS:
            return
        begins = packet.protocol == UDP or packet.tcp_flags & (SYN | ACK | RST | FIN) == SYN
        if begins or WAYS[packet.ports[1]] is not Forwarding.FORWARD_NAT:
            assert verdict != PASS, reasons
        if packet.ttl <= 1 and verdict != PASS:
            assert reasons == {Reason.DROP_TTL: 1}

    def check_sent(self, frame: bytes, packet: Addressed, sent: bytes) -> None:
        after = addressed(sent)
        assert after is not None or _is_encapsulated(sent)
        if after is not None and after.protocol in (ICMP, ICMPV6) and packet.protocol in (TCP, UDP):
            assert faults(sent) == []  # it is ours: the packet is too big
            assert packet.length > 1400
            return
        assert faults(sent) == faults(frame)
        if after is not None:
            assert after.ttl == packet.ttl - 1
            assert (after.protocol, after.tcp_flags, after.length) == (
                packet.protocol, packet.tcp_flags, packet.length,
            )  # fmt: skip


def _packed(address: str) -> bytes:
    raw = layout.address_bytes(address)
    return raw if ":" in address else raw[12:]


def _is_encapsulated(frame: bytes) -> bool:
    return frame[14 + 9] == 4 if frame[12:14] == b"\x08\0" else frame[14 + 6] == 41


@given(base=st.sampled_from(BASES), changes=CHANGES)
@example(base=BASES[0], changes=[("flip", 8 * 14 + 1, b"")])
def test_a_packet_of_a_client_changed_anywhere(made_world: World, base: bytes, changes: list[Change]) -> None:
    Stage(made_world).check(changed(base, changes))


@given(base=st.sampled_from(ANSWERS), changes=CHANGES)
def test_an_answer_changed_anywhere(made_world: World, base: bytes, changes: list[Change]) -> None:
    Stage(made_world).check(changed(base, changes), back=True)


@given(frame=st.binary(min_size=2, max_size=400), is_ours=st.booleans())
def test_any_bytes(made_world: World, frame: bytes, is_ours: bool) -> None:
    Stage(made_world).check((GATEWAY if is_ours else b"\2\0\0\0\0\7") + bytes(6) + frame.ljust(2, b"\0"))


@given(
    family=st.sampled_from([V4, V6]),
    protocol=st.sampled_from([TCP, UDP]),
    data=st.binary(max_size=300),
    port=st.integers(1, 65535),
    ttl=st.integers(2, 255),
    way=st.sampled_from(list(WAYS)),
    tos=st.integers(0, 255),
)
def test_checksums_of_what_is_sent_on(
    made_world: World, family: Family, protocol: int, data: bytes, port: int, ttl: int, way: int, tos: int
) -> None:
    """Of any packet, and of its answer."""
    stage = Stage(made_world)
    layer = {"destination": way}
    ip = {"ttl": ttl, "tos": tos}
    if protocol == TCP:
        packet = tcp(family, port=port, data=data).but(tcp=layer, ip=ip)
    else:
        packet = udp(family, data, port=port).but(udp=layer, ip=ip)
    assert faults(bytes(packet)) == []
    assert stage.check(bytes(packet)) == REDIRECT


@pytest.mark.parametrize("base", range(len(BASES)))
def test_each_bit_of_each_packet(made_world: World, base: int) -> None:
    """All of the headers, one bit at a time."""
    stage = Stage(made_world)
    frame = BASES[base]
    for bit in range(min(len(frame), 14 + 4 + 56 + 20) * 8):
        stage.check(changed(frame, [("flip", bit, b"")]))
        stage.before = stage.counted()
        if bit % 256 == 255:
            stage = Stage(made_world)


@pytest.mark.parametrize("base", range(len(BASES)))
def test_each_length_of_each_packet(made_world: World, base: int) -> None:
    stage = Stage(made_world)
    frame = BASES[base]
    for size in range(14, min(len(frame), 200)):
        verdict = stage.check(frame[:size])
        assert verdict == PASS
        stage.before = stage.counted()
