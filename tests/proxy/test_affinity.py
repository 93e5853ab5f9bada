"""Sessions: a client stays with its backend, by our cookie or by its key, as long as it is there."""

from collections import Counter
from typing import Any

import pytest

from expressgateway.proxy.forwarding import TrustedProxies
from expressgateway.proxy.keys import key_of
from expressgateway.proxy.rewriting import HeaderEdits, Rewrite
from expressgateway.proxy.route import RetryPolicy, SessionCookie, Target
from expressgateway.upstream.errors import Fault
from expressgateway.upstream.limits import Limits
from expressgateway.upstream.pool import PoolSettings, Standing
from expressgateway.upstream.selection import Balancing
from expressgateway.upstream.selection import session_affinity as selection
from tests.proxy.ends import BackSide, ClientEnd
from tests.proxy.trying import Cell, asked, cells, flags
from tests.proxy.world import PoolUse, World

COOKIE = SessionCookie.of("gw", path="/", secure=True, http_only=True, same_site="strict", max_age_s=0)
ATTRIBUTES = b"; Path=/; Secure; HttpOnly; SameSite=Strict"
NAMES = ("b0", "b1", "b2", "b3")


def sticky(
    cell: Cell = ("h1", "h1"),
    *,
    backends: int = 4,
    hash_key: str | None = None,
    retry: RetryPolicy | None = None,
    limits: Limits | None = None,
    secret: bytes = b"k" * 32,
) -> World:
    """A world with sessions by cookie, or by ``hash_key``."""
    balancing = Balancing("session_affinity", table_size=1021, has_cookie=hash_key is None, secret=secret)
    use = PoolUse(
        PoolSettings(balancing=balancing, limits=limits or Limits()),
        retry or RetryPolicy(),
        key_of(hash_key, TrustedProxies([])) if hash_key is not None else None,
        COOKIE if hash_key is None else None,
    )
    return World(*cell, backends=backends, use=use)


def taken(world: World) -> BackSide:
    return next(side for side in world.sides if side.backend.in_flight)


def went(world: World, client: ClientEnd) -> str:
    """Answers; gives the backend's id."""
    side = taken(world)
    side.work.ok()
    assert client.status == 200
    return side.backend.id


def cookies(client: ClientEnd) -> list[bytes]:
    return [value for name, value in client.headers if name == b"set-cookie"]


def with_cookie(world: World, value: bytes, **more: Any) -> ClientEnd:
    return asked(world, headers=((b"Cookie", b"a=b; gw=" + value + b"; c=d"),), **more)


def session(world: World, id_: str | None = None) -> tuple[bytes, str]:
    """A session's cookie value, and the backend it is bound to; ``id_``: bound to this one."""
    for _ in range(200):
        client = asked(world)
        bound = went(world, client)
        if id_ in (None, bound):
            (cookie,) = cookies(client)
            assert client.header(b"x-gateway-attempts") is None
            assert cookie.startswith(b"gw=")
            assert cookie.endswith(ATTRIBUTES)
            return cookie[3 : -len(ATTRIBUTES)], bound
    raise AssertionError(f"{id_} is never chosen")


@cells
class TestByCookie:
    def test_set_once(self, cell: Cell) -> None:
        world = sticky(cell)
        value, id_ = session(world)
        for _ in range(10):
            client = with_cookie(world, value)
            assert went(world, client) == id_
            assert cookies(client) == []
            assert flags(world) == []
        world.check_quiet(11)

    def test_the_backends_own_cookies_stay(self, cell: Cell) -> None:
        world = sticky(cell)
        client = asked(world)
        taken(world).work.reply(200, headers=[(b"Set-Cookie", b"s=1")], length=0, end=True)
        assert len(cookies(client)) == 2
        assert cookies(client)[0] == b"s=1"
        other = asked(world)
        taken(world).work.reply(200, headers=[(b"Set-Cookie", b"s=1")], length=0, end=True)
        assert len(cookies(other)) == 2, "kept from the answer before"

    def test_new_clients_are_spread(self, cell: Cell) -> None:
        world = sticky(cell)
        spread = Counter(session(world)[1] for _ in range(200))
        assert set(spread) == set(NAMES)
        assert min(spread.values()) > 20

    def test_the_value_tells_nothing_and_needs_the_secret(self, cell: Cell) -> None:
        value, _ = session(sticky(cell), "b2")
        assert b"b2" not in value
        other, _ = session(sticky(cell, secret=b"x" * 32), "b2")
        assert value != other
        again, _ = session(sticky(cell), "b2")
        assert value == again, "another worker knows it, too"

    @pytest.mark.parametrize("forged", [b"", b"b2", b"0" * 32, b"x" * 4000, b'"', b"%00"])
    def test_forged(self, cell: Cell, forged: bytes) -> None:
        world = sticky(cell)
        spread = set()
        for _ in range(60):
            client = with_cookie(world, forged)
            spread.add(went(world, client))
            assert len(cookies(client)) == 1
            assert flags(world) == ["affinity_lost"]
        assert spread == set(NAMES), "who has no session must not choose its backend"
        world.check_quiet(60)

    def test_an_upgrade_gets_one_too(self, cell: Cell) -> None:
        world = sticky(cell)
        client = world.client()
        client.request(upgrade=True)
        taken(world).work.accept()
        assert len(cookies(client)) == 1
        client.vanish()
        world.check_quiet(1)

    def test_no_answer_no_session(self, cell: Cell) -> None:
        world = sticky(cell)
        client = asked(world)
        taken(world).work.vanish()
        assert client.status == 502
        assert cookies(client) == []


@cells
class TestWhenTheBackendCannot:
    def test_draining_keeps_its_sessions(self, cell: Cell) -> None:
        world = sticky(cell)
        value, id_ = session(world)
        world.pool.judge(Standing(draining=frozenset({id_})))
        client = with_cookie(world, value)
        assert went(world, client) == id_
        assert cookies(client) == []
        for _ in range(30):
            assert went(world, asked(world)) != id_

    def test_weight_0_keeps_its_sessions(self, cell: Cell) -> None:
        world = sticky(cell)
        value, id_ = session(world)
        world.change(*NAMES, weights={id_: 0})
        assert went(world, with_cookie(world, value)) == id_
        for _ in range(30):
            assert went(world, asked(world)) != id_

    @pytest.mark.parametrize("how", ["down", "removed"])
    def test_its_sessions_are_spread_over_the_others(self, cell: Cell, how: str) -> None:
        """All of them have the same cookie: they must not all follow each other."""
        world = sticky(cell)
        value, id_ = session(world)
        if how == "down":
            world.pool.judge(Standing(down=frozenset({id_})))
        else:
            world.change(*(name for name in NAMES if name != id_))
        spread = Counter[str]()
        for _ in range(90):
            client = with_cookie(world, value)
            spread[went(world, client)] += 1
            assert flags(world) == ["affinity_lost"]
            (cookie,) = cookies(client)
            again = with_cookie(world, cookie[3 : -len(ATTRIBUTES)])
            assert cookies(again) == []
            went(world, again)
        assert set(spread) == set(NAMES) - {id_}
        assert min(spread.values()) >= 10
        world.check_quiet()

    def test_back_again(self, cell: Cell) -> None:
        world = sticky(cell)
        value, id_ = session(world)
        world.change(*(name for name in NAMES if name != id_))
        world.change(*NAMES)
        assert went(world, with_cookie(world, value)) == id_

    def test_a_retry_binds_anew(self, cell: Cell) -> None:
        world = sticky(cell, retry=RetryPolicy(on_reset=True))
        value, id_ = session(world)
        world.side_of(id_).fault = Fault.REFUSED
        world.side_of(id_).go_stale()
        spread = set()
        for _ in range(40):
            client = with_cookie(world, value)
            other = went(world, client)
            assert other != id_
            spread.add(other)
            assert len(cookies(client)) == 1
            new = cookies(client)[0][3 : -len(ATTRIBUTES)]
            assert went(world, with_cookie(world, new)) == other
        assert len(spread) == 3, "they all followed each other"
        world.check_quiet()

    def test_a_session_that_waits_for_room_stays(self, cell: Cell) -> None:
        world = sticky(cell, backends=2, limits=Limits(max_requests=1))
        value, id_ = session(world)
        others = [asked(world) for _ in range(2)]
        client = with_cookie(world, value, path=b"/mine")
        assert len(world.pool.queue) == 1
        world.side_of(id_).work.ok()
        assert world.side_of(id_).work.path == b"/mine"
        for side in world.sides:
            side.work.ok()
        assert [each.status for each in (client, *others)] == [200] * 3
        assert cookies(client) == []
        world.check_quiet()

    def test_a_session_does_not_jump_the_queue(self, cell: Cell) -> None:
        world = sticky(cell, backends=1, limits=Limits(max_requests=1))
        value, _ = session(world)
        asked(world)
        waits = asked(world, path=b"/first")
        late = with_cookie(world, value, path=b"/second")
        assert len(world.pool.queue) == 2
        for _ in range(3):
            world.work.ok()
        assert (waits.status, late.status) == (200, 200)
        assert [work.path for work in world.side.works[-2:]] == [b"/first", b"/second"]


@cells
class TestByKey:
    def ask(self, world: World, user: int, **more: Any) -> ClientEnd:
        return asked(world, headers=((b"X-User", b"%d" % user),), **more)

    def test_a_key_stays_where_it_was_first(self, cell: Cell) -> None:
        world = sticky(cell, hash_key="header:x-user")
        first = {user: went(world, self.ask(world, user)) for user in range(40)}
        assert set(first.values()) == set(NAMES)
        assert all(exchange.flags == [] for exchange in world.exchanges), "nobody lost anything"
        world.change(*NAMES, "b4", "b5", "b6", "b7")
        for user, id_ in first.items():
            client = self.ask(world, user)
            assert went(world, client) == id_
            assert cookies(client) == []
        world.check_quiet(80)

    def test_a_key_whose_backend_went_is_bound_anew(self, cell: Cell) -> None:
        world = sticky(cell, hash_key="header:x-user")
        id_ = went(world, self.ask(world, 1))
        world.pool.judge(Standing(down=frozenset({id_})))
        other = went(world, self.ask(world, 1))
        assert other != id_
        assert flags(world) == ["affinity_lost"]
        world.pool.judge(Standing())
        assert went(world, self.ask(world, 1)) == other, "it went to and fro"
        assert flags(world) == []

    def test_a_retry_binds_anew(self, cell: Cell) -> None:
        world = sticky(cell, hash_key="header:x-user")
        id_ = went(world, self.ask(world, 1))
        world.side_of(id_).fault = Fault.REFUSED
        world.side_of(id_).go_stale()
        other = went(world, self.ask(world, 1))
        assert other != id_
        world.side_of(id_).fault = None
        assert went(world, self.ask(world, 1)) == other

    def test_the_key_is_what_the_client_asked_for(self, cell: Cell) -> None:
        """Not what a route makes of it."""
        world = sticky(cell, hash_key="path")
        world.route_by("/", rewrite=Rewrite(path="/one"), edits=HeaderEdits(remove=["x-user"]))
        first = {at: went(world, asked(world, path=b"/%d" % at)) for at in range(40)}
        assert set(first.values()) == set(NAMES)
        for at, id_ in first.items():
            assert went(world, asked(world, path=b"/%d" % at)) == id_

    def test_without_a_key(self, cell: Cell) -> None:
        world = sticky(cell, hash_key="header:x-user")
        assert len({went(world, asked(world)) for _ in range(60)}) == 4

    def test_by_address_and_by_path(self, cell: Cell) -> None:
        world = sticky(cell, hash_key="client_ip")
        assert len({went(world, asked(world)) for _ in range(20)}) == 1
        world = sticky(cell, hash_key="path")
        assert len({went(world, asked(world, path=b"/a")) for _ in range(20)}) == 1
        assert len({went(world, asked(world, path=b"/%d" % at)) for at in range(60)}) == 4

    def test_what_is_remembered_is_bounded(self, cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(selection, "_MAX_BOUND", 3)
        world = sticky(cell, hash_key="header:x-user", backends=1)
        for user in range(5):
            went(world, self.ask(world, user))
        world.change("b0", "b1", "b2", "b3", weights={"b0": 0})
        assert [went(world, self.ask(world, user)) == "b0" for user in (2, 3, 4)] == [True] * 3
        assert went(world, self.ask(world, 0)) != "b0"
        sessions = world.pool.sessions
        assert sessions is not None
        assert [sessions.bound(b"%d" % user) is not None for user in (0, 1, 3, 4)] == [
            True,
            False,
            True,
            True,
        ]


def test_a_route_of_another_listener_needs_no_cookie() -> None:
    """The same pool without our cookie's name: everybody is new."""
    world = sticky()
    world.default_to(Target(world.pool, RetryPolicy()))
    client = asked(world)
    assert went(world, client) in NAMES
    assert cookies(client) == []
