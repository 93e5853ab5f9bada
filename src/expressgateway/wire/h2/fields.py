"""Header lists: what they may hold and what they mean (RFC 9113 8.2, 8.3), and how ours are made.

Reading raises ``MalformedError`` and its like for what RFC 9113 calls malformed: the stream is reset and
nothing is forwarded. What is a sound message that we do not serve (an authority that is none, two hosts, a
name with an underscore, a target or a list too long) is kept in ``Request.refusal``: it is answered.

Stricter than RFC 9113 8.2.1, which forbids NUL, CR and LF in values: no control character but HTAB, for that
is what an HTTP/1.1 backend would be sent. No Content-Length more than once, even with equal values.
"""

import re
from enum import IntEnum
from typing import Final

from expressgateway.wire.errors import (
    AuthorityError,
    FramingError,
    HeadTooLargeError,
    MalformedError,
    MethodError,
    TargetTooLongError,
    TrailerError,
    WireError,
)
from expressgateway.wire.h1.fields import FORBIDDEN_IN_TRAILERS, check_authority
from expressgateway.wire.h2.hpack import Triple
from expressgateway.wire.head import WEBSOCKET, Field, Fields, RequestHead, ResponseHead, SharedFields

_ALLOWED: Final = bytes([0x09, *range(0x20, 0x7F), *range(0x80, 0x100)])
_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_METHOD: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}")
_SCHEME: Final = re.compile(rb"[A-Za-z][A-Za-z0-9+\-.]{0,31}")
_NOT_IN_TARGET: Final = re.compile(rb"[^\x21\x22\x24-\x7e]")  # visible ASCII, and no fragment
_LENGTH: Final = re.compile(rb"0|[1-9][0-9]{0,17}")
_COMMON: Final = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"})
_REQUEST_PSEUDO: Final = frozenset({b":method", b":scheme", b":authority", b":path", b":protocol"})

_CACHED_NAMES: Final = 1024  # judged names; the cache starts afresh when full
_CACHED_NAME_BYTES: Final = 64
_CACHED_AUTHORITIES: Final = 256  # likewise

# Never put into a table by us. Secrets, because compression beside a guess tells them (RFC 7541 7.1.3); and
# values that hardly come twice, which would push everything else out.
NOT_INDEXED: Final = frozenset(
    {
        b"authorization",
        b"proxy-authorization",
        b"set-cookie",
        b":path",
        b"age",
        b"content-length",
        b"etag",
        b"forwarded",
        b"if-modified-since",
        b"if-none-match",
        b"location",
        b"traceparent",
        b"tracestate",
        b"x-forwarded-for",
        b"x-real-ip",
        b"x-request-id",
    }
)
_SHORT_COOKIE_BYTES: Final = 20  # a shorter one can be guessed


class Secret(bytes):
    """A value that its sender marked as never to be indexed: whoever forwards it does the same
    (RFC 7541 6.2.3)."""

    __slots__ = ()


class Kind(IntEnum):
    END_TO_END = 0
    PSEUDO = 1
    HOST = 2
    CONTENT_LENGTH = 3
    COOKIE = 4
    TE = 5
    EXPECT = 6
    CONNECTION = 7
    """Connection-specific: makes a message malformed (RFC 9113 8.2.2)."""
    DROPPED = 8
    UNDERSCORE = 9


END_TO_END, PSEUDO, COOKIE = Kind.END_TO_END, Kind.PSEUDO, Kind.COOKIE

KINDS: Final[dict[bytes, Kind]] = {
    b"host": Kind.HOST,
    b"content-length": Kind.CONTENT_LENGTH,
    b"cookie": Kind.COOKIE,
    b"te": Kind.TE,
    b"expect": Kind.EXPECT,
    b"connection": Kind.CONNECTION,
    b"keep-alive": Kind.CONNECTION,
    b"proxy-connection": Kind.CONNECTION,
    b"transfer-encoding": Kind.CONNECTION,
    b"upgrade": Kind.CONNECTION,
    b"proxy-authenticate": Kind.DROPPED,
    b"proxy-authorization": Kind.DROPPED,
    b"http2-settings": Kind.DROPPED,
}


class Request:
    """A request's header list as read. Never changed: equal blocks on a connection share one."""

    __slots__ = (
        "accepts_trailers",
        "authority",
        "content_length",
        "expects_continue",
        "headers",
        "hosts",
        "is_nameless",
        "method",
        "path",
        "protocol",
        "refusal",
        "underscore",
    )

    def __init__(self) -> None:
        self.method = b""
        self.authority = b""
        self.path = b""
        self.protocol: bytes | None = None
        self.headers: Fields = ()
        self.content_length: int | None = None
        self.accepts_trailers = False
        self.expects_continue = False
        self.hosts: tuple[bytes, ...] = ()
        self.is_nameless = False
        """Neither :authority nor Host stood in it."""
        self.underscore = False
        """A name with an underscore stood in it."""
        self.refusal: WireError | None = None

    def head(self, scheme: bytes, version: bytes = b"2") -> RequestHead:
        """A fresh head: who is given it may change it."""
        return RequestHead(
            self.method,
            scheme,
            self.authority,
            self.path,
            self.headers,
            self.protocol,
            self.content_length,
            version,
            self.accepts_trailers,
            self.expects_continue,
        )


class FieldRules:
    """Judges header lists under one set of limits. One per listener and side, shared by its connections."""

    __slots__ = ("_authorities", "_names", "max_count", "max_target_bytes", "underscore")

    def __init__(
        self, max_count: int = 256, max_target_bytes: int = 16_384, underscore: str = "reject"
    ) -> None:
        """``underscore``: ``reject``, ``drop`` or ``allow`` names that contain ``_``."""
        self._names: dict[bytes, Kind] = {}
        self._authorities: dict[bytes, bytes] = {}
        self.max_count = max_count
        self.max_target_bytes = max_target_bytes
        self.underscore = underscore

    def _kind(self, name: bytes) -> Kind:
        """Judge a name, and remember it."""
        if name[:1] == b":":
            if name not in _REQUEST_PSEUDO and name != b":status":
                raise MalformedError("a pseudo-header field that does not exist")
            kind = PSEUDO
        elif _NAME.fullmatch(name) is None:
            raise MalformedError("a field name that is not a token in lower case")
        else:
            kind = KINDS.get(name, END_TO_END)
            if kind is END_TO_END and b"_" in name and self.underscore != "allow":
                kind = Kind.UNDERSCORE
        if len(name) <= _CACHED_NAME_BYTES:
            if len(self._names) >= _CACHED_NAMES:
                self._names.clear()
            self._names[name] = kind
        return kind

    @staticmethod
    def _judge(values: list[bytes]) -> None:
        """No control character but HTAB in any value, and no blank at its ends."""
        text = b"\n".join(values)
        if len(text.translate(None, _ALLOWED)) != max(len(values) - 1, 0):
            raise MalformedError("a control character in a field value")
        if list(map(bytes.strip, values)) != values:
            raise MalformedError("a field value that begins or ends with a blank")

    # -- requests --------------------------------------------------------------------------------------

    def read_request(self, fields: list[Triple]) -> Request:
        """Read a request's list (RFC 9113 8.3.1). Raises a ``WireError`` if it is malformed."""
        request = Request()
        names = self._names
        pseudo: dict[bytes, bytes] = {}
        headers: list[Field] = []
        values: list[bytes] = []
        crumbs: list[bytes] = []
        special = is_secret_cookie = False
        cookie_at = 0
        for name, value, is_secret in fields:
            kind = names.get(name)
            if kind is None:
                kind = self._kind(name)
            values.append(value)
            if kind is END_TO_END:
                headers.append((name, Secret(value) if is_secret else value))
            elif kind is COOKIE:
                # RFC 9113 8.2.3: crumbs are one field wherever HTTP/2 ends; it stands where the first did.
                if not crumbs:
                    headers.append((name, value))
                    cookie_at = len(headers) - 1
                crumbs.append(value)
                is_secret_cookie |= is_secret
            elif kind is PSEUDO:
                if headers or special:
                    raise MalformedError("a pseudo-header field behind a field")
                if name in pseudo:
                    raise MalformedError("a pseudo-header field more than once")
                pseudo[name] = value
            else:
                special = True
                self._take(request, kind, value, headers, is_secret)
        self._judge(values)
        if crumbs:
            cookie = b"; ".join(crumbs)
            headers[cookie_at] = (b"cookie", Secret(cookie) if is_secret_cookie else cookie)
        request.headers = tuple(headers)
        if b":status" in pseudo:
            raise MalformedError(":status in a request")
        refusal = self._targets(request, pseudo)
        if len(fields) > self.max_count:
            refusal = HeadTooLargeError(f"more than {self.max_count} header fields")
        elif request.underscore and self.underscore == "reject":
            refusal = MalformedError("a field name contains an underscore")
        request.refusal = refusal
        return request

    @staticmethod
    def _take(request: Request, kind: Kind, value: bytes, headers: list[Field], is_secret: bool) -> None:
        match kind:
            case Kind.CONTENT_LENGTH:
                request.content_length = _length(value, request.content_length)
            case Kind.HOST:
                request.hosts += (value,)
            case Kind.TE:
                if value.lower() != b"trailers":
                    raise MalformedError("TE other than trailers")
                request.accepts_trailers = True
            case Kind.EXPECT:
                # RFC 9110 10.1.1: forwarded end to end; the backend answers it.
                if value.lower() == b"100-continue":
                    request.expects_continue = True
                headers.append((b"expect", value))
            case Kind.CONNECTION:
                raise MalformedError("a connection-specific field")
            case Kind.UNDERSCORE:
                request.underscore = True
            case _:
                pass

    def _targets(self, request: Request, pseudo: dict[bytes, bytes]) -> WireError | None:
        """Judge the pseudo-header fields. Gives what is to be answered; raises for malformed ones."""
        method = pseudo.get(b":method", b"")
        if method not in _COMMON and _METHOD.fullmatch(method) is None:
            raise MalformedError("no :method, or none that is a token")
        request.method = method
        protocol = pseudo.get(b":protocol")
        if method == b"CONNECT" and protocol is None:
            # RFC 9113 8.5
            if b":scheme" in pseudo or b":path" in pseudo or b":authority" not in pseudo:
                raise MalformedError("CONNECT with :scheme or :path, or without :authority")
            request.authority = pseudo[b":authority"]
            return MethodError("CONNECT is for forward proxies")
        if _SCHEME.fullmatch(pseudo.get(b":scheme", b"")) is None:
            raise MalformedError("no :scheme, or none that is one")
        path = pseudo.get(b":path", b"")
        if path[:1] != b"/" and (path != b"*" or method != b"OPTIONS"):
            raise MalformedError("no :path, or none that is one")
        if _NOT_IN_TARGET.search(path) is not None:
            raise MalformedError("a :path with a blank, a fragment, or what is not ASCII")
        request.path = path
        if protocol is not None:
            # RFC 8441 4: to the rest of the gateway it is the handshake that RFC 6455 makes with GET.
            if method != b"CONNECT" or b":authority" not in pseudo:
                raise MalformedError(":protocol without CONNECT or :authority")
            if request.content_length is not None:
                raise FramingError("a handshake with a Content-Length")
            request.protocol = protocol.lower()
            request.method = b"GET"
        refusal = self._authority(request, pseudo.get(b":authority"))
        if len(path) > self.max_target_bytes:
            return TargetTooLongError(f"a target of more than {self.max_target_bytes} bytes")
        if protocol is not None and request.protocol != WEBSOCKET:
            return MethodError("a protocol that is not served")
        return refusal

    def _authority(self, request: Request, authority: bytes | None) -> WireError | None:
        """Host and :authority name one and the same (RFC 9113 8.3.1)."""
        hosts = request.hosts
        if len(hosts) > 1:
            return AuthorityError("Host more than once")
        try:
            if authority is None:
                if not hosts:
                    request.is_nameless = True
                    return AuthorityError("a request without an authority")
                request.authority = self._checked(hosts[0])
            else:
                request.authority = self._checked(authority)
                if hosts and self._checked(hosts[0]) != request.authority:
                    return AuthorityError("Host and :authority disagree")
        except AuthorityError as error:
            return error
        return None

    def _checked(self, value: bytes) -> bytes:
        known = self._authorities.get(value)
        if known is None:
            known = check_authority(value)
            if len(self._authorities) >= _CACHED_AUTHORITIES:
                self._authorities.clear()
            self._authorities[value] = known
        return known

    # -- responses and trailers ------------------------------------------------------------------------

    def read_response(self, fields: list[Triple], version: bytes = b"2") -> ResponseHead:
        """Read a response's list (RFC 9113 8.3.2). Raises a ``WireError`` if it is malformed."""
        names = self._names
        status = 0
        length: int | None = None
        headers: list[Field] = []
        values: list[bytes] = []
        special = False
        for name, value, is_secret in fields:
            kind = names.get(name)
            if kind is None:
                kind = self._kind(name)
            values.append(value)
            if kind is END_TO_END:
                headers.append((name, Secret(value) if is_secret else value))
            elif kind is PSEUDO:
                if headers or special or status or name != b":status":
                    raise MalformedError("a pseudo-header field other than one :status in front")
                if len(value) != 3 or not value.isdigit() or not b"100" <= value < b"600":
                    raise MalformedError("a :status that is not one")
                status = int(value)
            else:
                special = True
                if kind is Kind.CONTENT_LENGTH:
                    length = _length(value, length)
                elif kind is Kind.CONNECTION:
                    raise MalformedError("a connection-specific field")
                elif kind is COOKIE or kind is Kind.EXPECT:
                    headers.append((name, value))
        self._judge(values)
        if not status:
            raise MalformedError("a response without :status")
        if len(fields) > self.max_count:
            raise HeadTooLargeError(f"more than {self.max_count} header fields")
        return ResponseHead(status, tuple(headers), length, version)

    def read_trailers(self, fields: list[Triple]) -> Fields:
        """Read a trailer section (RFC 9113 8.1). Raises a ``WireError`` if it is malformed."""
        if len(fields) > self.max_count:
            raise HeadTooLargeError(f"more than {self.max_count} trailer fields")
        trailers: list[Field] = []
        for name, value, is_secret in fields:
            kind = self._names.get(name)
            if kind is None:
                kind = self._kind(name)
            if kind is PSEUDO:
                raise MalformedError("a pseudo-header field in a trailer section")
            if name in FORBIDDEN_IN_TRAILERS:
                raise TrailerError(f"{name.decode('ascii')} in a trailer section")
            if kind is not Kind.UNDERSCORE:
                trailers.append((name, Secret(value) if is_secret else value))
        self._judge([value for _, value, _ in fields])
        return tuple(trailers)


def _length(value: bytes, before: int | None) -> int:
    if before is not None:
        raise FramingError("Content-Length more than once")
    if _LENGTH.fullmatch(value) is None:
        raise FramingError("a Content-Length that is not a plain number")
    return int(value)


# -- what we send --------------------------------------------------------------------------------------

_STATUS: Final[dict[int, Triple]] = {
    status: (b":status", b"%d" % status, False) for status in range(100, 600)
}


def triples_of(fields: Fields) -> list[Triple]:
    """Fields as HPACK takes them."""
    return [
        (
            name,
            value,
            name in NOT_INDEXED
            or type(value) is Secret
            or (name == b"cookie" and len(value) < _SHORT_COOKIE_BYTES),
        )
        for name, value in fields
    ]


def _shared(shared: SharedFields) -> tuple[Triple, ...]:
    if not shared.h2 and shared.fields:
        shared.h2 = tuple(triples_of(shared.fields))
    return shared.h2


def response_list(head: ResponseHead, with_length: bool) -> list[Triple]:
    """A response's header list. ``with_length``: tell the declared length, if there is one."""
    fields = [_STATUS[head.status], *(head.shared.h2 or _shared(head.shared)), *triples_of(head.headers)]
    if with_length and head.content_length is not None:
        fields.append((b"content-length", b"%d" % head.content_length, True))
    return fields


def request_list(head: RequestHead) -> list[Triple]:
    """A request's header list. A handshake becomes extended CONNECT (RFC 8441 4)."""
    protocol = head.protocol
    fields = [
        (b":method", head.method if protocol is None else b"CONNECT", False),
        (b":scheme", head.scheme, False),
        (b":path", head.path, head.path != b"/"),
    ]
    if head.authority:
        fields.append((b":authority", head.authority, False))
    if protocol is not None:
        fields.append((b":protocol", protocol, False))
    fields += head.shared.h2 or _shared(head.shared)
    fields += triples_of(head.headers)
    if head.content_length is not None:
        fields.append((b"content-length", b"%d" % head.content_length, True))
    if head.accepts_trailers:
        fields.append((b"te", b"trailers", False))
    return fields
