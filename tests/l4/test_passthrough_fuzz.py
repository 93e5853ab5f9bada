"""Whatever comes, from clients or backends: no exception, no more state than is bounded, nothing left."""

from __future__ import annotations

import random
from typing import Any

import pytest

from expressgateway.l4.passthrough.quic_lb import ServerIds
from expressgateway.l4.passthrough.retry import RetryTokens
from tests.l4.passthrough_world import World, initial_with, long, short, until, world
from tests.l4.udp_gateway import run

ROUNDS = 4000


def mutated(chance: random.Random, cids: list[bytes]) -> bytes:
    cid = chance.choice(cids)
    packet = chance.choice(
        (
            lambda: long(cid, chance.randbytes(chance.randrange(21)), kind=chance.randrange(4)),
            lambda: long(cid, version=chance.choice((0, 1, 0x6B3343CF, 0x1A2A3A4A, 0xFFFFFFFF))),
            lambda: initial_with(chance.randbytes(chance.randrange(300)), cid),
            lambda: initial_with(b"EGR1" + chance.randbytes(60), cid),
            lambda: short(cid),
            lambda: chance.randbytes(chance.randrange(1500)),
        )
    )()
    changed = bytearray(packet)
    for _ in range(chance.choice((0, 0, 1, 3))):
        if changed:
            changed[chance.randrange(min(len(changed), 40))] = chance.randrange(256)
    return bytes(changed[: chance.choice((len(changed), len(changed), chance.randrange(1 + len(changed))))])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("has_more", [False, True])
def test_anything(seed: int, has_more: bool) -> None:
    async def main() -> None:
        chance = random.Random(seed)
        more: dict[str, Any] = {
            "server_ids": ServerIds(2, 1, bytes(16)),
            "tokens": RetryTokens(bytes(32), lambda: 0),
        }
        async with world(max_flows=40, max_per_source=15, **(more if has_more else {})) as one:
            servers = [one.server() for _ in range(3)]
            one.use(*servers, ids=("00", "01", "02"))
            cids = [chance.randbytes(chance.choice((4, 8, 8, 8, 20))) for _ in range(30)]
            for at in range(ROUNDS):
                step(one, chance, cids)
                if at % 50 == 0:
                    await until(lambda: True)
                    for server in servers:
                        server.got.clear()
            assert one.counters.connections > 40
            assert one.listener.open <= 40
            assert one.reactor.faults == 0

    run(main)


def step(one: World, chance: random.Random, cids: list[bytes]) -> None:
    address = (f"127.0.2.{chance.randrange(5)}", 1024 + chance.randrange(20))
    flows = list(one.listener.table)
    if flows and chance.randrange(4) == 0:
        data = mutated(chance, cids)
        chance.choice(flows).on_datagrams(data, chance.choice((len(data), 50, 1200)) or 1, address, [], 0)
        one.listener.shared.out.clear()
        return
    packets = [mutated(chance, cids) for _ in range(chance.choice((1, 1, 3)))]
    data = b"".join(packets)
    one.listener.on_datagrams(data, len(packets[0]) or 1200, address, [], 0)
    if chance.randrange(3) == 0:
        one.listener.flush()
    if chance.randrange(100) == 0:
        one.listener.sweep(one.reactor.now + chance.randrange(80))
