"""Stale connections and failed connects: what is tried again, what is not, and that nobody is left behind."""

import pytest

from expressgateway.proxy.backend_side import REPLAY_BYTES
from expressgateway.proxy.errors import Reason
from expressgateway.upstream.errors import Fault
from tests.proxy.ends import ClientEnd
from tests.proxy.test_reasons import connection_of
from tests.proxy.world import CELLS, World

Cell = tuple[str, str]
cells = pytest.mark.parametrize("cell", CELLS, ids=["-".join(cell) for cell in CELLS])


def stale(cell: Cell, *, delivered: bool = True, max_body: int = 1 << 20) -> World:
    """A world with one used connection that the backend has closed unnoticed."""
    world = World(*cell, max_body=max_body)
    world.client().request()
    world.work.ok()
    world.side.go_stale()
    world.side.was_delivered = delivered
    return world


def asked(world: World, method: bytes = b"GET", body: bytes = b"") -> ClientEnd:
    client = world.client()
    if body:
        client.request(method, length=len(body), end=False)
        for at in range(0, len(body), 10_000):
            client.data(body[at : at + 10_000], at + 10_000 >= len(body))
    else:
        client.request(method)
    return client


@cells
class TestStaleConnections:
    @pytest.mark.parametrize("method", [b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS"])
    def test_what_is_idempotent_is_sent_again_once(self, cell: Cell, method: bytes) -> None:
        world = stale(cell)
        client = asked(world, method)
        assert len(world.side.works) == 2
        assert world.work.method == method
        world.work.reply(200, length=0, end=True)
        assert client.status == 200
        assert world.pool.retries == {"stale": 1}
        assert world.side.dials == 2
        world.check_quiet(2)
        assert world.counters.errors == {}

    def test_post_is_not_sent_again_if_it_may_have_arrived(self, cell: Cell) -> None:
        world = stale(cell, delivered=True)
        client = asked(world, b"POST")
        world.check_refused(client, Reason.BACKEND_RESET, 502, "connection_terminated")
        assert len(world.side.works) == 1
        world.check_quiet(2)

    def test_post_is_sent_again_if_it_cannot_have_arrived(self, cell: Cell) -> None:
        world = stale(cell, delivered=False)
        client = asked(world, b"POST")
        world.work.ok()
        assert client.status == 200
        world.check_quiet(2)

    @pytest.mark.parametrize("size", [1, 10_000, REPLAY_BYTES])
    def test_a_body_is_replayed(self, cell: Cell, size: int) -> None:
        world = stale(cell)
        body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        client = asked(world, b"PUT", body)
        assert world.work.body == body
        assert world.work.is_complete
        world.work.ok()
        assert client.status == 200
        assert client.pauses[-1:] != ["pause"]
        world.check_quiet(2)

    def test_a_longer_body_is_not_replayed(self, cell: Cell) -> None:
        """More than 64 KiB has gone: what was kept is not the whole body any more."""
        world = World(*cell)
        world.client().request()
        world.work.ok()
        client = asked(world, b"PUT", b"x" * (REPLAY_BYTES + 1))
        world.work.vanish()
        world.check_refused(client, Reason.BACKEND_RESET, 502, "connection_terminated")
        world.check_quiet(2)

    def test_a_body_under_the_limit_that_was_sent_is_replayed(self, cell: Cell) -> None:
        world = World(*cell)
        world.client().request()
        world.work.ok()
        client = world.client()
        client.request(b"PUT", end=False)
        client.data(b"a" * 1000)
        client.data(b"b" * 1000)
        world.work.vanish()
        client.data(b"c" * 1000)
        client.finish((b"x-sum", b"1"))
        assert world.work.body == b"a" * 1000 + b"b" * 1000 + b"c" * 1000
        assert world.work.is_complete
        world.work.ok()
        assert client.status == 200
        world.check_quiet(2)

    def test_trailers_are_replayed(self, cell: Cell) -> None:
        world = World(*cell)
        world.client().request()
        world.work.ok()
        client = world.client()
        client.request(b"PUT", end=False)
        client.data(b"a")
        client.finish((b"x-sum", b"1"))
        world.work.vanish()
        assert (world.work.body, world.work.trailers) == (b"a", [(b"x-sum", b"1")])
        world.work.ok()
        assert client.status == 200

    def test_only_once(self, cell: Cell) -> None:
        world = stale(cell)
        client = asked(world)
        world.work.vanish()
        world.check_refused(client, Reason.BACKEND_RESET, 502, "connection_terminated")
        assert world.side.dials == 2
        world.check_quiet(2)

    def test_a_fresh_connection_is_not_stale(self, cell: Cell) -> None:
        world = World(*cell)
        client = asked(world)
        world.work.vanish()
        world.check_refused(client, Reason.BACKEND_RESET, 502, "connection_terminated")
        assert world.side.dials == 1

    def test_not_after_an_answer_began(self, cell: Cell) -> None:
        world = World(*cell)
        world.client().request()
        world.work.ok()
        client = asked(world)
        world.work.reply(200)
        world.work.vanish()
        assert client.is_cut
        assert world.pool.retries == {}
        world.check_quiet(2)

    def test_not_after_an_interim_answer(self, cell: Cell) -> None:
        """Retried once if no response byte was seen: 103 is one."""
        world = World(*cell)
        world.client().request()
        world.work.ok()
        client = asked(world)
        world.work.interim(103)
        world.work.vanish()
        assert client.interim == [103]
        assert client.status == 502, "sent again although the backend had begun to answer"
        assert world.pool.retries == {}

    def test_a_client_that_leaves_while_we_try_again(self, cell: Cell) -> None:
        world = stale(cell)
        world.side.connects = False
        client = asked(world)
        client.vanish()
        assert world.side.pending == []
        world.check_quiet(2)


def test_not_after_half_a_head() -> None:
    world = World()
    world.client().request()
    world.work.ok()
    client = asked(world)
    connection_of(world).tell(b"HTTP/1.1 20")
    connection_of(world).codec.receive_reset()
    world.settle()
    assert client.status == 502
    assert world.pool.retries == {}


@cells
class TestFailover:
    @pytest.mark.parametrize("method", [b"GET", b"POST"])
    def test_another_backend_is_asked(self, cell: Cell, method: bytes) -> None:
        """Nothing was sent: it is safe whatever the method, body included."""
        world = World(*cell, backends=3)
        world.sides[0].fault = world.sides[1].fault = Fault.REFUSED
        client = world.client()
        client.request(method, length=2, end=False)
        client.data(b"ab", True)
        assert [side.dials for side in world.sides] == [1, 1, 1]
        work = world.sides[2].work
        assert (work.body, work.is_complete) == (b"ab", True)
        work.ok()
        assert client.status == 200
        world.check_quiet(1)
        assert [backend.connect_failures for backend in world.pool.backends] == [1, 1, 0]
        assert world.counters.errors == {}

    def test_each_is_asked_once(self, cell: Cell) -> None:
        world = World(*cell, backends=3)
        for side in world.sides:
            side.fault = Fault.REFUSED
        client = world.client()
        client.request()
        world.check_refused(client, Reason.CONNECT_REFUSED, 502, "connection_refused")
        assert [side.dials for side in world.sides] == [1, 1, 1]
        world.check_quiet(1)

    def test_our_own_lack_of_resources_is_not_their_fault(self, cell: Cell) -> None:
        world = World(*cell, backends=3)
        for side in world.sides:
            side.fault = Fault.OVER_CAPACITY
        client = world.client()
        client.request()
        world.check_refused(client, Reason.OVER_CAPACITY, 503, "connection_limit_reached")
        assert sum(side.dials for side in world.sides) == 1

    def test_one_that_is_unavailable_is_passed_over(self, cell: Cell) -> None:
        world = World(*cell, backends=3)
        world.pool.backends[1].is_available = False
        for _ in range(6):
            client = world.client()
            client.request()
            for side in world.sides:
                for work in side.works:
                    if not work.is_cut and client.status == 0:
                        work.is_cut = True
                        work.ok()
            assert client.status == 200
        assert len(world.sides[1].works) == 0
        world.check_quiet(6)

    def test_a_backend_that_leaves_finishes_its_exchanges(self, cell: Cell) -> None:
        world = World(*cell, backends=1)
        client = world.client()
        client.request()
        gone = world.pool.backends[0]
        world.change()
        late = world.client()
        late.request()
        assert late.status == 502
        world.work.ok()
        assert client.status == 200
        assert gone.in_flight == 0
        world.check_quiet(2)
