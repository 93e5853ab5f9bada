"""Reset codes between versions (RFC 9113 7, RFC 9114 8.1)."""

import pytest

from expressgateway.proxy.grpc_status import Code, code_of_reset
from expressgateway.wire.errors import MalformedError, StreamResetError, WireError
from expressgateway.wire.resets import reset_code, translated


@pytest.mark.parametrize(
    ("h2", "h3"),
    [(0, 0x100), (1, 0x101), (2, 0x102), (7, 0x10B), (8, 0x10C), (0xA, 0x10F), (0xB, 0x107), (0xD, 0x110)],
)
def test_there_and_back(h2: int, h3: int) -> None:
    assert translated(h2, True) == h3
    assert translated(h3, False) == h2
    assert translated(h2, False) == h2
    assert translated(h3, True) == h3


def test_the_nearest() -> None:
    assert [translated(code, False) for code in (0x10E, 0x10D, 0x105, 0x106, 0x200)] == [1, 1, 1, 6, 9]
    assert [translated(code, True) for code in (3, 4, 5, 6, 9)] == [0x101, 0x101, 0x101, 0x106, 0x200]


def test_codes_that_neither_defines() -> None:
    assert translated(0x77, False) == 0x77
    assert translated(0x77, True) == 0x102
    assert translated(0x4242, True) == 0x4242
    assert translated(2**40, False) == 2
    assert translated(2**40, True) == 2**40


class _DeadlineError(WireError):
    kind = "deadline"


@pytest.mark.parametrize(
    ("cause", "h2", "h3"),
    [
        (None, 2, 0x102),
        (MalformedError("x"), 2, 0x102),
        (StreamResetError(8), 8, 0x10C),
        (StreamResetError(0x10B), 7, 0x10B),
        (StreamResetError(0), 2, 0x102),
        (StreamResetError(0x100), 2, 0x102),
        (_DeadlineError("x"), 8, 0x10C),
    ],
    ids=str,
)
def test_the_code_for_giving_up(cause: WireError | None, h2: int, h3: int) -> None:
    assert reset_code(cause, 2) == h2
    assert reset_code(cause, 0x102, to_h3=True) == h3


def test_grpc() -> None:
    for h2, h3 in ((8, 0x10C), (7, 0x10B), (0xB, 0x107), (2, 0x102)):
        assert code_of_reset(h3) is code_of_reset(h2)
    assert code_of_reset(0x10C) is Code.CANCELLED
