"""Hand-over: what is given arrives whole, at once or not at all, and never twice."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import Any

import pytest

from expressgateway.net.batches import Address, BatchSocket
from expressgateway.net.datagram import IP_PKTINFO, Control, LocalAddress
from expressgateway.net.quic import handover
from expressgateway.net.quic.handover import Handover, Pair, is_there
from tests.net.loopback import World, run

V4: Address = ("192.0.2.7", 4433)
V6: Address = ("2001:db8::7", 65535, 0xFFFFF, 3)


class Recorder:
    """A worker's sink; ``also`` is what it does with each."""

    def __init__(self, also: Any = None) -> None:
        self.handed: list[tuple[Any, ...]] = []
        self.also = also

    def on_handed(self, *what: Any) -> None:
        self.handed.append(what)
        if self.also is not None:
            self.also(*what)


class Pairs(list[Pair]):
    """The pairs of all workers."""

    def __init__(self, workers: int) -> None:
        super().__init__(Pair() for _ in range(workers))

    def close(self) -> None:
        for pair in self:
            pair.close()


class Team:
    """The workers of one gateway in one loop."""

    def __init__(self, world: World, workers: int = 3, sinks: tuple[Recorder, ...] = ()) -> None:
        self.pairs = Pairs(workers)
        self.workers = [end(self.pairs, index) for index in range(workers)]
        self.sinks = sinks or tuple(Recorder() for _ in range(workers))
        for worker, sink in zip(self.workers, self.sinks, strict=True):
            worker.start(world.reactor, sink)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.pairs.close()


def end(pairs: Pairs, index: int) -> Handover:
    """A worker's end, as if it had inherited the descriptors."""
    writers = {other: pair.writer.dup() for other, pair in enumerate(pairs) if other != index}
    return Handover(pairs[index].reader.dup(), writers)


def give(one: Handover, worker: int, data: bytes = b"data", address: Address = V4) -> bool:
    return one.give(worker, 0, data, len(data), address, [], 0)


class TestMessages:
    @pytest.mark.parametrize(
        "address", [V4, V6, ("0.0.0.0", 0), ("::", 0, 0, 0), ("::ffff:192.0.2.1", 1, 0, 0)]
    )
    @pytest.mark.parametrize(
        "control",
        [
            [],
            [(socket.IPPROTO_IP, IP_PKTINFO, b"twelve bytes")],
            [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, bytes(20))],
        ],
    )
    def test_all_of_it(self, address: Address, control: list[Control]) -> None:
        async def test(world: World) -> None:
            team = Team(world)
            assert team.workers[0].give(2, 65535, b"one" * 400, 3, address, control, 3)
            await world.until(lambda: team.sinks[2].handed)
            assert team.sinks[2].handed == [(65535, b"one" * 400, 3, address, control, 3)]
            assert team.sinks[0].handed == team.sinks[1].handed == []
            assert (team.workers[0].given, team.workers[2].taken) == (1, 1)
            team.close()

        run(test)

    @pytest.mark.parametrize("size", [1, 1200, 65_507, 65_536])
    def test_any_size(self, size: int) -> None:
        async def test(world: World) -> None:
            team = Team(world, 2)
            data = os.urandom(size)
            assert team.workers[0].give(1, 0, data, 1200, V4, [], 0)
            await world.until(lambda: team.sinks[1].handed)
            ((_, received, segment_bytes, *_),) = team.sinks[1].handed
            assert received == data
            assert segment_bytes == 1200
            team.close()

        run(test)

    def test_what_a_socket_received(self) -> None:
        """From one worker's member to another's connection, with all that a wildcard socket tells."""

        async def test(world: World) -> None:
            for host, wildcard in (("127.0.0.1", "0.0.0.0"), ("::1", "::")):
                team = Team(world, 2)
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                member = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
                member.bind((wildcard, 0))
                batch = BatchSocket(member)
                told: list[tuple[Any, ...]] = []

                class Sink:
                    def on_datagrams(self, *what: Any, team: Team = team, told: Any = told) -> None:
                        told.append(what)
                        team.workers[0].give(1, 4, *what)

                def has_received(batch: BatchSocket = batch, sink: Any = Sink) -> int:
                    return batch.receive(sink())

                def is_handed(team: Team = team) -> bool:
                    return bool(team.sinks[1].handed)

                with socket.socket(family, socket.SOCK_DGRAM) as client:
                    client.bind((host, 0))
                    client.sendto(b"hello", (host, member.getsockname()[1]))
                    await world.until(has_received)
                    await world.until(is_handed)
                    assert team.sinks[1].handed == [(4, *told[0])]
                    assert told[0][2][:2] == client.getsockname()[:2]
                    # The owner answers by its own socket, from the address that the client wrote to.
                    _, _, _, address, control, _ = team.sinks[1].handed[0]
                    assert batch.send([b"answer"], address, LocalAddress(member).reply(control)) == 1
                    client.settimeout(30)
                    assert client.recvfrom(100)[0] == b"answer"
                batch.close()
                team.close()

        run(test)


class TestOnce:
    def test_who_is_handed_one_does_not_hand_it_on(self) -> None:
        async def test(world: World) -> None:
            def on(*what: Any) -> None:
                assert not team.workers[1].give(2, *what)
                assert not team.workers[1].give(0, *what)

            team = Team(world, 3, (Recorder(), Recorder(on), Recorder()))
            give(team.workers[0], 1)
            await world.until(lambda: team.sinks[1].handed)
            await world.turns()
            assert team.sinks[0].handed == team.sinks[2].handed == []
            assert team.workers[1].dropped == {"twice": 2}
            assert give(team.workers[1], 2), "what it receives itself it may give"
            await world.until(lambda: team.sinks[2].handed)
            team.close()

        run(test)

    def test_also_after_a_sink_that_failed(self) -> None:
        async def test(world: World) -> None:
            def on(*_: Any) -> None:
                if len(sink.handed) == 1:
                    raise ValueError("a defect")

            sink = Recorder(on)
            team = Team(world, 2, (Recorder(), sink))
            for number in range(3):
                give(team.workers[0], 1, bytes([number]))
            await world.until(lambda: len(sink.handed) == 3)
            assert give(team.workers[1], 0)
            await world.until(lambda: team.sinks[0].handed)
            team.close()

        run(test, faults=1)


class TestBounds:
    @pytest.mark.parametrize("size", [50, 1200, 65_000])
    def test_a_full_queue_drops_and_counts(self, size: int) -> None:
        async def test(world: World) -> None:
            team = Team(world, 3)
            data = bytes(size)
            sent = 0
            while give(team.workers[0], 2, data):
                sent += 1
                assert sent * size < 64 * handover.QUEUE_BYTES, "there is no end to it"
            assert not give(team.workers[1], 2, data), "the queue is one for all"
            assert give(team.workers[0], 1, data), "another's queue is another"
            assert team.workers[0].dropped == team.workers[1].dropped == {"full": 1}
            assert sent * size <= 4 * handover.QUEUE_BYTES
            await world.until(lambda: len(team.sinks[2].handed) == sent)
            assert give(team.workers[1], 2, data)
            await world.until(lambda: len(team.sinks[2].handed) == sent + 1)
            team.close()

        run(test)

    def test_more_than_a_message_or_two_are_taken(self) -> None:
        """No limit of ten messages, as there is for other Unix datagram sockets."""

        async def test(world: World) -> None:
            team = Team(world, 2)
            assert all(give(team.workers[0], 1, bytes(1200)) for _ in range(50))
            await world.until(lambda: len(team.sinks[1].handed) == 50)
            team.close()

        run(test)

    @pytest.mark.parametrize("queue_bytes", [5_000, 20_000])
    def test_a_buffer_larger_than_the_queue_is_cut_between_datagrams(
        self, monkeypatch: pytest.MonkeyPatch, queue_bytes: int
    ) -> None:
        monkeypatch.setattr(handover, "QUEUE_BYTES", queue_bytes)

        async def test(world: World) -> None:
            team = Team(world, 2)
            data = os.urandom(50 * 1200 + 7)
            is_whole = team.workers[0].give(1, 9, data, 1200, V4, [], 1)
            await world.until(lambda: len(team.sinks[1].handed) == team.workers[0].given > 0)
            received = b"".join(what[1] for what in team.sinks[1].handed)
            assert {(what[0], *what[2:4], what[5]) for what in team.sinks[1].handed} == {(9, 1200, V4, 1)}
            if is_whole:
                assert received == data
                assert not team.workers[0].dropped
            else:
                assert data.startswith(received)
                assert len(received) % 1200 == 0
                assert team.workers[0].dropped == {"full": 1}
            team.close()

        run(test)

    def test_a_datagram_that_cannot_be_cut(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(handover, "QUEUE_BYTES", 20_000)

        async def test(world: World) -> None:
            team = Team(world, 2)
            assert not give(team.workers[0], 1, bytes(60_000))
            assert team.workers[0].dropped == {"failed": 1}
            team.close()

        run(test)

    @pytest.mark.parametrize("worker", [0, 3, 255, -1])
    def test_nobody_there(self, worker: int) -> None:
        async def test(world: World) -> None:
            team = Team(world, 3)
            assert not give(team.workers[0], worker)  # itself, too
            assert team.workers[0].dropped == {"nobody": 1}
            team.close()

        run(test)

    def test_everybody_closed_it(self) -> None:
        async def test(world: World) -> None:
            team = Team(world, 2)
            team.workers[1].close()
            team.workers[1].close()
            team.pairs.close()
            assert not give(team.workers[0], 1)
            assert team.workers[0].dropped == {"failed": 1}
            team.close()

        run(test)

    def test_where_the_queue_cannot_be_made_larger_by_force(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(handover, "_SO_SNDBUFFORCE", 9999)
        pair = Pair()
        assert pair.writer.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= 2 * 65_536
        pair.close()


class TestComingAndGoing:
    def test_who_comes_later_and_who_leaves(self) -> None:
        async def test(world: World) -> None:
            team, other = Team(world, 2), Pair()
            worker = team.workers[0]
            assert not give(worker, 7)
            worker.connect(7, other.writer.dup())
            assert sorted(worker.others) == [1, 7]
            assert give(worker, 7)
            assert other.reader.recv(1000).endswith(b"data")
            worker.disconnect(7)
            worker.disconnect(7)
            assert not give(worker, 7)
            assert worker.dropped == {"nobody": 2}
            other.close()
            team.close()

        run(test)

    def test_whether_anybody_is_there(self) -> None:
        async def test(world: World) -> None:
            team = Team(world, 1)
            writer = team.pairs[0].writer
            assert is_there(writer)
            team.pairs[0].reader.close()
            assert is_there(writer), "the worker has it open"
            await world.turns()
            assert team.workers[0].taken == 0, "to be asked is nothing to take"
            team.workers[0].close()
            assert not is_there(writer)
            team.close()

        run(test)

    def test_whether_anybody_reads_a_full_queue(self) -> None:
        pair = Pair()
        with contextlib.suppress(BlockingIOError):
            while True:
                pair.writer.send(bytes(65_536))
        assert is_there(pair.writer)
        pair.close()


class TestReplacement:
    def test_what_came_while_nobody_was_there(self) -> None:
        async def test(world: World) -> None:
            pairs = Pairs(2)
            first, second = end(pairs, 0), end(pairs, 1)
            second.close()
            assert give(first, 1, b"early")
            again = end(pairs, 1)
            sink = Recorder()
            again.start(world.reactor, sink)
            await world.until(lambda: sink.handed)
            assert sink.handed == [(0, b"early", 5, V4, [], 0)]
            for one in (first, again, pairs):
                one.close()

        run(test)


class TestThreads:
    def test_many_writers_at_once(self) -> None:
        async def test(world: World) -> None:
            workers, each = 5, 150
            team = Team(world, workers)
            home = team.sinks[0]

            def work(index: int) -> None:
                for number in range(each):
                    while not give(team.workers[index], 0, b"%d %d" % (index, number)):
                        pass  # full: the reader is at work

            threads = [threading.Thread(target=work, args=(index,)) for index in range(1, workers)]
            for thread in threads:
                thread.start()
            await world.until(lambda: len(home.handed) == each * (workers - 1))
            for thread in threads:
                thread.join()
            for index in range(1, workers):
                mine = [what[1] for what in home.handed if what[1].startswith(b"%d " % index)]
                assert mine == [b"%d %d" % (index, number) for number in range(each)], "in order"
            team.close()

        run(test)
