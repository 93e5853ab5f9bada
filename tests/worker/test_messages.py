"""What the supervisor says, and what a worker makes of it: whole snapshots and differences, names, health."""

from __future__ import annotations

import base64
import time
from typing import TYPE_CHECKING, Any

import pytest

from expressgateway.config.schema import Config
from expressgateway.net.http_listener import HttpListener
from expressgateway.observe.logs import LEVELS, level, set_level
from expressgateway.upstream.errors import Fault
from expressgateway.worker.process import Worker
from tests.net.loopback import Backend, Peer, World, refused_address, run
from tests.net.tls_peers import ca, site
from tests.worker.inside import SECRET, Inside, backends, listener, pool
from tests.worker.test_runtime import REQUEST, finish

if TYPE_CHECKING:
    from collections.abc import Callable

    from expressgateway.upstream.pool import Pool

NOWHERE = ("192.0.2.1", 80)


class Channel:
    """Remembers what the worker says."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


class Census:
    def set_limits(self, total: int, per_ip: int, is_exempt: Callable[[str], bool]) -> None:
        pass


class Scene:
    """A worker whose supervisor is the test."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.inside = Inside(world)
        self.runtime = self.inside.runtime
        self.channel = Channel()
        self.worker = Worker(0, self.runtime, self.channel, Census())  # type: ignore[arg-type]  # fakes of both
        self.version = 0

    async def tell(self, type_: str, **message: Any) -> None:
        await self.worker._obey({"type": type_, **message})

    async def _configured(self, **message: Any) -> str | None:
        self.version += 1
        secrets = {name: packed(secret) for name, secret in message.pop("secrets", {"": SECRET}).items()}
        files = {path: packed(content) for path, content in message.pop("files", {}).items()}
        await self.tell(
            "configure",
            **{"version": self.version, "answers": {}, "secrets": secrets, "files": files, **message},
        )
        answer = self.channel.sent.pop()
        assert (answer["type"], answer["version"]) == ("configured", self.version)
        error: str | None = answer["error"]
        if error is None:
            await self.tell("commit", handed=[])
        return error

    async def configure(
        self, *pools: dict[str, Any], web: dict[str, Any] | None = None, **more: Any
    ) -> str | None:
        """Whole; gives the error that the worker answers with, if any."""
        named = {key: more.pop(key) for key in list(more) if key in ("files", "secrets", "answers")}
        config = Config.model_validate(
            {"listeners": [web or listener("web", pool="p")], "pools": list(pools), **more}
        )
        return await self._configured(config=config.model_dump(mode="json"), **named)

    async def change(self, name: str, *found: dict[str, Any], **more: Any) -> str | None:
        """By difference: other backends of one pool."""
        config = Config.model_validate(
            {"listeners": [listener("web", pool=name)], "pools": [{"name": name, "backends": list(found)}]},
            context={"rules_later": True},
        )
        dumped = [each.model_dump(mode="json") for each in config.pools[0].backends]
        return await self._configured(backends={name: dumped}, **more)

    async def health(self, **pools: dict[str, Any]) -> None:
        empty: dict[str, Any] = {"panic": False, "down": [], "draining": [], "ramps": {}}
        await self.tell("health", pools={name: {**empty, **said} for name, said in pools.items()})

    @property
    def pool(self) -> Pool:
        return self.inside.pool("p")

    @property
    def listener(self) -> HttpListener:
        found = self.runtime._listeners[0]
        assert isinstance(found, HttpListener)
        return found

    def ids(self) -> list[str]:
        return [each.id for each in self.pool.backends]

    async def head(self) -> bytes:
        """What a client is answered that no backend answers."""
        client = self.inside.call()
        await client.send(REQUEST)
        head = await client.read_until(b"\r\n\r\n")
        client.close()
        await self.world.until(lambda: not self.listener.open)
        return head

    async def served(self, there: Backend) -> None:
        client = self.inside.call()
        await client.send(REQUEST)
        peer: Peer = await there.accept()
        assert await finish(client, peer) == b"HTTP/1.1 200 OK"
        for each in (client, peer):
            each.close()
        await self.world.until(lambda: not self.listener.open)


def packed(data: bytes) -> str:
    return base64.b64encode(data).decode()


def backend(id_: str, address: tuple[str, int] = NOWHERE, **more: Any) -> dict[str, Any]:
    return {"id": id_, "address": f"{address[0]}:{address[1]}", **more}


class TestConfigure:
    def test_by_difference_only_that_pool_changes(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            web = listener("web", "h1s", pool="p", tls={"cert_path": "/c.pem", "key_path": "/k.pem"})
            files = {"/c.pem": site("a.test").pem, "/k.pem": site("a.test").key_pem()}
            assert await scene.configure(pool("p", NOWHERE), web=web, files=files) is None
            known, tls, service = scene.pool, scene.listener.tls, scene.listener.service
            (b0,) = known.backends
            assert await scene.change("p", backend("b0", weight=7), backend("new")) is None
            assert scene.ids() == ["b0", "new"]
            assert (scene.pool is known, known.backends[0] is b0, b0.weight) == (True, True, 7)
            assert (scene.listener.tls is tls, scene.listener.service is service) == (True, True)
            assert await scene.change("p", backend("new")) is None
            assert scene.ids() == ["new"]
            await scene.inside.close()

        run(test)

    def test_there_must_be_something_to_differ_from(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            assert await scene.change("p", backend("b0")) == "there is no configuration to be changed yet"
            await scene.inside.close()

        run(test)

    def test_files_that_did_not_change_are_kept(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            secure: dict[str, Any] = {"tls": True, "tls_ca_path": "/ca.pem"}
            assert await scene.configure(pool("p", NOWHERE, **secure), files={"/ca.pem": ca().pem}) is None
            contexts = dict(scene.runtime._diallers.h1.contexts)
            assert await scene.change("p", backend("b0", **secure), backend("b1", **secure)) is None
            assert scene.runtime._diallers.h1.contexts == contexts
            other: dict[str, Any] = {**secure, "tls_ca_path": "/other.pem"}
            error = await scene.change(
                "p", backend("b0", **secure), backend("b2", **other), files={"/other.pem": site("a.test").pem}
            )
            assert error is None
            assert len(scene.runtime._diallers.h1.contexts) == 2
            for settings, context in contexts.items():
                assert scene.runtime._diallers.h1.contexts[settings] is context
            await scene.inside.close()

        run(test)

    def test_a_whole_one_that_says_the_same_rebuilds_no_tls(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            web = listener("web", "h1s", pool="p", tls={"cert_path": "/c.pem", "key_path": "/k.pem"})
            files = {"/c.pem": site("a.test").pem, "/k.pem": site("a.test").key_pem()}
            secure: dict[str, Any] = {"tls": True, "tls_ca_path": "/ca.pem"}
            both = {**files, "/ca.pem": ca().pem}
            assert await scene.configure(pool("p", NOWHERE, **secure), web=web, files=both) is None
            tls, contexts = scene.listener.tls, list(scene.runtime._diallers.h1.contexts.values())
            more = {**web, "http": {"total_timeout_ms": 1234}}
            assert await scene.configure(pool("p", NOWHERE, **secure), web=more, files=both) is None
            assert scene.listener.tls is tls
            assert list(scene.runtime._diallers.h1.contexts.values()) == contexts
            assert scene.listener.service.timeouts.total == 1.234
            other = {"/c.pem": site("b.test").pem, "/k.pem": site("b.test").key_pem()}
            assert await scene.configure(pool("p", NOWHERE), web=more, files={**both, **other}) is None
            assert scene.listener.tls is not tls
            tls = scene.listener.tls
            await scene.configure(
                pool("p", NOWHERE),
                web=more,
                files={**both, **other},
                runtime={"tls": {"min_version": "1.3"}},
            )
            assert scene.listener.tls is not tls
            await scene.inside.close()

        run(test)

    @pytest.mark.parametrize(
        ("policy", "says"),
        [
            ("no_such_module_at_all:Policy", "cannot be imported: ModuleNotFoundError"),
            ("json:Policy", "json has no Policy"),
            ("json:loads", "fails without backends"),
        ],
    )
    def test_a_policy_that_is_none_is_refused_with_a_sentence(self, policy: str, says: str) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            assert await scene.configure(pool("p", NOWHERE)) is None
            plan, known = scene.runtime._plan, scene.pool.backends
            settings = {"load_balancing": {"policy": policy}}
            error = await scene.configure(pool("p", ("192.0.2.2", 80), settings=settings))
            assert error is not None
            assert error.startswith(f"pool p: the balancing policy '{policy}'")
            assert says in error
            assert scene.runtime._plan is plan
            assert scene.pool.backends == known
            await scene.inside.close()

        run(test)

    def test_a_thousand_backends(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            many = [
                backend(f"b{number}", (f"192.0.{number // 250}.{number % 250 + 1}", 80))
                for number in range(1000)
            ]
            for policy in ("maglev", "least_requests"):
                settings = {"load_balancing": {"policy": policy}}
                error = await scene.configure(
                    {"name": "p", "backends": many, **settings},
                    observability={"max_label_cardinality": 20_000},
                )
                assert error is None
                known = scene.pool.backends
                assert len(known) == 1000
                began = time.process_time()
                assert await scene.change("p", *many, backend("one-more")) is None
                took_s = time.process_time() - began
                assert scene.pool.backends[:1000] == known
                assert all(one is other for one, other in zip(scene.pool.backends, known, strict=False))
                assert took_s < 1.0
                assert scene.pool.pick(b"key") is not None
            await world.until(lambda: not scene.pool._is_growing)
            await scene.inside.close()

        run(test)


class TestEmptied:
    def test_a_pool_that_is_emptied_says_so_until_it_is_filled(self) -> None:
        async def test(world: World) -> None:
            there = Backend()
            scene = Scene(world)
            await scene.configure(pool("p", there.address))
            await scene.tell("serve")
            await scene.served(there)
            assert await scene.change("p") is None
            assert scene.pool.empty_fault is Fault.NO_BACKEND
            assert b'details="no backend"' in await scene.head()
            assert await scene.change("p", backend("b9", there.address)) is None
            await scene.served(there)
            await scene.inside.close()
            there.close()

        run(test)

    def test_so_does_a_listeners_own(self) -> None:
        async def test(world: World) -> None:
            there = Backend()
            scene = Scene(world)
            await scene.configure(web=listener("web", backends=backends(there.address)))
            await scene.tell("serve")
            await scene.served(there)
            for _ in range(2):
                assert await scene.change("web") is None
                assert b'details="no backend"' in await scene.head()
                assert await scene.change("web", backend("b0", there.address)) is None
                await scene.served(there)
            await scene.inside.close()
            there.close()

        run(test)

    def test_all_weights_zero(self) -> None:
        async def test(world: World) -> None:
            there = Backend()
            scene = Scene(world)
            await scene.configure(pool("p", there.address))
            await scene.tell("serve")
            assert await scene.change("p", backend("b0", there.address, weight=0)) is None
            head = await scene.head()
            assert head.startswith(b"HTTP/1.1 503 ")
            assert await scene.change("p", backend("b0", there.address, weight=1)) is None
            await scene.served(there)
            await scene.inside.close()
            there.close()

        run(test)


class TestAnswers:
    def test_say_who_is_there_now(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            error = await scene.configure(
                pool("p", ("a.test", 80), ("192.0.2.9", 81)), answers={"a.test": [["192.0.2.1", 0, 0]]}
            )
            assert error is None
            assert scene.ids() == ["b0#192.0.2.1", "b1"]
            stays = scene.pool.backends[0]
            await scene.tell("answers", names={"a.test": [["192.0.2.2", 0, 0], ["192.0.2.1", 0, 0]]})
            assert scene.ids() == ["b0#192.0.2.2", "b0#192.0.2.1", "b1"]
            assert scene.pool.backends[1] is stays
            await scene.tell("answers", names={"a.test": []})
            assert scene.ids() == ["b1"]
            await scene.inside.close()

        run(test)

    def test_that_change_nothing_touch_nothing(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.configure(pool("p", ("a.test", 80)), answers={"a.test": [["192.0.2.1", 0, 0]]})
            selection = scene.pool.selection
            await scene.tell("answers", names={"a.test": [["192.0.2.1", 0, 0]], "b.test": []})
            assert scene.pool.selection is selection
            await scene.inside.close()

        run(test)

    def test_of_services(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            error = await scene.configure(
                {"name": "p", "backends": [{"id": "s", "address": "_http._tcp.a.test", "weight": 2}]},
                answers={"srv:_http._tcp.a.test": [["192.0.2.1", 8080, 3]]},
            )
            assert error is None
            (found,) = scene.pool.backends
            assert (found.id, found.address, found.weight) == ("s#192.0.2.1:8080", ("192.0.2.1", 8080), 6)
            await scene.inside.close()

        run(test)

    def test_before_there_is_a_configuration(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.tell("answers", names={"a.test": [["192.0.2.1", 0, 0]]})
            await scene.health(p={"down": ["b0"]})
            assert await scene.configure(pool("p", NOWHERE)) is None
            assert scene.pool.backends[0].is_down
            await scene.inside.close()

        run(test)


class TestHealth:
    def test_of_backends_that_are_not_there_yet(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            slow = {"load_balancing": {"slow_start_ms": 1000}}
            await scene.configure(pool("p", NOWHERE, settings=slow))
            await scene.health(
                p={"down": ["x"], "draining": ["y"], "ramps": {"z": 12.5}}, nowhere={"down": ["q"]}
            )
            assert scene.pool.backends[0].is_available
            error = await scene.change("p", backend("b0"), backend("x"), backend("y"), backend("z"))
            assert error is None
            _, x, y, z = scene.pool.backends
            assert (x.is_down, y.is_draining, z.ramp_from) == (True, True, 12.5)
            await scene.health(p={})
            assert all(each.is_available and not each.ramp_from for each in scene.pool.backends)
            await scene.inside.close()

        run(test)

    def test_of_one_pool_says_nothing_of_others(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            web = listener("web", pool="p", routes=[{"match": {"path": "/q"}, "pool": "q"}])
            assert await scene.configure(pool("p", NOWHERE), pool("q", NOWHERE), web=web) is None
            await scene.health(p={"down": ["b0"], "panic": True}, q={"down": ["b0"]})
            await scene.health(q={})
            assert scene.pool.backends[0].is_down
            assert scene.pool.standing.is_panicking
            assert not scene.inside.pool("q").backends[0].is_down
            await scene.inside.close()

        run(test)

    def test_a_pool_that_comes_back_begins_anew(self) -> None:
        """The supervisor forgot it, too, and says nothing of those that are well."""

        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.configure(pool("p", NOWHERE))
            await scene.health(p={"down": ["b0"]})
            await scene.configure(pool("q", NOWHERE), web=listener("web", pool="q"))
            await scene.configure(pool("p", NOWHERE))
            assert scene.pool.backends[0].is_available
            await scene.inside.close()

        run(test)


class TestOutcomes:
    def test_are_reported_once_per_sweep(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.configure(pool("p", NOWHERE), runtime={"watchdog": {"sweep_interval_ms": 100}})
            (b0,) = scene.pool.backends
            scene.channel.sent.clear()
            scene.runtime._sweep()
            assert scene.channel.sent == []  # nothing happened, nothing is said
            b0.good += 3
            scene.pool.failed(b0, "reset")
            scene.runtime._sweep()
            scene.runtime._sweep()
            assert scene.channel.sent == [{"type": "outcomes", "pools": {"p": {"b0": [3, 1, 1, "reset"]}}}]
            await scene.inside.close()

        run(test)

    def test_and_at_once_when_a_backend_keeps_failing(self) -> None:
        async def test(world: World) -> None:
            there = refused_address()
            scene = Scene(world)
            await scene.configure(pool("p", there, settings={"outlier": {"consecutive_failures": 2}}))
            for _ in range(2):
                assert [each for each in scene.channel.sent if each["type"] == "outcomes"] == []
                assert b" 50" in await scene.head()
            await world.until(lambda: scene.channel.sent)
            (said,) = scene.channel.sent
            assert said["pools"]["p"]["b0"][:3] == [0, 2, 2]
            await scene.inside.close()

        run(test)


class TestSecrets:
    def cookies(self, **more: Any) -> dict[str, Any]:
        cookie = {"name": "s", **more}
        return {"load_balancing": {"policy": "session_affinity", "table_size": 251, "cookie": cookie}}

    def test_two_workers_know_each_others_cookies(self) -> None:
        async def test(world: World) -> None:
            one, other, stranger = Scene(world), Scene(world), Scene(world)
            settings = self.cookies(secret_path="/secret")
            for scene, secret in ((one, b"1" * 32), (other, b"1" * 32), (stranger, b"2" * 32)):
                error = await scene.configure(
                    pool("p", NOWHERE, ("192.0.2.2", 80), settings=settings),
                    secrets={"": SECRET, "/secret": secret},
                )
                assert error is None
            mine, theirs, strange = (scene.pool.sessions for scene in (one, other, stranger))
            assert mine is not None
            assert theirs is not None
            assert strange is not None
            for here, there in zip(one.pool.backends, other.pool.backends, strict=True):
                assert theirs.bound(mine.token(here)) is there
                assert strange.bound(mine.token(here)) is None
            for scene in (one, other, stranger):
                await scene.inside.close()

        run(test)

    def test_kept_by_a_difference_and_changed_by_a_whole_one(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            settings = self.cookies()
            assert await scene.configure(pool("p", NOWHERE, settings=settings)) is None
            sessions = scene.pool.sessions
            assert sessions is not None
            token = sessions.token(scene.pool.backends[0])
            assert await scene.change("p", backend("b0"), backend("b1")) is None
            assert scene.pool.pick_bound(token) is scene.pool.backends[0]
            error = await scene.configure(pool("p", NOWHERE, settings=settings), secrets={"": b"x" * 32})
            assert error is None
            assert scene.pool.pick_bound(token) is None
            await scene.inside.close()

        run(test)


class TestTold:
    def test_connections(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            assert await scene.configure(pool("p", NOWHERE)) is None
            scene.runtime.serve()
            client = scene.inside.call()
            await world.until(lambda: scene.listener.open == 1)
            for limit, listed in ((5, 1), (0, 0), (-1, 0)):
                await scene.tell("connections", id=3, limit=limit)
                said = scene.channel.sent.pop()
                assert (said["type"], said["id"], said["looked_at"]) == ("connections", 3, 1)
                assert said["counts"] == {"web": {"HTTP/1.1": 1}}
                assert len(said["listed"]) == listed
            client.close()
            await world.until(lambda: not scene.listener.open)
            await scene.inside.close()

        run(test)

    def test_log_level(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            before = level()
            try:
                for name in LEVELS:
                    await scene.tell("log_level", level=name)
                    assert level() == name
            finally:
                set_level(before)
            await scene.inside.close()

        run(test)


class TestFaults:
    def test_a_message_that_fails_is_not_the_last(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A policy of somebody else's may raise: the worker goes on listening."""

        async def test(world: World) -> None:
            scene = Scene(world)
            said: list[dict[str, Any] | None] = [{"type": "answers", "names": {}}, {"type": "ping", "id": 7}]

            async def receive() -> dict[str, Any] | None:
                if not said:
                    raise EOFError
                return said.pop(0)

            def fail(_: object) -> None:
                raise RuntimeError("somebody else's")

            monkeypatch.setattr(scene.channel, "receive", receive, raising=False)
            monkeypatch.setattr(scene.runtime, "set_answers", fail)
            with pytest.raises(EOFError):
                await scene.worker._listen()
            assert scene.channel.sent == [{"type": "pong", "id": 7}]
            await scene.inside.close()

        run(test)
