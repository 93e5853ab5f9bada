"""ICMP errors follow the flow that they are about; and what does not fit is told of by one of ours."""

import struct

import pytest

from expressgateway.l4.xdp.layout import Forwarding, Reason
from tests.l4.xdp.packets import ACK, DESTINATION, TCP, UDP, Extension, Packet, faults
from tests.l4.xdp.scene import (
    CLIENT_PORT,
    DSR,
    ENCAPSULATED,
    NAT,
    aged,
    back_link,
    begin,
    encapsulated,
    extended,
    link,
    relinked,
    stage,
    tagged,
    tcp,
    tcp_answer,
    to_backend,
    to_client,
    udp,
    udp_answer,
)
from tests.l4.xdp.world import (
    BACK,
    BACKEND_PORT,
    BACKENDS,
    CLIENT,
    DROP,
    GATEWAY,
    NARROW_MTU,
    PASS,
    PORT,
    REDIRECT,
    TX,
    V4,
    V6,
    VIP_PORT,
    Family,
    World,
)

NOT_UNDERSTOOD = Reason.PASS_NOT_UNDERSTOOD

# type, code and the word behind them, by family
ERRORS = {
    4: {
        "a port unreachable": (3, 3, 0),
        "fragmentation needed": (3, 4, 1400),
        "time exceeded": (11, 0, 0),
        "a parameter problem": (12, 0, 0x14000000),
    },
    6: {
        "a port unreachable": (1, 4, 0),
        "packet too big": (2, 0, 1400),
        "time exceeded": (3, 0, 0),
        "a parameter problem": (4, 1, 6),
    },
}
KINDS = range(4)
QUERIES = {4: (0, 5, 8, 13, 17), 6: (128, 129, 133, 135, 136, 100, 0, 5)}


def error(family: Family, kind: int) -> tuple[int, int, int]:
    return list(ERRORS[family.version].values())[kind]


def quote(packet: Packet, size: int | None = None) -> bytes:
    return packet.inner[:size]


def sent_to_backend(family: Family, protocol: int = TCP, data: bytes = b"") -> Packet:
    """What has reached the backend, and what errors of its side quote."""
    begun = tcp(family, data=data) if protocol == TCP else udp(family, data)
    return to_backend(begun, family)


def sent_to_client(family: Family, protocol: int = TCP, data: bytes = b"") -> Packet:
    answer = tcp_answer(family, data=data) if protocol == TCP else udp_answer(family, data)
    return to_client(answer, family)


def quoted_anew(packet: Packet, source: str, destination: str, ports: tuple[int, int]) -> Packet:
    """The quoted packet as the receiver of the error sent it; of TCP the checksum is nobody's to mend."""
    changed = packet.but(ip={"source": source, "destination": destination})
    layer = {"source": ports[0], "destination": ports[1]}
    if any(type(each).__name__ == "Tcp" for each in packet.layers):
        return changed.but(tcp=layer | {"check": int.from_bytes(tcp_check(packet), "big")})
    return changed.but(udp=layer)


def told_client(packet: Packet, family: Family) -> Packet:
    """What a backend's error becomes, without the quote."""
    return relinked(aged(packet), CLIENT, GATEWAY).but(
        ip={"source": family.vip, "destination": family.client}
    )


def tcp_check(packet: Packet) -> bytes:
    """Of a packet without data nor TCP options."""
    return packet.inner[-4:-2]


@pytest.mark.parametrize("tag", [0, 6], ids=["bare", "tagged"])
@pytest.mark.parametrize("whose", ["backend", "router"])
@pytest.mark.parametrize("protocol", [TCP, UDP], ids=["TCP", "UDP"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_backend_s_error_reaches_the_client(
    world: World, family: Family, kind: int, protocol: int, whose: str, tag: int
) -> None:
    """It quotes what the client has sent to the VIP; a backend's name is the VIP there."""
    stage(world, family)
    begin(world, family, protocol)
    offending = sent_to_backend(family, protocol)
    says = family.backend(1) if whose == "backend" else family.router
    packet = Packet().ether(BACK, BACKENDS[1]).ip(says, family.source, ttl=50).icmp(*error(family, kind))
    packet = tagged(packet, tag) if tag else packet
    expected = relinked(aged(packet), CLIENT, GATEWAY).but(
        ip={"source": family.vip if whose == "backend" else says, "destination": family.client}
    )
    original = quoted_anew(offending, family.client, family.vip, (CLIENT_PORT, VIP_PORT))
    outcome = world.answer(packet.raw(quote(offending)))
    assert (outcome.verdict, outcome.frame.hex()) == (REDIRECT, bytes(expected.raw(quote(original))).hex())
    assert faults(outcome.frame) == []
    assert (world.counts().icmp_followed, world.counts().out_packets) == (1, 0)
    assert world.reasons() == world.reasons(0) == {}


@pytest.mark.parametrize("whose", ["client", "router"])
@pytest.mark.parametrize("protocol", [TCP, UDP], ids=["TCP", "UDP"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_from_the_client_s_side_reaches_the_backend(
    world: World, family: Family, kind: int, protocol: int, whose: str
) -> None:
    stage(world, family)
    begin(world, family, protocol)
    offending = sent_to_client(family, protocol)
    says = family.client if whose == "client" else family.nowhere
    packet = link(says, family.vip).icmp(*error(family, kind))
    expected = relinked(aged(packet), BACKENDS[1], BACK).but(
        ip={"source": family.source if whose == "client" else says, "destination": family.backend(1)}
    )
    original = quoted_anew(offending, family.backend(1), family.source, (BACKEND_PORT, PORT))
    outcome = world.send(packet.raw(quote(offending)))
    assert (outcome.verdict, outcome.frame.hex()) == (REDIRECT, bytes(expected.raw(quote(original))).hex())
    assert faults(outcome.frame) == []
    assert world.counts().icmp_followed == 1


@pytest.mark.parametrize("forwarding", [DSR, ENCAPSULATED])
@pytest.mark.parametrize("kind", KINDS)
def test_in_dsr_it_goes_to_the_backend_as_it_is(
    world: World, family: Family, kind: int, forwarding: Forwarding
) -> None:
    """The backend has the VIP, and sent the packet that is quoted."""
    stage(world, family, forwarding)
    begin(world, family)
    offending = Packet().ip(family.vip, family.client, ttl=9).tcp(VIP_PORT, CLIENT_PORT, ACK)
    packet = link(family.nowhere, family.vip).icmp(*error(family, kind)).raw(quote(offending))
    expected = relinked(aged(packet), BACKENDS[1], BACK)
    if forwarding is ENCAPSULATED:
        expected = encapsulated(expected, family.source, family.backend(1))
    outcome = world.send(packet)
    assert (outcome.verdict, outcome.frame.hex()) == (REDIRECT, bytes(expected).hex())
    assert faults(outcome.frame) == []
    assert world.counts().icmp_followed == 1


@pytest.mark.parametrize("size", [8, 9, 12, 19])
def test_eight_bytes_behind_the_quoted_header_are_enough(world: World, family: Family, size: int) -> None:
    """All that a router has to quote (RFC 792)."""
    stage(world, family)
    begin(world, family)
    offending = sent_to_backend(family)
    header = 20 if family.version == 4 else 40
    original = quoted_anew(offending, family.client, family.vip, (CLIENT_PORT, VIP_PORT))
    packet = back_link(family).icmp(*error(family, 0))
    expected = relinked(aged(packet), CLIENT, GATEWAY).but(
        ip={"source": family.vip, "destination": family.client}
    )
    outcome = world.answer(packet.raw(quote(offending, header + size)))
    assert outcome == (REDIRECT, bytes(expected.raw(quote(original, header + size))))
    assert faults(outcome.frame) == []


def test_a_quoted_udp_packet_without_a_checksum_stays_without(world: World, family: Family) -> None:
    stage(world, family)
    begin(world, family, UDP)
    offending = sent_to_backend(family, UDP).but(udp={"check": 0})
    original = offending.but(
        ip={"source": family.client, "destination": family.vip},
        udp={"source": CLIENT_PORT, "destination": VIP_PORT},
    )
    packet = back_link(family).icmp(*error(family, 0))
    expected = relinked(aged(packet), CLIENT, GATEWAY).but(
        ip={"source": family.vip, "destination": family.client}
    )
    assert world.answer(packet.raw(quote(offending))) == (REDIRECT, bytes(expected.raw(quote(original))))


def test_a_quoted_header_may_have_options(world: World) -> None:
    family = V4

    stage(world, family)
    begin(world, family, UDP)
    options = {"options": b"\x94\x04\0\0"}
    offending = sent_to_backend(family, UDP).but(ip=options)
    original = quoted_anew(offending, family.client, family.vip, (CLIENT_PORT, VIP_PORT))
    packet = back_link(family).but(ip=options).icmp(*error(family, 0))
    expected = relinked(aged(packet), CLIENT, GATEWAY).but(
        ip={"source": family.vip, "destination": family.client}
    )
    assert world.answer(packet.raw(quote(offending))) == (REDIRECT, bytes(expected.raw(quote(original))))


class TestOthers:
    """What is left to the kernel."""

    def passed(self, world: World, packet: Packet | bytes, *, back: bool = True) -> None:
        frame = bytes(packet)
        assert world.send(frame, device=world.back if back else None) == (PASS, frame)
        assert world.reasons(0) == {NOT_UNDERSTOOD: 1}
        assert world.counts().icmp_followed == 0

    @pytest.fixture(autouse=True)
    def flow(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family)

    @pytest.mark.parametrize("at", range(8))
    def test_queries(self, world: World, family: Family, at: int) -> None:
        types = QUERIES[family.version]
        packet = back_link(family).icmp(types[at % len(types)]).raw(quote(sent_to_backend(family)))
        self.passed(world, packet)

    def test_errors_about_other_packets(self, world: World, family: Family) -> None:
        other = sent_to_backend(family).but(tcp={"source": PORT + 1})
        self.passed(world, back_link(family).icmp(*error(family, 0)).raw(quote(other)))

    def test_errors_about_packets_of_the_other_direction(self, world: World, family: Family) -> None:
        """A backend cannot complain of what it has sent itself."""
        self.passed(world, back_link(family).icmp(*error(family, 0)).raw(quote(tcp_answer(family))))

    def test_errors_that_are_sent_to_somebody_else(self, world: World, family: Family) -> None:
        """Whose packet it is that they quote, he would have been sent them."""
        packet = back_link(family).but(ip={"destination": family.backend(2)})
        self.passed(world, packet.icmp(*error(family, 0)).raw(quote(sent_to_backend(family))))

    def test_errors_about_other_protocols(self, world: World, family: Family) -> None:
        other = sent_to_backend(family).but(ip={"protocol": 132})
        self.passed(world, back_link(family).icmp(*error(family, 0)).raw(quote(other)))

    def test_the_other_version_inside(self, world: World, family: Family) -> None:
        other = sent_to_backend(family).but(ip={"version": 10 - family.version})
        self.passed(world, back_link(family).icmp(*error(family, 0)).raw(quote(other)))

    def test_a_quoted_fragment(self, world: World, family: Family) -> None:
        """Of a later one there are no ports."""
        if family.version == 4:
            other = sent_to_backend(family).but(ip={"fragment": 1})
        else:
            other = extended(sent_to_backend(family), Extension(44, bytes(6)))
        self.passed(world, back_link(family).icmp(*error(family, 0)).raw(quote(other)))

    @pytest.mark.parametrize("missing", range(1, 8))
    def test_a_quote_without_ports(self, world: World, family: Family, missing: int) -> None:
        header = 20 if family.version == 4 else 40
        self.passed(
            world,
            back_link(family)
            .icmp(*error(family, 0))
            .raw(quote(sent_to_backend(family), header + 8 - missing)),
        )

    def test_a_quote_that_ends_behind_the_packet(self, world: World, family: Family) -> None:
        """What pads a frame is no part of what was said."""
        header = 20 if family.version == 4 else 40
        quoted = quote(sent_to_backend(family))
        packet = back_link(family).icmp(*error(family, 0)).raw(quoted[: header + 4])
        self.passed(world, bytes(packet) + quoted[header + 4 :])

    @pytest.mark.parametrize("size", range(8))
    def test_an_icmp_header_that_is_cut_off(self, world: World, family: Family, size: int) -> None:
        whole = back_link(family).icmp(*error(family, 0)).raw(b"")
        header = 20 if family.version == 4 else 40
        length = size + (20 if family.version == 4 else 0)
        frame = bytes(whole.but(ip={"length": length}))[: 14 + header + size]
        outcome = world.answer(frame)
        assert outcome == (PASS, frame)

    def test_no_flow_of_theirs_is_noted(self, world: World, family: Family) -> None:
        before = [bytes(flow) for _, flow in world.flows(family.version)]
        world.answer(back_link(family).icmp(*error(family, 0)).raw(quote(sent_to_backend(family))))
        assert [bytes(flow) for _, flow in world.flows(family.version)] == before


def test_a_quote_far_behind_is_not_looked_for_elsewhere(world: World) -> None:
    """Behind extension headers it may begin where the program does not look: then it is not understood."""
    family = V6

    stage(world, family)
    begin(world, family)
    for length in range(0, 440, 8):
        packet = back_link(family).icmp(*error(family, 0)).raw(quote(sent_to_backend(family)))
        body = b"\1" + bytes([max(length + 8 - 4, 0) % 256]) + bytes(length + 8 - 4)
        packet = extended(packet, Extension(DESTINATION, body))
        frame = bytes(packet)
        outcome = world.answer(frame)
        if outcome.verdict == PASS:
            assert outcome.frame == frame
        else:
            assert faults(outcome.frame) == [], length
            assert outcome.frame[-60:][8:24] == bytes.fromhex("20010db8000100000000000000000010")


def test_ports_are_not_read_of_the_ethernet_header(world: World) -> None:
    """512 bytes before those that are quoted: where an offset of nine bits would have them."""
    family = V6
    stage(world, family)
    begin(world, family)
    quoted = Packet().ip(family.vip, family.client).tcp(1, 2, ACK).inner
    packet = link(family.client, family.vip).icmp(*error(family, 0)).raw(quoted)
    packet = extended(packet, Extension(DESTINATION, bytes(414)))
    frame = bytes(packet.but(ether={"source": struct.pack("!HHH", VIP_PORT, CLIENT_PORT, 0)}))
    assert frame.index(b"\0\1\0\2", 500) == 6 + 512
    assert world.send(frame) == (PASS, frame)
    assert world.reasons(0) == {NOT_UNDERSTOOD: 1}


class TestUnhappyWays:
    def send(self, world: World, family: Family, **ip: object) -> int:
        packet = back_link(family).but(ip=ip).icmp(*error(family, 0)).raw(quote(sent_to_backend(family)))
        return world.answer(packet).verdict

    def test_too_old(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family)
        assert self.send(world, family, ttl=1) == DROP
        assert world.reasons() == {Reason.DROP_TTL: 1}

    def test_to_a_backend_that_has_gone(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family)
        world.backend(1, family.backend(1), family.source, generation=2)
        packet = link(family.client, family.vip).icmp(*error(family, 0)).raw(quote(sent_to_client(family)))
        assert world.send(packet) == (PASS, bytes(packet))
        assert world.reasons() == {Reason.PASS_NO_FLOW: 1}

    def test_too_long_for_the_next_link(self, world: World, family: Family) -> None:
        """An error about an error is never sent (RFC 1122 3.2.2)."""
        world.backend(1, family.narrow, family.source)
        world.vip(family.vip, 1)
        begin(world, family)
        offending = Packet().ip(family.vip, family.client).tcp(VIP_PORT, CLIENT_PORT, ACK).raw(bytes(1400))
        packet = link(family.client, family.vip).icmp(*error(family, 0)).raw(quote(offending))
        assert world.send(packet).verdict == DROP
        assert world.reasons() == {Reason.DROP_TOO_BIG: 1}


class TestTooBig:
    """A packet that does not fit, and may not be cut: its sender is told how long it may be."""

    def told(self, world: World, family: Family, packet: Packet, mtu: int) -> None:
        outcome = world.send(packet)
        back = Packet().ether(CLIENT, GATEWAY)
        if packet.layers[1].kind == 0x8100:
            back = back.add(packet.layers[1])
        if family.version == 4:
            expected = back.ip(family.vip, family.client, ttl=64, identification=0, fragment=0).icmp(
                3, 4, mtu
            )
        else:
            expected = back.ip(family.vip, family.client, ttl=64).icmp(2, 0, mtu)
        assert (outcome.verdict, outcome.frame.hex()) == (TX, bytes(expected.raw(packet.inner[:128])).hex())
        assert faults(outcome.frame) == []

    @pytest.mark.parametrize("tag", [0, 6])
    def test_a_narrow_path(self, world: World, family: Family, tag: int) -> None:
        world.backend(1, family.narrow, family.source)
        world.vip(family.vip, 1)
        begin(world, family)
        header = 40 if family.version == 4 else 60
        fits = tcp(family, ACK, data=bytes(NARROW_MTU - header))
        assert world.send(fits).verdict == REDIRECT
        packet = tcp(family, ACK, data=bytes(NARROW_MTU - header + 1))
        packet = tagged(packet, tag) if tag else packet
        self.told(world, family, packet, NARROW_MTU)
        assert world.counts().icmp_too_big == 1
        assert world.counts().in_packets == 2
        assert world.reasons() == {}

    @pytest.mark.parametrize("forwarding", [NAT, ENCAPSULATED])
    def test_the_outer_header_needs_its_room(
        self, world: World, family: Family, forwarding: Forwarding
    ) -> None:
        stage(world, family, forwarding)
        begin(world, family)
        outer = 0 if forwarding is NAT else 20 if family.version == 4 else 40
        header = 40 if family.version == 4 else 60
        fits = tcp(family, ACK, data=bytes(1500 - outer - header))
        assert world.send(fits) == (REDIRECT, bytes(to_backend(fits, family, forwarding)))
        self.told(world, family, tcp(family, ACK, data=bytes(1501 - outer - header)), 1500 - outer)

    def test_of_a_new_flow(self, world: World, family: Family) -> None:
        """None is made."""
        stage(world, family)
        self.told(world, family, udp(family, bytes(1500)), 1500)
        assert world.flows(family.version) == []

    def test_what_may_be_cut_is_dropped(self, world: World) -> None:
        family = V4

        stage(world, family)
        assert world.send(udp(family, bytes(1500)).but(ip={"fragment": 0})).verdict == DROP
        assert world.reasons() == {Reason.DROP_TOO_BIG: 1}

    def test_an_answer_s_sender_is_told_as_well(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family)
        packet = tcp_answer(family, ACK, data=bytes(1500))
        outcome = world.answer(packet)
        assert outcome.verdict == TX
        back = Packet().ether(BACKENDS[1], BACK)
        if family.version == 4:
            expected = back.ip(family.source, family.backend(1), identification=0, fragment=0).icmp(
                3, 4, 1500
            )
        else:
            expected = back.ip(family.source, family.backend(1)).icmp(2, 0, 1500)
        assert outcome.frame == bytes(expected.raw(packet.inner[:128]))
