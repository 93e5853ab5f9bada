"""What all programs of one bench share: addresses, a certificate made on the fly, the files to serve.

Ports come from below the range that the kernel gives to outgoing connections, which the load would otherwise
take between our choosing a port and a program's binding it.
"""

import contextlib
import datetime
import ipaddress
import os
import random
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

BODY_BYTES: Final = 10_000_000
LARGE_BODY_BYTES: Final = 100_000_000
STALLED_BODY_BYTES: Final = 1_000_000_000


@dataclass(frozen=True)
class Ports:
    """Where one program listens: HTTP in clear text, HTTP over TLS, plain TCP, HTTP with everything that a
    pool can have, HTTP over TLS before an HTTP/2 backend, and before one that never answers; None where it
    does not. Over TLS both versions are spoken, by ALPN. ``h3``: HTTP/3, on UDP."""

    http: int
    https: int | None = None
    tcp: int | None = None
    full: int | None = None
    h2: int | None = None
    held: int | None = None
    h3: int | None = None


@dataclass(frozen=True)
class Site:
    """The world of one bench."""

    backend_port: int
    sink_port: int
    h2_backend_port: int
    held_port: int
    """Nobody listens there but while a cell holds streams open."""
    files: Path
    """The directory the backend serves."""
    cert_path: Path
    key_path: Path
    pem_path: Path
    """Certificate and key in one file, as HAProxy wants it."""
    is_root: bool


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, all different, outside the range of outgoing connections."""
    low = 32768
    with contextlib.suppress(OSError):
        low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text("ascii").split()[0])
    top = low if low > 12000 else 32768
    held: list[socket.socket] = []
    try:
        while len(held) < count:
            candidate = socket.socket()
            try:
                candidate.bind(("127.0.0.1", random.randrange(10000, top)))
            except OSError:
                candidate.close()
                continue
            held.append(candidate)
        return [candidate.getsockname()[1] for candidate in held]
    finally:
        for candidate in held:
            candidate.close()


def make_certificate(directory: Path, common_name: str = "localhost") -> tuple[Path, Path, Path]:
    """A self-signed P-256 certificate for localhost; returns certificate, key, and both in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert_pem = certificate.public_bytes(serialization.Encoding.PEM)
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    paths = directory / "cert.pem", directory / "key.pem", directory / "both.pem"
    for path, content in zip(paths, (cert_pem, key_pem, cert_pem + key_pem), strict=True):
        path.touch(mode=0o600)
        path.write_bytes(content)
    return paths


def make_site(directory: Path) -> Site:
    """Certificate, the 10 MB file, and sparse files: 100 MB, and 1 GB that nobody reads to its end."""
    files = directory / "files"
    files.mkdir()
    (files / "10m").write_bytes(random.randbytes(BODY_BYTES))
    for name, size in (("100m", LARGE_BODY_BYTES), ("1g", STALLED_BODY_BYTES)):
        with (files / name).open("wb") as big:
            big.truncate(size)
    backend_port, sink_port, h2_backend_port, held_port = free_ports(4)
    return Site(
        backend_port,
        sink_port,
        h2_backend_port,
        held_port,
        files,
        *make_certificate(directory),
        is_root=os.geteuid() == 0,
    )
