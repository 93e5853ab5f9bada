"""From one snapshot to the next while connections are open: what is swapped, what stays, what retires."""

from __future__ import annotations

import pytest

from expressgateway.observe.counters import FAMILIES
from expressgateway.upstream.errors import Fault
from expressgateway.worker.build import SnapshotError
from expressgateway.worker.memory import keep_the_heap
from tests.net.loopback import Backend, Peer, World, refused_address, run
from tests.net.tls_peers import issue, site
from tests.worker.inside import Inside, Names, listener, pool

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
            assert swapped.timeouts.total == 4.321
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
                more = {"tls": True, "tls_cert_path": "/c.pem", "tls_key_path": "/k.pem"}
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
    def test_readiness_waits_for_the_first_answers(self) -> None:
        async def test(world: World) -> None:
            there = Backend()
            inside = Inside(world)
            inside.runtime._resolver = Names(b_test=("127.0.0.1",))  # type: ignore[assignment]  # a fake
            await inside.configure(
                listener("web", pool="p"),
                pools=[pool("p", ("a.test", 1), ("b.test", there.address[1]))],
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
            inside.runtime._resolver = Names()  # type: ignore[assignment]  # a fake
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
            samples = list(inside.runtime.collect())
            for family, labels, value in samples:
                assert len(FAMILIES[family].labels) == len(labels), family
                assert (FAMILIES[family].kind == "histogram") == isinstance(value, list), family
            values = {(family, labels): value for family, labels, value in samples}
            assert len(values) == len(samples)
            assert values["http_requests", ("web", "1.1", "2xx")] == 1
            assert values["backend_requests", ("p", "b0", "2xx")] == 1
            assert values["pool_connections", ("p", "b0", "idle")] == 1
            client.close()
            peer.close()
            await inside.close()
            there.close()

        run(test)


def test_the_heap_is_kept_where_there_is_glibc() -> None:
    assert keep_the_heap() in (True, False)
    assert isinstance(keep_the_heap(), bool)
