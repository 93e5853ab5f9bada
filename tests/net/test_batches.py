"""Batches of datagrams over loopback: whole, in order, with what the network says beside them."""

import errno
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from expressgateway.net import batches
from expressgateway.net.batches import MAX_SEGMENTS, Address, BatchSocket
from expressgateway.net.datagram import Control


class Recorder:
    def __init__(self) -> None:
        self.buffers: list[tuple[bytes, int]] = []
        self.addresses: list[Address] = []
        self.controls: list[list[Control]] = []
        self.ecn: list[int] = []

    def on_datagrams(
        self, data: bytes, segment_bytes: int, address: Address, control: list[Control], ecn: int
    ) -> None:
        self.buffers.append((data, segment_bytes))
        self.addresses.append(address)
        self.controls.append(control)
        self.ecn.append(ecn)

    @property
    def datagrams(self) -> list[bytes]:
        return [
            data[at : at + size] or data
            for data, size in self.buffers
            for at in range(0, len(data) or 1, size or 1)
        ]


def bound(host: str = "127.0.0.1") -> BatchSocket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
    sock.bind((host, 0))
    return BatchSocket(sock)


@pytest.fixture(params=["127.0.0.1", "::1"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[BatchSocket, BatchSocket]]:
    one, other = bound(request.param), bound(request.param)
    yield one, other
    one.close()
    other.close()


def address_of(batch: BatchSocket) -> Address:
    address: Address = batch.sock.getsockname()
    return address


def received(batch: BatchSocket) -> Recorder:
    recorder = Recorder()
    batch.receive(recorder)
    return recorder


Pair = tuple[BatchSocket, BatchSocket]


class TestSending:
    @pytest.mark.parametrize("count", [1, 2, MAX_SEGMENTS, MAX_SEGMENTS + 1, 150])
    def test_of_one_size(self, pair: Pair, count: int) -> None:
        one, other = pair
        sent = [bytes([number % 256]) * 400 for number in range(count)]
        assert one.send(sent, address_of(other)) == count
        assert received(other).datagrams == sent

    @pytest.mark.parametrize(
        "sizes",
        [
            (10, 10, 3),
            (3, 10),
            (10, 3, 10, 10, 3),
            (1200, 1200, 1, 1),
            (0, 5, 0),
            (10, 0, 10),
            (1, 2, 3, 2, 1),
        ],
    )
    def test_of_several_sizes(self, pair: Pair, sizes: tuple[int, ...]) -> None:
        one, other = pair
        sent = [bytes([number]) * size for number, size in enumerate(sizes)]
        assert one.send(sent, address_of(other)) == len(sent)
        assert received(other).datagrams == sent

    def test_large_ones_fit_a_packet(self, pair: Pair) -> None:
        one, other = pair
        sent = [bytes([number]) * 9000 for number in range(20)]
        assert one.send(sent, address_of(other)) == 20
        assert received(other).datagrams == sent

    def test_where_the_kernel_does_not_cut(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        one, other = pair
        monkeypatch.setattr(batches, "UDP_SEGMENT", 9999)  # an option it does not know
        sent = [bytes([number]) * 400 for number in range(5)]
        assert one.send(sent, address_of(other)) == 5
        assert received(other).datagrams == sent
        assert one.send(sent, address_of(other)) == 5
        assert received(other).datagrams == sent

    def test_what_the_socket_does_not_take_is_told(self, pair: Pair) -> None:
        one, other = pair

        class Full:
            calls = 0

            def sendmsg(self, *_: object) -> int:
                self.calls += 1
                if self.calls == 1:
                    return 0
                raise BlockingIOError

        real, one.sock = one.sock, Full()  # type: ignore[assignment]
        try:
            assert one.send([b"a" * 10, b"b" * 20, b"c" * 30], address_of(other)) == 1
        finally:
            one.sock = real

    def test_what_can_never_be_sent_raises(self, pair: Pair) -> None:
        one, other = pair
        with pytest.raises(OSError, match="too long") as failure:
            one.send([bytes(70_000)], address_of(other))
        assert failure.value.errno == errno.EMSGSIZE


class TestReceiving:
    def test_a_batch_comes_as_one_buffer(self, pair: Pair) -> None:
        one, other = pair
        one.send([b"x" * 500] * 20 + [b"y" * 7], address_of(other))
        recorder = received(other)
        assert recorder.buffers == [(b"x" * 10_000 + b"y" * 7, 500)]
        assert recorder.addresses == [address_of(one)]

    def test_at_most_so_many(self, pair: Pair) -> None:
        one, other = pair
        for size in range(1, 6):
            one.send([b"x" * size], address_of(other))
        recorder = Recorder()
        assert other.receive(recorder, 2) == 2
        assert other.receive(recorder, 9) == 3
        assert len(recorder.datagrams) == 5

    @pytest.mark.parametrize("codepoint", [0, 1, 2, 3])
    def test_ecn(self, pair: Pair, codepoint: int) -> None:
        one, other = pair
        if one.sock.family == socket.AF_INET6:
            one.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, 0x80 | codepoint)
        else:
            one.sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x80 | codepoint)
        one.send([b"x", b"x"], address_of(other))
        assert received(other).ecn == [codepoint]

    def test_the_local_address_on_a_wildcard(self) -> None:
        one, other = bound("127.0.0.1"), bound("0.0.0.0")
        one.send([b"question"], ("127.0.0.7", address_of(other)[1]))
        recorder = received(other)
        (control,) = recorder.controls
        assert other.send([b"answer", b"answer"], recorder.addresses[0], other.local.reply(control)) == 2
        assert received(one).addresses == [("127.0.0.7", address_of(other)[1])]
        one.close()
        other.close()

    def test_no_local_address_where_there_is_one_only(self, pair: Pair) -> None:
        one, other = pair
        one.send([b"x"], address_of(other))
        assert received(other).controls == [[]]


class TestSendCut:
    def test_a_buffer_goes_as_it_came(self, pair: tuple[BatchSocket, BatchSocket]) -> None:
        one, other = pair
        data = b"".join(bytes((at,)) * 100 for at in range(10)) + b"last"
        assert one.send_cut(data, 100, address_of(other)) == 11
        assert received(other).datagrams == [data[at : at + 100] for at in range(0, len(data), 100)]

    def test_one_datagram(self, pair: tuple[BatchSocket, BatchSocket]) -> None:
        one, other = pair
        assert one.send_cut(b"alone", 5, address_of(other)) == 1
        assert received(other).datagrams == [b"alone"]

    def test_to_whom_it_is_connected(self, pair: tuple[BatchSocket, BatchSocket]) -> None:
        one, other = pair
        one.sock.connect(address_of(other))
        assert one.send_cut(b"ab", 1, None) == 2
        assert one.send([b"c"], None) == 1
        assert received(other).datagrams == [b"a", b"b", b"c"]

    def test_what_is_too_large_and_where_the_kernel_does_not_cut(
        self, pair: tuple[BatchSocket, BatchSocket]
    ) -> None:
        one, other = pair
        assert one.send_cut(bytes(66_000), 1000, address_of(other)) == 66  # too large for one buffer
        one._can_cut = False
        assert one.send_cut(b"abcde", 2, address_of(other)) == 3
        assert received(other).datagrams[66:] == [b"ab", b"cd", b"e"]

    def test_without_ecn(self) -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        sock.bind(("127.0.0.1", 0))
        one, other = BatchSocket(sock, tells_ecn=False), bound()
        other.sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 2)
        other.send([b"x"], address_of(one))
        recorder = received(one)
        assert (recorder.datagrams, recorder.ecn) == ([b"x"], [0])
        one.close()
        other.close()


class TestTooLarge:
    def test_one_among_others(self, pair: tuple[BatchSocket, BatchSocket]) -> None:
        one, other = pair
        to = address_of(other)
        assert one.send([b"a", b"b", bytes(66_000), b"c"], to) == 2
        with pytest.raises(OSError, match="too long"):
            one.send([bytes(66_000), b"c"], to)
        assert one.send([b"c"], to) == 1
        assert received(other).datagrams == [b"a", b"b", b"c"]

    @pytest.mark.parametrize("code", [errno.EMSGSIZE, errno.EINVAL])
    @pytest.mark.parametrize("how", ["send", "send_cut"])
    def test_a_buffer_that_cannot_be_cut_says_nothing_of_the_next(
        self, pair: tuple[BatchSocket, BatchSocket], code: int, how: str
    ) -> None:
        """As when its datagrams are larger than what one way takes: others take the next ones as before."""
        one, other = pair
        to = address_of(other)
        one.sock = Refusing(one.sock, code)  # type: ignore[assignment]  # all but ``sendmsg`` is the socket's
        datagrams = [b"a" * 10] * 5
        if how == "send":
            assert one.send(datagrams, to) == 5
        else:
            assert one.send_cut(b"".join(datagrams), 10, to) == 5
        assert one._can_cut
        assert received(other).datagrams == datagrams

    def test_never_in_fragments(self, pair: tuple[BatchSocket, BatchSocket]) -> None:
        one, _ = pair
        batches.never_fragment(one.sock)
        v6 = one.sock.family == socket.AF_INET6
        level, option = (socket.IPPROTO_IPV6, 23) if v6 else (socket.IPPROTO_IP, 10)
        assert one.sock.getsockopt(level, option) == 3


class Refusing:
    """A socket that does not cut buffers."""

    def __init__(self, sock: socket.socket, code: int) -> None:
        self._sock = sock
        self._code = code

    def sendmsg(self, buffers: Any, control: Any, flags: int, to: Any) -> int:
        if any(kind == batches.UDP_SEGMENT for _, kind, _ in control):
            raise OSError(self._code, "no")
        return self._sock.sendmsg(buffers, control, flags, to)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)
