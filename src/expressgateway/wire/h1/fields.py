"""Header sections: from bytes to fields and their meaning (RFC 9110 5, RFC 9112 5 to 7).

A section is split at CRLF and each line is looked up in a cache of lines seen before, because clients and
backends repeat themselves; only an unknown line meets the grammar. What a line says about framing or about
this hop is taken into the ``Section``; the rest stays in its list, in order.

Stricter than RFC 9112 where readers are known to differ: no bare CR or LF, no line folding (5.2 lets a
server reject it), no blank before the colon (5.1), no repeated or listed Content-Length even with equal
values (6.3 lets a recipient reject it), Transfer-Encoding nothing but ``chunked``, once.
"""

import re
from enum import IntEnum
from ipaddress import IPv6Address
from typing import Final

from expressgateway.wire.errors import (
    AuthorityError,
    FramingError,
    HeadTooLargeError,
    MalformedError,
    TrailerError,
)
from expressgateway.wire.head import NO_FIELDS, Field, Fields, SharedFields

# What may stand in a field line: HTAB, SP, VCHAR and obs-text (RFC 9110 5.5).
_ALLOWED: Final = bytes([0x09, *range(0x20, 0x7F), *range(0x80, 0x100)])
_TOKEN: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_LENGTH: Final = re.compile(rb"0|[1-9][0-9]{0,17}")
# reg-name / IPv4 / IP-literal, then an optional port: RFC 3986 3.2.2. No userinfo (RFC 9110 4.2.4), no comma.
_AUTHORITY: Final = re.compile(
    rb"(?:[A-Za-z0-9\-._~!$&'()*+;=]|%[0-9A-Fa-f]{2})+(?::([0-9]{0,5}))?"
    rb"|\[[0-9A-Fa-f:.]{2,45}\](?::([0-9]{0,5}))?"
)


class Kind(IntEnum):
    """What a field is to this hop. ``END_TO_END`` fields are forwarded untouched."""

    END_TO_END = 0
    HOST = 1
    CONTENT_LENGTH = 2
    TRANSFER_ENCODING = 3
    CONNECTION = 4
    TE = 5
    EXPECT = 6
    UPGRADE = 7
    HOP = 8
    """Dropped: Keep-Alive, Proxy-Connection, Proxy-Authenticate, Proxy-Authorization, HTTP2-Settings."""
    UNDERSCORE = 9
    """A name with ``_``: backends that map names to variables confuse it with ``-``."""


END_TO_END = Kind.END_TO_END

KINDS: Final[dict[bytes, Kind]] = {
    b"host": Kind.HOST,
    b"content-length": Kind.CONTENT_LENGTH,
    b"transfer-encoding": Kind.TRANSFER_ENCODING,
    b"connection": Kind.CONNECTION,
    b"te": Kind.TE,
    b"expect": Kind.EXPECT,
    b"upgrade": Kind.UPGRADE,
    b"keep-alive": Kind.HOP,
    b"proxy-connection": Kind.HOP,
    b"proxy-authenticate": Kind.HOP,
    b"proxy-authorization": Kind.HOP,
    b"http2-settings": Kind.HOP,
}

# RFC 9110 6.5.1: framing, routing, request modifiers, authentication, and what this hop owns.
FORBIDDEN_IN_TRAILERS: Final = frozenset(KINDS) | {
    b"trailer",
    b"content-encoding",
    b"content-type",
    b"content-range",
    b"cache-control",
    b"max-forwards",
    b"range",
    b"authorization",
    b"set-cookie",
    b"cookie",
}

# Values that must not outlive their exchange in a cache.
_SECRET: Final = frozenset({b"authorization", b"cookie", b"set-cookie", b"proxy-authorization"})

_CACHED_NAMES: Final = 1024  # field names as they were spelled
_CACHED_NAME_BYTES: Final = 64
_CACHED_LINES: Final = 2048  # at most; the cache starts afresh when full
_CACHED_PER_NAME: Final = 64  # of them with one name
_CACHED_LINE_BYTES: Final = 192  # longer lines are not kept
_CACHED_SECTIONS: Final = 256  # whole sections, likewise
_CACHED_SECTION_BYTES: Final = 1024

Entry = tuple[Field, Kind]


def lines_of(shared: SharedFields) -> bytes:
    """Shared fields as header lines, made once."""
    if not shared.h1 and shared.fields:
        shared.h1 = b"\r\n".join(map(b": ".join, shared.fields)) + b"\r\n"
    return shared.h1


class Section:
    """A header section's fields and meaning. Shared between messages with equal sections: never changed."""

    __slots__ = (
        "accepts_trailers",
        "authority",
        "chunked",
        "close",
        "content_length",
        "expects_continue",
        "headers",
        "hosts",
        "keep_alive",
        "keep_alive_hint",
        "upgrade",
        "wants_upgrade",
    )

    def __init__(self) -> None:
        self.headers: Fields = NO_FIELDS
        self.content_length: int | None = None
        self.chunked = False
        self.hosts: tuple[bytes, ...] = ()
        self.authority: bytes | None = None
        """The one Host, checked and in lower case, once somebody did that."""
        self.close = False
        """Connection: close"""
        self.keep_alive = False
        """Connection: keep-alive"""
        self.keep_alive_hint = b""
        """The value of Keep-Alive, which a backend uses to tell its idle timeout."""
        self.wants_upgrade = False
        """Connection: upgrade"""
        self.upgrade = b""
        """The value of Upgrade, lower-case."""
        self.accepts_trailers = False
        self.expects_continue = False


class _Name:
    """A field name that was judged, and how many more lines of that name may go into the cache."""

    __slots__ = ("cacheable", "kind", "name")

    def __init__(self, name: bytes, kind: Kind) -> None:
        self.name = name
        self.kind = kind
        # A name whose values keep changing must not push the others out.
        self.cacheable = 0 if name in _SECRET else _CACHED_PER_NAME


class FieldReader:
    """Reads header sections under one set of limits. One per listener and side, shared by its connections."""

    __slots__ = ("_lines", "_names", "_sections", "max_count", "strict_te", "underscore")

    def __init__(self, max_count: int, strict_te: bool = False, underscore: str = "reject") -> None:
        """``underscore``: ``reject``, ``drop`` or ``allow`` names that contain ``_``."""
        self._lines: dict[bytes, Entry] = {}
        self._names: dict[bytes, _Name] = {}
        self._sections: dict[bytes, Section] = {}
        self.max_count = max_count
        self.strict_te = strict_te
        self.underscore = underscore

    def _line(self, line: bytes) -> Entry:
        """Read one line that is not in the cache, and keep it there if it may be kept.

        Only its characters were judged before (``_judge``).
        """
        raw, colon, value = line.partition(b":")
        known = self._names.get(raw)
        if known is None:
            known = self._name(raw, line, bool(colon))
        if not colon:
            raise MalformedError("a header line without a colon")
        entry = ((known.name, value.strip(b" \t")), known.kind)
        if known.cacheable and len(line) <= _CACHED_LINE_BYTES:
            known.cacheable -= 1
            if len(self._lines) >= _CACHED_LINES:
                self._lines.clear()
                self._names.clear()
            self._lines[line] = entry
        return entry

    def _name(self, raw: bytes, line: bytes, has_colon: bool) -> "_Name":
        """Judge a field name, and remember it: values vary, names do not."""
        if line[:1] in (b" ", b"\t"):
            raise MalformedError("a header line is folded")
        if not has_colon:
            raise MalformedError("a header line without a colon")
        if _TOKEN.fullmatch(raw) is None:
            raise MalformedError("a field name that is not a token")
        name = raw.lower()
        kind = KINDS.get(name, END_TO_END)
        if kind is END_TO_END and b"_" in name and self.underscore != "allow":
            if self.underscore == "reject":
                raise MalformedError("a field name contains an underscore")
            kind = Kind.UNDERSCORE
        known = _Name(name, kind)
        if len(raw) <= _CACHED_NAME_BYTES:
            if len(self._names) >= _CACHED_NAMES:
                self._names.clear()
            self._names[raw] = known
        return known

    @staticmethod
    def _judge(block: bytes, lines: list[bytes]) -> None:
        """No control character anywhere but HTAB, and no CR or LF but those that end the lines."""
        if len(block.translate(None, _ALLOWED)) != 2 * (len(lines) - 1):
            for line in lines:
                if b"\r" in line or b"\n" in line:
                    raise MalformedError("a bare CR or LF in the header section")
            raise MalformedError("a control character in the header section")

    def read(self, block: bytes) -> Section:
        """Read the lines between the start line and the blank line, without their last CRLF.

        Raises ``MalformedError``, ``FramingError`` or ``HeadTooLargeError``.
        """
        # fast path: another message, on whatever connection, had the same section
        section = self._sections.get(block)
        if section is not None:
            return section
        section = Section()
        if not block:
            return section
        lines = block.split(b"\r\n")
        if len(lines) > self.max_count:
            raise HeadTooLargeError(f"more than {self.max_count} header fields")
        known = self._lines
        headers: list[Field] = []
        named: set[bytes] | None = None
        is_known = True
        for line in lines:
            entry = known.get(line)
            if entry is None:
                if is_known:
                    is_known = False
                    self._judge(block, lines)
                entry = self._line(line)
            if entry[1] is END_TO_END:
                headers.append(entry[0])
            elif entry[1] is Kind.CONNECTION:
                named = self._connection(section, entry[0][1], named)
            else:
                self._take(section, entry, headers)
        if section.chunked and section.content_length is not None:
            raise FramingError("Content-Length beside Transfer-Encoding")
        if named:
            # RFC 9110 7.6.1: what Connection names belongs to this hop.
            headers = [field for field in headers if field[0] not in named]
        section.headers = tuple(headers)
        if is_known and len(block) <= _CACHED_SECTION_BYTES:
            # Seen before, line by line, and nothing secret in it: it may well come again.
            if len(self._sections) >= _CACHED_SECTIONS:
                self._sections.clear()
            self._sections[block] = section
        return section

    @staticmethod
    def _connection(section: Section, value: bytes, named: set[bytes] | None) -> set[bytes] | None:
        for option in value.lower().split(b","):
            option = option.strip(b" \t")
            if option == b"close":
                section.close = True
            elif option == b"keep-alive":
                section.keep_alive = True
            elif option == b"upgrade":
                section.wants_upgrade = True
            elif option and option != b"te":
                if named is None:
                    named = set()
                named.add(option)
        return named

    def _take(self, section: Section, entry: Entry, headers: list[Field]) -> None:
        (name, value), kind = entry
        match kind:
            case Kind.HOST:
                section.hosts += (value,)
            case Kind.CONTENT_LENGTH:
                if section.content_length is not None:
                    raise FramingError("Content-Length more than once")
                if _LENGTH.fullmatch(value) is None:
                    raise FramingError("a Content-Length that is not a plain number")
                section.content_length = int(value)
            case Kind.TRANSFER_ENCODING:
                coding = value if self.strict_te else value.lower()
                if section.chunked or coding != b"chunked":
                    raise FramingError("a Transfer-Encoding other than chunked, once")
                section.chunked = True
            case Kind.TE:
                if b"trailers" in value.lower():
                    section.accepts_trailers = True
            case Kind.EXPECT:
                # RFC 9110 10.1.1: forwarded end to end; the backend answers it.
                if value.lower() == b"100-continue":
                    section.expects_continue = True
                headers.append(entry[0])
            case Kind.UPGRADE:
                # A list over several lines is one list (RFC 9110 5.3).
                section.upgrade += b", " + value.lower() if section.upgrade else value.lower()
            case Kind.HOP:
                if name == b"keep-alive":
                    section.keep_alive_hint = value
            case _:  # an underscore under policy "drop"
                pass

    def read_trailers(self, block: bytes) -> Fields:
        """Read a trailer section (RFC 9112 7.1.2), without its last CRLF."""
        if not block:
            return NO_FIELDS
        lines = block.split(b"\r\n")
        if len(lines) > self.max_count:
            raise HeadTooLargeError(f"more than {self.max_count} trailer fields")
        self._judge(block, lines)
        fields: list[Field] = []
        for line in lines:
            field, kind = self._lines.get(line) or self._line(line)
            if field[0] in FORBIDDEN_IN_TRAILERS:
                raise TrailerError(f"{field[0].decode('latin-1')} in a trailer section")
            if kind is not Kind.UNDERSCORE:
                fields.append(field)
        return tuple(fields)


def check_authority(value: bytes) -> bytes:
    """Give the authority in lower case, or raise ``AuthorityError``. An empty one is not accepted."""
    match = _AUTHORITY.fullmatch(value)
    if match is None:
        raise AuthorityError("a malformed Host or authority")
    if value[:1] == b"[":
        try:
            IPv6Address(value[1 : value.index(b"]")].decode("ascii"))
        except ValueError:
            raise AuthorityError("brackets around what is no IPv6 address") from None
    port = match[1] or match[2]
    if port and int(port) > 65535:
        raise AuthorityError("a port above 65535")
    return value.lower()
