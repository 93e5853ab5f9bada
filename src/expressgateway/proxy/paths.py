"""Request paths: what is refused, and the normalised copy that matching uses (RFC 3986 6.2.2).

The path that is forwarded is the client's, byte for byte. Only the copy is decoded and flattened: dot
segments are resolved, ``%2f`` is never taken for a slash.
"""

import re
from typing import Final

_ESCAPE: Final = re.compile(rb"%(?:([0-9A-Fa-f]{2})|)")
# unreserved characters: RFC 3986 2.3. Decoding anything else could change the meaning.
_UNRESERVED: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


class PathError(ValueError):
    """A path that is refused with 400. The message says why."""


def normalise(path: bytes) -> bytes:
    """Give the matching copy of a target's path, without its query. Raises ``PathError``."""
    path = path.partition(b"?")[0]
    if b"%" in path:
        path = _ESCAPE.sub(_unescape, path)
    if b"/." in path:
        path = _flatten(path)
    return path


def _unescape(match: re.Match[bytes]) -> bytes:
    digits = match[1]
    if digits is None:
        raise PathError("a percent sign that escapes nothing")
    value = int(digits, 16)
    if value == 0:
        raise PathError("an escaped NUL")
    return bytes((value,)) if value in _UNRESERVED else match[0].upper()


def _flatten(path: bytes) -> bytes:
    kept: list[bytes] = []
    segments = path.split(b"/")[1:]
    for segment in segments:
        if segment == b"..":
            if not kept:
                raise PathError("a path that climbs above the root")
            kept.pop()
        elif segment != b".":
            kept.append(segment)
    if segments and segments[-1] in (b".", b".."):
        kept.append(b"")
    return b"/" + b"/".join(kept)
