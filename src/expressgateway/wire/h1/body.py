"""Reading message bodies (RFC 9112 6, 7): by length, in chunks, or to the end of the connection.

A body reader is fed what follows the head and gives its payload to two callables; it tells how many bytes
it did not need, so that what follows the message stays with the connection.
"""

import re
from collections.abc import Callable
from typing import Final, Protocol

from expressgateway.wire.errors import FramingError, HeadTooLargeError
from expressgateway.wire.h1.fields import FieldReader
from expressgateway.wire.head import Fields

# chunk-size [ chunk-ext ]: RFC 9112 7.1. Sizes are bounded so that no reader can overflow; extensions must
# be well-formed and are dropped (7.1.1).
_CHUNK_LINE: Final = re.compile(
    rb"([0-9A-Fa-f]{1,15})"
    rb"(?:;[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
    rb"(?:=(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+|\"(?:[\t \x21\x23-\x5b\x5d-\x7e]|\\[\t \x21-\x7e])*\"))?)*"
)
MAX_CHUNK_LINE: Final = 256  # bytes; a size needs 15, the rest is for extensions nobody uses
MAX_TRAILER_BYTES: Final = 16384  # bytes of one trailer section

OnData = Callable[[bytes, bool], None]
OnTrailers = Callable[[Fields], None]


def last_chunk(fields: Fields) -> bytes:
    """The end of a chunked body: the last chunk, the trailer section, the blank line (RFC 9112 7.1)."""
    return b"".join([b"0\r\n", *(name + b": " + value + b"\r\n" for name, value in fields), b"\r\n"])


class BodyReader(Protocol):
    """``feed`` gives what is left over once the body has ended, or ``None`` while it goes on."""

    def feed(self, data: bytes) -> bytes | None: ...


class LengthReader:
    """Exactly ``length`` bytes."""

    __slots__ = ("left", "on_data")

    def __init__(self, length: int, on_data: OnData) -> None:
        self.left = length
        self.on_data = on_data

    def feed(self, data: bytes) -> bytes | None:
        size = len(data)
        left = self.left
        if size < left:
            self.left = left - size
            self.on_data(data, False)
            return None
        self.left = 0
        if size == left:
            self.on_data(data, True)
            return b""
        self.on_data(data[:left], True)
        return data[left:]


class CloseReader:
    """Everything until the peer closes. Only a response may end so (RFC 9112 6.3)."""

    __slots__ = ("on_data",)

    def __init__(self, on_data: OnData) -> None:
        self.on_data = on_data

    def feed(self, data: bytes) -> bytes | None:
        self.on_data(data, False)
        return None


class ChunkReader:
    """The chunked coding, strictly: every size line, every CRLF, the trailer section."""

    __slots__ = ("_held", "_left", "_step", "fields", "on_data", "on_trailers")

    def __init__(self, on_data: OnData, on_trailers: OnTrailers, fields: FieldReader) -> None:
        self.on_data = on_data
        self.on_trailers = on_trailers
        self.fields = fields
        self._held = b""  # at most one size line, or one trailer section
        self._left = 0  # bytes of the current chunk still to come, its CRLF not counted
        self._step: Callable[[bytes, int], int] = self._size

    def feed(self, data: bytes) -> bytes | None:
        if self._held:
            data = self._held + data
            self._held = b""
        at = 0
        end = len(data)
        while at < end:
            step = self._step
            after = step(data, at)
            if after < 0:  # needs more of what is at ``at``
                self._held = data[at:] if at else data
                return None
            at = after
            if step == self._trailers:
                return data[at:]
        return None

    # Each step gives the position after what it took, or -1 for "need more".

    def _size(self, data: bytes, at: int) -> int:
        eol = data.find(b"\r\n", at, at + MAX_CHUNK_LINE + 2)
        if eol < 0:
            if len(data) - at > MAX_CHUNK_LINE + 1 or b"\n" in data[at : at + MAX_CHUNK_LINE]:
                raise FramingError("a bad chunk size line")
            return -1
        match = _CHUNK_LINE.fullmatch(data, at, eol)
        if match is None:
            raise FramingError("a bad chunk size line")
        self._left = int(match[1], 16)
        self._step = self._data if self._left else self._trailers
        if not self._left:
            # The CRLF of the last chunk's line may be the first half of the blank line.
            return eol
        return eol + 2

    def _data(self, data: bytes, at: int) -> int:
        have = len(data) - at
        left = self._left
        if have < left:
            self._left = left - have
            self.on_data(data[at:] if at else data, False)
            return len(data)
        self.on_data(data[at : at + left], False)
        self._left = 0
        self._step = self._crlf
        return at + left

    def _crlf(self, data: bytes, at: int) -> int:
        if data[at] != 0x0D:
            raise FramingError("a chunk that is longer than its size")
        if len(data) - at < 2:
            return -1
        if data[at + 1] != 0x0A:
            raise FramingError("a chunk that is longer than its size")
        self._step = self._size
        return at + 2

    def _trailers(self, data: bytes, at: int) -> int:
        # ``at`` stands on the CRLF that ends the last chunk's line; a blank line ends the section.
        end = data.find(b"\r\n\r\n", at)
        if (end if end >= 0 else len(data)) - at > MAX_TRAILER_BYTES:
            raise HeadTooLargeError(f"a trailer section of more than {MAX_TRAILER_BYTES} bytes")
        if end < 0:
            return -1
        fields = self.fields.read_trailers(data[at + 2 : end]) if end > at else ()
        if fields:
            self.on_trailers(fields)
        else:
            self.on_data(b"", True)
        return end + 4
