"""How relays use their pool: keys, limits and waiting, attempts, outcomes, and what health decides."""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from expressgateway.l4.tcp import Relay, TcpListener
from expressgateway.net.listener import limited as log_limits
from expressgateway.net.stream import STUCK_S
from expressgateway.upstream.pool import Standing
from tests.net.loopback import Backend, Peer, World, is_reset, refused_address, run
from tests.net.tls_peers import site, trusting
from tests.worker.inside import Inside, listener, pool

if TYPE_CHECKING:
    from expressgateway.upstream.pool import Pool

MAGLEV = {"load_balancing": {"policy": "maglev", "table_size": 251}}
AFFINITY = {
    "load_balancing": {"policy": "session_affinity", "hash_key": "client_ip", "table_size": 251},
}
TLS = {"/c.pem": site("a.test").pem, "/k.pem": site("a.test").key_pem()}


@pytest.fixture(autouse=True)
def _fresh_log_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_limits, "_since", {})


class Scene:
    """A listener before several backends, each of which says its number first."""

    def __init__(self, world: World, count: int = 2) -> None:
        self.world = world
        self.theirs = [Backend() for _ in range(count)]
        self.addresses = [each.address for each in self.theirs]
        self.inside = Inside(world)
        self.peers: list[Peer] = []

    async def begin(self, settings: dict[str, Any] | None = None, **more: Any) -> None:
        await self.configure(settings, **more)
        self.listener.start()

    async def configure(
        self, settings: dict[str, Any] | None = None, *, protocol: str = "tcp", **more: Any
    ) -> None:
        tls = {"tls": {"cert_path": "/c.pem", "key_path": "/k.pem"}} if protocol == "tls" else {}
        raw = listener("raw", protocol, pool="p", **tls, **more.pop("door", {}))
        backends = more.pop("pool", None) or pool("p", *self.addresses, settings=settings)
        await self.inside.configure(raw, pools=[backends], files=TLS, **more)

    @property
    def pool(self) -> Pool:
        return self.inside.pool("p")

    @property
    def listener(self) -> TcpListener:
        found = self.inside.runtime._listeners[0]
        assert isinstance(found, TcpListener)
        return found

    def call(self) -> Peer:
        client = self.inside.call()
        self.peers.append(client)
        return client

    async def served(self, client: Peer, index: int) -> Peer:
        """The backend with this index takes the client's connection: what each says, the other hears."""
        peer = await self.theirs[index].accept()
        self.peers.append(peer)
        await peer.send(b"%d" % index)
        assert await client.read_exactly(1) == b"%d" % index
        return peer

    async def index_for(self, client: Peer) -> int:
        """Which backend the client has; whichever it is, answers."""
        relays = self.listener.open
        await self.world.until(lambda: sum(each.in_flight for each in self.pool.backends) == relays)
        for index in range(len(self.theirs)):
            try:
                sock, _ = self.theirs[index].sock.accept()
            except BlockingIOError:
                continue
            self.peers.append(Peer(sock))
            await self.peers[-1].send(b"%d" % index)
            assert await client.read_exactly(1) == b"%d" % index
            return index
        raise AssertionError("no backend was called")

    async def leave(self, *peers: Peer) -> None:
        """Close, and wait until the gateway knows."""
        inside = self.listener.open
        for peer in peers:
            peer.close()
        await self.world.until(lambda: self.listener.open == inside - 1)

    async def close(self) -> None:
        for backend in self.theirs:
            backend.close()  # first: what it has not accepted ends with it
        for peer in self.peers:
            peer.close()
        await self.world.until(lambda: not self.listener.open)
        await self.inside.close()


class TestKeys:
    @pytest.mark.parametrize("settings", [MAGLEV, AFFINITY])
    def test_a_client_has_one_backend_through_whatever_proxy(self, settings: dict[str, Any]) -> None:
        async def test(world: World) -> None:
            scene = Scene(world, 3)
            await scene.begin(
                settings, door={"proxy_protocol": True}, runtime={"trusted_proxies": ["127.0.0.0/8"]}
            )
            found: dict[str, set[int]] = {}
            for number in range(24):
                ip = f"192.0.2.{number % 8}"
                client = scene.call()
                await client.send(f"PROXY TCP4 {ip} 198.51.100.1 {4000 + number} 443\r\n".encode())
                await world.until(lambda: scene.pool.load.in_flight, "dialled")
                found.setdefault(ip, set()).add(await scene.index_for(client))
                await scene.leave(client, scene.peers[-1])
            assert all(len(backends) == 1 for backends in found.values())
            assert len(set.union(*found.values())) > 1
            await scene.close()

        run(test)

    def test_sessions_survive_a_change_that_moves_keys(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world, 2)
            await scene.begin(AFFINITY)
            client = scene.call()
            await world.until(lambda: scene.pool.load.in_flight)
            bound = await scene.index_for(client)
            await scene.leave(client, scene.peers[-1])
            # Whatever the table says now, and although it gets nothing new any more:
            backends = pool("p", *scene.addresses, settings=AFFINITY)
            backends["backends"][bound]["weight"] = 0
            await scene.configure(pool=backends)
            again = scene.call()
            peer = await scene.served(again, bound)
            await scene.leave(again, peer)
            scene.pool.judge(Standing(draining=frozenset([f"b{bound}"])))
            again = scene.call()
            peer = await scene.served(again, bound)
            await scene.leave(again, peer)
            scene.pool.judge(Standing(down=frozenset([f"b{bound}"])))
            other = scene.call()
            await scene.served(other, 1 - bound)
            await scene.close()

        run(test)


class TestLimits:
    @pytest.mark.parametrize(
        "limit", ["max_connections", "max_requests", "pool_max_connections", "pool_max_requests"]
    )
    def test_a_client_waits_until_another_leaves(self, limit: str) -> None:
        async def test(world: World) -> None:
            scene = Scene(world, 1)
            await scene.begin({"circuit_breaker": {limit: 1}})
            first = scene.call()
            there = await scene.served(first, 0)
            second, third = scene.call(), scene.call()
            await world.until(lambda: len(scene.pool.queue) == 2)
            await second.send(b"early")
            await world.turns()
            assert (scene.pool.load.open, scene.pool.load.in_flight) == (1, 1)
            assert scene.listener.counters.relayed == [0, 1]  # nothing is read before there is a backend
            assert await world.batches_in() == 0
            await scene.leave(first, there)
            peer = await scene.served(second, 0)
            assert await peer.read_exactly(5) == b"early"
            assert len(scene.pool.queue) == 1
            await scene.leave(second, peer)
            await scene.served(third, 0)
            assert (scene.pool.queue.waited, scene.pool.queue.timeouts) == (2, 0)
            await scene.close()

        run(test)

    def test_who_waits_too_long_is_reset(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world, 1)
            await scene.begin({"circuit_breaker": {"max_connections": 1, "pending_timeout_ms": 700}})
            first = scene.call()
            await scene.served(first, 0)
            second = scene.call()
            await world.until(lambda: scene.pool.queue)
            now = scene.inside.runtime.reactor.now
            scene.pool.sweep(now + 0.5)
            scene.listener.sweep(now + 3600)  # no other clock runs for it
            assert len(scene.pool.queue) == 1
            scene.pool.sweep(now + 1.0)
            assert await is_reset(second)
            assert dict(scene.listener.counters.relay_errors) == {"queue_timeout": 1, "idle": 1}
            await scene.close()

        run(test)

    def test_a_full_queue_refuses(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world, 1)
            await scene.begin({"circuit_breaker": {"max_connections": 1, "max_pending": 1}})
            await scene.served(scene.call(), 0)
            scene.call()
            await world.until(lambda: scene.pool.queue)
            assert await is_reset(scene.call())
            assert dict(scene.listener.counters.relay_errors) == {"saturated": 1}
            assert scene.pool.queue.refused == 1
            await scene.close()

        run(test)

    @pytest.mark.parametrize("protocol", ["tcp", "tls"])
    def test_who_leaves_gives_up_its_place(self, protocol: str) -> None:
        async def test(world: World) -> None:
            scene = Scene(world, 1)
            await scene.begin({"circuit_breaker": {"max_connections": 1}}, protocol=protocol)
            (backend,) = scene.pool.backends
            backend.opened()  # all there is has been taken
            gone, stays = scene.call(), scene.call()
            if protocol == "tls":
                await shake_hands(gone)
                await shake_hands(stays)
            await world.until(lambda: len(scene.pool.queue) == 2)
            gone.reset()
            await world.until(lambda: len(scene.pool.queue) == 1)
            backend.closed()
            scene.peers.append(await scene.theirs[0].accept())
            assert scene.listener.open == 1
            assert not scene.listener.counters.relay_errors
            assert {result for _, _, result in scene.listener.counters.handshakes} <= {"ok"}
            await scene.close()

        run(test)

    def test_a_pool_that_is_taken_away_tells_those_who_wait(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world, 1)
            breaker = {"circuit_breaker": {"max_connections": 1, "pending_timeout_ms": 200}}
            await scene.configure(breaker, runtime={"watchdog": {"sweep_interval_ms": 100}})
            scene.inside.runtime.serve()
            await scene.served(scene.call(), 0)
            waiting = scene.call()
            await world.until(lambda: scene.pool.queue)
            old = scene.pool
            await scene.inside.configure(
                listener("raw", "tcp", pool="q"),
                pools=[pool("q", scene.addresses[0])],
                runtime={"watchdog": {"sweep_interval_ms": 100}},
            )
            assert await is_reset(waiting)
            await world.until(lambda: not scene.inside.runtime._retired)
            assert old.queue.timeouts == 1
            assert scene.listener.open == 1  # the first one goes on
            await scene.close()

        run(test)

    def test_another_attempt_passes_those_who_wait(self) -> None:
        """Its place in the pool is its own until it has another."""

        async def test(world: World) -> None:
            scene = Scene(world, 1)
            there = scene.addresses[0]
            breaker = {"circuit_breaker": {"pool_max_requests": 1, "pool_max_connections": 1}}
            await scene.begin(pool=pool("p", refused_address(), there, settings=breaker))
            first = scene.call()
            scene.listener._accept()
            second = scene.call()
            scene.listener._accept()
            assert (scene.pool.backends[0].in_flight, len(scene.pool.queue)) == (1, 1)
            peer = await scene.served(first, 0)
            assert len(scene.pool.queue) == 1
            await scene.leave(first, peer)
            await scene.served(second, 0)
            await scene.close()

        run(test)


class TestAttempts:
    @pytest.mark.parametrize(
        ("retry", "attempts"),
        [
            (None, 3),
            ({"attempts": 1}, 1),
            ({"attempts": 2}, 2),
            ({"attempts": 9}, 3),
        ],
    )
    def test_no_more_than_so_many(self, retry: dict[str, Any] | None, attempts: int) -> None:
        async def test(world: World) -> None:
            scene = Scene(world, 0)
            settings = {"retry": retry} if retry is not None else {}
            refused = [refused_address() for _ in range(3)]
            await scene.begin(pool=pool("p", *refused, settings=settings))
            for _ in range(2):  # by the first configuration and by a reload
                for each in scene.pool.backends:
                    each.connect_failures = 0
                scene.pool.retries.clear()
                assert await is_reset(scene.call())
                assert sum(each.connect_failures for each in scene.pool.backends) == attempts
                assert scene.pool.retries.get("connect", 0) == attempts - 1
                await scene.configure(pool=pool("p", *refused, settings=settings))
            await scene.close()

        run(test)


class TestOutcomes:
    def test_of_connecting(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world, 1)
            there = scene.addresses[0]
            await scene.begin(pool=pool("p", refused_address(), there))
            await scene.served(scene.call(), 0)
            outcomes = scene.pool.take_outcomes()
            assert outcomes == {
                "b0": [0, 1, 1, "the backend refused the connection"],
                "b1": [1, 0, 0, ""],
            }
            await scene.close()

        run(test)

    def test_a_client_that_leaves_while_dialling_says_nothing_of_the_backend(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world, 1)
            await scene.begin()
            scene.call()
            scene.listener._accept()
            scene.listener.go_away()
            assert scene.pool.take_outcomes() == {}
            await scene.close()

        run(test)

    def test_a_streak_is_told_at_once(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world, 0)
            bad = pool("p", refused_address(), settings={"outlier": {"consecutive_failures": 3}})
            await scene.begin(pool=bad)
            for _ in range(3):
                assert scene.inside.said == []
                assert await is_reset(scene.call())
            await world.until(lambda: scene.inside.said)
            (said,) = scene.inside.said
            assert said["type"] == "outcomes"
            assert said["pools"] == {"p": {"b0": [0, 3, 3, "the backend refused the connection"]}}
            await scene.close()

        run(test)

    def test_connecting_is_measured(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world, 1)
            await scene.begin({"load_balancing": {"policy": "ewma"}})
            await scene.served(scene.call(), 0)
            selection: Any = scene.pool.selection
            assert 0 < selection._known["b0"].average_s < 2
            await scene.close()

        run(test)


class TestHealth:
    @pytest.mark.parametrize("said", [Standing(draining=frozenset(["b0"])), Standing(down=frozenset(["b0"]))])
    def test_no_new_connections_and_those_there_go_on(self, said: Standing) -> None:
        async def test(world: World) -> None:
            scene = Scene(world, 2)
            await scene.begin()
            first = scene.call()
            there = await scene.served(first, 0)
            scene.pool.judge(said)
            for _ in range(3):
                client = scene.call()
                await scene.leave(client, await scene.served(client, 1))
            await first.send(b"still")
            assert await there.read_exactly(5) == b"still"
            await there.send(b"here")
            assert await first.read_exactly(4) == b"here"
            await scene.close()

        run(test)

    def test_with_all_down_the_client_is_reset_and_the_reason_counted(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world, 2)
            await scene.begin({"circuit_breaker": {"max_connections": 1}})
            scene.pool.judge(Standing(down=frozenset(["b0", "b1"])))
            assert await is_reset(scene.call())
            assert dict(scene.listener.counters.relay_errors) == {"backends_down": 1}
            assert len(scene.pool.queue) == 0
            scene.pool.judge(Standing(down=frozenset(["b1"])))
            await scene.served(scene.call(), 0)
            await scene.close()

        run(test)


async def shake_hands(client: Peer) -> None:
    """A TLS handshake, after which the connection is only closed."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = trusting().wrap_bio(incoming, outgoing, server_hostname="a.test")
    while True:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            await client.send(outgoing.read())
            incoming.write(await client.read())
        else:
            await client.send(outgoing.read())
            return


class TestEnd:
    def test_a_backend_that_does_not_take_the_rest_is_given_up(self) -> None:
        """Both sides have ended and the client is gone: what is left for the backend is still watched."""

        async def test(world: World) -> None:
            scene = Scene(world, 1)
            await scene.begin()
            client = scene.call()
            peer = await scene.served(client, 0)
            (relay,) = scene.listener.connections()
            assert isinstance(relay, Relay)
            upstream = relay._upstream.stream
            assert upstream is not None
            client.sock.setblocking(False)
            while not upstream.backlog_bytes:
                with suppress(BlockingIOError):
                    client.sock.send(bytes(4096))
                await world.turns()
            client.sock.shutdown(socket.SHUT_WR)
            peer.sock.shutdown(socket.SHUT_WR)
            await world.until(lambda: relay._client.stream is not None and relay._client.stream.is_closed)
            (backend,) = scene.pool.backends
            assert (scene.listener.open, backend.in_flight) == (1, 1)
            for seconds in (1, 2 + STUCK_S):
                scene.listener.sweep(world.reactor.now + seconds)
            assert (scene.listener.open, backend.in_flight, backend.open) == (0, 0, 0)
            await scene.close()

        run(test)
