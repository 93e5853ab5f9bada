"""Unidirectional streams (RFC 9114 6.2), and what the frames of the control stream do, whichever the role."""

from typing import Final

from expressgateway.wire.errors import HeadTooLargeError, WireError
from expressgateway.wire.h2.hpack import OversizedError, Triple
from expressgateway.wire.h3 import frames as f
from expressgateway.wire.h3.core import H3Core
from expressgateway.wire.h3.frames import H3ConnectionError, integer_at, malformed
from expressgateway.wire.h3.limits import H3Limits
from expressgateway.wire.h3.qpack import QpackError
from expressgateway.wire.h3.streams import H3Stream
from expressgateway.wire.h3.transport import Transport
from expressgateway.wire.shells import Shell

MAX_SETTINGS_BYTES: Final = 1024
_MAX_ID_BYTES: Final = 8  # the payload of GOAWAY, CANCEL_PUSH and MAX_PUSH_ID is one integer
_UNKNOWN_STREAM: Final = -1
_CRITICAL: Final = frozenset({f.CONTROL_STREAM, f.ENCODER_STREAM, f.DECODER_STREAM})
_OURS: Final = frozenset({f.DATA, f.HEADERS, f.PUSH_PROMISE, *f.OF_HTTP2})
"""What must not come on a control stream (RFC 9114 7.2)."""
_READ: Final = frozenset({f.CANCEL_PUSH, f.SETTINGS, f.GOAWAY, f.MAX_PUSH_ID})


class H3Connection(H3Core):
    """What it finds is told to the role."""

    __slots__ = (
        "_control_held",
        "_control_skip",
        "_kinds",
        "_peer_goaway",
        "_types_held",
        "has_settings",
    )

    def __init__(self, shell: Shell[H3Stream], transport: Transport, limits: H3Limits) -> None:
        super().__init__(shell, transport, limits)
        # Connection
        self.has_settings = False  # the peer's have come
        self._peer_goaway = f.MAX_INTEGER
        self._kinds: dict[int, int] = {}  # types of the peer's streams; bounded by the transport's limit
        self._types_held: dict[int, bytes] = {}  # of those whose type is cut short: at most 7 bytes each
        self._control_held = b""  # an incomplete frame: at most MAX_SETTINGS_BYTES and its header
        self._control_skip = 0  # bytes of an unknown frame that are still to come

    # -- the roles -------------------------------------------------------------------------------------

    def check_goaway(self, identifier: int) -> None:
        """GOAWAY has come, and it says no more than the last one did."""
        raise NotImplementedError

    def on_setting(self, number: int, value: int) -> None:
        """A setting that only one role cares for."""

    def on_settings_done(self) -> None:
        """The peer's settings hold."""

    def on_max_push_id(self, identifier: int) -> None:
        """RFC 9114 7.2.7."""
        raise NotImplementedError

    def on_push_stream(self) -> None:
        """RFC 9114 6.2.2: never promised, so it is an error for either."""
        raise NotImplementedError

    # -- streams ---------------------------------------------------------------------------------------

    def check_frame(self, kind: int) -> None:
        """A frame on a request stream that is neither DATA nor HEADERS (RFC 9114 7.2, 9)."""
        if kind in _READ or kind in f.OF_HTTP2:
            raise H3ConnectionError(f.FRAME_UNEXPECTED, f"a frame of type {kind:#x} on a request stream")
        if kind == f.PUSH_PROMISE:
            self.on_push_promise()
        self.guards.on_idle(self.now, "unknown_frame_flood")

    def on_push_promise(self) -> None:
        """RFC 9114 7.2.5."""
        raise H3ConnectionError(f.FRAME_UNEXPECTED, "PUSH_PROMISE from a client")

    def receive_other(self, stream_id: int, data: bytes, end: bool) -> None:
        if stream_id & 2:
            self._receive_unidirectional(stream_id, data, end)
            return
        if stream_id in self._ignored or stream_id in self.streams:
            if end:
                self._ignored.discard(stream_id)
            if data:
                self.transport.consumed(stream_id, len(data))
            return
        self.receive_request(stream_id, data, end)

    def receive_request(self, stream_id: int, data: bytes, end: bool) -> None:
        """Bytes of a request stream that is not known."""
        raise NotImplementedError

    def reset_other(self, stream_id: int, code: int) -> None:
        if not stream_id & 2:
            if stream_id in self._ignored:
                self._ignored.discard(stream_id)
            elif stream_id not in self.streams:
                self.reset_request(stream_id, code)
        elif self._kinds.get(stream_id) in _CRITICAL:
            raise H3ConnectionError(f.CLOSED_CRITICAL_STREAM, "a critical stream was reset")
        else:
            self._forget_unidirectional(stream_id)
            self.guards.on_idle(self.now, "unknown_stream_flood")

    def reset_request(self, stream_id: int, code: int) -> None:
        """The reset of a request stream that is not known."""
        raise NotImplementedError

    def _forget_unidirectional(self, stream_id: int) -> None:
        self._kinds.pop(stream_id, None)
        self._types_held.pop(stream_id, None)

    def _receive_unidirectional(self, stream_id: int, data: bytes, end: bool) -> None:
        if data:
            # Nothing of these streams is kept but the beginning of a frame.
            self.transport.consumed(stream_id, len(data))
        kind = self._kinds.get(stream_id)
        if kind is None:
            held = self._types_held.pop(stream_id, b"") + data
            kind, at = integer_at(held, 0)
            if at < 0:
                if not end:  # RFC 9114 6.2: a stream may end before its type
                    self._types_held[stream_id] = held
                else:
                    self.guards.on_idle(self.now, "unknown_stream_flood")
                return
            kind = self._open_unidirectional(stream_id, kind, end)
            data = held[at:]
        if data:
            self._read_critical(kind, data)
        if end:
            if kind in _CRITICAL:
                raise H3ConnectionError(f.CLOSED_CRITICAL_STREAM, "a critical stream has ended")
            self._forget_unidirectional(stream_id)

    def _read_critical(self, kind: int, data: bytes) -> None:
        if kind == f.CONTROL_STREAM:
            self._read_control(data)
        elif kind == f.ENCODER_STREAM:
            self._read_insertions(data)
        elif kind == f.DECODER_STREAM:
            self.guards.on_idle(self.now, "qpack_decoder_flood")
            try:
                self.encoder.feed(data)
            except QpackError as error:
                raise H3ConnectionError(f.QPACK_DECODER_STREAM_ERROR, str(error)) from None

    def _open_unidirectional(self, stream_id: int, kind: int, end: bool) -> int:
        if kind in _CRITICAL:
            if kind in self._kinds.values():
                raise H3ConnectionError(f.STREAM_CREATION_ERROR, "a second stream of a type that is single")
        elif kind == f.PUSH_STREAM:
            self.on_push_stream()
        else:
            self.guards.on_idle(self.now, "unknown_stream_flood")
            if not end:  # RFC 9114 6.2: read no further
                self.wake()
                self.transport.stop(stream_id, f.STREAM_CREATION_ERROR)
            kind = _UNKNOWN_STREAM
        self._kinds[stream_id] = kind
        return kind

    def _read_insertions(self, data: bytes) -> None:
        self.guards.on_insertions(self.now, len(data))
        try:
            self.decoder.feed(data)
        except QpackError as error:
            raise H3ConnectionError(f.QPACK_ENCODER_STREAM_ERROR, str(error)) from None
        self.forget_blocks()
        if self._parked:
            self.unpark()

    # -- the control stream ----------------------------------------------------------------------------

    def _read_control(self, data: bytes) -> None:
        data = self._control_held + data
        self._control_held = b""
        at = min(self._control_skip, len(data))
        self._control_skip -= at
        size = len(data)
        while at < size and not self.is_closed:
            begin = at
            kind, at = integer_at(data, at)
            if at >= 0:
                if not self.has_settings and kind != f.SETTINGS:
                    raise H3ConnectionError(
                        f.MISSING_SETTINGS, "a control stream that does not begin with SETTINGS"
                    )
                if kind in _OURS:
                    raise H3ConnectionError(f.FRAME_UNEXPECTED, f"type {kind:#x} on the control stream")
                length, at = integer_at(data, at)
            if at < 0:
                self._control_held = data[begin:]
                return
            if kind not in _READ:
                # RFC 9114 9, and PRIORITY_UPDATE (RFC 9218 7.2), by which nothing is scheduled here
                self.guards.on_idle(self.now, "unknown_frame_flood")
                skipped = min(length, size - at)
                at += skipped
                self._control_skip = length - skipped
                continue
            if kind == f.SETTINGS:
                if length > MAX_SETTINGS_BYTES:
                    raise f.excess("settings_flood", "too many settings in one frame")
            elif not 0 < length <= _MAX_ID_BYTES:
                raise H3ConnectionError(f.FRAME_ERROR, "a frame that is not one integer")
            if size - at < length:
                self._control_held = data[begin:]
                return
            payload = data[at : at + length]
            at += length
            self.guards.on_settings(self.now)
            if kind == f.SETTINGS:
                self._on_settings(payload)
            else:
                self._on_identifier(kind, payload)

    def _on_settings(self, payload: bytes) -> None:
        """RFC 9114 7.2.4."""
        if self.has_settings:
            raise H3ConnectionError(f.FRAME_UNEXPECTED, "a second SETTINGS frame")
        self.has_settings = True
        seen: set[int] = set()
        table_bytes = blocked = at = 0
        while at < len(payload):
            number, at = integer_at(payload, at)
            value = 0
            if at >= 0:
                value, at = integer_at(payload, at)
            if at < 0:
                raise H3ConnectionError(f.FRAME_ERROR, "SETTINGS that end inside a setting")
            if number in f.SETTINGS_OF_HTTP2 or number in seen:
                raise H3ConnectionError(f.SETTINGS_ERROR, f"setting {number:#x}, reserved or twice")
            seen.add(number)
            if number == f.QPACK_MAX_TABLE_CAPACITY:
                table_bytes = value
            elif number == f.QPACK_BLOCKED_STREAMS:
                blocked = value
            elif number in (f.ENABLE_CONNECT_PROTOCOL, f.H3_DATAGRAM) and value > 1:
                raise H3ConnectionError(f.SETTINGS_ERROR, "a setting that is neither 0 nor 1")
            else:
                self.on_setting(number, value)
        self._apply_table(table_bytes, blocked)
        self.on_settings_done()

    def _apply_table(self, table_bytes: int, blocked: int) -> None:
        limits = self.limits
        own = min(table_bytes, limits.qpack_table_bytes)
        if own:
            said = self.encoder.apply(
                own, min(table_bytes, 2**30), min(blocked, limits.qpack_blocked_streams)
            )
            if said:
                self.write(self.encoder_id, said, False)

    def _on_identifier(self, kind: int, payload: bytes) -> None:
        identifier, at = integer_at(payload, 0)
        if at != len(payload):
            raise H3ConnectionError(f.FRAME_ERROR, "a frame that is not one integer")
        if kind == f.GOAWAY:
            if identifier > self._peer_goaway:
                raise H3ConnectionError(f.ID_ERROR, "GOAWAY that takes back the one before")
            self._peer_goaway = identifier
            self.check_goaway(identifier)
        elif kind == f.MAX_PUSH_ID:
            self.on_max_push_id(identifier)
        else:  # RFC 9114 7.2.3: no push was promised, by either
            raise H3ConnectionError(f.ID_ERROR, "CANCEL_PUSH of a push that was never promised")

    # -- trailers --------------------------------------------------------------------------------------

    def read_trailers(self, stream: H3Stream, fields: list[Triple] | OversizedError, end: bool) -> None:
        """A header block behind a body, in either role (RFC 9114 4.1)."""
        if isinstance(fields, OversizedError):
            cause: WireError = HeadTooLargeError("a trailer section over the limit")
            raise malformed(stream.id, cause)
        try:
            trailers = self.limits.fields.read_trailers(fields)
        except WireError as error:
            raise malformed(stream.id, error) from None
        stream.trailers_read(trailers, end)

    def note_stream(self) -> None:
        """A stream was opened: it accounts for frames that come with it."""
        self.guards.streams += 1
        self.guards.moved += 1024
