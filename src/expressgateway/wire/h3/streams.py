"""Request streams (RFC 9114 4, 6.1): what both roles' streams share - cutting frames, and sending.

Frames are cut here, for on each stream they begin anew. A DATA frame's payload is told as it comes, a
HEADERS frame's once it is whole; of what is unknown only the size is kept. A block that waits for the
QPACK table stops its stream: what comes behind it is parked, and not consumed, so that the transport's
window bounds it.

Nothing is kept of what is sent: the transport has it. A stream whose both sides are complete stays with
its connection until the transport has sent all of it, so that one which its peer does not read can be
found.

Credit: every byte that came is consumed once - framing at once, a body's bytes after the sink has had
them, unless the exchange is paused; then when it resumes.
"""

from enum import IntEnum
from typing import TYPE_CHECKING, Final

from expressgateway.wire.errors import WireError
from expressgateway.wire.h2.fields import triples_of
from expressgateway.wire.h2.hpack import OversizedError, Triple
from expressgateway.wire.h3.frames import (
    DATA,
    FRAME_ERROR,
    FRAME_UNEXPECTED,
    HEADERS,
    H3ConnectionError,
    H3StreamError,
    contradiction,
    frame_header,
    integer_at,
    malformed,
)
from expressgateway.wire.h3.qpack import BlockedError
from expressgateway.wire.head import Fields
from expressgateway.wire.streams import CAN_RECEIVE, CLOSED, ON_RECEIVED_END, ON_SENT_END, State, Stream

if TYPE_CHECKING:
    from expressgateway.wire.h3.core import H3Core

_BETWEEN: Final = -1  # frames: the next byte begins one
_SKIPPED: Final = -2  # a frame whose payload nobody reads
_SMALL_BYTES: Final = 4096  # of a chunk: copying it is cheaper than another call


class Phase(IntEnum):
    """What has come of a message (RFC 9114 4.1)."""

    HEAD = 0
    """Nothing but interim responses."""
    BODY = 1
    TRAILERS = 2
    """All but the end of the stream."""


HEAD, BODY, TRAILERS = Phase.HEAD, Phase.BODY, Phase.TRAILERS


class H3Stream(Stream):
    """One request and its answer on a connection, seen from our side."""

    __slots__ = (
        "_arrived",
        "_block",
        "_bound",
        "_held",
        "_kind",
        "_left_in_frame",
        "_parked",
        "_parked_bytes",
        "_trailers",
        "began_at",
        "has_end",
        "is_busy",
        "phase",
    )

    connection: "H3Core"

    def __init__(self, connection: "H3Core", stream_id: int, state: State) -> None:
        super().__init__(connection, stream_id, state)
        # Exchange
        self.began_at = connection.now  # seconds
        # Sending
        self._bound = 0  # no more than this is queued in the transport
        self.is_busy = False  # among those that are looked at after a flush
        # Receiving
        self.phase = HEAD
        self._kind = _BETWEEN
        self._left_in_frame = 0
        self._held = b""  # of a frame's type and length: at most 15 bytes
        self._block: bytearray | None = None  # at most max_header_list_size
        self._trailers: Fields | None = None  # they wait for the end
        self._parked: bytearray | None = None  # behind a block that waits: at most the transport's window
        self._parked_bytes = 0
        self.has_end = False  # the transport brings nothing more
        self._arrived = 0  # bytes of a body in this read

    # -- the roles -------------------------------------------------------------------------------------

    def on_block(self, block: bytes, end: bool) -> None:
        """A whole header block. Raises ``BlockedError`` if it must wait."""
        raise NotImplementedError

    def on_fields(self, fields: list[Triple] | OversizedError, block: bytes, end: bool) -> None:
        """What it says, or that it is more than allowed. ``block`` is empty if it had to wait."""
        raise NotImplementedError

    def on_oversized(self, end: bool) -> None:
        """A header block that is too large to be read: it will be skipped."""
        self.on_fields(OversizedError([]), b"", end)

    def on_trailers(self, fields: Fields) -> None:
        raise NotImplementedError

    def on_headless(self) -> None:
        """The peer has ended its side before its head."""
        raise NotImplementedError

    def on_stop(self, code: int) -> None:
        """The peer reads no more."""
        raise NotImplementedError

    # -- receiving -------------------------------------------------------------------------------------

    def receive(self, data: bytes, end: bool) -> None:
        """Take what came. Raises ``H3StreamError`` and ``H3ConnectionError``."""
        if end:
            self.has_end = True
        if self._parked is not None:
            self._parked += data
            self._parked_bytes += len(data)
            return
        self._arrived = 0
        try:
            self._read(data, end)
        finally:
            used = len(data) - self._parked_bytes
            if self._arrived and self._is_paused and CAN_RECEIVE[self.state]:
                self._withheld += self._arrived
                used -= self._arrived
            if used:
                self.connection.transport.consumed(self.id, used)

    def _read(self, data: bytes, end: bool) -> None:
        if self._held:
            data = self._held + data
            self._held = b""
        at = 0
        size = len(data)
        while at < size:
            kind = self._kind
            if kind == _BETWEEN:
                begin = at
                kind = data[at]
                if size - at > 2 and kind < 0x40 and data[at + 1] < 0x80:
                    # fast path: a known type, and less than 16 KiB
                    left = data[at + 1]
                    at += 2
                    if left >= 0x40:
                        left = (left & 0x3F) << 8 | data[at]
                        at += 1
                else:
                    kind, at = integer_at(data, at)
                    left = 0
                    if at >= 0:
                        left, at = integer_at(data, at)
                    if at < 0:
                        self._held = data[begin:]
                        break
                kind = self._begin_frame(kind, left, end and at == size)
                if not CAN_RECEIVE[self.state]:
                    return
                self._left_in_frame = left
                self._kind = kind
            left = self._left_in_frame
            room = size - at
            if room < left:
                # The rest of it is still to come.
                piece = data[at:] if at else data
                self._left_in_frame = left - room
                if kind == DATA:
                    if room:
                        self._arrived += room
                        self.on_body(piece, False)
                elif kind == HEADERS:
                    if self._block is None:
                        self._block = bytearray()
                    self._block += piece
                break
            piece = data[at : at + left]
            at += left
            self._kind = _BETWEEN
            is_last = end and at == size
            if kind == DATA:
                self._arrived += left
                if is_last:
                    self._end_body(piece)
                    return
                if left:
                    self.on_body(piece, False)
            elif kind == HEADERS:
                if self._block is not None:
                    piece = bytes(self._block + piece)
                    self._block = None
                try:
                    self.on_block(piece, is_last)
                except BlockedError:
                    self.connection.park(self)
                    self._parked = bytearray(data[at:])
                    self._parked_bytes = size - at
                    return
                if is_last:
                    return
            if not CAN_RECEIVE[self.state]:
                return
        if end and CAN_RECEIVE[self.state]:
            self._end()

    def _begin_frame(self, kind: int, size: int, is_last: bool) -> int:
        """Judge a frame by its type and size. Give its type, or ``_SKIPPED``."""
        if kind == DATA:
            if self.phase is not BODY:
                raise H3ConnectionError(FRAME_UNEXPECTED, "DATA before a head or behind trailers")
            self.connection.guards.moved += size
            if self.expected >= 0:
                self.expected -= size
                if self.expected < 0:
                    raise contradiction(self.id)
            if not size and not is_last:
                self.connection.guards.on_empty(self.connection.now)
            return DATA
        if kind == HEADERS:
            if self.phase is TRAILERS or (self.is_tunnel and self.phase is BODY):
                raise H3ConnectionError(FRAME_UNEXPECTED, "HEADERS behind trailers, or in a tunnel")
            if size > self.connection.limits.max_header_list_size:
                self.connection.guards.on_oversized(self.connection.now)
                self.on_oversized(False)
                return _SKIPPED
            return HEADERS
        self.connection.check_frame(kind)
        return _SKIPPED

    def _end(self) -> None:
        """The stream has ended, and not with the frame just read (RFC 9114 7.1)."""
        if self._kind != _BETWEEN or self._held:
            raise H3ConnectionError(FRAME_ERROR, "a stream that ends inside a frame")
        if self.phase is BODY:
            self._end_body(b"")
        elif self.phase is HEAD:
            self.on_headless()
        else:
            self._end_trailers()

    def _end_body(self, chunk: bytes) -> None:
        if self.expected > 0:
            raise contradiction(self.id)
        self.take_end()
        self.on_body(chunk, True)
        self.connection.finish(self)

    def trailers_read(self, fields: Fields, end: bool) -> None:
        """A trailer section is sound. It is told with the end of the stream."""
        if self.expected > 0:
            raise contradiction(self.id)
        self.phase = TRAILERS
        self._trailers = fields
        if end:
            self._end_trailers()

    def _end_trailers(self) -> None:
        trailers, self._trailers = self._trailers, None
        self.take_end()
        self.on_trailers(trailers or ())
        self.connection.finish(self)

    def take_end(self) -> None:
        """The peer's side is complete."""
        self.state = ON_RECEIVED_END[self.state]

    def unpark(self, fields: list[Triple] | OversizedError) -> None:
        """The block that waited is decoded: go on with what is behind it."""
        parked = bytes(self._parked or b"")
        end = self.has_end
        self._parked = None
        self._parked_bytes = 0
        is_last = end and not parked
        try:
            self.on_fields(fields, b"", is_last)
        except BaseException:
            if parked:
                self.connection.transport.consumed(self.id, len(parked))
            raise
        if is_last:
            return
        if CAN_RECEIVE[self.state]:
            self.receive(parked, end)
        elif parked:
            self.connection.transport.consumed(self.id, len(parked))

    @property
    def is_mid_head(self) -> bool:
        return self.phase is HEAD and CAN_RECEIVE[self.state]

    def stop_reading(self) -> bool:
        """Nothing more is read: consume what was kept. Give whether the peer's end is still to come."""
        is_open = CAN_RECEIVE[self.state] and not self.has_end
        kept = self._withheld + self._parked_bytes
        self._withheld = self._parked_bytes = 0
        self._parked = self._block = None
        self._held = b""
        if kept:
            self.connection.transport.consumed(self.id, kept)
        return is_open

    def resume(self) -> None:
        self._is_paused = False
        withheld, self._withheld = self._withheld, 0
        if withheld:
            connection = self.connection
            connection.wake()
            connection.transport.consumed(self.id, withheld)

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
        if size:
            connection.guards.moved += size
            if size <= _SMALL_BYTES:
                connection.write(self.id, frame_header(DATA, size) + chunk, end)
            else:
                connection.write(self.id, frame_header(DATA, size), False)
                connection.transport.send(self.id, chunk, end)
        elif end:
            connection.write(self.id, b"", True)
        else:
            return
        if end:
            self.is_sending = False
            self.sent_end()
            return
        self._bound += size + 8
        if self._bound > connection.limits.max_send_buf_size and not self._is_blocked:
            queued = self._bound = connection.transport.queued(self.id)
            if queued > connection.limits.max_send_buf_size:
                self._is_blocked = True
                connection.watch(self)
                self.blocked()

    def send_trailers(self, fields: Fields) -> None:
        """The trailer section, and the end."""
        if not self.is_sending:
            return
        if self.left > 0:
            self.contradicted()
            return
        self.is_sending = False
        if fields:
            self.connection.send_block(self.id, triples_of(fields), True)
        else:
            self.connection.write(self.id, b"", True)
        self.sent_end()

    def sent_end(self) -> None:
        """Our side is complete."""
        connection = self.connection
        state = self.state = ON_SENT_END[self.state]
        connection.watch(self)
        if state is not CLOSED:
            connection.on_half_local(self)

    def look(self) -> bool:
        """The transport was flushed. Give whether to look again after the next time."""
        queued = self._bound = self.connection.transport.queued(self.id)
        limit = self.connection.limits.max_send_buf_size
        if self._is_blocked and queued * 2 < limit:
            self._is_blocked = False
            self.drained()
        if self.state is CLOSED and not queued:
            self.connection.close_stream(self)
            return False
        return queued > 0 and (self._is_blocked or not self.is_sending)

    def drop(self) -> None:
        """Nothing more is sent on this stream."""
        self.is_sending = self._is_blocked = False

    @property
    def queued(self) -> int:
        """Bytes given to this stream that the transport has not sent yet."""
        return self.connection.transport.queued(self.id)

    def unsent(self) -> int:
        return self.queued

    def malformed(self, cause: WireError) -> H3StreamError:
        return malformed(self.id, cause)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.state.name} {self.phase.name}>"
