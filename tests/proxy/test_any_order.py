"""Whatever happens in whatever order: each exchange ends once, and nothing of it is left anywhere."""

import random

import pytest

from expressgateway.proxy.route import MirrorRule, RetryPolicy
from expressgateway.upstream.errors import Fault
from expressgateway.upstream.limits import Limits
from expressgateway.upstream.pool import PoolSettings, Standing
from tests.proxy.ends import ClientEnd, Work
from tests.proxy.trying import SERVER_ERRORS, Cell, cells
from tests.proxy.world import PoolUse, World

EVENTS = 80


class Life:
    """A pool with every limit, retries and a mirror, and events by chance."""

    def __init__(self, seed: int, cell: Cell) -> None:
        self.chance = random.Random(seed)
        limits = Limits(
            max_requests=2, pool_max_requests=3, max_connections=3, max_pending=4, pending_timeout_s=4.0
        )
        retry = RetryPolicy(attempts=3, on_reset=True, statuses=SERVER_ERRORS, per_try_s=3.0)
        use = PoolUse(PoolSettings(limits=limits, budget_percent=50), retry)
        self.world = World(*cell, backends=3, use=use)
        copies = self.world.add_pool("copies", ["m0"], PoolUse.limited(max_requests=2))
        self.world.route_by(mirror=MirrorRule(copies, 50))
        self.clients: list[ClientEnd] = []
        self.begun: set[Work] = set()
        self.ended: set[Work] = set()

    def step(self) -> None:
        chance, world = self.chance, self.world
        here = [client for client in self.clients if not is_over(client)]
        works = [work for work in world.works if work not in self.ended and not work.is_cut]
        event = chance.random()
        if event < 0.3:
            self.ask()
        elif event < 0.4 and here:
            chance.choice(here).vanish()
        elif event < 0.75 and works:
            self.answer(chance.choice(works))
        elif event < 0.85:
            side = chance.choice(world.sides)
            side.fault = chance.choice([None, None, Fault.REFUSED, Fault.OVER_CAPACITY])
            side.connects = chance.random() < 0.8
            while side.connects and side.pending:
                side.connect()
                world.settle()
        elif event < 0.9:
            chance.choice(world.sides).go_stale()
        elif event < 0.95:
            ids = chance.sample(["b0", "b1", "b2"], 3)
            world.pool.judge(Standing(down=frozenset(ids[:1]), draining=frozenset(ids[1:2])))
            world.settle()
        else:
            world.advance(chance.choice([0.5, 2.0, 5.0]))

    def ask(self) -> None:
        client = self.world.client()
        self.clients.append(client)
        is_upload = self.chance.random() < 0.4
        client.request(self.chance.choice([b"GET", b"PUT", b"POST"]), end=not is_upload)
        if is_upload:
            client.data(b"x" * self.chance.choice([1, 1000, 70_000]))
            if self.chance.random() < 0.7:
                client.finish()

    def answer(self, work: Work) -> None:
        """One step of an answer, or the end of it."""
        what = self.chance.random()
        if work in self.begun:
            if what < 0.3:
                work.data(b"more")
                return
            if what < 0.8:
                work.finish()
            else:
                work.vanish()
        elif what < 0.3:
            self.begun.add(work)
            work.reply(self.chance.choice([200, 503]))
            return
        elif what < 0.6:
            work.ok()
        elif what < 0.8:
            work.reply(self.chance.choice([500, 503]), end=True)
        else:
            work.vanish()
        self.ended.add(work)

    def check(self) -> None:
        world = self.world
        assert all(side.backend.in_flight <= 2 for side in world.sides)
        assert world.pool.load.in_flight == sum(side.backend.in_flight for side in world.sides[:3]) <= 3
        assert len(world.pool.queue) <= 4

    def end(self) -> None:
        for client in self.clients:
            if not is_over(client):
                client.vanish()
        self.world.advance(61)  # the mirrors' life
        self.world.check_quiet(len(self.world.exchanges))


def is_over(client: ClientEnd) -> bool:
    return client.is_complete or client.is_cut or client.is_closed


@cells
@pytest.mark.parametrize("seeds", [range(40), range(40, 80)], ids=str)
def test_nothing_is_left(cell: Cell, seeds: range) -> None:
    for seed in seeds:
        life = Life(seed, cell)
        for _ in range(EVENTS):
            life.step()
            life.check()
        life.end()
