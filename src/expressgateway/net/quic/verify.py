"""Whether a backend's certificate is one to be trusted, decided after the library's handshake has proved it.

The library's own verification takes certification authorities only. Operators also name a backend's own,
self-signed certificate as its CA, as OpenSSL allows; such a one is trusted if it is exactly the certificate
that was shown, is valid now, and is for the name that was asked for.
"""

import ssl
from datetime import UTC, datetime
from functools import cache
from ipaddress import ip_address
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from qh3 import tls
from qh3._hazmat import Certificate

BAD_CERTIFICATE: Final = 0x100 + tls.AlertDescription.bad_certificate


class UntrustedError(Exception):
    """The certificate is not accepted. ``str()`` is the rest of a sentence."""


class Trust:
    """Whom a backend's certificate must come from, and for which name."""

    __slots__ = ("_ca", "_pinned", "_server_name")

    def __init__(self, ca: bytes | None, server_name: str) -> None:
        """``ca``: certificates as PEM; ``None``: what the system trusts. Raises ``ValueError`` if they cannot
        be read."""
        self._ca = _system_roots() if ca is None else ca
        self._server_name = server_name
        self._pinned: dict[bytes, x509.Certificate] = {}
        if ca is not None:
            for certificate in x509.load_pem_x509_certificates(ca):
                self._pinned[certificate.public_bytes(Encoding.DER)] = certificate

    def check(self, leaf: Certificate, chain: list[Certificate]) -> None:
        """Raises ``UntrustedError``."""
        pinned = self._pinned.get(leaf.public_bytes())
        if pinned is not None:
            self._check_pinned(pinned)
            return
        try:
            tls.verify_certificate(leaf, list(chain), cadata=self._ca, server_name=self._server_name)
        except Exception as error:  # whatever the library makes of a peer's certificate
            raise UntrustedError(str(error) or type(error).__name__) from error

    def _check_pinned(self, leaf: x509.Certificate) -> None:
        now = datetime.now(UTC)
        if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
            raise UntrustedError("the certificate is not valid now")
        try:
            names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (x509.ExtensionNotFound, ValueError):
            raise UntrustedError("the certificate names nobody") from None
        if not _covers(names, self._server_name):
            raise UntrustedError(f"the certificate is not for {self._server_name}")


def _covers(names: x509.SubjectAlternativeName, wanted: str) -> bool:
    """RFC 6125 6.4: a wildcard stands for exactly one label."""
    try:
        address = ip_address(wanted)
    except ValueError:
        wanted = wanted.lower()
        parent = wanted.partition(".")[2]
        covered = {name.lower() for name in names.get_values_for_type(x509.DNSName)}
        return wanted in covered or (bool(parent) and f"*.{parent}" in covered)
    return address in names.get_values_for_type(x509.IPAddress)


@cache
def _system_roots() -> bytes:
    """What OpenSSL trusts on this machine, as PEM."""
    context = ssl.create_default_context()
    return "".join(ssl.DER_cert_to_PEM_cert(der) for der in context.get_ca_certs(binary_form=True)).encode()
