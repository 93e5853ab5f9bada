"""Copies of requests: the same for their backend, and nothing at all for the client."""

from typing import Any

import pytest

from expressgateway.proxy import mirror as module
from expressgateway.proxy.rewriting import HeaderEdits, Rewrite
from expressgateway.proxy.route import MirrorRule, RetryPolicy
from expressgateway.upstream.errors import Fault
from tests.proxy.ends import BackSide, ClientEnd
from tests.proxy.memory import MemoryBack
from tests.proxy.trying import Cell, asked, cells
from tests.proxy.world import PoolUse, World

BODY = bytes(range(256)) * 400  # 100 KiB


def mirrored(cell: Cell = ("h1", "h1"), *, percent: int = 100, copies: int = 1, **more: Any) -> World:
    """A world with one backend, whose requests are copied to a pool ``copies``."""
    use = more.pop("use", None)
    world = World(*cell, use=use)
    target = world.add_pool("copies", [f"m{at}" for at in range(copies)], more.pop("copies_use", None))
    world.route_by(mirror=MirrorRule(target, percent), **more)
    return world


def copy_side(world: World) -> BackSide:
    return world.side_of("m0")


def became(world: World) -> dict[str, int]:
    return dict(world.pools[1].mirrored)


def served(world: World, client: ClientEnd) -> None:
    """The client has its answer as if there were no copy."""
    world.side.work.ok(b"the answer")
    assert (client.status, client.body, client.is_complete) == (200, b"the answer", True)
    assert client.header(b"x-gateway-attempts") is None
    assert world.counters.errors == {}


@cells
class TestWhatIsCopied:
    def test_a_request(self, cell: Cell) -> None:
        world = mirrored(cell)
        client = asked(world, path=b"/a?b=c", headers=((b"X-A", b"1"), (b"Cookie", b"c=d")))
        work, copy = world.side.work, copy_side(world).work
        assert (copy.method, copy.path, copy.host) == (b"GET", b"/a?b=c", b"a.example")
        assert copy.headers == work.headers
        assert copy.header(b"x-request-id") == world.exchanges[0].request_id
        assert copy.is_complete
        copy.reply(500, headers=[(b"X-From", b"the copy")], length=4)
        copy.data(b"oops", True)
        assert client.status == 0
        served(world, client)
        assert client.header(b"x-from") is None
        assert became(world) == {"answered": 1}
        assert copy_side(world).backend.responses[5] == 1
        assert world.statuses() == {"2xx": 1}
        world.check_quiet(1)

    @pytest.mark.parametrize("declared", [True, False])
    def test_a_body(self, cell: Cell, declared: bool) -> None:
        world = mirrored(cell)
        client = asked(world, b"POST", length=len(BODY) if declared else None, end=False)
        for at in range(0, len(BODY), 10_000):
            client.data(BODY[at : at + 10_000])
        client.finish()
        work, copy = world.side.work, copy_side(world).work
        assert copy.body == work.body == BODY
        assert copy.is_complete
        assert copy.header(b"content-length") == work.header(b"content-length")
        copy.ok()
        served(world, client)
        world.check_quiet(1)

    def test_trailers(self, cell: Cell) -> None:
        world = mirrored(cell)
        client = asked(world, b"POST", headers=((b"TE", b"trailers"),), end=False)
        client.data(b"a")
        client.finish((b"x-sum", b"1"), (b"x-forwarded-for", b"forged"))
        copy = copy_side(world).work
        assert (copy.body, copy.trailers, copy.is_complete) == (b"a", [(b"x-sum", b"1")], True)
        copy.ok()
        served(world, client)
        world.check_quiet(1)

    def test_what_comes_before_there_is_a_connection(self, cell: Cell) -> None:
        world = mirrored(cell)
        copy_side(world).connects = False
        client = asked(world, b"POST", end=False)
        client.data(b"a")
        client.data(b"b")
        client.finish((b"x-sum", b"1"))
        served(world, client)
        copy_side(world).connect()
        world.settle()
        copy = copy_side(world).work
        assert (copy.body, copy.trailers, copy.is_complete) == (b"ab", [(b"x-sum", b"1")], True)
        copy.ok()
        assert became(world) == {"answered": 1}
        world.check_quiet(1)

    def test_as_the_route_has_changed_it(self, cell: Cell) -> None:
        world = mirrored(
            cell,
            rewrite=Rewrite(host="new.example", add_prefix="/v2"),
            edits=HeaderEdits(set={"x-set": "1"}),
        )
        asked(world, path=b"/a")
        copy = copy_side(world).work
        assert (copy.path, copy.host, copy.header(b"x-set")) == (b"/v2/a", b"new.example", b"1")
        assert copy.headers == world.side.work.headers

    def test_nobody_waits_for_its_100(self, cell: Cell) -> None:
        world = mirrored(cell)
        client = asked(world, b"POST", headers=((b"Expect", b"100-continue"),), length=1, end=False)
        copy_side(world).work.interim(100)
        assert client.interim == []
        client.data(b"a", True)
        copy_side(world).work.ok()
        served(world, client)
        world.check_quiet(1)

    def test_no_handshake(self, cell: Cell) -> None:
        world = mirrored(cell)
        client = world.client()
        client.request(upgrade=True)
        assert copy_side(world).dials == 0
        world.side.work.accept()
        assert client.interim == [101]
        client.vanish()
        world.check_quiet(1)

    def test_percent(self, cell: Cell) -> None:
        for percent, least, most in ((0, 0, 0), (100, 400, 400), (25, 60, 140)):
            world = mirrored(cell, percent=percent)
            for _ in range(400):
                asked(world)
                world.side.work.ok()
                for work in copy_side(world).works[-1:]:
                    if not work.is_cut and copy_side(world).backend.in_flight:
                        work.ok()
            assert least <= len(copy_side(world).works) <= most
            world.check_quiet(400)

    def test_once_however_often_the_request_is_tried(self, cell: Cell) -> None:
        world = mirrored(cell, retry=RetryPolicy(on_reset=True))
        world.change("b0", "b1")
        client = asked(world, b"PUT", length=2, end=False)
        client.data(b"ab", True)
        world.side_of("b0").work.vanish()
        world.side_of("b1").work.ok()
        assert client.status == 200
        assert len(copy_side(world).works) == 1
        copy_side(world).work.ok()
        world.check_quiet(1)


@cells
class TestItCannotHarm:
    """Whatever the copy's backend does, the client sees the same, at the same time."""

    def uploaded(self, world: World) -> ClientEnd:
        """An upload that nobody ever pauses."""
        client = asked(world, b"POST", length=len(BODY), end=False)
        client.pauses.clear()
        for at in range(0, len(BODY), 10_000):
            client.data(BODY[at : at + 10_000])
        client.finish()
        assert world.side.work.body == BODY
        assert client.pauses == []
        return client

    def test_one_that_never_connects(self, cell: Cell) -> None:
        world = mirrored(cell)
        copy_side(world).connects = False
        client = self.uploaded(world)
        assert became(world) == {"too_slow": 1}, "more was held than the bound"
        assert copy_side(world).cancelled == 1
        served(world, client)
        world.check_quiet(1)

    def test_one_that_never_connects_and_little_to_hold(self, cell: Cell) -> None:
        world = mirrored(cell)
        copy_side(world).connects = False
        client = asked(world)
        served(world, client)
        world.advance(59)
        assert became(world) == {}
        world.advance(2)
        assert became(world) == {"timeout": 1}
        assert copy_side(world).pending == []
        world.check_quiet(1)

    def test_one_that_takes_nothing(self, cell: Cell) -> None:
        world = mirrored(cell)
        client = asked(world, b"POST", end=False)
        client.pauses.clear()
        client.data(b"a")
        copy = copy_side(world).work
        copy.block()
        world.settle()
        assert client.pauses == []
        client.data(b"b", True)
        assert copy.is_cut
        assert not copy.is_complete
        assert became(world) == {"too_slow": 1}
        served(world, client)
        world.check_quiet(1)

    def test_one_that_takes_nothing_of_what_was_held(self, cell: Cell) -> None:
        world = mirrored(cell)
        side = copy_side(world)
        if not isinstance(side, MemoryBack):
            pytest.skip("its buffer is judged after the events at hand")
        side.connects = False
        side.is_full = True
        client = asked(world, b"POST", end=False)
        client.data(b"a")
        client.data(b"b")
        client.finish()
        side.connect()
        world.settle()
        assert (side.work.is_cut, side.work.is_complete) == (True, False)
        assert became(world) == {"too_slow": 1}
        served(world, client)
        world.check_quiet(1)

    @pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.CONNECT_TIMEOUT, Fault.OVER_CAPACITY])
    def test_one_that_refuses(self, cell: Cell, fault: Fault) -> None:
        world = mirrored(cell, copies=2)
        for id_ in ("m0", "m1"):
            world.side_of(id_).fault = fault
        client = self.uploaded(world)
        served(world, client)
        assert became(world) == {"connect_failed": 1}, "it is not tried again"
        told = {} if fault is Fault.OVER_CAPACITY else {"m0": [0, 1, 1, "it failed"]}
        assert world.pools[1].take_outcomes() == told
        assert world.outcomes() == {"b0": [1, 0, 0, ""]}
        world.check_quiet(1)

    @pytest.mark.parametrize("when", ["before", "within"])
    def test_one_that_resets(self, cell: Cell, when: str) -> None:
        world = mirrored(cell)
        client = asked(world, b"POST", end=False)
        client.data(b"a")
        copy = copy_side(world).work
        if when == "within":
            copy.reply(200)
        copy.vanish()
        client.data(b"b", True)
        assert world.side.work.body == b"ab"
        served(world, client)
        assert became(world) == {"failed": 1}
        good = 1 if when == "within" else 0
        assert world.pools[1].take_outcomes()["m0"][:3] == [good, 1, 1]
        assert world.outcomes() == {"b0": [1, 0, 0, ""]}
        world.check_quiet(1)

    def test_a_stale_connection_is_no_failure_of_it(self, cell: Cell) -> None:
        world = mirrored(cell)
        asked(world)
        copy_side(world).work.ok()
        world.side.work.ok()
        copy_side(world).go_stale()
        client = asked(world)
        served(world, client)
        assert became(world) == {"answered": 1, "failed": 1}
        assert world.pools[1].take_outcomes() == {"m0": [1, 0, 0, ""]}

    def test_one_that_answers_first(self, cell: Cell) -> None:
        world = mirrored(cell)
        client = asked(world, b"POST", end=False)
        client.data(b"a")
        copy = copy_side(world).work
        copy.reply(413, length=2)
        copy.data(b"no", True)
        assert copy.is_cut
        assert not copy.is_complete
        assert client.status == 0
        client.data(b"b", True)
        assert world.side.work.body == b"ab"
        served(world, client)
        assert became(world) == {"answered": 1}
        world.check_quiet(1)

    def test_one_that_never_answers(self, cell: Cell) -> None:
        world = mirrored(cell)
        client = asked(world)
        served(world, client)
        world.advance(61)
        assert became(world) == {"timeout": 1}
        if cell[1] == "h1":
            assert copy_side(world).work.is_cut
        world.check_quiet(1)

    def test_one_that_answers_at_length(self, cell: Cell) -> None:
        """What it says is read and thrown away; it is not paused, and not for ever."""
        world = mirrored(cell)
        client = asked(world)
        copy = copy_side(world).work
        copy.reply(200)
        for _ in range(10):
            copy.data(b"x" * 65536)
            world.advance(3)
        assert copy.pauses == []
        assert client.body == b""
        served(world, client)
        world.advance(40)
        assert became(world) == {"timeout": 1}
        world.check_quiet(1)

    def test_no_backend(self, cell: Cell) -> None:
        world = mirrored(cell, copies=0)
        client = asked(world)
        served(world, client)
        assert became(world) == {"no_backend": 1}
        assert world.exchanges[0].flags == ["mirror_dropped"]
        world.check_quiet(1)

    def test_it_never_waits_for_room(self, cell: Cell) -> None:
        world = mirrored(cell, copies_use=PoolUse.limited(max_requests=1))
        first = asked(world)
        served(world, first)
        second = asked(world)
        served(world, second)
        assert len(world.pools[1].queue) == 0
        assert became(world) == {"no_backend": 1}
        copy_side(world).work.ok()
        world.check_quiet(2)

    def test_their_number_is_bounded(self, cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MAX_MIRRORS", 2)
        world = mirrored(cell)
        for _ in range(3):
            served(world, asked(world))
        assert len(world.mirrors) == 2
        assert became(world) == {"too_many": 1}
        world.advance(61)
        served(world, asked(world))
        assert became(world) == {"too_many": 1, "timeout": 2}
        assert len(world.mirrors) == 1


@cells
class TestACopyCutShort:
    """A copy of a request that never ended never looks complete."""

    @pytest.mark.parametrize("declared", [10, None])
    def test_by_the_client(self, cell: Cell, declared: int | None) -> None:
        world = mirrored(cell)
        client = asked(world, b"POST", length=declared, end=False)
        client.data(b"hello")
        client.vanish()
        copy = copy_side(world).work
        assert copy.is_cut
        assert not copy.is_complete
        assert became(world) == {"cut_short": 1}
        world.check_quiet(1)

    def test_before_it_had_a_connection(self, cell: Cell) -> None:
        world = mirrored(cell)
        copy_side(world).connects = False
        client = asked(world, b"POST", end=False)
        client.data(b"hello")
        client.vanish()
        assert copy_side(world).pending == []
        assert became(world) == {"cut_short": 1}
        world.check_quiet(1)

    def test_by_an_early_answer(self, cell: Cell) -> None:
        world = mirrored(cell)
        client = asked(world, b"POST", length=10, end=False)
        client.data(b"hello")
        world.side.work.reply(403, length=0, end=True)
        assert client.status == 403
        assert copy_side(world).work.is_cut
        assert became(world) == {"cut_short": 1}
        world.check_quiet(1)

    def test_by_the_cap(self, cell: Cell) -> None:
        world = mirrored(cell)
        world.reload(max_body_bytes=4)
        client = asked(world, b"POST", end=False)
        client.data(b"hello")
        assert client.status == 413
        copy = copy_side(world).work if copy_side(world).works else None
        assert copy is None or (copy.is_cut and copy.body == b"")
        world.check_quiet(1)

    def test_a_whole_one_goes_on_without_its_client(self, cell: Cell) -> None:
        world = mirrored(cell)
        client = asked(world)
        client.vanish()
        copy = copy_side(world).work
        assert not copy.is_cut
        copy.ok()
        assert became(world) == {"answered": 1}
        world.check_quiet(1)

    def test_one_whose_original_failed(self, cell: Cell) -> None:
        world = mirrored(cell)
        client = asked(world)
        world.side.work.vanish()
        assert client.status == 502
        copy_side(world).work.ok()
        assert became(world) == {"answered": 1}
        world.check_quiet(1)
