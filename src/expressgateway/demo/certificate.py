"""A certificate made on the fly, signed by itself: for the demo and for tests, never for serving strangers.

Whoever is to trust it is given the certificate itself as its authority (`curl --cacert`).
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CertificateFiles", "CertificatePem", "make_certificate", "write_certificate"]

LOCAL_NAMES: Final = ("localhost", "*.localhost", "127.0.0.1", "::1")
CLOCK_SKEW: Final = datetime.timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class CertificatePem:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """Where a certificate and its private key were written."""

    certificate: Path
    key: Path


def make_certificate(*names: str, days: float = 30, local: bool = True) -> CertificatePem:
    """A self-signed ECDSA P-256 certificate for servers and clients.

    `names` are DNS names or IP addresses; the first one is the common name. Those of this machine
    (LOCAL_NAMES) are added unless `local` is false. `days` is how long it is valid from now; negative makes
    one that has expired.
    """
    now = datetime.datetime.now(datetime.UTC)
    ends = now + datetime.timedelta(days=days)
    all_names = tuple(dict.fromkeys((*names, *LOCAL_NAMES) if local else names))
    if not all_names:
        raise ValueError("a certificate needs a name")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, all_names[0])])
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, ends) - CLOCK_SKEW)
        .not_valid_after(ends)
        .add_extension(x509.SubjectAlternativeName(_as_general_names(all_names)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    return CertificatePem(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


def write_certificate(directory: Path | str, pem: CertificatePem, stem: str = "demo") -> CertificateFiles:
    """Write `stem`.crt and `stem`.key, the key readable by its owner alone from its first byte on. Raises
    OSError.
    """
    files = CertificateFiles(Path(directory) / f"{stem}.crt", Path(directory) / f"{stem}.key")
    files.certificate.write_bytes(pem.certificate)
    files.key.unlink(missing_ok=True)
    with open(os.open(files.key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem.key)
    return files


def _as_general_names(names: Iterable[str]) -> list[x509.GeneralName]:
    result: list[x509.GeneralName] = []
    for name in names:
        try:
            result.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            result.append(x509.DNSName(name))
    return result
