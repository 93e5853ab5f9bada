"""Frames (RFC 9114 7) and their integers (RFC 9000 16): numbers, packing, and the two faults."""

from typing import Final

from expressgateway.wire.errors import FramingError, Scope, WireError

DATA: Final = 0x0
HEADERS: Final = 0x1
CANCEL_PUSH: Final = 0x3
SETTINGS: Final = 0x4
PUSH_PROMISE: Final = 0x5
GOAWAY: Final = 0x7
MAX_PUSH_ID: Final = 0xD
OF_HTTP2: Final = frozenset({0x2, 0x6, 0x8, 0x9})
"""Types that HTTP/2 has and HTTP/3 must not have (RFC 9114 7.2.8)."""

CONTROL_STREAM: Final = 0x0
PUSH_STREAM: Final = 0x1
ENCODER_STREAM: Final = 0x2
DECODER_STREAM: Final = 0x3

QPACK_MAX_TABLE_CAPACITY: Final = 0x1
MAX_FIELD_SECTION_SIZE: Final = 0x6
QPACK_BLOCKED_STREAMS: Final = 0x7
ENABLE_CONNECT_PROTOCOL: Final = 0x8
H3_DATAGRAM: Final = 0x33
SETTINGS_OF_HTTP2: Final = frozenset({0x0, 0x2, 0x3, 0x4, 0x5})
"""RFC 9114 11.2.2."""

NO_ERROR: Final = 0x100
GENERAL_PROTOCOL_ERROR: Final = 0x101
INTERNAL_ERROR: Final = 0x102
STREAM_CREATION_ERROR: Final = 0x103
CLOSED_CRITICAL_STREAM: Final = 0x104
FRAME_UNEXPECTED: Final = 0x105
FRAME_ERROR: Final = 0x106
EXCESSIVE_LOAD: Final = 0x107
ID_ERROR: Final = 0x108
SETTINGS_ERROR: Final = 0x109
MISSING_SETTINGS: Final = 0x10A
REQUEST_REJECTED: Final = 0x10B
REQUEST_CANCELLED: Final = 0x10C
REQUEST_INCOMPLETE: Final = 0x10D
MESSAGE_ERROR: Final = 0x10E
CONNECT_ERROR: Final = 0x10F
VERSION_FALLBACK: Final = 0x110
QPACK_DECOMPRESSION_FAILED: Final = 0x200
QPACK_ENCODER_STREAM_ERROR: Final = 0x201
QPACK_DECODER_STREAM_ERROR: Final = 0x202

MAX_INTEGER: Final = 2**62 - 1
MAX_REQUEST_ID: Final = 2**62 - 4
"""The largest id that a request's stream can have: what the first step of a graceful end says."""

_ONE: Final = tuple(bytes((number,)) for number in range(0x40))
_MIN_BYTES: Final = (1, 2, 4, 8)


def integer(number: int) -> bytes:
    """A variable-length integer in as few bytes as it takes."""
    if number < 0x40:
        return _ONE[number]
    if number < 0x4000:
        return (number | 0x4000).to_bytes(2, "big")
    if number < 0x4000_0000:
        return (number | 0x8000_0000).to_bytes(4, "big")
    return (number | 0xC000_0000_0000_0000).to_bytes(8, "big")


def integer_at(data: bytes, at: int) -> tuple[int, int]:
    """Read one: its number, and where the next thing begins; ``-1`` for the latter if it is cut short."""
    if at >= len(data):
        return 0, -1
    first = data[at]
    if first < 0x40:
        return first, at + 1
    end = at + _MIN_BYTES[first >> 6]
    if end > len(data):
        return 0, -1
    number = first & 0x3F
    for octet in data[at + 1 : end]:
        number = number << 8 | octet
    return number, end


def frame_header(kind: int, size: int) -> bytes:
    if size < 0x40:
        return _ONE[kind] + _ONE[size]
    return _ONE[kind] + integer(size)


def frame(kind: int, payload: bytes) -> bytes:
    return integer(kind) + integer(len(payload)) + payload


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, b"".join(integer(number) + integer(value) for number, value in pairs))


class H3ConnectionError(WireError):
    """A connection error (RFC 9114 8): CONNECTION_CLOSE with ``code``.

    ``event`` is the row of the attack catalogue that it is, or empty.
    """

    scope = Scope.CONNECTION

    def __init__(self, code: int, detail: str, event: str = "") -> None:
        super().__init__(detail)
        self.code = code
        self.event = event


class H3StreamError(WireError):
    """A stream error (RFC 9114 8): the stream is reset; ``cause`` is what its sink is told."""

    scope = Scope.STREAM

    def __init__(self, stream_id: int, code: int, cause: WireError) -> None:
        super().__init__(cause.detail)
        self.stream_id = stream_id
        self.code = code
        self.cause = cause


def excess(event: str, detail: str) -> H3ConnectionError:
    """An attack: the peer sees H3_EXCESSIVE_LOAD."""
    return H3ConnectionError(EXCESSIVE_LOAD, detail, event)


def malformed(stream_id: int, cause: WireError) -> H3StreamError:
    """RFC 9114 4.1.2."""
    return H3StreamError(stream_id, MESSAGE_ERROR, cause)


def contradiction(stream_id: int) -> H3StreamError:
    return malformed(stream_id, FramingError("a body that contradicts its head"))
