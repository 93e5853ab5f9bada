"""Certificates and keys for the tests of the configuration, made on the fly."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509 import ocsp

_NOW = datetime.now(UTC)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def certificate(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    *,
    names: Sequence[x509.GeneralName] = (),
    begins: datetime = _NOW - timedelta(days=1),
    ends: datetime = _NOW + timedelta(days=30),
) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test.example")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def ocsp_response(
    pem: bytes,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    *,
    begins: datetime = _NOW - timedelta(hours=1),
    ends: datetime | None = _NOW + timedelta(days=3),
    is_revoked: bool = False,
    issuer: bytes | None = None,
) -> bytes:
    """What the authority whose key that is says of a certificate (PEM): of one signed by itself, unless the
    issuer is given."""
    leaf = x509.load_pem_x509_certificate(pem)
    authority = x509.load_pem_x509_certificate(issuer) if issuer is not None else leaf
    status = ocsp.OCSPCertStatus.REVOKED if is_revoked else ocsp.OCSPCertStatus.GOOD
    builder = (
        ocsp.OCSPResponseBuilder()
        .add_response(
            leaf, authority, hashes.SHA256(), status, begins, ends, begins if is_revoked else None, None
        )
        .responder_id(ocsp.OCSPResponderEncoding.HASH, authority)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def key_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, passphrase: bytes | None = None) -> bytes:
    encryption = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def write(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
    return path


def write_certs(directory: Path) -> Path:
    """Every file that examples and golden files name, good and bad, in `directory`/certs."""
    certs = directory / "certs"
    server, other = new_key(), new_key()
    good = certificate(server)
    write(certs / "server.pem", good)
    write(certs / "server.key", key_pem(server))
    write(certs / "other.pem", certificate(other, names=[x509.DNSName("other.example")]))
    write(certs / "other.key", key_pem(other))
    write(certs / "twin.pem", certificate(other))
    write(certs / "ca.pem", certificate(other))
    write(certs / "open.key", key_pem(server), 0o644)
    write(certs / "encrypted.key", key_pem(server, b"secret"))
    write(certs / "secret.bin", bytes(32))
    write(certs / "open-secret.bin", bytes(32), 0o644)
    write(certs / "short-secret.bin", bytes(16))
    write(certs / "long.pem", good * 7)
    write(certs / "six.pem", good + certificate(other) * 5)
    write(certs / "reversed.pem", certificate(other) + good)
    write(certs / "garbage.pem", b"\x00\x01 this is not PEM")
    write(certs / "empty.pem", b"")
    expired = certificate(
        server, begins=datetime(2020, 1, 1, tzinfo=UTC), ends=datetime(2021, 1, 1, tzinfo=UTC)
    )
    write(certs / "expired.pem", expired)
    future = certificate(
        server, begins=datetime(2100, 1, 1, tzinfo=UTC), ends=datetime(2101, 1, 1, tzinfo=UTC)
    )
    write(certs / "future.pem", future)
    return certs
