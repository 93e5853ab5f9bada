"""Request lines and status lines: RFC 9112 3 and 4."""

import re
from functools import lru_cache
from http import HTTPStatus
from typing import Final

from expressgateway.wire.errors import (
    AuthorityError,
    MalformedError,
    MethodError,
    TargetTooLongError,
    VersionError,
)
from expressgateway.wire.h1.fields import check_authority

# method SP request-target SP HTTP-version. The target is visible ASCII only: RFC 3986 has nothing else.
_REQUEST_LINE: Final = re.compile(
    rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])"
)
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [\t \x21-\x7e\x80-\xff]*)?")
_ABSOLUTE: Final = re.compile(rb"([Hh][Tt][Tt][Pp][Ss]?)://([^/?#]*)([^#]*)")

_COMMON: Final = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE"})
_NOT_IN_TARGET: Final = re.compile(rb"[^\x21\x22\x24-\x7e]")  # and no fragment
VERSIONS: Final = {b"1": b"1.1", b"0": b"1.0"}


def read_request_line(line: bytes, max_target_bytes: int) -> tuple[bytes, bytes, bytes, bytes | None]:
    """Give method, target in origin form (or ``*``), version, and the authority of an absolute target.

    Raises a ``WireError`` with the status to answer: 400, 405 for CONNECT, 414, 505.
    """
    # fast path: origin form in HTTP/1.1 with a common method
    if line.endswith(b" HTTP/1.1"):
        method, _, target = line[:-9].partition(b" ")
        if (
            method in _COMMON
            and target[:1] == b"/"
            and len(target) <= max_target_bytes
            and _NOT_IN_TARGET.search(target) is None
        ):
            return method, target, b"1.1", None
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise _diagnose(line, max_target_bytes)
    method, target, major, minor = match.groups()
    if major != b"1" or minor not in VERSIONS:
        raise VersionError("only HTTP/1.0 and HTTP/1.1 are spoken here")
    if len(target) > max_target_bytes:
        raise TargetTooLongError(f"a target of more than {max_target_bytes} bytes")
    version = VERSIONS[minor]
    if method == b"CONNECT":
        raise MethodError("CONNECT is for forward proxies")
    if target[0] == 0x2F:
        if b"#" in target:
            raise MalformedError("a fragment in the request target")
        return method, target, version, None
    return _other_forms(method, target, version)


def _other_forms(method: bytes, target: bytes, version: bytes) -> tuple[bytes, bytes, bytes, bytes | None]:
    if target == b"*":
        if method != b"OPTIONS":
            raise MalformedError("the target * belongs to OPTIONS")
        return method, target, version, None
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        raise MalformedError("a request target in no known form")
    authority = match[2]
    if not authority:
        raise AuthorityError("an absolute target without a host")
    path = match[3]
    if not path.startswith(b"/"):
        # RFC 9112 3.2.4: OPTIONS on an absolute target without a path means the whole server.
        path = b"*" if method == b"OPTIONS" and not path else b"/" + path
    return method, path, version, check_authority(authority)


def _diagnose(line: bytes, max_target_bytes: int) -> MalformedError | TargetTooLongError:
    if len(line) > max_target_bytes:
        return TargetTooLongError(f"a request line of more than {max_target_bytes} bytes")
    return MalformedError("a malformed request line")


def read_status_line(line: bytes) -> tuple[int, bytes]:
    """Give status and version. The reason phrase is not forwarded: HTTP/2 and HTTP/3 have none."""
    match = _STATUS_LINE.fullmatch(line)
    if match is None:
        raise MalformedError("a malformed status line")
    return int(match[2]), VERSIONS[match[1]]


@lru_cache(maxsize=600)  # three digits
def status_line(status: int) -> bytes:
    """``HTTP/1.1 STATUS REASON CRLF`` with the registered reason phrase, or none."""
    try:
        reason = HTTPStatus(status).phrase
    except ValueError:
        reason = ""
    return f"HTTP/1.1 {status} {reason}\r\n".encode("ascii")
