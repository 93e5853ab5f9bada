"""The vocabulary of gRPC over HTTP/2: codes, deadlines, content types, and what HTTP's words mean in it.

Introduces ``Code``. Everything here is a pure function of its arguments; what is done about it is in
``grpc``. Sources: the gRPC documents "gRPC over HTTP2" and "HTTP to gRPC Status Code Mapping".
"""

import re
from collections.abc import Iterable
from enum import IntEnum
from typing import Final, assert_never

from expressgateway.proxy.errors import Reason
from expressgateway.wire.head import Field, Fields
from expressgateway.wire.resets import translated

CONTENT_TYPE: Final = b"application/grpc"
STATUS: Final = b"grpc-status"
MESSAGE: Final = b"grpc-message"
TIMEOUT: Final = b"grpc-timeout"

_TIMEOUT: Final = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNITS_S: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_MOST_DIGITS: Final = 99_999_999
_PLAIN: Final = frozenset(range(0x20, 0x7F)) - {0x25}


class Code(IntEnum):
    """A call's status, as metrics and ``grpc-status`` have it."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


_OF_HTTP: Final = {
    400: Code.INTERNAL,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.UNIMPLEMENTED,
    429: Code.UNAVAILABLE,
    502: Code.UNAVAILABLE,
    503: Code.UNAVAILABLE,
    504: Code.UNAVAILABLE,
}
_OF_RESET: Final = {
    0x7: Code.UNAVAILABLE,  # REFUSED_STREAM
    0x8: Code.CANCELLED,  # CANCEL
    0xB: Code.RESOURCE_EXHAUSTED,  # ENHANCE_YOUR_CALM
    0xC: Code.PERMISSION_DENIED,  # INADEQUATE_SECURITY
}


def code_of_http(status: int) -> Code:
    """What an HTTP status means when no gRPC server has spoken."""
    return _OF_HTTP.get(status, Code.UNKNOWN)


def code_of_reset(code: int) -> Code:
    """What a client of gRPC makes of a reset with this code, HTTP/2's or HTTP/3's."""
    return _OF_RESET.get(translated(code, False), Code.INTERNAL)


def code_of_value(value: bytes) -> Code:
    """A ``grpc-status`` as its sender wrote it; what is none of the codes is UNKNOWN."""
    return Code(int(value)) if value.isdigit() and len(value) <= 2 and int(value) <= 16 else Code.UNKNOWN


def status_in(fields: Iterable[Field]) -> Code | None:
    """The status of a call whose trailers these are, if they are."""
    for name, value in fields:
        if name == STATUS:
            return code_of_value(value)
    return None


def status_fields(code: Code, text: str) -> Fields:
    """A status and its message, percent-encoded."""
    return ((STATUS, b"%d" % code), (MESSAGE, encoded(text)))


def encoded(text: str) -> bytes:
    """``grpc-message``: UTF-8 with everything but printable ASCII, and the percent sign, percent-encoded."""
    data = text.encode("utf-8", "replace")
    return b"".join(b"%c" % byte if byte in _PLAIN else b"%%%02X" % byte for byte in data)


def seconds_of(value: bytes) -> float:
    """A ``grpc-timeout`` in seconds. Raises ``ValueError`` for what is none."""
    match = _TIMEOUT.fullmatch(value)
    if match is None:
        raise ValueError("not a grpc-timeout")
    return int(match[1]) * _UNITS_S[match[2]]


def timeout_of(seconds: int) -> bytes:
    """A ``grpc-timeout`` of so many whole seconds."""
    return b"%dS" % min(seconds, _MOST_DIGITS)


def subtype_of(content_type: bytes) -> bytes | None:
    """What follows ``application/grpc``: empty, a format (``+proto``), or that of gRPC-Web (``-web...``).

    None if it is another media type. Parameters are left away.
    """
    essence = content_type.partition(b";")[0].strip().lower()
    if not essence.startswith(CONTENT_TYPE):
        return None
    rest = essence[len(CONTENT_TYPE) :]
    family = rest.partition(b"+")[0]
    return rest if family in (b"", b"-web", b"-web-text") else None


def field_of(fields: Iterable[Field], wanted: bytes) -> bytes:
    """The first value of a field; empty if there is none."""
    for name, value in fields:
        if name == wanted:
            return value
    return b""


def code_of(reason: Reason) -> Code:
    """The status of a call that the gateway answered, or ended, for this reason."""
    match reason:
        case (
            Reason.MALFORMED
            | Reason.SMUGGLING
            | Reason.BAD_AUTHORITY
            | Reason.BAD_PATH
            | Reason.BAD_DEADLINE
            | Reason.FORBIDDEN_TRAILER
            | Reason.VERSION
            | Reason.MISDIRECTED
            | Reason.UNSUPPORTED_MEDIA
        ):
            return Code.INVALID_ARGUMENT
        case Reason.HEAD_TOO_LARGE | Reason.URI_TOO_LONG | Reason.BODY_TOO_LARGE:
            return Code.RESOURCE_EXHAUSTED
        case Reason.CLIENT_CLOSED | Reason.SLOW_READER:
            return Code.CANCELLED
        case Reason.NO_ROUTE | Reason.METHOD:
            return Code.UNIMPLEMENTED
        case (
            Reason.OVER_CAPACITY
            | Reason.SATURATED
            | Reason.QUEUE_TIMEOUT
            | Reason.NO_BACKEND
            | Reason.BACKENDS_DOWN
            | Reason.DNS
            | Reason.CONNECT_REFUSED
            | Reason.CONNECT_FAILED
            | Reason.CONNECT_TIMEOUT
            | Reason.BACKEND_TLS
            | Reason.BACKEND_CERTIFICATE
            | Reason.BACKEND_RESET
            | Reason.BACKEND_TRUNCATED
            | Reason.BACKEND_UPGRADE
        ):
            return Code.UNAVAILABLE
        case Reason.BACKEND_PROTOCOL | Reason.BACKEND_HEAD_TOO_LARGE:
            return Code.INTERNAL
        case (
            Reason.GRPC_DEADLINE
            | Reason.SLOW_HEAD
            | Reason.SLOW_BODY
            | Reason.TRY_TIMEOUT
            | Reason.HEAD_TIMEOUT
            | Reason.TOTAL_TIMEOUT
            | Reason.BODY_TIMEOUT
        ):
            return Code.DEADLINE_EXCEEDED
    assert_never(reason)
