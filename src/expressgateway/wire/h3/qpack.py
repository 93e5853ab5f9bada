"""The one door to QPACK (RFC 9204): an encoder and a decoder over somebody else's tables and codes.

Two libraries wrap the same coder, ls-qpack, and either can do without the other. Blocks are decoded by
``pylsqpack``, which takes any bytes for a value (RFC 9110 5.5); ``qh3`` takes UTF-8 only. Blocks are
encoded by what is inside ``qh3``, which can be told to use less of a table than the peer allows; it is
private to that package, so nothing else may know of it. Whatever a library raises leaves here as one of
three: it cannot be decoded, it must wait, it is too large.

Neither library knows of fields that must never be indexed (RFC 9204 7.1.3). So ``walk`` finds what the
peer has marked, and what is to be marked is written here, into the block that the library made of the
rest.

A block that begins with a zero byte has a Required Insert Count of zero (4.5.1.1): it refers to no dynamic
table, and means the same whenever it is read.
"""

from typing import Any, Final, Protocol

from expressgateway.wire.h2.hpack import OversizedError, Triple, beginning, list_bytes

try:
    from qh3 import _hazmat as qh3
except ImportError:  # no wheel for this platform, or another shape
    qh3 = None  # type: ignore[assignment]
try:
    import pylsqpack
except ImportError:
    pylsqpack = None  # type: ignore[assignment]

__all__ = ["BlockedError", "OversizedError", "QpackDecoder", "QpackEncoder", "QpackError", "Triple"]

HAS_QH3: Final = qh3 is not None
HAS_LSQPACK: Final = pylsqpack is not None
MAX_LINES: Final = 1024
"""Of a block that is decoded at all: with the largest entries of a table of 4 KiB they are 4 MiB."""

MAX_KNOWN: Final = 16  # lists of fields whose block is kept ...
KNOWN_BYTES: Final = 1024  # ... which is no longer than this

Pairs = list[tuple[bytes, bytes]]

_ORPHANS: Final = 4  # times the streams that may wait: those that were given up while they waited
_MOST_TABLE_BYTES: Final = 65_536  # of an encoder that uses all of it
_MAX_SHIFT: Final = 28  # of an integer's last byte; none that is larger can be meant well

# RFC 9204 A: names of fields that we mark, and where they stand.
_STATIC: Final = {
    b":path": 1,
    b"age": 2,
    b"content-length": 4,
    b"cookie": 5,
    b"etag": 7,
    b"if-modified-since": 8,
    b"if-none-match": 9,
    b"location": 12,
    b"set-cookie": 14,
    b"authorization": 84,
    b"forwarded": 88,
    b"x-forwarded-for": 96,
}


class QpackError(Exception):
    """What the peer sent is not QPACK, or not of this connection's table."""


class BlockedError(Exception):
    """The block refers to insertions that have not come yet (RFC 9204 2.1.2): ``resume`` after them."""


# -- walking over a block ------------------------------------------------------------------------------


def _skip(block: bytes, at: int) -> int:
    """Give what follows an integer whose prefix was full (RFC 7541 5.1)."""
    end = at + _MAX_SHIFT // 7
    while block[at] >= 0x80:
        at += 1
        if at > end:
            raise QpackError("an integer of too many bytes")
    return at + 1


def _after_string(block: bytes, at: int, mask: int) -> int:
    """Give what follows a string whose length has the bits of ``mask`` in its first byte."""
    length = block[at] & mask
    at += 1
    if length == mask:
        shift = 0
        while True:
            octet = block[at]
            at += 1
            length += (octet & 0x7F) << shift
            if octet < 0x80:
                break
            shift += 7
            if shift > _MAX_SHIFT:
                raise QpackError("an integer of too many bytes")
    return at + length


def _line_end(block: bytes, at: int) -> int:
    """Give where the field line ends that begins here (RFC 9204 4.5)."""
    first = block[at]
    if first >= 0x80:  # indexed
        return at + 1 if first & 0x3F != 0x3F else _skip(block, at + 1)
    if first >= 0x40:  # literal with a name's index
        at = at + 1 if first & 0x0F != 0x0F else _skip(block, at + 1)
        return _after_string(block, at, 0x7F)
    if first >= 0x20:  # literal with its name
        return _after_string(block, _after_string(block, at, 0x07), 0x7F)
    if first >= 0x10:  # indexed, behind the base
        return at + 1 if first & 0x0F != 0x0F else _skip(block, at + 1)
    at = at + 1 if first & 0x07 != 0x07 else _skip(block, at + 1)
    return _after_string(block, at, 0x7F)


def _prefix_end(block: bytes) -> int:
    """Give where the first field line begins (RFC 9204 4.5.1)."""
    at = 1 if block[0] != 0xFF else _skip(block, 1)
    return at + 1 if block[at] & 0x7F != 0x7F else _skip(block, at + 1)


def walk(block: bytes) -> tuple[int, list[int]]:
    """Give how many lines a block has, and which of them must never be indexed. Raises ``QpackError``."""
    marked: list[int] = []
    number = 0
    size = len(block)
    try:
        at = _prefix_end(block)
        while at < size:
            first = block[at]
            if first >= 0xC0 and first != 0xFF:
                # fast path: a field of the static table
                at += 1
            else:
                if first < 0x80 and first & (
                    0x20 if first >= 0x40 else 0x10 if first >= 0x20 else 0 if first >= 0x10 else 0x08
                ):
                    marked.append(number)
                at = _line_end(block, at)
            number += 1
    except IndexError:
        at = size + 1
    if at != size:
        raise QpackError("a header block that ends inside a field")
    return number, marked


# -- the libraries -------------------------------------------------------------------------------------


class _Library(Protocol):
    """Raises the errors above."""

    def feed(self, data: bytes) -> None: ...
    def decode(self, stream_id: int, block: bytes) -> tuple[bytes, Pairs]: ...
    def resume(self, stream_id: int) -> tuple[bytes, Pairs]: ...
    def cancel(self, stream_id: int) -> bytes: ...


class _Lsqpack:
    __slots__ = ("_decoder", "_ready")

    def __init__(self, table_bytes: int, max_blocked: int, max_list_bytes: int) -> None:
        self._decoder = pylsqpack.Decoder(table_bytes, max_blocked + 1)  # the last one is for the connection
        self._ready: set[int] = set()  # streams whose insertions have come: at most those that may wait

    def feed(self, data: bytes) -> None:
        try:
            self._ready.update(self._decoder.feed_encoder(data))
        except Exception as error:  # noqa: BLE001 - whatever it is, the table is lost
            raise QpackError(str(error)) from None

    def decode(self, stream_id: int, block: bytes) -> tuple[bytes, Pairs]:
        try:
            result: tuple[bytes, Pairs] = self._decoder.feed_header(stream_id, block)
        except pylsqpack.StreamBlocked:
            raise BlockedError from None
        except Exception as error:  # noqa: BLE001 - as above
            raise QpackError(str(error)) from None
        return result

    def resume(self, stream_id: int) -> tuple[bytes, Pairs]:
        if stream_id not in self._ready:
            raise BlockedError
        self._ready.discard(stream_id)
        try:
            result: tuple[bytes, Pairs] = self._decoder.resume_header(stream_id)
        except Exception as error:  # noqa: BLE001 - as above
            raise QpackError(str(error)) from None
        return result

    def cancel(self, stream_id: int) -> bytes:
        self._ready.discard(stream_id)
        try:
            said: bytes = self._decoder.cancel_stream(stream_id)
        except Exception:  # noqa: BLE001 - it does not know the stream
            said = _number(0x40, 0x3F, stream_id)
        return said


class _Qh3:
    """It has no call to give a block up, so that those which wait and are not wanted stay until they can be
    read. And it takes what is not UTF-8 for an error."""

    __slots__ = ("_decoder", "_orphans", "_waiting")

    def __init__(self, table_bytes: int, max_blocked: int, max_list_bytes: int) -> None:
        self._decoder = qh3.QpackDecoder(
            table_bytes, max_blocked * _ORPHANS, max_field_section_size=max_list_bytes
        )
        self._waiting: set[int] = set()  # at most those that may
        self._orphans: set[int] = set()  # at _ORPHANS times as many the library gives up

    def feed(self, data: bytes) -> None:
        try:
            self._decoder.feed_encoder(data)
        except Exception as error:  # noqa: BLE001 - as above
            raise QpackError(str(error)) from None
        for stream_id in list(self._orphans):
            try:
                self._decoder.resume_header(stream_id)  # so that it is forgotten; nobody acknowledges it
            except qh3.StreamBlocked:
                continue
            except Exception:  # noqa: BLE001 - it is not wanted
                pass
            self._orphans.discard(stream_id)

    def decode(self, stream_id: int, block: bytes) -> tuple[bytes, Pairs]:
        try:
            return self._decoder.feed_header(stream_id, block)
        except qh3.StreamBlocked:
            self._waiting.add(stream_id)
            raise BlockedError from None
        except qh3.HeaderTooLarge:
            raise OversizedError([]) from None
        except Exception as error:  # noqa: BLE001 - as above
            raise QpackError(str(error)) from None

    def resume(self, stream_id: int) -> tuple[bytes, Pairs]:
        try:
            result = self._decoder.resume_header(stream_id)
        except qh3.StreamBlocked:
            raise BlockedError from None
        except qh3.HeaderTooLarge:
            self._waiting.discard(stream_id)
            raise OversizedError([]) from None
        except Exception as error:  # noqa: BLE001 - as above
            raise QpackError(str(error)) from None
        self._waiting.discard(stream_id)
        return result

    def cancel(self, stream_id: int) -> bytes:
        if stream_id in self._waiting:
            self._waiting.discard(stream_id)
            self._orphans.add(stream_id)
        return _number(0x40, 0x3F, stream_id)


class QpackDecoder:
    """One connection's decoder. What is to be said on its decoder stream is in ``out``."""

    __slots__ = ("_library", "_marked", "_max_list_bytes", "has_insertions", "out")

    def __init__(
        self, table_bytes: int, max_blocked: int, max_list_bytes: int, with_lsqpack: bool = HAS_LSQPACK
    ) -> None:
        self._library: _Library = (_Lsqpack if with_lsqpack else _Qh3)(
            table_bytes, max_blocked, max_list_bytes
        )
        self._max_list_bytes = max_list_bytes
        self._marked: dict[int, list[int]] = {}  # of blocks that wait: at most as many as may
        self.has_insertions = False
        """Whether the peer uses its table: only then it must hear of blocks that were not read."""
        self.out = b""

    def feed(self, data: bytes) -> None:
        """Bytes of the peer's encoder stream. Raises ``QpackError``."""
        self.has_insertions = True
        self._library.feed(data)

    def decode(self, stream_id: int, block: bytes) -> list[Triple]:
        """Give a block's fields. Raises ``QpackError``, ``BlockedError``, or ``OversizedError``: then the
        table is right, and the connection can go on."""
        lines, marked = walk(block)
        if not lines and not block[0]:
            return []  # an empty section; the libraries refuse it
        if lines > MAX_LINES:
            # Each may stand for as much as the table holds, and is counted only when it is there.
            self.cancel(stream_id)
            raise OversizedError([])
        try:
            said, pairs = self._library.decode(stream_id, block)
        except BlockedError:
            self._marked[stream_id] = marked
            raise
        except OversizedError:
            self.cancel(stream_id)
            raise
        return self._triples(said, pairs, marked)

    def resume(self, stream_id: int) -> list[Triple]:
        """Likewise for a block that had to wait."""
        try:
            said, pairs = self._library.resume(stream_id)
        except OversizedError:
            del self._marked[stream_id]
            self.cancel(stream_id)
            raise
        return self._triples(said, pairs, self._marked.pop(stream_id))

    def _triples(self, said: bytes, pairs: Pairs, marked: list[int]) -> list[Triple]:
        if said:
            self.out += said
        triples: list[Triple] = [(name, value, False) for name, value in pairs]
        for number in marked:
            name, value, _ = triples[number]
            triples[number] = (name, value, True)
        if list_bytes(triples) > self._max_list_bytes:
            raise OversizedError(beginning(triples, self._max_list_bytes))
        return triples

    def acknowledge(self, stream_id: int, block: bytes) -> None:
        """A block's meaning was known without decoding it (RFC 9204 4.4.1). It is the same as long as nothing
        was inserted since."""
        if block[0]:
            self.out += _number(0x80, 0x7F, stream_id)

    def cancel(self, stream_id: int) -> None:
        """A stream is given up: its blocks are not read (RFC 9204 2.2.2.2, 4.4.2)."""
        if self.has_insertions or stream_id in self._marked:
            self._marked.pop(stream_id, None)
            self.out += self._library.cancel(stream_id)


class QpackEncoder:
    """One connection's encoder."""

    __slots__ = ("_known", "_library", "_with_qh3")

    _library: Any

    def __init__(self, with_qh3: bool = HAS_QH3) -> None:
        self._with_qh3 = with_qh3
        self._known: dict[tuple[tuple[bytes, bytes], ...], bytes] = {}  # at most MAX_KNOWN
        self._library = qh3.QpackEncoder() if with_qh3 else pylsqpack.Encoder()

    def apply(self, table_bytes: int, peer_table_bytes: int, blocked: int) -> bytes:
        """The peer's SETTINGS have come. Give what is to be said on the encoder stream.

        ``peer_table_bytes`` is its maximum, of which ``table_bytes`` are used.
        """
        if self._with_qh3:
            said: bytes = self._library.apply_settings(peer_table_bytes, table_bytes, blocked)
        elif peer_table_bytes <= _MOST_TABLE_BYTES:
            # It uses all of the maximum, which blocks are encoded by (RFC 9204 4.5.1.1).
            said = self._library.apply_settings(peer_table_bytes, blocked)
        else:
            said = b""
        return said

    def encode(self, stream_id: int, fields: list[Triple]) -> tuple[bytes, bytes]:
        """Give what is to be said on the encoder stream before, and the block."""
        plain = tuple([(name, value) for name, value, is_secret in fields if not is_secret])
        # fast path: what differs between messages is marked, often; equal fields are equal blocks, as long as
        # those refer to no table
        block = self._known.get(plain, b"")
        if block:
            return b"", block if len(plain) == len(fields) else _with_marked(block, fields, len(plain))
        try:
            said, block = self._library.encode(stream_id, list(plain))
        except Exception:  # noqa: BLE001 - what is not UTF-8, or very long: without the library, then
            return b"", b"\0\0" + b"".join(_line(name, value, is_secret) for name, value, is_secret in fields)
        if not said and not block[0] and len(block) <= KNOWN_BYTES:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[plain] = block
        if len(plain) != len(fields):
            block = _with_marked(block, fields, len(plain))
        return said, block

    def feed(self, data: bytes) -> None:
        """Bytes of the peer's decoder stream. Raises ``QpackError``."""
        try:
            self._library.feed_decoder(data)
        except Exception as error:  # noqa: BLE001 - as above
            raise QpackError(str(error)) from None


def _with_marked(block: bytes, fields: list[Triple], left: int) -> bytes:
    """Add the fields that are marked to a block of the ``left`` others, in their order. None of its lines
    depends on where it stands; :path may come before the other pseudo-header fields."""
    at = _prefix_end(block)
    pieces = [block[:at]]
    run = front = 0
    for name, value, is_marked in fields:
        if not is_marked:
            run += 1
            continue
        if name == b":path":
            front += 1
            pieces.insert(front, _marked_line(name, value))
            continue
        if run == left:
            # fast path: the rest of the block, nearly always
            end = len(block)
        else:
            end = at
            for _ in range(run):
                end = _line_end(block, end)
        pieces.append(block[at:end])
        pieces.append(_marked_line(name, value))
        at = end
        left -= run
        run = 0
    pieces.append(block[at:])
    return b"".join(pieces)


def _number(first: int, mask: int, number: int) -> bytes:
    """An integer whose first byte has room for ``mask`` (RFC 7541 5.1)."""
    if number < mask:
        return bytes((first | number,))
    out = bytearray((first | mask,))
    number -= mask
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


# RFC 9204 4.5.4, with N and T.
_INDEXED: Final = {name: _number(0x70, 0x0F, index) for name, index in _STATIC.items()}


def _marked_line(name: bytes, value: bytes) -> bytes:
    """A literal that must never be indexed (RFC 9204 4.5.4, 4.5.6), not Huffman coded."""
    head = _INDEXED.get(name)
    if head is None:
        head = _number(0x30, 0x07, len(name)) + name
    return head + _number(0, 0x7F, len(value)) + value


def _line(name: bytes, value: bytes, is_marked: bool) -> bytes:
    """A literal, whichever way."""
    if is_marked:
        return _marked_line(name, value)
    return _number(0x20, 0x07, len(name)) + name + _number(0, 0x7F, len(value)) + value
