"""When a worker is replaced: at once the first time, then later and later."""

from typing import Final

FIRST_S: Final = 0.1
CAP_S: Final = 10.0
GOOD_LIFE_S: Final = 30.0


class Backoff:
    """The pause before each replacement: 0, 0.1, 0.2, 0.4 ... 10 seconds, and 0 again after a good life."""

    __slots__ = ("_cap_s", "_failures", "_first_s", "good_life_s")

    def __init__(
        self, first_s: float = FIRST_S, cap_s: float = CAP_S, good_life_s: float = GOOD_LIFE_S
    ) -> None:
        self._first_s = first_s
        self._cap_s = cap_s
        self.good_life_s = good_life_s
        """A worker that lived so long is no failure of those before it."""
        self._failures = 0

    @property
    def failures(self) -> int:
        """Lives in a row, none of them good, that ended."""
        return self._failures

    def pause_s(self, lived_s: float) -> float:
        """Seconds to wait after a worker that lived `lived_s`."""
        if lived_s >= self.good_life_s:
            self._failures = 0
        self._failures += 1
        if self._failures == 1:
            return 0.0
        # the exponent is bounded, or the power overflows in a crash loop of days
        return min(self._cap_s, self._first_s * 2.0 ** min(self._failures - 2, 20))
