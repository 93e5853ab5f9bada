"""The part of a QUIC packet that anybody can read (RFC 8999), and the packets that anybody can write.

Who routes packets without keys reads no more than this: the version and both connection IDs of a long header,
the destination connection ID of a short one, whose length only its owner knows. Of the versions known here, 1
(RFC 9000) and 2 (RFC 9369), also the type of a long header and the token of an Initial.

Datagrams are cut into packets by whoever has the keys; here a datagram is known by its first packet, for all
packets of one datagram belong to one connection (RFC 9000 12.2).
"""

import hmac
import struct
from hashlib import sha256
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

VERSION_1: Final = 1
VERSION_2: Final = 0x6B3343CF
KNOWN_VERSIONS: Final = (VERSION_1, VERSION_2)

MAX_CID_BYTES: Final = 20  # in the versions known here (RFC 9000 17.2); another version's may have 255
MIN_INITIAL_BYTES: Final = 1200  # of a datagram with a client's Initial (RFC 9000 14.1)
MIN_CLIENT_DCID_BYTES: Final = 8  # chosen by a client for its first packet (RFC 9000 7.2)
MIN_RESET_BYTES: Final = 21  # of a stateless reset (RFC 9000 10.3)
RESET_TOKEN_BYTES: Final = 16
RETRY_TAG_BYTES: Final = 16

INITIAL: Final = 0
ZERO_RTT: Final = 1
HANDSHAKE: Final = 2
RETRY: Final = 3
UNKNOWN: Final = -1
"""The type of a packet of a version not known here, or of a Version Negotiation packet."""

_LONG: Final = 0x80
_FIXED: Final = 0x40
_VERSION: Final = struct.Struct(">I")

# RFC 9369 3.2: version 2 rotates the codes.
_TYPES: Final[dict[int, tuple[int, ...]]] = {
    VERSION_1: (INITIAL, ZERO_RTT, HANDSHAKE, RETRY),
    VERSION_2: (RETRY, INITIAL, ZERO_RTT, HANDSHAKE),
}

# RFC 9001 5.8 and RFC 9369 3.3.3: keys that are no secret; the tag proves that the sender saw the Initial.
_RETRY_TAGS: Final = {
    VERSION_1: (
        AESGCM(bytes.fromhex("be0c690b9f66575a1d766b54e368c84e")),
        bytes.fromhex("461599d35d632bf2239825bb"),
    ),
    VERSION_2: (
        AESGCM(bytes.fromhex("8fb4b01b56ac48e260fbcbcead7ccc92")),
        bytes.fromhex("d86969bc2d7c6d9990efb04a"),
    ),
}


class LongHeader:
    """What a long header says (RFC 8999 5.1). ``version`` 0 is Version Negotiation."""

    __slots__ = ("destination", "end", "source", "type", "version")

    def __init__(self, version: int, kind: int, destination: bytes, source: bytes, end: int) -> None:
        self.version = version
        self.type = kind
        """INITIAL to RETRY, or UNKNOWN."""
        self.destination = destination
        self.source = source
        self.end = end
        """Where the source connection ID ends: what follows belongs to the version."""

    def __repr__(self) -> str:
        return f"<LongHeader v{self.version:#x} type={self.type} to {self.destination.hex()}>"


def read_long(packet: bytes) -> LongHeader | None:
    """The long header at the beginning of a datagram; ``None`` if it is cut short or breaks its version's
    rules (the fixed bit, connection IDs of at most 20 bytes: RFC 9000 17.2)."""
    if len(packet) < 7 or packet[0] < _LONG:
        return None
    (version,) = _VERSION.unpack_from(packet, 1)
    size = packet[5]
    at = 6 + size
    if at >= len(packet):
        return None
    destination = packet[6:at]
    end = at + 1 + packet[at]
    if end > len(packet):
        return None
    kind = UNKNOWN
    types = _TYPES.get(version)
    if types is not None:
        if not packet[0] & _FIXED or size > MAX_CID_BYTES or packet[at] > MAX_CID_BYTES:
            return None
        kind = types[packet[0] >> 4 & 0b11]
    return LongHeader(version, kind, destination, packet[at + 1 : end], end)


def token_of(packet: bytes, header: LongHeader) -> bytes | None:
    """The token of an Initial packet (RFC 9000 17.2.2), mostly empty; ``None`` if it is cut short."""
    at = header.end
    if at >= len(packet):
        return None
    size, at = _read_varint(packet, at)
    if at < 0 or at + size > len(packet):
        return None
    return packet[at : at + size]


def payload_of(packet: bytes, header: LongHeader) -> tuple[int, int]:
    """Where the packet number of an Initial begins, behind token and length, and where the packet ends; the
    latter is -1 if it is cut short."""
    at = header.end
    if at >= len(packet):
        return 0, -1
    size, at = _read_varint(packet, at)
    at += size
    if at < size or at >= len(packet):
        return 0, -1
    size, at = _read_varint(packet, at)
    end = at + size
    return at, end if at >= 0 and end <= len(packet) else -1


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A variable-length integer (RFC 9000 16) and where it ends; the end is -1 if it is cut short."""
    first = data[at]
    end = at + (1 << (first >> 6))
    if end > len(data):
        return 0, -1
    return int.from_bytes(data[at:end], "big") & ((1 << (8 * (end - at) - 2)) - 1), end


def version_negotiation(header: LongHeader, versions: tuple[int, ...], first_byte: int) -> bytes:
    """The answer to a client's packet of a version that is not offered (RFC 8999 6). ``first_byte`` is
    arbitrary: its seven lower bits are not to be relied on."""
    return b"".join(
        (
            bytes((_LONG | _FIXED | first_byte & 0x3F,)),
            bytes(4),
            bytes((len(header.source),)),
            header.source,
            bytes((len(header.destination),)),
            header.destination,
            *(_VERSION.pack(version) for version in versions),
        )
    )


def retry(header: LongHeader, source: bytes, token: bytes) -> bytes:
    """A Retry in answer to an Initial (RFC 9000 17.2.5): the client is to come again, to ``source``, with
    ``token``. The version is one of those known here."""
    kind = _TYPES[header.version].index(RETRY)
    packet = b"".join(
        (
            bytes((_LONG | _FIXED | kind << 4,)),
            _VERSION.pack(header.version),
            bytes((len(header.source),)),
            header.source,
            bytes((len(source),)),
            source,
            token,
        )
    )
    return packet + _retry_tag(header.version, header.destination, packet)


def is_genuine_retry(packet: bytes, header: LongHeader, original: bytes) -> bool:
    """Whether a Retry's tag is that of one who saw our Initial, which went to ``original`` (RFC 9001 5.8)."""
    size = len(packet) - RETRY_TAG_BYTES
    return size >= header.end and hmac.compare_digest(
        packet[size:], _retry_tag(header.version, original, packet[:size])
    )


def _retry_tag(version: int, original: bytes, packet: bytes) -> bytes:
    aead, nonce = _RETRY_TAGS[version]
    return aead.encrypt(nonce, b"", bytes((len(original),)) + original + packet)


def reset_token(secret: bytes, cid: bytes) -> bytes:
    """The stateless reset token of a connection ID (RFC 9000 10.3.2): whoever has the secret can end the
    connection, also after it was forgotten."""
    return hmac.new(secret, b"stateless reset" + cid, sha256).digest()[:RESET_TOKEN_BYTES]


def stateless_reset(token: bytes, received_bytes: int, padding: bytes) -> bytes:
    """A stateless reset (RFC 9000 10.3) for a packet of ``received_bytes``, or nothing where that was too
    short: it is always shorter than what it answers, or two endpoints could answer each other for ever.
    ``padding``: random, at least 43 bytes."""
    size = min(received_bytes - 1, 42)
    if size < MIN_RESET_BYTES:
        return b""
    unpredictable = size - RESET_TOKEN_BYTES
    return bytes((_FIXED | padding[0] & 0x3F,)) + padding[1:unpredictable] + token
