"""Tokens of Retry: for one address, one connection and a short time; and nobody else's are touched."""

from pathlib import Path

import pytest

from expressgateway.l4.passthrough.retry import LIFE_MS, SKEW_MS, RetryTokens, Verdict, retry_cid
from expressgateway.net.batches import Address
from tests.e2e.retry_backend import TokenReader

SECRET = bytes(range(32))
HERE: Address = ("192.0.2.1", 4433)
ORIGINAL, SOURCE = b"\x01" * 8, b"\x02" * 8
NOW_MS = 1_800_000_000_000


class Clock:
    ms = NOW_MS

    def __call__(self) -> int:
        return self.ms


def tokens(clock: Clock | None = None, secret: bytes = SECRET) -> RetryTokens:
    return RetryTokens(secret, clock or Clock())


@pytest.mark.parametrize("address", [HERE, ("2001:db8::1", 4433, 0, 0)])
def test_valid_on_every_worker_and_after_a_restart(address: Address) -> None:
    token = tokens().mint(address, ORIGINAL, SOURCE)
    assert tokens().check(token, address, SOURCE) is Verdict.VALID
    assert tokens().mint(address, ORIGINAL, SOURCE) != token


def test_an_ipv4_address_is_the_same_through_an_ipv6_socket() -> None:
    token = tokens().mint(("::ffff:192.0.2.1", 4433, 0, 0), ORIGINAL, SOURCE)
    assert tokens().check(token, HERE, SOURCE) is Verdict.VALID


@pytest.mark.parametrize(
    ("address", "destination"),
    [
        (("192.0.2.2", 4433), SOURCE),
        (("192.0.2.1", 4434), SOURCE),
        (("2001:db8::1", 4433, 0, 0), SOURCE),
        (HERE, ORIGINAL),
        (HERE, SOURCE + b"\x02"),
        (HERE, b""),
    ],
)
def test_of_another_client_or_connection(address: Address, destination: bytes) -> None:
    assert tokens().check(tokens().mint(HERE, ORIGINAL, SOURCE), address, destination) is Verdict.STALE


@pytest.mark.parametrize(
    ("age_ms", "verdict"),
    [
        (LIFE_MS, Verdict.VALID),
        (LIFE_MS + 1, Verdict.STALE),
        (-SKEW_MS, Verdict.VALID),  # the clock of another gateway
        (-SKEW_MS - 1, Verdict.STALE),
    ],
)
def test_time(age_ms: int, verdict: Verdict) -> None:
    clock = Clock()
    made = tokens(clock)
    token = made.mint(HERE, ORIGINAL, SOURCE)
    clock.ms += age_ms
    assert made.check(token, HERE, SOURCE) is verdict


def test_what_we_did_not_mint_is_not_ours_to_judge() -> None:
    token = tokens().mint(HERE, ORIGINAL, SOURCE)
    forged = token[:20] + bytes((token[20] ^ 1,)) + token[21:]
    for other in (b"", b"x", b"EGR1", b"EGR1" + bytes(28), forged, token[:-1], token + b"\0"):
        assert tokens().check(other, HERE, SOURCE) is Verdict.FOREIGN
    assert tokens(secret=bytes(32)).check(token, HERE, SOURCE) is Verdict.FOREIGN


def test_a_reader_written_after_the_documentation(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    reader = TokenReader(path)
    token = tokens().mint(HERE, ORIGINAL, SOURCE)
    assert reader.validate_token(address=None, destination_cid=SOURCE, token=token, now=0) == ORIGINAL
    (read,) = reader.read
    assert (read["ms"], read["ip"], read["port"]) == (NOW_MS, bytes((192, 0, 2, 1)), 4433)


def test_a_retrys_connection_id_is_no_server_id() -> None:
    cids = {retry_cid() for _ in range(100)}
    assert len(cids) == 100
    assert all(len(cid) == 8 and cid[0] == 0xE7 for cid in cids)
