"""Flow control towards the peer (RFC 9000 4), by consumption: what the engine's library cannot withhold.

The library's core grants credit again as soon as it hands data over. A gateway must not: a stream whose
other side does not read has to stall its sender, that stream alone, and after a bounded number of bytes. So
the core is told that its windows never end, the peer is told what `Grants` says, and MAX_DATA and
MAX_STREAM_DATA are written here, in packets of our own: each takes a packet number, and the core is told to
go on behind it.

A packet of ours that is lost is not sent again by the core. The limits in it are absolute, so sending the
newest again is always right, and whoever is blocked gets it: on STREAM_DATA_BLOCKED and DATA_BLOCKED, which
not every peer sends, and a few times, each after twice the time, until more has come than the limit before
allowed: nothing else proves that a grant has arrived.
"""

import struct
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from qh3 import tls
from qh3._hazmat import AeadAes128Gcm, AeadAes256Gcm, AeadChaCha20Poly1305
from qh3.quic.crypto import derive_key_iv_hp
from qh3.quic.tls_bridge import QuicTlsTrafficSecret

from expressgateway.wire.quic import MAX_CID_BYTES, VERSION_2

_MAX_DATA: Final = b"\x10"
_MAX_STREAM_DATA: Final = b"\x11"
_PACKET_NUMBER_BYTES: Final = 4
_SAMPLE_BYTES: Final = 16
_CORE_NUMBER_BYTES: Final = 2  # of the packet numbers that the core writes
_RECENT: Final = 64  # numbers that the packet before may have
SHORT_HEAD_BYTES: Final = 1 + MAX_CID_BYTES + _PACKET_NUMBER_BYTES + _SAMPLE_BYTES
Aead = AeadAes128Gcm | AeadAes256Gcm | AeadChaCha20Poly1305

MAX_GRANTS: Final = 64  # in one packet: at most 17 bytes each
MAX_RENEWALS: Final = 6  # of one grant that nobody uses
NEVER: Final = float("inf")


def _aead(suite: tls.CipherSuite, key: bytes, iv: bytes) -> Aead:
    match suite:
        case tls.CipherSuite.AES_128_GCM_SHA256:
            return AeadAes128Gcm(key, iv)
        case tls.CipherSuite.AES_256_GCM_SHA384:
            return AeadAes256Gcm(key, iv)
        case _:
            return AeadChaCha20Poly1305(key, iv)


class StreamCredit:
    """What one stream's peer may send. Bytes from the beginning of the stream."""

    __slots__ = ("before", "consumed", "granted", "received", "renew_at", "renewals", "sent")

    def __init__(self, granted: int) -> None:
        self.received = 0
        self.consumed = 0
        self.granted = granted
        self.sent = granted
        """The newest limit that the peer was told."""
        self.before = granted
        """The one before: more than that has come only if the newest has arrived."""
        self.renewals = 0
        self.renew_at = NEVER


class PacketSealer:
    """Protects 1-RTT packets of ours under the keys that the core uses (RFC 9001 5)."""

    __slots__ = ("_aead", "_is_chacha", "_protection", "_secret", "_suite", "_version", "phase")

    def __init__(self, secret: QuicTlsTrafficSecret) -> None:
        self.phase = 0
        self._suite = secret.cipher_suite
        self._version = secret.version
        self._secret = secret.secret
        self._aead = _aead(secret.cipher_suite, secret.key, secret.iv)
        self._is_chacha = secret.cipher_suite == tls.CipherSuite.CHACHA20_POLY1305_SHA256
        # Header protection keys are not updated (RFC 9001 6).
        self._protection = secret.hp

    def update(self) -> None:
        """The next generation of keys (RFC 9001 6.1)."""
        label = b"tls13 " + (b"quicv2 ku" if self._version == VERSION_2 else b"quic ku")
        digest = hashes.SHA384() if len(self._secret) == 48 else hashes.SHA256()
        info = struct.pack(">HB", len(self._secret), len(label)) + label + b"\0"
        self._secret = HKDFExpand(algorithm=digest, length=len(self._secret), info=info).derive(self._secret)
        key, iv, _ = derive_key_iv_hp(cipher_suite=self._suite, secret=self._secret, version=self._version)
        self._aead = _aead(self._suite, key, iv)
        self.phase ^= 1

    def seal(self, destination: bytes, number: int, payload: bytes) -> bytes:
        """A short-header packet (RFC 9000 17.3.1) with packet number ``number``."""
        first = 0x40 | self.phase << 2 | (_PACKET_NUMBER_BYTES - 1)
        encoded = (number & 0xFFFFFFFF).to_bytes(_PACKET_NUMBER_BYTES, "big")
        header = bytes((first,)) + destination + encoded
        sealed = self._aead.encrypt(number, payload, header)
        mask = self._mask(sealed[:_SAMPLE_BYTES])
        return b"".join(
            (
                bytes((first ^ mask[0] & 0x1F,)),
                destination,
                bytes(one ^ other for one, other in zip(encoded, mask[1:], strict=False)),
                sealed,
            )
        )

    def destination_of(self, head: bytes, expected_bytes: int, next_number: int) -> bytes:
        """The connection ID in a short header that was sealed with these keys a moment ago. Its length is the
        one that makes sense of the packet's number; ``expected_bytes`` if none does."""
        for size in sorted(range(MAX_CID_BYTES + 1), key=lambda size: size != expected_bytes):
            at = 1 + size
            sample = head[at + _PACKET_NUMBER_BYTES :][:_SAMPLE_BYTES]
            if len(sample) < _SAMPLE_BYTES:
                continue
            mask = self._mask(sample)
            first = head[0] ^ mask[0] & 0x1F
            sealed = int.from_bytes(head[at : at + _CORE_NUMBER_BYTES], "big")
            number = sealed ^ int.from_bytes(mask[1 : 1 + _CORE_NUMBER_BYTES], "big")
            # No bit reserved, a number of two bytes, and which.
            if first & 0x1B == _CORE_NUMBER_BYTES - 1 and (next_number - 1 - number & 0xFFFF) < _RECENT:
                return head[1:at]
        return head[1 : 1 + max(expected_bytes, 0)]

    def _mask(self, sample: bytes) -> bytes:
        """RFC 9001 5.4.3 and 5.4.4. The sample begins four bytes behind the packet number's first."""
        if self._is_chacha:
            stream = Cipher(algorithms.ChaCha20(self._protection, sample), mode=None).encryptor()
            return stream.update(bytes(5))
        block = Cipher(algorithms.AES(self._protection), modes.ECB()).encryptor()
        return block.update(sample)[:5]


class Credit:
    """Both levels of flow control for what one connection's peer sends."""

    __slots__ = (
        "_connection",
        "_connection_bytes",
        "_due",
        "_first_bytes",
        "_is_connection_due",
        "_opener",
        "_stream_bytes",
        "_streams",
        "_unproved",
        "renew_at",
    )

    def __init__(
        self, stream_bytes: int, connection_bytes: int, first_bytes: int = 0, *, is_client: bool = False
    ) -> None:
        """``first_bytes``: what a stream that the peer opens begins with, if not with ``stream_bytes``.
        ``is_client``: we are."""
        self._stream_bytes = stream_bytes
        self._first_bytes = first_bytes or stream_bytes
        self._opener = int(is_client)  # the lowest bit of the IDs of streams that the peer opens
        self._connection_bytes = connection_bytes
        self._connection = StreamCredit(connection_bytes)
        self._streams: dict[int, StreamCredit] = {}  # as many as may be open
        self._is_connection_due = False
        self._due: dict[int, StreamCredit] = {}  # of these
        self._unproved: dict[int, StreamCredit] = {}  # of these: may have to be told again
        self.renew_at = NEVER
        """When ``renew_lost`` is due, or before."""

    @property
    def is_due(self) -> bool:
        """Whether there is something to send."""
        return self._is_connection_due or bool(self._due)

    def receive(self, stream_id: int, size: int, end: bool) -> bool:
        """Data has come, in order. False: more than was granted (RFC 9000 4.1)."""
        connection = self._connection
        connection.received += size
        stream = self._streams.get(stream_id)
        if stream is None:
            if end:
                # fast path: all of a stream at once
                return size <= self._first_of(stream_id) and connection.received <= connection.granted
            stream = self._streams[stream_id] = StreamCredit(self._first_of(stream_id))
        stream.received += size
        if end:
            self.forget(stream_id)
        return stream.received <= stream.granted and connection.received <= connection.granted

    def reset(self, stream_id: int, final_bytes: int) -> bool:
        """The peer gave the stream up at ``final_bytes``: what it never sent counts all the same (RFC 9000
        4.5). False as above."""
        stream = self._streams.get(stream_id)
        self.forget(stream_id)
        received = stream.received if stream is not None else 0
        unsent = max(0, final_bytes - received)
        self._connection.received += unsent
        self._consume_connection(unsent)
        granted = stream.granted if stream is not None else self._first_of(stream_id)
        return final_bytes <= granted and self._connection.received <= self._connection.granted

    def _first_of(self, stream_id: int) -> int:
        return self._first_bytes if stream_id & 1 == self._opener else self._stream_bytes

    def forget(self, stream_id: int) -> None:
        """Nothing more comes on the stream."""
        if self._streams.pop(stream_id, None) is not None:
            self._due.pop(stream_id, None)
            self._unproved.pop(stream_id, None)

    def consume(self, stream_id: int, size: int) -> None:
        """That many bytes were used, in whatever order of streams."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.consumed += size
            if _extend(stream, self._stream_bytes):
                self._due[stream_id] = stream
        self._consume_connection(size)

    def hold(self, size: int) -> None:
        """That many bytes wait where they do not count against the connection's window; negative: they do
        again. What was granted is not taken back."""
        self._consume_connection(size)

    def _consume_connection(self, size: int) -> None:
        connection = self._connection
        connection.consumed += size
        if _extend(connection, self._connection_bytes):
            self._is_connection_due = True

    def renew(self, stream_id: int | None) -> None:
        """The peer says that it is blocked, by a stream's limit or (``None``) by the connection's: the grant
        may have been lost."""
        if stream_id is None:
            self._is_connection_due = True
            return
        stream = self._streams.get(stream_id)
        if stream is not None and stream.sent != stream.before:
            self._due[stream_id] = stream

    def renew_lost(self, now: float) -> None:
        """Tell limits again that may not have arrived."""
        self.renew_at = NEVER
        if self._is_lost(self._connection, now):
            self._is_connection_due = True
        over = []
        for stream_id, stream in self._unproved.items():
            if self._is_lost(stream, now):
                self._due[stream_id] = stream
            elif stream.renew_at == NEVER:
                over.append(stream_id)
        for stream_id in over:
            del self._unproved[stream_id]

    def _is_lost(self, credit: StreamCredit, now: float) -> bool:
        if credit.renew_at > now:
            self.renew_at = min(self.renew_at, credit.renew_at)
            return False
        credit.renew_at = NEVER
        if credit.received > credit.before or credit.renewals >= MAX_RENEWALS:
            return False
        credit.renewals += 1
        return True

    def frames(self, now: float, patience_s: float) -> bytes:
        """MAX_DATA and MAX_STREAM_DATA frames that are due (RFC 9000 19.9, 19.10), at most ``MAX_GRANTS``.
        They are renewed after ``patience_s`` for the first time."""
        pieces = []
        if self._is_connection_due:
            self._is_connection_due = False
            pieces.append(_MAX_DATA + varint(self._tell(self._connection, now, patience_s)))
        due = self._due
        while due and len(pieces) < MAX_GRANTS:
            stream_id, stream = due.popitem()
            self._unproved[stream_id] = stream
            limit = self._tell(stream, now, patience_s)
            pieces.append(_MAX_STREAM_DATA + varint(stream_id) + varint(limit))
        return b"".join(pieces)

    def _tell(self, credit: StreamCredit, now: float, patience_s: float) -> int:
        if credit.sent != credit.granted:
            credit.before = credit.sent
            credit.sent = credit.granted
            credit.renewals = 0
        credit.renew_at = now + patience_s * (1 << credit.renewals)
        self.renew_at = min(self.renew_at, credit.renew_at)
        return credit.granted


def _extend(credit: StreamCredit, window: int) -> bool:
    """Grant a whole window again when the peer may have used half of it."""
    if credit.granted - credit.received > window // 2:
        return False
    granted = credit.consumed + window
    if granted <= credit.granted:
        return False
    credit.granted = granted
    return True


def varint(value: int) -> bytes:
    """RFC 9000 16."""
    if value < 0x40:
        return bytes((value,))
    if value < 0x4000:
        return (value | 0x4000).to_bytes(2, "big")
    if value < 0x4000_0000:
        return (value | 0x8000_0000).to_bytes(4, "big")
    return (value | 0xC000_0000_0000_0000).to_bytes(8, "big")
