"""Reset codes across versions: what a stream's end on one side is called on the other.

HTTP/2 and HTTP/3 number their reasons apart from each other (RFC 9113 7, RFC 9114 8.1), so that a code tells
by itself whose it is. A reason that only one of them has becomes the nearest that the other has; a code that
neither defines is passed on where it fits.
"""

from typing import Final

from expressgateway.wire.errors import StreamResetError, WireError

_MAX_H2: Final = 2**32 - 1
_H2_INTERNAL: Final = 0x2
_H2_CANCEL: Final = 0x8
_H3_INTERNAL: Final = 0x102
_H3_CANCELLED: Final = 0x10C

# HTTP/2, HTTP/3. Where a code stands twice, the first line is what it becomes.
_PAIRS: Final = (
    (0x0, 0x100),  # NO_ERROR
    (0x1, 0x101),  # PROTOCOL_ERROR, H3_GENERAL_PROTOCOL_ERROR
    (0x2, 0x102),  # INTERNAL_ERROR
    (0x7, 0x10B),  # REFUSED_STREAM, H3_REQUEST_REJECTED
    (0x8, 0x10C),  # CANCEL, H3_REQUEST_CANCELLED
    (0xA, 0x10F),  # CONNECT_ERROR
    (0xB, 0x107),  # ENHANCE_YOUR_CALM, H3_EXCESSIVE_LOAD
    (0xD, 0x110),  # HTTP_1_1_REQUIRED, H3_VERSION_FALLBACK
    (0x1, 0x10E),  # H3_MESSAGE_ERROR
    (0x1, 0x10D),  # H3_REQUEST_INCOMPLETE
    (0x6, 0x106),  # FRAME_SIZE_ERROR, H3_FRAME_ERROR
    (0x1, 0x103),
    (0x1, 0x104),
    (0x1, 0x105),
    (0x1, 0x108),
    (0x1, 0x109),
    (0x1, 0x10A),
    (0x9, 0x200),  # COMPRESSION_ERROR, QPACK_DECOMPRESSION_FAILED
    (0x9, 0x201),
    (0x9, 0x202),
    (0x3, 0x101),  # FLOW_CONTROL_ERROR
    (0x4, 0x101),  # SETTINGS_TIMEOUT
    (0x5, 0x101),  # STREAM_CLOSED
)
_OF_H2: Final = {h3: h2 for h2, h3 in reversed(_PAIRS)}
_OF_H3: Final = dict(reversed(_PAIRS))
_FIRST_H3: Final = 0x100


def translated(code: int, to_h3: bool) -> int:
    """Give a reset's code as the other version has it; one that is that version's already stays."""
    if to_h3:
        known = _OF_H3.get(code)
        if known is not None:
            return known
        return code if code >= _FIRST_H3 else _H3_INTERNAL
    known = _OF_H2.get(code)
    if known is not None:
        return known
    return code if code <= _MAX_H2 else _H2_INTERNAL


def reset_code(error: WireError | None, default: int, to_h3: bool = False) -> int:
    """The code for giving a stream up: the other side's own, if it was that side that reset."""
    if isinstance(error, StreamResetError):
        code = translated(error.code, to_h3)
        # NO_ERROR would say that nothing is missing
        return default if code == (_FIRST_H3 if to_h3 else 0) else code
    if error is not None and error.kind == "deadline":
        return _H3_CANCELLED if to_h3 else _H2_CANCEL
    return default
