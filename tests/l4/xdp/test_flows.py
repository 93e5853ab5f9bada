"""Flows: who gets one, how long it keeps its backend, what ends it, and what the sweep removes."""

import struct
from typing import Any

import pytest

from expressgateway.l4.xdp import layout
from expressgateway.l4.xdp.layout import Direction, FlowFlag, Forwarding, Reason, VipFlag
from tests.l4.xdp.packets import ACK, FIN, PSH, RST, SYN, TCP, UDP, URG, Packet
from tests.l4.xdp.scene import (
    CLIENT_PORT,
    DSR,
    ENCAPSULATED,
    NAT,
    begin,
    link,
    stage,
    tcp,
    tcp_answer,
    to_backend,
    to_client,
    udp,
    udp_answer,
)
from tests.l4.xdp.world import BACKEND_PORT, BACKENDS, DROP, PASS, PORT, REDIRECT, V4, VIP_PORT, Family, World

F_OPENING, F_FIN, F_TWIN_FIN = FlowFlag.FLOW_OPENING, FlowFlag.FLOW_FIN, FlowFlag.FLOW_TWIN_FIN
F_RST = FlowFlag.FLOW_RST

PROTOCOLS = pytest.mark.parametrize("protocol", [TCP, UDP], ids=["TCP", "UDP"])
WAYS = pytest.mark.parametrize("forwarding", Forwarding)


def chosen(frame: bytes) -> int:
    """The backend on `back` that a frame goes to."""
    return next(number for number, at in BACKENDS.items() if frame[:6] == at)


def client(family: Family, number: int) -> str:
    """Some other client; its answers are nobody's affair."""
    return (
        f"198.51.{100 + number // 250}.{1 + number % 250}"
        if family.version == 4
        else f"2001:db8:1::{number:x}:1"
    )


def first(family: Family, protocol: int, **fields: Any) -> Packet:
    return tcp(family, **fields) if protocol == TCP else udp(family, **fields)


def later(family: Family, protocol: int, **fields: Any) -> Packet:
    return tcp(family, ACK, **fields) if protocol == TCP else udp(family, b"more", **fields)


class TestEntries:
    """What is written into the maps."""

    @PROTOCOLS
    def test_in_nat_there_are_two_that_lead_to_one_another(
        self, world: World, family: Family, protocol: int
    ) -> None:
        stage(world, family)
        begin(world, family, protocol)
        (to_key, to), (from_key, from_) = world.flows(family.version)
        assert (to.direction, from_.direction) == (Direction.TO_BACKEND, Direction.TO_CLIENT)
        assert (str(to_key.source), to_key.source_port) == (family.client, CLIENT_PORT)
        assert (str(to_key.destination), to_key.destination_port) == (family.vip, VIP_PORT)
        assert (str(to.to.source), to.to.source_port) == (family.source, PORT)
        assert (str(to.to.destination), to.to.destination_port) == (family.backend(1), BACKEND_PORT)
        assert to_key.protocol == from_key.protocol == protocol
        assert bytes(turned(to.to)) == bytes(from_key)
        assert bytes(turned(from_.to)) == bytes(to_key)
        for flow in (to, from_):
            assert (flow.vip, flow.backend, flow.generation, flow.forwarding) == (1, 1, 1, NAT)
            assert flow.flags == F_OPENING

    @pytest.mark.parametrize("forwarding", [DSR, ENCAPSULATED])
    def test_in_dsr_there_is_one(self, world: World, family: Family, forwarding: Forwarding) -> None:
        stage(world, family, forwarding)
        begin(world, family)
        ((key, flow),) = world.flows(family.version)
        assert (str(key.source), key.source_port, str(key.destination)) == (
            family.client,
            CLIENT_PORT,
            family.vip,
        )
        assert (flow.direction, flow.backend, flow.forwarding) == (Direction.TO_BACKEND, 1, forwarding)

    def test_families_have_their_own_maps(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family)
        assert world.flows(10 - family.version) == []

    def test_they_remember_when_they_were_last_seen(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family)
        (_, born), _ = world.flows(family.version)
        world.age(5)
        world.send(tcp(family, ACK))
        (_, to), (_, from_) = world.flows(family.version)
        assert 0 <= to.seen_ns - born.seen_ns < 5e9
        assert from_.seen_ns < born.seen_ns - 4e9


def turned(one: layout.Tuple) -> layout.Tuple:
    return layout.Tuple(
        source=one.destination, destination=one.source, source_port=one.destination_port,
        destination_port=one.source_port, protocol=one.protocol, backend=one.backend,
    )  # fmt: skip


class TestKeeping:
    """A flow stays with its backend as long as that lives, whatever the table says."""

    @WAYS
    @PROTOCOLS
    def test_through_another_table(
        self, world: World, family: Family, protocol: int, forwarding: Forwarding
    ) -> None:
        stage(world, family, forwarding)
        begin(world, family, protocol)
        world.backend(2, family.backend(2), family.source)
        world.swap(1, 2, size=509)
        world.vip(family.vip, 2, forwarding=forwarding)
        packet = later(family, protocol)
        assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family, forwarding, number=1)))
        packet = first(family, protocol, port=CLIENT_PORT + 1)
        assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family, forwarding, number=2)))
        assert (world.backend_counts(1).flows, world.backend_counts(2).flows) == (1, 1)

    @WAYS
    def test_when_the_vip_has_gone(self, world: World, family: Family, forwarding: Forwarding) -> None:
        """It drains."""
        stage(world, family, forwarding)
        begin(world, family)
        for key in list(world.maps["vips"].keys()):
            world.maps["vips"].delete(key)
        packet = tcp(family, ACK)
        assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family, forwarding)))
        other = tcp(family, port=CLIENT_PORT + 1)
        assert world.send(other) == (PASS, bytes(other))

    def test_when_the_vip_is_forwarded_in_another_way(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family)
        stage(world, family, DSR)
        packet = tcp(family, ACK)
        assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family, NAT)))
        packet = tcp(family, port=CLIENT_PORT + 1)
        assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family, DSR)))

    @pytest.mark.parametrize("flags", [SYN, SYN | ACK, ACK | PSH, URG, 0, SYN | URG, SYN | 64 | 128])
    @WAYS
    def test_whatever_flags_its_packets_have(
        self, world: World, family: Family, flags: int, forwarding: Forwarding
    ) -> None:
        stage(world, family, forwarding)
        begin(world, family)
        packet = tcp(family, flags)
        assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family, forwarding)))
        assert world.counts().flows == 1


class TestLosing:
    """A backend that is dead, or whose number is somebody else's, keeps no flow."""

    def lose(self, world: World, family: Family, how: str) -> None:
        generation, alive = (2, True) if how == "another one" else (1, False)
        world.backend(1, family.backend(1), family.source, generation=generation, alive=alive)
        world.backend(2, family.backend(2), family.source)
        world.table(1, 2)

    @pytest.mark.parametrize("how", ["dead", "another one"])
    @WAYS
    def test_tcp_in_its_middle_is_the_kernel_s(
        self, world: World, family: Family, forwarding: Forwarding, how: str
    ) -> None:
        """Which answers with a reset."""
        stage(world, family, forwarding)
        begin(world, family)
        self.lose(world, family, how)
        packet = tcp(family, ACK)
        assert world.send(packet) == (PASS, bytes(packet))
        assert world.reasons() == {Reason.PASS_NO_FLOW: 1}
        assert world.flows(family.version) == []

    @pytest.mark.parametrize("how", ["dead", "another one"])
    @WAYS
    @PROTOCOLS
    def test_what_begins_is_somebody_else_s(
        self, world: World, family: Family, protocol: int, forwarding: Forwarding, how: str
    ) -> None:
        stage(world, family, forwarding)
        begin(world, family, protocol)
        self.lose(world, family, how)
        packet = first(family, protocol)
        assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family, forwarding, number=2)))
        assert {flow.backend for _, flow in world.flows(family.version)} == {2}
        assert world.counts().flows == 2

    def test_where_nobody_else_is_there_the_kernel_has_it(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family, UDP)
        world.backend(1, family.backend(1), family.source, alive=False)
        packet = udp(family)
        assert world.send(packet) == (PASS, bytes(packet))
        assert world.reasons() == {Reason.PASS_NO_BACKEND: 1}
        assert world.flows(family.version) == []

    def test_its_answers_still_come_through(self, world: World, family: Family) -> None:
        """What it has said before it died, and its reset."""
        stage(world, family)
        begin(world, family)
        world.backend(1, family.backend(1), family.source, alive=False)
        packet = tcp_answer(family, RST)
        assert world.answer(packet) == (REDIRECT, bytes(to_client(packet, family)))


class TestWithoutFlow:
    @pytest.mark.parametrize("flags", [ACK, ACK | PSH, FIN | ACK, RST, SYN | ACK, SYN | RST, SYN | FIN, 0])
    def test_tcp_in_its_middle_is_the_kernel_s_in_nat(self, world: World, family: Family, flags: int) -> None:
        stage(world, family)
        packet = tcp(family, flags)
        assert world.send(packet) == (PASS, bytes(packet))
        assert world.reasons() == {Reason.PASS_NO_FLOW: 1}
        assert world.flows(family.version) == []

    @pytest.mark.parametrize("forwarding", [DSR, ENCAPSULATED])
    @pytest.mark.parametrize("flags", [ACK, ACK | PSH, FIN | ACK, RST])
    def test_and_by_the_table_alone_in_dsr(
        self, world: World, family: Family, flags: int, forwarding: Forwarding
    ) -> None:
        """Another gateway had it, or this one before it was started again: the table is the same."""
        stage(world, family, forwarding)
        packet = tcp(family, flags)
        assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family, forwarding)))
        assert (world.counts().stateless, world.counts().flows, world.counts().in_packets) == (1, 0, 1)
        assert world.flows(family.version) == []

    def test_an_empty_table(self, world: World, family: Family) -> None:
        world.vip(family.vip)
        for packet in (tcp(family), udp(family)):
            assert world.send(packet) == (PASS, bytes(packet))
        assert world.reasons() == {Reason.PASS_NO_BACKEND: 2}

    def test_zero_is_nobody(self, world: World, family: Family) -> None:
        """Whatever stands in its place."""
        world.backend(0, family.backend(1), family.source)
        world.vip(family.vip)
        packet = tcp(family)
        assert world.send(packet) == (PASS, bytes(packet))
        assert world.reasons() == {Reason.PASS_NO_BACKEND: 1}

    def test_a_table_that_names_what_is_no_backend(self, world: World, family: Family) -> None:
        for number in (9, layout.MAX_BACKENDS, 0xFFFFFFFF):
            world.table(1, number)
            world.vip(family.vip, number)
            packet = tcp(family)
            assert world.send(packet) == (PASS, bytes(packet))


class TestEnding:
    """TCP's flags, of each direction, as both entries note them."""

    def test_a_syn_is_not_answered_yet(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family)
        world.answer(tcp_answer(family, SYN | ACK))
        assert world.flags(family.version) == [F_OPENING, F_OPENING]
        world.send(tcp(family, ACK))
        world.answer(tcp_answer(family, ACK))
        assert world.flags(family.version) == [0, 0]

    def test_fin_in_both_directions(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family)
        world.send(tcp(family, ACK))
        world.answer(tcp_answer(family, ACK))
        world.send(tcp(family, FIN | ACK))
        assert world.flags(family.version) == [F_FIN, F_TWIN_FIN]
        world.answer(tcp_answer(family, ACK))
        assert world.flags(family.version) == [F_FIN, F_TWIN_FIN]
        world.answer(tcp_answer(family, FIN | ACK))
        assert world.flags(family.version) == [F_FIN | F_TWIN_FIN] * 2
        # What follows still goes the same way: the last ACK, and what was lost.
        for packet in (tcp(family, ACK), tcp(family, FIN | ACK)):
            assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family)))

    def test_a_reset_by_the_client(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family)
        packet = tcp(family, RST)
        assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family)))
        assert [flags & F_RST for flags in world.flags(family.version)] == [F_RST, F_RST]

    def test_a_reset_by_the_backend(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family)
        packet = tcp_answer(family, RST | ACK)
        assert world.answer(packet) == (REDIRECT, bytes(to_client(packet, family)))
        assert [flags & F_RST for flags in world.flags(family.version)] == [F_RST, F_RST]

    @pytest.mark.parametrize("forwarding", [DSR, ENCAPSULATED])
    @pytest.mark.parametrize("flags", [FIN | ACK, RST])
    def test_in_dsr_what_the_client_says_is_all_that_is_known(
        self, world: World, family: Family, forwarding: Forwarding, flags: int
    ) -> None:
        stage(world, family, forwarding)
        begin(world, family)
        world.send(tcp(family, flags))
        assert world.flags(family.version)[0] & ~F_OPENING in (F_FIN | F_TWIN_FIN, F_RST, F_RST | F_TWIN_FIN)

    @WAYS
    @pytest.mark.parametrize("by", ["FIN", "RST"])
    def test_a_new_connection_from_the_same_port_chooses_anew(
        self, world: World, family: Family, forwarding: Forwarding, by: str
    ) -> None:
        stage(world, family, forwarding)
        begin(world, family)
        world.send(tcp(family, FIN | ACK if by == "FIN" else RST))
        if forwarding is NAT and by == "FIN":
            world.answer(tcp_answer(family, FIN | ACK))
        world.backend(2, family.backend(2), family.source)
        world.table(1, 2)
        packet = tcp(family)
        assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family, forwarding, number=2)))
        assert {flow.backend for _, flow in world.flows(family.version)} == {2}
        assert set(world.flags(family.version)) == {F_OPENING}

    def test_half_an_end_is_none(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family)
        world.send(tcp(family, FIN | ACK))
        world.backend(2, family.backend(2), family.source)
        world.table(1, 2)
        packet = tcp(family)
        assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family, number=1)))


class TestPorts:
    """Of ours, towards backends: one flow has one, for each backend anew."""

    def test_when_all_are_taken(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family)
        packet = tcp(family, port=CLIENT_PORT + 1)
        assert world.send(packet) == (PASS, bytes(packet))
        assert world.reasons() == {Reason.PASS_NO_PORT: 1}
        assert world.counts().flows == 1
        assert len(world.flows(family.version)) == 2
        # The flow that has it goes on.
        assert world.send(tcp(family, ACK)).verdict == REDIRECT

    def test_one_is_free_again_when_its_flow_is_over(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family)
        world.send(tcp(family, RST))
        world.age(60)
        assert world.sweep().removed == 1
        packet = tcp(family, port=CLIENT_PORT + 1)
        assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family)))

    def test_two_protocols_have_it_each(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family, TCP)
        begin(world, family, UDP)
        assert world.counts().flows == 2

    def test_two_backends_have_it_each(self, world: World, family: Family) -> None:
        stage(world, family, backends=2)
        seen = {}
        for port in range(1000, 1064):
            outcome = world.send(tcp(family, port=port))
            if outcome.verdict == REDIRECT:
                seen[chosen(outcome.frame)] = port
        assert seen.keys() == {1, 2}
        assert len(world.flows(family.version)) == 4
        for number, port in seen.items():
            packet = tcp_answer(family, number=number)
            assert world.answer(packet) == (REDIRECT, bytes(to_client(packet, family, port=port)))

    def test_many_flows_have_many(self, world: World, family: Family) -> None:
        """Nobody's answers go to somebody else."""
        stage(world, family)
        world.set(first_port=20000, last_port=20999)
        given: dict[int, int] = {}
        for port in range(3000, 3400):
            outcome = world.send(tcp(family, port=port))
            ours = struct.unpack_from("!H", outcome.frame, 34 if family.version == 4 else 54)[0]
            assert outcome.verdict == REDIRECT
            assert 20000 <= ours <= 20999
            assert ours not in given
            given[ours] = port
        for ours, port in given.items():
            packet = tcp_answer(family).but(tcp={"destination": ours})
            assert world.answer(packet) == (REDIRECT, bytes(to_client(packet, family, port=port)))

    @pytest.mark.parametrize(("low", "high"), [(1, 2), (65534, 65535), (1024, 1024)])
    def test_they_are_within_their_bounds(self, world: World, family: Family, low: int, high: int) -> None:
        stage(world, family)
        world.set(first_port=low, last_port=high)
        ports = set()
        for port in range(high - low + 1):
            outcome = world.send(tcp(family, port=5000 + port))
            assert outcome.verdict == REDIRECT
            ports.add(struct.unpack_from("!H", outcome.frame, 34 if family.version == 4 else 54)[0])
        assert ports == set(range(low, high + 1))

    def test_all_of_them_can_be_given(self, world: World, family: Family) -> None:
        """65,535 of them: no overflow."""
        stage(world, family)
        world.set(first_port=1, last_port=65535)
        assert all(world.send(tcp(family, port=port)).verdict == REDIRECT for port in range(100))

    def test_a_backend_that_is_a_client_of_the_address_it_is_asked_from(
        self, world: World, family: Family
    ) -> None:
        """Its packet to the VIP looks like its answer. The flow is not made, and nothing is left of it."""
        world.backend(1, family.backend(1), family.source)
        world.vip(family.source, 1, port=PORT)
        packet = link(family.backend(1), family.source).tcp(BACKEND_PORT, PORT, SYN)
        assert world.send(packet).verdict == DROP
        assert world.reasons() == {Reason.DROP_RACE: 1}
        assert world.flows(family.version) == []
        assert world.counts().flows == 0


class TestDrawing:
    """By the table, from a hash of the client."""

    def draw(self, world: World, family: Family, clients: int, ports: int) -> dict[tuple[int, int], int]:
        drawn = {}
        for number in range(clients):
            for port in range(2000, 2000 + ports):
                packet = tcp(family, ACK, client=client(family, number), port=port)
                drawn[number, port] = chosen(world.send(packet).frame)
        return drawn

    def test_clients_are_spread(self, world: World, family: Family) -> None:
        stage(world, family, DSR, backends=2)
        drawn = list(self.draw(world, family, 50, 40).values())
        assert 0.45 < drawn.count(1) / len(drawn) < 0.55

    def test_the_same_packet_is_drawn_the_same_backend(self, world: World, family: Family) -> None:
        stage(world, family, DSR, backends=2)
        assert self.draw(world, family, 10, 10) == self.draw(world, family, 10, 10)

    def test_by_address_a_client_has_one_backend(self, world: World, family: Family) -> None:
        stage(world, family, DSR, backends=2)
        world.vip(family.vip, 1, 2, forwarding=DSR, flags=VipFlag.VIP_BY_ADDRESS)
        drawn = self.draw(world, family, 40, 5)
        by_client = [{drawn[number, port] for port in range(2000, 2005)} for number in range(40)]
        assert all(len(backends) == 1 for backends in by_client)
        assert {1, 2} == set.union(*by_client)

    def test_another_seed_spreads_otherwise(self, world: World, family: Family) -> None:
        stage(world, family, DSR, backends=2)
        before = self.draw(world, family, 20, 5)
        world.set(seed=world.settings.seed + 1)
        after = self.draw(world, family, 20, 5)
        assert 0.3 < sum(before[each] != after[each] for each in before) / len(before) < 0.7

    def test_every_entry_of_a_table_is_drawn(self, world: World, family: Family) -> None:
        stage(world, family, DSR, backends=2)
        world.swap(1, 1, 1, 1, 2, size=4)
        key = layout.VipKey(address=layout.address_of(family.vip), port=VIP_PORT, protocol=TCP)
        value = layout.Vip(number=1, table_size=4, forwarding=DSR)
        world.maps["vips"].set(bytes(key), bytes(value))
        drawn = list(self.draw(world, family, 50, 20).values())
        assert 0.20 < drawn.count(2) / len(drawn) < 0.30


class TestOpening:
    """A flow begins in a table of its own, and leaves it with the next packet of its client."""

    @PROTOCOLS
    @WAYS
    def test_a_client_that_goes_on_moves_its_flow(
        self, world: World, family: Family, forwarding: Forwarding, protocol: int
    ) -> None:
        stage(world, family, forwarding)
        entries = 2 if forwarding is NAT else 1
        begin(world, family, protocol)
        assert world.sizes(family.version) == (0, entries)
        swept = world.sweep()
        assert (swept.flows4 + swept.flows6, swept.opening) == (1, 1)
        before = [bytes(flow.to) for _, flow in world.flows(family.version)]
        world.send(later(family, protocol))
        assert world.sizes(family.version) == (entries, 0)
        assert [bytes(flow.to) for _, flow in world.flows(family.version)] == before
        assert [flags & F_OPENING for flags in world.flags(family.version)] == [0] * entries
        assert world.sweep().opening == 0

    def test_two_cpus_may_move_it_at_once(self, world: World, family: Family) -> None:
        """One has the other's entry already: what is left is moved, and nobody loses anything."""
        stage(world, family)
        begin(world, family)
        _, (key, answers) = world.flows(family.version)
        world.lose(key, answers)
        answers.flags = 0
        world.put_flow(key, answers)
        assert world.sizes(family.version) == (1, 1)
        packet = tcp(family, ACK)
        assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family)))
        assert world.sizes(family.version) == (2, 0)

    def test_a_syn_again_and_an_answer_do_not(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family)
        world.answer(tcp_answer(family, SYN | ACK))
        world.send(tcp(family))
        assert world.sizes(family.version) == (0, 2)
        assert world.counts().flows == 1

    @PROTOCOLS
    @WAYS
    def test_a_flood_of_first_packets_pushes_out_nobody_else(
        self, world: World, family: Family, forwarding: Forwarding, protocol: int
    ) -> None:
        stage(world, family, forwarding)
        world.set(first_port=1024, last_port=65535)
        begin(world, family, protocol)
        world.send(later(family, protocol))
        entries = world.sizes(family.version)[0]
        for number in range(4000):
            made = first(family, protocol, client=client(family, number % 5000), port=1024 + number)
            assert world.send(made).verdict == REDIRECT
        assert world.sizes(family.version)[0] == entries
        assert world.send(later(family, protocol)).verdict == REDIRECT
        assert world.counts().flows == 4001

    def test_half_of_it_lost_is_all_of_it(self, world: World, family: Family) -> None:
        """Answers would not find back: the kernel refuses the connection in our place."""
        stage(world, family)
        begin(world, family)
        _, answers = world.flows(family.version)
        world.lose(*answers)
        assert world.send(tcp(family, ACK)).verdict == PASS
        assert world.reasons() == {Reason.PASS_NO_FLOW: 1}
        assert world.flows(family.version) == []

    def test_a_port_of_a_flow_that_goes_on_is_not_given_again(self, world: World, family: Family) -> None:
        stage(world, family)
        world.set(first_port=20000, last_port=20000)
        begin(world, family)
        world.send(tcp(family, ACK))
        assert world.send(tcp(family, port=CLIENT_PORT + 1)).verdict == PASS
        assert world.reasons() == {Reason.PASS_NO_PORT: 1}


class TestSweep:
    @WAYS
    @PROTOCOLS
    def test_what_is_in_use_stays(
        self, world: World, family: Family, protocol: int, forwarding: Forwarding
    ) -> None:
        stage(world, family, forwarding)
        begin(world, family, protocol)
        swept = world.sweep()
        mine, other = (swept.flows4, swept.flows6) if family.version == 4 else (swept.flows6, swept.flows4)
        assert (mine, other, swept.removed) == (1, 0, 0)
        assert swept.entries == (2 if forwarding is NAT else 1)
        assert len(world.flows(family.version)) == swept.entries

    @WAYS
    @pytest.mark.parametrize(
        ("state", "lives_s"), [("open", 300), ("SYN", 10), ("FIN", 10), ("RST", 10), ("UDP", 60)]
    )
    def test_how_long_each_lives(
        self, world: World, family: Family, forwarding: Forwarding, state: str, lives_s: int
    ) -> None:
        stage(world, family, forwarding)
        begin(world, family, UDP if state == "UDP" else TCP)
        if state not in ("SYN", "UDP"):
            world.send(tcp(family, ACK))
            if forwarding is NAT:
                world.answer(tcp_answer(family, ACK))
        if state in ("FIN", "RST"):
            world.send(tcp(family, FIN | ACK if state == "FIN" else RST))
            if forwarding is NAT and state == "FIN":
                world.answer(tcp_answer(family, FIN | ACK))
        world.age(lives_s - 1)
        assert world.sweep().removed == 0
        assert world.flows(family.version) != []
        world.age(2)
        assert world.sweep().removed == 1
        assert world.flows(family.version) == []

    @PROTOCOLS
    def test_either_direction_keeps_a_flow(self, world: World, family: Family, protocol: int) -> None:
        """A client that only listens."""
        stage(world, family)
        begin(world, family, protocol)
        world.age(1000)
        world.answer(tcp_answer(family, ACK) if protocol == TCP else udp_answer(family))
        assert world.sweep().removed == 0
        assert len(world.flows(family.version)) == 2

    def test_a_connection_whose_client_alone_has_ended_lives_on(self, world: World, family: Family) -> None:
        """Half-closed: the answer may take its time."""
        stage(world, family)
        begin(world, family)
        world.answer(tcp_answer(family, ACK))
        world.send(tcp(family, FIN | ACK))
        world.age(100)
        assert world.sweep().removed == 0

    def test_an_entry_for_answers_whose_flow_was_pushed_out_goes(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family)
        one, _ = world.flows(family.version)
        world.lose(*one)
        world.sweep()
        assert len(world.flows(family.version)) == 1
        world.age(11)
        swept = world.sweep()
        assert (swept.flows4 + swept.flows6, swept.entries) == (0, 1)
        assert world.flows(family.version) == []

    def test_both_families_are_counted(self, world: World, family: Family) -> None:
        from tests.l4.xdp.world import V6

        stage(world, V4, DSR)
        begin(world, V4)
        world.vip(V6.vip, 1, forwarding=ENCAPSULATED, number=2)
        world.backend(1, V6.backend(1), V6.source)
        begin(world, V6)
        for port in range(5):
            world.send(tcp(V6, port=port))
        swept = world.sweep()
        assert (swept.flows4, swept.flows6, swept.entries, swept.removed) == (1, 6, 7, 0)
        assert family

    def test_more_flows_than_there_is_room_for(self, world: World, family: Family) -> None:
        """The oldest go; nothing fails, and what is left of them goes with the sweep."""
        stage(world, family)
        world.set(first_port=1024, last_port=65535)
        made = 0
        for port in range(4000):
            made += world.send(tcp(family, port=port + 1)).verdict == REDIRECT
        assert made > 3900
        assert world.counts().flows == made
        swept = world.sweep()
        assert swept.entries <= 2048
        world.age(11)
        world.sweep()
        assert world.flows(family.version) == []
