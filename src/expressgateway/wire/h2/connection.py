"""What each frame does to a connection, whichever the role (RFC 9113 6)."""

from typing import Final

from expressgateway.wire.errors import FramingError, HeadTooLargeError, MalformedError, WireError
from expressgateway.wire.h2 import frames as f
from expressgateway.wire.h2.core import H2Core
from expressgateway.wire.h2.frame_reader import U32_AT
from expressgateway.wire.h2.frames import H2ConnectionError, H2StreamError, calm
from expressgateway.wire.h2.guards import WORTH_BYTES
from expressgateway.wire.h2.hpack import HpackError, OversizedError, Triple
from expressgateway.wire.h2.streams import H2Stream
from expressgateway.wire.head import Fields
from expressgateway.wire.streams import CAN_RECEIVE, CLOSED, ON_RECEIVED_END, UNDECLARED

MAX_SETTINGS: Final = 64  # in one frame
MAX_FRAME_BYTES: Final = 65_536  # of ours: a longer one would hold up its siblings
DEPENDS_ON_ITSELF: Final = 0x100  # beside a HEADERS frame's own flags


class H2Connection(H2Core):
    """The handlers of frames. What they find is told to the role."""

    __slots__ = ()

    # -- DATA ------------------------------------------------------------------------------------------

    def on_data(self, flags: int, stream_id: int, data: bytes, at: int, end: int) -> None:
        """RFC 9113 6.1, and 6.9 for what it costs."""
        size = end - at
        received = self.received
        if not received.take(size):
            raise H2ConnectionError(f.FLOW_CONTROL_ERROR, "more DATA than the connection's window")
        increment = received.give(size, self.now, self.limits.max_connection_window - received.size)
        if increment:
            self.write(f.window_update(0, increment))
        stream = self.streams.get(stream_id)
        if flags & f.PADDED:
            at, end = _strip_padding(data, at, end)
        if stream is None or not CAN_RECEIVE[stream.state]:
            self._on_stray_data(stream_id, end - at)
            return
        if not stream.take(size):
            raise H2StreamError(stream_id, f.FLOW_CONTROL_ERROR, MalformedError("more DATA than the window"))
        is_end = flags & f.END_STREAM != 0
        length = end - at
        self.guards.moved += length
        if stream.expected != UNDECLARED:
            stream.expected -= length
            if stream.expected < 0 or (is_end and stream.expected):
                raise contradiction(stream_id)
        if not is_end:
            if length:
                stream.on_body(data[at:end], False)
            else:
                self.guards.on_empty(self.now)
            stream.give(size)
            return
        stream.state = ON_RECEIVED_END[stream.state]
        closes = stream.state is CLOSED
        stream.on_body(data[at:end], True)
        if closes:
            self.close_stream(stream)

    def _on_stray_data(self, stream_id: int, length: int) -> None:
        if not stream_id or self.is_idle_id(stream_id):
            raise H2ConnectionError(f.PROTOCOL_ERROR, "DATA on a stream that is not open")
        if self.was_reset_by_us(stream_id) or self.is_ignored(stream_id):
            if length < WORTH_BYTES:
                self.guards.on_idle(self.now, "closed_stream_flood")
            return
        cause = MalformedError("DATA behind the end of a stream")
        raise H2StreamError(stream_id, f.STREAM_CLOSED, cause)

    def is_ignored(self, stream_id: int) -> bool:
        """Whether our GOAWAY said that we would not look at this stream."""
        return False

    # -- header blocks ---------------------------------------------------------------------------------

    def check_id(self, stream_id: int) -> None:
        """Whether a HEADERS frame may have this id at all."""
        raise NotImplementedError

    def on_headers(self, flags: int, stream_id: int, data: bytes, at: int, end: int) -> None:
        """RFC 9113 6.2."""
        self.check_id(stream_id)
        if flags & (f.PADDED | f.PRIORITIZED):
            if flags & f.PADDED:
                at, end = _strip_padding(data, at, end)
            if flags & f.PRIORITIZED:
                if end - at < 5:
                    raise H2ConnectionError(f.FRAME_SIZE_ERROR, "HEADERS too short for its priority")
                if U32_AT(data, at)[0] & f.MAX_ID == stream_id:
                    flags |= DEPENDS_ON_ITSELF
                at += 5
        if flags & f.END_HEADERS:
            # fast path: the block in one frame
            self.on_block(stream_id, flags, data[at:end])
            return
        self._block_id = stream_id
        self._block_flags = flags
        self._block_bytes = 0
        self._table = self.ONLY_CONTINUATION
        self._add_fragment(data[at:end])

    def on_continuation(self, flags: int, stream_id: int, data: bytes, at: int, end: int) -> None:
        """RFC 9113 6.10."""
        if stream_id != self._block_id:
            raise H2ConnectionError(f.PROTOCOL_ERROR, "CONTINUATION of another stream's header block")
        if len(self._block) > self.limits.max_continuation_frames:
            raise calm("continuation_flood", "a header block in too many frames")
        if flags & f.END_HEADERS:
            block = b"".join([*self._block, data[at:end]])
            self._block.clear()
            self._table = self.ANYTHING
            if len(block) > self.limits.max_header_list_size:
                raise calm("continuation_flood", "a header block over the limit")
            self.on_block(stream_id, self._block_flags, block)
        else:
            self._add_fragment(data[at:end])

    def _add_fragment(self, fragment: bytes) -> None:
        if not fragment:
            self.guards.on_empty(self.now)
        self._block.append(fragment)
        self._block_bytes += len(fragment)
        if self._block_bytes > self.limits.max_header_list_size:
            raise calm("continuation_flood", "a header block over the limit")

    def on_stray_continuation(self, flags: int, stream_id: int, data: bytes, at: int, end: int) -> None:
        raise H2ConnectionError(f.PROTOCOL_ERROR, "CONTINUATION without a header block")

    def decode(self, block: bytes) -> list[Triple] | None:
        """Give a block's fields; ``None`` for more of them than allowed, which is fatal if repeated."""
        fields, is_whole = self.decode_within(block)
        return fields if is_whole else None

    def decode_within(self, block: bytes) -> tuple[list[Triple], bool]:
        """Give a block's fields, of more than allowed those of the beginning; and whether they are all."""
        decoder = self.decoder
        try:
            return decoder.decode(block, self.limits.max_header_list_size), True
        except HpackError as error:
            raise H2ConnectionError(f.COMPRESSION_ERROR, str(error)) from None
        except OversizedError as error:
            self.guards.on_oversized(self.now)
            return error.fields, False
        finally:
            if decoder.has_changed:
                self.forget_blocks()

    def trailers_of(self, stream: H2Stream, flags: int, fields: list[Triple] | None) -> Fields:
        """What the decoded block behind a body says, in either role (RFC 9113 8.1)."""
        if flags & DEPENDS_ON_ITSELF or not flags & f.END_STREAM or stream.is_tunnel:
            cause: WireError = MalformedError("a trailer section that does not end its stream")
            raise H2StreamError(stream.id, f.PROTOCOL_ERROR, cause)
        if fields is None:
            cause = HeadTooLargeError("a trailer section over the limit")
            raise H2StreamError(stream.id, f.PROTOCOL_ERROR, cause)
        if stream.expected > 0:
            raise contradiction(stream.id)
        try:
            return self.limits.fields.read_trailers(fields)
        except WireError as error:
            raise H2StreamError(stream.id, f.PROTOCOL_ERROR, error) from None

    # -- the other frames ------------------------------------------------------------------------------

    def on_priority(self, flags: int, stream_id: int, data: bytes, at: int, end: int) -> None:
        """RFC 9113 6.3: checked and forgotten. 5.3.1 of RFC 7540 for a stream that depends on itself."""
        self.guards.on_idle(self.now, "priority_flood")
        if not stream_id:
            raise H2ConnectionError(f.PROTOCOL_ERROR, "PRIORITY without a stream")
        if end - at != 5:
            code, detail = f.FRAME_SIZE_ERROR, "PRIORITY of another size than 5"
        elif U32_AT(data, at)[0] & f.MAX_ID == stream_id:
            code, detail = f.PROTOCOL_ERROR, "a stream that depends on itself"
        else:
            return
        if self.is_idle_id(stream_id):  # a stream that is idle cannot be reset
            raise H2ConnectionError(code, detail)
        # One that is closed may have been so by a response on its way: what is wrong does not depend on that.
        if stream_id in self.streams or code == f.FRAME_SIZE_ERROR:
            raise H2StreamError(stream_id, code, MalformedError(detail))

    def on_rst_stream(self, flags: int, stream_id: int, data: bytes, at: int, end: int) -> None:
        """RFC 9113 6.4."""
        if end - at != 4:
            raise H2ConnectionError(f.FRAME_SIZE_ERROR, "RST_STREAM of another size than 4")
        stream = self.streams.get(stream_id)
        if stream is None:
            if not stream_id or self.is_idle_id(stream_id):
                raise H2ConnectionError(f.PROTOCOL_ERROR, "RST_STREAM on a stream that is idle")
            self.guards.on_idle(self.now, "reset_flood")
            return
        stream.state = CLOSED
        self.remember_reset(stream_id, False)
        try:
            stream.on_reset(U32_AT(data, at)[0])
        finally:
            self.close_stream(stream)

    def on_settings(self, flags: int, stream_id: int, data: bytes, at: int, end: int) -> None:
        """RFC 9113 6.5."""
        if stream_id:
            raise H2ConnectionError(f.PROTOCOL_ERROR, "SETTINGS on a stream")
        self.guards.on_settings(self.now)
        if flags & f.ACK:
            self._on_settings_ack(end - at)
            return
        if (end - at) % 6:
            raise H2ConnectionError(f.FRAME_SIZE_ERROR, "SETTINGS of a size that is no multiple of 6")
        if end - at > MAX_SETTINGS * 6:
            raise calm("settings_flood", "too many settings in one frame")
        self._table = self.ANYTHING
        window = self.initial_window
        for number, value in f.SETTING.iter_unpack(data[at:end]):
            if number == f.INITIAL_WINDOW_SIZE:
                if value > f.MAX_WINDOW:
                    raise H2ConnectionError(f.FLOW_CONTROL_ERROR, "an initial window above 2^31-1")
                window = value
            elif number == f.MAX_FRAME_SIZE:
                if not f.FRAME_BYTES <= value < 2**24:
                    raise H2ConnectionError(f.PROTOCOL_ERROR, "a maximum frame size that may not be")
                self.frame_bytes = min(value, MAX_FRAME_BYTES)
            elif number == f.HEADER_TABLE_SIZE:
                self.encoder.set_table_bytes(value)
                self.forget_encoded()
            elif number == f.ENABLE_PUSH and value > 1:
                raise H2ConnectionError(f.PROTOCOL_ERROR, "ENABLE_PUSH that is neither 0 nor 1")
            else:
                self.on_setting(number, value)
        if window != self.initial_window:
            self._resize_streams(window)
        self.write(f.SETTINGS_ACK)
        self.on_settings_done()

    def _on_settings_ack(self, length: int) -> None:
        if length:
            raise H2ConnectionError(f.FRAME_SIZE_ERROR, "an acknowledgement of SETTINGS with content")
        if self._table is self.ONLY_SETTINGS:
            raise H2ConnectionError(f.PROTOCOL_ERROR, "a connection that does not begin with SETTINGS")
        if not self._is_acknowledged:
            self._is_acknowledged = True
            difference = self.limits.stream_window - self.granted_window
            self.granted_window += difference
            for stream in self.streams.values():
                if stream.received is not None:
                    stream.received.resize(difference)

    def _resize_streams(self, window: int) -> None:
        """RFC 9113 6.9.2: what streams may send changes by the difference, and may become negative."""
        difference = window - self.initial_window
        self.initial_window = window
        for stream in self.streams.values():
            stream.window += difference
            if stream.window > f.MAX_WINDOW:
                raise H2ConnectionError(f.FLOW_CONTROL_ERROR, "a stream's window above 2^31-1")
            if stream.queued:
                self.want_turn(stream)

    def on_push_promise(self, flags: int, stream_id: int, data: bytes, at: int, end: int) -> None:
        """RFC 9113 8.4: a client never may, a server was told not to."""
        raise H2ConnectionError(f.PROTOCOL_ERROR, "PUSH_PROMISE")

    def on_ping(self, flags: int, stream_id: int, data: bytes, at: int, end: int) -> None:
        """RFC 9113 6.7."""
        if stream_id:
            raise H2ConnectionError(f.PROTOCOL_ERROR, "PING on a stream")
        if end - at != 8:
            raise H2ConnectionError(f.FRAME_SIZE_ERROR, "PING of another size than 8")
        self.guards.on_ping(self.now)
        if not flags & f.ACK:
            self.write(f.frame(f.PING, f.ACK, 0, data[at:end]))

    def on_goaway(self, flags: int, stream_id: int, data: bytes, at: int, end: int) -> None:
        """RFC 9113 6.8."""
        if stream_id:
            raise H2ConnectionError(f.PROTOCOL_ERROR, "GOAWAY on a stream")
        if end - at < 8:
            raise H2ConnectionError(f.FRAME_SIZE_ERROR, "GOAWAY of less than 8 bytes")
        self.guards.on_idle(self.now, "goaway_flood")
        self.on_peer_leaving(U32_AT(data, at)[0] & f.MAX_ID, U32_AT(data, at + 4)[0])

    def on_window_update(self, flags: int, stream_id: int, data: bytes, at: int, end: int) -> None:
        """RFC 9113 6.9."""
        if end - at != 4:
            raise H2ConnectionError(f.FRAME_SIZE_ERROR, "WINDOW_UPDATE of another size than 4")
        self.guards.on_window_update(self.now)
        increment = U32_AT(data, at)[0] & f.MAX_ID
        if not stream_id:
            self.send_window += increment
            if not increment:
                raise H2ConnectionError(f.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
            if self.send_window > f.MAX_WINDOW:
                raise H2ConnectionError(f.FLOW_CONTROL_ERROR, "the connection's window above 2^31-1")
            if self.turns and not self.is_congested:
                self.shell.wake()
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            if self.is_idle_id(stream_id):
                raise H2ConnectionError(f.PROTOCOL_ERROR, "WINDOW_UPDATE on a stream that is idle")
            return
        if not increment:
            raise H2StreamError(stream_id, f.PROTOCOL_ERROR, MalformedError("WINDOW_UPDATE by nothing"))
        stream.window += increment
        if stream.window > f.MAX_WINDOW:
            cause = MalformedError("a stream's window above 2^31-1")
            raise H2StreamError(stream_id, f.FLOW_CONTROL_ERROR, cause)
        if stream.queued:
            self.want_turn(stream)

    def on_unknown(self, flags: int, stream_id: int, data: bytes, at: int, end: int) -> None:
        """RFC 9113 5.5: ignored."""
        self.guards.on_idle(self.now, "unknown_frame_flood")

    def note_stream(self) -> None:
        """A stream was opened: it accounts for frames that come with it."""
        self.guards.streams += 1
        self.guards.moved += 2 * WORTH_BYTES


def _strip_padding(data: bytes, at: int, end: int) -> tuple[int, int]:
    """RFC 9113 6.1, 6.2: padding as long as the payload, or longer, is a connection error."""
    if at == end:
        raise H2ConnectionError(f.FRAME_SIZE_ERROR, "a padded frame without its pad length")
    padding = data[at]
    if padding >= end - at:
        raise H2ConnectionError(f.PROTOCOL_ERROR, "padding longer than its frame")
    return at + 1, end - padding


def contradiction(stream_id: int) -> H2StreamError:
    """RFC 9113 8.1.1: malformed, whichever way it is wrong; a body before its head as well."""
    cause = FramingError("a body that contradicts its head")
    return H2StreamError(stream_id, f.PROTOCOL_ERROR, cause)
