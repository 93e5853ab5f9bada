"""The streams of two connections as conversations: what one side hears, and what the other is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expressgateway.l4.relay_streams import BACKEND, CLIENT, Streams
from expressgateway.observe.counters import ListenerCounters


class FakeSide:
    """An engine that allows so many streams of each kind, and queues until it is told to send."""

    def __init__(self, number: int, allowed: int = 10**6) -> None:
        self.number = number
        self.is_usable = True
        self.allowed = allowed
        self.opened = [0, 0]
        self.calls: list[tuple[object, ...]] = []
        self.waiting: dict[int, int] = {}
        self.consumed_bytes = 0
        self.held_bytes = 0

    def open_stream(self, unidirectional: bool) -> int | None:
        if self.opened[unidirectional] >= self.allowed:
            return None
        self.opened[unidirectional] += 1
        # Streams that come from the client are opened on the backend's side, by a client.
        return (self.opened[unidirectional] - 1) << 2 | unidirectional << 1 | (1 - self.number)

    def send(self, stream_id: int, data: bytes, end: bool) -> None:
        self.calls.append(("send", stream_id, data, end))
        self.waiting[stream_id] = self.waiting.get(stream_id, 0) + len(data)

    def reset(self, stream_id: int, code: int) -> None:
        self.calls.append(("reset", stream_id, code))
        self.waiting.pop(stream_id, None)

    def stop(self, stream_id: int, code: int) -> None:
        self.calls.append(("stop", stream_id, code))

    def consumed(self, stream_id: int, size: int) -> None:
        self.consumed_bytes += size

    def hold(self, size: int) -> None:
        self.held_bytes += size
        assert self.held_bytes >= 0

    def queued(self, stream_id: int) -> int:
        return self.waiting.get(stream_id, 0)

    def wake(self) -> None:
        """It is flushed by hand."""

    def flush(self, size: int = 10**9) -> None:
        for stream_id in list(self.waiting):
            sent = min(size, self.waiting[stream_id])
            self.waiting[stream_id] -= sent
            size -= sent


class Pair:
    def __init__(self, most: int = 256, allowed: int = 10**6) -> None:
        self.counters = ListenerCounters("raw")
        self.streams = Streams(most, self.counters)
        self.client = FakeSide(CLIENT)
        self.backend = FakeSide(BACKEND, allowed)
        self.streams.use(CLIENT, self.client)
        self.streams.use(BACKEND, self.backend)

    def flush(self) -> None:
        for side in (self.client, self.backend):
            side.flush()
            self.streams.on_room(side.number)


class TestPassing:
    def test_data_is_consumed_as_it_leaves(self) -> None:
        pair = Pair()
        pair.streams.on_data(CLIENT, 0, bytes(1000), False)
        assert pair.backend.calls == [("send", 0, bytes(1000), False)]
        pair.streams.on_room(BACKEND)
        assert pair.client.consumed_bytes == 0
        pair.backend.flush(300)
        pair.streams.on_room(BACKEND)
        assert pair.client.consumed_bytes == 300
        pair.backend.flush()
        pair.streams.on_room(BACKEND)
        assert pair.client.consumed_bytes == 1000
        assert pair.counters.relayed == [1000, 0]

    @pytest.mark.parametrize("kind", [0, 1, 2, 3])
    def test_a_stream_is_over_when_both_directions_are(self, kind: int) -> None:
        pair = Pair()
        opener = kind & 1
        pair.streams.on_data(opener, kind, b"x", True)
        assert pair.streams.relayed == 1
        pair.flush()
        if not kind & 2:
            assert pair.streams.relayed == 1
            pair.streams.on_data(1 - opener, kind, b"", True)
        assert pair.streams.relayed == 0
        assert pair.streams.is_empty
        assert pair.counters.quic_streams == ([0, 1] if opener else [1, 0])

    def test_those_in_between_are_opened_too(self) -> None:
        pair = Pair()
        pair.streams.on_data(CLIENT, 8, b"x", False)
        assert pair.backend.opened == [3, 0]
        assert pair.streams.relayed == 3
        pair.streams.on_data(CLIENT, 0, b"y", False)
        assert pair.backend.calls[-1] == ("send", 0, b"y", False)

    def test_what_comes_for_a_stream_that_is_over_is_consumed(self) -> None:
        pair = Pair()
        pair.streams.on_data(CLIENT, 2, b"x", True)
        pair.flush()
        before = pair.client.consumed_bytes
        pair.streams.on_data(CLIENT, 2, b"more", False)
        pair.streams.on_reset(CLIENT, 2, 1)
        pair.streams.on_stop(BACKEND, 2, 1)
        assert pair.client.consumed_bytes == before + 4
        assert pair.streams.is_empty
        assert pair.backend.opened == [0, 1]

    def test_a_stream_that_only_the_peer_can_have_opened(self) -> None:
        """A side cannot begin a stream of the other's kind: nothing is opened for it."""
        pair = Pair()
        pair.streams.on_data(BACKEND, 0, b"x", False)
        assert pair.client.opened == [0, 0]
        assert pair.backend.consumed_bytes == 1


class TestEnding:
    def test_a_reset_gives_up_what_is_queued(self) -> None:
        pair = Pair()
        pair.streams.on_data(CLIENT, 2, bytes(1000), False)
        pair.streams.on_reset(CLIENT, 2, 9)
        assert pair.backend.calls[-1] == ("reset", 2, 9)
        assert pair.client.consumed_bytes == 1000
        assert pair.streams.is_empty

    def test_a_refusal_gives_up_what_is_queued_and_the_rest_that_comes(self) -> None:
        pair = Pair()
        pair.streams.on_data(CLIENT, 0, bytes(1000), False)
        pair.streams.on_stop(BACKEND, 0, 9)
        assert pair.client.calls == [("stop", 0, 9)]
        assert pair.client.consumed_bytes == 1000
        pair.streams.on_data(CLIENT, 0, bytes(500), True)
        assert pair.client.consumed_bytes == 1500
        assert len(pair.backend.calls) == 1
        pair.streams.on_data(BACKEND, 0, b"", True)
        assert pair.streams.is_empty


class TestWaiting:
    def test_beyond_the_limit_they_wait_in_order(self) -> None:
        pair = Pair(most=2)
        for stream in (2, 6, 10, 14):
            pair.streams.on_data(CLIENT, stream, b"%d" % stream, True)
        assert [call[1] for call in pair.backend.calls] == [2, 6]
        assert pair.client.held_bytes == 4
        pair.flush()
        assert [call[1] for call in pair.backend.calls] == [2, 6, 10, 14]
        pair.flush()
        assert pair.client.held_bytes == 0
        assert pair.client.consumed_bytes == 6
        assert pair.streams.is_empty

    def test_one_limit_for_all_kinds(self) -> None:
        pair = Pair(most=3)
        for stream in (0, 2, 4, 6):
            pair.streams.on_data(CLIENT, stream, b"x", False)
        for stream in (1, 3):
            pair.streams.on_data(BACKEND, stream, b"x", False)
        assert pair.streams.relayed == 3
        assert sum(pair.backend.opened) + sum(pair.client.opened) == 3

    def test_a_peer_that_allows_no_more(self) -> None:
        pair = Pair(allowed=1)
        for stream in (0, 4):
            pair.streams.on_data(CLIENT, stream, b"x", False)
        pair.streams.on_data(CLIENT, 2, b"another kind", False)
        assert [call[1] for call in pair.backend.calls] == [0, 2]
        pair.backend.allowed = 2
        pair.streams.on_allowed()
        assert pair.backend.calls[-1] == ("send", 4, b"x", False)

    def test_before_there_is_a_backend(self) -> None:
        pair = Pair()
        pair.backend.is_usable = False
        pair.streams.on_data(CLIENT, 0, b"one", False)
        pair.streams.on_data(CLIENT, 0, b"two", True)
        assert not pair.backend.calls
        assert pair.client.consumed_bytes == 0
        pair.backend.is_usable = True
        pair.streams.on_allowed()
        assert pair.backend.calls == [("send", 0, b"onetwo", True)]

    def test_what_waits_can_be_given_up(self) -> None:
        pair = Pair()
        pair.backend.is_usable = False
        pair.streams.on_data(CLIENT, 0, b"one", False)
        pair.streams.on_reset(CLIENT, 0, 5)
        pair.streams.on_stop(CLIENT, 0, 6)
        assert (pair.client.held_bytes, pair.client.consumed_bytes) == (0, 3)
        pair.backend.is_usable = True
        pair.streams.on_allowed()
        assert pair.backend.calls == [("reset", 0, 5), ("stop", 0, 6)]
        assert pair.streams.is_empty

    def test_a_thousand_that_are_over_at_once(self) -> None:
        """Each makes room for the next, without one call inside the other."""
        pair = Pair(most=1)
        pair.streams.on_data(CLIENT, 2, b"x", False)
        for number in range(1, 3000):
            pair.streams.on_data(CLIENT, number << 2 | 2, b"", True)
        pair.streams.on_data(CLIENT, 2, b"", True)
        pair.flush()
        assert pair.streams.is_empty
        assert pair.counters.quic_streams == [3000, 0]

    def test_the_end_of_all(self) -> None:
        pair = Pair(most=1)
        for stream in (0, 4):
            pair.streams.on_data(CLIENT, stream, b"x", False)
        assert pair.counters.quic_streams_open == 1
        pair.streams.close()
        assert pair.counters.quic_streams_open == 0
        assert pair.streams.is_empty


EVENT = st.tuples(
    st.sampled_from(["data", "end", "reset", "stop", "flush", "allow"]),
    st.integers(0, 1),
    st.integers(0, 15),
    st.integers(0, 50),
)


@given(st.lists(EVENT, max_size=60), st.integers(1, 4), st.integers(0, 3))
def test_whatever_happens_nothing_is_lost_or_counted_twice(
    events: list[tuple[str, int, int, int]], most: int, allowed: int
) -> None:
    pair = Pair(most, allowed)
    received = [0, 0]
    ended: set[tuple[int, int]] = set()  # what a peer has ended it sends nothing on
    for what, side, stream, size in events:
        is_open = stream & 1 == side or (not stream & 2 and stream >> 2 < pair.streams._seen[stream & 3])
        can_send = is_open and (side, stream) not in ended
        match what:
            case "data" | "end" if can_send:
                pair.streams.on_data(side, stream, bytes(size), what == "end")
                received[side] += size
                if what == "end":
                    ended.add((side, stream))
            case "reset" if can_send:
                pair.streams.on_reset(side, stream, 1)
                ended.add((side, stream))
            case "stop" if not stream & 2 or stream & 1 != side:
                pair.streams.on_stop(side, stream, 1)
            case "flush":
                pair.flush()
            case "allow":
                pair.backend.allowed += 1
                pair.streams.on_allowed()
        assert 0 <= pair.streams.relayed <= most
        for number, each in enumerate((pair.client, pair.backend)):
            waiting = sum(
                len(one.waiting.data)
                for one in pair.streams._by_id.values()
                if one.waiting is not None and one.id & 1 == number
            )
            unsent = sum(one.unsent[number] for one in pair.streams._by_id.values())
            assert each.held_bytes == waiting
            assert each.consumed_bytes + unsent + waiting == received[number]
    pair.backend.allowed = 10**6
    pair.streams.on_allowed()
    for _ in range(40):
        pair.flush()
        for stream in list(pair.streams._by_id):
            for side in (CLIENT, BACKEND):
                if not stream & 2 or stream & 1 == side:
                    pair.streams.on_reset(side, stream, 1)
    assert pair.streams.is_empty
    assert pair.streams.relayed == pair.counters.quic_streams_open == 0
    assert [pair.client.consumed_bytes, pair.backend.consumed_bytes] == received
