"""OCSP responses: which of them may be stapled, and until when."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from expressgateway.config.staples import MAX_BYTES, ends_at, fault_of
from tests.config.material import certificate, new_key, ocsp_response

NOW = datetime.now(UTC)
KEY = new_key()
PEM = certificate(KEY)
CHAIN = [x509.load_pem_x509_certificate(PEM)]


def test_a_good_one() -> None:
    assert fault_of(ocsp_response(PEM, KEY), CHAIN, NOW) == ""


def test_one_without_an_end() -> None:
    response = ocsp_response(PEM, KEY, ends=None)
    assert fault_of(response, CHAIN, NOW) == ""
    assert ends_at(response) is None


def test_its_end() -> None:
    ends = (NOW + timedelta(days=2)).replace(microsecond=0)
    assert ends_at(ocsp_response(PEM, KEY, ends=ends)) == ends.timestamp()
    assert ends_at(b"garbage") is None


@pytest.mark.parametrize(
    ("response", "fault"),
    [
        (b"", "holds no OCSP response"),
        (b"garbage", "holds no OCSP response"),
        (PEM, "holds no OCSP response"),
        (b"0" * (MAX_BYTES + 1), "an OCSP response at most"),
        (ocsp_response(PEM, KEY)[:-20], "holds no OCSP response"),
        (ocsp_response(certificate(KEY), KEY), "about another certificate"),
        (ocsp_response(PEM, KEY, is_revoked=True), "says that the certificate is revoked"),
        (ocsp_response(PEM, KEY, ends=NOW - timedelta(minutes=1)), "was good until"),
        (
            ocsp_response(PEM, KEY, begins=NOW + timedelta(hours=1), ends=NOW + timedelta(hours=2)),
            "is not good before",
        ),
        (
            ocsp.OCSPResponseBuilder.build_unsuccessful(ocsp.OCSPResponseStatus.TRY_LATER).public_bytes(
                Encoding.DER
            ),
            "says try_later",
        ),
    ],
    ids=["empty", "garbage", "PEM", "large", "cut", "other", "revoked", "old", "early", "later"],
)
def test_what_is_not_stapled(response: bytes, fault: str) -> None:
    assert fault in fault_of(response, CHAIN, NOW)


def test_the_same_serial_of_another_issuer() -> None:
    """Serial numbers tell certificates of one issuer apart, and no more."""
    stranger = new_key()
    response = ocsp_response(PEM, stranger, issuer=certificate(stranger))
    assert "about another certificate" in fault_of(response, CHAIN, NOW)
