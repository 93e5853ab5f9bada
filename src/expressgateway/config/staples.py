"""OCSP responses that a listener staples (RFC 6066 8, RFC 6960): whether one is for its certificate, and how
long.

The response is made by the certificate's authority and fetched by the operator's tooling; its signature is
for clients to check.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509 import ocsp

MAX_BYTES: Final = 65_536
"""The largest response: TLS has no room for 16 MiB, and real ones have 500 to 2,500 bytes."""


def fault_of(data: bytes, chain: Sequence[x509.Certificate], now: datetime) -> str:
    """Why a response (DER) cannot be stapled to the first certificate of `chain`, as the end of a sentence
    that begins with its file. Empty: it can."""
    if len(data) > MAX_BYTES:
        return f"has {len(data)} bytes, and an OCSP response at most {MAX_BYTES}"
    try:
        response = ocsp.load_der_ocsp_response(data)
        if response.response_status is not ocsp.OCSPResponseStatus.SUCCESSFUL:
            return f"says {response.response_status.name.lower()} and nothing about the certificate"
        serial, state = response.serial_number, response.certificate_status
        begins, ends = response.this_update_utc, response.next_update_utc
    except (ValueError, UnsupportedAlgorithm):
        return "holds no OCSP response (DER) about one certificate"
    if serial != chain[0].serial_number or not _is_issued_as(response, chain):
        return "is an OCSP response about another certificate"
    if state is not ocsp.OCSPCertStatus.GOOD:
        return f"says that the certificate is {state.name.lower()}"
    if ends is not None and ends <= now:
        return f"was good until {_shown(ends)}"
    if begins > now:
        return f"is not good before {_shown(begins)}"
    return ""


def ends_at(data: bytes) -> float | None:
    """Until when a response may be stapled, seconds since 1970. None: it does not say, or is none."""
    try:
        ends = ocsp.load_der_ocsp_response(data).next_update_utc
    except (ValueError, UnsupportedAlgorithm):
        return None
    return ends.timestamp() if ends is not None else None


def _is_issued_as(response: ocsp.OCSPResponse, chain: Sequence[x509.Certificate]) -> bool:
    """Whether the issuer is the one of the chain, where the chain has it: serials are unique to an issuer."""
    issuer = next((each for each in chain if each.subject == chain[0].issuer), None)
    if issuer is None:
        return True
    try:
        like = ocsp.OCSPRequestBuilder().add_certificate(chain[0], issuer, response.hash_algorithm).build()
    except (ValueError, UnsupportedAlgorithm):
        return True
    return like.issuer_key_hash == response.issuer_key_hash


def _shown(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")
