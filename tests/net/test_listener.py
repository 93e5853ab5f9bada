"""The door: who is let in, who is turned away and why, and what is counted of it."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import TYPE_CHECKING, Any

import pytest

from expressgateway.net.facts import Facts, State
from expressgateway.net.listener import Caller, Door, Listener, address_of, plain_ip
from expressgateway.net.stream import Stream
from expressgateway.observe.counters import ListenerCounters
from expressgateway.proxy.forwarding import TrustedProxies
from tests.l4.udp_gateway import FakeCensus
from tests.net.loopback import Owner, Peer, World, run

if TYPE_CHECKING:
    from collections.abc import Callable

V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 80\r\n"
V2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\2\7\xc6\x33\x64\1\x12\x67\0\x50"


class Guest(Owner):
    """A connection that was let in."""

    def __init__(self, hall: Hall, sock: socket.socket, caller: Caller) -> None:
        super().__init__()
        self.hall = hall
        self.caller = caller
        self.stream: Stream = Stream(hall.reactor, sock, self)
        self.trouble: Exception | None = None

    def begin(self) -> None:
        self.stream.start()

    def on_eof(self) -> None:
        self.stream.close()

    def on_released(self) -> None:
        super().on_released()
        self.hall.forget(self)

    def sweep(self, now: float) -> None:
        self.calls.append("sweep")
        if self.trouble is not None:
            raise self.trouble

    def facts(self) -> Facts:
        return Facts("none", self.caller.ip, self.caller.port, 0.0, None, State.ACTIVE)

    def drain(self) -> None:
        self.calls.append("drain")

    def go_away(self) -> None:
        self.stream.reset()

    reset = go_away


class Hall(Listener):
    """A listener that speaks nothing."""

    def __init__(
        self, world: World, *, proxy_protocol: bool = False, trusted: tuple[str, ...] = (), **caps: int
    ) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.sock.setblocking(False)
        self.address = self.sock.getsockname()
        self.census = FakeCensus(**caps)
        self.world = world
        door = Door(TrustedProxies(list(trusted)), proxy_protocol, 5.0)
        super().__init__(world.reactor, self.sock, door, self.census, ListenerCounters("hall"))
        self.guests: list[Guest] = []
        self.turned_away = 0

    def admit(self, sock: socket.socket, caller: Caller) -> Guest:
        guest = Guest(self, sock, caller)
        self.guests.append(guest)
        return guest

    def turn_away(self, sock: socket.socket) -> None:
        self.turned_away += 1
        sock.send(b"full")

    def call(self) -> Peer:
        """A client's connection; in the queue when this returns."""
        sock = socket.create_connection(self.address, timeout=60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Peer(sock)

    async def empty(self) -> None:
        """Everyone leaves, and nothing is left behind."""
        await self.world.until(lambda: not self.open)
        assert self.counters.inflight == 0
        assert self.census.inside.total() == 0
        self.stop()


class TestCaps:
    def test_counted_in_and_out(self) -> None:
        async def test(world: World) -> None:
            hall = Hall(world)
            hall.start()
            peers = [hall.call() for _ in range(3)]
            await world.until(lambda: hall.open == 3)
            assert (hall.counters.connections, hall.counters.inflight) == (3, 3)
            assert hall.census.inside == {"127.0.0.1": 3}
            peers[0].close()
            peers[1].reset()
            peers[2].close()
            await hall.empty()
            assert hall.counters.connections == 3

        run(test)

    @pytest.mark.parametrize(("caps", "reason"), [({"total": 1}, "process_cap"), ({"per_ip": 1}, "ip_cap")])
    def test_one_too_many_is_told_and_counted(self, caps: dict[str, int], reason: str) -> None:
        async def test(world: World) -> None:
            hall = Hall(world, total=caps.get("total", 100), per_ip=caps.get("per_ip", 100))
            hall.start()
            first, second = hall.call(), hall.call()
            assert await second.read_all() == b"full"
            assert dict(hall.counters.rejects) == {reason: 1}
            assert dict(hall.counters.security) == {"connection_flood": 1}
            assert (hall.open, hall.counters.inflight, hall.counters.connections) == (1, 1, 1)
            first.close()
            await world.until(lambda: not hall.open)
            third = hall.call()
            await world.until(lambda: hall.open)
            third.close()
            second.close()
            await hall.empty()

        run(test)

    def test_while_draining(self) -> None:
        async def test(world: World) -> None:
            hall = Hall(world)
            hall.start()
            first = hall.call()
            await world.until(lambda: hall.open)
            hall.drain()
            assert "drain" in hall.guests[0].calls
            second = hall.call()
            assert await second.read_all() == b"full"
            assert dict(hall.counters.rejects) == {"draining": 1}
            assert not hall.counters.security
            assert hall.go_away() == 1
            first.close()
            second.close()
            await hall.empty()

        run(test)

    def test_who_is_introduced_while_draining_is_asked_to_leave(self) -> None:
        """And not cut off: it was let in before, and its request may follow the header."""

        async def test(world: World) -> None:
            hall = Hall(world, proxy_protocol=True, trusted=("127.0.0.1",))
            hall.start()
            peer = hall.call()
            await world.until(lambda: hall.open)
            hall.drain()
            await peer.send(V1 + b"hello")
            await world.until(lambda: hall.guests)
            assert hall.guests[0].caller.ip == "192.0.2.7"
            assert "drain" in hall.guests[0].calls
            assert hall.go_away() == 1
            peer.close()
            await hall.empty()

        run(test)


class TestStopping:
    def test_the_queue_is_taken_in_and_later_ones_are_refused(self) -> None:
        async def test(world: World) -> None:
            hall = Hall(world)
            hall.start()
            peers = [hall.call() for _ in range(5)]
            assert hall.open == 0
            hall.stop()
            assert hall.open == 5
            with pytest.raises(ConnectionRefusedError):
                hall.call()
            for peer in peers:
                peer.close()
            await hall.empty()
            hall.stop()

        run(test)

    def test_go_away_ends_everyone(self) -> None:
        async def test(world: World) -> None:
            hall = Hall(world, proxy_protocol=True, trusted=("127.0.0.1",))
            hall.start()
            met, waiting = hall.call(), hall.call()
            await met.send(V1)
            await world.until(lambda: hall.guests)
            await world.until(lambda: hall.open == 2)
            told = sorted((each.facts() for each in hall.told()), key=lambda facts: facts.ip)
            # One has said for whom it speaks, of the other only the proxy is known.
            assert [(facts.ip, facts.state) for facts in told] == [
                ("127.0.0.1", "opening"),
                ("192.0.2.7", "active"),
            ]
            assert hall.go_away() == 2
            met.close()
            waiting.close()
            await hall.empty()

        run(test)


class TestTrouble:
    class Failing:
        """A listening socket whose accept fails so many times."""

        def __init__(self, sock: socket.socket, *errors: int) -> None:
            self.sock = sock
            self.errors = list(errors)
            self.accepts = 0

        def accept(self) -> Any:
            self.accepts += 1
            if self.errors:
                raise OSError(self.errors.pop(0), "no")
            return self.sock.accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sock, name)

    def test_without_descriptors_it_pauses_and_comes_back(self) -> None:
        async def test(world: World) -> None:
            hall = Hall(world)
            failing = self.Failing(hall.sock, errno.EMFILE, errno.EMFILE, errno.ENFILE)
            hall._sock = failing  # type: ignore[assignment]  # stands for the socket
            hall.start()
            peer = hall.call()
            await world.until(lambda: failing.accepts == 1)
            assert hall.sock.fileno() not in world.reactor._handlers  # no spinning meanwhile
            await world.until(lambda: hall.open)
            assert failing.accepts < 10
            assert dict(hall.counters.accept_errors) == {"EMFILE": 2, "ENFILE": 1}
            peer.close()
            await hall.empty()

        run(test)

    def test_stopped_while_it_pauses(self) -> None:
        async def test(world: World) -> None:
            hall = Hall(world)
            hall._sock = self.Failing(hall.sock, *[errno.EMFILE] * 5)  # type: ignore[assignment]  # as above
            hall.start()
            peer = hall.call()
            await world.until(lambda: hall.counters.accept_errors)
            hall.stop()
            await asyncio.sleep(0.03)  # the back-off's timer comes and finds nothing to do
            assert world.reactor._handlers == {}
            peer.close()

        run(test)

    def test_a_connection_that_died_in_the_queue_is_no_obstacle(self) -> None:
        async def test(world: World) -> None:
            hall = Hall(world)
            hall._sock = self.Failing(hall.sock, errno.ECONNABORTED)  # type: ignore[assignment]  # as above
            hall.start()
            gone, peer = hall.call(), hall.call()
            gone.reset()
            await world.until(lambda: any(not guest.has_ended() for guest in hall.guests))
            assert dict(hall.counters.accept_errors) == {"ECONNABORTED": 1}
            peer.close()
            await hall.empty()

        run(test)

    def test_a_defect_in_a_sweep_costs_one_connection(self) -> None:
        async def test(world: World) -> None:
            hall = Hall(world)
            hall.start()
            peers = [hall.call(), hall.call()]
            await world.until(lambda: hall.open == 2)
            hall.guests[0].trouble = ValueError("a defect")
            hall.sweep(0.0)
            hall.sweep(0.0)
            assert hall.guests[0].has_ended()
            assert hall.guests[1].calls == ["open", "sweep", "sweep"]
            assert hall.open == 1
            for peer in peers:
                peer.close()
            await hall.empty()

        run(test, faults=1)


class TestProxyHeader:
    def hall(self, world: World, **caps: int) -> Hall:
        hall = Hall(world, proxy_protocol=True, trusted=("127.0.0.1",), **caps)
        hall.start()
        return hall

    @pytest.mark.parametrize("header", [V1, V2])
    @pytest.mark.parametrize("piece", [1, 7, 1000])
    def test_in_pieces_of_any_size_and_not_one_byte_more(self, header: bytes, piece: int) -> None:
        async def test(world: World) -> None:
            hall = self.hall(world)
            peer = hall.call()
            said = header + b"hello"
            for at in range(0, len(said), piece):
                await peer.send(said[at : at + piece])
                await world.turns(1)
            await world.until(lambda: hall.guests and hall.guests[0].data == b"hello")
            caller = hall.guests[0].caller
            assert (caller.ip, caller.port, caller.local) == ("192.0.2.7", 4711, ("198.51.100.1", 80))
            assert not caller.is_trusted
            assert hall.census.inside == {"192.0.2.7": 1}
            assert (hall.counters.connections, hall.counters.inflight) == (1, 1)
            peer.close()
            await hall.empty()

        run(test)

    @pytest.mark.parametrize("said", [b"", V1[:20], V2[:14]])
    def test_half_of_one_spins_not(self, said: bytes) -> None:
        async def test(world: World) -> None:
            hall = self.hall(world)
            peer = hall.call()
            await peer.send(said)
            await world.turns()
            assert await world.batches_in() == 0
            hall.sweep(world.reactor.now + 5.1)
            assert dict(hall.counters.rejects) == {"proxy_header_timeout": 1}
            peer.close()
            await hall.empty()

        run(test)

    @pytest.mark.parametrize(
        ("said", "end", "reason"),
        [
            (b"GET / HTTP/1.1\r\n", None, "proxy_header_bad"),
            (b"PROXY TCP9 1 2 3 4\r\n", None, "proxy_header_bad"),
            (b"", Peer.write_eof, "proxy_header_missing"),
            (V1[:20], Peer.write_eof, "proxy_header_missing"),
            (V2[:20], Peer.reset, "proxy_header_missing"),
        ],
    )
    def test_refused(self, said: bytes, end: Callable[[Peer], None] | None, reason: str) -> None:
        async def test(world: World) -> None:
            hall = self.hall(world)
            peer = hall.call()
            await peer.send(said)
            if end is not None:
                end(peer)
            await world.until(lambda: hall.counters.rejects)
            assert dict(hall.counters.rejects) == {reason: 1}
            assert hall.guests == []
            peer.close()
            await hall.empty()

        run(test)

    def test_without_an_address_the_proxy_itself_is_the_caller(self) -> None:
        async def test(world: World) -> None:
            hall = self.hall(world)
            peer = hall.call()
            await peer.send(b"PROXY UNKNOWN\r\n")
            await world.until(lambda: hall.guests)
            assert hall.guests[0].caller.ip == "127.0.0.1"
            peer.close()
            await hall.empty()

        run(test)

    def test_the_caps_count_the_client_not_the_proxy(self) -> None:
        async def test(world: World) -> None:
            hall = self.hall(world, per_ip=1)
            first = hall.call()
            await first.send(V1)
            await world.until(lambda: hall.guests)
            second = hall.call()
            await second.send(V1)
            assert await second.read_all() == b"full"
            assert dict(hall.counters.rejects) == {"ip_cap": 1}
            assert hall.counters.inflight == 1
            first.close()
            second.close()
            await hall.empty()

        run(test)

    def test_from_strangers_it_is_not_believed(self) -> None:
        async def test(world: World) -> None:
            hall = Hall(world, proxy_protocol=True, trusted=("192.0.2.0/24",))
            hall.start()
            peer = hall.call()
            await peer.send(V1)
            await world.until(lambda: hall.guests and hall.guests[0].data == V1)
            assert hall.guests[0].caller.ip == "127.0.0.1"
            peer.close()
            await hall.empty()

        run(test)


@pytest.mark.parametrize(
    ("ip", "plain"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::1"),
        ("::ffff:0:1", "::ffff:0:1"),
        ("2001:db8::1", "2001:db8::1"),
    ],
)
def test_addresses_are_told_as_what_they_are(ip: str, plain: str) -> None:
    assert plain_ip(ip) == plain


def test_a_socket_address_has_the_familys_shape() -> None:
    assert address_of("192.0.2.1", 80) == ("192.0.2.1", 80)
    assert address_of("::1", 80) == ("::1", 80, 0, 0)
