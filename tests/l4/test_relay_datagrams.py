"""The queue of datagrams towards one side: bounded, first in first out, and the engine holds next to none."""

from __future__ import annotations

from expressgateway.l4.relay_datagrams import MOST_AT_ONCE, DatagramQueue
from expressgateway.observe.counters import ListenerCounters

PACKET = 1044  # a datagram of 1000 bytes as it leaves


class FakeSide:
    """An engine whose congestion control lets so many bytes go. It never drops."""

    def __init__(self, room_bytes: int = 10**9) -> None:
        self.is_usable = True
        self.room_bytes = room_bytes
        self.takes = True
        self.held: list[bytes] = []
        self.sent: list[bytes] = []

    def send_datagram(self, data: bytes) -> bool:
        if self.takes:
            self.held.append(data)
        return self.takes

    def wake(self) -> None:
        """It is flushed by hand."""

    def flush(self) -> None:
        while self.held and self.room_bytes > 0:
            data = self.held.pop(0)
            self.sent.append(data)
            self.room_bytes -= len(data) + 44


def queue(most: int = 1024, side: FakeSide | None = None) -> tuple[DatagramQueue, FakeSide, ListenerCounters]:
    counters = ListenerCounters("raw")
    one = DatagramQueue(0, most, counters)
    side = side or FakeSide()
    one.use(side)
    return one, side, counters


def numbered(count: int) -> list[bytes]:
    return [b"%04d" % number * 250 for number in range(count)]


def test_what_has_room_leaves_at_once() -> None:
    one, side, counters = queue()
    one.add(b"a")
    one.add(b"b")
    assert side.held == [b"a", b"b"]
    assert len(one) == 0
    assert counters.quic_datagrams == [2, 0]
    assert counters.relayed == [2, 0]


def test_no_more_than_a_turn_at_once() -> None:
    one, side, _ = queue()
    data = numbered(3 * MOST_AT_ONCE)
    for each in data:
        one.add(each)
    assert side.held == data[:MOST_AT_ONCE]
    for _ in range(3):
        assert len(side.held) <= MOST_AT_ONCE
        side.flush()
        one.on_room()
    side.flush()
    assert side.sent == data


def test_an_engine_without_room_holds_one() -> None:
    one, side, _ = queue(side=FakeSide(room_bytes=0))
    for each in numbered(100):
        one.add(each)
        one.on_room()
    assert len(side.held) == 1
    assert len(one) == 99


def test_it_holds_what_fits_and_never_more() -> None:
    one, side, _ = queue(side=FakeSide(room_bytes=5 * PACKET))
    data = numbered(50)
    for each in data:
        one.add(each)
    for _ in range(100):
        assert len(side.held) <= 6
        side.flush()
        one.on_room()  # acknowledgements come and go, the window stays full
        assert len(side.held) <= 6
    assert side.sent == data[: len(side.sent)]
    while side.held or len(one):
        side.room_bytes = 5 * PACKET
        side.flush()
        one.on_room()
        assert len(side.held) <= 6
    assert side.sent == data


def test_the_newest_loses() -> None:
    one, side, counters = queue(most=3, side=FakeSide(room_bytes=0))
    data = numbered(10)
    for each in data:
        one.add(each)
    assert side.held == data[:1]
    assert list(one._waiting) == data[1:4]
    assert counters.quic_dropped == {"queue_full": 6}


def test_what_the_peer_does_not_take() -> None:
    one, side, counters = queue()
    side.takes = False
    one.add(b"x")
    assert len(one) == 0
    assert counters.quic_dropped == {"not_taken": 1}
    assert counters.quic_datagrams == [0, 0]


def test_before_there_is_a_side_and_after_there_was_one() -> None:
    counters = ListenerCounters("raw")
    one = DatagramQueue(1, 2, counters)
    for each in (b"a", b"b", b"c"):
        one.add(each)
    assert counters.quic_dropped == {"queue_full": 1}
    side = FakeSide()
    side.is_usable = False
    one.use(side)
    one.on_room()
    assert not side.held
    side.is_usable = True
    one.on_room()
    assert side.held == [b"a", b"b"]
    side.is_usable = False
    one.add(b"d")
    one.close()
    one.add(b"e")
    assert counters.quic_dropped == {"queue_full": 1, "closed": 1}
    assert counters.quic_datagrams == [0, 2]
