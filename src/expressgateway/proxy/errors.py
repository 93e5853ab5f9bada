"""Answers of our own: the closed set of reasons, and what each means to a client.

``Reason`` is the metric label, ``status`` what is answered, ``proxy_status`` the error of RFC 9209 2.3.
"""

from enum import Enum
from typing import Final, assert_never

from expressgateway.upstream.errors import Fault
from expressgateway.wire.errors import (
    AuthorityError,
    ContradictionError,
    FramingError,
    HeadTooLargeError,
    MalformedError,
    MethodError,
    NotOfferedError,
    PeerClosedError,
    SlowHeadError,
    StreamResetError,
    TargetTooLongError,
    TrailerError,
    TruncatedError,
    UnprocessedError,
    VersionError,
    WireError,
)


class Reason(Enum):
    """Why the gateway answered by itself, or ended an exchange."""

    # The client's side
    MALFORMED = "malformed"
    SMUGGLING = "smuggling"
    BAD_AUTHORITY = "bad_authority"
    BAD_PATH = "bad_path"
    FORBIDDEN_TRAILER = "forbidden_trailer"
    METHOD = "method"
    VERSION = "version"
    HEAD_TOO_LARGE = "head_too_large"
    URI_TOO_LONG = "uri_too_long"
    BODY_TOO_LARGE = "body_too_large"
    MISDIRECTED = "misdirected"
    UNSUPPORTED_MEDIA = "unsupported_media"
    BAD_DEADLINE = "bad_deadline"
    GRPC_DEADLINE = "grpc_deadline"
    SLOW_HEAD = "slow_head"
    SLOW_BODY = "slow_body"
    CLIENT_CLOSED = "client_closed"
    SLOW_READER = "slow_reader"
    # The gateway
    NO_ROUTE = "no_route"
    OVER_CAPACITY = "over_capacity"
    SATURATED = "saturated"
    QUEUE_TIMEOUT = "queue_timeout"
    # The backend's side
    NO_BACKEND = "no_backend"
    BACKENDS_DOWN = "backends_down"
    DNS = "dns"
    CONNECT_REFUSED = "connect_refused"
    CONNECT_FAILED = "connect_failed"
    CONNECT_TIMEOUT = "connect_timeout"
    BACKEND_TLS = "backend_tls"
    BACKEND_CERTIFICATE = "backend_certificate"
    BACKEND_RESET = "backend_reset"
    BACKEND_TRUNCATED = "backend_truncated"
    BACKEND_PROTOCOL = "backend_protocol"
    BACKEND_UPGRADE = "backend_upgrade"
    BACKEND_HEAD_TOO_LARGE = "backend_head_too_large"
    TRY_TIMEOUT = "try_timeout"
    HEAD_TIMEOUT = "head_timeout"
    TOTAL_TIMEOUT = "total_timeout"
    BODY_TIMEOUT = "body_timeout"


SECURITY_KINDS: Final = {
    Reason.MALFORMED: "malformed_request",
    Reason.SMUGGLING: "request_smuggling",
    Reason.BAD_AUTHORITY: "bad_authority",
    Reason.BAD_PATH: "bad_path",
    Reason.FORBIDDEN_TRAILER: "forbidden_trailer",
    Reason.HEAD_TOO_LARGE: "head_too_large",
    Reason.URI_TOO_LONG: "uri_too_long",
    Reason.BODY_TOO_LARGE: "body_too_large",
    Reason.MISDIRECTED: "sni_fronting",
    Reason.BAD_DEADLINE: "grpc_bad_deadline",
    Reason.SLOW_HEAD: "slow_head",
    Reason.SLOW_BODY: "slow_body",
    Reason.SLOW_READER: "slow_reader",
}
"""Reasons that are also events of the attack catalogue, under these labels."""


def status_of(reason: Reason) -> int:
    """The status answered for a reason; 499 is only counted, never sent."""
    match reason:
        case (
            Reason.MALFORMED
            | Reason.SMUGGLING
            | Reason.BAD_AUTHORITY
            | Reason.BAD_PATH
            | Reason.BAD_DEADLINE
            | Reason.FORBIDDEN_TRAILER
        ):
            return 400
        case Reason.NO_ROUTE:
            return 404
        case Reason.METHOD:
            return 405
        case Reason.SLOW_HEAD | Reason.SLOW_BODY | Reason.GRPC_DEADLINE:
            # Of a call it is the caller who says how long it may take: no backend is to blame for that.
            return 408
        case Reason.BODY_TOO_LARGE:
            return 413
        case Reason.URI_TOO_LONG:
            return 414
        case Reason.UNSUPPORTED_MEDIA:
            return 415
        case Reason.MISDIRECTED:
            return 421
        case Reason.HEAD_TOO_LARGE:
            return 431
        case Reason.CLIENT_CLOSED | Reason.SLOW_READER:
            return 499
        case (
            Reason.NO_BACKEND
            | Reason.DNS
            | Reason.CONNECT_REFUSED
            | Reason.CONNECT_FAILED
            | Reason.BACKEND_TLS
            | Reason.BACKEND_CERTIFICATE
            | Reason.BACKEND_RESET
            | Reason.BACKEND_TRUNCATED
            | Reason.BACKEND_PROTOCOL
            | Reason.BACKEND_UPGRADE
            | Reason.BACKEND_HEAD_TOO_LARGE
        ):
            return 502
        case Reason.OVER_CAPACITY | Reason.SATURATED | Reason.QUEUE_TIMEOUT | Reason.BACKENDS_DOWN:
            return 503
        case (
            Reason.CONNECT_TIMEOUT
            | Reason.TRY_TIMEOUT
            | Reason.HEAD_TIMEOUT
            | Reason.TOTAL_TIMEOUT
            | Reason.BODY_TIMEOUT
        ):
            return 504
        case Reason.VERSION:
            return 505
    assert_never(reason)


def blames_client(reason: Reason) -> bool:
    """Whether it was the client's doing, and says nothing of the gateway or its backends."""
    return status_of(reason) < 500 or reason is Reason.VERSION


def proxy_status_of(reason: Reason) -> str:
    """The error token of RFC 9209 2.3 for the ``Proxy-Status`` field."""
    match reason:
        case (
            Reason.MALFORMED
            | Reason.SMUGGLING
            | Reason.BAD_AUTHORITY
            | Reason.BAD_PATH
            | Reason.FORBIDDEN_TRAILER
            | Reason.METHOD
            | Reason.VERSION
            | Reason.HEAD_TOO_LARGE
            | Reason.URI_TOO_LONG
            | Reason.BODY_TOO_LARGE
            | Reason.MISDIRECTED
            | Reason.UNSUPPORTED_MEDIA
            | Reason.BAD_DEADLINE
            | Reason.SLOW_HEAD
            | Reason.SLOW_BODY
            | Reason.CLIENT_CLOSED
            | Reason.SLOW_READER
        ):
            return "http_request_error"
        case Reason.NO_ROUTE | Reason.NO_BACKEND:
            return "destination_not_found"
        case Reason.BACKENDS_DOWN:
            return "destination_unavailable"
        case Reason.OVER_CAPACITY | Reason.SATURATED | Reason.QUEUE_TIMEOUT:
            return "connection_limit_reached"
        case Reason.DNS:
            return "dns_error"
        case Reason.CONNECT_REFUSED:
            return "connection_refused"
        case Reason.CONNECT_FAILED:
            return "destination_ip_unroutable"
        case Reason.CONNECT_TIMEOUT:
            return "connection_timeout"
        case Reason.BACKEND_TLS:
            return "tls_protocol_error"
        case Reason.BACKEND_CERTIFICATE:
            return "tls_certificate_error"
        case Reason.BACKEND_RESET:
            return "connection_terminated"
        case Reason.BACKEND_TRUNCATED:
            return "http_response_incomplete"
        case Reason.BACKEND_PROTOCOL:
            return "http_protocol_error"
        case Reason.BACKEND_UPGRADE:
            return "http_upgrade_failed"
        case Reason.BACKEND_HEAD_TOO_LARGE:
            return "http_response_header_section_size"
        case Reason.TRY_TIMEOUT | Reason.HEAD_TIMEOUT | Reason.TOTAL_TIMEOUT | Reason.BODY_TIMEOUT:
            return "http_response_timeout"
        case Reason.GRPC_DEADLINE:
            return "http_response_timeout"
    assert_never(reason)


def reason_of_fault(fault: Fault) -> Reason:
    """Why no connection to a backend was had."""
    match fault:
        case Fault.NO_BACKEND:
            return Reason.NO_BACKEND
        case Fault.DNS:
            return Reason.DNS
        case Fault.REFUSED:
            return Reason.CONNECT_REFUSED
        case Fault.UNREACHABLE:
            return Reason.CONNECT_FAILED
        case Fault.CONNECT_TIMEOUT:
            return Reason.CONNECT_TIMEOUT
        case Fault.TLS:
            return Reason.BACKEND_TLS
        case Fault.CERTIFICATE:
            return Reason.BACKEND_CERTIFICATE
        case Fault.PROTOCOL:
            return Reason.BACKEND_PROTOCOL
        case Fault.DOWN:
            return Reason.BACKENDS_DOWN
        case Fault.SATURATED:
            return Reason.SATURATED
        case Fault.OVER_CAPACITY:
            return Reason.OVER_CAPACITY
    assert_never(fault)


_CLIENT_ERRORS: dict[type[WireError], Reason] = {
    MalformedError: Reason.MALFORMED,
    FramingError: Reason.SMUGGLING,
    AuthorityError: Reason.BAD_AUTHORITY,
    HeadTooLargeError: Reason.HEAD_TOO_LARGE,
    SlowHeadError: Reason.SLOW_HEAD,
    TargetTooLongError: Reason.URI_TOO_LONG,
    VersionError: Reason.VERSION,
    MethodError: Reason.METHOD,
    TrailerError: Reason.FORBIDDEN_TRAILER,
    TruncatedError: Reason.CLIENT_CLOSED,
    PeerClosedError: Reason.CLIENT_CLOSED,
    UnprocessedError: Reason.CLIENT_CLOSED,
    StreamResetError: Reason.CLIENT_CLOSED,
    ContradictionError: Reason.BACKEND_PROTOCOL,  # it was the backend's body
}

_BACKEND_ERRORS: dict[type[WireError], Reason] = {
    HeadTooLargeError: Reason.BACKEND_HEAD_TOO_LARGE,
    TruncatedError: Reason.BACKEND_TRUNCATED,
    PeerClosedError: Reason.BACKEND_RESET,
    UnprocessedError: Reason.BACKEND_RESET,
    StreamResetError: Reason.BACKEND_RESET,
    NotOfferedError: Reason.BACKEND_UPGRADE,
}


class DeadlineError(WireError):
    """A limit of time, found by the sweep, in the form in which codecs report the rest."""

    kind = "deadline"

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value.replace("_", " "))
        self.reason = reason


def reason_of_client(error: WireError) -> Reason:
    """What a client did, from what its codec reported."""
    if isinstance(error, DeadlineError):
        return error.reason
    return _CLIENT_ERRORS.get(type(error), Reason.MALFORMED)


def reason_of_backend(error: WireError) -> Reason:
    """What a backend did, from what its codec reported."""
    return _BACKEND_ERRORS.get(type(error), Reason.BACKEND_PROTOCOL)
