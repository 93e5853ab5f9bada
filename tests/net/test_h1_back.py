"""Connections to a backend: which one is lent, which are kept, for how long, and what spoils them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from expressgateway.net import h1_back
from expressgateway.net.dial import Dialler
from expressgateway.net.h1_back import IDLE_S, H1Connections
from expressgateway.net.tls import client_context
from expressgateway.upstream.backend import Addresses, Backend, BackendSettings
from expressgateway.upstream.errors import Fault, UpstreamError
from expressgateway.wire.head import RequestHead, ResponseHead
from tests.net import loopback
from tests.net.loopback import Peer, World, refused_address, run
from tests.net.test_dial import TLS

if TYPE_CHECKING:
    from expressgateway.wire.errors import WireError
    from expressgateway.wire.sinks import ClientStream

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Waiter:
    """An exchange that only remembers."""

    def __init__(self, ip: str = "192.0.2.1") -> None:
        self.addresses: Addresses | None = ((ip, 1), ("198.51.100.1", 80))
        self.calls: list[str] = []
        self.body = b""
        self.stream: ClientStream | None = None
        self.error: UpstreamError | WireError | None = None
        self.was_delivered: bool | None = None

    def on_leased(self, stream: ClientStream) -> None:
        self.calls.append("leased")
        self.stream = stream

    def on_lease_failed(self, error: UpstreamError) -> None:
        self.calls.append("failed")
        self.error = error

    def on_informational(self, head: ResponseHead) -> None:
        self.calls.append(f"informational {head.status}")

    def on_response(self, head: ResponseHead, end: bool) -> None:
        self.calls.append(f"response {head.status}")

    def on_response_data(self, chunk: bytes, end: bool) -> None:
        self.body += chunk
        if end:
            self.calls.append("end")

    def on_response_trailers(self, fields: Any) -> None:
        self.calls.append("end")

    def on_response_abort(self, error: WireError) -> None:
        self.calls.append("abort")
        self.error = error
        if self.stream is not None:
            self.was_delivered = self.stream.was_delivered()

    def on_back_blocked(self) -> None:
        self.calls.append("blocked")

    def on_back_drained(self) -> None:
        self.calls.append("drained")


class Scene:
    """One backend, its connections, and the far ends that were accepted."""

    def __init__(self, world: World, address: tuple[str, int] | None = None, **settings: Any) -> None:
        self.world = world
        self.there = loopback.Backend()
        host, port = address or self.there.address
        base = BackendSettings("b", host, port, "h1", 1, None, None)
        self.backend = Backend(replace(base, **settings), (host, port), "b")
        self.dialler = Dialler(world.reactor, 5.0, ("http/1.1",))
        self.group = H1Connections(self.backend, world.reactor, self.dialler)
        self.backend.connections = self.group
        self.peers: list[Peer] = []

    def ask(self, waiter: Waiter) -> None:
        assert waiter.stream is not None
        waiter.stream.send_head(RequestHead(b"GET", b"http", b"a.test", b"/", ()), True)

    async def open(self, fresh: bool = False) -> tuple[Waiter, Peer]:
        """A waiter with a connection of its own, dialled for it."""
        waiter = Waiter()
        assert self.group.lease(waiter, fresh) is None
        assert waiter.calls == []
        peer = await self.there.accept()
        self.peers.append(peer)
        await self.world.until(lambda: waiter.calls == ["leased"])
        return waiter, peer

    async def exchange(self, waiter: Waiter, peer: Peer, answer: bytes = OK) -> None:
        self.ask(waiter)
        await peer.read_until(b"\r\n\r\n")
        await peer.send(answer)
        await self.world.until(lambda: "end" in waiter.calls)

    async def idle(self, count: int, answer: bytes = OK) -> list[Peer]:
        """So many idle connections; the oldest first."""
        pairs = [await self.open() for _ in range(count)]
        for waiter, peer in pairs:
            await self.exchange(waiter, peer, answer)
        return [peer for _, peer in pairs]

    def take(self) -> Waiter:
        """Lease what is at hand."""
        waiter = Waiter()
        waiter.stream = self.group.lease(waiter)
        assert waiter.stream is not None
        return waiter

    def close(self) -> None:
        for connection in list(self.group._everyone):
            connection.reset()
        for peer in self.peers:
            peer.close()
        self.there.close()


class TestStack:
    def test_newest_first(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            first, second = await scene.idle(2)
            assert scene.group.idle == 2
            one, other = scene.take(), scene.take()
            assert scene.group.idle == 0
            await scene.exchange(one, second)
            await scene.exchange(other, first)
            assert (scene.backend.leases, scene.backend.reused) == (4, 2)
            scene.close()

        run(test)

    def test_so_many_are_kept_and_no_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(h1_back, "MAX_IDLE", 2)

        async def test(world: World) -> None:
            scene = Scene(world)
            peers = await scene.idle(3)
            assert (scene.group.idle, scene.group.open) == (2, 2)
            assert await peers[2].read_all() == b""
            scene.close()

        run(test)

    def test_fresh_means_never_used(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            await scene.idle(1)
            waiter, _ = await scene.open(fresh=True)
            assert (scene.group.idle, scene.group.open) == (1, 2)
            assert scene.backend.reused == 0
            assert waiter.stream is not None
            scene.close()

        run(test)

    @pytest.mark.parametrize(
        ("hint", "limit_s"),
        [
            (b"", IDLE_S),
            (b"Keep-Alive: timeout=10\r\n", 9.0),
            (b"Keep-Alive: max=5, Timeout=2\r\n", 1.0),
            (b"Keep-Alive: timeout=1\r\n", 0.5),
            (b"Keep-Alive: timeout=x\r\n", IDLE_S),
            (b"Keep-Alive: timeout=99999999999\r\n", IDLE_S),
        ],
    )
    def test_kept_a_little_shorter_than_the_backend_does(self, hint: bytes, limit_s: float) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            peers = await scene.idle(2, b"HTTP/1.1 200 OK\r\n" + hint + b"Content-Length: 2\r\n\r\nok")
            since = [connection.idle_since for connection in scene.group._idle]
            scene.group.sweep(since[0] + limit_s - 0.01)
            assert scene.group.idle == 2
            scene.group.sweep(since[1] + limit_s + 0.01)
            assert (scene.group.idle, scene.group.open) == (0, 0)
            assert [await peer.read_all() for peer in peers] == [b"", b""]
            scene.close()

        run(test)

    def test_a_leaving_backend_closes_idle_ones_now_and_others_afterwards(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            (idle,) = await scene.idle(1)
            waiter, busy = await scene.open(fresh=True)
            scene.group.close_idle()
            assert (scene.group.idle, scene.group.open) == (0, 1)
            assert await idle.read_all() == b""
            await scene.exchange(waiter, busy)
            assert scene.group.open == 0
            assert await busy.read_all() == b""
            scene.close()

        run(test)


class TestSpoiled:
    @pytest.mark.parametrize("how", [Peer.close, Peer.reset])
    def test_closed_by_the_backend_it_leaves_the_stack(self, how: Any) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            (peer,) = await scene.idle(1)
            how(peer)
            await world.until(lambda: not scene.group.open)
            assert scene.group.idle == 0
            scene.close()

        run(test)

    def test_bytes_that_nobody_asked_for(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            (peer,) = await scene.idle(1)
            await peer.send(OK)
            await world.until(lambda: not scene.group.open)
            assert scene.backend.unsolicited == 1
            scene.close()

        run(test)

    def test_a_second_answer_in_the_same_read(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            waiter, peer = await scene.open()
            await scene.exchange(waiter, peer, OK + OK)
            await world.until(lambda: not scene.group.open)
            assert waiter.body == b"ok"
            assert (scene.backend.unsolicited, scene.group.idle) == (1, 0)
            scene.close()

        run(test)

    def test_one_that_came_just_before_the_request_went_out(self) -> None:
        """The next client must not get it: the request is taken back, and may go elsewhere."""

        async def test(world: World) -> None:
            scene = Scene(world)
            (peer,) = await scene.idle(1)
            peer.sock.send(OK)
            waiter = scene.take()
            connection = next(iter(scene.group._everyone))
            assert connection.stream is not None
            scene.ask(waiter)
            connection.stream.on_ready(1)  # in this batch, before the flush
            assert waiter.calls == ["abort"]
            assert waiter.was_delivered is False
            await world.turns()
            assert (scene.backend.unsolicited, scene.group.open) == (1, 0)
            scene.close()

        run(test)

    def test_a_request_on_a_stale_connection_was_not_delivered(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            (peer,) = await scene.idle(1)
            peer.close()
            waiter = scene.take()  # before the loop has told of the end
            scene.ask(waiter)
            await world.until(lambda: waiter.calls)
            assert waiter.calls == ["abort"]
            assert waiter.was_delivered is False
            assert scene.group.open == 0
            scene.close()

        run(test)

    def test_connection_close_is_obeyed(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            waiter, peer = await scene.open()
            await scene.exchange(
                waiter, peer, b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
            )
            assert scene.group.open == 0
            scene.close()

        run(test)

    def test_a_fault_of_ours_ends_the_exchange_too(self) -> None:
        """The safety net closes the stream: whoever had leased it must hear of that."""

        async def test(world: World) -> None:
            scene = Scene(world)
            waiter, peer = await scene.open()
            scene.ask(waiter)
            await peer.read_until(b"\r\n\r\n")

            def broken(head: ResponseHead, end: bool) -> None:
                raise ValueError("a defect")

            waiter.on_response = broken  # type: ignore[method-assign]  # a fake's method
            await peer.send(OK)
            await world.until(lambda: "abort" in waiter.calls)
            assert scene.group.open == 0
            scene.close()

        run(test, faults=1)


class TestDialling:
    def test_refused(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world, refused_address())
            waiter = Waiter()
            assert scene.group.lease(waiter) is None
            assert waiter.calls == []
            await world.until(lambda: waiter.calls)
            assert isinstance(waiter.error, UpstreamError)
            assert waiter.error.fault is Fault.REFUSED
            assert (scene.group.open, scene.group.waiting) == (0, {})
            scene.close()

        run(test)

    def test_no_descriptor_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)

            def exhausted(*_: object) -> None:
                raise OSError(24, "Too many open files")

            monkeypatch.setattr(scene.dialler.__class__, "dial", exhausted)
            waiter = Waiter()
            assert scene.group.lease(waiter) is None
            assert waiter.calls == []
            await world.until(lambda: waiter.calls)
            assert isinstance(waiter.error, UpstreamError)
            assert waiter.error.fault is Fault.OVER_CAPACITY
            assert scene.group.open == 0
            scene.close()

        run(test)

    def test_too_slow(self) -> None:
        """TLS that never answers: connected, but not open."""

        async def test(world: World) -> None:
            scene = Scene(world)
            scene.backend.settings = replace(scene.backend.settings, tls=TLS)
            scene.dialler.contexts[TLS] = client_context(verify_peer=False)
            waiter = Waiter()
            scene.group.lease(waiter)
            peer = await scene.there.accept()
            due = next(iter(scene.group._everyone)).due
            scene.group.sweep(due - 0.01)
            assert waiter.calls == []
            scene.group.sweep(due + 0.01)
            assert waiter.calls == ["failed"]
            assert isinstance(waiter.error, UpstreamError)
            assert waiter.error.fault is Fault.CONNECT_TIMEOUT
            assert (scene.group.open, scene.group.waiting) == (0, {})
            peer.close()
            scene.close()

        run(test)

    def test_given_up_meanwhile_it_is_kept_for_the_next(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world)
            waiter = Waiter()
            scene.group.lease(waiter)
            scene.group.cancel(waiter)
            scene.group.cancel(waiter)
            await world.until(lambda: scene.group.idle == 1)
            assert waiter.calls == []
            peer = await scene.there.accept()
            await scene.exchange(scene.take(), peer)
            assert scene.backend.reused == 0
            peer.close()
            scene.close()

        run(test)

    def test_given_up_and_failed_nobody_hears(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world, refused_address())
            waiter = Waiter()
            scene.group.lease(waiter)
            scene.group.cancel(waiter)
            await world.until(lambda: not scene.group.open)
            assert waiter.calls == []
            scene.close()

        run(test)


class TestProxyHeader:
    """A PROXY header speaks for one client: its connection serves nobody else."""

    def test_used_once(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world, send_proxy="v1")
            waiter, peer = await scene.open()
            assert await peer.read_until(b"\r\n") == b"PROXY TCP4 192.0.2.1 198.51.100.1 1 80\r\n"
            await scene.exchange(waiter, peer)
            assert (scene.group.idle, scene.group.open) == (0, 0)
            scene.close()

        run(test)

    def test_not_kept_for_another_when_its_client_gave_up(self) -> None:
        async def test(world: World) -> None:
            scene = Scene(world, send_proxy="v1")
            waiter = Waiter()
            scene.group.lease(waiter)
            scene.group.cancel(waiter)
            peer = await scene.there.accept()
            assert (await peer.read_all()).startswith(b"PROXY TCP4 192.0.2.1 ")
            assert (scene.group.idle, scene.group.open) == (0, 0)
            peer.close()
            scene.close()

        run(test)


def test_it_tells_its_state() -> None:
    async def test(world: World) -> None:
        scene = Scene(world)
        await scene.idle(1)
        assert repr(scene.group) == "<H1Connections b open=1 idle=1 waiting=0>"
        scene.close()

    run(test)
