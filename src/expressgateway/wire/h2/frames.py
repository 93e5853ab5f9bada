"""Frames (RFC 9113 4, 6): numbers, packing, and the two faults that a frame can be.

A frame is never an object here: nine bytes are unpacked into three numbers, and a handler is called with the
place of the payload in the buffer.
"""

from struct import Struct
from typing import Final

from expressgateway.wire.errors import Scope, WireError

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITIZED: Final = 0x20

NO_ERROR: Final = 0x0
PROTOCOL_ERROR: Final = 0x1
INTERNAL_ERROR: Final = 0x2
FLOW_CONTROL_ERROR: Final = 0x3
SETTINGS_TIMEOUT: Final = 0x4
STREAM_CLOSED: Final = 0x5
FRAME_SIZE_ERROR: Final = 0x6
REFUSED_STREAM: Final = 0x7
CANCEL: Final = 0x8
COMPRESSION_ERROR: Final = 0x9
ENHANCE_YOUR_CALM: Final = 0xB

HEADER_TABLE_SIZE: Final = 0x1
ENABLE_PUSH: Final = 0x2
MAX_CONCURRENT_STREAMS: Final = 0x3
INITIAL_WINDOW_SIZE: Final = 0x4
MAX_FRAME_SIZE: Final = 0x5
MAX_HEADER_LIST_SIZE: Final = 0x6
ENABLE_CONNECT_PROTOCOL: Final = 0x8

MAX_ID: Final = 2**31 - 1
MAX_WINDOW: Final = 2**31 - 1
DEFAULT_WINDOW: Final = 65_535
FRAME_BYTES: Final = 16_384  # the longest payload that we read: the RFC's initial value, never raised
HEADER_BYTES: Final = 9

# Length and type share a word: two shifts are cheaper than a fourth number.
FRAME_HEADER: Final = Struct(">IBI")
_WINDOW_UPDATE: Final = Struct(">IBII")
_RST_STREAM: Final = Struct(">IBII")
_GOAWAY: Final = Struct(">IBIII")
SETTING: Final = Struct(">HI")
U32: Final = Struct(">I")


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """One whole frame."""
    return FRAME_HEADER.pack(len(payload) << 8 | kind, flags, stream_id) + payload


def window_update(stream_id: int, increment: int) -> bytes:
    return _WINDOW_UPDATE.pack(4 << 8 | WINDOW_UPDATE, 0, stream_id, increment)


def rst_stream(stream_id: int, code: int) -> bytes:
    return _RST_STREAM.pack(4 << 8 | RST_STREAM, 0, stream_id, code)


def goaway(last_id: int, code: int, detail: str = "") -> bytes:
    """``detail`` is for the peer's operator, who may see nothing else (RFC 9113 6.8)."""
    debug = detail.encode("ascii", "replace")[:128]
    return _GOAWAY.pack((8 + len(debug)) << 8 | GOAWAY, 0, 0, last_id, code) + debug


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(SETTING.pack(*pair) for pair in pairs))


SETTINGS_ACK: Final = frame(SETTINGS, ACK, 0)


def header_frames(stream_id: int, block: bytes, end: bool, frame_bytes: int) -> bytes:
    """A header block as HEADERS, and CONTINUATION where it is longer than the peer's frames."""
    flags = END_STREAM if end else 0
    if len(block) <= frame_bytes:
        # fast path: one frame
        return FRAME_HEADER.pack(len(block) << 8 | HEADERS, flags | END_HEADERS, stream_id) + block
    frames = [frame(HEADERS, flags, stream_id, block[:frame_bytes])]
    for at in range(frame_bytes, len(block), frame_bytes):
        is_last = at + frame_bytes >= len(block)
        piece = block[at : at + frame_bytes]
        frames.append(frame(CONTINUATION, END_HEADERS if is_last else 0, stream_id, piece))
    return b"".join(frames)


class H2ConnectionError(WireError):
    """A connection error (RFC 9113 5.4.1): GOAWAY with ``code``, then the end.

    ``event`` is the row of the attack catalogue that it is, or empty.
    """

    scope = Scope.CONNECTION

    def __init__(self, code: int, detail: str, event: str = "") -> None:
        super().__init__(detail)
        self.code = code
        self.event = event


class H2StreamError(WireError):
    """A stream error (RFC 9113 5.4.2): RST_STREAM with ``code``; ``cause`` is what the sink is told."""

    scope = Scope.STREAM

    def __init__(self, stream_id: int, code: int, cause: WireError) -> None:
        super().__init__(cause.detail)
        self.stream_id = stream_id
        self.code = code
        self.cause = cause


def calm(event: str, detail: str) -> H2ConnectionError:
    """An attack: the client sees GOAWAY with ENHANCE_YOUR_CALM."""
    return H2ConnectionError(ENHANCE_YOUR_CALM, detail, event)
