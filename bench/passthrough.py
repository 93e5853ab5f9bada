"""What Mode A costs: ``python -m bench.passthrough``.

Prints two Markdown tables. *Forwarding* is CPU time of the worker's thread per datagram of 1200 bytes, the
kernel's included (on loopback sending includes the delivery to the receiver's queue), and nothing else's.
*Finding* is the cost of finding a datagram's flow, from 10 flows to 100,000, all of them equally busy: what
it gains with their number are misses of the processor's caches. Each figure is the best of several runs: the
machine's other work only ever adds to it.
"""

import asyncio
import os
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import uvloop

from expressgateway.l4.passthrough.flow import Flow
from expressgateway.l4.passthrough.listener import PassthroughListener
from expressgateway.l4.passthrough.retry import RetryTokens
from expressgateway.l4.passthrough.settings import Settings
from expressgateway.net.batches import Address, BatchSocket
from expressgateway.net.datagram import Control
from expressgateway.net.reactor import Reactor
from expressgateway.observe.counters import ListenerCounters
from expressgateway.upstream.backend import BackendSettings
from expressgateway.upstream.pool import Pool, PoolSettings
from expressgateway.upstream.selection import Balancing

DATAGRAM_BYTES: Final = 1200
BATCH: Final = 40
"""Datagrams of a batch: what one GSO buffer may hold is 54 of these."""
ROUNDS: Final = 400
RUNS: Final = 5
SIZES: Final = (10, 100, 1_000, 10_000, 100_000)
LOOKUPS: Final = 20_000


class Everybody:
    """A census that knows no caps."""

    def enter(self, ip: str) -> str | None:
        return None

    def leave(self, ip: str) -> None:
        pass


class Nobody:
    """Reads and forgets."""

    def __init__(self) -> None:
        self.datagrams = 0

    def on_datagrams(
        self, data: bytes, segment_bytes: int, address: Address, control: list[Control], ecn: int
    ) -> None:
        self.datagrams += -(-len(data) // segment_bytes)


class World:
    """A listener, a backend's socket and clients' sockets, all on loopback and in this thread."""

    def __init__(self) -> None:
        self.reactor = Reactor(asyncio.get_running_loop())
        self.backend = _bound()
        host, port = self.backend.sock.getsockname()
        self.pool = Pool("passthrough", lambda _: None, self.reactor, self.reactor.call_soon)
        settings = BackendSettings("b", host, port, "tcp", 1, None, None)
        self.pool.replace([(settings, (host, port), "b")], PoolSettings(Balancing("maglev", table_size=251)))
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        sock.bind(("127.0.0.1", 0))
        self.address: Address = sock.getsockname()
        self.counters = ListenerCounters("passthrough")
        self.listener = PassthroughListener(
            self.reactor, sock, Everybody(), self.counters, self.pool, Settings(2_000_000, 2_000_000)
        )
        self.clients: list[BatchSocket] = []

    def connect(self) -> tuple[BatchSocket, bytes, Flow]:
        """A client with a connection that the backend has answered: its socket, and the connection ID that
        the backend chose."""
        client = _bound()
        self.clients.append(client)
        chosen, cid = os.urandom(8), os.urandom(8)
        head = b"\xc0\0\0\0\x01\x08" + chosen + b"\x02ab\0"
        client.send((head.ljust(DATAGRAM_BYTES, b"\0"),), self.address)
        self.listener.on_ready(0)
        (flow,) = [each for each in self.listener.table if each.chose == chosen]
        _, came_from = self.backend.sock.recvfrom(2048)
        self.backend.send((b"\xc0\0\0\0\x01\x02ab\x08" + cid + b"\0" * 40,), came_from)
        flow.on_ready(1)
        self.drain(client)
        return client, cid, flow

    def drain(self, batch: BatchSocket) -> int:
        sink = Nobody()
        while batch.receive(sink) == 32:
            pass
        return sink.datagrams

    def close(self) -> None:
        self.listener.go_away()
        self.listener.stop()
        for batch in (self.backend, *self.clients):
            batch.close()
        self.reactor.close()


def _bound() -> BatchSocket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**22)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**22)
    sock.bind(("127.0.0.1", 0))
    return BatchSocket(sock)


@dataclass(frozen=True)
class Way:
    """One way of sending a batch: what comes before it, what is measured, and who counts what arrived."""

    name: str
    prepare: Callable[[], None]
    forward: Callable[[], None]
    arrived: Callable[[], int]


def ways(world: World) -> list[Way]:
    client, cid, flow = world.connect()
    rest = os.urandom(DATAGRAM_BYTES - 9)
    batch = [b"\x40" + cid + rest] * BATCH
    sender = flow.batch
    assert sender is not None
    back: Address = sender.sock.getsockname()
    many = [world.connect() for _ in range(BATCH)]
    listener = world.listener

    def one_by_one(datagrams: list[bytes], through: BatchSocket, to: Address) -> None:
        for datagram in datagrams:
            through.send((datagram,), to)

    def from_many() -> None:
        for other, other_cid, _ in many:
            other.send((b"\x40" + other_cid + rest,), world.address)

    return [
        Way(
            "client to backend, batches (GRO to GSO)",
            lambda: _sent(client.send(batch, world.address)),
            lambda: listener.on_ready(1),
            lambda: world.drain(world.backend),
        ),
        Way(
            "backend to client, batches (GRO to GSO)",
            lambda: _sent(world.backend.send(batch, back)),
            lambda: flow.on_ready(1),
            lambda: world.drain(client),
        ),
        Way(
            "client to backend, sent one by one",
            lambda: one_by_one(batch, client, world.address),
            lambda: listener.on_ready(1),
            lambda: world.drain(world.backend),
        ),
        Way(
            "backend to client, sent one by one",
            lambda: one_by_one(batch, world.backend, back),
            lambda: flow.on_ready(1),
            lambda: world.drain(client),
        ),
        Way(
            f"{BATCH} clients in turn, one datagram each",
            from_many,
            lambda: listener.on_ready(1),
            lambda: world.drain(world.backend),
        ),
    ]


def beginnings(runs: int = RUNS) -> tuple[float, float]:
    """CPU time of a new flow with its socket and its first datagram, and of a Retry; in microseconds."""
    costs = []
    for tokens in (None, RetryTokens(bytes(32), lambda: 1)):
        best = float("inf")
        for _ in range(runs):
            world = World()
            world.listener.adopt(Settings(2_000_000, 2_000_000, tokens=tokens))
            client = _bound()
            world.clients.append(client)
            spent = 0.0
            for _ in range(20):
                for _ in range(25):
                    first = b"\xc0\0\0\0\x01\x08" + os.urandom(8) + b"\x02ab\0"
                    client.send((first.ljust(DATAGRAM_BYTES, b"\0"),), world.address)
                before = time.thread_time()
                world.listener.on_ready(1)
                spent += time.thread_time() - before
                world.drain(client)
                world.drain(world.backend)
            assert 500 in (world.listener.open, world.counters.quic_retries)
            best = min(best, spent / 500)
            world.close()
        costs.append(best * 1e6)
    return costs[0], costs[1]


def _sent(count: int) -> None:
    assert count == BATCH, count


def measure(way: Way, rounds: int = ROUNDS, runs: int = RUNS) -> float:
    """CPU time per datagram, in microseconds."""
    best = float("inf")
    for _ in range(runs):
        spent = 0.0
        arrived = 0
        for _ in range(rounds):
            way.prepare()
            # A second time for what the first one left: a receive takes so many buffers, not all.
            before = time.thread_time()
            way.forward()
            way.forward()
            spent += time.thread_time() - before
            arrived += way.arrived()
        assert arrived == rounds * BATCH, (way.name, arrived)
        best = min(best, spent / arrived)
    return best * 1e6


@dataclass(frozen=True)
class Finding:
    """Nanoseconds, at one number of flows."""

    flows: int
    by_cid: float
    by_place: float
    nobody: float


def finding(world: World, flows: int, lookups: int = LOOKUPS, runs: int = RUNS) -> Finding:
    """Of flows that have no sockets: finding does not need them."""
    shared = world.listener.shared
    table = world.listener.table
    made: list[tuple[Flow, bytes, Address]] = []
    while len(table) < flows:
        number = len(table)
        place: Address = (f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 4433)
        flow = Flow(shared, place, place[0], place[0], place, [], b"key")
        table.add(flow)
        table.choose(flow, os.urandom(8))
        cid = os.urandom(8)
        table.learn(flow, cid)
        flow.is_answered = True
        table.prove(flow)
        made.append((flow, cid, place))
    known: list[tuple[bytes, Address]] = [(cid, place) for _, cid, place in random.choices(made, k=lookups)]
    unlearned: list[tuple[bytes, Address]] = [(os.urandom(8), place) for _, place in known]
    junk: list[tuple[bytes, Address]] = [(os.urandom(8), ("192.0.2.1", at % 65_536)) for at in range(lookups)]
    costs = [_find(world.listener, packets, runs) for packets in (known, unlearned, junk)]
    for flow, _, _ in made:
        table.remove(flow)
    return Finding(flows, *costs)


def _find(listener: PassthroughListener, wanted: list[tuple[bytes, Address]], runs: int) -> float:
    """Packets are new for each look, as after a receive; whose they are is in no cache, if flows are many."""
    best = float("inf")
    find = listener.find
    control: list[Control] = []
    for _ in range(runs):
        spent = 0.0
        for begin in range(0, len(wanted), BATCH):
            packets = [
                (b"\x40" + cid + bytes(60), (str(place[0]), int(f"{place[1]}")))
                for cid, place in wanted[begin : begin + BATCH]
            ]
            before = time.thread_time()
            for packet, place in packets:
                find(packet, place, place, control, 0)
            spent += time.thread_time() - before
        best = min(best, spent)
    return best / len(wanted) * 1e9


async def main() -> None:
    world = World()
    print("| forwarding, per datagram of 1200 bytes | us |\n| --- | --- |")
    for way in ways(world):
        print(f"| {way.name} | {measure(way):.2f} |", flush=True)
    world.close()
    new, retried = beginnings()
    print(f"| a new flow, with its socket | {new:.1f} |")
    print(f"| a Retry instead | {retried:.1f} |")
    print(
        "\n| flows | by connection ID, ns | by address, ns | junk, dropped, ns |\n| --- | --- | --- | --- |"
    )
    for size in SIZES:
        world = World()
        found = finding(world, size)
        print(f"| {size:,} | {found.by_cid:.0f} | {found.by_place:.0f} | {found.nobody:.0f} |", flush=True)
        world.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
