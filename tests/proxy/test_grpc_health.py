"""``grpc.health.v1.Health``, answered from the standing of pools."""

import pytest

from expressgateway.proxy.errors import Reason
from expressgateway.proxy.grpc_health import CHECK, MAX_WATCHES, WATCH, Health, service_of
from expressgateway.proxy.grpc_status import Code
from expressgateway.proxy.route import Timeouts
from expressgateway.proxy.service import GrpcRules
from expressgateway.upstream.pool import Standing
from tests.proxy.ends import ClientEnd
from tests.proxy.test_grpc import called, counted, message, only_status
from tests.proxy.world import World

SERVING, NOT_SERVING, SERVICE_UNKNOWN = (message(bytes((8, status))) for status in (1, 2, 3))
TIMES = Timeouts(header=10, body=3, total=4, head=5, idle=75)


def request(name: bytes) -> bytes:
    return message(b"\x0a" + bytes((len(name),)) + name if name else b"")


def gateway(**what: object) -> World:
    """Two pools: ``pool`` with b0 and b1, ``other`` with c0."""
    world = World("memory", "memory", backends=2, timeouts=TIMES, **what)  # type: ignore[arg-type]
    other = world.add_pool("other", ["c0"])
    health = Health({"pool": world.pool, "other": other.pool}, world.counters)
    world.reload(grpc=GrpcRules(300, health))
    return world


def ask(world: World, path: bytes, name: bytes = b"", *fields: tuple[bytes, bytes]) -> ClientEnd:
    client = called(world, *fields, path=path, end=False)
    client.data(request(name), end=True)
    return client


def down(*ids: str) -> Standing:
    return Standing(down=frozenset(ids))


class TestCheck:
    @pytest.mark.parametrize("name", [b"", b"pool", b"other"])
    def test_well(self, name: bytes) -> None:
        world = gateway()
        client = ask(world, CHECK, name)
        assert client.status == 200
        assert client.header(b"content-type") == b"application/grpc"
        assert client.body == SERVING
        assert client.trailers == [(b"grpc-status", b"0")]
        assert counted(world) == {Code.OK: 1}
        assert world.works == [], "a backend was asked"
        world.check_quiet(1)

    def test_down(self) -> None:
        world = gateway()
        world.pool.judge(down("b0"))
        assert ask(world, CHECK, b"pool").body == SERVING
        world.pool.judge(down("b0", "b1"))
        assert ask(world, CHECK, b"pool").body == NOT_SERVING
        assert ask(world, CHECK, b"other").body == SERVING
        assert ask(world, CHECK).body == SERVING
        world.pools[1].judge(down("c0"))
        assert ask(world, CHECK).body == NOT_SERVING

    def test_draining_weightless_and_gone(self) -> None:
        world = gateway()
        world.pool.judge(Standing(draining=frozenset({"b0", "b1"})))
        assert ask(world, CHECK, b"pool").body == NOT_SERVING
        world.pool.judge(Standing())
        world.change("b0", weights={"b0": 0})
        assert ask(world, CHECK, b"pool").body == NOT_SERVING
        world.change()
        assert ask(world, CHECK, b"pool").body == NOT_SERVING

    def test_unknown(self) -> None:
        world = gateway()
        only_status_of = ask(world, CHECK, b"nobody")
        assert only_status_of.header(b"grpc-status") == b"5"
        assert only_status_of.is_complete
        assert counted(world) == {Code.NOT_FOUND: 1}
        world.check_quiet(1)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"\0\0\0\0",
            b"\0\0\0\0\1",
            message(b"") + b"x",
            message(b"") * 2,
            b"\1" + message(b"")[1:],
            message(b"\x0a\x05abc"),
            message(b"\x0a"),
            message(b"\x0a\x02\xff\xfe"),
            message(b"\x0b"),
            message(b"\x80" * 11),
            message(b"\x0d\0"),
        ],
    )
    @pytest.mark.parametrize("path", [CHECK, WATCH])
    def test_what_is_no_request(self, body: bytes, path: bytes) -> None:
        world = gateway()
        client = called(world, path=path, end=False)
        client.data(body, end=True)
        assert client.header(b"grpc-status") == b"3"
        world.check_quiet(1)

    def test_no_body_at_all(self) -> None:
        world = gateway()
        client = called(world, path=CHECK, end=True)
        assert client.header(b"grpc-status") == b"3"
        world.check_quiet(1)

    def test_too_long(self) -> None:
        world = gateway()
        client = called(world, path=CHECK, end=False)
        client.data(bytes(5000))
        assert client.header(b"grpc-status") == b"8"
        world.check_quiet(1)

    def test_fields_of_a_later_version(self) -> None:
        more = b"\x10\x96\x01" + b"\x19" + bytes(8) + b"\x22\x01x" + b"\x2d" + bytes(4)
        assert service_of(message(more + b"\x0a\x04pool")) == "pool"

    def test_in_pieces(self) -> None:
        world = gateway()
        client = called(world, path=CHECK, end=False)
        for at in request(b"pool"):
            client.data(bytes((at,)))
            assert client.status == 0
        client.finish()
        assert client.body == SERVING
        world.check_quiet(1)

    def test_others_go_to_the_backend(self) -> None:
        world = gateway()
        called(world, path=b"/grpc.health.v1.Health/List")
        assert len(world.works) == 1
        world.reload(grpc=GrpcRules(300, None))
        called(world, path=CHECK)
        assert len(world.works) == 2

    def test_who_has_no_business_here(self) -> None:
        world = gateway(is_misdirected=lambda _sni, _host: True, sni="b.example")
        only_status(called(world, path=CHECK), Code.INVALID_ARGUMENT)
        assert world.counters.errors == {Reason.MISDIRECTED.value: 1}

    def test_a_client_that_never_asks(self) -> None:
        world = gateway()
        client = called(world, path=CHECK, end=False)
        world.advance(3.5)
        assert client.header(b"grpc-status") == b"4"
        world.check_quiet(1)


class TestWatch:
    def test_it_tells_of_changes(self) -> None:
        world = gateway()
        client = ask(world, WATCH, b"pool")
        assert client.body == SERVING
        world.advance(1)
        world.pool.judge(down("b0"))
        world.advance(1)
        assert client.body == SERVING
        world.pool.judge(down("b0", "b1"))
        world.advance(0.25)
        assert client.body == SERVING + NOT_SERVING
        world.pool.judge(Standing())
        world.advance(0.25)
        assert client.body == SERVING + NOT_SERVING + SERVING
        assert not client.is_complete
        client.vanish()
        assert world.counters.grpc_watches == 0
        assert counted(world) == {Code.CANCELLED: 1}
        world.check_quiet(1)

    def test_it_may_be_silent_for_long(self) -> None:
        world = gateway()
        client = ask(world, WATCH)
        world.advance(100)
        assert not client.is_cut
        assert not client.is_complete
        assert world.counters.grpc_watches == 1

    def test_a_client_that_does_not_read(self) -> None:
        world = gateway()
        client = ask(world, WATCH, b"pool")
        client.block()
        for _ in range(4):
            world.pool.judge(down("b0", "b1"))
            world.advance(0.25)
            world.pool.judge(Standing())
            world.advance(0.25)
        assert client.body == SERVING, "it was given more"
        world.pool.judge(down("b0", "b1"))
        client.drain()
        assert client.body == SERVING + NOT_SERVING, "the newest"
        client.block()
        world.advance(3.5)
        assert client.is_cut
        assert world.counters.grpc_watches == 0
        world.check_quiet(1)

    def test_its_deadline(self) -> None:
        world = gateway()
        client = ask(world, WATCH, b"", (b"grpc-timeout", b"10S"))
        world.advance(10.25)
        assert client.trailers[0] == (b"grpc-status", b"4")
        assert world.counters.grpc_watches == 0
        world.check_quiet(1)

    def test_an_unknown_service_may_come(self) -> None:
        world = gateway()
        client = ask(world, WATCH, b"new")
        assert client.body == SERVICE_UNKNOWN
        before = world.service
        added = world.add_pool("new", ["d0"])
        world.reload(grpc=GrpcRules(300, Health({"new": added.pool}, world.counters)))
        world.service.succeed(before)
        world.advance(0.25)
        assert client.body == SERVICE_UNKNOWN + SERVING
        before = world.service
        world.reload(grpc=GrpcRules(300, Health({}, world.counters)))
        world.service.succeed(before)
        world.advance(0.25)
        assert client.body == SERVICE_UNKNOWN + SERVING + SERVICE_UNKNOWN

    def test_there_are_not_too_many(self) -> None:
        world = gateway()
        first = ask(world, WATCH)
        world.counters.grpc_watches = MAX_WATCHES
        only_refused = ask(world, WATCH)
        assert only_refused.header(b"grpc-status") == b"8"
        first.vanish()
        assert ask(world, WATCH).body == SERVING
        assert world.counters.grpc_watches == MAX_WATCHES

    def test_a_drain_ends_it(self) -> None:
        world = gateway()
        client = ask(world, WATCH)
        waiting = called(world, path=WATCH, end=False)
        ordinary = called(world)
        for exchange in world.exchanges:
            exchange.leave()
            exchange.leave()
        assert client.body == SERVING + NOT_SERVING
        assert client.trailers[0] == (b"grpc-status", b"14")
        assert client.is_complete
        assert not waiting.is_complete
        assert not ordinary.is_complete
        assert world.counters.grpc_watches == 0
