"""What a certificate says, for people and for metrics; and when its end is worth a word.

A certificate has a *stage*: it is fine, ends SOON, is URGENT, or is OVER. The first two begin 30 and 7 days
before its end; one that lives shorter than 90 (70) days has them at a third (a tenth) of its life, for it is
renewed later too.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.x509 import Certificate

from expressgateway.config.material import certificates, names_of

DAY_S: Final = 86_400.0
SOON_S: Final = 30 * DAY_S
URGENT_S: Final = 7 * DAY_S


class Stage(IntEnum):
    FINE = 0
    SOON = 1
    URGENT = 2
    OVER = 3


@dataclass(frozen=True, slots=True)
class Facts:
    """Of the first certificate in a file. Times are seconds since 1970."""

    subject: str
    """RFC 4514; empty for one that has names only."""
    names: tuple[str, ...]
    """DNS names and addresses, lower-case."""
    issuer: str
    not_before: float
    not_after: float
    serial: str
    """Hexadecimal."""
    fingerprint: str
    """SHA-256, hexadecimal."""
    key_type: str
    """As ``ECDSA secp256r1``, ``RSA 2048``."""

    @property
    def label(self) -> str:
        """The subject, or what stands for it."""
        return self.subject or next(iter(self.names), self.fingerprint)

    def stage(self, now: float) -> Stage:
        left, life = self.not_after - now, self.not_after - self.not_before
        if left <= 0:
            return Stage.OVER
        if left < min(URGENT_S, life / 10):
            return Stage.URGENT
        return Stage.SOON if left < min(SOON_S, life / 3) else Stage.FINE


def facts_of(pem: bytes) -> Facts | None:
    """Of the first certificate in a PEM file; None: there is none that can be read."""
    found = certificates(pem)
    if not found:
        return None
    try:
        return _facts(found[0])
    except (ValueError, UnsupportedAlgorithm):
        return None


def _facts(leaf: Certificate) -> Facts:
    return Facts(
        subject=leaf.subject.rfc4514_string(),
        names=names_of(leaf) or (),
        issuer=leaf.issuer.rfc4514_string(),
        not_before=leaf.not_valid_before_utc.timestamp(),
        not_after=leaf.not_valid_after_utc.timestamp(),
        serial=f"{leaf.serial_number:x}",
        fingerprint=leaf.fingerprint(hashes.SHA256()).hex(),
        key_type=_key_type(leaf),
    )


def _key_type(leaf: Certificate) -> str:
    try:
        key = leaf.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return "unknown"
    if isinstance(key, EllipticCurvePublicKey):
        return f"ECDSA {key.curve.name}"
    if isinstance(key, RSAPublicKey):
        return f"RSA {key.key_size}"
    return type(key).__name__.removesuffix("PublicKey")
