"""What finding a packet's worker costs: ``python -m tests.net.quic.sharing_bench``."""

import os
import socket
import sys
import time
import timeit
from collections.abc import Callable

from expressgateway.net.datagram import IP_PKTINFO
from expressgateway.net.quic.cids import destination_of, make_cid, worker_of
from expressgateway.net.quic.handover import Handover, Pair
from expressgateway.net.quic.spares import Spares, SpareTable
from tests.net.quic.test_cids import long_packet, short_packet

RUNS = 20_000
CLOCK = time.thread_time  # other processes do not count
ROUNDS = 500
BATCH = 20  # datagrams that wait at once


def told(what: str, once: Callable[[], object], runs: int = RUNS) -> None:
    seconds = min(timeit.repeat(once, timer=CLOCK, number=runs, repeat=7)) / runs
    sys.stdout.write(f"{what:50} {seconds * 1e9:7.0f} ns\n")


def main() -> None:
    ours, other = make_cid(3), os.urandom(12)
    short, long = short_packet(ours), long_packet(ours)
    told("make_cid", lambda: make_cid(3))
    told("worker_of, ours", lambda: worker_of(ours))
    told("worker_of, a random one", lambda: worker_of(other))
    told("destination_of, short header", lambda: destination_of(short))
    told("destination_of, long header", lambda: destination_of(long))
    for workers in (2, 8, 32):
        spares(workers)
    for size in (1200, 64_800):
        handover(size)


def spares(workers: int) -> None:
    table = SpareTable(workers)
    everyone = [Spares(table.fd, index, workers) for index in range(workers)]
    for one in everyone:
        for _ in range(20_000):
            one.add(os.urandom(12))
    here, cid, other = everyone[0], os.urandom(12), os.urandom(12)
    everyone[-1].add(cid)

    def change() -> None:
        here.add(other)
        here.remove(other)

    told(f"owner, {workers} workers, of the last", lambda: here.owner(cid))
    told(f"owner, {workers} workers, nobody's", lambda: here.owner(other))
    told(f"add and remove, {workers} workers", change)


def handover(size: int) -> None:
    pairs = Pair(), Pair()
    first = Handover(pairs[0].reader.dup(), {1: pairs[1].writer.dup()})
    second = Handover(pairs[1].reader.dup(), {})
    second._sink = Nobody()
    data = bytes(size)
    address = ("192.0.2.7", 4433)
    control = [(socket.IPPROTO_IP, IP_PKTINFO, bytes(12))]
    given = taken = 0.0
    for _ in range(ROUNDS):
        given += timeit.timeit(
            lambda: first.give(1, 0, data, 1200, address, control, 0), timer=CLOCK, number=BATCH
        )
        taken += timeit.timeit(lambda: second._on_ready(0), timer=CLOCK, number=1)
    assert first.given == second.taken == ROUNDS * BATCH
    for what, seconds in (("given", given), ("taken", taken)):
        sys.stdout.write(f"{what:10} {size:6} bytes {seconds / ROUNDS / BATCH * 1e9:26.0f} ns\n")
    first.close()
    second.close()
    for pair in pairs:
        pair.close()


class Nobody:
    def on_handed(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    main()
