"""When a worker that died is replaced: at once the first time, then later and later."""

from typing import Final

FIRST_S: Final = 0.1
CAP_S: Final = 10.0
GOOD_LIFE_S: Final = 30.0


class Backoff:
    """The pause before each replacement: 0, 0.1, 0.2, 0.4 ... 10 seconds, and 0 again after a good life."""

    __slots__ = ("_failures",)

    def __init__(self) -> None:
        self._failures = 0

    @property
    def failures(self) -> int:
        """Deaths in a row, none of them after a good life."""
        return self._failures

    def pause_s(self, lived_s: float) -> float:
        """Seconds to wait after a worker that lived `lived_s`."""
        if lived_s >= GOOD_LIFE_S:
            self._failures = 0
        self._failures += 1
        if self._failures == 1:
            return 0.0
        # the exponent is bounded, or the power overflows in a crash loop of days
        return min(CAP_S, FIRST_S * 2.0 ** min(self._failures - 2, 20))
