"""Shared connections to a backend: who gets which stream, who waits, and who is told that there is none."""

from __future__ import annotations

import pytest
from h2.events import RequestReceived

from expressgateway.net import shared_back
from expressgateway.net.h2_back import LIMITS
from expressgateway.net.shared_back import REDIAL_S
from expressgateway.net.tls import client_context
from expressgateway.upstream.errors import Fault, UpstreamError
from expressgateway.wire.errors import PeerClosedError
from tests.net.h2_scene import H2Peer, Scene, Waiter, scene
from tests.net.loopback import PATIENCE_S, World, refused_address, run
from tests.net.test_dial import TLS


class TestStreams:
    @scene()
    async def test_all_share_one_connection(self, at: Scene) -> None:
        waiters = at.several(50)
        there = await at.accept()
        streams = await there.requests(50)
        assert streams == list(range(1, 101, 2))
        assert at.counts == (1, 1, 0)
        await there.answer(*streams)
        await at.world.until(lambda: all("response 200" in each.calls for each in waiters))
        assert at.counts == (1, 0, 1)
        assert (at.backend.leases, at.backend.reused) == (50, 49)
        late = at.ask()
        assert late.calls == ["leased"], "at once, on what is at hand"
        assert at.counts == (1, 1, 0)

    @scene()
    async def test_the_peers_limit_is_kept_and_who_waits_is_served_in_order(self, at: Scene) -> None:
        first, there = await at.open(max_concurrent_streams=2)
        at.group._dial_at = float("inf")  # no other connection can be had
        second, *waiting = at.several(4)
        await there.requests(2)
        await at.world.turns()
        assert [each.calls for each in (first, second)] == [["leased"]] * 2
        for served, stream in enumerate((1, 3, 5)):
            assert [len(each.calls) for each in waiting] == [1] * served + [0] * (3 - served)
            await there.answer(stream)
            await there.requests(3 + served)
            waiting[served].calls = ["leased"]
        assert at.group.open == 1

    @scene()
    async def test_one_stream_until_the_backend_has_said_how_many(self, at: Scene) -> None:
        """And no other connection meanwhile."""
        waiters = at.several(5)
        peer = await at.there.accept()
        at.peers.append(peer)
        await at.world.until(lambda: waiters[0].calls)
        await at.world.turns()
        assert [len(each.calls) for each in waiters] == [1, 0, 0, 0, 0]
        assert at.group.open == 1
        there = H2Peer(peer, max_concurrent_streams=3)
        await there.begin()
        await there.requests(3)
        await at.world.turns()
        assert [len(each.calls) for each in waiters] == [1, 1, 1, 1, 0], "the fourth on a second one"
        assert at.group.open == 2

    @scene()
    async def test_another_connection_is_made_only_when_needed(self, at: Scene) -> None:
        _, there = await at.open(max_concurrent_streams=2)
        at.ask()
        await there.requests(2)
        assert at.group.open == 1
        waiting = at.several(3)
        assert at.group.open == 2, "one for all that wait, until it is known what it allows"
        other = await at.accept()
        await other.requests(3)
        assert all(each.calls == ["leased"] for each in waiting)
        assert at.counts == (2, 2, 0)
        await there.answer(1, 3)
        await at.world.until(lambda: at.group.idle)
        assert at.ask().calls == ["leased"], "on the one that has been there longest"
        await there.requests(3)
        assert at.counts == (2, 2, 0)

    @scene()
    async def test_a_limit_raised_serves_those_who_wait(self, at: Scene) -> None:
        _, there = await at.open(max_concurrent_streams=1)
        at.group._dial_at = float("inf")
        waiting = at.several(5)
        await at.world.turns()
        assert not any(each.calls for each in waiting)
        await there.allow(4)
        await there.requests(4)
        assert [bool(each.calls) for each in waiting] == [True] * 3 + [False] * 2
        await there.allow(100)
        await there.requests(6)
        assert at.group.open == 1

    @scene()
    async def test_a_limit_lowered_below_what_is_open(self, at: Scene) -> None:
        _, there = await at.open()
        at.several(4)
        await there.requests(5)
        await there.allow(2)
        await at.world.turns()
        at.group._dial_at = float("inf")
        waiter = at.ask()
        for stream in (1, 3, 5):
            await at.world.turns()
            assert waiter.calls == []
            await there.answer(stream)
        await there.answer(7)
        await at.world.until(lambda: waiter.calls)
        await there.requests(6)

    @scene()
    async def test_a_limit_of_nothing_at_all(self, at: Scene) -> None:
        """They wait as long as connecting may take, and may then go elsewhere."""
        _, there = await at.open()
        await there.allow(0)
        await there.answer(1)
        await at.world.until(lambda: not at.group.has_room)
        at.group._dial_at = float("inf")
        waiter = at.ask()
        at.group.sweep(at.world.reactor.now + PATIENCE_S - 0.1)
        assert waiter.calls == []
        at.group.sweep(at.world.reactor.now + PATIENCE_S + 0.1)
        assert waiter.calls == ["failed"]
        assert isinstance(waiter.error, UpstreamError)
        assert waiter.error.fault is Fault.SATURATED

    @scene()
    async def test_who_gave_up_waiting_is_passed_over(self, at: Scene) -> None:
        _, there = await at.open(max_concurrent_streams=1)
        at.group._dial_at = float("inf")
        gone, next_ = at.several(2)
        at.group.cancel(gone)
        at.group.cancel(gone)
        await there.answer(1)
        await there.requests(2)
        assert gone.calls == []
        assert next_.calls == ["leased"]

    @scene()
    async def test_a_stream_given_up_before_its_request_costs_nothing(self, at: Scene) -> None:
        _, there = await at.open(max_concurrent_streams=2)
        waiter = Waiter()
        stream = at.group.lease(waiter)
        assert stream is not None
        had_room = at.group.has_room
        stream.abort(None)
        assert (had_room, at.group.has_room) == (False, True)
        await there.answer(1)
        await at.world.until(lambda: at.group.idle)
        assert there.streams == [1]

    @scene()
    async def test_leasing_from_inside_the_calls(self, at: Scene) -> None:
        """An exchange that ends may begin another, whatever the connection is doing just then."""
        first, second, third = Waiter(), Waiter(), Waiter()
        first.then = lambda: at.lease(second)
        at.lease(first)
        there = await at.accept()
        await there.requests(2)

        def next_(head: object, end: bool) -> None:
            at.lease(third)

        first.on_response = next_  # type: ignore[method-assign]  # a fake's method
        await there.answer(1)
        await there.requests(3)
        await there.answer(3, 5)
        await at.world.until(lambda: at.group.idle)
        assert at.counts == (1, 0, 1)

    @scene()
    async def test_those_who_wait_in_the_pool_are_told_of_room(self, at: Scene) -> None:
        told: list[bool] = []
        at.backend.on_freed = lambda: told.append(at.group.has_room)
        at.ask()
        assert not at.group.has_room
        there = await at.accept(max_concurrent_streams=2)
        await there.requests(1)
        await at.world.until(lambda: told and told[-1])
        at.ask()
        told.clear()
        assert not at.group.has_room
        await there.requests(2)
        await there.allow(3)
        await at.world.until(lambda: told == [True])

    def test_so_many_connections_and_no_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shared_back, "MAX_CONNECTIONS", 2)

        async def test(world: World) -> None:
            made = Scene(world)
            _, there = await made.open(max_concurrent_streams=1)
            waiting = made.several(3)
            other = await made.accept(max_concurrent_streams=1)
            await other.requests(1)
            await world.turns()
            made.group.sweep(world.reactor.now)
            await world.turns()
            assert made.group.open == 2
            assert [bool(each.calls) for each in waiting] == [True, False, False]
            await there.answer(1)
            await there.requests(2)
            assert made.group.open == 2
            made.close()

        run(test)

    def test_so_many_wait_and_no_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shared_back, "MAX_WAITING", 2)

        async def test(world: World) -> None:
            made = Scene(world)
            waiters = made.several(4)
            assert waiters[3].calls == []
            made.group.cancel(waiters[3])
            await world.until(lambda: waiters[2].calls)
            assert isinstance(waiters[2].error, UpstreamError)
            assert waiters[2].error.fault is Fault.SATURATED
            assert waiters[3].calls == [], "no call follows a cancel"
            made.close()

        run(test)


class TestDialling:
    def test_refused(self) -> None:
        async def test(world: World) -> None:
            made = Scene(world, refused_address())
            waiters = made.several(3)
            assert not any(each.calls for each in waiters)
            await world.until(lambda: all(each.calls == ["failed"] for each in waiters))
            for each in waiters:
                assert isinstance(each.error, UpstreamError)
                assert each.error.fault is Fault.REFUSED
            await made.is_empty()
            made.close()

        run(test)

    def test_no_descriptor_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def test(world: World) -> None:
            made = Scene(world)

            def exhausted(*_: object) -> None:
                raise OSError(24, "Too many open files")

            monkeypatch.setattr(made.dialler.__class__, "dial", exhausted)
            waiter, gone = made.several(2)
            assert waiter.calls == []
            made.group.cancel(gone)
            await world.until(lambda: waiter.calls)
            await world.turns()
            assert isinstance(waiter.error, UpstreamError)
            assert waiter.error.fault is Fault.OVER_CAPACITY
            assert gone.calls == []
            await made.is_empty()
            made.close()

        run(test)

    @scene(tls=TLS)
    async def test_too_slow(self, at: Scene) -> None:
        """TLS that never answers: connected, but not open."""
        at.dialler.contexts[TLS] = client_context(verify_peer=False)
        waiters = at.several(2)
        at.peers.append(await at.there.accept())
        due = at.group._everyone[0].due
        at.group.sweep(due - 0.01)
        assert waiters[0].calls == []
        at.group.sweep(due + 0.01)
        for each in waiters:
            assert each.calls == ["failed"]
            assert isinstance(each.error, UpstreamError)
            assert each.error.fault is Fault.CONNECT_TIMEOUT
        await at.is_empty()

    @scene()
    async def test_given_up_meanwhile_it_is_kept_for_the_next(self, at: Scene) -> None:
        waiter = at.ask()
        at.group.cancel(waiter)
        await at.world.until(lambda: at.group.idle == 1)
        assert waiter.calls == []
        assert at.ask().calls == ["leased"]
        assert at.backend.reused == 0

    def test_one_who_leaves_because_of_another_hears_nothing(self) -> None:
        async def test(world: World) -> None:
            made = Scene(world, refused_address())
            first, second = made.several(2)

            def failed(error: UpstreamError) -> None:
                made.group.cancel(second)

            first.on_lease_failed = failed  # type: ignore[method-assign]  # a fake's method
            await made.is_empty()
            assert second.calls == []
            made.close()

        run(test)

    def test_asking_again_from_inside_a_failure(self) -> None:
        async def test(world: World) -> None:
            made = Scene(world, refused_address())
            waiter, again = Waiter(), Waiter()

            def failed(error: UpstreamError) -> None:
                made.lease(again)

            waiter.on_lease_failed = failed  # type: ignore[method-assign]  # a fake's method
            made.lease(waiter)
            await world.until(lambda: again.calls == ["failed"])
            await made.is_empty()
            made.close()

        run(test)

    @scene()
    async def test_one_more_connection_that_fails_harms_nobody(self, at: Scene) -> None:
        """Who waits is served when a stream ends; another attempt is made after a while, not at once."""
        _, there = await at.open(max_concurrent_streams=1)
        at.backend.address = refused_address()
        waiters = at.several(2)
        await at.world.until(lambda: at.group.open == 1)
        await at.world.turns()
        assert at.group.open == 1
        assert not any(each.calls for each in waiters)
        await there.answer(1)
        await there.requests(2)
        assert [each.calls for each in waiters] == [["leased"], []]
        at.backend.address = at.there.address
        at.group._dial_at -= REDIAL_S
        at.group.sweep(at.world.reactor.now)
        other = await at.accept()
        await other.requests(1)
        assert waiters[1].calls == ["leased"]


class TestPeersThatAreNone:
    @scene()
    async def test_no_settings_at_all(self, at: Scene) -> None:
        waiter = at.ask()
        at.peers.append(await at.there.accept())
        await at.world.until(lambda: waiter.calls)
        now = at.world.reactor.now
        at.group.sweep(now)
        at.group.sweep(now + LIMITS.keep_alive_timeout_s + 1)
        assert waiter.calls == ["leased", "abort"]
        await at.is_empty()

    @scene()
    async def test_it_speaks_http_1(self, at: Scene) -> None:
        waiter = at.ask()
        peer = await at.there.accept()
        at.peers.append(peer)
        await peer.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await at.world.until(lambda: "abort" in waiter.calls)
        assert not isinstance(waiter.error, PeerClosedError)
        await at.is_empty()

    @scene()
    async def test_it_closes_at_once(self, at: Scene) -> None:
        waiters = at.several(3)
        for _ in waiters:
            (await at.there.accept()).close()
        await at.world.until(lambda: all(each.calls == ["leased", "abort"] for each in waiters))
        assert isinstance(waiters[0].error, PeerClosedError)
        await at.is_empty()


class TestProxyHeader:
    """A PROXY header speaks for one client: its connection serves nobody else."""

    @scene(send_proxy="v1")
    async def test_each_client_has_its_own(self, at: Scene) -> None:
        """Also when the second connection is open before the first."""
        waiters = [Waiter(f"192.0.2.{number}") for number in range(1, 4)]
        for each in waiters:
            at.lease(each)
        assert not at.group.has_room
        first, second, third = list(at.group._everyone)
        assert second.stream is not None
        second.stream.on_ready(4)
        await at.world.until(lambda: all(each.calls for each in waiters))
        for connection, waiter in zip((first, second, third), waiters, strict=True):
            assert waiter.stream is not None
            assert waiter.stream.connection is connection.codec  # type: ignore[attr-defined]  # the codec's
        for _ in waiters:
            peer = await at.there.accept()
            at.peers.append(peer)
            head = await peer.read_until(b"\r\n")
            there = H2Peer(peer)
            await there.begin()
            there.events += there.h2.receive_data(bytes(peer.got))
            assert head.startswith(b"PROXY TCP4 192.0.2.")
            if not there.saw(RequestReceived):
                await there.requests(1)
            await at.world.turns()  # its SETTINGS are read: it would allow more
            assert not at.group.has_room
            await there.answer(1)
            await there.rest()
        await at.is_empty()

    @scene(send_proxy="v1")
    async def test_not_kept_for_another_when_its_client_gave_up(self, at: Scene) -> None:
        gone, other = Waiter("192.0.2.1"), Waiter("192.0.2.2")
        at.lease(gone)
        at.group.cancel(gone)
        at.lease(other)
        await at.world.until(lambda: other.calls)
        for address in (b"192.0.2.1", b"192.0.2.2"):
            peer = await at.there.accept()
            at.peers.append(peer)
            assert address in await peer.read_until(b"\r\n")
        await at.world.until(lambda: at.group.open == 1)
        assert gone.calls == []

    def test_one_that_cannot_be_made_is_one_clients_loss(self) -> None:
        async def test(world: World) -> None:
            made = Scene(world, send_proxy="v2")
            first = Waiter("192.0.2.1")
            made.lease(first)
            made.backend.address = refused_address()
            second = Waiter("192.0.2.2")
            made.lease(second)
            await world.until(lambda: first.calls and second.calls)
            assert (first.calls, second.calls) == (["leased"], ["failed"])
            made.close()

        run(test)


def test_it_tells_its_state() -> None:
    async def test(world: World) -> None:
        made = Scene(world)
        await made.open()
        assert repr(made.group) == "<H2Connections b open=1 waiting=0>"
        made.close()

    run(test)
