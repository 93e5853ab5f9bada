"""A backend that issues connection IDs with its server id in them, written after docs/quic-passthrough.md.

It knows nothing of the gateway's code: the encoding is done here once more.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from aioquic.quic.connection import QuicConnection, QuicConnectionId
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioquic.asyncio.protocol import QuicConnectionProtocol


class Issuer:
    """Makes connection IDs by one configuration."""

    def __init__(self, config_id: int, server_id: bytes, nonce_bytes: int, key: bytes | None) -> None:
        self.config_id = config_id
        self.server_id = server_id
        self.nonce_bytes = nonce_bytes
        self._key = key

    @property
    def cid_bytes(self) -> int:
        return 1 + len(self.server_id) + self.nonce_bytes

    def issue(self, nonce: bytes | None = None) -> bytes:
        text = self.server_id + (os.urandom(self.nonce_bytes) if nonce is None else nonce)
        first = self.config_id << 5 | len(text)
        if self._key is None:
            return bytes((first,)) + text
        if len(text) == 16:
            return bytes((first,)) + self._aes(text)
        return bytes((first,)) + self._four_passes(text)

    def _aes(self, block: bytes) -> bytes:
        assert self._key is not None
        return Cipher(algorithms.AES(self._key), modes.ECB()).encryptor().update(block)

    def _four_passes(self, text: bytes) -> bytes:
        """By nibbles, so that no half has to be masked."""
        nibbles = text.hex()
        left, right = nibbles[: len(nibbles) // 2], nibbles[len(nibbles) // 2 :]
        for number in (1, 2, 3, 4):
            if number % 2:
                right = self._mix(right, left + "0" * (len(left) % 2), len(text), number, is_right=True)
            else:
                left = self._mix(left, "0" * (len(right) % 2) + right, len(text), number, is_right=False)
        return bytes.fromhex(left + right)

    def _mix(self, half: str, other: str, size: int, number: int, *, is_right: bool) -> str:
        block = bytes.fromhex(other).ljust(14, b"\0") + bytes((size, number))
        mask = self._aes(block).hex()
        skipped = len(half) % 2 if is_right else 0
        mask = mask[skipped : skipped + len(half)]
        return f"{int(half, 16) ^ int(mask, 16):0{len(half)}x}"


def issuing(issuer: Issuer) -> Callable[[QuicConnectionProtocol], None]:
    """For a server's ``make_connection``: all connection IDs, also those of NEW_CONNECTION_ID, are ours."""

    def make(protocol: QuicConnectionProtocol) -> None:
        quic = protocol._quic
        quic.__class__ = IssuingConnection
        assert isinstance(quic, IssuingConnection)
        quic.issuer = issuer
        first = issuer.issue()
        quic._host_cids[0].cid = first
        quic.host_cid = first
        quic._local_initial_source_connection_id = first

    return make


class IssuingConnection(QuicConnection):
    issuer: Issuer

    def _replenish_connection_ids(self) -> None:
        while len(self._host_cids) < min(8, self._remote_active_connection_id_limit):
            self._host_cids.append(
                QuicConnectionId(
                    cid=self.issuer.issue(),
                    sequence_number=self._host_cid_seq,
                    stateless_reset_token=os.urandom(16),
                )
            )
            self._host_cid_seq += 1
