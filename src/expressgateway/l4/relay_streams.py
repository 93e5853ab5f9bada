"""The streams of two QUIC connections, one to one: what a listener with ``quic.raw_proxy`` relays.

*Sides* are the two connections: 0 the client's, 1 the backend's. A *direction* goes by the side that the
data comes from.

A stream has the same ID on both sides. Application protocols write stream IDs into what they say (QPACK's
acknowledgements, GOAWAY, HTTP datagrams), so another ID would be another stream to them. It comes about
without a table: the gateway is the server of the one connection and the client of the other, so whoever may
open a stream there may open it here, and streams of one kind are opened here in the order of their numbers,
those in between included, as RFC 9000 3.2 has it at the receiver.

Nothing is kept of what was read but for streams that the other side does not allow yet. Data goes into the
other engine's queue at once, and is *consumed* - the sender may send as much again - as far as it has left
that queue. So each direction of a stream holds one window at most, and a receiver that does not read stalls
its sender.

At most so many streams are relayed at once, and no more than the other side allows. Those beyond wait, in
the order of their numbers, with the little that may be sent before a stream is granted its window
(`FIRST_BYTES`). That little is kept outside of the connection's window: else streams that wait for others to
end would keep the others from ending.
"""

from collections import deque
from typing import Final, Protocol

from expressgateway.observe.counters import ListenerCounters

CLIENT: Final = 0
BACKEND: Final = 1
STREAM_BYTES: Final = 262_144  # each way
FIRST_BYTES: Final = 16_384  # more than a sender's first flight: it never waits for the window
_KINDS: Final = 4  # by the low bits of an ID (RFC 9000 2.1): who opened it, and whether it is unidirectional
_UNIDIRECTIONAL: Final = 2


class Side(Protocol):
    """One connection, as far as its streams go."""

    @property
    def is_usable(self) -> bool:
        """Whether streams can be opened on it."""

    def open_stream(self, unidirectional: bool) -> int | None: ...
    def send(self, stream_id: int, data: bytes, end: bool) -> None: ...
    def reset(self, stream_id: int, code: int) -> None: ...
    def stop(self, stream_id: int, code: int) -> None: ...
    def consumed(self, stream_id: int, size: int) -> None: ...
    def hold(self, size: int) -> None: ...
    def queued(self, stream_id: int) -> int: ...
    def wake(self) -> None:
        """Something may have to be sent."""


class Waiting:
    """What has come for a stream that is not open on the other side."""

    __slots__ = ("data", "is_complete", "reset_code", "stop_code")

    def __init__(self) -> None:
        self.data = bytearray()  # at most FIRST_BYTES: nothing of it is consumed
        self.is_complete = False
        self.reset_code: int | None = None
        self.stop_code: int | None = None


class RelayedStream:
    """One stream on both sides."""

    __slots__ = ("id", "is_done", "unsent", "waiting")

    def __init__(self, stream_id: int) -> None:
        self.id = stream_id
        opener = stream_id & 1
        self.is_done = [False, False]
        """By direction: its end, a reset, or the receiver's refusal of it was passed on."""
        if stream_id & _UNIDIRECTIONAL:
            self.is_done[1 - opener] = True
        self.unsent = [0, 0]
        """By direction: bytes that were given to the other side and have not left it, or not been consumed
        yet."""
        self.waiting: Waiting | None = Waiting()

    @property
    def is_over(self) -> bool:
        return self.is_done[0] and self.is_done[1] and not self.unsent[0] and not self.unsent[1]


class Streams:
    """All streams of one client's connection and its backend's."""

    __slots__ = (
        "_by_id",
        "_counters",
        "_is_again",
        "_is_opening",
        "_most",
        "_seen",
        "_sides",
        "_turn",
        "_unsent",
        "_waiting",
        "relayed",
    )

    def __init__(self, most: int, counters: ListenerCounters) -> None:
        """``most``: relayed at once."""
        self._most = most
        self._counters = counters
        self._sides: list[Side | None] = [None, None]
        self._by_id: dict[int, RelayedStream] = {}  # as many as the sides are allowed to open
        self._seen = [0] * _KINDS  # streams there were, by kind
        self._waiting: list[deque[RelayedStream]] = [deque() for _ in range(_KINDS)]  # of these
        self._turn = 0  # the kind that is looked at first
        self._is_opening = False
        self._is_again = False  # there is room again since the last look
        self._unsent: tuple[dict[int, RelayedStream], dict[int, RelayedStream]] = ({}, {})  # by direction
        self.relayed = 0
        """Open on both sides now."""

    def use(self, number: int, side: Side) -> None:
        """``side``: the connection of that number from now on, in place of one that never came to be."""
        self._sides[number] = side

    @property
    def is_empty(self) -> bool:
        return not self._by_id

    def has_unsent(self, direction: int) -> bool:
        return bool(self._unsent[direction])

    # -- what a side hears -----------------------------------------------------------------------------

    def on_data(self, origin: int, stream_id: int, data: bytes, end: bool) -> None:
        stream = self._by_id.get(stream_id) or self._meet(origin, stream_id)
        if stream is None:
            self._discard(origin, stream_id, len(data))
        elif stream.waiting is None:
            self._pass(stream, origin, data, end)
        elif stream_id & 1 != origin:
            self._discard(origin, stream_id, len(data))  # of a stream that it cannot know
        else:
            stream.waiting.data += data
            stream.waiting.is_complete = end
            self._hold(origin, len(data))

    def on_reset(self, origin: int, stream_id: int, code: int) -> None:
        stream = self._by_id.get(stream_id) or self._meet(origin, stream_id)
        if stream is None:
            return
        if stream.waiting is None:
            target = self._sides[1 - origin]
            if target is not None:
                target.reset(stream_id, code)
                target.wake()
            self._finish(stream, origin)
        elif stream_id & 1 == origin:
            size = len(stream.waiting.data)
            self._hold(origin, -size)
            self._discard(origin, stream_id, size)
            stream.waiting.data.clear()
            stream.waiting.reset_code = code

    def on_stop(self, origin: int, stream_id: int, code: int) -> None:
        """The peer wants no more of what the other side sends."""
        stream = self._by_id.get(stream_id) or self._meet(origin, stream_id)
        if stream is None:
            return
        if stream.waiting is None:
            self._stop(stream, origin, code)
        elif stream_id & 1 == origin:
            stream.waiting.stop_code = code

    def on_allowed(self) -> None:
        """A side is usable, or allows more streams."""
        self._open_waiting()

    def on_room(self, number: int) -> None:
        """Some of what that side was given may have left it."""
        direction = 1 - number
        unsent = self._unsent[direction]
        if not unsent:
            return
        target, origin = self._sides[number], self._sides[direction]
        if target is None or origin is None:
            return
        is_consumed = False
        for stream in list(unsent.values()):
            left = target.queued(stream.id)
            sent = stream.unsent[direction] - left
            if sent > 0:
                is_consumed = True
                stream.unsent[direction] = left
                origin.consumed(stream.id, sent)
            if not left:
                del unsent[stream.id]
                self._forget_if_over(stream)
        if is_consumed:
            origin.wake()

    # -- passing on ------------------------------------------------------------------------------------

    def _pass(self, stream: RelayedStream, origin: int, data: bytes, end: bool) -> None:
        target = self._sides[1 - origin]
        if stream.is_done[origin] or target is None:
            self._discard(origin, stream.id, len(data))
            return
        target.send(stream.id, data, end)
        target.wake()
        if data:
            self._counters.relayed[origin] += len(data)
            stream.unsent[origin] += len(data)
            self._unsent[origin][stream.id] = stream
        if end:
            stream.is_done[origin] = True
            self._forget_if_over(stream)

    def _stop(self, stream: RelayedStream, origin: int, code: int) -> None:
        sender = 1 - origin
        side = self._sides[sender]
        if side is not None:
            side.stop(stream.id, code)
            side.wake()
        self._finish(stream, sender)

    def _finish(self, stream: RelayedStream, direction: int) -> None:
        """Nothing more goes this way, and what was on its way is given up."""
        stream.is_done[direction] = True
        if self._unsent[direction].pop(stream.id, None) is not None:
            self._discard(direction, stream.id, stream.unsent[direction])
            stream.unsent[direction] = 0
        self._forget_if_over(stream)

    def _discard(self, origin: int, stream_id: int, size: int) -> None:
        side = self._sides[origin]
        if size and side is not None:
            side.consumed(stream_id, size)
            side.wake()

    def _hold(self, origin: int, size: int) -> None:
        side = self._sides[origin]
        if size and side is not None:
            side.hold(size)
            side.wake()

    # -- the life of a stream --------------------------------------------------------------------------

    def _meet(self, origin: int, stream_id: int) -> RelayedStream | None:
        """A stream that is not known: a new one, or ``None`` if it is over."""
        kind = stream_id & (_KINDS - 1)
        number = stream_id >> 2
        if kind & 1 != origin or number < self._seen[kind]:
            return None
        while self._seen[kind] <= number:
            stream = RelayedStream(self._seen[kind] << 2 | kind)
            self._seen[kind] += 1
            self._by_id[stream.id] = stream
            self._waiting[kind].append(stream)
        self._open_waiting()
        return stream

    def _open_waiting(self) -> None:
        """Open what can be opened. The kinds take turns at being first: the others may find no room left."""
        self._is_again = True
        if self._is_opening:
            return
        self._is_opening = True
        try:
            while self._is_again:
                self._is_again = False
                self._open_some()
        finally:
            self._is_opening = False

    def _open_some(self) -> None:
        self._turn = (self._turn + 1) % _KINDS
        for step in range(_KINDS):
            kind = (self._turn + step) % _KINDS
            waiting = self._waiting[kind]
            while waiting and self.relayed < self._most:
                target = self._sides[1 - (kind & 1)]
                if target is None or not target.is_usable:
                    break
                if target.open_stream(bool(kind & _UNIDIRECTIONAL)) is None:
                    break
                self.relayed += 1
                self._counters.quic_streams[kind & 1] += 1
                self._counters.quic_streams_open += 1
                self._begin(waiting.popleft())

    def _begin(self, stream: RelayedStream) -> None:
        """It is open on both sides: pass on what has come so far."""
        waiting, stream.waiting = stream.waiting, None
        if waiting is None:
            return
        opener = stream.id & 1
        if waiting.reset_code is not None:
            target = self._sides[1 - opener]
            if target is not None:
                target.reset(stream.id, waiting.reset_code)
                target.wake()
            stream.is_done[opener] = True
        elif waiting.data or waiting.is_complete:
            self._hold(opener, -len(waiting.data))
            self._pass(stream, opener, bytes(waiting.data), waiting.is_complete)
        if waiting.stop_code is not None:
            self._stop(stream, opener, waiting.stop_code)
        else:
            self._forget_if_over(stream)

    def _forget_if_over(self, stream: RelayedStream) -> None:
        if stream.is_over and self._by_id.pop(stream.id, None) is not None:
            self.relayed -= 1
            self._counters.quic_streams_open -= 1
            if any(self._waiting):
                self._open_waiting()

    def close(self) -> None:
        """The connections are over."""
        self._counters.quic_streams_open -= self.relayed
        self.relayed = 0
        self._by_id.clear()
        for waiting in self._waiting:
            waiting.clear()
        for unsent in self._unsent:
            unsent.clear()
