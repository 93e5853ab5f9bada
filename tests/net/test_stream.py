"""A stream over real TCP: what the owner hears, what the far end sees, and what is left behind."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from expressgateway.net.stream import HIGH_BYTES, LINGER_BYTES, LINGER_S, LOW_BYTES, STUCK_S, Stream
from tests.net.loopback import (
    Backend,
    Owner,
    World,
    is_reset,
    refused_address,
    run,
    stream_and_peer,
)

BULK = os.urandom(1 << 20) * 3


def fill(stream: Stream) -> int:
    """Write until the kernel takes no more and the backlog is past its mark; gives how many bytes."""
    size = 0
    while stream.backlog_bytes <= HIGH_BYTES:
        stream.write([BULK[size : size + 65536]])
        size += 65536
    return size


class TestWriting:
    def test_bytes_arrive_in_order_and_are_accounted_for(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world, is_narrow=True)
            buffers = [BULK[at : at + 1000] for at in range(0, 1_000_000, 1000)]
            stream.write(buffers[:300])
            assert 0 < stream.backlog_bytes == 300_000 - stream.bytes_out
            stream.write(buffers[300:])
            assert stream.backlog_bytes == 1_000_000 - stream.bytes_out
            assert await peer.read_exactly(1_000_000) == BULK[:1_000_000]
            await world.turns()
            assert (stream.backlog_bytes, stream.bytes_out) == (0, 1_000_000)
            assert owner.calls == ["open", "congested", "drained"]
            stream.close()
            peer.close()

        run(test)

    @pytest.mark.parametrize(
        "sizes",
        [(1,), (40_000,), (1, 2, 3), (20_000, 20_000, 1), (100,) * 600, (300_000, 0), (0, 5, 0), (0,)],
    )
    def test_every_shape_of_a_batch(self, sizes: tuple[int, ...]) -> None:
        async def test(world: World) -> None:
            stream, _, peer = stream_and_peer(world, is_narrow=True)
            buffers = []
            at = 0
            for size in sizes:
                buffers.append(BULK[at : at + size])
                at += size
            stream.write(buffers)
            assert await peer.read_exactly(at) == BULK[:at]
            await world.turns()
            assert await world.batches_in() == 0  # nothing is left that wants to be written
            stream.write([b"end"])
            stream.close()
            assert await peer.read_all() == b"end"
            peer.close()

        run(test)

    def test_each_mark_is_told_exactly_once(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world, is_narrow=True)
            size = fill(stream)
            for _ in range(3):
                stream.write([BULK[size : size + 1000]])
                size += 1000
            assert owner.calls == ["open", "congested"]
            got = 0
            while "drained" not in owner.calls:
                before = stream.backlog_bytes
                got += len(await peer.read_exactly(1))
                await world.turns(1)
                assert ("drained" in owner.calls) == (stream.backlog_bytes <= LOW_BYTES), before
                got += len(await peer.read(65536))
            assert stream.backlog_bytes <= LOW_BYTES
            got += len(await peer.read_exactly(size - got))
            assert owner.calls == ["open", "congested", "drained"]
            fill(stream)
            assert owner.calls == ["open", "congested", "drained", "congested"]
            stream.reset()
            peer.close()

        run(test)

    def test_nothing_is_sent_after_the_end(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world)
            stream.write([b"last"])
            stream.write_eof()
            stream.write([b"late"])
            assert await peer.read_all() == b"last"
            stream.close()
            stream.write([b"later"])
            assert owner.has_ended()
            peer.close()

        run(test)


class TestPausing:
    def test_no_byte_comes_while_paused_and_all_afterwards(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world)
            stream.pause()
            stream.pause()
            await peer.send(b"hello")
            await world.turns()
            assert owner.calls == ["open"]
            stream.resume()
            stream.resume()
            await world.until(lambda: owner.data == b"hello")
            stream.close()
            peer.close()

        run(test)

    def test_paused_with_data_waiting_nothing_spins(self) -> None:
        async def test(world: World) -> None:
            stream, _, peer = stream_and_peer(world)
            stream.pause()
            await peer.send(b"hello")
            peer.write_eof()
            assert await world.batches_in() == 0
            stream.close()
            peer.close()

        run(test)

    def test_a_hang_up_while_paused_is_parked(self) -> None:
        """Both sides have ended; what came before that is still to be read, and nothing spins meanwhile."""

        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world)
            stream.pause()
            await peer.send(BULK[:50_000])
            peer.write_eof()
            stream.write_eof()
            await world.turns()
            assert await world.batches_in() == 0
            assert owner.calls == ["open"]
            stream.resume()
            await world.until(lambda: "eof" in owner.calls)
            assert owner.data == BULK[:50_000]
            assert owner.calls == ["open", "bytes", "eof"]
            await world.turns()
            assert await world.batches_in() == 0  # both ended, not yet closed
            stream.close()
            assert owner.has_ended()
            peer.close()

        run(test)

    def test_a_reset_while_paused_is_heard_at_once(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world)
            stream.pause()
            peer.reset()
            await world.until(owner.has_ended)
            assert owner.calls == ["open", "closed", "released"]
            assert owner.error == os.strerror(errno.ECONNRESET)
            del stream

        run(test)


class TestHalfClose:
    def test_the_peers_end_leaves_sending_open(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world)
            await peer.send(b"question")
            peer.write_eof()
            await world.until(lambda: "eof" in owner.calls)
            assert owner.calls == ["open", "bytes", "eof"]
            assert await world.batches_in() == 0
            stream.write([BULK])
            stream.close()
            assert await peer.read_all() == BULK
            await world.until(owner.has_ended)
            assert "closed" not in owner.calls
            peer.close()

        run(test)

    def test_our_end_comes_after_the_backlog_and_leaves_reading_open(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world, is_narrow=True)
            stream.write([BULK])
            stream.write_eof()
            stream.write_eof()
            assert await peer.read_all() == BULK
            await peer.send(b"answer")
            peer.write_eof()
            await world.until(lambda: "eof" in owner.calls)
            assert owner.data == b"answer"
            stream.close()
            assert owner.has_ended()
            peer.close()

        run(test)


class TestClosing:
    @pytest.mark.parametrize("linger", [False, True])
    @pytest.mark.parametrize("size", [10, 3_000_000])
    def test_what_is_left_is_sent(self, linger: bool, size: int) -> None:
        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world, is_narrow=True)
            stream.write([BULK[:size]])
            stream.close(linger)
            stream.close(linger)
            assert await peer.read_all() == BULK[:size]
            peer.close()
            await world.until(owner.has_ended)
            assert "closed" not in owner.calls

        run(test)

    def test_lingering_spares_the_answer_from_the_reset(self) -> None:
        """Without it the unread upload makes the kernel reset the connection under the answer."""

        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world)
            await peer.send(BULK[:100_000])
            stream.write([b"413"])
            stream.close(linger=True)
            await peer.send(BULK[:100_000])
            assert await peer.read_all() == b"413"
            assert not owner.has_ended()
            peer.write_eof()
            await world.until(owner.has_ended)
            assert owner.calls == ["open", "released"]
            peer.close()

        run(test)

    def test_without_lingering_unread_bytes_reset(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world)
            await peer.send(b"unread")
            stream.close()
            assert owner.calls == ["open", "released"]
            assert await is_reset(peer)
            peer.close()

        run(test)

    def test_a_linger_ends_in_time(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world)
            stream.write([b"bye"])
            stream.close(linger=True)
            now = world.reactor.now
            stream.sweep(now + LINGER_S - 0.1)
            assert not owner.has_ended()
            stream.sweep(now + LINGER_S + 0.1)
            assert owner.has_ended()
            peer.close()

        run(test)

    def test_a_linger_reads_so_much_and_no_more(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world)
            stream.write([b"bye"])
            stream.close(linger=True)
            with pytest.raises(OSError):  # noqa: PT011, PT012 - EPIPE or ECONNRESET, sooner or later
                for _ in range(100):
                    await peer.send(BULK[:100_000])
                    await world.turns(1)
            assert owner.has_ended()
            assert stream.bytes_in <= LINGER_BYTES + 65536
            peer.close()

        run(test)

    def test_the_linger_begins_when_the_answer_is_sent(self) -> None:
        """A slow reader of an early answer gets all of it, however long that takes."""

        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world, is_narrow=True)
            stream.write([BULK])
            stream.close(linger=True)
            now = world.reactor.now
            got = 0
            while stream.backlog_bytes:
                now += LINGER_S
                stream.sweep(now)
                got += len(await peer.read(200_000))
                await world.turns(2)
            assert not owner.has_ended()
            peer.got += BULK[:got]
            assert await peer.read_all() == BULK
            stream.sweep(now + LINGER_S / 2)
            assert not owner.has_ended()
            stream.sweep(now + 2 * LINGER_S)
            assert owner.has_ended()
            peer.close()

        run(test)

    @pytest.mark.parametrize("linger", [False, True])
    def test_what_still_arrives_does_not_cut_the_answer_short(self, linger: bool) -> None:
        """The peer has uploaded a lot and goes on, while it is slow to read what is left to be sent."""

        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world, is_narrow=True)
            for _ in range(4):
                await peer.send(BULK[: LINGER_BYTES // 2])
            await world.until(lambda: len(owner.data) == 2 * LINGER_BYTES)
            stream.write([BULK])
            assert stream.backlog_bytes
            stream.close(linger)
            await peer.send(b"one more")
            await world.turns()
            assert await peer.read_exactly(len(BULK)) == BULK
            peer.close()
            await world.until(owner.has_ended)

        run(test)

    def test_past_its_bound_it_reads_no_more_and_still_sends(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world, is_narrow=True)
            stream.write([BULK])
            stream.close(linger=True)
            quiet = 0
            while quiet < 3:
                try:
                    peer.sock.send(BULK[:65536])
                    quiet = 0
                except BlockingIOError:
                    quiet += 1
                    await world.turns(1)
            assert LINGER_BYTES < stream.bytes_in <= LINGER_BYTES + 65536
            assert not owner.has_ended()
            before = stream.backlog_bytes
            await peer.read_exactly(300_000)
            await world.until(lambda: stream.backlog_bytes < before)
            stream.reset()
            peer.close()

        run(test)

    def test_a_close_whose_rest_nobody_takes_ends_in_time(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world, is_narrow=True)
            stream.write([BULK])
            stream.close()
            now = world.reactor.now
            stream.sweep(now)
            stream.sweep(now + STUCK_S - 1)
            await peer.read_exactly(300_000)
            await world.turns()
            assert stream.backlog_bytes
            stream.sweep(now + STUCK_S + 1)  # it had moved
            assert not owner.has_ended()
            stream.sweep(now + 2 * STUCK_S + 2)
            assert owner.has_ended()
            peer.close()

        run(test)

    def test_reset_sends_rst_and_calls_nobody_but_released(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world)
            stream.write([b"half of it"])
            stream.reset()
            stream.reset()
            assert owner.calls == ["open", "released"]
            assert await is_reset(peer)
            peer.close()

        run(test)

    def test_close_and_reset_from_inside_on_bytes(self) -> None:
        async def test(world: World) -> None:
            class Ending(Owner):
                is_abrupt = False

                def on_bytes(self, data: bytes) -> None:
                    if self.is_abrupt:
                        stream.reset()
                    else:
                        stream.close()

            for is_abrupt in (False, True):
                stream, _, peer = stream_and_peer(world)
                owner = stream.owner = Ending()
                owner.is_abrupt = is_abrupt
                await peer.send(b"x")
                await world.until(owner.has_ended)
                assert owner.calls == ["released"]
                peer.close()

        run(test)


class TestFailing:
    def test_a_reset_by_the_peer_is_told_once_then_released(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world)
            peer.reset()
            await world.until(owner.has_ended)
            assert owner.calls == ["open", "closed", "released"]
            stream.fail("again")
            stream.close()
            stream.reset()
            assert owner.calls == ["open", "closed", "released"]

        run(test)

    def test_failing_while_closing_is_expected(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world, is_narrow=True)
            fill(stream)
            stream.close()
            peer.reset()
            await world.until(owner.has_ended)
            assert "closed" not in owner.calls

        run(test)

    def test_an_answer_that_came_before_the_reset_is_read_first(self) -> None:
        """Early response: the peer answers, closes with the upload unread, and our next write fails."""

        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world)
            stream.write([BULK[:100_000]])
            await peer.read_exactly(1)
            # The loop must not run in between, or it would read the answer in the usual way.
            peer.sock.send(b"HTTP/1.1 413 Too Large\r\n\r\n")
            peer.close()  # with unread bytes: RST
            for _ in range(3):
                stream.write([BULK[:100_000]])
            assert owner.data == b"HTTP/1.1 413 Too Large\r\n\r\n"
            assert owner.has_ended()
            assert owner.calls[-3:] == ["bytes", "closed", "released"]

        run(test)


class TestDelivery:
    def test_a_peer_that_had_closed_before_never_saw_it(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world)
            stream.write([b"first"])
            await peer.read_exactly(5)
            owner.mark = stream.delivery_mark()
            peer.close()  # the kernel of the peer answers what comes now with RST
            stream.write([b"second"])
            await world.until(owner.has_ended)
            assert owner.was_delivered is False

        run(test)

    def test_one_that_took_it_may_have(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world)
            stream.write([b"first"])
            await peer.read_exactly(5)
            owner.mark = stream.delivery_mark()
            stream.write([b"second"])
            await peer.read_exactly(6)
            peer.reset()
            await world.until(owner.has_ended)
            assert owner.was_delivered is True

        run(test)

    def test_one_that_read_it_and_reset_may_have_though_nothing_was_acknowledged(self) -> None:
        """On a connection that goes to and fro, kernels acknowledge late, and RST is no acknowledgement."""

        async def test(world: World) -> None:
            stream, owner, peer = stream_and_peer(world)
            for _ in range(2):
                stream.write([b"first"])
                await peer.read_exactly(5)
                await peer.send(b"answer")
                await world.until(lambda: owner.data == b"answer")
                owner.data.clear()
            owner.mark = stream.delivery_mark()
            stream.write([b"second"])
            assert peer.sock.recv(6) == b"second"
            peer.reset()
            await world.until(owner.has_ended)
            assert owner.was_delivered is True

        run(test)

    def test_afterwards_it_cannot_be_known(self) -> None:
        async def test(world: World) -> None:
            stream, _, peer = stream_and_peer(world)
            stream.reset()
            assert stream.was_delivered(stream.delivery_mark()) is True
            peer.close()

        run(test)


class TestConnecting:
    def dial(self, world: World, address: tuple[str, int]) -> tuple[Stream, Owner]:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        owner = Owner()
        stream = Stream(world.reactor, sock, owner)
        owner.stream = stream
        stream.connect(address)
        return stream, owner

    def test_open_is_told_later_and_the_preamble_comes_first(self) -> None:
        async def test(world: World) -> None:
            backend = Backend()
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            owner = Owner()
            stream = Stream(world.reactor, sock, owner)
            stream.preamble = b"PROXY UNKNOWN\r\n"
            stream.connect(backend.address)
            assert owner.calls == []
            await world.until(lambda: owner.calls)
            assert not stream.is_shaking_hands
            stream.write([b"hello"])
            peer = await backend.accept()
            assert await peer.read_exactly(20) == b"PROXY UNKNOWN\r\nhello"
            stream.close()
            peer.close()
            backend.close()

        run(test)

    def test_refused(self) -> None:
        async def test(world: World) -> None:
            stream, owner = self.dial(world, refused_address())
            assert owner.calls == []
            await world.until(owner.has_ended)
            assert owner.calls == ["closed", "released"]
            assert stream.error_code == errno.ECONNREFUSED

        run(test)

    def test_unreachable_at_once_is_told_later_too(self) -> None:
        async def test(world: World) -> None:
            stream, owner = self.dial(world, ("255.255.255.255", 9))
            assert owner.calls == []
            await world.until(owner.has_ended)
            assert owner.calls == ["closed", "released"]
            assert stream.error_code in (errno.ENETUNREACH, errno.EACCES, errno.ECONNREFUSED)

        run(test)

    @pytest.mark.parametrize("end", [Stream.close, Stream.reset])
    def test_given_up_on_the_way(self, end: object) -> None:
        async def test(world: World) -> None:
            backend = Backend()
            for address in (backend.address, ("255.255.255.255", 9)):
                stream, owner = self.dial(world, address)
                end(stream)  # type: ignore[operator]  # one of the two methods above
                assert owner.calls == ["released"]
                await world.turns()
                assert owner.calls == ["released"]
            backend.close()

        run(test)

    def test_an_event_meant_for_the_descriptors_former_life_does_not_open_it(self) -> None:
        async def test(world: World) -> None:
            # A full queue: the handshake of a further connection stays unanswered.
            backend = Backend(backlog=0)
            waiting = [socket.socket() for _ in range(4)]
            for sock in waiting:
                sock.setblocking(False)
                sock.connect_ex(backend.address)
            stream, owner = self.dial(world, backend.address)
            stream.on_ready(0x1)
            stream.on_ready(0x5)
            assert owner.calls == []
            assert stream.is_shaking_hands
            stream.reset()
            for sock in waiting:
                sock.close()
            backend.close()

        run(test)


def test_a_stream_tells_its_state() -> None:
    async def test(world: World) -> None:
        stream, _, peer = stream_and_peer(world)
        assert repr(stream) == f"<Stream fd={stream.fd} open backlog=0>"
        stream.pause()
        stream.write_eof()
        assert " pw " in repr(stream)
        stream.reset()
        assert " pwX " in repr(stream)
        peer.close()

    run(test)
