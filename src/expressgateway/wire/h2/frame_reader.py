"""Bytes into frames (RFC 9113 4.1): the part of a connection that finds where frames begin and end.

A *table* holds a handler for each type; the one in use says what may come now: anything, only SETTINGS at
the beginning (3.4), or only CONTINUATION inside a header block (6.10). Handlers are given the payload's place
in the buffer, never a copy of it.
"""

from collections.abc import Callable
from struct import Struct
from typing import Any, ClassVar, Final

from expressgateway.wire.h2.frames import (
    CONTINUATION,
    FRAME_BYTES,
    FRAME_HEADER,
    FRAME_SIZE_ERROR,
    HEADER_BYTES,
    MAX_ID,
    PROTOCOL_ERROR,
    SETTINGS,
    H2ConnectionError,
    H2StreamError,
)

Handler = Callable[[Any, int, int, bytes, int, int], None]
"""Called with the connection, flags, stream, buffer, and the payload's begin and end in it."""

_unpack: Final = FRAME_HEADER.unpack_from
U32_AT: Final = Struct(">I").unpack_from
_BEGIN_OF_HTTP1: Final = int.from_bytes(b"HTT")  # a server's answer in HTTP/1, read as a frame's length

# By frame type.
_HANDLERS: Final = (
    "on_data",
    "on_headers",
    "on_priority",
    "on_rst_stream",
    "on_settings",
    "on_push_promise",
    "on_ping",
    "on_goaway",
    "on_window_update",
    "on_stray_continuation",
)
_TYPES: Final = 256


class FrameReader:
    """Subclasses have the handlers."""

    __slots__ = ("_held", "_table", "is_closed", "now")

    ANYTHING: ClassVar[tuple[Handler, ...]]
    ONLY_SETTINGS: ClassVar[tuple[Handler, ...]]
    ONLY_CONTINUATION: ClassVar[tuple[Handler, ...]]

    def __init_subclass__(cls) -> None:
        if not hasattr(cls, _HANDLERS[0]):
            return
        unknown = [cls.on_unknown] * (_TYPES - len(_HANDLERS))
        cls.ANYTHING = (*(getattr(cls, name) for name in _HANDLERS), *unknown)
        first: list[Handler] = [_not_settings] * _TYPES
        first[SETTINGS] = cls.ANYTHING[SETTINGS]
        cls.ONLY_SETTINGS = tuple(first)
        inside: list[Handler] = [_not_continuation] * _TYPES
        inside[CONTINUATION] = cls.on_continuation
        cls.ONLY_CONTINUATION = tuple(inside)

    def __init__(self) -> None:
        # Connection
        self.now = 0.0  # seconds: of the last read or sweep
        self.is_closed = False
        self._table = self.ONLY_SETTINGS
        self._held = bytearray()  # an incomplete frame: at most FRAME_BYTES and its header

    def on_continuation(self, flags: int, stream_id: int, data: bytes, at: int, end: int) -> None:
        raise NotImplementedError

    def on_unknown(self, flags: int, stream_id: int, data: bytes, at: int, end: int) -> None:
        raise NotImplementedError

    def fail_stream(self, fault: H2StreamError) -> None:
        raise NotImplementedError

    def read(self, data: bytes) -> None:
        """Take bytes, whatever their cut. Raises ``H2ConnectionError``."""
        at = self._complete(data) if self._held else 0
        size = len(data)
        while size - at >= HEADER_BYTES:
            word, flags, stream_id = _unpack(data, at)
            begin = at + HEADER_BYTES
            at = begin + (word >> 8)
            if at > size:
                at = begin - HEADER_BYTES
                _check_length(word >> 8)
                break
            # fast path: the whole frame is in this read
            if word >> 8 > FRAME_BYTES:
                _check_length(word >> 8)
            try:
                self._table[word & 0xFF](self, flags, stream_id & MAX_ID, data, begin, at)
            except H2StreamError as fault:
                self.fail_stream(fault)
            if self.is_closed:
                return
        if at < size:
            self._held += data[at:] if at else data

    def _complete(self, data: bytes) -> int:
        """Add to the frame that is held, and read it once it is whole. Give what of ``data`` is used up."""
        held = self._held
        at = max(0, HEADER_BYTES - len(held))
        held += data[:at]
        if len(held) < HEADER_BYTES:
            return len(data)
        word, flags, stream_id = _unpack(held, 0)
        _check_length(word >> 8)
        missing = HEADER_BYTES + (word >> 8) - len(held)
        held += data[at : at + missing]
        if len(data) - at < missing:
            return len(data)
        frame = bytes(held)
        held.clear()
        try:
            self._table[word & 0xFF](self, flags, stream_id & MAX_ID, frame, HEADER_BYTES, len(frame))
        except H2StreamError as fault:
            self.fail_stream(fault)
        return len(data) if self.is_closed else at + missing


def _check_length(length: int) -> None:
    """RFC 9113 4.2. A stream error would do for some types; it is never sent by mistake."""
    if length > FRAME_BYTES:
        is_http1 = length == _BEGIN_OF_HTTP1
        detail = "HTTP/1 instead of HTTP/2" if is_http1 else f"a frame of more than {FRAME_BYTES} bytes"
        raise H2ConnectionError(FRAME_SIZE_ERROR, detail)


def _not_settings(_: object, flags: int, stream_id: int, data: bytes, at: int, end: int) -> None:
    raise H2ConnectionError(PROTOCOL_ERROR, "a connection that does not begin with SETTINGS")


def _not_continuation(_: object, flags: int, stream_id: int, data: bytes, at: int, end: int) -> None:
    raise H2ConnectionError(PROTOCOL_ERROR, "a header block interrupted by another frame")
