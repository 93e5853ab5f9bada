"""Server ids in connection IDs, as QUIC-LB has it (draft-ietf-quic-load-balancers-21).

A backend that was given a *server id* puts it, in the clear or encrypted, into every connection ID it issues.
Whoever has the same configuration reads it: on any worker, on any gateway, without having seen the connection
before. A connection ID is *routable* if its first octet names this configuration and its own length (section
3), and if the server id in it is somebody's (section 4.1); the last is the caller's to find out.

The length is always the one that the first octet tells (3.3, "Length Self-Description"): a short header does
not say how long its connection ID is.
"""

from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

MIN_NONCE_BYTES: Final = 4  # 5.3
MAX_PLAINTEXT_BYTES: Final = 19  # 5.3: server id and nonce
KEY_BYTES: Final = 16
UNROUTABLE_FIRST: Final = 0b111 << 5  # 3.2: the first octet of connection IDs that carry no server id

_SINGLE_PASS_BYTES: Final = 16  # 5.4.1
_LENGTH: Final = 0b11111


class ServerIds:
    """Reads server ids by one configuration."""

    __slots__ = ("_config_bits", "_decrypt", "_encrypt", "_least", "length")

    def __init__(self, config_id: int, length: int, key: bytes | None) -> None:
        """``config_id``: 0 to 6; ``length``: of a server id, 1 to 15 bytes; ``key``: 16 bytes, or ``None``
        for server ids in the clear."""
        self.length = length
        self._config_bits = config_id
        self._least = length + MIN_NONCE_BYTES
        self._encrypt = self._decrypt = None
        if key is not None:
            # ECB keeps nothing from one block to the next: one context does for all connection IDs.
            cipher = Cipher(algorithms.AES128(key), modes.ECB())
            self._encrypt = cipher.encryptor()
            self._decrypt = cipher.decryptor()

    def cid_bytes(self, first: int) -> int:
        """How long a connection ID with this first octet is; 0 if it is not of this configuration."""
        size = first & _LENGTH
        if first >> 5 != self._config_bits or size < self._least or size > MAX_PLAINTEXT_BYTES:
            return 0
        return 1 + size

    def read(self, cid: bytes) -> bytes | None:
        """The server id in a connection ID; ``None`` if it is not of this configuration. Of a random one
        whose first octet fits it gives something random."""
        size = len(cid) - 1
        if size < 0 or self.cid_bytes(cid[0]) != size + 1:
            return None
        if self._encrypt is None or self._decrypt is None:
            return cid[1 : 1 + self.length]
        if size == _SINGLE_PASS_BYTES:
            return self._decrypt.update(cid[1:])[: self.length]
        return self._four_passes(cid[1:])[: self.length]

    def _four_passes(self, text: bytes) -> bytes:
        """5.5.2, with all four: server ids that are longer than the nonce need the last one."""
        size = len(text)
        half = (size + 1) // 2
        bits = 8 * half
        # An odd length is cut in the middle of an octet: the left half has four bits of nothing at its end,
        # the right one at its beginning.
        left_mask = right_mask = (1 << bits) - 1
        if size % 2:
            left_mask -= 0xF
            right_mask >>= 4
        left = int.from_bytes(text[:half], "big") & left_mask
        right = int.from_bytes(text[size - half :], "big") & right_mask
        left ^= self._round(right, half, size, 4) & left_mask
        right ^= self._round(left, half, size, 3) & right_mask
        left ^= self._round(right, half, size, 2) & left_mask
        right ^= self._round(left, half, size, 1) & right_mask
        if size % 2:
            return (left << (bits - 8) | right).to_bytes(size, "big")
        return (left << bits | right).to_bytes(size, "big")

    def _round(self, value: int, half: int, size: int, number: int) -> int:
        block = value.to_bytes(half, "big") + bytes(14 - half) + bytes((size, number))
        encrypt = self._encrypt
        assert encrypt is not None
        return int.from_bytes(encrypt.update(block)[:half], "big")
