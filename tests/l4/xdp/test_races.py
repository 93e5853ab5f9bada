"""Two CPUs at once: packets of one flow, and tables that are changed under packets."""

import threading
from collections import Counter
from collections.abc import Callable

import pytest

from expressgateway.l4.xdp.layout import Forwarding
from tests.l4.xdp.packets import ACK, Packet
from tests.l4.xdp.scene import NAT, stage, tcp, udp
from tests.l4.xdp.world import DROP, PASS, REDIRECT, V4, Family, World

WAYS = pytest.mark.parametrize("forwarding", Forwarding)
FLOWS = 400


def at_once(*works: Callable[[], None]) -> None:
    """Each in a thread, which is in the namespace as its maker is."""
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        barrier.wait(20)
        work()

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


def sending(world: World, packets: list[Packet], seen: Counter[int]) -> Callable[[], None]:
    frames = [bytes(packet) for packet in packets]

    def work() -> None:
        seen.update(world.send(frame).verdict for frame in frames)

    return work


@WAYS
def test_the_second_packets_of_flows(world: World, family: Family, forwarding: Forwarding) -> None:
    """Both may move a flow from one table to the other. None is lost: the kernel would answer by a reset."""
    stage(world, family, forwarding)
    world.set(first_port=20000, last_port=29999)
    for port in range(FLOWS):
        world.send(tcp(family, port=1000 + port))
    seen: Counter[int] = Counter()
    packets = [tcp(family, ACK, port=1000 + port) for port in range(FLOWS)]
    at_once(*(sending(world, packets, seen) for _ in range(3)))
    assert seen[PASS] == 0, world.reasons()
    assert seen[REDIRECT] + seen[DROP] == 3 * FLOWS
    assert seen[DROP] <= FLOWS // 20, world.reasons(0)
    entries = FLOWS * (2 if forwarding is NAT else 1)
    assert world.sizes(family.version) == (entries, 0)


@WAYS
def test_the_first_packets_of_flows(world: World, family: Family, forwarding: Forwarding) -> None:
    """One of them makes it. What the others made is taken back, and a client sends again what is dropped."""
    stage(world, family, forwarding)
    world.set(first_port=20000, last_port=29999)
    seen: Counter[int] = Counter()
    packets = [tcp(family, port=1000 + port) for port in range(FLOWS)]
    at_once(*(sending(world, packets, seen) for _ in range(3)))
    assert seen[PASS] == 0, world.reasons()
    assert seen[REDIRECT] + seen[DROP] == 3 * FLOWS
    assert seen[REDIRECT] >= FLOWS
    entries = FLOWS * (2 if forwarding is NAT else 1)
    assert sum(world.sizes(family.version)) == entries
    assert world.counts().flows == FLOWS


def test_tables_are_swapped_under_packets(world: World) -> None:
    """Every packet meets the old one or the new one, and never none."""
    stage(world, V4, Forwarding.FORWARD_DSR, backends=2)
    seen: Counter[int] = Counter()
    packets = [tcp(V4, ACK, port=port) for port in range(1000, 4000)] + [udp(V4, port=9)]
    ended = threading.Event()

    def send() -> None:
        sending(world, packets, seen)()
        ended.set()

    def swap() -> None:
        turn = 0
        while not ended.is_set():
            turn += 1
            world.swap(1, 1 + turn % 2)

    at_once(send, swap)
    assert seen == {REDIRECT: len(packets)}
    assert world.reasons() == {}
