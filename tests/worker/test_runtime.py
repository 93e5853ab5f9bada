"""From one snapshot to the next while connections are open: what is swapped, what stays, what retires."""

from __future__ import annotations

from typing import Any

import pytest

from expressgateway.config.schema import Config
from expressgateway.observe.counters import FAMILIES
from expressgateway.upstream.errors import Fault
from expressgateway.worker.build_pools import SnapshotError
from expressgateway.worker.memory import keep_the_heap
from tests.net.loopback import Backend, Peer, World, refused_address, run
from tests.net.tls_peers import issue, site
from tests.worker.inside import SECRET, Inside, listener, pool

REQUEST = b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def answered(client: Peer, backend: Peer, answer: bytes = OK) -> bytes:
    """One exchange on connections that are open."""
    await client.send(REQUEST)
    return await finish(client, backend, answer)


async def finish(client: Peer, backend: Peer, answer: bytes = OK) -> bytes:
    await backend.read_until(b"\r\n\r\n")
    await backend.send(answer)
    head = await client.read_until(b"\r\n\r\n")
    await client.read_exactly(2)
    return head.partition(b"\r\n")[0]


class TestConfigure:
    def test_a_second_snapshot_keeps_pools_backends_and_their_connections(self) -> None:
        async def test(world: World) -> None:
            there = Backend()
            inside = Inside(world)
            pools = [pool("p", there.address)]
            await inside.configure(listener("web", pool="p"), pools=pools)
            inside.runtime.serve()
            client = inside.call()
            await client.send(REQUEST)
            peer = await there.accept()
            assert await finish(client, peer) == b"HTTP/1.1 200 OK"

            known, backend = inside.pool("p"), inside.pool("p").backends[0]
            service = inside.runtime._listeners[0].service  # type: ignore[union-attr]  # an HTTP listener
            await inside.configure(
                listener("web", pool="p", http={"total_timeout_ms": 4321}),
                pools=[pool("p", there.address, weight=3)],
            )
            swapped = inside.runtime._listeners[0].service  # type: ignore[union-attr]  # as above
            assert swapped is not service
            assert swapped.timeouts.total == swapped.default.timeouts.total == 4.321
            assert swapped.counters is service.counters
            assert inside.pool("p") is known
            assert inside.pool("p").backends[0] is backend
            assert backend.weight == 3
            assert await answered(client, peer) == b"HTTP/1.1 200 OK"  # both connections are the old ones
            assert (backend.leases, backend.reused) == (2, 1)
            for each in (client, peer):
                each.close()
            await inside.close()
            there.close()

        run(test)

    def test_an_exchange_ends_as_it_began(self) -> None:
        """Its pool was taken out of the configuration meanwhile."""

        async def test(world: World) -> None:
            old, new = Backend(), Backend()
            inside = Inside(world)
            await inside.configure(listener("web", pool="p"), pools=[pool("p", old.address)])
            inside.runtime.serve()
            client = inside.call()
            await client.send(REQUEST)
            peer = await old.accept()
            await peer.read_until(b"\r\n\r\n")
            await inside.configure(listener("web", pool="q"), pools=[pool("q", new.address)])
            inside.runtime._sweep()
            assert [each.name for each in inside.runtime._retired] == ["p"]
            await peer.send(OK)
            assert (await client.read_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            await client.read_exactly(2)
            assert await peer.read_all() == b""  # not kept: its backend is leaving
            inside.runtime._sweep()
            assert inside.runtime._retired == []
            await client.send(REQUEST)
            other = await new.accept()
            assert await finish(client, other) == b"HTTP/1.1 200 OK"
            for each in (client, peer, other):
                each.close()
            await inside.close()
            old.close()
            new.close()

        run(test)

    def test_a_listener_that_goes_keeps_its_pool_till_the_last_connection(self) -> None:
        """A client of it may ask once more: it is answered, and told to leave."""

        async def test(world: World) -> None:
            there = Backend()
            inside = Inside(world, 2)
            both = listener("web", pool="p"), {**listener("other", pool="q"), "address": "127.0.0.1:2"}
            pools = [pool("p", there.address), pool("q", there.address)]
            await inside.configure(*both, pools=pools)
            runtime = inside.runtime
            runtime.serve()
            client = inside.call()
            await client.send(REQUEST)
            peer = await there.accept()
            assert await finish(client, peer) == b"HTTP/1.1 200 OK"
            without = Config.model_validate({"listeners": [both[1]], "pools": pools[1:]})
            runtime.configure(without, {}, {"": SECRET}, {}, [1])
            runtime.commit()
            runtime._sweep()
            assert (runtime._retired, [each.name for each in runtime._parting]) == ([], ["p"])
            await client.send(REQUEST)
            assert await finish(client, peer) == b"HTTP/1.1 200 OK"
            await world.until(lambda: not runtime._listeners.are_retiring)
            runtime._sweep()
            assert runtime._parting == []
            for each in (client, peer):
                each.close()
            await inside.close()
            there.close()

        run(test)

    @pytest.mark.parametrize("is_taken_back", [False, True])
    def test_a_listener_that_relays_from_now_on(self, is_taken_back: bool) -> None:
        """Its pool goes by its name, as before; clients of before are answered as they were."""

        async def test(world: World) -> None:
            there = Backend()
            inside = Inside(world)
            web = listener("web", backends=[{"address": f"127.0.0.1:{there.address[1]}"}])
            await inside.configure(web)
            runtime = inside.runtime
            runtime.serve()
            client = inside.call()
            await client.send(REQUEST)
            peer = await there.accept()
            assert await finish(client, peer) == b"HTTP/1.1 200 OK"
            before = inside.pool("web")
            raw = Config.model_validate({"listeners": [{**web, "protocol": "tcp"}], "pools": []})
            runtime.give(1, inside.sockets[0].dup())
            runtime.configure(raw, {}, {"": SECRET}, {}, [1])
            if is_taken_back:
                await inside.configure(web)
                assert inside.pool("web") is before
            else:
                runtime.commit()
                assert inside.pool("web") is not before
            runtime._sweep()
            await client.send(REQUEST)
            assert await finish(client, peer) == b"HTTP/1.1 200 OK"
            client.close()
            await world.until(lambda: not runtime._listeners.are_retiring)
            runtime._sweep()
            assert (runtime._replaced, runtime._parting) == ({}, [])
            peer.close()
            await inside.close()
            there.close()

        run(test)

    def test_a_pool_that_changes_from_relay_to_http(self) -> None:
        async def test(world: World) -> None:
            there = Backend()
            inside = Inside(world, 2)
            pools = [pool("p", there.address), pool("q", there.address)]
            web, raw = listener("web", pool="q"), listener("raw", "tcp", pool="p")
            raw["address"] = "127.0.0.1:2"
            await inside.configure(web, raw, pools=pools)
            inside.runtime.serve()
            await inside.configure({**web, "pool": "p"}, {**raw, "pool": "q"}, pools=pools)
            client = inside.call(0)
            await client.send(REQUEST)
            peer = await there.accept()
            assert await finish(client, peer) == b"HTTP/1.1 200 OK"
            client.close()
            peer.close()
            await inside.close()
            there.close()

        run(test)

    def test_what_cannot_be_served_changes_nothing(self) -> None:
        async def test(world: World) -> None:
            inside = Inside(world)
            await inside.configure(listener("web", pool="p"), pools=[pool("p", ("192.0.2.1", 80))])
            plan, backend = inside.runtime._plan, inside.pool("p").backends[0]
            with pytest.raises(SnapshotError, match="there is no socket for listener more"):
                await inside.configure(
                    listener("web", pool="p"),
                    {**listener("more", pool="p"), "address": "127.0.0.1:2"},
                    pools=[pool("p", ("192.0.2.2", 80))],
                )
            assert inside.runtime._plan is plan
            assert inside.pool("p").backends == (backend,)
            await inside.close()

        run(test)

    @pytest.mark.parametrize(
        ("cert", "key"),
        [
            (b"no certificate", site("a.test").key_pem()),
            (site("a.test").pem, issue("Other").key_pem()),
            (site("a.test").pem, b""),
        ],
    )
    @pytest.mark.parametrize("is_backend", [False, True])
    def test_bad_material_is_a_sentence(self, cert: bytes, key: bytes, is_backend: bool) -> None:
        async def test(world: World) -> None:
            inside = Inside(world)
            files = {"/c.pem": cert, "/k.pem": key, "/ca.pem": site("a.test").pem}
            if is_backend:
                web = listener("web", pool="p")
                more: dict[str, Any] = {"tls": True, "tls_cert_path": "/c.pem", "tls_key_path": "/k.pem"}
                pools = [pool("p", ("192.0.2.1", 80), **more)]
                begins = "pool p, backend b0: "
            else:
                web = listener("web", "h1s", pool="p", tls={"cert_path": "/c.pem", "key_path": "/k.pem"})
                pools = [pool("p", ("192.0.2.1", 80))]
                begins = "listener web: "
            with pytest.raises(SnapshotError) as raised:
                await inside.configure(web, pools=pools, files=files)
            assert str(raised.value).startswith(begins)
            assert "Traceback" not in str(raised.value)
            assert len(str(raised.value)) > len(begins) + 10
            await inside.close()

        run(test)


class TestNames:
    def test_every_address_of_an_answer_is_a_backend(self) -> None:
        async def test(world: World) -> None:
            there = Backend()
            inside = Inside(world)
            await inside.configure(
                listener("web", pool="p"),
                pools=[pool("p", ("a.test", 1), ("b.test", there.address[1]))],
                answers={"b.test": ("127.0.0.1",)},
            )
            assert [backend.id for backend in inside.pool("p").backends] == ["b1#127.0.0.1"]
            inside.runtime.serve()
            client = inside.call()
            await client.send(REQUEST)
            peer = await there.accept()
            assert await finish(client, peer) == b"HTTP/1.1 200 OK"
            client.close()
            peer.close()
            await inside.close()
            there.close()

        run(test)

    def test_without_any_answer_the_client_is_told(self) -> None:
        async def test(world: World) -> None:
            inside = Inside(world)
            await inside.configure(listener("web", pool="p"), pools=[pool("p", ("a.test", 80))])
            assert inside.pool("p").empty_fault is Fault.DNS
            inside.runtime.serve()
            client = inside.call()
            await client.send(REQUEST)
            head = await client.read_until(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 50")
            assert b"dns_error" in head
            client.close()
            await inside.close()

        run(test)


class TestLife:
    def test_the_sweep_goes_on_whatever_fails(self) -> None:
        async def test(world: World) -> None:
            inside = Inside(world)
            await inside.configure(
                listener("web", pool="p"),
                pools=[pool("p", refused_address())],
                runtime={"watchdog": {"sweep_interval_ms": 100}},
            )
            swept: list[float] = []

            class Broken:
                name = "broken"
                is_busy = True

                def sweep(self, now: float) -> None:
                    swept.append(now)
                    raise ValueError("a defect")

            inside.runtime._retired.append(Broken())  # type: ignore[arg-type]  # stands for a pool
            inside.runtime.serve()
            await world.until(lambda: len(swept) > 2)
            assert inside.runtime.faults >= 3
            assert inside.runtime.reactor.now == swept[-1]
            inside.runtime._retired.clear()
            inside.runtime.reactor.faults = 0
            await inside.close()

        run(test)

    def test_drain_lets_the_exchange_end_and_refuses_newcomers(self) -> None:
        async def test(world: World) -> None:
            there = Backend()
            inside = Inside(world)
            await inside.configure(
                listener("web", pool="p", drain_timeout_ms=3000, drain_jitter_ms=0),
                pools=[pool("p", there.address)],
            )
            inside.runtime.serve()
            client = inside.call()
            await client.send(REQUEST)
            peer = await there.accept()
            await peer.read_until(b"\r\n\r\n")
            draining = world.loop.create_task(inside.runtime.drain())
            await world.turns()
            with pytest.raises(ConnectionRefusedError):
                inside.call()
            assert inside.runtime.open() == {"web": 1}
            await peer.send(OK)
            head = await client.read_until(b"\r\n\r\n")
            assert b"connection: close" in head.lower()
            assert await client.read_all() == b"ok"
            assert await draining == {}
            client.close()
            peer.close()
            await inside.close()
            there.close()

        run(test)

    @pytest.mark.parametrize(
        ("hello", "told"),
        [
            (REQUEST, b"connection: close"),
            (
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\4" + bytes(5),
                bytes(3) + b"\0\x7f\xff\xff\xff",
            ),
        ],
        ids=["h1", "h2"],
    )
    def test_who_has_said_nothing_yet_is_not_cut_off(self, hello: bytes, told: bytes) -> None:
        """Where it is not known yet what is spoken: the first bytes are on their way. They are answered, and
        the answer says that the client is to leave."""

        async def test(world: World) -> None:
            there = Backend()
            inside = Inside(world)
            await inside.configure(
                listener("web", pool="p", h2c=True, drain_timeout_ms=3000, drain_jitter_ms=0),
                pools=[pool("p", there.address)],
            )
            inside.runtime.serve()
            client = inside.call()
            await world.until(lambda: inside.runtime.open() == {"web": 1})
            draining = world.loop.create_task(inside.runtime.drain())
            await world.turns()
            await client.send(hello)
            if hello is REQUEST:
                peer = await there.accept()
                await peer.read_until(b"\r\n\r\n")
                await peer.send(OK)
                assert told in (await client.read_until(b"\r\n\r\n")).lower()
                peer.close()
            else:
                await client.read_until(told)  # GOAWAY, of which more follows
            client.close()
            assert await draining == {}
            await inside.close()
            there.close()

        run(test)

    def test_drain_cuts_short_what_takes_too_long_and_says_so(self) -> None:
        async def test(world: World) -> None:
            there = Backend()
            inside = Inside(world)
            await inside.configure(
                listener("web", pool="p", drain_timeout_ms=1000, drain_jitter_ms=0),
                pools=[pool("p", there.address)],
            )
            inside.runtime.serve()
            client = inside.call()
            await client.send(REQUEST)
            peer = await there.accept()
            assert await inside.runtime.drain() == {"web": 1}
            client.close()
            peer.close()
            await inside.close()
            there.close()

        run(test)


class TestMetrics:
    def test_every_sample_has_a_family_with_as_many_labels(self) -> None:
        async def test(world: World) -> None:
            there = Backend()
            inside = Inside(world)
            await inside.configure(listener("web", pool="p"), pools=[pool("p", there.address)])
            inside.runtime.serve()
            client = inside.call()
            await client.send(REQUEST)
            peer = await there.accept()
            await finish(client, peer)
            inside.pool("p").retries.add("stale")
            inside.pool("p").backends[0].unsolicited = 1
            samples = [sample for _, _, collect in inside.runtime.sources() for sample in collect()]
            for family, labels, value in samples:
                assert len(FAMILIES[family].labels) == len(labels), family
                assert (FAMILIES[family].kind == "histogram") == isinstance(value, list), family
            values = {(family, labels): value for family, labels, value in samples}
            assert len(values) == len(samples)
            assert values["http_requests", ("web", "default", "1.1", "2xx")] == 1
            assert values["backend_requests", ("p", "b0", "2xx")] == 1
            assert values["pool_connections", ("p", "b0", "idle")] == 1
            for what in ("connect", "head", "request"):
                durations = values[f"backend_{what}_duration_seconds", ("p", "b0")]
                assert isinstance(durations, list)
                assert sum(durations[:-1]) == 1
            client.close()
            peer.close()
            await inside.close()
            there.close()

        run(test)


def test_the_heap_is_kept_where_there_is_glibc() -> None:
    assert keep_the_heap() in (True, False)
    assert isinstance(keep_the_heap(), bool)
