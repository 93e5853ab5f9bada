"""Next hops, and whose frames a port takes: asked for, and believed in for a moment."""

import struct
import time
from pathlib import Path

import pytest

from expressgateway.l4.xdp import layout
from expressgateway.l4.xdp.layout import Forwarding, Reason
from tests.l4.xdp.packets import ACK, Packet, mac
from tests.l4.xdp.scene import NAT, begin, relinked, stage, tcp, tcp_answer, to_backend, to_client
from tests.l4.xdp.world import BACK, BACKENDS, CLIENT, DROP, PASS, REDIRECT, TX, Family, World

WAYS = pytest.mark.parametrize("forwarding", Forwarding)
OTHER = mac("02:00:00:00:09:09")
BELIEVED_NS = 20_000_000
CLOCK_TICK_NS = 10_000_000
"""The program's clock is a coarse one."""


def set_hop(world: World, family: Family, **fields: object) -> None:
    """In the entry of the flow to the backend."""
    for key, flow in world.flows(family.version):
        if flow.direction == layout.Direction.TO_BACKEND:
            for name, value in fields.items():
                setattr(flow.hop, name, value)
            world.put_flow(key, flow)


@WAYS
def test_one_that_was_asked_for_is_believed_in_for_a_moment(
    world: World, family: Family, forwarding: Forwarding
) -> None:
    stage(world, family, forwarding)
    begin(world, family)
    (_, flow), *_ = world.flows(family.version)
    now = time.monotonic_ns()
    assert now - 10**9 < flow.hop.until_ns <= now + BELIEVED_NS + CLOCK_TICK_NS
    assert (bytes(flow.hop.destination), bytes(flow.hop.source)) == (BACKENDS[1], BACK)
    assert (flow.hop.ifindex, flow.hop.vlan, flow.hop.mtu) == (world.back, 0, 1500)
    set_hop(world, family, destination=layout.octets(OTHER), until_ns=now + 10**12)
    packet = tcp(family, ACK)
    expected = relinked(to_backend(packet, family, forwarding), OTHER, BACK)
    assert world.send(packet) == (REDIRECT, bytes(expected))


@WAYS
def test_then_it_is_asked_for_again(world: World, family: Family, forwarding: Forwarding) -> None:
    stage(world, family, forwarding)
    begin(world, family)
    set_hop(world, family, destination=layout.octets(OTHER), until_ns=time.monotonic_ns() - CLOCK_TICK_NS)
    packet = tcp(family, ACK)
    assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family, forwarding)))
    (_, flow), *_ = world.flows(family.version)
    assert bytes(flow.hop.destination) == BACKENDS[1]


def test_the_other_direction_has_its_own(world: World, family: Family) -> None:
    stage(world, family)
    begin(world, family)
    answer = tcp_answer(family)
    assert world.answer(answer) == (REDIRECT, bytes(to_client(answer, family)))
    _, (_, flow) = world.flows(family.version)
    assert (bytes(flow.hop.destination), flow.hop.ifindex) == (CLIENT, world.front)
    assert world.answer(answer) == (REDIRECT, bytes(to_client(answer, family)))


@WAYS
def test_a_packet_that_is_longer_than_was_believed_asks(
    world: World, family: Family, forwarding: Forwarding
) -> None:
    stage(world, family, forwarding)
    begin(world, family)
    set_hop(world, family, mtu=200, until_ns=time.monotonic_ns() + 10**12)
    packet = tcp(family, ACK, data=bytes(500))
    assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family, forwarding)))


def test_one_that_has_gone_is_not_used_any_more(world: World, family: Family) -> None:
    stage(world, family)
    begin(world, family)
    world.namespace.ip(f"neigh del {family.backend(1)} dev back")
    try:
        world.age(0)
        assert world.send(tcp(family, ACK)).verdict == DROP
        assert world.reasons() == {Reason.DROP_NO_NEIGHBOUR: 1}
    finally:
        text = BACKENDS[1].hex(":")
        world.namespace.ip(f"neigh replace {family.backend(1)} lladdr {text} dev back nud permanent")
    assert world.send(tcp(family, ACK)).verdict == REDIRECT


def test_the_kernel_tells_none_where_forwarding_is_off(world: World, family: Family) -> None:
    """Which the loader looks at, and says."""
    stage(world, family)
    begin(world, family)
    world.age(0)
    setting = Path(f"/proc/sys/net/ipv{family.version}/conf/front/forwarding")
    setting.write_text("0")
    try:
        assert world.send(tcp(family, ACK)).verdict == DROP
        packet = tcp(family, port=1)
        assert world.send(packet) == (PASS, bytes(packet))
        assert world.reasons() == {Reason.DROP_NO_ROUTE: 1, Reason.PASS_NO_ROUTE: 1}
    finally:
        setting.write_text("1")


def test_in_dsr_a_router_is_no_next_hop(world: World, family: Family) -> None:
    """He would send the packet back to us. Nor where the backend's address is one of the link."""
    near = f"{family.link}99"
    bits = 32 if family.version == 4 else 128
    stage(world, family, Forwarding.FORWARD_DSR)
    world.backend(1, near, family.source)
    world.namespace.ip(f"route add {near}/{bits} via {family.router}")
    try:
        assert world.send(tcp(family)).verdict == DROP
        assert world.reasons() == {Reason.DROP_NOT_ADJACENT: 1}
        assert world.flows(family.version) == []
    finally:
        world.namespace.ip(f"route del {near}/{bits}")


def test_a_packet_that_is_too_long_for_it_is_answered_every_time(world: World, family: Family) -> None:
    stage(world, family)
    begin(world, family)
    for _ in range(3):
        assert world.send(tcp(family, ACK, data=bytes(1500))).verdict == TX
        assert world.send(tcp(family, ACK)).verdict == REDIRECT
    assert world.counts().icmp_too_big == 3


class TestInlet:
    """The MAC of the port that a frame comes in by."""

    def set_mac(self, world: World, address: bytes) -> None:
        port = layout.Port(ifindex=world.front, vlan=0, mac=layout.octets(address))
        world.maps["ports"].set(struct.pack("I", world.front), bytes(port))

    def until(self, world: World) -> int:
        works = world.maps["works"].get_percpu(bytes(4))
        return max(int(struct.unpack_from("Q", each)[0]) for each in works)

    def forget(self, world: World) -> None:
        """As time does."""
        works = world.maps["works"].get_percpu(bytes(4))
        world.maps["works"].set(bytes(4), b"".join(bytes(8) + each[8:] for each in works))

    def test_it_is_believed_in_for_a_moment(self, world: World, family: Family) -> None:
        stage(world, family)
        world.send(tcp(family))
        now = time.monotonic_ns()
        assert now - 10**9 < self.until(world) <= now + BELIEVED_NS + CLOCK_TICK_NS

    def test_then_it_is_another_one(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family)
        self.set_mac(world, OTHER)
        self.forget(world)
        packet = tcp(family, ACK)
        assert world.send(packet) == (PASS, bytes(packet))
        packet = packet.but(ether={"destination": OTHER})
        assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family, NAT)))

    def test_a_port_that_has_gone_takes_no_frames(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family)
        world.maps["ports"].delete(struct.pack("I", world.front))
        self.forget(world)
        packet = tcp(family, ACK)
        assert world.send(packet) == (PASS, bytes(packet))

    def test_two_ports_in_turn(self, world: World, family: Family) -> None:
        stage(world, family)
        begin(world, family)
        for _ in range(3):
            packet, answer = tcp(family, ACK), tcp_answer(family)
            assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family)))
            assert world.answer(answer) == (REDIRECT, bytes(to_client(answer, family)))
            wrong: Packet = packet.but(ether={"destination": BACK})
            assert world.send(wrong) == (PASS, bytes(wrong))
