"""Clients without a connection ID of their own: Chromium, which knows its connections by their ports.

The library's core takes an empty ID for one that it has not learnt yet, and goes on sending to the ID that
the client made up for its first packets, which the client drops. So such a client's core is told the empty ID
from the beginning, and is given what it would have made of the client's ID: the Initial keys, which are no
secret (RFC 9001 5.2). A core also drops what does not come to an ID that it knows. The client's Initials come
to the ID that it made up until it has heard of ours: they are sealed anew here, to ours, one or two per
connection.
"""

from typing import Final

from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from qh3 import tls
from qh3._hazmat import AeadAes128Gcm, CryptoError, QuicConnectionCore
from qh3.quic.crypto import CIPHER_SUITES, derive_key_iv_hp

from expressgateway.wire.quic import INITIAL, VERSION_1, VERSION_2, payload_of, read_long

# RFC 9001 5.2 and RFC 9369 3.3.1.
_SALTS: Final = {
    VERSION_1: bytes.fromhex("38762cf7f55934b34d179ae6a4c80cadccbb7f0a"),
    VERSION_2: bytes.fromhex("0dede3def700a6db819381be6e269dcbf9bd2ed9"),
}
_SUITE: Final = tls.CipherSuite.AES_128_GCM_SHA256
_SECRET_BYTES: Final = 32
_SAMPLE_BYTES: Final = 16
_MAX_NUMBER_BYTES: Final = 4


class UnnamedClient:
    """One such client's handshake, at the server. ``chosen``: the ID that its first packets come to;
    ``ours``: the one that it is to use."""

    __slots__ = ("_chosen", "_largest", "_ours")

    def __init__(self, chosen: bytes, ours: bytes) -> None:
        self._chosen = chosen
        self._ours = ours
        self._largest = -1  # packet number of what was sealed anew

    def _secrets(self, version: int) -> tuple[bytes, bytes]:
        """The client's and the server's."""
        extract = hmac.HMAC(_SALTS[version], hashes.SHA256())
        extract.update(self._chosen)
        initial = extract.finalize()
        algorithm = tls.cipher_suite_hash(_SUITE)
        return (
            tls.hkdf_expand_label(algorithm, initial, b"client in", b"", _SECRET_BYTES),
            tls.hkdf_expand_label(algorithm, initial, b"server in", b"", _SECRET_BYTES),
        )

    def install(self, core: QuicConnectionCore, version: int) -> None:
        """Give the core its Initial keys; again whenever its version was changed."""
        protection, aead = CIPHER_SUITES[_SUITE]
        for direction, secret in zip(("receive", "send"), self._secrets(version), strict=True):
            key, iv, hp = derive_key_iv_hp(cipher_suite=_SUITE, secret=secret, version=version)
            core.install_packet_key(
                direction,
                int(tls.Epoch.INITIAL),
                (aead.decode(), protection.decode()),
                key,
                iv,
                hp,
                0,
                secret,
                version,
            )

    def readdressed(self, packet: bytes) -> bytes:
        """A packet as the core can take it: an Initial to the client's ID as one to ours; whatever else it
        is, or if it is not genuine, as it came."""
        header = read_long(packet)
        if header is None or header.type != INITIAL or header.destination != self._chosen:
            return packet
        at, behind = payload_of(packet, header)
        if behind < at + _MAX_NUMBER_BYTES + _SAMPLE_BYTES:
            return packet
        secret = self._secrets(header.version)[0]
        key, iv, hp = derive_key_iv_hp(cipher_suite=_SUITE, secret=secret, version=header.version)
        mask = _mask(hp, packet[at + _MAX_NUMBER_BYTES : at + _MAX_NUMBER_BYTES + _SAMPLE_BYTES])
        first = packet[0] ^ mask[0] & 0x0F
        size = (first & 0x03) + 1
        number = bytes(one ^ other for one, other in zip(packet[at : at + size], mask[1:], strict=False))
        end = at + size
        full = full_number(int.from_bytes(number, "big"), 8 * size, self._largest + 1)
        aead = AeadAes128Gcm(key, iv)
        try:
            plain = aead.decrypt(full, packet[end:behind], bytes((first,)) + packet[1:at] + number)
        except CryptoError:
            return packet
        self._largest = max(self._largest, full)
        between = packet[1:5] + bytes((len(self._ours),)) + self._ours + packet[6 + len(self._chosen) : at]
        sealed = aead.encrypt(full, plain, bytes((first,)) + between + number)
        mask = _mask(hp, sealed[_MAX_NUMBER_BYTES - size :][:_SAMPLE_BYTES])
        hidden = bytes(one ^ other for one, other in zip(number, mask[1:], strict=False))
        return bytes((first ^ mask[0] & 0x0F,)) + between + hidden + sealed + packet[behind:]


def _mask(hp: bytes, sample: bytes) -> bytes:
    """RFC 9001 5.4.3."""
    block = Cipher(algorithms.AES(hp), modes.ECB()).encryptor()  # as the RFC has it
    return block.update(sample)[:5]


def full_number(truncated: int, bits: int, expected: int) -> int:
    """A packet number from its lower bits (RFC 9000 A.3)."""
    window = 1 << bits
    candidate = expected & ~(window - 1) | truncated
    if candidate <= expected - window // 2 and candidate < (1 << 62) - window:
        return candidate + window
    if candidate > expected + window // 2 and candidate >= window:
        return candidate - window
    return candidate
