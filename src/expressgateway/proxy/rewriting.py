"""What a route changes in what passes, and what it answers by itself.

Introduces ``Rewrite`` (the target and the host), ``HeaderEdits`` (the fields of one direction), ``Redirect``
and ``Respond`` (answers without a backend). All are compiled once and never changed, but for the memory of
``HeaderEdits``. They know no exchange: who calls them, and when, is its business.

A path is forwarded byte for byte as far as possible. But a path with dot segments means something else once
its beginning is changed - ``/api/../x`` without ``/api`` would climb - so that one is rewritten in its
normalised form, which has none; and so is one that begins with the prefix only after it is normalised.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final

from expressgateway.wire.head import NO_FIELDS, Field, Fields, RequestHead, SharedFields

_DOT_SEGMENT: Final = re.compile(rb"/(?:\.|%2[eE]){1,2}(?:[/?]|\Z)")
_KEPT: Final = 32  # sections and what was made of them; starts afresh when full
_KEPT_BYTES: Final = 2048  # of values; longer sections do not come again as the same object
# Values that must not outlive their exchange: sections with these are not kept.
_SECRET: Final = frozenset({b"authorization", b"cookie", b"set-cookie"})
_PLACEHOLDER: Final = re.compile(r"\{([a-z]+)\}")
_SLASHES: Final = re.compile(rb"[/\\]+")

Answer = tuple[int, Fields, bytes]
"""Status, fields of its own, and body."""


class Rewrite:
    """Changes to a request's target and host."""

    __slots__ = ("_add", "_path", "_strip", "_strip_is_open", "host")

    def __init__(
        self,
        *,
        host: str | None = None,
        path: str | None = None,
        strip_prefix: str | None = None,
        add_prefix: str | None = None,
    ) -> None:
        """``path`` replaces the whole path; or else ``strip_prefix`` is taken away, then ``add_prefix`` put
        before. The query stays. ``strip_prefix`` is in normalised form."""
        self.host = host.lower().encode("ascii") if host is not None else None
        """The new authority, or None."""
        self._path = path.encode("ascii") if path is not None else None
        self._strip = strip_prefix.rstrip("/").encode("ascii") if strip_prefix is not None else b""
        self._strip_is_open = strip_prefix is None or not strip_prefix.endswith("/")
        self._add = add_prefix.rstrip("/").encode("ascii") if add_prefix is not None else b""

    def target(self, target: bytes, path: bytes) -> bytes:
        """The new target. ``target``: as the client sent it; ``path``: its path in normalised form.

        Always begins with a slash, but for ``*``, which stays what it is (RFC 9110 9.3.7).
        """
        if target[:1] != b"/":
            return target
        raw, mark, query = target.partition(b"?")
        if self._path is not None:
            return self._path + mark + query
        if self._strip or self._add:
            has_dots = _DOT_SEGMENT.search(raw) is not None
            rest = None if has_dots else self._stripped(raw)
            if rest is None:
                rest = self._stripped(path)
            if rest is None:
                rest = path if has_dots else raw
            raw = self._add + rest
        return raw + mark + query

    def _stripped(self, path: bytes) -> bytes | None:
        """The path without the prefix, which ends where a segment ends; None if it does not begin with it."""
        strip = self._strip
        if not strip:
            return path
        if path.startswith(strip):
            rest = path[len(strip) :]
            if rest[:1] == b"/":
                return rest
            if not rest and self._strip_is_open:
                return b"/"
        return None


class HeaderEdits:
    """Changes to the fields of one direction: fields are removed, then set, then added.

    Sections come again, and then as the very same object; what was made of them is kept, so that whoever
    looks up more by identity finds the same object again, too.
    """

    __slots__ = ("_dropped", "_kept", "_kept_shared", "_more")

    def __init__(
        self,
        *,
        set: Mapping[str, str] | None = None,  # noqa: A002 - as the key is called
        add: Mapping[str, str] | None = None,
        remove: Iterable[str] = (),
    ) -> None:
        replaced = _fields(set)
        self._dropped = frozenset(name.lower().encode("ascii") for name in remove) | {n for n, _ in replaced}
        self._more = replaced + _fields(add)
        self._kept: dict[int, tuple[Fields, Fields]] = {}
        self._kept_shared: dict[int, tuple[SharedFields, SharedFields]] = {}

    def fields(self, fields: Fields) -> Fields:
        """The fields after the changes; the same object for the same object, while it is remembered."""
        kept = self._kept.get(id(fields))
        if kept is not None and kept[0] is fields:
            return kept[1]
        edited = self._edited(fields)
        if _may_be_kept(fields):
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            # The section is kept with its id, so that no other can come to have it.
            self._kept[id(fields)] = (fields, edited)
        return edited

    def shared(self, shared: SharedFields) -> SharedFields:
        """The same for fields that many messages have in common."""
        kept = self._kept_shared.get(id(shared))
        if kept is not None and kept[0] is shared:
            return kept[1]
        edited = SharedFields(self._edited(shared.fields))
        if _may_be_kept(shared.fields):
            if len(self._kept_shared) >= _KEPT:
                self._kept_shared.clear()
            self._kept_shared[id(shared)] = (shared, edited)
        return edited

    def _edited(self, fields: Fields) -> Fields:
        dropped = self._dropped
        return (*(field for field in fields if field[0] not in dropped), *self._more)


def _fields(values: Mapping[str, str] | None) -> Fields:
    return tuple((n.lower().encode("ascii"), v.encode("ascii")) for n, v in (values or {}).items())


def _may_be_kept(fields: Fields) -> bool:
    return _SECRET.isdisjoint(dict(fields)) and sum(len(value) for _, value in fields) <= _KEPT_BYTES


class Redirect:
    """An answer that sends the client elsewhere (RFC 9110 15.4)."""

    __slots__ = ("_parts", "_status", "_wants_host")

    def __init__(self, to: str, status: int = 302) -> None:
        """``to`` may hold ``{scheme}``, ``{host}``, ``{path}`` and ``{query}``. Raises ``ValueError``."""
        self._status = status
        parts = _PLACEHOLDER.split(to)  # text, name, text, name ... text
        if unknown := set(parts[1::2]) - {"scheme", "host", "path", "query"}:
            raise ValueError(f"no such placeholder: {', '.join(sorted(unknown))}")
        self._wants_host = "host" in parts[1::2]
        self._parts = tuple((text.encode("ascii"), number % 2 == 1) for number, text in enumerate(parts))

    def answer(self, head: RequestHead) -> Answer | None:
        """None if the place cannot be told: it has the client's host in it, and the client named none."""
        if self._wants_host and not head.authority:
            return None
        location = b""
        for text, is_placeholder in self._parts:
            if not is_placeholder:
                location += text
            elif text == b"scheme":
                location += head.scheme
            elif text == b"host":
                location += _host(head.authority)
            else:
                path, mark, query = head.path.partition(b"?")
                if text == b"query":
                    location += mark + query
                else:
                    location += _path_behind(location, path)
        return self._status, ((b"location", location),), b""


def _host(authority: bytes) -> bytes:
    """The authority without its port."""
    host, bracket, _ = authority.partition(b"]")
    return host + bracket if bracket else host.partition(b":")[0]


def _path_behind(location: bytes, path: bytes) -> bytes:
    if path[:1] != b"/":
        return b"/"
    # A reference that begins with two slashes names a host (RFC 3986 4.2), and browsers take a backslash for
    # a slash: the client's path must not choose where the client goes.
    if not location or location.endswith(b":"):
        return _SLASHES.sub(b"/", path, count=1)
    if location.endswith((b"/", b"\\")):
        return path.lstrip(b"/\\")
    return path


class Respond:
    """An answer with a text of its own."""

    __slots__ = ("_answer",)

    def __init__(self, status: int, body: str = "", content_type: str = "text/plain; charset=utf-8") -> None:
        fields: tuple[Field, ...] = ((b"content-type", content_type.encode("ascii")),) if body else NO_FIELDS
        self._answer: Answer = (status, fields, body.encode("utf-8"))

    def answer(self, _: RequestHead) -> Answer:
        return self._answer
