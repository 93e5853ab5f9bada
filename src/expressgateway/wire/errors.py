"""The one family of errors that codecs raise and report.

A ``WireError`` says what the peer did wrong, how far the damage reaches (``Scope``) and which status a
server would answer (``status``). Codecs never let anything else out for a peer's input.
"""

from enum import IntEnum


class Scope(IntEnum):
    """How much of the connection an error costs."""

    STREAM = 0
    """This exchange only; its siblings go on."""
    CONNECTION = 1
    """Framing is lost: nothing after it on this connection can be trusted."""


class WireError(Exception):
    """A peer broke its protocol. ``kind`` is a short label, fit for a metric."""

    scope: Scope = Scope.CONNECTION
    status: int = 400
    kind: str = "malformed"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class MalformedError(WireError):
    """Not the grammar of the protocol: RFC 9112 2.2, 3, 5."""


class FramingError(WireError):
    """Two readers could disagree where this message ends (RFC 9112 6.3): request smuggling."""

    kind = "smuggling"


class AuthorityError(WireError):
    """Host missing, repeated, malformed, or at odds with the target (RFC 9112 3.2)."""

    kind = "bad_authority"


class HeadTooLargeError(WireError):
    """More header bytes or fields than allowed: RFC 6585 5."""

    status = 431
    kind = "head_too_large"


class SlowHeadError(WireError):
    """A head that began and was not completed in time."""

    scope = Scope.STREAM
    status = 408
    kind = "slow_head"


class TargetTooLongError(WireError):
    """The request target is longer than we read: RFC 9110 15.5.15."""

    status = 414
    kind = "uri_too_long"


class VersionError(WireError):
    """Not HTTP/1.0 or HTTP/1.1 on an HTTP/1 connection."""

    status = 505
    kind = "version"


class MethodError(WireError):
    """A method that a gateway cannot serve: CONNECT without extended semantics."""

    status = 405
    kind = "method"


class TrailerError(WireError):
    """A trailer section with a field that must not be there (RFC 9110 6.5.1)."""

    kind = "forbidden_trailer"


class TruncatedError(WireError):
    """The peer ended in the middle of a message."""

    kind = "truncated"


class ContradictionError(WireError):
    """A body given to us to send is longer or shorter than its declared length."""

    status = 502
    kind = "contradiction"


class PeerClosedError(WireError):
    """The peer went away between messages, or reset the connection."""

    kind = "closed"


class NotOfferedError(WireError):
    """The peer does not offer what a tunnel needs (RFC 8441 3). Nothing was sent to it."""

    scope = Scope.STREAM
    status = 502
    kind = "not_offered"


class UnprocessedError(PeerClosedError):
    """The peer says that it did not process this stream, and never will: it may be sent again.

    REFUSED_STREAM, or a stream above the last one that GOAWAY names (RFC 9113 8.7).
    """

    kind = "unprocessed"


class StreamResetError(WireError):
    """The peer reset this stream; ``code`` is its reason, fit to be passed on (RFC 9113 7, RFC 9114 8.1)."""

    scope = Scope.STREAM
    status = 502
    kind = "reset"

    def __init__(self, code: int, detail: str = "") -> None:
        super().__init__(detail or f"the peer reset the stream with code {code:#x}")
        self.code = code
