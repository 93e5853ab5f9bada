"""Server ids in connection IDs, by the vectors of draft-ietf-quic-load-balancers-21 (appendix B)."""

import os
from itertools import product

import pytest

from expressgateway.l4.passthrough.quic_lb import MAX_PLAINTEXT_BYTES, MIN_NONCE_BYTES, ServerIds
from tests.e2e.quic_lb_backend import Issuer

KEY = bytes.fromhex("8f95f09245765f80256934e50c66207f")

VECTORS = [
    (None, 0, "c4605e", "4504cc4f", "07c4605e4504cc4f"),
    (None, 1, "350d28b420", "03487d970b", "2a350d28b42003487d970b"),
    (KEY, 0, "ed793a", "ee080dbf", "0720b1d07b359d3c"),
    (KEY, 1, "ed793a51d49b8f5fab65", "ee080dbf48", "2fcc381bc74cb4fbad2823a3d1f8fed2"),
    (KEY, 2, "ed793a51d49b8f5f", "ee080dbf48c0d1e5", "504dd2d05a7b0de9b2b9907afb5ecf8cc3"),
    (KEY, 3, "ed793a51d49b8f5fab", "ee080dbf48c0d1e55d", "125779c9cc86beb3a3a4a3ca96fce4bfe0cdbc"),
]
"""The draft prints the second one's nonce with an odd number of digits; here it has the zero before them that
is missing there. The last one's first octet names the configuration 0, and it is read so."""


@pytest.mark.parametrize(("key", "config_id", "server_id", "nonce", "cid"), VECTORS)
def test_vectors(key: bytes | None, config_id: int, server_id: str, nonce: str, cid: str) -> None:
    config_id = int(cid[:2], 16) >> 5
    ids = ServerIds(config_id, len(server_id) // 2, key)
    assert ids.read(bytes.fromhex(cid)) == bytes.fromhex(server_id)
    issuer = Issuer(config_id, bytes.fromhex(server_id), len(nonce) // 2, key)
    assert issuer.issue(bytes.fromhex(nonce)).hex() == cid


def test_the_drafts_example_of_four_passes() -> None:
    """5.4.2.4."""
    key = bytes.fromhex("fdf726a9893ec05c0632d3956680baf0")
    assert ServerIds(0, 3, key).read(bytes.fromhex("0767947d29be054a")) == bytes.fromhex("31441a")


@pytest.mark.parametrize("key", [None, KEY])
def test_every_length(key: bytes | None) -> None:
    """What a backend that was written after the draft issues is read, whatever the lengths."""
    for length, nonce_bytes in product(range(1, 16), range(MIN_NONCE_BYTES, 19)):
        if length + nonce_bytes <= MAX_PLAINTEXT_BYTES:
            server_id = os.urandom(length)
            cid = Issuer(4, server_id, nonce_bytes, key).issue()
            assert ServerIds(4, length, key).read(cid) == server_id
            assert ServerIds(4, length, key).cid_bytes(cid[0]) == len(cid)


@pytest.mark.parametrize(
    "cid",
    [
        "",
        "07",
        "07c4605e4504cc",  # shorter than it says
        "07c4605e4504cc4f00",  # longer
        "27c4605e4504cc4f",  # another configuration
        "e7c4605e4504cc4f",  # 0b111: unroutable (3.2)
        "06c4605e4504cc",  # a nonce of 3 bytes
        "14" + "00" * 20,  # more than 19 bytes
    ],
)
def test_unroutable(cid: str) -> None:
    assert ServerIds(0, 3, None).read(bytes.fromhex(cid)) is None
    assert ServerIds(0, 3, KEY).read(bytes.fromhex(cid)) is None
