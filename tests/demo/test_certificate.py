"""The certificate made on the fly, as OpenSSL sees it."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import stat
import threading
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from expressgateway.demo.certificate import make_certificate, write_certificate

if TYPE_CHECKING:
    from pathlib import Path


def loaded(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def handshake(directory: Path, name: str, days: float = 30) -> None:
    """A TLS handshake in which the client trusts the certificate and asks for `name`. Raises what the
    client does.
    """
    files = write_certificate(directory, make_certificate("extra.example", "192.0.2.1", days=days))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.certificate, files.key)
    client = ssl.create_default_context(cafile=str(files.certificate))
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except (OSError, ssl.SSLError):
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client.wrap_socket(ours, server_hostname=name).close()
    finally:
        ours.close()
        thread.join()


class TestNames:
    @pytest.mark.parametrize(
        "name",
        ["localhost", "127.0.0.1", "::1", "extra.example", "192.0.2.1"],
    )
    def test_are_accepted(self, tmp_path: Path, name: str) -> None:
        handshake(tmp_path, name)

    @pytest.mark.parametrize("name", ["other.example", "192.0.2.2", "a.b.localhost"])
    def test_others_are_not(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
            handshake(tmp_path, name)

    def test_a_wildcard_for_local_names(self) -> None:
        # OpenSSL takes no wildcard right below a top-level name; other libraries do.
        certificate = loaded(make_certificate().certificate)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["localhost", "*.localhost"]

    def test_exactly_those_asked_for(self) -> None:
        certificate = loaded(make_certificate("only.example", "::2", local=False).certificate)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["only.example"]
        assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("::2")]
        assert certificate.subject.rfc4514_string() == "CN=only.example"

    def test_none(self) -> None:
        with pytest.raises(ValueError, match="needs a name"):
            make_certificate(local=False)


class TestValidity:
    def test_days(self) -> None:
        certificate = loaded(make_certificate(days=3).certificate)
        now = datetime.datetime.now(datetime.UTC)
        assert certificate.not_valid_before_utc < now
        assert abs(certificate.not_valid_after_utc - now - datetime.timedelta(days=3)).total_seconds() < 60

    def test_an_expired_one(self, tmp_path: Path) -> None:
        with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
            handshake(tmp_path, "localhost", days=-1)


def test_the_key_is_p_256_and_new_each_time() -> None:
    first, second = make_certificate(), make_certificate()
    key = loaded(first.certificate).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    assert first.key != second.key
    assert loaded(first.certificate).serial_number != loaded(second.certificate).serial_number


def test_the_key_file_is_its_owners_alone(tmp_path: Path) -> None:
    (tmp_path / "web.key").write_text("an older one that others could read")
    (tmp_path / "web.key").chmod(0o644)
    pem = make_certificate()
    files = write_certificate(tmp_path, pem, "web")
    assert files.certificate == tmp_path / "web.crt"
    assert files.certificate.read_bytes() == pem.certificate
    assert files.key.read_bytes() == pem.key
    assert stat.S_IMODE(files.key.stat().st_mode) == 0o600
