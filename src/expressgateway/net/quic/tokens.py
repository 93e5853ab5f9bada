"""Retry tokens: a client proves that it can be reached at its address before anything is kept for it.

A token (RFC 9000 8.1.2) holds the client's address, the time, and both connection IDs that the handshake
must confirm (7.3), sealed under a key made from the listener's secret: any worker can read it, also after a
restart. It is good for ``LIFETIME_S`` and for one connection: the worker that accepted one remembers it as
long. A client comes back with the connection ID of our Retry, which names the worker: it is the same one.

    nonce (12) | AES-128-GCM( seconds (8) | IDs' lengths (2) | original | retry | address )
"""

import os
import socket
import struct
from collections import OrderedDict
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

LIFETIME_S: Final = 30
MAX_REMEMBERED: Final = 65_536  # tokens used within their lifetime; beyond it new ones are not accepted
_SKEW_S: Final = 5  # by which another instance's clock may be ahead
_NONCE_BYTES: Final = 12
_HEAD: Final = struct.Struct(">QBB")


class BadTokenError(Exception):
    """Not a token of ours, or not this client's, or not any more. ``str()`` is a short label."""


class RetryTokens:
    """Makes and reads the tokens of one listener."""

    __slots__ = ("_aead", "_used")

    def __init__(self, secret: bytes) -> None:
        key = HKDF(algorithm=hashes.SHA256(), length=16, salt=None, info=b"expressgateway retry").derive(
            secret
        )
        self._aead = AESGCM(key)
        self._used: OrderedDict[bytes, int] = OrderedDict()  # nonces, and until when they must be known

    def make(self, address: tuple[str, int], original: bytes, retry: bytes, wall_s: int) -> bytes:
        """``wall_s``: seconds since the epoch, which restarts and instances agree on."""
        nonce = os.urandom(_NONCE_BYTES)
        plain = _HEAD.pack(wall_s, len(original), len(retry)) + original + retry + _packed(address)
        return nonce + self._aead.encrypt(nonce, plain, None)

    def read(self, token: bytes, address: tuple[str, int], retry: bytes, wall_s: int) -> bytes:
        """The original connection ID, once. Raises ``BadTokenError``."""
        nonce = token[:_NONCE_BYTES]
        try:
            plain = self._aead.decrypt(nonce, token[_NONCE_BYTES:], None)
        except (InvalidTag, ValueError):
            raise BadTokenError("foreign") from None
        made_s, original_bytes, retry_bytes = _HEAD.unpack_from(plain)
        at = _HEAD.size
        original = plain[at : at + original_bytes]
        at += original_bytes
        if plain[at : at + retry_bytes] != retry or plain[at + retry_bytes :] != _packed(address):
            raise BadTokenError("address")
        if not -_SKEW_S <= wall_s - made_s <= LIFETIME_S:
            raise BadTokenError("expired")
        self._forget(wall_s)
        if nonce in self._used or len(self._used) >= MAX_REMEMBERED:
            raise BadTokenError("replayed")
        self._used[nonce] = made_s + LIFETIME_S + _SKEW_S
        return original

    def _forget(self, wall_s: int) -> None:
        used = self._used
        while used and next(iter(used.values())) < wall_s:
            used.popitem(last=False)


def _packed(address: tuple[str, int]) -> bytes:
    """An address as bytes, the same for an IPv4 address however it was written."""
    host, port = address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return port.to_bytes(2, "big") + socket.inet_pton(family, host.partition("%")[0])
