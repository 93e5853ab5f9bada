"""Retry tokens: good for one client, for a while, once; on every worker and after a restart."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expressgateway.net.quic import tokens as tokens_module
from expressgateway.net.quic.tokens import LIFETIME_S, BadTokenError, RetryTokens

SECRET = b"secret"
CLIENT = ("192.0.2.1", 4433)
ORIGINAL = b"original"
RETRY = b"retry-id-of-12"
NOW = 1_700_000_000


def make(*, at: int = NOW, address: tuple[str, int] = CLIENT, secret: bytes = SECRET) -> bytes:
    return RetryTokens(secret).make(address, ORIGINAL, RETRY, at)


def refusal(
    token: bytes,
    *,
    at: int = NOW,
    address: tuple[str, int] = CLIENT,
    retry: bytes = RETRY,
    tokens: RetryTokens | None = None,
) -> str:
    with pytest.raises(BadTokenError) as caught:
        (tokens or RetryTokens(SECRET)).read(token, address, retry, at)
    return str(caught.value)


def test_the_next_worker_and_the_next_process_can_read_it() -> None:
    assert RetryTokens(SECRET).read(make(), CLIENT, RETRY, NOW + 1) == ORIGINAL


@pytest.mark.parametrize("address", [("192.0.2.1", 4434), ("192.0.2.2", 4433), ("2001:db8::1", 4433)])
def test_another_address(address: tuple[str, int]) -> None:
    assert refusal(make(), address=address) == "address"


def test_another_connection_id() -> None:
    assert refusal(make(), retry=b"another") == "address"


def test_addresses_of_version_6_and_of_one_link() -> None:
    for host in ("2001:db8::1", "fe80::1%lo"):
        token = make(address=(host, 1))
        assert RetryTokens(SECRET).read(token, (host, 1), RETRY, NOW) == ORIGINAL


@pytest.mark.parametrize("age", [LIFETIME_S + 1, 3600, 10**9])
def test_too_old(age: int) -> None:
    assert refusal(make(), at=NOW + age) == "expired"


def test_at_the_end_of_its_life() -> None:
    assert RetryTokens(SECRET).read(make(), CLIENT, RETRY, NOW + LIFETIME_S) == ORIGINAL


def test_from_the_future() -> None:
    assert refusal(make(at=NOW + 60)) == "expired"
    assert RetryTokens(SECRET).read(make(at=NOW + 5), CLIENT, RETRY, NOW) == ORIGINAL


def test_twice() -> None:
    tokens = RetryTokens(SECRET)
    token = make()
    tokens.read(token, CLIENT, RETRY, NOW)
    for later in (0, 1, LIFETIME_S):
        assert refusal(token, at=NOW + later, tokens=tokens) == "replayed"


def test_a_refused_one_is_not_used_up() -> None:
    tokens = RetryTokens(SECRET)
    token = make()
    assert refusal(token, address=("192.0.2.9", 1), tokens=tokens) == "address"
    assert tokens.read(token, CLIENT, RETRY, NOW) == ORIGINAL


def test_of_another_secret() -> None:
    assert refusal(make(secret=b"other")) == "foreign"


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_garbage(token: bytes) -> None:
    assert refusal(token) == "foreign"


def test_every_bit_counts() -> None:
    token = make()
    for at in range(len(token)):
        changed = token[:at] + bytes((token[at] ^ 1,)) + token[at + 1 :]
        assert refusal(changed) == "foreign"
    for size in range(len(token)):
        assert refusal(token[:size]) == "foreign"


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "MAX_REMEMBERED", 10)
    tokens = RetryTokens(SECRET)
    for _ in range(10):
        tokens.read(make(), CLIENT, RETRY, NOW)
    assert refusal(make(), tokens=tokens) == "replayed"
    assert len(tokens._used) == 10
    # and forgotten when it cannot be used any more
    later = NOW + 2 * LIFETIME_S
    assert tokens.read(make(at=later), CLIENT, RETRY, later) == ORIGINAL
    assert len(tokens._used) == 1


@pytest.mark.parametrize("size", [0, 8, 20])
def test_connection_ids_of_any_length(size: int) -> None:
    tokens = RetryTokens(SECRET)
    token = tokens.make(CLIENT, b"o" * size, b"r" * size, NOW)
    assert tokens.read(token, CLIENT, b"r" * size, NOW) == b"o" * size
