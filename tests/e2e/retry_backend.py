"""A backend that reads the gateway's Retry tokens, written after docs/quic-passthrough.md.

It knows nothing of the gateway's code: the format is read here once more.
"""

import os
import struct
from pathlib import Path
from typing import Any

from aioquic.asyncio.server import QuicServer
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF


class TokenReader:
    """Stands where aioquic has its own tokens."""

    def __init__(self, secret: Path) -> None:
        key = HKDF(SHA256(), length=16, salt=None, info=b"expressgateway retry token 1")
        self._aead = AESGCM(key.derive(secret.read_bytes()))
        self.read: list[dict[str, Any]] = []
        self.asked_for_tokens = 0

    def create_token(self, **_: Any) -> bytes:
        """A client came without a token: behind such a gateway none does."""
        self.asked_for_tokens += 1
        return os.urandom(16)

    def validate_token(self, *, address: Any, destination_cid: bytes, token: bytes, now: float) -> bytes:
        if token[:4] != b"EGR1":
            raise ValueError("not the gateway's")
        plain = self._aead.decrypt(token[4:16], token[16:], token[:4])
        (issued_ms,) = struct.unpack_from(">Q", plain)
        at = 8 + 1 + (4 if plain[8] == 4 else 16)
        (port,) = struct.unpack_from(">H", plain, at)
        at += 2
        original = plain[at + 1 : at + 1 + plain[at]]
        at += 1 + len(original)
        source = plain[at + 1 : at + 1 + plain[at]]
        if source != destination_cid:
            raise ValueError("of another connection")
        self.read.append({"ms": issued_ms, "ip": plain[9:13], "port": port, "original": original})
        return original


def reading(reader: TokenReader) -> Any:
    """For a server's ``make_server``."""

    def make(**more: Any) -> QuicServer:
        server = QuicServer(**{**more, "retry": True})
        server._retry = reader  # type: ignore[assignment]  # it does all that is asked of one
        return server

    return make
