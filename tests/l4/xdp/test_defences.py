"""What keeps others out: denied sources, the cap on new flows, TTLs, and the MAC of the port.

Each has been removed from the program once, to see these tests fail.
"""

import os
from collections.abc import Iterator

import pytest

from expressgateway.l4.xdp.layout import Forwarding, Reason
from tests.l4.xdp.packets import ACK, SYN, TCP, UDP, mac
from tests.l4.xdp.scene import (
    CLIENT_PORT,
    DSR,
    NAT,
    begin,
    stage,
    tcp,
    tcp_answer,
    to_backend,
    to_client,
    udp,
)
from tests.l4.xdp.world import DROP, PASS, REDIRECT, Family, Outcome, World

WAYS = pytest.mark.parametrize("forwarding", Forwarding)


BITS = {4: (32, 31, 24, 8, 1, 0), 6: (128, 127, 64, 48, 1, 0)}
"""Prefixes that a client is within."""


class TestDenied:
    @WAYS
    @pytest.mark.parametrize("at", range(6))
    def test_a_new_client(self, world: World, family: Family, forwarding: Forwarding, at: int) -> None:
        stage(world, family, forwarding)
        world.deny(family.client, BITS[family.version][at])
        for packet in (tcp(family), udp(family), tcp(family, ACK)):
            assert world.send(packet).verdict == DROP
        assert world.reasons() == {Reason.DROP_DENIED: 3}
        assert world.flows(family.version) == []

    @WAYS
    @pytest.mark.parametrize("protocol", [TCP, UDP])
    def test_a_client_that_has_a_flow(
        self, world: World, family: Family, forwarding: Forwarding, protocol: int
    ) -> None:
        stage(world, family, forwarding)
        begin(world, family, protocol)
        world.deny(family.client, 32 if family.version == 4 else 128)
        packet = tcp(family, ACK) if protocol == TCP else udp(family)
        assert world.send(packet).verdict == DROP
        assert world.reasons() == {Reason.DROP_DENIED: 1}

    def test_neighbours_are_not_denied(self, world: World, family: Family) -> None:
        stage(world, family)
        world.deny(
            "198.51.100.11" if family.version == 4 else "2001:db8:1::11", 32 if family.version == 4 else 128
        )
        world.deny(
            "198.51.100.12" if family.version == 4 else "2001:db8:1::100", 31 if family.version == 4 else 120
        )
        world.deny(
            "198.51.101.0" if family.version == 4 else "2001:db8:2::", 24 if family.version == 4 else 64
        )
        packet = tcp(family)
        assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family)))

    def test_the_other_family_s_prefix_denies_nobody(self, world: World, family: Family) -> None:
        """Not even one that would cover mapped addresses."""
        stage(world, family)
        world.deny("::" if family.version == 4 else "0.0.0.0", 0)
        packet = tcp(family)
        assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family)))

    def test_what_is_not_for_a_vip_is_not_our_business(self, world: World, family: Family) -> None:
        stage(world, family)
        world.deny(family.client, 0)
        packet = tcp(family).but(tcp={"destination": 22})
        assert world.send(packet) == (PASS, bytes(packet))

    def test_an_empty_list_is_not_asked(self, world: World, family: Family) -> None:
        """`denies` is whether there is anything in them."""
        stage(world, family)
        world.deny(family.client, 0)
        world.set(denies=0)
        for flags in (SYN, ACK, ACK):
            assert world.send(tcp(family, flags)).verdict == REDIRECT


class TestTtl:
    @WAYS
    @pytest.mark.parametrize("ttl", [0, 1])
    def test_a_new_flow_s(self, world: World, family: Family, forwarding: Forwarding, ttl: int) -> None:
        stage(world, family, forwarding)
        for packet in (tcp(family), udp(family)):
            assert world.send(packet.but(ip={"ttl": ttl})).verdict == DROP
        assert world.reasons() == {Reason.DROP_TTL: 2}
        assert world.flows(family.version) == []

    @WAYS
    @pytest.mark.parametrize("ttl", [0, 1])
    def test_a_known_flow_s(self, world: World, family: Family, forwarding: Forwarding, ttl: int) -> None:
        stage(world, family, forwarding)
        begin(world, family)
        assert world.send(tcp(family, ACK).but(ip={"ttl": ttl})).verdict == DROP
        assert world.reasons() == {Reason.DROP_TTL: 1}

    @pytest.mark.parametrize("ttl", [0, 1])
    def test_an_answer_s(self, world: World, family: Family, ttl: int) -> None:
        stage(world, family)
        begin(world, family)
        assert world.answer(tcp_answer(family).but(ip={"ttl": ttl})).verdict == DROP
        assert world.reasons() == {Reason.DROP_TTL: 1}


class TestMac:
    """In `dsr` backends have our addresses, and a switch may send everybody everything."""

    @pytest.mark.parametrize("bit", range(48))
    def test_every_bit_of_it_counts(self, world: World, family: Family, bit: int) -> None:
        stage(world, family)
        begin(world, family)
        packet = tcp(family)
        wrong = int.from_bytes(bytes(packet)[:6], "big") ^ 1 << bit
        packet = packet.but(ether={"destination": wrong.to_bytes(6, "big")})
        assert world.send(packet) == (PASS, bytes(packet))
        answer = tcp_answer(family).but(ether={"destination": mac("020000000002")})
        assert world.answer(answer) == (REDIRECT, bytes(to_client(answer, family)))


class TestGeneration:
    """A number that has been given to another backend is not the flow's any more."""

    @WAYS
    @pytest.mark.parametrize("generation", [2, 0, 0xFFFFFFFF])
    def test_another_one(self, world: World, family: Family, forwarding: Forwarding, generation: int) -> None:
        stage(world, family, forwarding)
        begin(world, family)
        world.backend(1, family.backend(2), family.source, generation=generation)
        packet = tcp(family, ACK)
        assert world.send(packet) == (PASS, bytes(packet))
        assert world.reasons() == {Reason.PASS_NO_FLOW: 1}


class TestCap:
    CAP = 5

    @pytest.fixture(autouse=True)
    def one_cpu(self) -> Iterator[None]:
        """Each has its own count."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(before)})
        yield
        os.sched_setaffinity(0, before)

    def flood(self, world: World, family: Family, forwarding: Forwarding) -> list[Outcome]:
        """Twice as many new clients as are allowed, all within one second of the kernel's clock."""
        while True:
            world.reset()
            stage(world, family, forwarding)
            world.set(new_flows_per_second=self.CAP, first_port=20000, last_port=29999)
            outcomes = [world.send(tcp(family, port=port)) for port in range(1000, 1000 + 2 * self.CAP)]
            rates = world.maps["rates"].get_percpu(bytes(4))
            if sum(int.from_bytes(rate[8:16], "little") for rate in rates) == self.CAP and (
                world.counts().flows == self.CAP
            ):
                return outcomes

    def test_in_nat_the_kernel_has_the_rest(self, world: World, family: Family) -> None:
        outcomes = self.flood(world, family, NAT)
        assert [verdict for verdict, _ in outcomes] == [REDIRECT] * self.CAP + [PASS] * self.CAP
        assert outcomes[-1][1] == bytes(tcp(family, port=1000 + 2 * self.CAP - 1))
        assert world.reasons() == {Reason.PASS_OVER_CAP: self.CAP}
        assert len(world.flows(family.version)) == 2 * self.CAP

    @pytest.mark.parametrize("forwarding", [DSR, Forwarding.FORWARD_DSR_ENCAPSULATED])
    def test_in_dsr_the_table_alone_decides(
        self, world: World, family: Family, forwarding: Forwarding
    ) -> None:
        outcomes = self.flood(world, family, forwarding)
        assert [verdict for verdict, _ in outcomes] == [REDIRECT] * 2 * self.CAP
        last = tcp(family, port=1000 + 2 * self.CAP - 1)
        assert outcomes[-1][1] == bytes(to_backend(last, family, forwarding))
        assert (world.counts().flows, world.counts().stateless) == (self.CAP, self.CAP)
        assert len(world.flows(family.version)) == self.CAP
        assert world.reasons() == {}

    def test_who_has_a_flow_is_not_concerned(self, world: World, family: Family) -> None:
        self.flood(world, family, NAT)
        for flags in (ACK, SYN, ACK):
            assert world.send(tcp(family, flags, port=1000)).verdict == REDIRECT

    def test_the_next_second_has_its_own(self, world: World, family: Family) -> None:
        self.flood(world, family, NAT)
        cpus = world.maps["rates"].get_percpu(bytes(4))
        earlier = b"".join(
            (int.from_bytes(rate[:8], "little") - 1).to_bytes(8, "little", signed=True) + rate[8:]
            for rate in cpus
        )
        world.maps["rates"].set(bytes(4), earlier)
        assert world.send(tcp(family, port=CLIENT_PORT)).verdict == REDIRECT

    def test_a_packet_without_a_way_does_not_count(self, world: World, family: Family) -> None:
        """Nor one that is denied: no flow is made of it."""
        stage(world, family)
        world.set(new_flows_per_second=1)
        for _ in range(3):
            world.send(tcp(family).but(ip={"ttl": 1}))
        rates = world.maps["rates"].get_percpu(bytes(4))
        assert sum(int.from_bytes(rate[8:16], "little") for rate in rates) == 0
