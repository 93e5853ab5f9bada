"""Streams (RFC 9113 5): what both roles' streams share - sending within the windows.

A stream keeps what it was given to send and may not send yet: its own window or the connection's is used up,
or the connection's socket is. What is kept is never more than ``max_send_buf_size`` and one chunk, if the
exchange heeds ``blocked``; ``queued`` is its size, and changes only when bytes move.
"""

from collections import deque
from typing import TYPE_CHECKING, Final

from expressgateway.wire.errors import WireError
from expressgateway.wire.h2.fields import triples_of
from expressgateway.wire.h2.flow import ReceiveWindow
from expressgateway.wire.h2.frames import (
    END_STREAM,
    FRAME_HEADER,
    PROTOCOL_ERROR,
    H2StreamError,
    window_update,
)
from expressgateway.wire.h2.guards import DRIBBLE_BYTES
from expressgateway.wire.head import Fields
from expressgateway.wire.streams import CAN_RECEIVE, CLOSED, ON_SENT_END, State, Stream

if TYPE_CHECKING:
    from expressgateway.wire.h2.core import H2Core


BEFORE_HEAD: Final = -2  # a body that may not come yet


class H2Stream(Stream):
    """One request and its answer on a connection, seen from our side."""

    __slots__ = ("_ending", "_offset", "_queue", "_trailers", "is_waiting", "queued", "received", "window")

    connection: "H2Core"

    def __init__(self, connection: "H2Core", stream_id: int, state: State) -> None:
        super().__init__(connection, stream_id, state)
        # Sending
        self.window = connection.initial_window  # bytes the peer lets us send; negative after its SETTINGS
        self._queue: deque[bytes] | None = None  # given, not sent: bounded as the module says
        self._offset = 0  # how much of its first chunk is sent
        self.queued = 0
        self._ending = False  # behind the queue comes the end ...
        self._trailers: Fields | None = None  # ... with these
        self.is_waiting = False  # in the connection's round
        # Receiving
        self.received: ReceiveWindow | None = None  # made with the first DATA

    # -- the roles -------------------------------------------------------------------------------------

    def on_block(self, flags: int, block: bytes) -> None:
        """A header block that does not open the stream."""
        raise NotImplementedError

    # -- sending ---------------------------------------------------------------------------------------

    def send_data(self, chunk: bytes, end: bool) -> None:
        """Part of the body. More or less than was declared is never sent as if it were right."""
        if not self.is_sending:
            return
        size = len(chunk)
        if self.left >= 0:
            self.left -= size
            if self.left < 0 or (end and self.left):
                self.contradicted()
                return
        connection = self.connection
        if end:
            self.is_sending = False
        if (
            size <= self.window
            and size <= connection.send_window
            and size <= connection.frame_bytes
            and not self.queued
            and not connection.turns
            and not connection.is_congested
        ):
            # fast path: one frame, now
            if not size and not end:
                return
            self.window -= size
            connection.send_window -= size
            guards = connection.guards
            guards.moved += size
            guards.sent_frames += size > 0
            out = connection.out
            if not out:
                connection.shell.wake()
            out.append(FRAME_HEADER.pack(size << 8, END_STREAM if end else 0, self.id))
            if size:
                out.append(chunk)
            if end:
                self.sent_end()
            return
        if not size:
            if not end:
                return
            if not self.queued:
                self._send_end(None)
                return
        else:
            queue = self._queue
            if queue is None:
                queue = self._queue = deque()
            queue.append(chunk)
            self.queued += size
        self._ending = end
        if not connection.turns and not connection.is_congested:
            while self.send_frame():
                pass
        if self.queued:
            connection.want_turn(self)
            if not self._is_blocked and self.queued > connection.limits.max_send_buf_size:
                self._is_blocked = True
                self.blocked()

    def send_trailers(self, fields: Fields) -> None:
        """The trailer section, and the end."""
        if not self.is_sending:
            return
        if self.left > 0:
            self.contradicted()
            return
        self.is_sending = False
        if self.queued:
            self._ending = True
            self._trailers = fields
        else:
            self._send_end(fields)

    def _send_end(self, trailers: Fields | None) -> None:
        """Nothing is queued: end with a trailer section, or with an empty frame."""
        connection = self.connection
        if trailers:
            connection.send_block(self.id, triples_of(trailers), True)
        else:
            connection.write(FRAME_HEADER.pack(0, END_STREAM, self.id))
        self.sent_end()

    def sent_end(self) -> None:
        state = self.state = ON_SENT_END[self.state]
        if state is CLOSED:
            self.connection.close_stream(self)
        else:
            self.connection.on_half_local(self)

    def send_frame(self) -> int:
        """This stream's turn: one frame of what is queued. Give its size; 0 if no window allows one."""
        queue = self._queue
        connection = self.connection
        room = min(self.window, connection.send_window, connection.frame_bytes)
        if room <= 0 or not queue:
            return 0
        # As long as windows and queue allow, whatever the chunks: cut at their ends, too, frames would become
        # ever shorter towards a peer that grants again just what each of them took.
        size = left = min(room, self.queued)
        pieces = []
        while left:
            chunk = queue[0]
            offset = self._offset
            has = len(chunk) - offset
            if has <= left:
                queue.popleft()
                self._offset = 0
                pieces.append(chunk[offset:] if offset else chunk)
                left -= has
            else:
                self._offset = offset + left
                pieces.append(chunk[offset : offset + left])
                left = 0
        self.queued -= size
        self.window -= size
        connection.send_window -= size
        guards = connection.guards
        guards.moved += size
        if size >= DRIBBLE_BYTES or not self.queued:
            guards.sent_frames += 1
        is_end = self._ending and not self.queued
        ends_here = is_end and not self._trailers
        out = connection.out
        if not out:
            connection.shell.wake()
        out.append(FRAME_HEADER.pack(size << 8, END_STREAM if ends_here else 0, self.id))
        out += pieces
        if is_end:
            self._ending = False
            if ends_here:
                self.sent_end()
            else:
                self._send_end(self._trailers)
        if self._is_blocked and self.queued * 2 < connection.limits.max_send_buf_size:
            self._is_blocked = False
            self.drained()
        return size

    def can_take_turn(self) -> bool:
        return self.queued > 0 and self.window > 0

    def drop_queue(self) -> None:
        """Nothing more is sent on this stream."""
        self.is_sending = self._ending = self._is_blocked = False
        self._queue = None
        self._offset = self.queued = 0

    def unsent(self) -> int:
        """Bytes given to this stream that are still here. What the connection's socket holds is everyone's,
        and not counted: it moves for others, too."""
        return self.queued

    # -- receiving -------------------------------------------------------------------------------------

    def take(self, size: int) -> bool:
        """DATA has come. False: more than the peer was allowed."""
        received = self.received
        if received is None:
            connection = self.connection
            received = self.received = ReceiveWindow(connection.granted_window, connection.now)
        return received.take(size)

    def give(self, size: int) -> None:
        """It was consumed: grant it again, unless the exchange does not want more."""
        if self._is_paused:
            self._withheld += size
            return
        received = self.received
        connection = self.connection
        if received is None or not CAN_RECEIVE[self.state]:
            return
        before = received.size
        room = min(connection.limits.max_stream_window - before, connection.growth_left)
        increment = received.give(size, connection.now, room)
        if increment:
            connection.growth_left -= received.size - before
            connection.write(window_update(self.id, increment))

    def malformed(self, cause: WireError) -> H2StreamError:
        return H2StreamError(self.id, PROTOCOL_ERROR, cause)

    def resume(self) -> None:
        self._is_paused = False
        withheld, self._withheld = self._withheld, 0
        if withheld:
            self.give(withheld)

    @property
    def has_grown_by(self) -> int:
        """How much of the connection's room for growth this stream has."""
        received = self.received
        return received.size - self.connection.granted_window if received is not None else 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.state.name} queued={self.queued}>"
