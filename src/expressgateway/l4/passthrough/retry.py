"""Retry by the gateway (RFC 9000 8.1.2), and the token in it: docs/quic-passthrough.md has its format.

A client that comes without a token is told to come again with one, and nothing is remembered of it: who never
receives what is sent to its address never makes a flow. The token proves the address to us. It carries what
the *backend* needs to know: the client compares the connection IDs before and after the Retry with the
backend's transport parameters (7.3), so only a backend that reads this token can be behind such a gateway.

All workers, and all gateways with the same secret, read each other's tokens, also after a restart.
"""

import os
import socket
import struct
from collections.abc import Callable
from enum import Enum
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

MAGIC: Final = b"EGR1"
LIFE_MS: Final = 30_000  # between the Retry and what the client answers: a few round trips, some lost
SKEW_MS: Final = 5_000  # what the clocks of two gateways may differ

_INFO: Final = b"expressgateway retry token 1"
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_TIME: Final = struct.Struct(">Q")
_PORT: Final = struct.Struct(">H")
_CID_BYTES: Final = 8  # of the connection ID that the client is to use until the backend's comes

Address = tuple[str, int] | tuple[str, int, int, int]


class Verdict(Enum):
    FOREIGN = "foreign"
    """Not minted by us: the backend's business."""
    VALID = "valid"
    STALE = "stale"
    """Minted by us, for another client, connection or time."""


class RetryTokens:
    """Mints and checks tokens under one secret."""

    __slots__ = ("_aead", "_clock_ms")

    def __init__(self, secret: bytes, clock_ms: Callable[[], int]) -> None:
        """``clock_ms``: milliseconds since 1970."""
        key = HKDF(algorithm=SHA256(), length=16, salt=None, info=_INFO).derive(secret)
        self._aead = AESGCM(key)
        self._clock_ms = clock_ms

    def mint(self, address: Address, original: bytes, source: bytes) -> bytes:
        """For a client at ``address`` that came to ``original`` and is to come again to ``source``."""
        plain = b"".join(
            (
                _TIME.pack(self._clock_ms()),
                _packed(address),
                bytes((len(original),)),
                original,
                bytes((len(source),)),
                source,
            )
        )
        nonce = os.urandom(_NONCE_BYTES)
        return MAGIC + nonce + self._aead.encrypt(nonce, plain, MAGIC)

    def check(self, token: bytes, address: Address, destination: bytes) -> Verdict:
        """What to think of a token that came from ``address`` in a packet to ``destination``."""
        if not token.startswith(MAGIC) or len(token) < len(MAGIC) + _NONCE_BYTES + _TAG_BYTES:
            return Verdict.FOREIGN
        at = len(MAGIC) + _NONCE_BYTES
        try:
            plain = self._aead.decrypt(token[len(MAGIC) : at], token[at:], MAGIC)
        except InvalidTag:
            return Verdict.FOREIGN
        # What decrypts was written by ``mint``: nothing in it needs to be doubted.
        age_ms = self._clock_ms() - _TIME.unpack_from(plain)[0]
        expected = _packed(address)
        end = _TIME.size + len(expected)
        if not -SKEW_MS <= age_ms <= LIFE_MS or plain[_TIME.size : end] != expected:
            return Verdict.STALE
        source = plain[end + 1 + plain[end] :]
        return Verdict.VALID if source[1:] == destination else Verdict.STALE


def retry_cid() -> bytes:
    """A connection ID for a Retry: random, and no server id by any configuration of QUIC-LB, in which it
    tells its own length as all such do (draft-ietf-quic-load-balancers-21, 3.2)."""
    return bytes((0b111 << 5 | _CID_BYTES - 1,)) + os.urandom(_CID_BYTES - 1)


def _packed(address: Address) -> bytes:
    """Family, address and port; an IPv4 address that came through an IPv6 socket is one of IPv4."""
    ip = address[0]
    if ":" in ip:
        packed = socket.inet_pton(socket.AF_INET6, ip.partition("%")[0])
        if packed[:12] != bytes(10) + b"\xff\xff":
            return b"\x06" + packed + _PORT.pack(address[1])
        packed = packed[12:]
    else:
        packed = socket.inet_pton(socket.AF_INET, ip)
    return b"\x04" + packed + _PORT.pack(address[1])
