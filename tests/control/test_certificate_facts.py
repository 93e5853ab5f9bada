"""What certificates say, and when their ends are worth a word."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from expressgateway.control.certificate_facts import DAY_S, Facts, Stage, facts_of
from tests.config.material import certificate, new_key

BEGIN = datetime(2030, 1, 1, tzinfo=UTC)


def facts(days: int) -> Facts:
    found = facts_of(certificate(new_key(), begins=BEGIN, ends=BEGIN + timedelta(days=days)))
    assert found is not None
    return found


def test_what_it_says() -> None:
    names = [x509.DNSName("A.example"), x509.IPAddress(ip_address("::1"))]
    found = facts_of(certificate(new_key(), names=names, begins=BEGIN, ends=BEGIN + timedelta(days=90)))
    assert found is not None
    assert (found.subject, found.issuer) == ("CN=test.example", "CN=test.example")
    assert found.names == ("a.example", "::1")
    assert (found.not_before, found.not_after) == (BEGIN.timestamp(), BEGIN.timestamp() + 90 * DAY_S)
    assert found.key_type == "ECDSA secp256r1"
    assert (len(found.fingerprint), found.label) == (64, "CN=test.example")
    assert int(found.serial, 16) > 0


def test_other_keys() -> None:
    found = facts_of(certificate(rsa.generate_private_key(65537, 2048)))
    assert found is not None
    assert found.key_type == "RSA 2048"


@pytest.mark.parametrize("pem", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nAA==\n"])
def test_what_is_none(pem: bytes) -> None:
    assert facts_of(pem) is None


@pytest.mark.parametrize(
    ("life", "left", "stage"),
    [
        (365, 31, Stage.FINE),
        (365, 29, Stage.SOON),
        (365, 8, Stage.SOON),
        (365, 6, Stage.URGENT),
        (365, 0, Stage.OVER),
        (365, -9, Stage.OVER),
        # One that lives for six days is renewed in its last two.
        (6, 5, Stage.FINE),
        (6, 1.9, Stage.SOON),
        (6, 0.5, Stage.URGENT),
        (90, 30, Stage.FINE),
        (90, 29.9, Stage.SOON),
    ],
)
def test_stages(life: int, left: float, stage: Stage) -> None:
    found = facts(life)
    assert found.stage(found.not_after - left * DAY_S) is stage
