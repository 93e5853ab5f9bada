"""The pauses before replacements."""

from expressgateway.control.backoff import CAP_S, GOOD_LIFE_S, Backoff


def test_at_once_then_doubling_to_the_cap() -> None:
    backoff = Backoff()
    assert [backoff.pause_s(1) for _ in range(10)] == [0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10]
    assert backoff.failures == 10


def test_good_life_forgives() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.pause_s(GOOD_LIFE_S - 1)
    assert backoff.pause_s(GOOD_LIFE_S) == 0
    assert backoff.pause_s(1) == 0.1


def test_crash_loop_of_days_does_not_overflow() -> None:
    backoff = Backoff()
    assert max(backoff.pause_s(0) for _ in range(10_000)) == CAP_S
