"""Every reason why a packet is left to the kernel or ends here: one packet each, and nothing else counted."""

import errno
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest

from expressgateway.l4.xdp import layout, libbpf
from expressgateway.l4.xdp.layout import FIRST_DROP, REASON_COUNT, Action, Forwarding, Reason
from tests.l4.xdp.packets import ACK, MF, SYN, Extension, Packet
from tests.l4.xdp.scene import DSR, ENCAPSULATED, NAT, begin, extended, link, stage, tcp
from tests.l4.xdp.world import BACKEND_PORT, DROP, PASS, PORT, V4, Family, World

CLOCK_MONOTONIC_COARSE = 6
"""The program's clock, which Python has no name for."""


class Scene(NamedTuple):
    """What happens before, and the packet; and whose number it is counted with."""

    before: Callable[[World, Family], object]
    packet: Callable[[Family], Packet]
    vip: int = 1
    meta: int = 0
    """So many bytes of other programs' are in front of the frame (`bpf_xdp_adjust_meta`)."""


def fragment(family: Family) -> Packet:
    if family.version == 4:
        return tcp(family).but(ip={"fragment": MF})
    return extended(tcp(family), Extension(44, bytes(6)))


def without_backend(world: World, family: Family) -> None:
    world.vip(family.vip)


def with_backend(address: str, forwarding: Forwarding = NAT, *, known: bool = False) -> Callable[..., None]:
    """A backend at one of the family's places. Known: the flow was made while the backend was on the link."""

    def before(world: World, family: Family) -> None:
        stage(world, family, forwarding)
        if known:
            begin(world, family)
            world.send(tcp(family, ACK))
        world.backend(1, getattr(family, address), family.source)
        if known and forwarding is NAT:
            redirect_flow(world, family, getattr(family, address))

    return before


def redirect_flow(world: World, family: Family, address: str) -> None:
    """As if the route had changed under it."""
    (key, flow), _ = world.flows(family.version)
    flow.to.destination = layout.address_of(address)
    flow.hop.until_ns = 0
    world.put_flow(key, flow)


def taken(world: World, family: Family) -> None:
    stage(world, family)
    begin(world, family)


def over_cap(world: World, family: Family) -> None:
    stage(world, family)
    world.set(new_flows_per_second=1, first_port=20000, last_port=20999)
    while True:  # until enough of the second is left
        second, rest = divmod(time.clock_gettime_ns(CLOCK_MONOTONIC_COARSE), 10**9)
        if rest < 500_000_000:
            break
    rate = bytes(layout.Rate(second=second, flows=1))
    world.maps["rates"].set(bytes(4), rate * libbpf.possible_cpus())


def its_own_answer(world: World, family: Family) -> None:
    world.backend(1, family.backend(1), family.source)
    world.vip(family.source, 1, port=PORT)


def denied(world: World, family: Family) -> None:
    stage(world, family)
    world.deny(family.client, 8)


SCENES: dict[Reason, Scene] = {
    Reason.PASS_FRAGMENT: Scene(stage, fragment, vip=0),
    Reason.PASS_MALFORMED: Scene(stage, lambda f: tcp(f).but(tcp={"header_words": 1}), vip=0),
    Reason.PASS_NOT_UNDERSTOOD: Scene(
        stage, lambda f: link(f.client, f.vip, protocol=132).raw(bytes(20)), vip=0
    ),
    Reason.PASS_NO_FLOW: Scene(stage, lambda f: tcp(f, ACK)),
    Reason.PASS_OVER_CAP: Scene(over_cap, tcp),
    Reason.PASS_NO_BACKEND: Scene(without_backend, tcp),
    Reason.PASS_NO_PORT: Scene(taken, lambda f: tcp(f, port=99)),
    Reason.PASS_NO_ROUTE: Scene(with_backend("silent"), tcp),
    Reason.DROP_DENIED: Scene(denied, tcp),
    Reason.DROP_TTL: Scene(stage, lambda f: tcp(f).but(ip={"ttl": 1})),
    Reason.DROP_NO_NEIGHBOUR: Scene(with_backend("silent", known=True), lambda f: tcp(f, ACK)),
    Reason.DROP_NO_ROUTE: Scene(with_backend("nowhere", known=True), lambda f: tcp(f, ACK)),
    Reason.DROP_NO_PORT: Scene(with_backend("elsewhere"), tcp),
    Reason.DROP_NOT_ADJACENT: Scene(with_backend("far", DSR), tcp),
    Reason.DROP_TOO_BIG: Scene(stage, lambda f: tcp(f, data=bytes(1500)).but(ip={"fragment": 0})),
    Reason.DROP_NO_SPACE: Scene(
        lambda world, family: stage(world, family, ENCAPSULATED),
        tcp,
        meta=208,
    ),
    Reason.DROP_RACE: Scene(
        its_own_answer, lambda f: link(f.backend(1), f.source).tcp(BACKEND_PORT, PORT, SYN)
    ),
}


def test_every_reason_has_its_scene() -> None:
    assert set(SCENES) == set(Reason)
    assert len(Reason) == REASON_COUNT
    assert all(reason.name.startswith("DROP") is (reason >= FIRST_DROP) for reason in Reason)
    assert all(reason.name.startswith(reason.action.name[7:]) for reason in Reason)
    assert {reason.action for reason in Reason} == set(Action)


@pytest.mark.parametrize("reason", Reason)
def test_a_reason(world: World, family: Family, reason: Reason) -> None:
    if reason is Reason.DROP_TOO_BIG:
        family = V4  # IPv6 is never cut on its way: its senders are told
    scene = SCENES[reason]
    scene.before(world, family)
    before = world.counts()
    frame = bytes(scene.meta) + bytes(scene.packet(family))
    try:
        outcome = world.send(frame, ctx=struct.pack("6I", scene.meta, len(frame), 0, world.front, 0, 0))
    except libbpf.BpfError as error:
        if not scene.meta or error.errno != errno.EINVAL:
            raise
        pytest.skip("this kernel allows 32 bytes in front of a frame")
    assert world.reasons(scene.vip) == {reason: 1}
    assert world.reasons(1 - scene.vip) == {}
    assert outcome.verdict == (DROP if reason.action is Action.ACTION_DROP else PASS)
    if outcome.verdict == PASS:
        assert outcome.frame == frame
    after = world.counts()
    assert (after.in_packets, after.out_packets) == (before.in_packets, before.out_packets)
