"""The one door to HPACK (RFC 7541): two classes with two methods over somebody else's tables and codes.

The Rust coder inside ``jh2`` is private to that package, so nothing else may know of it; where it is missing
or has changed its shape, the Python package ``hpack`` does the same, slower.

Neither is given a block that was not walked before: ``walk`` finds where each field ends. That is
what lets a block with a bomb in it be decoded in slices, keeping the table right and the memory small; it
finds what the Rust decoder does not refuse (an update of the table's size behind a field, RFC 7541 4.2;
Huffman padding that is not made of ones, 5.2) and what makes it panic (a block that ends inside a number).
"""

from collections.abc import Callable
from typing import Final, Protocol

import hpack
from hpack.exceptions import HPACKError as PythonError
from hpack.huffman_constants import REQUEST_CODES_LENGTH

try:
    from jh2 import _hazmat as rust  # type: ignore[import-untyped]  # no marker in the package
except ImportError:  # no wheel for this platform, or another shape
    rust = None

IS_NATIVE: Final = rust is not None
TABLE_BYTES: Final = 4096
"""Each direction's dynamic table: the RFC's initial value, never raised."""
FIELD_BYTES: Final = 32
"""What a field counts beside its bytes (RFC 9113 6.5.2)."""

Triple = tuple[bytes, bytes, bool]
"""Name, value, and whether it must never be put into a table (RFC 7541 7.1.3)."""

_PLAIN: Final = bytes(range(0x81, 0xFF))  # an indexed field in one byte
_PLAIN_FIELDS: Final = 64  # of them in a block that is decoded without a walk: 264 KB at the worst
_SLICE_BYTES: Final = 262_144  # what one slice of a block may decode to, at the worst
_STATIC: Final = 61
_STATIC_BYTES: Final = 64  # more than any of its entries counts
_MAX_INTEGER: Final = 2**24  # a length or an index; none that is larger can be meant well
_NO_LIMIT: Final = 2**31  # the libraries' own limits would lose the table's state

# Bits of each byte's Huffman code (RFC 7541 B), to tell padding from code.
_HUFFMAN_BITS: Final = bytes(REQUEST_CODES_LENGTH[:256])
_LETTERS: Final = tuple(
    (width, bytes(each for each in range(256) if _HUFFMAN_BITS[each] == width)) for width in (5, 6, 7, 8)
)
_LONG_TEXT: Final = 24


class HpackError(Exception):
    """The block cannot be decoded, or must not be: COMPRESSION_ERROR for the connection (RFC 9113 4.3)."""


class OversizedError(Exception):
    """The list is longer than was allowed. The table is right: the connection can go on.

    ``fields``: those of its beginning that are within the limit.
    """

    def __init__(self, fields: "list[Triple]") -> None:
        super().__init__(f"more than {len(fields)} fields")
        self.fields = fields


class Walk:
    """What a walk over a block found."""

    __slots__ = ("changes", "coded", "cuts", "list_bytes")

    def __init__(self) -> None:
        self.changes = False
        """Whether decoding changes the table."""
        self.list_bytes = 0
        """What it decodes to is counted as this at the most."""
        self.cuts: list[tuple[int, bool]] = []
        """Ends of slices, none of which decodes to more than about ``_SLICE_BYTES``, and whether each
        changes the table."""
        self.coded: list[tuple[int, int, int, int, int]] = []
        """Huffman strings whose padding must be judged: slice, field in it, 0 or 1 for name or value, start
        and end."""


def _integer(block: bytes, at: int, mask: int) -> tuple[int, int]:
    """Read a number (RFC 7541 5.1) whose prefix has the bits of ``mask``. Give it, and what follows."""
    number = block[at] & mask
    at += 1
    if number != mask:
        return number, at
    shift = 0
    while True:
        octet = block[at]
        at += 1
        number += (octet & 0x7F) << shift
        if octet < 0x80:
            break
        shift += 7
        if shift > 28:
            raise HpackError("a number of too many bytes")
    if number > _MAX_INTEGER:
        raise HpackError("a number too large")
    return number, at


def walk(block: bytes) -> Walk:
    """Walk over a header block. Raises ``HpackError`` where it is not one."""
    try:
        return _walk(block)
    except IndexError:
        raise HpackError("a header block that ends inside a field") from None


def _walk(block: bytes) -> Walk:
    found = Walk()
    at = weight = fields = 0
    has_field = changes = False
    size = len(block)
    while at < size:
        if weight > _SLICE_BYTES:
            found.cuts.append((at, changes))
            found.changes |= changes
            found.list_bytes += weight
            weight = fields = 0
            changes = False
        first = block[at]
        if first >= 0x80:
            if first & 0x7F == 0x7F:
                number, at = _integer(block, at, 0x7F)
            else:
                number = first & 0x7F
                at += 1
            weight += TABLE_BYTES if number > _STATIC else _STATIC_BYTES
        elif 0x20 <= first < 0x40:
            if has_field:
                raise HpackError("an update of the table's size behind a field")
            changes = True
            at = _integer(block, at, 0x1F)[1]
            continue
        else:
            if first >= 0x40:
                changes = True
                number, at = _integer(block, at, 0x3F)
            else:
                number, at = _integer(block, at, 0x0F)
            start = at
            if number == 0:
                at = _string(block, at, found, fields, 0)
            at = _string(block, at, found, fields, 1)
            weight += (TABLE_BYTES if number > _STATIC else _STATIC_BYTES) + 2 * (at - start)
        has_field = True
        fields += 1
    found.cuts.append((size, changes))
    found.changes |= changes
    found.list_bytes += weight
    return found


def changes_table(block: bytes) -> bool:
    """Whether a sound block changes the table: if not, it means the same when it is sent once more."""
    return bool(block.translate(None, _PLAIN)) and walk(block).changes


def _string(block: bytes, at: int, found: Walk, field: int, part: int) -> int:
    """Walk over a string (RFC 7541 5.2). Give what follows."""
    is_coded = block[at] & 0x80
    length, at = _integer(block, at, 0x7F)
    end = at + length
    if end > len(block):
        raise HpackError("a string longer than its header block")
    # Seven ones at the end are padding or the end of a code; either is right.
    if is_coded and length and block[end - 1] & 0x7F != 0x7F:
        found.coded.append((len(found.cuts), field, part, at, end))
    return end


def _code_bits(text: bytes) -> int:
    """Bits of a string's Huffman code."""
    size = len(text)
    if size > _LONG_TEXT:
        # fast path: what headers are made of has codes of 5 to 8 bits, and translate() counts in C
        counted = bits = 0
        for width, letters in _LETTERS:
            number = size - len(text.translate(None, letters))
            counted += number
            bits += number * width
        if counted == size:
            return bits
    return sum(text.translate(_HUFFMAN_BITS))


def _check_padding(block: bytes, start: int, end: int, text: bytes) -> None:
    """RFC 7541 5.2: padding is the most significant bits of EOS, all ones, and shorter than a byte."""
    padding = 8 * (end - start) - _code_bits(text)
    if not 0 <= padding < 8 or ~block[end - 1] & ((1 << padding) - 1):
        raise HpackError("a Huffman string that is not padded with ones")


class _Library(Protocol):
    """A decoder that knows the tables: raises ``HpackError``."""

    def fields_of(self, block: bytes) -> list[Triple]: ...


class _Rust:
    __slots__ = ("_decoder",)

    def __init__(self) -> None:
        self._decoder = rust.Decoder(_NO_LIMIT)

    def fields_of(self, block: bytes) -> list[Triple]:
        try:
            fields: list[Triple] = self._decoder.decode(block, True)
        except rust.HPACKError as error:
            raise HpackError(str(error)) from None
        return fields


class _Python:
    __slots__ = ("_decoder",)

    def __init__(self) -> None:
        self._decoder = hpack.Decoder(_NO_LIMIT)

    def fields_of(self, block: bytes) -> list[Triple]:
        try:
            headers = self._decoder.decode(block, raw=True)
        except PythonError as error:
            raise HpackError(str(error)) from None
        return [(bytes(each[0]), bytes(each[1]), not each.indexable) for each in headers]


class HpackDecoder:
    """One direction's decoder. After ``decode``, ``has_changed`` says whether the table is another one."""

    __slots__ = ("_library", "has_changed")

    def __init__(self, is_native: bool = IS_NATIVE) -> None:
        self._library: _Library = _Rust() if is_native else _Python()
        self.has_changed = False

    def decode(self, block: bytes, max_list_bytes: int) -> list[Triple]:
        """Give a block's fields. Raises ``HpackError``, or ``OversizedError`` with the table kept right.

        Never holds more than ``max_list_bytes`` and one slice of a list.
        """
        library = self._library
        if len(block) <= _PLAIN_FIELDS and not block.translate(None, _PLAIN):
            # fast path: nothing but indexed fields, and not many
            self.has_changed = False
            fields = library.fields_of(block)
            if len(block) * TABLE_BYTES > max_list_bytes and list_bytes(fields) > max_list_bytes:
                raise OversizedError(beginning(fields, max_list_bytes))
            return fields
        found = walk(block)
        self.has_changed = found.changes
        if found.list_bytes <= max_list_bytes and len(found.cuts) == 1:
            # fast path: no need to count
            fields = library.fields_of(block)
            for _, field, side, at, to in found.coded:
                name, value, _ = fields[field]
                _check_padding(block, at, to, value if side else name)
            return fields
        return self._decode_slices(block, max_list_bytes, found)

    def _decode_slices(self, block: bytes, max_list_bytes: int, found: Walk) -> list[Triple]:
        fields: list[Triple] = []
        total = start = 0
        for number, (end, changes) in enumerate(found.cuts):
            if total > max_list_bytes and not changes:
                start = end
                continue  # nothing to keep, nothing to learn
            part = self._library.fields_of(block[start:end])
            for each, field, side, at, to in found.coded:
                if each == number:
                    name, value, _ = part[field]
                    _check_padding(block, at, to, value if side else name)
            start = end
            if total <= max_list_bytes:
                fields += beginning(part, max_list_bytes - total)
            total += list_bytes(part)
        if total > max_list_bytes:
            raise OversizedError(fields)
        return fields


def beginning(fields: list[Triple], max_list_bytes: int) -> list[Triple]:
    """As many as are within the limit."""
    for at, (name, value, _) in enumerate(fields):
        max_list_bytes -= FIELD_BYTES + len(name) + len(value)
        if max_list_bytes < 0:
            return fields[:at]
    return fields


def list_bytes(fields: list[Triple]) -> int:
    """What a list counts (RFC 9113 6.5.2)."""
    total = FIELD_BYTES * len(fields)
    for name, value, _ in fields:
        total += len(name) + len(value)
    return total


class HpackEncoder:
    """One direction's encoder."""

    __slots__ = ("_library", "_resizes", "_table_bytes", "encode")

    def __init__(self, is_native: bool = IS_NATIVE) -> None:
        self._library = rust.Encoder() if is_native else hpack.Encoder()
        self._table_bytes = TABLE_BYTES
        self._resizes: list[int] = []  # the smallest and the last size since the last block
        self.encode: Callable[[list[Triple]], bytes] = self._library.encode
        """``encode(list of triples) -> block``; as an attribute, for one call less per head."""

    def set_table_bytes(self, table_bytes: int) -> None:
        """The peer's SETTINGS_HEADER_TABLE_SIZE; we use no more than the initial size.

        Told with the next block: the smallest size since the last one, then the last (RFC 7541 4.2). The
        libraries would tell every size, the ones that are allowed no more included.
        """
        size = min(table_bytes, TABLE_BYTES)
        smallest = min(size, *self._resizes) if self._resizes else size
        self._resizes = [smallest, size]
        self.encode = self._encode_resized

    def _encode_resized(self, fields: list[Triple]) -> bytes:
        for size in self._resizes:
            if size != self._table_bytes:
                self._table_bytes = size
                self._library.header_table_size = size
        self._resizes = []
        self.encode = self._library.encode
        return self.encode(fields)
